"""RMS norms over a narrowed dimension: the constants that keep them exact.

    x ─ pow 2 ─ mean ─ add eps ─ rsqrt ─ mul x ─ mul w          (or one `rms_norm` operator)

Let d of D channels stay, the others being zero, and r = d/D. The dense norm divides by sqrt(r*m + eps), where m is the
mean over the d channels. As r*m + eps = r*(m + eps/r), the narrow norm is exact with eps' = eps/r and w' = w/sqrt(r),
that is eps*D/d and w*sqrt(D/d). A mean of anything but squares, a norm without a
weight, and LayerNorm (its mean is subtracted, and other channels' share in it is not zero) cannot be rescaled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RmsNorm", "find_rms_norm", "rms_norms"]

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.alias.default}
_SUMS = {aten.add.Tensor, aten.add.Scalar}


@dataclass(frozen=True)
class RmsNorm:
    """The constants of one RMS norm in a graph.

    Attributes:
        site: node that reduces: the mean, or the `rms_norm` operator.
        epsilon_node: node that holds the epsilon as a literal.
        epsilon: its value.
        weight: qualified name of the weight.
        offset: what is added to the weight before it is used (1 where a norm stores its weight minus one).
    """

    site: Node
    epsilon_node: Node
    epsilon: float
    weight: str
    offset: float = 0.0

    def rescaled(self, weight: torch.Tensor, ratio: float) -> torch.Tensor:
        """The weight of the narrow norm, from the kept elements of the dense one; `ratio` is d/D."""
        narrow: torch.Tensor = (weight.double() + self.offset) / ratio**0.5 - self.offset
        return narrow.to(weight.dtype)


def _through_casts(node: Node) -> Node:
    """The last of the casts that alone use a node."""
    while len(node.users) == 1 and next(iter(node.users)).target in _CASTS:
        node = next(iter(node.users))
    return node


def _source(node: Any) -> Any:
    while isinstance(node, Node) and node.target in _CASTS:
        node = node.args[0]
    return node


def _only_user(node: Node, targets: set[Any]) -> Node | None:
    users = list(_through_casts(node).users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _is_square(node: Any) -> Any:
    """What is squared; None when it is no square."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return _source(node.args[0])
    if node.target is aten.square.default:
        return _source(node.args[0])
    same = node.target is aten.mul.Tensor and _source(node.args[0]) is _source(node.args[1])
    return _source(node.args[0]) if same else None


def _weight(root: torch.nn.Module, node: Any) -> tuple[str, float] | None:
    """The parameter behind a factor, and what is added to it."""
    node, offset = _source(node), 0.0
    if isinstance(node, Node) and node.target in _SUMS:
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        tensors = [a for a in node.args if isinstance(a, Node)]
        if len(numbers) != 1 or len(tensors) != 1 or node.kwargs:
            return None
        node, offset = _source(tensors[0]), float(numbers[0])
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(root)
    return (str(node.target), offset) if isinstance(value, torch.nn.Parameter) and value.dim() == 1 else None


def find_rms_norm(root: GraphModule, node: Node) -> RmsNorm | None:
    """Read the norm that a reducing node belongs to; None when it is no RMS norm with a weight of its own."""
    if node.target is aten.rms_norm.default:
        return _operator_norm(root, node)
    return _written_out_norm(root, node) if node.target is aten.mean.dim else None


def _operator_norm(root: GraphModule, node: Node) -> RmsNorm | None:
    weight = _weight(root, node.args[2]) if len(node.args) > 2 else None
    if weight is None or weight[1]:
        return None
    epsilon = node.args[3] if len(node.args) > 3 else None
    value = float(epsilon) if isinstance(epsilon, (int, float)) else _default_epsilon(node)
    return RmsNorm(node, node, value, weight[0])


def _written_out_norm(root: GraphModule, mean: Node) -> RmsNorm | None:
    squared = _is_square(_source(mean.args[0]))
    total = _only_user(mean, _SUMS)
    inverse = None if total is None else _only_user(total, {aten.rsqrt.default})
    product = None if inverse is None else _only_user(inverse, {aten.mul.Tensor})
    if total is None or product is None or squared not in [_source(argument) for argument in product.args]:
        return None
    literals = [argument for argument in total.args if isinstance(argument, float)]
    scaled = _only_user(product, {aten.mul.Tensor})
    if len(literals) != 1 or scaled is None:
        return None
    last = _through_casts(product)
    factors = [argument for argument in scaled.args if argument is not last]
    weight = _weight(root, factors[0]) if len(factors) == 1 else None
    return None if weight is None else RmsNorm(mean, total, literals[0], *weight)


def _default_epsilon(node: Node) -> float:
    source = node.args[0]
    dtype = source.meta["val"].dtype if isinstance(source, Node) and "val" in source.meta else torch.float32
    return float(torch.finfo(dtype).eps)


def rms_norms(graph_module: GraphModule) -> Iterator[RmsNorm]:
    """All RMS norms of a graph, in graph order."""
    for node in graph_module.graph.nodes:
        found = find_rms_norm(graph_module, node) if node.op == "call_function" else None
        if found is not None:
            yield found
