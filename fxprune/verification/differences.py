"""Where two forms that differ begin to: the first projection whose output is another. Read when a rung has failed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.tracing.nodes import module_of

if TYPE_CHECKING:
    from fxprune.core.program import Form, Interface

__all__ = ["first_difference"]


def first_difference(reference: Form, candidate: Form, tolerance: float) -> str:
    """The first projection whose output differs between two forms, by qualified name; empty if none does.

    Outputs of different widths (rows that slimming removed) are skipped: the difference shows in the next consumer.
    """
    recorded = []
    for form in (reference, candidate):
        if isinstance(form.module, GraphModule):
            recorder = _Recorder(form.module)
            with torch.no_grad():
                recorder.run(*_from_nothing(form.interface).values())
            recorded.append(recorder.seen)
        else:
            recorded.append(_record_eager(form.module, form.interface))
    for name, value in recorded[1].items():
        other = recorded[0].get(name)
        if other is not None and other.shape == value.shape:
            error = (other.float() - value.float()).abs().max()
            if not bool(error <= tolerance):
                return name
    return ""


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the output of every projection, under its module's name."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        result = super().run_node(n)
        projection = n.op == "call_module" or n.target in {
            torch.ops.aten.linear.default,
            torch.ops.aten.addmm.default,
        }
        if projection and isinstance(result, Tensor):
            self.seen.setdefault(module_of(n), result)
        return result


def _from_nothing(interface: Interface) -> dict[str, Tensor]:
    """The example inputs with an empty cache and no padding, so that dense and slim forms see the same past."""
    cache = {entry.input for entry in interface.cache}
    examples = dict(interface.example_inputs)
    if cache:
        new = examples["input_ids"].shape[1]
        examples = {name: t[:, :, :0] if name in cache else t for name, t in examples.items()}
        examples["attention_mask"] = torch.ones_like(examples["attention_mask"][:, :new])
    return examples


def _record_eager(model: nn.Module, interface: Interface) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    cache = {entry.input for entry in interface.cache}
    inputs = {name: tensor for name, tensor in _from_nothing(interface).items() if name not in cache}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "weight") and not list(module.children()):

                def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        seen.setdefault(name, output)

                stack.callback(module.register_forward_hook(hook).remove)
        with torch.no_grad():
            model(**inputs)
    return seen
