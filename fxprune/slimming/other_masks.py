"""Masks of the other units, written into a graph: hidden channels, experts, layers.

o_proj ─ add           o_proj ─ mask ─ add           hidden channels: behind all that writes them
logits ─ top-k         logits ─ mask ─ top-k         experts: minus infinity wherever they are chosen among
x ─ layer ─ y          x ─ layer ─ gate(x) ─ y       layers: what went in goes on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxprune.channels.rules.spatial import CONVOLUTIONS
from fxprune.core.groups import ExpertGroup, LayerGroup
from fxprune.slimming.masking import MaskWriter, unit_of
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.unit_masks import ChoiceMask, LayerGate

if TYPE_CHECKING:
    from torch import nn

    from fxprune.core.groups import Group, UnitSlice

__all__ = ["AnyMaskWriter"]


class AnyMaskWriter(MaskWriter):
    """Writes the masks of units of any kind."""

    def _call(self, name: str, module: nn.Module, args: tuple[Node, ...], behind: Node) -> Node:
        """Call a new module right behind a node."""
        while name in dict(self.masked.named_modules()):
            name += "_"
        self.masked.add_submodule(name, module)
        with self.graph.inserting_after(behind):
            call = self.graph.call_module(name, args)
        call.meta = dict(args[-1].meta)
        return call

    def producers(self, group: Group) -> None:
        """One mask behind everything that writes units: Linears, embeddings, and norms whose weight spans them."""
        for piece in group.slices:
            weight = self.tensors[piece.parameter]
            if piece.produces:
                writers = [(node, -1) for node in self.readers.get(id(weight), [])]
            else:
                writers = self._direct_writers(piece)
            for node, axis in writers:
                units = unit_of(piece, weight.shape[piece.axis], weight.device)
                others = list(node.users)
                mask = ChannelMask(self.mask_of(group, weight), units, "output")
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
