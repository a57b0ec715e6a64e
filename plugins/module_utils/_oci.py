# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""OCI images: from a layout directory or archive to one tar of the file system that its layers make together.

This module is private to the collection and imports nothing of Ansible. It needs no container engine and no root.

Every blob is verified against its digest, and nothing is written outside of the resulting tar. Layers are
streamed twice: once to know what survives whiteouts and replacements, once to copy exactly that.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import tarfile
import typing as t
import zlib
from dataclasses import dataclass, field

MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TAG = "org.opencontainers.image.ref.name"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
JSON_LIMIT = 16 << 20


class OciError(Exception):
    """What is wrong with an image, in one sentence without its end."""


class Hashing:
    """A readable file that computes the SHA-256 of what went through it."""

    def __init__(self, source: t.IO[bytes]) -> None:
        self._source = source
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        """Like a file's."""
        data = self._source.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data


@dataclass
class Image:
    """One image of a layout.

    :param digest: of its manifest; it stands for everything
    :param layers: descriptors, lowest first
    :param diff_ids: digests of the uncompressed layers
    """

    path: str
    digest: str
    layers: list[dict[str, t.Any]]
    diff_ids: list[str]


@dataclass
class _Entry:
    """A member of a layer that the result may have, under one name or (hard links) several."""

    layer: int
    number: int
    directory: bool
    regular: bool
    paths: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _blob(path: str, name: str) -> t.Iterator[t.IO[bytes]]:
    """One file of a layout, whether directory or archive."""
    if os.path.isdir(path):
        real = os.path.join(path, name)
        if os.path.islink(real) or not os.path.isfile(real):
            raise OciError(f"it has no file {name}")
        with open(real, "rb") as plain:
            yield plain
        return
    try:
        with tarfile.open(path, "r:") as archive:
            # Archives begin their names with "./", or not.
            found = next((m for m in archive if m.isreg() and m.name.lstrip("./") == name), None)
            member = archive.extractfile(found) if found else None
            if member is None:
                raise OciError(f"it has no file {name}")
            yield member
    except (tarfile.TarError, EOFError) as error:
        raise OciError(f"it is not a readable tar archive ({error})") from error


def _document(path: str, digest: str, size: int | None = None) -> dict[str, t.Any]:
    """A verified JSON blob."""
    with _blob(path, _blob_name(digest)) as file:
        data = file.read(JSON_LIMIT)
    if hashlib.sha256(data).hexdigest() != digest.partition(":")[2] or (size is not None and size != len(data)):
        raise OciError(f"the blob {digest} is damaged")
    return _json(data, digest)


def _json(data: bytes, what: str) -> dict[str, t.Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise OciError(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise OciError(f"{what} is not an object")
    return value


def _blob_name(digest: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)):
        raise OciError(f"{digest} is not a SHA-256 digest")
    return "blobs/sha256/" + digest.partition(":")[2]


def read(path: str, tag: str | None, architecture: str = "amd64") -> Image:
    """Find the image of a layout; reads a few small documents only.

    :param path: real path of a layout directory or of an archive of one
    :param tag: reference name, where the layout has several images
    """
    with _blob(path, "oci-layout") as file:
        if _json(file.read(JSON_LIMIT), "oci-layout").get("imageLayoutVersion") != "1.0.0":
            raise OciError("it is not an OCI image layout of version 1.0.0")
    with _blob(path, "index.json") as file:
        found = _manifests(path, _json(file.read(JSON_LIMIT), "index.json"), tag, architecture, 0)
    if len(found) != 1:
        raise OciError(
            f"it has {len(found)} images {f'with the tag {tag} ' if tag else ''}for linux/{architecture} instead of one"
        )
    manifest = _document(path, found[0]["digest"], found[0].get("size"))
    try:
        config = _document(path, manifest["config"]["digest"], manifest["config"].get("size"))
        image = Image(path, found[0]["digest"], list(manifest["layers"]), list(config["rootfs"]["diff_ids"]))
        for layer in image.layers:
            _blob_name(layer["digest"])
    except (KeyError, TypeError) as error:
        raise OciError(f"its manifest or configuration is not that of an image ({error!r})") from error
    if config.get("architecture") != architecture or config.get("os") != "linux":
        raise OciError(f"it is for {config.get('os')}/{config.get('architecture')}, not for linux/{architecture}")
    if len(image.layers) != len(image.diff_ids):
        raise OciError(f"its configuration knows {len(image.diff_ids)} layers, its manifest {len(image.layers)}")
    return image


def _manifests(
    path: str, index: t.Mapping[str, t.Any], tag: str | None, architecture: str, depth: int
) -> list[dict[str, t.Any]]:
    found: list[dict[str, t.Any]] = []
    for descriptor in index.get("manifests") or []:
        if tag and depth == 0 and (descriptor.get("annotations") or {}).get(TAG) != tag:
            continue
        platform = descriptor.get("platform")
        if platform and (platform.get("os"), platform.get("architecture")) != ("linux", architecture):
            continue
        if descriptor.get("mediaType") in INDEX_TYPES and depth < 2:
            inner = _document(path, descriptor["digest"], descriptor.get("size"))
            found += _manifests(path, inner, None, architecture, depth + 1)
        elif descriptor.get("mediaType", MANIFEST_TYPES[0]) in MANIFEST_TYPES:
            found.append(descriptor)
    return found


@contextlib.contextmanager
def _layer(image: Image, number: int) -> t.Iterator[tarfile.TarFile]:
    """A layer as a stream of members; verifies blob and content when all was read."""
    descriptor = image.layers[number]
    kind = str(descriptor.get("mediaType", ""))
    with contextlib.ExitStack() as stack:
        raw = Hashing(stack.enter_context(_blob(image.path, _blob_name(descriptor["digest"]))))
        plain: t.IO[bytes] = t.cast("t.IO[bytes]", raw)
        if kind.endswith(("+gzip", ".gzip")):
            plain = t.cast("t.IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=t.cast("t.Any", raw))))
        elif kind.endswith("+zstd"):
            plain = stack.enter_context(_unzstd(raw))
        elif not kind.endswith(".tar"):
            raise OciError(f"layer {descriptor['digest']} is of the unknown type {kind!r}")
        content = Hashing(plain)
        try:
            with tarfile.open(fileobj=t.cast("t.Any", content), mode="r|", errorlevel=2) as members:
                yield members
            for stream in (content, raw):
                while stream.read(1 << 20):
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OciError(f"layer {descriptor['digest']} is damaged ({error})") from error
        if (
            f"sha256:{raw.digest.hexdigest()}" != descriptor["digest"]
            or raw.size != descriptor.get("size", raw.size)
            or f"sha256:{content.digest.hexdigest()}" != image.diff_ids[number]
        ):
            raise OciError(f"layer {descriptor['digest']} is damaged")


@contextlib.contextmanager
def _unzstd(raw: Hashing) -> t.Iterator[t.IO[bytes]]:
    """The content of a zstd stream. A file takes it in: two pipes at once could wait for each other."""
    import tempfile

    with tempfile.TemporaryFile() as packed, tempfile.TemporaryFile() as plain:
        while chunk := raw.read(1 << 20):
            packed.write(chunk)
        packed.seek(0)
        # There is no AnsibleModule here, and the output is binary.
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            ["zstd", "-dcq"], stdin=packed, stdout=plain, stderr=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise OciError(f"a layer does not decompress ({done.stderr.decode(errors='replace').strip()})")
        plain.seek(0)
        yield plain


def _clean(name: str, layer: str) -> str:
    """A member's name without its decoration; the root is empty."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise OciError(f"layer {layer} has the name {name!r}, which leads out of the image")
    return "/".join(parts)


class _Tree:
    """What the layers so far make together: path -> (layer that named it, entry)."""

    def __init__(self) -> None:
        self.paths: dict[str, tuple[int, _Entry]] = {}

    def remove(self, path: str, below: int, itself: bool) -> None:
        """Forget what lower layers have at and below a path."""
        for known, (layer, _entry) in list(self.paths.items()):
            if layer < below and ((itself and known == path) or known.startswith(f"{path}/" if path else "")):
                del self.paths[known]

    def add(self, path: str, layer: int, entry: _Entry, name: str) -> None:
        """One more member; its parents must be directories, never links."""
        parent = os.path.dirname(path)
        while parent:
            if parent in self.paths and not self.paths[parent][1].directory:
                raise OciError(f"layer {name} puts {path} below {parent}, which is not a directory")
            parent = os.path.dirname(parent)
        before = self.paths.get(path)
        if before and before[1].directory and not entry.directory:
            self.remove(path, layer + 1, True)
        self.paths[path] = (layer, entry)


def entries(image: Image) -> dict[tuple[int, int], _Entry]:
    """(layer, number of the member) -> what survives of it. Reads and verifies all layers."""
    tree = _Tree()
    for layer, descriptor in enumerate(image.layers):
        with _layer(image, layer) as members:
            for number, member in enumerate(members):
                _member(tree, layer, number, member, descriptor["digest"])
    found: dict[tuple[int, int], _Entry] = {}
    for path, (_layer_number, entry) in tree.paths.items():
        entry.paths.append(path)
        found[entry.layer, entry.number] = entry
    return found


def _member(tree: _Tree, layer: int, number: int, member: tarfile.TarInfo, name: str) -> None:
    path = _clean(member.name, name)
    directory, base = os.path.split(path)
    if base == OPAQUE:
        tree.remove(directory, layer, False)
    elif base.startswith(WHITEOUT):
        tree.remove(os.path.join(directory, base[len(WHITEOUT) :]), layer, True)
    elif member.islnk():
        target = _clean(member.linkname, name)
        if target not in tree.paths or not tree.paths[target][1].regular:
            raise OciError(f"layer {name} links {path} to {target!r}, which is not a file of the image")
        tree.add(path, layer, tree.paths[target][1], name)
    elif member.isdir() or member.isreg() or member.issym():
        if not path and not member.isdir():
            raise OciError(f"layer {name} replaces the root by something that is not a directory")
        tree.add(path, layer, _Entry(layer, number, member.isdir(), member.isreg()), name)
    # Devices, pipes and sockets stay out: a microVM has its own /dev.


def flatten(image: Image, target: t.IO[bytes]) -> None:
    """Write the tar of the whole file system."""
    surviving = entries(image)
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for layer in range(len(image.layers)):
            with _layer(image, layer) as members:
                for number, member in enumerate(members):
                    entry = surviving.get((layer, number))
                    if entry is None:
                        continue
                    member.uname = member.gname = ""
                    # File capabilities and other attributes are not kept, as with packages.
                    member.pax_headers = {}
                    first, *links = entry.paths
                    member.name = f"./{first}"
                    archive.addfile(member, members.extractfile(member) if member.isreg() else None)
                    for link in links:
                        other = tarfile.TarInfo(f"./{link}")
                        other.type, other.linkname = tarfile.LNKTYPE, member.name
                        archive.addfile(other)
