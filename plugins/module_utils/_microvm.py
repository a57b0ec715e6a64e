# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""MicroVMs: validation, resolution of what is derived, plan, and the life cycle under systemd.

This module is private to the collection and imports nothing of Ansible.

A wish becomes a *spec*: everything resolved (image digest, address, MAC, CID,
accelerator), stored as ``spec.json``. Files, unit and command line follow from
the spec alone; a running microVM is up to date when its process has that
command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_units as units
from ansible_collections.agentfleet.metal.plugins.module_utils import _network, _snapshot, _store, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    HOME,
    LIBRARY,
    NAME,
    SHARES,
    SYSTEM,
    WORD,
    derived,
    run_directory,
    unit,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._proc import memory_of
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

# State -> whether the microVM exists and whether it runs (None: as it is).
STATES: dict[str, tuple[bool, bool | None]] = {
    "present": (True, None),
    "running": (True, True),
    "stopped": (True, False),
    "absent": (False, False),
}
RELOAD_SECONDS = 300  # takes a minute on a crowded emulated host
OVERHEAD = 192 << 20  # of a VMM besides guest RAM and privately written image pages
SMALLEST_MEMORY = 96 << 20


def ask_agent(host: Host, spec: _vmm.Spec, timeout_seconds: float = 5) -> dict[str, t.Any] | None:
    """What the agent in a microVM answers over vsock; None when it does not."""
    try:
        with _vmm.driver(spec["driver"]).connect(host, spec, _vmm.AGENT_PORT, timeout_seconds) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            told = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def declared(host: Host) -> dict[str, _vmm.Spec]:
    """Name -> spec of every microVM on the host."""
    found = {}
    for name in host.names(HOME):
        try:
            found[name] = json.loads(host.read(f"{HOME}/{name}/spec.json"))
        except ValueError:
            continue
    return found


def unit_states(host: Host, names: t.Sequence[str]) -> dict[str, dict[str, t.Any]]:
    """Name -> active state, main pid and its command line, with one command for all."""
    if not names:
        return {}
    properties = "--property=Id,ActiveState,MainPID,NRestarts"
    done = host.run(["systemctl", "show", properties, *(unit(name) for name in names)], timeout_seconds=180)
    found = {}
    for stanza in done.stdout.split("\n\n"):
        fields = dict(line.split("=", 1) for line in stanza.splitlines() if "=" in line)
        if "Id" not in fields:
            continue
        pid = int(fields.get("MainPID") or 0)
        name = fields["Id"].partition("@")[2].rpartition(".service")[0]
        found[name] = {
            "active": fields.get("ActiveState", "inactive"),
            "pid": pid,
            "restarts": int(fields.get("NRestarts") or 0),
            "argv": host.read(f"/proc/{pid}/cmdline").rstrip("\0").split("\0") if pid else [],
        }
    return found


def public_state(state: t.Mapping[str, t.Any] | None) -> str:
    """systemd's state in our words."""
    words = {"active": "running", "activating": "starting", "deactivating": "stopping", "failed": "failed"}
    return words.get((state or {}).get("active", ""), "stopped")


class MicroVms:
    """The microVMs of one call.

    :param params: ``state, instances, networks, accelerator, parallel, ready_timeout_seconds, allow_restart,
        memory_overcommit`` as the module documents them
    """

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        self.host = host
        self.predicting = False
        self.params = params
        if params["state"] not in STATES:
            raise Refused("state", params["state"], "not a state", f"Use one of {', '.join(STATES)}")
        self.exists, self.runs = STATES[params["state"]]
        if params["accelerator"] not in ("auto", "kvm", "tcg"):
            raise Refused("accelerator", params["accelerator"], "not an accelerator", "Use auto, kvm or tcg")
        for option, least in (("parallel", 0), ("ready_timeout_seconds", 1)):
            if params[option] < least:
                raise Refused(option, params[option], "too small", f"Give at least {least}")
        if params["memory_overcommit"] <= 0:
            raise Refused("memory_overcommit", params["memory_overcommit"], "not positive", "1.0 means no overcommit")
        self.networks = _network.Networks(params["networks"])
        self.wanted: dict[str, dict[str, t.Any]] = {}
        for index, item in enumerate(params["instances"]):
            option, name = f"instances[{index}]", item["name"]
            if not NAME.fullmatch(name):
                raise Refused(
                    f"{option}.name", name, "not a name of a microVM",
                    "Use 1 to 48 of a-z, 0-9 and hyphen, beginning and ending with a letter or digit",
                )  # fmt: skip
            if name in self.wanted:
                raise Refused(f"{option}.name", name, "named twice", "Give each microVM its own name")
            self.wanted[name] = self._item(option, item) if self.exists else {"name": name, "option": option}
        self._unique("cid", lambda item: [item["cid"]], "Give another cid, or leave it out to have one derived")
        self._unique(
            "networks", lambda item: [n["address"] for n in item["networks"] if n["address"]], "Give another address"
        )
        self.warnings: list[str] = []
        self.specs: dict[str, _vmm.Spec] = {}

    # -- validation ----------------------------------------------------------

    def _item(self, option: str, item: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        if item["driver"] not in _vmm.DRIVERS:
            raise Refused(f"{option}.driver", item["driver"], "unknown driver", f"Use one of {', '.join(_vmm.DRIVERS)}")
        if not 1 <= item["vcpus"] <= 255:
            raise Refused(f"{option}.vcpus", item["vcpus"], "not from 1 to 255", "Give at least one virtual CPU")
        memory = parse_size(f"{option}.memory", item["memory"], 1 << 20)
        if memory < SMALLEST_MEMORY:
            raise Refused(
                f"{option}.memory", item["memory"], "too little for the guest kernel",
                f"Give at least {format_size(SMALLEST_MEMORY)}",
            )  # fmt: skip
        image = item["image"].partition("sha256:")[2] or item["image"]
        if not item["from_snapshot"] and not (_store.NAME.fullmatch(image) or _store.DIGEST.fullmatch(image)):
            raise Refused(
                f"{option}.image", item["image"], "neither a name nor a digest", "Name an image of image_store"
            )
        if not WORD.fullmatch(item["tenant"]):
            raise Refused(f"{option}.tenant", item["tenant"], "not a name of a tenant", "Use 1 to 32 of a-z, 0-9 and _")
        for key in item["environment"]:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or key.startswith("agentfleet_"):
                raise Refused(
                    f"{option}.environment",
                    key,
                    "not a name of a variable",
                    "Use letters, digits and _; not agentfleet_*",
                )
        for number, word in enumerate(item["kernel_arguments"]):
            if not re.fullmatch(r"[!-~]+", word):
                raise Refused(
                    f"{option}.kernel_arguments[{number}]", word, "not one word", "Give one argument a list item"
                )
        cid = item["cid"]
        if cid is None:
            cid = 1024 + int.from_bytes(derived(item["name"], "cid")[:4], "big") % ((1 << 31) - 1024)
        if not 3 <= cid < 0xFFFFFFFF:
            raise Refused(f"{option}.cid", cid, "reserved by vsock", "Give 3 to 4294967294, or leave it out")
        return {
            **{key: item[key] for key in ("name", "driver", "vcpus", "tenant", "autostart", "kernel_arguments")},
            "option": option,
            "memory_bytes": memory,
            "image": image,
            "cid": cid,
            "environment": {key: str(value) for key, value in sorted(item["environment"].items())},
            "shares": self._shares(option, item["shares"]),
            "networks": self.networks.wishes(option, item["networks"]),
            **_snapshot.wish(option, item),
        }

    @staticmethod
    def _shares(option: str, shares: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
        found: list[dict[str, t.Any]] = []
        for index, share in enumerate(shares):
            where = f"{option}.shares[{index}]"
            if not WORD.fullmatch(share["tag"]):
                raise Refused(f"{where}.tag", share["tag"], "not a tag", "Use 1 to 32 of a-z, 0-9 and _")
            if share["tag"] in [other["tag"] for other in found]:
                raise Refused(f"{where}.tag", share["tag"], "shared twice", "Give each share of a microVM its own tag")
            target = share["target"] or f"/mnt/{share['tag']}"
            for key, path in (("source", share["source"]), ("target", target)):
                if not re.fullmatch(r"/[A-Za-z0-9_@%+=:,./-]+", path) or os.path.normpath(path) != path:
                    raise Refused(
                        f"{where}.{key}", path, "not a clean absolute path", "Write a path such as /srv/models"
                    )
            found.append(
                {
                    "tag": share["tag"],
                    "source": share["source"],
                    "target": target,
                    "readonly": share["readonly"],
                    "dax": "never",
                }
            )
        return found

    def _unique(self, key: str, values: t.Callable[[t.Mapping[str, t.Any]], list[t.Any]], remedy: str) -> None:
        seen: dict[t.Any, str] = {}
        for item in self.wanted.values():
            for value in values(item) if self.exists else []:
                if value in seen:
                    raise Refused(f"{item['option']}.{key}", value, f"{seen[value]} has it too", remedy)
                seen[value] = item["name"]

    # -- observe -------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Specs, units and images of the host."""
        have = declared(self.host)
        names = sorted(set(have) | set(self.wanted))
        enabled = f"{SYSTEM}/agentfleet-microvms.target.wants"
        return {
            "specs": have,
            "units": unit_states(self.host, names),
            "enabled": {name for name in names if self.host.exists(f"{enabled}/{unit(name)}")},
            "images": _store.stored(self.host),
            "names": _store.named(self.host),
            "memory_bytes": self._host_memory(),
            "virtualization": bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", self.host.read("/proc/cpuinfo"), re.M)),
            "modules": {line.split()[0] for line in self.host.read("/proc/modules").splitlines()},
            "target": self.host.exists(f"{SYSTEM}/multi-user.target.wants/agentfleet-microvms.target"),
        }

    def _host_memory(self) -> int:
        match = re.search(r"^MemTotal:\s+(\d+) kB", self.host.read("/proc/meminfo"), re.M)
        return int(match.group(1)) * 1024 if match else 0

    # -- plan ----------------------------------------------------------------

    def plan(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        """Definitions, then what stops, then what starts; everything is resolved and checked first."""
        if not self.exists:
            return self._plan_absent(observed)
        self._resolve(observed)
        steps = self._plan_common(observed)
        units_changed = bool(steps)
        for name, spec in self.specs.items():
            stale = self._stale(self._files(spec))
            left_over = self._left_over(spec)
            if stale or left_over:
                units_changed = True
                before = observed["specs"].get(name)
                steps.append(
                    Step("define", f"microVM {name}", before=before, after=spec, data=(name, stale, left_over))
                )
        if units_changed:
            steps.append(Step("reload", "systemd", why="units were written"))
        specs = {**observed["specs"], **self.specs}
        steps += self.networks.plan(self.host, [one for spec in specs.values() for one in spec["networks"]])
        steps += self._plan_enabled(observed)
        return steps + self._plan_running(observed)

    def _plan_common(self, observed: t.Mapping[str, t.Any]) -> list[Step]:
        modules = list(units.MODULES)
        if observed["virtualization"] and self.params["accelerator"] != "tcg":
            modules.append("kvm_amd" if re.search(r"\bsvm\b", self.host.read("/proc/cpuinfo")) else "kvm_intel")
        stale = self._stale(units.common(modules))
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
            runs = self.runs if self.runs is not None else public_state(observed["units"].get(name)) != "stopped"
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
        steps = []
        up = [name for name in self.specs if public_state(observed["units"].get(name)) not in ("stopped", "failed")]
        if self.runs is False:
            stop = [
                name for name in self.specs if observed["units"].get(name, {}).get("active") not in (None, "inactive")
            ]
            if stop:
                steps.append(Step("stop", "microVMs", before=stop, disruptive=True, data=stop))
            return steps
        old = [name for name in up if self._outdated(name, observed)]
        if old and self.params["allow_restart"]:
            steps.append(
                Step("stop", "microVMs", before=old, why="their definition changed", disruptive=True, data=old)
            )
            up = [name for name in up if name not in old]
        start = [name for name in self.specs if name not in up and (self.runs or name in old)]
        if start:
            for name in start:
                self._check_host(name)
            fresh = {name for name in start if name not in observed["specs"]}
            steps.append(Step("start", "microVMs", after=start, data=(start, fresh)))
        return steps

    def _check_host(self, name: str) -> None:
        item, spec = self.wanted[name], self.specs[name]
        problems = [("driver", item["driver"], _vmm.driver(item["driver"]).problem(self.host, spec["program"]))]
        if spec["networks"]:
            problems.append(("networks", spec["networks"][0]["network"], _network.problem(self.host)))
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
        if not gone and not common:
            return []
        left = {observed["specs"][name]["tenant"] for name in observed["specs"] if name not in gone}
        tenants = {observed["specs"][name]["tenant"] for name in gone if name in observed["specs"]} - left
        slices = [f"agentfleet-{tenant}.slice" for tenant in sorted(tenants)] + (
            ["agentfleet.slice", "agentfleet-microvms.target"] if last else []
        )
        before = {name: observed["specs"].get(name) for name in gone}
        return [
            Step("remove", "microVMs", before=before, disruptive=True, data=(gone, slices, common)),
        ]

    # -- resolution: from the wish to the spec --------------------------------

    def _resolve(self, observed: t.Mapping[str, t.Any]) -> None:
        accelerator = self._accelerator(observed)
        others = {name: spec for name, spec in observed["specs"].items() if name not in self.wanted}
        cids = {spec["cid"]: name for name, spec in others.items()}
        interfaces = self.networks.resolve(
            self.wanted, {name: spec["networks"] for name, spec in observed["specs"].items()}
        )
        self.specs = {}
        self.snapshots = _snapshot.Sources(self.host, self.predicting, self.warnings)
        for name, item in self.wanted.items():
            if item["cid"] in cids:
                raise Refused(
                    f"{item['option']}.cid", item["cid"], f"microVM {cids[item['cid']]} has it", "Give another cid"
                )
            self.specs[name] = self._spec(item, accelerator, interfaces[name], observed)
        for item in self.wanted.values():
            for index, share in enumerate(item["shares"]):
                if not os.path.isdir(self.host.path(share["source"])) and not self.predicting:
                    raise Refused(
                        f"{item['option']}.shares[{index}].source", share["source"], "no such directory on the host",
                        "Make the directory first",
                    )  # fmt: skip
        self._check_memory(observed, others)

    def _spec(
        self,
        item: t.Mapping[str, t.Any],
        accelerator: str,
        interfaces: list[_network.Interface],
        observed: t.Mapping[str, t.Any],
    ) -> _vmm.Spec:
        digest = "" if item["from_snapshot"] else self._digest(item, observed)
        manifest = observed["images"].get(digest)
        before = observed["specs"].get(item["name"], {})
        spec: _vmm.Spec = {
            "name": item["name"],
            "driver": item["driver"],
            "program": _vmm.driver(item["driver"]).program(self.host, before.get("program", "")),
            "accelerator": accelerator,
            "landlock": _vmm.landlock(self.host),
            "tenant": item["tenant"],
            "image": item["image"],
            "image_digest": digest,
            "image_path": _store.image_path(digest),
            "image_bytes": manifest["files"][_store.IMAGE]["size_bytes"] if manifest else 0,
            "kernel": _store.image_path(digest, "kernel"),
            "initrd": _store.image_path(digest, "initrd"),
            "kernel_arguments": list(item["kernel_arguments"]),
            "vcpus": item["vcpus"],
            "vcpus_max": item["vcpus"],
            "memory_bytes": item["memory_bytes"],
            "memory_max_bytes": item["memory_bytes"],
            "memory_zones": [{"size_bytes": item["memory_bytes"], "numa_node": None}],
            "memory_file": "",
            "hugepage_bytes": 0,
            "thp": False,
            "balloon_bytes": 0,
            "free_page_reporting": True,
            "cid": item["cid"],
            "config": "",
            "data": "",
            "volumes": [],
            "shares": item["shares"],
            "networks": interfaces,
            "devices": [],
            "rate_limits": {
                "disk_bytes_per_second": 0,
                "disk_operations_per_second": 0,
                "network_bytes_per_second": 0,
            },
            "environment": item["environment"],
            "resources": {},
            "autostart": item["autostart"],
            "restart_policy": "always",
            "restore_from": "",
        }
        self.snapshots.settle(item, spec)
        spec["config"] = "config-" + hashlib.sha256(self._config(spec).encode()).hexdigest()[:12]
        return spec

    def _accelerator(self, observed: t.Mapping[str, t.Any]) -> str:
        wish: str = self.params["accelerator"]
        if wish == "kvm" and not observed["virtualization"]:
            raise Refused(
                "accelerator", wish, "this host's CPU has no vmx or svm",
                "Enable virtualization in the firmware, or use tcg",
            )  # fmt: skip
        # /dev/kvm alone proves nothing: it can exist and still not run an ordinary guest.
        return ("kvm" if observed["virtualization"] else "tcg") if wish == "auto" else wish

    def _digest(self, item: t.Mapping[str, t.Any], observed: t.Mapping[str, t.Any]) -> str:
        digest = observed["names"].get(item["image"], item["image"])
        if digest in observed["images"]:
            return str(digest)
        if self.predicting:
            self.warnings.append(
                f"image {item['image']} is not on the host yet; an earlier task is expected to bring it"
            )
            return ""
        raise Refused(
            f"{item['option']}.image", item["image"], "not in the host's image store",
            f"Bring it with image_store first (there: {', '.join(sorted(observed['names'])) or 'none'})",
        )  # fmt: skip

    def _check_memory(self, observed: t.Mapping[str, t.Any], others: t.Mapping[str, _vmm.Spec]) -> None:
        if self.runs is False or not observed["memory_bytes"]:
            return
        used = sum(spec["memory_bytes"] for name, spec in others.items() if name in observed["enabled"])
        limit = observed["memory_bytes"] * self.params["memory_overcommit"]
        for item in self.wanted.values():
            used += item["memory_bytes"]
            if used > limit:
                raise Refused(
                    f"{item['option']}.memory", format_size(item["memory_bytes"]),
                    f"does not fit: the microVMs up to this one take {used >> 20} MiB of {int(limit) >> 20} MiB",
                    "Declare fewer or smaller microVMs, or raise memory_overcommit",
                )  # fmt: skip

    # -- files ---------------------------------------------------------------

    @staticmethod
    def _config(spec: _vmm.Spec) -> str:
        """The read-only disk that tells a guest who it is: lines that its first program sources."""
        shares = [f"{s['tag']} {s['target']} {'ro' if s['readonly'] else 'rw'}" for s in spec["shares"]]
        text = f"agentfleet_hostname={spec['name']}\n"
        for key, lines in (("networks", _network.guest_lines(spec["networks"])), ("shares", shares)):
            text += f"agentfleet_{key}={shlex.quote(chr(10).join(lines))}\n"
        for key, value in spec["environment"].items():
            text += f"export {key}={shlex.quote(value)}\n"
        return text + "\n" * (-len(text.encode()) % 512)

    def _files(self, spec: _vmm.Spec) -> dict[str, tuple[str, int]]:
        argv = _vmm.driver(spec["driver"]).command(spec)
        maximum = spec["memory_bytes"] + spec["image_bytes"] + OVERHEAD
        texts = {"drop_in": units.drop_in(spec, argv, maximum), spec["config"]: self._config(spec)}
        return {**units.files_of(spec, texts), **_snapshot.files_of(spec)}

    def _stale(self, files: t.Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
        return {p: f for p, f in files.items() if not self.host.exists(p) or self.host.read(p) != f[0].strip()}

    def _left_over(self, spec: _vmm.Spec) -> list[str]:
        """Files of an earlier definition that this one does not have."""
        keep = set(self._files(spec))
        return [path for path in self._own_files(spec["name"]) if path not in keep]

    def _own_files(self, name: str) -> list[str]:
        return [
            *(f"{HOME}/{name}/{file}" for file in self.host.names(f"{HOME}/{name}")),
            *(f"{SHARES}/{file}" for file in self.host.names(SHARES) if file.startswith(f"{name}:")),
        ]

    def _outdated(self, name: str, observed: t.Mapping[str, t.Any]) -> bool:
        """Whether a running microVM has another command line than its definition."""
        argv = _vmm.driver(self.specs[name]["driver"]).command(self.specs[name])
        credentials = f"/run/credentials/{unit(name)}"
        running = observed["units"][name]["argv"]
        return bool(running) and running != [word.replace("%d/", credentials + "/") for word in argv]

    # -- apply ---------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Carry out one step."""
        getattr(self, f"_apply_{step.verb}")(step.data)

    def _apply_prepare(self, data: tuple[dict[str, tuple[str, int]], list[str]]) -> None:
        for path, (text, mode) in data[0].items():
            self.host.write(path, text, mode)
        if data[1]:
            self.host.run(["modprobe", "-a", *data[1]])
        if data[1] and data[1][-1].startswith("kvm_") and not self.host.exists("/dev/kvm"):
            raise HostError(
                "the CPU has virtualization but there is no /dev/kvm. Enable it in the firmware, or use accelerator tcg"
            )

    def _apply_define(self, data: tuple[str, dict[str, tuple[str, int]], list[str]]) -> None:
        for path in data[2]:
            self.host.remove(path)
        for path, (text, mode) in data[1].items():
            self.host.write(path, text, mode)

    def _apply_reload(self, _data: None) -> None:
        self.host.run(["systemctl", "daemon-reload"], timeout_seconds=RELOAD_SECONDS)

    def _apply_load(self, _data: None) -> None:
        self.host.run([f"{LIBRARY}/microvm-taps", "load"])

    def _apply_enable(self, names: list[str]) -> None:
        # Links for the next boot; nothing of the running systemd depends on them.
        self.host.run(
            ["systemctl", "enable", "--quiet", "--no-reload", "agentfleet-microvms.target", *map(unit, names)]
        )

    def _apply_disable(self, names: list[str]) -> None:
        self.host.run(["systemctl", "disable", "--quiet", "--no-reload", *map(unit, names)])

    def _apply_stop(self, names: list[str]) -> None:
        # One job for all: systemd presses the power buttons at the same time, then TERM, then KILL.
        self.host.run(["systemctl", "stop", *map(unit, names)], timeout_seconds=units.STOP_SECONDS + 120)
        self.host.run(["systemctl", "reset-failed", *map(unit, names)], check=False)

    def _apply_start(self, data: tuple[list[str], set[str]]) -> None:
        names, fresh = data
        # More booting guests than CPUs only take the CPUs from each other; a booted one is idle.
        parallel = self.params["parallel"] or os.cpu_count() or 1
        with ThreadPoolExecutor(max_workers=min(parallel, len(names))) as pool:
            outcomes = dict(zip(names, pool.map(self._start, names)))
        failed = {name: why for name, why in outcomes.items() if why}
        if not failed:
            return
        new = sorted(fresh & set(failed))
        if new:  # a start that failed leaves nothing behind
            self._apply_remove((new, [], []))
        raise HostError("; ".join(f"microVM {name}: {why}" for name, why in failed.items()))

    def _start(self, name: str) -> str:
        """Start one microVM and wait for its agent; empty, or why it failed (then it is stopped)."""
        service = unit(name)
        self.host.run(["systemctl", "reset-failed", service], check=False)
        done = self.host.run(["systemctl", "start", service], timeout_seconds=180, check=False)
        why = done.text if done.rc else self._await_agent(name)
        if not why:
            return ""
        console = _vmm.driver(self.specs[name]["driver"]).console(self.host, self.specs[name])
        journals = [f"--unit={service}", f"--unit=agentfleet-virtiofsd@{name}:*"]
        journal = self.host.run(
            ["journalctl", *journals, "--lines=8", "--output=cat", "--quiet"], timeout_seconds=60, check=False
        ).text
        self.host.run(["systemctl", "stop", service], timeout_seconds=units.STOP_SECONDS + 120, check=False)
        self.host.run(["systemctl", "reset-failed", service], check=False)
        return f"{why}. Console: {' '.join(console.split())[-600:]}. Journal: {journal[-600:]}"

    def _await_agent(self, name: str) -> str:
        """Empty once the agent answers, or why it does not.

        A VMM that ended is started again by systemd, as it would be later in its life; once is accepted here.
        """
        pid = unit_states(self.host, [name]).get(name, {}).get("pid", 0)
        end = time.monotonic() + self.params["ready_timeout_seconds"]
        while time.monotonic() < end:
            if ask_agent(self.host, self.specs[name]):
                return ""
            if not self.host.exists(f"/proc/{pid}/cmdline"):  # cheaper than to ask systemd while guests boot
                state = unit_states(self.host, [name]).get(name, {})
                if state.get("restarts", 0) > 1 or state.get("active") in ("failed", "inactive"):
                    return "the VMM ended"
                pid = state["pid"]
            time.sleep(0.5)
        return f"no answer from its agent within {self.params['ready_timeout_seconds']} seconds"

    def _apply_remove(self, data: tuple[list[str], list[str], list[str]]) -> None:
        names, slices, common = data
        if names:
            self.host.run(["systemctl", "disable", "--quiet", "--no-reload", *map(unit, names)], check=False)
            self.host.run(
                ["systemctl", "stop", *map(unit, names), *slices],
                timeout_seconds=units.STOP_SECONDS + 120,
                check=False,
            )
            self.host.run(["systemctl", "reset-failed", *map(unit, names)], check=False)
        for name in names:
            for path in self._own_files(name):
                self.host.remove(path)
        left = [one for spec in declared(self.host).values() for one in spec["networks"]]
        for path in _network.unused_policies(self.host, [one["bridge"] for one in left]):
            self.host.remove(path)
        for name in names:
            for directory in (f"{HOME}/{name}", f"{SYSTEM}/{unit(name)}.d", run_directory(name)):
                shutil.rmtree(self.host.path(directory), ignore_errors=True)
        if common:
            self.host.run(["systemctl", "disable", "--quiet", "--no-reload", "agentfleet-microvms.target"], check=False)
            for path in common:
                self.host.remove(path)
            for directory in (HOME, SHARES, "/run/agentfleet"):
                shutil.rmtree(self.host.path(directory), ignore_errors=True)
            for directory in (LIBRARY, *_network.DIRECTORIES):
                with contextlib.suppress(OSError):  # others may have something there
                    os.rmdir(self.host.path(directory))
        self.host.run(["systemctl", "daemon-reload"], timeout_seconds=RELOAD_SECONDS)

    # -- result --------------------------------------------------------------

    def result(self, observed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """One entry for each microVM of the call, in its order."""
        instances = []
        for name in self.wanted:
            spec = self.specs.get(name) or observed["specs"].get(name) or {}
            state = public_state(observed["units"].get(name))
            defined = name in observed["specs"]
            instances.append(
                {
                    "name": name,
                    "state": state if defined else "absent",
                    "image_digest": spec.get("image_digest", ""),
                    "cid": spec.get("cid"),
                    "addresses": _network.addresses(spec.get("networks", [])),
                    "pid": observed["units"].get(name, {}).get("pid", 0),
                    "restart_required": bool(
                        name in self.specs and state == "running" and self._outdated(name, observed)
                    ),
                }
            )
        return {"instances": instances, "warnings": sorted(set(self.warnings))}


class MicrovmInfo:
    """What microVMs are and cost, as a resource that never changes anything.

    :param names: only these; all that are declared when None
    """

    predicting = False

    def __init__(self, host: Host, names: t.Sequence[str] | None, agent_timeout_seconds: int) -> None:
        for index, name in enumerate(names or ()):
            if not NAME.fullmatch(name):
                raise Refused(
                    f"names[{index}]", name, "not a microVM's name", "Use up to 48 of a-z, 0-9 and inner hyphens"
                )
        if agent_timeout_seconds < 1:
            raise Refused(
                "agent_timeout_seconds", agent_timeout_seconds, "no agent answers in no time", "Use 1 or more"
            )
        self.host, self.names, self.agent_timeout_seconds = host, names, agent_timeout_seconds

    def observe(self) -> list[dict[str, t.Any]]:
        """Each microVM with its memory and its agent's answer."""
        return inspect_all(self.host, self.names, self.agent_timeout_seconds)

    def plan(self, observed: list[dict[str, t.Any]]) -> list[Step]:
        """Nothing to change."""
        return []

    def apply(self, step: Step) -> None:
        """Never called: there are no steps."""

    def result(self, observed: list[dict[str, t.Any]]) -> dict[str, t.Any]:
        """The microVMs as they were seen."""
        return {"instances": observed}


def inspect_all(host: Host, names: t.Sequence[str] | None, agent_timeout_seconds: float) -> list[dict[str, t.Any]]:
    """State, memory split and agent's answer of microVMs; the agents are asked at the same time.

    :param names: only these; one that is not declared is absent
    """
    specs = declared(host)
    states = unit_states(host, sorted(specs))
    running = [name for name in specs if states.get(name, {}).get("active") == "active"]
    with ThreadPoolExecutor(max_workers=16) as pool:
        told = dict(zip(running, pool.map(lambda name: ask_agent(host, specs[name], agent_timeout_seconds), running)))
    found = []
    for name in names if names is not None else list(specs):
        spec: t.Mapping[str, t.Any] = specs.get(name, {})
        state = states.get(name, {"pid": 0})
        addresses = _network.addresses(spec.get("networks", []))
        found.append(
            {
                "name": name,
                "state": public_state(state) if spec else "absent",
                **{key: spec.get(key, "") for key in ("tenant", "image", "image_digest", "accelerator")},
                "pid": state["pid"],
                **memory_of(host, state["pid"], _store.image_path(spec.get("image_digest", ""))),
                "memory_bytes": spec.get("memory_bytes", 0),
                "ready": bool(told.get(name)),
                "agent": told.get(name) or {},
                "cid": spec.get("cid"),
                "address": addresses[0] if addresses else "",
                "addresses": addresses,
            }
        )
    return found
