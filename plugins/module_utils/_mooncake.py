# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program behind the Mooncake units: master, store, probe and key count.

It runs in the engine's own Python (``ENGINE/bin/python3 -m ..._mooncake``) from the
copy that the module leaves on the host. A store makes its memory itself, so that the
kernel can prove where it lies: an anonymous file with a telling name, bound to the
tier's NUMA node and locked before the engine sees it. Only the data lie on the node;
interpreter and engine stay where they are, which matters when the node is slow.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import platform
import re
import signal
import socket
import sys
import time
import typing as t
from contextlib import closing

from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import observe_cxl
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_list

ENGINE = "/opt/agentfleet/mooncake"
POOLS = "/etc/agentfleet/pools"
RUNTIME = "/run/agentfleet-mooncake"
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND, _MPOL_MF_STRICT, _MPOL_MF_MOVE = 2, 1, 2


def memory_name(pool: str, tier: str) -> str:
    """The name under which the kernel lists a tier's memory in maps and numa_maps."""
    return f"agentfleet-{pool}-{tier}"


def node_of_memdevs(host: Host, serials: t.Iterable[str]) -> int:
    """The NUMA node of the CXL region that is made of exactly these memory devices.

    :raises HostError: no such device, no region of them, or its memory is not online as system RAM
    """
    wanted = {hex(int(str(serial), 0)) for serial in serials}
    cxl = observe_cxl(host)
    present = sorted(memdev["serial"] for memdev in cxl["memdevs"])
    if not wanted <= set(present):
        raise HostError(
            f"no CXL memory device has serial {', '.join(sorted(wanted - set(present)))}. "
            f"Present: {', '.join(present) or 'none'}"
        )
    regions = [region for region in cxl["regions"] if set(region["memdevs"]) == wanted]
    dax = [device for region in regions for device in cxl["dax"] if device["name"] in region["dax"]]
    # Whether blocks are online is for root alone to see (dax ranges are secret); that the node has memory is not.
    filled = parse_list(host.read("/sys/devices/system/node/has_memory"))
    nodes = {int(device["target_node"]) for device in dax if device["mode"] == "system-ram"} & set(filled)
    if len(nodes) != 1:
        raise HostError(
            f"the CXL memory of {', '.join(sorted(wanted))} is not one online NUMA node "
            f"({len(regions)} regions, {len(dax)} dax devices, nodes {sorted(nodes)}). "
            "Declare a region of these devices and its dax device as system-ram (role cxl)"
        )
    return nodes.pop()


def tier_node(host: Host, tier: t.Mapping[str, t.Any]) -> int | None:
    """The node that a tier's memory is bound to; None leaves it to the kernel."""
    if tier.get("memdevs"):
        return node_of_memdevs(host, tier["memdevs"])
    return t.cast("int | None", tier.get("numa_node"))


def pages(numa_maps: str, name: str) -> dict[int, dict[int, int]]:
    """Mapping address -> NUMA node -> bytes, of the mappings with this memory name."""
    found: dict[int, dict[int, int]] = {}
    for line in numa_maps.splitlines():
        if f" file=/memfd:{name}\\040(deleted) " in line:
            size = int(line.rpartition("kernelpagesize_kB=")[2]) * 1024
            found[int(line.split()[0], 16)] = {
                int(node): int(count) * size for node, count in re.findall(r"\bN(\d+)=(\d+)", line)
            }
    return found


def holds(maps: str, name: str, address: int, size: int) -> bool:
    """Whether a range of addresses lies inside a mapping with this memory name."""
    for line in maps.splitlines():
        words = line.split()
        if len(words) > 5 and words[5] == f"/memfd:{name}":
            first, _dash, last = words[0].partition("-")
            if int(first, 16) <= address and address + size <= int(last, 16):
                return True
    return False


# -- what runs in the engine's Python ---------------------------------------------


def _engine(module: str) -> t.Any:
    """A module of the engine, which only its own Python has."""
    return importlib.import_module(module)


def _pool(name: str) -> dict[str, t.Any]:
    with open(f"{POOLS}/{name}.json", encoding="utf-8") as file:
        return t.cast("dict[str, t.Any]", json.load(file))


def _client(pool: t.Mapping[str, t.Any], buffer_bytes: int) -> t.Any:
    client = _engine("mooncake.store").MooncakeDistributedStore()
    master = f"{pool['master']['address']}:{pool['master']['port']}"
    devices = ",".join(pool["rdma_devices"])
    # No segment of the engine's own (the 0): its memory would lie anywhere.
    rc = client.setup(pool["address"], "P2PHANDSHAKE", 0, buffer_bytes, pool["protocol"], devices, master)
    if rc != 0:
        raise HostError(
            f"the engine's setup returned {rc}. Is the master at {master} up, and {pool['protocol']} usable?"
        )
    return client


def _bound_memory(name: str, size: int, node: int | None) -> tuple[int, mmap.mmap, int]:
    """Make, bind and lock the memory; returns (file descriptor, mapping, address)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    where, length = ctypes.c_void_p(address), ctypes.c_ulong(size)
    if node is not None:
        number = _MBIND.get(platform.machine())
        if number is None:
            raise HostError(f"binding memory on {platform.machine()} is not known. Known: {', '.join(_MBIND)}")
        mask = (ctypes.c_ulong * 16)()
        mask[node // 64] = 1 << node % 64
        flags = _MPOL_MF_STRICT | _MPOL_MF_MOVE
        if libc.syscall(number, where, length, _MPOL_BIND, mask, ctypes.c_ulong(1024), flags) != 0:
            raise HostError(f"binding {size} bytes to NUMA node {node}: {os.strerror(ctypes.get_errno())}")
    # Locked pages exist from now on, and are neither swapped out nor demoted to another tier.
    if libc.mlock(where, length) != 0:
        raise HostError(f"locking {size} bytes on NUMA node {node}: {os.strerror(ctypes.get_errno())}")
    with open("/proc/self/numa_maps", encoding="utf-8") as file:
        lies = pages(file.read(), name).get(address, {})
    if sum(lies.values()) != size or (node is not None and set(lies) != {node}):
        raise HostError(f"of {size} bytes meant for NUMA node {node} the kernel put {lies}")
    return fd, memory, address


def _notify(text: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


def master(pool_name: str) -> None:
    """Become the engine's master."""
    settings = _pool(pool_name)["master"]
    program = os.path.join(os.path.dirname(_engine("mooncake").__file__), "mooncake_master")
    flags = {
        "rpc_address": settings["address"],
        "rpc_port": settings["port"],
        "metrics_host": settings["address"],
        "metrics_port": settings["metrics_port"],
        "logtostderr": "true",
    }
    os.execv(program, [program, *(f"--{name}={value}" for name, value in flags.items())])


def store(pool_name: str, tier_name: str) -> None:
    """Serve one memory tier until a signal asks to end."""
    # Blocked before the engine starts its threads, so that they all inherit it and only sigwait sees them.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pool = _pool(pool_name)
    tier = next(tier for tier in pool["tiers"] if tier["name"] == tier_name)
    name, size = memory_name(pool_name, tier_name), tier["size_bytes"]
    node = tier_node(Host(), tier)
    fd, _memory, address = _bound_memory(name, size, node)
    client = _client(pool, 0)
    mounted = client.mount_segment(f"/proc/self/fd/{fd}", size, 0, pool["protocol"], "")
    if mounted["ret"] != 0:
        raise HostError(f"the engine does not take the segment of {size} bytes: error {mounted['ret']}")
    status = {"pid": os.getpid(), "address": address, "numa_node": node, "segment": client.get_hostname()}
    Host().write(f"{RUNTIME}/{pool_name}-{tier_name}/status.json", json.dumps(status))
    _notify(f"READY=1\nSTATUS=serving {size} bytes on NUMA node {'any' if node is None else node}")
    signal.sigwait(signals)
    _notify("STOPPING=1")
    client.unmount_segment(mounted["segment_ids"], 0)
    client.close()


def probe(pool_name: str, probe_bytes: int) -> list[dict[str, t.Any]]:
    """Put, get, compare and remove one object on each tier; say where its bytes lay."""
    pool = _pool(pool_name)
    client = _client(pool, 2 * probe_bytes + (4 << 20))
    try:
        return [
            _probe_tier(client, _engine("mooncake.store").ReplicateConfig(), pool, tier, probe_bytes)
            for tier in pool["tiers"]
        ]
    finally:
        client.close()


def _probe_tier(
    client: t.Any, config: t.Any, pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any], probe_bytes: int
) -> dict[str, t.Any]:
    host = Host()
    size = min(probe_bytes, tier["size_bytes"] // 4)
    result: dict[str, t.Any] = {"name": tier["name"], "probe_bytes": size, "verified": False}
    status = json.loads(host.read(f"{RUNTIME}/{pool['name']}-{tier['name']}/status.json") or "null")
    if status is None:
        return {**result, "problem": "its store is not running"}
    name, data, node = memory_name(pool["name"], tier["name"]), os.urandom(size), status["numa_node"]
    lies = pages(host.read(f"/proc/{status['pid']}/numa_maps"), name).get(status["address"], {})
    page = os.sysconf("SC_PAGE_SIZE")
    on_node = sum(lies.values()) if node is None else lies.get(node, 0)
    result.update(numa_node=node, pages_on_node=on_node // page, pages_elsewhere=(sum(lies.values()) - on_node) // page)
    config.preferred_segment = status["segment"]
    key = f"agentfleet-probe-{os.urandom(8).hex()}"
    try:
        start = time.perf_counter()
        rc = client.put(key, data, config)
        put_seconds = time.perf_counter() - start
        if rc != 0:
            return {**result, "problem": f"put of {size} bytes returned {rc}"}
        start = time.perf_counter()
        same = client.get(key) == data
        get_seconds = time.perf_counter() - start
        maps = host.read(f"/proc/{status['pid']}/maps")
        # The engine says at which address of the store the object lies, the kernel to what that address belongs.
        replicas = [replica.get_memory_descriptor().buffer_descriptor for replica in client.get_replica_desc(key)]
        inside = bool(replicas) and all(holds(maps, name, part.buffer_address, part.size) for part in replicas)
    finally:
        client.remove(key, True)
    result.update(
        put_bytes_per_second=round(size / put_seconds),
        get_bytes_per_second=round(size / get_seconds),
        verified=same and inside and on_node == tier["size_bytes"],
    )
    if not same:
        result["problem"] = "what was read differs from what was written"
    elif not inside:
        result["problem"] = "the engine placed the object outside of this tier's memory"
    elif not result["verified"]:
        result["problem"] = f"{on_node} of {tier['size_bytes']} bytes lie on NUMA node {node}"
    return result


def keys(pool_name: str) -> int:
    """The number of objects that the pool's master knows."""
    import http.client

    settings = _pool(pool_name)["master"]
    url = f"http://{settings['address']}:{settings['metrics_port']}/metrics"
    with closing(http.client.HTTPConnection(settings["address"], settings["metrics_port"], timeout=10)) as connection:
        connection.request("GET", "/metrics")
        match = re.search(r"^master_key_count (\d+)", connection.getresponse().read().decode(), re.M)
    if match is None:
        raise HostError(f"{url} has no master_key_count. Is another program listening there?")
    return int(match[1])


def main(arguments: t.Sequence[str]) -> None:
    """``master POOL``, ``store POOL-TIER``, ``probe POOL BYTES`` or ``keys POOL``."""
    verb, name = arguments[:2]
    if verb == "master":
        master(name)
    elif verb == "store":
        store(*name.split("-"))
    elif verb == "probe":
        sys.stdout.write(json.dumps(probe(name, int(arguments[2]))) + "\n")
    elif verb == "keys":
        sys.stdout.write(f"{keys(name)}\n")
    else:
        raise SystemExit(f"{verb!r} is not master, store, probe or keys")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (HostError, OSError) as error:
        raise SystemExit(f"{' '.join(sys.argv[1:])}: {error}") from error
