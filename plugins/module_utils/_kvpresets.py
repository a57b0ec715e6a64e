# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models whose KV cache is known by name: the keys of their config.json that decide its size, and where they were read.

The keys are those of config.json, so that ``_kvsize`` reads a preset and a model's own file alike. What such a file
leaves out is not free to guess, either: the model's class fills it in (``CLASSES``).
"""

from __future__ import annotations

import typing as t

_CALCULATOR = "LMCache, docs/source/_static/modelconfig.json (3fd3000): "


def _preset(source: str, layers: int, heads: int, kv_heads: int, hidden: int, **more: int) -> dict[str, t.Any]:
    return {
        "source": source,
        "config": {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": hidden,
            **more,
        },
    }


_DEEPSEEK = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}

MODELS: dict[str, dict[str, t.Any]] = {
    "Qwen2.5-0.5B": _preset(_CALCULATOR + "Qwen/Qwen2.5-0.5B", 24, 14, 2, 896),
    "Qwen2.5-7B": _preset(_CALCULATOR + "Qwen/Qwen2.5-7B-Instruct", 28, 28, 4, 3584),
    "DeepSeek-V3": _preset(_CALCULATOR + "deepseek-ai/DeepSeek-V3", 61, 128, 128, 7168, **_DEEPSEEK),
    "DeepSeek-R1": _preset(_CALCULATOR + "deepseek-ai/DeepSeek-R1", 61, 128, 128, 7168, **_DEEPSEEK),
    "DeepSeek-V3.2": _preset(
        "config.json of deepseek-ai/DeepSeek-V3.2: that of DeepSeek-V3 and index_head_dim",
        61,
        128,
        128,
        7168,
        **_DEEPSEEK,
        index_head_dim=128,
    ),
    "Llama-3.1-8B": _preset(_CALCULATOR + "meta-llama/Llama-3.1-8B-Instruct", 32, 32, 8, 4096),
    "Mistral-7B-v0.2": _preset(_CALCULATOR + "mistralai/Mistral-7B-Instruct-v0.2", 32, 32, 8, 4096),
    "Qwen3-8B": _preset(_CALCULATOR + "Qwen/Qwen3-8B", 36, 32, 8, 4096, head_dim=128),
    "Qwen3-14B": _preset(_CALCULATOR + "Qwen/Qwen3-14B", 40, 40, 8, 5120, head_dim=128),
    "Qwen3-32B": _preset(_CALCULATOR + "Qwen/Qwen3-32B", 64, 64, 8, 5120, head_dim=128),
    "Llama-3.1-70B": _preset(_CALCULATOR + "meta-llama/Llama-3.1-70B-Instruct", 80, 64, 8, 8192),
    "Mistral-Large-2407": _preset(_CALCULATOR + "mistralai/Mistral-Large-Instruct-2407", 88, 96, 8, 12288),
    "GLM-4.5": _preset(_CALCULATOR + "zai-org/GLM-4.5", 92, 96, 8, 5120, head_dim=128),
    "GLM-4.6": _preset(_CALCULATOR + "zai-org/GLM-4.6", 92, 96, 8, 5120, head_dim=128),
    "Llama-3.1-405B": _preset(_CALCULATOR + "meta-llama/Llama-3.1-405B", 126, 128, 8, 16384),
    "longchat-7b": _preset(_CALCULATOR + "lmsys/longchat-7b-16k", 32, 32, 32, 4096),
    "Qwen-7B": _preset(_CALCULATOR + "Qwen/Qwen-7B", 32, 32, 32, 4096),
    "GPT-3-175B": _preset("Brown et al. 2020, Language Models are Few-Shot Learners, table 2.1", 96, 96, 96, 12288),
}


def _class(heads: int, kv_heads: int, **more: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


def _qwen2(layers: int) -> dict[str, int]:
    return {"use_sliding_window": False, "max_window_layers": layers}


# model_type -> what its class fills in, as far as it decides the size, in the names that config.json has for it.
# Read in transformers 5.24.0, models/*/configuration_*.py. A head_dim that is not hidden_size / num_attention_heads first.
CLASSES: dict[str, dict[str, int]] = {
    name: {"head_dim": size}
    for size, names in {
        64: "muse_spark_text sarvam_moe",
        128: "afmoe beam cohere2_moe cosmos3_edge_text cwm ernie4_5 flint glm glm4 helium higgs_audio_v2 hrm_text hy_v3"
        " inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder kolibri1 laguna lara_mini lfm3 mellum"
        " minimax_m2 minimax_m3_vl_text molmo2_text muse_glimmer_text nemotron_h paddleocr_vl_text qwen3_vl_text"
        " seed_oss solar_open step3p5 zaya",
        256: "dory qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text",
    }.items()
    for name in names.split()
} | {
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "exaone4": _class(32, 32, sliding_window=4096, sliding_window_pattern=4),
    "gemma": _class(16, 16, head_dim=256),
    "gemma2": _class(8, 4, head_dim=256, sliding_window=4096, sliding_window_pattern=2),
    "gemma3_text": _class(8, 4, head_dim=256, sliding_window=4096, sliding_window_pattern=6),
    "gemma3n_text": _class(8, 2, head_dim=256, sliding_window=512, sliding_window_pattern=5, num_kv_shared_layers=15),
    "gemma4_text": _class(8, 4, head_dim=256, global_head_dim=512, sliding_window=512),
    "gemma4_unified_text": _class(8, 4, head_dim=256, global_head_dim=512, sliding_window=1024),
    "gpt_oss": _class(64, 8, head_dim=64, sliding_window=128, sliding_window_pattern=2),
    "llama4_text": _class(40, 8, head_dim=128, attention_chunk_size=8192, no_rope_layer_interval=4),
    "mimo_v2_flash": {"head_dim": 192, "v_head_dim": 128, "sliding_window": 129},
    "ministral": _class(32, 8, sliding_window=4096),
    "ministral3": _class(32, 8, head_dim=128),
    "mistral": _class(32, 8, sliding_window=4096),
    "mixtral": _class(32, 8),
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "qwen2": _qwen2(28),
    "qwen2_5_vl_text": _class(64, 8, **_qwen2(80)),
    "qwen2_moe": {"use_sliding_window": False},
    "qwen2_vl_text": _class(64, 8, **_qwen2(80)),
    "qwen3": {"head_dim": 128, **_qwen2(28)},
    "qwen3_moe": _class(32, 4, use_sliding_window=False),
    "starcoder2": _class(24, 2),
    "vaultgemma": _class(8, 4, head_dim=256, sliding_window=4096, sliding_window_pattern=2),
}
