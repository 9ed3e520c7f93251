"""Paired tests: does one form of a model differ from another on the very same windows or documents?

Two forms are measured on the same items, so what is hard for one is hard for the other; the differences item by item
vary far less than the figures themselves. Which test is used follows from what an item contributes (`TESTS`).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["TESTS", "PairedTest", "approximate_randomization", "holm", "mcnemar", "paired_t", "paired_test"]

TESTS = {
    "paired t": (
        "paired t test of the mean difference (Student 1908; for evaluations: Miller 2024, Adding Error Bars to Evals, "
        "section 4); windows of one text count as independent"
    ),
    "exact McNemar": (
        "exact McNemar test: a binomial test of the documents that only one of the two gets right (McNemar 1947; "
        "Dror et al. 2018, The Hitchhiker's Guide to Testing Statistical Significance in NLP); the standard error "
        "is that of the paired difference"
    ),
    "approximate randomization": (
        "approximate randomization test: the two forms' items are swapped at random, 999 times (Noreen 1989; Riezler "
        "and Maxwell 2005); standard error and interval from 1000 paired bootstrap resamples (Efron and Tibshirani "
        "1993; Koehn 2004)"
    ),
}
"""The tests by name: what they do and where they come from."""

_RESAMPLES = 1000
_SWAPS = 999
_LEVEL = 0.95


@dataclass(frozen=True)
class PairedTest:
    """A difference on the same items.

    Attributes:
        difference: the other form's figure less the first form's.
        standard_error: of the difference.
        ci: its 95% confidence interval.
        p: two-sided probability of a difference at least as large if the forms were alike.
        test: a name in `TESTS`.
        pairs: number of items.
        gained: for `exact McNemar`, the items that only the other form answers correctly.
        lost: for `exact McNemar`, the items that only the first form answers correctly.
    """

    difference: float
    standard_error: float
    ci: tuple[float, float]
    p: float
    test: str
    pairs: int
    gained: int | None = None
    lost: int | None = None


def paired_test(
    first: Sequence[Any], other: Sequence[Any], aggregate: Callable[[Sequence[Any]], Any] | None = None
) -> PairedTest | None:
    """The test that fits the items: McNemar for right or wrong, t for other means, randomization for the rest.

    Args:
        first: what each item contributes to the first form's figure.
        other: the same of the other form, in the same order.
        aggregate: from items to the figure; None for the mean.

    Returns:
        None for fewer than two items, and where an item or the figure is not finite: nothing can be tested then.

    Raises:
        ValueError: the forms have different numbers of items.
    """
    if len(first) != len(other):
        raise ValueError(f"{len(first)} and {len(other)} items are no pairs")
    if len(first) < 2:
        return None
    if aggregate is not None:
        if not all(math.isfinite(float(aggregate(items))) for items in (first, other)):
            return None
        test = approximate_randomization(first, other, aggregate)
        return test if math.isfinite(test.standard_error) else None
    if not all(isinstance(item, Real) and math.isfinite(item) for item in (*first, *other)):
        return None
    if all(item in {0, 1} for item in (*first, *other)):
        return mcnemar(first, other)
    return paired_t(first, other)


def paired_t(first: Sequence[float], other: Sequence[float]) -> PairedTest:
    """Paired t test of the mean of `other - first`, with its t interval; at least two pairs."""
    differences = [float(b) - float(a) for a, b in zip(first, other, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    error = statistics.stdev(differences) / math.sqrt(count)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * error
    alike = 1.0 if mean == 0 else 0.0  # where all differences are the same number
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else alike
    return PairedTest(mean, error, (mean - half, mean + half), p, "paired t", count)


def mcnemar(first: Sequence[float], other: Sequence[float]) -> PairedTest:
    """Exact McNemar test of two forms' right (1) and wrong (0) answers; at least two pairs."""
    gained = sum(b > a for a, b in zip(first, other, strict=True))
    lost = sum(b < a for a, b in zip(first, other, strict=True))
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    spread = paired_t(first, other)
    return PairedTest(spread.difference, spread.standard_error, spread.ci, p, "exact McNemar", len(first), gained, lost)


def approximate_randomization(
    first: Sequence[Any], other: Sequence[Any], aggregate: Callable[[Sequence[Any]], Any], *, seed: int = 0
) -> PairedTest:
    """Approximate randomization test of any aggregate, with a paired bootstrap for error and interval.

    Args:
        first: items of the first form.
        other: items of the other form, in the same order.
        aggregate: from items to the figure.
        seed: of the swaps and the resamples.
    """
    random = np.random.default_rng(seed)
    count = len(first)
    difference = float(aggregate(other)) - float(aggregate(first))
    drawn = []
    for _ in range(_RESAMPLES):
        chosen = random.integers(count, size=count).tolist()
        drawn.append(float(aggregate([other[i] for i in chosen])) - float(aggregate([first[i] for i in chosen])))
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    as_large = 0
    for _ in range(_SWAPS):
        swap = random.integers(2, size=count).astype(bool).tolist()
        left = [b if s else a for a, b, s in zip(first, other, swap, strict=True)]
        right = [a if s else b for a, b, s in zip(first, other, swap, strict=True)]
        # Sums in another order may differ in the last digit; equal figures must count as equal.
        as_large += abs(float(aggregate(right)) - float(aggregate(left))) >= abs(difference) * (1 - 1e-9)
    p = (1 + as_large) / (1 + _SWAPS)
    error = float(np.std(drawn, ddof=1))
    return PairedTest(difference, error, (float(low), float(high)), p, "approximate randomization", count)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979): the chance of even one false alarm stays below the level.

    Args:
        values: p values, in any order.

    Returns:
        The corrected values in the same order.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected
