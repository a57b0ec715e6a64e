# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks in few large files: a shared file system then sees reads and writes, and no file is made or removed for a block.

Each size class has data files of at most ``FILE_BYTES`` and one map with a record of 64 bytes for each slot, so that a
record never crosses a sector. No order of writes is needed for safety: a record carries its own checksum and that of its
data, so that whatever a power cut leaves half-written is a miss, and never another block's bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import typing as t
import zlib
from collections import OrderedDict

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

FILE_BYTES = 64 << 30
ALIGNMENT = 4096
_RECORD = struct.Struct("<16sQII28xI")  # digest of the key, sequence, length and checksum of the data, own checksum
_EMPTY = bytes(_RECORD.size)
_MAP = re.compile(r"^map-(\d+)$")


def _stride(block_bytes: int) -> int:
    return -(-block_bytes // ALIGNMENT) * ALIGNMENT


def layout(capacity: int, block_sizes: t.Sequence[int]) -> dict[int, int]:
    """Block size -> slots; each size gets the same share of the bytes."""
    return {size: capacity // len(block_sizes) // (_stride(size) + _RECORD.size) for size in block_sizes}


def present(directory: str) -> dict[int, int]:
    """Block size -> slots of what is there; nothing where no slab was made."""
    found = {}
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        match = _MAP.match(name)
        if match:
            found[int(match[1])] = os.path.getsize(os.path.join(directory, name)) // _RECORD.size
    return found


def make(directory: str, wanted: t.Mapping[int, int]) -> None:
    """Make, grow or shrink the files; safe to repeat after any interruption.

    Blocks in slots that go away are dropped: it is a cache. A map is made after its data files and shrunk before them.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with _locked(directory):
        for size in sorted({*wanted, *present(directory)}):
            slots, path = wanted.get(size, 0), os.path.join(directory, f"map-{size}")
            if slots < present(directory).get(size, 0):
                os.truncate(path, slots * _RECORD.size)
            _data_files(directory, size, slots)
            if slots:
                with open(path, "ab") as file:
                    file.truncate(slots * _RECORD.size)
                    os.fsync(file.fileno())
            elif os.path.exists(path):
                os.unlink(path)


def _data_files(directory: str, size: int, slots: int) -> None:
    each = FILE_BYTES // _stride(size)
    for index in range(max(-(-slots // each), _files(directory, size))):
        path, length = _data(directory, size, index), min(each, slots - index * each) * _stride(size)
        if length <= 0:
            os.unlink(path)
            continue
        with open(path, "ab") as file:
            if os.fstat(file.fileno()).st_size > length:
                file.truncate(length)
            os.posix_fallocate(file.fileno(), 0, length)  # no block will later fail for want of space


def _data(directory: str, size: int, index: int) -> str:
    return os.path.join(directory, f"data-{size}-{index:04}")


def _files(directory: str, size: int) -> int:
    return sum(name.startswith(f"data-{size}-") for name in os.listdir(directory))


class _locked:
    """One process at a time: the map is held in memory."""

    def __init__(self, directory: str) -> None:
        self.handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.handle)
            raise HostError(f"{directory} is in use by another process") from error

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exception: object) -> None:
        os.close(self.handle)


class _Class:
    """The slots of one block size. ``used`` is in order of use, the coldest first."""

    def __init__(self, directory: str, size: int) -> None:
        self.size, self.stride, self.each = size, _stride(size), FILE_BYTES // _stride(size)
        self.map = os.open(os.path.join(directory, f"map-{size}"), os.O_RDWR)
        self.data = [os.open(_data(directory, size, index), os.O_RDWR) for index in range(_files(directory, size))]
        self.used: OrderedDict[bytes, tuple[int, int, int]] = OrderedDict()  # digest -> slot, length, checksum
        self.free: list[int] = []
        self.sequence = self._scan()

    def _scan(self) -> int:
        slots = os.fstat(self.map).st_size // _RECORD.size
        live: list[tuple[int, bytes, int, int, int]] = []
        for slot in range(slots):
            record = os.pread(self.map, _RECORD.size, slot * _RECORD.size)
            digest, sequence, length, checksum, own = _RECORD.unpack(record)
            if record != _EMPTY and own == zlib.crc32(record[:-4]) and length <= self.size:
                live.append((sequence, digest, slot, length, checksum))
            else:
                self.free.append(slot)
        for _sequence, digest, slot, length, checksum in sorted(live):
            if digest in self.used:  # a crash came between writing the new place of a key and clearing the old one
                self.free.append(self.used.pop(digest)[0])
            self.used[digest] = (slot, length, checksum)
        self.free.reverse()
        return max((entry[0] for entry in live), default=0)

    def place(self, slot: int) -> tuple[int, int]:
        return self.data[slot // self.each], slot % self.each * self.stride

    def write(self, digest: bytes, data: bytes) -> None:
        old = self.used.pop(digest, None)
        if self.free:
            slot = self.free.pop()
        elif old is not None:
            slot, old = old[0], None
        else:
            _coldest, (slot, _length, _checksum) = self.used.popitem(last=False)
        file, offset = self.place(slot)
        if os.pwrite(file, data, offset) != len(data):
            raise HostError(f"only a part of {len(data)} bytes was written")
        self.sequence += 1
        checksum = zlib.crc32(data)
        record = _RECORD.pack(digest, self.sequence, len(data), checksum, 0)[:-4]
        os.pwrite(self.map, record + struct.pack("<I", zlib.crc32(record)), slot * _RECORD.size)
        self.used[digest] = (slot, len(data), checksum)
        if old is not None:
            self.clear(old[0])

    def clear(self, slot: int) -> None:
        os.pwrite(self.map, _EMPTY, slot * _RECORD.size)
        self.free.append(slot)

    def sync(self) -> None:
        for file in (*self.data, self.map):
            os.fdatasync(file)

    def close(self) -> None:
        for file in (*self.data, self.map):
            os.close(file)


class Slabs:
    """An open slab directory: put, get and remove blocks by key; the least recently used go first."""

    def __init__(self, directory: str) -> None:
        sizes = sorted(present(directory))
        if not sizes:
            raise HostError(f"{directory} has no slabs")
        self._lock = _locked(directory)
        self._classes = [_Class(directory, size) for size in sizes]

    def __enter__(self) -> Slabs:
        return self

    def __exit__(self, *_exception: object) -> None:
        for one in self._classes:
            one.close()
        self._lock.__exit__()

    @staticmethod
    def _digest(key: str) -> bytes:
        return hashlib.blake2b(key.encode(), digest_size=16).digest()

    def put(self, key: str, data: bytes) -> None:
        """Write a block into the smallest class that takes it."""
        fitting = [one for one in self._classes if len(data) <= one.size]
        if not fitting:
            raise HostError(f"a block of {len(data)} bytes is larger than the largest class, {self._classes[-1].size}")
        digest = self._digest(key)
        fitting[0].write(digest, data)
        for one in self._classes:
            if one is not fitting[0] and digest in one.used:
                one.clear(one.used.pop(digest)[0])

    def get(self, key: str) -> bytes | None:
        """The block, or None where it is not, or is damaged."""
        digest = self._digest(key)
        for one in self._classes:
            if digest in one.used:
                slot, length, checksum = one.used[digest]
                file, offset = one.place(slot)
                data = os.pread(file, length, offset)
                if len(data) == length and zlib.crc32(data) == checksum:
                    one.used.move_to_end(digest)
                    return data
                del one.used[digest]
                one.clear(slot)
        return None

    def remove(self, key: str) -> None:
        """Forget a block; one that is not there is fine."""
        digest = self._digest(key)
        for one in self._classes:
            if digest in one.used:
                one.clear(one.used.pop(digest)[0])

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        for one in self._classes:
            one.sync()

    def blocks(self) -> int:
        """How many blocks there are."""
        return sum(len(one.used) for one in self._classes)
