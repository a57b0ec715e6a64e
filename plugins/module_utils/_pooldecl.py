# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a pool's options to its declaration: complete, checked, and without any secret.

The declaration is what is written to the host, what units and probe read, and what connectors are rendered from.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import typing as t

from ansible_collections.agentfleet.metal.plugins.module_utils import _connectors, _kvsize
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size, parse_size

MEDIA = {"mooncake": ("dram", "cxl", "ssd"), "threefs": ("threefs",), "filesystem": ("ssd", "cxl")}
MEMORY = ("dram", "cxl")
# What a tier of each medium may say besides name, medium and size.
_OF_MEDIUM = {
    "dram": ("numa_node",),
    "cxl": ("memdevs", "numa_node"),
    "ssd": ("path",),
    "threefs": ("path", "mount_point"),
}
_MASTER: dict[str, t.Any] = {
    "address": "127.0.0.1",
    "port": 50051,
    "metrics_address": None,
    "metrics_port": 9003,
    "run": True,
}
# What a pool of files has no use for, and why; its default says nothing.
_OF_MOONCAKE: dict[str, tuple[t.Any, str]] = {
    "capacity": (None, "what its tenants share is the tier of its directory"),
    "eviction_high_watermark": (None, "engines make room in a directory by themselves"),
    "listen_all_addresses": (False, "it has no stores that listen"),
    "protocol": ("tcp", "its data go through files"),
    "rdma_devices": ([], "its data go through files"),
    "etcd": ([], "it has no master"),
}
# What says how a model's elements are stored.
_OF_MODEL = {"dtype": "bf16", "group_size": None, "scale_dtype": "fp16", "zero_point": False}
_NAME = re.compile(r"^[a-z0-9][a-z0-9_]{0,30}$")
_OWN_HOST = re.compile(r"127\.|localhost$|::1$")
_TOKEN_BYTES = 16


def declare(option: str, name: str, pool: t.Mapping[str, t.Any], read: t.Callable[[str], str]) -> dict[str, t.Any]:
    """A pool's declaration.

    :param read: reads a file of the host, for a model's config.json
    """
    engine = pool.get("engine") or "mooncake"
    if engine not in MEDIA:
        raise Refused(f"{option}.engine", engine, "no such engine", f"Engines: {', '.join(MEDIA)}")
    made: dict[str, t.Any] = {
        "name": name,
        "engine": engine,
        **_policy(option, engine, pool),
        **_sizes(option, pool, read),
    }
    tiers: dict[str, dict[str, t.Any]] = {}
    for index, tier in enumerate(pool.get("tiers") or []):
        where = f"{option}.tiers[{index}]"
        one = _tier(where, engine, tier)
        one["name"] = checked_name(f"{where}.name", tier.get("name") or tier.get("medium"), tiers)
        tiers[one["name"]] = one
    made["tiers"] = list(tiers.values())
    _tiers(option, engine, made["tiers"])
    if engine == "mooncake":
        made.update(_mooncake(option, pool))
    else:
        _files(option, engine, pool)
        made["address"] = pool.get("address") or "127.0.0.1"
    made["tenants"] = _tenants(option, pool, made)
    made["connectors"] = _made_connectors(option, pool, made)
    return made


def check_heeded(option: str, made: t.Mapping[str, t.Any]) -> None:
    """Refuse policies that nothing of the pool would follow."""
    policy, eviction = made["write_policy"], made["eviction_policy"]
    offloads = made["engine"] == "mooncake" and any(tier["medium"] == "ssd" for tier in made["tiers"])
    evicts = offloads or any(_connectors.evicts_as(one["engine"], one["backend"]) for one in made["connectors"])
    if eviction != "lru" and not evicts:
        remedy = "Leave it out, or add a connector of lmcache or of vllm's offloading"
        if made["engine"] == "mooncake":
            remedy = "Leave it out, or add an ssd tier or a connector of lmcache"
        raise Refused(f"{option}.eviction_policy", eviction, "nothing of the pool evicts by it", remedy)
    heeded = any(connector["engine"] == "sglang" for connector in made["connectors"])
    if policy != "write_through" and not heeded and not (policy == "write_back" and offloads):
        remedy = "Leave it out, or add an sglang connector"
        if policy == "write_back" and made["engine"] == "mooncake":
            remedy += " or an ssd tier"
        raise Refused(f"{option}.write_policy", policy, "nothing of the pool follows it", remedy)


def turn(pools: t.Iterable[t.Mapping[str, t.Any]]) -> str:
    """When a host with these pools has its turn, so that a master is there while other hosts' stores need it.

    :return: ``first`` where masters for other hosts come, ``last`` where they go, ``then`` with none, or with both
    """
    masters = [(pool, pool.get("master") or {}) for pool in pools if (pool.get("engine") or "mooncake") == "mooncake"]
    come = {
        (pool.get("state") or "present") == "present"
        for pool, master in masters
        if master.get("run", True) and not _OWN_HOST.match(str(master.get("address") or "127.0.0.1"))
    }
    return "then" if len(come) != 1 else "first" if come == {True} else "last"


def checked_name(option: str, value: t.Any, taken: t.Container[str]) -> str:
    """A name that a unit, a file and a directory can carry."""
    name = str(value)
    if not _NAME.match(name):
        raise Refused(option, value, "not a name", "Use up to 31 of a-z, 0-9 and _, starting with a letter or digit")
    if name in taken:
        raise Refused(option, value, "the name is used twice", "Give each its own name")
    return name


def tenant_ids(pool: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Tenant -> its name inside the engine, made of its token. As secret as the token.

    Mooncake knows tenants and quotas but no passwords: who names a tenant is that tenant. A name that nobody can
    guess is what keeps others out.
    """
    found = {}
    for tenant in pool.get("tenants") or []:
        name, token = str(tenant["name"]), tenant.get("token")
        digest = hashlib.sha256(f"{pool['name']}:{name}:{token}".encode()).hexdigest()
        found[name] = f"{name}-{digest[: 2 * _TOKEN_BYTES]}" if token else name
    return found


def _policy(option: str, engine: str, pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    watermark = float(pool.get("eviction_high_watermark") or _kvsize.USABLE[engine])
    if not 0 < watermark <= 1:
        raise Refused(f"{option}.eviction_high_watermark", watermark, "not a share", "Use such as 0.95")
    replicas = int(pool.get("replicas") or 1)
    if replicas < 1:
        raise Refused(f"{option}.replicas", replicas, "not a number of copies", "Use 1 or more")
    if replicas > 1 and engine != "mooncake":
        keeps = "3FS replicates by its chain table" if engine == "threefs" else "a directory has one copy"
        raise Refused(f"{option}.replicas", replicas, f"the pool does not replicate: {keeps}", "Leave it out")
    eviction = pool.get("eviction_policy") or "lru"
    if engine == "mooncake" and eviction == "arc":  # its stores would take it for "none", and their disks would fill up
        raise Refused(f"{option}.eviction_policy", eviction, "Mooncake does not evict by it", "Use lru or fifo")
    return {
        "eviction_policy": eviction,
        "eviction_high_watermark": watermark,
        "write_policy": pool.get("write_policy") or "write_through",
        "replicas": replicas,
    }


def _sizes(option: str, pool: t.Mapping[str, t.Any], read: t.Callable[[str], str]) -> dict[str, t.Any]:
    """Bytes of a token and of a block; 0 where nothing was said of the model."""
    tokens = int(pool.get("page_tokens") or 64)
    if tokens < 1 or tokens & (tokens - 1):
        raise Refused(f"{option}.page_tokens", tokens, "not a power of two", "Use such as 16, 32 or 64")
    gpus = int(pool.get("tensor_parallel") or 1)
    found: dict[str, t.Any] = {
        "page_tokens": tokens,
        "tensor_parallel": gpus,
        "model": "",
        "latent": False,
        "kv_heads": [],  # as _kvsize.heads has them, for connectors with other GPUs
    }
    if pool.get("model") and pool.get("bytes_per_token"):
        raise Refused(f"{option}.bytes_per_token", pool["bytes_per_token"], "the model says it", "Give one of them")
    per_token = 0
    for key, default in _OF_MODEL.items():
        if not pool.get("model") and pool.get(key) not in (None, default):
            remedy = "Name the model, or leave it out: bytes_per_token are those that are stored"
            raise Refused(f"{option}.{key}", pool[key], "there is no model whose elements it would be about", remedy)
    if pool.get("model"):
        model = _kvsize.load(f"{option}.model", pool["model"], read)
        scale = (pool.get("group_size"), pool.get("scale_dtype") or "fp16", bool(pool.get("zero_point")))
        try:
            form = _kvsize.dtype("dtype", pool.get("dtype") or "bf16", *scale)
            size = _kvsize.size(model, form, gpus)
        except Refused as refusal:
            raise Refused(f"{option}.{refusal.option}", refusal.value, refusal.problem, refusal.remedy) from refusal
        per_token = size["stored_bytes_per_token"]
        found.update(model=model.name, latent=model.latent, kv_heads=_kvsize.heads(model, form))
    elif pool.get("bytes_per_token"):
        per_token = _kvsize.positive(f"{option}.bytes_per_token", pool["bytes_per_token"])
    # What a rank stores at a time is its own share of a block; a latent is stored whole, by one rank.
    ranks = 1 if found["latent"] else gpus
    return {**found, "bytes_per_token": per_token, "block_bytes": per_token * tokens // ranks}


def _tier(where: str, engine: str, tier: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    medium = tier.get("medium")
    if medium not in MEDIA[engine]:
        raise Refused(
            f"{where}.medium", medium, f"engine {engine} has no such tier", f"Media: {', '.join(MEDIA[engine])}"
        )
    devdax = bool(tier.get("devdax"))
    allowed = (*_OF_MEDIUM[medium], *(("devdax",) if medium == "cxl" else ()))
    for key in ("memdevs", "numa_node", "devdax", "path", "mount_point"):
        if key not in allowed and tier.get(key) not in (None, [], False):
            raise Refused(f"{where}.{key}", tier[key], f"a {medium} tier does not use it", "Leave it out")
    made: dict[str, t.Any] = {"medium": medium, "size_bytes": parse_size(f"{where}.size", tier.get("size"), 1 << 20)}
    if medium in MEMORY:
        made.update(_memory(where, medium, tier))
        if devdax and engine == "mooncake":
            raise Refused(
                f"{where}.devdax",
                True,
                "the engine's packages are built without CXL devices",
                "Bring the region online as system-ram, where the tier is bound to its node",
            )
        if medium == "cxl" and engine == "filesystem" and not devdax:
            raise Refused(f"{where}.devdax", False, "a filesystem pool has no memory of its own", "Set devdax: true")
        if devdax and not made["memdevs"]:
            raise Refused(f"{where}.memdevs", [], "a devdax needs its devices named", "Give serials (memdevs)")
        return {**made, "devdax": True} if devdax else made
    made["path"] = os.path.normpath(tier.get("path") or "")
    if not made["path"].startswith("/") or made["path"] == "/":
        raise Refused(f"{where}.path", tier.get("path"), "not an absolute directory", "Write /srv/kvcache/POOL")
    if medium == "threefs":
        made["mount"] = os.path.normpath(tier.get("mount_point") or "")
        if not made["path"].startswith(made["mount"] + "/") or made["mount"] in ("/", "."):
            raise Refused(
                f"{where}.mount_point",
                tier.get("mount_point"),
                f"{made['path']} is not below it",
                "Name the directory where 3FS is mounted, such as /3fs/stage",
            )
    return made


def _memory(where: str, medium: str, tier: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    made = {
        "memdevs": [_serial(f"{where}.memdevs", serial) for serial in tier.get("memdevs") or []],
        "numa_node": tier.get("numa_node"),
    }
    if made["memdevs"] and made["numa_node"] is not None:
        raise Refused(f"{where}.numa_node", made["numa_node"], "memdevs say the node already", "Give one of them")
    if medium == "cxl" and not made["memdevs"] and made["numa_node"] is None:
        raise Refused(
            f"{where}.memdevs", [], "a cxl tier needs its memory named", "Give serials (memdevs) or numa_node"
        )
    return made


def _serial(option: str, value: t.Any) -> str:
    try:
        return hex(int(str(value), 0))
    except ValueError:
        raise Refused(option, value, "not a serial number", "Write it as cxl list -M shows it, such as 0x1") from None


def _tiers(option: str, engine: str, tiers: t.Sequence[t.Mapping[str, t.Any]]) -> None:
    if not tiers:
        raise Refused(f"{option}.tiers", [], "a pool needs at least one tier", f"Media: {', '.join(MEDIA[engine])}")
    if engine != "mooncake":
        if not any(tier.get("path") for tier in tiers):
            raise Refused(f"{option}.tiers", "cxl", "the pool has no directory", f"Add a {MEDIA[engine][0]} tier")
        media = [tier["medium"] for tier in tiers]
        for index, medium in enumerate(media):
            if medium in media[:index]:
                problem = "engines are told of the first one only"
                raise Refused(f"{option}.tiers[{index}].medium", medium, problem, "Keep one, or make a pool of each")
        return
    if not any(tier["medium"] in MEMORY for tier in tiers):
        raise Refused(f"{option}.tiers", "ssd", "objects are written to memory first", "Add a dram or cxl tier")
    files = [index for index, tier in enumerate(tiers) if tier["medium"] == "ssd"]
    if len(files) > 1:
        raise Refused(f"{option}.tiers[{files[1]}].medium", "ssd", "the engine offloads to one directory", "Keep one")
    for index in files:
        if index != len(tiers) - 1:
            raise Refused(f"{option}.tiers[{index}].medium", "ssd", "slower than the tier after it", "Put it last")


def _files(option: str, engine: str, pool: t.Mapping[str, t.Any]) -> None:
    """Refuse what is for Mooncake alone."""
    given: dict[str, tuple[t.Any, t.Any, str]] = {key: (pool.get(key), *told) for key, told in _OF_MOONCAKE.items()}
    for key, value in (pool.get("master") or {}).items():
        given[f"master.{key}"] = (value, _MASTER.get(key), "it has no master")
    for key, (value, default, why) in given.items():
        if value not in (None, default):
            raise Refused(f"{option}.{key}", value, f"a {engine} pool has no use for it: {why}", "Leave it out")


def _mooncake(option: str, pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    address = pool.get("address") or "127.0.0.1"
    given = pool.get("master") or {}
    master = {key: default if given.get(key) in (None, "") else given[key] for key, default in _MASTER.items()}
    # The port of the metrics also gives tenants' names away, deletes objects and sets quotas.
    # With etcd any host's master may lead, and the others have to reach it.
    open_to = "127.0.0.1" if pool.get("tenants") and not pool.get("etcd") else master["address"]
    master["metrics_address"] = master["metrics_address"] or open_to
    for key in ("port", "metrics_port"):
        if not 1 <= int(master[key]) <= 65535:
            raise Refused(f"{option}.master.{key}", master[key], "not a TCP port", "Use 1 to 65535")
    if not pool.get("listen_all_addresses"):
        for key, value in (("address", str(address)), ("master.address", str(master["address"]))):
            if not _is_one_address(value):
                raise Refused(
                    f"{option}.{key}", value, "not one IPv4 address", "Name one, or set listen_all_addresses: true"
                )
    protocol, devices = pool.get("protocol") or "tcp", list(pool.get("rdma_devices") or [])
    if protocol == "tcp" and devices:
        raise Refused(f"{option}.rdma_devices", devices, "TCP uses no RDMA device", "Set protocol: rdma")
    endpoints = [str(endpoint) for endpoint in pool.get("etcd") or []]
    for index, endpoint in enumerate(endpoints):
        if not re.fullmatch(r"([^:/[\]]+|\[[0-9A-Fa-f:.]+\]):\d+", endpoint):
            raise Refused(
                f"{option}.etcd[{index}]",
                endpoint,
                "not an endpoint",
                "Write HOST:PORT, such as 10.0.0.1:2379 or [fd00::1]:2379",
            )
    if endpoints and len(endpoints) % 2 == 0:
        raise Refused(
            f"{option}.etcd", endpoints, "an even number of members survives no more than one fewer", "Use 1, 3 or 5"
        )
    return {
        "address": address,
        "listen_all_addresses": bool(pool.get("listen_all_addresses")),
        "master": master,
        "etcd": endpoints,
        "protocol": protocol,
        "rdma_devices": devices,
    }


def _is_one_address(value: str) -> bool:
    try:
        return not ipaddress.IPv4Address(value).is_unspecified
    except ValueError:
        return False


def _tenants(option: str, pool: t.Mapping[str, t.Any], made: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    # Of a pool of files what tenants fill is its directory, and a devdax beside it is not.
    shared = [tier for tier in made["tiers"] if (tier["medium"] in MEMORY) == (made["engine"] == "mooncake")]
    own = sum(tier["size_bytes"] for tier in shared)
    capacity = parse_size(f"{option}.capacity", pool["capacity"]) if pool.get("capacity") else own
    found: dict[str, dict[str, t.Any]] = {}
    for index, tenant in enumerate(pool.get("tenants") or []):
        where = f"{option}.tenants[{index}]"
        name = checked_name(f"{where}.name", tenant.get("name"), found)
        quota = parse_size(f"{where}.quota", tenant.get("quota"))
        used = sum(other["quota_bytes"] for other in found.values())
        if used + quota > capacity:
            several = "; for a pool over several hosts set capacity" if made["engine"] == "mooncake" else ""
            raise Refused(
                f"{where}.quota",
                tenant.get("quota"),
                f"with the tenants before it more than the pool's {format_size(capacity)}",
                f"At most {format_size(capacity - used)} is left{several}",
            )
        if tenant.get("token") is not None and made["engine"] != "mooncake":
            raise Refused(f"{where}.token", "(hidden)", "a directory knows owners, not tokens", "Set owner")
        if tenant.get("token") is not None and len(str(tenant["token"])) < _TOKEN_BYTES:
            raise Refused(
                f"{where}.token",
                "(hidden)",
                f"shorter than {_TOKEN_BYTES} characters",
                "Use a random one from the vault",
            )
        if tenant.get("owner") and made["engine"] == "mooncake":
            raise Refused(f"{where}.owner", tenant["owner"], "Mooncake knows tokens, not owners", "Set token")
        found[name] = {"name": name, "quota_bytes": quota, "owner": tenant.get("owner") or ""}
    return list(found.values())


def _made_connectors(option: str, pool: t.Mapping[str, t.Any], made: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    found: dict[str, dict[str, t.Any]] = {}
    maps: dict[str, str] = {}
    shares: dict[str, str] = {}
    for index, connector in enumerate(pool.get("connectors") or []):
        where = f"{option}.connectors[{index}]"
        wish = {"tensor_parallel": made["tensor_parallel"], **{k: v for k, v in connector.items() if v is not None}}
        told = connector.get("host_memory")
        memory = parse_size(f"{where}.host_memory", told) if told else max(4, int(wish["tensor_parallel"])) << 30
        one = _connectors.check(where, made, {**wish, "host_memory_bytes": memory})
        name = _connectors.name_of(one)
        if name in found:
            raise Refused(f"{where}.backend", connector.get("backend"), f"{name} is there twice", "Keep one")
        _connectors.check_map(where, name, one, maps)
        _connectors.check_share(where, made, one, shares)
        found[name] = one
    return list(found.values())
