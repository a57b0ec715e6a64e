#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module memory_tiering: the kernel's own tiering of memory."""

from __future__ import annotations

DOCUMENTATION = r"""
module: memory_tiering
short_description: Demotion, promotion, weighted interleave and zswap of the kernel
version_added: 0.1.0
description:
  - Sets how the kernel places pages over fast and slow memory. Options that are left out are left alone.
  - An option that the running kernel lacks is refused with the reason.
  - Refused on UnifiedBus hosts, which need NUMA balancing off.
author: agentfleet.metal contributors (@agentfleet)
options:
  demotion:
    description: Move cold pages to slower memory instead of dropping them.
    type: bool
  numa_balancing:
    description: V(0) is off, V(1) keeps pages near their CPU, V(2) promotes hot pages from slower tiers.
    type: int
    choices: [0, 1, 2]
  promote_rate_limit_mib:
    description:
      - With O(numa_balancing=2), the MiB per second that may be promoted. The kernel's own value is practically
        unlimited; 200 to 1000 suits work that is sensitive to latency.
    type: int
  interleave_weights:
    description:
      - Weights (1 to 255) for programs that use weighted interleave (C(numactl --weighted-interleave)). A dictionary
        from a selector of nodes to a weight. Selectors are V(cpu) (nodes with CPUs), V(cxl) (nodes made of CXL
        regions), V(node1) (a node that firmware fixes), or the serial number or PCI address of a CXL memory device.
      - V(auto) lets the kernel compute weights where it can, and else takes the smallest whole numbers in the ratio of
        the bandwidths that firmware (HMAT) and devices (CDAT) tell.
    type: raw
  zswap:
    description: Parameters of zswap, the compressed cache for swapped pages.
    type: dict
    suboptions:
      enabled:
        description: Whether zswap is on.
        type: bool
      compressor:
        description: Compression algorithm, such as V(zstd).
        type: str
      max_pool_percent:
        description: The part of memory that the cache may take.
        type: int
      accept_threshold_percent:
        description: How far a full cache must shrink, in percent of its maximum, before it takes pages again.
        type: int
      shrinker_enabled:
        description: Whether cold entries are written back when memory is short.
        type: bool
      zpool:
        description: The allocator. Newer kernels have no such parameter.
        type: str
  persist:
    description:
      - Set the same at boot, without Ansible, by the unit C(agentfleet-restore.service). With V(false), what an
        earlier call stored is forgotten.
    type: bool
    default: true
extends_documentation_fragment: agentfleet.metal.attributes
seealso:
  - module: agentfleet.metal.dax_device
"""

EXAMPLES = r"""
- name: Tier memory between DRAM and CXL
  agentfleet.metal.memory_tiering:
    demotion: true
    numa_balancing: 2
    promote_rate_limit_mib: 500
    interleave_weights: {cpu: 4, cxl: 1}
    zswap: {enabled: true, compressor: zstd, shrinker_enabled: true}
"""

RETURN = r"""
tiering:
  description: Tiers (fastest first) and policies as they are after the run (in check mode, as they are now).
  returned: success
  type: dict
  sample:
    tiers: [{tier: 4, nodes: [0]}, {tier: 22, nodes: [2]}]
    demotion: true
    balancing: 2
    promote_rate_limit_mib: 500
    weighted_interleave: {"0": 4, "2": 1}
    zswap: {enabled: "Y", compressor: zstd}
plan:
  description: The steps, each with verb, object, before, after, why and disruptive.
  returned: success
  type: list
  elements: dict
refused:
  description: Option, value, problem and remedy, when a wish is refused.
  returned: when a wish is refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._tiering import OPTIONS, MemoryTiering


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: MemoryTiering(Host(), module.params))


if __name__ == "__main__":
    main()
