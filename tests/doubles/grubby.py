# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DOUBLE of grubby on a host with boot loader entries (BLS), below a fake root. Not the real program.

Imitated with its traps:

- Kernels are shown with /boot in front, though the entry's file has the boot loader's path.
- ``root=`` is shown apart from the other arguments.
- ``--update-kernel=ALL`` changes every entry, also those that are not the distribution's; a path changes every entry of
  that kernel.
- ``--args`` replaces all arguments of the same name; ``--remove-args=name`` takes all of them, ``name=value`` one.
- It says nothing about what it did, and exits with 0 also when no entry was changed.
"""

from __future__ import annotations

from pathlib import Path


def grubby(root: str, argv: list[str]) -> tuple[int, str, str]:
    """grubby --info=ALL | --update-kernel=PATH|ALL [--args=...] [--remove-args=...]."""
    options = dict(word[2:].split("=", 1) for word in argv[1:])
    files = sorted(Path(root, "boot/loader/entries").glob("*.conf"), key=lambda path: path.name, reverse=True)
    shown = []
    for index, path in enumerate(files):
        values = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if " " in line)
        kernel = "/boot" + values["linux"]
        words = values["options"].split()
        device = next((word[5:] for word in words if word.startswith("root=")), "")
        rest = " ".join(word for word in words if word != f"root={device}")
        shown.append(
            f'index={index}\nkernel="{kernel}"\nargs="{rest}"\nroot="{device}"\ninitrd="/boot{values["initrd"]}"\n'
            f'title="{values["title"]}"\nid="{path.stem}"\n'
        )
        if options.get("update-kernel") in ("ALL", kernel):
            for gone in options.get("remove-args", "").split():
                words = [word for word in words if word != gone and word.split("=", 1)[0] != gone]
            added = options.get("args", "").split()
            names = {word.split("=", 1)[0] for word in added}
            values["options"] = " ".join([*(word for word in words if word.split("=", 1)[0] not in names), *added])
            path.write_text("".join(f"{key} {value}\n" for key, value in values.items()), encoding="utf-8")
    return 0, "".join(shown) if "info" in options else "", ""
