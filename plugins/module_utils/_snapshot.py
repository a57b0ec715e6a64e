# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots of running microVMs, and starts from them.

This module is private to the collection and imports nothing of Ansible.

``/var/lib/agentfleet/snapshots/<name>/`` is complete or not there: the guest's
RAM as a file, what the VMM saved, and a manifest. Only root can enter the
directory above it, since RAM holds a tenant's secrets; a microVM that starts
from a snapshot sees that one through a bind mount of its unit. All clones map
the RAM file privately, so its pages are in the host's memory once until a
guest writes them.

A clone's unit runs this file (``resume``), which loads the state, lets it run,
and tells the agent over vsock who it is now; only then the unit counts as
started. Until then the packet filter lets nothing of it through, since its MAC
and addresses are still the parent's. (Its taps are up: Cloud Hypervisor has no
leave to switch them on, and ends when it writes to one that is down.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import (
    Host,
    open_beneath,
    open_directory,
    sha256_of,
    sync,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_exec import exchange
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    HOME,
    LIBRARY,
    LOCK,
    LOCK_SECONDS,
    NAME,
    RESERVED,
    RUN,
    derived,
    home,
    run_directory,
    running_spec,
    unit,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._network import guest_lines
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import show
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

STORE = "/var/lib/agentfleet/snapshots"
MANIFEST, RAM = "manifest.json", "ram"
OURS = (MANIFEST, RAM, "paused.json")  # of a snapshot's files; the others are the VMM's
FORMAT = 1
TMPFILES = "/etc/tmpfiles.d/60-agentfleet-snapshots.conf"
TMPFILES_TEXT = f"""\
# Written by agentfleet.metal. What a power cut left of a snapshot that was being made.
R! {STORE}/.new-*
"""
BLOCK = 1 << 16
RUN_RESERVE_BYTES = 64 << 20  # of /run, for what systemd, udev and all others have there
ANEW = "Make it anew on this host: microvm_snapshot with state present"
IDENTITY_SECONDS = 60
AGENT_SECONDS = 10  # of these, to reach the agent once, and then for its whole answer
# What says in /proc/cpuinfo which CPU it is: of x86, then of Arm.
CPU = (
    "vendor_id", "cpu family", "model", "stepping", "model name",
    "CPU implementer", "CPU variant", "CPU part", "CPU revision",
)  # fmt: skip
# What the machine is made of: a clone has it from its snapshot, whatever its own declaration says.
INHERITED = (
    "driver", "program", "accelerator", "image", "image_digest", "image_path", "image_bytes", "data_images", "kernel",
    "initrd", "kernel_arguments", "vcpus", "vcpus_max", "memory_bytes", "memory_max_bytes", "memory_zones", "hugepage_bytes",
    "thp", "balloon_bytes", "free_page_reporting", "hotplug_slots", "volumes", "shares", "devices", "rate_limits",
)  # fmt: skip
# Options of an instance that say something of it: keys in the spec, and what the module makes of one that is left out.
PARENTS: dict[str, tuple[tuple[str, ...], t.Any]] = {
    "driver": (("driver",), "qemu"), "image": (("image_digest",), ""), "data_images": (("data_images",), []),
    "kernel": (("kernel",), ""), "kernel_arguments": (("kernel_arguments",), []), "vcpus": (("vcpus",), 1),
    "vcpus_max": (("vcpus_max",), None), "memory": (("memory_bytes",), None), "memory_max": (("memory_max_bytes",), None),
    "memory_zones": (("memory_bytes", "memory_zones"), []), "numa_node": (("memory_zones",), None),
    "hugepages": (("hugepage_bytes",), None), "thp": (("thp",), False), "balloon": (("balloon_bytes",), None),
    "hotplug_slots": (("hotplug_slots",), 0), "volumes": (("volumes",), []), "shares": (("shares",), []),
    "devices": (("devices",), []), "rate_limits": (("rate_limits",), None),
}  # fmt: skip


def stored_at(name: str) -> str:
    """Host path of a snapshot."""
    return f"{STORE}/{name}"


def seen_at(name: str) -> str:
    """Path of a snapshot as the VMM of a clone sees it."""
    return f"{RUN}/snapshots/{name}"


def memory_file(name: str) -> str:
    """Where a microVM that snapshots can be made of has its RAM while it runs."""
    return f"{run_directory(name)}/{RAM}"


def stored(host: Host) -> dict[str, dict[str, t.Any]]:
    """Name -> manifest of every snapshot; one without a readable manifest has an empty one."""
    found = {}
    for name in filter(NAME.fullmatch, host.names(STORE)):
        try:
            found[name] = json.loads(host.read(f"{stored_at(name)}/{MANIFEST}") or "{}")
        except ValueError:
            found[name] = {}
    return found


def _read(host: Host, path: str) -> _vmm.Spec | None:
    try:
        return t.cast("_vmm.Spec | None", json.loads(host.read(path) or "null"))
    except ValueError:
        return None


def name_of(spec: _vmm.Spec) -> str:
    """The snapshot that a microVM starts from, or empty."""
    return (spec.get("restore_from") or "").rpartition("/")[2]


def users(specs: t.Mapping[str, _vmm.Spec], name: str) -> list[str]:
    """The declared microVMs that start from a snapshot."""
    return sorted(one for one, spec in specs.items() if name_of(spec) == name)


# -- on which hosts a snapshot is valid -----------------------------------------


def key_of(host: Host, spec: _vmm.Spec, version: str = "") -> dict[str, str]:
    """What must be the same where a snapshot of this microVM starts.

    The VMM's state has no promise across its versions. A guest that runs on KVM has seen the host's CPU; its features
    include what the host's kernel and microcode let through, so the kernel's version is not asked besides. Emulation
    does not depend on the host's CPU.

    :param version: of the VMM if one runs that was asked; to ask its program takes a while
    """
    key = {
        "driver": spec["driver"],
        "version": version or _vmm.driver(spec["driver"]).version(host, spec["program"]),
        "accelerator": spec["accelerator"],
        "cpu": "emulated",
        "cpu_features": "emulated",
    }
    if spec["accelerator"] == "kvm":
        fields = dict(re.findall(r"^([a-zA-Z_ ]+?)\s*:\s*(.*)$", host.read("/proc/cpuinfo").partition("\n\n")[0], re.M))
        key["cpu"] = " ".join(fields[name] for name in CPU if name in fields)
        features = " ".join(sorted((fields.get("flags") or fields.get("Features", "")).split()))
        key["cpu_features"] = hashlib.sha256(features.encode()).hexdigest()[:16]
    return key


def problem(host: Host, name: str, manifest: t.Mapping[str, t.Any], thorough: bool = False, version: str = "") -> str:
    """Why no microVM can start from a snapshot on this host; empty when one can.

    :param thorough: also read files that nobody has touched since they were written
    :param version: see :func:`key_of`
    """
    if manifest.get("format") != FORMAT:
        return "its manifest is missing or damaged"
    key = key_of(host, manifest["spec"], version)
    for part, made_with in manifest["key"].items():
        if key[part] != made_with:
            return f"it was made with {part.replace('_', ' ')} {made_with!r}, and this host has {key[part]!r}"
    for file, entry in manifest["files"].items():
        path = host.path(f"{stored_at(name)}/{file}")
        try:
            state = os.stat(path)
        except OSError:
            return f"its file {file} is missing"
        if state.st_size != entry["size_bytes"]:
            return f"its file {file} has {state.st_size} bytes instead of {entry['size_bytes']}"
        if (thorough or state.st_mtime_ns != entry["mtime_ns"]) and sha256_of(path) != entry["sha256"]:
            return f"its file {file} is damaged: its SHA-256 is not that of the manifest"
    images = [manifest["spec"]["image_path"], *(image["path"] for image in manifest["spec"].get("data_images", ()))]
    gone = [image for image in images if not host.exists(image)]
    return f"its image {gone[0]} is not on this host" if gone else ""


def unsuitable(spec: _vmm.Spec) -> tuple[str, str] | None:
    """Why no snapshot of a microVM with this spec can be made, with the remedy."""
    if spec["restore_from"]:
        return (
            f"it was itself started from snapshot {name_of(spec)}, whose pages it shares",
            "Make the snapshot of a microVM that was booted",
        )
    if not spec["memory_file"]:
        return "its RAM is in no file", "Declare it with snapshots: true and restart it"
    for key, why in (
        ("shares", "virtiofsd maps its RAM and has state of its own"),
        ("devices", "the state of a passed-through device cannot be saved"),
        ("hotplug_slots", "what was attached while it ran would be elsewhere in a clone"),
        ("hugepage_bytes", "hugepages cannot be shared copy-on-write"),
        ("balloon_bytes", "pages that it gave back cannot be told from its RAM"),
        ("free_page_reporting", "pages that it gave back cannot be told from its RAM"),
    ):
        if t.cast("dict[str, t.Any]", spec)[key]:
            return f"it has {key}: {why}", f"Declare it without {key} and restart it"
    if spec["memory_max_bytes"] != spec["memory_bytes"]:
        return "it has memory that can be plugged, which is in no file", "Declare it without memory_max and restart it"
    if any(not volume["readonly"] for volume in spec["volumes"]):
        return (
            "it has a writable volume, which would not go back with its RAM when a clone starts again",
            "Declare it without writable volumes and restart it",
        )
    return None


# -- what the module microvm takes from here ----------------------------------------


def wish(option: str, item: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The validated options of one instance."""
    name = item["from_snapshot"]
    if name and not NAME.fullmatch(name):
        raise Refused(
            f"{option}.from_snapshot", name, "not a name of a snapshot", "Name a snapshot of microvm_snapshot"
        )
    if name and item["snapshots"]:
        raise Refused(
            f"{option}.snapshots", True, "it starts from a snapshot itself, whose pages it shares",
            "Leave out one of snapshots and from_snapshot",
        )  # fmt: skip
    declared = {option: item[option] for option, (_keys, default) in PARENTS.items() if item[option] != default}
    return {"snapshots": item["snapshots"], "from_snapshot": name, "declared": declared}


class Sources:
    """The snapshots of a host as what microVMs start from; each is looked at once in a call.

    :param predicting: a missing snapshot is expected to be made by an earlier task
    :param warnings: takes what this means
    :param others: microVMs of the host that are not of this call, and run or will
    :param runs: whether those of this call may run after it
    """

    def __init__(
        self,
        host: Host,
        predicting: bool,
        warnings: list[str],
        others: t.Iterable[_vmm.Spec] = (),
        runs: bool = True,
    ) -> None:
        self.host, self.predicting, self.warnings, self.runs = host, predicting, warnings, runs
        self._manifests: dict[str, dict[str, t.Any]] | None = None
        self._problems: dict[str, str] = {}
        files = [one for one in others if one.get("memory_file") == memory_file(one["name"])]
        self._ram_bytes = sum(one["memory_bytes"] for one in files)

    def settle(self, item: t.Mapping[str, t.Any], spec: _vmm.Spec) -> None:
        """Complete a resolved spec by the options ``snapshots`` and ``from_snapshot`` of its instance."""
        if item["snapshots"]:
            spec["memory_file"], spec["free_page_reporting"] = memory_file(spec["name"]), False
            self._check_ram(item["option"], spec)
        if item["from_snapshot"]:
            self._inherit(item, spec)

    def _check_ram(self, option: str, spec: _vmm.Spec) -> None:
        """Guests whose RAM together does not fit into /run are killed when they touch too much of it, and systemd stops."""
        zones = len(spec["memory_zones"])
        if zones > 1:
            raise Refused(
                f"{option}.snapshots", True, f"its RAM is one file, and it has {zones} zones",
                "Leave out one of snapshots and memory_zones",
            )  # fmt: skip
        if not self.runs or not self.host.exists("/run"):
            return
        state = os.statvfs(self.host.path("/run"))
        self._ram_bytes += spec["memory_bytes"]
        room = state.f_blocks * state.f_frsize - RUN_RESERVE_BYTES
        if self._ram_bytes > room:
            raise Refused(
                f"{option}.snapshots", True,
                f"its RAM of {spec['memory_bytes'] >> 20} MiB is kept in /run, which has room for {max(0, room) >> 20} MiB "
                f"of guests' RAM, and {self._ram_bytes >> 20} MiB are declared with it",
                "Make /run larger (mount -o remount,size=50% /run, and so in /etc/fstab), or give it less memory",
            )  # fmt: skip

    def _inherit(self, item: t.Mapping[str, t.Any], spec: _vmm.Spec) -> None:
        option, name = f"{item['option']}.from_snapshot", item["from_snapshot"]
        if self._manifests is None:
            self._manifests = stored(self.host)
        manifest = self._manifests.get(name)
        if manifest is None and self.predicting:
            self.warnings.append(f"snapshot {name} is not on the host yet; an earlier task is expected to make it")
        elif manifest is None:
            there = ", ".join(self._manifests) or "none"
            raise Refused(
                option, name, "no such snapshot on this host", f"Make it with microvm_snapshot first (there: {there})"
            )
        else:
            if name not in self._problems:
                self._problems[name] = problem(self.host, name, manifest)
            if self._problems[name]:
                raise Refused(option, name, self._problems[name], ANEW)
            self._take(item, manifest["spec"], spec)
        spec["restore_from"], spec["memory_file"] = seen_at(name), f"{seen_at(name)}/{RAM}"

    @staticmethod
    def _take(item: t.Mapping[str, t.Any], parent: _vmm.Spec, spec: _vmm.Spec) -> None:
        option, name, declared = item["option"], item["from_snapshot"], item["declared"]
        need, have = len(parent["networks"]), len(spec["networks"])
        if have != need:
            raise Refused(
                f"{option}.from_snapshot", name, f"the snapshot's machine has {need} networks and this one {have}",
                f"Declare as many as microVM {parent['name']} had",
            )  # fmt: skip
        if spec["data"] != parent["data"]:
            # The guest read its parent's when it booted, and boots no more; only a digest of it may be shown.
            raise Refused(
                f"{option}.user_data", spec["data"] or None,
                f"a clone goes on with what microVM {parent['name']} had, which is {parent['data'] or 'none'}, "
                "and does not boot, which would apply it",
                f"Declare {'the same user_data as that had' if parent['data'] else 'none'}; what a clone has of its own "
                "comes by environment and by executables of the image in /etc/agentfleet/identity.d/",
            )  # fmt: skip
        words, its = spec["kernel_arguments"], parent.get("kernel_arguments", [])
        if its[len(its) - len(words) :] == words:  # an image's own words come before these
            spec["kernel_arguments"] = its
        for change in _vmm.changes(parent, spec):
            said = [one for one in declared if change.key in PARENTS[one][0]]
            if said:
                raise Refused(
                    f"{option}.{said[0]}", change.item or declared[said[0]],
                    f"a clone goes on with what microVM {parent['name']} had, and this differs from it ({change})",
                    "Leave it out, or start this one from its image instead of the snapshot",
                )  # fmt: skip
        machine = t.cast("dict[str, t.Any]", parent)
        t.cast("dict[str, t.Any]", spec).update({key: machine[key] for key in INHERITED if key in machine})


def unit_lines(spec: _vmm.Spec) -> str:
    """What the ``[Service]`` section of a clone has besides that of a booted microVM."""
    if not spec["restore_from"]:
        return ""
    return (
        f"BindReadOnlyPaths={stored_at(name_of(spec))}:{spec['restore_from']}\n"
        f"ExecStartPost=+{LIBRARY}/microvm-unit resume %i\n"
    )


# -- the module microvm_snapshot -----------------------------------------------------


class Snapshots:
    """The snapshots of one call.

    :param params: ``state, snapshots, verify, timeout_seconds`` as the module documents them
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.state: str = params["state"]
        self.verify = bool(params["verify"])
        self.timeout_seconds: int = params["timeout_seconds"]
        if self.state not in ("present", "absent", "restored"):
            raise Refused("state", self.state, "not a state", "Use present, absent or restored")
        if self.timeout_seconds < 1:
            raise Refused("timeout_seconds", self.timeout_seconds, "too small", "Give at least 1")
        self.wanted: dict[str, dict[str, t.Any]] = {}
        for index, item in enumerate(params["snapshots"]):
            option, name = f"snapshots[{index}]", item["name"]
            for key in ("name", "microvm"):
                value = item[key]
                if (value or key == "name" or self.state != "absent") and not NAME.fullmatch(value or ""):
                    raise Refused(
                        f"{option}.{key}", value, "not a name",
                        "Use 1 to 48 of a-z, 0-9 and hyphen, beginning and ending with a letter or digit",
                    )  # fmt: skip
            if item["microvm"] in RESERVED and self.state != "absent":
                raise Refused(f"{option}.microvm", item["microvm"], "no name of a microVM", "Name one that is declared")
            taken = name if self.state != "restored" else item["microvm"]
            if taken in self.wanted:
                raise Refused(
                    f"{option}.name", name, "named twice", "Name each snapshot (or restored microVM) once in a call"
                )
            self.wanted[taken] = {"option": option, "name": name, "microvm": item["microvm"]}

    def alone(self) -> t.ContextManager[None]:
        """Nobody resumes what is saved, and what another call makes is no leftover."""
        return self.host.lock(LOCK, LOCK_SECONDS)

    def observe(self) -> dict[str, t.Any]:
        """Snapshots with what is wrong with them, what an interrupted call left, microVMs."""
        manifests = stored(self.host)
        specs = {name: spec for name in self.host.names(HOME) if (spec := _read(self.host, f"{home(name)}/spec.json"))}
        return {
            "manifests": manifests,
            "problems": {name: problem(self.host, name, found, self.verify) for name, found in manifests.items()},
            "left": [name for name in self.host.names(STORE) if name.startswith(".new-")],
            "specs": specs,
            "running": self._running(sorted({item["microvm"] for item in self.wanted.values() if item["microvm"]})),
        }

    def _running(self, names: t.Sequence[str]) -> dict[str, _vmm.Spec]:
        """Name -> what it runs with, of those that have a VMM."""
        states = show(self.host, list(map(unit, names)), "MainPID")
        up = [name for name in names if states.get(unit(name), {}).get("MainPID", "0") != "0"]
        found = {name: _read(self.host, running_spec(name)) for name in up}
        return {name: spec for name, spec in found.items() if spec}

    # -- plan ------------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """What an interrupted call left goes first; then one step for each snapshot."""
        steps = [
            Step(
                "clear",
                f"unfinished snapshot {name[len('.new-') :]}",
                why="a call that made it was interrupted",
                data=name,
            )
            for name in observed["left"]
        ]
        for item in self.wanted.values():
            steps += getattr(self, f"_plan_{self.state}")(item, observed)
        return steps

    def _plan_present(self, item: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> list[Step]:
        name = item["name"]
        there = name in observed["manifests"]
        why = observed["problems"].get(name, "")
        if there and not why:
            made_of = observed["manifests"][name]["microvm"]
            if made_of != item["microvm"]:
                raise Refused(
                    f"{item['option']}.microvm", item["microvm"], f"snapshot {name} is of microVM {made_of}",
                    "Give another name, or remove it first",
                )  # fmt: skip
            return []
        steps = self._plan_absent(item, observed, f"{why}; it is made anew") if there else []
        spec = observed["running"].get(item["microvm"])
        option = f"{item['option']}.microvm"
        if spec is None and not self.predicting:
            what = "not running" if item["microvm"] in observed["specs"] else "not on this host"
            raise Refused(option, item["microvm"], what, "Start it with the module microvm, and let it warm up")
        found = unsuitable(spec) if spec else None
        if found:
            raise Refused(option, item["microvm"], *found)
        room = self._room()
        if spec and room is not None and room < spec["memory_bytes"]:
            raise Refused(
                option, item["microvm"],
                f"{STORE} has room for {room >> 20} MiB and its RAM may take {spec['memory_bytes'] >> 20} MiB",
                "Make room there",
            )  # fmt: skip
        after = {"microvm": item["microvm"], "memory": format_size(spec["memory_bytes"]) if spec else "unknown"}
        why = f"microVM {item['microvm']} is paused while its RAM is copied"
        return [*steps, Step("create", f"snapshot {name}", after=after, why=why, data=(name, spec))]

    def _plan_absent(self, item: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any], why: str = "") -> list[Step]:
        name = item["name"]
        if name not in observed["manifests"]:
            return []
        used_by = users(observed["specs"], name)
        if used_by:
            raise Refused(
                f"{item['option']}.name", name, f"in use by {', '.join(used_by)}" + (f" ({why})" if why else ""),
                "Remove these microVMs, or declare them without from_snapshot, first",
            )  # fmt: skip
        before = self._public(name, observed)
        return [Step("delete", f"snapshot {name}", before=before, why=why, disruptive=True, data=name)]

    def _plan_restored(self, item: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> list[Step]:
        name, microvm = item["name"], item["microvm"]
        spec = observed["specs"].get(microvm)
        if spec is None or name_of(spec) != name:
            if self.predicting and spec is None:
                return [Step("restore", f"microVM {microvm}", after={"snapshot": name}, disruptive=True, data=microvm)]
            raise Refused(
                f"{item['option']}.microvm", microvm,
                "not on this host" if spec is None else f"declared to start from {name_of(spec) or 'its image'}",
                f"Declare it with from_snapshot: {name} (module microvm) first",
            )  # fmt: skip
        if observed["problems"].get(name, "missing"):
            raise Refused(
                f"{item['option']}.name", name, observed["problems"].get(name, "no such snapshot on this host"),
                ANEW,
            )  # fmt: skip
        why = "its RAM and everything written since goes"
        return [Step("restore", f"microVM {microvm}", after={"snapshot": name}, why=why, disruptive=True, data=microvm)]

    def _room(self) -> int | None:
        path = self.host.path("/var/lib")
        if not os.path.isdir(path):
            return None
        state = os.statvfs(path)
        return state.f_bavail * state.f_frsize

    # -- apply -----------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        getattr(self, f"_apply_{step.verb}")(step.data)

    def _apply_clear(self, left: str) -> None:
        """Undo what an interrupted call did: its files, and a microVM that it paused and could not resume."""
        spec = _read(self.host, f"{STORE}/{left}/paused.json")
        if spec and self._running([spec["name"]]):
            with _vmm.driver(spec["driver"]).machine(self.host, spec) as machine:
                machine.resume()
            shutil.rmtree(self.host.path(f"{run_directory(spec['name'])}/snapshot"), ignore_errors=True)
        shutil.rmtree(self.host.path(f"{STORE}/{left}"))

    def _apply_create(self, data: tuple[str, _vmm.Spec]) -> None:
        name, spec = data
        self.host.write(TMPFILES, TMPFILES_TEXT)
        store = self.host.path(STORE)
        os.makedirs(store, exist_ok=True)
        os.chmod(store, 0o700)
        work = f"{STORE}/.new-{name}"
        shutil.rmtree(self.host.path(work), ignore_errors=True)
        os.mkdir(self.host.path(work))
        try:
            version = self._save(spec, work)
            self._seal(name, spec, work, version)
            os.rename(self.host.path(work), self.host.path(stored_at(name)))
            sync(store)
        finally:
            shutil.rmtree(self.host.path(work), ignore_errors=True)

    def _save(self, spec: _vmm.Spec, work: str) -> str:
        """State and RAM of one moment; the microVM is paused for as long as that takes, and no longer.

        :returns: the version of the VMM whose state it is
        """
        given = f"{run_directory(spec['name'])}/snapshot"
        with contextlib.ExitStack() as stack:
            driver = _vmm.driver(spec["driver"])
            machine = stack.enter_context(driver.machine(self.host, spec))
            version, program = machine.version(), driver.version(self.host, spec["program"])
            if version != program:  # a clone is a process of the program, and would read another one's state
                raise HostError(
                    f"microVM {spec['name']} runs on version {version!r}, and {spec['program']} has become {program!r} since. "
                    "Restart it (module microvm with state restarted), and run this again"
                )
            # The VMM can put there what it likes: a link to what is root's, or to another tenant's.
            own = stack.enter_context(self.host.directory(run_directory(spec["name"])))
            shutil.rmtree(self.host.path(given), ignore_errors=True)
            os.mkdir("snapshot", dir_fd=own)
            saved = open_directory("snapshot", own)
            stack.callback(os.close, saved)
            os.chown(saved, os.fstat(own).st_uid, os.fstat(own).st_gid)
            before = machine.state()
            if before == "running":
                self.host.write(f"{work}/paused.json", json.dumps(spec), 0o600)
            try:
                machine.pause()
                machine.save(given)
                _copy_sparse(own, os.path.basename(spec["memory_file"]), self.host.path(f"{work}/{RAM}"))
                for file in sorted(os.listdir(saved)):
                    if file in OURS:
                        raise HostError(f"{spec['driver']} saved a file {file}, which is a name of ours")
                    _copy_sparse(saved, file, self.host.path(f"{work}/{file}"))
            finally:
                shutil.rmtree(self.host.path(given), ignore_errors=True)
                if before == "running":
                    machine.resume()
                    self.host.remove(f"{work}/paused.json")
        return version

    def _seal(self, name: str, spec: _vmm.Spec, work: str, version: str) -> None:
        """Write the manifest last: what it lists is on the disk."""
        files = {}
        for file in self.host.names(work):
            path = self.host.path(f"{work}/{file}")
            os.chmod(path, 0o444)  # the directory above is closed
            sync(path)
            state = os.stat(path)
            files[file] = {"size_bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256_of(path)}
        manifest = {
            "format": FORMAT, "name": name, "microvm": spec["name"], "key": key_of(self.host, spec, version),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "spec": spec, "files": files,
        }  # fmt: skip
        self.host.write(f"{work}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True) + "\n", 0o400)
        os.chmod(self.host.path(work), 0o755)
        sync(self.host.path(work))

    def _apply_delete(self, name: str) -> None:
        # Renamed first, so that what is left of an interrupted removal is no snapshot.
        left = self.host.path(f"{STORE}/.new-{name}")
        shutil.rmtree(left, ignore_errors=True)
        os.rename(self.host.path(stored_at(name)), left)
        shutil.rmtree(left)
        for path in (seen_at(name), os.path.dirname(seen_at(name))):  # mount points that systemd made for clones
            with contextlib.suppress(OSError):
                os.rmdir(self.host.path(path))
        if not self.host.names(STORE):
            os.rmdir(self.host.path(STORE))
            self.host.remove(TMPFILES)

    def _apply_restore(self, microvm: str) -> None:
        # The unit's own start loads the snapshot and gives the identity. What is asked for is no start too many.
        self.host.run(["systemctl", "reset-failed", unit(microvm)], check=False)
        self.host.run(["systemctl", "restart", unit(microvm)], timeout_seconds=self.timeout_seconds)

    # -- result ----------------------------------------------------------------

    def _public(self, name: str, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        manifest = observed["manifests"][name]
        spec = manifest.get("spec", {})
        return {
            "name": name,
            "microvm": manifest.get("microvm", ""),
            "created": manifest.get("created", ""),
            "driver": spec.get("driver", ""),
            "version": manifest.get("key", {}).get("version", ""),
            "cpu": manifest.get("key", {}).get("cpu", ""),
            "image_digest": spec.get("image_digest", ""),
            "memory_bytes": spec.get("memory_bytes", 0),
            "disk_bytes": sum(
                os.stat(path).st_blocks * 512
                for file in self.host.names(stored_at(name))
                for path in [self.host.path(f"{stored_at(name)}/{file}")]
            ),
            "usable": not observed["problems"][name],
            "problem": observed["problems"][name],
            "used_by": users(observed["specs"], name),
        }

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """All snapshots of the host."""
        return {"snapshots": [self._public(name, observed) for name in observed["manifests"]]}


# -- files ---------------------------------------------------------------------------


def _copy_sparse(directory: int, name: str, target: str) -> None:
    """Copy a file of the VMM; blocks of zeros become holes, as they are in RAM that a guest never touched."""
    zeros = bytes(BLOCK)
    with open_beneath(directory, name) as reader, open(target, "wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        position = 0
        while position < size:
            try:
                position = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            except OSError:  # no data behind it
                break
            position -= position % BLOCK
            reader.seek(position)
            block = reader.read(BLOCK)
            if block != zeros[: len(block)]:
                writer.seek(position)
                writer.write(block)
            position += BLOCK
        writer.truncate(size)


# -- in the unit of a clone ------------------------------------------------------------


def identity(host: Host, spec: _vmm.Spec, parent: _vmm.Spec) -> dict[str, t.Any]:
    """What the agent of a clone is told; the entropy is new each time, the machine-id is not."""
    key = f"{host.read('/etc/machine-id')} {spec['name']}"
    return {
        "hostname": spec["name"],
        "machine_id": derived(key, "machine-id").hex()[:32],
        "networks": list(zip(guest_lines(parent["networks"]), guest_lines(spec["networks"]))),
        "environment": spec["environment"],
        "entropy": os.urandom(64).hex(),
        "time": time.time(),
        "power_off": _vmm.driver(spec["driver"]).CLONE_POWER_OFF,
    }


def resume(host: Host, name: str) -> None:
    """Let a clone whose VMM has just started run as itself."""
    spec = json.loads(host.read(running_spec(name)))
    snapshot = name_of(spec)
    manifest = stored(host).get(snapshot, {})
    driver = _vmm.driver(spec["driver"])
    end = time.monotonic() + IDENTITY_SECONDS
    with contextlib.ExitStack() as stack:
        machine = _connected(lambda: stack.enter_context(driver.machine(host, spec)), end)
        why = problem(host, snapshot, manifest, version=_connected(machine.version, end))
        if why:
            raise HostError(f"microVM {name} cannot start from snapshot {snapshot}: {why}. Make the snapshot anew")
        machine.load(spec["restore_from"])
        machine.resume()
    told: dict[str, t.Any] = {}
    while told.get("hostname") != name:
        try:
            with driver.connect(host, spec, _vmm.AGENT_PORT, AGENT_SECONDS) as agent:
                told = tell(agent, identity(host, spec, manifest["spec"]))
        except (OSError, ValueError, RecursionError) as error:
            told = {"error": str(error)}
        if told.get("hostname") != name:
            if time.monotonic() > end:
                raise HostError(
                    f"the agent of microVM {name} did not take its identity within {IDENTITY_SECONDS} seconds: "
                    f"{told.get('error', told)}. The snapshot's image needs an agent of this collection"
                )
            time.sleep(0.1)


def _connected(connect: t.Callable[[], t.Any], end: float) -> t.Any:
    """The VMM was started a moment ago; its socket comes when it comes."""
    while True:
        try:
            return connect()
        except (OSError, HostError) as error:
            if time.monotonic() > end:
                raise HostError(f"the VMM does not answer: {error}") from error
            time.sleep(0.05)


def tell(agent: socket.socket, message: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Send an identity and return what the agent says of itself then."""
    body = json.dumps(message).encode()
    request = b"POST /identity HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = exchange(agent, request + body, AGENT_SECONDS)
    told = json.loads(answer.partition(b"\r\n\r\n")[2])
    return told if isinstance(told, dict) else {}
