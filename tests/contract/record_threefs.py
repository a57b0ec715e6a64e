#!/usr/bin/env python
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record the keys of the configuration files that ship with 3FS, which of them a running service cannot change, and the
numbers of its errors, from a source tree of it.

    tests/contract/record_threefs.py 3FS > tests/contract/threefs.json

Of files only tables, keys and types are recorded: each value is the empty one of its type, and the kind of network of a
listener, by which it is found. Keys that are read only at the start are recorded by their last word, if that word means no
other key that can be changed. tests/unit/plugins/module_utils/test_threefs_config.py makes all files from the record.
"""

from __future__ import annotations

import json
import re
import sys
import typing as t
from pathlib import Path

import tomllib


def empty(key: str, value: t.Any) -> t.Any:
    """A value without what it says."""
    if isinstance(value, dict):
        return {name: empty(name, item) for name, item in value.items()}
    if isinstance(value, list):
        return [empty("", item) for item in value if isinstance(item, dict)]
    return value if key == "network_type" else type(value)()


def cold(tree: str, configs: dict[str, t.Any]) -> set[str]:
    """Keys of the files that are declared nowhere as ones that a running service changes."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(tree, "src").rglob("*.h")))
    hot = set(re.findall(r"CONFIG_HOT_UPDATED_ITEM\(\s*(\w+),", text))
    items = set(re.findall(r"CONFIG_ITEM\(\s*(\w+),", text)) - hot

    def inside(value: t.Any) -> set[str]:
        if isinstance(value, list):
            return {name for item in value for name in inside(item)}
        if not isinstance(value, dict):
            return (
                set()
            )  # a list of tables that is changed as a whole, such as that of log handlers, makes all in it hot
        return set(value) & items | {name for key, item in value.items() if key not in hot for name in inside(item)}

    return inside(configs)


def errors(text: str) -> dict[str, int]:
    """Name as admin_cli tells it -> number."""
    spaces = dict(re.findall(r"#define (\w+)_STATUS\(\.\.\.\) STATUS\((\w+),", text))
    found = re.findall(r"^(\w+)_STATUS\((\w+), *(\d+)\)", text, re.MULTILINE)
    return {f"{spaces[kind]}::{name}" if kind in spaces else name: int(code) for kind, name, code in found}


def main(tree: str) -> None:
    """Print the record."""
    files = sorted(path for path in Path(tree, "configs").glob("*.toml") if "client_agent" not in path.name)
    details = Path(tree, "src/common/utils/StatusCodeDetails.h").read_text(encoding="utf-8")
    configs = {path.stem: empty("", tomllib.loads(path.read_text(encoding="utf-8"))) for path in files}
    record = {
        "cold": sorted(cold(tree, configs)),
        "configs": configs,
        "errors": errors(details),
    }
    json.dump(record, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
