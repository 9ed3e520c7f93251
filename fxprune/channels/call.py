"""One operator call as a rule of channel tracing sees it, and the state of the walk that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from fxprune.core.channel_ids import ChannelLedger, IdArray, IdSet
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.masks import UnitMask
from fxprune.tracing.nodes import get_attribute, module_of

if TYPE_CHECKING:
    from fxprune.core.program import Interface

__all__ = ["Call", "Ids", "Walk", "Weight"]


@dataclass(frozen=True)
class Weight:
    """A parameter as a rule sees it: qualified name, shape, and the name of the bias beside it."""

    name: str
    shape: tuple[int, ...]
    bias: str | None = None


class Walk:
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
        """The tensor without values, in the mode of this walk."""
        return self.mode.from_tensor(tensor, static_shapes=True)

    def is_input(self, ids: Tensor) -> bool:
        """Whether all channels in `ids` are elements of graph inputs."""
        mine = ids[ids > 0].numpy()
        return bool(len(mine)) and bool(self.input_ids.contains(mine).all())


class Call:
    """One operator call as a rule sees it: arguments with their ids, the fake result, and the ledger."""

    def __init__(self, walk: Walk, node: Node, output: Any) -> None:
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


Ids = Tensor | None | list[Tensor | None]


def run_movement(target: Any, args: Any, kwargs: Any) -> Any:
    """Run a movement operator on integer tensors; views that need a copy get one."""
    if target in {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}:
        target = torch.ops.aten.reshape.default
    result = target(*args, **kwargs)
    return list(result) if isinstance(result, (tuple, list)) else result
