# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a 3FS cluster on doubles, in order: made, grown, a disk and a node replaced, upgraded, its tokens rotated.

Each change is interrupted once by an error that admin_cli tells with exit code 0, and run again. The tests build on each
other. Nothing of 3FS or FoundationDB itself runs here: what is proven is what our playbooks do to real hosts (systemd, XFS on
NVMe, files, the order of things) and how they take what those programs are known to say.
"""

from __future__ import annotations

import importlib.util
import json
import time
import typing as t

import pytest

SECRET = "a-secret-that-was-planted-for-this-test"
ADMIN_PORT_OFFSET, SECOND_PORT_OFFSET, THIRD_PORT_OFFSET = 2, 3, 4
GROWN = {"threefs_third_services": ["storage", "fuse"]}


class Cluster:
    """The cluster as this test drives it: inventory variables that change over its life."""

    def __init__(self, lab: t.Any, module: t.Any) -> None:
        self.lab = lab
        directory = module.LAB_DIRECTORY / "doubles"
        path = lab.root / "tests/doubles/threefs/make_archive.py"
        spec = importlib.util.spec_from_file_location("make_archive", path)
        assert spec is not None and spec.loader is not None
        packer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(packer)
        digests = {
            name: digest for release in ("1", "2") for name, digest in packer.main(str(directory), release).items()
        }
        self.releases = {
            release: [
                {"src": f"{directory}/3fs-double-{release}.tar.gz", "sha256": digests[f"3fs-double-{release}.tar.gz"]}
            ]
            for release in ("1", "2")
        }
        fdb = "foundationdb-double.tar.gz"
        self.variables: dict[str, t.Any] = {
            "threefs_sources": self.releases["1"],
            "foundationdb_sources": [{"src": f"{directory}/{fdb}", "sha256": digests[fdb]}],
            "threefs_token_secret": SECRET,
            "threefs_table_directory": f"{directory}/tables",
        }
        port = module.FIRST_PORT
        self.admin = lab.connection("metal3", port + ADMIN_PORT_OFFSET)
        self.second = lab.connection("metal4", port + SECOND_PORT_OFFSET)
        self.third = lab.connection("metal5", port + THIRD_PORT_OFFSET)

    def play(self, playbook: str, *arguments: str, **more: t.Any) -> t.Any:
        """Run a playbook that must succeed."""
        return self.lab.succeed(playbook, *arguments, **{**self.variables, **more})

    def interrupt(self, command: str, playbook: str, *arguments: str, after: int = 0, **more: t.Any) -> None:
        """Run a playbook in which one command of admin_cli fails by its text alone."""
        trap = json.dumps([{"command": command, "after": after, "times": 1, "error": "9(Unknown)"}])
        self.admin.run(f"mkdir -p /var/lib/3fs-double && echo '{trap}' > /var/lib/3fs-double/traps.json")
        played = self.lab.play(playbook, *arguments, **{**self.variables, **more})
        assert played.rc != 0 and "provoked" in played.failures(), played.failures()

    def ask(self, *commands: str) -> str:
        """What admin_cli says."""
        text = "\n".join(commands)
        return str(
            self.admin.check_output(
                "$(ls -d /opt/3fs/*/bin/admin_cli | head -n 1) -cfg /etc/3fs/stage/admin_cli.toml <<'EOF'\n"
                + text
                + "\nEOF"
            )
        )

    def chains(self) -> list[list[str]]:
        """The rows of list-chains."""
        return [line.split() for line in self.ask("list-chains").splitlines()[1:]]

    def assert_well(self, nodes: set[str], replicas: int = 2) -> None:
        """Every chain serves with so many replicas, on exactly these nodes."""
        rows = self.chains()
        assert rows and all(row[3] == "SERVING" and len(row) == 5 + replicas for row in rows), rows
        used = {str(int(cell.split("(")[0]) // 100000 % 1000000) for row in rows for cell in row[5:]}
        assert used == nodes


@pytest.fixture(scope="session")
def cluster(lab: t.Any, request: pytest.FixtureRequest) -> Cluster:
    """The cluster."""
    module = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "LAB_DIRECTORY"))
    return Cluster(lab, module)


def test_from_nothing_interrupted_and_continued(cluster: Cluster) -> None:
    predicted = {task.split(": ", 1)[1] for task in cluster.play("threefs", "--check").changed()}
    assert {"Run the servers", "Configure all services of the host", "Make targets, chains and tables"} <= predicted
    cluster.interrupt("create-target", "threefs", after=3)
    cluster.play("threefs")
    cluster.assert_well({"10001", "10002"})
    assert cluster.third.mount_point("/3fs/stage").exists
    shown = dict(line.split(None, 1) for line in cluster.ask("stat --display-layout /search").splitlines())
    assert (shown["Uid"], shown["Permission"], shown["Layout-ChunkSize"]) == ("2001", "0750", str(4 << 20))


def test_a_second_run_changes_nothing(cluster: Cluster) -> None:
    assert cluster.play("threefs").changed() == []


def test_disks_are_xfs_with_sectors_of_4096_and_come_back(cluster: Cluster) -> None:
    assert cluster.admin.mount_point("/storage/data1").filesystem == "xfs"
    assert "sectsz=4096" in cluster.admin.check_output("xfs_info /storage/data1")
    unit = cluster.admin.check_output("systemctl cat threefs-stage-storage.service")
    assert "RequiresMountsFor=/storage/data1/3fs" in unit and "LimitMEMLOCK=infinity" in unit
    assert cluster.admin.check_output("systemctl is-enabled storage-data1.mount") == "enabled"


def test_secrets_are_in_files_for_root_alone(cluster: Cluster) -> None:
    token = cluster.admin.check_output('sed -n "s/^token = \\"\\(.*\\)\\"/\\1/p" /etc/3fs/stage/admin_cli.toml')
    assert len(token) == 24
    for host in (cluster.admin, cluster.second, cluster.third):
        seen = host.run(
            f"grep -rlF -e '{token}' -e '{SECRET}' /var/log /run/log 2>/dev/null; cat /proc/[0-9]*/cmdline | grep -aF '{token}'"
        )
        assert [line for line in seen.stdout.splitlines() if "grep" not in line] == []
        loose = host.run(
            f"grep -rlF -e '{token}' -e '{SECRET}' /etc /var/lib/3fs | xargs -r stat -c '%a %n' | grep -v '^600 '"
        )
        assert loose.stdout == ""


def test_a_service_that_dies_is_started_again(cluster: Cluster) -> None:
    before = cluster.second.check_output("systemctl show -P MainPID threefs-stage-storage")
    cluster.second.run(f"kill -9 {before}")
    end = time.monotonic() + 180
    while cluster.second.check_output("systemctl show -P MainPID threefs-stage-storage") in ("0", before):
        assert time.monotonic() < end
        time.sleep(2)
    while any(row[3] != "SERVING" for row in cluster.chains()):
        assert time.monotonic() < end
        time.sleep(2)
    cluster.assert_well({"10001", "10002"})


def test_a_third_node_is_added_while_all_chains_serve(cluster: Cluster) -> None:
    cluster.variables.update(GROWN)
    cluster.interrupt("update-chain", "threefs_scale_out", after=1)
    assert all(row[3] != "UNAVAILABLE" for row in cluster.chains())
    cluster.play("threefs_scale_out")
    cluster.assert_well({"10001", "10002", "10003"})


def test_a_disk_is_replaced(cluster: Cluster) -> None:
    disk = {"threefs_replace_host": "metal5", "threefs_replace_mount": "/storage/data1"}
    cluster.variables["threefs_third_disk"] = 2
    cluster.interrupt("create-targets", "threefs_replace_disk", **disk)
    cluster.play("threefs_replace_disk", **disk)
    cluster.assert_well({"10001", "10002", "10003"})
    device = cluster.third.check_output("findmnt -n -o SOURCE /storage/data1")
    assert device == cluster.third.check_output("realpath /dev/disk/by-path/pci-0000:00:08.0-nvme-2")


def test_release_and_configuration_are_changed_host_after_host(cluster: Cluster) -> None:
    cluster.variables["threefs_sources"] = cluster.releases["2"]
    cluster.interrupt("list-chain-tables", "threefs_rolling", after=1)
    cluster.play("threefs_rolling")
    nodes = cluster.ask("list-nodes").splitlines()[1:]
    assert len(nodes) == 7 and all(line.endswith("250228-double-2") and "UPTODATE" in line for line in nodes)
    cluster.assert_well({"10001", "10002", "10003"})


def test_tokens_are_rotated_without_a_gap(cluster: Cluster) -> None:
    cluster.variables["threefs_token_generation"] = 2
    cluster.interrupt("user-set-token", "threefs_tokens")
    cluster.play("threefs_tokens")
    assert "HEARTBEAT_CONNECTED" in cluster.ask("list-nodes") and "Encounter error" not in cluster.ask("user-list")
    assert cluster.third.mount_point("/3fs/stage").exists


def test_foundationdb_is_backed_up_and_the_backup_checked(cluster: Cluster) -> None:
    cluster.play("threefs_fdb_backup")
    assert int(cluster.admin.check_output("ls -d /backup/fdb/backup-* | wc -l")) >= 1
    assert cluster.admin.check_output("systemctl is-active foundationdb-backup.timer") == "active"


def test_a_node_is_drained_and_forgotten(cluster: Cluster) -> None:
    drain = {"threefs_drain_hosts": ["metal5"], "threefs_targets_per_disk": 6, "threefs_drain_retire": True}
    cluster.interrupt("offline-target", "threefs_drain", after=1, **drain)
    cluster.play("threefs_drain", **drain)
    cluster.assert_well({"10001", "10002"})
    assert "10003" not in cluster.ask("list-nodes")


def test_a_lost_node_is_replaced(cluster: Cluster) -> None:
    cluster.second.check_output("systemctl disable --now threefs-stage-storage threefs-stage-meta threefs-stage-mgmtd")
    successor = {
        "threefs_group": "threefs_left",
        "threefs_third_node": 4,
        "threefs_third_services": ["storage", "fuse"],
        "threefs_targets_per_disk": 6,
        "threefs_retire_nodes": [2, 101, 10002],
    }
    cluster.interrupt("update-chain", "threefs_replace_node", "--tags=threefs,always", after=2, **successor)
    cluster.play("threefs_replace_node", "--tags=threefs,always", **successor)
    cluster.assert_well({"10001", "10004"})
    assert "10002" not in cluster.ask("list-nodes")
