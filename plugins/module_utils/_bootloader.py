# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GRUB as three distributions configure it: a drop-in, BLS entries with grubby, or /etc/default/grub.

Each loader reads the generated entries (what the next boot really does, not what
a source file hopes for), writes the wished parameters, and keeps entries of ours
beside the distribution's own.
"""

from __future__ import annotations

import abc
import os
import posixpath
import re
import shlex
import shutil
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sync
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

DROP_IN = "/etc/default/grub.d/60-agentfleet.cfg"
DEFAULTS = "/etc/default/grub"
NAMES_FILE = "/etc/agentfleet/kernel_cmdline"
HEADER = "# Written by agentfleet.metal (kernel_cmdline). Changes are overwritten.\n"
KNOWN_GOOD = "agentfleet-known-good"
CANDIDATE = "agentfleet-candidate"
OURS = (KNOWN_GOOD, CANDIDATE)
_BEGIN, _END = "# agentfleet.metal begin\n", "# agentfleet.metal end\n"

# Parameters that the boot loader adds itself, so that ours stand after its own (the last one counts).
LOADERS_OWN = ("root", "ro", "rw")
# Only together, since their order counts.
PAGES = {"hugepagesz", "hugepages"}

Wish = t.Mapping[str, t.Sequence[str]]  # parameter -> its tokens; none when it shall be absent


def split(arguments: str) -> list[str]:
    """The words on a command line, of a boot entry or booted: GRUB takes quotes away, and adds them where it has to."""
    try:
        return shlex.split(arguments)
    except ValueError:  # a quote without its other half
        return arguments.split()


def predict(arguments: str, wish: Wish) -> str:
    """A command line after a wish is configured."""
    kept = [word for word in arguments.split() if _name(word) not in wish or _name(word) in LOADERS_OWN]
    added = [word for tokens in wish.values() for word in tokens]
    return " ".join([*(word for word in kept if word not in added), *added])


def unmet(arguments: str, wish: Wish) -> list[str]:
    """Names whose tokens on a command line are not exactly those wished for."""
    found: dict[str, list[str]] = {}
    for word in split(arguments):
        found.setdefault(_name(word), []).append(word)
    return [
        name
        for name, tokens in wish.items()
        if (found.get(name, [])[-len(tokens) :] if name in LOADERS_OWN and tokens else found.get(name, []))
        != list(tokens)
    ]


def _name(word: str) -> str:
    return word.partition("=")[0]


_LINUX = r"(?m)^\s*linux(?:efi|16)?\s+(\S+)[ \t]*(.*)$"


@dataclass(frozen=True)
class Entry:
    """A boot entry; paths are the boot loader's, which may lack /boot."""

    id: str
    kernel: str
    initrds: tuple[str, ...]
    arguments: str
    text: str = ""

    @property
    def twice(self) -> bool:
        """Whether it tries a second command line by itself (Ubuntu with GRUB_FORCE_PARTUUID)."""
        return len(re.findall(_LINUX, self.text)) > 1

    @property
    def release(self) -> str:
        """The kernel's release, from its file name."""
        return posixpath.basename(self.kernel).partition("-")[2]


class Loader(abc.ABC):
    """What the three have in common: the environment block, and files beside the kernel."""

    name = ""
    editenv = "grub2-editenv"
    directory = "/boot/grub2"
    # What makes an initramfs without its root device reboot instead of waiting for a person.
    panic: tuple[str, ...] = ("panic=30", "rd.shell=0", "rd.emergency=reboot")

    def __init__(self, host: Host) -> None:
        self.host = host

    @property
    def grubenv(self) -> str:
        """The environment block that GRUB reads."""
        return f"{self.directory}/grubenv"

    def environment(self) -> dict[str, str]:
        """The variables of the environment block."""
        lines = self.host.read(self.grubenv).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def set_environment(self, **values: str | None) -> None:
        """Set variables, or unset those that are None."""
        if not self.host.exists(self.grubenv):
            self.host.run([self.editenv, self.host.path(self.grubenv), "create"])
        now = self.environment()
        for name, value in values.items():
            if value and now.get(name) != value:
                self.host.run([self.editenv, self.host.path(self.grubenv), "set", f"{name}={value}"])
            elif not value and name in now:
                self.host.run([self.editenv, self.host.path(self.grubenv), "unset", name])

    @abc.abstractmethod
    def entries(self) -> list[Entry]:
        """The distribution's own entries, the default's first choice first."""

    def default(self, saved: str = "") -> Entry:
        """The entry that boots when nothing of ours is saved.

        :param saved: what was saved before ours was
        """
        entries = self.entries()
        if not entries:
            raise HostError(f"no boot entry in {self.directory}: has the boot loader ever been configured?")
        return entries[0]

    @abc.abstractmethod
    def sources(self) -> list[str]:
        """The files that decide about the command line, for a backup."""

    def remembered(self) -> list[str]:
        """Names of the parameters that an earlier wish configured."""
        return self.host.read(NAMES_FILE).split()

    def full(self, wish: Wish) -> Wish:
        """A wish, and before it that what an earlier one configured shall be absent."""
        return {**{name: () for name in self.remembered() if name not in wish}, **wish}

    def predicted(self, arguments: str, wish: Wish) -> tuple[str, bool]:
        """The default entry's command line once a wish is configured, and whether this is certain.

        :param arguments: its command line now
        """
        return predict(arguments, self.full(wish)), True

    @abc.abstractmethod
    def configure(self, wish: Wish, predicted: str, guarded: bool) -> list[Step]:
        """The steps that configure a wish; ``predicted`` is the default entry's command line after them."""

    def hold(self) -> list[Step]:
        """The steps after which the saved entry is what boots, whatever is installed meanwhile."""
        return []

    def apply(self, step: Step) -> bool:
        """Carry out a step of ``configure`` or ``hold``; False when it is none."""
        kind, *rest = step.data
        if kind != "file":
            return False
        self.host.write(*rest)
        return True

    @staticmethod
    def _remember(old_names: t.Sequence[str], wish: Wish) -> list[Step]:
        names = sorted(wish)
        if sorted(old_names) == names:
            return []
        text = "".join(f"{name}\n" for name in names)
        return [Step("remember", NAMES_FILE, " ".join(old_names), " ".join(names), data=("file", NAMES_FILE, text))]

    def guardable(self, saved: str) -> None:
        """Raise Refused when the guard could not bring this host back."""
        boot = _mount_of(self.host, self.directory)
        if boot and (boot[1] in ("btrfs", "zfs", "f2fs") or re.match(r"/dev/(mapper/|md|dm-)", boot[0])):
            raise Refused(
                "guard",
                True,
                f"{self.directory} is on {boot[1]} ({boot[0]}), where GRUB cannot write, so a candidate "
                "would be booted again and again",
                "Put /boot on a plain partition, or set guard: false and keep a console at hand",
            )

    # -- entries of ours -----------------------------------------------------

    @abc.abstractmethod
    def put_entries(self, entries: t.Sequence[Entry]) -> None:
        """Keep exactly these entries of ours; none removes all trace of them."""

    def known_good(self, template: Entry, arguments: str) -> Entry:
        """An entry for the running kernel whose files no update can take away.

        :param arguments: as they were booted; what GRUB reads otherwise (``memmap=2M$0x9f0000000``) is quoted again
        """
        initrds = list(template.initrds)
        last = max((index for index, path in enumerate(initrds) if path[0] != "$"), default=None)  # RHEL: $tuned_initrd
        if last is not None:
            initrds[last] = self._keep(initrds[last], f"{KNOWN_GOOD}.img")
        return replace(template, id=KNOWN_GOOD, initrds=tuple(initrds), arguments=shlex.join(split(arguments)))

    def forget(self) -> None:
        """Remove the kept files."""
        for name in (f"{KNOWN_GOOD}.img", f"{KNOWN_GOOD}.vmlinuz"):
            self.host.remove(f"/boot/{name}")

    def _keep(self, path: str, name: str) -> str:
        """Copy a boot file (dracut writes into the one that a link would share); returns the boot loader's path of it."""
        source = self.host.path(f"/boot/{posixpath.basename(path)}")
        target = self.host.path(f"/boot/{name}")
        kept = posixpath.join(posixpath.dirname(path), name)
        if os.path.exists(target):  # kept when the guard was armed; the source may be newer
            return kept
        temporary = f"{target}.new"
        try:
            shutil.copyfile(source, temporary)
            sync(temporary)
        except OSError as error:
            self.host.remove(f"/boot/{name}.new")
            raise HostError(
                f"/boot/{posixpath.basename(path)} cannot be kept as /boot/{name}: {error.strerror}. "
                "See that it is there, and that /boot has room for a copy of it"
            ) from error
        os.replace(temporary, target)
        os.sync()
        return kept


class Grub(Loader):
    """Menu entries in a generated grub.cfg; ours stand in custom.cfg beside it."""

    mkconfig = "grub2-mkconfig"
    script_check = "grub2-script-check"
    ours = ""  # the file that says the wish

    @abc.abstractmethod
    def files(self) -> list[str]:
        """What grub.cfg is generated from, in the order in which it is read."""

    @abc.abstractmethod
    def text(self, wish: Wish) -> str:
        """What ``ours`` has to say for a wish."""

    def declared(self, text: str = "") -> tuple[list[str], str, str]:
        """What the shell makes of the files: the command line, GRUB_DEFAULT without ours, and with all.

        :param text: what ours shall say, when it is not what it says now
        """
        script = (
            f"for f in {shlex.join(self.host.path(path) for path in self.files())}; do "
            'if [ "$f" = "$1" ] && [ -n "$2" ]; then eval "$2"; elif [ -e "$f" ]; then . "$f"; fi; '
            '[ "$f" = "$1" ] || b=${GRUB_DEFAULT-}; done; '
            'printf "%s\\n" "${GRUB_CMDLINE_LINUX-} ${GRUB_CMDLINE_LINUX_DEFAULT-}" "$b" "${GRUB_DEFAULT-}"'
        )
        lines = self.host.run(["sh", "-c", script, "sh", self.host.path(self.ours), text]).stdout.split("\n")
        return lines[0].split(), lines[1], lines[2]

    def predicted(self, arguments: str, wish: Wish) -> tuple[str, bool]:
        now, then = self.declared()[0], self.declared(self.text(wish))[0]
        words = [word for word in arguments.split() if not word.startswith("$")]  # Ubuntu adds $vt_handoff
        variables = [word for word in arguments.split() if word.startswith("$")]
        added = len(words) - len(now)
        if words[added:] == now:
            return " ".join([*words[:added], *then, *variables]), True
        likely, _certain = super().predicted(arguments, wish)  # grub.cfg is not of these files
        return " ".join([likely, *(word for word in then if word not in likely.split())]), False

    @property
    def config(self) -> str:
        """The generated configuration."""
        return f"{self.directory}/grub.cfg"

    @property
    def custom(self) -> str:
        """The file of ours and the administrator's that grub.cfg reads at its end."""
        return f"{self.directory}/custom.cfg"

    def entries(self) -> list[Entry]:
        return parse_entries(self.host.read(self.config))

    def put_entries(self, entries: t.Sequence[Entry]) -> None:
        theirs = self.host.read(self.custom)
        begin, end = theirs.find(_BEGIN.strip()), theirs.find(_END.strip())
        if begin >= 0 and end > begin:
            theirs = (theirs[:begin].rstrip() + "\n" + theirs[end + len(_END.strip()) :].lstrip()).strip()
        text = theirs + "\n" if theirs else ""
        if entries:
            text += _BEGIN + "".join(render(entry) for entry in entries) + _END
        if text:
            self.host.write(self.custom, text, 0o600)
        else:
            self.host.remove(self.custom)
        os.sync()

    def generate(self, wish: Wish) -> None:
        """Generate grub.cfg and put it in place in one piece (grub-mkconfig -o itself is not atomic)."""
        text = self.host.run([self.mkconfig], timeout_seconds=300).stdout
        if not parse_entries(text):
            raise HostError(f"{self.mkconfig} found no kernel, {self.config} is left as it was")
        self.host.write(f"{self.config}.agentfleet", text, 0o600)
        checked = self.host.run([self.script_check, self.host.path(f"{self.config}.agentfleet")], check=False)
        self.host.remove(f"{self.config}.agentfleet")
        if checked.rc not in (0, 127):
            raise HostError(f"{self.mkconfig} made a configuration with errors, {self.config} stays: {checked.text}")
        have = parse_entries(text)[0].arguments
        wrong = unmet(have, wish) or ([] if '"${saved_entry}"' in text else ["GRUB_DEFAULT=saved"])
        if wrong:
            raise HostError(
                f"the generated configuration lacks {', '.join(wrong)} as wished (its default entry has: {have}); "
                f"{self.config} is left as it was. A file that is read after ours decides otherwise: "
                "look through /etc/default/grub.d, and correct it"
            )
        self.host.write(self.config, text, 0o600)
        os.sync()

    def _generate_for_saved(self, changed: bool) -> list[Step]:
        if not changed and '"${saved_entry}"' in self.host.read(self.config):
            return []
        why = "so that the saved entry is booted"
        return [Step("generate", self.config, None, None, why, data=("generate", {}))]

    def apply(self, step: Step) -> bool:
        if step.data[0] == "generate":
            self.generate(step.data[1])
            return True
        return super().apply(step)

    def guardable(self, saved: str) -> None:
        super().guardable(saved)
        text = self.host.read(self.config)
        if "custom.cfg" not in text or "next_entry" not in text:
            raise Refused(
                "guard",
                True,
                f"{self.config} reads neither custom.cfg nor next_entry, so no entry of ours could be booted",
                "Restore /etc/grub.d/41_custom and 00_header of the distribution, or set guard: false",
            )
        if any(entry.twice for entry in self.entries()[:1]):
            raise Refused(
                "guard",
                True,
                f"the default entry of {self.config} tries two command lines, without and with an initramfs",
                "Remove GRUB_FORCE_PARTUUID (/etc/default/grub.d/40-force-partuuid.cfg) and run update-grub, or set "
                "guard: false",
            )
        if saved and saved not in OURS:
            raise Refused(
                "guard",
                True,
                f"the boot loader's saved entry is {saved!r}, chosen by someone else",
                f"Take it back with `{self.editenv} {self.grubenv} unset saved_entry`, or set guard: false",
            )


class GrubDropIn(Grub):
    """Debian and Ubuntu: a drop-in that filters and extends the command line."""

    name = "grub_d"
    editenv = "grub-editenv"
    mkconfig = "grub-mkconfig"
    script_check = "grub-script-check"
    directory = "/boot/grub"
    ours = DROP_IN

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        # Debian's own initramfs needs panic= only; dracut is asked where it is installed.
        self.panic = Loader.panic if host.exists("/usr/bin/dracut") else Loader.panic[:1]

    def sources(self) -> list[str]:
        return [DROP_IN, self.config]

    def remembered(self) -> list[str]:
        match = re.search(r"^# parameters: (.*)$", self.host.read(DROP_IN), re.M)
        return match.group(1).split() if match else []

    def files(self) -> list[str]:
        return [DEFAULTS, *sorted({*self.host.glob(f"{posixpath.dirname(DROP_IN)}/*.cfg"), DROP_IN})]

    def text(self, wish: Wish) -> str:
        return drop_in(wish)

    def configure(self, wish: Wish, predicted: str, guarded: bool) -> list[Step]:
        before = self.host.read(DROP_IN)
        if not (before or wish or guarded):
            return []
        text = drop_in(wish)
        steps = []
        if before != text.strip():
            steps.append(Step("write", DROP_IN, before or None, text, data=("file", DROP_IN, text)))
        entries = self.entries()
        now = entries[0].arguments if entries else ""
        if steps or self.stale(now):
            steps.append(Step("generate", self.config, now, predicted, _FROM_SOURCES, data=("generate", dict(wish))))
        return steps

    def hold(self) -> list[Step]:
        if self.host.exists(DROP_IN):
            return self._generate_for_saved(False)
        text = drop_in({})
        return [Step("write", DROP_IN, None, text, data=("file", DROP_IN, text)), *self._generate_for_saved(True)]

    def stale(self, arguments: str) -> bool:
        """Whether grub.cfg was not generated from the present files (an interrupted run)."""
        words, _theirs, _all = self.declared()
        have = [word for word in arguments.split() if not word.startswith("$")]  # Ubuntu adds $vt_handoff
        return have[len(have) - len(words) :] != words or '"${saved_entry}"' not in self.host.read(self.config)

    def guardable(self, saved: str) -> None:
        super().guardable(saved)
        _words, theirs, final = self.declared()
        overridden = self.host.exists(DROP_IN) and final != "saved"
        wrong = theirs if theirs not in ("", "0", "saved") else final if overridden else ""
        if wrong:
            raise Refused(
                "guard",
                True,
                f"GRUB_DEFAULT is {wrong!r} in /etc/default/grub or a file of /etc/default/grub.d, "
                "so a fixed entry is booted",
                "Remove that line (the guard keeps GRUB_DEFAULT=saved), or set guard: false",
            )


class GrubDefaults(Grub):
    """openEuler: the line in /etc/default/grub, and a grub.cfg in one of two places."""

    name = "openeuler"
    ours = DEFAULTS

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        efi = "/boot/efi/EFI/openEuler"
        # grub2-mkconfig writes to any path that it is given, also to one that nothing reads.
        self.directory = efi if host.exists(f"{efi}/grub.cfg") else "/boot/grub2"

    def sources(self) -> list[str]:
        return [DEFAULTS, NAMES_FILE, self.config]

    def files(self) -> list[str]:
        return [DEFAULTS]

    def text(self, wish: Wish) -> str:
        text = self.host.read(DEFAULTS)
        line, words = self._line(text)
        new = predict(words, self.full(wish))
        quote = "'" if line.rstrip().endswith("'") else '"'  # what is quoted inside is so in the other ones
        wanted = f"GRUB_CMDLINE_LINUX={quote}{new}{quote}"
        return with_saved_default(text.replace(line, wanted, 1) if line else f"{text}\n{wanted}")

    def _line(self, text: str) -> tuple[str, str]:
        match = re.search(r"""^GRUB_CMDLINE_LINUX=(?:"([^"]*)"|'([^']*)'|(\S*))[ \t]*$""", text, re.M)
        if match is None and "GRUB_CMDLINE_LINUX=" in text:
            raise Refused(
                "backend", self.name, f"GRUB_CMDLINE_LINUX in {DEFAULTS} is not one quoted line", "Make it one"
            )
        if match is None:
            return "", ""
        return match.group(0), next((group for group in match.groups() if group is not None), "")

    def configure(self, wish: Wish, predicted: str, guarded: bool) -> list[Step]:
        old_names = self.remembered()
        if not (wish or old_names or guarded):
            return []
        full = self.full(wish)
        after = self.text(wish)
        steps = self._write_defaults(self.host.read(DEFAULTS), after)
        now = (self.entries() or [Entry("", "", (), "")])[0].arguments
        if steps or unmet(now, full) or not {*self.declared(after)[0]} <= {*now.split()}:
            steps.append(Step("generate", self.config, now, predicted, _FROM_SOURCES, data=("generate", dict(full))))
        return [*steps, *self._remember(old_names, wish)]

    def hold(self) -> list[Step]:
        text = self.host.read(DEFAULTS)
        steps = self._write_defaults(text, with_saved_default(text))
        return [*steps, *self._generate_for_saved(bool(steps))]

    @staticmethod
    def _write_defaults(text: str, after: str) -> list[Step]:
        if after == text:
            return []
        return [Step("write", DEFAULTS, text or None, after, data=("file", DEFAULTS, after + "\n"))]


class Bls(Loader):
    """RHEL 9, Fedora and relatives: one file for each entry, changed through grubby."""

    name = "grubby"
    ENTRIES = "/boot/loader/entries"
    CMDLINE = "/etc/kernel/cmdline"
    EFI = "/boot/efi/EFI/*/grub.cfg"  # where RHEL 8 had it

    def entries(self) -> list[Entry]:
        found = []
        for block in re.split(r"(?m)^(?=index=)", self.host.run(["grubby", "--info=ALL"]).stdout):
            values: dict[str, str] = dict(re.findall(r'(?m)^(\w+)="?(.*?)"?$', block))
            if not values.get("kernel") or values.get("id") in OURS:
                continue
            root = f"root={values['root']} " if values.get("root") else ""
            # grubby shows kernels with the mount point of /boot, the loader's file has its own path
            text = self.host.read(f"{self.ENTRIES}/{values.get('id', '')}.conf")
            loader: dict[str, str] = dict(re.findall(r"(?m)^(linux|initrd)\s+(.*?)\s*$", text))
            found.append(
                Entry(
                    values.get("id", ""),
                    loader.get("linux", values["kernel"]),
                    tuple(loader.get("initrd", values.get("initrd", "")).split()),
                    root + values.get("args", ""),
                    values["kernel"],
                )
            )
        return found

    def default(self, saved: str = "") -> Entry:
        entries = self.entries()
        if not entries:
            raise HostError("grubby shows no boot entry: is this host booted by GRUB?")
        wanted = self.environment().get("saved_entry", "")
        wanted = saved if wanted in OURS else wanted
        return next((entry for entry in entries if entry.id == wanted), entries[0])

    def sources(self) -> list[str]:
        ids = [entry.id for entry in self.entries()]
        return [*(f"{self.ENTRIES}/{name}.conf" for name in ids if name), self.CMDLINE, NAMES_FILE]

    def configure(self, wish: Wish, predicted: str, guarded: bool) -> list[Step]:
        old_names = self.remembered()
        full = self.full(wish)
        steps = []
        for entry in self.entries():
            names = {*unmet(entry.arguments, full)}
            if names & PAGES:
                names |= PAGES & {*full}
            wrong = {name: tuple(full[name]) for name in full if name in names}
            if wrong:
                after = predict(entry.arguments, wrong)
                data = ("grubby", entry.text, wrong)
                steps.append(Step("update", f"entry {entry.id}", entry.arguments, after, data=data))
        text = self.host.read(self.CMDLINE)  # what entries of future kernels are made from
        if text and unmet(text, full):
            after = predict(text, full)
            steps.append(Step("write", self.CMDLINE, text, after, data=("file", self.CMDLINE, after + "\n")))
        return [*steps, *self._remember(old_names, wish)]

    def guardable(self, saved: str) -> None:
        super().guardable(saved)
        text = "".join(self.host.read(path) for path in (f"{self.directory}/grub.cfg", *self.host.glob(self.EFI)))
        if '"${saved_entry}"' not in text or "next_entry" not in text:
            raise Refused(
                "guard",
                True,
                f"{self.directory}/grub.cfg boots neither saved_entry nor next_entry, so no entry of ours could be booted",
                f"Set GRUB_DEFAULT=saved in {DEFAULTS} and run `grub2-mkconfig -o {self.directory}/grub.cfg`, or set "
                "guard: false",
            )
        if "$" in self.host.read("/proc/cmdline"):
            raise Refused(
                "guard",
                True,
                "the booted command line has a dollar sign, which GRUB takes for a variable in each of these entries, "
                "so what runs could not be booted again",
                "Do without that parameter, or set guard: false",
            )

    def apply(self, step: Step) -> bool:
        if step.data[0] != "grubby":
            return super().apply(step)
        # By kernel path, never ALL: that would change the known-good entry too (its kernel is a copy of another name).
        _kind, kernel, wrong = step.data
        self.host.run(["grubby", f"--update-kernel={kernel}", f"--remove-args={' '.join(wrong)}"])
        tokens = [word for words in wrong.values() for word in words]
        if tokens:
            self.host.run(["grubby", f"--update-kernel={kernel}", f"--args={' '.join(tokens)}"])
        have = next((entry.arguments for entry in self.entries() if entry.text == kernel), "")
        if unmet(have, wrong):  # grubby's exit code tells nothing
            raise HostError(f"grubby did not set {', '.join(unmet(have, wrong))} of {kernel}; the entry has: {have}")
        return True

    def known_good(self, template: Entry, arguments: str) -> Entry:
        entry = super().known_good(template, arguments)
        return replace(entry, kernel=self._keep(template.kernel, f"{KNOWN_GOOD}.vmlinuz"))

    def put_entries(self, entries: t.Sequence[Entry]) -> None:
        for entry in entries:
            self.host.write(
                f"{self.ENTRIES}/{entry.id}.conf",
                f"title {entry.id.replace('-', ' ')}\nversion 0-{entry.id}\nlinux {entry.kernel}\n"
                f"initrd {' '.join(entry.initrds)}\noptions {entry.arguments}\n",
            )
        for name in {*OURS} - {entry.id for entry in entries}:
            self.host.remove(f"{self.ENTRIES}/{name}.conf")
        os.sync()


_FROM_SOURCES = "from the files it is made of"
LOADERS: dict[str, type[Loader]] = {loader.name: loader for loader in (GrubDropIn, Bls, GrubDefaults)}


def loader_of(host: Host, backend: str = "auto") -> Loader:
    """The loader of this host; ``auto`` decides by what is installed, never by the distribution's name alone."""
    if backend != "auto":
        return LOADERS[backend](host)
    if host.exists("/etc/openEuler-release") or re.search(r'(?m)^ID="?openeuler', host.read("/etc/os-release"), re.I):
        return GrubDefaults(host)
    if host.names(Bls.ENTRIES) and host.glob("/usr/*bin/grubby"):
        return Bls(host)
    if host.glob("/usr/sbin/grub-mkconfig"):
        return GrubDropIn(host)
    raise Refused(
        "backend",
        backend,
        "the host has neither grub-mkconfig, nor grubby with boot loader entries, nor is it openEuler",
        f"Use a host that GRUB boots, or name the backend: {', '.join(LOADERS)}",
    )


def with_saved_default(text: str) -> str:
    """The text of /etc/default/grub with GRUB_DEFAULT=saved."""
    if re.search(r"(?m)^GRUB_DEFAULT=\"?saved\"?\s*$", text):
        return text
    return re.sub(r"(?m)^GRUB_DEFAULT=.*\n?", "", text).rstrip() + "\nGRUB_DEFAULT=saved"


def drop_in(wish: Wish) -> str:
    """The drop-in: named parameters are filtered out of what other files say, then ours are added."""
    text = HEADER + "GRUB_DEFAULT=saved\n"
    if not wish:
        return text
    return text + (
        f"# parameters: {' '.join(sorted(wish))}\n"
        "agentfleet_others() {\n"
        "  set -f\n"
        "  for agentfleet_word in $1; do\n"
        '    case "${agentfleet_word%%=*}" in\n'
        f"      {'|'.join(sorted(wish))}) ;;\n"
        "      *) printf '%s ' \"$agentfleet_word\" ;;\n"
        "    esac\n"
        "  done\n"
        "  set +f\n"
        "}\n"
        'GRUB_CMDLINE_LINUX="$(agentfleet_others "${GRUB_CMDLINE_LINUX-}")"\n'
        'GRUB_CMDLINE_LINUX_DEFAULT="$(agentfleet_others "${GRUB_CMDLINE_LINUX_DEFAULT-}")'
        + " ".join(word for tokens in wish.values() for word in tokens)
        + '"\n'
    )


def parse_entries(text: str) -> list[Entry]:
    """The Linux entries of a grub.cfg, in the menu's order."""
    found = []
    for match in re.finditer(r"(?ms)^([ \t]*)menuentry .*?^\1\}[ \t]*$", text):
        block = match.group(0)
        linux = re.search(_LINUX, block)
        if linux is None:
            continue
        initrd = re.search(r"(?m)^\s*initrd(?:efi|16)?\s+(.*)$", block)
        name = re.search(r"(?:\$menuentry_id_option|--id)\s+'?([^'\s]+)'?", block)
        initrds = tuple(initrd.group(1).split()) if initrd else ()
        found.append(Entry(name.group(1) if name else "", linux.group(1), initrds, linux.group(2).strip(), block))
    return found


def render(entry: Entry) -> str:
    """A menu entry of ours, made from the distribution's (its search, modules, and classes stay)."""
    text = re.sub(
        r"menuentry\s+('[^']*'|\"[^\"]*\"|\S+)", f"menuentry '{entry.id.replace('-', ' ')}'", entry.text, count=1
    )
    head, brace, body = text.partition("{")
    head = re.sub(r"(\$menuentry_id_option|--id)\s+('[^']*'|\S+)", "", head)
    body = re.sub(
        r"(?m)^(\s*linux(?:efi|16)?\s+)\S+.*$", lambda m: f"{m.group(1)}{entry.kernel} {entry.arguments}", body, count=1
    )
    body = re.sub(r"(?m)^(\s*initrd(?:efi|16)?\s+).*$", lambda m: m.group(1) + " ".join(entry.initrds), body, count=1)
    return f"{' '.join(head.split())} --id {entry.id} {brace}{body}\n"


def _mount_of(host: Host, path: str) -> tuple[str, str] | None:
    """Source and type of the file system that holds a path."""
    best: tuple[str, tuple[str, str]] | None = None
    for line in host.read("/proc/mounts").splitlines():
        source, point, kind = line.split()[:3]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best[0])):
            best = (point, (source, kind))
    return best[1] if best else None
