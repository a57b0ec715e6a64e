#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel modules, options, sysctls, sysfs attributes and huge pages in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_tunables
short_description: Set kernel modules, their options, sysctls, sysfs attributes and huge pages, now and for good
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Sets the running values and keeps them in the system's own drop-in directories, in files named C(60-agentfleet.conf)
    below C(/etc/modules-load.d), C(/etc/modprobe.d), C(/etc/sysctl.d) and C(/etc/tmpfiles.d).
  - One call is the whole wish. An entry that is no longer given leaves the files; its running value stays until
    the next boot.
  - All entries are checked before any is applied. Names that the kernel does not know are refused.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  modules:
    description: Modules to load now and at boot.
    type: list
    elements: str
    default: []
  module_options:
    description:
      - 'Parameters by module, as C({module: {parameter: value}}).'
      - A parameter that can be written at run time is set at once. One that cannot is reported under RV(module_reloads)
        and RV(reboot_reasons) while the module runs with another value.
      - Parameters of a built-in driver are kept in C(/etc/tmpfiles.d), since C(/etc/modprobe.d) has no effect on it.
        One that cannot be written at run time is refused; it belongs on the command line
        (M(agentfleet.metal.kernel_cmdline)).
    type: dict
    default: {}
  sysctl:
    description: 'Sysctls, as C({name: value}). Refused when a file that is read later says otherwise.'
    type: dict
    default: {}
  sysfs:
    description:
      - 'Attributes below C(/sys), as C({path: value}). They must be readable and writable; triggers are refused.'
      - They are written at boot by C(systemd-tmpfiles), after the modules of C(modules-load.d) are loaded, and once more
        when C(agentfleet-restore.service) has brought CXL memory back.
    type: dict
    default: {}
  hugepages:
    description: Huge pages for each NUMA node. Fewer than asked is an error that says how many were possible.
    type: list
    elements: dict
    default: []
    suboptions:
      node:
        description: The NUMA node.
        type: int
        required: true
      size:
        description: The page size, such as V(2MiB) or V(1GiB).
        type: str
        required: true
      count:
        description: How many pages the node shall have; V(0) gives them back.
        type: int
        required: true
"""

EXAMPLES = r"""
- name: Tune a host for microVMs and tiering
  agentfleet.metal.kernel_tunables:
    modules: [vhost_vsock, vfio_pci]
    module_options:
      kvm_amd: {nested: 1}
    sysctl:
      kernel.numa_balancing: 2
    sysfs:
      /sys/kernel/mm/transparent_hugepage/enabled: madvise
    hugepages:
      - {node: 0, size: 2MiB, count: 512}
"""

RETURN = r"""
plan:
  description: The steps, each with C(verb), C(object), C(before), C(after), C(why) and C(disruptive).
  returned: success
  type: list
  elements: dict
module_reloads:
  description: Module parameters that run with another value; RV(module_reloads[].action) says V(reload) or V(reboot).
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What makes the parameter take effect.
      type: str
      returned: always
reboot_required:
  description: Whether something configured waits for a reboot (or a module reload).
  returned: success
  type: bool
reboot_reasons:
  description: Why, one sentence for each.
  returned: success
  type: list
  elements: str
sysctl:
  description: The running values of the sysctls named.
  returned: success
  type: dict
sysfs:
  description: The running values of the attributes named.
  returned: success
  type: dict
hugepages:
  description: The huge pages that exist, for each entry asked.
  returned: success
  type: list
  elements: dict
refused:
  description: The option, value, problem and remedy when the wish is refused.
  returned: when refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._tunables import OPTIONS, Tunables


def main():
    """Set the tunables."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: Tunables(Host(), module.params))


if __name__ == "__main__":
    main()
