"""What `fxprune prune` does: load, trace, prune, verify, save and report; or stream a model that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import UsageError
from fxprune.core.output import prepare_output
from fxprune.core.pipeline import build_pass
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.assessment import Assessor, Wanted
from fxprune.flows.reporting import report_of
from fxprune.flows.streaming_run import prune_streaming
from fxprune.flows.workflow import perplexities, run_pruning
from fxprune.measure.sparse_speed import measure_sparse_speed
from fxprune.models.methods import check_method, class_of_model
from fxprune.models.savable import require_savable
from fxprune.structured.base import StructuredPass
from fxprune.weights.base import NO_SPEED_UP, SparsePass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program

__all__ = ["Destination", "check_model", "parse_per_module", "pass_of", "prune_model", "stream_model"]


@dataclass(frozen=True)
class Destination:
    """Where the work is done and where the result goes.

    Attributes:
        out: directory of the checkpoint.
        device: where the model runs.
        dtype: its precision; as saved when None.
        overwrite: whether an earlier output may be replaced.
        hold_zeros: whether zeros that no mask holds are held too, as another tool's pruning leaves them.
    """

    out: Path
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False
    hold_zeros: bool = False


def parse_per_module(texts: Sequence[str]) -> dict[str, str]:
    """Read `PATTERN=VALUE` options.

    Raises:
        UsageError: one has no `=`, or a pattern comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern or pattern in found:
            raise UsageError(f"--per-module {text!r}: give PATTERN=0.6, PATTERN=2:4 or PATTERN=dense, a pattern once")
        found[pattern] = value
    return found


_OF_UNITS = {"magnitude": "magnitude-units"}
"""Methods that take a size or speed target as well as a sparsity, and the pass that then does the work."""
_SIZE_TARGETS = ("ratio", "target_params", "target_macs", "target_bytes", "target_speedup")


def pass_of(method: str, options: Mapping[str, Any]) -> str:
    """The pass behind a method's name: a target of size or speed removes units, any other sets weights to zero."""
    return _OF_UNITS.get(method, method) if any(name in options for name in _SIZE_TARGETS) else method


def prune_model(
    model: str,
    method: str,
    options: Mapping[str, Any],
    place: Destination,
    *,
    wanted: Wanted | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune a model in memory.

    Args:
        model: hub id or directory.
        method: name of a pruning pass, or of a method that is one or the other by its target (see `pass_of`).
        options: its options.
        place: where.
        wanted: what to measure afterwards; the guard alone by default.
        say: gets progress messages.

    Returns:
        The report, as it is written beside the checkpoint.

    Raises:
        UsageError: an option is wrong, there are several targets, or the speed is to be measured off the CPU.
        FxpruneError: any step refused, or a rung of the verification failed.
    """
    method = pass_of(method, options)
    step = build_pass(method, options)  # a wrong option is told before the model is loaded
    wanted = wanted or Wanted()
    wanted.check(step, place.device)
    if isinstance(step, StructuredPass) and len(step.targets) > 1:
        raise UsageError(f"{method} has {len(step.targets)} targets; one checkpoint has one (see prune_budgets)")
    prepare_output(place.out, overwrite=place.overwrite, inputs=[model])
    check_model(model, step, wanted)
    watch = Stopwatch()
    say(f"loading {model}")
    with watch.stage("load"):
        loaded = load_model(model, dtype=place.dtype, device=place.device)
    say("tracing and locating")
    program = front_end(loaded, watch, step, hold_zeros=place.hold_zeros)
    require_savable(program.source)
    seed = int(options.get("seed", 0))
    if isinstance(step, SparsePass):
        return _prune_weights(program, step, place, wanted, seed=seed, watch=watch, say=say)
    with Assessor(wanted, step, program, say) as assessor:
        program = run_pruning(
            program, step, out=place.out, overwrite=place.overwrite, on_pass=lambda step: say(step.name)
        )
        target = getattr(step, "target_speedup", None)
        return assessor.report(program, place.out, method=method, seed=seed, target=_single(target), watch=watch)


def check_model(model: str, step: Pass, wanted: Wanted | None = None) -> None:
    """Refuse what a model's class cannot serve, from its configuration alone.

    Args:
        model: hub id or directory.
        step: the pruning pass.
        wanted: what shall be measured.

    Raises:
        FxpruneError: there is no such model, its class is unknown, or it cannot serve the method or a measurement.
    """
    model_class, config = class_of_model(model)
    check_method(step, model_class, config)
    if wanted is not None:
        wanted.check_class(step, model_class, config)


def _single(target: float | Sequence[float] | None) -> float | None:
    return target[0] if isinstance(target, (list, tuple)) else target  # type: ignore[return-value]  # one of several


def _prune_weights(
    program: Program,
    step: SparsePass,
    place: Destination,
    wanted: Wanted,
    *,
    seed: int,
    watch: Stopwatch,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prune weights in a located program, save it and report."""
    program = run_pruning(program, step, out=place.out, overwrite=place.overwrite, on_pass=lambda step: say(step.name))
    quality = None
    if wanted.ppl:
        say("measuring perplexity")
        with watch.stage("quality"):
            quality = perplexities(program, wanted.ppl, windows=wanted.windows)
    report = report_of(program, method=step.name, seed=seed, seconds=watch.seconds, quality=quality)
    write_report = resolve("fxprune.exporters.report_writer:write_report")
    write_report(report, place.out)
    if wanted.speed:  # after the report: what was done so far stays told if this fails
        say("exporting the dense and the sparse form, and timing them")
        with watch.stage("bench"):
            timed = measure_sparse_speed(program, threads=wanted.threads).to_json()
        report = report_of(program, method=step.name, seed=seed, seconds=watch.seconds, quality=quality, speed=timed)
        report["sparsity"] = report["sparsity"] | {"speed": NO_SPEED_UP}
        write_report(report, place.out)
    return report


def stream_model(
    model: str,
    method: str,
    options: Mapping[str, Any],
    place: Destination,
    *,
    restart: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune a model block by block from its shards, without ever holding it.

    Args:
        model: hub id or directory.
        method: name of a weight-pruning pass.
        options: its options.
        place: where.
        restart: throw unfinished work away instead of going on with it.
        say: gets progress messages.

    Returns:
        The report, as it is written beside the checkpoint.

    Raises:
        UsageError: the method does not prune weights, or needs the whole model.
        FxpruneError: as `prune_streaming`.
    """
    step = build_pass(pass_of(method, options), options)
    if not isinstance(step, SparsePass):
        raise UsageError(f"--stream prunes weights; {method} removes units: leave --stream out")
    if place.hold_zeros:
        raise UsageError("--hold-zeros looks at all weights, and --stream has one block of them at a time")
    if place.dtype is not None:
        raise UsageError("--stream keeps the dtype of the shards; leave --dtype out")
    report = prune_streaming(
        model,
        place.out,
        step,
        device=place.device,
        overwrite=place.overwrite,
        restart=restart,
        on_block=lambda done, blocks: say(f"block {done} of {blocks}"),
    )
    resolve("fxprune.exporters.report_writer:write_report")(report, place.out)
    return report
