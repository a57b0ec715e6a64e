# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters over the facts of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: preflight_failures
short_description: All that stands between a host and what the roles want of it
version_added: 0.1.0
author: agentfleet.metal contributors (@agentfleet)
description:
  - Evaluates the checks of all roles at once on the facts that M(agentfleet.metal.host_facts) collected.
  - Runs on the controller and changes nothing.
positional: _input
options:
  _input:
    description: The facts (C(ansible_facts.metal)).
    type: dict
    required: true
  wants:
    description:
      - What the roles want of the host; the role P(agentfleet.metal.preflight#role) builds it from their variables.
      - A key that is absent asks for nothing.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what is missing for CXL regions
  ansible.builtin.debug:
    msg: "{{ ansible_facts.metal | agentfleet.metal.preflight_failures({'features': ['cxl'], 'cxl': true}) }}"
"""

RETURN = r"""
_value:
  description: One entry for each failure, with C(check), C(problem), C(remedy) and C(role); empty when the host is fit.
  type: list
  elements: dict
"""

from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.module_utils._checks import evaluate
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused


def preflight_failures(facts, wants):
    """The failures of a host, as ``_checks.evaluate`` returns them."""
    for name, value in (("the facts", facts), ("wants", wants)):
        if not hasattr(value, "items"):
            raise AnsibleFilterError(f"preflight_failures: {name} must be a dictionary, not {type(value).__name__}")
    try:
        return evaluate(facts, wants)
    except Refused as refusal:
        raise AnsibleFilterError(f"preflight_failures: {refusal}") from refusal


class FilterModule:
    """Filters of this file."""

    def filters(self):
        """Name to function."""
        return {"preflight_failures": preflight_failures}
