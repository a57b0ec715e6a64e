# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool over two hosts, in order: planned, made, filled, and then one thing after the other dies.

The tests build on each other: each starts from the state that the one before left, and the last leaves no pool.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import typing as t
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENGINE = "/opt/agentfleet/mooncake/bin/python3"
KIB = 1 << 10
MIB = 1 << 20
ADDRESSES = {"metal1": "10.77.0.11", "metal2": "10.77.0.12"}
# The master forgets a store after 10 s of silence, and etcd a master after about as long. The rest is emulation.
HEALED_SECONDS = 120
# An acknowledged put is recorded in etcd some milliseconds later (docs/runbooks/kvcache.md).
RECORDED_SECONDS = 2
CONNECTORS = {
    *("sglang-file", "sglang-mooncake", "sglang-hf3fs"),
    *("vllm-offloading", "vllm-mooncake", "vllm-mooncake_transfer", "vllm-hf3fs", "vllm-lmcache"),
    *("lmcache-cpu", "lmcache-disk", "lmcache-mooncake", "lmcache-hf3fs", "lmcache-dax"),
}

# Command lines and logs that contain the tenant's secret name.
WHO_HAS_IT = """
import glob, json
secret = json.load(open("/etc/agentfleet/pools/shared.tenants"))["red"].encode()
found = []
for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/var/log/agentfleet/*"):
    try:
        found += [path] if secret in open(path, "rb").read() else []
    except OSError:
        pass  # it has ended
print(found)
"""


class Machine:
    """A lab host with a part of the pool."""

    def __init__(self, connection: t.Any) -> None:
        self.host = connection

    def client(self, *jobs: dict[str, t.Any]) -> list[t.Any]:
        """Let one process of the engine's Python on this host do these jobs (client.py); returns what became of each."""
        words = ["shared", json.dumps([{"tenant": "blue", **job} for job in jobs])]
        done = self.host.run(
            f"PYTHONPATH=/usr/local/lib/agentfleet timeout 400 {ENGINE} - {shlex.join(words)} <<'SCRIPT'\n"
            + (HERE / "client.py").read_text()
            + "\nSCRIPT"
        )
        assert done.rc == 0, done.stderr[-2000:]
        return list(json.loads(done.stdout.splitlines()[-1]))

    def pid(self, unit: str) -> int:
        """Main process of a unit."""
        return int(self.host.check_output(f"systemctl show -P MainPID {unit}"))

    def back(self, *units: str, before: int = 0) -> None:
        """Wait until systemd has started units again."""
        end, names = time.monotonic() + HEALED_SECONDS, " ".join(units)
        while True:
            shown = self.host.check_output(f"systemctl show --property=ActiveState,MainPID {names}")
            if shown.count("ActiveState=active") == len(units) and f"MainPID={before}\n" not in shown + "\n":
                return
            assert time.monotonic() < end, (
                shown + self.host.run(f"journalctl -n 20 -u {names.replace(' ', ' -u ')}").stdout
            )
            time.sleep(2)


@pytest.fixture(scope="module", autouse=True)
def both(lab: t.Any) -> None:
    """The hosts of this scenario."""
    lab.declared = {"lab_group": "lab", "lab_packages": ["etcd-server"]}


@pytest.fixture(scope="module")
def metal1(lab: t.Any) -> Machine:
    """The host with all tiers."""
    return Machine(lab.connection("metal1"))


@pytest.fixture(scope="module")
def metal2(lab: t.Any) -> Machine:
    """The host with one memory tier and a disk, and with etcd."""
    return Machine(lab.connection("metal2", int(os.environ.get("AGENTFLEET_LAB_PORT", "2322")) + 1))


def converge(lab: t.Any) -> t.Any:
    return lab.succeed("../molecule/kvcache/converge", f"--extra-vars=@{HERE}/vars/pools.yml")


def call(lab: t.Any, on: str, module: str, **arguments: t.Any) -> t.Any:
    """Call a module of this collection on hosts."""
    command = ("ansible", on, f"--module-name=agentfleet.metal.{module}", f"--args={json.dumps(arguments)}")
    more = {"ansible_python_interpreter": sys.executable} if on == "localhost" else {}
    return lab.finish(lab._open(*command, **more))


def proofs(played: t.Any) -> dict[str, dict[str, t.Any]]:
    """The tiers of both hosts by name, each put to a real put, get and comparison by kvcache_pool_info."""
    return {
        f"{task.host}-{tier['name']}": tier
        for task in played.tasks
        if isinstance(pools := task.result.get("pools"), dict)  # a list is what was declared
        for tier in pools.get("shared", {}).get("tiers", [])
    }


def assert_places(tiers: dict[str, dict[str, t.Any]]) -> None:
    """Each tier works, and lies where it was declared by the kernel's own numbers."""
    assert set(tiers) == {*(f"metal1-{name}" for name in ("dram", "slow", "cxl", "ssd")), "metal2-dram", "metal2-ssd"}
    assert all(tier["verified"] for tier in tiers.values()), tiers
    for name, node, mib in (("dram", 0, 64), ("slow", 1, 128), ("cxl", 2, 4)):
        tier = tiers[f"metal1-{name}"]
        assert (tier["numa_node"], tier["pages_on_node"], tier["pages_elsewhere"]) == (node, mib * 256, 0)


def test_pools_of_1_tib_are_planned_explained_and_rendered_for_all_connectors(lab: t.Any) -> None:
    played = lab.play("kvcache_plan", f"--extra-vars=@{HERE}/vars/plans.yml")
    assert played.rc == 0, played.failures()
    explained, shown = (task.result["results"] for task in played.tasks)
    said = {result["item"]: "\n".join(result["msg"]) for result in explained}
    assert "= 3,187,648 tokens" in said["llama"] and "= 14,864,128 tokens" in said["deepseek"]
    for model in ("llama", "deepseek"):
        files = [result["msg"] for result in shown if result["item"].startswith(model)]
        assert {name for one in files for name in one} == CONNECTORS
        assert all(any(text.strip() for text in made.values()) for one in files for made in one.values())


def test_the_pool_comes_up_in_its_places_and_a_second_run_changes_nothing(lab: t.Any) -> None:
    assert_places(proofs(converge(lab)))
    assert converge(lab).changed() == []


def test_the_kernels_own_text_says_where_each_tier_lies(metal1: Machine) -> None:
    units = [f"agentfleet-mooncake-store@shared-{name}" for name in ("dram", "slow", "cxl")]
    text = metal1.host.check_output(
        "cat /sys/devices/system/node/node0/cpulist; cat /sys/devices/system/node/node[12]/cpulist | wc -w; "
        "grep -H . /sys/devices/virtual/memory_tiering/memory_tier*/nodelist; "
        f"for pid in $(systemctl show -P MainPID {' '.join(units)}); do grep memfd:agentfleet-shared- /proc/$pid/numa_maps; done"
    ).splitlines()
    assert text[:2] == ["0-1", "0"], "nodes 1 and 2 have memory and no CPU"
    levels = {
        node: int(line.partition("memory_tier/")[0].rpartition("memory_tier")[2].partition("/")[0])
        for line in text
        if "nodelist:" in line
        for node in line.rpartition(":")[2].split(",")
    }
    assert levels["0"] < levels["1"] and levels["0"] < levels["2"], text
    for name, node, mib in (("dram", 0, 64), ("slow", 1, 128), ("cxl", 2, 4)):
        lines = [line.split() for line in text if f"memfd:agentfleet-shared-{name}" in line]
        assert any(f"bind:{node}" in words and f"N{node}={mib * 256}" in words for words in lines), text
        assert {word[:2] for words in lines for word in words if word[0] == "N" and "=" in word} == {f"N{node}"}


def test_programs_listen_on_the_pools_network_alone(metal1: Machine, metal2: Machine) -> None:
    for machine, address in ((metal1, "10.77.0.11"), (metal2, "10.77.0.12")):
        lines = machine.host.check_output("ss -Hltnp").splitlines()
        names = ("python", "mooncake", "etcd") if machine is metal2 else ("python", "mooncake")
        ours = [line.split()[3] for line in lines if any(name in line for name in names)]
        assert len(ours) >= 4
        assert {local.rpartition(":")[0].strip("[]").replace("::ffff:", "") for local in ours} == {address}


def test_what_one_host_wrote_into_each_tier_the_other_reads(metal1: Machine, metal2: Machine) -> None:
    sets = [
        {"prefix": "fast", "count": 16, "size": MIB, "tier": "dram"},
        {"prefix": "slow", "count": 96, "size": MIB, "tier": "slow"},
        {"prefix": "cxl", "count": 5, "size": 512 * KIB, "tier": "cxl"},
    ]
    written = metal1.client(*({"verb": "put", **one} for one in sets))
    assert [(len(one["good"]), one["inside"]) for one in written] == [(16, 16), (96, 96), (5, 5)]
    other = {"prefix": "back", "count": 8, "size": MIB, "tier": "dram"}
    *read, back = metal2.client(
        *({"verb": "get", **{key: one[key] for key in ("prefix", "count", "size")}} for one in sets),
        {"verb": "put", **other},
    )
    assert [len(one["good"]) for one in read] == [16, 96, 5] and back["inside"] == 8
    assert len(metal1.client({"verb": "get", **other})[0]["good"]) == 8


def test_connectors_are_written_and_only_root_reads_the_secret_ones(metal1: Machine) -> None:
    base = "/etc/agentfleet/connectors/shared"
    config, who, *listing, quotas = metal1.host.check_output(
        f"cd {base} && tr -d '\\n' < sglang-mooncake-red/mooncake.json && echo && python3 - <<'SCRIPT'\n{WHO_HAS_IT}\nSCRIPT\n"
        "stat -c '%a %U %n' */* && stat -c '%a %U' /run/agentfleet-mooncake/shared/quotas.yaml"
    ).splitlines()
    assert json.loads(config)["master_server_address"] == "etcd://10.77.0.12:2379"
    assert json.loads(config)["tenant_id"].startswith("red-") and who == "[]"
    assert len(listing) == 8 and all(line.startswith("600 root ") for line in listing)
    assert quotas == "600 agentfleet-kv"


def test_a_store_killed_amid_writes_loses_nothing_that_was_replicated(metal1: Machine, metal2: Machine) -> None:
    unit = "agentfleet-mooncake-store@shared-dram"
    before = metal2.pid(unit)
    objects = {"prefix": "live", "count": 40, "size": 256 * KIB}
    written = metal2.client({"verb": "put", **objects, "replicas": 2, "tier": "dram", "kill_after": 32})[0]
    assert len(written["twice"]) >= 32
    read = metal1.client({"verb": "get", "keys": written["twice"], "size": 256 * KIB, "seconds": HEALED_SECONDS})[0]
    assert read["good"] == written["twice"]
    metal2.back(unit, before=before)


def test_a_killed_master_loses_nothing_that_was_recorded(metal1: Machine, metal2: Machine) -> None:
    objects = {"prefix": "late", "count": 8, "size": 256 * KIB}
    assert len(metal2.client({"verb": "put", **objects, "replicas": 2, "tier": "dram"})[0]["twice"]) == 8
    time.sleep(RECORDED_SECONDS)
    unit = "agentfleet-mooncake-master@shared"
    leader = metal1.host.check_output("curl -s http://10.77.0.11:9003/leader")
    machine = metal1 if "10.77.0.11" in leader else metal2
    before = machine.pid(unit)
    machine.host.check_output(f"kill -9 {before}")
    read, live = metal1.client(
        {"verb": "get", **objects, "seconds": HEALED_SECONDS},
        {"verb": "get", "prefix": "live", "count": 32, "size": 256 * KIB, "seconds": HEALED_SECONDS},
    )
    assert len(read["good"]) == 8 and len(live["good"]) == 32
    machine.back(unit, before=before)


def test_what_lies_on_the_disk_outlives_its_store(metal1: Machine) -> None:
    """Objects go to the disk by the bucket; those of each store's last one, which is not full, are in memory only."""
    unit = "agentfleet-mooncake-store@shared-dram"
    before = metal1.pid(unit)
    objects = {"prefix": "disk", "count": 48, "size": 256 * KIB, "tier": "dram"}
    written, found, _killed = metal1.client(
        {"verb": "put", **objects},
        {"verb": "offloaded", **objects, "least": 24, "seconds": HEALED_SECONDS},
        {"verb": "kill", **objects},
    )
    assert len(written["good"]) == 48 and len(found["disk"]) >= 24
    metal1.back(unit, before=before)
    read = metal1.client({"verb": "get", "keys": found["disk"], "size": 256 * KIB, "seconds": HEALED_SECONDS})[0]
    assert read["good"] == found["disk"]


def test_a_host_that_loses_power_comes_back_without_ansible(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    objects = {"prefix": "power", "count": 16, "size": 256 * KIB}
    assert len(metal2.client({"verb": "put", **objects, "replicas": 2, "tier": "dram"})[0]["twice"]) == 16
    time.sleep(RECORDED_SECONDS)
    cut = call(lab, "localhost", "lab_host", dir=str(lab.directory), hosts=[{"name": "metal1"}], state="power_cut")
    assert cut.rc == 0, cut.failures()
    assert len(metal2.client({"verb": "get", **objects, "seconds": HEALED_SECONDS})[0]["good"]) == 16
    lab.hosts("started")
    metal1.host.run("systemctl is-system-running --wait")
    metal1.back(*(f"agentfleet-mooncake-store@shared-{name}" for name in ("dram", "slow", "cxl")))
    assert len(metal1.client({"verb": "get", **objects, "seconds": HEALED_SECONDS})[0]["good"]) == 16
    assert_places(proofs(call(lab, "lab", "kvcache_pool_info", probe_size="256KiB", samples=2)))


def test_tenants_have_their_quota_and_cannot_see_each_other(metal1: Machine) -> None:
    """After those in which a master dies: what a quota evicts is not recorded in etcd (docs/runbooks/kvcache.md)."""
    objects = {"prefix": "much", "count": 128, "size": 256 * KIB}  # twice red's quota
    written, quotas, read, others, nobody = metal1.client(
        {"verb": "put", "tenant": "red", **objects},
        {"verb": "quotas"},
        {"verb": "get", "tenant": "red", **objects},
        {"verb": "get", "tenant": "red", "prefix": "fast", "count": 16, "size": MIB},
        {"verb": "put", "tenant": "green", **objects, "count": 1},
    )
    assert quotas["red"]["quota_bytes"] == 16 * MIB and 0 < quotas["red"]["used_bytes"] <= 16 * MIB
    # The quota is one of memory; what went to the disk before it had to go is there besides.
    assert len(written["good"]) > 0 and len(read["good"]) > 0 and len(set(read["good"]) - set(read["disk"])) <= 64
    assert others["good"] == [] and nobody["good"] == []


def test_a_pool_with_data_is_not_removed_unless_told(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    """Nor one whose master is silent: that is no emptiness."""
    absent = {"name": "shared", "state": "absent"}
    for machine in (metal1, metal2):
        machine.host.check_output("systemctl stop agentfleet-mooncake-master@shared")
    refused = call(lab, "lab", "kvcache_pool", pools=[absent])
    assert refused.stats["metal1"]["failures"] == refused.stats["metal2"]["failures"] == 1
    assert refused.failures().count("an unknown amount of data") == 2
    for machine in (metal1, metal2):
        machine.host.check_output("systemctl start agentfleet-mooncake-master@shared")
    removed = call(lab, "lab", "kvcache_pool", pools=[{**absent, "lose_data": True}])
    assert removed.rc == 0, removed.failures()
    for machine in (metal1, metal2):
        left = "systemctl list-units --no-legend 'agentfleet-mooncake-*'; find /etc/agentfleet/pools /etc/agentfleet/connectors"
        assert machine.host.check_output(left).split() == ["/etc/agentfleet/pools", "/etc/agentfleet/connectors"]
