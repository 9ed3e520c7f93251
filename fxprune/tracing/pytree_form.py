"""Exported graph modules that are called with nested arguments: to a flat Program, and back again.

    input_ids, DynamicCache ── flatten ──► flat tensors ── Program, passes ──► flat tensors ── unflatten ──► ModelOutput

A tool that hands its graph module to a pass wants it back with the calling convention it had: the same arguments, the
same structure of results. What the passes do not need to see (inputs that are handed back untouched, constants) is set
aside and put back.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxprune.core.errors import TraceError
from fxprune.core.program import Interface, Program
from fxprune.tracing.flatten import pair_cache, plain_graph, symbolic_axes

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

__all__ = ["CallingConvention", "program_of_exported"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CallingConvention:
    """How a graph module was called before it became a flat Program.

    Attributes:
        codegen: of the graph: names of the arguments, and the trees of arguments and results.
        inputs: names of all placeholders, in order.
        outputs: for every flat result, its name in the Program, or what stands there whatever the Program does: a
            placeholder that is handed back, or a constant.
    """

    codegen: Any
    inputs: tuple[str, ...]
    outputs: tuple[_Output, ...]

    def restore(self, program: Program) -> GraphModule:
        """A graph module that computes what the Program does and is called as the one that it came from.

        Raises:
            TraceError: the Program has lost one of its outputs.
        """
        graph = torch.fx.Graph()
        holders = {name: graph.placeholder(name) for name in self.inputs}
        _state_equal_lengths(graph, holders, program.interface)
        old = {node.name: node for node in program.graph_module.graph.nodes if node.op == "placeholder"}
        copied: dict[Node, Node] = {node: holders[name] for name, node in old.items()}
        returned = graph.graph_copy(program.graph_module.graph, copied)
        assert isinstance(returned, (tuple, list))
        named = dict(zip(program.interface.outputs, returned, strict=True))
        results: list[Any] = []
        for output in self.outputs:
            if output.name is not None and output.name not in named:
                raise TraceError(f"the graph no longer has the output {output.name}, which its caller expects")
            results.append(named[output.name] if output.name is not None else holders.get(output.rest, output.rest))
        graph.output(tuple(results))
        graph.set_codegen(self.codegen)
        return GraphModule(program.graph_module, graph)

    def put_inputs(self, program: Program, inputs: MutableMapping[str, Any]) -> None:
        """Replace the tensors in nested arguments by the Program's example inputs, whose caches may be smaller."""
        ordered = {name: inputs[name] for name in self.codegen.pytree_info.orig_args}
        leaves, spec = pytree.tree_flatten(ordered)
        examples = program.interface.example_inputs
        new = [examples.get(name, leaf) for name, leaf in zip(self.inputs, leaves, strict=True)]
        inputs.update(pytree.tree_unflatten(new, spec))


@dataclass(frozen=True)
class _Output:
    """One flat result: its name in the Program, or else a placeholder's name or a constant."""

    name: str | None
    rest: Any = None


def program_of_exported(graph_module: GraphModule, inputs: Mapping[str, Any]) -> tuple[Program, CallingConvention]:
    """Make a flat Program of the graph module of an exported program.

    Args:
        graph_module: `ExportedProgram.module()`; its graph is changed.
        inputs: the keyword arguments that it was exported with, nested.

    Returns:
        The Program, without a source, and how to go back. The output `logits` has this name, a cache tensor that comes
        in and goes out has the name of its placeholder, other outputs have numbers.

    Raises:
        TraceError: the graph was not exported with keyword arguments, or an argument is no tensor and is used.
    """
    codegen = graph_module.graph._codegen
    info = getattr(codegen, "pytree_info", None)
    if info is None or set(info.orig_args) != set(inputs):
        raise TraceError(
            f"the graph is not called with the arguments {', '.join(inputs)}; give the module of a torch.export "
            "program and the keyword arguments that it was exported with"
        )
    leaves = pytree.tree_leaves({name: inputs[name] for name in info.orig_args})
    plain_graph(graph_module)
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = tuple(node.name for node in placeholders)
    given = dict(zip(placeholders, leaves, strict=True))
    if odd := [node.name for node, leaf in given.items() if node.users and not isinstance(leaf, Tensor)]:
        raise TraceError(
            f"the argument {odd[0]} is no tensor and the graph computes with it; leave it out of the inputs"
        )
    output = next(node for node in graph.nodes if node.op == "output")
    results = _name_outputs(output, list(output.args[0]), _keys(info.out_spec, len(output.args[0])))
    output.args = (tuple(node for result, node in results if result.name is not None),)
    examples: dict[str, Tensor] = {}
    for node, leaf in given.items():
        if isinstance(leaf, Tensor) and node.users:
            examples[node.name] = leaf
        else:
            graph.erase_node(node)
    kept = tuple(result.name for result, _ in results if result.name is not None)
    axes = {node.name: symbolic_axes(node) for node in graph.nodes if node.op == "placeholder"}
    cache = pair_cache(examples, kept)
    interface = Interface(examples, axes, kept, cache, causal=bool(cache) and "logits" in kept)
    # A fresh module: the exported one carries a hook that checks inputs against the original signature.
    program = Program(GraphModule(graph_module, graph), interface)
    return program, CallingConvention(codegen, names, tuple(result for result, _ in results))


def _state_equal_lengths(graph: torch.fx.Graph, holders: Mapping[str, Node], interface: Interface) -> None:
    """Say first which lengths are the same, as the guards of the exported program did.

    Tracing again would otherwise compare lengths before it finds out that they are equal, and bake in the answer.
    """
    first: dict[str, Node] = {}
    for name, axes in interface.dynamic_axes.items():
        for axis, symbol in axes.items():
            size = graph.call_function(aten.sym_size.int, (holders[name], axis))
            known = first.setdefault(symbol, size)
            if known is not size:
                graph.call_function(torch._check, (graph.call_function(operator.eq, (size, known)),))


def _keys(spec: Any, count: int) -> list[str]:
    """The key of every flat result in the structure that is returned, for those that are not nested deeper."""
    context, children = spec.context, spec.children()
    keys = context if isinstance(context, list) else context[0] if isinstance(context, tuple) and context else None
    if not isinstance(keys, list) or len(keys) != len(children):
        return [""] * count
    return [
        str(key) if child.is_leaf() else "" for key, child in zip(keys, children, strict=True) for _ in _each(child)
    ]


def _each(spec: Any) -> range:
    return range(spec.num_leaves)


def _name_outputs(output: Node, values: list[Any], keys: list[str]) -> list[tuple[_Output, Any]]:
    named: list[tuple[_Output, Any]] = []
    taken: set[str] = set()
    for index, (value, key) in enumerate(zip(values, keys, strict=True)):
        if not isinstance(value, Node):
            named.append((_Output(None, value), None))
        elif value.op == "placeholder" and list(value.users) == [output]:
            named.append((_Output(None, value.name), None))
        else:
            name = "logits" if key == "logits" else _appended_to(value)
            name = f"output_{index}" if name is None or name in taken else name
            taken.add(name)
            named.append((_Output(name), value))
    return named


def _appended_to(value: Node) -> str | None:
    """The placeholder that a value is a continuation of: a cache."""
    if value.target is not aten.cat.default:
        return None
    pieces: Any = value.args[0]
    first = pieces[0]
    return first.name if isinstance(first, Node) and first.op == "placeholder" else None
