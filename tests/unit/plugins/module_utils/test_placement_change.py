# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes of a table: what moves, and how good it is afterwards."""

from __future__ import annotations

import copy
import typing as t
from collections import Counter

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Cluster, Node, Seat
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_change import Placement, place
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_check import judge
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import CHAINS, TABLE, parse, render
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused


def nodes(ids: t.Iterable[int], disks: int = 4, targets: int = 6, replicas: int = 3) -> Cluster:
    return Cluster(tuple(Node(number, disks, targets) for number in ids), replicas)


def run(cluster: Cluster, existing: t.Sequence[Chain] = (), erasure: bool = False, seed: int = 1) -> Placement:
    """Place, and look that the result is valid and changed no chain but by its moves."""
    before = {chain.id: list(chain.seats) for chain in existing}
    done = place(cluster, copy.deepcopy(list(existing)), seed, 16, 9, [], [], erasure)
    files = render(done.chains, erasure, 1, [])
    judgement = judge(parse("/x", files[CHAINS], files[TABLE]), erasure, cluster.replicas, cluster)
    assert judgement.broken == [], judgement.lines()
    after = {chain.id: chain.seats for chain in done.chains}
    assert set(before) <= set(after)
    gone = Counter(seat for number, seats in before.items() for seat in seats if seat not in after[number])
    assert gone == Counter(move.old for move in done.moves)
    assert done.moves == [] or all(move.new != move.old for move in done.moves)
    return done


def held(chains: t.Iterable[Chain], ids: t.Container[int]) -> Counter[int]:
    """Targets by node of chains with these ids."""
    return Counter(seat.node for chain in chains if chain.id in ids for seat in chain.seats)


@pytest.mark.parametrize(("old", "new"), [(5, 6), (10, 11), (20, 22), (8, 12)])
def test_new_nodes_take_their_share_and_nothing_else_moves(old: int, new: int) -> None:
    first = run(nodes(range(1, old + 1)))
    second = run(nodes(range(1, new + 1)), first.chains)
    assert len(second.moves) == second.least == (new - old) * (old * 24 // new)  # no new node can be even with less
    assert all(move.new.node > old for move in second.moves)
    share = held(second.chains, {chain.id for chain in first.chains})  # existing data is even over all nodes
    assert max(share.values()) - min(share.values()) <= 1


@pytest.mark.parametrize("kinds", [[(100, 16), (1, 8)], [(31, 16), (30, 12), (32, 8)]])
def test_nodes_that_leave_no_symmetry_come_to_a_design_of_the_others(kinds: list[tuple[int, int]]) -> None:
    disks = [each for count, each in kinds for _node in range(count)]
    made = run(Cluster(tuple(Node(number, each, 6) for number, each in enumerate(disks, 1)), 3))
    assert made.moves == [] and made.least == 0
    files = render(made.chains, False, 1, [])
    assert judge(parse("/x", files[CHAINS], files[TABLE]), False, 3).quality["pairs"] < 1.03
    assert {seat.target for chain in made.chains for seat in chain.seats} == set(range(1, 7))


def test_a_node_that_goes_moves_only_its_own_targets() -> None:
    first = run(nodes(range(1, 12)))
    second = run(nodes(range(1, 11)), first.chains)
    assert len(second.moves) == second.least == 24
    assert {move.old.node for move in second.moves} == {11}
    assert len(second.chains) == len(first.chains)  # they hold data, so disks carry 6 or 7 targets now
    assert set(Counter(seat[:2] for chain in second.chains for seat in chain.seats).values()) == {6, 7}


def test_a_replaced_node_hands_all_over_to_the_new_one() -> None:
    first = run(nodes(range(1, 8)))
    second = run(nodes([1, 2, 3, 4, 5, 6, 99]), first.chains)
    assert len(second.moves) == second.least == 24
    assert {(move.old.node, move.new.node) for move in second.moves} == {(7, 99)}


def test_more_disks_in_one_node() -> None:
    first = run(nodes(range(1, 9), disks=3))
    grown = Cluster(tuple(Node(number, 6 if number == 1 else 3, 6) for number in range(1, 9)), 3)
    second = run(grown, first.chains)
    assert len(second.moves) <= 1.1 * second.least
    assert {(1, 3), (1, 4), (1, 5)} <= {move.new[:2] for move in second.moves}


def test_more_targets_on_a_disk_move_nothing() -> None:
    first = run(nodes(range(1, 8), targets=3))
    second = run(nodes(range(1, 8), targets=6), first.chains)
    assert second.moves == []
    assert len(second.chains) == 2 * len(first.chains)


def test_the_same_nodes_change_nothing() -> None:
    first = run(nodes(range(1, 8)))
    second = run(nodes(range(1, 8)), first.chains, seed=7)
    assert second.chains == first.chains and second.moves == [] and second.least == 0


def test_growth_step_by_step_stays_good() -> None:
    chains: list[Chain] = []
    for count in (5, 6, 7, 9, 10):
        chains = run(nodes(range(1, count + 1)), chains).chains


def test_targets_that_were_left_do_not_come_back_under_the_same_id() -> None:
    first = run(nodes(range(1, 6)))
    second = run(nodes(range(1, 7)), first.chains)
    gone = {move.old for move in second.moves}
    assert gone and not gone & {seat for chain in second.chains for seat in chain.seats}


def test_failure_domains_that_are_declared_later_move_what_violates_them() -> None:
    first = run(nodes(range(1, 10)))
    racks = Cluster(tuple(Node(number, 4, 6, f"rack{number % 4}") for number in range(1, 10)), 3)
    second = run(racks, first.chains)
    assert second.moves


def test_erasure_coding_groups_keep_the_slot_of_each_target() -> None:
    first = run(nodes(range(1, 9), replicas=4), erasure=True)
    second = run(nodes(range(1, 10), replicas=4, targets=8), first.chains, erasure=True)
    before = {chain.id: chain.seats for chain in first.chains}
    for chain in second.chains:
        for slot, (old, new) in enumerate(zip(before.get(chain.id, []), chain.seats)):
            moved = [move for move in second.moves if move.chain == chain.id + slot]
            assert [(move.old, move.new) for move in moved] == ([] if old == new else [(old, new)])


def test_other_tables_on_the_same_disks_are_left_alone() -> None:
    first = place(nodes(range(1, 6)), [], 1, 16, 9, [], [], False).chains
    seats = [seat for chain in first for seat in chain.seats]
    second = place(nodes(range(1, 6)), [], 1, 16, 9, seats, {chain.id for chain in first}, False).chains
    assert not {seat for chain in second for seat in chain.seats} & set(seats)
    assert not {chain.id for chain in second} & {chain.id for chain in first}


def test_a_hundredth_target_on_a_disk_is_refused() -> None:
    taken = [Seat(1, 0, target) for target in range(1, 95)]
    with pytest.raises(Refused) as refused:
        place(nodes(range(1, 4), disks=1), [], 1, 6, 9, taken, [], False)
    assert refused.value.option == "targets_per_disk"
    assert "disk 0 of node 1 would need target 100" in refused.value.problem


def test_the_same_seed_makes_the_same_change() -> None:
    first = run(nodes(range(1, 7)))
    assert run(nodes(range(1, 9)), first.chains).chains == run(nodes(range(1, 9)), first.chains).chains
