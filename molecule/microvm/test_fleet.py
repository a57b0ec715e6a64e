# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sixteen microVMs from one image in one call: most go, one falls, a share falls, and nothing leaks.

The tests build on each other: each starts from the state that the one before left.
"""

from __future__ import annotations

import re
import typing as t

KEPT, GONE = 3, 7  # of the plain ones
# What the one with first-boot data has of it and of its environment, and what that has to be, however often it starts.
SEEN = 'stat -c %a:%u:%g /etc/given.conf && cat /etc/given.conf /etc/ran && echo "$KEPT_AS"'
GIVEN = "640:0:0\ngiven\ngiven\nit's kept\n"

UP: set[str] = set()


def test_sixteen_from_one_image_in_one_call(microvms: t.Any, sixteen: t.Any) -> None:
    made = sixteen.made["instances"]
    assert len(made) == 16 == len({one["name"] for one in made})
    assert {one["state"] for one in made} == {"running"} and len({one["image_digest"] for one in made}) == 1
    seen = microvms.look()
    assert sorted(seen) == sorted(one["name"] for one in made)
    assert all(one["ready"] and one["agent"]["hostname"] == name for name, one in seen.items())
    assert all(one["agent"]["dax"] for one in seen.values())
    addresses = [address for one in seen.values() for address in one["addresses"]]
    assert len(addresses) == len(set(addresses)) >= 15
    assert not microvms.bring(*sixteen.instances, networks=sixteen.networks)["changed"]


def test_the_plan_of_them_holds(lab: t.Any, sixteen: t.Any) -> None:
    """What the planner counts for each kind is at least what they take, and not absurdly more.

    Of an image a guest maps what it has read, which may be little.
    """
    played = lab.play("plan", microvm_instances=sixteen.instances)
    assert played.rc == 0, played.failures()
    (plan,) = [one.result["ansible_facts"]["plan_result"] for one in played.tasks if one.name == "Add it up"]
    assert plan["declared"] == 16 == plan["fitting"] and plan["holds"]
    compared = {one["what"]: (one["measured_bytes"], one["planned_bytes"]) for one in plan["comparison"]}
    assert len(compared) == 3 * len(sixteen.instances) and "guest RAM of 10 x fleet-{index:02d}" in compared
    for what, (measured, planned) in compared.items():
        assert 0 < measured <= 1.05 * planned, (what, compared)
        assert what.startswith("images") or planned <= 4 * measured, (what, compared)


def test_fewer_are_wanted_and_the_others_leave_nothing(microvms: t.Any, sixteen: t.Any) -> None:
    """All later tests have the fewer."""
    names = [f"fleet-{index:02d}" for index in range(KEPT + 1, KEPT + GONE + 1)]
    microvms.bring(*({"name": name} for name in names), state="absent")
    assert set(microvms.look()).isdisjoint(names)
    UP.update(microvms.left())
    assert not [line for line in UP if re.search("|".join(names), line)]
    sixteen.instances[0] = {**sixteen.instances[0], "count": KEPT}
    assert not microvms.bring(*sixteen.instances, networks=sixteen.networks)["changed"]


def test_first_boot_data_and_environment_are_the_guests(microvms: t.Any) -> None:
    assert microvms.inside("keeper", SEEN) == GIVEN
    assert microvms.look("keeper")["keeper"]["agent"]["first_boot_failed"] == ""


def test_a_first_start_that_fails_leaves_nothing(microvms: t.Any) -> None:
    """Neither volume nor share, nor the bridge that it would have been the first on."""
    bad = {
        "name": "fleet-bad",
        "image": "agent",
        "memory": "112MiB",
        "kernel_arguments": ["rdinit=/nonexistent"],
        "restart_policy": "never",
        "volumes": [{"name": "data", "size": "32MiB", "mount": "/data"}],
        "shares": [{"tag": "models", "source": "/srv/fleet-models"}],
        "networks": [{"network": "bad"}],
    }
    before = set(microvms.look())
    told = microvms.refused(bad, networks=[{"name": "bad", "prefix": "10.86.1.0/24", "bridge": "afbad"}])
    assert "microVM fleet-bad: the VMM ended" in told
    assert microvms.left() == UP
    assert set(microvms.look()) == before


def test_a_killed_vmm_comes_back_by_itself(host: t.Any, microvms: t.Any, sixteen: t.Any) -> None:
    before = microvms.look("fleet-01")["fleet-01"]
    host.check_output("kill -9 %s", str(before["pid"]))
    microvms.until("it comes back", "fleet-01", so=lambda one: one["ready"] and one["pid"] != before["pid"])
    assert not microvms.bring(*sixteen.instances, networks=sixteen.networks)["changed"]
    assert microvms.left() == UP


def test_a_virtiofsd_that_ends_takes_its_guest_along_and_synced_data_survive(
    host: t.Any, microvms: t.Any, sixteen: t.Any
) -> None:
    """What it knew of the guest's open files is gone with it, so that systemd starts the guest again, too.

    It does so also where somebody restarts the service, as needrestart does when a library was upgraded.
    """
    microvms.inside("keeper", "echo precious | tee /etc/kept > /data/kept && sync")
    for end in ("pkill -9 -f '[v]irtiofsd .*fleet-models'", "systemctl restart agentfleet-virtiofsd@keeper:models"):
        before = microvms.look("keeper")["keeper"]
        host.check_output(end)
        microvms.until("it comes back", "keeper", so=lambda one, was=before: one["ready"] and one["pid"] != was["pid"])
        kept = microvms.inside("keeper", "cat /mnt/models/model /data/kept /etc/kept")
        assert kept == "weights\nprecious\nprecious\n"
    assert microvms.inside("keeper", SEEN) == GIVEN  # nothing ran again
    assert not microvms.bring(*sixteen.instances, networks=sixteen.networks)["changed"]
    assert microvms.left() == UP


def test_file_systems_grow_with_their_volumes_while_it_runs(microvms: t.Any, sixteen: t.Any) -> None:
    """Also the one below the root. All later tests have the larger volumes."""
    keeper = next(one for one in sixteen.instances if one["name"] == "keeper")
    keeper["volumes"] = [{**volume, "size": "64MiB"} for volume in keeper["volumes"]]
    before = microvms.look("keeper")["keeper"]
    (made,) = microvms.bring(keeper, networks=sixteen.networks)["instances"]
    assert not made["restart_required"] and made["pid"] == before["pid"]
    sizes = microvms.inside("keeper", "df -m --output=size / /data | tail -n 2").split()  # they were below 32
    assert len(sizes) == 2 and all(40 < int(size) < 64 for size in sizes), sizes
    assert microvms.inside("keeper", "cat /data/kept /etc/kept") == "precious\nprecious\n"
