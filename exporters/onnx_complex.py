"""An FX rewrite that prepares a graph for ONNX, which has no complex numbers: each becomes two real tensors.

    polar(r, a)          r * cos(a), r * sin(a)
    view_as_complex(x)   x[..., 0], x[..., 1]
    z * w                re(z) re(w) - im(z) im(w), re(z) im(w) + im(z) re(w)
    view_as_real(z)      stack([re(z), im(z)], -1)

Operators that only move values do so with both parts. torch.onnx translates some operators of complex numbers, not all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from fxprune.core.errors import ExportError
from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.nodes import get_attribute, module_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["complex_to_real"]

aten = torch.ops.aten
_Pair = tuple[Any, Any]

_MOVES = {
    aten.alias.default,
    aten.cat.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.index.Tensor,
    aten.index_select.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.stack.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
_CASTS = {
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
}


def complex_to_real(graph_module: GraphModule) -> int:
    """Compute with real tensors what a graph computes with complex ones, in place.

    Args:
        graph_module: a flat graph whose nodes have `meta["val"]`; that of what is new has to be propagated.

    Returns:
        How many operators were replaced.

    Raises:
        ExportError: a complex tensor goes in or out, or an operator is not known here; the message names it.
    """
    return _Rewrite(graph_module).run()


@dataclass
class _Rewrite:
    """One run over a graph."""

    graph_module: GraphModule
    parts: dict[Node, _Pair] = field(default_factory=dict)
    like: Node | None = None

    def run(self) -> int:
        graph = self.graph_module.graph
        for node in list(graph.nodes):
            given = [each for each in node.all_input_nodes if each in self.parts]
            if not given and not _is_complex(node):
                continue
            self.like = node
            with graph.inserting_before(node):
                made = self._made(node)
            if isinstance(made, tuple):
                self.parts[node] = made
            else:
                node.replace_all_uses_with(made)
        erase_dead(graph)
        return len(self.parts)

    def _made(self, node: Node) -> _Pair | Node:
        """The two parts of what a node gives, or the real tensor that it gives."""
        if node.op == "get_attr":
            return self._constants(node)
        rule = _RULES.get(node.target)
        if node.op == "call_function" and rule is not None:
            made: _Pair | Node = rule(self, *node.args)
            return made
        source = node.args[0] if node.args else None
        if (
            node.target in _CASTS
            and isinstance(source, Node)
            and source in self.parts
            and _dtype(node) is _dtype(source)
        ):
            return self.parts[source]
        if node.target in _MOVES:
            return self._moved(node, 0), self._moved(node, 1)
        where = module_of(node) or "the graph"
        raise ExportError(
            f"{node.target if node.op == 'call_function' else node.op} in {where} works on complex numbers, which "
            "ONNX does not have, and its form in real numbers is not known; use the checkpoint with transformers"
        )

    def _constants(self, node: Node) -> _Pair:
        """A complex constant as two."""
        value = get_attribute(self.graph_module, str(node.target))
        names = [f"{str(node.target).replace('.', '_')}_{part}" for part in ("real", "imag")]
        for name, part in zip(names, (value.real, value.imag), strict=True):
            self.graph_module.register_buffer(name, part.detach().contiguous().clone())
        return self._new("get_attr", names[0]), self._new("get_attr", names[1])

    def _new(self, op: str, target: Any, *args: Any) -> Node:
        assert self.like is not None
        new = self.like.graph.create_node(op, target, args)
        new.meta = {key: self.like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.like.meta}
        return new

    def call(self, target: Any, *args: Any) -> Node:
        """A call with the module stack of the node that it is for."""
        return self._new("call_function", target, *args)

    def _moved(self, node: Node, part: int) -> Node:
        args, kwargs = torch.fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda each: self.parts[each][part] if each in self.parts else each
        )
        new = self.call(node.target, *args)
        new.kwargs = kwargs
        return new


def _is_complex(node: Any) -> bool:
    dtype = _dtype(node)
    return dtype is not None and dtype.is_complex


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _polar(new: _Rewrite, radius: Node, angle: Node) -> _Pair:
    return tuple(  # type: ignore[return-value]  # two
        new.call(aten.mul.Tensor, radius, new.call(turned, angle)) for turned in (aten.cos.default, aten.sin.default)
    )


def _view_as_complex(new: _Rewrite, x: Node) -> _Pair:
    return new.call(aten.select.int, x, -1, 0), new.call(aten.select.int, x, -1, 1)


def _view_as_real(new: _Rewrite, z: Node) -> Node:
    return new.call(aten.stack.default, list(new.parts[z]), -1)


def _mul(new: _Rewrite, first: Any, second: Any) -> _Pair:
    if first not in new.parts:
        first, second = second, first
    re, im = new.parts[first]
    if second not in new.parts:
        return new.call(aten.mul.Tensor, re, second), new.call(aten.mul.Tensor, im, second)
    other_re, other_im = new.parts[second]
    factors = (re, other_re), (im, other_im), (re, other_im), (im, other_re)
    products = [new.call(aten.mul.Tensor, *pair) for pair in factors]
    return new.call(aten.sub.Tensor, *products[:2]), new.call(aten.add.Tensor, *products[2:])


def _conj(new: _Rewrite, z: Node) -> _Pair:
    re, im = new.parts[z]
    return re, new.call(aten.neg.default, im)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.complex.default: lambda _, re, im: (re, im),
    aten.conj.default: _conj,
    aten._conj.default: _conj,
    aten.imag.default: lambda new, z: new.parts[z][1],
    aten.mul.Tensor: _mul,
    aten.polar.default: _polar,
    aten.sym_size.int: lambda new, z, axis: new.call(aten.sym_size.int, new.parts[z][0], axis),
    aten.real.default: lambda new, z: new.parts[z][0],
    aten.view_as_complex.default: _view_as_complex,
    aten.view_as_real.default: _view_as_real,
}
