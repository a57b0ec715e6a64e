# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units: _systemd."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import Act, arrange, show

A, B = "a.service", "b.service"
RELOAD = ("systemctl", "daemon-reload")


def files(*units: str) -> list[Step]:
    """Steps that write units."""
    return [Step("write", unit, data=f"text of {unit}") for unit in units]


@pytest.mark.parametrize(
    ("writes", "starts", "acts"),
    [
        (
            files(A, B),
            [Step("start", A), Step("restart", B)],
            [
                Act(text=f"text of {A}"),
                Act(text=f"text of {B}"),
                Act(command=("systemctl", "enable", "--quiet", A)),
                Act(started=(A, B)),
            ],
        ),
        (files(A), [Step("restart", A)], [Act(text=f"text of {A}"), Act(command=RELOAD, started=(A,))]),
        (files(A, B), [], [Act(text=f"text of {A}"), Act(text=f"text of {B}", command=RELOAD)]),
        ([], [Step("restart", A)], [Act(command=RELOAD, started=(A,))]),
        ([], [], []),
    ],
    ids=["enabling reloads", "a changed unit", "files alone", "what an interrupted run wrote", "nothing"],
)
def test_systemd_is_told_once(writes: list[Step], starts: list[Step], acts: list[Act]) -> None:
    steps = arrange(writes, starts)
    assert [step.verb for step in steps] == [step.verb for step in [*writes, *starts]]
    assert [step.data for step in steps] == acts


def test_a_unit_can_have_another_name_than_what_is_shown() -> None:
    (step,) = arrange([], [Step("mount", "/data")], lambda path: path.strip("/") + ".mount")
    assert step.object == "/data" and step.data.command == ("systemctl", "enable", "--quiet", "data.mount")


def test_properties_by_unit(fake_host: t.Any) -> None:
    fake_host.answers["systemctl"] = f"Id={A}\nActiveState=active\n\nId={B}\nActiveState=inactive\n"
    assert show(fake_host, [A, B], "ActiveState") == {
        A: {"Id": A, "ActiveState": "active"},
        B: {"Id": B, "ActiveState": "inactive"},
    }
    assert fake_host.calls == [f"systemctl show --property=Id,ActiveState {A} {B}"]
    assert show(fake_host, [], "ActiveState") == {} and len(fake_host.calls) == 1


def test_a_systemd_that_does_not_answer_is_no_host_without_units(fake_host: t.Any) -> None:
    fake_host.answers["systemctl"] = (1, "", "Failed to connect to bus")
    with pytest.raises(HostError, match="systemctl .*Failed to connect to bus"):
        show(fake_host, [A], "ActiveState")
