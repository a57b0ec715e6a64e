# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's own record of what this collection changed, one JSON line for each run of a module.

Verb and object of each step are recorded, never before and after: the log says what
was touched, the host's files say what it is now, and nothing secret can get in.
"""

from __future__ import annotations

import json
import os
import time
import typing as t

LOG = "/var/log/agentfleet/audit.jsonl"


def append(path: str, module: str, steps: t.Iterable[t.Any], failed: str = "") -> None:
    """Append what was done.

    :param path: the real path of the log
    :param steps: the steps that were carried out
    :param failed: why the run ended early, if it did
    """
    entry: dict[str, t.Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "module": module,
        "steps": [{"verb": step.verb, "object": step.object} for step in steps],
    }
    if failed:
        entry["failed"] = failed
    os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(handle, (json.dumps(entry) + "\n").encode())  # one write, so that lines of parallel runs do not mix
    finally:
        os.close(handle)


def tail(text: str, count: int = 100) -> list[dict[str, t.Any]]:
    """The last entries of a log's text, oldest first; a line cut by a power failure is left out."""
    found = []
    for line in text.splitlines()[-count:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
