# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""State that survives a reboot: one file of ours for each concern, and one unit.

A module writes its wish to ``/etc/agentfleet/<concern>.json`` and then sets the
running state from it. At boot ``agentfleet-restore.service`` reads the same
files and runs the same code (copied to the host by the module itself), so that
there is one writer and no second implementation, and Ansible may be gone.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import typing as t
from contextlib import contextmanager

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import (
    HostError,
    Refused,
    Resource,
    Step,
)

PACKAGE = "ansible_collections.agentfleet.metal.plugins.module_utils"
# What a file of ours imports of the others: `from PACKAGE._a import x` or `from PACKAGE import _a, _b`.
_IMPORTS = re.compile(
    rf"^ *from {re.escape(PACKAGE)}(?:\.(?=_)| import )(\w+(?: as \w+)?(?:, _\w+(?: as \w+)?)*)", re.MULTILINE
)
LIBRARY = "/usr/local/lib/agentfleet"
STATE = "/etc/agentfleet"
SYSFS_FILE = "/etc/tmpfiles.d/60-agentfleet.conf"  # of kernel_tunables
UNIT = "/etc/systemd/system/agentfleet-restore.service"
UNIT_TEXT = f"""\
# Written by agentfleet.metal. Restores the state declared in {STATE}.
[Unit]
Description=Restore CXL, DAX, tiering, SR-IOV and vfio state declared by agentfleet.metal
After=systemd-udev-settle.service systemd-modules-load.service local-fs.target
Wants=systemd-udev-settle.service
Before=agentfleet-microvms.target

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=PYTHONPATH={LIBRARY} PYTHONDONTWRITEBYTECODE=1
ExecStart=/usr/bin/python3 -m {PACKAGE}._boot
TimeoutStartSec=900

[Install]
WantedBy=multi-user.target
"""

# Concern -> (module, class). The class takes (host, desired) and is a Resource.
# The order is that of the hardware: a device exists before it is used.
CONCERNS: dict[str, tuple[str, str]] = {
    "cxl": ("_cxl", "CxlRegions"),
    "dax": ("_dax", "DaxDevices"),
    "tiering": ("_tiering", "MemoryTiering"),
    "sriov": ("_sriov", "SriovVfs"),
    "vfio": ("_vfio", "VfioBindings"),
}


def wanted(host: Host, concern: str) -> dict[str, t.Any] | None:
    """The wish stored on the host for a concern, or None."""
    try:
        stored: dict[str, t.Any] | None = json.loads(host.read(f"{STATE}/{concern}.json") or "null")
    except ValueError:
        return None
    return stored


def sources(*names: str) -> dict[str, str]:
    """Path below LIBRARY -> text of these module_utils files and of all of ours that they import."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = inspect.getsource(importlib.import_module(f"{PACKAGE}.{name}"))
            waiting += [word for line in _IMPORTS.findall(found[name]) for word in re.findall(r"\b_\w+", line)]
    return {f"{PACKAGE}.{name}".replace(".", "/") + ".py": text for name, text in sorted(found.items())}


def _files(concern: str, desired: t.Mapping[str, t.Any]) -> dict[str, tuple[str, int]]:
    code = sources("_boot", CONCERNS[concern][0])
    files = {f"{LIBRARY}/{path}": (text, 0o644) for path, text in code.items()}
    files[UNIT] = (UNIT_TEXT, 0o644)
    files[f"{STATE}/{concern}.json"] = (json.dumps(desired, indent=2, sort_keys=True) + "\n", 0o644)
    return files


def persist_plan(host: Host, concern: str, desired: t.Mapping[str, t.Any] | None) -> list[Step]:
    """The step that makes a wish survive a reboot; none when it does already.

    :param desired: what the concern's class takes, JSON-able, without secrets; None forgets what was stored
    """
    path = f"{STATE}/{concern}.json"
    if desired is None:
        return [Step("forget", path, before=wanted(host, concern), data=("forget", path))] if host.exists(path) else []
    stale = {
        path: content for path, content in _files(concern, desired).items() if host.read(path) != content[0].strip()
    }
    enabled = host.exists("/etc/systemd/system/multi-user.target.wants/agentfleet-restore.service")
    if not stale and enabled:
        return []
    return [
        Step(
            "persist",
            f"{STATE}/{concern}.json",
            before=wanted(host, concern),
            after=dict(desired),
            why="so that it is back after a reboot",
            data=("persist", stale),
        )
    ]


@contextmanager
def each_alone(booting: bool, name: str, lacking: list[Step]) -> t.Iterator[None]:
    """At boot an item that is refused does not keep the others away: it becomes a step that fails."""
    try:
        yield
    except Refused as refusal:
        if not booting:
            raise
        lacking.append(Step("restore", name, data=("lacking", str(refusal))))


def persist_apply(host: Host, step: Step) -> bool:
    """Carry out a step of persist_plan or each_alone; False when the step is none."""
    if not (isinstance(step.data, tuple) and step.data[0] in ("persist", "forget", "lacking")):
        return False
    if step.data[0] == "lacking":
        raise HostError(step.data[1])
    if step.data[0] == "forget":
        host.remove(step.data[1])
        return True
    for path, (text, mode) in step.data[1].items():
        host.write(path, text, mode)
    host.run(["systemctl", "enable", "--quiet", "agentfleet-restore.service"])
    return True


def restore(host: Host) -> int:
    """Bring back as much as can be of every declared concern; returns the number of those that lack something."""
    failed = 0
    for concern, (module, name) in CONCERNS.items():
        desired = wanted(host, concern)
        if desired is None:
            continue
        steps, done, problems = list[Step](), list[str](), list[str]()
        try:
            resource: Resource = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)(host, desired)
            steps = resource.plan(resource.observe())
        except (Refused, HostError, OSError) as error:
            problems.append(str(error))
        for step in steps:
            try:
                resource.apply(step)
                done.append(f"{step.verb} {step.object}")
            except (HostError, OSError) as error:
                problems.append(f"{step.verb} {step.object}: {error}")
        if done or not problems:
            sys.stdout.write(f"{concern}: {'; '.join(done) or 'as declared'}\n")
        for problem in problems:
            sys.stderr.write(f"{concern}: FAILED: {problem}\n")
        failed += bool(problems)
    if host.exists(SYSFS_FILE):  # once more, for the huge pages of a node that came just now
        host.run(["systemd-tmpfiles", "--create", SYSFS_FILE], check=False)
    return failed


if __name__ == "__main__":
    raise SystemExit(1 if restore(Host()) else 0)
