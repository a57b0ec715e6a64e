# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a role makes of its variables, rendered by Ansible in a process of its own, since it keeps its plugins in globals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import ansible_collections.agentfleet.metal as collection

HERE = Path(next(iter(collection.__path__)))
_BEGIN = """
import json, sys
from ansible.plugins.loader import init_plugin_loader
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

init_plugin_loader([])
role, given = sys.argv[1], json.loads(sys.argv[2])
loader = DataLoader()
load = lambda path: loader.load_from_file(f"{role}/{path}", trusted_as_template=True)
found = []
"""


def rendered(role: str, script: str, **given: t.Any) -> list[t.Any]:
    """What a script finds.

    :param script: has ``load`` for the role's files, ``loader``, ``Templar`` and ``given``, and fills ``found``
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{_BEGIN}{script}json.dump(found, sys.stdout)",
            str(HERE / f"roles/{role}"),
            json.dumps(given),
        ],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))
