# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks in large files: found again, evicted, resized, and never wrong after a crash."""

from __future__ import annotations

import os
import random
import typing as t
import zlib
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _slab
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

BLOCK = 8192
BLOCKS = {f"k{index}": os.urandom(BLOCK - index) for index in range(4)}


@pytest.fixture
def directory(tmp_path: t.Any) -> str:
    path = str(tmp_path / "slab")
    _slab.make(path, {BLOCK: 4})
    return path


def fill(directory: str) -> None:
    with _slab.Slabs(directory) as slabs:
        for key, data in BLOCKS.items():
            slabs.put(key, data)


def read(directory: str) -> dict[str, bytes | None]:
    with _slab.Slabs(directory) as slabs:
        return {key: slabs.get(key) for key in BLOCKS}


def test_found_again_by_the_next_process(directory: str) -> None:
    fill(directory)
    assert read(directory) == BLOCKS
    assert sorted(os.listdir(directory)) == [f"data-{BLOCK}-0000", f"map-{BLOCK}"]
    assert os.path.getsize(f"{directory}/data-{BLOCK}-0000") == 4 * BLOCK


def test_metadata_operations_do_not_grow_with_blocks(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    with _slab.Slabs(directory) as slabs:
        for name in ("open", "unlink", "rename", "replace", "mkdir", "truncate", "ftruncate", "posix_fallocate"):
            monkeypatch.setattr(os, name, lambda *arguments, name=name: calls.append(name))
        for index in range(1000):
            slabs.put(f"n{index}", b"x" * BLOCK)
            assert slabs.get(f"n{index}") == b"x" * BLOCK
        monkeypatch.undo()
    assert calls == []


def test_the_least_recently_used_goes_first(directory: str) -> None:
    fill(directory)
    with _slab.Slabs(directory) as slabs:
        assert slabs.get("k0") is not None
        slabs.put("new", b"n")
        assert [slabs.get(key) is not None for key in ("k0", "k1", "k2", "k3", "new")] == [
            True,
            False,
            True,
            True,
            True,
        ]
        assert slabs.blocks() == 4


def test_the_smallest_class_that_fits(tmp_path: t.Any) -> None:
    path = str(tmp_path)
    _slab.make(path, {4096: 2, BLOCK: 2})
    with _slab.Slabs(path) as slabs:
        slabs.put("k", b"s" * 4096)
        slabs.put("k", b"l" * 4097)  # the key moves to the other class
        assert slabs.get("k") == b"l" * 4097 and slabs.blocks() == 1
        slabs.remove("k")
        slabs.remove("k")
        assert slabs.get("k") is None and slabs.blocks() == 0
        with pytest.raises(HostError, match="larger than the largest class, 8192"):
            slabs.put("k", b"x" * 8193)


def test_the_newer_of_two_records_counts(directory: str) -> None:
    fill(directory)
    with _slab.Slabs(directory) as slabs:
        slabs.remove("k3")
    before = _record(directory, 0)
    with _slab.Slabs(directory) as slabs:
        slabs.put("k0", b"newer")
    _record(directory, 0, before)  # as if the power had gone before the old record was cleared
    with _slab.Slabs(directory) as slabs:
        assert slabs.get("k0") == b"newer" and slabs.blocks() == 3


def _record(directory: str, slot: int, value: bytes = b"") -> bytes:
    with open(f"{directory}/map-{BLOCK}", "r+b") as file:
        file.seek(slot * 64)
        found = file.read(64)
        if value:
            file.seek(slot * 64)
            file.write(value)
        return found


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_power_cut_leaves_is_right_or_missing(directory: str, seed: int) -> None:
    """Random sectors of map and data are as they were before some overwrites; no key ever reads as something else."""
    chance = random.Random(seed)
    files = [f"{directory}/{name}" for name in sorted(os.listdir(directory))]
    ever: dict[str, set[bytes]] = {}
    with _slab.Slabs(directory) as slabs:
        for _turn in range(12):
            key, data = f"k{chance.randrange(6)}", chance.randbytes(chance.randrange(1, BLOCK))
            slabs.put(key, data)
            ever.setdefault(key, set()).add(data)
    old = {path: Path(path).read_bytes() for path in files}
    with _slab.Slabs(directory) as slabs:
        for _turn in range(12):
            key, data = f"k{chance.randrange(6)}", chance.randbytes(chance.randrange(1, BLOCK))
            slabs.put(key, data)
            ever.setdefault(key, set()).add(data)
    for path in files:
        with open(path, "r+b") as file:
            for offset in range(0, len(old[path]), 512):
                if chance.random() < 0.5:
                    file.seek(offset)
                    file.write(old[path][offset : offset + 512])
    with _slab.Slabs(directory) as slabs:
        for key, values in ever.items():
            found = slabs.get(key)
            assert found is None or found in values
        slabs.put("after", b"works")
        assert slabs.get("after") == b"works"


def test_damage_is_a_miss(directory: str) -> None:
    fill(directory)
    with open(f"{directory}/data-{BLOCK}-0000", "r+b") as file:
        file.write(b"damage")
    found = read(directory)
    assert found["k0"] is None and found["k1"] == BLOCKS["k1"]
    with _slab.Slabs(directory) as slabs:
        assert slabs.blocks() == 3


def test_growth_keeps_and_shrinking_drops_only_the_end(directory: str) -> None:
    fill(directory)
    _slab.make(directory, {BLOCK: 6})
    assert read(directory) == BLOCKS and _slab.present(directory) == {BLOCK: 6}
    _slab.make(directory, {BLOCK: 2})
    found = read(directory)
    assert {key for key, data in found.items() if data} == {"k0", "k1"} and _slab.present(directory) == {BLOCK: 2}
    _slab.make(directory, {4096: 3})
    assert _slab.present(directory) == {4096: 3}
    assert sorted(os.listdir(directory)) == ["data-4096-0000", "map-4096"]


def test_more_than_one_data_file(tmp_path: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slab, "FILE_BYTES", 3 * BLOCK)
    path = str(tmp_path)
    _slab.make(path, {BLOCK: 4})
    _slab.make(path, {BLOCK: 4})
    fill(path)
    assert read(path) == BLOCKS
    assert [os.path.getsize(f"{path}/data-{BLOCK}-{index:04}") for index in (0, 1)] == [3 * BLOCK, BLOCK]


def test_one_process_at_a_time(directory: str) -> None:
    with _slab.Slabs(directory), pytest.raises(HostError, match="in use by another process"):
        _slab.make(directory, {BLOCK: 8})
    with pytest.raises(HostError, match="has no slabs"):
        _slab.Slabs(os.path.dirname(directory))


def test_shares_of_the_classes() -> None:
    slots = _slab.layout(1 << 30, [4096, 1 << 20])
    assert set(slots) == {4096, 1 << 20}
    for size, number in slots.items():
        assert (1 << 29) - (size + 64) < number * (size + 64) <= 1 << 29


def test_the_record_fills_no_more_than_its_place() -> None:
    assert _slab._RECORD.size == 64
    assert zlib.crc32(b"") == 0  # so that an empty record is not mistaken for a valid one, it is compared as a whole
