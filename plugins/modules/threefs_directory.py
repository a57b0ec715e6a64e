#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_directory: directories of a 3FS cluster with owner and layout."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_directory
short_description: Make directories in 3FS with owner, mode and chain table
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Makes directories and sets owner, mode and layout through admin_cli, without a mount.
  - A layout holds for new files. Tenants whose directories have tables of disjoint chains share no disk.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  directories:
    description: The directories.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Path from the top of the file system, without the mount point.
        type: str
        required: true
      uid:
        description: Owner.
        type: int
        default: 0
      gid:
        description: Group; the owner's, if left out.
        type: int
      mode:
        description: Mode in octal digits.
        type: str
        default: '0755'
      chain_table:
        description: Chain table of new files; that of the parent, if left out.
        type: int
      chunk_size:
        description: Size of chunks; V(1MiB), if left out.
        type: str
      stripe:
        description: Chains over which a file is spread; V(16), if left out.
        type: int
"""

EXAMPLES = r"""
- name: A tenant's directory with a chain table of its own
  agentfleet.metal.threefs_directory:
    cluster: stage
    directories:
      - {path: /search, uid: 2001, mode: '0750', chain_table: 2, chunk_size: 4MiB, stripe: 8}
"""

RETURN = r"""
directories:
  description: Owner, mode and layout by path.
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
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_directory import Directories


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "directories": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "str", "required": True},
                    "uid": {"type": "int", "default": 0},
                    "gid": {"type": "int"},
                    "mode": {"type": "str", "default": "0755"},
                    "chain_table": {"type": "int"},
                    "chunk_size": {"type": "str"},
                    "stripe": {"type": "int"},
                },
            },
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Directories(Host(), module.params))


if __name__ == "__main__":
    main()
