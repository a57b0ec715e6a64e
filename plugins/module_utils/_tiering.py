# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel's own memory tiering: demotion, promotion, weighted interleave and zswap."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._boot import each_alone, persist_apply, persist_plan
from ansible_collections.agentfleet.metal.plugins.module_utils._cxl import (
    WAIT_SECONDS,
    Facts,
    check_memdevs,
    find_memdevs,
    observe_cxl,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._numa import (
    BALANCING,
    DEMOTION,
    RATE_LIMIT,
    WEIGHTS,
    observe_numa,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step

ZSWAP = "/sys/module/zswap/parameters"
UB = "/sys/firmware/acpi/tables/UBRT"
_PERCENT = ("max_pool_percent", "accept_threshold_percent")
_SWITCHES = ("enabled", "shrinker_enabled")
ZSWAP_OPTIONS = ("compressor", "zpool", *_PERCENT, *_SWITCHES)
_TOLERANCE = 0.05  # how far a ratio of weights may be from the ratio of bandwidths


# The options as Ansible checks them; what they mean is in the documentation of the module memory_tiering.
OPTIONS: dict[str, t.Any] = {
    "demotion": {"type": "bool"},
    "numa_balancing": {"type": "int", "choices": [0, 1, 2]},
    "promote_rate_limit_mib": {"type": "int"},
    "interleave_weights": {"type": "raw"},
    "zswap": {
        "type": "dict",
        "options": {
            "enabled": {"type": "bool"},
            "compressor": {"type": "str"},
            "max_pool_percent": {"type": "int"},
            "accept_threshold_percent": {"type": "int"},
            "shrinker_enabled": {"type": "bool"},
            "zpool": {"type": "str"},
        },
    },
    "persist": {"type": "bool", "default": True},
}


class MemoryTiering:
    """Placement policies of the kernel.

    :param desired: options as module ``memory_tiering`` documents them
    """

    def __init__(self, host: Host, desired: Facts) -> None:
        self.host = host
        self.predicting = False
        self.desired = desired
        self.booting = bool(desired.get("wait_seconds"))
        self.notes: list[str] = []
        self.lacking: list[Step] = []
        balancing, limit = desired.get("numa_balancing"), desired.get("promote_rate_limit_mib")
        if balancing not in (None, 0, 1, 2):
            raise Refused("numa_balancing", balancing, "not a mode", "Set 0 (off), 1 (locality) or 2 (tiering)")
        if limit is not None and limit <= 0:
            raise Refused("promote_rate_limit_mib", limit, "not a rate", "Set MiB per second, such as 500")
        if limit is not None and balancing != 2:
            raise Refused(
                "promote_rate_limit_mib",
                limit,
                "only the promotion of numa_balancing 2 has a rate",
                "Set numa_balancing: 2 too, or leave the rate out",
            )
        self.weights = _check_weights(desired.get("interleave_weights"))
        self.zswap = _check_zswap(desired.get("zswap") or {})
        if host.exists(UB):
            for option, value in (("demotion", desired.get("demotion")), ("numa_balancing", balancing)):
                if value:
                    raise Refused(
                        option,
                        value,
                        "this is a UnifiedBus host (ACPI table UBRT), whose remote memory needs NUMA balancing off",
                        "Leave tiering to the UB stack: set numa_balancing 0 and no demotion",
                    )

    def observe(self) -> dict[str, t.Any]:
        """Nodes, policies, and which nodes CXL memory became."""
        if self.desired.get("wait_seconds"):
            try:
                self.host.wait(self._arrived, "memory nodes", float(self.desired["wait_seconds"]))
            except HostError:
                pass  # plan() says which node is missing
        observed = observe_numa(self.host)
        observed["cxl"] = observe_cxl(self.host)
        observed["files"] = {
            path: self.host.read(path) for path in (DEMOTION, BALANCING, RATE_LIMIT) if self.host.exists(path)
        }
        for name in self.host.names(ZSWAP):
            observed["files"][f"{ZSWAP}/{name}"] = self.host.read(f"{ZSWAP}/{name}")
        for path in self.host.glob(f"{WEIGHTS}/*"):
            observed["files"][path] = self.host.read(path)
        return observed

    def _arrived(self) -> bool:
        if not isinstance(self.weights, dict):
            return True
        observed = {**observe_numa(self.host), "cxl": observe_cxl(self.host)}
        return all(_nodes(selector, observed) for selector in self.weights)

    # -- plan ---------------------------------------------------------------

    def plan(self, observed: Facts) -> list[Step]:
        """One step for each file whose value differs."""
        self.notes, self.lacking = [], []
        wanted: list[tuple[str, str, str]] = []
        if self.desired.get("demotion") is not None:
            wanted.append(("demotion", DEMOTION, "true" if self.desired["demotion"] else "false"))
        if self.desired.get("promote_rate_limit_mib") is not None:
            wanted.append(("promote_rate_limit_mib", RATE_LIMIT, str(self.desired["promote_rate_limit_mib"])))
        if self.desired.get("numa_balancing") is not None:
            wanted.append(("numa_balancing", BALANCING, str(self.desired["numa_balancing"])))
        wanted += [(f"zswap.{name}", f"{ZSWAP}/{name}", value) for name, value in self.zswap.items()]
        steps = []
        with each_alone(self.booting, "interleave_weights", self.lacking):
            wanted += self._weights(observed)
        for option, path, value in wanted:
            with each_alone(self.booting, option, self.lacking):
                before = observed["files"].get(path)
                if before is None:
                    remedy = _REMEDIES.get(option, _REMEDIES["zswap"])
                    raise Refused(option, value, f"this kernel has no {path}", remedy)
                if before != value:
                    steps.append(Step("set", path, before, value, data=("set", path, value)))
        if self.desired.get("numa_balancing") == 2 and len(observed["tiers"]) < 2 and not self.predicting:
            self.notes.append("numa_balancing: the host has one memory tier only, so there is nothing to promote from")
        self._note_sysctl()
        return steps + self.lacking + self._persist()

    def _weights(self, observed: Facts) -> list[tuple[str, str, str]]:
        option = "interleave_weights"
        if self.weights is None:
            return []
        auto = f"{WEIGHTS}/auto"
        if self.weights == "auto" and auto in observed["files"]:
            value = observed["files"][auto]
            return [(option, auto, value if value in ("true", "1") else "true")]
        weights: dict[int, int] = {}
        if not isinstance(self.weights, dict):
            weights = self._computed(observed)
        else:
            for selector, weight in self.weights.items():
                nodes = _nodes(selector, observed)
                if not nodes and self.predicting:
                    self.notes.append(f"{option}.{selector}: no such node yet; taken as made by an earlier task")
                elif not nodes:
                    with each_alone(self.booting, f"weight of {selector}", self.lacking):
                        raise Refused(
                            f"{option}.{selector}",
                            weight,
                            "no NUMA node with memory is meant by it",
                            "Bring the memory online as system-ram first (dax_device), or leave the weight out",
                        )
                for node in nodes:
                    if weights.setdefault(node, weight) != weight:
                        raise Refused(f"{option}.{selector}", weight, f"node {node} has two weights", "Name it once")
        return [(option, f"{WEIGHTS}/node{node}", str(weight)) for node, weight in sorted(weights.items())]

    def _computed(self, observed: Facts) -> dict[int, int]:
        """Weights in the ratio of the bandwidths that firmware (HMAT) and devices (CDAT) tell."""
        bandwidths: dict[int, int] = {}
        for node in observed["nodes"]:
            if not node["size_bytes"]:
                continue
            names = {d["region"] for d in observed["cxl"]["dax"] if d["target_node"] == node["id"]}
            regions = [region for region in observed["cxl"]["regions"] if region["name"] in names]
            access = [node["access"].get("access0", {}), *(r["access"].get("access0", {}) for r in regions)]
            known = [
                min(a["read_bandwidth"], a.get("write_bandwidth", a["read_bandwidth"]))
                for a in access
                if "read_bandwidth" in a
            ]
            if not known:
                raise Refused(
                    "interleave_weights",
                    "auto",
                    f"neither firmware (HMAT) nor the device (CDAT) tells the bandwidth of node {node['id']}",
                    "Give weights, such as {cpu: 4, cxl: 1}",
                )
            bandwidths[node["id"]] = known[0]
        return small_ratio(bandwidths)

    def _note_sysctl(self) -> None:
        """A drop-in with another value would win whenever someone runs sysctl --system."""
        wanted = self.desired.get("numa_balancing")
        for path in self.host.glob("/etc/sysctl.d/*.conf") + ["/etc/sysctl.conf"]:
            found = re.search(r"^\s*kernel[./]numa_balancing\s*=\s*(\d+)", self.host.read(path), re.M)
            if found and wanted is not None and int(found.group(1)) != wanted:
                self.notes.append(f"{path} sets kernel.numa_balancing to {found.group(1)}: remove it, or it may win")

    def _persist(self) -> list[Step]:
        if "persist" not in self.desired:
            return []
        wish = {
            key: self.desired[key]
            for key in ("demotion", "numa_balancing", "promote_rate_limit_mib", "interleave_weights", "zswap")
            if self.desired.get(key) not in (None, {})
        }
        if not self.desired["persist"] or not wish:
            return persist_plan(self.host, "tiering", None)
        if wish.get("zswap"):
            wish["zswap"] = {key: value for key, value in wish["zswap"].items() if value is not None}
        return persist_plan(self.host, "tiering", {**wish, "wait_seconds": WAIT_SECONDS})

    # -- apply --------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """Write one file and see that the kernel took the value."""
        if persist_apply(self.host, step):
            return
        _verb, path, value = step.data
        self.host.poke(path, value)
        if self.host.read(path) not in (value, {"true": "1"}.get(value)):
            raise HostError(
                f"the kernel took {value!r} for {path} but has {self.host.read(path)!r} now: it does not know "
                "the value or lacks the module for it (a compressor needs its crypto module)"
            )

    def result(self, observed: Facts) -> dict[str, t.Any]:
        """The policies as they are."""
        zswap = {path.rpartition("/")[2]: value for path, value in observed["files"].items() if path.startswith(ZSWAP)}
        keys = ("tiers", "demotion", "balancing", "promote_rate_limit_mib", "weighted_interleave")
        return {"tiering": {**{key: observed[key] for key in keys}, "zswap": zswap}, "warnings": self.notes}


_REMEDIES = {
    "demotion": "Use a kernel with CONFIG_MIGRATION and NUMA",
    "numa_balancing": "Use a kernel with CONFIG_NUMA_BALANCING",
    "promote_rate_limit_mib": "Use a kernel of version 6.1 or newer, or leave the rate out",
    "interleave_weights": "Use a kernel of version 6.9 or newer, or leave the weights out",
    "zswap": "Use a kernel with CONFIG_ZSWAP, or leave the parameter out (newer kernels dropped zpool)",
}


def small_ratio(values: t.Mapping[int, int]) -> dict[int, int]:
    """The smallest whole numbers, 255 at most, whose ratio is that of the values within 5 percent.

    Where the values are so far apart that no such numbers exist, the closest ones.
    """
    if not values:
        return {}
    least, best, best_error = min(values.values()), dict[int, int](), float("inf")
    for scale in range(1, 256):
        exact = {node: value * scale / least for node, value in values.items()}
        found = {node: min(255, max(1, round(number))) for node, number in exact.items()}
        error = max(abs(found[node] / number - 1) for node, number in exact.items())
        if error < best_error:
            best, best_error = found, error
        if error <= _TOLERANCE or max(exact.values()) > 255:
            break
    return best


def _nodes(selector: str, observed: Facts) -> list[int]:
    """The nodes with memory that a selector means."""
    present = {node["id"]: node for node in observed["nodes"] if node["size_bytes"]}
    if selector == "cpu":
        return [number for number, node in present.items() if node["cpus"]]
    if re.match(r"^node\d+$", selector):
        return [number for number in present if number == int(selector[4:])]
    regions = observed["cxl"]["regions"]
    if selector != "cxl":
        try:
            memdev = find_memdevs("", [selector], observed["cxl"]["memdevs"])[0]
        except Refused:
            return []
        regions = [region for region in regions if memdev["pci_address"] in region["pci_addresses"]]
    names = {region["name"] for region in regions}
    return sorted({d["target_node"] for d in observed["cxl"]["dax"] if d["region"] in names} & set(present))


def _check_weights(value: t.Any) -> dict[str, int] | str | None:
    if value is None or value == "auto":
        return t.cast("str | None", value)
    if not isinstance(value, dict) or not value:
        raise Refused(
            "interleave_weights", value, "neither auto nor weights of nodes", "Write auto, or such as {cpu: 4, cxl: 1}"
        )
    found: dict[str, int] = {}
    for selector, weight in value.items():
        name = str(selector)
        if name not in ("cpu", "cxl") and not re.match(r"^node\d+$", name):
            try:
                name = check_memdevs("memdev", [name])[0]
            except Refused:
                raise Refused(
                    f"interleave_weights.{selector}",
                    selector,
                    "does not select NUMA nodes",
                    "Use cpu, cxl, nodeN, or the serial or PCI address of a CXL memory device",
                ) from None
        if not isinstance(weight, (int, str)) or not re.match(r"^\d+$", str(weight)) or not 1 <= int(weight) <= 255:
            raise Refused(f"interleave_weights.{selector}", weight, "not a weight", "Set a whole number from 1 to 255")
        found[name] = int(weight)
    return found


def _check_zswap(wish: Facts) -> dict[str, str]:
    """zswap parameters as the kernel writes them; ``enabled`` last, so that it starts as declared."""
    found = {}
    for name, value in sorted(wish.items(), key=lambda item: item[0] == "enabled"):
        if value is None:
            continue
        if name not in ZSWAP_OPTIONS:
            raise Refused(f"zswap.{name}", value, "not a parameter of zswap", f"Use {', '.join(ZSWAP_OPTIONS)}")
        if name in _PERCENT and not 0 < int(value) <= 100:
            raise Refused(f"zswap.{name}", value, "not a percentage", "Set a whole number from 1 to 100")
        found[name] = ("Y" if value else "N") if name in _SWITCHES else str(value)
    return found
