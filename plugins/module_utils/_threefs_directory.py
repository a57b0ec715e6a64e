# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories of a 3FS cluster with owner, mode and layout: what a tenant gets.

A layout names the chain table that new files below the directory go to; files that are
there keep theirs. Two tenants with tables of disjoint chains never share a disk.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import check_cluster, chunk_size
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import STATUS, Admin, quote
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

_NOT_FOUND = STATUS["Meta::NotFound"]
_EXISTS = STATUS["Meta::Exists"]


class Directories:
    """Directories of one cluster as a resource.

    :param params: options of the module ``threefs_directory``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.wanted: dict[str, dict[str, t.Any]] = {}
        for index, item in enumerate(params["directories"]):
            option = f"directories[{index}]"
            path = "/" + str(item["path"]).strip("/")
            if ".." in path.split("/") or not str(item["path"]).startswith("/"):
                raise Refused(
                    f"{option}.path",
                    item["path"],
                    "not a path from the top of 3FS",
                    "Write /tenant/part, without the mount point",
                )
            if path in self.wanted:
                raise Refused(f"{option}.path", item["path"], "named twice", "Name each directory once")
            self.wanted[path] = self._item(option, item)

    @staticmethod
    def _item(option: str, item: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        mode = str(item.get("mode") or "0755")
        if not re.fullmatch(r"0?[0-7]{3}", mode):
            raise Refused(f"{option}.mode", mode, "not a mode", "Write it as a string of octal digits, such as '0750'")
        uid, gid = int(item.get("uid") or 0), item.get("gid")
        found = {"uid": uid, "gid": uid if gid is None else int(gid), "mode": mode.zfill(4), "layout": None}
        table = item.get("chain_table")
        if table is None:
            if item.get("chunk_size") or item.get("stripe"):
                raise Refused(
                    f"{option}.chain_table",
                    None,
                    "a layout needs its chain table",
                    "Name the table, or leave the layout out",
                )
            return found
        chunk = chunk_size(f"{option}.chunk_size", item.get("chunk_size") or "1MiB")
        stripe = int(item.get("stripe") or 16)
        if stripe < 1:
            raise Refused(f"{option}.stripe", stripe, "not a number of chains", "At least 1")
        found["layout"] = {"chain_table": int(table), "chunk_bytes": chunk, "stripe": stripe}
        return found

    def observe(self) -> dict[str, t.Any]:
        """Attributes of each directory; None where there is none."""
        admin = Admin(self.host, self.cluster)
        if not admin.usable(self.predicting):
            return {"now": dict.fromkeys(self.wanted), "tables": None}
        commands = [f"stat --display-layout {quote(path)}" for path in self.wanted]
        answers = admin.run("list-chain-tables", *commands, allow={_NOT_FOUND})
        now: dict[str, t.Any] = {}
        for path, answer in zip(self.wanted, answers[1:]):
            pairs = {} if answer.error else {key: value.strip() for key, value in answer.pairs().items()}
            now[path] = _attributes(pairs) if pairs else None
        tables: dict[int, int] = {}
        for row in answers[0].table():
            tables[int(row["ChainTableId"])] = int(row["ChainCount"])
        return {"now": now, "tables": tables}

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Make what is missing, parents first, then owner, mode and layout."""
        steps = []
        for index, wanted in enumerate(self.wanted.values()):
            self._check_layout(f"directories[{index}]", wanted["layout"], observed["tables"])
        for path, wanted in sorted(self.wanted.items()):
            now = observed["now"][path]
            if now is None:
                steps.append(Step("create", path, after="directory"))
            owner = {key: wanted[key] for key in ("uid", "gid", "mode")}
            had = {key: now[key] for key in owner} if now else None
            if had != owner:
                steps.append(Step("set owner of", path, before=had, after=owner))
            if wanted["layout"] and (now is None or now["layout"] != wanted["layout"]):
                why = "for new files; those that are there keep theirs"
                steps.append(Step("set layout of", path, before=now and now["layout"], after=wanted["layout"], why=why))
        return steps

    def _check_layout(
        self, option: str, layout: t.Mapping[str, t.Any] | None, tables: t.Mapping[int, int] | None
    ) -> None:
        if layout is None or tables is None or self.predicting:
            return
        table = layout["chain_table"]
        if table not in tables:
            known = ", ".join(map(str, sorted(tables))) or "none"
            raise Refused(
                f"{option}.chain_table", table, "the cluster has no such table", f"Upload it first; there are: {known}"
            )
        if layout["stripe"] > tables[table]:
            raise Refused(
                f"{option}.stripe",
                layout["stripe"],
                f"table {table} has {tables[table]} chains only",
                "Make the stripe smaller",
            )

    def apply(self, step: Step) -> None:
        """One command of admin_cli."""
        admin = Admin(self.host, self.cluster)
        path, wanted = quote(step.object), self.wanted[step.object]
        if step.verb == "create":
            admin.run(f"mkdir --recursive --perm {wanted['mode']} {path}", allow={_EXISTS})
        elif step.verb == "set owner of":
            admin.run(f"set-perm --uid {wanted['uid']} --gid {wanted['gid']} --perm {wanted['mode']} {path}")
        else:
            layout = wanted["layout"]
            admin.run(
                f"set-layout --chain-table-id {layout['chain_table']} --chunk-size {layout['chunk_bytes']} "
                f"--stripe-size {layout['stripe']} {path}"
            )

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The directories as they are."""
        return {
            "directories": {
                path: now and {**now, "layout": _shown(now["layout"])} for path, now in observed["now"].items()
            }
        }


def _attributes(pairs: t.Mapping[str, str]) -> dict[str, t.Any]:
    return {
        "uid": int(pairs["Uid"]),
        "gid": int(pairs["Gid"]),
        "mode": pairs["Permission"],
        "layout": {
            "chain_table": int(pairs["Layout-ChainTable"]),
            "chunk_bytes": int(pairs["Layout-ChunkSize"]),
            "stripe": int(pairs["Layout-StripeSize"]),
        },
    }


def _shown(layout: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return {
        "chain_table": layout["chain_table"],
        "chunk_size": format_size(layout["chunk_bytes"]),
        "stripe": layout["stripe"],
    }
