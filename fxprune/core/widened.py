"""A graph that runs in a wider precision without a wide copy of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["Widened"]


class Widened(torch.fx.Interpreter):
    """Runs a graph as if its weights, its constants and its own casts were of a wider dtype.

    The weights are widened one node at a time, when they are needed: no wide model is ever there.

    Args:
        graph_module: a flat graph; it is left as it is.
        dtype: floating dtype of all floating values.
    """

    def __init__(self, graph_module: GraphModule, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(graph_module)
        self.dtype = dtype

    def __call__(self, *inputs: Any) -> Any:
        """What the graph returns."""
        return self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        """See `torch.fx.Interpreter.run_node`; no more than one node's weights are there in the wide dtype."""
        return self._wide(super().run_node(n))

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `torch.fx.Interpreter.fetch_args_kwargs_from_env`."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return self._wide(args), self._wide(kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `torch.fx.Interpreter.call_module`."""
        module = self.fetch_attr(target)
        held = dict((*module.named_parameters(), *module.named_buffers()))
        return functional_call(module, {name: self._wide(tensor) for name, tensor in held.items()}, args, kwargs)

    def _wide(self, value: Any) -> Any:
        def one(argument: Any) -> Any:
            if isinstance(argument, torch.dtype) and argument.is_floating_point:
                return self.dtype
            if isinstance(argument, Tensor) and argument.is_floating_point():
                return argument.to(self.dtype)
            return argument

        return torch.fx.node.map_aggregate(value, one)
