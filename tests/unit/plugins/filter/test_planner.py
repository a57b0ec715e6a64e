# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter microvm_plan."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.filter.planner import FilterModule

microvm_plan = FilterModule().filters()["microvm_plan"]
FACTS = {
    "numa": {"nodes": [{"id": 0, "cpus": [0], "size_bytes": 4 << 30, "movable_bytes": 0, "hugepages": {}}]},
    "os": {"free_bytes": {}},
}


def test_it_plans() -> None:
    found = microvm_plan(FACTS, [{"name": "agent", "image": "agent"}], {"agent": 64 << 20})
    assert found["fits"]
    assert found["text"][0] == "1 of 1 declared microVMs fit, and 10 more of the last kind. Then: " + found["limit"]


def test_a_refusal_is_an_error_of_the_filter() -> None:
    with pytest.raises(AnsibleFilterError, match=r"microvm_plan: instances\[0\]\.image: 'x': its size is not known"):
        microvm_plan(FACTS, [{"name": "agent", "image": "x"}], {"agent": 64 << 20})
