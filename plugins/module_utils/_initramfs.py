# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The initramfs of a microVM: modules in loading order, busybox, and the first program.

This module is private to the collection and imports nothing of Ansible.
Everything is computed from the kernel package's files: no depmod, no root.
"""

from __future__ import annotations

import lzma
import os
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

# What a microVM needs; a feature that is built in needs no file.
MODULES = (
    "virtio_pci virtio_pmem nd_pmem virtio_blk virtio_net vmw_vsock_virtio_transport erofs overlay virtiofs "
    "button evdev"
).split()
# Kernel options that must be y or m, with what breaks without them.
KERNEL_OPTIONS = {
    "CONFIG_PVH": "direct boot",
    "CONFIG_VIRTIO_PCI": "every device",
    "CONFIG_VIRTIO_PMEM": "the shared image",
    "CONFIG_BLK_DEV_PMEM": "the shared image",
    "CONFIG_FS_DAX": "mapping the shared image without a copy",
    "CONFIG_EROFS_FS": "the shared image",
    "CONFIG_OVERLAY_FS": "a writable root over the shared image",
    "CONFIG_TMPFS": "a writable root over the shared image",
    "CONFIG_VIRTIO_BLK": "the configuration disk",
    "CONFIG_VIRTIO_NET": "networks",
    "CONFIG_VIRTIO_FS": "shares",
    "CONFIG_VIRTIO_VSOCKETS": "the readiness signal",
    "CONFIG_SERIAL_8250_CONSOLE": "the console",
    "CONFIG_DEVTMPFS": "devices",
}
APPLETS = "sh cat echo grep insmod ip hostname ls mkdir mount poweroff sleep switch_root usleep".split()

INIT = """\
#!/bin/sh
# First program of an agentfleet microVM: modules, shared image, writable layer, name, addresses.
export PATH=/bin
fail() {
    echo "agentfleet: $*" >/dev/console
    poweroff -f
}
mount -t devtmpfs dev /dev && mount -t proc proc /proc && mount -t sysfs sys /sys &&
    mount -t tmpfs -o mode=755,nosuid,nodev run /run || fail "no kernel file systems"
exec </dev/console >/dev/console 2>&1
while read -r module; do
    insmod "/modules/$module" || fail "module $module does not load"
done </modules/order

tries=0
until [ -b /dev/pmem0 ]; do
    tries=$((tries + 1))
    [ $tries -lt 1000 ] || fail "no /dev/pmem0: the image is not attached"
    usleep 10000
done
mkdir -p /run/agentfleet/image
mount -t erofs -o ro,dax=always /dev/pmem0 /run/agentfleet/image || fail "the image does not mount with dax=always"
grep -q ' /run/agentfleet/image erofs [^ ]*dax=always' /proc/mounts || fail "the image is mounted without DAX"
mount -t tmpfs -o mode=755,size=50% upper /upper && mkdir /upper/data /upper/work &&
    mount -t overlay -o lowerdir=/run/agentfleet/image,upperdir=/upper/data,workdir=/upper/work overlay /root ||
    fail "no writable layer"

agentfleet_init=/usr/lib/agentfleet/init
for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial" 2>/dev/null)" = agentfleet-config ] || continue
    cat "/dev/${disk##*/}" >/run/agentfleet/config
    . /run/agentfleet/config
done
[ -z "$agentfleet_hostname" ] || hostname "$agentfleet_hostname"
ip link set lo up
echo "$agentfleet_networks" | while read -r mac address gateway; do
    for device in /sys/class/net/*; do
        [ -n "$mac" ] && [ "$(cat "$device/address")" = "$mac" ] || continue
        ip link set "${device##*/}" up && ip addr add "$address" dev "${device##*/}" || fail "address $address"
        [ -z "$gateway" ] || ip route add default via "$gateway" || fail "gateway $gateway"
    done
done
echo "$agentfleet_shares" | while read -r tag target options; do
    [ -n "$tag" ] || continue
    mkdir -p "/root$target" && mount -t virtiofs -o "$options" "$tag" "/root$target" &&
        ls "/root$target" >/dev/null || fail "share $tag" # mounting alone does not ask the other end
done
for directory in proc sys dev run; do
    mount -o move "/$directory" "/root/$directory" || fail "/$directory does not move to the image"
done
exec switch_root /root "$agentfleet_init"
"""


def check_options(config: str, package: str) -> None:
    """Assert what a microVM needs of its kernel.

    :param config: text of the kernel package's ``/boot/config-*``
    """
    have = {line.partition("=")[0] for line in config.splitlines() if line.endswith(("=y", "=m"))}
    missing = [f"{option} ({use})" for option, use in KERNEL_OPTIONS.items() if option not in have]
    if missing:
        raise HostError(f"the kernel of {package} lacks {', '.join(missing)}. Choose a kernel package that has them")


def module_order(tree: str, names: t.Sequence[str]) -> list[tuple[str, bytes]]:
    """The decompressed modules in an order in which each can be loaded.

    :param tree: ``lib/modules/<release>`` of the unpacked kernel package
    """
    host = Host(tree)
    builtin = {_name(line) for line in host.read("modules.builtin").splitlines()}
    files = {
        _name(name): os.path.join(directory, name)
        for directory, _directories, found in os.walk(tree)
        for name in found
        if ".ko" in name
    }
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in builtin or name in order:
            return
        if name not in files:
            raise HostError(f"the kernel package has no module {name}. Choose a kernel package that has it")
        with open(files[name], "rb") as file:
            data = file.read()
        if files[name].endswith(".xz"):
            data = lzma.decompress(data)
        elif files[name].endswith(".zst"):
            data = _unzstd(files[name])
        for needed in filter(None, _depends(data)):
            add(_name(needed))
        order[name] = data

    for name in names:
        add(name)
    return [(f"{name}.ko", data) for name, data in order.items()]


def _name(path: str) -> str:
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """The modules that a module's own ``.modinfo`` section says it needs."""
    _before, found, rest = module.partition(b"\0depends=")
    return rest.partition(b"\0")[0].decode().split(",") if found else []


def _unzstd(path: str) -> bytes:
    import subprocess

    # Binary output, which Host.run would decode.
    command = ["zstd", "-dcq", path]
    return subprocess.run(command, check=True, capture_output=True).stdout  # pylint: disable=ansible-bad-function


def cpio(entries: t.Iterable[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive of (name, mode with file type, content), reproducible."""
    archive = bytearray()
    number = 0
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def initramfs(modules_tree: str, busybox: bytes) -> bytes:
    """The complete initramfs, uncompressed: unpacking costs more than reading on a small guest."""
    modules = module_order(modules_tree, MODULES)
    entries: list[tuple[str, int, bytes]] = [
        (name, 0o040755, b"") for name in ("bin", "dev", "modules", "proc", "root", "run", "sys", "upper")
    ]
    entries.append(("bin/busybox", 0o100755, busybox))
    entries += [(f"bin/{applet}", 0o120777, b"busybox") for applet in APPLETS]
    entries += [(f"modules/{name}", 0o100644, data) for name, data in modules]
    entries.append(("modules/order", 0o100644, "".join(f"{name}\n" for name, _data in modules).encode()))
    entries.append(("init", 0o100755, INIT.encode()))
    return cpio(entries)
