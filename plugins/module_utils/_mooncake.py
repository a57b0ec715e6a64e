# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program behind the Mooncake units: master, store, probe, drain and quotas.

It runs in the engine's own Python (``ENGINE/bin/python3 -m ..._mooncake``) from the
copy that the module leaves on the host. A store makes its memory itself, so that the
kernel can prove where it lies: an anonymous file with a telling name, bound to the
tier's NUMA node and locked before the engine sees it. Only the data lie on the node;
interpreter and engine stay where they are, which matters when the node is slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import platform
import re
import signal
import socket
import statistics
import sys
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _bindguard
from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import observe_cxl
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, open_beneath
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake_admin import Admin, master_address
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_list

ENGINE = "/opt/agentfleet/mooncake"
POOLS = "/etc/agentfleet/pools"
RUNTIME = "/run/agentfleet-mooncake"
USER = "agentfleet-kv"
# The master forgets a store that has been silent for so long; one that comes back earlier would have what it offloaded
# registered, and then removed with its former self.
CLIENT_TTL_SECONDS = 10
# A probe's own tenant has the time of its start in its name, since one that is killed leaves it behind.
_PROBE_TENANT, _PROBE_SECONDS = "agentfleet-probe", 24 * 3600
# A start on an idle machine takes 2 s, an election 10 s; emulated machines are slower.
_MASTER_SECONDS = 180
# One thread clears some GiB in a second; systemd is told of each piece, and waits as long for the next.
_LOCK_BYTES, _LOCK_SECONDS = 1 << 30, 300
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND, _MPOL_MF_STRICT, _MPOL_MF_MOVE = 2, 1, 2


def memory_name(pool: str, tier: str) -> str:
    """The name under which the kernel lists a tier's memory in maps and numa_maps."""
    return f"agentfleet-{pool}-{tier}"


def _dax_of_memdevs(host: Host, serials: t.Iterable[str]) -> tuple[list[dict[str, t.Any]], str]:
    """The dax devices of the CXL region that is made of exactly these memory devices, and what was found in words."""
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
    return dax, f"the CXL memory of {', '.join(sorted(wanted))} ({len(regions)} regions, {len(dax)} dax devices)"


def node_of_memdevs(host: Host, serials: t.Iterable[str]) -> int:
    """The NUMA node of the CXL region that is made of exactly these memory devices.

    :raises HostError: no such device, no region of them, or its memory is not online as system RAM
    """
    dax, found = _dax_of_memdevs(host, serials)
    # Whether blocks are online is for root alone to see (dax ranges are secret); that the node has memory is not.
    filled = parse_list(host.read("/sys/devices/system/node/has_memory"))
    nodes = {int(device["target_node"]) for device in dax if device["mode"] == "system-ram"} & set(filled)
    if len(nodes) != 1:
        raise HostError(
            f"{found} is not one online NUMA node (nodes {sorted(nodes)}). "
            "Declare a region of these devices and its dax device as system-ram (role cxl)"
        )
    return nodes.pop()


def devdax_of_memdevs(host: Host, serials: t.Iterable[str]) -> str:
    """The path of the dax device of this region, for a program that maps it itself.

    :raises HostError: no such device, no region of them, or none in devdax mode
    """
    dax, found = _dax_of_memdevs(host, serials)
    devices = [device["name"] for device in dax if device["mode"] == "devdax"]
    if len(devices) != 1:
        raise HostError(f"{found} has {len(devices)} devices in devdax mode. Declare one with mode devdax (role cxl)")
    return f"/dev/{devices[0]}"


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


def _tenant_ids(pool_name: str) -> dict[str, str]:
    """Tenant -> its secret name in the engine; readable by root alone."""
    with open(f"{POOLS}/{pool_name}.tenants", encoding="utf-8") as file:
        return t.cast("dict[str, str]", json.load(file))


def _client(
    pool: t.Mapping[str, t.Any],
    buffer_bytes: int,
    offload: str = "",
    tenant: str = "default",
    patience_seconds: float = 0,
) -> t.Any:
    """A client of the engine; with patience it waits for a master that is just starting, or being elected."""
    if pool["etcd"]:
        os.environ["MC_STORE_CLUSTER_ID"] = pool["name"]  # under which the leading master is written into etcd
    master = master_address(pool)
    devices, end = ",".join(pool["rdma_devices"]), time.monotonic() + patience_seconds
    # No segment of the engine's own (the first 0): its memory would lie anywhere.
    options = (0, buffer_bytes, pool["protocol"], devices, master, None, bool(offload), offload, tenant)
    while True:
        client = _engine("mooncake.store").MooncakeDistributedStore()
        rc = client.setup(pool["address"], "P2PHANDSHAKE", *options)
        if rc == 0:
            return client
        if time.monotonic() > end:
            raise HostError(
                f"the engine's setup returned {rc}. Is the master at {master} up, and {pool['protocol']} usable?"
            )
        time.sleep(1)


def _bound_memory(name: str, size: int, node: int | None) -> tuple[int, mmap.mmap, int]:
    """Make, bind and lock the memory; returns (file descriptor, mapping, address)."""
    with contextlib.ExitStack() as undo:
        fd = os.memfd_create(name)
        undo.callback(os.close, fd)
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        undo.callback(memory.close)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        _bind(name, address, size, node)
        undo.pop_all()
    return fd, memory, address


def _bind(name: str, address: int, size: int, node: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
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
    for done in range(0, size, _LOCK_BYTES):
        _notify(f"EXTEND_TIMEOUT_USEC={_LOCK_SECONDS * 10**6}\nSTATUS=locked {done} of {size} bytes")
        piece = ctypes.c_ulong(min(_LOCK_BYTES, size - done))
        if libc.mlock(ctypes.c_void_p(address + done), piece) != 0:
            raise HostError(f"locking {size} bytes on NUMA node {node}: {os.strerror(ctypes.get_errno())}")
    with open("/proc/self/numa_maps", encoding="utf-8") as file:
        lies = pages(file.read(), name).get(address, {})
    if sum(lies.values()) != size or (node is not None and set(lies) != {node}):
        raise HostError(f"of {size} bytes meant for NUMA node {node} the kernel put {lies}")


def _notify(text: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


def guard(pool_name: str) -> None:
    """Let this process's control group listen on the pool's address alone; the engine would on all."""
    pool = _pool(pool_name)
    if not pool["listen_all_addresses"]:
        _bindguard.guard(pool["address"])


def policy(pool_name: str) -> None:
    """Write the tenants' quotas where the unprivileged master reads them, as root."""
    pool, name = _pool(pool_name), "quotas.yaml"
    if not pool["tenants"]:
        return
    ids = _tenant_ids(pool_name)
    # JSON is YAML.
    tenants = [{"name": ids[tenant["name"]], "quota": tenant["quota_bytes"]} for tenant in pool["tenants"]]
    # The directory is the master's user's, who could lead root elsewhere by a link.
    with Host().directory(f"{RUNTIME}/{pool_name}") as beneath:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=beneath)
        with open_beneath(beneath, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, or_ours=True) as file:
            owner = os.fstat(beneath)
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(json.dumps({"version": 1, "tenants": tenants}).encode())


def master_flags(pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The master's command line: nothing of it is secret."""
    master, name = pool["master"], pool["name"]
    flags: dict[str, t.Any] = {
        "rpc_address": master["address"],
        "rpc_port": master["port"],
        "metrics_host": master["metrics_address"],
        "metrics_port": master["metrics_port"],
        "eviction_high_watermark_ratio": pool["eviction_high_watermark"],
        "client_ttl": CLIENT_TTL_SECONDS,
        "logtostderr": "true",
    }
    if any(tier["medium"] == "ssd" for tier in pool["tiers"]):
        flags["enable_offload"] = "true"
        flags["offload_on_evict"] = str(pool["write_policy"] == "write_back").lower()
        flags["promotion_on_hit"] = "true"
    if pool["etcd"]:
        flags.update(
            enable_ha="true",
            ha_backend_type="etcd",
            ha_backend_connstring=";".join(pool["etcd"]),
            cluster_id=name,
            enable_oplog="true",  # so that the next leader knows what this one has acknowledged
        )
    if pool["tenants"]:
        flags["enable_multi_tenants"] = "true"
        flags["tenant_quota_connector_type"] = "etcd" if pool["etcd"] else "file"
        flags["tenant_quota_connector_uri"] = (
            ";".join(pool["etcd"]) if pool["etcd"] else f"{RUNTIME}/{name}/quotas.yaml"
        )
    return flags


def master(pool_name: str) -> None:
    """Become the engine's master."""
    program = os.path.join(os.path.dirname(_engine("mooncake").__file__), "mooncake_master")
    os.execv(program, [program, *(f"--{name}={value}" for name, value in master_flags(_pool(pool_name)).items())])


def offload_share(pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any]) -> tuple[str, int]:
    """Directory and bytes of the pool's SSD for one memory tier, in proportion to its size; none without an SSD tier."""
    for disk in pool["tiers"]:
        if disk["medium"] == "ssd":
            memory = sum(other["size_bytes"] for other in pool["tiers"] if other["medium"] != "ssd")
            return f"{disk['path']}/{tier['name']}", disk["size_bytes"] * tier["size_bytes"] // memory
    return "", 0


def offload_environment(pool: t.Mapping[str, t.Any], directory: str, size: int, memory: int) -> dict[str, str]:
    """How the engine is told to use a directory."""
    # Staging memory comes on top of the tier; the engine's own 1.25 GiB would be more than a small tier has.
    staging = min(1280 << 20, max(16 << 20, memory // 4))
    return {
        "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": directory,
        "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "bucket_storage_backend",
        "MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES": str(staging),
        "MOONCAKE_OFFLOAD_BUCKET_MAX_TOTAL_SIZE": str(size),
        "MOONCAKE_OFFLOAD_BUCKET_MAX_PHYSICAL_BYTES": str(size),
        # Objects are written when they fill a bucket, and only then: a smaller one leaves fewer behind in a crash.
        "MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES": str(min(64 << 20, max(1 << 20, size // 64))),
        "MOONCAKE_OFFLOAD_BUCKET_EVICTION_POLICY": pool["eviction_policy"],
        "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "2",
    }


def store(pool_name: str, tier_name: str) -> None:
    """Serve one memory tier until a signal asks to end; SIGHUP makes it as large as declared by now."""
    # Blocked before the engine starts its threads, so that they all inherit it and only sigwait sees them.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pool, tier = _pool_tier(pool_name, tier_name)
    directory, disk_bytes = offload_share(pool, tier)
    if directory:
        os.environ.update(offload_environment(pool, directory, disk_bytes, tier["size_bytes"]))
        _after_a_crash(directory)
    serving = _Store(pool, tier, directory)
    serving.grow(tier["size_bytes"])
    _notify("READY=1")
    while signal.sigwait(signals) == signal.SIGHUP:
        _notify("RELOADING=1\nMONOTONIC_USEC=" + str(time.monotonic_ns() // 1000))
        try:
            serving.grow(_pool_tier(pool_name, tier_name)[1]["size_bytes"])
        except (HostError, OSError) as error:  # what it holds is worth more than the size
            serving.tell(str(error))
        _notify("READY=1")
    _notify("STOPPING=1")
    serving.close()
    if directory:
        Host().write(f"{directory}/.closed", "")


def _pool_tier(pool_name: str, tier_name: str) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
    pool = _pool(pool_name)
    return pool, next(tier for tier in pool["tiers"] if tier["name"] == tier_name)


def _after_a_crash(directory: str) -> None:
    """Let the master forget the store's former self, or it would forget with it what is on the disk."""
    closed = os.path.join(directory, ".closed")
    if os.path.exists(closed):
        os.unlink(closed)
    elif os.listdir(directory):
        _notify("STATUS=waiting until the master has forgotten the store that crashed")
        time.sleep(CLIENT_TTL_SECONDS + 2)


class _Store:
    """The memory of a tier, as segments of the engine: one at the start, one more for each time it grew."""

    def __init__(self, pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any], offload: str) -> None:
        self.pool, self.name = pool, tier["name"]
        self.node = tier_node(Host(), tier)
        self.client = _client(pool, 0, offload, patience_seconds=_MASTER_SECONDS)
        self.memory: list[tuple[int, mmap.mmap, int, int]] = []  # file, mapping, address, size
        self.segments: list[str] = []
        self.attempts = 0

    def grow(self, size: int) -> None:
        """Serve this many bytes; smaller than what there is takes a restart.

        :raises HostError: it serves what it served before
        """
        more = size - sum(part[3] for part in self.memory)
        if more > 0:
            if self.memory:
                self._await_master()
            fd, mapping, address = _bound_memory(memory_name(self.pool["name"], self.name), more, self.node)
            # "*" lets the engine find out where the memory lies, and choose RDMA devices that are near.
            mounted = self.client.mount_segment(f"/proc/self/fd/{fd}", more, 0, self.pool["protocol"], "*")
            if mounted["ret"] != 0:
                mapping.close()
                os.close(fd)
                raise HostError(f"the engine does not take the segment of {more} bytes: error {mounted['ret']}")
            self.memory.append((fd, mapping, address, more))
            self.segments += mounted["segment_ids"]
        self.tell()

    def _await_master(self) -> None:
        """Wait for a master that was restarted: of a segment that it did not take the engine keeps the address for ever."""
        end = time.monotonic() + _MASTER_SECONDS
        while (rc := self.client.is_exist("agentfleet")) < 0:
            if time.monotonic() > end or signal.sigpending() & {signal.SIGTERM, signal.SIGINT}:
                raise HostError(f"the master does not answer: error {rc}")
            time.sleep(1)

    def tell(self, problem: str = "") -> None:
        """Say what is served, and why it is not more."""
        self.attempts += 1
        status = {
            "pid": os.getpid(),
            "addresses": [part[2] for part in self.memory],
            "size_bytes": sum(part[3] for part in self.memory),
            "numa_node": self.node,
            "segment": self.client.get_hostname(),
            "attempts": self.attempts,
            "problem": problem,
        }
        Host().write(f"{RUNTIME}/{self.pool['name']}-{self.name}/status.json", json.dumps(status))
        where = "any NUMA node" if self.node is None else f"NUMA node {self.node}"
        _notify(f"STATUS=serving {status['size_bytes']} bytes on {where}{problem and ', does not grow: ' + problem}")

    def close(self) -> None:
        """Take leave of the master."""
        self.client.unmount_segment(self.segments, 0)
        self.client.close()


def status_of(host: Host, pool_name: str, tier_name: str) -> dict[str, t.Any] | None:
    """What a running store says of itself, in a directory of its user."""
    place = f"{RUNTIME}/{pool_name}-{tier_name}"
    try:
        with host.directory(place) as beneath, open_beneath(beneath, "status.json") as file:
            return t.cast("dict[str, t.Any]", json.load(file))
    except FileNotFoundError:
        return None


# -- what is asked of a pool --------------------------------------------------------


def holds_now(pool_name: str) -> dict[str, t.Any]:
    """What the pool holds: objects, and for each store its use, with the tier of those on this host."""
    pool, host = _pool(pool_name), Host()
    admin, stores = Admin(pool), {}
    for tier in pool["tiers"]:
        status = status_of(host, pool_name, tier["name"])
        if status is not None:
            stores[status["segment"]] = tier["name"]
    segments = [{"segment": name, "tier": stores.get(name), **state} for name, state in admin.segments().items()]
    return {"objects": admin.objects(), "stores": segments}


def drain(pool_name: str, tiers: t.Sequence[str], timeout_seconds: float) -> int:
    """Move what these tiers of this host hold to the pool's other stores."""
    statuses = [status_of(Host(), pool_name, tier) for tier in tiers]
    return Admin(_pool(pool_name)).drain([status["segment"] for status in statuses if status], timeout_seconds)


def _probing(secret: str) -> bool:
    """Whether this is the tenant of a probe that may still run."""
    start = re.fullmatch(f"{_PROBE_TENANT}-([0-9a-f]+)-[0-9a-f]+", secret)
    return start is not None and abs(time.time() - int(start[1], 16)) < _PROBE_SECONDS


def quotas(pool_name: str) -> dict[str, dict[str, int]]:
    """Tenant -> quota and use, of the declared tenants; others under the name ``(undeclared)``, summed up."""
    names = {secret: name for name, secret in _tenant_ids(pool_name).items()}
    found: dict[str, dict[str, int]] = {}
    for secret, state in Admin(_pool(pool_name)).quotas().items():
        if _probing(secret):
            continue
        sums = found.setdefault(names.get(secret, "(undeclared)"), {"quota_bytes": 0, "used_bytes": 0})
        for key, value in state.items():
            sums[key] += value
    return found


def set_quotas(pool_name: str) -> None:
    """Make the master's tenants those of the declaration; of the others their data goes first."""
    pool, ids = _pool(pool_name), _tenant_ids(pool_name)
    admin = Admin(pool)
    wanted = {ids[tenant["name"]]: tenant["quota_bytes"] for tenant in pool["tenants"]}
    present = admin.quotas()
    for secret in set(present) - set(wanted):
        if _probing(secret):
            continue
        if present[secret]["used_bytes"]:
            client = _client(pool, 1 << 20, "", secret)
            client.remove_all(True)
            client.close()
        admin.remove_quota(secret)
    for secret, quota in wanted.items():
        if present.get(secret, {}).get("quota_bytes") != quota:
            admin.set_quota(secret, quota)


def probe(pool_name: str, probe_bytes: int, samples: int) -> list[dict[str, t.Any]]:
    """Put, get, compare and remove objects on each memory tier; say where their bytes lay, and how long each took."""
    pool = _pool(pool_name)
    admin, tenant = None, "default"
    if pool["tenants"]:
        try:
            admin, tenant = Admin(pool), f"{_PROBE_TENANT}-{int(time.time()):x}-{os.urandom(4).hex()}"
            admin.set_quota(tenant, probe_bytes * (samples + 1) * pool["replicas"])
        except HostError:  # a host that is not let near the master's quotas is the first of the tenants
            admin, tenant = None, next(iter(_tenant_ids(pool_name).values()))
    memory = [tier for tier in pool["tiers"] if tier["medium"] != "ssd"]
    try:
        client = _client(pool, 4 * probe_bytes + (4 << 20), "", tenant)
        try:
            return [_probe_tier(client, pool, tier, probe_bytes, samples) for tier in memory]
        finally:
            client.close()
    finally:
        if admin is not None:
            _forget(admin, tenant)


def _forget(admin: Admin, tenant: str) -> None:
    """Remove the probe's own tenant; its last object may take a moment to go."""
    for _attempt in range(20):
        try:
            return admin.remove_quota(tenant)
        except HostError:
            time.sleep(0.5)
    return None


def summary(put_seconds: t.Sequence[float], get_seconds: t.Sequence[float], size: int) -> dict[str, t.Any]:
    """Bandwidth and latency percentiles of single puts and gets."""
    found: dict[str, t.Any] = {"probe_bytes": size, "samples": len(put_seconds)}
    for name, seconds in (("put", put_seconds), ("get", get_seconds)):
        cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
        found[f"{name}_bytes_per_second"] = round(size * len(seconds) / sum(seconds))
        found[f"{name}_microseconds"] = {"p50": round(cuts[49] * 1e6, 1), "p99": round(cuts[98] * 1e6, 1)}
    return found


def _probe_tier(
    client: t.Any, pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any], probe_bytes: int, samples: int
) -> dict[str, t.Any]:
    host = Host()
    size = min(probe_bytes, tier["size_bytes"] // 4)
    result: dict[str, t.Any] = {"name": tier["name"], "probe_bytes": size, "samples": samples, "verified": False}
    status = status_of(host, pool["name"], tier["name"])
    if status is None:
        return {**result, "problem": "its store is not running"}
    name, node, page = memory_name(pool["name"], tier["name"]), status["numa_node"], os.sysconf("SC_PAGE_SIZE")
    lies: dict[int, int] = {}
    placed = pages(host.read(f"/proc/{status['pid']}/numa_maps"), name)
    for address in status["addresses"]:
        for where, number in placed.get(address, {}).items():
            lies[where] = lies.get(where, 0) + number
    on_node = sum(lies.values()) if node is None else lies.get(node, 0)
    result.update(numa_node=node, pages_on_node=on_node // page, pages_elsewhere=(sum(lies.values()) - on_node) // page)
    config = _engine("mooncake.store").ReplicateConfig()
    config.preferred_segment, config.replica_num = status["segment"], pool["replicas"]
    maps = host.read(f"/proc/{status['pid']}/maps")
    put_seconds, get_seconds, same, inside, copies = [], [], True, True, pool["replicas"]
    for _sample in range(samples):
        # A key of its own for each: with masters in etcd, a key that was removed just now is taken and dropped silently.
        key, data = f"agentfleet-probe-{os.urandom(8).hex()}", os.urandom(size)
        try:
            start = time.perf_counter()
            rc = client.put(key, data, config)
            put_seconds.append(time.perf_counter() - start)
            if rc != 0:
                return {**result, "problem": f"put of {size} bytes returned {rc}"}
            start = time.perf_counter()
            got = client.get(key)
            get_seconds.append(time.perf_counter() - start)
            same = same and got == data
            # The engine says at which address of the store the object lies, the kernel to what that address belongs.
            parts = [
                replica.get_memory_descriptor().buffer_descriptor
                for replica in client.get_replica_desc(key)
                if replica.is_memory_replica()
            ]
            copies = min(copies, len(parts))
            inside = inside and any(holds(maps, name, part.buffer_address, part.size) for part in parts)
        finally:
            client.remove(key, True)
    result.update(
        **summary(put_seconds, get_seconds, size),
        replicas=copies,
    )
    problems = {
        "what was read differs from what was written": not same,
        "the engine placed the object outside of this tier's memory": not inside,
        f"{on_node} of {tier['size_bytes']} bytes lie on NUMA node {node}": on_node != tier["size_bytes"],
        f"an object got {copies} of {pool['replicas']} replicas: each needs a store of its own": copies
        < pool["replicas"],
    }
    result["problem"] = next((text for text, true in problems.items() if true), "")
    result["verified"] = not result["problem"]
    if result["verified"]:
        del result["problem"]
    return result


def main(arguments: t.Sequence[str]) -> None:
    """A verb, a pool (and ``-TIER`` of it for ``store``), and what the verb needs."""
    verb, name, rest = arguments[0], arguments[1], arguments[2:]
    if verb == "master":
        master(name)
    elif verb == "policy":
        policy(name)
    elif verb == "guard":
        guard(name.partition("-")[0])
    elif verb == "store":
        store(*name.split("-"))
    elif verb == "probe":
        guard(name)
        _print(probe(name, int(rest[0]), int(rest[1])))
    elif verb == "holds":
        _print(holds_now(name))
    elif verb == "drain":
        _print(drain(name, rest[0].split(","), float(rest[1])))
    elif verb == "quotas":
        _print(quotas(name))
    elif verb == "set-quotas":
        guard(name)
        set_quotas(name)
    else:
        raise SystemExit(f"{verb!r} is no verb of this program")


def _print(value: t.Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (HostError, OSError) as error:
        raise SystemExit(f"{' '.join(sys.argv[1:])}: {error}") from error
