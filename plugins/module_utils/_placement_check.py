# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judge a chain table, whoever made it: nine invariants, and its quality against what no table can beat."""

from __future__ import annotations

import typing as t
from collections import Counter
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import (
    Chain,
    Cluster,
    Node,
    Seat,
    bound,
    fair_meetings,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import (
    CHAIN_IDS,
    NODE_IDS,
    Table,
    decode_chain,
    decode_target,
)

HARD = (1, 2, 3, 9)  # invariants without which a table does not work
# What a table may lack from the ideal of the others.
UNEVEN = 1.05  # sum of squares of meetings, over the least possible
REBUILD = 0.75  # disks that rebuild a failed one, of those that could
STRIPE = 0.6  # nodes and disks that a stripe touches, of those that it could
SHOWN = 3  # examples in a text


@dataclass(frozen=True)
class Invariant:
    """One property of a valid table."""

    number: int
    name: str
    valid: bool
    text: str

    def public(self) -> dict[str, t.Any]:
        """As a module returns it."""
        return {"number": self.number, "name": self.name, "valid": self.valid, "text": self.text}


@dataclass
class Judgement:
    """All invariants, and the figures behind them."""

    invariants: list[Invariant]
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def broken(self) -> list[Invariant]:
        """Those that do not hold."""
        return [invariant for invariant in self.invariants if not invariant.valid]

    def lines(self) -> list[str]:
        """The judgement to read."""
        return [f"{one.number} {one.name}: {'ok' if one.valid else 'NOT OK'}: {one.text}" for one in self.invariants]


def cluster_of(chains: t.Sequence[Chain]) -> Cluster:
    """The nodes that a table implies: disks up to the highest index in use, with as many targets as most of them."""
    held: dict[int, Counter[int]] = {}
    for chain in chains:
        for seat in chain.seats:
            held.setdefault(seat.node, Counter())[seat.disk] += 1
    return Cluster(
        tuple(
            Node(node, max(disks) + 1, Counter(disks.values()).most_common(1)[0][0])
            for node, disks in sorted(held.items())
        ),
        max((len(chain.seats) for chain in chains), default=1),
    )


def judge(
    table: Table,
    erasure: bool = False,
    size: int = 0,
    cluster: Cluster | None = None,
    stripe: int = 16,
    others: t.Mapping[str, Table] | None = None,
) -> Judgement:
    """Check all nine invariants.

    :param size: targets of a chain or of an EC group; 0 takes it from the chains
    :param cluster: the nodes as they are declared; None derives them from the targets
    :param stripe: chains over which a file is spread
    :param others: tables of other tenants on the same disks, by name
    """
    chains = table.groups(erasure, size)
    declared = cluster or cluster_of(chains)
    replicas = size or declared.replicas
    domain = {seat.node: str(seat.node) for chain in chains for seat in chain.seats}  # of each node, declared or not
    domain.update((node.id, node.domain or str(node.id)) for node in declared.nodes)
    judgement = Judgement([])

    def add(name: str, problems: t.Sequence[str], text: str) -> None:
        shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        judgement.invariants.append(Invariant(len(judgement.invariants) + 1, name, not problems, shown or text))

    add("chains", _chains(table, chains, domain, replicas), f"{len(chains)} of {replicas} targets on different nodes")
    add(
        "targets",
        _targets(table, chains, declared, replicas),
        f"{sum(len(chain.seats) for chain in chains)}, even on all disks",
    )
    add("ids", _ids(table, declared), "unique, in range, and each names its own disk")
    _meetings(chains, domain, replicas, judgement.quality, add)
    _rebuild(chains, declared, domain, judgement.quality, add)
    rows = [Chain(number, [decode_target(one)[1] for one in table.chains[number]]) for number in table.order]
    _positions(rows, judgement.quality, add)
    _stripes(table, stripe, judgement.quality, add)
    own = {one for targets in table.chains.values() for one in targets}
    shared = [
        f"{name} has {len(common)} of the same targets"
        for name, other in (others or {}).items()
        if (common := own & {one for targets in other.chains.values() for one in targets})
    ]
    add(
        "tenants",
        shared,
        f"no target is in one of {len(others)} other tables" if others else "no other table was given",
    )
    return judgement


def _node(seat: Seat) -> t.Any:
    return seat.node


def _disk(seat: Seat) -> t.Any:
    return seat[:2]


ITEMS = (("node", _node), ("disk", _disk))
Add = t.Callable[[str, t.Sequence[str], str], None]


def _chains(table: Table, chains: t.Sequence[Chain], domain: t.Mapping[int, str], replicas: int) -> list[str]:
    """1: equal lengths, different nodes and failure domains."""
    problems = list(table.problems)
    for chain in chains:
        nodes = [seat.node for seat in chain.seats]
        if len(nodes) != replicas:
            problems.append(f"chain {chain.id} has {len(nodes)} targets instead of {replicas}")
        elif len(set(nodes)) < len(nodes):
            problems.append(f"chain {chain.id} has two targets on one node")
        elif len({domain[node] for node in nodes}) < len(nodes):
            problems.append(f"chain {chain.id} has two targets in one failure domain")
    return problems


def _targets(table: Table, chains: t.Sequence[Chain], cluster: Cluster, replicas: int) -> list[str]:
    """2: each disk carries its number of targets (the roundings of it, when chains outnumber the room), each in one chain."""
    held = Counter(seat[:2] for chain in chains for seat in chain.seats)
    total = max(cluster.slots, len(chains) * replicas)
    problems = []
    for node in cluster.nodes:
        low = node.targets * total // cluster.slots
        high = -(-node.targets * total // cluster.slots)
        for disk in range(node.disks):
            if not low <= held.pop((node.id, disk), 0) <= high:
                wanted = str(low) if low == high else f"{low} or {high}"
                problems.append(f"disk {disk} of node {node.id} has not {wanted} targets")
    problems += [
        f"disk {disk} of node {node} is not declared and has {count} targets" for (node, disk), count in held.items()
    ]
    seen = Counter(one for targets in table.chains.values() for one in targets)
    return problems + [f"target {one} is in {count} chains" for one, count in seen.items() if count > 1]


def _ids(table: Table, cluster: Cluster) -> list[str]:
    """3: ids in the range of their types and fields."""
    disks = {node.id: node.disks for node in cluster.nodes}
    problems = []
    for number, targets in table.chains.items():
        prefix, disk, group = decode_chain(number)
        if not (0 < number < CHAIN_IDS and group > 0):
            problems.append(f"chain id {number} is out of range or has no group")
        for one in targets:
            prefix, (node, disk, target) = decode_target(one)
            if not (0 < prefix < 100 and 0 < node < NODE_IDS and disk >= 0 and target > 0):
                problems.append(f"target id {one} does not follow the formula")
            elif disk >= disks.get(node, 0):
                problems.append(f"target id {one} names disk {disk} of node {node}, which has {disks.get(node, 0)}")
    return problems


def _meetings(
    chains: t.Sequence[Chain], domain: t.Mapping[int, str], replicas: int, quality: dict[str, float], add: Add
) -> None:
    """4 and 5: how often nodes meet, and what peers of a failed node have to rebuild."""
    name = sorted({seat.node for chain in chains for seat in chain.seats})
    point = {node: number for number, node in enumerate(name)}
    domains = [domain[node] for node in name]
    width = len(name)
    slots = [0] * width
    count: Counter[int] = Counter()
    for chain in chains:
        members = [point[seat.node] for seat in chain.seats]
        for first in members:
            slots[first] += 1
            count.update(first * width + second for second in members if second != first)
    mates = Counter(domains)
    pairs = sum(width - mates[one] for one in domains)
    if replicas == 1 or not pairs:
        add("pairs", [], "a single target has no peer")
        add("recovery", [], "a single target cannot be rebuilt")
        return
    factors = fair_meetings(slots, domains, replicas)
    best = bound(slots, domains, replicas)
    in_domain: Counter[str] = Counter()
    for one, slot in zip(domains, slots):
        in_domain[one] += slot
    whole = sum(slots)
    squares, worst = 0.0, (0.0, 0, 0)
    for key, meetings in count.items():
        first, second = divmod(key, width)
        squares += meetings * meetings / (factors[first] * factors[second])
        mean = slots[first] * (replicas - 1) / max(1, whole - in_domain[domains[first]])
        worst = max(worst, (meetings / slots[second] / mean, first, second))
    most = max(count.values())
    least = min(count.values()) if len(count) >= pairs else 0
    quality["pairs"] = squares / best.squares
    quality["meetings_min"], quality["meetings_max"], quality["meetings_mean"] = (
        least,
        most,
        sum(count.values()) / pairs,
    )
    quality["recovery"], quality["recovery_bound"] = worst[0], best.recovery
    text = (
        f"two nodes share {least} to {most} chains, {quality['meetings_mean']:.3f} on average; "
        f"sum of squares {quality['pairs']:.4f} of the least possible"
    )
    add("pairs", [text] if quality["pairs"] > UNEVEN else [], text)
    failed, peer = worst[1], worst[2]
    mean = slots[failed] * (replicas - 1) / max(1, whole - in_domain[domains[failed]])
    text = (
        f"after the failure of node {name[failed]} node {name[peer]} rebuilds {worst[0]:.3f} of the mean; "
        f"no table can have less than {best.recovery:.3f}"
    )
    allowed = best.recovery + 1 / (slots[peer] * mean) + 1e-9
    add("recovery", [text] if worst[0] > allowed else [], text)


def _rebuild(
    chains: t.Sequence[Chain], cluster: Cluster, domain: t.Mapping[int, str], quality: dict[str, float], add: Add
) -> None:
    """6: a failed disk is rebuilt from many disks, and disk indices are mixed."""
    peers: dict[tuple[int, int], set[tuple[int, int]]] = {}
    meetings: Counter[tuple[int, int]] = Counter()
    alike = 0
    for chain in chains:
        disks = [seat[:2] for seat in chain.seats]
        indices = [seat.disk for seat in chain.seats]
        alike += len(indices) > 1 and len(set(indices)) == 1
        for disk in disks:
            others = [other for other in disks if other != disk]
            peers.setdefault(disk, set()).update(others)
            meetings[disk] += len(others)
    room = Counter(domain[node] for node, _disk in peers)
    part, least, possible = 1.0, 0, 0
    for disk, found in peers.items():
        could = min(len(peers) - room[domain[disk[0]]], meetings[disk])
        if could and len(found) / could <= part:
            part, least, possible = len(found) / could, len(found), could
    quality["rebuild"] = part
    several = max((node.disks for node in cluster.nodes), default=1) > 1 and cluster.replicas > 1
    quality["same_index"] = alike / max(1, len(chains))
    text = f"any disk is rebuilt from {least} of {possible} possible disks at least"
    problems = [text] if part < REBUILD else []
    if several and alike > len(chains) / 2:
        problems.append(f"{alike} of {len(chains)} chains have one disk index on all nodes")
    add("rebuild", problems, text)


def _positions(chains: t.Sequence[Chain], quality: dict[str, float], add: Add) -> None:
    """7: heads and tails of each disk and node are within one of their part."""
    problems: list[str] = []
    spans = []
    for word, position in (("heads", 0), ("tails", -1)):
        for item, key in ITEMS:
            size: Counter[t.Any] = Counter(key(seat) for chain in chains for seat in chain.seats)
            load: Counter[t.Any] = Counter(key(chain.seats[position]) for chain in chains if chain.seats)
            length = max((len(chain.seats) for chain in chains), default=1)
            off = [one for one in size if abs(load[one] - size[one] / length) >= 1 + 1e-9]
            counts = [load[one] for one in size]
            quality[f"{word}_per_{item}_min"], quality[f"{word}_per_{item}_max"] = (
                min(counts, default=0),
                max(counts, default=0),
            )
            spans.append(f"{min(counts, default=0)} to {max(counts, default=0)} {word} of a {item}")
            problems += [
                f"{item} {one} has {load[one]} {word} of {size[one]} targets, {size[one] / length:.1f} would be even"
                for one in off
            ]
    add("positions", problems, ", ".join(spans))


def touched(table: Table, stripe: int) -> dict[str, tuple[int, int]]:
    """How many nodes and disks the worst run of ``stripe`` successive chains touches, and how many it could.

    A node with few chains cannot be in each run: its chains are in at most as many runs as they are times ``stripe``.
    """
    rows = [[decode_target(one)[1] for one in table.chains[number]] for number in table.order]
    found = {}
    for item, key in ITEMS:
        now: Counter[t.Any] = Counter(key(seat) for row in rows[:stripe] for seat in row)
        worst = len(now)
        for number, row in enumerate(rows):
            now.update(key(seat) for seat in rows[(number + stripe) % len(rows)])
            for seat in row:
                now[key(seat)] -= 1
                if not now[key(seat)]:
                    del now[key(seat)]
            worst = min(worst, len(now))
        size = Counter(key(seat) for row in rows for seat in row)
        found[item] = (worst, int(sum(min(1.0, stripe * count / len(rows)) for count in size.values()) + 1e-6))
    return found


def enough(found: t.Mapping[str, tuple[int, int]]) -> bool:
    """Whether that is enough."""
    return all(worst >= STRIPE * possible for worst, possible in found.values())


def _stripes(table: Table, stripe: int, quality: dict[str, float], add: Add) -> None:
    """8: successive chains of the table touch many nodes and disks."""
    if len(table.order) < max(1, stripe):
        add("stripes", [f"{len(table.order)} chains are fewer than the {stripe} of a stripe"], "")
        return
    found = touched(table, stripe)
    for item, (worst, possible) in found.items():
        quality[f"stripe_{item}s"] = worst / possible
    text = f"any {stripe} successive chains touch at least " + " and ".join(
        f"{worst} {item}s of {possible} possible" for item, (worst, possible) in found.items()
    )
    add("stripes", [] if enough(found) else [text], text)


def seats_of(table: Table) -> list[Seat]:
    """All targets of a table."""
    return [decode_target(one)[1] for targets in table.chains.values() for one in targets]
