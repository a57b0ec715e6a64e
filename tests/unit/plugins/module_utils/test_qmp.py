# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client of QEMU's machine protocol, against a socket that speaks it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _qmp, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp


@contextlib.contextmanager
def serving(path: str, serve: t.Callable[[socket.socket], None]) -> t.Iterator[None]:
    """A socket of which one connection is served."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen(1)
        thread = threading.Thread(target=lambda: serve(server.accept()[0]), daemon=True)
        thread.start()
        yield
    thread.join(10)


@pytest.fixture
def qemu(tmp_path: t.Any) -> t.Iterator[str]:
    """A socket that answers query-status after an event, device_add late, refuses what it does not know, and ends at quit."""

    def serve(connection: socket.socket) -> None:
        with (
            contextlib.suppress(ConnectionError),  # a client that was tired of waiting
            connection,
            connection.makefile("rw", encoding="utf-8") as file,
        ):
            rows: list[dict[str, t.Any]] = [{"QMP": {}}]
            while rows is not None:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                file.flush()
                line = file.readline()
                command = json.loads(line)["execute"] if line else "quit"
                if command == "crash":
                    file.write('{"return": {"sta')
                if command in ("quit", "crash"):
                    return
                if command == "device_add":
                    time.sleep(0.3)
                rows = {
                    "qmp_capabilities": [{"return": {}}],
                    "device_add": [{"return": {}}],
                    "query-status": [{"event": "RTC_CHANGE"}, {"return": {"status": "running"}}],
                }.get(command, [{"error": {"class": "CommandNotFound", "desc": f"no {command}"}}])

    path = str(tmp_path / "qmp")
    with serving(path, serve):
        yield path


def test_an_answer_is_found_behind_events(qemu: str) -> None:
    with Qmp(qemu) as qmp:
        assert qmp.ask("query-status") == {"status": "running"}


def test_a_refusal_says_what_qemu_said(qemu: str) -> None:
    with Qmp(qemu) as qmp, pytest.raises(HostError, match="QEMU refused dance: no dance"):
        qmp.ask("dance")


@pytest.mark.parametrize(
    ("told", "absent"),
    [
        ("Device 'net-a' not found", True),
        ("Chardev 'share-m' not found", True),
        ("object 'limits-data' not found", True),
        ("Failed to find node with node-name='disk-data'", True),
        ("Chardev 'share-m' is busy", False),
        ("Node disk-data is in use", False),
        ("Duplicate device ID 'disk-data'", False),
    ],
)
def test_what_is_not_there_is_told_from_what_is_refused(told: str, absent: bool) -> None:
    assert _qmp.Refusal("device_del", told).absent is absent


def test_a_device_may_take_longer_than_other_commands(qemu: str, monkeypatch: t.Any) -> None:
    assert _qmp.SLOW["device_add"] == 90
    with Qmp(qemu) as qmp:
        monkeypatch.setattr(qmp, "_timeout_seconds", 0.1)
        assert qmp.ask("device_add") == {}
        monkeypatch.setitem(_qmp.SLOW, "device_add", 0.1)
        with pytest.raises(HostError, match="QEMU did not answer device_add within 0.1 seconds"):
            qmp.ask("device_add")


@pytest.mark.parametrize(
    ("flood", "why"), [(b"x", "did not answer query-status within 0.3"), (b"x" * 65536, "more than 1048576")]
)
@pytest.mark.parametrize("ending", [b"", b'"}\n'])
def test_no_answer_holds_us_or_fills_our_memory(
    tmp_path: t.Any, monkeypatch: t.Any, flood: bytes, why: str, ending: bytes
) -> None:
    monkeypatch.setattr(_vmm.Connection, "ANSWER_BYTES", 1 << 20)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(b'{"QMP": {}}\n{"return": {}}\n')
            while True:  # no line has an end, or one event follows another
                connection.sendall(b'{"event": "' * bool(ending) + flood + ending)
                time.sleep(0.02 if len(flood) == 1 else 0)

    begin, path = time.monotonic(), str(tmp_path / "qmp")
    with serving(path, serve), Qmp(path, 30) as qmp:
        qmp._timeout_seconds = 0.3 if len(flood) == 1 else 30
        with pytest.raises(HostError, match=why):
            qmp.ask("query-status")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("command", ["quit", "crash"])
def test_an_end_is_told_from_an_answer(qemu: str, command: str) -> None:
    with Qmp(qemu) as qmp, pytest.raises(HostError, match=f"QEMU ended while {command} was asked"):
        qmp.ask(command)


def test_an_end_before_a_question_is_told_as_that(qemu: str) -> None:
    with Qmp(qemu) as qmp:
        qmp.last("quit")
        time.sleep(0.1)  # until it has closed its end
        with pytest.raises(HostError, match="QEMU ended (before|while) query-status was asked"):
            qmp.ask("query-status")
        with pytest.raises(HostError, match="QEMU ended before query-status was asked"):
            qmp.ask("query-status")


def test_a_missing_qemu_is_an_os_error(tmp_path: t.Any) -> None:
    with pytest.raises(FileNotFoundError):
        Qmp(str(tmp_path / "none"))
