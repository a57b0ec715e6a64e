# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the chains of a cluster, or change those that it has so that the fewest targets move.

Chains hold data, so none is ever dropped. When nodes come, each old disk hands over what is above its fair share of
the existing chains, and new chains take the rest of the room; when nodes go, only their targets move.
"""

from __future__ import annotations

import typing as t
from collections import Counter
from dataclasses import dataclass, field, replace

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import (
    Chain,
    Cluster,
    Seat,
    apportion,
    fair_meetings,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_design import Blocks, Place, core, design
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import GROUPS, INDICES, chain_id
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_seats import (
    UNSEEN,
    Disk,
    assign_disks,
    balance_positions,
    order,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

ROUNDS, STEPS_OF_A_SEAT, STEPS, REPAIRS = 3, 20, 30_000, 20_000  # of the search


class Move(t.NamedTuple):
    """A target of an existing chain that another disk takes over."""

    chain: int
    old: Seat
    new: Seat


@dataclass
class Placement:
    """Chains in the order of the table; what moves to get there, and what had to move at least."""

    chains: list[Chain]
    moves: list[Move] = field(default_factory=list)
    least: int = 0


def disk_shares(cluster: Cluster, total: int, held: t.Mapping[Disk, int]) -> dict[Disk, int]:
    """Each disk's whole share of ``total`` targets; a rounding goes to who holds more already."""
    present = [[held.get((node.id, disk), 0) for disk in range(node.disks)] for node in cluster.nodes]
    by_node = apportion(total, [node.slots for node in cluster.nodes], [sum(counts) for counts in present])
    return {
        (node.id, disk): share
        for node, whole, counts in zip(cluster.nodes, by_node, present)
        for disk, share in enumerate(apportion(whole, [1] * node.disks, counts))
    }


def place(
    cluster: Cluster,
    existing: t.Sequence[Chain],
    seed: int,
    stripe: int,
    prefix: int,
    reserved: t.Iterable[Seat],
    reserved_chains: t.Collection[int],
    erasure: bool,
    ordered: bool = True,
) -> Placement:
    """Chains for all targets of the cluster.

    :param existing: the chains that there are, in the order of their table
    :param stripe: as many consecutive chains of the table shall touch many nodes and disks
    :param reserved: targets of other tables; their indices are not used
    :param reserved_chains: ids of chains of other tables
    :param ordered: whether the order of the existing chains is good, and stays when they do
    """
    held = Counter(seat[:2] for chain in existing for seat in chain.seats)
    number = max(cluster.slots // cluster.replicas, len(existing))
    final = disk_shares(cluster, number * cluster.replicas, held)
    shares = disk_shares(cluster, len(existing) * cluster.replicas, held)  # of the existing chains, which hold the data
    if existing:
        chains = _changed(cluster, existing, number, final, shares, seed)
    else:
        chains = [Chain(0, [Seat(node, UNSEEN, 0) for node in members]) for members in _new(cluster, seed)]
    kept = Counter(seat[:2] for chain in chains for seat in chain.seats if seat.disk != UNSEEN)
    assign_disks(chains, {disk: share - kept[disk] for disk, share in final.items()}, seed)
    if not erasure:  # each target of a group is a chain by itself, and would move
        balance_positions(chains)
    taken = [*reserved, *(seat for chain in existing for seat in chain.seats)]
    _number_targets(chains, taken)
    _number_chains(chains, prefix, {*reserved_chains, *_ids_of(existing, erasure)}, cluster.replicas if erasure else 1)
    if not (ordered and chains == list(existing)):
        chains = order(chains, max(1, stripe // cluster.replicas) if erasure else stripe, seed)
    moves = _moves({chain.id: chain.seats for chain in existing}, chains, erasure)
    return Placement(chains, moves, sum(max(0, count - shares.get(disk, 0)) for disk, count in held.items()))


def _ids_of(chains: t.Sequence[Chain], erasure: bool) -> set[int]:
    return {chain.id + slot for chain in chains for slot in range(len(chain.seats) if erasure else 1)}


def _moves(before: t.Mapping[int, t.Sequence[Seat]], chains: t.Sequence[Chain], erasure: bool) -> list[Move]:
    """Targets of existing chains that are replaced. Only in an EC group does it matter which takes whose place."""
    moves = []
    for chain in chains:
        old = before.get(chain.id, [])
        if erasure:
            pairs = [(slot, pair) for slot, pair in enumerate(zip(old, chain.seats)) if pair[0] != pair[1]]
        else:
            gone = [seat for seat in old if seat not in chain.seats]
            pairs = [(0, pair) for pair in zip(gone, [seat for seat in chain.seats if seat not in old])]
        moves += [Move(chain.id + slot, *pair) for slot, pair in pairs]
    return moves


def _new(cluster: Cluster, seed: int) -> list[list[int]]:
    """Ids of the nodes of new chains: a design, or one of most nodes to which the others come as in a change."""
    heart = core(cluster)
    first = [[(heart or cluster).nodes[point].id for point in members] for members in design(heart or cluster, seed)]
    if heart is None:
        return first
    whole = Cluster(tuple(replace(node, disks=1, targets=node.slots) for node in cluster.nodes), cluster.replicas)
    chains = [Chain(number, [Seat(node, 0, 1) for node in members]) for number, members in enumerate(first)]
    held = Counter(seat[:2] for chain in chains for seat in chain.seats)
    number = cluster.slots // cluster.replicas
    final, shares = (disk_shares(whole, count * cluster.replicas, held) for count in (number, len(chains)))
    return [[seat.node for seat in chain.seats] for chain in _changed(whole, chains, number, final, shares, seed)]


def _changed(
    cluster: Cluster,
    existing: t.Sequence[Chain],
    number: int,
    final: t.Mapping[Disk, int],
    shares: t.Mapping[Disk, int],
    seed: int,
) -> list[Chain]:
    """The existing chains and as many new ones as make ``number``; a seat that changed its node or disk has no disk."""
    points = {node.id: point for point, node in enumerate(cluster.nodes)}
    domains = cluster.domains()
    after = Counter[int]()
    for (node, _disk), share in final.items():
        after[points[node]] += share
    members = [[points[seat.node] if seat[:2] in shares else -1 for seat in chain.seats] for chain in existing]
    empty = {(block, seat) for block, row in enumerate(members) for seat, point in enumerate(row) if point < 0}
    for block, row in enumerate(members):
        for seat, point in enumerate(row):
            if point >= 0 and domains[point] in [domains[other] for other in row[:seat] if other >= 0]:
                row[seat] = -1
                empty.add((block, seat))
    blocks = Blocks(
        fair_meetings([after[point] for point in range(len(domains))], domains, cluster.replicas),
        domains,
        1,
        [*members, *([-1] * cluster.replicas for _block in range(number - len(existing)))],
        seed,
    )
    forced = sorted(empty)
    left, kept = _release(blocks, existing, shares, empty)
    holes = [*forced, *(place for place, _disk in left)]
    blocks.random.shuffle(holes)
    fresh = [(block, seat) for block in range(len(existing), number) for seat in range(cluster.replicas)]
    need = Counter[int]()
    for (node, _disk), share in shares.items():
        need[points[node]] += share
    rest = after - need
    need.subtract(point for row in blocks.blocks for point in row if point >= 0)
    for seats, slots in ((holes, need), (fresh, rest)):
        blocks.fill(seats, slots)
    for _round in range(ROUNDS):
        blocks.relocate(left, kept, min(STEPS, STEPS_OF_A_SEAT * len(left)))
        holes = [*forced, *(place for place, _disk in left)]
        for seats in (holes, fresh):
            blocks.improve(seats, min(STEPS, STEPS_OF_A_SEAT * len(seats)))
    empty = set(holes)
    clash = _repair(blocks, holes + fresh)
    if clash:
        raise Refused(
            "nodes",
            [existing[block].id if block < len(existing) else "new" for block in clash[:5]],
            "these chains could not be changed so that each has its targets in different failure domains",
            "Change nodes in smaller steps, or make a new table with discard_existing",
        )
    chains = []
    for block, row in enumerate(blocks.blocks):
        old = existing[block].seats if block < len(existing) else []
        nodes = [cluster.nodes[point].id for point in row]
        chains.append(
            Chain(
                existing[block].id if old else 0,
                [
                    old[seat]
                    if old and old[seat].node == node and (block, seat) not in empty
                    else Seat(node, UNSEEN, 0)
                    for seat, node in enumerate(nodes)
                ],
            )
        )
    return chains


def _release(
    blocks: Blocks, existing: t.Sequence[Chain], shares: t.Mapping[Disk, int], empty: t.Collection[Place]
) -> tuple[list[tuple[Place, int]], list[list[Place]]]:
    """Empty as many seats of each disk as it has above its share: where nodes meet most, and few of a chain.

    Returns these seats, each with the number of its disk, and for each disk the seats that it keeps.
    """
    sitting: dict[Disk, list[Place]] = {disk: [] for disk in shares}
    for block, chain in enumerate(existing):
        for seat, (node, disk, _target) in enumerate(chain.seats):
            if (block, seat) not in empty:
                sitting[node, disk].append((block, seat))
    losses = Counter(block for block, _seat in empty)
    left: list[tuple[Place, int]] = []

    def gain(place: Place) -> tuple[int, float]:
        row = blocks.blocks[place[0]]
        return -losses[place[0]], blocks.price(row[place[1]], row[: place[1]] + row[place[1] + 1 :])

    surplus = True
    while surplus:
        surplus = False
        for number, (owner, seats) in enumerate(sitting.items()):
            if len(seats) > shares[owner]:
                chosen = max(seats, key=gain)
                seats.remove(chosen)
                blocks.sit(*chosen, -1)
                losses[chosen[0]] += 1
                left.append((chosen, number))
                surplus = True
    return left, list(sitting.values())


def _repair(blocks: Blocks, seats: t.Sequence[Place]) -> list[int]:
    """Where a chain has two targets in one failure domain after all, let more and more others change too.

    Returns the blocks in which that did not help.
    """
    everything = [(block, seat) for block, row in enumerate(blocks.blocks) for seat in range(len(row))]
    for extra in (0, 64, 256, 1024, 4096, 16384):
        clash = _clash(blocks)
        if not clash:
            break
        blocks.random.shuffle(everything)
        wanted = {*everything[:extra], *(place for place in seats if place[0] in clash)}
        blocks.improve(sorted(wanted), REPAIRS)
    return _clash(blocks)


def _clash(blocks: Blocks) -> list[int]:
    """Blocks with two points of one failure domain."""
    domains = blocks.domains
    return [number for number, row in enumerate(blocks.blocks) if len({domains[point] for point in row}) < len(row)]


def _number_targets(chains: t.Sequence[Chain], taken: t.Iterable[Seat]) -> None:
    """Give new targets the lowest index of their disk that no target has or had."""
    used: dict[Disk, set[int]] = {}
    for seat in taken:
        used.setdefault(seat[:2], set()).add(seat.target)
    lowest: dict[Disk, int] = {}
    for chain in chains:
        for number, seat in enumerate(chain.seats):
            if seat.target:
                continue
            disk = seat[:2]
            index = lowest.get(disk, 1)
            while index in used.get(disk, ()):
                index += 1
            if index >= INDICES:
                raise Refused(
                    "targets_per_disk",
                    index,
                    f"disk {seat.disk} of node {seat.node} would need target {index}, and its id has two digits for it",
                    "Use fewer targets on a disk, or another target_id_prefix for this table",
                )
            lowest[disk] = index + 1
            chain.seats[number] = seat._replace(target=index)


def _number_chains(chains: t.Sequence[Chain], prefix: int, used: set[int], size: int) -> None:
    """Give new chains the lowest free group of their head's disk; an EC group has ``size`` successive ones."""
    lowest: dict[int, int] = {}
    for chain in chains:
        if chain.id:
            continue
        disk = chain.seats[0].disk
        group = lowest.get(disk, 1)
        while any(chain_id(prefix, disk, group + slot) in used for slot in range(size)):
            group += size
        if group + size > GROUPS:
            raise Refused(
                "nodes",
                len(chains),
                f"disk index {disk} would head chain {group}, and the id of a chain has five digits for it",
                "Use another chain_id_prefix, or several tables with fewer nodes each",
            )
        lowest[disk] = group + size
        chain.id = chain_id(prefix, disk, group)
