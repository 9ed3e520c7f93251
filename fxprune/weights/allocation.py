"""How much of each projection goes: more where the loss minds less, the same in all.

Removing weight w_ij changes the loss, to second order and with the Fisher information factored into inputs and output
gradients, by about w_ij^2 E[x_j^2] E[g_i^2] / 2, where g is the gradient of the loss by the projection's output (the
diagonal of K-FAC, Martens & Grosse 2015, on the optimal brain damage of LeCun et al. 1990). One ranking of this over
all projections says what share of each would go; the share used lies between that and the uniform one, because updating
solvers mend more where more is removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.calibration.loss_gradients import backpropagate_loss
from fxprune.core.errors import PreconditionError
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.sparsity import Sparsity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.calibration.loss_gradients import LinearCall
    from fxprune.core.program import Program

__all__ = ["allocate_by_loss", "blend_shares", "loss_sensitivity", "shares_by_ranking"]

_SAMPLES = 8
_STRENGTH = 0.5
_LIMIT = 0.12
_HISTOGRAM = 4096


def allocate_by_loss(
    program: Program,
    targets: Mapping[str, Sparsity],
    tokens: Tensor,
    forward_dtype: torch.dtype | None = None,
    *,
    samples: int = _SAMPLES,
    strength: float = _STRENGTH,
    limit: float = _LIMIT,
) -> dict[str, Sparsity]:
    """Shares that differ between projections and remove as many weights in all as the given ones.

    Args:
        program: a lifted program of a causal language model, with its weights.
        targets: the projections and what would go of each; those with a pattern stay as they are.
        tokens: (samples, length) int64, calibration text; the first `samples` are used.
        forward_dtype: precision of the products of the forward pass.
        samples: how many sequences.
        strength: 0 leaves the shares as they are, 1 takes the ranking's.
        limit: no share moves further than this.

    Returns:
        Sparsity by projection.

    Raises:
        PreconditionError: the program gives no logits, a target is not an ordinary Linear, or its weight is not finite.
        CalibrationError: activations or gradients are not finite.
    """
    free = {name: target.share for name, target in targets.items() if target.m is None}
    grouped = [name for name in free if not isinstance(get_attribute(program.graph_module, name), nn.Linear)]
    if grouped:
        raise PreconditionError(f"allocation=loss does not handle experts yet ({grouped[0]}); use allocation=uniform")
    if not free:
        return dict(targets)
    weights = {name: get_attribute(program.graph_module, name).weight.detach() for name in free}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise PreconditionError(f"{name}: its weight holds NaN or infinity; the checkpoint is broken")
    inputs, outputs = loss_sensitivity(program, list(free), tokens[:samples], forward_dtype)
    scores = {name: _log_scores(weight, inputs[name], outputs[name]) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    removed = sum(share * weights[name].numel() for name, share in free.items())
    ranked = shares_by_ranking(scores, removed / total)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    blended = blend_shares(free, ranked, sizes, strength=strength, limit=limit)
    return {name: Sparsity(blended[name]) if name in blended else target for name, target in targets.items()}


def loss_sensitivity(
    program: Program, linears: list[str], tokens: Tensor, forward_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean squares of what Linears read, and of the gradient of the next-token loss by what they put out.

    Args:
        program: a lifted program of a causal language model.
        linears: qualified names.
        tokens: (samples, length) int64.
        forward_dtype: precision of the products.

    Returns:
        (in,) and (out,) float64 by name, per token; the loss is summed over tokens.

    Raises:
        PreconditionError: the program gives no logits.
        CalibrationError: activations or gradients are not finite.
    """
    weights = {name: get_attribute(program.graph_module, name).weight for name in linears}
    inputs = {name: torch.zeros(w.shape[1], dtype=torch.float64, device=w.device) for name, w in weights.items()}
    outputs = {name: torch.zeros(w.shape[0], dtype=torch.float64, device=w.device) for name, w in weights.items()}

    def add(call: LinearCall) -> None:
        for sums, value in ((inputs, call.x), (outputs, call.by_output)):
            sums[call.linear] += value.reshape(-1, value.shape[-1]).float().square().sum(0)

    backpropagate_loss(program, linears, tokens, add, forward_dtype=forward_dtype)
    count = tokens.numel()
    return {name: one / count for name, one in inputs.items()}, {name: one / count for name, one in outputs.items()}


def _log_scores(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """log(w_ij^2 E[x_j^2] E[g_i^2]) of a weight (out, in), float32."""
    scores = weight.float().abs().log_().mul_(2)
    return scores.add_(inputs.log().float()).add_(outputs.log().float()[:, None])


def shares_by_ranking(scores: Mapping[str, Tensor], share: float) -> dict[str, float]:
    """The share of each tensor's scores among the lowest `share` of all, found on a histogram.

    Args:
        scores: logarithms, float32; minus infinity for a score of zero, which is among the lowest.
        share: of all scores.
    """
    ends = [value[value.isfinite()].aminmax() for value in scores.values() if bool(value.isfinite().any())]
    if not ends:
        return dict.fromkeys(scores, share)
    low, high = min(float(least) for least, _ in ends), max(float(most) for _, most in ends)
    counts = {name: torch.histc(value.clamp(min=low), _HISTOGRAM, low, high).double() for name, value in scores.items()}
    total = torch.stack(list(counts.values())).sum(0).cumsum(0)
    place = int(torch.searchsorted(total, share * total[-1]))
    return {name: float(count[: place + 1].sum() / count.sum()) for name, count in counts.items()}


def blend_shares(
    uniform: Mapping[str, float],
    ranked: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    strength: float,
    limit: float,
) -> dict[str, float]:
    """Shares between two, none further than `limit` from the first, that remove as much in all as the first do."""
    names = list(uniform)
    first = torch.tensor([uniform[name] for name in names], dtype=torch.float64)
    second = torch.tensor([ranked[name] for name in names], dtype=torch.float64)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    lowest = (first - limit).clamp(min=0)
    highest = (first + limit).clamp(max=0.99)

    def shifted(shift: float) -> Tensor:
        return (first + strength * (second - first) + shift).clamp(lowest, highest)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((shifted(middle) * size).sum()) > float((first * size).sum()):
            high = middle
        else:
            low = middle
    return dict(zip(names, shifted(high).tolist(), strict=True))
