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
deb-src http://source.example/debian trixie main
deb [arch=amd64 signed-by=/k.gpg] http://third.example/apt stable main
deb http://security.example/debian-security trixie-security main
deb [ trusted=yes ] http://mirror.example/debian/ trixie main contrib # the mirror
"""
DEB822 = """\
Types: deb
# a comment
URIs: http://nowhere.example/debian
Suites: trixie
Components: main
Enabled: {no}
{blank}
Types: deb-src
URIs: http://source.example/debian
Suites: trixie
Components: main

Types: deb deb-src
URIs:
  http://first.example/debian
  http://second.example/debian
Suites: trixie trixie-updates
Components: main contrib
"""
LISTS = "/etc/apt/sources.list.d"


@pytest.mark.parametrize(
    ("files", "family", "found"),
    [
        ({"/etc/apt/sources.list": LIST}, "debian", "http://mirror.example/debian"),
        ({f"{LISTS}/x.list.save": LIST}, "debian", None),
        ({f"{LISTS}/x.sources": DEB822.format(no="no", blank="")}, "debian", "http://first.example/debian"),
        ({f"{LISTS}/x.sources": DEB822.format(no="False", blank=" ")}, "debian", "http://first.example/debian"),
        ({f"{LISTS}/x.sources": DEB822.format(no="0", blank="")}, "ubuntu", None),
        (  # the archive of another vendor
            {f"{LISTS}/aaa.list": "deb https://apt.vendor.example trixie main\n", f"{LISTS}/debian.list": LIST},
            "debian",
            "http://mirror.example/debian",
        ),
        (  # below a directory of the distribution's name it has another component
            {f"{LISTS}/docker.list": "deb https://download.vendor.example/linux/ubuntu noble stable\n"},
            "ubuntu",
            None,
        ),
        (
            {
                f"{LISTS}/a-ubuntu-ppa-noble.list": "deb https://ppa.launchpadcontent.net/a/ppa/ubuntu/ noble main\n",
                f"{LISTS}/ubuntu.list": "deb http://a.example/ubuntu noble main\n",
            },
            "ubuntu",
            "http://a.example/ubuntu",
        ),
        (
            {
                "/etc/apt/sources.list": "deb mirror+file:/etc/apt/mirrors/debian.list trixie main\n",
                "/etc/apt/mirrors/debian.list": "https://cloud.example/debian\thttps://other.example/debian\n",
            },
            "debian",
            "https://cloud.example/debian",
        ),
        ({"/etc/apt/sources.list": "deb mirror+file:/etc/apt/mirrors/none.list trixie main\n"}, "debian", None),
        ({"/etc/apt/sources.list": "deb cdrom:[Debian 12]/ trixie main\n"}, "debian", None),
        ({}, "debian", None),
    ],
)
def test_mirror_of_the_machine_itself(fake_host: t.Any, files: dict[str, str], family: str, found: str | None) -> None:
    assert mirror_of(fake_host.files(files), family) == found
