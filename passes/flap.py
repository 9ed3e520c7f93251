"""FLAP: the units go whose channels fluctuate least, and what they add on average becomes a bias.

A channel's score is the variance that it contributes to the output of its consumer, fluctuation times squared weight
norm, standardised over the consumer's channels so that layers compare (An et al. 2024, "Fluctuation-based adaptive
structured pruning for large language models", sections 3.2 and 3.3). A unit scores the mean of its channels, a KV head
as much as the best of its query heads. What a removed channel contributes on average is put back as a bias of the
consumer (section 3.4), so only the fluctuation is lost.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fxprune.core.groups import AttentionGroup
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import head_curve, score_curve
from fxprune.structured.unit_scores import consumer_statistics, consumer_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from fxprune.calibration.activations import ChannelStatistics
    from fxprune.core.groups import Group
    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve, Limits
    from fxprune.structured.reconstruction import Reconstruction

__all__ = ["Flap", "fluctuation_curve", "unit_scores"]


def unit_scores(
    group: Group, weights: Mapping[str, Tensor], statistics: Mapping[str, ChannelStatistics]
) -> NDArray[np.float64]:
    """Standardised fluctuation of each unit, the mean over its channels.

    Args:
        group: the group.
        weights: weight (out, in) of each consumer.
        statistics: moments of what each consumer reads.

    Returns:
        (units,) float64; 0 is an average channel of its consumer, 1 is one standard deviation above.
    """
    total = np.zeros(group.units)
    for piece in group.consumers:
        name = piece.parameter.removesuffix(".weight")
        moments = statistics[name]
        energy = (moments.variance * weights[name].double().square().sum(0).to(moments.variance.device)).cpu().numpy()
        spread = max(float(energy.std()), np.finfo(np.float64).tiny)
        total += ((energy - energy.mean()) / spread)[piece.indices].mean(1)
    return total / len(group.consumers)


def fluctuation_curve(group: Group, scores: NDArray[np.float64], limits: Limits) -> Curve:
    """The curve of units whose scores are damage per parameter: the loss of a level is score times parameters.

    Args:
        group: heads or MLP channels.
        scores: (units,), at least 0.
        limits: what must stay.
    """
    if not isinstance(group, AttentionGroup):
        return score_curve(group, scores * group.unit_parameters, limits)

    def loss_of(kept: tuple[int, ...]) -> float:
        left, sets = set(kept), set(group.kv_kept(kept))
        loss = 0.0
        for kv in range(group.kv_heads):
            heads = group.heads_of(kv)
            gone = [head for head in heads if head not in left]
            if kv in sets:
                loss += float(scores[gone].sum()) * group.unit_parameters
            else:  # it goes only when all its query heads do, so it is worth as much as the best of them
                loss += float(scores[heads].max()) * (len(heads) * group.unit_parameters + group.shared_parameters)
        return loss

    return head_curve(group, loss_of, scores, limits, worth=np.max)


class Flap(StructuredPass):
    """Remove the units that fluctuate least, by one ranking over all layers (see the module's docstring).

    Options are those of `StructuredPass`.
    """

    name = "flap"
    reconstruction: ClassVar[Reconstruction] = "bias"

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Damage per parameter, counted from that of the least of all units."""
        weights, statistics = consumer_weights(case), consumer_statistics(case)
        scores = {group.name: unit_scores(group, weights, statistics) for group in case.groups}
        # Standardised scores may be negative. One constant for all changes no ranking: every parameter costs the same.
        least = min(float(values.min()) for values in scores.values())
        return {
            group.name: fluctuation_curve(group, scores[group.name] - least, case.limits[group.name])
            for group in case.groups
        }
