# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots and clones on a real hypervisor: warm, cheap, each itself, and what does not fit is refused.

The tests build on each other: each starts from the state that the one before left.
"""

from __future__ import annotations

import json
import time
import typing as t

import pytest

AWAKE = ("snap-parent",)
STORE = "/var/lib/agentfleet/snapshots"
ATTACHED = [{"network": "fleet"}]
WARM = {"name": "snap-warm", "microvm": "snap-parent"}
CLONES = [
    {
        "name": f"snap-clone{number}",
        "from_snapshot": "snap-warm",
        "networks": ATTACHED,
        "environment": {"NUMBER": number},
    }
    for number in (1, 2)
]
NAMES = ["snap-parent", "snap-clone1", "snap-clone2"]


@pytest.fixture(scope="module")
def parent(sixteen: t.Any) -> dict[str, t.Any]:
    """The declaration of the microVM that snapshots are made of."""
    return next(one for one in sixteen.instances if one["name"] == "snap-parent")


def test_a_snapshot_of_a_running_microvm_leaves_it_running(
    host: t.Any, lab: t.Any, microvms: t.Any, parent: t.Any
) -> None:
    before = microvms.look("snap-parent")["snap-parent"]
    result = lab.module("microvm_snapshot", snapshots=[WARM])
    assert result["changed"]
    (snapshot,) = result["snapshots"]
    assert snapshot["usable"] and snapshot["disk_bytes"] < snapshot["memory_bytes"]
    after = microvms.look("snap-parent")["snap-parent"]
    assert after["ready"] and after["pid"] == before["pid"]
    assert not lab.module("microvm_snapshot", snapshots=[WARM])["changed"]
    assert host.run(f"stat -c %a {STORE}").stdout.strip() == "700"


def test_clones_are_warm_and_cheap_and_each_is_itself(
    host: t.Any, microvms: t.Any, sixteen: t.Any, parent: t.Any
) -> None:
    microvms.bring(parent, *CLONES, networks=sixteen.networks)
    seen = microvms.look(*NAMES)
    everybody = [seen[name] for name in NAMES]
    assert all(one["ready"] for one in everybody)
    assert [one["agent"]["hostname"] for one in everybody] == NAMES
    for what in ("address", "cid"):
        assert len({one[what] for one in everybody}) == 3
    assert len({one["agent"]["machine_id"] for one in everybody}) == 3
    for one in everybody[1:]:
        assert one["agent"]["uptime_seconds"] > 0 and one["private_bytes"] < everybody[0]["private_bytes"]
        assert abs(one["agent"]["time"] - time.time()) < 300
        # The address answers, from the MAC of this microVM and of no other.
        url = f"http://{one['address']}:1024/"
        ask = f"from urllib.request import urlopen; print(urlopen('{url}', timeout=60).read().decode())"
        told = json.loads(host.run(f'python3 -c "{ask}"').stdout)
        assert told["hostname"] == one["name"]
    microvms.assert_differ(*NAMES)
    assert [microvms.inside(name, "echo $NUMBER") for name in NAMES[1:]] == ["1\n", "2\n"]
    neighbours = host.run("ip neigh show dev affleet").stdout.split()
    macs = [neighbours[number + 1] for number, word in enumerate(neighbours) if word == "lladdr"]
    assert len(macs) == len(set(macs)) >= 2
    assert not microvms.bring(parent, *CLONES, networks=sixteen.networks)["changed"]


def test_a_clone_whose_vmm_is_killed_starts_from_its_snapshot_again(host: t.Any, microvms: t.Any) -> None:
    before = microvms.look("snap-clone1")["snap-clone1"]
    host.check_output("kill -9 %s", str(before["pid"]))
    after = microvms.until(
        "it comes back", "snap-clone1", so=lambda one: one["ready"] and one["pid"] != before["pid"]
    )["snap-clone1"]  # fmt: skip
    assert after["agent"]["machine_id"] == before["agent"]["machine_id"]
    assert after["agent"]["hostname"] == "snap-clone1"


def test_setting_a_clone_back(lab: t.Any, microvms: t.Any) -> None:
    before = microvms.look("snap-clone2")["snap-clone2"]
    wish = [{"name": "snap-warm", "microvm": "snap-clone2"}]
    assert lab.module("microvm_snapshot", state="restored", snapshots=wish, timeout_seconds=600)["changed"]
    after = microvms.look("snap-clone2")["snap-clone2"]
    assert after["ready"] and after["pid"] != before["pid"]
    assert after["agent"]["uptime_seconds"] < before["agent"]["uptime_seconds"]


def test_what_does_not_fit_is_refused(host: t.Any, lab: t.Any, microvms: t.Any, sixteen: t.Any) -> None:
    in_use = lab.refused("microvm_snapshot", state="absent", snapshots=[WARM])
    assert "in use by snap-clone1, snap-clone2" in in_use
    other = {"name": "snap-clone3", "from_snapshot": "snap-warm", "networks": ATTACHED}
    manifest = f"{STORE}/snap-warm/manifest.json"
    host.check_output(f'cp -p {manifest} /root/manifest && sed -i \'s/"version": "/&0./\' {manifest}')
    assert "it was made with version '0." in microvms.refused(other, networks=sixteen.networks)
    host.check_output(f"cp -p /root/manifest {manifest} && rm /root/manifest")
    ram = f"{STORE}/snap-warm/ram"
    host.check_output(f"cp -p {ram} /root/ram && printf X | dd of={ram} bs=1 seek=1M conv=notrunc")
    assert "its file ram is damaged" in microvms.refused(other, networks=sixteen.networks)
    # In place and never shorter, since two VMMs map this file.
    host.check_output(f"dd if=/root/ram of={ram} bs=1M conv=notrunc && touch -r /root/ram {ram} && rm /root/ram")
    assert lab.module("microvm_snapshot", verify=True)["snapshots"][0]["usable"]
    assert all(one["ready"] and not one["restarts"] for one in microvms.look("snap-parent", "snap-clone2").values())
