#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_disk: disks of a 3FS storage service."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_disk
short_description: Format and mount the disks of a 3FS storage service
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Puts XFS with 4096-byte sectors on empty disks and mounts each by its id with a unit of its own.
  - A disk with data is refused unless it is named under O(erase); so is a disk that belongs to another place of a
    cluster, which its label tells.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  disks:
    description: The disks in the order of their index.
    type: list
    elements: dict
    default: []
    suboptions:
      device:
        description: Name below C(/dev/disk/by-id), or a path below C(/dev/disk/by-*) or C(/dev/mapper).
        type: str
        required: true
      mount:
        description: Where it is mounted; targets lie in C(3fs) below.
        type: path
        required: true
  directories:
    description: Plain directories for targets instead of disks, made if missing. For tests.
    type: list
    elements: str
    default: []
  replaced:
    description: Mount points whose disk was replaced by another device. What is still mounted there is unmounted; stop storage before.
    type: list
    elements: str
    default: []
  erase:
    description: Devices whose data may be lost.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Two disks
  agentfleet.metal.threefs_disk:
    cluster: stage
    disks:
      - {device: nvme-SAMSUNG_MZQL2_S1, mount: /storage/data1}
      - {device: nvme-SAMSUNG_MZQL2_S2, mount: /storage/data2}
"""

RETURN = r"""
target_paths:
  description: Paths for targets, in order.
  returned: success
  type: list
  elements: str
disks:
  description: Label and mount point of each device.
  returned: success
  type: dict
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

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_disk import Disks


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "disks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"device": {"type": "str", "required": True}, "mount": {"type": "path", "required": True}},
            },
            "directories": {"type": "list", "elements": "str", "default": []},
            "replaced": {"type": "list", "elements": "str", "default": []},
            "erase": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Disks(Host(), module.params))


if __name__ == "__main__":
    main()
