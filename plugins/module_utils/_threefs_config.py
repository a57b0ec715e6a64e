# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration files of all services of a cluster on one host.

Each file is the one that ships with the release, with the keys that make it this
cluster's and those that the user declares. Main configurations are what mgmtd keeps:
they are rendered where they are published from.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import socket
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _threefs_checks, _threefs_profiles
from ansible_collections.agentfleet.metal.plugins.module_utils._fdb import connection, exposed, ports
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import (
    ETC,
    LOGS,
    MANAGED,
    PROGRAMS,
    SERVICES,
    STATE,
    check_cluster,
    check_token,
    description_path,
    unit_name,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_publish import Published
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_toml import Toml, TomlError
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size

# Storage has mgmtd's ports in the files that ship, so that both do not fit on one host.
PORTS = {
    "mgmtd": {"rdma": 8000, "tcp": 9000},
    "meta": {"rdma": 8001, "tcp": 9001},
    "storage": {"rdma": 8002, "tcp": 9002},
    "monitor": {"tcp": 10000},
}
_SECRET = ("admin_cli", "monitor_collector_main")
_NODE_IDS = {"mgmtd": range(1, 100), "meta": range(100, 10000), "storage": range(10000, 1000000)}

Values = dict[str, t.Any]


class Config:
    """The configuration of one cluster on one host as a resource.

    :param params: options of the module ``threefs_config``
    :param resolve: turns a host's name into its address
    """

    predicting = False

    def __init__(
        self,
        host: Host,
        params: t.Mapping[str, t.Any],
        resolve: t.Callable[[str], str] = socket.gethostbyname,
    ) -> None:
        self.host, self._resolve = host, resolve
        self.restarts: list[str] = []
        self._rendered: dict[tuple[str, str | None], str] = {}
        self.cluster = check_cluster(params["cluster"])
        self.directory = f"{ETC}/{self.cluster}"
        self.release = str(params["release"]).rstrip("/")
        self.services = list(params.get("services") or [])
        self.publish = bool(params.get("publish"))
        self.authenticate = bool(params.get("authenticate", True))
        for index, service in enumerate(self.services):
            if service not in SERVICES:
                raise Refused(f"services[{index}]", service, "no such service", f"One of {', '.join(SERVICES)}")
        self.node_ids = self._node_ids(params.get("node_ids") or {})
        self.ports = self._ports(params.get("ports") or {})
        self.mgmtd = self._mgmtd(params.get("mgmtd") or [])
        self.monitor = self._address("monitor", params["monitor"], "monitor") if params.get("monitor") else ""
        self.fdb = str(params.get("fdb_cluster") or "").strip()
        if connection(self.fdb) != self.fdb:
            raise Refused(
                "fdb_cluster", self.fdb, "not the content of a cluster file", "Write description:id@address:port,..."
            )
        self.target_paths = self._target_paths(list(params.get("target_paths") or []))
        self.without_uuid = bool(params.get("allow_disk_without_uuid"))
        self.mountpoint = str(params.get("mountpoint") or "").rstrip("/")
        if "fuse" in self.services and not self.mountpoint.startswith("/"):
            raise Refused(
                "mountpoint", params.get("mountpoint"), "fuse needs an absolute path", "Write one, such as /3fs/stage"
            )
        self.token = check_token("token", params["token"]) if params.get("token") else ""
        self.fuse_token = check_token("fuse_token", params["fuse_token"]) if params.get("fuse_token") else ""
        if "fuse" in self.services and not self.fuse_token:
            raise Refused(
                "fuse_token", "(hidden)", "fuse cannot start without a token", "Give the token of the mount's user"
            )
        self.clickhouse = self._clickhouse(params.get("clickhouse") or {})
        self.devices = [str(name) for name in params.get("rdma_devices") or []]
        self.skip_checks = list(params.get("skip_checks") or [])
        for index, name in enumerate(self.skip_checks):
            if name not in _threefs_checks.CHECKS:
                raise Refused(
                    f"skip_checks[{index}]", name, "no such check", f"One of {', '.join(_threefs_checks.CHECKS)}"
                )
        self.usrbio = parse_size("usrbio_memory", params["usrbio_memory"]) if params.get("usrbio_memory") else 0
        if self.usrbio and "fuse" not in self.services:
            raise Refused(
                "usrbio_memory",
                params["usrbio_memory"],
                "USRBIO goes through the FUSE service, which this host does not have",
                "Add fuse to services",
            )
        self.small = "small_memory" in (params.get("profiles") or [])
        self.settings = self._settings(params.get("profiles") or [], params.get("settings") or {})
        wait = int(params.get("publish_wait_seconds") or 0)
        self.published = Published(host, self.cluster, params.get("root_layout") or {}, wait) if self.publish else None

    # -- options ----------------------------------------------------------------------

    def _node_ids(self, given: t.Mapping[str, t.Any]) -> dict[str, int]:
        found = {}
        for service, allowed in _NODE_IDS.items():
            value = given.get(service)
            if value is None and service not in self.services:
                continue
            option = f"node_ids.{service}"
            if value is None:
                raise Refused(
                    option, None, f"the service {service} needs its id", "Give each service of the cluster its own"
                )
            if int(value) not in allowed:
                raise Refused(option, value, "out of the range of this service", f"{allowed[0]} to {allowed[-1]}")
            found[service] = int(value)
        return found

    @staticmethod
    def _ports(given: t.Mapping[str, t.Any]) -> dict[str, dict[str, int]]:
        ports = {service: dict(both) for service, both in PORTS.items()}
        for service, both in given.items():
            if service not in ports:
                raise Refused(f"ports.{service}", both, "this service has no port", f"One of {', '.join(ports)}")
            for kind, port in (both or {}).items():
                if port is None:
                    continue
                if kind not in ports[service]:
                    raise Refused(f"ports.{service}.{kind}", port, "this service has no such port", "rdma or tcp")
                if not 0 < int(port) < 65536:
                    raise Refused(f"ports.{service}.{kind}", port, "not a port", "1 to 65535")
                ports[service][kind] = int(port)
        taken: dict[int, str] = {}
        for service, both in ports.items():
            for kind, port in both.items():
                if port in taken:
                    raise Refused(
                        f"ports.{service}.{kind}",
                        port,
                        f"{taken[port]} has the same, and services may share a host",
                        "Give each its own port",
                    )
                taken[port] = f"{kind} of {service}"
        return ports

    def _clickhouse(self, given: t.Mapping[str, t.Any]) -> dict[str, str]:
        house = {"db": "3fs", "port": "9000", "user": "default", "password": ""}
        house.update({key: str(value) for key, value in given.items() if value is not None})
        if "monitor" in self.services and not house.get("host"):
            raise Refused(
                "clickhouse.host", None, "the monitor collector has nowhere to write", "Name the ClickHouse server"
            )
        if not re.fullmatch(r"[0-9]{1,5}", house["port"]) or not 0 < int(house["port"]) < 65536:
            raise Refused("clickhouse.port", house["port"], "not a port", "1 to 65535; without it 9000")
        if not re.fullmatch(r"[A-Za-z0-9_]+", house["db"]):
            raise Refused("clickhouse.db", house["db"], "not a name for a database", "Use letters, digits and _")
        return house

    def _ip(self, name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """An address, or that of a name; OSError where the name has none."""
        try:
            return ipaddress.ip_address(name)
        except ValueError:
            return ipaddress.ip_address(self._resolve(name))

    def _address(self, option: str, value: str, service: str) -> str:
        """HOST or HOST:PORT as IP:PORT, since upstream's services know no names."""
        name, _colon, port = str(value).partition(":")
        try:
            address = self._ip(name)
        except OSError:
            raise Refused(
                option,
                value,
                "the name cannot be resolved on this host",
                "Give an address, or put it into DNS or /etc/hosts",
            ) from None
        if address.is_loopback:
            raise Refused(option, value, f"{address} is this host only", "Give an address that the other hosts reach")
        both = self.ports[service]
        return f"{address}:{port or both.get('rdma', both['tcp'])}"

    def _mgmtd(self, names: t.Sequence[str]) -> list[str]:
        if not names:
            raise Refused("mgmtd", [], "a cluster has at least one mgmtd", "Name the hosts that run it")
        found = [self._address(f"mgmtd[{index}]", name, "mgmtd") for index, name in enumerate(names)]
        for index, address in enumerate(found):
            if address in found[:index]:
                raise Refused(f"mgmtd[{index}]", names[index], f"{address} is named twice", "Name each mgmtd once")
        return [f"RDMA://{address}" for address in found]

    def _target_paths(self, paths: list[str]) -> list[str]:
        if not paths and (self.publish or "storage" in self.services):
            raise Refused(
                "target_paths", paths, "storage has no disk", "Name the same paths for all storage hosts, in order"
            )
        for index, path in enumerate(paths):
            if not str(path).startswith("/"):
                raise Refused(f"target_paths[{index}]", path, "not an absolute path", "Write it from / on")
            if path in paths[:index]:
                raise Refused(
                    f"target_paths[{index}]", path, "named twice", "The place in the list is the disk's index"
                )
        return paths

    def _settings(self, profiles: t.Sequence[str], declared: t.Mapping[str, t.Any]) -> dict[str, Values]:
        known = _threefs_profiles.PROFILES
        found: dict[str, Values] = {}
        for index, name in enumerate(profiles):
            if name not in known:
                raise Refused(f"profiles[{index}]", name, "no such profile", f"One of {', '.join(known)}")
            for file, values in known[name].items():
                found.setdefault(file, {}).update(values)
        for file, values in declared.items():
            if file not in _stems():
                raise Refused(f"settings.{file}", values, "no such file", f"One of {', '.join(_stems())}")
            if not isinstance(values, dict):
                raise Refused(f"settings.{file}", values, "not a dictionary", "Write dotted.key: value")
            found.setdefault(file, {}).update(values)
        return found

    # -- what the cluster needs ----------------------------------------------------------

    def _files(self) -> list[str]:
        """Names (without .toml) of the files that this host needs."""
        found = ["admin_cli"]
        for service in self.services:
            program = PROGRAMS[service]
            found += [program] if service == "monitor" else [f"{program}_launcher", f"{program}_app"]
        if self.publish:
            found += [PROGRAMS[service] for service in MANAGED]
        return sorted(found)

    def _own(self, file: str) -> Values:
        """The keys that make a file this cluster's; a leading ? marks one that some releases lack."""
        program = re.sub(r"_(launcher|app)$", "", file)
        service = next((name for name, known in PROGRAMS.items() if known == program), "admin")
        if file.endswith("_app"):  # that of FUSE is empty: a client has no id
            return {} if service == "fuse" else {"node_id": self.node_ids[service], "?allow_empty_node_id": False}
        if file.endswith("_launcher"):
            return self._launcher(service)
        values: Values = {}
        if service == "admin":
            values = {
                "cluster_id": self.cluster,
                "log": f"DBG:normal; normal=file:path={LOGS}/{self.cluster}/cli.log,async=true,sync_level=ERR",
                "fdb.clusterFile": self._fdb_path(),
                "mgmtd_client.mgmtd_server_addresses": self.mgmtd,
                "?ib_devices.device_filter": self.devices,
            }
            return {**values, "user_info.token": self.token} if self.token else values
        if service == "monitor":
            prefix = "server.monitor_collector.reporter.clickhouse"
            values = {f"{prefix}.{key}": self.clickhouse[key] for key in ("db", "host", "port", "user")}
            values[f"{prefix}.passwd"] = self.clickhouse["password"]
            values["?common.cluster_id"] = self.cluster
            values["server.base.groups[0].listener.listen_port"] = self.ports["monitor"]["tcp"]
            return values
        if self.monitor:
            values["common.monitor.reporters[0].monitor_collector.remote_ip"] = self.monitor
        if service != "fuse":
            for kind, port in self.ports[service].items():
                values[f"server.base.groups[{kind.upper()}].listener.listen_port"] = port
        if service == "mgmtd":
            values["server.service.authenticate"] = self.authenticate
        elif service == "meta":
            values["server.meta.authenticate"] = self.authenticate
            values["server.fdb.clusterFile"] = values["?server.kv_engine.fdb.clusterFile"] = self._fdb_path()
            values["server.mgmtd_client.mgmtd_server_addresses"] = self.mgmtd
        elif service == "storage":
            values["server.mgmtd.mgmtd_server_addresses"] = self.mgmtd
            values["server.targets.target_paths"] = self.target_paths
            values["server.targets.allow_disk_without_uuid"] = self.without_uuid
            values["?server.storage.event_trace_log.trace_file_dir"] = f"{LOGS}/{self.cluster}"
        elif service == "fuse":
            values["mgmtd.mgmtd_server_addresses"] = self.mgmtd
        return values

    def _launcher(self, service: str) -> Values:
        values: Values = {"cluster_id": self.cluster}
        if self.devices:
            values["ib_devices.device_filter"] = self.devices
        if service == "mgmtd":
            values["fdb.clusterFile"] = values["?kv_engine.fdb.clusterFile"] = self._fdb_path()
            return values
        values["mgmtd_client.mgmtd_server_addresses"] = self.mgmtd
        if service == "fuse":
            values.update({"mountpoint": self.mountpoint, "token_file": f"{self.directory}/fuse.token"})
        return values

    def _fdb_path(self) -> str:
        # The daemons' own library rewrites the file, so that it lies where they may write.
        return f"{STATE}/{self.cluster}/fdb.cluster"

    def _opens_fdb(self, observed: t.Mapping[str, t.Any]) -> bool:
        """Whether mgmtd, meta or who administrates with ``admin_cli`` is here. A mgmtd runs on until somebody removes it."""
        return bool({"mgmtd", "meta"} & {*self.services} or self.token or self.publish or observed["mgmtd"])

    # -- observe -----------------------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Files of the release and files as they are now."""
        base = self._base()
        names = {*self._files(), *(PROGRAMS[service] for service in self._managed())} if base else set()
        paths = [f"{self.directory}/{name}.toml" for name in self._files()]
        paths += [
            description_path(self.cluster),
            self._fdb_path(),
            f"{self.directory}/fuse.token",
            self._clickhouse_path(),
        ]
        return {
            "base": base,
            "shipped": {name: self.host.text(f"{base}/{name}.toml") for name in names},
            "now": {path: self.host.text(path) for path in paths},
            "directories": {
                # not by looking at it, which a mount of a FUSE that died does not allow
                path: os.path.basename(path) in self.host.names(os.path.dirname(path))
                for path in (f"{LOGS}/{self.cluster}", self.mountpoint)
                if path
            },
            "others": self._others(),
            "fdb_mode": self.host.mode(self._fdb_path()),
            "mgmtd": self.host.exists(f"/etc/systemd/system/{unit_name(self.cluster, 'mgmtd')}"),
            "published": self.published.observe(self.predicting) if self.published else None,
            "host": _threefs_checks.observe(self.host),
        }

    def _base(self) -> str:
        """Where the release has its configuration files."""
        places = [f"{self.release}/{place}" for place in ("configs", "etc", "opt/3fs/etc", "opt/3fs/configs")]
        return next((place for place in places if self.host.exists(f"{place}/admin_cli.toml")), "")

    def binaries(self) -> str:
        """Where the release has its programs."""
        places = [f"{self.release}/{place}" for place in ("bin", "build/bin", "opt/3fs/bin")]
        return next((place for place in places if self.host.exists(f"{place}/admin_cli")), places[0])

    def _others(self) -> dict[int, str]:
        """Ports that other things on this host have: other clusters, FoundationDB and ClickHouse."""
        taken: dict[int, str] = {}
        for path in self.host.glob(f"{ETC}/*/cluster.json"):
            other = json.loads(self.host.read(path))
            if other["cluster"] != self.cluster:
                for service in other["services"]:
                    for port in other["ports"].get(service, {}).values():
                        taken[port] = f"{service} of the cluster {other['cluster']}"
        for path in self.host.glob("/etc/foundationdb*/foundationdb.conf"):
            taken.update(dict.fromkeys(ports(self.host.read(path)), "FoundationDB"))
        if self._has_clickhouse():
            taken[int(self.clickhouse["port"])] = "ClickHouse"
        return taken

    def _has_clickhouse(self) -> bool:
        """Whether ClickHouse runs on this host. A loopback address is the monitor's host, whoever is told of it."""
        if not self.clickhouse.get("host"):
            return False
        try:
            address = self._ip(self.clickhouse["host"])
        except OSError:  # the monitor cannot reach it, but that is no matter of ports
            return False
        if address.is_loopback:
            return "monitor" in self.services
        own = re.findall(r"\|-- (\S+)(?:\s+/\d+ \w+ \w+)*?\s+/32 host LOCAL", self.host.read("/proc/net/fib_trie"))
        if address.version == 6:
            lines = self.host.read("/proc/net/if_inet6").splitlines()
            own = [str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in lines]
        return str(address) in own

    # -- plan ------------------------------------------------------------------------------------

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Write what differs."""
        for service in self.services:
            for kind, port in self.ports.get(service, {}).items():
                if port in observed["others"]:
                    owner = observed["others"][port]
                    raise Refused(
                        f"ports.{service}.{kind}", port, f"{owner} has it on this host", "Choose another port"
                    )
        for check, problem, remedy in _threefs_checks.failures(
            observed["host"], self.services, self.devices, self.small, self.usrbio
        ):
            if check not in self.skip_checks:
                raise Refused("services", self.services, problem, f"{remedy}. Or say skip_checks: [{check}]")
        if not observed["base"] and not self.predicting:
            raise Refused(
                "release",
                self.release,
                "has no configs/admin_cli.toml",
                "Install it first (module artifact), or correct the path",
            )
        self._check_indices(json.loads(observed["now"][description_path(self.cluster)] or "{}").get("target_paths", []))
        steps = [
            Step("create", path, after="directory") for path, there in observed["directories"].items() if not there
        ]
        for path, (text, mode) in self._wanted(observed).items():
            now = observed["now"].get(path)
            database = path == self._fdb_path()
            same = connection(now or "") == connection(text) if database else now == text
            why = exposed(observed["fdb_mode"]) if database else ""
            if same and not why:
                continue
            secret = mode == 0o600 and not database
            steps.append(
                Step(
                    "change" if now is not None else "create",
                    path,
                    before="(hidden)" if secret and now is not None else _short(now, text),
                    after="(hidden)" if secret else _short(text, now or ""),
                    why=why,
                    data=(text, mode),
                )
            )
        self.restarts = self._restarts(observed, {step.object for step in steps})
        token = f"{self.directory}/fuse.token"
        if "fuse" not in self.services and observed["now"][token] is not None:
            steps.append(Step("remove", token, before="(hidden)", why="this host has no FUSE any more"))
        if observed["now"][self._fdb_path()] is not None and not self._opens_fdb(observed):
            why = "nothing on this host opens the database, and FoundationDB asks nobody who he is"
            steps.append(Step("remove", self._fdb_path(), before="cluster file", why=why))
        return steps + (self.published.plan(observed["published"], self._mains(observed)) if self.published else [])

    def _check_indices(self, before: t.Sequence[str]) -> None:
        """Targets are known by the index of their disk: with another order storage would look for them on other disks."""
        for index, (old, new) in enumerate(zip(before, self.target_paths)):
            if old != new:
                raise Refused(
                    f"target_paths[{index}]",
                    new,
                    f"this place, which is the disk's index, is that of {old}",
                    f"Keep the order and put new disks last; in a cluster without data, remove {description_path(self.cluster)}",
                )

    def _restarts(self, observed: t.Mapping[str, t.Any], stale: t.Collection[str]) -> list[str]:
        """Services that these steps concern in what they read only when they start."""
        before = json.loads(observed["now"].get(description_path(self.cluster)) or "{}")
        after = self.description(observed)
        found = []
        for service in self.services:
            program = f"{self.directory}/{PROGRAMS[service]}"
            files = {f"{program}{end}.toml" for end in (("",) if service == "monitor" else ("_launcher", "_app"))}
            files |= {f"{self.directory}/fuse.token"} if service == "fuse" else set()
            main = before.get("mains", {}).get(service) != after["mains"].get(service)
            if main or before.get("release") != after["release"] or files & set(stale):
                found.append(service)
        return found

    def _mains(self, observed: t.Mapping[str, t.Any]) -> dict[str, str]:
        """Service -> main configuration as it shall be kept by mgmtd."""
        wanted = self._wanted(observed)
        found = {service: wanted[f"{self.directory}/{PROGRAMS[service]}.toml"][0] for service in MANAGED}
        self._check_rings(Toml(found["fuse"]).data)
        return found

    @staticmethod
    def _check_rings(fuse: t.Mapping[str, t.Any]) -> None:
        """FUSE takes workers for rings of high and low priority off the total; usual rings get what is left."""
        total, parts = fuse.get("batch_io_coros", 0), fuse.get("io_worker_coros", {})
        taken = parts.get("hi", 0) + parts.get("lo", 0)
        if parts and taken >= total:
            raise Refused(
                "settings.hf3fs_fuse_main.batch_io_coros",
                total,
                f"io_worker_coros takes {taken} of them for rings of high and low priority, so that no other ring of USRBIO is served",
                f"More than {taken}",
            )

    def _wanted(self, observed: t.Mapping[str, t.Any]) -> dict[str, tuple[str, int]]:
        """Path -> text and mode."""
        found: dict[str, tuple[str, int]] = {}
        for name in self._files():
            mode = 0o600 if name in _SECRET else 0o640
            found[f"{self.directory}/{name}.toml"] = (self._text(name, observed), mode)
        if "fuse" in self.services:
            found[f"{self.directory}/fuse.token"] = (self.fuse_token + "\n", 0o600)
        if "monitor" in self.services:
            found[self._clickhouse_path()] = (self._clickhouse_client(), 0o600)
        if self._opens_fdb(observed):
            text = f"{self.fdb}\n" if self.fdb else observed["now"][self._fdb_path()]
            if text is None:
                raise Refused(
                    "fdb_cluster", "", "this host has no cluster file yet", "Give the database's connection string"
                )
            found[self._fdb_path()] = (text, 0o600)
        found[description_path(self.cluster)] = (
            json.dumps(self.description(observed), indent=2, sort_keys=True) + "\n",
            0o644,
        )
        return found

    def _clickhouse_path(self) -> str:
        return f"{self.directory}/clickhouse-client.xml"

    def _clickhouse_client(self) -> str:
        lines = "".join(
            f"  <{key}>{self.clickhouse[key].replace('&', '&amp;').replace('<', '&lt;')}</{key}>\n"
            for key in ("host", "port", "user", "password")
        )
        return f"<config>\n{lines}</config>\n"

    def _managed(self) -> list[str]:
        """Services of this host whose main configuration mgmtd hands out."""
        return [service for service in MANAGED if service in self.services]

    def _text(self, name: str, observed: t.Mapping[str, t.Any]) -> str:
        """A file as it shall be; empty before there is a release."""
        shipped = observed["shipped"].get(name)
        if shipped is None and observed["base"]:
            raise Refused("release", self.release, f"has no {name}.toml", "Use a complete release of 3FS")
        if shipped is not None and (name, shipped) not in self._rendered:
            self._rendered[name, shipped] = self._render(name, shipped)
        return self._rendered.get((name, shipped), "")

    def _render(self, name: str, shipped: str) -> str:
        """A file of the release with our keys and the user's; parsed again before it is written."""
        try:
            document = Toml(shipped)
        except TomlError as error:
            raise HostError(f"{self.release}: {name}.toml is no TOML: {error}. Use an intact release") from error
        self._logs(document)
        for dotted, value in self._own(name).items():
            self._assign(document, name, dotted, value, "release", self.release)
        values = {}
        for dotted, value in self.settings.get(name, {}).items():
            option = f"settings.{name}.{dotted.lstrip('?+')}"
            for path in self._assign(document, name, dotted, value, option, value):
                values[path] = value
        if any(document.get(path) != value for path, value in values.items()):
            raise HostError(f"{name}.toml does not hold what was set. Report this: it is a fault of this module")
        return document.text

    def _logs(self, document: Toml) -> None:
        """Each cluster logs into its own directory."""
        for path in document.resolve("**.file_path"):
            value = str(document.get(path))
            document.set(path, f"{LOGS}/{self.cluster}/{os.path.basename(value)}")

    @staticmethod
    def _assign(document: Toml, name: str, dotted: str, value: t.Any, option: str, given: t.Any) -> list[t.Any]:
        """Set a key. It must be in the file that ships, unless + says that it is new or ? that it may be missing."""
        optional, new = dotted.startswith("?"), dotted.startswith("+")
        paths = document.resolve(dotted.lstrip("?+"))
        unknown = not paths or not all(document.knows(path) for path in paths)
        if unknown and optional:
            return []
        if unknown and not (new and paths):
            raise Refused(
                option,
                given,
                f"{name}.toml of this release has no {dotted.lstrip('+')}",
                f"Correct the key; write +{dotted.lstrip('+')} if the release knows it without having it in its file",
            )
        try:
            document.update(dict.fromkeys(paths, value))
        except TomlError as error:
            raise Refused(option, given, str(error), "Name a single value") from None
        return paths

    def description(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """What other modules need to know; nothing secret.

        ``mains`` are digests of what mgmtd hands out to this host's services: a service that runs refuses all of it for
        one key that it reads only when it starts. Which ones those are differs by place and release, so each counts.
        """
        mains = {service: self._text(PROGRAMS[service], observed) for service in self._managed()}
        return {
            "cluster": self.cluster,
            "release": self.release,
            "binaries": self.binaries(),
            "services": self.services,
            "node_ids": self.node_ids,
            "mains": {service: hashlib.sha256(text.encode()).hexdigest()[:16] for service, text in mains.items()},
            "ports": self.ports,
            "mgmtd": self.mgmtd,
            "target_paths": self.target_paths,
            "mountpoint": self.mountpoint,
            "fdb_cluster_file": self._fdb_path(),
            **({"clickhouse_db": self.clickhouse["db"]} if "monitor" in self.services else {}),
        }

    # -- apply -------------------------------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Write one file, or make one directory."""
        if self.published and step.verb in ("initialize", "publish"):
            self.published.apply(step.data)
            return
        if step.after == "directory":
            os.makedirs(self.host.path(step.object), mode=0o755, exist_ok=True)
            return
        if step.verb == "remove":
            self.host.remove(step.object)
            return
        text, mode = step.data
        self.host.write(step.object, text, mode)

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """What this host has of the cluster."""
        missing = [] if observed["base"] else [f"{self.release} is not installed yet; its files are not shown"]
        state = observed["published"] or {}
        kept = state.get("kept") or {}
        told = bool(kept) and all(kept[MANAGED[name]] == text for name, text in self._mains(observed).items())
        return {
            "description": self.description(observed),
            "published": told,
            "restarts": self.restarts,
            "warnings": missing,
        }


def _stems() -> list[str]:
    found = ["admin_cli", "monitor_collector_main"]
    for service in MANAGED:
        found += [PROGRAMS[service], f"{PROGRAMS[service]}_app", f"{PROGRAMS[service]}_launcher"]
    return sorted(found)


def _short(text: str | None, other: str | None) -> str | None:
    """The lines that the other text does not have: these files are long."""
    if text is None:
        return None
    there = set((other or "").splitlines())
    lines = [line for line in text.splitlines() if line not in there and line.strip()]
    return "\n".join(lines) if other else f"{len(text.splitlines())} lines"
