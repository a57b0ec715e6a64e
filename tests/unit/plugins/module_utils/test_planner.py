# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The planner: sums that can be checked by hand, placement over DRAM and CXL nodes, and what is refused."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._planner import (
    IMAGE_REST,
    KERNEL_BYTES,
    TOLERANCE,
    VMM_BYTES,
    plan,
)

MIB, GIB = 1 << 20, 1 << 30
IMAGES = {"agent": "1GiB"}
AGENT = {"name": "agent", "image": "agent", "memory": "256MiB"}
REST = int(GIB * IMAGE_REST)


def node(number: int, size: int, cpus: t.Sequence[int] = (0,), movable: int = 0, **hugepages: int) -> dict[str, t.Any]:
    return {
        "id": number, "cpus": list(cpus), "size_bytes": size, "movable_bytes": movable,
        "hugepages": {name: {"total": count, "free": 0} for name, count in hugepages.items()},
    }  # fmt: skip


def facts(*nodes: dict[str, t.Any], disk: int = 100 * GIB) -> dict[str, t.Any]:
    return {"numa": {"nodes": list(nodes)}, "os": {"free_bytes": {"/var/lib": disk}}}


def lines(found: dict[str, t.Any], number: int = 0) -> dict[str, int]:
    return {one["what"]: one["bytes"] for one in found["instances"][number]["lines"]}


def test_every_line_of_one_microvm() -> None:
    found = plan(facts(node(0, 4 * GIB)), [{**AGENT, "shares": [{"tag": "a"}, {"tag": "b"}]}], IMAGES)
    assert lines(found) == {
        "guest RAM": 256 * MIB,
        "VMM (qemu)": VMM_BYTES["qemu"],
        "page tables": 2 * 8 * (256 + 1024) * 256,  # twice 8 bytes for each 4 KiB page
        "rest for its image": REST,
        "virtiofsd": 16 * MIB,
        "kernel and agent": KERNEL_BYTES,
        "page structs of its RAM": 4 * MIB,
        "page structs of its image": 16 * MIB,  # 16 MiB for a GiB: 1.6 %
    }
    one = found["instances"][0]
    assert one["bytes"] == (256 + 40 + 5 + 16) * MIB + REST
    assert one["usable_bytes"] == (256 - 48 - 4 - 16) * MIB


def test_images_of_data_are_mapped_like_the_roots() -> None:
    kind = {**AGENT, "memory": "512MiB", "count": 2, "data_images": [{"image": "model", "target": "/model"}]}
    found = plan(facts(node(0, 16 * GIB)), [kind], {**IMAGES, "model": "2GiB"})
    assert [(one["what"], one["bytes"]) for one in found["host"][1:]] == [
        ("image agent", GIB), ("image model", 2 * GIB),
    ]  # fmt: skip
    assert lines(found)["page structs of its image"] == 48 * MIB
    assert lines(found)["page tables"] == 2 * 8 * (512 + 3 * 1024) * 256


def test_an_image_is_counted_once_and_the_host_fills_to_the_byte() -> None:
    each = (256 + 40 + 5) * MIB + REST
    host = 512 * MIB + GIB
    room = plan(facts(node(0, host + 10 * each)), [{**AGENT, "count": 4}], IMAGES)
    assert (room["fits"], room["fitting"], room["more"]) == (True, 4, 6)
    less = plan(facts(node(0, host + 10 * each - 1)), [{**AGENT, "count": 4}], IMAGES)
    assert less["more"] == 5
    assert less["limit"] == "one more agent: no memory on node 0"


def test_declared_microvms_that_do_not_fit() -> None:
    found = plan(facts(node(0, 2 * GIB)), [{**AGENT, "count": 4}], IMAGES)
    assert (found["fits"], found["fitting"], found["declared"], found["more"]) == (False, 1, 4, 0)
    assert found["text"][0].startswith("1 of 4 declared microVMs fit. Then: one more agent")


def test_the_host_itself_may_not_fit() -> None:
    found = plan(facts(node(0, GIB)), [AGENT], IMAGES)
    assert (found["fitting"], found["limit"]) == (0, "image agent: no memory on node 0")


def test_cxl_takes_ram_and_images_and_leaves_page_tables_to_dram() -> None:
    dram, cxl = node(0, 2 * GIB), node(2, 8 * GIB, cpus=(), movable=8 * GIB)
    both = plan(facts(dram, cxl), [AGENT], IMAGES)
    alone = plan(facts(dram, cxl), [AGENT], IMAGES, {"placement": "cpu"})
    assert both["fitting"] + both["more"] == (10240 - 512 - 1024) * MIB // (301 * MIB + REST)
    assert alone["fitting"] + alone["more"] == 1
    assert [n["kind"] for n in both["nodes"]] == ["cpu", "slow"]
    # The unmovable part of each microVM is 45 MiB and the rest, so that DRAM is what runs out with CXL to spare.
    plenty = plan(facts(dram, node(2, 512 * GIB, cpus=(), movable=512 * GIB)), [AGENT], IMAGES)
    assert plenty["limit"] == "one more agent: no memory outside movable zones on nodes 0, 2"
    assert plenty["fitting"] + plenty["more"] <= (2 * GIB - 512 * MIB) // (45 * MIB + REST)


def test_ram_that_is_bound_to_a_node_goes_nowhere_else() -> None:
    bound = {**AGENT, "numa_node": 2, "count": 3}
    host = facts(node(0, 8 * GIB), node(2, GIB, cpus=(), movable=GIB))
    zones = {**AGENT, "memory": None, "memory_zones": [{"size": "256MiB", "numa_node": 2}], "count": 3}
    assert plan(host, [zones], IMAGES) == plan(host, [bound], IMAGES)
    found = plan(host, [bound], IMAGES)
    assert (found["fits"], found["more"]) == (True, 1)
    assert found["limit"] == "one more agent: no memory on node 2"


def test_hugepages_come_from_their_pool_and_shorten_page_tables() -> None:
    host = node(0, 4 * GIB, **{"2048kB": 256, "1048576kB": 0})
    huge = {**AGENT, "hugepages": "2MiB"}
    found = plan(facts(host), [huge], IMAGES, {"overcommit": 2.0})
    assert lines(found)["guest RAM"] == 256 * MIB
    assert lines(found)["page tables"] == 2 * 8 * (128 + 1024 * 256)
    assert (found["fitting"], found["more"]) == (1, 1)
    assert found["limit"] == "one more agent: no hugepages of 2MiB on node 0"
    assert found["nodes"][0]["size_bytes"] == 4 * GIB - 512 * MIB


def test_overcommit_spares_neither_a_booted_kernel_nor_pinned_memory() -> None:
    host = facts(node(0, 4 * GIB))
    assert lines(plan(host, [AGENT], IMAGES, {"overcommit": 2.0}))["guest RAM"] == 128 * MIB
    assert lines(plan(host, [AGENT], IMAGES, {"overcommit": 16}))["guest RAM"] == (48 + 4 + 16) * MIB
    pinned = plan(host, [{**AGENT, "devices": ["0000:01:00.0"]}], IMAGES, {"overcommit": 2.0})
    assert lines(pinned)["guest RAM"] == 256 * MIB
    cxl = node(1, 8 * GIB, cpus=(), movable=8 * GIB)
    assert plan(facts(node(0, 4 * GIB), cxl), [{**AGENT, "devices": ["0000:01:00.0"]}], IMAGES)["more"] < 12


def test_emulation_has_translated_code_and_no_second_dimension() -> None:
    found = lines(plan(facts(node(0, 4 * GIB)), [AGENT], IMAGES, {"accelerator": "tcg"}))
    assert found["page tables"] == 8 * (256 + 1024) * 256
    assert found["translated code"] == 32 * MIB


def test_policy_takes_measured_figures() -> None:
    host = facts(node(0, 4 * GIB))
    found = plan(host, [{**AGENT, "shares": [{"tag": "a"}]}], IMAGES, {"vmm": "10MiB", "virtiofsd": "3MiB"})
    assert (lines(found)["VMM (qemu)"], lines(found)["virtiofsd"]) == (10 * MIB, 3 * MIB)


def test_volumes_take_space_on_disk() -> None:
    wish = {**AGENT, "volumes": [{"name": "data", "size": "10GiB"}]}
    found = plan(facts(node(0, 64 * GIB), disk=25 * GIB), [wish], IMAGES)
    assert (found["fitting"], found["more"], found["disk_free_bytes"]) == (1, 1, 15 * GIB)
    assert found["limit"] == "one more agent: no space for its volumes below /var/lib"


def test_a_mixed_declaration_counts_each_image_once() -> None:
    wishes = [AGENT, {**AGENT, "name": "other", "image": "big", "memory": "512MiB"}, {**AGENT, "name": "third"}]
    found = plan(facts(node(0, 16 * GIB)), wishes, {"agent": "1GiB", "big": "2GiB"})
    assert {one["what"]: one["bytes"] for one in found["host"]} == {
        "reserve": 512 * MIB, "image agent": GIB, "image big": 2 * GIB,
    }  # fmt: skip


def test_clones_are_what_their_snapshot_is_and_share_its_pages() -> None:
    warm = {"name": "warm", "memory_bytes": 256 * MIB, "disk_bytes": 90 * MIB, "image_digest": "ab", "driver": "qemu"}
    wish = {"name": "worker-{index}", "from_snapshot": "warm", "count": 8}
    found = plan(facts(node(0, 16 * GIB)), [wish], {"ab": "1GiB"}, snapshots=[warm])
    assert [(one["what"], one["bytes"]) for one in found["host"]][1:] == [
        ("image ab", GIB),
        ("snapshot warm", 90 * MIB),
    ]
    assert lines(found)["guest RAM"] == 256 * MIB
    assert found["fits"]


def test_a_balloon_is_left_to_the_host() -> None:
    found = plan(facts(node(0, 4 * GIB)), [{**AGENT, "balloon": "64MiB"}], IMAGES)
    assert lines(found)["guest RAM"] == 192 * MIB


def running(name: str, ram: int, vmm: int, shared: int, pid: int = 7) -> dict[str, t.Any]:
    """What microvm_info says of a microVM."""
    return {"name": name, "pid": pid, "guest_ram_bytes": ram, "overhead_bytes": vmm, "shared_bytes": shared}


def test_the_plan_of_a_kind_is_compared_with_those_of_it_that_run() -> None:
    measured = [
        running("agent-1", 150 * MIB, 30 * MIB, 12 * MIB),
        running("agent-2", 160 * MIB, 31 * MIB, 14 * MIB),
        running("agent-3", 0, 0, 0, pid=0),
        # None of these is declared here.
        running("agent-4", 900 * MIB, 900 * MIB, GIB),
        running("agent-x", 900 * MIB, 900 * MIB, GIB),
    ]
    kinds = [{**AGENT, "name": "agent-{index}", "count": 3}, {**AGENT, "name": "agent-01"}]
    found = plan(facts(node(0, 4 * GIB)), kinds, IMAGES, measured=measured)
    of = "of 2 x agent-{index}"
    assert found["comparison"] == [
        {"what": f"guest RAM {of}", "planned_bytes": 512 * MIB, "measured_bytes": 310 * MIB, "holds": True},
        {"what": f"VMM {of}", "planned_bytes": 80 * MIB, "measured_bytes": 61 * MIB, "holds": True},
        {"what": f"images {of}, once", "planned_bytes": GIB, "measured_bytes": 14 * MIB, "holds": True},
    ]
    assert found["holds"] is True
    assert f"measured        61.0 MiB  VMM {of}; planned 80.0 MiB" in found["text"]
    assert "holds" not in plan(facts(node(0, 4 * GIB)), kinds, IMAGES)


@pytest.mark.parametrize(
    ("taken", "exceeded"),
    [
        ([(128, 42, 100)], []),  # the VMM by 5 %
        ([(128, 43, 100)], ["VMM"]),
        ([(160, 40, 100), (90, 40, 100)], []),  # overcommit is about the sum
        ([(160, 40, 100), (120, 40, 100)], ["guest RAM"]),
        ([(100, 40, 1100)], ["images"]),
    ],
)
def test_a_plan_that_does_not_hold_says_where(taken: list[tuple[int, int, int]], exceeded: list[str]) -> None:
    measured = [running(f"a{number + 1:02d}", *(size * MIB for size in sizes)) for number, sizes in enumerate(taken)]
    kind = {**AGENT, "name": "a{index:02d}", "count": 4}
    found = plan(facts(node(0, 4 * GIB)), [kind], IMAGES, {"overcommit": 2.0}, measured)
    assert [one["what"].partition(" of ")[0] for one in found["comparison"] if not one["holds"]] == exceeded
    assert found["holds"] is not bool(exceeded)
    assert sum("MORE THAN PLANNED" in text for text in found["text"]) == len(exceeded)


def test_an_image_costs_each_further_guest_what_the_benchmark_measured() -> None:
    """Page structs in the guest, page tables and the rest on the host."""
    result = (Path(__file__).resolve().parents[4] / "benchmarks/results/density.txt").read_text(encoding="utf-8")
    (percent,) = re.findall(r"(\d+\.\d+) % of its size with pmem", result)
    small, large = (
        sum(one["bytes"] for one in plan(facts(node(0, 8 * GIB)), [AGENT], images)["instances"][0]["lines"])
        for images in (IMAGES, {"agent": "2GiB"})
    )
    measured = GIB * float(percent) / 100
    assert measured <= (large - small) * (1 + TOLERANCE) <= 2 * measured


BAD: list[tuple[str, dict[str, t.Any], str, str]] = [
    ("no instances", {"instances": []}, "instances", "no list of microVMs"),
    ("an instance that is a word", {"instances": ["agent"]}, "instances[0]", "not a dictionary"),
    ("a bad name", {"instances": [{**AGENT, "name": "Agent_1"}]}, "instances[0].name", "not a name"),
    ("an unknown driver", {"instances": [{**AGENT, "driver": "xen"}]}, "instances[0].driver", "unknown driver"),
    ("no microVM at all", {"instances": [{**AGENT, "count": 0}]}, "instances[0].count", "not a number of microVMs"),
    ("a truth as number", {"instances": [{**AGENT, "count": True}]}, "instances[0].count", "not a number of microVMs"),
    ("a decimal unit", {"instances": [{**AGENT, "memory": "256MB"}]}, "instances[0].memory", "not a size"),
    ("an image of unknown size", {"instances": [{**AGENT, "image": "x"}]}, "instances[0].image", "size is not known"),
    ("an image that eats its guest", {"images": {"agent": "16GiB"}}, "instances[0].memory", "take 308 MiB of it"),
    ("half a hugepage", {"instances": [{**AGENT, "hugepages": "1GiB"}]}, "instances[0].memory", "not a multiple of"),
    (
        "a node that is not there",
        {"instances": [{**AGENT, "memory": None, "memory_zones": [{"size": "256MiB", "numa_node": 7}]}]},
        "instances[0].memory_zones[0].numa_node",
        "no such node",
    ),
    (
        "memory said twice",
        {"instances": [{**AGENT, "memory_zones": [{"size": "128MiB"}]}]},
        "instances[0].memory",
        "say it already",
    ),
    (
        "a node for all of it that is not there",
        {"instances": [{**AGENT, "numa_node": 7}]},
        "instances[0].numa_node",
        "no such",
    ),
    (
        "an unknown snapshot",
        {"instances": [{"name": "a", "from_snapshot": "x"}]},
        "instances[0].from_snapshot",
        "nothing is known",
    ),
    (
        "a balloon that leaves nothing",
        {"instances": [{**AGENT, "balloon": "200MiB"}]},
        "instances[0].memory",
        "take 68 MiB",
    ),
    (
        "a volume without a size",
        {"instances": [{**AGENT, "volumes": [{"name": "data"}]}]},
        "instances[0].volumes[0].size",
        "not a size",
    ),
    ("an image size that is none", {"images": {"agent": -1}}, "images.agent", "not a size"),
    ("images as a list", {"images": []}, "images", "not what is expected"),
    ("facts of nothing", {"facts": {}}, "facts", "not what is expected"),
    ("a host without memory", {"facts": facts()}, "facts.numa.nodes", "no node has memory"),
    ("an unknown policy", {"policy": {"ksm": True}}, "policy.ksm", "not a part of the policy"),
    ("less than no overcommit", {"policy": {"overcommit": 0.5}}, "policy.overcommit", "not a number from 1 to 16"),
    ("a wordy overcommit", {"policy": {"overcommit": "2"}}, "policy.overcommit", "not a number from 1 to 16"),
    ("an unknown placement", {"policy": {"placement": "cxl"}}, "policy.placement", "not known"),
    ("an unknown accelerator", {"policy": {"accelerator": "hvf"}}, "policy.accelerator", "not known"),
    ("a reserve without a unit that is known", {"policy": {"reserve": "1G"}}, "policy.reserve", "not a size"),
]


@pytest.mark.parametrize(("change", "option", "problem"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_refused(change: dict[str, t.Any], option: str, problem: str) -> None:
    good: dict[str, t.Any] = {"facts": facts(node(0, 4 * GIB)), "instances": [AGENT], "images": IMAGES}
    with pytest.raises(Refused) as refused:
        plan(**{**good, **change})
    assert refused.value.option == option
    assert problem in refused.value.problem
    assert refused.value.remedy
