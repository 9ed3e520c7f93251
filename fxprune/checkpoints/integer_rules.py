"""What the integers of an attention block may become when its projections shrink: candidates, not yet proved.

Which integer attributes a block reads is seen in a run of the dense class on the meta device. An attribute stays, or
it is scaled by the ratio of one axis (`24 / 48`), of the difference of two axes (keys and values of a fused
projection), or by a quotient of two such ratios (query heads for each key head). One rule holds for all blocks of a
kind, which differ in their layer only.
"""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fxprune.checkpoints.trial import runs_on_meta
from fxprune.models.skeleton import BUILD_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from fxprune.models.constants import Constants
    from fxprune.models.skeleton import Shape

__all__ = ["BlockKind", "Rule", "assigned", "block_kinds", "integers_read", "rules_of"]

_MAX_ATTRIBUTES = 4
_MAX_COST = 8

Rule = dict[str, tuple[int, ...]]
"""Attribute of a block, or of a child with a dot -> its new value in each block of the kind."""


@dataclass(frozen=True)
class BlockKind:
    """Blocks that differ in their layer only.

    Attributes:
        blocks: qualified names of those whose projections changed, in the model's order.
        values: for each attribute that may change, its value in each of the blocks.
        options: for each attribute, the values that it may get in each of the blocks, with a cost.
        ratios: how far the first block shrank, by each measure.
    """

    blocks: tuple[str, ...]
    values: Mapping[str, tuple[int, ...]]
    options: Mapping[str, tuple[tuple[int, tuple[int, ...]], ...]]
    ratios: tuple[Fraction, ...]


def integers_read(
    model: PreTrainedModel, names: Iterable[str], inputs: Mapping[str, Tensor]
) -> dict[str, set[str]] | None:
    """Find out which integer attributes of some modules are read while a class runs, with any attention.

    Args:
        model: a skeleton that can run; it stays as it is.
        names: the modules.
        inputs: what to run, on any device.

    Returns:
        Names of attributes by qualified name of the module; None where the class cannot run on the meta device.
    """
    read: dict[str, set[str]] = {name: set() for name in names}
    return read if all(_reads(model, read, inputs, attention) for attention in ("", "eager")) else None


def _reads(model: PreTrainedModel, read: dict[str, set[str]], inputs: Mapping[str, Tensor], attention: str) -> bool:
    """Add what one run reads; False if the class does not run."""
    watched = copy.deepcopy(model)
    for name, names in read.items():
        _watch(watched.get_submodule(name), names)
    if attention:
        try:
            watched.set_attn_implementation(attention)
        except BUILD_ERRORS:
            return False
    return runs_on_meta(watched, inputs)


def _watch(module: nn.Module, read: set[str]) -> None:
    """Note every integer attribute of a module that is read from now on."""
    original = type(module)

    def get(self: nn.Module, name: str) -> Any:
        value = original.__getattribute__(self, name)
        if type(value) is int:
            read.add(name)
        return value

    module.__class__ = type(original.__name__, (original,), {"__getattribute__": get})


def block_kinds(model: PreTrainedModel, skeleton: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[BlockKind]:
    """The blocks with narrowed projections, and what their integers may become.

    Args:
        model: the model with the slim shapes.
        skeleton: the same model as its class built it, on the meta device.
        inputs: what shows which integers are read.

    Returns:
        The kinds, in the order of their first blocks.
    """
    before, after = _shapes(skeleton), _shapes(model)
    blocks: dict[tuple[str, type], list[str]] = {}
    for name, module in model.named_modules():
        narrowed = [
            child
            for child, _ in _linears(module)
            if before[f"{_dot(name)}{child}.weight"] != after[f"{_dot(name)}{child}.weight"]
        ]
        if narrowed:
            blocks.setdefault((re.sub(r"\d+", "#", name), type(module)), []).append(name)
    built = dict(skeleton.named_modules())  # some classes exchange modules while they run, as the length of text asks
    holders = [h for names in blocks.values() for name in names for h in _holders(model, name) if h in built]
    read = integers_read(skeleton, holders, inputs)
    kinds: list[BlockKind] = []
    for names in blocks.values():
        ratios = _ratios([_axes(model, name, before, after) for name in names])
        integers = [_integers(model, name, read) for name in names]
        common = [attribute for attribute in integers[0] if all(attribute in each for each in integers)]
        values = {attribute: tuple(each[attribute] for each in integers) for attribute in common}
        options = {attribute: found for attribute in common if (found := _options(values[attribute], ratios))}
        firsts = tuple(dict.fromkeys(ratio[0] for ratio in ratios if ratio[0] != 1))
        kinds.append(BlockKind(tuple(names), {attribute: values[attribute] for attribute in options}, options, firsts))
    return kinds


def _shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of everything, tied weights under all of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def _dot(name: str) -> str:
    return f"{name}." if name else ""


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)]


def _holders(model: nn.Module, block: str) -> list[str]:
    """A block and its direct children, without projections."""
    children = model.get_submodule(block).named_children()
    return [block, *(f"{_dot(block)}{name}" for name, child in children if not isinstance(child, nn.Linear | Conv1D))]


def _integers(model: nn.Module, block: str, read: Mapping[str, set[str]] | None) -> dict[str, int]:
    """Positive integers of a block and its children that the class reads."""
    return {
        f"{_dot(holder.removeprefix(block).removeprefix('.'))}{attribute}": value
        for holder in _holders(model, block)
        for attribute, value in vars(model.get_submodule(holder)).items()
        if type(value) is int and value > 0 and (read is None or attribute in read.get(holder, ()))
    }


def _axes(
    model: nn.Module, block: str, before: Mapping[str, Shape], after: Mapping[str, Shape]
) -> dict[tuple[str, int], tuple[int, int]]:
    """Old and new size of each axis of a block's projections."""
    return {
        (name, axis): sizes
        for name, _ in _linears(model.get_submodule(block))
        for axis, sizes in enumerate(
            zip(before[f"{_dot(block)}{name}.weight"], after[f"{_dot(block)}{name}.weight"], strict=True)
        )
    }


def _ratios(blocks: Sequence[Mapping[tuple[str, int], tuple[int, int]]]) -> dict[tuple[Fraction, ...], int]:
    """How far the blocks shrank, one ratio a block, by every measure; with the measure's cost."""
    common = [key for key in blocks[0] if all(key in axes for axes in blocks)]
    moved = [key for key in common if any(axes[key][0] != axes[key][1] for axes in blocks)]
    sizes = [[axes[key] for axes in blocks] for key in moved]
    whole = [
        [(a[0] - b[0], a[1] - b[1]) for a, b in zip(first, second, strict=True)] for first in sizes for second in sizes
    ]
    ratios: dict[tuple[Fraction, ...], int] = {}
    for cost, measures in ((0, sizes), (1, whole)):
        for measure in measures:
            if all(old > 0 and new > 0 for old, new in measure):
                ratios.setdefault(tuple(Fraction(new, old) for old, new in measure), cost)
    base = dict(ratios)
    for (first, cost), (second, other) in itertools.permutations(base.items(), 2):
        ratios.setdefault(tuple(a / b for a, b in zip(first, second, strict=True)), 1 + cost + other)
    return {ratio: cost for ratio, cost in ratios.items() if any(part != 1 for part in ratio)}


def _options(
    values: Sequence[int], ratios: Mapping[tuple[Fraction, ...], int]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The whole numbers that scaling gives, cheapest first."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for ratio, cost in ratios.items():
        scaled = [value * part for value, part in zip(values, ratio, strict=True)]
        if all(value.denominator == 1 for value in scaled):
            found.append((1 + cost, tuple(int(value) for value in scaled)))
    return tuple(sorted(found))


def rules_of(kind: BlockKind) -> Iterator[Rule]:
    """Every rule for a kind of block, the smallest change first, beginning with none."""
    for cost in range(_MAX_COST + 1):
        for count in range(min(cost, len(kind.options), _MAX_ATTRIBUTES) + 1):
            for attributes in itertools.combinations(kind.options, count):
                for chosen in itertools.product(*(kind.options[attribute] for attribute in attributes)):
                    if sum(each for each, _ in chosen) == cost:
                        yield {name: values for name, (_, values) in zip(attributes, chosen, strict=True)}


def assigned(kind: BlockKind, rule: Rule) -> Constants:
    """A rule as numbers of modules."""
    constants: Constants = {}
    for attribute, values in rule.items():
        child, _, name = attribute.rpartition(".")
        for block, value in zip(kind.blocks, values, strict=True):
            constants.setdefault(f"{block}.{child}" if child else block, {})[name] = value
    return constants
