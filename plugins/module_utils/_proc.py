# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory of a VMM, split by what its mappings are.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host


def memory_of(host: Host, pid: int, image: str) -> dict[str, int]:
    """Bytes of a process: proportional set, shared image pages, private memory.

    ``shared_bytes`` are the image's pages that this process has mapped and that
    the host holds once for all processes; ``private_bytes`` exist because of this process alone
    (guest RAM that was touched, the VMM itself, image pages that the guest wrote).

    :param image: path of the shared image file
    """
    total = {"pss_bytes": 0, "shared_bytes": 0, "private_bytes": 0}
    of_image = False
    for line in host.read(f"/proc/{pid}/smaps").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            of_image = words[5:6] == [image]
            continue
        key, value = words[0], words[1]
        if key == "Pss:":
            total["pss_bytes"] += int(value) * 1024
        # A private file mapping's anonymous pages are its copies on write; other mappings have them in Private_*.
        elif key in (("Anonymous:",) if of_image else ("Private_Clean:", "Private_Dirty:")):
            total["private_bytes"] += int(value) * 1024
        if of_image and key in ("Rss:", "Anonymous:"):
            total["shared_bytes"] += int(value) * (1024 if key == "Rss:" else -1024)
    return total
