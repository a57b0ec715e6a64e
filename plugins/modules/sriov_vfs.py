#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: sriov_vfs
short_description: Make SR-IOV virtual functions, and set how their switch treats them
version_added: 0.1.0
description:
  - Sets the number of virtual functions (VFs) of physical functions (PFs) of any class, such as NICs and NVMe drives.
    The kernel allows a change only through 0, so that all VFs of a PF go when their number changes.
  - A change that would take away a VF whose network interface is up, or in another network namespace, is refused unless
    O(destroy_used_vfs). VFs that a virtual machine has open (the kernel would wait for it without end), or with mounted
    file systems or the default route, are never taken away.
  - A number that the driver refuses is undone to the earlier one.
  - The numbers and settings are stored by address and restored at boot by C(agentfleet-restore.service), without
    Ansible. Several calls add up; O(functions[].vfs=0) takes a function out. No other tool (NetworkManager, netplan,
    C(systemd.link)) should set VFs of the same PF.
options:
  functions:
    description: The physical functions.
    type: list
    elements: dict
    required: true
    suboptions:
      pf:
        description:
          - Quoted PCI address such as V('0000:41:00.0'), or vendor and device id such as V('8086:10c9') when just one
            function of the host has it.
        type: str
        required: true
      vfs:
        description: Number of VFs.
        type: int
        required: true
      autoprobe:
        description:
          - Whether drivers of the kernel take new VFs at once. Leave it V(false) for VFs that go to vfio.
          - It acts on VFs when they are made or rebound, not on those that have a driver.
        type: bool
        default: false
      mac_prefix:
        description:
          - First five bytes of the VFs' MAC addresses; the number of the VF is the sixth.
            Without it the driver chooses.
        type: str
      vlan:
        description: VLAN that the PF puts the VFs' traffic in, V(0) for none. Without it the VLAN is left as it is.
        type: int
      trust:
        description: Whether a VF may set promiscuous mode and other addresses. Without it trust is left as it is.
        type: bool
      spoofchk:
        description:
          - Whether the PF drops frames whose source address is not the VF's. Without it the check is left as it is.
        type: bool
  destroy_used_vfs:
    description: Change the number although network interfaces of VFs are in use; what uses them loses its connection.
    type: bool
    default: false
extends_documentation_fragment: agentfleet.metal.attributes
seealso:
  - module: agentfleet.metal.vfio_bind
author: agentfleet.metal contributors (@agentfleet)
"""

EXAMPLES = r"""
- name: Two virtual functions for microVMs, in VLAN 100
  agentfleet.metal.sriov_vfs:
    functions:
      - pf: '0000:41:00.0'
        vfs: 2
        mac_prefix: 02:00:00:00:41
        vlan: 100
        spoofchk: true

- name: Take them away, although their interfaces may be up
  agentfleet.metal.sriov_vfs:
    functions:
      - pf: '0000:41:00.0'
        vfs: 0
    destroy_used_vfs: true
"""

RETURN = r"""
functions:
  description: The physical functions as they are after the run (before it in check mode), with their VFs in order.
  returned: success
  type: list
  elements: dict
  sample:
    - {"pf": "0000:00:07.0", "driver": "igb", "totalvfs": 7, "vfs": ["0000:00:17.0", "0000:00:17.2"],
       "autoprobe": false}
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
from ansible_collections.agentfleet.metal.plugins.module_utils._sriov import OPTIONS, SriovVfs


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: SriovVfs(Host(), module.params))


if __name__ == "__main__":
    main()
