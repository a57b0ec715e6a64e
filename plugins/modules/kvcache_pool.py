#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kvcache_pool
short_description: Run KV-cache pools over DRAM, CXL memory and SSD
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Declares pools, each an engine with tiers. A tier has its own memory or directory and, with Mooncake, its own
    store.
  - The memory of a Mooncake tier is made by us, bound to one NUMA node and locked before the engine gets it, so that
    the kernel's own numbers prove where it lies. Only the data are bound; the engine's code stays in fast memory.
  - Master and stores are unprivileged systemd units that come back after a reboot without Ansible.
  - Pools that are not named are left alone.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  pools:
    description: The pools of this host.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the pool, of the characters a-z, 0-9 and C(_).
        type: str
        required: true
      state:
        description: Whether the pool runs and comes back at boot, or is gone.
        type: str
        choices: [present, absent]
        default: present
      engine:
        description:
          - V(mooncake) serves memory over the network; role C(mooncake) installs it.
          - V(filesystem) is a directory that an inference engine fills.
        type: str
        default: mooncake
      address:
        description: Address under which other hosts reach the stores of this host.
        type: str
        default: 127.0.0.1
      protocol:
        description: How Mooncake moves data.
        type: str
        choices: [tcp, rdma]
        default: tcp
      rdma_devices:
        description: RDMA devices to use with O(pools[].protocol=rdma).
        type: list
        elements: str
        default: []
      master:
        description: The Mooncake master that knows where each object is.
        type: dict
        default: {}
        suboptions:
          address:
            description: Address at which the master listens and the stores find it.
            type: str
            default: 127.0.0.1
          port:
            description: TCP port of the master.
            type: int
            default: 50051
          metrics_port:
            description: TCP port of the master's metrics.
            type: int
            default: 9003
          run:
            description: Whether this host runs the master; V(false) where another host does.
            type: bool
            default: true
      tiers:
        description: The tiers in order, fastest first.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the tier within the pool. Its medium, if left out.
            type: str
          medium:
            description: V(dram) or V(cxl) with Mooncake, V(ssd) with a filesystem.
            type: str
            choices: [dram, cxl, ssd]
            required: true
          size:
            description: Size such as V(64GiB), in whole MiB.
            type: str
            required: true
          memdevs:
            description:
              - Serial numbers of the CXL memory devices whose region holds a V(cxl) tier.
              - Its NUMA node is looked up at each start.
            type: list
            elements: str
            default: []
          numa_node:
            description:
              - NUMA node of the tier, instead of O(pools[].tiers[].memdevs).
              - A V(dram) tier without it may lie anywhere.
            type: int
          path:
            description: Directory of an V(ssd) tier. It is made if missing and never emptied.
            type: str
      lose_data:
        description: Allow a change or removal that loses what the pool holds.
        type: bool
        default: false
"""

EXAMPLES = r"""
- name: A pool of fast memory and of the CXL region made of two devices
  agentfleet.metal.kvcache_pool:
    pools:
      - name: agents
        tiers:
          - {medium: dram, size: 64GiB, numa_node: 0}
          - {medium: cxl, size: 256GiB, memdevs: ["0x1", "0x2"]}

- name: A directory for an engine that keeps its blocks in files
  agentfleet.metal.kvcache_pool:
    pools:
      - name: files
        engine: filesystem
        tiers:
          - {medium: ssd, size: 1TiB, path: /srv/kvcache/files}
"""

RETURN = r"""
plan:
  description: The steps, in order.
  returned: always
  type: list
  elements: dict
pools:
  description: Each pool's C(name), C(state), C(engine) and C(units) with their state.
  returned: always
  type: list
  elements: dict
engine_version:
  description: Version of the installed Mooncake; empty without one.
  returned: always
  type: str
refused:
  description: Why a wish was refused, as C(option), C(value), C(problem) and C(remedy).
  returned: on refusal
  type: dict
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._pool import Pools

MASTER = {
    "address": {"type": "str", "default": "127.0.0.1"},
    "port": {"type": "int", "default": 50051},
    "metrics_port": {"type": "int", "default": 9003},
    "run": {"type": "bool", "default": True},
}
TIER = {
    "name": {"type": "str"},
    "medium": {"type": "str", "choices": ["dram", "cxl", "ssd"], "required": True},
    "size": {"type": "str", "required": True},
    "memdevs": {"type": "list", "elements": "str", "default": []},
    "numa_node": {"type": "int"},
    "path": {"type": "str"},
}
POOL = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "engine": {"type": "str", "default": "mooncake"},
    "address": {"type": "str", "default": "127.0.0.1"},
    "protocol": {"type": "str", "choices": ["tcp", "rdma"], "default": "tcp"},
    "rdma_devices": {"type": "list", "elements": "str", "default": []},
    "master": {"type": "dict", "options": MASTER, "default": {}},
    "tiers": {"type": "list", "elements": "dict", "options": TIER, "default": []},
    "lose_data": {"type": "bool", "default": False},
}


def build(params: t.Mapping[str, t.Any], host: Host) -> Pools:
    """The resource of these parameters."""
    return Pools(host, params["pools"])


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"pools": {"type": "list", "elements": "dict", "required": True, "options": POOL}},
        supports_check_mode=True,
    )
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
