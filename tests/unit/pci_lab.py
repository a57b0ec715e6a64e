# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The PCI side of a lab host as sysfs showed it (Debian 13, kernel 6.12), and a kernel that acts on writes to it."""

from __future__ import annotations

import os
import shutil

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError
from ansible_collections.agentfleet.metal.tests.unit.conftest import FakeHost

DEVICES = "/sys/bus/pci/devices"
VIRTUAL = ["0000:00:17.0", "0000:00:17.2", "0000:00:17.4"]
MOUNTINFO = """\
27 26 0:24 / /dev/pts rw,nosuid,noexec,relatime shared:3 - devpts devpts rw,gid=5,mode=600,ptmxmode=000
29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
36 26 0:31 / /dev/hugepages rw,nosuid,nodev,relatime shared:13 - hugetlbfs hugetlbfs rw,pagesize=2M
"""
ROUTES = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "enp0s6\t00000000\t0202000A\t0003\t0\t0\t1024\t00000000\t0\t0\t0\n"
    "enp0s6\t0002000A\t00000000\t0001\t0\t0\t1024\t00FFFFFF\t0\t0\t0\n"
)
IPV6_ROUTES = (
    "fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000"
    " 00000100 00000001 00000000 00000001   enp0s7\n"
    "00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000"
    " ffffffff 00000001 00000000 00200200       lo\n"
)


def function(address: str, vendor: str, device: str, kind: str, driver: str, group: int) -> dict[str, str | None]:
    """The files of one function."""
    path = f"/sys/devices/pci0000:00/{address}"
    files: dict[str, str | None] = {
        f"{DEVICES}/{address}": f"-> ../../../devices/pci0000:00/{address}",
        f"{path}/vendor": f"0x{vendor}\n",
        f"{path}/device": f"0x{device}\n",
        f"{path}/class": f"0x{kind}\n",
        f"{path}/driver_override": "(null)\n",
        f"{path}/numa_node": "-1\n",
        f"{path}/iommu_group": f"-> ../../../kernel/iommu_groups/{group}",
        f"/sys/kernel/iommu_groups/{group}/type": "DMA\n",
        f"/sys/kernel/iommu_groups/{group}/devices/{address}": f"-> ../../../../devices/pci0000:00/{address}",
    }
    if driver:
        files[f"{path}/driver"] = f"-> ../../../bus/pci/drivers/{driver}"
        files[f"/sys/bus/pci/drivers/{driver}/unbind"] = ""
    return files


def lab_files() -> dict[str, str | None]:
    """A host with its disk and network on virtio, an NVMe drive, an igb with SR-IOV, and a group of three."""
    devices = "/sys/devices/pci0000:00"
    files = {
        **function("0000:00:00.0", "8086", "29c0", "060000", "", 0),
        **function("0000:00:04.0", "1af4", "1001", "010000", "virtio-pci", 4),
        **function("0000:00:05.0", "1b36", "0010", "010802", "nvme", 5),
        **function("0000:00:06.0", "1af4", "1000", "020000", "virtio-pci", 6),
        **function("0000:00:07.0", "8086", "10c9", "020000", "igb", 7),
        **function("0000:00:1f.0", "8086", "2918", "060100", "lpc_ich", 8),
        **function("0000:00:1f.2", "8086", "2922", "010601", "ahci", 8),
        **function("0000:00:1f.3", "8086", "2930", "0c0500", "i801_smbus", 8),
        "/proc/self/mountinfo": MOUNTINFO,
        "/proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        "/proc/net/route": ROUTES,
        "/proc/net/ipv6_route": IPV6_ROUTES,
        "/etc/group": f"daemon:x:1:\nkvm:x:{os.getgid()}:\n",
        "/sys/bus/pci/drivers_probe": "",
        "/sys/bus/pci/drivers/vfio-pci": None,
        "/sys/class/iommu/dmar0": "-> ../../devices/virtual/iommu/dmar0",
        "/sys/firmware/acpi/tables/DMAR": "",
        "/sys/dev/block/254:0": f"-> ../..{devices[4:]}/0000:00:04.0/virtio0/block/vda",
        "/dev/vfio/vfio": "",
        "/proc/700/comm": "qemu-system-x86\n",
    }
    for name, path in (
        ("vda", "0000:00:04.0/virtio0/block/vda"),
        ("nvme0c0n1", "0000:00:05.0/nvme/nvme0/nvme0c0n1"),
        ("sr0", "0000:00:1f.2/ata3/host2/target2:0:0/2:0:0:0/block/sr0"),
    ):
        files[f"{devices}/{path}/uevent"] = ""
        files[f"/sys/class/block/{name}"] = f"-> ../../devices/pci0000:00/{path}"
    files[f"{devices}/0000:00:05.0/nvme/nvme0/nvme0c0n1/hidden"] = "1\n"
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    files[f"{subsystem}/nvme0n1/uevent"] = ""
    files[f"{subsystem}/nvme0"] = "-> ../../../pci0000:00/0000:00:05.0/nvme/nvme0"
    files["/sys/class/nvme-subsystem/nvme-subsys0"] = "-> ../../devices/virtual/nvme-subsystem/nvme-subsys0"
    files["/sys/class/block/nvme0n1"] = "-> ../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1"
    for name, path in (("enp0s6", "0000:00:06.0/virtio1/net/enp0s6"), ("enp0s7", "0000:00:07.0/net/enp0s7")):
        files[f"{devices}/{path}/flags"] = "0x1003\n"
        files[f"/sys/class/net/{name}"] = f"-> ../../devices/pci0000:00/{path}"
    for name, text in (
        ("sriov_totalvfs", "7"),
        ("sriov_numvfs", "0"),
        ("sriov_drivers_autoprobe", "1"),
        ("sriov_offset", "128"),
        ("sriov_stride", "2"),
        ("sriov_vf_device", "10ca"),
    ):
        files[f"{devices}/0000:00:07.0/{name}"] = f"{text}\n"
    return files


class LabHost(FakeHost):
    """The lab host with a kernel: writes to sysfs bind, unbind and make VFs.

    ``stubborn`` names functions that vfio-pci does not take, ``failing`` the
    numbers of VFs that the PF's driver refuses.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.stubborn: set[str] = set()
        self.failing: set[int] = set()
        self.files(lab_files())
        self.natives = {address: self.link_name(f"{DEVICES}/{address}/driver") for address in self.names(DEVICES)}
        self.answers.update(
            {"udevadm": "", "modprobe": "", "systemctl enable": "", "ip link set": "", "ip -json link show": "[]"}
        )

    def poke(self, path: str, value: str) -> None:
        """What the kernel does on a write."""
        super().poke(path, value)
        self.calls.append(f"{path} <- {value.strip()}")
        name = os.path.basename(path)
        if name == "unbind":
            self._bind(value, "")
        elif name == "drivers_probe":
            override = self.read(f"{DEVICES}/{value}/driver_override").replace("(null)", "")
            taken = override if override and value not in self.stubborn else ""
            self._bind(value, taken if override else self.natives.get(value, ""))
        else:
            text = value.strip()
            with open(self.path(path), "w", encoding="utf-8") as file:
                file.write(text or "(null)")
            if name == "sriov_numvfs":
                self._resize(int(text))

    def _bind(self, address: str, driver: str) -> None:
        path = self.path(f"{DEVICES}/{address}")
        group = self.link_name(f"{DEVICES}/{address}/iommu_group")
        if os.path.lexists(f"{path}/driver"):
            os.unlink(f"{path}/driver")
        self.remove(f"/dev/vfio/{group}")
        if driver:
            os.makedirs(self.path(f"/sys/bus/pci/drivers/{driver}"), exist_ok=True)
            os.symlink(f"../../../bus/pci/drivers/{driver}", f"{path}/driver")
            self.write(f"/sys/bus/pci/drivers/{driver}/unbind", "")
        if driver == "vfio-pci":
            self.write(f"/dev/vfio/{group}", "", 0o660)

    def _resize(self, number: int) -> None:
        path = self.path(f"{DEVICES}/0000:00:07.0")
        if number in self.failing:
            self.write("/sys/devices/pci0000:00/0000:00:07.0/sriov_numvfs", "0")
            raise HostError(f"writing '{number}' to sriov_numvfs: Cannot allocate memory")
        for i, address in enumerate(VIRTUAL):
            if os.path.lexists(f"{path}/virtfn{i}"):
                os.unlink(f"{path}/virtfn{i}")
                os.unlink(self.path(f"{DEVICES}/{address}"))
                shutil.rmtree(self.path(f"/sys/devices/pci0000:00/{address}"))
                os.unlink(self.path(f"/sys/kernel/iommu_groups/{13 + i}/devices/{address}"))
        for i, address in enumerate(VIRTUAL[:number]):
            self.files(
                {
                    **function(address, "8086", "10ca", "020000", "", 13 + i),
                    f"/sys/devices/pci0000:00/{address}/physfn": "-> ../0000:00:07.0",
                    f"/sys/devices/pci0000:00/0000:00:07.0/virtfn{i}": f"-> ../{address}",
                }
            )
