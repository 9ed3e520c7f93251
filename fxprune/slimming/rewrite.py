"""Rewriting operators of a slimmed graph: which elements of a value stay, and which constants follow.

What stays of a value must pack into a tensor. A movement operator's new constants are
those for which `op(new input)` is the old output with the removed elements dropped. They are counts of what is kept;
each rewrite is checked by running the operator on position numbers, so a wrong constant is an error, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.call import run_movement
from fxprune.core.errors import UnsupportedOpError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fxprune.channels.call import Call
    from fxprune.core.channel_ids import IdArray

__all__ = ["Grid", "Scaled", "full_grid", "grid_of", "rewrite_movement", "take"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Grid:
    """What stays of a value, packed into a smaller tensor.

    What stays must pack: every kept index of an axis keeps equally many indices of the next. Which ones may differ,
    as when each KV head keeps other query heads.

    Attributes:
        shape: the old shape.
        mask: which elements stay, of the old shape; None for all.
        new_shape: the shape of what stays.
    """

    shape: tuple[int, ...]
    mask: NDArray[np.bool_] | None
    new_shape: tuple[int, ...]

    @property
    def full(self) -> bool:
        """Whether everything stays."""
        return self.mask is None

    def narrow(self, tensor: Tensor) -> Tensor:
        """Take what stays of a tensor of the old shape."""
        if self.mask is None:
            return tensor
        return tensor[torch.from_numpy(self.mask).to(tensor.device)].reshape(self.new_shape)

    def count_before(self, axis: int, position: int) -> int:
        """How many positions before `position` stay along an axis; -1 when that depends on the axes before it."""
        if self.mask is None:
            return min(position, self.shape[axis])
        line = np.asarray(self.mask.any(axis=tuple(range(axis + 1, self.mask.ndim))))
        counts = np.unique(line[..., :position].sum(-1)[line.any(-1)])
        return int(counts[0]) if len(counts) == 1 else -1

    def line(self, axis: int) -> IdArray | None:
        """The kept positions of an axis; None for all of them.

        Raises:
            ValueError: which positions stay depends on the other axes.
        """
        if self.mask is None or self.shape[axis] == self.new_shape[axis]:
            return None
        kept = self.mask.any(axis=tuple(other for other in range(self.mask.ndim) if other != axis))
        if int(kept.sum()) != self.new_shape[axis]:
            raise ValueError(f"axis {axis} of shape {self.shape} keeps different positions in different places")
        return np.flatnonzero(kept)

    def ragged(self, axis: int) -> bool:
        """Whether an axis keeps different positions in different places."""
        if self.mask is None:
            return False
        kept = self.mask.any(axis=tuple(other for other in range(self.mask.ndim) if other != axis))
        return int(kept.sum()) != self.new_shape[axis]

    def select(self, axis: int, kept: IdArray) -> Grid:
        """The grid that keeps only some positions of an axis of what stays here."""
        mask = np.ones(self.shape, dtype=bool) if self.mask is None else self.mask
        line = np.zeros(self.shape[axis], dtype=bool)
        line[kept] = True
        shape = [1] * len(self.shape)
        shape[axis] = -1
        new_shape = (*self.new_shape[:axis], len(kept), *self.new_shape[axis + 1 :])
        return Grid(self.shape, mask & line.reshape(shape), new_shape)


def full_grid(shape: Sequence[int]) -> Grid:
    """The grid that keeps everything."""
    return Grid(tuple(shape), None, tuple(shape))


def take(tensor: Tensor, kept: Sequence[IdArray | None]) -> Tensor:
    """Take the kept positions of each axis of a parameter, in a contiguous tensor of its own."""
    for axis, positions in enumerate(kept):
        if positions is not None:
            tensor = tensor.index_select(axis, torch.as_tensor(positions, device=tensor.device))
    return tensor.contiguous()


def grid_of(call: Call, ids: Tensor | None, keep: NDArray[np.bool_], shape: Sequence[int]) -> Grid:
    """What stays of a value whose elements carry `ids`.

    Raises:
        UnsupportedOpError: what stays does not pack, so no tensor can hold it.
    """
    if ids is None or 0 in shape:
        return full_grid(shape)
    stays = keep[ids.numpy()]
    if stays.all():
        return full_grid(shape)
    new_shape = []
    for axis in range(stays.ndim):
        line = stays.any(axis=tuple(range(axis + 1, stays.ndim)))
        counts = np.unique(line.sum(-1)[line.any(-1)])
        new_shape.append(int(counts[0]) if len(counts) == 1 else 0)
    if int(stays.sum()) != int(np.prod(new_shape)) or 0 in new_shape:
        raise UnsupportedOpError(
            f"{call.op} in {call.module or 'the model'} (node {call.node.name}): what the plan keeps of this value of "
            f"shape {tuple(shape)} does not pack into a tensor; keep the same number of units in every part"
        )
    return Grid(tuple(shape), stays, tuple(new_shape))


@dataclass(frozen=True)
class Scaled:
    """A number computed in the graph that must become another: batch times heads, where heads went.

    Attributes:
        node: the old graph's number.
        old: its value in the sample.
        new: the value it must have.
    """

    node: torch.fx.Node
    old: int
    new: int


def _new_sizes(sizes: Sequence[Any], extents: Sequence[int], value_of: Callable[[torch.fx.Node], Any]) -> list[Any]:
    """Replace sizes by the new extents; -1, and numbers that have the new value already, follow by themselves."""
    new_sizes: list[Any] = []
    for size, new in zip(sizes, extents, strict=True):
        if isinstance(size, torch.fx.Node):
            old = value_of(size)
            new_sizes.append(size if old == new else Scaled(size, old, new))
        else:
            new_sizes.append(size if size == -1 else new)
    return new_sizes


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


def _new_shifts(call: Call, source: Grid) -> list[int]:
    """How far the axes of a `roll` go round: by as many positions as stay of those that come round."""
    shifts = []
    for shift, dim in zip(call.int_list_argument(1, "shifts"), call.int_list_argument(2, "dims"), strict=True):
        size, new = source.shape[dim], source.new_shape[dim]
        shifts.append(shift if size == new else new - source.count_before(dim % len(source.shape), -shift % size))
    return shifts


_SIZES: frozenset[Any] = frozenset({
    aten.view.default, aten.view_copy.default, aten._unsafe_view.default, aten.reshape.default,
    aten._reshape_copy.default, aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default,
})  # fmt: skip
"""Operators whose second argument is the shape of the result."""

_SPLITS: dict[Any, int | None] = dict.fromkeys(
    (
        aten.split.Tensor, aten.split.default, aten.split.sizes, aten.split_copy.Tensor, aten.unsafe_split.Tensor,
        aten.split_with_sizes.default, aten.split_with_sizes_copy.default, aten.unsafe_split_with_sizes.default,
        aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices,
    )
) | {aten.vsplit.int: 0, aten.vsplit.array: 0, aten.dsplit.int: 2, aten.dsplit.array: 2}  # fmt: skip
"""Operators that cut an axis into parts, and the axis where no argument says it."""


def _candidates(
    call: Call, source: Grid, outputs: Sequence[Grid], value_of: Callable[[torch.fx.Node], Any]
) -> tuple[Any, list[Any]]:
    """New target and positional arguments of a movement operator, to be checked by the caller."""
    args: list[Any] = list(call.node.args)
    target: Any = call.node.target
    out = outputs[0]
    if target in _SIZES:
        args[1] = _new_sizes(args[1], out.new_shape, value_of)
    elif target in {aten.repeat.default, aten.tile.default}:
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
        args[2] = _new_sizes(args[2], out.new_shape[dim : dim + len(args[2])], value_of)
    elif target in {aten.slice.Tensor, aten.slice_copy.Tensor, aten.slice_scatter.default}:
        args = _new_bounds(call, source, args)
    elif target in {aten.select.int, aten.select_copy.int, aten.select_scatter.default}:
        leading = args[: 2 if target is aten.select_scatter.default else 1]
        dim, index = call.argument("dim") % len(source.shape), call.argument("index")
        args = [*leading, dim, source.count_before(dim, index % source.shape[dim])]
    elif target is aten.roll.default:
        args[1] = _new_shifts(call, source)
    elif target in {aten.narrow.default, aten.narrow_copy.default}:
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
