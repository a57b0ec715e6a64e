# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel command line: wished, configured, booted, and what a reboot would change."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._bootguard import (
    Guard,
    arm_step,
    running_arguments,
    summary,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._bootloader import (
    PAGES,
    Entry,
    loader_of,
    split,
    unmet,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._guardstate import Record
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused, Step

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.,:-]*$")
_VALUE = re.compile(r"""^[^\s"'`$\\;&|<>{}]*$""")
UNSAFE = (
    *("root", "ro", "rw", "init", "rdinit", "rootfstype", "rootflags", "rootdelay", "resume", "single", "emergency"),
    *("systemd.unit", "systemd.mask", "rd.break", "panic"),
)
FORBIDDEN = {
    "pcie_acs_override": (
        "exists only in an out-of-tree patch and breaks the isolation that IOMMU groups promise",
        "Assign the whole group, use another slot, or `pci: disable_acs_redir=...` of the mainline kernel",
    ),
    "BOOT_IMAGE": ("is set by the boot loader", "Choose the kernel by its package"),
    "initrd": ("is set by the boot loader", "Rebuild the initramfs with the distribution's tool"),
    "agentfleet.candidate": ("is the boot guard's own mark", "Leave it out"),
}
# YAML 1.1 reads 1:4 as the number 64.
NODE_COUNTS = ("hugepages", "hugetlb_cma")
_UB_SIGNS = ("ummu.", "pmd_mapping", "numa_remote", "obmm.")
_PASSTHROUGH = ("iommu=pt", "iommu.passthrough=1", "iommu.passthrough=on")


# The options as Ansible checks them; what they mean is in the documentation of the module kernel_cmdline.
OPTIONS: dict[str, t.Any] = {
    "parameters": {"type": "dict", "default": {}},
    "backend": {"type": "str", "choices": ["auto", "grub_d", "grubby", "openeuler"], "default": "auto"},
    "guard": {"type": "bool", "default": True},
    "allow_unbootable": {"type": "bool", "default": False},
}


class KernelCmdline:
    """The wish of the module ``kernel_cmdline``."""

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.with_guard: bool = params.get("guard", True)
        self.unsafe: bool = params.get("allow_unbootable", False)
        self.wish = {
            str(name): self._tokens(str(name), value) for name, value in (params.get("parameters") or {}).items()
        }
        if "hugepages" in self.wish:  # a count is for the size before it
            self.wish["hugepages"] = self.wish.pop("hugepages")
        self.loader = loader_of(host, params.get("backend") or "auto")
        self.guard = Guard(host, self.loader)
        self.warnings: list[str] = []

    def _tokens(self, name: str, value: t.Any) -> tuple[str, ...]:
        """The words of one parameter on the command line."""
        option = f"parameters.{name}"
        if not _NAME.match(name):
            raise Refused(
                option, value, "not a parameter's name", "Write the name alone, without '=', blanks or quotes"
            )
        if name in FORBIDDEN:
            raise Refused(option, value, f"{name} {FORBIDDEN[name][0]}", FORBIDDEN[name][1])
        if name in UNSAFE and not self.unsafe:
            raise Refused(
                option,
                value,
                "a wrong value leaves a host that does not boot",
                "Set allow_unbootable: true if you mean it (the boot guard brings the host back)",
            )
        if value is None:
            if name in ("root", "ro", "rw"):
                raise Refused(option, value, "the boot loader adds it by itself", "Leave it out, or give a value")
            return ()
        values = value if isinstance(value, list) else [value]
        if not values:
            raise Refused(
                option, value, "an empty list says neither what nor that nothing shall be there", "Write null"
            )
        if name in PAGES and len(values) > 1:
            raise Refused(
                option,
                value,
                "a list: the kernel takes a count for the size before it, and would get all sizes before all counts",
                "Give one size with its count here ('0:4,1:4' for several nodes), and the others to kernel_tunables "
                "(kernel_hugepages)",
            )
        return tuple(self._token(option, name, item) for item in values)

    @staticmethod
    def _token(option: str, name: str, value: t.Any) -> str:
        if isinstance(value, bool):
            raise Refused(
                option,
                value,
                "a boolean: YAML reads on, off, yes and no so, and the kernel does not know which it was",
                "Write the kernel's word in quotes ('on'), '' for a parameter without value, or null for none",
            )
        if isinstance(value, int) and name in NODE_COUNTS:
            raise Refused(
                option, value, "a number: YAML reads 1:4 as 64, so node and count may be lost", "Write it in quotes"
            )
        if not isinstance(value, (str, int)):
            raise Refused(option, value, "neither text nor a whole number", "Write it in quotes, such as '1.10'")
        if not _VALUE.match(str(value)):
            raise Refused(
                option,
                value,
                "has blanks, quotes, or one of $\\;&|<>{}, which GRUB or the shell would read otherwise "
                "(at a semicolon the command line would end)",
                "Give one word; for several occurrences of a parameter give a list",
            )
        return name if value == "" else f"{name}={value}"

    # -- observing and planning ----------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Default entry, booted command line and the guard's record."""
        record = self.guard.record()
        default = self.loader.default(record.get("default", ""))
        predicted, certain = self.loader.predicted(default.arguments, self.wish)
        return {
            "default": default,
            "predicted": predicted,
            "certain": certain,
            "cmdline": self.host.read("/proc/cmdline"),
            "release": self.host.read("/proc/sys/kernel/osrelease"),
            "record": record,
        }

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Arm, configure, put on trial; or only what is missing of it."""
        record: Record = observed["record"]
        self._refuse(observed)
        predicted = observed["predicted"]
        configure = self.loader.configure(self.wish, predicted, bool(record))
        if not self.with_guard:
            return configure
        pending = bool(self._reasons(observed)) or (
            not observed["certain"] and any(step.data[0] == "generate" for step in configure)
        )
        by_grub = "BOOT_IMAGE=" in observed["cmdline"]
        steps = []
        if pending and (configure or by_grub):
            if not self.guard.complete(record):
                try:
                    if not record:
                        self.guard.possible()
                except Refused as refusal:
                    if configure:
                        raise
                    # Someone else changed the default entry; that alone is no reason to refuse our wish.
                    self.warnings.append(f"the next reboot is not guarded: {refusal}")
                    return []
                steps.append(arm_step(self.host))
            steps += [*configure, *([] if configure else self.loader.hold())]
            if steps or not self.guard.staged(record, predicted, observed["default"].release):
                steps.append(
                    Step(
                        "try", "candidate", None, predicted, "at the next boot, once", disruptive=True, data=("stage",)
                    )
                )
            return steps
        if record:  # the wish is again what runs
            return [*configure, Step("disarm", "boot guard", why="nothing waits for a reboot", data=("disarm",))]
        return configure

    def _refuse(self, observed: t.Mapping[str, t.Any]) -> None:
        record = observed["record"]
        booted = self.guard.booted(record)
        if record and ((record["phase"] != "arming" and booted != "not_rebooted") or booted == "candidate"):
            raise Refused(
                "parameters",
                sorted(self.wish),
                f"an earlier candidate is not decided on (phase {record['phase']}, running: {booted})",
                "Promote it or roll it back with boot_guard first; the role kernel does so by itself",
            )
        words = observed["predicted"].split()
        ub = self.host.exists("/sys/firmware/acpi/tables/UBRT") or any(word.startswith(_UB_SIGNS) for word in words)
        for word in [word for tokens in self.wish.values() for word in tokens]:
            name, _equals, value = word.partition("=")
            if ub and any(f"{name}={part}" in _PASSTHROUGH for part in value.split(",")):
                raise Refused(
                    f"parameters.{name}",
                    value,
                    "IOMMU passthrough makes the UMMU unavailable, so UnifiedBus devices would not work",
                    "Leave it out on UnifiedBus hosts",
                )

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if self.loader.apply(step):
            return
        kind = step.data[0]
        if kind == "stage" and not self._reasons(self.observe()):
            kind = "disarm"  # what was generated is what runs
        {"arm": self.guard.arm, "stage": self.guard.stage, "disarm": self.guard.disarm}[kind]()

    # -- reporting -----------------------------------------------------------

    def _reasons(self, observed: t.Mapping[str, t.Any]) -> list[str]:
        """What a reboot would change, one sentence each."""
        default: Entry = observed["default"]
        predicted, booted = observed["predicted"], running_arguments(observed["cmdline"])
        reasons = []
        if "BOOT_IMAGE=" in observed["cmdline"]:
            if default.release and default.release != observed["release"]:
                reasons.append(f"kernel: runs {observed['release']}, the default entry has {default.release}")
            want, have = split(predicted), split(booted)
            if re.search(r"(?<!\\)\$", predicted):  # variables of the boot loader: only what was wished can be compared
                names = unmet(booted, self.wish)
            else:
                names = list(
                    dict.fromkeys(word.partition("=")[0] for word in want + have if (word in want) != (word in have))
                )
            if default.twice:  # in these each of the two has its own
                names = [name for name in names if name not in ("root", "panic")]
        else:
            names = unmet(booted, self.wish)
        return reasons + [
            f"command line: booted {_show(booted, name)}, configured {_show(predicted, name)}" for name in names
        ]

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Configured, booted and waiting, kept apart."""
        predicted, booted = observed["predicted"], running_arguments(observed["cmdline"])
        reasons = self._reasons(observed)
        return {
            "backend": self.loader.name,
            "configured": {name: _words(predicted, name) for name in self.wish},
            "booted": {name: _words(booted, name) for name in self.wish},
            "reboot_required": bool(reasons),
            "reboot_reasons": reasons,
            "boot_guard": summary(self.guard, observed["record"]),
            "warnings": self.warnings,
        }


def _words(arguments: str, name: str) -> list[str]:
    return [word for word in split(arguments) if word.partition("=")[0] == name]


def _show(arguments: str, name: str) -> str:
    return " ".join(_words(arguments, name)) or f"without {name}"
