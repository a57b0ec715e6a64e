# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool over two hosts, in order: made, filled, and then one thing after the other dies.

The tests build on each other: each starts from the state that the one before left, and the last leaves no pool.
"""

from __future__ import annotations

import json
import os
import time
import typing as t
from pathlib import Path

import pytest

HERE = Path(__file__).parent
POOLS = f"@{HERE}/vars/pools.yml"
ENGINE = "/opt/agentfleet/mooncake/bin/python3"
KIB = 1 << 10
# The master forgets a store after 10 s of silence, and etcd a master after about as long. The rest is emulation.
HEALED_SECONDS = 120
# An acknowledged put is recorded in etcd some milliseconds later (docs/runbooks/kvcache.md).
RECORDED_SECONDS = 2


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

    def client(
        self, verb: str, tenant: str, prefix: str, count: int, size: int, replicas: int = 1, tier: str = "-"
    ) -> t.Any:
        """Put or get objects on this host."""
        words = [verb, "shared", tenant, prefix, count, size, replicas, tier]
        done = self.host.run(
            f"PYTHONPATH=/usr/local/lib/agentfleet timeout 300 {ENGINE} - {' '.join(map(str, words))} <<'SCRIPT'\n"
            + (HERE / "client.py").read_text()
            + "\nSCRIPT"
        )
        assert done.rc == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    def readable(self, tenant: str, prefix: str, count: int, size: int) -> int:
        """How many of these objects read back as they were written, after a bounded wait for all."""
        end, good = time.monotonic() + HEALED_SECONDS, -1
        while good != count and time.monotonic() < end:
            good = self.client("get", tenant, prefix, count, size)["good"]
        return good

    def pid(self, unit: str) -> int:
        """Main process of a unit."""
        return int(self.host.check_output(f"systemctl show -P MainPID {unit}"))

    def back(self, unit: str, before: int) -> None:
        """Wait until systemd has started a unit again."""
        end = time.monotonic() + HEALED_SECONDS
        while self.pid(unit) in (0, before) or self.host.run(f"systemctl is-active {unit}").stdout.strip() != "active":
            assert time.monotonic() < end, self.host.run(f"journalctl -n 20 -u {unit}").stdout
            time.sleep(2)


@pytest.fixture(scope="module")
def metal1(lab: t.Any) -> Machine:
    """The host with all tiers, and etcd."""
    return Machine(lab.connection("metal1"))


@pytest.fixture(scope="module")
def metal2(lab: t.Any) -> Machine:
    """The host with one tier."""
    return Machine(lab.connection("metal2", int(os.environ.get("AGENTFLEET_LAB_PORT", "2322")) + 1))


def converge(lab: t.Any, *arguments: str, **variables: t.Any) -> t.Any:
    return lab.succeed("../molecule/kvcache/converge", f"--extra-vars={POOLS}", *arguments, **variables)


def proven(lab: t.Any) -> dict[str, t.Any]:
    """The tiers of both hosts by name, each put to a real put, get and comparison."""
    played = lab.finish(
        lab._open(
            "ansible", "lab", "--module-name=agentfleet.metal.kvcache_pool_info", "--args=probe_size=256KiB samples=2"
        )
    )
    assert played.rc == 0, played.failures()
    return {
        f"{task.host}-{tier['name']}": tier for task in played.tasks for tier in task.result["pools"]["shared"]["tiers"]
    }


def test_the_pool_comes_up_and_a_second_run_changes_nothing(lab: t.Any) -> None:
    assert converge(lab).changed()
    assert converge(lab).changed() == []


def test_each_tier_lies_where_it_was_declared(lab: t.Any, metal1: Machine) -> None:
    tiers = proven(lab)
    assert set(tiers) == {"metal1-dram", "metal1-slow", "metal1-cxl", "metal1-ssd", "metal2-dram"}
    assert all(tier["verified"] for tier in tiers.values()), tiers
    places = {"metal1-dram": (0, 64), "metal1-slow": (1, 128), "metal1-cxl": (2, 4)}
    for name, (node, mib) in places.items():
        assert (tiers[name]["numa_node"], tiers[name]["pages_on_node"], tiers[name]["pages_elsewhere"]) == (
            node,
            mib * 256,
            0,
        )
    # The same by hand, from the kernel's own text.
    pid = metal1.pid("agentfleet-mooncake-store@shared-cxl")
    lines = metal1.host.check_output(f"grep memfd:agentfleet-shared-cxl /proc/{pid}/numa_maps").splitlines()
    assert any("bind:2" in line and "N2=1024" in line and "N0=" not in line and "N1=" not in line for line in lines)


def test_stores_listen_on_the_pools_network_alone(metal1: Machine, metal2: Machine) -> None:
    for machine, address in ((metal1, "10.77.0.11"), (metal2, "10.77.0.12")):
        lines = machine.host.check_output("ss -Hltnp").splitlines()
        ours = [line.split()[3] for line in lines if "python" in line or "mooncake" in line or "etcd" in line]
        assert len(ours) >= 4
        assert {local.rpartition(":")[0].strip("[]").replace("::ffff:", "") for local in ours} == {address}


def test_what_one_host_wrote_the_other_reads(metal1: Machine, metal2: Machine) -> None:
    assert metal1.client("put", "blue", "kept", 16, 256 * KIB, replicas=2)["good"] == 16
    found = metal2.client("get", "blue", "kept", 16, 256 * KIB)
    assert found["good"] == 16 and found["replicas"]["memory"] == 32
    assert metal2.client("put", "blue", "back", 4, 256 * KIB, replicas=2)["good"] == 4
    assert metal1.client("get", "blue", "back", 4, 256 * KIB)["good"] == 4


def test_tenants_have_their_quota_and_cannot_see_each_other(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    assert metal1.client("get", "red", "kept", 16, 256 * KIB)["good"] == 0
    metal1.client("put", "red", "much", 128, 256 * KIB)  # twice the quota
    played = lab.finish(
        lab._open("ansible", "metal1", "--module-name=agentfleet.metal.kvcache_pool_info", "--args=samples=1")
    )
    red = played.tasks[-1].result["pools"]["shared"]["tenants"]["red"]
    assert red["quota_bytes"] == 16 << 20 and 0 < red["used_bytes"] <= red["quota_bytes"]
    assert metal2.client("get", "blue", "kept", 16, 256 * KIB)["good"] == 16


def test_connectors_are_written_and_only_root_reads_the_secret_ones(metal1: Machine) -> None:
    base = "/etc/agentfleet/connectors/shared"
    listing = metal1.host.check_output(f"cd {base} && stat -c '%a %U %n' */*").splitlines()
    assert len(listing) == 8 and all(line.startswith("600 root ") for line in listing)
    config = json.loads(metal1.host.file(f"{base}/sglang-mooncake-red/mooncake.json").content_string)
    assert config["master_server_address"] == "etcd://10.77.0.11:2379"
    assert config["tenant_id"].startswith("red-")
    assert metal1.host.check_output(f"python3 - <<'SCRIPT'\n{WHO_HAS_IT}\nSCRIPT") == "[]"


def test_a_killed_store_loses_nothing_that_was_replicated(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    unit = "agentfleet-mooncake-store@shared-dram"
    before = metal2.pid(unit)
    metal2.host.check_output(f"kill -9 {before}")
    assert metal1.readable("blue", "kept", 16, 256 * KIB) == 16
    metal2.back(unit, before)
    assert proven(lab)["metal2-dram"]["verified"]


def test_a_killed_master_loses_nothing_that_was_recorded(metal1: Machine, metal2: Machine) -> None:
    assert metal1.client("put", "blue", "late", 4, 256 * KIB, replicas=2)["good"] == 4
    time.sleep(RECORDED_SECONDS)
    unit = "agentfleet-mooncake-master@shared"
    leader = metal1.host.check_output("curl -s http://10.77.0.11:9003/leader")
    machine = metal1 if "10.77.0.11" in leader else metal2
    before = machine.pid(unit)
    machine.host.check_output(f"kill -9 {before}")
    assert metal2.readable("blue", "kept", 16, 256 * KIB) == 16
    assert metal2.readable("blue", "late", 4, 256 * KIB) == 4
    machine.back(unit, before)


def test_a_host_that_loses_power_comes_back_without_ansible(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    time.sleep(RECORDED_SECONDS)
    spare = {"lab_group": "lab_spare", "lab_packages": ["etcd-server"]}
    lab.succeed("lab_up", lab_state="power_cut", **spare)
    assert metal1.readable("blue", "kept", 16, 256 * KIB) == 16
    lab.succeed("lab_up", lab_state="started", **spare)
    metal2.host.run("systemctl is-system-running --wait")
    metal2.back("agentfleet-mooncake-store@shared-dram", 0)
    assert metal2.readable("blue", "kept", 16, 256 * KIB) == 16
    assert all(tier["verified"] for tier in proven(lab).values())


def test_what_lies_on_the_disk_outlives_its_store(metal1: Machine) -> None:
    """Objects go to the disk by the bucket; those of the last one, which is not full, are in memory only."""
    assert metal1.client("put", "blue", "disk", 48, 256 * KIB, tier="dram")["good"] == 48
    end, on_disk = time.monotonic() + HEALED_SECONDS, 0
    while on_disk < 36 and time.monotonic() < end:
        on_disk = metal1.client("get", "blue", "disk", 48, 256 * KIB)["replicas"].get("disk", 0)
    assert 36 <= on_disk <= 48
    unit = "agentfleet-mooncake-store@shared-dram"
    before = metal1.pid(unit)
    metal1.host.check_output(f"kill -9 {before}")
    metal1.back(unit, before)
    end, good = time.monotonic() + HEALED_SECONDS, 0
    while good < on_disk and time.monotonic() < end:
        good = metal1.client("get", "blue", "disk", 48, 256 * KIB)["good"]
    assert good >= on_disk


def test_a_pool_with_data_is_not_removed_unless_told(lab: t.Any, metal1: Machine, metal2: Machine) -> None:
    """Nor one whose master is silent: that is no emptiness."""
    absent = [{"name": "shared", "state": "absent"}]

    def remove(**more: t.Any) -> t.Any:
        wish = json.dumps({"pools": [{**absent[0], **more}]})
        return lab.finish(
            lab._open("ansible", "metal2", "--module-name=agentfleet.metal.kvcache_pool", f"--args={wish}")
        )

    for machine in (metal1, metal2):
        machine.host.check_output("systemctl stop agentfleet-mooncake-master@shared")
    refused = remove()
    assert refused.rc != 0 and "an unknown amount of data" in refused.failures()
    for machine in (metal1, metal2):
        machine.host.check_output("systemctl start agentfleet-mooncake-master@shared")
    assert remove(lose_data=True).rc == 0
    assert metal2.host.run("systemctl list-units --no-legend 'agentfleet-mooncake-*'").stdout == ""
    assert metal2.host.run("ls /etc/agentfleet/pools /etc/agentfleet/connectors/shared/*").stdout.strip() == ""
