# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor as a real process, with a script that speaks QMP in QEMU's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _lab_supervisor
from ansible_collections.agentfleet.metal.plugins.module_utils._lab import holders

# Appends one line to "starts" for each start, and does what the file "script" says for it: reset, off, hang, crash, or
# obey (ends on the power button). It finds its monitor as QEMU does, by the number of a file descriptor it inherits.
FAKE_QEMU = r"""
import json, os, re, socket, sys, time
place = sys.argv[1]
fd = int(re.search(r"id=qmp,fd=(\d+)", " ".join(sys.argv)).group(1))
monitor = socket.socket(fileno=fd)
with open(place + "/starts", "a") as file:
    file.write(f"{os.getpid()}\n")
number = len(open(place + "/starts").readlines()) - 1
what = open(place + "/script").read().split()[number]
def shutdown(reason):
    monitor.sendall(json.dumps({"event": "SHUTDOWN", "data": {"guest": True, "reason": reason}}).encode() + b"\n")
    sys.exit(0)
assert "qmp_capabilities" in monitor.recv(4096).decode()
monitor.sendall(b'{"return": {}}\n')
time.sleep(0.1)
if what == "reset":
    shutdown("guest-reset")
if what == "off":
    shutdown("guest-shutdown")
if what == "crash":
    sys.exit("could not open the disk")
while True:
    data = monitor.recv(4096).decode()
    if not data:
        sys.exit(0)
    if "system_powerdown" in data and what == "obey":
        shutdown("guest-shutdown")
"""


class Run:
    """A supervisor with its fake QEMU in a directory."""

    def __init__(self, place: t.Any, script: str, stop_timeout_seconds: float = 5) -> None:
        self.place = str(place)
        self.lock = os.path.join(self.place, "lock")
        with open(f"{self.place}/qemu.py", "w", encoding="utf-8") as file:
            file.write(FAKE_QEMU)
        with open(f"{self.place}/script", "w", encoding="utf-8") as file:
            file.write(script)
        with open(f"{self.place}/run.json", "w", encoding="utf-8") as file:
            argv = [sys.executable, f"{self.place}/qemu.py", self.place]
            json.dump({"argv": argv, "stop_timeout_seconds": stop_timeout_seconds}, file)
        self.process = self.again()

    def again(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-I", _lab_supervisor.__file__, self.place],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def starts(self) -> list[int]:
        try:
            with open(f"{self.place}/starts", encoding="utf-8") as file:
                return [int(line) for line in file]
        except OSError:
            return []

    def until_started(self, count: int) -> None:
        wait(lambda: len(self.starts()) >= count)

    def end(self) -> str:
        return self.process.communicate(timeout=30)[1]


def wait(predicate: t.Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not predicate():
        assert time.monotonic() < end, "not within 30 seconds"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: t.Any) -> t.Iterator[t.Callable[..., Run]]:
    runs: list[Run] = []

    def make(*args: t.Any, **kwargs: t.Any) -> Run:
        runs.append(Run(tmp_path, *args, **kwargs))
        return runs[-1]

    yield make
    for run in runs:
        for pid in holders(run.lock):
            os.kill(pid, signal.SIGKILL)
        run.process.kill()
        run.process.communicate()


def test_a_reset_is_a_fresh_start_and_a_power_off_the_end(start: t.Callable[..., Run]) -> None:
    run = start("reset reset off")
    log = run.end()
    assert run.process.returncode == 0 and len(run.starts()) == 3
    assert log.count("QEMU ended: guest-reset") == 2 and "power off: guest-shutdown" in log
    assert holders(run.lock) == {}


def test_the_power_button(start: t.Callable[..., Run]) -> None:
    run = start("obey")
    run.until_started(1)
    run.process.send_signal(signal.SIGTERM)
    assert "power off: guest-shutdown" in run.end()


def test_the_plug_is_pulled_when_the_button_has_no_effect(start: t.Callable[..., Run]) -> None:
    run = start("hang", stop_timeout_seconds=1)
    run.until_started(1)
    run.process.send_signal(signal.SIGTERM)
    assert "power cut after the power button had no effect" in run.end()
    assert holders(run.lock) == {}


def test_qemu_dies_with_its_killed_supervisor(start: t.Callable[..., Run]) -> None:
    run = start("hang")
    run.until_started(1)
    assert set(holders(run.lock)) == {run.process.pid, run.starts()[0]}
    run.process.kill()
    wait(lambda: holders(run.lock) == {})


def test_a_killed_qemu_is_not_started_again(start: t.Callable[..., Run]) -> None:
    run = start("hang off")
    run.until_started(1)
    os.kill(run.starts()[0], signal.SIGKILL)
    assert "power off: exit code -9" in run.end()
    assert len(run.starts()) == 1


def test_a_qemu_that_does_not_start_says_why(start: t.Callable[..., Run]) -> None:
    log = start("crash").end()
    assert "could not open the disk" in log and "power off: exit code 1" in log


def test_a_second_supervisor_does_nothing(start: t.Callable[..., Run]) -> None:
    run = start("hang")
    run.until_started(1)
    second = run.again()
    assert "the host runs already" in second.communicate(timeout=30)[1] and second.returncode == 1
    assert len(run.starts()) == 1


def test_a_host_whose_directory_is_deleted_ends(start: t.Callable[..., Run]) -> None:
    run = start("hang")
    run.until_started(1)
    shutil.rmtree(run.place)
    assert "its directory is gone" in run.end()
    assert holders(run.lock) == {}


def test_a_guest_that_never_boots_is_given_up(start: t.Callable[..., Run]) -> None:
    run = start("reset " * 20)
    assert "the guest reset 5 times" in run.end()
    assert len(run.starts()) == 5
