# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Planning of KV-cache pools on the controller: sizes, capacities and connectors, each explained line by line."""

from __future__ import annotations

import functools

from ansible.errors import AnsibleFilterError

from ansible_collections.agentfleet.metal.plugins.module_utils import _connectors, _kvsize, _pooldecl
from ansible_collections.agentfleet.metal.plugins.module_utils._host import Host
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused
from ansible_collections.agentfleet.metal.plugins.module_utils._units import parse_size


def refusing(function):
    """Let a refusal fail the task with its text."""

    @functools.wraps(function)
    def filter_(*arguments, **options):
        try:
            return function(*arguments, **options)
        except Refused as refusal:
            raise AnsibleFilterError(f"{function.__name__}: {refusal}") from refusal

    return filter_


@refusing
def kv_size(model, dtype="bf16", group_size=None, scale_dtype="fp16", zero_point=False, tensor_parallel=1):
    """Bytes of one token of a model, with the reckoning."""
    form = _kvsize.dtype("dtype", dtype, group_size, scale_dtype, zero_point)
    return _kvsize.size(_kvsize.load("model", model, Host().read), form, int(tensor_parallel))


def kv_bytes_per_token(model, **options):
    """Bytes of one token of a model, as a number."""
    return kv_size(model, **options)["bytes_per_token"]


@refusing
def kv_pool_plan(
    model,
    capacity=None,
    engine="mooncake",
    bytes_per_token=None,
    dtype="bf16",
    group_size=None,
    scale_dtype="fp16",
    zero_point=False,
    tensor_parallel=1,
    **load,
):
    """The capacity and bandwidth that a load needs, and what a capacity holds of it."""
    if engine not in _kvsize.USABLE:
        raise Refused("engine", engine, "no such engine", f"Engines: {', '.join(_kvsize.USABLE)}")
    unknown = sorted(set(load) - set(_kvsize.Load.__dataclass_fields__))
    if unknown:
        known = ", ".join(_kvsize.Load.__dataclass_fields__)
        raise Refused(unknown[0], load[unknown[0]], "no such option", f"A load has {known}")
    if bytes_per_token is None:
        sizes = kv_size(model, dtype, group_size, scale_dtype, zero_point, tensor_parallel)
    else:
        stored = _kvsize.positive("bytes_per_token", bytes_per_token)
        sizes = {"stored_bytes_per_token": stored, "explanation": [f"one token: {stored:,} B, as given"]}
    wanted = _kvsize.Load(**{"usable": _kvsize.USABLE[engine], **load})
    given = capacity if isinstance(capacity, (list, tuple)) else [] if capacity is None else [capacity]
    plan = _kvsize.pool(sizes["stored_bytes_per_token"], wanted, sum(parse_size("capacity", size) for size in given))
    return {**sizes, **plan, "explanation": sizes["explanation"] + plan["explanation"]}


@refusing
def kv_connectors(pool, host_memory="64GiB"):
    """Every connector that a pool can serve, as it would be written to its host. Tenants' tokens are not needed."""
    open_pool = {**pool, "connectors": [], "tenants": []}
    declaration = _pooldecl.declare(
        "pool", _pooldecl.checked_name("pool.name", pool.get("name"), ()), open_pool, Host().read
    )
    memory = parse_size("host_memory", host_memory)
    found = []
    for connector in _connectors.examples(declaration, memory, declaration["tensor_parallel"]):
        made = _connectors.render(declaration, connector)
        found.append(
            {
                "name": made.name,
                "directory": made.directory,
                "files": made.texts(),
                "environment": made.environment,
                "arguments": made.arguments,
                "notes": made.notes,
            }
        )
    return found


def kv_turn(pools):
    """When a host has its turn, for the masters of its pools."""
    return _pooldecl.turn(pools)


class FilterModule:
    """Filters of this file."""

    def filters(self):
        """Name to function."""
        return {
            "kv_size": kv_size,
            "kv_bytes_per_token": kv_bytes_per_token,
            "kv_pool_plan": kv_pool_plan,
            "kv_connectors": kv_connectors,
            "kv_turn": kv_turn,
        }
