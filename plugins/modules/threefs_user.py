#!/usr/bin/python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module threefs_user: users of a 3FS cluster and their tokens."""

from __future__ import annotations

DOCUMENTATION = r"""
module: threefs_user
short_description: Manage users and tokens of a 3FS cluster
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Adds, changes and removes users. Tokens are given, so that a vault is their only source; they are never shown, and
    never an argument of a process.
  - A new token leaves the old one in force for some days, in which it is replaced everywhere.
extends_documentation_fragment:
  - agentfleet.metal.attributes
options:
  cluster:
    description: Name of the cluster.
    type: str
    required: true
  users:
    description: The users. One of them must be an admin as long as the cluster has none.
    type: list
    elements: dict
    required: true
    suboptions:
      uid:
        description: User id, as on the clients.
        type: int
        required: true
      name:
        description: Name of the user.
        type: str
      state:
        description: Whether the user exists.
        type: str
        choices: [present, absent]
        default: present
      token:
        description: The user's token (filter P(agentfleet.metal.threefs_token#filter)).
        type: str
      previous_token:
        description: The token before, for a change of the token under which this module itself acts.
        type: str
      root:
        description: Whether the user may act as any other.
        type: bool
        default: false
      admin:
        description: Whether the user may administrate the cluster.
        type: bool
        default: false
      groups:
        description: Further group ids.
        type: list
        elements: int
        default: []
  admin_tokens:
    description: Tokens to act under, tried in order; those of the admins in O(users), if left out.
    type: list
    elements: str
  old_token_days:
    description: How long a replaced token stays in force; V(0) ends it at once.
    type: int
    default: 7
"""

EXAMPLES = r"""
- name: An administrator and a tenant
  agentfleet.metal.threefs_user:
    cluster: stage
    users:
      - {uid: 0, name: root, root: true, admin: true, token: "{{ threefs_token_secret | agentfleet.metal.threefs_token('stage', 0) }}"}
      - {uid: 2001, name: search, token: "{{ threefs_token_secret | agentfleet.metal.threefs_token('stage', 2001) }}"}
"""

RETURN = r"""
users:
  description: The users without their tokens, and whether the token in force is the given one.
  returned: success
  type: list
  elements: dict
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
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import converge, unlogged
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_user import Users


def main() -> None:
    """Entry point."""
    module = unlogged(AnsibleModule)(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "users": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "uid": {"type": "int", "required": True},
                    "name": {"type": "str"},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                    "token": {"type": "str", "no_log": True},
                    "previous_token": {"type": "str", "no_log": True},
                    "root": {"type": "bool", "default": False},
                    "admin": {"type": "bool", "default": False},
                    "groups": {"type": "list", "elements": "int", "default": []},
                },
            },
            "admin_tokens": {"type": "list", "elements": "str", "no_log": True},
            "old_token_days": {"type": "int", "default": 7, "no_log": False},
        },
        supports_check_mode=True,
    )
    converge(module, lambda: Users(Host(), module.params))


if __name__ == "__main__":
    main()
