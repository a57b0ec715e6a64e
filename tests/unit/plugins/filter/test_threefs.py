# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters for 3FS clusters."""

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.filter.threefs import FilterModule
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import token_uid

FILTERS = FilterModule().filters()
SECRET = "a secret that is long enough"
WISH: dict[str, t.Any] = {
    "mounts": ["/storage/data1"],
    "tables": [{"id": 1}, {"id": 2, "hosts": ["h1", "h2"], "replicas": 2}, {"id": 3, "hosts": ["h3"], "replicas": 1}],
    "replicas": 3,
    "targets_per_disk": 6,
    "stripe": 4,
    "directories": [],
    "users": [{"uid": 0, "admin": True}],
    "fuse_uid": 0,
    "token_secret": SECRET,
}


def member(number: int, **more: t.Any) -> dict[str, t.Any]:
    """Variables of a host."""
    services = ["mgmtd", "meta", "storage"]
    node = {"threefs_node": number, "threefs_services": services, "threefs_address": f"10.0.0.{number}"}
    return {"inventory_hostname": f"h{number}", **node, **more}


def test_tokens_are_stable_and_of_their_user() -> None:
    make = FILTERS["threefs_token"]
    token = make(SECRET, "stage", 2001)
    assert token == make(SECRET, "stage", 2001, 1) and token_uid(token) == 2001
    others = [make(SECRET, "stage", 2001, 2), make(SECRET, "prod", 2001), make(SECRET + "x", "stage", 2001)]
    assert len({token, *others}) == 4
    with pytest.raises(AnsibleFilterError, match="fewer than 20 characters"):
        make("short", "stage", 0)


def test_users_get_the_token_before_for_a_rotation() -> None:
    users = [
        {"uid": 0, "name": "root", "generation": 2},
        {"uid": 1, "name": "own", "token": "T"},
        {"uid": 2, "state": "absent"},
    ]
    root, own, absent = FILTERS["threefs_users"](users, SECRET, "stage")
    make = FILTERS["threefs_token"]
    assert (root["token"], root["previous_token"]) == (make(SECRET, "stage", 0, 2), make(SECRET, "stage", 0, 1))
    assert "generation" not in root and own == users[1] and absent == users[2]


def test_the_cluster_of_an_inventory() -> None:
    members = [
        member(1, threefs_domain="r1"),
        member(2, threefs_weight=2),
        member(3),
        member(4, threefs_services=["fuse", "monitor"]),
    ]
    layout = FILTERS["threefs_layout"](members, WISH)
    assert layout["admin"] == "h1" and layout["mgmtd"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert layout["monitor"] == "10.0.0.4" and layout["expect"] == {"mgmtd": 3, "meta": 3, "storage": 3}
    assert layout["tables"][0]["nodes"] == [
        {"id": 10001, "disks": 1, "domain": "r1"},
        {"id": 10002, "disks": 1, "weight": 2},
        {"id": 10003, "disks": 1},
    ]
    assert [table["disjoint_from"] for table in layout["tables"]] == [[], [1], [1]]


def test_a_table_is_ordered_for_the_widest_stripe_of_its_directories() -> None:
    directories = [{"chain_table": 1, "stripe": 6}, {"chain_table": 2, "stripe": 3}, {"chain_table": 2, "stripe": 2}]
    layout = FILTERS["threefs_layout"]([member(1), member(2), member(3)], {**WISH, "directories": directories})
    assert [table["stripe"] for table in layout["tables"]] == [6, 3, None]
    for stripe in (7, None):  # 16, where nothing is said
        wide = {**WISH, "directories": [{"chain_table": 1, "stripe": stripe}]}
        with pytest.raises(AnsibleFilterError, match=r"threefs_directories\[0\].stripe.*6 chains only"):
            FILTERS["threefs_layout"]([member(1), member(2), member(3)], wide)


def test_two_storage_hosts_for_three_replicas() -> None:
    with pytest.raises(AnsibleFilterError, match="2 storage hosts cannot hold 3 replicas"):
        FILTERS["threefs_layout"]([member(1), member(2)], {**WISH, "tables": [{"id": 1}]})


def test_draining() -> None:
    wish = {**WISH, "tables": [{"id": 1}], "replicas": 2}
    layout = FILTERS["threefs_layout"]([member(1), member(2), member(3)], wish, ["h3"])
    assert [node["id"] for node in layout["tables"][0]["nodes"]] == [10001, 10002] and layout["leaving_nodes"] == [
        10003
    ]
