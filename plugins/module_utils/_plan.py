# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observe, plan, apply: the one shape of every module of this collection.

This module is private to the collection. It imports nothing of Ansible: the
boot-time restore unit and the unit tests run the same code.
"""

from __future__ import annotations

import contextlib
import json
import typing as t
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils import _audit


class Refused(Exception):
    """A wish that is refused before anything is changed.

    :param option: the option's name as the user wrote it, with its index ("regions[0].size")
    :param value: the offending value
    :param problem: the fact that makes it impossible
    :param remedy: what would be valid, or what to do
    """

    def __init__(self, option: str, value: t.Any, problem: str, remedy: str) -> None:
        self.option, self.value, self.problem, self.remedy = option, value, problem, remedy
        super().__init__(f"{option}: {value!r}: {problem}. {remedy}")

    def public(self) -> dict[str, t.Any]:
        """The refusal as a module returns it under ``refused``."""
        return {
            "option": self.option,
            "value": self.value,
            "problem": self.problem,
            "remedy": self.remedy,
        }


class HostError(Exception):
    """Something on the host did not work; the message says fact, cause and remedy."""


class ItemsFailed(HostError):
    """A step failed for some of its items, which later steps leave out: those are carried out before it is reported."""


@dataclass(frozen=True)
class Step:
    """One change, as it is planned, shown and carried out.

    ``before`` and ``after`` are shown to the user (never put a secret there);
    ``data`` is for ``apply`` alone and is never shown.
    """

    verb: str
    object: str
    before: t.Any = None
    after: t.Any = None
    why: str = ""
    disruptive: bool = False
    data: t.Any = field(default=None, repr=False, compare=False)

    def public(self) -> dict[str, t.Any]:
        """The step as a module returns it under ``plan``."""
        return {
            "verb": self.verb,
            "object": self.object,
            "before": self.before,
            "after": self.after,
            "why": self.why,
            "disruptive": self.disruptive,
        }


class Resource(t.Protocol):
    """What a module manages. The constructor validates options and raises Refused.

    ``predicting`` is true in check mode. What the options refer to (a region, an
    image, an IOMMU after the reboot) may then be made by an earlier task of the
    same run: plan with it and warn, instead of refusing. It is False otherwise.
    """

    predicting: bool

    def observe(self) -> t.Any:
        """Read the present state. No side effect; missing files are not errors."""

    def plan(self, observed: t.Any) -> list[Step]:
        """Pure function: the steps from ``observed`` to the wish. May raise Refused."""

    def apply(self, step: Step) -> None:
        """Carry out one step completely, or undo it and raise HostError."""

    def result(self, observed: t.Any) -> dict[str, t.Any]:
        """What the module returns besides changed, plan and diff (also in check mode)."""


class Looking:
    """A resource that never changes anything, and says in ``result`` what it saw."""

    predicting = False

    def plan(self, observed: t.Any) -> list[Step]:
        """Nothing to change."""
        return []

    def apply(self, step: Step) -> None:
        """Never called: there are no steps."""


def diff(steps: t.Sequence[Step]) -> list[dict[str, str]]:
    """Ansible's ``diff`` value: one before/after pair for each step."""

    def text(value: t.Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value if value.endswith("\n") else value + "\n"
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    return [
        {
            "before_header": step.object,
            "after_header": f"{step.object} ({step.verb})",
            "before": text(step.before),
            "after": text(step.after),
        }
        for step in steps
    ]


def apply_all(resource: Resource, steps: t.Sequence[Step], done: list[Step] | None = None) -> None:
    """Carry out the steps in order; stop at the first failure, unless it is of some items alone, and say what was done.

    :param done: takes the steps that were carried out, for a caller who wants to know after a failure
    """
    done = [] if done is None else done
    failed: list[tuple[Step, Exception]] = []
    for step in steps:
        try:
            resource.apply(step)
        except (HostError, OSError) as error:
            failed.append((step, error))
            if not isinstance(error, ItemsFailed):
                break
        else:
            done.append(step)
    if failed:
        told = "; ".join(f"{step.verb} {step.object}: {error}" for step, error in failed)
        so_far = "; ".join(f"{past.verb} {past.object}" for past in done) or "nothing"
        where = "before it" if steps[: len(done)] == done else "besides"
        raise HostError(
            f"{told}. Done {where}: {so_far}. Correct the cause and run again: what is done will not be repeated."
        ) from failed[-1][1]


def _apply_audited(module: t.Any, resource: Resource, steps: t.Sequence[Step]) -> None:
    """Carry out the steps and leave a line in the host's audit log, also when one fails.

    A resource without a ``host``, or with ``audited = False`` (work on the controller), leaves none.
    """
    done: list[Step] = []
    failed = ""
    try:
        apply_all(resource, steps, done)
    except HostError as error:
        failed = str(error)
        raise
    finally:
        host = getattr(resource, "host", None)
        if host is not None and getattr(resource, "audited", True) and (done or failed):
            try:
                _audit.append(host.path(_audit.LOG), module._name, done, failed)
            except OSError as error:
                module.warn(f"{_audit.LOG}: {error.strerror}. What was done is not in the audit log")


def unlogged(kind: t.Any) -> t.Any:
    """AnsibleModule, but with no values of parameters in the host's log, for modules with secrets inside of other options.

    Ansible logs an option as its repr, where a secret with a newline or a backslash is not found and so not masked.
    """
    return type("Unlogged", (kind,), {"_log_invocation": lambda module: module.log("Invoked")})


def converge(module: t.Any, build: t.Callable[[], Resource]) -> None:
    """Run one resource under an AnsibleModule (duck-typed, so nothing of Ansible is imported).

    A resource with ``alone`` (a context manager) has no other call beside it from what it observes to what it changes;
    in check mode, which writes nothing, it needs none.

    :param module: the AnsibleModule; its ``check_mode`` decides whether steps are applied
    :param build: makes the resource from the module's parameters; may raise Refused
    """
    failure: t.Callable[[], dict[str, t.Any]] = dict
    try:
        resource = build()
        # What a module of many items returns besides the message, so that each item's fate is known.
        failure = getattr(resource, "failure", dict)
        resource.predicting = bool(module.check_mode)
        with contextlib.nullcontext() if module.check_mode else getattr(resource, "alone", contextlib.nullcontext)():
            observed = resource.observe()
            steps = resource.plan(observed)
            outcome: dict[str, t.Any] = {
                "changed": bool(steps),
                "plan": [step.public() for step in steps],
                "diff": diff(steps),
            }
            if steps and not module.check_mode:
                _apply_audited(module, resource, steps)
                observed = resource.observe()
            outcome.update(resource.result(observed))
    except Refused as refusal:
        module.fail_json(msg=str(refusal), refused=refusal.public())
    except HostError as error:
        module.fail_json(msg=str(error), **failure())
    for text in outcome.pop("warnings", []):
        module.warn(text)
    module.exit_json(**outcome)
