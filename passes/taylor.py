"""Taylor: the units go whose weights matter least to the loss, to first order.

The score of a unit is the sum over its weights of |w dL/dw|, with L the next-token loss on the calibration text (Ma et
al. 2023, "LLM-Pruner: on the structural pruning of large language models", section 3.2, first order, by elements).
Rows of a KV head count in full for each of its query heads. One ranking over all layers; nothing makes up for what is
removed.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import score_curve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve

__all__ = ["Taylor"]


class Taylor(StructuredPass):
    """Remove the units of least |w dL/dw| (see the module's docstring). Options are those of `StructuredPass`."""

    name = "taylor"
    reads_loss: ClassVar[bool] = True

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Sums of scores; one backward pass."""
        signals = case.loss_signals(case.tokens, grams=False, taylor=True)
        found = {}
        for group in case.groups:
            scores = signals[group.name].taylor
            assert scores is not None
            found[group.name] = score_curve(group, scores.cpu().numpy(), case.limits[group.name])
        return found
