"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with positive probability, and differentiable.

    u ~ U(0, 1)      s = sigmoid((log u - log(1 - u) + log_alpha) / beta)      z = clamp(s (r - l) + l, 0, 1)

Louizos, Welling, Kingma 2018, "Learning sparse neural networks through L0 regularization", section 2.2, with their
l = -0.1, r = 1.1, beta = 2/3. A gate is open when z > 0, which has the probability
sigmoid(log_alpha - beta log(-l/r)). Everything is computed in float32, whatever precision the model has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "BETA",
    "LEAST_OPEN",
    "LEFT",
    "RIGHT",
    "HardConcrete",
    "KeepsFloat32",
    "log_alpha_of",
    "open_probability",
    "ranked_log_alpha",
    "sampled_gate",
    "soft_gate",
]

LEFT, RIGHT, BETA = -0.1, 1.1, 2 / 3
_SHIFT = BETA * math.log(-LEFT / RIGHT)
LEAST_OPEN = 0.01
"""The least value of a gate that is kept: a kept gate of 0 would be a removed one."""


def sampled_gate(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The gate for a draw from U(0, 1), in [0, 1]; draws of 0 and 1 are taken as the nearest numbers inside.

    Args:
        log_alpha: any shape, floating point.
        uniform: same shape and dtype, in [0, 1].
    """
    tiny = torch.finfo(uniform.dtype).eps
    inside = uniform.clamp(tiny, 1 - tiny)
    noise = inside.log() - torch.log1p(-inside)
    return _stretched(torch.sigmoid((noise + log_alpha) / BETA))


def soft_gate(log_alpha: Tensor) -> Tensor:
    """The gate at evaluation, clamp(sigmoid(log_alpha) (r - l) + l, 0, 1): equation 13 of the paper."""
    return _stretched(torch.sigmoid(log_alpha))


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0: equation 12 of the paper."""
    return torch.sigmoid(log_alpha - _SHIFT)


def log_alpha_of(probability: Tensor) -> Tensor:
    """The inverse of `open_probability`; probabilities must lie inside (0, 1)."""
    logit: Tensor = torch.logit(probability)
    return logit + _SHIFT


def ranked_log_alpha(scores: Tensor, count: float, spread: float = 4.0) -> Tensor:
    """Gates that are ordered as scores are, and of which a given number is expected to be open.

    The logits of the open probabilities lie evenly within 2 * `spread`, in the order of the scores; only ranks count,
    so scores of any scale do. Equal scores get equal gates.

    Args:
        scores: any shape; finite.
        count: expected number of open gates, more than 0 and less than all.
        spread: how decided the ranking is: half the distance between the first and the last logit.

    Returns:
        Same shape, float32.

    Raises:
        UsageError: the scores are not finite, or no gates of this kind have the count.
    """
    if not bool(torch.isfinite(scores).all()):
        raise UsageError("gates cannot start from scores that are not finite; look at the calibration text")
    if not 0 < count < scores.numel():
        raise UsageError(f"of {scores.numel()} gates, {count:g} cannot be the expected number open; say one between")
    flat = scores.detach().reshape(-1).double()
    _, place, size = torch.unique(flat, return_inverse=True, return_counts=True)
    # The mean rank of those that are equal.
    rank = (size.cumsum(0) - (size + 1) / 2)[place]
    base = (2 * rank / max(1, flat.numel() - 1) - 1) * spread
    low, high = -60.0 - spread, 60.0 + spread
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(base + middle).sum()) < count else (low, middle)
    found: Tensor = base + ((low + high) / 2 + _SHIFT)
    return found.reshape(scores.shape).float()


def _stretched(s: Tensor) -> Tensor:
    return (s * (RIGHT - LEFT) + LEFT).clamp(0, 1)


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay in float32 when it is cast: bfloat16 has no steps small enough to train them.

    Their gradients are dropped by a cast, which would have rounded them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = [(parameter, parameter.detach()) for parameter in self.parameters(recurse=False)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no annotations here
        for parameter, value in exact:
            if parameter.dtype is not torch.float32:
                parameter.data, parameter.grad = value.to(parameter.device), None
        return self


class HardConcrete(KeepsFloat32):
    """Hard-concrete gates of any shape, in float32 even within a model that is cast to another precision.

    Args:
        log_alpha: where they start; see `closed_with` and `of` for other ways to say it.

    Attributes:
        log_alpha: the parameter, float32.
        offset: what is added to it wherever it is read; training under a hard budget moves it, so that as much is
            expected to be open as the budget of the step allows.
    """

    log_alpha: nn.Parameter
    offset: float = 0.0

    def __init__(self, log_alpha: Tensor) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(log_alpha.detach().float().clone())

    @classmethod
    def closed_with(
        cls, shape: Sequence[int], drop_rate: float = 0.01, device: torch.device | None = None
    ) -> HardConcrete:
        """Gates that are all closed with the same probability.

        The reference code of NutePrune takes its `droprate_init` for 1 - sigmoid(log_alpha), which is not the
        probability of a closed gate (0.01 there gives 0.002); here it is.

        Raises:
            UsageError: the drop rate is not inside (0, 1).
        """
        if not 0 < drop_rate < 1:
            raise UsageError(f"the initial drop rate must lie between 0 and 1, got {drop_rate}")
        return cls.of(torch.full(tuple(shape), 1 - drop_rate, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, probability: Tensor) -> HardConcrete:
        """Gates with given open probabilities, which are brought inside (0, 1) by a millionth.

        Raises:
            UsageError: a probability is not in [0, 1].
        """
        if not bool(((probability >= 0) & (probability <= 1)).all()):
            raise UsageError("open probabilities of gates must lie in [0, 1]")
        return cls(log_alpha_of(probability.double().clamp(1e-6, 1 - 1e-6)))

    def location(self) -> Tensor:
        """`log_alpha` with the offset."""
        return self.log_alpha + self.offset if self.offset else self.log_alpha

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw all gates once, float32; equal states of the generator give equal gates.

        Args:
            generator: on the gates' device, or on the CPU (the draws are then moved), so that one seed gives the same
                gates on any device.
        """
        at = self.log_alpha.device if generator is None else generator.device
        uniform = torch.rand(self.log_alpha.shape, generator=generator, dtype=torch.float32, device=at)
        return sampled_gate(self.location(), uniform.to(self.log_alpha.device))

    def open_probability(self) -> Tensor:
        """The probability of each gate to be open, float32."""
        return open_probability(self.location())

    def soft(self) -> Tensor:
        """The value of each gate at evaluation (equation 13), float32; it has gradients."""
        return soft_gate(self.location())

    def deterministic(self, least: int = 1) -> Tensor:
        """Soft values of as many gates as are expected to be open, 0 for the others; float32, no gradients.

        The expected number is the rounded sum of the open probabilities, so what is evaluated has the size that was
        trained for. Those with the largest log_alpha are open, of equal ones the first; an open gate is at least 0.01.

        Args:
            least: how many are open at least.
        """
        with torch.no_grad():
            flat = self.location().reshape(-1)
            count = round(float(open_probability(flat.double()).sum()))
            order = torch.argsort(flat, descending=True, stable=True)
            value = torch.zeros_like(flat)
            kept = order[: max(count, least)]
            value[kept] = soft_gate(flat[kept]).clamp(min=LEAST_OPEN)
            return value.reshape(self.log_alpha.shape)

    def extra_repr(self) -> str:
        """Shape and expected number of open gates."""
        expected = float(self.open_probability().detach().double().sum())
        return f"shape={tuple(self.log_alpha.shape)}, expected_open={expected:.1f}"
