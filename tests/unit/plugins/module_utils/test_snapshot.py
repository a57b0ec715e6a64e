# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots: complete or not there, refused where they do not fit, and clones that are somebody else before they run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import types
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _qemu, _snapshot, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._snapshot import Snapshots, Sources
from ansible_collections.agentfleet.metal.plugins.modules import microvm

MIB = 1 << 20
IMAGE = "/var/lib/agentfleet/images/ab/rootfs.erofs"
PARENT: dict[str, t.Any] = {
    "name": "parent", "driver": "qemu", "program": "/usr/bin/qemu-system-x86_64", "accelerator": "kvm",
    "tenant": "default", "image": "agent", "image_digest": "ab", "image_path": IMAGE, "image_bytes": 64 * MIB, "data_images": [],
    "kernel": "/k", "initrd": "/i", "kernel_arguments": ["quiet"], "vcpus": 2, "vcpus_max": 2,
    "memory_bytes": 8 * MIB, "memory_max_bytes": 8 * MIB, "memory_zones": [{"size_bytes": 8 * MIB, "numa_node": None}],
    "memory_file": "/run/agentfleet/parent/ram",
    "hugepage_bytes": 0, "thp": False, "balloon_bytes": 0, "free_page_reporting": False, "cid": 5, "config": "config-1",
    "data": "", "hotplug_slots": 0, "volumes": [], "shares": [], "devices": [],
    "networks": [{"network": "agents", "mac": "02:00:00:00:00:01", "address": "10.88.0.2", "gateway": "10.88.0.1/24",
                  "tap": "af1", "bridge": "agentfleet0"}],
    "rate_limits": {"disk_bytes_per_second": 0, "disk_operations_per_second": 0, "network_bytes_per_second": 0},
    "environment": {}, "resources": {}, "autostart": True, "restart_policy": "always", "restore_from": "",
}  # fmt: skip
CPUINFO = "processor: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t: 1\nmodel name\t: EPYC\nstepping\t: 1\nflags\t: {}\n\n"


class Machine:
    """A machine as the drivers give it; writes down what is asked of it."""

    connected = False

    def __init__(self, host: t.Any, log: list[str], spec: t.Mapping[str, t.Any]) -> None:
        self.host, self.log, self.spec = host, log, spec

    def __enter__(self) -> Machine:
        assert not self.connected, "QEMU greets a second client only after the first has left"
        self.connected = True
        return self

    def __exit__(self, *_exception: object) -> None:
        self.connected = False
        self.log.append("disconnect")

    def version(self) -> str:
        return str(self.host.running_version or self.host.version)

    def state(self) -> str:
        return str(self.host.machine_state)

    def pause(self) -> None:
        self.log.append("pause")
        self.host.machine_state = "paused"

    def resume(self) -> None:
        self.log.append("resume")
        self.host.machine_state = "running"

    def save(self, directory: str) -> None:
        self.log.append("save")
        if self.host.fails == "save":
            raise HostError("QEMU refused migrate: disk full")
        with open(self.host.path(f"{directory}/state"), "wb") as file:
            file.write(b"state of the devices")
        for name, target in self.host.planted.items():
            os.symlink(self.host.path(target), self.host.path(f"{directory}/{name}"))

    def load(self, directory: str) -> None:
        self.log.append(f"load {directory}")


@pytest.fixture
def metal(fake_host: t.Any, monkeypatch: t.Any) -> t.Any:
    """A host with a running parent whose RAM is 8 MiB with data at both ends and a hole between them."""
    fake_host.files(
        {
            "/var/lib/agentfleet/microvms/parent/spec.json": json.dumps(PARENT),
            "/run/agentfleet/parent.spec.json": json.dumps(PARENT),
            IMAGE: "image",
            "/run/agentfleet/parent/qmp": "",
            "/proc/cpuinfo": CPUINFO.format("sse svm"),
            "/etc/machine-id": "host1",
        }
    )
    with open(fake_host.path("/run/agentfleet/parent/ram"), "wb") as ram:
        ram.write(b"begin" + bytes(3 * MIB) + b"middle")
        ram.seek(8 * MIB - 3)
        ram.write(b"end")
    fake_host.machine_state, fake_host.fails, fake_host.log, fake_host.version = "running", "", [], "10.0.2"
    fake_host.planted, fake_host.running_version = {}, ""
    fake_host.answers["systemctl show"] = "Id=agentfleet-microvm@parent.service\nMainPID=7"
    fake_host.answers["systemctl restart"] = ""

    class Driver:
        CLONE_POWER_OFF = "b"

        @staticmethod
        def version(host: t.Any, _program: str) -> str:
            return str(host.version)

        @staticmethod
        def machine(host: t.Any, spec: t.Any) -> Machine:
            return Machine(host, host.log, spec)

        @staticmethod
        def connect(host: t.Any, _spec: t.Any, port: int, _timeout: float) -> t.Any:
            assert port == 1024
            return host.agent()

    monkeypatch.setattr(_vmm, "driver", lambda _name: Driver)
    return fake_host


def call(*snapshots: dict[str, str], **params: t.Any) -> dict[str, t.Any]:
    items = [{"microvm": "", **one} for one in snapshots]
    return {"state": "present", "snapshots": items, "verify": False, "timeout_seconds": 60, **params}


WARM = {"name": "warm", "microvm": "parent"}


def run(host: t.Any, params: dict[str, t.Any]) -> list[Step]:
    resource = Snapshots(host, params)
    steps = resource.plan(resource.observe())
    for step in steps:
        resource.apply(step)
    return steps


def listed(host: t.Any, **params: t.Any) -> list[dict[str, t.Any]]:
    resource = Snapshots(host, call(**params))
    return t.cast("list[dict[str, t.Any]]", resource.result(resource.observe())["snapshots"])


def clone(**changes: t.Any) -> dict[str, t.Any]:
    other = json.loads(json.dumps(PARENT))
    network = {**other["networks"][0], "mac": "02:00:00:00:00:02", "address": "10.88.0.3", "tap": "af2"}
    return {
        **other, "name": "worker", "memory_bytes": 1, "memory_max_bytes": 1, "vcpus": 1, "memory_file": "", "networks": [network],
        "environment": {"ROLE": "reviewer"}, **changes,
    }  # fmt: skip


# -- making one -------------------------------------------------------------------


def test_created_once_with_state_and_ram_of_one_moment(metal: t.Any) -> None:
    steps = run(metal, call(WARM))
    assert [(step.verb, step.object) for step in steps] == [("create", "snapshot warm")]
    assert metal.log == ["pause", "save", "resume", "disconnect"]
    assert metal.names("/var/lib/agentfleet/snapshots/warm") == ["manifest.json", "ram", "state"]
    with open(metal.path("/var/lib/agentfleet/snapshots/warm/ram"), "rb") as copy:
        with open(metal.path("/run/agentfleet/parent/ram"), "rb") as ram:
            assert copy.read() == ram.read()
        assert os.fstat(copy.fileno()).st_blocks * 512 < 1 * MIB
    assert run(metal, call(WARM)) == []
    (one,) = listed(metal, verify=True)
    assert (one["usable"], one["problem"], one["microvm"], one["version"]) == (True, "", "parent", "10.0.2")
    assert one["cpu"] == "AuthenticAMD 25 1 1 EPYC"


def test_only_root_enters_and_nothing_is_left_beside_it(metal: t.Any) -> None:
    run(metal, call(WARM))
    store = metal.path("/var/lib/agentfleet/snapshots")
    assert os.stat(store).st_mode & 0o777 == 0o700
    assert os.stat(f"{store}/warm/ram").st_mode & 0o777 == 0o444
    assert os.listdir(store) == ["warm"]
    assert metal.names("/run/agentfleet/parent") == ["qmp", "ram"]
    assert "R! /var/lib/agentfleet/snapshots/.new-*" in metal.read("/etc/tmpfiles.d/60-agentfleet-snapshots.conf")


def test_a_paused_microvm_stays_paused(metal: t.Any) -> None:
    metal.machine_state = "paused"
    run(metal, call(WARM))
    assert metal.machine_state == "paused"


def test_a_failure_resumes_the_microvm_and_leaves_nothing(metal: t.Any) -> None:
    metal.fails = "save"
    with pytest.raises(HostError, match="disk full"):
        run(metal, call(WARM))
    assert metal.machine_state == "running"
    assert metal.names("/var/lib/agentfleet/snapshots") == []
    assert metal.names("/run/agentfleet/parent") == ["qmp", "ram"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("stolen", "stolen: a link, which is not followed"), ("manifest.json", "manifest.json, which is a name of ours")],
)
def test_a_vmm_puts_nothing_of_others_into_its_snapshot(metal: t.Any, name: str, problem: str) -> None:
    metal.files({"/etc/shadow": "secret"})
    metal.planted = {name: "/etc/shadow"}
    with pytest.raises(HostError, match=problem):
        run(metal, call(WARM))
    assert metal.machine_state == "running"
    assert metal.names("/var/lib/agentfleet/snapshots") == []


def test_nor_another_file_as_its_ram(metal: t.Any) -> None:
    metal.files({"/etc/shadow": "secret"})
    os.unlink(metal.path("/run/agentfleet/parent/ram"))
    os.symlink(metal.path("/etc/shadow"), metal.path("/run/agentfleet/parent/ram"))
    with pytest.raises(HostError, match="ram: a link, which is not followed"):
        run(metal, call(WARM))
    assert metal.names("/var/lib/agentfleet/snapshots") == []


def test_what_a_killed_call_left_is_cleared_and_its_microvm_resumed(metal: t.Any) -> None:
    metal.files(
        {
            "/var/lib/agentfleet/snapshots/.new-warm/ram": "half",
            "/var/lib/agentfleet/snapshots/.new-warm/paused.json": json.dumps(PARENT),
            "/run/agentfleet/parent/snapshot/state": "half",
        }
    )
    metal.machine_state = "paused"
    steps = run(metal, call())
    assert [(step.verb, step.object) for step in steps] == [("clear", "unfinished snapshot warm")]
    assert metal.machine_state == "running"
    assert metal.names("/var/lib/agentfleet/snapshots") == []
    assert metal.names("/run/agentfleet/parent") == ["qmp", "ram"]


def test_a_disk_without_room_is_refused_before_the_pause(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(Snapshots, "_room", lambda self: 4 * MIB)
    with pytest.raises(Refused, match="has room for 4 MiB and its RAM may take 8 MiB"):
        run(metal, call(WARM))
    assert metal.log == []


def test_a_name_that_is_taken_by_another_microvm(metal: t.Any) -> None:
    run(metal, call(WARM))
    with pytest.raises(Refused, match="snapshot warm is of microVM parent"):
        run(metal, call({"name": "warm", "microvm": "other"}))


# -- where it is valid ----------------------------------------------------------------


def test_another_version_another_cpu_other_features_are_named(metal: t.Any) -> None:
    run(metal, call(WARM))
    metal.version = "10.0.3"
    assert listed(metal)[0]["problem"] == "it was made with version '10.0.2', and this host has '10.0.3'"
    metal.version = "10.0.2"
    metal.files({"/proc/cpuinfo": CPUINFO.format("sse svm").replace("EPYC", "Xeon")})
    assert "it was made with cpu 'AuthenticAMD 25 1 1 EPYC'" in listed(metal)[0]["problem"]
    metal.files({"/proc/cpuinfo": CPUINFO.format("sse svm avx512f")})
    assert "it was made with cpu features" in listed(metal)[0]["problem"]
    metal.files({"/proc/cpuinfo": CPUINFO.format("svm sse")})
    assert listed(metal)[0]["problem"] == ""


def test_emulation_does_not_ask_for_the_cpu(metal: t.Any) -> None:
    metal.files({"/run/agentfleet/parent.spec.json": json.dumps({**PARENT, "accelerator": "tcg"})})
    run(metal, call(WARM))
    metal.files({"/proc/cpuinfo": CPUINFO.format("sse svm").replace("EPYC", "Xeon")})
    assert listed(metal)[0]["usable"]


def test_one_of_another_version_is_made_anew(metal: t.Any) -> None:
    run(metal, call(WARM))
    metal.version = "10.0.3"
    steps = run(metal, call(WARM))
    assert [step.verb for step in steps] == ["delete", "create"]
    assert "it was made with version '10.0.2'" in steps[0].why
    assert listed(metal)[0]["version"] == "10.0.3"


def test_a_program_that_was_updated_under_its_microvm_is_named_and_nothing_is_saved(metal: t.Any) -> None:
    metal.version, metal.running_version = "10.0.3", "10.0.2"
    with pytest.raises(HostError, match=r"parent runs on version '10\.0\.2', and .* has become '10\.0\.3' since"):
        run(metal, call(WARM))
    assert metal.log == ["disconnect"] and metal.names("/var/lib/agentfleet/snapshots") == []
    assert metal.names("/run/agentfleet/parent") == ["qmp", "ram"]


def damage(host: t.Any, what: str) -> None:
    path = host.path("/var/lib/agentfleet/snapshots/warm/ram")
    before = os.stat(path)
    os.chmod(path, 0o644)
    if what == "missing":
        os.unlink(path)
    elif what == "short":
        os.truncate(path, 4 * MIB)
    else:
        with open(path, "r+b") as file:
            file.seek(5 * MIB)
            file.write(b"X")
        times = (before.st_atime_ns, before.st_mtime_ns + (0 if what == "rotten" else 1))
        os.utime(path, ns=times)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("missing", "its file ram is missing"),
        ("short", "its file ram has 4194304 bytes instead of 8388608"),
        ("written", "its file ram is damaged: its SHA-256 is not that of the manifest"),
    ],
)
def test_a_damaged_one_is_refused(metal: t.Any, what: str, problem: str) -> None:
    run(metal, call(WARM))
    damage(metal, what)
    with pytest.raises(Refused) as refused:
        Sources(metal, False, []).settle(item(), t.cast(_vmm.Spec, clone()))
    assert (refused.value.option, refused.value.problem) == ("instances[0].from_snapshot", problem)


def test_what_changed_without_a_trace_is_found_by_verification(metal: t.Any) -> None:
    run(metal, call(WARM))
    damage(metal, "rotten")
    assert listed(metal)[0]["usable"]
    assert "is damaged" in listed(metal, verify=True)[0]["problem"]


def test_its_image_must_be_there(metal: t.Any) -> None:
    run(metal, call(WARM))
    metal.remove(IMAGE)
    assert listed(metal)[0]["problem"] == f"its image {IMAGE} is not on this host"


# -- taking it away, and going back to it -----------------------------------------------


def test_removed_with_the_last_goes_what_all_had(metal: t.Any) -> None:
    run(metal, call(WARM))
    metal.files({"/run/agentfleet/snapshots/warm": None})
    assert [step.verb for step in run(metal, call({"name": "warm"}, state="absent"))] == ["delete"]
    assert not metal.exists("/run/agentfleet/snapshots")
    assert not metal.exists("/var/lib/agentfleet/snapshots")
    assert not metal.exists("/etc/tmpfiles.d/60-agentfleet-snapshots.conf")
    assert run(metal, call({"name": "warm"}, state="absent")) == []


def test_one_in_use_stays(metal: t.Any) -> None:
    run(metal, call(WARM))
    worker = clone(restore_from="/run/agentfleet/snapshots/warm")
    metal.files({"/var/lib/agentfleet/microvms/worker/spec.json": json.dumps(worker)})
    with pytest.raises(Refused, match="in use by worker"):
        run(metal, call({"name": "warm"}, state="absent"))
    assert listed(metal)[0]["used_by"] == ["worker"]


def test_setting_back_restarts_the_unit(metal: t.Any) -> None:
    run(metal, call(WARM))
    worker = clone(restore_from="/run/agentfleet/snapshots/warm")
    metal.files({"/var/lib/agentfleet/microvms/worker/spec.json": json.dumps(worker)})
    (step,) = run(metal, call({"name": "warm", "microvm": "worker"}, state="restored"))
    assert (step.verb, step.object, step.disruptive) == ("restore", "microVM worker", True)
    restart = metal.calls.index("systemctl restart agentfleet-microvm@worker.service")
    assert metal.calls[restart - 1] == "systemctl reset-failed agentfleet-microvm@worker.service"  # it counts starts


# -- clones -------------------------------------------------------------------------------


def item(**changes: t.Any) -> dict[str, t.Any]:
    return {"option": "instances[0]", "snapshots": False, "from_snapshot": "warm", "declared": {}, **changes}


def test_a_clone_is_made_of_what_its_snapshot_is_made_of(metal: t.Any) -> None:
    run(metal, call(WARM))
    spec = clone()
    Sources(metal, False, []).settle(item(), t.cast(_vmm.Spec, spec))
    assert {key: spec[key] for key in _snapshot.INHERITED} == {key: PARENT[key] for key in _snapshot.INHERITED}
    assert spec["memory_file"] == "/run/agentfleet/snapshots/warm/ram"
    assert spec["restore_from"] == "/run/agentfleet/snapshots/warm"
    assert (spec["name"], spec["networks"][0]["address"]) == ("worker", "10.88.0.3")
    lines = _snapshot.unit_lines(t.cast(_vmm.Spec, spec)).splitlines()
    assert lines[0] == "BindReadOnlyPaths=/var/lib/agentfleet/snapshots/warm:/run/agentfleet/snapshots/warm"
    assert lines[1:] == ["ExecStartPost=+/usr/local/lib/agentfleet/microvm-unit resume %i"]


def test_a_booted_microvm_has_nothing_of_this(metal: t.Any) -> None:
    spec = t.cast(_vmm.Spec, clone())
    Sources(metal, False, []).settle(item(from_snapshot=""), spec)
    assert (spec["restore_from"], spec["memory_file"]) == ("", "")
    assert _snapshot.unit_lines(spec) == ""


def test_a_parent_has_its_ram_in_a_file_and_reports_no_free_pages(metal: t.Any) -> None:
    spec = t.cast(_vmm.Spec, clone(free_page_reporting=True))
    Sources(metal, False, []).settle(item(from_snapshot="", snapshots=True), spec)
    assert (spec["memory_file"], spec["free_page_reporting"]) == ("/run/agentfleet/worker/ram", False)
    assert _snapshot.unsuitable(spec) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"restore_from": "/run/agentfleet/snapshots/old"}, "itself started from snapshot old"),
        ({"memory_file": ""}, "its RAM is in no file"),
        ({"shares": [{}]}, "virtiofsd maps its RAM"),
        ({"devices": ["0000:01:00.0"]}, "passed-through device"),
        ({"hotplug_slots": 2}, "elsewhere in a clone"),
        ({"memory_max_bytes": 16 * MIB}, "memory that can be plugged"),
        ({"volumes": [{"readonly": False}]}, "a writable volume"),
    ],
)
def test_of_what_no_snapshot_can_be_made(change: dict[str, t.Any], problem: str) -> None:
    assert _snapshot.unsuitable(t.cast(_vmm.Spec, PARENT)) is None
    found = _snapshot.unsuitable(t.cast(_vmm.Spec, {**PARENT, **change}))
    assert found and problem in found[0] and found[1]


def test_ram_that_does_not_fit_into_run_or_is_in_zones_is_refused(metal: t.Any) -> None:
    two = [{"size_bytes": 4 * MIB, "numa_node": None}] * 2
    with pytest.raises(Refused, match="its RAM is one file, and it has 2 zones"):
        Sources(metal, False, []).settle(
            item(from_snapshot="", snapshots=True), t.cast(_vmm.Spec, clone(memory_zones=two))
        )
    spec = t.cast(_vmm.Spec, clone(memory_bytes=1 << 60))
    with pytest.raises(Refused) as refused:
        Sources(metal, False, []).settle(item(from_snapshot="", snapshots=True), spec)
    assert refused.value.option == "instances[0].snapshots"
    assert "remount" in refused.value.remedy


def test_the_ram_of_all_together_must_fit_into_run(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: types.SimpleNamespace(f_blocks=3 << 10, f_frsize=MIB))

    def parent(number: int, size: int = 512 * MIB) -> _vmm.Spec:
        return t.cast(_vmm.Spec, clone(name=f"vm{number}", memory_bytes=size))

    others = [parent(number) for number in range(4)]
    for one in others[1:]:
        one["memory_file"] = _snapshot.memory_file(one["name"])
    others[0]["memory_file"] = "/run/agentfleet/snapshots/warm/ram"  # a clone's is on the disk
    sources = Sources(metal, False, [], others)
    sources.settle(item(from_snapshot="", snapshots=True), parent(4))
    sources.settle(item(from_snapshot="", snapshots=True), parent(5))  # 2560 of 3072 MiB, of which 64 are kept free
    with pytest.raises(Refused, match="room for 3008 MiB of guests' RAM, and 3072 MiB are declared") as refused:
        sources.settle(item(option="instances[7]", from_snapshot="", snapshots=True), parent(6))
    assert refused.value.option == "instances[7].snapshots"


def test_clones_of_another_shape_are_refused(metal: t.Any) -> None:
    run(metal, call(WARM))
    with pytest.raises(Refused, match="the snapshot's machine has 1 networks and this one 0"):
        Sources(metal, False, []).settle(item(), t.cast(_vmm.Spec, clone(networks=[])))


def test_a_snapshot_that_an_earlier_task_makes_is_predicted(metal: t.Any) -> None:
    warnings: list[str] = []
    spec = t.cast(_vmm.Spec, clone())
    Sources(metal, True, warnings).settle(item(), spec)
    assert spec["restore_from"] == "/run/agentfleet/snapshots/warm"
    assert warnings == ["snapshot warm is not on the host yet; an earlier task is expected to make it"]
    with pytest.raises(Refused, match="no such snapshot on this host"):
        Sources(metal, False, []).settle(item(), spec)


@pytest.mark.parametrize(
    ("change", "option"),
    [({"from_snapshot": "../x"}, "from_snapshot"), ({"snapshots": True}, "snapshots")],
)
def test_bad_wishes(change: dict[str, t.Any], option: str) -> None:
    with pytest.raises(Refused) as refused:
        _snapshot.wish("instances[0]", item(**change))
    assert refused.value.option == f"instances[0].{option}"


def test_qemu_maps_ram_shared_in_the_parent_and_privately_in_clones() -> None:
    parent = " ".join(_qemu.command(t.cast(_vmm.Spec, PARENT)))
    assert "mem-path=/run/agentfleet/parent/ram,size=8388608,share=on," in parent
    assert f"mem-path={IMAGE},size=67108864,share=on,readonly=on,rom=on" in parent
    assert "-incoming" not in parent
    there = "/run/agentfleet/snapshots/warm"
    spec = {**PARENT, "restore_from": there, "memory_file": f"{there}/ram"}
    copy = " ".join(_qemu.command(t.cast(_vmm.Spec, spec)))
    assert f"mem-path={there}/ram,size=8388608,share=off,readonly=on,rom=off," in copy
    assert f"mem-path={IMAGE},size=67108864,share=off,readonly=on,rom=off" in copy
    assert "-incoming defer -S" in copy


# -- in the unit -------------------------------------------------------------------------------


def agent_of(host: t.Any, answer: dict[str, t.Any]) -> list[dict[str, t.Any]]:
    """Let an agent answer identities, and return what it is told."""
    told: list[dict[str, t.Any]] = []

    def serve(its: socket.socket) -> None:
        with its:
            request = b""
            while not request.endswith(b"}"):
                request += its.recv(65536)
            told.append(json.loads(request.partition(b"\r\n\r\n")[2]))
            host.log.append("tell")
            its.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(answer).encode())

    def connect() -> socket.socket:
        ours, its = socket.socketpair()
        threading.Thread(target=serve, args=(its,), daemon=True).start()
        return ours

    host.agent = connect
    return told


@pytest.fixture
def cloned(metal: t.Any) -> t.Any:
    run(metal, call(WARM))
    metal.log.clear()
    for name in ("worker", "other"):
        spec = clone(name=name)
        Sources(metal, False, []).settle(item(), t.cast(_vmm.Spec, spec))
        metal.files({f"/run/agentfleet/{name}.spec.json": json.dumps(spec)})
    return metal


def test_a_clone_is_told_who_it_is(cloned: t.Any) -> None:
    told = agent_of(cloned, {"hostname": "worker"})
    _snapshot.resume(cloned, "worker")
    load = "load /run/agentfleet/snapshots/warm"
    assert cloned.log == [load, "resume", "disconnect", "tell"]
    (message,) = told
    assert message["power_off"] == "b"
    assert message["hostname"] == "worker"
    assert message["networks"] == [
        ["02:00:00:00:00:01 10.88.0.2/24 10.88.0.1", "02:00:00:00:00:02 10.88.0.3/24 10.88.0.1"]
    ]
    assert message["environment"] == {"ROLE": "reviewer"}
    assert len(bytes.fromhex(message["entropy"])) == 64


def test_entropy_is_new_each_time_and_the_machine_id_is_its_own_for_good(cloned: t.Any) -> None:
    told = agent_of(cloned, {"hostname": "worker"})
    _snapshot.resume(cloned, "worker")
    _snapshot.resume(cloned, "worker")
    other = agent_of(cloned, {"hostname": "other"})
    _snapshot.resume(cloned, "other")
    assert len({message["entropy"] for message in told + other}) == 3
    assert told[0]["machine_id"] == told[1]["machine_id"] != other[0]["machine_id"]
    assert len(told[0]["machine_id"]) == 32


def test_what_a_clone_declares_is_told_from_the_defaults_of_the_module() -> None:
    options = microvm.ARGUMENTS["instances"]["options"]
    assert {one: default for one, (_keys, default) in _snapshot.PARENTS.items()} == {
        one: options[one].get("default") for one in _snapshot.PARENTS
    }


def test_without_an_identity_it_does_not_count_as_started(cloned: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_snapshot, "IDENTITY_SECONDS", 0.3)
    agent_of(cloned, {"error": "OSError: no network device"})
    with pytest.raises(HostError, match="did not take its identity within 0.3 seconds: OSError: no network device"):
        _snapshot.resume(cloned, "worker")


def test_a_vmm_that_does_not_answer_yet_is_asked_again(cloned: t.Any, monkeypatch: t.Any) -> None:
    agent_of(cloned, {"hostname": "worker"})
    refused = [HostError("Cloud Hypervisor did not answer vmm.ping: No such file or directory")] * 2
    monkeypatch.setattr(Machine, "version", lambda _self: "10.0.2" if not refused else raised(refused.pop()))
    _snapshot.resume(cloned, "worker")
    assert cloned.log[-1] == "tell"


def raised(error: Exception) -> t.NoReturn:
    raise error


def test_an_answer_without_end_does_not_hold_its_start(cloned: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_snapshot, "IDENTITY_SECONDS", 0.3)
    monkeypatch.setattr(_snapshot, "AGENT_SECONDS", 0.1)

    asked = []

    def talkative() -> socket.socket:
        ours, its = socket.socketpair()
        asked.append(its)

        def send() -> None:
            with its, contextlib.suppress(OSError):
                for _time in range(500):
                    its.sendall(b" ")
                    time.sleep(0.01)

        threading.Thread(target=send, daemon=True).start()
        return ours

    cloned.agent = talkative
    with pytest.raises(HostError, match="did not take its identity within 0.3 seconds"):
        _snapshot.resume(cloned, "worker")
    assert len(asked) > 1, "it is not listened to until it has said all"


def test_on_another_host_it_does_not_even_load(cloned: t.Any) -> None:
    cloned.version = "11.0.0"
    with pytest.raises(HostError, match="cannot start from snapshot warm: it was made with version '10.0.2'"):
        _snapshot.resume(cloned, "worker")
    assert cloned.log == ["disconnect"]
