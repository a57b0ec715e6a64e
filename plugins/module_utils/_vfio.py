# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions given to vfio through driver_override, and the access of a group to their nodes."""

from __future__ import annotations

import os
import re
import stat
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _pci
from ansible_collections.agentfleet.metal.plugins.module_utils._boot import (
    each_alone,
    persist_apply,
    persist_plan,
    wanted,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size

RULES = "/etc/udev/rules.d/60-agentfleet-vfio.rules"
LIMITS = "/etc/security/limits.d/60-agentfleet-vfio.conf"
BOOT_WAIT_SECONDS = 60
_NAME = re.compile(r"^[a-z_][a-z0-9_-]*$")
_IOMMU_REMEDY = {
    "intel": "Boot with intel_iommu=on",
    "amd": "It is on by default on AMD: remove amd_iommu=off and iommu=off from the command line",
    "smmu": "It is on by default on Arm: remove iommu.passthrough or arm-smmu options that turn it off",
    "": "Turn on VT-d, AMD-Vi or the SMMU in the firmware setup; it publishes no DMAR, IVRS or IORT table now",
}


class Binding(t.NamedTuple):
    """What one function is to become; an empty driver gives it back to the kernel."""

    option: str
    driver: str


# The options as Ansible checks them; what they mean is in the documentation of the module vfio_bind.
OPTIONS: dict[str, t.Any] = {
    "functions": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "address": {"type": "str"},
            "vendor_device": {"type": "str"},
            "count": {"type": "int"},
            "numa_node": {"type": "int"},
            "vf_of": {"type": "str"},
            "vfs": {"type": "list", "elements": "int"},
            "driver": {"type": "str", "default": "vfio-pci"},
            "state": {"type": "str", "choices": ["bound", "unbound"], "default": "bound"},
        },
    },
    "bind_whole_group": {"type": "bool", "default": False},
    "access_group": {"type": "str"},
    "memlock": {"type": "str"},
}


class VfioBindings:
    """The wish: functions with their vfio driver (or none), and who may open the nodes.

    ``desired`` is the module's options. The stored wish has the same form; its
    ``wait_seconds`` makes the boot wait for functions, and bind the others when one stays away.
    """

    predicting = False

    def __init__(self, host: Host, desired: t.Mapping[str, t.Any]) -> None:
        self.host, self.desired = host, desired
        self.wait_seconds = float(desired.get("wait_seconds") or 0)
        self.items = [self._item(f"functions[{i}]", item) for i, item in enumerate(desired.get("functions") or [])]
        self.whole_group = bool(desired.get("bind_whole_group"))
        self.files = self._files(desired.get("access_group") or "", desired.get("memlock") or "")
        self.named: list[str] = []
        self.warnings: list[str] = []

    # -- validation ------------------------------------------------------------------

    @staticmethod
    def _item(option: str, item: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        given = {key: value for key, value in item.items() if value is not None}
        selectors = [key for key in ("address", "vendor_device", "vf_of") if key in given]
        if len(selectors) != 1:
            remedy = "Give exactly one of address, vendor_device and vf_of"
            raise Refused(option, given, f"{len(selectors)} selectors", remedy)
        for key, needs in (("count", "vendor_device"), ("numa_node", "vendor_device"), ("vfs", "vf_of")):
            if key in given and needs not in given:
                raise Refused(
                    f"{option}.{key}", given[key], f"has a meaning only with {needs}", f"Add {needs} or leave it out"
                )
        checked: dict[str, t.Any] = {"option": option, "count": given.get("count"), "numa_node": given.get("numa_node")}
        if "address" in given:
            checked["address"] = _pci.address_of(f"{option}.address", given["address"])
        elif "vendor_device" in given:
            checked["vendor_device"] = _pci.identity_of(f"{option}.vendor_device", given["vendor_device"])
        else:
            checked["vf_of"] = _pci.function_of(f"{option}.vf_of", given["vf_of"])
            checked["vfs"] = given.get("vfs") or []
            if not checked["vfs"] or min(checked["vfs"]) < 0:
                raise Refused(f"{option}.vfs", checked["vfs"], "no numbers of VFs", "List them from 0, such as [0, 1]")
        if checked["count"] is not None and checked["count"] < 1:
            raise Refused(f"{option}.count", checked["count"], "not a number of functions", "Leave it out to take all")
        driver = given.get("driver", "vfio-pci")
        if not re.match(r"^[a-z0-9_-]*vfio[a-z0-9_-]*$", driver):
            remedy = "Use vfio-pci or a variant such as mlx5_vfio_pci; state=unbound gives back to the kernel's driver"
            raise Refused(f"{option}.driver", driver, "not a vfio driver", remedy)
        checked["driver"] = driver if given.get("state", "bound") == "bound" else ""
        if not checked["driver"]:  # a number does not say which ones; a second run has to give back none
            checked["count"] = None
        return checked

    @staticmethod
    def _files(group: str, memlock: str) -> dict[str, str]:
        """Our files -> their text."""
        if group and not _NAME.match(group):
            raise Refused("access_group", group, "not the name of a group", "Write a local group's name, such as kvm")
        if memlock and not group:
            raise Refused(
                "memlock", memlock, "a limit without a group", "Give access_group, whose members get the limit"
            )
        files = {}
        head = "# Written by agentfleet.metal.\n"
        if group:
            access = f'GROUP="{group}", MODE="0660"\n'
            files[RULES] = (
                f'{head}SUBSYSTEM=="vfio", KERNEL!="vfio", {access}SUBSYSTEM=="vfio-dev", {access}'
                f'SUBSYSTEM=="misc", KERNEL=="iommu", {access}'
            )
        if memlock:
            limit = memlock if memlock == "unlimited" else str(parse_size("memlock", memlock, 1024) // 1024)
            files[LIMITS] = f"{head}@{group} - memlock {limit}\n"
        return files

    # -- the four verbs -----------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """PCI functions, IOMMU groups, and the access that the nodes have."""
        if self.wait_seconds:
            _pci.wait_for(self.host, [item["address"] for item in self.items], self.wait_seconds)
        functions = _pci.observe_pci(self.host, booting=bool(self.wait_seconds))["functions"]
        return {
            "functions": functions,
            "iommu": _pci.observe_iommu(self.host),
            "drivers": self.host.names("/sys/bus/pci/drivers"),
            "nodes": {path: self._access(path) for path in self._nodes()},
            "gid": self._gid(self.desired.get("access_group") or ""),
            "files": {path: self.host.read(path) for path in self.files},
        }

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """Files and modules first, so that the nodes come with the right access; then the bindings."""
        self.warnings = []
        functions = {function["address"]: function for function in observed["functions"]}
        stored = {item["address"]: item for item in (wanted(self.host, "vfio") or {}).get("functions", [])}
        items, absent = [], []
        for item in self.items:
            address = item.get("address")
            if address is None or address in functions:
                items.append(item)
            elif self.wait_seconds:
                absent.append(address)
            elif item["driver"] or not stored.pop(address, None):  # hardware that is gone can only be forgotten
                _pci.one(observed["functions"], f"{item['option']}.address", address)
        wish = self._resolve(functions, items)
        if any(binding.driver for binding in wish.values()):
            self._check_iommu(observed["iommu"], sorted(wish))
        lacking: list[Step] = []
        for address, binding in sorted(wish.items()):
            with each_alone(bool(self.wait_seconds), address, lacking):
                self._check(functions[address], binding)
                continue
            del wish[address]  # it was refused, and the others go on
        mates: dict[str, Binding] = {}
        for address in sorted(wish):
            with each_alone(bool(self.wait_seconds), address, lacking):
                mates.update(self._group_mates(functions, wish, address))
                continue
            del wish[address]  # it was refused, and the others go on
        wish.update(mates)
        self.named = sorted(wish)
        steps = self._access_steps(observed)
        missing = sorted({binding.driver for binding in wish.values() if binding.driver} - set(observed["drivers"]))
        steps += [
            Step(
                "load",
                f"module {name}",
                before="absent",
                after="loaded",
                why="it drives the functions",
                data=("load", name),
            )
            for name in missing
        ]
        for address, binding in sorted(wish.items()):
            steps += self._binding_steps(functions[address], binding)
        for address in absent:
            why = "it was bound before this boot"
            steps.append(Step("find", address, before="absent", after="present", why=why, data=("find", address)))
        return steps + lacking + self._persist(stored, wish)

    def apply(self, step: Step) -> None:
        """Carry out a step; a binding that fails is undone to the earlier driver."""
        if persist_apply(self.host, step):
            return
        kind, *data = step.data
        if kind == "write":
            self.host.write(data[0], self.files[data[0]])
        elif kind == "load":
            self.host.run(["modprobe", data[0]])
        elif kind == "udev":
            self._reload_udev()
        elif kind == "find":
            raise HostError(f"no PCI function {data[0]} on this host after {self.wait_seconds:g} seconds")
        else:
            self._rebind(*data)

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The named functions as they are."""
        named = [function for function in observed["functions"] if function["address"] in self.named]
        keys = ("address", "vendor", "device", "driver", "iommu_group", "numa_node")
        return {
            "functions": [
                {**{key: function[key] for key in keys}, "nodes": _pci.vfio_nodes(self.host, function["address"])}
                for function in named
            ],
            "warnings": self.warnings,
        }

    # -- which functions are meant ----------------------------------------------------------

    def _resolve(self, functions: dict[str, dict[str, t.Any]], items: list[dict[str, t.Any]]) -> dict[str, Binding]:
        """Address -> wish. VFs that an earlier task would make are added to ``functions`` in check mode."""
        wish: dict[str, Binding] = {}
        for item in items:
            for address in self._addresses(functions, item):
                binding = Binding(item["option"], item["driver"])
                other = wish.setdefault(address, binding)
                if other.driver != binding.driver:
                    problem = f"{other.option} wants another driver or state for it"
                    raise Refused(item["option"], address, problem, "Name each function once")
        return wish

    def _addresses(self, functions: dict[str, dict[str, t.Any]], item: dict[str, t.Any]) -> list[str]:
        option = item["option"]
        present = list(functions.values())
        if "address" in item:
            return [str(_pci.one(present, f"{option}.address", item["address"])["address"])]
        if "vf_of" in item:
            return self._virtual(functions, item)
        found = _pci.matching(present, item["vendor_device"])
        if item["numa_node"] is not None:
            found = [function for function in found if function["numa_node"] == item["numa_node"]]
        count = item["count"]
        if count is not None:  # a number takes those that are free, and those taken before come first
            found = [function for function in found if not function["in_use"]]
            found = sorted(found, key=lambda function: bool(function["driver"] != item["driver"]))[:count]
        if item["driver"] and len(found) < (count or 1):
            where = "" if item["numa_node"] is None else f" on NUMA node {item['numa_node']}"
            problem = f"{len(found)} of {count or 'at least 1'} functions are there and free{where}"
            raise Refused(
                f"{option}.vendor_device", item["vendor_device"], problem, "`lspci -Dnn` lists those that are there"
            )
        return [function["address"] for function in found]

    def _virtual(self, functions: dict[str, dict[str, t.Any]], item: dict[str, t.Any]) -> list[str]:
        option = f"{item['option']}.vf_of"
        pf = _pci.one([f for f in functions.values() if not f["physfn"]], option, item["vf_of"])
        if not pf["sriov"]:
            raise Refused(option, item["vf_of"], "the function has no SR-IOV", "Name a physical function with SR-IOV")
        there = dict(enumerate(pf["sriov"]["vfs"]))
        absent = [number for number in item["vfs"] if number not in there]
        if not item["driver"]:
            return [there[number] for number in item["vfs"] if number in there]
        if absent and not self.predicting:
            remedy = "Make the VFs first, with the module sriov_vfs"
            raise Refused(f"{item['option']}.vfs", item["vfs"], f"{pf['address']} has {len(there)} VFs", remedy)
        for number in absent:
            planned = _pci.virtual_function(self.host, pf, number)
            there[number] = planned["address"]
            functions[planned["address"]] = planned
            self.warnings.append(f"VF {number} of {pf['address']} is taken as made by an earlier task")
        return [there[number] for number in item["vfs"]]

    # -- what is refused ------------------------------------------------------------------

    def _check_iommu(self, iommu: dict[str, t.Any], addresses: list[str]) -> None:
        if iommu["enabled"]:
            return
        remedy = _IOMMU_REMEDY.get(iommu["kind"], _IOMMU_REMEDY[""])
        if not self.predicting:
            raise Refused("functions", addresses, "the host has no active IOMMU", remedy)
        self.warnings.append(f"The host has no active IOMMU; it is taken as on after a reboot. {remedy}")

    @staticmethod
    def _check(function: dict[str, t.Any], binding: Binding) -> None:
        """Refuse a change of one function that would break the host or a microVM."""
        option, address = binding.option, function["address"]
        if function["driver"] == binding.driver or not (binding.driver or "vfio" in function["driver"]):
            return
        if "vfio" in function["driver"] and function["users"]:  # without the driver it is another one of its group
            problem = f"in use through vfio by process {', '.join(function['users'])}"
            raise Refused(option, address, problem, "Stop the virtual machine that has the function")
        if function["class"].startswith("06"):
            raise Refused(option, address, "a bridge, which vfio does not take", "Name the functions behind it")
        if function["in_use"]:
            problem = f"in use by this host: {'; '.join(function['in_use'])}"
            raise Refused(option, address, problem, "Name another function, or end that use first")
        if function["sriov"].get("numvfs"):
            problem = f"has {function['sriov']['numvfs']} VFs, which its driver would take away"
            raise Refused(option, address, problem, "Set its VFs to 0 with sriov_vfs first, or bind the VFs with vf_of")

    def _group_mates(
        self, functions: dict[str, dict[str, t.Any]], wish: dict[str, Binding], address: str
    ) -> dict[str, Binding]:
        """Endpoints that share a group with a function that is bound, and still have a driver of the kernel."""
        binding, group = wish[address], functions[address]["iommu_group"]
        if not binding.driver or group is None:
            return {}
        mates = [
            function
            for function in functions.values()
            if function["iommu_group"] == group
            and not function["class"].startswith("06")
            and function["driver"]
            and "vfio" not in self._driver_then(function, wish)
        ]
        if mates and not self.whole_group:
            others = ", ".join(f"{mate['address']} ({mate['driver']})" for mate in mates)
            problem = f"IOMMU group {group} also has {others}, and a group is given away only as a whole"
            raise Refused(
                binding.option, address, problem, "Set bind_whole_group to bind them too, or use another slot"
            )
        together = Binding(f"bind_whole_group ({binding.option})", binding.driver)
        for mate in mates:
            self._check(mate, together)
        return {mate["address"]: together for mate in mates}

    @staticmethod
    def _driver_then(function: dict[str, t.Any], wish: dict[str, Binding]) -> str:
        binding = wish.get(function["address"])
        return binding.driver if binding else str(function["driver"])

    # -- the steps ------------------------------------------------------------------------

    @staticmethod
    def _binding_steps(function: dict[str, t.Any], binding: Binding) -> list[Step]:
        """The step of one function; none when it is as wished."""
        address, driver, override = function["address"], function["driver"], function["driver_override"]
        if binding.driver:
            if driver == binding.driver == override:
                return []
            verb, why = "bind", f"{binding.option} gives it to {binding.driver}"
        else:
            if "vfio" not in driver and "vfio" not in override:
                return []
            verb, why = "unbind", f"{binding.option} gives it back to the kernel's driver"
        return [
            Step(
                verb,
                address,
                before={"driver": driver, "driver_override": override},
                after={"driver": binding.driver or "the kernel's", "driver_override": binding.driver},
                why=why,
                disruptive=bool(driver) and driver != binding.driver,
                data=("rebind", address, binding.driver, override),
            )
        ]

    def _rebind(self, address: str, driver: str, override: str) -> None:
        path = f"{_pci.DEVICES}/{address}"
        before = self.host.link_name(f"{path}/driver")
        try:
            self._set_driver(path, driver)
            after = self.host.link_name(f"{path}/driver")
            if driver and after != driver:
                raise HostError(f"{address} has driver {after or 'none'} after probing; the kernel log says why")
            if not driver and "vfio" in after:
                raise HostError(f"{address} went back to {after}: is it named by vfio-pci.ids?")
            if driver and self.files:  # the node's group comes from udev
                self.host.run(["udevadm", "settle", "--timeout=30"])
        except HostError as error:
            try:
                self._set_driver(path, override or (before if "vfio" in before else ""))
                restored = self.host.link_name(f"{path}/driver")
            except HostError as second:
                raise HostError(f"{error}. Undoing it failed too: {second}") from error
            raise HostError(f"{error}. Undone: its driver is {restored or 'none'}") from error

    def _set_driver(self, path: str, override: str) -> None:
        """Give a function to the driver of its override; to the one the kernel chooses when that is empty."""
        self.host.poke(f"{path}/driver_override", override + "\n")
        current = self.host.link_name(f"{path}/driver")
        if current and current == override:
            return
        if current:
            self.host.poke(f"{path}/driver/unbind", os.path.basename(path))
        self.host.poke("/sys/bus/pci/drivers_probe", os.path.basename(path))

    def _persist(self, stored: dict[str, dict[str, t.Any]], wish: dict[str, Binding]) -> list[Step]:
        """Store the bindings by address, with those of earlier calls."""
        if self.wait_seconds:
            return []
        for address, binding in wish.items():
            stored.pop(address, None)
            if binding.driver:
                stored[address] = {"address": address, "driver": binding.driver}
        desired = {"functions": [stored[address] for address in sorted(stored)], "wait_seconds": BOOT_WAIT_SECONDS}
        return persist_plan(self.host, "vfio", desired if stored else None)

    # -- access ------------------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        """The nodes whose access the group has."""
        nodes = [f"/dev/vfio/{name}" for name in self.host.names("/dev/vfio") if name not in ("vfio", "devices")]
        nodes += [f"/dev/vfio/devices/{name}" for name in self.host.names("/dev/vfio/devices")]
        return nodes + [path for path in ("/dev/iommu",) if self.host.exists(path)]

    def _access(self, path: str) -> tuple[int, int]:
        """(group, mode) of a node."""
        try:
            found = os.stat(self.host.path(path))
        except OSError:
            return -1, 0
        return found.st_gid, stat.S_IMODE(found.st_mode)

    def _gid(self, group: str) -> int | None:
        match = re.search(rf"^{re.escape(group)}:[^:]*:(\d+):", self.host.read("/etc/group"), re.MULTILINE)
        return int(match.group(1)) if match and group else None

    def _access_steps(self, observed: dict[str, t.Any]) -> list[Step]:
        group = self.desired.get("access_group") or ""
        if not group:
            return []
        if observed["gid"] is None:
            remedy = "Create it as a local group (udev reads /etc/group alone), or name one that is there, such as kvm"
            if not self.predicting:
                raise Refused("access_group", group, "no such group in /etc/group", remedy)
            self.warnings.append(f"The group {group} is taken as made by an earlier task")
        steps = []
        for path, text in self.files.items():
            if observed["files"][path] != text.strip():
                why = f"members of {group} use vfio"
                steps.append(
                    Step("write", path, before=observed["files"][path], after=text, why=why, data=("write", path))
                )
        wrong = [path for path, access in observed["nodes"].items() if access != (observed["gid"], 0o660)]
        if wrong or any(step.object == RULES for step in steps):
            after = dict.fromkeys(wrong, f"{group} 0660")
            why = "so that the rules take effect now"
            before = {path: "gid {} {:04o}".format(*observed["nodes"][path]) for path in wrong}
            steps.append(Step("grant", "vfio nodes", before=before, after=after, why=why, data=("udev",)))
        return steps

    def _reload_udev(self) -> None:
        self.host.run(["udevadm", "control", "--reload"])
        if not self._nodes():
            return
        filters = ["--subsystem-match=vfio", "--subsystem-match=vfio-dev", "--sysname-match=iommu"]
        for each in filters:  # several filters in one call would have to match at once
            self.host.run(["udevadm", "trigger", "--settle", "--action=change", each])
        gid = self._gid(self.desired.get("access_group") or "")
        wrong = [path for path in self._nodes() if self._access(path) != (gid, 0o660)]
        if wrong:
            raise HostError(f"{', '.join(wrong)} did not get group and mode: another udev rule after {RULES} sets them")
