# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the scenarios' tests share: run a playbook and look at its tasks, fingerprint a host, cut its power."""

from __future__ import annotations

import json
import os
import subprocess
import typing as t
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import testinfra

ROOT = Path(__file__).resolve().parent.parent
PLAY_TIMEOUT_SECONDS = 1500
# A lab of its own beside those of `make demo` and of other scenarios; the same as in .config/molecule/config.yml.
LAB_DIRECTORY = ROOT / "build/molecule" / os.environ.get("MOLECULE_SCENARIO_NAME", "default")
FIRST_PORT = int(os.environ.get("AGENTFLEET_LAB_PORT", "2322"))
VARIABLES = {
    "lab_dir": str(LAB_DIRECTORY),
    "lab_first_port": FIRST_PORT,
    "report_directory": str(LAB_DIRECTORY / "report"),
}

# Everything that a check run must not touch: configuration, our programs and units, and the state of the
# hardware that our roles manage. Times, caches and logs are left out.
FINGERPRINT = r"""
{
  find /etc /usr/local /boot/grub /var/lib/agentfleet /opt -xdev -type f -not -path '*/__pycache__/*' \
    -not -name grubenv -not -path '/etc/.pwd.lock' -exec sha256sum {} + 2>/dev/null
  find /etc /usr/local /var/lib/agentfleet /opt -xdev -type l -printf 'link %p -> %l\n' 2>/dev/null
  systemctl list-unit-files --no-legend --no-pager
  lsmod | awk 'NR > 1 {print "module", $1}'
  for d in /sys/bus/pci/devices/*; do
    echo "driver ${d##*/} $(basename "$(readlink "$d/driver")") $(cat "$d/driver_override")"
  done
  grep -H . /sys/bus/pci/devices/*/sriov_numvfs /sys/bus/cxl/devices/region*/commit \
    /sys/devices/system/memory/auto_online_blocks /sys/kernel/mm/numa/demotion_enabled \
    /sys/kernel/mm/mempolicy/weighted_interleave/node* /sys/devices/system/node/online \
    /sys/devices/system/node/node*/hugepages/*/nr_hugepages /sys/module/zswap/parameters/* 2>/dev/null
  sysctl -a 2>/dev/null |
    grep -E '^(vm\.(swappiness|nr_|overcommit|max_map|zone_reclaim)|kernel\.numa|net\.ipv4\.ip_forward|fs\.aio-max)'
  getent passwd; getent group
  dpkg-query -W -f '${Package} ${Version}\n'
} | sort
"""


@dataclass
class Task:
    """One task's outcome on one host."""

    name: str
    host: str
    changed: bool
    failed: bool
    skipped: bool
    result: dict[str, t.Any]


@dataclass
class Played:
    """A playbook that ran."""

    rc: int
    text: str
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)

    def changed(self) -> list[str]:
        """The tasks that changed something, in order."""
        return [f"{task.host}: {task.name}" for task in self.tasks if task.changed]

    def failures(self) -> str:
        """The messages of all failed tasks."""
        return "\n".join(f"{x.name}: {x.result.get('msg', x.result)}" for x in self.tasks if x.failed) or self.text


class Lab:
    """The lab of inventories/lab as a test drives it."""

    root = ROOT
    report_directory = LAB_DIRECTORY / "report"

    def connection(self, name: str, port: int = FIRST_PORT) -> t.Any:
        """A testinfra host that is reached like Ansible reaches it, with its own key and its pinned host key."""
        return testinfra.get_host(
            f"ssh://root@127.0.0.1:{port}",
            ssh_identity_file=str(LAB_DIRECTORY / name / "id_ed25519"),
            ssh_extra_args=f"-o UserKnownHostsFile={LAB_DIRECTORY / name / 'known_hosts'} -o IdentitiesOnly=yes",
        )

    def start(self, playbook: str, *arguments: str, **variables: t.Any) -> subprocess.Popen[str]:
        """Start a playbook of this collection; its tasks' outcome comes as JSON on its standard output."""
        return self._open("ansible-playbook", f"playbooks/{playbook}.yml", *arguments, **variables)

    def _open(self, *command: str, **variables: t.Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--inventory=inventories/lab", f"--extra-vars={json.dumps({**VARIABLES, **variables})}"],
            cwd=ROOT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_LOAD_CALLBACK_PLUGINS": "true",
                "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_module(self, name: str, **arguments: t.Any) -> subprocess.Popen[str]:
        """Start a module of this collection on metal1."""
        return self._open(
            "ansible", "metal1", f"--module-name=agentfleet.metal.{name}", f"--args={json.dumps(arguments)}"
        )

    def module(self, name: str, **arguments: t.Any) -> dict[str, t.Any]:
        """Call a module of this collection on metal1; it must succeed."""
        played = self.finish(self.start_module(name, **arguments))
        assert played.rc == 0, played.failures()
        return played.tasks[-1].result

    def role(self, name: str, **variables: t.Any) -> None:
        """Run a role of this collection on metal1; it must succeed."""
        wish = json.dumps({"name": f"agentfleet.metal.{name}"})
        played = self.finish(
            self._open("ansible", "metal1", "--module-name=include_role", f"--args={wish}", **variables)
        )
        assert played.rc == 0, played.failures()

    def finish(self, running: subprocess.Popen[str]) -> Played:
        """Wait for a started playbook and parse what its tasks did."""
        try:
            out, err = running.communicate(timeout=PLAY_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
        played = Played(running.returncode, out + err)
        if "{" not in out:
            return played
        report, _end = json.JSONDecoder().raw_decode(out, out.index("{"))
        played.stats = report["stats"]
        for one in report["plays"]:
            for task in one["tasks"]:
                for host, result in task["hosts"].items():
                    played.tasks.append(
                        Task(
                            task["task"]["name"],
                            host,
                            bool(result.get("changed")),
                            bool(result.get("failed") or result.get("unreachable")),
                            bool(result.get("skipped")),
                            result,
                        )
                    )
        return played

    def play(self, playbook: str, *arguments: str, **variables: t.Any) -> Played:
        """Run a playbook to its end."""
        return self.finish(self.start(playbook, *arguments, **variables))

    def succeed(self, playbook: str, *arguments: str, **variables: t.Any) -> Played:
        """Run a playbook that must succeed.

        QEMU's emulation of nested virtualization can fault, which resets the emulated host (docs/lab.md, Limits). The
        run then ends as it would when a real server loses power, and a second one must end well: what is there is not
        done again, so that both together did what one would have done. It is said aloud in the output.
        """
        played = self.play(playbook, *arguments, **variables)
        if played.rc != 0 and any(task.result.get("unreachable") for task in played.tasks):
            warnings.warn(f"{playbook}: the emulated host was lost; running again: {played.failures()}", stacklevel=2)
            self.play("lab_up")
            before, played = played, self.play(playbook, *arguments, **variables)
            seen = before.changed()  # what changed before the loss may have to be finished, and counts once
            played.tasks = before.tasks + [x for x in played.tasks if f"{x.host}: {x.name}" not in seen]
        assert played.rc == 0, played.failures()
        return played

    def hosts(self, state: str) -> None:
        """Bring the hosts to a state of role lab: started, restarted, reset, power_cut, ..."""
        self.succeed("lab_up", lab_state=state)

    def fingerprint(self, host: t.Any) -> set[str]:
        """Every line of a host's state that only a real run may change."""
        done = host.run("bash -s <<'SCRIPT'\n" + FINGERPRINT + "\nSCRIPT")
        assert done.rc == 0, done.stderr
        return set(done.stdout.splitlines())


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab."""
    return Lab()


@pytest.fixture(scope="session")
def host(lab: Lab) -> t.Any:
    """The lab host metal1, over ssh."""
    return lab.connection("metal1")
