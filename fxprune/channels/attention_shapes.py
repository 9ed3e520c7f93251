"""Attention by data flow: the head counts and head sizes that a graph's attentions really have.

The graph is run once under fake tensors, so nothing is computed, the meta device is enough, and a slim graph shows its
slim heads whatever its configuration says. Accounting multiplies these sizes to attention MACs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from fxprune.core.errors import PreconditionError
from fxprune.tracing.grouped import GroupedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    Shapes = Mapping[Any, tuple[int, ...]]

__all__ = [
    "MOVEMENT",
    "POINTWISE",
    "AttentionShape",
    "attention_shapes",
    "attribute_of",
    "grouped_rows",
    "is_grouped",
    "only_operand",
    "op_name",
    "parameter_products",
    "propagated_shapes",
    "traced_shapes",
]

# fmt: off
MOVEMENT = frozenset((
    "_to_copy", "_unsafe_view", "alias", "bfloat16", "clone", "contiguous", "detach", "detach_", "expand", "flatten",
    "float", "getitem", "half", "index", "lift_fresh_copy", "narrow", "permute", "reshape", "select", "slice",
    "squeeze", "t", "to", "transpose", "type_as", "unflatten", "unsqueeze", "view",
))
"""Bare names of ops that only move, select or cast the values of their first operand."""

POINTWISE = frozenset((
    "clamp", "div", "dropout", "log_softmax", "mul", "neg", "sigmoid", "softmax", "tanh", "truediv",
))
"""Bare names of ops that act on the values of one tensor, such as the soft cap or the scale of logits."""

_CARRIES_SCORES = MOVEMENT | POINTWISE | {"add", "cat", "masked_fill", "masked_fill_", "maximum", "sub", "where"}
_SCORE_PRODUCTS = frozenset(("baddbmm", "bmm", "matmul"))
# fmt: on

# Grouped and custom products come under many names (`_grouped_mm`, `grouped_mm_fallback`, `gemm_forward`, ...).
_PRODUCT = re.compile("mm|linear|matmul|conv|einsum")


@dataclass(frozen=True)
class AttentionShape:
    """What one attention multiplies for each pair of a new token and a token of the whole sequence.

    Attributes:
        name: qualified name of the module that owns the attention, or the node's name.
        heads: number of query heads (K/V heads are repeated to it; repetition costs no MACs).
        query_dim: channels of a query head.
        value_dim: channels of a value head.
    """

    name: str
    heads: int
    query_dim: int
    value_dim: int

    def macs(self, new: int, total: int) -> int:
        """MACs of scores and weighted values of `new` tokens over `total`; masked pairs are computed too."""
        return self.heads * (self.query_dim + self.value_dim) * new * total


def attention_shapes(
    graph_module: GraphModule,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor],
    shapes: Shapes | None = None,
) -> tuple[AttentionShape, ...]:
    """Find the attentions of a graph and their sizes, in graph order.

    An attention is a `scaled_dot_product_attention`, or a softmax with a product of activations before it and one
    after it.

    Args:
        graph_module: the graph; its first input holds tokens, (batch, new) integers or (batch, new, channels) floats.
        example_inputs: inputs by name or in order; only shapes and dtypes are used.
        shapes: what `propagated_shapes` returned for the same inputs, to save the run.

    Raises:
        PreconditionError: an input of the graph has no example.
    """
    shapes = propagated_shapes(graph_module, example_inputs) if shapes is None else shapes
    tokens = _tokens(graph_module, shapes)
    found: list[AttentionShape] = []
    for node in graph_module.graph.nodes:
        if node.op not in {"call_function", "call_method"}:
            continue
        name = op_name(node)
        if "scaled_dot_product" in name and "attention" in name:
            query, value = shapes[node.args[0]], shapes[node.args[2]]
            found.append(AttentionShape(_owner(node), math.prod(query[:-1]) // tokens, query[-1], value[-1]))
        elif name in {"softmax", "_softmax"}:
            before = _nearest_products(graph_module, node, forward=False)
            after = _nearest_products(graph_module, node, forward=True)
            if before and after:
                query_dim = sum(shapes[_left_factor(product)][-1] for product in before)
                value_dim = sum(shapes[product][-1] for product in after)
                heads = math.prod(shapes[node][:-1]) // tokens
                found.append(AttentionShape(_owner(node), heads, query_dim, value_dim))
    return tuple(found)


def parameter_products(graph_module: GraphModule) -> Iterator[str]:
    """Labels of the products with a parameter that are calls of a function instead of an `nn.Linear`."""
    for node in graph_module.graph.nodes:
        if node.op in {"call_function", "call_method"} and _PRODUCT.search(op_name(node)):
            for target in _parameter_factors(graph_module, node):
                yield f"{op_name(node)}({target})"


def grouped_rows(graph_module: GraphModule, shapes: Shapes) -> dict[Node, Fraction]:
    """How many rows each call of a `GroupedLinear` projects for one token: the experts that a token is sent to.

    Args:
        graph_module: the graph; its first input holds tokens.
        shapes: shapes of its values (`propagated_shapes` or `traced_shapes`); a call whose shapes are not among them
            is left out.
    """
    tokens = _tokens(graph_module, shapes)
    return {
        node: Fraction(math.prod(shapes[node][:-1]), tokens)
        for node in graph_module.graph.nodes
        if tokens and node in shapes and is_grouped(graph_module, node)
    }


def is_grouped(graph_module: GraphModule, node: Node) -> bool:
    """Whether a node calls a `GroupedLinear`."""
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), GroupedLinear)


def _tokens(graph_module: GraphModule, shapes: Shapes) -> int:
    """Tokens in the first input, (batch, new) or (batch, new, channels); 0 when its shape is not known."""
    first = next((node for node in graph_module.graph.nodes if node.op == "placeholder"), None)
    return math.prod(shapes[first][:2]) if first in shapes else 0


def traced_shapes(graph_module: GraphModule) -> dict[Any, tuple[int, ...]]:
    """Shapes that values had for the inputs that the graph was traced with, where tracing left them."""
    found = {}
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = [getattr(getattr(size, "node", None), "hint", size) for size in value.shape]
            if None not in sizes:
                found[node] = tuple(int(size) for size in sizes)
    return found


def op_name(node: Node) -> str:
    """The op's bare name: `view` for `aten.view.default`, for `Tensor.view` and for a method; empty for no op."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    return str(getattr(packet, "__name__", ""))


def attribute_of(module: nn.Module, target: str) -> object:
    """What a `get_attr` node reads: the attribute with the qualified name `target`."""
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def only_operand(node: Node) -> Node | None:
    """The one activation that a movement or pointwise op acts on; None when there is no such op or no such operand."""
    name = op_name(node)
    if name in MOVEMENT and node.args and isinstance(node.args[0], Node):
        return node.args[0]
    if name in POINTWISE:
        operands = [arg for arg in node.args[:2] if isinstance(arg, Node) and arg.op != "get_attr"]
        return operands[0] if len(operands) == 1 else None
    return None


def _parameter_factors(graph_module: GraphModule, product: Node) -> list[str]:
    targets = []
    for operand in product.all_input_nodes:
        source: Node | None = operand
        while source is not None and source.op != "get_attr":
            source = only_operand(source)
        value = None if source is None else attribute_of(graph_module, str(source.target))
        if source is not None and isinstance(value, nn.Parameter) and value.ndim >= 2:
            targets.append(str(source.target))
    return targets


def _left_factor(product: Node) -> Node:
    factor = product.args[1 if op_name(product) == "baddbmm" else 0]
    assert isinstance(factor, Node)
    return factor


def _nearest_products(graph_module: GraphModule, softmax: Node, *, forward: bool) -> list[Node]:
    """Products of activations next to a softmax, through ops that leave scores as scores."""
    pending, seen, products = [softmax], {softmax}, []
    while pending:
        node = pending.pop()
        for neighbour in node.users if forward else node.all_input_nodes:
            if neighbour in seen:
                continue
            seen.add(neighbour)
            if op_name(neighbour) in _SCORE_PRODUCTS:
                is_scores = not forward or _left_factor(neighbour) is node
                if is_scores and not _parameter_factors(graph_module, neighbour):
                    products.append(neighbour)
            elif op_name(neighbour) in _CARRIES_SCORES:
                pending.append(neighbour)
    return products


class _ShapeRecorder(Interpreter):
    """Runs a graph and notes the shape of every tensor."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> object:
        value: object = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def propagated_shapes(
    graph_module: GraphModule, example_inputs: Mapping[str, Tensor] | Sequence[Tensor]
) -> dict[Any, tuple[int, ...]]:
    """Shapes of every tensor in the graph, by node, from one run under fake tensors.

    Raises:
        PreconditionError: an input of the graph has no example.
    """
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = example_inputs if isinstance(example_inputs, Mapping) else dict(zip(names, example_inputs, strict=False))
    missing = [name for name in names if name not in given]
    if missing:
        raise PreconditionError(f"cannot find the graph's attentions: no example input for {missing}; pass them all")
    # The examples may live elsewhere than the weights (a meta model traced with real token ids).
    device = next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))
    recorder = _ShapeRecorder(graph_module)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        recorder.run(*(torch.empty(given[name].shape, dtype=given[name].dtype, device=device) for name in names))
    return recorder.shapes


def _owner(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), node.name)
