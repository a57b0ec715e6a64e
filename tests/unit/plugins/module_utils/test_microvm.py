# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""MicroVMs: what is derived, what is planned, and that a second run plans nothing."""

from __future__ import annotations

import json
import subprocess
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _microvm_data,
    _microvm_state,
    _microvm_units,
    _qemu,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm import MicroVms
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Step
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
        return "\n\n".join(
            f"Id=agentfleet-microvm@{name}.service\nActiveState={'active' if name in self.active else 'inactive'}\n"
            f"Result=success\nMainPID={self.active.get(name, 0)}\nNRestarts=0"
            for name in self._names()
        )

    def start(self, host: t.Any) -> str:
        for name in self._names():
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
            "/usr/sbin/ip": "",
            "/usr/sbin/bridge": "",
            "/usr/sbin/nft": "",
        }
    )
    with open(fake_host.path(f"/var/lib/agentfleet/images/{DIGEST}/rootfs.erofs"), "wb") as file:
        file.truncate(82 << 20)
    fake_host.systemd = Systemd(fake_host)
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, timeout_seconds=5: {"hostname": spec["name"]})
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


def test_absent_of_one_keeps_the_others(metal: t.Any) -> None:
    run(metal, call({"name": "a1"}, {"name": "a2", "tenant": "other"}))
    (step,) = run(metal, {**call(), "state": "absent", "instances": [{"name": "a1"}]})
    assert step.data == (["a1"], ["agentfleet-default.slice"], [])
    assert list(_microvm_state.declared(metal)) == ["a2"]
    assert metal.exists("/etc/systemd/system/agentfleet-microvm@.service")


def test_a_failed_start_is_undone_and_explained(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, timeout_seconds=5: None)
    monkeypatch.setattr(_qemu, "console", lambda host, run: "agentfleet: no /dev/pmem0")
    with pytest.raises(
        HostError, match=r"microVM a1: no answer from its agent within 1 seconds\. Console: agentfleet: no"
    ):
        run(metal, call({"name": "a1"}))
    assert metal.systemd.active == {}
    assert metal.names("/var/lib/agentfleet/microvms") == []


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
    script = text + 'echo "$agentfleet_hostname|$agentfleet_networks|$K"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    mac = resource.specs["a1"]["networks"][0]["mac"]
    assert done.stdout == f"a1|{mac} 10.88.0.2/24 10.88.0.1|it's $HOME\n"


def test_a_vmm_that_ends_is_noticed_at_once(metal: t.Any, monkeypatch: t.Any) -> None:
    monkeypatch.setattr(_microvm_state, "ask_agent", lambda host, spec, timeout_seconds=5: None)
    metal.answers["systemctl start"] = ""  # comes back, but the process is not there
    with pytest.raises(HostError, match="microVM a1: the VMM ended"):
        run(metal, call({"name": "a1"}, ready_timeout_seconds=3600))


def test_each_has_its_own_unprivileged_user_and_its_limits(metal: t.Any) -> None:
    run(metal, call({"name": "a1", "tenant": "blue"}, {"name": "a2"}))
    texts = [
        metal.read(f"/etc/systemd/system/agentfleet-microvm@{n}.service.d/60-agentfleet.conf") for n in ("a1", "a2")
    ]
    users = {line for text in texts for line in text.splitlines() if line.startswith("User=af")}
    assert len(users) == 2
    assert "Slice=agentfleet-blue.slice\n" in texts[0]
    assert "MemoryMax=555745280\n" in texts[0]  # guest RAM, image, overhead
    assert "DynamicUser=yes" in metal.read("/etc/systemd/system/agentfleet-microvm@.service")
