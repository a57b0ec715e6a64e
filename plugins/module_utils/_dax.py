# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dax devices as system memory in a chosen zone or as character devices with a chosen owner.

Names such as dax0.0 are of one boot: a device is known by the memory devices of
its CXL region, by its NUMA node or by its namespace's UUID.
"""

from __future__ import annotations

import os
import re
import stat
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._boot import each_alone, persist_apply, persist_plan
from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import (
    DAX,
    WAIT_SECONDS,
    Facts,
    check_memdevs,
    dax_blocks,
    find_memdevs,
    find_region,
    observe_cxl,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import (
    AUTO_ONLINE,
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

POLICIES = ("keep", "offline", "online", "online_kernel", "online_movable")
ZONES = ("movable", "kernel", "any", "offline")
LINKS = "/dev/agentfleet/dax"
_RULES = "udev/rules.d/60-agentfleet-dax.rules"
_ONLY = {"system-ram": ("owner", "group", "file_mode", "align"), "devdax": ("online",)}
_PAGE_COST = 64  # one 64-byte struct page for each 4096 bytes


@dataclass(frozen=True)
class Wish:
    """One item of ``devices``, validated."""

    option: str
    memdevs: tuple[str, ...]
    type: str
    numa_node: int | None
    uuid: str
    mode: str
    zone: str
    owner: str
    group: str
    file_mode: str
    align: int | None

    @property
    def identity(self) -> str:
        """The device's name for people and for its link, without numbers of this boot."""
        if self.memdevs:
            return f"{self.type}-{'-'.join(sorted(self.memdevs))}"
        return f"namespace-{self.uuid}" if self.uuid else f"node-{self.numa_node}"


# The options as Ansible checks them; what they mean is in the documentation of the module dax_device.
OPTIONS: dict[str, t.Any] = {
    "devices": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "region": {
                "type": "dict",
                "options": {
                    "memdevs": {"type": "list", "elements": "str", "required": True},
                    "type": {"type": "str", "choices": ["ram", "pmem"], "default": "ram"},
                },
            },
            "numa_node": {"type": "int"},
            "namespace_uuid": {"type": "str"},
            "mode": {"type": "str", "required": True, "choices": ["system-ram", "devdax"]},
            "online": {"type": "str", "choices": list(ZONES)},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "file_mode": {"type": "str"},
            "align": {"type": "str"},
        },
    },
    "auto_online": {"type": "str", "choices": list(POLICIES), "default": "keep"},
    "allow_memory_in_use": {"type": "bool", "default": False},
    "destroy_persistent_data": {"type": "bool", "default": False},
    "persist": {"type": "bool", "default": True},
}


class DaxDevices:
    """Dax devices in their declared mode.

    :param desired: ``devices`` and the switches as module ``dax_device`` documents them
    """

    def __init__(self, host: Host, desired: Facts) -> None:
        self.host = host
        self.predicting = False
        self.desired = desired
        self.wishes = [_wish(f"devices[{index}]", item) for index, item in enumerate(desired.get("devices") or [])]
        self.policy = desired.get("auto_online") or "keep"
        if self.policy not in POLICIES:
            raise Refused("auto_online", self.policy, "not a policy of the kernel", f"Set one of {', '.join(POLICIES)}")
        seen: dict[str, Wish] = {}
        for wish in self.wishes:
            other = seen.setdefault(wish.identity, wish)
            if other is not wish:
                raise Refused(wish.option, wish.identity, f"{other.option} is the same device", "Declare it once")
        # What does not outlast a reboot has its rule where nothing does.
        self.rules = f"/{'run' if desired.get('persist') is False else 'etc'}/{_RULES}"
        self.notes: list[str] = []

    def observe(self) -> dict[str, t.Any]:
        """CXL and dax devices, the nodes in /dev, accounts, and who uses what would change."""
        if self.desired.get("wait_seconds"):
            try:
                self.host.wait(self._arrived, "dax devices", float(self.desired["wait_seconds"]))
            except HostError:
                pass  # plan() says which device is missing
        observed = observe_cxl(self.host)
        observed["auto_online"] = self.host.read(AUTO_ONLINE)
        observed["rules"] = self.host.read(self.rules)
        observed["accounts"] = {
            (base, name): self._account(base, name)
            for wish in self.wishes
            if wish.mode == "devdax"
            for base, name in (("passwd", wish.owner), ("group", wish.group))
        }
        observed["users"], observed["nodes"] = {}, {}
        for wish in self.wishes:
            device = _find(wish, observed)
            if device is None:
                continue
            name = device["name"]
            observed["nodes"][name] = self._node(wish, name)
            if _differs(wish, device):
                observed["users"][name] = processes(self.host, "maps", f"/dev/{name}")
                if device["online_blocks"]:
                    observed["users"][name] += memory_users(self.host, device["target_node"])
        return observed

    def _arrived(self) -> bool:
        observed = observe_cxl(self.host)
        return all((_find(wish, observed) or {"mode": "disabled"})["mode"] != "disabled" for wish in self.wishes)

    def _account(self, base: str, name: str) -> int | None:
        if name in ("root", "0"):
            return 0
        line = self.host.run(["getent", base, name], check=False).stdout.split(":")
        return int(line[2]) if len(line) > 2 else None

    def _node(self, wish: Wish, name: str) -> tuple[int, int, str, bool]:
        """Owner, group and mode of the character device, and whether the stable link points to it."""
        try:
            found = os.stat(self.host.path(f"/dev/{name}"))
        except OSError:
            return -1, -1, "", False
        linked = self.host.link_name(f"{LINKS}/{wish.identity}") == name
        return found.st_uid, found.st_gid, f"{stat.S_IMODE(found.st_mode):04o}", linked

    # -- plan ---------------------------------------------------------------

    def plan(self, observed: Facts) -> list[Step]:
        """The kernel's policy, then each device, then the owners of the character devices."""
        self.notes = []
        steps, lacking = self._policy(observed), list[Step]()
        booting = bool(self.desired.get("wait_seconds"))
        devices: dict[str, Facts | None] = dict.fromkeys(wish.option for wish in self.wishes)
        for wish in self.wishes:
            with each_alone(booting, f"dax device {wish.identity}", lacking):
                device = devices[wish.option] = self._device(wish, observed)
                if device is None or _differs(wish, device):
                    steps.append(self._configuration(wish, device, observed))
        with each_alone(booting, "owners of dax devices", lacking):
            steps += self._ownership(devices, observed)
        return steps + lacking + self._persist()

    def _policy(self, observed: Facts) -> list[Step]:
        before = observed["auto_online"]
        if self.policy in ("keep", before):
            return []
        if not before:
            raise Refused(
                "auto_online",
                self.policy,
                "the kernel cannot hot-plug memory",
                "Use a kernel with CONFIG_MEMORY_HOTPLUG, or set keep",
            )
        return [Step("set", AUTO_ONLINE, before, self.policy, data=("policy",))]

    def _device(self, wish: Wish, observed: Facts) -> Facts | None:
        """The device that a wish means; None when check mode may expect an earlier task to make it."""
        device = _find(wish, observed)
        if device is not None:
            return device
        if self.predicting:
            self.notes.append(f"{wish.option}: {wish.identity} does not exist yet; taken as made by an earlier task")
            return None
        problem, remedy = "no dax device is on this NUMA node", "See ansible_facts.metal.cxl.dax for those there are"
        if wish.uuid:
            problem, remedy = "no devdax namespace has this UUID", "See ndctl list --namespaces --mode devdax"
        if not wish.memdevs:
            raise Refused(wish.option, wish.identity, problem, remedy)
        members = find_memdevs(f"{wish.option}.region.memdevs", wish.memdevs, observed["memdevs"])
        bridges = {member["host_bridge"] for member in members}
        if find_region(observed["regions"], wish.type, members) is None:
            problem, remedy = f"there is no {wish.type} region of these devices", "Declare it with cxl_region first"
            if any(d["firmware_ram_bytes"] for d in observed["decoders"] if bridges & set(d["targets"])):
                problem = "firmware gave the devices' memory to the kernel as ordinary RAM, so there is no dax device"
                remedy = "Set the firmware option 'CXL Memory Attribute' and boot without efi=nosoftreserve"
        elif wish.type == "pmem":
            problem = "the persistent region has no or more than one dax namespace"
            remedy = "Make one with ndctl create-namespace --mode=devdax, or name one of several by namespace_uuid"
        else:
            problem = "the region is there, but has no or more than one dax device"
            remedy = "Check that the kernel has CONFIG_DEV_DAX_CXL; give back parts with daxctl destroy-device"
        raise Refused(f"{wish.option}.region.memdevs", list(wish.memdevs), problem, remedy)

    def _configuration(self, wish: Wish, device: Facts | None, observed: Facts) -> Step:
        after: dict[str, t.Any] = {"mode": wish.mode, **({"zone": wish.zone} if wish.mode == "system-ram" else {})}
        if wish.align:
            after["align_bytes"] = wish.align
        if device is None:
            return Step("configure", f"dax device {wish.identity}", None, after)
        before = {key: device["zone" if key == "zone" else key] for key in ("mode", *list(after)[1:])}
        if device["mode"] == "system-ram":
            before["zone"] = device["zone"]
        users = observed["users"].get(device["name"], [])
        if users and not self.desired.get("allow_memory_in_use"):
            raise Refused(
                f"{wish.option}.mode" if wish.mode != device["mode"] else f"{wish.option}.online",
                wish.mode if wish.mode != device["mode"] else wish.zone,
                f"the device is now {device['mode']} ({device['zone']}) and in use: {', '.join(users)}",
                "Stop the users, or set allow_memory_in_use: true to have pages moved to other nodes. To keep "
                "memory out of use from the start, make the region with leave_offline: true",
            )
        if wish.mode == "system-ram" and wish.mode != device["mode"]:
            self._check_memory(wish, device)
        if wish.align and device["size_bytes"] % wish.align:
            raise Refused(
                f"{wish.option}.align",
                format_size(wish.align),
                f"the device's {format_size(device['size_bytes'])} are not a multiple of it",
                "Use a smaller alignment",
            )
        why = f"in use: {', '.join(users)}" if users else ""
        disruptive = bool(users or device["online_blocks"])
        return Step(
            "configure", f"dax device {wish.identity}", before, after, why, disruptive, ("configure", wish, device)
        )

    def _check_memory(self, wish: Wish, device: Facts) -> None:
        """Whether the device's memory can be added at all: whole blocks, page structures, nothing persistent."""
        if device["namespace_uuid"] and not self.desired.get("destroy_persistent_data"):
            raise Refused(
                f"{wish.option}.mode",
                wish.mode,
                "the device is a persistent namespace: as system memory it loses its data",
                "Set destroy_persistent_data: true if nothing in it is needed",
            )
        size, block = device["size_bytes"], block_size(self.host)
        start = int(device["resource"] or "0", 0)
        whole = (start + size) // block * block - -(-start // block) * block if block else 0
        if whole <= 0:
            raise Refused(
                f"{wish.option}.mode",
                wish.mode,
                f"{format_size(size)} at {start:#x} hold no whole memory block of {format_size(block)}",
                "Use mode devdax, or have firmware align the CXL window to memory blocks",
            )
        if whole < size:
            self.notes.append(
                f"{wish.option}: {format_size(size - whole)} of {format_size(size)} lie outside of whole memory blocks "
                f"of {format_size(block)} and stay unused; align the window in firmware"
            )
        on_memory = self.host.read("/sys/module/memory_hotplug/parameters/memmap_on_memory") in ("Y", "force")
        available = re.search(r"^MemAvailable:\s+(\d+)", self.host.read("/proc/meminfo"), re.M)
        cost = whole // _PAGE_COST
        if available and not on_memory and int(available.group(1)) * 1024 < cost:
            raise Refused(
                f"{wish.option}.mode",
                wish.mode,
                f"the page structures need {format_size(cost)} of other memory, more than what is available",
                "Free memory, or boot with memory_hotplug.memmap_on_memory=1",
            )

    def _ownership(self, devices: t.Mapping[str, Facts | None], observed: Facts) -> list[Step]:
        lines, stale = [], False
        for wish in self.wishes:
            if wish.mode != "devdax":
                continue
            uid, gid = (
                self._checked(wish, option, observed["accounts"][base, name], name)
                for option, base, name in (("owner", "passwd", wish.owner), ("group", "group", wish.group))
            )
            device = devices[wish.option]
            where = 'ATTR{resource}=="(known when the device exists)"'
            if device is not None:
                where = f'ATTR{{resource}}=="{device["resource"]}", ATTR{{size}}=="{device["size_bytes"]}"'
                stale = stale or observed["nodes"][device["name"]] != (uid, gid, wish.file_mode, True)
            lines.append(
                f'SUBSYSTEM=="dax", {where}, OWNER="{wish.owner}", GROUP="{wish.group}", MODE="{wish.file_mode}", '
                f'SYMLINK+="{LINKS[5:]}/{wish.identity}"'
            )
        head = "# Written by agentfleet.metal: who may use dax devices, and links that do not change between boots."
        text = "\n".join([head, *lines]) if lines else ""
        if text == observed["rules"] and not stale:
            return []
        after = text or None
        return [Step("write" if text else "remove", self.rules, observed["rules"] or None, after, data=("rules", text))]

    def _checked(self, wish: Wish, option: str, number: int | None, name: str) -> int | None:
        if number is None and not self.predicting:
            kind = "user" if option == "owner" else "group"
            raise Refused(f"{wish.option}.{option}", name, f"the host has no such {kind}", f"Create the {kind} first")
        if number is None:
            self.notes.append(f"{wish.option}.{option}: {name!r} does not exist yet; taken as made by an earlier task")
        return number

    def _persist(self) -> list[Step]:
        if "persist" not in self.desired:
            return []
        if not self.desired["persist"] or (not self.wishes and self.policy == "keep"):
            return persist_plan(self.host, "dax", None)
        devices = [
            {key: value for key, value in item.items() if value is not None} for item in self.desired["devices"] or []
        ]
        return persist_plan(
            self.host, "dax", {"devices": devices, "auto_online": self.policy, "wait_seconds": WAIT_SECONDS}
        )

    # -- apply --------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step; what fails is undone."""
        if persist_apply(self.host, step):
            return
        verb, data = step.data[0], step.data[1:]
        with self.host.lock("memory"):
            if verb == "policy":
                self.host.poke(AUTO_ONLINE, self.policy)
            elif verb == "rules":
                self._write_rules(data[0])
            else:
                # The policy would bring memory online in a zone of its own, and daxctl refuses to work beside it.
                with auto_online(self.host, "offline"):
                    self._configure(*data)

    def _configure(self, wish: Wish, device: Facts) -> None:
        name, was = device["name"], device["mode"]
        present = {block: zone_of(self.host, block) for block in self._blocks(name)}
        if wish.mode == was == "system-ram" and (wish.zone == "any" or set(present.values()) <= {wish.zone, "offline"}):
            zones = present  # nothing is in a wrong zone, so nothing that is online has to go offline
        else:
            zones = offline_dax(self.host, name, list(present))
        try:
            if wish.mode != was:
                self._reconfigure(name, wish.mode)
            if wish.align and wish.align != device["align_bytes"]:
                # The kernel changes it only without a driver, and daxctl takes drivers only from character devices.
                self.host.run(["daxctl", "disable-device", name])
                self.host.poke(f"{DAX}/{name}/align", str(wish.align))
                self._reconfigure(name, wish.mode)
            if wish.mode == "system-ram":
                blocks = self._blocks(name)
                if not blocks:
                    raise HostError("the kernel added no memory block; its log (dmesg, kmem) has the reason")
                zone = "movable" if wish.zone == "any" else wish.zone
                online_blocks(self.host, {b: zone for b in blocks if wish.zone != "any" or zones.get(b) != "kernel"})
        except HostError:
            self._undo(name, device, zones)
            raise

    def _undo(self, name: str, device: Facts, zones: t.Mapping[str, str]) -> None:
        try:
            offline_dax(self.host, name, self._blocks(name))
            if self.host.read_int(f"{DAX}/{name}/align") != device["align_bytes"]:
                self.host.run(["daxctl", "disable-device", name], check=False)
                self.host.poke(f"{DAX}/{name}/align", str(device["align_bytes"]))
            if device["mode"] in ("system-ram", "devdax"):
                self._reconfigure(name, device["mode"])
            online_blocks(self.host, zones)
        except HostError as error:
            self.notes.append(f"{name} could not be put back to {device['mode']}: {error}")

    def _reconfigure(self, name: str, mode: str) -> None:
        argv = [
            "daxctl",
            "reconfigure-device",
            f"--mode={mode}",
            *(["--no-online"] if mode == "system-ram" else []),
            name,
        ]
        done = self.host.run(argv, timeout_seconds=120, check=False)
        if done.rc == 127:
            raise HostError("daxctl is not installed. Install the package daxctl")
        driver = {"system-ram": "kmem", "devdax": "device_dax"}[mode]
        # Its exit codes differ between versions for "already in this mode"; the driver tells the truth.
        if self.host.link_name(f"{DAX}/{name}/driver") != driver:
            raise HostError(f"{' '.join(argv)}: {done.text or 'no error, but the driver did not change'}")

    def _blocks(self, name: str) -> list[str]:
        return dax_blocks(self.host, f"{DAX}/{name}", block_size(self.host))

    def _write_rules(self, text: str) -> None:
        if text:
            self.host.write(self.rules, text + "\n")
        else:
            self.host.remove(self.rules)
        self.host.run(["udevadm", "control", "--reload"])
        self.host.run(["udevadm", "trigger", "--action=change", "--settle", "--subsystem-match=dax"])

    def result(self, observed: Facts) -> dict[str, t.Any]:
        """The declared devices as they are, in the order of the list."""
        found = []
        for wish in self.wishes:
            device = _find(wish, observed)
            if device is None:
                found.append({"identity": wish.identity, "mode": "absent"})
                continue
            keys = ("name", "mode", "zone", "size_bytes", "align_bytes", "target_node", "online_blocks", "total_blocks")
            link = f"{LINKS}/{wish.identity}" if wish.mode == "devdax" else ""
            found.append({"identity": wish.identity, "link": link, **{key: device[key] for key in keys}})
        return {"devices": found, "warnings": self.notes}


def _differs(wish: Wish, device: Facts) -> bool:
    return (
        wish.mode != device["mode"]
        or (wish.mode == "system-ram" and not (device["online"] if wish.zone == "any" else wish.zone == device["zone"]))
        or wish.align not in (None, device["align_bytes"])
    )


def _find(wish: Wish, observed: Facts) -> Facts | None:
    """The one dax device that a wish selects, or None."""
    if wish.memdevs:
        try:
            members = find_memdevs("", wish.memdevs, observed["memdevs"])
        except Refused:
            return None
        region = find_region(observed["regions"], wish.type, members)
        found = [d for d in observed["dax"] if region is not None and d["region"] == region["name"]]
    elif wish.uuid:
        found = [d for d in observed["dax"] if d["namespace_uuid"].lower() == wish.uuid]
    else:
        found = [d for d in observed["dax"] if d["target_node"] == wish.numa_node]
    return found[0] if len(found) == 1 else None


def _wish(option: str, item: Facts) -> Wish:
    selectors = [key for key in ("region", "numa_node", "namespace_uuid") if item.get(key) is not None]
    if len(selectors) != 1:
        raise Refused(
            option, selectors, "needs exactly one selector", "Set one of region, numa_node and namespace_uuid"
        )
    region = item.get("region") or {}
    kind = region.get("type") or "ram"
    mode = item.get("mode")
    if mode not in _ONLY:
        raise Refused(f"{option}.mode", mode, "not a mode of a dax device", "Set system-ram or devdax")
    for key in _ONLY[mode]:
        if item.get(key) is not None:
            other = "devdax" if mode == "system-ram" else "system-ram"
            raise Refused(
                f"{option}.{key}", item[key], f"has no meaning with mode {mode}", f"Leave it out or use {other}"
            )
    if kind == "pmem" and mode == "system-ram":
        raise Refused(
            f"{option}.mode",
            mode,
            "the region is persistent memory, which would lose its data as system memory",
            "Use devdax, or make a ram region of the devices",
        )
    zone = item.get("online") or "movable"
    if zone not in ZONES:
        raise Refused(f"{option}.online", zone, "not a way to bring memory online", f"Set one of {', '.join(ZONES)}")
    file_mode = str(item.get("file_mode") or "0600")
    if not re.match(r"^0[0-7]{3}$", file_mode):
        raise Refused(
            f"{option}.file_mode",
            item["file_mode"],
            "not four octal digits",
            "Write it in quotes with its leading zero, such as '0660' (YAML reads 0660 without quotes as a number)",
        )
    align = item.get("align")
    align = None if align is None else parse_size(f"{option}.align", align)
    if align not in (None, 4096, 2 << 20, 1 << 30):
        raise Refused(f"{option}.align", item["align"], "not a page size", "Set 4KiB, 2MiB or 1GiB")
    names = {}
    for key in ("owner", "group"):
        names[key] = str(item.get(key) or "root")
        if not re.match(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\$?$", names[key]):
            raise Refused(f"{option}.{key}", names[key], "not the name of an account", "Write a user's or group's name")
    return Wish(
        option,
        check_memdevs(f"{option}.region.memdevs", region.get("memdevs")) if selectors == ["region"] else (),
        kind,
        item.get("numa_node"),
        str(item.get("namespace_uuid") or "").lower(),
        mode,
        zone,
        names["owner"],
        names["group"],
        file_mode,
        align,
    )
