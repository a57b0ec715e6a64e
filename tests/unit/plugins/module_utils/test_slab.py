# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pages in the large files of SGLang's and vLLM's 3FS connectors, through doubles of their maps of pages."""

from __future__ import annotations

import json
import os
import re
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _connectors, _pooldecl, _poolprobe, _slab
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused
from ansible_collections.agentfleet.metal.tests.doubles import page_maps

PAGE, PAGES = 8192, 4
DOUBLES = {"sglang": page_maps.Sglang, "vllm": page_maps.Vllm}
RECORD = json.loads((Path(__file__).parents[3] / "contract/connectors.json").read_text())


@pytest.fixture(params=DOUBLES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(engine: str) -> t.Iterator[t.Any]:
    made = DOUBLES[engine]()
    yield made
    made.stop()


@pytest.fixture
def slab(tmp_path: Path) -> _slab.Slab:
    made = _slab.Slab(str(tmp_path / "file"), 0, PAGES, PAGE)
    _slab.make(made.path, made.file_bytes)
    return made


def opened(slab: _slab.Slab, engine: str, service: t.Any) -> _slab.Pages:
    return _slab.Pages(slab, slab.path, _slab.page_map(engine, service.url))


def declared(engine: str, model: str, **more: t.Any) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
    tier = {"medium": "threefs", "size": "1TiB", "path": "/3fs/s/kv", "mount_point": "/3fs/s"}
    wish = {"engine": engine, "backend": "hf3fs"}
    options = {
        "name": "p",
        "engine": "threefs",
        "model": model,
        "tensor_parallel": 8,
        "tiers": [tier],
        "connectors": [wish],
        **more,
    }
    pool = _pooldecl.declare("pools[0]", "p", options, lambda path: "")
    return pool, pool["connectors"][0]


def test_the_owner_of_its_directory_has_a_file_and_leads_nobody_elsewhere(
    tmp_path: Path, slab: _slab.Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_bytes(b"of somebody else")
    given: list[tuple[t.Any, ...]] = []
    monkeypatch.setattr(os, "fchown", lambda _file, *owner: given.append(owner))
    for target in (there, tmp_path / "missing"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(OSError, match="symbolic links"):
            _slab.make(str(link), PAGE)
        with pytest.raises(OSError, match="symbolic links"):
            _slab.Pages(slab, str(link), _slab.page_map("sglang", "http://127.0.0.1:1"))
    assert there.read_bytes() == b"of somebody else" and not (tmp_path / "missing").exists() and given == []

    for size in (PAGE, 2 * PAGE):
        _slab.make(str(tmp_path / "new"), size)
    state = tmp_path.stat()
    assert given == [(state.st_uid, state.st_gid)] and (tmp_path / "new").stat().st_size == 2 * PAGE


@pytest.mark.parametrize(
    ("name", "model", "files", "page"),
    [
        ("sglang", "Llama-3.1-70B", 8, 327680 * 64 // 8 // 2),  # keys and values are pages of their own
        ("sglang", "DeepSeek-V3", 1, 70272 * 64),  # a latent is one page, in one file for all ranks
        ("vllm", "Llama-3.1-70B", 8, 327680 * 64 // 8),
        ("vllm", "DeepSeek-V3", 8, 70272 * 64),
    ],
)
def test_files_are_those_that_the_configuration_names(name: str, model: str, files: int, page: int) -> None:
    pool, connector = declared(name, model)
    slabs = _connectors.slabs(pool, connector)
    assert [slab.rank for slab in slabs] == list(range(files))
    assert {slab.page_bytes for slab in slabs} == {page}
    assert sum(slab.file_bytes for slab in slabs) <= 1 << 40 < sum(slab.file_bytes + page for slab in slabs)
    made, reads = _connectors.render(pool, connector), RECORD[name]["reads"]
    if name == "sglang":
        config = json.loads(made.files["hf3fs.json"])
        first, last = reads["hf3fs_files"][0]
        assert slabs[-1].path == f"{config['file_path_prefix']}{first}{files - 1}{last}"
        assert config["file_size"] == slabs[0].file_bytes
    else:
        config = json.loads(made.arguments[0].partition("=")[2])["kv_connector_extra_config"]
        assert slabs[-1].path == f"{config['hf3fs_storage_path']}/{reads['hf3fs_files'][0]}{files - 1}"
        assert config["hf3fs_file_size"] == slabs[0].file_bytes


@pytest.mark.parametrize("pool_gpus", [1, 8, 16])
@pytest.mark.parametrize(
    ("model", "gpus", "rank"),  # a rank's bytes of a token, as the heads that it has make them
    [
        ("Qwen2.5-7B", 1, 57344),
        ("Qwen2.5-7B", 2, 57344 // 2),
        ("Qwen2.5-7B", 8, 57344 // 4),  # 4 heads: each is on two GPUs
        ("Llama-3.1-70B", 4, 327680 // 4),
        ("Llama-3.1-70B", 16, 327680 // 8),
        ("DeepSeek-V3", 2, 70272),
    ],
)
def test_pages_are_those_of_the_engines_gpus_whatever_the_pools(
    engine: str, pool_gpus: int, model: str, gpus: int, rank: int
) -> None:
    wish = {"engine": engine, "backend": "hf3fs", "tensor_parallel": gpus}
    pool, connector = declared(engine, model, tensor_parallel=pool_gpus, connectors=[wish])
    split = 2 if engine == "sglang" and model != "DeepSeek-V3" else 1
    assert {slab.page_bytes for slab in _connectors.slabs(pool, connector)} == {rank * 64 // split}
    assert json.loads(json.dumps(pool)) == pool, "what is recorded is what is compared with it"


def test_pages_are_not_guessed_for_other_gpus(engine: str) -> None:
    own: dict[str, t.Any] = {"bytes_per_token": 57344, "tensor_parallel": 2}
    pool, connector = declared(engine, "", **own)
    assert {slab.page_bytes for slab in _connectors.slabs(pool, connector)} <= {57344 * 64 // 2, 57344 * 64 // 4}
    wish = {"engine": engine, "backend": "hf3fs", "tensor_parallel": 8}
    with pytest.raises(Refused, match="bytes_per_token is of 2 GPUs") as refused:
        declared(engine, "", **own, connectors=[wish])
    assert refused.value.option == "pools[0].connectors[0].tensor_parallel"
    # A pool that was declared before heads were recorded: its probe must not write into pages of another size.
    old = {key: value for key, value in pool.items() if key != "kv_heads"}
    assert _connectors.slabs(old, connector) == _connectors.slabs(pool, connector)
    assert _connectors.slabs(old, {**connector, "tensor_parallel": 8}) == []


def test_vllm_is_told_what_it_asks_anyway() -> None:
    fixed = RECORD["vllm"]["reads"]["hf3fs_fixed_url"]
    _pool, connector = declared("vllm", "DeepSeek-V3")
    assert fixed == "http://localhost:18000" and _connectors.url(connector) == "http://127.0.0.1:18000"
    assert _connectors.url(declared("sglang", "DeepSeek-V3")[1]).endswith(":18001"), "so that both fit on one host"


def test_other_backends_have_no_large_files() -> None:
    pool, _connector = declared("sglang", "DeepSeek-V3")
    for name, backend in _connectors.SERVED_BY:
        if (name, backend) not in (("sglang", "hf3fs"), ("vllm", "hf3fs")):
            assert (
                _connectors.slabs(pool, {"engine": name, "backend": backend, "tensor_parallel": 8, "tenant": ""}) == []
            )


def test_a_page_is_put_found_and_left_to_the_engine(engine: str, service: t.Any, slab: _slab.Slab) -> None:
    Path(slab.path).write_bytes(b"e" * slab.file_bytes)
    service.initialize(0, PAGES)
    with opened(slab, engine, service) as pages:
        page = pages.put("k", b"d" * PAGE)
        assert page not in service.free[0]
        assert pages.get("k", page, PAGE) == b"d" * PAGE
        pages.give_back("k", page)
    assert sorted(service.free[0]) == list(range(PAGES)) and service.keys in ({}, {0: {}})
    written = Path(slab.path).read_bytes()
    assert written.replace(b"d", b"") == b"e" * (slab.file_bytes - PAGE), "no other page was touched"
    routes = {re.sub(r"\{rank\}", "0", route) for route in RECORD[engine]["reads"]["hf3fs_routes"]}
    assert service.asked and set(service.asked) <= routes, "what the engine's own client may ask"


def test_with_one_map_a_tenant_would_find_the_pages_of_another(tmp_path: Path) -> None:
    service = page_maps.Sglang()
    red, blue = (_slab.Slab(str(tmp_path / name), 0, pages, PAGE) for name, pages in (("red", PAGES), ("blue", 2)))
    for slab in (red, blue):
        _slab.make(slab.path, slab.file_bytes)
        service.initialize(0, slab.pages)
    with opened(red, "sglang", service) as pages:
        page = pages.put("prompt", b"r" * PAGE)
        assert pages.get("prompt", page, PAGE) == b"r" * PAGE, "which confirms it"
    found = service.answer(["0", "get_page_indices"], {"keys": ["prompt"]})
    service.stop()
    assert found == {"indices": [page]} and page >= blue.pages, "that is behind the end of blue's file"
    for engine, option in (("sglang", "metadata_port"), ("vllm", "backend")):
        tenants = [{"name": name, "quota": "1GiB"} for name in ("red", "blue")]
        wishes = [{"engine": engine, "backend": "hf3fs", "tenant": tenant["name"]} for tenant in tenants]
        with pytest.raises(Refused, match="does not tell one's pages from the other's") as refused:
            declared(engine, "DeepSeek-V3", tenants=tenants, connectors=wishes)
        assert refused.value.option == f"pools[0].connectors[1].{option}"


def test_metadata_operations_do_not_grow_with_pages(
    engine: str, service: t.Any, slab: _slab.Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.initialize(0, PAGES)
    calls: list[str] = []
    with opened(slab, engine, service) as pages:
        for name in ("open", "unlink", "rename", "replace", "mkdir", "truncate", "ftruncate"):
            monkeypatch.setattr(os, name, lambda *arguments, name=name: calls.append(name))
        for index in range(50):
            page = pages.put(f"k{index}", b"x" * PAGE)
            assert pages.get(f"k{index}", page, PAGE) == b"x" * PAGE
            pages.give_back(f"k{index}", page)
        monkeypatch.undo()
    assert calls == []


def test_before_an_engine_has_begun_the_page_that_it_comes_to_last(
    engine: str, service: t.Any, slab: _slab.Slab
) -> None:
    with opened(slab, engine, service) as pages:
        page = pages.put("k", b"d" * PAGE)
        assert pages.get("k", page, PAGE) == b"d" * PAGE
        pages.give_back("k", page)
    assert service.pages == {}, "the engine says itself how many pages there are"
    service.initialize(0, PAGES)
    mapped = _slab.page_map(engine, service.url)
    assert [mapped.take(slab, f"k{index}") for index in range(PAGES)][-1] == page


def test_all_pages_taken(engine: str, service: t.Any, slab: _slab.Slab) -> None:
    service.initialize(0, PAGES)
    mapped = _slab.page_map(engine, service.url)
    taken = [mapped.take(slab, f"k{index}") for index in range(PAGES)]
    for index, page in enumerate(taken):
        mapped.find(slab, f"k{index}", page)
    with opened(slab, engine, service) as pages:
        if engine == "vllm":
            with pytest.raises(HostError, match="all 4 pages of .* are taken, and vLLM's service frees none"):
                pages.put("new", b"d" * PAGE)
            return
        assert pages.put("new", b"d" * PAGE) == taken[0], "the least recently used"
        pages.give_back("new", taken[0])
    assert service.free[0] == [taken[0]] and set(service.keys[0]) == {"k1", "k2", "k3"}


def test_a_write_that_fails_leaves_no_page_behind(
    engine: str, service: t.Any, slab: _slab.Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.initialize(0, PAGES)
    with opened(slab, engine, service) as pages:
        monkeypatch.setattr(os, "pwrite", lambda *_arguments: 1)
        with pytest.raises(HostError, match="only a part of 8192 bytes was written"):
            pages.put("k", b"d" * PAGE)
        monkeypatch.undo()
    assert sorted(service.free[0]) == list(range(PAGES))


def test_a_file_of_another_size_and_a_map_of_more_pages(engine: str, service: t.Any, slab: _slab.Slab) -> None:
    service.initialize(0, 4 * PAGES)
    if engine == "vllm":
        service.free[0] = service.free[0][PAGES:]
    with opened(slab, engine, service) as pages, pytest.raises(HostError, match="has 4 pages, and the map gives page"):
        pages.put("k", b"d" * PAGE)
    os.truncate(slab.path, PAGE)
    with pytest.raises(HostError, match="has 8192 bytes instead of 32768"):
        opened(slab, engine, service)


def test_a_service_that_does_not_answer(engine: str, slab: _slab.Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    mapped = _slab.page_map(engine, "http://127.0.0.1:9")
    with _slab.Pages(slab, slab.path, mapped) as pages, pytest.raises(HostError, match="127.0.0.1:9 does not answer"):
        pages.put("k", b"d")
    assert len(waited) == _slab._BEGIN_SECONDS - 1, "it may just have been started, and imports its engine"


def test_health_is_about_whole_pages_of_every_rank(
    engine: str, service: t.Any, fake_host: t.Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = {"medium": "threefs", "size": "32MiB", "path": "/3fs/s/kv", "mount_point": "/3fs/s"}
    wish = {"engine": engine, "backend": "hf3fs"}
    options = {
        "name": "p",
        "tensor_parallel": 2,
        "engine": "threefs",
        "bytes_per_token": 8192,
        "page_tokens": 16,
        "tiers": [tier],
        "connectors": [wish],
    }
    pool = _pooldecl.declare("pools[0]", "p", options, lambda path: "")
    monkeypatch.setattr(_connectors, "url", lambda _connector: service.url)
    slabs = _connectors.slabs(pool, pool["connectors"][0])
    for slab in slabs:
        service.initialize(slab.rank, slab.pages)
        os.makedirs(os.path.dirname(fake_host.path(slab.path)), exist_ok=True)
        _slab.make(fake_host.path(slab.path), slab.file_bytes)
    (found,) = _poolprobe.probe(fake_host, pool, 1 << 20, 4)
    size = 8192 * 16 // 2 // (2 if engine == "sglang" else 1)
    assert (found["verified"], found["probe_bytes"], found["samples"]) == (True, size, 4)
    assert (found["files"], found["pages"]) == (2, 2 * (16 << 20) // size)
    assert found["put_bytes_per_second"] > 0 and "problem" not in found

    monkeypatch.setattr(os, "pread", lambda _file, length, _offset: bytes(length))
    (found,) = _poolprobe.probe(fake_host, pool, 1 << 20, 4)
    assert not found["verified"] and found["problem"] == "what was read differs from what was written"
    monkeypatch.undo()
    assert all(len(service.free[slab.rank]) == slab.pages for slab in slabs), "no probe keeps a page"
