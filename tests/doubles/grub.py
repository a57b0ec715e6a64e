# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of GRUB's programs and of what GRUB does at boot, below a fake root. Not the real programs.

Imitated with their traps:

- ``grub-mkconfig`` sources /etc/default/grub and Debian's /etc/default/grub.d with the real shell; openEuler's
  ``grub2-mkconfig`` knows nothing of the directory. With ``-o`` both write to any path, also one that nothing reads.
- The newest kernel is the first entry, whatever was the default before.
- GRUB clears ``next_entry`` before it boots, falls back to the first entry when the saved one does not exist, and reads
  custom.cfg from beside grub.cfg.
- The words of an entry are those of a script: quotes and backslashes go, variables that are not set are nothing, and a
  ``;`` ends the command. In entries of their own files (BLS) variables are read first, inside of quotes, too.
- An initramfs that does not find its root device waits for ever, unless ``panic=`` stands on the command line.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

HEADER = """\
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="%s"
fi
"""
ENTRY = """\
menuentry 'Linux %(release)s' --class gnu-linux $menuentry_id_option 'gnulinux-%(release)s' {
\tsearch --no-floppy --fs-uuid --set=root 1234
\tlinux\t/boot/vmlinuz-%(release)s root=UUID=1234 ro %(arguments)s
\tinitrd\t/boot/initrd.img-%(release)s
}
"""
_SCRIPT = (
    r"'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|\\(?P<escaped>.)|\$(?P<variable>\w*)|"
    r"(?P<end>[;&|<>{}])|(?P<blank>\s+)|(?P<plain>.)"
)
FOOTER = "if [ -f  ${config_directory}/custom.cfg ]; then\n  source ${config_directory}/custom.cfg\nfi\n"


class Lost(Exception):
    """The host waits for a person."""


def kernels(root: str) -> list[str]:
    """Installed kernels, newest first."""
    return sorted((path.name.partition("-")[2] for path in Path(root, "boot").glob("vmlinuz-*")), reverse=True)


def mkconfig(root: str, argv: list[str], drop_ins: bool) -> tuple[int, str, str]:
    """grub-mkconfig (Debian's with drop-ins, openEuler's without)."""
    script = f'cd "{root}"; [ -f etc/default/grub ] && . ./etc/default/grub; '
    if drop_ins:
        script += 'for f in etc/default/grub.d/*.cfg; do [ -e "$f" ] && . "./$f"; done; '
    script += 'printf "%s\\n%s\\n" "$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT" "${GRUB_DEFAULT:-0}"'
    arguments, default = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[:2]
    text = HEADER % ("${saved_entry}" if default == "saved" else default)
    text += "".join(ENTRY % {"release": release, "arguments": arguments} for release in kernels(root)) + FOOTER
    if "-o" in argv:
        Path(root, argv[argv.index("-o") + 1].lstrip("/")).write_text(text, encoding="utf-8")
        return 0, "", "done"
    return 0, text, "done"


def read_environment(path: str) -> dict[str, str]:
    """The variables of a grubenv."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if os.path.exists(path) else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def editenv(argv: list[str]) -> tuple[int, str, str]:
    """grub-editenv PATH create | list | set NAME=VALUE | unset NAME."""
    path, command = argv[1], argv[2]
    values = {} if command == "create" else read_environment(path)
    if command == "set":
        values.update([argv[3].split("=", 1)])
    elif command == "unset":
        values.pop(argv[3], None)
    elif command == "list":
        return 0, "".join(f"{name}={value}\n" for name, value in values.items()), ""
    text = "# GRUB Environment Block\n" + "".join(f"{name}={value}\n" for name, value in values.items())
    Path(path).write_text(text.ljust(1024, "#"), encoding="utf-8")
    return 0, "", ""


def boot(root: str, directory: str, bls: bool = False) -> str:
    """Power on: the command line of the entry that comes up; Lost when none does by itself."""
    for _reset in range(3):
        cmdline = _start(root, directory, bls)
        device = re.findall(r"(?:^|\s)root=(\S+)", cmdline)[-1]
        if "does-not-exist" not in device and "panics" not in cmdline:
            return cmdline
        if not re.search(r"(?:^|\s)panic=[1-9]", cmdline):
            raise Lost(f"waits in the initramfs of: {cmdline}")
    raise Lost("resets again and again")


def _start(root: str, directory: str, bls: bool) -> str:
    path = os.path.join(root, directory.lstrip("/"), "grubenv")
    environment = read_environment(path)
    saved = bls or '"${saved_entry}"' in Path(root, directory.lstrip("/"), "grub.cfg").read_text(encoding="utf-8")
    wanted = environment.get("next_entry") or (environment.get("saved_entry", "") if saved else "")
    if "next_entry" in environment:
        editenv(["", path, "unset", "next_entry"])
    entries = _bls(root) if bls else _menu(root, directory)
    kernel, initrd, arguments = entries.get(wanted) or next(iter(entries.values()))
    for file in (kernel, *initrd.split()):
        if not file.startswith("$") and not Path(root, "boot", os.path.basename(file)).is_file():
            raise Lost(f"file {file} not found")
    if bls:
        arguments = re.sub(r"\$\w*", "", arguments)
    return f"BOOT_IMAGE={kernel} {' '.join(_script_words(arguments))}"


def _script_words(text: str) -> list[str]:
    """The words of one command as GRUB gives them to the kernel."""
    found: list[str] = []
    word: str | None = None
    for match in re.finditer(_SCRIPT, text):
        kind, value = str(match.lastgroup), match[match.lastgroup]
        if kind == "end":
            break
        if kind == "blank":
            found, word = [*found, *([] if word is None else [word])], None
        else:
            word = (word or "") + ("" if kind == "variable" else value)
    found += [] if word is None else [word]
    escaped = [re.sub(r"""([\\'"])""", r"\\\1", word) for word in found]
    return [f'"{word}"' if " " in word else word for word in escaped]


def _menu(root: str, directory: str) -> dict[str, tuple[str, str, str]]:
    text = ""
    for name in ("grub.cfg", "custom.cfg"):
        path = Path(root, directory.lstrip("/"), name)
        text += path.read_text(encoding="utf-8") if path.is_file() else ""
    pattern = (
        r"(?ms)^menuentry .*?(?:\$menuentry_id_option|--id) '?([^'\s]+)'? ?\{.*?"
        r"^\s*linux\s+(\S+) ([^\n]*)\n\s*initrd\s+(\S+)\n\}"
    )
    return {name: (kernel, initrd, arguments) for name, kernel, arguments, initrd in re.findall(pattern, text)}


def _bls(root: str) -> dict[str, tuple[str, str, str]]:
    entries = {}
    files = Path(root, "boot/loader/entries").glob("*.conf")
    for path in sorted(files, key=lambda path: path.name, reverse=True):
        values = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if " " in line)
        entries[path.stem] = (values["linux"], values["initrd"], values["options"])
    return entries
