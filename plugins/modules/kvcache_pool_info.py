#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Health and speed of the KV-cache pools of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kvcache_pool_info
short_description: Prove and measure the KV-cache pools of a host
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Puts objects on each tier of each pool, gets them back, compares and removes them, and times each.
  - A Mooncake pool with more than one replica is verified only if each object had as many. Its V(ssd) tier is looked at
    as a directory, since the engine alone decides what goes there.
  - For a memory tier it also asks the engine at which address the object lies, and the kernel to which memory and
    NUMA node that address belongs (C(/proc/PID/numa_maps) of the store).
extends_documentation_fragment:
  - agentfleet.metal.attributes.info
options:
  names:
    description: Pools to look at; all that are declared on the host, if left out.
    type: list
    elements: str
  probe_size:
    description:
      - Size of an object. Never more than a quarter of the tier. In large files of an C(hf3fs) connector always a page.
      - The block of the pool's model, if left out, or 1MiB where none is known.
    type: str
  samples:
    description: Objects that are put and got on each tier, one after the other.
    type: int
    default: 8
"""

EXAMPLES = r"""
- name: Measure all pools
  agentfleet.metal.kvcache_pool_info:
  register: kvcache
"""

RETURN = r"""
pools:
  description: The pools by name.
  returned: always
  type: dict
  contains:
    engine:
      description: Engine of the pool.
      returned: always
      type: str
    tiers:
      description:
        - Each tier's C(name), C(medium), C(numa_node), C(size_bytes), C(put_bytes_per_second), C(get_bytes_per_second),
          C(verified), C(pages_on_node), C(pages_elsewhere), C(probe_bytes), C(samples), C(put_microseconds) and
          C(get_microseconds) with C(p50) and C(p99), C(replicas), of large files C(files) and
          C(pages), and, if it is not verified, C(problem).
      returned: always
      type: list
      elements: dict
    tenants:
      description: Each tenant's C(quota_bytes) and C(used_bytes), on the host of a Mooncake pool's master.
      returned: for a pool with tenants
      type: dict
engine_version:
  description: Version of the installed Mooncake; empty without one.
  returned: always
  type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._poolprobe import PoolInfo


def build(params: t.Mapping[str, t.Any], host: Host) -> PoolInfo:
    """The resource of these parameters."""
    return PoolInfo(host, params.get("names"), params.get("probe_size"), params["samples"])


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str"},
            "probe_size": {"type": "str"},
            "samples": {"type": "int", "default": 8},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
