#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module microvm_info: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: microvm_info
short_description: Read the state of microVMs, with their memory split into shared and private
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Returns every declared microVM of the host, or those named.
  - Memory comes from the mappings of each VMM process, so that pages of a shared image are told from those that a
    microVM costs alone.
extends_documentation_fragment: agentfleet.metal.attributes.info
options:
  names:
    description: Only these microVMs. One that does not exist is returned with the state V(absent).
    type: list
    elements: str
  agent_timeout_seconds:
    description: How long to wait for the answer of each agent.
    type: int
    default: 10
  console:
    description: Whether the end of each console is returned.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: See what the microVMs cost
  agentfleet.metal.microvm_info:
  register: microvms
"""

RETURN = r"""
plan:
  description: Always empty.
  returned: always
  type: list
  elements: dict
instances:
  description: The microVMs in natural order of their names.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the microVM.
      type: str
    state:
      description: V(running), V(paused), V(starting), V(stopping), V(stopped), V(failed) or V(absent).
      type: str
    failure:
      description: Why systemd gave it up, such as V(start-limit-hit) after a crash loop; empty unless V(failed).
      type: str
    restarts:
      description: How often systemd has started it again.
      type: int
    driver:
      description: Its virtual machine monitor.
      type: str
    tenant:
      description: Its tenant.
      type: str
    image:
      description: Image as it was asked for.
      type: str
    image_digest:
      description: SHA-256 of its image.
      type: str
    accelerator:
      description: V(kvm) or V(tcg).
      type: str
    pid:
      description: Process of the VMM, 0 when stopped.
      type: int
    rss_bytes:
      description: Resident set size of the VMM, with huge pages of guest RAM.
      type: int
    pss_bytes:
      description: Proportional set size of the VMM, in which shared pages count by their share.
      type: int
    shared_bytes:
      description: Pages of the image that it has mapped and that the host holds once for all.
      type: int
    private_bytes:
      description: Memory that exists because of this microVM alone.
      type: int
    guest_ram_bytes:
      description: What of it is guest memory that was touched.
      type: int
    overhead_bytes:
      description: What of it is the VMM itself. The rest are image pages that the guest wrote.
      type: int
    memory_bytes:
      description: Guest memory that it has, or is declared to have.
      type: int
    counters:
      description: Counters of disks and network devices by device, as the guest sees them.
      type: dict
    console:
      description: The end of its console.
      returned: when O(console)
      type: str
    ready:
      description: Whether the agent answered.
      type: bool
    agent:
      description:
        - What the agent answered (hostname, kernel, dax, memory), or empty. C(first_boot_failed) names the scripts of the
          first boot that failed.
      type: dict
    cid:
      description: Its vsock address.
      type: int
    address:
      description: Its first network address, or empty.
      type: str
    addresses:
      description: All its network addresses.
      type: list
      elements: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_info import MicrovmInfo
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge

ARGUMENTS = {
    "names": {"type": "list", "elements": "str"},
    "agent_timeout_seconds": {"type": "int", "default": 10},
    "console": {"type": "bool", "default": False},
}


def build(params: t.Mapping[str, t.Any], host: Host) -> MicrovmInfo:
    """The resource of these parameters."""
    return MicrovmInfo(host, params.get("names"), params.get("agent_timeout_seconds") or 0, bool(params.get("console")))


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
