# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a virtual machine monitor has to bring: the driver protocol, a microVM's spec, and what changes of it mean.

This module is private to the collection and imports nothing of Ansible.

A driver is a module (``_qemu``, ``_cloud_hypervisor``) that has the functions of :class:`Driver`. It knows how
to turn a spec into a command line and how to talk to a running machine, and nothing of systemd, networks or plans.
"""

from __future__ import annotations

import re
import socket
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import volume_path
from ansible_collections.agentfleet.metal.plugins.module_utils._network import Interface
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

AGENT_PORT = 1024
CONFIG_SERIAL, DATA_SERIAL = "agentfleet-config", "agentfleet-data"  # a serial has at most 20 characters
PLUG_BLOCK = 2 << 20  # of virtio-mem
# Until a guest that does not get on with what it was asked for is given up, and until one is that does. Linux tries again
# after 50 seconds to unplug memory that was busy.
STILL_SECONDS, SETTLE_SECONDS = 70, 600
# What every guest's kernel is told. A machine that cannot start is ended. No bounce buffers: nothing here has DMA that is
# limited. No self-tests of its ciphers, which the kernel's builders have run.
KERNEL_WORDS = ("console=hvc0", "quiet", "panic=-1", "swiotlb=noforce", "cryptomgr.notests")


class Zone(t.TypedDict):
    """A part of a guest's memory; with more than one, each is a NUMA node of the guest (CPUs are on the first)."""

    size_bytes: int
    numa_node: int | None  # node of the host that it is bound to; None: where the kernel likes


class Volume(t.TypedDict):
    """A writable disk of one microVM, kept in ``volume_path(spec["name"], volume["name"])``."""

    name: str  # also its serial
    size_bytes: int
    template: str  # host path of the file that it begins as, or empty
    readonly: bool
    mount: str  # mount point in the guest, or empty
    filesystem: str  # that the guest makes if the volume is empty, or empty
    writable_layer: bool  # whether it has the upper layer of the guest's root


class DataImage(t.TypedDict):
    """An image beside the root's, mapped in the same way; the guest finds it by the UUID of its file system."""

    digest: str
    path: str
    size_bytes: int
    uuid: str  # 32 hexadecimal digits
    target: str  # mount point in the guest
    filesystem: str
    options: str  # of the mount


class Share(t.TypedDict):
    """A directory of the host; virtiofsd serves it at ``share_socket(spec["name"], share["tag"])``."""

    tag: str
    source: str
    target: str
    readonly: bool
    dax: str  # "never" or "always"
    cache: str  # one of virtiofsd's policies; unknown to definitions of earlier versions


VIRTIOFSD = "/usr/libexec/virtiofsd"
SHARE_CACHES = ("auto", "always", "metadata", "never")


class Limits(t.TypedDict):
    """Rate limits of each disk and each network device; 0 is unlimited."""

    disk_bytes_per_second: int
    disk_operations_per_second: int
    network_bytes_per_second: int


class Spec(t.TypedDict):
    """A microVM with everything resolved; ``spec.json`` is this. Every key is always there."""

    name: str
    driver: str
    program: str  # path of the VMM, which a microVM keeps until it is made anew
    accelerator: str  # "kvm" or "tcg"
    landlock: bool  # whether the host's kernel can confine a VMM to its own files
    tenant: str
    image: str  # as it was asked for
    image_digest: str
    image_path: str
    image_bytes: int
    data_images: list[DataImage]  # unknown to definitions of earlier versions
    kernel: str  # path
    initrd: str  # path, or empty for a kernel that needs none
    kernel_arguments: list[str]  # besides the driver's console
    vcpus: int
    vcpus_max: int
    memory_bytes: int
    memory_max_bytes: int  # the same as memory_bytes: nothing can be plugged
    memory_zones: list[Zone]  # at least one; their sizes are memory_bytes
    memory_file: str  # file that holds the guest's RAM (with restore_from it is mapped privately), or empty
    hugepage_bytes: int  # size of the host's pages for guest RAM; 0: ordinary ones
    thp: bool  # whether the host may use transparent huge pages for guest RAM
    balloon_bytes: int  # memory that the guest gives back to the host
    free_page_reporting: bool
    cid: int
    config: str  # file name of the configuration disk, below the credentials' directory
    data: str  # the same of the first-boot data's disk, or empty
    hotplug_slots: int  # for devices that are attached while it runs; a driver that needs none takes any number
    volumes: list[Volume]
    shares: list[Share]
    networks: list[Interface]
    devices: list[str]  # PCI addresses, bound to vfio-pci
    rate_limits: Limits
    environment: dict[str, str]
    resources: dict[str, t.Any]  # of its cgroup
    autostart: bool
    restart_policy: str
    restore_from: str  # directory of a snapshot: the command starts a machine that waits for Machine.load; or empty


@dataclass(frozen=True)
class Change:
    """One difference between what runs and what is declared.

    :param key: the spec's key
    :param item: name of the list's item (volume, share tag, network, PCI address), or empty
    :param before: None: the item is new
    :param after: None: the item goes
    """

    key: str
    item: str
    before: t.Any
    after: t.Any

    @property
    def what(self) -> str:
        """What differs, without its values."""
        return f"{self.key} {self.item}".strip()

    def __str__(self) -> str:
        verb = "added" if self.before is None else "removed" if self.after is None else "changed"
        return f"{self.what} {verb}" if self.item else f"{self.what} {self.before!r} -> {self.after!r}"


# Key -> what names an item of its list.
_NAMED = {"volumes": "name", "shares": "tag", "networks": "network", "data_images": "digest"}
# Nothing that the machine itself has: systemd's part, or derived from what is compared anyway.
_OUTSIDE = {"autostart", "restart_policy", "config", "image", "restore_from"}


def changes(before: Spec, after: Spec) -> list[Change]:
    """What differs between a running machine and its declaration; removals come first."""
    found = []
    for key in Spec.__annotations__:
        old, new = before.get(key), after.get(key)
        if old == new or key in _OUTSIDE or (key == "memory_zones" and _zones(before) == _zones(after)):
            continue
        if key in _NAMED or key == "devices":
            olds, news = ({_item(key, one): one for one in t.cast("list[t.Any]", side) or ()} for side in (old, new))
            names = [*(n for n in olds if n not in news), *news]
            found += [Change(key, n, olds.get(n), news.get(n)) for n in names if olds.get(n) != news.get(n)]
        else:
            found.append(Change(key, "", old, new))
    return sorted(found, key=lambda change: change.after is not None)


def applied(running: Spec, change: Change) -> Spec:
    """What runs after one change; of what comes, its guest has not been told then."""
    result = t.cast("dict[str, t.Any]", dict(running))
    if change.key == "vcpus":
        result["vcpus_booted"] = booted_vcpus(running)
    if not change.item:
        result[change.key] = change.after
    else:
        items = [one for one in result.get(change.key, ()) if _item(change.key, one) != change.item]
        result[change.key] = items + ([] if change.after is None else [change.after])
    result["untold"] = [one for one in untold(running) if one != change.what]
    if _is_used(change) or (change.key == "vcpus" and "vcpus" in untold(running)):  # of those that stay some may be new
        result["untold"].append(change.what)
    return t.cast(Spec, result)


def _is_used(change: Change) -> bool:
    """Whether a guest's kernel only sees what comes, and its agent has to take it into use."""
    before, after = change.before, change.after
    if change.key == "vcpus":
        return bool(after > before)
    if change.key == "volumes":  # one that grew
        return bool(before and after and after["filesystem"] and not after["readonly"])
    return change.key in ("networks", "data_images", "shares") and after is not None


def untold(running: Spec) -> list[str]:
    """What was attached and its guest's agent has not said yet that it uses: ``vcpus``, or a key and its item's name."""
    return list(t.cast("dict[str, t.Any]", running).get("untold", ()))


def untold_of(key: str, running: Spec) -> list[t.Any]:
    """The items of one of the spec's lists that its guest's agent has not said yet that it uses."""
    left = untold(running)
    return [one for one in t.cast("dict[str, t.Any]", running).get(key, ()) if f"{key} {_item(key, one)}" in left]


def booted_vcpus(running: Spec) -> int:
    """How many virtual CPUs a machine was started with; its spec says so once their number has changed."""
    return int(t.cast("dict[str, t.Any]", running).get("vcpus_booted", running["vcpus"]))


def too_many_vcpus(change: Change, running: Spec) -> str:
    """Why virtual CPUs cannot be plugged, or empty."""
    if change.after > running["vcpus_max"]:
        return f"it was started for at most {running['vcpus_max']} virtual CPUs"
    return ""


def booted_bytes(running: Spec) -> int:
    """Memory that a machine was started with; what was plugged is in no zone."""
    return sum(zone["size_bytes"] for zone in running["memory_zones"])


def memory_does_not_plug(change: Change, running: Spec) -> str:
    """Why memory cannot be plugged or unplugged by virtio-mem, or empty."""
    booted = booted_bytes(running)
    if change.after > running["memory_max_bytes"]:
        return f"it was started for at most {running['memory_max_bytes'] >> 20} MiB"
    if change.after < booted:
        return f"the {booted >> 20} MiB that it was started with cannot be unplugged; a balloon can take of them"
    if (change.after - booted) % PLUG_BLOCK:
        return "memory is plugged in blocks of 2 MiB"
    return ""


def volume_stays(change: Change) -> str:
    """Why a volume cannot come, go or change while its guest runs, or empty."""
    before, after = change.before, change.after
    if before is None or after is None:
        volume = before or after
        if volume["writable_layer"]:
            return "the guest's root is on it"
        return "the guest mounts volumes when it starts" if volume["mount"] else ""
    grown = {**before, "size_bytes": after["size_bytes"]} == after and after["size_bytes"] > before["size_bytes"]
    return "" if grown else "a volume that is attached can only grow"


def needs_guest(change: Change) -> bool:
    """Whether it is so only when the guest has let something go, or taken or given memory."""
    if change.key in ("memory_bytes", "balloon_bytes"):
        return True
    return change.after is None or (change.key == "vcpus" and change.after < change.before)


class Unfinished(HostError):
    """A guest has not done all that it was asked for.

    :param reached: the spec's value that is so now
    """

    def __init__(self, reached: int, problem: str) -> None:
        super().__init__(problem)
        self.reached = reached


def await_memory(change: Change, look: t.Callable[[], int]) -> None:
    """Wait until a guest has taken or given memory, for as long as it gets on with it; Unfinished when it does not.

    :param look: tells the spec's value that is so now, in bytes
    """
    began = moved = time.monotonic()
    found = look()
    while found != change.after:
        now = time.monotonic()
        if now - moved > STILL_SECONDS or now - began > SETTLE_SECONDS:
            raise Unfinished(
                found,
                f"{change.key}: the guest came to {found >> 20} of {change.after >> 20} MiB. "
                "See what it holds its memory for, and run this again",
            )
        time.sleep(0.1)
        before, found = found, look()
        moved = moved if found == before else time.monotonic()


def images_bytes(spec: Spec) -> int:
    """Size of all images that a microVM maps."""
    return spec["image_bytes"] + sum(image["size_bytes"] for image in spec.get("data_images", ()))


def _item(key: str, item: t.Any) -> str:
    return str(item[_NAMED[key]]) if key in _NAMED else str(item)


def _zones(spec: Spec) -> list[t.Any]:
    """Where the zones are, and how large each of several is; the size of one follows memory_bytes."""
    zones = spec.get("memory_zones", [])
    return [(zone["numa_node"], zone["size_bytes"] if zones[1:] else None) for zone in zones]


@dataclass(frozen=True)
class Unsupported:
    """A wish that a driver cannot fulfil: a row of its capability table that applies."""

    option: str  # below the instance, such as shares[0].dax
    value: t.Any
    problem: str
    remedy: str


@dataclass(frozen=True)
class Disk:
    """A file that the guest sees as a virtio-blk disk."""

    serial: str
    path: str
    readonly: bool


def disks(spec: Spec, credentials: str = "%d") -> list[Disk]:
    """All disks of a microVM besides its image, in their order.

    :param credentials: directory of the configuration disks; by default as a unit's ExecStart has it
    """
    found = [Disk(CONFIG_SERIAL, f"{credentials}/{spec['config']}", True)]
    if spec["data"]:
        found.append(Disk(DATA_SERIAL, f"{credentials}/{spec['data']}", True))
    return found + [
        Disk(volume["name"], volume_path(spec["name"], volume["name"]), volume["readonly"])
        for volume in spec["volumes"]
    ]


def landlock(host: Host) -> bool:
    """Whether the kernel has Landlock with the ABI that VMMs ask for (3, of Linux 6.2)."""
    release = [int(number) for number in re.findall(r"\d+", host.read("/proc/sys/kernel/osrelease"))[:2]]
    return release >= [6, 2] and "landlock" in host.read("/sys/kernel/security/lsm").split(",")


class Connection(socket.socket):
    """A connection to a VMM. One that its guest has taken over can hold nobody, and fill no memory, whatever it answers."""

    ANSWER_BYTES = 8 << 20

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._end, self._left_bytes = 0.0, 0

    def begin(self, timeout_seconds: float) -> None:
        """Give the next question, with all of its answer, this time and ANSWER_BYTES."""
        self._end, self._left_bytes = time.monotonic() + timeout_seconds, self.ANSWER_BYTES
        self.settimeout(timeout_seconds)

    def recv_into(self, buffer: t.Any, nbytes: int = 0, flags: int = 0) -> int:
        """What files that ``makefile`` makes read with."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self.settimeout(left)
        size = super().recv_into(buffer, nbytes, flags)
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise HostError(f"the VMM answers more than {self.ANSWER_BYTES} bytes")
        return size


class Machine(t.Protocol):
    """A running machine; a context manager. What it cannot do raises HostError with the VMM's own words."""

    def __enter__(self) -> Machine:
        """Connect."""

    def __exit__(self, *exception: object) -> None:
        """Disconnect."""

    def version(self) -> str:
        """Exact version of the VMM that runs; what :meth:`Driver.version` tells of its program."""

    def state(self) -> str:
        """``running``, ``paused``, or the VMM's own word."""

    def pause(self) -> None:
        """Stop the virtual CPUs; nothing if they are stopped."""

    def resume(self) -> None:
        """Let them run; nothing if they do."""

    def power_button(self) -> None:
        """Ask the guest to power off."""

    def shutdown(self) -> None:
        """End the machine without asking its guest; written data is flushed."""

    def quit(self) -> None:
        """End the VMM."""

    def counters(self) -> dict[str, dict[str, int]]:
        """Device -> counter -> value."""

    def change(self, change: Change, spec: Spec) -> None:
        """Apply one change that the driver's ``restart_reason`` has nothing against.

        :param spec: the declaration that it comes from
        """

    def settle(self, change: Change) -> None:
        """Wait until a guest has taken or given the memory that a change asked it for, where its VMM tells.

        Raises Unfinished, as ``change`` does where a guest let some of its CPUs go.
        """

    def save(self, directory: str) -> None:
        """Write the paused machine's state, but for the RAM that is in ``memory_file``, into a directory."""

    def load(self, directory: str) -> None:
        """Read what ``save`` wrote into a machine whose spec has ``restore_from``; it is paused afterwards."""


class Driver(t.Protocol):
    """A virtual machine monitor."""

    CLONE_POWER_OFF: str
    """The kernel's SysRq key with which a guest that was restored from a snapshot ends its machine."""

    def program(self, host: Host, before: str, /) -> str:
        """Path of the VMM for a microVM.

        :param before: what it was made with, or empty
        """

    def problem(self, host: Host, program: str, /) -> tuple[str, str] | None:
        """Why this host's VMM cannot be used, with the remedy; None when it can. Needs no running machine."""

    def version(self, host: Host, program: str, /) -> str:
        """Exact version of the VMM; a snapshot is valid for this one only."""

    def unsupported(self, spec: Spec, /) -> list[Unsupported]:
        """What of a spec this driver cannot do. Pure."""

    def command(self, spec: Spec, /) -> list[str]:
        """The VMM's argv; ``%d`` stands for the credentials' directory. Pure."""

    def unit_lines(self, spec: Spec, /) -> list[str]:
        """What the ``[Service]`` section of its unit needs besides for this VMM, after all other lines. Pure."""

    def restart_reason(self, change: Change, running: Spec, /) -> str:
        """Why a change needs a restart, or empty when :meth:`Machine.change` can apply it. Pure."""

    def connect(self, host: Host, spec: Spec, port: int, timeout_seconds: float, /) -> socket.socket:
        """A connection to a vsock port of the guest; OSError when nobody answers."""

    def machine(self, host: Host, spec: Spec, /) -> Machine:
        """The running machine."""


# The classes of a driver's name, and what a user may write.
DRIVERS = ("qemu", "cloud_hypervisor")


def driver(name: str) -> Driver:
    """The driver of this name; only the one that is used is loaded."""
    if name == "qemu":
        from ansible_collections.agentfleet.metal.plugins.module_utils import _qemu

        return _qemu
    if name == "cloud_hypervisor":
        from ansible_collections.agentfleet.metal.plugins.module_utils import _cloud_hypervisor

        return _cloud_hypervisor
    raise KeyError(name)
