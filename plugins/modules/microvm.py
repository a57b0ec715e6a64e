#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module microvm: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: microvm
short_description: Manage microVMs that share one copy of their root file system
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Declares, starts, stops and removes the microVMs of one call, with bounded parallelism. One bad item is refused
    before any is touched.
  - The root is an image of M(agentfleet.metal.image_store), attached as virtio-pmem and mounted with DAX, so that all
    microVMs of one image use one copy in the host's page cache; each has a writable layer of its own in its memory.
    No guest can change the image.
  - systemd supervises them, each as its own unprivileged dynamic user in the slice of its tenant. MicroVMs that run are
    back after a reboot without Ansible.
  - A microVM counts as started when the agent in it has answered over vsock. A start that fails is undone and reported
    with the console.
extends_documentation_fragment: agentfleet.metal.attributes
options:
  state:
    description:
      - V(present) defines, and leaves running or not as it is.
      - V(running) also starts and waits until each is ready. V(stopped) defines and stops by the power button.
      - V(absent) stops and removes everything that a microVM has on the host; only O(instances[].name) matters then.
    type: str
    choices: [present, running, stopped, absent]
    default: running
  instances:
    description: The microVMs.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name, also the guest's host name. Of V(a-z), V(0-9) and hyphen.
        type: str
        required: true
      driver:
        description:
          - Virtual machine monitor. V(qemu) is the distribution's QEMU, 8.2 or newer.
          - V(cloud_hypervisor) is Cloud Hypervisor of the role P(agentfleet.metal.cloud_hypervisor#role), on hosts with KVM. A
            microVM keeps the version that it was made with.
        type: str
        choices: [qemu, cloud_hypervisor]
        default: qemu
      image:
        description:
          - Name or digest in the host's image store. Needed unless O(state=absent) or O(instances[].from_snapshot) is given.
        type: str
        default: ""
      snapshots:
        description:
          - Whether snapshots can be made of it (M(agentfleet.metal.microvm_snapshot)). Its RAM is then a file below C(/run).
        type: bool
        default: false
      from_snapshot:
        description:
          - Name of a snapshot on the host that each start begins with, instead of booting. What the machine is made of
            (driver, image, CPUs, memory) comes from the snapshot. Its pages are in the host's memory once for all clones.
          - Name, addresses, MACs, machine-id, entropy, clock and O(instances[].environment) are its own before it counts as
            started. It has as many O(instances[].networks) as the microVM that the snapshot is of.
        type: str
        default: ""
      vcpus:
        description: Virtual CPUs.
        type: int
        default: 1
      memory:
        description: Guest memory in whole MiB, such as V(256MiB); at least V(96MiB).
        type: str
        default: 256MiB
      cid:
        description: Vsock address, unique on the host. By default derived from the name.
        type: int
      tenant:
        description: Tenant. Its microVMs run in the slice C(agentfleet-TENANT.slice).
        type: str
        default: default
      autostart:
        description: Whether a running microVM is started again when the host boots.
        type: bool
        default: true
      environment:
        description:
          - Environment of the agent, on a read-only disk of the microVM.
          - Not for secrets, since plans and diffs show it.
        type: dict
        default: {}
      kernel_arguments:
        description: Words added to the guest kernel's command line.
        type: list
        elements: str
        default: []
      shares:
        description: Directories of the host that the guest sees through virtiofsd.
        type: list
        elements: dict
        default: []
        suboptions:
          tag:
            description: Name of the share, unique in the microVM.
            type: str
            required: true
          source:
            description: Directory on the host.
            type: str
            required: true
          target:
            description: Mount point in the guest. By default C(/mnt/TAG).
            type: str
          readonly:
            description: Whether virtiofsd refuses every write.
            type: bool
            default: true
      networks:
        description: Networks that the microVM is attached to.
        type: list
        elements: dict
        default: []
        suboptions:
          network:
            description: One of O(networks[].name).
            type: str
            required: true
          address:
            description: Address in the network's prefix. By default the first free one, which is kept.
            type: str
          address6:
            description: The same in the network's O(networks[].prefix6).
            type: str
          mac:
            description: MAC of the network device. By default derived from the names of microVM and network.
            type: str
  networks:
    description:
      - Networks of the host for microVMs. A bridge and its rules in the packet filter exist while a microVM uses it.
      - A microVM can send from its own MAC and addresses only, and reach microVMs of its own tenant on the same network
        only. The host answers it pings and O(networks[].host_services) at the network's first address, and nothing else.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the network.
        type: str
        required: true
      prefix:
        description: IPv4 prefix such as V(10.88.0.0/24). The host has its first address.
        type: str
      prefix6:
        description: IPv6 prefix such as V(fd00:88::/64), alone or beside O(networks[].prefix).
        type: str
      bridge:
        description: Name of the bridge.
        type: str
        default: agentfleet0
      egress:
        description:
          - V(none) is no way out. V(nat) forwards with the host's address, V(routed) with the microVM's own; nobody outside
            can begin a connection. Neither leads to the host itself, to other networks of microVMs, or to link-local
            addresses such as a cloud's metadata service.
          - A host that did not forward before does so for microVMs only.
        type: str
        choices: [none, nat, routed]
        default: none
      egress_allow:
        description: Where O(networks[].egress) leads. Empty is everywhere.
        type: list
        elements: dict
        default: []
        suboptions:
          prefix:
            description: Prefix or address, IPv4 or IPv6.
            type: str
            required: true
          protocol:
            description: Protocol.
            type: str
            choices: [any, tcp, udp, icmp]
            default: any
          ports:
            description: Ports and ranges of them such as V(8000-8099), of V(tcp) or V(udp). Empty is all.
            type: list
            elements: str
            default: []
      host_services:
        description: Services of the host that microVMs may use, at the network's first address.
        type: list
        elements: dict
        default: []
        suboptions:
          port:
            description: Port.
            type: int
            required: true
          protocol:
            description: Protocol.
            type: str
            choices: [tcp, udp]
            default: tcp
  accelerator:
    description: V(auto) is KVM where the CPU has virtualization, and emulation elsewhere.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  allow_restart:
    description:
      - Whether running microVMs whose definition changed are restarted.
      - Otherwise RV(instances[].restart_required) says so.
    type: bool
    default: false
  memory_overcommit:
    description: Share of the host's memory that all microVMs together may have; a call that exceeds it is refused.
    type: float
    default: 1.0
  parallel:
    description: How many microVMs are started at the same time; 0 is the host's number of CPUs.
    type: int
    default: 0
  ready_timeout_seconds:
    description: How long to wait for the agent in each microVM.
    type: int
    default: 180
"""

EXAMPLES = r"""
- name: Four agents on one image
  agentfleet.metal.microvm:
    networks:
      - name: agents
        prefix: 10.88.0.0/24
    instances:
      - {name: agent-1, image: agent, networks: [{network: agents}]}
      - {name: agent-2, image: agent, networks: [{network: agents}]}
      - {name: agent-3, image: agent, networks: [{network: agents}]}
      - name: agent-4
        image: agent
        memory: 512MiB
        environment: {ROLE: reviewer}
        networks: [{network: agents, address: 10.88.0.40}]

- name: A network with IPv6, a proxy on the host, and one place outside
  agentfleet.metal.microvm:
    networks:
      - name: reviewers
        bridge: reviewers0
        prefix: 10.89.0.0/24
        prefix6: fd00:89::/64
        host_services: [{port: 3128}]
        egress: nat
        egress_allow:
          - {prefix: 192.0.2.10, protocol: tcp, ports: [443]}
    instances:
      - {name: reviewer-1, image: agent, tenant: reviewers, networks: [{network: reviewers}]}

- name: Remove one
  agentfleet.metal.microvm:
    state: absent
    instances:
      - name: agent-4
"""

RETURN = r"""
plan:
  description: The steps, with before and after.
  returned: always
  type: list
  elements: dict
instances:
  description: The microVMs of the call, in its order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the microVM.
      type: str
    state:
      description: V(running), V(starting), V(stopping), V(stopped), V(failed) or V(absent).
      type: str
    image_digest:
      description: SHA-256 of its image.
      type: str
    cid:
      description: Its vsock address.
      type: int
    addresses:
      description: Its network addresses.
      type: list
      elements: str
    pid:
      description: Process of the VMM, 0 when stopped.
      type: int
    restart_required:
      description: Whether it runs with an older definition.
      type: bool
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm import MicroVms
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge

ARGUMENTS = {
    "state": {"type": "str", "choices": ["present", "running", "stopped", "absent"], "default": "running"},
    "instances": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "driver": {"type": "str", "choices": ["qemu", "cloud_hypervisor"], "default": "qemu"},
            "image": {"type": "str", "default": ""},
            "snapshots": {"type": "bool", "default": False},
            "from_snapshot": {"type": "str", "default": ""},
            "vcpus": {"type": "int", "default": 1},
            "memory": {"type": "str", "default": "256MiB"},
            "cid": {"type": "int"},
            "tenant": {"type": "str", "default": "default"},
            "autostart": {"type": "bool", "default": True},
            "environment": {"type": "dict", "default": {}},
            "kernel_arguments": {"type": "list", "elements": "str", "default": []},
            "shares": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "tag": {"type": "str", "required": True},
                    "source": {"type": "str", "required": True},
                    "target": {"type": "str"},
                    "readonly": {"type": "bool", "default": True},
                },
            },
            "networks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "network": {"type": "str", "required": True},
                    "address": {"type": "str"},
                    "address6": {"type": "str"},
                    "mac": {"type": "str"},
                },
            },
        },
    },
    "networks": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "prefix": {"type": "str"},
            "prefix6": {"type": "str"},
            "bridge": {"type": "str", "default": "agentfleet0"},
            "egress": {"type": "str", "choices": ["none", "nat", "routed"], "default": "none"},
            "egress_allow": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "prefix": {"type": "str", "required": True},
                    "protocol": {"type": "str", "choices": ["any", "tcp", "udp", "icmp"], "default": "any"},
                    "ports": {"type": "list", "elements": "str", "default": []},
                },
            },
            "host_services": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "port": {"type": "int", "required": True},
                    "protocol": {"type": "str", "choices": ["tcp", "udp"], "default": "tcp"},
                },
            },
        },
    },
    "accelerator": {"type": "str", "choices": ["auto", "kvm", "tcg"], "default": "auto"},
    "allow_restart": {"type": "bool", "default": False},
    "memory_overcommit": {"type": "float", "default": 1.0},
    "parallel": {"type": "int", "default": 0},
    "ready_timeout_seconds": {"type": "int", "default": 180},
}


def build(params: dict, host: Host) -> MicroVms:
    """The resource of one call; raises Refused for bad options."""
    return MicroVms(host, params)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
