# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets, chains and chain tables of a 3FS cluster, brought to what is declared.

Everything follows from the difference between the chains that are wanted and those
that are there, so that a run that was interrupted goes on where it stood: new targets
before the chains that use them, chains before tables; and where a chain has other
targets than it should, it gets the new ones, waits until they serve, and only then
loses the old ones. A chain never has fewer serving replicas for our sake.
"""

from __future__ import annotations

import os
import time
import typing as t
from collections import Counter
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import decode_chain
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import (
    STATE,
    check_cluster,
    chunk_size,
    target_place,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import STATUS, Admin, Answer, quote
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_info import look, parse, serves

# what an interrupted run left
_ALREADY = {STATUS[name] for name in ("Storage::TargetNotFound", "Mgmtd::TargetNotFound", "Mgmtd::TargetExisted")}
_REPORT_SECONDS = 60.0  # how long a storage service that was just started may take to report


@dataclass(frozen=True)
class _Disk:
    """A disk that was replaced.

    :param present: targets that are on it, where somebody looked; mgmtd goes on showing what it was last told of the others
    """

    node: int
    index: int
    present: frozenset[int] | None = None

    def __str__(self) -> str:
        return f"disk {self.index} of node {self.node}"

    def targets(self, state: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
        """The targets of chains that belong on it, with their chain and the number of its others."""
        return [
            {**target, "chain": chain, "others": len(item["targets"]) - 1}
            for chain, item in state["chains"].items()
            for target in item["targets"]
            if target_place(target["id"]) == (self.node, self.index)
        ]

    def lacks(self, target: t.Mapping[str, t.Any]) -> bool:
        """Whether a target has to be made again."""
        return target["local"] == "OFFLINE" or (self.present is not None and target["id"] not in self.present)


class Targets:
    """Targets, chains and tables of one cluster as a resource.

    :param params: options of the module ``threefs_target``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.migrate = bool(params.get("migrate"))
        self.parallel = int(params.get("parallel_moves") or 8)
        if self.parallel < 1:
            raise Refused("parallel_moves", self.parallel, "not a number of chains", "At least 1")
        self.wait = float(params.get("wait_seconds") or 3600)
        self.copy = float(params.get("copy_seconds") or 86400)
        self.chunk_sizes: dict[int, list[int]] = {}  # of the targets of a chain, where its table says it
        self.table_sizes: dict[int, list[int]] = {}  # of the targets of a table whose files are not given
        self.chains: dict[int, list[int]] = {}
        self.tables: list[dict[str, t.Any]] = []
        self.pending: list[tuple[str, int]] = []  # tables whose files only a real run makes
        for index, table in enumerate(params.get("tables") or []):
            self._table(f"tables[{index}]", table)
        for number, given in (params.get("chunk_sizes") or {}).items():
            option = f"chunk_sizes.{number}"
            self.table_sizes[int(number)] = [chunk_size(f"{option}[{n}]", value) for n, value in enumerate(given)]
        self.recreate = [_disk(item) for item in params.get("recreate_disks") or []]
        self.retire = [int(node) for node in params.get("retire_nodes") or []]
        used = Counter(target_place(target)[0] for targets in self.chains.values() for target in targets)
        for index, node in enumerate(self.retire):
            if node in used:
                raise Refused(
                    f"retire_nodes[{index}]",
                    node,
                    f"{used[node]} chains shall be on it",
                    "Make the chain table without this node",
                )

    def _table(self, option: str, table: t.Mapping[str, t.Any]) -> None:
        number = int(table["id"])
        if not 0 < number < 1 << 32:
            raise Refused(f"{option}.id", number, "not a table's id", "1 to 4294967295")
        if any(number == other["id"] for other in self.tables):
            raise Refused(f"{option}.id", number, "another table of the list has it", "Give each its own id")
        if not table["chains"] and not table["order"]:
            self.pending.append((option, number))
            return
        rows = _csv(f"{option}.chains", table["chains"], ["ChainId"], "TargetId")
        order = [row[0] for row in _csv(f"{option}.order", table["order"], ["ChainId"])]
        replicas = {len(row) - 1 for row in rows}
        if len(replicas) > 1:
            raise Refused(
                f"{option}.chains",
                sorted(replicas),
                "chains of one table have different lengths",
                "Give all the same replicas",
            )
        taken = {target: chain for chain, targets in self.chains.items() for target in targets}
        for row in rows:
            chain, targets = row[0], row[1:]
            for target in targets:
                if target in taken:
                    raise Refused(
                        f"{option}.chains",
                        target,
                        f"this target is in chain {taken[target]}, too",
                        "A target is in one chain",
                    )
                taken[target] = chain
            nodes = [target_place(target)[0] for target in targets]
            if len(set(nodes)) < len(nodes):
                raise Refused(
                    f"{option}.chains",
                    chain,
                    f"two replicas of this chain are on node {max(nodes, key=nodes.count)}",
                    "Make the table with module threefs_chain_table: each replica needs a node of its own",
                )
            if chain in self.chains:
                raise Refused(
                    f"{option}.chains", chain, "this chain is in another table, too", "Tables do not share chains here"
                )
            self.chains[chain] = targets
        strangers = sorted(set(order) - {row[0] for row in rows})
        if strangers:
            raise Refused(
                f"{option}.order",
                strangers[0],
                "the table has a chain that is not in chains",
                "Give both files of one run",
            )
        stripe = int(table.get("stripe") or 0)
        if len(order) < stripe:
            raise Refused(
                f"{option}.stripe",
                stripe,
                f"the table has {len(order)} chains only",
                "Make the stripe smaller or add targets",
            )
        given = enumerate(table.get("chunk_sizes") or [])
        sizes = [chunk_size(f"{option}.chunk_sizes[{index}]", value) for index, value in given]
        self.chunk_sizes.update(dict.fromkeys(order, sizes))
        self.tables.append({"id": number, "order": order, "description": str(table.get("description") or "")})

    # -- observe -----------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any] | None:
        """The cluster as it is; None before it exists."""
        admin = Admin(self.host, self.cluster)
        if not admin.usable(self.predicting):
            return None
        end = time.monotonic() + min(self.wait, _REPORT_SECONDS)
        state = look(admin)
        while not self.predicting and self._silent(state) and time.monotonic() < end:
            time.sleep(1)
            state = look(admin)
        state["orders"] = {number: self._order(admin, number) for number in state["tables"]}
        return state

    def _order(self, admin: Admin, number: int) -> list[int]:
        """The chains of a table's newest version, in order."""
        path = f"{STATE}/{self.cluster}/.table"
        admin.run(f"dump-chain-table {number} {self.host.path(path)}")
        text = self.host.read(path)
        self.host.remove(path)
        return [int(line) for line in text.split()[1:]]

    # -- plan ----------------------------------------------------------------------------

    def plan(self, observed: dict[str, t.Any] | None) -> list[Step]:
        """The steps from what is there to what is wanted."""
        for option, number in self.pending:
            if not self.predicting:
                raise Refused(
                    f"{option}.chains",
                    "",
                    f"table {number} has no chains",
                    "Make them first with module threefs_chain_table",
                )
        state = observed or {**parse([], [], [], []), "orders": {}}
        now, new, moves = self._difference(state)
        silent = self._silent(state)
        if silent and not self.predicting:
            raise Refused(
                "tables",
                silent,
                "new targets are on storage nodes that do not report to mgmtd",
                "Start them first (role threefs), or make the table without them",
            )
        steps: list[Step] = []
        for disk in self.recreate:
            weak = [target["id"] for target in disk.targets(state) if disk.lacks(target) or not serves(target)]
            if weak:
                why = "the other replicas fill it"
                steps.append(Step("recreate", f"targets on {disk}", after=weak, why=why, data=("recreate", disk)))
        if moves and not self.migrate:
            chain = min(moves)
            raise Refused(
                "tables",
                chain,
                f"{len(moves)} chains that hold data have other targets than declared, this one "
                f"{sorted(now[chain])} instead of {sorted(moves[chain])}",
                "Set migrate: true to copy their data to the new targets, chain by chain",
            )
        steps += self._moves(now, moves)
        if new:
            by_node: dict[int, int] = {}
            for targets in new.values():
                for target in targets:
                    by_node[target_place(target)[0]] = by_node.get(target_place(target)[0], 0) + 1
            steps.append(
                Step(
                    "create",
                    "targets",
                    after={str(node): count for node, count in sorted(by_node.items())},
                    data=("create", new),
                )
            )
            steps.append(Step("upload", "chains", after=len(new), data=("chains", new)))
        for table in self.tables:
            if state["orders"].get(table["id"]) != table["order"]:
                had = len(state["orders"].get(table["id"], []))
                steps.append(
                    Step(
                        "upload",
                        f"chain table {table['id']}",
                        before=f"{had} chains",
                        after=f"{len(table['order'])} chains",
                        data=("table", table),
                    )
                )
        leftovers = self._leftovers(state, now)
        if leftovers:
            steps.append(Step("remove", "targets that no chain uses", before=leftovers, data=("leftovers", leftovers)))
        steps += [
            Step("make", f"chain table {number}", after="what the generator makes in a real run")
            for _option, number in self.pending
        ]
        present = {node["id"]: node for node in state["nodes"]}
        for node in self.retire:
            if node in present:
                kind = present[node]["type"].upper()
                steps.append(
                    Step("unregister", f"node {node}", before=present[node]["status"], data=("retire", node, kind))
                )
        return steps

    def _moves(self, now: t.Mapping[int, list[int]], moves: t.Mapping[int, list[int]]) -> list[Step]:
        """Batches of chains; a target that another chain still has comes after that chain has let it go."""
        steps: list[Step] = []
        waiting = dict(sorted(moves.items()))
        holder = {target: chain for chain, targets in now.items() for target in targets}
        while waiting:
            free = [c for c, targets in waiting.items() if all(holder.get(target, c) == c for target in targets)]
            if not free:
                chain = min(waiting)
                raise Refused(
                    "tables",
                    chain,
                    f"{len(waiting)} chains would exchange their targets in a circle, and none can be first",
                    "Leave one target on each disk free, or make a table that does not reuse targets of these chains",
                )
            batch = {chain: waiting.pop(chain) for chain in free[: self.parallel]}
            for chain, targets in batch.items():
                for target in now[chain]:
                    holder.pop(target, None)
                holder.update(dict.fromkeys(targets, chain))
            steps.append(
                Step(
                    "move",
                    f"chains {', '.join(map(str, batch))}",
                    before={str(chain): sorted(set(now[chain]) - set(targets)) for chain, targets in batch.items()},
                    after={str(chain): sorted(set(targets) - set(now[chain])) for chain, targets in batch.items()},
                    why="new targets serve before old ones go",
                    data=("move", batch),
                )
            )
        return steps

    def _difference(self, state: t.Mapping[str, t.Any]) -> tuple[dict[int, list[int]], ...]:
        """Chains as they are, those that are missing, and those that have other targets than they shall."""
        now = {chain: [target["id"] for target in item["targets"]] for chain, item in state["chains"].items()}
        new = {chain: targets for chain, targets in self.chains.items() if chain not in now}
        moves = {
            chain: targets for chain, targets in self.chains.items() if chain in now and set(targets) != set(now[chain])
        }
        return now, new, moves

    def _silent(self, state: t.Mapping[str, t.Any]) -> list[int]:
        """Nodes of new targets that do not report: a chain whose targets are not up falls to LASTSRV."""
        alive = {
            node["id"]
            for node in state["nodes"]
            if node["type"] == "storage" and node["status"] == "HEARTBEAT_CONNECTED"
        }
        _now, new, moves = self._difference(state)
        return sorted({target_place(target)[0] for x in (new, moves) for ids in x.values() for target in ids} - alive)

    def _leftovers(self, state: t.Mapping[str, t.Any], now: t.Mapping[int, list[int]]) -> list[int]:
        """Targets that an interrupted move left beside the chains, on nodes that are there to be asked."""
        wanted = {target for targets in self.chains.values() for target in targets}
        alive = {node["id"] for node in state["nodes"] if node["status"] == "HEARTBEAT_CONNECTED"}
        chained = {target for targets in now.values() for target in targets}
        gone = chained - wanted if self.chains else set()  # those that a move of this plan takes out remove themselves
        return sorted(
            target
            for target, info in state["orphans"].items()
            if self.migrate and self.chains and target not in wanted and target not in gone and info["node"] in alive
        )

    # -- apply -------------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        kind, *rest = step.data
        getattr(self, f"_apply_{kind}")(Admin(self.host, self.cluster), *rest)

    def _apply_create(self, admin: Admin, chains: t.Mapping[int, list[int]]) -> None:
        admin.run(*self._creations({target: chain for chain, targets in chains.items() for target in targets}))

    def _creations(self, targets: t.Mapping[int, int]) -> list[str]:
        commands = []
        for target, chain in sorted(targets.items()):
            node, disk = target_place(target)
            place = f"--node-id {node} --disk-index {disk} --target-id {target} --chain-id {chain}"
            known = self.chunk_sizes.get(chain) or self.table_sizes.get(decode_chain(chain)[0], [])
            sizes = " ".join(map(str, known))
            place += f" --chunk-size {sizes}" if sizes else ""
            commands.append(f"create-target {place} --use-new-chunk-engine")
        return commands

    def _apply_chains(self, admin: Admin, chains: t.Mapping[int, list[int]]) -> None:
        width = max(len(targets) for targets in chains.values())
        rows = [",".join(map(str, [chain, *targets])) for chain, targets in chains.items()]
        path = self._upload("chains.csv", ["ChainId" + ",TargetId" * width, *rows])
        admin.run(f"upload-chains --set-preferred-target-order {path}")
        self._until(admin, f"{len(chains)} new chains serve", lambda state: self._unserved(state, chains))

    def _apply_table(self, admin: Admin, table: t.Mapping[str, t.Any]) -> None:
        path = self._upload("table.csv", ["ChainId", *map(str, table["order"])])
        description = f"--desc {quote(table['description'])} " if table["description"] else ""
        admin.run(f"upload-chain-table {description}{table['id']} {path}")

    def _upload(self, name: str, lines: t.Sequence[str]) -> str:
        path = f"{STATE}/{self.cluster}/{name}"
        self.host.write(path, "\n".join(lines) + "\n")
        return self.host.path(path)

    def _apply_recreate(self, admin: Admin, disk: _Disk) -> None:
        """Make what the disk lacks, once mgmtd knows that it is gone: one that still counts as serving would serve empty."""

        def unnoticed(state: t.Mapping[str, t.Any]) -> list[str]:
            silent = not any(n["id"] == disk.node and n["status"] == "HEARTBEAT_CONNECTED" for n in state["nodes"])
            return [f"node {disk.node} does not report"] * silent + [
                f"{target['id']} is {target['public']}/{target['local']}"
                for target in disk.targets(state)
                if disk.lacks(target)
                and (target["public"], target["local"]) not in (("OFFLINE", "OFFLINE"), ("LASTSRV", "OFFLINE"))
            ]

        what = f"mgmtd notices what {disk} lacks (after heartbeat_fail_interval)"
        lacking = [target for target in disk.targets(self._until(admin, what, unnoticed)) if disk.lacks(target)]
        last = [target["id"] for target in lacking if target["public"] == "LASTSRV" and target["others"]]
        if last:
            raise HostError(
                f"{len(last)} targets are the last replica that served (LASTSRV), such as {last[0]}: the data were on this "
                "disk alone. Bring the old disk back, or read docs/runbooks/threefs.md, LASTSRV, before you give them up"
            )
        admin.run(*self._creations({target["id"]: target["chain"] for target in lacking}))

        def missing(state: t.Mapping[str, t.Any]) -> list[str]:
            return [
                f"{target['id']} {target['public']}/{target['local']}"
                for target in disk.targets(state)
                if not serves(target)
            ]

        self._until(admin, f"{disk} is filled again", missing, self.copy)

    def _apply_move(self, admin: Admin, batch: t.Mapping[int, list[int]]) -> None:
        """One phase for all chains of the batch at a time; each phase looks at what is there, so that it can be repeated."""
        state = look(admin)
        chains = state["chains"]
        held = {chain: {target["id"]: target for target in chains[chain]["targets"]} for chain in batch}
        added = {target: chain for chain, targets in batch.items() for target in targets if target not in held[chain]}
        taken = {
            target: other
            for other, item in chains.items()
            for target in (x["id"] for x in item["targets"])
            if target in added
        }
        if taken:
            target, other = next(iter(taken.items()))
            raise HostError(
                f"target {target} is still in chain {other}. Remove it there first, or make a table that does not reuse it"
            )
        admin.run(*self._creations(added))
        admin.run(*(f"update-chain --mode add {chain} {target}" for target, chain in added.items()), allow=_ALREADY)
        self._until(admin, "new targets serve", lambda seen: self._unserved(seen, batch), self.copy)
        state = look(admin)
        old = [
            (chain, target)
            for chain, targets in batch.items()
            for target in state["chains"][chain]["targets"]
            if target["id"] not in targets
        ]
        alive = {node["id"] for node in state["nodes"] if node["status"] == "HEARTBEAT_CONNECTED"}
        going = [
            f"offline-target --node-id {target_place(target['id'])[0]} --target-id {target['id']}"
            for _chain, target in old
            if target["public"] != "OFFLINE" and target_place(target["id"])[0] in alive
        ]
        admin.run(*going, allow=_ALREADY)
        numbers = {target["id"] for _chain, target in old}

        def still(seen: t.Mapping[str, t.Any]) -> list[str]:
            return [
                f"{target['id']} {target['public']}"
                for chain in batch
                for target in seen["chains"][chain]["targets"]
                if target["id"] in numbers and target["public"] != "OFFLINE"
            ]

        self._until(admin, "old targets are offline", still)
        admin.run(*(f"update-chain --mode remove {chain} {target['id']}" for chain, target in old), allow=_ALREADY)
        self._remove(admin, [target["id"] for _chain, target in old if target_place(target["id"])[0] in alive])
        orders = [
            f"set-preferred-target-order {chain} {' '.join(map(str, targets))}" for chain, targets in batch.items()
        ]
        admin.run(*orders)

    def _apply_leftovers(self, admin: Admin, targets: t.Sequence[int]) -> None:
        admin.run(*(f"offline-target --node-id {target_place(x)[0]} --target-id {x}" for x in targets), allow=_ALREADY)
        self._remove(admin, targets)

    def _remove(self, admin: Admin, targets: t.Sequence[int]) -> None:
        """Remove targets from their disks; the storage node hears with its next heartbeat that the chain let them go."""
        end = time.monotonic() + min(self.wait, 120)
        waiting: list[int] = list(targets)
        while waiting:
            commands = [f"remove-target --node-id {target_place(target)[0]} --target-id {target}" for target in waiting]
            answers: list[Answer] = admin.batch(commands)
            failed = [(target, answer) for target, answer in zip(waiting, answers) if answer.code not in {0, *_ALREADY}]
            waiting = [target for target, _answer in failed]
            if waiting and time.monotonic() >= end:
                raise HostError(f"remove-target {waiting[0]}: {failed[0][1].error}. The next run removes it")
            if waiting:
                time.sleep(1)

    def _apply_retire(self, admin: Admin, node: int, kind: str) -> None:
        def registered(state: t.Mapping[str, t.Any]) -> list[str]:
            return [
                f"it is {item['status']}"
                for item in state["nodes"]
                if item["id"] == node and item["status"] in ("HEARTBEAT_CONNECTED", "HEARTBEAT_CONNECTING")
            ]

        self._until(admin, f"node {node} is stopped (mgmtd notices after heartbeat_fail_interval)", registered)
        admin.run(f"unregister-node {node} {kind}", allow={STATUS["Mgmtd::NodeNotFound"]})

    @staticmethod
    def _unserved(state: t.Mapping[str, t.Any], wanted: t.Mapping[int, list[int]]) -> list[str]:
        """Wanted targets that do not serve; a chain that lost its last server is an error and not worth waiting for."""
        found = []
        for chain, targets in wanted.items():
            item = state["chains"].get(chain, {"status": "unknown", "targets": []})
            held = {target["id"]: target for target in item["targets"]}
            lost = [
                target["id"]
                for target in item["targets"]
                if target["public"] == "LASTSRV" and target["local"] == "OFFLINE"
            ]
            if lost:
                raise HostError(
                    f"chain {chain} has no server: {lost[0]} served last and is offline (LASTSRV). Bring its storage service "
                    "back; see docs/runbooks/threefs.md, LASTSRV"
                )
            found += [
                f"{target} {held[target]['public'] if target in held else 'not in the chain'}"
                for target in targets
                if target not in held or not serves(held[target])
            ]
        return found

    def _until(
        self,
        admin: Admin,
        what: str,
        missing: t.Callable[[t.Mapping[str, t.Any]], list[str]],
        seconds: float | None = None,
    ) -> dict[str, t.Any]:
        """Wait, within bounds, until nothing is missing; the state in which it is so."""
        seconds = self.wait if seconds is None else seconds
        end = time.monotonic() + seconds
        while True:
            state = look(admin)
            bad = missing(state)
            if not bad:
                return state
            if time.monotonic() >= end:
                raise HostError(
                    f"{what}: not within {seconds:g} seconds: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
                )
            time.sleep(1)

    def result(self, observed: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
        """What is there."""
        state = observed or {"chains": {}, "tables": {}}
        return {
            "chains": len(state["chains"]),
            "tables": {str(number): max(versions) for number, versions in state["tables"].items()},
        }


def _disk(given: t.Mapping[str, t.Any]) -> _Disk:
    present = given.get("present")
    return _Disk(
        int(given["node_id"]), int(given["disk_index"]), None if present is None else frozenset(map(int, present))
    )


def _csv(option: str, text: str, head: list[str], more: str = "") -> list[list[int]]:
    """Rows of numbers below the header that upstream's files have."""
    lines = [line.split(",") for line in str(text).splitlines() if line.strip()]
    names = lines[0] if lines else []
    if (
        names[: len(head)] != head
        or any(name != more for name in names[len(head) :])
        or (more and len(names) == len(head))
    ):
        wanted = ",".join([*head, *([more, "..."] if more else [])])
        raise Refused(
            option,
            os.linesep.join(str(text).splitlines()[:1]),
            "not the file that upstream's generator writes",
            f"The first line is {wanted}",
        )
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(names) or not all(cell.strip().isdigit() for cell in line):
            raise Refused(option, ",".join(line), f"line {number} is not {len(names)} numbers", "Make the file again")
        rows.append([int(cell) for cell in line])
    if not rows:
        raise Refused(option, text, "there are no chains", "Make the file again")
    return rows
