"""What a slim graph needs beside narrower projections, mostly in models that are no plain decoders.

    selection      an operand keeps more than the result does: rows of it are selected
    counts         `histc`, `one_hot`, groups of a convolution: as many as channels stay
    sizes          batch times 6 heads becomes batch times 4
    norms          the epsilon of an RMS norm over fewer channels

`fxprune.slimming.builder.GraphBuilder` is this writer and calls it where a graph has such a thing.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fxprune.core.errors import PlanError
from fxprune.slimming.writer import Writer, line_of, unclear
from fxprune.tracing.unit_masks import ExpertChannelMask, LayerGate

if TYPE_CHECKING:
    from fxprune.channels.call import Call
    from fxprune.core.channel_ids import IdArray
    from fxprune.slimming.grid import Grid
    from fxprune.tracing.masks import UnitMask

__all__ = ["SelectingWriter", "narrow_experts"]

aten = torch.ops.aten


class SelectingWriter(Writer):
    """Writes nodes of a new graph whose operands keep different units, or whose arguments count channels."""

    def _other_mask(self, call: Call, mask: UnitMask, source: Node) -> Any:
        """A mask of experts, their channels or a layer disappears; these cannot be soft."""
        if isinstance(mask, LayerGate):
            if float(mask.mask) not in {0.0, 1.0}:
                raise PlanError(f"{call.node.target}: a layer is in or out, its gate is {float(mask.mask):.3g}")
            return self._operand(source if float(mask.mask) == 0 else call.node.args[1])
        if isinstance(mask, ExpertChannelMask) and not bool(((mask.mask == 0) | (mask.mask == 1)).all()):
            raise PlanError(f"{call.node.target}: soft gates of expert channels cannot be folded; round them")
        return self.new[source]

    def _make_contiguous(self, node: Node) -> None:
        """Numbers become complex in pairs: a part of a narrower tensor may lie at odd addresses."""
        with self.graph.inserting_before(node):
            node.args = (self.graph.call_function(aten.contiguous.default, node.args),)

    def _rescale(self, node: Node, grid: Grid) -> None:
        """Give an RMS norm over fewer channels the epsilon that keeps it exact, and its normalised shape."""
        args = list(node.args)
        epsilon = self.cut.epsilons[self.call.node.name] if self.call is not None else 0.0
        if node.target is aten.rms_norm.default:
            args = [args[0], [grid.new_shape[-1]], args[2], epsilon]
        else:
            args = [epsilon if isinstance(argument, float) else argument for argument in args]
        node.args = tuple(args)

    def _count(self, call: Call, grid: Grid) -> Node:
        """`histc` and `one_hot` over numbers of channels: as many bins as channels stay."""
        node = call.node
        args, target = list(node.args), node.target
        assert callable(target)
        if not grid.full:
            old, new = grid.shape[-1], grid.new_shape[-1]
            if node.target is aten.histc.default and args[1:] != [old, 0, old - 1]:
                raise unclear(call, f"its bins {args[1:]} are not one for each of {old} channels")
            args[1:] = [new, 0, new - 1] if node.target is aten.histc.default else [new]
        return self.graph.call_function(target, self._mapped(tuple(args)), self._mapped(node.kwargs))

    def _convolution(self, call: Call) -> Node:
        """A convolution of groups: as many stay as the channels that stay fill (one each, of a filter a channel)."""
        node, x = self._copy(call.node), call.tensor_nodes()[0]
        weight = call.parameter(1)
        if weight is not None and call.argument("groups", 1) > 1:
            arguments = call.node.target._schema.arguments  # type: ignore[union-attr]
            rest = arguments[len(node.args) :]
            given = [*node.args, *(node.kwargs.get(argument.name, argument.default_value) for argument in rest)]
            position = [argument.name for argument in arguments].index("groups")
            channels = self.grid(x).new_shape[1 - len(weight.shape)]
            if channels % weight.shape[1]:
                raise unclear(call, f"{channels} channels do not fill groups of {weight.shape[1]}")
            given[position] = channels // weight.shape[1]
            node.args, node.kwargs = tuple(given), {}
        return node

    def _selection(self, call: Call, out: Grid) -> Node:
        """Constant positions along an axis: those of what stays, counted among what stays of the source."""
        node = self._copy(call.node)
        source, axis, positions = call.tensor_nodes()[0], call.argument("dim"), call.constant(call.node.args[2])
        mine = self.grid(source)
        axis %= len(mine.shape)
        if mine.new_shape[axis] == mine.shape[axis] and out.new_shape[axis] == out.shape[axis]:
            return node
        if positions is None:
            raise unclear(call, "its positions are computed")
        stays, kept = (line_of(call, grid, axis) for grid in (mine, out))
        picked = positions.numpy() if kept is None else positions.numpy()[kept]
        name = f"_kept_{call.node.name}_positions"
        new = picked if stays is None else np.searchsorted(stays, picked)
        self.tensors[name] = torch.as_tensor(new, device=self._device())
        with self.graph.inserting_before(node):
            node.args = (node.args[0], axis, self.graph.get_attr(name))
        return node

    def _scaled(self, call: Call, number: Node, old: int, new: int) -> Node:
        """A number like an old one but for a literal factor: batch times 6 heads becomes batch times 4."""
        if number.target is operator.mul:
            for literal, other in (number.args, number.args[::-1]):
                if isinstance(literal, int) and literal * new % old == 0:
                    return self.graph.call_function(operator.mul, (self._mapped(other), literal * new // old))
            for inner, other in (number.args, number.args[::-1]):
                if isinstance(inner, Node) and inner.target is operator.mul:
                    factor = self._scaled(call, inner, old, new)
                    return self.graph.call_function(operator.mul, (factor, self._mapped(other)))
        raise unclear(call, f"the computed size {number.name} has no literal factor that could turn {old} into {new}")

    def _select(self, operand: Node, lines: dict[int, IdArray | None]) -> Grid:
        """Narrow an operand to some of its old positions, for the node that is being written and no other."""
        key = (operand, *((axis, kept.tobytes()) for axis, kept in lines.items() if kept is not None))
        if key not in self.selections:
            grid, value = self.grid(operand), self.new[operand]
            for axis, kept in lines.items():
                if kept is None:
                    continue
                line = grid.line(axis)
                index = f"_kept_{operand.name}_{axis}_{len(self.selections)}"
                positions = kept if line is None else np.searchsorted(line, kept)
                value = self._index(value, axis, positions, index, _period(operand, axis))
                grid = grid.select(axis, kept)
            self.selections[key] = value, grid
        self.selected[operand] = self.selections[key]
        return self.selections[key][1]

    def _index(self, value: Any, axis: int, positions: IdArray, name: str, period: int | None) -> Node:
        """Select positions of an axis; where it is batch times heads, the same heads of every row of the batch."""
        call = self.graph.call_function
        if period is None:
            self.tensors[name] = torch.as_tensor(positions, device=self._device())
            return call(aten.index_select.default, (value, axis, self.graph.get_attr(name)))
        rows = positions.reshape(-1, max(1, int((positions < period).sum())))
        if period == 1 or not np.array_equal(rows, rows[:1] + period * np.arange(len(rows))[:, None]):
            assert self.call is not None
            raise unclear(self.call, f"it would keep fixed positions of axis {axis}, whose length may change")
        self.tensors[name] = torch.as_tensor(rows[0], device=self._device())
        split = call(aten.unflatten.int, (value, axis, [-1, period]))
        chosen = call(aten.index_select.default, (split, axis + 1, self.graph.get_attr(name)))
        return call(aten.flatten.using_ints, (chosen, axis, axis + 1))

    def _device(self) -> torch.device:
        return next(iter(self.interface.example_inputs.values())).device


def _period(node: Node, axis: int) -> int | None:
    """The literal factor of an axis whose length may change (heads, in batch times heads); None for a fixed length."""
    value = node.meta.get("val")
    size: Any = value.shape[axis] if isinstance(value, Tensor) else None
    if not isinstance(size, torch.SymInt) or is_concrete_int(size):
        return None
    expression = size.node.expr  # such as 6*s, but also 6*s//s, which never changes
    symbols = sorted(expression.free_symbols, key=str)
    lengths = {expression.subs({s: 7 * number + 4 * index for index, s in enumerate(symbols)}) for number in (5, 9)}
    return None if len(lengths) == 1 else int(expression.as_coeff_Mul()[0])


def narrow_experts(tensor: Tensor, axis: int, rows: IdArray) -> Tensor:
    """Take of each expert's part of a parameter indices of its own along an axis; `rows` is (experts, kept)."""
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = rows.shape
    size = list(tensor.shape)
    size[axis] = rows.shape[1]
    index = torch.from_numpy(np.ascontiguousarray(rows)).to(tensor.device).reshape(shape).expand(size)
    return tensor.gather(axis, index)
