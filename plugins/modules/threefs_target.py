#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_target: targets, chains and chain tables of a 3FS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_target
short_description: Bring targets, chains and chain tables of 3FS to what is declared
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Creates targets, then chains, then tables, each only when what it needs reports to mgmtd.
  - Where a chain that exists shall have other targets, and O(migrate) allows it, the new ones are added, copied and
    serve before the old ones go. This is how nodes and disks are added, drained and replaced. A run that was
    interrupted is continued by the next one.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  tables:
    description: Chain tables, as M(agentfleet.metal.threefs_chain_table) makes them.
    type: list
    elements: dict
    default: []
    suboptions:
      id:
        description: Id of the table.
        type: int
        required: true
      chains:
        description: Content of C(generated_chains.csv).
        type: str
        required: true
      order:
        description: Content of C(generated_chain_table.csv).
        type: str
        required: true
      description:
        description: Text that the table is shown with.
        type: str
      stripe:
        description: Largest stripe of layouts that use the table; it must have as many chains.
        type: int
      chunk_sizes:
        description: Chunk sizes of the table's new targets, as in M(agentfleet.metal.threefs_chain_table); 3FS's own, if left out.
        type: list
        elements: str
        default: []
  migrate:
    description: Allow chains with data to get other targets.
    type: bool
    default: false
  parallel_moves:
    description: How many chains are copied at a time.
    type: int
    default: 8
  recreate_disks:
    description:
      - Disks that were replaced by empty ones. Targets on them that are offline are made again, which begins when mgmtd no longer
        counts them as serving, and are filled by the other replicas.
    type: list
    elements: dict
    default: []
    suboptions:
      node_id:
        description: Id of the storage service.
        type: int
        required: true
      disk_index:
        description: The disk's place in C(target_paths), from 0.
        type: int
        required: true
      present:
        description:
          - Targets that the disk has. All others of chains are made again, also those that mgmtd has not yet noticed to be gone; if
            left out, mgmtd is believed.
        type: list
        elements: int
  chunk_sizes:
    description: Id of a chain table to chunk sizes as in O(tables[].chunk_sizes), for targets of tables that are not in O(tables).
    type: dict
    default: {}
  retire_nodes:
    description: Ids of services that are stopped, and of storage services without targets; mgmtd forgets them.
    type: list
    elements: int
    default: []
  wait_seconds:
    description: How long services may take to report or to be missed, and new chains to serve.
    type: int
    default: 3600
  copy_seconds:
    description: How long the copies of a disk, or of one batch of O(parallel_moves), may take before this gives up. The next run goes on.
    type: int
    default: 86400
"""

EXAMPLES = r"""
- name: Upload what the generator made
  agentfleet.metal.threefs_target:
    cluster: stage
    tables:
      - id: 1
        chains: "{{ lookup('ansible.builtin.file', 'chains/generated_chains.csv') }}"
        order: "{{ lookup('ansible.builtin.file', 'chains/generated_chain_table.csv') }}"
"""

RETURN = r"""
chains:
  description: Number of chains.
  returned: success
  type: int
tables:
  description: Newest version of each table.
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
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_target import Targets


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "tables": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "id": {"type": "int", "required": True},
                    "chains": {"type": "str", "required": True},
                    "order": {"type": "str", "required": True},
                    "description": {"type": "str"},
                    "stripe": {"type": "int"},
                    "chunk_sizes": {"type": "list", "elements": "str", "default": []},
                },
            },
            "migrate": {"type": "bool", "default": False},
            "parallel_moves": {"type": "int", "default": 8},
            "recreate_disks": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "node_id": {"type": "int", "required": True},
                    "disk_index": {"type": "int", "required": True},
                    "present": {"type": "list", "elements": "int"},
                },
            },
            "chunk_sizes": {"type": "dict", "default": {}},
            "retire_nodes": {"type": "list", "elements": "int", "default": []},
            "wait_seconds": {"type": "int", "default": 3600},
            "copy_seconds": {"type": "int", "default": 86400},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Targets(Host(), module.params))


if __name__ == "__main__":
    main()
