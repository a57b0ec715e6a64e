# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters that plan KV-cache pools."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.filter.kvcache import FilterModule

FILTERS = FilterModule().filters()


@pytest.mark.parametrize(
    ("model", "tokens_of_1_tib"),
    [("Llama-3.1-70B", 3187648), ("DeepSeek-V3", 14864128)],
)
def test_a_pool_of_1_tib(model: str, tokens_of_1_tib: int) -> None:
    plan = FILTERS["kv_pool_plan"](model, capacity="1TiB", tensor_parallel=8, users=100, tokens=16384, ttft_seconds=1)
    assert plan["capacity_tokens"] == tokens_of_1_tib
    assert plan["fits"] and len(plan["explanation"]) >= 8
    tiers = FILTERS["kv_pool_plan"](model, capacity=["512GiB", "512GiB"], tensor_parallel=8)
    assert tiers["capacity_tokens"] == tokens_of_1_tib


def test_own_config_and_own_bytes(tmp_path: t.Any) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FILTERS["kv_bytes_per_token"](str(tmp_path)) == FILTERS["kv_bytes_per_token"](config) == 4 * 2 * 64 * 2
    assert FILTERS["kv_pool_plan"](None, bytes_per_token="1000", tokens=64)["page_bytes"] == 64000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engine": "redis"}, "engine: 'redis': no such engine"),
        ({"capacity": "1TB"}, "capacity: '1TB': not a size"),
        ({"seats": 3}, "seats: 3: no such option. A load has users"),
        ({"bytes_per_token": "many"}, "bytes_per_token: 'many': not a positive whole number"),
        ({"dtype": "int2"}, "dtype: 'int2': no such format"),
    ],
)
def test_refusals_fail_the_task(options: dict[str, t.Any], text: str) -> None:
    with pytest.raises(AnsibleFilterError, match="kv_pool_plan: |kv_size: ") as error:
        FILTERS["kv_pool_plan"]("Qwen3-8B", **options)
    assert text in str(error.value)


HERE = {"name": "own", "master": {}}
SHARED: dict[str, t.Any] = {"name": "shared", "master": {"address": "10.0.0.1"}}
STORES = {"name": "shared", "master": {"address": "10.0.0.1", "run": False}}
FILES = {"name": "files", "engine": "filesystem", "tiers": []}


@pytest.mark.parametrize(
    ("pools", "turn"),
    [
        ([], "then"),
        ([HERE, FILES, {"name": "gone", "state": "absent"}, {"name": "b", "master": {"address": "127.0.0.1"}}], "then"),
        ([STORES, HERE], "then"),
        ([{**STORES, "state": "drained"}], "then"),
        ([SHARED, STORES], "first"),
        ([{**SHARED, "state": "absent"}, HERE], "last"),
        ([{**SHARED, "state": "drained", "engine": None}], "last"),
        ([{**SHARED, "state": "absent"}, {**SHARED, "name": "next", "state": None}], "then"),
    ],
)
def test_a_hosts_turn_is_that_of_its_masters(pools: list[dict[str, t.Any]], turn: str) -> None:
    assert FILTERS["kv_turn"](pools) == turn
