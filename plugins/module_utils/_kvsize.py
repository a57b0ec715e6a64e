# Copyright: agentfleet.metal contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How large a model's KV cache is: per token, per GPU, per pool, and per second.

A model is what its config.json says. Attention caches two rows (K and V) for each KV head and layer; multi-head
latent attention (MLA) one latent row for each layer; layers with a sliding window stop growing at the window;
recurrent layers hold a state of fixed size. Everything is an exact number of bytes.
"""

from __future__ import annotations

import json
import math
import os
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.agentfleet.metal.plugins.module_utils._kvpresets import CLASSES, MODELS
from ansible_collections.agentfleet.metal.plugins.module_utils._plan import Refused

# Bits of one element. A scale, if groups have one, comes on top.
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "fp4": 4}
SCALES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# The one cache format that mixes types within a row: 512 fp8 values of the latent, 4 fp32 scales, 64 bf16 values of RoPE.
FP8_DS_MLA = "fp8_ds_mla"
DTYPES = (*BITS, FP8_DS_MLA)
# What an engine lets be filled before it evicts or refuses.
USABLE = {"mooncake": 0.95, "threefs": 0.96, "filesystem": 1.0}

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads")
_FULL, _RECURRENT = ("full_attention", "attention"), ("linear_attention", "mamba", "mamba2", "recurrent")
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Classes whose layers all have the window that config.json tells, and that know no other kind of layer.
_ALL_SLIDE = ("ministral", "mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "starcoder2")
# Caches that are not a sum of rows for each token; sized wrongly in silence they would look right.
_UNKNOWN = ("compress_ratios", "cross_attention_layers", "kv_compression_ratio")


@dataclass(frozen=True)
class Dtype:
    """How an element is stored: its bits, and the scale (and zero point) of each group of elements."""

    name: str = "bf16"
    group_size: int = 0
    scale: str = "fp16"
    zero_point: bool = False

    def row_bytes(self, elements: int) -> int:
        """Bytes of one row; groups end with the row, since a row is what is written at a time."""
        data = -(-elements * BITS[self.name] // 8)
        groups = -(-elements // self.group_size) if self.group_size else 0
        return data + groups * SCALES[self.scale] * (2 if self.zero_point else 1)

    def text(self) -> str:
        """The format in words."""
        if not self.group_size:
            return self.name
        per = f"{self.scale} scale{' and zero point' if self.zero_point else ''}"
        return f"{self.name}, one {per} for each {self.group_size} elements"


@dataclass(frozen=True)
class Group:
    """Layers that cache alike.

    :param heads: KV heads; 0 of a latent cache, which is one row for all heads
    :param dims: elements of the rows of one head: (K, V), or (latent + RoPE[, index])
    :param window: tokens that are kept at most; 0 keeps all
    """

    layers: int
    heads: int
    dims: tuple[int, ...]
    window: int = 0

    def layer_bytes(self, dtype: Dtype) -> int:
        """Bytes of one token in one layer."""
        if not self.heads and dtype.name == FP8_DS_MLA:
            return 512 + 4 * SCALES["fp32"] + 64 * 2 + sum(132 for _index in self.dims[1:])
        return max(1, self.heads) * sum(dtype.row_bytes(dim) for dim in self.dims)


@dataclass(frozen=True)
class Model:
    """What decides the size of a model's KV cache."""

    name: str
    source: str
    groups: tuple[Group, ...]
    query_heads: int = 0
    recurrent_layers: int = 0

    @property
    def latent(self) -> bool:
        """Whether the cache is a latent one, of which every GPU needs all."""
        return any(not group.heads for group in self.groups)

    def attention(self) -> str:
        """The kind of attention in its usual short form."""
        if self.latent:
            return "MLA with DSA index" if any(len(group.dims) > 1 for group in self.groups) else "MLA"
        heads = {group.heads for group in self.groups}
        kind = "MQA" if heads == {1} else "MHA" if heads == {self.query_heads} else "GQA"
        return f"hybrid {kind}" if self.recurrent_layers or any(group.window for group in self.groups) else kind


# -- what a config.json says -------------------------------------------------------


def load(option: str, model: t.Any, read: t.Callable[[str], str]) -> Model:
    """The model of a preset's name, of a path of its config.json, or of that file's content.

    :param option: the option's name for the error
    :param read: reads a file's text; the empty string when there is none
    """
    if hasattr(model, "items"):
        return parse(option, model, str(model.get("_name_or_path") or model.get("model_type") or "model"))
    name = str(model)
    if name.startswith("/"):
        path = name if name.endswith(".json") else os.path.join(name, "config.json")
        text = read(path)
        if not text:
            raise Refused(option, model, f"{path} cannot be read", "Name the model's directory or its config.json")
        try:
            config = json.loads(text)
        except ValueError as error:
            raise Refused(option, model, f"{path} is not JSON: {error}", "Name the model's own config.json") from error
        if not isinstance(config, dict):
            raise Refused(option, model, f"{path} is not a JSON object", "Name the model's own config.json")
        return parse(option, config, os.path.basename(os.path.dirname(path)) or path, path)
    known = {preset.lower(): preset for preset in MODELS}
    preset = known.get(name.rpartition("/")[2].lower())
    if preset is None:
        raise Refused(
            option,
            model,
            "no such preset",
            f"Give the path of the model's config.json, bytes_per_token, or one of: {', '.join(MODELS)}",
        )
    return parse(option, MODELS[preset]["config"], preset, MODELS[preset]["source"])


def parse(option: str, config: t.Mapping[str, t.Any], name: str, source: str = "its config.json") -> Model:
    """The model of a config.json.

    :raises Refused: naming each key that is missing, or that this code does not know how to size
    """
    inner: t.Any = config.get("text_config")
    if hasattr(inner, "items") and not any(key in config for key in _LAYERS):
        return parse(f"{option}.text_config", {"model_type": config.get("model_type"), **inner}, name, source)
    kind = str(config.get("model_type"))
    left_out = {
        key: value
        for key, value in (CLASSES.get(kind) or CLASSES.get(f"{kind}_text") or {}).items()
        if key not in config
    }
    if left_out:
        config = {**left_out, **config}
        source += f", and of the class of {kind}: {', '.join(f'{key} {value}' for key, value in left_out.items())}"
    strange = [key for key in _UNKNOWN if config.get(key)]
    if strange:
        raise Refused(
            option,
            name,
            f"its config.json has {', '.join(strange)}, a cache that is not the same for each token",
            "Measure it and give bytes_per_token",
        )
    latent = config.get("kv_lora_rank") is not None
    heads = _first(config, _HEADS)
    hidden = _first(config, _HIDDEN)
    missing = [] if _first(config, _LAYERS) else [_or(_LAYERS)]
    if latent:
        missing += [] if config.get("qk_rope_head_dim") is not None else ["qk_rope_head_dim"]
    else:
        missing += [] if heads else [_or(_HEADS)]
        missing += [] if config.get("head_dim") or hidden else [f"head_dim (or {_or(_HIDDEN)})"]
    if missing:
        raise Refused(
            option,
            name,
            f"its config.json lacks {', '.join(missing)}",
            "Give the model's complete config.json, or bytes_per_token",
        )
    layers = _number(option, name, config, _LAYERS)
    kinds = _kinds(option, name, config, layers)
    if latent:
        dims = [_number(option, name, config, ("kv_lora_rank",)) + _number(option, name, config, ("qk_rope_head_dim",))]
        if index := _optional(option, name, config, "index_head_dim"):
            dims.append(index)
        found = [Group(1, 0, tuple(dims), window) for window in kinds if window is not None]
    else:
        found = _attention(option, name, config, kinds)
    merged: dict[Group, int] = {}
    for group in found:
        merged[group] = merged.get(group, 0) + 1
    if not merged:
        raise Refused(option, name, "it has no attention layer and so no KV cache", "Leave the model without a pool")
    return Model(
        name,
        source,
        tuple(replace(group, layers=count) for group, count in merged.items()),
        heads or 0,
        sum(window is None for window in kinds),
    )


def _attention(option: str, name: str, config: t.Mapping[str, t.Any], kinds: t.Sequence[int | None]) -> list[Group]:
    """One group for each attention layer with its own cache."""
    heads = _number(option, name, config, _HEADS)
    head_dim = _optional(option, name, config, "head_dim")
    if not head_dim:
        hidden = _number(option, name, config, _HIDDEN)
        if hidden % heads:
            problem = f"it lacks head_dim, and {hidden} elements are no multiple of {heads} heads"
            raise Refused(option, name, problem, "Give the complete config.json, or bytes_per_token")
        head_dim = hidden // heads
    dims = (head_dim, _optional(option, name, config, "v_head_dim") or head_dim)
    per_layer = _per_layer(option, name, config, len(kinds), heads)
    shared = _optional(option, name, config, "num_kv_shared_layers")  # the last ones read an earlier layer's cache
    global_dim = _optional(option, name, config, "global_head_dim")
    global_heads = _optional(option, name, config, "num_global_key_value_heads")
    found = []
    for index, window in enumerate(kinds):
        if window is None or not per_layer[index] or index >= len(kinds) - shared:
            continue
        own = (global_dim, global_dim) if global_dim and not window else dims
        number = global_heads if global_heads and not window else per_layer[index]
        found.append(Group(1, number, own, window))
    return found


def _per_layer(option: str, name: str, config: t.Mapping[str, t.Any], layers: int, heads: int) -> list[int]:
    """The KV heads of each layer; 0 where it caches nothing."""
    kv_heads = _first(config, _KV_HEADS)
    blocks = _list(option, name, config, "block_configs")  # layers whose heads a search has thinned out
    if blocks:
        found = []
        for index, block in enumerate(blocks):
            attention = (block.get("attention") or {}) if hasattr(block, "items") else block
            if not hasattr(attention, "items"):
                raise Refused(option, name, f"block_configs[{index}] is {block!r}", "It must tell its attention")
            share = _optional(option, name, attention, "n_heads_in_group")
            found.append(heads // share if share else 0)
    elif isinstance(kv_heads, list):
        found = [_optional(option, name, {_KV_HEADS[0]: number}, _KV_HEADS[0]) for number in kv_heads]
    elif kv_heads:
        found = [_number(option, name, config, _KV_HEADS)] * layers
    else:
        found = [1 if config.get("multi_query") else heads] * layers
    if len(found) != layers:
        problem = f"{'block_configs' if blocks else _or(_KV_HEADS)} has {len(found)} entries for {layers} layers"
        raise Refused(option, name, problem, "Correct the file")
    return found


def _kinds(option: str, name: str, config: t.Mapping[str, t.Any], layers: int) -> list[int | None]:
    """For each layer its window in tokens, 0 without one, and None where it keeps no cache that grows."""
    types = _layer_types(option, name, config, layers)
    if len(types) != layers:
        raise Refused(option, name, f"layer_types has {len(types)} entries for {layers} layers", "Correct the file")
    kinds: list[int | None] = []
    for kind in map(str, types):
        if kind in _FULL:
            kinds.append(0)
        elif kind in _RECURRENT:
            kinds.append(None)
        elif kind in _WINDOWED and config.get(_WINDOWED[kind]):
            kinds.append(_number(option, name, config, (_WINDOWED[kind],)))
        elif kind in _WINDOWED:
            raise Refused(option, name, f"its config.json lacks {_WINDOWED[kind]} of {kind}", "Give the complete file")
        else:
            known = ", ".join([*_FULL, *_WINDOWED, *_RECURRENT])
            raise Refused(option, name, f"layer type {kind!r} is not known here", f"Known: {known}")
    return kinds


def _layer_types(option: str, name: str, config: t.Mapping[str, t.Any], layers: int) -> list[t.Any]:
    """The kind of each layer by its name, as written or as the model's class makes it of a pattern."""
    if config.get("hybrid_override_pattern"):
        return ["full_attention" if mark == "*" else "mamba" for mark in str(config["hybrid_override_pattern"])]
    for key in ("layer_types", "layers_block_type"):
        if types := _list(option, name, config, key):
            return types
    if interval := _optional(option, name, config, "full_attention_interval"):
        return _every(layers, interval, "linear_attention")
    if period := _optional(option, name, config, "attn_layer_period"):
        offset = _optional(option, name, config, "attn_layer_offset")
        return ["full_attention" if index % period == offset else "mamba" for index in range(layers)]
    window = _optional(option, name, config, "sliding_window") if config.get("use_sliding_window", True) else 0
    chunk = _optional(option, name, config, "attention_chunk_size")
    if not window and not chunk:
        return ["full_attention"] * layers
    if window:
        if interval := _optional(option, name, config, "sliding_window_pattern"):
            return _every(layers, interval, "sliding_attention")
        if "use_sliding_window" in config and config.get("max_window_layers") is not None:  # Qwen's: those after them
            first = _optional(option, name, config, "max_window_layers")
            return ["full_attention" if index < first else "sliding_attention" for index in range(layers)]
        if config.get("model_type") in _ALL_SLIDE:
            return ["sliding_attention"] * layers
    elif flags := _list(option, name, config, "no_rope_layers"):
        return ["chunked_attention" if flag else "full_attention" for flag in flags]
    elif interval := _optional(option, name, config, "no_rope_layer_interval"):
        return _every(layers, interval, "chunked_attention")
    raise Refused(
        option,
        name,
        f"its config.json has a window of {window or chunk} tokens, and does not tell which layers have it",
        "Add layer_types as the model's class makes them, or give bytes_per_token",
    )


def _every(layers: int, interval: int, others: str) -> list[str]:
    return ["full_attention" if (index + 1) % interval == 0 else others for index in range(layers)]


def _first(config: t.Mapping[str, t.Any], keys: t.Iterable[str]) -> t.Any:
    return next((config[key] for key in keys if config.get(key)), None)


def _or(keys: t.Iterable[str]) -> str:
    return " or ".join(keys)


def positive(option: str, value: t.Any) -> int:
    """A positive whole number, also one that a template has made a text of."""
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise Refused(option, value, "not a positive whole number", "Write a number such as 327680")
    return number


def _number(option: str, name: str, config: t.Mapping[str, t.Any], keys: t.Iterable[str]) -> int:
    value = _first(config, keys)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(option, name, f"{_or(keys)} is {value!r}", "It must be a positive whole number")
    return value


def _optional(option: str, name: str, config: t.Mapping[str, t.Any], key: str) -> int:
    """A number that may be left out: 0 then."""
    return _number(option, name, config, (key,)) if config.get(key) else 0


def _list(option: str, name: str, config: t.Mapping[str, t.Any], key: str) -> list[t.Any]:
    value = config.get(key) or []
    if not isinstance(value, list):
        raise Refused(option, name, f"{key} is {value!r}", "It must be a list with an entry for each layer")
    return value


# -- sizes ------------------------------------------------------------------------


def dtype(
    option: str, name: str, group_size: int | None = None, scale: str = "fp16", zero_point: bool = False
) -> Dtype:
    """A checked element format. 4-bit formats have a scale for each 32 elements unless told otherwise."""
    if name not in DTYPES:
        raise Refused(f"{option}", name, "no such format", f"Formats: {', '.join(DTYPES)}")
    if scale not in SCALES:
        raise Refused("scale_dtype", scale, "no such format of a scale", f"Formats: {', '.join(SCALES)}")
    if group_size is not None and group_size < 0:
        raise Refused("group_size", group_size, "not a number of elements", "Use 0 for none, or such as 32, 64, 128")
    if group_size is None:
        group_size = 32 if BITS.get(name) == 4 else 0
    if group_size and BITS.get(name, 16) >= 16:
        raise Refused("group_size", group_size, f"{name} needs no scales", "Leave group_size out")
    return Dtype(name, group_size, scale, zero_point)


def size(model: Model, form: Dtype, tensor_parallel: int = 1) -> dict[str, t.Any]:
    """Bytes of a token: in all, on each GPU, and as engines store them in a pool.

    Of a latent cache every GPU holds all and one of them stores it; otherwise each GPU stores its own heads, so that
    heads which tensor parallelism has to replicate are stored as often.
    """
    if tensor_parallel < 1:
        raise Refused("tensor_parallel", tensor_parallel, "not a number of GPUs", "Use 1 or more")
    if form.name == FP8_DS_MLA and (not model.latent or any(group.dims[0] != 576 for group in model.groups)):
        raise Refused("dtype", form.name, f"{model.name} has no latent of 512 + 64", "Use fp8")
    check_heads("tensor_parallel", tensor_parallel, heads(model, form))
    total = sum(group.layers * group.layer_bytes(form) for group in model.groups)
    gpu = gpu_bytes(heads(model, form), tensor_parallel)
    lines = [
        f"{model.name}: {model.attention()}, dtype {form.text()} (source: {model.source})",
    ]
    for group in model.groups:
        kept = f", the last {group.window:,} tokens of a sequence" if group.window else ""
        lines.append(
            f"{group.layers} layers x {_row(group, form)} = {group.layers * group.layer_bytes(form):,} B{kept}"
        )
    if model.recurrent_layers:
        lines.append(f"{model.recurrent_layers} recurrent layers: a state of fixed size, nothing for a token")
    lines.append(
        f"one token: {total:,} B ({total / 1024:,.10g} KiB); 128k tokens: {_gib(sequence(model, form, 131072))}"
    )
    if tensor_parallel > 1:
        lines.append(f"on each of {tensor_parallel} GPUs: {gpu:,} B, {_share(model, tensor_parallel)}")
    stored = total if model.latent else gpu * tensor_parallel
    return {
        "model": model.name,
        "attention": model.attention(),
        "source": model.source,
        "dtype": form.name,
        "bytes_per_token": total,
        "bytes_per_token_per_gpu": gpu,
        "stored_bytes_per_token": stored,
        "growing_bytes_per_token": sum(g.layers * g.layer_bytes(form) for g in model.groups if not g.window),
        "explanation": lines,
    }


def heads(model: Model, form: Dtype) -> list[list[int]]:
    """For each group its KV heads and a token's bytes in one of them, in all its layers; 0 heads of a latent."""
    return [[g.heads, g.layers * g.layer_bytes(form) // max(1, g.heads)] for g in model.groups]


def check_heads(option: str, tensor_parallel: int, heads_: t.Iterable[t.Sequence[int]]) -> None:
    """Refuse GPUs that no engine could share these heads among."""
    for number, _bytes in heads_:
        if number and max(number, tensor_parallel) % min(number, tensor_parallel):
            raise Refused(
                option,
                tensor_parallel,
                f"{number} KV heads cannot be shared evenly",
                f"Use a divisor or a multiple of {number}",
            )


def gpu_bytes(heads_: t.Iterable[t.Sequence[int]], tensor_parallel: int) -> int:
    """Bytes of a token on one GPU, which has at least one KV head of each group, and all of a latent."""
    return sum(max(1, number // tensor_parallel) * size_ for number, size_ in heads_)


def sequence(model: Model, form: Dtype, tokens: int) -> int:
    """Bytes of one sequence, windows considered."""
    return sum(g.layers * g.layer_bytes(form) * (min(tokens, g.window) if g.window else tokens) for g in model.groups)


def _row(group: Group, form: Dtype) -> str:
    if not group.heads:
        parts = " + ".join(str(dim) for dim in group.dims)
        return f"one latent row of {parts} elements ({group.layer_bytes(form):,} B)"
    if len(set(group.dims)) == 1:
        return f"2 (K and V) x {group.heads} KV heads x {group.dims[0]} elements ({group.layer_bytes(form):,} B)"
    return f"{group.heads} KV heads x (K {group.dims[0]} + V {group.dims[1]}) elements ({group.layer_bytes(form):,} B)"


def _share(model: Model, tensor_parallel: int) -> str:
    if model.latent:
        return "since every GPU needs the whole latent; one of them stores it"
    heads = sorted({group.heads for group in model.groups})
    if all(number >= tensor_parallel for number in heads):
        return f"{'/'.join(str(number // tensor_parallel) for number in heads)} of {'/'.join(map(str, heads))} KV heads"
    return f"since {'/'.join(map(str, heads))} KV heads are fewer than the GPUs: heads are replicated, and stored so"


def _gib(number: float) -> str:
    return f"{number / (1 << 30):,.4g} GiB"


# -- pools ------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What a pool has to carry.

    :param users: sequences that are kept at the same time
    :param tokens: tokens of one of them
    :param shared_tokens: of these, the prefix that all users have in common (system prompt, tools) and is stored once
    :param page_tokens: tokens of one stored block
    :param replicas: copies of each block
    :param usable: share of the capacity that is filled before blocks are evicted
    :param prefix_tokens: tokens that one request reads back; the whole sequence when 0
    :param requests: requests that read at the same time
    :param ttft_seconds: time to first token that reading may take; 0 asks for no bandwidth
    """

    users: int = 1
    tokens: int = 131072
    shared_tokens: int = 0
    page_tokens: int = 64
    replicas: int = 1
    usable: float = 0.95
    prefix_tokens: int = 0
    requests: int = 1
    ttft_seconds: float = 0.0

    def check(self) -> None:
        """Refuse what makes no sense."""
        for name in ("users", "tokens", "page_tokens", "replicas", "requests"):
            if getattr(self, name) < 1:
                raise Refused(name, getattr(self, name), "not a positive number", "Use 1 or more")
        if not 0 <= self.shared_tokens <= self.tokens:
            raise Refused("shared_tokens", self.shared_tokens, f"more than the {self.tokens} tokens", "Use fewer")
        if not 0 <= self.prefix_tokens <= self.tokens:
            raise Refused("prefix_tokens", self.prefix_tokens, f"more than the {self.tokens} tokens", "Use fewer")
        if not 0 < self.usable <= 1:
            raise Refused("usable", self.usable, "not a share", "Use more than 0 and at most 1, such as 0.95")
        if self.ttft_seconds < 0:
            raise Refused("ttft_seconds", self.ttft_seconds, "a time in the past", "Use a positive number of seconds")


def pool(stored_bytes_per_token: int, load: Load, capacity: int = 0) -> dict[str, t.Any]:
    """The capacity that a load needs, what a given capacity holds of it, and the bandwidth for its time to first token.

    Blocks of layers with a window are stored as the engines store them: in full, since any of them may be the last.
    """
    load.check()
    page = stored_bytes_per_token * load.page_tokens
    own = -(-(load.tokens - load.shared_tokens) // load.page_tokens)
    shared = -(-load.shared_tokens // load.page_tokens)
    pages = shared + load.users * own
    data = pages * page
    raw = data * load.replicas
    need = math.ceil(raw / load.usable)
    lines = [
        f"one block: {load.page_tokens} tokens x {stored_bytes_per_token:,} B = {page:,} B",
        f"blocks: {shared:,} shared by all + {load.users:,} users x {own:,} own = {pages:,}",
        f"data: {pages:,} x {page:,} B = {_gib(data)}; without sharing it would be {_gib((shared + own) * load.users * page)}",
        f"capacity: {_gib(data)} x {load.replicas} replicas / {load.usable:g} usable = {_gib(need)}",
    ]
    found: dict[str, t.Any] = {
        "page_bytes": page,
        "pages": pages,
        "data_bytes": data,
        "needed_bytes": need,
    }
    if capacity:
        held = int(capacity * load.usable) // load.replicas // page
        users = max(0, held - shared) // own if own else load.users
        found.update(
            capacity_bytes=capacity,
            capacity_pages=held,
            capacity_tokens=held * load.page_tokens,
            capacity_users=users,
            fits=held >= pages,
        )
        lines.append(
            f"a capacity of {_gib(capacity)} holds {held:,} blocks = {held * load.page_tokens:,} tokens = {users:,} users"
            f" ({'enough' if held >= pages else f'short of {_gib(need - capacity)}'})"
        )
    if load.ttft_seconds:
        prefix = load.prefix_tokens or load.tokens
        read = -(-prefix // load.page_tokens) * page
        rate = int(read * load.requests / load.ttft_seconds)
        found.update(read_bytes=read, needed_bytes_per_second=rate)
        lines.append(
            f"bandwidth: {load.requests} x {prefix:,} tokens ({_gib(read)} each) in {load.ttft_seconds:g} s"
            f" = {rate / 1e9:,.4g} GB/s"
        )
    found["explanation"] = lines
    return found
