# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The contract of observe, plan, apply that every module inherits."""

from __future__ import annotations

import contextlib
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import (
    HostError,
    ItemsFailed,
    Refused,
    Step,
    apply_all,
    converge,
    diff,
)


class Exit(Exception):
    """Raised by the fake module instead of ending the process."""


class FakeModule:
    """What converge needs of an AnsibleModule."""

    def __init__(self, check_mode: bool = False) -> None:
        self.check_mode = check_mode
        self.warnings: list[str] = []
        self.outcome: dict[str, t.Any] = {}

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def exit_json(self, **outcome: t.Any) -> t.NoReturn:
        self.outcome = outcome
        raise Exit

    def fail_json(self, **outcome: t.Any) -> t.NoReturn:
        self.outcome = {"failed": True, **outcome}
        raise Exit


class Counter:
    """A resource that brings a number to a wish, one step at a time."""

    def __init__(self, value: int, wish: int, breaks_at: int = -1) -> None:
        self.value, self.wish, self.breaks_at = value, wish, breaks_at

    def observe(self) -> int:
        return self.value

    def plan(self, observed: int) -> list[Step]:
        return [Step("raise", f"counter to {n}", n - 1, n) for n in range(observed + 1, self.wish + 1)]

    def apply(self, step: Step) -> None:
        if step.after == self.breaks_at:
            raise HostError("the wheel is stuck")
        self.value = step.after

    def result(self, observed: int) -> dict[str, t.Any]:
        return {"value": observed, "warnings": ["nearly full"] if observed > 2 else []}


def run(resource: Counter, check_mode: bool = False) -> FakeModule:
    module = FakeModule(check_mode)
    with pytest.raises(Exit):
        converge(module, lambda: resource)
    return module


def test_a_second_run_plans_nothing() -> None:
    counter = Counter(0, 2)
    first, second = run(counter), run(counter)
    assert first.outcome["changed"] is True
    assert second.outcome == {"changed": False, "plan": [], "diff": [], "value": 2}


def test_check_mode_predicts_the_plan_and_changes_nothing() -> None:
    counter = Counter(0, 2)
    predicted = run(counter, check_mode=True).outcome
    assert counter.value == 0 and predicted["value"] == 0
    done = run(counter).outcome
    assert predicted["plan"] == done["plan"] and predicted["diff"] == done["diff"]


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_resource_is_alone_from_what_it_observes_to_what_it_returns(check_mode: bool) -> None:
    held, seen = [], []

    class Alone(Counter):
        @contextlib.contextmanager
        def alone(self) -> t.Iterator[None]:
            held.append(1)
            yield
            held.clear()

        def observe(self) -> int:
            seen.append(("observe", bool(held)))
            return super().observe()

        def result(self, observed: int) -> dict[str, t.Any]:
            seen.append(("result", bool(held)))
            return super().result(observed)

    run(Alone(0, 1), check_mode)
    looks = ["observe", "result"] if check_mode else ["observe", "observe", "result"]
    assert seen == [(look, not check_mode) for look in looks] and not held


def test_a_failure_says_what_was_done_before_it() -> None:
    outcome = run(Counter(0, 3, breaks_at=2)).outcome
    assert outcome["msg"].startswith("raise counter to 2: the wheel is stuck. Done before it: raise counter to 1.")


def test_what_fails_for_some_items_does_not_stop_the_steps_after_it() -> None:
    class Many(Counter):
        def apply(self, step: Step) -> None:
            if step.after in (1, self.breaks_at):
                raise (ItemsFailed if step.after == 1 else HostError)(f"number {step.after} is stuck")
            super().apply(step)

    resource = Many(0, 4, breaks_at=3)
    with pytest.raises(HostError) as failed:
        apply_all(resource, resource.plan(0))
    assert str(failed.value).startswith(
        "raise counter to 1: number 1 is stuck; raise counter to 3: number 3 is stuck. Done besides: raise counter to 2."
    )


def test_warnings_are_handed_to_ansible() -> None:
    module = run(Counter(3, 3))
    assert module.warnings == ["nearly full"] and "warnings" not in module.outcome


def test_a_refusal_names_option_value_and_remedy() -> None:
    module = FakeModule()

    def build() -> t.NoReturn:
        raise Refused("size", "1MB", "not a size", "Write 1MiB")

    with pytest.raises(Exit):
        converge(module, build)
    assert module.outcome["msg"] == "size: '1MB': not a size. Write 1MiB"
    assert module.outcome["refused"]["remedy"] == "Write 1MiB"


def test_diff_shows_text_as_text_and_values_as_json() -> None:
    rows = diff([Step("change", "a file", "old", "new\n"), Step("create", "b", None, {"x": 1})])
    assert (rows[0]["before"], rows[0]["after"]) == ("old\n", "new\n")
    assert (rows[1]["before"], rows[1]["after"]) == ("", '{\n  "x": 1\n}\n')


def test_what_a_step_carries_for_apply_is_never_shown() -> None:
    step = Step("write", "token", data="s3cret")
    assert "s3cret" not in repr(step) and "s3cret" not in str(step.public())


def test_an_os_error_is_explained_like_a_host_error() -> None:
    class Broken(Counter):
        def apply(self, step: Step) -> None:
            raise PermissionError(13, "Permission denied", "/sys/x")

    with pytest.raises(HostError, match="raise counter to 1: .*Permission denied.*Done before it: nothing"):
        apply_all(Broken(0, 1), Broken(0, 1).plan(0))
