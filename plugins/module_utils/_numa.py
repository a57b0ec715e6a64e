# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NUMA nodes, memory tiers, memory blocks and the kernel's placement policies, through sysfs and procfs."""

from __future__ import annotations

import os
import re
import typing as t
from contextlib import contextmanager

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_list

NODES = "/sys/devices/system/node"
MEMORY = "/sys/devices/system/memory"
OFFLINE_RATE = 256 << 20  # bytes per second that the kernel at least moves to other nodes, on real memory
TIERS = "/sys/devices/virtual/memory_tiering"
WEIGHTS = "/sys/kernel/mm/mempolicy/weighted_interleave"
DEMOTION = "/sys/kernel/mm/numa/demotion_enabled"
BALANCING = "/proc/sys/kernel/numa_balancing"
RATE_LIMIT = "/proc/sys/kernel/numa_balancing_promote_rate_limit_MBps"
AUTO_ONLINE = f"{MEMORY}/auto_online_blocks"
_ZONE = re.compile(r"^Node (\d+), zone\s+(\w+)")


def observe_numa(host: Host) -> dict[str, t.Any]:
    """Nodes (also those without CPUs or without memory), tiers fastest first, and policies.

    A node's ``tier`` is the kernel's own number: it depends on firmware tables, so
    compare it with others (lower is faster) and never with a constant.
    """
    tiers = observe_tiers(host)
    tier_of = {node: entry["tier"] for entry in tiers for node in entry["nodes"]}
    zones = _zones(host)
    return {
        "nodes": [
            _node(host, number, tier_of.get(number), zones.get(number, {}))
            for number in (int(path.rpartition("/node")[2]) for path in host.glob(f"{NODES}/node[0-9]*"))
        ],
        "tiers": tiers,
        "auto_online": host.read(AUTO_ONLINE),
        "block_size_bytes": block_size(host),
        "demotion": host.read(DEMOTION) == "true" if host.exists(DEMOTION) else None,
        "balancing": host.read_int(BALANCING),
        "promote_rate_limit_mib": host.read_int(RATE_LIMIT),
        "weighted_interleave": {
            name[4:]: host.read_int(f"{WEIGHTS}/{name}") for name in host.names(WEIGHTS) if name.startswith("node")
        },
        "weighted_interleave_auto": host.read(f"{WEIGHTS}/auto") in ("true", "1")
        if host.exists(f"{WEIGHTS}/auto")
        else None,
    }


def observe_tiers(host: Host) -> list[dict[str, t.Any]]:
    """Memory tiers that have nodes, fastest (lowest number) first."""
    found = []
    for path in host.glob(f"{TIERS}/memory_tier[0-9]*"):
        nodes = parse_list(host.read(f"{path}/nodelist"))
        if nodes:
            found.append({"tier": int(path.rpartition("memory_tier")[2]), "nodes": nodes})
    return found


def block_size(host: Host) -> int:
    """Size of a memory block; 0 where memory cannot be hot-plugged."""
    text = host.read(f"{MEMORY}/block_size_bytes")
    return int(text, 16) if text else 0


def _node(host: Host, number: int, tier: int | None, zones: dict[str, int]) -> dict[str, t.Any]:
    base = f"{NODES}/node{number}"
    meminfo = {
        words[2].rstrip(":"): int(words[3]) * 1024
        for words in (line.split() for line in host.read(f"{base}/meminfo").splitlines())
        if len(words) > 4 and words[4] == "kB"
    }
    states = [host.read(f"{MEMORY}/{name}/state") for name in host.names(base) if re.match(r"memory\d+$", name)]
    return {
        "id": number,
        "tier": tier,
        "cpus": parse_list(host.read(f"{base}/cpulist")),
        "size_bytes": meminfo.get("MemTotal", 0),
        "free_bytes": meminfo.get("MemFree", 0),
        "cache_bytes": _spare_cache(meminfo),
        "distances": [int(word) for word in host.read(f"{base}/distance").split()],
        "hugepages": {
            name[len("hugepages-") :]: {
                "total": host.read_int(f"{base}/hugepages/{name}/nr_hugepages", 0),
                "free": host.read_int(f"{base}/hugepages/{name}/free_hugepages", 0),
            }
            for name in host.names(f"{base}/hugepages")
        },
        "access": {
            name: access
            for name in host.names(base)
            if re.match(r"access\d+$", name)
            for access in [_access(host, f"{base}/{name}/initiators")]
            if access
        },
        "online_blocks": states.count("online"),
        "offline_blocks": states.count("offline"),
        "normal_bytes": sum(size for zone, size in zones.items() if zone not in ("Movable", "Device")),
        "movable_bytes": zones.get("Movable", 0),
    }


def _spare_cache(meminfo: t.Mapping[str, int]) -> int:
    """Bytes of files' pages that the kernel surely gives to who asks for memory of this node.

    Half of those that are neither dirty, nor being written, nor in a program's address space: of the other half some are
    held by file systems, and some are read again at once. ``Mapped`` has shared memory, too, which is no file's; what is
    locked of it (a store's) is in ``Mlocked``.
    """
    get = meminfo.get
    files = get("Active(file)", 0) + get("Inactive(file)", 0)
    mapped = max(0, get("Mapped", 0) - get("Mlocked", 0))
    return max(0, files - get("Dirty", 0) - get("Writeback", 0) - mapped) // 2


def _access(host: Host, base: str) -> dict[str, t.Any]:
    """What firmware (HMAT, CDAT) says of the way from the best initiators to a node: MiB/s and ns."""
    values = {
        name: host.read_int(f"{base}/{name}")
        for name in ("read_bandwidth", "write_bandwidth", "read_latency", "write_latency")
    }
    found: dict[str, t.Any] = {name: value for name, value in values.items() if value}
    if found:
        found["initiators"] = [int(name[4:]) for name in host.names(base) if name.startswith("node")]
    return found


def _zones(host: Host) -> dict[int, dict[str, int]]:
    """Node -> zone -> bytes present (offline memory is not present)."""
    page = os.sysconf("SC_PAGE_SIZE")
    found: dict[int, dict[str, int]] = {}
    node, zone = -1, ""
    for line in host.read("/proc/zoneinfo").splitlines():
        match = _ZONE.match(line)
        if match:
            node, zone = int(match.group(1)), match.group(2)
        elif line.split()[:1] == ["present"] and node >= 0:
            found.setdefault(node, {})[zone] = int(line.split()[1]) * page
    return found


@contextmanager
def auto_online(host: Host, policy: str | None) -> t.Iterator[None]:
    """Hot-added memory goes online by ``policy`` inside the context (None: the host's); the policy comes back after it."""
    before = host.read(AUTO_ONLINE)
    if policy is None or before in ("", policy):
        yield
        return
    host.poke(AUTO_ONLINE, policy)
    try:
        yield
    finally:
        host.poke(AUTO_ONLINE, before)


def zone_of(host: Host, block: str) -> str:
    """``movable`` or ``kernel`` for a memory block that is online, else ``offline``."""
    if host.read(f"{block}/state") != "online":
        return "offline"
    return "movable" if host.read(f"{block}/valid_zones").split()[:1] == ["Movable"] else "kernel"


def online_blocks(host: Host, zones: t.Mapping[str, str]) -> None:
    """Bring memory blocks online, each in its zone (``movable`` or ``kernel``; ``offline`` is left as it is)."""
    for block, zone in zones.items():
        if zone == "offline" or zone_of(host, block) == zone:
            continue
        host.poke(f"{block}/state", f"online_{zone}")
        if zone_of(host, block) != zone:
            raise HostError(
                f"{block} went online in the {zone_of(host, block)} zone, not in the {zone} zone: something else "
                "(a udev rule that brings memory online) was faster. Remove it and run again"
            )


def offline_dax(host: Host, name: str, blocks: t.Sequence[str]) -> dict[str, str]:
    """Take a dax device's memory offline, or leave it as it was and say why it could not go.

    The program and not a write of ours does it: the kernel tries without end while
    pages are pinned, and only a process can be stopped.

    :return: the zone of each block before, for ``online_blocks``
    """
    before = {block: zone_of(host, block) for block in blocks}
    if set(before.values()) <= {"offline"}:
        return before
    limit = 120 + len(blocks) * block_size(host) // OFFLINE_RATE
    done = host.run(["daxctl", "offline-memory", name], timeout_seconds=limit, check=False)
    stuck = [block for block in blocks if zone_of(host, block) != "offline"]
    if stuck:
        online_blocks(host, before)
        cause = (
            "Moving their pages away took too long: other nodes must have room for them, and what uses them may change "
            "them faster"
            if done.rc == 124
            else "Kernel allocations, huge pages or pinned pages (vfio, RDMA) are in them"
        )
        raise HostError(
            f"{len(stuck)} of {len(blocks)} memory blocks of {name} cannot be taken offline ({done.text}), so that all "
            f"of them are online again. {cause}; memory can be given back reliably only from the movable zone. Stop what "
            "uses it, or reboot with the memory left offline (cxl_region: leave_offline)"
        )
    return before


def memory_users(host: Host, node: int) -> list[str]:
    """What a node's memory holds, and which processes; empty when nothing would have to be moved away."""
    kinds = ("AnonPages", "FilePages", "Slab", "KernelStack", "PageTables")
    found = []
    for line in host.read(f"{NODES}/node{node}/meminfo").splitlines():
        words = line.split()
        kind = words[2].rstrip(":")
        if kind in kinds and int(words[3]):
            found.append(f"{kind} {format_size(int(words[3]) * 1024)}")
        elif kind == "HugePages_Total" and int(words[3]):
            found.append(f"{words[3]} huge pages")
    return found + (processes(host, "numa_maps", f" N{node}=") if found else [])


def processes(host: Host, file: str, needle: str) -> list[str]:
    """Processes whose /proc file contains a text, the first ten as ``process 12 (name)``."""
    found = [
        f"process {os.path.basename(path)} ({host.read(f'{path}/comm')})"
        for path in host.glob("/proc/[0-9]*")
        if needle in host.read(f"{path}/{file}")
    ]
    return found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])
