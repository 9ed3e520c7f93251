"""Weights of a model that its traced sample does not reach, and what of the graph they depend on.

    whole model: vision tower ─ projector ─┐              graph:  tokens ─ embedding ─ layers ─ head
                 tokens ─ embedding ───────┴─ layers ─ head        kept:   vision tower, projector

They are no part of the graph, so nothing prunes them: a checkpoint gets them bit by bit as they were. What is pruned
must leave alone what they share with it. Known for certain is a tensor with several owners of which one does not run.
What is not known is which of their axes meet the graph's channels, since no data flow shows it: an axis as long as a
residual stream, or a multiple of it, is taken to (a projector's rows, a further head's columns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fxprune.core.channel_ids import Pin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.fx import GraphModule

    from fxprune.core.channel_ids import ChannelLedger

__all__ = ["find_shared", "find_unreached", "meets_width", "pin_shared"]


def find_unreached(model: nn.Module, graph_module: GraphModule) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model that its graph does not carry, by qualified name; not copied."""
    carried = graph_module.state_dict(keep_vars=True)
    tensors = {id(tensor) for tensor in carried.values()}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and name not in carried and id(tensor) not in tensors
    }


def find_shared(model: nn.Module, graph_module: GraphModule) -> dict[str, str]:
    """Parameters of a graph that a module outside it owns too, under all their names, with that module's name.

    A twin of a module that runs, of its class and with no other parameters, does not count: it is the name under which
    a class keeps what it ties (`shared` of T5), and becomes what its twin becomes.

    Args:
        model: the whole model.
        graph_module: its graph as it was traced: its nodes say which modules ran.
    """
    running: set[int] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in graph_module.graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path in modules:
                running.add(id(modules[path]))
    carried = {id(tensor) for tensor in graph_module.state_dict(keep_vars=True).values()}
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, module in modules.items():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in carried:
                owners.setdefault(id(parameter), {})[f"{name}.{attribute}".removeprefix(".")] = module
    shared: dict[str, str] = {}
    for names in owners.values():
        twins = {_kind(module) for module in names.values() if id(module) in running}
        outside = [n for n, module in names.items() if id(module) not in running and _kind(module) not in twins]
        if outside and len(outside) < len(names):
            shared |= dict.fromkeys(names, outside[0].rpartition(".")[0])
    return shared


def _kind(module: nn.Module) -> tuple[type[nn.Module], frozenset[int]]:
    """What twins have in common: their class, and the very same parameters."""
    return type(module), frozenset(id(parameter) for parameter in module.parameters())


def pin_shared(ledger: ChannelLedger, shared: Mapping[str, str]) -> None:
    """Write into a ledger that the channels of shared parameters must stay."""
    for axis in list(ledger.axes.values()):
        if axis.parameter in shared:
            reason = f"{shared[axis.parameter]}, which the traced sample does not reach, has the same {axis.parameter}"
            ledger.pins.append(Pin(axis.ids(), "tie", shared[axis.parameter], reason))


def meets_width(unreached: Mapping[str, Tensor], width: int) -> str | None:
    """The first tensor with an axis of so many channels, or of a multiple; None where no tensor has one."""
    return next((name for name, tensor in unreached.items() if any(n and n % width == 0 for n in tensor.shape)), None)
