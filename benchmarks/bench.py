# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks of microVMs share: playbooks, parts that can be run alone, and the header of a result.

A part writes what it measured to build/benchmarks/NAME/PART.json as soon as it has it. The result is printed from
those files, so that an interrupted benchmark goes on with --only PART, and each figure says when it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = ("agentfleet.metal", "community.libvirt")


def mib(size: float) -> str:
    """A number of bytes for a table."""
    return f"{size / (1 << 20):.1f}"


class PlayFailed(SystemExit):
    """A playbook failed; what it printed last is what the benchmark ends with."""


class Bench:
    """One benchmark run.

    :param name: its directory
    :param parts: names of its parts, in their order, with an estimate of minutes on the lab
    """

    def __init__(self, name: str, description: str, parts: dict[str, int]) -> None:
        self.name, self.parts = name, parts
        self.build = ROOT / "build/benchmarks" / name
        self.build.mkdir(parents=True, exist_ok=True)
        estimates = ", ".join(f"{part} {minutes}" for part, minutes in parts.items())
        self.parser = argparse.ArgumentParser(
            description=description, epilog=f"Parts, with minutes on the lab: {estimates}."
        )
        self.parser.add_argument(
            "-i", "--inventory", default="inventories/lab", help="of its group metal the first host"
        )
        self.parser.add_argument("--only", choices=[*parts, "report"], action="append", help="run these parts alone")
        self.parser.add_argument("--timeout-minutes", type=int, default=45, help="for each playbook")

    def parse(self) -> argparse.Namespace:
        """The arguments; what is not known goes to ansible-playbook."""
        self.arguments, self.rest = self.parser.parse_known_args()
        return self.arguments

    def wanted(self, part: str) -> bool:
        """Whether a part is to be run."""
        return not self.arguments.only or part in self.arguments.only

    def play(self, book: str, *words: str, limit_seconds: float = 0, **variables: t.Any) -> float:
        """Run a playbook of benchmarks/ with further words for ansible-playbook; returns its seconds.

        :param limit_seconds: when to end it before its end; the seconds are then a lower bound, and at least this
        """
        given = {"bench_dir": str(self.build), "bench_guest": str(HERE / "guest"), **variables}
        command = ["ansible-playbook", "-i", self.arguments.inventory, *self.rest, *words, str(HERE / book)]
        command += ["-e", json.dumps(given)]
        print(f"-- {book} {json.dumps(variables)[:120]}", file=sys.stderr, flush=True)
        start = time.monotonic()
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            try:
                out, err = running.communicate(timeout=limit_seconds or 60 * self.arguments.timeout_minutes)
            except subprocess.TimeoutExpired as late:
                running.send_signal(signal.SIGINT)  # ends its workers, too, which would go on if it were killed
                running.communicate()
                if not limit_seconds:
                    raise PlayFailed(f"{book} took more than {self.arguments.timeout_minutes} minutes") from late
            else:
                if running.returncode != 0:
                    raise PlayFailed(f"{book} failed:\n{out[-4000:]}\n{err[-2000:]}")
        seconds = time.monotonic() - start
        print(f"   {seconds:.0f} s", file=sys.stderr, flush=True)
        return seconds

    def prepare(self, **variables: t.Any) -> None:
        """Have the guests' images. No guest runs meanwhile: libvirt tries KVM when it starts, which emulation may not survive."""
        self.prepared = variables
        self.play("guest/down.yml")
        self.play("guest/setup.yml", **variables)

    def measure(self, part: t.Callable[..., None], *given: t.Any) -> None:
        """Measure a part; at most twice anew, as an emulated host may lose guests, or be reset (docs/lab.md, Limits)."""
        for left in (2, 1, 0):
            try:
                part(self, *given)
            except PlayFailed as failed:
                if not left:
                    raise
                print(f"-- once more: {failed}", file=sys.stderr, flush=True)
            else:
                return
            self.prepare(**self.prepared)

    def fetched(self, name: str) -> t.Any:
        """What a playbook wrote to ``bench_dir``."""
        return json.loads((self.build / f"{name}.json").read_text())

    def keep(self, part: str, value: t.Any) -> None:
        """Write down what a part measured."""
        kept = {"time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "value": value}
        (self.build / f"part-{part}.json").write_text(json.dumps(kept, indent=1))

    def kept(self, part: str) -> t.Any:
        """What a part measured, now or before; None if it never did."""
        path = self.build / f"part-{part}.json"
        return json.loads(path.read_text())["value"] if path.exists() else None

    def header(self, what: str, **more: str) -> None:
        """Print what was measured, when, where and with which versions."""
        host = self.fetched("host")
        times = {
            p: json.loads(f.read_text())["time"] for p in self.parts if (f := self.build / f"part-{p}.json").exists()
        }
        facts = {
            "what": what,
            "date": ", ".join(f"{part} {when}" for part, when in times.items()),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
            "host": f"{host['id']} {host['version_id']}, kernel {host['release']}, {host['cpus']} CPUs, "
            f"guests on {'CPU ' + host['guest_cpus'] if host['guest_cpus'] else 'all of them'}, "
            f"{mib(host['memory_bytes'])} MiB, KVM {'usable' if host['kvm'] else 'missing'}, "
            f"inventory {self.arguments.inventory}",
            "versions": ", ".join([*versions(*PEERS), f"QEMU {host['qemu']}", f"libvirt {host['libvirt']}"]),
            **more,
        }
        for key, value in facts.items():
            print(f"{key:10}{value}")


def versions(*names: str) -> list[str]:
    """Versions of what runs on the controller, with the collections of these names."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}

    def ask(*command: str) -> str:
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    found = {"Python": platform.python_version(), "ansible-core": ask("ansible", "--version").partition("]")[0][14:]}
    for collections in json.loads(ask("ansible-galaxy", "collection", "list", "--format", "json")).values():
        found.update({name: collections[name]["version"] for name in names if name in collections})
    return [f"{name} {version}" for name, version in found.items()]
