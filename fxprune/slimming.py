"""Slimming: writing a new graph in which removed channels do not exist.

The old graph is walked once more with ids beside its values; now it is known which ids stay. For every node the
builder writes the same node for smaller operands: narrower Linears and parameters, rewritten constants, and a
selection where an operand without channels of its own (a mask, slopes) has the full extent of a narrowed axis. At the
end the new graph is run on fake tensors and every shape is compared with what was predicted.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fxprune.channel_ids import ChannelMap, IdArray
from fxprune.channel_rules import CASTS, MOVEMENT, NORMS
from fxprune.channels import Call, get_attribute, walk
from fxprune.errors import PlanError, PostconditionError, UnsupportedOpError
from fxprune.program import Interface
from fxprune.rewrite import Grid, full_grid, grid_of, rewrite_movement, take

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fxprune.channel_rules import Ids
    from fxprune.groups import Group
    from fxprune.masks import ChannelMask
    from fxprune.plan import Plan

__all__ = ["Slimmed", "removed_classes", "slim_graph"]

aten = torch.ops.aten
Slimmed = tuple[GraphModule, Interface]


def removed_classes(channels: ChannelMap, groups: Sequence[Group], plan: Plan) -> IdArray:
    """The channel classes that a plan removes.

    Raises:
        PlanError: a unit to be removed is tied to something that must stay.
    """
    axes = {(axis.parameter, axis.axis): axis for axis in channels.axes}
    found = []
    for group in groups:
        removed = plan.removed_units(group)
        for piece in group.slices if removed else ():
            axis = axes[piece.parameter, piece.axis]
            classes = np.unique(channels.class_of[axis.ids()[piece.indices[removed].ravel()]])
            blocked = classes[~channels.source[classes]]
            if len(blocked):
                reasons = channels.pin_reasons(blocked)
                why = f": {reasons[0]}" if reasons else ""
                raise PlanError(f"{group.name}: {piece.parameter} axis {piece.axis} cannot be narrowed{why}")
            found.append(classes)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _check_norms(channels: ChannelMap, keep: NDArray[np.bool_]) -> None:
    for norm in channels.norms:
        stays = keep[norm.ids]
        if stays.any() and not stays.all():
            raise PlanError(
                f"{norm.module} ({norm.kind}, node {norm.node}): the plan removes {int((~stays).sum())} of the "
                f"{norm.width} channels it normalises together; that changes the others, so it is refused"
            )


class _Builder:
    """Writes the new graph node by node; a visitor of the walk."""

    def __init__(
        self, graph_module: GraphModule, interface: Interface, channels: ChannelMap, keep: NDArray[np.bool_]
    ) -> None:
        self.old = graph_module
        self.interface = interface
        self.keep = keep
        self.axes = {(axis.parameter, axis.axis): axis.ids() for axis in channels.axes}
        self.graph = torch.fx.Graph()
        self.graph.set_codegen(graph_module.graph._codegen)
        self.new: dict[Node, Any] = {}
        self.grids: dict[Node, list[Grid]] = {}
        self.numbers: dict[Node, int] = {}
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
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
        if node.op == "output":
            self.graph.output(self._mapped(node.args[0]))
            return
        written = self._write(call, grids)
        self.new[node] = written
        if isinstance(written, Node) and written.op != "get_attr":
            written.meta = {key: value for key, value in node.meta.items() if key in {"nn_module_stack", "stack_trace"}}
        if isinstance(written, Node) and any(isinstance(value, Tensor) for value in outputs):
            self.expected[written] = [grid.new_shape for grid in grids]

    def _mapped(self, argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, lambda node: self.new[node])

    def grid(self, node: Node) -> Grid:
        """The grid of a node with one result."""
        return self.grids[node][0]

    def _write(self, call: Call, grids: list[Grid]) -> Any:
        node = call.node
        if node.op in {"placeholder", "get_attr"}:
            return self._leaf(node, grids[0])
        if call.is_linear:
            return self._linear(call)
        if call.is_elementwise_module:
            return self._mask(call)
        if not any(isinstance(value, Tensor) for value in _flat(call.output)):
            return self._number(call)
        if node.target in MOVEMENT:
            return self._movement(call, grids)
        if node.target is aten.embedding.default:
            self._narrow_table(call)
        elif node.target is not operator.getitem:
            self._narrow_operands(call, grids[0])
        return self._copy(node)

    def _copy(self, node: Node) -> Node:
        return self.graph.node_copy(node, lambda source: self.new[source])

    # --- kinds of nodes ---------------------------------------------------------------------------------------------

    def _leaf(self, node: Node, grid: Grid) -> Node:
        """A graph input or a parameter, as small as what stays of it."""
        target = str(node.target)
        if node.op == "placeholder":
            self.examples[node.name] = grid.narrow(self.interface.example_inputs[node.name])
            return self.graph.placeholder(target)
        tensor = get_attribute(self.old, target)
        if isinstance(tensor, Tensor):
            self.tensors[target] = tensor if grid.full else _as_parameter(tensor, grid.narrow(tensor.detach()))
        return self.graph.get_attr(target)

    def _axis_kept(self, parameter: str, axis: int, size: int) -> IdArray | None:
        stays = self.keep[self.axes[parameter, axis]]
        assert len(stays) == size
        return None if stays.all() else np.flatnonzero(stays)

    def _linear(self, call: Call) -> Node:
        node, weight = call.node, call.weight
        target = str(node.target)
        rows, columns = (self._axis_kept(weight.name, axis, weight.shape[axis]) for axis in (0, 1))
        source = node.args[0]
        assert isinstance(source, Node)
        if target not in self.modules:
            linear = get_attribute(self.old, target)
            self.modules[target] = _narrow_linear(linear, rows, columns, self.folds.get(source))
        return self.graph.call_module(target, self._mapped(node.args))

    def _mask(self, call: Call) -> Any:
        """A mask disappears: its zeros are what is removed, its soft gates are folded into the consumer."""
        mask = get_attribute(self.old, str(call.node.target))
        source = call.node.args[0]
        assert isinstance(source, Node)
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
        if node.target in {aten.cat.default, aten.stack.default}:
            self._narrow_for_cat(call, operands, grids[0])
        target, args, kwargs = rewrite_movement(call, operands, grids, self.numbers)
        return self.graph.call_function(target, self._mapped(args), self._mapped(kwargs))

    def _narrow_for_cat(self, call: Call, operands: dict[Node, Grid], out: Grid) -> None:
        """Operands of a concatenation that carry no channels (paddings) shrink along the other axes with the rest."""
        if call.node.target is aten.stack.default or out.full:
            return
        dim = call.int_argument(1, "dim", 0) % len(out.shape)
        for operand, mine in operands.items():
            if mine.full and any(not other.full for other in operands.values()):
                lines = {axis: _line(call, out, axis) for axis in range(len(out.shape)) if axis != dim}
                operands[operand] = self._select(operand, lines)

    def _select(self, operand: Node, lines: dict[int, IdArray | None]) -> Grid:
        """Narrow an operand that does not carry the removed channels itself."""
        grid, value = self.grid(operand), self.new[operand]
        for axis, kept in lines.items():
            if kept is None:
                continue
            index = f"_kept_{operand.name}_{axis}"
            self.tensors[index] = torch.as_tensor(kept, device=self._device())
            value = self.graph.call_function(aten.index_select.default, (value, axis, self.graph.get_attr(index)))
            grid = grid.select(axis, kept)
        self.new[operand] = value
        self.grids[operand] = [grid]
        return grid

    def _device(self) -> torch.device:
        return next(iter(self.interface.example_inputs.values())).device

    def _narrow_table(self, call: Call) -> None:
        """An embedding loses the columns of removed hidden channels."""
        weight = call.parameter(0)
        source = call.node.args[0]
        assert weight is not None
        assert isinstance(source, Node)
        kept = tuple(self._axis_kept(weight.name, axis, weight.shape[axis]) for axis in (0, 1))
        if any(axis is not None for axis in kept):
            tensor = get_attribute(self.old, str(source.target))
            self.tensors[str(source.target)] = _as_parameter(tensor, take(tensor.detach(), kept))

    def _narrow_operands(self, call: Call, out: Grid) -> None:
        """Select rows of operands that span a narrowed axis without carrying its channels; refuse what is unclear."""
        node = call.node
        operands = call.tensor_nodes()
        if all(grid.full for grid in (out, *(self.grid(operand) for operand in operands))):
            return
        first = self.grid(operands[0])
        if node.target in NORMS and first.shape[-1] != first.new_shape[-1]:
            raise _unclear(call, "its normalised axis would be narrowed")
        if not _broadcasts(node.target):
            return
        matrices = _MATRIX_OPERANDS.get(node.target, ())
        for position, operand in enumerate(operands):
            mine = self.grid(operand)
            lead = len(mine.shape) - (2 if position in matrices else 0)
            shift = len(out.shape) - len(mine.shape)
            lines: dict[int, IdArray | None] = {}
            for axis in range(lead):
                narrowed = out.new_shape[axis + shift] != out.shape[axis + shift]
                if not narrowed or mine.shape[axis] != out.shape[axis + shift]:
                    continue
                if mine.new_shape[axis] == mine.shape[axis]:
                    lines[axis] = _line(call, out, axis + shift)
                elif mine.new_shape[axis] != out.new_shape[axis + shift]:
                    raise _unclear(call, "its operands keep different units")
            if lines:
                self._select(operand, lines)
            if (
                not matrices
                and mine.mask is not None
                and out.mask is not None
                and mine.shape == out.shape
                and not np.array_equal(mine.mask, out.mask)
            ):
                raise _unclear(call, "its operands keep different units")

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> Slimmed:
        """Assemble the new module, and prove that every shape is what was predicted."""
        root = nn.Module()
        for name, module in self.modules.items():
            _add(root, name, module)
        for name, tensor in self.tensors.items():
            if not _present(root, name):
                _add(root, name, tensor)
        _tie(self.old, root)
        module = GraphModule(root, self.graph)
        interface = Interface(
            {name: self.examples[name] for name in self.interface.inputs},
            self.interface.dynamic_axes,
            self.interface.outputs,
            self.interface.cache,
        )
        dead = {node for node in self.graph.nodes if node.op == "get_attr" and not node.users}
        for node in dead:
            self.graph.erase_node(node)
        module.recompile()
        _check_shapes(module, interface, self.expected)
        return module, interface


_MATRIX_OPERANDS: dict[Any, tuple[int, ...]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.scaled_dot_product_attention.default: (0, 1, 2, 3),
}


def _broadcasts(target: Any) -> bool:
    """Whether an operator's operands line up with its result from the right."""
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return pointwise or target in _MATRIX_OPERANDS or target in CASTS


def _unclear(call: Call, why: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"{call.op} in {call.module or 'the model'} (node {call.node.name}) cannot be slimmed: {why}"
    )


def _line(call: Call, grid: Grid, axis: int) -> IdArray | None:
    try:
        return grid.line(axis)
    except ValueError as error:
        raise _unclear(call, str(error)) from error


def _flat(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _as_parameter(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _narrow_linear(
    linear: nn.Linear, rows: IdArray | None, columns: IdArray | None, fold: ChannelMask | None
) -> nn.Module:
    """A Linear with fewer rows and columns; the same module when nothing changes."""
    if rows is None and columns is None and fold is None:
        return linear
    weight = linear.weight.detach()
    if fold is not None:
        weight = weight * fold.per_channel().to(weight.dtype)
    weight = take(weight, (rows, columns))
    slim = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    slim.weight = nn.Parameter(weight, linear.weight.requires_grad)
    if linear.bias is not None:
        slim.bias = nn.Parameter(take(linear.bias.detach(), (rows,)), linear.bias.requires_grad)
    return slim


def _add(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Set a dotted attribute, making containers on the way."""
    owner, _, leaf = name.rpartition(".")
    module = root
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Module):
        module.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def _present(root: nn.Module, name: str) -> bool:
    try:
        get_attribute(root, name)
    except AttributeError:
        return False
    return True


def _tie(old: nn.Module, new: nn.Module) -> None:
    """Parameters that were one tensor stay one tensor."""
    first: dict[int, nn.Parameter] = {}
    for name, parameter in list(new.named_parameters(remove_duplicate=False)):
        shared = get_attribute(old, name)
        known = first.setdefault(id(shared), parameter)
        if parameter is not known:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_parameter(leaf, known)


def _check_shapes(module: GraphModule, interface: Interface, expected: dict[Node, list[tuple[int, ...]]]) -> None:
    """Run the new graph on fake tensors and compare every shape with the prediction."""
    mode = FakeTensorMode()
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = mode.from_tensor(interface.example_inputs[str(node.target)], static_shapes=True)
        elif node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            values[node] = mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        elif node.op != "output":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with mode, torch.no_grad():
                if node.op == "call_module":
                    linear = module.get_submodule(str(node.target))
                    state: dict[str, Tensor] = {
                        k: mode.from_tensor(v, static_shapes=True) for k, v in linear.named_parameters()
                    }
                    values[node] = torch.func.functional_call(linear, state, args, kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)
        if node in expected:
            shapes = [tuple(value.shape) for value in _flat(values[node])]
            if shapes != expected[node]:
                raise PostconditionError(
                    f"slim: node {node.name} ({node.target}) has shape {shapes[0]}, predicted {expected[node][0]}; "
                    "this is a bug in a rewrite rule, please report it with the model's config"
                )


def slim_graph(graph_module: GraphModule, interface: Interface, groups: Sequence[Group], plan: Plan) -> Slimmed:
    """Write the graph in which the units that `plan` removes do not exist.

    Args:
        graph_module: a lifted graph, with or without masks; it is left as it is.
        interface: how it is called.
        groups: the groups the plan speaks of.
        plan: which units stay.

    Returns:
        A new graph module that shares every parameter no unit was removed from, and its interface (cache inputs
        become smaller).

    Raises:
        PlanError: the plan is illegal, or removes part of what is normalised together.
        UnsupportedOpError: an operator cannot be rewritten for what stays.
    """
    plan.validate(groups)
    channels = ChannelMap(walk(graph_module, interface))
    keep = channels.keep(removed_classes(channels, groups, plan))
    _check_norms(channels, keep)
    builder = _Builder(graph_module, interface, channels, keep)
    walk(graph_module, interface, builder.visit)
    return builder.finish()
