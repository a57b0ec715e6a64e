# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts and gets objects of given sizes through several arms in turns, and prints the seconds of each as JSON.

client.py JSON    {"arms": {NAME: [MASTER, SEGMENT]}, "bytes": of each segment, "node": where its memory lies or null,
                  "count": objects, "sizes": []}

Each segment is filled once and emptied before, so that its memory exists and is mapped. The objects come from and go into
a registered buffer, as inference engines do it. The arms take turns with each object, so that what else the machine does
meets them alike.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
import typing as t

from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake

FILL_BYTES = 8 << 20
WARM = 2  # objects before those that count: connections, pages


def address_of(memory: t.Any) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def copies(source: int, target: int, size: int) -> float:
    """Seconds of one memcpy."""
    start = time.perf_counter()
    ctypes.memmove(target, source, size)
    return time.perf_counter() - start


class Client:
    """A client of one master that puts into one segment."""

    def __init__(self, master: str, segment: str) -> None:
        self.engine, self.config = MooncakeDistributedStore(), ReplicateConfig()
        if self.engine.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", master) != 0:
            sys.exit(f"no master at {master}")
        self.config.preferred_segment = segment

    def buffer(self, size: int) -> t.Any:
        """Memory that the engine may send from and receive into."""
        memory = mmap.mmap(-1, size)
        if self.engine.register_buffer(address_of(memory), size) != 0:
            sys.exit(f"{size} bytes were not registered")
        return memory

    def fill(self, size: int) -> None:
        """Put as much as there is room for, and remove it; the last objects may be refused or evict the first."""
        source, keys = address_of(self.buffer(FILL_BYTES)), [f"fill-{index}" for index in range(size // FILL_BYTES)]
        for key in keys:
            self.engine.put_from(key, source, FILL_BYTES, self.config)
        for key in keys:
            self.engine.remove(key, True)

    def once(self, key: str, source: int, target: int, size: int) -> tuple[float, float]:
        """Seconds of one put and of the get of the same object."""
        start = time.perf_counter()
        rc = self.engine.put_from(key, source, size, self.config)
        middle = time.perf_counter()
        got = self.engine.get_into(key, target, size)
        end = time.perf_counter()
        if rc != 0 or got != size:
            sys.exit(f"{size} bytes: put returned {rc}, get {got}")
        self.engine.remove(key, True)
        return middle - start, end - middle


def measure(arms: dict[str, Client], size: int, count: int, node: int | None) -> dict[str, dict[str, list[float]]]:
    """Arm -> seconds of each put and get, and ``memcpy`` into and out of memory on the segments' node."""
    buffers = {name: [client.buffer(size) for _copy in range(2)] for name, client in arms.items()}
    data = os.urandom(size)
    for source, _target in buffers.values():
        source[:] = data
    _fd, _memory, far = _mooncake._bound_memory("bench", size, node)
    near = address_of(next(iter(buffers.values()))[0])
    found: dict[str, dict[str, list[float]]] = {name: {"put": [], "get": []} for name in (*arms, "memcpy")}
    for index in range(count + WARM):
        for name in list(arms) if index % 2 else list(arms)[::-1]:
            put, get = arms[name].once(f"bench-{size}-{index}", *map(address_of, buffers[name]), size)
            if index >= WARM:
                found[name]["put"].append(put)
                found[name]["get"].append(get)
            elif buffers[name][1][:] != data:
                sys.exit(f"{size} bytes: what was got differs from what was put")
        if index >= WARM:
            found["memcpy"]["put"].append(copies(near, far, size))
            found["memcpy"]["get"].append(copies(far, near, size))
    for name, client in arms.items():
        for one in buffers[name]:
            client.engine.unregister_buffer(address_of(one))
    return found


def main() -> None:
    """Fill, and measure."""
    wish = json.loads(sys.argv[1])
    arms = {name: Client(*arm) for name, arm in wish["arms"].items()}
    for client in arms.values():
        client.fill(wish["bytes"])
    print(json.dumps({size: measure(arms, size, wish["count"], wish["node"]) for size in wish["sizes"]}))
    for client in arms.values():
        client.engine.close()


if __name__ == "__main__":
    main()
