"""What `fxprune eval` does: perplexities and tasks of one form of a model, shown as text and kept for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fxprune.core.errors import CheckpointError, UsageError
from fxprune.evaluation.harness import DEFINITIONS, Metric, TaskResult, check_limits, evaluate_tasks
from fxprune.evaluation.harness_tasks import HarnessTask, load_tasks
from fxprune.evaluation.perplexity import PerplexityResult, file_perplexity, read_text
from fxprune.measure.forms import OpenForm, open_form
from fxprune.measure.opening import check_language, check_precision
from fxprune.models.loading import load_tokenizer, resolve_device
from fxprune.runtimes.batching import BatchSize, fitting_batch_size, halve_until_it_fits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

__all__ = [
    "UNSCORED",
    "Evaluation",
    "check_evaluation",
    "measure_perplexity",
    "measure_task",
    "open_evaluated",
    "run_evaluation",
    "tasks_table",
]

UNSCORED = (
    "evaluation on text or tasks",
    "measure it on data of its own task, with the model that fxprune.load gives",
)
"""What is said of models that no text can be scored with, see `fxprune.measure.opening.check_language`."""


@dataclass(frozen=True)
class Evaluation:
    """What to measure.

    Attributes:
        ppl: text files for the perplexity.
        tasks: names that lm-eval knows.
        data: directory with the tasks' files; the hub when None.
        limit: use the first so many documents of each task.
        window: tokens per window of a text.
        windows: use the first so many windows of each text.
        batch_size: windows or sequences at once.
        max_length: the most tokens of a task's sequence; the model's own limit when None.
        dtype: precision of a torch model; as saved when None.
        device: where a torch model runs.
        tokenizer: directory or hub id of the tokenizer for a form that has none beside it.
    """

    ppl: Sequence[Path] = ()
    tasks: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None
    window: int = 512
    windows: int | None = None
    batch_size: BatchSize = "auto"
    max_length: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    tokenizer: str | None = None


def run_evaluation(model: str, what: Evaluation, out: Console, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a checkpoint, a hub id or an ONNX directory; what can be refused is refused before it is loaded.

    Args:
        model: checkpoint, hub id, or ONNX directory with its tokenizer.
        what: what to measure.
        out: gets the figures.
        say: gets progress messages.

    Returns:
        For JSON: the model, the perplexities and the tasks.

    Raises:
        UsageError: nothing to measure, an unknown task or device, a precision for an ONNX graph, or an option is out of
            range.
        CalibrationError: a text or a task's data cannot be used, or `lm-eval` is not installed.
        CheckpointError: the model cannot be loaded, or has no tokenizer.
        VerificationError: the model returned numbers that are not finite.
    """
    check_evaluation(what)
    check_precision([model], what.dtype)
    if what.tasks:
        say(f"loading {', '.join(what.tasks)}")
    tasks = load_tasks(what.tasks, what.data) if what.tasks else []
    check_language([model], *UNSCORED)
    say(f"loading {model}")
    form = open_evaluated(model, what)
    perplexities = [measure_perplexity(form, path, what) for path in what.ppl]
    for result in perplexities:
        error = f" (standard error of the log {result.standard_error:.3f})" if result.standard_error else ""
        out.print(f"{result.text}: perplexity {result.perplexity:.2f}{error}; {result.definition}", highlight=False)
    results = [measure_task(form, task, what, say) for task in tasks]
    if results:
        out.print(tasks_table(results))
        shown = {metric.name for result in results for metric in result.metrics}
        for name in sorted(shown & DEFINITIONS.keys()):
            out.print(f"{name}: {DEFINITIONS[name]}", highlight=False)
    return {
        "model": model,
        "perplexity": [result.as_dict() for result in perplexities],
        "tasks": [result.as_dict() for result in results],
    }


def open_evaluated(model: str, what: Evaluation) -> OpenForm:
    """Open a form together with a tokenizer, its own or else the one that was named.

    Raises:
        CheckpointError: the form or the tokenizer cannot be loaded, or there is no tokenizer.
        ExportError: an ONNX graph cannot be loaded.
    """
    form = open_form(model, dtype=what.dtype, device=what.device)
    if form.tokenizer is None and what.tokenizer is not None:
        form.tokenizer = load_tokenizer(what.tokenizer)
    if form.tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer, which a text needs; name one with --tokenizer DIR")
    return form


def check_evaluation(what: Evaluation) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        UsageError: nothing to measure, an unknown device, or an option is out of range.
        CalibrationError: a text cannot be used.
    """
    if not what.ppl and not what.tasks:
        raise UsageError("nothing to measure: give --ppl FILE, --tasks NAME,... or both")
    if what.data is not None and not what.tasks:
        raise UsageError("--data names the files of tasks; give --tasks NAME,... as well")
    check_limits(what.limit, what.max_length)
    resolve_device(what.device)
    for path in what.ppl:
        read_text(path)


def measure_perplexity(form: OpenForm, path: Path, what: Evaluation) -> PerplexityResult:
    """Perplexity of an open form on a text file, see `fxprune.evaluation.perplexity.file_perplexity`."""

    def measure(batch_size: int) -> PerplexityResult:
        return file_perplexity(
            form.runner,
            path,
            form.tokenizer,
            window=what.window,
            max_windows=what.windows,
            batch_size=batch_size,
            device=what.device,
        )

    if what.batch_size != "auto":
        return measure(what.batch_size)
    return halve_until_it_fits(measure, fitting_batch_size(what.window, len(form.tokenizer), what.device))


def measure_task(form: OpenForm, task: HarnessTask, what: Evaluation, say: Callable[[str], None]) -> TaskResult:
    """Run a task on an open form, see `fxprune.evaluation.harness.evaluate_tasks`."""
    say(f"running {task.name}")
    (result,) = evaluate_tasks(
        form.runner,
        form.tokenizer,
        [task],
        limit=what.limit,
        batch_size=what.batch_size,
        max_length=what.max_length,
        device=what.device,
    )
    return result


def tasks_table(results: Sequence[TaskResult]) -> Table:
    """Tasks in rows, metrics in columns, each figure with its standard error."""
    names = list(dict.fromkeys(metric.name for result in results for metric in result.metrics))
    title = f"Tasks of lm-eval {results[0].lm_eval_version}, {results[0].dtype}, value ± standard error"
    table = Table(title=title, title_justify="left")
    for column in ("task", "n", *names):
        table.add_column(column, overflow="fold")
    for result in results:
        metrics = {metric.name: metric for metric in result.metrics}
        cells = [_cell(metrics[name]) if name in metrics else "-" for name in names]
        table.add_row(result.task, str(result.documents), *cells)
    return table


def _cell(metric: Metric) -> str:
    """Three decimals for shares, two for what is larger."""
    digits = 3 if abs(metric.value) <= 1 else 2
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.{digits}f}"
    return f"{metric.value:.{digits}f}{error}"
