# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import shutil
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
        "users": [],
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


def addresses(lab: LabHost, **held: t.Any) -> None:
    """What `ip -json address show` prints, shortened."""
    lab.answers["ip -json address show"] = json.dumps(
        [{"ifname": name, "addr_info": [entry]} for name, entry in held.items()]
    )


def test_the_ssh_connection_is_on_the_interface_with_the_servers_address(lab: LabHost) -> None:
    lab.files({f"/proc/{os.getpid()}/environ": "SSH_CONNECTION=192.168.7.9 50000 192.168.7.1 22\0"})
    addresses(lab, enp0s7={"local": "192.168.7.1", "scope": "global"})  # in a VRF: the main table knows nothing of it
    found = functions(lab)
    assert found["0000:00:07.0"]["in_use"] == [
        "enp0s7 carries this connection (ssh from 192.168.7.9)",
        "enp0s7 carries the address 192.168.7.1",
    ]
    assert found["0000:00:07.0"]["boot_critical"]
    assert found["0000:00:06.0"]["in_use"] == ["enp0s6 carries the default route"]


def test_the_ssh_connection_of_a_link_local_address_names_its_interface(lab: LabHost) -> None:
    lab.files({f"/proc/{os.getpid()}/environ": "SSH_CONNECTION=fe80::9%enp0s7 50000 fe80::1%enp0s7 22\0"})
    assert functions(lab)["0000:00:07.0"]["in_use"] == ["enp0s7 carries this connection (ssh from fe80::9)"]


@pytest.mark.parametrize(
    ("flags", "entry", "used"),
    [
        ("0x1003", {"local": "10.20.0.5", "scope": "global"}, ["enp0s7 carries the address 10.20.0.5"]),
        (
            "0x1003",
            {"local": "10.20.0.5", "scope": "global", "dynamic": True},
            ["enp0s7 carries the address 10.20.0.5"],
        ),
        ("0x1003", {"local": "fe80::1", "scope": "link"}, []),
        ("0x1002", {"local": "10.20.0.5", "scope": "global"}, []),
    ],
)
def test_an_address_is_a_use_of_an_interface_that_is_up(
    lab: LabHost, flags: str, entry: dict[str, t.Any], used: list[str]
) -> None:
    lab.files({"/sys/devices/pci0000:00/0000:00:07.0/net/enp0s7/flags": flags})
    addresses(lab, enp0s7=entry)
    assert functions(lab)["0000:00:07.0"]["in_use"] == used
    assert not functions(lab)["0000:00:07.0"]["boot_critical"]


@pytest.mark.parametrize(("dynamic", "used"), [(True, []), (False, ["eth0 carries the address 10.20.0.5"])])
def test_a_lease_is_no_use_of_a_vf(lab: LabHost, dynamic: bool, used: list[str]) -> None:
    lab.poke(f"{_pci.DEVICES}/0000:00:07.0/sriov_numvfs", "1")
    lab.files(
        {
            "/sys/devices/pci0000:00/0000:00:17.0/net/eth0/flags": "0x1003",
            "/sys/class/net/eth0": "-> ../../devices/pci0000:00/0000:00:17.0/net/eth0",
        }
    )
    addresses(lab, eth0={"local": "10.20.0.5", "scope": "global", "dynamic": dynamic})
    assert functions(lab)["0000:00:17.0"]["in_use"] == used


def test_an_interface_below_another_is_in_use(lab: LabHost) -> None:
    lab.files({"/sys/devices/pci0000:00/0000:00:07.0/net/enp0s7/upper_ovs-system": "-> ../ovs-system"})
    assert functions(lab)["0000:00:07.0"]["in_use"] == ["enp0s7 carries the interface ovs-system"]


def test_an_interface_in_another_network_namespace_is_in_use(lab: LabHost) -> None:
    shutil.rmtree(lab.path("/sys/devices/pci0000:00/0000:00:06.0/virtio1/net/enp0s6"))
    lab.remove("/sys/class/net/enp0s6")
    assert functions(lab)["0000:00:06.0"]["in_use"] == ["its network interface is in another network namespace"]


def test_what_a_function_has_behind_it_is_its_use_too(lab: LabHost) -> None:
    """A boot disk behind Intel VMD, which is a function and no bridge; the port between them is one."""
    vmd, port, disk = "0000:00:0e.0", "10000:e0:06.0", "10000:e1:00.0"
    below = f"/sys/devices/pci0000:00/{vmd}/pci10000:e0/{port}"
    lab.files(
        {
            f"/sys/devices/pci0000:00/{vmd}/class": "0x010400",
            f"{below}/class": "0x060400",
            f"{below}/{disk}/class": "0x010802",
            f"{below}/{disk}/nvme/nvme1/nvme1n1/uevent": "",
            f"{_pci.DEVICES}/{vmd}": f"-> ../../../devices/pci0000:00/{vmd}",
            f"{_pci.DEVICES}/{port}": f"-> ../../..{below[4:]}",
            f"{_pci.DEVICES}/{disk}": f"-> ../../..{below[4:]}/{disk}",
            "/sys/class/block/nvme1n1": f"-> ../..{below[4:]}/{disk}/nvme/nvme1/nvme1n1",
            "/sys/dev/block/259:0": f"-> ../..{below[4:]}/{disk}/nvme/nvme1/nvme1n1",
        }
    )
    lab.write("/proc/self/mountinfo", "29 1 259:0 / / rw - xfs /dev/nvme1n1 rw\n")
    found = functions(lab)
    assert [found[address]["in_use"] for address in (vmd, port, disk)] == [
        ["nvme1n1 is mounted at /"],
        [],
        ["nvme1n1 is mounted at /"],
    ]
    assert found[vmd]["boot_critical"] and not found[port]["boot_critical"]


def test_a_disk_that_a_process_has_open_is_in_use(lab: LabHost) -> None:
    lab.files(
        {
            "/proc/700/fd/9": "-> /dev/nvme0n1",
            "/proc/701/comm": "(udev-worker)\n",
            "/proc/701/fd/3": "-> /dev/sr0",
        }
    )
    found = functions(lab)
    assert found["0000:00:05.0"]["in_use"] == ["nvme0n1 is open in process 700 qemu-system-x86"]
    assert found["0000:00:1f.2"]["in_use"] == []


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
    users = {address: function["users"] for address, function in functions(lab).items() if function["users"]}
    assert users == {"0000:00:05.0": ["700 qemu-system-x86"]}
