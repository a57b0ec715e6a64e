# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checker finds each kind of fault."""

from __future__ import annotations

import itertools
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Cluster, Node, Seat
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_change import place
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_check import (
    Judgement,
    cluster_of,
    judge,
    touched,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import (
    CHAINS,
    TABLE,
    Table,
    parse,
    render,
)

NODES = Cluster(tuple(Node(10001 + number, 4, 6) for number in range(7)), 3)


def made(cluster: Cluster = NODES) -> list[Chain]:
    """A good table."""
    return place(cluster, [], 1, 16, 9, [], [], False).chains


def table_of(chains: t.Sequence[Chain]) -> Table:
    """As it is read from files."""
    files = render(chains, False, 1, [])
    return parse("/x", files[CHAINS], files[TABLE])


def broken(judgement: Judgement) -> list[int]:
    return [invariant.number for invariant in judgement.broken]


def upstream(nodes: int, disks: int) -> list[Chain]:
    """What gen_chain_table.py makes of all triples: ascending nodes, one disk index in a chain, disk by disk."""
    chains = []
    for disk in range(disks):
        rank = dict.fromkeys(range(nodes), 0)
        for group, members in enumerate(itertools.combinations(range(nodes), 3), 1):
            seats = []
            for node in members:
                rank[node] += 1
                seats.append(Seat(10001 + node, disk, rank[node]))
            chains.append(Chain((9000 + disk + 1) * 100000 + group, seats))
    return chains


def test_a_good_table_has_all_nine() -> None:
    judgement = judge(table_of(made()), False, 3, NODES)
    assert [invariant.name for invariant in judgement.invariants] == [
        "chains",
        "targets",
        "ids",
        "pairs",
        "recovery",
        "rebuild",
        "positions",
        "stripes",
        "tenants",
    ]
    assert judgement.broken == []
    assert judgement.quality["pairs"] == pytest.approx(1)
    assert judgement.quality["recovery"] == pytest.approx(judgement.quality["recovery_bound"])


def test_nodes_are_derived_from_the_targets() -> None:
    chains = made()
    assert cluster_of(chains) == NODES
    assert judge(table_of(chains)).broken == []


def test_upstreams_skew_is_seen() -> None:
    judgement = judge(table_of(upstream(5, 16)), False, 3)
    assert broken(judgement) == [6, 7, 8]
    assert judgement.quality["pairs"] == pytest.approx(1)
    assert judgement.quality["heads_per_node_max"] == 96 and judgement.quality["heads_per_node_min"] == 0
    texts = " ".join(invariant.text for invariant in judgement.broken)
    assert "any disk is rebuilt from 4 of 12 possible disks at least" in texts
    assert "160 of 160 chains have one disk index on all nodes" in texts


def test_two_targets_on_one_node() -> None:
    chains = made()
    first, second = (
        chains[0].seats[0],
        next(chain for chain in chains if chain.seats[0].node == chains[0].seats[1].node),
    )
    chains[0].seats[0], second.seats[0] = second.seats[0], first
    judgement = judge(table_of(chains), False, 3, NODES)
    assert 1 in broken(judgement)
    assert f"chain {chains[0].id} has two targets on one node" in judgement.lines()[0]


def test_two_targets_in_one_failure_domain() -> None:
    racks = Cluster(tuple(Node(node.id, 4, 6, "a" if node.id < 10003 else str(node.id)) for node in NODES.nodes), 3)
    judgement = judge(table_of(made()), False, 3, racks)
    assert broken(judgement)[0] == 1
    assert "two targets in one failure domain" in judgement.lines()[0]


def test_chains_of_different_lengths() -> None:
    chains = made()
    chains[0].seats.pop()
    judgement = judge(table_of(chains), False, 3, NODES)
    assert "has 2 targets instead of 3" in judgement.lines()[0]
    assert broken(judgement)[:2] == [1, 2]


def test_a_disk_with_too_many_targets_and_one_twice() -> None:
    chains = made()
    chains[0].seats[0] = chains[1].seats[0]
    lines = judge(table_of(chains), False, 3, NODES).lines()
    assert "2 targets: NOT OK: disk" in lines[1]


def test_a_disk_that_no_node_has() -> None:
    chains = made()
    chains[0].seats[0] = chains[0].seats[0]._replace(disk=4)
    judgement = judge(table_of(chains), False, 3, NODES)
    assert {2, 3} <= set(broken(judgement))
    assert "names disk 4 of node" in judgement.lines()[2]


def test_ids_out_of_range() -> None:
    judgement = judge(Table({4300100001: (101000100100,), 900100000: (101000100001,)}, [4300100001, 900100000]))
    assert "chain id 4300100001 is out of range" in judgement.lines()[2]
    assert "target id 101000100100 does not follow the formula" in judgement.lines()[2]


def test_nodes_that_meet_too_often() -> None:
    nodes = Cluster(tuple(Node(10001 + number, 4, 6) for number in range(9)), 3)
    chains = [
        Chain(
            900100001 + 24 * part + number,
            [Seat(10001 + 3 * part + seat, number // 6, number % 6 + 1) for seat in range(3)],
        )
        for part in range(3)
        for number in range(24)
    ]
    judgement = judge(table_of(chains), False, 3, nodes)
    assert {4, 5} <= set(broken(judgement))
    assert judgement.quality["meetings_min"] == 0
    assert judgement.quality["recovery"] == pytest.approx(4)  # 24 chains with each of two peers, of eight


def test_fewer_chains_than_a_stripe() -> None:
    judgement = judge(table_of(made()), False, 3, NODES, stripe=57)
    assert broken(judgement) == [8]
    assert "56 chains are fewer than the 57 of a stripe" in judgement.lines()[7]


def test_tenants_that_share_a_target() -> None:
    table = table_of(made())
    judgement = judge(table, False, 3, NODES, others={"/other": Table({1: table.chains[table.order[0]]}, [1])})
    assert broken(judgement) == [9]
    assert "/other has 3 of the same targets" in judgement.lines()[8]


def test_many_problems_are_shown_in_part() -> None:
    text = judge(table_of(upstream(5, 16)), False, 3).invariants[6].text
    assert text.count(";") == 3 and text.endswith("more")


def test_a_stripe_is_not_blamed_for_nodes_with_too_few_chains_to_be_in_each() -> None:
    rows = [
        [Seat(1, 0, n), Seat(2 + n % 8, 0, n // 8)] for n in range(1, 33)
    ]  # node 1 in all chains, 2 to 9 in 4 of 32
    table = table_of([Chain(900100000 + n, seats) for n, seats in enumerate(rows, 1)])
    assert touched(table, 4) == {"node": (5, 5), "disk": (5, 5)}
    assert touched(table, 16) == {"node": (9, 9), "disk": (9, 9)}
