"""Scores of units, from scores of what their consumers read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.calibration.activations import collect_statistics
from fxprune.core.progress import track

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fxprune.calibration.activations import ChannelStatistics
    from fxprune.core.groups import Group
    from fxprune.structured.case import Case

__all__ = ["consumer_names", "consumer_statistics", "consumer_weights", "per_group", "unit_sums"]


def consumer_names(groups: Sequence[Group]) -> list[str]:
    """Qualified names of the Linears that read units."""
    return [piece.parameter.removesuffix(".weight") for group in groups for piece in group.consumers]


def consumer_weights(case: Case) -> dict[str, Tensor]:
    """The (out, in) weight of each consumer, by name."""
    return {name: case.weight(name) for name in consumer_names(case.groups)}


def consumer_statistics(case: Case) -> dict[str, ChannelStatistics]:
    """Mean and variance of what each consumer reads on the calibration text, by name."""
    with track("calibrating", len(case.tokens)) as advance:
        return collect_statistics(
            case.program.graph_module,
            case.program.interface,
            consumer_names(case.groups),
            case.tokens,
            batch_size=case.batch_size or 4,
            on_batch=advance,
        )


def unit_sums(group: Group, of_inputs: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum over all channels of a unit in all its consumers, (units,).

    Args:
        group: heads or MLP channels.
        of_inputs: (in,) a figure for each input of each consumer, by name.
    """
    total = np.zeros(group.units)
    for piece in group.consumers:
        total += of_inputs[piece.parameter.removesuffix(".weight")][piece.indices].sum(1)
    return total


def per_group(group: Group, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores that compare within a group only, made to compare between groups: all of them add up to its parameters.

    A share of the scores then weighs as much as the same share of the parameters, in every group: none is preferred.

    Args:
        group: heads or MLP channels.
        scores: (units,), at least 0.
    """
    total = max(float(scores.sum()), np.finfo(np.float64).tiny)
    return scores * (group.parameters_removed(()) / total)
