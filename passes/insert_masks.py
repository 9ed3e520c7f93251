"""Writes the plan into the graph as masks.

    x ─ down_proj          x ─ mask ─ down_proj          heads, MLP channels: on what the Linears that read them read
    o_proj ─ add           o_proj ─ mask ─ add           hidden channels: behind all that writes them
    logits ─ top-k         logits ─ mask ─ top-k         experts: minus infinity wherever they are chosen among
    x ─ layer ─ y          x ─ layer ─ gate(x) ─ y       layers: what went in goes on

The masked graph computes exactly what the slim one will. It is the reference of slimming's verification, and the place
where gradients and learned gates attach.

Refused:
 1. a program without groups (nothing was located);
 2. a plan that names unknown groups or units, or is illegal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxprune.channels.rules.spatial import CONVOLUTIONS
from fxprune.core.errors import PreconditionError
from fxprune.core.groups import ExpertGroup, ExpertMlpGroup, LayerGroup
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.plan import Plan
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.masks import ChannelMask, ChoiceMask, ExpertChannelMask, LayerGate, UnitMask
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.program import Program

__all__ = ["InsertMasks", "insert_masks"]


def _unit_of(piece: UnitSlice, size: int, device: torch.device) -> Tensor:
    unit_of = torch.full((size,), -1, dtype=torch.int64)
    units = torch.arange(piece.indices.shape[0]).unsqueeze(1).expand(piece.indices.shape)
    unit_of[torch.from_numpy(piece.indices).reshape(-1)] = units.reshape(-1)
    return unit_of.to(device)


class _Writer:
    """Writes the masks of one plan into a copy of a graph."""

    def __init__(self, graph_module: GraphModule, plan: Plan) -> None:
        self.masked = copy_graph_module(graph_module)
        self.graph = self.masked.graph
        self.plan = plan
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.readers: dict[int, list[Node]] = {}  # calls of projections, by the identity of their weight
        for node in self.graph.nodes:
            if node.op == "call_module" and is_projection(module := get_attribute(self.masked, str(node.target))):
                self.readers.setdefault(id(module.weight), []).append(node)
        self.tensors = self.masked.state_dict(keep_vars=True)

    def mask_of(self, group: Group, like: Tensor) -> Tensor:
        """The plan as a mask, (units,)."""
        mask = torch.zeros(group.units, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
        mask[list(self.plan.kept_units(group))] = 1
        return mask

    def _call(self, name: str, module: nn.Module, args: tuple[Node, ...], behind: Node) -> Node:
        """Call a new module right behind a node."""
        while name in dict(self.masked.named_modules()):
            name += "_"
        self.masked.add_submodule(name, module)
        with self.graph.inserting_after(behind):
            call = self.graph.call_module(name, args)
        call.meta = dict(args[-1].meta)
        return call

    def consumers(self, group: Group) -> None:
        """One mask on what every Linear that reads units is given; a weight may be shared by several Linears."""
        for piece in group.consumers:
            weight = self.tensors[piece.parameter]
            mask = self.mask_of(group, weight)
            unit_of = _unit_of(piece, weight.shape[piece.axis], weight.device)
            for node in self.readers[id(weight)]:
                source, *rest = node.args
                assert isinstance(source, Node)
                module: nn.Module = ChannelMask(mask, unit_of)
                if isinstance(group, ExpertMlpGroup):
                    module = ExpertChannelMask(mask.reshape(group.experts, group.width), unit_of)
                name = f"{node.target}_mask"
                if name in dict(self.masked.named_modules()):
                    name = f"{name}_{node.name}"
                self.masked.add_submodule(name, module)
                with self.graph.inserting_before(node):
                    call = self.graph.call_module(name, (source, *rest))
                call.meta = dict(source.meta)
                node.args = (call, *rest)

    def producers(self, group: Group) -> None:
        """One mask behind everything that writes units: Linears, embeddings, and norms whose weight spans them."""
        for piece in group.slices:
            weight = self.tensors[piece.parameter]
            if piece.produces:
                writers = [(node, -1) for node in self.readers.get(id(weight), [])]
            else:
                writers = self._direct_writers(piece)
            for node, axis in writers:
                unit_of = _unit_of(piece, weight.shape[piece.axis], weight.device)
                others = list(node.users)
                mask = ChannelMask(self.mask_of(group, weight), unit_of, "output")
                call = self._call(f"{node.name}_mask", mask, (node,), node)
                if axis != -1:
                    call = self._move_axis(node, call, axis)
                for user in others:
                    user.replace_input_with(node, call)

    def _move_axis(self, node: Node, mask: Node, axis: int) -> Node:
        """Bring the channels to the last axis for a mask, and back behind it."""
        move = torch.ops.aten.movedim.int
        with self.graph.inserting_before(mask):
            mask.args = (self.graph.call_function(move, (node, axis, -1)),)
        with self.graph.inserting_after(mask):
            back = self.graph.call_function(move, (mask, -1, axis))
        back.meta = dict(node.meta)
        return back

    def _direct_writers(self, piece: UnitSlice) -> list[tuple[Node, int]]:
        """Operators that read a parameter as it is and write the units, with the axis on which these stand.

        Embeddings look up rows of a table whose columns are units; rows of a convolution's weight are its channels.
        """
        weight = self.tensors[piece.parameter]
        holders = [n for n in self.graph.nodes if n.op == "get_attr" and self.tensors.get(str(n.target)) is weight]
        users = [user for node in holders for user in node.users if node in user.args[:2]]
        if piece.axis == 1:
            return [(user, -1) for user in users if user.target is torch.ops.aten.embedding.default]
        return [(user, 1 - weight.dim()) for user in users if user.target in CONVOLUTIONS and weight.dim() > 2]

    def choices(self, group: Group) -> None:
        """One mask on the scores of every softmax and top-k among the units."""
        assert isinstance(group, ExpertGroup)
        for name in group.choices:
            node = self.nodes[name]
            scores = node.args[0]
            assert isinstance(scores, Node)
            like = scores.meta["val"]
            mask = self.mask_of(group, self.tensors[group.slices[0].parameter])
            sizes = [None if isinstance(size, torch.SymInt) else int(size) for size in like.shape]
            if group.parts is not None and group.units not in sizes:  # it chooses inside each part
                mask = mask[torch.from_numpy(group.parts).to(mask.device)]
            wide = tuple(mask.shape)
            axis = next(a for a in reversed(range(like.dim())) if tuple(sizes[a : a + len(wide)]) == wide)
            call = self._call(f"{name}_mask", ChoiceMask(mask, axis - like.dim()), (scores,), scores)
            node.args = (call, *node.args[1:])

    def layers(self, group: Group) -> None:
        """One gate behind every layer."""
        assert isinstance(group, LayerGroup)
        kept = set(self.plan.kept_units(group))
        gated: dict[str, Node] = {}
        for index, (entry, left) in enumerate(zip(group.entries, group.exits, strict=True)):
            # What a layer reads may itself come out of a gate.
            before, after = gated.get(entry, self.nodes[entry]), self.nodes[left]
            others = list(after.users)
            floating = next(t for t in self.tensors.values() if t.is_floating_point())
            mask = torch.tensor(float(index in kept), dtype=floating.dtype, device=floating.device)
            gate = LayerGate(mask, group.labels[index])
            call = self._call(f"{group.labels[index].replace('.', '_')}_gate", gate, (before, after), after)
            for user in others:
                user.replace_input_with(after, call)
            gated[left] = call


def insert_masks(graph_module: GraphModule, groups: tuple[Group, ...], plan: Plan) -> GraphModule:
    """Insert the masks of every group where its units can be taken out exactly (`Group.masked`).

    Args:
        graph_module: a lifted graph without masks; left as it is.
        groups: the groups.
        plan: kept units; heads and MLP channels that it does not name get a mask of ones, so that gradients reach
            every unit.

    Returns:
        A new graph module that shares all parameters.
    """
    writer = _Writer(graph_module, plan)
    # Gates first: what goes past a layer is then masked like everything else.
    for group in sorted(groups, key=lambda group: group.masked != "layers"):
        if group.masked == "consumers" or group.name in plan.kept:
            getattr(writer, group.masked)(group)
    writer.masked.recompile()
    return writer.masked


class InsertMasks(Pass):
    """Insert the plan's masks (see the module's docstring for the graph and the refusals)."""

    name = "insert_masks"

    def requires(self, program: Program) -> None:
        """There are groups, and the plan is legal for them.

        Raises:
            PreconditionError: nothing was located.
            PlanError: the plan is illegal.
        """
        if not program.groups:
            raise PreconditionError("insert_masks needs groups: run locate_attention and locate_mlp first")
        if program.plan is not None:
            program.plan.validate(program.groups)

    def call(self, program: Program) -> PassResult:
        """Insert the masks and keep the masked graph as the reference `masked`."""
        plan = program.plan or Plan({})
        masked = insert_masks(program.graph_module, program.groups, plan)
        count = sum(isinstance(module, UnitMask) for module in masked.modules())
        changed = program.replace(graph_module=masked, channels=None).with_reference("masked", masked)
        return PassResult(changed, modified=True, details={"masks": count})
