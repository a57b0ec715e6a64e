# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures both arms on the machine it runs on, in the engine's Python: measure.py NODES ROUNDS COUNT SIZE_MIB

NODES: NUMA nodes such as 0,1 to bind the memory to, or - to leave it to the kernel. Prints JSON: node -> rounds, each
bytes -> arm -> kind -> seconds.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _pooldecl

HERE = pathlib.Path(__file__).resolve().parent
PORTS = {"ours": (55051, 55003), "bare": (55052, 55004)}
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
    """A master and a store, for as long as it is measured."""

    def __init__(self, name: str, size_mib: int, node: int | None) -> None:
        self.name, self.size_mib, self.node = name, size_mib, node
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="agentfleet-bench-"))
        self.processes: list[subprocess.Popen[str]] = []
        port, metrics = PORTS[name]
        self.master = f"127.0.0.1:{port}"
        self.segment = (self.ours if name == "ours" else self.bare)(port, metrics)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a program; what it says goes to a log."""
        with open(self.directory / f"log-{len(self.processes)}", "w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
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

    def close(self) -> None:
        """End its programs."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def client(arms: t.Sequence[Arm], **wish: t.Any) -> t.Any:
    """Run the client; each time it is a new process, so that no process's luck is the result."""
    wish["arms"] = {arm.name: (arm.master, arm.segment) for arm in arms}
    command = [sys.executable, str(HERE / "client.py"), json.dumps(wish)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        sys.exit(" ".join([done.stderr[-800:], *(arm.logs() for arm in arms)]))
    return json.loads(done.stdout.splitlines()[-1]) if "sizes" in wish else None


def one_node(node: int | None, rounds: int, count: int, size_mib: int) -> list[dict[str, t.Any]]:
    """Measure both arms on one node."""
    arms: list[Arm] = []
    try:
        arms.extend(Arm(name, size_mib, node) for name in PORTS)
        client(arms, fill=size_mib << 20)
        sizes = list(blocks().values())
        return [client(arms, node=node, count=count, sizes=sizes) for _round in range(rounds)]
    finally:
        for arm in arms:
            arm.close()


def main() -> None:
    """Measure, and print."""
    nodes = [None if node == "-" else int(node) for node in sys.argv[1].split(",")]
    rounds, count, size_mib = map(int, sys.argv[2:])
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, kernel {platform.release()}, "
        f"Python {platform.python_version()}",
        "blocks": blocks(),
        "nodes": [(node, one_node(node, rounds, count, size_mib)) for node in nodes],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
