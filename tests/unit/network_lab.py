# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of microVMs on a real kernel, in namespaces of their own: the collection's script and rules, and veth pairs
that stand for tap devices and guests. A program: it prints what it found as JSON, {check: outcome}.

Needs root, ``ip``, ``bridge`` and ``nft``; changes nothing outside its namespaces.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
import typing as t
from contextlib import contextmanager

from ansible_collections.agentfleet.metal.plugins.module_utils import _network, _network_host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import HOME, LIBRARY, RUN

NETWORKS = [
    {
        "name": "agents", "bridge": "brone", "prefix": "10.88.0.0/24", "prefix6": "fd00:88::/64",
        "egress": "nat", "egress_allow": [
            {"prefix": "192.0.2.2/32", "protocol": "tcp", "ports": [443, "8000-8001"]},
            {"prefix": "2001:db8::/64", "protocol": "tcp", "ports": [443]},
        ],
        "host_services": [{"protocol": "tcp", "port": 3128}],
    },
    {"name": "closed", "bridge": "brtwo", "prefix": "10.89.0.0/24"},
]  # fmt: skip
GUESTS = {
    "blue1": ("blue", ["agents"]),
    "blue2": ("blue", ["agents"]),
    "red1": ("red", ["agents"]),
    "red2": ("red", ["closed"]),
}
MANAGEMENT, MANAGEMENT6 = "192.0.2.1", "2001:db8::1"
OUTSIDE, OUTSIDE6 = "192.0.2.2", "2001:db8::2"
METADATA6 = "fd00:ec2::254"
BROADCAST = b"\xff" * 6
LIBC = ctypes.CDLL(None, use_errno=True)
found: dict[str, t.Any] = {}


def run(*argv: str, **options: t.Any) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


@contextmanager
def inside(namespace: str) -> t.Iterator[None]:
    """What is made here (a socket) belongs to a guest's network namespace."""
    here, there = os.open("/proc/thread-self/ns/net", 0), os.open(f"/run/netns/{namespace}", 0)
    try:
        LIBC.setns(there, 0)
        yield
    finally:
        LIBC.setns(here, 0)
        os.close(here)
        os.close(there)


def wire(namespace: str) -> socket.socket:
    """All frames of a guest's device."""
    with inside(namespace):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        raw.bind(("eth0", 3))
    return raw


def arrives(sender: str, frame: bytes, receiver: str, part: bytes | None = None) -> bool:
    """Whether a frame that one guest sends comes out at another one (or at the bridge: receiver "host")."""
    with wire(sender) as out:
        if receiver == "host":
            into = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            into.bind(("brone", 3))
        else:
            into = wire(receiver)
        with into:
            out.send(frame)
            end = time.monotonic() + 0.4
            while (left := end - time.monotonic()) > 0 and select.select([into], [], [], left)[0]:
                if (part or frame) in into.recv(65536):
                    return True
    return False


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def arp(source: str, sender: str, address: str, target: str) -> bytes:
    """An ARP reply that says: ``address`` is at ``sender``."""
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + mac(sender) + socket.inet_aton(address)
    return BROADCAST + mac(source) + b"\x08\x06" + body + BROADCAST + socket.inet_aton(target)


def udp(source: str, to: bytes, address: str, target: str, sport: int = 9) -> bytes:
    payload = b"agentfleet-test!"
    data = struct.pack("!HHHH", sport, 9, 8 + len(payload), 0) + payload
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(data), 17, 64) + ip.packed + ipaddress.ip_address(target).packed
        return to + mac(source) + b"\x86\xdd" + head + data
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0, ip.packed, socket.inet_aton(target))
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return to + mac(source) + b"\x08\x00" + head + data


def icmp6(source: str, to: bytes, address: str, target: str, kind: int, body: bytes) -> bytes:
    pseudo = ipaddress.ip_address(address).packed + ipaddress.ip_address(target).packed
    message = struct.pack("!BBH", kind, 0, 0) + body
    total = checksum(pseudo + struct.pack("!II", len(message), 58) + message)
    message = message[:2] + struct.pack("!H", total) + message[4:]
    return to + mac(source) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + pseudo + message


def connects(namespace: str, address: str, port: int) -> str:
    """``open``, ``refused`` at once, or ``silent``: a TCP connection from a guest (or the outside)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(namespace):
        client = socket.socket(family)
    with client:
        client.settimeout(0.7)
        try:
            client.connect((address, port))
        except TimeoutError:
            return "silent"
        except OSError as error:
            return f"refused ({error.strerror})"
        return "open"


def listen(namespace: str | None, *ports: int) -> None:
    """Servers on all addresses; the kernel accepts for them."""
    for port in ports:
        for family in (socket.AF_INET, socket.AF_INET6):
            server = None
            if namespace is None:
                server = socket.socket(family)
            else:
                with inside(namespace):
                    server = socket.socket(family)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind(("::" if family == socket.AF_INET6 else "", port))
            server.listen(64)
            KEPT.append(server)


KEPT: list[socket.socket] = []


def write(path: str, text: str, mode: int = 0o644) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)


def interfaces() -> dict[str, list[_network.Interface]]:
    networks = _network.Networks(NETWORKS)
    wanted = {
        name: {"option": name, "tenant": tenant, "networks": networks.wishes(name, [{"network": n} for n in attached])}
        for name, (tenant, attached) in GUESTS.items()
    }
    resolved = networks.resolve(wanted, {})
    for network in networks.found.values():
        write(_network_host.policy_path(network["bridge"]), network["policy"])
    for name, ones in resolved.items():
        for path, (text, mode) in _network.files_of(f"{HOME}/{name}/taps", ones).items():
            write(path, text, mode)
    return resolved


def guest_up(name: str, one: _network.Interface) -> None:
    """What a microVM's first program does."""
    peer = "p" + one["tap"][2:]
    run("ip", "netns", "add", name)
    run("ip", "link", "set", peer, "netns", name, "address", one["mac"])
    shell = [f"ip link set {peer} name eth0", "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad",
             "ip link set lo up", "ip link set eth0 up"]  # fmt: skip
    for address, gateway in ((one["address"], one["gateway"]), (one["address6"], one["gateway6"])):
        if address:
            host, _slash, length = gateway.partition("/")
            shell += [f"ip address add {address}/{length} dev eth0", f"ip route add default via {host} dev eth0"]
    run("ip", "netns", "exec", name, "sh", "-ec", "\n".join(shell))


def script(verb: str, name: str = "") -> None:
    run(f"{LIBRARY}/microvm-taps", verb, name)


def main() -> None:
    for path in ("/run", HOME.rpartition("/")[0], LIBRARY.rpartition("/")[0]):
        os.makedirs(path, exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", path)
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    for path, (text, mode) in _network_host.FILES.items():
        if path.startswith(LIBRARY):
            # Pairs of veth devices stand for tap devices and the guests behind them.
            text = text.replace(
                'ip tuntap add dev "$tap" mode tap group kvm vnet_hdr', 'ip link add "$tap" type veth peer "p${tap#af}"'
            )
            write(path, text, mode)
    run("nft", "add table ip somebody; add chain ip somebody else { type filter hook input priority 0; }")
    others = run("nft", "list", "table", "ip", "somebody")
    run("ip", "link", "set", "lo", "up")
    run("ip", "netns", "add", "outside")
    run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", "outside")
    run("sh", "-ec", "echo 0 | tee /proc/sys/net/ipv6/conf/*/accept_dad")
    for where, address, address6 in (
        ([], MANAGEMENT, MANAGEMENT6),
        (["ip", "netns", "exec", "outside"], OUTSIDE, OUTSIDE6),
    ):
        device = "eth0" if where else "up0"
        for words in (f"address add {address}/24", f"address add {address6}/64 nodad"):
            run(
                *where,
                "ip",
                *words.replace(" nodad", "").split(),
                "dev",
                device,
                *(["nodad"] if "nodad" in words else []),
            )
        run(*where, "ip", "link", "set", device, "up")
    run("ip", "netns", "exec", "outside", "ip", "route", "add", "10.88.0.0/24", "via", MANAGEMENT)
    run("ip", "netns", "exec", "outside", "ip", "address", "add", f"{METADATA6}/128", "dev", "eth0", "nodad")
    run("ip", "route", "add", "fd00:ec2::/32", "via", OUTSIDE6)
    guests = interfaces()
    for name in guests:
        script("up", name)
        for one in guests[name]:
            guest_up(name, one)
    listen(None, 22, 3128)
    listen("outside", 443, 8001, 80)
    for name in guests:
        listen(name, 7000)
    time.sleep(0.3)
    look(guests)
    found["others' tables are as they were"] = run("nft", "list", "table", "ip", "somebody") == others
    run("nft", "flush", "ruleset")
    script("load")
    found["rules are back after a flush"] = connects("red1", guests["blue1"][0]["address"], 7000)
    found["and what is allowed"] = connects("blue2", guests["blue1"][0]["address"], 7000)
    found["without egress"] = egress("none")
    found["egress that came while it ran"] = egress("nat")
    run("ip", "netns", "exec", "outside", "ip", "route", "add", "fd00:88::/64", "via", MANAGEMENT6)
    found["whom the outside sees, routed"] = whom("routed")
    for address in _network.addresses(guests["blue1"]):
        found[f"outside to {address}, routed"] = connects("outside", address, 7000)
    found["whom the outside sees, nat"] = whom("nat")
    found["egress, IPv6, everywhere"] = connects("blue1", OUTSIDE6, 80)
    found["a cloud's metadata, IPv6"] = connects("blue1", METADATA6, 80)
    found["outside to guest, untracked"] = untracked(guests["blue1"][0])
    found["the mark of another bridge's frame"] = marked()
    os.unlink(_network_host.policy_path("brone"))
    script("load")
    for port in (22, 3128):
        found[f"host port {port}, without a policy"] = connects("blue1", "10.88.0.1", port)
    found["egress, without a policy"] = connects("blue1", OUTSIDE, 443)
    found["answers to the host, without a policy"] = host_to(guests["blue1"][0])
    for name in guests:
        script("down", name)
    left = [x for x in os.listdir("/sys/class/net") if x.startswith(("af", "br"))]
    found["left behind"] = left + run("nft", "list", "tables").splitlines() + os.listdir(RUN)
    found["forwarding is as it was"] = switches()


def switches() -> list[str]:
    """Whether the host forwards IPv4 and IPv6, and heeds router advertisements."""
    ipv6 = "/proc/sys/net/ipv6/conf"
    return run("cat", "/proc/sys/net/ipv4/ip_forward", f"{ipv6}/all/forwarding", f"{ipv6}/up0/accept_ra").split()


def egress(policy: str) -> list[t.Any]:
    """Change a network while guests run; whether one of them gets out then, and whether the host forwards."""
    changed = {**NETWORKS[0], "egress": policy, "egress_allow": []}
    network = next(iter(_network.Networks([changed]).found.values()))
    write(_network_host.policy_path(network["bridge"]), network["policy"])
    script("load")
    return [connects("blue1", OUTSIDE, 80) == "open", *switches()[:2]]


def whom(policy: str) -> list[str]:
    """Change a network; the addresses that a guest of it has for servers outside."""
    egress(policy)
    seen = []
    for address in (OUTSIDE, OUTSIDE6):
        with inside("outside"):
            server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        with server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, 4000))
            server.listen()
            server.settimeout(0.7)
            outcome = connects("blue1", address, 4000)
            seen.append(server.accept()[1][0] if outcome == "open" else outcome)
    return seen


def untracked(one: _network.Interface) -> bool:
    """From the outside to a guest where somebody has the host track no connections."""
    run(
        "nft",
        "add table ip raw; add chain ip raw pre { type filter hook prerouting priority raw; }; add rule ip raw pre notrack",
    )
    here = run("cat", "/sys/class/net/up0/address").strip()
    frame = udp("02:00:00:00:00:03", mac(here), OUTSIDE, one["address"])
    came = arrives("outside", frame, "blue1", b"agentfleet-test!")
    run("nft", "delete table ip raw")
    return came


def marked() -> bool:
    """Whether what others mark on a bridge of theirs is marked when it leaves."""
    run("ip", "link", "add", "other0", "type", "bridge")
    run("ip", "link", "set", "other0", "up")
    for name in ("one", "two"):
        run("ip", "netns", "add", name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", name, "master", "other0", "up")
        run("ip", "netns", "exec", name, "ip", "link", "set", "eth0", "up")
    run(
        "nft",
        "add table bridge others;"
        "add chain bridge others pre { type filter hook prerouting priority 0; meta mark set 7; };"
        "add chain bridge others post { type filter hook postrouting priority 0; meta mark != 7 drop; };",
    )
    came = arrives("one", BROADCAST + mac("02:00:00:00:00:01") + b"\x88\xb5" + b"agentfleet-test!" * 4, "two")
    run("nft", "delete table bridge others")
    run("ip", "link", "delete", "other0")
    return came


def look(guests: dict[str, list[_network.Interface]]) -> None:
    blue1, blue2, red1, _red2 = (guests[name][0] for name in GUESTS)
    to = {name: mac(guests[name][0]["mac"]) for name in GUESTS}
    gateway = mac(_network.bridge_mac("brone"))
    own = udp(blue1["mac"], to["blue2"], blue1["address"], blue2["address"])
    found["a frame of its own arrives"] = arrives("blue1", own, "blue2")
    found["a spoofed source address"] = arrives(
        "blue1", udp(blue1["mac"], to["blue2"], red1["address"], blue2["address"]), "blue2"
    )
    found["a spoofed source address to the host"] = arrives(
        "blue1", udp(blue1["mac"], gateway, "10.88.0.99", "10.88.0.1"), "host"
    )
    found["its own to the host"] = arrives("blue1", udp(blue1["mac"], gateway, blue1["address"], "10.88.0.1"), "host")
    found["a spoofed MAC"] = arrives(
        "blue1", udp(red1["mac"], to["blue2"], blue1["address"], blue2["address"]), "blue2"
    )
    found["a spoofed IPv6 address"] = arrives(
        "blue1", udp(blue1["mac"], to["blue2"], red1["address6"], blue2["address6"]), "blue2"
    )
    found["its own IPv6 address"] = arrives(
        "blue1", udp(blue1["mac"], to["blue2"], blue1["address6"], blue2["address6"]), "blue2"
    )
    found["its own ARP"] = arrives(
        "blue1", arp(blue1["mac"], blue1["mac"], blue1["address"], blue2["address"]), "blue2"
    )
    found["ARP for another's address"] = arrives(
        "blue1", arp(blue1["mac"], blue1["mac"], "10.88.0.1", blue2["address"]), "blue2"
    )
    found["ARP with another's MAC in it"] = arrives(
        "blue1", arp(blue1["mac"], red1["mac"], blue1["address"], blue2["address"]), "blue2"
    )
    everybody = b"\x33\x33\0\0\0\x01"
    here = str(_network.link_local(blue1["mac"]))
    for title, kind, target in (("its own neighbour advertisement", 136, blue1["address6"]),
                                ("a neighbour advertisement for the gateway", 136, "fd00:88::1"),
                                ("a router advertisement", 134, "fd00:88::1")):  # fmt: skip
        body = bytes(4) + ipaddress.ip_address(target).packed
        frame = icmp6(blue1["mac"], everybody, here, "ff02::1", kind, body)
        found[title] = arrives("blue1", frame, "blue2")
        found[f"{title}, at the host"] = arrives("blue1", frame, "host")
    found["a DHCP offer"] = arrives(
        "blue1", udp(blue1["mac"], BROADCAST, blue1["address"], "255.255.255.255", 67), "blue2"
    )
    found["a VLAN tag"] = arrives("blue1", own[:12] + b"\x81\0\0\x01" + own[12:], "blue2", b"agentfleet-test!")
    found["an unknown protocol"] = arrives(
        "blue1", to["blue2"] + mac(blue1["mac"]) + b"\x88\xb5" + b"agentfleet-test!", "blue2"
    )
    found["another tenant's frame on the same bridge"] = arrives(
        "red1", udp(red1["mac"], to["blue1"], red1["address"], blue1["address"]), "blue1")  # fmt: skip
    found["another tenant's broadcast"] = arrives(
        "red1", arp(red1["mac"], red1["mac"], red1["address"], blue1["address"]), "blue1"
    )
    link_local_group = b"\x01\x80\xc2\0\0\x0e"
    arrives("red1", link_local_group + to["blue2"] + b"\x88\xcc" + bytes(46), "blue1")
    found["LLDP with another's MAC moves nothing"] = connects("blue1", blue2["address"], 7000)

    found["tenant to itself"] = connects("blue1", blue2["address"], 7000)
    found["tenant to itself, IPv6"] = connects("blue1", blue2["address6"], 7000)
    found["tenant to another, same bridge"] = connects("red1", blue1["address"], 7000)
    found["tenant to another, same bridge, IPv6"] = connects("red1", blue1["address6"], 7000)
    found["tenant to another, other bridge"] = connects("red2", blue1["address"], 7000)
    found["tenant to itself, other bridge"] = connects("red2", red1["address"], 7000)
    found["to the other bridge's gateway"] = connects("red2", "10.88.0.1", 3128)
    run("ip", "netns", "exec", "red1", "ip", "route", "add", f"{blue1['address']}/32", "via", "10.88.0.1")
    found["tenant to another, through the gateway"] = connects("red1", blue1["address"], 7000)
    found["host's management address"] = connects("blue1", MANAGEMENT, 22)
    found["host's management address, IPv6"] = connects("blue1", MANAGEMENT6, 22)
    found["declared service at the management address"] = connects("blue1", MANAGEMENT, 3128)
    found["declared service"] = connects("blue1", "10.88.0.1", 3128)
    found["declared service, IPv6"] = connects("blue1", "fd00:88::1", 3128)
    found["undeclared service"] = connects("blue1", "10.88.0.1", 22)
    found["undeclared service, closed network"] = connects("red2", "10.89.0.1", 3128)
    found["host to guest"] = host_to(blue1)
    found["egress, allowed"] = connects("blue1", OUTSIDE, 443)
    found["egress, allowed range"] = connects("blue1", OUTSIDE, 8001)
    found["egress, allowed, IPv6"] = connects("blue1", OUTSIDE6, 443)
    found["egress, not allowed"] = connects("blue1", OUTSIDE, 80)
    found["egress, closed network"] = connects("red2", OUTSIDE, 443)
    found["outside to guest"] = connects("outside", blue1["address"], 7000)
    found["the host stays no router"] = router()


def host_to(one: _network.Interface) -> str:
    with socket.socket() as client:
        client.settimeout(0.7)
        try:
            client.connect((one["address"], 7000))
        except OSError as error:
            return str(error)
        return "open"


def router() -> str:
    """From the outside through the host to another of its networks."""
    run("ip", "netns", "add", "storage")
    run("ip", "link", "add", "st0", "type", "veth", "peer", "name", "eth0", "netns", "storage")
    run("ip", "address", "add", "198.51.100.1/24", "dev", "st0")
    run("ip", "link", "set", "st0", "up")
    for words in ("address add 198.51.100.2/24 dev eth0", "link set eth0 up", "route add default via 198.51.100.1"):
        run("ip", "netns", "exec", "storage", "ip", *words.split())
    run("ip", "netns", "exec", "outside", "ip", "route", "add", "198.51.100.0/24", "via", MANAGEMENT)
    listen("storage", 443)
    return connects("outside", "198.51.100.2", 443)


if __name__ == "__main__":
    if "--inside" not in sys.argv:
        os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, __file__, "--inside"])
    main()
    json.dump(found, sys.stdout, indent=1)
