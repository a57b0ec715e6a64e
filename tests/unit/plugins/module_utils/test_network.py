# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Networks of microVMs: what is derived and kept, what is written and loaded, and the script that makes tap devices."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _network, _network_host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import HOME, LIBRARY, RUN
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

NETWORK: dict[str, t.Any] = {"name": "agents", "bridge": "br0", "prefix": "10.88.0.0/24", "prefix6": "fd00:88::/64"}


def resolve(
    names: t.Sequence[str], before: dict[str, list[_network.Interface]] | None = None, **network: t.Any
) -> dict[str, list[_network.Interface]]:
    networks = _network.Networks([{**NETWORK, **network}])
    wanted = {
        name: {"option": f"instances[{n}]", "tenant": "blue", "networks": networks.wishes("", [{"network": "agents"}])}
        for n, name in enumerate(names)
    }
    return networks.resolve(wanted, before or {})


def test_two_hundred_have_their_own_addresses_macs_and_taps() -> None:
    found = [interfaces[0] for interfaces in resolve([f"a{n}" for n in range(200)]).values()]
    assert (found[0]["address"], found[0]["address6"]) == ("10.88.0.2", "fd00:88::2")
    for key in ("address", "address6", "mac", "tap"):
        assert len({one[key] for one in found}) == 200  # type: ignore[literal-required]
    assert all(len(one["tap"]) <= 15 and int(one["mac"][:2], 16) & 3 == 2 for one in found)


def test_what_was_derived_is_kept_whatever_comes_before() -> None:
    before = resolve(["a1", "a2"])
    after = resolve(["a0", "a2", "a1"], before)
    assert after["a1"] == before["a1"] and after["a2"] == before["a2"]
    assert after["a0"][0]["address"] == "10.88.0.4"


def test_a_mac_or_tap_that_somebody_has_is_derived_anew() -> None:
    mine = resolve(["a1"])["a1"][0]
    other: _network.Interface = {**mine, "address": "10.88.0.9", "address6": "fd00:88::9"}
    found = resolve(["a1"], {"a9": [other]})["a1"][0]
    assert found["mac"] != mine["mac"] and found["tap"] != mine["tap"]
    assert resolve(["a1"], {"a9": [other]})["a1"][0] == found


def test_a_network_may_have_one_family_only() -> None:
    only6 = resolve(["a1"], prefix=None)["a1"]
    assert (only6[0]["address"], only6[0]["gateway"]) == ("", "")
    assert _network.guest_lines(only6) == [f"{only6[0]['mac']} fd00:88::2/64 fd00:88::1"]
    only4 = resolve(["a1"], prefix6=None)["a1"]
    assert _network.guest_lines(only4) == [f"{only4[0]['mac']} 10.88.0.2/24 10.88.0.1"]
    assert "addresses6" not in "".join(text for text, _mode in _network.files_of("a1", only4).values())


def test_the_guest_is_told_both_families_and_one_way_out() -> None:
    one = resolve(["a1"])["a1"][0]
    other: _network.Interface = {**one, "network": "storage", "mac": "02:00:00:00:00:01"}
    assert _network.guest_lines([one, other]) == [
        f"{one['mac']} 10.88.0.2/24,fd00:88::2/64 10.88.0.1,fd00:88::1",
        "02:00:00:00:00:01 10.88.0.2/24,fd00:88::2/64",
    ]
    assert _network.addresses([one]) == ["10.88.0.2", "fd00:88::2"]


def test_link_local_addresses_are_those_of_the_standard() -> None:
    netaddr = pytest.importorskip("netaddr")
    for mac in ("02:00:00:00:00:01", "fe:dc:ba:98:76:54"):
        assert str(_network.link_local(mac)) == str(netaddr.EUI(mac).ipv6_link_local())


def test_what_is_derived_is_what_the_standards_have_for_hosts() -> None:
    netaddr = pytest.importorskip("netaddr")
    networks = {"address": netaddr.IPNetwork("10.88.0.0/28"), "address6": netaddr.IPNetwork("fd00:88::/64")}
    names = [f"a{number}" for number in range(13)]  # all but the network, its broadcast and the host
    found = [one for (one,) in resolve(names, prefix="10.88.0.0/28").values()]
    for key, network in networks.items():
        addresses = {netaddr.IPAddress(one[key]) for one in found}
        assert len(addresses) == len(names) and addresses <= set(itertools.islice(network.iter_hosts(), 64))
        assert {netaddr.IPNetwork(one["gateway" + key[7:]]).ip for one in found}.isdisjoint(addresses)
    macs = [netaddr.EUI(one["mac"]) for one in found]
    assert {mac.words[0] & 0b11 for mac in macs} == {0b10}  # of one device, and of no manufacturer


def test_everything_is_refused_that_is_not_declared() -> None:
    network = next(iter(_network.Networks([NETWORK]).found.values()))
    assert network["policy"] == "# Written by agentfleet.metal. Network agents.\n"


def test_a_policy_is_nft_commands() -> None:
    networks = _network.Networks(
        [
            {
                **NETWORK, "egress": "nat", "host_services": [{"protocol": "udp", "port": 53}],
                "egress_allow": [
                    {"prefix": "192.0.2.0/24", "protocol": "tcp", "ports": [443, "8000-8099", "443"]},
                    {"prefix": "2001:db8::/32", "protocol": "icmp"},
                    {"prefix": "198.51.100.7", "protocol": "udp"},
                    {"prefix": "203.0.113.0/24"},
                ],
            }
        ]
    )  # fmt: skip
    assert networks.found["agents"]["policy"].splitlines()[1:] == [
        'add element inet agentfleet services { "br0" . udp . 53 }',
        "# forwards ipv4",
        "# forwards ipv6",
        "add chain inet agentfleet egress_br0",
        "add rule inet agentfleet egress_br0 ip daddr 192.0.2.0/24 tcp dport { 443, 8000-8099 } accept",
        "add rule inet agentfleet egress_br0 ip6 daddr 2001:db8::/32 meta l4proto icmpv6 accept",
        "add rule inet agentfleet egress_br0 ip daddr 198.51.100.7/32 meta l4proto udp accept",
        "add rule inet agentfleet egress_br0 ip daddr 203.0.113.0/24 accept",
        'add element inet agentfleet egress { "br0" : jump egress_br0 }',
        'add element inet agentfleet nat { "br0" }',
    ]


# -- what is done on the host -------------------------------------------------------


def steps(host: t.Any, interfaces: t.Iterable[_network.Interface], **network: t.Any) -> list[tuple[str, str]]:
    """The steps, after what they write was written."""
    plan = _network.Networks([{**NETWORK, **network}]).plan(host, interfaces)
    for step in plan:
        if step.verb == "define":
            for path, (text, mode) in step.data[1].items():
                host.write(path, text, mode)
            for path in step.data[2]:
                host.remove(path)
    return [(step.verb, step.object) for step in plan]


def test_a_policy_is_written_once(fake_host: t.Any) -> None:
    used = resolve(["a1"])["a1"]
    assert steps(fake_host, []) == []
    assert steps(fake_host, used) == [("define", "network agents")]
    assert steps(fake_host, used) == []


def test_a_policy_that_only_running_microvms_need_is_the_declared_one(fake_host: t.Any) -> None:
    steps(fake_host, resolve(["a1"])["a1"], egress="nat")
    fake_host.files({f"{RUN}/a1.taps": "af1 m1 br0 n0 10.88.0.1/24 -\n"})
    assert steps(fake_host, []) == [("define", "network agents"), ("load", "packet filter")]
    assert "egress" not in fake_host.read(_network_host.policy_path("br0"))


def test_a_changed_policy_is_loaded_while_microvms_run(fake_host: t.Any) -> None:
    used = resolve(["a1"])["a1"]
    steps(fake_host, used)
    fake_host.files({f"{RUN}/a1.taps": "", f"{LIBRARY}/network.nft": _network_host.RULES})
    fake_host.answers["nft -t list table"] = ""
    assert steps(fake_host, used) == []
    assert steps(fake_host, used, egress="nat") == [("define", "network agents"), ("load", "packet filter")]
    fake_host.answers["nft -t list table inet"] = (1, "", "No such file or directory")
    assert steps(fake_host, used, egress="nat") == [("load", "packet filter")]


ROUTES = (
    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
    "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\n"
    "podman0\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\n"
)
ROUTES6 = "fd000088000000000000000000000000 30 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 1 0 1 eth0\n"


@pytest.mark.parametrize(
    ("files", "option", "problem"),
    [
        ({"/proc/net/route": ROUTES}, "networks[0].prefix", "overlaps 10.88.0.0/16, which is behind podman0"),
        ({"/proc/net/ipv6_route": ROUTES6}, "networks[0].prefix6", "overlaps fd00:88::/48, which is behind eth0"),
        ({"/sys/class/net/br0/ifalias": "", "/sys/class/net/br0/address": ""}, "networks[0].bridge", "the host has a"),
    ],
)
def test_what_the_host_has_is_not_taken(fake_host: t.Any, files: dict[str, str], option: str, problem: str) -> None:
    used = resolve(["a1"])["a1"]
    fake_host.files(files)
    with pytest.raises(Refused) as refused:
        steps(fake_host, used)
    assert refused.value.option == option and refused.value.problem.startswith(problem)
    assert steps(fake_host, []) == []  # a network that nobody uses is not made


def test_the_bridge_of_running_microvms_is_no_obstacle(fake_host: t.Any) -> None:
    own = ROUTES.replace("podman0", "br0").replace("0000FFFF", "00FFFFFF")
    fake_host.files({"/proc/net/route": own, "/sys/class/net/br0/ifalias": "agentfleet\n"})
    assert steps(fake_host, resolve(["a1"])["a1"]) == [("define", "network agents")]


def test_missing_programs_are_named_with_their_packages(fake_host: t.Any) -> None:
    fake_host.files({"/usr/sbin/ip": "", "/sbin/bridge": ""})
    assert _network.problem(fake_host) == ("the host has no nft", "Install nftables")
    fake_host.files({"/usr/sbin/nft": ""})
    assert _network.problem(fake_host) is None


FAKE_IP = """\
#!/bin/sh
case "$1 $2" in
"link add") mkdir -p $NET/$4/bridge $NET/$4/brif $CONF/ipv4/conf/$4 ;;
"tuntap add") mkdir -p $NET/$4 ;;
"link delete") rm -rf $NET/$3 $NET/*/brif/$3 ;;
"link set")
    case "$4" in
    alias) echo "$5" >$NET/$3/ifalias ;;
    master) mkdir -p $NET/$5/brif/$3 ;;
    esac ;;
esac
"""


class Script:
    """The script, with an ``ip`` that keeps its devices as directories and an ``nft`` that keeps its input."""

    def __init__(self, root: Path) -> None:
        self.root, self.net, self.run, self.told = root, root / "sys/class/net", root / RUN[1:], root / "nft"
        (root / "bin").mkdir()
        bridges, loaded = root / RUN[1:] / "taps.bridges.nft", root / "loaded"
        told = f"""\
#!/bin/sh
case "$1 $2" in
"get element") exec grep -qsF "bridges $6" {loaded} ;;
*.nft) cp {bridges} {loaded} ;;
esac
cat ${{2#-}} >>{self.told}
"""
        for name, text in (("ip", FAKE_IP), ("nft", told), ("bridge", "#!/bin/sh\n")):
            program = root / "bin" / name
            program.write_text(text)
            program.chmod(0o755)
        self.text = _network_host.TAPS
        for path in ("/sys/class/net", "/proc/sys/net", RUN, HOME, LIBRARY, _network_host.NETWORKS):
            (root / path[1:]).mkdir(parents=True, exist_ok=True)
            self.text = self.text.replace(path, str(root / path[1:]))
        (root / LIBRARY[1:] / "network.nft").write_text("all rules\n")

    def define(self, name: str, taps: str) -> None:
        """Declare a microVM with these taps."""
        home = self.root / HOME[1:] / name
        home.mkdir(exist_ok=True)
        (home / "taps").write_text(taps)
        (home / "taps.nft").write_text(f'add element bridge agentfleet tenants {{ "{taps.split()[0]}" : 0x7 }}\n')

    def __call__(self, *arguments: t.Any, rc: int = 0) -> str:
        """Run it; what nft is told."""
        path = f"{self.root}/bin:/usr/bin:/bin:/usr/sbin"
        environment = {"PATH": path, "NET": str(self.net), "CONF": str(self.root / "proc/sys/net")}
        self.told.write_text("")
        done = subprocess.run(["sh", "-c", self.text, "microvm-taps", *arguments], check=False, env=environment)
        assert done.returncode == rc
        return self.told.read_text()

    def devices(self) -> list[str]:
        return sorted(path.name for path in self.net.iterdir())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """The script, on a host without microVMs."""
    return Script(tmp_path)


@pytest.mark.parametrize("changed", ["", "af9 m9 br9 n9 10.9.0.1/24 -\n"])
def test_taps_of_an_older_definition_are_removed(script: Script, changed: str) -> None:
    script.define("a1", "af1 m1 br0 n0 10.0.0.1/24 -\naf2 m2 br1 n1 10.1.0.1/24 -\n")
    assert script("up", "a1") == "all rules\n"
    assert (script.run / "taps.bridges.nft").read_text().splitlines() == [
        'add element inet agentfleet bridges { "br0" }',
        'add element inet agentfleet routers { "br0" . n0 }',
        'add element inet agentfleet bridges { "br1" }',
        'add element inet agentfleet routers { "br1" . n1 }',
    ]
    assert script.devices() == ["af1", "af2", "br0", "br1"]
    added = 'add element bridge agentfleet tenants { "af1" : 0x7 }\n'
    assert script("up", "a1") == 'delete element bridge agentfleet tenants { "af1" }\n' + added  # live: one transaction
    other = script.root / "change"
    other.mkdir()
    (other / "taps").write_text("af2 m2 br1 n1 10.1.0.1/24 -\n")
    (other / "taps.nft").write_text("")
    script("up", "a1", other / "taps")  # not what the definition says
    assert script.devices() == ["af2", "br1"]
    script("up", "a1")
    assert script.devices() == ["af1", "af2", "br0", "br1"]
    (script.root / HOME[1:] / "a1" / "taps").write_text(changed)
    assert "delete table inet agentfleet" in script("down", "a1")
    assert script.devices() == [] and os.listdir(script.run) == ["taps.lock"]
    assert script("down", "a1") == script("load") == ""


def test_no_bridge_is_used_that_the_filter_does_not_have(script: Script) -> None:
    for number, bridge in enumerate(("br0", "br1", "br1")):
        script.define(f"a{number}", f"af{number} m{number} {bridge} n{number} 10.{number}.0.1/24 -\n")
    script("up", "a0")
    (script.net / "br1").mkdir()  # by an "up" that was ended then
    (script.net / "br1" / "ifalias").write_text("agentfleet\n")
    assert script("up", "a1") == "all rules\n"
    assert script("up", "a2") == 'add element bridge agentfleet tenants { "af2" : 0x7 }\n'


def test_the_first_one_loads_the_filter_whatever_an_older_version_left(script: Script) -> None:
    script.define("a0", "af0 m0 br0 n0 10.0.0.1/24 -\n")
    script("up", "a0")
    for path in script.run.iterdir():
        path.unlink()
    assert script("up", "a0") == "all rules\n"


def test_who_ends_and_waits_in_vain_for_a_turn_is_cleared_up_for_by_the_next(script: Script) -> None:
    script.text = script.text.replace("flock -w 60", "flock -w 0.1")
    for number in range(4):
        script.define(f"a{number}", f"af{number} m{number} br{number} n{number} 10.{number}.0.1/24 -\n")
        script("up", f"a{number}")
    with (script.run / "taps.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script("down", "a0", rc=1)
        script("down", "a1", rc=1)
    told = [f'delete element bridge agentfleet tenants {{ "af{number}" }}\n' for number in range(3)]
    assert script("down", "a2") == "".join(told)
    assert script.devices() == ["af3", "br3"]
    with (script.run / "taps.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script("down", "a3", rc=1)
    assert "delete table inet agentfleet" in script("load")
    assert script.devices() == [] and os.listdir(script.run) == ["taps.lock"]


def test_an_end_that_the_filter_does_not_know_of_loads_it_for_the_others(script: Script) -> None:
    for number in range(2):
        script.define(f"a{number}", f"af{number} m{number} br{number} n{number} 10.{number}.0.1/24 -\n")
        script("up", f"a{number}")
    nft = script.root / "bin" / "nft"
    nft.write_text(nft.read_text() + '[ "$2" != - ]\n')
    assert script("down", "a0").endswith("all rules\n")
    assert script.devices() == ["af1", "br1"]
    assert "br0" not in (script.run / "taps.bridges.nft").read_text()


# -- the rules, on this machine's kernel -----------------------------------------------

LAB = Path(__file__).parents[2] / "network_lab.py"


@pytest.fixture(scope="module")
def seen() -> dict[str, t.Any]:
    """What network_lab.py sees in its own namespaces."""
    missing = [program for program in ("ip", "bridge", "nft", "unshare") if not shutil.which(program)]
    if missing or os.geteuid() or subprocess.run(["unshare", "--net", "--mount", "true"], check=False).returncode:
        pytest.skip(f"needs root and namespaces, and {', '.join(missing) or 'all programs are there'}")
    collections = str(Path(_network.__file__).parents[5])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([collections, *sys.path])}
    done = subprocess.run(
        [sys.executable, str(LAB)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return t.cast("dict[str, t.Any]", json.loads(done.stdout))


ALLOWED = [
    "a frame of its own arrives", "its own to the host", "its own IPv6 address", "its own ARP",
    "its own neighbour advertisement", "its own neighbour advertisement, at the host",
    "LLDP with another's MAC moves nothing", "tenant to itself", "tenant to itself, IPv6", "declared service",
    "declared service, IPv6", "host to guest", "egress, allowed", "egress, allowed range", "egress, allowed, IPv6",
    "others' tables are as they were", "and what is allowed", "answers to the host, without a policy",
    "egress, IPv6, everywhere", "the mark of another bridge's frame",
]  # fmt: skip
STATE = {
    "left behind": ["taps.lock"],
    "without egress": [False, "0", "0"],
    "egress that came while it ran": [True, "1", "1"],
    "whom the outside sees, nat": ["192.0.2.1", "2001:db8::1"],
    "whom the outside sees, routed": ["10.88.0.2", "fd00:88::2"],
    "forwarding is as it was": ["0", "0", "1"],
}


def test_what_is_allowed_works(seen: dict[str, t.Any]) -> None:
    assert {check: seen[check] for check in ALLOWED if seen[check] not in (True, "open")} == {}


def test_nothing_else_does(seen: dict[str, t.Any]) -> None:
    others = {check: outcome for check, outcome in seen.items() if check not in ALLOWED and check not in STATE}
    assert len(others) == 38 and {check for check, outcome in others.items() if outcome in (True, "open")} == set()


def test_nothing_is_left(seen: dict[str, t.Any]) -> None:
    assert {check: seen[check] for check in STATE} == STATE
