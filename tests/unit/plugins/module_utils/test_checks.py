# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks of all roles: what a fit host passes, and what each deficiency is called."""

from __future__ import annotations

import copy
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._checks import CONFIG_OPTIONS, FEATURES, evaluate
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

GIB = 1 << 30
FIT: dict[str, t.Any] = {
    "os": {
        "id": "debian",
        "family": "debian",
        "architecture": "x86_64",
        "python": "3.13.5",
        "container": "",
        "cgroup_v2": True,
        "memory_bytes": 8 * GIB,
        "free_bytes": {"/": 5 * GIB},
    },
    "kernel": {
        "release": "6.12.107+deb13-amd64",
        "config": dict.fromkeys(CONFIG_OPTIONS, "m"),
        "parameters": {},
        "lockdown": "none",
        "secure_boot": False,
    },
    "numa": {"nodes": [{"id": 0, "size_bytes": 4 * GIB}, {"id": 1, "size_bytes": GIB}]},
    "cxl": {"memdevs": [{"serial": "0x1"}], "decoders": [{"name": "decoder0.0", "firmware_ram_bytes": 0}]},
    "iommu": {"enabled": True},
    "kvm": {"present": True, "usable": True, "extension": "svm"},
    "ub": {"present": False},
}
WANTS: dict[str, t.Any] = {
    "features": sorted(FEATURES),
    "cmdline": [{}, None, {"intel_iommu": "on"}],
    "cxl": True,
    "tiering": True,
    "vfio": True,
    "sriov": True,
    "kvm": True,
    "microvms": True,
    "free_space": {"/": "1GiB"},
    "memory": "4GiB",
    "hugepages": [{"node": 1, "size": "2MiB", "count": 100}],
}


def judged(changes: dict[str, t.Any], wants: dict[str, t.Any] | None = None) -> list[dict[str, str]]:
    """Failures of a fit host with some facts changed ("os.family" is a path)."""
    facts = copy.deepcopy(FIT)
    for path, value in changes.items():
        *parents, last = path.split(".")
        part = facts
        for name in parents:
            part = part[name]
        part[last] = value
    return evaluate(facts, {**WANTS, **(wants or {})})


def test_a_fit_host_passes() -> None:
    assert judged({}) == []


def test_no_facts_and_no_wants_do_not_raise() -> None:
    assert {failure["check"] for failure in evaluate({}, {})} == {"architecture", "distribution"}


def without(*options: str) -> dict[str, str]:
    return {key: value for key, value in FIT["kernel"]["config"].items() if key[7:] not in options}


CASES: list[tuple[dict[str, t.Any], dict[str, t.Any], str, str, str, str]] = [
    # facts, wants, role, check, problem, remedy
    ({"os.architecture": "riscv64"}, {}, "preflight", "architecture", "'riscv64'", "x86_64 or aarch64"),
    ({"os.family": "", "os.id": "arch"}, {}, "preflight", "distribution", "arch is not", "Debian 13"),
    ({"os.python": "3.8.10"}, {}, "preflight", "python", "3.8.10", "ansible_python_interpreter"),
    ({"os.container": "docker"}, {}, "preflight", "container", "docker container", "machine itself"),
    ({"os.cgroup_v2": False}, {}, "microvm", "cgroup_v2", "not unified", "kernel_cmdline"),
    ({"os.free_bytes": {"/": 1}}, {}, "preflight", "free_space", "1.0 GiB are needed", "larger disk"),
    ({}, {"free_space": {"/srv": "1GiB"}}, "preflight", "free_space", "/srv is not among", "one of /"),
    ({}, {"memory": "64GiB"}, "preflight", "memory", "64.0 GiB are needed", "more memory"),
    ({"kernel.lockdown": "confidentiality"}, {}, "kernel", "lockdown", "locked down", "integrity"),
    ({"kernel.secure_boot": True}, {"unsigned_modules": ["x"]}, "kernel", "secure_boot", "x is not signed", "mokutil"),
    ({"kernel.config": {}}, {}, "kernel", "kernel_config", "no configuration of kernel 6.12", "/boot/config-"),
    ({"kernel.release": "6.1.0-13-amd64"}, {}, "cxl", "kernel_version", "older than 6.3", "kernel_package"),
    ({}, {"features": ["cxll"]}, "kernel", "features", "'cxll'", "cxl, dax"),
    ({"kernel.config": without("CXL_REGION")}, {}, "cxl", "kernel_config", "CONFIG_CXL_REGION", "full kernel"),
    (
        {"kernel.config": without("INTEL_IOMMU", "AMD_IOMMU")},
        {},
        "vfio",
        "kernel_config",
        "CONFIG_INTEL_IOMMU or CONFIG_AMD_IOMMU",
        "CONFIG_INTEL_IOMMU=m",
    ),
    ({"kernel.config": without("PCI_IOV")}, {}, "vfio", "kernel_config", "CONFIG_PCI_IOV", "CONFIG_PCI_IOV=y"),
    ({"iommu.enabled": False}, {"cmdline": []}, "vfio", "iommu", "no IOMMU", "intel_iommu: 'on'"),
    ({"kvm": {"present": True, "extension": ""}}, {}, "microvm", "kvm", "neither vmx nor svm", "firmware"),
    ({"kvm": {"present": False, "extension": ""}}, {}, "microvm", "kvm", "there is no /dev/kvm", "kernel_modules"),
    ({"ub.present": True}, {"cmdline": [{"iommu": "pt"}]}, "ub", "iommu_passthrough", "iommu=pt", "iommu: null"),
    ({"kernel.parameters": {"efi": "debug,nosoftreserve"}}, {}, "cxl", "soft_reserve", "nosoftreserve", "efi: null"),
    ({"cxl.memdevs": []}, {}, "cxl", "cxl_memory", "no CXL memory device", "power-cycle"),
    ({"cxl.decoders": []}, {}, "cxl", "cxl_window", "no CXL window", "firmware"),
    ({"cxl.decoders": [{"firmware_ram_bytes": GIB}]}, {}, "cxl", "bios_owned", "1.0 GiB of CXL", "soft reserved"),
    ({}, {"hugepages": [{"node": 1, "size": "1GiB", "count": 2}]}, "kernel", "hugepages", "2.0 GiB", "Lower"),
    ({}, {"hugepages": [{"node": 7, "size": "2MiB", "count": 2}]}, "kernel", "hugepages", "does not exist", "0, 1"),
]


@pytest.mark.parametrize(("facts", "wants", "role", "check", "problem", "remedy"), CASES)
def test_each_deficiency_is_named(
    facts: dict[str, t.Any], wants: dict[str, t.Any], role: str, check: str, problem: str, remedy: str
) -> None:
    (failure,) = judged(facts, wants)
    assert (failure["role"], failure["check"]) == (role, check)
    assert problem in failure["problem"]
    assert remedy in failure["remedy"]


def test_unifiedbus_and_tiering_exclude_each_other() -> None:
    failures = judged({"os.architecture": "aarch64", "ub.present": True}, {"ub": True})
    assert [failure["check"] for failure in failures] == ["numa_balancing"]
    assert [failure["check"] for failure in judged({}, {"ub": True})] == [
        "architecture",
        "ub_firmware",
        "numa_balancing",
    ]


def test_an_iommu_about_to_be_switched_on_is_enough() -> None:
    assert judged({"iommu.enabled": False}, {"cmdline": [{"intel_iommu": "on,sm_on"}]}) == []
    assert judged({"iommu.enabled": False}, {"cmdline": [{"intel_iommu": "off"}]})[0]["check"] == "iommu"
    later_wins = [{"intel_iommu": "on"}, {"intel_iommu": None}]
    assert judged({"iommu.enabled": False}, {"cmdline": later_wins})[0]["check"] == "iommu"


def test_a_parameter_about_to_be_removed_does_no_harm() -> None:
    booted = {"kernel.parameters": {"efi": "nosoftreserve"}}
    assert judged(booted, {"cmdline": [{"efi": None}]}) == []


def test_kvm_that_is_only_not_loaded_is_left_to_the_role() -> None:
    assert judged({"kvm": {"present": False, "extension": "vmx"}}) == []
    failures = judged({"kvm": {"present": False, "extension": "vmx"}, "kernel.config": without("KVM_INTEL")})
    assert [failure["check"] for failure in failures] == ["kvm"]
    assert "no CONFIG_KVM_INTEL" in failures[0]["problem"]


def test_alternatives_by_architecture() -> None:
    smmu = {"os.architecture": "aarch64", "kernel.config": without("INTEL_IOMMU", "AMD_IOMMU", "IRQ_REMAP", "KVM_AMD")}
    assert judged(smmu) == []
    smmu["kernel.config"] = without("ARM_SMMU", "ARM_SMMU_V3")
    assert "CONFIG_ARM_SMMU_V3 or CONFIG_ARM_SMMU" in judged(smmu)[0]["problem"]


def test_all_failures_come_at_once() -> None:
    failures = judged({"kernel.config": without("CXL_REGION", "KVM", "FUSE_FS"), "os.python": "3.6.8"})
    assert [failure["role"] for failure in failures] == ["preflight", "cxl", "microvm", "threefs"]


def test_hidden_options_are_never_demanded() -> None:
    asked = {option for feature in FEATURES.values() for need in feature.needs for option in need.options}
    hidden = {"CXL_PORT", "CXL_SUSPEND", "IOMMU_API", "HMM", "DEVICE_PUBLIC", "DEVICE_PRIVATE", "ACPI_HOTPLUG_MEMORY"}
    assert asked & hidden == set()


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(Refused, match="free_space./: '1GB': not a size"):
        judged({}, {"free_space": {"/": "1GB"}})
