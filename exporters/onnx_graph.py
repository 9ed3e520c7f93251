"""FX rewrites that prepare a graph for ONNX: fewer nodes, masks that no runtime turns into NaN, attention by groups.

Each rewrite keeps what the graph computes and leaves a graph that torch can still run. Tracing time grows with the
number of nodes, so the rewrites come before the re-export. The operators on the right are those of `onnx_ops`:

    call_module[Linear](x)                                    linear
    pow, mean, add, rsqrt, mul, mul                           rms_norm
    x * cos + cat(-x[half:], x[:half]) * sin                  rotary_embedding
    view, transpose                                           split_heads
    transpose, contiguous, reshape                            merge_heads
    cat([cache, new], -2)                                     append
    unsqueeze, expand, reshape of K and V, then SDPA          grouped_attention, with an additive, finite mask

What does not match stays as it is, and torch.onnx translates it.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxprune.exporters import onnx_ops
from fxprune.exporters.onnx_complex import complex_to_real
from fxprune.exporters.onnx_constants import fold_numbers
from fxprune.tracing.graphs import erase_dead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["prepare_graph"]

aten = torch.ops.aten
ours = torch.ops.fxprune
_ = onnx_ops.linear  # the operators exist once their module is imported

# ── Pipeline ──────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare_graph(
    graph_module: GraphModule, example_inputs: Mapping[str, Tensor]
) -> tuple[GraphModule, dict[str, int]]:
    """Rewrite a flat graph for export.

    Args:
        graph_module: a flat graph of aten operators and Linear modules; it is left as it is.
        example_inputs: one tensor per placeholder, every dynamic axis at least 2 long.

    Returns:
        A new graph module that shares the parameters, and how many times each rewrite was applied.
    """
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    prepared = GraphModule(graph_module, graph)
    _propagate(prepared, example_inputs)
    rewrites: dict[str, Callable[[Node], Node | None]] = {
        "linears": _rewrite_linear,
        "rms_norms": _fuse_rms_norm,
        "rotary_embeddings": _RotaryFusion(),
        "attentions": _AttentionRewrite(),
        "splits": _fuse_split_heads,
        "merges": _fuse_merge_heads,
        "appends": _rewrite_append,
    }
    for node in list(graph.nodes):
        _functionalize(node)
    numbers = fold_numbers(prepared)
    real = complex_to_real(prepared)
    if real:
        _propagate(prepared, example_inputs)
    if not any(parameter.dtype is torch.bfloat16 for parameter in graph_module.parameters()):
        rewrites = {"bfloat16": _compute_in_float32} | rewrites
    # A copy is no no-op where an operator still writes into its input.
    counts = {} if any(map(_writes, graph.nodes)) else {"no_ops": _apply(prepared, _remove_no_op)}
    counts |= {"complex": real, "numbers": numbers}
    counts |= {name: _apply(prepared, rewrite) for name, rewrite in rewrites.items()}
    graph.lint()
    prepared.recompile()
    return prepared, counts


def _propagate(graph_module: GraphModule, example_inputs: Mapping[str, Tensor]) -> None:
    """Set each node's `meta["val"]`: a slim graph still carries the dense shapes."""
    with torch.no_grad():
        FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs.values())


def _apply(graph_module: GraphModule, rewrite: Callable[[Node], Node | None]) -> int:
    """Offer every node to a rewrite, and put what it returns in the node's place."""
    count = 0
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op not in {"call_function", "call_module"}:
            continue
        with graph.inserting_before(node):
            new = rewrite(node)
        if new is not None:
            new.meta.setdefault("val", node.meta.get("val"))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            count += 1
    erase_dead(graph)
    return count


# ── Helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _val(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _calls(node: Any, *targets: Any) -> bool:
    """Whether the node calls one of the operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _either(node: Node) -> Iterator[tuple[Any, Any]]:
    """Both orders of a commutative operator's operands."""
    first, second = node.args[:2]
    yield first, second
    yield second, first


def _call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call inserted at the graph's insertion point, with the module stack of `like`."""
    new = like.graph.call_function(target, args, kwargs)
    new.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    return new


# ── In-place operators ────────────────────────────────────────────────────────────────────────────────────────────


def _aliases(node: Node) -> bool:
    """Whether the node's result may share memory with its inputs."""
    if node.op == "call_module":
        return False
    if node.target is operator.getitem:
        return not isinstance(node.args[0], Node) or _aliases(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and schema.is_mutable


def _functionalize(node: Node) -> None:
    """`x.add_(y)` to `x.add(y)` where nothing else can see the write: `x` is no view, and no view of it is alive."""
    if not _writes(node) or not isinstance(node.args[0], Node):
        return
    name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
    packet = getattr(aten, name.removesuffix("_"), None)
    written = node.args[0]
    others = [user for user in written.users if user is not node]
    if not name.endswith("_") or not hasattr(packet, overload) or _aliases(written):
        return
    if written.op == "placeholder" or any(_aliases(user) or node < user for user in others):
        return
    node.target = getattr(packet, overload)


# ── No-ops ────────────────────────────────────────────────────────────────────────────────────────────────────────

_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout}
_COPIES = _CASTS | {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
}
# The second is safer: the first has no translation, so that torch.onnx retraces the whole graph, or more conditions.
_NAMESAKES = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
    aten.view.default: aten.reshape.default,  # a view of what is no longer contiguous
}


def _remove_no_op(node: Node) -> Node | None:
    """Copies that keep the dtype, slices of everything, dropout in evaluation, `x * 1` and `x + 0`."""
    if node.target in _NAMESAKES:
        return _call(node, _NAMESAKES[node.target], *node.args)
    args: Any = node.args
    source = args[0] if args else None
    before, after = _val(source), _val(node)
    if not isinstance(source, Node) or before is None or after is None or before.device != after.device:
        return None
    if before.dtype != after.dtype:
        return _call(node, aten._to_copy.default, source, dtype=after.dtype) if node.target in _CASTS else None
    idle = node.target in _COPIES
    if node.target is aten.slice.Tensor:
        _, _, start, end, step = (*args, None, None, None)[:5]
        idle = start in {None, 0} and end in {None, sys.maxsize} and step in {None, 1}
    elif node.target is aten.dropout.default:
        idle = not args[2] or args[1] == 0
    elif node.target in {aten.mul.Tensor, aten.mul.Scalar}:
        idle = before.shape == after.shape and isinstance(args[1], int | float) and args[1] == 1
    elif node.target in {aten.add.Tensor, aten.add.Scalar}:
        idle = before.shape == after.shape and isinstance(args[1], int | float) and args[1] == 0
    return source if idle else None


# ── Linear, heads and cache ───────────────────────────────────────────────────────────────────────────────────────


def _rewrite_linear(node: Node) -> Node | None:
    """A call of an `nn.Linear` to an operator on its parameters, under their qualified names."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    root = node.graph.owning_module
    assert root is not None
    module = root.get_submodule(str(node.target))
    if type(module) is not nn.Linear:
        return None
    parameters = [node.graph.get_attr(f"{node.target}.weight")]
    if module.bias is not None:
        parameters.append(node.graph.get_attr(f"{node.target}.bias"))
    return _call(node, ours.linear.default, node.args[0], *parameters, *[None] * (2 - len(parameters)))


def _swaps_heads(node: Any) -> bool:
    """Whether the node swaps axes 1 and 2 of a four-dimensional tensor."""
    if _calls(node, aten.permute.default):
        return list(node.args[1]) == [0, 2, 1, 3]
    return _calls(node, aten.transpose.int) and set(node.args[1:]) == {1, 2}


def _compute_in_float32(node: Node) -> Node | None:
    """A pointwise operator on bfloat16 (slopes) runs in float32 and is rounded: runtimes have no kernel for it."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if not pointwise or not _is_bfloat16(node) or node.target in _CASTS | {aten._to_copy.default}:
        return None

    def wide(operand: Node) -> Node:
        return _call(node, aten.to.dtype, operand, torch.float32) if _is_bfloat16(operand) else operand

    new = _call(node, node.target, *torch.fx.node.map_arg(node.args, wide), **node.kwargs)
    return _call(node, aten.to.dtype, new, torch.bfloat16)


def _is_bfloat16(node: Node) -> bool:
    value = _val(node)
    return value is not None and value.dtype is torch.bfloat16


def _fuse_split_heads(node: Node) -> Node | None:
    """`transpose(view(x, [batch, length, heads, head_dim]), 1, 2)` to `split_heads`."""
    view: Any = node.args[0] if _swaps_heads(node) else None
    if not _calls(view, aten.view.default, aten.reshape.default) or len(view.args[1]) != 4:
        return None
    source, head_dim = view.args[0], view.args[1][3]
    before, after = _val(source), _val(view)
    if before is None or after is None or before.dim() != 3 or not isinstance(head_dim, int):
        return None
    if after.shape[:2] != before.shape[:2] or after.shape[3] != head_dim:
        return None
    return _call(node, ours.split_heads.default, source, head_dim)


def _fuse_merge_heads(node: Node) -> Node | None:
    """`reshape(transpose(x, 1, 2), [batch, length, -1])` to `merge_heads`."""
    args: Any = node.args
    if not _calls(node, aten.view.default, aten.reshape.default) or len(args[1]) != 3:
        return None
    transpose = args[0]
    while _calls(transpose, aten.contiguous.default, aten.clone.default):
        transpose = transpose.args[0]
    if not _swaps_heads(transpose):
        return None
    before, after = _val(transpose), _val(node)
    if before is None or after is None or before.dim() != 4 or after.shape[:2] != before.shape[:2]:
        return None
    return _call(node, ours.merge_heads.default, transpose.args[0])


def _rewrite_append(node: Node) -> Node | None:
    """`cat([placeholder, new], -2)` of two four-dimensional tensors to `append`."""
    args: Any = node.args
    if not _calls(node, aten.cat.default) or len(args) != 2 or args[1] not in {2, -2}:
        return None
    parts = args[0]
    if len(parts) != 2 or not all(isinstance(part, Node) for part in parts) or parts[0].op != "placeholder":
        return None
    past, new = (_val(part) for part in parts)
    if past is None or new is None or past.dim() != 4 or past.dtype != new.dtype:
        return None
    return _call(node, ours.append.default, *parts)


# ── RMSNorm ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _fuse_rms_norm(node: Node) -> Node | None:
    """`weight * (x * rsqrt(mean(x ** 2) + eps))` in float32 to `rms_norm`; half precision keeps its casts."""
    if not _calls(node, aten.mul.Tensor):
        return None
    for weight, normalized in _either(node):
        scale, found = _val(weight), _normalized(normalized)
        if scale is None or scale.dim() != 1 or found is None:
            continue
        x, eps = found
        value = _val(x)
        if value is None or value.dtype != torch.float32 or scale.dtype != torch.float32:
            continue
        if value.shape[-1] == scale.shape[0]:
            return _call(node, ours.rms_norm.default, x, weight, eps)
    return None


def _normalized(node: Any) -> tuple[Node, float] | None:
    """`(x, eps)` if the node is `x * rsqrt(mean(x ** 2, -1) + eps)`."""
    if not _calls(node, aten.mul.Tensor):
        return None
    for x, inverse in _either(node):
        power = _calls(inverse, aten.pow.Tensor_Scalar) and inverse.args[1] == -0.5
        if not power and not _calls(inverse, aten.rsqrt.default):
            continue
        total = inverse.args[0]
        if not _calls(total, aten.add.Tensor) or not isinstance(total.args[1], float):
            continue
        mean = total.args[0]
        if not _calls(mean, aten.mean.dim) or mean.args[1:] != ([-1], True):
            continue
        square = mean.args[0]
        squared = _calls(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
        squared = squared or (_calls(square, aten.mul.Tensor) and square.args == (x, x))
        if squared:
            return x, total.args[1]
    return None


# ── Rotary embeddings ─────────────────────────────────────────────────────────────────────────────────────────────


class _RotaryFusion:
    """`x * cos + cat(-x[half:], x[:half]) * sin` to `rotary_embedding`.

    Every token brings its own row of the caches, batch * length rows in all, so that any scaling of the positions
    stays exact. The caches are made once for all the layers that share `cos` and `sin`.
    """

    def __init__(self) -> None:
        self._caches: dict[tuple[Node, Node], tuple[Node, Node, Node]] = {}

    def __call__(self, node: Node) -> Node | None:
        if not _calls(node, aten.add.Tensor) or node.kwargs:
            return None
        for straight, crossed in _either(node):
            if not _calls(straight, aten.mul.Tensor) or not _calls(crossed, aten.mul.Tensor):
                continue
            for x, cos in _either(straight):
                for turned, sin in _either(crossed):
                    angles = _angles(cos, sin)
                    half = _half_turn(turned, x) if angles is not None else None
                    if angles is None or half is None or not _one_row_per_token(angles, x, half):
                        continue
                    if angles not in self._caches:
                        self._caches[angles] = _make_caches(angles, half)
                    return _call(node, ours.rotary_embedding.default, x, *self._caches[angles])
        return None


def _one_row_per_token(angles: tuple[Node, Node], x: Node, half: int) -> bool:
    """Whether `cos` is (batch, length, head_dim) for `x` of (batch, heads, length, head_dim)."""
    cos, rotated = _val(angles[0]), _val(x)
    if cos is None or rotated is None or cos.dtype != rotated.dtype:
        return False
    return tuple(cos.shape) == (rotated.shape[0], rotated.shape[2], 2 * half)


def _make_caches(angles: tuple[Node, Node], half: int) -> tuple[Node, Node, Node]:
    """Row of each token, and the first halves of `cos` and `sin`, one row a token."""
    anchor = cursor = max(angles)

    def after(target: Any, *args: Any) -> Node:
        nonlocal cursor
        with anchor.graph.inserting_after(cursor):
            cursor = _call(anchor, target, *args)
        return cursor

    cos, sin = (after(aten.flatten.using_ints, after(aten.slice.Tensor, part, -1, 0, half), 0, 1) for part in angles)
    batch, length = (after(aten.sym_size.int, anchor, axis) for axis in (0, 1))
    rows = after(aten.arange.default, after(aten.sym_size.int, cos, 0))
    return after(aten.view.default, rows, [batch, length]), cos, sin


def _half_turn(node: Any, x: Node) -> int | None:
    """`half` if the node is `cat([-x[..., half:], x[..., :half]], -1)` and cuts `x` in the middle."""
    value = _val(x)
    if value is None or value.dim() != 4 or not _calls(node, aten.cat.default) or node.args[1:] not in {(-1,), (3,)}:
        return None
    parts, half = node.args[0], value.shape[-1] // 2
    if len(parts) != 2 or not _calls(parts[0], aten.neg.default) or 2 * half != value.shape[-1]:
        return None
    for part, starts, ends in (
        (parts[0].args[0], {half}, {sys.maxsize, 2 * half}),
        (parts[1], {0, None}, {half}),
    ):
        if not _calls(part, aten.slice.Tensor) or part.args[0] is not x or len(part.args) != 4:
            return None
        if part.args[1] not in {-1, 3} or part.args[2] not in starts or part.args[3] not in ends:
            return None
    return half


def _angles(cos: Any, sin: Any) -> tuple[Node, Node] | None:
    """`cos` and `sin` before they are broadcast over the heads, if their two halves are equal."""
    found: list[tuple[Any, Any]] = []
    for broadcast, function in ((cos, aten.cos.default), (sin, aten.sin.default)):
        if not _calls(broadcast, aten.unsqueeze.default) or broadcast.args[1] != 1:
            return None
        node = broadcast.args[0]
        while _calls(node, *_COPIES) or (_calls(node, aten.mul.Tensor) and isinstance(node.args[1], int | float)):
            node = node.args[0]
        doubled: Any = node.args[0] if _calls(node, function) else None
        if not _calls(doubled, aten.cat.default) or doubled.args[1:] not in {(-1,), (2,)}:
            return None
        if len(doubled.args[0]) != 2 or doubled.args[0][0] is not doubled.args[0][1]:
            return None
        found.append((broadcast.args[0], doubled.args[0][0]))
    return (found[0][0], found[1][0]) if found[0][1] is found[1][1] else None


# ── Attention ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _AttentionRewrite:
    """Scaled dot-product attention with a mask, on the key/value heads as they are in the cache.

    A boolean mask, or one that may hold -inf, gives NaN in rows that mask every key (padding), which later layers
    spread through V. The mask becomes additive and finite, once for all the layers that share it. A row that masks
    every key then attends to all of them alike; nothing that counts reads it.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[Node, torch.dtype], Node] = {}

    def __call__(self, node: Node) -> Node | None:
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("dropout_p") or given.get("is_causal"):
            return None
        query, mask = given["query"], given.get("attn_mask")
        keys, values = _ungrouped(given["key"]), _ungrouped(given["value"])
        q, k, v, m = (_val(part) for part in (query, keys, values, mask))
        if q is None or k is None or v is None or m is None or {q.dim(), k.dim(), v.dim(), m.dim()} != {4}:
            return None
        heads, kv_heads = int(q.shape[1]), int(k.shape[1])
        if v.shape[1] != kv_heads or heads % kv_heads or m.shape[1] not in {1, heads}:
            return None
        scale = given.get("scale")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        assert isinstance(mask, Node)
        additive = self._additive(mask, q.dtype)
        return _call(node, ours.grouped_attention.default, query, keys, values, additive, scale)

    def _additive(self, mask: Node, dtype: torch.dtype) -> Node:
        if (mask, dtype) not in self._masks:
            # Half of the lowest number: a score added to the lowest itself overflows to -inf in half precision.
            lowest = torch.finfo(dtype).min / 2
            with mask.graph.inserting_after(mask):
                if mask.meta["val"].dtype == torch.bool:
                    new = _call(mask, aten.logical_not.default, mask)
                    with mask.graph.inserting_after(new):
                        new = _call(mask, aten._to_copy.default, new, dtype=dtype)
                    with mask.graph.inserting_after(new):
                        new = _call(mask, aten.mul.Tensor, new, lowest)
                else:
                    new = _call(mask, aten.clamp.default, mask, lowest)
            self._masks[mask, dtype] = new
        return self._masks[mask, dtype]


def _ungrouped(node: Any) -> Any:
    """Key or value heads before `repeat_kv`: unsqueeze at 2, expand to (batch, kv_heads, groups, ...), reshape."""
    expand: Any = node.args[0] if _calls(node, aten.reshape.default, aten.view.default) else None
    while _calls(expand, aten.clone.default, aten.contiguous.default):
        expand = expand.args[0]
    unsqueeze: Any = expand.args[0] if _calls(expand, aten.expand.default) else None
    if not _calls(unsqueeze, aten.unsqueeze.default) or unsqueeze.args[1] not in {2, -3}:
        return node
    before, wide, after = _val(unsqueeze.args[0]), _val(expand), _val(node)
    if before is None or wide is None or after is None or before.dim() != 4 or wide.dim() != 5:
        return node
    batch, heads, *rest = before.shape
    repeated = tuple(wide.shape) == (batch, heads, wide.shape[2], *rest)
    merged = tuple(after.shape) == (batch, heads * wide.shape[2], *rest)
    return unsqueeze.args[0] if repeated and merged else node
