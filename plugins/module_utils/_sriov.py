# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SR-IOV: how many virtual functions a physical one has, and how its switch treats them."""

from __future__ import annotations

import re
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

BOOT_WAIT_SECONDS = 60
_PREFIX = re.compile(r"^[0-9a-f][02468ace](:[0-9a-f]{2}){4}$")
_SETTINGS = ("mac", "vlan", "trust", "spoofchk")


# The options as Ansible checks them; what they mean is in the documentation of the module sriov_vfs.
OPTIONS: dict[str, t.Any] = {
    "functions": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "pf": {"type": "str", "required": True},
            "vfs": {"type": "int", "required": True},
            "autoprobe": {"type": "bool", "default": False},
            "mac_prefix": {"type": "str"},
            "vlan": {"type": "int"},
            "trust": {"type": "bool"},
            "spoofchk": {"type": "bool"},
        },
    },
    "destroy_used_vfs": {"type": "bool", "default": False},
}


class SriovVfs:
    """The wish: physical functions, each with its number of VFs and their settings.

    ``desired`` is the module's options. The stored wish has the same form; its
    ``wait_seconds`` makes the boot wait until the functions have their driver.
    """

    predicting = False

    def __init__(self, host: Host, desired: t.Mapping[str, t.Any]) -> None:
        self.host, self.desired = host, desired
        self.wait_seconds = float(desired.get("wait_seconds") or 0)
        self.destroy = bool(desired.get("destroy_used_vfs"))
        self.items = [self._item(f"functions[{i}]", item) for i, item in enumerate(desired.get("functions") or [])]
        self.named: list[str] = []
        self.warnings: list[str] = []

    @staticmethod
    def _item(option: str, item: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        checked = {key: value for key, value in item.items() if value is not None}
        checked["pf"] = _pci.function_of(f"{option}.pf", checked.get("pf", ""))
        if checked["vfs"] < 0:
            raise Refused(f"{option}.vfs", checked["vfs"], "not a number of VFs", "Write 0 for none, or more")
        prefix = str(checked.get("mac_prefix", "")).lower()
        if prefix and not _PREFIX.match(prefix):
            remedy = "Write five bytes of a unicast address, the number of the VF is the sixth: 02:00:00:00:07"
            raise Refused(f"{option}.mac_prefix", checked["mac_prefix"], "not the first five bytes of a MAC", remedy)
        if prefix:
            checked["mac_prefix"] = prefix
        if not 0 <= checked.get("vlan", 0) <= 4094:
            raise Refused(f"{option}.vlan", checked["vlan"], "not a VLAN", "Write 1 to 4094, or 0 for none")
        checked.setdefault("autoprobe", False)
        return checked

    # -- the four verbs -----------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """PCI functions, and the settings of the VFs that are wished for."""
        pfs = [item["pf"] for item in self.items]
        if self.wait_seconds:
            _pci.wait_for(self.host, pfs, self.wait_seconds, with_driver=True)
        functions = _pci.observe_pci(self.host)["functions"]
        return {
            "functions": functions,
            "up": [name for name in self.host.names("/sys/class/net") if self._is_up(name)],
            "settings": {f["address"]: self._settings(f) for f in functions if f["sriov"] and f["netdevs"]}
            if any(len(self._wish(item, 0)) for item in self.items)
            else {},
        }

    def plan(self, observed: dict[str, t.Any]) -> list[Step]:
        """For each function: who probes its VFs, how many they are, then their settings."""
        self.named, self.warnings = [], []
        steps, lacking = list[Step](), list[Step]()
        stored = {item["pf"]: item for item in (wanted(self.host, "sriov") or {}).get("functions", [])}
        present = [function["address"] for function in observed["functions"]]
        for i, item in enumerate(self.items):
            option = f"functions[{i}]"
            if item["vfs"] == 0 and item["pf"] in stored and item["pf"] not in present:
                del stored[item["pf"]]  # hardware that is gone can only be forgotten
                continue
            with each_alone(bool(self.wait_seconds), f"VFs of {item['pf']}", lacking):
                pf = _pci.one([f for f in observed["functions"] if not f["physfn"]], f"{option}.pf", item["pf"])
                address = pf["address"]
                if address in self.named:
                    problem = "an earlier item has this function"
                    raise Refused(f"{option}.pf", item["pf"], problem, "Name each function once")
                self.named.append(address)
                steps += self._function_steps(option, item, pf, observed)
                stored.pop(address, None)
                if item["vfs"]:
                    stored[address] = {**item, "pf": address}
        if self.wait_seconds:
            return steps + lacking
        desired = {"functions": [stored[address] for address in sorted(stored)], "wait_seconds": BOOT_WAIT_SECONDS}
        return steps + persist_plan(self.host, "sriov", desired if stored else None)

    def apply(self, step: Step) -> None:
        """Carry out a step; a number that the driver refuses is undone to the earlier one."""
        if persist_apply(self.host, step):
            return
        kind, address, value = step.data
        path = f"{_pci.DEVICES}/{address}"
        if kind == "autoprobe":
            self.host.poke(f"{path}/sriov_drivers_autoprobe", str(int(value)))
        elif kind == "vfs":
            self._resize(path, value)
        else:
            self._set(address, *value)

    def result(self, observed: dict[str, t.Any]) -> dict[str, t.Any]:
        """The named functions as they are, with the addresses of their VFs."""
        return {
            "functions": [
                {
                    "pf": function["address"],
                    "driver": function["driver"],
                    "totalvfs": function["sriov"]["totalvfs"],
                    "vfs": function["sriov"]["vfs"],
                    "autoprobe": function["sriov"]["autoprobe"],
                }
                for function in observed["functions"]
                if function["address"] in self.named
            ],
            "warnings": self.warnings,
        }

    # -- thinking -----------------------------------------------------------------------

    def _function_steps(
        self, option: str, item: dict[str, t.Any], pf: dict[str, t.Any], observed: dict[str, t.Any]
    ) -> list[Step]:
        address, sriov, vfs = pf["address"], pf["sriov"], item["vfs"]
        if not sriov:
            raise Refused(
                f"{option}.pf", item["pf"], "the function has no SR-IOV", "Turn it on in its firmware, or name another"
            )
        if vfs > sriov["totalvfs"]:
            problem = f"{address} has at most {sriov['totalvfs']} VFs"
            raise Refused(
                f"{option}.vfs", vfs, problem, f"Write 0 to {sriov['totalvfs']}, or raise it in the device's firmware"
            )
        wish = [self._wish(item, number) for number in range(vfs)]
        if any(wish) and not pf["netdevs"]:
            problem = f"{address} has no network interface (driver {pf['driver'] or 'none'})"
            raise Refused(option, sorted(wish[0]), problem, "Leave mac_prefix, vlan, trust and spoofchk out")
        steps = []
        if vfs and sriov["autoprobe"] != item["autoprobe"]:
            why = (
                "the kernel's driver takes new VFs" if item["autoprobe"] else "new VFs are for vfio, not for the kernel"
            )
            data = ("autoprobe", address, item["autoprobe"])
            steps.append(Step("set", f"{address} autoprobe", sriov["autoprobe"], item["autoprobe"], why, data=data))
        if sriov["numvfs"] != vfs:
            self._check_resize(option, pf, vfs, observed)
            why = "the number changes through 0" if sriov["numvfs"] and vfs else ""
            disruptive = bool(sriov["numvfs"])
            data = ("vfs", address, vfs)
            steps.append(Step("resize", f"{address} VFs", sriov["numvfs"], vfs, why, disruptive, data))
            present: list[dict[str, t.Any]] = []
        else:
            present = observed["settings"].get(address, [])
        for number, settings in enumerate(wish):
            now = present[number] if number < len(present) else {}
            before = {key: now.get(key) for key in settings}
            if settings != before:
                data = ("settings", address, (number, settings))
                steps.append(Step("set", f"{address} VF {number}", before, settings, data=data))
        return steps

    def _check_resize(self, option: str, pf: dict[str, t.Any], vfs: int, observed: dict[str, t.Any]) -> None:
        if "vfio" in pf["driver"]:
            remedy = "Give it back to the kernel's driver first (vfio_bind with state=unbound)"
            raise Refused(f"{option}.pf", pf["address"], f"bound to {pf['driver']}", remedy)
        lost = [function for function in observed["functions"] if function["physfn"] == pf["address"]]
        all_go = f"all {len(lost)} VFs would go"

        def listed(uses: t.Callable[[dict[str, t.Any]], list[str]]) -> str:
            return ", ".join(f"{vf['address']} ({'; '.join(uses(vf))})" for vf in lost if uses(vf))

        def fixed(vf: dict[str, t.Any]) -> list[str]:
            uses = vf["in_use"] if vf["boot_critical"] or vf["blockdevs"] else []
            return uses + [f"open in process {user}" for user in vf["users"]]

        kept = listed(fixed)
        if kept:
            remedy = f"End that use first, or keep vfs: {len(lost)}"
            raise Refused(f"{option}.vfs", vfs, f"{all_go}, and these cannot: {kept}", remedy)
        used = listed(lambda vf: vf["in_use"] or [f"{name} is up" for name in vf["netdevs"] if name in observed["up"]])
        if used and not self.destroy:
            remedy = f"End that use, keep vfs: {len(lost)}, or set destroy_used_vfs"
            raise Refused(f"{option}.vfs", vfs, f"{all_go}, and these are in use: {used}", remedy)
        if pf["boot_critical"]:
            self.warnings.append(f"{pf['address']}: {'; '.join(pf['in_use'])}. Its link may drop for some seconds")

    def _is_up(self, netdev: str) -> bool:
        return bool((self.host.read_int(f"/sys/class/net/{netdev}/flags", 0) or 0) & 1)

    @staticmethod
    def _wish(item: dict[str, t.Any], number: int) -> dict[str, t.Any]:
        """The settings of one VF that the wish names."""
        settings = {key: item[key] for key in _SETTINGS if key in item}
        if item.get("mac_prefix"):
            settings["mac"] = f"{item['mac_prefix']}:{number:02x}"
        return settings

    def _settings(self, pf: dict[str, t.Any]) -> list[dict[str, t.Any]]:
        """The settings of a function's VFs, in order, as its switch has them."""
        shown = self.host.run_json(["ip", "-json", "link", "show", "dev", pf["netdevs"][0]])
        return [
            {
                "mac": vf.get("address", vf.get("mac")),
                "vlan": next((vlan.get("vlan", 0) for vlan in vf.get("vlan_list", [])), 0),
                "trust": vf.get("trust"),
                "spoofchk": vf.get("spoofchk"),
            }
            for vf in (shown[0].get("vfinfo_list", []) if shown else [])
        ]

    # -- doing --------------------------------------------------------------------------

    def _resize(self, path: str, vfs: int) -> None:
        numvfs = f"{path}/sriov_numvfs"
        before = self.host.read_int(numvfs, 0) or 0
        try:
            for number in (0, vfs) if before and vfs else (vfs,):
                self.host.poke(numvfs, str(number))
            self.host.wait(lambda: len(self.host.glob(f"{path}/virtfn*")) == vfs, f"{vfs} VFs of {path}", 30)
        except HostError as error:
            now = self.host.read_int(numvfs, 0)
            if now != before:
                self.host.poke(numvfs, "0")
                self.host.poke(numvfs, str(before))
            remedy = "The function's driver decides this; the kernel log says why"
            raise HostError(f"{error}. It has {before} VFs as before. {remedy}") from error

    def _set(self, address: str, number: int, settings: dict[str, t.Any]) -> None:
        netdev = (self.host.names(f"{_pci.DEVICES}/{address}/net") or [""])[0]
        words = {True: "on", False: "off"}
        argv = ["ip", "link", "set", "dev", netdev, "vf", str(number)]
        for key, value in settings.items():
            argv += [key, words[value] if isinstance(value, bool) else str(value)]
        self.host.run(argv)
