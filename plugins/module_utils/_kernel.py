# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts about operating system, kernel, packages, KVM, RDMA and UnifiedBus.

Pure functions over a Host: no side effect; what cannot be read is absent or empty.
"""

from __future__ import annotations

import os
import platform
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._checks import CONFIG_OPTIONS
from ansible_collections.agentfleet.metal.plugins.module_utils._guardstate import booted, read_record
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

SYSCTLS = (
    "kernel.numa_balancing",
    "kernel.numa_balancing_promote_rate_limit_MBps",
    "vm.overcommit_memory",
    "vm.zone_reclaim_mode",
    "fs.aio-max-nr",
)
FILESYSTEMS = ("/", "/boot", "/var/lib")


def observe_os(host: Host) -> dict[str, t.Any]:
    """Distribution, its family, architecture, Python, and whether this is a host at all."""
    release = dict(_assignments(host.read("/etc/os-release") or host.read("/usr/lib/os-release")))
    like = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    family = ""
    for name, members in (
        ("openeuler", {"openeuler", "openEuler"}),
        ("debian", {"debian", "ubuntu"}),
        ("redhat", {"rhel", "fedora", "centos"}),
    ):
        if like & members:
            family = name
            break
    return {
        "id": release.get("ID", ""),
        "version_id": release.get("VERSION_ID", ""),
        "family": family,
        "architecture": host.read("/proc/sys/kernel/arch") or platform.machine(),
        "python": platform.python_version(),
        "container": _container(host),
        "cgroup_v2": host.exists("/sys/fs/cgroup/cgroup.controllers"),
        "memory_bytes": host.memory_bytes(),
        "free_bytes": {path: size for path in FILESYSTEMS if (size := _free_bytes(host, path)) is not None},
    }


def observe_kernel(host: Host) -> dict[str, t.Any]:
    """Release, the asked-for configuration options, command line, modules, some sysctls, the boot guard's phase."""
    release = host.read("/proc/sys/kernel/osrelease")
    cmdline = host.read("/proc/cmdline")
    return {
        "release": release,
        "config": kernel_config(host, release, CONFIG_OPTIONS),
        "cmdline": cmdline,
        "parameters": parameters(cmdline),
        "modules": sorted(line.split()[0] for line in host.read("/proc/modules").splitlines() if line.split()),
        "boot_id": host.read("/proc/sys/kernel/random/boot_id"),
        "sysctl": {key: value for key in SYSCTLS if (value := host.read("/proc/sys/" + key.replace(".", "/"))) != ""},
        "lockdown": _selected(host.read("/sys/kernel/security/lockdown")),
        "secure_boot": _secure_boot(host),
        "boot_guard": boot_guard(host),
    }


def observe_packages(host: Host) -> dict[str, str]:
    """Installed packages and their versions, from dpkg's status file or the rpm database."""
    if host.exists("/var/lib/dpkg/status"):
        return dpkg_packages(host.read("/var/lib/dpkg/status"))
    if not (host.exists("/var/lib/rpm") or host.exists("/usr/lib/sysimage/rpm")):
        return {}
    done = host.run(["rpm", "-qa", "--queryformat", "%{NAME}\\t%{EVR}\\n"], check=False)
    return dict(line.split("\t", 1) for line in sorted(done.stdout.splitlines()) if "\t" in line)


def observe_kvm(host: Host) -> dict[str, t.Any]:
    """Whether microVMs can use KVM; ``usable`` needs the CPU's flag too, since /dev/kvm alone proves nothing."""
    extension = ""
    for line in host.read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            flags = line.split()
            extension = "svm" if "svm" in flags else "vmx" if "vmx" in flags else ""
            break
    nested = any(host.read(f"/sys/module/{name}/parameters/nested") in ("1", "Y") for name in ("kvm_intel", "kvm_amd"))
    present = host.exists("/dev/kvm")
    arm = (host.read("/proc/sys/kernel/arch") or platform.machine()) == "aarch64"
    return {
        "present": present,
        "extension": extension,
        "usable": present and (arm or extension != ""),
        "nested": nested,
    }


def observe_rdma(host: Host) -> dict[str, t.Any]:
    """RDMA devices with their ports."""
    devices = []
    for name in host.names("/sys/class/infiniband"):
        base = f"/sys/class/infiniband/{name}"
        devices.append(
            {
                "name": name,
                "node_guid": host.read(f"{base}/node_guid"),
                "pci_address": host.link_name(f"{base}/device"),
                "netdevs": host.names(f"{base}/device/net"),
                "numa_node": host.read_int(f"{base}/device/numa_node"),
                "ports": [
                    {
                        "port": int(port),
                        "state": host.read(f"{base}/ports/{port}/state").partition(": ")[2],
                        "link_layer": host.read(f"{base}/ports/{port}/link_layer"),
                        "rate": host.read(f"{base}/ports/{port}/rate"),
                    }
                    for port in host.names(f"{base}/ports")
                    if port.isdigit()
                ],
            }
        )
    return {"devices": devices}


def observe_ub(host: Host) -> dict[str, t.Any]:
    """UnifiedBus: the firmware's table decides; devices are what the bus shows."""
    return {
        "present": host.exists("/sys/firmware/acpi/tables/UBRT"),
        "devices": [
            {
                "name": name,
                "driver": host.link_name(f"/sys/bus/ub/devices/{name}/driver"),
                **{
                    key: host.read(f"/sys/bus/ub/devices/{name}/{key}")
                    for key in ("guid", "type", "vendor", "device", "class_code")
                },
            }
            for name in host.names("/sys/bus/ub/devices")
        ],
    }


# -- parts that other files use ----------------------------------------------


def parameters(cmdline: str) -> dict[str, t.Any]:
    """A command line as {name: value}; True without a value, a list where a name is repeated."""
    found: dict[str, t.Any] = {}
    for token in cmdline.split():
        name, equals, text = token.partition("=")
        value: t.Any = text if equals else True
        if name in found:
            earlier = found[name]
            found[name] = [*(earlier if isinstance(earlier, list) else [earlier]), value]
        else:
            found[name] = value
    return found


def kernel_config(host: Host, release: str, options: t.Collection[str]) -> dict[str, str]:
    """``{CONFIG_X: "y" or "m"}`` for the options asked, from wherever this kernel's configuration is kept."""
    text = ""
    if host.exists("/proc/config.gz"):
        import gzip

        try:
            with gzip.open(host.path("/proc/config.gz"), "rt", encoding="utf-8", errors="replace") as file:
                text = file.read()
        except (OSError, EOFError):
            text = ""
    for path in (f"/boot/config-{release}", f"/lib/modules/{release}/config", f"/lib/modules/{release}/build/.config"):
        text = text or host.read(path)
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and value in ("y", "m") and name in options:
            found[name] = value
    return found


def boot_guard(host: Host) -> dict[str, str]:
    """The boot guard's phase (empty when nothing is armed) and what runs."""
    try:
        record = read_record(host)
    except HostError:
        return {"phase": "damaged", "booted": ""}
    return {"phase": str(record.get("phase", "")), "booted": booted(host, record)}


def _assignments(text: str) -> t.Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            yield name, value.strip("\"'")


def _container(host: Host) -> str:
    """The name of the container technology this runs in, or the empty string."""
    name = host.read("/run/systemd/container")
    for entry in host.read("/proc/1/environ").split("\0"):
        if not name and entry.startswith("container="):
            name = entry[len("container=") :] or "container"
    for path, known in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if not name and host.exists(path):
            name = known
    return name


def _free_bytes(host: Host, path: str) -> int | None:
    try:
        state = os.statvfs(host.path(path))
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def _selected(text: str) -> str:
    """``none`` of ``[none] integrity confidentiality``."""
    for word in text.split():
        if word.startswith("["):
            return word.strip("[]")
    return text


def _secure_boot(host: Host) -> bool:
    for path in host.glob("/sys/firmware/efi/efivars/SecureBoot-*"):
        try:
            with open(host.path(path), "rb") as file:
                return file.read()[-1:] == b"\x01"
        except OSError:
            return False
    return False


def dpkg_packages(text: str) -> dict[str, str]:
    """Package -> version of what is installed, also on hold, from dpkg's status file."""
    packages: dict[str, str] = {}
    name = ""
    installed = False
    for line in text.splitlines():
        if line.startswith("Package: "):
            name, installed = line[9:], False
        elif line.startswith("Status: "):
            installed = line.endswith(" installed")
        elif line.startswith("Version: ") and installed:
            packages[name] = line[9:]
    return packages
