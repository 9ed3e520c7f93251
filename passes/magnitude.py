"""Magnitude pruning of weights: the smallest go, without looking at any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from fxprune.weights.base import SparsePass
from fxprune.weights.solvers import Prepared, Solved, finish, working_weight
from fxprune.weights.sparsity import keep_largest

if TYPE_CHECKING:
    from torch import Tensor

    from fxprune.calibration.gram import Gram
    from fxprune.weights.sparsity import Sparsity

__all__ = ["Magnitude", "MagnitudeSolver"]


class MagnitudeSolver:
    """Keeps the weights of largest |W|: over the whole Linear, or within each group of an N:M pattern."""

    name = "magnitude"

    def prepare(self, gram: Gram | None) -> Prepared:
        """Nothing is needed; a Gram, if there is one, serves to measure the error.

        Raises:
            CalibrationError: the Gram holds NaN or infinity.
        """
        if gram is not None:
            gram.require_finite()
        return Prepared(gram)

    def solve(self, weight: Tensor, prepared: Prepared, sparsity: Sparsity, held: Tensor | None = None) -> Solved:
        """Prune a weight (out, in); see `fxprune.weights.solvers.Solver`."""
        working = working_weight(weight, prepared, sparsity, torch.float32)
        return finish(weight, working, keep_largest(working.abs(), sparsity, held=held), prepared)


class Magnitude(SparsePass):
    """Prune the smallest weights, with no text at all (see `fxprune.weights.base` for graph, options and refusals)."""

    name = "magnitude"
    needs_data: ClassVar[bool] = False

    def solver(self) -> MagnitudeSolver:
        """The solver."""
        return MagnitudeSolver()
