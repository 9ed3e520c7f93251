"""Normalising writes: operators that write into a tensor become operators that compute a new one.

    scatter_(x, ...); x                    y = scatter(x, ...); y
    copy_(slice(x, 1, 0, 4), a); x         y = slice_scatter(x, a, 1, 0, 4); y

A tensor that is made empty and then filled along one axis, piece by piece, is a concatenation:

    x = new_empty(...); copy_(slice(x, 3, 0, 6), a); copy_(slice(x, 3, 6, 10), b)        x = cat([a, b], 3)

Left as they are: writes into graph inputs, parameters and buffers (the caller would see them), through views other than
slices and selections, and into memory that is read later through another view.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxprune.tracing.nodes import functional_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["add_node", "concatenate_pieces", "functionalise"]

aten = torch.ops.aten
_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_EMPTY: set[Any] = {
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.zeros.default,
    aten.zeros_like.default,
}
_RANDOM = {"normal", "uniform", "bernoulli", "exponential", "random", "geometric", "cauchy", "log_normal", "dropout"}


def add_node(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """Add a call that belongs to the module of another node, with the value that it has under fake tensors."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    values = torch.fx.node.map_arg(args, lambda argument: argument.meta.get("val"))
    if all("val" in source.meta for source in node.all_input_nodes):
        node.meta["val"] = target(*values)
    return node


def functionalise(graph: Graph) -> None:
    """Replace writes by operators that compute what is written."""
    for node in list(graph.nodes):
        if node.op == "call_function" and functional_of(node.target) is not None:
            _replace_write(graph, node)


def _is_view(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)


def _views(root: Node) -> Iterator[Node]:
    """Everything that shares memory with a value."""
    for user in root.users:
        if (_is_view(user) and user.args and user.args[0] is root) or (
            user.op == "call_function" and user.target is operator.getitem and _is_view(root)
        ):
            yield user
            yield from _views(user)


def _replace_write(graph: Graph, node: Node) -> None:
    written = node.args[0]
    if not isinstance(written, Node) or node.target._overloadpacket.__name__.rstrip("_") in _RANDOM:  # type: ignore[union-attr]
        return
    chain: list[Node] = []
    root = written
    while _is_view(root) and isinstance(root.args[0], Node):
        if root.target not in _SCATTERS:
            return
        chain.append(root)
        root = root.args[0]
    if root.op != "call_function" or _is_view(root) or not isinstance(root.meta.get("val"), Tensor):
        return
    later = [view for view in _views(root) if view < node and any(node < user for user in view.users)]
    if any(view is not written for view in later):
        return  # another view of what is written is read later
    with graph.inserting_before(node):
        value = _computed(graph, node, written)
        current = value
        for view in chain:
            source, *place = view.args
            assert isinstance(source, Node)
            current = add_node(graph, _SCATTERS[view.target], (source, current, *place), node)
    node.replace_all_uses_with(value)
    for old, new in {written: value, root: current}.items():
        for user in list(old.users):
            if node < user:
                user.replace_input_with(old, new)
    graph.erase_node(node)


def _computed(graph: Graph, node: Node, written: Node) -> Node:
    """What a write puts into the tensor it writes to, in that tensor's shape and dtype."""
    target = functional_of(node.target)
    source = node.args[1] if len(node.args) > 1 else None
    if target is aten.copy.default and isinstance(source, Node) and _alike(source, written):
        return source
    value = add_node(graph, target, node.args, node)
    if node.kwargs:
        value.kwargs = node.kwargs
        value.meta["val"] = node.meta.get("val")
    made, kept = value.meta.get("val"), written.meta.get("val")
    if isinstance(made, Tensor) and isinstance(kept, Tensor) and made.dtype != kept.dtype:
        value = add_node(graph, aten.to.dtype, (value, kept.dtype), node)
    return value


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return [str(size) for size in x.shape] == [str(size) for size in y.shape] and x.dtype == y.dtype


def concatenate_pieces(graph: Graph) -> None:
    """Turn a fresh tensor that is filled along one axis, without gap or overlap, into a concatenation."""
    for node in reversed(list(graph.nodes)):
        if node.target is aten.slice_scatter.default and not any(u.target is node.target for u in node.users):
            _concatenate(graph, node)


def _concatenate(graph: Graph, last: Node) -> None:
    pieces: list[tuple[int, int, int, Node]] = []
    node = last
    while node.target is aten.slice_scatter.default:
        piece = _piece(node)
        if piece is None or (node is not last and len(node.users) > 1):
            return
        pieces.append(piece)
        base = node.args[0]
        assert isinstance(base, Node)
        node = base
    pieces.sort(key=lambda piece: piece[1])
    axes = {axis for axis, *_ in pieces}
    if node.target not in _EMPTY or len(axes) > 1:
        return
    (axis,) = axes
    ends = [0, *(end for _, _, end, _ in pieces)]
    if [start for _, start, _, _ in pieces] != ends[:-1] or ends[-1] != last.meta["val"].shape[axis]:
        return
    with graph.inserting_before(last):
        joined = add_node(graph, aten.cat.default, ([piece for *_, piece in pieces], axis), last)
    last.replace_all_uses_with(joined)


def _piece(node: Node) -> tuple[int, int, int, Node] | None:
    """Axis, bounds and source of a `slice_scatter` with numbers for bounds and steps of one."""
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
    base, source, axis, start, end, step = given
    value = base.meta.get("val")
    if step != 1 or not isinstance(source, Node) or not isinstance(value, Tensor):
        return None
    size: Any = value.shape[axis]
    start, end = 0 if start is None else start, size if end is None else end
    if not all(isinstance(number, int) for number in (size, start, end)):
        return None
    start, end = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in (start, end))
    return axis % value.dim(), start, end, source
