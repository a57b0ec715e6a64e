# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mirror is found in both formats of apt's sources."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils._apt import mirror_of

LIST = """\
# deb http://old.example/debian sid main
deb [arch=amd64 signed-by=/k.gpg] http://third.example/apt stable main
deb http://security.example/debian-security trixie-security main
deb [ trusted=yes ] http://mirror.example/debian/ trixie main
"""
DEB822 = """\
Types: deb
# a comment
URIs: http://nowhere.example/debian
Suites: trixie
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: trixie

Types: deb
URIs: http://first.example/debian
  http://second.example/debian
Suites: trixie trixie-updates
Components: main
"""


@pytest.mark.parametrize(
    ("path", "text", "family", "found"),
    [
        ("/etc/apt/sources.list", LIST, "debian", "http://mirror.example/debian"),
        ("/etc/apt/sources.list.d/x.sources", DEB822, "debian", "http://first.example/debian"),
        ("/etc/apt/sources.list.d/x.sources", DEB822, "ubuntu", None),
        ("/etc/apt/sources.list.d/x.list.save", LIST, "debian", None),
    ],
)
def test_mirror(fake_host: t.Any, path: str, text: str, family: str, found: str | None) -> None:
    assert mirror_of(fake_host.files({path: text}), family) == found
