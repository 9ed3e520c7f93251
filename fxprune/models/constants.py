"""Numbers that a model class derives from its configuration and computes with: epsilons, scales, normalisers.

Narrowing changes what a class derives (`embed_scale = hidden_size ** 0.5`, `scaling / (layer_idx + 1)`), but a slim
model must go on computing with the dense numbers, and an exactly narrowed RMSNorm with an epsilon of its own. So the
numbers of the dense and of the slim skeleton are compared, in two ways that need no weights:

- float attributes of modules and buffers that the class computes itself. A configuration field may say the right
  values (norm epsilons); else they can be set again, as *constants*;
- the floats that reach an operator while each module runs on the meta device, which also shows what a class derives
  while running. Where setting a differing integer of that module back to its dense value mends it, that is a constant
  too; where nothing does, the shapes are refused.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.core.errors import CheckpointError
from fxprune.models.config_fields import fields_of
from fxprune.models.depth import renumbered
from fxprune.models.skeleton import BUILD_ERRORS, build_skeleton, config_with, initialize_buffers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from fxprune.models.skeleton import Shape

__all__ = [
    "Constants",
    "Numbers",
    "apply_constants",
    "differences",
    "epsilon_attributes",
    "expected",
    "find_float_fields",
    "float_changes",
    "numbers_of",
]

_LOGGER = logging.getLogger(__name__)
_LENGTH = 11

Constants = dict[str, dict[str, float | int]]
"""Qualified name of a module -> attribute or scalar buffer -> the value it must have."""


@dataclass(frozen=True)
class Numbers:
    """What a model computes with, beside its weights.

    Attributes:
        floats: for each module, its float attributes and the values of its scalar non-persistent buffers.
        integers: for each module, its integer attributes.
        tables: the other non-persistent buffers, on the CPU, by qualified name.
        used: for each module, how often its own code passes each float to an operator; None where the class cannot run
            on the meta device.
    """

    floats: Mapping[str, Mapping[str, float]]
    integers: Mapping[str, Mapping[str, int]]
    tables: Mapping[str, Tensor]
    used: Mapping[str, Counter[float]] | None


def numbers_of(model: PreTrainedModel) -> Numbers:
    """Collect the numbers of a skeleton; it stays as it is.

    Args:
        model: a skeleton in float32, so that scalar buffers are not rounded.

    Raises:
        CheckpointError: the class leaves a non-persistent buffer uninitialised.
    """
    floats = {name: _attributes(module, float) for name, module in model.named_modules()}
    integers = {name: _attributes(module, int) for name, module in model.named_modules()}
    filled = copy.deepcopy(model)
    initialize_buffers(filled, torch.device("cpu"))
    tables: dict[str, Tensor] = {}
    for name, buffer in filled.named_non_persistent_buffers():
        owner, _, attribute = name.rpartition(".")
        if buffer.dim() == 0 and buffer.is_floating_point():
            floats[owner][attribute] = buffer.item()
        else:
            tables[name] = buffer
    return Numbers(floats, integers, tables, _used(model))


def _attributes(module: nn.Module, kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) is kind}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floats that operators are called with, under the module whose code is running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = [""]
        self.used: dict[str, Counter[float]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point() and value.is_cpu:
                value = value.item()  # noqa: PLW2901 - a scalar that the code made into a tensor
            if type(value) is float:
                self.used.setdefault(self.running[-1], Counter())[value] += 1
        return func(*args, **(kwargs or {}))


def _used(model: PreTrainedModel) -> dict[str, Counter[float]] | None:
    """Run one short forward pass on the meta device and record the floats of each module's own code."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation("batched_mm")  # takes any width
    ids = torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    recorder = _Recorder()

    def leave(_module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        recorder.running.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: recorder.running.append(name))
        module.register_forward_hook(leave)
    # Code that looks at the values of a mask, or at positions where there is none, cannot run without values.
    for masks in ({"attention_mask": torch.ones_like(ids)}, {}):
        recorder.running, recorder.used = [""], {}
        try:
            with torch.no_grad(), recorder:
                model(**inputs, **masks, use_cache=False)
        except BUILD_ERRORS as error:
            _LOGGER.info("%s does not run on the meta device: %s", type(model).__name__, error)
        else:
            return recorder.used
    return None


def expected(dense: Numbers, kept: Mapping[str, tuple[int, ...]], constants: Constants) -> Numbers:
    """The numbers that the slim model must compute with.

    Args:
        dense: those of the dense model.
        kept: the layers it keeps, as `fxprune.models.depth.kept_layers` gives them.
        constants: new values of float attributes and scalar buffers, under the dense names.
    """
    names = {name: new for name in dense.floats if (new := renumbered(name, kept)) is not None}
    floats = {new: {**dense.floats[name], **constants.get(name, {})} for name, new in names.items()}
    used = None
    if dense.used is not None:
        used = {new: Counter(dense.used[name]) for name, new in names.items() if name in dense.used}
        for name, values in constants.items():
            counts = used.get(names.get(name, ""), Counter())
            for attribute, value in values.items():
                uses = counts.pop(dense.floats[name].get(attribute, value), 0)
                counts[float(value)] += uses
    return Numbers(
        floats,
        {new: dense.integers[name] for name, new in names.items()},
        {new: table for name, table in dense.tables.items() if (new := renumbered(name, kept)) is not None},
        used,
    )


def differences(wanted: Numbers, model: PreTrainedModel) -> tuple[Constants, str]:
    """Compare a slim skeleton with the numbers it must compute with.

    Args:
        wanted: as `expected` gives them.
        model: the skeleton, in float32; it stays as it is.

    Returns:
        The constants to set on it, and why that is not enough; empty if it is.

    Raises:
        CheckpointError: the class leaves a non-persistent buffer uninitialised.
    """
    found = numbers_of(model)
    constants: Constants = {}
    for name, values in found.floats.items():
        for attribute, value in values.items():
            target = wanted.floats.get(name, {}).get(attribute, value)
            if target != value:
                constants.setdefault(name, {})[attribute] = target
    for name, table in found.tables.items():
        dense = wanted.tables.get(name, table)
        if dense.shape == table.shape and not torch.equal(dense, table):
            return constants, f"{name} has other values than in the dense model"
    if wanted.used is None or found.used is None:
        return constants, ""
    slim = copy.deepcopy(model)
    apply_constants(slim, constants)
    used = _used(slim) if constants else found.used
    for name, foreign in _foreign(wanted, used).items():
        integers = wanted.integers.get(name, {})
        for attribute, value in found.integers[name].items():
            dense_value = integers.get(attribute, value)
            if dense_value == value:
                continue
            trial = copy.deepcopy(slim)
            apply_constants(trial, {name: {attribute: dense_value}})
            after = _used(trial)
            if after is not None and name not in _foreign(wanted, after):
                constants.setdefault(name, {})[attribute] = dense_value
                slim = trial
                break
        else:
            kind = type(model.get_submodule(name)).__name__
            return constants, (
                f"{name or 'the model'} ({kind}) computes with {foreign}, which is not in the dense model: the class "
                "derives it from a width or a position"
            )
    return constants, ""


def _foreign(wanted: Numbers, used: Mapping[str, Counter[float]] | None) -> dict[str, float]:
    """Modules whose own code uses a float more often than it shall, each with one of these."""
    foreign: dict[str, float] = {}
    for name, counts in (used or {}).items():
        extra = counts - (wanted.used or {}).get(name, Counter())
        if extra:
            foreign[name] = next(iter(extra))
    return foreign


def apply_constants(model: nn.Module, constants: Mapping[str, Mapping[str, float | int]]) -> None:
    """Set numbers on modules.

    Args:
        model: a model or a skeleton; on a skeleton scalar buffers have no value yet, so call it again once they do.
        constants: attributes and scalar buffers, which must exist and hold numbers.

    Raises:
        CheckpointError: there is no such module, or it has no such number.
    """
    for name, values in constants.items():
        for attribute, value in values.items():
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise CheckpointError(f"there is no module {name} to set {attribute} on") from error
            buffer = module._buffers.get(attribute)
            if buffer is not None and buffer.dim() == 0:
                buffer.fill_(value)
            elif type(vars(module).get(attribute)) is type(value):
                setattr(module, attribute, value)
            else:
                raise CheckpointError(f"{name} ({type(module).__name__}) has no number called {attribute}")


def epsilon_attributes(dense: PreTrainedModel, epsilons: Mapping[str, float], shapes: Mapping[str, Shape]) -> Constants:
    """Find the attribute in which each norm module holds its epsilon; the class decides its name.

    Args:
        dense: the dense skeleton.
        epsilons: the epsilon that each norm must have, by its dense name.
        shapes: slim shapes of the parameters, by dense name. Where a module has several float attributes, the one is
            taken whose value is the epsilon rescaled by the norm's widths.

    Raises:
        CheckpointError: there is no such module, or not exactly one such attribute.
    """
    before = {name: tuple(tensor.shape) for name, tensor in dense.state_dict(keep_vars=True).items()}
    found: Constants = {}
    for name, epsilon in epsilons.items():
        try:
            module = dense.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"epsilons: {type(dense).__name__} has no module {name}; give the names of the dense model's norms"
            ) from error
        values = _attributes(module, float)
        weight = f"{name}.weight"
        if len(values) > 1 and weight in before and weight in shapes:
            ratio = shapes[weight][-1] / before[weight][-1]
            values = {key: value for key, value in values.items() if abs(value - epsilon * ratio) <= 1e-6 * value}
        if len(values) != 1:
            raise CheckpointError(
                f"{name} ({type(module).__name__}) has {len(values)} attributes that may be its epsilon; leave the "
                "hidden dimension unpruned, or export the graph instead"
            )
        found[name] = dict.fromkeys(values, float(epsilon))
    return found


def find_float_fields(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, wanted: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Look for float fields that give modules the attributes they must have, and no other module another one.

    Args:
        model_class: the class.
        config: the dense configuration.
        wanted: for each module, its float attributes and the values they must have.

    Returns:
        Fields with their values; empty where no field serves. They need not give everything that is wanted.
    """
    dense = _float_attributes(build_skeleton(model_class, config))
    target = {(name, key): value for name, values in wanted.items() for key, value in values.items()}
    values = {value for key, value in target.items() if dense.get(key, value) != value}
    found: dict[str, float] = {}
    for name, old in fields_of(config):
        for value in values if type(old) is float else ():
            try:
                floats = _float_attributes(build_skeleton(model_class, config_with(config, {name: value})))
            except BUILD_ERRORS:
                continue  # the class refuses the value
            moved = {key: new for key, new in floats.items() if dense.get(key) != new}
            if moved and all(target.get(key) == new for key, new in moved.items()):
                found[name] = value
    return found


def float_changes(dense: PreTrainedModel, slim: PreTrainedModel) -> Constants:
    """The float attributes of a model's modules that differ from those of the modules of the same name in another."""
    before = _float_attributes(dense)
    changes: Constants = {}
    for (name, attribute), value in _float_attributes(slim).items():
        if before.get((name, attribute), value) != value:
            changes.setdefault(name, {})[attribute] = value
    return changes


def _float_attributes(model: PreTrainedModel) -> dict[tuple[str, str], float]:
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is float
    }
