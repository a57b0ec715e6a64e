# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Cloud Hypervisor driver: command lines, policy, what is hot-applied, and its API on a real UNIX socket."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import socketserver
import stat
import tempfile
import threading
import time
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _cloud_hypervisor as driver
from ansible_collections.agentfleet.metal.plugins.module_utils import _cloud_hypervisor_config as config
from ansible_collections.agentfleet.metal.plugins.module_utils import _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._cloud_hypervisor_api import Api
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Change, changes

PROGRAM = "/opt/agentfleet/cloud-hypervisor/53.0/cloud-hypervisor"
VOLUME = {
    "name": "data", "size_bytes": 1 << 30, "template": "", "readonly": False, "mount": "", "filesystem": "",
    "writable_layer": False,
}  # fmt: skip
IMAGE = {
    "digest": "cd" * 32, "path": "/var/lib/agentfleet/images/cd/rootfs.erofs", "size_bytes": 2 << 30, "uuid": "ee" * 16,
    "target": "/model", "filesystem": "erofs", "options": "ro,dax=always",
}  # fmt: skip
SHARE = {"tag": "models", "source": "/srv/models", "target": "/mnt/models", "readonly": True, "dax": "never"}
NETWORK = {"network": "agents", "tap": "af0", "mac": "02:00:00:00:00:01"}


@pytest.fixture
def spec(microvm_spec: dict[str, t.Any]) -> t.Any:
    """A small microVM."""
    return {**microvm_spec, "driver": "cloud_hypervisor", "program": PROGRAM}


def option(argv: list[str], name: str) -> list[str]:
    """The values of one option."""
    start = argv.index(name) + 1
    end = next((i for i in range(start, len(argv)) if argv[i].startswith("--")), len(argv))
    return argv[start:end]


# -- command lines -------------------------------------------------------------


def test_the_image_is_private_and_nothing_is_shared_by_default(spec: t.Any) -> None:
    argv = driver.command(spec)
    assert argv[:5] == [PROGRAM, "--api-socket", "path=/run/agentfleet/a1/api", "--seccomp", "true"]
    assert option(argv, "--pmem") == [f"file={spec['image_path']},discard_writes=on,id=image"]
    assert option(argv, "--memory") == ["size=268435456,thp=off"]
    assert option(argv, "--cpus") == ["boot=1,max=1,nested=off"]
    assert option(argv, "--console") == ["tty"] and option(argv, "--serial") == ["null"]
    assert option(argv, "--vsock") == ["cid=77,socket=/run/agentfleet/a1/vsock"]
    assert option(argv, "--balloon") == ["size=0,deflate_on_oom=on,free_page_reporting=on"]
    assert option(argv, "--disk") == [
        "path=%d/config-0123456789ab,readonly=on,id=disk-agentfleet-config,serial=agentfleet-config,sparse=off,image_type=raw"
    ]
    assert not {"--net", "--fs", "--device", "--memory-zone", "--numa"} & set(argv)


def test_it_is_confined_where_the_kernel_can(spec: t.Any) -> None:
    assert "--landlock" in driver.command(spec)
    rules = option(driver.command({**spec, "volumes": [VOLUME]}), "--landlock-rules")
    assert "path=/run/agentfleet/a1,access=rw" in rules and "path=/sys/devices/virtual/net,access=r" in rules
    assert "path=/var/lib/agentfleet/volumes/a1,access=rw" in rules
    assert not {"--landlock", "--landlock-rules"} & set(driver.command({**spec, "landlock": False}))


def test_memory_is_shared_with_virtiofsd_alone(spec: t.Any) -> None:
    argv = driver.command({**spec, "shares": [SHARE]})
    assert option(argv, "--memory") == ["size=268435456,thp=off,shared=on"]
    assert option(argv, "--fs") == [
        "tag=models,socket=/run/agentfleet/shares/a1:models,num_queues=1,queue_size=1024,id=share-models"
    ]


def test_a_tap_is_made_before_so_that_no_privilege_is_needed(spec: t.Any) -> None:
    argv = driver.command({**spec, "networks": [NETWORK]})
    assert option(argv, "--net") == ["tap=af0,mac=02:00:00:00:00:01,id=net-agents"]


def test_limits_are_tokens_of_a_second(spec: t.Any) -> None:
    limits = {
        "disk_bytes_per_second": 1 << 20, "disk_operations_per_second": 500, "network_bytes_per_second": 1 << 10,
    }  # fmt: skip
    argv = driver.command({**spec, "rate_limits": limits, "networks": [NETWORK]})
    (disk,), (net,) = option(argv, "--disk"), option(argv, "--net")
    assert disk.endswith(",bw_size=1048576,bw_refill_time=1000,ops_size=500,ops_refill_time=1000")
    assert net.endswith(",bw_size=1024,bw_refill_time=1000")


def test_what_can_be_plugged_is_virtio_mem(spec: t.Any) -> None:
    argv = driver.command({**spec, "memory_max_bytes": 512 << 20, "vcpus_max": 4})
    assert option(argv, "--memory") == ["size=268435456,thp=off,hotplug_method=virtio-mem,hotplug_size=268435456"]
    assert option(argv, "--cpus") == ["boot=1,max=4,nested=off"]


def test_zones_are_nodes_of_the_guest(spec: t.Any) -> None:
    zones = [{"size_bytes": 128 << 20, "numa_node": 0}, {"size_bytes": 128 << 20, "numa_node": 2}]
    argv = driver.command({**spec, "vcpus": 2, "vcpus_max": 2, "memory_zones": zones})
    assert option(argv, "--memory") == ["size=0,thp=off"]
    assert option(argv, "--memory-zone") == [
        "id=memory0,size=134217728,host_numa_node=0", "id=memory1,size=134217728,host_numa_node=2",
    ]  # fmt: skip
    assert option(argv, "--numa") == [
        "guest_numa_id=0,cpus=[0,1],distances=[1@20],memory_zones=[memory0]",
        "guest_numa_id=1,distances=[0@20],memory_zones=[memory1]",
    ]


def test_one_zone_on_another_node_is_no_numa_machine(spec: t.Any) -> None:
    argv = driver.command({**spec, "memory_zones": [{"size_bytes": 256 << 20, "numa_node": 2}]})
    assert option(argv, "--memory-zone") == ["id=memory0,size=268435456,host_numa_node=2"] and "--numa" not in argv


def test_a_device_leaves_no_balloon(spec: t.Any) -> None:
    argv = driver.command({**spec, "devices": ["0000:41:00.0"]})
    assert option(argv, "--device") == ["path=/sys/bus/pci/devices/0000:41:00.0,id=device-0000:41:00.0"]
    assert "--balloon" not in argv


def test_ram_in_a_file_is_shared_while_it_is_saved_from_and_private_in_a_clone(spec: t.Any) -> None:
    parent = {**spec, "memory_file": "/run/agentfleet/a1/ram"}
    (zone,) = option(driver.command(parent), "--memory-zone")
    assert zone == "id=memory0,size=268435456,file=/run/agentfleet/a1/ram,shared=on"
    clone = {**parent, "memory_file": "/run/agentfleet/snapshots/s/ram", "restore_from": "/run/agentfleet/snapshots/s"}
    assert driver.command(clone) == [PROGRAM, "--api-socket", "path=/run/agentfleet/a1/api", "--seccomp", "true"]


def test_its_unit_makes_the_file_for_ram_and_ends_with_its_guest(spec: t.Any) -> None:
    booted = driver.unit_lines({**spec, "memory_file": "/run/agentfleet/a1/ram"})
    assert "ExecStartPre=/usr/bin/truncate --size=268435456 /run/agentfleet/a1/ram" in booted
    assert (
        booted[-1].startswith("ExecStartPost=+/usr/bin/timeout 120 /bin/sh ")
        and "chmod 0555 /run/agentfleet/a1" in booted[-1]
    )
    clone = driver.unit_lines({**spec, "memory_file": "/s/ram", "restore_from": "/s"})
    assert not any(line.startswith("ExecStartPre=") for line in clone)


def test_what_a_command_line_cannot_say_is_no_silent_change() -> None:
    assert config.PmemConfig("/a,b", discard_writes=True, id="x").text() == 'file="/a,b",discard_writes=on,id=x'
    with pytest.raises(ValueError, match="cannot express"):
        config.PmemConfig('/a"b', discard_writes=True, id="x").text()


# -- policy --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("cloud-hypervisor v53.0\nMigration Protocol Versions: 0\n", None),
        ("cloud-hypervisor v51.2.0\n", None),
        ("cloud-hypervisor v51.1\n", "CVE-2026-45782"),
        ("cloud-hypervisor v52.0-4-gabc\n", "memfd"),
        ("something else\n", "does not tell its version"),
    ],
)
def test_the_version_decides(told: str, problem: str | None, fake_host: t.Any) -> None:
    fake_host.files({PROGRAM: "", "/dev/kvm": ""})
    fake_host.answers[f"{PROGRAM} --version"] = told
    found = driver.problem(fake_host, PROGRAM)
    assert (found is None) if problem is None else (found and problem in found[0] and "nstall" in found[1])


def test_without_program_or_kvm(fake_host: t.Any) -> None:
    assert "the host has no" in driver.problem(fake_host, PROGRAM)[0]
    fake_host.files({PROGRAM: ""})
    fake_host.answers[f"{PROGRAM} --version"] = "cloud-hypervisor v53.0\n"
    assert driver.problem(fake_host, PROGRAM) == (
        "the host has no /dev/kvm, and Cloud Hypervisor runs on nothing else", "Use the driver qemu",
    )  # fmt: skip


def test_a_microvm_keeps_its_version_and_a_new_one_gets_the_default(fake_host: t.Any) -> None:
    declared_early = driver.program(fake_host, "")
    fake_host.files({"/opt/agentfleet/cloud-hypervisor/default": "-> 53.0"})
    assert driver.program(fake_host, "") == driver.program(fake_host, declared_early) == PROGRAM
    old = "/opt/agentfleet/cloud-hypervisor/51.2/cloud-hypervisor"
    assert driver.program(fake_host, old) == old
    fake_host.answers[f"{PROGRAM} --version"] = "cloud-hypervisor v53.0-dirty\nMigration Protocol Versions: 0\n"
    assert driver.version(fake_host, PROGRAM) == "v53.0-dirty"


@pytest.mark.parametrize(
    ("changed", "option_named", "remedy"),
    [
        ({"accelerator": "tcg"}, "driver", "Use the driver qemu"),
        ({"shares": [{**SHARE, "dax": "always"}]}, "shares[0].dax", "pmem"),
        ({"memory_max_bytes": 300 << 20}, "memory_max", "Give 384MiB"),
        ({"memory_max_bytes": 384 << 20, "memory_file": "/run/ram"}, "memory_max", "Leave memory_max out"),
        ({"devices": ["0000:01:00.0"], "balloon_bytes": 1 << 20}, "balloon", "Leave balloon out"),
        (
            {"memory_file": "/run/ram", "memory_zones": [{"size_bytes": 128 << 20, "numa_node": n} for n in (0, 2)]},
            "memory_zones", "Give one zone",
        ),
    ],
)  # fmt: skip
def test_unsupported_with_the_remedy(changed: t.Any, option_named: str, remedy: str, spec: t.Any) -> None:
    (found,) = driver.unsupported({**spec, **changed})
    assert found.option == option_named and remedy in found.remedy and found.problem
    assert driver.unsupported(spec) == []


# -- changes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"vcpus_max": 4}, {"vcpus_max": 4, "vcpus": 3}, ""),
        ({}, {"vcpus": 2}, "at most 1 virtual CPUs"),
        ({"memory_max_bytes": 512 << 20}, {"memory_max_bytes": 512 << 20, "memory_bytes": 384 << 20}, ""),
        ({}, {"memory_bytes": 512 << 20}, "at most 256 MiB"),
        ({}, {"memory_bytes": 128 << 20}, "cannot be unplugged"),
        (
            {"memory_max_bytes": 512 << 20},
            {"memory_max_bytes": 512 << 20, "memory_bytes": 257 << 20},
            "blocks of 2 MiB",
        ),
        ({}, {"balloon_bytes": 64 << 20}, ""),
        ({"devices": ["0000:01:00.0"]}, {"devices": ["0000:01:00.0"], "balloon_bytes": 1}, "without a balloon"),
        ({"landlock": False}, {"landlock": False, "volumes": [VOLUME]}, ""),
        ({}, {"volumes": [VOLUME]}, "is confined to the directories"),
        ({"volumes": [VOLUME]}, {"volumes": [VOLUME, {**VOLUME, "name": "more"}]}, ""),
        ({"volumes": [VOLUME]}, {"volumes": []}, ""),
        ({"volumes": [VOLUME]}, {"volumes": [{**VOLUME, "size_bytes": 2 << 30}]}, ""),
        ({"volumes": [VOLUME]}, {"volumes": [{**VOLUME, "size_bytes": 1 << 20}]}, "can only grow"),
        ({"volumes": [VOLUME]}, {"volumes": [{**VOLUME, "readonly": True}]}, "can only grow"),
        ({"volumes": [{**VOLUME, "writable_layer": True}]}, {"volumes": []}, "the guest's root is on it"),
        ({"volumes": [{**VOLUME, "mount": "/data"}]}, {"volumes": []}, "the guest mounts volumes when it starts"),
        ({}, {"data_images": [IMAGE]}, "is confined to the image that it was started with"),
        ({"landlock": False}, {"landlock": False, "data_images": [IMAGE]}, ""),
        ({"hotplug_slots": 1}, {"hotplug_slots": 1, "data_images": [IMAGE]}, ""),
        ({"data_images": [IMAGE]}, {"data_images": []}, ""),
        ({"data_images": [IMAGE]}, {"data_images": [{**IMAGE, "target": "/other"}]}, "cannot change"),
        ({}, {"networks": [NETWORK]}, ""),
        ({"networks": [NETWORK]}, {"networks": [{**NETWORK, "mac": "02:00:00:00:00:02"}]}, "cannot change"),
        ({}, {"shares": [SHARE]}, "without shares"),
        ({"shares": [SHARE]}, {"shares": [SHARE, {**SHARE, "tag": "more"}]}, ""),
        ({"shares": [SHARE]}, {"shares": []}, ""),
        ({}, {"devices": ["0000:01:00.0"]}, "with a balloon"),
        ({"devices": ["0000:01:00.0"]}, {"devices": []}, ""),
        ({}, {"kernel": "/other"}, "reads kernel when it starts"),
        ({}, {"hugepage_bytes": 2 << 20}, "reads hugepage_bytes when it starts"),
    ],
)
def test_what_is_hot_applied_and_what_is_not(before: t.Any, after: t.Any, reason: str, spec: t.Any) -> None:
    running = {**spec, **before}
    (change,) = changes(running, {**spec, **after})
    found = driver.restart_reason(change, running)
    assert (reason in found) if reason else found == ""


def test_memory_shrinks_to_what_it_was_started_with(spec: t.Any) -> None:
    grown = {**spec, "memory_bytes": 512 << 20, "memory_max_bytes": 512 << 20}
    assert driver.restart_reason(Change("memory_bytes", "", 512 << 20, 256 << 20), grown) == ""


# -- the API, on a real UNIX socket ----------------------------------------------


class Server:
    """Answers like Cloud Hypervisor, from a table or by its devices; everything that was asked is kept."""

    def __init__(self, path: str) -> None:
        self.asked: list[tuple[str, str, t.Any]] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.tree: dict[str, dict[str, str]] = {}
        # How often a guest is asked until it lets CPUs go, those it has, and whether it still does; what memory it gives and takes.
        self.slow, self.vcpus, self.leaving = 0, 1, 0
        self.spare, self.balloon = 1 << 40, 0
        self.room, self.memory = 1 << 40, 256 << 20
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                name = self.path.rpartition("/api/v1/")[2]
                server.asked.append((self.command, name, body))
                status, text = server.answers.get(name) or server.answer(name, body)
                if status == 0:  # it ended before it answered
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = handle_any

            def log_message(self, *_arguments: t.Any) -> None:
                """Nothing."""

            def address_string(self) -> str:
                return "client"

        class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.server = UnixServer(path, Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def attach(self, device: str) -> None:
        """Have a device, as the device tree has it: one of VFIO is on the bus itself, of others their transport is."""
        self.tree[device] = {"pci_bdf": "0000:00:07.0"} if device.startswith("device-") else {}
        if not self.tree[device]:
            self.tree[f"_virtio-pci-{device}"] = {"pci_bdf": "0000:00:08.0"}

    def answer(self, name: str, body: t.Any) -> tuple[int, str]:
        """To what no table answers; a guest lets a device go at once."""
        if name == "vm.info":
            told = {"device_tree": self.tree, "memory_actual_size": self.memory - self.balloon}
            return 200, json.dumps({"state": "Running", **told})
        if name == "vm.resize" and "desired_ram" in body:
            self.memory = min(body["desired_ram"], self.room)
        if name == "vm.resize" and "desired_balloon" in body:
            self.balloon = min(body["desired_balloon"], self.spare)
        if name == "vm.resize" and "desired_vcpus" in body:
            if self.leaving:
                self.leaving -= 1
                return 429, ""
            self.leaving = self.slow if body["desired_vcpus"] < self.vcpus else 0
            self.vcpus = body["desired_vcpus"]
        if name.startswith("vm.add-"):
            if body["id"] in self.tree:
                return 500, json.dumps(["Error from API", f"Identifier {body['id']} is not unique"])
            self.attach(body["id"])
        if name == "vm.remove-device":
            if body["id"] not in self.tree:
                return 500, json.dumps(["Error from API", f"Unknown device ID: {body['id']}"])
            self.tree.pop(body["id"])
            self.tree.pop(f"_virtio-pci-{body['id']}", None)
        return 204, ""

    def puts(self) -> list[tuple[str, t.Any]]:
        """What was sent, without the questions."""
        return [(name, body) for method, name, body in self.asked if method == "PUT"]


@pytest.fixture
def machine(spec: t.Any) -> t.Iterator[tuple[driver.CloudHypervisorMachine, Server, driver.Host]]:
    """A machine, its API and its host, below a directory whose name is short enough for UNIX sockets."""
    with tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as root:
        host = driver.Host(root)
        os.makedirs(host.path("/run/agentfleet/a1"))
        server = Server(host.path("/run/agentfleet/a1/api"))
        with driver.machine(host, spec) as found:
            yield found, server, host
        server.server.shutdown()
        server.server.server_close()


def test_life_cycle_requests(machine: t.Any) -> None:
    found, server, _host = machine
    assert found.state() == "running"
    server.answers["vmm.ping"] = 200, '{"build_version": "v53.0", "version": "53.0", "pid": 1}'
    assert found.version() == "v53.0"
    found.resume()
    found.pause()
    server.answers["vm.info"] = 200, '{"state": "Paused"}'
    found.pause()
    found.resume()
    found.power_button()
    found.shutdown()
    assert [name for name, _body in server.puts()] == ["vm.pause", "vm.resume", "vm.power-button", "vm.shutdown"]


def test_changes_become_requests(machine: t.Any, spec: t.Any) -> None:
    found, server, _host = machine
    found._spec = running = {
        **spec, "vcpus_max": 4, "memory_max_bytes": 512 << 20, "volumes": [VOLUME], "shares": [SHARE],
        "networks": [NETWORK], "landlock": False,
    }  # fmt: skip
    after = {
        **running, "vcpus": 2, "memory_bytes": 384 << 20, "balloon_bytes": 32 << 20,
        "volumes": [{**VOLUME, "size_bytes": 2 << 30}, {**VOLUME, "name": "more"}], "networks": [],
        "shares": [SHARE, {**SHARE, "tag": "code"}],
    }  # fmt: skip
    for device in ("disk-data", "net-agents", "share-m"):
        server.attach(device)
    for change in changes(running, after):
        found.change(change, after)
    assert server.puts() == [
        ("vm.remove-device", {"id": "net-agents"}),
        ("vm.resize", {"desired_vcpus": 2}),
        ("vm.resize", {"desired_ram": 384 << 20}),
        ("vm.resize", {"desired_balloon": 32 << 20}),
        ("vm.resize-disk", {"id": "disk-data", "desired_size": 2 << 30}),
        (
            "vm.add-disk",
            {
                "path": "/var/lib/agentfleet/volumes/a1/more", "readonly": False, "id": "disk-more", "serial": "more",
                "sparse": True, "image_type": "Raw",
            },
        ),
        (
            "vm.add-fs",
            {
                "tag": "code", "socket": "/run/agentfleet/shares/a1:code", "num_queues": 1, "queue_size": 1024,
                "id": "share-code",
            },
        ),
    ]  # fmt: skip


def test_images_of_data_are_mapped_as_the_roots(machine: t.Any, spec: t.Any) -> None:
    found, server, _host = machine
    body = {"file": IMAGE["path"], "discard_writes": True, "id": "image-cdcdcdcdcdcd"}
    config_of = driver.machine_config({**spec, "data_images": [IMAGE], "landlock": True})
    assert [one.body() for one in config_of.pmem] == [
        {"file": spec["image_path"], "discard_writes": True, "id": "image"}, body,
    ]  # fmt: skip
    assert config.LandlockConfig("/var/lib/agentfleet/images", "r") in config_of.landlock_rules
    found._spec = {**spec, "hotplug_slots": 1}
    found.change(Change("data_images", IMAGE["digest"], None, IMAGE), spec)
    found.change(Change("data_images", IMAGE["digest"], IMAGE, None), spec)
    assert server.puts() == [("vm.add-pmem", body), ("vm.remove-device", {"id": "image-cdcdcdcdcdcd"})]


@pytest.mark.parametrize("address", ["", "0000:41:00.0"])
def test_a_change_that_was_made_and_not_written_down_is_not_made_again(
    machine: t.Any, spec: t.Any, address: str
) -> None:
    found, server, _host = machine
    found._spec = {**spec, "devices": ["0000:01:00.0"]}
    add = Change("devices", address, None, address) if address else Change("networks", "agents", None, NETWORK)
    remove = Change(add.key, add.item, add.after, None)
    for change in (add, add, remove, remove):
        found.change(change, spec)
    assert [name for name, _body in server.puts()] == [f"vm.add-{'device' if address else 'net'}", "vm.remove-device"]


def test_a_device_that_never_came_to_the_bus_is_none(machine: t.Any, spec: t.Any) -> None:
    found, server, _host = machine
    server.tree["net-agents"] = {}  # what is left of one for which no slot was free
    with pytest.raises(HostError, match="Identifier net-agents is not unique"):
        found.change(Change("networks", "agents", None, NETWORK), spec)


def test_cpus_have_gone_when_cloud_hypervisor_takes_the_same_again(
    machine: t.Any, spec: t.Any, monkeypatch: t.Any
) -> None:
    found, server, _host = machine
    found._spec = {**spec, "vcpus": 4, "vcpus_max": 4}
    server.vcpus, server.slow = 4, 2
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    found.change(Change("vcpus", "", 4, 2), spec)
    assert server.leaving == 0 and server.puts() == [("vm.resize", {"desired_vcpus": 2})] * 5
    server.vcpus, server.slow = 4, 99
    monkeypatch.setattr(driver, "STILL_SECONDS", 0)
    with pytest.raises(HostError, match="the guest did not come down to 2: not within 0 seconds"):
        found.change(Change("vcpus", "", 4, 2), spec)


def test_a_balloon_is_what_the_guest_gave(machine: t.Any, spec: t.Any, monkeypatch: t.Any) -> None:
    found, server, _host = machine
    monkeypatch.setattr(_vmm, "STILL_SECONDS", 0)
    change = Change("balloon_bytes", "", 0, 64 << 20)
    server.spare = 24 << 20
    found.change(change, spec)
    with pytest.raises(_vmm.Unfinished, match="the guest came to 24 of 64 MiB") as short:
        found.settle(change)
    assert short.value.reached == 24 << 20
    server.spare = 1 << 40
    found.change(change, spec)
    found.settle(change)


def test_plugged_memory_is_what_the_guest_took(machine: t.Any, spec: t.Any, monkeypatch: t.Any) -> None:
    found, server, _host = machine
    found._spec = {**spec, "memory_max_bytes": 512 << 20}
    monkeypatch.setattr(_vmm, "STILL_SECONDS", 0)
    change = Change("memory_bytes", "", 256 << 20, 384 << 20)
    server.room = 320 << 20
    found.change(change, spec)
    with pytest.raises(_vmm.Unfinished, match="the guest came to 320 of 384 MiB") as short:
        found.settle(change)
    assert short.value.reached == 320 << 20
    found._spec["balloon_bytes"] = 64 << 20  # of which it may have got back some
    found.settle(change)
    found._spec["balloon_bytes"] = 0
    server.room = 1 << 40
    found.change(change, spec)
    found.settle(change)


def test_a_zone_is_resized_as_a_zone(machine: t.Any, spec: t.Any) -> None:
    found, server, _host = machine
    zones = [{"size_bytes": 128 << 20, "numa_node": 0}, {"size_bytes": 128 << 20, "numa_node": 2}]
    found._spec = {**spec, "memory_zones": zones, "memory_max_bytes": 512 << 20}
    found.change(Change("memory_bytes", "", 256 << 20, 512 << 20), spec)
    assert server.puts() == [("vm.resize-zone", {"id": "memory0", "desired_ram": 384 << 20})]


def test_what_needs_a_restart_is_not_sent(machine: t.Any, spec: t.Any) -> None:
    found, server, _host = machine
    with pytest.raises(HostError, match="at most 1 virtual CPUs"):
        found.change(Change("vcpus", "", 1, 2), spec)
    assert server.asked == []


def test_a_refusal_has_cloud_hypervisors_own_words(machine: t.Any) -> None:
    found, server, _host = machine
    server.answers["vm.power-button"] = 500, '["Error from API", "The VM is not running"]'
    with pytest.raises(HostError, match=r"refused vm.power-button \(500\): Error from API: The VM is not running"):
        found.power_button()


def test_the_end_may_come_before_the_answer(machine: t.Any) -> None:
    found, server, _host = machine
    server.answers.update({"vmm.shutdown": (0, ""), "vmm.ping": (0, "")})
    found.quit()
    server.answers["vmm.ping"] = 200, '{"pid": 1}'
    with pytest.raises(HostError, match="did not answer vmm.shutdown"):
        found.quit()


def test_counters_are_numbers(machine: t.Any) -> None:
    found, server, _host = machine
    server.answers["vm.counters"] = 200, json.dumps(
        {
            "disk-data": {
                "read_bytes": 7, "read_ops": 1, "read_latency_max": 3, "write_ops": 0, "write_latency_max": 2**64 - 1,
                "name": "x",
            }
        }
    )  # fmt: skip
    assert found.counters() == {"disk-data": {"read_bytes": 7, "read_ops": 1, "read_latency_max": 3, "write_ops": 0}}


def test_a_body_that_would_not_be_read_is_not_sent(machine: t.Any) -> None:
    _found, server, host = machine
    api = Api(host.path("/run/agentfleet/a1/api"))
    with pytest.raises(HostError, match="more than the 51200"):
        api.put("vm.add-disk", config.DiskConfig("/" + "x" * 51200, False, id="a", serial="a", sparse=True))
    with pytest.raises(TypeError, match="takes"):
        api.put("vm.add-disk", config.VmRemoveDevice("a"))
    assert server.asked == []


def test_a_wait_is_bounded(spec: t.Any) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as root,
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as silent,
    ):
        silent.bind(f"{root}/api")
        silent.listen()
        with pytest.raises(HostError, match=r"did not answer vm.info within 0.1 seconds"):
            Api(f"{root}/api", timeout_seconds=0.1).get("vm.info")


@pytest.mark.parametrize(
    ("head", "part", "why"),
    [
        (b"HTTP/1.1 200", b"x", "within 0.3 seconds"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", b"x", "within 0.3 seconds"),
        (b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n", b"x" * 65536, "more than 1048576 bytes"),
    ],
)
def test_no_answer_holds_us_or_fills_our_memory(monkeypatch: t.Any, head: bytes, part: bytes, why: str) -> None:
    monkeypatch.setattr(_vmm.Connection, "ANSWER_BYTES", 1 << 20)

    def serve(server: socket.socket) -> None:
        connection, _address = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(head)
            while True:
                connection.sendall(part)
                time.sleep(0.02 if len(part) == 1 else 0)

    with (
        tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as root,
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as server,
    ):
        server.bind(f"{root}/api")
        server.listen()
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(HostError, match=why):
            Api(f"{root}/api", timeout_seconds=0.3 if len(part) == 1 else 30).get("vm.info")
        thread.join(10)


def test_a_machine_that_is_not_there_is_an_os_error(spec: t.Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as root:
        machine = driver.machine(driver.Host(root), spec)
        with pytest.raises(FileNotFoundError):
            machine.__enter__()


def test_snapshots_are_read_as_this_microvm(machine: t.Any, spec: t.Any) -> None:
    found, server, host = machine
    found._spec = {
        **spec, "networks": [{**NETWORK, "tap": "af1", "mac": "02:00:00:00:00:02"}],
        "restore_from": "/run/agentfleet/snapshots/s", "memory_file": "/run/agentfleet/snapshots/s/ram",
    }  # fmt: skip
    document = {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1}, "payload": {"kernel": "/k"},
        "memory": {
            "size": 0, "shared": False,
            "zones": [{"id": "memory0", "size": 268435456, "file": "/run/agentfleet/parent/ram", "shared": True}],
        },
        "disks": [{"id": "disk-agentfleet-config", "path": "/run/credentials/parent/config", "queue_size": 128}],
        "net": [{"id": "net-agents", "tap": "af0", "mac": "02:00:00:00:00:01", "host_mac": "aa:00:00:00:00:00"}],
        "vsock": {"id": "__vsock", "cid": 5, "socket": "/run/agentfleet/parent/vsock"},
        "landlock_enable": True, "landlock_rules": [{"path": "/run/agentfleet/parent", "access": "rw"}],
    }  # fmt: skip
    stored = host.path("/proc/99/root/run/agentfleet/snapshots/s")
    os.makedirs(stored)
    for name, text in (("config.json", json.dumps(document)), ("state.json", "{}"), ("ram", "")):
        with open(f"{stored}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    server.answers["vmm.ping"] = 200, '{"pid": 99}'
    seen: dict[str, t.Any] = {}

    def look() -> None:
        view = host.path("/run/agentfleet/a1/restore")
        seen["names"], seen["mode"] = sorted(os.listdir(view)), stat.S_IMODE(os.stat(view).st_mode)
        seen["state"] = os.readlink(f"{view}/state.json")
        with open(f"{view}/config.json", encoding="utf-8") as file:
            seen["config"] = json.load(file)

    put = found._api.put
    found._api.put = lambda *arguments, **more: (look(), put(*arguments, **more))[1]
    mask = os.umask(0o077)  # of the unit
    try:
        found.load("/run/agentfleet/snapshots/s")
    finally:
        os.umask(mask)
    assert server.puts() == [("vm.restore", {"source_url": "file:///run/agentfleet/a1/restore"})]
    assert seen["names"] == ["config.json", "ram", "state.json"]
    assert seen["mode"] == 0o755, "the VMM is another user"
    assert seen["state"] == "/run/agentfleet/snapshots/s/state.json"
    own = seen["config"]
    assert own["payload"] == {"kernel": "/k"} and own["disks"][0]["queue_size"] == 128
    assert own["disks"][0]["path"] == "/run/credentials/agentfleet-microvm@a1.service/config-0123456789ab"
    assert own["net"] == [{"id": "net-agents", "tap": "af1", "mac": "02:00:00:00:00:02"}]
    assert own["vsock"] == {"id": "__vsock", "cid": 77, "socket": "/run/agentfleet/a1/vsock"}
    assert own["memory"]["zones"] == [
        {"id": "memory0", "size": 268435456, "file": "/run/agentfleet/snapshots/s/ram", "shared": False}
    ]
    assert {"path": "/run/agentfleet/a1", "access": "rw"} in own["landlock_rules"]
    assert {"path": "/run/agentfleet/parent", "access": "rw"} not in own["landlock_rules"]
    assert not os.path.exists(host.path("/run/agentfleet/a1/restore"))


def test_saving_names_the_directory(machine: t.Any) -> None:
    found, server, _host = machine
    found.save("/run/agentfleet/a1/snapshot")
    assert server.puts() == [("vm.snapshot", {"destination_url": "file:///run/agentfleet/a1/snapshot"})]


# -- the guest's vsock -------------------------------------------------------------


@contextlib.contextmanager
def vsock(answer: bytes) -> t.Iterator[tuple[driver.Host, list[bytes]]]:
    """A host whose microVM a1 has a vsock socket that gives one answer."""
    with tempfile.TemporaryDirectory(prefix="ch", dir="/tmp") as root:
        os.makedirs(f"{root}/run/agentfleet/a1")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{root}/run/agentfleet/a1/vsock")
        listener.listen()
        heard: list[bytes] = []

        def serve() -> None:
            connection, _address = listener.accept()
            heard.append(connection.recv(64))
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield driver.Host(root), heard
        thread.join(5)
        listener.close()


def test_a_connection_is_handed_over_after_the_greeting(spec: t.Any) -> None:
    with vsock(b"OK 1073741824\nhello") as (host, heard):
        connection = driver.connect(host, spec, 1024, 5)
        with connection:
            assert connection.recv(5) == b"hello" and heard == [b"CONNECT 1024\n"]


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"x" * 64])
def test_nobody_listens(answer: bytes, spec: t.Any) -> None:
    with vsock(answer) as (host, _heard), pytest.raises(ConnectionRefusedError, match="1024"):
        driver.connect(host, spec, 1024, 5)
