# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd units of the services of a 3FS cluster.

A unit carries the digest of the configuration that it was made for, and a process that
runs tells by its environment with which digest it was started: a service that was not
restarted after a change is found by what runs, not by what was once planned.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import UNITS, Act, arrange, last_words, show
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import (
    ETC,
    PROGRAMS,
    SERVICES,
    check_cluster,
    describe,
    unit_name,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_disk import mount_unit

# Files that a service reads only when it starts. What mgmtd hands out comes to the digest by threefs_config's description.
_FILES = {
    "monitor": ("monitor_collector_main.toml",),
    "fuse": ("hf3fs_fuse_main_launcher.toml", "hf3fs_fuse_main_app.toml", "fuse.token"),
}
_STOP_SECONDS = 330
_STEADY_LOOKS = 3
_VARIABLE = "AGENTFLEET_3FS_CONFIG"


class Services:
    """Units of one cluster on one host as a resource.

    :param params: options of the module ``threefs_service``
    """

    predicting = False

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.cluster = check_cluster(params["cluster"])
        self.state = params.get("state") or "started"
        given = list(params.get("services") or SERVICES)
        for index, service in enumerate(given):
            if service not in SERVICES:
                raise Refused(f"services[{index}]", service, "no such service", f"One of {', '.join(SERVICES)}")
        self.given = [service for service in SERVICES if service in given]
        self.library_path = [str(path) for path in params.get("library_path") or []]
        self.timeout = int(params.get("timeout_seconds") or 120)
        self.restart = bool(params.get("restart", True))
        self.changing = list(params.get("changing") or [])
        self.outdated_nodes = [int(node) for node in params.get("outdated_nodes") or []]
        self.schema = bool(params.get("clickhouse_schema", True))

    # -- observe ------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Units as they are, as they run, and what they shall be made from."""
        described = describe(self.host, self.cluster)
        units = [unit_name(self.cluster, service) for service in self.given]
        states = show(self.host, units, "ActiveState,SubState,MainPID,UnitFileState")
        return {
            "described": described,
            "units": {unit: states.get(unit, {}) for unit in units},
            "texts": {unit: self.host.read(f"{UNITS}/{unit}") for unit in units},
            "running": {unit: self._running_digest(states.get(unit, {}).get("MainPID", "0")) for unit in units},
            "wanted": self._wanted(described) if described else {},
            "tables": self._tables(described) if described else True,
        }

    def _clickhouse(self, described: t.Mapping[str, t.Any]) -> list[str]:
        """clickhouse-client with our server and password, which are in a file and not in its arguments."""
        own = f"{described['binaries']}/clickhouse-client"
        program = own if self.host.exists(own) else "clickhouse-client"
        return [program, "--config-file", self.host.path(f"{ETC}/{self.cluster}/clickhouse-client.xml")]

    def _tables(self, described: t.Mapping[str, t.Any]) -> bool:
        """Whether the monitor collector's tables are there, if they are ours to make."""
        if not self.schema or "monitor" not in self.given or "monitor" not in described["services"]:
            return True
        ask = f"EXISTS TABLE `{_database(described)}`.distributions"
        done = self.host.run([*self._clickhouse(described), "--query", ask], check=False)
        return done.rc == 0 and done.stdout.strip() == "1"

    def _running_digest(self, pid: str) -> str:
        """The digest that a process was started with."""
        found = re.search(rf"{_VARIABLE}=(\w+)", self.host.read(f"/proc/{pid}/environ")) if pid != "0" else None
        return found.group(1) if found else ""

    def _wanted(self, described: t.Mapping[str, t.Any]) -> dict[str, tuple[str, str]]:
        """Unit -> text and digest, of the services that this host has."""
        found = {}
        for service in self.given:
            if service in described["services"]:
                digest = self._digest(service, described)
                found[unit_name(self.cluster, service)] = (self.unit(service, described, digest), digest)
        return found

    def _digest(self, service: str, described: t.Mapping[str, t.Any]) -> str:
        program = PROGRAMS[service]
        names = _FILES.get(service, (f"{program}_launcher.toml", f"{program}_app.toml"))
        parts = [self.host.read(f"{ETC}/{self.cluster}/{name}") for name in names]
        parts.append(json.dumps([described["release"], described.get("mains", {}).get(service)]))
        parts += self.library_path  # nothing where there is none, as it always was
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def unit(self, service: str, described: t.Mapping[str, t.Any], digest: str) -> str:
        """A unit's text: what upstream's lacks is restarting, the order after mounts, and a clean end of FUSE."""
        program = f"{described['binaries']}/{PROGRAMS[service]}"
        etc = f"{ETC}/{self.cluster}/{PROGRAMS[service]}"
        command = (
            f"{program} --cfg {etc}.toml" if service == "monitor" else f"{program} --launcher_cfg {etc}_launcher.toml"
        )
        if service not in ("monitor", "fuse"):
            command += f" --app_cfg {etc}_app.toml"
        paths = list(described["target_paths"]) if service == "storage" else []
        unit = [
            "After=network-online.target time-sync.target",
            "Wants=network-online.target",
            "StartLimitIntervalSec=0",
        ]
        if service in ("meta", "storage", "fuse"):
            unit[0] += f" {unit_name(self.cluster, 'mgmtd')}"
        lines = [f"ExecStart={command}", f"Environment={_VARIABLE}={digest}"]
        if paths:
            # Not required, since with one dead disk all others of the host would go. The service ends where a path is missing;
            # below the mount point of a dead disk it finds none of its targets.
            mounts = " ".join(mount_unit(os.path.dirname(path)) for path in paths)
            unit[0] += f" {mounts}"
            unit[1] += f" {mounts}"
            lines.append(f"ExecStartPre=-/bin/mkdir -p {' '.join(paths)}")
        if self.library_path:
            lines.append(f"Environment=LD_LIBRARY_PATH={':'.join(self.library_path)}")
        if service == "fuse":
            mount = described["mountpoint"]
            # Asked of the kernel's table: whatever looks at the mount of a FUSE that died is told that it is not connected.
            clean = f"-/bin/sh -c 'if grep -qsF \" {mount} \" /proc/self/mounts; then umount --lazy {mount}; fi'"
            lines += [f"ExecStartPre={clean}", f"ExecStopPost={clean}"]
        else:
            # A private mount namespace would hide the mount of FUSE from the host; the others need none of it.
            lines += ["NoNewPrivileges=yes", "ProtectHome=yes", "PrivateTmp=yes"]
        lines += ["LimitNOFILE=1000000", "LimitMEMLOCK=infinity", "Restart=on-failure", "RestartSec=5"]
        lines += ["TimeoutStopSec=5min" if service == "storage" else "TimeoutStopSec=1min"]
        text = "\n".join(unit)
        return (
            f"# Written by agentfleet.metal.\n[Unit]\nDescription=3FS {service} of cluster {self.cluster}\n{text}\n\n"
            f"[Service]\nType=exec\n{chr(10).join(lines)}\n\n[Install]\nWantedBy=multi-user.target\n"
        )

    # -- plan -------------------------------------------------------------------------

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Write units, then start, restart or stop what is not as wished."""
        if observed["described"] is None:
            if self.state == "started" and not self.predicting:
                raise Refused(
                    "cluster", self.cluster, "this host has no configuration of it", "Run module threefs_config before"
                )
            if self.state == "started":
                # what the configuration task of this run will bring is not known here
                return [Step("start", unit_name(self.cluster, service), after="active") for service in self.given]
            return []
        steps: list[Step] = []
        if self.state == "started":
            if not observed["tables"]:
                steps.append(Step("create", "tables of the monitor in ClickHouse", data=observed["described"]))
            steps += self._started(observed)
        else:
            steps += [
                Step("stop", unit, before="active", disruptive=True)
                for unit in reversed(list(observed["units"]))
                if observed["units"][unit].get("ActiveState") in ("active", "activating", "reloading", "failed")
            ]
        if self.state == "absent":
            steps += [Step("remove", unit, before="unit") for unit, text in observed["texts"].items() if text]
        return steps

    def _started(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        writes, starts = [], []
        ids = observed["described"]["node_ids"]
        behind = {unit_name(self.cluster, name) for name, node in ids.items() if node in self.outdated_nodes}
        for unit, (text, digest) in observed["wanted"].items():
            state = observed["units"][unit]
            now = observed["texts"][unit]
            if now != text.strip():
                writes.append(Step("write", f"{UNITS}/{unit}", before=now or None, after=text, data=text))
            active = state.get("ActiveState") == "active"
            coming = self.predicting and any(unit == unit_name(self.cluster, service) for service in self.changing)
            if active and (coming or unit in behind or observed["running"][unit] != digest):
                if not self.restart:
                    continue
                why = "it runs with another configuration or release"
                starts.append(Step("restart", unit, before="active", after="active", why=why, disruptive=True))
            elif not active or state.get("UnitFileState") != "enabled":
                starts.append(Step("start", unit, before=state.get("ActiveState"), after="active, enabled"))
        return arrange(writes, starts)

    # -- apply --------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step; services count as started when they still run after a moment."""
        act = step.data if isinstance(step.data, Act) else Act()
        if step.verb == "create":
            self._create_tables(step.data)
        elif step.verb == "write":
            self.host.write(step.object, act.text)
            act.tell(self.host)
        elif step.verb == "stop":
            self.host.run(["systemctl", "stop", step.object], timeout_seconds=_STOP_SECONDS)
        elif step.verb == "remove":
            self.host.run(["systemctl", "disable", "--quiet", step.object], check=False)
            self.host.remove(f"{UNITS}/{step.object}")
            self.host.run(["systemctl", "daemon-reload"])
        else:
            act.tell(self.host)
            self.host.run(["systemctl", "restart", step.object], timeout_seconds=_STOP_SECONDS, check=False)
            if act.started:
                self._settle(act.started)

    def _create_tables(self, described: t.Mapping[str, t.Any]) -> None:
        places = [f"{described['release']}/{place}/3fs-monitor.sql" for place in ("sql", "deploy/sql", "opt/3fs/sql")]
        sql = next((text for text in map(self.host.read, places) if text), "")
        if not sql:
            raise HostError(
                f"none of {', '.join(places)} is there. Make the tables yourself and say clickhouse_schema: false"
            )
        sql = re.sub(r"`?\b3fs\b`?", f"`{_database(described)}`", sql)  # the file knows one database for all clusters
        done = self.host.run([*self._clickhouse(described), "-n"], stdin=sql + "\n", check=False)
        if done.rc != 0:
            raise HostError(f"clickhouse-client: {done.text}. Is ClickHouse up, and are host, user and password right?")

    def _settle(self, units: t.Sequence[str]) -> None:
        """Wait until the services have run for three seconds without a restart."""
        seen: dict[str, list[str]] = {unit: [] for unit in units}

        def unsteady() -> list[str]:
            """Those without a process, or with another one than a moment ago."""
            states = show(self.host, units, "MainPID")
            for unit, looks in seen.items():
                looks.append(states.get(unit, {}).get("MainPID", "0"))
            return [
                unit
                for unit, looks in seen.items()
                if len(looks) <= _STEADY_LOOKS or len(set(looks[-_STEADY_LOOKS:])) > 1 or looks[-1] in ("", "0")
            ]

        try:
            self.host.wait(lambda: not unsteady(), f"{', '.join(units)} run", self.timeout, interval_seconds=1)
        except HostError as error:
            unit = unsteady()[0]
            raise HostError(f"{unit} does not stay up: {last_words(self.host, unit) or error}") from error

    def _processes(self, observed: t.Mapping[str, t.Any]) -> dict[str, int]:
        """Node id -> process, of what reports to mgmtd: a gate knows by it that a heartbeat is of the new process."""
        ids = (observed["described"] or {}).get("node_ids", {})
        found = {}
        for service in self.given:
            pid = observed["units"][unit_name(self.cluster, service)].get("MainPID", "0")
            if service in ids and pid not in ("", "0"):
                found[str(ids[service])] = int(pid)
        return found

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """State of each unit."""
        outdated = [
            unit
            for unit, (_text, digest) in observed["wanted"].items()
            if self.state == "started" and observed["running"][unit] not in ("", digest)
        ]
        return {
            "units": {unit: state.get("ActiveState", "inactive") for unit, state in observed["units"].items()},
            "outdated": outdated,
            "processes": self._processes(observed),
            "warnings": [
                f"{unit} runs with another configuration; playbook threefs_rolling restarts it" for unit in outdated
            ],
        }


def _database(described: t.Mapping[str, t.Any]) -> str:
    """The monitor collector's database in ClickHouse."""
    return str(described.get("clickhouse_db", "3fs"))
