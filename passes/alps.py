"""ALPS: choose mask and weights together by ADMM on the layer's error, then solve for the weights on the mask.

The problem is min ||X (W - W')^T||_F^2 over W' of a given sparsity. After Meng et al. 2024, "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (arXiv 2406.07831): W' is split into a dense
Z that minimises the error and a sparse D that Z is drawn to with a penalty rho. Rho grows, so that the mask moves
freely at first and then settles. Conjugate gradients on the final mask finish.

Three things differ from the paper:

- Columns are scaled so that [H^-1]_jj = 1. A squared weight is then what removing it costs once all others have made up
  for it (the saliency of optimal brain surgeon), where the paper's scaling, H_jj = 1, counts what it costs if nothing
  does.
- In that scale rho has a unit, and one schedule fits all: few steps, geometric, and rho changes in every one of them,
  where the paper watches how much of the mask has moved.
- (H + rho I)^-1, needed for every rho, is interpolated between the inverses at two: as many Cholesky factorisations
  stand in for an eigendecomposition and for multiplying its factors in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune.core.errors import CalibrationError, PreconditionError, UsageError
from fxprune.weights.base import SparsePass
from fxprune.weights.solvers import (
    Damping,
    DampingRule,
    Prepared,
    Solved,
    conjugate_gradients,
    finish,
    prepare_hessian,
    working_weight,
)
from fxprune.weights.sparsity import keep_largest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.weights.sparsity import Sparsity

__all__ = ["Alps", "AlpsPrepared", "AlpsSolver", "admm", "interpolate_inverse"]

_INTERPOLATION_ERROR = 0.1
"""Relative, of the inverse's eigenvalues; a step applies the inverse to a correction only, so that this is enough."""
_MOST_ANCHORS = 12


@dataclass(frozen=True)
class AlpsPrepared(Prepared):
    """What ALPS knows of one input; `hessian` is S^-1 H S^-1 with S the scale.

    Attributes:
        scale: (in,) 1 / sqrt([H^-1]_jj); a weight's columns are multiplied by it, a solution's divided.
        inverses: (in, in) each, (hessian + rho I)^-1 for the anchors of the schedule.
    """

    scale: Tensor | None = None
    inverses: tuple[Tensor, ...] = ()


class AlpsSolver:
    """The ALPS solver.

    Args:
        steps: of ADMM.
        rho: the penalty in the first and in the last step; between them it grows geometrically.
        refine_steps: of conjugate gradients on the final mask.
        damping: of the Hessian.
        dtype: float32, or float64 for Hessians that are close to singular.

    Raises:
        UsageError: an option is out of range.
    """

    name = "alps"

    def __init__(
        self,
        *,
        steps: int = 20,
        rho: tuple[float, float] = (0.7, 2.0),
        refine_steps: int = 5,
        damping: Damping | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if steps < 1 or refine_steps < 0:
            raise UsageError(f"alps needs steps >= 1 and refine_steps >= 0, got {steps} and {refine_steps}")
        if not 0 < rho[0] <= rho[1] < float("inf"):
            raise UsageError(f"alps needs a rho that does not fall, 0 < first <= last, got {rho}")
        self.steps = steps
        self.rho = rho
        self.refine_steps = refine_steps
        self.damping = damping or Damping()
        self.dtype = dtype
        first, last = rho
        self.penalties = [first * (last / first) ** (step / max(steps - 1, 1)) for step in range(steps)]
        self.anchors, self.coefficients = interpolate_inverse(self.penalties)

    def prepare(self, gram: Gram | None) -> AlpsPrepared:
        """Scale the Hessian and invert it at the anchors.

        Raises:
            CalibrationError: see `fxprune.weights.solvers.prepare_hessian`.
        """
        plain = prepare_hessian(gram, self.damping, self.dtype, self.name)
        assert plain.hessian is not None
        assert plain.factor is not None
        scale = plain.factor.square().sum(0).rsqrt()
        hessian = plain.hessian / scale / scale[:, None]
        inverses = [_shifted_inverse(hessian, rho) for rho in self.anchors]
        return AlpsPrepared(plain.gram, plain.dead, hessian, notes=plain.notes, scale=scale, inverses=tuple(inverses))

    def solve(self, weight: Tensor, prepared: Prepared, sparsity: Sparsity, held: Tensor | None = None) -> Solved:
        """Prune a weight (out, in); see `fxprune.weights.solvers.Solver`."""
        if not isinstance(prepared, AlpsPrepared):
            raise PreconditionError("alps was given what another solver prepared; use what its own prepare returns")
        working = working_weight(weight, prepared, sparsity, self.dtype)
        assert prepared.dead is not None
        assert prepared.hessian is not None
        assert prepared.scale is not None
        working[:, prepared.dead] = 0
        working *= prepared.scale
        schedule = zip(self.penalties, self.coefficients, strict=True)
        start, mask = admm(working, prepared.inverses, schedule, sparsity, held)
        target = working @ prepared.hessian
        solution = conjugate_gradients(start, target, prepared.hessian, mask, self.refine_steps)
        return finish(weight, solution.div_(prepared.scale), mask, prepared)


def _shifted_inverse(hessian: Tensor, rho: float) -> Tensor:
    """(hessian + rho I)^-1."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise CalibrationError(
            f"the scaled Hessian of {len(hessian)} inputs is too close to singular for {hessian.dtype}; use a larger "
            "damping, more calibration samples, or float64"
        )
    return torch.cholesky_inverse(lower)


def interpolate_inverse(penalties: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """Anchors a_k and coefficients c_k with 1 / (x + rho) = sum_k c_k / (x + a_k) to 10% for every rho and all x >= 0.

    The sum then holds for (H + rho I)^-1 too, along every eigenvector of H. It is Lagrange's interpolation in log(rho),
    where the function is smooth however small x is, at Chebyshev's nodes.

    Args:
        penalties: rho in each step, increasing.

    Returns:
        The anchors, as few as reach 10%, and the coefficients of each step, one for every anchor.

    Raises:
        UsageError: the penalties are too far apart.
    """
    logs = np.log(np.asarray(penalties))
    if logs[0] == logs[-1]:
        return [float(penalties[0])], [[1.0] for _ in penalties]
    x = np.concatenate([[0.0], np.logspace(-6, 6, 200)])[:, None]
    for count in range(2, _MOST_ANCHORS + 1):
        nodes = (logs[0] + logs[-1] + (logs[-1] - logs[0]) * np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2
        anchors = np.exp(nodes)
        coefficients = np.stack(
            [np.prod([(logs - other) / (node - other) for other in nodes if other != node], axis=0) for node in nodes],
            axis=1,
        )
        error = (1 / (x + anchors)) @ coefficients.T * (x + np.asarray(penalties)) - 1
        if np.abs(error).max() < _INTERPOLATION_ERROR:
            return anchors.tolist(), coefficients.tolist()
    raise UsageError(
        f"alps cannot go from a rho of {penalties[0]:g} to {penalties[-1]:g}: {_MOST_ANCHORS} inverses of the Hessian "
        "are too few for such a range; choose them closer together"
    )


def admm(
    weight: Tensor,
    inverses: Sequence[Tensor],
    schedule: Iterable[tuple[float, Sequence[float]]],
    sparsity: Sparsity,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Alternate between the weights of least error and the nearest ones of the sparsity asked for.

    With U the scaled dual, a step is Z = W + rho (D - U - W) (H + rho I)^-1 and T = Z + U. Then D is T where the mask
    keeps it, and U is T elsewhere, so T and the mask are the whole state. When rho changes, U scales by old / new.

    Args:
        weight: W (out, in), scaled.
        inverses: (in, in) each, (H + rho I)^-1 at the anchors, with H the scaled Hessian.
        schedule: rho in each step, and the coefficients that make its inverse of those at the anchors.
        sparsity: of the mask.
        held: (out, in) bool, False where the mask keeps nothing whatever comes; None for everywhere.

    Returns:
        D, (out, in), 0 where removed, and the mask (out, in) bool, True for kept.
    """
    state = weight.clone()
    mask = keep_largest(state.abs(), sparsity, held=held)
    inverse = torch.empty_like(inverses[0])
    previous = 0.0
    for rho, coefficients in schedule:
        torch.mul(inverses[0], coefficients[0], out=inverse)
        for other, coefficient in zip(inverses[1:], coefficients[1:], strict=True):
            inverse.add_(other, alpha=coefficient)
        kept = mask.to(state.dtype)
        # rho (D - U) is rho T where kept and -previous T where removed, for U has to be rescaled first.
        pull = (kept * (rho + previous)).sub_(previous).mul_(state).sub_(weight, alpha=rho)
        state.mul_((1 - kept).mul_(previous / rho)).add_(weight).addmm_(pull, inverse)
        mask = keep_largest(state.abs(), sparsity, held=held)
        previous = rho
    return state.mul_(mask), mask


class Alps(SparsePass):
    """Prune weights with ALPS (see `fxprune.weights.base` for the options that all these passes share).

    Args:
        steps: of ADMM.
        refine_steps: of conjugate gradients on the final mask.
        damping: share of the Hessian's diagonal that is added to it; it grows when a factorisation fails.
        damping_rule: share of the diagonal's `mean`, its `median`, or each `channel`'s own entry.
        **options: see `SparsePass`.
    """

    name = "alps"

    def __init__(
        self,
        *,
        steps: int = 20,
        refine_steps: int = 5,
        damping: float = 0.01,
        damping_rule: DampingRule = "mean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.steps = steps
        self.refine_steps = refine_steps
        self.damping = damping
        self.damping_rule: DampingRule = damping_rule
        self.solver()

    def solver(self) -> AlpsSolver:
        """The solver for these options."""
        return AlpsSolver(
            steps=self.steps, refine_steps=self.refine_steps, damping=Damping(self.damping, self.damping_rule)
        )
