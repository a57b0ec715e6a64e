# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of microVM networks, as texts: the packet filter's rules, and the script that makes tap devices.

This module is private to the collection and imports nothing of Ansible.

The rules are the same for any number of microVMs: what differs is in sets and maps, to which a microVM's start adds
its tap devices and its end takes them away. Everything here works without Ansible, and touches no other table.
"""

from __future__ import annotations

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import HOME, LIBRARY, RUN, SYSTEM

NETWORKS = "/var/lib/agentfleet/networks"
ALIAS = "agentfleet"  # of a bridge that is ours
FORWARDS = "# forwards"  # marks a policy for which the host must forward: "# forwards ipv4"

RULES = f"""\
# Written by agentfleet.metal. Packet filter of microVMs: puts all of it anew in place of what is loaded, in one
# transaction. Elements come from a file for each network, a file for each microVM that runs, and one for their bridges.
table bridge agentfleet {{}}
table inet agentfleet {{}}
delete table bridge agentfleet
delete table inet agentfleet

# Between the ports of a bridge: who may say he is whom, and who may talk to whom.
table bridge agentfleet {{
    set taps {{ type ifname; }}
    map tenants {{ type ifname : mark; }}
    set members {{ type ifname . mark; }}
    set addresses4 {{ type ifname . ether_addr . ipv4_addr; }}
    set addresses6 {{ type ifname . ether_addr . ipv6_addr; }}
    set targets {{ typeof iifname . ether saddr . @th,64,128; }}

    chain prerouting {{
        type filter hook prerouting priority dstnat; policy accept;
        iifname @taps jump from_guest
    }}
    # Every frame of a guest has its own MAC and one of its own addresses.
    chain from_guest {{
        ether type arp goto from_guest_arp
        ether type ip iifname . ether saddr . ip saddr @addresses4 goto from_guest_ip4
        ether type ip6 iifname . ether saddr . ip6 saddr @addresses6 goto from_guest_ip6
        drop
    }}
    chain from_guest_arp {{
        arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation {{ request, reply }} \\
            iifname . ether saddr . arp saddr ip @addresses4 \\
            iifname . arp saddr ether . arp saddr ip @addresses4 accept
        drop
    }}
    chain from_guest_ip4 {{
        meta l4proto igmp drop
        udp sport 67 drop
    }}
    # @th,64,128 is the target of a neighbour message.
    chain from_guest_ip6 {{
        udp sport 547 drop
        icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 @targets accept
        icmpv6 type {{ nd-neighbor-advert, nd-router-advert, nd-redirect, mld-listener-query }} drop
    }}
    # From tap to tap only within a tenant. The mark lives from here to the next line; those of other bridges are others'.
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname != @taps oifname != @taps accept
        meta mark set 0 meta mark set iifname map @tenants oifname . meta mark @members accept
        iifname @taps drop
        oifname @taps drop
    }}
}}

# Between a bridge and the rest of the host and of the world.
table inet agentfleet {{
    set bridges {{ type ifname; }}
    set routers {{ type ifname . ether_addr; }}
    set services {{ type ifname . inet_proto . inet_service; }}
    set nat {{ type ifname; }}
    map egress {{ type ifname : verdict; }}
    set guarded {{ type nf_proto; }}

    chain input {{
        type filter hook input priority filter - 1; policy accept;
        iifname @bridges jump to_host
    }}
    # Answers, neighbours, ping, and declared services; on the bridge's own addresses and no other of the host.
    chain to_host {{
        ct direction reply ct state established,related accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept
        fib daddr . iif type != local goto refuse
        icmp type echo-request accept
        icmpv6 type echo-request accept
        iifname . meta l4proto . th dport @services accept
        goto refuse
    }}
    # What is not for the bridge's own MAC is bridged: with br_netfilter it comes here, and is decided above.
    chain forward {{
        type filter hook forward priority filter - 1; policy accept;
        iifname @bridges iifname . ether daddr != @routers accept
        iifname @bridges jump from_bridge
        oifname @bridges ct direction reply ct state established,related accept
        oifname @bridges goto refuse
        iifname != @bridges oifname != @bridges meta nfproto @guarded goto guard
    }}
    # A cloud's metadata service is at a link-local address, with IPv6 at one of Amazon's, Google's or Oracle's own.
    chain from_bridge {{
        oifname @bridges goto refuse
        ip daddr 169.254.0.0/16 goto refuse
        ip6 daddr {{ fd00:ec2::/32, fd20:ce::254, fd00:c1::a9fe:a9fe }} goto refuse
        iifname vmap @egress
        goto refuse
    }}
    # Where the host forwards only because of microVMs, it does not become a router between its other networks.
    chain guard {{
        ct state established,related accept
        ct status dnat accept
        drop
    }}
    chain refuse {{
        meta pkttype {{ broadcast, multicast }} drop
        ct state invalid drop # an error would end the connection that it may belong to
        reject with icmpx type admin-prohibited
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        iifname @nat oifname != @bridges masquerade
    }}
}}

include "{NETWORKS}/*.nft"
include "{RUN}/*.nft"
"""

# ExecStartPre runs "up", ExecStopPost "down". "up" on a running microVM is how networks are added and removed
# live: it makes what is new and removes what is not in the file that it is given.
TAPS = f"""\
#!/bin/sh
# Written by agentfleet.metal. microvm-taps up NAME [FILE], down NAME: makes and removes the tap devices of one
# microVM, and the bridges that no other one needs. microvm-taps load: the packet filter anew.
# FILE is by default "taps" where its definition is. It has one line for each: tap, its MAC, bridge, its MAC, the bridge's
# addresses (or "-"); FILE.nft tells the packet filter. What was made is kept below /run, since the definition may change
# before the end.
set -eu
wanted=${{3-{HOME}/${{2-}}/taps}}
made={RUN}/${{2-}}
[ "$1" != down ] || [ -e "$made.taps" ] || exit 0
[ "$1" != up ] || [ -s "$wanted" ] || [ -e "$made.taps" ] || exit 0
mkdir -p {RUN}
[ "$1" != down ] || : >"$made.gone"
exec 9>{RUN}/taps.lock
flock -w 60 9

# All of the packet filter anew. Which bridges it is for, those tell that run: where no policy is (any more), all is refused.
load() {{
    awk '!seen[$3]++ {{
        print "add element inet agentfleet bridges {{ \\"" $3 "\\" }}"
        print "add element inet agentfleet routers {{ \\"" $3 "\\" . " $4 " }}"
    }}' {RUN}/*.taps >{RUN}/taps.bridges.nft
    nft -f {LIBRARY}/network.nft
}}

# FAMILY SWITCH: the host forwards while a network that microVMs run on needs it. If it did not before, the rules keep it
# from forwarding anything else.
forward() {{
    wish=$(awk '{{ print "{NETWORKS}/" $3 ".nft" }}' {RUN}/*.taps 2>/dev/null | sort -u)
    if [ -n "$wish" ] && grep -qsx "{FORWARDS} $1" $wish; then
        [ "$(cat "$2")" = 0 ] || return 0
        if [ "$1" = ipv6 ]; then # a host that forwards heeds router advertisements only where this is 2
            grep -lx 1 /proc/sys/net/ipv6/conf/*/accept_ra >{RUN}/accept_ra || :
            while read -r file; do echo 2 >"$file"; done <{RUN}/accept_ra
        fi
        echo "add element inet agentfleet guarded {{ $1 }}" >{RUN}/forward.$1.nft
        load
        echo 1 >"$2"
    elif [ -e "{RUN}/forward.$1.nft" ]; then
        echo 0 >"$2"
        rm {RUN}/forward.$1.nft
        [ "$1" = ipv6 ] || return 0
        while read -r file; do [ ! -e "$file" ] || echo 1 >"$file"; done <{RUN}/accept_ra
        rm {RUN}/accept_ra
    fi
}}

forwarding() {{
    forward ipv4 /proc/sys/net/ipv4/ip_forward
    forward ipv6 /proc/sys/net/ipv6/conf/all/forwarding
}}

bridge_up() {{ # BRIDGE MAC ADDRESS ADDRESS6
    if [ ! -e "/sys/class/net/$1" ]; then
        ip link add name "$1" address "$2" type bridge mcast_snooping 0
        ip link set "$1" alias {ALIAS}
        echo 1 >"/proc/sys/net/ipv4/conf/$1/arp_ignore" # do not tell guests the host's other addresses
        if [ -e "/proc/sys/net/ipv6/conf/$1" ]; then
            echo 0 >"/proc/sys/net/ipv6/conf/$1/accept_ra"
            [ "$4" != - ] || echo 1 >"/proc/sys/net/ipv6/conf/$1/disable_ipv6"
        fi
        fresh=yes
    fi
    # Who made it may have been ended before it had the filter loaded, without which guests reach all of the host.
    nft get element inet agentfleet bridges "{{ \\"$1\\" }}" >/dev/null 2>&1 || fresh=yes
    [ "$(cat "/sys/class/net/$1/ifalias")" = {ALIAS} ] || {{ echo "$1: not a bridge of microVMs" >&2; exit 1; }}
    ip link set "$1" up
    [ "$3" = - ] || ip address replace "$3" dev "$1"
    [ "$4" = - ] || ip address replace "$4" dev "$1" nodad
}}

down() {{
    while read -r tap _mac bridge _rest; do
        [ ! -e "/sys/class/net/$tap" ] || ip link delete "$tap"
        set -- "/sys/class/net/$bridge/brif/"*
        [ -e "$1" ] || [ "$(cat "/sys/class/net/$bridge/ifalias" 2>/dev/null)" != {ALIAS} ] || ip link delete "$bridge"
    done
}}

delete() {{ # MADE
    [ ! -e "$1.nft" ] || sed 's/^add/delete/; s/ : .*/ }}/' "$1.nft"
}}

# Takes away what those had that have ended. Each leaves a mark and then waits for its turn: of many that end at once the
# first takes all away, and who waits in vain has it taken away by the next.
clear() {{
    set -- {RUN}/*.gone
    [ -e "$1" ] || return 0
    for gone; do
        [ ! -e "${{gone%.gone}}.taps" ] || down <"${{gone%.gone}}.taps" || :
    done
    failed=
    for gone; do delete "${{gone%.gone}}"; done | nft -f - || failed=yes # the table may be gone
    for gone; do rm -f "${{gone%.gone}}.taps" "${{gone%.gone}}.nft" "$gone"; done
    forwarding
    set -- {RUN}/*.taps
    if [ -e "$1" ]; then
        [ -z "$failed" ] || load
        return
    fi
    rm -f {RUN}/taps.bridges.nft
    for family in bridge inet; do
        printf '%s\\n' "table $family agentfleet {{}}" "delete table $family agentfleet"
    done | nft -f -
}}

clear
case $1 in
load)
    set -- {RUN}/*.taps
    [ -e "$1" ] || exit 0
    load
    forwarding
    exit
    ;;
down) exit ;;
esac

change=$(delete "$made"; cat "$wanted.nft")
[ ! -e "$made.taps" ] || {{ grep -vxFf "$wanted" "$made.taps" || :; }} | down
fresh=
ls {RUN}/*.taps >/dev/null 2>&1 || fresh=yes # whatever is loaded: its policies were not kept up to date
cp "$wanted" "$made.taps"
cp "$wanted.nft" "$made.nft"
while read -r _tap _mac bridge bridge_mac address address6; do
    bridge_up "$bridge" "$bridge_mac" "$address" "$address6"
done <"$made.taps"
# The filter knows a tap device before there is one. It is loaded with the first, and for each bridge that it does not have.
[ -n "$fresh" ] || echo "$change" | nft -f - || fresh=yes
[ -z "$fresh" ] || load
forwarding
while read -r tap mac bridge _rest; do
    [ -e "/sys/class/net/$tap" ] || ip tuntap add dev "$tap" mode tap group kvm vnet_hdr
    [ ! -e "/proc/sys/net/ipv6/conf/$tap" ] || echo 1 >"/proc/sys/net/ipv6/conf/$tap/disable_ipv6"
    ip link set "$tap" master "$bridge" alias "microVM $2" up
    # The bridge learns nothing from guests: it knows where each MAC is.
    ip link set "$tap" type bridge_slave learning off flood off
    bridge fdb replace "$mac" dev "$tap" master static
done <"$made.taps"
"""

# Debian's nftables.service begins with "flush ruleset", which takes the rules of all others with it.
RELOADED = f"""\
# Written by agentfleet.metal. This service flushes all tables, also those of microVMs.
[Service]
ExecStartPost=-{LIBRARY}/microvm-taps load
ExecReload=-{LIBRARY}/microvm-taps load
ExecStopPost=-{LIBRARY}/microvm-taps load
"""

# Path -> (text, mode)
FILES = {
    f"{LIBRARY}/microvm-taps": (TAPS, 0o755),
    f"{LIBRARY}/network.nft": (RULES, 0o644),
    f"{SYSTEM}/nftables.service.d/60-agentfleet.conf": (RELOADED, 0o644),
}
# Where others may have files, too.
DIRECTORIES = (NETWORKS, f"{SYSTEM}/nftables.service.d")


def policy_path(bridge: str) -> str:
    """The nft commands that tell what the network on this bridge may do."""
    return f"{NETWORKS}/{bridge}.nft"


def element(name: str, value: str) -> str:
    """The nft command that adds an element to a set or map of table inet."""
    return f"add element inet agentfleet {name} {{ {value} }}"


def in_use(host: Host) -> bool:
    """Whether microVMs with networks run."""
    return bool(host.glob(f"{RUN}/*.taps"))


def attached(host: Host) -> set[tuple[str, str]]:
    """(microVM, bridge) of those that run, whatever is declared now."""
    return {
        (path.rpartition("/")[2][: -len(".taps")], line.split()[2])
        for path in host.glob(f"{RUN}/*.taps")
        for line in host.read(path).splitlines()
    }


def stale(host: Host) -> bool:
    """Whether the host has other rules than these."""
    return host.read(f"{LIBRARY}/network.nft") != RULES.strip()


def loaded(host: Host) -> bool:
    """Whether the packet filter has our tables."""
    return all(
        host.run(["nft", "-t", "list", "table", family, "agentfleet"], check=False).rc == 0
        for family in ("bridge", "inet")
    )
