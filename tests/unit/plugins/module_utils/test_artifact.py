# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Releases that are pinned by their SHA-256: _artifact. The archives are real ones."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import typing as t
import urllib.request
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._artifact import RECORD, Artifact, secrets
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host, run_process
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all


def opened(url: str, seconds: int) -> t.Any:
    """What a URL gives, as Ansible's open_url does for the module."""
    return urllib.request.build_opener().open(url, timeout=seconds)


def pack(path: Path, files: dict[str, bytes]) -> dict[str, str]:
    """A tar archive, as a source that is pinned."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return {"src": "/" + path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def install(host: Host, *sources: dict[str, str], **params: t.Any) -> str:
    """Observe, plan, apply; where the release is."""
    artifact = Artifact(host, {"sources": sources, "directory": "/opt/3fs", **params}, opened)
    apply_all(artifact, artifact.plan(artifact.observe()))
    assert artifact.plan(artifact.observe()) == []
    return str(artifact.result(artifact.observe())["path"])


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with real programs."""
    return Host(str(tmp_path))


def test_an_archive_and_its_successor_side_by_side(host: Host, tmp_path: Path) -> None:
    first = install(host, pack(tmp_path / "a.tar", {"3fs-1/bin/admin_cli": b"1", "3fs-1/configs/a.toml": b""}))
    second = install(host, pack(tmp_path / "b.tar", {"bin/admin_cli": b"2"}), provides=["bin/admin_cli"])
    assert first != second
    assert (host.read(f"{first}/bin/admin_cli"), host.read(f"{second}/bin/admin_cli")) == ("1", "2")


def test_a_release_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path) -> None:
    synced: list[tuple[list[str], list[str]]] = []

    def run(argv: t.Sequence[str], stdin: str | None, timeout_seconds: float) -> Completed:
        if argv[0] == "sync":
            top = Path(argv[-1])
            synced.append((sorted(path.name for path in top.iterdir()), host.names("/opt/3fs")))
        return run_process(argv, stdin, timeout_seconds)

    host = Host(str(tmp_path), run)
    install(host, pack(tmp_path / "a.tar", {"bin/admin_cli": b"1"}))
    ((inside, beside),) = synced
    assert inside == [RECORD, "bin"] and all(name.startswith(".unpack-") for name in beside)


def test_several_packages_become_one_release(host: Host, tmp_path: Path) -> None:
    sources = [pack(tmp_path / f"{name}.tar", {f"usr/bin/{name}": b"x"}) for name in ("fdbcli", "fdbserver")]
    path = install(host, *sources)
    assert host.names(f"{path}/usr/bin") == ["fdbcli", "fdbserver"]


def test_an_incomplete_archive_leaves_nothing(host: Host, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"a\.tar has no bin/admin_cli"):
        install(host, pack(tmp_path / "a.tar", {"README": b""}), provides=["bin/admin_cli"])
    assert host.names("/opt/3fs") == []


def test_a_source_tree_is_built(host: Host, tmp_path: Path) -> None:
    source = pack(tmp_path / "src.tar", {"3FS/build.sh": b"mkdir -p build/bin && echo built > build/bin/admin_cli"})
    path = install(host, source, build=["sh build.sh", "test -s build/bin/admin_cli"], provides=["build/bin/admin_cli"])
    assert host.read(f"{path}/build/bin/admin_cli") == "built"
    with pytest.raises(HostError, match="failed with exit code"):
        install(host, pack(tmp_path / "bad.tar", {"3FS/x": b""}), build=["false"])
    assert len(host.names("/opt/3fs")) == 1


def test_another_build_or_part_of_the_same_source_is_another_release(host: Host, tmp_path: Path) -> None:
    source = pack(tmp_path / "src.tar", {"3FS/a/x": b"", "3FS/b/x": b""})
    wishes: list[dict[str, t.Any]] = [
        {},
        {"build": ["echo 1 > made"]},
        {"build": ["echo 2 > made"]},
        {"subdirectory": "3FS/a"},
        {"subdirectory": "3FS/b"},
        {"subdirectory": "3FS/a", "build": ["echo 1 > made"]},
    ]
    paths = [install(host, source, **wish) for wish in wishes]
    assert len(set(paths)) == len(wishes)
    assert [host.read(f"{path}/made") for path in paths] == ["", "1", "2", "", "", "1"]


def test_what_came_over_the_network_is_checked_before_it_is_unpacked(host: Host, tmp_path: Path) -> None:
    source = pack(tmp_path / "a.tar", {"bin/admin_cli": b"1"})
    url = {**source, "src": (tmp_path / "a.tar").as_uri()}
    with pytest.raises(HostError, match=r"checksum mismatch: .*Nothing was installed"):
        install(host, {**url, "sha256": "0" * 64})
    assert host.names("/opt/3fs") == []
    assert host.read(f"{install(host, url)}/bin/admin_cli") == "1"


def test_the_password_of_a_url_is_used_and_not_seen(host: Host, tmp_path: Path) -> None:
    source = pack(tmp_path / "a.tar", {"x/bin/admin_cli": b"1"})
    src = "https://ci:S3CRET%40PW@store.example/@3fs/a.tar"
    asked: list[str] = []

    def fetch(url: str, seconds: int) -> t.Any:
        asked.append(url)
        if len(asked) == 1:
            raise OSError("timed out")
        return opened((tmp_path / "a.tar").as_uri(), seconds)

    wish = {"sources": [{**source, "src": src}], "directory": "/opt/3fs"}
    artifact = Artifact(host, wish, fetch)
    steps = artifact.plan(artifact.observe())
    assert steps[0].after[0]["src"] == "https://store.example/@3fs/a.tar"
    with pytest.raises(HostError, match=r" https://store\.example/@3fs/a\.tar cannot be fetched: timed out"):
        apply_all(artifact, steps)
    apply_all(artifact, steps)
    assert asked == [src, src] and "https://store.example/@3fs" in host.read(f"{artifact.path}/{RECORD}")
    wrong = Artifact(host, {**wish, "sources": [{"src": src, "sha256": "0" * 64}]}, fetch)
    said = []
    for broken in (wrong, Artifact(host, {**wish, "directory": "/opt/b", "subdirectory": "no"}, fetch)):
        with pytest.raises(HostError) as failed:
            apply_all(broken, broken.plan(broken.observe()))
        said.append(str(failed.value))
    assert "checksum mismatch: https://store.example" in said[0] and "no directory no in https://store" in said[1]
    for bad in ("ftp://ci:S3CRET%40PW@store.example/a.tar", "https://ci:S3CRET%40PW@store.example/a.bin"):
        with pytest.raises(Refused) as refused:
            Artifact(host, {**wish, "sources": [{**source, "src": bad}]})
        said.append(str(refused.value))
    assert not [text for text in said if "ci:" in text or "S3CRET" in text]
    assert secrets(src) == {"ci:S3CRET%40PW", "ci:S3CRET@PW", "S3CRET%40PW", "S3CRET@PW"}
    assert secrets("https://token@store.example/a.tar") == {"token"} and secrets("https://x/@b") == set()


def test_the_layers_of_an_image_in_order(host: Host, tmp_path: Path) -> None:
    for number, files in enumerate(
        (
            {"opt/3fs/bin/old": b"", "opt/3fs/bin/admin_cli": b"1"},
            {"opt/3fs/bin/.wh.old": b"", "opt/3fs/bin/admin_cli": b"2"},
        )
    ):
        pack(tmp_path / f"layer{number}.tar", files)
    manifest = json.dumps([{"Layers": ["layer0.tar", "layer1.tar"]}]).encode()
    layers = {f"layer{number}.tar": (tmp_path / f"layer{number}.tar").read_bytes() for number in (0, 1)}
    source = {**pack(tmp_path / "image.tar", {"manifest.json": manifest, **layers}), "kind": "image"}
    path = install(host, source, subdirectory="opt/3fs")
    assert host.names(f"{path}/bin") == ["admin_cli"] and host.read(f"{path}/bin/admin_cli") == "2"
    with pytest.raises(HostError, match="no image archive"):
        install(host, {**pack(tmp_path / "no.tar", {"x": b""}), "kind": "image"})


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are made and unpacked by dpkg-deb")
def test_a_package_is_unpacked_and_its_scripts_do_not_run(host: Host, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/sbin").mkdir(parents=True)
    (tree / "usr/sbin/fdbserver").write_text("x")
    (tree / "DEBIAN/control").write_text(
        "Package: fdb\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example>\nDescription: x\n"
    )
    script = tree / "DEBIAN/postinst"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    host.run(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(tmp_path / "fdb.deb")])
    digest = hashlib.sha256((tmp_path / "fdb.deb").read_bytes()).hexdigest()
    path = install(host, {"src": "/fdb.deb", "sha256": digest})
    assert host.read(f"{path}/usr/sbin/fdbserver") == "x" and not (tmp_path / "ran").exists()


def test_check_mode_before_the_file_is_there(host: Host) -> None:
    artifact = Artifact(host, {"sources": [{"src": "/a.tar", "sha256": "0" * 64}], "directory": "/opt/3fs"})
    artifact.predicting = True
    assert [step.verb for step in artifact.plan(artifact.observe())] == ["install"]
    assert "/a.tar is not on this host yet" in artifact.result(artifact.observe())["warnings"][0]


def test_a_file_of_the_controller_is_not_looked_for_here(host: Host) -> None:
    wish = {"sources": [{"src": "/a.tar", "sha256": "0" * 64}], "directory": "/opt/3fs", "from_controller": True}
    artifact = Artifact(host, wish)
    assert len(artifact.plan(artifact.observe())) == 1
