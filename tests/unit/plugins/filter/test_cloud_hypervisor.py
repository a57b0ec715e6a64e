# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role cloud_hypervisor is asked for: bad inputs with option, value and remedy, and the version policy."""

from __future__ import annotations

import hashlib
import typing as t
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.filter.cloud_hypervisor import (
    cloud_hypervisor_refusals,
    cloud_hypervisor_source,
)

SHA = "ab" * 32
PROGRAM = {"program": "/usr/bin/cloud-hypervisor"}
URL = {"url": "https://releases.example/cloud-hypervisor-static"}


@pytest.mark.parametrize(
    ("given", "option", "value", "problem", "remedy"),
    [
        ({"version": "newest", **PROGRAM}, "version", "'newest'", "not a version", "53.0"),
        ({"version": "53", **PROGRAM}, "version", "'53'", "not a version", "53.0"),
        ({"version": "51.1", **PROGRAM}, "version", "'51.1'", "CVE-2026-45782", "Use 53.0"),
        ({"version": "50.0", **PROGRAM}, "version", "'50.0'", "CVE-2026-27211", "Use 53.0"),
        ({"version": "52.0", **PROGRAM}, "version", "'52.0'", "memfd", "Use 53.0"),
        ({}, "url", "''", "0 sources are given (none)", "cloud_hypervisor_package"),
        ({**PROGRAM, **URL}, "url", "releases.example", "2 sources are given (url, program)", "Give one of"),
        (URL, "sha256", "''", "not a SHA-256", "sha256sum"),
        ({**URL, "sha256": SHA[:-1]}, "sha256", SHA[:-1], "not a SHA-256", "64 hexadecimal digits"),
        ({**URL, "sha256": SHA.upper()}, "sha256", SHA.upper(), "not a SHA-256", "lower case"),
        ({"url": "ftp://host/file", "sha256": SHA}, "url", "ftp://host/file", "not a URL", "https://"),
        ({"file": "/nowhere", "sha256": SHA}, "file", "'/nowhere'", "no such file on the controller", "path"),
        ({**PROGRAM, "sha256": SHA}, "sha256", SHA, "nothing is verified for cloud_hypervisor_program", "Leave it out"),
        ({"program": "cloud-hypervisor"}, "program", "'cloud-hypervisor'", "not an absolute path", "/usr/bin"),
        ({"package": "cloud hypervisor"}, "package", "'cloud hypervisor'", "not a name of a package", "Name the"),
    ],
)
def test_refused_with_option_value_and_remedy(
    given: dict[str, t.Any], option: str, value: str, problem: str, remedy: str
) -> None:
    arguments = {"version": "53.0", **given}
    with pytest.raises(AnsibleFilterError) as caught:
        cloud_hypervisor_source(arguments.pop("version"), **arguments)
    text = str(caught.value)
    assert f"cloud_hypervisor_{option}: " in text
    assert all(part in text for part in (value, problem, remedy)), text


def test_a_file_with_another_sha256_is_refused_and_the_right_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "cloud-hypervisor-static"
    file.write_bytes(b"\x7fELF")
    right = hashlib.sha256(b"\x7fELF").hexdigest()
    assert cloud_hypervisor_source("53.0", file=str(file), sha256=right) == "file"
    with pytest.raises(AnsibleFilterError, match=f"its SHA-256 is {right}"):
        cloud_hypervisor_source("53.0", file=str(file), sha256=SHA)


@pytest.mark.parametrize(
    ("given", "source"),
    [(PROGRAM, "program"), ({"package": "cloud-hypervisor"}, "package"), ({**URL, "sha256": SHA, "file": ""}, "url")],
)
def test_the_one_source_that_is_given(given: dict[str, str], source: str) -> None:
    assert cloud_hypervisor_source("51.2", **given) == source


@pytest.mark.parametrize("version", ["51.2", "51.2.1", "v53.0", "53.1", "cloud-hypervisor v54.0.0-dirty"])
def test_versions_that_are_used(version: str) -> None:
    assert cloud_hypervisor_refusals(version) == []


def test_a_version_that_is_none() -> None:
    with pytest.raises(AnsibleFilterError, match="is no version"):
        cloud_hypervisor_refusals("latest")
