# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Main configurations in the keeping of mgmtd: the first ones by init-cluster, later ones by set-config.

init-cluster writes to FoundationDB and needs no service; set-config needs a primary
mgmtd. Which of both is due, the cluster says itself: init-cluster refuses a second time.
"""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs import ETC, MANAGED, PROGRAMS, STATE, chunk_size
from ansible_collections.agentfleet.metal.plugins.module_utils._threefs_admin import STATUS, Admin, quote


class Published:
    """What mgmtd keeps, as steps for the resource of ``threefs_config``.

    :param root: layout of the root directory: ``chain_table``, ``chunk_size``, ``stripe``
    :param wait_seconds: how long to wait for a primary mgmtd; with 0, what it keeps is left for a later call
    """

    def __init__(self, host: Host, cluster: str, root: t.Mapping[str, t.Any], wait_seconds: int) -> None:
        self.host, self.cluster, self.wait_seconds = host, cluster, wait_seconds
        self.table = int(root.get("chain_table") or 1)
        self.chunk = chunk_size("root_layout.chunk_size", root.get("chunk_size") or "1MiB")
        self.stripe = int(root.get("stripe") or 16)
        if self.stripe < 1:
            raise Refused("root_layout.stripe", self.stripe, "not a number of chains", "At least 1")
        self.marker = f"{STATE}/{cluster}/initialized"

    def observe(self, predicting: bool) -> dict[str, t.Any]:
        """The kept texts by type; None where the cluster does not answer."""
        admin = Admin(self.host, self.cluster)
        marked = self.host.exists(self.marker)
        if not marked or not admin.ready:
            return {"initialized": marked, "kept": None}
        places = {kind: f"{STATE}/{self.cluster}/.kept-{kind}" for kind in MANAGED.values()}
        commands = [f"get-config -t {kind} -o {self.host.path(path)}" for kind, path in places.items()]
        if self.wait_seconds and not predicting:
            admin.run(*commands, timeout_seconds=self.wait_seconds)
            answered = True
        else:
            answers = admin.try_(*commands)
            answered = answers is not None and not any(answer.error for answer in answers)
        kept = {kind: self.host.text(path) for kind, path in places.items()} if answered else None
        for path in places.values():
            self.host.remove(path)
        return {"initialized": True, "kept": kept}

    def plan(self, observed: t.Mapping[str, t.Any], texts: t.Mapping[str, str]) -> list[Step]:
        """:param texts: service -> text that mgmtd shall keep"""
        if not observed["initialized"]:
            what = f"chain table {self.table}, chunks of {self.chunk} bytes, stripe {self.stripe}"
            return [Step("initialize", f"cluster {self.cluster}", after=what, data=("initialize",))]
        stale = [name for name, kind in MANAGED.items() if observed["kept"] and observed["kept"][kind] != texts[name]]
        return [
            Step(
                "publish",
                f"main configuration of {service}",
                before=_differing(observed, service, texts),
                after=_added(observed, service, texts),
                why="mgmtd keeps it and hands it out",
                data=("publish", service),
            )
            for service in stale
        ]

    def apply(self, data: tuple[str, ...]) -> None:
        """Carry out a step's data."""
        admin = Admin(self.host, self.cluster)
        files = {service: self.host.path(f"{ETC}/{self.cluster}/{PROGRAMS[service]}.toml") for service in MANAGED}
        if data[0] == "publish":
            service = data[1]
            admin.run(
                f"set-config --type {MANAGED[service]} --file {files[service]} --desc {quote('agentfleet.metal')}"
            )
            return
        options = " ".join(f"--{service} {path}" for service, path in files.items())
        answer = admin.run(
            f"init-cluster {options} {self.table} {self.chunk} {self.stripe}", allow={STATUS["Unknown"]}
        )[0]
        if answer.error and "existed" not in answer.text:
            raise HostError(f"admin_cli init-cluster: {answer.error}")
        self.host.write(self.marker, "Made by init-cluster; says that set-config is the way from now on.\n")


def _lines(text: str | None) -> list[str]:
    return (text or "").splitlines()


def _differing(observed: t.Mapping[str, t.Any], service: str, texts: t.Mapping[str, str]) -> str | None:
    kept = (observed["kept"] or {}).get(MANAGED[service])
    return "\n".join(line for line in _lines(kept) if line not in _lines(texts[service])) or None


def _added(observed: t.Mapping[str, t.Any], service: str, texts: t.Mapping[str, str]) -> str:
    kept = (observed["kept"] or {}).get(MANAGED[service])
    return "\n".join(line for line in _lines(texts[service]) if line not in _lines(kept)) if kept else "as rendered"
