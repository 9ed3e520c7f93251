"""What `fxprune compare` does: several forms of a model on the same texts and tasks, each against the first.

                              texts, tasks (loaded once)
                                     │
    form A ─ hash ─ cached? ─ open ─ measure ─┐
    form B ─ hash ─ cached? ─ open ─ measure ─┼─► pair windows and documents ─► tests ─► one report
    form C ─ hash ─ cached? ─ open ─ measure ─┘

One form is open at a time. All forms get the same windows, the same documents and the same longest sequence.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import CalibrationError, UsageError
from fxprune.core.machine import machine
from fxprune.evaluation.eval_cache import EvaluationCache, FormFiles, digest, form_files, tokenizer_files
from fxprune.evaluation.form_names import form_names
from fxprune.evaluation.harness import TaskResult
from fxprune.evaluation.harness_tasks import HarnessTask, load_tasks, task_key
from fxprune.evaluation.paired import TESTS, PairedTest, holm, paired_test
from fxprune.evaluation.perplexity import PerplexityResult, read_text
from fxprune.evaluation.scoring import named_length
from fxprune.flows.evaluation import UNSCORED, check_evaluation, measure_perplexity, measure_task, open_evaluated
from fxprune.flows.reporting import versions
from fxprune.measure.opening import check_language, check_precision
from fxprune.models.loading import load_config, load_tokenizer, max_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.flows.evaluation import Evaluation
    from fxprune.measure.forms import OpenForm

__all__ = ["Measured", "compare_forms", "run_comparison"]


@dataclass
class Measured:
    """What was found out about one form.

    Attributes:
        name: how the report calls it.
        where: as the user named it.
        files: its files.
        runtime: what ran it.
        dtype: of its logits.
        perplexities: a result for each text.
        tasks: a result for each task.
        cached: how many of the results had been kept from an earlier run.
        seconds: wall time of hashing, loading and measuring.
    """

    name: str
    where: str
    files: FormFiles
    runtime: str = ""
    dtype: str = ""
    perplexities: list[PerplexityResult] = dataclasses.field(default_factory=list)
    tasks: list[TaskResult] = dataclasses.field(default_factory=list)
    cached: int = 0
    seconds: float = 0.0


def run_comparison(
    forms: Sequence[str], what: Evaluation, say: Callable[[str], None], *, cache: EvaluationCache | None = None
) -> dict[str, Any]:
    """Measure forms of a model alike and compare each with the first; what can be refused is refused before.

    Args:
        forms: at least two checkpoints, hub ids, ONNX directories or ONNX files, each with its tokenizer.
        what: what to measure, see `fxprune.flows.evaluation.Evaluation`.
        say: gets progress messages.
        cache: where results are kept; None for the user's cache directory.

    Returns:
        The sections of `fxprune.exporters.report_comparison.Comparison`.

    Raises:
        UsageError: fewer than two forms, one form twice, nothing to measure, an unknown task or device, a precision
            where all forms are ONNX graphs, or an option is out of range.
        CalibrationError: a text or a task's data cannot be used, or `lm-eval` is not installed.
        CheckpointError: a form cannot be loaded, has no tokenizer, or changes while it is measured.
        ExportError: an ONNX graph cannot be loaded or run.
        VerificationError: a form returned numbers that are not finite.
    """
    names = form_names(forms)
    if len(set(forms)) < len(forms):
        raise UsageError(f"a form is named twice: {', '.join(forms)}; its figures would be the same")
    check_evaluation(what)
    check_precision(forms, what.dtype)
    check_language(forms, *UNSCORED)
    cache = EvaluationCache.of_user() if cache is None else cache
    texts = {path: digest(read_text(path)) for path in what.ppl}
    if what.tasks:
        say(f"loading {', '.join(what.tasks)}")
    tasks = load_tasks(what.tasks, what.data) if what.tasks else []
    keys = [task_key(task, what.limit) for task in tasks]
    found = []
    for name, where in zip(names, forms, strict=True):
        start = time.perf_counter()
        found.append(Measured(name, where, form_files(where)))
        found[-1].seconds = time.perf_counter() - start
    if tasks and what.max_length is None:
        what = dataclasses.replace(what, max_length=min(_longest(form.files, what.tokenizer) for form in found))
    for form in found:
        start = time.perf_counter()
        _Measurement(form, what, cache, say).run(texts, list(zip(tasks, keys, strict=True)))
        form.seconds += time.perf_counter() - start
    return compare_forms(found, tasks, what)


def _longest(files: FormFiles, tokenizer: str | None) -> int:
    """The longest sequence that a form says it takes; its configuration and its tokenizer say it without weights."""
    base = files.path.parent if files.path.is_file() else files.path
    if (base / "config.json").is_file() and (longest := max_positions(load_config(base))):
        return longest
    if tokenizer is not None and not (base / "tokenizer.json").is_file():
        return named_length(load_tokenizer(tokenizer))
    return named_length(load_tokenizer(base))


# ---- measuring -----------------------------------------------------------------------------------------------------


class _Measurement:
    """One form, opened only when something about it is not known yet."""

    def __init__(self, form: Measured, what: Evaluation, cache: EvaluationCache, say: Callable[[str], None]) -> None:
        self.form, self.what, self.cache, self.say = form, what, cache, say
        self._opened: OpenForm | None = None
        self._key = {
            "form": form.files.sha256,
            "graph": form.files.graph is not None,
            "dtype": what.dtype,
            "device": _device_name(what.device),
            "batch_size": what.batch_size,
            "tokenizer": None if what.tokenizer is None else tokenizer_files(what.tokenizer),
            "versions": versions(),
        }

    def run(self, texts: Mapping[Path, str], tasks: Sequence[tuple[HarnessTask, Mapping[str, Any]]]) -> None:
        """Fill in the form's results."""
        for path, content in texts.items():

            def measure(path: Path = path, content: str = content) -> dict[str, Any]:
                result = dataclasses.asdict(measure_perplexity(self.open(), path, self.what))
                if digest(read_text(path)) != content:
                    raise CalibrationError(f"{path} changed while it was used; run it again when nothing writes there")
                return result

            about = {"text": content, "name": path.name, "window": self.what.window, "windows": self.what.windows}
            data = self._known({"perplexity": about}, measure)
            self.form.perplexities.append(PerplexityResult(**{**data, "losses": tuple(data["losses"])}))
        for task, key in tasks:
            data = self._known(
                {"task": key, "max_length": self.what.max_length},
                lambda task=task: measure_task(self.open(), task, self.what, self.say).as_dict(items=True),  # type: ignore[misc]
            )
            # The files are those of now: the documents are the same, the paths may be others.
            self.form.tasks.append(dataclasses.replace(TaskResult.from_dict(data), files=task.files))
        self.form.runtime, self.form.dtype = _runner_and_dtype(self.form)
        if self._opened is not None:
            self._opened = None
            gc.collect()

    def open(self) -> OpenForm:
        """The form, loaded at the first call."""
        if self._opened is None:
            self.say(f"loading {self.form.where}")
            files = self.form.files
            self._opened = open_evaluated(str(files.graph or files.path), self.what)
        return self._opened

    def _known(self, about: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result from the cache, or measured now and kept."""
        key = {**self._key, **about}
        data = self.cache.get(key)
        if data is None:
            data = measure()
            self.form.files.check_unchanged()
            self.cache.put(key, data)
        else:
            self.form.cached += 1
        return dict(data)


def _runner_and_dtype(form: Measured) -> tuple[str, str]:
    """The same for all results of a form."""
    results: list[PerplexityResult | TaskResult] = [*form.perplexities, *form.tasks]
    return results[0].runner, results[0].dtype


def _device_name(device: str) -> str:
    """What computes: rounding differs from processor to processor."""
    found = torch.device(device)
    if found.type == "cuda":
        return f"{found} {torch.cuda.get_device_name(found)}"
    return f"{found} {machine().get('cpu', '')}"


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare_forms(found: Sequence[Measured], tasks: Sequence[HarnessTask], what: Evaluation) -> dict[str, Any]:
    """Figures, differences to the first form, and their tests.

    Args:
        found: the forms with their results, the first one to compare with.
        tasks: the tasks of the results, for their aggregations.
        what: what was measured.

    Returns:
        See `run_comparison`.
    """
    quality = [_text_entry(found, index) for index in range(len(found[0].perplexities))]
    for index, task in enumerate(tasks):
        quality += _task_entries(found, index, task)
    differences = [difference for entry in quality for difference in entry["differences"]]
    for difference, p in zip(differences, holm([each["p"] for each in differences]), strict=True):
        difference["p_holm"] = p
    used = {each["test"] for each in differences}
    return {
        "forms": [
            {
                "name": form.name,
                "where": form.where,
                "runtime": form.runtime,
                "dtype": form.dtype,
                "file_bytes": form.files.size,
                "sha256": form.files.sha256,
                "cached": form.cached,
                "seconds": form.seconds,
            }
            for form in found
        ],
        "quality": quality,
        "tests": {name: TESTS[name] for name in TESTS if name in used},
        "settings": {
            name: value
            for name, value in (
                ("window", what.window if what.ppl else None),
                ("windows", what.windows),
                ("limit", what.limit),
                ("max_length", what.max_length),
                ("batch_size", what.batch_size),
                ("dtype", what.dtype),
                ("device", what.device),
            )
            if value is not None
        },
        "machine": machine(),
        "versions": versions(),
    }


def _text_entry(found: Sequence[Measured], index: int) -> dict[str, Any]:
    """Perplexity on one text; the difference is that of its logarithm, in nats a token."""
    results = [form.perplexities[index] for form in found]
    entry: dict[str, Any] = {
        "text": results[0].text,
        "metric": "perplexity",
        "better": "lower",
        "scale": "log",
        "definition": results[0].definition,
        "figures": [_figure(form, r.perplexity, r.standard_error, r.windows, r.perplexity)
                    for form, r in zip(found, results, strict=True)],
        "differences": [],
    }  # fmt: skip
    other_tokens = []
    for form, result in zip(found[1:], results[1:], strict=True):
        if result.tokens_sha256 != results[0].tokens_sha256:
            other_tokens.append(form.name)
        elif test := paired_test(results[0].losses, result.losses):
            ratio = {"ratio": math.exp(test.difference), "ratio_ci": [math.exp(end) for end in test.ci]}
            entry["differences"].append(_difference(form, test) | ratio)
    if other_tokens:
        entry["note"] = (
            f"{', '.join(other_tokens)}: the tokenizer makes other tokens of this text, so this perplexity does not "
            f"compare with that of {found[0].name}"
        )
    elif len(results[0].losses) < 2:
        entry["note"] = "one window alone has no standard error and no test; use a longer text or shorter windows"
    return entry


def _task_entries(found: Sequence[Measured], index: int, task: HarnessTask) -> list[dict[str, Any]]:
    """One entry for each metric of a task."""
    results = [form.tasks[index] for form in found]
    entries = []
    for metric in results[0].metrics:
        figures = [result[metric.name] for result in results]
        aggregate = task.task.aggregation().get(metric.source) if metric.source else None
        if getattr(aggregate, "__name__", "") == "mean":
            aggregate = None
        entry: dict[str, Any] = {
            "text": results[0].task,
            "metric": metric.name,
            "scale": "absolute",
            "definition": f"{metric.name}: {metric.definition}",
            "figures": [_figure(form, figure.value, figure.standard_error, result.documents)
                        for form, figure, result in zip(found, figures, results, strict=True)],
            "differences": [],
        }  # fmt: skip
        if metric.higher_is_better is not None:
            entry["better"] = "higher" if metric.higher_is_better else "lower"
        for form, figure in zip(found[1:], figures[1:], strict=True):
            if metric.items and (test := paired_test(metric.items, figure.items, aggregate)):
                entry["differences"].append(_difference(form, test))
        if not entry["differences"]:
            entry["note"] = "no paired test: there are no finite figures of single documents, or just one document"
        entries.append(entry)
    return entries


def _figure(form: Measured, value: float, error: float | None, items: int, factor: float = 1.0) -> dict[str, Any]:
    """A figure; `factor` carries the error of a logarithm to the figure itself (first order)."""
    figure: dict[str, Any] = {"form": form.name, "value": value, "items": items}
    return figure if error is None else figure | {"stderr": error * factor}


def _difference(form: Measured, test: PairedTest) -> dict[str, Any]:
    data = {"form": form.name, **dataclasses.asdict(test)}
    data["stderr"] = data.pop("standard_error")
    data["ci"] = list(test.ci)
    return {key: value for key, value in data.items() if value is not None}
