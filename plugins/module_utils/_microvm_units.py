# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd units and helper scripts around a microVM, as texts.

This module is private to the collection and imports nothing of Ansible.
systemd is the supervisor: everything here works without Ansible.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _boot, _microvm_exec, _network, _snapshot, _vmm
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    HOME,
    LIBRARY,
    RUN,
    SHARES,
    SLOTS,
    SYSTEM,
    VOLUMES,
    derived,
    unit,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_unit import RUNG_SECONDS, STOP_SECONDS
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Spec

LADDER_SECONDS = STOP_SECONDS + 2 * RUNG_SECONDS + 20
STOPPED_SECONDS = 4 * LADDER_SECONDS + 60  # ExecStop, TERM, KILL and ExecStopPost have as much each
CLONE_LIMIT_SECONDS = 600  # five starts of a clone in this time are too many; one that fails takes 60 to 85 s
RESTART = {"always": "always", "on-failure": "on-failure", "never": "no"}
CODE_PATH = f"{LIBRARY}/microvm"  # of its own: other concerns have copies, too, and remove them
PARALLEL = f"{LIBRARY}/microvm-parallel"

TARGET = """\
# Written by agentfleet.metal. Starts every microVM that is declared running.
[Unit]
Description=agentfleet microVMs
# Reached before they have booted, so that a host with many of them is up as soon as one without.
DefaultDependencies=no
Conflicts=shutdown.target
After=network-pre.target agentfleet-restore.service systemd-modules-load.service

[Install]
WantedBy=multi-user.target
"""

MICROVM = f"""\
# Written by agentfleet.metal. One microVM; its drop-in gives command, slice and limits.
[Unit]
Description=agentfleet microVM %i
PartOf=agentfleet-microvms.target
After=network-pre.target agentfleet-restore.service systemd-modules-load.service
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
Type=exec
DynamicUser=yes
SupplementaryGroups=kvm
UMask=0077
RuntimeDirectory=agentfleet/%i
ExecStartPre=+{LIBRARY}/microvm-start %i
ExecStop=+{LIBRARY}/microvm-unit stop %i
ExecStopPost=+{LIBRARY}/microvm-end %i
RestartSec=2
# Its console goes to the journal, and is the guest's to write.
LogRateLimitIntervalSec=30
LogRateLimitBurst=2000
# microvm-start waits for a turn, and has bounds of its own.
TimeoutStartSec=infinity
TimeoutStopSec={LADDER_SECONDS}
KillMode=mixed
OOMPolicy=stop
CapabilityBoundingSet=
LimitMEMLOCK=infinity
ReadWritePaths=-{VOLUMES}/%i
DevicePolicy=closed
DeviceAllow=/dev/kvm rw
DeviceAllow=/dev/net/tun rw
DeviceAllow=/dev/vhost-vsock rw
DeviceAllow=/dev/vfio/vfio rw
DeviceAllow=char-vfio rw
LockPersonality=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
SystemCallArchitectures=native

[Install]
WantedBy=agentfleet-microvms.target
"""

# A guest boots with all the CPU that it gets, and emulated hosts break when many do. Who waits holds the lock, so
# that one process looks for free slots and the others sleep.
START = f"""\
#!/bin/sh
# Written by agentfleet.metal. Before a microVM starts: its turn, what it is started with, its taps, volumes, devices.
set -eu
name=$1
mkdir -p {SLOTS}
exec 9>{RUN}/slots.lock
flock 9
read -r limit <{PARALLEL}
[ "$limit" -gt 0 ] || limit=$(nproc)
set -- {SLOTS}/*
[ ! -e "$1" ] || [ "$#" -lt "$limit" ] || {LIBRARY}/microvm-unit wait "$limit" || :
read -r uptime _idle </proc/uptime
echo "${{uptime%.*}}" >"{SLOTS}/$name"
exec 9>&-

# What belongs to the command line that systemd has; an older version's drop-in names no definition.
home="{HOME}/$name" definition=${{DEFINITION:+-$DEFINITION}}
# It was declared anew while it waited: systemd goes on with the new command line.
[ -e "$home/spec$definition.json" ] || definition=$(cd "$home" && echo spec-*.json | sed 's/^spec//; s/[.]json$//')
install -m 600 "$home/spec$definition.json" "{RUN}/$name.spec.json"
[ ! -s "$home/taps$definition" ] || {LIBRARY}/microvm-taps up "$name" "$home/taps$definition"
(umask 022 && mkdir -p "{VOLUMES}/$name") # also for volumes that come later: the VMM sees only what is there now
chmod 700 "{VOLUMES}/$name"
chown -R --reference="{RUN}/$name" "{VOLUMES}/$name"
[ ! -s "$home/devices$definition" ] || cp "$home/devices$definition" "{RUN}/$name.devices"
[ ! -e "{RUN}/$name.devices" ] || while read -r address; do
    group=$(readlink -e "/sys/bus/pci/devices/$address/iommu_group")
    chown "$(stat -c %u "{RUN}/$name")" "/dev/vfio/${{group##*/}}"
done <"{RUN}/$name.devices"
"""

END = f"""\
#!/bin/sh
# Written by agentfleet.metal. After a microVM has ended, or did not start: nothing stays that it had while it ran.
set -u
rm -f "{SLOTS}/$1" "{RUN}/$1.spec.json"
[ ! -e "{RUN}/$1.taps" ] || {LIBRARY}/microvm-taps down "$1"
if [ -e "{RUN}/$1.devices" ]; then
    while read -r address; do
        group=$(readlink -e "/sys/bus/pci/devices/$address/iommu_group") && chown 0 "/dev/vfio/${{group##*/}}"
    done <"{RUN}/$1.devices"
    rm -f "{RUN}/$1.devices"
fi
"""

UNIT_CODE = f"""\
#!/usr/bin/python3 -IS
# Written by agentfleet.metal. What units of microVMs run: see _microvm_unit.py.
import sys

sys.path.insert(0, "{CODE_PATH}")
from {_boot.PACKAGE}._host import Host
from {_boot.PACKAGE}._microvm_unit import main

sys.exit(main(sys.argv[1:], Host()))
"""

SHARE_SOCKET = f"""\
# Written by agentfleet.metal. The socket of one share (microVM:tag); there before both ends.
[Unit]
Description=agentfleet share %i
StopWhenUnneeded=yes

[Socket]
ListenStream={RUN}/shares/%i
SocketGroup=kvm
SocketMode=0660
RemoveOnStop=yes
"""

SHARE_SERVICE = f"""\
# Written by agentfleet.metal. Serves one share; ends with its microVM and starts with its next connection.
# What it knew of the guest's open files is gone with it, so that the guest must start anew, too: before it when it is
# stopped or restarted (PartOf= in the microVM's drop-in), after it when it is killed. By itself it ends when the guest
# has left. A share that is declared no more, and so has no SHARE_SOURCE, is stopped without its guest.
[Unit]
Description=agentfleet virtiofsd for %i

[Service]
# "-": it may be removed while the service, whose guest has left, still ends
EnvironmentFile=-{SHARES}/%i.env
ExecStart={_vmm.VIRTIOFSD} --fd=3 --sandbox=namespace --inode-file-handles=prefer --shared-dir ${{SHARE_SOURCE}} $SHARE_FLAGS
ExecStopPost=/bin/sh -c 'share=%i; \\
    case "$$SERVICE_RESULT $$EXIT_CODE $$SHARE_SOURCE" in "success exited "*|"success killed ") exit;; esac; \\
    exec systemctl --no-block try-restart "agentfleet-microvm@$${{share%%%%:*}}.service"'
LimitNOFILE=1048576
NoNewPrivileges=yes
"""


def code() -> dict[str, str]:
    """Path -> text of what ``microvm-unit`` runs."""
    return {f"{CODE_PATH}/{path}": text for path, text in _boot.sources("_microvm_unit").items()}


def common(modules: t.Sequence[str], parallel: int = 0) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what every host with microVMs has.

    :param modules: what microVMs need of the host's kernel
    :param parallel: how many may boot at the same time; 0 is the number of CPUs
    """
    return {
        f"{SYSTEM}/agentfleet-microvms.target": (TARGET, 0o644),
        f"{SYSTEM}/agentfleet-microvm@.service": (MICROVM, 0o644),
        f"{SYSTEM}/agentfleet-virtiofsd@.socket": (SHARE_SOCKET, 0o644),
        f"{SYSTEM}/agentfleet-virtiofsd@.service": (SHARE_SERVICE, 0o644),
        **_network.common(),
        f"{LIBRARY}/microvm-start": (START, 0o755),
        f"{LIBRARY}/microvm-end": (END, 0o755),
        f"{LIBRARY}/microvm-exec": (f"#!/usr/bin/python3 -IS\n{inspect.getsource(_microvm_exec)}", 0o755),
        f"{LIBRARY}/microvm-unit": (UNIT_CODE, 0o755),
        PARALLEL: (f"{parallel}\n", 0o644),
        **{path: (text, 0o644) for path, text in code().items()},
        "/etc/modules-load.d/60-agentfleet-microvm.conf": (
            "\n".join(["# Written by agentfleet.metal.", *modules]) + "\n", 0o644,
        ),
    }  # fmt: skip


def quoted(words: t.Sequence[str]) -> str:
    """A command line for ExecStart=: nothing in it is expanded but %d, the credentials' directory."""

    def one(word: str) -> str:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        return f'"{escaped}"' if set(word) & set(" \"'\\;") else escaped

    return " ".join(one(word).replace("%%d/", "%d/") for word in words)


def limits(spec: Spec, memory_max: int) -> dict[str, str]:
    """Setting -> value of a microVM's control group; empty is systemd's default.

    :param memory_max: limit of all memory that its VMM may have, in bytes
    """
    resources = spec["resources"]
    quota = resources.get("cpu_quota_percent")
    return {
        "MemoryMax": str(resources.get("memory_max_bytes", memory_max)),
        "CPUWeight": str(resources.get("cpu_weight", "")),
        "CPUQuota": f"{quota}%" if quota else "",
        "IOWeight": str(resources.get("io_weight", "")),
        "TasksMax": str(resources.get("tasks_max", "")),
    }


def drop_in(spec: Spec, argv: t.Sequence[str], memory_max: int) -> str:
    """What of a microVM's unit is its own.

    :param memory_max: see :func:`limits`
    """
    name = spec["name"]
    lines = [f"# Written by agentfleet.metal from {HOME}/{name}/spec.json"]
    lines += [*_needs(spec), "[Service]", f"Environment=DEFINITION={_definition(spec)}", f"ExecStart={quoted(argv)}"]
    lines += [f"LoadCredential={disk}:{HOME}/{name}/{disk}" for disk in (spec["config"], spec["data"]) if disk]
    # By default all instances of a template share one dynamic user.
    lines += [f"User=af{derived(name, 'user').hex()[:12]}", f"Slice=agentfleet-{spec['tenant']}.slice"]
    lines += [f"Restart={RESTART[spec['restart_policy']]}", "MemorySwapMax=0"]
    lines += [f"{setting}={value}" for setting, value in limits(spec, memory_max).items() if value]
    last = _vmm.driver(spec["driver"]).unit_lines(spec)
    return "\n".join(lines) + "\n" + _snapshot.unit_lines(spec) + "".join(f"{line}\n" for line in last)


def _definition(spec: Spec) -> str:
    """The digest that is in the names of what microvm-start reads, so that command line and files change together."""
    content = [spec, _network.files_of("taps", spec["networks"])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _needs(spec: Spec) -> list[str]:
    """What a microVM needs of the host's other units (the servers of its shares, what is mounted below them), and when
    it is given up."""
    name, lines = spec["name"], []
    shares = [f"agentfleet-virtiofsd@{name}:{share['tag']}" for share in spec["shares"]]
    paths = [share["source"] for share in spec["shares"]] + ([f"{VOLUMES}/{name}"] if spec["volumes"] else [])
    if shares:
        sockets = " ".join(f"{share}.socket" for share in shares)
        services = " ".join(f"{share}.service" for share in shares)
        # A service starts with its first connection; its place here is for the stop, when the guest still writes: of
        # all (the host shuts down), or of the service alone, which takes the guest along (as a restart does).
        lines += [f"Requires={sockets}", f"After={sockets} {services}", f"PartOf={services}"]
    if paths:  # of which, as they are checked, none has a space or a quote
        lines.append("RequiresMountsFor=" + " ".join(path.replace("%", "%%") for path in paths))
    if spec["restore_from"]:  # a start that fails takes a minute or more: five of them are never within 300 s
        lines.append(f"StartLimitIntervalSec={CLONE_LIMIT_SECONDS}")
    return ["[Unit]", *lines, ""] if lines else []


def files_of(spec: Spec, texts: t.Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what one microVM has on the host. Its drop-in is last, since it names others of them.

    :param texts: ``drop_in``, and the read-only disks with their file names as keys
    """
    name = spec["name"]
    home, definition = f"{HOME}/{name}", _definition(spec)
    record = json.dumps(spec, indent=2, sort_keys=True) + "\n"
    files = {
        f"{home}/spec.json": (record, 0o600),
        f"{home}/spec-{definition}.json": (record, 0o600),
        **_network.files_of(f"{home}/taps-{definition}", spec["networks"]),
    }
    if spec["devices"]:
        files[f"{home}/devices-{definition}"] = ("".join(f"{address}\n" for address in spec["devices"]), 0o644)
    for file, text in texts.items():
        if file != "drop_in":
            files[f"{home}/{file}"] = (text, 0o600)
    for share in spec["shares"]:
        flags = f"--cache={share.get('cache', 'auto')}" + (" --readonly" if share["readonly"] else "")
        files[f"{SHARES}/{name}:{share['tag']}.env"] = (
            f'SHARE_SOURCE="{share["source"]}"\nSHARE_FLAGS="{flags}"\n', 0o644,
        )  # fmt: skip
    files[f"{SYSTEM}/{unit(name)}.d/60-agentfleet.conf"] = (texts["drop_in"], 0o644)
    return files
