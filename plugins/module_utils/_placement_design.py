# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes share a chain: combinatorial designs by difference families.

Equal nodes are the points of one or more orbits of the cyclic group Z_g, and a *base block* stands for its g
translates. How often two nodes meet then depends only on their orbits and the difference of their residues, so a search
over slots/(k g) base blocks balances all of them: 32 blocks instead of 6,400 chains for 200 nodes. When every
difference is covered equally often the blocks are a difference family (a difference set, a projective plane); failure
domains make them relative difference families (transversal designs). With g = 1 the same search works on the chains
themselves, which is what unequal nodes and changes of a table need.
"""

from __future__ import annotations

import math
import random
import typing as t
from array import array
from collections import Counter

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Cluster, Node, bound, fair_meetings

NEVER = 1e6  # the cost of a meeting in one failure domain, against about 1 of a fair one
TRIES = 4  # the best of so many random candidates is tried
PLACES = 2  # ... and for who gives way, of the places in its orbit
WINDOW = 48  # from so many waiting slots the best fitting one is taken
ATTEMPTS = 3  # so many group orders are tried ...
GOOD = 1.005  # ... unless the sum of squares is so near to the least possible
NEAR = 1.002  # unequal nodes seldom reach it, so this is the end of the search
STEPS_OF_A_SEAT, STEPS = 2_000, 150_000  # of the search
LONG = 5_000  # for more seats than this these steps are few
COLD, COLDER = 1.8, 5.0  # inverse temperatures at the begin and the end of the search

Place = tuple[int, int]  # a block and a seat of it


class Blocks:
    """Base blocks over ``orbits`` x Z_``length`` whose points meet as evenly as possible.

    A point is orbit * length + residue. ``blocks`` holds lists of points; -1 is a seat that is not yet taken.
    """

    def __init__(
        self, factors: t.Sequence[float], domains: t.Sequence[int], length: int, blocks: list[list[int]], seed: int
    ) -> None:
        """``factors`` and ``domains`` of all points; equal domains never meet (two points of one block)."""
        self.length = length
        self.orbits = len(factors) // length
        self.domains = domains
        scale = sum(factors) / len(factors)
        self.cost = [scale / factor for factor in factors]
        self.count = array("H", bytes(2 * self.orbits * self.orbits * length))
        self.blocks = blocks
        self.random = random.Random(seed)
        self.energy = 0.0
        for block in blocks:
            for number, point in enumerate(block):
                if point >= 0:
                    self._meet(point, block[:number], 1)

    def _meet(self, point: int, others: t.Iterable[int], sign: int) -> None:
        """Let a point meet others (sign 1), or part from them (-1)."""
        count, cost, domains, length = self.count, self.cost, self.domains, self.length
        orbit, residue = divmod(point, length)
        row, column = orbit * self.orbits, orbit * length
        total = 0.0
        for other in others:
            if other < 0:
                continue
            peer, shift = divmod(other, length)
            there = (row + peer) * length + (shift - residue) % length
            back = peer * self.orbits * length + column + (residue - shift) % length
            meetings = count[there]
            if there == back:  # half the group's order: the translates join each pair of nodes twice
                count[there] = meetings + 2 * sign
                squares = 4 * meetings * sign + 4
            else:
                count[there] = count[back] = meetings + sign
                squares = 4 * meetings * sign + 2
            total += squares * cost[other] * (NEVER if domains[point] == domains[other] else 1.0)
        self.energy += total * cost[point]

    def price(self, point: int, others: t.Iterable[int]) -> float:
        """What it would cost, relatively, if the point met the others."""
        count, cost, domains, length = self.count, self.cost, self.domains, self.length
        orbit, residue = divmod(point, length)
        row = orbit * self.orbits
        total = 0.0
        for other in others:
            if other < 0:
                continue
            peer, shift = divmod(other, length)
            meetings = count[(row + peer) * length + (shift - residue) % length]
            total += (2 * meetings + 1) * cost[other] * (NEVER if domains[point] == domains[other] else 1.0)
        return total * cost[point]

    def sit(self, block: int, seat: int, point: int) -> None:
        """Give a seat to a point (-1: to nobody); who sat there leaves."""
        members = self.blocks[block]
        old, members[seat] = members[seat], -1
        if old >= 0:
            self._meet(old, members, -1)
        if point >= 0:
            self._meet(point, members, 1)
            members[seat] = point

    def _exchange(self, cold: float, changes: t.Sequence[tuple[int, int, int]]) -> bool:
        """Give seats (block, seat) to other points, if that is better or, seldom and less so when it is cold, a little worse."""
        before = self.energy
        undo = [(block, seat, self.blocks[block][seat]) for block, seat, _point in changes]
        for block, seat, _point in changes:
            self.sit(block, seat, -1)
        for block, seat, point in changes:
            self.sit(block, seat, point)
        change = self.energy - before
        if change <= 0 or self.random.random() < math.exp(-change * cold):
            return True
        for block, seat, _point in changes:
            self.sit(block, seat, -1)
        for block, seat, point in undo:
            self.sit(block, seat, point)
        return False

    def develop(self, nodes: t.Sequence[int]) -> list[list[int]]:
        """All translates of all blocks, as nodes."""
        length = self.length
        return [
            [nodes[point // length * length + (point + shift) % length] for point in block]
            for block in self.blocks
            for shift in range(length)
        ]

    def fill(self, seats: t.Sequence[Place], slots: t.Mapping[int, int]) -> None:
        """Take empty seats, in order, greedily with the orbits' free slots (their number is that of the seats)."""
        waiting = sorted(
            ((number + self.random.random()) / free, orbit) for orbit, free in slots.items() for number in range(free)
        )
        queue = [orbit for _when, orbit in waiting]
        window, queue = queue[:WINDOW], queue[WINDOW:][::-1]
        for block, seat in seats:
            members = self.blocks[block]
            alone = all(point < 0 for point in members)
            points = [orbit * self.length for orbit in (window[:1] if alone else window)]
            if self.length > 1:
                points = [point + int(self.random.random() * self.length) for point in points]
            prices = [self.price(point, members) for point in points]
            choice = prices.index(min(prices))
            self.sit(block, seat, points[choice])
            del window[choice]
            if queue:
                window.append(queue.pop())

    def improve(self, seats: t.Sequence[Place], steps: int, goal: float = -1.0) -> None:
        """Exchange members of these seats (or move one within its orbit) until ``goal`` or out of ``steps``.

        Simulated annealing: a random member gives way to a point that the others of its block seldom meet.
        """
        draw, blocks, length = self.random.random, self.blocks, self.length
        points = len(self.cost)
        sitting: dict[int, list[int]] = {}  # orbit -> seats, as numbers
        where = [0] * len(seats)
        for number, (block, seat) in enumerate(seats):
            mates = sitting.setdefault(blocks[block][seat] // length, [])
            where[number] = len(mates)
            mates.append(number)
        for step in range(steps if seats else 0):
            if self.energy <= goal:
                return
            cold = COLD + (COLDER - COLD) * step / steps
            first = int(draw() * len(seats))
            block, seat = seats[first]
            members = blocks[block]
            old = members[seat]
            peer = members[(seat + 1 + int(draw() * (len(members) - 1))) % len(members)]
            new = min((int(draw() * points) for _try in range(TRIES)), key=lambda point: self.price(point, (peer,)))
            home, guest = sitting[old // length], sitting.get(new // length)
            if new == old or guest is None:
                continue
            if home is guest and length > 1:
                self._exchange(cold, ((block, seat, new),))
                continue
            second = guest[int(draw() * len(guest))]
            block2, seat2 = seats[second]
            if block2 == block:
                continue
            others = [point for place, point in enumerate(blocks[block2]) if place != seat2]
            home_points = (old // length * length + int(draw() * length) for _try in range(PLACES if length > 1 else 1))
            new2 = min(home_points, key=lambda point: self.price(point, others))
            if self._exchange(cold, ((block, seat, new), (block2, seat2, new2))):
                home[where[first]], guest[where[second]] = second, first
                where[first], where[second] = where[second], where[first]

    def relocate(self, left: list[tuple[Place, int]], kept: t.Sequence[list[Place]], steps: int) -> None:
        """Let another member of the same disk give way: the guest goes to that seat, and who sat here returns.

        :param left: seats that were left to guests, each with the number of its old disk; changed in place
        :param kept: seats that each disk has still; changed in place
        """
        draw, blocks = self.random.random, self.blocks
        for step in range(steps if left else 0):
            number = int(draw() * len(left))
            (block, seat), disk = left[number]
            mates = kept[disk]
            if not mates:
                continue
            guest = blocks[block][seat]

            def fit(mate: int, mates: list[Place] = mates, guest: int = guest) -> float:
                other, chair = mates[mate]
                return self.price(guest, blocks[other][:chair] + blocks[other][chair + 1 :])

            choice = min((int(draw() * len(mates)) for _try in range(TRIES)), key=fit)
            other, chair = mates[choice]
            host = blocks[other][chair]
            cold = COLD + (COLDER - COLD) * step / steps
            if other != block and self._exchange(cold, ((block, seat, host), (other, chair, guest))):
                left[number], mates[choice] = ((other, chair), disk), (block, seat)


def _orbits(cluster: Cluster) -> t.Iterator[tuple[int, list[int]]]:
    """Ways to see the nodes as orbits of Z_g, longest first: g, and the nodes in order of their points.

    The translates must keep slots and failure domains. Either all domains are alike, and the residue modulo their
    number is the domain; or the nodes of an orbit have one domain (or none).
    """
    domains = cluster.domains()
    racks = len(set(domains))
    spread: dict[int, dict[int, list[int]]] = {}  # slots -> domain -> nodes
    for node, (item, domain) in enumerate(zip(cluster.nodes, domains)):
        spread.setdefault(item.slots, {}).setdefault(domain, []).append(node)
    found: dict[int, list[int]] = {}
    apart = [nodes for by_domain in spread.values() for nodes in by_domain.values()]
    if racks == len(domains):
        apart = [[node for nodes in by_domain.values() for node in nodes] for by_domain in spread.values()]
    elif all(len({len(by_domain.get(rack, ())) for rack in range(racks)}) == 1 for by_domain in spread.values()):
        mixed = [
            [node for row in zip(*(by_domain[rack] for rack in range(racks))) for node in row]
            for by_domain in spread.values()
        ]
        for length in _divisors([len(nodes) for nodes in mixed]):
            if length % racks == 0:
                found[length] = [node for nodes in mixed for node in nodes]
    for length in _divisors([len(nodes) for nodes in apart]):
        found.setdefault(length, [node for nodes in apart for node in nodes])
    for length in sorted(found, reverse=True):
        if cluster.slots // length % cluster.replicas == 0:
            yield length, found[length]


def _divisors(sizes: t.Sequence[int]) -> list[int]:
    common = math.gcd(*sizes)
    return [number for number in range(1, common + 1) if common % number == 0]


def core(cluster: Cluster) -> Cluster | None:
    """Most of the nodes, if these have much more symmetry than all have, as 200 nodes without the one that differs.

    None where the search is short without that, or not much shorter with it.
    """
    seats = cluster.slots // next(_orbits(cluster))[0]
    if seats <= LONG:
        return None
    kinds: dict[tuple[int, str], list[Node]] = {}
    for node in cluster.nodes:
        kinds.setdefault((node.slots, node.domain), []).append(node)
    best, least = None, seats // 4
    for length in range(2, max(map(len, kinds.values())) + 1):
        slots = sum(each * (len(nodes) - len(nodes) % length) for (each, _domain), nodes in kinds.items())
        seats = slots // length + cluster.slots - slots
        if seats >= least or slots // length % cluster.replicas:
            continue
        kept = [node for nodes in kinds.values() for node in nodes[: len(nodes) - len(nodes) % length]]
        load: Counter[t.Any] = Counter()
        for node in kept:
            load[node.domain or node.id] += node.slots
        if max(load.values(), default=slots) * cluster.replicas <= slots:
            best, least = Cluster(tuple(sorted(kept, key=lambda node: node.id)), cluster.replicas), seats
    return best


def design(cluster: Cluster, seed: int) -> list[list[int]]:
    """Chains of node numbers (indices into ``cluster.nodes``) in which all pairs meet as evenly as was found."""
    replicas, slots = cluster.replicas, [node.slots for node in cluster.nodes]
    if replicas == 1:
        return [[node] for node, count in enumerate(slots) for _slot in range(count)]
    domains = cluster.domains()
    factors = fair_meetings(slots, domains, replicas)
    least = bound(slots, domains, replicas).squares * (sum(factors) / len(factors)) ** 2
    near = 1.0 if len(set(slots)) == 1 else NEAR
    best: tuple[float, list[list[int]]] | None = None
    for length, nodes in list(_orbits(cluster))[:ATTEMPTS]:
        number = cluster.slots // length // replicas
        blocks = Blocks(
            [factors[node] for node in nodes],
            [domains[node] for node in nodes],
            length,
            [[-1] * replicas for _block in range(number)],
            seed,
        )
        seats = [(block, seat) for block in range(number) for seat in range(replicas)]
        blocks.fill(seats, {orbit: slots[nodes[orbit * length]] for orbit in range(blocks.orbits)})
        goal = near * least / length + 0.5  # the smallest step is about 4
        blocks.improve(seats, min(STEPS, STEPS_OF_A_SEAT * len(seats)), goal)
        quality = blocks.energy * length / least
        if best is None or quality < best[0]:
            best = quality, blocks.develop(nodes)
        if quality < GOOD:
            break
    chains = best[1] if best else []
    if any(len({domains[node] for node in chain}) < replicas for chain in chains) or not chains:
        return wrap_around(cluster)
    return chains


def wrap_around(cluster: Cluster) -> list[list[int]]:
    """Chains that are valid however narrow the choice: each domain's slots go to successive chains."""
    domains = cluster.domains()
    number = cluster.slots // cluster.replicas
    chains: list[list[int]] = [[] for _chain in range(number)]
    turn = 0
    for node in sorted(range(len(domains)), key=lambda node: domains[node]):
        for _slot in range(cluster.nodes[node].slots):
            chains[turn % number].append(node)
            turn += 1
    return chains
