# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a module persists is what the boot unit restores, by the same code."""

from __future__ import annotations

import os
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

ENABLE = "systemctl enable --quiet agentfleet-restore.service"
WANTS = "/etc/systemd/system/multi-user.target.wants/agentfleet-restore.service"


def enabled(host: t.Any) -> str:
    host.files({WANTS: "-> ../agentfleet-restore.service"})
    return ""


def persist(host: t.Any, concern: str, desired: dict[str, t.Any]) -> list[Step]:
    steps = _boot.persist_plan(host, concern, desired)
    for step in steps:
        assert _boot.persist_apply(host, step)
    return steps


def test_a_wish_is_written_once_with_code_and_unit(fake_host: t.Any) -> None:
    fake_host.answers[ENABLE] = enabled
    steps = persist(fake_host, "cxl", {"regions": [1]})
    assert [(s.verb, s.object, s.before, s.after) for s in steps] == [
        ("persist", "/etc/agentfleet/cxl.json", None, {"regions": [1]})
    ]
    assert persist(fake_host, "cxl", {"regions": [1]}) == []
    changed = persist(fake_host, "cxl", {"regions": []})
    assert changed[0].before == {"regions": [1]} and changed[0].after == {"regions": []}


def test_a_half_written_persistence_is_repaired(fake_host: t.Any) -> None:
    fake_host.answers[ENABLE] = enabled
    persist(fake_host, "cxl", {})
    fake_host.remove(_boot.UNIT)
    assert len(persist(fake_host, "cxl", {})) == 1 and fake_host.exists(_boot.UNIT)


def test_other_steps_are_left_to_the_resource(fake_host: t.Any) -> None:
    assert _boot.persist_apply(fake_host, Step("create", "region", data={"x": 1})) is False


@pytest.mark.parametrize("concern", _boot.CONCERNS)
def test_the_copied_code_runs_alone(concern: str, fake_host: t.Any) -> None:
    """The boot unit's command finds all it imports below the copied library."""
    fake_host.answers[ENABLE] = enabled
    persist(fake_host, concern, {})
    library = fake_host.path(_boot.LIBRARY)
    module = _boot.CONCERNS[concern][0]
    done = subprocess.run(
        [sys.executable, "-c", f"import {_boot.PACKAGE}._boot as b, {_boot.PACKAGE}.{module}; print(b.__file__)"],
        env={"PYTHONPATH": library, "PATH": os.environ["PATH"]},
        cwd=library,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(library)


def test_restore_goes_on_after_a_failure_and_counts_it(
    fake_host: t.Any, monkeypatch: pytest.MonkeyPatch, capsys: t.Any
) -> None:
    class Thing:
        def __init__(self, host: t.Any, desired: dict[str, t.Any]) -> None:
            if "bad" in desired:
                raise Refused("bad", desired["bad"], "not known", "Name one that exists")
            self.desired = desired

        def observe(self) -> None:
            return None

        def plan(self, observed: None) -> list[Step]:
            return [Step("make", name) for name in self.desired["names"]]

        def apply(self, step: Step) -> None:
            if step.object == "broken":
                raise HostError("no such device")

    monkeypatch.setattr(_boot, "CONCERNS", dict.fromkeys(("a", "b", "c", "unset"), ("_boot", "Thing")))
    monkeypatch.setattr(_boot, "Thing", Thing, raising=False)
    fake_host.files(
        {"/etc/agentfleet/a.json": '{"bad": 1}', "/etc/agentfleet/b.json": '{"names": ["broken", "whole"]}'}
    ).files({"/etc/agentfleet/c.json": '{"names": ["good"]}'})
    fake_host.files({_boot.SYSFS_FILE: ""})
    assert _boot.restore(fake_host) == 2
    assert fake_host.calls == [f"systemd-tmpfiles --create {_boot.SYSFS_FILE}"]
    out, err = capsys.readouterr()
    assert out == "b: make whole\nc: make good\n"
    assert "a: FAILED: bad: 1: not known" in err and "b: FAILED: make broken: no such device" in err
