# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands in a microVM: the guest's server, the host's program and the connection plugin, together.

The server runs in this process behind a socket like Cloud Hypervisor's; the host is this machine.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible import constants
from ansible.errors import AnsibleConnectionFailure, AnsibleError, AnsibleFileNotFound
from ansible.playbook.play_context import PlayContext
from ansible.plugins.doc_fragments.connection_pipelining import ModuleDocFragment

from ansible_collections.agentfleet.metal.plugins.connection import vsock
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_exec

ME = pwd.getpwuid(os.getuid()).pw_name
SERVER = Path(__file__).parents[4] / "roles/rootfs/files/exec_server.py"
EVERY_BYTE = bytes(range(256)) * 5000


def load_server() -> t.Any:
    spec = importlib.util.spec_from_file_location("exec_server", SERVER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MicroVm:
    """A microVM called agent1 and the program that reaches it."""

    def __init__(self, directory: Path) -> None:
        self.server, self.answering = load_server(), True
        home, run = directory / "microvms/agent1", directory / "run/agent1"
        home.mkdir(parents=True)
        run.mkdir(parents=True)
        (home / "spec.json").write_text('{"cid": 4}')
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(run / "vsock"))
        self.listener.listen()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()
        text = inspect.getsource(_microvm_exec)
        for name, path in (("HOME", home.parent), ("RUN", run.parent)):
            text = text.replace(f'{name} = "{getattr(_microvm_exec, name)}"', f'{name} = "{path}"')
        self.program = directory / "microvm-exec"
        self.program.write_text(f"#!{sys.executable} -IS\n{text}")
        self.program.chmod(0o755)

    def accept(self) -> None:
        while True:
            try:
                connection, _peer = self.listener.accept()
            except OSError:
                return
            with connection.makefile("rb", buffering=0) as lines:
                assert lines.readline() == b"CONNECT 1023\n"
            if not self.answering:
                connection.close()
                continue
            connection.sendall(b"OK 1073741824\n")
            self.connections.append(connection)
            self.server.SESSIONS.acquire()
            threading.Thread(target=self.server.guarded, args=(connection,), daemon=True).start()

    def run(self, command: str, data: bytes = b"", timeout: float = 1) -> subprocess.CompletedProcess[bytes]:
        argv = [str(self.program), "--user", ME, "--timeout", str(timeout), "agent1", command]
        return subprocess.run(argv, input=data, capture_output=True, timeout=60, check=False)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        argv = [str(self.program), "--user", ME, "agent1", command]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def microvm(tmp_path_factory: t.Any) -> t.Iterator[MicroVm]:
    found = MicroVm(tmp_path_factory.mktemp("vm"))
    yield found
    found.listener.close()


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _second in range(100):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                if file.read().split(")")[1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("code", [0, 1, 126, 253])
def test_the_exit_code_is_the_commands(microvm: MicroVm, code: int) -> None:
    done = microvm.run(f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out\n", b"err\n")


def test_255_is_told_from_not_reached(microvm: MicroVm) -> None:
    assert microvm.run("exit 254").stderr == b""
    done = microvm.run("exit 255")
    assert (done.returncode, done.stderr) == (254, _microvm_exec.REAL_255)


def test_a_signal_is_an_exit_code_as_the_shell_has_it(microvm: MicroVm) -> None:
    assert microvm.run("kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_every_byte_goes_through_both_ways(microvm: MicroVm) -> None:
    assert microvm.run("cat", EVERY_BYTE).stdout == EVERY_BYTE
    assert microvm.run("cat >&2", EVERY_BYTE).stderr == EVERY_BYTE


def test_input_that_nobody_reads_is_no_error(microvm: MicroVm) -> None:
    assert microvm.run("exit 3", EVERY_BYTE).returncode == 3


def test_what_a_command_leaves_in_the_background_does_not_hold_it(microvm: MicroVm) -> None:
    begin = time.monotonic()
    done = microvm.run("sleep 30 & echo $!")
    assert done.returncode == 0 and time.monotonic() - begin < 10
    os.kill(int(done.stdout), signal.SIGKILL)


def test_the_environment_is_an_ordinary_users(microvm: MicroVm) -> None:
    told = microvm.run("echo $HOME; pwd; echo $PATH; echo $USER").stdout.decode().splitlines()
    assert told == [pwd.getpwnam(ME).pw_dir] * 2 + [microvm.server.PATH, ME]


def test_an_unknown_user_is_said(microvm: MicroVm) -> None:
    argv = [str(microvm.program), "--user", "nobody-has-this-name", "agent1", "true"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert done.returncode == 126 and b"nobody-has-this-name" in done.stderr


@pytest.mark.parametrize("command", ["echo $$; exec sleep 1000", "trap '' TERM; echo $$; while :; do sleep 1; done"])
def test_a_command_ends_when_the_host_hangs_up(microvm: MicroVm, command: str) -> None:
    microvm.server.SECONDS_TO_END = 0.5
    running = microvm.start(command)
    assert running.stdout and running.stderr
    pid = int(running.stdout.readline())
    running.stdout.close()  # as when ssh is ended: nobody reads any more
    assert running.wait(20) == _microvm_exec.NOT_REACHED
    running.stderr.close()
    assert gone(pid)


def test_a_microvm_that_goes_away_is_said(microvm: MicroVm) -> None:
    running = microvm.start("echo $$; exec sleep 1000")
    assert running.stdout and running.stderr
    pid = int(running.stdout.readline())
    microvm.connections[0].shutdown(socket.SHUT_RDWR)
    assert running.wait(20) == _microvm_exec.NOT_REACHED
    assert b"went away before the command had ended" in running.stderr.read()
    assert gone(pid)
    running.stdout.close()
    running.stderr.close()


def test_so_is_one_whose_machine_was_reset() -> None:
    ours, its = socket.socketpair()
    ours.send(b"what nobody reads")
    its.close()  # with which the host's kernel resets the connection
    with pytest.raises(ConnectionResetError, match="went away before the command had ended"):
        _microvm_exec.receive(ours)
    ours.close()


@pytest.mark.parametrize(
    ("header", "problem"),
    [((_microvm_exec.STDOUT, 0xFFFFFFFF), "frame 2 of 4294967295 bytes"), ((77, 1), "frame 77 of 1 bytes")],
)
def test_and_one_that_sends_what_no_server_does(header: tuple[int, int], problem: str) -> None:
    ours, its = socket.socketpair()
    its.send(_microvm_exec.HEADER.pack(*header))
    its.close()
    with pytest.raises(ConnectionError, match=problem):
        _microvm_exec.receive(ours)
    ours.close()


def drip(connection: socket.socket, part: bytes) -> threading.Thread:
    """A guest that answers without end."""

    def send() -> None:
        try:
            for _time in range(500):
                connection.sendall(part)
                time.sleep(0.01)
        except OSError:
            pass

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("line", [False, True])
def test_a_guest_that_answers_byte_by_byte_holds_nobody(line: bool) -> None:
    ours, its = socket.socketpair()
    thread = drip(its, b"x")
    begin = time.monotonic()
    with pytest.raises(socket.timeout, match="no whole answer within 0.3 s|timed out"):
        _microvm_exec.exchange(ours, b"question", 0.3, line=line)
    assert time.monotonic() - begin < 3
    ours.close()
    thread.join(10)
    its.close()


def test_nor_does_one_fill_the_hosts_memory() -> None:
    ours, its = socket.socketpair()
    thread = drip(its, bytes(1 << 18))
    with pytest.raises(ConnectionError, match="more than 1048576 bytes"):
        _microvm_exec.exchange(ours, b"question", 30)
    ours.close()
    thread.join(10)
    its.close()


def test_of_a_line_no_byte_more_is_taken() -> None:
    ours, its = socket.socketpair()
    its.sendall(b"OK 7\nrest")
    assert _microvm_exec.exchange(ours, b"question", 5, line=True) == b"OK 7\n"
    assert (its.recv(64), ours.recv(64), ours.gettimeout()) == (b"question", b"rest", 5)
    ours.close()
    its.close()


def test_it_waits_for_a_microvm_that_boots(microvm: MicroVm) -> None:
    microvm.answering = False
    done = microvm.run("true", timeout=0.5)
    assert done.returncode == _microvm_exec.NOT_REACHED and b"no answer on vsock port 1023 within 0.5 s" in done.stderr
    threading.Timer(0.5, setattr, (microvm, "answering", True)).start()
    assert microvm.run("true", timeout=10).returncode == 0


def test_one_that_runs_is_reached_by_the_cid_that_it_runs_with(tmp_path: Path, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_exec, "HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_microvm_exec, "RUN", str(tmp_path))
    for name, cid in (("a", 4), ("b", 3)):  # swapped, and not restarted yet
        (tmp_path / "home" / name).mkdir(parents=True)
        (tmp_path / "home" / name / "spec.json").write_text(json.dumps({"cid": cid}))
    (tmp_path / "a.spec.json").write_text('{"cid": 3}')
    monkeypatch.setattr(_microvm_exec, "_vsock", lambda cid: cid)
    assert _microvm_exec.connect("a", 1) == 3
    with pytest.raises(_microvm_exec.Unreachable, match="no answer on vsock port 1023 within 0.3 s"):
        _microvm_exec.connect("b", 0.3)  # it does not run, and a has the cid that it is declared with
    (tmp_path / "a.spec.json").write_text("{")
    with pytest.raises(_microvm_exec.Unreachable, match=r"within 0.3 s \(.*a.spec.json cannot be read"):
        _microvm_exec.connect("a", 0.3)
    threading.Timer(0.3, (tmp_path / "a.spec.json").write_text, ['{"cid": 5}']).start()  # it starts anew
    assert _microvm_exec.connect("a", 10) == 5


def test_what_is_not_there_is_said(microvm: MicroVm) -> None:
    done = subprocess.run([str(microvm.program), "agent9", "true"], capture_output=True, timeout=60, check=False)
    assert done.returncode == _microvm_exec.NOT_REACHED and b"no microVM of this name" in done.stderr


def test_only_the_hosts_root_is_trusted(microvm: MicroVm, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(microvm.server, "hypervisor", lambda: "QEMU")
    assert microvm.server.trusted((2, 1023))
    assert not microvm.server.trusted((2, 1024))  # another user of the host
    assert not microvm.server.trusted((1, 1000)) and not microvm.server.trusted((3, 1000))  # the guest, another guest
    monkeypatch.setattr(microvm.server, "hypervisor", lambda: "Cloud Hypervisor")
    assert microvm.server.trusted((2, 1 << 30))  # its socket has an owner
    assert not microvm.server.trusted((1, 1 << 30))


def test_the_source_port_is_one_of_roots_that_is_free() -> None:
    asked: list[int] = []

    class Taken:
        def bind(self, address: tuple[int, int]) -> None:
            asked.append(address[1])
            if len(asked) < 3:
                raise OSError(errno.EADDRINUSE, "taken")

    _microvm_exec.bind_reserved(t.cast(socket.socket, Taken()))
    assert len(set(asked)) == 3 and all(0 < port < 1024 for port in asked)

    class Forbidden:
        def bind(self, address: tuple[int, int]) -> None:
            raise PermissionError(errno.EACCES, "not root")

    with pytest.raises(PermissionError):
        _microvm_exec.bind_reserved(t.cast(socket.socket, Forbidden()))


# -- the plugin ---------------------------------------------------------------------


@pytest.fixture
def connection(microvm: MicroVm, monkeypatch: t.Any) -> t.Any:
    # What the plugin loader does, for a module that is imported.
    options = {
        name: option
        for text in (vsock.DOCUMENTATION, ModuleDocFragment.DOCUMENTATION)
        for name, option in yaml.safe_load(text)["options"].items()
    }
    constants.config.initialize_plugin_configuration_definitions("connection", "agentfleet.metal.vsock", options)
    found = vsock.Connection(PlayContext(), task_uuid="0", ansible_playbook_pid="0")
    found._load_name = "agentfleet.metal.vsock"
    monkeypatch.setattr(vsock, "PROGRAM", str(microvm.program))
    found.set_options(
        var_options={
            "inventory_hostname": "agent1@metal1", "agentfleet_name": "agent1", "agentfleet_host": "metal1",
            "agentfleet_host_variables": {"ansible_connection": "local"}, "ansible_vsock_user": ME,
            "ansible_vsock_timeout": 1,
        }
    )  # fmt: skip
    return found


@pytest.mark.parametrize("code", [0, 7, 254, 255])
def test_the_plugin_returns_what_the_command_did(connection: t.Any, code: int) -> None:
    done = connection.exec_command(f"cat; echo 'it''s' \"$HOME\" >&2; exit {code}", in_data=EVERY_BYTE, sudoable=False)
    assert done == (code, EVERY_BYTE, f"its {pwd.getpwnam(ME).pw_dir}\n".encode())


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_files_go_both_ways_in_pieces(connection: t.Any, tmp_path: t.Any, monkeypatch: t.Any, size: int) -> None:
    monkeypatch.setattr(vsock, "CHUNK", 1 << 20)
    content = (EVERY_BYTE * 3)[:size]
    here, there, back = (tmp_path / name for name in ("here", "a name with ' in it", "back"))
    here.write_bytes(content)
    connection.put_file(str(here), str(there))
    assert there.read_bytes() == content
    connection.fetch_file(str(there), str(back))
    assert back.read_bytes() == content


def test_a_file_that_is_not_there_is_said(connection: t.Any, tmp_path: t.Any) -> None:
    with pytest.raises(AnsibleFileNotFound):
        connection.put_file(str(tmp_path / "none"), str(tmp_path / "there"))
    with pytest.raises(AnsibleError, match="none in microVM agent1: .*No such file"):
        connection.fetch_file(str(tmp_path / "none"), str(tmp_path / "back"))


def test_a_microvm_that_does_not_answer_is_unreachable(connection: t.Any, microvm: MicroVm) -> None:
    microvm.answering = False
    with pytest.raises(AnsibleConnectionFailure, match="microVM agent1 through metal1: .*no answer on vsock port 1023"):
        connection.exec_command("true")


def test_a_host_without_microvms_is_said(connection: t.Any, monkeypatch: t.Any, tmp_path: t.Any) -> None:
    monkeypatch.setattr(vsock, "PROGRAM", str(tmp_path / "microvm-exec"))
    with pytest.raises(AnsibleConnectionFailure, match="metal1 has no .*Run the role microvm first"):
        connection.exec_command("true")


def test_another_user_of_the_host_takes_sudo(connection: t.Any) -> None:
    words = shlex.split(connection._wrapped("echo 'a b'"))
    assert words[:2] == ["/bin/sh", "-c"] and 'root="sudo -n --"' in words[2]
    assert words[4:] == [vsock.PROGRAM, "--timeout", "1", "--user", ME, "agent1", "echo 'a b'"]


def test_a_microvm_is_no_host(connection: t.Any) -> None:
    connection.set_options(
        var_options={
            "agentfleet_host": "metal1", "agentfleet_host_variables": {"ansible_connection": "agentfleet.metal.none"},
        }
    )  # fmt: skip
    with pytest.raises(AnsibleError, match="no connection plugin for a host"):
        connection.exec_command("true")
