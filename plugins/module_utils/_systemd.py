# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units that are written, enabled and started, or removed, with one reload of systemd for all of them.

A reload runs every generator of the host, and systemctl enable is one, too: with one for
each file and each unit, that was most of what bringing up a host of 3FS cost.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Step

UNITS = "/etc/systemd/system"
_RELOAD = ("systemctl", "daemon-reload")
RUNNING = ("active", "activating", "reloading", "deactivating")


@dataclass(frozen=True)
class Act:
    """A step's data: what it does to units besides what its verb says."""

    text: str = ""
    command: tuple[str, ...] = ()  # after a file was written, before a unit is started
    started: tuple[str, ...] = ()  # on the last one: all units that were started

    def tell(self, host: Host) -> None:
        """Let systemd know of new files and units, where this is the step that does it."""
        if self.command:
            host.run(self.command)


def show(host: Host, units: t.Sequence[str], properties: str) -> dict[str, dict[str, str]]:
    """Unit -> its properties, with one command for all; of a unit that systemd does not know, their defaults."""
    if not units:  # asked for none, systemctl tells of systemd itself
        return {}
    # A host whose guests boot all at once has little time for systemd.
    text = host.run(["systemctl", "show", f"--property=Id,{properties}", *units], timeout_seconds=180).stdout
    blocks = (dict(line.split("=", 1) for line in block.splitlines()) for block in text.split("\n\n") if block.strip())
    return {block["Id"]: block for block in blocks}


def last_words(host: Host, unit: str) -> str:
    """The end of a unit's journal."""
    return host.run(["journalctl", "--no-pager", "-q", "-o", "cat", "-n", "12", "-u", unit], check=False).text


def arrange(
    writes: t.Sequence[Step], starts: t.Sequence[Step], unit: t.Callable[[str], str] = lambda name: name
) -> list[Step]:
    """Files first, then units, with what they have in common done once.

    :param writes: steps whose data is the text of a file of a unit
    :param starts: steps that start a unit, or restart one that is enabled (verb restart)
    :param unit: the unit's name by a step's object
    """
    files = [replace(step, data=Act(text=step.data)) for step in writes]
    units = [replace(step, data=Act()) for step in starts]
    enabled = [unit(step.object) for step in starts if step.verb != "restart"]
    # also before a restart alone: an interrupted run may have left a file that systemd has not read
    command = ("systemctl", "enable", "--quiet", *enabled) if enabled else _RELOAD if files or units else ()
    if units:
        units[0] = replace(units[0], data=Act(command=command))
        last = replace(units[-1].data, started=tuple(unit(step.object) for step in starts))
        units[-1] = replace(units[-1], data=last)
    elif files:
        files[-1] = replace(files[-1], data=replace(files[-1].data, command=command))
    return files + units


def retire(texts: t.Mapping[str, str], states: t.Mapping[str, t.Mapping[str, str]], why: str) -> list[Step]:
    """Units that nobody declares any more: stopped, disabled, and their files removed.

    :param texts: path -> text, of the files that are there, of units and of what belongs to them
    :param states: unit -> its ActiveState and UnitFileState
    """
    paths = [path for path, text in texts.items() if text]
    units = [os.path.basename(path) for path in paths if os.path.basename(path) in states]
    # also those that failed, which would be reported for ever when there is no file of them
    stops = [unit for unit in units if states[unit].get("ActiveState") in (*RUNNING, "failed")]
    enabled = [unit for unit in units if states[unit].get("UnitFileState") == "enabled"]
    steps = [halt(stops, states, why)] if stops else []
    if enabled:
        steps.append(Step("disable", ", ".join(enabled), before="enabled", data=enabled))
    removes = [Step("remove", path, before=texts[path], data=Act()) for path in paths]
    if removes:
        removes[-1] = replace(removes[-1], data=Act(command=_RELOAD))
    return steps + removes


def halt(units: t.Sequence[str], states: t.Mapping[str, t.Mapping[str, str]], why: str) -> Step:
    """Stop units at once."""
    before = {unit: states[unit]["ActiveState"] for unit in units}
    return Step("stop", ", ".join(units), before=before, why=why, data=list(units), disruptive=True)


def apply_retired(host: Host, step: Step) -> None:
    """Carry out one step of ``retire``."""
    if step.verb == "stop":
        host.run(["systemctl", "stop", *step.data], timeout_seconds=180)
        host.run(["systemctl", "reset-failed", *step.data], check=False)  # those that did not fail are an error of it
    elif step.verb == "disable":
        host.run(["systemctl", "disable", "--quiet", *step.data])
    else:
        host.remove(step.object)
        step.data.tell(host)
