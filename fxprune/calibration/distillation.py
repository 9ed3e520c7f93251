"""Distillation losses: logits and hidden states of a student held to those of a teacher.

    KL     = sum over tokens of KL(teacher || student) / tokens
    layers = mean over layers of ||h_s - h_t||^2 / ||h_t||^2

Both are means over the tokens that count, so they do not depend on how many sequences a batch has, or how long or
padded they are. The logits of a long vocabulary are never turned to float32 as a whole: the divergence is taken some
positions at a time, and its gradient with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.core.errors import PreconditionError, UsageError
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.unit_masks import LayerGate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

__all__ = [
    "DistillationLoss",
    "DistillationWeights",
    "distillation_loss",
    "layer_loss",
    "token_kl",
    "with_hidden_states",
]


@dataclass(frozen=True)
class DistillationWeights:
    """What counts how much.

    Attributes:
        logits: of the divergence of the logits.
        layers: of the loss over hidden states; the reference code of NutePrune has 0.9.
        temperature: that logits are divided by; the divergence is multiplied by its square.

    Raises:
        UsageError: a weight is negative, both are 0, or the temperature is not positive.
    """

    logits: float = 1.0
    layers: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        both = self.logits, self.layers
        if not all(0 <= weight < float("inf") for weight in both) or not any(both):
            raise UsageError(f"distillation needs weights from 0 up, one above 0; got {both} for logits and layers")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"the temperature must be positive, got {self.temperature}")


_WEIGHTS = DistillationWeights()


@dataclass(frozen=True)
class DistillationLoss:
    """The loss and its parts; scalars, float32.

    Attributes:
        total: weighted sum, with gradients.
        logits: divergence per token, before weighting.
        layers: loss over hidden states, before weighting.
    """

    total: Tensor
    logits: Tensor
    layers: Tensor


class _ChunkedKl(torch.autograd.Function):
    """Sum over rows of weight * KL(teacher || student); the gradient is made in the same pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, options: tuple[float, int]) -> Tensor:
        both = student, teacher
        temperature, chunk = options
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needed else None
        total = torch.zeros((), dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        # What is kept is not yet divided by the number of rows: float16 has no room for the quotient.
        largest = weight.max().to(total.dtype)
        for start in range(0, student.shape[0], chunk):
            rows = slice(start, start + chunk)
            share = weight[rows].to(total.dtype)
            log_s, log_t = (
                torch.log_softmax(_cooled(logits[rows].to(total.dtype), temperature), -1) for logits in both
            )
            probability = log_t.exp()
            # Where the teacher's probability is 0, so is what it adds, even if a logit is minus infinity.
            terms = log_t.sub_(log_s).masked_fill_(probability == 0, 0).mul_(probability)
            total += (terms.sum(-1) * share).sum()
            if gradient is not None:
                gradient[rows] = log_s.exp_().sub_(probability).mul_((share / largest)[:, None])
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        ctx.scale = largest / temperature
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.saved_tensors:
            return None, None, None, None
        (gradient,) = ctx.saved_tensors
        return gradient * (ctx.scale * gradients[0]).to(gradient.dtype), None, None, None


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def token_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 32,
) -> Tensor:
    """The mean over tokens of KL(teacher || student), times the temperature squared (Hinton et al. 2015).

    Beside the two logits it holds one tensor of the student's logits' size and precision, the gradient (and its
    multiple in the backward pass), and float32 for `chunk_tokens` positions.

    Args:
        student: (batch, length, vocabulary) logits, or any leading shape.
        teacher: same shape; gets no gradient.
        mask: leading shape; tokens with 0 (padding) do not count. None: all count.
        temperature: see `DistillationWeights`.
        chunk_tokens: positions at a time.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        PreconditionError: the shapes differ, or no token counts.
    """
    if student.shape != teacher.shape:
        raise PreconditionError(
            f"student and teacher have logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)}; both must "
            "be run on the same tokens"
        )
    weight = _token_weights(student.shape[:-1], mask, student.device)
    flat = [logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher.detach())]
    found: Tensor = _ChunkedKl.apply(*flat, weight, (temperature, chunk_tokens))  # type: ignore[no-untyped-call]  # torch
    return found * temperature**2


def _token_weights(shape: torch.Size, mask: Tensor | None, device: torch.device) -> Tensor:
    """1 / tokens for tokens that count, 0 for others, flat float32."""
    if mask is not None and mask.shape != shape:
        raise PreconditionError(f"the mask of tokens has shape {tuple(mask.shape)}, the tokens have {tuple(shape)}")
    counts = torch.ones(shape, device=device) if mask is None else (mask != 0).to(device, torch.float32)
    total = counts.sum()
    if not float(total):
        raise PreconditionError("no token counts: the mask leaves nothing to distil on")
    return (counts / total).reshape(-1)


def layer_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    normalised: bool = True,
) -> Tensor:
    """The mean over layers of the mean squared error of hidden states.

    Normalised, each layer's error is divided by the mean square of the teacher's states: later layers, whose residual
    stream is larger, then count no more than earlier ones, and the weight means the same for every model.

    Args:
        student: hidden states of the chosen layers, (batch, length, hidden) each.
        teacher: the same of the teacher; they get no gradient.
        mask: (batch, length); tokens with 0 do not count. None: all count.
        normalised: see above; without it, plain mean squared errors as in the paper.

    Returns:
        A scalar, float32 (float64 for float64 states).

    Raises:
        PreconditionError: shapes or numbers differ, there is no layer, or no token counts.
    """
    if not student or [s.shape for s in student] != [t.shape for t in teacher]:
        raise PreconditionError(
            f"the layer loss needs the same hidden states of both; {len(student)} of the student and {len(teacher)} of "
            "the teacher were given, or their shapes differ"
        )
    losses = []
    weight = _token_weights(student[0].shape[:-1], mask, student[0].device).reshape(student[0].shape[:-1])
    for own, other in zip(student, teacher, strict=True):
        dtype = torch.promote_types(own.dtype, torch.float32)
        wanted = other.detach().to(dtype)
        share = weight.to(dtype)
        error = ((own.to(dtype) - wanted).square().mean(-1) * share).sum()
        if normalised:
            error = error / (wanted.square().mean(-1) * share).sum().clamp(min=torch.finfo(dtype).tiny)
        losses.append(error)
    return torch.stack(losses).mean()


def distillation_loss(
    student: tuple[Tensor, Sequence[Tensor]],
    teacher: tuple[Tensor, Sequence[Tensor]],
    mask: Tensor | None = None,
    weights: DistillationWeights = _WEIGHTS,
    *,
    normalised: bool = True,
) -> DistillationLoss:
    """Both losses, weighted; one with weight 0 is not computed.

    Args:
        student: logits and hidden states, see `token_kl` and `layer_loss`.
        teacher: the same of the teacher.
        mask: (batch, length); tokens with 0 do not count.
        weights: what counts how much.
        normalised: see `layer_loss`.

    Raises:
        PreconditionError: see `token_kl` and `layer_loss`.
    """
    nothing = torch.zeros((), device=student[0].device)
    logits, layers = nothing, nothing
    if weights.logits:
        logits = token_kl(student[0], teacher[0], mask, temperature=weights.temperature)
    if weights.layers:
        layers = layer_loss(student[1], teacher[1], mask, normalised=normalised)
    return DistillationLoss(weights.logits * logits + weights.layers * layers, logits.detach(), layers.detach())


def with_hidden_states(graph_module: GraphModule, nodes: Sequence[str]) -> GraphModule:
    """A graph that also returns some of its values, behind its own outputs.

    Args:
        graph_module: a flat graph, such as the masked one; left as it is, parameters and masks are shared.
        nodes: names of graph nodes, such as `LayerGroup.exits`. Behind a layer with a gate, what the gate puts out is
            returned: what the next layer reads.

    Raises:
        PreconditionError: there is no such node.
    """
    copy = copy_graph_module(graph_module)
    named = {node.name: node for node in copy.graph.nodes}
    missing = [name for name in nodes if name not in named]
    if missing:
        raise PreconditionError(f"the graph has no node {missing[0]!r}, so its value cannot be returned")
    output = next(node for node in copy.graph.nodes if node.op == "output")
    found = []
    for name in nodes:
        node = named[name]
        for user in node.users:
            if user.op == "call_module" and user.args[-1] is node and _is_gate(copy, str(user.target)):
                node = user
                break
        found.append(node)
    output.args = ((*output.args[0], *found),)
    copy.recompile()
    return copy


def _is_gate(graph_module: GraphModule, target: str) -> bool:
    return isinstance(graph_module.get_submodule(target), LayerGate)
