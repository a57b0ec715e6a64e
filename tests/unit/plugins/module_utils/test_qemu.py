# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU driver: what it asks a running machine, and what it says needs a restart."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _qemu, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Refusal
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Change

VOLUME = {
    "name": "data", "size_bytes": 1 << 30, "template": "", "readonly": False, "mount": "", "filesystem": "",
    "writable_layer": False,
}  # fmt: skip
LIMITS = {"disk_bytes_per_second": 1 << 20, "disk_operations_per_second": 0, "network_bytes_per_second": 0}
IMAGE = {
    "digest": "cd" * 32, "path": "/var/lib/agentfleet/images/cd/rootfs.erofs", "size_bytes": 2 << 30, "uuid": "ee" * 16,
    "target": "/model", "filesystem": "erofs", "options": "ro,dax=always",
}  # fmt: skip
INTERFACE = {"network": "agents", "tap": "af0123", "mac": "02:00:00:00:00:01"}


# Kind of thing -> QEMU's words for one that is there already, and for one that is not.
WORDS = {
    "device": ("Duplicate device ID '{}'", "Device '{}' not found"),
    "blockdev": ("Duplicate nodes with node-name='{}'", "Failed to find node with node-name='{}'"),
    "object": ("attempt to add duplicate property '{}' to object (type 'container')", "object '{}' not found"),
    "chardev": ("Chardev with id '{}' already exists", "Chardev '{}' not found"),
    "netdev": ("Duplicate ID '{}' for netdev", "Device '{}' not found"),
}


class Qmp:
    """Answers from a table, and has what was added; keeps what was asked and not refused.

    :ivar there: (kind, name)
    :ivar refuse: command that is refused
    :ivar held: devices that the guest does not let go
    :ivar spare: bytes that the guest takes or gives at most
    :ivar busy: name -> how often it is still held, after its device has gone
    """

    def __init__(self, answers: dict[str, t.Any]) -> None:
        self.answers, self.asked = answers, []  # type: dict[str, t.Any], list[tuple[str, dict[str, t.Any]]]
        self.there: set[tuple[str, str]] = set()
        self.refuse, self.held, self.busy = "", set(), {}  # type: str, set[str], dict[str, int]
        self.spare = 1 << 40

    def ask(self, command: str, **arguments: t.Any) -> t.Any:
        if command.startswith("query"):
            return self.answers.get(command, [])
        if (command, arguments.get("property")) == ("qom-set", "requested-size"):
            self._guest_has("query-memory-devices", arguments["value"])
        if command == "balloon":
            self._guest_has("query-balloon", arguments["value"])
        if command == "qom-list":
            return [{"name": name} for kind, name in self.there if kind == "device"]
        if command == self.refuse:
            raise Refusal(command, "not today")
        kind, _dash, verb = command.replace("_", "-").rpartition("-")
        thing = kind, str(arguments.get("id") or arguments.get("node-name"))
        if verb == "add":
            if thing in self.there:
                raise Refusal(command, WORDS[kind][0].format(thing[1]))
            self.there.add(thing)
        elif verb in ("del", "remove"):
            if thing not in self.there:
                raise Refusal(command, WORDS[kind][1].format(thing[1]))
            if kind != "device" and self.busy.get(thing[1]):
                self.busy[thing[1]] -= 1
                raise Refusal(command, f"Chardev '{thing[1]}' is busy")
            if kind == "device" and thing[1] in self.held:
                if (command, arguments) in self.asked:
                    raise Refusal(command, f"Device {thing[1]} is already in the process of unplug")
            else:
                self.there.remove(thing)
        self.asked.append((command, arguments))
        return {}

    def _guest_has(self, question: str, wanted: int) -> None:
        """What is told of a guest's memory from now on."""
        if question == "query-balloon":
            self.answers[question] = {"actual": wanted + max(0, (256 << 20) - wanted - self.spare)}
        else:
            size = min(wanted, self.spare)
            other = {"type": "virtio-pmem", "data": {"id": "pmem", "size": 1 << 30}}
            self.answers[question] = [other, {"type": "virtio-mem", "data": {"id": "plugged", "size": size}}]

    def commands(self) -> list[str]:
        """Names of the commands since the last call."""
        found = [command for command, _arguments in self.asked]
        self.asked.clear()
        return found


PORTS = [{"devices": [
    {"qdev_id": "port0", "pci_bridge": {"devices": [{"qdev_id": "disk-data"}]}}, {"qdev_id": "port1", "pci_bridge": {}},
]}]  # fmt: skip


def machine(spec: t.Any, **table: t.Any) -> tuple[_qemu.QemuMachine, Qmp]:
    running = _qemu.QemuMachine(Host("/none"), spec)
    qmp = Qmp({"query-pci": PORTS, **{key.replace("_", "-"): value for key, value in table.items()}})
    running.qmp = qmp  # type: ignore[assignment]
    return running, qmp


@pytest.mark.parametrize(
    ("package", "told"), [("Debian 1:10.0.2+ds-2", "10.0.2 (Debian 1:10.0.2+ds-2)"), ("", "10.0.2")]
)
def test_a_running_qemu_tells_the_version_of_its_program(
    microvm_spec: t.Any, fake_host: t.Any, package: str, told: str
) -> None:
    numbers = {"major": 10, "minor": 0, "micro": 2}
    running, _qmp = machine(microvm_spec, query_version={"qemu": numbers, "package": package})
    fake_host.answers["/usr/bin/qemu-system-x86_64 --version"] = f"QEMU emulator version {told}\nCopyright"
    assert running.version() == told == _qemu.version(fake_host, _qemu.PROGRAM)


def test_a_disk_comes_to_the_first_free_port_with_its_limits(microvm_spec: t.Any) -> None:
    running, qmp = machine({**microvm_spec, "rate_limits": LIMITS})
    running.change(Change("volumes", "more", None, {**VOLUME, "name": "more"}), microvm_spec)
    commands = dict(qmp.asked)
    assert [command for command, _arguments in qmp.asked] == [
        "object-add",
        "blockdev-add",
        "blockdev-add",
        "device_add",
    ]
    assert commands["object-add"]["limits"] == {"bps-total": 1 << 20, "iops-total": 0}
    assert commands["device_add"] == {
        "bus": "port1", "driver": "virtio-blk-pci", "id": "disk-more", "drive": "limited-more", "serial": "more",
    }  # fmt: skip


@pytest.mark.parametrize(("limits", "node"), [({}, "disk-data"), ({"rate_limits": LIMITS}, "limited-data")])
def test_the_node_that_the_guest_sees_grows(microvm_spec: t.Any, limits: dict[str, t.Any], node: str) -> None:
    running, qmp = machine({**microvm_spec, **limits, "volumes": [VOLUME]})
    argv = " ".join(_qemu.command({**microvm_spec, **limits, "volumes": [VOLUME]}))
    running.change(Change("volumes", "data", VOLUME, {**VOLUME, "size_bytes": 2 << 30}), microvm_spec)
    assert qmp.asked == [("block_resize", {"node-name": node, "size": 2 << 30})]
    assert f'"drive": "{node}"' in argv


def test_what_was_made_behind_a_device_goes_when_it_is_refused(microvm_spec: t.Any) -> None:
    running, qmp = machine({**microvm_spec, "rate_limits": LIMITS})
    qmp.refuse = "device_add"
    with pytest.raises(HostError, match="refused device_add"):
        running.change(Change("volumes", "more", None, {**VOLUME, "name": "more"}), microvm_spec)
    assert qmp.commands()[3:] == ["blockdev-del", "blockdev-del", "object-del"]
    assert qmp.there == set()


def test_no_free_port_says_what_to_declare(microvm_spec: t.Any) -> None:
    running, qmp = machine(microvm_spec, query_pci=[{"devices": PORTS[0]["devices"][:1]}])
    with pytest.raises(HostError, match="Declare more of them"):
        running.change(Change("networks", "agents", None, INTERFACE), microvm_spec)
    assert qmp.asked == []


SHARE = {"tag": "m", "source": "/srv", "target": "/mnt/m", "readonly": True, "dax": "never"}
KINDS = [("volumes", "data", VOLUME), ("networks", "agents", INTERFACE), ("shares", "m", SHARE)]


@pytest.mark.parametrize(("key", "item", "value"), KINDS)
def test_a_change_that_was_made_and_not_written_down_is_not_made_again(
    microvm_spec: t.Any, key: str, item: str, value: t.Any
) -> None:
    running, qmp = machine({**microvm_spec, "rate_limits": LIMITS})
    add, remove = Change(key, item, None, value), Change(key, item, value, None)
    running.change(add, microvm_spec)
    assert qmp.commands()[-1] == "device_add"
    running.change(add, microvm_spec)
    assert qmp.commands() == []
    running.change(remove, microvm_spec)
    assert qmp.commands()[0] == "device_del" and qmp.there == set()
    running.change(remove, microvm_spec)
    assert qmp.commands() == []


@pytest.mark.parametrize(("key", "item", "value"), KINDS)
def test_what_an_interrupted_change_left_behind_a_device_is_taken_up(
    microvm_spec: t.Any, key: str, item: str, value: t.Any
) -> None:
    running, qmp = machine({**microvm_spec, "rate_limits": LIMITS})
    add, remove = Change(key, item, None, value), Change(key, item, value, None)
    running.change(add, microvm_spec)
    complete = set(qmp.there)
    for change, after in ((add, complete), (remove, set())):
        qmp.there = {thing for thing in complete if thing[0] != "device"}
        running.change(change, microvm_spec)
        assert qmp.there == after


def test_a_device_that_the_guest_lets_go_late_is_removed_by_the_next_run(
    microvm_spec: t.Any, monkeypatch: t.Any
) -> None:
    running, qmp = machine(microvm_spec)
    running.change(Change("shares", "m", None, SHARE), microvm_spec)
    qmp.held.add("share-m")
    monkeypatch.setattr(_qemu, "UNPLUG_SECONDS", 0)
    for _run in range(2):  # QEMU does not ask the guest twice
        with pytest.raises(HostError, match="the guest did not let it go"):
            running.change(Change("shares", "m", SHARE, None), microvm_spec)
    qmp.there.remove(("device", "share-m"))
    running.change(Change("shares", "m", SHARE, None), microvm_spec)
    assert qmp.there == set()


def test_what_qemu_still_holds_of_a_device_that_went_is_waited_for(microvm_spec: t.Any, monkeypatch: t.Any) -> None:
    running, qmp = machine(microvm_spec)
    running.change(Change("shares", "m", None, SHARE), microvm_spec)
    qmp.busy["share-m"] = 2
    running.change(Change("shares", "m", SHARE, None), microvm_spec)
    assert qmp.there == set()
    running.change(Change("shares", "m", None, SHARE), microvm_spec)
    qmp.busy["share-m"] = 99
    monkeypatch.setattr(_qemu, "FREE_SECONDS", 0)
    with pytest.raises(HostError, match="is busy"):
        running.change(Change("shares", "m", SHARE, None), microvm_spec)


def test_an_answer_that_does_not_come_in_time_is_no_refusal(microvm_spec: t.Any, monkeypatch: t.Any) -> None:
    running, qmp = machine(microvm_spec)
    add, ask = Change("devices", "0000:41:00.0", None, "0000:41:00.0"), qmp.ask

    def late(command: str, **arguments: t.Any) -> t.Any:
        told = ask(command, **arguments)
        if command == "device_add":
            raise HostError("QEMU did not answer device_add within 90 seconds")
        return told

    monkeypatch.setattr(qmp, "ask", late)
    with pytest.raises(HostError, match="did not answer"):
        running.change(add, microvm_spec)
    assert qmp.there == {("device", "device-0000.41.00.0")}
    running.change(add, microvm_spec)


def test_images_of_data_are_mapped_as_the_roots(microvm_spec: t.Any) -> None:
    argv = _qemu.command({**microvm_spec, "data_images": [IMAGE]})
    assert f"size={256 << 20}B,maxmem={(256 << 20) + (4 << 30)}B" in argv
    (backend,) = [json.loads(word) for word in argv if '"memory-backend-file"' in word]
    assert backend["mem-path"] == IMAGE["path"] and (backend["share"], backend["readonly"]) == (False, True)
    (device,) = [json.loads(word) for word in argv if '"virtio-pmem-pci"' in word]
    assert device == {"driver": "virtio-pmem-pci", "id": "pmem-cdcdcdcdcdcd", "memdev": backend["id"]}
    assert argv.index("virtio-pmem-pci,memdev=image") < argv.index(json.dumps(device))  # /dev/pmem0 is the root's
    shared = _qemu.command({**microvm_spec, "data_images": [IMAGE], "shares": [SHARE]})
    assert [backend["rom"], *(json.loads(w)["rom"] for w in shared if '"memory-backend-file"' in w)] == ["off", "on"]
    running, qmp = machine(microvm_spec)
    running.change(Change("data_images", IMAGE["digest"], None, IMAGE), microvm_spec)
    assert qmp.asked == [("object-add", backend), ("device_add", {"bus": "port1", **device})]


def test_memory_is_what_comes_on_top_of_what_was_booted(microvm_spec: t.Any) -> None:
    running, qmp = machine({**microvm_spec, "memory_bytes": 384 << 20})
    running.change(Change("memory_bytes", "", 384 << 20, 512 << 20), microvm_spec)
    running.change(Change("balloon_bytes", "", 0, 64 << 20), microvm_spec)
    assert qmp.asked == [
        ("qom-set", {"path": "plugged", "property": "requested-size", "value": 256 << 20}),
        ("balloon", {"value": 192 << 20}),
    ]


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        (Change("memory_bytes", "", 256 << 20, 512 << 20), 300),
        (Change("balloon_bytes", "", 0, 64 << 20), 44),
    ],
)
def test_a_guest_that_takes_or_gives_less_memory_is_told_with_how_much(
    change: Change, reached: int, microvm_spec: t.Any, monkeypatch: t.Any
) -> None:
    monkeypatch.setattr(_vmm, "STILL_SECONDS", 0)
    running, qmp = machine(microvm_spec)
    qmp.spare = 44 << 20
    running.change(change, microvm_spec)
    with pytest.raises(_vmm.Unfinished, match=f"{change.key}: the guest came to {reached} of ") as short:
        running.settle(change)
    assert short.value.reached == reached << 20
    qmp.spare = 1 << 40
    running.change(change, microvm_spec)
    running.settle(change)


def test_a_guest_that_gets_on_is_waited_for(monkeypatch: t.Any) -> None:
    now, sizes = [0.0], [256, 280, 280, 300, 340, 384]
    monkeypatch.setattr(_vmm.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_vmm.time, "sleep", lambda _seconds: now.__setitem__(0, now[0] + _vmm.STILL_SECONDS / 2))
    change = Change("memory_bytes", "", 256 << 20, 384 << 20)
    _vmm.await_memory(change, lambda: sizes.pop(0) << 20)
    assert sizes == [] and now[0] > _vmm.STILL_SECONDS
    turns = [0]

    def restless() -> int:
        turns[0] += 1
        return (256 + turns[0] % 2) << 20

    with pytest.raises(_vmm.Unfinished):
        _vmm.await_memory(change, restless)
    assert turns[0] < 2 * _vmm.SETTLE_SECONDS / _vmm.STILL_SECONDS + 5


def test_cpus_come_and_go_but_not_those_of_the_boot(microvm_spec: t.Any, monkeypatch: t.Any) -> None:
    def cpu(socket: int, path: str = "") -> dict[str, t.Any]:
        one: dict[str, t.Any] = {"type": "host-x86_64-cpu", "props": {"socket-id": socket, "core-id": 0}}
        return {**one, "qom-path": path} if path else one

    cpus = [cpu(2), cpu(1), cpu(0, "/machine/unattached/device[0]")]
    running, qmp = machine(microvm_spec, query_hotpluggable_cpus=cpus)
    running.change(Change("vcpus", "", 1, 2), microvm_spec)
    assert qmp.asked == [("device_add", {"driver": "host-x86_64-cpu", "id": "cpu-0-1", "socket-id": 1, "core-id": 0})]
    cpus[1] = cpu(1, "/machine/peripheral/cpu-0-1")
    qmp.there = {("device", "cpu-0-1")}
    running.change(Change("vcpus", "", 2, 1), microvm_spec)
    assert qmp.asked[1:] == [("device_del", {"id": "cpu-0-1"})]
    with pytest.raises(HostError, match="1 virtual CPUs were there at boot"):
        running.change(Change("vcpus", "", 2, 0), microvm_spec)
    cpus[0] = cpu(2, "/machine/peripheral/cpu-0-2")
    qmp.there, qmp.held = {("device", "cpu-0-1"), ("device", "cpu-0-2")}, {"cpu-0-1"}
    monkeypatch.setattr(_qemu, "UNPLUG_SECONDS", 0)
    with pytest.raises(_vmm.Unfinished, match="cpu-0-1: the guest did not let it go") as short:
        running.change(Change("vcpus", "", 3, 1), microvm_spec)
    assert short.value.reached == 2


@pytest.mark.parametrize(
    ("change", "running", "reason"),
    [
        (Change("vcpus", "", 1, 3), {"vcpus_max": 2}, "at most 2 virtual CPUs"),
        (Change("vcpus", "", 1, 2), {"vcpus_max": 2}, ""),
        (Change("vcpus", "", 1, 2), {"vcpus_max": 2, "accelerator": "tcg"}, "no CPU that comes later"),
        (Change("vcpus", "", 4, 2), {"vcpus": 4, "vcpus_max": 8}, "the 4 virtual CPUs that it was started with stay"),
        (Change("vcpus", "", 4, 2), {"vcpus": 4, "vcpus_max": 8, "vcpus_booted": 2}, ""),
        (Change("vcpus", "", 4, 1), {"vcpus": 4, "vcpus_max": 8, "vcpus_booted": 2}, "the 2 virtual CPUs"),
        (Change("memory_bytes", "", 256 << 20, 512 << 20), {}, "at most 256 MiB"),
        (Change("memory_bytes", "", 256 << 20, 128 << 20), {}, "cannot be unplugged"),
        (Change("memory_bytes", "", 256 << 20, 384 << 20), {"memory_max_bytes": 512 << 20}, ""),
        (Change("balloon_bytes", "", 0, 1 << 20), {"free_page_reporting": False}, "without a balloon"),
        (Change("balloon_bytes", "", 0, 255 << 20), {"memory_bytes": 512 << 20}, ""),
        (Change("balloon_bytes", "", 0, 256 << 20), {"memory_bytes": 512 << 20}, "takes of the 256 MiB"),
        (Change("volumes", "data", None, VOLUME), {}, "without hotplug_slots"),
        (Change("volumes", "data", None, VOLUME), {"hotplug_slots": 1}, ""),
        (Change("volumes", "data", VOLUME, {**VOLUME, "size_bytes": 2 << 30}), {}, ""),
        (Change("volumes", "data", VOLUME, {**VOLUME, "readonly": True}), {}, "can only grow"),
        (Change("volumes", "data", {**VOLUME, "writable_layer": True}, None), {"hotplug_slots": 1}, "root is on it"),
        (Change("volumes", "data", None, {**VOLUME, "mount": "/data"}), {"hotplug_slots": 1}, "when it starts"),
        (Change("data_images", "cd", None, IMAGE), {}, "without room for so large an image"),
        (Change("data_images", "cd", None, {**IMAGE, "size_bytes": 2 << 20}), {}, "without hotplug_slots"),
        (Change("data_images", "cd", None, IMAGE), {"hotplug_slots": 1}, ""),
        (Change("data_images", "cd", None, {**IMAGE, "size_bytes": 66 << 30}), {"hotplug_slots": 1}, "so large"),
        (Change("data_images", "cd", IMAGE, None), {"hotplug_slots": 1}, "QEMU takes no image away"),
        (Change("data_images", "ab", None, IMAGE), {"hotplug_slots": 1, "data_images": [IMAGE]}, "is mounted there"),
        (Change("networks", "agents", INTERFACE, {**INTERFACE, "mac": "x"}), {"hotplug_slots": 1}, "cannot change"),
        (Change("shares", "m", None, {"tag": "m"}), {"hotplug_slots": 1}, "without shares"),
        (Change("devices", "0000:41:00.0", None, "0000:41:00.0"), {"hotplug_slots": 1}, "with a balloon"),
        (Change("rate_limits", "", LIMITS, LIMITS), {}, "without limits"),
        (Change("rate_limits", "", LIMITS, LIMITS), {"rate_limits": LIMITS}, ""),
        (Change("kernel", "", "a", "b"), {}, "reads kernel when it starts"),
    ],
)
def test_what_needs_a_restart(change: Change, running: dict[str, t.Any], reason: str, microvm_spec: t.Any) -> None:
    found = _qemu.restart_reason(change, {**microvm_spec, **running})
    assert reason in found and bool(reason) == bool(found)


def test_the_host_counts_what_goes_over_networks(microvm_spec: t.Any, fake_host: t.Any) -> None:
    sent = {"rx_bytes": "700", "rx_packets": "7", "tx_bytes": "9000", "tx_packets": "90"}  # as the tap device sees it
    fake_host.files({f"/sys/class/net/af0123/statistics/{name}": value for name, value in sent.items()})
    running = _qemu.QemuMachine(fake_host, {**microvm_spec, "networks": [INTERFACE]})
    stats = {"rd_bytes": 4096, "failed_rd_operations": 0, "account_failed": True, "timed_stats": []}
    running.qmp = Qmp({"query-blockstats": [{"qdev": "disk-data", "stats": stats}]})  # type: ignore[assignment]
    assert running.counters() == {
        "disk-data": {"rd_bytes": 4096, "failed_rd_operations": 0},
        "net-agents": {"rx_bytes": 9000, "rx_frames": 90, "tx_bytes": 700, "tx_frames": 7},
    }


def test_only_devices_behind_ports_can_go(microvm_spec: t.Any) -> None:
    spec = {**microvm_spec, "volumes": [VOLUME], "networks": [INTERFACE]}
    assert "pcie-root-port" not in " ".join(_qemu.command(spec))
    argv = _qemu.command({**spec, "hotplug_slots": 2})
    assert sum(word.startswith("pcie-root-port") for word in argv) == 4
    buses = [word.rpartition('"bus": ')[2] for word in argv if '"bus"' in word]
    assert buses == ['"port0"}', '"port1"}']


def test_zones_are_nodes_of_the_guest(microvm_spec: t.Any) -> None:
    zones = [{"size_bytes": 128 << 20, "numa_node": 0}, {"size_bytes": 128 << 20, "numa_node": 2}]
    text = " ".join(_qemu.command({**microvm_spec, "memory_zones": zones, "hugepage_bytes": 2 << 20}))
    assert "id=ram1,size=134217728,share=on,hugetlb=on,hugetlbsize=2097152,dump=off,host-nodes=2,policy=bind" in text
    assert "-numa node,nodeid=1,memdev=ram1 -numa dist,src=0,dst=1,val=20 -numa dist,src=1,dst=0,val=20" in text
    assert "memory-backend=ram0" not in text


def test_devices_have_no_balloon_beside_them(microvm_spec: t.Any) -> None:
    assert "virtio-balloon-pci" in " ".join(_qemu.command(microvm_spec))
    text = " ".join(_qemu.command({**microvm_spec, "devices": ["0000:41:00.0"]}))
    assert "virtio-balloon-pci" not in text and '"id": "device-0000.41.00.0", "host": "0000:41:00.0"' in text


def test_a_guest_is_told_what_its_start_need_not_look_for(microvm_spec: t.Any) -> None:
    argv = _qemu.command({**microvm_spec, "kernel_arguments": ["agentfleet.test=1"]})
    words = argv[argv.index("-append") + 1].split()
    assert {"console=hvc0", "quiet", "pci=lastbus=0", "cryptomgr.notests"} < set(words) and words[
        -1
    ] == "agentfleet.test=1"
    assert "virtio-serial-pci,max_ports=1" in argv
