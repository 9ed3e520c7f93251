"""The independent reference: the original model with units taken out by hand, without our graph.

    a mask on what a Linear reads           zero columns of its weight
    a mask on what a Linear writes          zero rows of its weight and bias; zero columns of an embedding
    a mask inside experts                   zero columns of each expert's own weight
    a gate behind a layer                   a hook that hands on what went into the layer

Nothing in the original model is modified: it is called with other parameters. Minus infinity on a router's choices has
no counterpart in weights; a plan that removes experts has no such reference, and the rung is left out.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import origin_of
from fxprune.tracing.masks import ChannelMask, UnitMask
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.unit_masks import ChoiceMask, ExpertChannelMask, LayerGate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.fx import Node

    from fxprune.core.program import Program

__all__ = ["without_units"]


class _Parameters:
    """Parameters of the original model, some of them replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = dict(model.named_parameters(remove_duplicate=False))
        self.changed: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}  # of modules that have none

    def get(self, name: str) -> Tensor:
        return self.changed.get(name, self.own[name].detach())

    def take_over(self, module: Any) -> None:
        """Use a projection's parameters where a pass has changed them."""
        origin = origin_of(module)
        assert origin is not None
        turned = origin.transposed and isinstance(module, nn.Linear)
        weight = module.weight.detach()
        if weight.data_ptr() != self.own[origin.weight].data_ptr():
            self.changed[origin.weight] = weight.t() if turned else weight
        bias = getattr(module, "bias", None)
        if bias is None:
            return
        if origin.bias not in self.own:
            self.biases[origin.weight.rpartition(".")[0]] = bias.detach()
        elif bias.data_ptr() != self.own[origin.bias].data_ptr():
            self.changed[origin.bias] = bias.detach()

    def scale(self, name: str, axis: int, factors: Tensor) -> None:
        """Multiply a parameter along an axis; (experts, n) factors scale each expert's own along that axis."""
        old = self.get(name)
        shape = [1] * old.dim()
        shape[axis] = factors.shape[-1]
        if factors.dim() == 2:
            shape[0] = factors.shape[0]
        self.changed[name] = old * factors.reshape(shape).to(old.dtype)


def _place(parameters: _Parameters, root: GraphModule, node: Node, mask: UnitMask) -> bool:
    """Take out what one mask takes out; False when the parameters have no place for it."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    if isinstance(mask, ChannelMask) and mask.place == "output":
        writer = _projection(root, source)
        if writer is not None:
            return _scale_rows(parameters, writer, mask.per_channel())
        # A table that is looked up; the name it has in the graph is the model's.
        name = str(source.args[0].target) if isinstance(source.args[0], torch.fx.Node) else ""
        if name in parameters.own:
            parameters.scale(name, 1, mask.per_channel())
        return name in parameters.own
    readers = [module for user in node.users if (module := _projection(root, user)) is not None]
    for module in readers:
        origin = origin_of(module)
        assert origin is not None
        if isinstance(mask, ExpertChannelMask):
            parameters.scale(origin.weight, module.in_axis, mask.mask[:, mask.unit_of])
        elif isinstance(mask, ChannelMask):
            parameters.scale(origin.weight, 0 if origin.transposed else 1, mask.per_channel())
    return bool(readers)


def _scale_rows(parameters: _Parameters, writer: Any, factors: Tensor) -> bool:
    """Scale what a projection puts out."""
    origin = origin_of(writer)
    assert origin is not None
    rows = int(origin.transposed) if isinstance(writer, nn.Linear) else writer.out_axis
    parameters.scale(origin.weight, rows, factors)
    if origin.bias in parameters.own:
        parameters.scale(origin.bias, 0, factors)
    return True


def _projection(root: GraphModule, node: Node) -> Any:
    module = get_attribute(root, str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, (nn.Linear, GroupedLinear)) and origin_of(module) is not None else None


@contextmanager
def without_units(program: Program) -> Iterator[Callable[..., Any] | None]:
    """The original model without what the masks of `references["masked"]` take out.

    Weights and biases that a pass has changed or added are used as they are in the masked graph.

    Args:
        program: a program with the references `eager` and `masked`.

    Yields:
        A callable with the original model's signature; None when the masks have no counterpart in its parameters.
    """
    eager, masked = program.references["eager"].module, program.references["masked"].module
    assert isinstance(masked, GraphModule)
    parameters = _Parameters(eager)
    calls = [node for node in masked.graph.nodes if node.op == "call_module"]
    modules = {node: get_attribute(masked, str(node.target)) for node in calls}
    known = True
    skipped: list[str] = []
    for node in calls:
        if _projection(masked, node) is not None:
            parameters.take_over(modules[node])
    for node in calls:
        mask = modules[node]
        if isinstance(mask, LayerGate):
            skipped += [mask.label] if float(mask.mask) == 0 else []
        elif isinstance(mask, ChoiceMask):
            known &= bool((mask.mask != 0).all())
        elif isinstance(mask, UnitMask):
            known &= _place(parameters, masked, node, mask)
    if not known or any(label not in dict(eager.named_modules()) for label in skipped):
        yield None
        return
    with ExitStack() as stack:
        for name, bias in parameters.biases.items():
            hook = eager.get_submodule(name).register_forward_hook(lambda _, __, output, bias=bias: output + bias)
            stack.callback(hook.remove)
        for label in skipped:
            hook = eager.get_submodule(label).register_forward_hook(_hand_on, with_kwargs=True)
            stack.callback(hook.remove)

        def forward(**kwargs: Any) -> Any:
            return torch.func.functional_call(eager, parameters.changed, (), kwargs)

        forward.__name__ = type(eager).__name__
        called: Any = forward
        called.__signature__ = inspect.signature(eager.forward)
        called.config = getattr(eager, "config", None)
        yield called


def _hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Give back a layer's input as its output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
