"""What `fxprune bench` does: time two forms against each other, judge the speed-up, or build a latency table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fxprune.bench_gate import check_target, gate, linear_shapes, narrowed_widths
from fxprune.errors import UsageError
from fxprune.latency_build import build_table
from fxprune.loading import load_model
from fxprune.measure import machine
from fxprune.registry import resolve
from fxprune.runners import EagerRunner
from fxprune.workflow import Stopwatch, cases_of, front_end, measure_speed, open_form

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from fxprune.bench_gate import Verdict
    from fxprune.latency_table import LatencyTable
    from fxprune.workflow import OpenForm

__all__ = ["Workload", "run_bench", "run_table"]

_TABLE_REPEATS = 6
_BENCH_REPEATS = 10


@dataclass(frozen=True)
class Workload:
    """What to time.

    Attributes:
        prefill: prompt lengths; 128 and 512 (512 for a table) when empty.
        decode: tokens to decode; 0 for none.
        past: length of the cache before decoding.
        repeats: timed repeats a case; 10 (6 for each variant of a table) when None.
        threads: of torch and ONNX Runtime.
        dtype: precision of a torch model; as saved when None.
    """

    prefill: Sequence[int] = ()
    decode: int = 32
    past: int = 128
    repeats: int | None = None
    threads: int = 1
    dtype: str | None = None


def run_bench(
    dense: str, slim: str, work: Workload, out: Console, *, gated: bool = False, target: float | None = None
) -> tuple[dict[str, Any], Verdict | None]:
    """Time two forms of a model, interleaved.

    Args:
        dense: the form to compare with: ONNX directory, checkpoint or hub id.
        slim: the smaller form, for the same runtime.
        work: what to time.
        out: gets the figures and the verdict.
        gated: judge the speed-ups.
        target: the speed-up to judge them by; any above 1 when None.

    Returns:
        For JSON, and the verdict when one was asked for.

    Raises:
        UsageError: the forms run in different runtimes, or an option is out of range.
        FxpruneError: a form cannot be opened.
    """
    check_target(target)
    forms = [open_form(where, threads=work.threads, dtype=work.dtype) for where in (dense, slim)]
    shapes = [_count(form) for form in forms]
    repeats = work.repeats or _BENCH_REPEATS
    cases = cases_of(work.prefill or (128, 512), work.decode, work.past)
    results = measure_speed(forms[0], forms[1], cases, threads=work.threads, repeats=repeats)
    data: dict[str, Any] = {"speed": [result.to_json() for result in results], "machine": machine()}
    out.print(_speed_table(data["speed"], f"Speed, {work.threads} threads, medians of {repeats} interleaved runs"))
    if not gated:
        return data, None
    costs = (forms[0].cost, forms[1].cost)
    verdict = gate(results, target, costs=costs, widths=narrowed_widths(shapes[0], shapes[1]))
    _show_verdict(verdict, out)
    return data | {"gate": verdict.to_json()}, verdict


def _count(form: OpenForm) -> Mapping[str, tuple[int, int]]:
    """Shapes of the form's projections; an ONNX form gets its cost on the way."""
    runner: Any = form.runner
    if isinstance(runner, EagerRunner):
        return linear_shapes(runner.model)  # type: ignore[arg-type]  # `open_form` gives it a module
    counted = resolve("fxprune.exporters.onnx_cost:cost_of_onnx")(runner.path)
    form.cost = counted.cost
    shapes: Mapping[str, tuple[int, int]] = counted.shapes
    return shapes


def _speed_table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("runtime", "case", "dense ms", "slim ms", "speed-up", "95% interval", "bound"):
        table.add_column(column)
    for r in results:
        bound = f"{r['bound']:.2f}x ({r['bound_kind']})" if "bound" in r else "-"
        low, high = r["ci"]
        figures = (f"{r['dense_ms']:.1f}", f"{r['slim_ms']:.1f}", f"{r['speedup']:.2f}x", f"{low:.2f}-{high:.2f}")
        table.add_row(r["runtime"], r["case"], *figures, bound)
    return table


def _show_verdict(verdict: Verdict, out: Console) -> None:
    wanted = "faster than dense" if verdict.target is None else f"{verdict.target:.2f}x within 5%"
    out.print(f"gate: {wanted}: {'passed' if verdict.passed else 'failed'}", highlight=False, markup=False)
    for reason in verdict.reasons:
        out.print(f"  {reason}", highlight=False, markup=False, soft_wrap=True)


def run_table(model: str, path: Path, work: Workload, out: Console, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a model at a few widths in ONNX Runtime and write its latency table.

    Args:
        model: hub id or directory of the dense model.
        path: the JSON file; an unfinished measurement beside it is gone on with.
        work: what to time.
        out: gets the costs.
        say: gets progress messages.

    Returns:
        The table as JSON data, as it was written.

    Raises:
        FxpruneError: the model cannot be loaded, traced, exported or timed, or the file not be written.
    """
    cases = cases_of(work.prefill or (512,), work.decode, work.past)
    if not cases:
        raise UsageError("a latency table needs a case; give --prefill or --decode")
    say(f"loading {model}")
    loaded = load_model(model, dtype=work.dtype)
    say("tracing and locating")
    program = front_end(loaded, Stopwatch())
    repeats = work.repeats or _TABLE_REPEATS
    table = build_table(program, path, cases, threads=work.threads, repeats=repeats, say=say)
    out.print(_cost_table(table))
    return table.to_json()


def _cost_table(table: LatencyTable) -> Table:
    shown = Table(title=f"Milliseconds a block, {table.identity.threads} threads", title_justify="left")
    for column in ("case", "dense ms", "base ms", "block", "width", "ms a block"):
        shown.add_column(column)
    for case in table.cases:
        head = (case.case.name, f"{case.dense_ms:.2f}", f"{case.base_ms:.2f}")
        for shape, surface in case.blocks.items():
            for count, row in zip(surface.sets, surface.ms, strict=True):
                for per_set, ms in zip(surface.per_set, row, strict=True):
                    width = f"{count} x {per_set}" if len(surface.per_set) > 1 else f"{count}"
                    shown.add_row(*head, shape, width, f"{ms:.4f}")
                    head, shape = ("", "", ""), ""  # noqa: PLW2901 - said once
    return shown
