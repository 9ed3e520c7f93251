"""What is measured of a structurally pruned model once it is saved: perplexity, the guard, speed and its gate.

Several slim models of one dense model share what is measured of the dense one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.calibration.text import check_records
from fxprune.core.errors import UsageError
from fxprune.core.registry import resolve
from fxprune.evaluation.perplexity import read_text
from fxprune.flows.guard import Guard, check_guard
from fxprune.flows.reporting import report_of
from fxprune.flows.slim_speed import SpeedRun, speed_plan
from fxprune.flows.workflow import perplexities
from fxprune.models.loading import resolve_device
from fxprune.models.methods import require_language_model
from fxprune.structured.base import StructuredPass
from fxprune.weights.base import SparsePass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program
    from fxprune.core.stopwatch import Stopwatch
    from fxprune.evaluation.perplexity import PerplexityResult

__all__ = ["Assessor", "Wanted", "failed_gate", "warnings_of"]


@dataclass(frozen=True)
class Wanted:
    """What shall be measured.

    Attributes:
        ppl: texts for the perplexity: files, or `python` for Python's own language reference.
        windows: of 512 tokens per text.
        guard: the guard's second text: a file, `python`, or `none`.
        speed: whether to time the exported model even if no target speed-up asks for it.
        threads: of ONNX Runtime, where no latency table says it.
        repeats: timed repeats of each form; see `fxprune.flows.slim_speed.speed_plan`.
    """

    ppl: Sequence[str] = ()
    windows: int | None = None
    guard: str = "python"
    speed: bool = False
    threads: int = 1
    repeats: int | None = None

    def check(self, step: Pass, device: str) -> None:
        """Tell what is wrong before any work is done.

        Raises:
            CalibrationError: a text cannot be read, or it is not clear which field of calibration records to read.
            UsageError: speed is to be measured off the CPU, or the latency table or the mix is wrong.
        """
        for text in self.ppl:
            if text != "python":
                read_text(text)
        reads = step.reads_text if isinstance(step, StructuredPass) else getattr(step, "needs_data", False)
        if isinstance(step, StructuredPass | SparsePass) and reads:
            check_records(step.calibration_spec())
        check_guard(self.guard)
        if self.times(step):
            speed_plan(step, self.threads, self.repeats)
            if resolve_device(device).type != "cpu":
                raise UsageError(f"speed is measured in ONNX Runtime on the CPU; leave --device {device} out")

    def check_class(self, step: Pass, model_class: type[Any], config: Any) -> None:
        """Tell what cannot be measured of a model's class, before it is loaded.

        Raises:
            UsageError: perplexity, a guard's text or a speed of decoding was asked for, and it is no language model.
        """
        asked = {
            "--ppl": bool(self.ppl),
            f"--guard {self.guard}": self.guard not in {"none", "python"},
            "--measure-speed": self.speed,
            "--target-speedup": getattr(step, "target_speedup", None) is not None,
        }
        for what in (name for name, given in asked.items() if given):
            require_language_model(
                what,
                model_class,
                config,
                otherwise="leave it out (fxprune bench --decode 0 times forward passes of other models that read text)",
            )

    def times(self, step: Pass) -> bool:
        """Whether speed is measured: it was asked for, or a target speed-up has to hold."""
        return self.speed or getattr(step, "target_speedup", None) is not None


class Assessor:
    """Measures slim programs that one pass made from one dense program, and writes their reports.

    A context manager: the exported dense graph is removed at its end.

    Args:
        wanted: what to measure.
        step: the pruning pass.
        program: the dense, located program.
        say: gets progress messages.

    Raises:
        UsageError: a text was named for the guard, and the program cannot read text.
    """

    def __init__(self, wanted: Wanted, step: Pass, program: Program, say: Callable[[str], None]) -> None:
        self.wanted = wanted
        self.step = step
        self.say = say
        self.guards = _guards(wanted, step, program)
        self._program = program
        self._dense: dict[str, PerplexityResult] = {}
        self._guard: Guard | None = None
        self._speed = SpeedRun(speed_plan(step, wanted.threads, wanted.repeats)) if wanted.times(step) else None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._speed is not None:
            self._stack.enter_context(self._speed)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def report(
        self, program: Program, out: Path, *, method: str, seed: int, target: float | None, watch: Stopwatch
    ) -> dict[str, Any]:
        """Measure a slim program and write its report; before speed is measured it is written once without.

        Args:
            program: the slim program.
            out: where its checkpoint is.
            method: name of the pass.
            seed: its seed.
            target: the speed-up that was asked for, if one was.
            watch: has the seconds so far, and gets those of measuring.

        Raises:
            FxpruneError: something could not be measured; what was is in the report.
        """
        write_report = resolve("fxprune.exporters.report_writer:write_report")
        found = self._quality(program, watch)
        report = report_of(program, method=method, seed=seed, seconds=watch.seconds, **found)
        write_report(report, out)
        if self._speed is None:
            return report
        self.say("exporting the dense and the slim form, and timing them")
        with watch.stage("bench"):
            program, results, verdict = self._speed.measure(program, target)
        found["speed"] = [result.to_json() for result in results]
        if verdict is not None:
            found["gate"] = verdict.to_json()
        report = report_of(program, method=method, seed=seed, seconds=watch.seconds, **found)
        write_report(report, out)
        return report

    def _quality(self, program: Program, watch: Stopwatch) -> dict[str, Any]:
        """The sections `quality` and `guard`; what was not asked for is absent."""
        found: dict[str, Any] = {}
        if self.wanted.ppl:
            self.say("measuring perplexity")
            with watch.stage("quality"):
                found["quality"] = perplexities(
                    program, self.wanted.ppl, windows=self.wanted.windows, known=self._dense
                )
        if self.guards:
            self.say("guarding against overfitting to the calibration text")
            with watch.stage("guard"):
                if self._guard is None:
                    assert isinstance(self.step, StructuredPass)
                    self._guard = Guard(self._program, self.step.calibration_spec(), self.wanted.guard)
                found["guard"] = self._guard.judge(program)
        return found


def _guards(wanted: Wanted, step: Pass, program: Program) -> bool:
    """Whether the guard runs: for methods that read calibration text, on models that can read any."""
    if wanted.guard == "none" or not (isinstance(step, StructuredPass) and step.reads_text):
        return False
    source = program.source
    able = source is not None and source.tokenizer is not None and program.interface.causal
    if not able and wanted.guard != "python":
        raise UsageError("--guard reads text: it needs a causal language model with a tokenizer")
    return able


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a user must be told of a report, of all its budgets: guards that warn, and why speed gates failed."""
    found = []
    for where, part in _parts(report):
        if warning := part.get("guard", {}).get("warning"):
            found.append(f"{where}{warning}")
        if not part.get("gate", {}).get("passed", True):
            gate = part["gate"]
            found.append(f"{where}the speed gate failed (target {gate['target']:g}x, within 5%)")
            found += [f"{where}{reason}" for reason in gate["reasons"]]
    return found


def failed_gate(report: Mapping[str, Any]) -> bool:
    """Whether a speed gate of a report, or of one of its budgets, failed."""
    return any(not part.get("gate", {}).get("passed", True) for _, part in _parts(report))


def _parts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The report, and its budgets with how messages call them."""
    entries = report.get("budgets", {}).get("entries", [])
    return [("", report), *((f"{entry['name']}: ", entry) for entry in entries)]
