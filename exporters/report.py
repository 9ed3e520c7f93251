"""The report: `report.json` for machines, `report.html` for people, `report.md` for terminals and pull requests.

The JSON has the fields of `Report`. Whatever was not run is absent: never zero, never null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxprune.core.errors import ExportError
from fxprune.exporters.report_markdown import cell, table_lines
from fxprune.exporters.report_page import headline, mask_facts, percent, si, sparsity_facts, spread, times
from fxprune.exporters.report_structured import budget_rows, structured_facts

if TYPE_CHECKING:
    from fxprune.evaluation.perplexity import PerplexityResult

__all__ = ["Report", "markdown_summary", "perplexity_entry", "read_report", "validate_report"]

Share = Annotated[float, Field(le=1.0)]
Count = Annotated[int, Field(ge=0)]
Time = Annotated[float, Field(ge=0)]


# ---- the schema ----------------------------------------------------------------------------------------------------


class _Section(BaseModel):
    """A part of the report. A key whose value is None was not run and is dropped; facts of one's own may be added."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_what_was_not_run(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


class Params(_Section):
    """Parameters, tied tensors counted once, and the shares of them that are gone."""

    dense: Count | None = None
    slim: Count | None = None
    dense_blocks: Count | None = None
    slim_blocks: Count | None = None
    removed_share_blocks: Share | None = None
    removed_share_all: Share | None = None
    mask_sparsity: Share | None = None


class Macs(_Section):
    """MACs per token of all Linears, output projection included."""

    dense: Count | None = None
    slim: Count | None = None
    removed_share: Share | None = None
    lm_head_dense: Count | None = None
    lm_head_slim: Count | None = None


class Size(_Section):
    """Bytes on disk or in memory, dense and slim."""

    dense: Count | None = None
    slim: Count | None = None


class GroupEntry(_Section):
    """One group: how many of its units there were and how many are kept (for attention: query heads)."""

    name: str
    kind: str
    layer: int | None = None
    dense: Count
    kept: Count
    unit: str | None = None
    kv_dense: Count | None = None
    kv_kept: Count | None = None


class LinearEntry(_Section):
    """One Linear whose weights were pruned: the error is that of its output on the calibration text, squared, relative.

    Without calibration text (`tokens` is 0) it is that of its weight.
    """

    name: str
    target: str
    shape: list[Count] | None = None
    removed: Share | None = None
    error: float | None = None
    tokens: Count | None = None
    seconds: Time | None = None
    notes: dict[str, Any] | None = None


class DistilledEntry(_Section):
    """What distillation behind the pruning did; divergences in nats a token, on samples that were held out."""

    steps: int
    samples: int
    held_out: int
    before: float
    after: float
    kept: bool


class Sparsity(_Section):
    """Weights that were set to zero; shapes stay. `removed_share` is of the pruned Linears' weights alone."""

    method: str
    target: str
    allocation: str | None = None
    removed_share: Share
    weights: Count | None = None
    pruned_linears: Count
    dense_linears: list[str] | None = None
    mean_error: float | None = None
    distilled: DistilledEntry | None = None
    linears: list[LinearEntry] | None = None
    speed: str | None = None
    seconds: dict[str, Time] | None = None


class ConsumerEntry(_Section):
    """One Linear that reads pruned units: what its reconstruction chose, and its error on held-out text."""

    name: str
    choice: str | None = None
    bias: bool | None = None
    error: float | None = None
    plain_error: float | None = None


class Structured(_Section):
    """How units were removed; `removed_share` is of the block Linears' parameters."""

    method: str
    target: str
    removed_share: Share | None = None
    uniform: bool | None = None
    reconstruct: str | None = None
    second_order_steps: list[dict[str, float]] | None = None
    distilled: DistilledEntry | None = None
    consumers: list[ConsumerEntry] | None = None
    left_alone: dict[str, str] | None = None
    seconds: dict[str, Time] | None = None


class GuardEntry(_Section):
    """Perplexity of one of the guard's texts; `rise` is that of its logarithm, dense to slim, in nats."""

    role: str
    text: str
    source: str | None = None
    windows: Count
    window: Count
    dense: float
    slim: float
    rise: float
    rise_stderr: float | None = None


class GuardSection(_Section):
    """Whether text unlike the calibration text suffers more than text like it, see `fxprune.flows.guard`."""

    texts: list[GuardEntry]
    limit: float
    standard_errors: float
    difference: float | None = None
    difference_stderr: float | None = None
    warning: str | None = None
    note: str | None = None
    seconds: Time | None = None


class GateSection(_Section):
    """The verdict of the speed gate, see `fxprune.measure.bench_gate`."""

    passed: bool
    target: float | None = None
    threshold: float
    cases: list[dict[str, Any]]
    reasons: list[str]


class VerifyEntry(_Section):
    """One rung of the verification ladder."""

    rung: str
    max_abs_error: float | None = None
    tolerance: float | None = None
    passed: bool
    detail: str | None = None


class SpeedEntry(_Section):
    """One case of the benchmark; the bound is the speed-up if time followed `bound_kind`."""

    runtime: str
    case: str
    threads: int | None = None
    repeats: int | None = None
    dense_ms: Time
    slim_ms: Time
    speedup: Time
    ci: tuple[Time, Time] | None = None
    bound: Time | None = None
    bound_kind: str | None = None


class QualityEntry(_Section):
    """One figure of quality on one text or task; `better` says which direction is."""

    text: str
    metric: str
    dense: float | None = None
    slim: float | None = None
    dense_stderr: float | None = None
    slim_stderr: float | None = None
    better: Literal["lower", "higher"] | None = None


class BudgetEntry(_Section):
    """One of several budgets, in its own directory `name`, with the main figures of its own report."""

    name: str
    target: str
    params: Params | None = None
    macs: Macs | None = None
    quality: list[QualityEntry] | None = None
    guard: GuardSection | None = None
    speed: list[SpeedEntry] | None = None
    gate: GateSection | None = None


class BudgetSection(_Section):
    """Several budgets of one calibration; nested: each keeps nothing but what the one before keeps."""

    nested: bool
    entries: list[BudgetEntry]


class PatternEntry(_Section):
    """An N:M pattern that weights had, and how many of their groups of M neighbours still hold it."""

    pattern: str
    linears: Count
    groups: Count
    holding: Count


class MasksSection(_Section):
    """Single weights that are held at zero in what is left of the model."""

    linears: Count
    weights: Count
    zeros: Count
    share: Share
    patterns: list[PatternEntry] | None = None


class HistoryEntry(_Section):
    """One pass that ran."""

    name: str
    options: dict[str, Any] | None = None
    modified: bool | None = None
    seconds: Time | None = None
    details: dict[str, Any] | None = None


class Report(_Section):
    """Everything a run found out. All sections are optional; unknown ones go under `details`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    model_class: str | None = None
    method: str | None = None
    seed: int | None = None
    params: Params | None = None
    macs: Macs | None = None
    file_bytes: Size | None = None
    groups: list[GroupEntry] | None = None
    sparsity: Sparsity | None = None
    masks: MasksSection | None = None
    structured: Structured | None = None
    budgets: BudgetSection | None = None
    verify: list[VerifyEntry] | None = None
    speed: list[SpeedEntry] | None = None
    gate: GateSection | None = None
    quality: list[QualityEntry] | None = None
    guard: GuardSection | None = None
    calibration: str | dict[str, Any] | None = None
    history: list[HistoryEntry] | None = None
    seconds: dict[str, Time] | None = None
    peak_rss_bytes: Count | None = None
    machine: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    details: dict[str, Any] | None = None


def validate_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Check a report against the schema and return it as plain JSON data, absent sections left out.

    Infinite and undefined figures become the strings `"Infinity"`, `"-Infinity"` and `"NaN"`, which JSON lacks.

    Raises:
        ExportError: a section is unknown or has the wrong form; the message lists every place.
    """
    try:
        text = Report.model_validate(dict(report)).model_dump_json(exclude_unset=True)
    except ValidationError as error:
        places = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ExportError(
            f"the report cannot be written: {places} (sections of your own belong under 'details')"
        ) from error
    except ValueError as error:  # pydantic's serializer: a value under `details` or in an entry is not JSON
        raise ExportError(f"the report cannot be written: it holds a value that is not JSON ({error})") from error
    data: dict[str, Any] = json.loads(text)
    return data


def perplexity_entry(dense: PerplexityResult | None, slim: PerplexityResult | None) -> dict[str, Any]:
    """An entry of `quality` from perplexities of the dense and the slim form on the same tokens.

    The standard error of a perplexity is the perplexity times the standard error of its mean log-likelihood (first
    order).

    Raises:
        ExportError: neither form was measured, or the two were measured on different tokens.
    """
    measured = {form: result for form, result in (("dense", dense), ("slim", slim)) if result is not None}
    if len({result.tokens_sha256 for result in measured.values()}) != 1:
        raise ExportError(
            "a perplexity entry needs figures over the very same tokens; evaluate both forms with the same text, "
            "tokenizer, window and number of windows"
        )
    result = next(iter(measured.values()))
    entry: dict[str, Any] = {"text": result.text, "metric": "perplexity", "better": "lower"}
    for form, result in measured.items():
        entry[form] = result.perplexity
        if result.standard_error is not None:
            entry[f"{form}_stderr"] = result.perplexity * result.standard_error
    return entry | {"definition": result.definition, "tokens": result.tokens, "tokens_sha256": result.tokens_sha256}


# ---- writing and reading -------------------------------------------------------------------------------------------


def read_report(path: Path | str) -> dict[str, Any]:
    """Read a `report.json` back, checked against the schema; figures that JSON lacks are floats again.

    Raises:
        ExportError: the file cannot be read or is no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return Report.model_validate(data).model_dump(exclude_unset=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is not a readable report: {error}") from error


# ---- Markdown ------------------------------------------------------------------------------------------------------


def markdown_summary(report: Mapping[str, Any]) -> str:
    """A short Markdown summary: headline, then tables of what was run.

    Raises:
        ExportError: the report does not follow the schema.
    """
    data = Report.model_validate(validate_report(report)).model_dump(exclude_unset=True)
    title = cell(data.get("model", "fxprune report"))
    named = [cell(data[key]) for key in ("model_class", "method") if key in data]
    lines = [f"### {', '.join([title, *named])}"]
    facts = headline(data)
    for clauses in (facts, sparsity_facts(data), mask_facts(data), structured_facts(data.get("structured", {}))):
        if clauses:
            lines += ["", "; ".join(cell(fact.text) for fact in clauses) + "."]
    lines += table_lines(
        ("figure", "dense", "slim", "removed"),
        [
            (label, si(section["dense"]), si(section["slim"]), percent(section.get(share)))
            for label, key, share in (
                ("parameters", "params", "removed_share_all"),
                ("MACs per token", "macs", "removed_share"),
            )
            if {"dense", "slim"} <= (section := data.get(key, {})).keys()
        ],
    )
    if "budgets" in data:
        lines += table_lines(*budget_rows(data["budgets"]))
    lines += table_lines(
        ("quality", "metric", "dense", "slim"),
        [
            (entry["text"], entry["metric"], spread(entry, "dense"), spread(entry, "slim"))
            for entry in data.get("quality", [])
        ],
    )
    lines += table_lines(
        ("speed", "runtime", "threads", "dense ms", "slim ms", "speed-up", "95% interval", "bound"),
        [
            (
                entry["case"],
                entry["runtime"],
                str(entry.get("threads", "")),
                f"{entry['dense_ms']:.4g}",
                f"{entry['slim_ms']:.4g}",
                times(entry["speedup"]),
                " to ".join(f"{end:.2f}" for end in entry.get("ci", ())),
                times(entry["bound"]) + f" ({entry.get('bound_kind', '?')})" if "bound" in entry else "",
            )
            for entry in data.get("speed", [])
        ],
    )
    lines += table_lines(
        ("verification", "max abs error", "tolerance", "result"),
        [
            (
                entry["rung"],
                f"{entry['max_abs_error']:.2g}" if "max_abs_error" in entry else "",
                f"{entry['tolerance']:.2g}" if "tolerance" in entry else "",
                ("passed" if entry["passed"] else "**failed**")
                + (f" ({cell(entry['detail'])})" if entry.get("detail") else ""),
            )
            for entry in data.get("verify", [])
        ],
        keep_last=True,
    )
    return "\n".join(lines) + "\n"
