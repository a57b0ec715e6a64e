# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state of a 3FS cluster, and whether it is well: the gate of every change."""

from __future__ import annotations

import re
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import decode_chain
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Looking, Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import check_cluster, target_place
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import Admin

_CELL = re.compile(r"^(\d+)\((\w+)-(\w+)\)$")
_EXPECTABLE = {"mgmtd": "MGMTD", "meta": "META", "storage": "STORAGE"}


def look(admin: Admin, wait_seconds: float = 60) -> dict[str, t.Any]:
    """Nodes, chains, tables and targets as the primary mgmtd knows them."""
    answers = admin.run(
        "list-nodes", "list-chains", "list-chain-tables", "list-targets --orphan", timeout_seconds=wait_seconds
    )
    return parse(*(answer.table() for answer in answers))


def parse(
    nodes: t.Sequence[t.Mapping[str, t.Any]],
    chains: t.Sequence[t.Mapping[str, t.Any]],
    tables: t.Sequence[t.Mapping[str, t.Any]],
    orphans: t.Sequence[t.Mapping[str, t.Any]],
) -> dict[str, t.Any]:
    """The four tables as data."""
    found: dict[str, t.Any] = {"nodes": [], "chains": {}, "tables": {}, "orphans": {}}
    for row in nodes:
        version, _bracket, state = row["ConfigVersion"].partition("(")
        found["nodes"].append(
            {
                "id": int(row["Id"]),
                "type": row["Type"].lower(),
                "status": row["Status"],
                "hostname": row["Hostname"],
                "process": int(row["Pid"]),
                "config_version": int(version or 0),
                "config_status": state.rstrip(")") or "OUTDATED",
                "release": row["ReleaseVersion"],
            }
        )
    for row in chains:
        cells = row.get("Target", [])
        matches = [_CELL.match(cell) for cell in (cells if isinstance(cells, list) else [cells])]
        found["chains"][int(row["ChainId"])] = {
            "status": row["Status"],
            "targets": [
                {"id": int(cell.group(1)), "public": cell.group(2), "local": cell.group(3)} for cell in matches if cell
            ],
        }
    for row in tables:
        versions = found["tables"].setdefault(int(row["ChainTableId"]), {})
        versions[int(row["ChainTableVersion"])] = {"chains": int(row["ChainCount"]), "description": row.get("Desc", "")}
    for row in orphans:
        node = int(row["NodeId"]) if row["NodeId"].isdigit() else None  # N/A of one that nobody has reported yet
        found["orphans"][int(row["TargetId"])] = {"local": row["LocalState"], "node": node}
    return found


def serves(target: t.Mapping[str, t.Any]) -> bool:
    """Whether a target has all data and gives them."""
    return (target["public"], target["local"]) == ("SERVING", "UPTODATE")


def problems(
    state: t.Mapping[str, t.Any],
    expect: t.Mapping[str, int],
    replicas: t.Mapping[int, int] | None = None,
    current: t.Collection[int] = (),
) -> list[str]:
    """What keeps the cluster from being well, in words; empty when it is.

    A service that runs refuses a configuration with another value of a key that it reads only when it starts, and stays
    with the old one. That is no illness, since waiting does not help and restarting others must be possible.

    :param replicas: table -> so many serving replicas are enough for its chains, as one that is being moved has more;
        of other tables all must serve
    :param current: nodes that must have the newest configuration, as they were just started
    """
    found = []
    primaries = [node["id"] for node in state["nodes"] if node["status"] == "PRIMARY_MGMTD"]
    if len(primaries) != 1:
        found.append(f"{len(primaries)} mgmtd are primary instead of one")
    for node in state["nodes"]:
        label = f"{node['type']} {node['id']} on {node['hostname'] or 'an unknown host'}"
        if node["status"] not in ("PRIMARY_MGMTD", "HEARTBEAT_CONNECTED"):
            found.append(f"{label} is {node['status']}")
        elif node["config_status"] == "FAILED" or (node["id"] in current and node["config_status"] != "UPTODATE"):
            found.append(f"{label} has configuration version {node['config_version']}: {node['config_status']}")
    for service, count in expect.items():
        alive = [
            node
            for node in state["nodes"]
            if node["type"] == service and node["status"] in ("PRIMARY_MGMTD", "HEARTBEAT_CONNECTED")
        ]
        if len(alive) < count:
            found.append(f"{len(alive)} of {count} {service} report")
    for number, chain in state["chains"].items():
        serving = sum(map(serves, chain["targets"]))
        enough = (replicas or {}).get(decode_chain(number)[0], 0)
        if chain["status"] == "SERVING" or 0 < enough <= serving:
            continue
        weak = ", ".join(
            f"{target['id']} {target['public']}/{target['local']}" for target in chain["targets"] if not serves(target)
        )
        found.append(f"chain {number} is {chain['status']} ({weak})")
    return found


class Info(Looking):
    """The state of a cluster, waited for if asked, as a resource that changes nothing.

    :param params: options of the module ``threefs_info``
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.wait = float(params.get("wait_healthy_seconds") or 0)
        self.replicas = {int(table): int(count) for table, count in (params.get("replicas") or {}).items()}
        self.losing = [int(node) for node in params.get("losing_nodes") or []]
        self.processes = {int(node): int(pid) for node, pid in (params.get("processes") or {}).items()}
        self.expect = {}
        for service, count in (params.get("expect") or {}).items():
            if service not in _EXPECTABLE:
                raise Refused(
                    f"expect.{service}",
                    count,
                    "this service does not report to mgmtd",
                    f"One of {', '.join(_EXPECTABLE)}",
                )
            if int(count) < 0:
                raise Refused(f"expect.{service}", count, "not a number of services", "0 or more")
            self.expect[service] = int(count)

    def observe(self) -> dict[str, t.Any] | None:
        """The state; waits until it is well when that is asked for."""
        admin = Admin(self.host, self.cluster)
        if not admin.usable(self.predicting):
            return None
        if self.predicting:
            return look(admin)
        end = time.monotonic() + self.wait
        while True:
            state = look(admin, max(60.0, self.wait))
            bad = self._problems(state)
            if not bad or not self.wait:
                return state
            if time.monotonic() >= end:
                more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
                raise HostError(f"{self.cluster} is not well after {self.wait:g} seconds: {'; '.join(bad[:5])}{more}")
            time.sleep(1)

    def _problems(self, state: t.Mapping[str, t.Any]) -> list[str]:
        """What is not well, or what would be lost with the nodes that shall go."""
        if not self.losing:
            old = [
                f"{node['type']} {node['id']} still reports as process {node['process']}"
                for node in state["nodes"]
                if node["process"] != self.processes.get(node["id"], node["process"])
            ]
            return old + problems(state, self.expect, self.replicas, self.processes)
        return [
            f"chain {number} has no other server than node {', '.join(map(str, self.losing))}"
            for number, chain in state["chains"].items()
            if any(target_place(target["id"])[0] in self.losing for target in chain["targets"])
            and not any(
                serves(target) and target_place(target["id"])[0] not in self.losing for target in chain["targets"]
            )
        ]

    def result(self, observed: dict[str, t.Any] | None) -> dict[str, t.Any]:
        """The state and what is wrong with it."""
        if observed is None:
            return {
                "healthy": False,
                "problems": ["there is no cluster yet"],
                "nodes": [],
                "outdated": [],
                "chains": {},
                "tables": {},
                "primary": None,
            }
        bad = self._problems(observed)
        counts: dict[str, int] = {}
        for chain in observed["chains"].values():
            counts[chain["status"]] = counts.get(chain["status"], 0) + 1
        targets: dict[str, int] = {}
        for chain in observed["chains"].values():
            for target in chain["targets"]:
                node = str(target_place(target["id"])[0])
                targets[node] = targets.get(node, 0) + 1
        behind = [node for node in observed["nodes"] if node["config_status"] != "UPTODATE"]
        names = ", ".join(f"{node['type']} {node['id']}" for node in behind[:5]) + (", ..." if len(behind) > 5 else "")
        due = f"not with the newest configuration: {names}; playbook threefs_rolling restarts what cannot take it as it runs"
        return {
            "warnings": [due] if behind and not self.processes else [],  # those of a host that is just being restarted
            "outdated": [node["id"] for node in behind],
            "healthy": not bad,
            "problems": bad,
            "primary": next((node["id"] for node in observed["nodes"] if node["status"] == "PRIMARY_MGMTD"), None),
            "nodes": observed["nodes"],
            "chains": {"count": len(observed["chains"]), "by_status": counts},
            "targets_by_node": targets,
            "tables": {str(number): versions for number, versions in observed["tables"].items()},
        }
