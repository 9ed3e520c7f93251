"""What `fxprune prune` does: load, trace, prune, verify, save and report; or stream a model that does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.errors import UsageError
from fxprune.loading import load_model, resolve_device
from fxprune.output import prepare_output
from fxprune.pipeline import build_pass
from fxprune.registry import resolve
from fxprune.reporting import report_of
from fxprune.sparse_pass import NO_SPEED_UP, SparsePass
from fxprune.sparse_speed import measure_sparse_speed
from fxprune.streaming_run import prune_streaming
from fxprune.workflow import Stopwatch, front_end, perplexities, prune_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.pass_base import Pass

__all__ = ["Destination", "parse_per_module", "prune_model", "stream_model"]

_SPEED_THREADS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Destination:
    """Where the work is done and where the result goes.

    Attributes:
        out: directory of the checkpoint.
        device: where the model runs.
        dtype: its precision; as saved when None.
        overwrite: whether an earlier output may be replaced.
    """

    out: Path
    device: str = "cpu"
    dtype: str | None = None
    overwrite: bool = False


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


def prune_model(
    model: str,
    method: str,
    options: Mapping[str, Any],
    place: Destination,
    *,
    ppl: Sequence[str] = (),
    windows: int | None = None,
    speed: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune a model in memory.

    Args:
        model: hub id or directory.
        method: name of a pruning pass.
        options: its options.
        place: where.
        ppl: texts for the perplexity before and after.
        windows: of 512 tokens per text.
        speed: whether to export the dense and the pruned form and to time them in ONNX Runtime, for a method that
            prunes weights; takes minutes.
        say: gets progress messages.

    Returns:
        The report, as it is written beside the checkpoint.

    Raises:
        UsageError: an option is wrong, or the speed is to be measured of a method that removes units, or off the CPU.
        FxpruneError: any step refused, or a rung of the verification failed.
    """
    step = build_pass(method, options)  # a wrong option is told before the model is loaded
    if speed:
        _check_speed(step, place)
    prepare_output(place.out, overwrite=place.overwrite)
    watch = Stopwatch()
    say(f"loading {model}")
    with watch.stage("load"):
        loaded = load_model(model, dtype=place.dtype, device=place.device)
    say("tracing and locating")
    program = front_end(loaded, watch)
    program = prune_program(
        program, method, options, out=place.out, overwrite=place.overwrite, on_pass=lambda step: say(step.name)
    )
    quality = None
    if ppl:
        say("measuring perplexity")
        with watch.stage("quality"):
            quality = perplexities(program, ppl, windows=windows)
    seed = int(options.get("seed", 0))
    report = report_of(program, method=method, seed=seed, seconds=watch.seconds, quality=quality)
    write_report = resolve("fxprune.exporters.report:write_report")
    write_report(report, place.out)
    if speed:  # after the report: what was done so far stays told if this fails
        say("exporting the dense and the sparse form, and timing them")
        with watch.stage("bench"):
            timed = measure_sparse_speed(program, threads=_SPEED_THREADS).to_json()
        report = report_of(program, method=method, seed=seed, seconds=watch.seconds, quality=quality, speed=timed)
        report["sparsity"] = report["sparsity"] | {"speed": NO_SPEED_UP}
        write_report(report, place.out)
    return report


def _check_speed(step: Pass, place: Destination) -> None:
    if not isinstance(step, SparsePass):
        raise UsageError(f"--measure-speed is for pruned weights; {step.name} removes units: use fxprune bench")
    if resolve_device(place.device).type != "cpu":
        raise UsageError(f"--measure-speed times ONNX Runtime on the CPU; leave --device {place.device} out")


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
    step = build_pass(method, options)
    if not isinstance(step, SparsePass):
        raise UsageError(f"--stream prunes weights; {method} removes units: leave --stream out")
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
    resolve("fxprune.exporters.report:write_report")(report, place.out)
    return report
