# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Health of KV-cache pools: real puts, gets and comparisons on each tier, with bandwidth and latency."""

from __future__ import annotations

import contextlib
import json
import os
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot, _connectors, _slab
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake import (
    ENGINE,
    POOLS,
    devdax_of_memdevs,
    summary,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Looking, Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size

PROGRAM = f"{ENGINE}/bin/python3 -m {_boot.PACKAGE}._mooncake"


def agent(*arguments: str) -> list[str]:
    """The command line of our program in the engine's Python, in a control group of its own that it may guard."""
    environment = [f"PYTHONPATH={_boot.LIBRARY}", "PYTHONDONTWRITEBYTECODE=1"]
    return ["systemd-run", "--scope", "--quiet", "env", *environment, *PROGRAM.split(), *arguments]


def declared(host: Host) -> dict[str, dict[str, t.Any]]:
    """The pools declared on this host, by name."""
    found = {}
    for path in host.glob(f"{POOLS}/*.json"):
        pool = json.loads(host.read(path))
        found[pool["name"]] = pool
    return found


class PoolInfo(Looking):
    """What pools can do, as a resource that never changes anything.

    :param names: pools to probe; all that are declared when None
    """

    def __init__(self, host: Host, names: t.Sequence[str] | None, probe_size: str | None, samples: int) -> None:
        self.host, self.names = host, names
        self.probe_bytes = parse_size("probe_size", probe_size) if probe_size else 0
        self.samples = samples
        if not 1 <= samples <= 10000:
            raise Refused("samples", samples, "not a number of objects", "Use 1 to 10000")

    def observe(self) -> dict[str, t.Any]:
        """Declarations, and the probe of each wanted pool."""
        pools = declared(self.host)
        for index, name in enumerate(self.names or ()):
            if name not in pools:
                known = ", ".join(pools) or "none"
                raise Refused(f"names[{index}]", name, "no such pool on this host", f"Declared here: {known}")
        return {name: self._pool(pool) for name, pool in pools.items() if self.names is None or name in self.names}

    def _pool(self, pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        # What the model stores at a time, if it is known: that is what its bandwidth is about.
        size = self.probe_bytes or min(pool.get("block_bytes") or 1 << 20, 64 << 20)
        found: dict[str, t.Any] = {"engine": pool["engine"], "tiers": probe(self.host, pool, size, self.samples)}
        if pool.get("tenants") and pool["engine"] == "mooncake":
            done = self.host.run(agent("quotas", pool["name"]), check=False)
            found["tenants"] = json.loads(done.stdout) if done.rc == 0 else {"problem": done.text[-500:]}
        return found

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The pools as they were measured."""
        return {"pools": observed, "engine_version": self.host.link_name(ENGINE).partition("-")[2]}


def probe(host: Host, pool: t.Mapping[str, t.Any], probe_bytes: int, samples: int) -> list[dict[str, t.Any]]:
    """Each tier of a pool with what it was measured to do; never raises for a sick pool."""
    empty: dict[str, t.Any] = {
        "numa_node": None,
        "pages_on_node": 0,
        "pages_elsewhere": 0,
        "put_bytes_per_second": 0,
        "get_bytes_per_second": 0,
        "verified": False,
    }
    by_engine: dict[str, dict[str, t.Any]] = {}
    problem = ""
    if pool["engine"] == "mooncake":
        done = host.run(agent("probe", pool["name"], str(probe_bytes), str(samples)), timeout_seconds=600, check=False)
        lines = done.stdout.strip().splitlines()
        if done.rc == 0 and lines:
            by_engine = {tier["name"]: tier for tier in json.loads(lines[-1])}
        else:
            problem = done.text[-500:]
    found = []
    for tier in pool["tiers"]:
        base = {**empty, **{key: tier[key] for key in ("name", "medium", "size_bytes")}}
        if tier["name"] in by_engine:
            measured = by_engine[tier["name"]]
        elif tier.get("path"):
            size = min(probe_bytes, tier["size_bytes"] // 4)
            measured = _probe_directory(host, pool, tier, size, samples)
        elif tier.get("devdax"):
            measured = _probe_devdax(host, tier)
        else:
            measured = {"problem": problem or "the engine said nothing of it"}
        found.append({**base, **measured})
    return found


def _probe_directory(
    host: Host, pool: t.Mapping[str, t.Any], tier: t.Mapping[str, t.Any], size: int, samples: int
) -> dict[str, t.Any]:
    try:
        paged = [connector for connector in pool.get("connectors", []) if _connectors.slabs(pool, connector)]
        if not paged:
            return _probe_files(host.path(tier["path"]), size, samples)
        found = [_probe_pages(host, pool, connector, samples) for connector in paged]
        return next((one for one in found if not one["verified"]), found[0])
    except (HostError, OSError) as error:
        return {"probe_bytes": size, "problem": f"{tier['path']}: {getattr(error, 'strerror', None) or error}"}


def _probe_pages(
    host: Host, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], samples: int
) -> dict[str, t.Any]:
    """Whole pages in the large file of each rank, where the engine's own map of pages says."""
    put_seconds, get_seconds, same = [], [], True
    mapped = _slab.page_map(connector["engine"], _connectors.url(connector))
    slabs = _connectors.slabs(pool, connector)
    for slab in slabs:
        with _slab.Pages(slab, host.path(slab.path), mapped) as pages:
            for _sample in range(max(1, samples // len(slabs))):
                key, data = f"agentfleet-probe-{os.urandom(8).hex()}", os.urandom(slab.page_bytes)
                start = time.perf_counter()
                page = pages.put(key, data)
                put_seconds.append(time.perf_counter() - start)
                try:
                    start = time.perf_counter()
                    same = pages.get(key, page, len(data)) == data and same
                    get_seconds.append(time.perf_counter() - start)
                finally:
                    pages.give_back(key, page)
    counted = {"pages": sum(slab.pages for slab in slabs), "files": len(slabs)}
    return {**counted, **_judged(summary(put_seconds, get_seconds, slabs[0].page_bytes), same)}


def _probe_files(directory: str, size: int, samples: int) -> dict[str, t.Any]:
    put_seconds, get_seconds, same = [], [], True
    for _sample in range(samples):
        path = os.path.join(directory, f".agentfleet-probe-{os.urandom(8).hex()}")
        try:
            data = os.urandom(size)
            start = time.perf_counter()
            with open(path, "xb") as file:  # a new one each time: its directory's owner could put a link in its place
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            put_seconds.append(time.perf_counter() - start)
            with open(path, "rb", buffering=0) as raw:
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not the page cache
                start = time.perf_counter()
                same = raw.read() == data and same
                get_seconds.append(time.perf_counter() - start)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    return _judged(summary(put_seconds, get_seconds, size), same)


def _judged(measured: dict[str, t.Any], same: bool) -> dict[str, t.Any]:
    problem = {} if same else {"problem": "what was read differs from what was written"}
    return {**measured, "verified": same, **problem}


def _probe_devdax(host: Host, tier: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """A device that an inference engine maps is looked at, not written: it may be in use."""
    try:
        device = devdax_of_memdevs(host, tier["memdevs"])
    except HostError as error:
        return {"problem": str(error)}
    size = host.read_int(f"/sys/bus/dax/devices/{os.path.basename(device)}/size", 0) or 0
    enough = size >= tier["size_bytes"]
    return {"verified": enough, **({} if enough else {"problem": f"{device} has {size} bytes"})}
