"""Tiny configurations of any class, made from the class's own fields by rule.

A field is what its name says it is, whatever class has it: a number of layers, of heads, a width, a length, an index of
a token. Numbers that the class derives from others (fields whose default is None) are left to it. Lists with one entry
for each layer are cut so that every kind of layer that the class knows still comes once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Attempt", "tiny_configs"]

HIDDEN, HEADS, HEAD_DIM, WIDTH, VOCABULARY, POSITIONS, WINDOW = 64, 4, 16, 96, 128, 128, 8
_LEAST_DEPTH, _MOST_DEPTH = 2, 8

_DEPTH = re.compile(r"(^|_)(num|n)_(hidden_|decoder_|encoder_)?(layers?|blocks)$|^(encoder|decoder)_layers$|^depth$")
_HIDDEN = re.compile(r"^(hidden_size|d_model|n_embd|embedding_size|hidden_dim|dim|lru_width|attention_hidden_size)$")
_WIDTH = re.compile(r"intermediate|ffn|d_ff|dim_ff|dff|mlp_dim|inner")
_ROPE_PART = re.compile(r"rope_head_dim|rotary_dim")
_POSITIONS = re.compile(r"positions?(_embeddings)?$|max_seq|max_length|n_ctx|context_length|source_positions")
_WINDOW = re.compile(r"window|local_attention|chunk_size|block_size|attention_chunk")


def _integer(name: str, value: int, config: Mapping[str, Any]) -> int:
    """The tiny value of an integer field."""
    for what, made in _RULES:
        if what(name, value):
            return made(value, config)
    return value


def _is_token(name: str, _: int) -> bool:
    return bool(re.search(r"_token_(id|index)$|^(bo|eo|pa)[a-z]_?(id|index)$|token_index$", name))


def _heads(value: int, config: Mapping[str, Any]) -> int:
    """As many heads as keep the ratio of query to key/value heads, where it is 1 or all; else half."""
    most = max(
        (v for k, v in config.items() if "head" in k and "dim" not in k and type(v) is int and not _is_token(k, v)),
        default=value,
    )
    return HEADS if value == most else 1 if value == 1 else HEADS // 2


_RULES: list[tuple[Callable[[str, int], bool], Callable[[int, Mapping[str, Any]], int]]] = [
    (_is_token, lambda value, _: 3 + value % 7),
    (lambda name, _: name.endswith("vocab_size") and not name.startswith("type"), lambda *_: VOCABULARY),
    (lambda name, value: "vocab" in name and value > VOCABULARY, lambda *_: VOCABULARY),
    (lambda name, _: bool(re.search(r"experts?_per_tok|top_?k$|moe_k$|topk$", name)), lambda value, _: min(value, 2)),
    (lambda name, _: bool(re.search(r"(^|_)(n|num_expert)_groups?$", name)), lambda value, _: min(value, 2)),
    (lambda name, _: name.endswith("expand"), lambda *_: 1),
    (lambda name, _: bool(re.search(r"_(period|interval|step|pattern)$", name)), lambda value, _: min(value, 2)),
    (lambda name, _: name.endswith("_offset"), lambda value, _: min(value, 1)),
    (lambda name, _: name == "topk_group", lambda value, _: min(value, 1)),
    (lambda name, _: "shared_expert" in name and "size" not in name, lambda value, _: min(value, 1)),
    (
        lambda name, _: "expert" in name and "size" not in name and bool(re.search(r"^(moe_)?n(um)?_|_num$", name)),
        lambda value, _: min(value, 4),
    ),
    (lambda name, _: bool(_ROPE_PART.search(name)), lambda *_: HEAD_DIM // 2),
    (
        lambda name, _: bool(re.search(r"head_dim|dim_head|kv_channels|d_head|head_size|d_kv", name)),
        lambda *_: HEAD_DIM,
    ),
    # An indexer cuts the scores of each head at zero: of few heads, all are cut for many tokens, which then tie.
    (lambda name, _: bool(re.search(r"^index(er)?_.*heads$", name)), lambda value, _: min(value, 16)),
    (lambda name, _: "head" in name and "size" not in name and "dim" not in name and "per_n" not in name, _heads),
    (lambda name, _: bool(_HIDDEN.search(name)), lambda *_: HIDDEN),
    (lambda name, value: bool(_WIDTH.search(name)) and value > 8, lambda *_: WIDTH),
    (lambda name, value: "lora_rank" in name and value > 8, lambda *_: 24),
    (lambda name, value: bool(_POSITIONS.search(name)) and value > POSITIONS, lambda *_: POSITIONS),
    (lambda name, value: bool(_WINDOW.search(name)) and value > WINDOW, lambda *_: WINDOW),
    (lambda name, value: bool(re.search(r"state|rank", name)) and value > 8, lambda *_: 16),
    (lambda name, value: name == "image_size" and value > 32, lambda *_: 32),
    (lambda name, value: name == "patch_size" and value > 8, lambda *_: 8),
    (lambda _, value: value > 1000, lambda *_: HIDDEN),
    (lambda _, value: value > HIDDEN, lambda *_: HIDDEN),
]


def _is_stages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(type(each) is int for each in value)


def _stages(name: str, values: Sequence[int]) -> list[int]:
    """What a field says of each stage of a hierarchy: heads in the ratios of the default, and few blocks."""
    if "head" in name and all(value % values[0] == 0 for value in values):
        return [2 * value // values[0] for value in values]
    return [min(value, _LEAST_DEPTH) for value in values] if name.endswith("depths") else list(values)


def _own_fields(config_class: type) -> dict[str, Any]:
    """The fields that a class gives a default of its own, with the defaults; what is None is derived, and left out."""
    found = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return {name: value for name, value in found.items() if value is not None}


def _depth_of(config: Any) -> int | None:
    depth = getattr(config, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _kinds(config: Any) -> dict[str, set[str]]:
    """The kinds of layers by field: lists of names with one entry for each layer."""
    depth = _depth_of(config)
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == depth}
    return {name: set(map(str, value)) for name, value in lists.items() if all(isinstance(v, str) for v in value)}


@dataclass(frozen=True)
class Attempt:
    """One way to fill in what the rules leave open; classes differ in what fits together.

    Attributes:
        kv_heads: whether a class that takes as many key/value heads as heads unless told otherwise gets half as many.
        fill: whether numbers of heads and experts whose default is None are given.
        rope_part: whether the rotary part of a head is half of it.
        own_depth: whether the model is as deep as the class's default.
        rope_by_kind: whether every kind of layer is given positions of its own.
        decoder: whether a class that is an encoder unless told otherwise is told so.
    """

    kv_heads: bool = True
    fill: bool = False
    rope_part: bool = True
    own_depth: bool = False
    rope_by_kind: bool = False
    decoder: bool = True


_ATTEMPTS = (
    Attempt(),
    Attempt(fill=True),
    Attempt(kv_heads=False),
    Attempt(rope_part=False),
    Attempt(fill=True, rope_part=False, kv_heads=False),
    Attempt(own_depth=True),
    Attempt(rope_by_kind=True),
)
_FILLED = {
    "head_dim": HEAD_DIM,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LINEAR, _FULL, _SLIDING, _CONVOLUTION = "linear_attention", "full_attention", "sliding_attention", "conv"


def tiny_configs(config_class: Any, *, decoder: bool = True) -> Iterator[Any]:
    """Tiny configurations of a class, the likeliest first; those that the class refuses are left out.

    Args:
        config_class: a `PreTrainedConfig` class.
        decoder: whether a class that is an encoder unless told otherwise is told so.

    Yields:
        Configurations; every kind of layer of the default one comes at least once, in at most eight layers.

    Raises:
        What the class raised for the first attempt, if it refuses all of them.
    """
    first: Exception | None = None
    none = True
    for attempt in _ATTEMPTS:
        try:
            config = _tiny(config_class, dataclasses.replace(attempt, decoder=decoder))
        except Exception as error:  # noqa: BLE001 - configuration classes raise anything
            first = first or error
            continue
        none = False
        yield config
    if none and first is not None:
        raise first


def _tiny(config_class: Any, attempt: Attempt) -> Any:
    default = config_class()
    fields = _own_fields(config_class)
    wanted = _kinds(default)
    config = None
    for depth in range(_LEAST_DEPTH, _MOST_DEPTH + 1):
        config = _built(config_class, default, fields, depth, attempt)
        kinds = _kinds(config)
        if attempt.own_depth or all(kinds.get(name, set()) >= found for name, found in wanted.items()):
            break
    return config


def _built(config_class: Any, default: Any, fields: Mapping[str, Any], depth: int, attempt: Attempt) -> Any:
    known = {field.name for field in dataclasses.fields(config_class)}
    values = {name: _integer(name, value, fields) for name, value in fields.items() if type(value) is int}
    values |= {name: _stages(name, value) for name, value in fields.items() if _is_stages(value)}
    if attempt.own_depth:
        values |= {name: value for name, value in fields.items() if _DEPTH.search(name)}
    else:
        values |= {name: depth for name in values if _DEPTH.search(name)}
        values |= {name: value for name, value in _cut_lists(default, depth).items() if name in known}
    if not attempt.rope_part:
        values |= {name: HEAD_DIM for name in values if _ROPE_PART.search(name)}
    values |= _nested(config_class, default, attempt)
    given = _given(known - fields.keys(), depth, attempt, convolves=any("conv" in name for name in known))
    values |= {name: value for name, value in given.items() if name in known}
    values |= {name: token for name, token in _TOKENS.items() if name in known}
    if attempt.decoder and "is_decoder" in known:
        values["is_decoder"] = True
    config = config_class(**values)
    if attempt.rope_by_kind and "rope_parameters" in known:
        values["rope_parameters"] = {kind: dict(_ROPE) for kind in getattr(config, "layer_types", None) or ()}
        config = config_class(**values)
    if _only_linear(config):
        values |= {name: value for name, value in _some_attention(depth).items() if name in known}
        config = config_class(**values)
    return config


def _nested(config_class: Any, default: Any, attempt: Attempt) -> dict[str, Any]:
    """Tiny configurations of the parts of a composed one."""
    values: dict[str, Any] = {}
    for name, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        if dataclasses.is_dataclass(kind) and getattr(kind, "model_type", ""):
            values[name] = _tiny(kind, attempt)
        elif (sub := getattr(default, name, None)) is not None:
            values[name] = _tiny(type(sub), attempt)
    return values


def _given(unset: set[str], depth: int, attempt: Attempt, *, convolves: bool) -> dict[str, Any]:
    """Values for fields whose default is None, as far as the attempt gives them any."""
    values: dict[str, Any] = {}
    if attempt.kv_heads and "num_key_value_heads" in unset:
        values["num_key_value_heads"] = HEADS // 2
    if attempt.fill:
        values |= {name: value for name, value in _FILLED.items() if name in unset}
        if "layer_types" in unset:
            other = _CONVOLUTION if convolves else _SLIDING
            values["layer_types"] = ([other, _FULL] * depth)[:depth]
    return values


def _cut_lists(config: Any, depth: int) -> dict[str, list[Any]]:
    """The lists of a default configuration that have an entry for each layer, cut."""
    before = _depth_of(config)
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == before}
    return {name: _cut(value, depth) for name, value in lists.items()}


def _only_linear(config: Any) -> bool:
    """Whether a class that can have attention has none of it by default."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return bool(kinds) and set(kinds) == {_LINEAR} and hasattr(config, "num_attention_heads")


def _some_attention(depth: int) -> dict[str, list[Any]]:
    return {"layer_types": [_LINEAR] * (depth - 1) + [_FULL], "attn_layer_indices": [depth - 1]}


def _cut(values: list[Any], depth: int) -> list[Any]:
    """The first entry of each kind, in order, filled up with the ones that come first."""
    if not all(isinstance(value, (str, int, bool)) for value in values):
        return values[:depth]
    firsts = [values.index(value) for value in dict.fromkeys(values)][:depth]
    rest = [index for index in range(len(values)) if index not in firsts]
    chosen = sorted([*firsts, *rest[: max(0, depth - len(firsts))]])
    return [values[index] for index in chosen]
