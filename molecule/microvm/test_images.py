# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: built twice the same, on a host once, and what a guest's root writes to its image stays its own.

The tests build on each other: each starts from the state that the one before left.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import typing as t
from pathlib import Path

import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

AWAKE = ("fleet-01", "fleet-02", "fleet-03")
STORE = "/var/lib/agentfleet/images"
CACHE = Path("~/.cache/agentfleet/images")
WRITER, READER, LAYERED = "fleet-01", "fleet-02", "image-layered"
# Of the image's last MiB nothing is a file's: what is written there disturbs no running program.
BLOCK = 4096
PATTERN = "written by a guest"
AGENT = {"name": "agent", "kernel_modules": ["nvme"]}  # as in converge.yml
EXTRA = {"name": "agent-extra", "base": "agent", "files": [{"path": "/etc/extra", "content": "extra"}]}
VERIFIED = {"name": "agent-verified", "base": "agent", "dax": False, "verity": True}
EXT4 = {"name": "agent-ext4", "base": "agent", "filesystem": "ext4"}
# The verified image's first block, which is cached nowhere since its file system was mounted, read past the cache.
DAMAGED = (
    "dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync 2>/dev/null; "
    "dd if=/dev/dm-0 of=/dev/null bs=4096 count=1 iflag=direct"
)
# A file system of its own for this process alone, too small for a build, that has one image of a cache.
ON_A_FULL_DISK = """
set -e
mount -t tmpfs -o size="$2" none "$1"
(cd "$3" && cp -r --parents $4 "$1")
shift 4
exec "$@"
"""
# On that file system: a build, and then what there is of the old image.
BUILD = """
import hashlib, json, subprocess, sys
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.agentfleet.metal.plugins.modules import rootfs_image
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

def images(**wish):
    return rootfs_image.Images(Host(), ArgumentSpecValidator(rootfs_image.ARGUMENTS).validate(wish).validated_parameters)

wish = json.loads(sys.argv[1])
try:
    builds = images(refresh=True, **wish)
    builds.plan(builds.observe())
    told = ""
except Refused as error:
    told = str(error)
kept = images(**wish)
seen = kept.observe()
(image,) = kept.result(seen)["store"]
digests = {}
for name, file in image["files"].items():
    plain = subprocess.run(["zstd", "-dcq", f"{wish['cache']}/blobs/{file['sha256']}.zst"], capture_output=True, check=True).stdout
    digests[name] = hashlib.sha256(plain).hexdigest() == file["sha256"]
print(json.dumps({"told": told, "plan": len(kept.plan(seen)), "digests": digests}))
"""


class Guests:
    """Two microVMs of one image on the lab's host."""

    def __init__(self, lab: t.Any, host: t.Any, microvms: t.Any, sixteen: t.Any) -> None:
        self.lab, self.host, self.microvms, self.sixteen = lab, host, microvms, sixteen
        self.agent = {
            **AGENT,
            "directories": [{"path": "/usr/lib/agentfleet", "src": str(lab.root / "roles/rootfs/files")}],
        }

    def bring(self, state: str, name: str, image: str = "agent") -> None:
        """Bring a microVM to a state."""
        wish = {"name": name, "image": image, "memory": "112MiB", "thp": True, "networks": [{"network": "fleet"}]}
        self.microvms.bring(wish, state=state, networks=self.sixteen.networks)

    def digest(self) -> str:
        """The digest that the name of the image means now."""
        return str(self.host.run(f"basename $(readlink {STORE}/names/agent)").stdout.strip())

    def sum(self) -> str:
        """SHA-256 of the image as the host reads it."""
        return str(self.host.run(f"sha256sum {STORE}/names/agent/rootfs.erofs").stdout.split()[0])


def write_oci_archive(path: Path, layers: list[Path]) -> None:
    """An OCI image as an archive.

    :param layers: of a cache of images, compressed; their names begin with the SHA-256 of their content
    """
    with tarfile.open(path, "w") as archive:

        def add(data: bytes, kind: str, name: str = "") -> dict[str, t.Any]:
            digest = hashlib.sha256(data).hexdigest()
            entry = tarfile.TarInfo(name or f"blobs/sha256/{digest}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
            media = f"application/vnd.oci.image.{kind}"
            return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

        def document(kind: str, **content: t.Any) -> dict[str, t.Any]:
            return add(json.dumps(content).encode(), kind)

        digests = [f"sha256:{layer.name.partition('.')[0]}" for layer in layers]
        filesystem = {"type": "layers", "diff_ids": digests}
        config = document("config.v1+json", architecture="amd64", os="linux", rootfs=filesystem)
        described = [add(layer.read_bytes(), "layer.v1.tar+zstd") for layer in layers]
        manifest = document("manifest.v1+json", schemaVersion=2, config=config, layers=described)
        add(json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode(), "index.v1+json", "index.json")
        add(json.dumps({"imageLayoutVersion": "1.0.0"}).encode(), "layout", "oci-layout")


@pytest.fixture(scope="module")
def guests(lab: t.Any, host: t.Any, microvms: t.Any, sixteen: t.Any) -> Guests:
    """The microVMs."""
    return Guests(lab, host, microvms, sixteen)


def test_two_builds_in_two_directories_are_identical_bit_for_bit(guests: Guests) -> None:
    """One digest stands for image, kernel and initramfs."""
    cache = str(guests.lab.directory / "images")
    shutil.rmtree(cache, ignore_errors=True)  # of an earlier run on a lab that was kept
    agent, extra = guests.lab.module("rootfs_image", on="localhost", cache=cache, images=[guests.agent, EXTRA])[
        "images"
    ]
    assert agent["image_digest"] == guests.digest() == guests.sum() != extra["image_digest"]


def test_a_build_with_nothing_to_do_takes_less_than_a_second(guests: Guests) -> None:
    from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
    from ansible_collections.agentfleet.metal.plugins.modules import rootfs_image

    wish = ArgumentSpecValidator(rootfs_image.ARGUMENTS).validate({"images": [guests.agent]}).validated_parameters
    start = time.process_time()  # of this process, since others use this machine, too
    images = rootfs_image.Images(Host(), wish)
    observed = images.observe()
    assert images.plan(observed) == [] and images.result(observed)["images"][0]["image_digest"] == guests.digest()
    assert time.process_time() - start < 1
    assert not guests.lab.module("rootfs_image", on="localhost", images=[guests.agent])["changed"]


def test_a_build_on_a_full_disk_leaves_the_old_image_usable(guests: Guests) -> None:
    cache, small = CACHE.expanduser(), guests.lab.directory / "full"
    small.mkdir(exist_ok=True)
    told = guests.lab.module("rootfs_image", on="localhost", images=[guests.agent])
    manifest = f"{told['images'][0]['definition_digest']}/manifest.json"
    layers = json.loads((cache / manifest).read_text())["layers"]
    files = [
        manifest, *(f"blobs/{file['sha256']}.zst" for file in told["store"][0]["files"].values()),
        *(f"layers/{layer}.tar.zst" for layer in layers),
    ]  # fmt: skip
    size = 2 * sum((cache / file).stat().st_size for file in files)
    wish = json.dumps({"cache": str(small), "images": [guests.agent]})
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_A_FULL_DISK, "sh", str(small), str(size), str(cache),
         " ".join(files), sys.executable, "-c", BUILD, wish],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(guests.lab.root / "build/collections")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert f"cache: '{small}': has " in seen["told"] and "Free space there" in seen["told"], seen["told"]
    assert seen["plan"] == 0 and set(seen["digests"]) == {"rootfs.erofs", "kernel", "initrd", "manifest.json"}
    assert all(seen["digests"].values())


def test_a_write_to_the_image_device_stays_with_its_guest(guests: Guests, microvms: t.Any) -> None:
    sectors = int(microvms.inside(READER, "cat /sys/class/block/pmem0/size"))
    block = sectors * 512 // BLOCK - 1
    read = f"dd if=/dev/pmem0 bs={BLOCK} skip={block} count=1 iflag=direct 2>/dev/null | head -c {len(PATTERN)}"
    microvms.run(WRITER, f"printf {shlex.quote(PATTERN)} | dd of=/dev/pmem0 bs={BLOCK} seek={block} conv=sync,fsync")
    # Either the guest sees what it wrote, in memory of its own, or the write was refused or dropped.
    assert microvms.inside(WRITER, read).strip("\0") in (PATTERN, "")
    assert PATTERN not in microvms.inside(READER, read)
    assert guests.sum() == guests.digest()
    assert PATTERN not in guests.host.run(f"tail -c {BLOCK} {STORE}/names/agent/rootfs.erofs").stdout


def test_a_guest_that_ruins_its_file_system_harms_nobody_else(guests: Guests, microvms: t.Any) -> None:
    """The whole superblock and the first megabyte, as root of a guest can do to its own device."""
    look = "sha256sum /run/agentfleet/image/usr/bin/dash"
    before = microvms.inside(READER, look)
    microvms.run(WRITER, "dd if=/dev/zero of=/dev/pmem0 bs=1M count=1 conv=fsync")
    assert guests.sum() == guests.digest()
    assert microvms.inside(READER, look) == before
    assert guests.lab.module("image_store", verify=True)["damaged"] == []
    guests.bring("restarted", WRITER)  # and it itself is as new
    magic = microvms.inside(WRITER, "head -c 1028 /dev/pmem0 | tail -c 4 | od -An -tx1")
    assert magic.split() == ["e2", "e1", "f5", "e0"]


def test_an_image_in_use_is_no_garbage(guests: Guests, microvms: t.Any) -> None:
    digest = guests.digest()
    stored = guests.lab.module("image_store", state="absent", images=[{"name": "agent"}], gc=True)
    assert digest in [image["digest"] for image in stored["images"]]
    assert int(microvms.inside(READER, "cat /run/agentfleet/image/usr/bin/dash | wc -c")) > 0
    again = guests.lab.module("image_store", images=[{"name": "agent", "digest": digest}])
    assert again["missing"] == [] and guests.digest() == digest


def test_a_second_transfer_is_none_and_a_layered_image_a_difference(guests: Guests, microvms: t.Any) -> None:
    wanted = {"rootfs_images": [AGENT, EXTRA], "rootfs_cache": str(guests.lab.directory / "images")}
    first = guests.lab.succeed("images", **wanted)
    sent = [item for task in first.tasks for item in task.result.get("results", []) if item.get("dest")]
    assert [item for item in sent if ".from-" in item["dest"]], sent
    assert sum(item.get("size", 0) for item in sent if ".from-" in item["dest"]) < 4 << 20
    assert guests.lab.succeed("images", **wanted).changed() == []
    files = guests.host.run(f"stat -c %i {STORE}/names/agent/kernel {STORE}/names/agent-extra/kernel").stdout.split()
    assert files[0] == files[1]
    guests.bring("running", LAYERED, image="agent-extra")
    assert microvms.inside(LAYERED, "cat /etc/extra") == "extra"
    guests.bring("absent", LAYERED)


def test_damage_is_found_named_and_repaired(guests: Guests) -> None:
    guests.host.run(f"printf X | dd of={STORE}/names/agent/initrd bs=1 seek=1000 conv=notrunc")
    digest = guests.digest()
    found = guests.lab.succeed("images", rootfs_images=[AGENT], rootfs_verify=True)
    assert "metal1: agentfleet.metal.rootfs : Send what the host does not have" in found.changed()
    assert guests.lab.module("image_store", verify=True)["damaged"] == [] and guests.digest() == digest


def test_a_verified_image_one_of_ext4_and_one_of_an_oci_archive_boot(guests: Guests, microvms: t.Any) -> None:
    """All of the agent's packages, which the cache has."""
    cache, archive = guests.lab.directory / "images", guests.lab.directory / "agent.oci.tar"
    (agent,) = guests.lab.module("rootfs_image", on="localhost", cache=str(cache), images=[guests.agent])["images"]
    layers = json.loads((cache / agent["definition_digest"] / "manifest.json").read_text())["layers"]
    write_oci_archive(archive, [cache / f"layers/{layer}.tar.zst" for layer in layers])
    unpacked = {"name": "agent-oci", "oci": {"path": str(archive)}}
    guests.lab.succeed("images", rootfs_images=[AGENT, VERIFIED, EXT4, unpacked], rootfs_cache=str(cache))
    names = {image: f"image-{image}" for image in ("agent-verified", "agent-ext4", "agent-oci")}
    microvms.bring(*({"name": name, "image": image, "memory": "160MiB", "thp": True} for image, name in names.items()))
    seen = microvms.look(*names.values())
    verified, of_ext4, of_archive = (seen[name] for name in names.values())
    for mapped in (of_archive, of_ext4):
        assert mapped["ready"] and mapped["agent"]["dax"] and mapped["image_digest"] != guests.digest()
    assert verified["ready"] and not verified["agent"]["dax"]
    mounted = "awk '$2 == \"/run/agentfleet/image\" {print $1, $3}' /proc/mounts"
    assert microvms.inside(of_ext4["name"], mounted) == "/dev/pmem0 ext4\n"
    of_mapper = microvms.inside(verified["name"], f"{mounted}; cat /sys/block/dm-0/dm/name")
    assert of_mapper == "/dev/dm-0 erofs\nagentfleet-image\n"
    refused = microvms.run(verified["name"], DAMAGED)
    assert refused.rc != 0 and "Input/output error" in refused.stderr, refused
    microvms.bring(*({"name": name} for name in names.values()), state="absent")


def test_nothing_is_left(guests: Guests) -> None:
    gone = [{"name": name} for name in ("agent-extra", "agent-verified", "agent-ext4", "agent-oci")]
    guests.lab.module("image_store", state="absent", images=gone, gc=True)
    left = guests.host.run(f"ls -A {STORE}; ls /var/tmp").stdout.split()
    assert not [name for name in left if name.startswith((".", "agentfleet-"))]
