"""Block Linears: the projections of a model without the one that makes its output. What ratios are shares of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.channels.attention_shapes import MOVEMENT, POINTWISE, only_operand, op_name
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import is_projection

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["block_linear_parameters", "block_linear_tensors", "expert_tensors", "identity", "lm_heads", "unique"]


_PARTS = frozenset(("chunk", "split", "split_with_sizes", "unbind"))


_SHAPE_READERS = ("sym_", "_assert", "size")


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two names of one tensor, also when they are two `Parameter` objects on one storage."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def unique(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each tensor once, under whatever names it has."""
    seen: set[tuple[Any, ...]] = set()
    for tensor in tensors:
        key = identity(tensor)
        if key not in seen:
            seen.add(key)
            yield tensor


def block_linear_parameters(module: nn.Module, *, outputs: Sequence[str] | None = None) -> int:
    """Elements of weight and bias of all projections except the output projection; shared tensors count once.

    Projections are `nn.Linear`s and, for experts, `GroupedLinear`s. A module without a graph holds the experts of a
    mixture as plain parameters: there, the matrices of a module that says how many experts it has (`num_experts`) count
    when their first axis is that long (the experts' weights, and the router). Experts that are held in any other way,
    and biases of experts, are not counted.

    Args:
        module: any module.
        outputs: see `lm_heads`.
    """
    return sum(tensor.numel() for tensor in unique(block_linear_tensors(module, outputs)))


def block_linear_tensors(module: nn.Module, outputs: Sequence[str] | None) -> list[Tensor]:
    """Weights and biases of the block Linears; see `block_linear_parameters`."""
    heads = set(lm_heads(module, outputs=outputs))
    return [
        tensor
        for name, child in module.named_modules()
        if is_projection(child) and name not in heads
        for tensor in child.parameters(recurse=False)
    ] + [tensor for _, tensor in expert_tensors(module)]


def expert_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of experts and routers in a module without a graph: as long as their owner says it has experts."""
    for name, child in module.named_modules():
        experts = getattr(child, "num_experts", None)
        if not isinstance(experts, int) or isinstance(child, nn.Linear | nn.Embedding | GroupedLinear):
            continue
        own = {n: p for n, p in child.named_parameters(prefix=name, recurse=False) if p.ndim and p.shape[0] == experts}
        axes = max((parameter.ndim for parameter in own.values()), default=0)  # with one less, it is a bias
        yield from ((name, parameter) for name, parameter in own.items() if parameter.ndim == axes >= 2)


def lm_heads(module: nn.Module, *, outputs: Sequence[str] | None = None) -> tuple[str, ...]:
    """Qualified names of the Linears that make the module's output: for a language model, its `lm_head`.

    In a graph module it is the `call_module` Linear from which an output follows by movement and pointwise ops alone;
    with output names given, that output is `"logits"`, without them any output counts, as long as the Linear feeds
    nothing else (a value projection whose result is also returned as cache is not a head). In another module it is
    what `get_output_embeddings()` returns, or else the Linears that share their weight with an embedding.

    Args:
        module: any module.
        outputs: names of the graph's outputs in order (`Interface.outputs`).
    """
    if isinstance(module, GraphModule):
        found = dict.fromkeys(_graph_heads(module, outputs))
        return tuple(found)
    getter = getattr(module, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if head is not None:
        return tuple(name for name, child in linears if child is head)
    tables = {identity(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    return tuple(name for name, child in linears if identity(child.weight) in tables)


def _graph_heads(module: GraphModule, outputs: Sequence[str] | None) -> Iterator[str]:
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    if outputs is not None and "logits" in outputs:
        # By position: a graph with fewer layers has fewer caches among its outputs, after the logits.
        roots, named_logits = [values[list(outputs).index("logits")]], True
    else:
        roots, named_logits = list(output.all_input_nodes), False
    for root in roots:
        node = root if isinstance(root, Node) else None
        while node is not None and not _is_linear(module, node):
            node = _before(node)
        if node is not None and (named_logits or _feeds_only_outputs(node)):
            yield str(node.target)


def _before(node: Node) -> Node | None:
    """What an output's values come from by movement, pointwise ops, or taking a part (the ends of a span's answer)."""
    if op_name(node) in _PARTS and isinstance(node.args[0], Node):
        return node.args[0]
    return only_operand(node)


def _feeds_only_outputs(node: Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or user in seen or op_name(user).startswith(_SHAPE_READERS):
                continue
            if op_name(user) not in MOVEMENT | POINTWISE | _PARTS:
                return False
            seen.add(user)
            pending.append(user)
    return True


def _is_linear(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Linear)
