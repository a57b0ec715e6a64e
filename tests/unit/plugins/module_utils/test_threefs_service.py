# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units and disks of 3FS: _threefs_service and _threefs_disk."""

from __future__ import annotations

import json
import re
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import UNITS
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_disk import Disks, label, mount_unit
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_service import Services

DESCRIBED = {
    "cluster": "stage",
    "release": "/opt/3fs/1",
    "binaries": "/opt/3fs/1/bin",
    "services": ["storage", "fuse", "monitor"],
    "node_ids": {"storage": 10001},
    "mains": {"storage": "0123", "fuse": "4567"},
    "ports": {"storage": {"rdma": 8002}},
    "target_paths": ["/storage/data1/3fs"],
    "mountpoint": "/3fs/stage",
}
STORAGE, FUSE = f"{UNITS}/threefs-stage-storage.service", f"{UNITS}/threefs-stage-fuse.service"


class Systemd:
    """systemctl with units that run."""

    def __init__(self, host: t.Any) -> None:
        self.host, self.running, self.dying = host, {}, set()
        host.answers["systemctl"] = self

    def __call__(self, host: t.Any) -> t.Any:
        """Answer the last command line."""
        words = host.calls[-1].split()[1:]
        units = [word for word in words if word.endswith(".service")]
        if words[0] == "restart":
            digest = next(x for x in host.read(f"{UNITS}/{units[0]}").split() if x.startswith("Environment=AGENTFLEET"))
            self.running[units[0]] = str(100 + len(self.running))
            host.files({f"/proc/{self.running[units[0]]}/environ": digest.removeprefix("Environment=")})
        if words[0] == "stop":
            self.running.pop(units[0], None)
        if words[0] == "show":
            return "\n\n".join(
                f"Id={unit}\nActiveState={'active' if unit in self.running else 'inactive'}\n"
                f"MainPID={'0' if unit in self.dying else self.running.get(unit, '0')}\n"
                f"UnitFileState={'enabled' if unit in self.running else 'disabled'}"
                for unit in units
            )
        return ""


@pytest.fixture
def host(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> t.Any:
    """A host whose services are described."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    fake_host.systemd = Systemd(fake_host)
    fake_host.answers["clickhouse-client"] = "1\n"
    etc = {f"/etc/3fs/stage/{name}": name for name in ("storage_main_launcher.toml", "fuse.token")}
    return fake_host.files({"/etc/3fs/stage/cluster.json": json.dumps(DESCRIBED), **etc})


def converge(host: t.Any, **params: t.Any) -> list[tuple[str, str]]:
    """Observe, plan, apply."""
    services = Services(host, {"cluster": "stage", **params})
    steps = services.plan(services.observe())
    apply_all(services, steps)
    return [(step.verb, step.object.rpartition("-")[2].removesuffix(".service")) for step in steps]


def test_units_are_better_than_upstreams(host: t.Any) -> None:
    assert ("start", "storage") in converge(host)
    storage, fuse = host.read(STORAGE), host.read(FUSE)
    assert "TimeoutStopSec=5min" in storage
    assert "LimitMEMLOCK=infinity" in storage and "Restart=on-failure" in storage and "ProtectHome=yes" in storage
    assert "ExecStopPost=-/bin/sh -c 'if grep" in fuse and "Protect" not in fuse, "the mount must be seen"
    assert "Assert" not in fuse, "a look at what is left of a FUSE that died fails"
    assert "--app_cfg /etc/3fs/stage/storage_main_app.toml" in storage
    enabled = [call for call in host.calls if "enable" in call or "reload" in call]
    assert enabled == [f"systemctl enable --quiet {' '.join(host.systemd.running)}"], "systemd reads all units once"
    assert converge(host) == []


@pytest.mark.parametrize(
    ("line", "cleaned"), [("hf3fs.stage /3fs/stage fuse.hf3fs rw 0 0", True), ("a /3fs/stage2 b", False)]
)
def test_a_mount_that_is_left_is_known_without_looking_at_it(
    host: t.Any, tmp_path: Path, line: str, cleaned: bool
) -> None:
    converge(host)
    command = re.search(r"ExecStartPre=-/bin/sh -c '(.*)'", host.read(FUSE))
    assert command
    (tmp_path / "mounts").write_text(f"proc /proc proc rw 0 0\n{line}\n")
    script = command[1].replace("/proc/self/mounts", str(tmp_path / "mounts")).replace("umount", "echo umount")
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ("umount --lazy /3fs/stage\n" if cleaned else "")


def test_one_dead_disk_does_not_take_the_others_with_it(host: t.Any) -> None:
    described = {**DESCRIBED, "target_paths": ["/storage/data-1/3fs", "/storage/data2/3fs"]}
    host.files({"/etc/3fs/stage/cluster.json": json.dumps(described)})
    converge(host)
    lines = host.read(STORAGE).splitlines()
    mounts = r"storage-data\x2d1.mount storage-data2.mount"
    after = next(line for line in lines if line.startswith("After="))
    assert after.endswith(f" {mounts}") and f"Wants=network-online.target {mounts}" in lines
    assert not [line for line in lines if "Requires" in line or "BindsTo" in line]
    assert "ExecStartPre=-/bin/mkdir -p /storage/data-1/3fs /storage/data2/3fs" in lines, (
        "3FS ends where one is missing"
    )


def test_what_runs_with_an_older_configuration_is_found_by_what_runs(host: t.Any) -> None:
    converge(host)
    host.files({"/etc/3fs/stage/storage_main_launcher.toml": "other"})
    held = Services(host, {"cluster": "stage", "restart": False})
    apply_all(held, held.plan(held.observe()))
    result = held.result(held.observe())
    assert result["outdated"] == ["threefs-stage-storage.service"] and "threefs_rolling" in result["warnings"][0]
    assert result["processes"] == {"10001": int(host.systemd.running["threefs-stage-storage.service"])}
    host.calls.clear()
    assert converge(host) == [("restart", "storage")], "the unit was written by the run that did not restart it"
    assert "systemctl daemon-reload" in host.calls, "that run may have been interrupted before systemd read it"
    assert converge(host) == []


def test_other_directories_of_libraries_restart_what_runs(host: t.Any) -> None:
    converge(host, services=["storage"])
    before = host.read(STORAGE)
    assert converge(host, services=["storage"], library_path=[]) == [], "no new digest where there are none"
    assert converge(host, services=["storage"], library_path=["/opt/3fs/1/lib"]) == [
        ("write", "storage"),
        ("restart", "storage"),
    ]
    assert host.read(STORAGE) != before and "LD_LIBRARY_PATH=/opt/3fs/1/lib" in host.read(STORAGE)
    assert converge(host, services=["storage"], library_path=["/opt/3fs/1/lib"]) == []
    stopping = Services(host, {"cluster": "stage", "services": ["storage"], "state": "stopped"})
    assert stopping.result(stopping.observe())["warnings"] == [], "it is not told the directories, and need not be"


def test_a_main_configuration_restarts_only_its_own_service(host: t.Any) -> None:
    converge(host)
    described = {**DESCRIBED, "mains": {"storage": "89ab", "fuse": "4567"}}
    host.files({"/etc/3fs/stage/cluster.json": json.dumps(described)})
    assert converge(host) == [("write", "storage"), ("restart", "storage")] and converge(host) == []


def test_what_mgmtd_knows_to_be_outdated_is_restarted_though_it_was_started_for_this_configuration(host: t.Any) -> None:
    converge(host)
    assert converge(host, outdated_nodes=[100, 10002]) == [], "they are other hosts'"
    assert converge(host, outdated_nodes=[10001, 10002]) == [("restart", "storage")]
    assert converge(host, services=["fuse"], outdated_nodes=[10001]) == []


def test_check_mode_knows_what_an_earlier_task_would_have_changed(host: t.Any) -> None:
    converge(host)
    services = Services(host, {"cluster": "stage", "changing": ["storage"]})
    assert services.plan(services.observe()) == []
    services.predicting = True
    assert [step.object for step in services.plan(services.observe())] == ["threefs-stage-storage.service"]


def test_a_service_that_does_not_stay_up_is_an_error(host: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    host.systemd.dying = {"threefs-stage-storage.service"}
    host.answers["journalctl"] = "target path /storage/data1/3fs does not exist"
    with pytest.raises(HostError, match=r"threefs-stage-storage.service does not stay up: target path"):
        converge(host)
    assert host.calls[-1].endswith("-u threefs-stage-storage.service"), (
        "the log of the one that ended, of all that started"
    )


def test_tables_of_the_monitor_are_made_when_they_are_missing(host: t.Any) -> None:
    host.answers["clickhouse-client"] = "0\n"
    services = Services(host, {"cluster": "stage", "services": ["monitor"]})
    steps = services.plan(services.observe())
    assert steps[0].object == "tables of the monitor in ClickHouse"
    with pytest.raises(HostError, match="clickhouse_schema: false"):
        services.apply(steps[0])
    host.files({"/opt/3fs/1/deploy/sql/3fs-monitor.sql": "CREATE"})
    services.apply(steps[0])
    assert host.calls[-1].endswith("clickhouse-client.xml -n")


@pytest.mark.parametrize(("more", "name"), [({}, "3fs"), ({"clickhouse_db": "stage"}, "stage")])
def test_tables_are_made_in_the_database_that_the_monitor_writes_to(
    host: t.Any, monkeypatch: pytest.MonkeyPatch, more: dict[str, str], name: str
) -> None:
    sql = "CREATE DATABASE IF NOT EXISTS 3fs;\nCREATE TABLE IF NOT EXISTS 3fs.counters (a DateTime);\n"
    host.files(
        {"/etc/3fs/stage/cluster.json": json.dumps({**DESCRIBED, **more}), "/opt/3fs/1/sql/3fs-monitor.sql": sql}
    )
    host.answers["clickhouse-client"] = "0\n"
    given: list[str] = []
    run = host.run
    monkeypatch.setattr(host, "run", lambda argv, **how: (given.append(how.get("stdin", "")), run(argv, **how))[1])
    converge(host, services=["monitor"])
    asked = [call for call in host.calls if "EXISTS" in call]
    assert asked[0].endswith(f"--query EXISTS TABLE `{name}`.distributions")
    assert f"DATABASE IF NOT EXISTS `{name}`;\nCREATE TABLE IF NOT EXISTS `{name}`.counters (" in "".join(given)


def test_stopping_and_removing(host: t.Any) -> None:
    converge(host)
    assert converge(host, services=["storage"], state="stopped") == [("stop", "storage")]
    assert converge(host, state="absent") == [
        ("stop", "monitor"),
        ("stop", "fuse"),
        ("remove", "storage"),
        ("remove", "fuse"),
        ("remove", "monitor"),
    ]
    assert converge(host, state="absent") == [] and not host.exists(STORAGE)


# -- disks -------------------------------------------------------------------------------

DISK = {"device": "nvme-a", "mount": "/storage/data-1"}
PATH = "/dev/disk/by-id/nvme-a"
OURS = f"TYPE=xfs\nLABEL={label('stage', '/storage/data-1')}\nBLOCK_SIZE=4096\n"


def disks(host: t.Any, blkid: t.Any, mountinfo: str = "", **params: t.Any) -> Disks:
    """One disk with what blkid says of it."""
    host.files({PATH: "", "/sys/class/block/nvme-a/dev": "259:1", "/proc/self/mountinfo": mountinfo})
    host.answers.update({f"blkid --probe --output export {PATH}": blkid, "mkfs.xfs": "", "systemctl": "", "umount": ""})
    return Disks(host, {"cluster": "stage", "disks": [DISK], **params})


def test_an_empty_disk_is_formatted_and_mounted_by_its_id(fake_host: t.Any) -> None:
    resource = disks(fake_host, (2, "", ""))
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["format", "write", "mount", "create"] and not steps[0].disruptive
    apply_all(resource, steps)
    assert f"mkfs.xfs -q -L {label('stage', '/storage/data-1')} -s size=4096 {PATH}" in fake_host.calls
    unit = fake_host.read(f"{UNITS}/{mount_unit('/storage/data-1')}")
    assert f"What={PATH}" in unit and "noatime" in unit
    assert resource.result(resource.observe())["target_paths"] == ["/storage/data-1/3fs"]


def test_a_disk_of_ours_is_only_mounted(fake_host: t.Any) -> None:
    resource = disks(fake_host, OURS, "29 1 259:1 / /storage/data-1 rw - xfs x rw\n")
    fake_host.files({"/storage/data-1/3fs": None})
    steps = resource.plan(resource.observe())
    assert [step.verb for step in steps] == ["write"]
    apply_all(resource, steps)
    assert resource.plan(resource.observe()) == []


def test_data_are_lost_only_by_name(fake_host: t.Any) -> None:
    resource = disks(fake_host, "TYPE=ext4\nLABEL=home\n", erase=["nvme-a"])
    step = resource.plan(resource.observe())[0]
    assert (step.verb, step.before, step.why, step.disruptive) == ("format", "ext4", "loses ext4 home", True)
    resource.apply(step)
    assert fake_host.calls[-1].startswith("mkfs.xfs -f ")


def test_a_replaced_disk_is_unmounted_when_that_is_said(fake_host: t.Any) -> None:
    old = "29 1 8:1 / /storage/data-1 rw - xfs x rw\n"
    unasked = disks(fake_host, (2, "", ""), old)
    with pytest.raises(Refused):
        unasked.plan(unasked.observe())
    resource = disks(fake_host, (2, "", ""), old, replaced=["/storage/data-1"])
    fake_host.files({"/storage/data-1/3fs": None})  # the old disk's
    assert [step.verb for step in resource.plan(resource.observe())] == [
        "unmount",
        "format",
        "write",
        "mount",
        "create",
    ]


def test_names_of_mount_units() -> None:
    assert mount_unit("/storage/data-1/a b") == "storage-data\\x2d1-a\\x20b.mount"
    assert len(label("a_very_long_name_of_a_cluster", "/storage/data1")) == 12
