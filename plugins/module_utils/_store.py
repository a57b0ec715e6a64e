# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The content-addressed image store of a host.

This module is private to the collection and imports nothing of Ansible.

``/var/lib/agentfleet/images/<digest>/`` holds an image's files, immutable;
``names/<name>`` is a symbolic link to a digest's directory, switched atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

STORE = "/var/lib/agentfleet/images"
IMAGE, MANIFEST = "rootfs.erofs", "manifest.json"
FILES = {IMAGE, "kernel", "initrd"}
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-f]{64}")


def image_path(digest: str, name: str = IMAGE) -> str:
    """Host path of one file of an image."""
    return f"{STORE}/{digest}/{name}"


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
    return {name: host.link_name(f"{STORE}/names/{name}") for name in host.names(f"{STORE}/names")}


class Store:
    """What ``image_store`` manages: images by digest, and the names that point to them.

    :param params: ``images`` (name, digest), and ``incoming`` where bundles arrive
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.images: list[dict[str, t.Any]] = list(params["images"])
        self.incoming: str | None = params["incoming"]
        names = set()
        for index, image in enumerate(self.images):
            if not NAME.fullmatch(image["name"]):
                raise Refused(
                    f"images[{index}].name", image["name"], "not a name of an image",
                    "Use 1 to 64 of a-z, 0-9, dot and hyphen, beginning and ending with a letter or digit",
                )  # fmt: skip
            if image["name"] in names:
                raise Refused(f"images[{index}].name", image["name"], "named twice", "Point each name to one image")
            names.add(image["name"])
            if image["digest"] and not DIGEST.fullmatch(image["digest"]):
                raise Refused(
                    f"images[{index}].digest", image["digest"], "not a SHA-256 digest", "Give 64 lower-case hex digits"
                )

    def observe(self) -> dict[str, t.Any]:
        """All images and names on the host."""
        return {"stored": stored(self.host), "names": named(self.host)}

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Register what has a bundle, point names to what is there (or will be)."""
        steps = []
        coming = set(observed["stored"])
        for index, image in enumerate(self.images):
            digest = image["digest"]
            if not digest and not self.predicting:
                raise Refused(
                    f"images[{index}].digest", digest, "no digest", "Give the image_digest that rootfs_image returned"
                )
            if (not digest or digest not in coming) and self.incoming:
                coming.add(digest)
                steps.append(Step("register", f"image {image['name']}", after={"digest": digest}, data=image))
            if digest in coming and observed["names"].get(image["name"]) != digest:
                before = observed["names"].get(image["name"])
                steps.append(Step("point", f"name {image['name']}", before=before, after=digest, data=image))
        return steps

    def apply(self, step: Step) -> None:
        """Carry out one step; a failure leaves the store as it was."""
        image = step.data
        if step.verb == "register":
            self._register(image["digest"], f"{self.incoming}/agentfleet-{image['digest']}.tar.zst")
            return
        directory = self.host.path(f"{STORE}/names")
        os.makedirs(directory, exist_ok=True)
        new = f"{directory}/.{image['name']}.new"
        self.host.remove(f"{STORE}/names/.{image['name']}.new")
        os.symlink(f"../{image['digest']}", new)
        os.replace(new, f"{directory}/{image['name']}")

    def _register(self, digest: str, bundle: str) -> None:
        store = self.host.path(STORE)
        os.makedirs(store, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".arriving-", dir=store)
        try:
            self.host.run(
                ["tar", "--use-compress-program=zstd", "-S", "--no-same-owner", "-C", work, "-xf",
                 self.host.path(bundle)],
                timeout_seconds=900,
            )  # fmt: skip
            self._verify(digest, work)
            os.chmod(work, 0o755)
            os.rename(work, f"{store}/{digest}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self.host.remove(bundle)

    @staticmethod
    def _verify(digest: str, work: str) -> None:
        try:
            with open(f"{work}/{MANIFEST}", encoding="utf-8") as file:
                files = json.load(file)["files"]
        except (OSError, ValueError, KeyError) as error:
            raise HostError(
                f"the bundle of {digest} has no readable manifest ({error}). Build and send it again"
            ) from error
        expected = {name: entry["sha256"] for name, entry in files.items()}
        if set(expected) != FILES or set(os.listdir(work)) != FILES | {MANIFEST} or expected[IMAGE] != digest:
            raise HostError(f"the bundle is not that of {digest}. Send the bundle that rootfs_image returned with it")
        for name, wanted in expected.items():
            have = hashlib.sha256()
            with open(f"{work}/{name}", "rb") as data:
                while chunk := data.read(1 << 20):
                    have.update(chunk)
            if have.hexdigest() != wanted:
                raise HostError(
                    f"{name} arrived damaged: SHA-256 is {have.hexdigest()} instead of {wanted}. "
                    "Nothing was registered; send the bundle again"
                )
            os.chmod(f"{work}/{name}", 0o444)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The host's store, and which of the wanted images are not in it."""
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
            "missing": [image["name"] for image in self.images if image["digest"] not in observed["stored"]],
        }
