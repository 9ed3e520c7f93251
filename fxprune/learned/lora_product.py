"""A Linear with LoRA, and the mask in front of it, as one operator.

    x ─ mask ─┬─ W ──────────── + ─ y              x ─ LoraProduct ─ y
              └─ A ─ B ─ * scale ┘

peft's own forward pass writes the output's size three times for LoRA: product, multiple, and sum. Here the low-rank
product is added where W's product stands. The mask multiplies columns of W and A, which are fewer numbers than a
batch's activations, and what goes into the mask is all that is kept for the backward pass: as much as LoRA alone keeps.
peft's modules stay where they are, with their parameters; only what a graph calls is another.

Where single weights of W were removed before, B A is removed there too, or merging would fill them: then W + M * B A is
formed, in training as in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fxprune.tracing.masks import ChannelMask

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.fx import GraphModule, Node

__all__ = ["LoraProduct", "fuse_lora"]


class _Product(torch.autograd.Function):
    """y = (x * gate) (W + scale B A)^T + bias, without W + B A or, for many rows, x * gate ever being there."""

    @staticmethod
    def forward(ctx: Any, lora: tuple[float, bool], *tensors: Any) -> Tensor:
        (scale, narrow), (x, gate, weight, bias, down, up) = lora, tensors
        gated, own, low = x, weight, down
        if gate is not None and narrow:
            own, low = weight * gate, down * gate
        elif gate is not None:
            gated = x * gate
        rank = gated @ low.t()
        y = functional.linear(gated, own, bias).addmm_(rank, up.t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, gate, weight, down, up, rank)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, gate, weight, down, up, rank = ctx.saved_tensors
        _, of_x, of_gate, of_weight, of_bias, of_down, of_up = ctx.needs_input_grad
        below = (gradient @ up).mul_(ctx.scale)
        found: list[Tensor | None] = [None] * 7
        if of_up:
            found[6] = (gradient.t() @ rank).mul_(ctx.scale)
        if of_bias:
            found[4] = gradient.sum(0)
        # x * gate is gone, but what it is multiplied with on the left has a column for each of its own.
        for index, needed, left in ((3, of_weight, gradient), (5, of_down, below)):
            if needed:
                product = left.t() @ x
                found[index] = product if gate is None else product.mul_(gate)
        if of_x or of_gate:
            behind = (gradient @ weight).addmm_(below, down)
            if of_gate:
                found[2] = (behind * x).sum(0)
            if of_x:
                found[1] = behind if gate is None else behind.mul_(gate)
        return tuple(found)


class LoraProduct(nn.Module):
    """Calls a Linear of peft and the mask in front of it as one.

    Args:
        layer: peft's LoRA Linear with one adapter, without dropout.
        adapter: its name.
        mask: of what it reads; None for no mask.
        support: (out, in) bool, which weights may be other than 0; None for all.
    """

    support: Tensor | None

    def __init__(
        self, layer: nn.Module, adapter: str, mask: ChannelMask | None = None, support: Tensor | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.mask = mask
        self.adapter = adapter
        self.register_buffer("support", support, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the precision of the products: autocast's, or else the weight's."""
        layer: Any = self.layer
        base = layer.base_layer
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        down, up = (part[self.adapter].weight.to(dtype) for part in (layer.lora_A, layer.lora_B))
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        # Multiply what is smaller: the activations' columns, or those of the weight.
        lora = (float(layer.scaling[self.adapter]), len(rows) > len(base.weight))
        gate = None if self.mask is None else self.mask.per_channel().to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            y: Tensor
            if self.support is not None:
                scale, narrow = lora
                y = _supported(rows, gate, base.weight.to(dtype) + scale * (up @ down) * self.support, bias, narrow)
                return y.reshape(*x.shape[:-1], y.shape[-1])
            y = _Product.apply(lora, rows, gate, base.weight.to(dtype), bias, down, up)  # type: ignore[no-untyped-call]  # torch
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _supported(rows: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, narrow: bool) -> Tensor:
    """(rows * gate) weight^T + bias, where the gate multiplies what is smaller."""
    if gate is not None and narrow:
        weight = weight * gate
    elif gate is not None:
        rows = rows * gate
    return functional.linear(rows, weight, bias)


def fuse_lora(
    graph_module: GraphModule,
    linears: Collection[str],
    adapter: str,
    supports: Mapping[str, Tensor] | None = None,
) -> None:
    """Let a graph call each Linear that has LoRA, and a mask that nothing but it reads, as one `LoraProduct`, in place.

    Args:
        graph_module: a flat graph; its own, as nodes change.
        linears: qualified names of peft's Linears in it.
        adapter: the name of their adapter.
        supports: (out, in) bool by Linear, where single weights of it were removed.
    """
    supports = supports or {}
    graph = graph_module.graph
    for index, node in enumerate(list(graph.nodes)):
        if node.op != "call_module" or node.target not in linears:
            continue
        (source,) = node.args
        mask = _own_mask(graph_module, source)
        name = f"lora_{index}"
        layer: Any = graph_module.get_submodule(str(node.target))
        support = supports.get(str(node.target))
        support = None if support is None else support.to(layer.base_layer.weight.device)
        graph_module.add_submodule(name, LoraProduct(layer, adapter, mask, support))
        node.target = name
        if mask is not None:
            node.args = source.args
            graph.erase_node(source)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _own_mask(graph_module: GraphModule, node: Node) -> ChannelMask | None:
    """The mask that a node is, if one reader is all it has."""
    if node.op != "call_module" or len(node.users) > 1:
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, ChannelMask) else None
