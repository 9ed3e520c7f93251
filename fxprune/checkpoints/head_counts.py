"""Integers that attention computes with and no configuration field gives a layer: found by search, proved by a result.

    dense   c_attn (48 -> 144)   split_size 48    num_heads 6    c_proj (48 -> 48)
    slim    c_attn (48 ->  72)   split_size  ?    num_heads ?    c_proj (24 -> 48)

A class such as GPT-2's takes head counts and split sizes from attributes that its constructor derived from the dense
widths. Rules for new values (`fxprune.checkpoints.integer_rules`) are tried the smallest change first, on the blocks
alone with the inputs that these really get; those with which they run are then tried on the whole model, and the first
is taken with which the model gives the expected logits. Shapes alone would not do: half as many heads and heads of half
the size have the same.
"""

from __future__ import annotations

import inspect
import itertools
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.checkpoints.integer_rules import assigned, block_kinds, rules_of
from fxprune.checkpoints.trial import cannot_run, relative_error, tolerance_of, wrong_result
from fxprune.core.errors import CheckpointError
from fxprune.models.constants import apply_constants
from fxprune.models.skeleton import BUILD_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from fxprune.checkpoints.integer_rules import BlockKind, Rule
    from fxprune.checkpoints.trial import ExpectedLogits
    from fxprune.models.constants import Constants

__all__ = ["find_head_counts"]

_MAX_TRIALS = 2000
_MAX_RULES = 12
_MAX_PROOFS = 24

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _ReachedError(Exception):
    """A block was entered whose inputs were wanted."""


def find_head_counts(
    model: PreTrainedModel, skeleton: PreTrainedModel, expected: ExpectedLogits, *, search: bool = True
) -> Constants:
    """Look for integers with which a rebuilt model gives the expected logits.

    Args:
        model: the model with the slim weights, in the dtype of the reference; it has the integers afterwards.
        skeleton: the same model as its class built it, before projections were narrowed, on the meta device.
        expected: inputs, and the logits to reproduce.
        search: whether to try any; else the model must be right as it is.

    Returns:
        The integers to set, by module and attribute: empty if the model is right as it is.

    Raises:
        CheckpointError: the model runs with none of the integers tried, or none gives the expected logits. The message
            names the block, or the error of the best.
    """
    allowed = tolerance_of(model)
    best, failure = _attempt(model, skeleton, expected)
    if best <= allowed:
        return {}
    kinds = block_kinds(model, skeleton, expected.inputs) if search else []
    kinds = [_without(kind, expected.fixed) for kind in kinds]
    rules: list[list[Rule]] = []
    calls: list[_Call | None] = []
    with ExitStack() as stack:
        for kind in kinds:
            calls.append(_captured(model, kind.blocks[0], expected))
            rules.append(_rules_that_run(model, kind, calls[-1]))
            stack.enter_context(_numbers(model, assigned(kind, rules[-1][0])))  # so that the next kind is reached
    for choice in itertools.islice(_by_rank(rules), _MAX_PROOFS):
        constants: Constants = {}
        for kind, rule in zip(kinds, choice, strict=True):
            for name, values in assigned(kind, rule).items():
                constants.setdefault(name, {}).update(values)
        with _numbers(model, constants):
            error, _ = _attempt(model, skeleton, expected)
        if error <= allowed:
            apply_constants(model, constants)
            return constants
        best = min(best, error)
    for kind, call in zip(kinds, calls, strict=True):
        if call is not None:
            _refuse_per_head_arguments(model, kind, call)
    if failure is not None and math.isinf(best):
        raise failure
    raise wrong_result(model, best, "numbers that follow from its slim shapes")


def _without(kind: BlockKind, fixed: frozenset[int]) -> BlockKind:
    """The kind without attributes that must keep their value."""
    options = {name: each for name, each in kind.options.items() if not fixed.intersection(kind.values[name])}
    return replace(kind, options=options)


def _attempt(
    model: PreTrainedModel, skeleton: PreTrainedModel, expected: ExpectedLogits
) -> tuple[float, CheckpointError | None]:
    """The relative error; infinite where the model does not run, with the error to raise."""
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: entered.append(name))
        for name, module in model.named_modules()
    ]
    try:
        return relative_error(model, expected), None
    except BUILD_ERRORS as error:
        dense = dict(skeleton.named_parameters())
        changed = [
            name for name, each in model.named_parameters() if name not in dense or each.shape != dense[name].shape
        ]
        return math.inf, cannot_run(model, entered[-1] if entered else "", changed, error)
    finally:
        for hook in hooks:
            hook.remove()


def _captured(model: PreTrainedModel, block: str, expected: ExpectedLogits) -> _Call | None:
    """The arguments that a block gets; None if it is not reached."""
    found: list[_Call] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _ReachedError

    hook = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        relative_error(model, expected)
    except (_ReachedError, *BUILD_ERRORS):
        pass
    finally:
        hook.remove()
    return found[0] if found else None


def _rules_that_run(model: PreTrainedModel, kind: BlockKind, call: _Call | None) -> list[Rule]:
    """The smallest rules with which the blocks of a kind run; where there are none, the one that changes nothing."""
    if call is None:
        return [{}]
    # Blocks of one kind get arguments of one shape, and one of those that shrank alike tells for all of them.
    shrunk = zip(*(values for options in kind.options.values() for _, values in options), strict=True)
    alike = {values: place for place, values in enumerate(shrunk)}
    running = list(itertools.islice(_running(model, kind, call, sorted(alike.values())), _MAX_RULES))
    return running or list(itertools.islice(_running(model, kind, call, [0]), _MAX_RULES)) or [{}]


def _running(model: PreTrainedModel, kind: BlockKind, call: _Call, places: Sequence[int]) -> Iterator[Rule]:
    """Rules with which all the given blocks of a kind run on the same arguments; they stay unset."""
    for rule in itertools.islice(rules_of(kind), _MAX_TRIALS):
        with _numbers(model, assigned(kind, rule)), torch.no_grad():
            try:
                for place in places:
                    model.get_submodule(kind.blocks[place])(*call[0], **call[1])
            except BUILD_ERRORS:
                continue
        yield rule


def _refuse_per_head_arguments(model: PreTrainedModel, kind: BlockKind, call: _Call) -> None:
    """Raise if another rule would run with fewer rows of one argument: a position bias of all the class's heads."""
    name = kind.blocks[0]
    module = model.get_submodule(name)
    before = list(_running(model, kind, call, [0]))
    known = {(kind.values[key][0], new[0]) for key, options in kind.options.items() for _, new in options}
    for argument, tensor in _tensors(module, call):
        rows = {(size, size * ratio) for size in tensor.shape[:-2] for ratio in kind.ratios}
        counts = sorted(known) + sorted((size, int(new)) for size, new in rows if new.denominator == 1)
        for old, new in counts:
            for fewer in _with_fewer_rows(tensor, old, new):
                args = tuple(fewer if value is tensor else value for value in call[0])
                kwargs = {key: fewer if value is tensor else value for key, value in call[1].items()}
                if any(rule not in before for rule in _running(model, kind, (args, kwargs), [0])):
                    raise CheckpointError(
                        f"{name}: {type(module).__name__} gets `{argument}` with a row for each of {old} heads, which "
                        f"{type(model).__name__} computes once for all layers and for its dense number of heads; a "
                        f"layer with {new} heads needs the rows of those that it kept, and the class cannot represent "
                        "that. Leave the heads unpruned, or export to ONNX, where these rows are selected"
                    )


def _tensors(module: nn.Module, call: _Call) -> list[tuple[str, Tensor]]:
    """The tensors among the arguments of a module, by name."""
    bound = inspect.signature(module.forward).bind(*call[0], **call[1]).arguments
    named = [*bound.items(), *call[1].items()]
    return list({name: value for name, value in named if isinstance(value, torch.Tensor)}.items())


def _with_fewer_rows(tensor: Tensor, old: int, new: int) -> Iterator[Tensor]:
    """A tensor with the first `new` of `old` rows, along each axis that has as many, or as many for each sequence."""
    for axis, size in enumerate(tensor.shape[:-2]) if new < old else ():
        if size % old == 0:
            rows = torch.arange(size, device=tensor.device).reshape(-1, old)[:, :new].flatten()
            yield tensor.index_select(axis, rows)


def _by_rank(rules: Sequence[Sequence[Rule]]) -> Iterator[tuple[Rule, ...]]:
    """One rule for each kind, the smallest changes first."""
    for rank in range(sum(len(each) - 1 for each in rules) + 1):
        for places in itertools.product(*(range(min(len(each), rank + 1)) for each in rules)):
            if sum(places) == rank:
                yield tuple(each[place] for each, place in zip(rules, places, strict=True))


@contextmanager
def _numbers(model: nn.Module, constants: Constants) -> Iterator[None]:
    """Integers of modules, as long as the context lasts."""
    before: Constants = {
        name: {attribute: getattr(model.get_submodule(name), attribute) for attribute in values}
        for name, values in constants.items()
    }
    try:
        apply_constants(model, constants)
        yield
    finally:
        apply_constants(model, before)
