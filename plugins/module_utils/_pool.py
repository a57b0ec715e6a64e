# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools: a pool is an engine with tiers, declared in one file and run by systemd.

``POOLS/<pool>.json`` is the declaration that units, probe and information read.
A unit is stopped before its part of that file changes and started after, so that an
interrupted run is finished by the next one.
"""

from __future__ import annotations

import json
import os
import re
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake import ENGINE, POOLS, tier_node
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import observe_numa
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

MEDIA = {"mooncake": ("dram", "cxl"), "filesystem": ("ssd",)}
NOT_YET = {"threefs": "3FS is not an engine of this version"}
UNITS = "/etc/systemd/system"
_NAME = re.compile(r"^[a-z0-9][a-z0-9_]{0,30}$")
_PROGRAM = f"{ENGINE}/bin/python3 -m {_boot.PACKAGE}._mooncake"
_SERVICE = f"""\
Environment=PYTHONPATH={_boot.LIBRARY} PYTHONDONTWRITEBYTECODE=1
DynamicUser=yes
Restart=always
RestartSec=3
NoNewPrivileges=yes
ProtectHome=yes
PrivateTmp=yes
"""
TEMPLATES = {
    f"{UNITS}/agentfleet-mooncake-master@.service": f"""\
# Written by agentfleet.metal.
[Unit]
Description=Mooncake master of KV-cache pool %i
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={_PROGRAM} master %i
{_SERVICE}
[Install]
WantedBy=multi-user.target
""",
    f"{UNITS}/agentfleet-mooncake-store@.service": f"""\
# Written by agentfleet.metal.
[Unit]
Description=Mooncake store of KV-cache tier %i
After=network-online.target agentfleet-restore.service
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={_PROGRAM} store %i
RuntimeDirectory=agentfleet-mooncake/%i
LimitMEMLOCK=infinity
TimeoutStartSec=600
TimeoutStopSec=60
{_SERVICE}
[Install]
WantedBy=multi-user.target
""",
}


def master_unit(pool: str) -> str:
    """The unit of a pool's master."""
    return f"agentfleet-mooncake-master@{pool}.service"


def store_unit(pool: str, tier: str) -> str:
    """The unit of a tier's store."""
    return f"agentfleet-mooncake-store@{pool}-{tier}.service"


def declared(host: Host) -> dict[str, dict[str, t.Any]]:
    """The pools declared on this host, by name."""
    found = {}
    for path in host.glob(f"{POOLS}/*.json"):
        pool = json.loads(host.read(path))
        found[pool["name"]] = pool
    return found


def parts(pool: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
    """Unit -> what it depends on in the declaration; a change of that restarts the unit."""
    if pool is None or pool["engine"] != "mooncake":
        return {}
    shared = {key: pool[key] for key in ("address", "protocol", "rdma_devices")}
    where = {key: pool["master"][key] for key in ("address", "port")}
    found: dict[str, t.Any] = {master_unit(pool["name"]): pool["master"]} if pool["master"]["run"] else {}
    found.update({store_unit(pool["name"], tier["name"]): [shared, where, tier] for tier in pool["tiers"]})
    return found


def listening(host: Host) -> set[int]:
    """TCP ports on which something listens."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in host.read(f"/proc/net/{name}").splitlines()[1:]]
    return {int(words[1].rpartition(":")[2], 16) for words in lines if words[3] == "0A"}


class Pools:
    """The KV-cache pools of one host as a resource."""

    predicting = False  # a dry run, in which earlier tasks only announced the engine and the memory

    def __init__(self, host: Host, pools: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        self.host = host
        self.lose_data = {str(pool["name"]): bool(pool.get("lose_data")) for pool in pools}
        self.wanted: dict[str, dict[str, t.Any] | None] = {}
        for index, pool in enumerate(pools):
            option = f"pools[{index}]"
            name = _name(f"{option}.name", pool["name"], self.wanted)
            absent = pool.get("state", "present") == "absent"
            self.wanted[name] = None if absent else _pool(option, name, pool)
        ports: dict[int, str] = {}
        for index, (name, made) in enumerate(self.wanted.items()):
            if made is None or made["engine"] != "mooncake" or not made["master"]["run"]:
                continue
            for key in ("port", "metrics_port"):
                port = made["master"][key]
                if port in ports:
                    raise Refused(
                        f"pools[{index}].master.{key}", port, f"{ports[port]} has the same", "Give each its own port"
                    )
                ports[port] = f"{key} of pool {name}"
        self.options = {name: f"pools[{index}]" for index, name in enumerate(self.wanted)}

    # -- observe --------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Declarations, units, memory and, for pools that would lose it, the amount of data."""
        now = declared(self.host)
        units = {
            *(unit for pool in now.values() for unit in parts(pool)),
            *(unit for pool in self.wanted.values() for unit in parts(pool)),
        }
        observed: dict[str, t.Any] = {
            "declared": now,
            "units": self._units(sorted(units)),
            "files": {path: self.host.read(path) for path in self._program()},
            "engine": self.host.link_name(ENGINE),
            "listening": listening(self.host),
            "free": {node["id"]: node["free_bytes"] for node in observe_numa(self.host)["nodes"] if node["size_bytes"]},
            "nodes": {},
            "paths": {},
            "data": {},
        }
        for name, pool in self.wanted.items():
            for tier in pool["tiers"] if pool else ():
                if tier["medium"] == "ssd":
                    observed["paths"][tier["path"]] = self._space(tier["path"])
                    continue
                try:
                    observed["nodes"][name, tier["name"]] = tier_node(self.host, tier)
                except HostError as error:
                    observed["nodes"][name, tier["name"]] = str(error)
            observed["data"][name] = self._data(now.get(name), self._stops(name, observed))
        return observed

    def _units(self, units: t.Sequence[str]) -> dict[str, dict[str, str]]:
        if not units:
            return {}
        show = self.host.run(["systemctl", "show", "--property=Id,ActiveState,UnitFileState", *units]).stdout
        blocks = [
            dict(line.split("=", 1) for line in block.splitlines()) for block in show.split("\n\n") if block.strip()
        ]
        return {block["Id"]: block for block in blocks}

    def _space(self, path: str) -> dict[str, t.Any]:
        """What a directory tier can have: its own size so far plus what its file system has free."""
        place = path
        while not self.host.exists(place):
            place = os.path.dirname(place)
        real = self.host.path(place)
        directory = os.path.isdir(real)
        space = os.statvfs(real)
        return {
            "exists": place == path,
            "directory": directory,
            "free": space.f_bavail * space.f_frsize,
            "used": sum(os.path.getsize(os.path.join(top, name)) for top, _d, names in os.walk(real) for name in names)
            if place == path and directory
            else 0,
        }

    def _data(self, pool: t.Mapping[str, t.Any] | None, stops: t.Sequence[str]) -> str:
        """What would be lost with a pool; empty when it holds nothing or nothing of it stops."""
        if pool is None:
            return ""
        if pool["engine"] == "filesystem":
            found = [tier["path"] for tier in pool["tiers"] if self.host.names(tier["path"])]
            return f"files below {', '.join(found)}" if found else ""
        if not stops or not pool["master"]["run"]:
            return "what its stores hold (the master runs elsewhere)" if stops else ""
        done = self.host.run(agent("keys", pool["name"]), check=False)
        if done.rc != 0:
            return ""  # the master does not answer: nothing can be read from this pool any more
        count = int(done.stdout)
        return f"{count} objects" if count else ""

    # -- plan -----------------------------------------------------------------

    @staticmethod
    def _program() -> dict[str, str]:
        return {
            **TEMPLATES,
            **{f"{_boot.LIBRARY}/{path}": text for path, text in _boot.sources().items()},
        }

    def _running(self, unit: str, observed: t.Mapping[str, t.Any]) -> bool:
        return observed["units"].get(unit, {}).get("ActiveState") in ("active", "activating", "reloading")

    def _stops(self, name: str, observed: t.Mapping[str, t.Any]) -> list[str]:
        old, new = parts(observed["declared"].get(name)), parts(self.wanted[name])
        # Stores first: they take leave of a master that still answers.
        return [unit for unit in reversed(list(old)) if new.get(unit) != old[unit] and self._running(unit, observed)]

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Stop what changes, write declarations, start what should run."""
        self._check(observed)
        steps: list[Step] = []
        mooncake = any(pool and pool["engine"] == "mooncake" for pool in self.wanted.values())
        stale = [path for path, text in self._program().items() if observed["files"][path] != text.strip()]
        if mooncake and stale:
            steps.append(Step("install", "program and units of Mooncake pools", after=stale, data=stale))
        for name, pool in self.wanted.items():
            old = observed["declared"].get(name)
            stops = self._stops(name, observed)
            data = observed["data"][name]
            if data and (stops or pool is None) and not self.lose_data[name]:
                raise Refused(
                    self.options[name],
                    name,
                    f"the pool holds {data}, which are lost by {'removing it' if pool is None else 'this change'}",
                    "Set lose_data: true, or let the data expire first",
                )
            gone = [unit for unit in parts(old) if unit not in parts(pool)]
            lost = f"loses {data}" if data else "its declaration changes"
            steps += [Step("stop", unit, before="active", why=lost, disruptive=True) for unit in stops]
            steps += [
                Step("disable", unit, before="enabled")
                for unit in gone
                if observed["units"].get(unit, {}).get("UnitFileState") == "enabled"
            ]
            for tier in pool["tiers"] if pool else ():
                if tier["medium"] == "ssd" and not observed["paths"][tier["path"]]["exists"]:
                    steps.append(Step("create", tier["path"], after="directory"))
            if old != pool:
                path = f"{POOLS}/{name}.json"
                steps.append(Step("declare" if pool else "forget", path, before=old, after=pool, data=pool))
            for unit in parts(pool):
                enabled = observed["units"].get(unit, {}).get("UnitFileState") == "enabled"
                if unit in stops or not enabled or not self._running(unit, observed):
                    steps.append(Step("start", unit, after="active, enabled"))
        return steps

    def _check(self, observed: dict[str, t.Any]) -> None:
        need: dict[int, int] = {}
        for name, pool in self.wanted.items():
            if pool is None:
                continue
            option = self.options[name]
            running = [
                unit
                for unit, part in parts(pool).items()
                if self._running(unit, observed) and parts(observed["declared"].get(name)).get(unit) == part
            ]
            if pool["engine"] == "mooncake":
                if not observed["engine"] and not self.predicting:
                    raise Refused(
                        f"{option}.engine", "mooncake", f"{ENGINE} is missing", "Install it first: role mooncake"
                    )
                if pool["master"]["run"] and not self._running(master_unit(name), observed):
                    for key in ("port", "metrics_port"):
                        if pool["master"][key] in observed["listening"]:
                            port = pool["master"][key]
                            raise Refused(
                                f"{option}.master.{key}", port, "another program listens on it", "Choose a free port"
                            )
            for index, tier in enumerate(pool["tiers"]):
                where = f"{option}.tiers[{index}]"
                if tier["medium"] == "ssd":
                    self._check_path(where, tier, observed["paths"][tier["path"]])
                    continue
                node = observed["nodes"][name, tier["name"]]
                if isinstance(node, str):
                    if not self.predicting:
                        raise Refused(f"{where}.memdevs", tier["memdevs"], node, "Correct the serials or run it later")
                    continue
                if node is not None and node not in observed["free"]:
                    known = ", ".join(str(number) for number in sorted(observed["free"]))
                    raise Refused(
                        f"{where}.numa_node", node, "no such NUMA node with memory", f"Nodes with memory: {known}"
                    )
                if store_unit(name, tier["name"]) in running:
                    continue
                free = sum(observed["free"].values()) if node is None else observed["free"][node]
                need[-1 if node is None else node] = need.get(-1 if node is None else node, 0) + tier["size_bytes"]
                if need[-1 if node is None else node] > free:
                    place = "this host" if node is None else f"NUMA node {node}"
                    raise Refused(
                        f"{where}.size",
                        format_size(tier["size_bytes"]),
                        f"{place} has {free} bytes free for {need[-1 if node is None else node]} bytes of new tiers",
                        "Make the tier smaller or free memory there",
                    )

    @staticmethod
    def _check_path(where: str, tier: t.Mapping[str, t.Any], space: t.Mapping[str, t.Any]) -> None:
        if not space["directory"]:
            raise Refused(f"{where}.path", tier["path"], "a file is in its place", "Name a directory")
        if tier["size_bytes"] > space["free"] + space["used"]:
            raise Refused(
                f"{where}.size",
                format_size(tier["size_bytes"]),
                f"the file system of {tier['path']} has {space['free']} bytes free",
                "Make the tier smaller or choose another file system",
            )

    # -- apply ----------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if step.verb == "install":
            for path in step.data:
                self.host.write(path, self._program()[path])
            self.host.run(["systemctl", "daemon-reload"])
        elif step.verb == "stop":
            self.host.run(["systemctl", "stop", step.object], timeout_seconds=120)
        elif step.verb == "disable":
            self.host.run(["systemctl", "disable", "--quiet", step.object])
        elif step.verb == "create":
            os.makedirs(self.host.path(step.object), mode=0o750)
        elif step.verb == "declare":
            self.host.write(step.object, json.dumps(step.data, indent=2, sort_keys=True) + "\n")
        elif step.verb == "forget":
            self.host.remove(step.object)
        elif step.verb == "start":
            self._start(step.object)
        else:
            raise HostError(f"no such step: {step.verb}")

    def _start(self, unit: str) -> None:
        done = self.host.run(["systemctl", "enable", "--quiet", "--now", unit], timeout_seconds=600, check=False)
        if done.rc != 0:
            # Not left behind in a loop of restarts that would look half-made.
            self.host.run(["systemctl", "disable", "--quiet", "--now", unit], timeout_seconds=120, check=False)
            said = self.host.run(["journalctl", "--no-pager", "-q", "-o", "cat", "-n", "12", "-u", unit], check=False)
            raise HostError(f"it does not start and was stopped again: {said.text or done.text}")

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The pools that this call declares, as they are now."""
        pending = [
            f"pool {name}, tier {tier}: {node}"
            for (name, tier), node in observed["nodes"].items()
            if isinstance(node, str)
        ]
        return {
            "pools": [
                {
                    "name": name,
                    "state": "present" if name in observed["declared"] else "absent",
                    "engine": observed["declared"].get(name, {}).get("engine"),
                    "units": {
                        unit: observed["units"].get(unit, {}).get("ActiveState", "inactive")
                        for unit in parts(observed["declared"].get(name))
                    },
                }
                for name in self.wanted
            ],
            "engine_version": observed["engine"].partition("-")[2],
            "warnings": [f"Not there yet, a real run needs it: {text}" for text in pending],
        }


class PoolInfo:
    """What pools can do, as a resource that never changes anything.

    :param names: pools to probe; all that are declared when None
    """

    predicting = False

    def __init__(self, host: Host, names: t.Sequence[str] | None, probe_size: str) -> None:
        self.host, self.names = host, names
        self.probe_bytes = parse_size("probe_size", probe_size)

    def observe(self) -> dict[str, t.Any]:
        """Declarations, and the probe of each wanted pool."""
        pools = declared(self.host)
        for index, name in enumerate(self.names or ()):
            if name not in pools:
                known = ", ".join(pools) or "none"
                raise Refused(f"names[{index}]", name, "no such pool on this host", f"Declared here: {known}")
        return {
            name: {"engine": pool["engine"], "tiers": probe(self.host, pool, self.probe_bytes)}
            for name, pool in pools.items()
            if self.names is None or name in self.names
        }

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Nothing to change."""
        return []

    def apply(self, step: Step) -> None:
        """Never called: there are no steps."""

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The pools as they were measured."""
        return {"pools": observed, "engine_version": self.host.link_name(ENGINE).partition("-")[2]}


# -- options ---------------------------------------------------------------------


def _name(option: str, value: t.Any, taken: t.Container[str]) -> str:
    name = str(value)
    if not _NAME.match(name):
        raise Refused(option, value, "not a name", "Use up to 31 of a-z, 0-9 and _, starting with a letter or digit")
    if name in taken:
        raise Refused(option, value, "the name is used twice", "Give each its own name")
    return name


def _pool(option: str, name: str, pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    engine = pool.get("engine") or "mooncake"
    if engine not in MEDIA:
        raise Refused(f"{option}.engine", engine, NOT_YET.get(engine, "no such engine"), f"Engines: {', '.join(MEDIA)}")
    tiers: dict[str, dict[str, t.Any]] = {}
    for index, tier in enumerate(pool.get("tiers") or []):
        where = f"{option}.tiers[{index}]"
        made = _tier(where, engine, tier)
        made["name"] = _name(f"{where}.name", tier.get("name") or tier.get("medium"), tiers)
        tiers[made["name"]] = made
    if not tiers:
        raise Refused(f"{option}.tiers", [], "a pool needs at least one tier", f"Media: {', '.join(MEDIA[engine])}")
    found: dict[str, t.Any] = {"name": name, "engine": engine, "tiers": list(tiers.values())}
    if engine == "mooncake":
        found.update(_mooncake(option, pool))
    return found


def _mooncake(option: str, pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    master = pool.get("master") or {}
    made = {
        "address": master.get("address") or "127.0.0.1",
        "port": 50051 if master.get("port") is None else master["port"],
        "metrics_port": 9003 if master.get("metrics_port") is None else master["metrics_port"],
        "run": True if master.get("run") is None else master["run"],
    }
    for key in ("port", "metrics_port"):
        if not 1 <= int(made[key]) <= 65535:
            raise Refused(f"{option}.master.{key}", made[key], "not a TCP port", "Use 1 to 65535")
    protocol, devices = pool.get("protocol") or "tcp", list(pool.get("rdma_devices") or [])
    if protocol == "tcp" and devices:
        raise Refused(f"{option}.rdma_devices", devices, "TCP uses no RDMA device", "Set protocol: rdma")
    return {
        "address": pool.get("address") or "127.0.0.1",
        "master": made,
        "protocol": protocol,
        "rdma_devices": devices,
    }


def _tier(where: str, engine: str, tier: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    medium = tier.get("medium")
    if medium not in MEDIA[engine]:
        raise Refused(
            f"{where}.medium", medium, f"engine {engine} has no such tier", f"Media: {', '.join(MEDIA[engine])}"
        )
    made: dict[str, t.Any] = {"medium": medium, "size_bytes": parse_size(f"{where}.size", tier.get("size"), 1 << 20)}
    if medium == "ssd":
        made["path"] = os.path.normpath(tier.get("path") or "")
        if not made["path"].startswith("/") or made["path"] == "/":
            raise Refused(f"{where}.path", tier.get("path"), "not an absolute directory", "Write /srv/kvcache/POOL")
        unused = ["numa_node", "memdevs"]
    else:
        made["memdevs"] = [_serial(f"{where}.memdevs", serial) for serial in tier.get("memdevs") or []]
        made["numa_node"] = tier.get("numa_node")
        if made["memdevs"] and made["numa_node"] is not None:
            raise Refused(f"{where}.numa_node", made["numa_node"], "memdevs say the node already", "Give one of them")
        if medium == "cxl" and not made["memdevs"] and made["numa_node"] is None:
            raise Refused(
                f"{where}.memdevs", [], "a cxl tier needs its memory named", "Give serials (memdevs) or numa_node"
            )
        unused = ["path"] if medium == "cxl" else ["path", "memdevs"]
    for key in unused:
        if tier.get(key) not in (None, []):
            raise Refused(f"{where}.{key}", tier[key], f"a {medium} tier does not use it", "Leave it out")
    return made


def _serial(option: str, value: t.Any) -> str:
    try:
        return hex(int(str(value), 0))
    except ValueError:
        raise Refused(option, value, "not a serial number", "Write it as cxl list -M shows it, such as 0x1") from None


# -- health ----------------------------------------------------------------------


def agent(*arguments: str) -> list[str]:
    """The command line of our program in the engine's Python."""
    environment = [f"PYTHONPATH={_boot.LIBRARY}", "PYTHONDONTWRITEBYTECODE=1"]
    return ["env", *environment, *_PROGRAM.split(), *arguments]


def probe(host: Host, pool: t.Mapping[str, t.Any], probe_bytes: int) -> list[dict[str, t.Any]]:
    """Each tier of a pool with what a real put, get and compare measured; never raises for a sick pool."""
    base = [
        {
            "numa_node": None,
            "pages_on_node": 0,
            "pages_elsewhere": 0,
            "put_bytes_per_second": 0,
            "get_bytes_per_second": 0,
            "verified": False,
            **{key: tier[key] for key in ("name", "medium", "size_bytes")},
        }
        for tier in pool["tiers"]
    ]
    if pool["engine"] == "filesystem":
        found = [_probe_directory(host, tier, probe_bytes) for tier in pool["tiers"]]
    else:
        done = host.run(agent("probe", pool["name"], str(probe_bytes)), timeout_seconds=300, check=False)
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if done.rc == 0 and lines else [{"problem": done.text[-500:]}] * len(base)
    return [{**tier, **measured} for tier, measured in zip(base, found)]


def _probe_directory(host: Host, tier: t.Mapping[str, t.Any], probe_bytes: int) -> dict[str, t.Any]:
    size = min(probe_bytes, tier["size_bytes"] // 4)
    data = os.urandom(size)
    path = host.path(f"{tier['path']}/.agentfleet-probe-{os.urandom(8).hex()}")
    try:
        start = time.perf_counter()
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_seconds = time.perf_counter() - start
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from the page cache
            start = time.perf_counter()
            same = file.read() == data
            get_seconds = time.perf_counter() - start
    except OSError as error:
        return {"probe_bytes": size, "problem": f"{tier['path']}: {error.strerror}"}
    finally:
        if os.path.exists(path):
            os.unlink(path)
    return {
        "probe_bytes": size,
        "put_bytes_per_second": round(size / put_seconds),
        "get_bytes_per_second": round(size / get_seconds),
        "verified": same,
    }
