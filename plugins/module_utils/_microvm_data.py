# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The read-only disks of a microVM: who it is, and its first-boot data.

This module is private to the collection and imports nothing of Ansible. What is written here is read by the guest's
first program (``_early_init``).
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tarfile
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _network
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import DataImage, Share, Spec, Volume

SECTOR = 512
# systemd's limit for all credentials of a unit is 1 MiB.
MOST = 900 << 10
COMMANDS = "/usr/lib/agentfleet/firstboot.d/user-data"  # in the guest


def share_lines(shares: t.Iterable[Share]) -> list[str]:
    """What a guest mounts: tag, target and options of each share."""
    return [f"{share['tag']} {share['target']} {'ro' if share['readonly'] else 'rw'}" for share in shares]


def image_lines(images: t.Iterable[DataImage]) -> list[str]:
    """What a guest maps beside its root: UUID, target, file system and options of each image."""
    return [f"{image['uuid']} {image['target']} {image['filesystem']} {image['options']}" for image in images]


def grown_lines(volumes: t.Iterable[Volume]) -> list[str]:
    """Volumes whose file systems a guest lets grow: serial, file system and size of each."""
    return [f"{volume['name']} {volume['filesystem']} {volume['size_bytes']}" for volume in volumes]


def config(spec: Spec) -> str:
    """The disk that tells a guest who it is: lines that its first program sources."""
    lists = {
        "networks": _network.guest_lines(spec["networks"]),
        "images": image_lines(spec["data_images"]),
        "shares": share_lines(spec["shares"]),
        "volumes": [
            f"{v['name']} {v['mount']} {v['filesystem']} {'ro' if v['readonly'] else 'mkfs,grow'}"
            for v in spec["volumes"]
            if v["mount"]
        ],
    }
    text = f"agentfleet_hostname={spec['name']}\n"
    for key, lines in lists.items():
        text += f"agentfleet_{key}={shlex.quote(chr(10).join(lines))}\n"
    for volume in spec["volumes"]:
        if volume["writable_layer"]:
            text += f"agentfleet_upper={volume['name']}\n"
    if spec["environment"]:
        words = shlex.join(f"{key}={value}" for key, value in spec["environment"].items())
        text += f"agentfleet_environment={shlex.quote(words)}\n"
    return text + "\n" * (-len(text.encode()) % SECTOR)


def archive(option: str, user_data: t.Mapping[str, t.Any]) -> str:
    """First-boot data as a ustar of whole sectors, the same for the same data; empty for none."""
    entries: dict[str, tuple[int, bytes]] = {}
    for index, file in enumerate(user_data.get("files") or ()):
        where, path, mode = f"{option}.files[{index}]", file["path"], str(file.get("mode") or "0600")
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/" or not path.isprintable():
            raise Refused(f"{where}.path", path, "not a clean absolute path", "Write a path such as /etc/agent.conf")
        if path in entries:
            raise Refused(f"{where}.path", path, "given twice", "Give each file once")
        if not re.fullmatch(r"0?[0-7]{3}", mode):
            raise Refused(f"{where}.mode", mode, "not a file mode", "Write octal digits in quotes, such as '0644'")
        entries[path] = (int(mode, 8), file["content"].encode())
    commands = user_data.get("run") or ()
    if commands:
        if COMMANDS in entries:
            raise Refused(f"{option}.run", COMMANDS, "is also among files", "Leave out one of them")
        entries[COMMANDS] = (0o700, "\n".join(["#!/bin/sh", "set -e", *commands, ""]).encode())
    if not entries:
        return ""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, (bits, content) in entries.items():
            member = tarfile.TarInfo(path[1:])
            member.size, member.mode = len(content), bits
            try:
                tar.addfile(member, io.BytesIO(content))
            except ValueError:
                raise Refused(option, path, "too long for its archive", "Use at most 100 characters a name") from None
    if len(buffer.getvalue()) > MOST:
        raise Refused(
            option, f"{len(buffer.getvalue())} bytes", f"more than {MOST}",
            "Put large files into the image, a volume or a share",
        )  # fmt: skip
    return buffer.getvalue().decode()
