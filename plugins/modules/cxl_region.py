#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module cxl_region: declare interleaved regions of CXL memory."""

from __future__ import annotations

DOCUMENTATION = r"""
module: cxl_region
short_description: Regions of CXL memory, declared by the devices that they are made of
version_added: 0.1.0
description:
  - Makes, keeps and takes down regions of CXL memory. A region is known by its type and the set of its memory
    devices, and a device by its serial number or PCI address. Names of one boot such as C(region0) or C(mem0) are
    neither needed nor accepted.
  - The window (root decoder) and the order of the devices are found from how the devices are placed below the host
    bridges.
  - A region that exists as declared, whoever made it, is accepted. One that differs is never changed; the module
    explains what differs.
  - Regions that the list does not name are left alone.
  - All items are checked before any is touched. What a failed step made is undone.
author: agentfleet.metal contributors (@agentfleet)
options:
  regions:
    description: The regions, all of them in one call, since each call replaces what is restored at boot.
    type: list
    elements: dict
    required: true
    suboptions:
      type:
        description: Volatile memory (V(ram)), which can become a NUMA node or a dax device, or persistent memory
          (V(pmem)).
        type: str
        required: true
        choices: [ram, pmem]
      memdevs:
        description:
          - The memory devices, each by its serial number (V(0x1)) or PCI address. Quote PCI addresses, since YAML
            reads some of them as numbers.
          - The order does not matter; the positions follow from the window's host bridges and, behind one of them,
            from this list.
        type: list
        elements: str
        required: true
      size:
        description: Size such as V(1GiB), a multiple of 256 MiB for each device. Without it, all free memory of the
          devices.
        type: str
      host_bridges:
        description:
          - Selects the window by its host bridges, where more than one fits. Each as C(pci0000:0c) or by its ACPI
            unique id, as in C(ansible_facts.metal.cxl.decoders).
        type: list
        elements: str
      interleave_ways:
        description: The number of devices, for those who want it checked.
        type: int
      interleave_granularity:
        description: Bytes that go to one device before the next (256 to 16384). A window over several host bridges
          sets its own.
        type: int
      state:
        description: Whether the region shall exist.
        type: str
        choices: [present, absent]
        default: present
  leave_offline:
    description:
      - Leave the memory of new regions offline, whatever the kernel's policy, so that M(agentfleet.metal.dax_device)
        can decide its zone or mode. Memory that went online in a zone for kernel allocations may never come back.
    type: bool
    default: false
  allow_memory_in_use:
    description:
      - Take down a region also while processes or the page cache use its memory. Pages are moved to other nodes, and
        nothing is taken down if they cannot be; a process that maps a dax device loses its content and is killed when
        it touches it.
    type: bool
    default: false
  destroy_persistent_data:
    description: Take down a persistent region, whose data is then lost.
    type: bool
    default: false
  persist:
    description:
      - Bring the regions back at boot, without Ansible, by the unit C(agentfleet-restore.service). With V(false),
        what an earlier call stored is forgotten.
    type: bool
    default: true
extends_documentation_fragment: agentfleet.metal.attributes
requirements:
  - the program C(cxl) on the host (package C(cxl) or C(cxl-cli)), version 78 or newer
seealso:
  - module: agentfleet.metal.dax_device
  - module: agentfleet.metal.memory_tiering
"""

EXAMPLES = r"""
- name: Interleave two memory devices, whatever their names are
  agentfleet.metal.cxl_region:
    regions:
      - type: ram
        memdevs: ["0x1", "0x2"]
    leave_offline: true

- name: Half of one device, and another region gone
  agentfleet.metal.cxl_region:
    regions:
      - {type: ram, memdevs: ["0000:0d:00.0"], size: 256GiB}
      - {type: ram, memdevs: ["0x7", "0x8"], state: absent}
"""

RETURN = r"""
regions:
  description: The declared regions as they are after the run (in check mode, as they are now), in the order of the
    list.
  returned: success
  type: list
  elements: dict
  sample:
    - {type: ram, state: committed, size_bytes: 1073741824, interleave_ways: 2, interleave_granularity: 8192,
       memdevs: ["0x1", "0x2"], dax: [dax0.0], numa_nodes: [2]}
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

from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import OPTIONS, CxlRegions
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: CxlRegions(Host(), module.params))


if __name__ == "__main__":
    main()
