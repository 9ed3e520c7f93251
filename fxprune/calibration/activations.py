"""Statistics of what Linears read, collected while calibration text runs through the graph.

First version: mean and variance of every input channel of the consumers, one pass over the text, no logits computed.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.calibration.engine import require_length, text_samples
from fxprune.core.errors import NotFiniteError
from fxprune.tracing.graphs import copy_graph_module, erase_dead
from fxprune.tracing.lifted_graphs import source_of_logits
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule

    from fxprune.core.program import Interface

__all__ = ["ChannelStatistics", "collect_statistics"]


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of the inputs of one Linear.

    Attributes:
        mean: (in_features,) float64.
        variance: (in_features,) float64, over all calibration tokens.
        tokens: how many tokens were seen.
    """

    mean: Tensor
    variance: Tensor
    tokens: int


class _Moments:
    """Running sums of one Linear's inputs, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.square = 0, torch.zeros(()), torch.zeros(())

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        self.count += x.shape[0]
        self.total = self.total.to(x) + x.sum(0)
        self.square = self.square.to(x) + x.square().sum(0)

    def result(self) -> ChannelStatistics:
        mean = self.total / self.count
        return ChannelStatistics(mean, (self.square / self.count - mean.square()).clamp(min=0), self.count)


def _without_head(graph_module: GraphModule, interface: Interface) -> GraphModule:
    """The graph up to what the lm_head reads: logits are the largest tensor of the model and nobody needs them here."""
    body = copy_graph_module(graph_module)
    source = source_of_logits(body, interface.outputs)
    if source is not None:
        output = next(node for node in body.graph.nodes if node.op == "output")
        output.args = ((source,),)
        erase_dead(body.graph)
        body.recompile()
    return body


def collect_statistics(
    graph_module: GraphModule,
    interface: Interface,
    linears: Sequence[str],
    tokens: Tensor,
    *,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Run calibration tokens through a graph and collect moments of what some Linears read.

    Args:
        graph_module: a lifted flat graph of a model that reads tokens.
        interface: how it is called.
        linears: qualified names of the Linears.
        tokens: (samples, length) int64.
        batch_size: samples at once.
        on_batch: called after each batch with the number of samples done.

    Returns:
        Statistics by Linear.

    Raises:
        CalibrationError: an activation is NaN or infinite; the message names the first Linear.
    """
    require_length(interface, tokens.shape[1])
    body = _without_head(graph_module, interface)
    samples = text_samples(interface, tokens)
    moments = {name: _Moments() for name in linears}
    with ExitStack() as stack, torch.no_grad():
        for name, moment in moments.items():
            hook = get_attribute(body, name).register_forward_pre_hook(moment.hook)
            stack.callback(hook.remove)
        done = 0
        for start in range(0, len(tokens), batch_size):
            given = {name: value[start : start + batch_size] for name, value in samples.varying.items()}
            size = len(tokens[start : start + batch_size])
            given |= samples.fixed(size)
            body(*(given[name] for name in interface.inputs))
            done += size
            if on_batch is not None:
                on_batch(done)
    results = {name: moment.result() for name, moment in moments.items()}
    for name, statistics in results.items():
        if not bool(torch.isfinite(statistics.variance).all()):
            raise NotFiniteError(
                f"{name} read NaN or infinite values on the calibration text; check the weights before it, or load the "
                "model in bfloat16 or float32"
            )
    return results
