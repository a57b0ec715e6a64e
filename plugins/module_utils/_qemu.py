# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU driver: from a resolved microVM to QEMU's command line.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.plugins.module_utils._store import image_path

PROGRAM = "/usr/bin/qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# 8.2 brought rom=off: a read-only image file that a guest can map privately. Before it, a guest's
# write to its image device kills the machine.
MINIMUM = (8, 2)


def problem(host: Host) -> tuple[str, str] | None:
    """Why this host's QEMU cannot be used, with the remedy; None when it can."""
    if not host.exists(PROGRAM):
        return f"the host has no {PROGRAM}", f"Install the package {PACKAGE}"
    done = host.run([PROGRAM, "--version"], check=False)
    found = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if found is None:
        return f"{PROGRAM} does not tell its version: {done.text}", f"Reinstall the package {PACKAGE}"
    if (int(found.group(1)), int(found.group(2))) < MINIMUM:
        return (
            f"QEMU is {found.group(1)}.{found.group(2)}, which cannot share a read-only image",
            f"Install QEMU {MINIMUM[0]}.{MINIMUM[1]} or newer, for example from the distribution's backports",
        )
    return None


def command(spec: t.Mapping[str, t.Any], image_bytes: int, run: str, config: str) -> list[str]:
    """QEMU's argv for one microVM.

    :param spec: the resolved microVM
    :param run: its directory for sockets
    :param config: path of its configuration disk
    """
    kvm = spec["accelerator"] == "kvm"
    # Room for the image in the guest's device memory, in whole GiB so that images can grow.
    maximum = spec["memory_bytes"] + (-(-image_bytes >> 30) + 1 << 30)
    machine = "q35,smm=off,sata=off,smbus=off,hpet=off,vmport=off,i8042=off,usb=off,graphics=off,dump-guest-core=off"
    argv = [
        PROGRAM,
        "-name", f"{spec['name']},debug-threads=on",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", machine + (",memory-backend=ram" if spec["shares"] else ""),
        "-accel", "kvm" if kvm else "tcg,thread=multi",
        "-cpu", "host" if kvm else "max",
        "-smp", str(spec["vcpus"]),
        "-m", f"size={spec['memory_bytes']}B,maxmem={maximum}B",
        "-kernel", image_path(spec["image_digest"], "kernel"),
        "-initrd", image_path(spec["image_digest"], "initrd"),
        "-append", " ".join(["console=hvc0", "quiet", "panic=-1", "swiotlb=noforce", *spec["kernel_arguments"]]),
        "-chardev", "ringbuf,id=console,size=65536",
        "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console",
        # A private mapping of a file opened read-only: all guests share the host's page cache, and a write
        # of a guest stays its own. With shares it is a ROM (writes are dropped), because virtiofsd maps all
        # writable memory of its guest, and cannot map a file that was opened read-only.
        "-object", f"memory-backend-file,id=image,mem-path={image_path(spec['image_digest'])},size={image_bytes}"
        f",share=off,readonly=on,rom={'on' if spec['shares'] else 'off'},prealloc=off,merge=off,dump=off",
        "-device", "virtio-pmem-pci,memdev=image",
        "-drive", f"if=none,id=config,format=raw,readonly=on,file={config}",
        "-device", "virtio-blk-pci,drive=config,serial=agentfleet-config",
        "-device", f"vhost-vsock-pci,guest-cid={spec['cid']}",
        "-qmp", f"unix:{run}/qmp,server=on,wait=off",
    ]  # fmt: skip
    if spec["shares"]:  # virtiofsd maps the guest's memory, so it must be shareable
        argv += ["-object", f"memory-backend-memfd,id=ram,size={spec['memory_bytes']},share=on"]
    for number, share in enumerate(spec["shares"]):
        socket = f"/run/agentfleet/shares/{spec['name']}:{share['tag']}"
        argv += ["-chardev", f"socket,id=share{number},path={socket}"]
        argv += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={share['tag']}"]
    for number, network in enumerate(spec["networks"]):
        argv += ["-netdev", f"tap,id=net{number},ifname={network['tap']},script=no,downscript=no"]
        argv += ["-device", f"virtio-net-pci,netdev=net{number},mac={network['mac']},romfile="]
    return argv


def console(host: Host, run: str) -> str:
    """The last lines of a running microVM's console."""
    from ansible_collections.agentfleet.metal.plugins.module_utils._qmp import Qmp

    try:
        with Qmp(host.path(f"{run}/qmp")) as qmp:
            return str(qmp.ask("ringbuf-read", device="console", size=4096))
    except (OSError, HostError) as error:
        return f"(no console: {error})"
