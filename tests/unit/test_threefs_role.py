# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role threefs tells its modules, rendered from its own files and taken by the modules against the doubles."""

from __future__ import annotations

import hashlib
import typing as t
from pathlib import Path

import pytest
import yaml

pytest.importorskip("tomllib", reason="the doubles read TOML as only Python 3.11 and newer can")

from ansible_collections.agentfleet.metal.plugins.module_utils._artifact import Artifact
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._placement_table import ChainTable
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_directory import Directories
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_target import Targets
from ansible_collections.agentfleet.metal.tests.unit.role_lab import HERE, rendered
from ansible_collections.agentfleet.metal.tests.unit.threefs_lab import Lab

# The tasks of a file of the role with their options, as Ansible renders them for the host that administrates.
RENDER = """
variables = {**load("defaults/main.yml"), **given["variables"], **load("vars/main.yml"), "ansible_playbook_python": sys.executable}
variables["threefs_cluster_layout"] = Templar(loader, variables=variables).template(variables["threefs__layout"])
for task in load(f"tasks/{given['name']}.yml"):
    items = Templar(loader, variables=variables).template(task["loop"]) if "loop" in task else [None]
    options = next((value for key, value in task.items() if key.startswith("agentfleet.metal.")), None)
    items = items if options else []
    found += [Templar(loader, variables={**variables, "item": item}).template(options) for item in items]
"""
CONFIGURE = {"threefs__publish_wait_seconds": 0}


def render(name: str, **variables: t.Any) -> list[dict[str, t.Any]]:
    """Each task's options; a loop's once for each item."""
    members = [
        {
            "inventory_hostname": f"h{number}",
            "threefs_node": number,
            "threefs_services": ["mgmtd", "meta", "storage"],
            "threefs_address": f"10.0.0.{number}",
        }
        for number in (1, 2, 3)
    ]
    given = {
        "threefs_cluster": "stage",
        "threefs_mounts": ["/storage/data1", "/storage/data2"],
        "threefs_token_secret": "a secret that is long enough",
        "threefs_stripe": 2,
        "ansible_check_mode": False,
        "threefs__chains": {},
        "groups": {"threefs": [member["inventory_hostname"] for member in members], "foundationdb": ["h1"]},
        "hostvars": {member["inventory_hostname"]: member for member in members},
        "ansible_play_hosts_all": [member["inventory_hostname"] for member in members],
        **variables,
    }
    return rendered("threefs", RENDER, name=name, variables=given)


def test_services_that_a_host_no_longer_has_are_removed_but_never_all() -> None:
    house = {"threefs_node": 1, "inventory_hostname": "h1", "threefs_sources": [{"sha256": "0" * 64}]}
    for services, former in ((["storage"], ["monitor", "meta", "fuse"]), (["mgmtd", "meta", "fuse"], ["monitor"])):
        tasks = render("main", **house, threefs_services=services)
        assert [task["services"] for task in tasks if task.get("state") == "absent"] == [former]
    text = (HERE / "roles/threefs/tasks/main.yml").read_text()
    assert "when: threefs__former | length > 0" in text, "no services at all mean all of them to the module"


def test_gpu_direct_and_usrbio_are_settings_of_client_hosts() -> None:
    facts = {
        "ansible_facts": {"metal": {"packages": [], "os": {"family": "debian"}}},
        "threefs_sources": [{"sha256": "0" * 64}],
    }
    direct = {
        **facts,
        "threefs_gpu_direct": True,
        "threefs_usrbio_memory": "8GiB",
        "threefs_profiles": ["client", "usrbio"],
    }
    shared = {"threefs_node": 1, "inventory_hostname": "h1"}
    for services, modules in (
        (["fuse"], ["nvidia_peermem"]),
        (["storage"], []),
        (["storage", "fuse"], ["nvidia_peermem"]),
    ):
        kernel = render("prepare", **direct, **shared, threefs_services=services)[0]
        assert kernel == {"modules": modules, "sysctl": {"fs.aio-max-nr": 67108864}}
        (config,) = render("configure", **direct, **shared, **CONFIGURE, threefs_services=services)
        assert config.get("usrbio_memory") == ("8GiB" if "fuse" in services else None)
        assert config["profiles"] == ["client", "usrbio"]
    assert render("prepare", **facts, **shared, threefs_services=["fuse"])[0]["modules"] == []
    (config,) = render("configure", **facts, **shared, **CONFIGURE, threefs_services=["fuse"])
    assert "usrbio_memory" not in config


def test_a_limit_without_the_host_that_administrates_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"--limit: \['h2', 'h3'\]: h1 is not in it.*Add h1 to --limit"):
        render("chains", ansible_play_hosts_all=["h2", "h3", "a host of another group"])
    assert render("chains", ansible_play_hosts_all=["h1", "h3"], threefs_table_directory="/tables")


def test_storage_of_a_drained_host_stops_only_when_it_was_seen_to_be_empty() -> None:
    (play,) = yaml.safe_load((HERE / "playbooks/threefs_drain.yml").read_text())
    tasks = {task["name"]: task for task in play["tasks"]}
    look, stop = tasks["See that they are empty"], tasks["Stop storage on the drained hosts"]
    assert look["run_once"] and "when" not in look and look["delegate_to"] == "{{ threefs_cluster_layout.admin }}"
    assert f"{look['register']} is success" in stop["when"]


def test_mgmtd_forgets_the_meta_that_a_host_no_longer_has_once_it_is_stopped() -> None:
    tasks = yaml.safe_load((HERE / "roles/threefs/tasks/main.yml").read_text())
    names = [task["name"] for task in tasks]
    chains = names.index("Have chains and directories")
    assert names.index("Run meta and storage") < names.index("Remove services that the host no longer has") < chains
    (name,) = tasks[chains]["vars"]
    (targets,) = [
        task
        for task in yaml.safe_load((HERE / "roles/threefs/tasks/chains.yml").read_text())
        if "agentfleet.metal.threefs_target" in task
    ]
    assert name in targets["agentfleet.metal.threefs_target"]["retire_nodes"]
    assert "former_metas" in tasks[chains]["vars"][name]


def test_a_new_disk_is_looked_at_before_its_targets_are_made_and_the_cluster_after() -> None:
    (play,) = yaml.safe_load((HERE / "playbooks/threefs_replace_disk.yml").read_text())
    *_before, change, make, end = play["tasks"]
    look = yaml.safe_load((HERE / "roles/threefs/tasks/replace_disk.yml").read_text())[-1]
    assert change["ansible.builtin.import_role"]["tasks_from"] == "replace_disk"
    options = make["agentfleet.metal.threefs_target"]
    assert look["register"] in options["recreate_disks"][0]["present"] and "chunk_sizes" in options
    assert options["copy_seconds"] == "{{ threefs_copy_seconds }}"
    assert end["ansible.builtin.import_role"]["tasks_from"] == "gate"


def converge(resource: t.Any) -> None:
    apply_all(resource, resource.plan(resource.observe()))


def test_declared_ec_groups_and_chunk_sizes_reach_targets_chains_and_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = {
        "threefs_replicas": 2,
        "threefs_targets_per_disk": 2,
        "threefs_stripe": 2,
        "threefs_table_directory": str(tmp_path / "tables"),
        "threefs_tables": [
            {"id": 1},
            {"id": 2, "type": "EC", "replicas": 3, "targets_per_disk": 1, "chunk_sizes": ["64KiB", "4MiB"]},
        ],
        "threefs_directories": [{"path": "/coded", "chain_table": 2, "chunk_size": "4MiB", "stripe": 6}],
    }
    plain, coded, copies, _directories = render("chains", **declared)
    assert (plain["type"], plain["replicas"], plain["chunk_sizes"]) == ("CR", 2, [])
    assert (copies["wait_seconds"], copies["copy_seconds"]) == (600, 86400), "disks take hours"
    assert (coded["type"], coded["replicas"], coded["chunk_sizes"]) == ("EC", 3, ["64KiB", "4MiB"])
    unsaid = {"state": "present", "discard_existing": False, "stripe": None}
    for table in (plain, coded):
        nodes = [{"weight": None, "domain": None, **node} for node in table["nodes"]]
        converge(ChainTable(Host(), {**unsaid, **table, "nodes": nodes}))

    lab = Lab(tmp_path / "host", monkeypatch)
    _plain, _coded, targets, directories = render("chains", **declared)
    converge(Targets(lab.host, targets))
    converge(Directories(lab.host, directories))
    by_table: dict[str, list[set[int]]] = {"1": [], "2": []}
    for chain, members in lab.chains().items():
        by_table[chain[0]].append(members)
    assert [len(members) for members in by_table["1"]] == [2] * 6, "two replicas"
    assert [len(members) for members in by_table["2"]] == [1] * 6, "two groups of three chains with one target each"
    sizes = {
        path.parent.name[0]: path.read_text().rpartition("= ")[2] for path in lab.root.glob("disks/*/*/*/target.toml")
    }
    assert sizes == {"1": f"{lab.double.CHUNK_SIZES}\n", "2": "['65536', '4194304']\n"}
    layout = lab.database.read()["document"]["keys"]["fs"]["/coded"]["layout"]
    assert (layout["table"], layout["chunk"], layout["stripe"]) == (2, 4 << 20, 6)


RELEASE = """
for case in given["cases"]:
    variables = {**load("defaults/main.yml"), **case, **load("vars/main.yml")}
    found.append(Templar(loader, variables=variables).template(variables["threefs__release"]))
"""


def test_the_role_and_the_module_name_a_release_alike() -> None:
    plain: dict[str, t.Any] = {"threefs_sources": [{"src": "/a.tar", "sha256": "AB" * 32}]}
    build = ["cmake -DSHUFFLE_METHOD='g++11' \"é\"", "cmake --build build\nls"]
    cases = [
        plain,
        {**plain, "threefs_subdirectory": "/opt/3fs/"},
        {**plain, "threefs_build": build},
        {**plain, "threefs_build": build[:1]},
        {**plain, "threefs_build": build, "threefs_subdirectory": "opt/3fs"},
    ]
    modules = [
        Artifact(
            Host(),
            {
                "sources": case["threefs_sources"],
                "directory": "/opt/3fs",
                "subdirectory": case.get("threefs_subdirectory"),
                "build": case.get("threefs_build"),
            },
        ).path
        for case in cases
    ]
    assert rendered("threefs", RELEASE, cases=cases) == modules and len(set(modules)) == len(cases)
    assert modules[0] == f"/opt/3fs/{hashlib.sha256(('ab' * 32).encode()).hexdigest()[:16]}", "as it always was"
