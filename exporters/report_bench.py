"""A benchmark as Markdown, for pull requests: speed-ups, what the forms cost to have, the verdict, the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.exporters.report_markdown import cell, table_lines
from fxprune.exporters.report_text import binary, duration, times

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["bench_markdown"]

_SPEED = ("case", "form", "runtime", "threads", "first ms", "form ms", "speed-up", "95% interval", "bound")
_FORMS = ("form", "runtime", "threads", "weights", "load", "peak memory", "of it before loading")


def bench_markdown(data: Mapping[str, Any]) -> str:
    """Markdown of what `fxprune.flows.benchmarking.run_bench` returns."""
    names = list(dict.fromkeys(form["name"] for form in data["forms"]))
    lines = [f"### Speed of {cell(', '.join(names[1:]))} against {cell(names[0])}"]
    if gate := data.get("gate"):
        lines += ["", f"Gate: **{'passed' if gate['passed'] else 'failed'}**"]
        lines += [f"- {cell(reason)}" for reason in gate["reasons"]]
    lines += table_lines(
        _SPEED,
        [
            (
                entry["case"],
                entry.get("form", names[-1]),
                entry["runtime"],
                str(entry["threads"]),
                f"{entry['dense_ms']:.4g}",
                f"{entry['slim_ms']:.4g}",
                times(entry["speedup"]),
                "{:.2f} to {:.2f}".format(*entry["ci"]),
                f"{times(entry['bound'])} ({entry['bound_kind']})" if "bound" in entry else "",
            )
            for entry in data["speed"]
        ],
    )
    lines += table_lines(
        _FORMS,
        [
            (
                form["name"],
                form["runtime"],
                str(form["threads"]),
                binary(form["file_bytes"]),
                duration(form["load_seconds"]) if "load_seconds" in form else "",
                binary(form["peak_rss_bytes"]) if "peak_rss_bytes" in form else "",
                binary(form["base_rss_bytes"]) if "base_rss_bytes" in form else "",
            )
            for form in data["forms"]
        ],
    )
    repeats = sorted({entry["repeats"] for entry in data["speed"]})
    machine = data["machine"]
    facts = [f"medians of {' or '.join(map(str, repeats))} interleaved runs", str(machine.get("cpu", "unknown CPU"))]
    facts += [f"{key} {machine[key]}" for key in ("torch", "onnxruntime", "onnxruntime_genai") if key in machine]
    return "\n".join([*lines, "", f"{cell(', '.join(facts))}."]) + "\n"
