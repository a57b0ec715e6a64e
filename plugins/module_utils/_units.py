# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Human sizes and number lists, parsed in one place."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

_FACTORS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGTP]iB|B|)\s*$")


def parse_size(option: str, value: t.Any, multiple_of: int = 1) -> int:
    """Bytes of a human size such as ``4GiB``, ``512MiB`` or a plain number of bytes.

    Decimal units (``GB``) are refused, since memory and its alignment are binary.

    :param option: the option's name for the error
    :param multiple_of: alignment in bytes that the size must have
    :raises Refused: not a size, not positive, or not aligned
    """
    match = None if isinstance(value, bool) else _SIZE.match(str(value))
    if match is None:
        raise Refused(option, value, "not a size", "Write a number with B, KiB, MiB, GiB, TiB or PiB, such as 512MiB")
    size = float(match.group(1)) * _FACTORS[match.group(2)]
    if size <= 0 or size != int(size):
        raise Refused(option, value, "not a positive whole number of bytes", "Write a size such as 512MiB")
    if int(size) % multiple_of:
        raise Refused(
            option,
            value,
            f"not a multiple of {format_size(multiple_of)}",
            f"The nearest valid sizes are {format_size(int(size) // multiple_of * multiple_of)} "
            f"and {format_size((int(size) // multiple_of + 1) * multiple_of)}",
        )
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact human size (1073741824 -> ``1GiB``)."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if size and size % _FACTORS[unit] == 0:
            return f"{size // _FACTORS[unit]}{unit}"
    return f"{size}B"


def parse_list(text: str) -> list[int]:
    """The kernel's list format: ``0-2,5`` -> [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _dash, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
