#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_bind
short_description: Give PCI functions to vfio, or back to the kernel's drivers
version_added: 0.1.0
description:
  - Binds functions to a vfio driver through C(driver_override), so that exactly the named functions are taken.
    The option C(vfio-pci.ids), which takes all functions of a kind, the boot disk included, is never used.
  - All functions are checked before the first one is touched. Refused are functions that this host needs (mounted file
    systems, swap, RAID, LVM and the like, disks that a process has open, the default route, the present ssh connection,
    interfaces that are up with an address or below another one), bridges, functions that a virtual machine has open,
    parts of an IOMMU group, and any binding on a host without an active IOMMU.
  - A binding that fails is undone to the earlier driver.
  - The bindings are stored by address and restored at boot by C(agentfleet-restore.service), without Ansible.
    Several calls add up; O(functions[].state=unbound) takes a function out.
options:
  functions:
    description:
      - The functions, each named by exactly one of O(functions[].address), O(functions[].vendor_device) and
        O(functions[].vf_of).
    type: list
    elements: dict
    default: []
    suboptions:
      address:
        description:
          - PCI address with its domain, such as V('0000:01:00.0'). Quote it, since YAML can take it for a number.
        type: str
      vendor_device:
        description: Vendor and device id, such as V('8086:10c9'). Quote it, since YAML can take it for a number.
        type: str
      count:
        description:
          - With O(functions[].vendor_device), how many functions to take. Those bound before come first, then the
            lowest addresses; functions in use by this host are passed over.
          - Without it all functions of the kind are meant, and one in use is refused. With O(functions[].state=unbound)
            all of the kind are given back, whatever the number.
        type: int
      numa_node:
        description: With O(functions[].vendor_device), take only functions of this NUMA node.
        type: int
      vf_of:
        description: The physical function (address, or vendor and device id) whose virtual functions are meant.
        type: str
      vfs:
        description: With O(functions[].vf_of), the numbers of the virtual functions, counted from 0.
        type: list
        elements: int
      driver:
        description: The vfio driver, V(vfio-pci) or a variant driver of a vendor.
        type: str
        default: vfio-pci
      state:
        description: V(bound) to the vfio driver, or V(unbound), which is given back to the kernel's choice of driver.
        type: str
        choices: [bound, unbound]
        default: bound
  bind_whole_group:
    description:
      - Also bind the other endpoints of a function's IOMMU group that have a driver of the kernel.
        Without it they are a reason to refuse.
    type: bool
    default: false
  access_group:
    description:
      - Local group that may use C(/dev/vfio/*), C(/dev/vfio/devices/*) and C(/dev/iommu), by a udev rule with mode
        0660. The group must exist.
      - Without it access is left as it is.
    type: str
  memlock:
    description:
      - Locked memory that members of O(access_group) may have in login sessions, V(unlimited) or a size such as
        V(64GiB); a virtual machine with vfio locks all its memory. Services of systemd have C(LimitMEMLOCK=) instead.
    type: str
extends_documentation_fragment: agentfleet.metal.attributes
seealso:
  - module: agentfleet.metal.sriov_vfs
author: agentfleet.metal contributors (@agentfleet)
"""

EXAMPLES = r"""
- name: Give one NVMe drive and two virtual functions to microVMs
  agentfleet.metal.vfio_bind:
    functions:
      - address: '0000:01:00.0'
      - vf_of: '0000:41:00.0'
        vfs: [0, 1]
    access_group: kvm
    memlock: unlimited

- name: Give any two free drives of a kind that are near NUMA node 1
  agentfleet.metal.vfio_bind:
    functions:
      - vendor_device: '144d:a808'
        count: 2
        numa_node: 1

- name: Give a drive back to the kernel
  agentfleet.metal.vfio_bind:
    functions:
      - address: '0000:01:00.0'
        state: unbound
"""

RETURN = r"""
functions:
  description: The named functions as they are after the run (before it in check mode).
  returned: success
  type: list
  elements: dict
  sample:
    - {"address": "0000:00:05.0", "vendor": "1b36", "device": "0010", "driver": "vfio-pci", "iommu_group": 5,
       "numa_node": -1, "nodes": ["/dev/vfio/5"]}
plan:
  description: The steps that were carried out, or would be in check mode.
  returned: success
  type: list
  elements: dict
refused:
  description: Option, value, problem and remedy when the wish is refused; nothing was changed then.
  returned: when refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._vfio import OPTIONS, VfioBindings


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: VfioBindings(Host(), module.params))


if __name__ == "__main__":
    main()
