# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a microVM's unit runs on the host besides the VMM and shell scripts: waiting for its turn, and stopping.

This module is private to the collection and imports nothing of Ansible. It is copied to the host, so that the
units work without Ansible; see ``code`` in ``_microvm_units``.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import SLOTS, running_spec, slot
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

SLOT_SECONDS = 120  # how long a boot may keep others waiting
STOP_SECONDS = 60  # for the guest's own power off
RUNG_SECONDS = 5  # for each later rung of the ladder; systemd adds TERM and KILL


def read_spec(host: Host, name: str) -> _vmm.Spec | None:
    """What a microVM runs with, or None."""
    try:
        return t.cast("_vmm.Spec", json.loads(host.read(running_spec(name))))
    except ValueError:
        return None


# -- a turn to boot --------------------------------------------------------------


def wait(host: Host, limit: int, seconds: float = 0.5) -> None:
    """Wait until fewer than ``limit`` microVMs boot. The caller holds the lock, so only one does this."""
    while True:
        booting = host.names(SLOTS)
        for name in booting:
            if _is_over(host, name):
                host.remove(slot(name))
        if len(host.names(SLOTS)) < limit:
            return
        time.sleep(seconds)


def _is_over(host: Host, name: str) -> bool:
    """Whether a boot has ended: its agent answers, or it took too long."""
    since = host.read_int(slot(name), 0) or 0
    if uptime(host) - since > SLOT_SECONDS:
        return True
    spec = read_spec(host, name)
    if spec is None:
        return False
    try:
        _vmm.driver(spec["driver"]).connect(host, spec, _vmm.AGENT_PORT, 1).close()
    except OSError:
        return False
    return True


def uptime(host: Host) -> float:
    """Seconds since the host's boot; its clock may be set meanwhile."""
    return float((host.read("/proc/uptime") or "0").split()[0])


# -- the stop ladder -------------------------------------------------------------


def stop(host: Host, name: str, ended: t.Callable[[float], bool]) -> str:
    """Power button, then shutdown, then the VMM's own end, each bounded; returns the rung that did it.

    A VMM that does not answer at all is left to systemd at once.

    :param ended: waits so many seconds for the VMM's end and says whether it came
    """
    spec = read_spec(host, name)
    if spec is None or ended(0):
        return "nothing to stop"
    for rung, seconds in (("power_button", STOP_SECONDS), ("shutdown", RUNG_SECONDS), ("quit", RUNG_SECONDS)):
        start = time.monotonic()
        try:
            with _vmm.driver(spec["driver"]).machine(host, spec) as machine:
                if rung == "power_button" and machine.state() == "paused":
                    machine.resume()  # a guest that stands still sees no button
                getattr(machine, rung)()
        except (OSError, HostError, ValueError) as error:
            sys.stderr.write(f"{rung}: {error}\n")
            if time.monotonic() - start > RUNG_SECONDS:
                break  # it answers nobody: on the next rung it would be waited for as long, and all have to fit
            seconds = 1
        if ended(seconds):
            return rung
    return "left to systemd"


def process_ended(pid: int) -> t.Callable[[float], bool]:
    """Waits for the end of a process that is not our child."""

    def ended(seconds: float) -> bool:
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return True
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)

    return ended


# -- after the start -------------------------------------------------------------


def settle(host: Host, name: str, seconds: float = 10) -> None:
    """Set what a VMM takes no option for: memory that the guest does not keep."""
    spec = read_spec(host, name)
    if spec is None or not spec["balloon_bytes"]:
        return
    change = _vmm.Change("balloon_bytes", "", 0, spec["balloon_bytes"])
    end = time.monotonic() + seconds
    while True:
        try:
            with _vmm.driver(spec["driver"]).machine(host, spec) as machine:
                machine.change(change, spec)
            return
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > end:
                raise HostError(f"the VMM does not answer within {seconds:g} seconds") from error
            time.sleep(0.05)


def main(arguments: t.Sequence[str], host: Host) -> int:
    """``wait LIMIT``, ``stop NAME``, ``settle NAME`` or ``resume NAME`` (of a microVM that starts from a snapshot)."""
    verb, argument = arguments
    try:
        if verb == "wait":
            wait(host, int(argument))
        elif verb == "stop":
            pid = int(os.environ.get("MAINPID") or 0)
            sys.stdout.write(stop(host, argument, process_ended(pid)) + "\n" if pid else "")
        elif verb == "resume":
            from ansible_collections.agentfleet.metal.plugins.module_utils import _snapshot

            _snapshot.resume(host, argument)
        else:
            settle(host, argument)
    except (HostError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
