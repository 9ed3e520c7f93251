"""Sections of the report about structured pruning: choices by consumer, the guard, the speed gate, several budgets."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fxprune.exporters.charts import CurvePanel, curve_chart, error_chart, error_series
from fxprune.exporters.report_learning import learning_chart, learning_facts, learning_panels
from fxprune.exporters.report_text import (
    Fact,
    distilled_facts,
    duration,
    make_table,
    number,
    percent,
    si,
    stages,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.exporters.charts import Chart
    from fxprune.exporters.report_text import Table

__all__ = ["budget_rows", "budget_sections", "structured_facts", "structured_sections", "trusted", "warning_facts"]


def trusted(chart: Chart | None) -> dict[str, Markup] | None:
    """The two drawings of a chart for the template."""
    if chart is None:
        return None
    # ElementTree wrote this SVG: every name in it is escaped.
    return {"wide": Markup(chart.wide), "narrow": Markup(chart.narrow)}  # noqa: S704 - see above


def warning_facts(report: Mapping[str, Any]) -> list[Fact]:
    """What must not be overlooked: texts that part ways, a speed gate that failed; of all budgets."""
    parts = [("", report)] + [(f" ({entry['name']})", entry) for entry in report.get("budgets", {}).get("entries", [])]
    facts = []
    for where, part in parts:
        guard, gate = part.get("guard", {}), part.get("gate")
        if "warning" in guard:
            text = f"guard{where}: {guard['warning']}"
            facts.append(Fact("warning", f"guard: the texts part ways{where}", text, "bad"))
        if gate is not None:
            value = "passed" if gate["passed"] else "failed"
            wanted = (
                f"speed gate{where}, {times(gate['target'])} within 5%" if "target" in gate else f"speed gate{where}"
            )
            text = f"{wanted}: {value}" + "".join(f"; {reason}" for reason in gate.get("reasons", []))
            facts.append(Fact(value, wanted, text, "" if gate["passed"] else "bad"))
    return facts


# ---- one pruned model ----------------------------------------------------------------------------------------------


def structured_facts(section: Mapping[str, Any]) -> list[Fact]:
    """How a model was pruned, in a few clauses."""
    if not section:
        return []
    consumers = section.get("consumers", [])
    how = f"{section['method']}, {section['target']}" + (", uniform" if section.get("uniform") else "")
    facts = [Fact(how, "Method", how)]
    if "removed_share" in section:
        value = percent(section["removed_share"])
        facts.append(Fact(value, "Removed", f"{value} of the block Linears' parameters removed"))
    if timed := section.get("timed_plans"):
        value = ", then ".join(f"{times(one['predicted'])}, measured {times(one['measured'])}" for one in timed)
        facts.append(Fact(value, "Plans timed", f"plans that the latency table predicted at {value}"))
    if "reconstruct" in section:
        facts.append(Fact(section["reconstruct"], "Reconstruction", f"reconstruction: {section['reconstruct']}"))
    facts += learning_facts(section.get("learning", {}))
    if choices := Counter(str(entry["choice"]) for entry in consumers if "choice" in entry):
        value = ", ".join(f"{count} {choice}" for choice, count in choices.most_common())
        facts.append(Fact(value, "Chosen", f"chosen: {value}"))
    if errors := [entry for entry in consumers if "error" in entry]:
        mean = sum(entry["error"] for entry in errors) / len(errors)
        worst = max(errors, key=lambda entry: float(entry["error"]))
        value = f"{number(mean)} (largest {number(worst['error'])}, {worst['name']})"
        plain = [entry["plain_error"] for entry in errors if "plain_error" in entry]
        if len(plain) == len(errors):
            value += f"; {number(sum(plain) / len(plain))} without reconstruction"
        facts.append(Fact(value, "Mean error of consumers", f"mean error of consumers {value}"))
    if steps := section.get("second_order_steps"):
        lengths = ", ".join(number(step["eta"]) for step in steps)
        value = f"{number(steps[0]['before'])} to {number(steps[-1]['after'])} nats a token (lengths {lengths})"
        label = "Divergence from the dense model, before and after the second-order steps"
        facts.append(Fact(value, label, f"divergence from the dense model {value} by second-order steps"))
    facts += distilled_facts(section.get("distilled"))
    if stays := section.get("left_alone"):
        name, why = next(iter(stays.items()))
        value = f"{name}: {why}" + (f" (and {len(stays) - 1} more)" if len(stays) > 1 else "")
        facts.append(Fact(value, "Left alone", f"left alone: {value}"))
    return facts


def structured_sections(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is told of a structurally pruned model, its guard and its speed gate."""
    section = report.get("structured", {})
    consumers = section.get("consumers", [])
    rows = [
        (
            entry["name"],
            str(entry.get("choice", "")),
            "yes" if entry.get("bias") else "",
            number(entry.get("error")),
            number(entry.get("plain_error")),
        )
        for entry in consumers
    ]
    guard, gate = report.get("guard", {}), report.get("gate", {})
    return {
        "structured": make_table(("", ""), [(fact.label, fact.value) for fact in structured_facts(section)]),
        "structured_chart": trusted(error_chart(consumers)),
        "structured_kinds": list(error_series(consumers)),
        "learning_chart": trusted(
            learning_chart(learning_panels(section.get("learning", {}), report.get("groups", [])))
        ),
        "structured_stages": stages(section.get("seconds", {})),
        "consumers": make_table(("Consumer", "Choice", "New bias", "Error", "Without"), rows, (3, 4)),
        "consumer_count": len(consumers),
        "guard": _guard_table(guard.get("texts", [])),
        "guard_warning": guard.get("warning", ""),
        "guard_note": guard.get("note", ""),
        "guard_rule": _rule(guard),
        "gate": "" if not gate else "passed" if gate["passed"] else "failed",
        "gate_threshold": times(gate["threshold"]) if "threshold" in gate else "",
        "gate_reasons": gate.get("reasons", []),
    }


def _guard_table(texts: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [
        (
            f"{entry['text']}: {entry.get('source', '')}".removesuffix(": "),
            {"calibration": "like the calibration text", "different": "different"}.get(entry["role"], entry["role"]),
            number(entry["dense"]),
            number(entry["slim"]),
            number(entry["rise"]) + (f" ± {entry['rise_stderr']:.2g}" if "rise_stderr" in entry else ""),
        )
        for entry in texts
    ]
    header = ("Text", "Role", "Perplexity, dense", "Perplexity, slim", "Rise of its logarithm")
    return make_table(header, rows, (2, 3, 4))


def _rule(guard: Mapping[str, Any]) -> str:
    if not guard:
        return ""
    text = (
        f"A warning is given when the logarithm rises on the different text by {number(guard.get('limit'))} more than "
        f"on the other, and that is more than {number(guard.get('standard_errors'))} standard errors."
    )
    if "difference" in guard:
        error = f" ± {guard['difference_stderr']:.2g}" if "difference_stderr" in guard else ""
        text += f" Here it is {number(guard['difference'])}{error}."
    return text + (f" Measuring took {duration(guard['seconds'])}." if "seconds" in guard else "")


# ---- several budgets -----------------------------------------------------------------------------------------------


def _figures(entry: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Perplexities of a budget by text, dense and slim; those of the guard's windows have a note."""
    found = {
        one["text"]: (one["dense"], one["slim"])
        for one in entry.get("quality", [])
        if one["metric"] == "perplexity" and {"dense", "slim"} <= one.keys()
    }
    guard = entry.get("guard", {}).get("texts", [])
    return found | {f"{one['text']} (guard)": (one["dense"], one["slim"]) for one in guard}


def budget_rows(section: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: a budget each, the dense model first."""
    entries = section.get("entries", [])
    texts = list(dict.fromkeys(text for entry in entries for text in _figures(entry)))
    cases = list(dict.fromkeys(one["case"] for entry in entries for one in entry.get("speed", [])))
    header = ("Budget", "Parameters", "Removed from blocks", "MACs per token", *texts, *cases, "Speed gate")
    dense = {text: figures[text][0] for figures in map(_figures, reversed(entries)) for text in figures}
    first = entries[0] if entries else {}
    rows = [
        (
            "dense",
            _count(first.get("params", {}).get("dense")),
            "",
            _count(first.get("macs", {}).get("dense")),
            *(number(dense.get(text)) for text in texts),
            *("" for _ in cases),
            "",
        )
    ]
    for entry in entries:
        figures = _figures(entry)
        speed = {one["case"]: one for one in entry.get("speed", [])}
        gate = entry.get("gate")
        rows.append(
            (
                entry["name"],
                _count(entry.get("params", {}).get("slim")),
                percent(entry.get("params", {}).get("removed_share_blocks")),
                _count(entry.get("macs", {}).get("slim")),
                *(number(figures[text][1]) if text in figures else "" for text in texts),
                *(_speedup(speed[case]) if case in speed else "" for case in cases),
                "" if gate is None else "passed" if gate["passed"] else "failed",
            )
        )
    return header, rows


def _count(value: float | None) -> str:
    return "" if value is None else si(value)


def _speedup(entry: Mapping[str, Any]) -> str:
    return times(entry["speedup"]) + (" ({:.2f} to {:.2f})".format(*entry["ci"]) if "ci" in entry else "")


def curve_panels(section: Mapping[str, Any]) -> list[CurvePanel]:
    """Perplexity against size, and against the speed-up of every case; a line for each text."""
    entries = section.get("entries", [])
    texts = list(dict.fromkeys(text for entry in entries for text in _figures(entry)))
    sizes: dict[str, list[tuple[float, float]]] = {text: [] for text in texts}
    speeds: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in entries:
        removed = entry.get("params", {}).get("removed_share_blocks")
        for text, (dense, slim) in _figures(entry).items():
            if removed is not None:
                line = sizes[text]
                line += ([] if line else [(0.0, dense)]) + [(removed, slim)]
            for one in entry.get("speed", []):
                line = speeds.setdefault(one["case"], {}).setdefault(text, [])
                line += ([] if line else [(1.0, dense)]) + [(one["speedup"], slim)]
    panels = [CurvePanel("Perplexity by size", "share of the block Linears' parameters removed", "percent", sizes)]
    panels += [
        CurvePanel(f"Perplexity by speed, {case}", "measured speed-up", "times", speeds[case]) for case in speeds
    ]
    return [panel for panel in panels if any(panel.lines.values())]


def budget_sections(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is told of several budgets."""
    section = report.get("budgets", {})
    header, rows = budget_rows(section)
    panels = curve_panels(section)
    return {
        "budgets": make_table(header, rows, range(1, len(header) - 1)) if section else None,
        "budget_chart": trusted(curve_chart(panels)) if panels else None,
        "budget_texts": list(panels[0].lines) if panels else [],
        "nested": bool(section.get("nested")),
    }
