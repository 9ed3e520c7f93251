"""The layout of a slim state dict on disk: whether a configuration can say what it is, and what remains to be said.

*Uniform*: one configuration, accepted by its class, gives every shape and every number that the class computes with.
*Mixed*: layers differ, or there are widths, biases or numbers that the configuration class does not allow; layers and
the whole model get configuration fields of their own, numbers are set on modules, and projections that no field
describes are listed.

Layers that are missing as a whole are the first thing settled: the tensors are renumbered, and everything else is said
relative to the dense configuration with fewer layers.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxprune.checkpoints.config_search import (
    NoMatch,
    UniformMatch,
    companion_added,
    companions,
    find_layer_overrides,
    find_uniform,
)
from fxprune.checkpoints.head_counts import find_head_counts
from fxprune.checkpoints.trial import relative_error, runs_on_meta, tolerance_of
from fxprune.core.errors import CheckpointError
from fxprune.core.precision import is_low, main_dtype
from fxprune.core.tensors import same_bits
from fxprune.models.config_fields import get_field
from fxprune.models.constants import (
    Constants,
    apply_constants,
    differences,
    epsilon_attributes,
    find_float_fields,
    float_changes,
    numbers_of,
)
from fxprune.models.constants import expected as numbers_expected
from fxprune.models.depth import kept_layers, reduce_depth, renumbered
from fxprune.models.mixed_config import is_mixed, stock_config
from fxprune.models.mixed_model import model_class_of, stock_model_class
from fxprune.models.skeleton import (
    BUILD_ERRORS,
    aliases,
    build_layered_skeleton,
    build_skeleton,
    config_with,
    fill_skeleton,
    is_aligned,
    resize_projections,
    resolve_model_class,
    state_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from fxprune.checkpoints.trial import ExpectedLogits
    from fxprune.core.program import Source
    from fxprune.models.constants import Numbers
    from fxprune.models.skeleton import Shape

__all__ = ["Layout", "classify", "round_buffers"]

_LOGGER = logging.getLogger(__name__)
_CONSTANT = re.compile(r"(?:.*\.)?lifted_tensor_\d+")


@dataclass(frozen=True)
class Layout:
    """How a slim state dict is laid down on disk.

    Attributes:
        kind: `"uniform"` or `"mixed"`.
        reason: why it is not uniform; empty if it is.
        config: the configuration of `config.json`: the slim one (uniform), or the dense one with fewer layers (mixed).
        tensors: what the weight files hold: tied tensors once, under their first name, with `zero_biases`.
        given: the tensors that were given, all of them, under the names they have in the slim model.
        changed: dense and slim shape of every parameter whose shape changed.
        added_biases: given biases that the dense class does not have.
        zero_biases: biases of zeros, which the class has as soon as it has the added ones.
        kept_layers: for each module list that lost layers, the dense indices of those it keeps. All other names and
            indices are those of the slim model.
        config_overrides: fields that differ from the dense configuration: fields of `config` (uniform), or fields that
            its class need not accept and that are set on it before the model is built (mixed).
        layer_overrides: configuration fields of each layer that differs (mixed).
        constants: numbers that the class would derive wrongly and that are set on its modules (mixed).
    """

    kind: Literal["uniform", "mixed"]
    reason: str
    config: PreTrainedConfig
    tensors: Mapping[str, Tensor]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    changed: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    added_biases: tuple[str, ...] = ()
    zero_biases: tuple[str, ...] = ()
    kept_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    layer_overrides: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, float | int]] = field(default_factory=dict)


def classify(
    tensors: Mapping[str, Tensor],
    source: Source,
    epsilons: Mapping[str, float] | None = None,
    expected: ExpectedLogits | None = None,
    *,
    buffers: Collection[str] = (),
) -> Layout:
    """Find out how a slim state dict can be written; nothing is read or written.

    Args:
        tensors: the slim state dict under the dense model's qualified names, in the layout of the model class (Conv1D
            weights as (in, out), expert weights with three axes). A tied weight may come under one or all of its
            names. Biases of `nn.Linear` modules that have none in the dense class are accepted. Layers may be missing
            as a whole; those that are there keep their dense indices.
        source: the dense model. What is not a shape is taken from its configuration as it stands.
        epsilons: for norms that need another epsilon than in the dense model, the epsilon by the norm module's dense
            name. An RMSNorm narrowed from `d_old` to `d_new` is exact with `weight * sqrt(d_old / d_new)` and
            `epsilon * d_old / d_new`.
        expected: logits that the slim model gives. With them the integers are found that a class derives from its
            dense widths and that no field gives a layer (head counts, split sizes), and a configuration that has the
            right shapes and computes something else is passed over. Logits on the meta device ask with shapes alone,
            and the tensors may be there too: what runs and has their shape is taken to be right.
        buffers: names of those tensors that are buffers of a graph. What the class builds without them, it computes
            while it runs (rotary tables of long sequences): they are the graph's constants and are left out.

    Returns:
        The layout.

    Raises:
        CheckpointError: a tensor is missing, unknown or has no data, tied tensors differ, the class is unknown to
            transformers' auto mappings; or the configuration cannot express which layers are left, a shape can be
            expressed neither by it nor by a narrower `nn.Linear`, a number can be set nowhere, or no layout gives the
            expected logits. The message names layers, modules and parameters.
    """
    model_class: type[PreTrainedModel] = stock_model_class(source.model_class)
    config = config_with(stock_config(source.config), {})
    if resolve_model_class(config, model_class.__name__) is not model_class:
        raise CheckpointError(
            f"{model_class.__qualname__} from {model_class.__module__} is not transformers' own class of this name; a "
            "checkpoint could not be loaded without it"
        )
    try:
        dense = build_skeleton(model_class, config, torch.float32)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{model_class.__name__} cannot be built from the source's config: {error}") from error
    tensors = _without_constants(tensors, dense, buffers)
    new_numbers = _new_numbers(tensors, dense, epsilons or {}, _carried(source, dense))
    kept = kept_layers(tensors, dense)
    gone = [name for name in epsilons or {} if renumbered(name, kept) is None]
    if gone:
        raise CheckpointError(f"epsilons: {gone[0]} has no tensor left, its layer was removed; leave it out")
    fewer: dict[str, Any] = {}
    base = dense
    if kept:
        config, fewer = reduce_depth(model_class, config, dense, kept)
        base = build_skeleton(model_class, config, torch.float32)
    wanted = numbers_expected(numbers_of(dense), kept, new_numbers)
    named = {new: tensor for name, tensor in tensors.items() if (new := renumbered(name, kept)) is not None}
    trial = expected is not None and expected.logits.is_meta  # shapes alone
    given, added = _canonical(named, base, trial=trial)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    before = state_shapes(base)
    changed = {name: (before[name], shape) for name, shape in shapes.items() if before.get(name, shape) != shape}
    common: dict[str, Any] = {"given": named, "changed": changed, "added_biases": added, "kept_layers": kept}

    pins = find_float_fields(model_class, config, wanted.floats)
    reason = _not_plain(given, changed)
    match: UniformMatch | NoMatch = NoMatch(reason)
    if not reason:
        match = find_uniform(
            model_class,
            config,
            shapes,
            added,
            pins=pins,
            objection=lambda model: _objection(wanted, model) or _miscomputes(model, given, expected),
        )
    if isinstance(match, UniformMatch):
        any_given = next(tensor for tensor in given.values() if tensor.is_floating_point())
        zeros = {name: torch.zeros(shape, dtype=any_given.dtype) for name, shape in match.zero_biases.items()}
        return Layout(
            "uniform",
            "",
            _finished(match.config, model_class, given),
            {**given, **zeros},
            zero_biases=tuple(zeros),
            config_overrides={**fewer, **match.overrides},
            **common,
        )
    layers = find_layer_overrides(model_class, config_with(config, pins), shapes)
    everywhere = {**pins, **layers.everywhere}
    try:
        overrides, constants = _mixed(
            model_class, config_with(layers.config, everywhere), layers.overrides, given, wanted, expected=expected
        )
    except CheckpointError:
        for more in _with_companion(layers.config, everywhere, layers.overrides) if expected is not None else ():
            try:
                built = build_layered_skeleton(model_class, config_with(layers.config, more[0]), more[1], torch.float32)
                constants = _constants(built, given, wanted, expected=expected, search=False)
            except CheckpointError as error:
                _LOGGER.info("%s with %s and %s: %s", model_class.__name__, *more, error)
            else:
                everywhere, overrides = more
                break
        else:
            raise
    return Layout(
        "mixed",
        match.reason,
        _finished(config_with(layers.config, {name: get_field(config, name) for name in pins}), model_class, given),
        given,
        config_overrides=everywhere,
        layer_overrides=overrides,
        constants=constants,
        **common,
    )


def _new_numbers(
    tensors: Mapping[str, Tensor], dense: PreTrainedModel, epsilons: Mapping[str, float], carried: Constants
) -> Constants:
    """Numbers that differ from those of the dense class: what the source carries already, and the epsilons."""
    slim_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    numbers: Constants = {name: dict(values) for name, values in carried.items()}
    for name, values in epsilon_attributes(dense, epsilons, slim_shapes).items():
        numbers.setdefault(name, {}).update(values)
    return numbers


def _not_plain(given: Mapping[str, Tensor], changed: Mapping[str, tuple[Shape, Shape]]) -> str:
    """Say why plain loading would not do, whatever the configuration; empty if it would."""
    dtypes = sorted({str(tensor.dtype) for tensor in given.values() if tensor.is_floating_point()})
    if len(dtypes) != 1:
        return f"tensors have several dtypes: {', '.join(dtypes)}"
    narrow = [name for name, (old, new) in changed.items() if old[-1] != new[-1] and not is_aligned(given[name])]
    if narrow:
        return (
            f"rows of {narrow[0]} are no multiple of 16 bytes, which the grouped matrix product that "
            "transformers chooses for experts needs; fxprune chooses another one"
        )
    return ""


def _objection(wanted: Numbers, model: PreTrainedModel) -> str:
    """Say which number a skeleton derives wrongly; empty if it derives all as wanted."""
    constants, problem = differences(wanted, model)
    for name, values in constants.items():
        for attribute, value in values.items():
            return f"{f'{name}.' if name else ''}{attribute} must be {value}"
    return problem


def _carried(source: Source, dense: PreTrainedModel) -> Constants:
    """The floats with which a source that is a mixed model differs already from what its class derives."""
    if not is_mixed(source.config):
        return {}
    config = copy.deepcopy(source.config)
    slim = build_skeleton(model_class_of(type(dense), type(config)), config, torch.float32)
    numbers = float_changes(dense, slim)
    for name, values in config.slim_record.constants.items():
        numbers.setdefault(name, {}).update({key: value for key, value in values.items() if type(value) is float})
    return numbers


def _without_constants(
    tensors: Mapping[str, Tensor], dense: PreTrainedModel, buffers: Collection[str]
) -> dict[str, Tensor]:
    """Leave out a graph's own constants: what `torch.export` lifts out of code, and buffers that the class has not."""
    known = {*aliases(dense), *(name for name, _ in dense.named_non_persistent_buffers())}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (_CONSTANT.fullmatch(name) and tensor.numel() <= 1) and not (name in buffers and name not in known)
    }


def _canonical(
    tensors: Mapping[str, Tensor], dense: PreTrainedModel, *, trial: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Sort given tensors into the class's state (tied ones once) and added biases, without what it computes itself."""
    name_of = aliases(dense)
    computed = {name for name, _ in dense.named_non_persistent_buffers()}
    given: dict[str, Tensor] = {}
    added: list[str] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if tensor.is_meta and not trial:
            raise CheckpointError(f"{name} is on the meta device and has no data; load the model's weights first")
        owner = name_of.get(name, name)
        if owner in given and not same_bits(given[owner], tensor):
            raise CheckpointError(
                f"{name} and {owner} are tied by the configuration but differ; keep them tied, or untie them in the "
                "source's configuration"
            )
        if name in name_of:
            given[owner] = tensor
        elif name in computed:
            continue
        elif _is_new_bias(dense, name):
            given[name] = tensor
            added.append(name)
        else:
            unknown.append(name)
    missing = sorted(set(name_of.values()) - given.keys())
    if unknown or missing:
        raise CheckpointError(
            f"the tensors are not those of {type(dense).__name__}: missing {missing[:8]}, unknown {unknown[:8]}; give "
            "the slim model's whole state dict under its original parameter names"
        )
    order = {name: position for position, name in enumerate(name_of)}
    ordered = sorted(given, key=lambda name: order.get(name, order.get(f"{name.removesuffix('.bias')}.weight", 0)))
    return {name: given[name] for name in ordered}, tuple(added)


def _is_new_bias(dense: PreTrainedModel, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    try:
        module = dense.get_submodule(owner)
    except AttributeError:
        return False
    return attribute == "bias" and isinstance(module, nn.Linear | Conv1D) and module.bias is None


def _finished(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], tensors: Mapping[str, Tensor]
) -> PreTrainedConfig:
    """The configuration with the class's name and the dtype that most elements have."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(elements, key=lambda key: elements[key], default=config.dtype)
    return config_with(config, {"architectures": [model_class.__name__], "dtype": dtype})


def _miscomputes(skeleton: PreTrainedModel, given: Mapping[str, Tensor], expected: ExpectedLogits | None) -> str:
    """Say how a skeleton of the slim shapes fails to give the expected logits; empty if it gives them."""
    if expected is None:
        return ""
    model = _filled(skeleton, given, expected)
    try:
        error = relative_error(model, expected)
    except BUILD_ERRORS as problem:
        return f"it cannot run: {str(problem).strip()}"
    return "" if error <= tolerance_of(model) else f"the relative error of its logits is {error:.3g}"


def _filled(skeleton: PreTrainedModel, given: Mapping[str, Tensor], expected: ExpectedLogits) -> PreTrainedModel:
    """A skeleton's copy with the given weights, and zeros where it has biases that are not given."""
    model = copy.deepcopy(skeleton)
    device = next(iter(given.values())).device
    tensors = {
        name: tensor.detach().to(device, expected.dtype if tensor.is_floating_point() else None)
        for name, tensor in given.items()
    }
    floating = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    rest = {name: floating.new_zeros(shape) for name, shape in state_shapes(model).items() if name not in tensors}
    fill_skeleton(model, {**tensors, **rest}, device)
    round_buffers(model, given, expected)
    return model


def round_buffers(model: PreTrainedModel, given: Mapping[str, Tensor], expected: ExpectedLogits) -> None:
    """Round computed buffers as the class does that is built in a lower dtype, such as the scale of embeddings.

    Some classes do so when they run first.

    Args:
        model: the model, in the dtype of the reference or in its own; its buffers are changed in place.
        given: its weights, in the dtype that they are stored in; nothing is rounded if it is no lower one.
        expected: what to run.
    """
    if not is_low(dtype := main_dtype(given.values())):
        return
    lower = build_skeleton(type(model), model.config, dtype)
    lower.set_attn_implementation("eager")  # the other kinds look at the values of masks
    runs_on_meta(lower, expected.inputs)
    stored = dict(lower.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name in stored:
            buffer.copy_(buffer.to(stored[name].dtype))


def _mixed(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    overrides: Mapping[int, Mapping[str, int]],
    given: Mapping[str, Tensor],
    wanted: Numbers,
    *,
    expected: ExpectedLogits | None,
) -> tuple[Mapping[int, Mapping[str, int]], Constants]:
    """The layer overrides that the class accepts, and the numbers to set on the modules that it builds with them.

    Raises:
        CheckpointError: overrides and narrower projections do not give every shape, a number cannot be had, or nothing
            gives the expected logits.
    """
    plain = build_skeleton(model_class, config, torch.float32)
    try:
        built = build_layered_skeleton(model_class, config, overrides, torch.float32)
    except CheckpointError:
        # Sizes need not be linear in the fields, as probing takes them to be. Narrower projections may do alone.
        overrides, built = {}, plain
    if expected is None:
        return overrides, _constants(built, given, wanted, expected=None, search=False)
    # Fields say most; where a class derives other numbers from them than it should, numbers are set on dense layers.
    trials: list[tuple[dict[int, Mapping[str, int]], PreTrainedModel, bool]] = [({}, plain, True)]
    if overrides:
        trials = [(dict(overrides), built, False), ({}, plain, True), (dict(overrides), built, True)]
    for fields, skeleton, search in trials[:-1]:
        try:
            return fields, _constants(skeleton, given, wanted, expected=expected, search=search)
        except CheckpointError as error:
            _LOGGER.info("%s with %s: %s", model_class.__name__, fields, error)
    fields, skeleton, search = trials[-1]
    return fields, _constants(skeleton, given, wanted, expected=expected, search=search)


def _with_companion(
    config: PreTrainedConfig, everywhere: Mapping[str, float], overrides: Mapping[int, Mapping[str, int]]
) -> Iterator[tuple[dict[str, float], dict[int, dict[str, int]]]]:
    """The fields of all layers and of each one as shapes say them, with one more that goes with one of them."""
    found = {*everywhere, *(name for fields in overrides.values() for name in fields)}
    for pair in companions(config, found):
        layers = {layer: companion_added(fields, *pair) for layer, fields in overrides.items()}
        yield companion_added(everywhere, *pair), layers


def _constants(
    skeleton: PreTrainedModel,
    given: Mapping[str, Tensor],
    wanted: Numbers,
    *,
    expected: ExpectedLogits | None,
    search: bool,
) -> Constants:
    """The numbers to set on a skeleton with narrower projections.

    Raises:
        CheckpointError: it has other shapes, a number cannot be had, or it does not give the expected logits.
    """
    model = copy.deepcopy(skeleton)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    resize_projections(model, shapes)
    built = state_shapes(model)
    wrong = [name for name in shapes if built.get(name) != shapes[name]]
    if wrong:
        details = ", ".join(f"{name} {list(shapes[name])} (the class gives {list(built[name])})" for name in wrong[:4])
        raise CheckpointError(
            f"no field of {type(model.config).__name__} gives the shape of {details}, and only nn.Linear can be "
            "narrowed without one; leave these groups unpruned, or export the graph instead"
        )
    constants, problem = differences(wanted, model)
    if problem:
        raise CheckpointError(f"{problem}; leave this dimension and these layers unpruned, or export the graph instead")
    if expected is not None:
        filled = _filled(model, given, expected)
        apply_constants(filled, constants)
        found = find_head_counts(filled, skeleton, expected, search=search)
        for name, values in found.items():
            constants.setdefault(name, {}).update(values)
    return constants
