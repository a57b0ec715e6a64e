# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory of a VMM, split by what its mappings are.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host

NOTHING = dict.fromkeys(
    ("rss_bytes", "pss_bytes", "shared_bytes", "private_bytes", "guest_ram_bytes", "overhead_bytes"), 0
)


def memory_of(host: Host, pid: int, images: t.Collection[str], ram: t.Collection[int] = ()) -> dict[str, int]:
    """Bytes of a process, split.

    ``rss_bytes`` and ``pss_bytes`` are the kernel's resident and proportional sets and, which the kernel leaves out
    of them, huge pages of guest RAM. ``shared_bytes`` are the images' pages that this process has mapped and that the
    host holds once for all processes; ``private_bytes`` exist because of this process alone. Of these,
    ``guest_ram_bytes`` are guest RAM that was touched, ``overhead_bytes`` the VMM itself; the rest are image pages
    that the guest wrote.

    :param images: paths of the shared image files
    :param ram: sizes of the mappings of guest RAM that have no name
    """
    total = dict(NOTHING)
    kind, named = "", ""
    for line in host.read(f"/proc/{pid}/smaps").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, last = (int(number, 16) for number in words[0].split("-"))
            named = words[5] if words[5:] else ""
            kind = "image" if named in images else "ram" if _is_ram(named, last - first, ram) else "other"
            continue
        key, size = words[0], int(words[1]) * 1024 if words[1].isdigit() else 0
        hugetlb = kind == "ram" and key in ("Private_Hugetlb:", "Shared_Hugetlb:")  # shared with its virtiofsd
        total["rss_bytes"] += size if key == "Rss:" or hugetlb else 0
        total["pss_bytes"] += size if key == "Pss:" or hugetlb else 0
        if kind == "image" and key in ("Rss:", "Anonymous:"):
            total["shared_bytes"] += size if key == "Rss:" else -size
        # A private file mapping's anonymous pages are its copies on write. What is in a memfd is of this microVM alone,
        # though its virtiofsd may have mapped it, too. Other mappings have what is their own in Private_*.
        memfd = kind == "ram" and named.startswith("/memfd:")
        own = ("Anonymous:",) if kind == "image" else ("Rss:",) if memfd else ("Private_Clean:", "Private_Dirty:")
        if key in own or hugetlb:
            total["private_bytes"] += size
            total["guest_ram_bytes"] += size if kind == "ram" else 0
            total["overhead_bytes"] += size if kind == "other" else 0
    return total


def _is_ram(name: str, size: int, sizes: t.Collection[int]) -> bool:
    """Guest RAM is a memfd, a file of its own, or memory without a name that is as large as it was asked for."""
    return name.startswith("/memfd:") or (size in sizes and (not name or name.endswith("/ram")))
