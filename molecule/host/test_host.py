# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a host, in order: made ready, cut off, misled, given back, and interrupted.

The tests build on each other and stop at the first failure: each starts from the state that the one before left.
"""

from __future__ import annotations

import time
import typing as t


def memory_of(host: t.Any, node: int) -> int:
    """MiB of a NUMA node that are online."""
    total = host.check_output(f"grep MemTotal /sys/devices/system/node/node{node}/meminfo")
    return int(total.split()[3]) >> 10


def exists(host: t.Any, path: str) -> bool:
    """Whether a path exists on a host that may just be rebooting."""
    try:
        return bool(host.run("test -e %s", path).rc == 0)
    except RuntimeError:  # testinfra's word for an ssh connection that failed
        return False


def assert_as_declared(host: t.Any) -> None:
    """The hardware as inventories/lab declares it, by the kernel's own files."""
    region = host.check_output("cd /sys/bus/cxl/devices; cat region*/commit region*/interleave_ways region*/size")
    assert region.split() == ["1", "2", hex(1 << 30)]
    nodes = host.check_output("cat /sys/devices/system/node/has_memory")
    assert nodes == "0-2" and memory_of(host, 2) == 1024
    assert host.check_output("cat /sys/devices/system/node/node2/cpulist") == ""
    assert host.check_output("cat /sys/kernel/mm/numa/demotion_enabled") == "true"
    assert host.sysctl("kernel.numa_balancing") == 2
    assert "[madvise]" in host.check_output("cat /sys/kernel/mm/transparent_hugepage/enabled")
    drivers = host.check_output("for d in /sys/bus/pci/drivers/vfio-pci/0000:*; do cat $d/class; done")
    assert "0x010802" in drivers.split(), "the NVMe controller"
    assert host.check_output("cat /sys/bus/pci/devices/*/sriov_numvfs | sort -rn | head -1") == "2"
    assert host.check_output("ls -d /sys/kernel/iommu_groups/0").strip()
    assert "intel_iommu=on" in host.file("/proc/cmdline").content_string.split()
    assert host.check_output("systemctl is-system-running") == "running"


def test_the_host_becomes_as_declared_and_stays(host: t.Any, lab: t.Any) -> None:
    assert lab.succeed("host").changed()
    assert_as_declared(host)
    assert lab.succeed("host").changed() == []


def test_everything_is_back_after_a_power_cut_without_ansible(host: t.Any, lab: t.Any) -> None:
    before = lab.fingerprint(host)
    lab.hosts("power_cut")
    lab.hosts("started")
    host.run("systemctl is-system-running --wait")
    assert_as_declared(host)
    assert lab.fingerprint(host) ^ before == set()


def test_a_command_line_that_cannot_boot_ends_on_the_old_entry(host: t.Any, lab: t.Any) -> None:
    before = lab.fingerprint(host)
    booted = host.file("/proc/cmdline").content_string
    failed = lab.play(
        "host",
        kernel_cmdline={"root": "/dev/does-not-exist"},
        kernel_cmdline_allow_unbootable=True,
    )
    assert failed.rc != 0
    assert "The candidate was not promoted" in failed.failures()
    assert "root=/dev/does-not-exist" in failed.failures() and "back on its old entry" in failed.failures()
    assert host.file("/proc/cmdline").content_string == booted
    host.run("systemctl is-system-running --wait")
    assert lab.fingerprint(host) ^ before == set()
    assert_as_declared(host)


def test_teardown_gives_the_host_back(host: t.Any, lab: t.Any) -> None:
    lab.succeed("teardown")
    assert host.check_output("ls /sys/bus/cxl/devices | grep -c region || true") == "0"
    assert host.check_output("ls -d /sys/bus/pci/drivers/vfio-pci/0000:* 2>/dev/null | wc -l") == "0"
    assert host.check_output("cat /sys/bus/pci/devices/*/sriov_numvfs | sort -rn | head -1") == "0"
    assert lab.succeed("teardown").changed() == []


def test_a_power_cut_in_the_middle_is_mended_by_the_next_run(host: t.Any, lab: t.Any) -> None:
    running = lab.start("host")
    end = time.monotonic() + 600
    while not exists(host, "/sys/bus/cxl/devices/region0"):  # made, but not yet stored for the next boot
        assert running.poll() is None and time.monotonic() < end, "the run ended before the power was cut"
        time.sleep(0.5)
    lab.hosts("power_cut")
    assert lab.finish(running).rc != 0
    lab.hosts("started")
    lab.succeed("host")
    assert_as_declared(host)
    assert lab.succeed("host").changed() == []
