# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a 3FS cluster on doubles, in order: made, grown, a disk and a node replaced, upgraded, its tokens rotated.

Each change is interrupted half-way and run again; most by an error that admin_cli tells with exit code 0. The other traps of
upstream follow at the end: chains without a server (LASTSRV), and chains that were uploaded before their targets. The tests
build on each other. Nothing of 3FS or FoundationDB itself runs here: what is proven is what our playbooks do to real hosts
(systemd, XFS on NVMe, files, the order of things) and how they take what those programs are known to say.
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
PATIENCE_SECONDS = 240
FIRST_TARGET = 5  # column of list-chains
PID, VERSION = 4, -2  # columns of list-nodes
FDB = "$(ls -d /opt/foundationdb/*/bin)"


class Cluster:
    """The cluster as this test drives it: inventory variables that change over its life."""

    def __init__(self, lab: t.Any, module: t.Any) -> None:
        self.lab = lab
        lab.accelerate()
        lab.declared = {"lab_group": "lab_threefs"}
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

    def interrupt(self, command: str, playbook: str, *arguments: str, after: int = 0, **more: t.Any) -> t.Any:
        """Run a playbook in which one command of admin_cli fails by its text alone; what it did until then."""
        trap = json.dumps([{"command": command, "after": after, "times": 1, "error": "999(Unknown)"}])
        self.admin.run(f"mkdir -p /var/lib/3fs-double && echo '{trap}' > /var/lib/3fs-double/traps.json")
        played = self.lab.play(playbook, *arguments, **{**self.variables, **more})
        assert played.rc != 0 and "provoked" in played.failures(), played.failures()
        return played

    def refused(self, playbook: str, *arguments: str, **more: t.Any) -> str:
        """Run a playbook that must end at its gate with nothing changed; what it says."""
        played = self.lab.play(playbook, *arguments, **{**self.variables, "threefs_wait_seconds": 3, **more})
        assert played.rc != 0 and played.changed() == []
        return str(played.failures())

    def ask(self, *commands: str) -> str:
        """What admin_cli says; it ends with 0 whatever that is."""
        text = "\n".join(commands)
        return str(
            self.admin.check_output(
                "$(ls -d /opt/3fs/*/bin/admin_cli | head -n 1) -cfg /etc/3fs/stage/admin_cli.toml <<'EOF'\n"
                + text
                + "\nEOF"
            )
        )

    def nodes(self, kind: str = "") -> dict[str, list[str]]:
        """Id -> the row of list-nodes; VERSION and the release are counted from its end, as a time has a blank."""
        rows = [line.split() for line in self.ask("list-nodes").splitlines()[1:]]
        return {row[0]: row for row in rows if kind in ("", row[1])}

    def chains(self) -> list[list[str]]:
        """The rows of list-chains: id, tables, version, status, preferred order, targets."""
        return [line.split() for line in self.ask("list-chains").splitlines() if line[:1].isdigit()]

    def until(self, what: str, holds: t.Callable[[list[list[str]]], bool]) -> None:
        """Wait, bounded, until something holds of the chains."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            rows = self.chains()
            if rows and holds(rows):
                return
            assert time.monotonic() < end, f"{what}: {rows}"
            time.sleep(2)

    def assert_well(self, nodes: set[str]) -> None:
        """Every chain serves with two replicas, on exactly these nodes."""
        rows = self.chains()
        assert rows and all(row[3] == "SERVING" and len(row) == FIRST_TARGET + 2 for row in rows), rows
        assert nodes_of(rows) == nodes


def done(played: t.Any) -> set[str]:
    """What a playbook changed, as "host: task" without the task's role."""
    return {f"{task.host}: {task.name.rpartition(' : ')[2]}" for task in played.tasks if task.changed}


def nodes_of(rows: list[list[str]]) -> set[str]:
    """The storage services on which these chains have targets, as the targets' ids tell."""
    return {str(int(cell.split("(")[0]) // 100000 % 1000000) for row in rows for cell in row[FIRST_TARGET:]}


@pytest.fixture(scope="session")
def cluster(lab: t.Any, request: pytest.FixtureRequest) -> Cluster:
    """The cluster."""
    module = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "LAB_DIRECTORY"))
    return Cluster(lab, module)


def test_from_nothing_interrupted_and_continued(cluster: Cluster) -> None:
    alone = cluster.lab.play("threefs", "--limit=metal4", **cluster.variables)
    assert alone.changed() == [] and "metal3, metal5 were not asked" in alone.failures(), "no database beside another"
    steps = {"Run the servers", "Configure all services of the host", "Make targets, chains and tables"}
    assert {f"metal3: {step}" for step in steps} <= done(cluster.play("threefs", "--check"))
    half = cluster.interrupt("create-target", "threefs", after=3)
    assert "metal3: Run meta and storage" in done(half)
    assert cluster.chains() == [] and "Encounter error" not in cluster.ask("list-chains"), "no chain before its targets"
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
    assert "Wants=network-online.target storage-data1.mount" in unit and "LimitMEMLOCK=infinity" in unit
    assert cluster.admin.check_output("systemctl is-enabled storage-data1.mount") == "enabled"
    lost = "systemctl stop storage-data1.mount; systemctl is-active threefs-stage-storage; systemctl start storage-data1.mount"
    assert cluster.admin.check_output(lost) == "active", "the service has other disks"
    assert cluster.admin.mount_point("/storage/data1").exists


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
        assert host.check_output("stat -c %a /etc/foundationdb/fdb.cluster") == "600"
    for host in (cluster.admin, cluster.second):
        assert host.check_output("stat -c %a /var/lib/3fs/stage/fdb.cluster") == "600"
    assert not cluster.third.file("/var/lib/3fs/stage/fdb.cluster").exists, "nothing there opens the database"
    assert cluster.admin.check_output("stat -c %a /backup/fdb") == "700"


def test_a_service_that_dies_is_started_again(cluster: Cluster) -> None:
    before = cluster.second.check_output("systemctl show -P MainPID threefs-stage-storage")
    cluster.second.run(f"kill -9 {before}")
    mounts = "grep -c ' /3fs/stage ' /proc/self/mounts"
    cluster.third.check_output("systemctl kill --signal=KILL threefs-stage-fuse")  # leaves its mount behind
    end = time.monotonic() + PATIENCE_SECONDS
    while cluster.second.check_output("systemctl show -P MainPID threefs-stage-storage") in ("0", before):
        assert time.monotonic() < end
        time.sleep(2)
    cluster.until("all chains serve", lambda rows: all(row[3] == "SERVING" for row in rows))
    cluster.assert_well({"10001", "10002"})
    restarts = "systemctl show -P NRestarts threefs-stage-fuse"
    while cluster.third.check_output(restarts) == "0" or cluster.third.run(mounts).stdout.strip() != "1":
        assert time.monotonic() < end
        time.sleep(2)


def test_a_third_node_is_added_while_all_chains_serve(cluster: Cluster) -> None:
    cluster.variables.update(GROWN)
    # With it comes a key that storage reads only when it starts: what runs refuses it, and is restarted for it alone.
    cluster.variables["threefs_lab_storage"] = {"server.aio_read_worker.num_threads": 7}
    before = cluster.nodes("STORAGE")
    cluster.interrupt("update-chain", "threefs_scale_out", after=1)
    refused = cluster.admin.check_output("journalctl -o cat -u threefs-stage-storage | grep 'Update config failed'")
    assert "Not support hot update: server.aio_read_worker.num_threads" in refused
    after = cluster.nodes("STORAGE")
    assert set(after) == {"10001", "10002", "10003"} and all(row[VERSION] == "2(UPTODATE)" for row in after.values())
    assert all(after[node][PID] != row[PID] for node, row in before.items())
    cluster.ask("get-config -t STORAGE -o /run/storage_main.toml")
    assert "num_threads = 7" in cluster.admin.check_output("cat /run/storage_main.toml")
    rows = cluster.chains()
    assert all(row[3] != "UNAVAILABLE" for row in rows)
    assert any(len(row) > FIRST_TARGET + 2 for row in rows), "a chain has its new target beside the old ones"
    cluster.play("threefs_scale_out")
    cluster.assert_well({"10001", "10002", "10003"})


def test_a_disk_is_replaced(cluster: Cluster) -> None:
    disk = {"threefs_replace_host": "metal5", "threefs_replace_mount": "/storage/data1"}
    cluster.variables["threefs_third_disk"] = 2
    half = cluster.interrupt("create-target", "threefs_replace_disk", **disk)
    assert "metal5: Format and mount the new disk" in done(half)
    cluster.play("threefs_replace_disk", **disk)
    cluster.assert_well({"10001", "10002", "10003"})
    device = cluster.third.check_output("findmnt -n -o SOURCE /storage/data1")
    assert device == cluster.third.check_output("realpath /dev/disk/by-path/pci-0000:00:08.0-nvme-2")


def test_release_and_configuration_are_changed_host_after_host(cluster: Cluster) -> None:
    cluster.variables["threefs_sources"] = cluster.releases["2"]
    cluster.variables["threefs_lab_storage"] = {"server.aio_read_worker.num_threads": 8}
    cluster.interrupt("list-chain-tables", "threefs_rolling", after=1)
    nodes = cluster.nodes()
    assert {row[-1] for row in nodes.values()} == {"250228-double-1", "250228-double-2"}
    held = [row[VERSION] for row in nodes.values() if row[1] == "STORAGE" and row[-1] == "250228-double-1"]
    assert held and set(held) == {"2"}, "these wait for their turn, and the gates do not wait for them"
    cluster.play("threefs_rolling")
    nodes = cluster.nodes()
    assert len(nodes) == 7 and all(
        row[-1] == "250228-double-2" and "UPTODATE" in row[VERSION] for row in nodes.values()
    )
    cluster.assert_well({"10001", "10002", "10003"})


def test_tokens_are_rotated_without_a_gap(cluster: Cluster) -> None:
    cluster.variables["threefs_token_generation"] = 2
    half = cluster.interrupt("user-set-token", "threefs_tokens", after=1)
    assert "Done before it: set token of" in half.failures()
    assert "Encounter error" not in cluster.ask("user-list"), "the old token is still in force"
    cluster.play("threefs_tokens")
    assert "HEARTBEAT_CONNECTED" in cluster.ask("list-nodes") and "Encounter error" not in cluster.ask("user-list")
    assert cluster.third.mount_point("/3fs/stage").exists


def test_foundationdb_is_backed_up_and_the_backup_checked(cluster: Cluster) -> None:
    agent = cluster.admin.check_output("pgrep -f '[/]bin/backup_agent --cluster-file=/etc/foundationdb/'")
    cluster.admin.check_output(f"kill -STOP {agent}")  # so that the backup does not end before it is interrupted
    running = cluster.lab.start("threefs_fdb_backup", **cluster.variables)
    status = f"{FDB}/fdbbackup status -C /etc/foundationdb/fdb.cluster -t agentfleet"
    end = time.monotonic() + PATIENCE_SECONDS
    while "in progress" not in cluster.admin.check_output(status):
        assert time.monotonic() < end
        time.sleep(1)
    cluster.admin.check_output("systemctl kill --signal=KILL foundationdb-backup.service")
    half = cluster.lab.finish(running)
    assert half.rc != 0 and any("foundationdb-backup.service" in task.result.get("stderr", "") for task in half.tasks)
    cluster.admin.check_output(f"kill -CONT {agent}")
    cluster.play("threefs_fdb_backup")
    backups = cluster.admin.check_output("ls -d /backup/fdb/backup-*").split()
    assert len(backups) == 2, "the interrupted one, which the agent ended, and its successor"
    assert cluster.admin.check_output("systemctl show -P Result foundationdb-backup-check.service") == "success"
    assert cluster.admin.check_output("systemctl is-active foundationdb-backup.timer") == "active"


def test_the_newest_backup_is_restored_for_trial_beside_the_database(cluster: Cluster) -> None:
    assert cluster.admin.check_output("systemctl is-active foundationdb-restore-drill.timer") == "active"
    before = cluster.chains()
    cluster.admin.check_output("systemctl start foundationdb-restore-drill.service")
    drill, own = "/etc/foundationdb-foundationdb_drill/fdb.cluster", "/etc/foundationdb/fdb.cluster"
    said = cluster.admin.check_output(f"{FDB}/fdbrestore status --dest-cluster-file {drill} -t agentfleet")
    assert "State: completed" in said and "BytesWritten: 0" not in said
    keys = f"{FDB}/fdbcli -C {drill} --timeout 30 --exec 'getrangekeys \"\" \\xff 1'"
    assert "agentfleet-drill/" not in cluster.admin.check_output(keys), "it is dropped again"
    assert cluster.admin.check_output(f"{FDB}/fdbrestore status --dest-cluster-file {own} -t agentfleet") == ""
    assert cluster.chains() == before


def test_a_node_is_drained_and_forgotten(cluster: Cluster) -> None:
    drain = {"threefs_drain_hosts": ["metal5"], "threefs_targets_per_disk": 6, "threefs_drain_retire": True}
    said = cluster.refused("threefs_drain", "--limit=metal5", **drain)
    assert "metal3 is not in it" in said, "nobody would have moved the targets of the storage that is stopped"
    cluster.interrupt("offline-target", "threefs_drain", after=1, **drain)
    assert any(len(row) > FIRST_TARGET + 2 for row in cluster.chains()), "new targets serve before old ones go"
    cluster.play("threefs_drain", **drain)
    cluster.assert_well({"10001", "10002"})
    assert "10003" not in cluster.ask("list-nodes")


def test_the_last_server_of_a_chain_is_not_taken_from_it(cluster: Cluster) -> None:
    cluster.second.check_output("systemctl disable --now threefs-stage-storage threefs-stage-meta threefs-stage-mgmtd")
    cluster.until("one server is left", lambda rows: all(row[3] == "SERVING(1/2)" for row in rows))
    cluster.admin.check_output("systemctl stop threefs-stage-storage")
    cluster.until("no server is left", lambda rows: all("(LASTSRV-OFFLINE)" in " ".join(row) for row in rows))
    disk = {"threefs_replace_host": "metal3", "threefs_replace_mount": "/storage/data1"}
    assert "has no other server than node 10001" in cluster.refused("threefs_replace_disk", **disk)
    cluster.admin.check_output("systemctl start threefs-stage-storage")
    cluster.until("the last server serves again", lambda rows: all(row[3] == "SERVING(1/2)" for row in rows))


def test_a_lost_node_is_replaced(cluster: Cluster) -> None:
    successor = {
        "threefs_group": "threefs_left",
        "threefs_third_node": 4,
        "threefs_third_services": ["storage", "fuse"],
        "threefs_targets_per_disk": 6,
        "threefs_retire_nodes": [2, 101, 10002],
    }
    cluster.interrupt("update-chain", "threefs_replace_node", "--tags=threefs,always", after=2, **successor)
    assert nodes_of(cluster.chains()) == {"10001", "10002", "10004"}, "some chains have a copy on the successor"
    cluster.play("threefs_replace_node", "--tags=threefs,always", **successor)
    cluster.assert_well({"10001", "10004"})
    assert "10002" not in cluster.ask("list-nodes")
    cluster.variables.update(successor)


def test_chains_before_their_targets_are_seen_and_brought_up_by_the_runbook(cluster: Cluster) -> None:
    first, second = "101000100199", "101000400199"  # their place is known by their ids; nobody has made them
    cluster.admin.check_output(f"printf 'ChainId,TargetId,TargetId\n199900001,{first},{second}\n' > /run/chains.csv")
    assert "Upload 1 chains succeeded" in cluster.ask("upload-chains /run/chains.csv")
    cluster.until("LASTSRV", lambda rows: rows[-1][3] == "UNAVAILABLE" and "LASTSRV" in " ".join(rows[-1]))
    said = cluster.refused("threefs_tokens")
    assert "chain 199900001 is UNAVAILABLE" in said and "LASTSRV/OFFLINE" in said
    make = "create-target --node-id {} --disk-index 0 --target-id {} --chain-id 199900001 --use-new-chunk-engine"
    said = cluster.ask(make.format(10001, first))
    assert "Encounter error: 7004" in said and "prohibited" in said, "upstream makes no target that served last"
    cluster.ask(make.format(10004, second), "rotate-lastsrv 199900001", make.format(10001, first))
    cluster.until("the chain serves", lambda rows: all(row[3] == "SERVING" for row in rows))
    cluster.assert_well({"10001", "10004"})
