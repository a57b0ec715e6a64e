# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""KV-cache pools: what is planned, in which order, and what a second run plans."""

from __future__ import annotations

import copy
import json
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _pool
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused

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
    """A host with systemd as far as pools use it, and Mooncake answering how many objects it has."""

    def __init__(self, host: t.Any) -> None:
        self.host, self.active, self.enabled, self.objects = host, set(), set(), 0
        host.files(
            {
                "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 65536 kB\nNode 0 MemFree: 32768 kB\n",
                "/opt/agentfleet/mooncake": "-> mooncake-0.3.13.post1",
            }
        )
        host.answers = {"systemctl": self.systemctl, "env": lambda _host: f"{self.objects}\n", "journalctl": "why\n"}

    def systemctl(self, host: t.Any) -> t.Any:
        words = [word for word in host.calls[-1].split()[1:] if not word.startswith("--")]
        verb, units = words[0], words[1:]
        if verb == "show":
            return "\n\n".join(
                f"Id={unit}\nActiveState={'active' if unit in self.active else 'inactive'}\n"
                f"UnitFileState={'enabled' if unit in self.enabled else 'disabled'}"
                for unit in units
            )
        if verb == "enable":
            self.enabled.update(units)
            self.active.update(units)
        if verb == "stop":
            self.active.difference_update(units)
        if verb == "disable":
            self.enabled.difference_update(units)
        return ""

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
        "install program and units of Mooncake pools",
        "declare /etc/agentfleet/pools/a.json",
        f"start {MASTER}",
        f"start {DRAM}",
        f"start {SECOND}",
    ]
    assert machine.run(wish()) == []
    assert machine.active == machine.enabled == {MASTER, DRAM, SECOND}
    unit = machine.host.read("/etc/systemd/system/agentfleet-mooncake-store@.service")
    assert "DynamicUser=yes" in unit and "LimitMEMLOCK=infinity" in unit
    assert json.loads(machine.host.read("/etc/agentfleet/pools/a.json"))["tiers"][1] == {
        "name": "second",
        "medium": "dram",
        "size_bytes": 8 << 20,
        "memdevs": [],
        "numa_node": 0,
    }


def test_a_change_touches_only_its_own_store(machine: Machine) -> None:
    machine.run(wish())
    other = wish()
    other[0]["tiers"][1]["size"] = "12MiB"

    assert machine.run(other) == [f"stop {SECOND}", "declare /etc/agentfleet/pools/a.json", f"start {SECOND}"]
    assert machine.run(other) == []


def test_a_tier_that_is_taken_off_the_list(machine: Machine) -> None:
    machine.run(wish())
    fewer = wish()
    del fewer[0]["tiers"][1]

    assert machine.run(fewer) == [f"stop {SECOND}", f"disable {SECOND}", "declare /etc/agentfleet/pools/a.json"]
    assert machine.active == machine.enabled == {MASTER, DRAM}


@pytest.mark.parametrize("done", range(1, 5))
def test_an_interrupted_change_is_finished_by_the_next_run(machine: Machine, done: int) -> None:
    machine.run(wish())
    other = wish(master={"port": 50052})
    resource = _pool.Pools(machine.host, copy.deepcopy(other))
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["stop"] * 3 + ["declare"] + ["start"] * 3
    for step in steps[:done]:
        resource.apply(step)

    machine.run(other)

    assert machine.active == {MASTER, DRAM, SECOND}
    assert machine.run(other) == []


def test_data_are_not_lost_unless_told(machine: Machine) -> None:
    machine.run(wish())
    machine.objects = 5
    assert machine.run(wish()) == []  # nothing stops, so nobody asks

    with pytest.raises(Refused, match="the pool holds 5 objects, which are lost by removing it"):
        machine.run([{"name": "a", "state": "absent"}])
    assert machine.run([{"name": "a", "state": "absent", "lose_data": True}]) == [
        f"stop {SECOND}",
        f"stop {DRAM}",
        f"stop {MASTER}",
        f"disable {MASTER}",
        f"disable {DRAM}",
        f"disable {SECOND}",
        "forget /etc/agentfleet/pools/a.json",
    ]
    assert machine.run([{"name": "a", "state": "absent"}]) == []


def test_a_dead_store_is_started_again(machine: Machine) -> None:
    machine.run(wish())
    machine.active.discard(DRAM)

    assert machine.run(wish()) == [f"start {DRAM}"]


def test_a_store_that_does_not_start_is_not_left_restarting(machine: Machine) -> None:
    machine.run(wish())
    machine.active.discard(DRAM)
    machine.host.answers["systemctl enable"] = (1, "", "failed")

    with pytest.raises(HostError, match="it does not start and was stopped again: why"):
        machine.run(wish())
    assert DRAM not in machine.enabled


def test_check_mode_predicts_what_earlier_tasks_would_have_made(machine: Machine) -> None:
    machine.host.remove("/opt/agentfleet/mooncake")
    resource = _pool.Pools(
        machine.host, [{"name": "a", "tiers": [{"medium": "cxl", "size": "4MiB", "memdevs": ["0x1"]}]}]
    )
    resource.predicting = True
    observed = resource.observe()

    assert [step.verb for step in resource.plan(observed)] == ["install", "declare", "start", "start"]
    assert "no CXL memory device has serial 0x1" in resource.result(observed)["warnings"][0]


def test_a_directory_is_proven_and_left_clean(fake_host: t.Any) -> None:
    pools = [{"name": "f", "engine": "filesystem", "tiers": [{"medium": "ssd", "size": "4MiB", "path": "/srv/f"}]}]
    resource = _pool.Pools(fake_host, pools)
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["create", "declare"]
    for step in steps:
        resource.apply(step)

    info = _pool.PoolInfo(fake_host, None, "1MiB")
    tier = info.result(info.observe())["pools"]["f"]["tiers"][0]

    assert tier["verified"] and tier["probe_bytes"] == 1 << 20
    assert tier["put_bytes_per_second"] > 0 and tier["get_bytes_per_second"] > 0
    assert fake_host.names("/srv/f") == []
    assert resource.plan(resource.observe()) == []


def test_a_pool_that_cannot_answer_is_not_verified(machine: Machine) -> None:
    machine.run(wish())
    machine.host.answers["env"] = (1, "", "probe a: no master")

    tiers = _pool.probe(machine.host, _pool.declared(machine.host)["a"], 1 << 20)

    assert [(tier["verified"], tier["problem"]) for tier in tiers] == [(False, "probe a: no master")] * 2
