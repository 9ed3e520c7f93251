"""Fewer layers: a configuration from which the model class builds only the layers that were kept, in their old order.

    layers.0  layers.1  layers.2  layers.3        kept (0, 3)        layers.0  layers.1
    num_hidden_layers 4, layer_types [s, f, s, f]    ──►    num_hidden_layers 2, layer_types [s, f]

The depth field is the one that changes the length of the module list. Lists in the configuration with one entry a layer
are filtered; lists of layer indices are renumbered. Whether that gave the right layers is seen in what the class
builds: every kept layer must have the modules, the shapes and the switches (booleans, strings, integers) it has in the
dense model. Where a class derives them from a layer's position by a period or a bound, other values of that field are
tried. Floats may depend on the position too; they are compared by `fxprune.models.constants`, which can keep them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import CheckpointError
from fxprune.models.config_fields import fields_of, get_field, nested_configs, values_with
from fxprune.models.mixed_config import stock_layers_of
from fxprune.models.skeleton import BUILD_ERRORS, Shape, build_skeleton, config_with, outer_lists

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["KeptLayers", "kept_layers", "reduce_depth", "renumbered"]

KeptLayers = dict[str, tuple[int, ...]]
"""Name of a module list that lost layers -> the dense indices of those that it keeps, ascending."""

_MISSING = object()
_SWITCHES = (bool, int, str, type(None))


def kept_layers(names: Iterable[str], dense: PreTrainedModel) -> KeptLayers:
    """Find the module lists of which a state dict lacks whole layers.

    Args:
        names: names of the tensors that are given.
        dense: the dense model, on any device.

    Returns:
        The lists that lost layers; empty if none did.

    Raises:
        CheckpointError: every layer of a list is missing.
    """
    given = set(names)
    found: KeptLayers = {}
    for name, layers in outer_lists(dense).items():
        own = [{f"{name}.{index}.{key}" for key in layer.state_dict()} for index, layer in enumerate(layers)]
        kept = tuple(index for index, keys in enumerate(own) if not keys or keys & given)
        if not kept:
            raise CheckpointError(f"{name}: none of its {len(own)} layers is there; at least one layer must be kept")
        if len(kept) < len(own):
            found[name] = kept
    return found


def renumbered(name: str, kept: Mapping[str, tuple[int, ...]]) -> str | None:
    """The slim name of a module or tensor of the dense model; None if it belongs to a removed layer."""
    for layers, indices in kept.items():
        index, dot, rest = name.removeprefix(f"{layers}.").partition(".")
        if name.startswith(f"{layers}.") and index.isdigit():
            return f"{layers}.{indices.index(int(index))}{dot}{rest}" if int(index) in indices else None
    return name


def reduce_depth(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dense: PreTrainedModel, kept: KeptLayers
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Find the configuration, accepted by its class, that gives exactly the kept layers.

    Args:
        model_class: the class.
        config: the dense configuration.
        dense: its skeleton.
        kept: the lists that lose layers.

    Returns:
        The configuration, and its fields that differ from the dense one.

    Raises:
        CheckpointError: the class cannot be made to build these layers; the removed ones are named, with what differs.
    """
    reason = ""
    for overrides in _candidates(model_class, config, dense, kept):
        try:
            # As reading config.json does: validated, and what is derived from the fields is derived anew.
            reduced = type(config).from_dict(values_with(config, overrides))
            slim = build_skeleton(model_class, reduced)
        except BUILD_ERRORS as error:
            reason = reason or f"{type(config).__name__} refuses {overrides}: {str(error).strip()}"
            continue
        difference = _difference(dense, slim, kept)
        if not difference:
            apart = {name for name, _ in _stock_layers(config)}
            changed = {n: value for n, value in overrides.items() if n not in apart and get_field(config, n) != value}
            return reduced, changed
        reason = reason or difference
    raise CheckpointError(
        f"{model_class.__name__} cannot be built without {_removed(dense, kept)}: {reason}; remove other layers, or "
        "export the graph instead"
    )


def _removed(dense: PreTrainedModel, kept: KeptLayers) -> str:
    names = [
        f"{name}.{index}"
        for name, indices in kept.items()
        for index in range(len(outer_lists(dense)[name]))
        if index not in indices
    ]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _candidates(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dense: PreTrainedModel, kept: KeptLayers
) -> Iterator[dict[str, Any]]:
    """Overrides that may give the kept layers, the likeliest first."""
    lengths = {name: len(layers) for name, layers in outer_lists(dense).items()}
    fields = _depth_fields(model_class, config, lengths, kept)
    base: dict[str, Any] = {fields[name]: len(indices) for name, indices in kept.items()}
    positions: dict[str, list[int]] = {}  # fields that may list the indices of some layers
    beside = {field.rpartition(".")[0] for field in fields.values()}  # of other towers' layers they do not speak
    for name, value in _lists(config):
        if name.rpartition(".")[0] not in beside:
            continue
        owner = next((layers for layers in kept if len(value) == lengths[layers]), None)
        if owner is not None:
            base[name] = [value[index] for index in kept[owner]]
        if all(type(item) is int and 0 <= item < max(lengths[layers] for layers in kept) for item in value):
            first = next(iter(kept))
            positions[name] = [kept[first].index(index) for index in value if index in kept[first]]
            base.setdefault(name, positions[name])
    for name, layers in _stock_layers(config):
        if name.rpartition(".")[0] in beside:
            indices = kept[next(iter(kept))]
            base[name] = {new: layers[old] for new, old in enumerate(indices) if old in layers}
    yield base
    yield {**base, **positions}
    numbers = _position_fields(model_class, config, dense, {*base, *fields.values()})
    depth = max(len(indices) for indices in kept.values())
    for number in numbers:
        yield from ({**base, number: value} for value in range(depth + 1))
    kinds = list(_kinds(dense, kept))
    for field, kind in itertools.product(positions, kinds):
        yield {**base, field: kind}
        for number, place in itertools.product(numbers, sorted({0, 1, depth})):
            yield {**base, field: kind, number: place}


def _stock_layers(config: PreTrainedConfig) -> Iterator[tuple[str, dict[int, Any]]]:
    """Fields by which a configuration class itself tells layers apart, with their values by layer."""
    for path, each in nested_configs(config).items():
        layers = stock_layers_of(each.to_dict())
        if layers is not None:
            yield f"{path}.per_layer_config".removeprefix("."), layers


def _lists(config: PreTrainedConfig) -> Iterator[tuple[str, list[Any]]]:
    """List-valued fields that may speak of layers."""
    for name, value in fields_of(config):
        last = name.rpartition(".")[2]
        if isinstance(value, list) and not last.startswith("_") and last != "architectures" and "token" not in last:
            yield name, value


def _depth_fields(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, lengths: Mapping[str, int], kept: KeptLayers
) -> dict[str, str]:
    """The integer field that decides the length of each module list that loses layers."""
    fields: dict[str, str] = {}
    for name, value in fields_of(config):
        if type(value) is not int or value not in {lengths[layers] for layers in kept}:
            continue
        shorter = {key: items[: value - 1] for key, items in _lists(config) if len(items) == value}
        try:
            probe = build_skeleton(model_class, config_with(config, {name: value - 1, **shorter}))
        except BUILD_ERRORS:
            continue  # the class refuses the value: it is no depth, or it is needed for something else too
        for layers, modules in outer_lists(probe).items():
            if layers in kept and len(modules) == lengths[layers] - 1:
                fields.setdefault(layers, name)
    for layers, indices in kept.items():
        if layers not in fields:
            missing = [f"{layers}.{index}" for index in range(lengths[layers]) if index not in indices]
            raise CheckpointError(
                f"tensors of {', '.join(missing[:8])} are missing, and no field of {type(config).__name__} says how "
                f"many modules {layers} has; give the slim model's whole state dict, or export the graph instead"
            )
    return fields


def _position_fields(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dense: PreTrainedModel, known: set[str]
) -> list[str]:
    """Small integer fields that decide what a layer is by its position: periods, offsets and bounds."""
    depth = max(len(layers) for layers in outer_lists(dense).values())
    found: list[str] = []
    for name, value in fields_of(config):
        if type(value) is not int or not 0 <= value <= depth or name in known or "token" in name:
            continue
        for probe in (value + 1, value - 1):
            try:
                other = build_skeleton(model_class, config_with(config, {name: probe}))
            except BUILD_ERRORS:
                continue
            if any(key not in _shapes(other) for key in _shapes(dense)) or _difference(
                dense, other, {}, only_kinds=True
            ):
                found.append(name)
                break
    return found


def _kinds(dense: PreTrainedModel, kept: KeptLayers) -> Iterator[list[int]]:
    """New indices of the kept layers that have the same tensors, for each such kind of layer."""
    for name, indices in kept.items():
        layers = outer_lists(dense)[name]
        kinds: dict[tuple[tuple[str, Shape], ...], list[int]] = {}
        for new, old in enumerate(indices):
            kinds.setdefault(tuple(_shapes(layers[old]).items()), []).append(new)
        if len(kinds) > 1:
            yield from kinds.values()


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def _difference(
    dense: PreTrainedModel, slim: PreTrainedModel, kept: Mapping[str, tuple[int, ...]], *, only_kinds: bool = False
) -> str:
    """Say how the layers of a skeleton differ from the dense ones they stand for; empty if they do not.

    Args:
        dense: the dense skeleton.
        slim: the one with fewer layers.
        kept: which layers it shall have.
        only_kinds: compare all layers where none were removed, and not the integers that may be widths.
    """
    wanted = {new: shape for name, shape in _shapes(dense).items() if (new := renumbered(name, kept)) is not None}
    built = _shapes(slim)
    wrong = sorted(name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name))
    if wrong and not only_kinds:
        return f"the layers it builds differ from those that were kept in {', '.join(wrong[:4])}"
    numbers = kept or {name: tuple(range(len(layers))) for name, layers in outer_lists(dense).items()}
    modules = dict(slim.named_modules())
    for name, old in dense.named_modules():
        new_name = renumbered(name, kept)
        layers = next((layers for layers in numbers if name.startswith(f"{layers}.")), None)
        if new_name is None or layers is None or new_name not in modules:
            continue
        places = tuple(int(each.removeprefix(f"{layers}.").partition(".")[0]) for each in (name, new_name))
        new = modules[new_name]
        if type(new) is not type(old):
            return f"{new_name} is a {type(new).__name__}, {name} was a {type(old).__name__}"
        for attribute, value in vars(old).items():
            other = vars(new).get(attribute, _MISSING)
            if isinstance(value, _SWITCHES) and not _same(value, other, places, only_kinds=only_kinds):
                return f"{new_name}.{attribute} is {other!r}, {name}.{attribute} was {value!r}"
    return ""


def _same(old: object, new: object, places: tuple[int, ...], *, only_kinds: bool) -> bool:
    """Whether an attribute means the same in a layer at another place: it is equal, or it counts the layers."""
    if old == new or (only_kinds and type(old) is int):
        return True
    if type(old) is not int or type(new) is not int:
        return False
    return old - places[0] == new - places[1] and old - places[0] in {0, 1}
