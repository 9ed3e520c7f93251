"""Gram matrices of what Linears read in a model as it is: one pass over the calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.calibration.engine import CalibrationEngine, EngineOptions, text_samples
from fxprune.calibration.stages import cut_stages
from fxprune.core.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    from fxprune.calibration.engine import SiteStatistics
    from fxprune.calibration.gram import Gram
    from fxprune.calibration.stages import Stage
    from fxprune.core.program import Program

__all__ = ["input_grams"]


def input_grams(
    program: Program,
    linears: Sequence[str],
    tokens: Tensor,
    take: Callable[[Mapping[str, Gram]], None],
    *,
    title: str,
    forward_dtype: torch.dtype | None,
    batch_size: int | None,
) -> None:
    """Hand out X^T X of what Linears read, as soon as a stage of the graph has run.

    Who takes them decides how many are in memory at once.

    Args:
        program: it is left as it is.
        linears: names of ordinary Linears.
        tokens: (samples, length) int64 calibration text.
        take: gets the Gram matrices of a stage's Linears, by name; those that read one value share one.
        title: of the progress.
        forward_dtype: precision of the forward passes' products.
        batch_size: samples at once; None to find it.

    Raises:
        CalibrationError: activations are not finite.
    """
    samples = text_samples(program.interface, tokens)
    cut = cut_stages(program.graph_module, linears, samples.varying)

    def hand_out(stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        del stage
        found: dict[str, Gram] = {}
        for one in statistics:
            (gram,) = one.grams
            assert gram is not None
            found.update(dict.fromkeys(one.site.linears, gram))
        take(found)

    options = EngineOptions(forward_dtype=forward_dtype, batch_size=batch_size)
    with track(title, len(cut.stages)) as advance:
        CalibrationEngine(cut, samples, options).run(hand_out, on_stage=advance)
