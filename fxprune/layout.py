"""The layout of a slim state dict on disk: whether a configuration can say its shapes, and what remains to be said.

*Uniform*: one configuration, accepted by its class, gives every shape. *Mixed*: layers differ, or there are biases the
class does not know; layers get configuration fields of their own, and projections that no field describes are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxprune.config_search import NoMatch, UniformMatch, find_layer_overrides, find_uniform
from fxprune.errors import CheckpointError
from fxprune.skeleton import (
    BUILD_ERRORS,
    aliases,
    build_layered_skeleton,
    build_skeleton,
    config_with,
    resize_projections,
    resolve_model_class,
    state_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from fxprune.program import Source
    from fxprune.skeleton import Shape

__all__ = ["Layout", "classify", "same_bits", "without_constants"]

_CONSTANT = re.compile(r"(?:.*\.)?lifted_tensor_\d+")


@dataclass(frozen=True)
class Layout:
    """How a slim state dict is laid down on disk.

    Attributes:
        kind: `"uniform"` or `"mixed"`.
        reason: why it is not uniform; empty if it is.
        config: the configuration to build the class from: the slim one (uniform) or the dense one (mixed).
        tensors: what the weight files hold: tied tensors once, under their first name, with `zero_biases`.
        buffers: tensors that were given and that the class computes itself; they are checked, not stored.
        changed: dense and slim shape of every parameter whose shape changed.
        added_biases: given biases that the dense class does not have.
        zero_biases: biases of zeros, which the class has as soon as it has the added ones.
        config_overrides: fields of `config` that differ from the dense configuration (uniform).
        layer_overrides: configuration fields of each layer that differs (mixed).
    """

    kind: Literal["uniform", "mixed"]
    reason: str
    config: PreTrainedConfig
    tensors: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    changed: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    added_biases: tuple[str, ...] = ()
    zero_biases: tuple[str, ...] = ()
    config_overrides: Mapping[str, int | bool] = field(default_factory=dict)
    layer_overrides: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


def classify(tensors: Mapping[str, Tensor], source: Source) -> Layout:
    """Find out how a slim state dict can be written; nothing is read or written.

    Args:
        tensors: the slim state dict under the dense model's qualified names. A tied weight may come under one or all
            of its names. Biases of `nn.Linear` modules that have none in the dense class are accepted.
        source: the dense model. What is not a shape is taken from its configuration as it stands: a caller that
            changed, say, the epsilon of a norm passes a source with a changed configuration.

    Returns:
        The layout.

    Raises:
        CheckpointError: a tensor is missing, unknown or has no data, tied tensors differ, the class is unknown to
            transformers' auto mappings, or a shape can be expressed neither by the configuration nor by a narrower
            `nn.Linear`; blocks and parameters are named.
    """
    model_class: type[PreTrainedModel] = source.model_class
    config = config_with(source.config, {})
    if resolve_model_class(config, model_class.__name__) is not model_class:
        raise CheckpointError(
            f"{model_class.__qualname__} from {model_class.__module__} is not transformers' own class of this name; a "
            "checkpoint could not be loaded without it"
        )
    try:
        dense = build_skeleton(model_class, config)
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{model_class.__name__} cannot be built from the source's config: {error}") from error
    given, buffers, added = _canonical(tensors, dense)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    before = state_shapes(dense)
    changed = {name: (before[name], shape) for name, shape in shapes.items() if before.get(name, shape) != shape}
    dtypes = sorted({str(tensor.dtype) for tensor in given.values() if tensor.is_floating_point()})
    match: UniformMatch | NoMatch = NoMatch(f"tensors have several dtypes: {', '.join(dtypes)}")
    if len(dtypes) == 1:
        match = find_uniform(model_class, config, shapes, added)
    common: dict[str, Any] = {"buffers": buffers, "changed": changed, "added_biases": added}
    if isinstance(match, UniformMatch):
        any_given = next(tensor for tensor in given.values() if tensor.is_floating_point())
        zeros = {name: torch.zeros(shape, dtype=any_given.dtype) for name, shape in match.zero_biases.items()}
        return Layout(
            "uniform",
            "",
            _finished(match.config, model_class, given),
            {**given, **zeros},
            zero_biases=tuple(zeros),
            config_overrides=match.overrides,
            **common,
        )
    layers = find_layer_overrides(model_class, config, shapes)
    _check_expressible(model_class, layers.config, layers.overrides, shapes)
    return Layout(
        "mixed",
        match.reason,
        _finished(layers.config, model_class, given),
        given,
        layer_overrides=layers.overrides,
        **common,
    )


def without_constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the scalars that `torch.export` lifts out of a model's code: they are the graph's, not the model's."""
    return {name: tensor for name, tensor in tensors.items() if not (_CONSTANT.fullmatch(name) and tensor.numel() == 1)}


def _canonical(
    tensors: Mapping[str, Tensor], dense: PreTrainedModel
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Sort given tensors into the class's state (tied ones once), its non-persistent buffers and added biases."""
    name_of = aliases(dense)
    computed = {name for name, _ in dense.named_non_persistent_buffers()}
    given: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    added: list[str] = []
    unknown: list[str] = []
    for name, tensor in without_constants(tensors).items():
        if tensor.is_meta:
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
            buffers[name] = tensor
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
    return {name: given[name] for name in ordered}, buffers, tuple(added)


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


def _check_expressible(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    overrides: Mapping[int, Mapping[str, int]],
    shapes: Mapping[str, Shape],
) -> None:
    """Raise unless overrides and narrower projections give every shape."""
    model = build_layered_skeleton(model_class, config, overrides)
    resize_projections(model, shapes)
    built = state_shapes(model)
    wrong = [name for name in shapes if built.get(name) != shapes[name]]
    if wrong:
        details = ", ".join(f"{name} {list(shapes[name])} (the class gives {list(built[name])})" for name in wrong[:4])
        raise CheckpointError(
            f"no field of {type(config).__name__} gives the shape of {details}, and only nn.Linear can be narrowed "
            "without one; leave these groups unpruned, or export the graph instead"
        )


def same_bits(first: Tensor | None, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if first is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}[first.element_size()]
    pair = (tensor.detach().cpu().contiguous().reshape(-1).view(bits) for tensor in (first, second))
    return torch.equal(*pair)
