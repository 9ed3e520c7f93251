"""Layer solvers: what they take and give back, and the numerics they share (damping, Cholesky, dead inputs, errors).

A solver prunes one weight given the second moments of its inputs, and knows nothing of graphs. `prepare` is called once
for every distinct input (q, k and v share one), `solve` once for every weight that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fxprune.core.errors import CalibrationError, PreconditionError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.calibration.gram import Gram
    from fxprune.weights.sparsity import Sparsity

__all__ = [
    "Damping",
    "DampingRule",
    "Prepared",
    "Solved",
    "Solver",
    "conjugate_gradients",
    "finish",
    "inverse_factor",
    "prepare_hessian",
    "require_gram",
    "working_weight",
]

DampingRule = Literal["mean", "median", "channel"]

_ESCALATION = 10.0
_SMALLEST_ESCALATED = 1e-6


@dataclass(frozen=True)
class Damping:
    """What is added to the diagonal of the Hessian.

    Attributes:
        share: of what `rule` names.
        rule: `mean` of the diagonal (the SparseGPT paper's), its `median` (one channel of huge activations does not
            change it), or each `channel`'s own entry.
        limit: the damping grows tenfold, up to this share, as long as the Hessian has no Cholesky factor.

    Raises:
        UsageError: a value is out of range.
    """

    share: float = 0.01
    rule: DampingRule = "mean"
    limit: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in {"mean", "median", "channel"}:
            raise UsageError(f"damping is by mean, median or channel, got {self.rule!r}")
        if not 0 <= self.share <= self.limit < float("inf"):
            raise UsageError(f"damping needs 0 <= share <= limit, got share {self.share} and limit {self.limit}")

    def unit(self, diagonal: Tensor) -> Tensor:
        """What a share of 1 adds: (in,), given the diagonal (in,) of the live inputs' Hessian, all positive."""
        if self.rule == "channel":
            return diagonal
        value = diagonal.mean() if self.rule == "mean" else diagonal.median()
        return value.expand_as(diagonal)


@dataclass(frozen=True)
class Prepared:
    """What a solver knows of one input before it sees a weight.

    Attributes:
        gram: the second moments; None for a solver that needs no data.
        dead: (in,) bool, inputs that were 0 in every token; None without a Gram.
        hessian: (in, in) damped X^T X / tokens, with 1 on the diagonal of dead inputs; None where not needed.
        factor: (in, in) upper triangular R with R^T R = hessian^-1; None where not needed.
        notes: what was done, JSON-able.
    """

    gram: Gram | None = None
    dead: Tensor | None = None
    hessian: Tensor | None = None
    factor: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """A pruned weight.

    Attributes:
        weight: (out, in), in the dtype and on the device of the weight given; exactly 0 where removed.
        mask: (out, in) bool, True for kept.
        error: ||X (W - W')^T||_F^2 / ||X W^T||_F^2 on the calibration inputs, without damping, of the weight as
            returned, rounding to its dtype included; ||W - W'||_F^2 / ||W||_F^2 for a solver without data.
        notes: what was done, JSON-able.
    """

    weight: Tensor
    mask: Tensor
    error: float
    notes: Mapping[str, Any] = field(default_factory=dict)


class Solver(Protocol):
    """Prunes one weight.

    Attributes:
        name: as users type it.
    """

    name: str

    def prepare(self, gram: Gram | None) -> Prepared:
        """Do what all weights that read one input share.

        Raises:
            CalibrationError: there is no Gram and the solver needs one, it holds NaN or infinity, or its Hessian has
                no Cholesky factor at the largest damping allowed.
        """
        ...

    def solve(self, weight: Tensor, prepared: Prepared, sparsity: Sparsity, held: Tensor | None = None) -> Solved:
        """Prune a weight (out, in) of any floating dtype.

        Args:
            weight: what to prune.
            prepared: what `prepare` returned.
            sparsity: what goes; weights that are gone already count.
            held: (out, in) bool, False where a weight was removed before and stays 0; None where all are there.

        Raises:
            PreconditionError: the weight is not a finite matrix that reads the prepared input.
            PlanError: the pattern does not divide the inputs.
        """
        ...


def working_weight(weight: Tensor, prepared: Prepared, sparsity: Sparsity, dtype: torch.dtype) -> Tensor:
    """A copy (out, in) of a weight in the solver's dtype, after the checks that every solver makes.

    Raises:
        PreconditionError: the weight is not a matrix of finite numbers, or does not fit the prepared input.
        PlanError: the pattern does not divide the inputs.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise PreconditionError(
            f"a solver takes a floating point weight (out, in), got {tuple(weight.shape)} {weight.dtype}; give the "
            "experts of a grouped weight one at a time"
        )
    rows, columns = weight.shape
    if prepared.gram is not None and prepared.gram.features != columns:
        raise PreconditionError(
            f"a weight ({rows}, {columns}) cannot read {prepared.gram.features} inputs; prepare the solver with the "
            "Gram matrix of what this Linear reads"
        )
    if not bool(torch.isfinite(weight).all()):
        raise PreconditionError(
            f"a weight ({rows}, {columns}) holds NaN or infinity; the checkpoint is broken, or its dtype overflowed"
        )
    sparsity.check(columns, f"a weight ({rows}, {columns})")
    return weight.detach().to(dtype, copy=True)


def finish(
    weight: Tensor, solution: Tensor, mask: Tensor, prepared: Prepared, notes: Mapping[str, Any] | None = None
) -> Solved:
    """Round a solution (out, in) to the weight's dtype, zero what is removed, and measure the error."""
    pruned = torch.where(mask, solution, solution.new_zeros(())).to(weight.dtype)
    dense = weight.detach().to(solution.dtype)
    change = dense - pruned.to(solution.dtype)
    if prepared.gram is None:
        energy = float(dense.square().sum(dtype=torch.float64))
        lost = float(change.square().sum(dtype=torch.float64))
    else:
        energy, lost = prepared.gram.energy(dense), prepared.gram.energy(change)
    # A weight of zeros, or one that reads only dead inputs, loses nothing.
    error = max(lost, 0.0) / energy if energy > 0 else 0.0
    return Solved(pruned, mask, error, {**prepared.notes, **(notes or {})})


def conjugate_gradients(
    start: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int, *, tolerance: float = 0.0
) -> Tensor:
    """Lower the error with the mask fixed: every row's own problem, all rows at once.

    Args:
        start: (out, in), 0 where removed.
        target: (out, in), the dense weight times the Hessian.
        hessian: (in, in) positive definite.
        mask: (out, in) bool, True for kept.
        steps: of conjugate gradients at most; a row that is solved stays as it is.
        tolerance: they end when no row's residual is more than this share of what it was.

    Returns:
        (out, in), 0 where removed.
    """
    kept = mask.to(start.dtype)
    tiny = torch.finfo(start.dtype).tiny
    solution = start.clone()
    residual = torch.addmm(target, start, hessian, alpha=-1).mul_(kept)
    direction = residual.clone()
    squared = residual.square().sum(1, keepdim=True)
    enough = squared * tolerance**2
    for _ in range(steps):
        image = direction @ hessian
        length = squared / (direction * image).sum(1, keepdim=True).clamp_(min=tiny)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, image.mul_(kept), value=-1)
        before, squared = squared, residual.square().sum(1, keepdim=True)
        if tolerance and bool((squared <= enough).all()):
            break
        direction.mul_(squared / before.clamp(min=tiny)).add_(residual)
    return solution


def require_gram(gram: Gram | None, solver: str) -> Gram:
    """The Gram matrix, checked.

    Raises:
        CalibrationError: there is none, or it is not finite.
    """
    if gram is None:
        raise CalibrationError(f"{solver} needs the second moments of what the Linear reads; give calibration samples")
    gram.require_finite()
    return gram


def prepare_hessian(gram: Gram | None, damping: Damping, dtype: torch.dtype, solver: str) -> Prepared:
    """The damped Hessian of the layer problem and the upper Cholesky factor of its inverse.

    Damping escalates tenfold while there is no factor; the notes say so.

    Args:
        gram: second moments.
        damping: what is added to the diagonal.
        dtype: to work in.
        solver: its name, for messages.

    Raises:
        CalibrationError: there is no Gram, it is not finite, or there is no factor at the largest damping allowed.
    """
    gram = require_gram(gram, solver)
    hessian = gram.matrix.to(dtype) / gram.tokens
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    unit = torch.zeros_like(diagonal)
    if not bool(dead.all()):
        unit[~dead] = damping.unit(diagonal[~dead])
    diagonal[dead] = 1.0
    share, escalations = damping.share, 0
    while True:
        hessian.diagonal().copy_(diagonal + share * unit)
        factor = inverse_factor(hessian)
        if factor is not None:
            break
        larger = max(share * _ESCALATION, _SMALLEST_ESCALATED)
        if larger > damping.limit:
            raise CalibrationError(
                f"the Hessian of {gram.features} inputs over {gram.tokens} tokens has no Cholesky factor even with a "
                f"damping of {share:g} of its diagonal's {damping.rule}; use more calibration samples, a larger "
                "damping, or float64"
            )
        share, escalations = larger, escalations + 1
    notes: dict[str, Any] = {"damping": share, "damping_rule": damping.rule}
    if escalations:
        notes["damping_escalations"] = escalations
    if bool(dead.any()):
        notes["dead_inputs"] = int(dead.sum())
    if gram.tokens < gram.features:
        notes["rank_at_most"] = gram.tokens
    return Prepared(gram, dead, hessian, factor, notes)


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper triangular R with R^T R = hessian^-1, or None if there is none that is finite.

    With J the reversal of the order, J hessian J = L L^T gives R = J L^-1 J: one Cholesky and one triangular inverse,
    where inverting first takes two Choleskys and squares the condition number on the way.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info):
        return None
    factor: Tensor = _invert_lower(lower).flip(0, 1)
    return factor if bool(torch.isfinite(factor).all()) else None


def _invert_lower(lower: Tensor, smallest: int = 128) -> Tensor:
    """Invert a lower triangular matrix by halves, so that nearly all the work is matrix products."""
    size = lower.shape[0]
    if size <= smallest:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return inverse
    half = size // 2
    inverse = torch.zeros_like(lower)
    top, bottom = _invert_lower(lower[:half, :half]), _invert_lower(lower[half:, half:])
    inverse[:half, :half] = top
    inverse[half:, half:] = bottom
    torch.mm(bottom @ lower[half:, :half], top, out=inverse[half:, :half]).neg_()
    return inverse
