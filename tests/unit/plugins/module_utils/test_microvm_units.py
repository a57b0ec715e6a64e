# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units: what virtiofsd is told, what becomes of a microVM whose virtiofsd is killed, and what a VMM may open."""

from __future__ import annotations

import re
import subprocess
import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _microvm_units as units
from ansible_collections.agentfleet.metal.plugins.module_utils import _snapshot, _vmm

SHARE = {"tag": "m", "source": "/srv/models", "target": "/mnt/m", "readonly": True, "dax": "never", "cache": "always"}


@pytest.mark.parametrize("cache", _vmm.SHARE_CACHES)
def test_a_share_says_what_virtiofsd_may_do(microvm_spec: dict[str, t.Any], cache: str) -> None:
    microvm_spec["shares"] = [{**SHARE, "cache": cache}, {**SHARE, "tag": "w", "readonly": False, "cache": cache}]
    files = units.files_of(t.cast("t.Any", microvm_spec), {"drop_in": ""})
    texts = [files[f"{units.SHARES}/a1:{tag}.env"][0].splitlines() for tag in ("m", "w")]
    assert texts == [
        ['SHARE_SOURCE="/srv/models"', f'SHARE_FLAGS="--cache={cache} --readonly"'],
        ['SHARE_SOURCE="/srv/models"', f'SHARE_FLAGS="--cache={cache}"'],
    ]


def test_virtiofsd_sees_its_directory_alone_and_is_reached_by_the_group_of_vmms() -> None:
    command = re.findall(r"^ExecStart=(.*)$", units.SHARE_SERVICE, re.MULTILINE)
    assert [one.split() for one in command] == [[
        "/usr/libexec/virtiofsd", "--fd=3", "--sandbox=namespace", "--inode-file-handles=prefer",
        "--shared-dir", "${SHARE_SOURCE}", "$SHARE_FLAGS",
    ]]  # fmt: skip
    # A VMM is not root, and of this group.
    assert {"SocketGroup=kvm", "SocketMode=0660"} <= set(units.SHARE_SOCKET.splitlines())
    assert "SupplementaryGroups=kvm" in units.MICROVM.splitlines()


def test_a_definition_from_before_cache_policies_still_has_one(microvm_spec: dict[str, t.Any]) -> None:
    microvm_spec["shares"] = [{key: value for key, value in SHARE.items() if key != "cache"}]
    files = units.files_of(t.cast("t.Any", microvm_spec), {"drop_in": ""})
    assert "--cache=auto --readonly" in files[f"{units.SHARES}/a1:m.env"][0]


def unit_section(spec: dict[str, t.Any]) -> dict[str, list[str]]:
    """Setting -> words of the section [Unit] of a microVM's drop-in."""
    text = units.drop_in(t.cast("t.Any", spec), ["/usr/bin/vmm"], 1 << 30).partition("[Service]")[0]
    return {key: value.split() for key, value in (line.split("=", 1) for line in text.splitlines() if "=" in line)}


def test_a_host_that_shuts_down_ends_the_guest_before_its_shares(microvm_spec: dict[str, t.Any]) -> None:
    microvm_spec["shares"] = [SHARE, {**SHARE, "tag": "w"}]
    section = unit_section(microvm_spec)
    names = ["agentfleet-virtiofsd@a1:m", "agentfleet-virtiofsd@a1:w"]
    assert section["After"] == [f"{name}.{kind}" for kind in ("socket", "service") for name in names]
    assert section["Requires"] == [f"{name}.socket" for name in names]  # the services start with a connection
    # Whoever stops or restarts one of these (needrestart does) does so to the guest first, by After=.
    assert section["PartOf"] == [f"{name}.service" for name in names]


def test_it_starts_when_what_it_shares_and_its_volumes_are_mounted(microvm_spec: dict[str, t.Any]) -> None:
    assert unit_section(microvm_spec) == {}
    microvm_spec["volumes"] = [{"name": "data"}]
    assert unit_section(microvm_spec) == {"RequiresMountsFor": ["/var/lib/agentfleet/volumes/a1"]}
    microvm_spec["shares"] = [{**SHARE, "source": "/srv/100%/i"}]
    assert unit_section(microvm_spec)["RequiresMountsFor"] == ["/srv/100%%/i", "/var/lib/agentfleet/volumes/a1"]


def test_a_clone_that_never_starts_is_given_up(microvm_spec: dict[str, t.Any]) -> None:
    section = unit_section({**microvm_spec, "restore_from": "/run/agentfleet/snapshots/warm"})
    burst = int(re.findall(r"^StartLimitBurst=(\d+)$", units.MICROVM, re.MULTILINE)[0])
    longest = _snapshot.IDENTITY_SECONDS + 2 * _snapshot.AGENT_SECONDS + 5  # to its next start
    assert (
        burst * longest < int(section["StartLimitIntervalSec"][0]) <= burst * 120
    )  # jobs of two minutes are no failure


@pytest.mark.parametrize(
    ("result", "code", "source", "restarted"),
    [
        ("success", "exited", "/srv/a", False),  # its guest has left
        ("success", "killed", "/srv/a", True),  # by SIGTERM
        ("signal", "killed", "/srv/a", True),
        ("exit-code", "exited", "/srv/a", True),
        ("success", "killed", None, False),  # the share is taken away from a guest that goes on
        ("signal", "killed", None, True),
    ],
)
def test_a_killed_virtiofsd_takes_its_microvm_along(
    result: str, code: str, source: str | None, restarted: bool
) -> None:
    """The unit's own shell line, with systemd's expansions done and systemctl in words."""
    match = re.search(r"^ExecStopPost=/bin/sh -c '(.*?)'$", units.SHARE_SERVICE.replace("\\\n", " "), re.MULTILINE)
    assert match
    script = (
        match.group(1).replace("%i", "a1:m").replace("$$", "$").replace("%%", "%").replace("exec systemctl", "echo")
    )
    done = subprocess.run(
        ["sh", "-c", script],
        env={
            "SERVICE_RESULT": result,
            "EXIT_CODE": code,
            **({"SHARE_SOURCE": source} if source else {}),
            "PATH": "/bin:/usr/bin",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ("--no-block try-restart agentfleet-microvm@a1.service\n" if restarted else "")


def test_its_unit_may_open_what_a_pci_function_needs() -> None:
    # The container of the groups is of another kind than they: `misc`, of which the unit may have no other.
    allowed = [line for line in units.MICROVM.splitlines() if line.startswith("DeviceAllow=")]
    assert "DevicePolicy=closed" in units.MICROVM
    assert {"DeviceAllow=/dev/vfio/vfio rw", "DeviceAllow=char-vfio rw"} <= set(allowed)
