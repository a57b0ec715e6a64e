# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The chain table of one cluster as files in a directory: made, changed when nodes come or go, or only judged."""

from __future__ import annotations

import math
import os
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Cluster, Node
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_change import Move, Placement, place
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_check import (
    HARD,
    Judgement,
    enough,
    judge,
    seats_of,
    touched,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import (
    CHAIN_IDS,
    CHAINS,
    DISKS,
    INDICES,
    NODE_IDS,
    TABLE,
    TARGETS,
    Table,
    chain_id,
    decode_target,
    parse,
    render,
    target_id,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import chunk_size

REPLICAS = 5  # more copies of everything are a mistake
STRIPE = 16
SHOWN_LINES = 200  # longer files are shown as their number of lines


class ChainTable:
    """A chain table below a directory of the controller."""

    predicting = False
    audited = False  # nothing of the controller changes but these files

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.directory = str(params["directory"])
        self.others = [str(path) for path in params["disjoint_from"]]
        self.only_check = params["state"] == "checked"
        self.erasure = params["type"] == "EC"
        self.replicas = int(params["replicas"])
        self.seed = int(params["seed"])
        self.stripe = params["stripe"]
        self.target_prefix, self.chain_prefix = int(params["target_id_prefix"]), int(params["chain_id_prefix"])
        self.discard = bool(params["discard_existing"])
        self._check_places()
        self._check_numbers()
        self.chunk_sizes = [chunk_size(f"chunk_sizes[{n}]", value) for n, value in enumerate(params["chunk_sizes"])]
        self.cluster = (
            cluster_of(params, self.replicas, self.erasure) if params["nodes"] or not self.only_check else None
        )
        if self.cluster:
            self._check_ids(self.cluster)
            self._check_stripe(self.cluster.slots if self.erasure else self.cluster.slots // self.replicas)
        self.placement: Placement | None = None
        self.files: dict[str, str] = {}
        self.kept = False

    # -- options -----------------------------------------------------------------

    def _check_places(self) -> None:
        for option, path in (("directory", self.directory), *(("disjoint_from", other) for other in self.others)):
            if not os.path.isabs(path):
                raise Refused(
                    option, path, "not an absolute path", "Give the whole path, such as {{ inventory_dir }}/chains"
                )
        if os.path.normpath(self.directory) in [os.path.normpath(other) for other in self.others]:
            raise Refused(
                "disjoint_from",
                self.directory,
                "this is the table's own directory",
                "Name the directories of other tables",
            )

    def _check_numbers(self) -> None:
        if self.replicas < 1 or (self.replicas > REPLICAS and not self.erasure):
            raise Refused(
                "replicas",
                self.replicas,
                "not a number of replicas",
                f"Use 1 to {REPLICAS}; larger groups are for type EC",
            )
        if self.erasure and self.replicas < 2:
            raise Refused("replicas", self.replicas, "an EC group has data and parity", "Use at least 2 targets")
        if self.stripe is not None and self.stripe < 1:
            raise Refused("stripe", self.stripe, "not a number of chains", "Use at least 1, usually 16")
        for option, prefix in (("target_id_prefix", self.target_prefix), ("chain_id_prefix", self.chain_prefix)):
            if not 1 <= prefix <= 99:
                raise Refused(option, prefix, "out of range", "The ids leave room for 1 to 99")

    def _check_ids(self, cluster: Cluster) -> None:
        disks = max(node.disks for node in cluster.nodes)
        highest = chain_id(self.chain_prefix, disks - 1, -(-cluster.slots // disks))
        if highest >= CHAIN_IDS:
            raise Refused(
                "chain_id_prefix",
                self.chain_prefix,
                f"chain ids would reach {highest}, and they have 32 bits",
                f"Use at most {(CHAIN_IDS - 1) // (DISKS * 100_000) - 1}",
            )

    def _check_stripe(self, chains: int) -> None:
        if self.stripe is not None and chains < self.stripe:
            raise Refused(
                "stripe",
                self.stripe,
                f"the table has {chains} chains, and 3FS needs as many as a stripe has",
                f"Use a stripe of at most {chains}, or more targets_per_disk",
            )

    # -- the resource ------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """The texts of the files that are there, and the tables of the others."""
        return {
            "files": self._texts(self.directory),
            "others": {path: self._table(path, self._texts(path)) for path in self.others},
        }

    def _texts(self, directory: str) -> dict[str, str]:
        texts = {}
        for name in (CHAINS, TABLE, TARGETS):
            path = self.host.path(os.path.join(directory, name))
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    texts[name] = file.read()
        return texts

    def _table(self, directory: str, texts: t.Mapping[str, str]) -> Table | None:
        return parse(directory, texts[CHAINS], texts.get(TABLE, "ChainId\n")) if CHAINS in texts else None

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Write the files that differ."""
        others = {}
        for path, table in observed["others"].items():
            if table is None:
                raise Refused("disjoint_from", path, f"it has no {CHAINS}", "Name directories with chain tables")
            others[path] = table
        found = observed["files"]
        existing = None if self.discard and not self.only_check else self._table(self.directory, found)
        if self.only_check:
            self._judge_foreign(existing, found, others)
            return []
        if self.cluster is None:
            raise AssertionError("the nodes are known here: only a foreign table is judged without them")
        self.kept = existing is not None
        self.placement = place(
            self.cluster,
            self._existing(existing) if existing else [],
            self.seed,
            self._window(self.cluster.slots if self.erasure else self.cluster.slots // self.replicas),
            self.chain_prefix,
            [seat for other in others.values() for seat in seats_of(other)],
            {number for other in others.values() for number in other.chains},
            self.erasure,
            existing is not None
            and not existing.problems
            and enough(touched(existing, self._window(len(existing.order)))),
        )
        chains = self.placement.chains
        self.files = render(chains, self.erasure, self.target_prefix, self.chunk_sizes)
        self.judgement = judge(
            parse(self.directory, self.files[CHAINS], self.files[TABLE]),
            self.erasure,
            self.replicas,
            self.cluster,
            self._window(len(chains) * (self.replicas if self.erasure else 1)),
            others,
        )
        wrong = [invariant for invariant in self.judgement.broken if invariant.number in HARD]
        if wrong:
            raise HostError(f"the chain table that was made is not valid, nothing was written: {_texts_of(wrong)}")
        return [
            Step(
                "update" if name in found else "create",
                os.path.join(self.directory, name),
                _shown(found.get(name)),
                _shown(text),
                self._why(),
                data=text,
            )
            for name, text in self.files.items()
            if found.get(name) != text
        ]

    def _judge_foreign(self, existing: Table | None, found: t.Mapping[str, str], others: t.Mapping[str, Table]) -> None:
        if existing is None or TABLE not in found:
            raise Refused(
                "directory",
                self.directory,
                f"it has no {TABLE if existing else CHAINS}",
                "Name the directory of a chain table, or let state present make one",
            )
        size = self.replicas if self.cluster or self.erasure else 0
        window = self._window(len(existing.order))
        self.judgement = judge(existing, self.erasure, size, self.cluster, window, others)
        if self.judgement.broken:
            raise Refused(
                "directory",
                self.directory,
                f"the chain table is not valid: {_texts_of(self.judgement.broken)}",
                "Let state present change it: positions and order are set right without moving data, "
                "and discard_existing makes a new table",
            )

    def _existing(self, table: Table) -> list[Chain]:
        """The chains on which a change builds; chains that an interrupted run did not get into the table come last."""
        listed = set(table.order)
        table.order += [number for number in sorted(table.chains) if number not in listed]
        size = 1 if self.erasure else self.replicas
        for number, targets in table.chains.items():
            if len(targets) != size:
                raise Refused(
                    "replicas" if not self.erasure else "type",
                    self.replicas if not self.erasure else "EC",
                    f"chain {number} in {self.directory} has {len(targets)} targets instead of {size}",
                    "Keep what the existing table has, or name another directory; discard_existing makes a new "
                    "table, for which nearly all data moves",
                )
            for one in targets:
                prefix, seat = decode_target(one)
                if prefix != self.target_prefix or not (seat.node and seat.disk >= 0 and seat.target):
                    raise Refused(
                        "target_id_prefix",
                        self.target_prefix,
                        f"{self.directory} has target {one}, which is not an id with this prefix",
                        f"Use {prefix}, as the table has, or another directory",
                    )
        seen: set[int] = set()
        for number, targets in table.chains.items():
            if len({decode_target(one)[1].node for one in targets}) < len(targets) or seen.intersection(targets):
                raise Refused(
                    "directory",
                    self.directory,
                    f"chain {number} has two targets on one node, or one of another chain: no base for a change",
                    "Check it with state checked; discard_existing makes a new table",
                )
            seen.update(targets)
        chains = table.groups(self.erasure, self.replicas)
        for chain in chains:
            if len(chain.seats) != self.replicas:
                raise Refused(
                    "replicas",
                    self.replicas,
                    f"the EC group of chain {chain.id} in {self.directory} has {len(chain.seats)} targets",
                    "Use as many as the existing groups have, or another directory",
                )
        return chains

    def _window(self, chains: int) -> int:
        return int(self.stripe) if self.stripe is not None else max(1, min(STRIPE, chains))

    def _why(self) -> str:
        if self.placement is None:
            raise AssertionError("a plan was made")
        if not self.kept:
            return f"{len(self.placement.chains)} {'groups' if self.erasure else 'chains'}, new"
        return f"{len(self.placement.moves)} targets move; at least {self.placement.least} must"

    def apply(self, step: Step) -> None:
        """Write one file. Chains come before the table, so that a run after an interruption finds all of them."""
        self.host.write(step.object, step.data)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Figures, the judgement, and what moves."""
        judgement: Judgement = self.judgement
        table = self._table(self.directory, self.files or observed["files"])
        if table is None:
            raise AssertionError("the files were written")
        outcome: dict[str, t.Any] = {
            "chain_table": {
                "directory": self.directory,
                "chains": len(table.order),
                "targets": sum(len(targets) for targets in table.chains.values()),
                "nodes": len({seat.node for seat in seats_of(table)}),
            },
            "quality": {name: round(value, 6) for name, value in judgement.quality.items()},
            "invariants": [invariant.public() for invariant in judgement.invariants],
            "report": judgement.lines(),
            "moves": [],
            "moves_least": 0,
            "warnings": [f"{self.directory}: {line}" for line in _lines_of(judgement)],
        }
        if self.placement is not None:
            outcome["moves"] = [self._public(move) for move in self.placement.moves]
            outcome["moves_least"] = self.placement.least
            room = self.cluster.slots if self.cluster else 0
            need = sum(len(chain.seats) for chain in self.placement.chains)
            if need > room:
                outcome["warnings"].append(
                    f"{self.directory}: the existing chains hold data and are kept: they have {need} targets, and "
                    f"targets_per_disk provides {room}, so disks carry {need / room:.2f} times what was declared"
                )
        return outcome

    def _public(self, move: Move) -> dict[str, t.Any]:
        return {
            "chain_id": move.chain,
            "old_target_id": target_id(self.target_prefix, move.old),
            "old_node_id": move.old.node,
            "new_target_id": target_id(self.target_prefix, move.new),
            "new_node_id": move.new.node,
            "new_disk_index": move.new.disk,
        }


def _lines_of(judgement: Judgement) -> list[str]:
    return [f"{invariant.name}: {invariant.text}" for invariant in judgement.broken]


def _texts_of(invariants: t.Sequence[t.Any]) -> str:
    return "; ".join(f"{invariant.number} {invariant.name}: {invariant.text}" for invariant in invariants)


def _shown(text: str | None) -> t.Any:
    """A file in a diff: itself, or its size when nobody would read it."""
    if text is None or text.count("\n") <= SHOWN_LINES:
        return text
    return {"lines": text.count("\n")}


def cluster_of(params: t.Mapping[str, t.Any], replicas: int, erasure: bool) -> Cluster:
    """The nodes, checked one by one and then together.

    :param params: ``nodes`` and ``targets_per_disk`` of the module ``threefs_chain_table``
    """
    targets = int(params["targets_per_disk"])
    if not 1 <= targets < INDICES:
        raise Refused("targets_per_disk", targets, "out of range", "A target's id leaves room for 1 to 99 on a disk")
    nodes: list[Node] = []
    ids: set[int] = set()
    for number, item in enumerate(params["nodes"]):
        option = f"nodes[{number}]"
        if not 1 <= item["id"] < NODE_IDS:
            raise Refused(f"{option}.id", item["id"], "a target's id has six digits for the node", "Use 1 to 999999")
        if item["id"] in ids:
            raise Refused(f"{option}.id", item["id"], "the id is used twice", "Give each node its own")
        ids.add(item["id"])
        if not 1 <= item["disks"] < DISKS:
            raise Refused(
                f"{option}.disks", item["disks"], "out of range", "A target's id leaves room for 1 to 999 disks"
            )
        nodes.append(
            Node(item["id"], item["disks"], _weighted(f"{option}.weight", targets, item), item.get("domain") or "")
        )
    if not nodes:
        raise Refused("nodes", [], "no storage node", "Name all storage nodes with id and disks")
    without = [node.id for node in nodes if not node.domain]
    if 0 < len(without) < len(nodes):
        raise Refused(
            "nodes", without[0], "this node has no domain, and others have", "Give all nodes a domain, or none"
        )
    cluster = Cluster(tuple(sorted(nodes, key=lambda node: node.id)), replicas)
    _check_room(cluster, targets, params, erasure)
    return cluster


def _weight(item: t.Mapping[str, t.Any]) -> float:
    weight = item.get("weight")
    return 1.0 if weight is None else float(weight)


def _weighted(option: str, targets: int, item: t.Mapping[str, t.Any]) -> int:
    """Targets on each disk of a node with this weight."""
    weight = _weight(item)
    count = targets * weight
    if not math.isfinite(count) or count <= 0 or count >= INDICES:
        raise Refused(option, weight, f"a disk would have {count:g} targets", "1 to 99 are possible")
    if abs(count - round(count)) > 1e-6 or round(count) < 1:
        low = max(1, math.floor(count))
        raise Refused(
            option,
            weight,
            f"{targets} targets_per_disk times this weight is {count:g}, not a whole number",
            f"The nearest possible weights are {low / targets:.6g} and {(low + 1) / targets:.6g}",
        )
    return round(count)


def _check_room(cluster: Cluster, targets: int, params: t.Mapping[str, t.Any], erasure: bool) -> None:
    """Whether chains of different nodes and domains can use all targets."""
    word = "targets of an EC group" if erasure else "replicas"
    domains: dict[str | int, list[Node]] = {}
    for node in cluster.nodes:
        domains.setdefault(node.domain or node.id, []).append(node)
    kind = "failure domains" if cluster.nodes[0].domain else "storage nodes"
    if len(domains) < cluster.replicas:
        raise Refused(
            "replicas",
            cluster.replicas,
            f"{len(domains)} {kind} cannot hold {cluster.replicas} {word} apart",
            f"Use at most {len(domains)}, or add {kind}",
        )
    for name, members in domains.items():
        slots = sum(node.slots for node in members)
        if slots * cluster.replicas > cluster.slots:
            raise Refused(
                "nodes",
                name,
                f"it has {slots} of {cluster.slots} targets, and each chain can use one of them: "
                f"with {cluster.replicas} {word} at most a part of 1/{cluster.replicas}",
                "Lower its weight or disks, add other nodes, or use fewer replicas",
            )
    if cluster.slots % cluster.replicas:
        possible = [count for count in range(1, INDICES) if _fits(params["nodes"], count, cluster.replicas)]
        near = sorted(possible, key=lambda count: (abs(count - targets), count))[:3]
        raise Refused(
            "targets_per_disk",
            targets,
            f"the {cluster.slots} targets of all disks do not divide into chains of {cluster.replicas}",
            f"Possible with these nodes: {', '.join(str(count) for count in sorted(near))}"
            if near
            else "No number divides with these nodes: change their disks or weights",
        )


def _fits(nodes: t.Sequence[t.Mapping[str, t.Any]], targets: int, replicas: int) -> bool:
    counts = [(targets * _weight(item), item["disks"]) for item in nodes]
    if any(abs(count - round(count)) > 1e-6 or not 1 <= round(count) < INDICES for count, _disks in counts):
        return False
    return not sum(round(count) * disks for count, disks in counts) % replicas
