"""Putting a slim graph together: modules and tensors that are still read, caches that are still filled, all shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fxprune.core.errors import PostconditionError, UnsupportedOpError
from fxprune.core.program import CacheEntry
from fxprune.tracing.graphs import erase_dead
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from fxprune.core.program import Interface
    from fxprune.slimming.builder import GraphBuilder

__all__ = ["assemble"]

aten = torch.ops.aten


def assemble(builder: GraphBuilder) -> tuple[GraphModule, Interface]:
    """Make a module and its interface of what a builder wrote, and prove that every shape is what was predicted."""
    graph = builder.graph
    interface = _without_dropped(builder)
    _drop_inputs(graph, builder.interface, interface)
    erase_dead(graph, inputs=set(builder.examples) - set(interface.example_inputs))
    root = nn.Module()
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and not _present(root, name):
            _add(root, name, builder.modules[name])
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name in builder.tensors and not _present(root, name):
            _add(root, name, builder.tensors[name])
    _tie(builder.old, root)
    module = GraphModule(root, graph)
    _check_shapes(module, interface, builder.expected)
    return module, interface


def _without_dropped(builder: GraphBuilder) -> Interface:
    """The interface without the caches of layers that were left out; the layers that stay are counted anew."""
    old, dropped = builder.interface, builder.cut.dropped
    cache = [entry for entry in old.cache if entry.output not in dropped]
    gone = {entry.input for entry in old.cache if entry.output in dropped}
    order = {layer: index for index, layer in enumerate(dict.fromkeys(entry.layer for entry in cache))}
    return replace(
        old,
        example_inputs={name: builder.examples[name] for name in old.inputs if name not in gone},
        dynamic_axes={name: axes for name, axes in old.dynamic_axes.items() if name not in gone},
        outputs=tuple(name for name in old.outputs if name not in dropped),
        cache=tuple(CacheEntry(entry.input, entry.output, order[entry.layer], entry.kind) for entry in cache),
    )


def _drop_inputs(graph: torch.fx.Graph, old: Interface, interface: Interface) -> None:
    """Inputs that are gone may still be asked for a length: another input with the same symbol answers."""
    holders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    axis_of: dict[str, tuple[Node, int]] = {}
    for name, axes in interface.dynamic_axes.items():
        for axis, symbol in axes.items():
            axis_of.setdefault(symbol, (holders[name], axis))
    for name, node in holders.items():
        if name in interface.example_inputs:
            continue
        axes = old.dynamic_axes.get(name, {})
        for user in list(node.users):
            symbol = axes.get(int(str(user.args[1])), "") if user.target is aten.sym_size.int else ""
            if symbol in axis_of:
                user.args = axis_of[symbol]


def _add(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Set a dotted attribute, making containers on the way."""
    owner, _, leaf = name.rpartition(".")
    module = root
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Module):
        module.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value)


def _present(root: nn.Module, name: str) -> bool:
    try:
        get_attribute(root, name)
    except AttributeError:
        return False
    return True


def _tie(old: nn.Module, new: nn.Module) -> None:
    """Parameters that were one tensor stay one tensor."""
    first: dict[int, nn.Parameter] = {}
    for name, parameter in list(new.named_parameters(remove_duplicate=False)):
        shared = get_attribute(old, name)
        known = first.setdefault(id(shared), parameter)
        if parameter is not known:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_parameter(leaf, known)


def _check_shapes(module: GraphModule, interface: Interface, expected: dict[Node, list[tuple[int, ...]]]) -> None:
    """Run the new graph on fake tensors and compare every shape with the prediction."""
    mode = FakeTensorMode()
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = mode.from_tensor(interface.example_inputs[node.name], static_shapes=True)
        elif node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            values[node] = mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        elif node.op != "output":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with mode, torch.no_grad():
                if node.op == "call_module":
                    linear = module.get_submodule(str(node.target))
                    state: dict[str, Tensor] = {
                        k: mode.from_tensor(v, static_shapes=True) for k, v in linear.named_parameters()
                    }
                    values[node] = torch.func.functional_call(linear, state, args, kwargs)
                else:
                    values[node] = _called(node, args, kwargs)
        if node in expected:
            listed = values[node] if isinstance(values[node], (tuple, list)) else [values[node]]
            shapes = [tuple(value.shape) for value in listed]
            if shapes != expected[node] and all(0 not in shape for shape in shapes):
                raise PostconditionError(
                    f"slim: node {node.name} ({node.target}) has shape {shapes[0]}, predicted {expected[node][0]}; "
                    "this is a bug in a rewrite rule, please report it with the model's config"
                )


def _called(node: Node, args: Any, kwargs: Any) -> Any:
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError, ValueError) as error:  # what operators raise for shapes
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedOpError(
            f"slim: node {node.name} ({node.target}) does not run with what the plan keeps ({reason}); keep these units"
        ) from error
