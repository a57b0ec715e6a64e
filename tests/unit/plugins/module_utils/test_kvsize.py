# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of KV caches: exact agreement with published numbers, and the kinds of attention one by one."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _kvsize
from ansible_collections.agentfleet.metal.plugins.module_utils._kvpresets import MODELS
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

# Bytes per token in bf16, KiB, and GiB of 128k tokens, as researched (LMCache's calculator, Mooncake's README for
# 70B = 40 GiB, DeepSeek's config.json, table 2.1 of the GPT-3 paper). The two GiB figures of three digits are rounded there.
TABLE = {
    "Qwen2.5-0.5B": (12288, 12, 1.5),
    "Qwen2.5-7B": (57344, 56, 7),
    "DeepSeek-V3": (70272, 68.625, 8.578),
    "DeepSeek-R1": (70272, 68.625, 8.578),
    "DeepSeek-V3.2": (85888, 83.875, 10.48),
    "Llama-3.1-8B": (131072, 128, 16),
    "Mistral-7B-v0.2": (131072, 128, 16),
    "Qwen3-8B": (147456, 144, 18),
    "Qwen3-14B": (163840, 160, 20),
    "Qwen3-32B": (262144, 256, 32),
    "Llama-3.1-70B": (327680, 320, 40),
    "Mistral-Large-2407": (360448, 352, 44),
    "GLM-4.5": (376832, 368, 46),
    "GLM-4.6": (376832, 368, 46),
    "Llama-3.1-405B": (516096, 504, 63),
    "longchat-7b": (524288, 512, 64),
    "Qwen-7B": (524288, 512, 64),
    "GPT-3-175B": (4718592, 4608, 576),
}
SMALL = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def load(model: t.Any, text: str = "") -> _kvsize.Model:
    return _kvsize.load("model", model, lambda path: text)


def size(model: t.Any, name: str = "bf16", tensor_parallel: int = 1, **form: t.Any) -> dict[str, t.Any]:
    return _kvsize.size(load(model), _kvsize.dtype("dtype", name, **form), tensor_parallel)


@pytest.mark.parametrize("model", TABLE)
def test_agrees_with_the_published_table(model: str) -> None:
    per_token, kib, gib = TABLE[model]
    assert size(model)["bytes_per_token"] == per_token
    assert per_token / 1024 == kib
    assert _kvsize.sequence(load(model), _kvsize.Dtype(), 131072) / (1 << 30) == pytest.approx(gib, abs=0.005)


def test_every_preset_is_in_the_table_and_has_a_source() -> None:
    assert set(MODELS) == set(TABLE)
    assert all(len(preset["source"]) > 10 for preset in MODELS.values())


def test_gpt3_and_the_formula_that_multiplies_by_the_heads_twice() -> None:
    right = _kvsize.sequence(load("GPT-3-175B"), _kvsize.Dtype("fp16"), 2048)
    assert right == 9663676416 == 9 << 30
    config = MODELS["GPT-3-175B"]["config"]
    wrong = config["num_hidden_layers"] * 2 * config["hidden_size"] * config["num_attention_heads"] * 2048 * 4
    assert wrong == 1855425871872 == 1728 << 30 == 192 * right
    assert wrong == 96 * _kvsize.sequence(load("GPT-3-175B"), _kvsize.Dtype("fp32"), 2048)
    # With grouped queries it is further off, and a scale for each element makes int8 larger than fp32.
    assert 1024 * size("Llama-3.1-70B")["bytes_per_token"] == 80 * 2 * 8192 * 64 * 4
    each = size("GPT-3-175B", "int8", group_size=1, scale="fp32")["bytes_per_token"]
    assert each * 4 == size("GPT-3-175B", "fp32")["bytes_per_token"] * 5


@pytest.mark.parametrize(
    ("config", "attention", "per_token"),
    [
        ({**SMALL}, "GQA", 4 * 2 * 2 * 8 * 2),
        ({**SMALL, "num_key_value_heads": 8}, "MHA", 4 * 2 * 8 * 8 * 2),
        ({**SMALL, "num_key_value_heads": None}, "MHA", 4 * 2 * 8 * 8 * 2),
        ({**SMALL, "num_key_value_heads": 1}, "MQA", 4 * 2 * 1 * 8 * 2),
        ({**SMALL, "num_key_value_heads": None, "multi_query": True}, "MQA", 4 * 2 * 1 * 8 * 2),
        ({**SMALL, "head_dim": 16}, "GQA", 4 * 2 * 2 * 16 * 2),
        ({**SMALL, "head_dim": 16, "v_head_dim": 8}, "GQA", 4 * 2 * (16 + 8) * 2),
        ({"n_layer": 4, "n_head": 8, "n_embd": 64}, "MHA", 4 * 2 * 8 * 8 * 2),
        ({"model_type": "vl", "text_config": SMALL}, "GQA", 4 * 2 * 2 * 8 * 2),
        ({"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "MLA", 2 * 576 * 2),
        # one list entry for each layer; a layer without heads caches nothing
        ({**SMALL, "num_key_value_heads": [1, 2, 4, 8]}, "GQA", 2 * (1 + 2 + 4 + 8) * 8 * 2),
        (
            {**SMALL, "block_configs": [{"attention": {"n_heads_in_group": n}} for n in (8, 4, None, 8)]},
            "GQA",
            2 * (1 + 2 + 0 + 1) * 8 * 2,
        ),
        ({**SMALL, "num_kv_shared_layers": 1}, "GQA", 3 * 2 * 2 * 8 * 2),
        ({**SMALL, "full_attention_interval": 4}, "hybrid GQA", 1 * 2 * 2 * 8 * 2),
        ({**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1}, "hybrid GQA", 2 * 2 * 2 * 8 * 2),
        ({**SMALL, "hybrid_override_pattern": "M*-M"}, "hybrid GQA", 1 * 2 * 2 * 8 * 2),
    ],
)
def test_kinds_of_attention(config: dict[str, t.Any], attention: str, per_token: int) -> None:
    found = size(config)
    assert (found["attention"], found["bytes_per_token"]) == (attention, per_token)


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"sliding_window": 4096, "model_type": "mistral"}, [4096] * 4),  # 0.1: all layers
        ({"sliding_window": None}, [0] * 4),
        ({"sliding_window": 4096, "use_sliding_window": False}, [0] * 4),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 4096]),
        ({"sliding_window": 512, "sliding_window_pattern": 2}, [512, 0, 512, 0]),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2}, [512, 0, 512, 0]),
        # what the class of a model fills in
        ({"model_type": "gemma2", "head_dim": 8}, [4096, 0, 4096, 0]),
        (
            {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 64, "sliding_window_pattern": 4},
            [64] * 3 + [0],
        ),
        ({"model_type": "gpt_oss", "head_dim": 8}, [128, 0, 128, 0]),
        ({"model_type": "cohere2", "sliding_window": 64}, [64, 64, 64, 0]),
        ({"model_type": "olmo3", "layer_types": ["full_attention"] * 4}, [0] * 4),
        ({"model_type": "llama4_text", "head_dim": 8}, [8192, 8192, 8192, 0]),
        ({"model_type": "llama4_text", "head_dim": 8, "no_rope_layers": [0, 1, 0, 1]}, [0, 8192, 0, 8192]),
        ({"model_type": "mistral"}, [4096] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [0] * 4),
        ({"model_type": "qwen2", "sliding_window": 64}, [0] * 4),
        ({"attention_chunk_size": 64, "layer_types": ["chunked_attention"] * 3 + ["full_attention"]}, [64, 64, 64, 0]),
    ],
)
def test_windows(more: dict[str, t.Any], windows: list[int]) -> None:
    model = load({**SMALL, **more})
    per_layer = 2 * 2 * 8 * 2
    expected = sum(per_layer * (min(10000, window) if window else 10000) for window in windows)
    assert _kvsize.sequence(model, _kvsize.Dtype(), 10000) == expected
    assert size({**SMALL, **more})["growing_bytes_per_token"] == per_layer * windows.count(0)


def test_gemma_3_as_google_publishes_it() -> None:
    """Its config.json has neither head_dim nor a pattern of layers: Gemma3TextConfig fills in 256 and every 6th."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    }
    for config in (text, {"model_type": "gemma3", "text_config": text}, {**text, "model_type": "gemma3"}):
        found = size(config)
        assert (found["bytes_per_token"], found["growing_bytes_per_token"]) == (393216, 65536)
        assert _kvsize.sequence(load(config), _kvsize.Dtype(), 131072) == 8 * 8192 * 131072 + 40 * 8192 * 1024
        assert found["source"].endswith("head_dim 256, sliding_window_pattern 6"), "what was not in the file is told"
    # That of the 4B model also leaves out its heads, 8 with 4 for K and V.
    small = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    assert size({"text_config": small})["bytes_per_token"] == 34 * 2 * 4 * 256 * 2


@pytest.mark.parametrize(
    ("model_type", "row"), [("qwen3", 128), ("glm4", 128), ("gemma", 256), ("qwen3_next", 256), ("llama", 64)]
)
def test_head_dim_is_that_of_the_class(model_type: str, row: int) -> None:
    config = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 1, "hidden_size": 1024}
    assert size({**config, "model_type": model_type})["bytes_per_token"] == 2 * row * 2
    assert size({**config, "model_type": model_type, "head_dim": 32})["bytes_per_token"] == 2 * 32 * 2


@pytest.mark.parametrize(
    ("name", "form", "row"),
    [
        ("fp32", {}, 512),
        ("bf16", {}, 256),
        ("fp8", {}, 128),
        ("int8", {"group_size": 128, "scale": "fp32"}, 128 + 4),
        ("int4", {}, 64 + 4 * 2),
        ("int4", {"group_size": 64}, 64 + 2 * 2),
        ("int4", {"group_size": 32, "zero_point": True}, 64 + 4 * 4),
        ("int4", {"group_size": 1, "scale": "fp32"}, 64 + 128 * 4),  # a scale for each element: 9 times int8
        ("fp4", {"group_size": 16, "scale": "fp8"}, 64 + 8),
        ("int4", {"group_size": 100}, 64 + 2 * 2),  # a group does not go beyond its row
    ],
)
def test_formats_and_their_scales(name: str, form: dict[str, t.Any], row: int) -> None:
    assert size("Qwen3-8B", name, **form)["bytes_per_token"] == 36 * 2 * 8 * row


def test_deepseeks_formats() -> None:
    assert size("DeepSeek-V3", "fp8")["bytes_per_token"] == 35136
    assert size("DeepSeek-V3", "fp8_ds_mla")["bytes_per_token"] == 61 * 656
    assert size("DeepSeek-V3.2", "fp8_ds_mla")["bytes_per_token"] == 61 * (656 + 132)


@pytest.mark.parametrize(
    ("model", "tensor_parallel", "gpu", "stored"),
    [
        ("Llama-3.1-70B", 1, 327680, 327680),
        ("Llama-3.1-70B", 4, 81920, 327680),
        ("Llama-3.1-70B", 8, 40960, 327680),
        ("Llama-3.1-70B", 16, 40960, 2 * 327680),  # 8 heads on 16 GPUs: each is there twice
        ("DeepSeek-V3", 8, 70272, 70272),  # the latent is on every GPU, and stored by one
        ("GPT-3-175B", 8, 4718592 // 8, 4718592),
    ],
)
def test_share_of_each_gpu(model: str, tensor_parallel: int, gpu: int, stored: int) -> None:
    found = size(model, tensor_parallel=tensor_parallel)
    assert (found["bytes_per_token_per_gpu"], found["stored_bytes_per_token"]) == (gpu, stored)


def test_explains_itself_line_by_line() -> None:
    assert size("Llama-3.1-70B", tensor_parallel=8)["explanation"][1:] == [
        "80 layers x 2 (K and V) x 8 KV heads x 128 elements (4,096 B) = 327,680 B",
        "one token: 327,680 B (320 KiB); 128k tokens: 40 GiB",
        "on each of 8 GPUs: 40,960 B, 1 of 8 KV heads",
    ]
    assert size("DeepSeek-V3")["explanation"][1] == "61 layers x one latent row of 576 elements (1,152 B) = 70,272 B"


def test_a_pool_of_users_who_share_a_prefix() -> None:
    load_ = _kvsize.Load(
        users=100, tokens=32768, shared_tokens=4096, replicas=2, usable=0.5, ttft_seconds=0.5, requests=4
    )
    plan = _kvsize.pool(327680, load_, 1 << 40)
    assert plan["page_bytes"] == 64 * 327680
    assert plan["pages"] == 64 + 100 * 448
    assert plan["needed_bytes"] == plan["pages"] * plan["page_bytes"] * 4  # 2 replicas, half usable
    assert plan["capacity_pages"] == (1 << 40) // 4 // plan["page_bytes"]
    assert plan["capacity_users"] == (plan["capacity_pages"] - 64) // 448
    assert not plan["fits"]
    assert plan["needed_bytes_per_second"] == 4 * 32768 * 327680 * 2
    assert "short of" in plan["explanation"][4]


def test_a_32k_prefix_of_70b_takes_half_a_second_at_20_gb_per_second() -> None:
    plan = _kvsize.pool(327680, _kvsize.Load(tokens=32768, ttft_seconds=0.5369))
    assert plan["read_bytes"] == 10 << 30
    assert plan["needed_bytes_per_second"] == pytest.approx(20e9, rel=1e-3)


def test_reads_a_models_own_file() -> None:
    asked = []

    def read(path: str) -> str:
        asked.append(path)
        return json.dumps(SMALL)

    assert _kvsize.load("model", "/models/tiny", read).name == "tiny"
    assert _kvsize.load("model", "/models/tiny/config.json", read).source == "/models/tiny/config.json"
    assert asked == ["/models/tiny/config.json"] * 2


@pytest.mark.parametrize(
    ("model", "text", "problem"),
    [
        ("gpt-5", "", "no such preset"),
        ("/models/none", "", "/models/none/config.json cannot be read"),
        ("/models/x", "{", "is not JSON"),
        ("/models/x", "[]", "is not a JSON object"),
        ({"model_type": "new"}, "", "lacks num_hidden_layers or n_layer"),
        ({"num_hidden_layers": 4}, "", "lacks num_attention_heads or n_head"),
        ({"num_hidden_layers": 4, "num_attention_heads": 8}, "", "lacks head_dim (or hidden_size"),
        ({"num_hidden_layers": 4, "kv_lora_rank": 512}, "", "lacks qk_rope_head_dim"),
        ({**SMALL, "num_hidden_layers": "4"}, "", "is '4'"),
        ({**SMALL, "layer_types": ["full_attention"]}, "", "1 entries for 4 layers"),
        ({**SMALL, "layer_types": ["warp_attention"] * 4}, "", "'warp_attention' is not known"),
        ({**SMALL, "layer_types": ["sliding_attention"] * 4}, "", "lacks sliding_window"),
        ({**SMALL, "layer_types": ["mamba"] * 4}, "", "no attention layer"),
        ({**SMALL, "num_key_value_heads": [1, 2]}, "", "2 entries for 4 layers"),
        ({**SMALL, "compress_ratios": [1, 4]}, "", "has compress_ratios"),
        ({**SMALL, "hidden_size": 60}, "", "60 elements are no multiple of 8 heads"),
        ({**SMALL, "sliding_window": 4096}, "", "does not tell which layers have it"),
        ({**SMALL, "sliding_window": 4096, "use_sliding_window": True}, "", "does not tell which layers have it"),
        ({**SMALL, "attention_chunk_size": 64}, "", "a window of 64 tokens"),
        ({"text_config": None}, "", "lacks num_hidden_layers"),
        ({**SMALL, "num_key_value_heads": "x"}, "", "num_key_value_heads or num_kv_heads or n_head_kv"),
        ({**SMALL, "num_key_value_heads": [1, 2, "x", 2]}, "", "num_key_value_heads is 'x'"),
        ({**SMALL, "num_key_value_heads": -2}, "", "is -2"),
        ({**SMALL, "head_dim": "8"}, "", "head_dim is '8'"),
        ({**SMALL, "v_head_dim": [8]}, "", "v_head_dim is [8]"),
        ({**SMALL, "sliding_window": 64, "sliding_window_pattern": "LLLG"}, "", "sliding_window_pattern is 'LLLG'"),
        ({**SMALL, "sliding_window": "64"}, "", "sliding_window is '64'"),
        ({**SMALL, "layer_types": 4}, "", "layer_types is 4"),
        ({**SMALL, "layer_types": [{}] * 4}, "", "layer type '{}' is not known"),
        ({**SMALL, "layer_types": ["chunked_attention"] * 4, "attention_chunk_size": "8"}, "", "size is '8'"),
        ({**SMALL, "block_configs": [{}]}, "", "block_configs has 1 entries for 4 layers"),
        ({**SMALL, "block_configs": [1] * 4}, "", "block_configs[0] is 1"),
        ({**SMALL, "block_configs": [{"attention": {"n_heads_in_group": "x"}}] * 4}, "", "n_heads_in_group is 'x'"),
        ({**SMALL, "num_kv_shared_layers": "1"}, "", "num_kv_shared_layers is '1'"),
        ({**SMALL, "full_attention_interval": "4"}, "", "full_attention_interval is '4'"),
    ],
)
def test_what_cannot_be_sized_is_refused(model: t.Any, text: str, problem: str) -> None:
    with pytest.raises(Refused) as refused:
        load(model, text)
    assert refused.value.option.startswith("model") and problem in refused.value.problem and refused.value.remedy


@pytest.mark.parametrize(
    ("model", "name", "tensor_parallel", "form", "option"),
    [
        ("Qwen3-8B", "int3", 1, {}, "dtype"),
        ("Qwen3-8B", "bf16", 1, {"group_size": 32}, "group_size"),
        ("Qwen3-8B", "int4", 1, {"group_size": -1}, "group_size"),
        ("Qwen3-8B", "int4", 1, {"scale": "fp7"}, "scale_dtype"),
        ("Qwen3-8B", "fp8_ds_mla", 1, {}, "dtype"),
        ("Qwen3-8B", "bf16", 3, {}, "tensor_parallel"),
        ("Qwen3-8B", "bf16", 0, {}, "tensor_parallel"),
    ],
)
def test_impossible_formats(model: str, name: str, tensor_parallel: int, form: dict[str, t.Any], option: str) -> None:
    with pytest.raises(Refused) as refused:
        size(model, name, tensor_parallel, **form)
    assert refused.value.option == option


@pytest.mark.parametrize(
    "wrong",
    [
        {"users": 0},
        {"tokens": 0},
        {"shared_tokens": 200000},
        {"prefix_tokens": 200000},
        {"usable": 1.5},
        {"ttft_seconds": -1.0},
        {"replicas": 0},
    ],
)
def test_impossible_loads(wrong: dict[str, t.Any]) -> None:
    with pytest.raises(Refused) as refused:
        _kvsize.pool(1000, _kvsize.Load(**wrong))
    assert refused.value.option in wrong
