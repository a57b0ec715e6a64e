# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The generated initramfs and the definition of images."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _initramfs
from ansible_collections.agentfleet.metal.plugins.module_utils._image import Images, _packages
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError


def modules(tree: Path, **needs: str) -> str:
    (tree / "kernel").mkdir(parents=True)
    (tree / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    for name, depends in needs.items():
        data = b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
        (tree / "kernel" / f"{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(data))
    return str(tree)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    tree = modules(tmp_path / "m", nd_pmem="libnvdimm,nd-btt", nd_btt="libnvdimm", libnvdimm="")
    order = _initramfs.module_order(tree, ["virtio_pci", "nd_pmem"])
    assert [name for name, _data in order] == ["libnvdimm.ko", "nd_btt.ko", "nd_pmem.ko"]
    assert order[0][1].startswith(b"\x7fELF")


def test_a_module_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="has no module erofs"):
        _initramfs.module_order(modules(tmp_path / "m"), ["erofs"])


def test_kernel_options_are_asserted() -> None:
    config = "".join(f"{option}=m\n" for option in _initramfs.KERNEL_OPTIONS)
    _initramfs.check_options(config, "linux")
    with pytest.raises(HostError, match=r"the kernel of linux lacks CONFIG_FS_DAX \(mapping the shared image"):
        _initramfs.check_options(config.replace("CONFIG_FS_DAX=m", "# CONFIG_FS_DAX is not set"), "linux")


@pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is needed to read the archive")
def test_archive_is_read_by_cpio(tmp_path: Path) -> None:
    data = _initramfs.cpio([("a", 0o040755, b""), ("a/b", 0o100640, b"text"), ("a/c", 0o120777, b"b")])
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "c").read_text() == "text"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o640


def test_first_program_is_a_shell_script() -> None:
    subprocess.run(["sh", "-n"], input=_initramfs.INIT, text=True, check=True)
    used = {word for line in _initramfs.INIT.splitlines() for word in line.split()}
    assert {"insmod", "switch_root", "usleep"} <= used & set(_initramfs.APPLETS)


def images(host: t.Any, **changes: t.Any) -> Images:
    image = {
        "name": "agent", "family": "debian", "suite": "trixie", "components": ["main"], "mirror": None,
        "packages": ["python3-minimal"], "kernel_package": "linux-image-cloud-amd64", "python_requirements": [],
        "files": [{"path": "/etc/x", "src": None, "content": "one", "mode": "0644"}], **changes,
    }  # fmt: skip
    return Images(host, {"cache": "/cache", "images": [image]})


def test_digest_follows_the_definition_and_nothing_else(fake_host: t.Any) -> None:
    def digest(**changes: t.Any) -> str:
        return str(images(fake_host, **changes).wanted[0]["definition_digest"])

    same = digest()
    assert digest(name="other", mirror="http://mirror.example/debian") == same
    assert digest(packages=["python3-minimal", "python3-minimal"]) == same
    for changes in (
        {"suite": "sid"},
        {"packages": []},
        {"files": [{"path": "/etc/x", "src": None, "content": "two", "mode": "0644"}]},
        {"files": [{"path": "/etc/x", "src": None, "content": "one", "mode": "0600"}]},
    ):
        assert digest(**changes) != same


def test_check_mode_plans_a_build_without_the_tools(fake_host: t.Any) -> None:
    fake_host.files({"/etc/apt/sources.list": "deb http://mirror.example/debian trixie main\n"})
    resource = images(fake_host)
    resource.predicting = True
    (step,) = resource.plan(resource.observe())
    assert (step.verb, step.object) == ("build", "image agent")
    assert resource.result({})["store"] == [{"name": "agent", "digest": ""}]


def test_packages_are_those_installed() -> None:
    installed = "Package: a\nStatus: install ok installed\nVersion: 1\nDescription: x\n more: y\n"
    removed = "Package: b\nStatus: deinstall ok config-files\nVersion: 2\n"
    status = f"{installed}\n{removed}"
    assert _packages(status) == {"a": "1"}
