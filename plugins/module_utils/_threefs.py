# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What all parts of a 3FS cluster share: names, places, ids, tokens."""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size

ETC = "/etc/3fs"
LOGS = "/var/log/3fs"
STATE = "/var/lib/3fs"
PROGRAMS = {
    "mgmtd": "mgmtd_main",
    "meta": "meta_main",
    "storage": "storage_main",
    "fuse": "hf3fs_fuse_main",
    "monitor": "monitor_collector_main",
}
SERVICES = tuple(PROGRAMS)
# Those whose main configuration mgmtd keeps and hands out, and their names in admin_cli.
MANAGED = {"mgmtd": "MGMTD", "meta": "META", "storage": "STORAGE", "fuse": "FUSE"}
CHUNKS = (64 << 10, 64 << 20)  # the sizes of blocks that the chunk engine has, in powers of two
_CLUSTER = re.compile(r"^[a-z0-9][a-z0-9_]{0,30}$")
_TOKEN_ORDER = (12, 6, 0, 13, 7, 1, 14, 8, 2, 15, 9, 3, 16, 10, 4, 17, 11, 5)
_TOKEN_MAGIC = 0xF1DB


def check_cluster(value: t.Any, option: str = "cluster") -> str:
    """A cluster's name, which becomes part of paths and unit names."""
    if not _CLUSTER.match(str(value)):
        raise Refused(option, value, "not a name for a cluster", "Use a-z, 0-9 and _, at most 31, such as stage")
    return str(value)


def chunk_size(option: str, value: t.Any) -> int:
    """Bytes of a chunk: meta takes powers of two only, and the chunk engine has blocks of some of them."""
    size = parse_size(option, value)
    low, high = CHUNKS
    if not low <= size <= high or size & (size - 1):
        raise Refused(option, value, "3FS has no chunks of this size", "Use a power of two from 64KiB to 64MiB")
    return size


def unit_name(cluster: str, service: str) -> str:
    """The unit of one service of one cluster."""
    return f"threefs-{cluster}-{service}.service"


def description_path(cluster: str) -> str:
    """The file that tells the other modules what this host has of the cluster."""
    return f"{ETC}/{cluster}/cluster.json"


def describe(host: Host, cluster: str) -> dict[str, t.Any] | None:
    """What this host has of the cluster; None when it has nothing."""
    text = host.read(description_path(cluster))
    return t.cast("dict[str, t.Any]", json.loads(text)) if text else None


def encode_token(uid: int, number: int) -> str:
    """A token in the form that 3FS accepts for a uid, from a secret 64-bit number."""
    plain = struct.pack("<HIQ", _TOKEN_MAGIC, uid, number)
    plain += struct.pack("<I", binascii.crc32(plain, 0xFFFFFFFF) ^ 0xFFFFFFFF)
    shuffled = bytearray(18)
    for index, place in enumerate(_TOKEN_ORDER):
        shuffled[place] = plain[index]
    return base64.b64encode(bytes(shuffled)).decode()


def token_uid(token: str) -> int | None:
    """The uid that a token is for; None when 3FS would not accept it."""
    try:
        raw = base64.b64decode(token, validate=True)
        plain = bytes(raw[place] for place in _TOKEN_ORDER) if len(raw) == 18 else b""
        magic, uid, _number, crc = struct.unpack("<HIQI", plain)
    except (binascii.Error, ValueError, struct.error):
        return None
    good = magic == _TOKEN_MAGIC and crc == binascii.crc32(plain[:14], 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(uid) if good else None


def check_token(option: str, token: str, uid: int | None = None) -> str:
    """A token that 3FS will accept; the refusal never shows it."""
    found = token_uid(token)
    if found is None:
        raise Refused(
            option, "(hidden)", "not a token of 3FS", "Make one with the filter agentfleet.metal.threefs_token"
        )
    if uid is not None and found != uid:
        raise Refused(
            option, "(hidden)", f"a token of uid {found}, not of {uid}", "Make one for this uid with threefs_token"
        )
    return token


def target_place(target: int) -> tuple[int, int]:
    """(node id, disk index) that a target's id tells (upstream's formula)."""
    return target // 100000 % 1000000, target // 100 % 1000 - 1
