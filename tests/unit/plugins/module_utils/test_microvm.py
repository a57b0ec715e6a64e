# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""MicroVMs: what is derived, what is planned, and that a second run plans nothing.

The resource as a whole: wishes are read by _microvm_spec, resolved against the host by _microvm_resolve, disks are
made by _microvm_volumes, and _microvm_info looks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _early_init,
    _microvm,
    _microvm_data,
    _microvm_names,
    _microvm_state,
    _microvm_units,
    _microvm_volumes,
    _qemu,
    _vmm,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm import ENDED, MicroVms
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_info import MicrovmInfo
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import (
    HostError,
    Refused,
    Step,
    apply_all,
    converge,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._snapshot import Snapshots
from ansible_collections.agentfleet.metal.plugins.modules.microvm import ARGUMENTS

DIGEST = "ab" * 32
MANIFEST = {"files": {"rootfs.erofs": {"size_bytes": 82 << 20}}, "kernel_release": "6.12"}
NETWORK = {"name": "agents", "prefix": "10.88.0.0/24", "bridge": "agentfleet0"}
ATTACHED = [{"network": "agents", "address": None}]


def complete(options: dict[str, t.Any], given: dict[str, t.Any]) -> dict[str, t.Any]:
    """Parameters as Ansible hands them to a module: defaults filled in, in all suboptions."""
    full = {key: option.get("default") for key, option in options.items()} | given
    for key, option in options.items():
        value = full[key]
        if "options" in option and isinstance(value, dict):
            full[key] = complete(option["options"], value)
        elif "options" in option and isinstance(value, list):
            full[key] = [complete(option["options"], one) for one in value]
    return full


def call(*instances: dict[str, t.Any], **params: t.Any) -> dict[str, t.Any]:
    given = {
        "networks": [NETWORK],
        "ready_timeout_seconds": 1,
        "parallel": 2,
        "instances": [{"image": "agent", **one} for one in instances],
        **params,
    }
    return complete(ARGUMENTS, given)


class Systemd:
    """Answers of systemctl for a few units: enough to see what the resource does with them."""

    def __init__(self, host: t.Any) -> None:
        self.host, self.active = host, {}  # type: t.Any, dict[str, int]
        host.answers.update(
            {
                "systemctl": "",
                "systemctl show": self.show,
                "systemctl start": self.start,
                "systemctl stop": self.stop,
                "systemctl enable": self.enable,
                "systemctl disable": self.disable,
                "/usr/bin/qemu-system-x86_64 --version": "QEMU emulator version 10.0.2 (Debian)",
                "modprobe": "",
                "journalctl": "",
            }
        )

    def _names(self) -> list[str]:
        return [w.partition("@")[2].partition(".")[0] for w in self.host.calls[-1].split() if "microvm@" in w]

    def show(self, _host: t.Any) -> str:
        """Asked by pattern, it tells of what runs; a stopped unit is not in its memory."""
        assert self._names() == ["*"]
        return "\n\n".join(
            f"Id=agentfleet-microvm@{name}.service\nActiveState=active\nResult=success\nMainPID={pid}\nNRestarts=0"
            for name, pid in self.active.items()
        )

    def start(self, host: t.Any) -> str:
        for name in [one for one in self._names() if one not in self.active]:  # what runs is not started again
            self.active[name] = 100 + len(self.active)
            host.files(
                {f"/run/agentfleet/{name}.spec.json": host.read(f"/var/lib/agentfleet/microvms/{name}/spec.json")}
            )
        return ""

    def stop(self, host: t.Any) -> str:
        for name in self._names():
            self.active.pop(name, None)
            host.remove(f"/run/agentfleet/{name}.spec.json")
        return ""

    def disable(self, host: t.Any) -> str:
        for path in host.glob("/etc/systemd/system/*.wants/*"):
            if any(f"@{name}." in path for name in self._names()) or path.rpartition("/")[2] in host.calls[-1].split():
                host.remove(path)
        return ""

    def enable(self, host: t.Any) -> str:
        wants = "/etc/systemd/system"
        links = [f"{wants}/agentfleet-microvms.target.wants/agentfleet-microvm@{n}.service" for n in self._names()]
        links.append(f"{wants}/multi-user.target.wants/agentfleet-microvms.target")
        host.files({link: "" for link in links if not host.exists(link)})
        return ""


@pytest.fixture
def metal(fake_host: t.Any, monkeypatch: t.Any) -> t.Any:
    """A host with an image, virtualization and a systemd; every agent answers."""
    fake_host.files(
        {
            f"/var/lib/agentfleet/images/{DIGEST}/manifest.json": json.dumps(MANIFEST),
            "/var/lib/agentfleet/images/names/agent": f"-> ../{DIGEST}",
            "/proc/meminfo": "MemTotal: 4194304 kB\n",
            "/proc/cpuinfo": "flags\t\t: fpu svm sse\n",
            "/proc/modules": "vhost_vsock 1 0\ntun 1 0\nbridge 1 0\nkvm_amd 1 0\n",
            "/dev/kvm": "",
            "/usr/bin/qemu-system-x86_64": "",
            "/usr/libexec/virtiofsd": "",
            "/usr/sbin/ip": "",
            "/usr/sbin/bridge": "",
            "/usr/sbin/nft": "",
        }
    )
    with open(fake_host.path(f"/var/lib/agentfleet/images/{DIGEST}/rootfs.erofs"), "wb") as file:
        file.truncate(82 << 20)
    fake_host.systemd = Systemd(fake_host)
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: {"hostname": spec["name"]})
    return fake_host


def run(host: t.Any, params: dict[str, t.Any]) -> list[Step]:
    resource = MicroVms(host, params)
    steps = resource.plan(resource.observe())
    for step in steps:
        resource.apply(step)
    return steps


def words(steps: list[Step]) -> list[str]:
    return [f"{step.verb} {step.object}" for step in steps]


def test_first_run_defines_and_starts_and_second_plans_nothing(metal: t.Any) -> None:
    params = call(
        {"name": "a1", "networks": ATTACHED}, {"name": "a2", "networks": ATTACHED, "environment": {"K": "it's"}}
    )
    assert words(run(metal, params)) == [
        "prepare host for microVMs", "define microVM a1", "define microVM a2", "reload systemd",
        "define network agents", "enable microVMs at boot", "start microVMs",
    ]  # fmt: skip
    assert run(metal, params) == []


def test_check_mode_plans_like_the_real_run_where_nothing_is_there_yet(fake_host: t.Any) -> None:
    fake_host.answers["systemctl show"] = ""
    fake_host.files({"/proc/meminfo": "MemTotal: 4194304 kB\n"})
    resource = MicroVms(fake_host, call({"name": "a1"}))
    resource.predicting = True
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["prepare", "define", "reload", "enable", "start"]
    assert resource.result(resource.observe())["warnings"] == [
        "image agent is not on the host yet; an earlier task is expected to bring it",
        "the host has no /usr/bin/qemu-system-x86_64; an earlier task is expected to correct it",
    ]


PARENT = {
    "name": "parent", "snapshots": True, "memory": "512MiB", "vcpus": 2, "kernel_arguments": ["mitigations=off"], "numa_node": 0,
    "volumes": [{"name": "data", "size": "1MiB", "template": "/srv/data", "readonly": True, "mount": "/data"}],
    "user_data": {"files": [{"path": "/etc/token", "content": "PARENT"}]},
}  # fmt: skip
CLONE = {"name": "clone", "image": "", "from_snapshot": "warm", "user_data": PARENT["user_data"]}


@pytest.fixture
def warm(metal: t.Any) -> t.Any:
    """A host with a snapshot of a microVM."""
    metal.files({"/srv/data": "1", "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 4194304 kB\n"})
    metal.answers["/usr/bin/qemu-system-x86_64 --version"] = "QEMU emulator version 10.0.2 (Debian)"
    run(metal, call(PARENT))
    spec = json.loads(metal.read("/var/lib/agentfleet/microvms/parent/spec.json"))
    manifest = {"format": 1, "spec": spec, "key": {}, "files": {}}
    metal.files({"/var/lib/agentfleet/snapshots/warm/manifest.json": json.dumps(manifest)})
    return metal


def test_a_clone_has_what_its_parent_had_whether_it_says_so_or_not(warm: t.Any) -> None:
    said = {key: value for key, value in PARENT.items() if key not in ("name", "snapshots")}
    given = [CLONE, {**CLONE, **said, "name": "other", "image": DIGEST}]
    run(warm, call(*given))
    specs = [json.loads(warm.read(f"/var/lib/agentfleet/microvms/{name}/spec.json")) for name in ("clone", "other")]
    for spec in specs:
        assert (spec["vcpus"], spec["memory_bytes"], spec["image_digest"]) == (2, 512 << 20, DIGEST)
        assert spec["kernel_arguments"][-1] == "mitigations=off"
        assert [volume["name"] for volume in spec["volumes"]] == ["data"]
    assert run(warm, call(*given)) == []


@pytest.mark.parametrize(
    ("said", "differs"),
    [
        ({"vcpus": 4}, "vcpus 2 -> 4"),
        ({"vcpus_max": 4}, "vcpus_max 2 -> 4"),
        ({"memory": "1GiB"}, "memory_bytes 536870912 -> 1073741824"),
        ({"memory_zones": [{"size": "1GiB", "numa_node": 0}]}, "memory_bytes 536870912 -> 1073741824"),
        ({"kernel_arguments": ["nosmt"]}, "-> ['nosmt']"),
        ({"hotplug_slots": 3}, "hotplug_slots 0 -> 3"),
        ({"thp": True}, "thp False -> True"),
        ({"driver": "cloud_hypervisor"}, "driver 'qemu' -> 'cloud_hypervisor'"),
        ({"volumes": [{"name": "other", "size": "1GiB"}]}, "volumes data removed"),
        ({"shares": [{"tag": "m", "source": "/srv"}]}, "shares m added"),
        ({"devices": ["0000:01:00.0"]}, "devices 0000:01:00.0 added"),
        ({"rate_limits": {"disk_operations_per_second": 9}}, "'disk_operations_per_second': 9"),
    ],
)
def test_a_clone_that_declares_something_else_is_refused(warm: t.Any, said: dict[str, t.Any], differs: str) -> None:
    with pytest.raises(Refused) as refused:
        run(warm, call({**CLONE, **said}))
    assert refused.value.option == f"instances[0].{next(iter(said))}"
    assert refused.value.problem.startswith("a clone goes on with what microVM parent had")
    assert differs in refused.value.problem


def test_first_boot_data_of_a_clones_own_is_refused_and_never_shown(warm: t.Any) -> None:
    own = {"files": [{"path": "/etc/token", "content": "WORKER"}]}
    for user_data, value in ((own, "data-"), (None, "None")):
        with pytest.raises(Refused) as refused:
            run(warm, call({**CLONE, "user_data": user_data}))
        assert refused.value.option == "instances[0].user_data"
        assert str(refused.value.value).startswith(value) and "WORKER" not in str(refused.value)
        assert "the same user_data" in refused.value.remedy and "identity.d" in refused.value.remedy


def test_what_is_derived_is_stable_and_distinct(metal: t.Any) -> None:
    resource = MicroVms(
        metal, call(*({"name": f"a{n}", "networks": ATTACHED} for n in range(200)), memory_overcommit=99)
    )
    resource.plan(resource.observe())
    networks = [spec["networks"][0] for spec in resource.specs.values()]
    assert [n["address"] for n in networks[:3]] == ["10.88.0.2", "10.88.0.3", "10.88.0.4"]
    for key in ("tap", "mac", "address"):
        assert len({n[key] for n in networks}) == 200
    assert len({spec["cid"] for spec in resource.specs.values()}) == 200
    assert all(len(n["tap"]) <= 15 and n["mac"].startswith("02:") for n in networks)


def test_an_address_is_kept_when_others_come_and_go(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "networks": ATTACHED}, {"name": "a2", "networks": ATTACHED}))
    assert run(metal, call({"name": "a2", "networks": ATTACHED})) == []
    run(metal, call({"name": "a0", "networks": ATTACHED}))
    spec = json.loads(metal.read("/var/lib/agentfleet/microvms/a0/spec.json"))
    assert spec["networks"][0]["address"] == "10.88.0.4"


def test_a_changed_spec_restarts_only_when_allowed(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    bigger = {"name": "a1", "memory": "512MiB"}
    assert words(run(metal, call(bigger))) == ["define microVM a1", "reload systemd"]
    resource = MicroVms(metal, call(bigger))
    assert resource.plan(resource.observe()) == []
    assert resource.result(resource.observe())["instances"][0]["restart_required"] is True
    assert words(run(metal, call(bigger, allow_restart=True))) == ["stop microVMs", "start microVMs"]
    assert run(metal, call(bigger, allow_restart=True)) == []


def test_changed_environment_is_a_changed_command_line(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    changed = call({"name": "a1", "environment": {"ROLE": "x"}}, allow_restart=True)
    assert words(run(metal, changed)) == ["define microVM a1", "reload systemd", "stop microVMs", "start microVMs"]
    assert len([n for n in metal.names("/var/lib/agentfleet/microvms/a1") if n.startswith("config-")]) == 1


def test_stopped_and_present(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    assert "stop microVMs" in words(run(metal, call({"name": "a1"}, state="stopped")))
    assert metal.systemd.active == {}
    assert "start microVMs" not in words(run(metal, call({"name": "a1"}, state="present")))


def test_only_those_that_shall_are_started_at_boot(metal: t.Any) -> None:
    wants = "/etc/systemd/system/agentfleet-microvms.target.wants"
    run(metal, call({"name": "a1"}, {"name": "a2", "autostart": False}))
    assert metal.names(wants) == ["agentfleet-microvm@a1.service"]
    assert set(metal.systemd.active) == {"a1", "a2"}
    assert words(run(metal, call({"name": "a1", "autostart": False}))) == [
        "define microVM a1", "reload systemd", "disable microVMs at boot",
    ]  # fmt: skip
    assert metal.names(wants) == [] and "a1" in metal.systemd.active


@pytest.mark.parametrize("said", [{}, {"hugepages": "2MiB"}, {"numa_node": 0}])
def test_memory_of_what_runs_counts_however_it_was_started(metal: t.Any, said: dict[str, t.Any]) -> None:
    metal.files(
        {
            "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "2048",
            "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 4194304 kB\n",
        }
    )
    first, second = ({"name": name, "memory": "3GiB", "autostart": False, **said} for name in ("a1", "a2"))
    run(metal, call(first))
    with pytest.raises(Refused, match="does not fit: the microVMs up to a2 take 6144 MiB of 4096 MiB"):
        run(metal, call(second, memory_overcommit=9 if "numa_node" in said else 1))
    run(metal, call(first, state="stopped"))
    assert "start microVMs" in words(run(metal, call(second)))


def test_huge_pages_of_a_numa_node_are_those_that_it_has(metal: t.Any) -> None:
    pages = "hugepages/hugepages-2048kB/nr_hugepages"
    metal.files({f"/sys/kernel/mm/{pages}": "1024"})
    for node, count in enumerate(("1024", "0")):
        directory = f"/sys/devices/system/node/node{node}"
        metal.files({f"{directory}/{pages}": count, f"{directory}/meminfo": f"Node {node} MemTotal: 4194304 kB\n"})
    bound = {"memory": "1GiB", "hugepages": "2MiB", "numa_node": 1}
    with pytest.raises(Refused, match="1024 MiB of 0 MiB in huge pages of 2MiB on NUMA node 1") as refused:
        run(metal, call({"name": "a1", **bound}))
    assert "more huge pages there" in refused.value.remedy
    run(metal, call({"name": "a1", **bound, "numa_node": 0}, {"name": "a2", **bound, "numa_node": 0}))
    with pytest.raises(Refused, match="3072 MiB of 2048 MiB in huge pages of 2MiB"):
        run(metal, call({"name": "a3", **bound, "numa_node": None}))


def test_absent_leaves_nothing(metal: t.Any) -> None:
    metal.files({"/srv/models": None})
    run(
        metal, call({"name": "a1", "shares": [{"tag": "m", "source": "/srv/models", "target": None, "readonly": True}]})
    )
    assert metal.names("/var/lib/agentfleet/shares") == ["a1:m.env"]
    run(metal, {**call(), "state": "absent", "instances": [{"name": "a1"}]})
    (stop,) = [line for line in metal.calls if line.startswith("systemctl stop")]
    assert stop.endswith("agentfleet-default.slice agentfleet.slice agentfleet-microvms.target")
    assert metal.systemd.active == {}
    for path in ("/var/lib/agentfleet/microvms", "/var/lib/agentfleet/shares", "/etc/modules-load.d"):
        assert metal.names(path) == []
    assert [n for n in metal.names("/etc/systemd/system") if not n.endswith(".wants")] == []
    assert run(metal, {**call(), "state": "absent", "instances": [{"name": "a1"}]}) == []


def test_absent_clears_up_after_an_end_that_did_not(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}, {"name": "a2"}))
    metal.files({f"/run/agentfleet/{name}.taps": TAP for name in ("a1", "a2", "old", "unknown")})
    metal.systemd.active["unknown"] = 99  # "old" has gone long ago
    metal.answers["/usr/local/lib/agentfleet/microvm-taps"] = ""
    run(metal, {**call(), "state": "absent", "instances": [{"name": "a1"}]})
    assert [line for line in metal.calls if "microvm-taps" in line] == [
        f"/usr/local/lib/agentfleet/microvm-taps down {name}" for name in ("a1", "old")
    ]


@pytest.mark.parametrize("name", _microvm_names.RESERVED)
def test_a_name_that_a_directory_of_all_has_is_refused_and_can_be_removed(metal: t.Any, name: str) -> None:
    with pytest.raises(Refused, match=f"/run/agentfleet/{name} is a directory of all microVMs"):
        MicroVms(metal, call({"name": name}))
    run(metal, call({"name": "a1"}))
    spec = json.loads(metal.read("/var/lib/agentfleet/microvms/a1/spec.json"))  # one of an older version
    metal.files({f"/var/lib/agentfleet/microvms/{name}/spec.json": json.dumps({**spec, "name": name})})
    metal.files({f"/run/agentfleet/{name}/of-a1": ""})
    run(metal, {**call(state="absent"), "instances": [{"name": name}]})
    assert list(_microvm_state.declared(metal)) == ["a1"] and metal.exists(f"/run/agentfleet/{name}/of-a1")


def test_absent_of_one_keeps_the_others(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}, {"name": "a2", "tenant": "other"}))
    (step,) = run(metal, {**call(), "state": "absent", "instances": [{"name": "a1"}]})
    assert step.data == (["a1"], ["agentfleet-default.slice"], [])
    assert list(_microvm_state.declared(metal)) == ["a2"]
    assert metal.exists("/etc/systemd/system/agentfleet-microvm@.service")


def test_what_does_not_stop_is_not_removed(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "volumes": [{"name": "data", "size": "1MiB"}]}, {"name": "a2"}))
    files = {path: metal.names(path) for path in ("/var/lib/agentfleet/microvms/a1", "/var/lib/agentfleet/volumes/a1")}
    metal.answers["systemctl stop"] = lambda host: (
        host.systemd.active.pop("a2", None),
        (124, "", "no end after 420 s"),
    )[1]
    absent = {**call(state="absent", delete_volumes=True), "instances": [{"name": "a1"}, {"name": "a2"}]}
    with pytest.raises(HostError, match=r"^a1 did not stop \(no end after 420 s\), so that nothing is removed"):
        run(metal, absent)
    assert all(metal.names(path) == found for path, found in files.items()) and "a2" in _microvm_state.declared(metal)
    metal.answers["systemctl stop"] = metal.systemd.stop
    run(metal, absent)
    assert not any(map(metal.exists, files))


def test_nor_is_what_systemd_gave_up_and_still_lives(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "tenant": "red", "volumes": [{"name": "data", "size": "1MiB"}]}))
    procs = "/sys/fs/cgroup/agentfleet.slice/agentfleet-red.slice/agentfleet-microvm@a1.service/cgroup.procs"
    metal.files({procs: "4711\n"})
    absent = {**call(state="absent", delete_volumes=True), "instances": [{"name": "a1"}]}
    for _again in range(2):  # for systemd it is stopped
        with pytest.raises(HostError, match=r"^a1 did not stop .*, so that nothing is removed"):
            run(metal, absent)
        assert metal.systemd.active == {} and metal.names("/var/lib/agentfleet/volumes/a1") == ["data"]
    metal.files({procs: ""})
    run(metal, absent)
    assert not metal.exists("/var/lib/agentfleet/volumes/a1")


def test_a_failed_start_that_does_not_stop_is_told_too(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: None)
    metal.answers["systemctl stop"] = (124, "", "no end")
    resource = MicroVms(metal, call({"name": "a1", "volumes": [{"name": "data", "size": "1MiB"}]}))
    steps = resource.plan(resource.observe())
    with pytest.raises(HostError, match="a1 did not stop"):
        apply_all(resource, steps)
    assert "no answer from its agent" in resource.failure()["instances"][0]["error"]
    assert metal.names("/var/lib/agentfleet/volumes/a1") == ["data"]


def test_a_failed_start_is_undone_and_explained(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: None)
    monkeypatch.setattr(_microvm_state, "console", lambda _host, _name: "agentfleet: no /dev/pmem0")
    with pytest.raises(
        HostError, match=r"microVM a1: no answer from its agent within 1 seconds\. Console: agentfleet: no"
    ):
        run(metal, call({"name": "a1"}))
    assert metal.systemd.active == {}
    assert metal.names("/var/lib/agentfleet/microvms") == []
    assert metal.names("/etc/systemd/system/agentfleet-microvms.target.wants") == []
    stop = [line for line in metal.calls if line.startswith("systemctl stop")][-1]
    assert stop.endswith("microvm@a1.service agentfleet-default.slice agentfleet.slice")


def test_a_failed_start_takes_the_volumes_that_it_made_and_no_others(metal: t.Any, monkeypatch: t.Any) -> None:
    run(metal, call({"name": "a0"}))
    metal.files({"/var/lib/agentfleet/volumes/a1/old": "what somebody wrote"})
    os.truncate(metal.path("/var/lib/agentfleet/volumes/a1/old"), 1 << 20)
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: None)
    disks = {name: [{"name": name, "size": "1MiB"}] for name in ("old", "new")}
    with pytest.raises(HostError, match="microVM a1: no answer.*microVM a2: no answer"):
        run(
            metal,
            call(
                {"name": "a1", "volumes": disks["old"] + disks["new"]},
                {"name": "a2", "volumes": disks["new"], "tenant": "other"},
            ),
        )
    assert metal.names("/var/lib/agentfleet/volumes") == ["a1"]
    assert metal.names("/var/lib/agentfleet/volumes/a1") == ["old"]
    assert metal.read("/var/lib/agentfleet/volumes/a1/old").startswith("what somebody wrote")
    stop = [line for line in metal.calls if line.startswith("systemctl stop")][-1]
    assert stop.endswith("microvm@a1.service agentfleet-microvm@a2.service agentfleet-other.slice")


def test_a_failed_restart_keeps_what_the_microvm_has(metal: t.Any, monkeypatch: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: None)
    with pytest.raises(HostError, match="no answer"):
        run(metal, call({"name": "a1", "volumes": [{"name": "new", "size": "1MiB"}]}, allow_restart=True))
    assert metal.names("/var/lib/agentfleet/volumes/a1") == ["new"]
    assert list(_microvm_state.declared(metal)) == ["a1"]


def test_of_many_each_ones_fate_is_told(metal: t.Any, monkeypatch: t.Any) -> None:
    class Module:
        check_mode, params, outcome = False, {}, {}  # type: t.Any, t.Any, t.Any
        _name = "agentfleet.metal.microvm"

        def fail_json(self, **outcome: t.Any) -> t.NoReturn:
            self.outcome = outcome
            raise SystemExit(1)

    def agent(_host: t.Any, spec: t.Any, *_more: t.Any) -> dict[str, str] | None:
        return None if spec["name"] == "a2" else {"hostname": spec["name"]}

    monkeypatch.setattr(_microvm_state, "ask_agent", agent)
    monkeypatch.setattr(_microvm_state, "console", lambda _host, _name: "agentfleet: no /dev/pmem0")
    module = Module()
    with pytest.raises(SystemExit):
        converge(module, lambda: MicroVms(metal, call({"name": "a1"}, {"name": "a2"}, {"name": "a3"})))
    told = {one["name"]: (one["state"], one["error"][:42]) for one in module.outcome["instances"]}
    assert told == {
        "a1": ("running", ""), "a2": ("absent", "no answer from its agent within 1 seconds."), "a3": ("running", ""),
    }  # fmt: skip
    assert "microVM a2: no answer" in module.outcome["msg"]


def test_a_first_boot_that_failed_is_a_warning(metal: t.Any, monkeypatch: t.Any) -> None:
    def agent(_host: t.Any, spec: t.Any, *_more: t.Any) -> dict[str, str]:
        return {"hostname": spec["name"], "first_boot_failed": {"a1": "user-data", "a2": ""}[spec["name"]]}

    monkeypatch.setattr(_microvm_state, "ask_agent", agent)
    resource = MicroVms(metal, call({"name": "a1"}, {"name": "a2"}))
    apply_all(resource, resource.plan(resource.observe()))
    told = resource.result(resource.observe())
    (warning,) = told["warnings"]
    assert warning.startswith("microVM a1 runs, but of its first boot 'user-data' failed")
    assert [(one["state"], one["error"]) for one in told["instances"]] == [("running", "")] * 2


def test_command_line(microvm_spec: t.Any) -> None:
    share = {"tag": "m", "source": "/srv", "target": "/mnt/m", "readonly": True, "dax": "never"}
    text = " ".join(_qemu.command({**microvm_spec, "shares": [share]}))
    assert (
        f"mem-path=/var/lib/agentfleet/images/{DIGEST}/rootfs.erofs,size=85983232,share=off,readonly=on,rom=on" in text
    )
    assert "-m size=268435456B,maxmem=2415919104B" in text
    assert "memory-backend-memfd,id=ram0,size=268435456,share=on" in text
    private = " ".join(_qemu.command({**microvm_spec, "thp": True}))
    assert "share=on" not in private and "readonly=on,rom=off" in private
    assert "vhost-vsock-pci,guest-cid=77" in private


def test_unit_command_quoting() -> None:
    assert _microvm_units.quoted(["/bin/x", "a b", 'q"', "50%", "$HOME", "file=%d/c"]) == (
        '/bin/x "a b" "q\\"" 50%% $$HOME file=%d/c'
    )


def test_configuration_disk_is_sourced_by_a_shell(metal: t.Any) -> None:
    resource = MicroVms(metal, call({"name": "a1", "networks": ATTACHED, "environment": {"K": "it's $HOME"}}))
    resource.plan(resource.observe())
    text = _microvm_data.config(resource.specs["a1"])
    assert len(text) % 512 == 0
    script = (
        text
        + """echo "$agentfleet_hostname|$agentfleet_networks|$(eval env "$agentfleet_environment" 'printenv K')|$K"\n"""
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    mac = resource.specs["a1"]["networks"][0]["mac"]
    assert done.stdout == f"a1|{mac} 10.88.0.2/24 10.88.0.1|it's $HOME|\n"


def test_a_path_does_not_hide_what_the_guest_needs(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "environment": {"PATH": "/opt/venv/bin", "N": 5}}))
    found = json.loads(metal.read("/var/lib/agentfleet/microvms/a1/spec.json"))["environment"]
    assert found == {"N": "5", "PATH": f"/opt/venv/bin:{_early_init.SYSTEM_PATH}"}


def test_a_vmm_that_ends_is_noticed_at_once(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, *_more: None)
    metal.answers["systemctl start"] = ""  # comes back, but the process is not there
    with pytest.raises(HostError, match="microVM a1: the VMM ended"):
        run(metal, call({"name": "a1"}, ready_timeout_seconds=3600))


def test_a_vmm_that_ends_while_its_guest_boots_is_awaited_through_its_restart(metal: t.Any, monkeypatch: t.Any) -> None:
    states = ["deactivating", "activating", "active"]

    def show(_host: t.Any) -> str:
        state = states.pop(0) if "a1" in metal.systemd.active else "inactive"
        return f"Id=agentfleet-microvm@a1.service\nActiveState={state}\nResult=success\nMainPID=0\nNRestarts=1"

    metal.answers["systemctl show"] = show
    monkeypatch.setattr(_microvm, "LOOK_SECONDS", 0)
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *_more: None if states else {"hostname": "a1"})
    assert words(run(metal, call({"name": "a1"})))[-1] == "start microVMs"
    assert states == [] and "a1" in metal.systemd.active


def test_each_has_its_own_unprivileged_user_and_its_limits(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "tenant": "blue"}, {"name": "a2"}))
    texts = [
        metal.read(f"/etc/systemd/system/agentfleet-microvm@{n}.service.d/60-agentfleet.conf") for n in ("a1", "a2")
    ]
    users = {line for text in texts for line in text.splitlines() if line.startswith("User=af")}
    assert len(users) == 2
    assert "Slice=agentfleet-blue.slice\n" in texts[0]
    assert "MemoryMax=555745280" in texts[0].splitlines()  # guest RAM, image, overhead
    assert "DynamicUser=yes" in metal.read("/etc/systemd/system/agentfleet-microvm@.service")


# -- what runs is changed ------------------------------------------------------------


class FakeMachine:
    """A running machine that writes down what is asked of it."""

    def __init__(self, asked: list[str], states: dict[str, str], name: str) -> None:
        self.asked, self.states, self.name = asked, states, name

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def state(self) -> str:
        return self.states.get(self.name, "running")

    def pause(self) -> None:
        self.states[self.name] = "paused"

    def resume(self) -> None:
        self.states.pop(self.name, None)

    def change(self, change: t.Any, _spec: t.Any) -> None:
        self.asked.append(f"{self.name}: {change}")

    def settle(self, change: t.Any) -> None:
        """Nothing to wait for."""


@pytest.fixture
def machines(metal: t.Any, monkeypatch: t.Any) -> t.Any:
    """The host, with machines that take every change."""
    metal.asked, states = [], {}
    monkeypatch.setattr(_qemu, "machine", lambda host, spec: FakeMachine(metal.asked, states, spec["name"]))
    metal.answers["/usr/local/lib/agentfleet/microvm-taps"] = ""
    metal.files({"/run/agentfleet/a1": None})
    return metal


def test_what_can_be_applied_live_is_and_then_nothing_is_left(machines: t.Any) -> None:
    before = {"name": "a1", "vcpus_max": 4, "memory_max": "512MiB", "hotplug_slots": 2}
    run(machines, call(before))
    after = {
        **before, "vcpus": 2, "memory": "384MiB", "volumes": [{"name": "data", "size": "1GiB"}],
        "networks": ATTACHED,
    }  # fmt: skip
    steps = run(machines, call(after))
    assert words(steps) == [
        "create volume a1/data", "define microVM a1", "reload systemd", "define network agents", "change microVMs",
    ]  # fmt: skip
    assert sorted(machines.asked) == [
        "a1: memory_bytes 268435456 -> 402653184", "a1: networks agents added", "a1: vcpus 1 -> 2",
        "a1: volumes data added",
    ]  # fmt: skip
    assert "/usr/local/lib/agentfleet/microvm-taps up a1 /run/agentfleet/a1.change/taps" in machines.calls
    assert not machines.exists("/run/agentfleet/a1.change")
    assert run(machines, call(after)) == []
    resource = MicroVms(machines, call(after))
    resource.plan(resource.observe())
    assert resource.result(resource.observe())["instances"][0]["restart_required"] is False


def test_cpus_that_were_there_at_the_start_go_with_a_restart_alone(machines: t.Any) -> None:
    for most in ({"vcpus_max": 8}, {}):
        run(machines, call({"name": "a1", "vcpus": 4, **most}, allow_restart=True))
        params = call({"name": "a1", "vcpus": 2, **most})
        assert words(run(machines, params)) == ["define microVM a1", "reload systemd"]
        resource = MicroVms(machines, params)
        resource.plan(resource.observe())
        (reason, *_more) = resource.result(resource.observe())["instances"][0]["restart_reasons"]
        assert reason == "vcpus 4 -> 2: the 4 virtual CPUs that it was started with stay"
        assert words(run(machines, {**params, "allow_restart": True})) == ["stop microVMs", "start microVMs"]
    assert machines.asked == []


MODELS = {
    digest: {
        "files": {"rootfs.erofs": {"size_bytes": 2 << 20}},
        "definition": {"data": True, "filesystem": "erofs", "dax": True},
        "definition_digest": digest[::-1],
    }
    for digest in ("12" * 32, "34" * 32)
}


@pytest.fixture
def models(machines: t.Any) -> t.Any:
    """The host, with two images of data: the name ``model`` means the first."""
    for digest, manifest in MODELS.items():
        machines.files({f"/var/lib/agentfleet/images/{digest}/manifest.json": json.dumps(manifest)})
        with open(machines.path(f"/var/lib/agentfleet/images/{digest}/rootfs.erofs"), "wb") as file:
            file.truncate(2 << 20)
    machines.files({"/var/lib/agentfleet/images/names/model": f"-> ../{'12' * 32}"})
    return machines


def test_an_image_of_data_is_in_the_configuration_and_counts(models: t.Any) -> None:
    run(models, call({"name": "a1", "data_images": [{"image": "model", "target": "/opt/model"}]}))
    spec = json.loads(models.read("/var/lib/agentfleet/microvms/a1/spec.json"))
    assert f"agentfleet_images='{'21' * 16} /opt/model erofs ro,dax=always'\n" in _microvm_data.config(spec)
    drop_in = models.read("/etc/systemd/system/agentfleet-microvm@a1.service.d/60-agentfleet.conf")
    assert f"MemoryMax={555745280 + (2 << 20)}" in drop_in.splitlines()


def test_an_image_of_data_comes_while_it_runs(models: t.Any, monkeypatch: t.Any) -> None:
    told: list[t.Any] = []
    run(models, call({"name": "a1", "hotplug_slots": 1}))
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *given: told.append(given[3:]) or {"hostname": "a1"})
    params = call({"name": "a1", "hotplug_slots": 1, "data_images": [{"image": "model", "target": "/opt/model"}]})
    assert words(run(models, params)) == ["define microVM a1", "reload systemd", "change microVMs"]
    assert models.asked == [f"a1: data_images {'12' * 32} added"]
    assert any(f"MemoryMax={555745280 + (2 << 20)} " in line for line in models.calls if "set-property" in line)
    line = f"{'21' * 16} /opt/model erofs ro,dax=always"
    assert told == [("/attached", {"cpus": 0, "networks": [], "images": [line], "shares": [], "volumes": []})]
    assert run(models, params) == []


def test_a_guest_is_told_by_the_cid_that_it_runs_with(models: t.Any, monkeypatch: t.Any) -> None:
    cids: list[int] = []
    run(models, call({"name": "a1", "hotplug_slots": 1, "cid": 7}))
    monkeypatch.setattr(
        _microvm_state, "ask_agent", lambda _host, spec, *_more: cids.append(spec["cid"]) or {"hostname": "a1"}
    )
    image = [{"image": "model", "target": "/opt/model"}]
    run(models, call({"name": "a1", "hotplug_slots": 1, "cid": 8, "data_images": image}))
    assert cids == [7]


def test_what_a_running_one_has_nobody_else_gets_before_its_restart(metal: t.Any) -> None:
    def one(name: str, cid: int | None, address: str | None = None, mac: str | None = None) -> dict[str, t.Any]:
        return {"name": name, "cid": cid, "networks": [{"network": "agents", "address": address, "mac": mac}]}

    run(metal, call(one("x", 5, mac="02:00:00:00:00:05"), one("y", 6)))
    run(metal, call(one("x", 7, "10.88.0.50", "02:00:00:00:00:07")))  # waits for its restart
    for new, what in (
        (one("z", 5), "microVM x has it"),
        (one("z", 7), "microVM x has it"),
        (one("z", 8, "10.88.0.2"), "microVM x has it"),
        (one("z", 8, None, "02:00:00:00:00:05"), "x has it"),
    ):
        with pytest.raises(Refused, match=what):
            run(metal, call(new))
    run(metal, call(one("z", 8)))
    assert json.loads(metal.read("/run/agentfleet/z.spec.json"))["networks"][0]["address"] == "10.88.0.4"
    assert run(metal, call(one("z", 8))) == []
    back = call(one("x", 5, "10.88.0.2", "02:00:00:00:00:05"))  # its own
    assert words(run(metal, back)) == ["define microVM x", "reload systemd"] and run(metal, back) == []
    swapped = one("x", 6, "10.88.0.3", "02:00:00:00:00:05"), one("y", 5, "10.88.0.2")
    with pytest.raises(Refused, match="microVM y has it"):
        run(metal, call(*swapped))
    run(metal, call(*swapped, allow_restart=True))
    assert run(metal, call(*swapped)) == []
    run(metal, call(one("x", 9), state="stopped"))
    run(metal, call(one("v", 6)))


def test_the_answer_of_another_one_is_not_its_own(metal: t.Any, monkeypatch: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    said = {"hostname": "a1"}
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *_given: said)
    with pytest.raises(HostError, match="microVM a2: no answer from its agent"):
        run(metal, call({"name": "a2"}))
    said["hostname"] = "renamed.example.com"
    run(metal, call({"name": "a2"}))


def test_one_that_boots_already_is_awaited_by_the_cid_that_it_runs_with(metal: t.Any, monkeypatch: t.Any) -> None:
    cids: list[int] = []
    run(metal, call({"name": "a1", "cid": 7}))
    metal.files({"/run/agentfleet/slots/a1": "1\n"})
    answers = iter([None, {"hostname": "a1"}])
    monkeypatch.setattr(
        _microvm_state, "ask_agent", lambda _host, spec, *_more: cids.append(spec["cid"]) or next(answers)
    )
    assert words(run(metal, call({"name": "a1", "cid": 8})))[-1] == "start microVMs"
    assert cids == [7, 7]


def test_a_name_that_moved_is_another_image(models: t.Any) -> None:
    params = call({"name": "a1", "hotplug_slots": 1, "data_images": [{"image": "model", "target": "/opt/model"}]})
    run(models, params)
    models.files({"/var/lib/agentfleet/images/names/model": f"-> ../{'34' * 32}"})
    resource = MicroVms(models, params)
    resource.plan(resource.observe())
    assert resource.result(resource.observe())["instances"][0]["restart_reasons"] == [
        f"data_images {'12' * 32} removed: QEMU takes no image away from a running machine",
        f"data_images {'34' * 32} added: another image is mounted there, which QEMU does not take away",
    ]


def test_an_image_that_cannot_be_what_is_wished(models: t.Any) -> None:
    twice = [{"image": "model", "target": "/a"}, {"image": "12" * 32, "target": "/b"}]
    for instance, option, problem in (
        ({"data_images": twice}, "data_images[1].image", "has it already"),
        ({"data_images": [{"image": "agent", "target": "/a"}]}, "data_images[0].image", "has it already"),
        (
            {"data_images": [{"image": "other", "target": "/a"}]},
            "data_images[0].image",
            "not in the host's image store",
        ),
        ({"image": "model"}, "image", "an image of data, which has no kernel"),
        ({"kernel": "model"}, "kernel", "an image of data, which has no kernel"),
    ):
        resource = MicroVms(models, call({"name": "a1", **instance}))
        with pytest.raises(Refused, match=problem) as refused:
            resource.plan(resource.observe())
        assert refused.value.option == f"instances[0].{option}"
    os.truncate(models.path(f"/var/lib/agentfleet/images/{'12' * 32}/rootfs.erofs"), 5)
    resource = MicroVms(models, call({"name": "a1", "data_images": twice[:1]}))
    with pytest.raises(Refused, match="missing or damaged"):
        resource.plan(resource.observe())


ARGUMENTS_OF = {
    "own": ["root=/dev/pmem0", "rootfstype=erofs", "init=/usr/lib/agentfleet/early-init"],
    "plain": ["root=/dev/pmem0", "rootfstype=ext4", "init=/usr/lib/agentfleet/early-init"],
}


@pytest.fixture
def kernels(metal: t.Any) -> t.Any:
    """The host, with a kernel of its own and images: ``own`` and ``plain`` (ext4, no DAX) need no initramfs."""
    for number, (name, definition, verity) in enumerate(
        (
            ("own", {"filesystem": "erofs", "dax": True}, ""),
            ("plain", {"filesystem": "ext4", "dax": False}, ""),
            ("packaged", {"filesystem": "erofs", "dax": True}, ""),
            ("packaged2", {"filesystem": "erofs", "dax": True}, ""),
            ("nodax", {"filesystem": "erofs", "dax": False}, ""),
            ("verified", {"filesystem": "erofs", "dax": False}, "0 8 verity ..."),
        )
    ):
        digest = f"{number + 10:x}" * 64
        files = {"rootfs.erofs": {"size_bytes": 2 << 20}, **({} if name in ARGUMENTS_OF else {"initrd": {}})}
        manifest = {"files": files, "definition": definition, "verity": verity}
        manifest["kernel_arguments"] = ARGUMENTS_OF.get(name, [])
        directory = "/var/lib/agentfleet/images"
        metal.files(
            {f"{directory}/{digest}/manifest.json": json.dumps(manifest), f"{directory}/{digest}/rootfs.erofs": ""}
        )
        metal.files({f"{directory}/names/{name}": f"-> ../{digest}"})
        os.truncate(metal.path(f"{directory}/{digest}/rootfs.erofs"), 2 << 20)
    return metal.files({"/boot/vmlinux": ""})


@pytest.mark.parametrize(
    ("image", "kernel", "initrd", "arguments"),
    [
        ("own", "", False, "own"),
        ("own", "/boot/vmlinux", False, "own"),
        ("plain", "/boot/vmlinux", False, "plain"),
        ("plain", "own", False, "plain"),  # the kernel mounts the image's file system, not that of its own image
        ("packaged", "", True, ""),
        ("packaged", "packaged2", True, ""),
        ("own", "packaged", True, ""),
    ],
)
def test_a_kernel_starts_the_image_that_it_is_given_to(
    kernels: t.Any, image: str, kernel: str, initrd: bool, arguments: str
) -> None:
    run(kernels, call({"name": "a1", "image": image, "kernel": kernel, "kernel_arguments": ["quiet"]}))
    spec = json.loads(kernels.read("/var/lib/agentfleet/microvms/a1/spec.json"))
    of = kernels.link_name(f"/var/lib/agentfleet/images/names/{kernel or image}")
    if kernel.startswith("/"):
        assert spec["kernel"] == kernel
    else:
        assert spec["kernel"] == f"/var/lib/agentfleet/images/{of}/kernel"
    assert spec["initrd"] == (f"/var/lib/agentfleet/images/{of}/initrd" if initrd else "")
    assert spec["kernel_arguments"] == [*ARGUMENTS_OF.get(arguments, []), "quiet"]


@pytest.mark.parametrize(
    ("image", "kernel", "problem"),
    [
        ("packaged", "/boot/vmlinux", "does not start without one. Build the image with kernel_source"),
        ("packaged", "own", "does not start without one. Build the image with kernel_source"),
        ("packaged", "nodax", "its initramfs mounts nodax, in another way"),
        ("packaged", "verified", "its initramfs mounts verified, in another way"),
        ("nodax", "packaged", "its initramfs mounts packaged, in another way"),
        ("nodax", "verified", "its initramfs mounts verified, in another way"),
        ("verified", "nodax", "its initramfs mounts nodax, in another way"),
        ("plain", "packaged", "its initramfs mounts packaged, in another way"),
    ],
)
def test_a_kernel_that_could_not_start_the_image_is_refused(
    kernels: t.Any, image: str, kernel: str, problem: str
) -> None:
    resource = MicroVms(kernels, call({"name": "a1", "image": image, "kernel": kernel}))
    with pytest.raises(Refused, match=problem) as refused:
        resource.plan(resource.observe())
    assert (refused.value.option, refused.value.value) == ("instances[0].kernel", kernel)


def test_a_share_that_comes_is_mounted_and_one_that_goes_is_unmounted_before(
    machines: t.Any, monkeypatch: t.Any
) -> None:
    shares = [{"tag": tag, "source": f"/srv/{tag}"} for tag in ("models", "tools", "data")]
    machines.files({f"/srv/{share['tag']}": None for share in shares})
    run(machines, call({"name": "a1", "hotplug_slots": 2, "shares": shares[:2]}))

    def agent(_host: t.Any, spec: t.Any, _seconds: float = 0, path: str = "/", message: t.Any = None) -> dict[str, str]:
        machines.asked.append(f"{path} {message}")
        return {"error": "Device or resource busy"} if busy and path == "/detaching" else {"hostname": spec["name"]}

    monkeypatch.setattr(_microvm_state, "ask_agent", agent)
    params, busy = call({"name": "a1", "hotplug_slots": 2, "shares": shares[1:]}), True
    with pytest.raises(HostError, match="let go of shares models: Device or resource busy. End what uses it there"):
        run(machines, params)
    machines.asked.clear()
    busy = False
    run(machines, params)
    assert machines.asked == [
        "/detaching {'targets': ['/mnt/models']}", "a1: shares models removed", "a1: shares data added",
        "/attached {'cpus': 0, 'networks': [], 'images': [], 'shares': ['data /mnt/data ro'], 'volumes': []}",
    ]  # fmt: skip


def test_a_volume_that_grows_is_filled_by_its_guest(machines: t.Any, monkeypatch: t.Any) -> None:
    """Unless the guest has no file system of its own on it, or cannot write it."""
    machines.files({"/srv/models": "x"})
    volumes: list[dict[str, t.Any]] = [
        {"name": "root", "writable_layer": True}, {"name": "data", "mount": "/data", "filesystem": "xfs"}, {"name": "raw"},
        {"name": "models", "mount": "/models", "template": "/srv/models", "readonly": True},
    ]  # fmt: skip

    def sized(size: str) -> dict[str, t.Any]:
        return call({"name": "a1", "volumes": [{**volume, "size": size} for volume in volumes]})

    def agent(_host: t.Any, spec: t.Any, _seconds: float = 0, path: str = "/", message: t.Any = None) -> dict[str, str]:
        machines.asked.append((path, message))
        return {"hostname": spec["name"]}

    run(machines, sized("1MiB"))
    monkeypatch.setattr(_microvm_state, "ask_agent", agent)
    run(machines, sized("2MiB"))
    assert machines.asked[:-1] == [f"a1: volumes {name} changed" for name in ("root", "data", "raw", "models")]
    path, message = machines.asked[-1]
    assert (path, message["volumes"]) == ("/attached", ["root ext4 2097152", "data xfs 2097152"])
    assert run(machines, sized("2MiB")) == []


def test_limits_of_what_runs_are_set_at_once_and_written_down_once(machines: t.Any) -> None:
    run(machines, call({"name": "a1"}))
    machines.files({"/run/systemd/system.control/agentfleet-microvm@a1.service.d/50-CPUWeight.conf": ""})
    params = call({"name": "a1", "resources": {"cpu_weight": 50}})
    assert words(run(machines, params))[-1] == "change microVMs"
    (line,) = [line for line in machines.calls if line.startswith("systemctl set-property")]
    assert line.endswith("agentfleet-microvm@a1.service MemoryMax=555745280 CPUWeight=50 CPUQuota= IOWeight= TasksMax=")
    assert machines.names("/run/systemd/system.control") == []
    assert run(machines, params) == []


def test_an_interrupted_change_goes_on_where_it_was(machines: t.Any, monkeypatch: t.Any) -> None:
    before = {"name": "a1", "vcpus_max": 4, "memory_max": "512MiB"}
    after = call({**before, "vcpus": 2, "memory": "384MiB"})
    run(machines, call(before))
    take = FakeMachine.change

    def fail(self: FakeMachine, change: t.Any, spec: t.Any) -> None:
        if change.key == "memory_bytes":
            raise HostError("no memory")
        take(self, change, spec)

    monkeypatch.setattr(FakeMachine, "change", fail)
    with pytest.raises(HostError, match="no memory"):
        run(machines, after)
    monkeypatch.setattr(FakeMachine, "change", take)
    (step,) = run(machines, after)
    assert step.after == {"a1": ["memory_bytes 268435456 -> 402653184", "vcpus taken into use"]}
    assert machines.asked == ["a1: vcpus 1 -> 2", "a1: memory_bytes 268435456 -> 402653184"]


def test_one_that_does_not_change_stops_no_other(machines: t.Any, monkeypatch: t.Any) -> None:
    machines.files({"/run/agentfleet/a2": None})
    before = {"vcpus_max": 4, "hotplug_slots": 1, "networks": ATTACHED}
    run(machines, call({"name": "a1", **before}, {"name": "a2", **before}))
    machines.files({"/run/agentfleet/a1.taps": TAP})
    take = FakeMachine.change

    def fail(self: FakeMachine, change: t.Any, spec: t.Any) -> None:
        if self.name == "a1":
            raise HostError("the guest did not let it go")
        take(self, change, spec)

    monkeypatch.setattr(FakeMachine, "change", fail)
    after = {"vcpus_max": 4, "hotplug_slots": 1, "networks": []}
    given = call({"name": "a1", **after}, {"name": "a2", **after, "vcpus": 2}, {"name": "a3"}, state="paused")
    resource = MicroVms(machines, given)
    steps = resource.plan(resource.observe())
    assert words(steps)[-4:] == ["change microVMs", "start microVMs", "pause microVMs", "define networks"]
    with pytest.raises(HostError, match="change microVMs: microVM a1: the guest did not let it go. Done besides: "):
        apply_all(resource, steps)
    assert machines.asked == ["a2: networks agents removed", "a2: vcpus 1 -> 2"]
    assert [(one["state"], one["error"]) for one in resource.failure()["instances"]] == [
        ("running", "the guest did not let it go"), ("paused", ""), ("paused", ""),
    ]  # fmt: skip
    assert policies(machines) == ["agentfleet0.nft"]  # a1 is on it


def test_what_the_agent_did_not_take_is_told_again_until_it_does(models: t.Any, monkeypatch: t.Any) -> None:
    before = {"name": "a1", "vcpus_max": 4, "hotplug_slots": 4}
    run(models, call(before))
    told: list[t.Any] = []
    answers: list[t.Any] = [None, {"error": "no such device"}, {"hostname": "a1"}]

    def agent(_host: t.Any, _spec: t.Any, _seconds: float = 0, path: str = "/", message: t.Any = None) -> t.Any:
        if path != "/attached":
            return {"hostname": "a1"}
        told.append(message)
        return answers.pop(0)

    monkeypatch.setattr(_microvm_state, "ask_agent", agent)
    image = [{"image": "model", "target": "/opt/model"}]
    params = call({**before, "vcpus": 2, "networks": ATTACHED, "data_images": image})
    what = f"vcpus, networks agents, data_images {'12' * 32}"
    for why in ("no answer", "no such device"):
        resource = MicroVms(models, params)
        with pytest.raises(HostError, match="Run this again"):
            apply_all(resource, resource.plan(resource.observe()))
        (found,) = resource.failure()["instances"]
        assert sorted(found["error"].partition(": ")[0].removeprefix("its agent does not use ").split(", ")) == sorted(
            what.split(", ")
        )
        assert found["error"].endswith(f": {why}. Run this again")
    assert len(models.asked) == 3  # attached once
    (step,) = run(models, params)
    assert step.verb == "change" and sorted(step.after["a1"]) == [
        f"data_images {'12' * 32} taken into use", "networks agents taken into use", "vcpus taken into use",
    ]  # fmt: skip
    assert told[0] == told[1] == told[2]
    assert len(told[0]["networks"]) == len(told[0]["images"]) == 1 and told[0]["shares"] == []
    assert told[0]["cpus"] == 2
    assert run(models, params) == []


def test_what_comes_to_a_guest_that_stands_still_is_used_when_it_runs(machines: t.Any, monkeypatch: t.Any) -> None:
    more = {"name": "a1", "hotplug_slots": 1, "memory_max": "512MiB", "networks": ATTACHED}
    run(machines, call({**more, "networks": []}, state="paused"))
    paths: list[t.Any] = []
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *given: paths.append(given[3:4]) or {"hostname": "a1"})
    resource = MicroVms(machines, call(more, state="paused"))
    apply_all(resource, resource.plan(resource.observe()))
    assert resource.result(resource.observe())["warnings"] == [
        "microVM a1 is paused: a call with state running has it use networks agents"
    ]
    assert run(machines, call(more, state="paused")) == [] and ("/attached",) not in paths
    for option, value in (("memory", "384MiB"), ("balloon", "64MiB")):
        with pytest.raises(Refused, match="takes no memory until it runs") as refused:
            run(machines, call({**more, option: value}, state="paused"))
        assert refused.value.option == f"instances[0].{option}"
    run(machines, call(more, state="present"))  # as it was declared
    assert words(run(machines, call(more))) == ["resume microVMs", "change microVMs"]
    assert paths.count(("/attached",)) == 1
    assert run(machines, call(more)) == []


def test_of_what_a_guest_did_in_part_the_record_has_that_part(machines: t.Any, monkeypatch: t.Any) -> None:
    before = {"name": "a1", "vcpus_max": 4, "memory_max": "512MiB"}
    run(machines, call({**before, "memory": "256MiB"}))
    settle, told = FakeMachine.settle, []

    def fall_short(_self: FakeMachine, change: t.Any) -> None:
        if change.key == "memory_bytes":
            raise _vmm.Unfinished(300 << 20, "the guest came to 300 of 384 MiB")

    monkeypatch.setattr(FakeMachine, "settle", fall_short)
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *given: told.append(given[3:4]) or {"hostname": "a1"})
    after = call({**before, "memory": "384MiB", "vcpus": 2})
    with pytest.raises(HostError, match="microVM a1: the guest came to 300 of 384 MiB$"):
        run(machines, after)
    assert ("/attached",) in told  # it has the CPUs all the same
    assert _microvm_state.running(machines, ["a1"])["a1"]["memory_bytes"] == 300 << 20
    monkeypatch.setattr(FakeMachine, "settle", settle)
    (step,) = run(machines, after)
    assert step.after == {"a1": [f"memory_bytes {300 << 20} -> {384 << 20}"]}
    assert run(machines, after) == []


def test_who_waits_for_a_restart_is_named_in_a_warning_without_values(machines: t.Any) -> None:
    run(machines, call({"name": "a1"}, {"name": "a2"}, {"name": "a3"}))
    secret = {"environment": {"TOKEN": "s3cret"}}
    params = call({"name": "a1", **secret}, {"name": "a2", **secret}, {"name": "a3", "thp": True})
    run(machines, params)

    def warnings(**more: t.Any) -> t.Any:
        resource = MicroVms(machines, {**params, **more})
        resource.predicting = True
        resource.plan(resource.observe())
        return resource.result(resource.observe())["warnings"]

    assert warnings() == [
        "until they are restarted, as with allow_restart, these run as they were declared before: "
        "a1, a2 (environment: QEMU reads environment when it starts); a3 (thp: QEMU reads thp when it starts)"
    ]
    assert warnings(allow_restart=True) == warnings(state="restarted") == warnings(state="stopped") == []
    run(machines, {**params, "allow_restart": True})
    assert warnings() == []


@pytest.mark.parametrize(
    ("params", "wish"),
    [({}, {"vcpus": 2}), ({"state": "paused"}, {})],
)
def test_one_that_ended_since_it_was_seen_is_an_error_of_its_own(
    machines: t.Any, params: dict[str, t.Any], wish: dict[str, t.Any]
) -> None:
    run(machines, call({"name": "a1", "vcpus_max": 4}))
    resource = MicroVms(machines, call({"name": "a1", "vcpus_max": 4, **wish}, **params))
    steps = resource.plan(resource.observe())
    machines.remove("/run/agentfleet/a1.spec.json")
    with pytest.raises(HostError, match="microVM a1: it ended while this was done"):
        apply_all(resource, steps)
    assert "ended while this was done" in resource.failure()["instances"][0]["error"]


@pytest.mark.parametrize(("method", "said"), [("change", "nobody listens"), ("__enter__", ENDED)])
def test_a_change_that_finds_no_vmm_is_an_error_of_its_own(
    machines: t.Any, monkeypatch: t.Any, method: str, said: str
) -> None:
    def gone(_self: t.Any, *_arguments: t.Any) -> None:
        raise ConnectionRefusedError("nobody listens")

    run(machines, call({"name": "a1", "vcpus_max": 4}))
    resource = MicroVms(machines, call({"name": "a1", "vcpus_max": 4, "vcpus": 2}))
    steps = resource.plan(resource.observe())
    monkeypatch.setattr(FakeMachine, method, gone)
    with pytest.raises(HostError, match=said):
        apply_all(resource, steps)
    assert resource.failure()["instances"][0]["error"] == said


def test_what_cannot_be_applied_is_named_with_its_reason(machines: t.Any) -> None:
    run(machines, call({"name": "a1"}))
    params = call({"name": "a1", "volumes": [{"name": "data", "size": "1GiB"}], "environment": {"A": "b"}})
    assert words(run(machines, params)) == ["create volume a1/data", "define microVM a1", "reload systemd"]
    resource = MicroVms(machines, params)
    assert resource.plan(resource.observe()) == []
    assert resource.result(resource.observe())["instances"][0]["restart_reasons"] == [
        "volumes data added: it was started without hotplug_slots",
        "environment {} -> {'A': 'b'}: QEMU reads environment when it starts",
    ]


OTHER = {"name": "others", "prefix": "10.89.0.0/24", "bridge": "agentfleet1"}
TAP = "af1 02:00:00:00:00:01 agentfleet0 02:00:00:00:00:02 10.88.0.1/24 -\n"


def policies(host: t.Any) -> list[str]:
    return t.cast("list[str]", host.names("/var/lib/agentfleet/networks"))


@pytest.mark.parametrize("networks", [[], [{"network": "others", "address": None}]])
def test_a_network_that_a_microvm_leaves_only_by_a_restart_is_filtered_until_then(
    machines: t.Any, networks: list[t.Any]
) -> None:
    machines.answers["nft"] = ""
    run(machines, call({"name": "a1", "networks": ATTACHED}))
    machines.files({"/run/agentfleet/a1.taps": TAP})
    after = {"networks": [NETWORK, OTHER]}
    left = call({"name": "a1", "networks": networks}, **after)
    run(machines, left)
    assert "agentfleet0.nft" in policies(machines)
    assert run(machines, left) == []
    # Others that come and go meanwhile do not take it away.
    run(machines, call({"name": "a2"}, **after))
    run(machines, {**call(), "state": "absent", "instances": [{"name": "a2"}]})
    assert "agentfleet0.nft" in policies(machines)
    stop, take = machines.systemd.stop, "/run/agentfleet/a1.taps"
    machines.answers["systemctl stop"] = lambda host: (host.remove(take), stop(host))[1]
    restarted = run(machines, {**left, "allow_restart": True})
    assert words(restarted) == ["stop microVMs", "start microVMs", "define networks"]
    assert "agentfleet0.nft" not in policies(machines)
    assert run(machines, {**left, "allow_restart": True}) == []


def test_a_network_that_comes_does_not_bring_what_waits_for_a_restart(machines: t.Any) -> None:
    both = {"networks": [NETWORK, OTHER]}
    run(machines, call({"name": "a1", "hotplug_slots": 2, "networks": ATTACHED}, **both))
    (taps,) = machines.glob("/var/lib/agentfleet/microvms/a1/taps-????????????")
    before = machines.read(taps)
    told: list[str] = []
    machines.answers["/usr/local/lib/agentfleet/microvm-taps"] = lambda host: (
        told.extend(host.read(f"/run/agentfleet/a1.change/{file}") for file in ("taps", "taps.nft")), ""
    )[1]  # fmt: skip
    moved = {**ATTACHED[0], "address": "10.88.0.9", "mac": "02:00:00:00:00:09"}
    after = call(
        {
            "name": "a1",
            "hotplug_slots": 2,
            "networks": [moved, {**moved, "network": "others", "mac": None, "address": None}],
        },
        **both,
    )
    (change,) = [step for step in run(machines, after) if step.verb == "change"]
    assert change.after == {"a1": ["networks others added"]}
    taps, rules = told
    assert [line.split()[2] for line in taps.splitlines()] == ["agentfleet0", "agentfleet1"]
    assert taps.splitlines()[0] == before
    assert "10.88.0.2" in rules and "10.89.0.2" in rules and "10.88.0.9" not in rules
    assert run(machines, after) == []


def test_a_network_that_a_microvm_leaves_as_it_runs_goes_at_once(machines: t.Any) -> None:
    machines.answers["nft"] = ""
    run(machines, call({"name": "a1", "hotplug_slots": 2, "networks": ATTACHED}))
    machines.files({"/run/agentfleet/a1.taps": TAP})
    taps = "/usr/local/lib/agentfleet/microvm-taps"
    machines.answers[taps] = lambda host: (host.remove("/run/agentfleet/a1.taps"), "")[1]
    steps = run(machines, call({"name": "a1", "hotplug_slots": 2}))
    assert words(steps)[-2:] == ["change microVMs", "define networks"]
    assert policies(machines) == []


def test_paused_and_on(machines: t.Any) -> None:
    assert words(run(machines, call({"name": "a1"}, state="paused")))[-2:] == ["start microVMs", "pause microVMs"]
    assert run(machines, call({"name": "a1"}, state="paused")) == []
    resource = MicroVms(machines, call({"name": "a1"}, state="paused"))
    resource.plan(resource.observe())
    assert resource.result(resource.observe())["instances"][0]["state"] == "paused"
    assert words(run(machines, call({"name": "a1"}))) == ["resume microVMs"]
    assert run(machines, call({"name": "a1"})) == []


def test_a_guest_goes_on_before_something_is_taken_away(machines: t.Any) -> None:
    more, less = ({"name": "a1", "hotplug_slots": 1, "networks": networks} for networks in (ATTACHED, []))
    run(machines, call(more, state="paused"))
    for state in ("paused", "present"):
        with pytest.raises(Refused, match="microVM a1 is paused, and lets nothing go") as refused:
            run(machines, call(less, state=state))
        assert (refused.value.option, refused.value.value) == ("instances[0].networks", "agents")
    assert machines.asked == []
    verbs = [step.verb for step in run(machines, call(less))]
    assert verbs.index("resume") < verbs.index("change")
    assert machines.asked == ["a1: networks agents removed"]
    run(machines, call(less, state="paused"))
    assert "change microVMs" in words(run(machines, call(more, state="paused")))  # what comes can wait for it
    assert "stop microVMs" in words(run(machines, call(less, state="restarted")))


def test_the_node_of_a_device_is_taken_back_whatever_becomes_of_it(machines: t.Any, monkeypatch: t.Any) -> None:
    address, given = "0000:41:00.0", []
    resource = MicroVms(machines, call({"name": "a1"}))
    machines.files({f"/sys/bus/pci/devices/{address}/iommu_group": "-> ../../../kernel/iommu_groups/7"})
    machines.files({"/run/agentfleet/a1.devices": "0000:42:00.0\n"})
    monkeypatch.setattr(_microvm.os, "chown", lambda path, user, _group: given.append((path, user)))
    spec = {"name": "a1", "driver": "qemu", "devices": [], "networks": []}
    machines.files({"/run/agentfleet/a1.spec.json": json.dumps(spec)})

    def fail(_self: FakeMachine, _change: t.Any, _spec: t.Any) -> None:
        raise HostError("QEMU did not answer device_add within 90 seconds")

    resource.specs["a1"] = {**spec, "devices": [address]}  # type: ignore[typeddict-item]
    take = FakeMachine.change
    monkeypatch.setattr(FakeMachine, "change", fail)
    add = _vmm.Change("devices", address, None, address)
    for _run in range(2):
        with pytest.raises(HostError, match="did not answer"):
            resource._apply_change({"a1": ([add], True)})
        resource.errors.clear()
        assert machines.read("/run/agentfleet/a1.devices").split() == [address, "0000:42:00.0"]
    monkeypatch.setattr(FakeMachine, "change", take)
    resource._apply_change({"a1": ([add], True)})
    allow = ["systemctl", "set-property", "--runtime", "agentfleet-microvm@a1.service", "DeviceAllow=char-vfio rw"]
    assert machines.calls.count(" ".join(allow)) == 3
    assert machines.read("/run/agentfleet/a1.devices").split() == [address, "0000:42:00.0"]
    resource._apply_change({"a1": ([_vmm.Change("devices", address, address, None)], True)})
    assert machines.read("/run/agentfleet/a1.devices").split() == ["0000:42:00.0"]
    node, owner = machines.path("/dev/vfio/7"), os.stat(machines.path("/run/agentfleet/a1")).st_uid
    assert given == [(node, owner)] * 3 + [(node, 0)]


def test_restarted_stops_what_runs_and_starts_all(machines: t.Any) -> None:
    run(machines, call({"name": "a1"}))
    steps = run(machines, call({"name": "a1"}, {"name": "a2"}, state="restarted"))
    assert [(step.verb, step.before or step.after) for step in steps if step.verb in ("stop", "start")] == [
        ("stop", ["a1"]), ("start", ["a1", "a2"]),
    ]  # fmt: skip


def test_what_an_interrupted_call_left_booting_is_waited_for(metal: t.Any, monkeypatch: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    metal.files({"/run/agentfleet/slots/a1": "1\n"})
    assert run(metal, call({"name": "a1"})) == []  # it answers
    answers = iter([None, {"hostname": "a1"}])
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *_more: next(answers))
    assert words(run(metal, call({"name": "a1"}))) == ["start microVMs"]
    assert not metal.exists("/run/agentfleet/slots/a1")


def test_one_that_stands_still_or_has_long_booted_is_not_waited_for(machines: t.Any, monkeypatch: t.Any) -> None:
    params = call({"name": "a1"}, state="paused")
    run(machines, params)
    # Started by systemd, which leaves the slot: with the host, or after its VMM had ended.
    machines.files({"/run/agentfleet/slots/a1": "100\n", "/proc/uptime": "100.5 1\n"})
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *_more: None)
    assert run(machines, params) == []
    assert words(run(machines, call({"name": "a1"}))) == ["resume microVMs"]
    machines.files({"/proc/uptime": "101.5 1\n"})
    assert run(machines, call({"name": "a1"})) == []


def test_one_that_ran_before_is_not_stopped_when_it_stays_silent(metal: t.Any, monkeypatch: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    metal.files({"/run/agentfleet/slots/a1": "100\n", "/proc/uptime": "100.5 1\n"})
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda *_more: None)
    with pytest.raises(
        HostError, match="no answer from its agent within 1 seconds; it ran before this call and is not"
    ):
        run(metal, call({"name": "a1"}))
    assert "a1" in metal.systemd.active and list(_microvm_state.declared(metal)) == ["a1"]
    with pytest.raises(HostError, match=r"no answer from its agent within 1 seconds\. Console"):
        run(metal, call({"name": "a1"}, state="restarted"))
    assert metal.systemd.active == {}


DROP_IN = "/etc/systemd/system/agentfleet-microvm@a1.service.d/60-agentfleet.conf"


def test_what_was_written_and_not_read_is_read_by_the_next_call(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    metal.files({DROP_IN: "of an older version of this collection"})
    metal.answers["systemctl daemon-reload"] = (124, "", "no end after 300 s")
    with pytest.raises(HostError, match="no end after 300 s"):
        run(metal, call({"name": "a1"}))
    metal.answers["systemctl daemon-reload"] = ""
    assert words(run(metal, call({"name": "a1"}))) == ["reload systemd"]
    assert run(metal, call({"name": "a1"})) == [] and metal.glob("/run/agentfleet/*.pending") == []


def started_by(host: t.Any, drop_in: str) -> list[t.Any]:
    """What a start finds by the drop-in that systemd has: spec, taps, devices and the configuration disk."""
    home = "/var/lib/agentfleet/microvms/a1"
    definition = re.findall("Environment=DEFINITION=([0-9a-f]{12})\n", drop_in)[0]
    spec = json.loads(host.read(f"{home}/spec-{definition}.json"))
    disk = re.findall(f"LoadCredential={spec['config']}:(.*)\n", drop_in)[0]
    return [spec, *(host.read(path) for path in (f"{home}/taps-{definition}", f"{home}/devices-{definition}", disk))]


def test_a_start_finds_what_belongs_to_the_command_line_that_systemd_has(metal: t.Any) -> None:
    for number in (0, 1):
        metal.files({f"/sys/bus/pci/devices/0000:0{number}:00.0/driver": "-> ../../../bus/pci/drivers/vfio-pci"})
    run(metal, call({"name": "a1", "networks": ATTACHED, "devices": ["0000:00:00.0"]}))
    path = "/etc/systemd/system/agentfleet-microvm@a1.service.d/60-agentfleet.conf"
    old = metal.read(path) + "\n"
    before, names = started_by(metal, old), metal.names("/var/lib/agentfleet/microvms/a1")
    address = [{"network": "agents", "address": "10.88.0.9"}]
    changed = call({"name": "a1", "networks": address, "devices": ["0000:01:00.0"], "environment": {"ROLE": "x"}})
    metal.answers["systemctl daemon-reload"] = (124, "", "no end after 300 s")
    with pytest.raises(HostError, match="no end after 300 s"):
        run(metal, changed)
    assert started_by(metal, old) == before  # it starts again now
    new = started_by(metal, metal.read(path) + "\n")  # or after a boot
    assert new[0]["networks"][0]["address"] == "10.88.0.9" and new[2] == "0000:01:00.0" and "ROLE" in new[3]
    metal.answers["systemctl daemon-reload"] = ""
    assert words(run(metal, changed)) == ["define microVM a1", "reload systemd"]
    assert len(metal.names("/var/lib/agentfleet/microvms/a1")) == len(names)
    assert started_by(metal, metal.read(path) + "\n") == new
    assert run(metal, changed) == []
    resource = MicroVms(metal, changed)
    resource.plan(resource.observe())
    assert resource.result(resource.observe())["instances"][0]["restart_required"]


def test_a_policy_that_was_written_and_not_loaded_is_loaded_by_the_next_call(machines: t.Any) -> None:
    run(machines, call({"name": "a1", "networks": ATTACHED}))
    machines.files({"/run/agentfleet/a1.taps": "af1 m1 agentfleet0 n0 10.88.0.1/24 -\n"})
    machines.answers["nft -t list table"] = ""
    params = call({"name": "a1", "networks": ATTACHED}, networks=[{**NETWORK, "egress": "nat"}])
    machines.answers["/usr/local/lib/agentfleet/microvm-taps load"] = (1, "", "Resource busy")
    with pytest.raises(HostError, match="Resource busy"):
        run(machines, params)
    machines.answers["/usr/local/lib/agentfleet/microvm-taps load"] = ""
    assert words(run(machines, params)) == ["load packet filter"]
    assert run(machines, params) == []
    params["parallel"] += 1  # no rule of the filter
    assert words(run(machines, params)) == ["prepare host for microVMs", "reload systemd"]
    assert run(machines, params) == []


def test_who_changes_microvms_waits_for_who_saves_one_and_who_looks_does_not(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm, "LOCK_SECONDS", 0)
    saving = Snapshots(metal, {"state": "present", "snapshots": [], "verify": False, "timeout_seconds": 1})
    changing = MicroVms(metal, call({"name": "a1"}))
    with saving.alone(), pytest.raises(HostError, match="the end of another call"), changing.alone():
        raise AssertionError("one would resume what the other saves")
    with changing.alone():
        assert not hasattr(MicrovmInfo(metal, None, 5), "alone")


def test_an_older_start_without_a_record_is_restarted_only_when_allowed(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}))
    metal.remove("/run/agentfleet/a1.spec.json")
    assert run(metal, call({"name": "a1"})) == []
    assert words(run(metal, call({"name": "a1"}, allow_restart=True))) == ["stop microVMs", "start microVMs"]


# -- templates, volumes, first-boot data -----------------------------------------------


def test_count_makes_as_many(metal: t.Any) -> None:
    params = call({"name": "agent-{index:03d}", "count": 12, "networks": ATTACHED}, memory_overcommit=2)
    run(metal, params)
    assert list(_microvm_state.declared(metal))[::11] == ["agent-001", "agent-012"]
    assert run(metal, params) == []
    (step,) = run(metal, call({"name": "agent-{index:03d}", "count": 12}, state="absent"))
    assert len(step.before) == 12 and metal.names("/var/lib/agentfleet/microvms") == []


def test_starts_are_as_few_commands_as_turns(metal: t.Any) -> None:
    run(metal, call({"name": "a-{index}", "count": 6}, parallel=3))
    starts = [line for line in metal.calls if line.startswith("systemctl start")]
    assert [line.count("microvm@") for line in starts] == [3, 3]
    assert metal.read("/usr/local/lib/agentfleet/microvm-parallel") == "3"


def test_ram_in_run_counts_that_of_other_calls(metal: t.Any, monkeypatch: t.Any) -> None:
    room = os.statvfs_result((4096, 1 << 20, 700, 700, 700, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: room)
    run(metal, call({"name": "a1", "memory": "512MiB", "snapshots": True}))
    params = call({"name": "a2", "memory": "256MiB", "snapshots": True})
    with pytest.raises(Refused, match="room for 636 MiB of guests' RAM, and 768 MiB are declared"):
        run(metal, params)
    assert run(metal, call({"name": "a1", "memory": "512MiB", "snapshots": True})) == []
    larger = call(
        {"name": "a1", "memory": "1GiB", "snapshots": True}, state="stopped"
    )  # as an older version let it run
    assert "stop microVMs" in words(run(metal, larger))
    run(metal, call({"name": "a1", "memory": "512MiB", "snapshots": True}, state="absent"))
    assert run(metal, params)


def test_volumes_grow_stay_and_go_only_when_told(metal: t.Any) -> None:
    metal.files({"/srv/template": "x" * 3000})
    volume = {"name": "data", "size": "1MiB", "template": "/srv/template"}
    run(metal, call({"name": "a1", "volumes": [volume]}))
    path = metal.path("/var/lib/agentfleet/volumes/a1/data")
    with open(path, "rb") as file:
        assert file.read() == b"x" * 3000 + bytes((1 << 20) - 3000)
    steps = run(metal, call({"name": "a1", "volumes": [{**volume, "size": "2MiB"}]}, state="stopped"))
    (grown,) = [step for step in steps if step.verb == "grow"]
    assert (grown.before, grown.after["size"]) == ({"size": "1MiB"}, "2MiB")
    with pytest.raises(Refused, match=r"the volume has 2MiB.*only grow") as refused:
        run(metal, call({"name": "a1", "volumes": [volume]}))
    assert refused.value.option == "instances[0].volumes[0].size"
    run(metal, call({"name": "a1"}, state="absent"))
    assert metal.names("/var/lib/agentfleet/volumes/a1") == ["data"]
    assert run(metal, call({"name": "a1"}, state="absent")) == []
    (step,) = run(metal, call({"name": "a1"}, state="absent", delete_volumes=True))
    assert step.before == {"a1": {"data": "2MiB"}} and step.disruptive
    assert not metal.exists("/var/lib/agentfleet/volumes")


# In a mount namespace of its own: two volumes of one template, the second one larger; how much each took of the disk.
ON_A_FILE_SYSTEM = """
import os, subprocess, sys
from ansible_collections.agentfleet.metal.plugins.module_utils import _host, _microvm_volumes
top, filesystem = sys.argv[1:]
subprocess.run([f"mkfs.{filesystem}", "-q", f"{top}/disk"], check=True, stdout=subprocess.DEVNULL)
if subprocess.run(["mount", "-o", "loop", f"{top}/disk", f"{top}/mnt"]).returncode:
    sys.exit(77)
host, volumes = _host.Host(f"{top}/mnt"), "/var/lib/agentfleet/volumes"
def used():
    os.sync()
    found = os.statvfs(host.path("/"))
    return (found.f_blocks - found.f_bfree) * found.f_frsize >> 20
content = os.urandom(64 << 20)
with open(host.path("/template"), "wb") as file:
    file.write(content)
before = used()
_microvm_volumes.create(host, f"{volumes}/a1/data", 64 << 20, "/template")
_microvm_volumes.create(host, f"{volumes}/a2/data", 80 << 20, "/template")
print(used() - before)
with open(host.path(f"{volumes}/a1/data"), "r+b") as file:
    file.write(bytes(16 << 20))
print(used() - before)
for path, wanted in (
    ("/template", content),
    (f"{volumes}/a1/data", bytes(16 << 20) + content[16 << 20 :]),
    (f"{volumes}/a2/data", content + bytes(16 << 20)),
):
    with open(host.path(path), "rb") as file:
        print(file.read() == wanted)
"""


@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"])
def test_a_volume_shares_its_templates_blocks_until_it_is_written(tmp_path: Path, filesystem: str) -> None:
    if os.geteuid() or not shutil.which(f"mkfs.{filesystem}"):
        pytest.skip(f"root and mkfs.{filesystem} are needed")
    (tmp_path / "mnt").mkdir()
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(350 << 20)
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace is needed")
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", ON_A_FILE_SYSTEM, str(tmp_path), filesystem],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(_vmm.__file__).parents[5]), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(f"a loop device with {filesystem} does not mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    shared, written, *same = done.stdout.split()
    assert int(shared) < 8 and 16 <= int(written) < 24 and same == ["True"] * 3


@pytest.mark.parametrize("verb", ["create", "grow", "give"])
def test_volumes_are_no_way_out_of_a_vmms_directory(metal: t.Any, verb: str) -> None:
    metal.files({"/etc/shadow": "secret", "/run/agentfleet/a1": None, "/var/lib/agentfleet/volumes/a1": None})
    volume, before = "/var/lib/agentfleet/volumes/a1/data", os.stat(metal.path("/etc/shadow"))
    planted = f"{volume}.partial" if verb == "create" else volume
    os.symlink(metal.path("/etc/shadow"), metal.path(planted))
    if verb == "create":
        _microvm_volumes.create(metal, volume, 4096, "")
        assert not os.path.islink(metal.path(volume)) and metal.names("/var/lib/agentfleet/volumes/a1") == ["data"]
        assert os.stat(metal.path(volume)).st_mode & 0o777 == 0o600
    else:
        arguments = (volume, 4096) if verb == "grow" else ("a1", volume)
        with pytest.raises(HostError, match="data: a link, which is not followed"):
            getattr(_microvm_volumes, verb)(metal, *arguments)
    assert os.stat(metal.path("/etc/shadow")).st_ctime_ns == before.st_ctime_ns


def test_a_volume_that_is_lost_is_not_made_anew(metal: t.Any) -> None:
    params = call({"name": "a1", "volumes": [{"name": "data", "size": "1MiB"}]})
    run(metal, params)
    metal.remove("/var/lib/agentfleet/volumes/a1/data")  # its disk is not mounted
    with pytest.raises(
        Refused, match="it was made before, and /var/lib/agentfleet/volumes/a1/data is not there"
    ) as refused:
        run(metal, params)
    assert refused.value.option == "instances[0].volumes[0].name"
    resource = MicroVms(metal, params)
    resource.predicting = True  # an earlier task may mount it
    resource.plan(resource.observe())
    assert "is not there; an earlier task is expected to correct it" in resource.warnings[0]
    run(metal, call({"name": "a1"}))
    assert "create volume a1/data" in words(run(metal, params))


def test_a_template_larger_than_its_volume_is_refused(metal: t.Any) -> None:
    metal.files({"/srv/template": None})
    with open(metal.path("/srv/big"), "wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(Refused, match="its template has 2MiB"):
        run(metal, call({"name": "a1", "volumes": [{"name": "data", "size": "1MiB", "template": "/srv/big"}]}))


SECRET = "correct horse battery staple"


def test_first_boot_data_is_the_same_each_time_and_never_shown(metal: t.Any) -> None:
    data = {"files": [{"path": "/etc/agent/token", "content": SECRET, "mode": "0640"}], "run": [f"echo {SECRET}"]}
    params = call({"name": "a1", "user_data": data})
    steps = run(metal, params)
    assert SECRET not in json.dumps([step.public() for step in steps])
    (name,) = [n for n in metal.names("/var/lib/agentfleet/microvms/a1") if n.startswith("data-")]
    path = metal.path(f"/var/lib/agentfleet/microvms/a1/{name}")
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.path.getsize(path) % 512 == 0
    with tarfile.open(path) as tar:
        assert [(one.name, one.mode, one.mtime) for one in tar.getmembers()] == [
            ("etc/agent/token", 0o640, 0), ("usr/lib/agentfleet/firstboot.d/user-data", 0o700, 0),
        ]  # fmt: skip
        assert SECRET in tar.extractfile("usr/lib/agentfleet/firstboot.d/user-data").read().decode()  # type: ignore
    drop_in = metal.read("/etc/systemd/system/agentfleet-microvm@a1.service.d/60-agentfleet.conf")
    assert f"LoadCredential={name}:/var/lib/agentfleet/microvms/a1/{name}" in drop_in and SECRET not in drop_in
    assert run(metal, params) == []
    again = call({"name": "a1", "user_data": {**data, "run": []}})
    (step,) = [step for step in run(metal, again) if step.verb == "define"]
    assert step.before["data"] != step.after["data"]


def test_the_configuration_disk_names_volumes_and_the_writable_layer(metal: t.Any) -> None:
    volumes = [
        {"name": "root", "size": "1GiB", "writable_layer": True},
        {"name": "data", "size": "1GiB", "mount": "/data", "filesystem": "xfs"},
        {"name": "raw", "size": "1GiB"},
    ]
    resource = MicroVms(metal, call({"name": "a1", "volumes": volumes}))
    resource.plan(resource.observe())
    text = _microvm_data.config(resource.specs["a1"])
    assert "agentfleet_upper=root\n" in text and "agentfleet_volumes='data /data xfs mkfs,grow'\n" in text


def test_resources_and_restart_policy_are_the_unit_s(metal: t.Any) -> None:
    resources = {"cpu_weight": 50, "cpu_quota_percent": 150, "memory_max": "1GiB", "io_weight": 10, "tasks_max": 64}
    run(metal, call({"name": "a1", "resources": resources, "restart_policy": "never", "balloon": "64MiB"}))
    lines = metal.read("/etc/systemd/system/agentfleet-microvm@a1.service.d/60-agentfleet.conf").splitlines()
    assert {
        "CPUWeight=50", "CPUQuota=150%", f"MemoryMax={1 << 30}", "IOWeight=10", "TasksMax=64", "Restart=no",
        "ExecStartPost=+/usr/local/lib/agentfleet/microvm-unit settle %i",
    } <= set(lines)  # fmt: skip


def test_what_units_run_is_complete_on_the_host(metal: t.Any) -> None:
    """The copied code imports nothing that was not copied with it, and nothing of Ansible."""
    run(metal, call({"name": "a1"}))
    library = metal.path(_microvm_units.CODE_PATH)
    script = metal.read(f"{_microvm_names.LIBRARY}/microvm-unit").replace(
        f'"{_microvm_units.CODE_PATH}"', repr(library)
    )
    program = metal.path("/program")
    with open(program, "w", encoding="utf-8") as file:
        file.write(script)
    argv = [sys.executable, "-IS", program, "settle", "nobody"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
