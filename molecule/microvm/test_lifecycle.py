# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a microVM, the same on every driver: ready, paused, changed while it runs, killed, stopped, gone.

On Cloud Hypervisor when AGENTFLEET_CLOUD_HYPERVISOR names its program on the controller, which the role then installs.
The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import json
import time
import typing as t

import pytest

MIB = 1 << 20
NETWORKS = [
    {"name": "life", "prefix": "10.87.0.0/24", "bridge": "aflife"},
    {"name": "more", "prefix": "10.88.0.0/24", "bridge": "afmore"},
]
DATA = {"name": "data", "size": "64MiB"}
MORE = {"name": "more", "size": "32MiB"}
BACK_SECONDS = 600


class Life:
    """One microVM of one driver on the lab's host.

    :param driver: name of the driver
    """

    def __init__(self, lab: t.Any, host: t.Any, microvms: t.Any, driver: str) -> None:
        self.lab, self.host, self.microvms = lab, host, microvms
        self.name = f"life-{driver.replace('_', '-')}"
        self.wish: dict[str, t.Any] = {
            "name": self.name,
            "driver": driver,
            "image": "agent",
            "memory": "192MiB",
            "memory_max": "320MiB",
            "vcpus": 1,
            "vcpus_max": 2,
            "hotplug_slots": 2,
            "thp": True,  # fewer exits while it boots
            "volumes": [DATA],
            "networks": [{"network": "life"}],
        }

    def bring(self, state: str = "running", allow_restart: bool = False, **changes: t.Any) -> dict[str, t.Any]:
        """Declare it, with changes that stay, in a state."""
        self.wish.update(changes)
        return t.cast(
            "dict[str, t.Any]",
            self.microvms.bring(self.wish, networks=NETWORKS, state=state, allow_restart=allow_restart),
        )

    def look(self) -> dict[str, t.Any]:
        """It, as microvm_info sees it."""
        return t.cast("dict[str, t.Any]", self.microvms.look(self.name)[self.name])

    def until(self, what: str, so: t.Callable[[dict[str, t.Any]], bool]) -> dict[str, t.Any]:
        """Look until it is so, within bounds."""
        return t.cast("dict[str, t.Any]", self.microvms.until(what, self.name, so=so)[self.name])


BEFORE: dict[str, set[str]] = {}


def assert_power_button(host: t.Any, name: str) -> None:
    """The guest itself ended the last time that it was stopped; no later rung of the ladder was needed."""
    journal = host.check_output(f"journalctl -u agentfleet-microvm@{name} -t microvm-unit -n 1 -o cat")
    assert journal == "power_button", journal


@pytest.fixture(scope="module")
def life(driver: str, lab: t.Any, host: t.Any, microvms: t.Any) -> Life:
    """The microVM of one driver."""
    return Life(lab, host, microvms, driver)


def test_it_is_ready_and_the_second_run_changes_nothing(life: Life) -> None:
    BEFORE[life.name] = life.microvms.left()
    (made,) = life.bring()["instances"]
    assert made["state"] == "running"
    seen = life.look()
    assert seen["ready"] and seen["agent"]["hostname"] == life.name and seen["agent"]["dax"]
    assert not life.bring()["changed"]


def test_paused_it_stands_still_and_goes_on(life: Life) -> None:
    before = life.look()
    assert life.bring("paused")["changed"]
    seen = life.look()
    assert seen["state"] == "paused" and not seen["ready"]
    assert not life.bring("paused")["changed"]
    assert life.bring()["changed"]
    after = life.until("it goes on", lambda one: one["ready"])
    assert after["pid"] == before["pid"] and after["agent"]["uptime_seconds"] > before["agent"]["uptime_seconds"]


def test_cpus_and_memory_are_plugged_while_it_runs(life: Life) -> None:
    before = life.look()
    (made,) = life.bring(vcpus=2, memory="320MiB")["instances"]
    assert not made["restart_required"]
    grown = before["agent"]["memory_total_bytes"] + 100 * MIB
    after = life.until(
        "the guest uses them",
        lambda one: one["ready"] and one["agent"]["cpus"] == 2 and one["agent"]["memory_total_bytes"] > grown,
    )
    assert after["pid"] == before["pid"]
    assert not life.bring()["changed"]


def test_a_volume_and_a_network_come_and_go_while_it_runs(life: Life) -> None:
    before = life.look()
    (made,) = life.bring(volumes=[DATA, MORE], networks=[{"network": "life"}, {"network": "more"}])["instances"]
    assert not made["restart_required"]
    (address,) = set(life.look()["addresses"]) - set(before["addresses"])
    told = life.host.check_output(f"curl -s --max-time 60 http://{address}:1024/")
    assert json.loads(told)["hostname"] == life.name
    (made,) = life.bring(volumes=[DATA], networks=[{"network": "life"}])["instances"]
    assert not made["restart_required"]
    after = life.look()
    assert after["ready"] and after["pid"] == before["pid"]
    assert not life.bring()["changed"]


def test_what_cannot_be_changed_while_it_runs_is_said_and_done_when_allowed(life: Life) -> None:
    before = life.look()
    (made,) = life.bring(kernel_arguments=["agentfleet.test=1"])["instances"]
    assert made["restart_required"] and life.look()["pid"] == before["pid"]
    (made,) = life.bring(allow_restart=True)["instances"]
    assert not made["restart_required"]
    after = life.look()
    assert after["ready"] and after["pid"] != before["pid"]


def test_a_killed_vmm_comes_back_by_itself(life: Life) -> None:
    before = life.look()
    life.host.run(f"kill -9 {before['pid']}")
    life.until("it comes back", lambda one: one["ready"] and one["pid"] != before["pid"])
    assert not life.bring()["changed"]


def test_it_stops_by_its_power_button_and_starts_again(life: Life) -> None:
    assert life.bring("stopped")["changed"]
    assert life.look()["state"] == "stopped"
    assert_power_button(life.host, life.name)
    assert not life.bring("stopped")["changed"]
    assert life.bring()["changed"] and life.look()["ready"]


def test_a_restart_is_a_new_machine(life: Life) -> None:
    before = life.look()
    assert life.bring("restarted")["changed"]
    after = life.look()
    assert after["ready"] and after["pid"] != before["pid"]


def test_a_guest_that_panics_again_and_again_ends_in_a_clear_state(life: Life) -> None:
    life.bring("stopped")
    life.bring("present", kernel_arguments=["rdinit=/nonexistent"])
    unit = f"agentfleet-microvm@{life.name}"
    life.host.run(f"systemctl start --no-block {unit}")
    end = time.monotonic() + BACK_SECONDS
    while life.host.run(f"systemctl is-failed {unit}").stdout.strip() != "failed":
        assert time.monotonic() < end
        time.sleep(2)
    assert life.look()["state"] == "failed"
    assert life.bring(kernel_arguments=[])["changed"] and life.look()["ready"]


def test_a_clone_of_it_is_another_microvm(life: Life) -> None:
    for what in ("memory_max", "hotplug_slots"):  # what it cannot have for a snapshot, as a writable volume
        del life.wish[what]
    # Its RAM is in /run then, beside that of the others there.
    life.bring(volumes=[], snapshots=True, memory="192MiB", allow_restart=True)
    snapshot = {"name": f"{life.name}-warm", "microvm": life.name}
    assert life.lab.module("microvm_snapshot", snapshots=[snapshot])["snapshots"][0]["usable"]
    clone = {"name": f"{life.name}-two", "from_snapshot": snapshot["name"], "networks": [{"network": "life"}]}
    life.microvms.bring(clone, networks=NETWORKS)
    seen = life.microvms.look(life.name, clone["name"])
    assert all(one["ready"] and one["agent"]["hostname"] == name for name, one in seen.items())
    first, second = seen.values()
    for what in ("address", "cid", "pid"):
        assert first[what] != second[what]
    assert first["agent"]["machine_id"] != second["agent"]["machine_id"]
    assert second["private_bytes"] < first["private_bytes"]
    for one in (first, second):  # each at its own address
        told = life.host.check_output(f"curl -s --max-time 60 http://{one['address']}:1024/")
        assert json.loads(told)["hostname"] == one["name"]
    life.microvms.bring({"name": clone["name"]}, state="absent")
    assert_power_button(life.host, clone["name"])
    life.lab.module("microvm_snapshot", state="absent", snapshots=[snapshot])


def test_nothing_is_left(life: Life) -> None:
    assert life.lab.module("microvm", state="absent", delete_volumes=True, instances=[{"name": life.name}])["changed"]
    assert life.microvms.left() - BEFORE[life.name] == set()
    assert not life.lab.module("microvm", state="absent", instances=[{"name": life.name}])["changed"]
