"""Reconstruction: new weights for what is left of a consumer, so that it puts out what the dense one did.

With X' what the consumer reads in the pruned model, X what it reads in the dense one, W (in, out) its weight, S the
inputs that stay and a column of ones in X' for the bias, H = X'^T X' and C = X'^T (X W),

    W_S = W0_S + (H_SS + ridge)^-1 (C_S - H_SS W0_S)

is least squares with a ridge *toward the weights that are there*. Least squares can overfit: how strong the ridge is,
or whether only the bias moves, or nothing, is chosen for each consumer on tokens that the fit has not seen.

X W is what the layers before lost as well as what goes here. `drift` says how much of that the targets ask back: they
are (X' + drift (X - X')) W. On SmolLM2-135M, less 30%, 64 x 512 tokens, asking back is worse on every text, not only on
other ones than the calibration's: perplexity on C4 that was not seen 61.8 with a drift of 0, 62.7 with 0.5, 75.0 with
1; on wiki.valid 42.7, 43.7, 53.1. So 0 is the default, and then what is left hardly depends on X' either: with X for X'
nothing needs to run (`dense`), all budgets share one Gram matrix, and it is 42.2 and 60.7.

Weights that a mask removed before stay 0: each output then has inputs of its own, S_j, and the systems of all outputs
are solved together by conjugate gradients, in the scale in which their diagonal is one.

Rows of a token count by 1 / (1 + |y|^2 / median |y|^2), with y = X W of the dense model: a few tokens (the first of a
text) have outputs a thousand times larger than all others, and without weights the fit is a fit of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fxprune.calibration.engine import SiteStatistics
from fxprune.calibration.gram import GramSum
from fxprune.core.errors import CalibrationError, NotFiniteError
from fxprune.structured.obs import damped
from fxprune.weights.solvers import conjugate_gradients

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.calibration.stages import InputSite

__all__ = [
    "PairCollector",
    "PairMoments",
    "Reconstructed",
    "Reconstruction",
    "dense_ridge",
    "moments_of_gram",
    "reconstruct",
    "tune_mask",
]

Reconstruction = Literal["none", "bias", "ridge", "auto", "scale", "dense"]
"""What may change: nothing; the bias; weights and bias by least squares with a chosen ridge; the best of these three;
one factor for each unit (the mask tuning of Kwon et al. 2022, section 4.3); or the weights by least squares on what the
dense model's consumers read, without running anything again."""

_LEAST_DENSE_RIDGE = 0.1
_TIMES_INPUTS_A_TOKEN = 4

RIDGES = (0.0003, 0.003, 0.03, 0.3)
"""Shares of each diagonal entry of H that are tried as its ridge."""

_MASKED_STEPS, _MASKED_TOLERANCE = 300, 1e-5
"""Steps of conjugate gradients at most for weights under a mask, and the share of the residual at which they end."""

TOKENS_AN_INPUT = 10
"""`auto` leaves least squares out below so many tokens for each input: with 3 it won on held-out text of the same
kind, and lost to no change at all on other text."""


@dataclass(frozen=True)
class PairMoments:
    """Weighted second moments of what a consumer reads in the pruned model and puts out in the dense one.

    Attributes:
        gram: (in + 1, in + 1) float64, X'^T X' with a last column of ones, divided by the tokens.
        target: (in + 1, out) float64, X'^T (X W), divided by the tokens.
        energy: |X W|^2, divided by the tokens.
        tokens: how many there were.
    """

    gram: Tensor
    target: Tensor
    energy: float
    tokens: int

    def __add__(self, other: PairMoments) -> PairMoments:
        """The moments of all tokens of both."""
        tokens = self.tokens + other.tokens
        one, two = self.tokens / tokens, other.tokens / tokens
        return PairMoments(
            self.gram * one + other.gram * two,
            self.target * one + other.target * two,
            self.energy * one + other.energy * two,
            tokens,
        )

    def error(self, new: Tensor) -> float:
        """|X' W' - X W|^2 / |X W|^2 of a solution (in + 1, out) whose last row is what is added to the bias."""
        fitted = float((new * (self.gram @ new - 2 * self.target)).sum())
        return (fitted + self.energy) / max(self.energy, torch.finfo(torch.float64).tiny)


def dense_ridge(inputs: int, tokens: int) -> float:
    """Share of each diagonal entry of H that `dense` adds: the fewer tokens there are for an input, the more.

    On wiki.valid, 30% of SmolLM2-135M removed, 65,536 tokens for 1,536 inputs, shares from 0.001 to 1 lie within 0.6%
    of each other. With 4,096 tokens that the model wrote itself, less 20%: none 39.8, 0.1 37.5, 1 35.2.
    """
    return max(_LEAST_DENSE_RIDGE, _TIMES_INPUTS_A_TOKEN * inputs / tokens)


def moments_of_gram(gram: Gram, weight: Tensor) -> PairMoments:
    """The moments of a consumer whose inputs in both models are those of a Gram matrix; nothing is known of means.

    Args:
        gram: of (in) inputs.
        weight: (in, out) float64, dense.
    """
    inner = gram.matrix.double() / gram.tokens
    inputs = len(inner)
    matrix = inner.new_zeros(inputs + 1, inputs + 1)
    matrix[:inputs, :inputs] = inner
    matrix[inputs, inputs] = 1.0
    target = torch.cat([inner @ weight, weight.new_zeros(1, weight.shape[1])])
    return PairMoments(matrix, target, float((weight * target[:-1]).sum()), gram.tokens)


class _Sums:
    """Running sums of one site: for the fit, or of the tokens that are held out."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = GramSum(inputs + 1, device)
        self.target = torch.zeros(inputs + 1, outputs, device=device)
        self.energy = 0.0

    def add(self, rows: Tensor, outputs: Tensor, energy: Tensor, counts: Tensor) -> None:
        root = counts.sqrt()[:, None]
        ones = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).mul_(root)
        self.gram.add(ones)
        self.target.addmm_(ones.t(), outputs * root)
        self.energy += float((energy * counts).sum())

    def result(self) -> PairMoments | None:
        gram = self.gram.result()
        if gram is None:
            return None
        tokens = gram.tokens
        return PairMoments(gram.matrix.double() / tokens, self.target.double() / tokens, self.energy / tokens, tokens)


class PairCollector:
    """Collects the moments of a stage's sites (an engine's `Collector`).

    Args:
        weights: (out, in) dense weight of each consumer, by name.
        held_out: samples from this one on are kept apart.
        drift: how much of what the layers before lost the targets ask back, from 0 to 1.
    """

    def __init__(self, weights: Mapping[str, Tensor], held_out: int, drift: float = 1.0) -> None:
        self.weights = weights
        self.drift = drift
        self._single: dict[str, Tensor] = {}  # in float32, of the stage's consumers only
        self.held_out = held_out
        self.moments: dict[str, tuple[PairMoments, PairMoments | None]] = {}
        self._sums: dict[str, tuple[_Sums, _Sums]] = {}
        self._sites: dict[InputSite, None] = {}

    def add(self, site: InputSite, rows: Tensor, dense: Tensor | None, offsets: Tensor | None, first: int) -> None:
        """Take one batch of one site (see `Collector`), which is fitted or held out as a whole."""
        assert offsets is None
        for name in site.linears:
            if name not in self._sums:
                self._single[name] = self.weights[name].float()
                outputs, inputs = self._single[name].shape
                self._sums[name] = (_Sums(inputs, outputs, rows.device), _Sums(inputs, outputs, rows.device))
            aim = rows if dense is None else torch.lerp(rows, dense, self.drift)
            target = aim @ self._single[name].t()
            energy = target.square().sum(1)
            middle = energy.median().clamp(min=torch.finfo(energy.dtype).tiny)
            self._sums[name][first >= self.held_out].add(rows, target, energy, 1 / (1 + energy / middle))
        self._sites.setdefault(site)

    def finish(self) -> list[SiteStatistics]:
        """Moments by consumer are left in `moments`.

        Raises:
            CalibrationError: they are not finite, or all samples were held out.
        """
        for name, (fit, held) in self._sums.items():
            moments = fit.result()
            if moments is None:
                raise CalibrationError(f"{name}: no sample is left to fit; use more calibration samples")
            if not bool(torch.isfinite(moments.gram).all()):
                raise NotFiniteError(
                    f"{name} read NaN or infinite values on the calibration text; check the weights before it, or "
                    "load the model in bfloat16 or float32"
                )
            self.moments[name] = (moments, held.result())
        return [SiteStatistics(site, ()) for site in self._sites]


@dataclass(frozen=True)
class Reconstructed:
    """A consumer's new weights.

    Attributes:
        weight: (in, out) float64, 0 where removed.
        bias: (out,) float64, what is added to the bias; None when nothing is.
        choice: `none`, `bias`, `ridge 0.1` or `scale`.
        error: relative squared error on the tokens that were held out (on those of the fit when none were).
        plain: the same without reconstruction.
    """

    weight: Tensor
    bias: Tensor | None
    choice: str
    error: float
    plain: float


def reconstruct(
    weight: Tensor,
    kept: Tensor,
    fit: PairMoments,
    held: PairMoments | None,
    *,
    mode: Reconstruction = "auto",
    bias: bool = True,
    ridges: Sequence[float] = RIDGES,
    unit_of: Tensor | None = None,
    mask: Tensor | None = None,
) -> Reconstructed:
    """Solve one consumer.

    Args:
        weight: (in, out) dense weight.
        kept: (in,) bool.
        fit: moments to fit on.
        held: moments to choose on; the fit's own when None. What was chosen is then fitted on both.
        mode: what may change.
        bias: whether the bias may.
        ridges: shares of the diagonal to try, from weak to strong, until the error grows.
        unit_of: (in,) unit of each input, for `scale`; -1 for inputs that belong to none.
        mask: (in, out) bool, True for kept, where single weights were removed before: they stay 0.

    Raises:
        CalibrationError: no ridge is strong enough to solve with.
    """
    weight = weight.double()
    if mask is not None:
        weight = weight * mask
    start = torch.cat([weight * kept[:, None], weight.new_zeros(1, weight.shape[1])])
    judge = held or fit
    plain = judge.error(start)

    def solved(moments: PairMoments, choice: str) -> Tensor | None:
        if choice == "none":
            return start
        if choice == "scale":
            assert unit_of is not None
            return torch.cat([weight * tune_mask(weight, kept, moments, unit_of)[:, None], start[-1:]])
        inputs = torch.where(kept)[0]
        if choice == "bias":
            inputs = inputs[:0]
        if bias:
            inputs = torch.cat([inputs, inputs.new_tensor([len(kept)])])
        ridge = 0.0 if choice == "bias" else float(choice.split()[1])
        return _least_squares(start, inputs, moments, ridge, None if choice == "bias" else mask)

    everything = mode != "auto" and bool(kept.all())  # nothing goes, and nobody asked to mend what came before
    few = mode == "auto" and fit.tokens < TOKENS_AN_INPUT * len(kept)
    choices = ["none"] if everything else _choices(mode, () if few else ridges, bias=bias)
    errors: dict[str, float] = {}
    weaker = float("inf")
    for choice in choices:
        tried = solved(fit, choice)
        if tried is None:
            continue
        errors[choice] = judge.error(tried)
        if choice.startswith("ridge"):
            if errors[choice] > weaker:
                break  # a still stronger ridge is further from the best one
            weaker = errors[choice]
    if not errors:
        raise CalibrationError(
            f"no ridge of {', '.join(f'{ridge:g}' for ridge in ridges)} is enough for moments of {len(kept)} inputs "
            f"over {fit.tokens} tokens; use more calibration text, a stronger ridge, or reconstruct=auto"
        )
    best = min(errors, key=errors.__getitem__)
    both = None if held is None else solved(fit + held, best)
    new = solved(fit, best) if both is None else both
    assert new is not None
    changed = bias and best not in {"none", "scale"}
    return Reconstructed(new[:-1], new[-1] if changed else None, best, errors[best], plain)


def _choices(mode: Reconstruction, ridges: Sequence[float], *, bias: bool) -> list[str]:
    """What is tried, in the order in which it is."""
    if mode == "scale":
        return ["scale"]
    choices = ["none"] if mode in {"none", "auto"} else []
    if mode in {"bias", "auto"} and bias:
        choices.append("bias")
    if mode in {"ridge", "auto"}:
        choices += [f"ridge {ridge:g}" for ridge in ridges]
    return choices or ["none"]


def _least_squares(
    start: Tensor, inputs: Tensor, moments: PairMoments, ridge: float, mask: Tensor | None = None
) -> Tensor | None:
    """The solution (in + 1, out) in which some inputs (the last one is the bias) move, as far as a mask (in, out) lets.

    None when the ridge is less than what rounding left in the moments: the system has no Cholesky factor.
    """
    gram = moments.gram
    residual = (moments.target - gram @ start)[inputs]
    system = damped(gram[inputs[:, None], inputs], ridge, "channel")
    # Inputs that (nearly) repeat others: a little of the median keeps the factorisation going.
    system.diagonal().add_(1e-6 * float(system.diagonal().median()))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        return None
    result = start.clone()
    if mask is None:
        result[inputs] += torch.cholesky_solve(residual, factor)
        return result
    support = torch.cat([mask, mask.new_ones(1, mask.shape[1])])[inputs].t()
    scale = system.diagonal().rsqrt()
    moved = conjugate_gradients(
        torch.zeros_like(residual.t()),
        residual.t() * scale,
        system * scale * scale[:, None],
        support,
        _MASKED_STEPS,
        tolerance=_MASKED_TOLERANCE,
    )
    result[inputs] += (moved * scale).t()
    return result


def tune_mask(weight: Tensor, kept: Tensor, moments: PairMoments, unit_of: Tensor) -> Tensor:
    """One factor for each kept unit: the diagonal case of reconstruction.

    Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.3, there solved by LSMR with
    a damping of 1, whose factors are refused when one is beyond 10; here with a ridge of 1% toward 1.

    Args:
        weight: (in, out).
        kept: (in,) bool.
        moments: of the inputs.
        unit_of: (in,) unit of each input, -1 for none.

    Returns:
        (in,) float64, the factor of each input: 0 for removed ones, 1 for those without a unit.
    """
    factors = kept.to(weight.dtype)
    inputs = torch.where(kept & (unit_of >= 0))[0]
    units, own = torch.unique(unit_of[inputs], return_inverse=True)
    if not len(units):
        return factors
    alike = weight @ weight.T
    spread = torch.zeros(len(units), len(inputs), dtype=weight.dtype, device=weight.device)
    spread[own, torch.arange(len(inputs), device=weight.device)] = 1
    products = moments.gram[:-1, :-1] * alike
    system = spread @ products[inputs[:, None], inputs] @ spread.T
    wanted = spread @ (moments.target[:-1] * weight).sum(1)[inputs]
    others = torch.where(kept & (unit_of < 0))[0]
    if len(others):
        wanted -= spread @ products[inputs[:, None], others].sum(1)
    ones = torch.ones_like(wanted)
    scale = torch.linalg.solve(damped(system, 0.01, "mean"), wanted - system @ ones) + ones
    if bool((scale.abs() > 10).any()):
        return factors
    factors[inputs] = scale[own]
    return factors
