# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The package mirror that a machine's own apt configuration uses.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host


def sources(host: Host) -> t.Iterator[tuple[str, list[str]]]:
    """Each (URI, components) of the machine's binary package sources, in apt's order."""
    for path in ["/etc/apt/sources.list", *host.glob("/etc/apt/sources.list.d/*")]:
        text = host.read(path)
        if path.endswith(".sources"):
            yield from _deb822(text)
        elif path.endswith(".list"):
            yield from _one_line(text)


def _one_line(text: str) -> t.Iterator[tuple[str, list[str]]]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] != ["deb"]:
            continue
        if words[1:2] and words[1].startswith("["):  # options: up to the word that closes the bracket
            while len(words) > 1 and not words.pop(1).endswith("]"):
                pass
        if len(words) > 2:
            yield words[1], words[3:]


def _deb822(text: str) -> t.Iterator[tuple[str, list[str]]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            elif ":" in line:
                key, _colon, value = line.partition(":")
                key = key.lower()
                fields[key] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0")
        if enabled and "deb" in fields.get("types", "").split():
            for uri in fields.get("uris", "").split():
                yield uri, fields.get("components", "").split()


def mirror_of(host: Host, family: str) -> str | None:
    """The first mirror of a distribution family in the machine's apt configuration.

    :param family: last part of the archive's path: ``debian``, ``ubuntu``
    """
    for uri, components in sources(host):
        if uri.startswith("mirror+file:"):
            uri = (host.read(uri[len("mirror+file:") :]).split() or [""])[0]
        uri = uri.rstrip("/")
        # Vendors and PPAs have archives below a directory of the distribution's name, too.
        if (
            re.match(r"(https?|file|copy|ftp):/(?!/(private-)?ppa\.)", uri)
            and uri.endswith(f"/{family}")
            and "main" in components
        ):
            return uri
    return None
