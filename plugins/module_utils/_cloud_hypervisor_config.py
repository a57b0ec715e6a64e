# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Cloud Hypervisor is told, as typed objects.

This module is private to the collection and imports nothing of Ansible.

Cloud Hypervisor ignores unknown keys of its request bodies, so that a mistyped ``discard_writes`` would give every
guest a writable shared image. Each class here is a schema of its API description, named as there; both the JSON body
and the text of a command line are rendered from its fields, so that no other key can be produced. A field that is
None is not sent. ``tests/contract`` holds all of it against the API description.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field, fields

CLI = "cli"


def _named(cli: str) -> t.Any:
    """A required field whose name on the command line is another one."""
    return field(metadata={CLI: cli})  # pylint: disable=invalid-field-call


def _cli(value: t.Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"[{','.join(_cli(item) for item in value)}]"
    text = str(value)
    if '"' in text:
        raise ValueError(f"Cloud Hypervisor's command line cannot express {text!r}")
    return f'"{text}"' if set(text) & set(",[]") else text


@dataclass(frozen=True)
class Schema:
    """A schema of the API description."""

    def body(self) -> dict[str, t.Any]:
        """The JSON object."""

        def plain(value: t.Any) -> t.Any:
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return value.body() if isinstance(value, Schema) else value

        return {key: plain(value) for key, value in self._given()}

    def text(self) -> str:
        """The value of its command line option: ``key=value,...``."""
        names = {one.name: one.metadata.get(CLI, one.name) for one in fields(self)}
        return ",".join(
            value.text() if isinstance(value, RateLimiterConfig) else f"{names[key]}={_cli(value)}"
            for key, value in self._given()
        )

    def _given(self) -> list[tuple[str, t.Any]]:
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return [(name, value) for name, value in values if value is not None]


@dataclass(frozen=True)
class CpusConfig(Schema):
    """Virtual CPUs; more can be plugged up to the maximum."""

    boot_vcpus: int = _named("boot")
    max_vcpus: int = _named("max")
    nested: bool | None = None


@dataclass(frozen=True)
class MemoryZoneConfig(Schema):
    """A part of the guest's memory, bound to a node of the host or kept in a file."""

    id: str
    size: int
    file: str | None = None
    shared: bool | None = None
    hugepages: bool | None = None
    hugepage_size: int | None = None
    host_numa_node: int | None = None
    hotplug_size: int | None = None


@dataclass(frozen=True)
class MemoryConfig(Schema):
    """The guest's memory; its size is 0 where zones have it."""

    size: int
    thp: bool | None = None
    shared: bool | None = None
    hugepages: bool | None = None
    hugepage_size: int | None = None
    hotplug_method: str | None = None
    hotplug_size: int | None = None
    zones: tuple[MemoryZoneConfig, ...] | None = None

    def body(self) -> dict[str, t.Any]:
        """The JSON object; its command line spells the method in another way."""
        body = super().body()
        if self.hotplug_method:
            body["hotplug_method"] = {"acpi": "Acpi", "virtio-mem": "VirtioMem"}[self.hotplug_method]
        return body

    def text(self) -> str:
        """The option; zones are an option of their own."""
        return ",".join(f"{key}={_cli(value)}" for key, value in self._given() if key != "zones")


@dataclass(frozen=True)
class NumaDistance(Schema):
    """How far another node of the guest is; a local access is 10."""

    destination: int
    distance: int


@dataclass(frozen=True)
class NumaConfig(Schema):
    """A NUMA node of the guest."""

    guest_numa_id: int
    cpus: tuple[int, ...] | None = None
    distances: tuple[NumaDistance, ...] | None = None
    memory_zones: tuple[str, ...] | None = None

    def text(self) -> str:
        """The option; a distance is ``node@distance``."""
        return ",".join(
            f"{key}=[{','.join(f'{one.destination}@{one.distance}' for one in value)}]"
            if key == "distances"
            else f"{key}={_cli(value)}"
            for key, value in self._given()
        )


@dataclass(frozen=True)
class PayloadConfig(Schema):
    """What is booted; each field is an option of its own."""

    kernel: str
    cmdline: str
    initramfs: str | None = None


@dataclass(frozen=True)
class TokenBucket(Schema):
    """So many tokens, filled up again within so many milliseconds."""

    size: int
    refill_time: int


@dataclass(frozen=True)
class RateLimiterConfig(Schema):
    """Limits of a device."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None

    def text(self) -> str:
        """Its part of the device's option."""
        buckets = (("bw", self.bandwidth), ("ops", self.ops))
        return ",".join(f"{name}_size={b.size},{name}_refill_time={b.refill_time}" for name, b in buckets if b)


@dataclass(frozen=True)
class DiskConfig(Schema):
    """A virtio-blk disk. Its image type is always given, since guessing it would trust what a guest wrote."""

    path: str
    readonly: bool
    id: str
    serial: str
    sparse: bool  # whether discarded blocks become holes
    image_type: t.Literal["Raw"] = "Raw"
    rate_limiter_config: RateLimiterConfig | None = None

    def text(self) -> str:
        """The option, which spells the image type in lower case."""
        return super().text().replace("image_type=Raw", "image_type=raw")


@dataclass(frozen=True)
class NetConfig(Schema):
    """A virtio-net device on a tap that exists: without ip, mask, mtu and host_mac, which need privileges."""

    tap: str
    mac: str
    id: str
    rate_limiter_config: RateLimiterConfig | None = None


@dataclass(frozen=True)
class BalloonConfig(Schema):
    """Memory that the guest gives back."""

    size: int
    deflate_on_oom: bool
    free_page_reporting: bool


@dataclass(frozen=True)
class FsConfig(Schema):
    """A share that virtiofsd serves."""

    tag: str
    socket: str
    num_queues: int
    queue_size: int
    id: str


@dataclass(frozen=True)
class PmemConfig(Schema):
    """The image: with ``discard_writes`` opened read-only and mapped privately."""

    file: str
    discard_writes: bool
    id: str


@dataclass(frozen=True)
class ConsoleConfig(Schema):
    """The virtio console."""

    mode: t.Literal["Off", "Tty", "Null"]

    def text(self) -> str:
        """The option is the mode alone."""
        return self.mode.lower()


@dataclass(frozen=True)
class SerialConfig(Schema):
    """The serial port."""

    mode: t.Literal["Off", "Null"]

    def text(self) -> str:
        """The option is the mode alone."""
        return self.mode.lower()


@dataclass(frozen=True)
class DeviceConfig(Schema):
    """A PCI device of the host, bound to vfio-pci."""

    path: str
    id: str


@dataclass(frozen=True)
class VsockConfig(Schema):
    """The guest's vsock; a UNIX socket is its other end."""

    cid: int
    socket: str


@dataclass(frozen=True)
class LandlockConfig(Schema):
    """A path that the confined process may use besides those of its configuration."""

    path: str
    access: t.Literal["r", "rw"]


@dataclass(frozen=True)
class VmConfig(Schema):
    """A whole machine."""

    cpus: CpusConfig
    memory: MemoryConfig
    payload: PayloadConfig
    console: ConsoleConfig
    serial: SerialConfig
    vsock: VsockConfig
    pmem: tuple[PmemConfig, ...]
    disks: tuple[DiskConfig, ...]
    net: tuple[NetConfig, ...] | None = None
    fs: tuple[FsConfig, ...] | None = None
    devices: tuple[DeviceConfig, ...] | None = None
    numa: tuple[NumaConfig, ...] | None = None
    balloon: BalloonConfig | None = None
    landlock_enable: bool = False
    landlock_rules: tuple[LandlockConfig, ...] | None = None

    def arguments(self) -> list[str]:
        """The command line."""
        options: dict[str, tuple[Schema, ...] | None] = {
            "--cpus": (self.cpus,),
            "--memory": (self.memory,),
            "--memory-zone": self.memory.zones,
            "--numa": self.numa,
            "--console": (self.console,),
            "--serial": (self.serial,),
            "--vsock": (self.vsock,),
            "--pmem": self.pmem,
            "--disk": self.disks,
            "--net": self.net,
            "--fs": self.fs,
            "--device": self.devices,
            "--balloon": (self.balloon,) if self.balloon else None,
            "--landlock-rules": self.landlock_rules,
        }
        argv = ["--kernel", self.payload.kernel, "--cmdline", self.payload.cmdline]
        if self.payload.initramfs:
            argv += ["--initramfs", self.payload.initramfs]
        for option, values in options.items():
            if values:
                argv += [option, *(value.text() for value in values)]
        return argv + (["--landlock"] if self.landlock_enable else [])


@dataclass(frozen=True)
class VmResize(Schema):
    """New sizes of a running machine; what is None stays."""

    desired_vcpus: int | None = None
    desired_ram: int | None = None
    desired_balloon: int | None = None


@dataclass(frozen=True)
class VmResizeZone(Schema):
    """New size of a memory zone."""

    id: str
    desired_ram: int


@dataclass(frozen=True)
class VmResizeDisk(Schema):
    """New size of a disk."""

    id: str
    desired_size: int


@dataclass(frozen=True)
class VmRemoveDevice(Schema):
    """A device that goes."""

    id: str


@dataclass(frozen=True)
class VmSnapshotConfig(Schema):
    """Where a snapshot is written."""

    destination_url: str


@dataclass(frozen=True)
class RestoreConfig(Schema):
    """Where a machine is read from; it is paused afterwards."""

    source_url: str


# Path below /api/v1 -> what is sent there, or None; all are PUT.
REQUESTS: dict[str, type[Schema] | None] = {
    "vm.pause": None,
    "vm.resume": None,
    "vm.power-button": None,
    "vm.shutdown": None,
    "vmm.shutdown": None,
    "vm.resize": VmResize,
    "vm.resize-zone": VmResizeZone,
    "vm.resize-disk": VmResizeDisk,
    "vm.add-disk": DiskConfig,
    "vm.add-net": NetConfig,
    "vm.add-pmem": PmemConfig,
    "vm.add-fs": FsConfig,
    "vm.add-device": DeviceConfig,
    "vm.remove-device": VmRemoveDevice,
    "vm.snapshot": VmSnapshotConfig,
    "vm.restore": RestoreConfig,
}
# GET
QUESTIONS = ("vmm.ping", "vm.info", "vm.counters")
