"""Structured magnitude: the units go whose weights are smallest, without looking at any data.

The score of a unit is the squared L2 norm of all weights that go with it (group norms; Li et al. 2017, "Pruning filters
for efficient convnets", with the norm of LLM-Pruner's baseline), rows of a KV head counted once, when the last of its
query heads goes. One ranking over all layers; nothing makes up for what is removed.

Graph and refusals are those of `fxprune.structured.base`; no text is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fxprune.core.groups import AttentionGroup
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import head_curve, score_curve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fxprune.core.groups import Group, UnitSlice
    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve, Limits

__all__ = ["MagnitudeUnits", "norm_curve", "squared_norms"]


def squared_norms(pieces: Sequence[UnitSlice], tensors: Mapping[str, Tensor], units: int) -> NDArray[np.float64]:
    """The squared L2 norm of what each unit owns, (units,)."""
    total = np.zeros(units)
    for piece in pieces:
        weight = tensors[piece.parameter].detach()
        others = [axis for axis in range(weight.dim()) if axis != piece.axis]
        squares = weight.double().square()
        along = squares.sum(others) if others else squares
        total += along.cpu().numpy()[piece.indices].sum(1)
    return total


def norm_curve(group: Group, tensors: Mapping[str, Tensor], limits: Limits) -> Curve:
    """The curve of a group: the loss of a level is the squared norm of all weights that go."""
    own = squared_norms(group.slices, tensors, group.units)
    if not isinstance(group, AttentionGroup) or group.sharing is None:
        return score_curve(group, own, limits)
    shared = squared_norms(group.shared, tensors, group.kv_heads)
    whole = own.sum() + shared.sum()
    ranked = own + shared[group.sharing] / np.bincount(group.sharing)[group.sharing]
    return head_curve(
        group, lambda kept: float(whole - own[list(kept)].sum() - shared[group.kv_kept(kept)].sum()), ranked, limits
    )


class MagnitudeUnits(StructuredPass):
    """Remove the units of least squared norm (see the module's docstring). Options are those of `StructuredPass`."""

    name = "magnitude-units"
    needs_data: ClassVar[bool] = False

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Squared norms."""
        tensors = case.program.graph_module.state_dict(keep_vars=True)
        return {group.name: norm_curve(group, tensors, case.limits[group.name]) for group in case.groups}
