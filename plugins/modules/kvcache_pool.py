#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kvcache_pool
short_description: Run KV-cache pools over DRAM, CXL memory, SSD and 3FS
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Declares pools, each an engine with tiers. A tier has its own memory or directory and, with Mooncake, its own
    store.
  - The memory of a Mooncake tier is made by us, bound to one NUMA node and locked before the engine gets it, so that
    the kernel's own numbers prove where it lies. Only the data are bound; the engine's code stays in fast memory.
  - Master and stores are unprivileged systemd units that come back after a reboot without Ansible.
  - A tier that becomes larger grows while it serves. One that becomes smaller or goes is drained to the pool's other
    stores first; where they have no room, the change is refused unless O(pools[].lose_data) is set. Hosts that do so at
    the same time take turns.
  - Connectors are written below C(/etc/agentfleet/connectors/POOL/ENGINE-BACKEND), as files, an C(environment) that
    systemd and shells read, and C(arguments) with one argument of the engine on a line.
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
        description:
          - V(present) runs the pool and brings it back at boot, V(absent) removes it, which is refused while the stores
            of this host hold data.
          - V(drained) takes this host out of a Mooncake pool over several hosts. What its stores hold is moved to those
            of the others first.
        type: str
        choices: [present, absent, drained]
        default: present
      engine:
        description:
          - V(mooncake) serves memory over the network; role C(mooncake) installs it.
          - V(threefs) is a directory of a mounted 3FS, V(filesystem) any directory.
        type: str
        default: mooncake
      model:
        description:
          - Model whose KV cache the pool holds, which decides the size of a block. A preset's name such as
            V(Llama-3.1-70B), or the path of the model's directory or C(config.json) on the host.
        type: str
      dtype:
        description: Format of a cached element.
        type: str
        choices: [fp32, bf16, fp16, fp8, int8, int4, fp4, fp8_ds_mla]
        default: bf16
      group_size:
        description:
          - Elements that share a scale; 0 is one scale for a whole tensor, which costs nothing for a token.
          - Left out it is 32 for 4-bit formats and 0 for the others.
        type: int
      scale_dtype:
        description: Format of a scale.
        type: str
        choices: [fp32, bf16, fp16, fp8]
        default: fp16
      zero_point:
        description: Whether each group has a zero point beside its scale.
        type: bool
        default: false
      bytes_per_token:
        description: Bytes of one token as they are stored, instead of O(pools[].model).
        type: int
      page_tokens:
        description: Tokens of one block, a power of two.
        type: int
        default: 64
      tensor_parallel:
        description: GPUs that share a model by tensor parallelism.
        type: int
        default: 1
      capacity:
        description: Size of a Mooncake pool over all its hosts, which bounds the tenants' quotas. This host's tiers, if left out.
        type: str
      replicas:
        description:
          - Copies of each object, on different stores.
          - With Mooncake the client that writes decides; the probe holds the pool to this number.
        type: int
        default: 1
      eviction_policy:
        description:
          - What goes first when a tier is full, where the engine lets one choose. Mooncake does for its disks.
        type: str
        choices: [lru, fifo, arc]
        default: lru
      eviction_high_watermark:
        description: Share of a Mooncake pool's memory at which eviction begins. 0.95, if left out.
        type: float
      write_policy:
        description:
          - V(write_through) writes a block to the slower tiers at once, V(write_back) when it has to make room.
          - SGLang follows it, and with V(write_back) an V(ssd) tier of Mooncake. V(write_through_selective) is SGLang's alone.
        type: str
        choices: [write_through, write_back, write_through_selective]
        default: write_through
      address:
        description: Address under which other hosts reach this host's stores, and the only one they listen on.
        type: str
        default: 127.0.0.1
      listen_all_addresses:
        description: Let the stores listen on all addresses, as the engine does by itself.
        type: bool
        default: false
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
      etcd:
        description:
          - Endpoints C(HOST:PORT) of an etcd cluster, in which masters elect a leader and record what they acknowledged.
          - Several hosts can then run a master, and one that dies is replaced without losing objects.
        type: list
        elements: str
        default: []
      master:
        description: The Mooncake master that knows where each object is.
        type: dict
        default: {}
        suboptions:
          address:
            description: Address at which the master listens and, without O(pools[].etcd), the stores find it.
            type: str
            default: 127.0.0.1
          port:
            description: TCP port of the master.
            type: int
            default: 50051
          metrics_address:
            description:
              - Address of the master's metrics, at which objects can also be deleted and quotas set.
              - The master's address, if left out, and 127.0.0.1 for a pool with tenants and one master.
            type: str
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
            description:
              - V(dram), V(cxl) and, as the last one, V(ssd) with Mooncake, which offloads objects there.
              - V(ssd) with a filesystem, and V(cxl) with O(pools[].tiers[].devdax) beside it. V(threefs) with 3FS.
            type: str
            choices: [dram, cxl, ssd, threefs]
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
          devdax:
            description: Give the region's dax device to the inference engine (LMCache's dax backend) instead of its node.
            type: bool
            default: false
          path:
            description: Directory of an V(ssd) or V(threefs) tier. It is made if missing and never emptied.
            type: str
          mount_point:
            description: Where the 3FS of a V(threefs) tier is mounted.
            type: str
      tenants:
        description: Who may use the pool, and how much of it. Without any, everyone shares all.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the tenant, of the characters a-z, 0-9 and C(_).
            type: str
            required: true
          quota:
            description: What the tenant may fill. Beyond it its own oldest objects go. With Mooncake it is one of memory; copies on
              SSD are not counted.
            type: str
            required: true
          token:
            description:
              - Secret of the tenant, with Mooncake. The tenant's name in the engine is made of it, so that only who
                has the tenant's connector finds its objects. Another token is an empty tenant.
            type: str
          owner:
            description:
              - User who owns the tenant's directory, with the other engines. Nobody else can open it (mode 0700).
              - Another owner gets the directory with all that is in it. Left out, a directory that is there stays as it is.
            type: str
      connectors:
        description: Configurations of inference engines to write.
        type: list
        elements: dict
        default: []
        suboptions:
          engine:
            description: The inference engine.
            type: str
            choices: [sglang, vllm, lmcache]
            required: true
          backend:
            description:
              - SGLang has V(file), V(mooncake) and V(hf3fs), vLLM V(offloading), V(mooncake), V(mooncake_transfer),
                V(hf3fs) and V(lmcache), LMCache V(cpu), V(disk), V(mooncake), V(hf3fs) and V(dax).
            type: str
            required: true
          tenant:
            description: Tenant for whom the connector is.
            type: str
          tensor_parallel:
            description:
              - GPUs of this engine, if other than the pool's. A V(hf3fs) connector of SGLang or vLLM can have others only with
                O(pools[].model), which tells the size of their pages.
            type: int
          host_memory:
            description:
              - Host memory that the engine takes for its own first tier or for staging, its GPUs together.
              - V(4GiB), or 1GiB for each GPU if that is more, if left out. SGLang needs no less.
            type: str
          address:
            description: Address of the engine's host; the pool's, if left out.
            type: str
          python:
            description:
              - The engine's Python interpreter on this host. With it a V(hf3fs) connector is refused if the engine
                could not import the 3FS client, where it would take a mock without a word. Without it the module warns.
            type: str
          metadata_address:
            description: Address of the service that counts the pages of a V(hf3fs) connector; the pool's, if left out.
            type: str
          metadata_port:
            description:
              - TCP port of that service. 18001 for SGLang, if left out; vLLM always asks port 18000 of its own host.
              - Each connector needs a service of its own, for each tenant, too, as it does not tell their pages apart.
            type: int
          metadata_run:
            description: Whether this host runs that service, by O(pools[].connectors[].python).
            type: bool
            default: false
      lose_data:
        description: Allow a change or removal that loses what the pool holds.
        type: bool
        default: false
"""

EXAMPLES = r"""
- name: A pool of fast memory and of the CXL region made of two devices, offloaded to SSD
  agentfleet.metal.kvcache_pool:
    pools:
      - name: agents
        model: Llama-3.1-70B
        tensor_parallel: 8
        tiers:
          - {medium: dram, size: 64GiB, numa_node: 0}
          - {medium: cxl, size: 256GiB, memdevs: ["0x1", "0x2"]}
          - {medium: ssd, size: 2TiB, path: /srv/kvcache/agents}
        tenants:
          - {name: search, quota: 200GiB, token: "{{ vault_search_token }}"}
        connectors:
          - {engine: sglang, backend: mooncake, tenant: search}

- name: This host's part of a pool over several hosts, with masters that stand by for each other
  agentfleet.metal.kvcache_pool:
    pools:
      - name: shared
        address: 10.77.0.11
        replicas: 2
        etcd: ["10.77.0.11:2379", "10.77.0.12:2379", "10.77.0.13:2379"]
        master: {address: 10.77.0.11}
        tiers:
          - {medium: dram, size: 64GiB, numa_node: 0}

- name: A 3FS directory for SGLang and vLLM
  agentfleet.metal.kvcache_pool:
    pools:
      - name: cold
        engine: threefs
        model: DeepSeek-V3
        tiers:
          - {medium: threefs, size: 1TiB, path: /3fs/stage/kv, mount_point: /3fs/stage}
        connectors:
          - {engine: sglang, backend: hf3fs, python: /opt/sglang/bin/python, metadata_run: true}
          - {engine: vllm, backend: offloading}
"""

RETURN = r"""
plan:
  description: The steps, in order.
  returned: always
  type: list
  elements: dict
pools:
  description: Each pool's C(name), C(state), C(engine), C(units) with their state, and the paths of its
    C(connectors).
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
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge, unlogged
from ansible_collections.agentfleet.metal.plugins.module_utils._pool import Pools

MASTER = {
    "address": {"type": "str", "default": "127.0.0.1"},
    "port": {"type": "int", "default": 50051},
    "metrics_address": {"type": "str"},
    "metrics_port": {"type": "int", "default": 9003},
    "run": {"type": "bool", "default": True},
}
TIER = {
    "name": {"type": "str"},
    "medium": {"type": "str", "choices": ["dram", "cxl", "ssd", "threefs"], "required": True},
    "size": {"type": "str", "required": True},
    "memdevs": {"type": "list", "elements": "str", "default": []},
    "numa_node": {"type": "int"},
    "devdax": {"type": "bool", "default": False},
    "path": {"type": "str"},
    "mount_point": {"type": "str"},
}
TENANT = {
    "name": {"type": "str", "required": True},
    "quota": {"type": "str", "required": True},
    "token": {"type": "str", "no_log": True},
    "owner": {"type": "str"},
}
CONNECTOR = {
    "engine": {"type": "str", "choices": ["sglang", "vllm", "lmcache"], "required": True},
    "backend": {"type": "str", "required": True},
    "tenant": {"type": "str"},
    "tensor_parallel": {"type": "int"},
    "host_memory": {"type": "str"},
    "address": {"type": "str"},
    "python": {"type": "str"},
    "metadata_address": {"type": "str"},
    "metadata_port": {"type": "int"},
    "metadata_run": {"type": "bool", "default": False},
}
POOL = {
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent", "drained"], "default": "present"},
    "engine": {"type": "str", "default": "mooncake"},
    "model": {"type": "str"},
    "dtype": {
        "type": "str",
        "choices": ["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4", "fp8_ds_mla"],
        "default": "bf16",
    },
    "group_size": {"type": "int"},
    "scale_dtype": {"type": "str", "choices": ["fp32", "bf16", "fp16", "fp8"], "default": "fp16"},
    "zero_point": {"type": "bool", "default": False},
    "bytes_per_token": {"type": "int", "no_log": False},  # of a language model
    "page_tokens": {"type": "int", "default": 64, "no_log": False},
    "tensor_parallel": {"type": "int", "default": 1},
    "capacity": {"type": "str"},
    "replicas": {"type": "int", "default": 1},
    "eviction_policy": {"type": "str", "choices": ["lru", "fifo", "arc"], "default": "lru"},
    "eviction_high_watermark": {"type": "float"},
    "write_policy": {
        "type": "str",
        "choices": ["write_through", "write_back", "write_through_selective"],
        "default": "write_through",
    },
    "address": {"type": "str", "default": "127.0.0.1"},
    "listen_all_addresses": {"type": "bool", "default": False},
    "protocol": {"type": "str", "choices": ["tcp", "rdma"], "default": "tcp"},
    "rdma_devices": {"type": "list", "elements": "str", "default": []},
    "etcd": {"type": "list", "elements": "str", "default": []},
    "master": {"type": "dict", "default": {}, "options": MASTER},
    "tiers": {"type": "list", "elements": "dict", "default": [], "options": TIER},
    "tenants": {"type": "list", "elements": "dict", "default": [], "options": TENANT},
    "connectors": {"type": "list", "elements": "dict", "default": [], "options": CONNECTOR},
    "lose_data": {"type": "bool", "default": False},
}


def build(params: t.Mapping[str, t.Any], host: Host) -> Pools:
    """The resource of these parameters."""
    return Pools(host, params["pools"])


def main() -> None:
    """Run the module."""
    module = unlogged(AnsibleModule)(
        argument_spec={"pools": {"type": "list", "elements": "dict", "required": True, "options": POOL}},
        supports_check_mode=True,
    )
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
