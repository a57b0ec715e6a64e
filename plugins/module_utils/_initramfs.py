# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The initramfs of a microVM: modules in loading order, busybox, and the first program.

This module is private to the collection and imports nothing of Ansible.
Everything is computed from the kernel package's files: no depmod, no root.
"""

from __future__ import annotations

import lzma
import os
import shlex
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._early_init import APPLETS, LIBRARY, SCRIPT, SETTINGS
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

# What a microVM needs; a feature that is built in needs no file.
MODULES = (
    "virtio_pci virtio_pmem nd_pmem virtio_blk virtio_net vmw_vsock_virtio_transport overlay virtiofs button evdev"
).split()
# Loaded where the kernel has them: memory that is plugged, and entropy that differs in clones.
OPTIONAL = "virtio_mem vmgenid virtio_rng".split()
# The same, but last: while a guest boots, the host would get back memory that it needs again a moment later.
LAST = ["virtio_balloon"]
# What a file system or device-mapper target needs; the checksums were modules of their own before Linux 6.14.
NEEDS = {
    "erofs": ([], ["erofs"]),
    "ext4": (["crc32c_generic"], ["ext4"]),
    "verity": (["sha256_generic"], ["dm_verity"]),
}
RECIPE = (MODULES, OPTIONAL, LAST, NEEDS, APPLETS)


def module_order(tree: str, names: t.Sequence[str], optional: t.Sequence[str] = ()) -> list[tuple[str, bytes]]:
    """The decompressed modules in an order in which each can be loaded.

    :param tree: ``lib/modules/<release>`` of the unpacked kernel package
    :param optional: come first, and may be missing
    """
    host = Host(tree)
    builtin = {_name(line) for line in host.read("modules.builtin").splitlines()}
    files = {
        _name(name): os.path.join(directory, name)
        for directory, _directories, found in os.walk(tree)
        for name in found
        if ".ko" in name
    }
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in builtin or name in order:
            return
        if name not in files:
            raise HostError(f"the kernel package has no module {name}. Choose a kernel package that has it")
        with open(files[name], "rb") as file:
            data = file.read()
        if files[name].endswith(".xz"):
            data = lzma.decompress(data)
        elif files[name].endswith(".zst"):
            data = unzstd(data)
        for needed in filter(None, _depends(data)):
            add(_name(needed))
        order[name] = data

    for name in (*(name for name in optional if name in files), *names):
        add(name)
    return [(f"{name}.ko", data) for name, data in order.items()]


def _name(path: str) -> str:
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """The modules that a module's own ``.modinfo`` section says it needs."""
    _before, found, rest = module.partition(b"\0depends=")
    return rest.partition(b"\0")[0].decode().split(",") if found else []


def unzstd(data: bytes) -> bytes:
    """What the program zstd unpacks; Python has no module for it."""
    import subprocess

    # Binary input and output, which Host.run would decode.
    command = ["zstd", "-dcq"]
    return subprocess.run(command, check=True, capture_output=True, input=data).stdout  # pylint: disable=ansible-bad-function


def cpio(entries: t.Iterable[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive of (name, mode with file type, content), reproducible."""
    archive = bytearray()
    number = 0
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def initramfs(
    modules_tree: str, busybox: bytes, needs: t.Sequence[str], extra: t.Sequence[str], programs: t.Mapping[str, bytes]
) -> bytes:
    """All of the initramfs but its settings, uncompressed: unpacking costs more than reading on a small guest.

    :param modules_tree: ``lib/modules/<release>`` of the unpacked kernel package
    :param needs: keys of NEEDS that the image itself has
    :param extra: modules that the image's owner wants loaded
    :param programs: path -> content of programs besides busybox, with their libraries
    """
    optional = [*OPTIONAL, *(name for need in needs for name in NEEDS[need][0])]
    wanted = [*MODULES, *(name for need in needs for name in NEEDS[need][1]), *extra]
    lists = {"boot": module_order(modules_tree, wanted, optional)}
    loaded = {name for name, _data in lists["boot"]}
    lists["last"] = [(name, data) for name, data in module_order(modules_tree, [], LAST) if name not in loaded]
    for filesystem in ("erofs", "ext4"):  # for other images and volumes; loaded when one is attached
        if filesystem not in needs:
            order = module_order(modules_tree, NEEDS[filesystem][1], NEEDS[filesystem][0])
            lists[filesystem] = [(name, data) for name, data in order if name not in loaded]
    files = {f"modules/{name}": (0o100644, data) for order in lists.values() for name, data in order}
    for name, order in lists.items():
        files[f"modules/{name}"] = (0o100644, "".join(f"{module}\n" for module, _data in order).encode())
    library = LIBRARY[1:]
    files[f"{library}/bin/busybox"] = (0o100755, busybox)
    files.update({f"{library}/bin/{applet}": (0o120777, b"busybox") for applet in APPLETS})
    files.update({path.lstrip("/"): (0o100755, data) for path, data in programs.items()})
    files["init"] = (0o100755, SCRIPT.encode())
    return cpio(_with_directories(files, ("dev", "mnt", "proc", "run", "sys")))


def shell(values: t.Mapping[str, str]) -> str:
    """Lines that a shell sources."""
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items())


def settings(values: t.Mapping[str, str]) -> bytes:
    """The part of the initramfs that differs between images with one kernel; it comes last."""
    return cpio(_with_directories({SETTINGS[1:]: (0o100644, shell(values).encode())}, ()))


def _with_directories(
    files: t.Mapping[str, tuple[int, bytes]], directories: t.Sequence[str]
) -> list[tuple[str, int, bytes]]:
    parents = {os.path.dirname(path) for path in files} | set(directories)
    while more := {os.path.dirname(path) for path in parents} - parents:
        parents |= more
    return [
        *((path, 0o040755, b"") for path in sorted(parents - {""})),
        *((path, mode, data) for path, (mode, data) in files.items()),
    ]
