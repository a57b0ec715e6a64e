#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Arm, promote or roll back a boot candidate."""

from __future__ import annotations

DOCUMENTATION = r"""
module: boot_guard
short_description: Boot a new kernel or command line on trial, then promote it or roll it back
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Keeps the kernel, initramfs and command line that run now as the boot entry C(agentfleet-known-good), which is the
    default until a candidate has proved itself.
  - M(agentfleet.metal.kernel_cmdline) arms the guard and puts the candidate on trial by itself. Call this module with
    O(state=armed) before a new kernel package is installed.
  - The order of all steps is safe against a power cut at any point of time. A later call finishes what an earlier one
    began.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  state:
    description:
      - V(armed) keeps what runs as the known-good entry and makes it the default.
      - V(promoted) runs the health gate on the candidate, then makes it the default and removes all entries of ours.
      - V(rolled_back) restores the boot configuration as it was before it was armed. When the candidate was another
        kernel, whose package is still there, the known-good entry stays the default.
      - Without it the module only reports.
    type: str
    choices: [armed, promoted, rolled_back]
  backend:
    description: How the boot loader is configured. V(auto) looks at what is installed.
    type: str
    choices: [auto, grub_d, grubby, openeuler]
    default: auto
  health_checks:
    description:
      - Shell commands that a candidate has to pass before it is promoted, after systemd is up with no unit failed that
        had not failed before.
    type: list
    elements: str
    default: []
  health_timeout_seconds:
    description: How long systemd, and each health check, may take.
    type: int
    default: 300
"""

EXAMPLES = r"""
- name: Promote the command line that was booted on trial
  agentfleet.metal.boot_guard:
    state: promoted
    health_checks:
      - test -e /dev/kvm
"""

RETURN = r"""
plan:
  description: The steps, each with C(verb), C(object), C(before), C(after), C(why) and C(disruptive).
  returned: success
  type: list
  elements: dict
boot_guard:
  description: The guard as it stands.
  returned: success
  type: dict
  contains:
    phase:
      description: Empty when nothing is armed, else V(arming), V(armed), V(promoting) or V(rolling_back).
      type: str
      returned: always
    booted:
      description: What runs, V(candidate), V(known_good), V(not_rebooted) or empty.
      type: str
      returned: always
    boot_id:
      description: The kernel's identity of this boot.
      type: str
      returned: always
    candidate:
      description: Kernel C(release) and C(arguments) on trial.
      type: dict
      returned: always
    known_good:
      description: Kernel C(release) and C(arguments) to fall back on.
      type: dict
      returned: always
refused:
  description: The option, value, problem and remedy when the wish is refused.
  returned: when refused
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._bootguard import BootGuard
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main():
    """Bring the guard to a state."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["armed", "promoted", "rolled_back"]},
            "backend": {"type": "str", "choices": ["auto", "grub_d", "grubby", "openeuler"], "default": "auto"},
            "health_checks": {"type": "list", "elements": "str", "default": []},
            "health_timeout_seconds": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: BootGuard(Host(), module.params))


if __name__ == "__main__":
    main()
