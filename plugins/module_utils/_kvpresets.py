# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models whose KV cache is known by name: the keys of their config.json that decide its size, and where they were read.

The keys are those of config.json, so that ``_kvsize`` reads a preset and a model's own file alike.
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
