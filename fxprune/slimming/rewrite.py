"""Rewriting operators of a slimmed graph: which constants follow from the elements of a value that stay.

A movement operator's new constants are those for which `op(new input)` is the old output with the removed elements
dropped. They are counts of what is kept; each rewrite is checked by running the operator on position numbers, so a
wrong constant is an error, never a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.call import run_movement
from fxprune.core.errors import UnsupportedOpError
from fxprune.slimming.grid import Grid, Scaled, new_sizes
from fxprune.slimming.other_movement import OTHER_MOVEMENT, other_candidates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.channels.call import Call

__all__ = ["rewrite_movement"]

aten = torch.ops.aten


_SIZES: frozenset[Any] = frozenset({
    aten.view.default, aten.view_copy.default, aten._unsafe_view.default, aten.reshape.default,
    aten._reshape_copy.default, aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default,
})  # fmt: skip
"""Operators whose second argument is the shape of the result."""

_SLICES = {aten.slice.Tensor, aten.slice_copy.Tensor, aten.slice_scatter.default}


def _new_bounds(call: Call, source: Grid, args: list[Any]) -> list[Any]:
    """Arguments of a slice whose bounds are counts of what stays before the old ones."""
    dim = call.argument("dim", 0) % len(source.shape)
    size = source.shape[dim]
    if source.new_shape[dim] == size:
        return args
    start, end = call.argument("start", None), call.argument("end", None)
    start, end = 0 if start is None else start, size if end is None else end
    start, end = (max(0, bound + size) if bound < 0 else min(bound, size) for bound in (start, end))
    leading = args[: 2 if call.node.target is aten.slice_scatter.default else 1]
    bounds = [source.count_before(dim, start), source.count_before(dim, end)]
    return [*leading, dim, *bounds, *args[len(leading) + 3 :]]


def _candidates(
    call: Call, source: Grid, outputs: Sequence[Grid], value_of: Callable[[torch.fx.Node], Any]
) -> tuple[Any, list[Any]]:
    """New target and positional arguments of a movement operator, to be checked by the caller."""
    target, args = call.node.target, list(call.node.args)
    if target in OTHER_MOVEMENT:
        return other_candidates(call, source, outputs, value_of)
    if target in _SIZES:
        args[1] = new_sizes(args[1], outputs[0].new_shape, value_of)  # type: ignore[arg-type]
    if target in _SLICES:
        args = _new_bounds(call, source, args)
    return target, args


def rewrite_movement(
    call: Call, operands: dict[torch.fx.Node, Grid], outputs: Sequence[Grid], numbers: dict[torch.fx.Node, int]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Rewrite a movement operator for operands of which only a grid stays.

    Args:
        call: the old call.
        operands: the grid of each tensor operand.
        outputs: the grid of each result.
        numbers: new values of nodes that hold numbers, where they changed.

    Returns:
        Target, arguments and keyword arguments; the arguments name old nodes, and `Scaled` numbers.

    Raises:
        UnsupportedOpError: no constants make the operator produce what stays of its old result.
    """
    node = call.node
    if all(grid.full for grid in (*operands.values(), *outputs)):
        return node.target, node.args, node.kwargs

    def value_of(number: torch.fx.Node) -> Any:
        return numbers.get(number, call.value_of(number))

    target, args = _candidates(call, next(iter(operands.values())), outputs, value_of)
    positions: dict[torch.fx.Node, Tensor] = {}
    offset = 1
    for operand, grid in operands.items():
        count = int(np.prod(grid.shape))
        positions[operand] = torch.arange(offset, offset + count).reshape(grid.shape)
        offset += count

    def old(argument: torch.fx.Node) -> Any:
        value = call.value_of(argument)
        if isinstance(value, Tensor) and argument not in positions:  # an empty part of a concatenation
            return torch.zeros(0, dtype=torch.int64)
        return positions.get(argument, value)

    def new(argument: Any) -> Any:
        if isinstance(argument, Scaled):
            return argument.new
        if not isinstance(argument, torch.fx.Node):
            return argument
        if argument in positions:
            return operands[argument].narrow(positions[argument])
        return old(argument) if isinstance(call.value_of(argument), Tensor) else value_of(argument)

    expected = run_movement(node.target, *torch.fx.node.map_arg((node.args, node.kwargs), old))
    expected = expected if isinstance(expected, list) else [expected]
    kwargs = {} if target is not node.target else dict(node.kwargs)
    try:
        result = run_movement(target, *torch.fx.node.map_aggregate((tuple(args), kwargs), new))
    except (RuntimeError, IndexError) as error:
        raise _no_constants(call, operands, outputs) from error
    result = result if isinstance(result, list) else [result]
    same = len(result) == len(expected) and all(
        torch.equal(mine, grid.narrow(theirs)) for mine, theirs, grid in zip(result, expected, outputs, strict=True)
    )
    if not same:
        raise _no_constants(call, operands, outputs)
    return target, tuple(args), kwargs


def _no_constants(call: Call, operands: dict[torch.fx.Node, Grid], outputs: Sequence[Grid]) -> UnsupportedOpError:
    shapes = [f"{grid.shape} -> {grid.new_shape}" for grid in operands.values()]
    wanted = [f"{grid.shape} -> {grid.new_shape}" for grid in outputs]
    return UnsupportedOpError(
        f"{call.op} in {call.module or 'the model'} (node {call.node.name}): no constants turn operands "
        f"{', '.join(shapes)} into {', '.join(wanted)}; keep these units, or add a rewrite for {call.node.target}"
    )
