# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The BPF program that replaces wildcards, run by a small interpreter of the few instructions that it has."""

from __future__ import annotations

import socket
import struct

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _bindguard


def run(code: bytes, context: bytearray) -> int:
    """Interpret BPF: load and store of 32-bit words, jump if not zero, set a register, end."""
    registers, at = [0] * 4, 0
    while True:
        opcode, both, offset, value = struct.unpack_from("<BBhI", code, 8 * at)
        target, source = both & 15, both >> 4
        at += 1
        if opcode == 0x61 and source == 1:
            (registers[target],) = struct.unpack_from("<I", context, offset)
        elif opcode == 0x63 and target == 1:
            struct.pack_into("<I", context, offset, registers[source])
        elif opcode == 0x55:
            at += offset if registers[target] != value else 0
        elif opcode in (0xB4, 0xB7):
            registers[target] = value
        elif opcode == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"opcode {opcode:#x}")


def bound(family: int, asked: str, guard: str = "10.77.0.11") -> str:
    """The address that a bind() of this address ends at; struct bpf_sock_addr has IPv4 at 4 and IPv6 at 8."""
    context, address = bytearray(40), socket.inet_pton(family, asked)
    offset = 4 if family == socket.AF_INET else 8
    context[offset : offset + len(address)] = address
    assert run(_bindguard.program(guard, family), context) == 1
    return socket.inet_ntop(family, bytes(context[offset : offset + len(address)]))


@pytest.mark.parametrize(
    ("family", "asked", "ends_at"),
    [
        (socket.AF_INET, "0.0.0.0", "10.77.0.11"),
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "10.77.0.12", "10.77.0.12"),
        (socket.AF_INET6, "::", "::ffff:10.77.0.11"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::ffff:0.0.0.0", "::ffff:0.0.0.0"),
        (socket.AF_INET6, "fe80::", "fe80::"),
        (socket.AF_INET6, "0:0:0:1::", "0:0:0:1::"),
    ],
)
def test_only_wildcards_are_replaced(family: int, asked: str, ends_at: str) -> None:
    assert bound(family, asked) == ends_at
