# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make a collections tree: requirements/collections.yml out of the `ansible` wheel, and a link to this checkout."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"


def unpack(target: Path) -> None:
    """Unpack the required collections, each with the version that the bundle has."""
    wanted = [item["name"] for item in yaml.safe_load((REQUIREMENTS / "collections.yml").read_text())["collections"]]
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
            + ["--only-binary=:all:", "--require-hashes", "-r", str(REQUIREMENTS / "ansible.txt"), "-d", wheels],
            check=True,
        )
        (wheel,) = Path(wheels).glob("ansible-*.whl")
        print(f"== collections from {wheel.name}: {', '.join(wanted)}", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in wanted:
                prefix = f"ansible_collections/{name.replace('.', '/')}/"
                members = [member for member in archive.namelist() if member.startswith(prefix)]
                if not members:
                    sys.exit(f"{wheel.name} has no {name}: take it out of requirements/collections.yml")
                archive.extractall(target, members)


if __name__ == "__main__":
    tree = Path(sys.argv[1])
    unpack(tree)
    link = tree / "ansible_collections/agentfleet/metal"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT)
