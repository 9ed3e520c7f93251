"""Zero-shot tasks of lm-eval's harness, on any form of a model: figures, standard errors, and what repeats them.

lm-eval builds the prompts and computes its metrics; here a task meets a model, and each figure gets a standard error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import UsageError
from fxprune.evaluation.harness_tasks import DataFile, HarnessTask, load_tasks, quiet
from fxprune.runtimes.batching import BatchSize, check_batch_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

    from fxprune.runtimes.runners import Runner

__all__ = ["DEFINITIONS", "METRIC_NAMES", "Metric", "TaskResult", "check_limits", "evaluate_tasks", "standard_error"]

METRIC_NAMES: Mapping[str, Mapping[str, str]] = {
    "lambada_openai": {"acc": "last_word_accuracy"},
    "lambada_standard": {"acc": "last_word_accuracy"},
}
"""Names for lm-eval's metrics where its own would be taken for another figure."""

_LAST_TOKEN = "last_token_accuracy"  # noqa: S105 - the name of a metric
DEFINITIONS: Mapping[str, str] = {
    "perplexity": "lm-eval's perplexity: exp of the mean negative log-likelihood of whole continuations, such as words",
    "last_word_accuracy": "lm-eval's acc: every token of the last word is the most likely one after all before it",
    _LAST_TOKEN: "the last token of the continuation is the most likely one after all before it",
}
"""What the metrics mean whose names do not say it."""

_FEWSHOT_SEED = 1234  # lm-eval's default
_RESAMPLES = 500  # of the bootstrap: a standard error that is itself known to 3%


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Attributes:
        name: lm-eval's, or the one in `METRIC_NAMES`; with the filter's name after a comma where there are several.
        value: the aggregate over the documents.
        standard_error: over the documents: sample standard deviation / sqrt(n) for means, for other aggregates the
            standard deviation over 500 bootstrap resamples; None for a single document.
        higher_is_better: None when lm-eval does not say.
        definition: how it is defined, as a sentence.
        source: lm-eval's name of the metric, whose aggregation it has; None for our own, which are means.
        items: what each document contributes, in order, for paired tests; empty where it is not JSON data.
    """

    name: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    definition: str
    source: str | None = None
    items: tuple[Any, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task, and what is needed to repeat them.

    Attributes:
        task: lm-eval's name.
        version: of lm-eval's task.
        num_fewshot: examples in the prompt.
        documents: how many were used.
        available: how many the split has.
        limit: the most that were asked for; None for all.
        metrics: the figures.
        dataset: hub id and configuration of the data set; `json` for local files.
        files: the local files.
        documents_sha256: of the documents used, in order.
        runner: which form of the model it was.
        dtype: of the logits, such as `"bfloat16"`.
        max_length: the most tokens of a sequence.
        batch_size: as asked for.
        lm_eval_version: of the package.
        seconds: wall time of requests, forwards and metrics; the data was loaded before.
    """

    task: str
    version: str
    num_fewshot: int
    documents: int
    available: int
    limit: int | None
    metrics: tuple[Metric, ...]
    dataset: str
    files: tuple[DataFile, ...]
    documents_sha256: str
    runner: str
    dtype: str
    max_length: int
    batch_size: BatchSize
    lm_eval_version: str
    seconds: float

    def __getitem__(self, name: str) -> Metric:
        """The metric of a name.

        Raises:
            KeyError: there is none.
        """
        return {metric.name: metric for metric in self.metrics}[name]

    def as_dict(self, *, items: bool = False) -> dict[str, Any]:
        """For JSON; what the single documents contribute only with `items`."""
        data = dataclasses.asdict(self)
        for metric in data["metrics"] if not items else ():
            del metric["items"], metric["source"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """A result again from `as_dict(items=True)`, or from its JSON."""
        metrics = tuple(Metric(**{**metric, "items": tuple(metric["items"])}) for metric in data["metrics"])
        return cls(**{**data, "metrics": metrics, "files": tuple(DataFile(**file) for file in data["files"])})


def evaluate_tasks(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | HarnessTask],
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    batch_size: BatchSize = "auto",
    device: torch.device | str = "cpu",
    max_length: int | None = None,
) -> list[TaskResult]:
    """Run tasks on a model.

    Args:
        runner: any form of the model.
        tokenizer: the model's own.
        tasks: names that lm-eval knows, or what `load_tasks` returned, to load the data once for several models.
        data: directory with local files, see `TASK_FILES`; the hub when None.
        limit: use the first so many documents of each task.
        batch_size: sequences at once; `"auto"` finds it from the available memory.
        device: where the runner wants its inputs.
        max_length: the most tokens of a sequence; the model's own limit when None.

    Returns:
        A result for each task, in their order; groups and tags count as their tasks.

    Raises:
        UsageError: a task is unknown, an option is out of range, or a batch does not fit in memory.
        CalibrationError: `lm-eval` is not installed, or data is missing or not what the task needs.
        CheckpointError: the tokenizer lacks what tasks need.
        VerificationError: the model returned numbers that are not finite.
    """
    check_limits(limit, max_length)
    check_batch_size(batch_size)
    loaded = [
        ready for task in tasks for ready in ([task] if isinstance(task, HarnessTask) else load_tasks([task], data))
    ]
    from fxprune.evaluation.harness_model import RunnerLM  # noqa: PLC0415 - needs the optional lm-eval, which load_tasks checks

    model = RunnerLM(runner, tokenizer, batch_size=batch_size, max_length=max_length, device=device)
    return [_run(task, model, limit) for task in loaded]


def check_limits(limit: int | None, max_length: int | None) -> None:
    """Refuse limits that no run could accept.

    Raises:
        UsageError: `limit` is below 1, or `max_length` below 2.
    """
    if (limit is not None and limit < 1) or (max_length is not None and max_length < 2):
        raise UsageError(f"limit must be at least 1 and max_length at least 2; got {limit} and {max_length}")


def _run(ready: HarnessTask, model: Any, limit: int | None) -> TaskResult:
    """One task through lm-eval's evaluator."""
    from lm_eval.evaluator import evaluate  # noqa: PLC0415 - optional and slow to import

    start = time.perf_counter()
    task = ready.task
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with quiet():
        report = evaluate(
            lm=model, task_dict={"tasks": {ready.name: task}}, limit=limit, bootstrap_iters=0, log_samples=True
        )
    samples = report["samples"][ready.name]
    first = samples[0]["filter"]
    documents = [sample for sample in samples if sample["filter"] == first]
    return TaskResult(
        task=ready.name,
        version=str(report["versions"][ready.name]),
        num_fewshot=int(report["n-shot"][ready.name]),
        documents=len(documents),
        available=len(task.eval_docs),
        limit=limit,
        metrics=tuple(_metrics(ready, report, samples, model.last_token)),
        dataset=ready.dataset,
        files=ready.files,
        documents_sha256=hashlib.sha256("".join(sample["doc_hash"] for sample in documents).encode()).hexdigest(),
        runner=model.scorer.runner.name,
        dtype=model.scorer.dtype,
        max_length=model.max_length,
        batch_size=model.scorer.batch_size,
        lm_eval_version=version("lm_eval"),
        seconds=time.perf_counter() - start,
    )


def _metrics(
    ready: HarnessTask, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], last_token: Mapping[Any, bool]
) -> Iterator[Metric]:
    """lm-eval's figures with our standard errors, then our own."""
    better = report["higher_is_better"][ready.name]
    filters = {sample["filter"] for sample in samples}
    for key, value in report["results"][ready.name].items():
        name, _, used = key.partition(",")
        if used not in filters or name.endswith("_stderr") or not isinstance(value, Real):
            continue
        items = [sample[name] for sample in samples if sample["filter"] == used and name in sample["metrics"]]
        aggregate = ready.task.aggregation().get(name)
        shown = METRIC_NAMES.get(ready.name, {}).get(name, name)
        default = f"lm-eval's {name}" + (f", aggregated by {_name(aggregate)}" if aggregate else "")
        yield Metric(
            shown if len(filters) == 1 else f"{shown},{used}",
            float(value),
            standard_error(items, aggregate),
            better.get(name),
            DEFINITIONS.get(shown, default),
            name,
            _plain_items(items),
        )
    if ready.task.OUTPUT_TYPE == "loglikelihood" and last_token:
        hits = [float(hit) for hit in last_token.values()]
        yield Metric(
            name=_LAST_TOKEN,
            value=statistics.fmean(hits),
            standard_error=standard_error(hits, None),
            higher_is_better=True,
            definition=DEFINITIONS[_LAST_TOKEN],
            items=tuple(hits),
        )


def _plain_items(items: Sequence[Any]) -> tuple[Any, ...]:
    """What documents contribute as JSON data; nothing where it cannot be."""
    try:
        return tuple(json.loads(json.dumps(list(items), default=_plain_number)))
    except TypeError:  # some metrics pass objects of their own around
        return ()


def _plain_number(value: Any) -> float:
    """Numbers of numpy and torch, which JSON does not know."""
    if isinstance(value, Real) or getattr(value, "shape", None) == ():
        return float(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def standard_error(items: Sequence[Any], aggregate: Callable[[Sequence[Any]], Any] | None) -> float | None:
    """Standard error of an aggregate over documents: how much it would vary had others been drawn.

    Args:
        items: what each document contributes.
        aggregate: from items to the figure; None for the mean.

    Returns:
        For a mean the sample standard deviation / sqrt(n), else the standard deviation over 500 bootstrap resamples
        (seed 0; Efron and Tibshirani, An Introduction to the Bootstrap, chapter 6); None for a single item.
    """
    if len(items) < 2:
        return None
    if aggregate is None or _name(aggregate) == "mean":
        return statistics.stdev(float(item) for item in items) / math.sqrt(len(items))
    choose = random.Random(0)  # noqa: S311 - a bootstrap, not a secret
    return statistics.stdev(float(aggregate(choose.choices(items, k=len(items)))) for _ in range(_RESAMPLES))
