# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sixteen microVMs of one image that all tests of this scenario share, brought up by one call.

A boot is what costs on an emulated host, so each is used for as much as it can show: some are plain, one has a disk and a
share, one can be snapshotted, four are of two tenants on two networks. Whoever ends one or removes one comes after those
who need it; the files run in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAM = "AGENTFLEET_CLOUD_HYPERVISOR"
OUTSIDE = "10.0.2.2"  # the machine that the lab runs on, as its emulated hosts see it
SERVICE = 3128  # what the host offers to the guests of one network
PLAIN = [f"fleet-{index:02d}" for index in range(1, 11)]
FLEET = {
    "name": "fleet-{index:02d}",
    "count": len(PLAIN),
    "image": "agent",
    "memory": "112MiB",
    "thp": True,  # a guest boots with 2000 exits for pages instead of 30000
    "networks": [{"network": "fleet"}],
}
KEEPER = {  # with a disk, a root on another one, a share and first-boot data, to see what survives
    "name": "keeper",
    "image": "agent",
    "memory": "128MiB",
    "environment": {"KEPT_AS": "it's kept"},
    "user_data": {
        "files": [{"path": "/etc/given.conf", "content": "given\n", "mode": "0640"}],
        "run": ["cat /etc/given.conf >>/etc/ran"],
    },
    "volumes": [
        {"name": "root", "size": "32MiB", "writable_layer": True},
        {"name": "data", "size": "32MiB", "mount": "/data"},
    ],
    "shares": [{"tag": "models", "source": "/srv/fleet-models"}],
    "networks": [{"network": "fleet"}],
}
PARENT = {
    "name": "snap-parent",
    "image": "agent",
    "memory": "128MiB",
    "snapshots": True,
    "networks": [{"network": "fleet"}],
}
TENANTS = {"net-blue1": "blue", "net-blue2": "blue", "net-red1": "red", "net-alone": "red"}
ATTACHED = {"net-blue1": ["net-one"], "net-blue2": ["net-one"], "net-red1": ["net-one", "net-two"], "net-alone": []}
OF_TENANTS = [
    {
        "name": name,
        "image": "agent",
        "memory": "128MiB",
        "thp": True,
        "tenant": tenant,
        "networks": [{"network": network} for network in ATTACHED[name]],
    }
    for name, tenant in TENANTS.items()
]
NAMES = [*PLAIN, "keeper", "snap-parent", *TENANTS]


@dataclass
class Sixteen:
    """The sixteen microVMs, and what the call that made them said.

    :param networks: the networks of each call
    :param before: what microVMs had left on the host before the first of them came
    """

    instances: list[dict[str, t.Any]]
    networks: list[dict[str, t.Any]]
    before: set[str]
    made: dict[str, t.Any] = field(default_factory=dict)


def networks(first_port: int, **egress: t.Any) -> list[dict[str, t.Any]]:
    """The networks, with what may leave one of them."""
    allowed = [{"prefix": f"{OUTSIDE}/32", "protocol": "tcp", "ports": [str(first_port)]}]
    return [
        {"name": "fleet", "prefix": "10.86.0.0/24", "bridge": "affleet"},
        {
            "name": "net-one",
            "bridge": "afnet1",
            "prefix": "10.90.1.0/24",
            "prefix6": "fd00:90:1::/64",
            "host_services": [{"port": SERVICE}],
            **(egress or {"egress": "nat", "egress_allow": allowed}),
        },
        {"name": "net-two", "bridge": "afnet2", "prefix": "10.90.2.0/24"},
    ]


@pytest.fixture(scope="session")
def sixteen(lab: t.Any, host: t.Any, microvms: t.Any) -> Sixteen:
    """All of them, running."""
    memory = lab.directory / "before.json"  # a lab that is kept between two runs of tests has them already
    if not host.run("ls /var/lib/agentfleet/microvms").stdout.strip():
        memory.write_text(json.dumps(sorted(microvms.left())))
    host.check_output("mkdir -p /srv/fleet-models && echo weights > /srv/fleet-models/model")
    # As the role kernel has it on hosts of microVMs: huge pages for guests that ask, and not for each VMM's own heap.
    host.check_output("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    found = Sixteen([FLEET, KEEPER, PARENT, *OF_TENANTS], networks(lab.first_port), set(json.loads(memory.read_text())))
    found.made = microvms.bring(*found.instances, networks=found.networks)
    return found


@pytest.fixture(scope="module", autouse=True)
def who_is_not_needed_stands_still(request: t.Any, lab: t.Any, host: t.Any, microvms: t.Any) -> None:
    """Of those that are there, a module's ``AWAKE`` run, all where it has none; the others are paused.

    On an emulated host each idle guest costs time, and its emulation faults the rarer the fewer run (docs/lab.md).
    """
    awake = getattr(request.module, "AWAKE", NAMES)
    there = host.run("ls /var/lib/agentfleet/microvms").stdout.split()
    plain: dict[str, t.Any] = {**FLEET, "count": sum(name in PLAIN for name in there)}
    states: dict[str, list[dict[str, t.Any]]] = {"paused": [], "running": []}
    for one in [plain, KEEPER, PARENT, *OF_TENANTS]:
        if one.get("count", one["name"] in there):
            states["running" if one["name"].format(index=1) in awake else "paused"].append(one)
    for state, instances in states.items():
        if instances:
            microvms.bring(*instances, networks=networks(lab.first_port), state=state)


def install(lab: t.Any, program: str) -> None:
    """Bring a program of the controller to the host, by the role."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    version = re.search(r"v(\d+\.\d+(?:\.\d+)?)", told)
    assert version, told
    lab.role(
        "cloud_hypervisor",
        cloud_hypervisor_version=version.group(1),
        cloud_hypervisor_file=program,
        cloud_hypervisor_sha256=hashlib.sha256(Path(program).read_bytes()).hexdigest(),
    )


@pytest.fixture(scope="module", params=["qemu", "cloud_hypervisor"])
def driver(request: t.Any, lab: t.Any) -> str:
    """Each driver that the tests can have, ready on the host."""
    program = os.environ.get(PROGRAM)
    if request.param == "cloud_hypervisor":
        if not program:
            pytest.skip(f"{PROGRAM} names no program: Cloud Hypervisor is in no package registry of the lab")
        install(lab, program)
    return str(request.param)
