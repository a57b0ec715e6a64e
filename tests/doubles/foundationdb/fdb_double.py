#!/usr/bin/env python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of FoundationDB 7.3. Not the real programs, and no database: one small JSON document on the coordinators.

One file under the names fdbmonitor, fdbserver, fdbcli, fdbbackup, fdbrestore and backup_agent. Imitated with their traps:

- A cluster file names coordinators; a majority of them must answer, else clients wait (for ever, without --timeout).
- Errors are told on stderr, and with exit code 1 except for a coordinator that is named twice or is no address.
- ``configure new`` works once. ``status`` has exit code 0 also when the database is unavailable, and tells no configuration then.
- A change of coordinators gives the cluster file a new id. Servers and backup agents that run rewrite their own cluster
  file (file and directory must be writable); other copies stay as they are, and work only as long as the old
  coordinators forward them.
- With ``new`` a redundancy mode is accepted also when there are too few machines; the database is then unavailable. Later it is
  an error, as is another storage engine without a ``storage_migration_type``.
- A backup needs an agent, and lands on the disk of whichever agent took it. Without one it goes on for ever, unless it is
  aborted, which ``start -w`` takes for success; to abort one that does not run is an error.
- fdbbackup and fdbrestore wait for ever for a database that is unavailable.
- Keys are cleared only in write mode, and a restore wants a range without any.
- A restore needs an agent of the database that it goes into, and locks that whole database until it is complete or
  aborted, whatever prefix its keys get: other clients then read and write nothing.

Options, status and texts are those that tests/contract/foundationdb.json records of the sources; more than these are refused.
State: the data directory of each fdbserver. 3FS's double keeps its own state under "keys" of the same document.
"""

from __future__ import annotations

import configparser
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import string
import subprocess
import sys
import threading
import time

COPIES = {"single": 1, "double": 2, "triple": 3}
# storage engine as configure takes it -> as status tells it
ENGINES = {"ssd": "ssd-2", "ssd-redwood-1": "ssd-redwood-1", "memory": "memory"}
MIGRATIONS = ("disabled", "aggressive", "gradual")
ALIVE_SECONDS = 40
REGISTER_SECONDS = 8
ERRORS = {
    1038: "Database is locked",
    1515: "No cluster file found in current directory or default location",
    2104: "Connection string invalid",
    2300: "Backup error",
    2301: "Restore error",
    2312: "Backup unneeded request",
    2314: "Backup Container URL invalid",
    2319: "Backup does not exist",
    2364: "Restore duplicate request",
    2370: "Attempted to restore into a non-empty destination database",
}
_CLUSTER = {"-C": "cluster", "--cluster-file": "cluster"}
_TAG = {"-t": "tag", "--tagname": "tag"}
_CONTAINER = {"-d": "container", "--destcontainer": "container"}
_WAIT = {"-w": "wait", "--waitfordone": "wait"}
# program, and command of those that have some -> options with a value, by what they are
VALUES: dict[str, dict[str, str]] = {
    "fdbserver": {
        **_CLUSTER,
        "--public-address": "address",
        "--listen-address": "listen",
        "--datadir": "data",
        "--logdir": "logs",
        "--memory": "memory",
        "--locality-": "locality",
    },
    "fdbmonitor": {"--conffile": "conf", "--lockfile": "lock"},
    "fdbcli": {**_CLUSTER, "--timeout": "timeout", "--exec": "exec"},
    "backup_agent": {**_CLUSTER, "--logdir": "logs"},
    "fdbbackup start": {**_CLUSTER, **_TAG, **_CONTAINER},
    "fdbbackup status": {**_CLUSTER, **_TAG},
    "fdbbackup abort": {**_CLUSTER, **_TAG},
    "fdbbackup wait": {**_CLUSTER, **_TAG},
    "fdbbackup describe": {**_CLUSTER, **_CONTAINER},
    "fdbbackup delete": _CONTAINER,
    "fdbrestore start": {
        "--dest-cluster-file": "cluster",
        **_TAG,
        "-r": "container",
        "--add-prefix": "prefix",
        "-k": "keys",
        "--keys": "keys",
    },
    "fdbrestore status": {"--dest-cluster-file": "cluster", **_TAG},
    "fdbrestore abort": {"--dest-cluster-file": "cluster", **_TAG},
}
# the same for options without a value
FLAGS: dict[str, dict[str, str]] = {
    "fdbmonitor": {"--daemonize": "daemonize"},
    "fdbcli": {"--no-status": "quiet"},
    "fdbbackup start": _WAIT,
    "fdbrestore start": _WAIT,
}
# what fdbmonitor keeps for itself, of foundationdb.conf
OWN = ("command", "restart-delay", "initial-restart-delay", "restart-backoff", "restart-delay-reset-interval")


def out(text: str) -> int:
    """A line on stdout; exit code 0."""
    sys.stdout.write(text + "\n")
    return 0


def warn(text: str) -> int:
    """A line on stderr, whatever the exit code says; 0."""
    sys.stderr.write(text + "\n")
    return 0


def fail(text: str) -> int:
    """A line on stderr; exit code 1."""
    return warn(text) + 1


def fatal(code: int, said: bool = False) -> int:
    """How fdbbackup and fdbrestore end with an error; what it is about they may have said by themselves."""
    text = ERRORS[code]
    sys.stderr.write(f"{'' if said else f'ERROR: {text}' + chr(10)}Fatal Error: {text}\n")
    return 1


class Unavailable(Exception):
    """No majority of coordinators answered."""


class Locked(Exception):
    """A restore has the database for itself."""


def parse_cluster(text: str) -> tuple[str, list[str]]:
    """(description:id, coordinators) of a cluster file's text."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    match = re.fullmatch(r"([A-Za-z0-9_]+:[A-Za-z0-9]+)@([0-9.:,]+)", lines[0] if lines else "")
    if not match:
        raise ValueError(text)
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
        try:
            with open(self.path, encoding="utf-8") as file:
                self.name, self.coordinators = parse_cluster(file.read())
        except OSError:
            raise SystemExit(fail(f"Unable to read cluster file `{self.path}': 1515 {ERRORS[1515]}")) from None
        except ValueError:
            raise SystemExit(fail(f"Invalid cluster file `{self.path}': 2104 {ERRORS[2104]}")) from None

    def _follow(self, text: str) -> None:
        """Old coordinators say where the database is now; the file is rewritten if it can be."""
        self.name, self.coordinators = parse_cluster(text)
        try:
            temporary = self.path + ".new"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            shutil.copymode(self.path, temporary)
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


class Patient(Cluster):
    """One that waits for the database for ever."""

    def read(self) -> dict:
        while True:
            try:
                return super().read()
            except Unavailable:
                time.sleep(0.5)


# -- fdbserver ------------------------------------------------------------------


class Server(socketserver.ThreadingTCPServer):
    """Holds one copy of the document when it is asked to; knows which processes live."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64  # on a busy emulated CPU more than the usual five wait

    def __init__(self, options: dict[str, str]) -> None:
        self.cluster_file = options["cluster"]
        self.directory = options["data"]
        self.machine = options.get("locality-machineid", socket.gethostname())
        address = options["address"]
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
            return {"document": {"version": 0, "migration": "disabled", "redundancy": "", "engine": "", "keys": {}}}

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


def options_of(program: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """``--name=value`` and ``--name value`` (underscores and dashes alike) by what they are, and the rest."""
    options: dict[str, str] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        key = VALUES[program].get(name)
        if name.startswith("--locality-") and "--locality-" in VALUES[program]:
            key = name.lstrip("-")
        if name in FLAGS.get(program, {}):
            options[FLAGS[program][name]] = ""
        elif key is None:
            raise SystemExit(fail(f"ERROR: unknown option `{name}'"))
        elif not equals and not words:
            raise SystemExit(fail(f"ERROR: missing argument for option `{name}'"))
        else:
            options[key] = value if equals else words.pop(0)
    return options, rest


def fdbserver(arguments: list[str]) -> int:
    options, _rest = options_of("fdbserver", arguments)
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
        time.sleep(REGISTER_SECONDS)


def fdbmonitor(arguments: list[str]) -> int:
    """Start what foundationdb.conf lists, again when it ends, and follow changes of the file."""
    options, _rest = options_of("fdbmonitor", arguments)
    running: dict[str, tuple[list[str], subprocess.Popen]] = {}
    stop: list[int] = []
    wanted: dict[str, list[str]] = {}
    written = None
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    while not stop:
        if os.stat(options["conf"]).st_mtime_ns != written:
            written = os.stat(options["conf"]).st_mtime_ns
            wanted = _conf(options["conf"])
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
        values = {**general, **(parser[kind] if parser.has_section(kind) else {}), **parser[section]}
        values = {k.replace("_", "-"): v.replace("$ID", number) for k, v in values.items()}
        given = (f"--{name}={value}" for name, value in sorted(values.items()) if name not in OWN)
        found[section] = [values["command"], *given]
    return found


# -- fdbcli ---------------------------------------------------------------------


def fdbcli(arguments: list[str]) -> int:
    options, _rest = options_of("fdbcli", arguments)
    path = options.get("cluster") or "/etc/foundationdb/fdb.cluster"
    limit = float(options.get("timeout", 0))
    end = time.time() + limit if limit else None
    writable = False
    commands = [part.split() for part in options["exec"].split(";") if part.strip()]
    cluster = Cluster(path)
    for number, words in enumerate(commands):
        if len(commands) > 1:
            out(">>>" + "".join(f" {word}" for word in words))
        if words[0] == "writemode":  # of this call only
            writable = words[1] == "on"
            continue
        if words[0] == "clearrange" and not writable:
            code = fail("ERROR: writemode must be enabled to set or clear keys in the database.")
        else:
            code = _command(cluster, words, end)
        if code:
            if number < len(commands) - 1:
                out("WARNING: the previous command failed, the remaining commands will not be executed.")
            return code
    return 0


def _command(cluster: Cluster, words: list[str], end: float | None) -> int:
    if words[0] == "status":
        return _status(cluster, words[1] if len(words) > 1 else "")
    while True:
        try:
            return _change(cluster, words)
        except Locked:
            sys.stderr.write(f"ERROR: {ERRORS[1038]} (1038)\n")
            return 1
        except Unavailable:
            if end is not None and time.time() > end:
                return fail("Specified timeout reached -- exiting...")
            time.sleep(0.5)


def _available(found: dict | None) -> bool:
    """Whether the machines that live suffice for the database that was created."""
    copies = COPIES.get(found["document"]["redundancy"]) if found else None
    return copies is not None and len({process["machine"] for process in found["processes"]}) >= copies


def _status(cluster: Cluster, kind: str) -> int:
    up = [address for address in cluster.coordinators if ask(address, {"op": "ping", "as": cluster.name})]
    try:
        found = cluster.read()
    except Unavailable:
        found = None
    if kind == "json":
        return out(json.dumps(report(cluster, up, found), indent=4))
    if _available(found):
        return out("The database is available.")
    sys.stdout.write("The database is unavailable; type `status' for more information.\n")
    return 0


def report(cluster: Cluster, up: list[str], found: dict | None) -> dict:
    """What ``status json`` tells: a configuration only of a database that is available."""
    available = _available(found)
    coordinators = [{"address": address, "reachable": address in up} for address in cluster.coordinators]
    told: dict = {
        "client": {
            "cluster_file": {"path": cluster.path, "up_to_date": True},
            "coordinators": {"coordinators": coordinators, "quorum_reachable": len(up) * 2 > len(coordinators)},
            "database_status": {"available": available, "healthy": available},
        }
    }
    if found is not None:
        document = found["document"]
        recovery = "recruiting_transaction_servers" if document["redundancy"] else "configuration_never_created"
        told["cluster"] = {
            "connection_string": f"{cluster.name}@{','.join(cluster.coordinators)}",
            "recovery_state": {"name": "fully_recovered" if available else recovery},
            "machines": {p["machine"]: {"address": p["address"].rpartition(":")[0]} for p in found["processes"]},
            "processes": {
                p["address"]: {"address": p["address"], "machine_id": p["machine"]} for p in found["processes"]
            },
            "messages": [],
        }
    if available:
        told["cluster"] |= {
            "database_available": True,
            "configuration": {
                "redundancy_mode": document["redundancy"],
                "storage_engine": ENGINES[document["engine"]],
                "storage_migration_type": document["migration"],
            },
            "data": {"state": {"healthy": True, "name": "healthy"}},
        }
    return told


def _configure(cluster: Cluster, words: list[str]) -> int:
    new = words[:1] == ["new"]
    mode = next((word for word in words if word in COPIES), "")
    engine = next((word for word in words if word in ENGINES), "")
    migration = next((word for word in MIGRATIONS if f"storage_migration_type={word}" in words), "")
    if len(words) != sum(map(bool, (new, mode, engine, migration))) or (new and not (mode and engine)):
        return 1  # and the usage
    found = cluster.read()
    document = found["document"]
    if new and document["redundancy"]:
        return fail("ERROR: Database already exists! To change configuration, don't say `new'")
    if not new:
        if not _available(found):
            fail("ERROR: The database is unavailable")
            return fail("Type `configure FORCE <TOKEN...>' to configure without this check")
        if len({process["machine"] for process in found["processes"]}) < COPIES[mode or document["redundancy"]]:
            fail("ERROR: Not enough processes exist to support the specified configuration")
            return fail("Type `configure FORCE <TOKEN...>' to configure without this check")
        if engine not in ("", document["engine"]) and (migration or document["migration"]) == "disabled":
            return fail("ERROR: Storage engine type cannot be changed because storage_migration_type=disabled.")

    def configure(document: dict) -> None:
        document["redundancy"] = mode or document["redundancy"]
        document["engine"] = engine or document["engine"]
        document["migration"] = migration or document["migration"]

    cluster.change(configure)
    return out("Database created") if new else out("Configuration changed")


def _change(cluster: Cluster, words: list[str]) -> int:
    if words[0] == "configure":
        return _configure(cluster, words[1:])
    if words[0] == "coordinators":
        return _coordinators(cluster, words[1:])
    if words[0] == "clearrange":
        begin, end = key_range(" ".join(words[1:]))

        def clear(document: dict) -> None:
            document["keys"] = {key: value for key, value in document["keys"].items() if not begin <= key < end}

        return out(f"Committed ({cluster.change(clear)['version']})")
    if words[0] == "getrangekeys":
        begin, end = key_range(" ".join(words[1:3]))
        document = cluster.read()["document"]
        if document.get("locked"):
            raise Locked
        limit = int(words[3]) if len(words) > 3 else 25
        out(f"\nRange limited to {limit} keys")
        for key in [key for key in sorted(document["keys"]) if begin <= key < end][:limit]:
            out(f"`{key}'")
        return out("")
    return fail(f"ERROR: Unknown command `{words[0]}'. Try `help'?")


def key_range(text: str) -> tuple[str, str]:
    """Begin and end of ``BEGIN END``, in which words may be quoted and bytes escaped."""
    words = [re.sub(r"\\x(..)", lambda m: chr(int(m.group(1), 16)), word.strip('"')) for word in text.split()]
    if len(words) != 2:
        raise SystemExit(1)  # and the usage
    return words[0], words[1]


def _coordinators(cluster: Cluster, wanted: list[str]) -> int:
    found = cluster.read()
    if not wanted:
        out(f"Cluster description: {cluster.name.partition(':')[0]}")
        out(f"Cluster coordinators ({len(cluster.coordinators)}): {','.join(cluster.coordinators)}")
        return out("Type `help coordinators' to learn how to change this information.")
    if wanted == ["auto"]:
        need = {"single": 1, "double": 3, "triple": 5}[found["document"]["redundancy"]]
        machines = {process["machine"]: process["address"] for process in found["processes"]}
        if len(machines) < need:
            return fail("ERROR: Too few fdbserver machines to provide coordination at the current redundancy level")
        wanted = sorted(machines.values())[:need]
    for address in wanted:
        if wanted.count(address) > 1:
            return warn(f"ERROR: passed redundant coordinators: `{address}'")
        if not re.fullmatch(r"[\d.]+:\d+", address):
            return warn(f"ERROR: '{address}' is not a valid network endpoint address")
    if sorted(wanted) == sorted(cluster.coordinators):
        return out("No change (existing configuration satisfies request)")
    if [address for address in wanted if not ask(address, {"op": "ping"})]:
        return fail("ERROR: One of the specified coordinators is unreachable")
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
    return out("Coordination state changed")


# -- backup ---------------------------------------------------------------------


def fdbbackup(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if f"fdbbackup {verb}" not in VALUES:
        return fail(f"ERROR: Unsupported backup action {verb}")
    options, _rest = options_of(f"fdbbackup {verb}", arguments[1:])
    tag, url = options.get("tag", "default"), options.get("container", "")
    if verb in ("describe", "delete"):
        return _container(verb, url)
    cluster = Patient(options.get("cluster") or "/etc/foundationdb/fdb.cluster")
    if verb == "start":
        return _backup_start(cluster, tag, url, "wait" in options)
    if verb == "abort":
        return _backup_abort(cluster, tag)
    backup = cluster.read()["document"].get("backups", {}).get(tag)
    if verb == "wait":
        while backup and backup["state"] == "submitted":
            time.sleep(0.5)
            backup = cluster.read()["document"]["backups"][tag]
        return out(f"The backup on tag `{tag}' {STATES[backup['state']] if backup else 'has never been started'}.")
    if not backup:
        return out("No previous backups found.\n")
    container = backup["container"]
    if backup["state"] == "submitted":
        out(f"The backup on tag `{tag}' is in progress (just started) to {container}.")
    elif backup["state"] == "completed":
        out(f"The previous backup on tag `{tag}' at {container} completed at version {backup['version']}.")
    else:
        out(f"The previous backup on tag `{tag}' at {container} {STATES[backup['state']]}.")
    return out(f"BackupURL: {container}\n")


# state of a backup -> how fdbbackup tells it
STATES = {"completed": "has been completed", "aborted": "has been aborted"}


def _container(verb: str, url: str) -> int:
    directory = url.removeprefix("file://")
    if verb == "delete":
        out(f"Deleting {url}...")
    if not os.path.isdir(directory):
        return fatal(2319)
    if verb == "delete":
        subprocess.call(["rm", "-rf", directory])
        return out("The entire container has been deleted.")
    out(f"URL: {url}")
    return out(f"Restorable: {'true' if os.path.exists(os.path.join(directory, 'double.json')) else 'false'}")


def _backup_abort(cluster: Cluster, tag: str) -> int:
    ran: list[str] = []

    def abort(document: dict) -> None:
        backup = document.get("backups", {}).get(tag, {})
        if backup.get("state") == "submitted":
            backup["state"] = "aborted"
            ran.append(tag)

    cluster.change(abort)
    if not ran:
        fail(f"ERROR: A backup was not running on tag `{tag}'")
        return fatal(2312, said=True)
    return out(f"The backup on tag `{tag}' was successfully aborted.")


def _backup_start(cluster: Cluster, tag: str, url: str, wait: bool) -> int:
    if not url:
        return fail("ERROR: No backup destination was specified.")
    if not url.startswith("file:///"):
        return fail(f"ERROR: '{ERRORS[2314]}' on URL '{url}'")
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
        fail(f"ERROR: A backup is already running on tag `{tag}'")
        return fatal(2300, said=True)
    container = document["backups"][tag]["container"]
    if not wait:
        return out(f"The backup on tag `{tag}' was successfully submitted.")
    out(f"Submitted and now waiting for the backup on tag `{tag}' to complete.")
    sys.stdout.flush()
    while True:  # without an agent this has no end; that it was aborted is no error
        backup = cluster.read()["document"]["backups"][tag]
        if backup["container"] != container or backup["state"] != "submitted":
            return 0
        time.sleep(0.5)


def backup_agent(arguments: list[str]) -> int:
    options, _rest = options_of("backup_agent", arguments)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    cluster = Cluster(options["cluster"])
    while True:
        try:
            cluster.reload()
            document = cluster.read()["document"]
            for tag, backup in document.get("backups", {}).items():
                if backup["state"] == "submitted":
                    directory = backup["container"].removeprefix("file://")
                    os.makedirs(directory, exist_ok=True)
                    with open(os.path.join(directory, "double.json"), "w", encoding="utf-8") as file:
                        json.dump(document["keys"], file)
                    cluster.change(lambda new, tag=tag: _completed(new, tag))
            for tag, restore in document.get("restores", {}).items():
                if restore["state"] == "queued":
                    _restore(cluster, tag, restore)
        except (Unavailable, OSError):
            pass
        time.sleep(2)


def _completed(document: dict, tag: str) -> None:
    if document["backups"][tag]["state"] == "submitted":  # it was not aborted meanwhile
        document["backups"][tag].update(state="completed", version=document["version"])


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
    verb = arguments[0] if arguments else ""
    if f"fdbrestore {verb}" not in VALUES:
        return 1
    options, _rest = options_of(f"fdbrestore {verb}", arguments[1:])
    if not options.get("cluster"):
        return fail("Restore destination cluster file must be specified explicitly.")
    if not os.path.exists(options["cluster"]):
        return fail(f"Restore destination cluster file '{options['cluster']}' does not exist.")
    cluster = Patient(options["cluster"])
    tag = options.get("tag", "default")
    if verb == "start":
        return _restore_start(cluster, tag, options)
    if verb == "abort":
        state = "unitialized"  # as upstream spells it

        def abort(document: dict) -> None:
            nonlocal state
            restore = document.get("restores", {}).get(tag)
            if restore and restore["state"] == "queued":
                restore["state"] = "aborted"
                document["locked"] = False
            state = restore["state"] if restore else state

        cluster.change(abort)
        return out(f"RESTORE_ABORT Tag: {tag}  State: {state}")
    restore = cluster.read()["document"].get("restores", {}).get(tag)
    if not restore:
        return out("")
    return out(
        f"Tag: {tag}  UID: {restore['id']:032x}  State: {restore['state']}  Blocks: {1}/{1}  BlocksInProgress: {0}  "
        f"Files: {1}  BytesWritten: {restore['bytes']}  CurrentVersion: {1} FirstConsistentVersion: {1}  "
        f"ApplyVersionLag: {0}  LastError: {'None'}"
    )


def _restore_start(cluster: Cluster, tag: str, options: dict[str, str]) -> int:
    prefix, url = options.get("prefix", ""), options.get("container", "")
    begin, end = key_range(options.get("keys", r'"" \xff'))
    if not os.path.isdir(url.removeprefix("file://")):
        return fatal(2319)
    if not os.path.exists(os.path.join(url.removeprefix("file://"), "double.json")):
        fail("The specified backup is not restorable to any version.")
        return fatal(2301)
    restore = {"state": "queued", "url": url, "prefix": prefix, "range": [begin, end], "bytes": 0}
    restore["id"] = random.randrange(1 << 62)
    refused = 0

    def submit(document: dict) -> None:
        nonlocal refused
        refused = 0
        if document.setdefault("restores", {}).get(tag, {}).get("state") == "queued":
            refused = 2364
        elif any(prefix + begin <= key < prefix + end for key in document["keys"]):
            refused = 2370
        elif document.get("locked"):
            refused = 1038
        else:
            document["restores"][tag] = restore
            document["locked"] = True

    cluster.change(submit)
    if refused:
        return fatal(refused)
    while "wait" in options:  # without an agent this has no end
        now = cluster.read()["document"]["restores"][tag]
        if now["id"] != restore["id"] or now["state"] == "aborted":
            return fatal(2301)
        if now["state"] == "completed":
            return out(f"Restored to version {1}")
        time.sleep(0.5)
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
