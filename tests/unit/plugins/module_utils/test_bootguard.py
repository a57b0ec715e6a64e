# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line and its guard, played through on doubles of the boot loaders, with power cuts at every point."""

from __future__ import annotations

import importlib.util
import re
import typing as t
from pathlib import Path

import pytest
import yaml
from jinja2 import Environment

from ansible_collections.agentfleet.metal.plugins.module_utils._bootguard import STATE, BootGuard, running_arguments
from ansible_collections.agentfleet.metal.plugins.module_utils._bootloader import (
    DROP_IN,
    KNOWN_GOOD,
    drop_in,
    parse_entries,
    render,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._cmdline import KernelCmdline
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host, run_process
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all


def double(name: str) -> t.Any:
    """A program of tests/doubles."""
    path = Path(__file__).parents[3] / "doubles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"double_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRUB, GRUBBY = double("grub"), double("grubby")
ROLE = Path(__file__).parents[4] / "roles/kernel"
UNDECIDED = Environment().from_string(yaml.safe_load((ROLE / "vars/main.yml").read_text())["kernel__undecided"])
OLD, NEW = "6.12.1-amd64", "6.13.0-amd64"


class PowerCut(Exception):
    """The power is gone."""


class Machine(Host):
    """A host that boots through a double of its boot loader, and whose power can be cut before any write."""

    def __init__(self, root: str, backend: str) -> None:
        super().__init__(root, self._run)
        self.backend, self.boots, self.writes, self.cut_at = backend, 0, 0, -1
        self.failed, self.mute = "", False
        self.directory = {"grub_d": "/boot/grub"}.get(backend, "/boot/grub2")
        for path in ("boot/loader/entries", "etc/default/grub.d", "proc/sys/kernel/random", "usr/sbin", "etc/kernel"):
            Path(root, path).mkdir(parents=True)
        Path(root, self.directory.lstrip("/")).mkdir()
        self.install(OLD)
        Path(root, "etc/default/grub").write_text('GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX="console=tty0 quiet"\n')
        Path(root, "proc/mounts").write_text("/dev/vda1 / ext4 rw 0 0\n")
        if backend == "grubby":
            Path(root, "usr/sbin/grubby").write_text("")
            Path(root, "etc/kernel/cmdline").write_text("root=UUID=1234 ro console=tty0 quiet\n")
            Path(root, "boot/grub2/grub.cfg").write_text(GRUB.HEADER % "${saved_entry}")
            GRUB.editenv(["", self.path("/boot/grub2/grubenv"), "set", f"saved_entry=abc-{OLD}"])
        else:
            if backend == "openeuler":
                Path(root, "etc/openEuler-release").write_text("openEuler release 24.03 (LTS-SP3)\n")
            Path(root, "usr/sbin/grub-mkconfig").write_text("")
            text = GRUB.mkconfig(root, [], backend == "grub_d")[1]
            Path(root, self.directory.lstrip("/"), "grub.cfg").write_text(text)
        self.boot()

    def install(self, release: str) -> None:
        """A kernel package and what its scripts do."""
        for name in (f"vmlinuz-{release}", f"initrd.img-{release}"):
            Path(self.root, "boot", name).write_text(name)
        if self.backend == "grubby":
            Path(self.root, f"boot/loader/entries/abc-{release}.conf").write_text(
                f"title Linux {release}\nversion {release}\nlinux /vmlinuz-{release}\ninitrd /initrd.img-{release}\n"
                "options root=UUID=1234 ro console=tty0 quiet\n"
            )
            GRUB.editenv(["", self.path("/boot/grub2/grubenv"), "set", f"saved_entry=abc-{release}"])
        elif self.boots:
            path = Path(self.root, self.directory.lstrip("/"), "grub.cfg")
            path.write_text(GRUB.mkconfig(self.root, [], self.backend == "grub_d")[1])

    def boot(self) -> None:
        """Power on."""
        self.boots += 1
        cmdline = GRUB.boot(self.root, self.directory, self.backend == "grubby")
        kernel = cmdline.split()[0].rpartition("/")[2].partition("-")[2]
        kernel = OLD if kernel == f"{KNOWN_GOOD}.vmlinuz".partition("-")[2] else kernel
        Path(self.root, "proc/cmdline").write_text(cmdline + "\n")
        Path(self.root, "proc/sys/kernel/osrelease").write_text(kernel + "\n")
        Path(self.root, "proc/sys/kernel/random/boot_id").write_text(f"boot-{self.boots}\n")

    @property
    def cmdline(self) -> str:
        return running_arguments(self.read("/proc/cmdline"))

    def _mutate(self) -> None:
        self.writes += 1
        if self.writes == self.cut_at:
            raise PowerCut

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        self._mutate()
        super().write(path, text, mode)

    def remove(self, path: str) -> None:
        self._mutate()
        super().remove(path)

    def _run(self, argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
        program, words = argv[0], list(argv)
        if program in ("grub-editenv", "grub2-editenv"):
            self._mutate()
            return Completed(tuple(argv), *GRUB.editenv(words))
        if program in ("grub-mkconfig", "grub2-mkconfig"):
            return Completed(tuple(argv), *GRUB.mkconfig(self.root, words, program == "grub-mkconfig"))
        if program == "grubby":
            if "--info=ALL" not in words:
                self._mutate()
            return Completed(tuple(argv), *GRUBBY.grubby(self.root, words))
        if program == "journalctl":
            return Completed(tuple(argv), 0, "start operation timed out\nFailed with result 'timeout'.\n")
        if program == "systemctl":
            if "list-units" in words and self.mute:
                return Completed(tuple(argv), 1, "", "Failed to list units: Connection timed out")
            running = "is-system-running" in words
            return Completed(tuple(argv), 0, "running\n" if running else f"{self.failed}\n")
        if program == "sh":
            return run_process(argv, stdin, timeout_seconds)
        return Completed(tuple(argv), 127, "", f"{program}: not found")


@pytest.fixture(params=["grub_d", "openeuler", "grubby"])
def machine(request: t.Any, tmp_path: Path) -> Machine:
    """A booted machine of each kind."""
    return Machine(str(tmp_path), request.param)


def run(resource: t.Any) -> list[str]:
    """Converge; returns the verbs."""
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    return [step.verb for step in steps]


def undecided(facts: dict[str, t.Any]) -> bool:
    """What the role kernel says of it."""
    known = {"ansible_facts": {"metal": {"kernel": {"boot_guard": facts}}}}
    return bool(UNDECIDED.render(known) == "True")


def play(machine: Machine, parameters: dict[str, t.Any], **options: t.Any) -> str:
    """What the role kernel does, in short: 'promoted', 'rolled back' or 'nothing to do'."""
    params = {"parameters": parameters, "allow_unbootable": True, **options}
    guard = {"health_checks": []}
    info = BootGuard(machine, {"state": None})
    facts = info.result(info.observe())["boot_guard"]
    if not undecided(facts):
        pass
    elif facts["phase"] == "promoting" or (facts["booted"] == "candidate" and facts["phase"] != "rolling_back"):
        run(BootGuard(machine, {"state": "promoted", **guard}))
    elif facts["phase"] == "rolling_back" or (facts["phase"] == "armed" and facts["booted"] == "known_good"):
        run(BootGuard(machine, {"state": "rolled_back"}))
    wish = KernelCmdline(machine, params)
    run(wish)
    if not wish.result(wish.observe())["reboot_required"]:
        return "nothing to do"
    machine.boot()
    facts = info.result(info.observe())["boot_guard"]
    good = facts["booted"] == "candidate"
    run(BootGuard(machine, {"state": "promoted" if good else "rolled_back", **guard}))
    return "promoted" if good else "rolled back"


def traces(machine: Machine) -> list[str]:
    """What the guard left behind."""
    found = [str(path.relative_to(machine.root)) for path in Path(machine.root, "boot").rglob("*agentfleet*")]
    found += [path for path in (STATE, f"{machine.directory}/custom.cfg") if machine.exists(path)]
    environment = GRUB.read_environment(machine.path(f"{machine.directory}/grubenv"))
    return found + [f"{name}={value}" for name, value in environment.items() if "agentfleet" in value]


def test_a_good_command_line_is_promoted_and_then_nothing_is_left_to_do(machine: Machine) -> None:
    wish = {"intel_iommu": "on", "nosmt": "", "quiet": None}
    assert play(machine, wish) == "promoted"
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 intel_iommu=on nosmt"
    assert traces(machine) == []
    assert run(KernelCmdline(machine, {"parameters": wish})) == []
    machine.boot()  # for good, without the temporary parameters
    assert "panic" not in machine.read("/proc/cmdline")
    assert "intel_iommu=on nosmt" in machine.read("/proc/cmdline")


def test_a_broken_command_line_comes_back_and_leaves_the_host_as_before(machine: Machine) -> None:
    before = {path: Path(machine.root, path).read_bytes() for path in files(machine)}
    assert play(machine, {"root": "/dev/does-not-exist"}) == "rolled back"
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet"
    assert {path: Path(machine.root, path).read_bytes() for path in files(machine)} == before
    machine.boot()
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet"


def files(machine: Machine) -> list[str]:
    """Files of the boot configuration (the environment block is compared by its variables)."""
    roots = [Path(machine.root, "boot"), Path(machine.root, "etc")]
    found = [str(path.relative_to(machine.root)) for root in roots for path in root.rglob("*") if path.is_file()]
    return sorted(path for path in found if not path.endswith("grubenv"))


@pytest.mark.parametrize("wish", [{"intel_iommu": "on"}, {"root": "/dev/does-not-exist"}], ids=["good", "broken"])
def test_a_power_cut_at_any_write_loses_nothing(wish: dict[str, t.Any], tmp_path: Path) -> None:
    for backend in ("grub_d", "openeuler", "grubby"):
        for cut_at in range(1, 100):
            machine = Machine(str(tmp_path / f"{backend}{cut_at}"), backend)
            machine.cut_at = cut_at
            try:
                outcome = play(machine, wish)
            except PowerCut:
                machine.boot()  # raises Lost when the host does not come up by itself
                outcome = play(machine, wish)
            else:
                assert cut_at > 10
                break  # the whole play has fewer writes than that
            if "root" in wish:
                assert outcome == "rolled back", cut_at
                assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet"
            else:
                assert outcome in ("promoted", "nothing to do"), cut_at
                assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet intel_iommu=on"
            assert traces(machine) == [], cut_at
            machine.boot()
            assert "agentfleet" not in machine.read("/proc/cmdline")


def test_another_kernel_boots_on_trial(machine: Machine) -> None:
    assert run(BootGuard(machine, {"state": "armed"}))[0] == "arm"
    machine.install(NEW)
    assert play(machine, {}) == "promoted"
    assert machine.read("/proc/sys/kernel/osrelease") == NEW
    assert traces(machine) == []
    machine.boot()
    assert machine.read("/proc/sys/kernel/osrelease") == NEW


def test_a_kernel_that_the_role_installed_boots_only_on_trial(machine: Machine) -> None:
    for task in yaml.safe_load((ROLE / "tasks/main.yml").read_text()):  # up to a failure of what comes then
        if "agentfleet.metal.boot_guard" in task:
            run(BootGuard(machine, {"state": task["agentfleet.metal.boot_guard"]["state"]}))
        elif "ansible.builtin.package" in task:
            machine.install(NEW)
    machine.boot()
    assert machine.read("/proc/sys/kernel/osrelease") == OLD
    assert play(machine, {}) == "promoted"
    assert machine.read("/proc/sys/kernel/osrelease") == NEW


def test_a_menu_that_ignores_the_saved_entry_is_not_guarded(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grubby")
    Path(machine.root, "boot/grub2/grub.cfg").write_text(GRUB.HEADER % "0")
    with pytest.raises(Refused, match="boots neither saved_entry nor next_entry"):
        run(KernelCmdline(machine, {"parameters": {"quiet": None}}))


def test_another_kernel_that_fails_never_becomes_the_default(machine: Machine) -> None:
    run(BootGuard(machine, {"state": "armed"}))
    machine.install(NEW)
    assert play(machine, {"root": "/dev/does-not-exist"}) == "rolled back"
    machine.boot()
    assert machine.read("/proc/sys/kernel/osrelease") == OLD
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet"
    assert run(BootGuard(machine, {"state": "rolled_back"})) == []  # stays so until the package is gone or better
    assert play(machine, {}) == "promoted"
    assert machine.read("/proc/sys/kernel/osrelease") == NEW


def test_known_good_keeps_the_initramfs_it_booted_with(machine: Machine) -> None:
    wish = KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}})
    run(wish)
    Path(machine.root, f"boot/initrd.img-{OLD}").write_text("rebuilt")  # as dracut does: into the same file
    assert Path(machine.root, f"boot/{KNOWN_GOOD}.img").read_text() == f"initrd.img-{OLD}"


def test_an_initramfs_that_cannot_be_kept_is_named(machine: Machine) -> None:
    Path(machine.root, f"boot/initrd.img-{OLD}").unlink()
    with pytest.raises(HostError, match=f"/boot/initrd.img-{OLD} cannot be kept as .*: No such file"):
        run(BootGuard(machine, {"state": "armed"}))
    assert list(Path(machine.root, "boot").glob("*.new")) == []


def test_an_initramfs_that_is_a_variable_is_left_to_grub(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grubby")
    entry = Path(machine.root, f"boot/loader/entries/abc-{OLD}.conf")
    entry.write_text(entry.read_text().replace("\noptions", " $tuned_initrd\noptions"))
    assert play(machine, {"root": "/dev/does-not-exist"}) == "rolled back"
    run(BootGuard(machine, {"state": "armed"}))
    kept = machine.read(f"/boot/loader/entries/{KNOWN_GOOD}.conf")
    assert f"\ninitrd /{KNOWN_GOOD}.img $tuned_initrd\n" in kept


@pytest.mark.parametrize("backend", ["grub_d", "openeuler"])
def test_what_grub_reads_otherwise_than_it_was_booted_comes_back_too(backend: str, tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), backend)
    line = r'console=tty0 memmap=2M\$0x9f0000000 pci=\;x acpi_osi="Linux" dyndbg="file a.c +p"'
    Path(machine.root, "etc/default/grub").write_text(f"GRUB_CMDLINE_LINUX='{line}'\n")
    machine.install(OLD)
    machine.boot()
    words = 'console=tty0 memmap=2M$0x9f0000000 pci=;x acpi_osi=Linux "dyndbg=file a.c +p"'
    assert machine.cmdline == f"root=UUID=1234 ro {words}"
    assert run(KernelCmdline(machine, {"parameters": {}})) == []  # quotes of the entry are no difference
    assert play(machine, {"root": "/dev/does-not-exist"}) == "rolled back"
    assert machine.cmdline == f"root=UUID=1234 ro {words}"
    assert play(machine, {"quiet": ""}) == "promoted"
    assert machine.cmdline == f"root=UUID=1234 ro {words} quiet"
    assert run(KernelCmdline(machine, {"parameters": {"quiet": ""}})) == []


def test_a_booted_dollar_sign_is_not_guarded_where_entries_cannot_have_it(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grubby")
    Path(machine.root, "proc/cmdline").write_text(f"BOOT_IMAGE=/vmlinuz-{OLD} memmap=2M$0x9f0000000\n")
    with pytest.raises(Refused, match="the booted command line has a dollar sign"):
        run(KernelCmdline(machine, {"parameters": {"quiet": ""}}))


def test_an_entry_with_two_command_lines_is_configured_without_the_guard(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")

    def with_two(text: str) -> str:  # Ubuntu with GRUB_FORCE_PARTUUID
        return re.sub(
            r"(?m)^(\tlinux\t.*)\n(\tinitrd\t.*)$",
            lambda match: (
                f'\tif [ "${{initrdfail}}" = 1 ]; then\n{match[1]}\n{match[2]}\n\telse\n'
                + match[1].replace("UUID=1234", "PARTUUID=5")
                + " panic=-1\n\tfi"
            ),
            text,
        )

    config = Path(machine.root, "boot/grub/grub.cfg")
    config.write_text(with_two(config.read_text()))
    booted = f"BOOT_IMAGE=/boot/vmlinuz-{OLD} root=PARTUUID=5 ro console=tty0 quiet"
    Path(machine.root, "proc/cmdline").write_text(f"{booted} panic=-1\n")
    assert run(KernelCmdline(machine, {"parameters": {}})) == []
    with pytest.raises(Refused, match="tries two command lines"):
        run(KernelCmdline(machine, {"parameters": {"nosmt": ""}}))
    wish = KernelCmdline(machine, {"parameters": {"nosmt": ""}, "guard": False})
    run(wish)
    config.write_text(with_two(config.read_text()))
    Path(machine.root, "proc/cmdline").write_text(f"{booted} nosmt panic=-1\n")
    assert run(wish) == []
    assert wish.result(wish.observe())["reboot_required"] is False


def test_a_wish_taken_back_before_the_reboot_disarms(machine: Machine) -> None:
    assert run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))[-1] == "try"
    assert run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}})) == []
    assert run(KernelCmdline(machine, {"parameters": {}}))[-1] == "disarm"
    assert traces(machine) == []
    machine.boot()
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet"


def test_a_changed_wish_before_the_reboot_replaces_the_candidate(machine: Machine) -> None:
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    assert "arm" not in run(KernelCmdline(machine, {"parameters": {"intel_iommu": "off"}}))
    machine.boot()
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet intel_iommu=off"


def test_the_gate_names_what_failed(machine: Machine) -> None:
    machine.failed = "old.service loaded failed failed"
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    machine.boot()
    with pytest.raises(HostError, match=r"health check `exit 3` failed with exit code 3: no output"):
        run(BootGuard(machine, {"state": "promoted", "health_checks": ["exit 3"]}))
    machine.failed = "old.service loaded failed failed\nnew.service loaded failed failed"
    with pytest.raises(
        HostError, match=r"new.service failed, and did not before.* timed out.*Failed with result 'timeout'"
    ):
        run(BootGuard(machine, {"state": "promoted", "health_checks": []}))
    machine.mute = True
    with pytest.raises(HostError, match=r"Failed to list units"):
        run(BootGuard(machine, {"state": "promoted", "health_checks": []}))
    machine.mute = False
    machine.failed = "old.service loaded failed failed"
    assert run(BootGuard(machine, {"state": "promoted", "health_checks": ["true"]})) == ["check", "promote"]


def test_three_states_are_kept_apart(machine: Machine) -> None:
    wish = KernelCmdline(machine, {"parameters": {"intel_iommu": "on", "console": ["tty0", "ttyS0,115200"]}})
    run(wish)
    result = wish.result(wish.observe())
    assert result["configured"]["intel_iommu"] == ["intel_iommu=on"]
    assert result["configured"]["console"] == ["console=tty0", "console=ttyS0,115200"]
    assert result["booted"] == {"intel_iommu": [], "console": ["console=tty0"]}
    assert result["reboot_required"] is True
    assert sorted(result["reboot_reasons"]) == [
        "command line: booted console=tty0, configured console=tty0 console=ttyS0,115200",
        "command line: booted without intel_iommu, configured intel_iommu=on",
    ]


def test_a_number_of_huge_pages_stands_after_their_size(machine: Machine) -> None:
    assert play(machine, {"hugepages": "0:4"}) == "promoted"
    assert play(machine, {"hugepages": "0:4", "hugepagesz": "1G", "nosmt": ""}) == "promoted"
    words = machine.cmdline.split()
    assert words.index("hugepagesz=1G") < words.index("hugepages=0:4")


def test_check_mode_predicts_the_reasons(machine: Machine) -> None:
    wish = KernelCmdline(machine, {"parameters": {"intel_iommu": "on", "quiet": None}})
    observed = wish.observe()
    wish.plan(observed)
    predicted = wish.result(observed)["reboot_reasons"]
    run(wish)
    assert wish.result(wish.observe())["reboot_reasons"] == predicted != []


def test_an_undecided_candidate_is_not_built_upon(machine: Machine) -> None:
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    machine.boot()
    with pytest.raises(Refused, match="an earlier candidate is not decided on"):
        run(KernelCmdline(machine, {"parameters": {"intel_iommu": "off"}}))


def test_promotion_needs_the_candidate(machine: Machine) -> None:
    run(KernelCmdline(machine, {"parameters": {"root": "/dev/does-not-exist"}, "allow_unbootable": True}))
    with pytest.raises(Refused, match="the candidate does not run"):
        run(BootGuard(machine, {"state": "promoted"}))


def test_without_the_guard_the_new_command_line_is_the_default_at_once(machine: Machine) -> None:
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}, "guard": False}))
    assert traces(machine) == []
    machine.boot()
    assert machine.cmdline == "root=UUID=1234 ro console=tty0 quiet intel_iommu=on"


def test_an_interrupted_generation_is_repaired(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")
    Path(machine.root, DROP_IN.lstrip("/")).write_text(drop_in({"intel_iommu": ("intel_iommu=on",)}))
    assert run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}})) == ["arm", "generate", "try"]
    assert "intel_iommu=on" in machine.read("/boot/grub/grub.cfg")


def test_what_a_wish_gives_back_is_tried_too(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")
    assert play(machine, {"quiet": None, "nosmt": ""}) == "promoted"
    wish = KernelCmdline(machine, {"parameters": {"nosmt": ""}})  # no longer says that quiet shall not be there
    reasons = wish.result(wish.observe())["reboot_reasons"]
    assert reasons == ["command line: booted without quiet, configured quiet"]
    assert run(wish) == ["arm", "write", "generate", "try"]
    assert wish.result(wish.observe())["reboot_reasons"] == reasons


@pytest.mark.parametrize("backend", ["grub_d", "openeuler"])
def test_an_edit_that_is_not_generated_yet_is_tried_too(backend: str, tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), backend)
    assert play(machine, {"nosmt": ""}) == "promoted"
    defaults = Path(machine.root, "etc/default/grub")
    defaults.write_text(defaults.read_text().replace("console=tty0", "console=tty0 foo=bar"))
    wish = KernelCmdline(machine, {"parameters": {"nosmt": ""}})
    reasons = wish.result(wish.observe())["reboot_reasons"]
    assert reasons == ["command line: booted without foo, configured foo=bar"]
    assert run(wish) == ["arm", "generate", "try"]
    assert wish.result(wish.observe())["reboot_reasons"] == reasons
    assert run(wish) == []


def test_an_edit_that_comes_to_what_runs_leaves_nothing_armed(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")
    assert play(machine, {"nosmt": ""}) == "promoted"
    defaults = Path(machine.root, "etc/default/grub")
    defaults.write_text(defaults.read_text().replace("console=tty0 quiet", "quiet console=tty0"))
    assert run(KernelCmdline(machine, {"parameters": {"nosmt": ""}})) == ["arm", "generate", "try"]
    assert traces(machine) == []
    assert run(KernelCmdline(machine, {"parameters": {"nosmt": ""}})) == []


def test_a_wish_that_the_host_has_already_needs_no_guard(machine: Machine) -> None:
    Path(machine.root, "proc/mounts").write_text("/dev/mapper/vg-root / ext4 rw 0 0\n")
    wish = KernelCmdline(machine, {"parameters": {"quiet": ""}})
    assert {"arm", "try"} & {*run(wish)} == set()
    assert wish.result(wish.observe())["reboot_required"] is False
    assert run(wish) == []


def test_a_later_drop_in_that_undoes_ours_is_found(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")
    Path(machine.root, "etc/default/grub.d/90-other.cfg").write_text("GRUB_CMDLINE_LINUX_DEFAULT=splash\n")
    before = machine.read("/boot/grub/grub.cfg")
    with pytest.raises(HostError, match="lacks intel_iommu as wished"):
        run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    assert machine.read("/boot/grub/grub.cfg") == before


def test_openeuler_writes_where_grub_reads(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "openeuler")
    efi = Path(machine.root, "boot/efi/EFI/openEuler")
    efi.mkdir(parents=True)
    for name in ("grub.cfg", "grubenv"):
        source = Path(machine.root, "boot/grub2", name)
        (efi / name).write_text(source.read_text() if source.exists() else "")
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    assert "intel_iommu=on" in (efi / "grub.cfg").read_text()
    assert "intel_iommu=on" not in machine.read("/boot/grub2/grub.cfg")
    assert (efi / "custom.cfg").exists()


def test_the_administrators_custom_entries_stay(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path), "grub_d")
    custom = Path(machine.root, "boot/grub/custom.cfg")
    custom.write_text("menuentry 'mine' --id mine { true }\n")
    run(KernelCmdline(machine, {"parameters": {"intel_iommu": "on"}}))
    assert "--id mine" in custom.read_text()
    machine.boot()
    run(BootGuard(machine, {"state": "promoted"}))
    assert custom.read_text() == "menuentry 'mine' --id mine { true }\n"


def test_an_entry_of_ours_is_the_distributions_with_another_name() -> None:
    text = """\
menuentry 'Debian GNU/Linux' --class debian --unrestricted $menuentry_id_option 'gnulinux-simple-1' {
\tsearch --no-floppy --fs-uuid --set=root adf911f4
\tlinux\t/vmlinuz-6.12 root=/dev/vda1 ro quiet
\tinitrd\t/intel-uc.img /initrd.img-6.12
}
submenu 'Advanced' {
\tmenuentry 'Recovery' --id recovery {
\t\tlinux\t/vmlinuz-6.12 root=/dev/vda1 ro single
\t}
}
"""
    first, second = parse_entries(text)
    assert (first.id, first.kernel, first.initrds) == (
        "gnulinux-simple-1",
        "/vmlinuz-6.12",
        ("/intel-uc.img", "/initrd.img-6.12"),
    )
    assert (second.id, second.arguments) == ("recovery", "root=/dev/vda1 ro single")
    head = "menuentry 'gnulinux simple 1' --class debian --unrestricted --id gnulinux-simple-1 {"
    assert render(first).splitlines()[0] == head
    assert parse_entries(render(first))[0].arguments == first.arguments


def test_the_drop_in_filters_what_others_say(tmp_path: Path) -> None:
    path = tmp_path / "drop-in.cfg"
    path.write_text(drop_in({"quiet": (), "console": ("console=tty0", "console=ttyS0"), "a.b": ("a.b=*",)}))
    script = (
        'GRUB_CMDLINE_LINUX="console=hvc0 keep=1 * a.b=2"; GRUB_CMDLINE_LINUX_DEFAULT="quiet quieter splash"; '
        f'. {path}; echo "$GRUB_CMDLINE_LINUX|$GRUB_CMDLINE_LINUX_DEFAULT|$GRUB_DEFAULT"'
    )
    done = run_process(["sh", "-ec", script], None, 10)
    assert done.stdout.strip() == "keep=1 * |quieter splash console=tty0 console=ttyS0 a.b=*|saved"


def test_a_change_of_someone_else_is_tried_too_where_that_is_possible(machine: Machine) -> None:
    machine.install(NEW)
    assert run(KernelCmdline(machine, {"parameters": {}}))[0] == "arm"


def test_a_change_of_someone_else_is_only_reported_where_it_cannot_be_guarded(machine: Machine) -> None:
    machine.install(NEW)
    Path(machine.root, "proc/mounts").write_text("/dev/mapper/vg-root / ext4 rw 0 0\n")
    wish = KernelCmdline(machine, {"parameters": {}})
    assert run(wish) == []
    result = wish.result(wish.observe())
    assert result["reboot_reasons"] == [f"kernel: runs {OLD}, the default entry has {NEW}"]
    assert "the next reboot is not guarded" in result["warnings"][0]
