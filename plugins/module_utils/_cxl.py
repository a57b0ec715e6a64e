# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""CXL memory devices, windows and regions: read from sysfs, changed through the ``cxl`` program.

Kernel names (mem0, decoder0.0, region0) are handles of one boot. Outside of this
file devices are known by serial or PCI address, windows by their host bridges
and regions by their type and the set of their devices.
"""

from __future__ import annotations

import copy
import json
import os
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._boot import (
    STATE,
    each_alone,
    persist_apply,
    persist_plan,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import (
    MEMORY,
    auto_online,
    block_size,
    memory_users,
    offline_dax,
    online_blocks,
    processes,
    zone_of,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

DEVICES = "/sys/bus/cxl/devices"
DAX = "/sys/bus/dax/devices"
_BRIDGE = re.compile(r"^pci[0-9a-f]{4}:[0-9a-f]{2}$")
_PCI = re.compile(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
# A persistent region's device is not below its decoder: the kernel makes an NVDIMM region of the same name for it.
_DAX_REGION = re.compile(r"/(?:decoder[0-9.]+|nvdimm-bridge\d+/ndbus\d+)/(region\d+)/")
Facts = t.Mapping[str, t.Any]
_MODES = {"kmem": "system-ram", "device_dax": "devdax", "fsdev_dax": "famfs", "": "disabled"}


def observe_cxl(host: Host) -> dict[str, t.Any]:
    """Everything about CXL that the host's sysfs tells; empty lists where there is none."""
    used = _used_capacity(host)
    memdevs = [_memdev(host, path, used) for path in host.glob(f"{DEVICES}/mem[0-9]*")]
    by_name = {memdev["name"]: memdev for memdev in memdevs}
    regions = [_region(host, path, by_name) for path in host.glob(f"{DEVICES}/region[0-9]*")]
    iomem = _iomem(host)
    dax = observe_dax(host)
    for region in regions:
        region["dax"] = [device["name"] for device in dax if device["region"] == region["name"]]
    return {
        "memdevs": memdevs,
        "decoders": [
            _decoder(host, path, regions, iomem)
            for path in host.glob(f"{DEVICES}/decoder[0-9]*")
            if host.read(f"{path}/devtype") == "cxl_decoder_root"
        ],
        "regions": regions,
        "dax": dax,
        # Which of the concerns of role cxl come back at boot, so that an emptied list is known to be a change.
        "persisted": [name for name in ("cxl", "dax", "tiering") if host.exists(f"{STATE}/{name}.json")],
        "soft_reserved": [
            {"start": start, "size_bytes": end - start + 1} for start, end, name in iomem if name == "Soft Reserved"
        ],
    }


def observe_dax(host: Host) -> list[dict[str, t.Any]]:
    """Dax devices of every origin (CXL region, soft-reserved memory, NVDIMM) with their memory blocks."""
    found = []
    block = block_size(host)
    for name in host.names(DAX):
        path = f"{DAX}/{name}"
        region = _DAX_REGION.search("/".join(real_parts(host, path)))
        zones = [zone_of(host, name) for name in dax_blocks(host, path, block)]
        driver = host.link_name(f"{path}/driver")
        found.append(
            {
                "name": name,
                "region": region.group(1) if region else "",
                "namespace_uuid": host.read(f"{path}/../uuid"),
                "mode": _MODES.get(driver, driver),
                "size_bytes": host.read_int(f"{path}/size", 0),
                "resource": host.read(f"{path}/resource"),
                "target_node": host.read_int(f"{path}/target_node", -1),
                "align_bytes": host.read_int(f"{path}/align", 0),
                "online_blocks": len(zones) - zones.count("offline"),
                "total_blocks": len(zones),
                "zone": zones[0] if len(set(zones)) == 1 else "mixed" if zones else "offline",
                "online": bool(zones) and "offline" not in zones,
                "movable": set(zones) <= {"movable", "offline"} if set(zones) - {"offline"} else None,
            }
        )
    return found


def real_parts(host: Host, path: str) -> list[str]:
    """The components of a device's real path below /sys/devices."""
    real = os.path.realpath(host.path(path))
    return real[len(os.path.realpath(host.path("/sys/devices"))) + 1 :].split("/")


def dax_blocks(host: Host, path: str, block: int) -> list[str]:
    """The memory blocks (directories) that a dax device's ranges cover, as far as they exist."""
    found = []
    for mapping in host.glob(f"{path}/mapping[0-9]*"):
        start, end = host.read_int(f"{mapping}/start"), host.read_int(f"{mapping}/end")
        if block and start is not None and end is not None:
            found += [f"{MEMORY}/memory{number}" for number in range(start // block, end // block + 1)]
    return [path for path in found if host.exists(path)]


def _used_capacity(host: Host) -> dict[tuple[str, str], int]:
    """(memdev, ram or pmem) -> bytes that endpoint decoders have taken from it."""
    used: dict[tuple[str, str], int] = {}
    for path in host.glob(f"{DEVICES}/decoder[0-9]*"):
        if host.read(f"{path}/devtype") != "cxl_decoder_endpoint":
            continue
        key = (_decoder_memdev(host, path), host.read(f"{path}/mode"))
        used[key] = used.get(key, 0) + (host.read_int(f"{path}/dpa_size", 0) or 0)
    return used


def _decoder_memdev(host: Host, path: str) -> str:
    """The memory device whose endpoint has this decoder."""
    return os.path.basename(os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(host.path(path))), "uport")))


def _memdev(host: Host, path: str, used: t.Mapping[tuple[str, str], int]) -> dict[str, t.Any]:
    name = os.path.basename(path)
    where = real_parts(host, path)
    sizes = {kind: host.read_int(f"{path}/{kind}/size", 0) or 0 for kind in ("ram", "pmem")}
    return {
        "name": name,
        "serial": hex(host.read_int(f"{path}/serial", 0) or 0),
        "pci_address": next((part for part in reversed(where) if _PCI.match(part)), ""),
        "host_bridge": next((part for part in where if _BRIDGE.match(part)), ""),
        "ram_bytes": sizes["ram"],
        "pmem_bytes": sizes["pmem"],
        "ram_free_bytes": sizes["ram"] - used.get((name, "ram"), 0),
        "pmem_free_bytes": sizes["pmem"] - used.get((name, "pmem"), 0),
        "label_bytes": host.read_int(f"{path}/label_storage_size", 0) or 0,
        "numa_node": host.read_int(f"{path}/numa_node", -1),
        "route": [part for part in where if _PCI.match(part)],
        "firmware": host.read(f"{path}/firmware_version"),
        "enabled": host.exists(f"{path}/driver"),
    }


def _region(host: Host, path: str, memdevs: t.Mapping[str, Facts]) -> dict[str, t.Any]:
    ways = host.read_int(f"{path}/interleave_ways", 0) or 0
    targets = [host.read(f"{path}/target{position}") for position in range(ways)]
    names = [_decoder_memdev(host, f"{DEVICES}/{target}") for target in targets if target]
    members = [memdevs[name] for name in names if name in memdevs]
    root = next((part for part in reversed(real_parts(host, path)[:-1]) if part.startswith("decoder")), "")
    committed = host.read_int(f"{path}/commit", 0) == 1
    # Locked by firmware: newer kernels say it of the region, older ones of its decoders.
    locks = [f"{path}/locked", *(f"{DEVICES}/{target}/locked" for target in targets if target)]
    return {
        "name": os.path.basename(path),
        "decoder": root,
        "type": host.read(f"{path}/mode"),
        "state": "uncommitted" if not committed else "committed" if host.exists(f"{path}/driver") else "disabled",
        "start": host.read_int(f"{path}/resource"),
        "size_bytes": host.read_int(f"{path}/size", 0) or 0,
        "interleave_ways": ways,
        "interleave_granularity": host.read_int(f"{path}/interleave_granularity", 0) or 0,
        "memdevs": [member["serial"] for member in members],
        "pci_addresses": [member["pci_address"] for member in members],
        "locked": any(host.read_int(lock, 0) == 1 for lock in locks),
        "access": {
            name: values
            for name in ("access0", "access1")
            for values in [
                {
                    key: value
                    for key in ("read_bandwidth", "write_bandwidth", "read_latency", "write_latency")
                    for value in [host.read_int(f"{path}/{name}/{key}")]
                    if value
                }
            ]
            if values
        },
    }


def _decoder(
    host: Host, path: str, regions: t.Sequence[Facts], iomem: t.Sequence[tuple[int, int, str]]
) -> dict[str, t.Any]:
    name = os.path.basename(path)
    start, size = host.read_int(f"{path}/start", 0) or 0, host.read_int(f"{path}/size", 0) or 0
    bus = os.path.dirname(os.path.realpath(host.path(path)))
    targets = [
        os.path.basename(os.path.realpath(os.path.join(bus, f"dport{number}")))
        for number in host.read(f"{path}/target_list").split(",")
        if number
    ]
    return {
        "name": name,
        "ram": host.read_int(f"{path}/cap_ram", 0) == 1,
        "pmem": host.read_int(f"{path}/cap_pmem", 0) == 1,
        "start": start,
        "size_bytes": size,
        "available_bytes": max(
            length for _at, length in gaps({"name": name, "start": start, "size_bytes": size}, regions)
        ),
        "interleave_ways": host.read_int(f"{path}/interleave_ways", 0) or 0,
        "interleave_granularity": host.read_int(f"{path}/interleave_granularity", 0) or 0,
        "targets": targets,
        "target_uids": [host.read(f"/sys/devices/{target}/firmware_node/uid") for target in targets],
        "qos_class": host.read_int(f"{path}/qos_class"),
        "locked": host.read_int(f"{path}/locked", 0) == 1,
        # Firmware that gives CXL memory to the kernel as plain RAM leaves nothing to manage here.
        "firmware_ram_bytes": sum(
            min(last, start + size - 1) - max(first, start) + 1
            for first, last, what in iomem
            if what == "System RAM" and first < start + size and last >= start
        ),
    }


def gaps(decoder: Facts, regions: t.Sequence[Facts]) -> list[tuple[int, int]]:
    """The free ranges of a window as (start, length), lowest first."""
    taken = sorted(
        (region["start"], region["size_bytes"])
        for region in regions
        if region["decoder"] == decoder["name"] and region["start"] is not None
    )
    found, at = [], decoder["start"]
    for start, size in taken:
        found.append((at, start - at))
        at = start + size
    return [*found, (at, decoder["start"] + decoder["size_bytes"] - at)]


def _iomem(host: Host) -> list[tuple[int, int, str]]:
    """The physical address map as (first, last, owner)."""
    found = []
    for line in host.read("/proc/iomem").splitlines():
        match = re.match(r"\s*([0-9a-f]+)-([0-9a-f]+) : (.*)", line)
        if match:
            found.append((int(match.group(1), 16), int(match.group(2), 16), match.group(3)))
    return found


# -- regions as a resource ------------------------------------------------------

UNIT = 256 << 20  # a region's size is a multiple of this for each of its devices
_WAYS = (1, 2, 3, 4, 6, 8, 12, 16)
_GRANULARITIES = tuple(256 << shift for shift in range(7))


@dataclass(frozen=True)
class Wish:
    """One item of ``regions``, validated."""

    option: str
    type: str
    memdevs: tuple[str, ...]
    size: int | None
    host_bridges: tuple[str, ...]
    granularity: int | None
    present: bool

    @property
    def name(self) -> str:
        """The region's name for people, as far as the wish alone tells it."""
        return f"{self.type} region {'+'.join(sorted(self.memdevs))}"


# The options as Ansible checks them; what they mean is in the documentation of the module cxl_region.
OPTIONS: dict[str, t.Any] = {
    "regions": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "type": {"type": "str", "required": True, "choices": ["ram", "pmem"]},
            "memdevs": {"type": "list", "elements": "str", "required": True},
            "size": {"type": "str"},
            "host_bridges": {"type": "list", "elements": "str"},
            "interleave_ways": {"type": "int"},
            "interleave_granularity": {"type": "int"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
    },
    "leave_offline": {"type": "bool", "default": False},
    "allow_memory_in_use": {"type": "bool", "default": False},
    "destroy_persistent_data": {"type": "bool", "default": False},
    "persist": {"type": "bool", "default": True},
}


class CxlRegions:
    """Regions of CXL memory, known by their type and the set of their devices.

    :param desired: ``regions`` and the switches as module ``cxl_region`` documents them
    """

    def __init__(self, host: Host, desired: Facts) -> None:
        self.host = host
        self.predicting = False
        self.desired = desired
        self.wishes = [_wish(f"regions[{index}]", item) for index, item in enumerate(desired.get("regions") or [])]
        self.notes: list[str] = []

    def observe(self) -> dict[str, t.Any]:
        """CXL as it is, and who uses the memory of regions that are to go."""
        if self.desired.get("wait_seconds"):
            try:
                self.host.wait(self._arrived, "CXL devices", float(self.desired["wait_seconds"]))
            except HostError:
                pass  # plan() says which device is missing
        observed = observe_cxl(self.host)
        observed["users"] = {}
        for wish in self.wishes:
            members = _members(wish, observed["memdevs"], strict=False)
            region = find_region(observed["regions"], wish.type, members) if members and not wish.present else None
            if region is not None:
                observed["users"][region["name"]] = self._users(region, observed["dax"])
        return observed

    def _arrived(self) -> bool:
        memdevs = [_memdev(self.host, path, {}) for path in self.host.glob(f"{DEVICES}/mem[0-9]*")]
        memdevs = [memdev for memdev in memdevs if memdev["enabled"]]
        return all(_members(wish, memdevs, strict=False) for wish in self.wishes)

    def _users(self, region: Facts, dax: t.Sequence[Facts]) -> list[str]:
        found = []
        for device in dax:
            if device["region"] != region["name"]:
                continue
            found += processes(self.host, "maps", f"/dev/{device['name']}")
            if device["online_blocks"]:
                found += memory_users(self.host, device["target_node"])
        mounts = {line.split()[0]: line.split()[1] for line in self.host.read("/proc/mounts").splitlines() if line}
        swaps = [line.split()[0] for line in self.host.read("/proc/swaps").splitlines()]
        for block in self.host.names("/sys/class/block"):
            path, node = f"/sys/class/block/{block}", f"/dev/{block}"
            if region["name"] not in real_parts(self.host, path):
                continue
            found += [f"{node} mounted on {mounts[node]}"] if node in mounts else []
            found += [f"{node} is swap"] if node in swaps else []
            for holder in self.host.names(f"{path}/holders"):
                found.append(f"{node} held by {self.host.read(f'/sys/class/block/{holder}/dm/name') or holder}")
        return found

    # -- plan ---------------------------------------------------------------

    def plan(self, observed: Facts) -> list[Step]:
        """Teardowns first, since they free devices; then enabling and making, in the order of the list."""
        self.notes = []
        state = copy.deepcopy(dict(observed))
        steps, lacking = list[Step](), list[Step]()
        booting = bool(self.desired.get("wait_seconds"))
        members: dict[str, list[Facts]] = {}
        for wish in self.wishes:
            with each_alone(booting, wish.name, lacking):
                members[wish.option] = self._resolve(wish, state["memdevs"])
        wishes = [wish for wish in self.wishes if wish.option in members]
        _check_overlap(wishes, members)
        for wish in wishes:
            region = find_region(state["regions"], wish.type, members[wish.option])
            if not wish.present and region is not None:
                steps.append(self._teardown(wish, region, state))
        for wish in wishes:
            if wish.present:
                with each_alone(booting, wish.name, lacking):
                    steps += self._bring_up(wish, members[wish.option], state)
        return steps + lacking + self._persist()

    def _resolve(self, wish: Wish, memdevs: t.Sequence[Facts]) -> list[Facts]:
        if self.predicting and not memdevs:
            self.notes.append(
                f"{wish.option}: the host shows no CXL memory device yet; it is taken as loaded by an earlier task"
            )
            return []
        return _members(wish, memdevs, strict=True)

    def _teardown(self, wish: Wish, region: Facts, state: dict[str, t.Any]) -> Step:
        if region["locked"]:
            raise Refused(
                f"{wish.option}.state",
                "absent",
                f"firmware made the {label(region)} and locked its decoders",
                "Change the memory setup in the firmware, or leave this region out",
            )
        users = state["users"].get(region["name"], [])
        if users and not self.desired.get("allow_memory_in_use"):
            raise Refused(
                f"{wish.option}.state",
                "absent",
                f"the memory of the {label(region)} is in use: {', '.join(users)}",
                "Stop the users, or set allow_memory_in_use: true to have pages moved to other nodes",
            )
        if region["type"] == "pmem" and not self.desired.get("destroy_persistent_data"):
            raise Refused(
                f"{wish.option}.state",
                "absent",
                f"the {label(region)} is persistent: all data in its {format_size(region['size_bytes'])} would be lost",
                "Set destroy_persistent_data: true if nothing in it is needed",
            )
        _remove(state, region)
        return Step(
            "destroy",
            label(region),
            before=summary(region),
            why="declared absent" + (f"; in use: {', '.join(users)}" if users else ""),
            disruptive=True,
            data=("destroy", region),
        )

    def _bring_up(self, wish: Wish, members: t.Sequence[Facts], state: dict[str, t.Any]) -> list[Step]:
        if not members:
            after = {"type": wish.type, "interleave_ways": len(wish.memdevs), "size_bytes": wish.size}
            return [Step("create", wish.name, after=after)]
        steps = []
        for region in [region for region in state["regions"] if region["state"] == "uncommitted"]:
            addresses = set(region["pci_addresses"])
            if addresses and not region["locked"] and addresses <= {member["pci_address"] for member in members}:
                why = "left unfinished by an interrupted run; it decodes nothing"
                steps.append(Step("destroy", label(region), summary(region), why=why, data=("destroy", region)))
                _remove(state, region)
        region = find_region(state["regions"], wish.type, members)
        if region is None:
            return [*steps, self._creation(wish, members, state)]
        _check_same(wish, region)
        if region["state"] == "disabled":
            after = {**summary(region), "state": "committed"}
            steps.append(Step("enable", label(region), summary(region), after, data=("enable", region)))
        return steps

    def _creation(self, wish: Wish, members: t.Sequence[Facts], state: dict[str, t.Any]) -> Step:
        for member in members:
            _check_member(wish, member, state["regions"], state["decoders"])
        decoder = _window(wish, members, state["decoders"])
        root_ways, ways = decoder["interleave_ways"], len(members)
        if root_ways > 1 and wish.granularity not in (None, decoder["interleave_granularity"]):
            raise Refused(
                f"{wish.option}.interleave_granularity",
                wish.granularity,
                f"the window interleaves {root_ways} host bridges at {decoder['interleave_granularity']} bytes, "
                "and its regions can only do the same",
                f"Leave it out or set {decoder['interleave_granularity']}",
            )
        granularity = decoder["interleave_granularity"] if root_ways > 1 else wish.granularity
        step = UNIT * ways
        possible = min(
            min(member[f"{wish.type}_free_bytes"] for member in members) // UNIT * step,
            max(length for _at, length in gaps(decoder, state["regions"])) // step * step,
        )
        size = possible if wish.size is None else wish.size
        if not 0 < size <= possible:
            raise Refused(
                f"{wish.option}.size",
                "all" if wish.size is None else format_size(wish.size),
                f"{ways} devices with {', '.join(format_size(m[f'{wish.type}_free_bytes']) for m in members)} free and "
                f"a window with {format_size(decoder['available_bytes'])} free give {format_size(possible)} at most",
                f"Give a size up to {format_size(possible)}" if possible else "Free the devices or the window first",
            )
        ordered = _ordered(wish, members, decoder["targets"])
        region = {
            "name": "",
            "decoder": decoder["name"],
            "type": wish.type,
            "state": "committed",
            "start": next(at for at, length in gaps(decoder, state["regions"]) if length >= size),
            "size_bytes": size,
            "interleave_ways": ways,
            "interleave_granularity": granularity,
            "memdevs": [member["serial"] for member in ordered],
            "pci_addresses": [member["pci_address"] for member in ordered],
            "locked": False,
        }
        _add(state, region)
        argv = ["cxl", "create-region", "-t", wish.type, "-d", decoder["name"], "-s", str(size), "-w", str(ways)]
        argv += (["-g", str(granularity)] if granularity and ways > 1 else []) + ["-m", *(m["name"] for m in ordered)]
        return Step("create", label(region), after=summary(region), data=("create", argv, region))

    def _persist(self) -> list[Step]:
        if "persist" not in self.desired:
            return []
        regions = [item for item in self.desired["regions"] if item.get("state", "present") == "present"]
        if not regions or not self.desired["persist"]:
            return persist_plan(self.host, "cxl", None)
        stored = [{key: value for key, value in item.items() if value is not None} for item in regions]
        leave_offline = bool(self.desired.get("leave_offline"))
        return persist_plan(
            self.host, "cxl", {"regions": stored, "leave_offline": leave_offline, "wait_seconds": WAIT_SECONDS}
        )

    # -- apply --------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step; what fails is undone."""
        if persist_apply(self.host, step):
            return
        verb, data = step.data[0], step.data[1:]
        with self.host.lock("memory"):
            if verb == "create":
                self._create(*data)
            elif verb == "enable":
                self._enable(data[0])
            else:
                self._destroy(data[0])

    def _create(self, argv: t.Sequence[str], wanted: Facts) -> None:
        before = set(self.host.names(DEVICES))
        with auto_online(self.host, "offline" if self.desired.get("leave_offline") else None):
            done = self.host.run(argv, timeout_seconds=120, check=False)
            if done.rc == 0:
                self._settle(wanted)
        if done.rc != 0:
            for name in self.host.names(DEVICES):
                if name.startswith("region") and name not in before:
                    self.host.run(["cxl", "destroy-region", name], check=False)
            raise HostError(f"{done.text}. {_explain(self.host, done)}")
        try:
            mismatch = json.loads(done.stdout).get("qos_class_mismatch")
        except (ValueError, AttributeError):
            mismatch = False
        if mismatch:
            self.notes.append(
                f"{label(wanted)}: the devices' performance class differs from the one the window is meant for "
                "(qos_class_mismatch); the region works, perhaps not as fast as others in this window"
            )

    def _settle(self, wanted: Facts) -> None:
        """Wait for the region and, if it is RAM, for its dax device to have a driver."""

        def ready() -> bool:
            observed = observe_cxl(self.host)
            region = next(
                (r for r in observed["regions"] if set(r["pci_addresses"]) == set(wanted["pci_addresses"])), None
            )
            if region is None or region["state"] != "committed" or region["type"] != wanted["type"]:
                return False
            drivers = [d["mode"] for d in observed["dax"] if d["name"] in region["dax"]]
            return region["type"] != "ram" or (bool(drivers) and "disabled" not in drivers)

        try:
            self.host.wait(ready, f"dax device of the {label(wanted)}", 30)
        except HostError as error:
            self.notes.append(f"{error}. Check that the kernel has CONFIG_DEV_DAX_CXL and CONFIG_DEV_DAX_KMEM")

    def _enable(self, region: Facts) -> None:
        with auto_online(self.host, "offline" if self.desired.get("leave_offline") else None):
            self.host.run(["cxl", "enable-region", region["name"]])
            self._settle(region)

    def _destroy(self, region: Facts) -> None:
        zones: dict[str, str] = {}
        try:
            block = block_size(self.host)
            for name in region.get("dax", []):
                zones.update(offline_dax(self.host, name, dax_blocks(self.host, f"{DAX}/{name}", block)))
            if region["state"] == "committed":
                self.host.run(["cxl", "disable-region", region["name"]], timeout_seconds=120)
        except HostError:
            online_blocks(self.host, {path: zone for path, zone in zones.items() if self.host.exists(path)})
            raise
        done = self.host.run(["cxl", "destroy-region", region["name"]], timeout_seconds=120, check=False)
        if done.rc != 0:
            if region["state"] == "committed":
                self.host.run(["cxl", "enable-region", region["name"]], check=False)
            raise HostError(f"the {label(region)} cannot be destroyed and was enabled again: {done.text}")

    def result(self, observed: Facts) -> dict[str, t.Any]:
        """The declared regions as they are, in the order of the list."""
        found = []
        for wish in self.wishes:
            members = _members(wish, observed["memdevs"], strict=False)
            region = find_region(observed["regions"], wish.type, members)
            if region is None:
                found.append({"type": wish.type, "memdevs": list(wish.memdevs), "state": "absent"})
            else:
                nodes = [d["target_node"] for d in observed["dax"] if d["name"] in region["dax"]]
                found.append({**summary(region), "dax": region["dax"], "numa_nodes": nodes})
        return {"regions": found, "warnings": self.notes}


WAIT_SECONDS = 90  # how long the boot unit waits for devices that a wish names


def label(region: Facts) -> str:
    """A region's name for people: its identity, without numbers of this boot."""
    return f"{region['type']} region {'+'.join(sorted(_identities(region)))}"


def _identities(region: Facts) -> list[str]:
    return [s if s != "0x0" else address for s, address in zip(region["memdevs"], region["pci_addresses"])]


def summary(region: Facts) -> dict[str, t.Any]:
    """What a plan and a result show of a region."""
    keys = ("type", "state", "size_bytes", "interleave_ways", "interleave_granularity", "memdevs")
    return {key: region[key] for key in keys}


def find_region(regions: t.Sequence[Facts], kind: str, members: t.Sequence[Facts]) -> Facts | None:
    """The region that has this identity, or None."""
    wanted = {member["pci_address"] for member in members}
    return next(
        (
            region
            for region in regions
            if wanted
            and region["type"] == kind
            and set(region["pci_addresses"]) == wanted
            and region["state"] != "uncommitted"
        ),
        None,
    )


def check_memdevs(option: str, values: t.Any) -> tuple[str, ...]:
    """Normalized serials (hexadecimal) and PCI addresses."""
    found = []
    for index, value in enumerate(values or []):
        text = str(value).strip().lower()
        if not _PCI.match(text):
            try:
                text = hex(int(text, 0))
            except ValueError:
                raise Refused(
                    f"{option}[{index}]",
                    value,
                    "neither a serial number nor a PCI address",
                    "Write a serial such as 0x1 or a PCI address in quotes such as '0000:0d:00.0' "
                    "(without quotes YAML reads some addresses as numbers)",
                ) from None
        if text in found:
            raise Refused(f"{option}[{index}]", value, "given twice", "Name each memory device once")
        found.append(text)
    if not found:
        raise Refused(option, list(values or []), "no memory device is named", "List serials or PCI addresses")
    return tuple(found)


def find_memdevs(option: str, names: t.Sequence[str], memdevs: t.Sequence[Facts]) -> list[Facts]:
    """The memory devices with these serials or PCI addresses; each must be exactly one."""
    found: list[Facts] = []
    for index, name in enumerate(names):
        matches = [memdev for memdev in memdevs if name in (memdev["serial"], memdev["pci_address"])]
        if len(matches) != 1:
            known = ", ".join(f"{memdev['serial']} ({memdev['pci_address']})" for memdev in memdevs) or "none"
            raise Refused(
                f"{option}[{index}]",
                name,
                "several CXL memory devices have this serial" if matches else "no CXL memory device has it",
                f"Name one of the host's devices by its PCI address or unique serial: {known}",
            )
        if matches[0] in found:
            raise Refused(f"{option}[{index}]", name, "is a device that the list already has", "Name each device once")
        found.append(matches[0])
    return found


def _members(wish: Wish, memdevs: t.Sequence[Facts], strict: bool) -> list[Facts]:
    try:
        return find_memdevs(f"{wish.option}.memdevs", wish.memdevs, memdevs)
    except Refused:
        if strict:
            raise
        return []


def _wish(option: str, item: Facts) -> Wish:
    kind = item.get("type")
    if kind not in ("ram", "pmem"):
        raise Refused(f"{option}.type", kind, "not a kind of CXL memory", "Set ram or pmem")
    state = item.get("state") or "present"
    if state not in ("present", "absent"):
        raise Refused(f"{option}.state", state, "not a state of a region", "Set present or absent")
    memdevs = check_memdevs(f"{option}.memdevs", item.get("memdevs"))
    ways = item.get("interleave_ways") or len(memdevs)
    if ways not in _WAYS:
        raise Refused(
            f"{option}.interleave_ways" if item.get("interleave_ways") else f"{option}.memdevs",
            ways,
            "CXL cannot interleave this many ways",
            f"Use {', '.join(map(str, _WAYS[:-1]))} or {_WAYS[-1]} devices",
        )
    if ways != len(memdevs):
        raise Refused(
            f"{option}.interleave_ways",
            ways,
            f"{len(memdevs)} memory devices are listed, and each way needs one",
            f"Set {len(memdevs)}, leave it out, or list {ways} devices",
        )
    granularity = item.get("interleave_granularity")
    if granularity is not None:
        granularity = parse_size(f"{option}.interleave_granularity", granularity)
        if granularity not in _GRANULARITIES:
            raise Refused(
                f"{option}.interleave_granularity",
                item["interleave_granularity"],
                "not a granularity of CXL",
                f"Set one of {', '.join(map(str, _GRANULARITIES))} bytes, or leave it to the window",
            )
    size = item.get("size")
    return Wish(
        option,
        kind,
        memdevs,
        None if size in (None, "all") else parse_size(f"{option}.size", size, UNIT * ways),
        tuple(str(bridge) for bridge in item.get("host_bridges") or []),
        granularity,
        state == "present",
    )


def _check_overlap(wishes: t.Sequence[Wish], members: t.Mapping[str, t.Sequence[Facts]]) -> None:
    owner: dict[tuple[str, str], str] = {}
    for wish in wishes:
        for index, member in enumerate(members[wish.option]):
            other = owner.setdefault((wish.type, member["pci_address"]), wish.option)
            if other != wish.option:
                raise Refused(
                    f"{wish.option}.memdevs[{index}]",
                    wish.memdevs[index],
                    f"{other} has this memory device as well",
                    f"Give each device to one {wish.type} region",
                )


def _check_same(wish: Wish, region: Facts) -> None:
    """A region with the wished identity must have the wished form: it cannot be changed in place."""
    made = "Firmware made and locked it" if region["locked"] else "A region cannot be changed in place"
    remedy = f"{made}: " + (
        "declare it as it is"
        if region["locked"]
        else "declare it as it is, or absent first, which takes its memory away"
    )
    if wish.size not in (None, region["size_bytes"]):
        text = f"the region exists with {format_size(region['size_bytes'])}"
        raise Refused(f"{wish.option}.size", format_size(wish.size or 0), text, remedy)
    if region["interleave_ways"] > 1 and wish.granularity not in (None, region["interleave_granularity"]):
        text = f"the region exists with {region['interleave_granularity']}"
        raise Refused(f"{wish.option}.interleave_granularity", wish.granularity, text, remedy)


def _check_member(wish: Wish, member: Facts, regions: t.Sequence[Facts], decoders: t.Sequence[Facts]) -> None:
    """Each reason why a device cannot be a part of a new region."""
    option = f"{wish.option}.memdevs"
    name = f"{member['serial']} ({member['pci_address']})"
    if not member["enabled"]:
        raise Refused(
            option, name, "the kernel did not enable this memory device", "See the kernel log for the device's errors"
        )
    if not member[f"{wish.type}_bytes"]:
        other = "pmem" if wish.type == "ram" else "ram"
        raise Refused(
            option,
            name,
            f"the device has no {wish.type} capacity ({format_size(member[f'{other}_bytes'])} {other})",
            f"Declare type {other}, or partition the device with cxl set-partition",
        )
    if wish.type == "pmem" and not (member["label_bytes"] and member["serial"] != "0x0"):
        raise Refused(
            option,
            name,
            "persistent memory needs a label area and a serial number, and the device lacks one of them",
            "Use another device (QEMU: give it lsa= and sn=)",
        )
    if member[f"{wish.type}_free_bytes"] >= UNIT:
        return
    holder = next((r for r in regions if r["type"] == wish.type and member["pci_address"] in r["pci_addresses"]), None)
    plain = next((d for d in decoders if d["firmware_ram_bytes"] and member["host_bridge"] in d["targets"]), None)
    if holder is not None:
        remedy = (
            "Firmware made and locked it: declare it as it is, or change the firmware's memory setup"
            if holder["locked"]
            else "Declare that region absent first, or leave the device to it"
        )
        raise Refused(option, name, f"the {label(holder)} has all of the device's memory", remedy)
    problem = "all of the device's memory is taken, though not by a region that the kernel shows"
    if plain is not None:
        problem = "firmware gave the device's memory to the kernel as ordinary RAM, so that nothing is left to manage"
    raise Refused(
        option,
        name,
        problem,
        "Set the firmware option 'CXL Memory Attribute' (specific-purpose memory) and boot without efi=nosoftreserve",
    )


def _window(wish: Wish, members: t.Sequence[Facts], decoders: t.Sequence[Facts]) -> Facts:
    """The root decoder whose host bridges interleave as the devices are placed."""
    placed = sorted(member["host_bridge"] for member in members)
    fitting, reasons = [], []
    for decoder in sorted(decoders, key=lambda decoder: t.cast(int, decoder["start"])):
        targets, root_ways = decoder["targets"], decoder["interleave_ways"]
        where = f"window of {'+'.join(targets)}"
        names = set(targets) | set(decoder["target_uids"])
        share, rest = divmod(len(members), root_ways or 1)
        if wish.host_bridges and not (set(wish.host_bridges) <= names and len(wish.host_bridges) == len(targets)):
            reasons.append(f"{where}: not the one that host_bridges selects")
        elif not decoder[wish.type]:
            reasons.append(f"{where}: not for {wish.type}")
        elif set(placed) - set(targets):
            reasons.append(f"{where}: does not reach {', '.join(sorted(set(placed) - set(targets)))}")
        elif rest or share & (share - 1):
            reasons.append(
                f"{where}: interleaves {root_ways} host bridges, so that a region has {root_ways} times "
                "1, 2, 4 or 8 devices"
            )
        elif placed != sorted(list(targets) * share):
            reasons.append(f"{where}: needs {share} of the devices behind each of its host bridges")
        else:
            fitting.append(decoder)
    if not fitting:
        option = "host_bridges" if wish.host_bridges else "memdevs"
        raise Refused(
            f"{wish.option}.{option}",
            list(wish.host_bridges or wish.memdevs),
            f"no CXL window can hold devices behind {', '.join(placed)}: {'; '.join(reasons) or 'the host has none'}",
            "Choose devices that fit a window (ansible_facts.metal.cxl.decoders), or change the platform's windows",
        )
    need = wish.size or UNIT * len(members)
    return next((decoder for decoder in fitting if decoder["available_bytes"] >= need), fitting[0])


def _ordered(wish: Wish, members: t.Sequence[Facts], targets: t.Sequence[str]) -> list[Facts]:
    """The devices in interleave order: round robin over host bridges, root ports and switch ports."""

    def spread(group: list[Facts], depth: int) -> list[Facts]:
        if len(group) == 1:
            return group
        branches: dict[str, list[Facts]] = {}
        for member in group:
            branches.setdefault(member["route"][depth], []).append(member)
        return deal([spread(branch, depth + 1) for branch in branches.values()])

    def deal(branches: list[list[Facts]]) -> list[Facts]:
        if len({len(branch) for branch in branches}) != 1:
            counts = ", ".join("+".join(member["pci_address"] for member in branch) for branch in branches)
            raise Refused(
                f"{wish.option}.memdevs",
                list(wish.memdevs),
                f"the devices are not spread evenly over ports: {counts}",
                "Give each port on the way the same number of devices",
            )
        return [branch[position] for position in range(len(branches[0])) for branch in branches]

    behind: dict[str, list[Facts]] = {target: [] for target in targets}
    for member in members:
        behind[member["host_bridge"]].append(member)
    return deal([spread(group, 0) for group in behind.values()])


def _remove(state: dict[str, t.Any], region: Facts) -> None:
    """The state without a region: its devices and its part of the window are free."""
    state["regions"] = [other for other in state["regions"] if other["name"] != region["name"]]
    _account(state, region, +1)


def _add(state: dict[str, t.Any], region: Facts) -> None:
    state["regions"] = [*state["regions"], region]
    _account(state, region, -1)


def _account(state: dict[str, t.Any], region: Facts, sign: int) -> None:
    for member in state["memdevs"]:
        if member["pci_address"] in region["pci_addresses"]:
            member[f"{region['type']}_free_bytes"] += sign * region["size_bytes"] // region["interleave_ways"]
    for decoder in state["decoders"]:
        decoder["available_bytes"] = max(length for _at, length in gaps(decoder, state["regions"]))


def _explain(host: Host, done: Completed) -> str:
    """The likely cause of a region that could not be made, and the remedy."""
    log = [line for line in host.run(["dmesg"], check=False).stdout.splitlines() if "cxl" in line.lower()][-20:]
    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", host.read("/proc/cpuinfo"), re.M)
    if done.rc == 127:
        return "Install the package cxl (Debian, Ubuntu) or cxl-cli (RHEL, Fedora, openEuler)"
    if "CPU cache state" in "".join(log) or (virtual and "No such device or address" in done.text):
        return (
            "The kernel cannot invalidate CPU caches in a virtual machine. Start the machine without the hypervisor "
            "bit (QEMU: -cpu max,-hypervisor), or use a kernel with CONFIG_CXL_REGION_INVALIDATION_TEST"
        )
    if "set target" in done.text:
        return (
            "A device is not where the window's interleaving expects it: check the order and the ports of the devices"
        )
    if "No space left" in done.text:
        return "The window or a device has no range of this size left: use a smaller size or destroy another region"
    return f"The kernel log says: {log[-1]}" if log else "The kernel log says nothing of it"
