# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The boot guard's record as anyone may read it (facts do, without the rest of the guard)."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError

STATE = "/var/lib/agentfleet/boot-guard/state.json"
MARK = "agentfleet.candidate="
Record = t.Dict[str, t.Any]  # noqa: UP006 (evaluated at run time on Python 3.9)


def read_record(host: Host) -> Record:
    """The guard's record; empty when nothing is armed."""
    text = host.read(STATE)
    try:
        return dict(json.loads(text or "{}"))
    except ValueError as error:
        raise HostError(
            f"{STATE} is damaged ({error}). Look which entry the boot loader has saved (grub-editenv - list), "
            "put the boot configuration right by hand, and remove the file"
        ) from error


def booted(host: Host, record: t.Mapping[str, t.Any]) -> str:
    """What runs: ``candidate``, ``known_good``, ``not_rebooted`` since it was armed; empty when nothing is."""
    if not record:
        return ""
    mark = record.get("candidate", {}).get("mark")
    if mark and f"{MARK}{mark}" in host.read("/proc/cmdline").split():
        return "candidate"
    return "not_rebooted" if host.read("/proc/sys/kernel/random/boot_id") == record["boot_id"] else "known_good"
