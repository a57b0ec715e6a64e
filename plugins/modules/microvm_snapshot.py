#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module microvm_snapshot: see DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: microvm_snapshot
short_description: Make, list, restore and remove snapshots of running microVMs
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - A snapshot is a running microVM at one moment, its RAM included. Clones of it (O(snapshots[].name) given as
    C(from_snapshot) of M(agentfleet.metal.microvm)) start warm and share its pages until they write them.
  - The microVM is paused while its RAM is copied, and runs again afterwards if it ran before. A snapshot is complete or not
    there; what an interrupted call left is removed by the next call, or at boot.
  - It is valid on a host with the same version of the virtual machine monitor and, with KVM, the same CPU; elsewhere it is
    refused with the reason, and so is a damaged one. One in use is not removed.
extends_documentation_fragment: agentfleet.metal.attributes
attributes:
  idempotent:
    support: partial
    details: O(state=restored) is an action; it sets the microVMs back each time.
options:
  state:
    description:
      - V(present) makes the snapshots that are not there, or that this host cannot start from any more. One that can be used
        is left as it is, whatever its microVM has done since.
      - V(absent) removes them.
      - V(restored) sets microVMs that were declared with C(from_snapshot) back to it. What they did since is lost.
    type: str
    choices: [present, absent, restored]
    default: present
  snapshots:
    description: The snapshots. None, to list those of the host.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the snapshot. Of V(a-z), V(0-9) and hyphen.
        type: str
        required: true
      microvm:
        description:
          - With O(state=present), the microVM that it is made of; declared with C(snapshots=true), and running or paused.
          - With O(state=restored), the microVM that is set back. Not used by O(state=absent).
        type: str
        default: ""
  verify:
    description:
      - Read all files of all snapshots and compare their SHA-256. Without it only files whose time of change is another than
        that in the manifest are read.
    type: bool
    default: false
  timeout_seconds:
    description: How long to wait for a microVM that is set back.
    type: int
    default: 180
"""

EXAMPLES = r"""
- name: Start the parent, and let it warm up
  agentfleet.metal.microvm:
    instances:
      - {name: parent, image: agent, memory: 512MiB, snapshots: true}

- name: Make a snapshot of it
  agentfleet.metal.microvm_snapshot:
    snapshots:
      - {name: warm, microvm: parent}

- name: Start clones
  agentfleet.metal.microvm:
    instances:
      - {name: worker-1, from_snapshot: warm}
      - {name: worker-2, from_snapshot: warm, environment: {ROLE: reviewer}}

- name: Set one back
  agentfleet.metal.microvm_snapshot:
    state: restored
    snapshots:
      - {name: warm, microvm: worker-1}

- name: List all, and read every byte of them
  agentfleet.metal.microvm_snapshot:
    verify: true
  register: host
"""

RETURN = r"""
plan:
  description: The steps, with before and after.
  returned: always
  type: list
  elements: dict
snapshots:
  description: All snapshots of the host.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the snapshot.
      type: str
    microvm:
      description: The microVM that it was made of.
      type: str
    created:
      description: When, in UTC.
      type: str
    driver:
      description: Driver that it was made with.
      type: str
    version:
      description: Version of the virtual machine monitor.
      type: str
    cpu:
      description: CPU of the host that it was made on, or V(emulated).
      type: str
    image_digest:
      description: SHA-256 of the image.
      type: str
    memory_bytes:
      description: Size of the guest's RAM.
      type: int
    disk_bytes:
      description: What it takes on disk.
      type: int
    usable:
      description: Whether microVMs can start from it on this host.
      type: bool
    problem:
      description: Why not, or empty.
      type: str
    used_by:
      description: Declared microVMs that start from it.
      type: list
      elements: str
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._snapshot import Snapshots

ARGUMENTS = {
    "state": {"type": "str", "choices": ["present", "absent", "restored"], "default": "present"},
    "snapshots": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"name": {"type": "str", "required": True}, "microvm": {"type": "str", "default": ""}},
    },
    "verify": {"type": "bool", "default": False},
    "timeout_seconds": {"type": "int", "default": 180},
}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    converge(module, lambda: Snapshots(Host(), module.params))


if __name__ == "__main__":
    main()
