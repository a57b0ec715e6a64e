#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_info: state of a 3FS cluster, and whether it is well."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_info
short_description: Look at a 3FS cluster, or wait until it is well
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Asks the primary mgmtd for nodes, chains and tables. Well means one primary, all nodes connected, and every chain with all
    its replicas serving. Nodes that have not taken the newest configuration are told by RV(outdated) and a warning, since no
    waiting helps where only a restart does.
  - With O(wait_healthy_seconds) it is the gate between two changes; when the time is over it fails and says what is not well.
extends_documentation_fragment:
  - agentfleet.metal.attributes.info
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  wait_healthy_seconds:
    description: How long to wait until the cluster is well; V(0) only looks.
    type: int
    default: 0
  losing_nodes:
    description:
      - Ids of storage services that shall go. Instead of being well as a whole, each of their chains must have another
        serving replica.
    type: list
    elements: int
    default: []
  processes:
    description:
      - Node id to process id, as RV(agentfleet.metal.threefs_service#module:processes) tells. A node is well when it reports as
        this process, which tells a service that was just restarted from what is left of the old one, and has the newest configuration.
    type: dict
    default: {}
  replicas:
    description:
      - Id of a chain table to how many serving replicas are enough for its chains, since one that is being moved has more. All
        must serve of tables that are not named.
    type: dict
    default: {}
  expect:
    description: Least number of services that must report, by V(mgmtd), V(meta) and V(storage).
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Go on when all is well
  agentfleet.metal.threefs_info:
    cluster: stage
    wait_healthy_seconds: 600
    expect: {mgmtd: 2, meta: 2, storage: 3}
"""

RETURN = r"""
healthy:
  description: Whether the cluster is well.
  returned: success
  type: bool
problems:
  description: What is not, in words.
  returned: success
  type: list
  elements: str
primary:
  description: Id of the mgmtd that holds the lease.
  returned: success
  type: int
nodes:
  description: Services as mgmtd knows them.
  returned: success
  type: list
  elements: dict
outdated:
  description: Ids of services that have not taken the newest configuration.
  returned: success
  type: list
  elements: int
chains:
  description: Number of chains, and how many have which status.
  returned: success
  type: dict
targets_by_node:
  description: Number of targets in chains by the id of the storage service.
  returned: success
  type: dict
tables:
  description: Versions of each chain table.
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_info import Info


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "wait_healthy_seconds": {"type": "int", "default": 0},
            "losing_nodes": {"type": "list", "elements": "int", "default": []},
            "processes": {"type": "dict", "default": {}},
            "replicas": {"type": "dict", "default": {}},
            "expect": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Info(Host(), module.params))


if __name__ == "__main__":
    main()
