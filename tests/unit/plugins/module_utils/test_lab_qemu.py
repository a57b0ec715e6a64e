# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU command line is a pure function of the description."""

from __future__ import annotations

import base64
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._lab_qemu import (
    argv,
    backing_files,
    check_together,
    credentials,
    mac_address,
    memory_bytes,
    normalize,
    segment,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

FULL: dict[str, t.Any] = {
    "name": "metal1",
    "ssh_port": 2222,
    "cpus": 2,
    "numa": [
        {"memory": "2GiB", "latency_ns": 80, "bandwidth": "100GiB"},
        {"memory": "1GiB", "initiator": 0, "latency_ns": 250, "bandwidth": "20GiB"},
    ],
    "cxl": {
        "windows": [{"size": "4GiB", "host_bridges": [0, 1], "granularity": "8KiB"}],
        "devices": [
            {"serial": "0x1", "size": "512MiB", "host_bridge": 0},
            {"serial": "0x2", "size": "512MiB", "host_bridge": 1},
            {"serial": "0x3", "size": "256MiB", "host_bridge": 1, "persistent": True},
        ],
    },
    "nvme": [{"serial": "spare", "controllers": 2, "namespaces": ["256MiB", "128MiB"]}],
    "nics": [{"type": "virtio", "address": "10.77.0.11/24"}, {"type": "igb"}],
    "iommu": "intel",
}


def line_of(raw: dict[str, t.Any], accelerator: str = "tcg") -> list[str]:
    return argv(normalize("hosts[0]", raw), "/lab/metal1", "/lab", "qemu-system-x86_64", accelerator)


def values(line: list[str], option: str) -> list[str]:
    return [line[index + 1] for index, word in enumerate(line) if word == option]


def test_machine_has_the_windows_and_their_host_bridges() -> None:
    machine = values(line_of(FULL), "-machine")[0].split(",")
    assert machine[0] == "q35"
    assert {"cxl=on", "hmat=on", "kernel-irqchip=split"} <= set(machine)
    assert {
        "cxl-fmw.0.targets.0=hb0",
        "cxl-fmw.0.targets.1=hb1",
        f"cxl-fmw.0.size={4 << 30}",
        "cxl-fmw.0.interleave-granularity=8192",
    } <= set(machine)


def test_each_cxl_device_has_a_root_port_of_its_own_host_bridge() -> None:
    devices = values(line_of(FULL), "-device")
    assert [d for d in devices if d.startswith("pxb-cxl")] == [
        "pxb-cxl,bus_nr=32,bus=pcie.0,id=hb0,addr=0x19",
        "pxb-cxl,bus_nr=64,bus=pcie.0,id=hb1,addr=0x1a",
    ]
    assert [d for d in devices if d.startswith("cxl-rp")] == [
        "cxl-rp,port=0,bus=hb0,id=rp0,chassis=0,slot=2",
        "cxl-rp,port=0,bus=hb1,id=rp1,chassis=0,slot=3",
        "cxl-rp,port=1,bus=hb1,id=rp2,chassis=0,slot=4",
    ]
    assert [d for d in devices if d.startswith("cxl-type3")] == [
        "cxl-type3,bus=rp0,volatile-memdev=cxl0-ram,id=cxl0,sn=0x1",
        "cxl-type3,bus=rp1,volatile-memdev=cxl1-ram,id=cxl1,sn=0x2",
        "cxl-type3,bus=rp2,persistent-memdev=cxl2-img,lsa=cxl2-labels,id=cxl2,sn=0x3",
    ]


def test_numa_nodes_carry_their_hmat_values() -> None:
    line = line_of(FULL)
    numa = values(line, "-numa")
    assert numa[0] == "node,nodeid=0,memdev=dram0,cpus=0,cpus=1,initiator=0"
    assert numa[1] == "node,nodeid=1,memdev=dram1,initiator=0"
    assert "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=250" in numa
    assert "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-bandwidth,bandwidth=20480M" in numa
    assert values(line, "-m") == ["3072M"]


def test_a_plain_host_has_none_of_it() -> None:
    line = line_of({"name": "plain", "ssh_port": 2223, "memory": "1GiB"})
    text = " ".join(line)
    assert "cxl" not in text and "nvme" not in text and "intel-iommu" not in text and "hmat=off" in text
    assert values(line, "-numa") == ["node,nodeid=0,memdev=dram0,cpus=0,cpus=1"]


def test_every_pci_device_says_where_it_is() -> None:
    buses = ("pcie.0", "hb", "rp", "nvme", "port")
    for device in values(line_of(FULL), "-device"):
        if device.startswith(("intel-iommu", "nvme-subsys")):
            continue
        bus = dict(part.split("=", 1) for part in device.split(",")[1:])["bus"]
        assert bus.startswith(buses), device
    slots = [
        part for device in values(line_of(FULL), "-device") for part in device.split(",") if part.startswith("addr=")
    ]
    assert len(slots) == len(set(slots))


def test_controllers_of_a_subsystem_share_its_namespaces() -> None:
    devices = values(line_of(FULL), "-device")
    assert sum(d.startswith("nvme,") and "subsys=subsys0" in d and "serial=spare" in d for d in devices) == 2
    assert [d for d in devices if d.startswith("nvme-ns")] == [
        "nvme-ns,drive=nvme0n1,bus=nvme0c0,nsid=1",
        "nvme-ns,drive=nvme0n2,bus=nvme0c0,nsid=2",
    ]


def test_nothing_listens_beyond_the_loopback_interface() -> None:
    for netdev in values(line_of(FULL), "-netdev"):
        assert "hostfwd=tcp:127.0.0.1:2222-:22" in netdev or "localaddr=127.0.0.1" in netdev


def test_hosts_of_one_image_differ_by_credentials() -> None:
    first = credentials(normalize("hosts[0]", FULL), "tcg")
    second = credentials(normalize("hosts[1]", {**FULL, "name": "metal2"}), "tcg")
    assert first["system.hostname"] == "metal1" and second["system.hostname"] == "metal2"
    assert first["system.machine_id"] != second["system.machine_id"]
    assert len(first["system.machine_id"]) == 32
    network = first["network.network.20-lab0"]
    assert f"MACAddress={mac_address('metal1', 1)}\n" in network and "Address=10.77.0.11/24\n" in network
    assert "network.network.20-lab1" not in first  # the igb has no address
    smbios = next(v for v in values(line_of(FULL), "-smbios") if "system.hostname" in v)
    assert base64.b64decode(smbios.split("hostname=", 1)[1]).decode() == "metal1"


def test_two_labs_have_two_segments() -> None:
    assert segment("/a/build/lab") != segment("/b/build/lab")
    group, _colon, port = segment("/a").partition(":")
    assert group.startswith("239.192.") and 20000 <= int(port) < 30000


def test_addresses_are_unicast_and_local() -> None:
    first = int(mac_address("metal1", 0).split(":", maxsplit=1)[0], 16)
    assert first & 0b11 == 0b10
    assert mac_address("metal1", 0) != mac_address("metal1", 1) != mac_address("metal2", 1)


def test_kvm_takes_the_real_processor() -> None:
    assert values(line_of(FULL, "kvm"), "-cpu") == ["host"]
    assert values(line_of(FULL), "-cpu") == ["max,-hypervisor,-la57,-pku,-pks"]


def test_only_an_emulated_host_keeps_its_guests_on_one_cpu() -> None:
    spec = normalize("hosts[0]", FULL)
    assert set(credentials(spec, "tcg")) - set(credentials(spec, "kvm")) == {"systemd.unit-dropin.agentfleet.slice"}


def test_files_that_outlive_a_power_cut() -> None:
    assert backing_files(normalize("hosts[0]", FULL)) == {
        "nvme0n1.img": 256 << 20,
        "nvme0n2.img": 128 << 20,
        "cxl2.img": 256 << 20,
        "cxl2.labels": 1 << 20,
    }


def test_memory_counts_volatile_cxl_only() -> None:
    assert memory_bytes(normalize("hosts[0]", FULL)) == (3 << 30) + (1 << 30)


def test_a_comma_in_a_path_does_not_become_an_option() -> None:
    line = argv(normalize("hosts[0]", FULL), "/a,readonly=on/metal1", "/a", "qemu-system-x86_64", "tcg")
    assert values(line, "-drive")[0].startswith("file=/a,,readonly=on/metal1/disk.qcow2,if=none")


@pytest.mark.parametrize(
    ("other", "option"),
    [
        ({"name": "metal1", "ssh_port": 2300}, "hosts[1].name"),
        ({"name": "metal2", "ssh_port": 2222}, "hosts[1].ssh_port"),
        ({"name": "metal2", "ssh_port": 2300, "nics": [{"address": "10.77.0.11/24"}]}, "hosts[1].nics[0].address"),
    ],
)
def test_hosts_of_one_lab_may_not_collide(other: dict[str, t.Any], option: str) -> None:
    specs = [normalize("hosts[0]", FULL), normalize("hosts[1]", {"memory": "1GiB", **other})]
    with pytest.raises(Refused) as refused:
        check_together("hosts", specs)
    assert refused.value.option == option
