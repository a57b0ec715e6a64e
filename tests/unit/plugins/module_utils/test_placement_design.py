# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Designs and bounds of data placement."""

from __future__ import annotations

import itertools
import typing as t
from collections import Counter

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import (
    Cluster,
    Node,
    apportion,
    bound,
    fair_meetings,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_design import design, wrap_around


def cluster(*kinds: tuple[int, int, int], replicas: int = 3, domains: int = 0) -> Cluster:
    """Nodes by kind: how many, disks, targets on each disk; in turn in so many failure domains."""
    nodes: list[Node] = []
    for count, disks, targets in kinds:
        for _node in range(count):
            domain = f"rack{len(nodes) % domains}" if domains else ""
            nodes.append(Node(10001 + len(nodes), disks, targets, domain))
    return Cluster(tuple(nodes), replicas)


def meetings(nodes: Cluster, chains: t.Sequence[t.Sequence[int]]) -> dict[tuple[int, int], int]:
    """How often any two nodes of different domains share a chain, after a look that the chains are valid."""
    domains = nodes.domains()
    used = Counter(node for chain in chains for node in chain)
    assert [used[node] for node in range(len(nodes.nodes))] == [node.slots for node in nodes.nodes]
    assert all(len({domains[node] for node in chain}) == nodes.replicas for chain in chains)
    count = Counter(pair for chain in chains for pair in itertools.combinations(sorted(chain), 2))
    pairs = itertools.combinations(range(len(domains)), 2)
    return {pair: count[pair] for pair in pairs if domains[pair[0]] != domains[pair[1]]}


def quality(nodes: Cluster, chains: t.Sequence[t.Sequence[int]]) -> float:
    """The sum of squares over the least possible one."""
    slots = [node.slots for node in nodes.nodes]
    factors = fair_meetings(slots, nodes.domains(), nodes.replicas)
    squares = sum(2 * count**2 / (factors[i] * factors[j]) for (i, j), count in meetings(nodes, chains).items())
    return squares / bound(slots, nodes.domains(), nodes.replicas).squares


@pytest.mark.parametrize(
    ("nodes", "each"),
    [
        pytest.param(cluster((7, 1, 3)), 1, id="the Fano plane, a difference set"),
        pytest.param(cluster((13, 1, 4), replicas=4), 1, id="the projective plane of order 3"),
        pytest.param(cluster((9, 1, 4)), 1, id="the affine plane of order 3"),
        pytest.param(cluster((25, 1, 6), replicas=5), 1, id="the affine plane of order 5"),
        pytest.param(cluster((15, 1, 7)), 1, id="a Steiner triple system, upstream's hardest case"),
        pytest.param(cluster((9, 1, 3), domains=3), 1, id="a transversal design, that is, a Latin square"),
        pytest.param(cluster((5, 16, 6)), 48, id="five nodes of 16 disks"),
        pytest.param(cluster((97, 16, 6)), 2, id="a difference family in which each difference occurs twice"),
    ],
)
def test_all_pairs_meet_equally_often_where_a_design_exists(nodes: Cluster, each: int) -> None:
    assert set(meetings(nodes, design(nodes, 0)).values()) == {each}


def test_200_nodes_of_16_disks_meet_at_most_once() -> None:
    nodes = cluster((200, 16, 6))  # each node meets 192 of its 199 peers: greedy search ends with many pairs twice
    assert Counter(meetings(nodes, design(nodes, 0)).values()) == {1: 19200, 0: 700}


@pytest.mark.parametrize("replicas", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [5, 6, 8, 11, 16, 23, 30])
def test_equal_nodes_meet_equally_often_within_one(count: int, replicas: int) -> None:
    nodes = cluster((count, 12, 5), replicas=replicas)
    found = meetings(nodes, design(nodes, 3)).values()
    assert max(found) - min(found) <= 1


def test_slots_that_are_no_multiple_of_the_replicas_still_balance() -> None:
    nodes = cluster((21, 5, 4))  # 20 slots of a node are not whole orbits of base blocks: three orbits of Z_7 are
    found = meetings(nodes, design(nodes, 0)).values()
    assert (min(found), max(found)) == (2, 2)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(cluster((10, 16, 6), (10, 10, 6)), id="disks"),
        pytest.param(cluster((7, 12, 6), (5, 12, 12)), id="weights"),
        pytest.param(cluster((6, 4, 6), (3, 8, 6), (2, 5, 12)), id="three kinds"),
        pytest.param(cluster((17, 6, 6), domains=4), id="domains of different sizes"),
        pytest.param(cluster((12, 8, 6), (12, 4, 6), domains=6), id="alike domains of unequal nodes"),
        pytest.param(cluster((24, 1, 6), (23, 1, 3)), id="fewer meetings than peers"),
    ],
)
def test_unequal_clusters_are_within_five_percent_of_the_bound(nodes: Cluster) -> None:
    assert quality(nodes, design(nodes, 0)) < 1.05


def test_erasure_coding_groups() -> None:
    nodes = cluster((24, 4, 5), replicas=10)
    found = meetings(nodes, design(nodes, 0)).values()
    assert max(found) - min(found) <= 1


def test_a_node_that_is_in_every_chain() -> None:
    nodes = cluster((1, 12, 4), (4, 6, 4))  # 48 of 144 targets
    assert all(0 in chain for chain in design(nodes, 0))
    meetings(nodes, wrap_around(nodes))


def test_one_replica_uses_every_target_once() -> None:
    nodes = cluster((3, 2, 2), replicas=1)
    assert sorted(design(nodes, 0)) == [[0]] * 4 + [[1]] * 4 + [[2]] * 4


def test_the_same_seed_makes_the_same_chains() -> None:
    nodes = cluster((5, 4, 6), (2, 2, 6))
    assert design(nodes, 5) == design(nodes, 5)
    assert design(nodes, 5) != design(nodes, 6)


@pytest.mark.parametrize(("count", "disks"), [(5, 16), (10, 16), (15, 1), (20, 16), (200, 16)])
def test_the_bound_is_the_closed_form_for_equal_nodes(count: int, disks: int) -> None:
    slots, replicas = disks * 6, 3
    pairs, total = count * (count - 1) // 2, count * slots // replicas * 3
    each, rest = divmod(total, pairs)
    closed = (pairs - rest) * each**2 + rest * (each + 1) ** 2
    found = bound([slots] * count, range(count), replicas)
    mean = slots * (replicas - 1) / (count - 1)
    assert found.squares == pytest.approx(2 * closed / mean)
    assert found.recovery == pytest.approx(-(-slots * (replicas - 1) // (count - 1)) / mean)


def all_tables(slots: t.Sequence[int], domains: t.Sequence[int], replicas: int) -> t.Iterator[list[tuple[int, ...]]]:
    """Each set of chains that uses all slots and keeps domains apart."""
    chains = [
        chain
        for chain in itertools.combinations(range(len(slots)), replicas)
        if len({domains[node] for node in chain}) == replicas
    ]

    def more(first: int, left: list[int]) -> t.Iterator[list[tuple[int, ...]]]:
        if not any(left):
            yield []
        for number in range(first, len(chains)):
            if all(left[node] for node in chains[number]):
                rest = [count - (node in chains[number]) for node, count in enumerate(left)]
                yield from ([chains[number], *others] for others in more(number, rest))

    return more(0, list(slots))


@pytest.mark.parametrize(
    ("slots", "domains", "replicas", "loose"),
    [
        pytest.param([3, 3, 3, 3, 3], [0, 1, 2, 3, 4], 3, 1, id="equal nodes"),
        pytest.param([2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5], 3, 1, id="fewer meetings than peers"),
        pytest.param([4, 3, 2, 2, 1], [0, 1, 2, 3, 4], 3, 1, id="unequal nodes"),
        pytest.param([4, 4, 2, 2, 1, 1], [0, 1, 2, 3, 4, 5], 2, 1, id="pairs of unequal nodes"),
        pytest.param([2, 2, 2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3], 4, 1.17, id="alike racks"),
        pytest.param([1, 2, 2, 1, 3, 3], [0, 0, 1, 1, 2, 3], 3, 1.0001, id="unequal racks"),
    ],
)
def test_no_table_at_all_beats_the_bound(slots: list[int], domains: list[int], replicas: int, loose: float) -> None:
    """All tables are tried; ``loose`` is how far the bound is from the best of them."""
    factors, least = fair_meetings(slots, domains, replicas), bound(slots, domains, replicas)
    nodes = range(len(slots))
    best_squares = best_recovery = float("inf")
    for chains in all_tables(slots, domains, replicas):
        met = Counter(pair for chain in chains for pair in itertools.permutations(chain, 2))
        squares = sum(count**2 / (factors[i] * factors[j]) for (i, j), count in met.items())
        best_squares = min(best_squares, squares)
        worst = 0.0
        for failed in nodes:
            peers = [node for node in nodes if domains[node] != domains[failed]]
            mean = slots[failed] * (replicas - 1) / sum(slots[peer] for peer in peers)
            worst = max(worst, *(met[failed, peer] / slots[peer] / mean for peer in peers))
        best_recovery = min(best_recovery, worst)
    assert least.squares * (1 - 1e-9) <= best_squares <= loose * least.squares * (1 + 1e-9)
    assert least.recovery * (1 - 1e-9) <= best_recovery <= 2 * least.recovery


def test_fair_meetings_sum_up_to_what_each_node_has() -> None:
    slots, domains = [96, 96, 60, 60, 60, 24], [0, 0, 1, 2, 3, 4]
    factors = fair_meetings(slots, domains, 3)
    for node, count in enumerate(slots):
        met = sum(factors[node] * factors[peer] for peer in range(6) if domains[peer] != domains[node])
        assert met == pytest.approx(2 * count, rel=2e-3)


def test_apportion_rounds_in_favour_of_who_holds_more() -> None:
    assert apportion(10, [1, 1, 1], [0, 0, 9]) == [3, 3, 4]
    assert apportion(7, [2, 1, 1], [0, 2, 0]) == [3, 2, 2]
    assert apportion(4, [1, 1], [4, 0]) == [2, 2]
