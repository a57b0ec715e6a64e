# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which disk of its node a target gets, which of a chain's targets is the head, and in which order chains are listed.

- Disks: exact numbers on each, disk indices mixed within a chain, and two disks share few chains, so that a failed
  disk is rebuilt from many.
- Positions: writes go to the head and pass to the tail, so each disk and each node has its part of both.
- Order: a file's stripe is a run of consecutive entries of the table, so a run touches many nodes and disks.
"""

from __future__ import annotations

import heapq
import math
import random
import typing as t
from collections import Counter, deque

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Seat

Disk = tuple[int, int]
UNSEEN = -1  # disk of a seat that has only a node yet
TRIES, ROUNDS = 12, 6  # partners that are tried for a target's disk, and how often
POOL = 48  # chains from which the next one of the table is chosen


def assign_disks(chains: t.Sequence[Chain], free: t.Mapping[Disk, int], seed: int) -> None:
    """Give each seat without a disk one of its node's; ``free`` are the targets that each disk can still take."""
    rng = random.Random(seed)
    turns: dict[int, list[tuple[int, float, int]]] = {}  # the fullest disks come last, others in turn
    for (node, disk), count in free.items():
        turns.setdefault(node, []).extend((-level, rng.random(), disk) for level in range(count))
    order = {node: iter(sorted(turn)) for node, turn in turns.items()}
    longest = max((len(chain.seats) for chain in chains), default=0)
    moving: dict[tuple[int, int], list[Chain]] = {}  # (node, position) -> chains whose disk there is free to choose
    for position in range(longest):
        for chain in chains:
            if position < len(chain.seats) and chain.seats[position].disk == UNSEEN:
                node = chain.seats[position].node
                chain.seats[position] = Seat(node, next(order[node])[2], 0)
                moving.setdefault((node, position), []).append(chain)
    _mix(chains, moving, rng)


def _mix(chains: t.Sequence[Chain], moving: t.Mapping[tuple[int, int], list[Chain]], rng: random.Random) -> None:
    """Exchange disks of one node and position until no chain has an index twice and no two disks share two chains."""
    movable = {(id(chain), position) for (_node, position), mates in moving.items() for chain in mates}
    shared: dict[tuple[Disk, Disk], int] = {}

    def pairs(chain: Chain, position: int) -> list[tuple[Disk, Disk]]:
        here = chain.seats[position][:2]
        others = [seat[:2] for seat in chain.seats if seat.node != here[0]]
        return [(here, other) if here < other else (other, here) for other in others]

    def meet(chain: Chain, position: int, sign: int) -> None:
        for pair in pairs(chain, position):
            shared[pair] = shared.get(pair, 0) + sign

    def price(chain: Chain, position: int) -> int:
        """What the target costs that is not counted in ``shared``: indices alike, and twice the chains shared already."""
        disk = chain.seats[position].disk
        alike = sum(seat.disk == disk for seat in chain.seats) - 1
        return alike + 2 * sum(shared.get(pair, 0) for pair in pairs(chain, position))

    def exchange(first: Chain, second: Chain, position: int) -> None:
        first.seats[position], second.seats[position] = second.seats[position], first.seats[position]

    for chain in chains:
        for position in range(len(chain.seats)):
            for pair in pairs(chain, position):
                shared[pair] = shared.get(pair, 0) + (pair[0] == chain.seats[position][:2])
    for _round in range(ROUNDS):
        work = [
            (chain, position)
            for chain in chains
            if len({seat.disk for seat in chain.seats}) < len(chain.seats)
            or any(shared[pair] > 1 for position in range(len(chain.seats)) for pair in pairs(chain, position))
            for position in range(len(chain.seats))
            if (id(chain), position) in movable
        ]
        if not work:
            break
        for first, position in work:
            mates = moving[first.seats[position].node, position]
            meet(first, position, -1)
            for _try in range(TRIES if price(first, position) else 0):
                second = mates[int(rng.random() * len(mates))]
                if second.seats[position].disk == first.seats[position].disk:
                    continue
                meet(second, position, -1)
                before = price(first, position) + price(second, position)
                exchange(first, second, position)
                after = price(first, position) + price(second, position)
                if after > before or (after == before and rng.random() < 0.5):
                    exchange(first, second, position)
                meet(second, position, 1)
                if price(first, position) == 0:
                    break
            meet(first, position, 1)


def balance_positions(chains: t.Sequence[Chain]) -> None:
    """Reorder targets within chains so that heads, tails and every other position are even over disks and nodes.

    A flow from chains over disks to nodes: with fractions each target could have an equal part of each position, so
    whole numbers within the roundings of that exist, and augmenting paths find them. What is even stays as it is.
    """
    longest = max((len(chain.seats) for chain in chains), default=0)
    for position in [0, *range(longest - 1, 1, -1)]:  # the head, then the tail and back to the third
        _Balance(chains, position, range(longest) if position == 0 else range(1, position + 1)).run()


class _Balance:
    """Choose one of the targets at ``choices`` of each chain for ``position``, evenly. Items are disks and nodes."""

    def __init__(self, chains: t.Sequence[Chain], position: int, choices: t.Iterable[int]) -> None:
        self.chains, self.position, self.choices = chains, position, list(choices)
        self.member: dict[Disk, list[int]] = {}
        self.disks: dict[int, list[Disk]] = {}
        self.load: Counter[Disk | int] = Counter()
        size: Counter[Disk | int] = Counter()
        for number, chain in enumerate(chains):
            for choice in self.choices:
                disk = chain.seats[choice][:2]
                if disk not in self.member:
                    self.disks.setdefault(disk[0], []).append(disk)
                self.member.setdefault(disk, []).append(number)
                size.update((disk, disk[0]))
            self.load.update((self.chosen(number), self.chosen(number)[0]))
        parts = len(self.choices)
        self.low = {item: count // parts for item, count in size.items()}
        self.high = {item: -(-count // parts) for item, count in size.items()}

    def chosen(self, number: int) -> Disk:
        """The disk that has the position in a chain."""
        return self.chains[number].seats[self.position][:2]

    def room(self, item: Disk | int, sign: int) -> bool:
        """Whether the load may grow (sign 1) or shrink (-1)."""
        return self.load[item] < self.high[item] if sign > 0 else self.load[item] > self.low[item]

    def run(self) -> None:
        """Move each load beyond its limits away; what is in the way of one may go with another, so try again."""
        moved = True
        while moved:
            moved = False
            items: list[Disk | int] = [*self.member, *self.disks]
            for item in items:
                for sign, limit in ((1, self.high[item]), (-1, self.low[item])):
                    while (self.load[item] - limit) * sign > 0 and self.shift(item, sign):
                        moved = True

    def shift(self, item: Disk | int, sign: int) -> bool:
        """Take one load from a disk or a node (sign 1), or bring it one (-1), along a shortest augmenting path."""
        starts = [item] if isinstance(item, tuple) else [disk for disk in self.disks[item] if self.room(disk, -sign)]
        came: dict[Disk, tuple[Disk | None, int]] = dict.fromkeys(starts, (None, -1))
        queue = deque(starts)
        while queue:
            disk = queue.popleft()
            if came[disk][0] is not None:
                home = isinstance(item, tuple) and disk[0] == item[0]  # the node's load stays
                if self.room(disk, sign) and (home or self.room(disk[0], sign)):
                    self.follow(came, disk, sign)
                    return True
                if self.room(disk, sign):  # the node is full, but another of its disks can pass one on
                    for other in self.disks[disk[0]]:
                        if other not in came and self.room(other, -sign):
                            came[other] = (disk, -1)
                            queue.append(other)
            for number in self.member[disk]:
                if (self.chosen(number) == disk) != (sign > 0):
                    continue
                seats = self.chains[number].seats
                for there in [seats[choice][:2] for choice in self.choices] if sign > 0 else [self.chosen(number)]:
                    if there not in came:
                        came[there] = (disk, number)
                        queue.append(there)
        return False

    def follow(self, came: t.Mapping[Disk, tuple[Disk | None, int]], disk: Disk, sign: int) -> None:
        """Carry out the path that ends at a disk."""
        path = []
        last, number = came[disk]
        while last is not None:
            path.append((last, number, disk))
            disk = last
            last, number = came[disk]
        for here, number, there in path:
            if number < 0:
                continue
            for place, change in ((here, -sign), (there, sign)):
                self.load[place] += change
                self.load[place[0]] += change
            seats, winner = self.chains[number].seats, there if sign > 0 else here
            choice = next(choice for choice in self.choices if seats[choice][:2] == winner)
            seats[self.position], seats[choice] = seats[choice], seats[self.position]


def order(chains: t.Sequence[Chain], window: int, seed: int) -> list[Chain]:
    """The chains in an order in which each run of ``window`` touches many nodes and disks.

    The node with the largest part of its chains still to come is next, by the one of them whose disks and nodes were
    not listed lately. So all nodes come to their end together, and none is left to be repeated there.
    """
    rng = random.Random(seed)
    waiting: dict[int, list[Chain]] = {}
    shuffled = sorted(chains, key=lambda chain: chain.id)
    rng.shuffle(shuffled)
    for chain in shuffled:
        for seat in chain.seats:
            waiting.setdefault(seat.node, []).append(chain)
    total = {node: len(members) for node, members in waiting.items()}
    left = dict(total)
    used: dict[Disk | int, int] = {}  # when a disk or node was last listed
    span = {node: min(window, len(chains) // count) for node, count in total.items()}
    urgent = [(-1.0, rng.random(), node) for node in total]
    heapq.heapify(urgent)
    done: set[int] = set()
    listed: list[Chain] = []

    def price(chain: Chain) -> float:
        now = len(listed)
        cost = 0.0
        for seat in chain.seats:
            cost += 4 * max(0, window - now + used.get(seat[:2], now - window)) / window
            cost += max(0, span[seat.node] - now + used.get(seat.node, now - window)) / max(1, span[seat.node])
        return cost

    while urgent:
        part, _tie, node = heapq.heappop(urgent)
        if not left[node] or -part * total[node] > left[node] + 0.5:
            continue  # listed since
        mates = waiting[node]
        mates[:] = [chain for chain in mates if id(chain) not in done]
        best, least = mates[0], math.inf
        for chain in mates[:POOL]:
            cost = price(chain)
            if cost < least:
                best, least = chain, cost
                if cost == 0:
                    break
        done.add(id(best))
        for seat in best.seats:
            used[seat[:2]] = used[seat.node] = len(listed)
            left[seat.node] -= 1
            heapq.heappush(urgent, (-left[seat.node] / total[seat.node], rng.random(), seat.node))
        listed.append(best)
    return listed
