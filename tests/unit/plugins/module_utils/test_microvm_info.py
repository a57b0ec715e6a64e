# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What microvm_info tells of microVMs that run, stand still, failed, and are not there."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_state, _qemu
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_info import MicrovmInfo
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

STATES = {  # ActiveState, Result, MainPID, NRestarts
    "a1": ("active", "success", 41, 2),
    "still": ("active", "success", 42, 0),
    "broken": ("failed", "start-limit-hit", 0, 5),
    "off": ("inactive", "success", 0, 0),
}


class Machine:
    """A running machine that stands still if its name says so."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Machine:
        if self.name == "ending":
            raise HostError("gone")
        if self.name == "hostile":
            raise TypeError("a list where QEMU has none")
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def state(self) -> str:
        return "paused" if self.name == "still" else "running"

    def counters(self) -> dict[str, dict[str, int]]:
        return {"disk-data": {"rd_bytes": 4096}}


def mapping(size: int, rss_kib: int, name: str = "") -> str:
    return (
        f"7f0000000000-{0x7F0000000000 + size:x} rw-p 00000000 00:00 0    {name}\nRss: {rss_kib} kB\nPss: {rss_kib} kB\n"
        f"Private_Clean: 0 kB\nPrivate_Dirty: {rss_kib} kB\nAnonymous: {0 if name else rss_kib} kB\n"
    )


@pytest.fixture
def host(fake_host: t.Any, microvm_spec: t.Any, monkeypatch: t.Any) -> t.Any:
    """A host with microVMs in all states; those that run were started with an older image."""
    older = {**microvm_spec, "image_path": "/var/lib/agentfleet/images/cd/rootfs.erofs", "image_digest": "cd"}
    for name, (active, *_more) in STATES.items():
        spec = {**microvm_spec, "name": name, "memory_max_bytes": 512 << 20}
        fake_host.files({f"/var/lib/agentfleet/microvms/{name}/spec.json": json.dumps(spec)})
        if active == "active":
            running = {**older, "name": name, "memory_max_bytes": 512 << 20}
            fake_host.files({f"/run/agentfleet/{name}.spec.json": json.dumps(running)})
    fake_host.answers["systemctl show"] = "\n\n".join(
        f"Id=agentfleet-microvm@{name}.service\nActiveState={active}\nResult={result}\nMainPID={pid}\nNRestarts={restarts}"
        for name, (active, result, pid, restarts) in STATES.items()
    )
    fake_host.answers["journalctl"] = "Linux version 6.12\n"
    fake_host.files(
        {
            "/proc/41/smaps": mapping(256 << 20, 9000)  # RAM it was booted with
            + mapping((512 - 256) << 20, 500)  # RAM that can be plugged
            + mapping(82 << 20, 1000, older["image_path"])
            + mapping(1 << 20, 64)
        }
    )
    fake_host.asked = []

    def answer(_host: t.Any, spec: t.Any, *_more: t.Any) -> dict[str, str]:
        fake_host.asked.append(spec["name"])
        return {"hostname": spec["name"]}

    monkeypatch.setattr(_microvm_state, "ask_agent", answer)
    monkeypatch.setattr(_qemu, "machine", lambda _host, spec: Machine(spec["name"]))
    return fake_host


def look(host: t.Any, names: list[str] | None = None, console: bool = False) -> dict[str, dict[str, t.Any]]:
    resource = MicrovmInfo(host, names, 5, console)
    observed = resource.observe()
    assert resource.plan(observed) == []
    return {one["name"]: one for one in resource.result(observed)["instances"]}


def test_each_state_is_told_with_its_reason(host: t.Any) -> None:
    seen = look(host)
    assert {name: (one["state"], one["failure"], one["restarts"], one["ready"]) for name, one in seen.items()} == {
        "a1": ("running", "", 2, True),
        "broken": ("failed", "start-limit-hit", 5, False),
        "off": ("stopped", "", 0, False),
        "still": ("paused", "", 0, False),
    }
    assert host.asked == ["a1"]  # nobody waits for one that stands still
    assert (seen["a1"]["agent"], seen["a1"]["counters"]) == ({"hostname": "a1"}, {"disk-data": {"rd_bytes": 4096}})
    assert all("console" not in one for one in seen.values())


def test_memory_is_split_by_what_it_was_started_with(host: t.Any) -> None:
    seen = look(host)
    assert (seen["a1"]["image_digest"], seen["off"]["image_digest"]) == ("cd", "ab" * 32)
    kib = {key: seen["a1"][f"{key}_bytes"] >> 10 for key in ("shared", "guest_ram", "overhead", "private", "rss")}
    assert kib == {"shared": 1000, "guest_ram": 9500, "overhead": 64, "private": 9564, "rss": 10564}
    assert (seen["off"]["pid"], seen["off"]["rss_bytes"]) == (0, 0)


def test_one_that_is_not_there_is_absent_and_the_order_is_that_of_the_question(host: t.Any) -> None:
    seen = look(host, ["nobody", "off"])
    assert list(seen) == ["nobody", "off"] and seen["nobody"]["state"] == "absent" and seen["nobody"]["cid"] is None


def test_the_console_is_told_on_request(host: t.Any) -> None:
    assert look(host, ["a1", "off"], console=True)["a1"]["console"] == "Linux version 6.12\n"
    assert host.calls[-1].startswith("journalctl --unit=agentfleet-microvm@a1.service")


@pytest.mark.parametrize("name", ["ending", "hostile"])
def test_one_that_ends_meanwhile_or_tells_nonsense_has_no_counters(host: t.Any, monkeypatch: t.Any, name: str) -> None:
    monkeypatch.setattr(_qemu, "machine", lambda _host, _spec: Machine(name))
    assert look(host, ["a1"])["a1"]["counters"] == {}


@pytest.mark.parametrize("answer", [b"[" * 200_000, b"{" + bytes(2 << 20), b"no JSON", b'["no object"]'])
def test_an_agent_that_answers_nonsense_is_one_that_does_not_answer(
    fake_host: t.Any, microvm_spec: t.Any, monkeypatch: t.Any, answer: bytes
) -> None:
    ours, its = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError):
            its.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer)
        its.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    monkeypatch.setattr(_qemu, "connect", lambda *_arguments: ours)
    assert _microvm_state.ask_agent(fake_host, microvm_spec) is None
    thread.join(10)
    its.close()


def test_the_console_is_in_the_journal(fake_host: t.Any) -> None:
    fake_host.answers["journalctl --unit=agentfleet-microvm@a1.service --lines=60"] = "Kernel panic\n"
    assert _microvm_state.console(fake_host, "a1") == "Kernel panic\n"
    assert _microvm_state.console(type(fake_host)(fake_host.root), "a1").startswith("(no console: ")
