# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU driver: a spec's command line, and its running machine over QMP.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import os
import re
import socket

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import run_directory, share_socket
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Change, Disk, Spec, Unsupported, disks

PROGRAM = "/usr/bin/qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# 8.2 brought rom=off: a read-only image file that a guest can map privately. Before it, a guest's
# write to its image device kills the machine.
MINIMUM = (8, 2)
IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


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
    return found


def command(spec: Spec) -> list[str]:
    """QEMU's argv for one microVM."""
    kvm = spec["accelerator"] == "kvm"
    # Room for the image in the guest's device memory, in whole GiB so that images can grow.
    maximum = spec["memory_max_bytes"] + (-(-spec["image_bytes"] >> 30) + 1 << 30)
    machine = "q35,smm=off,sata=off,smbus=off,hpet=off,vmport=off,i8042=off,usb=off,graphics=off,dump-guest-core=off"
    argv = [
        spec["program"],
        "-name", f"{spec['name']},debug-threads=on",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", machine + (",memory-backend=ram" if spec["shares"] or spec["memory_file"] else ""),
        "-accel", "kvm" if kvm else "tcg,thread=multi",
        "-cpu", "host" if kvm else "max",
        "-smp", str(spec["vcpus"]),
        "-m", f"size={spec['memory_bytes']}B,maxmem={maximum}B",
        "-kernel", spec["kernel"],
        *(["-initrd", spec["initrd"]] if spec["initrd"] else []),
        "-append", " ".join(["console=hvc0", "quiet", "panic=-1", "swiotlb=noforce", *spec["kernel_arguments"]]),
        "-chardev", "ringbuf,id=console,size=65536",
        "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console",
        "-object", f"memory-backend-file,id=image,mem-path={spec['image_path']},size={spec['image_bytes']}"
        f",{_image_mapping(spec)},prealloc=off,merge=off,dump=off",
        "-device", "virtio-pmem-pci,memdev=image",
        "-device", f"vhost-vsock-pci,guest-cid={spec['cid']}",
        "-qmp", f"unix:{run_directory(spec['name'])}/qmp,server=on,wait=off",
    ]  # fmt: skip
    for number, disk in enumerate(disks(spec)):
        argv += _disk(number, disk)
    if spec["shares"]:  # virtiofsd maps the guest's memory, so it must be shareable
        argv += ["-object", f"memory-backend-memfd,id=ram,size={spec['memory_bytes']},share=on"]
    elif spec["memory_file"]:
        mapping = "share=off,readonly=on,rom=off" if spec["restore_from"] else "share=on"
        ram = f"memory-backend-file,id=ram,mem-path={spec['memory_file']},size={spec['memory_bytes']},{mapping}"
        argv += ["-object", f"{ram},dump=off"]
    if spec["restore_from"]:  # waits for load(), and is paused after it
        argv += ["-incoming", "defer", "-S"]
    for number, share in enumerate(spec["shares"]):
        argv += ["-chardev", f"socket,id=share{number},path={share_socket(spec['name'], share['tag'])}"]
        argv += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={share['tag']}"]
    for number, network in enumerate(spec["networks"]):
        argv += ["-netdev", f"tap,id=net{number},ifname={network['tap']},script=no,downscript=no"]
        argv += ["-device", f"virtio-net-pci,netdev=net{number},mac={network['mac']},romfile="]
    return argv


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


def _disk(number: int, disk: Disk) -> list[str]:
    readonly = "on" if disk.readonly else "off"
    return [
        "-drive", f"if=none,id=disk{number},format=raw,readonly={readonly},file={disk.path}",
        "-device", f"virtio-blk-pci,drive=disk{number},serial={disk.serial}",
    ]  # fmt: skip


def restart_reason(change: Change, running: Spec) -> str:
    """Why a change needs a restart, or empty when it can be applied live."""
    return f"QEMU reads {change.key} when it starts"


def connect(_host: Host, spec: Spec, port: int, timeout_seconds: float) -> socket.socket:
    """A connection to a vsock port of the guest, through the host's kernel."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect((spec["cid"], port))
    except BaseException:
        connection.close()
        raise
    return connection


def console(host: Host, spec: Spec) -> str:
    """The last lines of a running microVM's console."""
    try:
        with machine(host, spec) as running:
            return running.console()
    except (OSError, HostError) as error:
        return f"(no console: {error})"


def machine(host: Host, spec: Spec) -> QemuMachine:
    """The running machine."""
    return QemuMachine(host.path(f"{run_directory(spec['name'])}/qmp"))


class QemuMachine:
    """A running QEMU.

    :param path: real path of its QMP socket
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> QemuMachine:
        self.qmp = Qmp(self._path)
        return self

    def __exit__(self, *exception: object) -> None:
        self.qmp.__exit__(*exception)

    def console(self) -> str:
        """The end of its console."""
        return str(self.qmp.ask("ringbuf-read", device="console", size=4096))

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
        """Counters of the disks."""
        return {
            str(device["qdev"]): {key: value for key, value in device["stats"].items() if type(value) is int}
            for device in self.qmp.ask("query-blockstats")
        }

    def change(self, change: Change, spec: Spec) -> None:
        """Apply one change."""
        raise HostError(restart_reason(change, spec))

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
