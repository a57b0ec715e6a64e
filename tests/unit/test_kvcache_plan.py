# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the playbook that plans KV-cache pools says of them, and what it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _pooldecl
from ansible_collections.agentfleet.metal.tests.unit.role_lab import HERE

TOKEN = "never-to-be-printed"
DRAM = {"medium": "dram", "size": "1TiB"}
POOLS: list[dict[str, t.Any]] = [
    {"name": "plain", "model": "Llama-3.1-70B", "tensor_parallel": 16, "tiers": [DRAM], "engine": None},
    {
        "name": "small",
        "model": "Qwen3-8B",
        "dtype": "int4",
        "group_size": 128,
        "scale_dtype": "fp32",
        "zero_point": True,
        "eviction_high_watermark": 0.5,
        "page_tokens": 32,
        "tiers": [DRAM],
        "tenants": [{"name": "red", "quota": "1GiB", "token": TOKEN}],
    },
    {"name": "bare", "bytes_per_token": 4096, "model": None, "tensor_parallel": 2, "tiers": [DRAM]},
    {"name": "unknown", "tiers": [DRAM]},
]


@pytest.fixture(scope="module")
def output() -> str:
    """What is printed with -v, the files of all connectors included."""
    variables = {
        "kvcache_hosts": "localhost",
        "kvcache_render": True,
        "kvcache_load": {"users": 10, "tokens": 1024},
        "kvcache_pools": POOLS,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from ansible.cli.playbook import main; main()", "-v", "--inventory", "localhost,"),
            *("--connection", "local", "--extra-vars", json.dumps(variables), str(HERE / "playbooks/kvcache_plan.yml")),
        ],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(HERE.parents[2]), "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_no_token_is_printed(output: str) -> None:
    assert "can serve sglang-mooncake" in output and "mooncake.json" in output
    assert TOKEN not in output


def test_every_pool_is_planned_as_it_is_declared(output: str) -> None:
    for wish in POOLS:
        pool = _pooldecl.declare("pools[0]", wish["name"], wish, lambda path: "")
        tokens, per_token = pool["page_tokens"], pool["bytes_per_token"]
        block = f"one block: {tokens} tokens x {per_token:,} B = {tokens * per_token:,} B"
        assert (block in output) == bool(per_token)
    assert "x 1 replicas / 0.5 usable" in output and "x 1 replicas / 0.95 usable" in output
    assert output.count("a capacity of 1,024 GiB holds") == 3
    assert "not planned: the pool says neither its model nor bytes_per_token" in output
