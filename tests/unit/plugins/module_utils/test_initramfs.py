# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guest kernel's options, the generated initramfs, and the first program."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _early_init,
    _guest_kernel,
    _initramfs,
    _microvm_data,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


def modules(tree: Path, **needs: str) -> str:
    (tree / "kernel").mkdir(parents=True)
    (tree / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    for name, depends in needs.items():
        data = b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
        (tree / "kernel" / f"{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(data))
    return str(tree)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    tree = modules(tmp_path / "m", nd_pmem="libnvdimm,nd-btt", nd_btt="libnvdimm", libnvdimm="", vmgenid="")
    order = _initramfs.module_order(tree, ["virtio_pci", "nd_pmem"], ["vmgenid", "absent"])
    assert [name for name, _data in order] == ["vmgenid.ko", "libnvdimm.ko", "nd_btt.ko", "nd_pmem.ko"]
    assert order[0][1].startswith(b"\x7fELF")


def test_a_module_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="has no module erofs"):
        _initramfs.module_order(modules(tmp_path / "m"), ["erofs"])


def test_kernel_options_are_asserted() -> None:
    config = "".join(f"{option}=m\n" for option in _guest_kernel.OPTIONS)
    _guest_kernel.check_options(config, "linux")
    with pytest.raises(HostError, match=r"the kernel of linux lacks CONFIG_FS_DAX \(mapping the shared image"):
        _guest_kernel.check_options(config.replace("CONFIG_FS_DAX=m", "# CONFIG_FS_DAX is not set"), "linux")
    with pytest.raises(HostError, match="lacks CONFIG_PVH"):  # a module is of no use without an initramfs
        _guest_kernel.check_options(config, "linux", "y")


@pytest.mark.parametrize(
    ("option", "needs"),
    [
        ("memory_max", {"VIRTIO_MEM=y", "MEMORY_HOTPLUG=y", "MEMORY_HOTREMOVE=y"}),
        ("memory_zones", {"NUMA=y", "ACPI_NUMA=y"}),
        ("vcpus", {"SMP=y", "NR_CPUS=256"}),  # 255 is the most
        ("balloon", {"VIRTIO_BALLOON=y", "PAGE_REPORTING=y"}),
        ("verity", {"DM_VERITY=y", "DM_INIT=y", "CRYPTO_SHA256=y"}),
        ("hotplug_slots", {"HOTPLUG_PCI_PCIE=y", "HOTPLUG_PCI_ACPI=y"}),
    ],
)
def test_a_built_kernel_has_what_options_need(option: str, needs: set[str]) -> None:
    lines = set(_guest_kernel.FRAGMENT.splitlines())
    assert {f"CONFIG_{need}" for need in needs} - lines == set(), option
    assert {f"{key}=y" for key in _guest_kernel.OPTIONS} - lines == set()


def test_a_fragment_is_compared_with_what_became_of_it() -> None:
    fragment = "CONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\nCONFIG_D=4\n# a comment\nCONFIG_E=y\nCONFIG_E=n\n"
    assert _guest_kernel.unmet(fragment, "CONFIG_A=y\nCONFIG_D=4\n# CONFIG_C is not set") == []
    assert _guest_kernel.unmet(fragment, "CONFIG_B=y\nCONFIG_C=y\nCONFIG_D=5\n# CONFIG_A is not set") == [
        "CONFIG_A=y", "CONFIG_B=n", "# CONFIG_C is not set", "CONFIG_D=4",
    ]  # fmt: skip


def test_a_package_without_a_kernel(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="linux-doc brought 0 kernels instead of one"):
        _guest_kernel.from_package(Host("/"), str(tmp_path), str(tmp_path), "linux-doc", False)
    with pytest.raises(HostError, match="linux-doc brought 0 kernel sources instead of one"):
        _guest_kernel.from_source(Host("/"), str(tmp_path), str(tmp_path), "linux-doc", "", 0)


class Make(Host):
    """This machine, with a make that builds nothing: it takes all lines of a configuration but some."""

    def __init__(self, refuses: str = "") -> None:
        super().__init__("/")
        self.refuses, self.asked = refuses, []  # type: t.Any, list[str]

    def run(
        self, argv: t.Sequence[str], stdin: str | None = None, timeout_seconds: float = 60, check: bool = True
    ) -> Completed:
        if argv[0] != "make":
            return super().run(argv, stdin, timeout_seconds, check)
        self.asked.append(argv[-1])
        source = Path(argv[argv.index("-C") + 1])
        if argv[-1] == "alldefconfig":
            lines = (source / "agentfleet.config").read_text().splitlines()
            (source / ".config").write_text("\n".join(line for line in lines if self.refuses not in line.split("=")))
        elif argv[-1] == "bzImage":
            (source / "arch/x86/boot").mkdir(parents=True)
            (source / "arch/x86/boot/bzImage").write_bytes(bz_image(gzip.compress(ELF)))
        return Completed(tuple(argv), 0, "6.12.1\n" if argv[-1] == "kernelrelease" else "", "")


def sources(tree: Path) -> str:
    """An unpacked source package, and busybox."""
    for path, text in (("linux/kernel/configs/kvm_guest.config", "CONFIG_NET=y\n"), ("usr/bin/busybox", "busybox")):
        (tree / path).parent.mkdir(parents=True)
        (tree / path).write_text(text)
    (tree / "usr/src").mkdir()
    archive = tree / "usr/src/linux-source-6.12.tar.gz"
    subprocess.run(["tar", "-C", tree, "-czf", archive, "linux"], check=True)
    return str(tree)


def test_a_kernel_is_built_of_sources_that_take_every_line(tmp_path: Path) -> None:
    make, tree, target = Make(), sources(tmp_path / "a"), tmp_path / "target"
    target.mkdir()
    _guest_kernel.from_source(make, tree, str(target), "linux-source", "CONFIG_WIREGUARD=y\n", 1735689600)
    assert make.asked == ["alldefconfig", "bzImage", "kernelrelease"]
    assert (target / "kernel").read_bytes() == ELF and (target / "release").read_text() == "6.12.1\n"
    assert not (target / "modules").exists()  # all is built in: no initramfs
    config = (target / "config").read_text().splitlines()
    assert config[0] == "CONFIG_NET=y" and {"CONFIG_VIRTIO_PMEM=y", "CONFIG_WIREGUARD=y"} <= set(config)
    refusing, tree = Make("CONFIG_WIREGUARD"), sources(tmp_path / "b")
    with pytest.raises(HostError, match="linux-source do not take CONFIG_WIREGUARD=y"):
        _guest_kernel.from_source(refusing, tree, str(target), "linux-source", "CONFIG_WIREGUARD=y\n", 1735689600)
    assert refusing.asked == ["alldefconfig"]  # nothing is compiled then


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def bz_image(payload: bytes, version: int = 0x20F) -> bytes:
    """As the kernel's build lays it out: boot sector, two sectors of setup, code, payload."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + bytes(100) + payload + b"what follows"


# 64 bytes of header, 36 of content, two section headers of 64 bytes.
ELF = (b"\x7fELF".ljust(0x28, b"\1") + struct.pack("<Q10xHH", 100, 64, 2)).ljust(64, b"\0") + b"k" * 36 + bytes(128)


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: lzma.compress(data) + b"size",
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + b"size",
        lambda data: bz2.compress(data) + b"size",
        gzip.compress,
        pytest.param(
            lambda data: zstd(data) + b"size",
            marks=pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is needed"),
        ),
    ],
)
def test_a_kernel_is_unpacked_once_and_for_all(pack: t.Callable[[bytes], bytes]) -> None:
    assert _guest_kernel.unpacked(bz_image(pack(ELF + b"relocations"))) == ELF


def test_a_kernel_that_cannot_be_unpacked_stays_as_it_is() -> None:
    for kernel in (
        ELF,
        bz_image(b"\x02\x21\x4c\x18lz4"),
        bz_image(gzip.compress(b"raw")),
        bz_image(gzip.compress(ELF), 0x207),
    ):
        assert _guest_kernel.unpacked(kernel) == kernel


def complete_tree(tree: Path) -> str:
    needed = [*_initramfs.MODULES, *_initramfs.LAST, "erofs", "ext4", "dm_verity", "nvme"]
    return modules(tree, **{name: "" for name in needed if name != "virtio_pci"})


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is needed to read the archive")
def test_archive_is_read_by_cpio(tmp_path: Path) -> None:
    tree = complete_tree(tmp_path / "m")
    data = _initramfs.initramfs(tree, b"busybox", ["erofs"], ["nvme"], {"/lib/x": b"lib"})
    data += _initramfs.settings({"image_filesystem": "erofs", "image_options": "ro,dax=always"})
    out = tmp_path / "out"
    out.mkdir()
    # What is concatenated is read as the kernel does: one archive after the other.
    end = data.rindex(b"070701", 0, data.index(b"TRAILER!!!")) + 124
    for part in (data[:end], data[end:]):
        subprocess.run(["cpio", "-idu", "--quiet"], input=part, cwd=out, check=True)
    assert (out / "init").read_text() == _early_init.SCRIPT and (out / "init").stat().st_mode & 0o111
    assert (out / "usr/lib/agentfleet/bin/mount").readlink() == Path("busybox")
    assert (out / "usr/lib/agentfleet/boot").read_text().splitlines() == [
        "image_filesystem=erofs",
        "image_options=ro,dax=always",
    ]
    boot = (out / "modules/boot").read_text().split()
    assert "erofs.ko" in boot and "nvme.ko" in boot and "ext4.ko" not in boot
    assert (out / "modules/ext4").read_text() == "ext4.ko\n"
    assert (out / "modules/last").read_text() == "virtio_balloon.ko\n" and "virtio_balloon.ko" not in boot
    assert (out / "lib/x").read_bytes() == b"lib"
    assert all((out / directory).is_dir() for directory in ("dev", "proc", "sys", "run", "mnt"))


def listed(archive: bytes, name: str) -> list[str]:
    """The modules of one list in an archive."""
    return archive.partition(f"modules/{name}\0".encode())[2].partition(b"070701")[0].strip(b"\0").decode().split()


def test_only_what_an_image_needs_is_loaded_at_boot(tmp_path: Path) -> None:
    tree = complete_tree(tmp_path / "m")
    plain, verified = (_initramfs.initramfs(tree, b"", needs, [], {}) for needs in (["erofs"], ["ext4", "verity"]))
    assert b"modules/dm_verity.ko" not in plain and b"modules/dm_verity.ko" in verified
    for other, archive in (("ext4", plain), ("erofs", verified)):  # each is loaded with its first volume or image
        assert (listed(archive, other), f"{other}.ko" in listed(archive, "boot")) == ([f"{other}.ko"], False)
    assert _initramfs.initramfs(tree, b"", ["erofs"], [], {}) == plain


def test_first_program_is_a_shell_script_that_busybox_can_run() -> None:
    subprocess.run(["sh", "-n"], input=_early_init.SCRIPT, text=True, check=True)
    used = set(re.findall(r"[a-z0-9_]+", _early_init.SCRIPT))
    assert set(_early_init.APPLETS) <= used


@pytest.mark.parametrize("name", ["/init", _early_init.PATH])
def test_the_environment_is_that_of_init_and_nothing_else(
    tmp_path: Path, microvm_spec: dict[str, t.Any], name: str
) -> None:
    """The end of the first program, with a configuration disk whose variables have the names of its own."""
    end = _early_init.SCRIPT[_early_init.SCRIPT.index("set -- ") :].replace("exec env", f"exec {shutil.which('env')}")
    wished = {"image": "x", "root": "/srv", "device": "y", "agent": "it's\n$HOME", "PATH": "/opt/venv/bin:/usr/bin"}
    config = _microvm_data.config({**microvm_spec, "environment": wished})  # type: ignore[typeddict-item]
    for program, text in (("init", "env -0"), ("switch_root", 'echo "$1"; shift; exec "$@"')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    script = f"PATH={tmp_path} agentfleet_init={tmp_path}/init root=/mnt/root image=/image\n{config}"
    script += f'[ "$root $image $device" = "/mnt/root /image " ] || exit 3\n{end}'
    done = subprocess.run(["sh", "-c", script, name, "word"], env={}, capture_output=True, text=True, check=True)
    root, text = done.stdout.split("\n", 1) if name == "/init" else ("", done.stdout)
    assert root == ("/mnt/root" if name == "/init" else "")
    found = dict(line.split("=", 1) for line in text.split("\0") if line)
    assert {key: value for key, value in found.items() if key in wished} == wished
    assert set(found) <= {*wished, "PWD", "SHLVL", "_", "OLDPWD"}


@pytest.mark.skipif(
    not all(map(shutil.which, ("mkfs.erofs", "hexdump", "mke2fs"))), reason="mkfs and hexdump are needed"
)
def test_images_are_found_by_their_uuid_whatever_their_number(tmp_path: Path) -> None:
    """As the first program does, with the shell of this machine on files of file systems that mkfs really made."""
    start = _early_init.SCRIPT.index("pmem() {")
    functions = _early_init.SCRIPT[start : _early_init.SCRIPT.index("mount -t proc")]
    uuids = [f"00112233-4455-6677-8899-aabbccddee0{number}" for number in range(3)]
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("x")
    (tmp_path / "pmem1").write_bytes(bytes(4 << 20))
    subprocess.run(["mkfs.erofs", "--quiet", "-U", uuids[0], tmp_path / "pmem0", tmp_path / "tree"], check=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-U", uuids[1], tmp_path / "pmem1"], check=True)
    script = functions.replace("/dev/pmem", f"{tmp_path}/pmem").replace("1000 ]", "2 ]")
    for uuid, filesystem in zip(uuids, ("erofs", "ext4", "erofs")):
        script += f'pmem {uuid.replace("-", "")} {filesystem} && echo "${{device##*/}}" || echo none\n'
    script += "usleep() { :; }\nwith_dax /nowhere ro && echo fine\nwith_dax /nowhere ro,dax=always || echo without\n"
    done = subprocess.run(["sh", "-c", "usleep() { :; }\n" + script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pmem0", "pmem1", "none", "fine", "without"]


# In a mount namespace of its own, on a loop device: the machine's own tree is image and root.
ON_A_LOOP_DEVICE = """
set -e
mount --rbind / "$top/tree"
image=$top/tree root=$top/tree
loop=$(losetup --find --show "$top/disk")
trap 'umount "$root$top/data" || :; losetup --detach "$loop"' EXIT
load() { :; }
fail() { echo "failed: $*"; exit 1; }
disk() { device=$loop; }
grown() {
    volume data "$root$top/data" "$filesystem" mkfs,grow
    df --block-size=1M --output=size,fstype "$root$top/data" | tail -n 1
}
grown
echo kept >"$root$top/data/file"
umount "$root$top/data"
truncate -s 700M "$top/disk"
losetup --set-capacity "$loop"
grown
cat "$root$top/data/file"
"""


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_a_volume_is_made_once_and_grows_with_its_file_system(tmp_path: Path, filesystem: str) -> None:
    programs = [f"mkfs.{filesystem}", "losetup", "hexdump", {"ext4": "resize2fs", "xfs": "xfs_growfs"}[filesystem]]
    if os.geteuid() or not all(map(shutil.which, programs)):
        pytest.skip(f"root, {', '.join(programs)} are needed")
    (tmp_path / "tree").mkdir()
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(350 << 20)
    if subprocess.run(["unshare", "--mount", "losetup", "--find"], capture_output=True, check=False).returncode:
        pytest.skip("a loop device is needed")
    functions = _early_init.SCRIPT[_early_init.SCRIPT.index("inside() {") : _early_init.SCRIPT.index("pmem() {")]
    script = f"top={tmp_path} filesystem={filesystem}\n{functions}{ON_A_LOOP_DEVICE}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after, content = done.stdout.splitlines()
    assert (before.split()[1], content) == (filesystem, "kept")
    assert int(before.split()[0]) < 350 < 600 < int(after.split()[0])


# What the first program and init do for the first boot, as one start of a guest that keeps its root and has a new /run.
INIT = (Path(__file__).resolve().parents[4] / "roles/rootfs/files/init").read_text()
FIRST_BOOT = """
set -e
rm -rf "$top/run" && mkdir -p "$top/run"
root=$top/root library=$root/usr/lib/agentfleet
fail() { echo "failed: $*"; exit 1; }
disk() { device=$top/$1; [ -e "$device" ]; }
"""
FIRST_BOOT += _early_init.SCRIPT[_early_init.SCRIPT.index("# First-boot data:") : _early_init.SCRIPT.index("load last")]
FIRST_BOOT += INIT[INIT.index("# First boot:") : INIT.index("if [ -x /sbin/init ]")].replace(
    "/var/lib/", "$root/var/lib/"
)
FIRST_BOOT = FIRST_BOOT.replace("/run/agentfleet", "$top/run").replace("/dev/console", "$top/run/console")


def test_first_boot_data_is_applied_until_all_succeeds_and_once_for_each_content(tmp_path: Path) -> None:
    scripts, ran, token = (
        tmp_path / "root/usr/lib/agentfleet/firstboot.d",
        tmp_path / "ran",
        tmp_path / "root/etc/token",
    )
    scripts.mkdir(parents=True)
    (scripts / "00-image").write_text(f"#!/bin/sh\necho image >>{ran}\n")
    (scripts / "00-image").chmod(0o755)
    (scripts / "README").write_text("not a script")
    file = {"path": "/etc/token", "content": "it's $HOME\n", "mode": "0640"}
    commands = [f"echo data >>{ran}", f"test -e {tmp_path}/allowed", f"echo end >>{ran}"]

    def boot(**user_data: t.Any) -> tuple[list[str], str]:
        """What runs, and what the agent would tell of it."""
        (tmp_path / "agentfleet-data").write_text(_microvm_data.archive("user_data", user_data))
        ran.write_text("")
        subprocess.run(["sh", "-c", FIRST_BOOT], env={**os.environ, "top": str(tmp_path)}, check=True)
        told = tmp_path / "run/firstboot-failed"
        return ran.read_text().split(), told.read_text().strip() if told.exists() else ""

    assert boot(files=[file], run=commands) == (["image", "data"], "user-data")
    assert (tmp_path / "run/console").read_text() == "agentfleet: first boot: user-data failed\n"
    assert (token.read_text(), token.stat().st_mode & 0o777) == (file["content"], 0o640)
    (tmp_path / "allowed").touch()
    assert boot(files=[file], run=commands) == (["image", "data", "end"], "")
    token.unlink()
    assert boot(files=[file], run=commands) == ([], "") and not token.exists()
    assert boot(files=[file]) == (["image"], "") and token.exists()  # and not what ran for the content before


def test_settings_survive_the_shell() -> None:
    text = _initramfs.shell({"image_verity": "0 8 verity 1 /dev/pmem0", "other": "it's"})
    out = subprocess.run(["sh", "-c", text + 'echo "$image_verity/$other"'], capture_output=True, text=True, check=True)
    assert out.stdout == "0 8 verity 1 /dev/pmem0/it's\n"
