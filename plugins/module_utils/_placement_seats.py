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

import random
import typing as t
from collections import Counter, deque

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Seat

Disk = tuple[int, int]
UNSEEN = -1  # disk of a seat that has only a node yet
TRIES = 12  # partners that are tried before a target's disk is left as it is
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
    shared: Counter[tuple[Disk, Disk]] = Counter()

    def pairs(chain: Chain, position: int, disk: int) -> list[tuple[Disk, Disk]]:
        here = (chain.seats[position].node, disk)
        others = [seat[:2] for number, seat in enumerate(chain.seats) if number != position]
        return [(here, other) if here < other else (other, here) for other in others]

    def price(chain: Chain, position: int, disk: int) -> int:
        """Twice the chains already shared (the growth of the squares), and one for each index alike."""
        alike = sum(seat.disk == disk for number, seat in enumerate(chain.seats) if number != position)
        return alike + sum(2 * shared[pair] for pair in pairs(chain, position, disk))

    for chain in chains:
        for position, seat in enumerate(chain.seats):
            shared.update(pair for pair in pairs(chain, position, seat.disk) if pair[0] == seat[:2])
    for _round in range(4):
        exchanged = False
        for (node, position), mates in moving.items():
            if len(mates) < 2:
                continue
            for first in mates:
                mine = first.seats[position].disk
                shared.subtract(pairs(first, position, mine))
                cost = price(first, position, mine)
                for _try in range(TRIES if cost else 0):
                    second = mates[int(rng.random() * len(mates))]
                    theirs = second.seats[position].disk
                    if second is first or theirs == mine:
                        continue
                    shared.subtract(pairs(second, position, theirs))
                    change = (
                        price(first, position, theirs)
                        + price(second, position, mine)
                        - price(first, position, mine)
                        - price(second, position, theirs)
                    )
                    if change < 0 or (change == 0 and rng.random() < 0.5):
                        first.seats[position], second.seats[position] = Seat(node, theirs, 0), Seat(node, mine, 0)
                        mine, theirs = theirs, mine
                        exchanged = True
                    shared.update(pairs(second, position, theirs))
                    if price(first, position, mine) == 0:
                        break
                shared.update(pairs(first, position, mine))
        if not exchanged:
            break


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
    """The chains in an order in which each run of ``window`` touches many nodes and disks."""
    rng = random.Random(seed)
    queue = list(chains)
    rng.shuffle(queue)
    pool, queue = queue[:POOL], queue[POOL:]
    used: dict[Disk | int, int] = {}  # when a disk or node was last listed
    longest = max((len(chain.seats) for chain in chains), default=1)
    lap = len({seat.node for chain in chains for seat in chain.seats}) // longest  # listings until nodes must repeat
    listed: list[Chain] = []
    while pool:
        now = len(listed)
        best, choice = None, 0
        for number, chain in enumerate(pool):
            price = 0.0
            for seat in chain.seats:
                price += max(0, window - now + used.get(seat[:2], now - window)) * 4 / window
                price += max(0, lap - now + used.get(seat.node, now - lap)) / max(1, lap)
            if best is None or price < best:
                best, choice = price, number
                if price == 0:
                    break
        chain = pool[choice]
        if queue:
            pool[choice] = queue.pop()
        else:
            del pool[choice]
        for seat in chain.seats:
            used[seat[:2]] = used[seat.node] = now
        listed.append(chain)
    return listed
