"""Projections as operators: what a product of a graph with a parameter computes, before it is lifted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxprune.tracing.lifted import Origin

__all__ = ["Projection", "grouped_products", "projection_of", "weight_behind"]

aten = torch.ops.aten


_TRANSPOSE = {aten.t.default, aten.numpy_T.default}


@dataclass(frozen=True)
class Projection:
    """What a projection node computes: `x @ weight.T + bias`, for each expert's rows where there are offsets."""

    x: Node
    weight: str
    transposed: bool  # the parameter is stored (in, out)
    bias: str | None
    offsets: Node | None = None
    op: Any = None

    @property
    def dimensions(self) -> int:
        """How many axes the weight must have."""
        return 2 if self.offsets is None else 3

    @property
    def origin(self) -> Origin:
        """What the module stands for; a bias that is added later stands beside the weight."""
        added = f"{self.weight.removesuffix('weight')}bias" if self.weight.endswith("weight") else f"{self.weight}_bias"
        return Origin(self.weight, self.bias or added, self.transposed)


def _parameter(node: Any) -> str | None:
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def _uncast(node: Any) -> Any:
    """The node behind casts to the dtype that it already has."""
    while isinstance(node, Node) and node.target is aten.to.dtype and len(node.args) > 1:
        source = node.args[0]
        if not isinstance(source, Node) or "val" not in source.meta or source.meta["val"].dtype is not node.args[1]:
            break
        node = source
    return node


def weight_behind(node: Any, axes: int = 2) -> tuple[str, bool] | None:
    """The parameter of so many axes behind a weight operand, and whether its last two are seen swapped."""
    node = _uncast(node)
    if (name := _parameter(node)) is not None:
        return name, False
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    last = {axes - 2, axes - 1}
    swaps = axes == 2 and node.target in _TRANSPOSE
    swaps |= node.target is aten.transpose.int and {axis % axes for axis in node.args[1:3]} == last  # type: ignore[operator]
    swaps |= axes == 2 and node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    name = _parameter(_uncast(node.args[0])) if swaps else None
    return None if name is None else (name, True)


def projection_of(x: Any, weight: tuple[str, bool] | None, bias: Any, *, turned: bool) -> Projection | None:
    """A product of `x` with a weight, as `weight_behind` sees it, turned by the operator or not; None if it is none."""
    name = None if bias is None else _parameter(bias)
    if weight is None or not isinstance(x, Node) or (bias is not None and name is None):
        return None
    return Projection(x, weight[0], turned != weight[1], name)


def grouped_products() -> set[Any]:
    """The operators that multiply each expert's rows by its weight; transformers registers one of them itself."""
    found = {aten._grouped_mm.default}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found.add(torch.ops.transformers.grouped_mm_fallback.default)
    return found
