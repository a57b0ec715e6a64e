# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store verifies what arrives, switches names, and stays whole after a failure."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._store import STORE, Store

pytestmark = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is needed to make a bundle")


def bundle(root: Path, content: bytes, spoil: bool = False) -> str:
    """A small bundle at the place where the store looks for it; returns its digest."""
    files = {"rootfs.erofs": content, "kernel": b"kernel", "initrd": b"initrd"}
    work = root / "work"
    work.mkdir()
    described = {n: {"sha256": hashlib.sha256(d).hexdigest(), "size_bytes": len(d)} for n, d in files.items()}
    (work / "manifest.json").write_text(json.dumps({"files": described, "kernel_release": "6.12"}))
    for name, data in files.items():
        (work / name).write_bytes(data + (b"x" if spoil and name == "initrd" else b""))
    digest = described["rootfs.erofs"]["sha256"]
    (root / "in").mkdir(exist_ok=True)
    target = root / "in" / f"agentfleet-{digest}.tar.zst"
    names = [*files, "manifest.json"]
    subprocess.run(["tar", "--use-compress-program=zstd", "-C", work, "-cf", target, *names], check=True)
    shutil.rmtree(work)
    return str(digest)


def run(host: Host, digest: str, incoming: str | None = "/in") -> list[Step]:
    store = Store(host, {"images": [{"name": "agent", "digest": digest}], "incoming": incoming})
    steps = store.plan(store.observe())
    for step in steps:
        store.apply(step)
    return steps


def test_register_and_point_then_nothing(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    digest = bundle(tmp_path, b"one")
    assert [s.verb for s in run(host, digest)] == ["register", "point"]
    assert run(host, digest) == []
    assert host.names("/in") == []
    image = tmp_path / STORE[1:] / digest / "rootfs.erofs"
    assert image.read_bytes() == b"one" and image.stat().st_mode & 0o777 == 0o444
    store = Store(host, {"images": [{"name": "agent", "digest": digest}], "incoming": None})
    assert store.result(store.observe())["images"] == [
        {"digest": digest, "names": ["agent"], "size_bytes": 3, "kernel_release": "6.12"}
    ]


def test_a_name_moves_and_the_old_image_stays(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    old = bundle(tmp_path, b"old")
    run(host, old)
    new = bundle(tmp_path, b"new")
    (_register, point) = run(host, new)
    assert (point.before, point.after) == (old, new)
    assert host.exists(f"{STORE}/{old}/rootfs.erofs")
    assert [s.verb for s in run(host, old)] == ["point"]  # back without a transfer


def test_a_damaged_bundle_changes_nothing(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    digest = bundle(tmp_path, b"one", spoil=True)
    with pytest.raises(HostError, match="initrd arrived damaged"):
        run(host, digest)
    assert host.names(STORE) == []


def test_a_bundle_of_another_image(tmp_path: Path) -> None:
    host = Host(str(tmp_path))
    digest = bundle(tmp_path, b"one")
    (tmp_path / "in" / f"agentfleet-{digest}.tar.zst").rename(tmp_path / "in" / f"agentfleet-{'0' * 64}.tar.zst")
    with pytest.raises(HostError, match="not that of 0000"):
        run(host, "0" * 64)


def test_missing_without_a_bundle_is_told_not_refused(tmp_path: Path) -> None:
    store = Store(Host(str(tmp_path)), {"images": [{"name": "agent", "digest": "0" * 64}], "incoming": None})
    observed: t.Any = store.observe()
    assert store.plan(observed) == []
    assert store.result(observed)["missing"] == ["agent"]


def test_check_mode_before_the_image_is_built(tmp_path: Path) -> None:
    store = Store(Host(str(tmp_path)), {"images": [{"name": "agent", "digest": ""}], "incoming": "/in"})
    store.predicting = True
    assert [s.verb for s in store.plan(store.observe())] == ["register", "point"]
