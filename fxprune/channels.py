"""Channel tracing: which weights belong together, found by data flow alone.

The graph is walked once under fake tensors at the size of the example inputs. Beside every activation runs an integer
tensor of channel ids; the rules of `fxprune.channel_rules` say how each operator moves and relates them. The result
is a `ChannelMap`. Slimming walks the same way again with a visitor, now knowing which ids stay.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Node

from fxprune.channel_ids import ChannelLedger, ChannelMap, IdArray, IdSet, Pin
from fxprune.channel_rules import Ids, find_rule
from fxprune.errors import UnsupportedOpError
from fxprune.grouped import GroupedLinear
from fxprune.masks import UnitMask
from fxprune.unreached import pin_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fxprune.program import Interface

    Visitor = Callable[["Call", Ids], None]

__all__ = ["Call", "Weight", "module_of", "trace_channels", "walk"]


@dataclass(frozen=True)
class Weight:
    """A parameter as a rule sees it: qualified name, shape, and the name of the bias beside it."""

    name: str
    shape: tuple[int, ...]
    bias: str | None = None


def module_of(node: Node) -> str:
    """Qualified name of the module a node belongs to; for labels only."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def get_attribute(root: nn.Module, target: str) -> Any:
    """Follow a dotted name."""
    return operator.attrgetter(target)(root)


class _Walk:
    """State of one walk: fake values and ids of the nodes that are still needed, or of all."""

    def __init__(self, graph_module: torch.fx.GraphModule, interface: Interface) -> None:
        self.root = graph_module
        self.interface = interface
        self.mode = FakeTensorMode()
        self.ledger = ChannelLedger()
        self.values: dict[Node, Any] = {}
        self.ids: dict[Node, Ids] = {}
        self.input_ids = IdSet()
        self.addresses: dict[tuple[Node, int], IdArray] = {}
        # A shared tensor has one name, whatever the node that reads it is called.
        self.names: dict[int, str] = {}
        for name, tensor in graph_module.state_dict(keep_vars=True).items():
            self.names.setdefault(id(tensor), name)

    def name_of(self, target: str) -> str:
        """Canonical name of a parameter or buffer."""
        return self.names.get(id(get_attribute(self.root, target)), target)

    def fake(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor, static_shapes=True)

    def is_input(self, ids: Tensor) -> bool:
        """Whether all channels in `ids` are elements of graph inputs."""
        mine = ids[ids > 0].numpy()
        return bool(len(mine)) and bool(self.input_ids.contains(mine).all())


class Call:
    """One operator call as a rule sees it: arguments with their ids, the fake result, and the ledger."""

    def __init__(self, walk: _Walk, node: Node, output: Any) -> None:
        self._walk = walk
        self.node = node
        self.output = output
        self.ledger = walk.ledger
        self.module = module_of(node)
        self._overrides: dict[Node, Tensor] = {}

    @property
    def fixed_length(self) -> int | None:
        """The number of tokens of a graph that holds for one only; see `Interface`."""
        return self._walk.interface.fixed_length

    @property
    def op(self) -> str:
        """Short operator name, such as `mean` or `Linear`."""
        if self.node.op == "call_module":
            return type(get_attribute(self._walk.root, str(self.node.target))).__name__
        target: Any = self.node.target
        name = target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None
        return str(name or getattr(target, "__name__", target))

    @property
    def is_linear(self) -> bool:
        """Whether this calls an `nn.Linear` module."""
        return self.node.op == "call_module" and isinstance(
            get_attribute(self._walk.root, str(self.node.target)), nn.Linear
        )

    @property
    def grouped(self) -> GroupedLinear | None:
        """The grouped Linear that this calls, if it does."""
        module = get_attribute(self._walk.root, str(self.node.target)) if self.node.op == "call_module" else None
        return module if isinstance(module, GroupedLinear) else None

    @property
    def is_elementwise_module(self) -> bool:
        """Whether this calls one of our masks, which scale channels without moving them."""
        return self.node.op == "call_module" and isinstance(
            get_attribute(self._walk.root, str(self.node.target)), UnitMask
        )

    @property
    def weight(self) -> Weight:
        """The weight of the Linear, (out, in), or of the grouped Linear, in its own layout."""
        linear = get_attribute(self._walk.root, str(self.node.target))
        bias = None if getattr(linear, "bias", None) is None else self._walk.name_of(f"{self.node.target}.bias")
        return Weight(self._walk.name_of(f"{self.node.target}.weight"), tuple(linear.weight.shape), bias)

    def parameter(self, position: int) -> Weight | None:
        """The parameter that is read directly as positional argument `position`, if it is one."""
        return self.parameter_of(self.node.args[position]) if len(self.node.args) > position else None

    def parameter_of(self, node: Any) -> Weight | None:
        """The parameter, buffer or constant that a node reads, if it reads one."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        tensor = get_attribute(self._walk.root, str(node.target))
        return Weight(self._walk.name_of(str(node.target)), tuple(tensor.shape)) if isinstance(tensor, Tensor) else None

    def constant(self, node: Any) -> Tensor | None:
        """The whole numbers that a node reads from a constant of the graph; None for anything else."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        tensor = get_attribute(self._walk.root, str(node.target))
        known = isinstance(tensor, Tensor) and not tensor.is_meta and tensor.dtype in {torch.int64, torch.int32}
        return tensor.detach().cpu().long() if known else None

    def tensor_nodes(self) -> list[Node]:
        """Argument nodes that hold tensors, in order, keyword arguments last."""
        return [node for node in self.node.all_input_nodes if isinstance(self._walk.values.get(node), Tensor)]

    def operand_nodes(self, position: int) -> list[Node]:
        """The nodes in a list argument."""
        listed = self.node.args[position]
        assert isinstance(listed, (list, tuple))
        return [node for node in listed if isinstance(node, Node)]

    def value_of(self, node: Node) -> Any:
        """Fake tensor or concrete number of an argument node."""
        return self._walk.values[node]

    def ids_of(self, node: Node) -> Tensor | None:
        """Ids of an argument, None when it carries no channels."""
        if node in self._overrides:
            return self._overrides[node]
        ids = self._walk.ids.get(node)
        return ids if isinstance(ids, Tensor) else None

    def any_ids(self) -> bool:
        """Whether any argument carries channels."""
        return any(self.ids_of(node) is not None for node in self.node.all_input_nodes)

    def override(self, node: Node, ids: Tensor) -> None:
        """Use other ids for an argument of this call."""
        self._overrides[node] = ids

    def addresses(self, node: Any) -> IdArray | None:
        """The channels that a tensor of whole numbers names: number n stands for channel `addresses[n]`."""
        return self._walk.addresses.get((node, 0)) if isinstance(node, Node) else None

    def set_addresses(self, ids: IdArray, output: int = 0) -> None:
        """Note that a result holds numbers of channels."""
        self._walk.addresses[self.node, output] = ids

    def only_inputs(self, ids: Tensor) -> bool:
        """Whether all channels in `ids` are elements of graph inputs."""
        return self._walk.is_input(ids)

    def concrete(self, argument: Any) -> Any:
        """An argument with nodes that hold numbers replaced by the numbers."""
        return torch.fx.node.map_arg(argument, lambda node: self._walk.values[node])

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the operator's schema gives it, numbers instead of nodes that hold numbers."""
        return self.concrete(self._given(name, default))

    def argument_node(self, name: str) -> Node | None:
        """The node that is given for an argument of the operator's schema, if one is."""
        given = self._given(name, None)
        return given if isinstance(given, Node) else None

    def _given(self, name: str, default: Any) -> Any:
        target: Any = self.node.target
        names = [argument.name for argument in target._schema.arguments]
        position = names.index(name) if name in names else len(names)
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name, default)

    def int_argument(self, position: int, name: str, default: int) -> int:
        """A positional or keyword integer."""
        value = self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name, default)
        return int(self.concrete(value))

    def int_list_argument(self, position: int, name: str) -> list[int]:
        """A positional or keyword list of integers; empty when absent."""
        value = self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name)
        value = self.concrete(value)
        return [] if value is None else [value] if isinstance(value, int) else [int(item) for item in value]

    def apply_to_ids(self) -> Ids:
        """Run the operator itself on the ids of its arguments."""

        def replace(node: Node) -> Any:
            value = self._walk.values[node]
            if not isinstance(value, Tensor):
                return value
            ids = self.ids_of(node)
            return torch.zeros(value.shape, dtype=torch.int64) if ids is None else ids

        args, kwargs = torch.fx.node.map_arg((self.node.args, self.node.kwargs), replace)
        ids: Ids = run_movement(self.node.target, args, kwargs)
        return ids


def run_movement(target: Any, args: Any, kwargs: Any) -> Any:
    """Run a movement operator on integer tensors; views that need a copy get one."""
    if target in {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}:
        target = torch.ops.aten.reshape.default
    result = target(*args, **kwargs)
    return list(result) if isinstance(result, (tuple, list)) else result


def _placeholder(walk: _Walk, node: Node) -> tuple[Any, Ids]:
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


def _get_attr(walk: _Walk, node: Node) -> tuple[Any, Ids]:
    """A parameter, buffer or constant: one that runs along a single axis carries that axis's channels."""
    tensor = get_attribute(walk.root, str(node.target))
    if not isinstance(tensor, Tensor):
        return tensor, None
    long = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
    if not tensor.is_floating_point() or len(long) != 1:
        return walk.fake(tensor), None
    ids = walk.ledger.axis(walk.name_of(str(node.target)), long[0], tensor.shape[long[0]]).ids()
    return walk.fake(tensor), torch.from_numpy(ids).reshape(tensor.shape)


def _evaluate(walk: _Walk, node: Node) -> Any:
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
    state = _Walk(graph_module, interface)
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


def _apply(state: _Walk, call: Call) -> Ids:
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


def _record_outputs(state: _Walk, node: Node) -> None:
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
