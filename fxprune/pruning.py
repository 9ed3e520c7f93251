"""What `fxprune prune` does: load, trace, prune, verify, save and report; or stream a model that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.errors import UsageError
from fxprune.loading import load_model
from fxprune.output import prepare_output
from fxprune.pipeline import build_pass
from fxprune.registry import resolve
from fxprune.reporting import report_of
from fxprune.sparse_pass import SparsePass
from fxprune.streaming_run import prune_streaming
from fxprune.workflow import Stopwatch, front_end, perplexities, prune_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Destination", "parse_per_module", "prune_model", "stream_model"]


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
        say: gets progress messages.

    Returns:
        The report, as it is written beside the checkpoint.

    Raises:
        FxpruneError: any step refused, or a rung of the verification failed.
    """
    build_pass(method, options)  # a wrong option is told before the model is loaded
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
    resolve("fxprune.exporters.report:write_report")(report, place.out)
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
