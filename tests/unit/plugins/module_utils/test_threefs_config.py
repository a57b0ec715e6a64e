# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Configuration of 3FS: _threefs_config, _threefs_profiles, _threefs_publish, _threefs_checks and _threefs_layout."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _threefs_checks, _threefs_layout
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import encode_token
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_config import Config
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_profiles import PROFILES
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_publish import Published
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_toml import Toml, emit

SHIPPED = Path(__file__).resolve().parents[3] / "doubles/threefs/configs"
ETC = "/etc/3fs/stage"
BASE: dict[str, t.Any] = {
    "cluster": "stage",
    "release": "/opt/3fs/1",
    "services": ["mgmtd", "meta", "storage", "fuse", "monitor"],
    "node_ids": {"mgmtd": 1, "meta": 100, "storage": 10001},
    "mgmtd": ["mgmtd1", "10.0.0.2:8100"],
    "monitor": "10.0.0.3",
    "fdb_cluster": "metal:abc@10.0.0.1:4500",
    "target_paths": ["/storage/data1/3fs", "/storage/data2/3fs"],
    "mountpoint": "/3fs/stage",
    "token": encode_token(0, 77),
    "fuse_token": encode_token(2001, 78),
    "clickhouse": {"host": "10.0.0.4", "port": "8999", "password": "planted-password"},
    "skip_checks": ["rdma", "clock", "memory"],
    "publish": True,
}


@pytest.fixture
def host(fake_host: t.Any) -> t.Any:
    """A host with the files that ship with a release."""
    files = {f"/opt/3fs/1/configs/{path.name}": path.read_text() for path in SHIPPED.glob("*.toml")}
    return fake_host.files({**files, "/opt/3fs/1/bin/admin_cli": ""})


def config(host: t.Any, **params: t.Any) -> Config:
    """The resource, with a name service of its own."""
    return Config(host, {**BASE, **params}, resolve={"mgmtd1": "10.0.0.1"}.__getitem__)


def written(host: t.Any, name: str, **params: t.Any) -> dict[str, t.Any]:
    """Write everything and parse one file."""
    resource = config(host, publish=False, **params)
    apply_all(resource, resource.plan(resource.observe()))
    return Toml(host.read(f"{ETC}/{name}.toml")).data


def test_all_services_of_a_host_in_one_call(host: t.Any) -> None:
    launcher = written(host, "storage_main_launcher")
    assert launcher["cluster_id"] == "stage"
    assert launcher["mgmtd_client"]["mgmtd_server_addresses"] == ["RDMA://10.0.0.1:8000", "RDMA://10.0.0.2:8100"]
    names = {name for name in host.names(ETC) if name.endswith(".toml")}
    assert names == {
        "admin_cli.toml",
        "monitor_collector_main.toml",
        *(
            f"{p}_{k}.toml"
            for p in ("mgmtd_main", "meta_main", "storage_main", "hf3fs_fuse_main")
            for k in ("app", "launcher")
        ),
    }
    assert Toml(host.read(f"{ETC}/storage_main_app.toml")).data == {"allow_empty_node_id": False, "node_id": 10001}
    assert host.read("/var/lib/3fs/stage/fdb.cluster") == BASE["fdb_cluster"]


def test_a_mount_point_is_known_though_its_fuse_died(host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written(host, "storage_main_launcher")
    exists = host.exists
    monkeypatch.setattr(host, "exists", lambda path: path != "/3fs/stage" and exists(path))  # ENOTCONN
    resource = config(host, publish=False)
    assert resource.plan(resource.observe()) == []


def test_a_host_without_fuse_keeps_no_token_of_its_mount(host: t.Any) -> None:
    written(host, "storage_main_launcher")
    assert host.exists(f"{ETC}/fuse.token")
    resource = config(host, publish=False, services=["mgmtd", "meta", "storage", "monitor"], fuse_token=None)
    steps = [step for step in resource.plan(resource.observe()) if step.object.endswith("fuse.token")]
    assert [(step.verb, step.before, step.after) for step in steps] == [("remove", "(hidden)", None)]
    apply_all(resource, resource.plan(resource.observe()))
    assert not host.exists(f"{ETC}/fuse.token") and resource.plan(resource.observe()) == []


ADDRESSES = """Local:
  +-- 10.0.0.0/24 2 0 2
     |-- 10.0.0.1
        /32 link UNICAST
        /32 host LOCAL
     |-- 10.0.0.255
        /32 link BROADCAST
"""


@pytest.mark.parametrize(
    ("house", "services", "refused"),
    [
        ({"host": "127.0.0.1"}, ["mgmtd", "monitor"], True),
        ({"host": "127.0.0.1"}, ["mgmtd"], False),
        ({"host": "::1", "port": "9000"}, ["mgmtd", "monitor"], True),
        ({"host": "10.0.0.1"}, ["mgmtd"], True),
        ({"host": "mgmtd1"}, ["mgmtd", "monitor"], True),
        ({"host": "fd00::1"}, ["mgmtd", "monitor"], True),
        ({"host": "fd00::2"}, ["mgmtd", "monitor"], False),
        ({"host": "10.0.0.255"}, ["mgmtd", "monitor"], False),
        ({"host": "10.0.0.1", "port": "8999"}, ["mgmtd", "monitor"], False),
        ({"host": "10.0.0.1"}, ["meta", "monitor"], False),
        ({}, ["mgmtd"], False),
    ],
)
def test_clickhouse_on_this_host_keeps_its_port(
    host: t.Any, house: dict[str, str], services: list[str], refused: bool
) -> None:
    six = "fd000000000000000000000000000001 02 40 00 80     eth0\n"
    host.files({"/proc/net/fib_trie": ADDRESSES, "/proc/net/if_inet6": six})
    resource = config(host, clickhouse=house, services=services, publish=False)
    if refused:
        with pytest.raises(Refused, match=r"ports.mgmtd.tcp: 9000: ClickHouse has it on this host"):
            resource.plan(resource.observe())
    else:
        assert resource.plan(resource.observe())


def test_clickhouse_whose_name_is_unknown_here_is_elsewhere(host: t.Any) -> None:
    def unknown(_name: str) -> str:
        raise OSError("no such name")

    resource = Config(host, {**BASE, "clickhouse": {"host": "house"}, "mgmtd": ["10.0.0.1"], "publish": False}, unknown)
    assert resource.observe()["others"] == {}


def test_the_database_of_the_monitor_is_told_to_what_makes_its_tables(host: t.Any) -> None:
    house = {**BASE["clickhouse"], "db": "stage"}
    collector = written(host, "monitor_collector_main", clickhouse=house)["server"]["monitor_collector"]
    assert collector["reporter"]["clickhouse"]["db"] == "stage"
    assert json.loads(host.read(f"{ETC}/cluster.json"))["clickhouse_db"] == "stage"
    other = config(host, services=["meta"], publish=False)
    assert "clickhouse_db" not in other.description(other.observe())


# -- the files that really ship, without what they say ---------------------------------

RECORD = json.loads((Path(__file__).resolve().parents[3] / "contract/threefs.json").read_text())["configs"]


def as_toml(table: dict[str, t.Any], name: str = "") -> str:
    """A recorded file as the text that ships: values, then tables, then arrays of tables."""
    text = "".join(f"{key} = {emit(value)}\n" for key, value in table.items() if not holds_tables(value))
    for key, value in table.items():
        dotted = f"{name}.{key}".lstrip(".")
        if isinstance(value, dict):
            text += f"[{dotted}]\n{as_toml(value, dotted)}"
        elif holds_tables(value):
            text += "".join(f"[[{dotted}]]\n{as_toml(item, dotted)}" for item in value)
    return text


def holds_tables(value: t.Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def keys(value: t.Any, path: str = "") -> set[str]:
    """Dotted keys of a file, without numbers of elements."""
    if isinstance(value, dict):
        return {key for name, item in value.items() for key in keys(item, f"{path}.{name}".lstrip("."))}
    if holds_tables(value):
        return {key for item in value for key in keys(item, path)}
    return {path}


def test_the_files_that_really_ship_have_all_that_we_set(fake_host: t.Any) -> None:
    files = {f"/opt/3fs/1/configs/{name}.toml": as_toml(table) for name, table in RECORD.items()}
    fake_host.files({**files, "/opt/3fs/1/bin/admin_cli": ""})
    prefix = (
        "server.base.groups[TCP].listener.custom_tcp_nic_prefix"  # as docs/threefs.md and the check of names say it
    )
    settings = {f"{name}_main": {f"+{prefix}": "ib"} for name in ("mgmtd", "meta", "storage")}
    resource = config(fake_host, profiles=list(PROFILES), rdma_devices=["mlx5_0"], settings=settings)
    resource.published = None
    apply_all(resource, resource.plan(resource.observe()))
    mains = {"mgmtd_main", "meta_main", "storage_main", "hf3fs_fuse_main"}
    assert {name.removesuffix(".toml") for name in fake_host.names(ETC) if name.endswith(".toml")} == set(RECORD)
    assert mains < set(RECORD)
    storage = Toml(fake_host.read(f"{ETC}/storage_main.toml")).data
    ports = {group["network_type"]: group["listener"]["listen_port"] for group in storage["server"]["base"]["groups"]}
    assert ports == {"RDMA": 8002, "TCP": 9002}
    assert storage["server"]["base"]["groups"][1]["listener"]["custom_tcp_nic_prefix"] == "ib"
    assert fake_host.read(f"{ETC}/hf3fs_fuse_main_app.toml") == "", "there is no node_id to set"


def test_the_doubles_files_have_no_key_that_those_lack() -> None:
    for path in SHIPPED.glob("*.toml"):
        assert keys(Toml(path.read_text()).data) - keys(RECORD[path.stem]) == set(), path.name


def test_main_files_are_made_where_they_are_published(host: t.Any) -> None:
    resource = config(host)
    texts = {name: Toml(text).data for name, text in resource._mains(resource.observe()).items()}
    storage, mgmtd, meta = texts["storage"]["server"], texts["mgmtd"]["server"], texts["meta"]["server"]
    assert [group["listener"]["listen_port"] for group in storage["base"]["groups"]] == [8002, 9002], (
        "upstream's collide"
    )
    assert storage["targets"]["target_paths"] == BASE["target_paths"]
    assert mgmtd["service"]["authenticate"] is True and meta["meta"]["authenticate"] is True
    assert meta["fdb"]["clusterFile"] == "/var/lib/3fs/stage/fdb.cluster"
    reporters = [texts[name]["common"]["monitor"]["reporters"] for name in texts]
    assert all(
        r == [{"type": "monitor_collector", "monitor_collector": {"remote_ip": "10.0.0.3:10000"}}] for r in reporters
    )
    logs = [handler["file_path"] for text in texts.values() for handler in text["common"]["log"]["handlers"]]
    assert all(path.startswith("/var/log/3fs/stage/") for path in logs)


def test_a_second_run_plans_nothing_and_secrets_are_for_root_alone(host: t.Any) -> None:
    resource = config(host, publish=False)
    steps = resource.plan(resource.observe())
    shown = json.dumps([step.public() for step in steps])
    apply_all(resource, steps)
    assert resource.plan(resource.observe()) == []
    secrets = (BASE["token"], BASE["fuse_token"], "planted-password")
    assert not [secret for secret in secrets if secret in shown + repr(steps)]
    for path in Path(host.root).rglob("*"):
        if path.is_file() and any(secret in path.read_text(errors="replace") for secret in secrets):
            assert path.stat().st_mode & 0o077 == 0, path


def test_declared_keys_and_profiles(host: t.Any) -> None:
    settings = {
        "storage_main": {
            "server.aio_read_worker.num_threads": 256,
            "**.ibsocket.max_sge": 1,
            "server.base.groups[RDMA].io_worker.ibsocket.gid_index": 3,
            "+server.brand_new": "x",
        }
    }
    resource = config(host, profiles=["large_io", "small_io"], settings=settings)
    server = Toml(resource._mains(resource.observe())["storage"]).data["server"]
    assert server["aio_read_worker"]["num_threads"] == 256, "a declared key is stronger than a profile"
    assert server["forward_client"]["io_worker"]["ibsocket"]["buf_size"] == 163840
    assert server["base"]["groups"][0]["io_worker"]["ibsocket"]["gid_index"] == 3, (
        "commented out in the file that ships"
    )
    assert "gid_index" not in server["base"]["groups"][1]["io_worker"]["ibsocket"]
    assert server["base"]["groups"][0]["io_worker"]["num_event_loop"] == 8 and server["brand_new"] == "x"


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_fits_the_files(host: t.Any, profile: str) -> None:
    resource = config(host, profiles=[profile])
    before = config(host)
    assert resource._mains(resource.observe()) != before._mains(before.observe())


def test_the_profile_of_usrbio_leaves_workers_for_each_kind_of_ring(host: t.Any) -> None:
    fuse = Toml(config(host, profiles=["client", "usrbio"])._mains(config(host).observe())["fuse"]).data
    assert (fuse["batch_io_coros"], fuse["io_worker_coros"], fuse["io_jobq_sizes"]["hi"]) == (
        256,
        {"hi": 32, "lo": 32},
        256,
    )
    shipped = Toml((SHIPPED / "hf3fs_fuse_main.toml").read_text()).data
    for key in ("iov_limit", "rdma_buf_pool_size"):
        assert fuse[key] == shipped[key], "a number of buffers, and what FUSE pins for its own reads"
    starved = config(host, settings={"hf3fs_fuse_main": {"io_worker_coros.hi": 120, "io_worker_coros.lo": 8}})
    with pytest.raises(Refused) as refused:
        starved.plan(starved.observe())
    assert refused.value.option == "settings.hf3fs_fuse_main.batch_io_coros" and refused.value.value == 128
    assert refused.value.remedy == "More than 128"


def test_buffers_of_usrbio_need_room_in_shared_memory(host: t.Any) -> None:
    small = config(host, usrbio_memory="1MiB", skip_checks=["rdma", "clock", "memory"])
    with pytest.raises(Refused, match="/dev/shm has 0B?, and programs shall have 1MiB"):
        small.plan(small.observe())
    Path(host.path("/dev/shm")).mkdir(parents=True)
    assert small.plan(small.observe())
    large = config(host, usrbio_memory="4PiB", skip_checks=["rdma", "clock", "memory"])
    with pytest.raises(Refused, match="and programs shall have 4PiB of USRBIO buffers there"):
        large.plan(large.observe())
    skipped = config(host, usrbio_memory="4PiB", skip_checks=["rdma", "clock", "memory", "shm"])
    assert skipped.plan(skipped.observe())


def test_comments_of_the_files_that_ship_stay(host: t.Any) -> None:
    resource = config(host)
    text = resource._mains(resource.observe())["storage"]
    assert "listen_port = 8002 # of the RDMA handshake, over TCP" in text and "# DOUBLE of the file" in text


def test_a_cluster_file_that_the_daemons_rewrote_is_the_same(host: t.Any) -> None:
    resource = config(host, publish=False)
    apply_all(resource, resource.plan(resource.observe()))
    host.write("/var/lib/3fs/stage/fdb.cluster", "# DO NOT EDIT!\n" + BASE["fdb_cluster"] + "\n", 0o600)
    assert resource.plan(resource.observe()) == []
    moved = config(host, publish=False, fdb_cluster="metal:new@10.0.0.9:4500")
    assert [step.object for step in moved.plan(moved.observe())] == ["/var/lib/3fs/stage/fdb.cluster"]


CLUSTER_FILE = "/var/lib/3fs/stage/fdb.cluster"
CLIENT: dict[str, t.Any] = {"services": ["storage", "fuse"], "token": None, "publish": False}


def test_a_cluster_file_is_for_root_alone_also_on_a_host_of_before(host: t.Any) -> None:
    for given in (BASE["fdb_cluster"], None):
        resource = config(host, publish=False, fdb_cluster=given)
        apply_all(resource, resource.plan(resource.observe()))
        assert host.mode(CLUSTER_FILE) == 0o600 and resource.plan(resource.observe()) == []
        os.chmod(host.path(CLUSTER_FILE), 0o644)
        (step,) = resource.plan(resource.observe())
        assert (step.verb, step.object, step.disruptive) == ("change", CLUSTER_FILE, False)
        apply_all(resource, [step])
        assert host.mode(CLUSTER_FILE) == 0o600 and host.read(CLUSTER_FILE) == BASE["fdb_cluster"]
        assert resource.result(resource.observe())["restarts"] == []


def test_a_host_that_does_not_open_the_database_has_no_cluster_file(host: t.Any) -> None:
    client = config(host, **CLIENT)
    apply_all(client, client.plan(client.observe()))
    assert not host.exists(CLUSTER_FILE) and client.plan(client.observe()) == []

    host.files({CLUSTER_FILE: BASE["fdb_cluster"]})  # as each host had it
    assert [(step.verb, step.object) for step in client.plan(client.observe())] == [("remove", CLUSTER_FILE)]
    unit = "/etc/systemd/system/threefs-stage-mgmtd.service"
    host.files({unit: "[Unit]"})
    assert [step.verb for step in client.plan(client.observe())] == ["change"], "a mgmtd that runs on still needs it"
    host.remove(unit)
    apply_all(client, client.plan(client.observe()))
    assert not host.exists(CLUSTER_FILE) and client.result(client.observe())["restarts"] == []


@pytest.mark.parametrize(
    ("change", "restarts"),
    [
        ({}, []),
        ({"settings": {"storage_main": {"server.aio_read_worker.num_threads": 64}}}, ["storage"]),
        ({"settings": {"hf3fs_fuse_main": {"io_jobq_size": 512}}}, ["fuse"]),
        ({"settings": {"storage_main_launcher": {"client.default_timeout": "5s"}}}, ["storage"]),
        ({"ports": {"meta": {"tcp": 9101}}}, ["meta"]),
        ({"fuse_token": encode_token(2001, 99)}, ["fuse"]),
        ({"target_paths": [*BASE["target_paths"], "/storage/data3/3fs"]}, ["storage"]),
    ],
)
def test_each_change_restarts_what_it_concerns(host: t.Any, change: dict[str, t.Any], restarts: list[str]) -> None:
    first = config(host, publish=False)
    apply_all(first, first.plan(first.observe()))
    then = config(host, publish=False, **change)
    observed = then.observe()
    then.plan(observed)
    assert then.result(observed)["restarts"] == restarts


@pytest.mark.parametrize("paths", [["/storage/data2/3fs", "/storage/data1/3fs"], ["/storage/data2/3fs"]])
def test_disks_keep_their_index(host: t.Any, paths: list[str]) -> None:
    first = config(host, publish=False)
    apply_all(first, first.plan(first.observe()))
    other = config(host, publish=False, target_paths=paths)
    with pytest.raises(
        Refused, match="this place, which is the disk's index, is that of /storage/data1/3fs"
    ) as refused:
        other.plan(other.observe())
    assert refused.value.option == "target_paths[0]"
    fewer = config(host, publish=False, target_paths=BASE["target_paths"][:1])
    assert fewer.plan(fewer.observe())


def test_check_mode_before_anything_is_installed(fake_host: t.Any) -> None:
    resource = config(fake_host)
    resource.predicting = True
    steps = resource.plan(resource.observe())
    assert f"{ETC}/storage_main.toml" in [step.object for step in steps] and steps[-1].verb == "initialize"
    assert "not installed yet" in resource.result(resource.observe())["warnings"][0]


def test_a_name_that_nobody_knows(host: t.Any) -> None:
    def unknown(_name: str) -> str:
        raise OSError

    with pytest.raises(Refused) as refused:
        Config(host, BASE, resolve=unknown)
    assert refused.value.option == "mgmtd[0]" and "cannot be resolved" in refused.value.problem


# -- publishing ----------------------------------------------------------------------


def test_the_first_time_is_init_cluster_and_later_only_what_differs(host: t.Any) -> None:
    published = Published(host, "stage", {}, 0)
    assert [step.verb for step in published.plan({"initialized": False, "kept": None}, {})] == ["initialize"]
    texts = dict.fromkeys(("mgmtd", "meta", "storage", "fuse"), "a = 1\n")
    kept: dict[str, t.Any] = {"MGMTD": "a = 1\n", "META": "a = 2\n", "STORAGE": None, "FUSE": "a = 1\n"}
    steps = published.plan({"initialized": True, "kept": kept}, texts)
    assert [(step.object, step.before, step.after) for step in steps] == [
        ("main configuration of meta", "a = 2", "a = 1"),
        ("main configuration of storage", None, "as rendered"),
    ]
    assert published.plan({"initialized": True, "kept": None}, texts) == [], "nobody answers: a later call tells"


# -- checks of the host ----------------------------------------------------------------


def port(**more: t.Any) -> dict[str, t.Any]:
    """A port that is good."""
    good = {"device": "mlx5_0", "port": 1, "state": "ACTIVE", "link_layer": "Ethernet", "roce_v2": 1}
    return {**good, **more}


@pytest.mark.parametrize(
    ("ports", "interfaces", "problem"),
    [
        ([port()], ["eth0"], ""),
        ([port(link_layer="InfiniBand", roce_v2=0)], ["enp1s0"], ""),
        ([], ["eth0"], "no RDMA device, and 3FS moves data by nothing else"),
        ([port(state="DOWN")], ["eth0"], "no RDMA port is ACTIVE (mlx5_0/1 DOWN)"),
        ([port(roce_v2=0)], ["eth0"], "RoCE v2 GID"),
        ([port()], ["ib0"], "no interface has a name that 3FS listens on"),
    ],
)
def test_rdma(ports: list[t.Any], interfaces: list[str], problem: str) -> None:
    seen = {"ports": ports, "interfaces": interfaces, "clock": True, "memory_bytes": 64 << 30, "shm_bytes": 0}
    found = _threefs_checks.failures(seen, ["storage"], [], False)
    assert [text for _check, text, _remedy in found if problem and problem in text] == [x[1] for x in found]
    assert bool(found) == bool(problem)


def test_a_device_that_is_asked_for_must_be_there() -> None:
    seen = {"ports": [port()], "interfaces": ["eth0"], "clock": True, "memory_bytes": 64 << 30, "shm_bytes": 0}
    assert "mlx5_9" in _threefs_checks.failures(seen, ["meta"], ["mlx5_9"], False)[0][1]
    assert _threefs_checks.failures({**seen, "ports": []}, ["monitor"], [], False) == []


# -- the cluster of the inventory ----------------------------------------------------------

HOSTS: dict[str, dict[str, t.Any]] = {
    f"h{n}": {
        "services": ["mgmtd", "meta", "storage"],
        "node": n,
        "disks": 2,
        "devices": [],
        "weight": None,
        "domain": None,
    }
    for n in (1, 2, 3)
}
WISH: dict[str, t.Any] = {
    "mounts": ["/storage/data1", "/storage/data2"],
    "tables": [{"id": 1}],
    "replicas": 3,
    "targets_per_disk": 6,
    "stripe": 12,
    "chunk_size": "1MiB",
    "directories": [],
    "users": [{"uid": 0, "admin": True}],
    "fuse_uid": 0,
    "token_secret": "x" * 20,
}


def with_(**more: t.Any) -> dict[str, dict[str, t.Any]]:
    """The hosts, the second of them with these variables."""
    return {**HOSTS, "h2": {**HOSTS["h2"], **more}}


def refusal(hosts: t.Any = None, leaving: t.Sequence[str] = (), **wish: t.Any) -> Refused:
    """Why a cluster is refused."""
    with pytest.raises(Refused) as refused:
        _threefs_layout.check(hosts or HOSTS, {**WISH, **wish}, leaving)
    return refused.value


def test_a_cluster_that_can_work() -> None:
    _threefs_layout.check(HOSTS, WISH)
    _threefs_layout.check({**with_(weight=0.5), "h4": {**HOSTS["h1"], "node": 4}}, WISH)
    assert _threefs_layout.nodes(with_(weight=0), {"id": 1, "hosts": ["h2"]}) == [
        {"id": 10002, "disks": 2, "weight": 0}
    ], "refused, and not the usual weight"
    assert _threefs_layout.nodes(HOSTS, {"id": 1}, ["h2"]) == [{"id": 10001, "disks": 2}, {"id": 10003, "disks": 2}]


@pytest.mark.parametrize(
    ("change", "option", "problem"),
    [
        (
            {"hosts": {name: HOSTS[name] for name in ("h1", "h2")}},
            "threefs_tables[0].replicas",
            "2 storage nodes cannot hold 3 replicas apart",
        ),
        ({"leaving": ["h3"]}, "threefs_tables[0].replicas", "when the drained ones are gone"),
        (
            {"hosts": {f"h{n}": {**HOSTS["h1"], "node": n} for n in range(1, 6)}, "targets_per_disk": 2},
            "threefs_tables[0].targets_per_disk",
            "the 20 targets of all disks do not divide into chains of 3",
        ),
        (
            {"hosts": {name: {**host, "domain": f"r{host['node'] % 2}"} for name, host in HOSTS.items()}},
            "threefs_tables[0].replicas",
            "2 failure domains cannot hold 3",
        ),
        ({"hosts": with_(domain="r1")}, "threefs_tables[0].hosts", "this node has no domain, and others have"),
        ({"hosts": with_(weight=0.7)}, "h2.threefs_weight", "is 4.2, not a whole number"),
        ({"hosts": with_(weight=0)}, "h2.threefs_weight", "a disk would have 0 targets"),
        ({"hosts": with_(disks=5)}, "threefs_tables[0].hosts", "it has 30 of 54 targets"),
        ({"hosts": with_(disks=1000)}, "threefs_mounts", "out of range"),
        ({"tables": [{"id": 1, "targets_per_disk": 0}]}, "threefs_tables[0].targets_per_disk", "out of range"),
        ({"tables": [{"id": 1, "replicas": 0}]}, "threefs_tables[0].replicas", "not a number of replicas"),
        ({"hosts": with_(devices=["nvme-A", "nvme-A"])}, "h2.threefs_devices[1]", "another disk of the list has it"),
        ({"mounts": ["/a", "/a"]}, "threefs_mounts[1]", "another disk of the list has it"),
        ({"leaving": ["h9"]}, "threefs_drain_hosts", "no storage host"),
        ({"stripe": 13}, "threefs_stripe", "will have 12 chains only"),
        ({"tables": [{"id": 42}]}, "threefs_tables[0].id", "out of range"),
        ({"tables": [{"id": 1}, {"id": 1}]}, "threefs_tables[1].id", "another table has it"),
        ({"tables": [{"id": 1, "hosts": ["h9"]}]}, "threefs_tables[0].hosts", "no storage host"),
        ({"directories": [{"chain_table": 5}]}, "threefs_directories[0].chain_table", "no such table"),
        ({"directories": [{"chain_table": 1, "stripe": 99}]}, "threefs_directories[0].stripe", "12 chains only"),
        ({"users": [{"uid": 5, "admin": True}]}, "threefs_users", "uid 0 is missing"),
        ({"token_secret": "short"}, "threefs_token_secret", "fewer than 20"),
        ({"hosts": {**HOSTS, "h4": {**HOSTS["h1"]}}}, "h4.threefs_node", "h1 has it"),
        (
            {"hosts": {**HOSTS, "h4": {**HOSTS["h1"], "node": 100}}},
            "h4.threefs_node",
            "too large for a host with mgmtd",
        ),
        ({"hosts": {**HOSTS, "h4": {**HOSTS["h1"], "node": 0}}}, "h4.threefs_node", "not a number of a host"),
        (
            {"hosts": {**HOSTS, "h4": {**HOSTS["h1"], "node": 4, "devices": ["a"]}}},
            "h4.threefs_devices",
            "2 mount points",
        ),
        ({"hosts": {**HOSTS, "h4": {**HOSTS["h1"], "node": 4, "disks": 0}}}, "threefs_mounts", "no disk"),
        (
            {"hosts": {"h1": {**HOSTS["h1"], "services": ["storage"]}}},
            "threefs_services",
            "no host of the group has mgmtd",
        ),
        (
            {"hosts": {**HOSTS, "h4": {**HOSTS["h1"], "node": 4, "services": ["fuse"]}}, "fuse_uid": 9},
            "threefs_fuse_uid",
            "no such user",
        ),
    ],
)
def test_a_cluster_that_cannot_work(change: dict[str, t.Any], option: str, problem: str) -> None:
    refused = refusal(**change)
    assert refused.option == option and problem in refused.problem and refused.remedy
    if option == "threefs_tables[0].hosts" and change.get("hosts"):
        assert refused.value in change["hosts"], "a host is called by its name"
