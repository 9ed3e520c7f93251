"""The report as a page: figures become words and tables, and the template lays them out.

Input is a validated report; what is absent from it makes no section.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fxprune.exporters.charts import (
    TIMES,
    error_chart,
    error_series,
    quality_chart,
    speed_chart,
    widths_chart,
)
from fxprune.exporters.report_structured import budget_sections, structured_sections, trusted, warning_facts
from fxprune.exporters.report_text import (
    Fact,
    Table,
    binary,
    distilled_facts,
    duration,
    make_table,
    number,
    percent,
    scientific,
    si,
    spread,
    stages,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Fact",
    "binary",
    "duration",
    "environment",
    "headline",
    "mask_facts",
    "page",
    "percent",
    "si",
    "sparsity_facts",
    "spread",
    "times",
]

_PRIMARY_METRICS = ("perplexity", "ppl")
_NAMED = 3
"""How many Linears of a list are named before the rest is counted."""


def headline(report: Mapping[str, Any]) -> list[Fact]:
    """What happened, in a few clauses: size, share, quality, speed, and whether it was verified."""
    facts = []
    if "budgets" in report:
        count = len(report["budgets"]["entries"])
        facts.append(Fact(str(count), "budgets of one calibration", f"{count} budgets of one calibration"))
    params = report.get("params", {})
    if {"dense", "slim"} <= params.keys():
        value = f"{si(params['dense'])} → {si(params['slim'])}"
        if si(params["dense"])[-1] == si(params["slim"])[-1] and " " in value.split(" → ", maxsplit=1)[0]:
            value = f"{si(params['dense'])[:-2]} → {si(params['slim'])}"
        facts.append(Fact(value, "parameters", f"{si(params['dense'])} → {si(params['slim'])} parameters"))
    if "removed_share_blocks" in params:
        value = percent(params["removed_share_blocks"])
        facts.append(Fact(value, "of block Linears removed", f"{value} of block Linears removed"))
    if params.get("mask_sparsity"):
        value = percent(params["mask_sparsity"])
        facts.append(Fact(value, "zeros in block Linears", f"{value} zeros in block Linears"))
    if sparsity := report.get("sparsity"):
        value = percent(sparsity["removed_share"])
        count = sparsity["pruned_linears"]
        facts.append(Fact(value, f"zeros in {count} Linears", f"{value} zeros in {count} Linears"))
    elif masks := report.get("masks"):
        value = percent(masks["share"])
        count = masks["linears"]
        facts.append(Fact(value, f"zeros in {count} Linears", f"{value} zeros in {count} Linears"))
    facts += _quality_fact(report.get("quality", []))
    speed = report.get("speed", [])
    if speed:
        entry = next((entry for entry in speed if entry["case"].startswith("prefill")), speed[0])
        low, high = entry.get("ci", (entry["speedup"],) * 2)
        # What may be no speed-up at all is not told without its interval.
        value = _speedup(entry) if low <= 1 <= high else times(entry["speedup"])
        facts.append(Fact(value, entry["case"], f"{entry['case']} {value}"))
    return facts + _verify_fact(report.get("verify", [])) + warning_facts(report)


def _quality_fact(entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    both = [entry for entry in entries if {"dense", "slim"} <= entry.keys()]
    if not both:
        return []
    primary = [entry for entry in both if entry["metric"].lower() in _PRIMARY_METRICS]
    entry = (primary or both)[0]
    value = f"{number(entry['dense'])} → {number(entry['slim'])}"
    return [Fact(value, entry["metric"], f"{entry['metric']} {value}")]


def _verify_fact(entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    if not entries:
        return []
    failed = [entry["rung"] for entry in entries if not entry["passed"]]
    if failed:
        return [Fact("failed", "verification", f"verification FAILED at {failed[0]}", "bad")]
    count = len(entries)
    return [Fact(f"{count}/{count}", "checks passed", f"{count} of {count} checks passed")]


# ---- weight sparsity -----------------------------------------------------------------------------------------------


def sparsity_facts(report: Mapping[str, Any]) -> list[Fact]:
    """What became of the weights: method, zeros, what stayed dense, errors, trouble, and what it means for speed."""
    section = report.get("sparsity")
    if not section:
        return []
    linears = section.get("linears", [])
    how = f"{section['method']}, {section['target']}"
    if section.get("allocation", "uniform") != "uniform":
        how += f" allocated by {section['allocation']}"
    facts = [Fact(how, "Method", how)]
    zeros = f"{percent(section['removed_share'])} of "
    zeros += f"{si(section['weights'])} weights" if "weights" in section else "the weights"
    zeros += f" in {section['pruned_linears']} Linears"
    facts.append(Fact(zeros, "Zeros", f"zeros: {zeros}"))
    if dense := section.get("dense_linears"):
        facts.append(Fact(_listed(dense), "Dense as before", f"dense as before: {_listed(dense)}"))
    facts += _error_fact(section, linears)
    facts += distilled_facts(section.get("distilled"))
    facts += _work_fact(section.get("work", {}), section.get("seconds", {}))
    return [*facts, *_trouble_facts(linears), *_speed_facts(section, report.get("speed", []))]


def mask_facts(report: Mapping[str, Any]) -> list[Fact]:
    """Zeros that are held in what is left, and what became of patterns: one that is broken is no pattern any more."""
    section = report.get("masks")
    if not section:
        return []
    value = f"{percent(section['share'])} of {si(section['weights'])} weights in {section['linears']} Linears"
    facts = [Fact(value, "Held at zero", f"held at zero: {value}")]
    for one in section.get("patterns", []):
        label, count = f"Pattern {one['pattern']}", f"{one['holding']:,} of {one['groups']:,} groups"
        if one["holding"] == one["groups"]:
            facts.append(Fact(f"held by {count}", label, f"{label.lower()} held by {count}"))
        else:
            told = f"{count} still hold it in {one['linears']} Linears, so no kernel for it takes this model"
            facts.append(Fact(told, label, f"{label.lower()}: {told}", "bad"))
    return facts


def _listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _error_fact(section: Mapping[str, Any], linears: Sequence[Mapping[str, Any]]) -> list[Fact]:
    if "mean_error" not in section:
        return []
    read = any(entry.get("tokens") for entry in linears) or not linears
    label = "Mean layer error" if read else "Mean change of weights"
    value = number(section["mean_error"])
    worst = max((e for e in linears if "error" in e), key=lambda e: float(e["error"]), default=None)
    if worst is not None:
        value += f" (largest {number(worst['error'])}, {worst['name']})"
    return [Fact(value, label, f"{label.lower()} {value}")]


def _work_fact(work: Mapping[str, float], seconds: Mapping[str, float]) -> list[Fact]:
    """What calibration had to compute, and how long that takes at the machine's measured peak."""
    parts = []
    for part in ("forward", "gram"):
        if f"{part}_tflop" in work and part in seconds:
            least = 1e3 * work[f"{part}_tflop"] / work[f"{part}_peak_gflops"]
            parts.append(
                f"{part} {number(work[f'{part}_tflop'])} TFLOP in {duration(seconds[part])} (at the measured peak of "
                f"{number(work[f'{part}_peak_gflops'])} GFLOP/s at least {duration(least)})"
            )
    return [Fact("; ".join(parts), "Work", f"work: {'; '.join(parts)}")] if parts else []


def _trouble_facts(linears: Sequence[Mapping[str, Any]]) -> list[Fact]:
    notes = [(entry["name"], entry["notes"]) for entry in linears if "notes" in entry]
    facts = []
    if raised := [(name, note) for name, note in notes if note.get("damping_escalations")]:
        value = f"raised for {_listed([name for name, _ in raised])}"
        if shares := [note["damping"] for _, note in raised if "damping" in note]:
            value += f", up to {number(max(shares))}"
        facts.append(Fact(value, "Damping", f"damping {value}"))
    few = [(name, note["experts_with_few_tokens"]) for name, note in notes if note.get("experts_with_few_tokens")]
    if few:
        experts = _listed([f"{len(which)} of {name}" for name, which in few])
        label = "Experts that read fewer tokens than they have inputs"
        facts.append(Fact(experts, label, f"experts that read fewer tokens than they have inputs: {experts}"))
    return facts


def _speed_facts(section: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    facts = [Fact(section["speed"], "Speed", section["speed"])] if "speed" in section else []
    if entries:
        value = ", ".join(f"{entry['case']} {_speedup(entry)} ({entry['runtime']})" for entry in entries)
        facts.append(Fact(value, "Measured speed-up", f"measured speed-up: {value}"))
    return facts


def _linears_table(linears: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [
        (
            entry["name"],
            entry["target"],
            f" {TIMES} ".join(map(str, entry.get("shape", []))),
            percent(entry.get("removed")),
            number(entry.get("error")),
            f"{entry['tokens']:,}" if entry.get("tokens") else "",
            ", ".join(f"{key.replace('_', ' ')}: {_value(value)}" for key, value in entry.get("notes", {}).items()),
        )
        for entry in linears
    ]
    return make_table(("Linear", "Target", "Weight", "Zeros", "Error", "Tokens", "Notes"), rows, (3, 4, 5))


# ---- tables --------------------------------------------------------------------------------------------------------


def _size_table(report: Mapping[str, Any]) -> Table | None:
    params, macs, files = (report.get(name, {}) for name in ("params", "macs", "file_bytes"))
    rows = []
    if {"dense", "slim"} <= params.keys():
        share = params.get("removed_share_all")
        rows.append(("Parameters, all", si(params["dense"]), si(params["slim"]), percent(share)))
    if "removed_share_blocks" in params:
        dense, slim = (si(params[key]) if key in params else "" for key in ("dense_blocks", "slim_blocks"))
        rows.append(("Parameters of block Linears", dense, slim, percent(params["removed_share_blocks"])))
    for label, dense, slim in (
        ("MACs per token", "dense", "slim"),
        ("of these, lm_head", "lm_head_dense", "lm_head_slim"),
    ):
        if {dense, slim} <= macs.keys():
            share = 1 - macs[slim] / macs[dense] if macs[dense] else None
            rows.append((label, si(macs[dense]), si(macs[slim]), percent(share)))
    if {"dense", "slim"} <= files.keys():
        share = 1 - files["slim"] / files["dense"] if files["dense"] else None
        rows.append(("Files", binary(files["dense"]), binary(files["slim"]), percent(share)))
    if "mask_sparsity" in params:
        rows.append(("Mask sparsity: zeros that are stored", "", percent(params["mask_sparsity"]), ""))
    return make_table(("", "Dense", "Slim", "Removed"), rows, (1, 2, 3))


def _groups_table(groups: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = []
    for group in groups:
        kv = f"{group['kv_kept']:,} of {group['kv_dense']:,}" if {"kv_dense", "kv_kept"} <= group.keys() else ""
        layer = str(group.get("layer", ""))
        rows.append(
            (
                group["name"],
                group["kind"],
                layer,
                f"{group['dense']:,}",
                f"{group['kept']:,}",
                group.get("unit", ""),
                kv,
            )
        )
    return make_table(("Group", "Kind", "Layer", "Dense", "Kept", "Unit", "KV groups kept"), rows, (2, 3, 4, 6))


def _speedup(entry: Mapping[str, Any]) -> str:
    """A speed-up with its confidence interval where known."""
    return times(entry["speedup"]) + (" ({:.2f} to {:.2f})".format(*entry["ci"]) if "ci" in entry else "")


def _speed_table(entries: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = []
    for entry in entries:
        speedup = _speedup(entry)
        bound = " ".join((times(entry["bound"]), entry.get("bound_kind", ""))).strip() if "bound" in entry else ""
        dense, slim = number(entry["dense_ms"]), number(entry["slim_ms"])
        rows.append((entry["case"], entry["runtime"], str(entry.get("threads", "")), dense, slim, speedup, bound))
    header = ("Case", "Runtime", "Threads", "Dense, ms", "Slim, ms", "Speed-up (95% interval)", "Bound")
    return make_table(header, rows, range(2, 7))


def _quality_table(entries: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [(entry["text"], entry["metric"], spread(entry, "dense"), spread(entry, "slim")) for entry in entries]
    return make_table(("Text or task", "Metric", "Dense", "Slim"), rows, (2, 3))


def _history_table(entries: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = [
        (
            entry["name"],
            ", ".join(f"{key}={_value(value)}" for key, value in entry.get("options", {}).items()),
            ("no", "yes")[entry["modified"]] if "modified" in entry else "",
            duration(entry["seconds"]) if "seconds" in entry else "",
        )
        for entry in entries
    ]
    return make_table(("Pass", "Options", "Changed", "Time"), rows, (3,))


def _facts_table(facts: Mapping[str, Any] | str) -> Table | None:
    if isinstance(facts, str):
        return make_table(("", ""), [("Description", facts)]) if facts else None
    return make_table(("", ""), [(key.replace("_", " "), _fact(key, value)) for key, value in facts.items()])


def _fact(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int | float) and not isinstance(value, bool):
        return binary(value)
    if key == "begins":  # in quotes, where line ends can be seen
        return json.dumps(value, ensure_ascii=False)
    return _value(value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- the page ------------------------------------------------------------------------------------------------------


def _rungs(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "rung": entry["rung"],
            "error": scientific(entry.get("max_abs_error")),
            "tolerance": scientific(entry.get("tolerance")),
            "passed": entry["passed"],
            "detail": entry.get("detail", ""),
        }
        for entry in entries
    ]


def environment() -> Environment:
    """The templates of the pages; whatever is put into one is escaped unless it is trusted."""
    return Environment(
        loader=PackageLoader("fxprune.exporters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(report: Mapping[str, Any]) -> str:
    """Render a validated report as one self-contained HTML document.

    Args:
        report: sections as `fxprune.exporters.report.Report` dumps them, absent ones left out.
    """
    facts = headline(report)
    groups, quality, speed = (report.get(name, []) for name in ("groups", "quality", "speed"))
    sparsity = report.get("sparsity", {})
    linears = sparsity.get("linears", [])
    subtitle = [report[key] for key in ("model_class", "method") if key in report]
    if "seed" in report:
        subtitle.append(f"seed {report['seed']}")
    if version := report.get("versions", {}).get("fxprune"):
        subtitle.append(f"fxprune {version}")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=report.get("model", "Model"),
            subtitle=subtitle,
            facts=facts,
            sentence="; ".join(fact.text for fact in facts),
            size=_size_table(report),
            widths=trusted(widths_chart(groups)) if groups else None,
            groups=_groups_table(groups),
            group_count=len(groups),
            sparsity=make_table(
                ("", ""), [(fact.label, fact.value) for fact in (*sparsity_facts(report), *mask_facts(report))]
            ),
            error_chart=trusted(error_chart(linears)),
            error_kinds=list(error_series(linears)),
            linears=_linears_table(linears),
            linear_count=len(linears),
            sparsity_stages=stages(sparsity.get("seconds", {})),
            **structured_sections(report),
            **budget_sections(report),
            quality_chart=trusted(quality_chart(quality)) if quality else None,
            quality=_quality_table(quality),
            definitions=list(dict.fromkeys(entry["definition"] for entry in quality if entry.get("definition"))),
            speed_chart=trusted(speed_chart(speed)) if speed else None,
            repeats=sorted({entry["repeats"] for entry in speed if "repeats" in entry}),
            has_bound=any("bound" in entry for entry in speed),
            speed=_speed_table(speed),
            rungs=_rungs(report.get("verify", [])),
            has_detail=any("detail" in entry for entry in report.get("verify", [])),
            calibration=_facts_table(report.get("calibration", {})),
            history=_history_table(report.get("history", [])),
            stages=stages(report.get("seconds", {})),
            total=duration(sum(report["seconds"].values())) if report.get("seconds") else "",
            peak=binary(report["peak_rss_bytes"]) if "peak_rss_bytes" in report else "",
            machine=_facts_table(report.get("machine", {})),
            versions=_facts_table(report.get("versions", {})),
            details=json.dumps(report["details"], indent=2, ensure_ascii=False) if report.get("details") else "",
        )
    )
