# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._sriov import SriovVfs
from ansible_collections.agentfleet.metal.tests.unit.pci_lab import DEVICES, LabHost

IGB = "0000:00:07.0"
STATE = "/etc/agentfleet/sriov.json"
# what iproute2 6.15 printed for an igb with two VFs, shortened
SHOWN = {"vf": 0, "link_type": "ether", "vlan_list": [{}], "spoofchk": True, "link_state": "auto", "trust": False}


@pytest.fixture
def lab(tmp_path: t.Any) -> LabHost:
    return LabHost(str(tmp_path))


def plan(host: LabHost, *functions: dict[str, t.Any], **desired: t.Any) -> list[Step]:
    resource = SriovVfs(host, {"functions": list(functions), **desired})
    return resource.plan(resource.observe())


def run(host: LabHost, *functions: dict[str, t.Any], **desired: t.Any) -> dict[str, t.Any]:
    resource = SriovVfs(host, {"functions": list(functions), **desired})
    apply_all(resource, resource.plan(resource.observe()))
    unit = "/etc/systemd/system/multi-user.target.wants/agentfleet-restore.service"
    if not host.exists(unit):
        host.files({unit: ""})
    return resource.result(resource.observe())


def numvfs_writes(host: LabHost) -> list[str]:
    return [call.split()[-1] for call in host.calls if "sriov_numvfs <-" in call]


def test_vfs_are_made_without_the_kernels_driver_and_a_second_run_plans_nothing(lab: LabHost) -> None:
    wish = {"pf": "8086:10c9", "vfs": 2}
    assert run(lab, wish)["functions"] == [
        {"pf": IGB, "driver": "igb", "totalvfs": 7, "vfs": ["0000:00:17.0", "0000:00:17.2"], "autoprobe": False}
    ]
    writes = [call for call in lab.calls if "<-" in call]
    assert writes == [f"{DEVICES}/{IGB}/sriov_drivers_autoprobe <- 0", f"{DEVICES}/{IGB}/sriov_numvfs <- 2"]
    assert json.loads(lab.read(STATE)) == {
        "functions": [{"pf": IGB, "vfs": 2, "autoprobe": False}],
        "wait_seconds": 60,
    }
    assert plan(lab, wish) == []


def test_a_number_changes_through_zero(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    step = plan(lab, {"pf": IGB, "vfs": 3})[0]
    assert (step.verb, step.before, step.after, step.disruptive) == ("resize", 1, 3, True)
    run(lab, {"pf": IGB, "vfs": 3})
    assert numvfs_writes(lab) == ["1", "0", "3"]


def test_a_refused_number_is_undone(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    lab.failing = {3}
    with pytest.raises(HostError, match="It has 1 VFs as before"):
        run(lab, {"pf": IGB, "vfs": 3})
    assert lab.read(f"{DEVICES}/{IGB}/sriov_numvfs") == "1"
    assert json.loads(lab.read(STATE))["functions"][0]["vfs"] == 1


def test_zero_is_forgotten_at_boot(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    run(lab, {"pf": IGB, "vfs": 0})
    assert not lab.exists(STATE)
    assert plan(lab, {"pf": IGB, "vfs": 0}) == []


def test_settings_of_each_vf_go_to_its_switch(lab: LabHost) -> None:
    wish = {"pf": IGB, "vfs": 2, "mac_prefix": "02:00:00:00:07", "vlan": 100, "trust": True, "spoofchk": False}
    run(lab, wish)
    assert [call for call in lab.calls if call.startswith("ip link set")] == [
        f"ip link set dev enp0s7 vf {i} vlan 100 trust on spoofchk off mac 02:00:00:00:07:0{i}" for i in (0, 1)
    ]
    settled = {**SHOWN, "vlan_list": [{"vlan": 100}], "trust": True, "spoofchk": False}
    shown = [{**settled, "vf": i, "address": f"02:00:00:00:07:0{i}"} for i in (0, 1)]
    lab.answers["ip -json link show"] = json.dumps([{"ifname": "enp0s7", "vfinfo_list": shown}])
    assert plan(lab, wish) == []
    shown[1]["address"] = "02:00:00:00:07:99"
    lab.answers["ip -json link show"] = json.dumps([{"ifname": "enp0s7", "vfinfo_list": shown}])
    (step,) = plan(lab, wish)
    assert (step.object, step.before["mac"], step.after["mac"]) == (
        f"{IGB} VF 1",
        "02:00:00:00:07:99",
        "02:00:00:00:07:01",
    )


def test_a_vf_whose_interface_is_up_goes_only_with_the_option(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    lab.files(
        {
            "/sys/devices/pci0000:00/0000:00:17.0/net/eth0/flags": "0x1003",
            "/sys/class/net/eth0": "-> ../../devices/pci0000:00/0000:00:17.0/net/eth0",
        }
    )
    with pytest.raises(Refused) as refused:
        plan(lab, {"pf": IGB, "vfs": 2})
    assert str(refused.value) == (
        "functions[0].vfs: 2: all 1 VFs would go, and these are in use: 0000:00:17.0 (eth0 is up). "
        "End that use, keep vfs: 1, or set destroy_used_vfs"
    )
    assert [step.verb for step in plan(lab, {"pf": IGB, "vfs": 2}, destroy_used_vfs=True)] == ["resize", "persist"]


def test_a_vf_whose_interface_is_in_another_namespace_goes_only_with_the_option(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    vf = "/sys/devices/pci0000:00/0000:00:17.0"
    lab.files(
        {f"{vf}/net": None, f"{vf}/driver": "-> ../../../bus/pci/drivers/igbvf"}
    )  # what sysfs shows of a pod's VF
    with pytest.raises(Refused, match=r"0000:00:17.0 \(its network interface is in another network namespace\)"):
        plan(lab, {"pf": IGB, "vfs": 2})
    assert [step.verb for step in plan(lab, {"pf": IGB, "vfs": 2}, destroy_used_vfs=True)] == ["resize", "persist"]


def test_a_vf_in_a_virtual_machine_never_goes(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    lab.files({"/dev/vfio/13": "", "/proc/700/fd/9": "-> /dev/vfio/13"})
    with pytest.raises(Refused, match=r"these cannot: 0000:00:17.0 \(open in process 700 qemu-system-x86\)"):
        plan(lab, {"pf": IGB, "vfs": 0}, destroy_used_vfs=True)


def test_boot_sets_what_is_stored_and_stores_nothing(lab: LabHost) -> None:
    stored = {"functions": [{"pf": IGB, "vfs": 2, "autoprobe": False}], "wait_seconds": 0.01}
    resource = SriovVfs(lab, stored)
    assert [step.verb for step in resource.plan(resource.observe())] == ["set", "resize"]


def test_boot_makes_the_vfs_of_what_is_there_and_fails_for_what_is_not(lab: LabHost) -> None:
    stored = [{"pf": pf, "vfs": 2, "autoprobe": False} for pf in ("0000:99:00.0", IGB)]
    with pytest.raises(HostError, match="restore VFs of 0000:99:00.0: .* no such PCI function"):
        run(lab, *stored, wait_seconds=0.01)
    assert lab.read(f"{DEVICES}/{IGB}/sriov_numvfs") == "2"


def test_the_management_interface_is_warned_about(lab: LabHost) -> None:
    lab.write("/proc/net/route", lab.read("/proc/net/route").replace("enp0s6", "enp0s7") + "\n")
    resource = SriovVfs(lab, {"functions": [{"pf": IGB, "vfs": 1}]})
    resource.plan(resource.observe())
    assert resource.warnings == [f"{IGB}: enp0s7 carries the default route. Its link may drop for some seconds"]


def test_hardware_that_is_gone_can_be_forgotten(lab: LabHost) -> None:
    run(lab, {"pf": IGB, "vfs": 1})
    lab.remove(f"{DEVICES}/{IGB}")
    run(lab, {"pf": IGB, "vfs": 0})
    assert not lab.exists(STATE)
