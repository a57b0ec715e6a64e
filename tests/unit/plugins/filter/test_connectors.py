# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every key that we render is one that the engines' packages read, as recorded in tests/contract/connectors.json."""

from __future__ import annotations

import json
import shlex
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.filter.kvcache import FilterModule
from ansible_collections.agentfleet.metal.plugins.module_utils import _connectors, _pooldecl

RECORD = json.loads((Path(__file__).parents[3] / "contract/connectors.json").read_text())
READS = {package: entry["reads"] for package, entry in RECORD.items()}
MOONCAKE = READS["mooncake_transfer_engine_non_cuda"]["setup"]
TIERS = {
    "mooncake": [
        {"medium": "dram", "size": "512GiB"},
        {"medium": "cxl", "size": "512GiB", "memdevs": ["0x1", "0x2"]},
        {"medium": "ssd", "size": "4TiB", "path": "/srv/kv"},
    ],
    "threefs": [{"medium": "threefs", "size": "1TiB", "path": "/3fs/stage/kv", "mount_point": "/3fs/stage"}],
    "filesystem": [
        {"medium": "ssd", "size": "1TiB", "path": "/srv/kv"},
        {"medium": "cxl", "size": "256GiB", "memdevs": ["0x1"], "devdax": True},
    ],
}


def options(engine: str, model: str = "Llama-3.1-70B", **more: t.Any) -> dict[str, t.Any]:
    gpus = {"Llama-3.1-70B": 8, "DeepSeek-V3": 8}.get(model, 1)
    found = {"name": "big", "engine": engine, "model": model, "tensor_parallel": gpus, "tiers": TIERS[engine], **more}
    if engine == "mooncake":
        found.setdefault("master", {"address": "10.77.0.11"})
        found.setdefault("address", "10.77.0.11")
    return found


def declare(engine: str, **more: t.Any) -> dict[str, t.Any]:
    return _pooldecl.declare("pools[0]", "big", options(engine, **more), lambda path: "")


def rendered(engine: str, name: str, **more: t.Any) -> _connectors.Rendered:
    wish = dict(zip(("engine", "backend"), name.split("-")))
    pool = declare(engine, **{**more, "connectors": [{**wish, **more.pop("connector", {})}]})
    return _connectors.render(
        {**pool, "tiers": [{**x, "devdax": "/dev/dax0.0" if x.get("devdax") else ""} for x in pool["tiers"]]},
        pool["connectors"][0],
        more.get("tenant_id", ""),
    )


def arguments(made: t.Any) -> dict[str, str]:
    return dict(argument.lstrip("-").partition("=")[::2] for argument in made)


def files(made: dict[str, t.Any]) -> dict[str, t.Any]:
    return {name: json.loads(text) for name, text in made["files"].items() if name.endswith((".json", ".yaml"))}


# -- a pool of 1 TiB for two models, for every connector ----------------------------------


@pytest.mark.parametrize("model", ["Llama-3.1-70B", "DeepSeek-V3"])
@pytest.mark.parametrize("engine", TIERS)
def test_all_connectors_of_a_pool_of_1_tib(engine: str, model: str) -> None:
    found = FilterModule().filters()["kv_connectors"](options(engine, model))
    expected = {f"{name}-{backend}" for (name, backend), engines in _connectors.SERVED_BY.items() if engine in engines}
    assert {made["name"] for made in found} == expected
    for made in found:
        CHECKS[made["name"].partition("-")[0]](made)


def test_every_connector_is_served_by_some_pool() -> None:
    names = {made["name"] for engine in TIERS for made in FilterModule().filters()["kv_connectors"](options(engine))}
    assert names == {"-".join(name) for name in _connectors.SERVED_BY}


def check_sglang(made: dict[str, t.Any]) -> None:
    given, reads = arguments(made["arguments"]), READS["sglang"]
    for name, value in given.items():
        field = name.replace("-", "_")
        assert field in reads["arguments"]
        assert value in reads["choices"].get(field, [value])
    assert set(made["environment"]) <= {*reads["environment"], "MC_STORE_CLUSTER_ID"}
    for name, content in files(made).items():
        keys = reads[name.partition(".")[0]]
        assert set(content) <= set(keys)
        assert name != "hf3fs.json" or set(reads["hf3fs_required"]) <= set(content)


def check_vllm(made: dict[str, t.Any]) -> None:
    reads = READS["vllm"]
    configs = [shlex.split(made["files"][role]) for role in ("producer", "consumer") if role in made["files"]]
    for config in configs or [made["arguments"]]:
        transfer = json.loads(arguments(config)["kv-transfer-config"])
        assert set(transfer) <= set(reads["kv_transfer_config"]) and transfer["kv_connector"] in reads["connectors"]
        extra = transfer.get("kv_connector_extra_config", {})
        known = {
            "OffloadingConnector": reads["offloading"],
            "HF3FSKVConnector": reads["hf3fs"],
            "MooncakeConnector": reads["mooncake_transfer"],
        }.get(transfer["kv_connector"], [])
        assert set(extra) <= set(known)
        if transfer["kv_connector"] == "OffloadingConnector":
            assert extra["spec_name"] in reads["specs"] and extra["eviction_policy"] in reads["policies"]
            assert all(
                tier["type"] in reads["tiers"] and set(tier) <= set(reads["fs_tier"])
                for tier in extra["secondary_tiers"]
            )
    for name, content in files(made).items():
        if name == "mooncake.json":
            assert set(content) <= set(reads["mooncake_store"])
            assert content["mode"] == "standalone-store" and content["global_segment_size"] == 0
        else:
            check_lmcache(made)


def check_lmcache(made: dict[str, t.Any]) -> None:
    reads, config = READS["lmcache"], files(made)["lmcache.yaml"]
    extra = config.pop("extra_config", {})
    assert set(config) <= set(reads["config"]) and config["cache_policy"] in reads["cache_policies"]
    prefix = reads["mooncake_prefix"][0]
    for key, value in extra.items():
        if key.startswith(prefix):
            # LMCache hands these to the engine's setup; a name that it does not know would be ignored there.
            assert key[len(prefix) :] in MOONCAKE and isinstance(value, str)
        elif key.startswith("storage_plugin.dax."):
            assert key.endswith((".module_path", ".class_name"))
        else:
            assert key.startswith("remote_storage_plugin.hf3fs.") or key in [*reads["hf3fs"], *reads["dax"]]
    assert extra.get("storage_plugin.dax.class_name", "DaxBackend") in reads["dax_classes"]


CHECKS = {"sglang": check_sglang, "vllm": check_vllm, "lmcache": check_lmcache}


# -- what the record cannot say ------------------------------------------------------------


def test_a_latent_cache_has_one_file_and_heads_have_one_for_each_rank() -> None:
    mla = json.loads(rendered("threefs", "sglang-hf3fs", model="DeepSeek-V3").files["hf3fs.json"])
    gqa = json.loads(rendered("threefs", "sglang-hf3fs").files["hf3fs.json"])
    latent, keys = 70272 * 64, 327680 * 64 // 8 // 2
    assert mla["file_size"] == (1 << 40) // latent * latent and gqa["file_size"] == (1 << 37) // keys * keys
    assert mla["metadata_server_url"] == "http://127.0.0.1:18001"


def test_the_metadata_services_are_each_engines_own() -> None:
    assert set(READS["vllm"]["hf3fs_metadata"]) == {"--host", "--port"}
    assert {"--persistence-path", "--save-interval"} <= set(READS["sglang"]["hf3fs_metadata"])
    vllm = arguments(rendered("threefs", "vllm-hf3fs").arguments)["kv-transfer-config"]
    assert json.loads(vllm)["kv_connector_extra_config"]["hf3fs_metadata_server_url"] == "http://127.0.0.1:18000"


def test_the_mock_of_3fs_is_looked_for_where_the_engine_looks() -> None:
    assert _connectors.CLIENT["vllm"] in READS["vllm"]["hf3fs_imports"]
    program = rendered("threefs", "vllm-hf3fs").files["check"]
    assert "import hf3fs_fuse.io" in program and "/3fs/stage/kv" in program


@pytest.mark.parametrize(
    ("python", "code", "said"),
    [("/bin/false", 1, "cannot import hf3fs_fuse.io"), ("/bin/true", 1, "not on a mounted 3FS")],
)
def test_the_check_program(tmp_path: Path, python: str, code: int, said: str) -> None:
    import subprocess

    program = tmp_path / "check"
    program.write_text(rendered("threefs", "vllm-hf3fs").files["check"].replace("/3fs/stage/kv", str(tmp_path)))
    done = subprocess.run(["sh", str(program), python], capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stderr


def test_clients_of_several_masters_look_in_etcd() -> None:
    endpoints = ["10.77.0.11:2379", "10.77.0.12:2379", "10.77.0.13:2379"]
    for name in ("sglang-mooncake", "vllm-mooncake", "lmcache-mooncake"):
        made = rendered("mooncake", name, etcd=endpoints)
        assert made.environment["MC_STORE_CLUSTER_ID"] == "big"
        assert "etcd://10.77.0.11:2379;10.77.0.12:2379;10.77.0.13:2379" in "".join(made.files.values())
    assert "10.77.0.11:50051" in rendered("mooncake", "sglang-mooncake").files["mooncake.json"]


def test_a_tenants_connector_is_secret_and_has_its_own_directory_and_quota() -> None:
    tenants = [{"name": "red", "quota": "256GiB"}]
    made = rendered("mooncake", "vllm-mooncake", tenants=tenants, connector={"tenant": "red"}, tenant_id="red-x")
    assert made.secret and json.loads(made.files["mooncake.json"])["tenant_id"] == "red-x"
    assert made.directory == "/etc/agentfleet/connectors/big/vllm-mooncake-red"
    disk = rendered("filesystem", "lmcache-disk", tenants=tenants, connector={"tenant": "red"})
    config = json.loads(disk.files["lmcache.yaml"])
    assert (config["local_disk"], config["max_local_disk_size"]) == ("file:///srv/kv/red/", 32)


def test_sizes_in_the_engines_units() -> None:
    made = rendered("mooncake", "sglang-mooncake", connector={"host_memory": "64GiB"})
    assert arguments(made.arguments)["hicache-size"] == "8", "for each of 8 ranks"
    assert arguments(rendered("mooncake", "sglang-mooncake").arguments)["hicache-size"] == "1", "if left out"
    one = rendered("mooncake", "sglang-mooncake", connector={"host_memory": "64GiB", "tensor_parallel": 1})
    assert arguments(one.arguments)["hicache-size"] == "68"
    config = json.loads(
        rendered("mooncake", "vllm-mooncake", connector={"host_memory": "64GiB"}).files["mooncake.json"]
    )
    assert config["local_buffer_size"] == 8 << 30
    config = json.loads(rendered("mooncake", "lmcache-cpu", connector={"host_memory": "64GiB"}).files["lmcache.yaml"])
    assert config["max_local_cpu_size"] == 8
    dax = json.loads(rendered("filesystem", "lmcache-dax", connector={"tensor_parallel": 1}).files["lmcache.yaml"])
    assert (dax["extra_config"]["dax.device_path"], dax["extra_config"]["dax.max_dax_size"]) == ("/dev/dax0.0", 256)


def test_an_environment_is_read_alike_by_systemd_and_a_shell(tmp_path: Path) -> None:
    import subprocess

    made = rendered("filesystem", "sglang-file")
    made.environment["WITH"] = "a b;c'd"
    (tmp_path / "environment").write_text(made.texts()["environment"])
    script = f'. {tmp_path}/environment; printf %s "$WITH"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == "a b;c'd"


def test_arguments_are_one_on_a_line() -> None:
    lines = rendered("filesystem", "vllm-offloading").texts()["arguments"].splitlines()
    words = [shlex.split(line) for line in lines]
    assert all(len(word) == 1 for word in words)
    assert [word[0].partition("=")[0] for word in words] == ["--kv-transfer-config", "--block-size"]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"dtype": "int4"},
        {"dtype": "int4", "group_size": 64, "scale_dtype": "fp32", "zero_point": True},
        {"dtype": "fp8", "group_size": 128},
    ],
)
def test_a_pool_has_the_size_that_the_sizing_filters_tell(form: dict[str, t.Any]) -> None:
    pool = declare("filesystem", model="Qwen3-8B", tensor_parallel=1, page_tokens=64, **form)
    told = FilterModule().filters()["kv_size"]("Qwen3-8B", **form)["stored_bytes_per_token"]
    assert (pool["bytes_per_token"], pool["block_bytes"]) == (told, told * 64)
