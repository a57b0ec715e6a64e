# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The power supply of one lab host: runs its QEMU, and runs a new one when the guest reboots.

Started as a program by ``_lab.py`` in a session of its own: ``python3 supervisor.py DIRECTORY``.
It imports nothing but the standard library, since it is copied beside the host's disk.

- A guest's reset ends QEMU (``-action reboot=shutdown``) and starts a fresh one: emulated CXL
  devices do not survive a warm reset. Its power-off ends both.
- SIGTERM presses the power button and, after ``stop_timeout_seconds``, pulls the plug. SIGKILL
  is a power cut: QEMU dies with its parent.
- ``DIRECTORY/lock`` is open in this process and in QEMU, and locked: it is held exactly as long
  as one of them lives, so no file can name a process that is another's by now.
- If DIRECTORY is deleted, the host ends: nothing stays behind that no command could find.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import typing as t

CHECK_SECONDS = 5.0  # how often the directory is looked for
SHORTEST_RUN_SECONDS = 2.0  # a guest that resets faster than this, RESETS times in a row, never boots
RESETS = 5


class Supervisor:
    """One host: ``run()`` returns the reason when it is off."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.realpath(directory)
        with open(os.path.join(self.directory, "run.json"), encoding="utf-8") as file:
            wish = json.load(file)
        self.argv: list[str] = wish["argv"]
        self.stop_timeout_seconds: float = wish["stop_timeout_seconds"]
        self.lock = os.open(os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.deadline: float | None = None  # set by SIGTERM
        self.wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._waker = waker
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, _signal: int, _frame: t.Any) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.stop_timeout_seconds

    def run(self) -> str:
        """Start QEMU again and again until the guest is powered off or we are told to stop."""
        quick = 0
        while True:
            began = time.monotonic()
            reason = self._one_run()
            log(f"QEMU ended: {reason}")
            if reason != "guest-reset" or self.deadline is not None:
                return reason
            quick = quick + 1 if time.monotonic() - began < SHORTEST_RUN_SECONDS else 0
            if quick >= RESETS:
                return f"the guest reset {RESETS} times within {SHORTEST_RUN_SECONDS:g} s of its start"

    def _one_run(self) -> str:
        ours, theirs = socket.socketpair()
        monitor = ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        with ours, theirs:
            # setpriv asks the kernel to kill QEMU when this process dies, whatever kills it.
            qemu = subprocess.Popen(  # pylint: disable=ansible-bad-function
                ["setpriv", "--pdeathsig", "KILL", "--", *self.argv, *monitor],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(), self.lock),
            )
            theirs.close()
            reason = self._watch(qemu, ours)
        if reason == "":
            return f"exit code {qemu.wait()}"
        try:
            qemu.wait(10)
        except subprocess.TimeoutExpired:
            qemu.kill()
            qemu.wait()
        return reason

    def _watch(self, qemu: subprocess.Popen[bytes], monitor: socket.socket) -> str:
        """Follow QEMU's events until its monitor closes; the reason of its end, or "" if it gave none."""
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        buffer, reason, pressed = b"", "", 0.0
        while True:
            if self.deadline is not None:
                now = time.monotonic()
                if now >= self.deadline or not os.path.isdir(self.directory):
                    qemu.kill()
                    return "power cut after the power button had no effect"
                if now - pressed > CHECK_SECONDS:  # a system that is still booting misses the first press
                    pressed = now
                    monitor.sendall(b'{"execute": "system_powerdown"}\n')
            elif not self._owned():
                qemu.kill()
                return "its directory is gone"
            ready, _writable, _broken = select.select(
                [monitor, self.wake], [], [], 1.0 if self.deadline is not None else CHECK_SECONDS
            )
            if self.wake in ready:
                self.wake.recv(64)
            if monitor not in ready:
                continue
            try:
                received = monitor.recv(65536)
            except ConnectionResetError:
                received = b""
            if not received:
                return reason or ("" if self._owned() else "its directory is gone")
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if event.get("event") == "SHUTDOWN":
                    reason = event["data"]["reason"]

    def _owned(self) -> bool:
        """Whether the directory's lock file is still the one we hold."""
        try:
            return os.path.samestat(os.stat(os.path.join(self.directory, "lock")), os.fstat(self.lock))
        except OSError:
            return False


def log(text: str) -> None:
    """A line with the time; standard error is the host's supervisor.log."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def main(directory: str) -> int:
    """Supervise until the host is off."""
    try:
        supervisor = Supervisor(directory)
    except BlockingIOError:
        log("the host runs already")
        return 1
    log(f"power on: {' '.join(supervisor.argv[:1])}")
    reason = supervisor.run()
    log(f"power off: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
