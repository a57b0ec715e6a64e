# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The audit log: what was done is there, also after a failure; what was not done is not."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _audit
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Step, converge


class Module:
    """What converge needs of an AnsibleModule."""

    _name = "thing"

    def __init__(self, check_mode: bool = False) -> None:
        self.check_mode, self.warnings = check_mode, list[str]()

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def exit_json(self, **outcome: t.Any) -> t.NoReturn:
        raise SystemExit(0)

    def fail_json(self, **outcome: t.Any) -> t.NoReturn:
        raise SystemExit(1)


class Thing:
    predicting = False

    def __init__(self, host: t.Any, count: int, breaks_at: int = -1) -> None:
        self.host, self.count, self.breaks_at = host, count, breaks_at

    def observe(self) -> None:
        return None

    def plan(self, observed: None) -> list[Step]:
        return [Step("turn", f"wheel {number}", after="secret") for number in range(self.count)]

    def apply(self, step: Step) -> None:
        if step.object == f"wheel {self.breaks_at}":
            raise HostError("stuck")

    def result(self, observed: None) -> dict[str, t.Any]:
        return {}


def run(thing: Thing, check_mode: bool = False) -> list[dict[str, t.Any]]:
    with pytest.raises(SystemExit):
        converge(Module(check_mode), lambda: thing)
    return _audit.tail(thing.host.read(_audit.LOG))


def test_what_was_done(fake_host: t.Any) -> None:
    run(Thing(fake_host, 2))
    entries = run(Thing(fake_host, 1))

    assert [(entry["module"], entry["steps"]) for entry in entries] == [
        ("thing", [{"verb": "turn", "object": "wheel 0"}, {"verb": "turn", "object": "wheel 1"}]),
        ("thing", [{"verb": "turn", "object": "wheel 0"}]),
    ]
    assert "failed" not in entries[0]
    assert "secret" not in fake_host.read(_audit.LOG)


def test_what_was_done_before_a_failure(fake_host: t.Any) -> None:
    (entry,) = run(Thing(fake_host, 3, breaks_at=1))

    assert entry["steps"] == [{"verb": "turn", "object": "wheel 0"}]
    assert "turn wheel 1: stuck" in entry["failed"]


def test_nothing_for_check_mode_no_change_and_work_on_the_controller(fake_host: t.Any) -> None:
    controller = Thing(fake_host, 1)
    controller.audited = False

    assert run(Thing(fake_host, 1), check_mode=True) == run(Thing(fake_host, 0)) == run(controller) == []


def test_a_line_that_a_power_cut_left_half_written() -> None:
    assert _audit.tail(json.dumps({"module": "a"}) + '\n{"module": "b", "st') == [{"module": "a"}]
