# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A second opinion on chain tables, counted in the plainest way from the text of their files.

It shares no code with the collection, so that a fault of our checker, or of what it takes for granted, shows.
"""

from __future__ import annotations

import pathlib
import typing as t
from collections import Counter

Disk = tuple[int, int]


class Target(t.NamedTuple):
    """What the digits of a target's id say; disks count from 1."""

    prefix: int
    node: int
    disk: int
    index: int


def cut(number: str) -> Target:
    """A target's id by its digits: prefix, six for the node, three for the disk, two for the target on it."""
    return Target(int(number[:-11]), int(number[-11:-5]), int(number[-5:-2]), int(number[-2:]))


def rows(path: pathlib.Path) -> list[list[str]]:
    """A file's lines without its header."""
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


def recount(
    directory: pathlib.Path, nodes: t.Sequence[dict[str, t.Any]], each: int, replicas: int, stripe: int
) -> dict[str, float]:
    """The figures of a table; ``nodes`` and ``each`` are options of the module (nodes, targets_per_disk).

    :raises AssertionError: the table cannot work
    """
    chains = {row[0]: row[1:] for row in rows(directory / "generated_chains.csv")}
    order = [row[0] for row in rows(directory / "generated_chain_table.csv")]
    listed = [[cut(number) for number in chains[chain]] for chain in order]
    rack = {node["id"]: node["domain"] or node["id"] for node in nodes}
    room = {(node["id"], disk): each * (node["weight"] or 1) for node in nodes for disk in range(1, node["disks"] + 1)}

    assert sorted(order) == sorted(chains), "the table lists each chain once"
    assert all(len({rack[target.node] for target in chain}) == replicas == len(chain) for chain in listed), "1: apart"
    assert Counter(target[1:3] for chain in listed for target in chain) == room, "2: each disk has its targets"
    assert len({number for chain in chains.values() for number in chain}) == sum(room.values()), "2: in one chain each"
    assert all(0 < int(chain) < 1 << 32 and int(chain[-5:]) > 0 for chain in chains), "3: ids of chains"
    assert all(target.prefix == 1 and target.index > 0 for chain in listed for target in chain), "3: ids of targets"
    made = set()
    for line in (directory / "create_target_cmd.txt").read_text().splitlines():
        words = line.split()
        said = dict(zip(words[1:9:2], words[2:9:2]))
        one = said["--target-id"]
        made.add((said["--chain-id"], one))
        assert (int(said["--node-id"]), int(said["--disk-index"]) + 1) == cut(one)[1:3], "3: commands"
    assert made == {(chain, number) for chain, numbers in chains.items() for number in numbers}, "each target is made"

    return {**recovery(listed, rack), **spread(listed, rack), **positions(listed), **stripes(listed, stripe)}


def recovery(listed: t.Sequence[t.Sequence[Target]], rack: t.Mapping[int, t.Any]) -> dict[str, float]:
    """Greatest load of a peer after a failure over the mean, per target of the peer; for equal nodes the squares too."""
    meet: dict[int, Counter[int]] = {node: Counter() for node in rack}
    size = Counter(target.node for chain in listed for target in chain)
    for chain in listed:
        for target in chain:
            meet[target.node].update(other.node for other in chain if other is not target)
    by_rack = Counter[t.Any]()
    for node, count in size.items():
        by_rack[rack[node]] += count
    worst = 0.0
    for node, peers in meet.items():
        mean = sum(peers.values()) / (sum(size.values()) - by_rack[rack[node]])
        worst = max(worst, *(count / size[peer] / mean for peer, count in peers.items()))
    found = {"recovery": worst}
    if len(set(size.values())) == 1 and len(set(rack.values())) == len(rack):
        pairs = len(rack) * (len(rack) - 1)
        every, rest = divmod(sum(sum(peers.values()) for peers in meet.values()), pairs)
        squares = sum(count * count for peers in meet.values() for count in peers.values())
        found["pairs"] = squares / ((pairs - rest) * every**2 + rest * (every + 1) ** 2)
    return found


def spread(listed: t.Sequence[t.Sequence[Target]], rack: t.Mapping[int, t.Any]) -> dict[str, float]:
    """Disks that rebuild a failed one, of those that could; the worst disk."""
    peers: dict[Disk, list[Disk]] = {}
    for chain in listed:
        for target in chain:
            peers.setdefault(target[1:3], []).extend(other[1:3] for other in chain if other is not target)
    of_rack = Counter(rack[node] for node, _disk in peers)
    return {
        "rebuild": min(
            len(set(found)) / min(len(found), len(peers) - of_rack[rack[node]])
            for (node, _disk), found in peers.items()
        )
    }


def positions(listed: t.Sequence[t.Sequence[Target]]) -> dict[str, float]:
    """Fewest and most heads and tails of a node and of a disk."""
    found: dict[str, float] = {}
    for name, place in (("heads", 0), ("tails", -1)):
        for item, last in (("node", 2), ("disk", 3)):
            count = Counter({target[1:last]: 0 for chain in listed for target in chain})
            count.update(chain[place][1:last] for chain in listed)
            found[f"{name}_per_{item}_min"], found[f"{name}_per_{item}_max"] = min(count.values()), max(count.values())
    return found


def stripes(listed: t.Sequence[t.Sequence[Target]], stripe: int) -> dict[str, float]:
    """Nodes and disks that a run of ``stripe`` chains touches, of those that it could; the worst run.

    There are as many runs as chains, and one with c chains is in at most c * stripe of them: the worst run cannot have
    more than all have on average.
    """
    found = {}
    for item, last in (("nodes", 2), ("disks", 3)):
        touch = [{target[1:last] for target in chain} for chain in listed]
        worst = min(
            len(set().union(*(touch[(n + step) % len(touch)] for step in range(stripe)))) for n in range(len(touch))
        )
        runs = sum(
            min(len(listed), count * stripe) for count in Counter(one for each in touch for one in each).values()
        )
        found[f"stripe_{item}"] = worst / (runs // len(listed))
    return found


def moved(
    before: t.Sequence[t.Sequence[str]], after: t.Sequence[t.Sequence[str]], nodes: t.Sequence[dict[str, t.Any]]
) -> tuple[int, int]:
    """Targets of the earlier chains that moved, and how many had to.

    The data lies in the earlier chains. It is spread by capacity when each node has its part of their targets, rounded
    down or up; so what a node lacks of that, rounded down, has to move to it.
    """
    new = {row[0]: set(row[1:]) for row in after}
    count = sum(len(set(row[1:]) - new[row[0]]) for row in before)
    held = Counter(cut(number).node for row in before for number in row[1:])
    holds = Counter(cut(number).node for row in before for number in new[row[0]])
    slots = {node["id"]: node["disks"] * (node["weight"] or 1) for node in nodes}
    part = {node: sum(held.values()) * size / sum(slots.values()) for node, size in slots.items()}
    assert all(abs(holds[node] - part[node]) < 1 for node in part), "the earlier chains are spread by capacity"
    return count, sum(max(0, int(part[node]) - held[node]) for node in part)
