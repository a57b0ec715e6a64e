# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role cloud_hypervisor as it runs, with programs that tell a version and do nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

import ansible_collections.agentfleet.metal as collection

COLLECTIONS = Path(next(iter(collection.__path__))).parents[2]
PLAY = """
- hosts: localhost
  gather_facts: false
  roles: [agentfleet.metal.cloud_hypervisor]
"""


class Role:
    """Runs of the role below a directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        (root / "play.yml").write_text(PLAY)
        (root / "ansible.cfg").write_text("")  # none of the user's

    def program(self, version: str) -> tuple[str, str]:
        """A program that tells a version: its path and SHA-256."""
        path = self.root / f"program-{version}"
        path.write_text(f"#!/bin/sh\necho 'cloud-hypervisor v{version}'\n")
        path.chmod(0o755)
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()

    def run(self, *words: str, **variables: t.Any) -> tuple[int, int, str]:
        """Exit code, number of changed tasks, and what was printed."""
        given = {f"cloud_hypervisor_{key}": value for key, value in variables.items()}
        extra = json.dumps({**given, "cloud_hypervisor__home": str(self.home)})
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_CONFIG": str(self.root / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", "from ansible.cli.playbook import main; main()", "--inventory", "localhost,", "--connection", "local",
             "--extra-vars", extra, "--extra-vars", f"ansible_python_interpreter={sys.executable}", *words,
             str(self.root / "play.yml")],
            capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        changed = re.search(r"changed=(\d+)", done.stdout)
        return done.returncode, int(changed.group(1)) if changed else -1, done.stdout + done.stderr

    def there(self) -> dict[str, str]:
        """Version -> what its program tells, and what ``default`` means."""
        found = {}
        for path in sorted(self.home.iterdir()) if self.home.exists() else ():
            if path.is_symlink():
                found[path.name] = os.readlink(path)
            elif (path / "cloud-hypervisor").exists():
                argv = [path / "cloud-hypervisor", "--version"]
                found[path.name] = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[-1]
        return found


@pytest.fixture
def role(tmp_path: Path) -> Role:
    if os.geteuid() != 0:
        pytest.skip("programs are installed as root's")
    return Role(tmp_path)


def test_versions_are_side_by_side_and_a_second_run_changes_nothing(role: Role) -> None:
    path, digest = role.program("53.0")
    url = {"version": "53.0", "url": f"file://{path}", "sha256": digest}
    code, predicted, text = role.run("--check", **url)
    assert code == 0 and role.there() == {}, text
    code, changed, text = role.run(**url)
    assert (code, changed, role.there()) == (0, predicted, {"53.0": "v53.0", "default": "53.0"}), text
    code, changed, text = role.run(**url)
    assert (code, changed) == (0, 0), text
    older = {"version": "51.2", "program": role.program("51.2")[0]}
    code, _changed, text = role.run(**older)
    assert (code, role.there()) == (0, {"51.2": "v51.2", "53.0": "v53.0", "default": "51.2"}), text


def test_what_is_not_what_was_asked_for_is_not_the_default(role: Role) -> None:
    path, digest = role.program("53.0")
    code, _changed, text = role.run(version="53.0", url=f"file://{path}", sha256="0" * 64)
    assert code != 0 and "checksum" in text.lower() and role.there() == {}, text
    code, _changed, text = role.run(version="53.1", file=path, sha256=digest)
    assert code != 0 and "default" not in role.there()
    assert "cloud_hypervisor_version: 53.1: the file tells cloud-hypervisor v53.0" in " ".join(text.split())


def test_a_version_that_is_there_stays_what_it_is(role: Role) -> None:
    newer, source = role.program("54.0"), role.root / "updated"
    source.write_bytes(Path(role.program("53.0")[0]).read_bytes())
    source.chmod(0o755)
    asked = {"version": "53.0", "program": str(source)}
    assert role.run(**asked)[0] == 0
    source.write_bytes(Path(newer[0]).read_bytes())
    for words in (["--check"], []):
        code, changed, text = role.run(*words, **asked)
        assert (code, changed, role.there()) == (0, 0, {"53.0": "v53.0", "default": "53.0"}), text
    # Another SHA-256 asks for another file, which does not get the name of a version that it is not.
    code, _changed, text = role.run(version="53.0", url=f"file://{newer[0]}", sha256=newer[1])
    assert code != 0 and "53.0: the url tells cloud-hypervisor v54.0" in " ".join(text.split())
    assert role.there() == {"53.0": "v53.0", "default": "53.0"}
    assert os.listdir(role.home / "53.0") == ["cloud-hypervisor"]


def test_half_a_program_is_brought_again(role: Role) -> None:
    asked = {"version": "53.0", "program": role.program("53.0")[0]}
    assert role.run(**asked)[0] == 0
    (role.home / "53.0/cloud-hypervisor").write_bytes(b"")
    predicted = role.run("--check", **asked)[1]
    code, changed, text = role.run(**asked)
    assert (code, changed, role.there()) == (0, predicted, {"53.0": "v53.0", "default": "53.0"}), text
    assert changed == 1
