"""Gram matrix: second moments of what a Linear reads, which is all that layer-wise pruning needs of the data.

For a Linear with inputs X (tokens, in) and weight W (out, in), the change of its output when W becomes W' is
||X (W - W')^T||_F^2 = tr((W - W') X^T X (W - W')^T), so X^T X stands for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxprune.core.errors import CalibrationError, NotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gram", "GramSum", "gram_of"]

_PANELS = 4
"""A Gram matrix is computed in so many panels of columns, each down to the diagonal only: 5/8 of the products."""


@dataclass(frozen=True)
class Gram:
    """Second moments of what a Linear reads.

    Attributes:
        matrix: (in, in) float32 or float64, symmetric: X^T X summed over all tokens, not divided by their number.
        tokens: rows of X.

    Raises:
        CalibrationError: the matrix is not square, or no token was seen.
    """

    matrix: Tensor
    tokens: int

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise CalibrationError(f"a Gram matrix is square, got shape {shape}; it is X^T X over (tokens, in) inputs")
        if self.tokens < 1:
            raise CalibrationError("a Gram matrix of no tokens says nothing; use more or longer calibration samples")

    @property
    def features(self) -> int:
        """How many inputs the Linear has."""
        return self.matrix.shape[0]

    def require_finite(self) -> None:
        """Check the numbers.

        Raises:
            CalibrationError: there are NaN or infinities, or a negative square on the diagonal.
        """
        if not bool(torch.isfinite(self.matrix).all()):
            raise NotFiniteError(
                f"the Gram matrix of {self.features} inputs over {self.tokens} tokens holds NaN or infinity; run the "
                "calibration in float32 or bfloat16, and look for activations that overflow"
            )
        if bool((self.matrix.diagonal() < 0).any()):
            raise CalibrationError(
                f"the Gram matrix of {self.features} inputs has a negative diagonal; it must be X^T X over all tokens"
            )

    def energy(self, weight: Tensor) -> float:
        """||X W^T||_F^2 of a weight (out, in) in the Gram's units; computed in the weight's dtype."""
        product = weight @ self.matrix.to(weight.device, weight.dtype)
        return float(product.mul_(weight).sum(dtype=torch.float64))


def gram_of(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Gram:
    """The Gram matrix of inputs (..., in), whose leading axes are tokens."""
    rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    return Gram(rows.T @ rows, rows.shape[0])


class GramSum:
    """A running XᵀX in float32, upper panels only until the end."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.matrix = torch.zeros(width, width, device=device)
        self.tokens = 0
        step = max(128, -(-width // _PANELS))
        self.panels = [(start, min(start + step, width)) for start in range(0, width, step)]

    def add(self, x: Tensor) -> None:
        """Add rows (tokens, width), float32."""
        self.tokens += len(x)
        for start, end in self.panels:
            self.matrix[:end, start:end].addmm_(x[:, :end].t(), x[:, start:end])

    def result(self) -> Gram | None:
        """The matrix, once; None when no row came."""
        if not self.tokens:
            return None
        self.matrix.triu_()
        self.matrix.add_(self.matrix.triu(1).t())
        return Gram(self.matrix, self.tokens)
