#!/usr/bin/env python3
# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record which configuration keys the inference engines' packages read, from their wheels and without running them.

    pip download --no-deps -d wheels sglang==... vllm==... lmcache==... mooncake-transfer-engine-non-cuda==...
    tests/contract/record_connectors.py wheels/*.whl > tests/contract/connectors.json

Only names, types and choices are recorded. tests/unit/plugins/module_utils/test_connectors.py holds everything that we
render against the record, so that a newer version is taken up by recording it and reading the difference.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import typing as t
import zipfile
from pathlib import Path

CONNECTORS = "vllm/distributed/kv_transfer/kv_connector"
STORAGE = "sglang/srt/mem_cache/storage"
BACKENDS = "lmcache/v1/storage_backend"
READERS = ("get", "get_from_extra_config", "_get_int", "_get_positive_int", "_get_positive_int_extra")


class Wheel:
    """A wheel's Python files as syntax trees."""

    def __init__(self, path: str) -> None:
        self.path, self.zip = Path(path), zipfile.ZipFile(path)

    def text(self, name: str) -> str:
        return self.zip.read(name).decode()

    def nodes(self, name: str) -> t.Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text(name)))

    def python(self, prefix: str) -> list[str]:
        """The Python files of a folder."""
        return [name for name in self.zip.namelist() if name.startswith(prefix) and name.endswith(".py")]

    def fields(self, name: str, class_name: str = "") -> list[str]:
        """Annotated names of a class, or of all classes of a file."""
        return sorted(
            {
                item.target.id
                for node in self.nodes(name)
                if isinstance(node, ast.ClassDef) and class_name in ("", node.name)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
        )

    def read_keys(self, *names: str) -> list[str]:
        """Strings that are asked for: x.get("key"), and the engines' own helpers."""
        found = set()
        for name in names:
            for node in self.nodes(name):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
                    found |= {argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)}
        return sorted(key for key in found if isinstance(key, str) and re.fullmatch(r"[a-z][a-z0-9_.]*", key))

    def first_arguments(self, name: str, function: str) -> list[str]:
        """First argument of each call of a function that registers things."""
        return sorted(
            node.args[0].value
            for node in self.nodes(name)
            if isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == function
            and node.args
            and isinstance(node.args[0], ast.Constant)
        )

    def options(self, name: str) -> list[str]:
        """Options of a program that uses argparse."""
        return self.first_arguments(name, "add_argument")

    def choices(self, name: str, class_prefix: str) -> dict[str, list[str]]:
        """Field -> what ``choices=[...]`` in its annotation allows."""
        found = {}
        for node in self.nodes(name):
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "").startswith(class_prefix):
                for keyword in ast.walk(node.annotation):
                    if isinstance(keyword, ast.keyword) and keyword.arg == "choices":
                        found[node.target.id] = sorted(ast.literal_eval(keyword.value))  # type: ignore[union-attr]
        return found

    def imports(self, name: str) -> list[str]:
        """Modules that a file imports inside of ``try``."""
        return sorted(
            {
                item.module
                for node in self.nodes(name)
                if isinstance(node, ast.Try)
                for item in node.body
                if isinstance(item, ast.ImportFrom) and item.module
            }
        )


def routes(wheel: Wheel, name: str) -> list[str]:
    """What a metadata service answers."""
    return wheel.first_arguments(name, "post")


def fixed_url(wheel: Wheel, connector: str, client: str) -> str:
    """Where a metadata client asks when its maker is given no URL by any of its callers; empty if it is given one."""
    calls = [
        node
        for node in wheel.nodes(connector)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("MetadataClient")
    ]
    init = re.search(r'base_url: str = "([^"]+)"', wheel.text(client))
    return init[1] if calls and init and not any(call.args or call.keywords for call in calls) else ""


def vllm(wheel: Wheel) -> dict[str, t.Any]:
    """What vLLM's connectors read."""
    offload = "vllm/v1/kv_offload"
    tier = next(
        node
        for node in wheel.nodes(f"{offload}/tiering/fs/manager.py")
        if isinstance(node, ast.ClassDef) and node.name == "FileSystemTierManager"
    )
    init = next(item for item in tier.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    return {
        "kv_transfer_config": wheel.fields("vllm/config/kv_transfer.py", "KVTransferConfig"),
        "connectors": wheel.first_arguments(f"{CONNECTORS}/factory.py", "register_connector"),
        "specs": wheel.first_arguments(f"{offload}/factory.py", "register_spec"),
        "tiers": wheel.first_arguments(f"{offload}/tiering/factory.py", "register_tier"),
        "offloading": wheel.read_keys(
            f"{offload}/factory.py",
            f"{offload}/base.py",
            f"{offload}/cpu/spec.py",
            f"{offload}/tiering/spec.py",
            f"{CONNECTORS}/v1/offloading/config.py",
        ),
        "fs_tier": sorted({"type", *(argument.arg for argument in init.args.args)} - {"self"}),
        "policies": sorted(set(re.findall(r'"(lru|arc)"', wheel.text(f"{offload}/cpu/policies/factory.py")))),
        "hf3fs": wheel.read_keys(f"{CONNECTORS}/v1/hf3fs/hf3fs_connector.py"),
        "hf3fs_imports": wheel.imports(f"{CONNECTORS}/v1/hf3fs/hf3fs_connector.py"),
        "hf3fs_metadata": wheel.options(f"{CONNECTORS}/v1/hf3fs/hf3fs_metadata_server.py"),
        "hf3fs_routes": routes(wheel, f"{CONNECTORS}/v1/hf3fs/hf3fs_metadata_server.py"),
        "hf3fs_fixed_url": fixed_url(
            wheel,
            f"{CONNECTORS}/v1/hf3fs/hf3fs_connector.py",
            f"{CONNECTORS}/v1/hf3fs/hf3fs_metadata_server.py",
        ),
        "hf3fs_files": re.findall(r'f"(\w+_)\{self\._rank\}"', wheel.text(f"{CONNECTORS}/v1/hf3fs/hf3fs_connector.py")),
        "mooncake_store": wheel.fields("vllm/distributed/mooncake_store.py", "MooncakeStoreConfig"),
        "mooncake_transfer": wheel.read_keys(f"{CONNECTORS}/v1/mooncake/mooncake_connector.py"),
        "environment": sorted(
            set(re.findall(r"\b(MOONCAKE_\w+_PATH)\b", wheel.text("vllm/distributed/mooncake_store.py")))
        ),
    }


def sglang(wheel: Wheel) -> dict[str, t.Any]:
    """What SGLang's HiCache reads."""
    memory = "sglang/srt/arg_groups/fields/memory.py"
    store, hf3fs = f"{STORAGE}/mooncake_store/mooncake_store.py", f"{STORAGE}/hf3fs/storage_hf3fs.py"
    required = next(
        ast.literal_eval(node.value)
        for node in wheel.nodes(hf3fs)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "required_keys"
    )
    environment = set(re.findall(r"\b(SGLANG_HICACHE_\w+)\b", wheel.text("sglang/srt/environ.py")))
    for name in (hf3fs, "sglang/srt/mem_cache/hicache_storage.py", f"{STORAGE}/file/lru_file_evictor.py"):
        environment |= set(re.findall(r"\b(SGLANG_HICACHE_\w+)\b", wheel.text(name)))
    return {
        "arguments": sorted(
            {name for fields in wheel.python("sglang/srt/arg_groups/fields/") for name in wheel.fields(fields)}
        ),
        "choices": wheel.choices(memory, "hicache_"),
        "mooncake": wheel.read_keys(store),
        "hf3fs_required": sorted(required),
        "hf3fs": sorted({*required, *wheel.read_keys(hf3fs)}),
        "hf3fs_metadata": wheel.options(f"{STORAGE}/hf3fs/mini_3fs_metadata_server.py"),
        "hf3fs_routes": routes(wheel, f"{STORAGE}/hf3fs/mini_3fs_metadata_server.py"),
        "hf3fs_files": re.findall(r"file_path_prefix'\]\}(\.)\{rank_for_path\}(\.bin)", wheel.text(hf3fs)),
        "environment": sorted(environment),
    }


def lmcache(wheel: Wheel) -> dict[str, t.Any]:
    """What LMCache reads."""
    definitions = next(
        node.value
        for node in wheel.nodes("lmcache/v1/config.py")
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and "_CONFIG_DEFINITIONS" in ast.unparse(node).partition("=")[0]
        and isinstance(node.value, ast.Dict)
    )
    assert isinstance(definitions, ast.Dict)
    return {
        "config": sorted(key.value for key in definitions.keys if isinstance(key, ast.Constant)),
        "hf3fs": wheel.read_keys(f"{BACKENDS}/connector/hf3fs_adapter.py"),
        "dax": wheel.read_keys(f"{BACKENDS}/plugins/dax_backend.py"),
        "dax_classes": sorted(
            node.name
            for node in wheel.nodes(f"{BACKENDS}/plugins/dax_backend.py")
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        ),
        "cache_policies": sorted(
            set(re.findall(r'"(LRU|LFU|FIFO|MRU)"', wheel.text(f"{BACKENDS}/cache_policy/__init__.py")))
        ),
        "mooncake_prefix": re.findall(
            r'_MOONCAKE_PREFIX = "(\w+)"', wheel.text(f"{BACKENDS}/connector/mooncakestore_connector.py")
        ),
    }


def mooncake(wheel: Wheel) -> dict[str, t.Any]:
    """What the engine's setup takes as a dictionary, by its own documentation inside of the library."""
    name = next(name for name in wheel.zip.namelist() if re.search(r"mooncake/store\S*\.so$", name))
    text = wheel.zip.read(name).decode("latin-1").partition("Supported keys:")[2].partition("\0")[0]
    return {"setup": sorted(re.findall(r"^  (\w+)(?: \(required\))?: ", text, re.M))}


RECORDERS = {"vllm": vllm, "sglang": sglang, "lmcache": lmcache, "mooncake_transfer_engine_non_cuda": mooncake}


def main() -> None:
    """Record the wheels of the command line."""
    found = {}
    for path in sys.argv[1:]:
        wheel = Wheel(path)
        package, version = wheel.path.name.split("-")[:2]
        found[package] = {
            "version": version,
            "wheel": wheel.path.name,
            "sha256": hashlib.sha256(wheel.path.read_bytes()).hexdigest(),
            "reads": RECORDERS[package](wheel),
        }
    json.dump(found, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
