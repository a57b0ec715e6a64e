# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The split of a VMM's memory, on lines as a real kernel prints them."""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._proc import NOTHING, memory_of

IMAGE = "/var/lib/agentfleet/images/abc/rootfs.erofs"


def mapping(head: str, rss: int, pss: int, private_clean: int, private_dirty: int, anonymous: int) -> str:
    shared = rss - private_clean - private_dirty
    return (
        f"{head}\nSize: 99999 kB\nRss: {rss} kB\nPss: {pss} kB\nPss_Dirty: 0 kB\nShared_Clean: {shared} kB\n"
        f"Shared_Dirty: 0 kB\nPrivate_Clean: {private_clean} kB\nPrivate_Dirty: {private_dirty} kB\n"
        f"Anonymous: {anonymous} kB\nVmFlags: rd wr mr mw me ac sd\n"
    )


def test_split(fake_host: t.Any) -> None:
    smaps = (
        # the image: 1000 pages' KiB shared by two, of which the guest wrote 40
        mapping(f"7f1-7f2 rw-p 00000000 fe:00 1234    {IMAGE}", 1040, 540, 0, 40, 40)
        # guest RAM
        + mapping("7f3000-7f4000 rw-p 00000000 00:00 0", 9000, 9000, 0, 9000, 9000)
        # the program, shared with the other VMM but for its data
        + mapping("55a-55b r-xp 00000000 fe:00 77    /usr/bin/qemu-system-x86_64", 600, 350, 100, 0, 0)
    )
    fake_host.files({"/proc/42/smaps": smaps})
    assert memory_of(fake_host, 42, [IMAGE], [0x1000]) == {
        "rss_bytes": (1040 + 9000 + 600) * 1024,
        "pss_bytes": (540 + 9000 + 350) * 1024,
        "shared_bytes": 1000 * 1024,
        "private_bytes": (40 + 9000 + 100) * 1024,
        "guest_ram_bytes": 9000 * 1024,
        "overhead_bytes": 100 * 1024,
    }


def test_a_memfd_is_guest_ram_also_where_virtiofsd_has_mapped_it(fake_host: t.Any) -> None:
    smaps = mapping("7f3000-7f9000 rw-s 00000000 00:01 5   /memfd:memory-backend-memfd (deleted)", 800, 500, 0, 200, 0)
    fake_host.files({"/proc/42/smaps": smaps})
    found = memory_of(fake_host, 42, [IMAGE])
    assert (found["private_bytes"], found["guest_ram_bytes"], found["pss_bytes"]) == (800 << 10, 800 << 10, 500 << 10)


def test_huge_pages_are_guest_ram(fake_host: t.Any) -> None:
    memfd = mapping("7f3000-7f9000 rw-s 00000000 00:01 5   /memfd:ram0 (deleted)", 0, 0, 0, 0, 0)
    huge = memfd.replace("VmFlags", "Shared_Hugetlb: 2048 kB\nPrivate_Hugetlb: 4096 kB\nVmFlags")
    fake_host.files({"/proc/42/smaps": huge})
    size = 6144 << 10
    assert memory_of(fake_host, 42, [IMAGE]) == {
        **NOTHING, "rss_bytes": size, "pss_bytes": size, "private_bytes": size, "guest_ram_bytes": size,
    }  # fmt: skip


def test_an_image_used_by_one_is_not_private(fake_host: t.Any) -> None:
    fake_host.files({"/proc/42/smaps": mapping(f"7f1-7f2 rw-p 00000000 fe:00 1    {IMAGE}", 500, 500, 500, 0, 0)})
    found = memory_of(fake_host, 42, [IMAGE])
    assert (found["pss_bytes"], found["shared_bytes"], found["private_bytes"]) == (512000, 512000, 0)


def test_images_of_data_are_images(fake_host: t.Any) -> None:
    paths = [IMAGE, "/var/lib/agentfleet/images/def/rootfs.erofs"]
    fake_host.files(
        {
            "/proc/42/smaps": "".join(
                mapping(f"7f1-7f2 r--p 00000000 fe:00 1    {path}", 100, 50, 0, 4, 4) for path in paths
            )
        }
    )
    assert memory_of(fake_host, 42, paths)["shared_bytes"] == 2 * 96 << 10


def test_no_process(fake_host: t.Any) -> None:
    assert memory_of(fake_host, 0, [IMAGE]) == NOTHING
