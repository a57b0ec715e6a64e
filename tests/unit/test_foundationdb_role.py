# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role foundationdb makes of its variables, rendered from its own files."""

from __future__ import annotations

import base64
import typing as t

from ansible_collections.agentfleet.metal.tests.unit.role_lab import rendered

RENDER = """
for case in given["cases"]:
    variables = {**load("defaults/main.yml"), **case, **load("vars/main.yml")}
    found.append([Templar(loader, variables=variables).template(variables[name]) for name in given["names"]])
"""


def render(names: list[str], *cases: dict[str, t.Any]) -> list[list[t.Any]]:
    """The role's own variables of these names, for each case."""
    hosts = {f"f{number}": {"foundationdb_address": f"10.0.0.{number}"} for number in (1, 2, 3)}
    house = {
        "groups": {"foundationdb": list(hosts)},
        "hostvars": hosts,
        "inventory_hostname": "f1",
        "foundationdb_address": "10.0.0.1",
    }
    return rendered("foundationdb", RENDER, names=names, cases=[{**house, **case} for case in cases])


def test_where_backups_and_drills_are_made() -> None:
    backup = {"foundationdb_backup": {"directory": "/backup"}}
    names = ["foundationdb__backup_here", "foundationdb__drill_here", "foundationdb__drill", "foundationdb__misplaced"]
    assert render(
        names,
        {},
        backup,
        {**backup, "foundationdb_backup_host": "f2"},
        {**backup, "foundationdb_drill_port": 4600},
        {**backup, "foundationdb_drill_port": 4600, "inventory_hostname": "f3"},
    ) == [
        [False, False, {}, ""],
        [True, False, {}, ""],
        [False, False, {}, ""],
        [True, True, {"drill_database": "foundationdb_drill"}, ""],
        [False, False, {}, ""],
    ]


def test_backups_and_drills_that_no_host_would_make_are_refused() -> None:
    (nobody,), (nothing,) = render(
        ["foundationdb__misplaced"],
        {"foundationdb_backup": {"directory": "/backup"}, "foundationdb_backup_host": "f9"},
        {"foundationdb_drill_port": 4600},
    )
    assert "foundationdb_backup_host: f9 is not in the group foundationdb" in nobody and "Hosts: f1, f2, f3" in nobody
    assert nothing.startswith("foundationdb_drill_port: 4600: there are no backups") and nothing.endswith("or set 0")


def found(**lines: str | None) -> dict[str, t.Any]:
    """What hosts said of their cluster files: a line, or None for no file; others were not asked."""
    hosts: dict[str, t.Any] = {f"f{number}": {"foundationdb_address": f"10.0.0.{number}"} for number in (1, 2, 3)}
    for host, line in lines.items():
        text = base64.b64encode(f"# by the servers\n{line}\n".encode()).decode()
        hosts[host]["foundationdb__file"] = {"content": text} if line else {"failed": False, "msg": "file not found"}
    return {"hostvars": hosts}


def test_a_new_database_only_where_no_host_can_have_one() -> None:
    new, moved = "foundationdb:0d6c", "foundationdb:Xy12@10.0.0.2:4500"
    names = ["foundationdb__connection", "foundationdb__unclear"]
    fresh, limited, given, rebuilt, several = render(
        names,
        found(f1=None, f2=None, f3=None),
        found(f1=None),
        found(f1=moved),
        found(f1=None, f2=moved, f3=moved),
        found(f1=f"{new}@10.0.0.1:4500", f2=moved, f3=moved),
    )
    assert fresh[0].startswith("foundationdb:") and fresh[0].endswith("@10.0.0.1:4500,10.0.0.2:4500,10.0.0.3:4500")
    assert given == rebuilt == [moved, ""] and fresh[1] == ""
    assert "f2, f3 were not asked" in limited[1] and "Run without --limit" in limited[1]
    assert "f1 has foundationdb:0d6c, f2 has foundationdb:Xy12, f3 has foundationdb:Xy12. " in several[1]
    assert "stop foundationdb where" in several[1]
