# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host loses its power while microVMs start and while one is being saved; in the end nothing of any is left.

The tests build on each other: each starts from the state that the one before left, and they come after all others.
"""

from __future__ import annotations

import subprocess
import time
import typing as t

import pytest

STORE = "/var/lib/agentfleet/snapshots"
CUT = [{"name": "snap-cut", "microvm": "snap-parent"}]
WAIT_SECONDS = 600
STOPPED = ["fleet-01", "fleet-02", "fleet-03"]


@pytest.fixture(scope="module")
def declared(microvms: t.Any, sixteen: t.Any) -> list[dict[str, t.Any]]:
    """Three plain microVMs, the one with a disk and a share, and the one that is saved."""
    plain, *others = sixteen.instances
    return [{**plain, "count": len(STOPPED)}, *(one for one in others if one["name"] in ("keeper", "snap-parent"))]


def wait(host: t.Any, what: str, running: subprocess.Popen[str]) -> None:
    """Wait until a command succeeds on the host, before a call has ended."""
    end = time.monotonic() + WAIT_SECONDS
    while host.run(what).rc != 0:
        assert running.poll() is None and time.monotonic() < end, f"the call ended before: {what}"
        time.sleep(0.2)


def test_a_power_cut_while_they_start_is_mended(
    host: t.Any, lab: t.Any, microvms: t.Any, sixteen: t.Any, declared: t.Any
) -> None:
    before = microvms.left()
    microvms.bring(declared[0], networks=sixteen.networks, state="stopped")
    running = microvms.start(*declared, networks=sixteen.networks)
    wait(host, "pgrep -f '[q]emu-system.*fleet-02'", running)
    microvms.inside("keeper", "echo last | tee /etc/last > /data/last && sync")
    assert running.poll() is None, "they started before the power was cut"
    lab.hosts("power_cut")
    assert lab.finish(running).rc != 0
    lab.hosts("started")
    # What was declared running comes back without Ansible; the call that was cut off, when it is made again.
    microvms.until("they come back", *sorted(set(microvms.look()) - set(STOPPED)))
    microvms.bring(*declared, networks=sixteen.networks)
    assert microvms.inside("keeper", "cat /data/last /etc/last /mnt/models/model") == "last\nlast\nweights\n"
    assert not microvms.bring(*declared, networks=sixteen.networks)["changed"]
    assert microvms.left() == before


def test_a_power_cut_during_a_snapshot_leaves_nothing_of_it(host: t.Any, lab: t.Any, microvms: t.Any) -> None:
    microvms.bring(*({"name": name} for name in STOPPED), state="absent")
    before = microvms.left()
    names = sorted(microvms.look())
    running = lab.start_module("microvm_snapshot", snapshots=CUT)
    wait(host, f"test -e {STORE}/.new-snap-cut", running)
    lab.hosts("power_cut")
    assert lab.finish(running).rc != 0
    lab.hosts("started")
    microvms.until("they come back", *names)
    assert microvms.left() == before
    assert lab.module("microvm_snapshot", snapshots=CUT)["changed"]


def test_nothing_is_left(host: t.Any, lab: t.Any, microvms: t.Any, sixteen: t.Any) -> None:
    gone = [{"name": name} for name in microvms.look()]
    microvms.bring(*gone, state="absent", delete_volumes=True)
    snapshots = lab.module("microvm_snapshot")["snapshots"]
    lab.module("microvm_snapshot", state="absent", snapshots=[{"name": one["name"]} for one in snapshots])
    assert microvms.left() == sixteen.before
