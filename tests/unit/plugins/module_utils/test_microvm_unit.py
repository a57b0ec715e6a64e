# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What units of microVMs run: turns to boot, the stop ladder, and what is left afterwards (nothing)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import types
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_unit, _microvm_units, _qemu
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import slot
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


@pytest.fixture
def host(fake_host: t.Any, microvm_spec: t.Any) -> t.Any:
    """A host on which a1 has been started."""
    text = json.dumps(microvm_spec)
    fake_host.files(
        {"/run/agentfleet/a1.spec.json": text, "/proc/uptime": "1000.5 900.0", "/run/agentfleet/slots": None}
    )
    return fake_host


# -- turns ---------------------------------------------------------------------------


def test_a_slot_is_free_when_the_agent_answers(host: t.Any, monkeypatch: t.Any) -> None:
    host.files({slot("a1"): "990\n", slot("a2"): "990\n"})
    host.files({"/run/agentfleet/a2.spec.json": host.read("/run/agentfleet/a1.spec.json").replace("a1", "a2")})

    def connect(_host: t.Any, spec: t.Any, port: int, _timeout_seconds: float) -> socket.socket:
        if spec["name"] == "a1":
            return socket.socket()
        raise ConnectionRefusedError(port)

    monkeypatch.setattr(_qemu, "connect", connect)
    _microvm_unit.wait(host, 2)
    assert host.names("/run/agentfleet/slots") == ["a2"]


def test_a_boot_keeps_others_waiting_only_so_long(host: t.Any, monkeypatch: t.Any) -> None:
    def refused(*_arguments: t.Any) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(_qemu, "connect", refused)
    host.files({slot("a1"): "990\n", slot("gone"): "990\n"})
    clock = iter([1000, 1000, 1111, 1111])
    monkeypatch.setattr(_microvm_unit, "uptime", lambda _host: next(clock))
    _microvm_unit.wait(host, 1, seconds=0)
    assert host.names("/run/agentfleet/slots") == []


# -- after the start -----------------------------------------------------------------


def test_a_balloon_is_set_as_soon_as_the_vmm_answers(host: t.Any, monkeypatch: t.Any) -> None:
    asked: list[str] = []

    class Settled(Machine):
        def change(self, change: t.Any, _spec: t.Any) -> None:
            self.asked.append(str(change))

    def machine(_host: t.Any, _spec: t.Any) -> Machine:
        asked.append("connect")
        if len(asked) == 1:
            raise FileNotFoundError("its socket")
        return Settled(asked, (), "running")

    monkeypatch.setattr(_qemu, "machine", machine)
    assert _microvm_unit.main(["settle", "a1"], host) == 0 and asked == []  # it has none
    host.files(
        {"/run/agentfleet/a1.spec.json": json.dumps({**_microvm_unit.read_spec(host, "a1"), "balloon_bytes": 64})}
    )
    assert _microvm_unit.main(["settle", "a1"], host) == 0
    assert asked == ["connect", "connect", "balloon_bytes 0 -> 64"]


def test_a_vmm_that_never_answers_fails_the_start(host: t.Any, monkeypatch: t.Any) -> None:
    def machine(_host: t.Any, _spec: t.Any) -> Machine:
        raise ConnectionRefusedError

    spec = {**_microvm_unit.read_spec(host, "a1"), "balloon_bytes": 64}  # type: ignore[dict-item]
    host.files({"/run/agentfleet/a1.spec.json": json.dumps(spec)})
    monkeypatch.setattr(_qemu, "machine", machine)
    with pytest.raises(HostError, match="does not answer within 0 seconds"):
        _microvm_unit.settle(host, "a1", seconds=0)


# -- the ladder ----------------------------------------------------------------------


class Machine:
    def __init__(self, asked: list[str], broken: t.Sequence[str], state: str) -> None:
        self.asked, self.broken, self._state = asked, broken, state

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def state(self) -> str:
        return self._state

    def __getattr__(self, verb: str) -> t.Callable[[], None]:
        def ask() -> None:
            self.asked.append(verb)
            if verb in self.broken:
                raise OSError(verb)

        return ask


@pytest.mark.parametrize(
    ("ends_at", "state", "asked"),
    [
        ("power_button", "running", ["power_button"]),
        ("power_button", "paused", ["resume", "power_button"]),
        ("shutdown", "running", ["power_button", "shutdown"]),
        ("quit", "running", ["power_button", "shutdown", "quit"]),
        ("left to systemd", "running", ["power_button", "shutdown", "quit"]),
    ],
)
def test_each_rung_comes_after_the_one_before_had_its_time(
    ends_at: str, state: str, asked: list[str], host: t.Any, monkeypatch: t.Any
) -> None:
    done: list[str] = []
    waited: list[float] = []
    monkeypatch.setattr(_qemu, "machine", lambda *_more: Machine(done, [], state))

    def ended(seconds: float) -> bool:
        waited.append(seconds)
        return bool(done) and done[-1] == ends_at

    assert _microvm_unit.stop(host, "a1", ended) == ends_at
    assert done == asked
    assert waited == [0, 60, 5, 5][: 1 + len([verb for verb in asked if verb != "resume"])]


def test_a_rung_that_breaks_does_not_keep_the_next_waiting(host: t.Any, monkeypatch: t.Any, capsys: t.Any) -> None:
    done: list[str] = []
    waited: list[float] = []
    monkeypatch.setattr(_qemu, "machine", lambda *_more: Machine(done, ["power_button"], "running"))
    assert _microvm_unit.stop(host, "a1", lambda seconds: bool(waited.append(seconds))) == "left to systemd"
    assert waited == [0, 1, 5, 5]
    assert "power_button: power_button" in capsys.readouterr().err


def test_a_vmm_that_does_not_answer_is_asked_once(host: t.Any, monkeypatch: t.Any) -> None:
    """All rungs together would otherwise take longer than the unit has: 30 seconds of silence on each, and more."""
    done: list[str] = []
    clock = iter((100.0, 130.0))
    monkeypatch.setattr(_microvm_unit, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(_qemu, "machine", lambda *_more: Machine(done, ["power_button"], "running"))
    assert _microvm_unit.stop(host, "a1", lambda seconds: False) == "left to systemd"
    assert done == ["power_button"]


def test_the_end_of_a_process_is_waited_for() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        ended = _microvm_unit.process_ended(process.pid)
        assert not ended(0)
        process.kill()
        assert ended(10)
    assert _microvm_unit.process_ended(process.pid)(0)


# -- the scripts -----------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: t.Any) -> t.Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one of the scripts with its paths below a temporary directory; other scripts write down their arguments."""

    def run(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for path in ("/run/agentfleet", "/var/lib/agentfleet", "/usr/local/lib/agentfleet"):
            (tmp_path / path[1:]).mkdir(parents=True, exist_ok=True)
            text = text.replace(path, str(tmp_path / path[1:]))
        for name in ("microvm-taps", "microvm-unit"):
            program = tmp_path / "usr/local/lib/agentfleet" / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/called\n')
            program.chmod(0o755)
        (tmp_path / "usr/local/lib/agentfleet/microvm-parallel").write_text("2\n")
        argv = ["sh", "-c", f"umask 077\n{text}", "script", *arguments]
        environment = {**os.environ, **environment}
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)

    return run


def define(tmp_path: t.Any, name: str) -> None:
    home = tmp_path / "var/lib/agentfleet/microvms" / name
    home.mkdir(parents=True)
    (home / "spec.json").write_text("{}")
    (home / "taps").write_text("af1 br0\n")
    (tmp_path / "run/agentfleet" / name).mkdir(parents=True)
    volumes = tmp_path / "var/lib/agentfleet/volumes" / name
    volumes.mkdir(parents=True)
    (volumes / "data").write_text("")


def test_a_start_takes_a_turn_and_an_end_leaves_nothing(tmp_path: t.Any, script: t.Any) -> None:
    for name in ("a1", "a2", "a3"):
        define(tmp_path, name)
        done = script(_microvm_units.START, name)
        assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "run/agentfleet"
    called = (tmp_path / "called").read_text().splitlines()
    # Two boot at the same time; the third waits first.
    home = tmp_path / "var/lib/agentfleet/microvms"
    taps = [f"microvm-taps up {name} {home}/{name}/taps" for name in ("a1", "a2", "a3")]
    assert called == [*taps[:2], "microvm-unit wait 2", taps[2]]
    assert sorted(os.listdir(run / "slots")) == ["a1", "a2", "a3"]
    assert (run / "slots/a1").read_text().strip().isdigit()
    assert os.stat(run / "a1.spec.json").st_mode & 0o777 == 0o600
    for name in ("a1", "a2", "a3"):
        (run / f"{name}.taps").write_text("")
        assert script(_microvm_units.END, name).returncode == 0
        (run / name).rmdir()  # systemd's
        (run / f"{name}.taps").unlink()
    assert sorted(os.listdir(run)) == ["slots", "slots.lock"]
    assert os.listdir(run / "slots") == []
    assert os.listdir(tmp_path / "var/lib/agentfleet/volumes/a1") == ["data"]


def test_the_first_start_lets_vmms_reach_their_volumes_and_nobody_else(tmp_path: t.Any, script: t.Any) -> None:
    define(tmp_path, "a1")
    shutil.rmtree(tmp_path / "var/lib/agentfleet/volumes")
    assert script(_microvm_units.START, "a1").returncode == 0
    volumes = tmp_path / "var/lib/agentfleet/volumes"
    assert [os.stat(path).st_mode & 0o777 for path in (volumes, volumes / "a1")] == [0o755, 0o700]


@pytest.mark.parametrize("definition", ["0ld", "g0ne"])
def test_a_start_takes_the_definition_that_its_drop_in_names(tmp_path: t.Any, script: t.Any, definition: str) -> None:
    define(tmp_path, "a1")  # of an older version
    home = tmp_path / "var/lib/agentfleet/microvms/a1"
    for one in ("0ld", "new") if definition == "0ld" else ("new",):  # or declared anew while it waited for its turn
        (home / f"spec-{one}.json").write_text(one)
        (home / f"taps-{one}").write_text(one)
        (home / f"taps-{one}.nft").write_text(one)
    assert script(_microvm_units.START, "a1", DEFINITION=definition).stderr == ""
    taken = "new" if definition == "g0ne" else "0ld"
    assert (tmp_path / "run/agentfleet/a1.spec.json").read_text() == taken
    assert (tmp_path / "called").read_text() == f"microvm-taps up a1 {home}/taps-{taken}\n"


def test_an_end_without_a_start_is_no_error(tmp_path: t.Any, script: t.Any) -> None:
    assert script(_microvm_units.END, "a1").returncode == 0
    assert not (tmp_path / "called").exists()
