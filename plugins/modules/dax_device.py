#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module dax_device: dax devices as system memory or as character devices."""

from __future__ import annotations

DOCUMENTATION = r"""
module: dax_device
short_description: Dax devices as system memory in a chosen zone, or as character devices with a chosen owner
version_added: 0.1.0
description:
  - Brings dax devices into one of two end states. With V(system-ram) the memory is a NUMA node of its own, with
    V(devdax) a character device that a program maps.
  - A device is known by the memory devices of its CXL region, by its NUMA node or by its namespace's UUID, never by a
    name such as C(dax0.0), which is of one boot.
  - A kernel policy that brings new memory online by itself is no obstacle. It is set aside during the change and
    memory goes online in the declared zone.
  - Memory that cannot be taken offline stays as it was, all of it, and the module says what holds it.
  - A character device gets its owner from a udev rule and a link C(/dev/agentfleet/dax/<identity>) whose name does
    not change between boots, such as C(/dev/agentfleet/dax/ram-0x1-0x2).
author: agentfleet.metal contributors (@agentfleet)
options:
  devices:
    description: The devices, all of them in one call, since each call replaces what is restored at boot and the udev
      rules.
    type: list
    elements: dict
    required: true
    suboptions:
      region:
        description: Selects the device of a CXL region. Exactly one of O(devices[].region), O(devices[].numa_node) and
          O(devices[].namespace_uuid) is needed.
        type: dict
        suboptions:
          memdevs:
            description: The region's memory devices by serial number or PCI address, as in
              M(agentfleet.metal.cxl_region).
            type: list
            elements: str
            required: true
          type:
            description: The region's type.
            type: str
            choices: [ram, pmem]
            default: ram
      numa_node:
        description: Selects the device by the NUMA node that its memory has or would have. For memory that firmware
          reserves, whose node the firmware's tables fix.
        type: int
      namespace_uuid:
        description: Selects the device of an NVDIMM namespace of mode devdax.
        type: str
      mode:
        description: The end state.
        type: str
        required: true
        choices: [system-ram, devdax]
      online:
        description:
          - For V(system-ram). The zone. V(movable), the default, can be taken offline again; V(kernel) also serves
            kernel allocations and stays; V(any) accepts the zone in which memory is online already; V(offline) adds
            memory without using it.
        type: str
        choices: [movable, kernel, any, offline]
      owner:
        description: For V(devdax). User that owns the character device. Without it, root.
        type: str
      group:
        description: For V(devdax). Group of the character device. Without it, root.
        type: str
      file_mode:
        description: For V(devdax). Permissions as four octal digits in quotes. Without it, V(0600).
        type: str
      align:
        description: For V(devdax). Alignment of mappings, V(4KiB), V(2MiB) or V(1GiB). Without it, the present one.
        type: str
  auto_online:
    description:
      - The kernel's policy for memory that is added later, for all of the host. V(keep) leaves it as it is.
    type: str
    choices: [keep, offline, online, online_kernel, online_movable]
    default: keep
  allow_memory_in_use:
    description:
      - Change a device also while its memory is in use. Pages are moved to other nodes, and nothing is changed if
        they cannot be; a process that maps the character device loses its content and is killed when it touches it.
    type: bool
    default: false
  destroy_persistent_data:
    description: Use a persistent namespace as system memory, by which its data is lost.
    type: bool
    default: false
  persist:
    description:
      - Bring the devices back at boot, without Ansible, by the unit C(agentfleet-restore.service). With V(false),
        what an earlier call stored is forgotten and udev rules last until the reboot.
    type: bool
    default: true
extends_documentation_fragment: agentfleet.metal.attributes
requirements:
  - the program C(daxctl) on the host, version 78 or newer
seealso:
  - module: agentfleet.metal.cxl_region
  - module: agentfleet.metal.memory_tiering
"""

EXAMPLES = r"""
- name: The region's memory is a NUMA node that can be taken away again
  agentfleet.metal.dax_device:
    devices:
      - region: {memdevs: ["0x1", "0x2"]}
        mode: system-ram
        online: movable

- name: A cache maps the memory itself
  agentfleet.metal.dax_device:
    devices:
      - region: {memdevs: ["0x1", "0x2"]}
        mode: devdax
        group: kvcache
        file_mode: "0660"
    auto_online: offline
"""

RETURN = r"""
devices:
  description: The declared devices as they are after the run (in check mode, as they are now), in the order of the
    list.
  returned: success
  type: list
  elements: dict
  sample:
    - {identity: ram-0x1-0x2, link: "", name: dax0.0, mode: system-ram, zone: movable, size_bytes: 1073741824,
       align_bytes: 2097152, target_node: 2, online_blocks: 8, total_blocks: 8}
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

from ansible_collections.agentfleet.metal.plugins.module_utils._dax import OPTIONS, DaxDevices
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: DaxDevices(Host(), module.params))


if __name__ == "__main__":
    main()
