# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files that belong to a pool: which, with which mode, and what a plan may show of them."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.agentfleet.metal.plugins.module_utils import _pooldecl, _poolfiles

THREEFS = {
    "name": "t",
    "engine": "threefs",
    "model": "DeepSeek-V3",
    "tiers": [{"medium": "threefs", "size": "1TiB", "path": "/3fs/s/kv", "mount_point": "/3fs/s"}],
}


def declare(**options: t.Any) -> dict[str, t.Any]:
    return _pooldecl.declare("pools[0]", options["name"], options, lambda path: "")


@pytest.mark.parametrize(
    ("engine", "module", "kept"),
    [("sglang", "mini_3fs_metadata_server", True), ("vllm", "hf3fs_metadata_server", False)],
)
def test_a_metadata_service_is_the_engines_own_program(engine: str, module: str, kept: bool) -> None:
    connector = {"engine": engine, "backend": "hf3fs", "python": "/opt/e/bin/python", "metadata_run": True}
    units = _poolfiles.metadata_units(declare(**THREEFS, connectors=[connector]))
    (unit, text), *_none = units.items()
    assert unit == f"agentfleet-kv-metadata-t-{engine}.service"
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert start.startswith("ExecStart=/opt/e/bin/python -m ") and f".{module} --host=127.0.0.1 --port=1800" in start
    assert ("--persistence-path=/var/lib/agentfleet-kv/t/pages" in start) is kept
    assert "User=agentfleet-kv" in text and "StateDirectory=agentfleet-kv/t" in text


def test_each_tenant_has_a_map_of_its_own() -> None:
    connector = {"engine": "sglang", "backend": "hf3fs", "python": "/opt/e/bin/python", "metadata_run": True}
    tenants = [{"name": name, "quota": "1GiB"} for name in ("red", "blue", "green")]
    connectors = [
        {**connector, "tenant": "red"},
        {**connector, "tenant": "blue", "metadata_port": 18002},
        {"engine": "vllm", "backend": "hf3fs", "tenant": "green"},
    ]
    units = _poolfiles.metadata_units(declare(**THREEFS, tenants=tenants, connectors=connectors))
    assert list(units) == [f"agentfleet-kv-metadata-t-sglang-{name}.service" for name in ("red", "blue")]
    for name, port in (("red", 18001), ("blue", 18002)):
        text = units[f"agentfleet-kv-metadata-t-sglang-{name}.service"]
        assert f"--port={port} --persistence-path=/var/lib/agentfleet-kv/t/{name}/pages-" in text
        assert f"StateDirectory=agentfleet-kv/t/{name}\n" in text


def test_a_service_that_another_host_runs_has_no_unit() -> None:
    assert _poolfiles.metadata_units(declare(**THREEFS, connectors=[{"engine": "sglang", "backend": "hf3fs"}])) == {}


def test_modes_and_secrets() -> None:
    pool = declare(
        name="m",
        tiers=[{"medium": "dram", "size": "4MiB"}],
        tenants=[{"name": "red", "quota": "1MiB"}],
        connectors=[
            {"engine": "vllm", "backend": "mooncake", "tenant": "red"},
            {"engine": "lmcache", "backend": "cpu"},
        ],
    )
    files = _poolfiles.expected(pool, {"red": "red-secret"}, {})
    modes = {path.rpartition("/etc/agentfleet/")[2]: (file.mode, file.secret) for path, file in files.items()}
    assert modes == {
        "pools/m.tenants": (0o600, True),
        "connectors/m/vllm-mooncake-red/mooncake.json": (0o600, True),
        "connectors/m/vllm-mooncake-red/environment": (0o600, True),
        "connectors/m/vllm-mooncake-red/arguments": (0o600, True),
        "connectors/m/lmcache-cpu/lmcache.yaml": (0o644, False),
        "connectors/m/lmcache-cpu/environment": (0o644, False),
    }
    assert not [file for file in files.values() if file.secret and "red-secret" in file.shown()]
    assert _poolfiles.expected(None, {}, {}) == {}


def test_the_check_of_a_3fs_connector_can_be_run() -> None:
    files = _poolfiles.expected(declare(**THREEFS, connectors=[{"engine": "vllm", "backend": "hf3fs"}]), {}, {})
    assert files["/etc/agentfleet/connectors/t/vllm-hf3fs/check"].mode == 0o755


def test_what_is_on_the_host_is_found_with_its_mode(fake_host: t.Any) -> None:
    fake_host.files(
        {
            "/etc/agentfleet/connectors/m/vllm-mooncake/arguments": "--a\n",
            "/etc/agentfleet/connectors/other/x/y": "of another pool",
            "/etc/systemd/system/agentfleet-kv-metadata-m-sglang.service": "[Unit]\n",
        }
    )
    fake_host.write("/etc/agentfleet/pools/m.tenants", "{}\n", 0o600)
    assert _poolfiles.on_host(fake_host, "m") == {
        "/etc/agentfleet/pools/m.tenants": ("{}\n", 0o600),
        "/etc/systemd/system/agentfleet-kv-metadata-m-sglang.service": ("[Unit]\n", 0o644),
        "/etc/agentfleet/connectors/m/vllm-mooncake/arguments": ("--a\n", 0o644),
    }
