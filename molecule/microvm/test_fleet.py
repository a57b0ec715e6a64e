# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sixteen microVMs from one image in one call: one falls, a share falls, the power is cut, and nothing leaks.

The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import re
import time
import typing as t

COUNT = 16
NETWORKS = [{"name": "fleet", "prefix": "10.86.0.0/24", "bridge": "affleet"}]
FLEET = {
    "name": "fleet-{index:02d}",
    "count": COUNT,
    "image": "agent",
    "memory": "112MiB",
    "networks": [{"network": "fleet"}],
}
KEEPER = {  # with a disk and a share, to see what survives
    "name": "keeper",
    "image": "agent",
    "memory": "128MiB",
    "volumes": [{"name": "data", "size": "32MiB", "mount": "/data"}],
    "shares": [{"tag": "models", "source": "/srv/fleet-models"}],
    "networks": [{"network": "fleet"}],
}
READY_SECONDS = 900

# What microVMs have on a host, counted before and after.
LEFT = r"""
pgrep -fl 'qemu-system|virtiofsd' | sed 's/^[0-9]* /process /'
ls /sys/class/net | sed 's/^/device /'
systemctl list-units --all --no-legend --plain 'agentfleet-microvm@*' 'agentfleet-virtiofsd@*' | awk '{print "unit", $1}'
find /sys/fs/cgroup -name 'agentfleet-*' -printf 'cgroup %p\n'
awk '/agentfleet/ {print "mount", $2}' /proc/mounts
find /run/agentfleet /var/lib/agentfleet/microvms /var/lib/agentfleet/volumes /var/lib/agentfleet/shares \
  -mindepth 1 2>/dev/null
"""
BEFORE: set[str] = set()


def left(host: t.Any) -> set[str]:
    """What microVMs have on the host now."""
    return set(host.run(LEFT).stdout.splitlines())


def fleet(lab: t.Any, *instances: t.Any, **arguments: t.Any) -> dict[str, t.Any]:
    """One call of the module."""
    return t.cast(
        "dict[str, t.Any]",
        lab.module(
            "microvm", instances=instances, networks=NETWORKS, memory_overcommit=2.0, parallel=1,
            ready_timeout_seconds=READY_SECONDS, **arguments,
        ),
    )  # fmt: skip


def look(lab: t.Any, *names: str) -> dict[str, dict[str, t.Any]]:
    """Name -> microVM; all when none is named."""
    wish: dict[str, t.Any] = {"names": names} if names else {}
    found = lab.module("microvm_info", agent_timeout_seconds=60, **wish)["instances"]
    return {one["name"]: one for one in found}


def all_ready(lab: t.Any, count: int) -> dict[str, dict[str, t.Any]]:
    """Wait, within bounds, until so many microVMs answer."""
    end = time.monotonic() + READY_SECONDS
    while True:
        seen = look(lab)
        if sum(one["ready"] for one in seen.values()) >= count:
            return seen
        assert time.monotonic() < end, {name: (one["state"], one["ready"]) for name, one in seen.items()}


def inside(host: t.Any, name: str, command: str) -> str:
    """Run a command in a microVM, over vsock."""
    done = host.run("/usr/local/lib/agentfleet/microvm-exec %s %s", name, command)
    assert done.rc == 0, done.stderr
    return str(done.stdout)


def test_sixteen_from_one_image_in_one_call(host: t.Any, lab: t.Any) -> None:
    BEFORE.update(left(host))
    made = fleet(lab, FLEET)["instances"]
    assert [one["name"] for one in made] == [f"fleet-{index:02d}" for index in range(1, COUNT + 1)]
    assert {one["state"] for one in made} == {"running"} and len({one["image_digest"] for one in made}) == 1
    seen = look(lab)
    assert len(seen) == COUNT and all(one["ready"] for one in seen.values())
    assert len({one["address"] for one in seen.values()}) == COUNT
    assert not fleet(lab, FLEET)["changed"]


def test_a_killed_vmm_comes_back_by_itself(host: t.Any, lab: t.Any) -> None:
    before = look(lab, "fleet-01")["fleet-01"]
    host.check_output("kill -9 %s", str(before["pid"]))
    seen = all_ready(lab, COUNT)
    assert seen["fleet-01"]["pid"] != before["pid"] and not fleet(lab, FLEET)["changed"]


def test_fewer_are_wanted_and_the_others_leave_nothing(host: t.Any, lab: t.Any) -> None:
    fleet(lab, *({"name": f"fleet-{index:02d}"} for index in range(4, COUNT + 1)), state="absent")
    assert sorted(look(lab)) == ["fleet-01", "fleet-02", "fleet-03"]
    assert not [line for line in left(host) - BEFORE if re.search(r"fleet-(0[4-9]|1\d)", line)]


def test_a_killed_virtiofsd_and_synced_data_survive(host: t.Any, lab: t.Any) -> None:
    host.check_output("mkdir -p /srv/fleet-models && echo weights > /srv/fleet-models/model")
    lab.role("virtiofsd")
    fleet(lab, KEEPER)
    assert inside(host, "keeper", "cat /mnt/models/model") == "weights\n"
    inside(host, "keeper", "echo precious > /data/kept && sync")
    host.check_output("pkill -9 -f '[v]irtiofsd .*fleet-models'")
    all_ready(lab, 4)
    end = time.monotonic() + READY_SECONDS
    while host.run("/usr/local/lib/agentfleet/microvm-exec keeper 'cat /mnt/models/model'").stdout != "weights\n":
        assert time.monotonic() < end, "the share did not come back"
        fleet(lab, KEEPER)  # what the declared state needs, a run restores
    assert inside(host, "keeper", "cat /data/kept") == "precious\n"


def test_a_power_cut_while_they_start_is_mended(host: t.Any, lab: t.Any) -> None:
    fleet(lab, FLEET | {"count": 3}, KEEPER, state="stopped")
    running = lab.start_module("microvm", instances=[FLEET | {"count": 3}, KEEPER], networks=NETWORKS, parallel=1)
    end = time.monotonic() + READY_SECONDS
    while not host.run("pgrep -f '[q]emu-system.*fleet-02'").stdout:
        assert running.poll() is None and time.monotonic() < end, "they started before the power was cut"
        time.sleep(0.5)
    lab.hosts("power_cut")
    assert lab.finish(running).rc != 0
    lab.hosts("started")
    fleet(lab, FLEET | {"count": 3}, KEEPER)
    all_ready(lab, 4)
    assert inside(host, "keeper", "cat /data/kept") == "precious\n"
    assert not fleet(lab, FLEET | {"count": 3}, KEEPER)["changed"]


def test_nothing_is_left(host: t.Any, lab: t.Any) -> None:
    fleet(lab, FLEET | {"count": 3}, KEEPER, state="absent", delete_volumes=True)
    assert left(host) - BEFORE == set()
