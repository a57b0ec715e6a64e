# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What differs between a running microVM and its declaration, and that drivers keep the protocol."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _vmm

VOLUME = {
    "name": "data", "size_bytes": 1 << 30, "template": "", "readonly": False, "mount": "/data", "filesystem": "ext4",
    "writable_layer": False,
}  # fmt: skip


def test_the_fixture_has_every_key(microvm_spec: t.Any) -> None:
    assert set(microvm_spec) == set(_vmm.Spec.__annotations__)


def test_nothing_differs_from_itself(microvm_spec: t.Any) -> None:
    assert _vmm.changes(microvm_spec, dict(microvm_spec)) == []


def test_items_are_compared_by_name_and_what_goes_comes_first(microvm_spec: t.Any) -> None:
    before = {**microvm_spec, "volumes": [VOLUME], "devices": ["0000:01:00.0"]}
    after = {**microvm_spec, "volumes": [{**VOLUME, "name": "new"}], "vcpus": 2, "devices": []}
    found = _vmm.changes(before, after)
    assert [str(change) for change in found] == [
        "volumes data removed", "devices 0000:01:00.0 removed", "vcpus 1 -> 2", "volumes new added",
    ]  # fmt: skip


def test_applied_changes_lead_to_the_declaration(microvm_spec: t.Any) -> None:
    before = {**microvm_spec, "volumes": [VOLUME]}
    after = {**microvm_spec, "volumes": [{**VOLUME, "size_bytes": 2 << 30}], "memory_bytes": 512 << 20}
    running = before
    for change in _vmm.changes(before, after):
        running = _vmm.applied(running, change)
    assert running == {**after, "untold": ["volumes data"]}  # the guest has yet to fill it
    assert before["volumes"] == [VOLUME]


def test_what_runs_keeps_how_many_cpus_it_was_started_with(microvm_spec: t.Any) -> None:
    running = {**microvm_spec, "vcpus": 2}
    assert _vmm.booted_vcpus(running) == 2
    for vcpus in (4, 3):
        running = _vmm.applied(running, _vmm.Change("vcpus", "", running["vcpus"], vcpus))
        assert (running["vcpus"], _vmm.booted_vcpus(running)) == (vcpus, 2)
    assert _vmm.changes(running, {**microvm_spec, "vcpus": 3}) == []


def test_what_systemd_has_is_no_change_of_the_machine(microvm_spec: t.Any) -> None:
    after = {**microvm_spec, "autostart": False, "image": "other-name"}
    assert _vmm.changes(microvm_spec, after) == []


def test_a_zone_is_compared_by_its_node(microvm_spec: t.Any) -> None:
    bigger = {**microvm_spec, "memory_zones": [{"size_bytes": 1 << 30, "numa_node": None}]}
    moved = {**microvm_spec, "memory_zones": [{"size_bytes": 256 << 20, "numa_node": 2}]}
    assert _vmm.changes(microvm_spec, bigger) == []
    assert [change.key for change in _vmm.changes(microvm_spec, moved)] == ["memory_zones"]


@pytest.mark.parametrize("name", _vmm.DRIVERS)
def test_memory_that_moves_between_zones_is_a_change_that_needs_a_restart(name: str, microvm_spec: t.Any) -> None:
    sides = [
        {
            **microvm_spec, "driver": name, "memory_bytes": 3 << 30, "memory_max_bytes": 3 << 30,
            "memory_zones": [{"size_bytes": gib << 30, "numa_node": node} for gib, node in zip(sizes, (0, 2))],
        }
        for sizes in ((1, 2), (2, 1))
    ]  # fmt: skip
    (change,) = _vmm.changes(*sides)
    assert change.key == "memory_zones" and _vmm.driver(name).restart_reason(change, sides[0])
    assert _vmm.changes(sides[0], dict(sides[0])) == []


def test_disks_in_their_order(microvm_spec: t.Any) -> None:
    spec = {**microvm_spec, "data": "data-1", "volumes": [VOLUME]}
    assert _vmm.disks(spec, "/c") == [
        _vmm.Disk("agentfleet-config", "/c/config-0123456789ab", True),
        _vmm.Disk("agentfleet-data", "/c/data-1", True),
        _vmm.Disk("data", "/var/lib/agentfleet/volumes/a1/data", False),
    ]


@pytest.mark.parametrize("name", _vmm.DRIVERS)
def test_every_driver_keeps_the_protocol(name: str, microvm_spec: t.Any) -> None:
    driver = _vmm.driver(name)
    wanted = [method for method in vars(_vmm.Driver) if not method.startswith("_")]
    assert [method for method in wanted if not callable(getattr(driver, method, None))] == []
    share = {"tag": "m", "source": "/srv", "target": "/mnt/m", "readonly": True, "dax": "always"}
    (refused,) = driver.unsupported({**microvm_spec, "driver": name, "shares": [share]})
    assert refused.option == "shares[0].dax" and "pmem" in refused.remedy
