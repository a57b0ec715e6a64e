# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the kernel says a tier's memory is. The texts are what a host with an emulated CXL region showed."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _mooncake
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

NUMA_MAPS = r"""55d0c0a4e000 default file=/usr/bin/python3.13 mapped=512 active=0 N0=512 kernelpagesize_kB=4
7fa04019f000 bind:2 file=/memfd:agentfleet-a-cxl\040(deleted) dirty=256 mapmax=2 N2=256 kernelpagesize_kB=4
7fa04056d000 bind:0 file=/memfd:agentfleet-a-cxl2\040(deleted) dirty=1 N0=1 kernelpagesize_kB=4
7fa04656d000 bind:2 file=/memfd:agentfleet-a-cxl\040(deleted) dirty=256 mapped=1024 N0=24 N2=1000 kernelpagesize_kB=4
"""
MAPS = """\
55d0c0a4e000-55d0c0a4f000 r--p 00000000 08:01 14 /usr/bin/python3.13
7fa04019f000-7fa04059f000 rw-s 00000000 00:01 14                         /memfd:agentfleet-a-cxl (deleted)
"""


def test_pages_of_one_tier_alone() -> None:
    assert _mooncake.pages(NUMA_MAPS, "agentfleet-a-cxl") == {
        0x7FA04019F000: {2: 256 * 4096},
        0x7FA04656D000: {0: 24 * 4096, 2: 1000 * 4096},
    }


@pytest.mark.parametrize(
    ("address", "size", "inside"),
    [
        (0x7FA04019F000, 0x400000, True),
        (0x7FA04019F000, 0x400001, False),  # one byte beyond the mapping
        (0x7FA04019EFFF, 4096, False),
        (0x55D0C0A4E000, 16, False),  # inside of another file's mapping
    ],
)
def test_whether_an_object_lies_in_the_tier(address: int, size: int, inside: bool) -> None:
    assert _mooncake.holds(MAPS, "agentfleet-a-cxl", address, size) is inside
    assert not _mooncake.holds(MAPS, "agentfleet-a", address, size)


def cxl(mode: str = "system-ram") -> dict[str, t.Any]:
    return {
        "memdevs": [{"serial": "0x1"}, {"serial": "0x2"}, {"serial": "0x3"}],
        "regions": [{"memdevs": ["0x2", "0x1"], "dax": ["dax0.0"]}],
        "dax": [{"name": "dax0.0", "mode": mode, "target_node": 2}],
    }


def test_node_of_the_region_of_these_devices(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mooncake, "observe_cxl", lambda host: cxl())
    fake_host.files({"/sys/devices/system/node/has_memory": "0-2\n"})

    assert _mooncake.node_of_memdevs(fake_host, ["1", "0x2"]) == 2
    assert _mooncake.tier_node(fake_host, {"memdevs": [], "numa_node": 1}) == 1
    with pytest.raises(HostError, match="no CXL memory device has serial 0x7. Present: 0x1, 0x2, 0x3"):
        _mooncake.node_of_memdevs(fake_host, ["0x1", "0x7"])
    with pytest.raises(HostError, match=r"0 regions, 0 dax devices.*role cxl"):
        _mooncake.node_of_memdevs(fake_host, ["0x1", "0x3"])


@pytest.mark.parametrize(("mode", "has_memory"), [("devdax", "0-2"), ("system-ram", "0-1")])
def test_node_that_is_not_memory(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch, mode: str, has_memory: str) -> None:
    monkeypatch.setattr(_mooncake, "observe_cxl", lambda host: cxl(mode))
    fake_host.files({"/sys/devices/system/node/has_memory": has_memory})

    with pytest.raises(HostError, match="is not one online NUMA node"):
        _mooncake.node_of_memdevs(fake_host, ["0x1", "0x2"])


def pool(**more: t.Any) -> dict[str, t.Any]:
    master = {"address": "10.0.0.1", "port": 50051, "metrics_address": "10.0.0.1", "metrics_port": 9003}
    tiers = [{"name": "dram", "medium": "dram", "size_bytes": 100}, {"name": "cxl", "medium": "cxl", "size_bytes": 300}]
    policy = {"eviction_high_watermark": 0.9, "write_policy": "write_back", "eviction_policy": "fifo"}
    return {"name": "a", "etcd": [], "tenants": [], "tiers": tiers, "master": master, **policy, **more}


DISK = {"name": "ssd", "medium": "ssd", "size_bytes": 4000, "path": "/srv/a"}


def test_a_plain_master_offers_nothing_that_was_not_asked_for() -> None:
    flags = _mooncake.master_flags(pool())
    assert flags["eviction_high_watermark_ratio"] == 0.9 and flags["metrics_host"] == "10.0.0.1"
    assert not [name for name in flags if "enable" in name or "tenant" in name or "ha_" in name]


def test_write_back_goes_to_the_disk_when_room_is_needed() -> None:
    flags = _mooncake.master_flags(pool(tiers=[*pool()["tiers"], DISK]))
    assert (flags["enable_offload"], flags["offload_on_evict"]) == ("true", "true")
    through = _mooncake.master_flags(pool(tiers=[*pool()["tiers"], DISK], write_policy="write_through"))
    assert through["offload_on_evict"] == "false"


def test_each_store_has_its_share_of_the_disk() -> None:
    with_disk = pool(tiers=[*pool()["tiers"], DISK])
    assert [_mooncake.offload_share(with_disk, tier) for tier in with_disk["tiers"][:2]] == [
        ("/srv/a/dram", 1000),
        ("/srv/a/cxl", 3000),
    ]
    assert _mooncake.offload_share(pool(), pool()["tiers"][0]) == ("", 0)


def test_a_store_that_crashed_waits_until_it_is_forgotten(tmp_path: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(_mooncake.time, "sleep", waits.append)
    _mooncake._after_a_crash(str(tmp_path))  # the first start ever
    (tmp_path / "1.bucket").write_text("")
    _mooncake._after_a_crash(str(tmp_path))
    assert waits == [_mooncake.CLIENT_TTL_SECONDS + 2]
    (tmp_path / ".closed").write_text("")
    _mooncake._after_a_crash(str(tmp_path))  # it had taken leave
    assert len(waits) == 1 and not (tmp_path / ".closed").exists()


def test_percentiles_of_few_and_of_one() -> None:
    assert _mooncake.summary([0.001], [0.001, 0.002, 0.003], 3000) == {
        "probe_bytes": 3000,
        "samples": 1,
        "put_bytes_per_second": 3000000,
        "put_microseconds": {"p50": 1000.0, "p99": 1000.0},
        "get_bytes_per_second": 1500000,
        "get_microseconds": {"p50": 2000.0, "p99": 2980.0},
    }


def test_a_devdax_of_the_region_of_these_devices(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mooncake, "observe_cxl", lambda host: cxl("devdax"))
    assert _mooncake.devdax_of_memdevs(fake_host, ["0x1", "0x2"]) == "/dev/dax0.0"
    monkeypatch.setattr(_mooncake, "observe_cxl", lambda host: cxl("system-ram"))
    with pytest.raises(HostError, match="has 0 devices in devdax mode"):
        _mooncake.devdax_of_memdevs(fake_host, ["0x1", "0x2"])
