"""Random: units go by lot, the same share of every layer. What every other method must beat.

Graph and refusals are those of `fxprune.structured.base`; no text is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import score_curve
from fxprune.structured.unit_scores import per_group

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve

__all__ = ["RandomUnits"]


class RandomUnits(StructuredPass):
    """Remove units by lot, drawn from the seed. Options are those of `StructuredPass`."""

    name = "random"
    own_uniform: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Scores drawn from [0, 1)."""
        random = np.random.default_rng(case.seed)
        return {
            group.name: score_curve(group, per_group(group, random.random(group.units)), case.limits[group.name])
            for group in case.groups
        }
