#!/usr/bin/env python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of FoundationDB 7.3. Not the real programs, and no database: one small JSON document on the coordinators.

One file under the names fdbmonitor, fdbserver, fdbcli, fdbbackup, fdbrestore and backup_agent. Imitated with their traps:

- A cluster file names coordinators; a majority of them must answer, else clients wait (for ever, without --timeout).
- ``configure new`` works once. ``status`` has exit code 0 also when the database is unavailable.
- A change of coordinators gives the cluster file a new id. Servers and backup agents that run rewrite their own cluster
  file (file and directory must be writable); other copies stay as they are, and work only as long as the old
  coordinators forward them.
- A redundancy mode is accepted also when there are too few machines; the database is then not healthy.
- A backup needs an agent, and lands on the disk of whichever agent took it. Without one it goes on for ever, unless it is
  aborted; to abort one that does not run is an error.
- Keys are cleared only in write mode, and a restore wants a range without any.
- A restore needs an agent of the database that it goes into, and locks that whole database until it is complete or
  aborted, whatever prefix its keys get: other clients then read and write nothing.

State: the data directory of each fdbserver. 3FS's double keeps its own state under "keys" of the same document.
"""

from __future__ import annotations

import configparser
import json
import os
import random
import re
import signal
import socket
import socketserver
import string
import subprocess
import sys
import threading
import time

COPIES = {"single": 1, "double": 2, "triple": 3}
ALIVE_SECONDS = 40


class Unavailable(Exception):
    """No majority of coordinators answered."""


class Locked(Exception):
    """A restore has the database for itself."""


def parse_cluster(text: str) -> tuple[str, list[str]]:
    """(description:id, coordinators) of a cluster file's text."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    match = re.fullmatch(r"([A-Za-z0-9_]+:[A-Za-z0-9]+)@([0-9.:,]+)", lines[0] if lines else "")
    if not match:
        raise SystemExit("ERROR: Connection string invalid")
    return match.group(1), match.group(2).split(",")


def ask(address: str, request: dict, timeout: float = 20.0) -> dict | None:
    """One question to a server; None when it does not answer. Generous, since emulated hosts on busy machines are slow."""
    host, _colon, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 3.0) as connection:
            connection.settimeout(timeout)
            connection.sendall(json.dumps(request).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                part = connection.recv(1 << 16)
                if not part:
                    return None
                data += part
            return json.loads(data)
    except (OSError, ValueError):
        return None


class Cluster:
    """A client of the coordinators that a cluster file names."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.known: dict | None = (
            None  # the newest document that was seen: a coordinator that has no newer one says only that
        )
        self.reload()

    def reload(self) -> None:
        with open(self.path, encoding="utf-8") as file:
            self.name, self.coordinators = parse_cluster(file.read())

    def _follow(self, text: str) -> None:
        """Old coordinators say where the database is now; the file is rewritten if it can be."""
        self.name, self.coordinators = parse_cluster(text)
        try:
            temporary = self.path + ".new"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(temporary, self.path)
        except OSError:
            pass

    def read(self) -> dict:
        """The document, which the caller must not change, and the processes that live."""
        for _turn in range(3):
            good: list[dict] = []
            forward = None
            for address in self.coordinators:
                have = self.known["version"] if self.known else None
                answer = ask(address, {"op": "get", "as": self.name, "have": have}) or {}
                forward = forward or answer.get("forward")
                good += [answer] if "version" in answer else []
                if len(good) * 2 > len(self.coordinators):
                    break
            if forward:
                self._follow(forward)
                continue
            if len(good) * 2 <= len(self.coordinators):
                break
            newest = max(good, key=lambda answer: answer["version"])
            document = newest.get("document", self.known)
            self.known = document
            return {"document": document, "processes": newest["processes"]}
        raise Unavailable

    def change(self, edit, lock_aware: bool = False) -> dict:
        """Read, edit, write with compare-and-set on a majority; ``edit`` changes the document it is given."""
        for _turn in range(50):
            before = json.dumps(self.read()["document"], sort_keys=True)
            document = json.loads(before)
            locked = document.get("locked") and not lock_aware
            edit(document)
            if locked and document["keys"] != json.loads(before)["keys"]:
                raise Locked
            if json.dumps(document, sort_keys=True) == before:
                return document
            document["version"] += 1
            written = 0
            for address in self.coordinators:
                answer = ask(address, {"op": "put", "as": self.name, "document": document})
                if answer and not answer.get("ok"):
                    break  # somebody else was first, and all ask the coordinators in the same order
                written += bool(answer)
            if written * 2 > len(self.coordinators):
                return document
            time.sleep(random.uniform(0.01, 0.1))
        raise Unavailable


# -- fdbserver ------------------------------------------------------------------


class Server(socketserver.ThreadingTCPServer):
    """Holds one copy of the document when it is asked to; knows which processes live."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64  # on a busy emulated CPU more than the usual five wait

    def __init__(self, options: dict[str, str]) -> None:
        self.cluster_file = options["cluster-file"]
        self.directory = options["datadir"]
        self.machine = options.get("locality-machineid", socket.gethostname())
        address = options["public-address"]
        self.port = int(address.rpartition(":")[2])
        os.makedirs(self.directory, exist_ok=True)
        self.store = os.path.join(self.directory, "double.json")
        self.state = self.load()
        self.lock = threading.Lock()
        self.processes: dict[str, dict] = {}
        super().__init__(("0.0.0.0", self.port), Handler)

    def load(self) -> dict:
        try:
            with open(self.store, encoding="utf-8") as file:
                return json.load(file)
        except OSError:
            return {"document": {"version": 0, "redundancy": "", "engine": "", "keys": {}}}

    def save(self, state: dict) -> None:
        self.state = state
        with open(self.store + ".new", "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.replace(self.store + ".new", self.store)

    def answer(self, request: dict) -> dict:
        with self.lock:
            state = self.state
            if request["op"] == "become":  # a new coordinator takes the document over
                self.save({"name": request["name"], "document": request["document"]})
                return {"ok": True}
            if request["op"] == "forward":
                self.save({**state, "forward": request["to"]})
                return {"ok": True}
            if request["op"] == "register":
                self.processes[request["address"]] = {**request, "seen": time.time()}
            if state.get("forward") and not state["forward"].startswith(request.get("as", "") + "@"):
                return {"forward": state["forward"]}
            if state.get("name") and state["name"] != request.get("as"):
                return {"error": "another cluster"}
            if request["op"] == "get":
                alive = [p for p in self.processes.values() if p["seen"] > time.time() - ALIVE_SECONDS]
                version = state["document"]["version"]
                found = {} if version == request.get("have") else {"document": state["document"]}
                return {"version": version, "processes": alive, **found}
            if request["op"] == "put":
                if request["document"]["version"] <= state["document"]["version"]:
                    return {"ok": False}
                self.save({"name": request["as"], "document": request["document"]})
            return {"ok": True}


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        if line:
            self.wfile.write(json.dumps(self.server.answer(json.loads(line))).encode() + b"\n")


def options_of(arguments: list[str], flags: tuple[str, ...] = ()) -> tuple[dict[str, str], list[str]]:
    """``--name=value`` and ``--name value`` (underscores and dashes alike), and the rest."""
    options: dict[str, str] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        options[name] = value if equals else "" if name in flags else words.pop(0)
    return options, rest


def fdbserver(arguments: list[str]) -> int:
    options, _rest = options_of(arguments)
    server = Server(options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        cluster = Cluster(server.cluster_file)
        for coordinator in cluster.coordinators:
            host = coordinator.rpartition(":")[0]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))
                own = probe.getsockname()[0]  # what "auto" stands for
            request = {
                "op": "register",
                "as": cluster.name,
                "address": f"{own}:{server.port}",
                "machine": server.machine,
            }
            answer = ask(coordinator, request)
            if answer and "forward" in answer:
                cluster._follow(answer["forward"])
                break
        time.sleep(4)


def fdbmonitor(arguments: list[str]) -> int:
    """Start what foundationdb.conf lists, again when it ends, and follow changes of the file."""
    options, _rest = options_of(arguments, ("daemonize",))
    running: dict[str, tuple[list[str], subprocess.Popen]] = {}
    stop: list[int] = []
    wanted: dict[str, list[str]] = {}
    written = None
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while not stop:
        if os.stat(options["conffile"]).st_mtime_ns != written:
            written = os.stat(options["conffile"]).st_mtime_ns
            wanted = _conf(options["conffile"])
        for section, (argv, process) in list(running.items()):
            if wanted.get(section) != argv or process.poll() is not None:
                process.terminate()
                process.wait()
                del running[section]
        for section, argv in wanted.items():
            if section not in running:
                running[section] = (argv, subprocess.Popen(argv))
        time.sleep(1)
    for _argv, process in running.values():
        process.terminate()
    for _argv, process in running.values():
        process.wait()
    return 0


def _conf(path: str) -> dict[str, list[str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path)
    general = dict(parser["general"])
    found = {}
    for section in parser.sections():
        kind, _dot, number = section.partition(".")
        if not number:
            continue
        values = {"cluster-file": general["cluster-file"], **(parser[kind] if parser.has_section(kind) else {})}
        values.update(parser[section])
        values = {k.replace("_", "-"): v.replace("$ID", number) for k, v in values.items()}
        command = values.pop("command")
        found[section] = [command, *(f"--{name}={value}" for name, value in sorted(values.items()))]
    return found


# -- fdbcli ---------------------------------------------------------------------


def fdbcli(arguments: list[str]) -> int:
    options, _rest = options_of(arguments, ("no-status",))
    path = options.get("C") or options.get("cluster-file") or "/etc/foundationdb/fdb.cluster"
    limit = float(options.get("timeout", 0))
    end = time.time() + limit if limit else None
    if not os.path.exists(path):
        sys.stdout.write(f"ERROR: Unable to load cluster file `{path}': file not found\n")
        return 1
    writable = False
    for command in filter(None, (part.strip() for part in options["exec"].split(";"))):
        if command.split()[0] == "writemode":  # of this call only
            writable = command.split()[1] == "on"
            continue
        if command.split()[0] == "clearrange" and not writable:
            sys.stdout.write("ERROR: writemode must be enabled to set or clear keys in the database.\n")
            return 1
        code = _command(Cluster(path), command, end)
        if code:
            return code
    return 0


def _command(cluster: Cluster, command: str, end: float | None) -> int:
    words = command.split()
    if words[0] == "status":
        return _status(cluster, words[1] if len(words) > 1 else "")
    while True:
        try:
            return _change(cluster, words)
        except Locked:
            sys.stdout.write("ERROR: Database is locked (1038)\n")
            return 1
        except Unavailable:
            if end is not None and time.time() > end:
                sys.stdout.write("Specified timeout reached -- exiting...\n")
                return 1
            time.sleep(0.5)


def _health(found: dict, coordinators: list[str]) -> tuple[bool, str, str]:
    document = found["document"]
    machines = {process["machine"] for process in found["processes"]}
    if not document["redundancy"]:
        return False, "unconfigured", "The database is unavailable; type `status' for more information."
    if len(machines) < COPIES[document["redundancy"]]:
        return False, "missing_data", "The database is unavailable; type `status' for more information."
    return True, "healthy", "The database is available."


def _status(cluster: Cluster, kind: str) -> int:
    up = [address for address in cluster.coordinators if ask(address, {"op": "ping", "as": cluster.name})]
    try:
        found = cluster.read()
        available, state, minimal = _health(found, up)
    except Unavailable:
        found, available, state = None, False, "unknown"
        minimal = "The database is unavailable; type `status' for more information."
    if kind == "minimal":
        sys.stdout.write(minimal + "\n")
        return 0
    coordinators = [{"address": address, "reachable": address in up} for address in cluster.coordinators]
    report: dict = {
        "client": {
            "cluster_file": {"path": cluster.path, "up_to_date": True},
            "coordinators": {"coordinators": coordinators, "quorum_reachable": len(up) * 2 > len(coordinators)},
            "database_status": {"available": available, "healthy": available},
        }
    }
    if found is not None:
        document = found["document"]
        report["cluster"] = {
            "connection_string": f"{cluster.name}@{','.join(cluster.coordinators)}",
            "database_available": available,
            "configuration": {"redundancy_mode": document["redundancy"], "storage_engine": document["engine"]}
            if document["redundancy"]
            else {},
            "data": {"state": {"healthy": state == "healthy", "name": state}},
            "recovery_state": {"name": "fully_recovered" if available else "configuration_missing"},
            "machines": {p["machine"]: {"address": p["address"].rpartition(":")[0]} for p in found["processes"]},
            "processes": {
                p["address"]: {"address": p["address"], "machine_id": p["machine"]} for p in found["processes"]
            },
            "messages": [],
        }
    sys.stdout.write(json.dumps(report) + "\n" if kind == "json" else minimal + "\n")
    return 0


def _change(cluster: Cluster, words: list[str]) -> int:
    if words[0] == "configure":
        new = words[1] == "new"
        mode = next((word for word in words if word in COPIES), "")
        engine = next((word for word in words if word in ("ssd", "memory", "ssd-redwood-1")), "")
        exists = bool(cluster.read()["document"]["redundancy"])
        if new and exists:
            sys.stdout.write("ERROR: Database already exists! To change configuration, don't say `new'\n")
            return 1
        if not new and not exists:
            sys.stdout.write("ERROR: The database has not been configured\n")
            return 1

        def configure(document: dict) -> None:
            document["redundancy"] = mode or document["redundancy"]
            document["engine"] = engine or document["engine"]

        cluster.change(configure)
        sys.stdout.write("Database created\n" if new else "Configuration changed\n")
        return 0
    if words[0] == "coordinators":
        return _coordinators(cluster, words[1:])
    if words[0] == "clearrange":
        begin, end = key_range(" ".join(words[1:]))

        def clear(document: dict) -> None:
            document["keys"] = {key: value for key, value in document["keys"].items() if not begin <= key < end}

        cluster.change(clear)
        sys.stdout.write("Committed\n")
        return 0
    if words[0] == "getrangekeys":
        begin, end = key_range(" ".join(words[1:3]))
        document = cluster.read()["document"]
        if document.get("locked"):
            raise Locked
        found = [key for key in sorted(document["keys"]) if begin <= key < end][: int(words[3])]
        sys.stdout.write(f"\nRange limited to {words[3]} keys\n" + "".join(f"`{key}'\n" for key in found) + "\n")
        return 0
    sys.stdout.write(f"ERROR: Unknown command `{words[0]}'. Try `help'?\n")
    return 1


def key_range(text: str) -> tuple[str, str]:
    """Begin and end of ``BEGIN END``, in which words may be quoted and bytes escaped."""
    words = [re.sub(r"\\x(..)", lambda m: chr(int(m.group(1), 16)), word.strip('"')) for word in text.split()]
    if len(words) != 2:
        raise SystemExit(f"ERROR: Invalid key range `{text}'")
    return words[0], words[1]


def _coordinators(cluster: Cluster, wanted: list[str]) -> int:
    found = cluster.read()
    if not wanted:
        sys.stdout.write(f"Cluster description: {cluster.name.partition(':')[0]}\n")
        sys.stdout.write(f"Cluster coordinators ({len(cluster.coordinators)}): {','.join(cluster.coordinators)}\n")
        return 0
    if wanted == ["auto"]:
        need = {"single": 1, "double": 3, "triple": 5}[found["document"]["redundancy"]]
        machines = {process["machine"]: process["address"] for process in found["processes"]}
        if len(machines) < need:
            sys.stdout.write(
                "ERROR: Too few fdbserver machines to provide coordination at the current redundancy level\n"
            )
            return 1
        wanted = sorted(machines.values())[:need]
    if sorted(wanted) == sorted(cluster.coordinators):
        sys.stdout.write("Coordination state is already as specified\n")
        return 0
    silent = [address for address in wanted if not ask(address, {"op": "ping"})]
    if silent:
        sys.stdout.write(f"ERROR: One of the specified coordinators is unreachable: {silent[0]}\n")
        return 1
    identity = "".join(random.choices(string.ascii_letters + string.digits, k=32))
    name = f"{cluster.name.partition(':')[0]}:{identity}"
    text = f"{name}@{','.join(sorted(wanted))}"
    document = found["document"]
    document["version"] += 1
    for address in wanted:
        ask(address, {"op": "become", "name": name, "document": document})
    for address in cluster.coordinators:
        ask(address, {"op": "forward", "to": text})
    cluster._follow(text)
    sys.stdout.write("Coordinators changed\n")
    return 0


# -- backup ---------------------------------------------------------------------


def fdbbackup(arguments: list[str]) -> int:
    options, rest = options_of(arguments, ("w", "z", "json", "waitfordone", "force"))
    cluster = Cluster(options.get("C") or options.get("cluster-file") or "/etc/foundationdb/fdb.cluster")
    tag = options.get("t", options.get("tag", "default"))
    url = options.get("d", options.get("destcontainer", ""))
    try:
        if rest[0] == "start":
            return _backup_start(cluster, tag, url, "w" in options or "waitfordone" in options)
        if rest[0] == "status":
            backup = cluster.read()["document"].get("backups", {}).get(tag)
            if not backup:
                sys.stdout.write("No previous backups found on tag.\n")
            elif backup["state"] == "submitted":
                sys.stdout.write(f"The backup on tag `{tag}' is in progress (just started) to {backup['url']}.\n")
            else:
                sys.stdout.write(f"The previous backup on tag `{tag}' at {backup['container']} {backup['state']}.\n")
            return 0
        if rest[0] == "abort":
            return _backup_abort(cluster, tag)
        if rest[0] == "wait":
            while cluster.read()["document"].get("backups", {}).get(tag, {}).get("state") == "submitted":
                time.sleep(0.5)
            return 0
        if rest[0] == "describe":
            directory = url.removeprefix("file://")
            restorable = os.path.exists(os.path.join(directory, "double.json"))
            if not restorable:
                sys.stdout.write(f"ERROR: Backup Container URL invalid or empty: {url}\n")
                return 1
            sys.stdout.write(f"URL: {url}\nRestorable: true\n")
            return 0
        if rest[0] == "delete":
            return subprocess.call(["rm", "-rf", url.removeprefix("file://")])
    except Unavailable:
        sys.stdout.write("ERROR: Timed out: the database is unavailable\n")
        return 1
    sys.stdout.write(f"ERROR: unknown subcommand {rest[0]}\n")
    return 1


def _backup_abort(cluster: Cluster, tag: str) -> int:
    ran: list[str] = []

    def abort(document: dict) -> None:
        backup = document.get("backups", {}).get(tag, {})
        if backup.get("state") == "submitted":
            backup["state"] = "aborted"
            ran.append(tag)

    cluster.change(abort)
    if not ran:
        sys.stderr.write(f"ERROR: A backup was not running on tag `{tag}'\n")
        return 1
    sys.stdout.write(f"The backup on tag `{tag}' was successfully aborted.\n")
    return 0


def _backup_start(cluster: Cluster, tag: str, url: str, wait: bool) -> int:
    if not url.startswith("file:///"):
        sys.stdout.write(f"ERROR: Could not open backup container: {url}\n")
        return 1
    stamp = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    refused: list[str] = []

    def submit(document: dict) -> None:
        backups = document.setdefault("backups", {})
        if backups.get(tag, {}).get("state") == "submitted":
            refused.append(tag)
            return
        container = f"{url.rstrip('/')}/backup-{stamp}.{random.randrange(10**6):06d}"
        backups[tag] = {"state": "submitted", "url": url, "container": container}

    document = cluster.change(submit)
    if refused:
        sys.stdout.write(f"ERROR: A backup is already running on tag `{tag}'\n")
        return 1
    sys.stdout.write(f"The backup on tag `{tag}' was successfully submitted.\n")
    container = document["backups"][tag]["container"]
    while wait:  # without an agent this has no end
        backup = cluster.read()["document"]["backups"][tag]
        if backup["container"] != container or backup["state"] != "submitted":
            break
        time.sleep(0.5)
    return 0


def backup_agent(arguments: list[str]) -> int:
    options, _rest = options_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        try:
            cluster = Cluster(options["cluster-file"])
            document = cluster.read()["document"]
            for tag, backup in document.get("backups", {}).items():
                if backup["state"] == "submitted":
                    directory = backup["container"].removeprefix("file://")
                    os.makedirs(directory, exist_ok=True)
                    with open(os.path.join(directory, "double.json"), "w", encoding="utf-8") as file:
                        json.dump(document["keys"], file)
                    cluster.change(lambda new, tag=tag: new["backups"][tag].update(state="completed"))
            for tag, restore in document.get("restores", {}).items():
                if restore["state"] == "queued":
                    _restore(cluster, tag, restore)
        except (Unavailable, OSError):
            pass
        time.sleep(2)


def _restore(cluster: Cluster, tag: str, restore: dict) -> None:
    """What an agent does for a restore; an error leaves it queued, and it is tried for ever."""
    begin, end = restore["range"]
    with open(os.path.join(restore["url"].removeprefix("file://"), "double.json"), encoding="utf-8") as file:
        kept = json.load(file)
    new = {restore["prefix"] + key: value for key, value in kept.items() if begin <= key < end}

    def finish(document: dict) -> None:
        if document["restores"][tag] == restore:  # it was not aborted meanwhile
            document["keys"].update(new)
            document["restores"][tag] = {**restore, "state": "completed", "bytes": len(json.dumps(new))}
            document["locked"] = False

    cluster.change(finish, lock_aware=True)


def fdbrestore(arguments: list[str]) -> int:
    options, rest = options_of(arguments, ("w", "waitfordone"))
    if not os.path.exists(options.get("dest-cluster-file", "")):
        sys.stderr.write("Restore destination cluster file must be specified explicitly.\n")
        return 1
    cluster = Cluster(options["dest-cluster-file"])
    tag = options.get("t", "default")
    if rest[0] == "start":
        return _restore_start(cluster, tag, options)
    if rest[0] == "abort":
        state = "unitialized"  # as upstream spells it

        def abort(document: dict) -> None:
            nonlocal state
            restore = document.get("restores", {}).get(tag)
            if restore and restore["state"] == "queued":
                restore["state"] = "aborted"
                document["locked"] = False
            state = restore["state"] if restore else state

        cluster.change(abort)
        sys.stdout.write(f"RESTORE_ABORT Tag: {tag}  State: {state}\n")
        return 0
    if rest[0] == "status":
        restore = cluster.read()["document"].get("restores", {}).get(tag)
        if restore:
            sys.stdout.write(
                f"Tag: {tag}  UID: 0  State: {restore['state']}  Blocks: 1/1  BlocksInProgress: 0  Files: 1  "
                f"BytesWritten: {restore['bytes']}  ApplyVersionLag: 0  LastError: None\n"
            )
        return 0
    sys.stdout.write(f"ERROR: unknown subcommand {rest[0]}\n")
    return 1


def _restore_start(cluster: Cluster, tag: str, options: dict[str, str]) -> int:
    prefix, url = options.get("add-prefix", ""), options.get("r", "")
    begin, end = key_range(options.get("k", r'"" \xff'))
    if not os.path.exists(os.path.join(url.removeprefix("file://"), "double.json")):
        sys.stderr.write("The specified backup is not restorable to any version.\n")
        return 1
    restore = {"state": "queued", "url": url, "prefix": prefix, "range": [begin, end], "bytes": 0}
    restore["id"] = random.randrange(1 << 62)
    refused = ""

    def submit(document: dict) -> None:
        nonlocal refused
        refused = ""
        if document.setdefault("restores", {}).get(tag, {}).get("state") == "queued":
            refused = "Duplicate restore tag"
        elif any(prefix + begin <= key < prefix + end for key in document["keys"]):
            refused = "Attempted to restore into a non-empty destination database"
        elif document.get("locked"):
            refused = "Database is locked"
        else:
            document["restores"][tag] = restore
            document["locked"] = True

    cluster.change(submit)
    if refused:
        sys.stderr.write(f"ERROR: {refused}\nFatal Error: {refused}\n")
        return 1
    while "w" in options or "waitfordone" in options:  # without an agent this has no end
        now = cluster.read()["document"]["restores"][tag]
        if now["id"] != restore["id"] or now["state"] != "queued":
            break
        time.sleep(0.5)
    sys.stdout.write("Restored to version 1\n")
    return 0


PROGRAMS = {
    "fdbserver": fdbserver,
    "fdbmonitor": fdbmonitor,
    "fdbcli": fdbcli,
    "fdbbackup": fdbbackup,
    "fdbrestore": fdbrestore,
    "backup_agent": backup_agent,
}


def main() -> int:
    name = os.path.basename(sys.argv[0])
    if sys.argv[1:] in (["--version"], ["-v"]):
        sys.stdout.write("FoundationDB CLI 7.3 (v7.3.63) DOUBLE\nsource version double\nprotocol fdb00b073000000\n")
        return 0
    return PROGRAMS[name](sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
