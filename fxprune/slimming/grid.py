"""What stays of a value when channels go: positions that pack into a smaller tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.core.errors import UnsupportedOpError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fxprune.channels.call import Call
    from fxprune.core.channel_ids import IdArray

__all__ = ["Grid", "Scaled", "full_grid", "grid_of", "new_sizes", "take"]


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


def new_sizes(sizes: Sequence[Any], extents: Sequence[int], value_of: Callable[[torch.fx.Node], Any]) -> list[Any]:
    """Replace sizes by the new extents; -1, and numbers that have the new value already, follow by themselves."""
    new_sizes: list[Any] = []
    for size, new in zip(sizes, extents, strict=True):
        if isinstance(size, torch.fx.Node):
            old = value_of(size)
            new_sizes.append(size if old == new else Scaled(size, old, new))
        else:
            new_sizes.append(size if size == -1 else new)
    return new_sizes
