# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes and lists are read the same way everywhere."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_list, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), (" 512 MiB ", 512 << 20), ("1.5GiB", 3 << 29), (4096, 4096), ("4096", 4096), ("1B", 1)],
)
def test_sizes(text: t.Any, size: int) -> None:
    assert parse_size("size", text) == size


@pytest.mark.parametrize("text", ["4GB", "4G", "four", "", "-1GiB", "0", True, None, "0.3B"])
def test_what_is_no_size_is_refused(text: t.Any) -> None:
    with pytest.raises(Refused) as refusal:
        parse_size("regions[0].size", text)
    assert refusal.value.option == "regions[0].size" and refusal.value.value == text


def test_misalignment_names_the_nearest_valid_sizes() -> None:
    with pytest.raises(Refused, match="300MiB.*not a multiple of 256MiB.*256MiB and 512MiB"):
        parse_size("size", "300MiB", multiple_of=256 << 20)


@pytest.mark.parametrize(("size", "text"), [(4 << 30, "4GiB"), (3 << 29, "1536MiB"), (1000, "1000B"), (0, "0B")])
def test_sizes_are_shown_exactly(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("text", "numbers"), [("0-2,5", [0, 1, 2, 5]), ("", []), ("3\n", [3])])
def test_kernel_lists(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers
