# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The servers of FoundationDB on one host, their backups, and how they go."""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._fdb import (
    DEFAULT,
    NAME,
    binaries,
    check_layout,
    check_name,
    cluster_file,
    connection,
    dashed,
    etc,
    exposed,
    ports,
    unit_name,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Completed, Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import (
    RUNNING,
    UNITS,
    apply_retired,
    arrange,
    halt,
    retire,
    show,
)

# how fdbbackup tells a backup that has ended, or that there never was one
ENDED = ("The previous backup", "No previous backups")
NOT_RUNNING = "was not running"
DRILL_PREFIX = "agentfleet-drill/"
_BACKUP_UNITS = (
    *(f"{verb}.{kind}" for kind in ("timer", "service") for verb in ("backup", "backup-check", "restore-drill")),
    "restore@.service",
)


class OldBackups:
    """What a host has of backups that are no longer declared: units, and a backup that an agent takes.

    Backups themselves stay where they are.

    :param option: the option by which they are no longer declared
    """

    def __init__(self, host: Host, name: str, release: str, option: str) -> None:
        self.host, self.name, self.release, self.option = host, name, release, option

    def observe(self, wanted: t.Container[str]) -> dict[str, t.Any]:
        """Files and states of units that are not wanted, and whether a backup is being taken."""
        paths = [f"{UNITS}/{dashed(self.name)}-{unit}" for unit in _BACKUP_UNITS]
        texts = {path: self.host.read(path) for path in paths if os.path.basename(path) not in wanted}
        texts = {path: text for path, text in texts.items() if text}
        units = [os.path.basename(path) for path in texts]
        running = ""
        program = binaries(self.host, self.release)["fdbbackup"]
        if f"{dashed(self.name)}-backup.service" in units and self.host.exists(program):
            done = self._fdbbackup("status")  # silence is no end
            running = "" if any(text in done.text for text in ENDED) else done.text or "no answer"
        # of a template only its instances have a state
        asked = [unit.replace("@.", "@*.") for unit in units]
        return {"texts": texts, "units": show(self.host, asked, "ActiveState,UnitFileState"), "running": running}

    def _fdbbackup(self, verb: str) -> Completed:
        argv = [binaries(self.host, self.release)["fdbbackup"], verb, "-C", cluster_file(self.name), "-t", "agentfleet"]
        return self.host.run(argv, timeout_seconds=60, check=False)

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """A restore is waited for, since the database is empty while it runs; a backup ends."""
        for unit, state in observed["units"].items():
            if "-restore@" in unit and state.get("ActiveState") in RUNNING:
                raise Refused(
                    self.option, None, f"{unit} restores the database, and would be left half-way", "Wait until it ends"
                )
        steps = retire(observed["texts"], observed["units"], "no longer declared")
        if observed["running"]:
            why = "without its agent it never ends, and the database keeps all changes for it"
            abort = Step("abort", f"backup of {self.name}", before=observed["running"], why=why)
            steps.insert(sum(step.verb == "stop" for step in steps), abort)
        return steps

    def apply(self, step: Step) -> None:
        """Carry out one step of ``plan``."""
        if step.verb != "abort":
            apply_retired(self.host, step)
            return
        done = self._fdbbackup("abort")
        if done.rc != 0 and NOT_RUNNING not in done.text:  # it may have ended meanwhile
            raise HostError(f"fdbbackup abort: {done.text or done.rc}")


class Absent:
    """A database whose servers go from one host, as a resource. Cluster file, data and logs stay.

    :param params: options of the module ``foundationdb_server``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.name = check_name(params.get("name") or DEFAULT)
        self.lose_data = bool(params.get("lose_data"))
        self.backups = OldBackups(host, self.name, str(params["release"]).rstrip("/"), "state")

    def observe(self) -> dict[str, t.Any]:
        """Configuration, units, and who restores into this database for trial."""
        into = f"--dest-cluster-file {cluster_file(self.name)} "
        drills = [path for path in self.host.glob(f"{UNITS}/*-restore-drill.service") if into in self.host.read(path)]
        services = [os.path.basename(path) for path in drills]
        units = [unit_name(self.name), *(name.replace(".service", ".timer") for name in services), *services]
        paths = (f"{etc(self.name)}/foundationdb.conf", f"{UNITS}/{unit_name(self.name)}")
        return {
            "texts": {path: self.host.read(path) for path in paths},
            "drills": units[1:],
            "units": show(self.host, units, "ActiveState,UnitFileState"),
            "backups": self.backups.observe(()),
            "cluster": self.host.read(cluster_file(self.name)),
        }

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Drills and backups end before the servers that they need."""
        ending = ports(observed["texts"][f"{etc(self.name)}/foundationdb.conf"])
        if ending and not observed["drills"] and not self.lose_data:
            raise Refused(
                "state",
                "absent",
                f"the servers of {self.name} with ports {', '.join(map(str, ending))} would end, with data that others may not have",
                "Move their data first (fdbcli --exec 'exclude ADDRESS:PORT'), then set lose_data: true",
            )
        units = observed["units"]
        running = [unit for unit in observed["drills"] if units.get(unit, {}).get("ActiveState") in RUNNING]
        steps = [halt(running, units, f"restores into {self.name}")] if running else []
        return [*steps, *self.backups.plan(observed["backups"]), *retire(observed["texts"], units, "its servers end")]

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        self.backups.apply(step)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The connection string that is left."""
        return {"connection": connection(observed["cluster"])}


class Servers:
    """The FoundationDB of one host as a resource.

    :param params: options of the module ``foundationdb_server``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.name = check_name(params.get("name") or DEFAULT)
        self.release = str(params["release"]).rstrip("/")
        self.machines = [str(address) for address in params["machines"]]
        self.coordinators = check_layout(params["redundancy"], params["coordinators"], self.machines)
        self.address = str(params["address"])
        if self.address not in self.machines:
            raise Refused("address", self.address, "not one of machines", f"One of {', '.join(self.machines)}")
        self.connection = connection(str(params.get("connection") or ""))
        if not self.connection:
            raise Refused(
                "connection",
                params.get("connection"),
                "not a connection string",
                "Write description:id@address:port,...",
            )
        self.port = int(params.get("port") or 4500)
        count = params.get("processes")
        self.processes = int(count) if count is not None else os.cpu_count() or 1
        if not 0 < self.processes <= 64 or not 0 < self.port <= 65535 - self.processes:
            raise Refused("processes", self.processes, "out of range", "1 to 64, with a port for each from port on")
        self.agents = int(params.get("backup_agents") or 0)
        self.memory = str(params.get("memory") or "")
        self.data = str(params.get("data_directory") or f"/var/lib/{dashed(self.name)}")
        self.logs = str(params.get("log_directory") or f"/var/log/{dashed(self.name)}")
        self.library_path = [str(path) for path in params.get("library_path") or []]
        self.lose_data = bool(params.get("lose_data"))
        self.backup = self._backup(params.get("backup") or {})
        self.old = OldBackups(host, self.name, self.release, "backup")

    def _backup(self, given: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        if not given.get("directory"):
            return {}
        directory = str(given["directory"]).rstrip("/")
        if not re.fullmatch(r"/[\w./-]+", directory):
            raise Refused(
                "backup.directory",
                given["directory"],
                "not an absolute path of plain characters",
                "Write one, such as /backup/fdb",
            )
        keep = 7 if given.get("keep") is None else int(given["keep"])
        if keep < 1:
            raise Refused("backup.keep", keep, "no backup would be left", "At least 1")
        if not self.agents:
            raise Refused(
                "backup_agents",
                self.agents,
                "without an agent a backup never ends",
                "At least 1 on the host that has the directory",
            )
        defaults = {"on_calendar": "daily", "check_on_calendar": "weekly", "drill_on_calendar": "monthly"}
        calendars = {key: str(given.get(key) or default) for key, default in defaults.items()}
        for key, value in calendars.items():
            if not re.fullmatch(r"[\w*:,./ ~-]+", value):
                raise Refused(
                    f"backup.{key}", value, "not a calendar event of systemd", "Write such as daily or *-*-* 02:00"
                )
        drill = str(given.get("drill_database") or "")
        if drill and not NAME.match(drill):
            raise Refused("backup.drill_database", drill, "not a name for a database", "Use a-z, 0-9 and _, at most 31")
        if drill == self.name:
            raise Refused(
                "backup.drill_database",
                drill,
                "a restore locks the database that it goes into, and this is the one that is backed up",
                "Name another one of this host",
            )
        return {"directory": directory, "keep": keep, "drill_database": drill, **calendars}

    # -- observe ------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Files and units."""
        units = [unit_name(self.name), *(unit for unit in self._backup_units() if unit.endswith(".timer"))]
        return {
            "files": {path: self.host.read(path) for path in self._files()},
            "cluster": self.host.read(cluster_file(self.name)),
            "drill": self._observe_drill(),
            "units": show(self.host, units, "ActiveState,UnitFileState"),
            "installed": self.host.exists(self._programs()["fdbmonitor"]),
            "directories": {
                path: self.host.exists(path)
                for path in (self.data, self.logs, self.backup.get("directory", ""))
                if path
            },
            "others": self._others(),
            "sharing": self._sharing(),
            "mode": self.host.mode(cluster_file(self.name)),
            "backups": self._observe_backups(),
            "old": self.old.observe(self._backup_units()),
        }

    def _programs(self) -> dict[str, str]:
        return binaries(self.host, self.release)

    def _drills(self) -> bool:
        return bool(self.backup.get("drill_database"))

    def _observe_drill(self) -> dict[str, t.Any]:
        if not self._drills():
            return {}
        drill = self.backup["drill_database"]
        conf = self.host.read(f"{etc(drill)}/foundationdb.conf")
        return {"connection": connection(self.host.read(cluster_file(drill))), "agent": "[backup_agent." in conf}

    def _refuse_drill(self, found: t.Mapping[str, t.Any], own: str) -> None:
        """A drill into the database that is backed up would lock all its clients out; without an agent it has no end."""
        drill = self.backup["drill_database"]
        if not (found["connection"] and found["agent"]) and not self.predicting:
            missing = "no backup agent of it runs" if found["connection"] else "there is no such database"
            raise Refused(
                "backup.drill_database", drill, f"{missing} on this host", "Run it here first, with backup_agents: 1"
            )
        if found["connection"].partition("@")[0] == own.partition("@")[0]:
            raise Refused(
                "backup.drill_database",
                drill,
                f"{cluster_file(drill)} leads to the database that is backed up",
                "Name a database of its own",
            )

    def _others(self) -> dict[int, str]:
        taken = {}
        for path in self.host.glob("/etc/foundationdb*/foundationdb.conf"):
            if os.path.dirname(path) != etc(self.name):
                taken.update(dict.fromkeys(ports(self.host.read(path)), os.path.dirname(path)))
        return taken

    def _sharing(self) -> str:
        """The unit that takes backups of another database to our directory, where each deletes those of the other."""
        own = f"{UNITS}/{dashed(self.name)}-backup.service"
        for path in self.host.glob(f"{UNITS}/foundationdb*-backup.service") if self.backup else ():
            found = re.search(r" -d file://(\S+) -w$", self.host.read(path), re.MULTILINE)
            if path != own and found and self._real(found.group(1)) == self._real(self.backup["directory"]):
                return os.path.basename(path)
        return ""

    def _observe_backups(self) -> dict[str, t.Any]:
        """The directory's mode, and whether it is ours alone, so that closing it takes nothing from others."""
        directory = self.backup.get("directory")
        if not directory or not self.host.exists(directory):
            return {"mode": 0, "ours": True}
        alone = all(name.startswith("backup-") or name == "lost+found" for name in self.host.names(directory))
        owner = os.stat(self.host.path(directory)).st_uid
        return {"mode": self.host.mode(directory), "ours": alone and owner == os.geteuid()}

    def _real(self, path: str) -> str:
        return os.path.realpath(self.host.path(path))

    def _refuse_loss(self, conf: str) -> None:
        """Servers that end, or begin in an empty directory, take their share of the data with them; on all hosts at once, all of it."""
        going = [port for port in ports(conf) if not self.port <= port < self.port + self.processes]
        if going:
            servers = " ".join(f"{self.address}:{port}" for port in going)
            raise Refused(
                "processes" if self.port in ports(conf) else "port",
                self.processes if self.port in ports(conf) else self.port,
                f"the servers {servers} would end, with data that others may not have",
                f"Move their data first (fdbcli --exec 'exclude {servers}'), then set lose_data: true",
            )
        there = re.search(r"^datadir *= *(\S+)/data/\$ID$", conf, re.MULTILINE)
        if there and there.group(1) != self.data:
            raise Refused(
                "data_directory",
                self.data,
                f"the data are in {there.group(1)}, and the servers would begin without any",
                "Stop the service and move the directory; to give up this host's data, set lose_data: true",
            )

    # -- plan -----------------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Cluster file only if there is none; configuration and units; run."""
        if not observed["installed"] and not self.predicting:
            raise Refused(
                "release", self.release, "has no fdbmonitor", "Install it first (module artifact), or correct the path"
            )
        for port in range(self.port, self.port + self.processes):
            if port in observed["others"]:
                raise Refused(
                    "port", self.port, f"{observed['others'][port]} has port {port} on this host", "Choose other ports"
                )
        if observed["sharing"]:
            raise Refused(
                "backup.directory",
                self.backup["directory"],
                f"{observed['sharing']} has it, and each database would delete, check and restore the backups of the other",
                "Give each database a directory of its own",
            )
        if not self.lose_data:
            self._refuse_loss(observed["files"][f"{etc(self.name)}/foundationdb.conf"])
        now = observed["cluster"]
        if now and connection(now).partition(":")[0] != self.connection.partition(":")[0]:
            raise Refused(
                "connection",
                self.connection.partition("@")[0],
                f"this host belongs to another database: {connection(now).partition('@')[0]}",
                f"Give this one its own name and ports, or move {etc(self.name)} and {self.data} away to give the other up",
            )
        if self._drills():
            self._refuse_drill(observed["drill"], connection(now) or self.connection)
        steps = self.old.plan(observed["old"])
        steps += [
            Step("create", path, after="directory") for path, there in observed["directories"].items() if not there
        ]
        if not now:
            path = cluster_file(self.name)
            steps.append(Step("create", path, after=self.connection))
        if why := exposed(observed["mode"]):
            before = f"{observed['mode']:04o}"
            steps.append(Step("close", cluster_file(self.name), before=before, after="0600", why=why))
        backups = observed["backups"]
        if (why := exposed(backups["mode"])) and backups["ours"]:
            before = f"{backups['mode']:04o}"
            steps.append(Step("close", self.backup["directory"], before=before, after="0700", why=why))
        writes, starts = [], []
        for path, text in self._files().items():
            if observed["files"][path] != text.strip():
                writes.append(Step("write", path, before=observed["files"][path] or None, after=text, data=text))
        main = unit_name(self.name)
        state = observed["units"].get(main, {})
        if state.get("ActiveState") != "active" or state.get("UnitFileState") != "enabled":
            starts.append(Step("start", main, before=state.get("ActiveState"), after="active, enabled"))
        elif observed["files"][f"{UNITS}/{main}"] != self._unit().strip():
            starts.append(Step("restart", main, why="its unit changed", disruptive=True))
        for unit in (unit for unit in self._backup_units() if unit.endswith(".timer")):
            state = observed["units"].get(unit, {})
            if state.get("ActiveState") != "active" or state.get("UnitFileState") != "enabled":
                starts.append(Step("start", unit, before=state.get("ActiveState"), after="active, enabled"))
        return steps + arrange(writes, starts)

    def _files(self) -> dict[str, str]:
        found = {f"{etc(self.name)}/foundationdb.conf": self._conf(), f"{UNITS}/{unit_name(self.name)}": self._unit()}
        return {**found, **{f"{UNITS}/{unit}": text for unit, text in self._backup_units().items()}}

    def _conf(self) -> str:
        programs = self._programs()
        memory = f"memory = {self.memory}\n" if self.memory else ""
        servers = "".join(f"\n[fdbserver.{self.port + number}]\n" for number in range(self.processes))
        agents = "".join(f"\n[backup_agent.{number + 1}]\n" for number in range(self.agents))
        return (
            "# Written by agentfleet.metal. fdbmonitor follows changes of this file by itself.\n"
            f"[fdbmonitor]\nuser = root\ngroup = root\n\n[general]\ncluster-file = {cluster_file(self.name)}\nrestart-delay = 10\n\n"
            f"[fdbserver]\ncommand = {programs['fdbserver']}\npublic-address = {self.address}:$ID\nlisten-address = public\n"
            f"datadir = {self.data}/data/$ID\nlogdir = {self.logs}\nlocality-machineid = {self.address}\n"
            f"locality-zoneid = {self.address}\n{memory}{servers}\n"
            f"[backup_agent]\ncommand = {programs['backup_agent']}\nlogdir = {self.logs}\n{agents}"
        )

    def _environment(self) -> str:
        return f"Environment=LD_LIBRARY_PATH={':'.join(self.library_path)}\n" if self.library_path else ""

    def _unit(self) -> str:
        conf = f"{etc(self.name)}/foundationdb.conf"
        lock = f"/run/fdbmonitor-{self.name}.pid"
        return (
            f"# Written by agentfleet.metal.\n[Unit]\nDescription=FoundationDB {self.name}\nAfter=network-online.target\n"
            f"Wants=network-online.target\nRequiresMountsFor={self.data}\nStartLimitIntervalSec=0\n\n[Service]\nType=exec\n"
            f"ExecStart={self._programs()['fdbmonitor']} --conffile {conf} --lockfile {lock}\n{self._environment()}"
            "LimitNOFILE=1000000\nRestart=always\nRestartSec=5\nTimeoutStopSec=1min\nNoNewPrivileges=yes\nProtectHome=yes\n\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )

    def _backup_units(self) -> dict[str, str]:
        if not self.backup:
            return {}
        directory, programs, file = self.backup["directory"], self._programs(), cluster_file(self.name)
        program = programs["fdbbackup"]
        newest = f"ls -d1 {directory}/backup-* | sort"
        wait = f"ExecStartPre=-{program} wait -C {file} -t agentfleet\n"
        restorable = f'{program} describe -C {file} -d file://%s | grep -i "restorable: true"'
        check = f"ExecStart=/bin/sh -ec 'd=$$({newest} | tail -n 1); test -n \"$$d\"; {restorable % '$$d'}'\n"
        # It ends with exit code 0 also when it was aborted or failed; nothing is deleted for such a one.
        run = (
            f"{wait}ExecStart={program} start -C {file} -t agentfleet -d file://{directory} -w\n{check}"
            f"ExecStartPost=/bin/sh -c '{newest} | head -n -{self.backup['keep']} | "
            f"while read d; do {program} delete -d file://$$d; done'\n"
        )
        # Only a backup that is good empties the database; an interrupted restore is begun again.
        restore = (
            f"ExecStartPre=/bin/sh -ec '{restorable % f'{directory}/%i'}'\n{wait}"
            f"ExecStartPre=-{programs['fdbrestore']} abort --dest-cluster-file {file} -t agentfleet\n"
            f'ExecStart={programs["fdbcli"]} -C {file} --timeout 600 --exec "writemode on; clearrange \\"\\" \\\\xff"\n'
            f"ExecStart={programs['fdbrestore']} start --dest-cluster-file {file} -t agentfleet -r file://{directory}/%i -w\n"
        )
        title = f"Description=FoundationDB {self.name}"
        head, service = "# Written by agentfleet.metal.\n[Unit]", f"[Service]\nType=oneshot\n{self._environment()}"
        own, long = unit_name(self.name), "TimeoutStartSec=6h\n"
        units = {
            f"{dashed(self.name)}-restore@.service": f"{head}\n{title}: restore of %i\nAfter={own}\n\n{service}{restore}{long}"
        }
        backup = f"{own} {dashed(self.name)}-backup.service"
        timed = [
            ("backup", "on_calendar", own, run),
            ("backup-check", "check_on_calendar", backup, check),
        ]
        if self._drills():
            scratch = unit_name(self.backup["drill_database"])
            timed.append(
                ("restore-drill", "drill_on_calendar", f"{backup} {scratch}", self._drill(f"{newest} -r", restorable))
            )
        for verb, calendar, after, command in timed:
            base = f"{dashed(self.name)}-{verb}"
            units[f"{base}.service"] = f"{head}\n{title}: {verb}\nAfter={after}\n\n{service}{command}{long}"
            units[f"{base}.timer"] = (
                f"{head}\n{title}: {verb}\n\n"
                f"[Timer]\nOnCalendar={self.backup[calendar]}\nPersistent=true\n\n[Install]\nWantedBy=timers.target\n"
            )
        return units

    def _drill(self, newest: str, restorable: str) -> str:
        """Restore the newest restorable backup for trial, below a prefix of another database, and drop it again.

        A restore locks the whole database it goes into, whatever the prefix: so it must be another one, which is looked
        at again on each run. The prefix is what keeps the cleaning from any key that is not of a drill.
        """
        programs, file, other = self._programs(), cluster_file(self.name), cluster_file(self.backup["drill_database"])
        restore, where = programs["fdbrestore"], f"--dest-cluster-file {other} -t agentfleet"
        keys = f"{DRILL_PREFIX} {DRILL_PREFIX[:-1]}{chr(ord(DRILL_PREFIX[-1]) + 1)}"
        identity = 'sed -n "/^#/d;s/@.*//p" %s'
        cli = f"{programs['fdbcli']} -C {other} --timeout 60 --exec"
        clean = (f"-{restore} abort {where}\n", f'{cli} "writemode on; clearrange {keys}"\n')
        start = f'{restore} start {where} --add-prefix {DRILL_PREFIX} -k "$$USER_KEYS" -r file://$$d -w'
        return (
            'Environment="USER_KEYS=\\"\\" \\\\xff"\n'  # as fdbrestore reads a range, without the system's own keys
            f'ExecStartPre=/bin/sh -ec \'test "$$({identity % file})" != "$$({identity % other})"\'\n'
            f"ExecStartPre={clean[0]}ExecStartPre={clean[1]}"
            f"ExecStart=/bin/sh -ec 'for d in $$({newest}); do if {restorable % '$$d'}; then exec {start}; fi; done; exit 1'\n"
            f"ExecStart=/bin/sh -ec '{restore} status {where} | grep \"State: completed\"'\n"
            f'ExecStart=/bin/sh -ec \'{cli} "getrangekeys {keys} 1" | grep "^.{DRILL_PREFIX}"\'\n'
            f"ExecStopPost={clean[0]}ExecStopPost={clean[1]}"
        )

    # -- apply ------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        if step.after == "directory":
            mode = 0o700 if step.object == self.backup.get("directory") else 0o755
            os.makedirs(self.host.path(step.object), mode=mode, exist_ok=True)
        elif step.verb == "create":
            self.host.write(step.object, self.connection + "\n", 0o600)
        elif step.verb == "close":
            os.chmod(self.host.path(step.object), int(step.after, 8))
        elif step.verb == "write":
            self.host.write(step.object, step.data.text)
            step.data.tell(self.host)
        elif step.verb in ("abort", "stop", "disable", "remove"):
            self.old.apply(step)
        else:
            step.data.tell(self.host)
            self.host.run(["systemctl", step.verb, step.object], timeout_seconds=120)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """The connection string that this host has."""
        backups, directory = observed["backups"], self.backup.get("directory")
        warning = (
            f"{directory}: other users can read the backups, and with them all of the database. The directory has other"
        )
        warning += " things or another owner, so that its mode stays: give the backups one of their own, with mode 0700"
        return {
            "connection": connection(observed["cluster"]) or self.connection,
            "warnings": [warning] if exposed(backups["mode"]) and not backups["ours"] else [],
        }
