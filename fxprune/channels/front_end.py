"""The front end: a module is traced, its projections are lifted, and what can be pruned is located.

module ── trace ── lift_linears ── locate_attention, _mlp, _hidden, _experts, _layers ──► a program with groups
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program
    from fxprune.core.stopwatch import Stopwatch
    from fxprune.models.loading import LoadedModel

__all__ = ["LOCATE", "front_end", "located"]


LOCATE = (
    "lift_linears",
    "locate_attention",
    "locate_mlp",
    "locate_hidden",
    "locate_experts",
    "locate_layers",
)


def front_end(loaded: LoadedModel, watch: Stopwatch, step: Pass | None = None, *, hold_zeros: bool = False) -> Program:
    """Trace a loaded model, lift its projections and locate what can be pruned.

    Args:
        loaded: the model; masks of pruned weights that its checkpoint has are held.
        watch: gets the seconds of tracing.
        step: the pass that will prune it; a graph that holds for one length gets the length of its calibration samples.
        hold_zeros: whether zeros without a mask are held too (see `fxprune.passes.lift_linears`).
    """
    # Only passes that read calibration text have a length of its samples.
    length = getattr(step, "seq_len", None) if step is not None and step.reads_text else None
    with watch.stage("trace"):
        program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path, length=length)
    return located(program, hold_zeros=hold_zeros)


def located(program: Program, *, hold_zeros: bool = False) -> Program:
    """A traced program, lifted, with its groups; `hold_zeros` as for `front_end`."""
    options = {"lift_linears": {"hold_zeros": hold_zeros}}
    return Pipeline([build_pass(name, options.get(name, {})) for name in LOCATE])(program).program
