# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo, in order: predicted on a fresh host, done, done again, and back after a reboot without Ansible.

The tests build on each other: each starts from the state that the one before left. The last run is one of plain Ansible,
as a user's; the others are accelerated, since plain ones take five times as long, which a slow machine does not have.
"""

from __future__ import annotations

import json
import re
import time
import typing as t

import jsonschema
import pytest

PREDICTED: list[str] = []
UNITS = [
    *(f"agentfleet-microvm@agent{number}" for number in (1, 2, 3, 4)),
    *(f"agentfleet-mooncake-store@agents-{tier}" for tier in ("dram", "cxl")),
]
BACK_SECONDS = 1800  # the host, then four guests in turn; alone on a slow machine that took 560


@pytest.fixture(scope="module", autouse=True)
def accelerated(lab: t.Any) -> None:
    """Run the playbooks with mitogen."""
    lab.accelerate()


def report(lab: t.Any) -> dict[str, t.Any]:
    """The last report, valid by its schema."""
    document = json.loads((lab.report_directory / "report.json").read_text())
    jsonschema.validate(document, json.loads((lab.root / "docs/report.schema.json").read_text()))
    return document


def test_a_check_run_on_a_fresh_host_changes_nothing(host: t.Any, lab: t.Any) -> None:
    before = lab.fingerprint(host)
    PREDICTED.extend(lab.succeed("site", "--check", "--diff").changed())
    assert PREDICTED and lab.fingerprint(host) ^ before == set()


def test_the_real_run_does_what_was_predicted_task_for_task(lab: t.Any) -> None:
    assert lab.succeed("site").changed() == PREDICTED


def test_the_report_says_what_was_asked_for(lab: t.Any) -> None:
    host = report(lab)["hosts"]["metal1"]
    assert [(r["type"], r["interleave_ways"], r["size_bytes"], r["state"]) for r in host["cxl"]["regions"]] == [
        ("ram", 2, 1 << 30, "committed")
    ]
    tiers = {node["id"]: node["tier"] for node in host["numa"]["nodes"]}
    cxl_nodes = [node for node in host["numa"]["nodes"] if node["size_bytes"] == 1 << 30 and not node["cpus"]]
    assert cxl_nodes and all(node["tier"] > tiers[0] for node in cxl_nodes)
    assert "vfio-pci" in {function["driver"] for function in host["vfio"]["functions"]}
    assert [row["vfs"] for row in host["sriov"]] == [2]
    running = [vm for vm in host["microvms"] if vm["state"] == "running"]
    assert len(running) == 4 and len({vm["image_digest"] for vm in running}) == 1
    assert all(0 < vm["shared_bytes"] < vm["pss_bytes"] + vm["shared_bytes"] for vm in running)


def test_the_pool_is_verified_with_its_bytes_on_the_cxl_node(lab: t.Any) -> None:
    document = report(lab)
    tiers = [tier for pool in document["pools"].values() for tier in pool["tiers"]]
    assert {tier["medium"] for tier in tiers} == {"dram", "cxl"} and all(tier["verified"] for tier in tiers)
    assert all(tier["put_bytes_per_second"] > 0 and tier["get_bytes_per_second"] > 0 for tier in tiers)
    cxl = next(tier for tier in tiers if tier["medium"] == "cxl")
    assert cxl["numa_node"] == 2 and cxl["pages_on_node"] > 0 and cxl["pages_elsewhere"] == 0


def test_the_page_needs_nothing_from_elsewhere(lab: t.Any) -> None:
    page = (lab.report_directory / "report.html").read_text()
    assert "<svg" in page and "metal1" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\((?!#)""", page)


def test_a_second_run_changes_nothing(lab: t.Any) -> None:
    assert lab.succeed("site").changed() == []


def test_all_is_back_after_a_reboot_without_ansible(host: t.Any, lab: t.Any) -> None:
    lab.hosts("restarted")
    end = time.monotonic() + BACK_SECONDS
    ready: list[bool] = []
    while ready != [True] * 4:
        states = host.run(f"systemctl is-active {' '.join(UNITS)}").stdout.split()
        assert time.monotonic() < end, (states, ready)
        if states == ["active"] * len(UNITS):
            lab.succeed("report")
            ready = [vm["ready"] for vm in report(lab)["hosts"]["metal1"]["microvms"]]
        else:
            time.sleep(5)  # looking costs the host what its guests need to boot
    test_the_report_says_what_was_asked_for(lab)
    test_the_pool_is_verified_with_its_bytes_on_the_cxl_node(lab)


def test_plain_ansible_changes_nothing_either(lab: t.Any) -> None:
    lab.accelerate(False)
    assert lab.succeed("site").changed() == []
