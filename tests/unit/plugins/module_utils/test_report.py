# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report: its document, its schema, its page and its few lines."""

from __future__ import annotations

import copy
import json
import re
import typing as t
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _report, _report_html

MIB, GIB = 1 << 20, 1 << 30
RUN = {"time": "2026-11-21T21:50:00Z", "collection_version": "0.1.0", "ansible_version": "2.21.5"}
METAL: dict[str, t.Any] = {
    "os": {"id": "debian", "version_id": "13", "architecture": "x86_64", "python": "3.13.5"},
    "kernel": {"release": "6.12.107", "cmdline": "ro intel_iommu=on", "modules": ["kvm"]},
    "packages": {"secret-agent": "1.0"},
    "kvm": {"present": True},
    "numa": {
        "nodes": [
            {"id": 0, "tier": 4, "cpus": [0, 1], "size_bytes": 2 * GIB, "free_bytes": GIB},
            {"id": 1, "tier": 22, "cpus": [], "size_bytes": GIB, "free_bytes": GIB},
            {"id": 2, "tier": 10, "cpus": [], "size_bytes": GIB, "free_bytes": GIB},
        ],
        "tiers": [{"tier": 4, "nodes": [0]}, {"tier": 10, "nodes": [2]}, {"tier": 22, "nodes": [1]}],
        "demotion": True,
    },
    "cxl": {
        "memdevs": [
            {"serial": "0x1", "ram_bytes": 512 * MIB, "pmem_bytes": 0, "host_bridge": "pci0000:0c"},
            {"serial": "0x2", "ram_bytes": 512 * MIB, "pmem_bytes": 0, "host_bridge": "pci0000:de"},
            {"serial": "0x3", "ram_bytes": 0, "pmem_bytes": GIB, "host_bridge": "pci0000:de"},
        ],
        "regions": [
            {
                "name": "region0",
                "type": "ram",
                "state": "committed",
                "size_bytes": GIB,
                "interleave_ways": 2,
                "interleave_granularity": 8192,
                "memdevs": ["0x2", "0x1"],
                "dax": ["dax0.0"],
            }
        ],
        "dax": [{"name": "dax0.0", "mode": "system-ram", "target_node": 1}],
    },
    "iommu": {"enabled": True, "kind": "intel", "groups": [{"id": 3, "functions": ["0000:00:03.0", "0000:00:09.0"]}]},
    "pci": {
        "functions": [
            {"address": "0000:00:03.0", "class": "0x010802", "driver": "vfio-pci", "vendor": "0x1b36", "device": "0x0010"},
            {"address": "0000:00:04.0", "driver": "igb", "sriov": {"totalvfs": 7, "numvfs": 2}},
            {"address": "0000:01:10.0", "driver": "igbvf", "physfn": "0000:00:04.0"},
            {"address": "0000:00:05.0", "driver": "", "sriov": {}},
        ]
    },
    "audit": [
        {
            "time": "2026-11-21T21:30:00Z",
            "module": "cxl_region",
            "steps": [{"verb": "create", "object": "<b>region</b>"}],
            "failed": "x" * 900,
        }
    ],
}  # fmt: skip
MICROVMS = [
    {
        "name": f"agent-{number}",
        "state": "running" if number else "failed",
        "image_digest": "ab" * 32,
        "ready": True,
        "pss_bytes": 70 * MIB,
        "shared_bytes": 30 * MIB if number else 0,
        "private_bytes": 60 * MIB if number else 0,
        "agent": {"token": "not for the report"},
    }
    for number in range(4)
]
POOLS = {
    "demo": {
        "engine": "mooncake",
        "tiers": [
            {
                "name": "cxl",
                "medium": "cxl",
                "numa_node": 1,
                "size_bytes": 4 * MIB,
                "put_bytes_per_second": 1878197,
                "get_bytes_per_second": 2303333,
                "verified": True,
                "pages_on_node": 1024,
                "pages_elsewhere": 0,
            }
        ],
    }
}


@pytest.fixture
def document() -> dict[str, t.Any]:
    host = {"metal": METAL, "microvms": MICROVMS, "pools": POOLS, "engine_version": "0.3.13.post1"}
    return _report.report({"metal1": copy.deepcopy(host)}, RUN)


def test_what_the_document_says(document: dict[str, t.Any]) -> None:
    host = document["hosts"]["metal1"]

    assert host["cxl"]["regions"][0]["numa_node"] == 1
    assert [function["address"] for function in host["vfio"]["functions"]] == ["0000:00:03.0"]
    assert host["sriov"] == [{"pf": "0000:00:04.0", "vfs": 2, "total_vfs": 7, "addresses": ["0000:01:10.0"]}]
    assert document["pools"]["demo"]["engine_version"] == "0.3.13.post1"
    assert document["pools"]["demo"]["tiers"][0]["host"] == "metal1"
    text = json.dumps(document)
    assert "secret-agent" not in text and "not for the report" not in text  # only what was picked


def test_the_schema(document: dict[str, t.Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = Path(__file__).resolve().parents[4] / "docs" / "report.schema.json"
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    validator.check_schema(validator.schema)

    validator.validate(document)
    bare = _report.report({"metal1": {"metal": METAL}}, RUN)
    validator.validate(bare)
    for broken in ("interleave_ways", "state"):
        wrong = copy.deepcopy(document)
        del wrong["hosts"]["metal1"]["cxl"]["regions"][0][broken]
        assert [error.message for error in validator.iter_errors(wrong)] == [f"'{broken}' is a required property"]


def test_a_pool_that_spans_hosts_is_one_pool() -> None:
    host = {"metal": METAL, "pools": POOLS}
    pools = _report.report({"metal1": host, "metal2": host}, RUN)["pools"]

    assert [tier["host"] for tier in pools["demo"]["tiers"]] == ["metal1", "metal2"]


def test_sharing_counts_the_one_copy_once() -> None:
    assert _report.sharing(MICROVMS[1:]) == (3 * 60 * MIB + 30 * MIB, 3 * 90 * MIB)
    other = [{**MICROVMS[1], "image_digest": "cd" * 32}]
    assert _report.sharing([*MICROVMS[1:], *other])[0] == 4 * 60 * MIB + 2 * 30 * MIB


def test_tiers_are_ranked_by_speed_and_not_by_the_kernels_numbers(document: dict[str, t.Any]) -> None:
    host = document["hosts"]["metal1"]
    assert _report.tier_rank(host) == {0: 1, 2: 2, 1: 3}
    picture = _report_html.topology(host)
    assert re.findall(r">(Node \d)<", picture) == ["Node 0", "Node 2", "Node 1"]
    assert "tier 3 of 3" in picture and "CXL devices in no region: 0x3 (1 GiB)" in picture


def test_summary(document: dict[str, t.Any]) -> None:
    assert _report.summary(document) == [
        "metal1: CXL ram x2 1 GiB committed as node 1, 1 function on vfio, 2 VFs, "
        "3 of 4 microVMs running on 1 image in 210 MiB (270 MiB without sharing)",
        "pool demo (mooncake): cxl 4 MiB on node 1 put 1.9 MB/s get 2.3 MB/s verified",
    ]
    document["pools"]["demo"]["tiers"][0].update(verified=False, problem="its store is not running")
    assert _report.summary(document)[1].endswith("NOT VERIFIED: its store is not running")


class Page(HTMLParser):
    """Counts what a page must not have, and checks that its elements are closed."""

    VOID = ("meta", "rect", "path", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {name}" for name, _value in attrs if name in ("src", "href", "onload")]
        if tag in ("script", "link", "iframe", "img"):
            self.outside.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes(document: dict[str, t.Any]) -> None:
    text = _report_html.page(document)
    page = Page()
    page.feed(text)
    page.close()

    assert page.open == [] and page.outside == []
    assert "url(" not in text and "http" not in text
    assert "&lt;b&gt;region&lt;/b&gt;" in text and "<b>region</b>" not in text
    assert "1,024 of 1,024 pages on node 1" in text
    assert "x" * 300 + " …" in text and "x" * 301 not in text


def test_a_host_without_anything(document: dict[str, t.Any]) -> None:
    metal = copy.deepcopy(METAL)
    metal["numa"] = {"nodes": [], "tiers": []}
    metal["cxl"] = {"memdevs": [], "regions": [], "dax": []}
    metal["iommu"], metal["pci"], metal["audit"] = {"enabled": False}, {"functions": []}, []
    bare = _report.report({"plain": {"metal": metal}}, RUN)

    text = _report_html.page(bare)
    assert "IOMMU off" in text and "What was changed" not in text and "KV-cache" not in text
    assert _report.summary(bare) == ["plain: 0 functions on vfio, 0 VFs"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (GIB, "1 GiB"), (5000 * GIB, "4.9 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert _report.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 B/s"), (1878197, "1.9 MB/s"), (2.5e11, "250 GB/s")])
def test_rates(count: float, text: str) -> None:
    assert _report.rate(count) == text
