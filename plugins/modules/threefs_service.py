#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_service: units of the services of a 3FS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_service
short_description: Run the services of a 3FS cluster on a host
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Writes a unit for each service that M(agentfleet.metal.threefs_config) described on this host, and starts,
    restarts or stops them. A service is restarted when it runs with another configuration or release than is written;
    what mgmtd hands out belongs to it, since a running service refuses most of its keys.
  - The units restart what fails, wait for the mounts of their disks, lock memory for RDMA and clean up FUSE's mount. Storage
    starts without a disk that cannot be mounted, as the others of its host are not to blame.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  services:
    description: Services to look after; those of the list that this host does not have are passed over.
    type: list
    elements: str
    choices: [mgmtd, meta, storage, fuse, monitor]
    default: [mgmtd, meta, storage, fuse, monitor]
  state:
    description: V(started) includes restarted where needed and enabled; V(absent) removes the units, never data.
    type: str
    choices: [started, stopped, absent]
    default: started
  library_path:
    description: Directories in which the programs look for their libraries.
    type: list
    elements: str
    default: []
  restart:
    description:
      - Whether a service that runs with another configuration or release than is written is restarted. With V(false)
        it is only reported, since all hosts at once would take all replicas of a chain down.
    type: bool
    default: true
  changing:
    description:
      - In check mode, services whose configuration an earlier task of the run would have changed
        (RV(agentfleet.metal.threefs_config#module:restarts)).
    type: list
    elements: str
    default: []
  outdated_nodes:
    description:
      - Ids of services that mgmtd knows to run with another configuration than it hands out
        (RV(agentfleet.metal.threefs_info#module:outdated)). They are restarted like those that are found here.
    type: list
    elements: int
    default: []
  clickhouse_schema:
    description: Whether the monitor's tables are made in ClickHouse when they are missing. Needs C(clickhouse-client).
    type: bool
    default: true
  timeout_seconds:
    description: How long a service may take to stay up.
    type: int
    default: 120
"""

EXAMPLES = r"""
- name: Run what this host has
  agentfleet.metal.threefs_service:
    cluster: stage
"""

RETURN = r"""
units:
  description: State of each unit.
  returned: success
  type: dict
processes:
  description: Process ids by node id, of the services that report to mgmtd.
  returned: success
  type: dict
outdated:
  description: Units that run with another configuration or release than is written.
  returned: success
  type: list
  elements: str
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
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_service import Services


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "services": {
                "type": "list",
                "elements": "str",
                "choices": ["mgmtd", "meta", "storage", "fuse", "monitor"],
                "default": ["mgmtd", "meta", "storage", "fuse", "monitor"],
            },
            "state": {"type": "str", "choices": ["started", "stopped", "absent"], "default": "started"},
            "library_path": {"type": "list", "elements": "str", "default": []},
            "restart": {"type": "bool", "default": True},
            "changing": {"type": "list", "elements": "str", "default": []},
            "outdated_nodes": {"type": "list", "elements": "int", "default": []},
            "clickhouse_schema": {"type": "bool", "default": True},
            "timeout_seconds": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Services(Host(), module.params))


if __name__ == "__main__":
    main()
