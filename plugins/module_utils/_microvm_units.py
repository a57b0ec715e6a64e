# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd units and helper scripts around a microVM, as texts.

This module is private to the collection and imports nothing of Ansible.
systemd is the supervisor: everything here works without Ansible.
"""

from __future__ import annotations

import json
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _network, _snapshot
from ansible_collections.agentfleet.metal.plugins.module_utils._microvm_names import (
    HOME,
    LIBRARY,
    RUN,
    SHARES,
    SYSTEM,
    derived,
    unit,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._vmm import Spec

STOP_SECONDS = 60


TARGET = """\
# Written by agentfleet.metal. Starts every microVM that is declared running.
[Unit]
Description=agentfleet microVMs
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
ExecStartPre=+{LIBRARY}/microvm-taps up %i
ExecStop={LIBRARY}/microvm-stop {RUN}/%i
ExecStopPost=+{LIBRARY}/microvm-taps down %i
Restart=always
RestartSec=2
TimeoutStartSec=120
TimeoutStopSec={STOP_SECONDS + 10}
KillMode=mixed
OOMPolicy=stop
CapabilityBoundingSet=
DevicePolicy=closed
DeviceAllow=/dev/kvm rw
DeviceAllow=/dev/net/tun rw
DeviceAllow=/dev/vhost-vsock rw
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
[Unit]
Description=agentfleet virtiofsd for %i

[Service]
EnvironmentFile={SHARES}/%i.env
ExecStart=/usr/libexec/virtiofsd --fd=3 --sandbox=namespace --shared-dir ${{SHARE_SOURCE}} $SHARE_FLAGS
LimitNOFILE=1048576
NoNewPrivileges=yes
"""

MODULES = ("vhost_vsock", "tun", "bridge")

STOP = f"""\
#!/usr/bin/python3 -IS
# Written by agentfleet.metal. Presses a microVM's power button and waits for its end; systemd does the rest.
import json
import os
import socket
import sys

qemu = os.path.exists(f"{{sys.argv[1]}}/qmp")
monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
monitor.settimeout({STOP_SECONDS})
try:
    monitor.connect(f"{{sys.argv[1]}}/{{'qmp' if qemu else 'api'}}")
    if qemu:
        lines = monitor.makefile("rw", encoding="utf-8")
        lines.readline()
        for command in ("qmp_capabilities", "system_powerdown"):
            lines.write(json.dumps({{"execute": command}}) + "\\n")
            lines.flush()
            lines.readline()
    else:
        monitor.sendall(b"PUT /api/v1/vm.power-button HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    while monitor.recv(4096):  # until the VMM has ended
        pass
except OSError as error:
    print(f"power button: {{error}}", file=sys.stderr)
"""


def common(modules: t.Sequence[str]) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what every host with microVMs has.

    :param modules: what microVMs need of the host's kernel
    """
    return {
        f"{SYSTEM}/agentfleet-microvms.target": (TARGET, 0o644),
        f"{SYSTEM}/agentfleet-microvm@.service": (MICROVM, 0o644),
        f"{SYSTEM}/agentfleet-virtiofsd@.socket": (SHARE_SOCKET, 0o644),
        f"{SYSTEM}/agentfleet-virtiofsd@.service": (SHARE_SERVICE, 0o644),
        **_network.common(),
        f"{LIBRARY}/microvm-stop": (STOP, 0o755),
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


def drop_in(spec: Spec, argv: t.Sequence[str], memory_max: int) -> str:
    """What of a microVM's unit is its own."""
    sockets = " ".join(f"agentfleet-virtiofsd@{spec['name']}:{share['tag']}.socket" for share in spec["shares"])
    shares = f"[Unit]\nRequires={sockets}\nAfter={sockets}\n\n" if sockets else ""
    return (
        f"# Written by agentfleet.metal from {HOME}/{spec['name']}/spec.json\n{shares}[Service]\n"
        f"ExecStart={quoted(argv)}\n"
        f"LoadCredential={spec['config']}:{HOME}/{spec['name']}/{spec['config']}\n"
        # By default all instances of a template share one dynamic user.
        f"User=af{derived(spec['name'], 'user').hex()[:12]}\n"
        f"Slice=agentfleet-{spec['tenant']}.slice\nMemoryMax={memory_max}\nMemorySwapMax=0\n"
        f"{_snapshot.unit_lines(spec)}"
    )


def files_of(spec: Spec, texts: t.Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Path -> (text, mode): what one microVM has on the host.

    :param texts: ``drop_in``, and ``config`` with its file name as key
    """
    home, name = f"{HOME}/{spec['name']}", spec["name"]
    files = {
        f"{home}/spec.json": (json.dumps(spec, indent=2, sort_keys=True) + "\n", 0o600),
        **_network.files_of(name, spec["networks"]),
        f"{SYSTEM}/{unit(name)}.d/60-agentfleet.conf": (texts["drop_in"], 0o644),
    }
    for file, text in texts.items():
        if file != "drop_in":
            files[f"{home}/{file}"] = (text, 0o600)
    for share in spec["shares"]:
        flags = "--readonly" if share["readonly"] else ""
        files[f"{SHARES}/{name}:{share['tag']}.env"] = (
            f'SHARE_SOURCE="{share["source"]}"\nSHARE_FLAGS={flags}\n', 0o644,
        )  # fmt: skip
    return files
