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
    "chunk_size": "1MiB",
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
        member(1, threefs_domain=1),
        member(2, threefs_domain=2),
        member(3, threefs_domain=0, threefs_weight=1),
        member(4, threefs_services=["fuse", "monitor"]),
    ]
    layout = FILTERS["threefs_layout"](members, WISH)
    assert layout["admin"] == "h1" and layout["mgmtd"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert layout["monitor"] == "10.0.0.4" and layout["expect"] == {"mgmtd": 3, "meta": 3, "storage": 3}
    assert layout["tables"][0]["nodes"] == [
        {"id": 10001, "disks": 1, "domain": "1"},
        {"id": 10002, "disks": 1, "domain": "2"},
        {"id": 10003, "disks": 1, "domain": "0", "weight": 1.0},
    ]
    assert [table["disjoint_from"] for table in layout["tables"]] == [[], [1], [1]]
    assert layout["replicas"] == {"1": 3, "2": 2, "3": 1}


def test_a_table_is_ordered_for_the_widest_stripe_of_its_directories() -> None:
    directories = [{"chain_table": 1, "stripe": 6}, {"chain_table": 2, "stripe": 3}, {"chain_table": 2, "stripe": 2}]
    layout = FILTERS["threefs_layout"]([member(1), member(2), member(3)], {**WISH, "directories": directories})
    assert [table["stripe"] for table in layout["tables"]] == [6, 3, None]
    for stripe in (7, None):  # 16, where nothing is said
        wide = {**WISH, "directories": [{"chain_table": 1, "stripe": stripe}]}
        with pytest.raises(AnsibleFilterError, match=r"threefs_directories\[0\].stripe.*6 chains only"):
            FILTERS["threefs_layout"]([member(1), member(2), member(3)], wide)


def test_two_storage_hosts_for_three_replicas() -> None:
    with pytest.raises(AnsibleFilterError, match="2 storage nodes cannot hold 3 replicas apart"):
        FILTERS["threefs_layout"]([member(1), member(2)], {**WISH, "tables": [{"id": 1}]})


def test_draining() -> None:
    wish = {**WISH, "tables": [{"id": 1}], "replicas": 2}
    layout = FILTERS["threefs_layout"]([member(1), member(2), member(3)], wish, ["h3"])
    assert [node["id"] for node in layout["tables"][0]["nodes"]] == [10001, 10002] and layout["leaving_nodes"] == [
        10003
    ]


def test_the_meta_that_hosts_of_the_play_no_longer_have() -> None:
    members = [member(number) for number in (1, 2, 3)]
    members += [member(number, threefs_services=["fuse"]) for number in (4, 5, 9901)]
    layout = FILTERS["threefs_layout"]
    assert layout(members, WISH)["former_metas"] == [103, 104], "10000 and more are ids of storage"
    assert layout(members, WISH, [], ["h1", "h5"])["former_metas"] == [104], "that of h4 was not stopped in this run"


CODED = {"id": 4, "type": "EC", "replicas": 3, "targets_per_disk": 2, "chunk_sizes": ["64KiB", "4MiB"]}


def test_a_table_of_ec_groups_and_a_directory_on_it() -> None:
    wish = {
        **WISH,
        "tables": [{"id": 1, "chunk_sizes": ["1MiB"]}, CODED],
        "directories": [{"path": "/coded", "chain_table": 4, "chunk_size": "4MiB", "stripe": 6}, {"path": "/plain"}],
    }
    layout = FILTERS["threefs_layout"]([member(1), member(2), member(3)], wish)
    coded = layout["tables"][1]
    assert {key: coded[key] for key in CODED} == CODED, "what the modules are told"
    assert layout["chunk_sizes"] == {"1": ["1MiB"], "4": CODED["chunk_sizes"]}
    assert coded["stripe"] == 6 and layout["replicas"] == {"1": 3, "4": 1}, "each of its chains has one target"


@pytest.mark.parametrize(
    ("table", "directory", "said"),
    [
        ({"id": 1, "type": "EC"}, {}, r"threefs_tables\[0\].type.*root directory.*no parity"),
        ({**CODED, "replicas": 4}, {}, "3 storage nodes cannot hold 4 targets of an EC group apart"),
        ({**CODED, "replicas": 1}, {}, r"threefs_tables\[1\].replicas.*data and parity"),
        ({"id": 4, "replicas": 6}, {}, r"threefs_tables\[1\].replicas.*not a number of replicas.*1 to 5"),
        (
            {**CODED, "chunk_sizes": ["1MiB", "3MiB"]},
            {},
            r"threefs_tables\[1\].chunk_sizes\[1\].*no chunks of this size",
        ),
        (CODED, {"chain_table": 4, "stripe": 3}, r"chunk_size.*1MiB.*take no chunks.*One of 64KiB, 4MiB"),
        (CODED, {"chain_table": 4, "chunk_size": "4MiB", "stripe": 4}, "EC groups of 3 chains.*multiple of 3"),
        (CODED, {"chain_table": 4, "chunk_size": "4MiB", "stripe": 9}, "6 chains only"),
        ({"id": 4}, {"chain_table": 4, "chunk_size": "32KiB", "stripe": 1}, "no chunks of this size"),
        ({"id": 4}, {"stripe": 2}, r"threefs_directories\[0\].stripe.*needs its chain table"),
        ({"id": 4}, {"chain_table": 4, "stripe": -1}, r"threefs_directories\[0\].stripe.*not a number of chains"),
    ],
)
def test_layouts_that_cannot_work(table: dict[str, t.Any], directory: dict[str, t.Any], said: str) -> None:
    tables = [table] if table["id"] == 1 else [{"id": 1}, table]
    directories = [{"path": "/a", **directory}] if directory else []
    wish = {**WISH, "tables": tables, "directories": directories}
    with pytest.raises(AnsibleFilterError, match=said):
        FILTERS["threefs_layout"]([member(1), member(2), member(3)], wish)
