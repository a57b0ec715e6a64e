# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stores and probes do with the engine, on an engine of a few lines that keeps objects in a dictionary."""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
import types
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
ADDRESS = 0x7F0000000000
TIER = {"name": "dram", "medium": "dram", "size_bytes": 4 * MIB, "memdevs": [], "numa_node": 0}


class Engine:
    """The module ``mooncake.store`` as far as it is used: every client has the same objects."""

    def __init__(self) -> None:
        self.setups: list[tuple[t.Any, ...]] = []
        self.mounted: list[tuple[t.Any, ...]] = []
        self.objects: dict[str, bytes] = {}
        self.replicas, self.at, self.refusals = 1, ADDRESS, 0
        self.silent, self.full = 0, False  # questions that no master answers, and whether it takes no segment
        self.unmounted: list[str] = []
        self.emptied: list[str] = []

    def ReplicateConfig(self) -> t.Any:
        return types.SimpleNamespace()

    def MooncakeDistributedStore(self) -> Client:
        return Client(self)


class Client:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.tenant = engine, ""

    def setup(self, *arguments: t.Any) -> int:
        self.engine.setups.append(arguments)
        self.tenant = arguments[-1]
        self.engine.refusals -= 1
        return -1 if self.engine.refusals >= 0 else 0

    def get_hostname(self) -> str:
        return "10.0.0.1:1234"

    def mount_segment(self, *arguments: t.Any) -> dict[str, t.Any]:
        self.engine.mounted.append(arguments)
        return {"ret": -1 if self.engine.full else 0, "segment_ids": [f"segment-{len(self.engine.mounted)}"]}

    def is_exist(self, key: str) -> int:
        self.engine.silent -= 1
        return -900 if self.engine.silent >= 0 else 0

    def unmount_segment(self, segments: list[str], grace: int) -> int:
        self.engine.unmounted += segments
        return 0

    def put(self, key: str, data: bytes, config: t.Any) -> int:
        self.engine.objects[key] = data
        return 0

    def get(self, key: str) -> bytes:
        return self.engine.objects[key]

    def get_replica_desc(self, key: str) -> list[t.Any]:
        buffer = types.SimpleNamespace(buffer_address=self.engine.at, size=len(self.engine.objects[key]))
        memory = types.SimpleNamespace(buffer_descriptor=buffer)
        one = types.SimpleNamespace(is_memory_replica=lambda: True, get_memory_descriptor=lambda: memory)
        return [one] * self.engine.replicas

    def remove(self, key: str, force: bool) -> int:
        del self.engine.objects[key]
        return 0

    def remove_all(self, force: bool) -> int:
        self.engine.emptied.append(self.tenant)
        return 0

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any) -> Engine:
    found = Engine()
    monkeypatch.setattr(_mooncake, "_engine", lambda name: found)
    monkeypatch.setattr(_mooncake, "POOLS", str(tmp_path))
    monkeypatch.setattr(_mooncake, "RUNTIME", str(tmp_path / "run"))
    monkeypatch.setattr(_mooncake.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("MC_STORE_CLUSTER_ID", "")
    return found


def pool(**more: t.Any) -> dict[str, t.Any]:
    master = {"address": "10.0.0.1", "port": 50051, "metrics_address": "10.0.0.1", "metrics_port": 9003}
    network = {"address": "10.0.0.1", "protocol": "tcp", "rdma_devices": [], "etcd": [], "master": master}
    return {"name": "a", **network, "tenants": [], "replicas": 1, "tiers": [TIER], **more}


def declared(tmp_path: t.Any, ids: dict[str, str] | None = None, **more: t.Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(pool(**more)))
    (tmp_path / "a.tenants").write_text(json.dumps(ids or {}))


# -- clients ------------------------------------------------------------------------


def test_protocol_devices_and_master_reach_the_engine(engine: Engine) -> None:
    rdma = pool(protocol="rdma", rdma_devices=["mlx5_0", "mlx5_1"])
    _mooncake._client(rdma, 4096, tenant="red-1")
    where = ("10.0.0.1", "P2PHANDSHAKE", 0, 4096, "rdma", "mlx5_0,mlx5_1", "10.0.0.1:50051")
    assert engine.setups == [(*where, None, False, "", "red-1")]

    _mooncake._client(pool(etcd=["10.0.0.1:2379", "10.0.0.2:2379"]), 0, "/srv/a/dram")
    assert engine.setups[1][6:9] == ("etcd://10.0.0.1:2379;10.0.0.2:2379", None, True)
    assert os.environ["MC_STORE_CLUSTER_ID"] == "a"


def test_a_store_waits_for_its_master_and_a_question_does_not(engine: Engine) -> None:
    engine.refusals = 3
    with pytest.raises(HostError, match=r"setup returned -1. Is the master at 10.0.0.1:50051 up, and tcp usable\?"):
        _mooncake._client(pool(), 0)
    _mooncake._client(pool(), 0, patience_seconds=60)
    assert len(engine.setups) == 4


# -- stores -------------------------------------------------------------------------


def test_a_store_serves_memory_of_its_own_and_grows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any
) -> None:
    made: list[tuple[str, int, int | None]] = []

    def memory(name: str, size: int, node: int | None) -> tuple[int, t.Any, int]:
        made.append((name, size, node))
        return 40 + len(made), None, ADDRESS + len(made)

    monkeypatch.setattr(_mooncake, "_bound_memory", memory)
    store = _mooncake._Store(pool(protocol="rdma", rdma_devices=["mlx5_0"]), TIER, "")
    store.grow(4 * MIB)
    store.grow(4 * MIB)
    store.grow(6 * MIB)

    assert made == [("agentfleet-a-dram", 4 * MIB, 0), ("agentfleet-a-dram", 2 * MIB, 0)]
    assert engine.mounted == [
        ("/proc/self/fd/41", 4 * MIB, 0, "rdma", "*"),
        ("/proc/self/fd/42", 2 * MIB, 0, "rdma", "*"),
    ]
    status = json.loads((tmp_path / "run" / "a-dram" / "status.json").read_text())
    assert status["size_bytes"] == 6 * MIB and status["addresses"] == [ADDRESS + 1, ADDRESS + 2]
    assert (status["numa_node"], status["segment"]) == (0, "10.0.0.1:1234")
    store.close()
    assert engine.unmounted == ["segment-1", "segment-2"]


def test_a_store_that_cannot_grow_goes_on_serving(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any
) -> None:
    """Of three times that it is told to grow, the memory fails at the first and the engine at the second."""
    parts: list[tuple[int, mmap.mmap]] = []
    told: list[str] = []
    statuses: list[dict[str, t.Any]] = []
    path = tmp_path / "run" / "a-dram" / "status.json"

    def memory(name: str, size: int, node: int | None) -> tuple[int, mmap.mmap, int]:
        if len(statuses) == 1:
            raise HostError("no memory")
        fd = os.memfd_create(name)
        os.ftruncate(fd, size)
        parts.append((fd, mmap.mmap(fd, size)))
        return *parts[-1], ADDRESS + len(parts)

    def sigwait(signals: set[int]) -> int:
        statuses.append(json.loads(path.read_text()))
        declared(tmp_path, tiers=[{**TIER, "size_bytes": 6 * MIB}])
        engine.full, engine.silent = len(statuses) == 2, 3
        return signal.SIGTERM if len(statuses) == 4 else signal.SIGHUP

    monkeypatch.setattr(_mooncake, "_bound_memory", memory)
    monkeypatch.setattr(_mooncake, "_notify", told.append)
    monkeypatch.setattr(_mooncake.signal, "pthread_sigmask", lambda how, signals: None)
    monkeypatch.setattr(_mooncake.signal, "sigwait", sigwait)
    declared(tmp_path)

    _mooncake.store("a", "dram")

    assert [status["size_bytes"] // MIB for status in statuses] == [4, 4, 4, 6]
    assert [status["attempts"] for status in statuses] == [1, 2, 3, 4]
    segment = "the engine does not take the segment of 2097152 bytes: error -1"
    assert [status["problem"] for status in statuses] == ["", "no memory", segment, ""]
    assert f"STATUS=serving {4 * MIB} bytes on NUMA node 0, does not grow: no memory" in told
    assert told.count("READY=1") == 4
    assert [part.closed for _fd, part in parts] == [False, True, False], "what the engine did not take is given back"
    assert parts[1][0] == parts[2][0], "its descriptor too"
    for fd in (parts[0][0], parts[2][0]):
        os.close(fd)
    assert engine.unmounted == ["segment-1", "segment-3"]


def test_a_store_grows_only_with_a_master_that_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mooncake, "_bound_memory", lambda *_wish: (40, None, ADDRESS))
    monkeypatch.setattr(_mooncake.signal, "sigpending", lambda: {signal.SIGTERM})
    store = _mooncake._Store(pool(), TIER, "")
    engine.silent = 1
    store.grow(4 * MIB)
    with pytest.raises(HostError, match="the master does not answer: error -900"):
        store.grow(6 * MIB)
    assert len(engine.mounted) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/numa_maps"), reason="the kernel has no NUMA")
def test_memory_is_there_named_and_locked_before_the_engine_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(_mooncake, "_notify", told.append)
    monkeypatch.setattr(_mooncake, "_LOCK_BYTES", 5 * PAGE)  # in pieces, which the kernel shows as one mapping
    fd, memory, address = _mooncake._bound_memory("agentfleet-unit-test", 16 * PAGE, None)
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            assert _mooncake.holds(file.read(), "agentfleet-unit-test", address, 16 * PAGE)
        with open("/proc/self/smaps", encoding="utf-8") as file:
            own = file.read().partition("agentfleet-unit-test")[2]
        assert int(own.partition("Locked:")[2].split()[0]) * 1024 == 16 * PAGE
        locked = [f"STATUS=locked {done * PAGE} of {16 * PAGE} bytes" for done in (0, 5, 10, 15)]
        assert told == [f"EXTEND_TIMEOUT_USEC=300000000\n{one}" for one in locked]
    finally:
        os.close(fd)
        assert len(memory) == 16 * PAGE
    memory.close()
    with pytest.raises(HostError, match="binding .* to NUMA node 1000: "):
        _mooncake._bound_memory("agentfleet-unit-test", PAGE, 1000)
    with open("/proc/self/maps", encoding="utf-8") as file:
        assert "agentfleet-unit-test" not in file.read(), "what failed is given back"


# -- the probe ----------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> dict[str, t.Any]:
    """A store that runs, and what the kernel says of its memory."""
    says = {"on": 4 * MIB // PAGE, "off": 0, "status": {"pid": 7, "addresses": [ADDRESS], "numa_node": 0}}
    says["status"]["segment"] = "10.0.0.1:1234"

    def read(host: t.Any, path: str, default: str = "") -> str:
        if path.endswith("numa_maps"):
            where = "".join(f" N{node}={count}" for node, count in ((0, says["on"]), (1, says["off"])) if count)
            name = r"/memfd:agentfleet-a-dram\040(deleted)"
            return f"{ADDRESS:x} bind:0 file={name} dirty=1{where} kernelpagesize_kB={PAGE // 1024}\n"
        return f"{ADDRESS:x}-{ADDRESS + 4 * MIB:x} rw-s 0 00:01 14 /memfd:agentfleet-a-dram (deleted)\n"

    monkeypatch.setattr(_mooncake.Host, "read", read)
    monkeypatch.setattr(_mooncake, "status_of", lambda host, pool_name, tier_name: says["status"])
    return says


def probe(engine: Engine, **more: t.Any) -> dict[str, t.Any]:
    return _mooncake._probe_tier(engine.MooncakeDistributedStore(), pool(**more), TIER, 64 << 20, 3)


def test_a_tier_is_proven_by_what_engine_and_kernel_say(engine: Engine, kernel: dict[str, t.Any]) -> None:
    tier = probe(engine)
    assert tier["verified"] and "problem" not in tier
    assert tier["probe_bytes"] == MIB, "a quarter of the tier at most"
    assert (tier["numa_node"], tier["pages_on_node"], tier["pages_elsewhere"]) == (0, 4 * MIB // PAGE, 0)
    assert tier["put_microseconds"]["p50"] <= tier["put_microseconds"]["p99"] and tier["get_bytes_per_second"] > 0
    assert engine.objects == {}, "nothing is left behind"


def test_what_is_wrong_with_a_tier_is_said(engine: Engine, kernel: dict[str, t.Any]) -> None:
    assert probe(engine, replicas=2)["problem"].startswith("an object got 1 of 2 replicas")
    kernel["on"], kernel["off"] = kernel["on"] - 1, 1
    assert probe(engine)["problem"] == f"{4 * MIB - PAGE} of {4 * MIB} bytes lie on NUMA node 0"
    assert probe(engine)["pages_elsewhere"] == 1
    engine.at = ADDRESS + 4 * MIB - 1
    assert probe(engine)["problem"] == "the engine placed the object outside of this tier's memory"
    Client.get, right = lambda self, key: b"other", Client.get  # type: ignore[method-assign]
    try:
        assert probe(engine)["problem"] == "what was read differs from what was written"
    finally:
        Client.get = right  # type: ignore[method-assign]
    kernel["status"] = None
    assert probe(engine) == {
        "name": "dram",
        "probe_bytes": MIB,
        "samples": 3,
        "verified": False,
        "problem": "its store is not running",
    }


def test_a_probe_that_runs_has_a_tenant_of_its_own(
    engine: Engine, kernel: dict[str, t.Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = Admin({})
    monkeypatch.setattr(_mooncake, "Admin", lambda pool: admin)
    monkeypatch.setattr(_mooncake, "_pool", lambda name: pool(tenants=[{"name": "red"}]))
    assert _mooncake.probe("a", MIB, 1)[0]["verified"]
    (_set, tenant, _quota), removed = admin.asked
    assert removed == ("remove", tenant) and _mooncake._probing(tenant)


# -- tenants and stores of a pool -----------------------------------------------------


class Admin:
    """The leading master."""

    def __init__(self, quotas: dict[str, dict[str, int]]) -> None:
        self.present, self.asked = quotas, []  # type: ignore[var-annotated]

    def quotas(self) -> dict[str, dict[str, int]]:
        return self.present

    def set_quota(self, tenant: str, quota: int) -> None:
        self.asked.append(("set", tenant, quota))

    def remove_quota(self, tenant: str) -> None:
        self.asked.append(("remove", tenant))

    def segments(self) -> dict[str, dict[str, t.Any]]:
        return {"10.0.0.1:1": {"used_bytes": 5, "status": "OK"}, "10.0.0.2:1": {"used_bytes": 7, "status": "OK"}}

    def objects(self) -> int:
        return 3


def test_tenants_become_those_declared_and_who_goes_is_emptied(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any
) -> None:
    state = {"quota_bytes": 8, "used_bytes": 0}
    running, killed = (f"agentfleet-probe-{int(time.time()) - days * 86400:x}-12ab" for days in (0, 2))
    old = {"red-1": {**state, "used_bytes": 3}, "blue-1": state, "empty-1": state, running: state, killed: state}
    admin = Admin({**old, "agentfleet-probe-0123456789abcdef": state})  # and one of an older version
    monkeypatch.setattr(_mooncake, "Admin", lambda pool: admin)
    tenants = [{"name": "blue", "quota_bytes": 8, "owner": ""}, {"name": "green", "quota_bytes": 9, "owner": ""}]
    declared(tmp_path, {"blue": "blue-1", "green": "green-1"}, tenants=tenants)

    _mooncake.set_quotas("a")

    probes = [("remove", "agentfleet-probe-0123456789abcdef"), ("remove", killed)]
    assert sorted(admin.asked) == sorted([*probes, ("remove", "empty-1"), ("remove", "red-1"), ("set", "green-1", 9)])
    assert engine.emptied == ["red-1"], "a probe that runs and an empty tenant are left alone"
    assert _mooncake.quotas("a") == {
        "blue": state,
        "(undeclared)": {"quota_bytes": 32, "used_bytes": 3},
    }


def test_quotas_are_given_to_the_masters_user_by_no_name_that_he_could_make_a_link(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any
) -> None:
    declared(tmp_path, {"red": "red-1"}, tenants=[{"name": "red", "quota_bytes": 8}])
    path, other = tmp_path / "run/a/quotas.yaml", tmp_path / "shadow"
    path.parent.mkdir(parents=True)
    other.write_text("of root")
    other.chmod(0o640)
    path.symlink_to(other)
    for name in ("chown", "chmod"):
        monkeypatch.setattr(os, name, lambda *_arguments, name=name: pytest.fail(f"{name} by name"))
    for _start in range(2):
        _mooncake.policy("a")
    assert json.loads(path.read_text()) == {"version": 1, "tenants": [{"name": "red-1", "quota": 8}]}
    assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == "of root" and other.stat().st_mode & 0o777 == 0o640


def test_stores_of_this_host_are_known_by_their_tier(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any
) -> None:
    monkeypatch.setattr(_mooncake, "Admin", lambda pool: Admin({}))
    declared(tmp_path)
    (tmp_path / "run" / "a-dram").mkdir(parents=True)
    (tmp_path / "run" / "a-dram" / "status.json").write_text('{"segment": "10.0.0.2:1"}')
    assert _mooncake.holds_now("a") == {
        "objects": 3,
        "stores": [
            {"segment": "10.0.0.1:1", "tier": None, "used_bytes": 5, "status": "OK"},
            {"segment": "10.0.0.2:1", "tier": "dram", "used_bytes": 7, "status": "OK"},
        ],
    }
