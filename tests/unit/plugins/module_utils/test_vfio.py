# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import shutil
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._vfio import LIMITS, RULES, VfioBindings
from ansible_collections.agentfleet.metal.tests.unit.pci_lab import DEVICES, LabHost

NVME = "0000:00:05.0"
STATE = "/etc/agentfleet/vfio.json"


@pytest.fixture
def lab(tmp_path: t.Any) -> LabHost:
    return LabHost(str(tmp_path))


def plan(host: LabHost, predicting: bool = False, **desired: t.Any) -> list[Step]:
    resource = VfioBindings(host, desired)
    resource.predicting = predicting
    return resource.plan(resource.observe())


def run(host: LabHost, **desired: t.Any) -> dict[str, t.Any]:
    resource = VfioBindings(host, desired)
    apply_all(resource, resource.plan(resource.observe()))
    lab_enabled(host)
    return resource.result(resource.observe())


def lab_enabled(host: LabHost) -> None:
    """What `systemctl enable` leaves."""
    path = "/etc/systemd/system/multi-user.target.wants/agentfleet-restore.service"
    if not host.exists(path):
        host.files({path: ""})


def driver(host: LabHost, address: str) -> str:
    return host.link_name(f"{DEVICES}/{address}/driver")


def test_an_nvme_goes_to_vfio_and_a_second_run_plans_nothing(lab: LabHost) -> None:
    wish = {"functions": [{"address": NVME}], "access_group": "kvm", "memlock": "64GiB"}
    result = run(lab, **wish)
    assert result["functions"] == [
        {
            "address": NVME,
            "vendor": "1b36",
            "device": "0010",
            "driver": "vfio-pci",
            "iommu_group": 5,
            "numa_node": -1,
            "nodes": ["/dev/vfio/5"],
        }
    ]
    assert [call for call in lab.calls if "<-" in call] == [
        f"{DEVICES}/{NVME}/driver_override <- vfio-pci",
        f"{DEVICES}/{NVME}/driver/unbind <- {NVME}",
        f"/sys/bus/pci/drivers_probe <- {NVME}",
    ]
    assert lab.read(LIMITS).endswith("@kvm - memlock 67108864")
    assert 'SUBSYSTEM=="vfio", KERNEL!="vfio", GROUP="kvm", MODE="0660"' in lab.read(RULES)
    assert json.loads(lab.read(STATE))["functions"] == [{"address": NVME, "driver": "vfio-pci"}]
    assert plan(lab, **wish) == []


def test_steps_are_shown_with_drivers_before_and_after(lab: LabHost) -> None:
    step = plan(lab, functions=[{"address": NVME.upper()}])[0]
    assert step.public() == {
        "verb": "bind",
        "object": NVME,
        "before": {"driver": "nvme", "driver_override": ""},
        "after": {"driver": "vfio-pci", "driver_override": "vfio-pci"},
        "why": "functions[0] gives it to vfio-pci",
        "disruptive": True,
    }


def test_the_driver_is_loaded_first_when_it_is_absent(lab: LabHost) -> None:
    os.rmdir(lab.path("/sys/bus/pci/drivers/vfio-pci"))
    run(lab, functions=[{"address": NVME}])
    assert lab.calls.index("modprobe vfio-pci") < lab.calls.index(f"{DEVICES}/{NVME}/driver_override <- vfio-pci")


def test_calls_add_up_and_unbound_takes_out(lab: LabHost) -> None:
    run(lab, functions=[{"address": NVME}])
    run(lab, functions=[{"address": "0000:00:07.0"}])
    assert [item["address"] for item in json.loads(lab.read(STATE))["functions"]] == [NVME, "0000:00:07.0"]
    run(lab, functions=[{"address": NVME, "state": "unbound"}])
    assert driver(lab, NVME) == "nvme"
    assert lab.read(f"{DEVICES}/{NVME}/driver_override") == "(null)"
    assert plan(lab, functions=[{"address": NVME, "state": "unbound"}]) == []
    run(lab, functions=[{"address": "0000:00:07.0", "state": "unbound"}])
    assert not lab.exists(STATE)


def test_a_failed_binding_is_undone_to_the_earlier_driver(lab: LabHost) -> None:
    lab.stubborn = {NVME}
    with pytest.raises(HostError) as error:
        run(lab, functions=[{"address": NVME}])
    assert f"{NVME} has driver none after probing; the kernel log says why. Undone: its driver is nvme" in str(
        error.value
    )
    assert driver(lab, NVME) == "nvme"
    assert lab.read(f"{DEVICES}/{NVME}/driver_override") == "(null)"
    assert not lab.exists(STATE)


def test_vfs_are_bound_by_number(lab: LabHost) -> None:
    lab.poke(f"{DEVICES}/0000:00:07.0/sriov_numvfs", "2")
    result = run(lab, functions=[{"vf_of": "8086:10c9", "vfs": [1]}])
    assert [function["address"] for function in result["functions"]] == ["0000:00:17.2"]
    assert driver(lab, "0000:00:17.2") == "vfio-pci"
    assert driver(lab, "0000:00:17.0") == ""


def test_check_mode_predicts_vfs_that_an_earlier_task_makes(lab: LabHost) -> None:
    wish = {"functions": [{"vf_of": "0000:00:07.0", "vfs": [0, 1]}]}
    predicted = plan(lab, predicting=True, **wish)
    lab.poke(f"{DEVICES}/0000:00:07.0/sriov_numvfs", "2")
    assert [step.public() for step in predicted] == [step.public() for step in plan(lab, **wish)]


def test_check_mode_takes_the_iommu_as_on_after_the_reboot(lab: LabHost) -> None:
    shutil.rmtree(lab.path("/sys/kernel/iommu_groups"))
    resource = VfioBindings(lab, {"functions": [{"address": NVME}]})
    resource.predicting = True
    assert [step.verb for step in resource.plan(resource.observe())] == ["bind", "persist"]
    assert resource.warnings == [
        "The host has no active IOMMU; it is taken as on after a reboot. Boot with intel_iommu=on"
    ]


def test_a_number_passes_over_what_is_in_use_and_keeps_what_it_has(lab: LabHost) -> None:
    twin = "0000:00:03.0"
    lab.files(
        {
            f"{DEVICES}/{twin}": f"-> ../../../devices/pci0000:00/{twin}",
            f"/sys/devices/pci0000:00/{twin}/vendor": "0x1b36",
            f"/sys/devices/pci0000:00/{twin}/device": "0x0010",
            f"/sys/devices/pci0000:00/{twin}/driver_override": "(null)",
            f"/sys/devices/pci0000:00/{twin}/block/nvme1n1/uevent": "",
            "/sys/class/block/nvme1n1": f"-> ../../devices/pci0000:00/{twin}/block/nvme1n1",
        }
    )
    mounted = "60 29 259:1 / /data rw - ext4 /dev/nvme1n1 rw\n"
    quiet = lab.read("/proc/self/mountinfo") + "\n"
    lab.write("/proc/self/mountinfo", quiet + mounted)
    wish = {"functions": [{"vendor_device": "1b36:0010", "count": 1}]}
    run(lab, **wish)
    assert driver(lab, NVME) == "vfio-pci"
    lab.write("/proc/self/mountinfo", quiet)  # the lower address is free now, yet nothing moves
    assert plan(lab, **wish) == []


def test_the_whole_group_is_bound_when_asked(lab: LabHost) -> None:
    result = run(lab, functions=[{"address": "0000:00:1f.2"}], bind_whole_group=True)
    assert [function["address"] for function in result["functions"]] == ["0000:00:1f.2", "0000:00:1f.3"]
    assert driver(lab, "0000:00:1f.0") == "lpc_ich"
    assert [item["address"] for item in json.loads(lab.read(STATE))["functions"]] == ["0000:00:1f.2", "0000:00:1f.3"]


def test_nodes_get_their_group_when_only_that_is_wrong(lab: LabHost) -> None:
    wish = {"functions": [{"address": NVME}], "access_group": "kvm"}
    run(lab, **wish)
    os.chmod(lab.path("/dev/vfio/5"), 0o600)
    (step,) = plan(lab, **wish)
    assert (step.verb, step.before, step.after) == (
        "grant",
        {"/dev/vfio/5": f"gid {os.getgid()} 0600"},
        {"/dev/vfio/5": "kvm 0660"},
    )
    lab.answers["udevadm trigger"] = lambda host: os.chmod(host.path("/dev/vfio/5"), 0o660) or ""
    assert run(lab, **wish)["functions"][0]["nodes"] == ["/dev/vfio/5"]
    os.chmod(lab.path("/dev/vfio/5"), 0o600)
    lab.answers["udevadm trigger"] = ""
    with pytest.raises(HostError, match="another udev rule after"):
        run(lab, **wish)


def test_boot_binds_what_is_there_and_fails_for_what_is_not(lab: LabHost) -> None:
    stored = [{"address": "0000:99:00.0", "driver": "vfio-pci"}, {"address": NVME, "driver": "vfio-pci"}]
    with pytest.raises(HostError) as error:
        run(lab, functions=stored, wait_seconds=0.01)
    assert "find 0000:99:00.0: no PCI function 0000:99:00.0 on this host after 0.01 seconds" in str(error.value)
    assert driver(lab, NVME) == "vfio-pci"


def test_a_boot_binds_the_others_when_the_host_took_one(lab: LabHost) -> None:
    """A guest's LVM or RAID on its drive, which the host puts together at boot; and a drive whose group has one in use."""
    lab.files(
        {
            "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/holders/md127": "",
            "/proc/700/fd/9": "-> /dev/sr0",
        }
    )
    named = [NVME, "0000:00:07.0", "0000:00:1f.2", "0000:00:1f.3"]
    resource = VfioBindings(
        lab, {"functions": [{"address": address, "driver": "vfio-pci"} for address in named], "wait_seconds": 0.01}
    )
    steps = resource.plan(resource.observe())
    assert [(step.verb, step.object) for step in steps] == [
        ("bind", "0000:00:07.0"),
        ("restore", NVME),
        ("restore", "0000:00:1f.2"),
        ("restore", "0000:00:1f.3"),
    ]
    with pytest.raises(HostError, match="in use by this host: nvme0n1 is held by md127"):
        apply_all(resource, steps)
    assert driver(lab, "0000:00:07.0") == "vfio-pci"


def test_a_boot_binds_what_the_network_took_meanwhile(lab: LabHost) -> None:
    shown = [{"ifname": "enp0s7", "addr_info": [{"family": "inet", "local": "10.9.0.5", "scope": "global"}]}]
    lab.answers["ip -json address show"] = json.dumps(shown)
    igb = {"address": "0000:00:07.0", "driver": "vfio-pci"}
    with pytest.raises(Refused, match="in use by this host: enp0s7 carries the address 10.9.0.5"):
        run(lab, functions=[igb])
    run(lab, functions=[igb], wait_seconds=0.01)
    assert driver(lab, "0000:00:07.0") == "vfio-pci"


def test_one_bad_item_stops_all(lab: LabHost) -> None:
    with pytest.raises(Refused) as refused:
        run(lab, functions=[{"address": NVME}, {"address": "0000:00:04.0"}])
    assert refused.value.public() == {
        "option": "functions[1]",
        "value": "0000:00:04.0",
        "problem": "in use by this host: vda is mounted at /",
        "remedy": "Name another function, or end that use first",
    }
    assert driver(lab, NVME) == "nvme"
    assert [call for call in lab.calls if "<-" in call] == []


def test_a_function_in_a_virtual_machine_is_not_taken_away(lab: LabHost) -> None:
    run(lab, functions=[{"address": NVME}])
    lab.files({"/proc/700/fd/9": "-> /dev/vfio/5"})
    with pytest.raises(Refused, match="in use through vfio by process 700 qemu-system-x86"):
        plan(lab, functions=[{"address": NVME, "state": "unbound"}])


def test_hardware_that_is_gone_can_be_forgotten(lab: LabHost) -> None:
    run(lab, functions=[{"address": NVME}])
    lab.remove(f"{DEVICES}/{NVME}")
    with pytest.raises(Refused, match="no such PCI function"):
        plan(lab, functions=[{"address": NVME}])
    run(lab, functions=[{"address": NVME, "state": "unbound"}])
    assert not lab.exists(STATE)
    with pytest.raises(Refused, match="no such PCI function"):
        plan(lab, functions=[{"address": NVME, "state": "unbound"}])


def test_a_teardown_takes_the_declared_items_and_can_be_repeated(lab: LabHost) -> None:
    lab.poke(f"{DEVICES}/0000:00:07.0/sriov_numvfs", "1")
    items = [{"vendor_device": "1b36:0010", "count": 1}, {"vf_of": "8086:10c9", "vfs": [0]}]
    run(lab, functions=items)
    back = [{**item, "state": "unbound"} for item in items]
    assert [step.verb for step in plan(lab, functions=back)] == ["unbind", "unbind", "forget"]
    run(lab, functions=back)
    assert (driver(lab, NVME), driver(lab, "0000:00:17.0")) == ("nvme", "")
    lab.poke(f"{DEVICES}/0000:00:07.0/sriov_numvfs", "0")
    assert plan(lab, functions=back) == []
