# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The chain table as a resource: files, idempotence, interruption, tables of others."""

from __future__ import annotations

import itertools
import typing as t
from collections import Counter

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._placement_files import CHAINS, TABLE, TARGETS
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_table import ChainTable
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all


def options(count: int = 7, **given: t.Any) -> dict[str, t.Any]:
    """Options of the module as Ansible hands them over."""
    nodes = [{"id": 10001 + number, "disks": 4, "weight": None, "domain": None} for number in range(count)]
    return {
        "state": "present",
        "directory": "/chains",
        "nodes": nodes,
        "replicas": 3,
        "type": "CR",
        "targets_per_disk": 6,
        "seed": 0,
        "stripe": None,
        "target_id_prefix": 1,
        "chain_id_prefix": 9,
        "chunk_sizes": [],
        "disjoint_from": [],
        "discard_existing": False,
        **given,
    }


def converge(host: t.Any, **given: t.Any) -> tuple[list[str], dict[str, t.Any]]:
    """Plan and apply; returns what was written and the result."""
    table = ChainTable(host, options(**given))
    steps = table.plan(table.observe())
    apply_all(table, steps)
    return [step.object for step in steps], table.result(table.observe())


def test_a_table_is_made_once(fake_host: t.Any) -> None:
    written, result = converge(fake_host)
    assert written == [f"/chains/{name}" for name in (CHAINS, TABLE, TARGETS)]
    assert result["chain_table"] == {"directory": "/chains", "chains": 56, "targets": 168, "nodes": 7}
    assert result["warnings"] == [] and result["moves"] == []
    assert all(invariant["valid"] for invariant in result["invariants"])
    assert result["report"][3].startswith(
        "4 pairs: ok: two nodes share 8 to 8 chains, 8.000 on average; sum of squares 1.0000"
    )
    assert converge(fake_host)[0] == []
    assert converge(fake_host, seed=5)[0] == []
    assert converge(fake_host, stripe=8)[0] == []


def test_a_disk_of_twice_the_weight_has_twice_the_targets(fake_host: t.Any) -> None:
    nodes = options()["nodes"]
    nodes[2] = {**nodes[2], "weight": 2.0, "disks": 2}
    nodes[5] = {**nodes[5], "weight": 0.5}
    _written, result = converge(fake_host, nodes=nodes)
    assert all(invariant["valid"] for invariant in result["invariants"])
    on_disk = Counter(
        divmod(int(target) // 100 % 10**9, 1000)
        for line in fake_host.read(f"/chains/{CHAINS}").splitlines()[1:]
        for target in line.split(",")[1:]
    )
    wanted = {10003: (2, 12), 10006: (4, 3)}
    for node in range(10001, 10008):
        disks, targets = wanted.get(node, (4, 6))
        assert [on_disk[node, disk + 1] for disk in range(disks)] == [targets] * disks
    assert sum(on_disk.values()) == 5 * 24 + 24 + 12


def test_a_plan_writes_nothing_and_predicts_the_result(fake_host: t.Any) -> None:
    table = ChainTable(fake_host, options())
    table.predicting = True
    steps = table.plan(table.observe())
    assert [step.verb for step in steps] == ["create"] * 3
    assert not fake_host.exists("/chains")
    predicted = table.result(table.observe())
    assert predicted == converge(fake_host)[1]


def test_new_nodes_are_a_change_of_the_table(fake_host: t.Any) -> None:
    converge(fake_host)
    before = fake_host.read(f"/chains/{CHAINS}").splitlines()
    table = ChainTable(fake_host, options(8))
    steps = table.plan(table.observe())
    assert {(step.verb, step.why) for step in steps} == {("update", "21 targets move; at least 21 must")}
    result = converge(fake_host, count=8)[1]
    assert len(result["moves"]) == result["moves_least"] == 21
    move = result["moves"][0]
    assert move["new_node_id"] == 10008 and str(move["new_target_id"]).startswith("1010008")
    after = {line.partition(",")[0]: line for line in fake_host.read(f"/chains/{CHAINS}").splitlines()}
    assert str(move["new_target_id"]) in after[str(move["chain_id"])]
    assert {line.partition(",")[0] for line in before} < set(after)
    assert converge(fake_host, count=8)[0] == []


def test_a_run_that_was_interrupted_between_the_files_is_completed(fake_host: t.Any) -> None:
    converge(fake_host)
    table = ChainTable(fake_host, options(8))
    table.apply(table.plan(table.observe())[0])  # the chains, not the table
    written, result = converge(fake_host, count=8)
    assert written == [f"/chains/{TABLE}", f"/chains/{TARGETS}"]
    assert result["moves"] == [] and result["chain_table"]["chains"] == 64
    assert converge(fake_host, count=8)[0] == []


def test_nodes_that_go_leave_more_on_the_others_and_a_warning(fake_host: t.Any) -> None:
    converge(fake_host, count=8)
    result = converge(fake_host, count=7)[1]
    assert len(result["moves"]) == 24
    assert result["warnings"] == [
        "/chains: the existing chains hold data and are kept: they have 192 targets, and targets_per_disk provides 168, "
        "so disks carry 1.14 times what was declared"
    ]
    assert converge(fake_host, count=7)[0] == []


def test_a_new_table_only_on_demand(fake_host: t.Any) -> None:
    converge(fake_host)
    assert converge(fake_host, seed=9, discard_existing=True)[0] != []
    assert converge(fake_host, seed=9, discard_existing=True)[0] == []


def test_targets_follow_the_chunk_sizes(fake_host: t.Any) -> None:
    converge(fake_host)
    assert converge(fake_host, chunk_sizes=["512KiB", "4MiB"])[0] == [f"/chains/{TARGETS}"]
    assert "--chunk-size 524288 4194304 --use" in fake_host.read(f"/chains/{TARGETS}")


def test_tables_of_two_tenants_on_the_same_disks(fake_host: t.Any) -> None:
    converge(fake_host)
    result = converge(fake_host, directory="/tenant", disjoint_from=["/chains"])[1]
    assert result["invariants"][8] == {
        "number": 9,
        "name": "tenants",
        "valid": True,
        "text": "no target is in one of 1 other tables",
    }
    converge(fake_host, directory="/tenant", disjoint_from=["/chains"], state="checked", nodes=[])


def test_erasure_coding(fake_host: t.Any) -> None:
    result = converge(fake_host, count=8, type="EC", replicas=6)[1]
    assert result["chain_table"]["chains"] == 192  # one for each target
    assert fake_host.read(f"/chains/{CHAINS}").splitlines()[0] == "ChainId,TargetId"
    assert converge(fake_host, count=8, type="EC", replicas=6)[0] == []
    converge(fake_host, count=8, type="EC", replicas=6, state="checked")


def foreign(host: t.Any) -> None:
    """The files of gen_chain_table.py for five nodes of four disks: ascending nodes, disk by disk."""
    rows = []
    for disk in range(1, 5):
        rank = dict.fromkeys(range(1, 6), 0)
        for group, members in enumerate(itertools.combinations(range(1, 6), 3), 1):
            for node in members:
                rank[node] += 1
            targets = [f"1{10000 + node:06}{disk:03}{rank[node]:02}" for node in members]
            rows.append(f"9{disk:03}{group:05},{','.join(targets)}\n")
    host.files(
        {
            f"/chains/{CHAINS}": "ChainId,TargetId,TargetId,TargetId\n" + "".join(rows),
            f"/chains/{TABLE}": "ChainId\n" + "".join(row.partition(",")[0] + "\n" for row in rows),
        }
    )


def test_a_table_of_upstream_is_judged(fake_host: t.Any) -> None:
    foreign(fake_host)
    with pytest.raises(Refused) as refused:
        converge(fake_host, state="checked", nodes=[])
    assert refused.value.option == "directory"
    assert "7 positions: node 10001 has 24 heads of 24 targets, 8.0 would be even" in refused.value.problem


def test_a_table_of_upstream_is_taken_over_without_moving_data(fake_host: t.Any) -> None:
    foreign(fake_host)
    before = fake_host.read(f"/chains/{CHAINS}").splitlines()
    result = converge(fake_host, count=5)[1]
    after = fake_host.read(f"/chains/{CHAINS}").splitlines()
    assert result["moves"] == []
    assert [sorted(line.split(",")) for line in before] == [sorted(line.split(",")) for line in after]
    valid = {invariant["name"]: invariant["valid"] for invariant in result["invariants"]}
    assert valid["positions"] and valid["stripes"] and not valid["rebuild"]  # disks would have to move for that
    assert "rebuild" in result["warnings"][0]
    assert converge(fake_host, count=5)[0] == []


def test_files_that_are_none_stop_before_anything_is_written(fake_host: t.Any) -> None:
    fake_host.files({f"/chains/{CHAINS}": "hello\n"})
    with pytest.raises(HostError, match="the first line is 'hello' and not upstream's header"):
        converge(fake_host)
    assert fake_host.read(f"/chains/{CHAINS}") == "hello"
    assert converge(fake_host, discard_existing=True)[0] != []


def test_small_files_are_shown_in_the_diff_and_large_ones_counted(fake_host: t.Any) -> None:
    steps = {step.object: step for step in ChainTable(fake_host, options()).plan({"files": {}, "others": {}})}
    assert steps[f"/chains/{TABLE}"].after.startswith("ChainId\n9")
    large = ChainTable(fake_host, options(70)).plan({"files": {}, "others": {}})
    assert large[0].after == {"lines": 561}
