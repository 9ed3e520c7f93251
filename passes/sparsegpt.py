"""SparseGPT: prune column by column, and let the columns to the right make up for the error.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774),
algorithm 1 with the adaptive mask selection of section 3.3 and the N:M extension of section 3.4. With R the upper
Cholesky factor of the inverse Hessian, removing w_i of a row costs (w_i / R_ii)^2, and every w_j to the right of it
changes by -w_i R_ij / R_ii.

The arithmetic is the paper's in another order. Columns of the weight are rows here, so that they are contiguous. What
the removed weights of a block do to a column is added up when that column is reached (one matrix-vector product), where
the authors' code updates all columns to the right after each one; what they do to later blocks is one matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import UsageError
from fxprune.weights.base import SparsePass
from fxprune.weights.solvers import Damping, DampingRule, Prepared, Solved, finish, prepare_hessian, working_weight
from fxprune.weights.sparsity import keep_of_group, lowest

if TYPE_CHECKING:
    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.weights.sparsity import Sparsity

__all__ = ["SparseGpt", "SparseGptSolver", "sweep"]

_STRIP = 16
"""Columns of a block that are solved between two matrix products."""


class SparseGptSolver:
    """The SparseGPT solver.

    Args:
        block_size: columns whose mask is chosen together (1x1), and between two updates of all columns to the right;
            with an N:M pattern it is rounded up to whole groups.
        damping: of the Hessian.
        dtype: float32, or float64 for Hessians that are close to singular.

    Raises:
        UsageError: an option is out of range.
    """

    name = "sparsegpt"

    def __init__(
        self, *, block_size: int = 128, damping: Damping | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        if block_size < 1:
            raise UsageError(f"sparsegpt needs a block size of at least 1, got {block_size}")
        self.block_size = block_size
        self.damping = damping or Damping()
        self.dtype = dtype

    def prepare(self, gram: Gram | None) -> Prepared:
        """Factor the inverse Hessian; see `fxprune.weights.solvers.prepare_hessian`."""
        return prepare_hessian(gram, self.damping, self.dtype, self.name)

    def solve(self, weight: Tensor, prepared: Prepared, sparsity: Sparsity, held: Tensor | None = None) -> Solved:
        """Prune a weight (out, in); see `fxprune.weights.solvers.Solver`."""
        working = working_weight(weight, prepared, sparsity, self.dtype)
        assert prepared.dead is not None
        assert prepared.factor is not None
        working[:, prepared.dead] = 0
        solution, mask = sweep(working, prepared.factor, sparsity, self.block_size, held)
        return finish(weight, solution, mask, prepared)


def sweep(
    weight: Tensor, factor: Tensor, sparsity: Sparsity, block_size: int = 128, held: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the mask and update what stays, from the first input to the last.

    Args:
        weight: (out, in).
        factor: (in, in) upper triangular, R^T R = H^-1; same dtype and device.
        sparsity: what goes; M divides `in`.
        block_size: columns between two updates of all columns to the right.
        held: (out, in) bool, False for weights that are gone already: they go again, and count.

    Returns:
        The new weight (out, in), 0 where removed, and the mask (out, in) bool, True for kept.
    """
    rows, columns = weight.shape
    if sparsity.m is not None:
        block_size = -(-block_size // sparsity.m) * sparsity.m
    work = weight.T.contiguous()
    mask = torch.empty_like(work, dtype=torch.bool)
    there = None if held is None else held.T.contiguous()
    gone = 0 if held is None else rows * columns - int(held.sum())
    missing = max(0, sparsity.removed(rows * columns) - gone)
    before = 0  # weights of earlier blocks that were there
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        # Rounded at the ends of blocks, so that the counts of all blocks add up to that of the whole.
        count = sparsity.removed(rows * end) - sparsity.removed(rows * start)
        block = work[start:end]
        mine = None if there is None else there[start:end]
        if mine is not None:
            share, alive = missing / max(1, rows * columns - gone), int(mine.sum())
            count = mine.numel() - alive + round(share * (before + alive)) - round(share * before)
            before += alive
        error = _sweep_block(block, mask[start:end], factor[start:end, start:end], sparsity, count=count, held=mine)
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].T, error, alpha=-1)
    return work.mul_(mask).T.contiguous(), mask.T.contiguous()


def _sweep_block(
    block: Tensor, mask: Tensor, factor: Tensor, sparsity: Sparsity, *, count: int, held: Tensor | None
) -> Tensor:
    """Solve one block in place: block, mask (columns, out), factor (columns, columns) -> errors (columns, out)."""
    columns = block.shape[0]
    by_column = factor.T.contiguous()
    inverse_diagonal = by_column.diagonal().reciprocal()[:, None]
    error = torch.empty_like(block)
    strip = _STRIP if sparsity.m is None else sparsity.m
    if sparsity.m is None:
        scores = (block * inverse_diagonal).square_()
        removed = lowest(scores if held is None else scores.masked_fill_(~held, -1.0), count)
        torch.logical_not(removed, out=mask)
        weighted = removed * inverse_diagonal
    else:
        weighted = torch.empty_like(block)
    for first in range(0, columns, strip):
        last = min(first + strip, columns)
        current = block[first:last]
        if first:
            current.addmm_(by_column[first:last, :first], error[:first], alpha=-1)
        if sparsity.n is not None:
            scores = (current * inverse_diagonal[first:last]).square_()
            if held is None:
                mask[first:last] = keep_of_group(scores, sparsity.n)
            else:
                there = held[first:last]
                mask[first:last] = keep_of_group(scores.masked_fill_(~there, -1.0), sparsity.n) & there
            torch.mul(~mask[first:last], inverse_diagonal[first:last], out=weighted[first:last])
        torch.mul(block[first], weighted[first], out=error[first])
        for i in range(first + 1, last):
            block[i].addmv_(error[first:i].T, by_column[i, first:i], alpha=-1)
            torch.mul(block[i], weighted[i], out=error[i])
    return error


class SparseGpt(SparsePass):
    """Prune weights with SparseGPT (see `fxprune.weights.base` for the options that all these passes share).

    Args:
        damping: share of the Hessian's diagonal that is added to it; it grows when a factorisation fails.
        damping_rule: share of the diagonal's `mean` (the paper's), its `median`, or each `channel`'s own entry.
        block_size: columns whose mask is chosen together.
        **options: see `SparsePass`.
    """

    name = "sparsegpt"

    def __init__(
        self,
        *,
        damping: float = 0.01,
        damping_rule: DampingRule = "mean",
        block_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.damping = damping
        self.damping_rule: DampingRule = damping_rule
        self.block_size = block_size
        self.solver()

    def solver(self) -> SparseGptSolver:
        """The solver for these options."""
        return SparseGptSolver(block_size=self.block_size, damping=Damping(self.damping, self.damping_rule))
