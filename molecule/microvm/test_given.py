# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest has of its host, the same on every driver: directories, memory of chosen nodes, and a PCI function.

The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import re
import typing as t

import pytest

AWAKE: tuple[str, ...] = ()
MIB = 1 << 20
NVME = "1b36:0010"  # the drive of the lab's host that nobody uses
DRAM, SLOW, CXL = 0, 1, 2  # its NUMA nodes; those but the first have no CPU
FIRST, SECOND = 128 * MIB, 32 * MIB
MODELS = {"tag": "models", "source": "/srv/given/models"}
SCRATCH = {"tag": "scratch", "source": "/srv/given/scratch", "readonly": False}
REGION = {"type": "ram", "memdevs": ["0x1", "0x2"]}
WEIGHTS = {"image": "weights", "target": "/opt/weights"}  # of converge.yml
VECTORS = {"image": "vectors", "target": "/opt/vectors"}
LATER = {"tag": "later", "source": "/srv/given/later"}
HUGEPAGES = f"/sys/devices/system/node/node{DRAM}/hugepages/hugepages-2048kB"  # of other nodes none are wanted


class Given:
    """The microVM of one driver."""

    def __init__(self, microvms: t.Any, driver: str) -> None:
        self.microvms, self.host = microvms, microvms.host
        self.driver, self.name = driver, f"given-{driver.replace('_', '-')}"
        self.before = microvms.left()
        self.wish: dict[str, t.Any] = {
            "name": self.name,
            "driver": driver,
            "image": "agent",
            "hotplug_slots": 2,
            "free_page_reporting": False,  # so that QEMU makes no balloon, which PCI functions do not bear
            "thp": True,
        }

    def bring(self, **changes: t.Any) -> t.Any:
        """Declare it, with changes that stay."""
        self.wish.update(changes)
        (made,) = self.microvms.bring(self.wish, allow_restart=True)["instances"]
        return made

    def inside(self, command: str) -> str:
        """Run a command in it."""
        return str(self.microvms.inside(self.name, command))

    def pages(self) -> dict[int, dict[int, int]]:
        """Node that memory of its VMM is bound to -> node that pages of it are on -> bytes."""
        (one,) = self.microvms.look(self.name).values()
        found: dict[int, dict[int, int]] = {}
        for line in self.host.check_output(f"cat /proc/{one['pid']}/numa_maps").splitlines():
            bound = re.search(r" bind(?:=static|=relative)?:(\d+) ", line)
            size = int((re.search(r"kernelpagesize_kB=(\d+)", line) or ["", "4"])[1]) << 10
            for node, pages in re.findall(r" N(\d+)=(\d+)", line) if bound else ():
                there = found.setdefault(int(bound[1]), {})
                there[int(node)] = there.get(int(node), 0) + int(pages) * size
        return found


@pytest.fixture(scope="module")
def given(driver: str, microvms: t.Any) -> Given:
    """The microVM of one driver, with its directories on the host."""
    microvms.host.check_output(
        "mkdir -p /srv/given/models /srv/given/scratch /srv/given/later && "
        "echo weights >/srv/given/models/model && echo more >/srv/given/later/model && chmod 777 /srv/given/scratch"
    )
    return Given(microvms, driver)


def test_shares_are_read_and_only_written_where_they_may_be(given: Given) -> None:
    given.bring(shares=[MODELS, SCRATCH], memory="192MiB")
    assert given.inside("cat /mnt/models/model") == "weights\n"
    # The guest's root can mount as it likes; what refuses is on the host.
    remount = "from ctypes import CDLL; print(CDLL(None).mount(None, b'/mnt/models', None, 32, None))"
    assert given.inside(f'python3 -c "{remount}"; grep -c "/mnt/models virtiofs rw" /proc/mounts') == "0\n1\n"
    refused = given.microvms.run(given.name, "echo forged >/mnt/models/model")
    assert refused.rc != 0 and "Read-only file system" in refused.stderr
    given.inside("echo made >/mnt/scratch/file && sync")
    assert given.host.check_output("cat /srv/given/models/model /srv/given/scratch/file") == "weights\nmade"


def test_a_share_comes_and_goes_while_it_runs(given: Given) -> None:
    (before,) = given.microvms.look(given.name).values()
    given.bring(shares=[MODELS, SCRATCH, LATER])
    assert given.inside("cat /mnt/later/model") == "more\n"
    given.bring(shares=[MODELS, SCRATCH])
    assert given.inside("grep -c /mnt/later /proc/mounts || true") == "0\n"
    (after,) = given.microvms.look(given.name).values()
    assert after["ready"] and after["pid"] == before["pid"]


def test_the_image_is_mapped_and_not_cached(given: Given) -> None:
    """What a guest reads of its image is in the host's memory once, and not in the guest's page cache."""
    cached = "awk '/^Cached:/ {print $2}' /proc/meminfo"
    before = int(given.inside(f"echo 3 >/proc/sys/vm/drop_caches; {cached}"))
    read = int(given.inside("cat /usr/lib/x86_64-linux-gnu/*.so* | wc -c")) >> 10
    assert int(given.inside(cached)) - before < read / 8


def test_images_of_data_are_mapped_beside_the_root(given: Given) -> None:
    given.bring(data_images=[WEIGHTS])
    (before,) = given.microvms.look(given.name).values()
    given.bring(data_images=[WEIGHTS, VECTORS])  # while it runs
    assert given.inside("cat /opt/weights/model /opt/vectors/index") == "weights of a modelvectors of a corpus"
    assert given.inside("grep -c '^/dev/pmem.* /opt/.* erofs .*dax=always' /proc/mounts") == "2\n"
    assert given.microvms.run(given.name, "echo forged >/opt/weights/model").rc != 0
    (after,) = given.microvms.look(given.name).values()
    assert after["ready"] and after["pid"] == before["pid"]
    gone = given.bring(data_images=[])
    assert given.inside("grep -c /opt/ /proc/mounts || true") == "0\n"
    assert (gone["pid"] == after["pid"]) == (given.driver == "cloud_hypervisor")  # QEMU takes none away while it runs


def test_memory_is_where_its_zones_are_bound_to(given: Given) -> None:
    module = given.microvms.lab.module
    module("cxl_region", regions=[REGION], leave_offline=True, persist=False)
    module("dax_device", devices=[{"region": REGION, "mode": "system-ram", "online": "movable"}], persist=False)
    zones = [{"size": f"{FIRST // MIB}MiB", "numa_node": DRAM}, {"size": f"{SECOND // MIB}MiB", "numa_node": SLOW}]
    given.wish.pop("memory")
    given.bring(shares=[], memory_zones=[*zones, {"size": f"{SECOND // MIB}MiB", "numa_node": CXL}])
    assert given.inside("cat /sys/devices/system/node/has_memory") == "0-2\n"
    assert given.inside("cat /sys/devices/system/node/has_cpu") == "0\n"
    pages = given.pages()
    assert {node: set(there) for node, there in pages.items()} == {node: {node} for node in (DRAM, SLOW, CXL)}
    assert pages[DRAM][DRAM] <= FIRST and 0 < pages[SLOW][SLOW] <= SECOND and 0 < pages[CXL][CXL] <= SECOND


def test_memory_goes_back_with_its_region_and_is_of_huge_pages(given: Given) -> None:
    pages = FIRST // (2 * MIB)
    reserved = given.host.check_output(f"echo {pages} >{HUGEPAGES}/nr_hugepages; cat {HUGEPAGES}/nr_hugepages")
    assert int(reserved) == pages
    given.bring(memory_zones=[], memory=f"{FIRST // MIB}MiB", hugepages="2MiB")
    taken = pages - int(given.host.check_output(f"cat {HUGEPAGES}/free_hugepages"))
    (one,) = given.microvms.look(given.name).values()
    assert one["ready"] and one["guest_ram_bytes"] >= taken * 2 * MIB > 32 * MIB  # it may have touched more since
    given.microvms.lab.module("cxl_region", regions=[{**REGION, "state": "absent"}], persist=False)
    assert given.host.check_output("cat /sys/devices/system/node/has_memory") == "0-1"


def test_a_pci_function_is_the_guests_and_comes_back(given: Given) -> None:
    wish = {"vendor_device": NVME, "count": 1}
    (function,) = given.microvms.lab.module("vfio_bind", functions=[wish])["functions"]
    (node,) = function["nodes"]
    (before,) = given.microvms.look(given.name).values()
    after = given.bring(devices=[function["address"]])
    assert (after["pid"] == before["pid"]) == (given.driver == "qemu")  # Cloud Hypervisor starts with the first one
    assert given.host.check_output(f"stat -c %u {node}") != "0"
    # All of its memory is pinned for the function's DMA: what is written went there and what is read came back.
    disk = "/dev/nvme0n1"
    given.inside(f"i=0; until [ -b {disk} ]; do i=$((i + 1)); [ $i -lt 120 ]; sleep 0.5; done")
    written = given.inside(
        f"head -c 1M /dev/urandom >/tmp/w && dd if=/tmp/w of={disk} bs=64k oflag=direct status=none && sha256sum </tmp/w"
    )
    assert given.inside(f"dd if={disk} bs=64k count=16 iflag=direct status=none | sha256sum") == written
    assert given.bring(devices=[])["pid"] == after["pid"]
    assert given.host.check_output(f"stat -c %u {node}") == "0"
    unbound = {"address": function["address"], "state": "unbound"}
    given.microvms.lab.module("vfio_bind", functions=[unbound])
    sum_there = given.host.check_output("dd if=/dev/nvme0n1 bs=64k count=16 iflag=direct status=none | sha256sum")
    assert sum_there == written.strip()


def test_nothing_is_left(given: Given) -> None:
    given.microvms.bring({"name": given.name}, state="absent")
    given.host.check_output(f"echo 0 >{HUGEPAGES}/nr_hugepages")
    left = given.microvms.left() - given.before
    # The unit that binds functions again at boot is the host's, and stays enabled.
    assert {line for line in left if not line.endswith("/agentfleet-restore.service")} == set()
    given.host.check_output("rm -r /srv/given")
