# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ids and files of chain tables."""

from __future__ import annotations

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Seat
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import (
    CHAINS,
    TABLE,
    TARGETS,
    chain_id,
    decode_chain,
    decode_target,
    parse,
    render,
    target_id,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

TWO = [
    Chain(900200001, [Seat(10002, 1, 1), Seat(10001, 0, 1)]),
    Chain(900100001, [Seat(10001, 0, 2), Seat(10002, 0, 1)]),
]


def test_ids_follow_upstreams_formulas() -> None:
    assert target_id(1, Seat(10001, 0, 1)) == 101000100101
    assert decode_target(101000100101) == (1, Seat(10001, 0, 1))
    assert chain_id(9, 0, 1) == 900100001
    assert decode_chain(900100001) == (9, 0, 1)
    assert decode_target(target_id(99, Seat(999999, 998, 99))) == (99, Seat(999999, 998, 99))


def test_files_are_those_of_upstream() -> None:
    files = render(TWO, False, 1, [])
    assert files[CHAINS] == (
        "ChainId,TargetId,TargetId\n900100001,101000100102,101000200101\n900200001,101000200201,101000100101\n"
    )
    assert files[TABLE] == "ChainId\n900200001\n900100001\n"
    assert files[TARGETS].splitlines()[0] == (
        "create-target --node-id 10002 --disk-index 1 --target-id 101000200201 --chain-id 900200001 --use-new-chunk-engine"
    )
    assert len(files[TARGETS].splitlines()) == 4


def test_chunk_sizes_are_named_for_each_target() -> None:
    lines = render(TWO, False, 1, [65536, 4194304])[TARGETS].splitlines()
    assert all(" --chunk-size 65536 4194304 --use-new-chunk-engine" in line for line in lines)


def test_a_group_is_successive_chains_of_one_target() -> None:
    files = render([Chain(900100004, [Seat(1, 0, 2), Seat(2, 0, 2), Seat(3, 1, 1)])], True, 1, [])
    assert files[TABLE] == "ChainId\n900100004\n900100005\n900100006\n"
    assert files[CHAINS].splitlines()[:2] == ["ChainId,TargetId", "900100004,100000100102"]
    assert parse("/x", files[CHAINS], files[TABLE]).groups(True, 3) == [
        Chain(900100004, [Seat(1, 0, 2), Seat(2, 0, 2), Seat(3, 1, 1)])
    ]


def test_what_was_written_is_read_again() -> None:
    files = render(TWO, False, 1, [])
    table = parse("/x", files[CHAINS], files[TABLE])
    assert table.problems == []
    assert table.groups(False, 0) == TWO


def test_files_that_do_not_agree_are_a_problem_and_no_error() -> None:
    table = parse("/x", "ChainId,TargetId\n1,5\n1,6\n2,7\n\n", "ChainId\n1\n3\n1\n")
    assert table.problems == [
        "chain 1 is defined twice",
        "the table names chain 3, which generated_chains.csv has not",
        "chain 2 is not in the table",
        "the table names a chain twice",
    ]
    assert table.order == [1]


@pytest.mark.parametrize(
    ("chains", "table", "text"),
    [
        ("Chain,Target\n", "ChainId\n", "/x/generated_chains.csv: the first line is 'Chain,Target'"),
        ("ChainId\n", "ChainId\n", "/x/generated_chains.csv: the first line is 'ChainId'"),
        ("ChainId,TargetId\n", "ChainId,TargetId\n", "/x/generated_chain_table.csv: the first line is"),
        ("ChainId,TargetId\n1,x\n", "ChainId\n", "generated_chains.csv, line 2: '1,x' has something else than numbers"),
    ],
)
def test_other_files_are_refused(chains: str, table: str, text: str) -> None:
    with pytest.raises(HostError) as error:
        parse("/x", chains, table)
    assert text in str(error.value)
