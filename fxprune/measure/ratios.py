"""Speed-ups from paired times: one figure, how well it is known, and when to stop timing.

Runs of two forms alternate, so entry i of both lists of times saw the same machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Precision", "mean_ratio", "ratio_draws", "ratio_interval", "uncertainty"]

_RESAMPLES = 2000
_TRIMMED = 0.2
"""Share of the pairs left out at each end. On a shared machine whose times scatter by 10% (quartiles of 80 pairs, dense
and slim correlated by 0.73) the interval is 1.7% to each side, where that of the ratio of the medians is 2.7%."""


@dataclass(frozen=True)
class Precision:
    """How well a speed-up is to be known.

    When to stop follows from the width of the interval alone and never from where it lies, so that whoever judges the
    speed-up cannot be helped by it (a sequential interval of fixed width: Chow and Robbins 1965).

    Attributes:
        share: `uncertainty` to go on until.
        most: timed repeats of each form after which it ends in any case.
    """

    share: float
    most: int

    def reached(self, times: Sequence[Sequence[float]]) -> bool:
        """Whether all speed-ups over the first form are known so well."""
        return all(uncertainty(times[0], other) <= self.share for other in times[1:])


def uncertainty(dense: Sequence[float], slim: Sequence[float]) -> float:
    """Half the 95% interval of the speed-up as a share of it (see `ratio_interval`)."""
    low, high = ratio_interval(dense, slim)
    return (high - low) / (high + low)


def mean_ratio(dense: Sequence[float], slim: Sequence[float]) -> float:
    """Geometric mean of dense / slim over the pairs, without the fifth of them with the lowest and the highest ratio.

    The two runs of a pair saw the same machine, so a ratio scatters less than either time; what disturbed one run alone
    is left out, as a median would.

    Args:
        dense: positive times, one per repeat.
        slim: as many, paired with them.
    """
    return float(_trimmed(np.log(dense) - np.log(slim)))


def _trimmed(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The trimmed mean over the last axis, back from logarithms."""
    left_out = int(_TRIMMED * logarithms.shape[-1])
    ordered = np.sort(logarithms, axis=-1)[..., left_out : logarithms.shape[-1] - left_out]
    found: NDArray[np.float64] = np.exp(ordered.mean(axis=-1))
    return found


def ratio_draws(dense: Sequence[float], slim: Sequence[float], *, seed: int = 0) -> NDArray[np.float64]:
    """`mean_ratio` of bootstrap samples of the pairs, (draws,)."""
    logarithms = np.log(dense) - np.log(slim)
    drawn = np.random.default_rng(seed).integers(len(logarithms), size=(_RESAMPLES, len(logarithms)))
    return _trimmed(logarithms[drawn])


def ratio_interval(
    dense: Sequence[float], slim: Sequence[float], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of `mean_ratio`; it always holds the ratio of the samples themselves.

    Args:
        dense: positive times, one per repeat.
        slim: as many, paired with them.
        seed: of the resampling.
        level: confidence level between 0 and 1.
    """
    low, high = np.quantile(ratio_draws(dense, slim, seed=seed), [(1 - level) / 2, (1 + level) / 2])
    ratio = mean_ratio(dense, slim)
    return min(float(low), ratio), max(float(high), ratio)
