# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lab hosts: emulated bare metal on this machine, all of one lab in one call.

A host is a directory below the lab's: its disk, its keys, its console log, and
while it runs a supervisor (``_lab_supervisor.py``) with a QEMU. Whether it runs
is asked of the kernel (who has its lock file open), never of a pid file.

This module is private to the collection and imports nothing of Ansible.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.agentfleet.metal.plugins.module_utils import _lab_supervisor
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_image import MINIMUM_DISK, mbr
from ansible_collections.agentfleet.metal.plugins.module_utils._lab_qemu import (
    Spec,
    argv,
    backing_files,
    check_together,
    memory_bytes,
    normalize,
)
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import HostError, Refused, Step
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

STATES = ("started", "stopped", "restarted", "reset", "power_cut", "absent")
OLDEST_QEMU = (8, 1)
CONSOLE_LINES = 15


class LabHosts:
    """Hosts of one lab directory, brought to one state."""

    audited = False  # work of the controller, not a change of a host

    def __init__(self, host: Host, params: t.Mapping[str, t.Any]) -> None:
        """Validate every description before any host is touched."""
        self.host = host
        self.state: str = params["state"]
        self.program: str = params.get("qemu") or "qemu-system-x86_64"
        self.start_timeout: float = params.get("start_timeout_seconds") or 600
        self.stop_timeout: float = (
            params["stop_timeout_seconds"] if params.get("stop_timeout_seconds") is not None else 60
        )
        self.directory = os.path.realpath(os.path.expanduser(params["dir"]))
        self.starting = self.state in ("started", "restarted", "reset")
        self.image = params.get("image")
        self.supervisor = inspect.getsource(_lab_supervisor)  # here, since linecache fails in threads now and then
        hosts = params.get("hosts")
        if self.starting:
            self.specs = [normalize(f"hosts[{index}]", raw) for index, raw in enumerate(hosts or [])]
            check_together("hosts", self.specs)
            self._check_resources(hosts or [])
        else:  # to end a host takes no more than its name, and to end all of a lab not even that
            self.specs = [{"name": name} for name in ([raw["name"] for raw in hosts] if hosts else self._known())]

    def _known(self) -> list[str]:
        """The hosts that have ever been made in this lab."""
        return [
            name for name in self.host.names(self.directory) if self.host.exists(f"{self.directory}/{name}/run.json")
        ]

    def _check_resources(self, hosts: t.Sequence[t.Mapping[str, t.Any]]) -> None:
        if not hosts:
            raise Refused("hosts", hosts, "no host is described", "Describe at least one")
        if not self.image:
            raise Refused("image", self.image, "a host is made of an image", "Give the path that lab_image returns")
        for index, spec in enumerate(self.specs):
            if spec["disk"] < MINIMUM_DISK:
                raise Refused(
                    f"hosts[{index}].disk",
                    hosts[index].get("disk"),
                    "smaller than the image",
                    f"Use at least {format_size(MINIMUM_DISK)}",
                )
        limit = self._machine_memory()
        need = sum(memory_bytes(spec) for spec in self.specs)
        if limit and need > limit:
            raise Refused(
                "hosts",
                ", ".join(f"{spec['name']} {format_size(memory_bytes(spec))}" for spec in self.specs),
                f"this machine has {limit >> 20}MiB of memory",
                "Give the hosts less memory, or start fewer of them",
            )

    def _machine_memory(self) -> int:
        """Bytes that this machine (or the container we are in) has; 0 if unknown."""
        total = self.host.memory_bytes()
        limit = self.host.read_int("/sys/fs/cgroup/memory.max")
        return min(total, limit) if limit and total else total

    def _path(self, spec: Spec, name: str = "") -> str:
        return os.path.join(self.directory, spec["name"], name).rstrip("/")

    # -- observe --------------------------------------------------------------

    def observe(self) -> dict[str, t.Any]:
        """Which hosts exist, run, answer and run as described."""
        found: dict[str, t.Any] = {"hosts": {}, "version": self._version() if self.starting else None}
        accelerator = self._accelerator() if self.starting else ""
        for spec in self.specs:
            run = self.host.read(self._path(spec, "run.json"))
            wish = json.loads(run) if run else {}
            running = bool(holders(self._path(spec, "lock")))
            found["hosts"][spec["name"]] = {
                "exists": self.host.exists(self._path(spec)),
                "disk": self.host.exists(self._path(spec, "disk.qcow2")),
                "image": wish.get("image"),
                "running": running,
                "accelerator": wish.get("accelerator") or accelerator,
                "ssh_port": wish.get("spec", {}).get("ssh_port"),
                "answers": False,
            }
            if self.starting:
                found["hosts"][spec["name"]] |= {
                    "answers": running and answers(spec["ssh_port"], 5),
                    "as_described": wish.get("spec") == spec,
                    "port_free": running or port_free(spec["ssh_port"]),
                }
        return found

    def _accelerator(self) -> str:
        """KVM only where the processor has it: /dev/kvm alone can exist and not run a guest.

        Under KVM, CXL memory that is online as system RAM can kill the guest, so that hosts with it are emulated.
        """
        flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", self.host.read("/proc/cpuinfo"), re.MULTILINE)
        cxl = any(spec["cxl"]["devices"] for spec in self.specs)
        if cxl or not flags or not os.access(self.host.path("/dev/kvm"), os.R_OK | os.W_OK):
            return "tcg"
        probe = [self.program, "-accel", "kvm", "-machine", "q35", "-cpu", "host", "-m", "64M", "-nodefaults"]
        probe += ["-display", "none", "-S", "-monitor", "stdio"]
        return "kvm" if self.host.run(probe, stdin="quit\n", timeout_seconds=20, check=False).rc == 0 else "tcg"

    def _version(self) -> tuple[int, ...] | None:
        match = re.search(r"version (\d+)\.(\d+)", self.host.run([self.program, "--version"], check=False).stdout)
        return tuple(map(int, match.groups())) if match else None

    def _argv(self, spec: Spec, accelerator: str) -> list[str]:
        return argv(spec, self._path(spec), self.directory, self.program, accelerator)

    # -- plan -----------------------------------------------------------------

    def plan(self, observed: t.Any) -> list[Step]:
        """One step for each kind of change, over all hosts that need it; a step does its hosts in parallel."""
        now = observed["hosts"]
        every = [spec["name"] for spec in self.specs]
        running = [name for name in every if now[name]["running"]]
        off = [name for name in running if self.state != "started" or not now[name]["as_described"]]
        remove = [name for name in every if self.state == "absent" and now[name]["exists"]]
        remove += [name for name in every if self.state == "reset" and now[name]["disk"]]
        start = [name for name in every if self.starting and (name in off or not now[name]["running"])]
        make = [name for name in start if self.state == "reset" or not now[name]["disk"]]
        waiting = [name for name in every if self.starting and (name in start or not now[name]["answers"])]
        self._check_can_start(observed, start)
        cut = self.state in ("power_cut", "reset", "absent")
        why = "the description differs from what runs" if self.state == "started" else f"state is {self.state}"
        steps = [
            self._step("cut the power of" if cut else "shut down", off, "running", "off", why, True),
            self._step(
                "remove",
                remove,
                "exists",
                "absent" if self.state == "absent" else "blank",
                f"state is {self.state}",
                True,
            ),
            self._step("make the disk of", make, None, f"an overlay of {self.image}", "the host has no disk"),
            self._step("start", start, "off", "running"),
            self._step("wait for", waiting, "no answer", "answers by ssh"),
        ]
        return [step for step in steps if step is not None]

    @staticmethod
    def _step(
        verb: str, names: list[str], before: t.Any, after: t.Any, why: str = "", disruptive: bool = False
    ) -> Step | None:
        return Step(verb, ", ".join(names), before, after, why, disruptive, data=(verb, names)) if names else None

    def _check_can_start(self, observed: t.Any, start: list[str]) -> None:
        if not start:
            return
        if observed["version"] is None:
            raise Refused("qemu", self.program, "it does not run", "Install the package qemu-system-x86")
        if observed["version"] < OLDEST_QEMU:
            raise Refused(
                "qemu",
                ".".join(map(str, observed["version"])),
                "emulates no volatile CXL memory (QEMU 8.1 and newer do; Debian 12's own 7.2 does not)",
                "On Debian 12 install it from bookworm-backports: apt install -t bookworm-backports qemu-system-x86 qemu-utils",
            )
        for name in ("disk.raw", "id_ed25519", "host_ed25519.pub"):
            if not self.host.exists(os.path.join(self.image or "", name)):
                raise Refused("image", self.image, f"it has no {name}", "Give the path that lab_image returns")
        for index, spec in enumerate(self.specs):
            if spec["name"] in start and not observed["hosts"][spec["name"]]["port_free"]:
                raise Refused(
                    f"hosts[{index}].ssh_port",
                    spec["ssh_port"],
                    "another program listens on 127.0.0.1 at this port",
                    "Give the host another port, or end that program (another lab?)",
                )

    def result(self, observed: t.Any) -> dict[str, t.Any]:
        """The state of each host."""
        hosts = []
        warnings = []
        for spec in self.specs:
            now = observed["hosts"][spec["name"]]
            hosts.append(
                {
                    "name": spec["name"],
                    "state": "started" if now["running"] else "stopped" if now["exists"] else "absent",
                    "answers": now["answers"],
                    "ssh_port": spec.get("ssh_port") or now["ssh_port"],
                    "accelerator": now["accelerator"],
                    "directory": self._path(spec),
                    "console": self._path(spec, "console.log"),
                    "image": now["image"],
                }
            )
            if self.starting and now["image"] not in (None, self.image):
                warnings.append(
                    f"{spec['name']} has a disk made of the image {now['image']}, not of {self.image}; "
                    "the state reset gives it a new one (what is on its disk is lost)."
                )
        return {"hosts": hosts, "warnings": warnings}

    # -- apply ----------------------------------------------------------------

    def apply(self, step: Step) -> None:
        """One kind of change to all its hosts at the same time; every host is tried before one's failure is told."""
        verb, names = step.data
        action = {
            "cut the power of": self._cut,
            "shut down": self._shut_down,
            "remove": self._remove,
            "make the disk of": self._make_disk,
            "start": self._start,
            "wait for": self._await,
        }[verb]
        specs = [spec for spec in self.specs if spec["name"] in names]
        with ThreadPoolExecutor(len(specs)) as pool:
            futures = [pool.submit(action, spec) for spec in specs]
        errors = [str(error) for error in (future.exception() for future in futures) if error]
        if errors:
            raise HostError("; ".join(errors))

    def _cut(self, spec: Spec) -> None:
        for pid in holders(self._path(spec, "lock")):
            _kill(pid, signal.SIGKILL)
        self._wait_off(spec, 10)

    def _shut_down(self, spec: Spec) -> None:
        for pid, name in holders(self._path(spec, "lock")).items():
            if name.startswith("python"):  # the supervisor, which presses the power button; QEMU is left to it
                _kill(pid, signal.SIGTERM)
        try:
            self._wait_off(spec, self.stop_timeout + 15)
        except HostError:
            self._cut(spec)

    def _wait_off(self, spec: Spec, seconds: float) -> None:
        self.host.wait(lambda: not holders(self._path(spec, "lock")), f"power-off of {spec['name']}", seconds)

    def _remove(self, spec: Spec) -> None:
        """Only what is ours, so that a wrong directory loses nothing."""
        place = self._path(spec)
        ours = {"disk.qcow2", "run.json", "lock", "supervisor.py", "supervisor.log", "console.log"}
        for name in [*ours, "id_ed25519", "known_hosts"]:
            self.host.remove(os.path.join(place, name))
        for name in self.host.names(place):
            if re.fullmatch(r"(nvme\d+n\d+|cxl\d+)\.(img|labels)", name):
                self.host.remove(os.path.join(place, name))
        if self.state == "absent":
            try:
                os.rmdir(self.host.path(place))
                os.rmdir(self.host.path(self.directory))
            except OSError:
                pass  # something of the user's, or another host, is there

    def _make_disk(self, spec: Spec) -> None:
        place, image = self._path(spec), str(self.image)
        os.makedirs(place, mode=0o700, exist_ok=True)
        disk, table = os.path.join(place, "disk.qcow2"), os.path.join(place, "mbr")
        try:
            base = os.path.join(image, "disk.raw")
            self.host.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", disk + ".new", str(spec["disk"])]
            )
            with open(base, "rb") as file:
                old = file.read(512)
            with open(table, "wb") as file:  # the partition ends where this host's disk does; the guest grows into it
                file.write(mbr(old, struct.unpack_from("<I", old, 440)[0], spec["disk"] // 512))
            self.host.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -s {table} 0 512", disk + ".new"])
        finally:
            self.host.remove(table)
        shutil.copyfile(os.path.join(image, "id_ed25519"), os.path.join(place, "id_ed25519"))
        os.chmod(os.path.join(place, "id_ed25519"), 0o600)
        with open(os.path.join(image, "host_ed25519.pub"), encoding="utf-8") as file:
            key = " ".join(file.read().split()[:2])
        self.host.write(os.path.join(place, "known_hosts"), f"[127.0.0.1]:{spec['ssh_port']} {key}\n")
        self.host.write(os.path.join(place, "run.json"), json.dumps({"image": image}))
        os.rename(disk + ".new", disk)

    def _start(self, spec: Spec) -> None:
        place = self._path(spec)
        for name, size in backing_files(spec).items():
            path = os.path.join(place, name)
            if not os.path.exists(path) or os.path.getsize(path) != size:
                with open(path, "ab") as file:
                    file.truncate(size)
        accelerator = self._accelerator()
        run = json.loads(self.host.read(os.path.join(place, "run.json")))
        run |= {"spec": spec, "accelerator": accelerator, "argv": self._argv(spec, accelerator)}
        run |= {"stop_timeout_seconds": self.stop_timeout}
        self.host.write(os.path.join(place, "run.json"), json.dumps(run, indent=2))
        key = self.host.read(os.path.join(place, "known_hosts")).partition(" ")[2]
        self.host.write(os.path.join(place, "known_hosts"), f"[127.0.0.1]:{spec['ssh_port']} {key}\n")
        self.host.write(os.path.join(place, "supervisor.py"), self.supervisor)
        with open(os.path.join(place, "supervisor.log"), "ab") as log:
            # It outlives Ansible.
            subprocess.Popen(  # pylint: disable=ansible-bad-function
                [sys.executable, "-I", os.path.join(place, "supervisor.py"), place],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.host.wait(lambda: bool(holders(os.path.join(place, "lock"))), f"start of {spec['name']}", 20)

    def _await(self, spec: Spec) -> None:
        """Until a real login works: the firmware, GRUB, the kernel, sshd, and both keys."""
        end = time.monotonic() + self.start_timeout
        place = self._path(spec)
        problem = "no answer on its ssh port"
        while time.monotonic() < end:
            if not holders(os.path.join(place, "lock")):
                raise HostError(f"{spec['name']} went off. {self._last_words(spec)}")
            if answers(spec["ssh_port"], 5):
                done = self.host.run(ssh_argv(place, spec["ssh_port"]) + ["true"], timeout_seconds=60, check=False)
                if done.rc == 0:
                    return
                problem = done.text
            time.sleep(0.5)
        raise HostError(
            f"{spec['name']}: no login within {self.start_timeout:g} seconds ({problem}). {self._last_words(spec)} "
            "It is left running; the state restarted power-cycles it"
        )

    def _last_words(self, spec: Spec) -> str:
        words = []
        for name in ("supervisor.log", "console.log"):
            lines = self.host.read(self._path(spec, name)).splitlines()[-CONSOLE_LINES:]
            words.append(f"Last lines of {self._path(spec, name)}: " + " | ".join(_printable(line) for line in lines))
        return " ".join(words)


def _printable(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]", "", line).strip()


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def holders(lock: str) -> dict[int, str]:
    """Process id -> name of the processes that have a host's lock file open (also one that was deleted)."""
    wanted = {lock, lock + " (deleted)"}
    found: dict[int, str] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{handle}") for handle in os.listdir(f"/proc/{pid}/fd")]
            if wanted.intersection(links):
                with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
                    found[int(pid)] = file.read().strip()
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def port_free(port: int) -> bool:
    """Whether QEMU could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(port: int, seconds: float) -> bool:
    """Whether an ssh server greets on the port (QEMU accepts connections before the guest does)."""
    try:
        with socket.create_connection(("127.0.0.1", port), seconds) as probe:
            probe.settimeout(seconds)
            return probe.recv(4) == b"SSH-"
    except OSError:
        return False


def ssh_argv(place: str, port: int) -> list[str]:
    """The command that logs in to a host with its own key, and only if it shows the pinned one."""
    return (
        [
            "ssh",
            "-F",
            "none",
            "-i",
            f"{place}/id_ed25519",
            "-p",
            str(port),
            "-o",
            f"UserKnownHostsFile={place}/known_hosts",
        ]
        + [
            "-o",
            "StrictHostKeyChecking=yes",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
        ]
        + ["root@127.0.0.1"]
    )
