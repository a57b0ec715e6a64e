# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools: a pool is an engine with tiers, declared in one file and run by systemd.

``POOLS/<pool>.json`` is the declaration that units, probe and information read. A unit is stopped before its part of
that file changes and started after, so that an interrupted run is finished by the next one. What a store holds is
moved to other stores before it stops, where there are any; otherwise stopping it has to be allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import typing as t
from collections import Counter

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot, _connectors, _pooldecl, _poolfiles, _slab
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake import (
    ENGINE,
    POOLS,
    USER,
    devdax_of_memdevs,
    offload_share,
    status_of,
    tier_node,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import observe_numa
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._poolprobe import PROGRAM, agent, declared
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import UNITS, last_words, show
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

SYSUSERS = "/etc/sysusers.d/60-agentfleet-kv.conf"
DRAIN_SECONDS = 600
_GROW_SECONDS = 300  # with the wait for a master that was restarted
_START_SECONDS = 600
_CLEAR_BYTES_PER_SECOND = 256 << 20  # at least, of memory that stores make; one thread clears some GiB
_OWN_MODE, _OWN_SECONDS = 0o700, 600  # of a directory with an owner; to make him the owner of what is in it
_SERVICE = f"""\
Environment=PYTHONPATH={_boot.LIBRARY} PYTHONDONTWRITEBYTECODE=1
User={USER}
Restart=always
RestartSec=3
NoNewPrivileges=yes
ProtectSystem=full
ProtectHome=yes
PrivateTmp=yes
"""
TEMPLATES = {
    SYSUSERS: f'# Written by agentfleet.metal.\nu {USER} - "KV-cache pools"\n',
    f"{UNITS}/agentfleet-mooncake-master@.service": f"""\
# Written by agentfleet.metal.
[Unit]
Description=Mooncake master of KV-cache pool %i
After=network-online.target etcd.service
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStartPre=+{PROGRAM} policy %i
ExecStart={PROGRAM} master %i
RuntimeDirectory=agentfleet-mooncake/%i
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
ExecStartPre=+{PROGRAM} guard %i
ExecStart={PROGRAM} store %i
ExecReload=/bin/kill -HUP $MAINPID
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


def parts(pool: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
    """Unit -> what it depends on in the declaration; a change of that restarts the unit."""
    if pool is None:
        return {}
    found: dict[str, t.Any] = {}
    if pool["engine"] == "mooncake":
        get = pool.get  # a declaration of an older version lacks keys, and its units are then restarted
        where = [get("etcd"), *([] if get("etcd") else [pool["master"]["address"], pool["master"]["port"]])]
        shared = [where, *(get(key) for key in ("address", "protocol", "rdma_devices", "listen_all_addresses"))]
        if pool["master"]["run"]:
            policy = [get(key) for key in ("etcd", "eviction_high_watermark", "write_policy")]
            disk = any(tier["medium"] == "ssd" for tier in pool["tiers"])
            found[master_unit(pool["name"])] = [pool["master"], policy, disk, bool(get("tenants"))]
        for tier in pool["tiers"]:
            if tier["medium"] != "ssd":
                share = offload_share(pool, tier)
                offload = [*share, get("eviction_policy")] if share[0] else []
                found[store_unit(pool["name"], tier["name"])] = [shared, tier, offload]
    found.update(_poolfiles.metadata_units(pool))
    return found


def _size(part: t.Any) -> int:
    """Bytes of a store by its part of the declaration; 0 for other units."""
    return part[1].get("size_bytes", 0) if isinstance(part, list) and isinstance(part[1], dict) else 0


def _grows(old: t.Any, new: t.Any) -> bool:
    """Whether a store only becomes larger, which it can do while it serves."""
    return 0 < _size(old) < _size(new) and [old[0], {**old[1], "size_bytes": _size(new)}, old[2]] == new


def _forgets(unit: str) -> bool:
    """Whether it is the metadata service of vLLM, for a tenant or for all."""
    return unit.startswith("agentfleet-kv-metadata-") and "vllm" in unit.removesuffix(".service").split("-")[4:5]


def listening(host: Host) -> set[int]:
    """TCP ports on which something listens."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in host.read(f"/proc/net/{name}").splitlines()[1:]]
    return {int(words[1].rpartition(":")[2], 16) for words in lines if words[3] == "0A"}


class _Memory:
    """What a run takes of the memory of NUMA nodes and gives back to it, in its order. Node None is any node.

    :param free: node -> bytes that nothing uses
    :param cache: node -> bytes that files' pages use and the kernel gives back
    """

    def __init__(self, free: t.Mapping[int, int], cache: t.Mapping[int, int]) -> None:
        self.free: Counter[int | None] = Counter(free)
        self.cache: Counter[int | None] = Counter(cache)
        self.stopped: Counter[int | None] = Counter()
        self.started: Counter[int | None] = Counter()

    def stop(self, status: t.Mapping[str, t.Any] | None) -> None:
        """Count in what a store has that is stopped; one that says nothing may have nothing yet."""
        if status:
            self.stopped[status["numa_node"]] += status["size_bytes"]

    def start(self, node: int | None, size: int) -> str:
        """Count a store's new memory in; returns what is wrong with that, for a refusal."""
        self.started[node] += size
        for place in (None,) if node is None else (node, None):
            free, cache, stopped, need = (
                sum(kind.values()) if place is None else kind[place]
                for kind in (self.free, self.cache, self.stopped, self.started)
            )
            if need > free + cache + stopped:
                where = "this host" if place is None else f"NUMA node {place}"
                return (
                    f"{where} has {free + cache + stopped} bytes free for {need} bytes of new tiers: {free} unused, "
                    f"{stopped} of stores that stop before, and {cache} of files' pages, which is half of those that are "
                    "neither dirty nor mapped, since the kernel does not surely give back more"
                )
        return ""


class Pools:
    """The KV-cache pools of one host as a resource."""

    predicting = False  # a dry run, in which earlier tasks only announced the engine and the memory

    def __init__(self, host: Host, pools: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        self.host = host
        self.lose_data = {str(pool["name"]): bool(pool.get("lose_data")) for pool in pools}
        self.leaving = {str(pool["name"]) for pool in pools if pool.get("state") == "drained"}
        self.ids = {str(pool["name"]): _pooldecl.tenant_ids(pool) for pool in pools}
        self.wanted: dict[str, dict[str, t.Any] | None] = {}
        for index, pool in enumerate(pools):
            option = f"pools[{index}]"
            name = _pooldecl.checked_name(f"{option}.name", pool["name"], self.wanted)
            absent = pool.get("state", "present") != "present"
            if name in self.leaving:
                self._check_drains(option, pool.get("engine") or "mooncake")
            made = None if absent else _pooldecl.declare(option, name, pool, host.read)
            if made:
                _pooldecl.check_heeded(option, made)
            self.wanted[name] = made
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

    @staticmethod
    def _check_drains(option: str, engine: str) -> None:
        if engine != "mooncake":
            problem = f"a {engine} pool has no stores to drain: its files stay where they are"
            raise Refused(f"{option}.state", "drained", problem, "Use state: absent")

    # -- observe --------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Declarations, units, files, memory and, for pools that would lose it, the data."""
        now = declared(self.host)
        units = {
            *(unit for pool in now.values() for unit in parts(pool)),
            *(unit for pool in self.wanted.values() for unit in parts(pool)),
        }
        nodes = {node["id"]: node for node in observe_numa(self.host)["nodes"] if node["size_bytes"]}
        observed: dict[str, t.Any] = {
            "declared": now,
            "units": show(self.host, sorted(units), "ActiveState,UnitFileState"),
            "files": {path: self.host.read(path) for path in self._program()},
            "of_pools": {name: _poolfiles.on_host(self.host, name) for name in self.wanted},
            "engine": self.host.link_name(ENGINE),
            "listening": listening(self.host),
            "free": {number: node["free_bytes"] for number, node in nodes.items()},
            "cache": {number: node["cache_bytes"] for number, node in nodes.items()},
            "mounts": {line.split()[1]: line.split()[2] for line in self.host.read("/proc/self/mounts").splitlines()},
            "users": {
                words[0]: int(words[2])
                for words in (line.split(":") for line in self.host.read("/etc/passwd").splitlines())
                if words[2:] and words[2].isdigit()
            },
            "rdma": self.host.names("/sys/class/infiniband"),
            "stores": {
                store_unit(name, tier["name"]): status_of(self.host, name, tier["name"])
                for name in self.wanted
                for tier in now.get(name, {}).get("tiers", [])
            },
            "clients": {},
            "nodes": {},
            "devdax": {name: {} for name in self.wanted},
            "paths": {},
            "to_write": {},
            "slabs": {},
            "data": {},
            "quotas": {},
        }
        for name, pool in self.wanted.items():
            if pool is not None:
                self._observe_wish(name, pool, observed)
            observed["data"][name] = self._data(name, observed)
        self._observe_disks(observed)
        return observed

    def _observe_wish(self, name: str, pool: dict[str, t.Any], observed: dict[str, t.Any]) -> None:
        """What a pool refers to on this host."""
        for tier in pool["tiers"]:
            if tier.get("path"):
                observed["paths"][tier["path"]] = self._space(tier["path"])
                for path, _quota, _owner in _directories(pool, tier):
                    observed["paths"].setdefault(path, self._space(path))
                continue
            look = devdax_of_memdevs if tier.get("devdax") else None
            try:
                if look:
                    observed["devdax"][name][tier["name"]] = look(self.host, tier["memdevs"])
                else:
                    observed["nodes"][name, tier["name"]] = tier_node(self.host, tier)
            except HostError as error:
                observed["nodes"][name, tier["name"]] = str(error)
        for connector in pool["connectors"]:
            for slab in _connectors.slabs(pool, connector):
                there = self.host.exists(slab.path)
                observed["slabs"][slab.path] = os.lstat(self.host.path(slab.path)).st_size if there else None
            if connector["backend"] == "hf3fs" and connector["python"]:
                module = _connectors.CLIENT[connector["engine"]]
                done = self.host.run([connector["python"], "-c", f"import {module}"], check=False)
                observed["clients"][connector["python"]] = "" if done.rc == 0 else done.text[-200:]
        asked = _serves_tenants(pool) and _serves_tenants(observed["declared"].get(name))
        if asked and self._running(master_unit(name), observed):
            done = self.host.run(agent("quotas", name), check=False)
            observed["quotas"][name] = json.loads(done.stdout) if done.rc == 0 else None

    def _space(self, path: str) -> dict[str, t.Any]:
        """Whose a directory is, and what its file system has free."""
        place = path
        while not self.host.exists(place):
            place = os.path.dirname(place)
        real = self.host.path(place)
        directory = os.path.isdir(real)
        space, state = os.statvfs(real), os.stat(real)
        return {
            "exists": place == path,
            "directory": directory,
            "uid": state.st_uid,
            "mode": stat.S_IMODE(state.st_mode),
            "file_system": state.st_dev,
            "free": space.f_bavail * space.f_frsize,
        }

    def _observe_disks(self, observed: dict[str, t.Any]) -> None:
        """Bytes that tiers may still write, of each file system with a tier that is new or changes.

        What they have already is counted only where it matters: there may be millions of files.
        """
        tiers: dict[int, list[dict[str, t.Any]]] = {}
        changing = set()
        for name, pool in self.wanted.items():
            for tier in (tier for tier in (pool or {}).get("tiers", []) if tier.get("path")):
                place = observed["paths"][tier["path"]]["file_system"]
                tiers.setdefault(place, []).append(tier)
                if _changes(name, tier, observed):
                    changing.add(place)
        for place in changing:
            to_write = sum(tier["size_bytes"] for tier in tiers[place])
            if to_write > min(observed["paths"][tier["path"]]["free"] for tier in tiers[place]):
                to_write = sum(max(0, tier["size_bytes"] - self._used(tier["path"])) for tier in tiers[place])
            observed["to_write"][place] = to_write

    def _used(self, path: str) -> int:
        """Bytes of the files below a directory, of which a live cache removes some meanwhile."""
        used = 0
        for top, _directories, names in os.walk(self.host.path(path)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    used += os.lstat(os.path.join(top, name)).st_size
        return used

    def _data(self, name: str, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """What would be lost (``lost``, empty if nothing), and the tiers that can be drained before (``drain``)."""
        pool, stops = observed["declared"].get(name), self._stops(name, observed)
        nothing = {"lost": "", "drain": []}
        if pool is None:
            return nothing
        if pool["engine"] != "mooncake":
            # vLLM's map of pages is in its service's memory; SGLang's is on the disk and outlives a restart.
            if self.wanted[name] is not None and not any(_forgets(unit) for unit in stops):
                return nothing
            found = [tier["path"] for tier in pool["tiers"] if tier.get("path") and self.host.names(tier["path"])]
            return {**nothing, "lost": f"files below {', '.join(found)}" if found else ""}
        stores = {store_unit(name, tier["name"]): tier["name"] for tier in pool["tiers"]}
        ending = [stores[unit] for unit in stops if unit in stores]
        headless = master_unit(name) in stops and not pool.get("etcd")
        if not ending and not headless:
            return nothing
        done = self.host.run(agent("holds", name), check=False)
        if done.rc != 0:
            # Silence is no emptiness: the stores may still hold what a master that comes back would find.
            return {**nothing, "lost": f"an unknown amount of data (it cannot be asked: {done.text[-200:]})"}
        state = json.loads(done.stdout)
        here = {store["tier"]: store for store in state["stores"] if store["tier"] in ending}
        # Of a store whose drain was begun and not finished the engine says 0 bytes, whatever it holds.
        unfinished = [tier for tier, store in here.items() if store["status"] not in ("OK", "DRAINED")]
        used = sum(store["used_bytes"] for store in here.values() if store["status"] == "OK")
        free = sum(
            store["capacity_bytes"] - store["used_bytes"]
            for store in state["stores"]
            if store["tier"] not in ending and store["status"] == "OK"
        )
        if headless and state["objects"]:
            return {**nothing, "lost": f"{state['objects']} objects"}
        if not used and not unfinished:
            return nothing
        if self.wanted[name] is None and name not in self.leaving:
            # Other hosts may be told the same at this moment, and would have moved everything to each other.
            held = (
                f"{used} bytes"
                if used
                else f"an unknown amount of data (tiers {', '.join(unfinished)} are being drained)"
            )
            return {**nothing, "lost": f"{held} in the stores of this host"}
        if used > free:
            return {**nothing, "lost": f"{used} bytes for which its other stores have no room"}
        # With those that are empty, or they would be given what the others hold.
        return {**nothing, "drain": sorted(tier for tier, store in here.items() if store["status"] != "DRAINED")}

    # -- plan -----------------------------------------------------------------

    @staticmethod
    def _program() -> dict[str, str]:
        return {
            **TEMPLATES,
            **{f"{_boot.LIBRARY}/{path}": text for path, text in _boot.sources("_mooncake").items()},
        }

    def _running(self, unit: str, observed: t.Mapping[str, t.Any]) -> bool:
        return observed["units"].get(unit, {}).get("ActiveState") in ("active", "activating", "reloading")

    def _stops(self, name: str, observed: t.Mapping[str, t.Any]) -> list[str]:
        old, new = parts(observed["declared"].get(name)), parts(self.wanted[name])
        return [
            unit
            for unit in reversed(list(old))
            if new.get(unit) != old[unit] and not _grows(old[unit], new.get(unit)) and self._running(unit, observed)
        ]

    @staticmethod
    def _serves(unit: str, old: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> int:
        """Bytes of a running store: less than declared if it could not grow. One that only starts will have what is declared."""
        status = observed["stores"].get(unit)
        return int(status["size_bytes"]) if status else _size(old.get(unit))

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Drain and stop what changes, write declaration and files, start what should run."""
        self._check(observed)
        steps: list[Step] = []
        units = any(parts(pool) for pool in self.wanted.values())
        stale = [path for path, text in self._program().items() if observed["files"][path] != text.strip()]
        if units and stale:
            steps.append(Step("install", "program and units of KV-cache pools", after=stale, data=stale))
        for name, pool in self.wanted.items():
            steps += self._plan_pool(name, pool, observed)
        return steps

    def _plan_pool(self, name: str, pool: dict[str, t.Any] | None, observed: dict[str, t.Any]) -> list[Step]:
        steps: list[Step] = []
        old = observed["declared"].get(name)
        old_parts, new_parts = parts(old), parts(pool)
        stops, data = self._stops(name, observed), observed["data"][name]
        if data["lost"] and (stops or pool is None) and not self.lose_data[name]:
            remedy = "Set lose_data: true, or let the data expire first"
            if pool is None and name not in self.leaving and old["engine"] == "mooncake":
                remedy += ", or take this host out of the pool with state: drained"
            done = "removing it" if pool is None else "this change"
            problem = f"the pool holds {data['lost']}, lost by {done}"
            raise Refused(self.options[name], name, problem, remedy)
        if data["drain"]:
            stays = "so that what they hold stays in the pool"
            steps.append(Step("drain", f"pool {name}, tiers {', '.join(data['drain'])}", why=stays, data=(name, data)))
        why = f"loses {data['lost']}" if data["lost"] else "its declaration changes"
        if stops:
            # At once, since each takes its time, but stores first: they take leave of a master that still answers.
            master = [unit for unit in stops if unit == master_unit(name)]
            order = [group for group in ([unit for unit in stops if unit not in master], master) if group]
            steps.append(Step("stop", ", ".join(stops), before="active", why=why, data=order, disruptive=True))
        goes = [
            unit
            for unit in old_parts
            if unit not in new_parts and observed["units"].get(unit, {}).get("UnitFileState") == "enabled"
        ]
        if goes:
            steps.append(Step("disable", ", ".join(goes), before="enabled", data=goes))
        steps += self._plan_directories(pool, observed)
        # The record of the old state goes last when a pool goes, and first when it comes.
        record = (
            [Step("declare" if pool else "forget", f"{POOLS}/{name}.json", before=old, after=pool, data=pool)]
            if old != pool
            else []
        )
        files = self._plan_files(name, pool, observed)
        steps += record + files if pool else files + record
        starts: list[str] = []
        grows: list[Step] = []
        for unit in new_parts:
            enabled = observed["units"].get(unit, {}).get("UnitFileState") == "enabled"
            if unit in stops or not enabled or not self._running(unit, observed):
                starts.append(unit)
            elif (has := self._serves(unit, old_parts, observed)) < _size(new_parts[unit]):
                grows.append(Step("grow", unit, before=has, after=_size(new_parts[unit])))
        if starts:  # at once: a store's memory takes its time to be made, and stores wait for their master themselves
            size = sum(_size(new_parts[unit]) for unit in starts)
            steps.append(Step("start", ", ".join(starts), after="active, enabled", data=(starts, size)))
        steps += grows
        if pool and _serves_tenants(pool):
            wanted = {tenant["name"]: tenant["quota_bytes"] for tenant in pool["tenants"]}
            present = {tenant: state["quota_bytes"] for tenant, state in (observed["quotas"].get(name) or {}).items()}
            # The master was asked by the names that were on the host: of a token that changes it knows nothing yet.
            renamed = any(step.object == _poolfiles.tenants_path(name) for step in files)
            if renamed or present != wanted:
                why = "the names that are made of tokens are written anew" if renamed else ""
                title = f"tenants' quotas of pool {name}"
                steps.append(Step("set", title, before=present, after=wanted, why=why, data=name))
        return steps

    def _plan_directories(self, pool: dict[str, t.Any] | None, observed: dict[str, t.Any]) -> list[Step]:
        steps: list[Step] = []
        if pool is None:
            return steps
        for tier in pool["tiers"]:
            for path, _size, owner in _directories(pool, tier) if tier.get("path") else ():
                there, uid = observed["paths"][path], observed["users"].get(owner)
                if not there["exists"]:
                    steps.append(Step("create", path, after=f"directory of {owner or 'root'}", data=owner))
                elif owner and (there["uid"], there["mode"]) != (uid, _OWN_MODE):
                    names = [name for name, number in observed["users"].items() if number == there["uid"]]
                    had = f"of {', '.join(names) or there['uid']}, mode {there['mode']:04o}"
                    now = f"of {owner}, mode {_OWN_MODE:04o}, with all that is in it"
                    steps.append(Step("own", path, before=had, after=now, data=owner, disruptive=True))
        for connector in pool["connectors"]:
            for slab in _connectors.slabs(pool, connector):
                had = observed["slabs"][slab.path]
                if had != slab.file_bytes:
                    why = f"{slab.pages} pages of {slab.page_bytes} bytes"
                    steps.append(Step("lay out", slab.path, before=had, after=slab.file_bytes, why=why))
        return steps

    def _plan_files(self, name: str, pool: dict[str, t.Any] | None, observed: dict[str, t.Any]) -> list[Step]:
        wanted = _poolfiles.expected(pool, self.ids[name], observed["devdax"][name])
        present, steps = observed["of_pools"][name], []
        for path in sorted(set(present) | set(wanted)):
            file, there = wanted.get(path), present.get(path)
            if file is None:
                steps.append(Step("remove", path, before="file"))
            elif there != (file.text, file.mode):
                shown = None if there is None else "(hidden)" if file.secret else there[0]
                steps.append(Step("write", path, before=shown, after=file.shown(), data=file))
        return steps

    # -- what is refused -------------------------------------------------------

    def _check(self, observed: dict[str, t.Any]) -> None:
        memory = _Memory(observed["free"], observed["cache"])
        maps = {
            _connectors.map_url(connector): f"pool {name}"
            for name, pool in observed["declared"].items()
            if name not in self.wanted
            for connector in pool["connectors"]
            if _connectors.map_url(connector)
        }
        for name, pool in self.wanted.items():
            option = self.options[name]
            if name in self.leaving and name in observed["declared"]:
                self._check_drains(option, observed["declared"][name]["engine"])
            for unit in self._stops(name, observed):  # before those of this pool start, and of the pools after it
                memory.stop(observed["stores"].get(unit))
            if pool is None:
                continue
            for index, connector in enumerate(pool["connectors"]):
                _connectors.check_map(f"{option}.connectors[{index}]", f"pool {name}", connector, maps)
            if pool["engine"] == "mooncake":
                self._check_engine(option, name, pool, observed)
            for index, tier in enumerate(pool["tiers"]):
                where = f"{option}.tiers[{index}]"
                if tier.get("path"):
                    self._check_path(where, pool, tier, observed)
                else:
                    self._check_memory(where, name, tier, observed, memory)
            for index, tenant in enumerate(pool["tenants"]):
                if tenant["owner"] and tenant["owner"] not in observed["users"] and not self.predicting:
                    raise Refused(
                        f"{option}.tenants[{index}].owner", tenant["owner"], "no such user here", "Make the user first"
                    )
            for index, connector in enumerate(pool["connectors"]):
                problem = observed["clients"].get(connector["python"])
                if problem and connector["backend"] == "hf3fs" and not self.predicting:
                    raise Refused(
                        f"{option}.connectors[{index}].python",
                        connector["python"],
                        f"it cannot import the 3FS client, so that {connector['engine']} would write plain files "
                        f"by a mock without a word ({problem})",
                        "Install 3FS's Python client there",
                    )

    def _check_engine(self, option: str, name: str, pool: dict[str, t.Any], observed: dict[str, t.Any]) -> None:
        if not observed["engine"] and not self.predicting:
            raise Refused(f"{option}.engine", "mooncake", f"{ENGINE} is missing", "Install it first: role mooncake")
        if pool["protocol"] == "rdma" and not self.predicting:
            there = ", ".join(observed["rdma"])
            missing = [name for name in pool["rdma_devices"] if name not in observed["rdma"]]
            if not there:
                remedy = "Load the card's driver (rdma link shows it), or set protocol: tcp"
                raise Refused(f"{option}.protocol", "rdma", "this host has no RDMA device", remedy)
            if missing:
                raise Refused(f"{option}.rdma_devices", missing, "no such RDMA device here", f"Devices: {there}")
        if pool["master"]["run"] and not self._running(master_unit(name), observed):
            for key in ("port", "metrics_port"):
                port = pool["master"][key]
                if port in observed["listening"]:
                    raise Refused(f"{option}.master.{key}", port, "another program listens on it", "Choose a free port")

    def _check_memory(
        self, where: str, name: str, tier: dict[str, t.Any], observed: dict[str, t.Any], memory: _Memory
    ) -> None:
        node = observed["nodes"].get((name, tier["name"]))
        if isinstance(node, str):
            if not self.predicting:
                raise Refused(f"{where}.memdevs", tier["memdevs"], node, "Correct the serials or run it later")
            return
        if tier.get("devdax"):
            return
        if node is not None and node not in observed["free"]:
            if self.predicting and tier["medium"] == "cxl":
                return
            known = ", ".join(str(number) for number in sorted(observed["free"]))
            raise Refused(f"{where}.numa_node", node, "no such NUMA node with memory", f"Nodes with memory: {known}")
        unit = store_unit(name, tier["name"])
        old = parts(observed["declared"].get(name)).get(unit)
        new = parts(self.wanted[name]).get(unit)
        more = tier["size_bytes"]
        if self._running(unit, observed) and (old == new or _grows(old, new)):
            more -= self._serves(unit, {unit: old}, observed)
        if more <= 0:
            return
        problem = memory.start(node, more)
        if problem:
            remedy = "Make the tier smaller, free memory there, or have the kernel drop files' pages (sysctl vm.drop_caches=1)"
            raise Refused(f"{where}.size", format_size(tier["size_bytes"]), problem, remedy)

    def _check_path(
        self,
        where: str,
        pool: t.Mapping[str, t.Any],
        tier: t.Mapping[str, t.Any],
        observed: t.Mapping[str, t.Any],
    ) -> None:
        space = observed["paths"][tier["path"]]
        for path in (tier["path"], *(path for path, _size, _owner in _directories(pool, tier))):
            if not observed["paths"][path]["directory"]:
                raise Refused(f"{where}.path", path, "a file is in its place", "Name a directory")
        if tier["medium"] == "threefs" and not self.predicting:
            kind = observed["mounts"].get(tier["mount"], "")
            if not kind.startswith("fuse"):
                raise Refused(
                    f"{where}.mount_point",
                    tier["mount"],
                    f"no 3FS is mounted there ({kind or 'nothing is'})",
                    "Mount it first: role threefs",
                )
        to_write = observed["to_write"].get(space["file_system"], 0)
        if to_write > space["free"] and _changes(pool["name"], tier, observed):
            raise Refused(
                f"{where}.size",
                format_size(tier["size_bytes"]),
                f"the file system of {tier['path']} has {space['free']} bytes free for {to_write} bytes that tiers of it "
                "may still write",
                "Make the tier smaller or choose another file system",
            )
        for slab in (slab for connector in pool["connectors"] for slab in _connectors.slabs(pool, connector)):
            had = observed["slabs"][slab.path]
            if had not in (None, slab.file_bytes) and not self.lose_data[pool["name"]]:
                raise Refused(
                    f"{where}.size",
                    format_size(tier["size_bytes"]),
                    f"{slab.path} has {had} bytes, and with {slab.file_bytes} a new map of its pages begins, "
                    "which finds nothing of what is there",
                    "Set lose_data: true, or keep size, model and GPUs",
                )

    # -- apply ----------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if step.verb == "install":
            for path in step.data:
                self.host.write(path, self._program()[path])
            self.host.run(["systemd-sysusers", SYSUSERS])
            self.host.run(["systemctl", "daemon-reload"])
        elif step.verb == "drain":
            name, data = step.data
            command = agent("drain", name, ",".join(data["drain"]), str(DRAIN_SECONDS))
            self.host.run(command, timeout_seconds=DRAIN_SECONDS + 60)
        elif step.verb == "stop":
            for units in step.data:
                self.host.run(["systemctl", "stop", *units], timeout_seconds=120)
        elif step.verb == "disable":
            self.host.run(["systemctl", "disable", "--quiet", *step.data])
        elif step.verb == "create":
            os.makedirs(self.host.path(step.object), mode=_OWN_MODE if step.data else 0o750)
            if step.data:
                self.host.run(["chown", f"{step.data}:", self.host.path(step.object)])
        elif step.verb == "own":
            # Closed until all is the owner's, so that who had it sees nothing new, and the next run an interrupted one.
            real = os.path.realpath(self.host.path(step.object))
            os.chmod(real, 0)
            self.host.run(["chown", "--recursive", f"{step.data}:", real], timeout_seconds=_OWN_SECONDS)
            os.chmod(real, _OWN_MODE)
        elif step.verb == "lay out":
            _slab.make(self.host.path(step.object), step.after)
        elif step.verb == "declare":
            self.host.write(step.object, json.dumps(step.data, indent=2, sort_keys=True) + "\n")
        elif step.verb in ("forget", "remove"):
            self.host.remove(step.object)
            self._reload_for(step.object)
            directory = os.path.dirname(step.object)
            while directory.startswith(_connectors.DIRECTORY + "/") and not self.host.names(directory):
                os.rmdir(self.host.path(directory))
                directory = os.path.dirname(directory)
        elif step.verb == "write":
            self.host.write(step.object, step.data.text, step.data.mode)
            self._reload_for(step.object)
        elif step.verb == "set":
            # A master that was started just now may not lead yet.
            self.host.wait(lambda: self._set_quotas(step.data), "the master takes its tenants' quotas", 180, 1)
        elif step.verb == "grow":
            self._grow(step)
        elif step.verb == "start":
            self._start(*step.data)
        else:
            raise HostError(f"no such step: {step.verb}")

    def _set_quotas(self, name: str) -> bool:
        return self.host.run(agent("set-quotas", name), timeout_seconds=120, check=False).rc == 0

    def _reload_for(self, path: str) -> None:
        if path.startswith(UNITS):
            self.host.run(["systemctl", "daemon-reload"])

    def _grow(self, step: Step) -> None:
        pool_tier = step.object.partition("@")[2].rpartition(".")[0]

        def status() -> dict[str, t.Any]:
            return status_of(self.host, *pool_tier.split("-")) or {}

        before, patience = status(), _GROW_SECONDS + (step.after - step.before) / _CLEAR_BYTES_PER_SECOND
        done = self.host.run(["systemctl", "reload", step.object], timeout_seconds=patience, check=False)

        def answered() -> bool:
            now = status()
            if before and now.get("pid") != before["pid"]:
                raise HostError("its store ended instead of growing, and what it held in memory is lost")
            if done.rc != 0 and now == before:
                raise HostError(done.text)
            if now.get("problem") and now != before:
                raise HostError(f"it serves {now['size_bytes']} bytes as before: {now['problem']}")
            return bool(now.get("size_bytes") == step.after)

        self.host.wait(answered, f"{step.object} serves {step.after} bytes", patience, 0.5)

    def _start(self, units: t.Sequence[str], size: int) -> None:
        patience = _START_SECONDS + size / _CLEAR_BYTES_PER_SECOND
        done = self.host.run(["systemctl", "enable", "--quiet", "--now", *units], timeout_seconds=patience, check=False)
        if done.rc == 0:
            return
        states = show(self.host, units, "ActiveState,UnitFileState")
        failed = [unit for unit in units if states.get(unit, {}).get("ActiveState") != "active"] or units
        # Not left behind in a loop of restarts that would look half-made.
        self.host.run(["systemctl", "disable", "--quiet", "--now", *failed], timeout_seconds=120, check=False)
        said = [last_words(self.host, unit) for unit in failed]
        raise HostError(
            f"{', '.join(failed)}: does not start and was stopped again: {' '.join(said).strip() or done.text}"
        )

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The pools that this call declares, as they are now."""
        pending = [
            f"pool {name}, tier {tier}: {node if isinstance(node, str) else f'no NUMA node {node} with memory'}"
            for (name, tier), node in observed["nodes"].items()
            if node is not None and node not in observed["free"]
        ]
        warnings = [f"Not there yet, a real run needs it: {text}" for text in pending]
        for name, pool in self.wanted.items():
            warnings += _poolfiles.notes(pool) if pool else []
            if pool and pool["engine"] == "mooncake" and pool["replicas"] > 1 and pool["connectors"]:
                warnings.append(
                    f"pool {name}: the engines' connectors of these versions ask for one replica of a block; only "
                    "clients that set replica_num get more"
                )
            if pool and _serves_tenants(pool) and pool["etcd"]:
                warnings.append(
                    f"pool {name}: mooncake up to 0.3.13 does not record in etcd what a tenant's quota evicts. Once that is "
                    "more than a store holds, a master that takes over finds no object in memory. Give each tenant more than "
                    "it fills, or have tenants in a pool without etcd"
                )
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
                    "connectors": sorted(
                        path for path in observed["of_pools"][name] if path.startswith(_connectors.DIRECTORY)
                    ),
                }
                for name in self.wanted
            ],
            "engine_version": observed["engine"].partition("-")[2],
            "warnings": warnings,
        }


def _changes(name: str, tier: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> bool:
    """Whether a tier of this pool is not what it was declared before."""
    return tier not in observed["declared"].get(name, {}).get("tiers", [])


def _serves_tenants(pool: t.Mapping[str, t.Any] | None) -> bool:
    """Whether this host's master has the quotas of tenants to keep."""
    return bool(pool and pool["engine"] == "mooncake" and pool.get("tenants") and pool["master"]["run"])


def _directories(pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any]) -> list[tuple[str, int, str]]:
    """Path, bytes and owner, of the directories of a file tier: one for each tenant, or for each store that offloads."""
    if pool["engine"] == "mooncake":
        stores = [other for other in pool["tiers"] if other["medium"] != "ssd"]
        return [(*offload_share(pool, other), USER) for other in stores]
    if pool["tenants"]:
        return [
            (f"{tier['path']}/{tenant['name']}", tenant["quota_bytes"], tenant["owner"]) for tenant in pool["tenants"]
        ]
    return [(tier["path"], tier["size_bytes"], "")]
