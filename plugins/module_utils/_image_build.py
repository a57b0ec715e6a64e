# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One build: from a definition to blobs (image, kernel, initramfs) and their manifest.

This module is private to the collection and imports nothing of Ansible. It runs as root or as an ordinary user
(fakeroot), and mounts nothing.

An image's file system is a pile of tars: what packages or an OCI image bring, and what the definition puts over it.
Images made of another one reuse its pile.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import typing as t
import uuid

from ansible_collections.agentfleet.metal.plugins.module_utils import (
    _early_init,
    _guest_kernel,
    _initramfs,
    _oci,
    _sbom,
    _store,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host, sha256_of, sync
from ansible_collections.agentfleet.metal.plugins.module_utils._image_definition import (
    FORMAT,
    Definition,
    Item,
    canonical,
    digest_of,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._kernel import dpkg_packages
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

ALIGNMENT = 2 << 20
EPOCH = 1735689600
LOG, SBOM = "build.log", "sbom.cdx.json"
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
# What a bootstrap takes from the builder, or makes anew each time.
UNREPRODUCIBLE = (
    'rm -rf "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* '
    '"$1"/etc/ssh/ssh_host_*_key* "$1"/var/lib/systemd/random-seed "$1"/var/cache/ldconfig/aux-cache '
    '"$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old "$1"/etc/*-'
)
# The devices of a base are the builder's; a guest has its own.
UNPACK = 'for layer; do tar -C tree --keep-directory-symlink --exclude="./dev/*" --numeric-owner -xpf "$layer"; done'


class Logged(Host):
    """This machine, with all commands and what they said in a file."""

    def __init__(self, path: str) -> None:
        super().__init__("/")
        self._log = path

    def run(
        self,
        argv: t.Sequence[str],
        stdin: str | None = None,
        timeout_seconds: float = 60,
        check: bool = True,
    ) -> Completed:
        """Run a command and write it down, whatever becomes of it."""
        done = super().run(argv, stdin, timeout_seconds, check=False)
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}")
            if done.rc:
                log.write(f"exit code {done.rc}\n")
        if check and done.rc:
            raise HostError(f"{argv[0]} failed with exit code {done.rc}: {done.text[-600:]}")
        return done


def describe(path: str) -> dict[str, t.Any]:
    """Digest and size of a file."""
    return {"sha256": sha256_of(path), "size_bytes": os.path.getsize(path)}


class Build:
    """One build in a temporary directory of the cache.

    :param cache: real path of the cache; blobs, layers and kernels appear there when they are complete
    :param work: real path of an empty directory
    :param base: manifest of the image that this one is made of
    :param keep_layers: whether another image will be made of this one
    """

    def __init__(
        self, cache: str, work: str, wanted: Definition, mirror: str | None, base: t.Mapping[str, t.Any] | None,
        keep_layers: bool, refresh: bool,
    ) -> None:  # fmt: skip
        self.cache, self.work, self.wanted, self.mirror = cache, work, wanted, mirror
        self.base, self.keep_layers, self.refresh = base, keep_layers, refresh
        self.host = Logged(f"{work}/{LOG}")
        self.tree = f"{work}/tree"
        self.fakeroot: list[str] = []
        if os.geteuid() != 0:
            state = f"{work}/fakeroot"
            open(state, "w", encoding="ascii").close()
            self.fakeroot = ["fakeroot", "-i", state, "-s", state, "--"]

    def run(self) -> dict[str, t.Any]:
        """Build; returns the manifest. ``work`` then also has the log and the bill of materials."""
        content = self.wanted.content
        kernel = "" if self.wanted.data else self._kernel()
        layers = self._layers()
        os.mkdir(self.tree)
        self._in_tree(f"set -e; {UNPACK}", *layers)
        release = Host(kernel).read("/release") if kernel else ""
        initrd = self._initramfs(kernel)
        described = {_store.KERNEL: describe(f"{kernel}/kernel")} if kernel else {}
        if initrd is not None:
            described[_store.INITRD] = {"sha256": hashlib.sha256(initrd).hexdigest(), "size_bytes": len(initrd)}
        # One digest for all: the image names its kernel and initramfs (without the settings, which follow from the image).
        identity = canonical({"release": release, "files": described})
        self._overlay(kernel, identity)
        self._in_tree(f"set -e; {UNPACK}", f"{self.work}/overlay.tar")
        self._check_units()
        if self.wanted.sbom is not False and _sbom.program():
            _sbom.make(self.host, self.tree, self.wanted.name, self.wanted.digest, EPOCH, f"{self.work}/{SBOM}")
        image = f"{self.work}/{_store.IMAGE}"
        getattr(self, f"_{content['filesystem']}")(image)
        table = self._verity(image) if content["verity"] else ""
        os.truncate(image, -(-os.path.getsize(image) // ALIGNMENT) * ALIGNMENT)
        files = [_store.IMAGE]
        if kernel:
            shutil.copyfile(f"{kernel}/kernel", f"{self.work}/{_store.KERNEL}")
            files.append(_store.KERNEL)
        if initrd is not None:
            with open(f"{self.work}/{_store.INITRD}", "wb") as file:
                file.write(initrd + _initramfs.settings(self._settings(table)))
            files.append(_store.INITRD)
        manifest: dict[str, t.Any] = {
            "format": FORMAT,
            "definition": content,
            "definition_digest": self.wanted.digest,
            "files": {name: describe(f"{self.work}/{name}") for name in files},
            "kernel_release": release,
            "kernel_arguments": self._arguments(table) if kernel and initrd is None else [],
            "packages": dpkg_packages(Host(self.tree).read("/var/lib/dpkg/status")),
            "python_packages": _sbom.python_packages(self.tree),
            "base": self.base["files"][_store.IMAGE]["sha256"] if self.base else "",
            "verity": table,
        }
        manifest["deltas"] = self._publish(manifest)
        manifest["layers"] = self._keep(layers) if self.keep_layers else []
        return manifest

    # -- the pile ----------------------------------------------------------------

    def _layers(self) -> list[str]:
        layers = [f"{self.cache}/layers/{digest}.tar.zst" for digest in self.base["layers"]] if self.base else []
        if self.wanted.oci:
            layers = [f"{self.work}/oci.tar"]
            try:
                with open(layers[0], "wb") as archive:
                    _oci.flatten(self.wanted.oci, archive)
            except _oci.OciError as error:
                raise HostError(f"{self.wanted.oci.path}: {error}. Export the image again") from error
        if self.wanted.packages or not (layers or self.wanted.data):
            target = f"{self.work}/packages.tar"
            packages = self.wanted.content["packages"]
            if layers:
                unpack = 'tar -C "$1" --keep-directory-symlink --exclude="./dev/*" --numeric-owner -xpf'
                hooks = []
                for layer in layers:
                    if os.geteuid() == 0:
                        hooks.append(f"{unpack} {shlex.quote(layer)}")
                        continue
                    # An ordinary user's hooks run as another id, to which a directory of 0700 is closed; uploads do not.
                    hooks.append(f"upload {shlex.quote(layer)} /.agentfleet-layer")
                    hooks.append(f'{unpack} "$1/.agentfleet-layer" && rm "$1/.agentfleet-layer"')
                self._bootstrap("custom", packages, target, [f"--setup-hook={hook}" for hook in hooks])
            else:
                self._bootstrap("essential", packages, target, [])
            layers = [target]
        return layers

    def _bootstrap(self, variant: str, packages: t.Sequence[str], target: str, options: t.Sequence[str]) -> None:
        root = self.wanted.root.content
        cleanup = [] if variant == "extract" else [f"--customize-hook={UNREPRODUCIBLE}"]
        self.host.run(
            ["env", f"SOURCE_DATE_EPOCH={EPOCH}", "mmdebstrap", f"--variant={variant}", "--format=tar",
             f"--include={','.join(packages)}", f"--components={','.join(root['components'])}",
             '--aptopt=Acquire::Languages "none"', *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
             *options, *cleanup, root["suite"], target, self.mirror or ""],
            timeout_seconds=3600,
        )  # fmt: skip

    def _in_tree(self, script: str, *arguments: str) -> None:
        self.host.run([*self.fakeroot, "sh", "-c", f'cd "$0"; {script}', self.work, *arguments], timeout_seconds=1800)

    def _keep(self, layers: t.Sequence[str]) -> list[str]:
        os.makedirs(f"{self.cache}/layers", exist_ok=True)
        kept = []
        for layer in [*layers, f"{self.work}/overlay.tar"]:
            digest = (
                os.path.basename(layer).partition(".")[0]
                if layer.startswith(self.cache + "/layers/")
                else sha256_of(layer)
            )
            target = f"{self.cache}/layers/{digest}.tar.zst"
            if self.refresh or not there(target):
                self._compress(layer, target, "-3")
            kept.append(digest)
        return kept

    # -- the kernel ----------------------------------------------------------------

    def _kernel(self) -> str:
        wanted = self.wanted.kernel
        target = f"{self.cache}/kernels/{digest_of(wanted)}"
        if os.path.exists(f"{target}/release") and not (self.refresh and not self.base):
            return target
        unpacked, made = f"{self.work}/unpacked", f"{self.work}/kernel.new"
        for directory in (unpacked, made, f"{self.cache}/kernels"):
            os.makedirs(directory, exist_ok=True)
        package = wanted.get("package") or wanted["source"]
        extra = ["dmsetup"] if wanted.get("verity") else []
        self._bootstrap("extract", [package, "busybox-static", *extra], f"{self.work}/kernel.tar", [])
        self.host.run(
            ["tar", "-C", unpacked, "--exclude=./dev/*", "-xf", f"{self.work}/kernel.tar"], timeout_seconds=600
        )
        if "source" in wanted:
            _guest_kernel.from_source(self.host, unpacked, made, package, wanted["fragment"], EPOCH)
        else:
            _guest_kernel.from_package(self.host, unpacked, made, package, wanted["verity"])
        shutil.rmtree(unpacked)
        os.unlink(f"{self.work}/kernel.tar")
        shutil.rmtree(target, ignore_errors=True)
        self.host.run(["sync", "--file-system", made], timeout_seconds=600)  # a power cut leaves all of it or no name
        os.rename(made, target)
        return target

    def _initramfs(self, kernel: str) -> bytes | None:
        """Without its settings; None for a kernel that needs none."""
        content = self.wanted.content
        if "initramfs" not in content:
            return None
        programs = {}
        for directory, _directories, files in os.walk(f"{kernel}/programs"):
            for name in files:
                with open(f"{directory}/{name}", "rb") as file:
                    programs[f"{directory[len(kernel) + len('/programs') :]}/{name}"] = file.read()
        needs = [content["filesystem"], *(["verity"] if content["verity"] else [])]
        with open(f"{kernel}/busybox", "rb") as busybox:
            return _initramfs.initramfs(
                f"{kernel}/modules", busybox.read(), needs, content["initramfs"]["modules"], programs
            )

    def _settings(self, table: str) -> dict[str, str]:
        content = self.wanted.content
        options = _store.mount_options(content)
        return {"image_filesystem": content["filesystem"], "image_options": options, "image_verity": table}

    def _arguments(self, table: str) -> list[str]:
        """What a kernel that mounts the image itself is told."""
        settings = self._settings(table)
        root = ["root=/dev/pmem0"]
        if table:
            root = [f'dm-mod.create="agentfleet-image,,,ro,{table}"', "dm-mod.waitfor=/dev/pmem0", "root=/dev/dm-0"]
        flags = settings["image_options"].partition(",")[2]
        return [
            *root, f"rootfstype={settings['image_filesystem']}", *([f"rootflags={flags}"] if flags else []), "ro",
            f"init={_early_init.PATH}",
        ]  # fmt: skip

    # -- what lies over the packages -------------------------------------------------

    def _overlay(self, kernel: str, identity: bytes) -> None:
        """What comes on top of the packages, as a tar."""
        library = _early_init.LIBRARY
        items: dict[str, Item] = {}
        if kernel:
            items[f"{library}/kernel.json"] = Item("file", 0o444, data=identity)
        if (
            kernel and "initramfs" not in self.wanted.content
        ):  # the kernel starts from the image what the initramfs would have
            text = _initramfs.shell(self._settings(""))
            items[_early_init.SETTINGS] = Item("file", 0o444, data=text.encode())
            items[_early_init.PATH] = Item("file", 0o755, data=_early_init.SCRIPT.encode())
            items[f"{library}/bin/busybox"] = Item("file", 0o755, source=f"{kernel}/busybox")
            for applet in _early_init.APPLETS:
                items[f"{library}/bin/{applet}"] = Item("link", 0o777, sha256="busybox")
        items.update(self._accounts())
        items.update(self.wanted.items)
        users, groups = self._ids("passwd", items), self._ids("group", items)
        with tarfile.open(f"{self.work}/overlay.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for path, item in sorted(items.items()):
                entry = tarfile.TarInfo("." + path)
                entry.mode, entry.mtime = item.mode, EPOCH
                entry.uid, entry.gid = self._id(item.owner, users), self._id(item.group, groups)
                if item.kind == "file":
                    self._add_file(tar, entry, item)
                else:
                    entry.type = tarfile.DIRTYPE if item.kind == "directory" else tarfile.SYMTYPE
                    entry.linkname = item.sha256 if item.kind == "link" else ""
                    tar.addfile(entry)
            if self.wanted.content["python_requirements"]:
                self._wheels(tar)

    @staticmethod
    def _add_file(tar: tarfile.TarFile, entry: tarfile.TarInfo, item: Item) -> None:
        if not item.source:
            entry.size = len(item.data)
            tar.addfile(entry, io.BytesIO(item.data))
            return
        entry.size = os.path.getsize(item.source)
        with open(item.source, "rb") as file:
            hashing = _oci.Hashing(file)
            tar.addfile(entry, t.cast("t.Any", hashing))
        if item.sha256 and hashing.digest.hexdigest() != item.sha256:
            raise HostError(f"{item.source} changed while the image was built. Run again when it is at rest")

    def _accounts(self) -> dict[str, Item]:
        """passwd, group and shadow with the definition's users."""
        wanted = self.wanted.content["users"]
        if not wanted:
            return {}
        tree = Host(self.tree)
        files = {name: tree.read(f"/etc/{name}").splitlines() for name in ("passwd", "group", "shadow", "gshadow")}
        for user in wanted:
            name, number = user["name"], user["uid"]
            for line in files["passwd"]:
                fields = line.split(":")
                if fields[0] == name or fields[2] == str(number):
                    raise HostError(
                        f"users: {name} ({number}): the image has {fields[0]} ({fields[2]}) already. Choose another"
                    )
            if any(line.split(":")[0] == name or line.split(":")[2] == str(number) for line in files["group"]):
                raise HostError(
                    f"users: {name} ({number}): the image has a group of this name or number. Choose another"
                )
            files["passwd"].append(f"{name}:x:{number}:{number}::{user['home']}:{user['shell']}")
            files["shadow"].append(f"{name}:!:{EPOCH // 86400}:0:99999:7:::")
            files["group"].append(f"{name}:x:{number}:")
            files["gshadow"].append(f"{name}:!::")
            for group in user["groups"]:
                if not any(line.startswith(f"{group}:") for line in files["group"]):
                    raise HostError(f"users: {name}: the image has no group {group}. Name one of its groups")
                for key in ("group", "gshadow"):
                    files[key] = [
                        line + ("" if line.endswith(":") else ",") + name if line.startswith(f"{group}:") else line
                        for line in files[key]
                    ]
        return {
            f"/etc/{name}": Item(
                "file", 0o640 if "shadow" in name else 0o644, group="shadow" if "shadow" in name else "root",
                data="".join(f"{line}\n" for line in lines).encode(),
            )
            for name, lines in files.items()
        }  # fmt: skip

    def _ids(self, name: str, items: t.Mapping[str, Item]) -> dict[str, int]:
        item = items.get(f"/etc/{name}")
        text = item.data.decode() if item else Host(self.tree).read(f"/etc/{name}")
        return {
            "root": 0,
            **{line.split(":")[0]: int(line.split(":")[2]) for line in text.splitlines() if line.count(":") > 1},
        }

    @staticmethod
    def _id(name: str, known: t.Mapping[str, int]) -> int:
        if name.isdigit():
            return int(name)
        if name not in known:
            raise HostError(f"the image has no user or group {name}. Declare it under users, or give a number")
        return known[name]

    def _check_units(self) -> None:
        if self.wanted.content["units"] and not os.path.lexists(f"{self.tree}/usr/lib/systemd/systemd"):
            raise HostError(
                f"units: {self.wanted.content['units'][0]}: the image has no systemd. Add systemd-sysv to its packages, "
                "or declare services, which need none"
            )

    # -- Python --------------------------------------------------------------------

    def _wheels(self, tar: tarfile.TarFile) -> None:
        """Python packages for the image's own Python, from wheels only (nothing is compiled here)."""
        place, version = self._python()
        requirements, target = f"{self.work}/requirements.txt", f"{self.work}/wheels"
        wishes = self.wanted.content["python_requirements"]
        self.host.write(requirements, "".join(f"{line}\n" for line in wishes))
        self.host.run(
            [sys.executable, "-m", "pip", "install", "--no-compile", "--only-binary=:all:", "--no-warn-script-location",
             "--disable-pip-version-check", "--implementation=cp", f"--python-version={version}",
             *(f"--platform={tag}_x86_64" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")),
             *(["--require-hashes"] if any("--hash=" in line for line in wishes) else []),
             f"--target={target}", f"--requirement={requirements}"],
            timeout_seconds=1800,
        )  # fmt: skip
        # Programs begin with the builder's Python; the image's is elsewhere.
        for script in glob.glob(f"{target}/bin/*"):
            with open(script, "rb") as file:
                first, newline, rest = file.read().partition(b"\n")
            if first.startswith(b"#!") and b"python" in first:
                entry = tarfile.TarInfo(f"./usr/local/bin/{os.path.basename(script)}")
                data = b"#!/usr/bin/env python3" + newline + rest
                entry.size, entry.mode, entry.mtime = len(data), 0o755, EPOCH
                tar.addfile(entry, io.BytesIO(data))
        shutil.rmtree(f"{target}/bin", ignore_errors=True)
        for record in glob.glob(f"{target}/*.dist-info/RECORD"):
            with open(record, encoding="utf-8") as lines:
                kept = sorted(line for line in lines if not line.startswith("../../bin/"))
            with open(record, "w", encoding="utf-8") as lines:
                lines.writelines(kept)
        for path in sorted(glob.glob(f"{target}/*")):
            tar.add(path, f".{place}/{os.path.basename(path)}", filter=_as_root)

    def _python(self) -> tuple[str, str]:
        for pattern, place in (
            (r"usr/local/bin/python(3\.\d+)", "/usr/local/lib/python{}/site-packages"),
            (r"usr/bin/python(3\.\d+)", "/usr/lib/python3/dist-packages"),
        ):
            for path in sorted(glob.glob(f"{self.tree}/{os.path.dirname(pattern)}/python3.*")):
                if match := re.fullmatch(pattern, os.path.relpath(path, self.tree)):
                    return place.format(match.group(1)), match.group(1)
        raise HostError("python_requirements: the image has no Python. Add python3 to its packages")

    # -- file systems ----------------------------------------------------------------

    def _uuid(self) -> str:
        return str(uuid.UUID(self.wanted.digest[:32]))

    def _erofs(self, target: str) -> None:
        # No extended attributes: what the builder's file system adds (SELinux labels) would be in the image.
        options = ["-x-1", "-E", "noinline_data", "-T", str(EPOCH), "-U", self._uuid()]
        if " -b" in self.host.run(["mkfs.erofs", "--help"], check=False).text:
            options.append("-b4096")  # since erofs-utils 1.6; before it 4 KiB is the only size
        self._in_tree('exec mkfs.erofs --quiet "$@" tree', *options, target)

    def _ext4(self, target: str) -> None:
        blocks = inodes = 0
        seen = set()
        for directory, directories, files in os.walk(self.tree):
            inodes += 1
            blocks += 1 + (len(directories) + len(files)) // 24
            for path in (f"{directory}/{name}" for name in (*files, *directories)):
                status = os.lstat(path)
                if status.st_ino not in seen and not os.path.isdir(path):
                    seen.add(status.st_ino)
                    inodes += 1
                    blocks += -(-status.st_size // 4096)
        inodes = -(-(inodes + 64) // 16) * 16
        size = (blocks * 102 // 100 + inodes // 16 + 4096) * 4096
        size = -(-size // ALIGNMENT) * ALIGNMENT
        options = [
            "-q", "-t", "ext4", "-b", "4096", "-m", "0", "-N", str(inodes), "-U", self._uuid(),
            "-O", "^has_journal,^resize_inode", "-E", f"hash_seed={self._uuid()},lazy_itable_init=0,root_owner=0:0", "-d", "tree",
        ]  # fmt: skip
        # mke2fs reads SOURCE_DATE_EPOCH since 1.47.1, also for the times of files.
        self._in_tree(f'SOURCE_DATE_EPOCH={EPOCH} exec mke2fs "$@"', *options, target, f"{size // 1024}k")

    def _verity(self, image: str) -> str:
        """Append the hash tree; returns the device-mapper table."""
        size = -(-os.path.getsize(image) // 4096) * 4096
        os.truncate(image, size)
        salt = hashlib.sha256(self.wanted.digest.encode()).hexdigest()
        done = self.host.run(
            ["veritysetup", "format", "--no-superblock", "--hash=sha256", f"--salt={salt}", "--data-block-size=4096",
             "--hash-block-size=4096", f"--data-blocks={size // 4096}", f"--hash-offset={size}", image, image],
            timeout_seconds=900,
        )  # fmt: skip
        match = re.search(r"Root hash:\s+([0-9a-f]{64})", done.stdout)
        if not match:
            raise HostError(f"veritysetup told no root hash: {done.text}")
        device = "/dev/pmem0"
        return f"0 {size // 512} verity 1 {device} {device} 4096 4096 {size // 4096} {size // 4096} sha256 {match.group(1)} {salt}"

    # -- blobs -----------------------------------------------------------------------

    def _compress(self, source: str, target: str, *options: str) -> None:
        """A compressed file that is there complete or not at all, also after a power cut."""
        new = f"{self.work}/{os.path.basename(target)}.new"
        self.host.run(["zstd", "-q", "-f", "-T0", *options, source, "-o", new], timeout_seconds=1800)
        sync(new)
        os.replace(new, target)

    def _publish(self, manifest: t.Mapping[str, t.Any]) -> list[str]:
        """Put the files into the cache; returns the images that this one can be sent as a difference to."""
        blobs = f"{self.cache}/blobs"
        os.makedirs(blobs, exist_ok=True)
        for name, entry in manifest["files"].items():
            target = f"{blobs}/{entry['sha256']}.zst"
            if self.refresh or not there(target):
                self._compress(f"{self.work}/{name}", target, "-6")
        if not self.base or manifest["base"] == manifest["files"][_store.IMAGE]["sha256"]:
            return []
        digest = manifest["files"][_store.IMAGE]["sha256"]
        base, delta = f"{self.work}/base.img", f"{blobs}/{_store.delta_name(digest, manifest['base'])}"
        self.host.run(["zstd", "-dqf", f"{blobs}/{manifest['base']}.zst", "-o", base], timeout_seconds=900)
        self._compress(f"{self.work}/{_store.IMAGE}", delta, "-6", "--long=31", f"--patch-from={base}")
        os.unlink(base)
        if os.path.getsize(delta) * 2 > os.path.getsize(f"{blobs}/{digest}.zst"):
            os.unlink(delta)  # not worth the memory that it takes
            return []
        return [manifest["base"]]


def there(path: str) -> bool:
    """Whether the cache has a file, and not just its name, which a power cut once left of it."""
    return os.path.exists(path) and os.path.getsize(path) > 0


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = EPOCH
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry


def manifest_text(manifest: t.Mapping[str, t.Any]) -> str:
    """The manifest as it is stored and sent."""
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"
