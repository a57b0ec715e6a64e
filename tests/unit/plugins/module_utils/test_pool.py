# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools: what is planned, in which order, and what a second run plans."""

from __future__ import annotations

import copy
import json
import os
import types
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake, _pool, _poolprobe
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused
from ansible_collections.agentfleet.metal.plugins.modules import kvcache_pool

MASTER, DRAM, SECOND = (
    "agentfleet-mooncake-master@a.service",
    "agentfleet-mooncake-store@a-dram.service",
    "agentfleet-mooncake-store@a-second.service",
)


def wish(**changes: t.Any) -> list[dict[str, t.Any]]:
    tiers = [
        {"medium": "dram", "size": "4MiB", "numa_node": 0},
        {"name": "second", "medium": "dram", "size": "8MiB", "numa_node": 0},
    ]
    return [{"name": "a", "tiers": tiers, **changes}]


class Machine:
    """A host with systemd as far as pools use it, and Mooncake answering what its stores have.

    ``used`` is in bytes by tier; the stores of other hosts have ``elsewhere`` bytes free. As the engine does, it says 0 of
    a store that is not ``OK`` by ``status``. ``quotas`` are the master's, by tenants' secret names; our program answers by
    the names that the host's file of tenants has at that moment.
    """

    def __init__(self, host: t.Any) -> None:
        self.host, self.active, self.enabled = host, set(), set()
        self.used: dict[str, int] = {}
        self.status: dict[str, str] = {}
        self.elsewhere = 0
        self.answering = True
        self.quotas: dict[str, dict[str, int]] = {}
        self.agents: list[str] = []
        self.grows = "grows"  # or "dies", or why it does not
        self.starts = 0
        host.files(
            {
                "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 65536 kB\nNode 0 MemFree: 32768 kB\n",
                "/opt/agentfleet/mooncake": "-> mooncake-0.3.13.post1",
                "/etc/passwd": f"agentfleet-kv:x:{os.getuid()}:1::/:/bin/sh\n",
            }
        )
        host.answers = {
            "systemctl": self.systemctl,
            "systemd-run": self.agent,
            "journalctl": "why\n",
            "systemd-sysusers": "",
            "chown": "",
        }

    def agent(self, host: t.Any) -> t.Any:
        words = host.calls[-1].partition("_mooncake ")[2].split()
        self.agents.append(" ".join(words))
        if not self.answering:
            return (1, "", f"{words[0]} {words[1]}: the master does not answer")
        if words[0] == "holds":
            states = [(tier, self.status.get(tier, "OK")) for tier in self.used]
            stores = [
                (tier, *((self.used[tier], 1 << 30) if state == "OK" else (0, 0)), state) for tier, state in states
            ]
            keys = ("tier", "used_bytes", "capacity_bytes", "status")
            found = [dict(zip(keys, store)) for store in (*stores, (None, 0, self.elsewhere, "OK"))]
            return json.dumps({"objects": sum(map(bool, self.used.values())), "stores": found})
        if words[0] == "drain":
            for tier in words[2].split(","):
                self.used[tier], self.status[tier] = 0, "DRAINED"
        if not words[0].endswith("quotas"):
            return ""
        ids = json.loads(host.read(f"/etc/agentfleet/pools/{words[1]}.tenants"))
        if words[0] == "set-quotas":
            pool = json.loads(host.read(f"/etc/agentfleet/pools/{words[1]}.json"))
            self.quotas = {ids[x["name"]]: {"quota_bytes": x["quota_bytes"], "used_bytes": 0} for x in pool["tenants"]}
            return ""
        names = {secret: name for name, secret in ids.items()}
        return json.dumps({names.get(secret, "(undeclared)"): state for secret, state in self.quotas.items()})

    def systemctl(self, host: t.Any) -> t.Any:
        words = [word for word in host.calls[-1].split()[1:] if not word.startswith("--")]
        verb, units = words[0], words[1:]
        if verb == "show":
            return "\n\n".join(
                f"Id={unit}\nActiveState={'active' if unit in self.active else 'inactive'}\n"
                f"UnitFileState={'enabled' if unit in self.enabled else 'disabled'}"
                for unit in units
            )
        stores = [unit for unit in units if "-store@" in unit]
        if verb == "reload":
            self.store(stores[0], new=self.grows == "dies")
        if verb == "enable":
            for unit in set(stores) - self.active:
                self.store(unit)
            self.enabled.update(units)
            self.active.update(units)
        if verb == "stop":
            self.active.difference_update(units)
            for unit in stores:
                host.remove(self.status_path(unit))
        if verb == "disable":
            self.enabled.difference_update(units)
        return ""

    @staticmethod
    def status_path(unit: str) -> str:
        return f"/run/agentfleet-mooncake/{unit.partition('@')[2].rpartition('.')[0]}/status.json"

    def store(self, unit: str, new: bool = True) -> None:
        """A store that starts, or is told to grow, reads the declaration and says what it serves."""
        pool_name, _dash, name = unit.partition("@")[2].rpartition(".")[0].partition("-")
        pool = json.loads(self.host.read(f"/etc/agentfleet/pools/{pool_name}.json"))
        tier = next(tier for tier in pool["tiers"] if tier["name"] == name)
        status = json.loads(self.host.read(self.status_path(unit)) or "{}")
        if new:
            self.starts += 1
            status = {"pid": self.starts, "attempts": 0, "numa_node": tier["numa_node"]}
        status.update(attempts=status["attempts"] + 1, problem="")
        if new or self.grows == "grows":
            status["size_bytes"] = tier["size_bytes"]
        else:
            status["problem"] = self.grows
        self.host.files({self.status_path(unit): json.dumps(status)})

    def run(self, pools: list[dict[str, t.Any]]) -> list[str]:
        resource = _pool.Pools(self.host, pools)
        steps = resource.plan(resource.observe())
        for step in steps:
            resource.apply(step)
        return [f"{step.verb} {step.object}" for step in steps]


@pytest.fixture
def machine(fake_host: t.Any) -> Machine:
    return Machine(fake_host)


def test_from_nothing_and_again(machine: Machine) -> None:
    assert machine.run(wish()) == [
        "install program and units of KV-cache pools",
        "declare /etc/agentfleet/pools/a.json",
        f"start {MASTER}, {DRAM}, {SECOND}",
    ]
    assert machine.run(wish()) == []
    assert machine.active == machine.enabled == {MASTER, DRAM, SECOND}
    unit = machine.host.read("/etc/systemd/system/agentfleet-mooncake-store@.service")
    assert "User=agentfleet-kv" in unit and "LimitMEMLOCK=infinity" in unit and "ExecStartPre=+" in unit
    assert json.loads(machine.host.read("/etc/agentfleet/pools/a.json"))["tiers"][1] == {
        "name": "second",
        "medium": "dram",
        "size_bytes": 8 << 20,
        "memdevs": [],
        "numa_node": 0,
    }


def test_a_tier_grows_while_it_serves(machine: Machine) -> None:
    machine.run(wish())
    machine.used = {"second": 5}
    other = wish()
    other[0]["tiers"][1]["size"] = "12MiB"

    assert machine.run(other) == ["declare /etc/agentfleet/pools/a.json", f"grow {SECOND}"]
    assert machine.run(other) == []


def test_a_tier_that_could_not_grow_is_told_of_and_grows_in_the_next_run(machine: Machine) -> None:
    machine.run(wish())
    other = wish()
    other[0]["tiers"][1]["size"] = "12MiB"

    for _run in range(2):
        machine.grows = "locking 4194304 bytes on NUMA node 0: Cannot allocate memory"
        with pytest.raises(HostError, match="it serves 8388608 bytes as before: locking 4194304 bytes"):
            machine.run(other)
    machine.grows = "grows"
    assert machine.run(other) == [f"grow {SECOND}"]
    assert machine.run(other) == []


def test_a_store_leads_nobody_elsewhere(machine: Machine) -> None:
    machine.run(wish())
    path = machine.status_path(DRAM)
    machine.host.remove(path)
    machine.host.files({path: "-> /etc/shadow"})
    with pytest.raises(HostError, match="status.json: a link, which is not followed"):
        machine.run(wish())


def test_a_store_that_died_of_growing_is_no_success(machine: Machine) -> None:
    machine.run(wish())
    machine.grows = "dies"
    other = wish()
    other[0]["tiers"][1]["size"] = "12MiB"

    with pytest.raises(HostError, match="its store ended instead of growing, and what it held in memory is lost"):
        machine.run(other)
    assert machine.run(other) == []


def test_a_tier_that_shrinks_is_drained_and_only_its_own_store_stops(machine: Machine) -> None:
    machine.run(wish())
    machine.used = {"second": 5}
    machine.elsewhere = 5
    other = wish()
    other[0]["tiers"][1]["size"] = "4MiB"

    assert machine.run(other) == [
        "drain pool a, tiers second",
        f"stop {SECOND}",
        "declare /etc/agentfleet/pools/a.json",
        f"start {SECOND}",
    ]
    assert "drain a second 600" in machine.agents
    assert machine.run(other) == []


def memory(machine: Machine, node: int, free_mib: int, **mib: int) -> None:
    names = {"MemTotal": 64, "MemFree": free_mib, **mib}
    text = "".join(f"Node {node} {name.replace('_', '(')}: {size << 10} kB\n" for name, size in names.items())
    text = text.replace("(file", "(file)")
    machine.host.files({f"/sys/devices/system/node/node{node}/meminfo": text})


def test_what_a_store_has_that_stops_is_there_for_what_starts_after_it(machine: Machine) -> None:
    """Also where it is most of its node; but not for what starts before it."""
    machine.run(wish())
    memory(machine, 0, free_mib=2)  # beside the 12 MiB of the two stores

    larger = {"medium": "dram", "size": "15MiB", "numa_node": 0}
    b = {"name": "b", "master": {"port": 1, "metrics_port": 2}, "tiers": [larger]}
    problem = "NUMA node 0 has 14680064 bytes free for 15728640 bytes of new tiers: 2097152 unused, 12582912 of stores"
    with pytest.raises(Refused, match=problem):
        machine.run(wish(tiers=[{**larger, "name": "third"}]))
    with pytest.raises(Refused, match="2097152 unused, 0 of stores that stop before"):
        machine.run([b, {"name": "a", "state": "absent"}])
    smaller = wish(master={"port": 50052})
    assert f"start {MASTER}, {DRAM}, {SECOND}" in machine.run(smaller)
    smaller[0]["tiers"][1]["size"] = "6MiB"
    assert f"start {SECOND}" in machine.run(smaller)


def test_tiers_with_a_place_and_without_share_what_the_host_has(machine: Machine) -> None:
    memory(machine, 0, free_mib=10)
    memory(machine, 2, free_mib=20)
    anywhere = {"name": "any", "medium": "dram", "size": "16MiB"}
    with pytest.raises(Refused, match="this host has 31457280 bytes free for 32505856 bytes"):
        machine.run(wish(tiers=[{"medium": "cxl", "size": "15MiB", "numa_node": 2}, anywhere]))
    with pytest.raises(Refused, match="this host has 31457280 bytes free for 32505856 bytes"):
        machine.run(wish(tiers=[anywhere, {"medium": "cxl", "size": "15MiB", "numa_node": 2}]))
    assert machine.run(wish(tiers=[{"medium": "cxl", "size": "14MiB", "numa_node": 2}, anywhere]))


def test_what_files_left_in_memory_is_counted_by_half(machine: Machine) -> None:
    """The memory of stores is mapped, too, but not a file's."""
    pages = {"Active_file": 10, "Inactive_file": 11, "Dirty": 1, "Writeback": 2, "Mapped": 42, "Mlocked": 40}
    memory(machine, 0, free_mib=4, **pages)
    with pytest.raises(
        Refused, match=r"13631488 bytes of new tiers: 4194304 unused, 0 of stores .* and 8388608 of files'"
    ) as no:
        machine.run(wish(tiers=[{"medium": "dram", "size": "13MiB", "numa_node": 0}]))
    assert "drop_caches" in no.value.remedy
    assert machine.run(wish())


def test_a_tier_that_cannot_be_drained_is_not_touched(machine: Machine) -> None:
    machine.run(wish())
    machine.used = {"second": 5}
    machine.elsewhere = 4
    other = wish()
    other[0]["tiers"][1]["size"] = "4MiB"

    with pytest.raises(Refused, match="5 bytes for which its other stores have no room, lost by this change"):
        machine.run(other)
    assert machine.active == {MASTER, DRAM, SECOND}


SHARED = {"etcd": ["127.0.0.1:2379"]}
GONE = [
    f"stop {SECOND}, {DRAM}, {MASTER}",
    f"disable {MASTER}, {DRAM}, {SECOND}",
    "forget /etc/agentfleet/pools/a.json",
]


def test_a_pool_with_data_is_not_removed_by_moving_them_to_a_host_that_removes_it_too(machine: Machine) -> None:
    machine.run(wish(**SHARED))
    machine.used, machine.elsewhere = {"dram": 5, "second": 0}, 1 << 30

    with pytest.raises(Refused, match="holds 5 bytes in the stores of this host, lost by removing it") as refused:
        machine.run([{"name": "a", "state": "absent"}])
    assert "state: drained" in refused.value.remedy
    assert machine.run([{"name": "a", "state": "absent", "lose_data": True}]) == GONE
    assert [words for words in machine.agents if words.startswith("drain")] == []


def test_a_host_leaves_a_pool_and_its_data_stay(machine: Machine) -> None:
    machine.run(wish(**SHARED))
    machine.used, machine.elsewhere = {"dram": 5, "second": 0}, 4

    with pytest.raises(Refused, match="5 bytes for which its other stores have no room") as refused:
        machine.run([{"name": "a", "state": "drained"}])
    assert "state: drained" not in refused.value.remedy
    machine.elsewhere = 5
    assert machine.run([{"name": "a", "state": "drained"}]) == ["drain pool a, tiers dram, second", *GONE]
    assert machine.run([{"name": "a", "state": "drained"}]) == []


def test_data_are_not_moved_to_a_tier_that_goes_too(machine: Machine) -> None:
    third = {"name": "third", "medium": "dram", "size": "4MiB", "numa_node": 0}
    machine.run(wish(tiers=[*wish()[0]["tiers"], third]))
    machine.used = {"dram": 0, "second": 5, "third": 0}

    assert machine.run(wish(tiers=[third]))[0] == "drain pool a, tiers dram, second"
    assert "drain a dram,second 600" in machine.agents


def test_a_store_that_is_being_drained_is_not_taken_for_an_empty_one(machine: Machine) -> None:
    machine.run(wish(**SHARED))
    machine.used, machine.status, machine.elsewhere = {"dram": 0, "second": 5}, {"second": "DRAINING"}, 1 << 30

    with pytest.raises(Refused, match=r"an unknown amount of data \(tiers second are being drained\)"):
        machine.run([{"name": "a", "state": "absent"}])
    fewer = wish(**SHARED)
    del fewer[0]["tiers"][1]
    assert machine.run(fewer)[0] == "drain pool a, tiers second"
    machine.status = {"dram": "DRAINED"}  # a run that ended between the drain and the stop is gone on with
    machine.used = {"dram": 0}
    assert machine.run([{"name": "a", "state": "absent"}])[0] == f"stop {DRAM}, {MASTER}"


def test_a_master_that_does_not_answer_is_not_taken_for_an_empty_pool(machine: Machine) -> None:
    machine.run(wish())
    machine.answering = False

    with pytest.raises(Refused, match="an unknown amount of data .*the master does not answer"):
        machine.run([{"name": "a", "state": "absent"}])
    assert machine.active == {MASTER, DRAM, SECOND}
    machine.run([{"name": "a", "state": "absent", "lose_data": True}])
    assert machine.active == set()


def test_a_master_recorded_in_etcd_stops_without_losing_objects(machine: Machine) -> None:
    with_etcd = wish(etcd=["127.0.0.1:2379"])
    machine.run(with_etcd)
    machine.used = {"dram": 5}
    other = wish(etcd=["127.0.0.1:2379"], eviction_high_watermark=0.8)

    assert machine.run(other) == [f"stop {MASTER}", "declare /etc/agentfleet/pools/a.json", f"start {MASTER}"]


def test_a_tier_that_is_taken_off_the_list(machine: Machine) -> None:
    machine.run(wish())
    fewer = wish()
    del fewer[0]["tiers"][1]

    assert machine.run(fewer) == [f"stop {SECOND}", f"disable {SECOND}", "declare /etc/agentfleet/pools/a.json"]
    assert machine.active == machine.enabled == {MASTER, DRAM}


@pytest.mark.parametrize("done", range(1, 3))
def test_an_interrupted_change_is_finished_by_the_next_run(machine: Machine, done: int) -> None:
    machine.run(wish())
    other = wish(master={"port": 50052})
    resource = _pool.Pools(machine.host, copy.deepcopy(other))
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["stop", "declare", "start"]
    for step in steps[:done]:
        resource.apply(step)

    machine.run(other)

    assert machine.active == {MASTER, DRAM, SECOND}
    assert machine.run(other) == []


def test_data_are_not_lost_unless_told(machine: Machine) -> None:
    machine.run(wish())
    machine.used = {"dram": 5, "second": 5}
    assert machine.run(wish()) == [] and machine.agents == []  # nothing stops, so nobody asks

    with pytest.raises(Refused, match="the pool holds 2 objects, lost by removing it"):
        machine.run([{"name": "a", "state": "absent"}])
    assert machine.run([{"name": "a", "state": "absent", "lose_data": True}]) == [
        f"stop {SECOND}, {DRAM}, {MASTER}",
        f"disable {MASTER}, {DRAM}, {SECOND}",
        "forget /etc/agentfleet/pools/a.json",
    ]
    assert machine.run([{"name": "a", "state": "absent"}]) == []


def test_large_tiers_have_the_time_to_be_cleared(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, waits = machine.host._runner, {}

    def run(argv: list[str], stdin: str | None, timeout_seconds: float) -> t.Any:
        waits[argv[1]] = timeout_seconds
        return answer(argv, stdin, timeout_seconds)

    monkeypatch.setattr(machine.host, "_runner", run)
    meminfo = "".join(f"Node 0 {name}: {4 << 30} kB\n" for name in ("MemTotal", "MemFree"))
    machine.host.files({"/sys/devices/system/node/node0/meminfo": meminfo})
    for size in ("2TiB", "3TiB"):
        machine.run(wish(tiers=[{"medium": "dram", "size": size, "numa_node": 0}]))
    assert (waits["enable"], waits["reload"]) == (600 + 8192, 300 + 4096)


def test_a_dead_store_is_started_again(machine: Machine) -> None:
    machine.run(wish())
    machine.active.discard(DRAM)

    assert machine.run(wish()) == [f"start {DRAM}"]


def test_a_store_that_does_not_start_is_not_left_restarting(machine: Machine) -> None:
    machine.run(wish())
    machine.active.discard(DRAM)
    machine.host.answers["systemctl enable"] = (1, "", "failed")

    with pytest.raises(HostError, match=f"{DRAM}: does not start and was stopped again: why"):
        machine.run(wish())
    assert machine.enabled == machine.active == {MASTER, SECOND}


def test_check_mode_predicts_what_earlier_tasks_would_have_made(machine: Machine) -> None:
    machine.host.remove("/opt/agentfleet/mooncake")
    tiers = [
        {"medium": "cxl", "size": "4MiB", "memdevs": ["0x1"]},
        {"name": "far", "medium": "cxl", "size": "4MiB", "numa_node": 2},
        {"medium": "dram", "size": "4MiB", "numa_node": 0},
    ]
    resource = _pool.Pools(machine.host, [{"name": "a", "tiers": tiers}])
    resource.predicting = True
    observed = resource.observe()

    assert [step.verb for step in resource.plan(observed)] == ["install", "declare", "start"]
    serial, node = resource.result(observed)["warnings"]
    assert "no CXL memory device has serial 0x1" in serial
    assert "pool a, tier far: no NUMA node 2 with memory" in node


def disk(name: str, size: str = "6MiB") -> dict[str, t.Any]:
    tiers = [{"medium": "ssd", "size": size, "path": f"/srv/{name}"}]
    return {"name": name, "engine": "filesystem", "tiers": tiers}


def free_on_disk(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    state = types.SimpleNamespace(f_bavail=mib << 20, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: state)


def test_tiers_of_one_file_system_are_summed_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that were there before, less what they have already."""
    free_on_disk(monkeypatch, 10)
    problem = "has 10485760 bytes free for 12582912 bytes that tiers of it may still write"
    with pytest.raises(Refused, match=problem) as refused:
        machine.run([disk("a"), disk("b")])
    assert refused.value.option == "pools[0].tiers[0].size"
    machine.run([disk("a")])
    with pytest.raises(Refused, match=problem) as refused:
        machine.run([disk("a"), disk("b")])
    assert refused.value.option == "pools[1].tiers[0].size"
    machine.host.files({"/srv/a/x/page": "a" * (2 << 20)})
    assert machine.run([disk("a"), disk("b")])


def test_files_of_a_cache_are_counted_only_where_it_matters(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, walked = os.walk, []

    def seen(top: str) -> t.Any:
        walked.append(top)
        for where, directories, names in walk(top):
            yield where, directories, [*names, "evicted-since"]

    monkeypatch.setattr(os, "walk", seen)
    machine.run([disk("a")])
    machine.host.files({"/srv/a/page": "a" * (3 << 20)})
    free_on_disk(monkeypatch, 4)
    assert machine.run([disk("a")]) == [] and walked == [], "a tier that does not change needs no room"
    with pytest.raises(Refused, match="4194304 bytes free for 5242880 bytes"):
        machine.run([disk("a", "8MiB")])
    assert machine.run([disk("a", "7MiB")])
    assert len(walked) == 2 and machine.run([disk("a", "7MiB")]) == [] and len(walked) == 2


def test_a_directory_is_proven_and_left_clean(fake_host: t.Any) -> None:
    pools = [{"name": "f", "engine": "filesystem", "tiers": [{"medium": "ssd", "size": "4MiB", "path": "/srv/f"}]}]
    resource = _pool.Pools(fake_host, pools)
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["create", "declare"]
    for step in steps:
        resource.apply(step)

    info = _poolprobe.PoolInfo(fake_host, None, "1MiB", 4)
    tier = info.result(info.observe())["pools"]["f"]["tiers"][0]

    assert tier["verified"] and tier["probe_bytes"] == 1 << 20 and tier["samples"] == 4
    assert 0 < tier["get_microseconds"]["p50"] <= tier["get_microseconds"]["p99"]
    assert tier["put_bytes_per_second"] > 0 and tier["get_bytes_per_second"] > 0
    assert fake_host.names("/srv/f") == []
    assert resource.plan(resource.observe()) == []


def test_a_probe_writes_into_nothing_that_took_its_files_place(
    fake_host: t.Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_host.files({"/srv/f": None, "/etc/shadow": "of root"})

    def swap(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        os.unlink(path)
        os.symlink(fake_host.path("/etc/shadow"), path)

    monkeypatch.setattr(os, "fsync", swap)
    tier = {"name": "ssd", "medium": "ssd", "size_bytes": 1 << 20, "path": "/srv/f"}
    (found,) = _poolprobe.probe(fake_host, {"engine": "filesystem", "tiers": [tier]}, 4096, 2)
    assert not found["verified"] and fake_host.names("/srv/f") == []
    assert fake_host.read("/etc/shadow") == "of root"


def test_a_pool_that_cannot_answer_is_not_verified(machine: Machine) -> None:
    machine.run(wish())
    machine.host.answers["systemd-run"] = (1, "", "probe a: no master")

    tiers = _poolprobe.probe(machine.host, _poolprobe.declared(machine.host)["a"], 1 << 20, 1)

    assert [(tier["verified"], tier["problem"]) for tier in tiers] == [(False, "probe a: no master")] * 2


TENANTS = [{"name": "red", "quota": "2MiB", "token": "0123456789abcdef"}, {"name": "blue", "quota": "1MiB"}]


@pytest.mark.parametrize(("etcd", "warned"), [([], 0), (["h:2379"], 1)])
def test_quotas_that_the_record_in_etcd_does_not_know_are_warned_of(
    machine: Machine, etcd: list[str], warned: int
) -> None:
    resource = _pool.Pools(machine.host, wish(tenants=TENANTS, etcd=etcd))
    warnings = resource.result(resource.observe())["warnings"]
    assert sum("what a tenant's quota evicts" in one for one in warnings) == warned


def test_tenants_get_quotas_and_secret_names(machine: Machine) -> None:
    steps = machine.run(wish(tenants=TENANTS))

    assert steps[-1] == "set tenants' quotas of pool a" and "write /etc/agentfleet/pools/a.tenants" in steps
    path = machine.host.path("/etc/agentfleet/pools/a.tenants")
    assert os.stat(path).st_mode & 0o777 == 0o600
    ids = json.loads(machine.host.read("/etc/agentfleet/pools/a.tenants"))
    assert ids["blue"] == "blue" and ids["red"].startswith("red-") and len(ids["red"]) == 4 + 32
    assert "0123456789abcdef" not in json.dumps(ids)
    declaration = machine.host.read("/etc/agentfleet/pools/a.json")
    assert ids["red"] not in declaration and "0123456789abcdef" not in declaration
    assert machine.run(wish(tenants=TENANTS)) == []

    more = [{**TENANTS[0], "quota": "3MiB"}, TENANTS[1]]
    assert machine.run(wish(tenants=more)) == ["declare /etc/agentfleet/pools/a.json", "set tenants' quotas of pool a"]
    assert machine.quotas[ids["red"]]["quota_bytes"] == 3 << 20


def test_nothing_secret_is_in_a_plan_or_a_command(machine: Machine) -> None:
    connectors = [{"engine": "sglang", "backend": "mooncake", "tenant": "red"}]
    pools = wish(tenants=TENANTS, connectors=connectors)
    resource = _pool.Pools(machine.host, pools)
    steps = resource.plan(resource.observe())
    secret = resource.ids["a"]["red"]
    assert secret not in json.dumps([step.public() for step in steps])
    for step in steps:
        resource.apply(step)
    assert not [call for call in machine.host.calls if secret in call or TENANTS[0]["token"] in call]
    path = "/etc/agentfleet/connectors/a/sglang-mooncake-red/mooncake.json"
    assert json.loads(machine.host.read(path))["tenant_id"] == secret
    assert os.stat(machine.host.path(path)).st_mode & 0o777 == 0o600
    assert secret not in json.dumps(resource.result(resource.observe()))


@pytest.mark.parametrize("done", range(4))
def test_a_token_that_changes_is_told_to_all_in_one_run(machine: Machine, done: int) -> None:
    connectors = [{"engine": "sglang", "backend": "mooncake", "tenant": "red"}]
    machine.run(wish(tenants=TENANTS, connectors=connectors))
    old = set(machine.quotas)
    other = wish(tenants=[{**TENANTS[0], "token": "fedcba9876543210"}, TENANTS[1]], connectors=connectors)
    resource = _pool.Pools(machine.host, other)
    steps = resource.plan(resource.observe())
    assert [f"{step.verb} {step.object}" for step in steps] == [
        "write /etc/agentfleet/connectors/a/sglang-mooncake-red/mooncake.json",
        "write /etc/agentfleet/pools/a.tenants",
        "set tenants' quotas of pool a",
    ]
    for step in steps[:done]:  # an interrupted run is finished by the next one
        resource.apply(step)

    assert bool(machine.run(other)) == (done < 3)
    assert set(machine.quotas) == set(resource.ids["a"].values()) and resource.ids["a"]["red"] not in old
    assert machine.run(other) == []


def test_a_connector_that_is_taken_off_the_list_leaves_no_file(machine: Machine) -> None:
    machine.run(wish(connectors=[{"engine": "vllm", "backend": "mooncake"}]))
    base = "/etc/agentfleet/connectors/a/vllm-mooncake"
    assert machine.host.names(base) == ["arguments", "environment", "mooncake.json"]

    assert machine.run(wish()) == [
        "declare /etc/agentfleet/pools/a.json",
        *(f"remove {base}/{name}" for name in ("arguments", "environment", "mooncake.json")),
    ]
    assert machine.host.names("/etc/agentfleet/connectors") == []
    assert machine.run(wish()) == []


def test_ssd_offload_gives_each_store_its_share(machine: Machine) -> None:
    tiers = [*wish()[0]["tiers"], {"medium": "ssd", "size": "48MiB", "path": "/srv/kv"}]
    steps = machine.run(wish(tiers=tiers))

    assert [step for step in steps if "create" in step] == ["create /srv/kv/dram", "create /srv/kv/second"]
    pool = _poolprobe.declared(machine.host)["a"]
    shares = [_mooncake.offload_share(pool, tier) for tier in pool["tiers"][:2]]
    assert shares == [("/srv/kv/dram", 16 << 20), ("/srv/kv/second", 32 << 20)]
    assert _mooncake.master_flags(pool)["enable_offload"] == "true"
    environment = _mooncake.offload_environment(pool, *shares[0], 4 << 20)
    assert environment["MOONCAKE_OFFLOAD_BUCKET_MAX_TOTAL_SIZE"] == str(16 << 20)
    assert environment["MOONCAKE_OFFLOAD_BUCKET_EVICTION_POLICY"] == "lru"
    assert machine.run(wish(tiers=tiers)) == []


def test_a_masters_command_line(machine: Machine) -> None:
    machine.run(wish(tenants=TENANTS, etcd=["h:2379"]))
    flags = _mooncake.master_flags(_poolprobe.declared(machine.host)["a"])
    assert flags["enable_oplog"] == "true" and flags["cluster_id"] == "a"
    assert flags["tenant_quota_connector_type"] == "etcd" and flags["metrics_host"] == "127.0.0.1"
    assert "red" not in json.dumps(flags)


def test_a_write_policy_is_followed_by_the_disk_or_by_the_engine(machine: Machine) -> None:
    tiers = [*wish()[0]["tiers"], {"medium": "ssd", "size": "48MiB", "path": "/srv/kv"}]
    machine.run(wish(tiers=tiers, write_policy="write_back"))
    assert _mooncake.master_flags(_poolprobe.declared(machine.host)["a"])["offload_on_evict"] == "true"

    connectors = [{"engine": "sglang", "backend": "mooncake"}]
    machine.run(wish(write_policy="write_through_selective", connectors=connectors))
    arguments = machine.host.read("/etc/agentfleet/connectors/a/sglang-mooncake/arguments")
    assert "--hicache-write-policy=write_through_selective" in arguments


def test_what_is_left_out_is_not_refused_and_an_eviction_policy_goes_where_it_is_heeded(machine: Machine) -> None:
    """Ansible hands a module the defaults of what is left out."""
    given = {key: option.get("default") for key, option in kvcache_pool.POOL.items()}
    given["master"] = {key: option.get("default") for key, option in kvcache_pool.MASTER.items()}
    tier = {"medium": "ssd", "size": "4MiB", "path": "/srv/f"}
    files = {**given, "name": "f", "engine": "filesystem", "tiers": [tier]}
    machine.run([files])
    assert _poolprobe.declared(machine.host)["f"]["eviction_policy"] == "lru"

    connectors = [{"engine": "lmcache", "backend": "disk"}]
    machine.run([{**files, "eviction_policy": "fifo", "connectors": connectors}])
    config = json.loads(machine.host.read("/etc/agentfleet/connectors/f/lmcache-disk/lmcache.yaml"))
    assert config["cache_policy"] == "FIFO"
    tiers = [*wish()[0]["tiers"], {"medium": "ssd", "size": "48MiB", "path": "/srv/kv"}]
    machine.run(wish(tiers=tiers, eviction_policy="fifo"))
    assert _poolprobe.declared(machine.host)["a"]["eviction_policy"] == "fifo"


@pytest.mark.parametrize("tenants", [[], [{"name": "red", "quota": "32MiB", "owner": "svc"}]])
def test_the_large_files_of_a_3fs_pool(machine: Machine, tenants: list[dict[str, str]]) -> None:
    machine.host.files({"/etc/passwd": f"svc:x:{os.getuid()}:1::/:/bin/sh\n", "/3fs/s": None})
    machine.host.files({"/proc/self/mounts": "hf3fs.s /3fs/s fuse.hf3fs rw 0 0\n"})
    machine.host.answers["chown"] = ""
    tier = {"medium": "threefs", "size": "64MiB", "path": "/3fs/s/kv", "mount_point": "/3fs/s"}
    connector = {"engine": "sglang", "backend": "hf3fs", "tenant": "red" if tenants else None}
    pools: list[dict[str, t.Any]] = [{"name": "f", "engine": "threefs", "tiers": [tier], "tenants": tenants}]
    pools[0].update(bytes_per_token=3000, tensor_parallel=2)
    pools[0]["connectors"] = [connector]
    path = "/3fs/s/kv/red" if tenants else "/3fs/s/kv"
    files = [f"{path}/hicache.{rank}.bin" for rank in (0, 1)]

    steps = machine.run(pools)
    assert steps[:3] == [f"create {path}", *(f"lay out {file}" for file in files)]
    assert machine.run(pools) == []
    page = 3000 * 64 // 2 // 2
    whole = (16 if tenants else 32) * (1 << 20) // page * page
    assert [os.path.getsize(machine.host.path(file)) for file in files] == [whole] * 2
    chowns = [call for call in machine.host.calls if call.startswith("chown")]
    assert chowns == ([f"chown svc: {machine.host.path(path)}"] if tenants else [])
    other = [{**pools[0], "bytes_per_token": 6000}]
    with pytest.raises(Refused, match="a new map of its pages begins"):
        machine.run(other)
    assert machine.run([{**other[0], "lose_data": True}])[:2] == [f"lay out {file}" for file in files]


def test_a_tenants_directory_gets_the_owner_and_mode_that_are_declared(machine: Machine) -> None:
    def users(**uids: int) -> None:
        machine.host.files({"/etc/passwd": "".join(f"{name}:x:{uid}:1::/:/bin/sh\n" for name, uid in uids.items())})

    def pools(owner: str | None) -> list[dict[str, t.Any]]:
        tier = {"medium": "ssd", "size": "4MiB", "path": "/srv/f"}
        tenants = [{"name": "red", "quota": "1MiB", "owner": owner}]
        return [{"name": "f", "engine": "filesystem", "tiers": [tier], "tenants": tenants}]

    own, declare, real = "own /srv/f/red", "declare /etc/agentfleet/pools/f.json", machine.host.path("/srv/f/red")
    me = os.getuid()
    users(alice=me, bob=me + 1)
    assert machine.run(pools("alice")) == ["create /srv/f/red", declare]
    os.chmod(real, 0o777)
    assert machine.run(pools("alice")) == [own] and os.stat(real).st_mode & 0o777 == 0o700
    assert machine.run(pools("alice")) == []

    resource = _pool.Pools(machine.host, pools("bob"))
    step = resource.plan(resource.observe())[0]
    assert (step.before, step.after) == (
        "of alice, mode 0700",
        "of bob, mode 0700, with all that is in it",
    )
    machine.host.answers["chown"] = (1, "", "interrupted")
    with pytest.raises(HostError, match="interrupted"):
        machine.run(pools("bob"))
    assert os.stat(real).st_mode & 0o777 == 0, "closed to who had it, and not taken for done"
    users(alice=me + 1, bob=me)  # as if chown had begun with the directory itself
    machine.host.answers["chown"] = ""
    assert machine.run(pools("bob")) == [own, declare]
    assert machine.host.calls[-1] == f"chown --recursive bob: {real}"
    assert machine.run(pools("bob")) == []
    os.chmod(real, 0o750)
    assert machine.run(pools(None)) == [declare], "without an owner it stays as somebody made it"


def test_each_pool_of_a_host_has_a_map_of_its_own(machine: Machine) -> None:
    machine.host.files({"/proc/self/mounts": "hf3fs.s /3fs/s fuse.hf3fs rw 0 0\n", "/3fs/s": None})

    def pool(name: str, engine: str, **more: t.Any) -> dict[str, t.Any]:
        tier = {"medium": "threefs", "size": "4MiB", "path": f"/3fs/s/{name}", "mount_point": "/3fs/s"}
        connector = {"engine": engine, "backend": "hf3fs", **more}
        return {"name": name, "engine": "threefs", "tiers": [tier], "connectors": [connector]}

    machine.run([pool("a", "sglang")])
    for there, coming in (([], "sglang"), ([pool("v", "vllm")], "vllm")):
        with pytest.raises(Refused, match="has the metadata service http://127.0.0.1:1800"):
            machine.run([*there, pool("b", coming)])
    assert machine.run([pool("b", "sglang", metadata_port=18002), pool("c", "sglang", metadata_address="10.0.0.9")])
    assert machine.run([{"name": "a", "state": "absent", "lose_data": True}, pool("d", "sglang")])


def test_what_connectors_do_not_do_is_warned_of(machine: Machine) -> None:
    machine.host.files({"/proc/self/mounts": "hf3fs.s /3fs/s fuse.hf3fs rw 0 0\n", "/3fs/s": None})
    machine.host.answers["/opt/vllm/bin/python"] = ""
    tier = {"medium": "threefs", "size": "4MiB", "path": "/3fs/s/kv", "mount_point": "/3fs/s"}
    pool = {"name": "f", "engine": "threefs", "tiers": [tier]}

    def warned(engine: str, backend: str, **more: t.Any) -> list[str]:
        connectors = [{"engine": engine, "backend": backend, **more}]
        resource = _pool.Pools(machine.host, [{**pool, "connectors": connectors}])
        return list(resource.result(resource.observe())["warnings"])

    (mock,) = warned("vllm", "hf3fs")
    assert mock.startswith("pool f, connector vllm-hf3fs: Without python nobody looked whether vllm can import")
    assert "/etc/agentfleet/connectors/f/vllm-hf3fs/check PYTHON" in mock
    assert warned("vllm", "hf3fs", python="/opt/vllm/bin/python") == []
    assert "does not bound its directory" in warned("vllm", "offloading")[0]


def test_what_a_restart_of_a_metadata_service_loses() -> None:
    named = {"sglang": False, "vllm": True, "sglang-vllm": False, "vllm-red": True}
    assert {name: _pool._forgets(f"agentfleet-kv-metadata-vllm-{name}.service") for name in named} == named
    assert not _pool._forgets("agentfleet-mooncake-store@a-vllm.service")


def test_a_3fs_pool_with_its_metadata_service(machine: Machine) -> None:
    machine.host.files({"/proc/self/mounts": "hf3fs.stage /3fs/stage fuse.hf3fs rw 0 0\n", "/3fs/stage": None})
    machine.host.answers["/opt/sglang/bin/python"] = ""
    tier = {"medium": "threefs", "size": "64MiB", "path": "/3fs/stage/kv", "mount_point": "/3fs/stage"}
    connector = {"engine": "sglang", "backend": "hf3fs", "python": "/opt/sglang/bin/python", "metadata_run": True}
    pools = [{"name": "t", "engine": "threefs", "model": "DeepSeek-V3", "tiers": [tier], "connectors": [connector]}]
    unit = "agentfleet-kv-metadata-t-sglang.service"

    steps = machine.run(pools)

    assert f"write /etc/systemd/system/{unit}" in steps and steps[-1] == f"start {unit}"
    page = 70272 * 64
    kept = f"/var/lib/agentfleet-kv/t/pages-{(64 << 20) // page}x{page} "
    assert kept in machine.host.read(f"/etc/systemd/system/{unit}"), (
        "pages of another size are not looked up in this map"
    )
    assert machine.run(pools) == []
    connector["metadata_port"] = 18005
    assert machine.run(pools)[0] == f"stop {unit}"
    with pytest.raises(Refused, match="holds files below /3fs/stage/kv, lost by removing it"):
        machine.run([{"name": "t", "state": "absent"}])
    assert machine.run([{"name": "t", "state": "absent", "lose_data": True}]) == [
        f"stop {unit}",
        f"disable {unit}",
        *(
            f"remove /etc/agentfleet/connectors/t/sglang-hf3fs/{name}"
            for name in ("arguments", "check", "environment", "hf3fs.json")
        ),
        f"remove /etc/systemd/system/{unit}",
        "forget /etc/agentfleet/pools/t.json",
    ]
    machine.host.answers["/opt/sglang/bin/python"] = (1, "", "No module named 'hf3fs_fuse'")
    with pytest.raises(Refused, match="would write plain files by a mock without a word"):
        machine.run(pools)
