# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The version policy of Cloud Hypervisor, and what its role is asked for, checked on the controller."""

from __future__ import annotations

import os
import re

from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.module_utils._cloud_hypervisor import (
    RECOMMENDED,
    parse_version,
    refusals,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._host import sha256_of
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

SOURCES = ("url", "file", "program", "package")


def cloud_hypervisor_refusals(version):
    """Why a version is not used; empty when it is."""
    numbers = parse_version(str(version))
    if not numbers:
        raise AnsibleFilterError(
            f"cloud_hypervisor_refusals: {version!r} is no version; write one such as {RECOMMENDED}"
        )
    return refusals(numbers)


def cloud_hypervisor_source(version, **given):
    """Which one source a version comes from: ``url``, ``file``, ``program`` or ``package``."""
    try:
        _check_version(version)
        named = [source for source in SOURCES if given.get(source)]
        if len(named) != 1:
            raise Refused(
                "cloud_hypervisor_url",
                given.get("url", ""),
                f"{len(named)} sources are given ({', '.join(named) or 'none'})",
                "Give one of " + ", ".join(f"cloud_hypervisor_{source}" for source in SOURCES),
            )
        (source,) = named
        _check_sha256(source, given.get("sha256", ""))
        _CHECKS[source](given[source], given.get("sha256", ""))
    except Refused as refusal:
        raise AnsibleFilterError(f"cloud_hypervisor_source: {refusal}") from refusal
    return source


def _check_version(version):
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", str(version)):
        raise Refused("cloud_hypervisor_version", version, "not a version", f"Write one such as {RECOMMENDED}")
    reasons = refusals(parse_version(str(version)))
    if reasons:
        raise Refused("cloud_hypervisor_version", version, "; ".join(reasons), f"Use {RECOMMENDED}")


def _check_sha256(source, sha256):
    needed = source in ("url", "file")
    if needed and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise Refused(
            "cloud_hypervisor_sha256", sha256, "not a SHA-256",
            "Give the 64 hexadecimal digits (in lower case) that sha256sum prints for the file that you trust",
        )  # fmt: skip
    if sha256 and not needed:
        raise Refused(
            "cloud_hypervisor_sha256", sha256, f"nothing is verified for cloud_hypervisor_{source}",
            "Leave it out, or give the file with cloud_hypervisor_file",
        )  # fmt: skip


def _check_url(url, _sha256):
    if not re.match(r"(https?|file)://\S+$", url):
        raise Refused("cloud_hypervisor_url", url, "not a URL", "Begin with https://, http:// or file://")


def _check_file(path, sha256):
    if not os.path.isfile(path):
        raise Refused("cloud_hypervisor_file", path, "no such file on the controller", "Give the path of the program")
    if (found := sha256_of(path)) != sha256:
        raise Refused(
            "cloud_hypervisor_file", path, f"its SHA-256 is {found}",
            "Give the file that cloud_hypervisor_sha256 belongs to",
        )  # fmt: skip


def _check_program(path, _sha256):
    if not path.startswith("/"):
        raise Refused(
            "cloud_hypervisor_program", path, "not an absolute path", "Write a path such as /usr/bin/cloud-hypervisor"
        )


def _check_package(name, _sha256):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+.:~_-]*", name):
        raise Refused("cloud_hypervisor_package", name, "not a name of a package", "Name the distribution's package")


_CHECKS = {"url": _check_url, "file": _check_file, "program": _check_program, "package": _check_package}


class FilterModule:
    """Filters of this file."""

    def filters(self):
        """Name to function."""
        return {
            "cloud_hypervisor_refusals": cloud_hypervisor_refusals,
            "cloud_hypervisor_source": cloud_hypervisor_source,
        }
