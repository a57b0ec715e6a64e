# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: built twice the same, on a host once, and what a guest's root writes to its image stays its own.

The tests build on each other: each starts from the state that the one before left.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

STORE = "/var/lib/agentfleet/images"
CACHE = Path("~/.cache/agentfleet/images")
WRITER, READER, LAYERED = "fleet-01", "fleet-02", "image-layered"
# Of the image's last MiB nothing is a file's: what is written there disturbs no running program.
BLOCK = 4096
PATTERN = "written by a guest"
AGENT = {"name": "agent", "kernel_modules": ["nvme"]}  # as in converge.yml
EXTRA = {"name": "agent-extra", "base": "agent", "files": [{"path": "/etc/extra", "content": "extra"}]}
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
    return rootfs_image.build(ArgumentSpecValidator(rootfs_image.ARGUMENTS).validate(wish).validated_parameters, Host())

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
    images = rootfs_image.build(wish, Host())
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
    found = guests.lab.play("images", rootfs_verify=True)
    assert found.rc == 0, found.failures()
    assert "metal1: agentfleet.metal.rootfs : Send what the host does not have" in found.changed()
    assert guests.lab.module("image_store", verify=True)["damaged"] == []


def test_nothing_is_left(guests: Guests) -> None:
    guests.lab.module("image_store", state="absent", images=[{"name": "agent-extra"}], gc=True)
    left = guests.host.run(f"ls -A {STORE}; ls /var/tmp").stdout.split()
    assert not [name for name in left if name.startswith((".", "agentfleet-"))]
