# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets, chains, users, directories and gates against the doubles: _threefs_target, _threefs_user, _threefs_directory,
_threefs_info, _threefs_admin and _threefs."""

from __future__ import annotations

import json
import os
import re
import typing as t

import pytest

pytest.importorskip("tomllib", reason="the doubles read TOML as only Python 3.11 and newer can")

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import (
    MANAGED,
    PROGRAMS,
    encode_token,
    token_uid,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import STATUS, Admin, Answer, hide
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_directory import Directories
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_info import Info, look, parse, problems
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_target import Targets
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_toml import Toml
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_user import Users
from ansible_collections.agentfleet.metal.tests.unit.threefs_lab import DOUBLES, ROOT_TOKEN, Lab


@pytest.fixture
def lab(tmp_path: t.Any, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Three storage nodes with two disks each."""
    return Lab(tmp_path, monkeypatch)


def target(node: int, disk: int, index: int = 0) -> int:
    """Upstream's formula, with prefix 1."""
    return ((1_000_000 + node) * 1000 + disk + 1) * 100 + index + 1


def table(chains: dict[int, list[int]], number: int = 1) -> dict[str, t.Any]:
    """The generator's two files."""
    width = len(next(iter(chains.values())))
    rows = "".join(",".join(map(str, [chain, *targets])) + "\n" for chain, targets in chains.items())
    order = "".join(f"{chain}\n" for chain in chains)
    return {"id": number, "chains": "ChainId" + ",TargetId" * width + "\n" + rows, "order": "ChainId\n" + order}


FIRST = {
    100100001: [target(10001, 0), target(10002, 0)],
    100100002: [target(10002, 1), target(10001, 1)],
}
# the first chain moves from node 10002 to 10003, the second stays, a third is new
GROWN = {
    100100001: [target(10001, 0), target(10003, 0)],
    100100002: FIRST[100100002],
    100100003: [target(10003, 1), target(10002, 0)],
}


def converge(lab: Lab, kind: type = Targets, **params: t.Any) -> list[str]:
    """Observe, plan, apply; returns the verbs."""
    resource = kind(lab.host, {"cluster": "stage", "wait_seconds": 60, "copy_seconds": 60, **params})
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    return [step.verb for step in steps]


def test_targets_come_before_chains_and_chains_before_tables(lab: Lab) -> None:
    verbs = converge(lab, tables=[table(FIRST)])
    assert verbs == ["create", "upload", "upload"]
    assert lab.chains() == {str(chain): set(targets) for chain, targets in FIRST.items()}
    assert converge(lab, tables=[table(FIRST)]) == []


def test_targets_have_the_chunk_sizes_of_their_table(lab: Lab) -> None:
    coded = {
        200100001: [target(10003, 0)],
        200100002: [target(10001, 0, 1)],
    }  # a group of two, each chain with one target
    tables = [table(FIRST), {**table(coded, 2), "chunk_sizes": ["64KiB", "4MiB"]}]
    converge(lab, tables=tables)
    assert lab.chains()["200100001"] == {target(10003, 0)}

    def sizes(node: int, disk: int, index: int = 0) -> str:
        made = lab.root / f"disks/{node}/{disk}/{target(node, disk, index)}/target.toml"
        return made.read_text().partition("chunk_size_list = ")[2].strip()

    assert sizes(10003, 0) == sizes(10001, 0, 1) == "['65536', '4194304']"
    assert sizes(10001, 0) == str(lab.double.CHUNK_SIZES), "the storage service's own"
    converge(
        lab, tables=[tables[0], {**tables[1], **table({**coded, 200100001: [target(10002, 0, 1)]}, 2)}], migrate=True
    )
    assert sizes(10002, 0, 1) == "['65536', '4194304']", "a chain that moves keeps them"
    with pytest.raises(Refused) as refused:
        converge(lab, tables=[{**table(coded, 2), "chunk_sizes": ["3MiB"]}])
    assert (refused.value.option, refused.value.remedy) == (
        "tables[0].chunk_sizes[0]",
        "Use a power of two from 64KiB to 64MiB",
    )


def test_an_error_text_with_exit_code_0_is_an_error_and_the_next_run_goes_on(lab: Lab) -> None:
    lab.trap("create-target", after=2)
    with pytest.raises(HostError, match=r"create-target .*: 999\(Unknown\) provoked.*Done before it: nothing"):
        converge(lab, tables=[table(FIRST)])
    assert lab.chains() == {}, "no chain may refer to a target that is not there"
    assert converge(lab, tables=[table(FIRST)]) == ["create", "upload", "upload"]
    assert converge(lab, tables=[table(FIRST)]) == []


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("list-chains", "6004(MgmtdClient::RoutingInfoNotReady)"),
        ("create-target", "2007(RPC::SendFailed)"),
        ("create-target", "2012(RPC::RequestRefused)"),
        ("create-target", "7006(StorageClient::CommError)"),
        ("create-target", "7008(StorageClient::Timeout)"),
    ],
)
def test_what_passes_by_itself_is_tried_again(lab: Lab, command: str, error: str) -> None:
    lab.trap(command, error=error)
    assert converge(lab, tables=[table(FIRST)]) == ["create", "upload", "upload"]


def test_chains_with_data_are_not_moved_unasked(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    with pytest.raises(Refused) as refused:
        converge(lab, tables=[table(GROWN)])
    assert "1 chains that hold data have other targets" in refused.value.problem
    assert "migrate: true" in refused.value.remedy


@pytest.mark.parametrize(
    "command", ["create-target", "update-chain", "offline-target", "set-preferred-target-order", "upload-chains"]
)
def test_an_interrupted_growth_is_continued(lab: Lab, command: str) -> None:
    converge(lab, tables=[table(FIRST)])
    lab.trap(command)
    with pytest.raises(HostError, match="provoked"):
        converge(lab, tables=[table(GROWN)], migrate=True)
    assert all(len(serving) >= 2 for serving in lab.chains().values()), "no chain has fewer replicas for our sake"
    converge(lab, tables=[table(GROWN)], migrate=True)
    assert lab.chains() == {str(chain): set(targets) for chain, targets in GROWN.items()}
    held = {node: sorted(int(tid) for tid in one.found) for node, one in lab.storages.items()}
    wanted = sorted(number for targets in GROWN.values() for number in targets)
    assert sorted(number for numbers in held.values() for number in numbers) == wanted, (
        "nothing is left beside the chains"
    )
    assert converge(lab, tables=[table(GROWN)], migrate=True) == []


def test_targets_that_are_exchanged_in_a_circle_are_refused(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    circle = {
        100100001: [target(10001, 0), target(10002, 1)],
        100100002: [target(10002, 0), target(10001, 1)],
    }
    with pytest.raises(Refused) as refused:
        converge(lab, tables=[table(circle)], migrate=True)
    assert "in a circle" in refused.value.problem


def test_a_lost_node_is_replaced_and_forgotten(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    lab.stop(10002)
    lab.sleep(20)
    after = {
        100100001: [target(10001, 0), target(10003, 0)],
        100100002: [target(10003, 1), target(10001, 1)],
    }
    verbs = converge(lab, tables=[table(after)], migrate=True, retire_nodes=[10002])
    assert verbs == ["move", "unregister"] or verbs == ["move", "upload", "unregister"]
    assert lab.chains() == {str(chain): set(targets) for chain, targets in after.items()}
    assert "10002" not in lab.database.document["keys"]["nodes"]


def test_a_new_disk_is_filled_by_the_others(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    disk = {"node_id": 10002, "disk_index": 0}
    assert converge(lab, recreate_disks=[disk]) == []
    lab.stop(10002)
    for path in (lab.root / "disks/10002/0").glob("*/*"):
        path.unlink()
        path.parent.rmdir()
    lab.sleep(20)
    lab.add(10002)
    lab.sleep(3)
    assert lab.chains()["100100001"] == {target(10001, 0)}
    assert converge(lab, recreate_disks=[disk]) == ["recreate"]
    assert lab.chains()["100100001"] == set(FIRST[100100001])
    assert converge(lab, recreate_disks=[disk]) == []


def test_a_new_disk_is_filled_though_mgmtd_still_counts_the_old_one_as_serving(lab: Lab) -> None:
    converge(lab, tables=[{**table(FIRST), "chunk_sizes": ["4MiB"]}])
    lab.stop(10002)
    for path in (lab.root / "disks/10002/0").glob("*/*"):
        path.unlink()
        path.parent.rmdir()
    lab.add(10002)
    lab.sleep(2)
    new, other = FIRST[100100001][1], FIRST[100100002][0]
    assert lab.chains()["100100001"] == set(FIRST[100100001]), "nobody has told mgmtd otherwise"
    version = lab.database.document["keys"]["chains"]["100100001"]["version"]
    disk = {"node_id": 10002, "disk_index": 0}
    lab.trap("create-target")
    with pytest.raises(HostError, match="provoked"):
        converge(lab, recreate_disks=[{**disk, "present": []}], chunk_sizes={"1": ["4MiB"]})
    assert lab.chains()["100100001"] == {target(10001, 0)}, "a target made before that would serve without its data"
    assert converge(lab, recreate_disks=[{**disk, "present": []}], chunk_sizes={"1": ["4MiB"]}) == ["recreate"]
    chain = lab.database.document["keys"]["chains"]["100100001"]
    assert lab.chains()["100100001"] == set(FIRST[100100001]) and chain["version"] > version
    made = (lab.root / f"disks/10002/0/{new}/target.toml").read_text()
    assert "chunk_size_list = ['4194304']" in made, "its table's, which create-targets does not know"
    assert converge(lab, recreate_disks=[{**disk, "present": [new]}]) == []
    assert converge(lab, recreate_disks=[{"node_id": 10002, "disk_index": 1, "present": [other]}]) == []


def test_targets_that_are_still_being_filled_are_waited_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    converge(lab, tables=[table(FIRST)])
    lab.stop(10002)
    lab.sleep(20)
    lab.add(10002)
    monkeypatch.setattr(lab.double, "SYNC_SECONDS", 30.0)
    lab.sleep(3)
    here = [*FIRST[100100001], *FIRST[100100002]]
    disk = {"node_id": 10002, "disk_index": 0, "present": here}
    assert lab.chains()["100100001"] == {target(10001, 0)}
    with pytest.raises(
        HostError, match=r"disk 0 of node 10002 is filled again: not within 5 seconds: \d+ SYNCING/ONLINE"
    ):
        converge(lab, recreate_disks=[disk], copy_seconds=5)
    assert converge(lab, recreate_disks=[disk], wait_seconds=5) == ["recreate"], "it is for what does not copy"
    assert lab.chains()["100100001"] == set(FIRST[100100001])


def test_the_last_replica_that_served_is_not_given_up(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    for node in (10001, 10002):  # both replicas of chain 1 go, 10001 last
        lab.stop(node)
        lab.sleep(20)
    for path in (lab.root / "disks").glob("*/0/*/*"):
        path.unlink()
        path.parent.rmdir()
    for node in (10001, 10002):
        lab.add(node)
    lab.sleep(3)
    last = next(
        int(tid)
        for tid, public in lab.database.document["keys"]["chains"]["100100001"]["targets"]
        if public == "LASTSRV"
    )
    with pytest.raises(HostError, match="LASTSRV"):
        converge(lab, recreate_disks=[{"node_id": last // 100000 % 1000000, "disk_index": 0}])


def test_new_targets_on_a_silent_node_are_refused(lab: Lab) -> None:
    lab.stop(10002)
    lab.sleep(20)
    with pytest.raises(Refused) as refused:
        converge(lab, tables=[table(FIRST)])
    assert refused.value.value == [10002] and "do not report" in refused.value.problem


def test_storage_that_was_just_started_gets_the_time_to_report(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.stop(10002)
    lab.sleep(20)

    def sleep(seconds: float) -> None:
        if 10002 not in lab.storages:
            lab.add(10002)
        lab.sleep(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    assert converge(lab, tables=[table(FIRST)]) == ["create", "upload", "upload"]


def test_a_gate_says_what_is_not_well_and_waits_within_bounds(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    info = Info(lab.host, {"cluster": "stage", "wait_healthy_seconds": 30, "expect": {"storage": 3}})
    result = info.result(info.observe())
    assert result["healthy"] and result["primary"] == 1
    assert result["chains"] == {"count": 2, "by_status": {"SERVING": 2}}
    assert result["targets_by_node"] == {"10001": 2, "10002": 2}
    lab.stop(10002)
    lab.sleep(20)
    with pytest.raises(
        HostError, match=r"not well after 30 seconds: storage 10002 on \S+ is HEARTBEAT_FAILED; 2 of 3 storage"
    ):
        info.observe()
    state = look(Admin(lab.host, "stage"))
    assert [text for text in problems(state, {}, {1: 1}) if "chain" in text] == []
    assert len([text for text in problems(state, {}, {1: 2}) if "chain" in text]) == 2
    assert len([text for text in problems(state, {}, {2: 1}) if "chain" in text]) == 2, "they are of table 1"
    assert problems(state, {"storage": 3})[1] == "2 of 3 storage report"


def test_a_gate_knows_what_would_be_lost_with_a_node(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    gate = {"cluster": "stage", "losing_nodes": [10001]}
    info = Info(lab.host, gate)
    assert info.result(info.observe())["healthy"]
    lab.stop(10002)
    lab.sleep(20)
    assert "no other server than node 10001" in Info(lab.host, gate).result(info.observe())["problems"][0]


def test_a_restarted_service_must_report_as_the_new_process(lab: Lab) -> None:
    info = Info(lab.host, {"cluster": "stage", "processes": {"10001": 1}})
    assert info.result(info.observe())["problems"][0].startswith("storage 10001 still reports as process")


def publish(lab: Lab, keys: str) -> None:
    """Another main configuration of storage in the keeping of mgmtd; two heartbeats tell what services made of it."""
    kept = lab.host.path("/main.toml")
    Admin(lab.host, "stage").run(f"get-config -t STORAGE -o {kept}")
    lab.host.write("/main.toml", lab.host.read("/main.toml") + f"\n{keys}\n")
    Admin(lab.host, "stage").run(f"set-config --type STORAGE --file {kept}")
    lab.sleep(2)


def test_a_running_service_refuses_a_configuration_that_it_reads_at_the_start(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(lab, "[server.storage]\nmax_concurrent_rdma_reads = 512")
    assert Info(lab.host, {"cluster": "stage"}).observe()["nodes"][-1]["config_status"] == "UPTODATE"
    publish(lab, "[server.aio_read_worker]\nnum_threads = 7\nmin_complete = 2")
    assert "Not support hot update: server.aio_read_worker.num_threads. desc: 3" in capsys.readouterr().err
    lab.add(10001)  # started again
    lab.sleep(2)
    info = Info(lab.host, {"cluster": "stage"})
    result = info.result(info.observe())
    versions = {node["id"]: node["config_version"] for node in result["nodes"] if node["type"] == "storage"}
    assert versions == {10001: 3, 10002: 2, 10003: 2}, "all of it or nothing"
    assert result["healthy"] and result["outdated"] == [10002, 10003], "waiting would not help"
    assert "storage 10002, storage 10003; playbook threefs_rolling" in result["warnings"][0]


def test_a_gate_wants_the_newest_configuration_of_what_was_restarted_and_not_of_the_others(lab: Lab) -> None:
    publish(lab, "[server.targets]\ntarget_paths = ['/a', '/b', '/c']")
    pid = os.getpid()
    gate = {"cluster": "stage", "wait_healthy_seconds": 5}
    with pytest.raises(HostError, match=r"not well after 5 seconds: storage 10001 on \S+ has .* version 1: OUTDATED$"):
        Info(lab.host, {**gate, "processes": {"10001": pid}}).observe()
    lab.add(10001)
    info = Info(lab.host, {**gate, "processes": {"10001": pid}})
    result = info.result(info.observe())
    assert result["healthy"] and result["warnings"] == [], "the others' turn comes"


@pytest.mark.parametrize(("status", "ill"), [("DIRTY", False), ("FAILED", True)])
def test_a_configuration_that_cannot_be_read_is_an_illness(lab: Lab, status: str, ill: bool) -> None:
    state = look(Admin(lab.host, "stage"))
    state["nodes"][-1]["config_status"] = status
    assert [status in text for text in problems(state, {})] == [True] * ill
    assert [status in text for text in problems(state, {}, current=[10003])] == [True]


# -- users ---------------------------------------------------------------------------


def user(uid: int, name: str, generation: int = 1, **more: t.Any) -> dict[str, t.Any]:
    """A user whose token is of a generation."""
    previous = {"previous_token": encode_token(uid, generation - 1)} if generation > 1 else {}
    return {"uid": uid, "name": name, "token": encode_token(uid, generation), **previous, **more}


ROOT = {"root": True, "admin": True}


def test_users_from_nothing_and_tokens_nowhere_in_arguments(lab: Lab) -> None:
    lab.database.document["keys"]["users"] = {}
    wish = [user(2001, "search"), user(0, "root", **ROOT)]
    assert converge(lab, Users, users=wish) == ["add", "add"]
    assert converge(lab, Users, users=wish) == []
    assert not [word for word in lab.argv if encode_token(2001, 1) in word or ROOT_TOKEN in word]


def test_the_token_that_the_module_acts_under_can_be_rotated(lab: Lab) -> None:
    wish = [user(0, "root", 2, **ROOT)]
    resource = Users(lab.host, {"cluster": "stage", "users": wish})
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["set token of"]
    shown = repr([step.public() for step in steps]) + repr(steps)
    assert encode_token(0, 2) not in shown and ROOT_TOKEN not in shown
    apply_all(resource, steps)
    assert resource.result(resource.observe())["users"][0]["token_current"]
    assert converge(lab, Users, users=wish) == []
    stored = lab.database.document["keys"]["users"]["0"]
    assert stored["tokens"][0]["token"] == ROOT_TOKEN, "the old one is in force for a while"


def test_an_old_token_can_end_at_once(lab: Lab) -> None:
    converge(lab, Users, users=[user(0, "root", 2, **ROOT)], old_token_days=0)
    assert lab.database.document["keys"]["users"]["0"]["tokens"] == []


def test_without_a_token_in_force_nothing_is_done(lab: Lab) -> None:
    with pytest.raises(HostError, match="no token given is one of an admin"):
        converge(lab, Users, users=[user(0, "root", 7, **ROOT)])


def test_users_are_changed_and_removed(lab: Lab) -> None:
    converge(lab, Users, users=[user(0, "root", **ROOT), user(2001, "search"), user(2002, "ads")])
    wish = [user(0, "root", **ROOT), user(2001, "find", groups=[5]), {"uid": 2002, "state": "absent"}]
    assert converge(lab, Users, users=wish) == ["change", "remove"]
    assert converge(lab, Users, users=wish) == []


def test_tokens_decode_to_their_uid() -> None:
    assert [token_uid(encode_token(uid, 99)) for uid in (0, 2001, 4294967295)] == [0, 2001, 4294967295]
    good = encode_token(7, 1)
    assert token_uid("A" + good[1:]) is None and token_uid(good[:-4]) is None and token_uid("no token") is None


def test_a_token_is_never_in_a_message(lab: Lab) -> None:
    lab.trap("user-set-token")
    with pytest.raises(HostError) as failed:
        converge(lab, Users, users=[user(0, "root", 2, **ROOT)])
    assert encode_token(0, 2) not in str(failed.value) and "(hidden)" in str(failed.value)
    assert (
        hide("user-add --token abc 0 root; user-switch -t def")
        == "user-add --token (hidden) 0 root; user-switch -t (hidden)"
    )


# -- directories ------------------------------------------------------------------------


def test_a_tenants_directory_with_its_layout(lab: Lab) -> None:
    converge(lab, tables=[table(FIRST)])
    wish = [
        {"path": "/search/hot", "uid": 2001, "mode": "0750", "chain_table": 1, "chunk_size": "4MiB", "stripe": 2},
        {"path": "/search", "uid": 2001},
    ]
    verbs = converge(lab, Directories, directories=wish)
    assert verbs == ["create", "set owner of", "create", "set owner of", "set layout of"]
    assert converge(lab, Directories, directories=wish) == []
    with pytest.raises(Refused) as refused:
        converge(lab, Directories, directories=[{"path": "/a", "chain_table": 2}])
    assert "no such table" in refused.value.problem and "there are: 1" in refused.value.remedy
    with pytest.raises(Refused) as refused:
        converge(lab, Directories, directories=[{"path": "/a", "chain_table": 1, "stripe": 9}])
    assert "2 chains only" in refused.value.problem


def test_columns_are_read_by_their_header() -> None:
    rows = Answer("list", "Id  Desc        Target  Target\n1   two words   a       b\n2               c\n").table()
    assert rows == [{"Id": "1", "Desc": "two words", "Target": ["a", "b"]}, {"Id": "2", "Desc": "", "Target": ["c"]}]


def test_a_lost_answer_is_not_taken_for_success(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.double, "execute", lambda admin, line: None)
    with pytest.raises(HostError, match="after 0 of 1 commands"):
        Admin(lab.host, "stage").run("list-nodes")


def test_errors_have_the_numbers_and_names_that_upstream_gives_them() -> None:
    upstream = json.loads((DOUBLES.parent / "contract/threefs.json").read_text())["errors"]
    assert STATUS.items() <= upstream.items()
    source = (DOUBLES / "threefs/threefs_double.py").read_text()
    told = re.findall(r'(?:Status\(\s*|"error": \[)(\d+), "([\w:]+)"', source)
    told += re.findall(r"\b(\d+)\(([A-Z]\w*(?:::\w+)?)\)", source)
    assert len(told) > 50 and {(name, int(code)) for code, name in told} <= set(upstream.items())


def test_the_double_refuses_the_keys_that_upstream_refuses(lab: Lab) -> None:
    upstream = set(json.loads((DOUBLES.parent / "contract/threefs.json").read_text())["cold"])
    mains = [Toml((DOUBLES / f"threefs/configs/{PROGRAMS[name]}.toml").read_text()).data for name in MANAGED]
    words = {key.rpartition(".")[2] for main in mains for key in lab.double.leaves(main)}
    assert words & upstream == lab.double.COLD and len(lab.double.COLD) > 30


def test_a_program_that_is_cut_off_does_not_give_tokens_away(fake_host: t.Any) -> None:
    mine, other = encode_token(0, 4711), encode_token(2001, 4712)
    said = f"> Execute user-switch -t {mine}\nUid    0\nToken  {mine}\n> Execute user-list\nUid  Name  Token\n2001 x {other}\n"
    fake_host.answers["/opt/3fs/1/bin/admin_cli"] = (
        124,
        said,
        "no end after 600 s, see /var/log/3fs/stage/of/this/run",
    )
    described = {"binaries": "/opt/3fs/1/bin", "services": []}
    fake_host.files({"/etc/3fs/stage/cluster.json": json.dumps(described)})
    with pytest.raises(HostError) as failed:
        Admin(fake_host, "stage", mine).run("user-list", "list-nodes")
    text = str(failed.value)
    assert mine not in text and other not in text and text.count("(hidden)") == 3
    assert "/var/log/3fs/stage/of/this/run" in text


def test_an_orphan_that_nobody_has_reported_is_no_error() -> None:
    rows = [{"TargetId": "101000100101", "LocalState": "INVALID", "NodeId": "N/A", "DiskIndex": "N/A", "UsedSize": "0"}]
    assert parse([], [], [], rows)["orphans"] == {101000100101: {"local": "INVALID", "node": None}}
