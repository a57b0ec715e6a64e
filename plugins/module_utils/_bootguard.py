# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host is never lost to a reboot: a new kernel or command line boots once, on trial.

The present kernel, initramfs and command line are kept as the entry
``agentfleet-known-good``, which is saved as the default *before* anything is
configured. The new default is copied into ``agentfleet-candidate`` with
``panic=30`` and a mark, and booted once (``next_entry``). So every reset, at any
point of time, ends in an entry that has booted before, or in the candidate once.

Phases in the record (one file, replaced atomically, holding the backup too):

``arming``
    The known-good entry is the default; no candidate is on trial. Going on, or
    going back, are both possible. A host also stays here when a candidate *kernel*
    failed: its package remains, and must not become the default.
``armed``
    The candidate boots next, boots now, or has failed.
``promoting``, ``rolling_back``
    Decided; to be finished by whoever comes next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import typing as t
from dataclasses import asdict, replace

from ansible_collections.agentfleet.metal.plugins.module_utils._bootloader import (
    CANDIDATE,
    KNOWN_GOOD,
    OURS,
    Entry,
    Loader,
    loader_of,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._guardstate import (
    MARK,
    STATE,
    Record,
    booted,
    read_record,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step


class Guard:
    """The record, and the transitions between its phases."""

    def __init__(self, host: Host, loader: Loader) -> None:
        self.host, self.loader = host, loader

    def record(self) -> Record:
        """The guard's record; empty when nothing is armed."""
        return read_record(self.host)

    def boot_id(self) -> str:
        """The kernel's identity of this boot."""
        return self.host.read("/proc/sys/kernel/random/boot_id")

    def booted(self, record: Record) -> str:
        """What runs: ``candidate``, ``known_good``, or ``not_rebooted`` since the candidate was armed."""
        return booted(self.host, record)

    def complete(self, record: Record) -> bool:
        """Whether the known-good entry is what boots by default, and all files are in the backup."""
        return (
            bool(record)
            and self.loader.environment().get("saved_entry") == KNOWN_GOOD
            and {*self.loader.sources()} <= {*record["files"]}
        )

    def failed_units(self) -> list[str]:
        """Units that have failed; HostError when systemd does not tell, which is not the same as none."""
        done = self.host.run(["systemctl", "list-units", "--state=failed", "--plain", "--no-legend"])
        return sorted(line.split()[0] for line in done.stdout.splitlines() if line.split())

    def possible(self) -> None:
        """Raise Refused when this host could not be brought back."""
        self.loader.guardable(self.loader.environment().get("saved_entry", ""))
        self.running_entry()

    # -- transitions; each can be repeated after a power cut --------------------

    def arm(self) -> None:
        """Keep what runs as the known-good entry and make it the default."""
        record = self.record()
        if not record:
            self.possible()
            environment = self.loader.environment()
            arguments = running_arguments(self.host.read("/proc/cmdline"))
            record = {
                "phase": "arming",
                "backend": self.loader.name,
                "boot_id": self.boot_id(),
                "saved_entry": environment.get("saved_entry", ""),
                "default": environment.get("saved_entry", ""),
                "failed_units": self.failed_units(),
                "known_good": asdict(replace(self.running_entry(), arguments=arguments)),
                "files": {},
            }
            self.loader.forget()
        # A kernel package that was installed meanwhile has entries of its own, and may have saved one.
        for path in self.loader.sources():
            record["files"].setdefault(path, self._content(path))
        chosen = self.loader.environment().get("saved_entry", "")
        record["default"] = record["default"] if chosen in ("", *OURS) else chosen
        self._write(record)
        kept = self.loader.known_good(_entry(record["known_good"]), record["known_good"]["arguments"])
        self.loader.put_entries([kept])
        self.loader.set_environment(saved_entry=KNOWN_GOOD, next_entry=None)

    def stage(self) -> None:
        """Put the configured default on trial: it boots next, once."""
        record = self.record()
        default = self.loader.default(record["default"])
        arguments = f"{default.arguments} {' '.join(self.loader.panic)}"
        mark = mark_of(default)
        kept = self.loader.known_good(_entry(record["known_good"]), record["known_good"]["arguments"])
        candidate = replace(default, id=CANDIDATE, arguments=f"{arguments} {MARK}{mark}")
        record.update(
            boot_id=self.boot_id(),
            candidate={"mark": mark, "entry": default.id, "release": default.release, "arguments": default.arguments},
        )
        self._write(record)
        self.loader.put_entries([kept, candidate])
        self.loader.set_environment(saved_entry=KNOWN_GOOD, next_entry=CANDIDATE)
        self._write({**record, "phase": "armed"})

    def staged(self, record: Record, arguments: str, release: str) -> bool:
        """Whether this command line is the one on trial at the next boot."""
        candidate = record.get("candidate", {})
        return (
            record.get("phase") == "armed"
            and self.loader.environment().get("next_entry") == CANDIDATE
            and candidate["release"] == release
            and set(candidate["arguments"].split()) == set(arguments.split())
        )

    def disarm(self) -> None:
        """Make the configured default the default for good, and remove all of ours."""
        record = {**self.record(), "phase": "promoting"}
        self._write(record)
        saved = record["saved_entry"]
        if self.loader.name == "grubby":  # there a saved entry is the rule; the one that was tried is it now
            saved = record.get("candidate", {}).get("entry") or saved
        self._leave(saved)

    def roll_back(self) -> None:
        """Make the configuration what it was before it was armed."""
        record = {**self.record(), "phase": "rolling_back"}
        self._write(record)
        for path, content in record["files"].items():
            if content is None:
                self.host.remove(path)
            elif self._content(path) != content:
                self.host.write(path, content["text"], content["mode"])
        os.sync()
        release = _entry(record["known_good"]).release
        if record.get("candidate", {}).get("release", release) == release:
            self._leave(record["saved_entry"])
            return
        for step in self.loader.hold():
            self.loader.apply(step)
        self.loader.set_environment(saved_entry=KNOWN_GOOD, next_entry=None)
        self._write({**record, "phase": "arming", "boot_id": self.boot_id(), "candidate": {}})

    def _leave(self, saved: str) -> None:
        self.loader.set_environment(saved_entry=None if saved in OURS else saved, next_entry=None)
        self.loader.put_entries([])
        self.loader.forget()
        self.host.remove(STATE)

    # -- helpers -----------------------------------------------------------------

    def running_entry(self) -> Entry:
        """The distribution's entry of the kernel that runs."""
        image = re.search(r"(?:^|\s)BOOT_IMAGE=(?:\([^)]*\))?(\S+)", self.host.read("/proc/cmdline"))
        if image is None:
            raise Refused(
                "guard",
                True,
                "this boot was not made by GRUB (no BOOT_IMAGE on the command line)",
                "Boot the host through its own boot loader, or set guard: false",
            )
        release = self.host.read("/proc/sys/kernel/osrelease")
        for entry in self.loader.entries():
            if entry.kernel == image.group(1) or entry.release == release:
                return entry
        raise Refused(
            "guard",
            True,
            f"kernel {release}, which runs, has no boot entry any more",
            "Install its package again or reboot into an installed kernel first, or set guard: false",
        )

    def _content(self, path: str) -> dict[str, t.Any] | None:
        try:
            with open(self.host.path(path), encoding="utf-8", errors="surrogateescape") as file:
                return {"text": file.read(), "mode": stat.S_IMODE(os.fstat(file.fileno()).st_mode)}
        except OSError:
            return None

    def _write(self, record: Record) -> None:
        self.host.write(STATE, json.dumps(record, indent=1, sort_keys=True) + "\n", 0o600)
        os.sync()


class BootGuard:
    """The wish of the module ``boot_guard``."""

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.wanted = params.get("state")
        self.loader = loader_of(host, params.get("backend") or "auto")
        self.guard = Guard(host, self.loader)
        self.checks = [str(check) for check in params.get("health_checks") or []]
        self.timeout_seconds: int = params.get("health_timeout_seconds", 300)
        for index, check in enumerate(self.checks):
            if not check.strip():
                raise Refused(f"health_checks[{index}]", check, "an empty command always succeeds", "Remove it")
        if self.timeout_seconds < 1:
            raise Refused(
                "health_timeout_seconds", self.timeout_seconds, "not a positive number", "Give a number of seconds"
            )

    def observe(self) -> Record:
        """The record as it is."""
        return self.guard.record()

    def plan(self, observed: Record) -> list[Step]:
        """At most a handful of steps towards the wanted state."""
        phase, runs = observed.get("phase", ""), self.guard.booted(observed)
        if self.wanted == "armed":
            steps = []
            if not self.guard.complete(observed):
                if not observed:
                    self.guard.possible()
                steps.append(arm_step(self.host))
            return [*steps, *self.loader.hold()]
        if not observed or self.wanted is None:
            return []
        if self.wanted == "promoted":
            if phase == "promoting":
                return [self._decide("promote", "a promotion was interrupted")]
            if runs != "candidate":
                raise Refused(
                    "state",
                    "promoted",
                    f"the candidate does not run (the host is {_BOOTED[runs]}, phase {phase})",
                    "Reboot into it first, or take state: rolled_back",
                )
            return [
                Step("check", "health of the candidate", None, ["systemd", *self.checks], data=("gate",)),
                self._decide("promote", "the candidate is healthy"),
            ]
        if phase == "promoting":
            raise Refused(
                "state",
                "rolled_back",
                "the candidate was found healthy, its promotion has begun",
                "Use state: promoted",
            )
        if phase == "arming" and not observed.get("candidate") and self._held(observed):
            return []
        return [self._decide("roll back", "the candidate did not prove itself")]

    def _held(self, observed: Record) -> bool:
        """A kernel that failed is still installed: the guard stays."""
        return self.loader.default(observed["default"]).release != _entry(observed["known_good"]).release

    def _decide(self, verb: str, why: str) -> Step:
        record = self.guard.record()
        before, after = record["known_good"]["arguments"], record.get("candidate", {}).get("arguments")
        if verb == "roll back":
            before, after = after, before
        return Step(verb, "boot configuration", before, after, why, data=(verb,))

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if self.loader.apply(step):
            return
        kind = step.data[0]
        if kind == "gate":
            self.gate()
        else:
            {"arm": self.guard.arm, "promote": self.guard.disarm, "roll back": self.guard.roll_back}[kind]()

    def gate(self) -> None:
        """The health gate; HostError when the candidate does not pass."""
        done = self.host.run(
            ["systemctl", "is-system-running", "--wait"], timeout_seconds=self.timeout_seconds, check=False
        )
        if done.rc == 124:
            jobs = self.host.run(["systemctl", "list-jobs", "--no-legend"], check=False)
            raise HostError(f"systemd is not up after {self.timeout_seconds} s; it waits for: {jobs.text}")
        new = sorted({*self.guard.failed_units()} - {*self.guard.record()["failed_units"]})
        if new:
            look = ["journalctl", "-b", "-u", new[0]]
            said = self.host.run([*look, "--no-pager", "-o", "cat", "-n", "5"], check=False).text
            raise HostError(
                f"systemd is {done.stdout.strip()}: {', '.join(new)} failed, and did not before. "
                f"The last lines of `{' '.join(look)}`: {said or 'none'}"
            )
        if done.stdout.strip() not in ("running", "degraded"):
            raise HostError(f"systemd is {done.stdout.strip() or done.text!r}, not running")
        for check in self.checks:
            done = self.host.run(["sh", "-c", check], timeout_seconds=self.timeout_seconds, check=False)
            if done.rc != 0:
                raise HostError(f"health check `{check}` failed with exit code {done.rc}: {done.text or 'no output'}")

    def result(self, observed: Record) -> dict[str, t.Any]:
        """The guard as it stands."""
        return {"boot_guard": summary(self.guard, observed)}


_BOOTED = {"": "not armed", "candidate": "on the candidate", "known_good": "on the known-good entry"}
_BOOTED["not_rebooted"] = "not rebooted since"


def arm_step(host: Host) -> Step:
    """The step that arms the guard."""
    good = running_arguments(host.read("/proc/cmdline"))
    return Step("arm", "boot guard", None, f"known good: {good}", "so that no reboot can lose the host", data=("arm",))


def summary(guard: Guard, record: Record) -> dict[str, t.Any]:
    """What a person needs to know of the record."""
    return {
        "phase": record.get("phase", ""),
        "booted": guard.booted(record),
        "boot_id": guard.boot_id(),
        "candidate": {key: record.get("candidate", {}).get(key, "") for key in ("release", "arguments")},
        "known_good": {
            "release": _entry(record["known_good"]).release if record else "",
            "arguments": record["known_good"]["arguments"] if record else "",
        },
    }


def running_arguments(cmdline: str) -> str:
    """The booted command line without what the boot loader and the guard added."""
    words = cmdline.split()
    if any(word.startswith(MARK) for word in words):
        end = next(index for index, word in enumerate(words) if word.startswith(MARK))
        while end > 0 and words[end - 1] in Loader.panic:
            words.pop(end - 1)
            end -= 1
    return " ".join(word for word in words if not word.startswith((MARK, "BOOT_IMAGE=")))


def mark_of(entry: Entry) -> str:
    """A short mark that tells this candidate from others."""
    return hashlib.sha256(f"{entry.kernel} {entry.arguments}".encode()).hexdigest()[:8]


def _entry(stored: t.Mapping[str, t.Any]) -> Entry:
    return Entry(**{**stored, "initrds": tuple(stored["initrds"])})
