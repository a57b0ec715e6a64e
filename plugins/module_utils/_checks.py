# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles need from a host, as data, and one pure function that says what is missing.

A built-in option and a module are alike. Options without a prompt (CXL_PORT,
IOMMU_API, ...) are never asked for: nobody can set them.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size

GIB = 1 << 30
PYTHON_FLOOR = (3, 9)
ARCHITECTURES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Need:
    """One of ``options`` (alternatives) must be in the kernel's configuration.

    :param purpose: what does not work without it
    :param architecture: asked for on this architecture only; empty for all
    """

    options: tuple[str, ...]
    purpose: str
    architecture: str = ""


@dataclass(frozen=True)
class Feature:
    """What a feature set needs: configuration options, and a kernel at least this new."""

    role: str
    floor: tuple[int, int]
    floor_reason: str
    needs: tuple[Need, ...]


FEATURES: dict[str, Feature] = {
    "cxl": Feature(
        "cxl",
        (6, 3),
        "CXL RAM regions become dax devices since 6.3",
        (
            Need(("CXL_BUS",), "the CXL bus"),
            Need(("CXL_PCI",), "CXL memory expanders on PCI"),
            Need(("CXL_ACPI",), "CXL windows that the firmware describes"),
            Need(("CXL_MEM",), "CXL.mem endpoints"),
            Need(("CXL_REGION",), "creating regions"),
            Need(("DEV_DAX_CXL",), "regions as dax devices"),
            Need(("DEV_DAX_KMEM",), "regions as system memory"),
            Need(("MEMORY_HOTPLUG",), "adding memory to a running kernel"),
            Need(("MEMORY_HOTREMOVE",), "taking memory away from a running kernel"),
            Need(("NUMA_BALANCING",), "promotion of hot pages to the faster tier"),
            Need(("MIGRATION",), "moving pages between tiers"),
        ),
    ),
    "dax": Feature(
        "cxl",
        (5, 16),
        "daxctl's device model is complete since 5.16",
        (
            Need(("DEV_DAX",), "dax character devices"),
            Need(("DEV_DAX_CXL", "DEV_DAX_HMEM", "DEV_DAX_PMEM"), "a source of dax devices"),
            Need(("DEV_DAX_KMEM",), "dax devices as system memory"),
            Need(("ZONE_DEVICE",), "page structures for device memory"),
            Need(("TRANSPARENT_HUGEPAGE",), "mapping dax devices in huge pages"),
            Need(("MEMORY_HOTPLUG",), "adding memory to a running kernel"),
        ),
    ),
    "vfio": Feature(
        "vfio",
        (5, 15),
        "vfio_pci is split into a core and drivers since 5.15",
        (
            Need(("INTEL_IOMMU", "AMD_IOMMU"), "an IOMMU driver", "x86_64"),
            Need(("ARM_SMMU_V3", "ARM_SMMU"), "an IOMMU driver", "aarch64"),
            Need(("IRQ_REMAP",), "interrupts of assigned devices kept apart", "x86_64"),
            Need(("VFIO",), "assigning devices to microVMs"),
            Need(("VFIO_PCI",), "assigning PCI functions"),
            Need(("VFIO_CONTAINER", "VFIO_IOMMU_TYPE1", "VFIO_DEVICE_CDEV"), "DMA mappings of assigned devices"),
        ),
    ),
    "microvm-host": Feature(
        "microvm",
        (5, 15),
        "the VMM drivers are proven from 5.15 on",
        (
            Need(("KVM",), "hardware virtualization"),
            Need(("KVM_INTEL", "KVM_AMD"), "hardware virtualization of this CPU", "x86_64"),
            Need(("TUN",), "tap devices"),
            Need(("BRIDGE",), "the microVMs' bridge"),
            Need(("VHOST_NET",), "fast virtio-net"),
            Need(("VHOST_VSOCK",), "vsock to microVMs of the QEMU driver"),
            Need(("NF_TABLES", "IP_NF_IPTABLES"), "address translation and isolation of tenants"),
            Need(("MEMCG",), "memory limits for each microVM"),
            Need(("CPUSETS",), "placement on CPUs and NUMA nodes"),
            Need(("MEMFD_CREATE",), "memory shared with virtiofsd"),
        ),
    ),
    "threefs": Feature(
        "threefs",
        (5, 4),
        "3FS is run on 5.4 and newer",
        (
            Need(("INFINIBAND",), "RDMA"),
            Need(("INFINIBAND_USER_ACCESS",), "RDMA from user space (verbs)"),
            Need(("FUSE_FS",), "mounting 3FS"),
            Need(("XFS_FS", "EXT4_FS"), "the storage targets' file system"),
        ),
    ),
}
# Asked for by checks below rather than by a feature set.
_SRIOV = "CONFIG_PCI_IOV"
CONFIG_OPTIONS: frozenset[str] = frozenset(
    [f"CONFIG_{option}" for feature in FEATURES.values() for need in feature.needs for option in need.options]
    + [_SRIOV, "CONFIG_IOMMUFD", "CONFIG_EFI_SOFT_RESERVE", "CONFIG_ZSWAP", "CONFIG_DAMON_SYSFS", "CONFIG_FUSE_DAX"]
)
_FULL_KERNEL = {
    "debian": "the distribution's full kernel (linux-image-amd64 or linux-image-arm64, not the cloud variant; "
    "on Ubuntu linux-generic with linux-modules-extra)",
    "redhat": "the distribution's kernel with kernel-modules-extra",
    "openeuler": "openEuler 24.03 LTS or newer with its own kernel",
}
# Parameters that switch an IOMMU on, and the values that do.
_IOMMU_ON = {"intel_iommu": ("on",), "iommu": ("force", "pt", "nopt", "1"), "amd_iommu": ("force_enable",)}
_IOMMU_PASSTHROUGH = (("iommu", "pt"), ("iommu.passthrough", "1"), ("iommu.passthrough", "on"))


def evaluate(facts: t.Mapping[str, t.Any], wants: t.Mapping[str, t.Any]) -> list[dict[str, str]]:
    """Everything that stands between this host and what the roles want of it.

    Missing facts and missing wants never raise: an absent want asks for nothing.

    :param facts: ``ansible_facts.metal``
    :param wants: the role ``preflight`` builds them (``preflight__wants``)
    :return: failures, each with ``check, problem, remedy, role``; empty when the host is fit
    """
    failures: list[dict[str, str]] = []

    def fail(role: str, check: str, problem: str, remedy: str) -> None:
        failures.append({"check": check, "problem": problem, "remedy": remedy, "role": role})

    for check in (_host_checks, _kernel_checks, _iommu_checks, _conflict_checks, _cxl_checks, _memory_checks):
        check(facts, wants, fail)
    return failures


_Fail = t.Callable[[str, str, str, str], None]
_Map = t.Mapping[str, t.Any]


def _part(facts: _Map, name: str) -> t.Any:
    return facts.get(name) or {}


def _host_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    system, kernel = _part(facts, "os"), _part(facts, "kernel")
    architecture = system.get("architecture", "")
    if architecture not in ARCHITECTURES:
        fail("preflight", "architecture", f"the host is {architecture!r}", "Use an x86_64 or aarch64 host")
    if wants.get("ub") and architecture != "aarch64":
        fail(
            "ub",
            "architecture",
            f"UnifiedBus exists on aarch64 only, the host is {architecture}",
            "Set preflight_ub: false",
        )
    if wants.get("ub") and not _part(facts, "ub").get("present"):
        fail(
            "ub",
            "ub_firmware",
            "the firmware has no ACPI table UBRT",
            "Switch UnifiedBus on in the firmware, or set preflight_ub: false",
        )
    if not system.get("family"):
        fail(
            "preflight",
            "distribution",
            f"{system.get('id') or 'this distribution'} is not of the Debian, RHEL or openEuler family",
            "Use Debian 13, Ubuntu 24.04, RHEL 9, openEuler 24.03 or a relative of one of them",
        )
    python = tuple(int(part) for part in re.findall(r"\d+", str(system.get("python", "")))[:2])
    if python and python < PYTHON_FLOOR:
        fail(
            "preflight",
            "python",
            f"Python {system['python']} runs the modules, 3.9 is the oldest that can",
            "Install a newer Python and set ansible_python_interpreter to it",
        )
    if system.get("container") and not wants.get("container_allowed"):
        fail(
            "preflight",
            "container",
            f"this is a {system['container']} container: the kernel and its devices belong to the host below",
            "Put the machine itself into the inventory",
        )
    if wants.get("microvms") and not system.get("cgroup_v2"):
        fail(
            "microvm",
            "cgroup_v2",
            "cgroups are not unified (version 2), so microVMs cannot be limited",
            "Remove systemd.unified_cgroup_hierarchy=0 and cgroup_no_v1 from the command line "
            "(kernel_cmdline with value null) and reboot",
        )
    lockdown = kernel.get("lockdown") or "none"
    if lockdown == "confidentiality":
        fail(
            "kernel",
            "lockdown",
            "the kernel is locked down for confidentiality: tracing and parts of vfio do not work",
            "Set kernel_cmdline: {lockdown: integrity}, or remove lockdown= from the command line",
        )
    if kernel.get("secure_boot") and wants.get("unsigned_modules"):
        fail(
            "kernel",
            "secure_boot",
            f"Secure Boot is on and {', '.join(wants['unsigned_modules'])} is not signed by the distribution",
            "Enroll the module's signing key (mokutil --import) or switch Secure Boot off in the firmware",
        )
    kvm = _part(facts, "kvm")
    driver = {"svm": "CONFIG_KVM_AMD", "vmx": "CONFIG_KVM_INTEL"}.get(kvm.get("extension", ""), "")
    # A driver that is only not loaded yet is loaded by the role kernel.
    if wants.get("kvm") and not kvm.get("usable") and driver not in _part(kernel, "config"):
        if kvm.get("present"):
            problem = "/dev/kvm exists, but the CPU shows neither vmx nor svm: guests would die at once"
        elif kvm.get("extension"):
            problem = f"the CPU has {kvm['extension']}, but the kernel has no {driver} and there is no /dev/kvm"
        else:
            problem = "the CPU shows neither vmx nor svm, and there is no /dev/kvm"
        fail(
            "microvm",
            "kvm",
            problem,
            "Load kvm_intel or kvm_amd (kernel_modules), switch virtualization on in the firmware or, "
            "in a virtual machine, nested virtualization on the machine below",
        )
    known = _part(system, "free_bytes")
    for path, size in sorted((wants.get("free_space") or {}).items()):
        wanted, free = parse_size(f"free_space.{path}", size), known.get(path)
        if free is None:
            fail(
                "preflight",
                "free_space",
                f"the free space of {path} is not among the facts",
                f"Declare it for one of {', '.join(sorted(known))}",
            )
        elif free < wanted:
            fail(
                "preflight",
                "free_space",
                f"{path} has {free / GIB:.1f} GiB free, {wanted / GIB:.1f} GiB are needed",
                f"Free space on {path} or give it a larger disk",
            )


def _kernel_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    kernel = _part(facts, "kernel")
    release, config = kernel.get("release", ""), _part(kernel, "config")
    architecture, family = _part(facts, "os").get("architecture", ""), _part(facts, "os").get("family", "")
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers.group(1)), int(numbers.group(2))) if numbers else None
    full_kernel = _FULL_KERNEL.get(family, "a kernel that has it")
    features = [str(name) for name in wants.get("features") or []]
    if features and not config:
        fail(
            "kernel",
            "kernel_config",
            f"no configuration of kernel {release} in /proc/config.gz, /boot or /lib/modules",
            "Install the package that carries /boot/config-RELEASE, or `modprobe configs`",
        )
    for name in features:
        feature = FEATURES.get(name)
        if feature is None:
            fail(
                "kernel",
                "features",
                f"there is no feature set {name!r}",
                f"Use of these: {', '.join(sorted(FEATURES))}",
            )
            continue
        if version is not None and version < feature.floor:
            fail(
                feature.role,
                "kernel_version",
                f"kernel {release} is older than {feature.floor[0]}.{feature.floor[1]}: {feature.floor_reason}",
                "Set kernel_package to a newer kernel of the distribution (backports, HWE)",
            )
        for need in feature.needs:
            names = [f"CONFIG_{option}" for option in need.options]
            if not config or need.architecture not in ("", architecture) or any(option in config for option in names):
                continue
            fail(
                feature.role,
                "kernel_config",
                f"kernel {release} has no {' or '.join(names)}, needed for {need.purpose}",
                f"Install {full_kernel} (kernel_package), or build the kernel with {names[0]}=m",
            )
    if wants.get("sriov") and config and _SRIOV not in config:
        fail(
            "vfio",
            "kernel_config",
            f"kernel {release} has no {_SRIOV}, needed for SR-IOV virtual functions",
            f"Install {full_kernel} (kernel_package), or build the kernel with {_SRIOV}=y",
        )


def _wished(wants: _Map) -> dict[str, list[str]]:
    """The command line that the roles ask for, as {name: [values]}; a later contribution wins."""
    wished: dict[str, list[str]] = {}
    for contribution in wants.get("cmdline") or []:
        for name, value in (contribution or {}).items():
            wished[str(name)] = (
                [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]
            )
    return wished


def _effective(facts: _Map, wants: _Map) -> dict[str, list[str]]:
    """Booted parameters, overlaid with the wished ones."""
    effective: dict[str, list[str]] = {}
    for name, value in _part(_part(facts, "kernel"), "parameters").items():
        effective[name] = ["" if v is True else str(v) for v in (value if isinstance(value, list) else [value])]
    return {**effective, **_wished(wants)}


def _iommu_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    if not (wants.get("vfio") or wants.get("iommu")) or _part(facts, "iommu").get("enabled"):
        return
    for name, values in _wished(wants).items():
        if any(part in _IOMMU_ON.get(name, ()) for value in values for part in value.split(",")):
            return
    architecture = _part(facts, "os").get("architecture", "")
    switch = "SMMU support" if architecture == "aarch64" else "VT-d or AMD-Vi"
    fail(
        "vfio",
        "iommu",
        "no IOMMU is at work: /sys/kernel/iommu_groups is empty, and the wished command line switches none on",
        f"Switch {switch} on in the firmware; on Intel also set kernel_cmdline: {{intel_iommu: 'on'}} "
        "and kernel_reboot_allowed: true",
    )


def _conflict_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    """What UnifiedBus cannot live beside."""
    effective = _effective(facts, wants)
    if wants.get("ub") or _part(facts, "ub").get("present"):
        for name, value in _IOMMU_PASSTHROUGH:
            if value in (part for text in effective.get(name, []) for part in text.split(",")):
                fail(
                    "ub",
                    "iommu_passthrough",
                    f"{name}={value} makes the UMMU unavailable, so UnifiedBus devices do not work",
                    f"Set vfio_iommu_passthrough: false and kernel_cmdline: {{{name}: null}}",
                )
    if wants.get("ub") and wants.get("tiering"):
        fail(
            "ub",
            "numa_balancing",
            "memory tiering needs kernel.numa_balancing=2, UnifiedBus needs 0",
            "Declare cxl_tiering or UnifiedBus on this host, not both",
        )


def _cxl_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    if not wants.get("cxl"):
        return
    cxl, effective = _part(facts, "cxl"), _effective(facts, wants)
    if "nosoftreserve" in (part for text in effective.get("efi", []) for part in text.split(",")):
        fail(
            "cxl",
            "soft_reserve",
            "efi=nosoftreserve makes the kernel take CXL memory as ordinary memory",
            "Set kernel_cmdline: {efi: null} and reboot",
        )
    memdevs, decoders = cxl.get("memdevs") or [], cxl.get("decoders") or []
    if not memdevs:
        fail(
            "cxl",
            "cxl_memory",
            "the kernel shows no CXL memory device",
            "Look for 'cxl' in the kernel log; after a warm reboot of an emulated host power-cycle it",
        )
    elif not decoders:
        fail(
            "cxl",
            "cxl_window",
            "the firmware describes no CXL window (CFMWS), so no region can be made",
            "Enable CXL memory expansion in the firmware",
        )
    for decoder in decoders:
        if decoder.get("firmware_ram_bytes"):
            fail(
                "cxl",
                "bios_owned",
                f"the firmware gave {decoder['firmware_ram_bytes'] / GIB:.1f} GiB of CXL memory to the kernel as "
                "ordinary memory (no EFI_MEMORY_SP)",
                "Set the firmware's 'CXL Memory Attribute' (or 'SPM') so that the memory is soft reserved",
            )


def _memory_checks(facts: _Map, wants: _Map, fail: _Fail) -> None:
    total = _part(facts, "os").get("memory_bytes") or 0
    wanted = parse_size("memory", wants["memory"]) if wants.get("memory") else 0
    if total and wanted > total:
        fail(
            "preflight",
            "memory",
            f"the host has {total / GIB:.1f} GiB of memory, {wanted / GIB:.1f} GiB are needed",
            "Lower what is declared for this host (hugepages, microVMs, pools) or give it more memory",
        )
    nodes = {node.get("id"): node for node in _part(facts, "numa").get("nodes") or []}
    asked: dict[int, int] = {}
    for item in wants.get("hugepages") or []:
        node = int(item.get("node", 0))
        asked[node] = asked.get(node, 0) + parse_size("size", item.get("size")) * int(item.get("count", 0))
    for number, size in sorted(asked.items()):
        has = (nodes.get(number) or {}).get("size_bytes")
        if nodes and has is None:
            fail(
                "kernel",
                "hugepages",
                f"huge pages are declared on NUMA node {number}, which does not exist",
                f"Use one of the nodes {', '.join(str(node) for node in sorted(nodes, key=str))}",
            )
        elif has is not None and size > has:
            fail(
                "kernel",
                "hugepages",
                f"{size / GIB:.1f} GiB of huge pages are declared on NUMA node {number}, which has {has / GIB:.1f} GiB",
                "Lower the count in kernel_hugepages",
            )
