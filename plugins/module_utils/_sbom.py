# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The software bill of materials of an image: CycloneDX JSON by debsbom, with the Python packages added.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import sys
import typing as t
import uuid

from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host

PROGRAM, REQUIREMENT = "debsbom", "debsbom[cdx]"


def program() -> str | None:
    """The tool: beside the Python that runs this, or in PATH."""
    return shutil.which(PROGRAM, path=os.path.dirname(sys.executable)) or shutil.which(PROGRAM)


def python_packages(tree: str) -> dict[str, str]:
    """Name -> version of what pip installed in a tree (Debian's own packages are dpkg's)."""
    found = {}
    host = Host(tree)
    for pattern in ("/usr/lib/python3/dist-packages", "/usr/local/lib/python3*/*-packages"):
        for metadata in host.glob(f"{pattern}/*.dist-info/METADATA"):
            if not host.exists(metadata.replace("/METADATA", "/RECORD")):
                continue  # Debian removes the record of installed files
            fields = dict(re.findall(r"^(Name|Version): (.+)$", host.read(metadata), re.MULTILINE))
            if len(fields) == 2:
                found[fields["Name"]] = fields["Version"]
    return found


def make(host: Host, tree: str, name: str, digest: str, epoch: int, target: str) -> None:
    """Write the document; the same tree and digest give the same bytes.

    :param digest: of the image's definition
    """
    timestamp = datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc).isoformat()
    document: dict[str, t.Any] = {"components": [], "dependencies": []}
    if os.path.exists(f"{tree}/var/lib/dpkg/status"):
        # Its order of sets depends on the hash seed.
        host.run(
            ["env", "PYTHONHASHSEED=0", program() or PROGRAM, "generate", "--sbom-type=cdx", f"--root={tree}",
             f"--out={target}", f"--timestamp={timestamp}", f"--cdx-serialnumber={uuid.UUID(digest[:32])}",
             f"--distro-name={name}", f"--distro-version={digest[:12]}"],
            timeout_seconds=600,
        )  # fmt: skip
        written = target if os.path.exists(target) else f"{target}.cdx.json"
        with open(written, encoding="utf-8") as file:
            document = json.load(file)
        os.unlink(written)
    document.setdefault("bomFormat", "CycloneDX")
    document.setdefault("specVersion", "1.6")
    document.setdefault("version", 1)
    document.setdefault("serialNumber", f"urn:uuid:{uuid.UUID(digest[:32])}")
    component = {"type": "operating-system", "bom-ref": f"CDXRef-{name}", "name": name, "version": digest[:12]}
    document.setdefault("metadata", {"timestamp": timestamp, "component": component})
    for package, version in sorted(python_packages(tree).items()):
        purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', package).lower()}@{version}"
        document["components"].append(
            {"type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl}
        )
    Host("/").write(target, json.dumps(document, indent=1, sort_keys=True) + "\n")
