"""Writing a slim graph node by node, for a decision about what stays (`fxprune.slimming.cut.Cut`).

It is given the calls of the channel walk in their order. For every node of the old graph it writes the same node for
smaller operands: narrower projections and parameters, rewritten constants, and a selection where an operand keeps more
than the result does.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.channels.call import Weight
from fxprune.channels.rules.along_axes import NORMS
from fxprune.channels.rules.attention import ATTENTION
from fxprune.channels.rules.base import CASTS, MOVEMENT
from fxprune.channels.rules.movement import CONCATENATIONS, SCATTERS
from fxprune.channels.rules.spatial import CONVOLUTIONS
from fxprune.core.errors import PlanError
from fxprune.slimming.grid import Grid, full_grid, grid_of, take
from fxprune.slimming.rewrite import rewrite_movement
from fxprune.slimming.selections import SelectingWriter, narrow_experts
from fxprune.slimming.writer import line_of, unclear
from fxprune.tracing.lifted import with_parameters
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fxprune.channels.call import Call
    from fxprune.channels.rules.base import Ids
    from fxprune.core.channel_ids import ChannelMap, IdArray
    from fxprune.core.program import Interface
    from fxprune.slimming.cut import Cut

__all__ = ["GraphBuilder"]

aten = torch.ops.aten


class GraphBuilder(SelectingWriter):
    """Writes the new graph node by node, as it is given the calls of the walk."""

    def __init__(self, graph_module: GraphModule, interface: Interface, channels: ChannelMap, cut: Cut) -> None:
        super().__init__(interface, cut)
        self.old = graph_module
        self.keep = cut.keep
        self.nodes = {node.name: node for node in graph_module.graph.nodes}
        self.axes = {(axis.parameter, axis.axis): axis.ids() for axis in channels.axes}
        self.graph.set_codegen(graph_module.graph._codegen)
        self.numbers: dict[Node, int] = {}
        self.modules: dict[str, nn.Module] = {}
        self.examples: dict[str, Tensor] = {}
        self.expected: dict[Node, list[tuple[int, ...]]] = {}
        self.folds: dict[Node, ChannelMask] = {}

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def visit(self, call: Call, ids: Ids) -> None:
        """Write one node."""
        node = call.node
        outputs = call.output if isinstance(call.output, (tuple, list)) else [call.output]
        listed = ids if isinstance(ids, list) else [ids] * len(outputs)
        grids = [
            grid_of(call, mine, self.keep, value.shape) if isinstance(value, Tensor) else full_grid(())
            for value, mine in zip(outputs, listed, strict=True)
        ]
        self.grids[node] = grids
        self.selected, self.call = {}, call
        if node.op == "output":
            kept = node.args[0]
            if self.cut.dropped:
                named = zip(self.interface.outputs, node.args[0], strict=True)  # type: ignore[arg-type]
                kept = tuple(value for name, value in named if name not in self.cut.dropped)
            self.graph.output(self._mapped(kept))
            return
        written = self._write(call, grids)
        self.new[node] = written
        if node.name in self.cut.skipped:  # a layer that is left out: what went into it goes on
            entry = self.nodes[self.cut.skipped[node.name]]
            self.new[node], self.grids[node] = self.new[entry], self.grids[entry]
        if isinstance(written, Node) and written.op != "get_attr":
            written.meta = {key: value for key, value in node.meta.items() if key in {"nn_module_stack", "stack_trace"}}
        if isinstance(written, Node) and node.op != "get_attr" and any(isinstance(v, Tensor) for v in outputs):
            self.expected[written] = [grid.new_shape for grid in grids]

    def _write(self, call: Call, grids: list[Grid]) -> Any:
        node = call.node
        if node.op in {"placeholder", "get_attr"}:
            return self._leaf(node, grids[0])
        if call.is_linear or call.grouped is not None:
            return self._projection(call)
        if call.is_elementwise_module:
            return self._mask(call)
        if not any(isinstance(value, Tensor) for value in _flat(call.output)):
            return self._number(call)
        return self._function(call, grids)

    def _function(self, call: Call, grids: list[Grid]) -> Any:
        node = call.node
        if node.target in MOVEMENT:
            return self._movement(call, grids)
        if node.target in _TABLES:
            self._narrow_direct(call, _TABLES[node.target])
            if node.target in CONVOLUTIONS:
                return self._convolution(call)
            if node.target is aten.index_select.default:
                return self._selection(call, grids[0])
        elif node.target in _COUNTS:
            return self._count(call, grids[0])
        elif node.target is not operator.getitem:
            self._narrow_operands(call, grids[0])
        copy = self._copy(node)
        if node.target is aten.view_as_complex.default:
            self._make_contiguous(copy)
        if node.name in self.cut.epsilons:
            self._rescale(copy, grids[0])
        return copy

    # --- kinds of nodes ---------------------------------------------------------------------------------------------

    def _leaf(self, node: Node, grid: Grid) -> Node:
        """A graph input or a parameter, as small as what stays of it."""
        target = str(node.target)
        if node.op == "placeholder":
            self.examples[node.name] = grid.narrow(self.interface.example_inputs[node.name])
            return self.graph.placeholder(target)
        tensor = get_attribute(self.old, target)
        if isinstance(tensor, Tensor):
            new = tensor if grid.full else _as_parameter(tensor, grid.narrow(tensor.detach()))
            if target in self.cut.norms:
                norm, ratio = self.cut.norms[target]
                new = _as_parameter(tensor, norm.rescaled(new.detach(), ratio))
            self.tensors[target] = new
        return self.graph.get_attr(target)

    def _axis_kept(self, parameter: str, axis: int) -> IdArray | None:
        ids = self.axes.get((parameter, axis))
        if ids is None or self.keep[ids].all():
            return None
        return np.flatnonzero(self.keep[ids])

    def _narrowed(self, tensor: Tensor, weight: Weight) -> Tensor:
        """What stays of a parameter; each expert may keep indices of its own along an axis."""
        own = {
            axis: self.cut.own[weight.name, axis] for axis in range(tensor.dim()) if (weight.name, axis) in self.cut.own
        }
        kept = [self._axis_kept(weight.name, axis) for axis in range(tensor.dim())]
        if all(positions is None for positions in kept) and not own:
            return tensor
        narrow = take(tensor.detach(), [None if axis in own else positions for axis, positions in enumerate(kept)])
        for axis, indices in own.items():
            narrow = narrow_experts(narrow, axis, indices if kept[0] is None else indices[kept[0]])
        return narrow

    def narrowed_like(self, projection: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor that has an element for every weight of a projection."""
        weight = get_attribute(self.old, projection).weight
        names = (name for name, p in self.old.named_parameters(remove_duplicate=False) if p is weight)
        return self._narrowed(tensor, Weight(next(names), tuple(tensor.shape)))

    def _projection(self, call: Call) -> Node:
        node = call.node
        target = str(node.target)
        source = node.args[0]
        assert isinstance(source, Node)
        if target not in self.modules:
            module, fold = get_attribute(self.old, target), self.folds.get(source)
            old = module.weight
            weight = old if fold is None else old.detach() * fold.per_channel().to(old.dtype)
            weight = self._narrowed(weight, call.weight)
            self.modules[target] = module
            if weight is not old:
                bias = getattr(module, "bias", None)
                rows = self._axis_kept(call.weight.name, 0)
                bias = None if bias is None else take(bias.detach(), (rows,))
                self.modules[target] = with_parameters(module, weight, bias)
        return self.graph.call_module(target, self._mapped(node.args))

    def _mask(self, call: Call) -> Any:
        """A mask disappears: its zeros are what is removed, its soft gates are folded into the consumer."""
        mask = get_attribute(self.old, str(call.node.target))
        source = call.node.args[0]
        assert isinstance(source, Node)
        if not isinstance(mask, ChannelMask):
            return self._other_mask(call, mask, source)
        grid = self.grid(source)
        kept = grid.line(len(grid.shape) - 1)
        values = mask.per_channel()
        stays = np.ones(len(values), dtype=bool) if kept is None else np.isin(np.arange(len(values)), kept)
        if bool((values[torch.from_numpy(~stays)] != 0).any()):
            raise PlanError(f"{call.node.target}: the plan removes channels that the mask keeps; insert the masks anew")
        if not bool((values[torch.from_numpy(stays)] == 1).all()):
            readers = [user for user in call.node.users if user.op != "call_module"]
            if readers:
                raise PlanError(f"{call.node.target}: a soft gate must feed Linears only, not {readers[0].name}")
            self.folds[call.node] = mask
        return self.new[source]

    def _number(self, call: Call) -> Any:
        node = call.node
        if node.target is aten.sym_size.int:
            source, axis = node.args[0], call.int_argument(1, "dim", 0)
            assert isinstance(source, Node)
            size = self.grid(source).new_shape[axis]
            if size != call.output:
                self.numbers[node] = size
        elif any(source in self.numbers for source in node.all_input_nodes):
            args = torch.fx.node.map_arg(node.args, lambda source: self.numbers.get(source, call.value_of(source)))
            self.numbers[node] = node.target(*args)  # type: ignore[operator]
        return self._copy(node)

    def _movement(self, call: Call, grids: list[Grid]) -> Node:
        node = call.node
        operands = {operand: self.grid(operand) for operand in call.tensor_nodes()}
        if node.target in CONCATENATIONS | SCATTERS | {aten.stack.default}:
            operands = {operand: grid for operand, grid in operands.items() if 0 not in grid.shape}
            self._narrow_for_cat(call, operands, grids[0])
        if 0 in grids[0].shape:  # nothing is in it, so nothing can be checked; `cat` leaves it out
            return self._copy(node)
        target, args, kwargs = rewrite_movement(call, operands, grids, self.numbers)
        return self.graph.call_function(target, self._mapped(args), self._mapped(kwargs))

    def _narrow_for_cat(self, call: Call, operands: dict[Node, Grid], out: Grid) -> None:
        """Operands of a concatenation that carry no channels (paddings) shrink along the other axes with the rest."""
        if call.node.target is aten.stack.default or out.full:
            return
        if call.node.target in SCATTERS:  # what is written into spans what the result does
            base = call.tensor_nodes()[0]
            if operands[base].full:
                operands[base] = self._select(base, {axis: line_of(call, out, axis) for axis in range(len(out.shape))})
            return
        dim = call.int_argument(1, "dim", 0) % len(out.shape)
        for operand, mine in operands.items():
            if mine.full and any(not other.full for other in operands.values()):
                lines = {axis: line_of(call, out, axis) for axis in range(len(out.shape)) if axis != dim}
                operands[operand] = self._select(operand, lines)

    def _narrow_direct(self, call: Call, position: int) -> None:
        """A parameter that an operator reads as it is (a table, a convolution's weight) loses what is removed."""
        weight, source = call.parameter(position), call.node.args[position]
        if weight is not None and isinstance(source, Node):
            tensor = get_attribute(self.old, str(source.target))
            narrow = self._narrowed(tensor, weight)
            if narrow is not tensor:
                self.tensors[str(source.target)] = _as_parameter(tensor, narrow)

    def _narrow_operands(self, call: Call, out: Grid) -> None:
        """Select rows of operands that span a narrowed axis without carrying its channels; refuse what is unclear."""
        node = call.node
        operands = call.tensor_nodes()
        if all(grid.full for grid in (out, *(self.grid(operand) for operand in operands))):
            return
        first = self.grid(operands[0])
        if node.target in NORMS and first.shape[-1] != first.new_shape[-1] and node.name not in self.cut.epsilons:
            raise unclear(call, "its normalised axis would be narrowed")
        if not _broadcasts(node.target):
            return
        matrices = _MATRIX_OPERANDS.get(node.target, ())
        for position, operand in enumerate(operands):
            mine = self.grid(operand)
            lead = len(mine.shape) - (2 if position in matrices else 0)
            shift = len(out.shape) - len(mine.shape)
            lines: dict[int, IdArray | None] = {}
            if mine.shape == out.shape and _same(mine.mask, out.mask):
                continue
            for axis in range(lead):
                if mine.shape[axis] == out.shape[axis + shift] > 1:
                    lines |= _missing(call, mine, axis, out, axis + shift)
            if lines:
                mine = self._select(operand, lines)
            if not matrices and mine.shape == out.shape and not _same(mine.mask, out.mask):
                raise unclear(call, "its operands keep different units")


_MATRIX_OPERANDS: dict[Any, tuple[int, ...]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
} | dict.fromkeys(ATTENTION, (0, 1, 2, 3))


_TABLES: dict[Any, int] = {
    aten.embedding.default: 0,
    aten.index.Tensor: 0,
    aten.index_select.default: 0,
} | dict.fromkeys(CONVOLUTIONS, 1)
"""Operators that read a parameter as it is, and at which position."""

_COUNTS = {aten.histc.default, aten.one_hot.default, aten.bincount.default}


def _broadcasts(target: Any) -> bool:
    """Whether an operator's operands line up with its result from the right."""
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pointwise or target in _MATRIX_OPERANDS or target in CASTS


def _same(a: NDArray[np.bool_] | None, b: NDArray[np.bool_] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _missing(call: Call, mine: Grid, axis: int, out: Grid, out_axis: int) -> dict[int, IdArray | None]:
    """The positions of an operand's axis to select when it keeps more of them than the result does."""
    if mine.new_shape[axis] == mine.shape[axis] and out.new_shape[out_axis] == out.shape[out_axis]:
        return {}
    if mine.ragged(axis) and out.ragged(out_axis):
        return {}  # both keep other positions in different places: their masks are compared as a whole
    wanted, line = line_of(call, out, out_axis), line_of(call, mine, axis)
    everything = np.arange(mine.shape[axis])
    wanted, line = (everything if found is None else found for found in (wanted, line))
    if np.array_equal(wanted, line):
        return {}
    if not np.isin(wanted, line).all():
        raise unclear(call, "its operands keep different units")
    return {axis: wanted}


def _flat(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _as_parameter(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
