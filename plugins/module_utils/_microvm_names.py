# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a microVM is called everywhere: its unit, directories and sockets, and what is derived from its name.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import hashlib
import re

LIBRARY = "/usr/local/lib/agentfleet"
SYSTEM = "/etc/systemd/system"
HOME = "/var/lib/agentfleet/microvms"
SHARES = "/var/lib/agentfleet/shares"
IMAGES = "/var/lib/agentfleet/images"
VOLUMES = "/var/lib/agentfleet/volumes"
RUN = "/run/agentfleet"
SLOTS = f"{RUN}/slots"
# Held by who changes microVMs or snapshots of them, so long that a call can start all of a crowded host.
LOCK, LOCK_SECONDS = "microvms", 1800
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")
RESERVED = ("shares", "slots", "snapshots")  # directories below RUN that all microVMs have in common
WORD = re.compile(r"[a-z0-9][a-z0-9_]{0,31}")


def unit(name: str) -> str:
    """The unit of a microVM."""
    return f"agentfleet-microvm@{name}.service"


def home(name: str) -> str:
    """Where a microVM's definition is."""
    return f"{HOME}/{name}"


def run_directory(name: str) -> str:
    """Where a running microVM has its sockets."""
    return f"{RUN}/{name}"


def running_spec(name: str) -> str:
    """What a microVM was started with, and has been changed to since; not in its directory, which its VMM can write."""
    return f"{RUN}/{name}.spec.json"


def slot(name: str) -> str:
    """There while a microVM boots: a host lets only so many boot at the same time."""
    return f"{SLOTS}/{name}"


def pending(verb: str) -> str:
    """There from when files are written until systemd (``reload``) or the packet filter (``load``) has read them.

    A call can end between the two, and the files do not tell. After a boot everything has been read.
    """
    return f"{RUN}/{verb}.pending"


def cgroup(tenant: str, name: str) -> str:
    """The control group of a running microVM (version 2)."""
    return f"/sys/fs/cgroup/agentfleet.slice/agentfleet-{tenant}.slice/{unit(name)}"


def credentials(name: str) -> str:
    """Where systemd puts the files that a running microVM's VMM alone may read."""
    return f"/run/credentials/{unit(name)}"


def share_socket(name: str, tag: str) -> str:
    """Where virtiofsd serves one share of a microVM."""
    return f"{RUN}/shares/{name}:{tag}"


def volume_path(name: str, volume: str) -> str:
    """The file of one volume of a microVM."""
    return f"{VOLUMES}/{name}/{volume}"


def derived(key: str, purpose: str) -> bytes:
    """Bytes that are the same for one key everywhere and differ between keys."""
    return hashlib.sha256(f"agentfleet {purpose} {key}".encode()).digest()
