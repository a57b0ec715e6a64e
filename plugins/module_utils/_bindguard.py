# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let a control group's programs listen on one address, whatever wildcard they ask for.

An engine that binds its data ports to 0.0.0.0 and has no setting for it is reachable from every network of its host. The
kernel lets a small BPF program look at each bind() of a control group; ours replaces a wildcard by the declared address.
The programs belong to the control group and go with it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_SOCK_ADDR, _INET4_BIND, _INET6_BIND, _ALLOW_MULTI = 18, 8, 9, 2
# struct bpf_sock_addr
_IP4, _IP6 = 4, (8, 12, 16, 20)


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhI", code, source << 4 | target, offset, value & 0xFFFFFFFF)


def _load(offset: int) -> bytes:
    return _instruction(0x61, 2, 1, offset)  # r2 = *(u32 *)(context + offset)


def _store(offset: int, value: int) -> bytes:
    return _instruction(0xB4, 3, value=value) + _instruction(0x63, 1, 3, offset)


def program(address: str, family: int) -> bytes:
    """The instructions that replace a wildcard of a family by an IPv4 address (mapped, for IPv6), and allow the rest."""
    (word,) = struct.unpack("<I", socket.inet_aton(address))
    if family == socket.AF_INET:
        look, put = [_IP4], _store(_IP4, word)
    else:
        look, put = list(_IP6), _store(_IP6[2], 0xFFFF0000) + _store(_IP6[3], word)
    # "If this word is not zero, go to the end": two instructions for each word that is still to be looked at.
    size = len(put) // 8
    tests = b"".join(
        _load(offset) + _instruction(0x55, 2, offset=size + 2 * (len(look) - index - 1))
        for index, offset in enumerate(look)
    )
    return tests + put + _instruction(0xB7, 0, value=1) + _instruction(0x95)


def _bpf(command: int, attributes: bytes) -> int:
    number = _BPF.get(platform.machine())
    if number is None:
        raise HostError(f"BPF on {platform.machine()} is not known here. Known: {', '.join(_BPF)}")
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    done = libc.syscall(number, command, buffer, len(attributes))
    if done < 0:
        raise HostError(
            f"the kernel refused the BPF program that keeps the ports off other networks: "
            f"{os.strerror(ctypes.get_errno())}. Needs root and CONFIG_CGROUP_BPF; or set listen_all_addresses: true"
        )
    return int(done)


def own_cgroup() -> str:
    """The directory of this process's control group."""
    with open("/proc/self/cgroup", encoding="ascii") as file:
        for line in file:
            if line.startswith("0::"):
                return "/sys/fs/cgroup" + line[3:].rstrip("\n")
    raise HostError("this host has no unified control groups (cgroup v2). Set listen_all_addresses: true")


def guard(address: str) -> None:
    """Let this process's control group listen on this IPv4 address instead of on all."""
    directory = os.open(own_cgroup(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for family, kind in ((socket.AF_INET, _INET4_BIND), (socket.AF_INET6, _INET6_BIND)):
            code = program(address, family)
            instructions = ctypes.create_string_buffer(code, len(code))
            licence = ctypes.create_string_buffer(b"GPL")
            attributes = struct.pack(
                "<IIQQIIQII16sII",
                _CGROUP_SOCK_ADDR,
                len(code) // 8,
                ctypes.addressof(instructions),
                ctypes.addressof(licence),
                0,
                0,
                0,
                0,
                0,
                b"agentfleet_bind",
                0,
                kind,
            )
            loaded = _bpf(_PROG_LOAD, attributes)
            try:
                _bpf(_PROG_ATTACH, struct.pack("<IIII", directory, loaded, kind, _ALLOW_MULTI))
            finally:
                os.close(loaded)
    finally:
        os.close(directory)
