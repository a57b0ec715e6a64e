# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""CXL memory devices, windows and regions: read from sysfs, changed through the ``cxl`` program.

Kernel names (mem0, decoder0.0, region0) are handles of one boot. Outside of this
file devices are known by serial or PCI address, windows by their host bridges
and regions by their type and the set of their devices.
"""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import MEMORY, block_size

DEVICES = "/sys/bus/cxl/devices"
DAX = "/sys/bus/dax/devices"
_BRIDGE = re.compile(r"^pci[0-9a-f]{4}:[0-9a-f]{2}$")
_PCI = re.compile(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
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
        where = real_parts(host, path)
        states, zones = _blocks(host, path, block)
        driver = host.link_name(f"{path}/driver")
        found.append(
            {
                "name": name,
                "region": next((part for part in reversed(where) if re.match(r"region\d+$", part)), ""),
                "path": "/".join(where[:-1]),
                "mode": _MODES.get(driver, driver),
                "size_bytes": host.read_int(f"{path}/size", 0),
                "target_node": host.read_int(f"{path}/target_node", -1),
                "align_bytes": host.read_int(f"{path}/align", 0),
                "online_blocks": states.count("online"),
                "total_blocks": len(states),
                "online": bool(states) and driver == "kmem" and set(states) == {"online"},
                "movable": zones == {"Movable"} if zones else None,
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


def _blocks(host: Host, path: str, block: int) -> tuple[list[str], set[str]]:
    """State of each memory block of a dax device, and the zones of those that are online."""
    blocks = dax_blocks(host, path, block)
    states = [host.read(f"{name}/state") for name in blocks]
    zones = {
        (host.read(f"{name}/valid_zones").split() or [""])[0]
        for name, state in zip(blocks, states)
        if state == "online"
    }
    return states, zones


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
        "numa_node": host.read_int(f"{path}/numa_node", -1),
        "firmware": host.read(f"{path}/firmware_version"),
        "enabled": host.exists(f"{path}/driver"),
    }


def _region(host: Host, path: str, memdevs: t.Mapping[str, t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
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
    host: Host, path: str, regions: t.Sequence[t.Mapping[str, t.Any]], iomem: t.Sequence[tuple[int, int, str]]
) -> dict[str, t.Any]:
    name = os.path.basename(path)
    start, size = host.read_int(f"{path}/start", 0) or 0, host.read_int(f"{path}/size", 0) or 0
    bus = os.path.dirname(os.path.realpath(host.path(path)))
    targets = [
        os.path.basename(os.path.realpath(os.path.join(bus, f"dport{number}")))
        for number in host.read(f"{path}/target_list").split(",")
        if number
    ]
    taken = sorted(
        (region["start"], region["size_bytes"])
        for region in regions
        if region["decoder"] == name and region["start"] is not None
    )
    gaps, at = [], start
    for region_start, region_size in taken:
        gaps.append(region_start - at)
        at = region_start + region_size
    gaps.append(start + size - at)
    return {
        "name": name,
        "ram": host.read_int(f"{path}/cap_ram", 0) == 1,
        "pmem": host.read_int(f"{path}/cap_pmem", 0) == 1,
        "start": start,
        "size_bytes": size,
        "available_bytes": max(gaps),
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


def _iomem(host: Host) -> list[tuple[int, int, str]]:
    """The physical address map as (first, last, owner)."""
    found = []
    for line in host.read("/proc/iomem").splitlines():
        match = re.match(r"\s*([0-9a-f]+)-([0-9a-f]+) : (.*)", line)
        if match:
            found.append((int(match.group(1), 16), int(match.group(2), 16), match.group(3)))
    return found
