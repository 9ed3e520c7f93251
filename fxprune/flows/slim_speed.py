"""How much faster are slim models? The dense one is exported once, the slim ones beside it; they are timed in turn.

lifted graph ── ONNX ──┐
                       ├── interleaved runs ──► medians, confidence intervals ──► speed gate
slim graph ─── ONNX ───┘
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import UsageError
from fxprune.core.pipeline import build_pass
from fxprune.core.program import Form
from fxprune.measure.bench_gate import JUDGED_PRECISION, JUDGED_REPEATS, gate, linear_shapes, narrowed_widths
from fxprune.measure.forms import cases_of, export_dense, measure_speed, open_exported
from fxprune.measure.latency_table import load_table
from fxprune.measure.speed import track_repeats
from fxprune.structured.base import StructuredPass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program
    from fxprune.measure.bench_gate import Verdict
    from fxprune.measure.ratios import Precision
    from fxprune.measure.speed import Case, SpeedResult

__all__ = ["SpeedPlan", "SpeedRun", "speed_plan", "timed_pass"]

_PREFILL, _DECODE, _PAST = (128, 512), 32, 128
_REPEATS = 10


@dataclass(frozen=True)
class SpeedPlan:
    """What to time, and how to judge it.

    Attributes:
        cases: the workloads.
        threads: of ONNX Runtime.
        repeats: timed repeats of each form.
        precision: to go on to, see `fxprune.measure.speed.bench`.
        mix: weights of the cases, judged as one; None when nothing is judged.
    """

    cases: tuple[Case, ...]
    threads: int
    repeats: int = _REPEATS
    precision: Precision | None = None
    mix: Mapping[str, float] | None = None


def timed_pass(passes: Sequence[Pass]) -> Pass:
    """The pass whose speed is measured: the one that removes units; the last where none does."""
    return next((step for step in passes if not step.keeps_shapes), passes[-1])


def speed_plan(step: Pass, threads: int, repeats: int | None = None) -> SpeedPlan:
    """What to time for a pass: the cases, threads and mix of its latency table, or the benchmark's own.

    Args:
        step: the pruning pass.
        threads: of ONNX Runtime, where no table says it.
        repeats: timed repeats of each form; when None, 10, or, where the speed-up is judged, 30 and as many more as
            make its interval narrow (`fxprune.measure.bench_gate.JUDGED_PRECISION`).

    Raises:
        UsageError: the table cannot be read, or the mix does not fit it.
    """
    if isinstance(step, StructuredPass) and step.target_speedup is not None and step.table is not None:
        table = load_table(step.table)
        cases = tuple(entry.case for entry in table.cases)
        mix = table.weights(step.mix or {case.name: 1.0 for case in cases})
        precision = JUDGED_PRECISION if repeats is None else None
        return SpeedPlan(cases, step.threads, repeats or JUDGED_REPEATS, precision, mix)
    return SpeedPlan(tuple(cases_of(_PREFILL, _DECODE, _PAST)), threads, repeats or _REPEATS)


class SpeedRun:
    """Times slim programs of one dense program; a context manager that removes the exported dense graph at its end."""

    def __init__(self, plan: SpeedPlan) -> None:
        self.plan = plan
        self._dense: Any = None
        self._scratch: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._dense = None  # the session holds the file that goes now
        gc.collect()
        if self._scratch is not None:
            self._scratch.cleanup()

    def measure(self, program: Program, target: float | None) -> tuple[Program, list[SpeedResult], Verdict | None]:
        """Export, verify and time a slim program.

        Args:
            program: a slim causal language model on the CPU.
            target: the speed-up that was asked for; without one nothing is judged.

        Returns:
            The program with the results of the ONNX rungs, a result for each case, and the gate's verdict.

        Raises:
            UsageError: the program is not on the CPU.
            ExportError: one of the forms cannot be exported.
            VerificationError: the exported graph does not compute what the slim one does.
        """
        device = next(program.graph_module.parameters()).device
        if device.type != "cpu":
            raise UsageError(f"ONNX Runtime is timed on the CPU, and the model is on {device}: leave --device out")
        plan = self.plan
        if self._dense is None:
            self._dense, self._scratch = export_dense(program, plan.threads)
        with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
            graph = Path(scratch) / "slim" / "model.onnx"
            exported = build_pass("export_onnx", {"out": str(graph.parent)})(program).program
            checked = build_pass("verify", {"onnx": str(graph), "graph": False})(exported).program
            slim = open_exported(graph, Form(program.graph_module, program.interface), plan.threads)
            with track_repeats() as progress:
                results = measure_speed(
                    self._dense,
                    slim,
                    plan.cases,
                    threads=plan.threads,
                    repeats=plan.repeats,
                    precision=plan.precision,
                    progress=progress,
                )
            costs = (self._dense.cost, slim.cost)
            del slim
            gc.collect()
        verdict = None
        if target is not None:
            lifted = program.references["lifted"].module
            widths = narrowed_widths(linear_shapes(lifted), linear_shapes(program.graph_module))
            verdict = gate(results, target, mix=plan.mix, costs=costs, widths=widths)
        return program.with_results(verify=checked.results["verify"]), results, verdict
