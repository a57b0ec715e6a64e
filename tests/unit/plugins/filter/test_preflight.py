# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter preflight_failures."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.filter.preflight import FilterModule

failures = FilterModule().filters()["preflight_failures"]


def test_failures_have_check_problem_remedy_and_role() -> None:
    facts = {"os": {"architecture": "mips", "family": "debian"}}
    assert failures(facts, {}) == [
        {
            "check": "architecture",
            "problem": "the host is 'mips'",
            "remedy": "Use an x86_64 or aarch64 host",
            "role": "preflight",
        }
    ]


def test_what_is_no_dictionary_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="the facts must be a dictionary, not str"):
        failures("no facts", {})
    with pytest.raises(AnsibleFilterError, match="wants must be a dictionary, not list"):
        failures({}, [])


def test_a_bad_size_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="memory: '1GB': not a size"):
        failures({}, {"memory": "1GB"})
