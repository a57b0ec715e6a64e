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
import shlex
import socket
import subprocess
import time
import typing as t

import pytest

OUTSIDE = "10.0.2.2"  # the machine that the lab runs on, as its emulated hosts see it
MANAGEMENT = "10.77.0.11"  # metal1's own address in the lab
SERVICE, AGENT_PORT = 3128, 1024
BRIDGES = {"net-one": "afnet1", "net-two": "afnet2"}
TENANTS = {"net-blue1": "blue", "net-blue2": "blue", "net-red1": "red", "net-alone": "red"}
ATTACHED = {"net-blue1": ["net-one"], "net-blue2": ["net-one"], "net-red1": ["net-one", "net-two"], "net-alone": []}
READY_SECONDS = 900

# In a guest: how a TCP connection ends.
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
    print("open")
except OSError as error:
    print("closed:", error)
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
EXEC = "/usr/local/lib/agentfleet/microvm-exec --timeout 120"


class Guests:
    """The microVMs of this test on metal1."""

    def __init__(self, lab: t.Any, host: t.Any) -> None:
        self.lab, self.host, self.specs = lab, host, {}  # type: t.Any, t.Any, dict[str, t.Any]

    def bring(self, state: str = "running", **egress: t.Any) -> dict[str, t.Any]:
        """Declare all, in a state."""
        networks = [
            {
                "name": "net-one", "bridge": BRIDGES["net-one"], "prefix": "10.90.1.0/24", "prefix6": "fd00:90:1::/64",
                "host_services": [{"port": SERVICE}], **egress,
            },
            {"name": "net-two", "bridge": BRIDGES["net-two"], "prefix": "10.90.2.0/24"},
        ]  # fmt: skip
        instances = [
            {
                "name": name, "image": "agent", "memory": "192MiB", "tenant": tenant,
                "networks": [{"network": network} for network in ATTACHED[name]],
            }
            for name, tenant in TENANTS.items()
        ]  # fmt: skip
        result = self.lab.module(
            "microvm", state=state, instances=instances, networks=networks, memory_overcommit=2.0,
            ready_timeout_seconds=READY_SECONDS,
        )  # fmt: skip
        for name in TENANTS:
            text = self.host.run(f"cat /var/lib/agentfleet/microvms/{name}/spec.json").stdout
            self.specs[name] = json.loads(text) if text else {}
        return t.cast("dict[str, t.Any]", result)

    def interface(self, name: str, number: int = 0) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", self.specs[name]["networks"][number])

    def shell(self, name: str, command: str, stdin: str = "") -> str:
        """Run a command in a guest, over vsock, by the program that the connection plugin uses; what it prints."""
        done = self.host.run(f"{EXEC} {name} {shlex.quote(command)} <<'INPUT'\n{stdin}\nINPUT")
        assert done.rc == 0, f"{name}: {done.stdout} {done.stderr}"
        return str(done.stdout).strip()

    def run(self, name: str, program: str, *arguments: str) -> str:
        """Run Python in a guest; what it prints."""
        return self.shell(name, " ".join(["python3", "-", *arguments]), program)

    def connects(self, name: str, address: str, port: int) -> bool:
        """Whether a TCP connection from a guest opens."""
        told = self.run(name, CONNECT, address, str(port))
        assert told == "open" or told.startswith("closed"), told
        return told == "open"

    def hears(self, receiver: str, *sends: tuple[str, str, str]) -> str:
        """What a guest receives of what others send.

        :param sends: sender, what is spoofed, source address
        """
        self.shell(receiver, "cat >/run/hear.py", HEAR)
        self.shell(receiver, "python3 /run/hear.py >/run/heard 2>&1 & echo $! >/run/hear.pid")
        try:
            self.shell(receiver, "until grep -q listening /run/heard; do sleep 1; done")
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
def guests(lab: t.Any, host: t.Any) -> Guests:
    """The microVMs."""
    return Guests(lab, host)


@pytest.fixture(scope="module")
def outside() -> t.Iterator[int]:
    """A port outside that answers, and is not in the allow-list."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


LEFT: dict[str, str] = {}
LOOK = "ls /sys/class/net; nft list tables; sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding"


def test_all_come_up(guests: Guests) -> None:
    from conftest import FIRST_PORT  # of molecule/

    guests.host.run("systemctl stop net-service; systemctl reset-failed net-service")
    guests.bring("absent")
    LEFT["before"] = guests.host.run(LOOK).stdout
    allowed = [{"prefix": f"{OUTSIDE}/32", "protocol": "tcp", "ports": [str(FIRST_PORT)]}]
    instances = guests.bring(egress="nat", egress_allow=allowed)["instances"]
    assert [one["state"] for one in instances] == ["running"] * 4
    served = guests.host.run(
        f"systemd-run --unit net-service --collect python3 -m http.server {SERVICE} --bind :: --directory /usr/share"
    )
    assert served.rc == 0, served.stderr


def test_ansible_reaches_guests_that_have_no_network(guests: Guests, lab: t.Any) -> None:
    """``ansible agents -m ping``, with the inventory plugin and the connection plugin."""
    from conftest import VARIABLES  # of molecule/

    done = subprocess.run(
        [
            "ansible", "agents:&tenant_red", "-i", "inventories/lab", "-i", "inventories/microvms.yml",
            f"--extra-vars={json.dumps(VARIABLES)}", "-m", "ping",
        ],
        cwd=lab.root, env={**os.environ, "ANSIBLE_CONFIG": str(lab.root / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "net-alone | SUCCESS" in done.stdout and "net-red1 | SUCCESS" in done.stdout
    assert "net-blue1" not in done.stdout
    devices = guests.run("net-alone", "import os; print(*os.listdir('/sys/class/net'))")
    assert devices == "lo"


def test_a_tenant_reaches_itself(guests: Guests) -> None:
    assert guests.connects("net-blue1", guests.interface("net-blue2")["address"], AGENT_PORT)
    heard = guests.hears("net-blue2", ("net-blue1", "own", guests.interface("net-blue1")["address"]))
    assert heard.count("agentfleet own") == 3


def test_a_spoofed_source_is_not_heard(guests: Guests) -> None:
    own, another = (guests.interface(name)["address"] for name in ("net-blue1", "net-red1"))
    heard = guests.hears(
        "net-blue2", ("net-blue1", "address", another), ("net-blue1", "mac", own), ("net-blue1", "own", own)
    )
    assert "agentfleet own" in heard and "agentfleet address" not in heard and "agentfleet mac" not in heard


def test_nobody_takes_the_gateways_address(guests: Guests) -> None:
    own = guests.interface("net-blue1")
    gateway = own["gateway"].partition("/")[0]
    arp = "print(*(x.split()[3] for x in open('/proc/net/arp') if x.split()[0] == __import__('sys').argv[1]))"
    assert guests.connects("net-blue2", gateway, SERVICE)  # the gateway is known
    before = guests.run("net-blue2", arp, gateway)
    guests.frames("net-blue1", "net-blue2", "arp", gateway)
    assert guests.run("net-blue2", arp, gateway) == before != own["mac"]


def test_another_tenant_cannot_be_reached(guests: Guests) -> None:
    blue, red, other = guests.interface("net-blue1"), guests.interface("net-red1"), guests.interface("net-red1", 1)
    assert not guests.connects("net-red1", blue["address"], AGENT_PORT)  # on the same bridge
    assert not guests.connects("net-blue1", red["address"], AGENT_PORT)
    assert not guests.connects("net-blue1", other["address"], AGENT_PORT)  # on another one, through the gateway
    assert guests.hears("net-blue2", ("net-red1", "own", red["address"])) == "listening"


def test_of_the_host_only_declared_services_can_be_reached(guests: Guests) -> None:
    assert guests.host.run(REACH.format(MANAGEMENT, SERVICE)).rc == 0  # it does answer
    gateway, gateway6 = (guests.interface("net-blue1")[key].partition("/")[0] for key in ("gateway", "gateway6"))
    assert guests.connects("net-blue1", gateway, SERVICE) and guests.connects("net-blue1", gateway6, SERVICE)
    assert not guests.connects("net-blue1", gateway, 22)
    assert not guests.connects("net-blue1", MANAGEMENT, 22)
    assert not guests.connects("net-blue1", MANAGEMENT, SERVICE)
    assert not guests.connects("net-red1", guests.interface("net-red1", 1)["gateway"].partition("/")[0], SERVICE)


def test_egress_is_what_is_allowed_and_changes_while_guests_run(guests: Guests, outside: int) -> None:
    from conftest import FIRST_PORT  # of molecule/

    assert guests.host.run(REACH.format(OUTSIDE, outside)).rc == 0  # the host itself reaches it
    assert guests.connects("net-blue1", OUTSIDE, FIRST_PORT)
    assert not guests.connects("net-blue1", OUTSIDE, outside)
    guests.bring(egress="nat")  # everywhere
    assert guests.connects("net-blue1", OUTSIDE, outside)
    assert not guests.connects("net-blue1", MANAGEMENT, 22)
    guests.bring(egress="none")
    assert not guests.connects("net-blue1", OUTSIDE, FIRST_PORT)


def test_rules_come_back_after_somebody_flushed_all(guests: Guests) -> None:
    guests.host.run("nft flush ruleset")
    blue = guests.interface("net-blue1")["address"]
    result = guests.bring(egress="none")
    assert [(step["verb"], step["object"]) for step in result["plan"]] == [("load", "packet filter")]
    assert not guests.connects("net-red1", blue, AGENT_PORT) and guests.connects("net-blue2", blue, AGENT_PORT)


def test_a_guests_reboot_is_survived(guests: Guests) -> None:
    """The connection waits for the guest that comes back; its rules come with its tap device."""
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = guests.shell("net-blue2", boot_id)
    lost = guests.host.run(f"{EXEC} net-blue2 'echo b >/proc/sysrq-trigger; sleep 60'")
    assert lost.rc == 255 and "went away" in lost.stderr
    end = time.monotonic() + READY_SECONDS
    while guests.host.run(f"{EXEC} net-blue2 {boot_id}").stdout.strip() in ("", before):
        assert time.monotonic() < end
    assert guests.connects("net-blue2", guests.interface("net-blue1")["address"], AGENT_PORT)
    assert not guests.connects("net-blue2", guests.interface("net-red1")["address"], AGENT_PORT)


def test_nothing_is_left(guests: Guests) -> None:
    guests.host.run("systemctl stop net-service")
    guests.bring("absent")
    assert guests.host.run(LOOK).stdout == LEFT["before"]
