# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pages in few large files, as SGLang's and vLLM's 3FS connectors lay them out.

Each rank has one file of whole pages, made once, so that no file is made or removed for a page: the file system sees
reads and writes only. Which key lies on which page is known by the engine's metadata service, which counts pages in
memory. Names, page sizes and requests are those of the versions that tests/contract/connectors.json records.
"""

from __future__ import annotations

import abc
import http.client
import json
import os
import time
import typing as t
import urllib.parse
from contextlib import closing
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils import _kvsize
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

_SECONDS = 10.0
_NAMES = {"sglang": "hicache.{}.bin", "vllm": "hf3fs_vllm_data_file_{}"}
_BEGIN_SECONDS = 60.0  # a service that was just started imports its engine before it listens


@dataclass(frozen=True)
class Slab:
    """One rank's file."""

    path: str
    rank: int
    pages: int
    page_bytes: int

    @property
    def file_bytes(self) -> int:
        """Its size, which the connector's configuration says, too."""
        return self.pages * self.page_bytes


def page_bytes(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> int:
    """What a rank writes at a time; 0 where nothing was said of the model, or not enough for this connector's GPUs."""
    gpus, whole = int(connector["tensor_parallel"]), int(pool["bytes_per_token"]) * int(pool["page_tokens"])
    if pool["latent"]:
        return whole
    if pool.get("kv_heads"):
        share = _kvsize.gpu_bytes(pool["kv_heads"], gpus) * int(pool["page_tokens"])
    elif gpus == pool["tensor_parallel"]:
        share = whole // gpus
    else:  # bytes as they are stored by other GPUs do not tell how many heads these replicate
        return 0
    # With the layout page_first, in which we configure it, SGLang keeps keys and values as two pages.
    return share // 2 if connector["engine"] == "sglang" else share


def names(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> list[str]:
    """The files of a connector, one for each rank; none where its engine keeps a file for each page."""
    form = _NAMES.get(connector["engine"]) if connector["backend"] == "hf3fs" else None
    if form is None:
        return []
    shared = pool["latent"] and connector["engine"] == "sglang"  # by all ranks
    return [form.format(rank) for rank in range(1 if shared else int(connector["tensor_parallel"]))]


def slabs(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], directory: str, capacity: int) -> list[Slab]:
    """The files that a connector's engine opens, with as many whole pages as fit.

    :param capacity: bytes that the connector may fill
    """
    size, files = page_bytes(pool, connector), names(pool, connector)
    if not size or not files:
        return []
    pages = capacity // len(files) // size
    return [Slab(f"{directory}/{name}", rank, pages, size) for rank, name in enumerate(files)]


def make(path: str, size: int) -> None:
    """Make a file for the owner of its directory, or give it its size.

    3FS gives it space as chunks are written, and knows no other preallocation.
    """
    new = not os.path.lexists(path)
    # That owner could lead root elsewhere by a link.
    handle = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else os.O_NOFOLLOW), 0o600)
    try:
        if new:
            owner = os.stat(os.path.dirname(path))
            os.fchown(handle, owner.st_uid, owner.st_gid)
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)


class PageMap(abc.ABC):
    """An engine's metadata service, asked as the engine asks it.

    :param url: where it listens
    """

    idle_page = 0  # that an engine which begins now comes to last

    def __init__(self, url: str) -> None:
        self.url = url
        self.patience = time.monotonic() + _BEGIN_SECONDS

    def _post(self, path: str, **content: t.Any) -> dict[str, t.Any]:
        try:
            status, said = self._ask(f"/{path}", json.dumps(content))
            if status < 300:
                return t.cast("dict[str, t.Any]", json.loads(said or b"{}"))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise HostError(f"{self.url} does not answer: {error}") from error
        text = said.decode(errors="replace")
        if "not initialized" in text:
            raise NotInitialized(text)
        raise HostError(f"{self.url}/{path}: {status} {text[-200:]}")

    def _ask(self, path: str, body: str) -> tuple[int, bytes]:
        address = urllib.parse.urlsplit(self.url)
        while True:
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_SECONDS)
            try:
                with closing(connection):
                    connection.request("POST", address.path + path, body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    return answer.status, answer.read()
            except ConnectionRefusedError:
                if time.monotonic() >= self.patience:
                    raise
            time.sleep(1)

    @abc.abstractmethod
    def take(self, slab: Slab, key: str) -> int:
        """A page for a key that nobody else gets."""

    @abc.abstractmethod
    def find(self, slab: Slab, key: str, page: int) -> int | None:
        """Confirm that the page was written, and look the key up as a reader does."""

    @abc.abstractmethod
    def give_back(self, slab: Slab, key: str, page: int) -> None:
        """Let the page go."""


class NotInitialized(Exception):
    """No engine has begun with this rank yet, so that nobody uses its file."""


class _SglangMap(PageMap):
    """When all pages are taken it gives the least recently used one."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._confirmed: set[str] = set()

    def take(self, slab: Slab, key: str) -> int:
        path = f"{slab.rank}/reserve_and_allocate_page_indices"
        ((_known, page),) = self._post(path, keys=[[key, ""]])["indices"]
        return int(page)

    def find(self, slab: Slab, key: str, page: int) -> int | None:
        self._post(f"{slab.rank}/confirm_write", written_keys_to_confirm=[[key, page]], pages_to_release=[])
        self._confirmed.add(key)
        (found,) = self._post(f"{slab.rank}/get_page_indices", keys=[key])["indices"]
        return None if found is None else int(found)

    def give_back(self, slab: Slab, key: str, page: int) -> None:
        if key in self._confirmed:  # by its key, which may have lost the page to another one
            self._post(f"{slab.rank}/delete_keys", keys=[key])
            self._confirmed.discard(key)
        else:
            self._post(f"{slab.rank}/confirm_write", written_keys_to_confirm=[], pages_to_release=[page])


class _VllmMap(PageMap):
    """It forgets no key, so that a probe confirms none, and a service without a free page gives no more."""

    idle_page = -1

    def take(self, slab: Slab, key: str) -> int:
        ((_key, page),) = self._post("keys/batch_allocate", rank=slab.rank, keys=[[key, ""]])["results"]
        if page < 0:
            raise HostError(
                f"all {slab.pages} pages of {slab.path} are taken, and vLLM's service frees none: restart it"
            )
        return int(page)

    def find(self, slab: Slab, key: str, page: int) -> int | None:
        return page

    def give_back(self, slab: Slab, key: str, page: int) -> None:
        self._post("keys/confirm_write", rank=slab.rank, confirmations=[], pages_to_release=[page])


_MAPS: dict[str, type[PageMap]] = {"sglang": _SglangMap, "vllm": _VllmMap}


def page_map(engine: str, url: str) -> PageMap:
    """The client of an engine's service."""
    return _MAPS[engine](url)


class Pages:
    """One rank's open file with its map: what an engine does for a page, through the mount."""

    def __init__(self, slab: Slab, path: str, mapped: PageMap) -> None:
        self.slab, self.map = slab, mapped
        self._mapped: set[str] = set()  # keys with a page that the map gave, and not the idle one
        self.file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # no link of a tenant to another one's file
        size = os.fstat(self.file).st_size
        if size != slab.file_bytes:
            os.close(self.file)
            raise HostError(f"{slab.path} has {size} bytes instead of {slab.file_bytes}: the next run makes it")

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self.file)

    def put(self, key: str, data: bytes) -> int:
        """Write a page and wait until it is stored; returns which."""
        try:
            page = self.map.take(self.slab, key)
            self._mapped.add(key)
        except NotInitialized:
            page = self.map.idle_page % self.slab.pages
        if not 0 <= page < self.slab.pages:
            raise HostError(f"{self.slab.path} has {self.slab.pages} pages, and the map gives page {page}")
        try:
            if os.pwrite(self.file, data, page * self.slab.page_bytes) != len(data):
                raise HostError(f"{self.slab.path}: only a part of {len(data)} bytes was written")
            os.fsync(self.file)
        except (OSError, HostError):
            self.give_back(key, page)
            raise
        return page

    def get(self, key: str, page: int, length: int) -> bytes:
        """Read a page where the map says that the key is."""
        found = self.map.find(self.slab, key, page) if key in self._mapped else page
        if found is None:
            raise HostError(f"{self.slab.path}: the map lost a key that was confirmed")
        offset = found * self.slab.page_bytes
        os.posix_fadvise(self.file, offset, length, os.POSIX_FADV_DONTNEED)  # from storage, not the page cache
        return os.pread(self.file, length, offset)

    def give_back(self, key: str, page: int) -> None:
        """Leave the page to the engine again."""
        if key in self._mapped:
            self.map.give_back(self.slab, key, page)
            self._mapped.discard(key)
