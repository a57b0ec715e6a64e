# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client of QEMU's machine protocol, against a socket that speaks it."""

from __future__ import annotations

import json
import socket
import threading
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp


@pytest.fixture
def qemu(tmp_path: t.Any) -> t.Iterator[str]:
    """A socket that answers query-status after an event, refuses what it does not know, and ends at quit."""
    path = str(tmp_path / "qmp")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    server.listen(1)

    def serve() -> None:
        connection, _address = server.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as file:
            rows: list[dict[str, t.Any]] = [{"QMP": {}}]
            while rows is not None:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                file.flush()
                line = file.readline()
                command = json.loads(line)["execute"] if line else "quit"
                if command == "quit":
                    return
                rows = {
                    "qmp_capabilities": [{"return": {}}],
                    "query-status": [{"event": "RTC_CHANGE"}, {"return": {"status": "running"}}],
                }.get(command, [{"error": {"class": "CommandNotFound", "desc": f"no {command}"}}])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield path
    server.close()
    thread.join(5)


def test_an_answer_is_found_behind_events(qemu: str) -> None:
    with Qmp(qemu) as qmp:
        assert qmp.ask("query-status") == {"status": "running"}


def test_a_refusal_says_what_qemu_said(qemu: str) -> None:
    with Qmp(qemu) as qmp, pytest.raises(HostError, match="QEMU refused dance: no dance"):
        qmp.ask("dance")


def test_an_end_is_told_from_an_answer(qemu: str) -> None:
    with Qmp(qemu) as qmp, pytest.raises(HostError, match="QEMU ended while quit was asked"):
        qmp.ask("quit")


def test_a_missing_qemu_is_an_os_error(tmp_path: t.Any) -> None:
    with pytest.raises(FileNotFoundError):
        Qmp(str(tmp_path / "none"))
