#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module foundationdb_server: the FoundationDB of one host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: foundationdb_server
short_description: Run the FoundationDB servers of a host
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Writes cluster file, C(foundationdb.conf) and units, and runs them. Several databases can share a host.
  - An existing cluster file is left as it is, since the servers rewrite it when coordinators change; but only root may read it.
  - Machines and coordinators must suffice for the redundancy, else nothing is changed.
  - Timers and units of backups and drills that are no longer declared are stopped and removed; backups never are.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  name:
    description: Name of the database on its hosts. Another name than the default gives it files, logs and units of its own.
    type: str
    default: foundationdb
  state:
    description:
      - V(started) runs the servers. V(absent) stops and removes them, and the units of their backups; cluster file, data,
        logs and backups stay where they are.
      - Servers may only go with O(lose_data), or where this database is O(backup.drill_database) of another one of this host.
    type: str
    choices: [started, absent]
    default: started
  release:
    description: Directory of the unpacked release (module M(agentfleet.metal.artifact)).
    type: path
    required: true
  connection:
    description: Connection string of the database, for hosts that have no cluster file yet. Required with O(state=started).
    type: str
  address:
    description: Address of this host; one of O(machines). Required with O(state=started).
    type: str
  machines:
    description: IPv4 addresses of all hosts of the database. Required with O(state=started).
    type: list
    elements: str
  coordinators:
    description: The coordinators, each V(ADDRESS:PORT). Required with O(state=started).
    type: list
    elements: str
  redundancy:
    description:
      - V(single) keeps one copy. V(double) keeps two and needs 3 machines and 3 coordinators.
      - V(triple) keeps three and needs 5 machines and 5 coordinators.
      - Required with O(state=started).
    type: str
    choices: [single, double, triple]
  port:
    description: Port of the first server process; further ones have the following ports.
    type: int
    default: 4500
  processes:
    description: Server processes on this host; as many as it has CPUs, if left out. Fewer are refused without O(lose_data).
    type: int
  memory:
    description: Memory for each server process, such as V(8GiB); the server's own default, if left out.
    type: str
  backup_agents:
    description: Backup agents on this host. Whichever agent takes a backup writes it to its own disk.
    type: int
    default: 0
  data_directory:
    description: Directory of the data; C(/var/lib/foundationdb) or C(/var/lib/foundationdb-NAME), if left out.
    type: path
  log_directory:
    description: Directory of the logs; C(/var/log/foundationdb) or C(/var/log/foundationdb-NAME), if left out.
    type: path
  lose_data:
    description: Allow servers to end, or to begin in another directory, whose data others may not have. Nothing is deleted.
    type: bool
    default: false
  library_path:
    description: Directories in which the programs look for C(libfdb_c.so).
    type: list
    elements: str
    default: []
  backup:
    description:
      - Regular backups by a timer on this host, and another timer that looks whether the newest is restorable.
      - A restore is tried regularly where O(backup.drill_database) is set.
      - Starting C(foundationdb-restore@BACKUP.service) gives up what the database has for one of them.
    type: dict
    default: {}
    suboptions:
      directory:
        description:
          - Directory for the backups of this database alone, also where hosts share the storage that it is on. Without it there
            are none.
          - One that another database of this host has is refused.
          - Only root may enter it. One that has other things than backups, or another owner, stays as open as it is, with a warning.
        type: path
      on_calendar:
        description: When, as systemd writes it.
        type: str
        default: daily
      check_on_calendar:
        description: When the newest one is checked for being restorable.
        type: str
        default: weekly
      keep:
        description: How many backups are kept.
        type: int
        default: 7
      drill_database:
        description:
          - Name of another database of this host, with a backup agent, into which a third timer restores the newest restorable
            backup for trial, below a key prefix of its own, and drops it again. Without it no restore is tried.
          - Never the database that is backed up, since a restore locks the whole database that it goes into.
        type: str
      drill_on_calendar:
        description: When the newest one is restored for trial.
        type: str
        default: monthly
"""

EXAMPLES = r"""
- name: Run three servers on this host
  agentfleet.metal.foundationdb_server:
    release: /opt/foundationdb/0123456789abcdef
    connection: metal:Zw3gGq7B@10.0.0.1:4500,10.0.0.2:4500,10.0.0.3:4500
    address: 10.0.0.1
    machines: [10.0.0.1, 10.0.0.2, 10.0.0.3]
    coordinators: ["10.0.0.1:4500", "10.0.0.2:4500", "10.0.0.3:4500"]
    redundancy: double
    processes: 3

- name: Let go of the database for restore drills, whose data stay in /var/lib/foundationdb-drill
  agentfleet.metal.foundationdb_server:
    name: drill
    state: absent
    release: /opt/foundationdb/0123456789abcdef
"""

RETURN = r"""
connection:
  description: Connection string of this host's cluster file, which stays with O(state=absent), too.
  returned: success
  type: str
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

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_server import Absent, Servers
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge


def build(params: t.Mapping[str, t.Any], host: Host) -> Absent | Servers:
    """The resource that the options declare."""
    return Absent(host, params) if params["state"] == "absent" else Servers(host, params)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "default": "foundationdb"},
            "state": {"type": "str", "default": "started", "choices": ["started", "absent"]},
            "release": {"type": "path", "required": True},
            "connection": {"type": "str"},
            "address": {"type": "str"},
            "machines": {"type": "list", "elements": "str"},
            "coordinators": {"type": "list", "elements": "str"},
            "redundancy": {"type": "str", "choices": ["single", "double", "triple"]},
            "port": {"type": "int", "default": 4500},
            "processes": {"type": "int"},
            "memory": {"type": "str"},
            "backup_agents": {"type": "int", "default": 0},
            "data_directory": {"type": "path"},
            "log_directory": {"type": "path"},
            "lose_data": {"type": "bool", "default": False},
            "library_path": {"type": "list", "elements": "str", "default": []},
            "backup": {
                "type": "dict",
                "default": {},
                "options": {
                    "directory": {"type": "path"},
                    "on_calendar": {"type": "str", "default": "daily"},
                    "check_on_calendar": {"type": "str", "default": "weekly"},
                    "keep": {"type": "int", "default": 7},
                    "drill_database": {"type": "str"},
                    "drill_on_calendar": {"type": "str", "default": "monthly"},
                },
            },
        },
        required_if=[("state", "started", ("connection", "address", "machines", "coordinators", "redundancy"))],
        supports_check_mode=True,
    )
    converge(module, lambda: build(module.params, Host()))


if __name__ == "__main__":
    main()
