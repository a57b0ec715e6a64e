# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""MicroVMs: plan and life cycle under systemd.

This module is private to the collection and imports nothing of Ansible.

A wish (``_microvm_spec``) and what the host has become a *spec* (``_microvm_resolve``), stored as ``spec.json``.
Files, unit and command line follow from the spec alone. A microVM that starts takes a copy of it with it, and what
is applied while it runs is written there; so what runs is compared with what is declared without asking it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import typing as t
from dataclasses import replace

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_data, _network, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_resolve as resolve
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_spec as wishes
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_state as state_of
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_units as units
from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_volumes as volumes
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host, sync
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    HOME,
    LIBRARY,
    LOCK,
    LOCK_SECONDS,
    NAME,
    RESERVED,
    RUN,
    SHARES,
    SYSTEM,
    VOLUMES,
    cgroup,
    pending,
    run_directory,
    running_spec,
    slot,
    unit,
    volume_path,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_unit import uptime
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, ItemsFailed, Refused, Step


class State(t.NamedTuple):
    """What a state means: whether the microVM exists, runs (None: as it is), and its CPUs stand still."""

    exists: bool
    runs: bool | None = None
    paused: bool = False


STATES = {
    "present": State(True),
    "running": State(True, True),
    "paused": State(True, True, True),
    "stopped": State(True, False),
    "restarted": State(True, True),
    "absent": State(False, False),
}
RELOAD_SECONDS = 300  # takes a minute on a crowded emulated host
START_SECONDS = 900  # others may boot before
TAPS_SECONDS = 180  # of which it may wait a minute for others
LOOK_SECONDS = 5  # between two questions to systemd while guests boot
ATTACH_SECONDS = 60  # until a guest uses what was attached; its agent gives up after 45
ENDED = "it ended while this was done. See whether systemd starts it, and run this again"
OVERHEAD = 192 << 20  # of a VMM besides guest RAM and privately written image pages


class MicroVms:
    """The microVMs of one call.

    :param params: as the module documents them
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.params = params
        if params["state"] not in STATES:
            raise Refused("state", params["state"], "not a state", f"Use one of {', '.join(STATES)}")
        self.state = STATES[params["state"]]
        if params["accelerator"] not in ("auto", "kvm", "tcg"):
            raise Refused("accelerator", params["accelerator"], "not an accelerator", "Use auto, kvm or tcg")
        for option, least in (("parallel", 0), ("ready_timeout_seconds", 1)):
            if params[option] < least:
                raise Refused(option, params[option], "too small", f"Give at least {least}")
        if params["memory_overcommit"] <= 0:
            raise Refused("memory_overcommit", params["memory_overcommit"], "not positive", "1.0 means no overcommit")
        if params["delete_volumes"] and self.state.exists:
            raise Refused("delete_volumes", True, f"not with state {params['state']}", "Use it with state absent")
        self.networks = _network.Networks(params["networks"])
        self.wanted: dict[str, dict[str, t.Any]] = {}
        for option, item in wishes.expanded(params["instances"]):
            name = item["name"]
            if not NAME.fullmatch(name):
                raise Refused(
                    f"{option}.name", name, "not a name of a microVM",
                    "Use 1 to 48 of a-z, 0-9 and hyphen, beginning and ending with a letter or digit",
                )  # fmt: skip
            if name in RESERVED and self.state.exists:
                raise Refused(
                    f"{option}.name", name, f"{run_directory(name)} is a directory of all microVMs",
                    "Choose another name; one that is there already is removed with state absent",
                )  # fmt: skip
            if name in self.wanted:
                raise Refused(f"{option}.name", name, "named twice", "Give each microVM its own name")
            self.wanted[name] = wishes.wish(option, item, self.networks) if self.state.exists else {"name": name}
        self._unique("cid", lambda item: [item["cid"]], "Give another cid, or leave it out to have one derived")
        self._unique(
            "networks", lambda item: [n["address"] for n in item["networks"] if n["address"]], "Give another address"
        )
        self.warnings: list[str] = []
        self.specs: dict[str, _vmm.Spec] = {}
        self.errors: dict[str, str] = {}
        self.made: set[str] = set()  # volumes of this call, which go with a first start that fails

    def _unique(self, key: str, values: t.Callable[[t.Mapping[str, t.Any]], list[t.Any]], remedy: str) -> None:
        seen: dict[t.Any, str] = {}
        for item in self.wanted.values() if self.state.exists else ():
            for value in values(item):
                if value in seen:
                    raise Refused(f"{item['option']}.{key}", value, f"{seen[value]} has it too", remedy)
                seen[value] = item["name"]

    # -- observe -------------------------------------------------------------

    def alone(self) -> t.ContextManager[None]:
        """What is planned (addresses, who is the last) holds while it is carried out."""
        return self.host.lock(LOCK, LOCK_SECONDS)

    def observe(self) -> dict[str, t.Any]:
        """Specs, units and images of the host."""
        specs = state_of.declared(self.host)
        names = sorted(set(specs) | set(self.wanted))
        enabled = f"{SYSTEM}/agentfleet-microvms.target.wants"
        found = state_of.unit_states(self.host, names)
        up = [name for name in self.wanted if found.get(name, {}).get("active") == "active"]
        live = state_of.running(
            self.host, [n for n, one in found.items() if one["active"] not in ("inactive", "failed")]
        )
        running = {name: live[name] for name in up if name in live}
        stops = self.params["state"] in ("restarted", "stopped") or self.params["allow_restart"]
        paused = state_of.paused(self.host, running) if self.state.exists else set()
        return {
            **resolve.observe(self.host),
            "specs": specs,
            "units": found,
            "running": running,
            # Who runs while others start: nobody can have a cid, an address or a MAC that it runs with.
            "held": {name: spec for name, spec in live.items() if not (stops and name in self.wanted)},
            "paused": paused,
            "booting": self._booting({name: spec for name, spec in running.items() if name not in paused}),
            "enabled": {name for name in names if self.host.exists(f"{enabled}/{unit(name)}")},
            "volumes": {name: volumes.there(self.host, name) for name in self.wanted},
            "modules": {line.split()[0] for line in self.host.read("/proc/modules").splitlines()},
            "target": self.host.exists(f"{SYSTEM}/multi-user.target.wants/agentfleet-microvms.target"),
        }

    def _booting(self, running: t.Mapping[str, _vmm.Spec]) -> set[str]:
        """Those that run and are not ready: whoever started them was interrupted, or the host boots.

        After the time that a guest has to get ready, it does not boot any more, whatever its agent does.
        """
        since = {name: self.host.read_int(slot(name)) for name in running}
        latest = uptime(self.host) - self.params["ready_timeout_seconds"]
        names = [name for name, begun in since.items() if begun is not None and begun > latest]
        told = state_of.together(lambda name: state_of.ask_agent(self.host, running[name]), names)
        return {name for name in names if not told[name]}

    # -- plan ----------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Definitions, then what stops, changes and starts; everything is resolved and checked first."""
        if not self.state.exists:
            return self._plan_absent(observed)
        resolver = resolve.Resolver(self.host, self.params, self.wanted, observed, self.predicting, self.warnings)
        self.specs = resolver.specs(self.networks)
        steps = self._plan_common(observed)
        unread = bool(steps) or self.host.exists(pending("reload"))
        afterwards: list[str] = []  # until systemd has the new command line, a start goes by the old one and its files
        for name, spec in self.specs.items():
            steps += volumes.plan(self.host, spec)
            files = self._files(spec)
            stale, left_over = self._stale(files), [path for path in self._own_files(name) if path not in files]
            if stale or left_over:
                unread = True
                afterwards += left_over
                steps.append(
                    Step("define", f"microVM {name}", observed["specs"].get(name), spec, data=(name, stale, []))
                )
        if unread:
            steps.append(Step("reload", "systemd", why="units were written", data=afterwards))
        specs = {**observed["specs"], **self.specs}
        interfaces = [one for spec in specs.values() for one in spec["networks"]]
        steps += self.networks.plan(self.host, interfaces)
        steps += self._plan_enabled(observed)
        running = self._plan_running(observed)
        return steps + running + self._plan_unused(running, {one["bridge"] for one in interfaces})

    def _plan_common(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        modules = ["vhost_vsock", "tun", "bridge"]
        if observed["virtualization"] and self.params["accelerator"] != "tcg":
            modules.append("kvm_amd" if re.search(r"\bsvm\b", self.host.read("/proc/cpuinfo")) else "kvm_intel")
        stale = self._stale(units.common(modules, self.params["parallel"]))
        release = self.host.read("/proc/sys/kernel/osrelease")
        built_in = self.host.read(f"/lib/modules/{release}/modules.builtin").replace("-", "_")
        absent = [m for m in modules if m not in observed["modules"] and f"/{m}.ko" not in built_in]
        if not stale and not absent:
            return []
        after = {"files": sorted(stale), "modules": absent}
        return [Step("prepare", "host for microVMs", after=after, data=(stale, absent))]

    def _plan_enabled(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        on, off = [], []
        for name, spec in self.specs.items():
            runs = self.state.runs
            if runs is None:
                runs = state_of.public_state(observed["units"].get(name)) != "stopped"
            enabled = name in observed["enabled"]
            if spec["autostart"] and runs and not enabled:
                on.append(name)
            elif enabled and not (spec["autostart"] and runs):
                off.append(name)
        steps = []
        if on or (not observed["target"] and observed["enabled"] - set(off)):
            steps.append(Step("enable", "microVMs at boot", after=on, data=on))
        if off:
            steps.append(Step("disable", "microVMs at boot", before=off, data=off))
        return steps

    def _plan_running(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        states = {name: state_of.public_state(observed["units"].get(name)) for name in self.specs}
        if self.state.runs is False:
            stop = [name for name in self.specs if states[name] != "stopped"]
            return [Step("stop", "microVMs", before=stop, disruptive=True, data=stop)] if stop else []
        up = [name for name in self.specs if states[name] not in ("stopped", "failed")]
        stop, why, steps = [], "", []
        if self.params["state"] == "restarted":
            stop, why = up, "as asked for"
        elif self.params["allow_restart"]:
            stop, why = [name for name in up if self._differences(name, observed)[1]], "their definition changed"
        if stop:
            steps.append(Step("stop", "microVMs", before=stop, why=why, disruptive=True, data=stop))
        standing = [name for name in self.specs if name in observed["paused"] and name not in stop]
        if self.state.runs and not self.state.paused and standing:
            steps.append(Step("resume", "microVMs", after=standing, data=standing))
            standing = []
        changes, after = {}, {}
        for name in up:
            live = [] if name in stop else self._differences(name, observed)[0]
            if name in standing:
                self._check_still(name, live)
            left = name in observed["running"] and name not in (*stop, *standing)
            untold = _vmm.untold(observed["running"][name]) if left else []
            if live or untold:
                changes[name] = live, name not in standing
                after[name] = [*map(str, live), *(f"{what} taken into use" for what in untold)]
        if changes:
            steps.append(Step("change", "microVMs", after=after, why="while they run", data=changes))
        ready = [name for name in up if states[name] == "running" and name not in observed["booting"]]
        start = [name for name in self.specs if (name not in ready and self.state.runs) or name in stop]
        if start:
            for name in start:
                self._check_host(name)
            there = {name for name in start if states[name] == "running" and name not in stop}
            fresh = {name for name in start if name not in observed["specs"]} - there
            steps.append(Step("start", "microVMs", after=start, data=(start, fresh, there)))
        still = [name for name in self.specs if name not in observed["paused"] or name in start]
        if self.state.paused and still:
            steps.append(Step("pause", "microVMs", after=still, data=still))
        return steps

    def _plan_unused(self, running: t.Sequence[Step], bridges: set[str]) -> list[Step]:
        """Last, the policies of networks that no microVM is on any more; one that waits for its restart keeps its own.

        :param running: the steps about what runs
        :param bridges: of what is declared
        """
        stopped = {name for step in running if step.verb == "stop" for name in step.data}
        left = {
            (name, change.before["bridge"])
            for step in running if step.verb == "change"
            for name, (changes, _tell) in step.data.items()
            for change in changes if change.key == "networks" and change.after is None
        }  # fmt: skip
        stay = {bridge for name, bridge in _network.attached(self.host) - left if name not in stopped}
        unused = _network.unused_policies(self.host, bridges | stay)
        if not unused:
            return []
        return [Step("define", "networks", before=unused, why="no microVM uses them", data=("", {}, unused))]

    def _check_still(self, name: str, live: list[_vmm.Change]) -> None:
        """A guest that stands still lets nothing go, and takes no memory."""
        for change in live:
            if _vmm.needs_guest(change):
                raise Refused(
                    f"{self.wanted[name]['option']}.{change.key.replace('_bytes', '')}", change.item or change.after,
                    f"microVM {name} is paused, and lets nothing go and takes no memory until it runs ({change})",
                    "Resume it with state running, which changes it, too; or restart it with state restarted",
                )  # fmt: skip

    def _differences(
        self, name: str, observed: t.Mapping[str, t.Any]
    ) -> tuple[list[_vmm.Change], list[tuple[_vmm.Change | None, str]]]:
        """What a running microVM can be given as it runs, and what needs a restart and why."""
        running = observed["running"].get(name)
        if running is None:
            active = observed["units"].get(name, {}).get("active") == "active"
            return [], [(None, "it was started without a record of how")] if active else []
        spec, live = self.specs[name], []
        reasons: list[tuple[_vmm.Change | None, str]] = []
        if running["driver"] != spec["driver"]:
            return [], [(None, f"another driver: {running['driver']}")]
        driver = _vmm.driver(running["driver"])
        for change in _vmm.changes(running, spec):
            reason = "" if change.key == "resources" else driver.restart_reason(change, running)
            if reason:
                reasons.append((change, reason))
            else:
                live.append(change)
        return live, reasons

    def _check_host(self, name: str) -> None:
        item, spec = self.wanted[name], self.specs[name]
        problems = [("driver", item["driver"], _vmm.driver(spec["driver"]).problem(self.host, spec["program"]))]
        if spec["networks"]:
            problems.append(("networks", spec["networks"][0]["network"], _network.problem(self.host)))
        images = [("image", spec["image"], spec["image_path"], spec["image_bytes"])]
        images += [
            (f"data_images[{index}].image", wish["image"], image["path"], image["size_bytes"])
            for index, (wish, image) in enumerate(zip(item["data_images"], spec["data_images"]))
        ]
        damage = "its file in the host's store is missing or damaged", "Bring it again with image_store"
        for option, asked, path, size in images:
            if size and resolve.size_of(self.host, path) != size:
                problems.append((option, asked, damage))
        for option, value, found in problems:
            if found and self.predicting:
                self.warnings.append(f"{found[0]}; an earlier task is expected to correct it")
            elif found:
                raise Refused(f"{item['option']}.{option}", value, *found)

    def _plan_absent(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        known = set(observed["specs"]) | observed["enabled"]
        gone = [
            name for name in self.wanted
            if name in known or observed["units"].get(name, {}).get("active") not in (None, "inactive")
        ]  # fmt: skip
        last = not set(observed["specs"]) - set(gone)
        common = [path for path in units.common([]) if self.host.exists(path)] if last else []
        steps = []
        if gone or common:
            slices = self._slices(observed["specs"], gone) + (["agentfleet-microvms.target"] if last else [])
            before = {name: observed["specs"].get(name) for name in gone}
            steps.append(Step("remove", "microVMs", before, disruptive=True, data=(gone, slices, common)))
        lost = {name: found for name, found in observed["volumes"].items() if found}
        if lost and self.params["delete_volumes"]:
            steps.append(Step("delete", "volumes of microVMs", lost, disruptive=True, data=list(lost)))
        return steps

    @staticmethod
    def _slices(specs: t.Mapping[str, _vmm.Spec], gone: t.Collection[str]) -> list[str]:
        """What is empty when some microVMs have gone: slices of their tenants, and with the last the one above."""
        left = {spec["tenant"] for name, spec in specs.items() if name not in gone}
        tenants = {spec["tenant"] for name, spec in specs.items() if name in gone} - left
        return [f"agentfleet-{tenant}.slice" for tenant in sorted(tenants)] + ([] if left else ["agentfleet.slice"])

    # -- files ---------------------------------------------------------------

    def _files(self, spec: _vmm.Spec) -> dict[str, tuple[str, int]]:
        argv = _vmm.driver(spec["driver"]).command(spec)
        texts = {
            "drop_in": units.drop_in(spec, argv, self._memory_max(spec)),
            spec["config"]: _microvm_data.config(spec),
        }
        if spec["data"]:
            texts[spec["data"]] = self.wanted[spec["name"]]["user_data"]
        return units.files_of(spec, texts)

    @staticmethod
    def _memory_max(spec: _vmm.Spec) -> int:
        """What a VMM can need: guest RAM, image pages that the guest writes, and itself."""
        return spec["memory_max_bytes"] + _vmm.images_bytes(spec) + OVERHEAD

    def _stale(self, files: t.Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
        return {p: f for p, f in files.items() if not self.host.exists(p) or self.host.read(p) != f[0].strip()}

    def _own_files(self, name: str) -> list[str]:
        return [
            *(f"{HOME}/{name}/{file}" for file in self.host.names(f"{HOME}/{name}")),
            *(f"{SHARES}/{file}" for file in self.host.names(SHARES) if file.startswith(f"{name}:")),
        ]

    # -- apply ---------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        getattr(self, f"_apply_{step.verb}")(step.data)

    def _write(self, files: t.Mapping[str, tuple[str, int]], *readers: str) -> None:
        """Write files, and that their readers (verbs of steps) have to read them."""
        for verb in readers if files else ():
            self.host.write(pending(verb), "")
        for path, (text, mode) in files.items():
            self.host.write(path, text, mode)

    def _filter(self) -> list[str]:
        """Who has to read rules and policies: the packet filter, which the first microVM's start loads."""
        return ["load"] if _network.in_use(self.host) else []

    def _apply_prepare(self, data: tuple[dict[str, tuple[str, int]], list[str]]) -> None:
        self._write(data[0], "reload", *(self._filter() if f"{LIBRARY}/network.nft" in data[0] else []))
        if data[1]:
            self.host.run(["modprobe", "-a", *data[1]])
        if data[1] and data[1][-1].startswith("kvm_") and not self.host.exists("/dev/kvm"):
            raise HostError(
                "the CPU has virtualization but there is no /dev/kvm. Enable it in the firmware, or use accelerator tcg"
            )

    def _apply_create(self, data: tuple[str, int, str]) -> None:
        volumes.create(self.host, *data)
        self.made.add(data[0])

    def _apply_grow(self, data: tuple[str, int, str]) -> None:
        volumes.grow(self.host, *data[:2])

    def _apply_define(self, data: tuple[str, dict[str, tuple[str, int]], list[str]]) -> None:
        name, files, left_over = data
        gone = left_over if name or not left_over else self._unused_policies()
        for path in left_over:
            if path in gone:  # what was to leave a network may not have done it
                self.host.remove(path)
        self._write(files, *(["reload"] if name else self._filter()))

    def _apply_reload(self, afterwards: list[str]) -> None:
        self.host.run(["systemctl", "daemon-reload"], timeout_seconds=RELOAD_SECONDS)
        for path in afterwards:
            self.host.remove(path)
        self.host.remove(pending("reload"))

    def _apply_load(self, _data: None) -> None:
        self._run_taps("load")
        self.host.remove(pending("load"))

    def _apply_enable(self, names: list[str]) -> None:
        # Links for the next boot; nothing of the running systemd depends on them.
        self.host.run(
            ["systemctl", "enable", "--quiet", "--no-reload", "agentfleet-microvms.target", *map(unit, names)]
        )

    def _apply_disable(self, names: list[str]) -> None:
        self.host.run(["systemctl", "disable", "--quiet", "--no-reload", *map(unit, names)])

    def _apply_stop(self, names: list[str]) -> None:
        # One job for all: each climbs down its ladder at the same time.
        self.host.run(["systemctl", "stop", *map(unit, names)], timeout_seconds=units.STOPPED_SECONDS)
        self.host.run(["systemctl", "reset-failed", *map(unit, names)], check=False)

    def _apply_pause(self, names: list[str]) -> None:
        self._each(names, lambda running: self._ask(running, "pause"))

    def _apply_resume(self, names: list[str]) -> None:
        self._each(names, lambda running: self._ask(running, "resume"))

    def _apply_change(self, data: dict[str, tuple[list[_vmm.Change], bool]]) -> None:
        self._each(list(data), lambda running: self._change(running, *data[running["name"]]), self._parallel())

    def _each(
        self, names: t.Iterable[str], call: t.Callable[[_vmm.Spec], None], at_most: int = state_of.AT_MOST
    ) -> None:
        """Do something to each of those that run and have not failed before, several at the same time."""

        def one(name: str) -> str:
            try:
                call(self._running(name))
            except state_of.NO_STATE as error:
                return str(error) or type(error).__name__
            return ""

        names = [name for name in names if name not in self.errors]
        self._report({name: why for name, why in state_of.together(one, names, at_most).items() if why})

    def _ask(self, running: _vmm.Spec, verb: str) -> None:
        with self._machine(running) as machine:
            getattr(machine, verb)()

    @contextlib.contextmanager
    def _machine(self, running: _vmm.Spec) -> t.Iterator[_vmm.Machine]:
        with contextlib.ExitStack() as stack:
            try:
                machine = stack.enter_context(_vmm.driver(running["driver"]).machine(self.host, running))
            except (FileNotFoundError, ConnectionRefusedError) as error:  # a VMM listens as long as it lives
                raise HostError(ENDED) from error
            yield machine

    def _parallel(self) -> int:
        """How many guests work at the same time; more than there are CPUs only take the CPUs from each other."""
        return int(self.params["parallel"] or os.cpu_count() or 1)

    def _running(self, name: str) -> _vmm.Spec:
        """What a microVM runs with, which may have ended since it was seen."""
        found = state_of.running(self.host, [name])
        if not found:
            raise HostError(ENDED)
        return found[name]

    def _report(self, failed: dict[str, str]) -> None:
        """Fail if any microVM did, with each one's reason."""
        self.errors.update(failed)
        if failed:
            raise ItemsFailed("; ".join(f"microVM {name}: {why}" for name, why in failed.items()))

    # -- apply: what runs is changed -----------------------------------------------

    def _change(self, running: _vmm.Spec, changes: list[_vmm.Change], tell: bool) -> None:
        """Removals come before additions; what is behind a device on the host goes after it and comes before it.

        :param tell: whether the guest can be told, which it cannot while it stands still
        """
        name, short = running["name"], []
        for wished in changes:
            change = wished
            if change.key in ("shares", "data_images") and change.after is None:
                self._unmount(running, change)
            self._before(name, change, running)
            if change.key == "resources":
                self._limit(name)
            else:
                try:
                    with self._machine(running) as machine:
                        machine.change(change, self.specs[name])
                        machine.settle(change)
                except _vmm.Unfinished as unfinished:  # the rest does not depend on it
                    change = replace(change, after=unfinished.reached)
                    short.append(str(unfinished))
            running = _vmm.applied(running, change)
            self._record(running)  # at once: whoever is interrupted here goes on with the next change
            self._after(name, change, running)
        untold = ", ".join(_vmm.untold(running))
        if untold and tell:
            short += self._tell(running, untold)
        elif untold:
            self.warnings.append(f"microVM {name} is paused: a call with state running has it use {untold}")
        if short:
            raise HostError("; ".join(short))

    def _record(self, running: _vmm.Spec) -> None:
        self.host.write(running_spec(running["name"]), json.dumps(running, indent=2, sort_keys=True) + "\n", 0o600)

    def _tell(self, running: _vmm.Spec, untold: str) -> list[str]:
        """Let the guest use CPUs, networks, images, shares and room on volumes that are new; its kernel only sees them.

        Returns what is wrong; then the next run tells it again.
        """
        order = {one["network"]: number for number, one in enumerate(self.specs[running["name"]]["networks"])}
        # The first that is declared has the way out.
        networks = sorted(running["networks"], key=lambda one: order.get(one["network"], len(order)))
        new = _vmm.untold_of("networks", running)
        message = {
            "cpus": running["vcpus"] if "vcpus" in _vmm.untold(running) else 0,
            "networks": [line for one, line in zip(networks, _network.guest_lines(networks)) if one in new],
            "images": _microvm_data.image_lines(_vmm.untold_of("data_images", running)),
            "shares": _microvm_data.share_lines(_vmm.untold_of("shares", running)),
            "volumes": _microvm_data.grown_lines(_vmm.untold_of("volumes", running)),
        }
        told = state_of.ask_agent(self.host, running, ATTACH_SECONDS, "/attached", message) or {"error": "no answer"}
        if "error" in told:
            return [f"its agent does not use {untold}: {told['error']}. Run this again"]
        self._record(t.cast("_vmm.Spec", {**running, "untold": []}))
        return []

    def _unmount(self, running: _vmm.Spec, change: _vmm.Change) -> None:
        """Have an image or a share unmounted before it goes: a guest that uses it keeps it."""
        message = {"targets": [change.before["target"]]}
        told = state_of.ask_agent(self.host, running, ATTACH_SECONDS, "/detaching", message) or {"error": "no answer"}
        if "error" in told:
            raise HostError(
                f"microVM {running['name']}: its agent does not let go of {change.key} {change.item}: {told['error']}. "
                "End what uses it there, and run this again"
            )

    def _taps(self, running: _vmm.Spec) -> None:
        """Give a microVM the taps of what runs, which is not all that is declared: the rest waits for its restart."""
        directory = f"{RUN}/{running['name']}.change"
        for path, (text, mode) in _network.files_of(f"{directory}/taps", running["networks"]).items():
            self.host.write(path, text, mode)
        try:
            self._run_taps("up", running["name"], f"{directory}/taps")
        finally:
            shutil.rmtree(self.host.path(directory))

    def _run_taps(self, *arguments: str) -> None:
        """It waits for its turn, and is not ended in the middle of it."""
        self.host.run([f"{LIBRARY}/microvm-taps", *arguments], timeout_seconds=TAPS_SECONDS)

    def _limit(self, name: str) -> None:
        """Apply the limits of the drop-in to the control group; reloading systemd alone does not."""
        settings = units.limits(self.specs[name], self._memory_max(self.specs[name]))
        self._set(name, *(f"{key}={value}" for key, value in settings.items()))

    def _set(self, name: str, *assignments: str) -> None:
        self.host.run(["systemctl", "set-property", "--runtime", unit(name), *assignments])
        # It also writes them down for later, where they would hide what the drop-in says then.
        shutil.rmtree(self.host.path(f"/run/systemd/system.control/{unit(name)}.d"), ignore_errors=True)

    def _before(self, name: str, change: _vmm.Change, running: _vmm.Spec) -> None:
        if change.before is not None:
            return
        if change.key == "networks":
            self._taps(_vmm.applied(running, change))
        if change.key == "volumes":
            volumes.give(self.host, name, volume_path(name, change.item))
        elif change.key == "shares":
            self.host.run(["systemctl", "start", f"agentfleet-virtiofsd@{name}:{change.item}.socket"])
        elif change.key == "data_images":
            self._limit(name)  # the guest may write as many pages of its own
        elif change.key == "devices":
            owner = os.stat(self.host.path(run_directory(name))).st_uid
            self._given(name, lambda given: given | {change.item})  # also if the VMM does not answer in time
            # Its unit says so, too; but where vfio was not loaded when it started, that gave no device number.
            self._set(name, "DeviceAllow=char-vfio rw")
            os.chown(self._vfio_node(change.item), owner, -1)

    def _after(self, name: str, change: _vmm.Change, running: _vmm.Spec) -> None:
        if change.key == "networks" and change.after is None:
            self._taps(running)
        if change.key == "devices" and change.after is None:
            os.chown(self._vfio_node(change.item), 0, -1)
            self._given(name, lambda given: given - {change.item})
        elif change.key == "data_images" and change.after is None:
            self._limit(name)
        elif change.key == "shares" and change.after is None:
            service = f"agentfleet-virtiofsd@{name}:{change.item}"
            self.host.run(["systemctl", "stop", f"{service}.socket", f"{service}.service"])

    def _given(self, name: str, now: t.Callable[[set[str]], set[str]]) -> None:
        """Write down which devices microvm-end takes back."""
        path = f"{RUN}/{name}.devices"
        self.host.write(path, "".join(f"{address}\n" for address in sorted(now(set(self.host.read(path).split())))))

    def _vfio_node(self, address: str) -> str:
        return self.host.path("/dev/vfio/" + self.host.link_name(f"/sys/bus/pci/devices/{address}/iommu_group"))

    # -- apply: start ----------------------------------------------------------------

    def _apply_start(self, data: tuple[list[str], set[str], set[str]]) -> None:
        names, fresh, there = data
        failed = self._start(names, there)
        new = sorted(fresh & set(failed))
        if new:  # a start that failed leaves nothing behind, and of what was there before takes nothing
            self.errors.update(failed)  # also if one of them does not stop
            self._apply_remove((new, self._slices(state_of.declared(self.host), new), []))
        self._report(failed)

    def _start(self, names: list[str], there: t.Collection[str]) -> dict[str, str]:
        """Start microVMs and wait for their agents, so many at a time; name -> why it failed (then it is stopped).

        A booted guest is idle. What starts at the same time is started by one command.

        :param there: what ran before; it is only waited for, and not stopped: nobody knows what it has in its memory
        """
        parallel = self._parallel()
        self.host.run(["systemctl", "reset-failed", *map(unit, names)], check=False)
        waiting, booting, failed = list(names), {}, {}  # type: list[str], dict[str, float], dict[str, str]
        looked = 0.0
        while waiting or booting:
            wave = waiting[: parallel - len(booting)]
            if wave:
                del waiting[: len(wave)]
                self.host.run(["systemctl", "start", *map(unit, wave)], timeout_seconds=START_SECONDS, check=False)
                booting.update({name: time.monotonic() + self.params["ready_timeout_seconds"] for name in wave})
            asked = state_of.together(self._answer, list(booting))
            silent = [name for name, told in asked.items() if not told]
            outcomes = {name: "" for name in asked if name not in silent}
            for name in outcomes:
                if failing := (asked[name] or {}).get("first_boot_failed"):
                    self.warnings.append(
                        f"microVM {name} runs, but of its first boot {failing!r:.200} failed, which runs again when it "
                        "starts again. Its console says why (microvm_info with console)"
                    )
            vanished = [name for name in silent if not self._processes(self.specs[name]["tenant"], name)]
            if vanished and time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                outcomes.update(self._ended(vanished))
            for name in silent:
                if time.monotonic() > booting[name]:
                    waited = self.params["ready_timeout_seconds"]
                    outcomes.setdefault(name, f"no answer from its agent within {waited} seconds")
            for name, why in outcomes.items():
                del booting[name]
                self.host.remove(slot(name))
                if why:
                    failed[name] = self._give_up(name, why, stop=name not in there)
            if booting and not outcomes:
                time.sleep(0.3)
        return failed

    def _answer(self, name: str) -> dict[str, t.Any] | None:
        """What the agent of a microVM says, and no other one's; with the cid that it is declared with, another may run."""
        running = state_of.running(self.host, [name]).get(name)
        told = state_of.ask_agent(self.host, running, 2) if running else None
        called = (told or {}).get("hostname")
        return None if called != name and called in self.host.names(HOME) else told

    def _processes(self, tenant: str, name: str) -> bool:
        """Whether the unit has processes; cheaper than to ask systemd while guests boot.

        :param tenant: ``*`` is any
        """
        return any(self.host.read(path) for path in self.host.glob(f"{cgroup(tenant, name)}/cgroup.procs"))

    def _ended(self, names: list[str]) -> dict[str, str]:
        """Name -> why, of those whose VMM is not there.

        A VMM that ended is started again by systemd, as it would be later in its life; once is accepted here. Before
        that the unit is deactivating for as long as the host is cleared of what the VMM had.
        """
        found = {}
        for name, unit_state in state_of.unit_states(self.host, names).items():
            if unit_state["restarts"] > 1 or unit_state["active"] not in ("active", "activating", "deactivating"):
                found[name] = "the VMM ended"
        return found

    def _give_up(self, name: str, why: str, stop: bool) -> str:
        """Say what there is to say of a microVM that did not start."""
        spec = self.specs[name]
        console = state_of.console(self.host, name)
        if spec["shares"]:
            journal = ["journalctl", f"--unit=agentfleet-virtiofsd@{name}:*", "--lines=8", "--output=cat", "--quiet"]
            console += f" virtiofsd: {self.host.run(journal, check=False).text}"
        if stop:
            self.host.run(["systemctl", "stop", unit(name)], timeout_seconds=units.STOPPED_SECONDS, check=False)
            self.host.run(["systemctl", "reset-failed", unit(name)], check=False)
        else:
            why += "; it ran before this call and is not stopped"
        return f"{why}. Console: {' '.join(console.split())[-1200:]}"

    # -- apply: removal --------------------------------------------------------------

    def _apply_remove(self, data: tuple[list[str], list[str], list[str]]) -> None:
        names, slices, common = data
        if names:
            self.host.run(["systemctl", "disable", "--quiet", "--no-reload", *map(unit, names)], check=False)
            stop = ["systemctl", "stop", *map(unit, names), *slices]  # it calls an error what systemd does not know
            told = self.host.run(stop, timeout_seconds=units.STOPPED_SECONDS, check=False).text
            self.host.run(["systemctl", "reset-failed", *map(unit, names)], check=False)
            found = state_of.unit_states(self.host, names)
            # What not even KILL ended, systemd gives up as failed; after reset-failed it is inactive, and still has a process.
            alive = [n for n in names if found[n]["active"] not in ("inactive", "failed") or self._processes("*", n)]
            if alive:
                raise HostError(
                    f"{', '.join(alive)} did not stop ({told or 'systemctl says nothing'}), so that nothing is removed. "
                    f"journalctl -u {unit(alive[0])} may say why"
                )
        attached = sorted({name for name, _bridge in _network.attached(self.host)})
        found = state_of.unit_states(self.host, attached)
        known = set(state_of.declared(self.host)) - set(names)
        for name in attached:
            if name not in known and found[name]["active"] in ("inactive", "failed"):  # its end did not get its turn
                self._run_taps("down", name)
        for name in names:
            made = [path for path in self.made if path.startswith(volume_path(name, ""))]
            for path in self._own_files(name) + made:
                self.host.remove(path)
        for path in self._unused_policies():
            self.host.remove(path)
        for name in names:
            its = [f"{HOME}/{name}", f"{SYSTEM}/{unit(name)}.d", *([] if name in RESERVED else [run_directory(name)])]
            for directory in its:
                shutil.rmtree(self.host.path(directory), ignore_errors=True)
            with contextlib.suppress(OSError):  # volumes stay
                os.rmdir(self.host.path(f"{VOLUMES}/{name}"))
        if common:
            self._remove_common(common)
        for directory in (HOME, SYSTEM):  # a power cut brings nothing back
            with contextlib.suppress(FileNotFoundError):
                sync(self.host.path(directory))
        self._apply_reload([])

    def _unused_policies(self) -> list[str]:
        """Of networks that no microVM is declared with, nor runs with."""
        left = {one["bridge"] for spec in state_of.declared(self.host).values() for one in spec["networks"]}
        left.update(bridge for _name, bridge in _network.attached(self.host))
        return _network.unused_policies(self.host, left)

    def _remove_common(self, common: list[str]) -> None:
        self.host.run(["systemctl", "disable", "--quiet", "--no-reload", "agentfleet-microvms.target"], check=False)
        for path in common:
            self.host.remove(path)
        for directory in (HOME, SHARES, RUN, units.CODE_PATH):
            shutil.rmtree(self.host.path(directory), ignore_errors=True)
        # Others may have something there: their code, their files, volumes that stay.
        for directory in (LIBRARY, VOLUMES, *_network.DIRECTORIES):
            with contextlib.suppress(OSError):
                os.rmdir(self.host.path(directory))

    def _apply_delete(self, names: list[str]) -> None:
        volumes.delete(self.host, names)

    # -- result --------------------------------------------------------------

    def failure(self) -> dict[str, t.Any]:
        """What became of each microVM, where some failed."""
        if not self.errors:
            return {}
        try:
            return {"instances": self.result(self.observe())["instances"]}
        except HostError:  # why the call failed is said already
            return {}

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """One entry for each microVM of the call, in its order; a warning names those that wait for a restart."""
        instances = []
        waiting: dict[str, list[str]] = {}
        for name in self.wanted:
            spec = self.specs.get(name) or observed["specs"].get(name) or {}
            state = state_of.public_state(observed["units"].get(name))
            reasons = self._differences(name, observed)[1] if name in self.specs and state == "running" else []
            if reasons:
                why = "; ".join(f"{change.what}: {reason}" if change else reason for change, reason in reasons)
                waiting.setdefault(why, []).append(name)
            instances.append(
                {
                    "name": name,
                    "state": "absent"
                    if name not in observed["specs"]
                    else "paused"
                    if name in observed["paused"]
                    else state,
                    "image_digest": spec.get("image_digest", ""),
                    "cid": spec.get("cid"),
                    "addresses": _network.addresses(spec.get("networks", [])),
                    "pid": observed["units"].get(name, {}).get("pid", 0),
                    "restart_required": bool(reasons),
                    "restart_reasons": [f"{change}: {reason}" if change else reason for change, reason in reasons],
                    "error": self.errors.get(name, ""),
                }
            )
        warnings = sorted(set(self.warnings))
        restarts = self.params["allow_restart"] or self.params["state"] in ("restarted", "stopped")
        if waiting and not restarts:  # in check mode they still wait
            told = "; ".join(f"{', '.join(names)} ({why})" for why, names in waiting.items())
            warnings.append(
                f"until they are restarted, as with allow_restart, these run as they were declared before: {told}"
            )
        return {"instances": instances, "warnings": warnings}
