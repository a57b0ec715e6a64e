# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guest kernels: the distribution's, or one built from the distribution's source package that needs no initramfs.

This module is private to the collection and imports nothing of Ansible.

A kernel is made once for each definition and kept in the cache as a directory: ``kernel``, ``config``, ``release``,
``busybox``, and for the distribution's kernel ``modules/`` and ``programs/``.
"""

from __future__ import annotations

import bz2
import glob
import lzma
import os
import re
import shutil
import struct
import typing as t
import zlib

from ansible_collections.agentfleet.metal.plugins.module_utils import _initramfs
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

RECIPE = 2  # part of every kernel's digest; raise it when the same definition gives another kernel

# Options that must be y or m (y in a kernel without initramfs), with what breaks without them.
OPTIONS = {
    "CONFIG_PVH": "direct boot",
    "CONFIG_VIRTIO_PCI": "every device",
    "CONFIG_VIRTIO_PMEM": "the shared image",
    "CONFIG_BLK_DEV_PMEM": "the shared image",
    "CONFIG_FS_DAX": "mapping the shared image without a copy",
    "CONFIG_EROFS_FS": "the shared image",
    "CONFIG_OVERLAY_FS": "a writable root over the shared image",
    "CONFIG_TMPFS": "a writable root over the shared image",
    "CONFIG_EXT4_FS": "volumes",
    "CONFIG_VIRTIO_BLK": "the configuration disk",
    "CONFIG_VIRTIO_NET": "networks",
    "CONFIG_VIRTIO_FS": "shares",
    "CONFIG_VIRTIO_VSOCKETS": "the readiness signal",
    "CONFIG_VIRTIO_CONSOLE": "the console",
    "CONFIG_SERIAL_8250_CONSOLE": "the console",
    "CONFIG_DEVTMPFS": "devices",
    "CONFIG_VIRTIO_BALLOON": "memory that the guest leaves to the host",
    "CONFIG_PAGE_REPORTING": "memory that the guest leaves to the host",
    "CONFIG_ACPI_BUTTON": "the power button",
    "CONFIG_INPUT_EVDEV": "the power button",
}

# What the defaults of Linux, its own kvm_guest.config and this make is a microVM's kernel. No modules, no initramfs.
FRAGMENT = "".join(
    f"CONFIG_{name}=y\n"
    for name in (
        "64BIT SMP X86_X2APIC HYPERVISOR_GUEST PARAVIRT PVH KVM_GUEST ACPI PCI PCI_MSI HOTPLUG_PCI "
        "HOTPLUG_PCI_ACPI PCIEPORTBUS HOTPLUG_PCI_PCIE ACPI_BUTTON INPUT INPUT_EVDEV MAGIC_SYSRQ TTY SERIAL_8250 "
        "SERIAL_8250_CONSOLE VIRTIO_MENU VIRTIO_PCI VIRTIO_BLK VIRTIO_NET VIRTIO_CONSOLE VIRTIO_BALLOON VIRTIO_FS "
        "PAGE_REPORTING HW_RANDOM HW_RANDOM_VIRTIO VIRT_DRIVERS VMGENID VSOCKETS VIRTIO_VSOCKETS NET UNIX INET "
        "IPV6 PACKET NETDEVICES SPARSEMEM_VMEMMAP MEMORY_HOTPLUG MEMORY_HOTREMOVE ACPI_HOTPLUG_MEMORY VIRTIO_MEM "
        "NUMA ACPI_NUMA ZONE_DEVICE TRANSPARENT_HUGEPAGE LIBNVDIMM VIRTIO_PMEM BLK_DEV BLK_DEV_PMEM DAX FS_DAX "
        "MISC_FILESYSTEMS EROFS_FS EROFS_FS_XATTR EXT4_FS OVERLAY_FS FUSE_FS PROC_FS SYSFS TMPFS TMPFS_XATTR "
        "TMPFS_POSIX_ACL DEVTMPFS DEVTMPFS_MOUNT BINFMT_ELF BINFMT_SCRIPT MD BLK_DEV_DM DM_INIT DM_VERITY "
        "CRYPTO_SHA256 NO_HZ_IDLE HIGH_RES_TIMERS POSIX_MQUEUE NAMESPACES USER_NS PID_NS NET_NS CGROUPS MEMCG "
        "CGROUP_PIDS CPUSETS CGROUP_SCHED SECCOMP SECCOMP_FILTER AIO IO_URING"
    ).split()
) + "CONFIG_NR_CPUS=256\n# CONFIG_MODULES is not set\n"  # fmt: skip
SOURCE_PROGRAMS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"}
SOURCE_FILES = {"/usr/include/libelf.h": "libelf-dev"}


# How a kernel package may have packed its kernel: first bytes -> what unpacks it. LZ4 is left to the guest.
UNPACK: dict[bytes, t.Callable[[bytes], bytes]] = {
    b"\xfd7zXZ\0": lzma.decompress,
    b"\x5d\0\0": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _initramfs.unzstd,
    b"\x1f\x8b": lambda data: zlib.decompress(data, wbits=31),
    b"BZh": bz2.decompress,
}


def unpacked(kernel: bytes) -> bytes:
    """The ELF file in a bzImage, which hypervisors enter directly (PVH); the kernel itself where it is not found.

    A guest that unpacks its own kernel does so at every start, and touches the memory for it twice.
    """
    if kernel[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", kernel, 0x206)[0] < 0x208:
        return kernel
    start, size = struct.unpack_from("<II", kernel, 0x248)
    start += 512 * ((kernel[0x1F1] or 4) + 1)
    payload = kernel[start : start + size]
    for magic, unpack in UNPACK.items():
        if payload.startswith(magic):
            # gzip has the size as its own last field; behind the others the kernel's build puts it.
            found = unpack(payload if magic == b"\x1f\x8b" else payload[:-4])
            if not found.startswith(b"\x7fELF"):
                return kernel
            table, entry, entries = struct.unpack_from("<Q10xHH", found, 0x28)
            return found[: table + entry * entries]  # what follows are relocations for another address
    return kernel


def check_options(config: str, package: str, values: str = "ym") -> None:
    """Assert what a microVM needs of its kernel.

    :param config: text of the kernel's configuration
    :param values: acceptable values: ``ym``, or ``y`` for a kernel that has no initramfs to load modules from
    """
    have = {line.partition("=")[0] for line in config.splitlines() if re.search(f"=[{values}]$", line)}
    missing = [f"{option} ({use})" for option, use in OPTIONS.items() if option not in have]
    if missing:
        raise HostError(f"the kernel of {package} lacks {', '.join(missing)}. Choose a kernel that has them")


def unmet(fragment: str, config: str) -> list[str]:
    """The lines of a fragment that a finished configuration does not have."""
    have = set(config.splitlines())
    wanted: dict[str, str] = {}
    for line in fragment.splitlines():
        if match := re.match(r"(?:# )?(CONFIG_\w+)[ =]", line):
            wanted[match.group(1)] = line
    return [
        line for option, line in wanted.items()
        if ((line not in have) and not (line.startswith("# ") or line.endswith("=n")))
        or ((line.startswith("# ") or line.endswith("=n")) and any(one.startswith(f"{option}=") for one in have))
    ]  # fmt: skip


def from_package(host: Host, tree: str, target: str, package: str, verity: bool) -> None:
    """Take the kernel, its modules and what an initramfs needs from unpacked packages.

    :param target: real path of the kernel's directory, which exists
    """
    kernels = glob.glob(f"{tree}/boot/vmlinuz-*")
    if len(kernels) != 1:
        raise HostError(f"{package} brought {len(kernels)} kernels instead of one. Choose a kernel package")
    release = kernels[0].rpartition("/vmlinuz-")[2]
    config = Host(tree).read(f"/boot/config-{release}")
    check_options(config, package)
    modules = next(path for path in (f"{tree}/usr/lib/modules", f"{tree}/lib/modules") if os.path.isdir(path))
    shutil.copytree(f"{modules}/{release}", f"{target}/modules", symlinks=True)
    _finish(tree, target, kernels[0], release, config)
    for path, source in _with_libraries(host, tree, "dmsetup").items() if verity else ():
        os.makedirs(os.path.dirname(f"{target}/programs{path}"), exist_ok=True)
        shutil.copyfile(source, f"{target}/programs{path}")


def from_source(host: Host, tree: str, target: str, package: str, fragment: str, epoch: int) -> None:
    """Build a kernel with everything built in.

    :param tree: where the source package is unpacked; the build happens below it
    :param fragment: the user's lines of configuration, which come last
    """
    archives = glob.glob(f"{tree}/usr/src/linux-source-*.tar.*")
    if len(archives) != 1:
        raise HostError(
            f"{package} brought {len(archives)} kernel sources instead of one. Name one such as linux-source"
        )
    source = f"{tree}/source"
    os.mkdir(source)
    host.run(["tar", "-C", source, "--strip-components=1", "-xf", archives[0]], timeout_seconds=600)
    wanted = FRAGMENT + fragment
    guest = Host(source).read("/kernel/configs/kvm_guest.config") + "\n"
    host.write(f"{source}/agentfleet.config", guest + wanted)
    make = [
        "make", "-s", "-C", source, "KCONFIG_ALLCONFIG=agentfleet.config", f"KBUILD_BUILD_TIMESTAMP=@{epoch}",
        "KBUILD_BUILD_USER=agentfleet", "KBUILD_BUILD_HOST=agentfleet", "KBUILD_BUILD_VERSION=1", "LOCALVERSION=",
    ]  # fmt: skip
    host.run([*make, "alldefconfig"], timeout_seconds=600)
    config = Host(source).read("/.config")
    missing = unmet(wanted, config)
    if missing:
        raise HostError(
            f"the sources of {package} do not take {', '.join(missing)}. Correct the fragment, or take it out of it"
        )
    check_options(config, package, "y")
    host.run([*make, f"-j{os.cpu_count() or 1}", "bzImage"], timeout_seconds=4 * 3600)
    release = host.run([*make, "kernelrelease"], timeout_seconds=300).stdout.split()[-1]
    _finish(tree, target, f"{source}/arch/x86/boot/bzImage", release, config)


def _finish(tree: str, target: str, kernel: str, release: str, config: str) -> None:
    with open(kernel, "rb") as packed, open(f"{target}/kernel", "wb") as file:
        file.write(unpacked(packed.read()))
    busybox = next(path for path in (f"{tree}/usr/bin/busybox", f"{tree}/bin/busybox") if os.path.isfile(path))
    shutil.copyfile(busybox, f"{target}/busybox")
    host = Host(target)
    host.write("/config", config + "\n")
    host.write("/release", release + "\n")  # comes last: a directory that has it is complete


def _with_libraries(host: Host, tree: str, program: str) -> dict[str, str]:
    """Path in the initramfs -> file, for a dynamically linked program of unpacked packages."""
    binary = next(
        f"{tree}{path}/{program}" for path in ("/usr/sbin", "/sbin") if os.path.exists(f"{tree}{path}/{program}")
    )
    loader = os.path.realpath(next(iter(glob.glob(f"{tree}/usr/lib64/ld-*") or glob.glob(f"{tree}/lib64/ld-*"))))
    if not os.path.exists(loader):  # an absolute link of the unpacked packages
        loader = glob.glob(f"{tree}/**/ld-linux-x86-64.so.2", recursive=True)[0]
    library = ":".join(f"{tree}{path}" for path in ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu"))
    listed = host.run([loader, "--library-path", library, "--list", binary]).stdout
    found = {f"/usr/lib/agentfleet/bin/{program}": binary, "/lib64/ld-linux-x86-64.so.2": loader}
    for name, path in re.findall(r"(\S+) => (\S+)", listed):
        found[f"/lib/x86_64-linux-gnu/{name}"] = path
    return found
