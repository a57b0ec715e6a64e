# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The disk image of lab hosts: a distribution with its own kernel and GRUB, cached by the digest of its definition.

Nothing here needs a loop device, a mount or root: mmdebstrap makes a tar (as an
ordinary user in a user namespace), mke2fs fills a file system from a directory
(under fakeroot where not root), and the MBR is 512 bytes of our own.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import tarfile
import typing as t
import uuid

from ansible_collections.agentfleet.metal.plugins.module_utils import _apt
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

# What a lab host needs so that no role has to install anything: apt takes minutes on an emulated CPU.
PACKAGES = (
    (
        "systemd systemd-sysv udev dbus openssh-server python3 python3-apt iproute2 kmod procps pciutils "  # a manageable host
        "grub-pc-bin grub2-common initramfs-tools "  # its own boot loader
        "cxl daxctl ndctl numactl nvme-cli driverctl "  # hardware
        "virtiofsd qemu-system-x86 qemu-utils erofs-utils busybox-static socat cpio zstd rsync nftables "  # microVMs
        "python3-venv python3-pip libcurl4t64 libibverbs1 libnuma1 librdmacm1t64 curl xfsprogs e2fsprogs"  # pools
    ).split()
)
KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}
COMPONENTS = {"debian": "main", "ubuntu": "main,universe"}
PARTITION_START = 2048  # sectors; GRUB's core.img lies between the MBR and it
FILESYSTEM_MIB = 16383  # the image's own size (sparse); a host's disk may be larger, and the guest grows into it
MINIMUM_DISK = (FILESYSTEM_MIB + 1) << 20

_MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer "
    "xfs_scrub_all.timer man-db.timer systemd-firstboot.service systemd-networkd-wait-online.service "
    "systemd-hwdb-update.service ldconfig.service systemd-journal-catalog-update.service systemd-pstore.service "
    "getty@tty1.service serial-getty@ttyS0.service getty-static.service modprobe@drm.service "
    "cxl-monitor.service ndctl-monitor.service nvmefc-boot-connections.service nvmf-autoconnect.service"
).split()
_PATIENCE_SECONDS = 900
_ENABLED = {
    "multi-user.target.wants/systemd-networkd.service": "/usr/lib/systemd/system/systemd-networkd.service",
    "sysinit.target.wants/systemd-network-generator.service": "/usr/lib/systemd/system/systemd-network-generator.service",
}

# Path -> (mode, text), or (0, target) for a symbolic link. {uuid} is the root file system's.
_FILES: dict[str, tuple[int, str]] = {
    "/etc/fstab": (0o644, "UUID={uuid} / ext4 errors=remount-ro,x-systemd.growfs 0 1\n"),
    "/etc/machine-id": (0o444, ""),  # filled at the first boot from the credential of lab_host
    "/etc/resolv.conf": (0o644, "nameserver 10.0.2.3\n"),
    "/etc/hosts": (0o644, "127.0.0.1 localhost\n::1 localhost\n"),
    "/etc/default/grub": (
        0o644,
        "GRUB_DEFAULT=0\nGRUB_TIMEOUT=0\nGRUB_DISTRIBUTOR=Debian\n"
        'GRUB_CMDLINE_LINUX_DEFAULT=""\nGRUB_CMDLINE_LINUX="console=ttyS0"\n'
        'GRUB_TERMINAL=serial\nGRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"\nGRUB_DISABLE_OS_PROBER=true\n',
    ),
    # A small initramfs: what mounts a lab host's disk, and nothing else.
    "/etc/initramfs-tools/conf.d/agentfleet-lab": (0o644, "MODULES=list\n"),
    "/etc/initramfs-tools/modules": (0o644, "virtio_pci\nvirtio_blk\next4\n"),
    # Asked for by systemd, on a host that has neither Wi-Fi nor VMware; a second each on an emulated CPU.
    "/etc/modprobe.d/agentfleet-lab.conf": (0o644, "blacklist cfg80211\nblacklist vmw_vsock_vmci_transport\n"),
    "/etc/ssh/sshd_config.d/agentfleet-lab.conf": (
        0o644,
        "HostKey /etc/ssh/ssh_host_ed25519_key\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nUseDNS no\n",
    ),
    "/etc/systemd/network/10-lab-uplink.network": (
        0o644,
        # The first NIC is at this address by construction (_lab_qemu.py). Nothing must make it wait: no IPv6, no LLDP.
        "[Match]\nPath=pci-0000:00:02.0\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n"
        "[DHCPv4]\nUseHostname=no\n",
    ),
    # A busy emulated CPU needs a minute for the module kvm_amd alone: what is late there has not failed.
    "/etc/systemd/system.conf.d/agentfleet-lab.conf": (
        0o644,
        f"[Manager]\nDefaultTimeoutStartSec={_PATIENCE_SECONDS}\nDefaultDeviceTimeoutSec={_PATIENCE_SECONDS}\n",
    ),
    "/etc/systemd/system/systemd-.service.d/agentfleet-lab.conf": (  # they have limits of their own
        0o644,
        f"[Service]\nTimeoutStartSec={_PATIENCE_SECONDS}\n",
    ),
    "/etc/udev/udev.conf.d/agentfleet-lab.conf": (0o644, f"event_timeout={_PATIENCE_SECONDS}\n"),
    **{f"/etc/systemd/system/{unit}": (0, "/dev/null") for unit in _MASKED},
    **{f"/etc/systemd/system/{link}": (0, target) for link, target in _ENABLED.items()},
}

# Runs in the new system: GRUB's files, and its configuration as update-grub writes it on the running host.
# grub-probe cannot see a disk that does not exist yet, so that for this one run its answers are given.
_SETUP = """\
mkdir -p /boot/grub/i386-pc /dev/disk/by-uuid
cp /usr/lib/grub/i386-pc/*.mod /usr/lib/grub/i386-pc/*.lst /usr/lib/grub/i386-pc/boot.img /boot/grub/i386-pc/
grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /boot/grub/i386-pc/core.img biosdisk part_msdos ext2
grub-editenv /boot/grub/grubenv create
mv /usr/sbin/grub-probe /usr/sbin/grub-probe.real
cat >/usr/sbin/grub-probe <<'END'
#!/bin/sh
case "$*" in
*fs_uuid*) echo {uuid} ;;
*partuuid*) echo {signature}-01 ;;
*compatibility_hint*) echo hd0,msdos1 ;;
*partmap*) echo msdos ;;
*target=device*) echo /dev/vda1 ;;
*target=disk*) echo /dev/vda ;;
*target=fs*) echo ext2 ;;
esac
END
chmod 755 /usr/sbin/grub-probe
touch /dev/disk/by-uuid/{uuid}
update-grub
mv /usr/sbin/grub-probe.real /usr/sbin/grub-probe
rm -r /dev/disk
rm -f /etc/ssh/ssh_host_*_key*
"""

# Unpacks the tars in order and makes the file system of the result; arguments: size in MiB, UUID.
_ASSEMBLE = """\
mkdir root
tar -C root -xpf root.tar
tar -C root -xpf files.tar
rm -f root/etc/hostname
mke2fs -q -t ext4 -U "$2" -L lab-root -i 32768 -E offset=1048576,lazy_itable_init=0 -d root disk.raw "$1"M
"""


def definition(
    distribution: str, suite: str, packages: t.Sequence[str], files: t.Mapping[str, str]
) -> dict[str, t.Any]:
    """All that decides what is in an image; the mirror and the keys do not."""
    return {
        "recipe": hashlib.sha256(repr((_FILES, _SETUP, _ASSEMBLE, FILESYSTEM_MIB)).encode()).hexdigest(),
        "distribution": distribution,
        "suite": suite,
        "packages": sorted({*PACKAGES, KERNELS[distribution], *packages}),
        "files": dict(files),
    }


def digest_of(wanted: t.Mapping[str, t.Any]) -> str:
    """The SHA-256 of a definition."""
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def os_release(host: Host) -> dict[str, str]:
    """The fields of /etc/os-release."""
    pairs = (line.partition("=") for line in host.read("/etc/os-release").splitlines())
    return {key: value.strip("\"'") for key, _equal, value in pairs}


# -- the image ------------------------------------------------------------------


def mbr(boot_code: bytes, signature: int, disk_sectors: int) -> bytes:
    """A master boot record with one active Linux partition from PARTITION_START to the disk's end."""
    entry = struct.pack(
        "<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", PARTITION_START, disk_sectors - PARTITION_START
    )
    return boot_code[:440] + struct.pack("<IH", signature, 0) + entry + bytes(48) + b"\x55\xaa"


class LabImage:
    """One image in the cache: present or not, by digest."""

    audited = False  # work of the controller, not a change of a host

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        """Find the suite, the mirror and the keyring; raises Refused before anything is made."""
        self.host = host
        release = os_release(host)
        self.distribution = params.get("distribution") or (
            release.get("ID", "") if release.get("ID") in KERNELS else "debian"
        )
        if self.distribution not in KERNELS:
            raise Refused("distribution", self.distribution, "no host image of it is known", "Use debian or ubuntu")
        own = release.get("ID") == self.distribution
        codename = release.get("VERSION_CODENAME", "") if own else ""
        self.suite = params.get("suite") or ("trixie" if self.distribution == "debian" else codename)
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.suite):
            raise Refused("suite", self.suite, "not the name of a suite", "Give a code name such as trixie")
        for index, package in enumerate(params.get("packages") or []):
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
                raise Refused(f"packages[{index}]", package, "not a package's name", "Give a name such as strace")
        for path in params.get("files") or {}:
            if not path.startswith("/") or ".." in path.split("/"):
                raise Refused("files", path, "not an absolute path", "Give paths in the image such as /etc/motd")
        self.mirror = params.get("mirror") or _apt.mirror_of(host, self.distribution)
        self.keyring = params.get("keyring") or f"/usr/share/keyrings/{self.distribution}-archive-keyring.gpg"
        self.cache = os.path.realpath(os.path.expanduser(params["cache_dir"]))
        self.definition = definition(
            self.distribution, self.suite, params.get("packages") or [], params.get("files") or {}
        )
        self.digest = digest_of(self.definition)
        self.path = os.path.join(self.cache, self.digest[:16])

    def observe(self) -> dict[str, t.Any]:
        """Whether the image is there, and what is missing to make it."""
        programs = ["mmdebstrap", "mke2fs", "ssh-keygen", "tar"] + ([] if os.geteuid() == 0 else ["fakeroot"])
        return {
            "present": self.host.exists(os.path.join(self.path, "disk.raw")),
            "missing": [name for name in programs if not self.host.has_program(name)],
            "keyring": self.host.exists(self.keyring),
        }

    def plan(self, observed: t.Any) -> list[Step]:
        """One step: build it, or none."""
        if observed["present"]:
            return []
        if not self.mirror:
            raise Refused(
                "mirror",
                None,
                f"this machine's apt sources name no {self.distribution} mirror",
                "Set lab_mirror to its URL",
            )
        if not observed["keyring"]:
            raise Refused(
                "keyring",
                self.keyring,
                "no such file, so that packages cannot be verified",
                f"Install {self.distribution}-archive-keyring, or set lab_keyring",
            )
        if observed["missing"]:
            raise Refused(
                "cache_dir",
                self.path,
                f"the image is not cached and cannot be built without {', '.join(observed['missing'])}",
                "Install the packages mmdebstrap, e2fsprogs, openssh-client, tar and fakeroot",
            )
        return [
            Step(
                "build",
                self.path,
                after={"suite": self.suite, "packages": self.definition["packages"], "digest": self.digest},
                why="no image of this definition is cached",
            )
        ]

    def result(self, observed: t.Any) -> dict[str, t.Any]:
        """Where the image is."""
        return {
            "image": {"path": self.path, "digest": self.digest, "suite": self.suite, "present": observed["present"]}
        }

    def apply(self, step: Step) -> None:
        """Build beside the final name and rename: an image in the cache is always whole."""
        os.makedirs(self.cache, mode=0o700, exist_ok=True)
        with open(self.path + ".lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.observe()["present"]:
                return  # another lab has built it meanwhile
            partial = self.path + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial, mode=0o700)
            try:
                self._build(partial)
                os.rename(partial, self.path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _build(self, place: str) -> None:
        root_uuid = str(uuid.UUID(self.digest[:32]))
        signature = int(self.digest[:8], 16)
        fill = {"{uuid}": root_uuid, "{signature}": f"{signature:08x}"}
        for name in ("id_ed25519", "host_ed25519"):
            self.host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", os.path.join(place, name)])
        files = {**_FILES, **{path: (0o644, text) for path, text in self.definition["files"].items()}}
        files["/root/.ssh/authorized_keys"] = (0o600, _text(place, "id_ed25519.pub"))
        files["/etc/ssh/ssh_host_ed25519_key"] = (0o600, _text(place, "host_ed25519"))
        files["/etc/ssh/ssh_host_ed25519_key.pub"] = (0o644, _text(place, "host_ed25519.pub"))
        _write_tar(
            os.path.join(place, "files.tar"), {path: (mode, _fill(text, fill)) for path, (mode, text) in files.items()}
        )
        excludes = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
        self.host.run(
            ["mmdebstrap", "--variant=minbase", "--format=tar", f"--keyring={self.keyring}"]
            + [f"--components={COMPONENTS[self.distribution]}", "--include=" + ",".join(self.definition["packages"])]
            + ['--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io", *excludes, "--skip=cleanup/apt/lists"]
            # Our files come before the packages (so that the initramfs is made once) and again at the end. A hook of
            # an ordinary user runs under another user id, which cannot read our files: the script is in its words.
            + [f"--essential-hook=tar-in {shlex.quote(place)}/files.tar /"]
            + [f'--customize-hook=chroot "$1" sh -ec {shlex.quote(_fill(_SETUP, fill))}']
            + [self.suite, os.path.join(place, "root.tar"), str(self.mirror)],
            timeout_seconds=1800,
        )
        assemble = ["sh", "-ec", 'cd "$3"\n' + _ASSEMBLE, "assemble", str(FILESYSTEM_MIB), root_uuid, place]
        self.host.run(assemble if os.geteuid() == 0 else ["fakeroot", *assemble], timeout_seconds=600)
        with tarfile.open(os.path.join(place, "root.tar")) as tar:
            boot, core = (_member(tar, f"./boot/grub/i386-pc/{name}") for name in ("boot.img", "core.img"))
        if len(core) > (PARTITION_START - 1) * 512:
            raise HostError(f"GRUB's core image has {len(core)} bytes and does not fit before the first partition")
        with open(os.path.join(place, "disk.raw"), "r+b") as disk:
            disk.truncate(MINIMUM_DISK)
            disk.write(mbr(boot, signature, MINIMUM_DISK // 512) + core)
        os.chmod(os.path.join(place, "disk.raw"), 0o444)
        for name in ("root.tar", "files.tar", "host_ed25519"):
            os.unlink(os.path.join(place, name))
        shutil.rmtree(os.path.join(place, "root"))
        with open(os.path.join(place, "definition.json"), "w", encoding="utf-8") as file:
            json.dump(self.definition, file, indent=2, sort_keys=True)


def _text(place: str, name: str) -> str:
    with open(os.path.join(place, name), encoding="utf-8") as file:
        return file.read()


def _fill(text: str, values: t.Mapping[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def _write_tar(path: str, files: t.Mapping[str, tuple[int, str]]) -> None:
    """A tar of root-owned files (mode 0 means a symbolic link to the text)."""
    with tarfile.open(path, "w") as tar:
        made: set[str] = set()
        for name, (mode, text) in sorted(files.items()):
            parent = os.path.dirname(name)
            if parent.startswith("/root") and parent not in made:
                made.add(parent)
                directory = tarfile.TarInfo("." + parent)
                directory.type, directory.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(directory)
            member = tarfile.TarInfo("." + name)
            if mode == 0:
                member.type, member.linkname = tarfile.SYMTYPE, text
                tar.addfile(member)
            else:
                content = text.encode()
                member.mode, member.size = mode, len(content)
                tar.addfile(member, io.BytesIO(content))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise HostError(f"{name} is not a regular file in the new system")
    return file.read()
