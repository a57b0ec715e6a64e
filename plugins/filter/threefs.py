# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters for 3FS clusters."""

from __future__ import annotations

import hashlib
import hmac

from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.module_utils import _threefs_layout
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import encode_token


def threefs_token(secret: str, cluster: str, uid: int, generation: int = 1) -> str:
    """The token of a user; see threefs_token.yml."""
    if len(str(secret)) < 20:
        raise AnsibleFilterError(
            "threefs_token: the secret has fewer than 20 characters. Make one: openssl rand -base64 32"
        )
    message = f"{cluster}\0{int(uid)}\0{int(generation)}".encode()
    digest = hmac.new(str(secret).encode(), message, hashlib.sha256).digest()
    return encode_token(int(uid), int.from_bytes(digest[:8], "little"))


def threefs_users(users: list, secret: str, cluster: str) -> list:
    """Users of the role with their tokens; see threefs_users.yml."""
    found = []
    for user in users:
        plain = {key: value for key, value in user.items() if key != "generation"}
        generation = int(user.get("generation", 1))
        if user.get("state", "present") == "present" and not user.get("token"):
            plain["token"] = threefs_token(secret, cluster, user["uid"], generation)
            if generation > 1 and not user.get("previous_token"):
                plain["previous_token"] = threefs_token(secret, cluster, user["uid"], generation - 1)
        found.append(plain)
    return found


def threefs_layout(members: list, wish: dict, leaving: list = (), playing: list | None = None) -> dict:
    """The cluster that the inventory describes; see threefs_layout.yml."""
    mounts = wish["mounts"]
    hosts = {
        member["inventory_hostname"]: {
            "services": list(member["threefs_services"]),
            "node": int(member["threefs_node"]),
            "address": str(member["threefs_address"]),
            "devices": list(member.get("threefs_devices", [])),
            "disks": len(mounts),
            "weight": member.get("threefs_weight"),
            "domain": member.get("threefs_domain"),
        }
        for member in members
    }
    try:
        _threefs_layout.check(hosts, wish, leaving)
        if playing is not None:
            _threefs_layout.check_limit(hosts, playing)
    except Refused as refusal:
        raise AnsibleFilterError(str(refusal)) from refusal
    by_service = {name: _threefs_layout.having(hosts, name) for name in ("mgmtd", "meta", "storage", "fuse", "monitor")}
    tables = []
    for table in wish["tables"]:
        others = [other["id"] for other in tables if _share(hosts, table, other)]
        nodes = _threefs_layout.nodes(hosts, table, leaving)
        stripe = max(_threefs_layout.stripes(wish, table).values(), default=None)
        tables.append({**table, "nodes": nodes, "disjoint_from": others, "stripe": stripe})
    return {
        "hosts": by_service,
        "admin": by_service["mgmtd"][0],
        "mgmtd": [hosts[name]["address"] for name in by_service["mgmtd"]],
        "monitor": next((hosts[name]["address"] for name in by_service["monitor"]), ""),
        "expect": {name: len(by_service[name]) for name in ("mgmtd", "meta", "storage")},
        "tables": tables,
        "replicas": _threefs_layout.replicas(wish),
        "chunk_sizes": {str(table["id"]): table["chunk_sizes"] for table in tables if table.get("chunk_sizes")},
        "leaving_nodes": [hosts[name]["node"] + 10000 for name in leaving],
        "former_metas": _threefs_layout.former_metas(hosts, hosts if playing is None else playing),
    }


def _share(hosts: dict, table: dict, other: dict) -> bool:
    """Whether two tables have targets on the same host."""
    everyone = _threefs_layout.having(hosts, "storage")
    return bool(set(table.get("hosts") or everyone) & set(other.get("hosts") or everyone))


class FilterModule:
    """Filters of this file."""

    def filters(self):
        """Name to function."""
        return {"threefs_layout": threefs_layout, "threefs_token": threefs_token, "threefs_users": threefs_users}
