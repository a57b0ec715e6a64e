# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures both arms on the machine it runs on, in the engine's Python: measure.py NODES SECONDS COUNT SIZE_MIB

NODES: NUMA nodes such as 0,1 to bind the memory to, or - to leave it to the kernel. Each is measured for so many seconds,
in rounds: a process and the physical pages that it happens to get are one sample, so every round has fresh ones of both
arms. Prints JSON: node -> rounds, each with "times", bytes -> arm -> kind -> seconds, and "huge", arm -> MiB of the
store's memory that huge pages map.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _pooldecl

HERE = pathlib.Path(__file__).resolve().parent
# Below those that the kernel gives to clients, of which every round leaves some behind.
PORTS = {"ours": (25051, 25003), "bare": (25052, 25004)}
START_SECONDS = 120
# Name -> preset, tensor parallelism: a block of 64 tokens, as one rank stores it.
MODELS = {
    "Qwen2.5-0.5B": ("Qwen2.5-0.5B", 1),
    "Llama-3.1-70B, TP 8": ("Llama-3.1-70B", 8),
    "DeepSeek-V3": ("DeepSeek-V3", 8),
    "Llama-3.1-8B": ("Llama-3.1-8B", 1),
}
OURS = f"""
import sys
from {_pooldecl.__package__} import _mooncake
_mooncake.POOLS = _mooncake.RUNTIME = sys.argv[1]
_mooncake.main(sys.argv[2:])
"""
BARE = """
import signal, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
if store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1]) != 0:
    sys.exit("setup failed")
print(store.get_hostname(), flush=True)
signal.pause()
"""


def declare(tier: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    """A pool's declaration, as the module writes it."""
    return _pooldecl.declare("pool", "bench", {"name": "bench", "tiers": [tier], **options}, lambda path: "")


def blocks() -> dict[str, int]:
    """Bytes of each model's block."""
    tier = {"medium": "dram", "size": "1GiB"}
    return {
        name: declare(tier, model=model, tensor_parallel=gpus)["block_bytes"] for name, (model, gpus) in MODELS.items()
    }


class Arm:
    """A master and a store, for as long as ``running`` is open."""

    def __init__(self, name: str, size_mib: int, node: int | None, running: contextlib.ExitStack) -> None:
        self.name, self.size_mib, self.node, self.running = name, size_mib, node, running
        self.directory = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory(prefix="agentfleet-bench-")))
        self.processes: list[subprocess.Popen[str]] = []
        port, metrics = PORTS[name]
        self.master = f"127.0.0.1:{port}"
        self.segment = (self.ours if name == "ours" else self.bare)(port, metrics)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a program; what it says goes to a log."""
        with open(self.directory / f"log-{len(self.processes)}", "w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.running.enter_context(process)  # which waits for its end
        self.running.callback(process.kill)  # before: nobody needs what it holds
        self.processes.append(process)
        return process

    def ours(self, port: int, metrics: int) -> str:
        """The program behind the units of a pool; returns the store's name in the engine."""
        tier = {"medium": "dram", "size": f"{self.size_mib}MiB", "numa_node": self.node}
        declaration = declare(tier, master={"port": port, "metrics_port": metrics})
        (self.directory / "bench.json").write_text(json.dumps(declaration))
        where = (sys.executable, "-c", OURS, str(self.directory))
        self.start(*where, "master", "bench")
        self.start(*where, "store", "bench-dram")
        status = self.directory / "bench-dram" / "status.json"
        self.wait(status.exists)
        return str(json.loads(status.read_text())["segment"])

    def bare(self, port: int, metrics: int) -> str:
        """The engine as its documentation starts it, bound to a node as numactl can."""
        from mooncake import store as engine

        program = pathlib.Path(engine.__file__).with_name("mooncake_master")
        where = (
            "--rpc_address=127.0.0.1",
            f"--rpc_port={port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={metrics}",
        )
        self.start(str(program), *where, "--logtostderr=true")
        # Its setup does not wait for a master.
        listening = ["ss", "-Htln", f"sport = :{port}"]
        self.wait(lambda: subprocess.run(listening, capture_output=True, check=True).stdout != b"")
        bind = [] if self.node is None else ["numactl", f"--membind={self.node}"]
        store = self.start(*bind, sys.executable, "-c", BARE, self.master, str(self.size_mib << 20))
        return store.stdout.readline().strip()  # type: ignore[union-attr]

    def wait(self, ready: t.Callable[[], bool]) -> None:
        """Wait until it is up."""
        end = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                sys.exit(f"{self.name} did not start: {self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of what its programs said."""
        return " ".join(path.read_text()[-600:] for path in sorted(self.directory.glob("log-*")))

    def huge(self) -> int:
        """MiB of its store's memory that huge pages map; the memory is in the mappings that are large enough for it."""
        maps = pathlib.Path(f"/proc/{self.processes[-1].pid}/smaps").read_text()
        lines = re.findall(r"^Size:(.*?) kB.*?^AnonHugePages:(.*?) kB.*?^ShmemPmdMapped:(.*?) kB", maps, re.M | re.S)
        return max(int(anon) + int(shared) for size, anon, shared in lines if int(size) >= self.size_mib << 10) >> 10


def client(arms: t.Sequence[Arm], **wish: t.Any) -> t.Any:
    """Run the client."""
    wish["arms"] = {arm.name: (arm.master, arm.segment) for arm in arms}
    command = [sys.executable, str(HERE / "client.py"), json.dumps(wish)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        sys.exit(" ".join([done.stderr[-800:], *(arm.logs() for arm in arms)]))
    return json.loads(done.stdout.splitlines()[-1])


def one_round(names: t.Iterable[str], node: int | None, count: int, size_mib: int) -> dict[str, t.Any]:
    """Start the arms in this order, measure them in turns, and end them."""
    with contextlib.ExitStack() as running:
        arms = [Arm(name, size_mib, node, running) for name in names]
        times = client(arms, bytes=size_mib << 20, node=node, count=count, sizes=list(blocks().values()))
        return {"times": times, "huge": {arm.name: arm.huge() for arm in arms}}


def one_node(node: int | None, seconds: float, count: int, size_mib: int) -> list[dict[str, t.Any]]:
    """Measure both arms on one node, in pairs of rounds so that each arm starts first as often as the other."""
    end, rounds = time.monotonic() + seconds, []
    while time.monotonic() < end:
        rounds += [one_round(names, node, count, size_mib) for names in (PORTS, reversed(PORTS))]
    return rounds


def main() -> None:
    """Measure, and print."""
    nodes = [None if node == "-" else int(node) for node in sys.argv[1].split(",")]
    seconds, count, size_mib = map(int, sys.argv[2:])
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, kernel {platform.release()}, "
        f"Python {platform.python_version()}",
        "blocks": blocks(),
        "nodes": [(node, one_node(node, seconds, count, size_mib)) for node in nodes],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
