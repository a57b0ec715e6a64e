# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a pool on its host: tenants' secret names, connectors, and the units of 3FS metadata services."""

from __future__ import annotations

import json
import os
import typing as t
from dataclasses import dataclass

from ansible_collections.agentfleet.metal.plugins.module_utils import _connectors
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._mooncake import POOLS, USER
from ansible_collections.agentfleet.metal.plugins.module_utils._systemd import UNITS


@dataclass(frozen=True)
class File:
    """A file as it should be."""

    text: str
    mode: int = 0o644
    secret: bool = False

    def shown(self) -> str:
        """What a plan may show of it."""
        return "(hidden: it is as secret as the tenant's token)" if self.secret else self.text


def tenants_path(name: str) -> str:
    """Where a pool's tenants' secret names are, which the engine's program reads."""
    return f"{POOLS}/{name}.tenants"


def metadata_units(pool: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Unit -> text, of the metadata services that this host runs for the pool's 3FS connectors, one for each of them."""
    found = {}
    for connector in pool.get("connectors", []):
        if not connector["metadata_run"]:
            continue
        engine, tenant = connector["engine"], [connector["tenant"]] if connector["tenant"] else []
        state = "/".join(["agentfleet-kv", pool["name"], *tenant])
        program = [
            connector["python"],
            "-m",
            _connectors.METADATA[engine],
            f"--host={connector['metadata_address']}",
            f"--port={connector['metadata_port']}",
        ]
        if engine == "sglang":  # vLLM's forgets all pages when it ends
            # A map that was kept stays as it is for other pages, too, and would lead behind the end of the file.
            sizes = [f"-{slab.pages}x{slab.page_bytes}" for slab in _connectors.slabs(pool, connector)[:1]]
            program += [f"--persistence-path=/var/lib/{state}/pages{''.join(sizes)}", "--save-interval=60"]
        found[f"agentfleet-kv-metadata-{'-'.join([pool['name'], engine, *tenant])}.service"] = f"""\
# Written by agentfleet.metal.
[Unit]
Description=Page indices of KV-cache pool {" for ".join([pool["name"], *tenant, engine])}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={" ".join(program)}
User={USER}
StateDirectory={state}
Restart=always
RestartSec=3
NoNewPrivileges=yes
ProtectSystem=full
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""
    return found


def expected(
    pool: t.Mapping[str, t.Any] | None, ids: t.Mapping[str, str], devdax: t.Mapping[str, str]
) -> dict[str, File]:
    """Path -> file, of all that belongs to a pool besides its declaration.

    :param ids: tenant -> its secret name in the engine
    :param devdax: tier -> path of its dax device on this host
    """
    if pool is None:
        return {}
    found = {f"{UNITS}/{unit}": File(text) for unit, text in metadata_units(pool).items()}
    if pool["engine"] == "mooncake" and pool["tenants"]:
        found[tenants_path(pool["name"])] = File(json.dumps(ids, sort_keys=True) + "\n", 0o600, True)
    tiers = [{**tier, "devdax": devdax.get(tier["name"], "")} for tier in pool["tiers"]]
    for connector in pool["connectors"]:
        tenant_id = ids.get(connector["tenant"], "") if pool["engine"] == "mooncake" else ""
        made = _connectors.render({**pool, "tiers": tiers}, connector, tenant_id)
        for name, text in made.texts().items():
            mode = 0o755 if name == "check" else 0o600 if made.secret else 0o644
            found[made.path(name)] = File(text, mode, made.secret)
    return found


def notes(pool: t.Mapping[str, t.Any]) -> list[str]:
    """What is to be known of a pool's connectors, beside their files."""
    made = [_connectors.render(pool, connector) for connector in pool["connectors"]]
    return [f"pool {pool['name']}, connector {one.name}: {note}" for one in made for note in one.notes]


def on_host(host: Host, name: str) -> dict[str, tuple[str, int]]:
    """Path -> text and mode, of what a pool of this name has there."""
    paths = [
        *host.glob(tenants_path(name)),
        *host.glob(f"{UNITS}/agentfleet-kv-metadata-{name}-*.service"),
        *host.glob(f"{_connectors.DIRECTORY}/{name}/*/*"),
    ]
    found = {}
    for path in paths:
        with open(host.path(path), encoding="utf-8") as file:
            found[path] = (file.read(), os.stat(host.path(path)).st_mode & 0o777)
    return found
