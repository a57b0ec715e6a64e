#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel command line, under the boot guard."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_cmdline
short_description: Configure the kernel command line so that a wrong one cannot lose the host
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Configures parameters through a drop-in and C(grub-mkconfig) (Debian, Ubuntu), C(grubby) (RHEL 9, Fedora), or
    C(/etc/default/grub) and C(grub2-mkconfig) (openEuler).
  - Keeps apart what is configured, what is booted (token by token from C(/proc/cmdline)) and what waits for a reboot.
  - With the guard the command line that runs now stays the default, and the new one is booted once, on trial. It
    becomes the default when M(agentfleet.metal.boot_guard) promotes it. The module itself never reboots.
  - One call is the whole wish. A parameter that is no longer given is no longer configured. What other files say about
    a parameter that is given is filtered out.
  - A run that was interrupted is completed by the next one, since the generated boot entries are compared, not only
    the files that they are made from.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  parameters:
    description:
      - Parameters by name.
      - A string or whole number gives C(name=value); a list gives the parameter once for each item. C(hugepagesz) and
        C(hugepages) take no list, since the kernel takes a count for the size before it.
      - An empty string gives the bare name, for parameters without a value.
      - V(null) means that the parameter shall be absent, also when another file configures it.
      - Booleans are refused, since YAML reads C(on), C(off), C(yes) and C(no) as such. Write them in quotes.
    type: dict
    default: {}
  backend:
    description: How the boot loader is configured. V(auto) looks at what is installed.
    type: str
    choices: [auto, grub_d, grubby, openeuler]
    default: auto
  guard:
    description:
      - Whether the boot guard watches over the change. Without it the new command line is the default at once.
    type: bool
    default: true
  allow_unbootable:
    description:
      - Accept parameters that can leave a host unbootable, such as C(root), C(init) and C(systemd.unit).
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Switch the IOMMU on, two consoles, and no more quiet boot
  agentfleet.metal.kernel_cmdline:
    parameters:
      intel_iommu: "on"
      console: [tty0, "ttyS0,115200"]
      nosmt: ""
      quiet: null
"""

RETURN = r"""
plan:
  description: The steps, each with C(verb), C(object), C(before), C(after), C(why) and C(disruptive).
  returned: success
  type: list
  elements: dict
backend:
  description: The backend that was used.
  returned: success
  type: str
configured:
  description: The words on the configured command line for each parameter given.
  returned: success
  type: dict
booted:
  description: The words on the booted command line for each parameter given.
  returned: success
  type: dict
reboot_required:
  description: Whether a reboot would change the kernel or its command line.
  returned: success
  type: bool
reboot_reasons:
  description: Why, one sentence for each.
  returned: success
  type: list
  elements: str
boot_guard:
  description: The boot guard as M(agentfleet.metal.boot_guard) returns it.
  returned: success
  type: dict
refused:
  description: The option, value, problem and remedy when the wish is refused.
  returned: when refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._cmdline import OPTIONS, KernelCmdline
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main():
    """Configure the command line."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    converge(module, lambda: KernelCmdline(Host(), module.params))


if __name__ == "__main__":
    main()
