# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host must have before 3FS can run on it: RDMA with a usable GID, a clock, memory, room for buffers of USRBIO."""

from __future__ import annotations

import ctypes
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._kernel import observe_rdma
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

CHECKS = ("rdma", "clock", "memory", "shm")
_EMPTY_GID = re.compile(r"^(0000:){7}0000$|^fe80:(0000:){3}(0000:){3}0000$")
# What upstream's listeners take for TCP unless told otherwise.
_NAMES = re.compile(r"^(en|eth|bond|xgbe)")
# Pinned RDMA buffers plus the caches of leveldb and rocksdb of the files that ship.
_STORAGE_BYTES = 24 << 30
_SMALL_STORAGE_BYTES = 1 << 30


def observe(host: Host) -> dict[str, t.Any]:
    """RDMA ports with their GIDs, names of network interfaces, clock, memory."""
    ports = []
    for device in observe_rdma(host)["devices"]:
        for port in device["ports"]:
            base = f"/sys/class/infiniband/{device['name']}/ports/{port['port']}"
            kinds = {name: host.read(f"{base}/gid_attrs/types/{name}") for name in host.names(f"{base}/gids")}
            gids = {name: host.read(f"{base}/gids/{name}") for name in kinds}
            usable = [name for name, gid in gids.items() if gid and not _EMPTY_GID.match(gid)]
            ports.append(
                {
                    "device": device["name"],
                    "port": port["port"],
                    "state": port["state"],
                    "link_layer": port["link_layer"],
                    "roce_v2": sum(kinds[name] == "RoCE v2" for name in usable),
                }
            )
    return {
        "ports": ports,
        "interfaces": [name for name in host.names("/sys/class/net") if host.exists(f"/sys/class/net/{name}/device")],
        "clock": _synchronized(host),
        "memory_bytes": host.memory_bytes(),
        "shm_bytes": _size(host, "/dev/shm"),
    }


def _size(host: Host, path: str) -> int:
    """Bytes of the file system at a path; 0 where there is none."""
    if not host.exists(path):
        return 0
    space = os.statvfs(host.path(path))
    return space.f_blocks * space.f_frsize


def _synchronized(host: Host) -> bool | None:
    """Whether the kernel's clock is disciplined; None when that cannot be asked."""
    if host.root != "/":
        return {"yes": True, "no": False}.get(host.read("/run/agentfleet-clock"))
    try:
        buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: only a question
        return int(ctypes.CDLL(None).adjtimex(buffer)) != 5  # TIME_ERROR
    except (OSError, AttributeError):
        return None


def failures(
    seen: t.Mapping[str, t.Any], services: t.Sequence[str], devices: t.Sequence[str], small: bool, usrbio: int = 0
) -> list[tuple[str, str, str]]:
    """(check, problem, remedy) of everything that stands in the way.

    :param devices: RDMA devices that are asked for; all, if empty
    :param small: the storage service's buffers are cut down for tests
    :param usrbio: bytes of the buffers that programs of this host share with FUSE
    """
    found = []
    needs_rdma = bool(services) and set(services) != {"monitor"}
    ports = [port for port in seen["ports"] if not devices or port["device"] in devices]
    missing = sorted(set(devices) - {port["device"] for port in seen["ports"]})
    if needs_rdma and missing:
        there = ", ".join(sorted({port["device"] for port in seen["ports"]})) or "none"
        found.append(("rdma", f"there is no RDMA device {', '.join(missing)}", f"Devices of this host: {there}"))
    elif needs_rdma and not ports:
        found.append(
            (
                "rdma",
                "this host has no RDMA device, and 3FS moves data by nothing else",
                "Load the card's driver (rdma link shows it); for tests, soft-RoCE: rdma link add rxe0 type rxe netdev eth0",
            )
        )
    elif needs_rdma:
        active = [port for port in ports if port["state"] == "ACTIVE"]
        if not active:
            states = ", ".join(f"{port['device']}/{port['port']} {port['state'] or 'unknown'}" for port in ports)
            found.append(("rdma", f"no RDMA port is ACTIVE ({states})", "Check cable, switch and ip link"))
        elif not any(port["link_layer"] == "InfiniBand" or port["roce_v2"] for port in active):
            found.append(
                (
                    "rdma",
                    "no RDMA port over Ethernet has a RoCE v2 GID",
                    "Give its interface an address; look at /sys/class/infiniband/*/ports/*/gid_attrs/types",
                )
            )
    if needs_rdma and seen["interfaces"] and not any(_NAMES.match(name) for name in seen["interfaces"]):
        names = ", ".join(seen["interfaces"])
        found.append(
            (
                "rdma",
                f"no interface has a name that 3FS listens on over TCP ({names})",
                "Rename it, or set +server.base.groups[TCP].listener.custom_tcp_nic_prefix in settings of each main file",
            )
        )
    if services and seen["clock"] is False:
        found.append(
            (
                "clock",
                "the clock is not synchronized; heartbeats 30 s off are refused",
                "Set up chrony, and wait until chronyc tracking says so",
            )
        )
    need = _SMALL_STORAGE_BYTES if small else _STORAGE_BYTES
    if "storage" in services and 0 < seen["memory_bytes"] < need:
        have = format_size(seen["memory_bytes"] >> 20 << 20)
        found.append(
            (
                "memory",
                f"{have} are too little for a storage service ({format_size(need)})",
                "Add memory, or for tests use the profile small_memory",
            )
        )
    if usrbio > seen["shm_bytes"]:
        have, want = (format_size(size >> 20 << 20) for size in (seen["shm_bytes"], usrbio))
        found.append(
            (
                "shm",
                f"/dev/shm has {have}, and programs shall have {want} of USRBIO buffers there",
                f"mount -o remount,size={usrbio} /dev/shm, and the same in /etc/fstab",
            )
        )
    return found
