# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of microVMs: validation, addresses and MACs, and what the host's packet filter is told about them.

This module is private to the collection and imports nothing of Ansible.

A declared network and an instance's wish become an :class:`Interface`. What the host does for it is in files that
the script of ``_network_host`` reads when the microVM starts and stops, so that it works without Ansible.
"""

from __future__ import annotations

import ipaddress
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _network_host as on_host
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import derived, pending
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused, Step

Prefix = t.Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

# Program -> Debian's package of it.
PROGRAMS = {"ip": "iproute2", "bridge": "iproute2", "nft": "nftables"}
EGRESS = ("none", "nat", "routed")
PROTOCOLS = ("tcp", "udp", "icmp", "any")
# Option of a network -> option of an attachment, IP version.
FAMILIES = (("prefix", "address", 4), ("prefix6", "address6", 6))
DEVICE = re.compile(r"[a-z][a-z0-9_.-]{0,14}")
NETWORK = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
DEVICES = "/sys/class/net"
DIRECTORIES = on_host.DIRECTORIES
attached, in_use = on_host.attached, on_host.in_use


class Interface(t.TypedDict):
    """One network device of a microVM, resolved; a part of its spec. An address that it has not is empty."""

    network: str
    tenant: str
    bridge: str
    gateway: str  # the host's address on the bridge, with the prefix length
    gateway6: str
    address: str
    address6: str
    tap: str
    mac: str


class Network(t.TypedDict):
    """A declared network, validated."""

    name: str
    option: str
    bridge: str
    prefixes: dict[str, Prefix]  # "prefix" and "prefix6", those that it has
    policy: str  # file that tells the packet filter


class Networks:
    """The declared networks of one call.

    :param declared: the module's option ``networks``
    """

    def __init__(self, declared: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        self.found: dict[str, Network] = {}
        for index, network in enumerate(declared):
            self._declare(f"networks[{index}]", network)

    def _declare(self, option: str, network: t.Mapping[str, t.Any]) -> None:
        name, bridge = network["name"], network["bridge"]
        if not NETWORK.fullmatch(name):
            raise Refused(f"{option}.name", name, "not a name of a network", "Use 1 to 32 of a-z, 0-9, _, . and -")
        if not DEVICE.fullmatch(bridge):
            raise Refused(
                f"{option}.bridge", bridge, "not a name of a network device",
                "Use at most 15 of a-z, 0-9 and -, beginning with a letter",
            )  # fmt: skip
        prefixes = {
            key: _prefix(f"{option}.{key}", network[key], version)
            for key, _address, version in FAMILIES
            if network.get(key) is not None
        }
        if not prefixes:
            raise Refused(f"{option}.prefix", None, "no addresses", "Give prefix, prefix6 or both")
        for other in self.found.values():
            if name == other["name"] or bridge == other["bridge"]:
                raise Refused(option, name, "same name or bridge as another network", "Name both uniquely")
            for key, prefix in prefixes.items():
                if key in other["prefixes"] and _overlap(prefix, other["prefixes"][key]):
                    raise Refused(
                        f"{option}.{key}", str(prefix), f"overlaps {other['prefixes'][key]}",
                        "Give each network its own prefix",
                    )  # fmt: skip
        policy = _policy(option, network, prefixes)
        self.found[name] = {"name": name, "option": option, "bridge": bridge, "prefixes": prefixes, "policy": policy}

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
            resolved: dict[str, t.Any] = {"network": wish["network"], "mac": _mac(f"{where}.mac", wish.get("mac"))}
            for key, address, _version in FAMILIES:
                value = wish.get(address)
                resolved[address] = None if value is None else _address(f"{where}.{address}", value, network, key)
            found.append(resolved)
        return found

    # -- all instances: from wishes to interfaces ------------------------------

    def resolve(
        self,
        wanted: t.Mapping[str, t.Mapping[str, t.Any]],
        before: t.Mapping[str, t.Sequence[Interface]],
        held: t.Sequence[tuple[str, Interface]] = (),
    ) -> dict[str, list[Interface]]:
        """The interfaces of every wanted instance; what was derived before is kept while it is valid.

        :param wanted: name -> ``option`` (for errors), ``networks`` (from :meth:`wishes`), ``tenant``
        :param before: name -> interfaces of every microVM of the host, wanted or not
        :param held: (name, interface) of those that run with what may be declared otherwise now; each may keep its own
        """
        others = [(name, one) for name, interfaces in before.items() if name not in wanted for one in interfaces]
        self._check_others(others)
        _check_marks(wanted, others)
        kept = {(name, one["network"]): one for name in wanted for one in before.get(name, ())}
        chosen = {
            key: self._addresses(key, address, wanted, [*held, *others], kept)
            for key, address, _version in FAMILIES
        }  # fmt: skip
        taken = {
            "mac": {one["mac"]: name for name, one in others}
            | {bridge_mac(one["bridge"]): f"the bridge {one['bridge']}" for one in self.found.values()},
            "tap": {one["tap"]: name for name, one in others},
        }
        macs = {one["mac"]: name for name, one in held}
        resolved: dict[str, list[Interface]] = {}
        for name, item in wanted.items():
            resolved[name] = []
            for index, wish in enumerate(item["networks"]):
                network = self.found[wish["network"]]
                where = (name, wish["network"])
                holder = taken["mac"].get(wish["mac"], macs.get(wish["mac"], name))
                if wish["mac"] in taken["mac"] or holder != name:
                    raise Refused(
                        f"{item['option']}.networks[{index}].mac", wish["mac"],
                        f"{holder} has it", "Give another MAC, or leave it out to have one derived",
                    )  # fmt: skip
                key = " ".join(where)
                mac = wish["mac"] or _unused(taken["mac"], key, _derived_mac)
                tap = _unused(taken["tap"], key, _derived_tap)
                taken["mac"][mac] = taken["tap"][tap] = name
                gateways = {
                    family: f"{network['prefixes'][family][1]}/{network['prefixes'][family].prefixlen}"
                    if family in network["prefixes"] else ""
                    for family, _address, _version in FAMILIES
                }  # fmt: skip
                resolved[name].append(
                    {
                        "network": wish["network"],
                        "tenant": item["tenant"],
                        "bridge": network["bridge"],
                        "gateway": gateways["prefix"],
                        "gateway6": gateways["prefix6"],
                        "address": chosen["prefix"].get(where, ""),
                        "address6": chosen["prefix6"].get(where, ""),
                        "tap": tap,
                        "mac": mac,
                    }
                )
        return resolved

    def _check_others(self, others: t.Sequence[tuple[str, Interface]]) -> None:
        """A network that other microVMs are on keeps its bridge and prefixes."""
        for name, one in others:
            for network in self.found.values():
                same = one["network"] == network["name"], one.get("bridge") == network["bridge"]
                if same == (False, False):
                    continue
                for key, gateway in (("prefix", "gateway"), ("prefix6", "gateway6")):
                    prefix = network["prefixes"].get(key)
                    has = one.get(gateway, "")
                    if same != (True, True) or str(has) != (f"{prefix[1]}/{prefix.prefixlen}" if prefix else ""):
                        raise Refused(
                            f"{network['option']}.{key}", str(prefix or ""),
                            f"microVM {name} is on the bridge {one['bridge']} of network {one['network']}"
                            f" with the gateway {has or 'none'}",
                            "Change a network together with all microVMs on it, or declare another one",
                        )  # fmt: skip

    def _addresses(
        self,
        key: str,
        address: str,
        wanted: t.Mapping[str, t.Mapping[str, t.Any]],
        others: t.Sequence[tuple[str, Interface]],
        kept: t.Mapping[tuple[str, str], Interface],
    ) -> dict[tuple[str, str], str]:
        """(instance, network) -> address of one family: first what is asked for, then what is kept, then what is free.

        So nobody's address depends on the order of the instances.
        """
        holders = {str(one.get(address)): name for name, one in others if one.get(address)}
        chosen: dict[tuple[str, str], str] = {}
        attached = [
            (name, item["option"], index, wish, self.found[wish["network"]]["prefixes"][key])
            for name, item in wanted.items()
            for index, wish in enumerate(item["networks"])
            if key in self.found[wish["network"]]["prefixes"]
        ]
        for name, option, index, wish, _prefix_of in attached:
            if wish[address]:
                if holders.get(wish[address], name) != name:
                    raise Refused(
                        f"{option}.networks[{index}].{address}", wish[address],
                        f"microVM {holders[wish[address]]} has it",
                        "Give another address; one that a running microVM is to leave is free after its restart",
                    )  # fmt: skip
                chosen[name, wish["network"]] = wish[address]
                holders[wish[address]] = name
        for name, _option, _index, wish, prefix in attached:
            where = (name, wish["network"])
            before = str(kept[where].get(address, "")) if where in kept else ""
            mine = holders.get(before, name) == name
            if where not in chosen and before and mine and ipaddress.ip_address(before) in prefix:
                chosen[where] = before
                holders[before] = name
        free = {
            name: _free(network["prefixes"][key]) for name, network in self.found.items() if key in network["prefixes"]
        }
        for name, option, _index, wish, prefix in attached:
            if (name, wish["network"]) in chosen:
                continue
            found = next((one for one in free[wish["network"]] if one not in holders), None)
            if found is None:
                raise Refused(
                    f"{option}.networks", wish["network"], f"no free address in {prefix}", "Use a shorter prefix"
                )
            chosen[name, wish["network"]] = found
            holders[found] = name
        return chosen

    # -- the host: what is there, and what is to be written ----------------------

    def check_host(self, host: Host, used: t.Collection[str]) -> None:
        """Refuse a bridge or a prefix that the host has for something else.

        :param used: the networks that microVMs are on
        """
        routes = connected(host)
        for name, network in self.found.items():
            if name not in used:
                continue
            bridge = network["bridge"]
            if host.exists(f"{DEVICES}/{bridge}") and host.read(f"{DEVICES}/{bridge}/ifalias") != on_host.ALIAS:
                raise Refused(
                    f"{network['option']}.bridge", bridge, "the host has a network device of this name",
                    "Choose another name; a bridge of microVMs is made and removed with them",
                )  # fmt: skip
            for key, prefix in network["prefixes"].items():
                for route, device in routes:
                    if device != bridge and _overlap(prefix, route):
                        raise Refused(
                            f"{network['option']}.{key}", str(prefix), f"overlaps {route}, which is behind {device}",
                            "Choose a prefix that the host does not use",
                        )  # fmt: skip

    def plan(self, host: Host, interfaces: t.Iterable[Interface]) -> list[Step]:
        """Write the policies of all networks that are used, and load what running microVMs need.

        :param interfaces: of all microVMs that the host will have
        """
        used = {one["network"] for one in interfaces}
        self.check_host(host, used)
        running = {bridge for _name, bridge in on_host.attached(host)}
        files = {
            on_host.policy_path(network["bridge"]): network["policy"]
            for name, network in self.found.items()
            if name in used or network["bridge"] in running
        }
        steps = []
        for path, text in files.items():
            before = host.read(path)
            if before != text.strip():
                steps.append(
                    Step("define", f"network {_name_of(text)}", before=before or None, after=text,
                         data=("", {path: (text, 0o644)}, []))
                )  # fmt: skip
        unread = steps or on_host.stale(host) or host.exists(pending("load"))
        if on_host.in_use(host) and (unread or not on_host.loaded(host)):
            steps.append(Step("load", "packet filter", why="microVMs with networks are running"))
        return steps


def unused_policies(host: Host, bridges: t.Iterable[str]) -> list[str]:
    """Policies of networks that no microVM is on.

    :param bridges: the bridges of all microVMs' networks
    """
    keep = {on_host.policy_path(bridge) for bridge in bridges}
    return [path for path in host.glob(on_host.policy_path("*")) if path not in keep]


def connected(host: Host) -> list[tuple[Prefix, str]]:
    """The prefixes that are directly behind the host's network devices."""
    found: list[tuple[Prefix, str]] = []
    for line in host.read("/proc/net/route").splitlines()[1:]:
        device, target, gateway, _flags, _count, _use, _metric, mask = line.split()[:8]
        if int(gateway, 16) == 0 and int(mask, 16):
            address, length = (int.from_bytes(bytes.fromhex(x)[::-1], "big") for x in (target, mask))
            found.append((ipaddress.IPv4Network((address, bin(length).count("1"))), device))
    for line in host.read("/proc/net/ipv6_route").splitlines():
        fields = line.split()
        prefix = ipaddress.IPv6Network((bytes.fromhex(fields[0]), int(fields[1], 16)), strict=False)
        # Not the local table's own addresses and multicast, and no link-local addresses, which every device has.
        if (
            not int(fields[4], 16)
            and 0 < prefix.prefixlen < 128
            and not prefix.is_multicast
            and not prefix.is_link_local
        ):
            found.append((prefix, fields[9]))
    return found


# -- validation --------------------------------------------------------------------


def _prefix(option: str, value: str, version: int) -> Prefix:
    example = "10.88.0.0/24" if version == 4 else "fd00:88::/64"
    try:
        prefix = ipaddress.ip_network(value)
    except ValueError as error:
        raise Refused(option, value, str(error), f"Write a prefix such as {example}") from None
    if prefix.version != version:
        other = "prefix" if prefix.version == 4 else "prefix6"
        raise Refused(option, value, f"not an IPv{version} prefix", f"Write it as {other}, or one such as {example}")
    if prefix.num_addresses < 4:
        raise Refused(option, value, "no room for a microVM", f"Use a /{prefix.max_prefixlen - 2} or shorter")
    if prefix.is_multicast or prefix.is_loopback or prefix.is_link_local or prefix.is_unspecified:
        raise Refused(option, value, "not for hosts", f"Use a private prefix such as {example}")
    return prefix


def _overlap(one: Prefix, other: Prefix) -> bool:
    return one.version == other.version and one.overlaps(t.cast(t.Any, other))


def _free(prefix: Prefix) -> t.Iterator[str]:
    """The addresses that a microVM may have, in order; a search is bounded."""
    last = min(prefix.num_addresses - (prefix.version == 4), 1 << 20)
    return (str(prefix[number]) for number in range(2, last))


def _address(option: str, value: str, network: Network, key: str) -> str:
    prefix = network["prefixes"].get(key)
    if prefix is None:
        raise Refused(option, value, f"network {network['name']} has no {key}", f"Give the network one, or no {key}")
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise Refused(option, value, "not an address", f"Give an address of {prefix}") from None
    if address not in prefix:
        raise Refused(option, value, f"outside the prefix {prefix}", f"Give an address of {prefix}")
    if address in (prefix[0], prefix[1]) or (prefix.version == 4 and address == prefix[-1]):
        raise Refused(
            option, value, "is the network's own, the host's or the broadcast address",
            f"Give an address from {prefix[2]} to {prefix[-2]}",
        )  # fmt: skip
    return str(address)


def _mac(option: str, value: str | None) -> str | None:
    if value is None:
        return None
    mac = value.lower().replace("-", ":")
    if not MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or not int(mac.replace(":", ""), 16):
        raise Refused(option, value, "not the MAC of one device", "Write one such as 02:00:0a:58:00:02")
    return mac


def _derived_mac(key: str) -> str:
    """A locally administered MAC."""
    return ":".join(f"{byte:02x}" for byte in b"\x02" + derived(key, "mac")[:5])


def bridge_mac(bridge: str) -> str:
    """A bridge's own MAC: without one it takes that of a port, and guests lose their gateway when it goes."""
    return _derived_mac(f"bridge {bridge}")


def _derived_tap(key: str) -> str:
    return "af" + derived(key, "tap").hex()[:12]


def _unused(taken: t.Mapping[str, str], key: str, make: t.Callable[[str], str]) -> str:
    """The first derived value that nobody has; a second one is made for one of 2**40 names."""
    return next(value for n in range(1 << 16) for value in [make(f"{key} {n}" if n else key)] if value not in taken)


def mark(tenant: str) -> int:
    """The number by which the packet filter knows a tenant; never 0."""
    return int.from_bytes(derived(tenant, "tenant")[:4], "big") or 1


def _check_marks(wanted: t.Mapping[str, t.Mapping[str, t.Any]], others: t.Sequence[tuple[str, Interface]]) -> None:
    tenants = {mark(str(one.get("tenant"))): str(one.get("tenant")) for _name, one in others}
    for item in wanted.values():
        tenant = item["tenant"]
        if tenants.setdefault(mark(tenant), tenant) != tenant:
            raise Refused(
                f"{item['option']}.tenant", tenant, f"the packet filter cannot tell it from {tenants[mark(tenant)]}",
                "Name one of them differently",
            )  # fmt: skip


# -- policies ------------------------------------------------------------------------


def _policy(option: str, network: t.Mapping[str, t.Any], prefixes: t.Mapping[str, Prefix]) -> str:
    """The nft commands that admit what a network may do; without them everything is refused."""
    egress, allowed, bridge = network.get("egress") or "none", network.get("egress_allow") or [], network["bridge"]
    if egress not in EGRESS:
        raise Refused(f"{option}.egress", egress, "unknown policy", f"Use one of {', '.join(EGRESS)}")
    if egress == "none" and allowed:
        raise Refused(
            f"{option}.egress_allow", allowed, "nothing leaves a network whose egress is none", "Use nat or routed"
        )
    versions = sorted(prefix.version for prefix in prefixes.values())
    lines = [f"# Written by agentfleet.metal. Network {network['name']}."]
    services = set()
    for index, service in enumerate(network.get("host_services") or []):
        where = f"{option}.host_services[{index}]"
        if service["protocol"] not in ("tcp", "udp"):
            raise Refused(f"{where}.protocol", service["protocol"], "has no ports", "Use tcp or udp")
        if not 1 <= service["port"] <= 65535:
            raise Refused(f"{where}.port", service["port"], "not a port", "Give 1 to 65535")
        services.add((service["protocol"], service["port"]))
    lines += [on_host.element("services", f'"{bridge}" . {protocol} . {port}') for protocol, port in sorted(services)]
    if egress == "none":
        return "\n".join(lines) + "\n"
    rules = [
        rule for index, one in enumerate(allowed) for rule in _rules(f"{option}.egress_allow[{index}]", one, versions)
    ]
    chain = f"egress_{bridge}"
    lines += [f"{on_host.FORWARDS} ipv{version}" for version in versions]
    lines.append(f"add chain inet agentfleet {chain}")
    rules = rules if allowed else [f"meta nfproto ipv{version}" for version in versions]
    lines += [f"add rule inet agentfleet {chain} {rule} accept" for rule in rules]
    lines.append(on_host.element("egress", f'"{bridge}" : jump {chain}'))
    if egress == "nat":
        lines.append(on_host.element("nat", f'"{bridge}"'))
    return "\n".join(lines) + "\n"


def _rules(option: str, allowed: t.Mapping[str, t.Any], versions: t.Sequence[int]) -> list[str]:
    """One item of an allow-list as matches."""
    protocol, ports = allowed.get("protocol") or "any", allowed.get("ports") or []
    if protocol not in PROTOCOLS:
        raise Refused(f"{option}.protocol", protocol, "unknown protocol", f"Use one of {', '.join(PROTOCOLS)}")
    if ports and protocol not in ("tcp", "udp"):
        raise Refused(f"{option}.ports", ports, f"{protocol} has no ports", "Give the protocol tcp or udp with ports")
    spans = []
    for index, port in enumerate(ports):
        first, dash, last = str(port).partition("-")
        numbers = [int(x) if x.isdigit() else 0 for x in ([first, last] if dash else [first])]
        if not all(1 <= n <= 65535 for n in numbers) or numbers != sorted(set(numbers)):
            raise Refused(f"{option}.ports[{index}]", port, "not a port or a range", "Write 443 or 8000-8099")
        spans.append("-".join(map(str, numbers)))
    try:
        prefix = ipaddress.ip_network(allowed["prefix"])
    except ValueError as error:
        raise Refused(
            f"{option}.prefix", allowed["prefix"], str(error), "Write a prefix such as 192.0.2.0/24 or 2001:db8::/32"
        ) from None
    if prefix.version not in versions:
        raise Refused(
            f"{option}.prefix", allowed["prefix"], f"the network has no IPv{prefix.version}",
            f"Give it a {'prefix' if prefix.version == 4 else 'prefix6'}",
        )  # fmt: skip
    match = f"{'ip' if prefix.version == 4 else 'ip6'} daddr {prefix}"
    if protocol == "icmp":
        return [f"{match} meta l4proto {'icmp' if prefix.version == 4 else 'icmpv6'}"]
    if spans:
        return [f"{match} {protocol} dport {{ {', '.join(dict.fromkeys(spans))} }}"]
    return [match if protocol == "any" else f"{match} meta l4proto {protocol}"]


def _name_of(policy: str) -> str:
    return policy.partition("Network ")[2].partition(".\n")[0]


# -- what others ask ---------------------------------------------------------------


def problem(host: Host) -> tuple[str, str] | None:
    """What the host lacks for microVMs with networks, and the remedy."""
    missing = [p for p in PROGRAMS if not host.has_program(p)]
    packages = " and ".join(dict.fromkeys(PROGRAMS[p] for p in missing))
    return (f"the host has no {', '.join(missing)}", f"Install {packages}") if missing else None


def guest_lines(interfaces: t.Sequence[Interface]) -> list[str]:
    """What the guest's first program reads: "MAC address/length[,address6/length] [gateway[,gateway6]]".

    The first network has the way out.
    """
    lines = []
    for number, one in enumerate(interfaces):
        pairs = [(one["address"], one["gateway"]), (one.get("address6", ""), one.get("gateway6", ""))]
        pairs = [pair for pair in pairs if pair[0]]
        addresses_of = ",".join(f"{address}/{gateway.partition('/')[2]}" for address, gateway in pairs)
        gateways = ",".join(gateway.partition("/")[0] for _address, gateway in pairs)
        lines.append(f"{one['mac']} {addresses_of}" + ("" if number else f" {gateways}"))
    return lines


def addresses(interfaces: t.Sequence[Interface]) -> list[str]:
    """The addresses at which a microVM is reached, the preferred first."""
    return [one[key] for one in interfaces for key in ("address", "address6") if one.get(key)]


def counters(host: Host, interface: Interface) -> dict[str, int]:
    """What a guest has received and sent; what it receives its tap device sends."""
    directory = f"{DEVICES}/{interface['tap']}/statistics"
    return {
        f"{guest}_{name}": host.read_int(f"{directory}/{tap}_{key}") or 0
        for guest, tap in (("rx", "tx"), ("tx", "rx"))
        for name, key in (("bytes", "bytes"), ("frames", "packets"))
    }


def link_local(mac: str) -> ipaddress.IPv6Address:
    """The address that a device gives itself (modified EUI-64)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return ipaddress.IPv6Address(
        b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    )


def common() -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what every host with microVMs has for their networks."""
    return on_host.FILES


def files_of(path: str, interfaces: t.Sequence[Interface]) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what the script that makes tap devices reads of one microVM, in ``path`` and ``path``.nft."""
    lines, rules = "", ""
    for one in interfaces:
        gateways = f"{one['gateway'] or '-'} {one.get('gateway6') or '-'}"
        lines += f"{one['tap']} {one['mac']} {one['bridge']} {bridge_mac(one['bridge'])} {gateways}\n"
        tap, number = f'"{one["tap"]}"', f"{mark(one.get('tenant', '')):#x}"
        elements = [("taps", tap), ("tenants", f"{tap} : {number}"), ("members", f"{tap} . {number}")]
        if one["address"]:
            elements.append(("addresses4", f"{tap} . {one['mac']} . {one['address']}"))
        if one.get("address6"):
            for address in (ipaddress.IPv6Address(one["address6"]), link_local(one["mac"])):
                elements.append(("addresses6", f"{tap} . {one['mac']} . {address}"))
                elements.append(("targets", f"{tap} . {one['mac']} . {int(address):#x}"))
        rules += "".join(f"add element bridge agentfleet {key} {{ {value} }}\n" for key, value in elements)
    return {path: (lines, 0o644), f"{path}.nft": (rules, 0o644)}
