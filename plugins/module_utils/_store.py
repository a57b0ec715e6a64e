# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The content-addressed image store of a host.

This module is private to the collection and imports nothing of Ansible.

``/var/lib/agentfleet/images/blobs/<sha256>`` holds every file once, immutable. ``<digest>/`` holds an image: hard links
to its blobs under their names, so that the link count says whether a blob is used. ``names/<name>`` is a symbolic
link to a digest's directory, switched atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sha256_of, sync
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import IMAGES, RUN, VOLUMES
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

STORE = IMAGES
BLOBS = f"{STORE}/blobs"
IMAGE, KERNEL, INITRD, MANIFEST = "rootfs.erofs", "kernel", "initrd", "manifest.json"
# An image of data has no kernel, and a kernel with everything built in needs no initramfs.
REQUIRED, OPTIONAL = {IMAGE, MANIFEST}, {KERNEL, INITRD}
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-f]{64}")
RESERVE_BYTES = 64 << 20
PREFIX = "agentfleet-"  # of what arrives


def image_path(digest: str, name: str = IMAGE) -> str:
    """Host path of one file of an image."""
    return f"{STORE}/{digest}/{name}"


def mount_options(content: t.Mapping[str, t.Any]) -> str:
    """How guests mount an image of this definition."""
    options = {"ext4": "ro,noload"}.get(content.get("filesystem", ""), "ro")
    return options + (",dax=always" if content.get("dax", True) else "")


def delta_name(digest: str, base: str) -> str:
    """File name of a blob that is compressed as the difference to another one."""
    return f"{digest}.from-{base}.zst"


def stored(host: Host) -> dict[str, dict[str, t.Any]]:
    """Digest -> manifest of every image on the host."""
    found = {}
    for digest in filter(DIGEST.fullmatch, host.names(STORE)):
        try:
            found[digest] = json.loads(host.read(image_path(digest, MANIFEST)))
        except ValueError:
            continue
    return found


def named(host: Host) -> dict[str, str]:
    """Name -> digest of every pointer on the host."""
    return {name: host.link_name(f"{STORE}/names/{name}") for name in host.names(f"{STORE}/names") if name[0] != "."}


def in_use(host: Host, digests: t.Iterable[str]) -> dict[str, str]:
    """Digest -> who uses it besides names: definitions of microVMs, snapshots, and running processes."""
    wanted = set(digests)
    used: dict[str, str] = {}
    # Every document of ours that mentions a digest: specs of what is declared, of what runs, of snapshots.
    library = "/var/lib/agentfleet"
    for pattern in (f"{library}/*", f"{library}/*/*", f"{library}/*/*/*", RUN):
        for path in host.glob(f"{pattern}/*.json"):
            if not path.startswith((f"{STORE}/", f"{VOLUMES}/")):  # what is in volumes is their VMM's
                for digest in wanted.intersection(DIGEST.findall(host.read(path))):
                    used.setdefault(digest, path)
    for pid in filter(str.isdigit, host.names("/proc")):
        text = host.read(f"/proc/{pid}/maps") + "".join(_links(host, f"/proc/{pid}/fd"))
        for digest in re.findall(rf"{STORE}/({DIGEST.pattern})/", text) if STORE in text else ():
            used.setdefault(digest, f"process {pid}")
    return {digest: user for digest, user in used.items() if digest in wanted}


def _links(host: Host, directory: str) -> t.Iterator[str]:
    for name in host.names(directory):
        try:
            yield os.readlink(host.path(f"{directory}/{name}")) + "\n"
        except OSError:
            continue


class Store:
    """What ``image_store`` manages: images by digest, and the names that point to them.

    :param params: ``state``, ``images`` (name, digest, files, deltas), ``incoming`` (where blobs arrive), ``verify``,
        ``gc``, ``keep``, ``keep_seconds``
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.present: bool = params["state"] == "present"
        self.images: list[dict[str, t.Any]] = list(params["images"])
        self.incoming: str | None = params["incoming"]
        self.verify: bool = params["verify"]
        self.gc: bool = params["gc"]
        self.keep: int = params["keep"]
        self.keep_seconds: int = params["keep_seconds"]
        for option in ("keep", "keep_seconds"):
            if params[option] < 0:
                raise Refused(option, params[option], "negative", "Give 0 or more")
        if self.incoming is not None and not self.present:
            raise Refused("incoming", self.incoming, "nothing arrives with state absent", "Leave it out")
        names = set()
        for index, image in enumerate(self.images):
            self._check(f"images[{index}]", image)
            if image["name"] in names:
                raise Refused(f"images[{index}].name", image["name"], "named twice", "Point each name to one image")
            names.add(image["name"])

    def _check(self, option: str, image: t.Mapping[str, t.Any]) -> None:
        if not NAME.fullmatch(image["name"]):
            raise Refused(
                f"{option}.name", image["name"], "not a name of an image",
                "Use 1 to 64 of a-z, 0-9, dot and hyphen, beginning and ending with a letter or digit",
            )  # fmt: skip
        digest, files = image["digest"], image["files"]
        if not self.present:
            return
        if digest is None or (digest and not DIGEST.fullmatch(digest)):
            raise Refused(
                f"{option}.digest", digest, "not a SHA-256", "Give the 64 lower-case hexadecimal digits of the image"
            )
        for base in image["deltas"]:
            if not DIGEST.fullmatch(base):
                raise Refused(f"{option}.deltas", base, "not a SHA-256", "Pass on what rootfs_image returned as store")
        if not files:
            return
        if not REQUIRED <= set(files) <= REQUIRED | OPTIONAL:
            raise Refused(
                f"{option}.files", sorted(files), f"not {', '.join(sorted(REQUIRED))} and perhaps {KERNEL} and {INITRD}",
                "Pass on what rootfs_image returned as store",
            )  # fmt: skip
        for name, file in files.items():
            try:
                good = DIGEST.fullmatch(file["sha256"]) and int(file["size_bytes"]) > 0
            except (KeyError, TypeError, ValueError):
                good = None
            if not good:
                raise Refused(
                    f"{option}.files.{name}", file, "has no sha256 and size_bytes",
                    "Pass on what rootfs_image returned as store",
                )  # fmt: skip
        if files[IMAGE]["sha256"] != digest:
            raise Refused(
                f"{option}.files.{IMAGE}", files[IMAGE]["sha256"], "is another image than the digest says",
                "Pass on what rootfs_image returned as store",
            )  # fmt: skip

    # -- observe -----------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """All images, blobs and names on the host; which are short, and damaged if that is to be verified."""
        images = stored(self.host)
        known = [file for one in (*images.values(), *self.images) for file in one["files"].values()]
        sizes = {file["sha256"]: int(file["size_bytes"]) for file in known}
        blobs: dict[str, int] = {}
        for digest in filter(DIGEST.fullmatch, self.host.names(BLOBS)):
            size = os.path.getsize(self.host.path(f"{BLOBS}/{digest}"))
            if size == sizes.get(digest, size):  # a short one is as good as none
                blobs[digest] = size
        return {
            "stored": images,
            "blobs": blobs,
            "names": named(self.host),
            "short": {digest for digest, manifest in images.items() if self._is_short(digest, manifest)},
            "damaged": self._damaged(images) if self.verify else [],
        }

    def _is_short(self, digest: str, manifest: t.Mapping[str, t.Any]) -> bool:
        """Whether a file of an image has not its size, as after a power cut that came before it was on the disk."""
        for name, entry in manifest["files"].items():
            try:
                size = os.path.getsize(self.host.path(image_path(digest, name)))
            except OSError:
                return True
            if size != int(entry["size_bytes"]):
                return True
        return False

    def _damaged(self, images: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        hashed: dict[str, str] = {}
        for digest, manifest in sorted(images.items()):
            for name, entry in sorted(manifest["files"].items()):
                path = self.host.path(image_path(digest, name))
                wanted = entry["sha256"]
                if wanted not in hashed:
                    hashed[wanted] = ""  # it cannot be read
                    with contextlib.suppress(OSError):
                        hashed[wanted] = sha256_of(path)
                if hashed[wanted] != wanted:
                    found.append({"digest": digest, "file": name, "expected": wanted, "found": hashed[wanted]})
        return found

    def _missing(self, image: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> list[str]:
        """Names of the image's files whose blob is not there, or damaged."""
        damaged = {entry["expected"] for entry in observed["damaged"]}
        return [
            name
            for name, file in sorted(image["files"].items())
            if file["sha256"] in damaged or observed["blobs"].get(file["sha256"]) != int(file["size_bytes"])
        ]

    def _wanted(self, observed: t.Mapping[str, t.Any]) -> list[str]:
        """File names of the blobs to send, each once; a difference where its base is (or will be) there."""
        damaged = {entry["expected"] for entry in observed["damaged"]}
        there = set(observed["blobs"]) - damaged
        found: list[str] = []
        for image in self.images if self.present else ():
            if not image["digest"]:
                found.append("not-built-yet")
            elif not self._complete(image, observed):
                for name in self._missing(image, observed):
                    digest = image["files"][name]["sha256"]
                    base = next((base for base in image["deltas"] if base in there), None)
                    file = delta_name(digest, base) if base and name == IMAGE else f"{digest}.zst"
                    if digest not in there and file not in found:
                        found.append(file)
                    there.add(digest)
        return found

    def _complete(self, image: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> bool:
        spoilt = {entry["digest"] for entry in observed["damaged"]} | observed["short"]
        return image["digest"] in observed["stored"] and image["digest"] not in spoilt

    # -- plan ----------------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Register what arrived, point names, and remove what nobody uses."""
        steps: list[Step] = []
        if not self.present:
            for image in self.images:
                before = observed["names"].get(image["name"])
                if before:
                    steps.append(Step("unname", f"name {image['name']}", before=before, data=image))
        elif not self.incoming:
            self._check_space(observed)
        coming = set(observed["stored"])
        for index, image in enumerate(self.images if self.present else ()):
            digest = image["digest"]
            if not digest and not self.predicting:
                raise Refused(
                    f"images[{index}].digest", digest, "no digest", "Give the image_digest that rootfs_image returned"
                )
            if self.incoming and (not digest or not self._complete(image, observed)):
                if digest and not image["files"] and not self.predicting:
                    raise Refused(
                        f"images[{index}].files", image["files"], "needed to register an image",
                        "Pass on what rootfs_image returned as store",
                    )  # fmt: skip
                coming.add(digest)
                steps.append(Step("register", f"image {image['name']}", after={"digest": digest}, data=image))
            if digest in coming and observed["names"].get(image["name"]) != digest:
                before = observed["names"].get(image["name"])
                steps.append(Step("point", f"name {image['name']}", before=before, after=digest, data=image))
        self._check_damage(observed)
        return steps + (self._garbage(observed, steps) if self.gc else [])

    def _check_damage(self, observed: t.Mapping[str, t.Any]) -> None:
        """What no transfer of this call will repair is an error."""
        repaired = {file["sha256"] for image in self.images for file in image["files"].values()}
        for entry in observed["damaged"]:
            if entry["expected"] not in repaired:
                names = [name for name, digest in observed["names"].items() if digest == entry["digest"]]
                raise HostError(
                    f"image {entry['digest']} ({', '.join(names) or 'no name'}): {entry['file']} is damaged on this host: "
                    f"SHA-256 is {entry['found'] or 'not readable'} instead of {entry['expected']}. Call with the image that "
                    "rootfs_image returned, which sends the file again; microVMs that run on it need a restart"
                )

    def _check_space(self, observed: t.Mapping[str, t.Any]) -> None:
        blobs: dict[str, int] = {}
        for image in self.images:
            if not self._complete(image, observed):
                blobs.update(
                    (image["files"][n]["sha256"], int(image["files"][n]["size_bytes"]))
                    for n in self._missing(image, observed)
                )
        need, free = sum(blobs.values()) + RESERVE_BYTES, free_bytes(self.host.path(STORE))
        if blobs and free < need:
            raise Refused(
                "images", [image["name"] for image in self.images],
                f"need {need >> 20} MiB in {STORE}, which has {free >> 20} MiB free",
                "Free space there, or remove unused images with gc: true",
            )  # fmt: skip

    def _garbage(self, observed: t.Mapping[str, t.Any], steps: t.Sequence[Step]) -> list[Step]:
        """Images that nobody uses, but for the youngest."""
        names = dict(observed["names"])
        for step in steps:
            if step.verb == "unname":
                del names[step.data["name"]]
            elif step.verb == "point":
                names[step.data["name"]] = step.data["digest"]
        used = in_use(self.host, observed["stored"])
        free = [digest for digest in observed["stored"] if digest not in names.values() and digest not in used]
        age = {digest: os.stat(self.host.path(f"{STORE}/{digest}")).st_mtime for digest in free}
        free.sort(key=lambda digest: age[digest], reverse=True)
        now = time.time()
        return [
            Step(
                "remove",
                f"image {digest}",
                before={"size_bytes": observed["stored"][digest]["files"][IMAGE]["size_bytes"]},
                why="no name, definition, snapshot or process uses it",
                data=digest,
            )
            for digest in free[self.keep :]
            if now - age[digest] >= self.keep_seconds
        ]

    # -- apply ---------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step; a failure leaves the store as it was."""
        with self.host.lock("images"):
            getattr(self, f"_apply_{step.verb}")(step.data)

    def _apply_point(self, image: t.Mapping[str, t.Any]) -> None:
        directory = self.host.path(f"{STORE}/names")
        os.makedirs(directory, exist_ok=True)
        new = f"{directory}/.{image['name']}.new"
        self.host.remove(f"{STORE}/names/.{image['name']}.new")
        os.symlink(f"../{image['digest']}", new)
        os.replace(new, f"{directory}/{image['name']}")

    def _apply_unname(self, image: t.Mapping[str, t.Any]) -> None:
        self.host.remove(f"{STORE}/names/{image['name']}")

    def _apply_remove(self, digest: str) -> None:
        names = [f"name {name}" for name, target in named(self.host).items() if target == digest]
        user = (names or [""])[0] or in_use(self.host, [digest]).get(digest)
        if user:  # it was taken into use since the plan was made
            raise HostError(f"image {digest} is in use by {user}. Run again")
        gone = self.host.path(f"{STORE}/.removed-{digest}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(self.host.path(f"{STORE}/{digest}"), gone)
        shutil.rmtree(gone)
        for blob in filter(DIGEST.fullmatch, self.host.names(BLOBS)):
            if os.stat(self.host.path(f"{BLOBS}/{blob}")).st_nlink == 1:
                self.host.remove(f"{BLOBS}/{blob}")

    def _apply_register(self, image: t.Mapping[str, t.Any]) -> None:
        store, digest = self.host.path(STORE), image["digest"]
        os.makedirs(self.host.path(BLOBS), exist_ok=True)
        for name in os.listdir(store):
            if name.startswith((".arriving-", ".removed-")):  # of a run that was killed
                shutil.rmtree(f"{store}/{name}", ignore_errors=True)
        work = tempfile.mkdtemp(prefix=".arriving-", dir=store)
        try:
            os.mkdir(f"{work}/image")
            for name, file in sorted(image["files"].items()):
                self._arrive(image, name, file, work)
                os.link(self.host.path(f"{BLOBS}/{file['sha256']}"), f"{work}/image/{name}")
            self._check_manifest(image, f"{work}/image/{MANIFEST}")
            os.chmod(f"{work}/image", 0o755)
            # A name that is on the disk before what it names is a damaged image after a power cut.
            sync(self.host.path(BLOBS))
            sync(f"{work}/image")
            if os.path.exists(f"{store}/{digest}"):  # it had a damaged file
                os.replace(f"{work}/image/{MANIFEST}", f"{store}/{digest}/{MANIFEST}")
            else:
                os.rename(f"{work}/image", f"{store}/{digest}")
            self._relink({file["sha256"] for file in image["files"].values()}, f"{work}/link")
            sync(f"{store}/{digest}")
            sync(store)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for file in image["files"].values():
            for path in self.host.glob(f"{self.incoming}/{PREFIX}{file['sha256']}.*zst"):
                self.host.remove(path)

    def _relink(self, blobs: t.Collection[str], new: str) -> None:
        """Let all images have these blobs, whichever call brought them; running microVMs keep what they have open."""
        for digest, manifest in stored(self.host).items():
            for name, entry in manifest["files"].items():
                blob, path = (self.host.path(x) for x in (f"{BLOBS}/{entry['sha256']}", image_path(digest, name)))
                if entry["sha256"] in blobs and not (os.path.exists(path) and os.path.samefile(blob, path)):
                    os.link(blob, new)
                    os.replace(new, path)

    def _arrive(self, image: t.Mapping[str, t.Any], name: str, file: t.Mapping[str, t.Any], work: str) -> None:
        """Make a blob of what arrived, verified; nothing did if it is there."""
        digest, blob = file["sha256"], self.host.path(f"{BLOBS}/{file['sha256']}")
        sources = self.host.glob(f"{self.incoming}/{PREFIX}{digest}.*zst")
        if not sources:
            if os.path.exists(blob) and os.path.getsize(blob) == int(file["size_bytes"]):
                return
            raise HostError(
                f"{name} of image {image['name']} did not arrive in {self.incoming}. Send what image_store names in blobs"
            )
        base = re.search(rf"\.from-({DIGEST.pattern})\.zst$", sources[0])
        delta = ["--long=31", f"--patch-from={self.host.path(f'{BLOBS}/{base.group(1)}')}"] if base else []
        new = f"{work}/blob"
        done = self.host.run(
            ["zstd", "-dqf", *delta, self.host.path(sources[0]), "-o", new], timeout_seconds=1800, check=False
        )
        if done.rc:
            if free_bytes(work) < RESERVE_BYTES or "No space left" in done.text:
                raise HostError(
                    f"the file system of {STORE} is full: {name} of image {image['name']} does not fit. The store is as it "
                    "was; free space, or remove unused images with gc: true"
                )
            raise HostError(f"{name} of image {image['name']} arrived damaged ({done.text[:200]}). Send it again")
        found = sha256_of(new)
        if found != digest:
            self.host.remove(sources[0])
            raise HostError(
                f"{name} of image {image['name']} arrived damaged: SHA-256 is {found} instead of {digest}. "
                "Nothing was registered; send it again"
            )
        os.chmod(new, 0o444)
        sync(new)
        os.replace(new, blob)

    @staticmethod
    def _check_manifest(image: t.Mapping[str, t.Any], path: str) -> None:
        """The manifest must be the one of these files."""
        try:
            with open(path, encoding="utf-8") as file:
                told = {name: entry["sha256"] for name, entry in json.load(file)["files"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HostError(
                f"the manifest of {image['digest']} is not readable ({error}). Build the image again"
            ) from error
        if told != {name: file["sha256"] for name, file in image["files"].items() if name != MANIFEST}:
            raise HostError(
                f"the manifest is not that of {image['digest']}. Pass on what rootfs_image returned as store"
            )

    # -- result --------------------------------------------------------------------

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The host's store, and what of the wanted images is not in it."""
        return {
            "images": [
                {
                    "digest": digest,
                    "names": sorted(name for name, target in observed["names"].items() if target == digest),
                    "size_bytes": manifest["files"][IMAGE]["size_bytes"],
                    "kernel_release": manifest["kernel_release"],
                }
                for digest, manifest in sorted(observed["stored"].items())
            ],
            "missing": [image["name"] for image in self.images if self.present and not self._complete(image, observed)],
            "blobs": self._wanted(observed),
            "damaged": observed["damaged"],
        }


def free_bytes(path: str) -> int:
    """Free space of the file system that a path is on, or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
