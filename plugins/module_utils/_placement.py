# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Data placement of 3FS: storage nodes, chains of targets, and how evenly chains can spread at best.

Two nodes *meet* in a chain when both hold a target of it. When a node fails, each peer rebuilds what it shares with
it, so recovery is even when any two nodes meet equally often. ``_placement_design`` and ``_placement_change`` decide
which nodes meet, ``_placement_seats`` which disk, which position and which place in the table each one gets,
``_placement_files`` knows upstream's ids and files, ``_placement_check`` judges any table.
"""

from __future__ import annotations

import heapq
import math
import typing as t
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A storage node; ``targets`` is what each of its disks carries."""

    id: int
    disks: int
    targets: int
    domain: str = ""

    @property
    def slots(self) -> int:
        """Targets that the node carries."""
        return self.disks * self.targets


@dataclass(frozen=True)
class Cluster:
    """Storage nodes in ascending order of ids, and the number of targets of a chain (or of an EC group)."""

    nodes: tuple[Node, ...]
    replicas: int

    @property
    def slots(self) -> int:
        """Targets of all nodes."""
        return sum(node.slots for node in self.nodes)

    def domains(self) -> list[int]:
        """For each node the number of its failure domain; without domains each node is its own."""
        numbers: dict[t.Any, int] = {}
        return [numbers.setdefault(node.domain or node.id, len(numbers)) for node in self.nodes]


class Seat(t.NamedTuple):
    """A target of a chain: node id, disk index from 0, and target index from 1 on this disk (0: not yet chosen)."""

    node: int
    disk: int
    target: int


@dataclass
class Chain:
    """A chain, head first and tail last, or an EC group. ``id`` 0 is not yet chosen; a group has its first chain's."""

    id: int
    seats: list[Seat]


def fair_meetings(slots: t.Sequence[int], domains: t.Sequence[t.Any], replicas: int) -> list[float]:
    """Factors x of which x[i] * x[j] is how often i and j (of different domains) would meet if fractions could.

    The sum over all peers is what the node must have, slots * (replicas - 1), and a node with twice the slots meets
    each peer twice as often (nearly: nobody meets himself).
    """
    if replicas == 1:
        return [1.0] * len(slots)
    factors = [math.sqrt((replicas - 1) / sum(slots)) * count for count in slots]
    for _round in range(100):
        whole = sum(factors)
        own: dict[t.Any, float] = {}
        for domain, factor in zip(domains, factors):
            own[domain] = own.get(domain, 0.0) + factor
        wished = [
            math.sqrt(factor * count * (replicas - 1) / max(1e-9, whole - own[domain]))
            for factor, count, domain in zip(factors, slots, domains)
        ]
        change = max(abs(new - old) / old for new, old in zip(wished, factors))
        factors = wished
        if change < 1e-9:
            break
    return factors


Kind = tuple[float, int]  # nodes with the same factor of fair meetings and the same slots
SOFT = (*(0.75**n for n in range(32)), 1e-12)  # of the search for prices: how soft the steps are
HALVES = 60


class Bound(t.NamedTuple):
    """What no table can beat: see ``bound``."""

    squares: float
    recovery: float


def bound(slots: t.Sequence[int], domains: t.Sequence[t.Any], replicas: int) -> Bound:
    """The least possible sum of squares and recovery load of nodes with these slots.

    ``squares`` is no more than the sum over ordered pairs of meetings² / fair meetings of any whole numbers in which
    each node has its slots * (replicas - 1) meetings; for equal nodes it is the closed form
    (P - rem) q² + rem (q + 1)². ``recovery`` is the least possible greatest load of a peer after a failure, in meetings
    for each slot of the peer, over the mean of all peers.
    """
    kinds = [(float(f"{factor:.12g}"), count) for factor, count in zip(fair_meetings(slots, domains, replicas), slots)]
    pairs: Counter[tuple[Kind, Kind]] = Counter()  # ordered pairs of nodes that may meet
    for sign, groups in ((1, [(0, kind) for kind in kinds]), (-1, list(zip(domains, kinds)))):
        together: dict[t.Any, list[tuple[Kind, int]]] = {}
        for (group, kind), count in Counter(groups).items():
            together.setdefault(group, []).append((kind, count))
        for members in together.values():
            for kind, count in members:
                for other, others in members:
                    pairs[kind, other] += sign * count * others
    needed = {kind: count * kind[1] * (replicas - 1) for kind, count in Counter(kinds).items()}
    return Bound(_least_squares(pairs, needed), _worst_failure(slots, domains, replicas))


def _least_squares(pairs: t.Mapping[tuple[Kind, Kind], int], needed: t.Mapping[Kind, int]) -> float:
    """A lower bound by duality: nodes pay a price for each of their meetings instead of needing a number of them.

    Each pair then meets as often as is best for it alone. Whatever the prices, no table is better than the outcome; the
    best prices are those at which each kind of node has the meetings that it needs. They are searched kind by kind,
    with meetings that first grow smoothly with the price, since steps would stop that early.
    """
    prices = dict.fromkeys(needed, 0.0)
    peers = {kind: [other for other in needed if pairs[kind, other]] for kind in needed}

    def meetings(kind: Kind, other: Kind, soft: float) -> float:
        wish = max(0.0, ((prices[kind] + prices[other]) / 2 * kind[0] * other[0] + 1) / 2)
        return int(wish) + max(0.0, 1 - (1 - wish % 1) / soft)

    def enough(kind: Kind, price: float, soft: float) -> bool:
        prices[kind] = price
        return sum(pairs[kind, other] * meetings(kind, other, soft) for other in peers[kind]) >= needed[kind]

    for soft in SOFT if len(needed) > 1 else SOFT[-1:]:
        for kind, others in peers.items():
            high = 1.0
            while others and not enough(kind, high, soft):
                high *= 2
            low = -high
            for _half in range(HALVES):
                middle = (low + high) / 2
                low, high = (low, middle) if enough(kind, middle, soft) else (middle, high)
            prices[kind] = high
    squares = sum(prices[kind] * need for kind, need in needed.items())
    for (kind, other), count in pairs.items():
        met, fair = int(meetings(kind, other, 1e-12)), kind[0] * other[0]
        squares += count * (met * met / fair - (prices[kind] + prices[other]) / 2 * met)
    return squares


def _worst_failure(slots: t.Sequence[int], domains: t.Sequence[t.Any], replicas: int) -> float:
    """The least greatest recovery load, over the mean, that whole numbers allow in the failure where it is greatest."""
    worst, whole = 1.0, Counter(slots)
    kinds: set[tuple[int, tuple[tuple[int, int], ...]]] = set()
    mates: dict[t.Any, Counter[int]] = {}
    for count, domain in zip(slots, domains):
        mates.setdefault(domain, Counter())[count] += 1
    for own in mates.values():
        kinds.update((count, tuple(sorted(own.items()))) for count in own)
    for failed, own_items in kinds:
        peers = whole - Counter(dict(own_items))
        left = failed * (replicas - 1)
        mean = left / max(1, sum(count * number for count, number in peers.items()))
        heap = [(1 / count, 1, count) for count in peers]
        heapq.heapify(heap)
        while left > 0 and heap:
            load, meetings, count = heapq.heappop(heap)
            left -= peers[count]
            worst = max(worst, load / mean)
            heapq.heappush(heap, ((meetings + 1) / count, meetings + 1, count))
    return worst


def apportion(total: int, weights: t.Sequence[int], held: t.Sequence[int]) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights``; where rounding leaves a choice, who holds more gets more."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    spare = total - sum(shares)
    rest = [number for number, weight in enumerate(weights) if total * weight % whole]
    rest.sort(key=lambda number: (-(held[number] - shares[number]), -(total * weights[number] % whole), number))
    for number in rest[:spare]:
        shares[number] += 1
    return shares
