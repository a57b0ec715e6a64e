# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU driver: a spec's command line, and its running machine over QMP.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_exec import bind_reserved
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    LIBRARY,
    run_directory,
    share_socket,
    volume_path,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._network import Interface, counters
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp, Refusal
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import (
    KERNEL_WORDS,
    Change,
    DataImage,
    Disk,
    Spec,
    Unfinished,
    Unsupported,
    await_memory,
    booted_bytes,
    booted_vcpus,
    disks,
    images_bytes,
    memory_does_not_plug,
    too_many_vcpus,
    volume_stays,
)

PROGRAM = "/usr/bin/qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# 8.2 brought rom=off: a read-only image file that a guest can map privately. Before it, a guest's
# write to its image device kills the machine.
MINIMUM = (8, 2)
UNPLUG_SECONDS = 30
FREE_SECONDS = 5  # until QEMU itself has let go what was behind a device
UNDERWAY = "already in the process of unplug"
IMAGE_ROOM = 64 << 30  # for images that are attached while it runs
PERIPHERAL = "/machine/peripheral"  # where devices with an id are
IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


# QEMU saves nothing of virtio-pmem, so that a restored guest waits for ever for the flush of an orderly power-off; it has
# synced before, and -no-reboot makes a reset an end.
CLONE_POWER_OFF = "b"


def program(_host: Host, _before: str) -> str:
    """The distribution's QEMU; there is only one."""
    return PROGRAM


def version(host: Host, path: str) -> str:
    """QEMU's version, with the distribution's package if it tells it; empty when it tells none."""
    found = re.search(r"version (\d+\.\d+\S*(?: \([^)]*\))?)", host.run([path, "--version"], check=False).stdout)
    return found.group(1) if found else ""


def problem(host: Host, path: str) -> tuple[str, str] | None:
    """Why this host's QEMU cannot be used, with the remedy; None when it can."""
    if not host.exists(path):
        return f"the host has no {path}", f"Install the package {PACKAGE}"
    found = version(host, path)
    numbers = [int(number) for number in re.findall(r"\d+", found)[:2]]
    if not numbers:
        return f"{path} does not tell its version", f"Reinstall the package {PACKAGE}"
    if tuple(numbers) < MINIMUM:
        return (
            f"QEMU is {numbers[0]}.{numbers[1]}, which cannot share a read-only image",
            f"Install QEMU {MINIMUM[0]}.{MINIMUM[1]} or newer, for example from the distribution's backports",
        )
    return None


def unsupported(spec: Spec) -> list[Unsupported]:
    """What of a spec QEMU cannot do."""
    found = [
        Unsupported(
            f"shares[{index}].dax", "always", "neither QEMU nor virtiofsd has DAX for virtio-fs",
            "Put the data into an image: it is attached as pmem and mounted with DAX; or leave dax out",
        )
        for index, share in enumerate(spec["shares"])
        if share["dax"] == "always"
    ]  # fmt: skip
    if spec["rate_limits"]["network_bytes_per_second"]:
        found.append(
            Unsupported(
                "rate_limits.network_bytes_per_second", spec["rate_limits"]["network_bytes_per_second"],
                "QEMU has no rate limit for network devices", "Leave it out, or use the driver cloud_hypervisor",
            )
        )  # fmt: skip
    if spec["devices"] and spec["accelerator"] != "kvm":
        found.append(Unsupported("devices", spec["devices"], "PCI devices need KVM", "Leave them out, or use KVM"))
    for key, value, why in (
        ("balloon", spec["balloon_bytes"], "the memory of a microVM with PCI devices is pinned for their DMA"),
        ("memory_zones", spec["memory_file"] and spec["memory_zones"][1:], "memory that clones share is one file"),
        ("shares", spec["memory_file"] and spec["shares"], "virtiofsd cannot map memory that clones share"),
    ):
        if value and (key != "balloon" or spec["devices"]):
            found.append(Unsupported(key, value, why, f"Leave {key} out"))
    return found


# -- the command line ------------------------------------------------------------


def command(spec: Spec) -> list[str]:
    """QEMU's argv for one microVM."""
    kvm = spec["accelerator"] == "kvm"
    maximum = spec["memory_max_bytes"] + _device_memory(spec)
    machine = "q35,smm=off,sata=off,smbus=off,hpet=off,vmport=off,i8042=off,usb=off,graphics=off,dump-guest-core=off"
    # Of the 256 buses that a q35 may have Linux would ask each for each of its 32 devices, an exit each, though ACPI told it
    # the one there is; what is behind ports it finds by these.
    words = [*KERNEL_WORDS, "pci=lastbus=0"]
    if spec["memory_max_bytes"] > spec["memory_bytes"]:
        words.append("memhp_default_state=online_movable")  # what is plugged is used at once, and can be unplugged
    # Linux takes a CPU that is not there at boot for a firmware's mistake, unless it has a socket of its own.
    sockets = spec["vcpus_max"] if spec["vcpus_max"] > spec["vcpus"] else 1
    cores = spec["vcpus_max"] // sockets
    cpus = f"cpus={spec['vcpus']},maxcpus={spec['vcpus_max']},sockets={sockets},cores={cores},threads=1"
    argv = [
        spec["program"],
        "-name", f"{spec['name']},debug-threads=on",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", machine + ("" if spec["memory_zones"][1:] else ",memory-backend=ram0"),
        "-accel", "kvm" if kvm else "tcg,thread=multi",
        "-cpu", "host" if kvm else "max",
        "-smp", cpus,
        "-m", f"size={spec['memory_bytes']}B,maxmem={maximum}B",
        *_memory(spec),
        "-kernel", spec["kernel"],
        *(["-initrd", spec["initrd"]] if spec["initrd"] else []),
        "-append", " ".join([*words, *spec["kernel_arguments"]]),
        # The journal of its unit, which is bounded and still there when QEMU is not.
        "-chardev", "stdio,id=console,signal=off",
        "-device", "virtio-serial-pci,max_ports=1", "-device", "virtconsole,chardev=console",
        "-object", f"memory-backend-file,id=image,mem-path={spec['image_path']},size={spec['image_bytes']}"
        f",{_image_mapping(spec)},prealloc=off,merge=off,dump=off",
        "-device", "virtio-pmem-pci,memdev=image",
        "-device", f"vhost-vsock-pci,guest-cid={spec['cid']}",
        "-qmp", f"unix:{run_directory(spec['name'])}/qmp,server=on,wait=off",
    ]  # fmt: skip
    if spec["restore_from"]:  # waits for load(), and is paused after it
        argv += ["-incoming", "defer", "-S"]
    if _has_balloon(spec):
        reporting = "on" if spec["free_page_reporting"] else "off"
        argv += ["-device", f"virtio-balloon-pci,id=balloon,deflate-on-oom=on,free-page-reporting={reporting}"]
    return argv + _attached(spec)


def _device_memory(spec: Spec) -> int:
    """Addresses for images, in whole GiB so that the root's can grow; they cost nothing before they are used."""
    return (-(-images_bytes(spec) >> 30) + 1 << 30) + (IMAGE_ROOM if spec["hotplug_slots"] else 0)


def unit_lines(spec: Spec) -> list[str]:
    """QEMU has no option for a balloon's size."""
    return [f"ExecStartPost=+{LIBRARY}/microvm-unit settle %i"] if spec["balloon_bytes"] else []


def _memory(spec: Spec) -> list[str]:
    """The guest's RAM, and what can be plugged."""
    zones = spec["memory_zones"]
    argv = []
    for number, zone in enumerate(zones):
        argv += ["-object", _backend(spec, f"ram{number}", zone["size_bytes"], zone["numa_node"])]
        if zones[1:]:
            cpus = f",cpus=0-{spec['vcpus_max'] - 1}" if number == 0 else ""
            argv += ["-numa", f"node,nodeid={number},memdev=ram{number}{cpus}"]
    for number in range(len(zones)):
        argv += [
            word
            for other in range(len(zones))
            if other != number
            for word in ("-numa", f"dist,src={number},dst={other},val=20")
        ]
    pluggable = spec["memory_max_bytes"] - spec["memory_bytes"]
    if pluggable:
        argv += ["-object", _backend(spec, "pluggable", pluggable, zones[0]["numa_node"]) + ",reserve=off"]
        argv += ["-device", "virtio-mem-pci,id=plugged,memdev=pluggable,requested-size=0"]
    return argv


def _backend(spec: Spec, name: str, size: int, node: int | None) -> str:
    """A part of guest RAM.

    QEMU asks for transparent huge pages wherever it can, and a small guest then has nearly all its RAM touched soon.
    Memory of a memfd has them only where the host was told so for shmem, which is off unless somebody turned it on.
    """
    shared = "share=on"
    if spec["memory_file"]:
        shared = "share=off,readonly=on,rom=off" if spec["restore_from"] else shared
        backend = f"memory-backend-file,id={name},mem-path={spec['memory_file']},size={size},{shared}"
    elif spec["hugepage_bytes"]:
        backend = f"memory-backend-memfd,id={name},size={size},{shared},hugetlb=on,hugetlbsize={spec['hugepage_bytes']}"
    elif spec["shares"] or not spec["thp"]:  # virtiofsd maps the guest's memory, so it must be shareable
        backend = f"memory-backend-memfd,id={name},size={size},{shared}"
    else:
        backend = f"memory-backend-ram,id={name},size={size}"
    return backend + ",dump=off" + ("" if node is None else f",host-nodes={node},policy=bind")


def _image_mapping(spec: Spec) -> str:
    """How the image file is mapped; it is opened read-only in any case, so that all guests share its pages.

    Privately: a guest's write stays its own. As a ROM (writes are dropped) in two cases: virtiofsd maps all writable
    memory of its guest, and cannot map a file that was opened read-only; and a state that is saved leaves out what is
    mapped shared, as the image has to be, and QEMU maps a read-only file shared as a ROM alone.
    """
    if spec["shares"]:
        return "share=off,readonly=on,rom=on"
    if spec["memory_file"] and not spec["restore_from"]:
        return "share=on,readonly=on,rom=on"
    return "share=off,readonly=on,rom=off"


def _has_balloon(spec: Spec) -> bool:
    """A device's DMA goes on to pages that a balloon gave back, so there is none beside PCI devices."""
    return bool(spec["free_page_reporting"] or spec["balloon_bytes"]) and not spec["devices"]


def _attached(spec: Spec) -> list[str]:
    """Disks, shares, networks, PCI devices: each as it would also be attached while the machine runs."""
    volumes = {volume["name"] for volume in spec["volumes"]}
    # QEMU takes no image away, and the root's, which comes before them all, is the guest's first.
    parts = [(_image(image, spec), False) for image in spec["data_images"]]
    parts += [(_disk(disk, spec), disk.serial in volumes) for disk in disks(spec)]
    parts += [(_share(spec["name"], share["tag"]), True) for share in spec["shares"]]
    parts += [(_network(network), True) for network in spec["networks"]]
    parts += [(_passed_through(address), True) for address in spec["devices"]]
    argv: list[str] = []
    # Only a device behind a port can be taken away from a running machine. A port makes booting slower.
    removable = [part for part, movable in parts if movable] if spec["hotplug_slots"] else []
    for number in range(len(removable) + spec["hotplug_slots"]):
        argv += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"]
    for part, _movable in parts:
        for option, properties in part.backends:
            argv += [f"-{option}", properties if isinstance(properties, str) else json.dumps(properties)]
        device = dict(part.device)
        if part in removable:
            device["bus"] = f"port{removable.index(part)}"
        argv += ["-device", json.dumps(device)]
    return argv


@dataclass(frozen=True)
class _Part:
    """A device and what is behind it: as command line options, and as QMP commands.

    :param backends: (option of the command line, its properties)
    :param device: properties of ``-device`` and ``device_add``
    :param add: QMP commands that make what is behind it
    :param remove: QMP commands that take that away again
    """

    backends: list[tuple[str, t.Any]]
    device: dict[str, t.Any]
    add: list[tuple[str, dict[str, t.Any]]]
    remove: list[tuple[str, dict[str, t.Any]]]


def _image(image: DataImage, spec: Spec) -> _Part:
    """Mapped as the root's image is."""
    mapped = dict(word.split("=") for word in _image_mapping(spec).split(","))
    backend = {
        "qom-type": "memory-backend-file",
        "id": f"image-{image['digest'][:12]}",
        "mem-path": image["path"],
        "size": image["size_bytes"],
        "share": mapped["share"] == "on",
        "readonly": True,
        "rom": mapped["rom"],
        "prealloc": False,
        "merge": False,
        "dump": False,
    }
    device = {"driver": "virtio-pmem-pci", "id": f"pmem-{image['digest'][:12]}", "memdev": backend["id"]}
    return _Part([("object", backend)], device, [("object-add", backend)], [("object-del", {"id": backend["id"]})])


def _disk(disk: Disk, spec: Spec) -> _Part:
    node = f"disk-{disk.serial}"
    block: dict[str, t.Any] = {
        "driver": "raw",
        "node-name": node,
        "read-only": disk.readonly,
        "discard": "unmap",
        "file": {"driver": "file", "filename": disk.path},
    }
    backends: list[tuple[str, t.Any]] = [("blockdev", block)]
    add: list[tuple[str, dict[str, t.Any]]] = [("blockdev-add", block)]
    remove: list[tuple[str, dict[str, t.Any]]] = [("blockdev-del", {"node-name": node})]
    limits = _throttle(spec)
    if limits and not disk.serial.startswith("agentfleet-"):
        group = {"qom-type": "throttle-group", "id": f"limits-{disk.serial}", "limits": limits}
        filtered = {
            "driver": "throttle",
            "node-name": f"limited-{disk.serial}",
            "throttle-group": group["id"],
            "file": node,
        }
        backends = [("object", group), *backends, ("blockdev", filtered)]
        add = [("object-add", group), *add, ("blockdev-add", filtered)]
        remove = [("blockdev-del", {"node-name": filtered["node-name"]}), *remove, ("object-del", {"id": group["id"]})]
        node = str(filtered["node-name"])
    device = {"driver": "virtio-blk-pci", "id": f"disk-{disk.serial}", "drive": node, "serial": disk.serial}
    return _Part(backends, device, add, remove)


def _throttle(spec: Spec) -> dict[str, int]:
    limits = {
        "bps-total": spec["rate_limits"]["disk_bytes_per_second"],
        "iops-total": spec["rate_limits"]["disk_operations_per_second"],
    }
    return limits if any(limits.values()) else {}


def _share(name: str, tag: str) -> _Part:
    chardev, path = f"share-{tag}", share_socket(name, tag)
    address = {"type": "unix", "data": {"path": path}}
    return _Part(
        [("chardev", f"socket,id={chardev},path={path}")],
        {"driver": "vhost-user-fs-pci", "id": f"share-{tag}", "chardev": chardev, "tag": tag},
        [
            (
                "chardev-add",
                {"id": chardev, "backend": {"type": "socket", "data": {"addr": address, "server": False}}},
            )
        ],
        [("chardev-remove", {"id": chardev})],
    )


def _network(network: Interface) -> _Part:
    netdev = {"type": "tap", "id": network["tap"], "ifname": network["tap"], "script": "no", "downscript": "no"}
    device = {
        "driver": "virtio-net-pci",
        "id": f"net-{network['network']}",
        "netdev": network["tap"],
        "mac": network["mac"],
        "romfile": "",
    }
    return _Part([("netdev", netdev)], device, [("netdev_add", netdev)], [("netdev_del", {"id": network["tap"]})])


def _passed_through(address: str) -> _Part:
    return _Part([], {"driver": "vfio-pci", "id": f"device-{address.replace(':', '.')}", "host": address}, [], [])


# -- changes of a running machine --------------------------------------------------


def restart_reason(change: Change, running: Spec) -> str:
    """Why a change needs a restart, or empty when it can be applied live."""
    reason = _REASONS.get(change.key)
    return reason(change, running) if reason else f"QEMU reads {change.key} when it starts"


def _vcpus(change: Change, running: Spec) -> str:
    if running["accelerator"] != "kvm":
        return "Linux takes no CPU that comes later where it sees no hypervisor that it knows"
    if change.after < booted_vcpus(running):
        return f"the {booted_vcpus(running)} virtual CPUs that it was started with stay"
    return too_many_vcpus(change, running)


def _balloon(change: Change, running: Spec) -> str:
    if change.after >= booted_bytes(running):
        return f"a balloon takes of the {booted_bytes(running) >> 20} MiB that it was started with alone"
    return "" if _has_balloon(running) else "it was started without a balloon"


def _new_or_gone(change: Change, running: Spec) -> str:
    if change.before is not None and change.after is not None:
        return f"one of its {change.key} that is attached cannot change"
    return "" if running["hotplug_slots"] else "it was started without hotplug_slots"


def _volume(change: Change, running: Spec) -> str:
    came_or_went = change.before is None or change.after is None
    return volume_stays(change) or (_new_or_gone(change, running) if came_or_went else "")


def _share_change(change: Change, running: Spec) -> str:
    if change.before is None and not running["shares"]:
        return "it was started without shares, with an image that virtiofsd cannot map"
    return _new_or_gone(change, running)


def _device_change(change: Change, running: Spec) -> str:
    if change.before is None and _has_balloon(running):
        return "it was started with a balloon, which PCI devices do not bear"
    return _new_or_gone(change, running)


def _image_change(change: Change, running: Spec) -> str:
    if change.after is None:
        return "QEMU takes no image away from a running machine"
    if change.after["target"] in [image["target"] for image in running.get("data_images", ())]:
        return "another image is mounted there, which QEMU does not take away"
    if images_bytes(running) + change.after["size_bytes"] > _device_memory(running):
        return "it was started without room for so large an image"
    return _new_or_gone(change, running)


def _limits_change(change: Change, running: Spec) -> str:
    if not _throttle(running) or not any(change.after[key] for key in change.after if key.startswith("disk")):
        return "it was started without limits, or is to have none"
    return ""


_REASONS: dict[str, t.Callable[[Change, Spec], str]] = {
    "vcpus": _vcpus,
    "memory_bytes": memory_does_not_plug,
    "balloon_bytes": _balloon,
    "data_images": _image_change,
    "volumes": _volume,
    "networks": _new_or_gone,
    "shares": _share_change,
    "devices": _device_change,
    "rate_limits": _limits_change,
}


# -- the running machine -----------------------------------------------------------


def connect(_host: Host, spec: Spec, port: int, timeout_seconds: float) -> socket.socket:
    """A connection to a vsock port of the guest, through the host's kernel, by which the guest knows the host's root."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        bind_reserved(connection)
        connection.connect((spec["cid"], port))
    except BaseException:
        connection.close()
        raise
    return connection


def machine(host: Host, spec: Spec) -> QemuMachine:
    """The running machine."""
    return QemuMachine(host, spec)


class QemuMachine:
    """A running QEMU.

    :param spec: what runs
    """

    def __init__(self, host: Host, spec: Spec) -> None:
        self._host, self._spec = host, spec

    def __enter__(self) -> QemuMachine:
        self.qmp = Qmp(self._host.path(f"{run_directory(self._spec['name'])}/qmp"))
        return self

    def __exit__(self, *exception: object) -> None:
        self.qmp.__exit__(*exception)

    def version(self) -> str:
        """As the program tells it."""
        told = self.qmp.ask("query-version")
        numbers = ".".join(str(told["qemu"][part]) for part in ("major", "minor", "micro"))
        return f"{numbers} ({told['package']})" if told["package"] else numbers

    def state(self) -> str:
        """``running``, ``paused``, or QEMU's own word."""
        status = str(self.qmp.ask("query-status")["status"])
        return "paused" if status in ("postmigrate", "prelaunch") else status

    def pause(self) -> None:
        """Stop the virtual CPUs."""
        self.qmp.ask("stop")

    def resume(self) -> None:
        """Let them run."""
        self.qmp.ask("cont")

    def power_button(self) -> None:
        """Ask the guest to power off."""
        self.qmp.ask("system_powerdown")

    def shutdown(self) -> None:
        """End the machine; QEMU flushes its disks."""
        self.quit()

    def quit(self) -> None:
        """End QEMU, which may drop the connection before its answer."""
        self.qmp.last("quit")

    def counters(self) -> dict[str, dict[str, int]]:
        """Counters of the disks, and of the network devices, which QEMU does not count and the host does."""
        disks_of = {
            str(device["qdev"]): {
                key: value
                for key, value in device["stats"].items()
                if isinstance(value, int) and not isinstance(value, bool)
            }
            for device in self.qmp.ask("query-blockstats")
        }
        return {**disks_of, **{f"net-{one['network']}": counters(self._host, one) for one in self._spec["networks"]}}

    def change(self, change: Change, spec: Spec) -> None:
        """Apply one change."""
        if change.key == "vcpus":
            self._resize_cpus(change.after)
        elif change.key == "memory_bytes":
            plugged = change.after - booted_bytes(self._spec)
            self.qmp.ask("qom-set", path="plugged", property="requested-size", value=plugged)
        elif change.key == "balloon_bytes":
            # What is left of what it was started with: QEMU does not count what virtio-mem plugged.
            self.qmp.ask("balloon", value=booted_bytes(self._spec) - change.after)
        elif change.key == "rate_limits":
            for volume in self._spec["volumes"]:
                path = f"/objects/limits-{volume['name']}"
                self.qmp.ask("qom-set", path=path, property="limits", value=_throttle(spec))
        elif change.key == "volumes" and change.before is not None and change.after is not None:
            # The topmost node: one below a throttle grows without it, and the guest sees what the throttle has.
            node = _part(change, self._spec).device["drive"]
            self.qmp.ask("block_resize", **{"node-name": node, "size": change.after["size_bytes"]})
        elif change.after is None:
            self._remove(_part(change, self._spec))
        else:
            self._add(_part(change, self._spec))

    def settle(self, change: Change) -> None:
        """Wait until the guest has taken or given memory."""
        if change.key == "memory_bytes":
            await_memory(change, self._memory_bytes)
        elif change.key == "balloon_bytes":
            await_memory(change, lambda: booted_bytes(self._spec) - int(self.qmp.ask("query-balloon")["actual"]))

    def _memory_bytes(self) -> int:
        """What it was started with, and what its guest has taken of what can be plugged."""
        devices = [one["data"] for one in self.qmp.ask("query-memory-devices")]
        return booted_bytes(self._spec) + sum(int(one["size"]) for one in devices if one.get("id") == "plugged")

    def _resize_cpus(self, wanted: int) -> None:
        cpus = self.qmp.ask("query-hotpluggable-cpus")
        free = [cpu for cpu in reversed(cpus) if "qom-path" not in cpu]
        for cpu in free[: max(0, wanted - len(cpus) + len(free))]:
            number = "-".join(str(value) for _key, value in sorted(cpu["props"].items()))
            self.qmp.ask("device_add", driver=cpu["type"], id=f"cpu-{number}", **cpu["props"])
        plugged = [cpu["qom-path"] for cpu in cpus if cpu.get("qom-path", "").startswith(PERIPHERAL)]
        surplus = len(cpus) - len(free) - wanted
        if surplus > len(plugged):
            raise HostError(f"{len(cpus) - len(free) - len(plugged)} virtual CPUs were there at boot and stay")
        for gone, path in enumerate(plugged[: max(0, surplus)]):
            try:
                self._unplug(path.rpartition("/")[2])
            except HostError as error:
                raise Unfinished(wanted + surplus - gone, str(error)) from error

    def _add(self, part: _Part) -> None:
        """Make what is behind a device, and the device; what of it a call left that was interrupted is gone on with."""
        if part.device["id"] in self._devices():
            return
        bus = self._free_port()
        self._clear(part)
        try:
            for verb, arguments in part.add:
                self.qmp.ask(verb, **arguments)
            self.qmp.ask("device_add", bus=bus, **part.device)
        except Refusal:
            with contextlib.suppress(HostError):  # the first reason is the one to tell
                self._clear(part)
            raise

    def _free_port(self) -> str:
        """The first port that nothing is behind."""
        for bus in self.qmp.ask("query-pci"):
            for device in bus["devices"]:
                if device["qdev_id"].startswith("port") and not device.get("pci_bridge", {}).get("devices"):
                    return str(device["qdev_id"])
        raise HostError("all its hotplug_slots are taken. Declare more of them, which needs a restart")

    def _remove(self, part: _Part) -> None:
        self._unplug(part.device["id"])
        self._clear(part)

    def _clear(self, part: _Part) -> None:
        """Take away what is behind a device that is not there; what has gone is passed over."""
        end = time.monotonic() + FREE_SECONDS
        for verb, arguments in part.remove:
            while True:
                try:
                    self.qmp.ask(verb, **arguments)
                    break
                except Refusal as refusal:
                    if refusal.absent:
                        break
                    if time.monotonic() > end:
                        raise
                time.sleep(0.1)  # the device that was unplugged holds it a little longer

    def _devices(self) -> list[str]:
        """The ids of all devices that have one."""
        return [str(one["name"]) for one in self.qmp.ask("qom-list", path=PERIPHERAL)]

    def _unplug(self, device: str) -> None:
        """Ask the guest to let a device go, and wait until it has; nothing if it has."""
        if device not in self._devices():
            return
        try:
            self.qmp.ask("device_del", id=device)
        except Refusal as refusal:
            if not refusal.absent and UNDERWAY not in str(refusal):
                raise
        end = time.monotonic() + UNPLUG_SECONDS
        while device in self._devices():
            if time.monotonic() > end:
                raise HostError(f"{device}: the guest did not let it go within {UNPLUG_SECONDS} seconds")
            time.sleep(0.1)

    def save(self, directory: str) -> None:
        """Write the paused machine's state to ``state`` in a directory; not what is mapped shared: RAM and image."""
        self.qmp.ask("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        self.qmp.ask("migrate", uri=f"file:{os.path.join(directory, 'state')}")
        self.qmp.wait_migration()

    def load(self, directory: str) -> None:
        """Read what save() wrote."""
        self.qmp.ask("migrate-set-capabilities", capabilities=IGNORE_SHARED)
        self.qmp.ask("migrate-incoming", uri=f"file:{os.path.join(directory, 'state')}")
        self.qmp.wait_migration()


def _part(change: Change, spec: Spec) -> _Part:
    """The device that a change is about."""
    if change.key == "data_images":
        return _image(change.after or change.before, spec)
    if change.key == "volumes":
        volume = change.after or change.before
        return _disk(Disk(change.item, volume_path(spec["name"], change.item), volume["readonly"]), spec)
    if change.key == "shares":
        return _share(spec["name"], change.item)
    if change.key == "networks":
        return _network(change.after or change.before)
    return _passed_through(change.item)
