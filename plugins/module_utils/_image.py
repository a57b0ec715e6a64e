# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shared root file-system images: from a definition to one content-addressed bundle.

This module is private to the collection and imports nothing of Ansible. It
runs on the builder, as root or as an ordinary user (fakeroot), with no mount of ours.

An image is an uncompressed EROFS (4 KiB blocks, no inlined data, padded to
2 MiB), which a guest maps directly from the host's page cache. Its digest is
the SHA-256 of that file. The file names the digests of its kernel and
initramfs, so that one digest stands for all three.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import typing as t
import uuid

from ansible_collections.agentfleet.metal.plugins.module_utils import _apt, _initramfs
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

FORMAT = 1  # part of every definition digest; raise it when the same definition gives another image
IMAGE, KERNEL, INITRD, MANIFEST, BUNDLE = "rootfs.erofs", "kernel", "initrd", "manifest.json", "bundle.tar.zst"
ALIGNMENT = 2 << 20
EPOCH = 1735689600
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
PROGRAMS = {"mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils", "zstd": "zstd", "tar": "tar"}
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical(value: t.Any) -> bytes:
    """One spelling for one value, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Images:
    """The images of a builder's cache.

    :param params: ``cache`` (directory) and ``images`` (definitions)
    """

    audited = False  # work of the controller, not a change of a host

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.cache: str = os.path.abspath(os.path.expanduser(params["cache"]))
        self.wanted: list[dict[str, t.Any]] = []
        for index, image in enumerate(params["images"]):
            option = f"images[{index}]"
            if not NAME.fullmatch(image["name"]):
                raise Refused(
                    f"{option}.name", image["name"], "not a name of an image",
                    "Use 1 to 64 of a-z, 0-9, dot and hyphen, beginning and ending with a letter or digit",
                )  # fmt: skip
            if image["name"] in [other["name"] for other in self.wanted]:
                raise Refused(f"{option}.name", image["name"], "named twice", "Give each image its own name")
            self.wanted.append(self._definition(option, image))

    def _definition(self, option: str, image: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        for key in ("packages", "python_requirements"):
            for number, word in enumerate(image[key]):
                if not re.fullmatch(r"[A-Za-z0-9][^\s,]*", word):
                    raise Refused(
                        f"{option}.{key}[{number}]", word, "not a package", "Write one package a list item, no options"
                    )
        files: dict[str, dict[str, t.Any]] = {}
        for number, file in enumerate(image["files"]):
            where, path = f"{option}.files[{number}]", file["path"]
            if not path.startswith("/") or os.path.normpath(path) != path:
                raise Refused(f"{where}.path", path, "not a clean absolute path", "Write a path such as /opt/agent/run")
            if path in files:
                raise Refused(f"{where}.path", path, "named twice", "Give each file of an image once")
            if (file["src"] is None) == (file["content"] is None):
                raise Refused(where, path, "not exactly one of src and content", "Give src or content")
            if not re.fullmatch(r"0?[0-7]{3,4}", file["mode"]):
                raise Refused(f"{where}.mode", file["mode"], "not an octal mode", "Write a mode such as '0644'")
            if file["src"] is not None and not os.path.isfile(self.host.path(file["src"])):
                raise Refused(f"{where}.src", file["src"], "no such file on the builder", "Correct the path")
            files[path] = {"mode": int(file["mode"], 8), "data": self._data(file)}
        definition = {
            "format": FORMAT,
            "initramfs": hashlib.sha256(_initramfs.INIT.encode() + repr(_initramfs.MODULES).encode()).hexdigest(),
            "suite": image["suite"],
            "components": image["components"],
            "packages": sorted(set(image["packages"])),
            "kernel_package": image["kernel_package"],
            "python_requirements": image["python_requirements"],
            "files": {
                path: {"mode": file["mode"], "sha256": hashlib.sha256(file["data"]).hexdigest()}
                for path, file in sorted(files.items())
            },
        }
        digest = hashlib.sha256(canonical(definition)).hexdigest()
        return {
            "name": image["name"],
            "option": option,
            "family": image["family"],
            "mirror": image["mirror"],
            "definition": definition,
            "definition_digest": digest,
            "directory": f"{self.cache}/{digest}",
            "files": files,
        }

    def _data(self, file: t.Mapping[str, t.Any]) -> bytes:
        if file["src"] is None:
            return str(file["content"]).encode()
        with open(self.host.path(file["src"]), "rb") as source:
            return source.read()

    # -- observe, plan, apply ------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Definition digest -> manifest of what is built already."""
        built = {}
        for image in self.wanted:
            try:
                manifest = json.loads(self.host.read(f"{image['directory']}/{MANIFEST}"))
                size = os.path.getsize(self.host.path(f"{image['directory']}/{BUNDLE}"))
            except (ValueError, OSError):
                continue
            if size == manifest["bundle"]["size_bytes"]:
                built[image["definition_digest"]] = manifest
        return built

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """One build for each definition that the cache does not hold."""
        steps = []
        for image in self.wanted:
            if image["definition_digest"] in observed:
                continue
            if not self.predicting:
                self._check_programs(image)
            if not self._mirror(image):
                raise Refused(
                    f"{image['option']}.mirror", None,
                    f"this machine's apt configuration has no mirror of {image['family']}",
                    "Give the mirror's URI",
                )  # fmt: skip
            steps.append(
                Step(
                    "build",
                    f"image {image['name']}",
                    after=image["definition"],
                    why="no image of this definition is in the cache",
                    data=image,
                )
            )
        return steps

    def _mirror(self, image: t.Mapping[str, t.Any]) -> str | None:
        return image["mirror"] or _apt.mirror_of(self.host, image["family"])

    def _check_programs(self, image: t.Mapping[str, t.Any]) -> None:
        needed = dict(PROGRAMS)
        if os.geteuid() != 0:
            needed["fakeroot"] = "fakeroot"
        for program, package in needed.items():
            if not any(self.host.exists(f"{where}/{program}") for where in ("/usr/bin", "/usr/sbin", "/bin", "/sbin")):
                raise Refused(
                    image["option"], image["name"], f"the builder has no {program}", f"Install the package {package}"
                )

    def apply(self, step: Step) -> None:
        """Build one image in a temporary directory; it appears in the cache complete or not at all."""
        image = step.data
        os.makedirs(self.cache, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".build-", dir=self.cache)
        try:
            self._build(image, work)
            shutil.rmtree(image["directory"], ignore_errors=True)
            os.rename(f"{work}/done", image["directory"])
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Per image: digests, where the bundle is, sizes, packages."""
        digests = {digest: manifest["files"][IMAGE]["sha256"] for digest, manifest in observed.items()}
        return {
            "store": [{"name": i["name"], "digest": digests.get(i["definition_digest"], "")} for i in self.wanted],
            "images": [
                {
                    "name": image["name"],
                    "definition_digest": image["definition_digest"],
                    "image_digest": digests.get(image["definition_digest"], ""),
                    "bundle": f"{image['directory']}/{BUNDLE}",
                    "bundle_sha256": manifest["bundle"]["sha256"] if manifest else "",
                    "bundle_bytes": manifest["bundle"]["size_bytes"] if manifest else 0,
                    "size_bytes": manifest["files"][IMAGE]["size_bytes"] if manifest else 0,
                    "kernel_release": manifest["kernel_release"] if manifest else "",
                    "packages": manifest["packages"] if manifest else {},
                }
                for image in self.wanted
                for manifest in [observed.get(image["definition_digest"])]
            ],
        }

    # -- the build -----------------------------------------------------------

    def _build(self, image: t.Mapping[str, t.Any], work: str) -> None:
        definition = image["definition"]
        done = f"{work}/done"
        for directory in (done, f"{work}/kernel", f"{work}/tree"):
            os.mkdir(directory)
        self._bootstrap(image, "extract", [definition["kernel_package"], "busybox-static"], f"{work}/kernel.tar")
        self.host.run(
            ["tar", "-C", f"{work}/kernel", "--exclude=./dev/*", "-xf", f"{work}/kernel.tar"], timeout_seconds=600
        )
        release = self._kernel(f"{work}/kernel", done, definition["kernel_package"])
        self._bootstrap(image, "essential", definition["packages"], f"{work}/base.tar")
        contents = {name: _describe(f"{done}/{name}") for name in (KERNEL, INITRD)}
        self._overlay(image, work, canonical({"release": release, "files": contents}))
        self._erofs(image, work, f"{done}/{IMAGE}")
        contents[IMAGE] = _describe(f"{done}/{IMAGE}")
        manifest = {
            "format": FORMAT,
            "definition": definition,
            "definition_digest": image["definition_digest"],
            "files": contents,
            "kernel_release": release,
            "packages": _packages(Host(f"{work}/tree").read("/var/lib/dpkg/status")),
        }
        self.host.write(f"{done}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        self.host.run(
            ["tar", "-C", done, "--sort=name", f"--mtime=@{EPOCH}", "--owner=0", "--group=0", "--numeric-owner",
             "--use-compress-program=zstd -T0 -6 -q", "-cf", f"{done}/{BUNDLE}", IMAGE, KERNEL, INITRD, MANIFEST],
            timeout_seconds=900,
        )  # fmt: skip
        for name in (IMAGE, KERNEL, INITRD):  # the bundle holds them
            os.unlink(f"{done}/{name}")
        manifest["bundle"] = _describe(f"{done}/{BUNDLE}")
        self.host.write(f"{done}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True) + "\n")

    def _bootstrap(self, image: t.Mapping[str, t.Any], variant: str, packages: t.Sequence[str], target: str) -> None:
        definition = image["definition"]
        self.host.run(
            ["env", f"SOURCE_DATE_EPOCH={EPOCH}", "mmdebstrap", f"--variant={variant}", "--quiet",
             f"--include={','.join(packages)}", f"--components={','.join(definition['components'])}",
             '--aptopt=Acquire::Languages "none"', *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
             definition["suite"], target, self._mirror(image) or ""],
            timeout_seconds=3600,
        )  # fmt: skip

    def _kernel(self, tree: str, done: str, package: str) -> str:
        """Kernel and initramfs from the unpacked packages; returns the kernel's release."""
        kernels = glob.glob(f"{tree}/boot/vmlinuz-*")
        if len(kernels) != 1:
            raise HostError(f"{package} brought {len(kernels)} kernels instead of one. Choose a kernel package")
        release = kernels[0].rpartition("/vmlinuz-")[2]
        _initramfs.check_options(Host(tree).read(f"/boot/config-{release}"), package)
        modules = next(path for path in (f"{tree}/usr/lib/modules", f"{tree}/lib/modules") if os.path.isdir(path))
        busybox = next(path for path in (f"{tree}/usr/bin/busybox", f"{tree}/bin/busybox") if os.path.isfile(path))
        with open(busybox, "rb") as file, open(f"{done}/{INITRD}", "wb") as initrd:
            initrd.write(_initramfs.initramfs(f"{modules}/{release}", file.read()))
        shutil.copyfile(kernels[0], f"{done}/{KERNEL}")
        for name in (KERNEL, INITRD):
            os.chmod(f"{done}/{name}", 0o444)
        return release

    def _overlay(self, image: t.Mapping[str, t.Any], work: str, kernel: bytes) -> None:
        """What comes on top of the packages, as a tar owned by root."""
        files = {**image["files"], "/usr/lib/agentfleet/kernel.json": {"mode": 0o444, "data": kernel}}
        with tarfile.open(f"{work}/overlay.tar", "w") as tar:
            for path, file in sorted(files.items()):
                entry = tarfile.TarInfo("." + path)
                entry.size, entry.mode, entry.mtime = len(file["data"]), file["mode"], EPOCH
                tar.addfile(entry, io.BytesIO(file["data"]))
            if image["definition"]["python_requirements"]:
                tar.add(self._wheels(image, work), "./usr/lib/python3/dist-packages", filter=_as_root)

    def _wheels(self, image: t.Mapping[str, t.Any], work: str) -> str:
        """Python packages for the image's own Python, from wheels only (nothing is compiled here)."""
        with tarfile.open(f"{work}/base.tar") as base:
            versions = [
                m.group(1) for name in base.getnames() if (m := re.fullmatch(r"\./usr/bin/python3\.(\d+)", name))
            ]
        if not versions:
            raise HostError("python_requirements: the image has no Python. Add python3 to its packages")
        target = f"{work}/wheels"
        self.host.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:",
             "--implementation=cp", f"--python-version=3.{versions[0]}",
             *(f"--platform={tag}_x86_64" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")),
             f"--target={target}", *image["definition"]["python_requirements"]],
            timeout_seconds=1800,
        )  # fmt: skip
        return target

    def _erofs(self, image: t.Mapping[str, t.Any], work: str, target: str) -> None:
        options = ["-E", "noinline_data", "-T", str(EPOCH), "-U", str(uuid.UUID(image["definition_digest"][:32]))]
        if " -b" in self.host.run(["mkfs.erofs", "--help"], check=False).text:
            options.append("-b4096")  # since erofs-utils 1.6; before it 4 KiB is the only size
        script = (
            'set -e; cd "$1"; tar -C tree --exclude="./dev/*" -xpf base.tar; tar -C tree -xpf overlay.tar; '
            'shift; mkfs.erofs --quiet "$@" tree'
        )
        fakeroot = [] if os.geteuid() == 0 else ["fakeroot", "--"]
        self.host.run([*fakeroot, "sh", "-c", script, "sh", work, *options, target], timeout_seconds=1800)
        os.truncate(target, -(-os.path.getsize(target) // ALIGNMENT) * ALIGNMENT)
        os.chmod(target, 0o444)


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = EPOCH
    return entry


def _describe(path: str) -> dict[str, t.Any]:
    return {"sha256": sha256_of(path), "size_bytes": os.path.getsize(path)}


def _packages(status: str) -> dict[str, str]:
    """Package -> version from dpkg's status file."""
    found = {}
    for stanza in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status") == "install ok installed":
            found[fields["Package"]] = fields["Version"]
    return found
