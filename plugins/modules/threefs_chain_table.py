#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_chain_table
short_description: Make, change and check 3FS chain tables
version_added: 0.1.0
description:
  - Places the targets of all disks in chains so that any two nodes share equally many chains, as near as whole numbers allow, and
    writes the files that upstream's C(gen_chain_table.py) would write, with its formulas for ids - C(generated_chains.csv),
    C(generated_chain_table.csv) and C(create_target_cmd.txt).
  - Heads and tails are even over nodes and disks, disk indices are mixed within a chain, and successive chains of the table touch
    many nodes and disks.
  - Where O(directory) has a table already it is changed, and as few targets as possible move. Chains are never dropped, since they
    hold data. Files of upstream's tools can be taken over this way.
  - All nine invariants of a valid table are checked, and the quality is measured against what no table can beat.
  - Needs nothing but Python. It runs where the files shall be, usually delegated to the controller.
options:
  state:
    description:
      - V(present) makes or changes the table.
      - V(checked) only judges the files that are there, whoever made them, and fails when an invariant does not hold. Without
        O(nodes) these are derived from the targets.
    type: str
    choices: [present, checked]
    default: present
  directory:
    description: Absolute path of the directory of the three files; created when missing.
    type: path
    required: true
  nodes:
    description: All storage nodes. Needed to make or change a table.
    type: list
    elements: dict
    default: []
    suboptions:
      id:
        description: Node id, as C(storage_main_app.toml) has it, at most 999999.
        type: int
        required: true
      disks:
        description: Number of disks, that is, of its C(target_paths).
        type: int
        required: true
      weight:
        description:
          - Capacity of each of its disks in relation to others. O(targets_per_disk) times this must be a whole number.
          - Without it 1.
        type: float
      domain:
        description: Failure domain, such as a rack. The targets of a chain are in different domains. Give it to all nodes or to none.
        type: str
  replicas:
    description: Targets of a chain, 1 to 5. With O(type=EC) the targets of a group, data and parity together.
    type: int
    default: 3
  type:
    description: Chain replication, or erasure coding with one target in a chain and successive chains for a group.
    type: str
    choices: [CR, EC]
    default: CR
  targets_per_disk:
    description: Targets on each disk of weight 1, at most 99. A multiple of O(replicas) always works.
    type: int
    default: 6
  seed:
    description: A new table is the same for the same options and seed.
    type: int
    default: 0
  stripe:
    description:
      - Number of chains over which a file is spread; as many successive chains of the table touch many nodes and disks. A table
        with fewer chains is refused.
      - Without it 16, or all chains where there are fewer.
    type: int
  target_id_prefix:
    description: First part of target ids, 1 to 99.
    type: int
    default: 1
  chain_id_prefix:
    description: First part of chain ids, 1 to 41.
    type: int
    default: 9
  chunk_sizes:
    description: Chunk sizes of new targets, powers of two from V(64KiB) to V(64MiB); those of the storage service by default.
    type: list
    elements: str
    default: []
  disjoint_from:
    description: Directories of other chain tables on the same disks, such as those of other tenants. No target is in two tables.
    type: list
    elements: path
    default: []
  discard_existing:
    description:
      - Make a new table although the directory has one. Nearly all targets move, so this is for clusters without data.
    type: bool
    default: false
extends_documentation_fragment:
  - agentfleet.metal.attributes
seealso:
  - module: agentfleet.metal.threefs_target
author:
  - agentfleet.metal contributors (@agentfleet)
"""

EXAMPLES = r"""
- name: Make the chain table of five equal nodes
  agentfleet.metal.threefs_chain_table:
    directory: "{{ inventory_dir }}/chains/stage"
    nodes:
      - {id: 10001, disks: 16}
      - {id: 10002, disks: 16}
      - {id: 10003, disks: 16}
      - {id: 10004, disks: 16}
      - {id: 10005, disks: 16}
  register: stage
  delegate_to: localhost
  run_once: true

- name: Show how good it is
  ansible.builtin.debug:
    var: stage.report

- name: Larger disks in one node, racks, and a tenant of its own on the same disks
  agentfleet.metal.threefs_chain_table:
    directory: "{{ inventory_dir }}/chains/tenant"
    disjoint_from: ["{{ inventory_dir }}/chains/stage"]
    targets_per_disk: 2
    replicas: 2
    nodes:
      - {id: 10001, disks: 16, domain: rack1}
      - {id: 10002, disks: 16, domain: rack1}
      - {id: 10003, disks: 8, weight: 2, domain: rack2}
      - {id: 10004, disks: 16, domain: rack2}
  delegate_to: localhost
  run_once: true

- name: Judge a table that upstream's tools made
  agentfleet.metal.threefs_chain_table:
    directory: /opt/3fs/output
    state: checked
"""

RETURN = r"""
chain_table:
  description: The table in short.
  returned: success
  type: dict
  contains:
    directory:
      description: Where its files are.
      type: str
    chains:
      description: Number of chains.
      type: int
    targets:
      description: Number of targets.
      type: int
    nodes:
      description: Number of nodes with targets.
      type: int
quality:
  description: Figures of the table. The most telling ones are described here.
  returned: success
  type: dict
  contains:
    pairs:
      description: Sum of squares of how often nodes meet, over a bound that no table can beat; 1 is perfect.
      type: float
    recovery:
      description: Greatest load of a peer of a failed node, over the mean of all its peers.
      type: float
    recovery_bound:
      description: The least that any table can have of it.
      type: float
    rebuild:
      description: Disks from which a failed disk is rebuilt, over those from which it could be; the worst disk.
      type: float
    stripe_nodes:
      description: Nodes that the worst stripe touches, over those that it could.
      type: float
invariants:
  description: The nine invariants.
  returned: success
  type: list
  elements: dict
  contains:
    number:
      description: 1 to 9.
      type: int
    name:
      description: Its name.
      type: str
    valid:
      description: Whether it holds.
      type: bool
    text:
      description: The figures, or what is wrong.
      type: str
report:
  description: The same to read, one line for each invariant.
  returned: success
  type: list
  elements: str
moves:
  description: Targets of existing chains that move, with O(state=present).
  returned: success
  type: list
  elements: dict
  contains:
    chain_id:
      description: The chain.
      type: int
    old_target_id:
      description: The target that leaves the chain.
      type: int
    old_node_id:
      description: Its node.
      type: int
    new_target_id:
      description: The target that takes its place.
      type: int
    new_node_id:
      description: Its node.
      type: int
    new_disk_index:
      description: Its disk.
      type: int
moves_least:
  description: As many targets must move at least, so that each disk has its part of the existing chains by capacity, rounded.
  returned: success
  type: int
plan:
  description: The steps that were carried out, or would be in check mode.
  returned: success
  type: list
  elements: dict
refused:
  description: The option, value, problem and remedy, when the wish is refused.
  returned: failure
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_table import ChainTable
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "checked"], "default": "present"},
            "directory": {"type": "path", "required": True},
            "nodes": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "id": {"type": "int", "required": True},
                    "disks": {"type": "int", "required": True},
                    "weight": {"type": "float"},
                    "domain": {"type": "str"},
                },
            },
            "replicas": {"type": "int", "default": 3},
            "type": {"type": "str", "choices": ["CR", "EC"], "default": "CR"},
            "targets_per_disk": {"type": "int", "default": 6},
            "seed": {"type": "int", "default": 0},
            "stripe": {"type": "int"},
            "target_id_prefix": {"type": "int", "default": 1},
            "chain_id_prefix": {"type": "int", "default": 9},
            "chunk_sizes": {"type": "list", "elements": "str", "default": []},
            "disjoint_from": {"type": "list", "elements": "path", "default": []},
            "discard_existing": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: ChainTable(Host(), module.params))


if __name__ == "__main__":
    main()
