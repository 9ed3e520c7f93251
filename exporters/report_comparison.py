"""The report of a comparison: `report.json`, `report.html` and `report.md` for several forms against the first.

What was not run is absent, as in the report of a run; the page is as self-contained as that one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxprune.core.errors import ExportError
from fxprune.exporters.chart_kit import TIMES
from fxprune.exporters.charts import difference_chart
from fxprune.exporters.report_files import write_files
from fxprune.exporters.report_markdown import cell, table_lines
from fxprune.exporters.report_page import environment
from fxprune.exporters.report_structured import trusted
from fxprune.exporters.report_text import Fact, Table, binary, duration, make_table, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Comparison", "comparison_markdown", "comparison_page", "write_comparison"]

_SURE = 0.05


# ---- the schema ----------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings", protected_namespaces=())


class FormEntry(_Part):
    """One form: what it is, how large its files are, and how many of its results had been kept."""

    name: str
    where: str
    runtime: str
    dtype: str
    file_bytes: int = Field(ge=0)
    sha256: str
    cached: int = Field(ge=0)
    seconds: float = Field(ge=0)


class FigureEntry(_Part):
    """A form's figure on a text or task, over `items` windows or documents."""

    form: str
    value: float
    stderr: float | None = None
    items: int


class DifferenceEntry(_Part):
    """A form less the first one, on the same items; `ratio` is exp of a difference of logarithms."""

    form: str
    difference: float
    stderr: float
    ci: tuple[float, float]
    p: float
    p_holm: float
    test: str
    pairs: int
    gained: int | None = None
    lost: int | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None


class ComparedEntry(_Part):
    """One metric on one text or task; with `scale` `log` the differences are of its logarithm."""

    text: str
    metric: str
    better: Literal["lower", "higher"] | None = None
    scale: Literal["log", "absolute"]
    definition: str
    figures: list[FigureEntry]
    differences: list[DifferenceEntry]
    note: str | None = None


class Comparison(_Part):
    """Forms of a model, their figures, and differences to the first with their tests."""

    model_config = ConfigDict(extra="forbid")

    forms: list[FormEntry] = Field(min_length=2)
    quality: list[ComparedEntry]
    tests: dict[str, str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]


def _checked(comparison: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A comparison as plain JSON data, and with figures that JSON lacks as floats."""
    try:
        model = Comparison.model_validate(dict(comparison))
        text = model.model_dump_json(exclude_unset=True)
    except ValidationError as error:
        places = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ExportError(f"the comparison cannot be written: {places}") from error
    return json.loads(text), model.model_dump(exclude_unset=True)


def write_comparison(comparison: Mapping[str, Any], directory: Path | str) -> Path:
    """Write `report.json`, `report.html` and `report.md`, see `fxprune.exporters.report_files.write_files`.

    Args:
        comparison: the sections of `Comparison`, see `fxprune.flows.comparison.run_comparison`.
        directory: where the files go; it is created if need be.

    Returns:
        The path of `report.html`.

    Raises:
        ExportError: the comparison does not follow the schema.
        OutputError: the files cannot be written.
    """
    data, _ = _checked(comparison)
    return write_files(directory, data, comparison_page(comparison), comparison_markdown(comparison))[1]


# ---- words ---------------------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    """A difference with its sign and three digits."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _difference(difference: Mapping[str, Any]) -> str:
    """A ratio with its interval for perplexities, the difference ± its standard error for the rest."""
    if "ratio" in difference:
        middle = difference["ratio"]
        low, high = difference["ratio_ci"]
        # Close to 1 four digits of the ratio would be one or two of the difference.
        style = ".4f" if abs(middle - 1) < 0.1 else ".4g"
        return f"{TIMES}{middle:{style}} ({low:{style}} to {high:{style}})"
    return f"{_signed(difference['difference'])} ± {difference['stderr']:.2g}"


def _probability(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _verdict(entry: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    """What the corrected test says: better, worse, or that no difference is shown."""
    if difference["p_holm"] >= _SURE:
        return "none shown"
    if "better" not in entry:
        return "differs"
    return "better" if (difference["difference"] > 0) == (entry["better"] == "higher") else "worse"


def _value(figure: Mapping[str, Any]) -> str:
    return number(figure["value"]) + (f" ± {figure['stderr']:.2g}" if "stderr" in figure else "")


_FIGURES = ("Text or task", "Metric")
_DIFFERENCES = ("Text or task", "Metric", "Form", "Difference", "p", "p, corrected", "Verdict", "Test")
_SHORT = ("Form", "Text or task", "Verdict", "Difference", "p, corrected")


def _figure_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = [form["name"] for form in data["forms"]]
    rows = []
    for entry in data["quality"]:
        values = {figure["form"]: _value(figure) for figure in entry["figures"]}
        better = f" ({entry['better']} is better)" if "better" in entry else ""
        rows.append((entry["text"], entry["metric"] + better, *(values.get(name, "") for name in names)))
    return rows


def _difference_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            entry["text"],
            entry["metric"],
            difference["form"],
            _difference(difference),
            _probability(difference["p"]),
            _probability(difference["p_holm"]),
            _verdict(entry, difference),
            difference["test"]
            + (f": {difference['gained']} gained, {difference['lost']} lost" if "gained" in difference else ""),
        )
        for entry in data["quality"]
        for difference in entry["differences"]
    ]


def _short_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What fits a phone; all columns stand in a table of their own."""
    return [
        (form, f"{text}, {metric}", verdict, difference, corrected)
        for text, metric, form, difference, _, corrected, verdict, _ in _difference_rows(data)
    ]


def _form_rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    first = data["forms"][0]["file_bytes"]
    return [
        (
            form["name"],
            f"{form['runtime']}, {form['dtype']}",
            binary(form["file_bytes"]),
            f"{form['file_bytes'] / first:.1%}" if first else "",
            duration(form["seconds"]) + (f" ({form['cached']} results kept from before)" if form["cached"] else ""),
        )
        for form in data["forms"]
    ]


_FORMS = ("Form", "Runtime", "Files", "Of the first", "Time")


def _headline(data: Mapping[str, Any]) -> list[Fact]:
    """For each other form: its first figure against that of the first form, and how many differences are shown."""
    facts = []
    for form in data["forms"][1:]:
        own = [
            (entry, difference)
            for entry in data["quality"]
            for difference in entry["differences"]
            if difference["form"] == form["name"]
        ]
        if not own:
            continue
        entry, difference = own[0]
        value = f"{TIMES}{difference['ratio']:.4g}" if "ratio" in difference else _signed(difference["difference"])
        worse = sum(_verdict(*pair) == "worse" for pair in own)
        text = f"{form['name']}: {entry['metric']} on {entry['text']} {_difference(difference)}"
        text += f", surely worse in {worse} of {len(own)}"
        facts.append(Fact(value, f"{entry['metric']}, {form['name']}", text))
    return facts


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [f"{entry['text']}: {entry['note']}" for entry in data["quality"] if "note" in entry]
    tests = [f"{name}: {text}." for name, text in data["tests"].items()]
    if tests:
        tests.append(
            f"p, corrected: for the number of differences in this report (Holm 1979); below {_SURE} a difference "
            "counts as shown. No difference shown does not mean that there is none."
        )
    return list(dict.fromkeys([*notes, *tests]))


# ---- Markdown and the page -----------------------------------------------------------------------------------------


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown, for pull requests.

    Raises:
        ExportError: it does not follow the schema.
    """
    _, data = _checked(comparison)
    names = [form["name"] for form in data["forms"]]
    lines = [f"### {cell(' against '.join([', '.join(names[1:]), names[0]]))}"]
    if facts := _headline(data):
        lines += ["", *(f"- {cell(fact.text)}" for fact in facts)]
    lines += table_lines(_FORMS, _form_rows(data))
    lines += table_lines((*_FIGURES, *names), _figure_rows(data))
    lines += table_lines(_DIFFERENCES, _difference_rows(data))
    details = [*_notes(data), *dict.fromkeys(entry["definition"] for entry in data["quality"])]
    lines += ["", "<details><summary>How this was measured</summary>", ""]
    lines += [f"- {cell(text)}" for text in details]
    lines += [f"- {cell(key)}: {cell(str(value))}" for key, value in data["settings"].items()]
    return "\n".join([*lines, "", "</details>"]) + "\n"


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The comparison as one self-contained HTML document.

    Raises:
        ExportError: it does not follow the schema.
    """
    _, data = _checked(comparison)
    names = [form["name"] for form in data["forms"]]
    facts = _headline(data)
    chart = difference_chart(data["quality"])
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title=f"{', '.join(names[1:])} against {names[0]}",
            subtitle=[f"fxprune {data['versions']['fxprune']}"] if "fxprune" in data["versions"] else [],
            facts=facts,
            sentence="; ".join(fact.text for fact in facts),
            forms=make_table(_FORMS, _form_rows(data), (2, 3)),
            chart=trusted(chart) if chart else None,
            figures=make_table((*_FIGURES, *names), _figure_rows(data), range(2, 2 + len(names))),
            differences=make_table(_SHORT, _short_rows(data), (3, 4)),
            tests=make_table(_DIFFERENCES, _difference_rows(data), (3, 4, 5)),
            notes=_notes(data),
            definitions=list(dict.fromkeys(entry["definition"] for entry in data["quality"])),
            settings=_plain_table(data["settings"]),
            hashes=make_table(("Form", "Where", "SHA-256 of its files"), _hash_rows(data["forms"])),
            machine=_plain_table(data["machine"]),
            versions=_plain_table(data["versions"]),
        )
    )


def _hash_rows(forms: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(form["name"], form["where"], form["sha256"]) for form in forms]


def _plain_table(facts: Mapping[str, Any]) -> Table | None:
    rows = []
    for key, value in facts.items():
        shown = binary(value) if key.endswith("_bytes") else value if isinstance(value, str) else json.dumps(value)
        rows.append((key.replace("_", " "), shown))
    return make_table(("", ""), rows)
