# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""FoundationDB: its servers, and the database that they make."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import socket
import subprocess
import threading
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb import check_layout, connection, coordinators_of
from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_database import Database
from ansible_collections.agentfleet.metal.plugins.module_utils._fdb_server import Absent, Servers
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, apply_all, diff
from ansible_collections.agentfleet.metal.tests.unit.threefs_lab import DOUBLES, load

RELEASE = "/opt/foundationdb/1"
MACHINES = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
THREE = [f"{address}:4500" for address in MACHINES]
FILE = "/etc/foundationdb/fdb.cluster"
SERVERS: dict[str, t.Any] = {
    "release": RELEASE,
    "connection": "metal:abc@" + ",".join(THREE),
    "address": "10.0.0.1",
    "machines": MACHINES,
    "coordinators": THREE,
    "redundancy": "double",
    "processes": 2,
}
DATABASE = {"release": RELEASE, "machines": MACHINES, "coordinators": THREE, "redundancy": "double", "wait_seconds": 2}
CLI = f"{RELEASE}/bin/fdbcli"


@pytest.fixture
def host(fake_host: t.Any, monkeypatch: pytest.MonkeyPatch) -> t.Any:
    """A host with the programs, whose clock jumps."""
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    fake_host.answers["systemctl"] = ""
    return fake_host.files({f"{RELEASE}/bin/{name}": "" for name in ("fdbmonitor", "fdbcli", "fdbserver")})


def status(
    mode: str = "", available: bool = True, coordinators: t.Sequence[str] = THREE, up: bool = True, **cluster: t.Any
) -> str:
    """What ``status json`` prints, after a line that is no JSON."""
    configuration = {"redundancy_mode": mode, "storage_engine": "ssd-2"} if mode else {}
    recovery = "fully_recovered" if mode else "configuration_never_created"
    known = [{"address": address, "reachable": up} for address in coordinators]
    return "Using cluster file\n" + json.dumps(
        {
            "client": {
                "coordinators": {"coordinators": known, "quorum_reachable": up},
                "database_status": {"available": available},
            },
            "cluster": {
                "configuration": configuration,
                "data": {"state": {"healthy": available}},
                "machines": {address: {} for address in MACHINES},
                "recovery_state": {"name": recovery},
                **cluster,
            },
        }
    )


class Cli:
    """fdbcli of one database, on a fake host."""

    def __init__(self, host: t.Any, mode: str = "") -> None:
        self.host, self.mode, self.said = host, mode, ""
        host.files({FILE: SERVERS["connection"]})
        host.answers[CLI] = self

    def __call__(self, host: t.Any) -> t.Any:
        """Answer the last command line."""
        command = host.calls[-1].split("--exec ")[1]
        assert "--timeout" in host.calls[-1], "without it fdbcli waits for ever"
        if command == "status json":
            return status(self.mode)
        self.said = command
        if command.startswith("configure"):
            if " new " in command and self.mode:
                return (1, "", "ERROR: Database already exists! To change configuration, don't say `new'\n")
            self.mode = next(mode for mode in ("single", "double", "triple") if mode in command)
        elif command.startswith("coordinators"):
            host.files({FILE: "# rewritten\nmetal:new@" + ",".join(command.split()[1:])})
        return "done\n"


def test_a_host_from_nothing(host: t.Any) -> None:
    servers = Servers(host, {**SERVERS, "backup_agents": 1, "backup": {"directory": "/backup", "keep": 3}})
    steps = servers.plan(servers.observe())
    assert [step.verb for step in steps].count("start") == 3, "fdbmonitor and both timers"
    apply_all(servers, steps)
    conf = host.read("/etc/foundationdb/foundationdb.conf")
    assert "[fdbserver.4500]" in conf and "[fdbserver.4501]" in conf and "[backup_agent.1]" in conf
    assert "public-address = 10.0.0.1:$ID" in conf and "locality-machineid = 10.0.0.1" in conf
    unit = host.read("/etc/systemd/system/foundationdb-backup.service")
    assert "head -n -3" in unit and unit.index("wait -C") < unit.index("start -C"), (
        "an interrupted backup is waited for"
    )
    check = host.read("/etc/systemd/system/foundationdb-backup-check.service")
    assert "restorable: true" in check and "After=foundationdb.service foundationdb-backup.service" in check
    timers = ["foundationdb-backup.timer", "foundationdb-backup-check.timer"]
    assert [call for call in host.calls if " show " not in call] == [
        f"systemctl enable --quiet foundationdb.service {' '.join(timers)}",  # systemd reads all files with it, once
        *(f"systemctl start {unit}" for unit in ("foundationdb.service", *timers)),
    ]


def test_a_cluster_file_that_servers_rewrote_is_left_alone(host: t.Any) -> None:
    host.write(FILE, "# by the servers\nmetal:abc@10.0.0.9:4500\n", 0o600)
    servers = Servers(host, SERVERS)
    assert FILE not in [step.object for step in servers.plan(servers.observe())]
    assert servers.result(servers.observe())["connection"] == "metal:abc@10.0.0.9:4500"


def test_servers_end_with_their_data_only_when_that_is_said(host: t.Any) -> None:
    first = Servers(host, SERVERS)
    apply_all(first, first.plan(first.observe()))
    conf = "/etc/foundationdb/foundationdb.conf"
    more = Servers(host, {**SERVERS, "processes": 3})
    assert conf in [step.object for step in more.plan(more.observe())]
    fewer = {**SERVERS, "processes": 1, "data_directory": "/data"}
    with pytest.raises(Refused, match="the servers 10.0.0.1:4501 would end"):
        Servers(host, fewer).plan(Servers(host, fewer).observe())
    told = Servers(host, {**fewer, "lose_data": True})
    apply_all(told, told.plan(told.observe()))
    assert "[fdbserver.4501]" not in host.read(conf) and "datadir = /data/data/$ID" in host.read(conf)


def test_a_second_database_has_everything_of_its_own(host: t.Any) -> None:
    host.files({"/etc/foundationdb/foundationdb.conf": "[fdbserver.4500]\n"})
    servers = Servers(host, {**SERVERS, "name": "second", "port": 4600})
    objects = " ".join(step.object for step in servers.plan(servers.observe()))
    assert "/etc/foundationdb-second/fdb.cluster" in objects and "foundationdb-second.service" in objects
    assert "/var/lib/foundationdb-second" in objects and "/var/lib/foundationdb " not in objects


def test_what_leads_to_the_database_is_for_root_alone_also_on_a_host_of_before(host: t.Any) -> None:
    wish = {**SERVERS, "backup_agents": 1, "backup": {"directory": "/backup/fdb"}}
    servers = Servers(host, wish)
    apply_all(servers, servers.plan(servers.observe()))
    assert (host.mode(FILE), host.mode("/backup/fdb")) == (0o600, 0o700)

    host.files({FILE: "# by the servers\nmetal:abc@10.0.0.9:4500\n", "/backup/fdb/backup-1/file": ""})
    for path in (FILE, "/backup/fdb"):
        os.chmod(host.path(path), 0o755)
    steps = [step for step in servers.plan(servers.observe()) if step.verb == "close"]
    assert [(step.object, step.before) for step in steps] == [(FILE, "0755"), ("/backup/fdb", "0755")]
    apply_all(servers, steps)
    assert (host.mode(FILE), host.mode("/backup/fdb")) == (0o600, 0o700) and "10.0.0.9" in host.read(FILE)
    assert [step for step in servers.plan(servers.observe()) if step.verb == "close"] == []
    assert servers.result(servers.observe())["warnings"] == []


def test_a_directory_with_other_things_than_backups_is_not_closed_to_others(host: t.Any) -> None:
    host.files({"/backup/of-others": "", "/backup/backup-1/file": ""})
    os.chmod(host.path("/backup"), 0o755)
    servers = Servers(host, {**SERVERS, "backup_agents": 1, "backup": {"directory": "/backup"}})
    apply_all(servers, servers.plan(servers.observe()))
    assert host.mode("/backup") == 0o755
    (warning,) = servers.result(servers.observe())["warnings"]
    assert warning.startswith("/backup: other users can read the backups") and "0700" in warning


def test_backups_of_two_databases_have_a_directory_each(host: t.Any) -> None:
    (Path(host.root) / "srv").mkdir()
    host.files({"/backup": "-> srv"})
    one = {**SERVERS, "backup_agents": 1, "backup": {"directory": "/srv/fdb"}}
    first = Servers(host, one)
    apply_all(first, first.plan(first.observe()))
    Servers(host, one).plan(Servers(host, one).observe())
    other = {**one, "name": "second", "port": 4600}
    same, apart = (
        Servers(host, {**other, "backup": {"directory": path}}) for path in ("/backup/fdb", "/backup/second")
    )
    with pytest.raises(Refused, match=r"backup.directory: '/backup/fdb': foundationdb-backup.service has it"):
        same.plan(same.observe())
    assert apart.plan(apart.observe())


def test_a_database_is_created_once(host: t.Any) -> None:
    cli = Cli(host)
    database = Database(host, DATABASE)
    steps = database.plan(database.observe())
    assert [step.verb for step in steps] == ["configure"]
    apply_all(database, steps)
    assert cli.said == "configure new double ssd"
    assert database.plan(database.observe()) == []


def test_another_run_was_faster(host: t.Any) -> None:
    cli = Cli(host)
    database = Database(host, DATABASE)
    steps = database.plan(database.observe())
    cli.mode = "double"
    apply_all(database, steps)
    assert "new" in cli.said, "that it exists already is what was wanted"


def test_redundancy_and_coordinators_are_changed(host: t.Any) -> None:
    cli = Cli(host, "single")
    host.files({FILE: "metal:abc@10.0.0.1:4500"})
    database = Database(host, DATABASE)
    steps = database.plan(database.observe())
    assert [(step.verb, step.before) for step in steps] == [
        ("configure", {"redundancy": "single", "engine": "ssd-2"}),
        ("move", ["10.0.0.1:4500"]),
    ]
    assert steps[0].data == ["double"], "what differs is told, and nothing else"
    apply_all(database, steps)
    assert cli.said == "coordinators " + " ".join(THREE)
    assert database.result(database.observe())["connection"] == "metal:new@" + ",".join(THREE)


def test_a_storage_engine_is_told_from_one_whose_name_begins_alike(host: t.Any) -> None:
    host.files({FILE: SERVERS["connection"]})
    plans = {}
    for running in ("ssd-2", "ssd-redwood-1", "memory-2"):
        host.answers[CLI] = status("double").replace('"ssd-2"', f'"{running}"')
        for engine in ("ssd", "ssd-redwood-1", "memory"):
            database = Database(host, {**DATABASE, "engine": engine})
            plans[running, engine] = [step.verb for step in database.plan(database.observe())]
    same = {("ssd-2", "ssd"), ("ssd-redwood-1", "ssd-redwood-1"), ("memory-2", "memory")}
    assert plans == {pair: [] if pair in same else ["configure"] for pair in plans}


def test_a_database_changes_over_to_another_engine_and_says_how(host: t.Any) -> None:
    host.files({FILE: SERVERS["connection"]})
    host.answers[CLI] = status("double")
    database = Database(host, {**DATABASE, "engine": "ssd-redwood-1"})
    (step,) = database.plan(database.observe())
    host.answers[CLI] = status("double").replace('"ssd-2"', '"ssd-redwood-1"')
    apply_all(database, [step])
    (said,) = [call for call in host.calls if "configure" in call]
    assert said.endswith("--exec configure ssd-redwood-1 storage_migration_type=aggressive")


def test_an_error_text_is_an_error_whatever_the_exit_code(host: t.Any) -> None:
    Cli(host, "single")
    database = Database(host, DATABASE)
    steps = database.plan(database.observe())
    host.answers[CLI] = (0, "", "ERROR: passed redundant coordinators: `10.0.0.1:4500'\n")
    with pytest.raises(HostError, match="passed redundant coordinators"):
        apply_all(database, steps)


def test_a_database_that_tells_no_configuration_is_waited_for_and_not_taken_for_a_new_one(host: t.Any) -> None:
    Cli(host)
    host.answers[CLI] = status(available=False, recovery_state={"name": "recruiting_transaction_servers"})
    with pytest.raises(HostError, match="the database tells its configuration.*: recruiting_transaction_servers"):
        Database(host, DATABASE).observe()


def test_waiting_is_bounded_and_says_who_is_silent(host: t.Any) -> None:
    host.files({FILE: SERVERS["connection"]})
    host.answers[CLI] = status(up=False)
    database = Database(host, DATABASE)
    with pytest.raises(
        HostError, match=r"a majority of coordinators answers: not within 2 seconds; silent: 10.0.0.1:4500"
    ):
        database.observe()


def test_check_mode_before_anything_is_there(fake_host: t.Any) -> None:
    fake_host.answers["systemctl"] = ""
    for resource in (Servers(fake_host, SERVERS), Database(fake_host, DATABASE)):
        resource.predicting = True
        assert resource.plan(resource.observe())


def test_the_smallest_layouts_that_can_work() -> None:
    assert check_layout("single", ["10.0.0.1:4500"], ["10.0.0.1"]) == ["10.0.0.1:4500"]
    assert check_layout("double", THREE[::-1], MACHINES) == THREE
    five = [f"10.0.0.{number}" for number in range(1, 6)]
    assert len(check_layout("triple", [f"{address}:4500" for address in five], five)) == 5


def test_cluster_files() -> None:
    assert connection("# comment\n\nmetal:abc@10.0.0.1:4500\n") == "metal:abc@10.0.0.1:4500"
    assert connection("nonsense") == "" and coordinators_of("a:b@2:1,1:1") == ["1:1", "2:1"]


class Doubles:
    """A database of one process, a backup agent and the client programs, all of them doubles."""

    def __init__(self, directory: Path) -> None:
        self.release, self.file = directory / "release", directory / "fdb.cluster"
        (self.release / "bin").mkdir(parents=True)
        double = directory / "double"
        double.write_text((DOUBLES / "foundationdb" / "fdb_double.py").read_text())
        double.chmod(0o755)
        for name in ("fdbmonitor", "fdbserver", "fdbcli", "fdbbackup", "fdbrestore", "backup_agent"):
            (self.release / "bin" / name).symlink_to(double)
        self.running: list[subprocess.Popen[bytes]] = []
        self.database(self.file, "metal:abc")
        self.drill = directory / "drill.cluster"

    def database(self, file: Path, identity: str) -> None:
        """Run a database of one process and an agent."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
        file.write_text(f"# by the servers\n{identity}@{address}\n")
        where = (f"--cluster-file={file}", f"--datadir={file}.data", f"--public-address={address}")
        self.running += [self.start("fdbserver", *where), self.start("backup_agent", where[0])]
        self.run(f"{self.release}/bin/fdbcli -C {file} --timeout 30 --exec 'configure new single ssd'")

    def start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([str(self.release / "bin" / program), *arguments])

    def run(self, command: str, **environment: str) -> bool:
        argv, env = shlex.split(command), {**os.environ, **environment}
        return subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode == 0

    def unit(self, text: str, instance: str = "") -> list[bool]:
        """What became of a unit's commands, up to the one that fails it; what follows its stop is always run."""
        found: list[bool] = []
        environment = dict(
            word.split("=", 1) for line in re.findall(r"^Environment=(.*)$", text, re.M) for word in shlex.split(line)
        )
        for kind, command in re.findall(r"^(ExecStart(?:Pre)?|ExecStopPost)=(.*)$", text, re.M):
            line = command.replace("/etc/foundationdb/fdb.cluster", str(self.file)).replace("%i", instance)
            line = line.replace("/etc/foundationdb-drill/fdb.cluster", str(self.drill)).replace("$$", "$")
            if kind != "ExecStopPost" and not all(found):
                continue
            done = self.run(line.lstrip("-"), **environment)
            if kind != "ExecStopPost":
                found.append(done or (kind == "ExecStartPre" and line.startswith("-")))
        return found

    def keys(self, file: Path | None = None, **changed: str) -> dict[str, str]:
        return dict(self.document(file, **changed)["keys"])

    def document(self, file: Path | None = None, **changed: str) -> dict[str, t.Any]:
        double = load("fdb_double", DOUBLES / "foundationdb" / "fdb_double.py")
        cluster = double.Cluster(str(file or self.file))
        return dict(cluster.change(lambda document: document["keys"].update(changed)))


@pytest.fixture
def database(tmp_path: Path) -> t.Iterator[Doubles]:
    made = Doubles(tmp_path)
    yield made
    for process in made.running:
        process.terminate()
        process.wait()


def units_of(database: Doubles, directory: Path, **backup: str) -> dict[str, str]:
    """The units of a host that backs up, by their short names."""
    one = {
        "release": str(database.release),
        "machines": MACHINES[:1],
        "coordinators": THREE[:1],
        "redundancy": "single",
    }
    wish = {"directory": str(directory / "backup"), "keep": 3, **backup}
    files = Servers(Host(), {**SERVERS, **one, "backup_agents": 1, "backup": wish})._files()
    return {path.removeprefix("/etc/systemd/system/foundationdb-"): text for path, text in files.items()}


def test_a_backup_is_restored_by_its_unit_and_only_a_good_one(database: Doubles, tmp_path: Path) -> None:
    units = units_of(database, tmp_path)
    restore = units["restore@.service"]
    database.keys(then="kept")
    assert all(database.unit(units["backup.service"]))
    (taken,) = (tmp_path / "backup").iterdir()
    now = database.keys(then="changed", since="new")

    assert database.unit(restore, "backup-of-nothing") == [False], "it is looked at before the database is emptied"
    assert database.keys() == now
    assert database.unit(restore, taken.name) == [True] * 5
    assert database.keys() == {"then": "kept"}
    assert database.unit(restore, taken.name) == [True] * 5, "begun again after an interruption"


def test_the_newest_restorable_backup_is_restored_for_trial_and_never_into_its_database(
    database: Doubles, tmp_path: Path
) -> None:
    units = units_of(database, tmp_path, drill_database="drill")
    drill = units["restore-drill.service"]
    assert "OnCalendar=monthly" in units["restore-drill.timer"]
    assert "After=foundationdb.service foundationdb-backup.service foundationdb-drill.service" in drill
    database.database(database.drill, "drill:def")
    database.keys(database.drill, other="is not of a drill")
    assert database.unit(drill)[-1] is False, "there is no backup yet"

    database.keys(a="1", b="2")
    assert all(database.unit(units["backup.service"]))
    (tmp_path / "backup" / "backup-9999-interrupted").mkdir()
    live = database.keys(a="changed", c="new")
    double = load("fdb_double", DOUBLES / "foundationdb" / "fdb_double.py")
    assert database.unit(drill) == [True] * 6
    after = database.document(database.drill)
    assert after["keys"] == {"other": "is not of a drill"} and not after["locked"], "it is dropped again, and only it"
    assert after["restores"]["agentfleet"]["state"] == "completed" and after["restores"]["agentfleet"]["bytes"] > 2
    assert database.keys() == live and "restores" not in database.document()

    # Killed half-way: the database of the drills is locked, and has keys of the drill.
    def break_off(document: dict[str, t.Any]) -> None:
        document["restores"]["agentfleet"] = {
            **after["restores"]["agentfleet"],
            "state": "queued",
            "url": "file:///gone",
        }
        document.update(locked=True, keys={**document["keys"], "agentfleet-drill/a": "1"})

    double.Cluster(str(database.drill)).change(break_off, lock_aware=True)
    assert database.unit(drill) == [True] * 6
    assert database.keys(database.drill) == {"other": "is not of a drill"}

    database.drill.write_text(database.file.read_text())
    assert database.unit(drill)[0] is False, "its file leads to the database that is backed up"
    assert database.keys() == live and not database.document().get("locked")


def test_a_backup_without_keys_does_not_pass_the_drill(database: Doubles, tmp_path: Path) -> None:
    units = units_of(database, tmp_path, drill_database="drill")
    database.database(database.drill, "drill:def")
    assert all(database.unit(units["backup.service"]))
    assert database.unit(units["restore-drill.service"]) == [True] * 5 + [False]


def test_a_drill_needs_a_database_of_its_own_with_an_agent(host: t.Any) -> None:
    wish = {**SERVERS, "backup_agents": 1, "backup": {"directory": "/backup", "drill_database": "drill"}}
    scratch = {"/etc/foundationdb-drill/fdb.cluster": "drill:def@10.0.0.1:4600\n"}
    for files, said in (
        ({}, "there is no such database on this host"),
        (scratch, "no backup agent of it runs on this host"),
        (
            {
                "/etc/foundationdb-drill/fdb.cluster": SERVERS["connection"],
                "/etc/foundationdb-drill/foundationdb.conf": "[backup_agent.1]\n",
            },
            "leads to the database that is backed up",
        ),
    ):
        host.files(files)
        with pytest.raises(Refused, match=said):
            Servers(host, wish).plan(Servers(host, wish).observe())
    host.files(scratch)
    servers = Servers(host, wish)
    apply_all(servers, servers.plan(servers.observe()))
    assert any("start foundationdb-restore-drill.timer" in call for call in host.calls)
    assert [step.object for step in servers.plan(servers.observe()) if step.verb == "write"] == []


UNITS = "/etc/systemd/system"
DRILL = "/etc/foundationdb-drill"
BACKUP: dict[str, t.Any] = {
    **SERVERS,
    "backup_agents": 1,
    "backup": {"directory": "/backup", "drill_database": "drill"},
}
OF_DRILL: dict[str, t.Any] = {
    **SERVERS,
    "name": "drill",
    "connection": "drill:def@10.0.0.1:4600",
    "machines": MACHINES[:1],
    "coordinators": ["10.0.0.1:4600"],
    "redundancy": "single",
    "port": 4600,
    "processes": 1,
    "backup_agents": 1,
}


class Systemd:
    """systemctl on a fake host: units are what was enabled and started."""

    def __init__(self, host: t.Any) -> None:
        self.active: dict[str, str] = {}
        self.enabled: set[str] = set()
        host.answers["systemctl"] = self

    def __call__(self, host: t.Any) -> t.Any:
        """Answer the last command line."""
        _systemctl, verb, *rest = host.calls[-1].split()
        units = [word for word in rest if not word.startswith("--")]
        if verb == "show":
            found = [unit for unit in units if "*" not in unit]
            found += [unit for unit in self.active for pattern in units if fnmatch.fnmatch(unit, pattern)]
            for unit in found:
                assert unit in self.active or "@" not in unit
            return "\n\n".join(
                f"Id={unit}\nActiveState={self.active.get(unit, 'inactive')}\n"
                f"UnitFileState={'enabled' if unit in self.enabled else 'disabled'}"
                for unit in dict.fromkeys(found)
            )
        if verb == "start":
            self.active.update(dict.fromkeys(units, "active"))
        for unit in units if verb in ("stop", "reset-failed") else ():
            if (self.active.get(unit) == "failed") is (verb == "reset-failed"):
                self.active.pop(unit, None)
        if verb in ("enable", "disable"):
            missing = [unit for unit in units if not host.exists(f"{UNITS}/{unit}")]
            assert not missing, f"systemctl {verb}: {missing} have no file"
            self.enabled = self.enabled | set(units) if verb == "enable" else self.enabled - set(units)
        return ""


@pytest.fixture
def backed_up(host: t.Any) -> Systemd:
    """A host with backups and a database for drills."""
    systemd = Systemd(host)
    host.files({f"{RELEASE}/bin/fdbbackup": "", "/backup/backup-2026/data": "kept"})
    host.answers[f"{RELEASE}/bin/fdbbackup status"] = (
        "The previous backup on tag `agentfleet' at file:///b completed at version 1.\n"
    )
    for wish in (OF_DRILL, BACKUP):
        converged(Servers(host, wish))
    host.calls.clear()
    return systemd


def converged(resource: t.Any) -> list[tuple[str, str]]:
    """Verb and object of what it took; afterwards there is nothing to do."""
    steps = resource.plan(resource.observe())
    apply_all(resource, steps)
    assert resource.plan(resource.observe()) == []
    return [(step.verb, step.object) for step in steps]


def units_left(host: t.Any) -> list[str]:
    return [path.removeprefix(f"{UNITS}/") for path in host.glob(f"{UNITS}/*")]


def test_backups_that_are_no_longer_declared_leave_the_host_and_stay_on_their_disk(
    host: t.Any, backed_up: Systemd
) -> None:
    backed_up.active["foundationdb-backup-check.service"] = "failed"
    wish = {**BACKUP, "backup": {}, "backup_agents": 0}
    observed = Servers(host, wish).observe()
    planned = Servers(host, wish).plan(observed)
    shown = {item["before_header"]: (item["before"], item["after"]) for item in diff(planned)}
    timer = f"{UNITS}/foundationdb-backup.timer"
    assert shown[timer] == (host.read(timer) + "\n", ""), "the diff shows what goes"
    assert {timer, f"{UNITS}/foundationdb-restore@.service"} < set(shown)

    verbs = [verb for verb, _object in converged(Servers(host, wish))]
    assert verbs == ["stop", "disable", *["remove"] * 7, "write"], "the agent's line goes from the configuration"
    timers = [f"foundationdb-{name}.timer" for name in ("backup", "backup-check", "restore-drill")]
    assert [call for call in host.calls if " show " not in call and "fdbbackup" not in call] == [
        f"systemctl stop {' '.join(timers)} foundationdb-backup-check.service",
        f"systemctl reset-failed {' '.join(timers)} foundationdb-backup-check.service",
        f"systemctl disable --quiet {' '.join(timers)}",
        *["systemctl daemon-reload"] * 2,
    ]
    assert units_left(host) == ["foundationdb-drill.service", "foundationdb.service"]
    assert backed_up.enabled == set(units_left(host)) == set(backed_up.active)
    assert host.read("/backup/backup-2026/data") == "kept"


def test_a_timer_that_would_not_outlive_a_reboot_is_enabled_again(host: t.Any, backed_up: Systemd) -> None:
    backed_up.enabled.remove("foundationdb-backup.timer")
    assert converged(Servers(host, BACKUP)) == [("start", "foundationdb-backup.timer")]
    assert "foundationdb-backup.timer" in backed_up.enabled


def test_a_drill_that_is_no_longer_declared_goes_alone(host: t.Any, backed_up: Systemd) -> None:
    del backed_up
    wish = {**BACKUP, "backup": {"directory": "/backup"}}
    gone = f"{UNITS}/foundationdb-restore-drill"
    assert converged(Servers(host, wish)) == [
        ("stop", "foundationdb-restore-drill.timer"),
        ("disable", "foundationdb-restore-drill.timer"),
        ("remove", f"{gone}.timer"),
        ("remove", f"{gone}.service"),
    ]
    assert host.calls[-2] == "systemctl daemon-reload"
    assert "foundationdb-backup.timer" in units_left(host)


def test_an_interrupted_removal_is_continued(host: t.Any, backed_up: Systemd) -> None:
    wish = {**BACKUP, "backup": {}, "backup_agents": 0}
    steps = Servers(host, wish).plan(Servers(host, wish).observe())
    for step in steps[:4]:
        Servers(host, wish).apply(step)
    assert converged(Servers(host, wish))[0][0] == "remove", "what is stopped and disabled is not said again"
    assert backed_up.enabled == {"foundationdb.service", "foundationdb-drill.service"}


def test_a_backup_that_is_being_taken_ends_with_its_agent(host: t.Any, backed_up: Systemd) -> None:
    fdbbackup = f"{RELEASE}/bin/fdbbackup"
    backed_up.active["foundationdb-backup.service"] = "activating"
    host.answers[f"{fdbbackup} status"] = "The backup on tag `agentfleet' is in progress (just started) to file:///b.\n"
    servers = Servers(host, {**BACKUP, "backup": {}, "backup_agents": 0})
    steps = servers.plan(servers.observe())
    assert [step.verb for step in steps[:3]] == ["stop", "abort", "disable"], "aborted before its agent goes"
    host.answers[f"{fdbbackup} abort"] = (1, "", "no end after 60 s")
    with pytest.raises(HostError, match="fdbbackup abort: no end after 60 s"):
        apply_all(servers, steps)
    assert "[backup_agent.1]" in host.read("/etc/foundationdb/foundationdb.conf")
    host.answers[f"{fdbbackup} abort"] = (1, "", "ERROR: A backup was not running on tag `agentfleet'\n")
    apply_all(servers, servers.plan(servers.observe()))
    assert "[backup_agent.1]" not in host.read("/etc/foundationdb/foundationdb.conf")


def test_nothing_goes_while_a_restore_runs(host: t.Any, backed_up: Systemd) -> None:
    backed_up.active["foundationdb-restore@backup-2026.service"] = "activating"
    for resource, option in (
        (Servers(host, {**BACKUP, "backup": {}}), "backup"),
        (Absent(host, {"release": RELEASE, "lose_data": True}), "state"),
    ):
        with pytest.raises(Refused, match="would be left half-way") as refused:
            resource.plan(resource.observe())
        assert refused.value.option == option
    assert converged(Servers(host, {**BACKUP, "backup": {"directory": "/backup"}})), "drills may go"


def test_the_drills_database_goes_and_its_data_stay(host: t.Any, backed_up: Systemd) -> None:
    gone = {"name": "drill", "release": RELEASE}
    backed_up.active["foundationdb-restore-drill.service"] = "activating"
    host.files({"/var/lib/foundationdb-drill/data/4600/file": "a copy"})
    assert converged(Absent(host, gone)) == [
        ("stop", "foundationdb-restore-drill.timer, foundationdb-restore-drill.service"),
        ("stop", "foundationdb-drill.service"),
        ("disable", "foundationdb-drill.service"),
        ("remove", f"{DRILL}/foundationdb.conf"),
        ("remove", f"{UNITS}/foundationdb-drill.service"),
    ]
    assert host.read("/var/lib/foundationdb-drill/data/4600/file") == "a copy"
    assert Absent(host, gone).result(Absent(host, gone).observe()) == {"connection": OF_DRILL["connection"]}
    assert converged(Servers(host, OF_DRILL)), "declared again, it begins where it was"


def test_servers_go_with_their_data_only_when_that_is_said(host: t.Any, backed_up: Systemd) -> None:
    gone = {"name": "foundationdb", "release": RELEASE}
    with pytest.raises(Refused, match="with ports 4500, 4501 would end"):
        Absent(host, gone).plan(Absent(host, gone).observe())
    converged(Absent(host, {**gone, "lose_data": True}))
    assert units_left(host) == ["foundationdb-drill.service"]
    assert (
        host.exists(FILE)
        and host.exists("/var/lib/foundationdb")
        and backed_up.active == {"foundationdb-drill.service": "active"}
    )
    assert converged(Absent(host, {"name": "never", "release": RELEASE})) == []


def test_a_backup_without_an_agent_is_aborted_by_the_programs(database: Doubles) -> None:
    program, where = f"{database.release}/bin/fdbbackup", f"-C {database.file} -t agentfleet"
    database.running.pop().terminate()  # the agent
    assert database.run(f"{program} start {where} -d file:///backup")
    said = subprocess.run(shlex.split(f"{program} status {where}"), capture_output=True, text=True, check=True).stdout
    assert "The backup on tag `agentfleet' is in progress" in said
    assert database.run(f"{program} abort {where}") and not database.run(f"{program} abort {where}")


def test_a_backup_that_is_aborted_is_no_success_and_nothing_is_deleted_for_it(
    database: Doubles, tmp_path: Path
) -> None:
    unit = units_of(database, tmp_path)["backup.service"]
    assert database.unit(unit) == [True] * 3
    database.running.pop().terminate()  # the agent
    (tmp_path / "backup" / "backup-9999-aborted").mkdir()
    abort = f"{database.release}/bin/fdbbackup abort -C {database.file} -t agentfleet"

    def until_it_runs() -> None:
        while not database.run(abort):
            time.sleep(0.1)

    aborter = threading.Thread(target=until_it_runs, daemon=True)
    aborter.start()
    assert database.unit(unit) == [True, True, False], "upstream takes it for success: what follows does not"
    aborter.join(timeout=10)
    assert unit.index("describe") < unit.index("ExecStartPost") < unit.index("delete"), "then nothing is deleted"
