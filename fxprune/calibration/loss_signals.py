"""What the loss says about heads and MLP channels, and second moments of both sides of the Linears that read them.

With the mask m of a group at 1, dL/dm_u is the sum, over the tokens of a sample and the channels of unit u, of x times
dL/dx as the consumer sees it, so that no mask needs to stand in the graph. One pass over the calibration text gives

    Fisher    sum over samples of (dL/dm_u)^2          Kwon et al. 2022, "A fast post-training pruning framework for
                                                       transformers", the diagonal of their Fisher information
    Taylor    sum over the unit's weights of |w dL/dw| Ma et al. 2023, "LLM-Pruner", first order by elements
    Grams     X^T X of what consumers read and G^T G of the gradients by what they put out, the two factors of K-FAC
              (Martens & Grosse 2015)
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from fxprune.calibration.gram import Gram, GramSum
from fxprune.calibration.loss_gradients import backpropagate_loss
from fxprune.core.errors import NotFiniteError, PreconditionError
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.lifted_graphs import linear_calls
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import GraphModule

    from fxprune.calibration.loss_gradients import LinearCall
    from fxprune.calibration.loss_head import Labels
    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = ["GroupSignals", "SignalOptions", "collect_loss_signals", "moments"]


class SignalOptions(TypedDict, total=False):
    """Options of `collect_loss_signals`, for what hands them on."""

    batch_size: int | None
    taylor: bool
    grams: bool
    labels: Labels
    seed: int
    forward_dtype: torch.dtype | None
    on_batch: Callable[[int], None] | None


@dataclass(frozen=True)
class _Consumer:
    """A weight that reads units: the Linears that have it, and the channels of each unit (units, per unit)."""

    weight: Tensor
    linears: tuple[str, ...]
    channels: Tensor


@dataclass(frozen=True)
class GroupSignals:
    """What one pass over the calibration text says about a group.

    The loss is the cross-entropy summed over the predicted tokens of a sample. A Linear that the graph calls more than
    once (layers that share their weights) has the sums over all its calls.

    Attributes:
        gradients: (samples, units) float32, the gradient of each sample's loss by the units' mask at 1.
        taylor: (units,) float64, the sum of |w dL/dw| over the weights that a unit owns and those that it shares (these
            count in full for each unit), with L summed over all samples; None if it was not asked for.
        inputs: (in, in) float32 by consumer, X^T X summed over tokens; empty without `grams`.
        outputs: (out, out) float32 by consumer, sum over tokens of g g^T, g the gradient of the loss by what the
            consumer puts out; empty without `grams`.
        means: (in,) float64 by consumer, what it reads summed over tokens.
        tokens: rows that stand behind each sum: tokens times calls.
    """

    gradients: Tensor
    taylor: Tensor | None
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    tokens: int

    @property
    def fisher(self) -> Tensor:
        """Diagonal of the Fisher information of the mask, (units,) float64, summed over samples."""
        return self.gradients.double().square().sum(0)


def moments(signals: Mapping[str, GroupSignals]) -> tuple[dict[str, Gram], dict[str, Tensor]]:
    """Both factors of K-FAC by consumer, as reconstruction and second-order steps read them.

    Args:
        signals: by group, collected with `grams`; without them there are no factors.

    Returns:
        X^T X, (in, in), of what each consumer reads; (out, out), the mean over tokens of g g^T by what it puts out.
    """
    inputs = {name: Gram(gram, one.tokens) for one in signals.values() for name, gram in one.inputs.items()}
    outputs = {name: gram / one.tokens for one in signals.values() for name, gram in one.outputs.items()}
    return inputs, outputs


def collect_loss_signals(
    program: Program,
    groups: Sequence[Group],
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    taylor: bool = False,
    grams: bool = True,
    labels: Labels = "data",
    seed: int = 0,
    forward_dtype: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, GroupSignals]:
    """Collect the signals of heads and MLP channels in one pass over the calibration text.

    Memory: the activations of one block and the values between blocks for one batch, and what is returned (with
    `grams` about 4 (in^2 + out^2) bytes a consumer, with `taylor` 4 bytes a parameter of the groups while it runs).

    Args:
        program: a lifted program of a causal language model, with its weights; it is left as it is.
        groups: groups whose consumers are ordinary Linears: heads and the channels of dense MLPs.
        tokens: (samples, length) int64, on the device of the weights.
        batch_size: samples at once; None takes about 2,048 tokens. It does not change the results.
        taylor: whether to compute the gradients of the weights too.
        grams: whether to collect the second moments.
        labels: targets from the text (`data`), drawn from the model's own distribution (`sampled`), or from both in
            turn, sample by sample (`mixed`).
        seed: of that draw.
        forward_dtype: precision of the products; sums are float32.
        on_batch: called after each batch with the number of samples done.

    Returns:
        Signals by the name of the group.

    Raises:
        UsageError: an option has an impossible value.
        PreconditionError: the program gives no logits; a group's units are not read by ordinary Linears (experts,
            hidden channels, layers), or these do not lead to the logits or mix samples.
        CalibrationError: the samples are too short, or values or gradients are not finite.
    """
    consumers = _consumers(program.graph_module, groups)
    sums: dict[int, _Sums] = {}  # by the identity of the weight
    watched: dict[str, _Sums] = {}
    for one in (consumer for of_group in consumers.values() for consumer in of_group.values()):
        if id(one.weight) not in sums:
            sums[id(one.weight)] = _Sums(one.weight, len(tokens), grams=grams, rounded=forward_dtype)
            watched |= dict.fromkeys(one.linears, sums[id(one.weight)])
    weight_gradients = backpropagate_loss(
        program,
        watched,
        tokens,
        lambda call: watched[call.linear].add(call),
        parameters=_parameters_of(program.graph_module, groups) if taylor else None,
        batch_size=batch_size,
        labels=labels,
        seed=seed,
        forward_dtype=forward_dtype,
        on_batch=on_batch,
    )
    for of_group in consumers.values():
        for name, one in of_group.items():
            sums[id(one.weight)].check(name)
    for each in sums.values():
        each.complete()
    result = {}
    for group in groups:
        of = {name: (sums[id(one.weight)], one.channels) for name, one in consumers[group.name].items()}
        result[group.name] = GroupSignals(
            torch.stack([each.columns[:, channels].sum(-1) for each, channels in of.values()]).sum(0),
            _taylor(program.graph_module, group, weight_gradients) if taylor else None,
            {name: each.inputs.matrix for name, (each, _) in of.items() if each.inputs is not None},
            {name: each.outputs.matrix for name, (each, _) in of.items() if each.outputs is not None},
            {name: each.total for name, (each, _) in of.items()},
            next(each.tokens for each, _ in of.values()),
        )
    return result


class _Sums:
    """Running sums of all calls of the Linears that have one weight, (out, in)."""

    def __init__(self, weight: Tensor, samples: int, *, grams: bool, rounded: torch.dtype | None) -> None:
        outs, ins = weight.shape
        self.columns = torch.zeros(samples, ins, device=weight.device)
        self.total = torch.zeros(ins, dtype=torch.float64, device=weight.device)
        self.inputs = GramSum(ins, weight.device) if grams else None
        self.outputs = GramSum(outs, weight.device) if grams else None
        self.rounded = rounded
        self.tokens = 0

    def add(self, call: LinearCall) -> None:
        """Add one call for one batch."""
        if call.x.shape[0] % len(call.samples):
            raise PreconditionError(
                f"{call.linear} reads {tuple(call.x.shape)}, which is not sample by sample; use batch_size=1"
            )
        products = call.x.float() * call.by_input.float()
        part = slice(call.samples.start, call.samples.stop)
        self.columns[part] += products.reshape(len(call.samples), -1, products.shape[-1]).sum(1)
        rows = self._rows(call.x)
        self.total += rows.sum(0).double()
        self.tokens += len(rows)
        if self.inputs is not None and self.outputs is not None:
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(rows.device.type, enabled=False))
                stack.enter_context(fast_products(rounded=self.rounded is torch.bfloat16))
                self.inputs.add(rows)
                self.outputs.add(self._rows(call.by_output))

    def _rows(self, x: Tensor) -> Tensor:
        """(tokens, features) float32, rounded as the products round them."""
        rows = x.reshape(-1, x.shape[-1])
        return rows.to(self.rounded if self.rounded is not None else rows.dtype).float()

    def check(self, name: str) -> None:
        """Whether there is anything, and whether it is finite; `name` is for the message."""
        if not self.tokens:
            raise PreconditionError(f"{name} does not lead to the logits; the loss says nothing about what it reads")
        diagonals = [one.matrix.diagonal() for one in (self.inputs, self.outputs) if one is not None]
        if not all(bool(torch.isfinite(one).all()) for one in (self.columns, self.total, *diagonals)):
            raise NotFiniteError(
                f"the sums of {name} overflow on the calibration text; load the model in bfloat16 or float32"
            )

    def complete(self) -> None:
        """Fill the lower triangles."""
        for one in (self.inputs, self.outputs):
            if one is not None:
                one.result()


def _readers(graph_module: GraphModule) -> dict[int, list[str]]:
    """Names of the ordinary Linears that the graph calls, by the identity of their weight."""
    found: dict[int, list[str]] = {}
    for name in linear_calls(graph_module):
        found.setdefault(id(get_attribute(graph_module, name).weight), []).append(name)
    return found


def _consumers(graph_module: GraphModule, groups: Sequence[Group]) -> dict[str, dict[str, _Consumer]]:
    """What reads the units, by group and the name of its Linear."""
    tensors = graph_module.state_dict(keep_vars=True)
    readers = _readers(graph_module)
    found: dict[str, dict[str, _Consumer]] = {}
    for group in groups:
        weights = [tensors[piece.parameter] for piece in group.consumers]
        if group.masked != "consumers" or not weights or not all(id(weight) in readers for weight in weights):
            raise PreconditionError(
                f"{group.name} [{group.kind}]: loss signals are of heads and MLP channels that ordinary Linears read"
            )
        found[group.name] = {
            piece.parameter.removesuffix(".weight"): _Consumer(
                weight, tuple(readers[id(weight)]), torch.from_numpy(piece.indices)
            )
            for piece, weight in zip(group.consumers, weights, strict=True)
        }
    return found


def _parameters_of(graph_module: GraphModule, groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """The weights and biases that units own or share, by the first name met; one with two names is there once."""
    tensors = graph_module.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    for group in groups:
        for piece in (*group.slices, *group.shared):
            if isinstance(tensors[piece.parameter], nn.Parameter):
                found.setdefault(id(tensors[piece.parameter]), piece.parameter)
    return {name: tensors[name] for name in found.values()}


def _taylor(graph_module: GraphModule, group: Group, weight_gradients: Mapping[str, Tensor]) -> Tensor:
    tensors = graph_module.state_dict(keep_vars=True)
    gradients = {id(tensors[name]): gradient for name, gradient in weight_gradients.items()}
    own = torch.zeros(group.units, dtype=torch.float64)
    shared = torch.zeros(0, dtype=torch.float64)
    if group.sharing is not None:
        shared = torch.zeros(int(group.sharing.max()) + 1, dtype=torch.float64)
    for pieces, total in ((group.slices, own), (group.shared, shared)):
        for piece in pieces:
            weight = tensors[piece.parameter]
            if id(weight) in gradients:
                elements = (weight.detach().float() * gradients[id(weight)]).abs_()
                others = [axis for axis in range(weight.dim()) if axis != piece.axis]
                along = elements.sum(others, dtype=torch.float64).cpu() if others else elements.double().cpu()
                total.add_(along[torch.from_numpy(piece.indices)].sum(-1))
    return own if group.sharing is None else own + shared[torch.from_numpy(group.sharing)]
