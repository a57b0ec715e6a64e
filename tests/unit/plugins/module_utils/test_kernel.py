# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts about system and kernel. The values are those of a Debian 13 host."""

from __future__ import annotations

import gzip
import typing as t
from pathlib import Path

from ansible_collections.agentfleet.metal.plugins.module_utils import _kernel

RELEASE = "6.12.107+deb13-amd64"
CONFIG = """\
#
# Automatically generated file; DO NOT EDIT.
CONFIG_CXL_BUS=y
CONFIG_CXL_ACPI=m
# CONFIG_IOMMUFD is not set
CONFIG_KVM_MAX_NR_VCPUS=4096
CONFIG_CXL_PORT=y
CONFIG_HZ=250
"""


def test_debian(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n',
            "/proc/sys/kernel/arch": "x86_64\n",
            "/proc/meminfo": "MemTotal:        3015444 kB\nMemFree:  1 kB\n",
            "/sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "/var/lib": None,
        }
    )
    observed = _kernel.observe_os(fake_host)
    assert observed["free_bytes"].keys() == {"/", "/var/lib"}
    assert all(size > 0 for size in observed.pop("free_bytes").values())
    assert observed.pop("python").startswith("3.")
    assert observed == {
        "id": "debian",
        "version_id": "13",
        "family": "debian",
        "architecture": "x86_64",
        "container": "",
        "cgroup_v2": True,
        "memory_bytes": 3015444 * 1024,
    }


def test_families(fake_host: t.Any) -> None:
    for text, family in (
        ('ID="openEuler"\nVERSION_ID="24.03"\n', "openeuler"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "redhat"),
        ("ID=ubuntu\nID_LIKE=debian\n", "debian"),
        ("ID=arch\n", ""),
    ):
        Path(fake_host.root, "etc").mkdir(exist_ok=True)
        Path(fake_host.root, "etc/os-release").write_text(text)
        assert _kernel.observe_os(fake_host)["family"] == family


def test_container(fake_host: t.Any) -> None:
    fake_host.files({"/proc/1/environ": "HOME=/\0container=lxc\0"})
    assert _kernel.observe_os(fake_host)["container"] == "lxc"


def test_nothing_readable_is_no_error(fake_host: t.Any) -> None:
    assert _kernel.observe_kernel(fake_host) == {
        "release": "",
        "config": {},
        "cmdline": "",
        "parameters": {},
        "modules": [],
        "boot_id": "",
        "sysctl": {},
        "lockdown": "",
        "secure_boot": False,
        "boot_guard": {"phase": "", "booted": ""},
    }
    assert _kernel.observe_packages(fake_host) == {}
    assert _kernel.observe_rdma(fake_host) == {"devices": []}
    assert _kernel.observe_ub(fake_host) == {"present": False, "devices": []}


def test_kernel(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/proc/sys/kernel/osrelease": f"{RELEASE}\n",
            f"/boot/config-{RELEASE}": CONFIG,
            "/proc/cmdline": "root=/dev/vda rw console=tty0 console=ttyS0 intel_iommu=on \n",
            "/proc/modules": "kvm_amd 221184 0 - Live 0x0\nccp 163840 1 kvm_amd, Live 0x0\n",
            "/proc/sys/kernel/numa_balancing": "1\n",
            "/sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
            "/var/lib/agentfleet/boot-guard/state.json": '{"phase": "armed", "boot_id": "a"}',
            "/proc/sys/kernel/random/boot_id": "b\n",
        }
    )
    observed = _kernel.observe_kernel(fake_host)
    assert observed["config"] == {"CONFIG_CXL_BUS": "y", "CONFIG_CXL_ACPI": "m"}  # hidden ones are not asked for
    assert observed["parameters"] == {
        "root": "/dev/vda",
        "rw": True,
        "console": ["tty0", "ttyS0"],
        "intel_iommu": "on",
    }
    assert observed["modules"] == ["ccp", "kvm_amd"]
    assert observed["sysctl"] == {"kernel.numa_balancing": "1"}
    assert observed["lockdown"] == "none"
    assert observed["boot_guard"] == {"phase": "armed", "booted": "known_good"}


def test_config_of_the_running_kernel_comes_first(fake_host: t.Any) -> None:
    fake_host.files({f"/boot/config-{RELEASE}": "CONFIG_CXL_BUS=m\n", "/proc/sys": None})
    Path(fake_host.root, "proc/config.gz").write_bytes(gzip.compress(CONFIG.encode()))
    assert _kernel.kernel_config(fake_host, RELEASE, {"CONFIG_CXL_BUS"}) == {"CONFIG_CXL_BUS": "y"}
    Path(fake_host.root, "proc/config.gz").write_bytes(b"damaged")
    assert _kernel.kernel_config(fake_host, RELEASE, {"CONFIG_CXL_BUS"}) == {"CONFIG_CXL_BUS": "m"}


def test_packages_of_dpkg(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/var/lib/dpkg/status": "Package: cxl\nStatus: install ok installed\nVersion: 81-1\n\n"
            "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
            "Package: held\nStatus: hold ok installed\nVersion: 3\nDescription: x\n Version: y\n\n"
            "Package: half\nStatus: install ok half-installed\nVersion: 2\n"
        }
    )
    assert _kernel.observe_packages(fake_host) == {"cxl": "81-1", "held": "3"}


def test_packages_of_rpm(fake_host: t.Any) -> None:
    fake_host.files({"/var/lib/rpm": None})
    fake_host.answers["rpm -qa"] = "kernel\t5.14.0-503\ncxl-cli\t78-2\n"
    assert _kernel.observe_packages(fake_host) == {"kernel": "5.14.0-503", "cxl-cli": "78-2"}


def test_kvm_needs_the_cpu_too(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/proc/sys/kernel/arch": "x86_64",
            "/proc/cpuinfo": "processor : 0\nflags\t\t: fpu lm\n",
            "/dev/kvm": "",
        }
    )
    assert _kernel.observe_kvm(fake_host) == {"present": True, "extension": "", "usable": False, "nested": False}
    Path(fake_host.root, "proc/cpuinfo").write_text("flags\t\t: fpu svm lm\n")
    fake_host.files({"/sys/module/kvm_amd/parameters/nested": "1\n"})
    assert _kernel.observe_kvm(fake_host) == {"present": True, "extension": "svm", "usable": True, "nested": True}


def test_rdma(fake_host: t.Any) -> None:
    base = "/sys/class/infiniband/mlx5_0"
    fake_host.files(
        {
            f"{base}/node_guid": "506b:4b03:00f6:0a0c",
            f"{base}/device": "-> ../../devices/pci0000:00/0000:65:00.0",
            f"{base}/ports/1/state": "4: ACTIVE\n",
            f"{base}/ports/1/link_layer": "Ethernet\n",
            f"{base}/ports/1/rate": "100 Gb/sec (4X EDR)\n",
        }
    )
    (device,) = _kernel.observe_rdma(fake_host)["devices"]
    assert device["pci_address"] == "0000:65:00.0"
    assert device["ports"] == [{"port": 1, "state": "ACTIVE", "link_layer": "Ethernet", "rate": "100 Gb/sec (4X EDR)"}]


def test_ub(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/sys/firmware/acpi/tables/UBRT": "",
            "/sys/bus/ub/devices/00001/guid": "cc08-a000-0-0-000000-0000000000000001",
            "/sys/bus/ub/devices/00001/driver": "-> ../../drivers/ub_generic",
        }
    )
    observed = _kernel.observe_ub(fake_host)
    assert observed["present"] is True
    assert observed["devices"][0]["driver"] == "ub_generic"
