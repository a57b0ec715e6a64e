# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots and clones on real hypervisors: warm, cheap, each itself, and nothing left by a power cut.

The tests build on each other: each starts from the state that the one before left, and the last leaves nothing.
"""

from __future__ import annotations

import json
import time
import typing as t

STORE = "/var/lib/agentfleet/snapshots"
NETWORKS = [{"name": "snap", "prefix": "10.89.0.0/24", "bridge": "afsnap"}]
ATTACHED = [{"network": "snap"}]
PARENT = {"name": "snap-parent", "image": "agent", "memory": "192MiB", "snapshots": True, "networks": ATTACHED}
CLONES = [
    {
        "name": f"snap-clone{number}",
        "from_snapshot": "snap-warm",
        "networks": ATTACHED,
        "environment": {"NUMBER": number},
    }
    for number in (1, 2)
]
WARM = {"name": "snap-warm", "microvm": "snap-parent"}
BACK_SECONDS = 600


def refused(lab: t.Any, module: str, **arguments: t.Any) -> str:
    """The message of a call that must not succeed."""
    played = lab.finish(lab.start_module(module, **arguments))
    assert played.rc != 0
    return str(played.failures())


def microvm(lab: t.Any, *instances: t.Any, **arguments: t.Any) -> dict[str, t.Any]:
    return lab.module(
        "microvm",
        instances=instances,
        networks=NETWORKS,
        ready_timeout_seconds=600,
        memory_overcommit=2.0,
        **arguments,
    )


def info(lab: t.Any, *names: str) -> list[dict[str, t.Any]]:
    found = lab.module("microvm_info", names=names, agent_timeout_seconds=60)["instances"]
    assert all(one["ready"] for one in found), found
    return t.cast("list[dict[str, t.Any]]", found)


def leaks(host: t.Any) -> set[str]:
    """What microVMs have on a host: processes, taps, units, cgroups, mounts, files."""
    script = (
        "pgrep -fl 'qemu-system|virtiofsd' | sed 's/^[0-9]* /process /'; "
        "ls /sys/class/net | sed -n 's/^\\(af.*\\)/device \\1/p'; "
        "systemctl list-units --all --no-legend --plain 'agentfleet-microvm@*' | cut -d' ' -f1; "
        "find /sys/fs/cgroup -name 'agentfleet-microvm@*'; grep agentfleet /proc/mounts; "
        "find /run/agentfleet /var/lib/agentfleet/snapshots /var/lib/agentfleet/microvms 2>/dev/null"
    )
    return {line for line in host.run(script).stdout.splitlines() if "snap" in line or line.startswith("device")}


BEFORE: set[str] = set()


def test_a_snapshot_of_a_running_microvm_leaves_it_running(host: t.Any, lab: t.Any) -> None:
    BEFORE.update(leaks(host))
    (started,) = microvm(lab, PARENT)["instances"]
    result = lab.module("microvm_snapshot", snapshots=[WARM])
    assert result["changed"]
    (snapshot,) = result["snapshots"]
    assert snapshot["usable"] and snapshot["disk_bytes"] < snapshot["memory_bytes"]
    (parent,) = info(lab, "snap-parent")
    assert parent["pid"] == started["pid"]
    assert not lab.module("microvm_snapshot", snapshots=[WARM])["changed"]
    assert host.run(f"stat -c %a {STORE}").stdout.strip() == "700"


def test_clones_are_warm_and_cheap_and_each_is_itself(host: t.Any, lab: t.Any) -> None:
    microvm(lab, PARENT, *CLONES)
    parent, *clones = info(lab, "snap-parent", "snap-clone1", "snap-clone2")
    everybody = [parent, *clones]
    assert [one["agent"]["hostname"] for one in everybody] == [one["name"] for one in everybody]
    for what in ("address", "cid"):
        assert len({one[what] for one in everybody}) == 3
    assert len({one["agent"]["machine_id"] for one in everybody}) == 3
    for one in clones:
        assert one["agent"]["uptime_seconds"] > 0 and one["private_bytes"] < parent["private_bytes"]
        assert abs(one["agent"]["time"] - time.time()) < 300
        # The address answers, from the MAC of this microVM and of no other.
        url = f"http://{one['address']}:1024/"
        ask = f"from urllib.request import urlopen; print(urlopen('{url}', timeout=60).read().decode())"
        told = json.loads(host.run(f'python3 -c "{ask}"').stdout)
        assert told["hostname"] == one["name"]
    neighbours = host.run("ip neigh show dev afsnap").stdout.split()
    macs = [neighbours[number + 1] for number, word in enumerate(neighbours) if word == "lladdr"]
    assert len(macs) == len(set(macs)) >= 2
    assert not microvm(lab, PARENT, *CLONES)["changed"]


def test_a_clone_whose_vmm_is_killed_starts_from_its_snapshot_again(host: t.Any, lab: t.Any) -> None:
    (before,) = info(lab, "snap-clone1")
    host.run(f"kill -9 {before['pid']}")
    end = time.monotonic() + BACK_SECONDS
    while True:
        (after,) = lab.module("microvm_info", names=["snap-clone1"], agent_timeout_seconds=30)["instances"]
        if after["ready"] and after["pid"] != before["pid"]:
            break
        assert time.monotonic() < end, after
    assert after["agent"]["machine_id"] == before["agent"]["machine_id"]
    assert after["agent"]["hostname"] == "snap-clone1"


def test_setting_a_clone_back(lab: t.Any) -> None:
    (before,) = info(lab, "snap-clone2")
    wish = [{"name": "snap-warm", "microvm": "snap-clone2"}]
    assert lab.module("microvm_snapshot", state="restored", snapshots=wish, timeout_seconds=600)["changed"]
    (after,) = info(lab, "snap-clone2")
    assert after["pid"] != before["pid"] and after["agent"]["uptime_seconds"] < before["agent"]["uptime_seconds"]


def test_what_does_not_fit_is_refused(host: t.Any, lab: t.Any) -> None:
    in_use = refused(lab, "microvm_snapshot", state="absent", snapshots=[WARM])
    assert "in use by snap-clone1, snap-clone2" in in_use
    manifest = f"{STORE}/snap-warm/manifest.json"
    host.run(f'cp -p {manifest} /root/manifest && sed -i \'s/"version": "/&0./\' {manifest}')
    other = {"name": "snap-clone3", "from_snapshot": "snap-warm", "networks": ATTACHED}
    why = refused(lab, "microvm", instances=[other], networks=NETWORKS)
    assert "it was made with version '0." in why
    host.run(f"cp -p /root/manifest {manifest} && rm /root/manifest")
    host.run(
        f"cp -p {STORE}/snap-warm/ram /root/ram && printf X | dd of={STORE}/snap-warm/ram bs=1 seek=1M conv=notrunc"
    )
    why = refused(lab, "microvm", instances=[other], networks=NETWORKS)
    assert "its file ram is damaged" in why
    # In place, since two VMMs map this file.
    host.run(f"cat /root/ram >{STORE}/snap-warm/ram && touch -r /root/ram {STORE}/snap-warm/ram && rm /root/ram")
    assert lab.module("microvm_snapshot", verify=True)["snapshots"][0]["usable"]


def test_a_power_cut_during_a_snapshot_leaves_nothing_of_it(host: t.Any, lab: t.Any) -> None:
    wish = [{"name": "snap-cut", "microvm": "snap-parent"}]
    running = lab.start_module("microvm_snapshot", snapshots=wish)
    end = time.monotonic() + 300
    while not host.file(f"{STORE}/.new-snap-cut").exists:
        assert running.poll() is None and time.monotonic() < end, "the call ended before the power was cut"
        time.sleep(0.1)
    lab.hosts("power_cut")
    assert lab.finish(running).rc != 0
    lab.hosts("started")
    host.run("systemctl is-system-running --wait")
    assert host.run(f"ls -A {STORE}").stdout.split() == ["snap-warm"]
    end = time.monotonic() + BACK_SECONDS
    names = ["snap-parent", "snap-clone1", "snap-clone2"]
    while not all(
        one["ready"] for one in lab.module("microvm_info", names=names, agent_timeout_seconds=60)["instances"]
    ):
        assert time.monotonic() < end
    assert [one["agent"]["hostname"] for one in info(lab, *names)] == names
    assert lab.module("microvm_snapshot", snapshots=wish)["changed"]


def test_nothing_is_left(host: t.Any, lab: t.Any) -> None:
    gone = [{"name": one["name"]} for one in (PARENT, *CLONES)]
    lab.module("microvm", state="absent", instances=gone)
    lab.module("microvm_snapshot", state="absent", snapshots=[WARM, {"name": "snap-cut"}])
    assert leaks(host) - BEFORE == set()
    assert not host.file(STORE).exists
