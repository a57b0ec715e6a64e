# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts and gets objects of given sizes and prints the seconds of each as JSON: client.py MASTER SEGMENT COUNT SIZE...

The objects come from and go into a registered buffer, as inference engines do it. The buffer is new for each size.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time

from mooncake.store import MooncakeDistributedStore, ReplicateConfig


def main() -> None:
    """Measure."""
    master, segment, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    client = MooncakeDistributedStore()
    if client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", master) != 0:
        sys.exit(f"no master at {master}")
    config = ReplicateConfig()
    config.preferred_segment = segment
    found = {}
    for size in map(int, sys.argv[4:]):
        memory = [mmap.mmap(-1, size) for _copy in range(2)]
        source, target = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in memory)
        memory[0][:] = os.urandom(size)
        for address in (source, target):
            if client.register_buffer(address, size) != 0:
                sys.exit(f"{size} bytes were not registered")
        put, get, copy = [], [], []
        for index in range(count + 2):  # the first two warm up connections and pages
            key = f"bench-{size}-{index}"
            start = time.perf_counter()
            rc = client.put_from(key, source, size, config)
            middle = time.perf_counter()
            got = client.get_into(key, target, size)
            end = time.perf_counter()
            if rc != 0 or got != size or (index == 0 and memory[1][:] != memory[0][:]):
                sys.exit(f"{size} bytes: put returned {rc}, get {got}")
            client.remove(key, True)
            ctypes.memmove(target, source, size)
            copied = time.perf_counter()
            ctypes.memmove(target, source, size)
            copy.append(time.perf_counter() - copied)
            put.append(middle - start)
            get.append(end - middle)
        found[size] = {"put": put[2:], "get": get[2:], "memcpy": copy[2:]}
        for address in (source, target):
            client.unregister_buffer(address)
    client.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
