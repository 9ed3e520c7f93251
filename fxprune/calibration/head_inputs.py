"""What the lm_head of a program reads: the states that predictions are made from, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxprune.calibration.engine import CalibrationEngine, EngineOptions, SiteStatistics, text_samples
from fxprune.calibration.loss_head import LossHead
from fxprune.calibration.stages import cut_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fxprune.calibration.stages import InputSite, Stage
    from fxprune.core.program import Program

__all__ = ["head_inputs"]


class _Rows:
    """Keeps what one projection reads, sample by sample (an engine's `Collector`)."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.parts: list[Tensor] = []

    def add(self, site: InputSite, rows: Tensor, dense: Tensor | None, offsets: Tensor | None, first: int) -> None:
        """Take one batch; see `fxprune.calibration.engine.Collector`."""
        del site, dense, offsets, first
        self.parts.append(rows.reshape(-1, self.length, rows.shape[-1]))

    def finish(self) -> list[SiteStatistics]:
        """Nothing is left to solve."""
        return []


def head_inputs(
    program: Program, tokens: Tensor, *, forward_dtype: torch.dtype | None = None, batch_size: int | None = None
) -> Tensor:
    """What the lm_head of a program reads, (samples, length, hidden) float32.

    Args:
        program: a causal language model.
        tokens: (samples, length) int64.
        forward_dtype: precision of the products; None for the graph's own.
        batch_size: samples at once; None to find it.

    Raises:
        PreconditionError: the program gives no logits (see `fxprune.calibration.loss_head.LossHead`).
        CalibrationError: activations are not finite.
    """
    samples = text_samples(program.interface, tokens)
    cut = cut_stages(program.graph_module, [LossHead(program).name], samples.varying)
    rows = _Rows(tokens.shape[1])
    options = EngineOptions(forward_dtype=forward_dtype, batch_size=batch_size)

    def nothing(stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        del stage, statistics

    CalibrationEngine(cut, samples, options, collector=lambda: rows).run(nothing)
    return torch.cat(rows.parts)
