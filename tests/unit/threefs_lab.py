# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A 3FS cluster inside of a test: the doubles of tests/doubles in one process, on a clock of its own.

Their programs talk over TCP; here the same code answers calls, and time passes when somebody sleeps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import typing as t
from pathlib import Path

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import encode_token

DOUBLES = Path(__file__).resolve().parents[1] / "doubles"
ROOT_TOKEN = encode_token(0, 1)
RELEASE = "/opt/3fs/1"


def load(name: str, path: Path) -> t.Any:
    """A double as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Document:
    """The database: one document in memory."""

    def __init__(self) -> None:
        self.document: dict[str, t.Any] = {"version": 1, "keys": {}}

    def reload(self) -> None:
        """Nothing to read again."""

    def read(self) -> dict[str, t.Any]:
        """A copy, as over the network."""
        return {"document": json.loads(json.dumps(self.document))}

    def change(self, edit: t.Callable[[dict[str, t.Any]], None]) -> dict[str, t.Any]:
        """A transaction: all or nothing."""
        document = self.read()["document"]
        edit(document)
        self.document = document
        return document


class Lab:
    """One mgmtd, one meta and some storage services on a fake host that has admin_cli."""

    def __init__(self, root: Path, monkeypatch: t.Any) -> None:
        load("fdb_double", DOUBLES / "foundationdb/fdb_double.py")
        self.double = load("threefs_double", DOUBLES / "threefs/threefs_double.py")
        self.root, self.now = root, 1_000_000.0
        self.database = Document()
        self.host = Host(str(root), self.run)
        self.argv: list[str] = []
        self.served: dict[str, t.Callable[[dict[str, t.Any], str], dict[str, t.Any]]] = {}
        monkeypatch.setattr(self.double, "ask", self.ask)
        monkeypatch.setattr(self.double, "TRAPS", str(root / "traps.json"))
        monkeypatch.setattr(self.double, "Cluster", lambda _path: self.database)
        monkeypatch.setattr(self.double, "own_address", lambda _fdb: "10.0.0.1")
        monkeypatch.setattr("time.time", lambda: self.now)
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.sleep)
        self.storages: dict[int, t.Any] = {}
        self.running: dict[int, t.Any] = {}
        self.configure()
        self.start()

    # -- the cluster -----------------------------------------------------------------

    def configure(self) -> None:
        """What role threefs leaves on the host that administrates the cluster."""
        binaries, etc = self.root / "opt/3fs/1/bin", self.root / "etc/3fs/stage"
        binaries.mkdir(parents=True)
        (binaries / "admin_cli").write_text("")
        etc.mkdir(parents=True)
        self.host.write("/etc/fdb.cluster", "metal:abc@10.0.0.1:4500")
        self.host.write(
            "/etc/3fs/stage/admin_cli.toml",
            f"cluster_id = 'stage'\nverbose = false\n[fdb]\nclusterFile = '{self.host.path('/etc/fdb.cluster')}'\n"
            f"[mgmtd_client]\nmgmtd_server_addresses = ['RDMA://10.0.0.1:8000']\n[user_info]\ntoken = '{ROOT_TOKEN}'\n",
        )
        described = {"cluster": "stage", "binaries": f"{RELEASE}/bin", "release": RELEASE, "services": ["mgmtd"]}
        self.host.write("/etc/3fs/stage/cluster.json", json.dumps(described))
        (self.root / "var/lib/3fs/stage").mkdir(parents=True)

    def start(self) -> None:
        """mgmtd, meta and storage services, as after bring-up."""
        settings = {"authenticate": "true", "heartbeat_fail_interval": "'15s'", "bootstrapping_length": "'1s'"}
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        main = f"[server.service]\n{lines}lease_length = '20s'\nnew_chain_bootstrap_interval = '30s'\n"
        keys = self.database.document["keys"]
        keys["configs"] = {
            kind: {"version": 1, "content": main, "desc": ""} for kind in ("MGMTD", "META", "STORAGE", "FUSE")
        }
        keys["nodes"] = {"1": {"type": "MGMTD"}}
        keys["fs"] = {"/": {"uid": 0, "gid": 0, "perm": "0755", "layout": {"table": 1, "chunk": 1 << 20, "stripe": 4}}}
        keys["users"] = {
            "0": {
                "uid": 0,
                "name": "root",
                "token": ROOT_TOKEN,
                "tokens": [],
                "groups": [],
                "root": True,
                "admin": True,
            }
        }
        self.mgmtd = self.double.Mgmtd({"cluster_id": "stage", "fdb": {"clusterFile": "x"}}, 1)
        self.mgmtd.port = 8000
        self.served["10.0.0.1:8000"] = self.mgmtd.answer
        self.served["10.0.0.1:8001"] = self.meta
        self.running[100] = self.double.Running(keys["configs"]["META"])
        for node in range(10001, 10004):
            self.add(node)
        self.sleep(1)
        self.sleep(2)

    def meta(self, request: dict[str, t.Any], _peer: str) -> dict[str, t.Any]:
        """The meta service."""
        keys = self.database.read()["document"]["keys"]
        uid = self.double.check_token(keys["users"], request["token"])["uid"]
        return t.cast("dict[str, t.Any]", self.double.file_system(self.database, keys, request, uid))

    def add(self, node: int) -> None:
        """Start a storage service (again)."""
        paths = [self.root / f"disks/{node}/{disk}" for disk in range(2)]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        targets = {"target_paths": [str(path) for path in paths], "allow_disk_without_uuid": True}
        self.storages[node] = self.double.Targets({"server": {"targets": targets}})
        self.served[f"10.0.0.1:{node}"] = self.storages[node].answer
        self.running[node] = self.double.Running(self.database.document["keys"]["configs"]["STORAGE"])

    def stop(self, node: int) -> None:
        """Stop a storage service."""
        del self.storages[node], self.served[f"10.0.0.1:{node}"]

    def sleep(self, seconds: float) -> None:
        """Time passes, and what beats beats."""
        for _turn in range(max(1, int(seconds))):
            self.now += max(1.0, seconds - int(seconds))
            self.mgmtd.tick()
            services = [("META", 100, 8001, dict, lambda _answer: None)]
            services += [("STORAGE", node, node, one.report, one.follow) for node, one in self.storages.items()]
            for kind, node, port, report, follow in services:
                me = {**self.double.identity(node, kind, port), "config_version": self.running[node].version}
                beat = {"op": "heartbeat", "cluster_id": "stage", "time": self.now, **me, **report()}
                answer = self.mgmtd.answer(json.loads(json.dumps(beat)), "10.0.0.1")
                self.running[node].take(answer["config"])
                follow(answer)

    # -- calls -------------------------------------------------------------------------

    def ask(self, address: str, request: dict[str, t.Any], timeout: float = 0) -> dict[str, t.Any] | None:
        """What a service answers."""
        if address not in self.served:
            return None
        try:
            return self.served[address](json.loads(json.dumps(request)), "10.0.0.1")
        except self.double.Status as status:
            return {"error": [status.code, status.name, status.message]}

    def run(self, argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
        """admin_cli, in this process."""
        self.argv += list(argv)
        if not argv[0].endswith("admin_cli"):
            return Completed(tuple(argv), 127, "", f"{argv[0]}: not found")
        out, before = io.StringIO(), sys.stdin
        sys.stdin = io.StringIO(stdin or "")
        try:
            with contextlib.redirect_stdout(out):
                code = self.double.admin_cli(list(argv[1:]))
        finally:
            sys.stdin = before
        return Completed(tuple(argv), code, out.getvalue(), "")

    def trap(self, command: str, after: int = 0, error: str = "999(Unknown)") -> None:
        """The next commands of this name fail once."""
        text = json.dumps([{"command": command, "after": after, "times": 1, "error": error}])
        (self.root / "traps.json").write_text(text)

    def chains(self) -> dict[str, set[int]]:
        """Chain -> targets that serve."""
        chains = self.database.document["keys"].get("chains", {})
        return {
            chain: {int(tid) for tid, public in item["targets"] if public == "SERVING"}
            for chain, item in chains.items()
        }
