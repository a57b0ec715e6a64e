# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report: facts of hosts, microVMs and pools as one document (docs/report.schema.json) and as a few lines."""

from __future__ import annotations

import typing as t

_VFIO = ("vfio-pci", "vfio", "mlx5_vfio_pci", "virtio-vfio-pci")


def report(hosts: t.Mapping[str, t.Mapping[str, t.Any]], run: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The document.

    :param hosts: host name -> ``metal`` (the facts), ``microvms`` (instances of microvm_info),
        ``pools`` and ``engine_version`` (of kvcache_pool_info); only the facts are needed
    :param run: ``time``, ``collection_version`` and ``ansible_version`` of the run
    """
    pools: dict[str, dict[str, t.Any]] = {}
    for name, host in hosts.items():
        for pool_name, pool in (host.get("pools") or {}).items():
            merged = pools.setdefault(pool_name, {"engine": pool["engine"], "tiers": []})
            if pool["engine"] == "mooncake" and host.get("engine_version"):
                merged["engine_version"] = host["engine_version"]
            # A pool that spans hosts is one pool, each tier of it on its own host.
            merged["tiers"] += [{"host": name, **tier} for tier in pool["tiers"]]
    return {
        "schema_version": 1,
        "run": {key: str(run[key]) for key in ("time", "collection_version", "ansible_version")},
        "hosts": {name: _host(host["metal"], host.get("microvms") or []) for name, host in hosts.items()},
        "pools": pools,
    }


def _pick(source: t.Mapping[str, t.Any], *keys: str) -> dict[str, t.Any]:
    return {key: source[key] for key in keys if key in source}


def _host(metal: t.Mapping[str, t.Any], microvms: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    functions = metal["pci"]["functions"]
    dax = {device["name"]: device for device in metal["cxl"]["dax"]}
    regions = []
    for region in metal["cxl"]["regions"]:
        nodes = {dax[name]["target_node"] for name in region["dax"] if dax[name]["mode"] == "system-ram"}
        keys = ("name", "type", "state", "size_bytes", "interleave_ways", "interleave_granularity", "memdevs")
        regions.append({**_pick(region, *keys), "numa_node": nodes.pop() if len(nodes) == 1 else None})
    return {
        "os": _pick(metal["os"], "id", "version_id", "architecture"),
        "kernel": _pick(metal["kernel"], "release", "cmdline"),
        "kvm": metal["kvm"],
        "numa": {
            "nodes": [_pick(node, "id", "tier", "cpus", "size_bytes", "free_bytes") for node in metal["numa"]["nodes"]],
            "tiers": metal["numa"]["tiers"],
            **_pick(metal["numa"], "demotion"),
        },
        "cxl": {
            "memdevs": [
                _pick(memdev, "serial", "pci_address", "ram_bytes", "pmem_bytes", "host_bridge")
                for memdev in metal["cxl"]["memdevs"]
            ],
            "regions": regions,
        },
        "iommu": {
            **_pick(metal["iommu"], "enabled", "kind"),
            "groups": _groups(metal["iommu"].get("groups") or [], functions),
        },
        "vfio": {
            "functions": [
                _pick(function, "address", "driver", "vendor", "device", "iommu_group", "numa_node")
                for function in functions
                if function.get("driver") in _VFIO
            ]
        },
        "sriov": [
            {
                "pf": function["address"],
                "vfs": function["sriov"].get("numvfs") or 0,
                "total_vfs": function["sriov"].get("totalvfs") or 0,
                "addresses": [other["address"] for other in functions if other.get("physfn") == function["address"]],
            }
            for function in functions
            if (function.get("sriov") or {}).get("totalvfs")
        ],
        "microvms": [
            _pick(
                microvm,
                *("name", "state", "image", "image_digest", "ready", "pss_bytes", "shared_bytes", "private_bytes"),
            )
            for microvm in microvms
        ],
        "changes": list(metal.get("audit") or []),
    }


def _groups(groups: t.Sequence[t.Any], functions: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
    by_address = {function["address"]: function for function in functions}
    found = []
    for group in groups:
        members = [by_address.get(address, {"address": address}) for address in group["functions"]]
        found.append({"id": group["id"], "functions": [_pick(m, "address", "class", "driver") for m in members]})
    return found


# -- sizes for people -----------------------------------------------------------


def size(count: float) -> str:
    """``1.5 GiB``: three significant digits at most."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def rate(count: float) -> str:
    """``1.9 MB/s``, decimal as network and memory vendors count."""
    value = float(count)
    for unit in ("B/s", "kB/s", "MB/s", "GB/s"):
        if value < 1000 or unit == "GB/s":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """``1 host``, ``2 hosts``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def sharing(microvms: t.Sequence[t.Mapping[str, t.Any]]) -> tuple[int, int]:
    """Bytes that microVMs take together, and that they would take if none shared its image."""
    once: dict[str, int] = {}
    alone = private = 0
    for microvm in microvms:
        own, shared = microvm.get("private_bytes") or 0, microvm.get("shared_bytes") or 0
        digest = microvm.get("image_digest") or microvm["name"]
        once[digest] = max(once.get(digest, 0), shared)
        private += own
        alone += own + shared
    return private + sum(once.values()), alone


def tier_rank(host: t.Mapping[str, t.Any]) -> dict[int, int]:
    """Node -> rank of its tier, 1 the fastest; the kernel's own tier numbers mean nothing to a reader."""
    tiers = sorted(host["numa"]["tiers"], key=lambda tier: int(tier["tier"]))
    return {node: rank for rank, tier in enumerate(tiers, 1) for node in tier["nodes"]}


def summary(document: t.Mapping[str, t.Any]) -> list[str]:
    """A few lines for the terminal."""
    lines = []
    for name, host in document["hosts"].items():
        regions = [
            f"CXL {region['type']} x{region['interleave_ways']} {size(region['size_bytes'])} {region['state']}"
            + (f" as node {region['numa_node']}" if region["numa_node"] is not None else "")
            for region in host["cxl"]["regions"]
        ]
        vfs = sum(pf["vfs"] for pf in host["sriov"])
        running = [microvm for microvm in host["microvms"] if microvm["state"] == "running"]
        parts = [*regions, f"{plural(len(host['vfio']['functions']), 'function')} on vfio", plural(vfs, "VF")]
        if host["microvms"]:
            used, alone = sharing(running)
            images = len({microvm.get("image_digest") for microvm in running})
            parts.append(
                f"{len(running)} of {plural(len(host['microvms']), 'microVM')} running on {plural(images, 'image')} "
                f"in {size(used)} ({size(alone)} without sharing)"
            )
        lines.append(f"{name}: {', '.join(parts)}")
    for name, pool in document["pools"].items():
        tiers = [
            f"{tier['medium']} {size(tier['size_bytes'])}"
            + (f" on node {tier['numa_node']}" if tier.get("numa_node") is not None else "")
            + f" put {rate(tier['put_bytes_per_second'])} get {rate(tier['get_bytes_per_second'])} "
            + ("verified" if tier["verified"] else f"NOT VERIFIED: {tier.get('problem', 'unknown')}")
            for tier in pool["tiers"]
        ]
        lines.append(f"pool {name} ({pool['engine']}): {', '.join(tiers)}")
    return lines
