# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks, positions and order of chains."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Seat
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_seats import (
    UNSEEN,
    assign_disks,
    balance_positions,
    order,
)


def chains_of(nodes: int, count: int, replicas: int = 3, seed: int = 1) -> list[Chain]:
    """Chains of random nodes, each in count * replicas / nodes of them, without disks."""
    rng = random.Random(seed)
    chains = [[(number * replicas + seat) % nodes for seat in range(replicas)] for number in range(count)]
    for chain in chains:
        rng.shuffle(chain)
    return [Chain(0, [Seat(node, UNSEEN, 0) for node in chain]) for chain in chains]


def placed(nodes: int, disks: int, targets: int, replicas: int = 3) -> list[Chain]:
    """The same with disks."""
    chains = chains_of(nodes, nodes * disks * targets // replicas, replicas)
    assign_disks(chains, {(node, disk): targets for node in range(nodes) for disk in range(disks)}, 1)
    return chains


def test_each_disk_gets_what_it_has_room_for() -> None:
    chains = chains_of(4, 12)
    free = {(node, disk): disk + 2 for node in range(4) for disk in range(3)}
    assign_disks(chains, free, 1)
    assert Counter(seat[:2] for chain in chains for seat in chain.seats) == free


def test_disks_that_are_taken_stay() -> None:
    chains = [Chain(1, [Seat(0, 1, 4), Seat(1, UNSEEN, 0)])]
    assign_disks(chains, {(0, 0): 1, (1, 0): 0, (1, 1): 1}, 1)
    assert chains[0].seats == [Seat(0, 1, 4), Seat(1, 1, 0)]


def test_disk_indices_are_mixed_and_a_failed_disk_is_rebuilt_from_as_many_as_possible() -> None:
    chains = placed(5, 16, 6)
    assert all(len({seat.disk for seat in chain.seats}) == 3 for chain in chains)
    pairs = Counter(
        frozenset((one[:2], other[:2]))
        for chain in chains
        for one in chain.seats
        for other in chain.seats
        if one < other
    )
    assert max(pairs.values()) == 1


@pytest.mark.parametrize("replicas", [2, 3, 4, 5])
def test_heads_and_tails_are_even_over_disks_and_nodes(replicas: int) -> None:
    chains = placed(10, 6, 5, replicas)
    before = [set(chain.seats) for chain in chains]
    balance_positions(chains)
    assert [set(chain.seats) for chain in chains] == before
    for position in range(replicas):
        for width, even in ((1, 30 / replicas), (2, 5 / replicas)):
            load = Counter(chain.seats[position][:width] for chain in chains)
            size = {seat[:width] for chain in chains for seat in chain.seats}
            assert all(abs(load[item] - even) < 1 + 1e-9 for item in size)


def test_what_is_even_stays_as_it_is() -> None:
    chains = placed(9, 4, 6)
    balance_positions(chains)
    before = [list(chain.seats) for chain in chains]
    balance_positions(chains)
    assert [chain.seats for chain in chains] == before


def test_heads_that_all_lie_on_one_node_are_spread() -> None:
    chains = [Chain(0, [Seat(0, n, 1), Seat(1, n, 1), Seat(2, n, 1)]) for n in range(6)]
    balance_positions(chains)
    assert Counter(chain.seats[0].node for chain in chains) == {0: 2, 1: 2, 2: 2}
    assert Counter(chain.seats[2].node for chain in chains) == {0: 2, 1: 2, 2: 2}


def test_a_stripe_touches_all_nodes_of_a_small_cluster() -> None:
    chains = placed(10, 16, 6)
    listed = order(chains, 16, 1)
    assert sorted(map(id, listed)) == sorted(map(id, chains))
    for start in range(len(listed)):
        run = [listed[(start + step) % len(listed)] for step in range(16)]
        assert len({seat.node for chain in run for seat in chain.seats}) == 10
        assert len({seat[:2] for chain in run for seat in chain.seats}) >= 38  # of 48


def test_no_chains_need_no_order() -> None:
    assert order([], 16, 1) == []
    balance_positions([])
