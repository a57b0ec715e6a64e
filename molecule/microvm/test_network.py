# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From inside guests, by trying: other tenants, the host's own addresses and spoofed sources cannot be reached or used.

The probes run in the guests over vsock, by Ansible's own connection and by the program that it uses; one guest has no
network at all. The tests build on each other: each starts from the state that the one before left, and the last leaves
nothing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import typing as t

import pytest

AWAKE = ("net-blue1", "net-blue2", "net-red1", "net-alone")
# Of conftest.py: the machine that the lab runs on, as its hosts see it, and what the host offers to one network.
OUTSIDE, SERVICE = "10.0.2.2", 3128
MANAGEMENT = "10.77.0.11"  # metal1's own address in the lab
AGENT_PORT = 1024
READY_SECONDS = 600

# In a guest: which TCP connections open, all tried at once. Arguments: address and port of each, with a blank between.
CONNECT = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def opens(target):
    address, port = target.split()
    try:
        socket.create_connection((address, int(port)), 5).close()
        return "open"
    except OSError as error:
        return f"closed: {error}"
print(*ThreadPoolExecutor().map(opens, sys.argv[1:]), sep="\\n")
"""
# In a guest: frames by hand. Arguments: what is spoofed, own address, own MAC, target address, target MAC.
SEND = """
import glob, socket, struct, sys
kind, own, mac, target, to = sys.argv[1:]
raw = lambda text: bytes.fromhex(text.replace(":", ""))
device = next(path.split("/")[4] for path in glob.glob("/sys/class/net/*/address") if open(path).read().strip() == mac)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((device, 0))
if kind == "arp":
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + raw(mac) + socket.inet_aton(own) + raw(to) + socket.inet_aton(target)
    frame = raw(to) + raw(mac) + b"\\x08\\x06" + body
else:
    source = raw("02:00:00:00:00:99") if kind == "mac" else raw(mac)
    payload = b"agentfleet " + kind.encode()
    data = struct.pack("!HHHH", 9, 9999, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0, socket.inet_aton(own), socket.inet_aton(target))
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    frame = raw(to) + source + b"\\x08\\x00" + head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + data
for _time in range(3):
    wire.send(frame)
"""
# In a guest: what arrives, one line for each datagram.
HEAR = """
import socket
ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ear.bind(("", 9999))
print("listening", flush=True)
while True:
    data, peer = ear.recvfrom(2048)
    print(data.decode(), "from", peer[0], flush=True)
"""
# On the host: whether a TCP connection opens.
REACH = "timeout 10 bash -c '</dev/tcp/{}/{}'"


class Guests:
    """The microVMs of two tenants on metal1: two of one and two of the other, of which one has no network."""

    def __init__(self, lab: t.Any, host: t.Any, microvms: t.Any, sixteen: t.Any) -> None:
        self.lab, self.host, self.microvms, self.sixteen = lab, host, microvms, sixteen
        self.instances = [one for one in sixteen.instances if one["name"].startswith("net-")]
        self.specs = {
            one["name"]: json.loads(
                host.check_output("cat %s", f"/var/lib/agentfleet/microvms/{one['name']}/spec.json")
            )
            for one in self.instances
        }

    def bring(self, **egress: t.Any) -> dict[str, t.Any]:
        """Declare all, with another egress of their first network."""
        networks = [{**one, **egress} if one["name"] == "net-one" else one for one in self.sixteen.networks]
        if "egress_allow" not in egress:
            networks = [{key: value for key, value in one.items() if key != "egress_allow"} for one in networks]
        return t.cast("dict[str, t.Any]", self.microvms.bring(*self.instances, networks=networks))

    def interface(self, name: str, number: int = 0) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", self.specs[name]["networks"][number])

    def gateway(self, name: str, number: int = 0, key: str = "gateway") -> str:
        """Address of the host on a guest's network."""
        return str(self.interface(name, number)[key].partition("/")[0])

    def shell(self, name: str, command: str, stdin: str = "") -> str:
        """Run a command in a guest; what it prints."""
        return str(self.microvms.inside(name, command, stdin)).strip()

    def run(self, name: str, program: str, *arguments: str) -> str:
        """Run Python in a guest; what it prints."""
        return self.shell(name, shlex.join(["python3", "-IS", "-", *arguments]), program)

    def connects(self, name: str, *targets: tuple[str, int]) -> list[bool]:
        """Which TCP connections from a guest open."""
        told = self.run(name, CONNECT, *(f"{address} {port}" for address, port in targets)).splitlines()
        assert len(told) == len(targets) and all(one.startswith(("open", "closed")) for one in told), told
        return [one == "open" for one in told]

    def hears(self, receiver: str, *sends: tuple[str, str, str]) -> str:
        """What a guest receives of what others send.

        :param sends: sender, what is spoofed, source address
        """
        listen = "cat >/run/hear.py; python3 -IS /run/hear.py >/run/heard 2>&1 & echo $! >/run/hear.pid"
        try:
            self.shell(receiver, f"{listen}; until grep -q listening /run/heard; do sleep 0.2; done", HEAR)
            for sender, kind, source in sends:
                self.frames(sender, receiver, kind, source)
            return self.shell(receiver, "sleep 1; cat /run/heard")
        finally:
            self.shell(receiver, "kill $(cat /run/hear.pid)")

    def frames(self, sender: str, receiver: str, kind: str, source: str) -> None:
        """Send frames by hand from one guest to another."""
        own, target = self.interface(sender), self.interface(receiver)
        self.run(sender, SEND, kind, source, own["mac"], target["address"], target["mac"])


@pytest.fixture(scope="module")
def guests(lab: t.Any, host: t.Any, microvms: t.Any, sixteen: t.Any) -> t.Iterator[Guests]:
    """The microVMs, and a service of the host that answers on all of its addresses."""
    host.run("systemctl stop net-service; systemctl reset-failed net-service")
    serve = f"python3 -m http.server {SERVICE} --bind :: --directory /usr/share"
    host.check_output(f"systemd-run --quiet --unit net-service --collect {serve}")
    yield Guests(lab, host, microvms, sixteen)
    host.run("systemctl stop net-service")


@pytest.fixture(scope="module")
def outside() -> t.Iterator[int]:
    """A port outside that answers, and is not in the allow-list."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_ansible_reaches_guests_that_have_no_network(guests: Guests, lab: t.Any) -> None:
    """``ansible agents -m ping``, with the inventory plugin and the connection plugin."""
    done = subprocess.run(
        [
            "ansible", "agents:&tenant_red", "-i", "inventories/lab", "-i", "inventories/microvms.yml",
            f"--extra-vars={json.dumps(lab.variables)}", "-m", "ping",
        ],
        cwd=lab.root, env={**os.environ, "ANSIBLE_CONFIG": str(lab.root / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "net-alone | SUCCESS" in done.stdout and "net-red1 | SUCCESS" in done.stdout
    assert "net-blue1" not in done.stdout
    assert guests.shell("net-alone", "ls /sys/class/net") == "lo"


def test_a_spoofed_source_is_not_heard_and_a_true_one_is(guests: Guests) -> None:
    own, another = (guests.interface(name)["address"] for name in ("net-blue1", "net-red1"))
    heard = guests.hears(
        "net-blue2", ("net-blue1", "address", another), ("net-blue1", "mac", own), ("net-blue1", "own", own)
    )
    assert heard.count("agentfleet own") == 3
    assert "agentfleet address" not in heard and "agentfleet mac" not in heard


def test_nobody_takes_the_gateways_address(guests: Guests) -> None:
    own, gateway = guests.interface("net-blue1"), guests.gateway("net-blue1")
    arp = f"awk '$1 == \"{gateway}\" {{print $4}}' /proc/net/arp"
    assert guests.connects("net-blue2", (gateway, SERVICE)) == [True]  # the gateway is known
    before = guests.shell("net-blue2", arp)
    guests.frames("net-blue1", "net-blue2", "arp", gateway)
    assert guests.shell("net-blue2", arp) == before != own["mac"]


def test_a_tenant_reaches_itself_and_no_other(guests: Guests) -> None:
    blue, red, other = guests.interface("net-blue1"), guests.interface("net-red1"), guests.interface("net-red1", 1)
    assert guests.connects(
        "net-blue1",
        (guests.interface("net-blue2")["address"], AGENT_PORT),
        (red["address"], AGENT_PORT),
        (other["address"], AGENT_PORT),  # on another bridge, through the gateway
    ) == [True, False, False]
    assert guests.connects("net-red1", (blue["address"], AGENT_PORT)) == [False]  # on the same bridge
    assert guests.hears("net-blue2", ("net-red1", "own", red["address"])) == "listening"


def test_of_the_host_only_declared_services_can_be_reached(guests: Guests) -> None:
    assert guests.host.run(REACH.format(MANAGEMENT, SERVICE)).rc == 0  # it does answer
    gateway = guests.gateway("net-blue1")
    assert guests.connects(
        "net-blue1",
        (gateway, SERVICE),
        (guests.gateway("net-blue1", key="gateway6"), SERVICE),
        (gateway, 22),
        (MANAGEMENT, 22),
        (MANAGEMENT, SERVICE),
    ) == [True, True, False, False, False]
    assert guests.connects("net-red1", (guests.gateway("net-red1", 1), SERVICE)) == [False]


def test_egress_is_what_is_allowed_and_changes_while_guests_run(guests: Guests, outside: int) -> None:
    port = guests.lab.first_port
    assert guests.host.run(REACH.format(OUTSIDE, outside)).rc == 0  # the host itself reaches it
    assert guests.connects("net-blue1", (OUTSIDE, port), (OUTSIDE, outside)) == [True, False]
    guests.bring(egress="nat")  # everywhere
    assert guests.connects("net-blue1", (OUTSIDE, outside), (MANAGEMENT, 22)) == [True, False]
    guests.bring(egress="none")
    assert guests.connects("net-blue1", (OUTSIDE, port)) == [False]


def test_rules_come_back_after_somebody_flushed_all(guests: Guests) -> None:
    guests.host.check_output("nft flush ruleset")
    blue = guests.interface("net-blue1")["address"]
    result = guests.bring(egress="none")
    assert [(step["verb"], step["object"]) for step in result["plan"]] == [("load", "packet filter")]
    assert guests.connects("net-red1", (blue, AGENT_PORT)) == [False]
    assert guests.connects("net-blue2", (blue, AGENT_PORT)) == [True]


def test_a_guests_reboot_is_survived(guests: Guests, microvms: t.Any) -> None:
    """The connection waits for the guest that comes back; its rules come with its tap device."""
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = guests.shell("net-blue2", boot_id)
    lost = microvms.run("net-blue2", "echo b >/proc/sysrq-trigger; sleep 60")
    assert lost.rc != 0 and "went away" in lost.stderr
    end = time.monotonic() + READY_SECONDS
    while microvms.run("net-blue2", boot_id).stdout.strip() in ("", before):
        assert time.monotonic() < end
    assert guests.connects(
        "net-blue2",
        (guests.interface("net-blue1")["address"], AGENT_PORT),
        (guests.interface("net-red1")["address"], AGENT_PORT),
    ) == [True, False]


def test_nothing_is_left(guests: Guests, microvms: t.Any) -> None:
    microvms.bring(*({"name": one["name"]} for one in guests.instances), state="absent")
    assert not [line for line in microvms.left() if re.search("net-(blue|red|alone)|afnet", line)]
