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

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Cluster, bound, fair_meetings

NEVER = 1e6  # the cost of a meeting in one failure domain, against about 1 of a fair one
WINDOW = 48  # from so many waiting slots the best fitting one is taken
ATTEMPTS = 3  # so many group orders are tried ...
GOOD = 1.005  # ... unless the sum of squares is so near to the least possible
STEPS = 150_000
COLD, COLDER = 1.8, 5.0  # inverse temperatures at the begin and the end of the search


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
        self.count = [0] * (self.orbits * self.orbits * length)
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

    def leave(self, block: int, seat: int) -> None:
        """Empty a seat."""
        members = self.blocks[block]
        point, members[seat] = members[seat], -1
        self._meet(point, members, -1)

    def develop(self, nodes: t.Sequence[int]) -> list[list[int]]:
        """All translates of all blocks, as nodes."""
        length = self.length
        return [
            [nodes[point // length * length + (point + shift) % length] for point in block]
            for block in self.blocks
            for shift in range(length)
        ]

    def fill(self, seats: t.Sequence[tuple[int, int]], slots: t.Mapping[int, int]) -> None:
        """Take empty seats, in order, greedily with the orbits' free slots (their number is that of the seats)."""
        waiting = sorted(
            ((number + self.random.random()) / free, orbit) for orbit, free in slots.items() for number in range(free)
        )
        queue = [orbit for _when, orbit in waiting]
        window, queue = queue[:WINDOW], queue[WINDOW:][::-1]
        for block, seat in seats:
            members = self.blocks[block]
            others = [point for point in members if point >= 0]
            best, choice, taken = math.inf, 0, 0
            for number, orbit in enumerate(window if others else window[:1]):
                point = orbit * self.length
                if self.length > 1:
                    point += int(self.random.random() * self.length)
                price = self.price(point, others) if others else 0.0
                if price < best:
                    best, choice, taken = price, number, point
            del window[choice]
            if queue:
                window.append(queue.pop())
            self._meet(taken, others, 1)
            members[seat] = taken

    def improve(self, seats: t.Sequence[tuple[int, int]], steps: int, goal: float = -1.0) -> None:
        """Exchange members between these seats (or move one within its orbit) until ``goal`` or out of ``steps``.

        Simulated annealing: one random member of the chosen block gets a peer that it seldom meets.
        """
        if len(seats) < 2 and self.length == 1:
            return
        draw, blocks, length, exp = self.random.random, self.blocks, self.length, math.exp
        points = len(self.cost)
        sitting: dict[int, list[int]] = {}  # orbit -> seats, as numbers
        where = [0] * len(seats)
        for number, (block, seat) in enumerate(seats):
            orbit = blocks[block][seat] // length
            where[number] = len(sitting.setdefault(orbit, []))
            sitting[orbit].append(number)
        for step in range(steps):
            if self.energy <= goal:
                return
            first = int(draw() * len(seats))
            block, seat = seats[first]
            members = blocks[block]
            old = members[seat]
            others = members[:seat] + members[seat + 1 :]
            peer = others[int(draw() * len(others)) :][:1]
            new = int(draw() * points)
            least = self.price(new, peer)
            for _try in range(3):
                point = int(draw() * points)
                price = self.price(point, peer)
                if price < least:
                    new, least = point, price
            if new == old:
                continue
            before = self.energy
            if new // length == old // length and length > 1:
                self._meet(old, others, -1)
                self._meet(new, others, 1)
                change = self.energy - before
                if change <= 0 or draw() < exp(-change * (COLD + (COLDER - COLD) * step / steps)):
                    members[seat] = new
                else:
                    self._meet(new, others, -1)
                    self._meet(old, others, 1)
                continue
            candidates = sitting.get(new // length)
            if not candidates:
                continue
            second = candidates[int(draw() * len(candidates))]
            block2, seat2 = seats[second]
            if block2 == block:
                continue
            members2 = blocks[block2]
            old2 = members2[seat2]
            new2 = old // length * length + (int(draw() * length) if length > 1 else 0)
            others2 = members2[:seat2] + members2[seat2 + 1 :]
            self._meet(old, others, -1)
            self._meet(old2, others2, -1)
            self._meet(new, others, 1)
            self._meet(new2, others2, 1)
            change = self.energy - before
            if change <= 0 or draw() < exp(-change * (COLD + (COLDER - COLD) * step / steps)):
                members[seat], members2[seat2] = new, new2
                here, there = sitting[old // length], candidates
                here[where[first]], there[where[second]] = second, first
                where[first], where[second] = where[second], where[first]
            else:
                self._meet(new2, others2, -1)
                self._meet(new, others, -1)
                self._meet(old2, others2, 1)
                self._meet(old, others, 1)


def _orbits(cluster: Cluster) -> t.Iterator[tuple[int, list[int]]]:
    """Ways to see the nodes as orbits of Z_g, longest first: g, and the nodes in order of their points.

    The translates must keep slots and failure domains. Either all domains are alike, and the residue modulo their
    number is the domain; or the nodes of an orbit have one domain (or none).
    """
    domains = cluster.domains()
    racks = len(set(domains))
    spread: dict[t.Any, list[list[int]]] = {}  # kind of node -> domain -> nodes
    for node, (item, domain) in enumerate(zip(cluster.nodes, domains)):
        spread.setdefault(item.slots, [[] for _ in range(racks)])[domain].append(node)
    found: dict[int, list[int]] = {}
    if racks < len(domains):
        apart = [nodes for by_domain in spread.values() for nodes in by_domain if nodes]
        if all(len({len(nodes) for nodes in by_domain}) == 1 for by_domain in spread.values()):
            mixed = [[node for row in zip(*by_domain) for node in row] for by_domain in spread.values()]
            for length in _divisors([len(nodes) for nodes in mixed]):
                if length % racks == 0:
                    found[length] = [node for nodes in mixed for node in nodes]
    else:
        apart = [[node for nodes in by_domain for node in nodes] for by_domain in spread.values()]
    for length in _divisors([len(nodes) for nodes in apart]):
        found.setdefault(length, [node for nodes in apart for node in nodes])
    for length in sorted(found, reverse=True):
        if cluster.slots // length % cluster.replicas == 0:
            yield length, found[length]


def _divisors(sizes: t.Sequence[int]) -> list[int]:
    common = math.gcd(*sizes)
    return [number for number in range(1, common + 1) if common % number == 0]


def design(cluster: Cluster, seed: int) -> list[list[int]]:
    """Chains of node numbers (indices into ``cluster.nodes``) in which all pairs meet as evenly as was found."""
    replicas, slots = cluster.replicas, [node.slots for node in cluster.nodes]
    if replicas == 1:
        return [[node] for node, count in enumerate(slots) for _slot in range(count)]
    domains = cluster.domains()
    factors = fair_meetings(slots, domains, replicas)
    least = bound(slots, domains, replicas).squares * (sum(factors) / len(factors)) ** 2
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
        blocks.improve(seats, STEPS, goal=least / length + 0.5)  # the smallest step is about 4
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
