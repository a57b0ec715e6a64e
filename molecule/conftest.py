# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the scenarios' tests share: run a playbook and look at its tasks, fingerprint a host, cut its power, ask microVMs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import time
import typing as t
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import testinfra

ROOT = Path(__file__).resolve().parent.parent
PLAY_TIMEOUT_SECONDS = 2400  # of one that hangs; a machine can be four times slower than another one
# Seconds since the epoch, from .ci/run_tests.py.
BEGIN_BEFORE = float(os.environ.get("AGENTFLEET_TESTS_BEGIN_BEFORE", "inf"))
# A lab of its own beside those of `make demo` and of other scenarios; the same as in .config/molecule/config.yml.
LAB_DIRECTORY = ROOT / "build/molecule" / os.environ.get("MOLECULE_SCENARIO_NAME", "default")
FIRST_PORT = int(os.environ.get("AGENTFLEET_LAB_PORT", "2322"))
VARIABLES = {
    "lab_dir": str(LAB_DIRECTORY),
    "lab_first_port": FIRST_PORT,
    "report_directory": str(LAB_DIRECTORY / "report"),
}

# Everything that a check run must not touch: configuration, our programs and units, and the state of the
# hardware that our roles manage. Times, caches and logs are left out. Which units are enabled is told by links below /etc:
# systemctl gives up after 25 seconds, which an emulated host may need to list all units.
FINGERPRINT = r"""
{
  find /etc /usr/local /boot/grub /var/lib/agentfleet /opt -xdev -type f -not -path '*/__pycache__/*' \
    -not -name grubenv -not -path '/etc/.pwd.lock' -exec sha256sum {} + 2>/dev/null
  find /etc /usr/local /var/lib/agentfleet /opt -xdev -type l -printf 'link %p -> %l\n' 2>/dev/null
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


# What microVMs have on a host, one thing a line, without what differs between two starts. Slots are of boots, and stay
# until somebody else wants to boot; the target is reached at the next boot; agentfleet-restore is not of microVMs.
LEFT = r"""
units=$(systemctl list-units --all --no-legend --plain 'agentfleet*') || exit
ps -eo args= | awk '$1 ~ /qemu-system|cloud-hypervisor|virtiofsd/ {print "process", substr($0, 1, 120)}'
ls /sys/class/net | sed 's/^/device /'
echo "$units" |
  awk '$1 && $1 !~ /restore/ && $2 != "not-found" {print "unit", $1, $1 ~ /target$/ ? "" : $3}'
find /etc/systemd/system /run/systemd/system /etc/tmpfiles.d -name '*agentfleet*' -not -name '*restore*'
find /sys/fs/cgroup -name 'agentfleet*' -printf 'cgroup %p\n'
awk '/agentfleet/ {print "mount", $2}' /proc/mounts
ss -Hlx | awk '/agentfleet/ {print "socket", $5}'
find /run/agentfleet /var/lib/agentfleet/microvms /var/lib/agentfleet/volumes /var/lib/agentfleet/shares \
  /var/lib/agentfleet/snapshots -mindepth 1 -not -path '*/slots/*' 2>/dev/null
nft list tables
sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding
"""
# A guest that does not answer ends microvm-exec with 255, which over ssh would mean that the host does not.
EXEC = "/usr/local/lib/agentfleet/microvm-exec"
NOT_REACHED = 253
ENDED = re.compile("it ended while this was done|QEMU ended (before|while) ")  # of a VMM, while its microVM was changed
READY_SECONDS = 600
FURTHER_SECONDS = 120  # for each microVM more: after a power cut an emulated host starts them one by one


@dataclass
class Task:
    """One task's outcome on one host."""

    name: str
    host: str
    changed: bool
    failed: bool
    skipped: bool
    result: dict[str, t.Any]

    @property
    def lost(self) -> bool:
        """Whether the emulation lost the host or a guest. A host key that is not the pinned one is no loss but a mistake."""
        said = str(self.result.get("msg"))
        return bool((self.result.get("unreachable") and "host key" not in said.lower()) or ENDED.search(said))


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
    directory = LAB_DIRECTORY
    report_directory = LAB_DIRECTORY / "report"
    first_port = FIRST_PORT
    variables: t.ClassVar[dict[str, t.Any]] = VARIABLES
    declared: t.Mapping[str, t.Any] = {}  # what lab_up is given for the hosts of a scenario, as in its molecule.yml

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def accelerate(self, on: bool = True) -> None:
        """Run playbooks with mitogen, or no longer: Python starts once on each host instead of once for each task.

        On an emulated CPU that start is what a task costs. The modules and their order are the same.
        """
        package = importlib.util.find_spec("ansible_mitogen")
        assert package is not None and package.submodule_search_locations
        plugins = Path(package.submodule_search_locations[0]) / "plugins/strategy"
        given = {"ANSIBLE_STRATEGY_PLUGINS": str(plugins), "ANSIBLE_STRATEGY": "mitogen_linear"}
        self.environment = given if on else {}

    def connection(self, name: str, port: int = FIRST_PORT) -> t.Any:
        """A testinfra host that is reached like Ansible reaches it, with its own key and its pinned host key.

        Its commands share one connection: on an emulated CPU each handshake costs a second. It ends with the host.
        """
        sockets = Path.home() / ".ansible/cp"
        sockets.mkdir(parents=True, exist_ok=True)
        return testinfra.get_host(
            f"ssh://root@127.0.0.1:{port}",
            ssh_identity_file=str(LAB_DIRECTORY / name / "id_ed25519"),
            ssh_extra_args=f"-o UserKnownHostsFile={LAB_DIRECTORY / name / 'known_hosts'} -o IdentitiesOnly=yes",
            controlpath=str(sockets / f"agentfleet-{port}"),
            controlpersist=600,
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
                **self.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_module(self, name: str, on: str = "metal1", **arguments: t.Any) -> subprocess.Popen[str]:
        """Start a module of this collection."""
        given = [f"--args={json.dumps(arguments)}"] if arguments else []
        return self._open("ansible", on, f"--module-name=agentfleet.metal.{name}", *given)

    def module(self, name: str, on: str = "metal1", **arguments: t.Any) -> dict[str, t.Any]:
        """Call a module of this collection; it must succeed."""
        played = self.finish(self.start_module(name, on, **arguments))
        assert played.rc == 0, played.failures()
        return played.tasks[-1].result

    def refused(self, name: str, **arguments: t.Any) -> str:
        """The message of a module's call on metal1, which must not succeed."""
        played = self.finish(self.start_module(name, **arguments))
        assert played.rc != 0, played.text
        return played.failures()

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

        QEMU's emulation of nested virtualization can fault, which resets the emulated host or one of its guests
        (docs/lab.md, Limits). The run then ends as it would when a real server loses power or a VMM dies, and a second
        one must end well: what is there is not done again, so that both together did what one would have done. It is
        said aloud in the output.
        """
        played = self.play(playbook, *arguments, **variables)
        lost = [x for x in played.tasks if x.lost]
        if played.rc != 0 and lost:
            warnings.warn(f"{playbook}: the emulation lost a host or a guest; again: {played.failures()}", stacklevel=2)
            self.play("lab_up", **self.declared)
            before, played = played, self.play(playbook, *arguments, **variables)
            seen = before.changed()  # what changed before the loss may have to be finished, and counts once
            played.tasks = before.tasks + [x for x in played.tasks if f"{x.host}: {x.name}" not in seen]
        assert played.rc == 0, played.failures()
        return played

    def hosts(self, state: str) -> None:
        """Bring the hosts to a state of role lab: started, restarted, reset, power_cut, ..."""
        self.succeed("lab_up", **self.declared, lab_state=state)

    def fingerprint(self, host: t.Any) -> set[str]:
        """Every line of a host's state that only a real run may change."""
        done = host.run("bash -s <<'SCRIPT'\n" + FINGERPRINT + "\nSCRIPT")
        assert done.rc == 0, done.stderr
        return set(done.stdout.splitlines())


class MicroVms:
    """The microVMs of one host: calls of the modules, what they and their guests say, and what they leave."""

    def __init__(self, lab: Lab, host: t.Any) -> None:
        self.lab, self.host = lab, host

    def _arguments(self, instances: t.Sequence[t.Any], arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        # One boot at a time: docs/lab.md, Limits.
        common = {"memory_overcommit": 2.0, "parallel": 1, "ready_timeout_seconds": READY_SECONDS}
        return {**common, "instances": instances, **arguments}

    def bring(self, *instances: t.Any, **arguments: t.Any) -> dict[str, t.Any]:
        """One call of the module ``microvm``, which must succeed."""
        return self.lab.module("microvm", **self._arguments(instances, arguments))

    def start(self, *instances: t.Any, **arguments: t.Any) -> subprocess.Popen[str]:
        """Start such a call."""
        return self.lab.start_module("microvm", **self._arguments(instances, arguments))

    def refused(self, *instances: t.Any, **arguments: t.Any) -> str:
        """The message of such a call, which must not succeed."""
        return self.lab.refused("microvm", **self._arguments(instances, arguments))

    def look(self, *names: str) -> dict[str, dict[str, t.Any]]:
        """Name -> microVM as ``microvm_info`` sees it; all when none is named."""
        wish: dict[str, t.Any] = {"names": names} if names else {}
        found = self.lab.module("microvm_info", agent_timeout_seconds=60, **wish)["instances"]
        return {one["name"]: one for one in found}

    def until(
        self, what: str, *names: str, so: t.Callable[[dict[str, t.Any]], bool] = lambda one: bool(one["ready"])
    ) -> dict[str, dict[str, t.Any]]:
        """Look, within bounds, until it is so of each; by default until each answers."""
        end = time.monotonic() + READY_SECONDS + FURTHER_SECONDS * len(names[1:])
        while True:
            seen = self.look(*names)
            if all(so(one) for one in seen.values()):
                return seen
            states = {name: (one["state"], one["failure"], one["ready"]) for name, one in seen.items()}
            assert time.monotonic() < end, f"{what}: {states}"

    def run(self, name: str, command: str, stdin: str = "") -> t.Any:
        """Run a shell command in a microVM as root, over vsock, by the program that the connection plugin uses."""
        words = f"{EXEC} --timeout 120 {name} {shlex.quote(command)}"
        feed, text = ("<<'INPUT'", f"{stdin}\nINPUT\n") if stdin else ("</dev/null", "")
        return self.host.run(
            f"code=0; {words} {feed} || code=$?\n{text}[ $code != 255 ] || code={NOT_REACHED}; exit $code"
        )

    def inside(self, name: str, command: str, stdin: str = "") -> str:
        """The same; it must succeed, and what it prints comes back."""
        done = self.run(name, command, stdin)
        assert done.rc == 0, f"{name}: {done.stdout} {done.stderr}"
        return str(done.stdout)

    def assert_differ(self, *names: str) -> None:
        """Guests, each with one network, have in common neither what their kernels draw by lot, nor machine-id, nor MAC."""
        look = "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id; grep -hv ^00:00 /sys/class/net/*/address"
        seen = [self.inside(name, look).splitlines() for name in names]
        assert all(len(lines) == 3 for lines in seen), seen
        assert all(len({lines[number] for lines in seen}) == len(names) for number in range(3)), seen

    def left(self) -> set[str]:
        """What microVMs have on the host now."""
        done = self.host.run(LEFT)
        assert done.rc == 0 and "device lo" in done.stdout, done.stderr
        return set(done.stdout.splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave out what would begin too late for `make test` to end in time; what builds on it comes later still."""
    if time.time() > BEGIN_BEFORE:
        pytest.skip("its turn came too late on a machine that is this slow")


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab."""
    return Lab()


@pytest.fixture(scope="session")
def host(lab: Lab) -> t.Any:
    """The lab host metal1, over ssh."""
    return lab.connection("metal1")


@pytest.fixture(scope="session")
def microvms(lab: Lab, host: t.Any) -> MicroVms:
    """The microVMs of metal1."""
    return MicroVms(lab, host)
