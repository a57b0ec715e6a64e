# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""OCI layouts and archives: verified, merged as their layers say, and refused where they lead out of the image."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _oci

Member = tuple[str, t.Any]


def layer(*members: Member) -> bytes:
    """A tar of (name, content): text is a file, None a directory, a TarInfo itself."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name = name
            if content is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            body = content.encode() if isinstance(content, str) else b""
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return data.getvalue()


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


class Layout:
    """A layout directory that is made blob by blob."""

    def __init__(self, root: Path, *layers: bytes, packing: str = "gzip", architecture: str = "amd64") -> None:
        self.root = root
        (root / "blobs/sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        descriptors = []
        for content in layers:
            packed = {
                "gzip": lambda data: gzip.compress(data, mtime=0),
                "zstd": lambda data: (
                    subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
                ),
                "tar": lambda data: data,
            }[packing](content)
            kind = "application/vnd.oci.image.layer.v1.tar" + ("" if packing == "tar" else f"+{packing}")
            descriptors.append({"mediaType": kind, **self.blob(packed)})
        config = {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(x).hexdigest() for x in layers]},
        }
        manifest = {"schemaVersion": 2, "config": self.blob(json.dumps(config).encode()), "layers": descriptors}
        self.manifest = {"mediaType": _oci.MANIFEST_TYPES[0], **self.blob(json.dumps(manifest).encode())}
        self.layers = descriptors
        self.index([self.manifest])

    def index(self, manifests: list[dict[str, t.Any]]) -> None:
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))

    def blob(self, data: bytes) -> dict[str, t.Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def path(self, descriptor: t.Mapping[str, t.Any]) -> Path:
        return self.root / "blobs/sha256" / descriptor["digest"].partition(":")[2]


def flat(root: Path, tag: str | None = None) -> dict[str, tarfile.TarInfo | str]:
    """Path -> text of a file, or the member, of the merged image."""
    out = io.BytesIO()
    _oci.flatten(_oci.read(str(root), tag), out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        found: dict[str, tarfile.TarInfo | str] = {}
        for member in tar:
            file = tar.extractfile(member) if member.isreg() or member.islnk() else None
            found[member.name[2:]] = file.read().decode() if file else member
        return found


def names(root: Path) -> set[str]:
    return set(flat(root))


@pytest.mark.parametrize("packing", ["gzip", "tar", "zstd"])
def test_layers_lie_on_each_other(tmp_path: Path, packing: str) -> None:
    if packing == "zstd" and not shutil.which("zstd"):
        pytest.skip("zstd is needed to make the layer")
    one = layer(("etc", None), ("etc/a", "1"), ("etc/b", "1"), ("bin", special(tarfile.SYMTYPE, "usr/bin")))
    two = layer(("./etc/b", "2"), ("etc/c", "2"))
    Layout(tmp_path / "l", one, two, packing=packing)
    found = flat(tmp_path / "l")
    assert {k: v for k, v in found.items() if isinstance(v, str)} == {"etc/a": "1", "etc/b": "2", "etc/c": "2"}
    assert t.cast(tarfile.TarInfo, found["bin"]).linkname == "usr/bin"


def test_an_archive_is_as_good_as_a_directory(tmp_path: Path) -> None:
    Layout(tmp_path / "l", layer(("a", "1")))
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        tar.add(tmp_path / "l", ".")
    assert flat(tmp_path / "l.tar") == {"a": "1"}


def test_whiteouts_remove_what_lower_layers_have(tmp_path: Path) -> None:
    one = layer(("d", None), ("d/a", "1"), ("d/b", "1"), ("e", None), ("e/x", "1"), ("e/y/z", "1"), ("f", "1"))
    # The order within a layer does not matter: what it brings itself stays.
    two = layer(("d/new", "2"), ("d/.wh..wh..opq", ""), (".wh.f", ""), ("e/.wh.y", ""), ("e/y2", "2"))
    Layout(tmp_path / "l", one, two)
    assert names(tmp_path / "l") == {"d", "d/new", "e", "e/x", "e/y2"}


def test_a_file_replaces_a_directory_and_a_directory_a_file(tmp_path: Path) -> None:
    one = layer(("d", None), ("d/a", "1"), ("f", "1"))
    Layout(tmp_path / "l", one, layer(("d", "2"), ("f", None), ("f/b", "2")))
    found = flat(tmp_path / "l")
    assert set(found) == {"d", "f", "f/b"} and found["d"] == "2"


def test_hard_links_survive_the_name_that_had_the_content(tmp_path: Path) -> None:
    one = layer(("a", "text"), ("b", special(tarfile.LNKTYPE, "a")), ("c", special(tarfile.LNKTYPE, "./a")))
    Layout(tmp_path / "l", one, layer((".wh.a", "")))
    assert flat(tmp_path / "l") == {"b": "text", "c": "text"}


def test_devices_stay_out(tmp_path: Path) -> None:
    kinds = {"c": tarfile.CHRTYPE, "b": tarfile.BLKTYPE, "p": tarfile.FIFOTYPE}
    Layout(tmp_path / "l", layer(("a", "1"), *((name, special(kind)) for name, kind in kinds.items())))
    assert names(tmp_path / "l") == {"a"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil", "x")], "has the name '../evil', which leads out of the image"),
        ([("a/../../evil", "x")], "leads out of the image"),
        ([("/etc/passwd", "x")], "leads out of the image"),
        ([("l", special(tarfile.SYMTYPE, "/etc")), ("l/passwd", "x")], "puts l/passwd below l, which is not a directory"),
        ([("h", special(tarfile.LNKTYPE, "../../etc/shadow"))], "leads out of the image"),
        ([("h", special(tarfile.LNKTYPE, "etc/shadow"))], "links h to 'etc/shadow', which is not a file of the image"),
        ([("s", special(tarfile.SYMTYPE, "/x")), ("h", special(tarfile.LNKTYPE, "s"))], "which is not a file"),
        ([(".", "x")], "replaces the root"),
    ],
)  # fmt: skip
def test_what_leads_out_of_the_image_is_refused(tmp_path: Path, members: list[Member], message: str) -> None:
    Layout(tmp_path / "l", layer(*members))
    with pytest.raises(_oci.OciError, match=message.replace(".", r"\.")):
        flat(tmp_path / "l")


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    for number, spoil in enumerate(("layer", "end", "manifest", "short", "missing")):
        made = Layout(tmp_path / str(number), layer(("a", "1" * 5000)))
        victim = made.path(made.manifest if spoil == "manifest" else made.layers[0])
        data = victim.read_bytes()
        if spoil == "layer":
            victim.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
        elif spoil == "end":
            victim.write_bytes(data + b"more")
        elif spoil == "manifest":
            victim.write_bytes(data + b" ")
        elif spoil == "short":
            victim.write_bytes(data[:-20])
        else:
            victim.unlink()
        with pytest.raises(_oci.OciError, match="damaged|it has no file"):
            flat(made.root)


def test_content_must_be_what_the_configuration_says(tmp_path: Path) -> None:
    made = Layout(tmp_path / "l", layer(("a", "1")))
    manifest = json.loads(made.path(made.manifest).read_text())
    config = json.loads(made.path(manifest["config"]).read_text())
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    manifest["config"] = made.blob(json.dumps(config).encode())
    made.index([{"mediaType": _oci.MANIFEST_TYPES[0], **made.blob(json.dumps(manifest).encode())}])
    with pytest.raises(_oci.OciError, match="is damaged"):
        flat(made.root)


def test_one_image_is_chosen_by_tag_and_platform(tmp_path: Path) -> None:
    made = Layout(tmp_path / "l", layer(("a", "1")))
    arm = {**made.manifest, "platform": {"os": "linux", "architecture": "arm64"}}
    amd = {**made.manifest, "platform": {"os": "linux", "architecture": "amd64"}}
    inner = made.blob(json.dumps({"manifests": [arm, amd]}).encode())
    made.index([{"mediaType": _oci.INDEX_TYPES[0], **inner, "annotations": {_oci.TAG: "v1"}}])
    assert flat(made.root, "v1") == {"a": "1"}
    with pytest.raises(_oci.OciError, match="has 0 images with the tag v2 for linux/amd64"):
        flat(made.root, "v2")
    made.index([made.manifest, {**made.manifest, "annotations": {_oci.TAG: "v2"}}])
    with pytest.raises(_oci.OciError, match="has 2 images for linux/amd64 instead of one"):
        flat(made.root)


def test_what_is_no_image(tmp_path: Path) -> None:
    Layout(tmp_path / "arm", layer(("a", "1")), architecture="arm64")
    with pytest.raises(_oci.OciError, match="for linux/arm64, not for linux/amd64"):
        flat(tmp_path / "arm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(_oci.OciError, match="it has no file oci-layout"):
        flat(tmp_path / "empty")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(_oci.OciError, match="not a readable tar archive"):
        flat(tmp_path / "text.tar")


def test_the_result_is_the_same_each_time(tmp_path: Path) -> None:
    Layout(tmp_path / "l", layer(("b", "1"), ("a", "1")), layer(("c", "2")))
    results = []
    for _time in range(2):
        out = io.BytesIO()
        _oci.flatten(_oci.read(str(tmp_path / "l"), None), out)
        results.append(out.getvalue())
    assert results[0] == results[1]
