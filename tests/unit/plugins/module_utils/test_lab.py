# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is planned for lab hosts in each state; a host runs here when a process has its lock file open."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import typing as t
from unittest.mock import Mock

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _lab
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._lab import LabHosts, answers, holders, port_free
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_image import MINIMUM_DISK
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_qemu import normalize
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused


def run(argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
    """QEMU's programs."""
    if argv[0] == "qemu-img":
        open(argv[-2], "wb").close()
    out = "QEMU emulator version 10.0.2 (Debian)\n" if "--version" in argv else ""
    return Completed(tuple(argv), 0 if argv[0].startswith("qemu") else 255, out, "")


class Lab:
    """A lab directory with an image, and free ports."""

    def __init__(self, place: t.Any) -> None:
        self.dir, self.image = str(place / "lab"), str(place / "image")
        os.makedirs(self.image)
        with open(f"{self.image}/disk.raw", "wb") as file:
            file.truncate(MINIMUM_DISK)
        for name, text in (("id_ed25519", "SECRET"), ("host_ed25519.pub", "ssh-ed25519 AAAA lab")):
            with open(f"{self.image}/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        self.ports = {name: free_port() for name in ("a", "b")}
        self.processes: list[subprocess.Popen[bytes]] = []

    def hosts(self, state: str, **changed: t.Any) -> LabHosts:
        hosts = [{"name": name, "ssh_port": self.ports[name], "memory": "64MiB", **changed} for name in ("a", "b")]
        return LabHosts(Host("/", run), {"state": state, "dir": self.dir, "image": self.image, "hosts": hosts})

    def make(self, name: str, **changed: t.Any) -> None:
        """A host as it is after its first start."""
        hosts = self.hosts("started", **changed)
        spec = next(spec for spec in hosts.specs if spec["name"] == name)
        hosts._make_disk(spec)
        wish = json.loads(hosts.host.read(f"{self.dir}/{name}/run.json"))
        wish |= {"spec": spec, "argv": hosts._argv(spec, "tcg"), "accelerator": "tcg"}
        hosts.host.write(f"{self.dir}/{name}/run.json", json.dumps(wish))

    def power_on(self, name: str, greeting: bytes | None = b"SSH-2.0-x\r\n") -> None:
        """A process that has the lock file open and, with a greeting, answers on the host's port."""
        code = (
            "import socket, sys; lock = open(sys.argv[1], 'a'); server = socket.create_server(('127.0.0.1', int(sys.argv[2])))\n"
            "print(1, flush=True)\n"
            "while True: client = server.accept()[0]; client.sendall(eval(sys.argv[3]) or b''); client.close()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, f"{self.dir}/{name}/lock", str(self.ports[name]), repr(greeting)],
            stdout=subprocess.PIPE,
        )
        self.processes.append(process)
        assert process.stdout and process.stdout.readline() == b"1\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def lab(tmp_path: t.Any) -> t.Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def verbs(hosts: LabHosts) -> list[tuple[str, str]]:
    return [(step.verb, step.object) for step in hosts.plan(hosts.observe())]


def test_new_hosts_are_made_started_and_waited_for_together(lab: Lab) -> None:
    assert verbs(lab.hosts("started")) == [("make the disk of", "a, b"), ("start", "a, b"), ("wait for", "a, b")]
    assert not os.path.exists(lab.dir)


def test_no_thread_reads_source_code(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in linecache at the same time: one of them now and then finds no source code."""
    hosts = lab.hosts("started")

    def getsource(_module: t.Any) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", getsource)
    started = Mock(Popen=lambda argv, **_keywords: lab.power_on(os.path.basename(argv[-1])))
    monkeypatch.setattr(_lab, "subprocess", started)
    for step in hosts.plan(hosts.observe())[:2]:  # the disk and the start
        hosts.apply(step)
    assert [host["state"] for host in hosts.result(hosts.observe())["hosts"]] == ["started", "started"]
    assert hosts.host.read(f"{lab.dir}/b/supervisor.py").startswith("# Copyright")


def test_a_second_run_plans_nothing(lab: Lab) -> None:
    for name in ("a", "b"):
        lab.make(name)
        lab.power_on(name)
    hosts = lab.hosts("started")
    assert verbs(hosts) == []
    assert [(h["name"], h["state"], h["answers"]) for h in hosts.result(hosts.observe())["hosts"]] == [
        ("a", "started", True),
        ("b", "started", True),
    ]


def test_only_what_is_off_is_started(lab: Lab) -> None:
    lab.make("a")
    lab.make("b")
    lab.power_on("a")
    assert verbs(lab.hosts("started")) == [("start", "b"), ("wait for", "b")]


def test_a_host_that_boots_is_waited_for(lab: Lab) -> None:
    for name in ("a", "b"):
        lab.make(name)
    lab.power_on("a")
    lab.power_on("b", greeting=None)
    assert verbs(lab.hosts("started")) == [("wait for", "b")]


def test_a_changed_description_restarts_the_host(lab: Lab) -> None:
    for name in ("a", "b"):
        lab.make(name)
        lab.power_on(name)
    hosts = lab.hosts("started", memory="128MiB")
    steps = hosts.plan(hosts.observe())
    assert [step.verb for step in steps] == ["shut down", "start", "wait for"]
    assert steps[0].disruptive and "differs" in steps[0].why


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("stopped", [("shut down", "a")]),
        ("power_cut", [("cut the power of", "a")]),
        ("absent", [("cut the power of", "a"), ("remove", "a, b")]),
        ("restarted", [("shut down", "a"), ("start", "a, b"), ("wait for", "a, b")]),
        (
            "reset",
            [
                ("cut the power of", "a"),
                ("remove", "a, b"),
                ("make the disk of", "a, b"),
                ("start", "a, b"),
                ("wait for", "a, b"),
            ],
        ),
    ],
)
def test_states_of_one_running_and_one_stopped_host(lab: Lab, state: str, expected: list[tuple[str, str]]) -> None:
    lab.make("a")
    lab.make("b")
    lab.power_on("a")
    assert verbs(lab.hosts(state)) == expected


@pytest.mark.parametrize("state", ["stopped", "power_cut", "absent"])
def test_what_is_ended_stays_ended(lab: Lab, state: str) -> None:
    assert verbs(lab.hosts(state)) == []


def test_all_hosts_of_a_lab_end_whether_described_or_not(lab: Lab) -> None:
    lab.make("a")
    lab.power_on("a")
    hosts = LabHosts(Host("/", run), {"state": "absent", "dir": lab.dir})
    assert verbs(hosts) == [("cut the power of", "a"), ("remove", "a")]
    for step in hosts.plan(hosts.observe()):
        hosts.apply(step)
    assert holders(f"{lab.dir}/a/lock") == {} and not os.path.exists(lab.dir)
    assert verbs(hosts) == []


def test_removing_a_host_leaves_what_is_not_ours(lab: Lab) -> None:
    lab.make("a")
    with open(f"{lab.dir}/a/notes.txt", "w", encoding="utf-8") as file:
        file.write("mine")
    hosts = LabHosts(Host("/", run), {"state": "absent", "dir": lab.dir})
    for step in hosts.plan(hosts.observe()):
        hosts.apply(step)
    assert os.listdir(f"{lab.dir}/a") == ["notes.txt"]


def test_a_new_disk_has_the_keys_of_its_image(lab: Lab) -> None:
    lab.make("a")
    assert os.stat(f"{lab.dir}/a/id_ed25519").st_mode & 0o777 == 0o600
    with open(f"{lab.dir}/a/known_hosts", encoding="utf-8") as file:
        assert file.read() == f"[127.0.0.1]:{lab.ports['a']} ssh-ed25519 AAAA\n"
    assert sorted(os.listdir(f"{lab.dir}/a")) == ["disk.qcow2", "id_ed25519", "known_hosts", "run.json"]


def test_a_taken_port_is_refused_before_anything_is_made(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", lab.ports["b"])):
        hosts = lab.hosts("started")
        with pytest.raises(Refused) as refused:
            hosts.plan(hosts.observe())
    assert refused.value.option == "hosts[1].ssh_port" and refused.value.value == lab.ports["b"]
    assert "another program listens" in refused.value.problem and "another port" in refused.value.remedy
    assert not os.path.exists(lab.dir)


def test_a_disk_of_another_image_is_told(lab: Lab) -> None:
    lab.make("a")
    hosts = lab.hosts("started")
    hosts.image = "/another"
    assert "reset gives it a new one" in hosts.result(hosts.observe())["warnings"][0]


def test_a_host_that_goes_off_while_booting_shows_its_last_words(lab: Lab) -> None:
    lab.make("a")
    with open(f"{lab.dir}/a/console.log", "w", encoding="utf-8") as file:
        file.write("\x1b[0;31mKernel panic\x1b[0m - not syncing: VFS\n")
    hosts = lab.hosts("started")
    with pytest.raises(HostError, match=r"a went off\..*Kernel panic - not syncing: VFS"):
        hosts._await(hosts.specs[0])


def test_the_emulator_is_chosen_by_what_works(fake_host: t.Any) -> None:
    spec: dict[str, t.Any] = {"name": "a", "ssh_port": 61222, "memory": "64MiB"}
    cxl = {
        "windows": [{"size": "256MiB", "host_bridges": [0]}],
        "devices": [{"serial": "0x1", "size": "256MiB", "host_bridge": 0}],
    }
    fake_host.files({"/dev/kvm": ""})
    hosts = LabHosts(fake_host, {"state": "started", "dir": "/lab", "image": "/i", "hosts": [spec]})
    fake_host.answers["qemu-system-x86_64"] = ""
    assert hosts._accelerator() == "tcg"  # /dev/kvm alone is no proof
    fake_host.files({"/proc/cpuinfo": "flags\t\t: fpu vmx sse\n"})
    assert hosts._accelerator() == "kvm"
    fake_host.answers["qemu-system-x86_64"] = (1, "", "failed to initialize kvm")
    assert hosts._accelerator() == "tcg"
    fake_host.answers["qemu-system-x86_64"] = ""
    hosts.specs = [normalize("hosts[0]", {**spec, "cxl": cxl})]
    assert hosts._accelerator() == "tcg"


def test_a_port_that_accepts_but_does_not_greet_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not answers(port, 0.2) and not port_free(port)
    assert port_free(port) and not answers(port, 0.2)
