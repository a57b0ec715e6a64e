# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The database that the servers of FoundationDB make together."""

from __future__ import annotations

import json
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb import (
    DEFAULT,
    binaries,
    check_layout,
    check_name,
    cluster_file,
    connection,
    coordinators_of,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

# storage engine -> what status calls it
ENGINES = {
    "ssd": ("ssd", "ssd-1", "ssd-2"),
    "ssd-redwood-1": ("ssd-redwood-1",),
    "memory": ("memory", "memory-1", "memory-2"),
}
# what status says of a database that nobody has created yet: another that tells no configuration is unavailable
NEVER_CREATED = "configuration_never_created"
ALREADY_EXISTS = "already exists"


class Database:
    """The database that the servers make, as a resource: run on one host.

    :param params: options of the module ``foundationdb``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.name = check_name(params.get("name") or DEFAULT)
        self.release = str(params["release"]).rstrip("/")
        self.redundancy = str(params["redundancy"])
        self.machines = [str(address) for address in params["machines"]]
        self.coordinators = check_layout(self.redundancy, params["coordinators"], self.machines)
        self.engine = str(params.get("engine") or "ssd")
        if self.engine not in ENGINES:
            raise Refused("engine", self.engine, "no such storage engine", f"One of {', '.join(ENGINES)}")
        self.wait = float(params.get("wait_seconds") or 120)

    def _cli(self, command: str, check: bool = True) -> str:
        """fdbcli waits for ever without --timeout, and some errors it only says (on stderr)."""
        argv = [binaries(self.host, self.release)["fdbcli"], "-C", self.host.path(cluster_file(self.name))]
        done = self.host.run([*argv, "--timeout", "30", "--exec", command], timeout_seconds=60, check=False)
        if check and (done.rc != 0 or "ERROR:" in done.text):
            raise HostError(f"fdbcli {command}: {done.text or done.rc}")
        return done.stdout

    def status(self) -> dict[str, t.Any]:
        """``status json`` in the few facts that gates need; its exit code says nothing."""
        text = self._cli("status json", check=False)
        try:
            report = json.loads(text[text.index("{") :])
        except ValueError:
            return {
                "reachable": False,
                "available": False,
                "healthy": False,
                "recovery": "",
                "redundancy": "",
                "engine": "",
                "machines": 0,
                "silent": [],
            }
        client, cluster = report.get("client", {}), report.get("cluster", {})
        known = client.get("coordinators", {}).get("coordinators", [])
        configuration = cluster.get("configuration", {})
        return {
            "reachable": bool(client.get("coordinators", {}).get("quorum_reachable")),
            "available": bool(client.get("database_status", {}).get("available")),
            "healthy": bool(cluster.get("data", {}).get("state", {}).get("healthy")),
            "recovery": cluster.get("recovery_state", {}).get("name", ""),
            "redundancy": configuration.get("redundancy_mode", ""),
            "engine": configuration.get("storage_engine", ""),
            "machines": len(cluster.get("machines", {})),
            "silent": sorted(item["address"] for item in known if not item.get("reachable")),
        }

    def observe(self) -> dict[str, t.Any]:
        """The database's state and coordinators."""
        line = connection(self.host.read(cluster_file(self.name)))
        if not line or not self.host.exists(binaries(self.host, self.release)["fdbcli"]):
            if not self.predicting:
                raise Refused(
                    "name",
                    self.name,
                    "this host has no server of this database",
                    "Run module foundationdb_server before",
                )
            return {"line": "", "status": None}
        if not self.predicting:
            self._until("a majority of coordinators answers", lambda: self.status()["reachable"])
            self._until("the database tells its configuration", lambda: self._told(self.status()))
        return {"line": connection(self.host.read(cluster_file(self.name))) or line, "status": self.status()}

    @staticmethod
    def _told(status: t.Mapping[str, t.Any]) -> bool:
        return bool(status["redundancy"]) or status["recovery"] == NEVER_CREATED

    def _until(self, what: str, predicate: t.Callable[[], bool]) -> None:
        end = time.monotonic() + self.wait
        while not predicate():
            if time.monotonic() >= end:
                state = self.status()
                raise HostError(
                    f"{self.name}: {what}: not within {self.wait:g} seconds; silent: {', '.join(state['silent']) or 'none'}; "
                    f"recovery: {state['recovery'] or 'unknown'}"
                )
            time.sleep(1)

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Create once, then change; coordinators last, when the database is available."""
        state = observed["status"]
        if state is None:
            return [Step("configure", f"database {self.name}", after=f"new {self.redundancy} {self.engine}")]
        steps = []
        wish = {"redundancy": self.redundancy, "engine": self.engine}
        now = {"redundancy": state["redundancy"], "engine": state["engine"]}
        new = not state["redundancy"]
        words = [self.redundancy] if now["redundancy"] != self.redundancy else []
        if now["engine"] not in ENGINES[self.engine]:
            # Of a database that exists FoundationDB refuses another engine, unless it is told how to change over.
            words += [self.engine] if new else [self.engine, "storage_migration_type=aggressive"]
        if words:
            why = "creates the database" if new else "copies data"
            words = ["new", *words] if new else words
            steps.append(
                Step("configure", f"database {self.name}", before=None if new else now, after=wish, why=why, data=words)
            )
        have = coordinators_of(observed["line"])
        if have != self.coordinators:
            why = "all cluster files are renewed; copies elsewhere are stale from then on"
            steps.append(Step("move", f"coordinators of {self.name}", before=have, after=self.coordinators, why=why))
        return steps

    def apply(self, step: Step) -> None:
        """One command of fdbcli, and the wait until the database is well again."""
        if step.verb == "configure":
            try:
                self._cli(" ".join(["configure", *step.data]))
            except HostError as error:
                if ALREADY_EXISTS not in str(error):
                    raise
        else:
            self._cli(f"coordinators {' '.join(self.coordinators)}")
            self._until(
                "the cluster file names the new coordinators",
                lambda: coordinators_of(connection(self.host.read(cluster_file(self.name)))) == self.coordinators,
            )
        self._until("the database is healthy", lambda: self.status()["available"] and self.status()["healthy"])

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """What gates look at."""
        return {"connection": observed["line"], "status": observed["status"] or {}}
