"""New constants of movement operators other than views, expansions and slices: repeats, splits, rolls, ...

Whatever is proposed here, `fxprune.slimming.rewrite` runs on position numbers before it is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.slimming.grid import new_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.channels.call import Call
    from fxprune.slimming.grid import Grid

__all__ = ["OTHER_MOVEMENT", "other_candidates"]

aten = torch.ops.aten


def _new_shifts(call: Call, source: Grid) -> list[int]:
    """How far the axes of a `roll` go round: by as many positions as stay of those that come round."""
    shifts = []
    for shift, dim in zip(call.int_list_argument(1, "shifts"), call.int_list_argument(2, "dims"), strict=True):
        size, new = source.shape[dim], source.new_shape[dim]
        shifts.append(shift if size == new else new - source.count_before(dim % len(source.shape), -shift % size))
    return shifts


_SPLITS: dict[Any, int | None] = dict.fromkeys(
    (
        aten.split.Tensor, aten.split.default, aten.split.sizes, aten.split_copy.Tensor, aten.unsafe_split.Tensor,
        aten.split_with_sizes.default, aten.split_with_sizes_copy.default, aten.unsafe_split_with_sizes.default,
        aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices,
    )
) | {aten.vsplit.int: 0, aten.vsplit.array: 0, aten.dsplit.int: 2, aten.dsplit.array: 2}  # fmt: skip
"""Operators that cut an axis into parts, and the axis where no argument says it."""


_REPEATS = {aten.repeat.default, aten.tile.default}
_SELECTS = {aten.select.int, aten.select_copy.int, aten.select_scatter.default}
_NARROWS = {aten.narrow.default, aten.narrow_copy.default}
_SINGLE = {aten.repeat_interleave.self_int, aten.unflatten.int, aten.roll.default}
OTHER_MOVEMENT: frozenset[Any] = frozenset(_REPEATS | _SELECTS | _NARROWS | _SINGLE | set(_SPLITS))
"""Operators that `other_candidates` knows; the arguments of any other movement hold for what stays as they are."""


def other_candidates(
    call: Call, source: Grid, outputs: Sequence[Grid], value_of: Callable[[torch.fx.Node], Any]
) -> tuple[Any, list[Any]]:
    """New target and positional arguments of a movement operator, to be checked by the caller."""
    args: list[Any] = list(call.node.args)
    target: Any = call.node.target
    out = outputs[0]
    if target in _REPEATS:
        padded = (1,) * (len(out.shape) - len(source.shape)) + source.new_shape
        args[1] = [
            new // old if isinstance(size, int) else size
            for size, new, old in zip(args[1], out.new_shape, padded, strict=True)
        ]
    elif target is aten.repeat_interleave.self_int:
        dim = call.int_argument(2, "dim", 0) % len(source.shape)
        args[1] = out.new_shape[dim] // source.new_shape[dim]
    elif target is aten.unflatten.int:
        dim = call.int_argument(1, "dim", 0) % len(source.shape)
        args[2] = new_sizes(args[2], out.new_shape[dim : dim + len(args[2])], value_of)
    elif target in _SELECTS:
        leading = args[: 2 if target is aten.select_scatter.default else 1]
        dim, index = call.argument("dim") % len(source.shape), call.argument("index")
        args = [*leading, dim, source.count_before(dim, index % source.shape[dim])]
    elif target is aten.roll.default:
        args[1] = _new_shifts(call, source)
    elif target in _NARROWS:
        dim, start, length = (call.int_argument(position, "", 0) for position in (1, 2, 3))
        dim %= len(source.shape)
        first = source.count_before(dim, start)
        args = [args[0], dim, first, source.count_before(dim, start + length) - first]
    elif target in _SPLITS:
        fixed = _SPLITS[target]
        dim = call.argument("dim", 0) % len(source.shape) if fixed is None else fixed
        target = aten.split_with_sizes.default
        args = [args[0], [grid.new_shape[dim] for grid in outputs], dim]
    return target, args
