# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A 3FS cluster as the inventory describes it: what it is made of, and what cannot work."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._placement_table import cluster_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import chunk_size

Hosts = t.Mapping[str, t.Mapping[str, t.Any]]
REPLICAS, EC_TARGETS = (1, 5), (2, 99)
_LARGEST = {"mgmtd": 99, "meta": 9900, "storage": 989999}


def having(hosts: Hosts, service: str) -> list[str]:
    """The hosts with a service, in the inventory's order."""
    return [name for name, host in hosts.items() if service in host["services"]]


def nodes(hosts: Hosts, table: t.Mapping[str, t.Any], leaving: t.Collection[str] = ()) -> list[dict[str, t.Any]]:
    """The nodes of a chain table as ``threefs_chain_table`` takes them.

    :param leaving: hosts that shall lose their targets
    """
    found = []
    for name in _holders(hosts, table, leaving):
        host = hosts[name]
        node: dict[str, t.Any] = {"id": host["node"] + 10000, "disks": host["disks"]}
        for key, kind in (("weight", float), ("domain", str)):
            if host.get(key) is not None:
                node[key] = kind(host[key])
        found.append(node)
    return found


def _holders(hosts: Hosts, table: t.Mapping[str, t.Any], leaving: t.Collection[str]) -> list[str]:
    """The hosts on which a table has targets."""
    return [name for name in table.get("hosts") or having(hosts, "storage") if name not in leaving]


def stripes(wish: t.Mapping[str, t.Any], table: t.Mapping[str, t.Any]) -> dict[str, int]:
    """Variable -> chains over which files are spread, of the directories that have a table."""
    found = {"threefs_stripe": int(wish["stripe"])} if table["id"] == wish["tables"][0]["id"] else {}
    for index, directory in enumerate(wish["directories"]):
        if directory.get("chain_table") == table["id"]:
            found[f"threefs_directories[{index}].stripe"] = int(directory.get("stripe") or 16)
    return found


def chunks(wish: t.Mapping[str, t.Any], table: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Variable -> size of chunks, of the directories that have a table."""
    found = {"threefs_chunk_size": str(wish["chunk_size"])} if table["id"] == wish["tables"][0]["id"] else {}
    for index, directory in enumerate(wish["directories"]):
        if directory.get("chain_table") == table["id"]:
            found[f"threefs_directories[{index}].chunk_size"] = str(directory.get("chunk_size") or "1MiB")
    return found


def _of(table: t.Mapping[str, t.Any], wish: t.Mapping[str, t.Any], key: str) -> int:
    """A number of a table, or the cluster's where it has none."""
    return int(wish[key] if table.get(key) is None else table[key])


def group(wish: t.Mapping[str, t.Any], table: t.Mapping[str, t.Any]) -> tuple[bool, int]:
    """Whether a table is for erasure coding, and how many targets of different hosts belong together."""
    return table.get("type") == "EC", _of(table, wish, "replicas")


def replicas(wish: t.Mapping[str, t.Any]) -> dict[str, int]:
    """Table -> targets of each of its chains; an EC group is made of chains with one target."""
    found = {}
    for table in wish["tables"]:
        erasure, size = group(wish, table)
        found[str(table["id"])] = 1 if erasure else size
    return found


def check(hosts: Hosts, wish: t.Mapping[str, t.Any], leaving: t.Collection[str] = ()) -> None:
    """Refuse what cannot work, before any host is touched.

    :param hosts: name -> ``services``, ``node``, ``disks``, ``devices``, and ``weight`` and ``domain`` where given
    :param wish: the role's variables without their prefix
    """
    _check_hosts(hosts)
    _check_once("threefs_mounts", wish["mounts"])
    for name in leaving:
        if name not in having(hosts, "storage"):
            raise Refused(
                "threefs_drain_hosts",
                name,
                "no storage host of this cluster",
                f"One of {', '.join(having(hosts, 'storage'))}",
            )
    if wish["tables"] and group(wish, wish["tables"][0])[0]:
        raise Refused(
            "threefs_tables[0].type",
            "EC",
            "it is the table of the root directory, and 3FS itself writes no parity",
            "Put a replicated table first, and name this one in threefs_directories",
        )
    for index, table in enumerate(wish["tables"]):
        _check_table(hosts, wish, f"threefs_tables[{index}]", table, leaving)
    known = [table["id"] for table in wish["tables"]]
    for index, number in enumerate(known):
        if number in known[:index]:
            raise Refused(f"threefs_tables[{index}].id", number, "another table has it", "Give each its own id")
    for index, directory in enumerate(wish["directories"]):
        if directory.get("chain_table") is not None and directory["chain_table"] not in known:
            raise Refused(
                f"threefs_directories[{index}].chain_table",
                directory["chain_table"],
                "no such table",
                f"Tables: {', '.join(map(str, known))}",
            )
        _check_directory(f"threefs_directories[{index}]", directory)
    users = {user["uid"]: user for user in wish["users"] if user.get("state", "present") == "present"}
    if not users.get(0, {}).get("admin"):
        raise Refused(
            "threefs_users",
            sorted(users),
            "uid 0 is missing or no admin; it is the one under which the role acts",
            "Add it with admin: true",
        )
    if having(hosts, "fuse") and wish["fuse_uid"] not in users:
        raise Refused(
            "threefs_fuse_uid", wish["fuse_uid"], "no such user", f"Users: {', '.join(map(str, sorted(users)))}"
        )
    if len(str(wish["token_secret"])) < 20:
        raise Refused(
            "threefs_token_secret",
            "(hidden)",
            "fewer than 20 characters",
            "Make one: openssl rand -base64 32, and keep it in a vault",
        )


def check_limit(hosts: Hosts, playing: t.Collection[str]) -> None:
    """Refuse a play without the host that administrates: what it looks at before, and does for, the others would be left out."""
    admin = having(hosts, "mgmtd")[0]
    if admin not in playing:
        raise Refused(
            "--limit",
            sorted(set(playing) & set(hosts)),
            f"{admin} is not in it, on which the cluster is looked at and administrated",
            f"Add {admin} to --limit",
        )


def former_metas(hosts: Hosts, playing: t.Collection[str]) -> list[int]:
    """The ids of the meta that hosts of the play do not have (any more), as a number tells them."""
    return [
        host["node"] + 99
        for name, host in hosts.items()
        if name in playing and "meta" not in host["services"] and host["node"] <= _LARGEST["meta"]
    ]


def _check_hosts(hosts: Hosts) -> None:
    for service in ("mgmtd", "meta", "storage"):
        if not having(hosts, service):
            raise Refused(
                "threefs_services",
                sorted(hosts),
                f"no host of the group has {service}",
                f"Add {service} to threefs_services of at least one",
            )
    numbers: dict[int, str] = {}
    for name, host in hosts.items():
        node = int(host["node"])
        if node < 1:
            raise Refused(f"{name}.threefs_node", node, "not a number of a host", "Count from 1 on")
        if node in numbers:
            raise Refused(
                f"{name}.threefs_node",
                node,
                f"{numbers[node]} has it",
                "Give each host its own number, and never one of a former host",
            )
        numbers[node] = name
        for service, largest in _LARGEST.items():
            if service in host["services"] and node > largest:
                raise Refused(
                    f"{name}.threefs_node", node, f"too large for a host with {service}", f"At most {largest}"
                )
        if "storage" in host["services"]:
            if not host["disks"]:
                raise Refused(
                    "threefs_mounts", [], f"{name} has storage and no disk", "Name a mount point for each disk"
                )
            if host["devices"] and len(host["devices"]) != host["disks"]:
                raise Refused(
                    f"{name}.threefs_devices",
                    len(host["devices"]),
                    f"threefs_mounts has {host['disks']} mount points",
                    "Name one device for each, in the same order on all hosts",
                )
            _check_once(f"{name}.threefs_devices", host["devices"])


def _check_once(option: str, names: t.Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise Refused(f"{option}[{index}]", name, "another disk of the list has it", "Name each once")


def _check_table(
    hosts: Hosts, wish: t.Mapping[str, t.Any], option: str, table: t.Mapping[str, t.Any], leaving: t.Collection[str]
) -> None:
    storage = having(hosts, "storage")
    if not 0 < int(table["id"]) <= 41:
        raise Refused(f"{option}.id", table["id"], "out of range", "1 to 41, since it is the first part of chain ids")
    for name in table.get("hosts") or []:
        if name not in storage:
            raise Refused(f"{option}.hosts", name, "no storage host of this cluster", f"One of {', '.join(storage)}")
    erasure, size = group(wish, table)
    low, high = EC_TARGETS if erasure else REPLICAS
    if not low <= size <= high:
        what = "targets of an EC group, data and parity" if erasure else "replicas of a chain"
        raise Refused(f"{option}.replicas", size, f"not a number of {what}", f"{low} to {high}")
    targets = _targets(hosts, wish, option, table, leaving)
    chains = targets if erasure else targets // size
    sizes = [chunk_size(f"{option}.chunk_sizes[{n}]", value) for n, value in enumerate(table.get("chunk_sizes") or [])]
    for name, chunk in chunks(wish, table).items():
        if chunk_size(name, chunk) not in sizes and sizes:
            raise Refused(
                name,
                chunk,
                f"targets of table {table['id']} take no chunks of this size",
                f"One of {', '.join(table['chunk_sizes'])}, or add it to {option}.chunk_sizes",
            )
    for name, stripe in stripes(wish, table).items():
        if erasure and stripe % size:
            raise Refused(
                name,
                stripe,
                f"table {table['id']} has EC groups of {size} chains, and a file would have a part of one",
                f"A multiple of {size}",
            )
        if stripe > chains:
            raise Refused(
                name,
                stripe,
                f"table {table['id']} will have {chains} chains only",
                f"At most {chains}, or more targets_per_disk",
            )


def _targets(
    hosts: Hosts, wish: t.Mapping[str, t.Any], option: str, table: t.Mapping[str, t.Any], leaving: t.Collection[str]
) -> int:
    """The number of a table's targets; the generator itself says what it could not place."""
    names, stay = _holders(hosts, table, leaving), nodes(hosts, table, leaving)
    erasure, size = group(wish, table)
    try:
        per_disk = _of(table, wish, "targets_per_disk")
        return cluster_of({"nodes": stay, "targets_per_disk": per_disk}, size, erasure).slots
    except Refused as refusal:
        named, value = f"{option}.{refusal.option.replace('nodes', 'hosts')}", refusal.value
        node = re.fullmatch(r"nodes\[(\d+)\]\.(\w+)", refusal.option)
        if node:
            named = "threefs_mounts" if node[2] == "disks" else f"{names[int(node[1])]}.threefs_{node[2]}"
        elif refusal.option == "nodes":
            value = {known["id"]: name for known, name in zip(stay, names)}.get(value, value)
        problem = refusal.problem + (" when the drained ones are gone" if leaving else "")
        raise Refused(named, value, problem, refusal.remedy) from None


def _check_directory(option: str, directory: t.Mapping[str, t.Any]) -> None:
    """What a layout needs, as module threefs_directory says it when the cluster is up."""
    if directory.get("chain_table") is None:
        for key in ("chunk_size", "stripe"):
            if directory.get(key):
                raise Refused(
                    f"{option}.{key}", directory[key], "a layout needs its chain table", "Set chain_table, too"
                )
    elif int(directory.get("stripe") or 16) < 1:
        raise Refused(f"{option}.stripe", directory["stripe"], "not a number of chains", "At least 1")
