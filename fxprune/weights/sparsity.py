"""Sparsity: what share of a Linear's weights goes, unstructured or N:M, and which ones go given their scores.

N of N:M is the number *kept* of every M consecutive weights along the input axis, as hardware says it: 2:4 keeps two of
four.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.core.errors import PlanError, UsageError
from fxprune.core.pipeline import sexagesimal_hint

__all__ = ["Sparsity", "keep_largest", "keep_of_group", "lowest", "lowest_per_row"]

_IN_NUMPY = ("cpu",)
"""Types of devices whose memory numpy can read."""


@dataclass(frozen=True)
class Sparsity:
    """What share of a weight goes.

    Attributes:
        share: of the weights that are removed, in [0, 1).
        n: how many are kept of every `m` along the input axis; None for unstructured sparsity.
        m: the length of a group; None for unstructured sparsity.

    Raises:
        UsageError: a value is out of range, or `share` is not 1 - n/m.
    """

    share: float
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if (self.n is None) != (self.m is None):
            raise UsageError("an N:M pattern needs both N and M, or neither")
        if self.n is not None and self.m is not None and not 0 < self.n < self.m:
            raise UsageError(f"pattern {self.n}:{self.m} keeps N of every M weights; it needs 0 < N < M")
        if not (math.isfinite(self.share) and 0 <= self.share < 1):
            raise UsageError(f"sparsity must be at least 0 and less than 1, got {self.share}")
        if self.n is not None and self.m is not None and not math.isclose(self.share, 1 - self.n / self.m):
            raise UsageError(
                f"pattern {self.n}:{self.m} removes {1 - self.n / self.m:g} of the weights, not {self.share}"
            )

    @classmethod
    def pattern(cls, n: int, m: int) -> Sparsity:
        """Keep `n` of every `m`."""
        return cls(1 - n / m if m else 0.0, n, m)

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """Read `"2:4"` (keep two of four) or `"0.5"` (remove half).

        Raises:
            UsageError: the text is neither, or out of range.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, re.ASCII)
        if found:
            return cls.pattern(int(found[1]), int(found[2]))
        try:
            share = float(text)
        except ValueError as error:
            raise UsageError(f"sparsity {text!r} is neither a share such as 0.5 nor a pattern such as 2:4") from error
        if share.is_integer() and (hint := sexagesimal_hint(int(share))):
            raise UsageError(f"sparsity {text} is not less than 1; {hint}")
        return cls(share)

    def describe(self) -> str:
        """`2:4`, or `0.5`."""
        return f"{self.share:g}" if self.n is None else f"{self.n}:{self.m}"

    def check(self, in_features: int, name: str) -> None:
        """Check that a Linear can have this sparsity.

        Raises:
            PlanError: M does not divide the number of its inputs.
        """
        if self.m is not None and in_features % self.m:
            raise PlanError(
                f"{name} has {in_features} inputs, which cannot be cut into groups of {self.m} for the pattern "
                f"{self.describe()}; leave this Linear out, or choose an M that divides {in_features}"
            )

    def removed(self, weights: int) -> int:
        """How many of a number of weights go."""
        return round(self.share * weights)


def keep_largest(scores: Tensor, sparsity: Sparsity, *, per_row: bool = False, held: Tensor | None = None) -> Tensor:
    """Which weights stay: those of the largest scores.

    Args:
        scores: (out, in) float32 or float64, finite.
        sparsity: what goes. An N:M pattern compares within each group.
        per_row: an unstructured share is taken of each row instead of the whole.
        held: (out, in) bool, False for weights that are gone already: they count as removed and stay it. Where more
            are gone than the sparsity asks for, nothing else goes.

    Returns:
        (out, in) bool, True for kept. Ties go by position, so the same scores always give the same mask.
    """
    if held is not None:
        lowest_first = torch.where(held, scores, scores.new_full((), -torch.inf))
        if per_row and sparsity.n is None:
            return held & ~_more_per_row(lowest_first, held, sparsity)
        return held & keep_largest(lowest_first, sparsity, per_row=per_row)
    if sparsity.n is not None and sparsity.m is not None:
        rows, columns = scores.shape
        groups = scores.reshape(rows, columns // sparsity.m, sparsity.m).permute(2, 0, 1).contiguous()
        return keep_of_group(groups, sparsity.n).permute(1, 2, 0).reshape(rows, columns)
    if per_row:
        return ~lowest_per_row(scores, sparsity.removed(scores.shape[1]))
    return ~lowest(scores, sparsity.removed(scores.numel()))


def _more_per_row(scores: Tensor, held: Tensor, sparsity: Sparsity) -> Tensor:
    """The lowest of each row, as many more than are gone as make up the share of the whole; rows may differ in both."""
    gone = held.shape[1] - held.sum(1)
    missing = max(0, sparsity.removed(scores.numel()) - int(gone.sum()))
    share = missing / max(1, int(held.sum()))
    counts = gone + (share * (held.shape[1] - gone)).round().to(gone.dtype)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < counts[:, None]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Exactly `count` lowest scores of a tensor of any shape, as a bool mask; the first of equal ones."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores.reshape(1, -1), count)[0]
    flat = scores.reshape(-1)
    found = flat <= threshold
    surplus = int(found.sum()) - count
    if surplus:
        ties = (flat == threshold).nonzero()[:, 0]
        found[ties[len(ties) - surplus :]] = False
    return found.view(scores.shape)


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Exactly `count` lowest scores of every row of (rows, columns), as a bool mask; the first of equal ones."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)[:, None]
    found = scores <= threshold
    surplus = found.sum(1, keepdim=True) - count
    if bool((surplus > 0).any()):
        ties = scores == threshold
        allowed = ties.sum(1, keepdim=True) - surplus
        found &= ~ties | (ties.cumsum(1) <= allowed)
    return found


def _kth_smallest(rows: Tensor, count: int) -> Tensor:
    """The `count`-th smallest number of each row: (rows, columns) -> (rows,)."""
    if rows.device.type in _IN_NUMPY:
        # numpy selects with vector instructions, an order of magnitude faster than torch on the CPU.
        values = np.partition(rows.detach().numpy(), count - 1, axis=1)[:, count - 1]
        return torch.from_numpy(values.copy())
    # Not kthvalue: accelerators select in each row with one block of threads, and a whole weight is one row.
    return rows.sort(dim=1).values[:, count - 1]


def keep_of_group(scores: Tensor, n: int) -> Tensor:
    """The `n` largest along the first axis, the first of equal ones: scores (m, ...) -> bool (m, ...).

    Ranks come from comparing all pairs, which beats sorting or selecting in many rows of a few numbers.
    """
    m = scores.shape[0]
    rank = torch.arange(m, dtype=torch.int16, device=scores.device).view(m, *[1] * (scores.dim() - 1))
    rank = rank.expand_as(scores).contiguous()
    for i in range(m - 1):
        larger = (scores[i + 1 :] > scores[i]).view(torch.int8)
        rank[i] += larger.sum(0, dtype=torch.int16)
        rank[i + 1 :] -= larger
    return rank < n
