# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of microVMs: validation, addresses, MACs, and the tap devices and bridges on the host.

This module is private to the collection and imports nothing of Ansible.

A declared network and an instance's wish become an :class:`Interface`. All that the host does for it when its
microVM starts and stops is in the file ``taps`` of the microVM and in the script that reads it, so that it works
without Ansible.
"""

from __future__ import annotations

import ipaddress
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import HOME, LIBRARY, RUN, derived, home
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

PROGRAMS = ("ip",)


class Interface(t.TypedDict):
    """One network device of a microVM, resolved; a part of its spec."""

    network: str
    bridge: str
    gateway: str  # the host's address on the bridge, with the prefix length
    address: str
    tap: str
    mac: str


class Networks:
    """The declared networks of one call.

    :param declared: the module's option ``networks``
    """

    def __init__(self, declared: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        self.found: dict[str, dict[str, t.Any]] = {}
        for index, network in enumerate(declared):
            self._declare(f"networks[{index}]", network)

    def _declare(self, option: str, network: t.Mapping[str, t.Any]) -> None:
        try:
            prefix = ipaddress.ip_network(network["prefix"])
        except ValueError as error:
            raise Refused(
                f"{option}.prefix", network["prefix"], str(error), "Write a prefix such as 10.88.0.0/24"
            ) from None
        if prefix.num_addresses < 4:
            raise Refused(f"{option}.prefix", network["prefix"], "no room for a microVM", "Use a /30 or shorter")
        if not re.fullmatch(r"[a-z][a-z0-9_.-]{0,14}", network["bridge"]):
            raise Refused(
                f"{option}.bridge", network["bridge"], "not a name of a network device",
                "Use at most 15 of a-z, 0-9 and -",
            )  # fmt: skip
        for other in self.found.values():
            if network["name"] == other["name"] or network["bridge"] == other["bridge"]:
                raise Refused(option, network["name"], "same name or bridge as another network", "Name both uniquely")
            if prefix.version == other["prefix"].version and prefix.overlaps(other["prefix"]):
                raise Refused(
                    f"{option}.prefix", network["prefix"], f"overlaps {other['prefix']}",
                    "Give each network its own prefix",
                )  # fmt: skip
        self.found[network["name"]] = {**network, "prefix": prefix, "gateway": prefix[1]}

    # -- one instance's wishes -------------------------------------------------

    def wishes(self, option: str, attached: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
        """The validated networks of one instance.

        :param option: the instance's option, for errors
        :param attached: its ``networks``
        """
        found: list[dict[str, t.Any]] = []
        for index, wish in enumerate(attached):
            where = f"{option}.networks[{index}]"
            network = self.found.get(wish["network"])
            if network is None:
                raise Refused(
                    f"{where}.network", wish["network"], "not declared",
                    f"Declare it under networks (declared: {', '.join(self.found) or 'none'})",
                )  # fmt: skip
            if wish["network"] in [other["network"] for other in found]:
                raise Refused(f"{where}.network", wish["network"], "attached twice", "Attach a network once")
            if wish["address"] is not None:
                _check_address(f"{where}.address", wish["address"], network)
            found.append({"network": wish["network"], "address": wish["address"]})
        return found

    # -- all instances: from wishes to interfaces ------------------------------

    def resolve(
        self,
        wanted: t.Mapping[str, t.Mapping[str, t.Any]],
        before: t.Mapping[str, t.Sequence[Interface]],
    ) -> dict[str, list[Interface]]:
        """The interfaces of every wanted instance; a derived address is kept while it is valid.

        :param wanted: name -> ``option`` (for errors), ``networks`` (from :meth:`wishes`), ``tenant``
        :param before: name -> interfaces of every microVM of the host, wanted or not
        """
        holders: dict[str, str] = {}
        for name, interfaces in before.items():
            if name not in wanted:
                holders.update({interface["address"]: name for interface in interfaces})
        for name, item in wanted.items():
            for index, wish in enumerate(item["networks"]):
                if wish["address"] in holders:
                    raise Refused(
                        f"{item['option']}.networks[{index}].address", wish["address"],
                        f"microVM {holders[wish['address']]} has it", "Give another address",
                    )  # fmt: skip
                if wish["address"]:
                    holders[wish["address"]] = name
        # What is kept comes before what is new, so that nobody's address depends on the order of the instances.
        kept = {
            (name, interface["network"]): interface["address"] for name in wanted for interface in before.get(name, ())
        }
        for name, item in wanted.items():
            for wish in item["networks"]:
                address = kept.get((name, wish["network"]))
                prefix = self.found[wish["network"]]["prefix"]
                if wish["address"] or not address or address in holders or ipaddress.ip_address(address) not in prefix:
                    kept.pop((name, wish["network"]), None)
                else:
                    holders[address] = name
        free = {
            name: (str(network["prefix"][n]) for n in range(2, min(network["prefix"].num_addresses - 1, 1 << 20)))
            for name, network in self.found.items()
        }
        resolved: dict[str, list[Interface]] = {}
        for name, item in wanted.items():
            resolved[name] = []
            for wish in item["networks"]:
                network = self.found[wish["network"]]
                address = wish["address"] or kept.get((name, wish["network"]))
                address = address or next((a for a in free[wish["network"]] if a not in holders), None)
                if address is None:
                    raise Refused(
                        f"{item['option']}.networks", network["name"], f"no free address in {network['prefix']}",
                        "Use a shorter prefix",
                    )  # fmt: skip
                holders[address] = name
                key = f"{name} {wish['network']}"
                resolved[name].append(
                    {
                        "network": wish["network"],
                        "bridge": network["bridge"],
                        "gateway": f"{network['gateway']}/{network['prefix'].prefixlen}",
                        "address": address,
                        "tap": "af" + derived(key, "tap").hex()[:12],
                        "mac": ":".join(f"{byte:02x}" for byte in b"\x02" + derived(key, "mac")[:5]),
                    }
                )
        return resolved


def _check_address(option: str, value: str, network: t.Mapping[str, t.Any]) -> None:
    prefix = network["prefix"]
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise Refused(option, value, "not an address", f"Give an address of {prefix}") from None
    if address not in prefix:
        raise Refused(option, value, f"outside the prefix {prefix}", f"Give an address of {prefix}")
    if address in (prefix[0], prefix[1], prefix[-1]):
        raise Refused(
            option, value, "is the network's own, the host's or the broadcast address",
            f"Give an address from {prefix[2]} to {prefix[-2]}",
        )  # fmt: skip


def problem(host: Host) -> tuple[str, str] | None:
    """What the host lacks for microVMs with networks, and the remedy."""
    directories = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
    missing = [p for p in PROGRAMS if not any(host.exists(f"{directory}/{p}") for directory in directories)]
    return (f"the host has no {', '.join(missing)}", "Install the package iproute2") if missing else None


def guest_lines(interfaces: t.Sequence[Interface]) -> list[str]:
    """What the guest's first program reads: "MAC address/length [gateway]"; the first network has the way out."""
    lines = []
    for number, interface in enumerate(interfaces):
        gateway, _slash, length = interface["gateway"].partition("/")
        lines.append(f"{interface['mac']} {interface['address']}/{length}" + ("" if number else f" {gateway}"))
    return lines


def addresses(interfaces: t.Sequence[Interface]) -> list[str]:
    """The addresses at which a microVM is reached, the preferred first."""
    return [interface["address"] for interface in interfaces]


# -- on the host -----------------------------------------------------------------


def common() -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what every host with microVMs has for their networks."""
    return {f"{LIBRARY}/microvm-taps": (TAPS, 0o755)}


def files_of(name: str, interfaces: t.Sequence[Interface]) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what one microVM has on the host for its networks."""
    lines = "".join(f"{n['tap']} {n['bridge']} {n['gateway']}\n" for n in interfaces)
    return {f"{home(name)}/taps": (lines, 0o644)}


# ExecStartPre runs "up", ExecStopPost "down". "up" on a running microVM is how networks are added and removed
# live: it makes what is new and removes what is no longer declared.
TAPS = f"""\
#!/bin/sh
# Written by agentfleet.metal. Makes and removes the tap devices and bridges of one microVM.
# The file "taps" has one line for each: tap, bridge, the bridge's address. What was made is kept
# below /run, since the definition may change before the microVM stops.
set -eu
wanted={HOME}/$2/taps
made={RUN}/$2.taps
mkdir -p {RUN}
exec 9>{RUN}/taps.lock
flock -w 60 9
down() {{
    while read -r tap bridge address; do
        [ ! -e "/sys/class/net/$tap" ] || ip link delete "$tap"
        set -- "/sys/class/net/$bridge/brif/"*
        [ -e "$1" ] || [ ! -e "/sys/class/net/$bridge/bridge" ] || ip link delete "$bridge"
    done
}}
[ ! -e "$made" ] || if [ "$1" = up ]; then grep -vxFf "$wanted" "$made" || :; else cat "$made"; fi | down
[ "$1" = up ] || {{ rm -f "$made"; exit 0; }}
cp "$wanted" "$made"
while read -r tap bridge address; do
    if [ ! -e "/sys/class/net/$bridge" ]; then
        ip link add name "$bridge" type bridge
        ip link set "$bridge" up
    fi
    ip address replace "$address" dev "$bridge"
    [ -e "/sys/class/net/$tap" ] || ip tuntap add dev "$tap" mode tap group kvm vnet_hdr
    ip link set "$tap" master "$bridge" alias "microVM $2" up
done <"$made"
"""
