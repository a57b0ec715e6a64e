# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of QEMU's machine protocol, no more than needed.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Connection

SLOW = {"device_add": 90}  # seconds; vfio-pci maps and pins all memory of the guest before QEMU answers


class Refusal(HostError):
    """What QEMU refused, in its own words."""

    def __init__(self, command: str, told: str) -> None:
        super().__init__(f"QEMU refused {command}: {told}")
        # Its error class is the same for nearly all, so that the words have to tell.
        self.absent = bool(re.search(r"not found$|^Failed to find node ", told))


class Qmp:
    """A connection to one QEMU; a context manager.

    :param path: real path of the UNIX socket
    :param timeout_seconds: for each command, but for those of ``SLOW``
    """

    def __init__(self, path: str, timeout_seconds: float = 10) -> None:
        self._timeout_seconds = timeout_seconds
        self._socket = Connection()
        self._socket.begin(timeout_seconds)
        try:
            self._socket.connect(path)
            self._file = self._socket.makefile("rw", encoding="utf-8")
            self._line("with its greeting")
            self.ask("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def ask(self, command: str, **arguments: t.Any) -> t.Any:
        """Send a command and return its answer; events in between are dropped."""
        self._socket.begin(SLOW.get(command, self._timeout_seconds))
        try:
            self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._file.flush()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HostError(f"QEMU ended before {command} was asked") from error
        while line := self._line(command):
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HostError(f"QEMU answered {command} with no JSON: {line[:200]}") from error
            if "error" in answer:
                raise Refusal(command, str(answer["error"].get("desc")))
            if "return" in answer:
                return answer["return"]
        raise HostError(f"QEMU ended while {command} was asked")

    def _line(self, command: str) -> str:
        """What QEMU says next, or nothing if it ended, which may be within a line."""
        try:
            line = self._file.readline()
        except socket.timeout as error:
            seconds = SLOW.get(command, self._timeout_seconds)
            raise HostError(f"QEMU did not answer {command} within {seconds:g} seconds. Run this again") from error
        except ConnectionResetError:
            return ""
        return line if line.endswith("\n") else ""

    def last(self, command: str) -> None:
        """Send a command that ends QEMU; no answer is an answer."""
        with contextlib.suppress(OSError, ValueError, HostError):
            self.ask(command)

    def wait_migration(self, timeout_seconds: float = 600) -> None:
        """Wait until the state has been written, or read."""
        end = time.monotonic() + timeout_seconds
        while (told := self.ask("query-migrate")).get("status") != "completed":
            if told.get("status") in ("failed", "cancelled"):
                raise HostError(f"QEMU could not write or read its state: {told.get('error-desc', told['status'])}")
            if time.monotonic() > end:
                raise HostError(f"QEMU did not write its state within {timeout_seconds:g} seconds")
            time.sleep(0.05)

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_exception: object) -> None:
        with contextlib.suppress(OSError):  # what a QEMU that ended has not read
            self._file.close()
        self._socket.close()
