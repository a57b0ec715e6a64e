# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an inference engine needs in order to use a pool: its configuration files, environment and arguments.

Pure: a pool's declaration and a connector's options in, texts out. Key names are those of the versions that
tests/contract/connectors.json records; a test holds every rendered key against that record.
"""

from __future__ import annotations

import json
import shlex
import typing as t
from dataclasses import dataclass, field

from ansible_collections.agentfleet.metal.plugins.module_utils import _kvsize, _slab
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake_admin import master_address
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import format_size

# Engine and backend -> the pools that can serve it.
SERVED_BY = {
    ("sglang", "file"): ("filesystem", "threefs"),
    ("sglang", "mooncake"): ("mooncake",),
    ("sglang", "hf3fs"): ("threefs",),
    ("vllm", "offloading"): ("filesystem", "threefs"),
    ("vllm", "mooncake"): ("mooncake",),
    ("vllm", "mooncake_transfer"): ("mooncake",),
    ("vllm", "hf3fs"): ("threefs",),
    ("vllm", "lmcache"): ("mooncake", "threefs", "filesystem"),
    ("lmcache", "cpu"): ("mooncake", "threefs", "filesystem"),
    ("lmcache", "disk"): ("filesystem", "threefs"),
    ("lmcache", "mooncake"): ("mooncake",),
    ("lmcache", "hf3fs"): ("threefs",),
    ("lmcache", "dax"): ("filesystem",),
}
# The server of page indices that SGLang's and vLLM's 3FS clients share between ranks. They speak different
# protocols, so that each engine needs its own.
METADATA = {
    "sglang": "sglang.srt.mem_cache.storage.hf3fs.mini_3fs_metadata_server",
    "vllm": "vllm.distributed.kv_transfer.kv_connector.v1.hf3fs.hf3fs_metadata_server",
}
# SGLang asks where it is told to. vLLM reads the key and asks port 18000 of its own host all the same.
_METADATA_PORT = {"sglang": 18001, "vllm": 18000}
_OWN_HOST = ("127.0.0.1", "localhost")
# What must be importable in the engine's own Python. vLLM's connector takes a mock without a word if it is not.
CLIENT = {"sglang": "hf3fs_fuse.io", "vllm": "hf3fs_fuse.io", "lmcache": "hf3fs_fuse.io"}
DIRECTORY = "/etc/agentfleet/connectors"
# What fills files up to a size that it is told; the others keep no account of theirs.
_FILL = {("sglang", "file"), ("sglang", "hf3fs"), ("vllm", "hf3fs"), ("lmcache", "disk")}
_GB = 10**9  # SGLang takes whole decimal gigabytes
_EVICTION = {  # policy -> what each engine calls it; absent where the engine has no such policy
    "lru": {"vllm": "lru", "lmcache": "LRU"},
    "fifo": {"lmcache": "FIFO"},
    "arc": {"vllm": "arc"},
}


@dataclass
class Rendered:
    """A connector as it is written to the host.

    :param secret: whether a tenant's token is in it, so that only root may read it
    """

    name: str
    directory: str
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secret: bool = False

    def path(self, name: str) -> str:
        """The path of one of its files."""
        return f"{self.directory}/{name}"

    def texts(self) -> dict[str, str]:
        """Every file of the connector: name -> text."""
        found = dict(self.files)
        found["environment"] = "".join(f"{key}={_quoted(value)}\n" for key, value in sorted(self.environment.items()))
        if self.arguments:
            found["arguments"] = _lines(self.arguments)
        return found


def check(option: str, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The connector's options, complete and possible for this pool.

    :param pool: the pool's declaration, as ``_pooldecl`` makes it
    """
    engine, backend = str(connector.get("engine")), str(connector.get("backend"))
    backends = [other for name, other in SERVED_BY if name == engine]
    if not backends:
        known = ", ".join(sorted({name for name, _backend in SERVED_BY}))
        raise Refused(f"{option}.engine", engine, "no such inference engine", f"Engines: {known}")
    if backend not in backends:
        raise Refused(f"{option}.backend", backend, f"{engine} has no such connector", f"Its: {', '.join(backends)}")
    if pool["engine"] not in SERVED_BY[engine, backend]:
        fitting = [other for (name, other), served in SERVED_BY.items() if name == engine and pool["engine"] in served]
        raise Refused(
            f"{option}.backend", backend, f"a {pool['engine']} pool cannot serve it", f"Use {' or '.join(fitting)}"
        )
    gpus = int(connector.get("tensor_parallel") or 1)
    made: dict[str, t.Any] = {
        "engine": engine,
        "backend": backend,
        "tenant": connector.get("tenant") or "",
        "tensor_parallel": gpus,
        "host_memory_bytes": int(connector["host_memory_bytes"]),
        "address": connector.get("address") or pool.get("address") or "127.0.0.1",
        "python": connector.get("python") or "",
        "metadata_address": connector.get("metadata_address")
        or ("" if engine == "vllm" else pool.get("address"))
        or _OWN_HOST[0],
        "metadata_port": int(connector.get("metadata_port") or _METADATA_PORT.get(engine, 18000)),
        "metadata_run": bool(connector.get("metadata_run")),
    }
    if gpus < 1:
        raise Refused(f"{option}.tensor_parallel", gpus, "not a number of GPUs", "Use 1 or more")
    _kvsize.check_heads(f"{option}.tensor_parallel", gpus, pool["kv_heads"])
    size = _slab.page_bytes(pool, made)
    if pool["bytes_per_token"] and not size and _slab.names(pool, made):
        raise Refused(
            f"{option}.tensor_parallel",
            gpus,
            f"bytes_per_token is of {pool['tensor_parallel']} GPUs, and does not tell the page size of others",
            "Give the pool its model, or a tensor_parallel that fits",
        )
    tenants = [tenant["name"] for tenant in pool.get("tenants", [])]
    if made["tenant"] and made["tenant"] not in tenants:
        raise Refused(
            f"{option}.tenant",
            made["tenant"],
            "the pool has no such tenant",
            f"Tenants: {', '.join(tenants) or 'none'}",
        )
    if tenants and not made["tenant"] and backend != "cpu":
        raise Refused(
            f"{option}.tenant", None, "a pool with tenants serves nobody else", f"Name one of {', '.join(tenants)}"
        )
    if not 1 <= made["metadata_port"] <= 65535:
        raise Refused(f"{option}.metadata_port", made["metadata_port"], "not a TCP port", "Use 1 to 65535")
    if engine == "vllm" and backend == "hf3fs":
        fixed = "vLLM's connector asks port 18000 of its own host, whatever it is told"
        if made["metadata_port"] != _METADATA_PORT["vllm"]:
            raise Refused(f"{option}.metadata_port", made["metadata_port"], fixed, "Leave it out")
        if made["metadata_address"] not in _OWN_HOST:
            remedy = "Leave it out, and let port 18000 of each engine's host lead to one service"
            raise Refused(f"{option}.metadata_address", made["metadata_address"], fixed, remedy)
    if any(slab.pages < 2 for slab in slabs(pool, made)):
        raise Refused(
            f"{option}.backend",
            backend,
            f"a rank's share holds fewer than two pages of {size} bytes",
            "Make the tier larger",
        )
    if engine == "sglang" and _memory(made) < _GB:
        raise Refused(
            f"{option}.host_memory",
            format_size(made["host_memory_bytes"]),
            f"less than SGLang's unit of 1 GB for each of {gpus} GPUs",
            f"Give at least {gpus}GiB",
        )
    if made["metadata_run"] and (engine not in METADATA or backend != "hf3fs"):
        raise Refused(f"{option}.metadata_run", True, f"{engine} {backend} has no metadata service", "Leave it out")
    if made["metadata_run"] and not made["python"]:
        raise Refused(
            f"{option}.python", None, "the metadata service is a program of the engine", f"Name {engine}'s python"
        )
    if made["python"] and not made["python"].startswith("/"):
        raise Refused(f"{option}.python", made["python"], "not an absolute path", f"Name {engine}'s own interpreter")
    evicts = evicts_as(engine, backend)
    if evicts and evicts not in _EVICTION[pool["eviction_policy"]]:
        able = [policy for policy, engines in _EVICTION.items() if evicts in engines]
        raise Refused(
            f"{option}.engine",
            engine,
            f"it does not evict by {pool['eviction_policy']}",
            f"Set eviction_policy to {' or '.join(able)}",
        )
    if backend == "dax":
        if not _devdax(pool):
            raise Refused(f"{option}.backend", "dax", "the pool has no cxl tier with a devdax", "Add one")
        if gpus > 1:
            raise Refused(f"{option}.tensor_parallel", gpus, "LMCache's dax backend serves one GPU", "Use 1, or disk")
    return made


def evicts_as(engine: str, backend: str) -> str:
    """Whose names of the pool's eviction policy a connector takes; empty if it is told none."""
    # LMCache keeps its own first tier with every backend.
    return "lmcache" if "lmcache" in (engine, backend) else "vllm" if backend == "offloading" else ""


def name_of(connector: t.Mapping[str, t.Any]) -> str:
    """A connector's name: engine, backend, and its tenant if it has one."""
    parts = [connector["engine"], connector["backend"], *([connector["tenant"]] if connector["tenant"] else [])]
    return "-".join(parts)


def render(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], tenant_id: str = "") -> Rendered:
    """The files of one connector.

    :param connector: as ``check`` returns it
    :param tenant_id: the tenant's name in the engine; it is as secret as the token it is made of
    """
    name = name_of(connector)
    made = Rendered(name, f"{DIRECTORY}/{pool['name']}/{name}", secret=bool(tenant_id))
    {"sglang": _sglang, "vllm": _vllm, "lmcache": _lmcache}[connector["engine"]](made, pool, connector, tenant_id)
    if connector["backend"] == "hf3fs":
        made.files["check"] = _check_program(made.name, CLIENT[connector["engine"]], _directory(pool, connector))
        if not connector["python"]:
            made.notes.append(
                f"Without python nobody looked whether {connector['engine']} can import the 3FS client, without "
                f"which it may write plain files by a mock: run {made.path('check')} PYTHON before the engine"
            )
    return made


def examples(pool: t.Mapping[str, t.Any], host_memory_bytes: int, tensor_parallel: int) -> list[dict[str, t.Any]]:
    """Every connector that a pool can serve, for planning."""
    found = []
    for (engine, backend), engines in SERVED_BY.items():
        gpus = 1 if backend == "dax" else tensor_parallel
        wish = {
            "engine": engine,
            "backend": backend,
            "tensor_parallel": gpus,
            "host_memory_bytes": host_memory_bytes,
            "tenant": next((tenant["name"] for tenant in pool.get("tenants", [])), ""),
        }
        if pool["engine"] in engines and not (backend == "dax" and not _devdax(pool)):
            found.append(check("connectors", pool, wish))
    return found


# -- SGLang HiCache -----------------------------------------------------------------


def _sglang(made: Rendered, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], tenant_id: str) -> None:
    backend = connector["backend"]
    made.arguments += [
        "--enable-hierarchical-cache",
        f"--page-size={pool['page_tokens']}",
        f"--hicache-size={_memory(connector) // _GB}",  # of each rank
        f"--hicache-write-policy={pool['write_policy']}",
        f"--hicache-storage-backend={backend}",
        "--hicache-storage-prefetch-policy=timeout",
        # One page lies in one piece, so that it is one object; the kernel copies it between GPU and host.
        "--hicache-mem-layout=page_first",
        "--hicache-io-backend=kernel",
    ]
    if backend == "file":
        made.environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = _directory(pool, connector)
        made.environment["SGLANG_HICACHE_FILE_BACKEND_MAX_SIZE"] = str(_capacity(pool, connector))
        made.notes.append("One file for each page: metadata operations grow with the pages")
    elif backend == "mooncake":
        made.files["mooncake.json"] = _json(
            {
                "local_hostname": connector["address"],
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": master_address(pool),
                "protocol": pool["protocol"],
                "device_name": ",".join(pool["rdma_devices"]),
                "global_segment_size": 0,  # the pool's stores have the memory, this client none
                **({"tenant_id": tenant_id} if tenant_id else {}),
            }
        )
        made.environment["SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"] = made.path("mooncake.json")
        made.environment.update(_cluster(pool))
    else:
        made.files["hf3fs.json"] = _json(
            {
                "file_path_prefix": f"{_directory(pool, connector)}/hicache",
                "file_size": _file_size(pool, connector),
                "numjobs": 16,
                "entries": 8,
                # Without it a latent cache is refused by SGLang, and every rank counts its pages alone.
                "metadata_server_url": url(connector),
            }
        )
        made.environment["SGLANG_HICACHE_HF3FS_CONFIG_PATH"] = made.path("hf3fs.json")


# -- vLLM ---------------------------------------------------------------------------


def _vllm(made: Rendered, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], tenant_id: str) -> None:
    backend = connector["backend"]
    if backend == "lmcache":
        # Its own choice of LMCache's backends is that of the pool.
        inner = {"mooncake": "mooncake", "threefs": "hf3fs", "filesystem": "disk"}[pool["engine"]]
        _lmcache(made, pool, {**connector, "engine": "lmcache", "backend": inner}, tenant_id)
        made.arguments += _transfer("LMCacheConnectorV1", {})
    elif backend == "mooncake":
        made.files["mooncake.json"] = _json(
            {
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": master_address(pool),
                "protocol": pool["protocol"],
                "device_name": ",".join(pool["rdma_devices"]),
                "mode": "standalone-store",
                "global_segment_size": 0,
                "local_buffer_size": _memory(connector),  # of each rank
                "enable_offload": any(tier["medium"] == "ssd" for tier in pool["tiers"]),
                **({"tenant_id": tenant_id} if tenant_id else {}),
            }
        )
        made.environment["MOONCAKE_CONFIG_PATH"] = made.path("mooncake.json")
        made.environment.update(_cluster(pool))
        made.arguments += _transfer("MooncakeStoreConnector", {})
    elif backend == "mooncake_transfer":
        # Straight from a prefill to a decode instance; the pool is not involved, its network is.
        made.files["producer"] = _lines(_transfer("MooncakeConnector", _protocol(pool), "kv_producer"))
        made.files["consumer"] = _lines(_transfer("MooncakeConnector", _protocol(pool), "kv_consumer"))
    elif backend == "offloading":
        made.arguments += _transfer(
            "OffloadingConnector",
            {
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": connector["host_memory_bytes"],
                "block_size": pool["page_tokens"],
                "eviction_policy": _EVICTION[pool["eviction_policy"]]["vllm"],
                "secondary_tiers": [
                    {"type": "fs", "root_dir": _directory(pool, connector), "n_read_threads": 16, "n_write_threads": 16}
                ],
            },
        )
        # Block names are hashes; with another seed in another instance nothing would ever be found.
        made.environment["PYTHONHASHSEED"] = "0"
        made.notes.append("vLLM's fs tier does not bound its directory: bound it by a quota of the file system")
    else:
        made.arguments += _transfer(
            "HF3FSKVConnector",
            {
                "hf3fs_storage_path": _directory(pool, connector),
                "hf3fs_metadata_server_url": url(connector),
                "hf3fs_file_size": _file_size(pool, connector),
                "hf3fs_client_numjobs": 16,
                "hf3fs_max_device_buffer_count": 128,
            },
        )
    if backend != "mooncake_transfer":
        made.arguments.append(f"--block-size={pool['page_tokens']}")


def _protocol(pool: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    devices = ",".join(pool["rdma_devices"])
    return {"mooncake_protocol": pool["protocol"], **({"device_name": devices} if devices else {})}


def _transfer(connector: str, extra: t.Mapping[str, t.Any], role: str = "kv_both") -> list[str]:
    config = {"kv_connector": connector, "kv_role": role, "kv_load_failure_policy": "recompute"}
    if extra:
        config["kv_connector_extra_config"] = extra  # type: ignore[assignment]
    return [f"--kv-transfer-config={json.dumps(config, sort_keys=True)}"]


# -- LMCache ------------------------------------------------------------------------


def _lmcache(made: Rendered, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], tenant_id: str) -> None:
    backend, gpus = connector["backend"], connector["tensor_parallel"]
    config: dict[str, t.Any] = {
        "chunk_size": max(256, pool["page_tokens"]),
        "local_cpu": True,
        "max_local_cpu_size": connector["host_memory_bytes"] / (1 << 30) / gpus,  # of each rank
        "cache_policy": _EVICTION[pool["eviction_policy"]]["lmcache"],
    }
    extra: dict[str, t.Any] = {}
    if backend == "disk":
        config["local_disk"] = f"file://{_directory(pool, connector)}/"
        config["max_local_disk_size"] = _capacity(pool, connector) / (1 << 30) / gpus
    elif backend == "mooncake":
        address = master_address(pool)
        config["remote_url"] = f"mooncakestore://{pool['master']['address']}:{pool['master']['port']}/"
        config["remote_serde"] = "naive"
        # Names of the engine's own setup, which LMCache passes on under this prefix. With those of LMCache's older
        # documentation (master_server_address, device_name) the engine asks a master on localhost without a word.
        extra = {
            "mooncake_local_hostname": connector["address"],
            "mooncake_metadata_server": "P2PHANDSHAKE",
            "mooncake_protocol": pool["protocol"],
            "mooncake_master_server_addr": address,
            "mooncake_rdma_devices": ",".join(pool["rdma_devices"]),
            "mooncake_global_segment_size": "0",
            "mooncake_local_buffer_size": str(_memory(connector)),
            **({"mooncake_tenant_id": tenant_id} if tenant_id else {}),
        }
        made.environment.update(_cluster(pool))
    elif backend == "hf3fs":
        config["remote_storage_plugins"] = ["hf3fs.primary"]
        extra = {
            "remote_storage_plugin.hf3fs.primary.base_path": _directory(pool, connector),
            "hf3fs_mount_point": next(tier["mount"] for tier in pool["tiers"] if tier["medium"] == "threefs"),
            "hf3fs_iov_size": 209715200,
            "hf3fs_ior_entries": 256,
            "hf3fs_io_depth": 0,
            "hf3fs_numa_id": -1,
            "hf3fs_io_thread_num": 4,
        }
    elif backend == "dax":
        tier = t.cast("dict[str, t.Any]", _devdax(pool))
        config["storage_plugins"] = ["dax"]
        extra = {
            "storage_plugin.dax.module_path": "lmcache.v1.storage_backend.plugins.dax_backend",
            "storage_plugin.dax.class_name": "DaxBackend",
            "dax.device_path": tier["devdax"],
            "dax.max_dax_size": tier["size_bytes"] / (1 << 30),
        }
    if extra:
        config["extra_config"] = extra
    # JSON is YAML; nothing on the host needs to write the latter.
    made.files["lmcache.yaml"] = _json(config)
    made.environment["LMCACHE_CONFIG_FILE"] = made.path("lmcache.yaml")
    # Keys are hashes of tokens: instances find each other's only with the same seed.
    made.environment["PYTHONHASHSEED"] = "0"


# -- what they share ------------------------------------------------------------------


def _cluster(pool: t.Mapping[str, t.Any]) -> dict[str, str]:
    """A client that looks for its master in etcd has to know under which name."""
    return {"MC_STORE_CLUSTER_ID": pool["name"]} if pool["etcd"] else {}


def _devdax(pool: t.Mapping[str, t.Any]) -> t.Mapping[str, t.Any] | None:
    return next((tier for tier in pool["tiers"] if tier.get("devdax")), None)


def _tier(pool: t.Mapping[str, t.Any]) -> t.Mapping[str, t.Any]:
    return next(tier for tier in pool["tiers"] if tier.get("path"))


def _directory(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> str:
    """The directory of the pool's first file tier; each tenant has its own below it."""
    tenant = connector["tenant"]
    return str(_tier(pool)["path"]) + (f"/{tenant}" if tenant else "")


def _capacity(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> int:
    """Bytes that the connector may fill: the tenant's quota, or the pool's file tier."""
    for tenant in pool.get("tenants", []):
        if tenant["name"] == connector["tenant"]:
            return int(tenant["quota_bytes"])
    return int(_tier(pool)["size_bytes"])


def slabs(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> list[_slab.Slab]:
    """The large files of a connector, one for each rank; none where its engine keeps a file for each page."""
    if not _slab.names(pool, connector):
        return []
    return _slab.slabs(pool, connector, _directory(pool, connector), _capacity(pool, connector))


def _file_size(pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any]) -> int:
    """Bytes of each rank's file: whole pages where the model is known."""
    for slab in slabs(pool, connector):
        return slab.file_bytes
    return _capacity(pool, connector) // len(_slab.names(pool, connector))


def url(connector: t.Mapping[str, t.Any]) -> str:
    """Where a connector's metadata service listens."""
    return f"http://{connector['metadata_address']}:{connector['metadata_port']}"


def _memory(connector: t.Mapping[str, t.Any]) -> int:
    """Bytes of host memory that one rank takes: its share of the engine's."""
    return int(connector["host_memory_bytes"]) // int(connector["tensor_parallel"])


def _lines(arguments: t.Iterable[str]) -> str:
    """Arguments as a shell reads them, one on a line."""
    return "".join(f"{shlex.quote(argument)}\n" for argument in arguments)


def _json(value: t.Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _quoted(value: str) -> str:
    """A value of an environment file, which both systemd and a shell read alike."""
    return shlex.quote(value)


def _check_program(name: str, module: str, directory: str) -> str:
    return f"""\
#!/bin/sh
# Written by agentfleet.metal: {name} must reach 3FS by its own client. Usage: check PYTHON
set -eu
"$1" -c 'import {module}' || {{
  echo "{name}: $1 cannot import {module}; the engine would take a mock that writes plain files" >&2
  exit 1
}}
case $(stat --file-system --format=%T {shlex.quote(directory)}) in
  fuseblk|fuse) ;;
  *) echo "{name}: {directory} is not on a mounted 3FS" >&2; exit 1 ;;
esac
"""


def check_share(
    option: str, pool: t.Mapping[str, t.Any], connector: t.Mapping[str, t.Any], taken: dict[str, str]
) -> None:
    """Refuse a second engine that would fill the same share: each is told all of it.

    :param taken: tenant, or the empty string for the pool's tier -> the connector that fills its share; this one is added
    """
    engine, backend, tenant = connector["engine"], connector["backend"], connector["tenant"]
    fills = (engine, backend) in _FILL or (backend == "lmcache" and pool["engine"] == "filesystem")
    if fills and tenant in taken:
        share = f"the quota of {tenant}" if tenant else f"the tier {_tier(pool)['path']}"
        raise Refused(
            f"{option}.backend",
            backend,
            f"{taken[tenant]} fills all of {share} already",
            "Give each engine a tenant with a quota, or a pool with a path of its own",
        )
    if fills:
        taken[tenant] = name_of(connector)


def map_url(connector: t.Mapping[str, t.Any]) -> str:
    """The metadata service that has a connector's map of pages; empty without one."""
    if connector["backend"] != "hf3fs" or connector["engine"] not in METADATA:
        return ""
    return url(connector).replace("//localhost:", f"//{_OWN_HOST[0]}:")


def check_map(option: str, name: str, connector: t.Mapping[str, t.Any], taken: dict[str, str]) -> None:
    """Refuse a metadata service that has another connector's pages.

    Its map knows ranks and keys only, and keys are made of tokens: a tenant would find another one's keys, and read at
    their pages what is in its own files there, or behind their end.

    :param taken: URL -> who has it; this one is added
    """
    where, fixed = map_url(connector), connector["engine"] == "vllm"
    if where in taken:
        raise Refused(
            f"{option}.backend" if fixed else f"{option}.metadata_port",
            connector["backend"] if fixed else connector["metadata_port"],
            f"{taken[where]} has the metadata service {where}, whose map does not tell one's pages from the other's",
            "vLLM asks no other port: one such connector for each host" if fixed else "Give each its own port",
        )
    if where:
        taken[where] = name
