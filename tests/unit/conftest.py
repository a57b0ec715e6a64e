# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for all unit tests: a fake host made of a dictionary of files."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host


class FakeHost(Host):
    """A Host below a temporary directory whose commands are answered from a table.

    ``answers`` maps a command line (joined by spaces; a prefix is enough) to
    its stdout, to (rc, stdout, stderr), or to a function of the FakeHost that
    returns either. Unknown commands fail with rc 127. ``calls`` records all.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, self._answer)
        self.answers: dict[str, t.Any] = {}
        self.calls: list[str] = []

    def files(self, tree: t.Mapping[str, str | None]) -> FakeHost:
        """Make files (text), directories (None) and links ("-> target")."""
        for path, text in tree.items():
            real = self.path(path)
            os.makedirs(real if text is None else os.path.dirname(real), exist_ok=True)
            if text is None:
                continue
            if text.startswith("-> "):
                if os.path.lexists(real):
                    os.unlink(real)
                os.symlink(text[3:], real)
            else:
                with open(real, "w", encoding="utf-8") as file:
                    file.write(text)
        return self

    def _answer(self, argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
        line = " ".join(argv)
        self.calls.append(line)
        matches = [key for key in self.answers if line == key or line.startswith(key + " ")]
        if not matches:
            return Completed(tuple(argv), 127, "", f"{argv[0]}: not found")
        answer = self.answers[max(matches, key=len)]
        if callable(answer):
            answer = answer(self)
        if isinstance(answer, str):
            answer = (0, answer, "")
        return Completed(tuple(argv), *answer)


@pytest.fixture
def fake_host(tmp_path: t.Any) -> FakeHost:
    """An empty fake host."""
    return FakeHost(str(tmp_path))


@pytest.fixture
def microvm_spec() -> dict[str, t.Any]:
    """The spec of a small microVM with nothing attached: every key of ``_vmm.Spec``."""
    image = "/var/lib/agentfleet/images/" + "ab" * 32
    return {
        "name": "a1",
        "driver": "qemu",
        "program": "/usr/bin/qemu-system-x86_64",
        "accelerator": "kvm",
        "landlock": True,
        "tenant": "default",
        "image": "agent",
        "image_digest": "ab" * 32,
        "image_path": f"{image}/rootfs.erofs",
        "image_bytes": 82 << 20,
        "data_images": [],
        "kernel": f"{image}/kernel",
        "initrd": f"{image}/initrd",
        "kernel_arguments": [],
        "vcpus": 1,
        "vcpus_max": 1,
        "memory_bytes": 256 << 20,
        "memory_max_bytes": 256 << 20,
        "memory_zones": [{"size_bytes": 256 << 20, "numa_node": None}],
        "memory_file": "",
        "hugepage_bytes": 0,
        "thp": False,
        "balloon_bytes": 0,
        "free_page_reporting": True,
        "cid": 77,
        "config": "config-0123456789ab",
        "data": "",
        "hotplug_slots": 0,
        "volumes": [],
        "shares": [],
        "networks": [],
        "devices": [],
        "rate_limits": {
            "disk_bytes_per_second": 0,
            "disk_operations_per_second": 0,
            "network_bytes_per_second": 0,
        },
        "environment": {},
        "resources": {},
        "autostart": True,
        "restart_policy": "always",
        "restore_from": "",
    }
