# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images on a host: what a guest's root writes to its image stays its own, nothing is sent twice, and garbage is garbage.

The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import shlex
import typing as t

import pytest

STORE = "/var/lib/agentfleet/images"
READY_SECONDS = 600
WRITER, READER = "image-writer", "image-reader"
# Of the image's last MiB nothing is a file's: what is written there disturbs no running program.
BLOCK = 4096
PATTERN = "written by a guest"


class Guests:
    """Two microVMs of one image on the lab's host."""

    def __init__(self, lab: t.Any, host: t.Any) -> None:
        self.lab, self.host = lab, host

    def bring(self, state: str, *names: str, image: str = "agent") -> None:
        """Bring microVMs to a state."""
        self.lab.module(
            "microvm",
            state=state,
            instances=[{"name": name, "image": image, "memory": "192MiB"} for name in names],
            memory_overcommit=2.0,
            ready_timeout_seconds=READY_SECONDS,
        )

    def run(self, name: str, script: str) -> t.Any:
        """Run a script in a microVM as root, over vsock."""
        command = f"/usr/local/lib/agentfleet/microvm-exec --timeout 120 {name} sh -c {shlex.quote(script)}"
        return self.host.run(command)

    def digest(self) -> str:
        """The digest that the name of the image means now."""
        return str(self.host.run(f"basename $(readlink {STORE}/names/agent)").stdout.strip())

    def sum(self) -> str:
        """SHA-256 of the image as the host reads it."""
        return str(self.host.run(f"sha256sum {STORE}/names/agent/rootfs.erofs").stdout.split()[0])


@pytest.fixture(scope="module")
def guests(lab: t.Any, host: t.Any) -> Guests:
    """The microVMs."""
    return Guests(lab, host)


def test_two_guests_run_on_one_image(guests: Guests) -> None:
    guests.lab.succeed("images")
    assert guests.sum() == guests.digest()
    guests.bring("running", WRITER, READER)


def test_a_write_to_the_image_device_stays_with_its_guest(guests: Guests) -> None:
    sectors = int(guests.run(READER, "cat /sys/class/block/pmem0/size").stdout)
    block = sectors * 512 // BLOCK - 1
    read = f"dd if=/dev/pmem0 bs={BLOCK} skip={block} count=1 iflag=direct 2>/dev/null | head -c {len(PATTERN)}"
    guests.run(WRITER, f"printf {shlex.quote(PATTERN)} | dd of=/dev/pmem0 bs={BLOCK} seek={block} conv=sync,fsync")
    # Either the guest sees what it wrote, in memory of its own, or the write was refused or dropped.
    assert guests.run(WRITER, read).stdout.strip("\0") in (PATTERN, "")
    assert PATTERN not in guests.run(READER, read).stdout
    assert guests.sum() == guests.digest()
    assert PATTERN not in guests.host.run(f"tail -c {BLOCK} {STORE}/names/agent/rootfs.erofs").stdout


def test_a_guest_that_ruins_its_file_system_harms_nobody_else(guests: Guests) -> None:
    """The whole superblock and the first megabyte, as root of a guest can do to its own device."""
    before = guests.run(READER, "sha256sum /run/agentfleet/image/usr/bin/dash").stdout
    guests.run(WRITER, "dd if=/dev/zero of=/dev/pmem0 bs=1M count=1 conv=fsync")
    assert guests.sum() == guests.digest()
    assert guests.run(READER, "sha256sum /run/agentfleet/image/usr/bin/dash").stdout == before
    assert guests.lab.module("image_store", verify=True)["damaged"] == []
    guests.bring("restarted", WRITER)  # and it itself is as new
    assert guests.run(WRITER, "head -c 1028 /dev/pmem0 | tail -c 4 | od -An -tx1").stdout.split() == [
        "e2",
        "e1",
        "f5",
        "e0",
    ]


def test_an_image_in_use_is_no_garbage(guests: Guests) -> None:
    digest = guests.digest()
    stored = guests.lab.module("image_store", state="absent", images=[{"name": "agent"}], gc=True)
    assert digest in [image["digest"] for image in stored["images"]]
    assert guests.run(READER, "cat /run/agentfleet/image/usr/bin/dash | wc -c").rc == 0
    again = guests.lab.module("image_store", images=[{"name": "agent", "digest": digest}])
    assert again["missing"] == [] and guests.digest() == digest


def test_a_second_transfer_is_none_and_a_layered_image_a_difference(guests: Guests) -> None:
    extra = {"name": "agent-extra", "base": "agent", "files": [{"path": "/etc/extra", "content": "extra"}]}
    wanted = {"rootfs_images": [{"name": "agent"}, extra]}
    first = guests.lab.succeed("images", **wanted)
    sent = [item for task in first.tasks for item in task.result.get("results", []) if item.get("dest")]
    assert [item for item in sent if ".from-" in item["dest"]], sent
    assert sum(item.get("size", 0) for item in sent if ".from-" in item["dest"]) < 4 << 20
    assert guests.lab.succeed("images", **wanted).changed() == []
    files = guests.host.run(f"stat -c %i {STORE}/names/agent/kernel {STORE}/names/agent-extra/kernel").stdout.split()
    assert files[0] == files[1]
    guests.bring("absent", READER)
    guests.bring("running", READER, image="agent-extra")
    assert guests.run(READER, "cat /etc/extra").stdout == "extra"


def test_damage_is_found_named_and_repaired(guests: Guests) -> None:
    guests.bring("absent", WRITER, READER)
    guests.host.run(f"printf X | dd of={STORE}/names/agent/initrd bs=1 seek=1000 conv=notrunc")
    found = guests.lab.play("images", rootfs_verify=True)
    assert found.rc == 0, found.failures()
    assert "metal1: Send what the host does not have" in found.changed()
    assert guests.lab.module("image_store", verify=True)["damaged"] == []


def test_nothing_is_left(guests: Guests) -> None:
    guests.bring("absent", WRITER, READER)
    guests.lab.module("image_store", state="absent", images=[{"name": "agent-extra"}], gc=True)
    left = guests.host.run(f"ls -A {STORE}; ls /var/tmp").stdout.split()
    assert not [name for name in left if name.startswith((".", "agentfleet-"))]
