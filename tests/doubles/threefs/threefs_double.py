#!/usr/bin/env python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of 3FS. Not the real programs: they store no file and move no data.

One file under the names mgmtd_main, meta_main, storage_main, hf3fs_fuse_main, monitor_collector_main, admin_cli and
clickhouse-client. It reads the same configuration files, keeps the cluster's state in the double of FoundationDB, and
imitates with their traps:

- launcher, app and main files: a service starts with launcher and app alone and gets main from mgmtd; without one
  uploaded it does not start. Both ports of a service are bound, so that two that collide show it.
- Only the mgmtd that holds the lease answers; others say NotPrimary, and until there is one, routing is not ready.
- A service that runs takes a new main configuration only if no key differs that it reads when it starts; otherwise it
  keeps all of the old one and its version, until it is started again. Which keys those are is told by their last word here.
- Heartbeats outside of the time window are refused; a silent node fails after heartbeat_fail_interval.
- What a storage service no longer reports of its targets stays as it was last told, until heartbeat_fail_interval is over.
- Chains: SERVING, LASTSRV, SYNCING, WAITING and OFFLINE by upstream's rules, one SYNCING in a chain at a time; a chain
  whose targets do not report within new_chain_bootstrap_interval falls to LASTSRV.
- admin_cli: one command as arguments gives an exit code; commands on standard input always end with 0, and an error is
  only the text "Encounter error: CODE(Name)". It logs its arguments, tokens included, to the file in its ``log`` option.
- user-add of the first user needs --admin; a token must be of the form that decodes to its uid.
- update-chain removes only OFFLINE targets; upload-chains refuses other targets for a chain that exists.
- A target remembers the UUID of its file system; on another one it is not loaded.
- An upload of the same chain table keeps the version, another list makes the next one.

A file named by THREEFS_DOUBLE_TRAPS (default /var/lib/3fs-double/traps.json) provokes errors of admin_cli:
``[{"command": "create-target", "after": 3, "times": 1, "error": "2007(RPC::SendFailed)"}]``.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import tomllib

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from fdb_double import Cluster, Unavailable, ask

TRAPS = os.environ.get("THREEFS_DOUBLE_TRAPS", "/var/lib/3fs-double/traps.json")
RELEASE = os.environ.get("THREEFS_DOUBLE_RELEASE", "")
# Between two heartbeats; upstream has 10. With one a second they took a third of the emulated CPU of a server.
BEAT_SECONDS = 3.0
SYNC_SECONDS = 2.0
CHUNK_SIZES = ["512KB", "1MB", "2MB", "4MB", "16MB", "64MB"]
COLD = frozenset(
    """
    batch_io_coros bg_num_threads big_rdmabuf_count big_rdmabuf_size clusterFile enable_io_uring filter_list
    io_jobq_size iov_limit listen_port listen_queue_depth max_background max_events max_idle_threads
    max_processing_requests_num max_readahead max_threads mgmtd_server_addresses num_bg_threads
    num_connect_threads num_event_loop num_io_threads num_proc_threads num_threads rdma_buf_pool_size
    rdmabuf_count rdmabuf_size remote_ip services target_num_per_path target_paths trace_file_dir type
    use_memkv
    """.split()
)
NODE_TYPES = {"MGMTD", "META", "STORAGE", "CLIENT", "FUSE"}


class Status(Exception):
    """An error as 3FS has it."""

    def __init__(self, code: int, name: str, message: str = "") -> None:
        super().__init__(message)
        self.code, self.name, self.message = code, name, message


def seconds(text: str) -> float:
    """A duration such as 2min or 500ms."""
    number, unit = re.fullmatch(r"([0-9.]+)\s*(ns|us|ms|s|min|h|day)", text).groups()
    return float(number) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "day": 86400}[unit]


def release() -> str:
    """The release as list-nodes shows it: the file VERSION beside bin."""
    try:
        with open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "VERSION"), encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return RELEASE or "250228-double"


def dig(data: dict, dotted: str, default: object = None) -> object:
    for part in dotted.split("."):
        if not isinstance(data, dict) or part not in data:
            return default
        data = data[part]
    return data


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Dotted key -> value; elements of arrays of tables by their number, as upstream names them."""
    if isinstance(value, dict):
        pairs = [(f"{path}.{name}".lstrip("."), item) for name, item in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        pairs = [(f"{path}#{number}", item) for number, item in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, item in pairs for key, leaf in leaves(item, name).items()}


class Running:
    """The main configuration that a service runs with."""

    def __init__(self, stored: dict) -> None:
        self.values, self.version = tomllib.loads(stored["content"]), stored["version"]

    def take(self, stored: dict) -> None:
        """What mgmtd has now: all of it or nothing."""
        if stored["version"] == self.version:
            return
        pushed = tomllib.loads(stored["content"])
        now = leaves(self.values)
        for path, value in leaves(pushed).items():
            if path.rpartition(".")[2] in COLD and value != now.get(path):
                why = f"ConfigUpdateFailed(17) Not support hot update: {path}"
                log(f"Update config failed at updating: {why}. desc: {stored['version']}")
                return
        self.values, self.version = pushed, stored["version"]


def log(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def die(text: str) -> None:
    log(text)
    os._exit(1)


# -- tokens ---------------------------------------------------------------------

_ORDER = (12, 6, 0, 13, 7, 1, 14, 8, 2, 15, 9, 3, 16, 10, 4, 17, 11, 5)


def decode_token(token: str) -> int:
    """The uid of a token; tokens are 18 shuffled bytes with a checksum, in base64."""
    try:
        raw = base64.b64decode(token, validate=True)
        plain = bytes(raw[_ORDER[index]] for index in range(18))
        magic, uid, _random, crc = struct.unpack("<HIQI", plain)
    except (binascii.Error, ValueError, IndexError, struct.error):
        raise Status(33, "InvalidFormat", "Decode token fail: invalid format") from None
    if magic != 0xF1DB or crc != (binascii.crc32(plain[:14], 0xFFFFFFFF) ^ 0xFFFFFFFF):
        raise Status(33, "InvalidFormat", "Decode token fail: invalid crc")
    return uid


def check_token(users: dict, token: str) -> dict:
    """The user of a token that is in force."""
    try:
        uid = decode_token(token)
    except Status:
        raise Status(25, "AuthenticationFail", "Token decode failed") from None
    user = users.get(str(uid))
    if user is None:
        raise Status(25, "AuthenticationFail", f"Uid {uid} not found")
    old = {item["token"]: item["end"] for item in user["tokens"]}
    if token != user["token"] and old.get(token, 0) < time.time():
        raise Status(25, "AuthenticationFail", "Token validate failed")
    return user


# -- a service --------------------------------------------------------------------


class Peers:
    """How a service talks to mgmtd."""

    def __init__(self, addresses: list[str], cluster: str) -> None:
        self.addresses = [re.sub(r"^\w+://", "", address) for address in addresses]
        self.cluster = cluster

    def call(self, request: dict) -> dict:
        answered = False
        for address in self.addresses:
            answer = ask(address, {**request, "cluster_id": self.cluster})
            if answer is None:
                continue
            if "error" not in answer:
                return answer
            if answer["error"][0] != 5000:
                raise Status(*answer["error"])
            answered = True
        if answered:
            raise Status(6000, "MgmtdClient::PrimaryMgmtdNotFound")
        raise Status(6004, "MgmtdClient::RoutingInfoNotReady")


def flags(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """gflags: one or two dashes, dashes or underscores, ``=`` or the next word."""
    found, rest, words = {}, [], list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return found, rest + words
        if not word.startswith("-") or len(word) < 2:
            return found, [*rest, word, *words]
        name, equals, value = word.lstrip("-").partition("=")
        name = name if name.startswith("config.") else name.replace("-", "_")
        found[name] = value if equals else ("true" if name in ("release_version", "use_local_cfg") else words.pop(0))
    return found, rest


def load(path: str) -> dict:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        die(f"Load config from {path} failed: {error}")
        raise


def bind(port: int, answer) -> None:
    """Serve JSON lines on a port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0", port))
    except OSError as error:
        die(f"Failed to listen on port {port}: {error.strerror}")
    listener.listen(64)

    def serve(connection: socket.socket, peer: str) -> None:
        with connection, connection.makefile("rwb") as stream:
            line = stream.readline()
            if not line:
                return
            try:
                reply = answer(json.loads(line), peer)
            except Status as status:
                reply = {"error": [status.code, status.name, status.message]}
            except Unavailable:
                reply = {"error": [1004, "Transaction::NetworkError", "FoundationDB is unavailable"]}
            stream.write(json.dumps(reply).encode() + b"\n")

    def accept() -> None:
        while True:
            connection, peer = listener.accept()
            threading.Thread(target=serve, args=(connection, peer[0]), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def ports(config: dict) -> list[int]:
    return [group["listener"]["listen_port"] for group in config["server"]["base"]["groups"]]


def start_files(arguments: list[str]) -> tuple[dict, int]:
    """The launcher's content and the node id."""
    options, _rest = flags(arguments)
    launcher = load(options["launcher_cfg"])
    if not launcher.get("cluster_id"):
        die("cluster_id is empty")
    app = load(options["app_cfg"]) if "app_cfg" in options else {}
    return launcher, int(app.get("node_id", 0))


# -- mgmtd ------------------------------------------------------------------------


class Mgmtd:
    """One mgmtd: holds the lease or not."""

    def __init__(self, launcher: dict, node_id: int) -> None:
        self.cluster_id, self.node_id = launcher["cluster_id"], node_id
        self.fdb = Cluster(dig(launcher, "fdb.clusterFile") or die("fdb.clusterFile is empty"))
        self.lock = threading.RLock()
        self.primary_since = 0.0
        self.heartbeats: dict[str, dict] = {}
        self.seen, self.seen_at = {}, 0.0
        keys = self.keys()
        config = keys.get("configs", {}).get("MGMTD")
        if config is None:
            die("Load config of MGMTD failed: not found. Run init-cluster first")
        self.running = Running(config)

    def keys(self, fresh: bool = False) -> dict:
        """What is stored; as of a moment ago, since every heartbeat asks."""
        if fresh or time.monotonic() > self.seen_at + 0.9 * BEAT_SECONDS:
            self.fdb.reload()
            self.seen = self.fdb.read()["document"]["keys"]
            self.seen_at = time.monotonic()
        return self.seen

    def setting(self, name: str, default: str) -> float:
        return seconds(str(dig(self.running.values, f"server.service.{name}", default)))

    def edit(self, change) -> object:
        """A transaction on our keys."""
        result: list = []

        def inner(document: dict) -> None:
            result[:] = [change(document["keys"])]

        self.fdb.change(inner)
        self.seen_at = 0.0
        return result[0]

    # the lease -------------------------------------------------------------------

    def tick(self) -> None:
        now = time.time()
        keys = self.keys()
        lease = keys.get("lease")
        mine = bool(lease) and lease["node"] == self.node_id
        if not mine and lease and lease["end"] > now:
            self.primary_since = 0.0
            self.peer = lease
            # not for long: nobody gets an answer from here meanwhile, and the other may be asking us
            answer = ask(lease["address"], {"op": "heartbeat", "cluster_id": self.cluster_id, **self.own()}, 5.0)
            if answer and "config" in answer:
                self.running.take(answer["config"])
            return
        if not mine or lease["end"] - now < self.setting("lease_length", "1min") * 0.7:
            end = now + self.setting("lease_length", "1min")
            address = f"{own_address(self.fdb)}:{self.port}"
            taken = self.edit(lambda k: self._lease(k, lease, end, address))
            if not taken:
                return
        if not self.primary_since:
            log(f"mgmtd {self.node_id} is primary now")
            self.primary_since = now
            self.heartbeats = {}
        self.running.take(keys["configs"]["MGMTD"])
        self.heartbeats[str(self.node_id)] = {
            **self.own(),
            "seen": now,
            "address": f"{own_address(self.fdb)}:{self.port}",
        }
        self.update_chains(keys, now)

    def own(self) -> dict:
        return {
            "node_id": self.node_id,
            "type": "MGMTD",
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "release": release(),
            "config_version": self.running.version,
            "time": time.time(),
            "port": self.port,
        }

    def _lease(self, keys: dict, expected: dict | None, end: float, address: str) -> bool:
        if keys.get("lease") != expected:
            return False
        keys["lease"] = {"node": self.node_id, "end": end, "address": address}
        return True

    # chains ----------------------------------------------------------------------

    def local(self, target: str, now: float) -> str:
        for beat in self.heartbeats.values():
            if target in beat.get("targets", {}):
                known = beat["targets"][target]
                fresh = known["seen"] > now - self.setting("heartbeat_fail_interval", "1min")
                return known["local"] if fresh else "OFFLINE"
        return "OFFLINE"

    def update_chains(self, keys: dict, now: float) -> None:
        if now < self.primary_since + min(self.setting("bootstrapping_length", "2min"), 1e9):
            known = {n for n, beat in self.heartbeats.items() if beat["seen"]}
            if not set(keys.get("nodes", {})) <= known:
                return  # wait for the nodes of before to report
        fresh = {}
        for chain, item in keys.get("chains", {}).items():
            states = [(tid, public, self.local(tid, now)) for tid, public in item["targets"]]
            young = now < item["created"] + self.setting("new_chain_bootstrap_interval", "2min")
            if young and any(local == "OFFLINE" for _tid, _public, local in states) and not item.get("seen"):
                continue
            targets = next_states(states)
            if targets != [tuple(pair) for pair in item["targets"]] or not item.get("seen"):
                fresh[chain] = targets
        if fresh:

            def change(k: dict) -> None:
                for chain, targets in fresh.items():
                    item = k["chains"][chain]
                    if sorted(tid for tid, _p in item["targets"]) == sorted(tid for tid, _p in targets):
                        if [tuple(pair) for pair in item["targets"]] != targets:
                            item["version"] += 1
                        item["targets"], item["seen"] = [list(pair) for pair in targets], True

            self.edit(change)

    # requests ----------------------------------------------------------------------

    def answer(self, request: dict, peer: str) -> dict:
        with self.lock:
            if request.get("cluster_id") != self.cluster_id:
                raise Status(5003, "Mgmtd::ClusterIdMismatch", f"expected {self.cluster_id}")
            if not self.primary_since:
                raise Status(5000, "Mgmtd::NotPrimary")
            return getattr(self, "on_" + request["op"])(request, peer)

    def admin(self, request: dict) -> None:
        if dig(self.running.values, "server.service.authenticate", False):
            user = check_token(self.keys(fresh=True).get("users", {}), request.get("token", ""))
            if not user["admin"] and user["uid"] != 0:
                raise Status(5016, "Mgmtd::NotAdmin")

    def on_heartbeat(self, request: dict, peer: str) -> dict:
        now = time.time()
        if abs(now - request["time"]) > self.setting("heartbeat_timestamp_valid_window", "30s"):
            raise Status(5002, "Mgmtd::HeartbeatFail", "timestamp out of window")
        identity = str(request["node_id"])
        keys = self.keys()
        known = keys.get("nodes", {}).get(identity)
        if known and known["type"] != request["type"]:
            raise Status(5013, "Mgmtd::NodeTypeMismatch")
        if not known:
            self.edit(lambda k: k.setdefault("nodes", {}).update({identity: {"type": request["type"]}}))
        public = {tid: state for item in keys.get("chains", {}).values() for tid, state in item["targets"]}
        before = self.heartbeats.get(identity, {}).get("targets", {})
        targets = {tid: info for tid, info in before.items() if tid in public}
        targets.update({tid: {**info, "seen": now} for tid, info in request.get("targets", {}).items()})
        address = f"{peer}:{request['port']}"
        self.heartbeats[identity] = {**request, "seen": now, "address": address, "targets": targets}
        return {"config": keys.get("configs", {}).get(request["type"]), "public": public}

    def on_routing(self, request: dict, peer: str) -> dict:
        now = time.time()
        keys = self.keys()
        nodes = []
        for identity, node in keys.get("nodes", {}).items():
            beat = self.heartbeats.get(identity)
            fresh = beat is not None and beat["seen"] > now - self.setting("heartbeat_fail_interval", "1min")
            if identity == str(self.node_id):
                status = "PRIMARY_MGMTD"
            else:
                late = beat or now > self.primary_since + self.setting("heartbeat_fail_interval", "1min")
                status = "HEARTBEAT_CONNECTED" if fresh else "HEARTBEAT_FAILED" if late else "HEARTBEAT_CONNECTING"
            nodes.append(
                {
                    "node_id": int(identity),
                    "type": node["type"],
                    "status": status,
                    **(
                        {}
                        if beat is None
                        else {
                            key: beat[key]
                            for key in ("hostname", "pid", "release", "config_version", "address", "seen")
                        }
                    ),
                }
            )
        owners = {
            tid: (beat["node_id"], info)
            for beat in self.heartbeats.values()
            for tid, info in beat.get("targets", {}).items()
        }
        return {
            "nodes": nodes,
            "chains": keys.get("chains", {}),
            "tables": keys.get("tables", {}),
            "configs": {kind: config["version"] for kind, config in keys.get("configs", {}).items()},
            "targets": {
                tid: {"node": node, "local": self.local(tid, now), **{k: info[k] for k in ("disk", "used", "chain")}}
                for tid, (node, info) in owners.items()
            },
        }

    def on_get_config(self, request: dict, peer: str) -> dict:
        return {"config": self.keys().get("configs", {}).get(request["type"])}

    def on_set_config(self, request: dict, peer: str) -> dict:
        self.admin(request)
        try:
            tomllib.loads(request["content"])
        except ValueError as error:
            raise Status(3, "InvalidArg", f"parse failed: {error}") from None

        def change(keys: dict) -> int:
            configs = keys.setdefault("configs", {})
            version = configs.get(request["type"], {"version": 0})["version"] + 1
            configs[request["type"]] = {"version": version, "content": request["content"], "desc": request["desc"]}
            return version

        return {"version": self.edit(change)}

    def on_set_chains(self, request: dict, peer: str) -> dict:
        self.admin(request)

        def change(keys: dict) -> None:
            chains = keys.setdefault("chains", {})
            taken = {tid for item in chains.values() for tid, _public in item["targets"]}
            for chain, targets in request["chains"].items():
                if chain in chains:
                    if sorted(tid for tid, _public in chains[chain]["targets"]) != sorted(targets):
                        raise Status(5007, "Mgmtd::InvalidChainTable", f"Target mismatch of ChainId({chain})")
                    continue
                double = [tid for tid in targets if tid in taken]
                if double:
                    raise Status(
                        5007, "Mgmtd::InvalidChainTable", f"TargetId({double[0]}) duplicated. chain id: {chain}"
                    )
                taken.update(targets)
                chains[chain] = {
                    "version": 1,
                    "created": time.time(),
                    "preferred": list(targets) if request["preferred"] else [],
                    "targets": [[tid, "SERVING"] for tid in targets],
                }

        self.edit(change)
        return {}

    def on_set_table(self, request: dict, peer: str) -> dict:
        self.admin(request)

        def change(keys: dict) -> int:
            chains = keys.get("chains", {})
            missing = [chain for chain in request["chains"] if chain not in chains]
            if missing:
                raise Status(5007, "Mgmtd::InvalidChainTable", f"ChainId({missing[0]}) not found")
            if len({len(chains[chain]["targets"]) for chain in request["chains"]}) > 1:
                raise Status(5007, "Mgmtd::InvalidChainTable", "Different replica counts")
            versions = keys.setdefault("tables", {}).setdefault(str(request["table"]), [])
            if not versions or versions[-1]["chains"] != request["chains"]:
                versions.append({"chains": request["chains"], "desc": request["desc"]})
            return len(versions)

        return {"version": self.edit(change)}

    def on_update_chain(self, request: dict, peer: str) -> dict:
        self.admin(request)
        chain, target = request["chain"], request["target"]

        def change(keys: dict) -> None:
            chains = keys.get("chains", {})
            if chain not in chains:
                raise Status(5012, "Mgmtd::ChainNotFound", f"chain: {chain}")
            item = chains[chain]
            if request["mode"] == "add":
                if any(tid == target for other in chains.values() for tid, _public in other["targets"]):
                    raise Status(5018, "Mgmtd::TargetExisted", f"target: {target}")
                item["targets"].append([target, "OFFLINE"])
                if len(item["preferred"]) == len(item["targets"]) - 1:
                    item["preferred"].append(target)
            else:
                state = dict(map(tuple, item["targets"])).get(target)
                if state is None:
                    raise Status(5017, "Mgmtd::TargetNotFound", f"target {target} is not found in chain {chain}")
                if state != "OFFLINE":
                    raise Status(
                        3, "InvalidArg", f"Do not allow to remove target {target} from chain {chain}: state is {state}"
                    )
                item["targets"] = [pair for pair in item["targets"] if pair[0] != target]
                item["preferred"] = [tid for tid in item["preferred"] if tid != target]
            item["version"] += 1

        self.edit(change)
        return {}

    def on_prefer(self, request: dict, peer: str) -> dict:
        self.admin(request)

        def change(keys: dict) -> None:
            item = keys["chains"][request["chain"]]
            if sorted(request["targets"]) != sorted(tid for tid, _public in item["targets"]):
                raise Status(3, "InvalidArg", "targets do not match")
            item["preferred"] = request["targets"]

        self.edit(change)
        return {}

    def on_rotate(self, request: dict, peer: str) -> dict:
        """The head that served last goes to the tail, and the next one may serve: what only the head had is lost."""
        self.admin(request)

        def change(keys: dict) -> None:
            item = keys["chains"][request["chain"]]
            head, *others = item["targets"]
            if head[1] == "LASTSRV" and others:
                item["targets"] = [[others[0][0], "LASTSRV"], *others[1:], [head[0], "OFFLINE"]]
                item["version"] += 1

        self.edit(change)
        return {}

    def on_unregister(self, request: dict, peer: str) -> dict:
        self.admin(request)
        identity = str(request["node_id"])
        nodes = {str(node["node_id"]): node for node in self.on_routing({}, peer)["nodes"]}
        if identity not in nodes:
            raise Status(5001, "Mgmtd::NodeNotFound")
        if nodes[identity]["status"] not in ("DISABLED", "HEARTBEAT_FAILED"):
            raise Status(
                3, "InvalidArg", f"Do not allow to unregister NodeId({identity}) of status {nodes[identity]['status']}"
            )
        for chain, item in self.keys().get("chains", {}).items():
            for tid, _public in item["targets"]:
                if (int(tid) // 100000) % 1000000 == int(identity):
                    raise Status(
                        3,
                        "InvalidArg",
                        f"Do not allow to unregister NodeId({identity}): referenced by {tid} of {chain}",
                    )
        self.edit(lambda keys: keys["nodes"].pop(identity))
        self.heartbeats.pop(identity, None)
        return {}


def next_states(old: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(target, public state, local state) -> (target, public state), by upstream's rules."""
    new: dict[str, list[str]] = {state: [] for state in ("SERVING", "LASTSRV", "SYNCING", "WAITING", "OFFLINE")}
    by = {state: [(tid, local) for tid, public, local in old if public == state] for state in new}
    for tid, local in by["SERVING"]:
        if local in ("ONLINE", "UPTODATE"):
            new["SERVING"].append(tid)
        else:
            new["OFFLINE" if new["LASTSRV"] else "LASTSRV"].append(tid)
    for tid, local in by["LASTSRV"]:
        if new["SERVING"]:
            new["OFFLINE"].append(tid)
        else:
            new["SERVING" if local in ("ONLINE", "UPTODATE") else "LASTSRV"].append(tid)
    for tid, local in by["SYNCING"]:
        if local == "UPTODATE":
            new["SERVING"].append(tid)
        elif local == "ONLINE":
            new["SYNCING" if new["SERVING"] else "WAITING"].append(tid)
        else:
            new["OFFLINE"].append(tid)
    for tid, local in by["WAITING"] + by["OFFLINE"]:
        if new["SERVING"] and not new["SYNCING"] and local == "ONLINE":
            new["SYNCING"].append(tid)
        else:
            new["WAITING" if local in ("ONLINE", "UPTODATE") else "OFFLINE"].append(tid)
    if new["SERVING"]:
        new["OFFLINE"] = new["LASTSRV"] + new["OFFLINE"]
        new["LASTSRV"] = []
    return [(tid, state) for state, tids in new.items() for tid in tids]


def own_address(fdb: Cluster) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((fdb.coordinators[0].rpartition(":")[0], 9))
        return probe.getsockname()[0]


def mgmtd_main(arguments: list[str]) -> int:
    launcher, node_id = start_files(arguments)
    if not node_id:
        die("node_id is not set")
    try:
        mgmtd = Mgmtd(launcher, node_id)
    except Unavailable:
        die("FoundationDB is unavailable")
    both = ports(mgmtd.running.values)
    mgmtd.port = both[0]
    for port in both:
        bind(port, mgmtd.answer)
    while True:
        try:
            with mgmtd.lock:
                mgmtd.tick()
                if mgmtd.primary_since and str(node_id) not in mgmtd.keys().get("nodes", {}):
                    mgmtd.edit(lambda k: k.setdefault("nodes", {}).update({str(node_id): {"type": "MGMTD"}}))
        except Unavailable:
            log("FoundationDB is unavailable")
            mgmtd.primary_since = 0.0
        time.sleep(BEAT_SECONDS)


# -- meta and storage ----------------------------------------------------------------


def first_config(peers: Peers, kind: str) -> dict:
    """The main configuration from mgmtd; waits for a primary as the real service does, and not for ever."""
    end = time.time() + 60
    while True:
        try:
            config = peers.call({"op": "get_config", "type": kind})["config"]
            if config is None:
                die(f"Load config of {kind} failed: not found. Run set-config first")
            return config
        except Status as status:
            if time.time() > end:
                die(f"Load config of {kind} failed: {status.code}({status.name})")
            time.sleep(1)


def beat(peers: Peers, me: dict, running: Running, report, follow) -> None:
    """Heartbeats for ever."""
    while True:
        try:
            now = {"time": time.time(), "config_version": running.version}
            answer = peers.call({"op": "heartbeat", **me, **now, **report()})
            running.take(answer["config"])
            follow(answer)
        except Status as status:
            log(f"heartbeat failed: {status.code}({status.name}) {status.message}")
        time.sleep(BEAT_SECONDS)


def identity(node_id: int, kind: str, port: int) -> dict:
    return {
        "node_id": node_id,
        "type": kind,
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "release": release(),
        "port": port,
    }


def meta_main(arguments: list[str]) -> int:
    launcher, node_id = start_files(arguments)
    peers = Peers(dig(launcher, "mgmtd_client.mgmtd_server_addresses") or [], launcher["cluster_id"])
    running = Running(first_config(peers, "META"))
    config = running.values
    fdb = Cluster(
        dig(config, "server.fdb.clusterFile") or dig(config, "server.kv_engine.fdb.clusterFile") or die("no fdb")
    )

    def answer(request: dict, peer: str) -> dict:
        fdb.reload()
        keys = fdb.read()["document"]["keys"]
        uid = 0
        if dig(running.values, "server.meta.authenticate", False):
            uid = check_token(keys.get("users", {}), request.get("token", ""))["uid"]
        return file_system(fdb, keys, request, uid)

    for port in ports(config):
        bind(port, answer)
    beat(peers, identity(node_id, "META", ports(config)[0]), running, dict, lambda _answer: None)
    return 0


def file_system(fdb: Cluster, keys: dict, request: dict, uid: int) -> dict:
    """Directories with owner and layout."""
    tree, path = keys.get("fs", {}), "/" + request["path"].strip("/")
    if request["op"] == "stat":
        if path not in tree:
            raise Status(3000, "Meta::NotFound", path)
        return {"inode": tree[path]}
    parent = os.path.dirname(path)
    if uid != 0:
        raise Status(3008, "Meta::NoPermission", path)

    def change(document: dict) -> None:
        nodes = document["keys"]["fs"]
        if request["op"] == "mkdir":
            if path in nodes:
                raise Status(3007, "Meta::Exists", path)
            if parent not in nodes:
                raise Status(3000, "Meta::NotFound", parent)
            nodes[path] = {"uid": 0, "gid": 0, "perm": request["perm"], "layout": nodes[parent]["layout"]}
        elif path not in nodes:
            raise Status(3000, "Meta::NotFound", path)
        elif request["op"] == "set_perm":
            nodes[path].update({key: request[key] for key in ("uid", "gid", "perm") if request.get(key) is not None})
        elif request["op"] == "set_layout":
            if str(request["layout"]["table"]) not in document["keys"].get("tables", {}):
                raise Status(5007, "Mgmtd::InvalidChainTable", f"ChainTableId({request['layout']['table']}) not found")
            nodes[path]["layout"] = request["layout"]

    fdb.change(change)
    return {}


class Targets:
    """The targets on the disks of a storage service."""

    def __init__(self, config: dict) -> None:
        self.paths = dig(config, "server.targets.target_paths") or die("target_paths is empty")
        self.without_uuid = bool(dig(config, "server.targets.allow_disk_without_uuid", False))
        self.lock = threading.Lock()
        self.found: dict[str, dict] = {}
        self.public: dict[str, str] = {}
        for disk, path in enumerate(self.paths):
            if not os.path.isdir(path):
                die(f"target path {path} does not exist")
            uuid = self.uuid(path)
            for name in os.listdir(path):
                info = os.path.join(path, name, "target.toml")
                if name.isdigit() and os.path.exists(info):
                    with open(info, "rb") as file:
                        stored = tomllib.load(file)
                    if stored["disk_uuid"] != uuid:
                        log(f"load target {name} failed: 4017(Storage::StorageUUIDMismatch)")
                        continue
                    self.found[name] = {"local": "ONLINE", "disk": disk, "chain": stored["chain_id"], "used": 0}

    def uuid(self, path: str) -> str:
        device = os.stat(path).st_dev
        for name in os.listdir("/dev/disk/by-uuid") if os.path.isdir("/dev/disk/by-uuid") else []:
            if os.stat(f"/dev/disk/by-uuid/{name}").st_rdev == device:
                return name
        if not self.without_uuid:
            die(f"no UUID of the file system of {path}: 4017(Storage::StorageUUIDMismatch)")
        return ""

    def report(self) -> dict:
        with self.lock:
            return {"targets": self.found}

    def follow(self, answer: dict) -> None:
        with self.lock:
            self.public = answer["public"]
            for tid, info in self.found.items():
                public = self.public.get(tid)
                if info["local"] == "OFFLINE":
                    continue
                if public == "SERVING":
                    info["local"] = "UPTODATE"
                elif public == "SYNCING":
                    info.setdefault("syncing", time.time())
                    if time.time() > info["syncing"] + SYNC_SECONDS:
                        info["local"] = "UPTODATE"
                        info.pop("syncing")
                elif public in ("OFFLINE", "WAITING", "LASTSRV"):
                    info["local"] = "ONLINE"
                    info.pop("syncing", None)

    def answer(self, request: dict, peer: str) -> dict:
        tid = str(request["target"])
        with self.lock:
            if request["op"] == "create_target":
                if request["disk"] >= len(self.paths):
                    raise Status(
                        3, "InvalidArg", f"disk index {request['disk']} exceeds {len(self.paths)} target paths"
                    )
                path = self.paths[request["disk"]]
                if tid in self.found and self.found[tid]["local"] != "OFFLINE":
                    return {}
                os.makedirs(os.path.join(path, tid), exist_ok=True)
                with open(os.path.join(path, tid, "target.toml"), "w", encoding="utf-8") as file:
                    file.write(f"chain_id = {request['chain']}\ndisk_uuid = '{self.uuid(path)}'\n")
                    file.write(f"chunk_size_list = {request.get('chunk_sizes') or CHUNK_SIZES}\n")
                self.found[tid] = {"local": "ONLINE", "disk": request["disk"], "chain": request["chain"], "used": 0}
                return {}
            if tid not in self.found:
                raise Status(4031, "Storage::TargetNotFound", f"target {tid}")
            if request["op"] == "offline_target":
                self.found[tid]["local"] = "OFFLINE"
                return {}
            if request["op"] == "remove_target":
                if self.found[tid]["local"] != "OFFLINE":
                    raise Status(4032, "Storage::TargetStateInvalid", "remove failed: target is not offline!")
                if tid in self.public and not request["force"]:
                    raise Status(4032, "Storage::TargetStateInvalid", "remove failed: target is still in a chain!")
                path = os.path.join(self.paths[self.found.pop(tid)["disk"]], tid)
                for name in os.listdir(path):
                    os.unlink(os.path.join(path, name))
                os.rmdir(path)
                return {}
        raise Status(3, "InvalidArg", request["op"])


def storage_main(arguments: list[str]) -> int:
    launcher, node_id = start_files(arguments)
    if not node_id:
        die("node_id is not set")
    peers = Peers(dig(launcher, "mgmtd_client.mgmtd_server_addresses") or [], launcher["cluster_id"])
    running = Running(first_config(peers, "STORAGE"))
    config = running.values
    targets = Targets(config)
    for port in ports(config):
        bind(port, targets.answer)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    beat(peers, identity(node_id, "STORAGE", ports(config)[0]), running, targets.report, targets.follow)
    return 0


# -- FUSE and monitor -------------------------------------------------------------------


def hf3fs_fuse_main(arguments: list[str]) -> int:
    """Mounts a tmpfs under the name that 3FS has in the mount table; killed, it leaves it behind."""
    options, _rest = flags(arguments)
    launcher = load(options["launcher_cfg"])
    peers = Peers(dig(launcher, "mgmtd_client.mgmtd_server_addresses") or [], launcher["cluster_id"])
    mountpoint = launcher["mountpoint"]
    with open(launcher["token_file"], encoding="utf-8") as file:
        token = file.read().strip()
    first_config(peers, "FUSE")
    try:
        decode_token(token)
    except Status as status:
        die(f"token: {status.message}")
    with open("/proc/self/mounts", encoding="utf-8") as file:
        if any(line.split()[1] == mountpoint for line in file):
            die(f"fuse: mountpoint {mountpoint} is in use: Transport endpoint is not connected")
    if not os.path.isdir(mountpoint):
        die(f"fuse: bad mount point `{mountpoint}': No such file or directory")
    name = f"hf3fs.{launcher['cluster_id']}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", name, mountpoint], check=True)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while not stop:
        time.sleep(0.5)
    return subprocess.call(["umount", mountpoint])


def monitor_collector_main(arguments: list[str]) -> int:
    options, _rest = flags(arguments)
    config = load(options["cfg"])
    house = dig(config, "server.monitor_collector.reporter.clickhouse") or {}
    if not house.get("host") or not str(house.get("port", "")):
        die("clickhouse host and port are empty")
    for port in ports(config):
        bind(port, lambda _request, _peer: {})
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        time.sleep(60)


def clickhouse_client(arguments: list[str]) -> int:
    """Knows CREATE and EXISTS; its state is a file beside the configuration that it is given."""
    words = list(arguments)
    config = words[words.index("--config-file") + 1] if "--config-file" in words else ""
    if not config or not os.access(config, os.R_OK):
        sys.stderr.write("Code: 516. DB::Exception: Authentication failed\n")
        return 4
    store = os.path.join(os.path.dirname(TRAPS), "clickhouse.json")
    try:
        with open(store, encoding="utf-8") as file:
            tables = json.load(file)
    except OSError:
        tables = []
    query = words[words.index("--query") + 1] if "--query" in words else sys.stdin.read()
    asked = re.search(r"EXISTS TABLE ([`\w.]+)", query)
    if asked and "CREATE" not in query:
        sys.stdout.write("1\n" if asked.group(1).replace("`", "") in tables else "0\n")
        return 0
    tables += [name.replace("`", "") for name in re.findall(r"CREATE TABLE IF NOT EXISTS ([`\w.]+)", query)]
    os.makedirs(os.path.dirname(store), exist_ok=True)
    with open(store, "w", encoding="utf-8") as file:
        json.dump(sorted(set(tables)), file)
    return 0


# -- admin_cli ----------------------------------------------------------------------------


class Admin:
    """One run of admin_cli."""

    def __init__(self, config: dict) -> None:
        self.config = config
        self.token = str(dig(config, "user_info.token", "") or "")
        self.peers = Peers(dig(config, "mgmtd_client.mgmtd_server_addresses") or [], config["cluster_id"])

    def fdb(self) -> Cluster:
        path = str(dig(self.config, "fdb.clusterFile", "") or "")
        if not path or not os.path.exists(path):
            raise Status(1000, "Transaction::Failed", f"No cluster file found: {path}")
        return Cluster(path)

    def keys(self) -> dict:
        try:
            return self.fdb().read()["document"]["keys"]
        except Unavailable:
            raise Status(1004, "Transaction::NetworkError", "Operation timed out") from None

    def edit(self, change) -> object:
        result: list = []

        def inner(document: dict) -> None:
            result[:] = [change(document["keys"])]

        try:
            self.fdb().change(inner)
        except Unavailable:
            raise Status(1004, "Transaction::NetworkError", "Operation timed out") from None
        return result[0]

    def call(self, **request: object) -> dict:
        return self.peers.call({"token": self.token, **request})

    def routing(self) -> dict:
        return self.call(op="routing")

    def at(self, routing: dict, node_id: int) -> str:
        node = next((node for node in routing["nodes"] if node["node_id"] == node_id), None)
        if node is None or node["status"] != "HEARTBEAT_CONNECTED":
            raise Status(7004, "StorageClient::RoutingError", f"node {node_id} is unknown or not connected")
        return node["address"]

    def at_storage(self, node_id: int, **request: object) -> dict:
        answer = ask(self.at(self.routing(), node_id), request)
        if answer is None:
            raise Status(2007, "RPC::SendFailed", f"node {node_id} does not answer")
        if "error" in answer:
            raise Status(*answer["error"])
        return answer

    def at_meta(self, **request: object) -> dict:
        metas = [n for n in self.routing()["nodes"] if n["type"] == "META" and n["status"] == "HEARTBEAT_CONNECTED"]
        for node in metas:
            answer = ask(node["address"], {**request, "token": self.token})
            if answer is not None:
                if "error" in answer:
                    raise Status(*answer["error"])
                return answer
        raise Status(6002, "MgmtdClient::MetaServiceNotAvailable")

    # commands --------------------------------------------------------------------------

    def run(self, words: list[str]) -> list[list[str]]:
        trap(words[0])
        handler = getattr(self, "do_" + words[0].replace("-", "_"), None)
        if handler is None:
            raise Status(3, "InvalidArg", f"Unknown method name: {words[0]}")
        return handler(words[1:]) or []

    def do_init_cluster(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("mgmtd", "meta", "storage", "fuse"), ("allow-config-existed", "skip-config-check"))
        need(rest, 3)
        layout = {"table": int(rest[0]), "chunk": int(rest[1]), "stripe": int(rest[2])}
        table = [
            [
                f"Init filesystem, root directory layout: chain table ChainTableId({rest[0]}), chunksize {rest[1]}, stripesize {rest[2]}\n"
            ]
        ]

        def root(keys: dict) -> None:
            keys.setdefault("fs", {}).setdefault("/", {"uid": 0, "gid": 0, "perm": "0755", "layout": layout})

        self.edit(root)
        for kind in ("mgmtd", "meta", "storage", "fuse"):
            if kind not in o:
                continue
            content = read(o[kind])

            def store(keys: dict, kind: str = kind.upper(), content: str = content) -> int:
                old = keys.setdefault("configs", {}).get(kind)
                if old and "allow-config-existed" not in o:
                    message = f"Failed to set config for {kind}: Config for {kind} existed, version {old['version']}"
                    raise Status(999, "Unknown", message)
                version = old["version"] + 1 if old else 1
                keys["configs"][kind] = {"version": version, "content": content, "desc": ""}
                return version

            table.append([f"Init config for {kind.upper()} version {self.edit(store)}"])
        return table

    def _ensure_admin(self, users: dict, self_uid: int = -1) -> None:
        user = check_token(users, self.token)
        if user["uid"] not in (0, self_uid) and not user["admin"]:
            raise Status(25, "AuthenticationFail", "Not Admin")

    @staticmethod
    def _attributes(user: dict) -> list[list[str]]:
        return [
            ["Uid", str(user["uid"])],
            ["Name", user["name"]],
            ["Token", f"{user['token']}(Expired at N/A)"],
            *(
                ["Token", f"{x['token']}(Expired at {time.strftime('%F %T', time.gmtime(x['end']))})"]
                for x in user["tokens"][::-1]
            ),
            ["IsRootUser", str(user["root"]).lower()],
            ["IsAdmin", str(user["admin"]).lower()],
            ["Gid", str(user["uid"])],
            ["SupplementaryGids", ", ".join(map(str, user["groups"]))],
        ]

    def do_user_add(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("token", "groups"), ("root", "admin"))
        need(rest, 2)

        def change(keys: dict) -> dict:
            users = keys.setdefault("users", {})
            if not users and "admin" not in o:
                raise Status(3, "InvalidArg", "The first user must be admin")
            if users:
                self._ensure_admin(users)
            if rest[0] in users:
                raise Status(3007, "Meta::Exists")
            if decode_token(o["token"]) != int(rest[0]):
                raise Status(33, "InvalidFormat", "Could not set token from other uid")
            groups = [int(gid) for gid in o.get("groups", "").split(",") if gid]
            users[rest[0]] = {
                "uid": int(rest[0]),
                "name": rest[1],
                "token": o["token"],
                "tokens": [],
                "groups": groups,
                "root": "root" in o,
                "admin": "admin" in o,
            }
            return users[rest[0]]

        return self._attributes(self.edit(change))

    def do_user_set(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("name", "root", "admin", "groups"))
        need(rest, 1)

        def change(keys: dict) -> dict:
            self._ensure_admin(keys.get("users", {}))
            user = keys["users"].get(rest[0])
            if user is None:
                raise Status(3000, "Meta::NotFound", f"Uid {rest[0]} not found")
            user["name"] = o.get("name") or user["name"]
            user.update({key: o[key] == "1" for key in ("root", "admin") if key in o})
            if o.get("groups"):
                user["groups"] = [int(gid) for gid in o["groups"].split(",")]
            return user

        return self._attributes(self.edit(change))

    def do_user_set_token(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(
            words, ("token", "max-active-tokens", "last-token-lifetime-days"), ("new", "invalidate-existed-tokens")
        )
        need(rest, 1)

        def change(keys: dict) -> dict:
            self._ensure_admin(keys.get("users", {}))
            user = keys["users"].get(rest[0])
            if user is None:
                raise Status(3000, "Meta::NotFound", f"Uid {rest[0]} not found")
            if decode_token(o["token"]) != int(rest[0]):
                raise Status(33, "InvalidFormat", "Could not set token from other uid")
            if user["token"] == o["token"]:
                return user
            if "invalidate-existed-tokens" not in o:
                old = [x for x in user["tokens"] if x["end"] > time.time() and x["token"] != o["token"]]
                old.append(
                    {"token": user["token"], "end": time.time() + 86400 * float(o.get("last-token-lifetime-days", 7))}
                )
                if len(old) + 1 >= int(o.get("max-active-tokens", 5)):
                    raise Status(67, "TooManyTokens", f"count of tokens by now: {len(old)}. max: 5")
                user["tokens"] = old
            user["token"] = o["token"]
            return user

        return self._attributes(self.edit(change))

    def do_user_remove(self, words: list[str]) -> list[list[str]]:
        need(words, 1)

        def change(keys: dict) -> None:
            self._ensure_admin(keys.get("users", {}))
            if keys["users"].pop(words[0], None) is None:
                raise Status(3000, "Meta::NotFound", f"Uid {words[0]} not found")

        self.edit(change)
        return []

    def do_user_list(self, words: list[str]) -> list[list[str]]:
        users = self.keys().get("users", {})
        self._ensure_admin(users)
        return [["Uid", "Name", "Token", "IsRoot", "IsAdmin", "Gids"]] + [
            [
                str(u["uid"]),
                u["name"],
                u["token"],
                str(u["root"]).lower(),
                str(u["admin"]).lower(),
                ", ".join(map(str, u["groups"])),
            ]
            for u in users.values()
        ]

    def do_user_switch(self, words: list[str]) -> list[list[str]]:
        o, _rest = parse([word.replace("-t", "--token") if word == "-t" else word for word in words], ("token",))
        self.token = o["token"]
        return [["Uid", "0"], ["Gid", "0"], ["Groups", "[]"], ["Token", self.token]]

    def do_set_config(self, words: list[str]) -> list[list[str]]:
        o, _rest = parse(short(words, {"-t": "--type", "-f": "--file"}), ("type", "file", "desc"))
        if o.get("type") not in NODE_TYPES:
            raise Status(10000, "Cli::WrongUsage", f"invalid type: {o.get('type')}")
        answer = self.call(op="set_config", type=o["type"], content=read(o["file"]), desc=o.get("desc", ""))
        return [["Succeed"], ["ConfigVersion", str(answer["version"])]]

    def do_get_config(self, words: list[str]) -> list[list[str]]:
        o, _rest = parse(short(words, {"-t": "--node-type", "-o": "--output-file"}), ("node-type", "output-file"))
        config = self.call(op="get_config", type=o["node-type"])["config"]
        table = [["NodeType", o["node-type"]], ["ConfigVersion", str(config["version"]) if config else "null"]]
        if config:
            with open(o["output-file"], "w", encoding="utf-8") as file:
                file.write(config["content"])
            table += [["ConfigDesc", config["desc"]], ["OutputFile", o["output-file"]]]
        return table

    def do_list_nodes(self, words: list[str]) -> list[list[str]]:
        routing = self.routing()
        table = [
            ["Id", "Type", "Status", "Hostname", "Pid", "Tags", "LastHeartbeatTime", "ConfigVersion", "ReleaseVersion"]
        ]
        for node in sorted(routing["nodes"], key=lambda node: (node["type"], node["node_id"])):
            version = node.get("config_version", 0)
            shown = f"{version}(UPTODATE)" if version == routing["configs"].get(node["type"]) else str(version)
            seen = (
                time.strftime("%F %T", time.gmtime(node["seen"]))
                if "seen" in node and node["type"] != "MGMTD"
                else "N/A"
            )
            table.append(
                [
                    str(node["node_id"]),
                    node["type"],
                    node["status"],
                    node.get("hostname", ""),
                    str(node.get("pid", 0)),
                    "[]",
                    seen,
                    shown,
                    node.get("release", ""),
                ]
            )
        return table

    def do_list_chains(self, words: list[str]) -> list[list[str]]:
        routing = self.routing()
        widest = max((len(item["targets"]) for item in routing["chains"].values()), default=0)
        table = [["ChainId", "ReferencedBy", "ChainVersion", "Status", "PreferredOrder", *["Target"] * widest]]
        for chain, item in sorted(routing["chains"].items(), key=lambda pair: int(pair[0])):
            used = [
                tid
                for tid, versions in routing["tables"].items()
                if any(chain in version["chains"] for version in versions)
            ]
            states = [public for _tid, public in item["targets"]]
            serving = states.count("SERVING")
            status = (
                "SYNCING"
                if "SYNCING" in states
                else "SERVING"
                if serving == len(states)
                else f"SERVING({serving}/{len(states)})"
                if serving
                else "UNAVAILABLE"
            )
            cells = [
                f"{tid}({public}-{routing['targets'].get(tid, {'local': 'OFFLINE'})['local']})"
                for tid, public in item["targets"]
            ]
            table.append(
                [
                    chain,
                    ",".join(used) or "N/A",
                    str(item["version"]),
                    status,
                    f"[{','.join(item['preferred'])}]",
                    *cells,
                ]
            )
        return table

    def do_list_targets(self, words: list[str]) -> list[list[str]]:
        routing = self.routing()
        if "--orphan" in words:
            chained = {tid for item in routing["chains"].values() for tid, _public in item["targets"]}
            return [["TargetId", "LocalState", "NodeId", "DiskIndex", "UsedSize"]] + [
                [tid, info["local"], str(info["node"]), str(info["disk"]), str(info["used"])]
                for tid, info in routing["targets"].items()
                if tid not in chained
            ]
        table = [["TargetId", "ChainId", "Role", "PublicState", "LocalState", "NodeId", "DiskIndex", "UsedSize"]]
        for chain, item in routing["chains"].items():
            last = len(item["targets"]) - 1
            for place, (tid, public) in enumerate(item["targets"]):
                info = routing["targets"].get(tid)
                role = "HEAD" if place == 0 else "TAIL" if place == last else "MIDDLE"
                table.append(
                    [
                        tid,
                        chain,
                        role,
                        public,
                        info["local"] if info else "OFFLINE",
                        str(info["node"]) if info else "N/A",
                        str(info["disk"]) if info else "N/A",
                        str(info["used"]) if info else "0",
                    ]
                )
        return table

    def do_list_chain_tables(self, words: list[str]) -> list[list[str]]:
        routing = self.routing()
        table = [["ChainTableId", "ChainTableVersion", "ChainCount", "ReplicaCount", "Desc"]]
        for identifier, versions in routing["tables"].items():
            for number, version in enumerate(versions, 1):
                counts = {len(routing["chains"][chain]["targets"]) for chain in version["chains"]}
                table.append(
                    [
                        identifier,
                        str(number),
                        str(len(version["chains"])),
                        "/".join(map(str, sorted(counts))),
                        version["desc"],
                    ]
                )
        return table

    def do_dump_chain_table(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(short(words, {"-v": "--version"}), ("version",))
        need(rest, 2)
        versions = self.routing()["tables"].get(rest[0])
        if not versions:
            raise Status(3, "InvalidArg", f"ChainTableId({rest[0]}) not found")
        with open(rest[1], "w", encoding="utf-8") as file:
            file.write(
                "ChainId\n"
                + "".join(f"{chain}\n" for chain in versions[int(o.get("version", len(versions))) - 1]["chains"])
            )
        return [[f"Dump {rest[0]} to {rest[1]} succeeded"]]

    def do_create_target(self, words: list[str]) -> list[list[str]]:
        words, sizes = take_list(words, "--chunk-size")
        o, _rest = parse(
            words, ("node-id", "disk-index", "target-id", "chain-id"), ("add-chunk-size", "use-new-chunk-engine")
        )
        item = self.routing()["chains"].get(o["chain-id"])
        if item and len(item["targets"]) > 1 and [o["target-id"], "LASTSRV"] in item["targets"]:
            raise Status(7004, "StorageClient::RoutingError", f"creation of this target is prohibited {o['target-id']}")
        self.at_storage(
            int(o["node-id"]),
            op="create_target",
            target=int(o["target-id"]),
            disk=int(o["disk-index"]),
            chain=int(o["chain-id"]),
            chunk_sizes=sizes,
        )
        return [[f"Create target {o['target-id']} on disk {o['disk-index']} of {o['node-id']} succeeded"]]

    def do_create_targets(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(
            words, ("node-id", "disk-index"), ("allow-existing-target", "add-chunk-size", "use-new-chunk-engine")
        )
        disks = {int(o["disk-index"]), *map(int, rest)}
        routing, lines = self.routing(), []
        for chain, item in routing["chains"].items():
            for tid, public in item["targets"]:
                node, disk = (int(tid) // 100000) % 1000000, (int(tid) // 100) % 1000 - 1
                if node != int(o["node-id"]) or disk not in disks:
                    continue
                if public == "LASTSRV" and len(item["targets"]) > 1:
                    lines.append([f"creation of this target is prohibited TargetId({tid}), skip"])
                    continue
                self.at_storage(node, op="create_target", target=int(tid), disk=disk, chain=int(chain))
                lines.append([f"Create target {tid} on disk {disk} of {node} succeeded"])
        return lines

    def do_offline_target(self, words: list[str]) -> list[list[str]]:
        o, _rest = parse(words, ("node-id", "target-id"), ("force",))
        routing = self.routing()
        node = int(o.get("node-id") or routing["targets"].get(o["target-id"], {}).get("node", 0))
        for item in routing["chains"].values():
            serving = [tid for tid, public in item["targets"] if public == "SERVING"]
            if serving == [o["target-id"]] and "force" not in o:
                raise Status(4032, "Storage::TargetStateInvalid", "offline failed: target is the last online target!")
        self.at_storage(node, op="offline_target", target=int(o["target-id"]))
        return [[f"Offline target {o['target-id']} of {node} succeeded"]]

    def do_remove_target(self, words: list[str]) -> list[list[str]]:
        o, _rest = parse(words, ("node-id", "target-id"), ("force",))
        self.at_storage(int(o["node-id"]), op="remove_target", target=int(o["target-id"]), force="force" in o)
        return [[f"Remove target {o['target-id']} of {o['node-id']} succeeded"]]

    def do_upload_chains(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, (), ("set-preferred-target-order",))
        rows = csv(rest[0], "ChainId", "TargetId")
        self.call(
            op="set_chains", chains={row[0]: row[1:] for row in rows}, preferred="set-preferred-target-order" in o
        )
        return [[f"Upload {len(rows)} chains succeeded"]]

    def do_upload_chain_table(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("desc",))
        need(rest, 2)
        rows = csv(rest[1], "ChainId")
        answer = self.call(op="set_table", table=int(rest[0]), chains=[row[0] for row in rows], desc=o.get("desc", ""))
        return [[f"Upload ChainTableId({rest[0]}) of ChainTableVersion({answer['version']}) succeeded"]]

    def do_update_chain(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(short(words, {"-m": "--mode"}), ("mode",))
        need(rest, 2)
        self.call(op="update_chain", chain=rest[0], target=rest[1], mode=o["mode"].lower())
        return [["ChainId", rest[0]]]

    def do_set_preferred_target_order(self, words: list[str]) -> list[list[str]]:
        self.call(op="prefer", chain=words[0], targets=words[1:])
        return [["ChainId", words[0]]]

    def do_rotate_lastsrv(self, words: list[str]) -> list[list[str]]:
        need(words, 1)
        self.call(op="rotate", chain=words[0])
        return [["ChainId", words[0]]]

    def do_unregister_node(self, words: list[str]) -> list[list[str]]:
        need(words, 2)
        self.call(op="unregister", node_id=int(words[0]))
        return []

    def do_mkdir(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("perm",), ("recursive",))
        self.at_meta(op="mkdir", path=rest[0], perm=o.get("perm", "0755").zfill(4))
        return []

    def do_set_perm(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(short(words, {"-u": "--uid", "-g": "--gid", "-p": "--perm"}), ("uid", "gid", "perm"))
        perm = o["perm"].zfill(4) if "perm" in o else None
        self.at_meta(
            op="set_perm", path=rest[0], perm=perm, **{key: int(o[key]) if key in o else None for key in ("uid", "gid")}
        )
        return []

    def do_set_layout(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, ("chain-table-id", "chain-table-ver", "chunk-size", "stripe-size"))
        layout = {"table": int(o["chain-table-id"]), "chunk": int(o["chunk-size"]), "stripe": int(o["stripe-size"])}
        self.at_meta(op="set_layout", path=rest[0], layout=layout)
        return []

    def do_stat(self, words: list[str]) -> list[list[str]]:
        o, rest = parse(words, (), ("display-layout",))
        inode = self.at_meta(op="stat", path=rest[0])["inode"]
        table = [
            ["Type", "Directory"],
            ["Permission", inode["perm"]],
            ["Uid", str(inode["uid"])],
            ["Gid", str(inode["gid"])],
        ]
        if "display-layout" in o:
            layout = inode["layout"]
            table += [
                ["Layout-ChainTable", str(layout["table"])],
                ["Layout-ChainTableVersion", "0"],
                ["Layout-ChunkSize", str(layout["chunk"])],
                ["Layout-StripeSize", str(layout["stripe"])],
            ]
        return table


def short(words: list[str], names: dict[str, str]) -> list[str]:
    return [names.get(word, word) for word in words]


def parse(
    words: list[str], valued: tuple[str, ...], switches: tuple[str, ...] = ()
) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name = word[2:]
        if not word.startswith("--"):
            rest.append(word)
        elif name in switches:
            options[name] = "true"
        elif name in valued and queue:
            options[name] = queue.pop(0)
        else:
            raise Status(10000, "Cli::WrongUsage", f"parse failed: Unknown argument: {word}")
    return options, rest


def take_list(words: list[str], name: str) -> tuple[list[str], list[str]]:
    """The words without an option that takes any number of values, and its values."""
    if name not in words:
        return words, []
    start = words.index(name)
    end = next((n for n in range(start + 1, len(words)) if words[n].startswith("--")), len(words))
    return words[:start] + words[end:], words[start + 1 : end]


def need(words: list[str], count: int) -> None:
    if len(words) != count:
        raise Status(10000, "Cli::WrongUsage", f"{len(words)} arguments instead of {count}")


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise Status(999, "Unknown", f"{path}: {error.strerror}") from None


def csv(path: str, first: str, other: str = "") -> list[list[str]]:
    lines = [line.split(",") for line in read(path).splitlines() if line]
    if not lines or lines[0][0] != first or any(name != other for name in lines[0][1:]):
        raise Status(33, "InvalidFormat", f"column[0] expected:'{first}'")
    if len(lines) == 1:
        raise Status(33, "InvalidFormat", "empty rows")
    return lines[1:]


def trap(command: str) -> None:
    """Fail as the file of traps says."""
    try:
        with open(TRAPS, encoding="utf-8") as file:
            traps = json.load(file)
    except OSError:
        return
    for item in traps:
        if item["command"] != command or item.get("times", 1) <= 0:
            continue
        waiting = item.get("after", 0) > 0
        item.update({"after": item["after"] - 1} if waiting else {"times": item.get("times", 1) - 1})
        with open(TRAPS, "w", encoding="utf-8") as file:
            json.dump(traps, file)
        if not waiting:
            code, name = re.fullmatch(r"(\d+)\((.*)\)", item["error"]).groups()
            raise Status(int(code), name, "provoked")


def printed(table: list[list[str]]) -> None:
    widths: list[int] = []
    for row in table:
        widths += [0] * (len(row) - len(widths))
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(cell) + 2)
    for row in table:
        sys.stdout.write(
            "".join(cell.ljust(widths[c]) if c + 1 < len(row) else cell for c, cell in enumerate(row)) + "\n"
        )


def execute(admin: Admin, line: str) -> bool:
    """Run a line; False after an error."""
    if str(dig(admin.config, "verbose", False)).lower() == "true":
        sys.stdout.write(f"> Execute {line}\n")
    try:
        words = shlex.split(line)
        if words:
            printed(admin.run(words))
        return True
    except Status as status:
        sys.stdout.write(f"Encounter error: {status.code}({status.name})\n")
        if status.message:
            sys.stdout.write(status.message + "\n")
        return False


def admin_cli(arguments: list[str]) -> int:
    options, words = flags(arguments)
    if "release_version" in options:
        sys.stdout.write(release() + "\n")
        return 0
    config = load(options["cfg"])
    for name, value in options.items():
        if name.startswith("config."):
            node, parts = config, name[7:].split(".")
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = json.loads(value) if value[:1] in "[{" else value
    admin = Admin(config)
    command = " ".join(words)
    where = re.search(r"path=([^,;]+)", str(config.get("log", "")))
    if where:
        with open(where.group(1), "a", encoding="utf-8") as file:
            file.write(f'cli start cmd = "{command}"\n')
    if not command:
        for line in sys.stdin:
            execute(admin, line.strip())
        return 0
    lines = command.split(";")
    for line in lines[:-1]:
        good = execute(admin, line)
        if not good and config.get("break_multi_line_command_on_failure"):
            return 0
    return 0 if not lines[-1] or execute(admin, lines[-1]) else 1


PROGRAMS = {
    "mgmtd_main": mgmtd_main,
    "meta_main": meta_main,
    "storage_main": storage_main,
    "hf3fs_fuse_main": hf3fs_fuse_main,
    "monitor_collector_main": monitor_collector_main,
    "clickhouse-client": clickhouse_client,
    "admin_cli": admin_cli,
}


def main() -> int:
    return PROGRAMS[os.path.basename(sys.argv[0])](sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
