# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of a pool, run on a lab host in the engine's Python. Content follows from the key, so that any host can verify.

client.py POOL JOBS    JOBS: a JSON list of jobs, done in order by one process, since each start costs seconds there
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host


def content(key: str, size: int) -> bytes:
    """The bytes of a key."""
    return hashlib.shake_128(key.encode()).digest(size)


class Client:
    """One process's clients, one for each tenant."""

    def __init__(self, pool: str) -> None:
        self.pool, self.declaration = pool, _mooncake._pool(pool)
        self.tenants: dict[str, t.Any] = {}

    def tenant(self, name: str) -> t.Any:
        """The client of a tenant; a name that is not declared is given to the engine as it is."""
        if name not in self.tenants:
            secret = _mooncake._tenant_ids(self.pool).get(name, name)
            self.tenants[name] = _mooncake._client(self.declaration, 64 << 20, "", secret, patience_seconds=60)
        return self.tenants[name]

    def put(self, job: dict[str, t.Any]) -> dict[str, t.Any]:
        """Put the objects, and look at each as soon as it is acknowledged: a store may be killed meanwhile."""
        client, config = self.tenant(job["tenant"]), importlib.import_module("mooncake.store").ReplicateConfig()
        config.replica_num = job.get("replicas", 1)
        if "tier" in job:
            config.preferred_segment = self.status(job)["segment"]
        found = Found(self.memory(job))
        for index, key in enumerate(self.keys(job)):
            if index == job.get("kill_after"):
                self.kill(job)
            if client.put(key, content(key, job["size"]), config) == 0:
                found.add(key, client.get_replica_desc(key))
        return found.result()

    def get(self, job: dict[str, t.Any]) -> dict[str, t.Any]:
        """Get the objects that read back as they were written, after a bounded wait for all of them."""
        client, missing = self.tenant(job["tenant"]), self.keys(job)
        end = time.monotonic() + job.get("seconds", 0)
        while True:
            missing = [key for key in missing if client.get(key) != content(key, job["size"])]
            if not missing or time.monotonic() >= end:
                break
            time.sleep(1)
        found = Found(self.memory(job))
        for key in self.keys(job):
            if key not in missing:
                found.add(key, client.get_replica_desc(key))
        return found.result()

    def offloaded(self, job: dict[str, t.Any]) -> dict[str, t.Any]:
        """The objects once at least so many of them are on a disk, after a bounded wait for that."""
        client, end = self.tenant(job["tenant"]), time.monotonic() + job["seconds"]
        while True:
            found = Found(self.memory(job))
            for key in self.keys(job):
                found.add(key, client.get_replica_desc(key))
            if len(found.disk) >= job["least"] or time.monotonic() >= end:
                return found.result()
            time.sleep(1)

    def kill(self, job: dict[str, t.Any]) -> None:
        """Kill the store of a tier of this host."""
        os.kill(self.status(job)["pid"], signal.SIGKILL)

    def quotas(self, _job: dict[str, t.Any]) -> dict[str, t.Any]:
        """What the tenants may fill, and have filled."""
        return _mooncake.quotas(self.pool)

    def status(self, job: dict[str, t.Any]) -> dict[str, t.Any]:
        """The store of a job's tier on this host."""
        return _mooncake.status_of(Host(), self.pool, job["tier"]) or {}

    def memory(self, job: dict[str, t.Any]) -> t.Callable[[int, int], bool]:
        """Whether the kernel says of an address in that store that it belongs to the tier's own memory."""
        if "tier" not in job:
            return lambda address, size: False
        maps, name = Host().read(f"/proc/{self.status(job)['pid']}/maps"), _mooncake.memory_name(self.pool, job["tier"])
        return lambda address, size: _mooncake.holds(maps, name, address, size)

    @staticmethod
    def keys(job: dict[str, t.Any]) -> list[str]:
        """The keys of a job: named, or counted."""
        return job["keys"] if "keys" in job else [f"{job['prefix']}{index}" for index in range(job["count"])]


class Found:
    """What the engine says of the objects that were put or got."""

    def __init__(self, inside: t.Callable[[int, int], bool]) -> None:
        self.is_inside = inside
        self.good: list[str] = []
        self.twice: list[str] = []  # those with two replicas in memory
        self.disk: list[str] = []  # those with one on a disk
        self.inside = 0  # how many lie in the memory of the job's tier

    def add(self, key: str, replicas: t.Sequence[t.Any]) -> None:
        """Count an object's replicas."""
        parts = [x.get_memory_descriptor().buffer_descriptor for x in replicas if x.is_memory_replica()]
        self.good.append(key)
        self.twice += [key] if len(parts) == 2 else []
        self.disk += [key] if any(x.is_local_disk_replica() for x in replicas) else []
        self.inside += any(self.is_inside(part.buffer_address, part.size) for part in parts)

    def result(self) -> dict[str, t.Any]:
        """As JSON takes it."""
        return {name: getattr(self, name) for name in ("good", "twice", "disk", "inside")}


def main() -> None:
    """Do the jobs, and print what became of each."""
    client = Client(sys.argv[1])
    print(json.dumps([getattr(client, job["verb"])(job) for job in json.loads(sys.argv[2])]))
    for one in client.tenants.values():
        one.close()


if __name__ == "__main__":
    main()
