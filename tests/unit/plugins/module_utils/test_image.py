# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions of images and their digests; builds that really run, from an OCI image and a kernel that is in the cache."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import typing as t
import zipfile
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _image,
    _image_build,
    _image_definition,
    _initramfs,
    _sbom,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._image import Images
from ansible_collections.agentfleet.metal.plugins.module_utils._image_build import Build
from ansible_collections.agentfleet.metal.plugins.module_utils._image_definition import digest_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step, apply_all

DEFAULTS: dict[str, t.Any] = {
    "name": "agent", "base": None, "data": False, "oci": None, "family": None, "suite": None, "components": None, "mirror": None,
    "packages": None, "kernel_package": None, "kernel_modules": None, "kernel_source": None, "python_requirements": [],
    "files": [], "directories": [], "users": [], "services": [], "units": [], "filesystem": "erofs", "dax": True,
    "verity": False, "sbom": False,
}  # fmt: skip
FILE: dict[str, t.Any] = {"src": None, "content": None, "mode": "0644", "owner": "root", "group": "root"}
DIRECTORY: dict[str, t.Any] = {"src": None, "mode": "0755", "owner": "root", "group": "root"}
USER: dict[str, t.Any] = {"groups": [], "home": None, "shell": None}


def resource(host: Host, *images: t.Mapping[str, t.Any], cache: str = "/cache", refresh: bool = False) -> Images:
    return Images(host, {"cache": cache, "refresh": refresh, "images": [{**DEFAULTS, **image} for image in images]})


def digest(host: Host, **changes: t.Any) -> str:
    return resource(host, changes).wanted[0].digest


def file(path: str, content: str, **more: t.Any) -> dict[str, t.Any]:
    return {**FILE, "path": path, "content": content, **more}


# -- definitions ------------------------------------------------------------------


def test_digest_follows_the_definition_and_nothing_else(fake_host: t.Any) -> None:
    same = digest(fake_host)
    assert digest(fake_host, name="other", mirror="http://mirror.example/debian") == same
    assert digest(fake_host, packages=["e2fsprogs", "python3", "e2fsprogs"], suite="trixie") == same
    changes: list[dict[str, t.Any]] = [
        {"suite": "sid"}, {"packages": []}, {"files": [file("/etc/x", "one")]}, {"files": [file("/etc/x", "two")]},
        {"files": [file("/etc/x", "one", mode="0600")]}, {"files": [file("/etc/x", "one", owner="games")]},
        {"dax": False}, {"dax": False, "verity": True}, {"filesystem": "ext4"}, {"kernel_modules": ["nvme"]},
        {"kernel_source": {"package": "linux-source", "fragment": None}},
        {"kernel_source": {"package": "linux-source", "fragment": "CONFIG_WIREGUARD=y"}},
        {"users": [{**USER, "name": "worker", "uid": 1000}]},
        {"services": [{"name": "worker", "command": ["/bin/true"], "user": "root", "environment": {}}]},
        {"python_requirements": ["numpy==2.3.4"]},
    ]  # fmt: skip
    digests = [digest(fake_host, **change) for change in changes]
    assert len({same, *digests}) == len(changes) + 1


def test_digest_follows_directories(fake_host: t.Any) -> None:
    fake_host.files({"/srv/model/a": "1", "/srv/model/run": "#!/bin/sh\n", "/srv/model/link": "-> a"})
    image = {"directories": [{**DIRECTORY, "path": "/opt/model", "src": "/srv/model"}]}
    (wanted,) = resource(fake_host, image).wanted
    items = {path: (item.kind, item.mode) for path, item in wanted.items.items()}
    assert items == {
        "/opt/model": ("directory", 0o755), "/opt/model/a": ("file", 0o644), "/opt/model/run": ("file", 0o755),
        "/opt/model/link": ("link", 0o777),
    }  # fmt: skip
    fake_host.files({"/srv/model/a": "2"})
    assert resource(fake_host, image).wanted[0].digest != wanted.digest


def test_large_files_are_hashed_again_only_when_they_look_different(tmp_path: Path) -> None:
    large = tmp_path / "model"
    large.write_bytes(bytes(_image_definition.LARGE))
    first = _image_definition.FileDigests({})
    assert first.of(str(large)) == hashlib.sha256(bytes(_image_definition.LARGE)).hexdigest()
    remembered = json.loads(json.dumps(first.seen))
    remembered[str(large)][1] = "from memory"
    assert _image_definition.FileDigests(remembered).of(str(large)) == "from memory"
    os.utime(large, (1, 1))
    assert _image_definition.FileDigests(remembered).of(str(large)) == first.of(str(large))


def test_bases_come_first_and_their_changes_reach_what_is_made_of_them(fake_host: t.Any) -> None:
    images = [{"name": "c", "base": "b"}, {"name": "b", "base": "a", "files": [file("/x", "1")]}, {"name": "a"}]
    wanted = resource(fake_host, *images).wanted
    assert [image.name for image in wanted] == ["a", "b", "c"]
    assert wanted[2].packages == [] and wanted[2].kernel == wanted[0].kernel
    images[2] = {"name": "a", "packages": ["curl"]}
    assert not {image.digest for image in resource(fake_host, *images).wanted} & {image.digest for image in wanted}


def test_an_image_of_data_has_nothing_that_runs(fake_host: t.Any) -> None:
    fake_host.files({"/srv/model/weights": "1"})
    image = {"data": True, "directories": [{**DIRECTORY, "path": "/model", "src": "/srv/model"}]}
    (wanted,) = resource(fake_host, image).wanted
    assert list(wanted.items) == ["/model", "/model/weights"] and wanted.packages == []
    assert {"kernel", "initramfs", "early_init", "suite"}.isdisjoint(wanted.content)
    with pytest.raises(Refused, match="is an image of data") as refused:
        resource(fake_host, {"name": "data", **image}, {"name": "top", "base": "data"})
    assert refused.value.option == "images[1].base"


def test_services_and_units_become_files(fake_host: t.Any) -> None:
    unit = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\nAlias=other.service\n"
    (wanted,) = resource(
        fake_host,
        {
            "services": [{"name": "w", "command": ["/bin/echo", "a b"], "user": "worker", "environment": {"K": "v'"}}],
            "units": [{"name": "u.service", "content": unit, "src": None, "enabled": True}],
        },
    ).wanted
    assert wanted.items["/usr/lib/agentfleet/services/w"].data.decode() == (
        "#!/bin/sh\nexport K='v'\"'\"''\nexec /usr/bin/setpriv --reuid=worker --regid=worker --init-groups "
        "--inh-caps=-all -- /bin/echo 'a b'\n"
    )
    links = {path: item.sha256 for path, item in wanted.items.items() if item.kind == "link"}
    assert links == {
        "/etc/systemd/system/multi-user.target.wants/u.service": "/etc/systemd/system/u.service",
        "/etc/systemd/system/other.service": "/etc/systemd/system/u.service",
    }


def test_check_mode_plans_a_build_without_the_tools(fake_host: t.Any) -> None:
    fake_host.files({"/etc/apt/sources.list": "deb http://mirror.example/debian trixie main\n"})
    images = resource(fake_host, {})
    images.predicting = True
    (step,) = images.plan(images.observe())
    assert (step.verb, step.object) == ("build", "image agent")
    assert images.result({})["store"] == [{"name": "agent", "digest": "", "files": {}, "deltas": []}]


def test_python_packages_are_those_of_pip(tmp_path: Path) -> None:
    for name, record in (("of_pip-1.0", True), ("of_debian-2.0", False)):
        info = tmp_path / f"usr/lib/python3/dist-packages/{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[:-4]}\nVersion: {name[-3:]}\n\ntext\n")
        if record:
            (info / "RECORD").write_text("")
    assert _sbom.python_packages(str(tmp_path)) == {"of_pip": "1.0"}


# -- builds that run ----------------------------------------------------------------

BUILDS = pytest.mark.skipif(
    not all(map(shutil.which, ("mkfs.erofs", "fsck.erofs", "zstd", "tar", "fakeroot"))),
    reason="erofs-utils, zstd, tar and fakeroot are needed to build",
)


def oci(root: Path, **files: str | tarfile.TarInfo) -> dict[str, t.Any]:
    """A small OCI layout with a passwd and a group file."""
    content: dict[str, str | tarfile.TarInfo] = {
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        "etc/group": "root:x:0:\nshadow:x:42:\naudio:x:29:\n", "etc/shadow": "root:*:1::::::\n", "etc/gshadow": "root:*::\n",
        "dev/null": "a device of the builder", **files,
    }  # fmt: skip
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, text in content.items():
            if isinstance(text, tarfile.TarInfo):
                tar.addfile(text)
                continue
            entry = tarfile.TarInfo(name)
            entry.size, entry.uid = len(text.encode()), 7
            tar.addfile(entry, io.BytesIO(text.encode()))
    blobs = root / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, t.Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    diff = hashlib.sha256(data.getvalue()).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [f"sha256:{diff}"]}}
    packed = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        **blob(gzip.compress(data.getvalue(), mtime=0)),
    }
    manifest = blob(json.dumps({"config": blob(json.dumps(config).encode()), "layers": [packed]}).encode())
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (root / "index.json").write_text(json.dumps({"manifests": [manifest]}))
    return {"path": str(root), "tag": None}


class Builder:
    """A cache with a kernel that needs no mirror, and images made of an OCI layout."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, str(root / "cache")
        self.oci = oci(root / "oci")

    def images(self, *images: t.Mapping[str, t.Any], refresh: bool = False) -> Images:
        origin = {"mirror": "http://mirror.example/debian", "oci": self.oci}
        full = [{**({} if "base" in image else origin), **image} for image in images]
        made = resource(Host("/"), *full, cache=self.cache, refresh=refresh)
        for image in made.wanted:
            self.kernel(digest_of(image.kernel))
        return made

    def kernel(self, name: str) -> None:
        directory = Path(self.cache, "kernels", name)
        if directory.exists():
            return
        (directory / "modules/kernel").mkdir(parents=True)
        for module in (*_initramfs.MODULES, "erofs", "ext4", "dm_verity"):
            data = lzma.compress(b"\x7fELF\0depends=\0" + module.encode())
            (directory / f"modules/kernel/{module}.ko.xz").write_bytes(data)
        for file in ("kernel", "busybox", "config", "release"):
            (directory / file).write_text("6.12-test" if file == "release" else file)

    def build(self, *images: t.Mapping[str, t.Any], refresh: bool = False) -> dict[str, t.Any]:
        made = self.images(*images, refresh=refresh)
        observed = made.observe()
        apply_all(made, made.plan(observed))
        return made.result(made.observe())

    def unpacked(self, digest: str) -> Path:
        """The content of an image."""
        target = self.root / f"unpacked-{digest[:8]}"
        image = self.root / "image"
        subprocess.run(["zstd", "-dqf", f"{self.cache}/blobs/{digest}.zst", "-o", image], check=True)
        subprocess.run(["fsck.erofs", f"--extract={target}", image], check=True, capture_output=True)
        return target


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setattr(Images, "_check_programs", lambda self, image: None)  # mmdebstrap is not needed here
    monkeypatch.setattr(Build, "_kernel", lambda self: f"{self.cache}/kernels/{digest_of(self.wanted.kernel)}")
    monkeypatch.setattr(_image, "BOOTSTRAP_BYTES", 0)
    monkeypatch.setattr(_image, "RESERVE_BYTES", 0)
    return Builder(tmp_path)


@BUILDS
@pytest.mark.parametrize("filesystem", ["erofs", "ext4"])
def test_two_builds_are_identical_bit_for_bit(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch, filesystem: str
) -> None:
    """In another directory, as an ordinary user would, and again."""
    if filesystem == "ext4" and not (shutil.which("mke2fs") and _image.mke2fs_version(Host("/"))[1]):
        pytest.skip("e2fsprogs 1.47.1 or newer is needed")
    image = {
        "filesystem": filesystem,
        "files": [file("/opt/x", "text", owner="worker", group="worker")],
        "users": [{**USER, "name": "worker", "uid": 1000, "groups": ["audio"]}],
    }
    first = builder.build(image)["store"]
    assert first[0]["digest"]
    other = Builder(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # takes the way through fakeroot
    assert other.build(image)["store"] == first
    assert builder.build(image, refresh=True)["store"] == first


@BUILDS
def test_an_ordinary_users_layers_are_brought_into_the_tree(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdebstrap's hooks cannot open them then: they run as a subordinate id."""
    hooks: list[str] = []

    def bootstrap(
        build: Build, _variant: str, _packages: t.Sequence[str], target: str, options: t.Sequence[str]
    ) -> None:
        hooks.extend(option.replace(build.work, "WORK") for option in options)
        shutil.copyfile(f"{build.work}/oci.tar", target)

    monkeypatch.setattr(Build, "_bootstrap", bootstrap)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    builder.build({"packages": ["hello"]})
    upload, unpack = hooks
    assert upload == "--setup-hook=upload WORK/oci.tar /.agentfleet-layer"
    assert unpack.endswith('-xpf "$1/.agentfleet-layer" && rm "$1/.agentfleet-layer"')


@BUILDS
def test_a_cache_outlives_a_power_cut(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    for module in (_image, _image_build):
        monkeypatch.setattr(module, "sync", lambda path: synced.append(os.path.basename(path)))
    digest = builder.build({})["store"][0]["digest"]
    blobs = sorted(path.name for path in Path(builder.cache, "blobs").iterdir())
    assert len(blobs) > 1 and len(synced) == len(blobs) and "manifest.zst" in synced
    assert set(synced) - {"manifest.zst"} <= {f"{name}.new" for name in blobs}
    blob = Path(builder.cache, "blobs", f"{digest}.zst")
    blob.write_bytes(b"")  # of a builder that had not written it to the disk before it had its name
    builder.build({})
    assert blob.stat().st_size


@BUILDS
def test_an_image_has_what_was_asked_for(builder: Builder) -> None:
    (builder.root / "model/deep").mkdir(parents=True)
    (builder.root / "model/deep/weights").write_bytes(os.urandom(4096 * 3 + 5))
    result = builder.build(
        {
            "users": [{**USER, "name": "worker", "uid": 1000, "groups": ["audio"], "shell": "/bin/sh"}],
            "directories": [{**DIRECTORY, "path": "/opt/model", "src": str(builder.root / "model"), "owner": "worker"}],
            "files": [file("/etc/motd", "hello", mode="0600", group="42")],
        }
    )
    (image,) = result["images"]
    assert image["size_bytes"] % (2 << 20) == 0
    tree = builder.unpacked(image["image_digest"])
    assert (tree / "etc/motd").read_text() == "hello" and (tree / "etc/motd").stat().st_mode & 0o777 == 0o600
    weights = tree / "opt/model/deep/weights"
    assert weights.read_bytes() == (builder.root / "model/deep/weights").read_bytes()
    assert "worker:x:1000:1000::/home/worker:/bin/sh" in (tree / "etc/passwd").read_text()
    assert "audio:x:29:worker" in (tree / "etc/group").read_text()
    assert (tree / "etc/shadow").read_text().splitlines()[-1].startswith("worker:!:")
    assert (tree / "home/worker").stat().st_mode & 0o777 == 0o700
    assert not (tree / "dev/null").exists()
    identity = json.loads((tree / "usr/lib/agentfleet/kernel.json").read_text())
    assert identity["files"]["kernel"]["sha256"] == hashlib.sha256(b"kernel").hexdigest()
    if os.geteuid() == 0:
        assert weights.stat().st_uid == 1000 and (tree / "etc/motd").stat().st_gid == 42
    assert "mkfs.erofs" in Path(image["log"]).read_text()


def wheel(directory: Path, version: str = "1.0") -> str:
    """A package with a program; returns the SHA-256 of its wheel."""
    directory.mkdir(exist_ok=True)
    path = directory / f"demo-{version}-py3-none-any.whl"
    info = f"demo-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/__init__.py", "def main():\n    print('demo')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: demo\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\ndemo = demo:main\n")
        archive.writestr(f"{info}/RECORD", f"demo/__init__.py,,\n{info}/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@BUILDS
@pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="pip is needed to install wheels")
def test_python_packages_are_installed_as_they_were_hashed(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = wheel(builder.root / "wheels")
    for key, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(builder.root / "wheels"))):
        monkeypatch.setenv(f"PIP_{key}", value)
    builder.oci = oci(builder.root / "with-python", **{"usr/bin/python3.13": "", "usr/lib/python3/dist-packages/x": ""})
    image = {"python_requirements": [f"demo==1.0 --hash=sha256:{digest}"]}
    result = builder.build(image)
    assert result["images"][0]["python_packages"] == {"demo": "1.0"}
    tree = builder.unpacked(result["images"][0]["image_digest"])
    assert (tree / "usr/lib/python3/dist-packages/demo/__init__.py").is_file()
    program = tree / "usr/local/bin/demo"
    assert program.read_text().startswith("#!/usr/bin/env python3\n") and program.stat().st_mode & 0o111
    assert builder.build(image, refresh=True)["store"] == result["store"]
    with pytest.raises(HostError, match=f"Expected sha256 {'0' * 64}"):
        builder.build({"python_requirements": [f"demo==1.0 --hash=sha256:{'0' * 64}"]})


@BUILDS
def test_an_image_of_data_is_built_without_packages_and_kernel(builder: Builder) -> None:
    (builder.root / "model").mkdir()
    (builder.root / "model/weights").write_bytes(bytes(5000))
    image = {
        "data": True, "oci": None, "mirror": None,
        "directories": [{**DIRECTORY, "path": "/weights", "src": str(builder.root / "model"), "owner": "1000"}],
    }  # fmt: skip
    result = builder.build(image)
    (entry,), (told,) = result["store"], result["images"]
    assert sorted(entry["files"]) == ["manifest.json", "rootfs.erofs"] and told["kernel_release"] == ""
    tree = builder.unpacked(entry["digest"])
    assert sorted(str(path.relative_to(tree)) for path in tree.rglob("*")) == ["weights", "weights/weights"]
    with open(builder.root / "image", "rb") as file:  # the guest finds it by this
        assert file.read()[1072:1088].hex() == told["definition_digest"][:32]
    assert builder.build(image, refresh=True)["store"] == result["store"]
    again = builder.images(image)
    assert again.plan(again.observe()) == []


@BUILDS
def test_an_image_on_another_reuses_it(builder: Builder) -> None:
    noise = os.urandom(512 << 10).hex()
    base = {"name": "base", "files": [file("/a", noise), file("/b", "base")]}
    top = {"name": "top", "base": "base", "files": [file("/b", "top"), file("/c", "top")]}
    result = builder.build(base, top)
    stores = {entry["name"]: entry for entry in result["store"]}
    assert stores["top"]["deltas"] == [stores["base"]["digest"]]
    assert stores["top"]["files"]["kernel"] == stores["base"]["files"]["kernel"]
    tree = builder.unpacked(stores["top"]["digest"])
    assert ((tree / "a").read_text(), (tree / "b").read_text(), (tree / "c").read_text()) == (noise, "top", "top")
    delta = Path(builder.cache, "blobs", f"{stores['top']['digest']}.from-{stores['base']['digest']}.zst")
    assert delta.stat().st_size * 20 < Path(builder.cache, "blobs", f"{stores['top']['digest']}.zst").stat().st_size
    again = builder.images(base, top)
    assert again.plan(again.observe()) == []


@BUILDS
def test_a_base_that_changed_is_followed(builder: Builder) -> None:
    top = {"name": "top", "base": "base"}
    before = builder.build({"name": "base"}, top)["store"][1]["digest"]
    made = builder.images({"name": "base", "files": [file("/new", "1")]}, top)
    assert [step.object for step in made.plan(made.observe())] == ["image base", "image top"]
    assert builder.build({"name": "base", "files": [file("/new", "1")]}, top)["store"][1]["digest"] != before


@BUILDS
def test_a_base_that_was_built_anew_differently_is_followed(builder: Builder) -> None:
    """The same definition gave another image, as when packages of the mirror moved."""
    images = ({"name": "base"}, {"name": "top", "base": "base"})
    result = builder.build(*images)
    path = Path(builder.cache, result["images"][0]["definition_digest"], "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["files"]["rootfs.erofs"]["sha256"] = manifest["files"]["kernel"]["sha256"]
    path.write_text(json.dumps(manifest))
    made = builder.images(*images)
    assert [step.object for step in made.plan(made.observe())] == ["image top"]


@BUILDS
def test_a_file_that_changes_during_the_build(builder: Builder) -> None:
    source = builder.root / "source"
    source.write_text("one")
    made = builder.images({"files": [{**FILE, "path": "/x", "src": str(source)}]})
    steps = made.plan(made.observe())
    source.write_text("two")
    with pytest.raises(HostError, match="source changed while the image was built"):
        apply_all(made, steps)
    assert made.observe() == {}


@pytest.mark.skipif(not _sbom.program(), reason="debsbom is needed")
def test_the_bill_of_materials_lists_all_packages_and_is_the_same_each_time(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    info = tree / "usr/lib/python3/dist-packages/Of_Pip-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Of_Pip\nVersion: 1.0\n")
    (info / "RECORD").write_text("")
    made = []
    for attempt in range(4):
        if attempt == 2:  # the first two have no Debian in them, as an OCI image may
            (tree / "var/lib/dpkg").mkdir(parents=True)
            stanza = "Package: {0}\nStatus: install ok installed\nVersion: 2.0-1\nArchitecture: amd64\nMaintainer: A <a@example.org>\n"
            text = "\n".join(stanza.format(name) for name in ("base-files", "bash", "dpkg")) + "\n"
            (tree / "var/lib/dpkg/status").write_text(text)
        _sbom.make(Host("/"), str(tree), "agent", "ab" * 32, 1735689600, str(tmp_path / f"sbom{attempt}"))
        made.append((tmp_path / f"sbom{attempt}").read_text())
    assert (made[0], made[2]) == (made[1], made[3])
    plain, full = (json.loads(made[number]) for number in (0, 2))
    assert [one["purl"] for one in plain["components"]] == ["pkg:pypi/of-pip@1.0"]
    assert plain["metadata"]["component"]["name"] == "agent" and plain["bomFormat"] == "CycloneDX"
    assert {(one["name"], one["version"]) for one in full["components"]} == {
        ("base-files", "2.0-1"), ("bash", "2.0-1"), ("dpkg", "2.0-1"), ("Of_Pip", "1.0"),
    }  # fmt: skip


@BUILDS
@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"users": [{**USER, "name": "nobody", "uid": 1000}]}, "the image has nobody .65534. already"),
        ({"users": [{**USER, "name": "x", "uid": 42}]}, "has a group of this name or number"),
        ({"users": [{**USER, "name": "x", "uid": 9, "groups": ["none"]}]}, "the image has no group none"),
        ({"files": [file("/x", "1", owner="ghost")]}, "the image has no user or group ghost"),
        ({"units": [{"name": "x.service", "src": None, "content": "", "enabled": False}]}, "the image has no systemd"),
        ({"python_requirements": ["numpy"]}, "the image has no Python. Add python3"),
    ],
)  # fmt: skip
def test_what_only_the_build_can_know(builder: Builder, image: dict[str, t.Any], message: str) -> None:
    with pytest.raises(HostError, match=message):
        builder.build(image)
    assert os.path.exists(f"{builder.cache}/failed-agent.log")
    assert not [name for name in os.listdir(builder.cache) if name.startswith(".build-")]


def small_disk(directory: Path, size: str) -> t.Callable[[], None]:
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "test", directory], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("a small file system can only be mounted by root")
    return lambda: subprocess.run(["umount", "-l", directory], check=True) and None


@BUILDS
def test_a_full_disk_leaves_the_old_image(builder: Builder) -> None:
    undo = small_disk(Path(builder.cache), "12m")
    try:
        old = builder.build({})["store"]
        large = {"files": [file("/large", os.urandom(6 << 20).hex())]}
        with pytest.raises(
            HostError, match=r"the file system of .*/cache is full .* The images that were there are as they were"
        ):
            builder.build(large)
        assert not [name for name in os.listdir(builder.cache) if name.startswith(".build-")]
        made = builder.images({})
        observed = made.observe()
        assert made.plan(observed) == [] and made.result(observed)["store"] == old
        assert builder.build({}, refresh=True)["store"] == old  # there is room for it, as before
    finally:
        undo()


def test_a_disk_that_is_too_small_is_refused_before_the_build(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_image, "RESERVE_BYTES", 256 << 20)
    monkeypatch.setattr(_image._store, "free_bytes", lambda path: 100 << 20)
    made = builder.images({})
    with pytest.raises(Refused, match="has 100 MiB free, and a build may need 256 MiB") as refused:
        made.plan(made.observe())
    assert refused.value.option == "cache" and os.listdir(builder.cache) == ["kernels"]


@BUILDS
def test_an_old_build_that_was_killed_is_cleared_away(builder: Builder) -> None:
    left = Path(builder.cache, ".build-old")
    left.mkdir(parents=True)
    builder.build({})
    assert not left.exists()


@BUILDS
def test_another_run_that_built_it_meanwhile(builder: Builder) -> None:
    late = builder.images({})
    (step,) = t.cast(list[Step], late.plan(late.observe()))
    builder.build({})
    log = Path(late.result(late.observe())["images"][0]["log"])
    before = log.stat().st_mtime_ns
    late.apply(step)
    assert log.stat().st_mtime_ns == before


@BUILDS
def test_a_damaged_layer_is_refused_before_the_build(builder: Builder) -> None:
    blobs = builder.root / "oci/blobs/sha256"
    layer = next(path for path in blobs.iterdir() if path.read_bytes().startswith(b"\x1f\x8b"))
    layer.write_bytes(layer.read_bytes()[:-9])
    made = builder.images({})
    with pytest.raises(Refused, match="is damaged") as refused:
        made.plan(made.observe())
    assert refused.value.option == "images[0].oci"


@pytest.mark.parametrize(
    ("kind", "name", "target", "message"),
    [
        (tarfile.REGTYPE, "../evil", "", "has the name '../evil', which leads out of the image"),
        (tarfile.REGTYPE, "/etc/evil", "", "leads out of the image"),
        (tarfile.LNKTYPE, "h", "../../etc/shadow", "leads out of the image"),
        (tarfile.LNKTYPE, "h", "etc/none", "which is not a file of the image"),
        (tarfile.REGTYPE, "etc/passwd/evil", "", "puts etc/passwd/evil below etc/passwd, which is not a directory"),
    ],
)
def test_a_layer_that_leads_out_of_the_image_is_refused(
    builder: Builder, kind: bytes, name: str, target: str, message: str
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    builder.oci = oci(builder.root / "evil", evil=entry)
    made = builder.images({})
    with pytest.raises(Refused, match=message.replace(".", r"\.")) as refused:
        made.plan(made.observe())
    assert (refused.value.option, refused.value.value) == ("images[0].oci", str(builder.root / "evil"))
    assert os.listdir(builder.cache) == ["kernels"]


@BUILDS
def test_an_image_with_a_hash_tree(builder: Builder) -> None:
    if not shutil.which("veritysetup"):
        pytest.skip("cryptsetup-bin is needed to make the hash tree")
    result = builder.build({"dax": False, "verity": True})
    (image,) = result["images"]
    manifest = json.loads(Path(builder.cache, image["definition_digest"], "manifest.json").read_text())
    words = manifest["verity"].split()
    assert words[2:6] == ["verity", "1", "/dev/pmem0", "/dev/pmem0"] and len(words) == 13
    image_file = builder.root / "image"
    digest = manifest["files"]["rootfs.erofs"]["sha256"]
    subprocess.run(["zstd", "-dqf", f"{builder.cache}/blobs/{digest}.zst", "-o", image_file], check=True)
    verify = [
        "veritysetup", "verify", "--no-superblock", "--hash=sha256", f"--salt={words[12]}", "--data-block-size=4096",
        "--hash-block-size=4096", f"--data-blocks={words[8]}", f"--hash-offset={int(words[9]) * 4096}", image_file,
        image_file, words[11],
    ]  # fmt: skip
    assert subprocess.run(verify, check=False).returncode == 0
    with image_file.open("r+b") as opened:
        opened.seek(5000)
        opened.write(b"X")
    assert subprocess.run(verify, check=False, capture_output=True).returncode != 0
    initrd = builder.root / "initrd"
    blob = manifest["files"]["initrd"]["sha256"]
    subprocess.run(["zstd", "-dqf", f"{builder.cache}/blobs/{blob}.zst", "-o", initrd], check=True)
    assert words[11].encode() in initrd.read_bytes()


@BUILDS
def test_ext4_has_no_journal(builder: Builder) -> None:
    if not all(map(shutil.which, ("mke2fs", "dumpe2fs"))):
        pytest.skip("e2fsprogs is needed")
    (image,) = builder.build({"filesystem": "ext4", "files": [file("/x", "1" * 100000)]})["images"]
    image_file = builder.root / "image"
    subprocess.run(["zstd", "-dqf", f"{builder.cache}/blobs/{image['image_digest']}.zst", "-o", image_file], check=True)
    told = subprocess.run(["dumpe2fs", "-h", image_file], capture_output=True, text=True, check=True).stdout
    features = next(line for line in told.splitlines() if line.startswith("Filesystem features:"))
    assert "has_journal" not in features and "extent" in features
    assert "Block size:               4096" in told
    assert subprocess.run(["e2fsck", "-fn", image_file], capture_output=True, check=False).returncode == 0


def test_an_old_mke2fs_is_refused(fake_host: t.Any) -> None:
    fake_host.files({f"/usr/bin/{name}": "" for name in ("mmdebstrap", "mke2fs", "zstd", "tar", "fakeroot")})
    fake_host.answers["mke2fs -V"] = (0, "", "mke2fs 1.47.0 (5-Feb-2023)")
    images = resource(fake_host, {"filesystem": "ext4", "mirror": "http://mirror.example/debian"})
    with pytest.raises(Refused, match="mke2fs is 1.47.0, which writes the time of the build") as refused:
        images.plan(images.observe())
    assert refused.value.option == "images[0].filesystem"
