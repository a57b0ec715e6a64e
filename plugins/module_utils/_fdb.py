# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the servers of FoundationDB and their database have in common: names, places, files, and what makes a layout."""

from __future__ import annotations

import ipaddress
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

# redundancy -> machines and coordinators that it takes to lose one machine (two with triple) and go on
NEEDS = {"single": (1, 1), "double": (3, 3), "triple": (5, 5)}
NAME = re.compile(r"^[a-z0-9][a-z0-9_]{0,30}$")
_CONNECTION = re.compile(r"^([A-Za-z0-9_]+):([A-Za-z0-9]+)@([^@\s]+)$")
DEFAULT = "foundationdb"


def check_name(value: t.Any) -> str:
    """The name of a database on a host, which becomes part of paths and of a unit's name."""
    if not NAME.match(str(value)):
        raise Refused("name", value, "not a name for a database", "Use a-z, 0-9 and _, at most 31")
    if value == "backup":
        raise Refused("name", value, f"{unit_name(str(value))} backs up the default database", "Choose another name")
    return str(value)


def etc(name: str) -> str:
    """The directory of a database's files."""
    return f"/etc/{dashed(name)}"


def cluster_file(name: str) -> str:
    """The cluster file, which the servers rewrite when coordinators change."""
    return f"{etc(name)}/fdb.cluster"


def dashed(name: str) -> str:
    """What a database's units and directories are called."""
    return "foundationdb" if name == DEFAULT else f"foundationdb-{name}"


def unit_name(name: str) -> str:
    """The unit of fdbmonitor."""
    return f"{dashed(name)}.service"


def connection(text: str) -> str:
    """The line of a cluster file that counts; empty when there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0] if lines and _CONNECTION.match(lines[0]) else ""


def coordinators_of(line: str) -> list[str]:
    """The coordinators that a connection string names."""
    match = _CONNECTION.match(line)
    return sorted(match.group(3).split(",")) if match else []


def exposed(mode: int) -> str:
    """Why a file's mode is too open; empty when it is not."""
    return "others can read it, and FoundationDB asks nobody who he is" if mode & 0o077 else ""


def binaries(host: Host, release: str) -> dict[str, str]:
    """Where a release has its programs: packages spread them over three directories."""
    places = ("bin", "usr/sbin", "usr/bin", "usr/lib/foundationdb", "usr/lib/foundationdb/backup_agent")
    found = {}
    for program in ("fdbmonitor", "fdbserver", "fdbcli", "fdbbackup", "fdbrestore", "backup_agent"):
        paths = [f"{release}/{place}/{program}" for place in places]
        found[program] = next((path for path in paths if host.exists(path)), f"{release}/bin/{program}")
    return found


def ports(conf: str) -> list[int]:
    """Ports of the servers that a foundationdb.conf names."""
    return [int(port) for port in re.findall(r"^\[fdbserver\.(\d+)\]", conf, re.MULTILINE)]


def _ipv4(text: str) -> bool:
    """FoundationDB takes no names, and 3FS no IPv6."""
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def check_layout(redundancy: str, coordinators: t.Sequence[str], machines: t.Sequence[str]) -> list[str]:
    """Machines and coordinators suffice for the redundancy; returns the coordinators in order.

    :param machines: the addresses of all hosts with servers
    """
    if redundancy not in NEEDS:
        raise Refused("redundancy", redundancy, "no such mode", f"One of {', '.join(NEEDS)}")
    need_machines, need_coordinators = NEEDS[redundancy]
    for index, address in enumerate(coordinators):
        host, _colon, port = str(address).rpartition(":")
        if not _ipv4(host) or not port.isdigit() or not 0 < int(port) < 65536:
            raise Refused(
                f"coordinators[{index}]",
                address,
                "not ADDRESS:PORT with an IPv4 address",
                "Write such as 10.0.0.1:4500",
            )
        if host not in machines:
            raise Refused(
                f"coordinators[{index}]",
                address,
                "no machine of the database has this address",
                f"One of {', '.join(machines)}",
            )
    for index, address in enumerate(machines):
        if not _ipv4(address):
            raise Refused(f"machines[{index}]", address, "not an IPv4 address", "Write such as 10.0.0.1")
    hosts = [str(address).rpartition(":")[0] for address in coordinators]
    if len(set(hosts)) < len(hosts):
        raise Refused(
            "coordinators",
            list(coordinators),
            "two are on one machine, which then counts twice in a vote",
            "One for each machine",
        )
    if len(set(machines)) < need_machines:
        raise Refused(
            "redundancy",
            redundancy,
            f"{len(set(machines))} machines are too few, it takes {need_machines}",
            "Add machines, or choose a lower mode",
        )
    if len(coordinators) < need_coordinators:
        raise Refused(
            "coordinators",
            list(coordinators),
            f"{redundancy} needs {need_coordinators}, these are {len(coordinators)}",
            "Name more machines",
        )
    if len(coordinators) % 2 == 0:
        raise Refused(
            "coordinators",
            list(coordinators),
            "an even number survives no more losses than one fewer",
            "Name an odd number",
        )
    return sorted(str(address) for address in coordinators)
