# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules, options, sysctls, attributes and huge pages. The files are those of a Debian 13 host."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._tunables import (
    HEADER,
    ORDER_FILE,
    Tunables,
    same,
    sysctl_path,
)

RELEASE = "6.12.107+deb13-amd64"
PAGES = "/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
WISH: dict[str, t.Any] = {
    "modules": ["vhost-vsock", "vfio_pci"],
    "module_options": {"kvm_amd": {"nested": 0}, "zswap": {"max_pool_percent": 15}},
    "sysctl": {"kernel.numa_balancing": 2, "net.ipv4.ip_local_port_range": "20000 60000"},
    "sysfs": {THP: "madvise"},
    "hugepages": [{"node": 1, "size": "2MiB", "count": 20}],
}


@pytest.fixture
def host(fake_host: t.Any) -> t.Any:
    """A host with vfio_pci loaded and vhost_vsock loadable."""
    fake_host.files(
        {
            "/proc/sys/kernel/osrelease": RELEASE,
            "/proc/modules": "vfio_pci 16384 0 - Live 0x0\nkvm_amd 221184 0 - Live 0x0\n",
            f"/lib/modules/{RELEASE}/modules.builtin": "kernel/drivers/virtio/virtio-pci.ko\n",
            "/sys/module/kvm_amd/initstate": "live",
            "/sys/module/kvm_amd/refcnt": "0",
            "/sys/module/kvm_amd/parameters/nested": "1",
            "/sys/module/zswap/parameters/max_pool_percent": "20",
            "/proc/sys/kernel/numa_balancing": "1",
            "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999",
            "/proc/sys/vm/compact_memory": "",
            "/sys/devices/system/node/online": "0-1",
            "/sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:        1030540 kB\n",
            PAGES: "0",
            THP: "[always] madvise never",
        }
    )
    os.chmod(fake_host.path("/sys/module/kvm_amd/parameters/nested"), 0o444)
    write = fake_host.poke

    def attribute(path: str, value: str) -> None:  # shows what was written to it, and nothing of what was there
        write(path, value)
        os.truncate(fake_host.path(path), len(value))

    fake_host.poke = attribute
    fake_host.answers.update({"modprobe": "", "modinfo -F parm kvm_amd": "nested:Nested Virtualization (int)\n"})
    return fake_host


def converge(host: t.Any, wish: dict[str, t.Any]) -> list[tuple[str, str]]:
    resource = Tunables(host, wish)
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    return [(step.verb, step.object) for step in steps]


def test_everything_is_set_and_kept_and_then_nothing_is_left_to_do(host: t.Any) -> None:
    assert converge(host, WISH) == [
        ("write", "/etc/modprobe.d/60-agentfleet.conf"),
        ("load", "module vhost_vsock"),
        ("set", "/sys/module/zswap/parameters/max_pool_percent"),
        ("set", "kernel.numa_balancing"),
        ("set", "net.ipv4.ip_local_port_range"),
        ("set", THP),
        ("set", "2MiB pages on node 1"),
        ("write", "/etc/modules-load.d/60-agentfleet.conf"),
        ("write", "/etc/sysctl.d/60-agentfleet.conf"),
        ("write", ORDER_FILE),
        ("write", "/etc/tmpfiles.d/60-agentfleet.conf"),
    ]
    assert host.read(ORDER_FILE) == HEADER + "[Unit]\nAfter=systemd-modules-load.service"
    assert "modprobe vhost_vsock" in host.calls
    assert host.read("/etc/modprobe.d/60-agentfleet.conf") == HEADER + "options kvm_amd nested=0"
    assert host.read("/etc/modules-load.d/60-agentfleet.conf") == HEADER + "vhost_vsock\nvfio_pci"
    assert host.read("/etc/tmpfiles.d/60-agentfleet.conf") == HEADER + (
        "w /sys/module/zswap/parameters/max_pool_percent - - - - 15\n"  # a built-in driver: modprobe.d has no effect
        f"w {THP} - - - - madvise\nw {PAGES} - - - - 20"
    )
    assert host.read(PAGES) == "20"
    host.files({"/sys/module/vhost_vsock/initstate": "live"})
    Path(host.path("/proc/modules")).write_text("vfio_pci 1 0\nkvm_amd 1 0\nvhost_vsock 1 0\n")
    Path(host.path(THP)).write_text("always [madvise] never")
    assert converge(host, WISH) == []


def test_what_is_dropped_from_the_wish_leaves_the_files(host: t.Any) -> None:
    converge(host, WISH)
    steps = converge(host, {"sysctl": {"kernel.numa_balancing": 2}})
    assert steps == [
        ("remove", "/etc/modprobe.d/60-agentfleet.conf"),
        ("remove", "/etc/modules-load.d/60-agentfleet.conf"),
        ("write", "/etc/sysctl.d/60-agentfleet.conf"),
        ("remove", ORDER_FILE),
        ("remove", "/etc/tmpfiles.d/60-agentfleet.conf"),
    ]
    assert host.names("/etc/modprobe.d") == host.names("/etc/tmpfiles.d") == []


def test_a_parameter_fixed_at_load_time_waits(host: t.Any) -> None:
    resource = Tunables(host, {"module_options": {"kvm_amd": {"nested": 0}}})
    result = resource.result(resource.observe())
    assert result["module_reloads"] == [
        {"module": "kvm_amd", "parameter": "nested", "running": "1", "wanted": "0", "action": "reload"}
    ]
    assert result["reboot_reasons"] == [
        "module kvm_amd: runs with nested=1, configured 0 (or reload it: modprobe -r kvm_amd)"
    ]
    Path(host.path("/sys/module/kvm_amd/refcnt")).write_text("2")
    assert resource.result(resource.observe())["module_reloads"][0]["action"] == "reboot"
    fine = Tunables(host, {"module_options": {"kvm_amd": {"nested": "Y"}}})
    assert fine.result(fine.observe())["reboot_required"] is False


def test_fewer_huge_pages_than_asked_is_an_error_and_is_undone(host: t.Any) -> None:
    wish = Tunables(host, {"hugepages": [{"node": 1, "size": "2MiB", "count": 20}]})
    steps = wish.plan(wish.observe())
    poke = host.poke

    def scarce(path: str, value: str) -> None:
        poke(path, "7" if path == PAGES and value == "20" else value)

    host.poke = scarce
    with pytest.raises(HostError, match=r"gave 7 of 20 pages of 2MiB on node 1 \(back to 0 now\): 7 are possible"):
        apply_all(wish, steps)
    assert host.read(PAGES) == "0"
    assert not host.exists("/etc/tmpfiles.d/60-agentfleet.conf")


def test_a_value_that_the_kernel_changes_is_an_error(host: t.Any) -> None:
    wish = Tunables(host, {"sysctl": {"kernel.numa_balancing": 9}})
    steps = wish.plan(wish.observe())
    poke = host.poke
    host.poke = lambda path, value: poke(path, "1")
    with pytest.raises(HostError, match="shows '1' after '9' was written"):
        apply_all(wish, steps)


def test_pages_are_given_back_before_others_are_taken(host: t.Any) -> None:
    gigantic = "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages"
    host.files({gigantic: "1"})
    pages = [{"node": 1, "size": "2MiB", "count": 20}, {"node": 1, "size": "1GiB", "count": 0}]
    resource = Tunables(host, {"hugepages": pages})
    steps = resource.plan(resource.observe())
    assert [(step.object, step.after) for step in steps[:2]] == [
        ("1GiB pages on node 1", 0),
        ("2MiB pages on node 1", 20),
    ]


def test_what_a_module_brings_is_not_refused_while_the_module_is_pending(host: t.Any) -> None:
    wish = {"modules": ["nf_conntrack"], "sysctl": {"net.netfilter.nf_conntrack_max": 262144}}
    resource = Tunables(host, wish)
    steps = resource.plan(resource.observe())
    assert [step.object for step in steps][:2] == ["module nf_conntrack", "net.netfilter.nf_conntrack_max"]
    with pytest.raises(HostError, match="No such file.*Done before it: load module nf_conntrack"):
        apply_all(resource, steps)
    Path(host.path("/proc/modules")).write_text("nf_conntrack 1 0\n")
    with pytest.raises(Refused, match="the kernel has no /proc/sys/net/netfilter/nf_conntrack_max"):
        resource.plan(resource.observe())


def test_sysctl_names() -> None:
    assert sysctl_path("kernel.numa_balancing") == "/proc/sys/kernel/numa_balancing"
    assert sysctl_path("net.ipv4.conf.eth0/1.forwarding") == "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
    assert sysctl_path("net/ipv4/conf/eth0.1/forwarding") == "/proc/sys/net/ipv4/conf/eth0.1/forwarding"


@pytest.mark.parametrize(
    ("now", "wanted", "equal"),
    [
        ("Y", "1", True),
        ("N", "off", True),
        ("[always] madvise never", "always", True),
        ("[always] madvise never", "never", False),
        ("32768\t60999", "32768 60999", True),
        ("20", "2", False),
    ],
)
def test_same(now: str, wanted: str, equal: bool) -> None:
    assert same(now, wanted) is equal
