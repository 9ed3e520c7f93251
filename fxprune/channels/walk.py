"""Channel tracing: which weights belong together, found by data flow alone.

The graph is walked once under fake tensors at the size of the example inputs. Beside every activation runs an integer
tensor of channel ids; the rules of `fxprune.channels.rules.base` say how each operator moves and relates them. The
result is a `ChannelMap`. Slimming walks the same way again with a visitor, now knowing which ids stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import Node

from fxprune.channels.call import Call, Walk
from fxprune.channels.rules.base import Ids, find_rule
from fxprune.core.channel_ids import ChannelLedger, ChannelMap, Pin
from fxprune.core.errors import UnsupportedOpError
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.masks import UnitMask
from fxprune.tracing.nodes import get_attribute, module_of
from fxprune.tracing.unreached import pin_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fxprune.core.program import Interface

    Visitor = Callable[["Call", Ids], None]

__all__ = ["trace_channels", "walk"]


def _placeholder(walk: Walk, node: Node) -> tuple[Any, Ids]:
    """A graph input: its static axes carry channels of their own."""
    example = walk.interface.example_inputs[node.name]
    value = walk.fake(example)
    dynamic = walk.interface.dynamic_axes.get(node.name, {})
    static = [axis for axis in range(example.dim()) if axis not in dynamic and example.shape[axis] > 1]
    if not example.is_floating_point() or not static:
        return value, None
    shape = [example.shape[axis] if axis in static else 1 for axis in range(example.dim())]
    fresh = walk.ledger.fresh(int(np.prod(shape)))
    walk.input_ids.append(fresh)
    walk.ledger.inputs.append(Pin(fresh, "placeholder", node.name, "the caller supplies this axis"))
    return value, torch.from_numpy(fresh).reshape(shape).expand(example.shape)


def _get_attr(walk: Walk, node: Node) -> tuple[Any, Ids]:
    """A parameter, buffer or constant: one that runs along a single axis carries that axis's channels."""
    tensor = get_attribute(walk.root, str(node.target))
    if not isinstance(tensor, Tensor):
        return tensor, None
    long = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
    if not tensor.is_floating_point() or len(long) != 1:
        return walk.fake(tensor), None
    ids = walk.ledger.axis(walk.name_of(str(node.target)), long[0], tensor.shape[long[0]]).ids()
    return walk.fake(tensor), torch.from_numpy(ids).reshape(tensor.shape)


def _evaluate(walk: Walk, node: Node) -> Any:
    """The fake result of a call."""
    args: Any
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda argument: walk.values[argument])
    if node.op == "call_function":
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedOpError(
                f"{node.target} in {module_of(node) or 'the model'} (node {node.name}): the shapes behind it depend on "
                "values, so channels cannot be followed; use an implementation of this module with fixed shapes"
            ) from error
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = walk.root.get_submodule(str(node.target))
    if isinstance(module, (nn.Linear, GroupedLinear)):
        shape = (*args[0].shape[:-1], module.out_features)
        return args[0].new_empty(shape, dtype=torch.promote_types(args[0].dtype, module.weight.dtype))
    if isinstance(module, UnitMask):  # by its contract, so that its arithmetic need not be run
        return torch.empty_like(args[0])
    state = {name: walk.fake(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    return torch.func.functional_call(module, state, args, kwargs)


def walk(
    graph_module: torch.fx.GraphModule,
    interface: Interface,
    visitor: Visitor | None = None,
    *,
    keep: bool = False,
) -> ChannelLedger:
    """Walk a graph with ids beside its values.

    Args:
        graph_module: a lifted flat graph.
        interface: how it is called; its example inputs set the size of the walk.
        visitor: called after each node with the call and the ids of its result.
        keep: the calls that the visitor was given still answer when the walk is over. Otherwise values and ids go as
            soon as no later node needs them.

    Returns:
        The ledger. Two walks of one graph hand out the same ids.
    """
    state = Walk(graph_module, interface)
    uses = Counter(source for node in graph_module.graph.nodes for source in node.all_input_nodes)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            _record_outputs(state, node)
            if visitor is not None:
                visitor(Call(state, node, None), None)
            break
        ids: Ids = None
        if node.op == "placeholder":
            value, ids = _placeholder(state, node)
        elif node.op == "get_attr":
            value, ids = _get_attr(state, node)
        else:
            with state.mode, torch.no_grad():  # ids are real tensors: the rules run outside the fake mode
                value = _evaluate(state, node)
        state.values[node] = value
        call = Call(state, node, value)
        if node.op not in {"placeholder", "get_attr"}:
            ids = _repeated(_apply(state, call))
        state.ids[node] = ids
        if visitor is not None:
            visitor(call, ids)
        for source in node.all_input_nodes:
            uses[source] -= 1
            if not uses[source] and not keep:
                state.ids.pop(source, None)
                state.values.pop(source, None)
    return state.ledger


def _apply(state: Walk, call: Call) -> Ids:
    node = call.node
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args[0], node.args[1]
        listed = state.ids.get(source) if isinstance(source, Node) else None
        if isinstance(source, Node) and isinstance(index, int) and (source, index) in state.addresses:
            state.addresses[node, 0] = state.addresses[source, index]
        return listed[index] if isinstance(listed, list) and isinstance(index, int) else None
    return find_rule(call)(call)


def _repeated(ids: Ids) -> Ids:
    """The same ids with one copy in memory of what repeats along an axis: all that follows is the faster for it."""
    if isinstance(ids, list):
        return [None if tensor is None else _repeat_first(tensor) for tensor in ids]
    return None if ids is None else _repeat_first(ids)


def _repeat_first(ids: Tensor) -> Tensor:
    shape = ids.shape
    for axis in range(ids.dim()):
        if shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids.clone().expand(shape)  # a view would hold all copies in memory


def _record_outputs(state: Walk, node: Node) -> None:
    for source in node.all_input_nodes:
        ids = state.ids.get(source)
        if isinstance(ids, Tensor):
            unique = np.unique(ids[ids > 0].numpy())
            state.ledger.outputs.append(Pin(unique, "output", module_of(source), "the caller receives this axis"))


def trace_channels(
    graph_module: torch.fx.GraphModule, interface: Interface, shared: Mapping[str, str] | None = None
) -> ChannelMap:
    """Find which channels of a lifted graph belong together.

    Args:
        graph_module: a lifted flat graph.
        interface: how it is called.
        shared: parameters that a module outside the graph owns too, with that module's name; their channels must stay.

    Returns:
        The channel map.
    """
    ledger = walk(graph_module, interface)
    pin_shared(ledger, shared or {})
    return ChannelMap(ledger)
