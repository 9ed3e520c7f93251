"""Wanda: prune by |W_ij| * ||X_j||, compared within each output row (Sun et al. 2023, arXiv 2306.11695, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxprune.weights.base import SparsePass
from fxprune.weights.solvers import Prepared, Solved, finish, require_gram, working_weight
from fxprune.weights.sparsity import keep_largest

if TYPE_CHECKING:
    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.weights.sparsity import Sparsity

__all__ = ["Wanda", "WandaSolver"]


class WandaSolver:
    """Keeps the weights of largest |W_ij| * ||X_j||_2 of each row, or of each group of an N:M pattern.

    Weights are not updated. An unstructured share is rounded to whole weights of a row.
    """

    name = "wanda"

    def prepare(self, gram: Gram | None) -> Prepared:
        """Check the Gram.

        Raises:
            CalibrationError: there is none, or it holds NaN or infinity.
        """
        gram = require_gram(gram, self.name)
        dead = gram.matrix.diagonal() == 0
        notes = {"dead_inputs": int(dead.sum())} if bool(dead.any()) else {}
        return Prepared(gram, dead, notes=notes)

    def solve(self, weight: Tensor, prepared: Prepared, sparsity: Sparsity, held: Tensor | None = None) -> Solved:
        """Prune a weight (out, in); see `fxprune.weights.solvers.Solver`."""
        working = working_weight(weight, prepared, sparsity, torch.float32)
        assert prepared.gram is not None
        norms = prepared.gram.matrix.diagonal().to(working.device).sqrt().to(working.dtype)
        mask = keep_largest(working.abs() * norms, sparsity, per_row=True, held=held)
        return finish(weight, working, mask, prepared)


class Wanda(SparsePass):
    """Prune weights with Wanda (see `fxprune.weights.base` for graph, options and refusals)."""

    name = "wanda"

    def solver(self) -> WandaSolver:
        """The solver."""
        return WandaSolver()
