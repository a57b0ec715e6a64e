# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The image's definition, its mirror, its MBR, and its way into the cache."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_image import (
    MINIMUM_DISK,
    LabImage,
    definition,
    digest_of,
    mbr,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


def test_digest_changes_with_the_definition_only() -> None:
    base = definition("debian", "trixie", [], {})
    assert digest_of(base) == digest_of(definition("debian", "trixie", ["python3"], {}))  # is in it anyway
    others = [
        definition("debian", "sid", [], {}),
        definition("debian", "trixie", ["strace"], {}),
        definition("debian", "trixie", [], {"/etc/motd": "hello"}),
    ]
    assert len({digest_of(other) for other in (base, *others)}) == 4


def test_mbr_has_one_active_partition_to_the_end_of_the_disk() -> None:
    record = mbr(b"\xeb" * 512, 0xAABBCCDD, MINIMUM_DISK // 512)
    assert len(record) == 512 and record[510:] == b"\x55\xaa" and record[:440] == b"\xeb" * 440
    assert struct.unpack_from("<I", record, 440)[0] == 0xAABBCCDD
    active, kind, start, sectors = struct.unpack_from("<B3xB3xII", record, 446)
    assert (active, kind, start, start + sectors) == (0x80, 0x83, 2048, MINIMUM_DISK // 512)
    assert record[462:510] == bytes(48)


class Builder:
    """Stands for mmdebstrap and the others: makes the files that they make."""

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at, self.calls = fail_at, []

    def __call__(self, argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
        argv = list(argv[1:] if argv[0] == "fakeroot" else argv)
        self.calls.append(argv)
        if argv[0] == self.fail_at:
            return Completed(tuple(argv), 1, "", "no space left on device")
        if argv[0] == "ssh-keygen":
            for suffix, text in (("", "SECRET"), (".pub", "ssh-ed25519 AAAA lab")):
                with open(argv[-1] + suffix, "w", encoding="utf-8") as file:
                    file.write(text)
        if argv[0] == "mmdebstrap":
            with tarfile.open(argv[-2], "w") as tar:
                for name, size in (("boot.img", 512), ("core.img", 30000)):
                    member = tarfile.TarInfo(f"./boot/grub/i386-pc/{name}")
                    member.size = size
                    tar.addfile(member, io.BytesIO(bytes(size)))
        if argv[0] == "sh":
            os.makedirs(os.path.join(argv[-1], "root"))
            with open(os.path.join(argv[-1], "disk.raw"), "wb") as file:
                file.truncate(MINIMUM_DISK)
        return Completed(tuple(argv), 0)


def image_of(tmp_path: t.Any, builder: Builder) -> LabImage:
    root = tmp_path / "root"
    for name in ("mmdebstrap", "mke2fs", "ssh-keygen", "tar", "fakeroot"):
        (root / "usr/bin").mkdir(parents=True, exist_ok=True)
        (root / "usr/bin" / name).touch()
    (root / "usr/share/keyrings").mkdir(parents=True, exist_ok=True)
    (root / "usr/share/keyrings/debian-archive-keyring.gpg").touch()
    (root / "cache").mkdir(exist_ok=True)
    params = {"cache_dir": str(tmp_path / "cache"), "mirror": "http://mirror.example.org/debian"}
    return LabImage(CacheHost(str(root), builder), params)


class CacheHost(Host):
    """A Host whose tools are below the root, while the cache is a real directory."""

    def path(self, path: str) -> str:
        return path if path.startswith(os.path.dirname(self.root)) else super().path(path)


def test_image_is_built_once_and_is_whole(tmp_path: t.Any) -> None:
    builder = Builder()
    image = image_of(tmp_path, builder)
    steps = image.plan(image.observe())
    assert [step.verb for step in steps] == ["build"]
    image.apply(steps[0])
    assert image.plan(image.observe()) == []
    assert sorted(os.listdir(image.path)) == [
        "definition.json",
        "disk.raw",
        "host_ed25519.pub",
        "id_ed25519",
        "id_ed25519.pub",
    ]
    assert os.listdir(tmp_path / "cache") and not [n for n in os.listdir(tmp_path / "cache") if n.endswith(".partial")]
    with open(os.path.join(image.path, "disk.raw"), "rb") as disk:
        assert disk.read(512)[510:] == b"\x55\xaa"
    assert os.stat(tmp_path / "cache").st_mode & 0o777 == 0o700
    bootstrap = next(call for call in builder.calls if call[0] == "mmdebstrap")
    assert bootstrap[-3:] == ["trixie", image.path + ".partial/root.tar", "http://mirror.example.org/debian"]
    assert not any(f"{image.path}.partial" in word for word in bootstrap if word.startswith("--customize-hook"))
    assert not any("SECRET" in word for call in builder.calls for word in call)


@pytest.mark.parametrize("program", ["mmdebstrap", "sh", "ssh-keygen"])
def test_a_failed_build_leaves_no_image(tmp_path: t.Any, program: str) -> None:
    image = image_of(tmp_path, Builder(fail_at=program))
    step = image.plan(image.observe())[0]
    with pytest.raises(HostError, match="no space left on device"):
        image.apply(step)
    assert not image.observe()["present"]
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_another_labs_build_is_taken(tmp_path: t.Any) -> None:
    first, second = image_of(tmp_path, Builder()), image_of(tmp_path, Builder())
    step = second.plan(second.observe())[0]  # planned before the first one has built it
    first.apply(first.plan(first.observe())[0])
    second.apply(step)
    assert second.host._runner.calls == []  # type: ignore[attr-defined]
