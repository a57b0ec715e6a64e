# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Cloud Hypervisor driver: a spec's machine, and its running machine over its HTTP API.

This module is private to the collection and imports nothing of Ansible.

Every version has a directory of its own, and a microVM keeps the program that it was made with; ``default`` names
the version for new ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils import _cloud_hypervisor_config as config
from ansible_collections.agentfleet.metal.plugins.module_utils._cloud_hypervisor_api import Api, Pending
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_exec import exchange
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    IMAGES,
    VOLUMES,
    credentials,
    run_directory,
    share_socket,
    volume_path,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._network import Interface
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import (
    KERNEL_WORDS,
    STILL_SECONDS,
    Change,
    DataImage,
    Disk,
    Share,
    Spec,
    Unsupported,
    await_memory,
    disks,
    memory_does_not_plug,
    too_many_vcpus,
    volume_stays,
)

HOME = "/opt/agentfleet/cloud-hypervisor"
NO_VERSION = f"{HOME}/default/cloud-hypervisor"  # of a microVM that was declared before there was one
VIRTIO_MEM_ALIGNMENT = 128 << 20  # of what can be plugged
SAVE_SECONDS = 600
SOCKET_SECONDS = 120  # from the process's start


# -- versions ------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Versions that are not used: from the first, up to but without the second."""

    first: tuple[int, ...]
    fixed: tuple[int, ...]
    reason: str

    def applies(self, version: tuple[int, ...]) -> bool:
        """Whether a version is one of them."""
        return self.first <= version < self.fixed


REFUSALS = (
    Refusal(
        (0,), (50, 1),
        "CVE-2026-27211: a guest reads files of the host through the backing file of a qcow2 image",
    ),
    Refusal(
        (0,), (51, 2),
        "CVE-2026-45782: a guest's virtio-blk requests use memory of the host after it was freed",
    ),
    Refusal(
        (52,), (53,),
        "guest RAM is a memfd, so that it is accounted up to twice, and cannot be merged or restored copy-on-write",
    ),
)  # fmt: skip
RECOMMENDED = "53.0"
CLONE_POWER_OFF = "o"


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of ``v53.0`` or ``cloud-hypervisor v53.0-3-gabcdef``; empty if there are none."""
    found = re.search(r"\bv?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


def refusals(version: tuple[int, ...]) -> list[str]:
    """Why a version is not used; empty when it is."""
    return [row.reason for row in REFUSALS if row.applies(version)]


def program(host: Host, before: str) -> str:
    """The default version's own path for a new microVM; one that was made keeps its."""
    if before not in ("", NO_VERSION):
        return before
    link = host.link_name(f"{HOME}/default")
    return f"{HOME}/{link}/cloud-hypervisor" if link else NO_VERSION


def version(host: Host, path: str) -> str:
    """The version that a program tells, such as ``v53.0``; empty when it tells none."""
    found = re.search(r"^cloud-hypervisor (\S+)", host.run([path, "--version"], check=False).stdout)
    return found.group(1) if found else ""


def problem(host: Host, path: str) -> tuple[str, str] | None:
    """Why this host's Cloud Hypervisor cannot be used, with the remedy; None when it can."""
    if not host.exists(path):
        return f"the host has no {path}", "Install Cloud Hypervisor with the role agentfleet.metal.cloud_hypervisor"
    found = version(host, path)
    numbers = parse_version(found)
    if not numbers:
        return f"{path} does not tell its version", "Install it again with the role agentfleet.metal.cloud_hypervisor"
    reasons = refusals(numbers)
    if reasons:
        return (
            f"Cloud Hypervisor {found} is refused: {'; '.join(reasons)}",
            f"Install version {RECOMMENDED} with the role agentfleet.metal.cloud_hypervisor, and make the microVM anew",
        )
    if not host.exists("/dev/kvm"):
        return "the host has no /dev/kvm, and Cloud Hypervisor runs on nothing else", "Use the driver qemu"
    return None


# -- the machine ---------------------------------------------------------------


def unsupported(spec: Spec) -> list[Unsupported]:
    """What of a spec Cloud Hypervisor cannot do."""
    found = []
    if spec["accelerator"] != "kvm":
        found.append(
            Unsupported("driver", "cloud_hypervisor", "Cloud Hypervisor needs KVM", "Use the driver qemu for tcg")
        )
    found += [
        Unsupported(
            f"shares[{index}].dax", "always", "neither Cloud Hypervisor nor virtiofsd has DAX for virtio-fs",
            "Put the data into an image: it is attached as pmem and mounted with DAX; or leave dax out",
        )
        for index, share in enumerate(spec["shares"])
        if share["dax"] == "always"
    ]  # fmt: skip
    pluggable = spec["memory_max_bytes"] - spec["memory_bytes"]
    if pluggable % VIRTIO_MEM_ALIGNMENT:
        found.append(
            Unsupported(
                "memory_max", f"{spec['memory_max_bytes'] >> 20}MiB",
                "what can be plugged is not a multiple of 128 MiB",
                f"Give {(spec['memory_bytes'] + -(-pluggable // VIRTIO_MEM_ALIGNMENT) * VIRTIO_MEM_ALIGNMENT) >> 20}MiB",
            )
        )  # fmt: skip
    if pluggable and spec["memory_file"]:
        found.append(
            Unsupported(
                "memory_max", f"{spec['memory_max_bytes'] >> 20}MiB",
                "memory that clones share cannot be plugged", "Leave memory_max out",
            )
        )  # fmt: skip
    if spec["devices"] and spec["balloon_bytes"]:
        found.append(
            Unsupported(
                "balloon", f"{spec['balloon_bytes'] >> 20}MiB",
                "the memory of a microVM with PCI devices is pinned for their DMA", "Leave balloon out",
            )
        )  # fmt: skip
    if len(spec["memory_zones"]) > 1 and spec["memory_file"]:
        found.append(
            Unsupported(
                "memory_zones", len(spec["memory_zones"]), "memory that clones share is one file", "Give one zone"
            )
        )
    return found


def command(spec: Spec) -> list[str]:
    """Cloud Hypervisor's argv for one microVM; with ``restore_from`` it waits for a snapshot."""
    argv = [spec["program"], "--api-socket", f"path={_api_socket(spec)}", "--seccomp", "true"]
    return argv if spec["restore_from"] else argv + machine_config(spec).arguments()


def unit_lines(spec: Spec) -> list[str]:
    """What the ``[Service]`` section of a unit has besides what all microVMs have; after all other lines."""
    run = run_directory(spec["name"])
    lines = ["LogRateLimitIntervalSec=30", "LogRateLimitBurst=1000"]  # the console is the guest's
    if spec["memory_file"] and not spec["restore_from"]:  # it opens the file and does not make it
        lines.append(f"ExecStartPre=/usr/bin/truncate --size={spec['memory_bytes']} {spec['memory_file']}")
    # It would boot a guest that resets (a kernel panic, say) again by itself and for ever. When it can make no new
    # socket then, it ends instead, and the unit's restart policy and start limit rule.
    closed = f"until [ -S {_vsock_socket(spec)} ]; do sleep 0.05; done; chmod 0555 {run}"
    return [*lines, f'ExecStartPost=+/usr/bin/timeout {SOCKET_SECONDS} /bin/sh -c "{closed}"']


def machine_config(spec: Spec, credentials: str = "%d") -> config.VmConfig:
    """The machine of a spec.

    :param credentials: directory of its configuration disks
    """
    words = [*KERNEL_WORDS]
    if spec["memory_max_bytes"] > spec["memory_bytes"]:
        words.append("memhp_default_state=online_movable")  # what is plugged is used at once, and can be unplugged
    return config.VmConfig(
        # A guest that is no hypervisor need not reach the code for it.
        cpus=config.CpusConfig(spec["vcpus"], spec["vcpus_max"], nested=False),
        memory=_memory(spec),
        numa=_numa(spec),
        payload=config.PayloadConfig(
            spec["kernel"], " ".join([*words, *spec["kernel_arguments"]]), spec["initrd"] or None
        ),
        # The journal of its unit: a file would have no bound, and a terminal's end would be gone once it was read.
        console=config.ConsoleConfig("Tty"),
        serial=config.SerialConfig("Null"),
        vsock=config.VsockConfig(spec["cid"], _vsock_socket(spec)),
        pmem=(
            config.PmemConfig(spec["image_path"], discard_writes=True, id="image"),
            *(_image(image) for image in spec["data_images"]),
        ),
        disks=tuple(_disk(disk, spec) for disk in disks(spec, credentials)),
        net=tuple(_net(network, spec) for network in spec["networks"]) or None,
        fs=tuple(_share(share, spec) for share in spec["shares"]) or None,
        devices=tuple(_device(address) for address in spec["devices"]) or None,
        # A device's DMA goes on to pages that a balloon gave back.
        balloon=None
        if spec["devices"]
        else config.BalloonConfig(
            spec["balloon_bytes"], deflate_on_oom=True, free_page_reporting=spec["free_page_reporting"]
        ),
        landlock_enable=spec["landlock"],
        landlock_rules=_rules(spec) if spec["landlock"] else None,
    )


def _memory(spec: Spec) -> config.MemoryConfig:
    # virtiofsd and clones map the guest's memory; all else works better with private memory.
    shared = bool(spec["shares"] or (spec["memory_file"] and not spec["restore_from"])) or None
    hugepages = bool(spec["hugepage_bytes"]) or None
    pluggable = spec["memory_max_bytes"] - spec["memory_bytes"] or None
    zones = spec["memory_zones"]
    if not spec["memory_file"] and len(zones) == 1 and zones[0]["numa_node"] is None:
        return config.MemoryConfig(
            spec["memory_bytes"],
            thp=spec["thp"],
            shared=shared,
            hugepages=hugepages,
            hugepage_size=spec["hugepage_bytes"] or None,
            hotplug_method="virtio-mem" if pluggable else None,
            hotplug_size=pluggable,
        )
    return config.MemoryConfig(
        0,
        thp=spec["thp"],
        hotplug_method="virtio-mem" if pluggable else None,
        zones=tuple(
            config.MemoryZoneConfig(
                _zone(number),
                zone["size_bytes"],
                file=spec["memory_file"] or None,
                shared=shared,
                hugepages=hugepages,
                hugepage_size=spec["hugepage_bytes"] or None,
                host_numa_node=zone["numa_node"],
                hotplug_size=pluggable if number == 0 else None,
            )
            for number, zone in enumerate(zones)
        ),
    )


def _numa(spec: Spec) -> tuple[config.NumaConfig, ...] | None:
    zones = range(len(spec["memory_zones"]))
    if len(zones) == 1:
        return None
    return tuple(
        config.NumaConfig(
            number,
            cpus=tuple(range(spec["vcpus_max"])) if number == 0 else None,
            distances=tuple(config.NumaDistance(other, 20) for other in zones if other != number),
            memory_zones=(_zone(number),),
        )
        for number in zones
    )


def _zone(number: int) -> str:
    return f"memory{number}"


def _per_second(tokens: int) -> config.TokenBucket | None:
    return config.TokenBucket(tokens, 1000) if tokens else None


def _limits(bytes_per_second: int, operations_per_second: int = 0) -> config.RateLimiterConfig | None:
    if not bytes_per_second and not operations_per_second:
        return None
    return config.RateLimiterConfig(_per_second(bytes_per_second), _per_second(operations_per_second))


def _disk(disk: Disk, spec: Spec) -> config.DiskConfig:
    limits = spec["rate_limits"]
    return config.DiskConfig(
        disk.path,
        disk.readonly,
        id=f"disk-{disk.serial}",
        serial=disk.serial,
        sparse=not disk.readonly,
        rate_limiter_config=_limits(limits["disk_bytes_per_second"], limits["disk_operations_per_second"]),
    )


def _image_id(digest: str) -> str:
    return f"image-{digest[:12]}"


def _image(image: DataImage) -> config.PmemConfig:
    return config.PmemConfig(image["path"], discard_writes=True, id=_image_id(image["digest"]))


def _net(network: Interface, spec: Spec) -> config.NetConfig:
    limit = _limits(spec["rate_limits"]["network_bytes_per_second"])
    return config.NetConfig(network["tap"], network["mac"], id=f"net-{network['network']}", rate_limiter_config=limit)


def _share(share: Share, spec: Spec) -> config.FsConfig:
    return config.FsConfig(share["tag"], share_socket(spec["name"], share["tag"]), 1, 1024, id=f"share-{share['tag']}")


def _device(address: str) -> config.DeviceConfig:
    return config.DeviceConfig(f"/sys/bus/pci/devices/{address}", id=f"device-{address}")


def _rules(spec: Spec) -> tuple[config.LandlockConfig, ...]:
    """What the process may reach besides what it is started with, for sockets, snapshots, and what is plugged later."""
    rules = [
        config.LandlockConfig(run_directory(spec["name"]), "rw"),
        config.LandlockConfig("/dev/net/tun", "rw"),
        config.LandlockConfig("/sys/devices/virtual/net", "r"),  # it reads the flags of its taps
    ]
    if spec["data_images"] or spec["hotplug_slots"]:  # others may come
        rules.append(config.LandlockConfig(IMAGES, "r"))
    if spec["volumes"]:
        rules.append(config.LandlockConfig(f"{VOLUMES}/{spec['name']}", "rw"))
    if spec["devices"]:
        rules += [config.LandlockConfig("/dev/vfio", "rw"), config.LandlockConfig("/sys/devices", "r")]
    return tuple(rules)


# -- changes -------------------------------------------------------------------


def restart_reason(change: Change, running: Spec) -> str:
    """Why a change needs a restart, or empty when it can be applied live."""
    reason = _REASONS.get(change.key)
    return reason(change, running) if reason else f"Cloud Hypervisor reads {change.key} when it starts"


def _balloon(_change: Change, running: Spec) -> str:
    return "it was started without a balloon, since it has PCI devices" if running["devices"] else ""


def _volume(change: Change, running: Spec) -> str:
    if change.before is None and running["landlock"] and not running["volumes"]:
        return "it was started without volumes, and is confined to the directories that it was started with"
    return volume_stays(change)


def _new_or_gone(change: Change, _running: Spec) -> str:
    return (
        "" if change.before is None or change.after is None else f"a {change.key[:-1]} that is attached cannot change"
    )


def _image_change(change: Change, running: Spec) -> str:
    if change.before is None and running["landlock"] and not (running.get("data_images") or running["hotplug_slots"]):
        return "it was started without hotplug_slots, and is confined to the image that it was started with"
    return _new_or_gone(change, running)


def _share_change(change: Change, running: Spec) -> str:
    if change.before is None and not running["shares"]:
        return "it was started without shares, with memory that virtiofsd cannot map"
    return _new_or_gone(change, running)


def _device_change(change: Change, running: Spec) -> str:
    if change.before is None and not running["devices"]:
        return "it was started with a balloon, which PCI devices do not bear"
    return _new_or_gone(change, running)


_REASONS: dict[str, t.Callable[[Change, Spec], str]] = {
    "vcpus": too_many_vcpus,
    "memory_bytes": memory_does_not_plug,
    "balloon_bytes": _balloon,
    "data_images": _image_change,
    "volumes": _volume,
    "networks": _new_or_gone,
    "shares": _share_change,
    "devices": _device_change,
}


# -- the running machine -------------------------------------------------------


def _api_socket(spec: Spec) -> str:
    return f"{run_directory(spec['name'])}/api"


def _vsock_socket(spec: Spec) -> str:
    return f"{run_directory(spec['name'])}/vsock"


def connect(host: Host, spec: Spec, port: int, timeout_seconds: float) -> socket.socket:
    """A connection to a vsock port of the guest, through Cloud Hypervisor's UNIX socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(host.path(_vsock_socket(spec)))
        answer = exchange(connection, f"CONNECT {port}\n".encode(), timeout_seconds, line=True)
        if not answer.endswith(b"\n"):
            raise ConnectionRefusedError(f"nobody listens on the guest's vsock port {port}")
        if not answer.startswith(b"OK "):
            raise ConnectionRefusedError(f"vsock port {port}: {answer.decode(errors='replace').strip()}")
    except BaseException:
        connection.close()
        raise
    return connection


def machine(host: Host, spec: Spec) -> CloudHypervisorMachine:
    """The running machine."""
    return CloudHypervisorMachine(host, spec)


class CloudHypervisorMachine:
    """A running Cloud Hypervisor.

    :param spec: what runs
    """

    def __init__(self, host: Host, spec: Spec) -> None:
        self._host, self._spec = host, spec
        self._api = Api(host.path(_api_socket(spec)))

    def __enter__(self) -> CloudHypervisorMachine:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
            attempt.connect(self._host.path(_api_socket(self._spec)))
        return self

    def __exit__(self, *_exception: object) -> None:
        """Each request has a connection of its own."""

    def version(self) -> str:
        """As the program tells it."""
        return str(self._api.get("vmm.ping")["build_version"])

    def state(self) -> str:
        """``running``, ``paused``, or Cloud Hypervisor's own word."""
        return str(self._api.get("vm.info")["state"]).lower()

    def pause(self) -> None:
        """Stop the virtual CPUs."""
        if self.state() == "running":
            self._api.put("vm.pause")

    def resume(self) -> None:
        """Let them run."""
        if self.state() == "paused":
            self._api.put("vm.resume")

    def power_button(self) -> None:
        """Ask the guest to power off."""
        self._api.put("vm.power-button")

    def shutdown(self) -> None:
        """End the machine; its disks are flushed."""
        self._api.put("vm.shutdown")

    def quit(self) -> None:
        """End Cloud Hypervisor, which may end before it answers."""
        try:
            self._api.put("vmm.shutdown")
        except HostError:
            if self._answers():
                raise

    def _answers(self) -> bool:
        try:
            self._api.get("vmm.ping")
        except HostError:
            return False
        return True

    def counters(self) -> dict[str, dict[str, int]]:
        """Counters of all devices, without latencies of what never happened."""
        return {
            device: {
                key: value
                for key, value in values.items()
                if isinstance(value, int)
                and not isinstance(value, bool)
                and not ("_latency_" in key and not values.get(key.partition("_")[0] + "_ops"))
            }
            for device, values in self._api.get("vm.counters").items()
        }

    def change(self, change: Change, spec: Spec) -> None:
        """Apply one change."""
        reason = restart_reason(change, self._spec)
        if reason:
            raise HostError(reason)
        if change.key == "vcpus":
            self._resize_cpus(change)
        elif change.key == "balloon_bytes":
            self._api.put("vm.resize", config.VmResize(desired_balloon=change.after))
        elif change.key == "memory_bytes":
            self._resize_memory(change.after)
        elif change.key == "volumes" and change.before is not None and change.after is not None:
            size = change.after["size_bytes"]
            self._api.put("vm.resize-disk", config.VmResizeDisk(f"disk-{change.item}", size))
        elif change.after is None:
            self._remove(_id(change))
        else:
            self._add(change, spec)

    def settle(self, change: Change) -> None:
        """Wait until the guest has taken or given memory.

        What it has plugged (before version 52: what it was asked for) and not left to its balloon is one number. A balloon
        may give back some when memory runs out, so that beside one plugged memory is not waited for.
        """
        if change.key == "balloon_bytes":
            await_memory(change, lambda: self._spec["memory_bytes"] - self._memory_bytes())
        elif change.key == "memory_bytes" and not self._spec["balloon_bytes"]:
            await_memory(change, self._memory_bytes)

    def _resize_cpus(self, change: Change) -> None:
        """It tells nowhere how many there are; but what was asked for is refused until the guest has let all go."""
        resize = config.VmResize(desired_vcpus=change.after)
        if change.after > change.before:
            self._api.put("vm.resize", resize)
            return
        self._host.wait(
            lambda: self._taken(resize) and self._taken(resize),
            f"vcpus: the guest did not come down to {change.after}",
            timeout_seconds=STILL_SECONDS,
            interval_seconds=1,
        )

    def _taken(self, resize: config.VmResize) -> bool:
        try:
            self._api.put("vm.resize", resize)
        except Pending:
            return False
        return True

    def _memory_bytes(self) -> int:
        return int(self._api.get("vm.info")["memory_actual_size"])

    def _resize_memory(self, size: int) -> None:
        if _memory(self._spec).zones is None:
            self._api.put("vm.resize", config.VmResize(desired_ram=size))
            return
        others = sum(zone["size_bytes"] for zone in self._spec["memory_zones"][1:])
        self._api.put("vm.resize-zone", config.VmResizeZone(_zone(0), size - others))

    def _add(self, change: Change, spec: Spec) -> None:
        device, tree = _id(change), self._devices()
        # Both come last. Whoever added it was interrupted before that was written down.
        if f"_virtio-pci-{device}" in tree or tree.get(device, {}).get("pci_bdf"):
            return
        if change.key == "volumes":
            path = volume_path(spec["name"], change.item)
            disk = Disk(change.item, path, change.after["readonly"])
            self._api.put("vm.add-disk", _disk(disk, spec))
        elif change.key == "data_images":
            self._api.put("vm.add-pmem", _image(change.after))
        elif change.key == "networks":
            self._api.put("vm.add-net", _net(change.after, spec))
        elif change.key == "shares":
            self._api.put("vm.add-fs", _share(change.after, spec), timeout_seconds=90)  # it waits for virtiofsd
        else:
            self._api.put("vm.add-device", _device(change.item), timeout_seconds=90)  # it maps and pins all memory

    def _remove(self, device: str) -> None:
        """Unplug a device and wait until the guest let it go, since its file or tap is removed next; nothing if it has."""
        if device not in self._devices():
            return
        self._api.put("vm.remove-device", config.VmRemoveDevice(device))
        self._host.wait(
            lambda: device not in self._devices(),
            f"{device}: the guest did not let it go",
            timeout_seconds=30,
        )

    def _devices(self) -> dict[str, t.Any]:
        """Id -> what there is to tell, of all devices and of their transports."""
        return t.cast("dict[str, t.Any]", self._api.get("vm.info").get("device_tree") or {})

    def save(self, directory: str) -> None:
        """Write the paused machine's state into a directory."""
        snapshot = config.VmSnapshotConfig(f"file://{directory}")
        self._api.put("vm.snapshot", snapshot, timeout_seconds=SAVE_SECONDS)

    def load(self, directory: str) -> None:
        """Read a snapshot as this microVM; it is paused afterwards.

        Cloud Hypervisor takes the machine from the snapshot's own ``config.json``, so that it is given another
        directory, in which that file is this microVM's. The snapshot may be mounted for the process alone, so that it
        is read through its root.
        """
        directory_seen = f"/proc/{self._api.get('vmm.ping')['pid']}/root{directory}"
        document = json.loads(self._host.read(f"{directory_seen}/config.json"))
        view = f"{run_directory(self._spec['name'])}/restore"
        shutil.rmtree(self._host.path(view), ignore_errors=True)
        os.makedirs(self._host.path(view))
        os.chmod(self._host.path(view), 0o755)  # the unit's umask would keep the VMM out
        try:
            self._host.write(f"{view}/config.json", json.dumps(adapted(document, self._spec)))
            for name in self._host.names(directory_seen):
                if name != "config.json":
                    os.symlink(f"{directory}/{name}", self._host.path(f"{view}/{name}"))
            self._api.put("vm.restore", config.RestoreConfig(f"file://{view}"), timeout_seconds=SAVE_SECONDS)
        finally:
            shutil.rmtree(self._host.path(view), ignore_errors=True)


# The spec's list -> how its devices' ids begin.
_PREFIXES = {"volumes": "disk", "networks": "net", "shares": "share", "devices": "device"}


def _id(change: Change) -> str:
    """Id of the device that a change is about."""
    return _image_id(change.item) if change.key == "data_images" else f"{_PREFIXES[change.key]}-{change.item}"


def adapted(document: dict[str, t.Any], spec: Spec) -> dict[str, t.Any]:
    """A snapshot's ``config.json`` for another microVM: its own paths, tap, MAC and sockets on the same devices.

    :param document: what Cloud Hypervisor wrote; all that is not the microVM's own stays
    """
    wish = machine_config(spec, credentials(spec["name"])).body()
    result = {**document}
    for key in ("disks", "net", "fs", "devices", "vsock", "landlock_enable", "landlock_rules"):
        if key in wish:
            result[key] = _merged(document.get(key), wish[key])
    for net in result.get("net") or ():
        net.pop("host_mac", None)  # setting it needs privileges, and the tap has its own
    own = {zone["id"]: zone for zone in wish["memory"].get("zones", ())}
    zones = [
        {**zone, "file": own[zone["id"]].get("file"), "shared": own[zone["id"]].get("shared", False)}
        for zone in document["memory"].get("zones") or ()
    ]
    if zones:
        result["memory"] = {**document["memory"], "zones": zones}
    return result


def _merged(old: t.Any, new: t.Any) -> t.Any:
    """New values over old ones; objects of a list belong together by their id."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    if isinstance(new, list) and all(isinstance(one, dict) and "id" in one for one in new):
        known = {one.get("id"): one for one in old or ()}
        return [_merged(known.get(one["id"], {}), one) for one in new]
    return new
