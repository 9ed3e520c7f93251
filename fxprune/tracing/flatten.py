"""The exported graph without its pytree clothes: flat tensors in, a flat tuple out, names from the trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fxprune.core.program import CacheEntry, Interface
from fxprune.models.cache_names import name_among
from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.normalise import normalise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["flatten", "pair_cache", "plain_graph", "symbolic_axes"]


_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


def flatten(exported: torch.export.ExportedProgram, inputs: dict[str, Any]) -> tuple[torch.fx.GraphModule, Interface]:
    """Take the graph out of its pytree clothes: flat tensors in, flat tuple out, names from the trees."""
    graph_module: torch.fx.GraphModule = exported.module(check_guards=False)
    plain_graph(graph_module)
    graph = graph_module.graph
    names = _output_names(exported, inputs)
    kept = _drop_passed_through(graph, names)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    examples = {node.name: leaf for node, leaf in zip(placeholders, leaves, strict=True)}
    for node in [node for node in placeholders if not node.users and node.name in names]:
        del examples[node.name]
        placeholders.remove(node)
        graph.erase_node(node)
    axes = {node.name: symbolic_axes(node) for node in placeholders}
    interface = Interface(examples, axes, kept, pair_cache(examples, kept))
    # A fresh module: the exported one carries a hook that checks inputs against the original signature.
    return torch.fx.GraphModule(graph_module, graph), interface


def plain_graph(graph_module: torch.fx.GraphModule) -> None:
    """Take pytrees, assertions and guards out of an exported graph, in place, and normalise it."""
    graph = graph_module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target == "_guards_fn"]:
        graph.erase_node(node)
    erase_dead(graph)
    normalise(graph_module)


def symbolic_axes(placeholder: torch.fx.Node) -> dict[int, str]:
    """The axes of an exported graph's input whose length may change, with the names of their symbols."""
    return {
        axis: str(size)
        for axis, size in enumerate(placeholder.meta["val"].shape)
        if isinstance(size, torch.SymInt) and not is_concrete_int(size)
    }


def _output_names(exported: torch.export.ExportedProgram, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Name each output after its path in the returned structure: `logits`, `cache_0`, ...; a cache after its input."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    placeholder = [object() for _ in range(spec.num_leaves)]
    children = spec.children() if hasattr(spec, "children") else spec.children_specs
    context = spec.context
    keys = context if isinstance(context, list) else context[0] if isinstance(context, tuple) and context else None
    if not isinstance(keys, list) or len(keys) != len(children):
        keys = [f"output_{index}" for index in range(len(children))] if children else ["output_0"]
    names: list[str] = []
    for returned, child in zip(keys, children or [spec], strict=True):
        key, leaves = name_among(inputs, str(returned)), child.num_leaves
        names += [key] if leaves == 1 and child.is_leaf() else [f"{key}_{index}" for index in range(leaves)]
    assert len(names) == len(placeholder)
    return tuple(names)


def _by_products(names: tuple[str, ...], inputs: set[str]) -> set[str]:
    """What a model with logits returns beside them: hidden states, and caches that it does not take back."""
    return {name for name in names if name != "logits" and name not in inputs} if "logits" in names else set()


def _drop_passed_through(graph: torch.fx.Graph, names: tuple[str, ...]) -> tuple[str, ...]:
    """Drop by-products, and inputs handed back untouched (token counters of some caches); return the names left."""
    dropped = _by_products(names, {node.name for node in graph.nodes if node.op == "placeholder"})
    output = next(node for node in graph.nodes if node.op == "output")
    values = output.args[0]
    assert isinstance(values, (list, tuple))
    kept = [
        (name, value)
        for name, value in zip(names, values, strict=True)
        if name not in dropped
        and not (isinstance(value, torch.fx.Node) and value.op == "placeholder" and list(value.users) == [output])
    ]
    output.args = (tuple(value for _, value in kept),)
    erase_dead(graph)
    return tuple(name for name, _ in kept)


def pair_cache(examples: Mapping[str, Tensor], outputs: tuple[str, ...]) -> tuple[CacheEntry, ...]:
    """Cache tensors are those that come in and go out under one name; keys and values alternate."""
    both = [name for name, leaf in examples.items() if name in outputs and leaf.dim() == 4]
    return tuple(
        CacheEntry(input=name, output=name, layer=index // 2, kind="value" if index % 2 else "key")
        for index, name in enumerate(both)
    )
