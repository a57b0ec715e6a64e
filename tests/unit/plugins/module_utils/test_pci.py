# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _pci
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.tests.unit.conftest import FakeHost
from ansible_collections.agentfleet.metal.tests.unit.pci_lab import LabHost


@pytest.fixture
def lab(tmp_path: t.Any) -> LabHost:
    return LabHost(str(tmp_path))


def functions(host: FakeHost) -> dict[str, dict[str, t.Any]]:
    return {function["address"]: function for function in _pci.observe_pci(host)["functions"]}


def test_a_function_is_described_from_sysfs(lab: LabHost) -> None:
    assert functions(lab)["0000:00:05.0"] == {
        "address": "0000:00:05.0",
        "vendor": "1b36",
        "device": "0010",
        "class": "010802",
        "driver": "nvme",
        "driver_override": "",
        "iommu_group": 5,
        "numa_node": -1,
        "physfn": "",
        "sriov": {},
        "netdevs": [],
        "blockdevs": ["nvme0n1"],
        "in_use": [],
        "boot_critical": False,
    }


def test_the_boot_disk_and_the_default_route_are_critical(lab: LabHost) -> None:
    found = functions(lab)
    assert found["0000:00:04.0"]["in_use"] == ["vda is mounted at /"]
    assert found["0000:00:06.0"]["in_use"] == ["enp0s6 carries the default route"]
    assert [address for address in found if found[address]["boot_critical"]] == ["0000:00:04.0", "0000:00:06.0"]
    assert found["0000:00:07.0"]["netdevs"] == ["enp0s7"]
    assert found["0000:00:07.0"]["in_use"] == []


def test_swap_and_mounts_are_seen_through_lvm_and_nvme_multipath(lab: LabHost) -> None:
    lab.files(
        {
            "/sys/devices/virtual/block/dm-0/slaves/nvme0n1": "",
            "/sys/devices/virtual/block/dm-0/dm/name": "vg-data",
            "/sys/class/block/dm-0": "-> ../../devices/virtual/block/dm-0",
            "/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/holders/dm-0": "",
            "/dev/dm-0": "",
            "/dev/mapper/vg-data": "-> ../dm-0",
        }
    )
    with open(lab.path("/proc/self/mountinfo"), "a", encoding="utf-8") as file:
        file.write("50 29 0:99 / /srv/with\\040space rw - btrfs /dev/mapper/vg-data rw\n")
    with open(lab.path("/proc/swaps"), "a", encoding="utf-8") as file:
        file.write("/dev/vda\tpartition\t1\t0\t-2\n")
    found = functions(lab)
    assert found["0000:00:05.0"]["in_use"] == ["dm-0 is mounted at /srv/with space", "nvme0n1 is held by vg-data"]
    assert not found["0000:00:05.0"]["boot_critical"]
    assert found["0000:00:04.0"]["in_use"] == ["vda is mounted at /", "vda is swap"]


def test_the_ssh_connection_is_seen_through_a_bond(lab: LabHost) -> None:
    lab.files(
        {
            "/sys/devices/virtual/net/bond0/lower_enp0s7": "-> ../../../pci0000:00/0000:00:07.0/net/enp0s7",
            "/sys/class/net/bond0": "-> ../../devices/virtual/net/bond0",
            f"/proc/{os.getpid()}/status": "Name:\tpython3\nPPid:\t41\n",
            "/proc/41/environ": "HOME=/root\0SSH_CONNECTION=::ffff:192.168.7.9 50000 192.168.7.1 22\0",
        }
    )
    with open(lab.path("/proc/net/route"), "a", encoding="utf-8") as file:
        file.write("bond0\t0007A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
    found = functions(lab)["0000:00:07.0"]
    assert found["in_use"] == ["enp0s7 carries this connection (ssh from 192.168.7.9)"]
    assert found["boot_critical"]


def test_a_device_that_only_the_kernel_knows_to_be_taken(lab: LabHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pci, "_claimed", lambda host, path: path == "/dev/nvme0n1")
    assert functions(lab)["0000:00:05.0"]["in_use"] == ["nvme0n1 is claimed by the kernel"]


def test_iommu_kinds(lab: LabHost, tmp_path: t.Any) -> None:
    seen = _pci.observe_iommu(lab)
    assert (seen["enabled"], seen["kind"], seen["iommufd"]) == (True, "intel", False)
    assert seen["groups"][-1] == {
        "id": 8,
        "type": "DMA",
        "functions": ["0000:00:1f.0", "0000:00:1f.2", "0000:00:1f.3"],
    }
    off = FakeHost(str(tmp_path / "off")).files({"/sys/firmware/acpi/tables/IVRS": "", "/dev/iommu": ""})
    assert _pci.observe_iommu(off) == {"enabled": False, "kind": "amd", "groups": [], "iommufd": True}


def test_a_host_without_pci_is_no_error(fake_host: FakeHost) -> None:
    assert _pci.observe_pci(fake_host) == {"functions": []}
    assert _pci.observe_iommu(fake_host) == {"enabled": False, "kind": "", "groups": [], "iommufd": False}


def test_the_address_of_a_vf_is_known_before_it_is_made(lab: LabHost) -> None:
    pf = functions(lab)["0000:00:07.0"]
    assert [_pci.virtual_function(lab, pf, i)["address"] for i in (0, 1)] == ["0000:00:17.0", "0000:00:17.2"]


def test_a_vendor_and_device_must_be_unambiguous(lab: LabHost) -> None:
    lab.poke("/sys/bus/pci/devices/0000:00:07.0/sriov_numvfs", "2")
    with pytest.raises(Refused) as refused:
        _pci.one(list(functions(lab).values()), "functions[0].pf", "8086:10ca")
    assert str(refused.value) == (
        "functions[0].pf: '8086:10ca': 2 functions match. Name one by its address: 0000:00:17.0, 0000:00:17.2"
    )


def test_users_of_a_group_are_named(lab: LabHost) -> None:
    lab.files({"/proc/700/fd/9": "-> /dev/vfio/5", "/proc/700/fd/10": "-> /dev/null", "/dev/vfio/5": ""})
    assert _pci.vfio_users(lab, ["0000:00:05.0", "0000:00:07.0"]) == {
        "0000:00:05.0": ["700 qemu-system-x86"],
        "0000:00:07.0": [],
    }
