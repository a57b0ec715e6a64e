# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Capacity planning as a filter over the facts of a host."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._planner import plan


def microvm_plan(facts, instances, images, policy=None, measured=None, snapshots=()):
    """How many microVMs fit, as ``_planner.plan`` returns it."""
    try:
        return plan(facts, instances, images, policy, measured, snapshots)
    except Refused as refusal:
        raise AnsibleFilterError(f"microvm_plan: {refusal}") from refusal


class FilterModule:
    """Filters of this file."""

    def filters(self):
        """Name to function."""
        return {"microvm_plan": microvm_plan}
