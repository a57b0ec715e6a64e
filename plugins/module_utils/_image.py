# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The builder's cache of shared root file-system images.

This module is private to the collection and imports nothing of Ansible.

An image is an uncompressed file system (EROFS with 4 KiB blocks and no inlined data, padded to 2 MiB), which a guest
maps directly from the host's page cache. Its digest is the SHA-256 of that file. The file names the digests of its
kernel and initramfs, so that one digest stands for all.

``<cache>/<definition digest>/`` has an image's manifest, build log and bill of materials; ``blobs/`` its files,
compressed, by SHA-256; ``kernels/`` and ``layers/`` what builds can reuse.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import typing as t
from contextlib import contextmanager

from ansible_collections.agentfleet.metal.plugins.module_utils import _apt, _guest_kernel, _oci, _sbom, _store
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sha256_of, sync
from ansible_collections.agentfleet.metal.plugins.module_utils._image_build import (
    LOG,
    SBOM,
    Build,
    manifest_text,
    there,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._image_definition import (
    Definition,
    FileDigests,
    read_all,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

PROGRAMS = {"mmdebstrap": "mmdebstrap", "zstd": "zstd", "tar": "tar"}
MADE_BY = {"erofs": {"mkfs.erofs": "erofs-utils"}, "ext4": {"mke2fs": "e2fsprogs"}}
REPRODUCIBLE_E2FSPROGS = (1, 47, 1)
BOOTSTRAP_BYTES = 2 << 30  # what a build with packages needs besides what is known of its size
RESERVE_BYTES = 256 << 20
FULL_BYTES = 4 << 20  # a failure with less than this free is the disk's


def mke2fs_version(host: Host) -> tuple[str, bool]:
    """The version of the host's mke2fs, empty if it tells none, and whether it makes the same image twice."""
    match = re.search(r"mke2fs (\d+)\.(\d+)(?:\.(\d+))?", host.run(["mke2fs", "-V"], check=False).text)
    if not match:
        return "", False
    return match.group(0)[7:], tuple(int(number or 0) for number in match.groups()) >= REPRODUCIBLE_E2FSPROGS


class Images:
    """The images of a builder's cache.

    :param params: ``cache`` (directory), ``images`` (definitions) and ``refresh``
    """

    audited = False  # work of the controller, not a change of a host

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.refresh: bool = params["refresh"]
        self.cache: str = os.path.abspath(os.path.expanduser(params["cache"]))
        self.digests = FileDigests(self._remembered())
        self.wanted = read_all(host, params["images"], self.digests)
        self.asked: list[str] = [image["name"] for image in params["images"]]
        self.warnings: list[str] = []
        self._built: set[str] = set()

    def _remembered(self) -> dict[str, t.Any]:
        try:
            return dict(json.loads(self.host.read(f"{self.cache}/files.json")))
        except ValueError:
            return {}

    # -- observe, plan, apply ------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Definition digest -> manifest of what is built already, and complete."""
        built: dict[str, t.Any] = {}
        for image in self.wanted:
            try:
                text = self.host.read(f"{self.cache}/{image.digest}/{_store.MANIFEST}")
                manifest = json.loads(text)
                complete = all(
                    there(self.host.path(self._blob(f"{entry['sha256']}.zst"))) for entry in manifest["files"].values()
                ) and all(there(self.host.path(f"{self.cache}/layers/{layer}.tar.zst")) for layer in manifest["layers"])
            except (ValueError, KeyError, TypeError):
                continue
            base = built.get(image.base.digest) if image.base else None
            if image.base and (base is None or base["files"][_store.IMAGE]["sha256"] != manifest["base"]):
                continue  # its base was built anew, and gave another image
            if self._is_base(image) and not manifest["layers"]:
                continue
            if complete:
                built[image.digest] = manifest
        return built

    def _blob(self, name: str) -> str:
        return f"{self.cache}/blobs/{name}"

    def _is_base(self, image: Definition) -> bool:
        return any(other.base is image for other in self.wanted)

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """One build for each definition that the cache does not hold."""
        self.warnings = []
        steps: list[Step] = []
        building: set[str] = set()
        for image in self.wanted:
            if self.refresh:
                why = "refresh: the packages are taken anew"
            elif image.digest not in observed:
                why = "no image of this definition is in the cache"
            elif image.base and image.base.digest in building:
                why = f"its base {image.base.name} is built anew"
            else:
                continue
            if image.digest in building:
                continue  # two names of one definition
            building.add(image.digest)
            if not self.predicting:
                self._check_programs(image)
                self._check_oci(image)
            if not image.data and not self._mirror(image):
                raise Refused(
                    f"{image.option}.mirror", None,
                    f"this machine's apt configuration has no mirror of {image.family}",
                    "Give the mirror's URI",
                )  # fmt: skip
            steps.append(Step("build", f"image {image.name}", after=image.content, why=why, data=image))
        if steps and not self.predicting:
            self._check_space([step.data for step in steps])
        return steps

    def _mirror(self, image: Definition) -> str | None:
        return image.mirror or _apt.mirror_of(self.host, image.family)

    def _check_programs(self, image: Definition) -> None:
        needed = {**PROGRAMS, **MADE_BY[image.content["filesystem"]]}
        if image.data:
            del needed["mmdebstrap"]
        files: dict[str, str] = {}
        if os.geteuid() != 0:
            needed["fakeroot"] = "fakeroot"
        if image.content["verity"]:
            needed["veritysetup"] = "cryptsetup-bin"
        if "source" in image.kernel:
            needed.update(_guest_kernel.SOURCE_PROGRAMS)
            files = _guest_kernel.SOURCE_FILES
        for program, package in needed.items():
            if not self.host.has_program(program):
                raise Refused(
                    image.option, image.name, f"the builder has no {program}", f"Install the package {package}"
                )
        for path, package in files.items():
            if not self.host.exists(path):
                raise Refused(image.option, image.name, f"the builder has no {path}", f"Install the package {package}")
        if image.content["filesystem"] == "ext4":
            version, reproducible = mke2fs_version(self.host)
            if not reproducible:
                raise Refused(
                    f"{image.option}.filesystem", "ext4",
                    f"the builder's mke2fs is {version or 'of no known version'}, "
                    "which writes the time of the build into the image",
                    f"Install e2fsprogs {'.'.join(map(str, REPRODUCIBLE_E2FSPROGS))} or newer, or use erofs",
                )  # fmt: skip
        if image.sbom is not False and not _sbom.program():
            if image.sbom:
                raise Refused(
                    f"{image.option}.sbom", True, f"the builder has no {_sbom.PROGRAM}",
                    f"Install it beside Ansible: pip install '{_sbom.REQUIREMENT}'",
                )  # fmt: skip
            self.warnings.append(
                f"image {image.name} gets no bill of materials: the builder has no {_sbom.PROGRAM} "
                f"(pip install '{_sbom.REQUIREMENT}')"
            )

    def _check_oci(self, image: Definition) -> None:
        """Read and verify all layers before anything is made of them."""
        if image.oci is None:
            return
        try:
            _oci.entries(image.oci)
        except _oci.OciError as error:
            raise Refused(
                f"{image.option}.oci", image.oci.path, str(error), "Export the image again, or correct what made it"
            ) from error

    def _check_space(self, images: t.Sequence[Definition]) -> None:
        """A build needs its input some four times: as tar, unpacked, as image, and compressed."""
        need = RESERVE_BYTES
        for image in images:
            own = sum(os.path.getsize(item.source) for item in image.items.values() if item.source)
            layers = sum(int(layer.get("size", 0)) for layer in image.oci.layers) if image.oci else 0
            need = max(need, 4 * own + 8 * layers + (BOOTSTRAP_BYTES if image.packages or image.base else 0))
        free = _store.free_bytes(self.host.path(self.cache))
        if free < need:
            raise Refused(
                "cache", self.cache, f"has {free >> 20} MiB free, and a build may need {need >> 20} MiB",
                "Free space there, or name a directory on a larger file system",
            )  # fmt: skip

    def apply(self, step: Step) -> None:
        """Build one image in a temporary directory; it appears in the cache complete or not at all."""
        image: Definition = step.data
        os.makedirs(self.cache, mode=0o755, exist_ok=True)
        with self._lock():
            observed = self.observe()
            if image.digest in observed and not self.refresh and image.digest not in self._built:
                return  # another run built it meanwhile
            for name in os.listdir(self.cache):
                if name.startswith(".build-"):  # of a build that was killed
                    shutil.rmtree(f"{self.cache}/{name}", ignore_errors=True)
            work = tempfile.mkdtemp(prefix=".build-", dir=self.cache)
            try:
                self._build(image, work, observed)
            except (HostError, OSError) as error:
                self._explain(image, work, error)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        self._built.add(image.digest)

    def _build(self, image: Definition, work: str, observed: t.Mapping[str, t.Any]) -> None:
        base = None
        if image.base:
            base = observed.get(image.base.digest)
            if base is None:
                raise HostError(f"the base {image.base.name} is not in the cache. Run again")
        build = Build(self.cache, work, image, self._mirror(image), base, self._is_base(image), self.refresh)
        manifest = manifest_text(build.run())
        target = f"{self.cache}/{image.digest}"
        os.makedirs(target, exist_ok=True)
        for name in (LOG, SBOM):
            if os.path.exists(f"{work}/{name}"):
                os.replace(f"{work}/{name}", f"{target}/{name}")
        host = Host("/")
        host.write(f"{work}/{_store.MANIFEST}", manifest)
        digest = sha256_of(f"{work}/{_store.MANIFEST}")
        host.run(["zstd", "-q", "-f", f"{work}/{_store.MANIFEST}", "-o", f"{work}/manifest.zst"])
        sync(f"{work}/manifest.zst")
        os.replace(f"{work}/manifest.zst", self._blob(f"{digest}.zst"))
        host.write(f"{target}/{_store.MANIFEST}", manifest)  # last: from now on the image is there
        host.write(f"{self.cache}/files.json", json.dumps({**self._remembered(), **self.digests.seen}))

    def _explain(self, image: Definition, work: str, error: Exception) -> t.NoReturn:
        """Keep the log of a failed build, and say it plainly when the file system is full."""
        kept = f"{self.cache}/failed-{image.name}.log"
        try:
            os.replace(f"{work}/{LOG}", kept)
        except OSError:
            kept = "(not written)"
        free = _store.free_bytes(self.cache)
        if free < FULL_BYTES or "No space left" in str(error):
            raise HostError(
                f"the file system of {self.cache} is full ({format_size(free)} free). The images that were there are as they "
                f"were. Free space, or set another cache ({str(error)[-300:]})"
            ) from error
        raise HostError(f"{error} (log: {kept})") from error

    @contextmanager
    def _lock(self) -> t.Iterator[None]:
        with open(f"{self.cache}/.lock", "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # -- result ----------------------------------------------------------------

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Per image: digests, where its files are, sizes, packages; ``store`` for image_store."""
        images, store = [], []
        by_name = {image.name: image for image in self.wanted}
        for name in self.asked:
            image = by_name[name]
            manifest = observed.get(image.digest)
            directory = f"{self.cache}/{image.digest}"
            files = dict(manifest["files"]) if manifest else {}
            digest = files[_store.IMAGE]["sha256"] if manifest else ""
            if manifest:
                text = manifest_text(manifest).encode()
                files[_store.MANIFEST] = {"sha256": hashlib.sha256(text).hexdigest(), "size_bytes": len(text)}
            store.append(
                {"name": name, "digest": digest, "files": files, "deltas": manifest["deltas"] if manifest else []}
            )
            images.append(
                {
                    "name": name,
                    "definition_digest": image.digest,
                    "image_digest": digest,
                    "size_bytes": files[_store.IMAGE]["size_bytes"] if manifest else 0,
                    "filesystem": image.content["filesystem"],
                    "kernel_release": manifest["kernel_release"] if manifest else "",
                    "packages": manifest["packages"] if manifest else {},
                    "python_packages": manifest["python_packages"] if manifest else {},
                    "log": f"{directory}/{LOG}",
                    "sbom": f"{directory}/{SBOM}" if self.host.exists(f"{directory}/{SBOM}") else "",
                }
            )
        return {"images": images, "store": store, "blobs": f"{self.cache}/blobs", "warnings": self.warnings}
