# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the boot guard's record says of the present boot."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _guardstate
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

RECORD = {"boot_id": "old", "candidate": {"mark": "7"}}


def test_without_a_record_nothing_is_armed(fake_host: t.Any) -> None:
    assert _guardstate.read_record(fake_host) == {} and _guardstate.booted(fake_host, {}) == ""


def test_a_damaged_record_is_explained_and_not_guessed(fake_host: t.Any) -> None:
    fake_host.files({_guardstate.STATE: "{"})
    with pytest.raises(HostError, match="state.json is damaged .*remove the file"):
        _guardstate.read_record(fake_host)


@pytest.mark.parametrize(
    ("cmdline", "boot_id", "booted"),
    [
        ("root=/dev/vda agentfleet.candidate=7", "new", "candidate"),
        ("root=/dev/vda agentfleet.candidate=77", "new", "known_good"),
        ("root=/dev/vda", "new", "known_good"),
        ("root=/dev/vda", "old", "not_rebooted"),
    ],
)
def test_what_runs_is_told_by_mark_and_boot_id(fake_host: t.Any, cmdline: str, boot_id: str, booted: str) -> None:
    fake_host.files({"/proc/cmdline": cmdline, "/proc/sys/kernel/random/boot_id": boot_id})
    assert _guardstate.booted(fake_host, RECORD) == booted
