# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the role mooncake installs, rendered from its own files."""

from __future__ import annotations

import typing as t

from ansible_collections.agentfleet.metal.tests.unit.role_lab import rendered

RENDER = """
for case in given["cases"]:
    variables = {**load("defaults/main.yml"), **case, **load("vars/main.yml")}
    found.append(Templar(loader, variables=variables).template(variables["mooncake_home"]))
"""


def wheels(version: str, digest: str) -> dict[str, t.Any]:
    """Variables that name the engine's wheel and one that it needs."""
    name = f"https://store.example/mooncake_transfer_engine_non_cuda-{version}-cp312-cp312-manylinux_2_35_x86_64.whl"
    other = {"src": "/srv/aiohttp-3.9-py3-none-any.whl", "sha256": "0" * 64}
    return {"mooncake_wheels": [{"src": name, "sha256": digest * 64}, other]}


def test_other_wheels_are_another_installation_with_their_own_version() -> None:
    cases = [{}, wheels("0.3.14", "a"), wheels("0.3.14", "A"), wheels("0.3.14", "b"), wheels("0.3.15", "b")]
    unnamed = {"mooncake_wheels": [{"src": "/srv/engine.whl", "sha256": "c" * 64}]}
    usual, first, same, corrected, newer, plain = rendered("mooncake", RENDER, cases=[*cases, unnamed])
    assert usual == "/opt/agentfleet/mooncake-0.3.13.post1", "installations by version stay where they are"
    assert first == same and first.startswith("/opt/agentfleet/mooncake-0.3.14-")
    assert newer.startswith("/opt/agentfleet/mooncake-0.3.15-") and plain.startswith("/opt/agentfleet/mooncake-wheels-")
    assert len({usual, first, corrected, newer, plain}) == 5
