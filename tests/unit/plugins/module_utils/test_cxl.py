# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Regions, dax devices and tiering on a tree that was seen on an emulated host with two CXL devices."""

from __future__ import annotations

import copy
import json
import shutil
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot, _cxl, _numa
from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import CxlRegions
from ansible_collections.agentfleet.metal.plugins.module_utils._dax import DaxDevices
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._tiering import MemoryTiering, small_ratio

TREE = json.loads((Path(__file__).parent / "data" / "cxl_x2.json").read_text())
GIB = 1 << 30
REGION = "/sys/devices/platform/ACPI0017:00/root0/decoder0.0/region0"
DAX = f"{REGION}/dax_region0/dax0.0"
MEMORY = "/sys/devices/system/memory"
PAIR = {"type": "ram", "memdevs": ["0x1", "0x2"]}
CREATE = "cxl create-region -t ram -d decoder0.0 -s 1073741824 -w 2 -g 8192 -m mem1 mem0"


class Emulated:
    """What the kernel, cxl and daxctl did on the emulated host, traps included."""

    def __init__(self, host: t.Any) -> None:
        self.host = host
        self.pinned = False
        self.host.files(TREE["base"])
        self.plain_poke = host.poke
        host.poke = self.poke
        host.answers.update(
            {
                "cxl create-region": self.create,
                "cxl disable-region": self.disable,
                "cxl destroy-region": self.destroy,
                "daxctl offline-memory": self.offline,
                "daxctl reconfigure-device": (1, "", "unexpected arguments"),
                "daxctl reconfigure-device --mode=devdax dax0.0": lambda _host: self.reconfigure("device_dax"),
                "daxctl reconfigure-device --mode=system-ram --no-online dax0.0": lambda _host: self.reconfigure(
                    "kmem"
                ),
                "dmesg": "",
                "udevadm": "",
                "systemctl": "",
                "getent group kvm": "kvm:x:993:",
            }
        )

    def text(self, path: str) -> str:
        return t.cast(str, self.host.read(path))

    def set(self, path: str, text: str) -> None:
        Path(self.host.path(path)).write_text(text)

    def lay(self, tree: dict[str, str | None]) -> None:
        for path in tree:
            if self.host.exists(path) and Path(self.host.path(path)).is_file():
                Path(self.host.path(path)).unlink()
        self.host.files(tree)

    def blocks(self) -> list[str]:
        return t.cast("list[str]", self.host.glob(f"{MEMORY}/memory[0-9]*"))

    def online(self, zone: str) -> None:
        for block in self.blocks():
            self.set(f"{block}/state", "online" if zone else "offline")
            self.set(f"{block}/valid_zones", zone or "Normal Movable")

    def create(self, _host: t.Any) -> t.Any:
        if self.host.calls[-1] != CREATE:
            return 1, "", "cxl region: create_region: region0: failed to set target0 to mem0"
        self.lay(TREE["region"])
        self.online(
            {"online": "Normal", "online_movable": "Movable"}.get(self.text(f"{MEMORY}/auto_online_blocks"), "")
        )
        return json.dumps({"region": "region0", "decode_state": "commit", "qos_class_mismatch": True})

    def disable(self, _host: t.Any) -> t.Any:
        if any(self.text(f"{block}/state") == "online" for block in self.blocks()):
            return 1, "", "cxl region: device_region_disable: region0: memory is online"
        Path(self.host.path(f"{REGION}/driver")).unlink()
        for block in self.blocks():
            shutil.rmtree(self.host.path(block))
        Path(self.host.path("/sys/bus/dax/devices/dax0.0")).unlink()
        return ""

    def destroy(self, _host: t.Any) -> t.Any:
        if self.host.exists(f"{REGION}/driver"):
            return 1, "", "cxl region: destroy_region: region0: active. Disable it or use --force"
        Path(self.host.path("/sys/bus/cxl/devices/region0")).unlink()
        shutil.rmtree(self.host.path(REGION))
        self.lay({path: text for path, text in TREE["base"].items() if path.endswith(("/dpa_size", "/mode"))})
        return ""

    def offline(self, _host: t.Any) -> t.Any:
        for block in self.blocks()[: 4 if self.pinned else None]:
            self.set(f"{block}/state", "offline")
            self.set(f"{block}/valid_zones", "Normal Movable")
        return (240, "", "dax0.0: Failed to offline memory214: Device or resource busy") if self.pinned else ""

    def reconfigure(self, driver: str) -> t.Any:
        if driver == "kmem" and self.text(f"{MEMORY}/auto_online_blocks") != "offline":
            return 240, "", "dax0.0: error: kernel policy will auto-online memory, aborting"
        if driver == "device_dax" and any(self.text(f"{block}/state") == "online" for block in self.blocks()):
            return 240, "", "error reconfiguring devices: Device or resource busy"
        link = Path(self.host.path(f"{DAX}/driver"))
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../../../../../../../bus/dax/drivers/{driver}")
        if driver == "kmem":
            self.host.files(
                {path: text for path, text in TREE["region"].items() if path.startswith(f"{MEMORY}/memory")}
            )
            self.online("")
        else:
            for block in self.blocks():
                shutil.rmtree(self.host.path(block))
        return "", 0

    def poke(self, path: str, value: str) -> None:
        if path.endswith("/state") and value.startswith("online"):
            self.set(f"{path.rpartition('/')[0]}/valid_zones", "Movable" if value == "online_movable" else "Normal")
            value = "online"
        self.set(path, value)


@pytest.fixture
def emulated(fake_host: t.Any) -> Emulated:
    return Emulated(fake_host)


def run(resource: t.Any) -> list[str]:
    """Observe, plan and apply as a module does; the steps as text."""
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    return [f"{step.verb} {step.object}" for step in steps]


def regions(host: t.Any, *items: dict[str, t.Any], **options: t.Any) -> CxlRegions:
    return CxlRegions(host, {"regions": list(items), **options})


def dax(host: t.Any, item: dict[str, t.Any], **options: t.Any) -> DaxDevices:
    return DaxDevices(host, {"devices": [{"region": {"memdevs": ["0x1", "0x2"]}, **item}], **options})


# -- observing ------------------------------------------------------------------


def test_observes_devices_windows_and_nothing_else(emulated: Emulated) -> None:
    found = _cxl.observe_cxl(emulated.host)
    assert [(m["serial"], m["pci_address"], m["host_bridge"], m["ram_free_bytes"]) for m in found["memdevs"]] == [
        ("0x2", "0000:df:00.0", "pci0000:de", GIB // 2),
        ("0x1", "0000:0d:00.0", "pci0000:0c", GIB // 2),
    ]
    (decoder,) = found["decoders"]
    assert decoder["targets"] == ["pci0000:0c", "pci0000:de"]
    assert decoder["target_uids"] == ["12", "222"]
    assert (decoder["available_bytes"], decoder["firmware_ram_bytes"]) == (4 * GIB, 0)
    assert found["regions"] == found["dax"] == found["persisted"] == []


def test_observes_a_region_with_its_memory(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    found = _cxl.observe_cxl(emulated.host)
    (region,) = found["regions"]
    assert region["memdevs"] == ["0x1", "0x2"]
    assert (region["state"], region["size_bytes"], region["locked"], region["dax"]) == (
        "committed",
        GIB,
        False,
        ["dax0.0"],
    )
    (device,) = found["dax"]
    assert (device["mode"], device["online"], device["movable"], device["zone"]) == (
        "system-ram",
        True,
        False,
        "kernel",
    )
    assert [memdev["ram_free_bytes"] for memdev in found["memdevs"]] == [0, 0]
    assert found["decoders"][0]["available_bytes"] == 3 * GIB


def test_observes_nodes_and_tiers(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    found = _numa.observe_numa(emulated.host)
    assert found["tiers"] == [{"tier": 4, "nodes": [0]}, {"tier": 22, "nodes": [2]}, {"tier": 70, "nodes": [1]}]
    assert [(node["id"], node["tier"], node["cpus"], node["online_blocks"]) for node in found["nodes"]] == [
        (0, 4, [0, 1], 0),
        (1, 70, [], 0),
        (2, 22, [], 8),
    ]
    assert found["nodes"][1]["access"]["access0"]["read_bandwidth"] == 20480
    assert (found["auto_online"], found["demotion"], found["weighted_interleave_auto"]) == ("online", False, None)


def test_a_host_without_anything_has_empty_facts(fake_host: t.Any) -> None:
    found = _cxl.observe_cxl(fake_host)
    assert not any(found.values())
    assert _numa.observe_numa(fake_host)["nodes"] == []


# -- regions ----------------------------------------------------------------------


@pytest.mark.parametrize("names", [["0x1", "0x2"], ["0x2", "0x1"], ["0000:df:00.0", "1"]])
def test_makes_a_region_in_the_windows_order_and_only_once(emulated: Emulated, names: list[str]) -> None:
    wish = {"type": "ram", "memdevs": names}
    resource = regions(emulated.host, wish)
    (step,) = resource.plan(resource.observe())
    assert (step.verb, step.object) == ("create", "ram region 0x1+0x2")
    assert step.after["memdevs"] == ["0x1", "0x2"]
    assert step.after["size_bytes"] == GIB
    assert run(resource) == ["create ram region 0x1+0x2"]
    assert CREATE in emulated.host.calls
    result = resource.result(resource.observe())
    assert "qos_class_mismatch" in result["warnings"][0]
    assert result["regions"][0]["numa_nodes"] == [2]
    assert run(regions(emulated.host, wish)) == []


@pytest.mark.parametrize(("leave_offline", "state"), [(True, "offline"), (False, "online")])
def test_new_memory_stays_offline_on_wish_whatever_the_policy(
    emulated: Emulated, leave_offline: bool, state: str
) -> None:
    run(regions(emulated.host, PAIR, leave_offline=leave_offline))
    assert {emulated.text(f"{block}/state") for block in emulated.blocks()} == {state}
    assert emulated.text(f"{MEMORY}/auto_online_blocks") == "online"


def test_takes_a_region_down_in_the_safe_order(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    gone = {**PAIR, "state": "absent"}
    assert run(regions(emulated.host, gone)) == ["destroy ram region 0x1+0x2"]
    acts = [call for call in emulated.host.calls if call.startswith(("cxl", "daxctl"))]
    assert acts == ["daxctl offline-memory dax0.0", "cxl disable-region region0", "cxl destroy-region region0"]
    assert run(regions(emulated.host, gone)) == []
    assert run(regions(emulated.host, PAIR)) == ["create ram region 0x1+0x2"]


def test_memory_in_use_is_not_taken_down(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    node = "/sys/devices/system/node/node2/meminfo"
    emulated.set(node, emulated.text(node).replace("AnonPages: 0 kB", "AnonPages: 8 kB"))
    emulated.host.files({"/proc/77/numa_maps": "7f0000000000 bind:2 anon=2 N2=2", "/proc/77/comm": "store"})
    resource = regions(emulated.host, {**PAIR, "state": "absent"})
    with pytest.raises(Refused) as refused:
        resource.plan(resource.observe())
    assert refused.value.problem.endswith("is in use: AnonPages 8KiB, process 77 (store)")
    forced = regions(emulated.host, {**PAIR, "state": "absent"}, allow_memory_in_use=True)
    (step,) = forced.plan(forced.observe())
    assert step.disruptive
    assert "process 77 (store)" in step.why


def test_memory_that_cannot_go_offline_is_online_again(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    emulated.pinned = True
    with pytest.raises(HostError, match="4 of 8 memory blocks of dax0.0 cannot be taken offline"):
        run(regions(emulated.host, {**PAIR, "state": "absent"}))
    assert {_numa.zone_of(emulated.host, block) for block in emulated.blocks()} == {"kernel"}
    assert "cxl disable-region region0" not in emulated.host.calls


def test_taking_memory_offline_has_time_for_its_size(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    emulated.set(f"{MEMORY}/block_size_bytes", f"{1 << 40:x}")
    seen = []

    def slow(argv: t.Sequence[str], _stdin: str | None, timeout_seconds: float) -> Completed:
        seen.append(timeout_seconds)
        return Completed(tuple(argv), 124, "", f"no end after {timeout_seconds:g} s")

    emulated.host._runner = slow
    blocks = emulated.blocks()
    with pytest.raises(HostError, match=r"no end after 32888 s\), so .* Moving their pages away took too long"):
        _numa.offline_dax(emulated.host, "dax0.0", blocks)
    assert seen == [120 + 8 * 4096]


def test_a_persistent_region_has_its_dax_device_and_the_users_of_its_disks(emulated: Emulated) -> None:
    host, pmem = emulated.host, {**PAIR, "type": "pmem"}
    emulated.lay(TREE["region"])
    emulated.set(f"{REGION}/mode", "pmem")
    host.remove("/sys/bus/dax/devices/dax0.0")
    nvdimm = "/sys/devices/platform/ACPI0017:00/root0/nvdimm-bridge0/ndbus0/region0"
    host.files(
        {
            f"{nvdimm}/dax0.1/dax0.1/size": "1073741824",
            f"{nvdimm}/dax0.1/dax0.1/resource": "0x690000000",
            f"{nvdimm}/dax0.1/dax0.1/driver": "-> ../../../../../../../../bus/dax/drivers/device_dax",
            "/sys/bus/dax/devices/dax0.1": f"-> ../../..{nvdimm[4:]}/dax0.1/dax0.1",
            f"{nvdimm}/namespace0.0/block/pmem0/holders/md0": "",
            "/sys/class/block/pmem0": f"-> ../..{nvdimm[4:]}/namespace0.0/block/pmem0",
            "/proc/swaps": "Filename\tType\n/dev/pmem0\tpartition\t1\t0\t-2\n",
            "/proc/77/maps": "7f00 rw-s 0 00:06 5 /dev/dax0.1\n",
            "/proc/77/comm": "store\n",
        }
    )
    device = {"region": {"memdevs": ["0x1", "0x2"], "type": "pmem"}, "mode": "devdax"}
    wish = dax(host, device)
    assert [step.verb for step in wish.plan(wish.observe())] == ["write"]
    with pytest.raises(Refused) as refused:
        run(regions(host, {**pmem, "state": "absent"}, destroy_persistent_data=True))
    assert refused.value.problem.endswith("in use: process 77 (store), /dev/pmem0 is swap, /dev/pmem0 held by md0")


@pytest.mark.parametrize(
    ("answer", "cpuinfo", "remedy"),
    [
        (
            (1, "", "region0: failed to commit decode: No such device or address"),
            "flags : fpu hypervisor",
            "-hypervisor",
        ),
        ((1, "", "region0: failed to set target0 to mem0"), "", "not where the window's interleaving expects it"),
        ((127, "", "cxl: not found"), "", "Install the package cxl"),
        ((1, "", "region0: No space left on device"), "", "use a smaller size"),
    ],
)
def test_a_failed_creation_is_explained_and_undone(
    emulated: Emulated, answer: t.Any, cpuinfo: str, remedy: str
) -> None:
    emulated.host.files({"/proc/cpuinfo": cpuinfo})

    def half(_host: t.Any) -> t.Any:
        emulated.host.files({"/sys/bus/cxl/devices/region7": None})
        return answer

    emulated.host.answers["cxl create-region"] = half
    emulated.host.answers["cxl destroy-region region7"] = ""
    with pytest.raises(HostError, match=remedy):
        run(regions(emulated.host, PAIR))
    assert "cxl destroy-region region7" in emulated.host.calls


def test_what_an_interrupted_run_left_is_cleared(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    emulated.set(f"{REGION}/commit", "0")
    Path(emulated.host.path(f"{REGION}/driver")).unlink()
    Path(emulated.host.path("/sys/bus/dax/devices/dax0.0")).unlink()
    assert run(regions(emulated.host, PAIR)) == ["destroy ram region 0x1+0x2", "create ram region 0x1+0x2"]


def test_interleaves_over_host_bridges_then_ports() -> None:
    def device(serial: int, bridge: str, *route: str) -> dict[str, t.Any]:
        return {"serial": hex(serial), "pci_address": route[-1], "host_bridge": bridge, "route": list(route)}

    wish = _cxl._wish("regions[0]", {"type": "ram", "memdevs": ["1", "2", "3", "4"]})
    left = [device(1, "L", "l0", "d1"), device(2, "L", "l1", "d2")]
    right = [device(3, "R", "r0", "u", "s0", "d3"), device(4, "R", "r0", "u", "s1", "d4")]
    ordered = _cxl._ordered(wish, left + right, ["R", "L"])
    assert [member["serial"] for member in ordered] == ["0x3", "0x1", "0x4", "0x2"]
    uneven = [*left, device(3, "L", "l1", "s9", "d3")]
    with pytest.raises(Refused, match="not spread evenly"):
        _cxl._ordered(wish, uneven, ["L"])


def test_check_mode_predicts_and_a_fresh_host_only_warns(emulated: Emulated, fake_host: t.Any) -> None:
    resource = regions(emulated.host, PAIR, persist=True)
    resource.predicting = True
    assert [step.verb for step in resource.plan(resource.observe())] == ["create", "persist"]
    shutil.rmtree(emulated.host.path("/sys/bus/cxl"))
    assert [step.verb for step in resource.plan(resource.observe())] == ["create", "persist"]
    assert "no CXL memory device yet" in resource.notes[0]


def test_the_boot_unit_brings_everything_back(emulated: Emulated) -> None:
    host = emulated.host
    run(regions(host, PAIR, leave_offline=True, persist=True))
    run(dax(host, {"mode": "system-ram", "online": "movable"}, persist=True))
    run(MemoryTiering(host, {"demotion": True, "interleave_weights": {"cpu": 4, "0x1": 1}, "persist": True}))
    emulated.offline(host)
    emulated.disable(host)
    emulated.destroy(host)
    emulated.set("/sys/kernel/mm/numa/demotion_enabled", "false")
    assert _boot.restore(host) == 0
    assert {_numa.zone_of(host, block) for block in emulated.blocks()} == {"movable"}
    assert emulated.text("/sys/kernel/mm/numa/demotion_enabled") == "true"
    assert _boot.wanted(host, "cxl") == {"regions": [PAIR], "leave_offline": True, "wait_seconds": 90}


def test_a_boot_brings_back_what_does_not_need_an_absent_device(emulated: Emulated, capsys: t.Any) -> None:
    host = emulated.host
    lost = {"type": "ram", "memdevs": ["0x9"]}
    device = {"mode": "system-ram", "online": "movable"}
    weights = {"cpu": 4, "0x9": 1}
    wishes = {
        "cxl": {"regions": [lost, PAIR], "leave_offline": True},
        "dax": {"devices": [{"region": {"memdevs": region["memdevs"]}, **device} for region in (lost, PAIR)]},
        "tiering": {"demotion": True, "interleave_weights": weights},
    }
    for concern, wish in wishes.items():
        host.write(f"{_boot.STATE}/{concern}.json", json.dumps({**wish, "wait_seconds": 0.01}))
    assert _boot.restore(host) == 3
    assert {_numa.zone_of(host, block) for block in emulated.blocks()} == {"movable"}
    assert emulated.text("/sys/kernel/mm/numa/demotion_enabled") == "true"
    failed = [line.partition(". ")[0] for line in capsys.readouterr().err.splitlines()]
    assert failed == [
        "cxl: FAILED: restore ram region 0x9: regions[0].memdevs[0]: '0x9': no CXL memory device has it",
        "dax: FAILED: restore dax device ram-0x9: devices[0].region.memdevs[0]: '0x9': no CXL memory device has it",
        "tiering: FAILED: restore weight of 0x9: interleave_weights.0x9: 1: no NUMA node with memory is meant by it",
    ]


def test_what_is_not_declared_any_more_is_forgotten(emulated: Emulated) -> None:
    run(regions(emulated.host, PAIR, persist=True))
    assert _cxl.observe_cxl(emulated.host)["persisted"] == ["cxl"]
    assert run(regions(emulated.host, persist=True)) == ["forget /etc/agentfleet/cxl.json"]
    assert run(regions(emulated.host, persist=True)) == []


# -- dax devices -----------------------------------------------------------------


def test_memory_in_the_wrong_zone_moves_to_the_declared_one(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    run(dax(emulated.host, {"mode": "system-ram", "online": "any"}))
    assert not [call for call in emulated.host.calls if call.startswith("daxctl")]
    assert run(dax(emulated.host, {"mode": "system-ram"})) == ["configure dax device ram-0x1-0x2"]
    assert {_numa.zone_of(emulated.host, block) for block in emulated.blocks()} == {"movable"}
    assert run(dax(emulated.host, {"mode": "system-ram"})) == []


def test_to_devdax_and_back_beside_an_auto_online_policy(emulated: Emulated, monkeypatch: t.Any) -> None:
    emulated.lay(TREE["region"])
    wish = {"mode": "devdax", "group": "kvm", "file_mode": "0660"}
    resource = dax(emulated.host, wish)
    seen = {"value": (0, 0, "0600", False)}
    monkeypatch.setattr(DaxDevices, "_node", lambda self, wish, name: seen["value"])
    rules = "/etc/udev/rules.d/60-agentfleet-dax.rules"
    assert run(resource) == ["configure dax device ram-0x1-0x2", f"write {rules}"]
    assert emulated.text(rules).splitlines()[1] == (
        'SUBSYSTEM=="dax", ATTR{resource}=="0x690000000", ATTR{size}=="1073741824", OWNER="root", GROUP="kvm", '
        'MODE="0660", SYMLINK+="agentfleet/dax/ram-0x1-0x2"'
    )
    seen["value"] = (0, 993, "0660", True)
    assert run(dax(emulated.host, wish)) == []
    assert run(dax(emulated.host, {"mode": "system-ram"})) == ["configure dax device ram-0x1-0x2", f"remove {rules}"]
    assert {_numa.zone_of(emulated.host, block) for block in emulated.blocks()} == {"movable"}
    assert emulated.text(f"{MEMORY}/auto_online_blocks") == "online"


def test_a_failed_change_leaves_the_device_as_it_was(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    emulated.host.answers["daxctl reconfigure-device --mode=devdax dax0.0"] = (240, "", "Device or resource busy")
    with pytest.raises(HostError, match="Device or resource busy"):
        run(dax(emulated.host, {"mode": "devdax"}))
    assert {_numa.zone_of(emulated.host, block) for block in emulated.blocks()} == {"kernel"}
    assert emulated.text(f"{MEMORY}/auto_online_blocks") == "online"


def test_alignment_is_set_while_no_driver_has_the_device(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])

    def disable(host: t.Any) -> t.Any:
        if host.link_name(f"{DAX}/driver") != "device_dax":
            return 250, "", "dax0.0: status operations are only applicable in devdax mode"
        Path(host.path(f"{DAX}/driver")).unlink()
        return ""

    emulated.host.answers["daxctl disable-device dax0.0"] = disable
    run(dax(emulated.host, {"mode": "devdax", "align": "1GiB"}))
    assert emulated.text(f"{DAX}/align") == "1073741824"
    assert emulated.host.link_name(f"{DAX}/driver") == "device_dax"
    assert "configure dax device ram-0x1-0x2" not in run(dax(emulated.host, {"mode": "devdax", "align": "1GiB"}))


def test_check_mode_expects_the_region_of_an_earlier_task(emulated: Emulated) -> None:
    resource = dax(emulated.host, {"mode": "devdax", "group": "cache"})
    with pytest.raises(Refused, match="Declare it with cxl_region first"):
        resource.plan(resource.observe())
    resource.predicting = True
    assert [step.verb for step in resource.plan(resource.observe())] == ["configure", "write"]
    assert len(resource.notes) == 2


# -- tiering ---------------------------------------------------------------------


def test_tiering_sets_what_differs_and_only_that(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    wish = {
        "demotion": True,
        "numa_balancing": 2,
        "promote_rate_limit_mib": 500,
        "interleave_weights": {"cpu": 4, "cxl": 1, "node1": 2},
        "zswap": {"enabled": True, "compressor": "lzo", "max_pool_percent": 30},
    }
    weights = "/sys/kernel/mm/mempolicy/weighted_interleave"
    assert run(MemoryTiering(emulated.host, wish)) == [
        "set /sys/kernel/mm/numa/demotion_enabled",
        "set /proc/sys/kernel/numa_balancing_promote_rate_limit_MBps",
        "set /proc/sys/kernel/numa_balancing",
        "set /sys/module/zswap/parameters/max_pool_percent",
        "set /sys/module/zswap/parameters/enabled",
        f"set {weights}/node0",
        f"set {weights}/node1",
    ]
    assert emulated.text("/sys/module/zswap/parameters/enabled") == "Y"
    assert run(MemoryTiering(emulated.host, wish)) == []


def test_weights_follow_bandwidth(emulated: Emulated) -> None:
    resource = MemoryTiering(emulated.host, {"interleave_weights": "auto"})
    assert [(step.object[-5:], step.after) for step in resource.plan(resource.observe())] == [("node0", "5")]


@pytest.mark.parametrize(
    ("bandwidths", "weights"),
    [
        ({0: 102400, 1: 20480}, {0: 5, 1: 1}),
        ({0: 300, 1: 200}, {0: 3, 1: 2}),
        ({0: 250000, 1: 17800}, {0: 14, 1: 1}),
        ({0: 7, 1: 7, 2: 7}, {0: 1, 1: 1, 2: 1}),
        ({0: 1000000, 1: 1000}, {0: 255, 1: 1}),
    ],
)
def test_small_ratio(bandwidths: dict[int, int], weights: dict[int, int]) -> None:
    assert small_ratio(bandwidths) == weights


def test_the_kernels_own_weights_are_used_where_it_has_them(emulated: Emulated) -> None:
    auto = "/sys/kernel/mm/mempolicy/weighted_interleave/auto"
    emulated.host.files({auto: "false"})
    assert run(MemoryTiering(emulated.host, {"interleave_weights": "auto"})) == [f"set {auto}"]
    assert run(MemoryTiering(emulated.host, {"interleave_weights": "auto"})) == []


def test_a_value_that_the_kernel_did_not_take_is_an_error(emulated: Emulated) -> None:
    emulated.host.poke = lambda path, value: None
    with pytest.raises(HostError, match="has 'lzo' now"):
        run(MemoryTiering(emulated.host, {"zswap": {"compressor": "nonsense"}}))


def test_a_wish_is_not_changed_by_planning(emulated: Emulated) -> None:
    emulated.lay(TREE["region"])
    resource = regions(emulated.host, {**PAIR, "state": "absent"})
    observed = resource.observe()
    before = copy.deepcopy(observed)
    resource.plan(observed)
    assert observed == before
