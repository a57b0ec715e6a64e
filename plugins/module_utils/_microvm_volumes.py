# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Volumes of microVMs as files on the host: made, grown, given to their VMM, and deleted only when told so.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, open_beneath
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import VOLUMES, run_directory, volume_path
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_resolve import size_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Spec

FICLONE = 0x40049409


def plan(host: Host, spec: Spec) -> list[Step]:
    """Volumes that are missing or too small."""
    steps = []
    for volume in spec["volumes"]:
        path, size = volume_path(spec["name"], volume["name"]), volume["size_bytes"]
        has = size_of(host, path)
        if has is None or has < size:
            after = {"size": format_size(size), "template": volume["template"]}
            before = None if has is None else {"size": format_size(has)}
            verb = "create" if has is None else "grow"
            steps.append(
                Step(
                    verb,
                    f"volume {spec['name']}/{volume['name']}",
                    before,
                    after,
                    data=(path, size, volume["template"]),
                )
            )
    return steps


def create(host: Host, path: str, size: int, template: str) -> None:
    """A volume's file: sparse, or a copy of its template that shares its blocks where the file system can."""
    directory, name = os.path.split(path)
    os.makedirs(host.path(directory), mode=0o700, exist_ok=True)
    partial = f"{name}.partial"
    with host.directory(directory) as beneath:
        _unlink(partial, beneath)  # of a call that was killed
        try:
            with open_beneath(beneath, partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, or_ours=True) as file:
                if template:
                    with open(host.path(template), "rb") as source:
                        _copy(source.fileno(), file.fileno())
                os.truncate(file.fileno(), max(size, os.fstat(file.fileno()).st_size))
                os.fsync(file.fileno())
            os.replace(partial, name, src_dir_fd=beneath, dst_dir_fd=beneath)
        except OSError as error:
            _unlink(partial, beneath)
            raise HostError(f"{path}: {error.strerror}. Make room below {VOLUMES}") from error


def _unlink(name: str, beneath: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=beneath)


def _copy(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, FICLONE, source)
        return
    position, size = 0, os.fstat(source).st_size
    while position < size:
        try:
            data = os.lseek(source, position, os.SEEK_DATA)  # holes stay holes
        except OSError:
            break
        hole = os.lseek(source, data, os.SEEK_HOLE)
        os.lseek(source, data, os.SEEK_SET)
        os.lseek(target, data, os.SEEK_SET)
        while data < hole:
            done = os.sendfile(target, source, None, min(hole - data, 1 << 30))
            if not done:
                break
            data += done
        position = hole
    os.truncate(target, size)


def grow(host: Host, path: str, size: int) -> None:
    """Make a volume larger; a guest that runs sees it when its VMM is told."""
    directory, name = os.path.split(path)
    with host.directory(directory) as beneath, open_beneath(beneath, name, os.O_RDWR, or_ours=True) as file:
        os.truncate(file.fileno(), size)


def give(host: Host, name: str, path: str) -> None:
    """Let the VMM of a running microVM open a volume, as its unit does for all of them when it starts."""
    owner = os.stat(host.path(run_directory(name)))
    directory, volume = os.path.split(path)
    with host.directory(directory) as beneath, open_beneath(beneath, volume, or_ours=True) as file:
        for one in (beneath, file.fileno()):
            os.chown(one, owner.st_uid, owner.st_gid)


def there(host: Host, name: str) -> dict[str, str]:
    """Volume -> size of all volumes that a microVM has on the host."""
    paths = {volume: volume_path(name, volume) for volume in host.names(f"{VOLUMES}/{name}")}
    return {volume: format_size(size_of(host, path) or 0) for volume, path in paths.items()}


def delete(host: Host, names: t.Iterable[str]) -> None:
    """Delete all volumes of these microVMs."""
    for name in names:
        shutil.rmtree(host.path(f"{VOLUMES}/{name}"))
    with contextlib.suppress(OSError):  # others have volumes
        os.rmdir(host.path(VOLUMES))
