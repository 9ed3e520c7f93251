"""What `fxprune bench` does: time forms against each other, judge the speed-ups, or build a latency table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import UsageError
from fxprune.core.machine import machine
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.form_names import form_names
from fxprune.measure.bench_gate import (
    JUDGED_PRECISION,
    JUDGED_REPEATS,
    check_target,
    gate,
    linear_shapes,
    merged,
    narrowed_widths,
)
from fxprune.measure.footprint import form_bytes, measure_footprint
from fxprune.measure.forms import cases_of
from fxprune.measure.latency_build import build_table
from fxprune.measure.opening import (
    check_form,
    check_language,
    check_precision,
    check_runtime,
    check_tokens,
    open_in,
    runtime_of,
)
from fxprune.measure.ratios import ratio_interval
from fxprune.measure.speed import SpeedResult, bound_of, interleaved_times, track_repeats
from fxprune.runtimes.runners import EagerRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from fxprune.measure.bench_gate import Verdict
    from fxprune.measure.forms import OpenForm
    from fxprune.measure.latency_table import LatencyTable
    from fxprune.measure.ratios import Precision
    from fxprune.measure.speed import Case, Cost

__all__ = ["Workload", "measure_speeds", "run_bench", "run_table"]

_TABLE_REPEATS = 6
_BENCH_REPEATS = 10  # JUDGED_REPEATS with a gate
_WARMUP = 2


@dataclass(frozen=True)
class Workload:
    """What to time.

    Attributes:
        prefill: prompt lengths; 128 and 512 (512 for a table) when empty.
        decode: tokens to decode; 0 for none.
        past: length of the cache before decoding.
        repeats: timed repeats a case; when None 10, 6 for each variant of a table, or, behind a gate, 30 and as many
            more as make the interval narrow (`fxprune.measure.bench_gate.JUDGED_PRECISION`).
        threads: of torch and ONNX Runtime; a table is measured with the first.
        dtype: precision of a torch model; as saved when None.
        batches: numbers of sequences at once.
        runtimes: names in `fxprune.measure.opening.RUNTIMES`; what the first form is made for when empty.
        footprint: whether load time and peak memory are measured, in processes of their own.
    """

    prefill: Sequence[int] = ()
    decode: int = 32
    past: int = 128
    repeats: int | None = None
    threads: Sequence[int] = (1,)
    dtype: str | None = None
    batches: Sequence[int] = (1,)
    runtimes: Sequence[str] = ()
    footprint: bool = True


def run_bench(
    forms: Sequence[str],
    work: Workload,
    out: Console,
    say: Callable[[str], None],
    *,
    gated: bool = False,
    target: float | None = None,
) -> tuple[dict[str, Any], Verdict | None]:
    """Time forms of a model against the first, interleaved, in each runtime with each number of threads.

    Args:
        forms: at least two: ONNX directories, checkpoints or hub ids; a checkpoint is exported for the runtimes that
            need a graph.
        work: what to time.
        out: gets the figures and the verdict.
        say: gets progress messages.
        gated: judge the speed-ups.
        target: the speed-up to judge them by; any above 1 when None.

    Returns:
        For JSON (`speed`, `forms`, `machine`, and `gate` when asked for), and the verdict when one was asked for.

    Raises:
        UsageError: a form does not run in a runtime, a precision is asked of ONNX graphs alone, or an option is out of
            range.
        FxpruneError: a form cannot be opened, exported or run.
    """
    check_target(target)
    names = form_names(forms)
    cases = cases_of(work.prefill or (128, 512), work.decode, work.past, work.batches)
    if not cases:
        raise UsageError("a benchmark needs a case; give --prefill or --decode")
    runtimes = [check_runtime(name) for name in work.runtimes or dict.fromkeys(map(runtime_of, forms))]
    if not work.runtimes and len(runtimes) > 1:
        raise UsageError(f"cannot compare {' with '.join(runtimes)}; name the runtime for all forms with --runtime")
    if not {"torch", "torch.compile"} & set(runtimes):
        check_precision(forms, work.dtype)
    if "genai" in runtimes and max(work.batches) > 1:
        raise UsageError("genai continues one sequence at a time with given tokens; leave out --batch, or that runtime")
    for runtime in runtimes:
        for form in forms:
            check_form(form, runtime)
    check_tokens(forms)
    if work.decode:
        check_language(forms, "decoding", "time the forward pass of others alone (--decode 0)")
    if of_language := {"torch.compile", "genai"} & set(runtimes):
        check_language(forms, f"the runtime {min(of_language)}", "use torch or onnxruntime")
    rounds = [
        _run_round(dict(zip(names, forms, strict=True)), cases, work, runtime, threads, out=out, say=say, gated=gated)
        for runtime in runtimes
        for threads in work.threads
    ]
    data: dict[str, Any] = {
        "speed": [result.to_json() for each in rounds for of_case in each.results for result in of_case],
        "forms": [entry for each in rounds for entry in each.forms],
        "machine": machine(),
    }
    if not gated:
        return data, None
    verdict = merged([v for each in rounds for v in each.judge(target, f"{each.title}, " if len(rounds) > 1 else "")])
    _show_verdict(verdict, out)
    return data | {"gate": verdict.to_json()}, verdict


@dataclass(frozen=True)
class _Round:
    """One runtime with one number of threads: results by case, JSON entries of the forms, costs, shapes of weights."""

    title: str
    results: list[list[SpeedResult]]
    forms: list[dict[str, Any]]
    costs: list[Cost | None]
    shapes: list[Mapping[str, tuple[int, int]]]

    def judge(self, target: float | None, prefix: str) -> list[Verdict]:
        """A verdict for each form but the first."""
        return [
            gate(
                [of_case[index - 1] for of_case in self.results],
                target,
                costs=(self.costs[0], self.costs[index]),
                widths=narrowed_widths(self.shapes[0], self.shapes[index]),
                prefix=prefix,
            )
            for index in range(1, len(self.forms))
        ]


def _run_round(
    forms: Mapping[str, str],
    cases: Sequence[Case],
    work: Workload,
    runtime: str,
    threads: int,
    *,
    out: Console,
    say: Callable[[str], None],
    gated: bool,
) -> _Round:
    """Open the forms in a runtime, time them, and close them again."""
    opened = []
    for where in forms.values():
        say(f"opening {where} in {runtime}")
        opened.append(open_in(where, runtime, threads=threads, dtype=work.dtype, say=say))
    shapes = [_count(form) for form in opened]
    repeats = work.repeats or (JUDGED_REPEATS if gated else _BENCH_REPEATS)
    precision = JUDGED_PRECISION if gated and work.repeats is None else None
    results = measure_speeds(opened, cases, names=list(forms), threads=threads, repeats=repeats, precision=precision)
    speed = [result.to_json() for of_case in results for result in of_case]
    title = f"{runtime}, {threads} threads"
    out.print(_speed_table(speed, f"Speed in {title}, medians of {_counts(speed)} interleaved runs"))
    entries = []
    for name, form in zip(forms, opened, strict=True):
        assert form.path is not None
        entry: dict[str, Any] = {"name": name, "where": forms[name]}
        if work.footprint:
            say(f"loading {forms[name]} once more, alone, for its memory")
            found = measure_footprint(form.path, runtime, cases, threads=threads, dtype=work.dtype)
            entry |= found.to_json()
        else:
            entry |= {"runtime": runtime, "threads": threads, "file_bytes": form_bytes(form.path)}
        entries.append(entry)
    out.print(_forms_table(entries, "Files, loading and memory" if work.footprint else "Files"))
    return _Round(title, results, entries, [form.cost for form in opened], shapes)


def measure_speeds(
    forms: Sequence[OpenForm],
    cases: Sequence[Case],
    *,
    names: Sequence[str],
    threads: int,
    repeats: int,
    precision: Precision | None = None,
) -> list[list[SpeedResult]]:
    """Time open forms of one runtime against the first, interleaved.

    Args:
        forms: at least two, in the same runtime.
        cases: the workloads.
        names: of the forms; results carry them where there are more than two.
        threads: of the runtime.
        repeats: timed repeats of each form.
        precision: to go on to, see `fxprune.measure.speed.bench`.

    Returns:
        By case, a result for each form but the first.
    """
    runners = [form.runner for form in forms]
    with track_repeats() as progress:
        timed = interleaved_times(
            runners, cases, threads=threads, repeats=repeats, precision=precision, warmup=_WARMUP, progress=progress
        )
    results = []
    for case, (first, *others) in zip(cases, timed, strict=True):
        of_case = []
        for index, times in enumerate(others, start=1):
            dense, slim = forms[0].cost, forms[index].cost
            bound = None if dense is None or slim is None else bound_of(case, dense, slim)
            form = names[index] if len(forms) > 2 else None
            interval = ratio_interval(first, times)
            of_case.append(SpeedResult(forms[0].kind, case, threads, first, times, interval, bound, form))
        results.append(of_case)
    return results


def _count(form: OpenForm) -> Mapping[str, tuple[int, int]]:
    """Shapes of the form's projections; an ONNX form gets its cost on the way."""
    runner: Any = form.runner
    if isinstance(runner, EagerRunner):
        return linear_shapes(runner.model)  # type: ignore[arg-type]  # it was opened with a module
    counted = resolve("fxprune.exporters.onnx_cost:cost_of_onnx")(runner.path)
    form.cost = counted.cost
    shapes: Mapping[str, tuple[int, int]] = counted.shapes
    return shapes


def _forms_table(entries: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("form", "weights MB", "load s", "peak MB", "of it before loading MB"):
        table.add_column(column)
    for entry in entries:
        megabytes = [f"{entry[key] / 1e6:.1f}" if key in entry else "-" for key in ("peak_rss_bytes", "base_rss_bytes")]
        load = f"{entry['load_seconds']:.2f}" if "load_seconds" in entry else "-"
        table.add_row(entry["name"], f"{entry['file_bytes'] / 1e6:.1f}", load, *megabytes)
    return table


def _speed_table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    named = any("form" in r for r in results)
    for column in (*(["form"] if named else []), "case", "dense ms", "slim ms", "speed-up", "95% interval", "bound"):
        table.add_column(column)
    for r in results:
        bound = f"{r['bound']:.2f}x ({r['bound_kind']})" if "bound" in r else "-"
        low, high = r["ci"]
        figures = (f"{r['dense_ms']:.1f}", f"{r['slim_ms']:.1f}", f"{r['speedup']:.2f}x", f"{low:.2f}-{high:.2f}")
        table.add_row(*([r["form"]] if named else []), r["case"], *figures, bound)
    return table


def _counts(results: Sequence[Mapping[str, Any]]) -> str:
    """How many repeats the cases had."""
    found = sorted({r["repeats"] for r in results})
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


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
    repeats = _TABLE_REPEATS if work.repeats is None else work.repeats
    if repeats < 2:
        raise UsageError(f"a latency table needs at least 2 repeats, got {repeats}")
    check_language([model], "a latency table", "prune by --ratio, --target-params, --target-macs or --target-bytes")
    say(f"loading {model}")
    loaded = load_model(model, dtype=work.dtype)
    say("tracing and locating")
    program = front_end(loaded, Stopwatch())
    table = build_table(program, path, cases, threads=work.threads[0], repeats=repeats, say=say)
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
