# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of a pool, run on a lab host in the engine's Python. Content follows from the key, so that any host can verify.

client.py put|get POOL TENANT PREFIX COUNT BYTES REPLICAS STORE    STORE: tier that writes prefer, or - for any
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host


def content(key: str, size: int) -> bytes:
    """The bytes of a key."""
    return hashlib.shake_128(key.encode()).digest(size)


def main() -> None:
    """Put or get, and print what became of each object."""
    verb, name, tenant, prefix, count, size, replicas, tier = sys.argv[1:]
    pool = _mooncake._pool(name)
    client = _mooncake._client(pool, 64 << 20, "", _mooncake._tenant_ids(name)[tenant])
    config = importlib.import_module("mooncake.store").ReplicateConfig()
    config.replica_num = int(replicas)
    if tier != "-":
        config.preferred_segment = (_mooncake.status_of(Host(), name, tier) or {})["segment"]
    good, kinds = [], {}
    for index in range(int(count)):
        key = f"{prefix}{index}"
        data = content(key, int(size))
        if verb == "put":
            good += [key] if client.put(key, data, config) == 0 else []
        else:
            good += [key] if client.get(key) == data else []
        for replica in client.get_replica_desc(key):
            kind = "memory" if replica.is_memory_replica() else "disk" if replica.is_local_disk_replica() else "other"
            kinds[kind] = kinds.get(kind, 0) + 1
    client.close()
    print(json.dumps({"good": len(good), "replicas": kinds, "time": time.time()}))


if __name__ == "__main__":
    main()
