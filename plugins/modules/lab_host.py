#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: lab_host
short_description: Run emulated bare-metal hosts
version_added: 0.1.0
description:
  - Runs hosts that have what an ordinary machine has not - CXL memory behind host bridges, NUMA nodes with HMAT values, NVMe
    subsystems, SR-IOV network cards, an IOMMU, nested virtualization - as QEMU processes of this user.
  - A host boots through its firmware and GRUB from its own disk, so that kernels and command lines are real. A reboot in the guest
    is a fresh start of the hardware.
  - All hosts of a call change at the same time. Waits are bounded.
  - Runs on the machine that runs the lab, that is, delegated to the controller.
options:
  hosts:
    description:
      - The hosts, described completely. Needed to start hosts.
      - To end hosts only the names count, and without this option all hosts of the lab are meant, described or not.
    type: list
    elements: dict
    suboptions:
      name:
        description: Host name, and the name of its directory.
        type: str
        required: true
      ssh_port:
        description: Port on 127.0.0.1 of this machine that leads to the host's ssh server; needed to start the host.
        type: int
      cpus:
        description: Number of CPUs.
        type: int
        default: 2
      memory:
        description: Memory of a host with one NUMA node. Either this or O(hosts[].numa).
        type: str
      numa:
        description: NUMA nodes, by number. The first has all CPUs unless a node says otherwise.
        type: list
        elements: dict
        default: []
        suboptions:
          memory:
            description: Memory of the node.
            type: str
            required: true
          cpus:
            description: CPUs of the node, such as V(0-1). A node without CPUs is a memory-only node.
            type: str
          initiator:
            description: Number of the node with CPUs that is nearest; needed for a node without CPUs.
            type: int
          latency_ns:
            description: Access latency in the HMAT, by which the kernel orders memory tiers.
            type: int
          bandwidth:
            description: Access bandwidth in the HMAT, in bytes a second, such as V(20GiB).
            type: str
      disk:
        description: Size of the disk; it takes only what is written.
        type: str
        default: 16GiB
      iommu:
        description: Which IOMMU the machine has. The guest's kernel and command line decide whether it is used.
        type: str
        choices: [none, intel]
        default: none
      cxl:
        description: CXL host bridges, fixed memory windows and type-3 memory devices.
        type: dict
        suboptions:
          windows:
            description: Fixed memory windows.
            type: list
            elements: dict
            required: true
            suboptions:
              size:
                description: Size; at least that of all devices behind its host bridges.
                type: str
                required: true
              host_bridges:
                description: Numbers of the host bridges that the window interleaves over.
                type: list
                elements: int
                required: true
              granularity:
                description: Interleave granularity, 256B to 16KiB.
                type: str
                default: 8KiB
          devices:
            description: Type-3 memory devices, each behind a root port of its own.
            type: list
            elements: dict
            required: true
            suboptions:
              serial:
                description: Serial number, such as V(0x1).
                type: str
                required: true
              size:
                description: Size, a multiple of 256MiB.
                type: str
                required: true
              host_bridge:
                description: Number of the host bridge it is behind, 0 to 5.
                type: int
                required: true
              persistent:
                description: Persistent memory that survives a power cut, instead of volatile memory.
                type: bool
                default: false
      nvme:
        description: NVMe subsystems.
        type: list
        elements: dict
        default: []
        suboptions:
          serial:
            description: Serial number of its controllers.
            type: str
            required: true
          controllers:
            description: Number of controllers, 1 to 4, that share the namespaces.
            type: int
            default: 1
          namespaces:
            description: Sizes of the namespaces.
            type: list
            elements: str
            required: true
      nics:
        description: Network cards on the lab's own segment, besides the first one, which leads outside.
        type: list
        elements: dict
        default: []
        suboptions:
          type:
            description: V(igb) is an Intel card with up to 7 SR-IOV virtual functions.
            type: str
            choices: [virtio, igb]
            default: virtio
          address:
            description: Static address with its prefix, such as V(10.77.0.11/24).
            type: str
  state:
    description:
      - V(started) runs the host and waits for a login; a running one whose description has changed is restarted.
      - V(stopped) presses the power button and, after O(stop_timeout_seconds), pulls the plug.
      - V(restarted) is V(stopped) and V(started); with O(stop_timeout_seconds=0) a power cycle. Always changes.
      - V(reset) cuts the power, gives the host a new disk and starts it. What was on the disk is lost. Always changes.
      - V(power_cut) pulls the plug. The disk stays as it is.
      - V(absent) cuts the power and removes the host with its disk.
    type: str
    choices: [started, stopped, restarted, reset, power_cut, absent]
    default: started
  dir:
    description: Directory of the lab. Two labs have two directories, and different ports.
    type: path
    required: true
  image:
    description: The image's directory, as M(agentfleet.metal.lab_image) returns it. Needed to start hosts.
    type: path
  qemu:
    description: The QEMU program, 8.1 or newer.
    type: str
    default: qemu-system-x86_64
  start_timeout_seconds:
    description: How long a host may take from power-on to the first login.
    type: int
    default: 600
  stop_timeout_seconds:
    description: How long a host may take from the power button to power-off.
    type: int
    default: 60
extends_documentation_fragment:
  - agentfleet.metal.attributes
attributes:
  idempotent:
    support: partial
    details: The states V(restarted) and V(reset) are actions and always change.
seealso:
  - module: agentfleet.metal.lab_image
author:
  - agentfleet.metal contributors (@agentfleet)
"""

EXAMPLES = r"""
- name: Run a host with an interleaved CXL window
  agentfleet.metal.lab_host:
    dir: build/lab
    image: "{{ lab_image_result.image.path }}"
    hosts:
      - name: metal1
        ssh_port: 2222
        memory: 4GiB
        iommu: intel
        cxl:
          windows:
            - {size: 4GiB, host_bridges: [0, 1]}
          devices:
            - {serial: "0x1", size: 512MiB, host_bridge: 0}
            - {serial: "0x2", size: 512MiB, host_bridge: 1}
  delegate_to: localhost

- name: Power-cycle a host that hangs
  agentfleet.metal.lab_host:
    dir: "{{ lab_dir }}"
    image: "{{ lab_image_path }}"
    hosts: "{{ lab_hosts }}"
    state: restarted
    stop_timeout_seconds: 0
  delegate_to: localhost
"""

RETURN = r"""
hosts:
  description: The hosts, in the order given.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
    state:
      description: V(started), V(stopped) or V(absent).
      type: str
    answers:
      description: Whether its ssh server answers; V(false) in states that do not start it.
      type: bool
    ssh_port:
      description: Port on 127.0.0.1.
      type: int
    accelerator:
      description: V(tcg) (emulated CPU) or V(kvm).
      type: str
    directory:
      description: Where its disk, C(id_ed25519) and C(known_hosts) are.
      type: str
    console:
      description: The console log.
      type: str
    image:
      description: The image its disk is made of.
      type: str
plan:
  description: The steps that were carried out, or would be in check mode.
  returned: success
  type: list
  elements: dict
refused:
  description: The option, value, problem and remedy, when the wish is refused.
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._lab import STATES, LabHosts
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_qemu import OPTIONS
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "hosts": {"type": "list", "elements": "dict", "options": OPTIONS},
            "state": {"type": "str", "choices": list(STATES), "default": "started"},
            "dir": {"type": "path", "required": True},
            "image": {"type": "path"},
            "qemu": {"type": "str", "default": "qemu-system-x86_64"},
            "start_timeout_seconds": {"type": "int", "default": 600},
            "stop_timeout_seconds": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: LabHosts(Host(), module.params))


if __name__ == "__main__":
    main()
