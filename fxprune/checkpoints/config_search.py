"""Which configuration fields say the slim shapes: found by probing the model class, with no code per architecture.

A class is built on the meta device with one integer field changed at a time; how far each parameter's axes move is
that field's effect. Shapes are affine in the fields, `size = dense + sum(slope * (value - dense value))`, so the values
that give the slim shapes follow from a small linear system, and building the class once more proves them. Boolean
fields about biases are flipped to see which parameters they add.

A field whose name ends in `head_dim` is never changed: half as many heads and heads of half the size have the same
shapes. Where a class derives the size of a head from the number of heads unless told otherwise, it is told.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune.models.config_fields import fields_of, get_field, nested_configs, path_of, values_with
from fxprune.models.skeleton import BUILD_ERRORS, Shape, build_skeleton, config_with, layer_list, state_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "FieldEffect",
    "LayerMatch",
    "NoMatch",
    "UniformMatch",
    "companion_added",
    "companions",
    "find_layer_overrides",
    "find_uniform",
    "probe_fields",
]

_MAX_FIELDS = 5
_MAX_SOLUTIONS = 4
_PROBES_OF_UNSET = (64, 128)


@dataclass(frozen=True)
class UniformMatch:
    """One configuration says all slim shapes.

    Attributes:
        config: the slim configuration, accepted by its class.
        overrides: the fields that differ from the dense configuration.
        zero_biases: parameters that the class adds and the slim model lacks, with their shapes; zeros are right.
    """

    config: PreTrainedConfig
    overrides: Mapping[str, float | bool]
    zero_biases: Mapping[str, Shape]


@dataclass(frozen=True)
class NoMatch:
    """Why no single configuration says the slim shapes."""

    reason: str


@dataclass(frozen=True)
class LayerMatch:
    """Configuration fields for the whole model and by layer.

    Attributes:
        config: the dense configuration, with the size of a head made explicit if an override needs that.
        everywhere: fields and values of the whole model; its class may refuse them.
        overrides: fields and values of every layer that has any.
        unexplained: parameters whose slim shape no field gives.
    """

    config: PreTrainedConfig
    everywhere: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    unexplained: tuple[str, ...] = ()


@dataclass(frozen=True)
class FieldEffect:
    """What one integer field does to the shapes of a class.

    Attributes:
        name: the field.
        value: its dense value; where it is unset, the value that gives the dense shapes.
        slopes: how far every axis moves when the value grows by one, shape (axes,), float64.
    """

    name: str
    value: int
    slopes: npt.NDArray[np.float64]


class _Axes:
    """The axes of all tensors of a class, one after the other: a vector of sizes for every set of shapes.

    Non-persistent buffers count too, so that a field that also changes a rotary table is told from one that does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.buffers = _buffer_shapes(model)
        self.shapes = state_shapes(model) | self.buffers
        self.names = [name for name, shape in self.shapes.items() for _ in shape]
        self.dense = self.vector(self.shapes)

    def vector(self, shapes: Mapping[str, Shape]) -> npt.NDArray[np.float64]:
        return np.array([size for name in self.shapes for size in shapes[name]], dtype=np.float64)

    def difference(self, shapes: Mapping[str, Shape]) -> npt.NDArray[np.float64]:
        """How far shapes are from these, with 0 for tensors that only one of the two has."""
        return self.vector(self.shapes | {name: shapes[name] for name in self.shapes if name in shapes}) - self.dense

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether other shapes have the same names and numbers of axes."""
        return shapes.keys() == self.shapes.keys() and all(len(shapes[n]) == len(s) for n, s in self.shapes.items())


def _buffer_shapes(model: PreTrainedModel) -> dict[str, Shape]:
    return {name: tuple(buffer.shape) for name, buffer in model.named_non_persistent_buffers()}


def probe_fields(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, axes: _Axes | None = None
) -> tuple[FieldEffect, ...]:
    """Measure the effect of every integer field of a configuration on the shapes of a model class.

    Args:
        model_class: the class.
        config: its dense configuration.
        axes: the axes of the class built from `config`, if known.

    Returns:
        The fields that move any axis, in the configuration's order. Fields whose change the class refuses, or that
        change which parameters exist, are left out, and so are the number of layers and sizes of a head.
    """
    axes = axes or _Axes(build_skeleton(model_class, config))
    effects = (_probe(model_class, config, axes, name, value) for name, value in _integer_fields(config))
    return tuple(effect for effect in effects if effect is not None)


def _integer_fields(config: PreTrainedConfig) -> Iterator[tuple[str, int | None]]:
    """Integer fields that may be widths or counts; the value is None for an optional one that is unset."""
    types: dict[str, str] = {}
    depths = set()
    for path, each in nested_configs(config).items():
        types |= {f"{path}.{item.name}".removeprefix("."): str(item.type) for item in dataclasses.fields(each)}
        depth = each.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        depths.add(f"{path}.{depth}".removeprefix("."))
    for name, value in fields_of(config):
        last = name.rpartition(".")[2]
        if name in depths or last.startswith("_") or last.endswith(("head_dim", "token_id")):
            continue
        if type(value) is int and value > 1:
            yield name, value
        elif value is None and "int" in types.get(name, ""):
            yield name, None


def _probe(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, axes: _Axes, name: str, value: int | None
) -> FieldEffect | None:
    """Build with other values of one field until the class takes one; two are needed where the field is unset."""
    if value is not None:
        for probe in (2 * value, value // 2, value + 1):
            sizes = _sizes_with(model_class, config, axes, {name: probe})
            if sizes is not None:
                slopes = (sizes - axes.dense) / (probe - value)
                return FieldEffect(name, value, slopes) if slopes.any() else None
        return None
    first, second = _PROBES_OF_UNSET
    low = _sizes_with(model_class, config, axes, {name: first})
    if low is None or (low == axes.dense).all():
        return None
    high = _sizes_with(model_class, config, axes, {name: second})
    if high is None:
        return None
    slopes = (high - low) / (second - first)
    moved = slopes != 0
    values = first + (axes.dense - low)[moved] / slopes[moved]
    if not moved.any() or not (values == values[0]).all() or values[0] != int(values[0]):
        return None
    return FieldEffect(name, int(values[0]), slopes)


def _sizes_with(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, axes: _Axes, overrides: Mapping[str, Any]
) -> npt.NDArray[np.float64] | None:
    try:
        model = build_skeleton(model_class, config_with(config, overrides))
    except BUILD_ERRORS:
        return None  # the class refuses the value: the field cannot be used this way
    shapes = state_shapes(model) | _buffer_shapes(model)
    return axes.vector(shapes) if axes.fits(shapes) else None


def _solutions(
    effects: Sequence[FieldEffect], difference: npt.NDArray[np.float64], *, partial: bool
) -> Iterator[dict[str, int]]:
    """Values of few fields that move the axes by `difference`; the fewest fields first.

    Args:
        effects: the fields to use; slopes of shape (axes,).
        difference: slim minus dense sizes, shape (axes,).
        partial: whether axes that none of the chosen fields moves may be left as they are.
    """
    useful = [effect for effect in effects if difference[effect.slopes != 0].any()]
    for count in range(1, min(len(useful), _MAX_FIELDS) + 1):
        for chosen in itertools.combinations(useful, count):
            slopes = np.stack([effect.slopes for effect in chosen], axis=1)
            rows = slopes.any(axis=1) if partial else np.ones(len(difference), dtype=bool)
            system = np.unique(np.column_stack([slopes[rows], difference[rows]]), axis=0)
            steps = np.rint(np.linalg.lstsq(system[:, :-1], system[:, -1], rcond=None)[0])
            values = {effect.name: effect.value + int(step) for effect, step in zip(chosen, steps, strict=True)}
            exact = np.allclose(system[:, :-1] @ steps, system[:, -1], atol=1e-6)
            if exact and steps.all() and min(values.values()) > 0:
                yield values


def find_uniform(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    shapes: Mapping[str, Shape],
    new_biases: Sequence[str],
    *,
    pins: Mapping[str, float] | None = None,
    objection: Callable[[PreTrainedModel], str] = lambda _: "",
) -> UniformMatch | NoMatch:
    """Look for one configuration from which the class builds the slim shapes.

    Args:
        model_class: the class.
        config: the dense configuration.
        shapes: slim shape of every parameter and persistent buffer, tied ones under their first name.
        new_biases: those among them that the dense class does not have.
        pins: fields that must have other values than in the dense configuration.
        objection: says what is wrong with a skeleton that has the slim shapes; empty if nothing is.

    Returns:
        The configuration, or why there is none.
    """
    reason = _uneven(build_skeleton(model_class, config), shapes)
    given: dict[str, float] = dict(pins or {})
    if not reason:
        flags, reason = _bias_flags(model_class, config, new_biases)
        given |= flags
    if reason:
        return NoMatch(reason)
    for base, head_dim in _bases(config_with(config, given)):
        try:
            axes = _Axes(build_skeleton(model_class, base))
        except BUILD_ERRORS:
            continue  # a class that has no use for an explicit head_dim may refuse it
        # A bias that only the flag adds moves with the projection it belongs to: no equation, but proved at the end.
        wanted = np.array([name in shapes or name in axes.buffers for name in axes.names])
        difference = np.where(wanted, axes.vector(axes.shapes | dict(shapes)) - axes.dense, 0.0)
        solutions: Iterator[dict[str, int]] = iter([{}])
        if difference.any():
            effects = [
                replace(effect, slopes=np.where(wanted, effect.slopes, 0.0))
                for effect in probe_fields(model_class, base, axes)
            ]
            solutions = _solutions(effects, difference, partial=False)
        for solution in solutions:
            plain = {**given, **head_dim, **solution}
            paired = (companion_added(plain, *pair) for pair in companions(base, solution))
            for overrides in (plain, *paired):
                match = _proved(model_class, config, overrides, shapes, buffers=axes.buffers, objection=objection)
                if isinstance(match, UniformMatch):
                    return match
                reason = reason or match.reason
    return NoMatch(reason or f"no fields of {type(config).__name__} give the slim shapes")


def companions(config: PreTrainedConfig, fields: Collection[str]) -> Iterator[tuple[str, str]]:
    """Fields that no shape need follow from but that go with one that shapes say.

    A number of key/value heads says no shape where keys come from a latent, and is the number of heads all the same.
    Such a field stands beside the other and has its dense value; a result must say whether it belongs.

    Args:
        config: the dense configuration.
        fields: those that shapes say.

    Yields:
        A field of these, and one that may have its value.
    """
    for name in sorted(each for each in fields if "head" in each):
        place, dense = name.rpartition(".")[0], get_field(config, name)
        for other, value in fields_of(config):
            beside = other.rpartition(".")[0] == place and "head" in other and other not in fields
            if beside and type(value) is int and value == dense:
                yield name, other


def companion_added(fields: Mapping[str, Any], name: str, other: str) -> dict[str, Any]:
    """The fields, and `other` with the value of `name` where that is one of them."""
    return {**fields, **({other: fields[name]} if name in fields else {})}


def _bases(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, dict[str, int]]]:
    """The configuration as it is, and with the size of a head made explicit where the class may derive it."""
    yield config, {}
    path = path_of(config, config.get_text_config())
    names = (f"{path}.{name}".removeprefix(".") for name in ("head_dim", "hidden_size", "num_attention_heads"))
    name, hidden, heads = next(names), *(get_field(config, each) for each in names)
    if get_field(config, name) is None and isinstance(hidden, int) and isinstance(heads, int):
        pins = {name: hidden // heads}
        yield config_with(config, pins), pins


def _bias_flags(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, new_biases: Sequence[str]
) -> tuple[dict[str, bool], str]:
    """The boolean fields that add the wanted biases, or the reason why there are none."""
    rest = set(new_biases)
    flags: dict[str, bool] = {}
    if not rest:
        return flags, ""
    dense = state_shapes(build_skeleton(model_class, config)).keys()
    for name, value in fields_of(config):
        if value is not False or "bias" not in name or name.rpartition(".")[2].startswith("_"):
            continue
        try:
            added = state_shapes(build_skeleton(model_class, config_with(config, {name: True}))).keys() - dense
        except BUILD_ERRORS:
            continue  # the class refuses the flag
        if added & rest:
            flags[name] = True
            rest -= added
    reason = f"no field of {type(config).__name__} adds {min(rest)}" if rest else ""
    return flags, reason


def _proved(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    overrides: Mapping[str, float],
    shapes: Mapping[str, Shape],
    *,
    buffers: Mapping[str, Shape],
    objection: Callable[[PreTrainedModel], str],
) -> UniformMatch | NoMatch:
    """Construct the configuration anew, as reading `config.json` does, build the class and compare every shape."""
    try:
        slim = type(config).from_dict(values_with(config, overrides))
        model = build_skeleton(model_class, slim, torch.float32)
    except BUILD_ERRORS as error:
        return NoMatch(f"{type(config).__name__} refuses {dict(overrides)}: {str(error).strip()}")
    built = state_shapes(model)
    extra = {name: shape for name, shape in built.items() if name not in shapes}
    same = built == {**shapes, **extra} and _buffer_shapes(model) == buffers
    if not same or any(not name.endswith(".bias") for name in extra):
        return NoMatch(f"{model_class.__name__} built with {dict(overrides)} has other shapes")
    wrong = objection(model)
    if wrong:
        return NoMatch(f"{model_class.__name__} built with {dict(overrides)}: {wrong}")
    changed = {name: value for name, value in overrides.items() if get_field(config, name) != value}
    return UniformMatch(slim, changed, extra)


def _uneven(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> str:
    """Say which parameters are equally wide in all dense layers and are not in the slim ones, if any."""
    layers = layer_list(model)
    found: dict[tuple[str, Shape], set[Shape]] = {}
    for name, shape in state_shapes(model).items():
        if layers is not None and name.startswith(f"{layers}."):
            relative = name.removeprefix(f"{layers}.").partition(".")[2]
            found.setdefault((relative, shape), set()).add(shapes.get(name, shape))
    names = sorted({relative for (relative, _), widths in found.items() if len(widths) > 1})
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"layers differ in {', '.join(names[:4])}{rest}" if names else ""


def find_layer_overrides(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, shapes: Mapping[str, Shape]
) -> LayerMatch:
    """Look for configuration fields that give the slim shapes: some for the whole model, the rest by layer.

    What lies outside the layers (embeddings, the last norm) decides the fields for the whole model, such as the hidden
    size; they need not be accepted by the configuration class. Of the other fields only those that move nothing outside
    the layers are used. A layer that no set of fields explains as a whole gets the fields that explain most of it.

    Args:
        model_class: the class.
        config: the dense configuration.
        shapes: slim shape of every parameter and persistent buffer, tied ones under their first name.

    Returns:
        The overrides of every layer, with the parameters they do not explain.
    """
    best = LayerMatch(config, unexplained=tuple(shapes))
    for base, _ in _bases(config):
        for everywhere in _everywhere(model_class, base, shapes):
            try:
                model = build_skeleton(model_class, config_with(base, everywhere))
            except BUILD_ERRORS:
                continue  # a class that has no use for an explicit head_dim may refuse it
            overrides, unexplained = _match_layers(model, shapes)
            if len(unexplained) < len(best.unexplained):
                best = LayerMatch(base, everywhere, overrides, unexplained)
            if not unexplained:
                return best
    return best


def _everywhere(
    model_class: type[PreTrainedModel], base: PreTrainedConfig, shapes: Mapping[str, Shape]
) -> Iterator[dict[str, int]]:
    """Fields for the whole model: those that give all shapes, then those that give the ones outside the layers.

    Of each the likeliest few, and none at all at the end.
    """
    try:
        model = build_skeleton(model_class, base)
    except BUILD_ERRORS:
        return
    axes = _Axes(model)
    layers = layer_list(model)
    inside = np.array([layers is not None and _layer_index(name, layers) >= 0 for name in axes.names])
    difference = axes.difference(shapes)
    if difference.any():
        effects = probe_fields(model_class, base, axes)
        if not _uneven(model, shapes):
            yield from itertools.islice(_solutions(effects, difference, partial=False), _MAX_SOLUTIONS)
        effects = tuple(replace(effect, slopes=np.where(inside, 0.0, effect.slopes)) for effect in effects)
        outside = np.where(inside, 0.0, difference)
        if outside.any():
            yield from itertools.islice(_solutions(effects, outside, partial=True), _MAX_SOLUTIONS)
    yield {}


def _match_layers(
    model: PreTrainedModel, shapes: Mapping[str, Shape]
) -> tuple[dict[int, dict[str, int]], tuple[str, ...]]:
    """Fields of every layer that differs from a skeleton, and the parameters that they leave unexplained."""
    config = model.config
    axes = _Axes(model)
    difference = axes.difference(shapes)
    unexplained = difference != 0
    layers = layer_list(model)
    overrides: dict[int, dict[str, int]] = {}
    if layers is not None and unexplained.any():
        layer_of = np.array([_layer_index(name, layers) for name in axes.names])
        effects = [
            effect for effect in probe_fields(type(model), config, axes) if not effect.slopes[layer_of < 0].any()
        ]
        known: dict[tuple[bytes, ...], dict[str, int]] = {}
        for index in sorted(set(layer_of[unexplained]) - {-1}):
            rows = layer_of == index
            inside = [replace(effect, slopes=effect.slopes[rows]) for effect in effects]
            key = (difference[rows].tobytes(), *(effect.slopes.tobytes() for effect in inside))
            if key not in known:
                known[key] = _best_partial(inside, difference[rows])
            if known[key]:
                overrides[int(index)] = dict(known[key])
                for effect in effects:
                    if effect.name in known[key]:
                        unexplained &= ~(rows & (effect.slopes != 0))
    names = dict.fromkeys(name for name, open_ in zip(axes.names, unexplained, strict=True) if open_)
    return overrides, tuple(names)


def _layer_index(name: str, layers: str) -> int:
    index = name.removeprefix(f"{layers}.").partition(".")[0] if name.startswith(f"{layers}.") else ""
    return int(index) if index.isdigit() else -1


def _best_partial(effects: Sequence[FieldEffect], difference: npt.NDArray[np.float64]) -> dict[str, int]:
    """The values that explain most of a layer's differences, with the fewest fields."""
    best: dict[str, int] = {}
    explained = 0
    slopes = {effect.name: effect.slopes for effect in effects}
    for values in _solutions(effects, difference, partial=True):
        moved = np.any([slopes[name] != 0 for name in values], axis=0)
        count = int((difference[moved] != 0).sum())
        if count > explained:
            best, explained = values, count
    return best
