# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of bad inputs: each is refused with option, value and remedy, and the host stays as it is.

A row of bad_inputs/<module>[.topic].yml has ``name``, ``params``, the expected ``option``, ``contains`` (a part of the
problem) and ``remedy`` (a part of it), and where it needs them ``files`` and ``answers`` of the fake host.
"""

from __future__ import annotations

import importlib
import os
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

TABLES = sorted((Path(__file__).parent / "bad_inputs").glob("*.yml"))
ROWS = [(table.stem.partition(".")[0], row) for table in TABLES for row in yaml.safe_load(table.read_text())]


def complete(options: dict[str, t.Any], params: dict[str, t.Any], where: str = "") -> dict[str, t.Any]:
    """The parameters as Ansible hands them to a module: defaults filled in, and None for what is not given."""
    unknown = set(params) - set(options)
    assert not unknown, f"the module has no option {where}{sorted(unknown)}"
    full = {name: option.get("default") for name, option in options.items()} | params
    for name, option in options.items():
        suboptions, value = option.get("suboptions"), full[name]
        if suboptions and isinstance(value, dict):
            full[name] = complete(suboptions, value, f"{where}{name}.")
        elif suboptions and isinstance(value, list):
            full[name] = [complete(suboptions, item, f"{where}{name}[].") for item in value]
    return full


def tree(root: str) -> dict[str, bytes | str | None]:
    """Everything below a directory: text of files, targets of links, None for directories."""
    found: dict[str, bytes | str | None] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(directory, name)
            found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize(("module", "row"), ROWS, ids=[f"{module}: {row['name']}" for module, row in ROWS])
def test_refused(module: str, row: dict[str, t.Any], fake_host: t.Any) -> None:
    source = importlib.import_module(f"ansible_collections.agentfleet.metal.plugins.modules.{module}")
    params = complete(yaml.safe_load(source.DOCUMENTATION)["options"], row["params"])
    fake_host.files(row.get("files", {}))
    fake_host.answers.update(row.get("answers", {}))
    before = tree(fake_host.root)
    kinds = [found for found in vars(source).values() if isinstance(found, type) and hasattr(found, "plan")]
    build = getattr(source, "build", lambda params, host: kinds[0](host, params))

    def attempt() -> None:
        resource = build(params, fake_host)
        resource.plan(resource.observe())

    with pytest.raises(Refused) as refused:
        attempt()

    refusal = refused.value
    assert refusal.option == row["option"]
    assert row["contains"] in refusal.problem
    assert row["remedy"] in refusal.remedy
    assert tree(fake_host.root) == before


def test_there_are_enough() -> None:
    assert len(ROWS) >= 40
