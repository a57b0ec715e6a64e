# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks of a 3FS storage service: XFS with 4096-byte sectors, mounted by id.

The label of a file system tells to which cluster and mount point it belongs, so that a
disk that was put into another slot is refused instead of being mounted as another one.
Each mount is a unit of its own, for which the storage service waits; one that fails takes its own targets only.
"""

from __future__ import annotations

import hashlib
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import UNITS, arrange
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import check_cluster

SECTOR = 4096
_BY_ID = "/dev/disk/by-id/"


def label(cluster: str, mount: str) -> str:
    """The label of the file system of a mount point; XFS takes at most 12 characters."""
    return "3fs-" + hashlib.sha256(f"{cluster}\0{mount}".encode()).hexdigest()[:8]


def mount_unit(path: str) -> str:
    """The name that systemd demands for the unit of a mount point."""
    escaped = "-".join(
        re.sub(r"[^A-Za-z0-9:_.]", lambda m: f"\\x{ord(m.group()):02x}", part) for part in path.strip("/").split("/")
    )
    return f"{escaped}.mount"


class Disks:
    """The disks of one cluster on one host as a resource.

    :param params: options of the module ``threefs_disk``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.disks: list[dict[str, str]] = []
        for index, disk in enumerate(params.get("disks") or []):
            option = f"disks[{index}]"
            device, mount = str(disk["device"]), str(disk["mount"]).rstrip("/")
            if not device.startswith("/"):
                device = _BY_ID + device
            if not device.startswith(("/dev/disk/by-", "/dev/mapper/")):
                raise Refused(
                    f"{option}.device",
                    disk["device"],
                    "the kernel may number this device otherwise at the next boot",
                    "Name it by id: ls -l /dev/disk/by-id",
                )
            if not mount.startswith("/") or mount == "/":
                raise Refused(
                    f"{option}.mount", disk["mount"], "not an absolute path", "Write one, such as /storage/data1"
                )
            for other in self.disks:
                for key, value in (("device", device), ("mount", mount)):
                    if other[key] == value:
                        raise Refused(f"{option}.{key}", disk[key], "another disk of the list has it", "Name each once")
            self.disks.append({"device": device, "mount": mount})
        self.directories = [str(path) for path in params.get("directories") or []]
        self.erase = {name if name.startswith("/") else _BY_ID + name for name in params.get("erase") or []}
        self.replaced = {str(path).rstrip("/") for path in params.get("replaced") or []}
        unknown = sorted(self.replaced - {disk["mount"] for disk in self.disks})
        if unknown and self.disks:
            raise Refused("replaced", unknown[0], "no disk of the list is mounted there", "Name mount points of disks")
        strangers = sorted(self.erase - {disk["device"] for disk in self.disks})
        if strangers:
            raise Refused(
                "erase", strangers[0], "this disk is not in disks", "Name only disks that shall be used by 3FS"
            )

    # -- observe --------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """What is on each disk, and what is mounted."""
        mounts: dict[str, str] = {}
        by_device: dict[str, str] = {}
        for line in self.host.read("/proc/self/mountinfo").splitlines():
            words = line.split()
            mounts[_unescape(words[4])] = words[2]
            by_device.setdefault(words[2], _unescape(words[4]))
        found: dict[str, t.Any] = {"disks": {}, "mounts": mounts, "directories": {}}
        for disk in self.disks:
            found["disks"][disk["device"]] = self._disk(disk, by_device)
        for path in [*self.directories, *(f"{disk['mount']}/3fs" for disk in self.disks)]:
            found["directories"][path] = self.host.exists(path)
        return found

    def _disk(self, disk: t.Mapping[str, str], by_device: t.Mapping[str, str]) -> dict[str, t.Any] | None:
        device = disk["device"]
        if not self.host.exists(device):
            return None
        name = os.path.basename(os.path.realpath(self.host.path(device)))
        block = f"/sys/class/block/{name}"
        number = self.host.read(f"{block}/dev")
        probe = self.host.run(["blkid", "--probe", "--output", "export", device], check=False)
        if probe.rc not in (0, 2):
            raise HostError(f"blkid {device}: {probe.text or probe.rc}. Is the disk readable?")
        pairs = dict(line.split("=", 1) for line in probe.stdout.splitlines() if "=" in line)
        partitions = [entry for entry in self.host.names(block) if self.host.exists(f"{block}/{entry}/partition")]
        return {
            "name": name,
            "number": number,
            "type": pairs.get("TYPE", "") or (f"a partition table ({pairs['PTTYPE']})" if "PTTYPE" in pairs else ""),
            "label": pairs.get("LABEL", ""),
            "sector": int(pairs.get("BLOCK_SIZE", 0) or 0),
            "in_use": self.host.names(f"{block}/holders") + partitions,
            "mounted": by_device.get(number, "") if number else "",
            "unit": self.host.read(f"{UNITS}/{mount_unit(disk['mount'])}"),
        }

    # -- plan ------------------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Format what is empty, write mount units, mount."""
        found: list[Step] = []
        devices: dict[str, str] = {}
        for index, disk in enumerate(self.disks):
            now = observed["disks"][disk["device"]]
            other = devices.setdefault(now["name"] if now else disk["device"], disk["device"])
            if other != disk["device"]:
                raise Refused(
                    f"disks[{index}].device", disk["device"], f"the same disk as {other}", "Name each disk once"
                )
            found += self._disk_steps(f"disks[{index}]", disk, now, observed["mounts"])
        writes = [step for step in found if step.verb == "write"]
        mounts = [step for step in found if step.verb == "mount"]
        steps = [step for step in found if step not in writes + mounts] + arrange(writes, mounts, mount_unit)
        covered = {f"{step.object}/3fs" for step in mounts}  # what was seen there lies below what is mounted now
        for path, there in observed["directories"].items():
            if not there or path in covered:
                steps.append(Step("create", path, after="directory"))
        return steps

    def _disk_steps(
        self, option: str, disk: dict[str, str], now: dict[str, t.Any] | None, mounts: t.Mapping[str, str]
    ) -> list[Step]:
        if now is None:
            raise Refused(
                f"{option}.device", disk["device"], "this host has no such disk", "Look at ls -l /dev/disk/by-id"
            )
        ours = now["type"] == "xfs" and now["label"] == label(self.cluster, disk["mount"])
        other = mounts.get(disk["mount"], now["number"])
        stale = other != now["number"]
        if stale and disk["mount"] not in self.replaced:
            raise Refused(
                f"{option}.mount",
                disk["mount"],
                f"another device ({other}) is mounted there",
                "Choose another path; if that disk was replaced, stop storage and name the path under replaced",
            )
        if not ours:
            self._refuse_data(option, disk, now)
        elif now["sector"] not in (0, SECTOR):
            raise Refused(
                f"{option}.device",
                disk["device"],
                f"its file system has sectors of {now['sector']} bytes; 3FS writes in {SECTOR}",
                "Empty the disk (drain its targets), then name it under erase",
            )
        steps = []
        if stale:
            steps.append(Step("unmount", disk["mount"], before=other, why="the disk was replaced", disruptive=True))
        if not ours:
            loses = f"loses {now['type']} {now['label']}".strip() if now["type"] else ""
            after = f"xfs {label(self.cluster, disk['mount'])}"
            steps.append(
                Step(
                    "format",
                    disk["device"],
                    before=now["type"] or None,
                    after=after,
                    why=loses,
                    disruptive=bool(loses),
                    data=disk,
                )
            )
        text = self._unit(disk)
        if now["unit"] != text.strip():
            path = f"{UNITS}/{mount_unit(disk['mount'])}"
            steps.append(Step("write", path, before=now["unit"] or None, after=text, data=text))
        if not ours or now["mounted"] != disk["mount"]:
            steps.append(Step("mount", disk["mount"], before=now["mounted"] or None, after=disk["device"]))
        return steps

    def _refuse_data(self, option: str, disk: dict[str, str], now: dict[str, t.Any]) -> None:
        if now["mounted"]:
            raise Refused(
                f"{option}.device",
                disk["device"],
                f"it is mounted at {now['mounted']}",
                "Unmount it, or name another disk",
            )
        if now["in_use"]:
            used = ", ".join(now["in_use"])
            raise Refused(
                f"{option}.device", disk["device"], f"it is in use: {used}", "Name another disk, or free this one"
            )
        if now["type"] == "xfs" and now["label"].startswith("3fs-") and disk["device"] not in self.erase:
            raise Refused(
                f"{option}.device",
                disk["device"],
                f"it belongs to another place of a 3FS cluster (label {now['label']})",
                "Are two disks exchanged? Correct the order; to give up what is on it, name it under erase",
            )
        if now["type"] and disk["device"] not in self.erase:
            raise Refused(
                f"{option}.device",
                disk["device"],
                f"it has data: {now['type']} {now['label']}".strip(),
                f"To lose them, name it: erase: [{os.path.basename(disk['device'])}]",
            )

    def _unit(self, disk: t.Mapping[str, str]) -> str:
        return (
            f"# Written by agentfleet.metal.\n[Unit]\nDescription=Disk of the 3FS cluster {self.cluster}\n\n"
            f"[Mount]\nWhat={disk['device']}\nWhere={disk['mount']}\nType=xfs\nOptions=noatime,nodiratime\n\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )

    # -- apply --------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if step.verb == "format":
            disk = step.data
            force = ["-f"] if step.disruptive else []
            name = label(self.cluster, disk["mount"])
            argv = ["mkfs.xfs", *force, "-q", "-L", name, "-s", f"size={SECTOR}", disk["device"]]
            self.host.run(argv, timeout_seconds=600)
        elif step.verb == "write":
            self.host.write(step.object, step.data.text)
            step.data.tell(self.host)
        elif step.verb == "unmount":
            self.host.run(["umount", step.object], timeout_seconds=120)
        elif step.verb == "mount":
            step.data.tell(self.host)
            self.host.run(["systemctl", "restart", mount_unit(step.object)], timeout_seconds=120)
        else:
            os.makedirs(self.host.path(step.object), mode=0o755, exist_ok=True)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The paths for storage's target_paths, in order."""
        paths = [f"{disk['mount']}/3fs" for disk in self.disks] + self.directories
        return {
            "target_paths": paths,
            "disks": {
                device: now and {"label": now["label"], "mounted": now["mounted"]}
                for device, now in observed["disks"].items()
            },
        }


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
