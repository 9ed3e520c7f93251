"""The report on weight sparsity: one sentence, a chart of errors by depth, every Linear, and where the time went."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import pytest

from fxprune.core.pipeline import build_pass
from fxprune.core.program import Event
from fxprune.exporters.charts import TIMES, error_chart, error_series
from fxprune.exporters.report import markdown_summary
from fxprune.exporters.report_page import page, times
from fxprune.flows.reporting import report_of
from fxprune.tracing.trace import trace
from tests.exporters.test_report import FULL, Page, written

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def test_sparsity_is_told_in_one_sentence() -> None:
    line = next(line for line in markdown_summary(FULL).splitlines() if line.startswith("sparsegpt"))
    assert line == (
        "sparsegpt, 0.5 allocated by loss; zeros: 50.0% of 20.48 k weights in 3 Linears; "
        "dense as before: l.1.attn.q, l.1.attn.k, l.1.attn.v and 1 more; "
        "mean layer error 0.0412 (largest 0.11, l.0.mlp.down); damping raised for l.0.mlp.down, up to 0.1; "
        "experts that read fewer tokens than they have inputs: 2 of l.1.mlp.down; zeros make nothing faster; "
        f"measured speed-up: prefill-512 {times(1.247)} (1.21 to 1.29) (onnxruntime), "
        f"decode-8@64 {times(1.111)} (torch)."
    )


def test_what_a_sparse_run_did_not_find_is_not_told() -> None:
    section = {"method": "magnitude", "target": "2:4", "removed_share": 0.5, "pruned_linears": 2, "mean_error": 0.2}
    linears = [{"name": f"l.{i}.q", "target": "2:4", "removed": 0.5, "error": 0.2, "tokens": 0} for i in range(2)]
    text = markdown_summary({"sparsity": {**section, "linears": linears}})
    assert text.splitlines()[-1] == (
        "magnitude, 2:4; zeros: 50.0% of the weights in 2 Linears; mean change of weights 0.2 (largest 0.2, l.0.q)."
    )
    bare = page({"sparsity": {**section, "dense_linears": []}})
    assert "<svg" not in bare
    assert Page(bare).sections == ["sparsity"]
    assert {"Damping", "Dense as before", "Speed", "Where the time went"}.isdisjoint(Page(bare).text)


def test_the_page_lists_every_pruned_linear_and_where_the_time_went(tmp_path: Path) -> None:
    _, html, parsed = written(FULL, tmp_path)
    assert "All 3 pruned Linears" in parsed.text
    assert "damping: 0.1, damping escalations: 1" in parsed.text
    assert f"4 {TIMES} 64 {TIMES} 32" in parsed.text
    section = html[html.index('<section id="sparsity">') : html.index('<section id="quality">')]
    assert re.findall(r"<dt>(\w+)</dt>.*?width: ([\d.]+)%.*?>([\d.]+ s)<", section) == [
        ("text", "37.5", "1.5 s"),
        ("solve", "100.0", "4 s"),
    ]
    assert re.findall(r'class="line (s\d)"></i>(\w+)', section) == [("s0", "q"), ("s1", "down")]


def errors(*names: str) -> dict[str, dict[int, float]]:
    return error_series([{"name": name, "error": 0.1 * (i + 1)} for i, name in enumerate(names)])


def test_errors_are_a_line_for_each_kind_by_depth() -> None:
    found = errors("m.2.attn.q", "m.2.mlp.up", "m.5.attn.q", "lm_head")
    assert {kind: list(line) for kind, line in found.items()} == {"q": [2, 5], "up": [2], "lm_head": [6]}
    assert found["q"][5] == pytest.approx(0.3)


def test_kinds_are_named_by_as_much_as_tells_them_apart() -> None:
    found = errors("enc.0.self.q", "enc.1.self.q", "dec.0.self.q", "dec.0.cross.q")
    assert {kind: list(line) for kind, line in found.items()} == {"self.q": [0, 1, 2], "cross.q": [2]}
    experts = errors("l.0.experts.0.w1", "l.0.experts.1.w1", "l.1.experts.0.w1")
    assert experts == {"w1": {0: pytest.approx(0.15), 1: pytest.approx(0.3)}}


def test_errors_that_a_logarithmic_axis_cannot_show_are_left_out() -> None:
    entries = [{"name": f"l.{i}.q", "error": value} for i, value in enumerate((0.0, math.nan, math.inf, 1e-7))]
    assert error_series([*entries, {"name": "l.4.q"}]) == {"q": {3: 1e-7}}
    assert error_chart(entries[:3]) is None
    assert error_chart([]) is None
    many = [{"name": f"l.{i}.kind{k}", "error": 10.0 ** (-k)} for i in range(2) for k in range(9)]
    chart = error_chart(many)
    assert chart is not None
    assert "stroke-dasharray" in chart.wide  # more kinds than colours: the ninth line is dashed


def test_a_sparse_run_leaves_its_section_and_its_seconds(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    program = build_pass("lift_linears", {})(trace(tiny_llama, tokenizer=tiny_tokenizer, name="tiny")).program
    options = {"samples": 2, "seq_len": 8, "pattern": "2:4"}
    program = build_pass("sparsegpt", options)(program).program
    program = program.replace(history=(*program.history, Event("export_onnx", {}, True, 2.0, {"seconds": {"save": 1}})))
    report = report_of(program, method="sparsegpt", seed=0, seconds={"load": 1.0})
    section, event = program.results["sparsity"], program.history[-2]
    parts = section["seconds"]
    assert set(report["seconds"]) == {"trace", "calibrate", "prune", "export", "load"}
    calibrate = parts["text"] + parts["forward"] + parts["gram"]
    assert report["seconds"]["calibrate"] == pytest.approx(calibrate)
    assert report["seconds"]["prune"] == pytest.approx(event.seconds - calibrate)
    assert report["seconds"]["prune"] >= parts["prepare"] + parts["solve"]
    assert report["seconds"]["export"] == 2.0
    assert "groups" not in report
    data, _, parsed = written(report, tmp_path)
    assert data["sparsity"] == json.loads(json.dumps(section))
    assert "sparsity" in parsed.sections
    assert "zeros alone make no dense kernel faster" in markdown_summary(report)


def test_work_is_told_next_to_what_the_machine_reaches() -> None:
    work = {"forward_tflop": 2.0, "gram_tflop": 1.0, "forward_peak_gflops": 400.0, "gram_peak_gflops": 200.0}
    section = {"method": "wanda", "target": "0.5", "removed_share": 0.5, "pruned_linears": 1, "linears": []}
    report = {"sparsity": {**section, "work": work, "seconds": {"forward": 10.0, "gram": 8.0}}}
    assert (
        "work: forward 2 TFLOP in 10 s (at the measured peak of 400 GFLOP/s at least 5 s); gram 1 TFLOP in 8 s (at the "
        "measured peak of 200 GFLOP/s at least 5 s)"
    ) in markdown_summary(report)


def test_a_speed_up_that_may_be_none_has_its_interval_in_the_headline() -> None:
    entry = {"runtime": "onnxruntime", "case": "prefill-8", "dense_ms": 2.0, "slim_ms": 1.9, "speedup": 1.05}
    summary = markdown_summary({"speed": [entry | {"ci": (0.93, 1.15)}]})
    assert f"prefill-8 {times(1.05)} (0.93 to 1.15)." in summary
    assert f"prefill-8 {times(1.05)}." in markdown_summary({"speed": [entry | {"ci": (1.01, 1.15)}]})
