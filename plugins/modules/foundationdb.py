#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module foundationdb: the database that the servers of all hosts make together."""

from __future__ import annotations

DOCUMENTATION = r"""
module: foundationdb
short_description: Configure a FoundationDB database and its coordinators
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Creates the database once, changes its redundancy and moves its coordinators, and waits after each step until
    C(status json) says that it is available and healthy. Run it on one of the database's hosts.
  - A change of coordinators makes copies of the cluster file elsewhere stale; RV(connection) is what they must have.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  name:
    description: Name of the database on its hosts.
    type: str
    default: foundationdb
  release:
    description: Directory of the unpacked release.
    type: path
    required: true
  machines:
    description: IPv4 addresses of all hosts of the database.
    type: list
    elements: str
    required: true
  coordinators:
    description: The coordinators, each V(ADDRESS:PORT).
    type: list
    elements: str
    required: true
  redundancy:
    description: Copies of the data; see M(agentfleet.metal.foundationdb_server).
    type: str
    choices: [single, double, triple]
    required: true
  engine:
    description: Storage engine. To another one than the database has it changes over with C(storage_migration_type=aggressive).
    type: str
    choices: [ssd, ssd-redwood-1, memory]
    default: ssd
  wait_seconds:
    description: How long to wait for coordinators and for the database to be healthy.
    type: int
    default: 120
"""

EXAMPLES = r"""
- name: Keep two copies
  agentfleet.metal.foundationdb:
    release: /opt/foundationdb/0123456789abcdef
    machines: [10.0.0.1, 10.0.0.2, 10.0.0.3]
    coordinators: ["10.0.0.1:4500", "10.0.0.2:4500", "10.0.0.3:4500"]
    redundancy: double
"""

RETURN = r"""
connection:
  description: The connection string, which every copy of the cluster file must have.
  returned: success
  type: str
status:
  description:
    - What C(status json) says, as C(reachable), C(available), C(healthy), C(recovery), C(redundancy), C(engine), C(machines) and
      C(silent).
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

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_database import Database
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "default": "foundationdb"},
            "release": {"type": "path", "required": True},
            "machines": {"type": "list", "elements": "str", "required": True},
            "coordinators": {"type": "list", "elements": "str", "required": True},
            "redundancy": {"type": "str", "required": True, "choices": ["single", "double", "triple"]},
            "engine": {"type": "str", "choices": ["ssd", "ssd-redwood-1", "memory"], "default": "ssd"},
            "wait_seconds": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Database(Host(), module.params))


if __name__ == "__main__":
    main()
