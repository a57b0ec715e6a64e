# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host is settled only when every module would do nothing, fail at nothing and say nothing."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _settled
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step


class Thing:
    """A resource that is as its options say."""

    def __init__(self, host: t.Any, options: dict[str, t.Any]) -> None:
        del host
        self.options = options
        if "refused" in options:
            raise Refused("option", 1, "wrong", "Write it right")

    def observe(self) -> None:
        if "error" in self.options:
            raise self.options["error"]

    def plan(self, observed: None) -> list[Step]:
        return self.options.get("steps", [])

    def apply(self, step: Step) -> None:
        raise AssertionError(f"{step} is not to be carried out")

    def result(self, observed: None) -> dict[str, t.Any]:
        return self.options.get("result", {})


@pytest.mark.parametrize(
    ("options", "settled"),
    [
        ({}, True),
        ({"result": {"reboot_required": False, "warnings": []}}, True),
        ({"steps": [Step("set", "it")]}, False),
        ({"refused": True}, False),
        ({"error": HostError("no such device")}, False),
        ({"error": PermissionError(13, "Permission denied")}, False),
        ({"result": {"reboot_required": True}}, False),
        ({"result": {"warnings": ["slow"]}}, False),
    ],
)
def test_settled(options: dict[str, t.Any], settled: bool, fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_settled, "RESOURCES", {"quiet": ({}, Thing), "other": ({}, Thing), "not_asked": ({}, Thing)})
    resource = _settled.Settled(fake_host, {"quiet": {}, "other": options})
    pending = resource.observe()
    assert resource.plan(pending) == []
    assert resource.result(pending) == {"settled": settled, "pending": [] if settled else ["other"]}


def test_a_real_resource_is_asked(fake_host: t.Any) -> None:
    wish = {"kernel_tunables": {"sysctl": {"vm.swappiness": 10}}}
    fake_host.files({"/proc/sys/vm/swappiness": "60"})
    assert _settled.Settled(fake_host, wish).observe() == ["kernel_tunables"]
    assert fake_host.read("/proc/sys/vm/swappiness") == "60"
