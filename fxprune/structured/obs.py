"""Structured optimal brain surgeon: what it costs to remove a consumer's inputs when the others make up for them.

A consumer Linear with inputs X (tokens, in), Gram matrix H = X^T X and weight W (in, out) loses 1/2 ||X W - X W'||^2
when inputs are removed. With the remaining weights solved for, removing a set g costs

    1/2 tr(W_g^T ([H^-1]_gg)^-1 W_g)
    W -= H^-1[:, g] ([H^-1]_gg)^-1 W_g,     H^-1 -= H^-1[:, g] ([H^-1]_gg)^-1 H^-1[g, :]

(Hassibi and Stork 1993; for groups ZipLM, Kurtic et al. 2023, equations 2 and 3; OSSCAR, Meng et al. 2024). One sweep
over all inputs gives the error at every width. With the gradients of the end loss by the consumer's outputs, G = E[g
g^T], the same formulas on W G^(1/2) give the change of the end loss to second order, the Hessian being factored into
inputs and gradients (K-FAC, Martens and Grosse 2015): errors of different layers and kinds then share one unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fxprune.core.errors import CalibrationError, NotFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Elimination", "damped", "matrix_root", "positive_definite", "swap", "swap_gains", "sweep"]

DampingScale = Literal["mean", "median", "channel"]

_COMPACT_BELOW = 0.8
"""What is left is copied into smaller matrices when it falls below this share of them."""


def damped(gram: Tensor, damping: float, rule: DampingScale = "median") -> Tensor:
    """A Gram matrix with a share of its diagonal's mean, its median, or of every entry itself, added to the diagonal.

    Args:
        gram: (in, in) symmetric.
        damping: the share.
        rule: of what. A few channels are often a thousand times larger than the rest and swamp the mean.

    Returns:
        (in, in) float64. Inputs that are always 0 get a diagonal of 1; with a weight of 0 removing them costs
        nothing.

    Raises:
        CalibrationError: there are NaN or infinities.
    """
    matrix = gram.double().clone()
    if not bool(torch.isfinite(matrix).all()):
        raise NotFiniteError(
            f"the Gram matrix of {len(gram)} inputs holds NaN or infinity; load the model in bfloat16 or float32"
        )
    diagonal = matrix.diagonal()
    live = diagonal > 0
    if rule == "channel":
        diagonal.mul_(1 + damping)
    elif bool(live.any()):
        values = diagonal[live]
        diagonal.add_(damping * float(values.median() if rule == "median" else values.mean()))
    diagonal[~live] = 1.0
    return matrix


def positive_definite(
    gram: Tensor, damping: float, rule: DampingScale = "median", *, limit: float = 1e3
) -> tuple[Tensor, float]:
    """`damped`, with ten times the damping for as long as the result has no Cholesky factor.

    Sums in float32 round the products of channels that are a thousand times larger than others; what this leaves in
    the small ones can be more than the damping.

    Args:
        gram: see `damped`.
        damping: see `damped`.
        rule: see `damped`.
        limit: the most that the damping may become, as a multiple of the one asked for.

    Returns:
        The matrix, and the damping that it took.

    Raises:
        CalibrationError: no damping within the limit is enough, or there are NaN or infinities.
    """
    used = damping
    while used <= damping * limit:
        matrix = damped(gram, used, rule)
        _, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            return matrix, used
        used *= 10
    raise CalibrationError(
        f"the Gram matrix of {len(gram)} inputs is not positive definite even with a damping of {used / 10:g}; use "
        "more and more varied calibration text"
    )


def matrix_root(metric: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite (n, n) matrix, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


@dataclass
class _State:
    """One consumer's problem: what is left of it, and where that stood at first."""

    inverse: Tensor
    weight: Tensor
    alive: Tensor  # (left,) bool over the rows at hand
    rows: Tensor  # (inputs,) row of each input at first, -1 once compacted away


class Elimination:
    """Removes blocks of inputs from one consumer, one after the other, with what is left made up for.

    Args:
        hessian: (in, in) positive definite; see `damped`.
        weight: (in, out), scaled by the root of the output metric where there is one.

    Raises:
        CalibrationError: the Hessian is not positive definite in float64.
    """

    def __init__(self, hessian: Tensor, weight: Tensor) -> None:
        lower, info = torch.linalg.cholesky_ex(hessian.double())
        if int(info):
            raise CalibrationError(
                f"the Hessian of {len(hessian)} inputs is not positive definite; use a larger damping, or more "
                f"calibration tokens than the {len(hessian)} inputs"
            )
        inputs = len(hessian)
        self._state = _State(
            torch.cholesky_inverse(lower),
            weight.double().clone(),
            torch.ones(inputs, dtype=torch.bool, device=hessian.device),
            torch.arange(inputs, device=hessian.device),
        )

    @property
    def device(self) -> torch.device:
        """Where the problem is."""
        return self._state.weight.device

    def clone(self) -> Elimination:
        """A copy that goes its own way."""
        other = object.__new__(Elimination)
        state = self._state
        other._state = _State(state.inverse.clone(), state.weight.clone(), state.alive.clone(), state.rows.clone())
        return other

    def costs(self, blocks: Tensor) -> Tensor:
        """What removing each block alone would cost now.

        Args:
            blocks: (blocks, inputs of one) int64; none of them removed yet.

        Returns:
            (blocks,) float64.
        """
        state = self._state
        rows = state.rows[blocks]
        if blocks.shape[1] == 1:
            rows = rows[:, 0]
            return 0.5 * state.weight[rows].square().sum(1) / state.inverse.diagonal()[rows]
        return torch.stack([0.5 * (state.weight[r] * self._made_up(r)).sum() for r in rows])

    def _made_up(self, rows: Tensor) -> Tensor:
        """([H^-1]_gg)^-1 W_g."""
        state = self._state
        block = state.inverse[rows[:, None], rows]
        solved: Tensor = torch.linalg.solve(block, state.weight[rows])
        return solved

    def remove(self, inputs: Tensor) -> float:
        """Remove inputs together, (n,) int64; returns what that costs on top of what is gone."""
        state = self._state
        rows = state.rows[inputs]
        solved = self._made_up(rows)
        cost = 0.5 * float((state.weight[rows] * solved).sum())
        columns = state.inverse[:, rows]
        state.weight.addmm_(columns, solved, alpha=-1)
        state.inverse.addmm_(torch.linalg.solve(columns[rows], columns.T).T, columns.T, alpha=-1)
        state.alive[rows] = False
        # Exact zeros where rounding leaves residues: removed rows must not grow back into what is left.
        state.inverse[rows] = 0
        state.inverse[:, rows] = 0
        state.weight[rows] = 0
        if int(state.alive.sum()) < _COMPACT_BELOW * len(state.alive):
            self._compact()
        return cost

    def _compact(self) -> None:
        state = self._state
        left = torch.where(state.alive)[0]
        place = torch.full_like(state.alive, -1, dtype=torch.int64)
        place[left] = torch.arange(len(left), device=left.device)
        kept = state.rows >= 0
        state.rows[kept] = place[state.rows[kept]]
        state.inverse = state.inverse[left[:, None], left]
        state.weight = state.weight[left]
        state.alive = state.alive[left]


def sweep(
    problems: Sequence[Elimination],
    blocks: Sequence[Tensor],
    *,
    step: int,
    least: int,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove units, the cheapest first and `step` at a time, until `least` are left.

    Args:
        problems: the consumers that read the units; they are used up.
        blocks: for each consumer (units, inputs of one) int64.
        step: units that go together.
        least: units that stay.
        left: (units,) bool, the units that are still there when a sweep goes on; all of them by default.

    Returns:
        The order (removed,) int64 of the units, and the error after each step (steps,) float64, summed over consumers.
    """
    left = torch.ones(len(blocks[0]), dtype=torch.bool) if left is None else left.clone()
    order: list[Tensor] = []
    errors: list[float] = []
    total = 0.0
    while int(left.sum()) - step >= least:
        units = torch.where(left)[0]
        costs = sum(problem.costs(block[units]).cpu() for problem, block in zip(problems, blocks, strict=True))
        assert isinstance(costs, torch.Tensor)
        gone = units[torch.topk(costs, step, largest=False).indices]
        total += sum(problem.remove(block[gone].reshape(-1)) for problem, block in zip(problems, blocks, strict=True))
        left[gone] = False
        order.append(gone)
        errors.append(total)
    removed = torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
    return removed, torch.tensor(errors, dtype=torch.float64)


def swap_gains(hessian: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What adding each removed input back would gain, and what removing each kept one would cost.

    With S the kept and R the removed inputs, r = H_RS H_SS^-1 (...) the part of X_R W that S cannot express: adding j
    back gains 1/2 |(Schur W_R)_j|^2 / Schur_jj, Schur = H_RR - H_RS H_SS^-1 H_SR.

    Args:
        hessian: (in, in) positive definite float64.
        weight: (in, out) of the dense consumer, scaled by the root of the output metric.
        kept: (in,) bool.

    Returns:
        Gains of the removed inputs and costs of the kept ones, float64, each in ascending order of the input.
    """
    s, r = torch.where(kept)[0], torch.where(~kept)[0]
    factor = torch.linalg.cholesky(hessian[s[:, None], s])
    cross = hessian[s[:, None], r]
    through = torch.cholesky_solve(cross, factor)  # H_SS^-1 H_SR
    schur = hessian[r[:, None], r] - cross.T @ through
    residual = schur @ weight[r]
    gains = 0.5 * residual.square().sum(1) / schur.diagonal().clamp(min=torch.finfo(schur.dtype).tiny)
    solution = weight[s] + through @ weight[r]
    costs = 0.5 * solution.square().sum(1) / torch.cholesky_inverse(factor).diagonal()
    return gains, costs


def swap(
    hessian: Tensor, weight: Tensor, kept: Tensor, allowed: Tensor, count: int, *, rounds: int = 2
) -> tuple[Tensor, float]:
    """Exchange inputs while that lowers the error, their number unchanged.

    Args:
        hessian: (in, in) positive definite float64.
        weight: (in, out) of the dense consumer, scaled by the root of the output metric.
        kept: (in,) bool, at most `count` inputs, all of them allowed; those that gain most fill up what is missing.
        allowed: (in,) bool, inputs that may stay.
        count: how many shall stay.
        rounds: at most; half of the exchanges that gain, each for itself, are tried at once, then one.

    Returns:
        (in,) bool, what stays, and by how much the error fell through exchanges.
    """
    kept = kept.clone()
    while (missing := count - int(kept.sum())) > 0:
        gains, _ = swap_gains(hessian, weight, kept)
        outside = torch.where(~kept)[0]
        gains[~allowed[outside]] = -1.0
        kept[outside[torch.topk(gains, missing).indices]] = True
    if not bool((allowed & ~kept).any()):
        return kept, 0.0
    error = start = _error(hessian, weight, kept)
    at_once = count
    for _ in range(rounds):
        gains, costs = swap_gains(hessian, weight, kept)
        outside, inside = torch.where(~kept)[0], torch.where(kept)[0]
        gains[~allowed[outside]] = -1.0
        back = gains.argsort(descending=True)
        out = costs.argsort()
        pairs = min(len(back), len(out))
        better = int((gains[back[:pairs]] > costs[out[:pairs]]).sum())
        if not better:
            break
        at_once = min(at_once, max(1, better // 2))
        new = kept.clone()
        new[outside[back[:at_once]]] = True
        new[inside[out[:at_once]]] = False
        after = _error(hessian, weight, new)
        if after < error:
            kept, error = new, after
        elif at_once == 1:
            break
        else:
            at_once = 1
    return kept, start - error


def _error(hessian: Tensor, weight: Tensor, kept: Tensor) -> float:
    """What removing all but the kept inputs costs."""
    s, r = torch.where(kept)[0], torch.where(~kept)[0]
    cross = hessian[s[:, None], r]
    through = torch.cholesky_solve(cross, torch.linalg.cholesky(hessian[s[:, None], s]))
    schur = hessian[r[:, None], r] - cross.T @ through
    return 0.5 * float((weight[r] * (schur @ weight[r])).sum())
