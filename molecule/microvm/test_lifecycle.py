# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a microVM, the same on every driver: ready, paused, changed while it runs, killed, stopped, gone.

On Cloud Hypervisor when AGENTFLEET_CLOUD_HYPERVISOR names its program on the controller, which the role then installs.
The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import json
import shlex
import time
import typing as t

import pytest

AWAKE: tuple[str, ...] = ()
MIB = 1 << 20
NETWORKS = [
    {"name": "life", "prefix": "10.87.0.0/24", "bridge": "aflife"},
    {"name": "more", "prefix": "10.88.0.0/24", "bridge": "afmore"},
]
DATA = {"name": "data", "size": "64MiB"}
MORE = {"name": "more", "size": "32MiB"}
GROWN = {**DATA, "size": "96MiB"}
DISK_BYTES, DISK_OPERATIONS, NETWORK_BYTES = 64 * MIB, 5000, 16 * MIB  # a second; far more than a guest of the lab does
RESOURCES = {"cpu_weight": 50, "memory_max": "1GiB", "tasks_max": 200}
BACK_SECONDS = 600
LADDER_SECONDS = 90  # of the unit, for all rungs together
# In a guest: sets disk to the device that has the volume.
FIND = 'for one in /sys/block/vd*; do [ "$(cat $one/serial)" != data ] || disk=${one##*/}; done; '
# On the host, with the code that it has for the units: what the VMM answers. Arguments: name, question, its arguments.
ASK = """
import json, os, sys
sys.path.insert(0, "/usr/local/lib/agentfleet/microvm")
from ansible_collections.agentfleet.metal.plugins.module_utils._cloud_hypervisor_api import Api
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp
run, question = f"/run/agentfleet/{sys.argv[1]}", sys.argv[2]
if os.path.exists(f"{run}/qmp"):
    with Qmp(f"{run}/qmp") as qmp:
        print(json.dumps(qmp.ask(question, **json.loads(sys.argv[3]))))
else:
    print(json.dumps(Api(f"{run}/api").get(question)))
"""


class Life:
    """One microVM of one driver on the lab's host.

    :param driver: name of the driver
    """

    def __init__(self, lab: t.Any, host: t.Any, microvms: t.Any, driver: str) -> None:
        self.lab, self.host, self.microvms = lab, host, microvms
        self.driver, self.name = driver, f"life-{driver.replace('_', '-')}"
        self.unit = f"agentfleet-microvm@{self.name}"
        network = {} if driver == "qemu" else {"network_bytes_per_second": f"{NETWORK_BYTES // MIB}MiB"}
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
            "rate_limits": {
                "disk_bytes_per_second": f"{DISK_BYTES // MIB}MiB",
                "disk_operations_per_second": DISK_OPERATIONS,
                **network,
            },
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

    def ask(self, question: str, **arguments: t.Any) -> t.Any:
        """What its VMM answers; arguments are of QMP alone."""
        words = ["python3", "-IS", "-c", ASK, self.name, question, json.dumps(arguments)]
        return json.loads(self.host.check_output(shlex.join(words)))

    def memory(self) -> int:
        """What the guest has of its memory as its VMM sees it, in bytes; with QEMU of what it was started with."""
        if self.driver == "qemu":
            return int(self.ask("query-balloon")["actual"])
        return int(self.ask("vm.info")["memory_actual_size"])

    def limits(self) -> list[t.Any]:
        """Bytes and operations a second that the VMM lets its volume have and, where it can limit one, its network."""
        if self.driver == "qemu":
            nodes = [one["inserted"]["node-name"] for one in self.ask("query-block") if one.get("inserted")]
            assert "limited-data" in nodes, nodes
            found = self.ask("qom-get", path="/objects/limits-data", property="limits")
            return [found["bps-total"], found["iops-total"]]
        config = self.ask("vm.info")["config"]
        (disk,) = (one["rate_limiter_config"] for one in config["disks"] if one["id"] == "disk-data")
        (network,) = config["net"]
        assert disk["bandwidth"]["refill_time"] == 1000
        return [disk["bandwidth"]["size"], disk["ops"]["size"], network["rate_limiter_config"]["bandwidth"]["size"]]


BEFORE: dict[str, set[str]] = {}


def assert_rung(host: t.Any, name: str, rung: str = "power_button") -> None:
    """What ended it the last time that it was stopped: by default the guest itself, with no later rung of the ladder."""
    journal = host.check_output(f"journalctl -u agentfleet-microvm@{name} -t microvm-unit -n 1 -o cat")
    assert journal == rung, journal


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


def test_its_devices_are_limited_by_its_vmm(life: Life) -> None:
    limits = [DISK_BYTES, DISK_OPERATIONS, NETWORK_BYTES]
    assert life.limits() == (limits[:2] if life.driver == "qemu" else limits)


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


def test_cpus_and_memory_are_taken_away_and_a_volume_grows_while_it_runs(life: Life) -> None:
    before = life.look()
    (made,) = life.bring(vcpus=1, memory="192MiB", volumes=[GROWN], resources=RESOURCES)["instances"]
    assert not made["restart_required"]
    shrunk = before["agent"]["memory_total_bytes"] - 100 * MIB
    after = life.until(
        "the guest has less",
        lambda one: one["ready"] and one["agent"]["cpus"] == 1 and one["agent"]["memory_total_bytes"] < shrunk,
    )
    assert after["pid"] == before["pid"]
    sectors = life.microvms.inside(life.name, FIND + "cat /sys/block/$disk/size")
    assert int(sectors) * 512 == 96 * MIB
    group = f"/sys/fs/cgroup$(systemctl show -P ControlGroup {life.unit})"
    told = life.host.check_output(f"cd {group} && cat cpu.weight memory.max pids.max")
    assert told.split() == ["50", str(1 << 30), "200"]
    assert not life.bring()["changed"]


def test_a_balloon_takes_and_gives_back_while_it_runs(life: Life) -> None:
    for balloon, left in (("32MiB", 160 * MIB), (None, 192 * MIB)):
        (made,) = life.bring(balloon=balloon)["instances"]
        assert not made["restart_required"] and life.memory() == left


def test_its_counters_and_its_console_are_told(life: Life) -> None:
    for command in (
        FIND + "dd if=/dev/zero of=/dev/$disk bs=1M count=1 oflag=direct",
        "timeout 2 bash -c '</dev/tcp/10.87.0.1/1024' || true",  # is not answered, but the host's address is asked for
        "echo said by a test >/dev/console",
    ):
        life.microvms.inside(life.name, command)
    life.host.check_output("journalctl --sync")
    asked = {"names": [life.name], "agent_timeout_seconds": 60, "console": True}
    (one,) = life.lab.module("microvm_info", **asked)["instances"]
    assert "said by a test" in one["console"]
    (disk,) = (counted for device, counted in one["counters"].items() if "disk-data" in device)
    assert disk["wr_bytes" if life.driver == "qemu" else "write_bytes"] >= MIB
    assert all(one["counters"]["net-life"][key] > 0 for key in ("rx_bytes", "tx_bytes"))


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
    assert_rung(life.host, life.name)
    assert not life.bring("stopped")["changed"]
    assert life.bring()["changed"] and life.look()["ready"]


def test_a_restart_is_a_new_machine(life: Life) -> None:
    before = life.look()
    assert life.bring("restarted")["changed"]
    after = life.look()
    assert after["ready"] and after["pid"] != before["pid"]


def test_a_vmm_that_stands_still_is_ended_by_systemd(life: Life) -> None:
    """It answers on no rung of the ladder; systemd, with its TERM, also lets it go on."""
    life.host.check_output(f"kill -STOP $(systemctl show -P MainPID {life.unit})")
    start = time.monotonic()
    life.host.check_output(f"systemctl stop {life.unit}")
    assert time.monotonic() - start < LADDER_SECONDS
    assert life.host.run(f"systemctl is-active {life.unit}").stdout.strip() != "active"
    assert_rung(life.host, life.name, "left to systemd")
    life.host.run(f"systemctl reset-failed {life.unit}")  # however it ended, it is as any that was stopped


def test_a_guest_that_panics_again_and_again_ends_in_a_clear_state(life: Life) -> None:
    life.bring("stopped")
    life.bring("present", kernel_arguments=["rdinit=/nonexistent"])
    life.host.run(f"systemctl start --no-block {life.unit}")
    end = time.monotonic() + BACK_SECONDS
    while life.host.run(f"systemctl is-failed {life.unit}").stdout.strip() != "failed":
        assert time.monotonic() < end
        time.sleep(2)
    assert life.look()["state"] == "failed"
    assert life.bring(kernel_arguments=[])["changed"] and life.look()["ready"]


def test_a_clone_of_it_is_another_microvm(life: Life) -> None:
    for what in ("memory_max", "hotplug_slots", "rate_limits"):
        del life.wish[what]  # the first two it cannot have for a snapshot, as a writable volume
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
    life.microvms.assert_differ(life.name, clone["name"])
    assert second["private_bytes"] < first["private_bytes"]
    for one in (first, second):  # each at its own address
        told = life.host.check_output(f"curl -s --max-time 60 http://{one['address']}:1024/")
        assert json.loads(told)["hostname"] == one["name"]
    life.microvms.bring({"name": clone["name"]}, state="absent")
    assert_rung(life.host, clone["name"])
    life.lab.module("microvm_snapshot", state="absent", snapshots=[snapshot])


def test_nothing_is_left(life: Life) -> None:
    assert life.lab.module("microvm", state="absent", delete_volumes=True, instances=[{"name": life.name}])["changed"]
    assert life.microvms.left() - BEFORE[life.name] == set()
    assert not life.lab.module("microvm", state="absent", instances=[{"name": life.name}])["changed"]
