# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""admin_cli of 3FS, with what it says taken seriously.

Commands go in on standard input: arguments would be seen in the process list and are
logged by admin_cli itself, and there are tokens among them. In that mode it always ends
with 0 and tells errors only in its text; ``verbose`` makes it repeat each command
before its output, which says to which command an error belongs.
"""

from __future__ import annotations

import re
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import (
    ETC,
    check_cluster,
    describe,
    token_uid,
)

_ERROR = re.compile(r"^Encounter error: (\d+)\(([^)]*)\)\s*(.*)", re.DOTALL | re.MULTILINE)
_MARK = "> Execute "
# The errors that are known here by their numbers; a test holds them against the record of upstream's.
STATUS = {
    "AuthenticationFail": 25,
    "Unknown": 999,
    "Transaction::NetworkError": 1004,
    "Transaction::Retryable": 1007,
    "RPC::Timeout": 2005,
    "RPC::SendFailed": 2007,
    "RPC::SocketError": 2010,
    "RPC::RequestRefused": 2012,
    "RPC::SocketClosed": 2013,
    "RPC::ConnectFailed": 2014,
    "Meta::NotFound": 3000,
    "Meta::Exists": 3007,
    "Storage::StorageUUIDMismatch": 4017,
    "Storage::TargetNotFound": 4031,
    "Mgmtd::NotPrimary": 5000,
    "Mgmtd::NodeNotFound": 5001,
    "Mgmtd::ClusterIdMismatch": 5003,
    "Mgmtd::NotAdmin": 5016,
    "Mgmtd::TargetNotFound": 5017,
    "Mgmtd::TargetExisted": 5018,
    "MgmtdClient::PrimaryMgmtdNotFound": 6000,
    "MgmtdClient::MetaServiceNotAvailable": 6002,
    "MgmtdClient::RoutingInfoNotReady": 6004,
    "StorageClient::CommError": 7006,
    "StorageClient::Timeout": 7008,
}
# What passes by itself: no primary yet, routing not ready, a connection that breaks, a service with more requests than it takes.
_TRANSIENT = {
    *(
        code
        for name, code in STATUS.items()
        if name.startswith(("Transaction::", "RPC::", "MgmtdClient::", "StorageClient::"))
    ),
    STATUS["Mgmtd::NotPrimary"],
}
_TOKEN = re.compile(r"[A-Za-z0-9+/]{24}")
_SECRET_WORD = re.compile(r"(--token|-t)\s+\S+")
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """What one command said."""

    command: str
    text: str

    @property
    def error(self) -> str:
        """The error in one line; empty when there is none."""
        found = _ERROR.search(self.text)
        return " ".join(f"{found.group(1)}({found.group(2)}) {found.group(3)}".split()) if found else ""

    @property
    def code(self) -> int:
        """The error's number; 0 when there is none."""
        found = _ERROR.search(self.text)
        return int(found.group(1)) if found else 0

    def table(self) -> list[dict[str, t.Any]]:
        """The rows of a table by its header. Columns of the same name become a list."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        if not lines:
            return []
        starts = [match.start() for match in re.finditer(r"(?<!\S)\S", lines[0])]
        names = lines[0].split()
        rows = []
        for line in lines[1:]:
            row: dict[str, t.Any] = {}
            for name, start, end in zip(names, starts, [*starts[1:], None]):
                cell = line[start:end].strip()
                if names.count(name) > 1:
                    row.setdefault(name, [])
                    row[name] += [cell] if cell else []
                else:
                    row[name] = cell
            rows.append(row)
        return rows

    def pairs(self) -> dict[str, str]:
        """The lines of two columns."""
        return {name: value for name, _space, value in (line.partition("  ") for line in self.text.splitlines())}


class Admin:
    """admin_cli of one cluster.

    :param token: acts under this token instead of the one in its file
    """

    def __init__(self, host: Host, cluster: str, token: str = "") -> None:
        self.host, self.cluster, self.token = host, check_cluster(cluster), token
        self.described = describe(host, cluster)

    @property
    def config(self) -> str:
        """The configuration that admin_cli is started with."""
        return f"{ETC}/{self.cluster}/admin_cli.toml"

    @property
    def ready(self) -> bool:
        """Whether this host has the cluster's configuration and its programs."""
        return self.described is not None and self.host.exists(f"{self.described['binaries']}/admin_cli")

    def usable(self, predicting: bool) -> bool:
        """Whether the cluster can be asked; refused on a host that is none of its admin hosts, unless predicting."""
        if not self.ready and not predicting:
            self.refuse_unready()
        return self.ready and not (predicting and self.try_("list-nodes") is None)

    def refuse_unready(self) -> None:
        """The refusal of a host that is no admin host of the cluster."""
        raise Refused(
            "cluster",
            self.cluster,
            "this host has no admin_cli with a configuration of it",
            "Run this on a host that role threefs has configured, such as the first mgmtd",
        )

    def batch(self, commands: t.Sequence[str], timeout_seconds: float = 600) -> list[Answer]:
        """Run commands that do not depend on each other; each has its own answer."""
        if not commands:
            return []
        if self.described is None:
            self.refuse_unready()
            return []
        argv = [f"{self.described['binaries']}/admin_cli", "-cfg", self.host.path(self.config)]
        argv += ["--config.verbose", "true"]
        lines = [f"user-switch -t {self.token}"] if self.token else []
        lines += commands
        done = self.host.run(argv, stdin="\n".join(lines) + "\n", timeout_seconds=timeout_seconds, check=False)
        parts = re.split(rf"^{re.escape(_MARK)}", done.stdout, flags=re.MULTILINE)[1:]
        answers = [Answer(*_head(part)) for part in parts]
        if done.rc != 0 or [answer.command for answer in answers] != lines:
            said = hide(" ".join((done.stdout + " " + done.stderr).split()))[-500:]
            raise HostError(
                f"admin_cli of {self.cluster} ended with {done.rc} after {len(answers)} of {len(lines)} commands: {said}"
            )
        return answers[len(lines) - len(commands) :]

    def run(
        self, *commands: str, timeout_seconds: float = TIMEOUT_SECONDS, allow: t.Collection[int] = ()
    ) -> list[Answer]:
        """Run commands; what is transient is tried again within bounds, any other error is raised.

        :param allow: error numbers that the caller handles
        """
        end = time.monotonic() + timeout_seconds
        waiting = list(commands)
        answers: dict[str, Answer] = {}
        while True:
            for answer in self.batch(waiting):
                answers[answer.command] = answer
            bad = [answers[command] for command in waiting if answers[command].code not in {0, *allow}]
            for answer in bad:
                if answer.code not in _TRANSIENT or time.monotonic() >= end:
                    raise HostError(f"admin_cli {hide(answer.command)}: {hide(answer.error)}{_remedy(answer.code)}")
            if not bad:
                return [answers[command] for command in commands]
            waiting = [answer.command for answer in bad]
            time.sleep(1)

    def try_(self, *commands: str) -> list[Answer] | None:
        """Run commands that only look; None when the cluster does not answer (yet)."""
        try:
            answers = self.batch(list(commands), timeout_seconds=60)
        except HostError:
            return None
        return None if any(answer.code in _TRANSIENT for answer in answers) else answers


def _head(part: str) -> tuple[str, str]:
    command, _newline, text = part.partition("\n")
    return command, text


def hide(text: str) -> str:
    """A text without tokens: those of commands, and those that user-switch and user-list show."""
    text = _SECRET_WORD.sub(r"\1 (hidden)", text)
    return _TOKEN.sub(lambda match: match[0] if token_uid(match[0]) is None else "(hidden)", text)


_REMEDIES = {
    "AuthenticationFail": "The token in admin_cli.toml is not the one that the cluster knows: see docs/runbooks/threefs.md, Tokens",
    "Transaction::NetworkError": "FoundationDB does not answer: fdbcli --exec 'status' on its hosts",
    "Storage::StorageUUIDMismatch": "The disk is not the one that the target was made on: see Replace a disk",
    "Mgmtd::NotPrimary": "Only secondary mgmtd answer: is the one with the lease running?",
    "Mgmtd::ClusterIdMismatch": "The mgmtd at this address belongs to another cluster: check threefs_ports and the addresses",
    "Mgmtd::NotAdmin": "The user of this token is no admin",
    "MgmtdClient::PrimaryMgmtdNotFound": "No mgmtd is primary: is one running, and FoundationDB available?",
    "MgmtdClient::RoutingInfoNotReady": "No mgmtd answers: check its address, the firewall (TCP on the RDMA port too) and the RDMA device",
}


def _remedy(code: int) -> str:
    return next((f". {remedy}" for name, remedy in _REMEDIES.items() if STATUS[name] == code), "")


def quote(text: str) -> str:
    """A word as admin_cli's own parser takes it."""
    if re.fullmatch(r"[\w./:@,+-]+", text):
        return text
    if "'" in text:
        raise Refused("text", text, "admin_cli cannot be given a single quote", "Leave it out")
    return f"'{text}'"
