# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ids and files of 3FS chain tables, as upstream's tools make and take them."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils._placement import Chain, Seat
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

CHAINS = "generated_chains.csv"
TABLE = "generated_chain_table.csv"
TARGETS = "create_target_cmd.txt"

NODE_IDS, DISKS, INDICES, GROUPS = 1_000_000, 1_000, 100, 100_000  # what the digits of the ids leave room for
CHAIN_IDS = 1 << 32


def target_id(prefix: int, seat: Seat) -> int:
    """Upstream's id of a target: prefix, node id, disk (from 1), target index (from 1)."""
    return ((prefix * NODE_IDS + seat.node) * DISKS + seat.disk + 1) * INDICES + seat.target


def decode_target(number: int) -> tuple[int, Seat]:
    """The prefix and the seat of a target id."""
    rest, index = divmod(number, INDICES)
    rest, disk = divmod(rest, DISKS)
    prefix, node = divmod(rest, NODE_IDS)
    return prefix, Seat(node, disk - 1, index)


def chain_id(prefix: int, disk: int, group: int) -> int:
    """Upstream's id of a chain: prefix, disk (from 1), group (from 1). The disk is that of the chain's head."""
    return (prefix * DISKS + disk + 1) * GROUPS + group


def decode_chain(number: int) -> tuple[int, int, int]:
    """Prefix, disk index and group of a chain id."""
    rest, group = divmod(number, GROUPS)
    prefix, disk = divmod(rest, DISKS)
    return prefix, disk - 1, group


@dataclass
class Table:
    """A chain table as its files say it: targets of chains, and the order of chains in the table."""

    chains: dict[int, tuple[int, ...]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # lines that name a chain twice, or none that exists

    def groups(self, erasure: bool, size: int) -> list[Chain]:
        """Chains in the table's order, or the EC groups: each is ``size`` chains of one target with successive ids."""
        if not erasure:
            return [Chain(number, [decode_target(one)[1] for one in self.chains[number]]) for number in self.order]
        found: dict[int, Chain] = {}
        for number in self.order:
            first = number - (decode_chain(number)[2] - 1) % size
            found.setdefault(first, Chain(first, []))
            found[first].seats.extend(decode_target(one)[1] for one in self.chains[number])
        return list(found.values())


def render(chains: t.Sequence[Chain], erasure: bool, prefix: int, chunk_sizes: t.Sequence[int]) -> dict[str, str]:
    """The files of chains that are listed in the order of the table."""
    rows = [(number, targets) for chain in chains for number, targets in _rows(chain, erasure, prefix)]
    chunks = "".join(f" {size}" for size in chunk_sizes)
    width = len(rows[0][1]) if rows else 0
    return {
        CHAINS: ",".join(["ChainId"] + ["TargetId"] * width)
        + "\n"
        + "".join(f"{number},{','.join(str(one) for one, _seat in targets)}\n" for number, targets in sorted(rows)),
        TABLE: "ChainId\n" + "".join(f"{number}\n" for number, _targets in rows),
        TARGETS: "".join(
            f"create-target --node-id {seat.node} --disk-index {seat.disk} --target-id {one} --chain-id {number}"
            f"{' --chunk-size' + chunks if chunks else ''} --use-new-chunk-engine\n"
            for number, targets in rows
            for one, seat in targets
        ),
    }


def _rows(chain: Chain, erasure: bool, prefix: int) -> list[tuple[int, list[tuple[int, Seat]]]]:
    """The chains of the file that stand for a chain or for an EC group."""
    targets = [(target_id(prefix, seat), seat) for seat in chain.seats]
    return [(chain.id + slot, [target]) for slot, target in enumerate(targets)] if erasure else [(chain.id, targets)]


def parse(where: str, chains_text: str, table_text: str) -> Table:
    """Read both files, whoever made them.

    :raises HostError: a line is not what the file's format has
    """
    table = Table()
    for name, text in ((CHAINS, chains_text), (TABLE, table_text)):
        lines = text.split("\n")
        header = lines[0].strip().split(",")
        good = header[0] == "ChainId" and all(title == "TargetId" for title in header[1:])
        if not good or (len(header) == 1) != (name == TABLE):
            raise HostError(
                f"{where}/{name}: the first line is {lines[0]!r} and not upstream's header. "
                "Use the files of this module or of gen_chain_table.py, or another directory"
            )
        for number, line in enumerate(lines[1:], 2):
            if not line.strip():
                continue
            try:
                ids = [int(word) for word in line.split(",")]
            except ValueError:
                raise HostError(f"{where}/{name}, line {number}: {line!r} has something else than numbers") from None
            if name == TABLE:
                table.order.append(ids[0])
            elif ids[0] in table.chains:
                table.problems.append(f"chain {ids[0]} is defined twice")
            else:
                table.chains[ids[0]] = tuple(ids[1:])
    table.problems += [
        f"the table names chain {one}, which {CHAINS} has not" for one in table.order if one not in table.chains
    ]
    table.problems += [f"chain {one} is not in the table" for one in sorted(set(table.chains) - set(table.order))]
    if len(set(table.order)) < len(table.order):
        table.problems.append("the table names a chain twice")
    table.order = [one for one in dict.fromkeys(table.order) if one in table.chains]
    return table
