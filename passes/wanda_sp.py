"""Wanda-sp: the units go whose weights, times the norm of what they read, are smallest in sum.

The score of a weight is |W_ij| ||X_j||_2 (Sun et al. 2024, "A simple and effective pruning approach for large language
models"), that of a unit the sum over its columns of the consumer, and the same share of every layer goes (the baseline
Wanda-sp of An et al. 2024, "FLAP", section 4.1). Nothing makes up for what is removed.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import score_curve
from fxprune.structured.unit_scores import consumer_statistics, consumer_weights, per_group, unit_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fxprune.calibration.activations import ChannelStatistics
    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve

__all__ = ["WandaSp", "input_scores"]


def input_scores(weight: Tensor, statistics: ChannelStatistics) -> NDArray[np.float64]:
    """The sum of |W_ij| times the root mean square of x_j over each input's column, (in,).

    Args:
        weight: (out, in).
        statistics: moments of what is read; the norm is their root mean square, up to the number of tokens.
    """
    norms = (statistics.variance + statistics.mean.square()).sqrt()
    scores: NDArray[np.float64] = (weight.double().abs().sum(0) * norms.to(weight.device)).cpu().numpy()
    return scores


class WandaSp(StructuredPass):
    """Remove the same share of every layer, by Wanda's scores (see the module's docstring).

    Scores compare within a group; between heads and channels they count by the share of the group's sum that goes.
    Options are those of `StructuredPass`.
    """

    name = "wanda-sp"
    own_uniform: ClassVar[bool] = True

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Sums of scores."""
        statistics = consumer_statistics(case)
        scores = {name: input_scores(weight, statistics[name]) for name, weight in consumer_weights(case).items()}
        return {
            group.name: score_curve(group, per_group(group, unit_sums(group, scores)), case.limits[group.name])
            for group in case.groups
        }
