# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What microVMs are and cost, for ``microvm_info``.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_state as state_of
from ansible_collections.agentfleet.metal.plugins.module_utils import _network, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import NAME
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Looking, Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._proc import NOTHING, memory_of


class MicrovmInfo(Looking):
    """What microVMs are and cost, as a resource that never changes anything.

    :param names: only these; all that are declared when None
    :param console: whether the end of each console is wanted
    """

    def __init__(
        self, host: Host, names: t.Sequence[str] | None, agent_timeout_seconds: int, console: bool = False
    ) -> None:
        for index, name in enumerate(names or ()):
            if not NAME.fullmatch(name):
                raise Refused(
                    f"names[{index}]", name, "not a microVM's name", "Use up to 48 of a-z, 0-9 and inner hyphens"
                )
        if agent_timeout_seconds < 1:
            raise Refused(
                "agent_timeout_seconds", agent_timeout_seconds, "no agent answers in no time", "Use 1 or more"
            )
        self.host, self.names, self.agent_timeout_seconds, self.console = host, names, agent_timeout_seconds, console

    def observe(self) -> list[dict[str, t.Any]]:
        """Each microVM with its memory, counters, and its agent's answer."""
        specs = state_of.declared(self.host)
        names = list(specs) if self.names is None else [name for name in self.names if name in specs]
        units = state_of.unit_states(self.host, names)
        up = [name for name in names if units.get(name, {}).get("active") == "active"]
        running = {**{name: specs[name] for name in up}, **state_of.running(self.host, up)}
        inner = state_of.together(lambda name: self._inside(running[name]), up)
        # A running one is told as it runs: its image may be an older one than is declared.
        now: dict[str, t.Mapping[str, t.Any]] = {**specs, **running}
        return [
            self._one(name, now.get(name, {}), units.get(name, {}), inner.get(name, {}))
            for name in (self.names if self.names is not None else specs)
        ]

    def _inside(self, spec: _vmm.Spec) -> dict[str, t.Any]:
        """What the VMM and the guest tell; a paused guest tells nothing."""
        told: dict[str, t.Any] = {"counters": {}, "paused": False}
        try:
            with _vmm.driver(spec["driver"]).machine(self.host, spec) as machine:
                told["paused"] = machine.state() == "paused"
                told["counters"] = machine.counters()
        except state_of.NO_STATE:
            pass  # it is ending; the unit's state says so next time
        if self.console:
            told["console"] = state_of.console(self.host, spec["name"])
        if not told["paused"]:
            told["agent"] = state_of.ask_agent(self.host, spec, self.agent_timeout_seconds)
        return told

    def _one(
        self, name: str, spec: t.Mapping[str, t.Any], unit: t.Mapping[str, t.Any], inner: t.Mapping[str, t.Any]
    ) -> dict[str, t.Any]:
        state = state_of.public_state(unit) if spec else "absent"
        addresses = _network.addresses(spec.get("networks", []))
        pid = unit.get("pid", 0)
        found = {
            "name": name,
            "state": "paused" if inner.get("paused") else state,
            "failure": unit.get("result", "") if state == "failed" else "",
            "restarts": unit.get("restarts", 0),
            **{key: spec.get(key, "") for key in ("tenant", "driver", "image", "image_digest", "accelerator")},
            "pid": pid,
            **(memory_of(self.host, pid, _images(spec), _ram(spec)) if pid and spec else NOTHING),
            "memory_bytes": spec.get("memory_bytes", 0),
            "counters": inner.get("counters", {}),
            "ready": bool(inner.get("agent")),
            "agent": inner.get("agent") or {},
            "cid": spec.get("cid"),
            "address": addresses[0] if addresses else "",
            "addresses": addresses,
        }
        if self.console:
            found["console"] = inner.get("console", "")
        return found

    def result(self, observed: list[dict[str, t.Any]]) -> dict[str, t.Any]:
        """The microVMs as they were seen."""
        return {"instances": observed}


def _images(spec: t.Mapping[str, t.Any]) -> list[str]:
    return [spec["image_path"], *(image["path"] for image in spec.get("data_images", ()))]


def _ram(spec: t.Mapping[str, t.Any]) -> list[int]:
    """Sizes of a VMM's mappings of guest RAM: each zone, and all that can be plugged."""
    booted = [zone["size_bytes"] for zone in spec.get("memory_zones", ())]
    return [*booted, spec.get("memory_max_bytes", 0) - sum(booted)]
