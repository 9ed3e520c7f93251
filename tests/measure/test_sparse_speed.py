"""Whether zeros are a speed-up is measured on the very model that was pruned, and said plainly."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fxprune.core.errors import PostconditionError, PreconditionError, UsageError
from fxprune.core.pipeline import build_pass
from fxprune.exporters.report import markdown_summary
from fxprune.flows.recipe import Destination
from fxprune.flows.wanted import Wanted
from fxprune.measure.sparse_speed import measure_sparse_speed
from fxprune.tracing.trace import trace
from fxprune.weights.base import NO_SPEED_UP
from tests.commands import done

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.program import Program
    from fxprune.measure.sparse_speed import SparseSpeed


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    """One layer: what takes the time is that everything is exported twice."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def pruned(tiny: LlamaForCausalLM) -> Program:
    program = build_pass("lift_linears", {})(trace(tiny)).program
    return build_pass("magnitude", {})(program).program


def test_the_speed_of_zeros_is_measured_and_told(
    tiny: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_pretrained(tmp_path / "dense")
    found: list[SparseSpeed] = []

    def quickly(program: Program, *, threads: int) -> SparseSpeed:
        found.append(measure_sparse_speed(program, threads=threads, repeats=2, prefills=(6,), decodes=2, past=4))
        return found[-1]

    monkeypatch.setattr("fxprune.flows.assessment.measure_sparse_speed", quickly)
    place = Destination(tmp_path / "out")
    report = done(str(tmp_path / "dense"), "magnitude", {"pattern": "1:4"}, place, wanted=Wanted(speed=True))
    assert [entry["case"] for entry in report["speed"]] == ["prefill-6", "decode-2@4"]
    linears = 4 * 16 * 16 + 3 * 16 * 24
    assert found[0].zeros >= linears * 3 // 4
    for entry in report["speed"]:
        assert entry["runtime"] == "onnxruntime"
        assert entry["ci"][0] <= entry["speedup"] <= entry["ci"][1]
        assert entry["bound"] == 1.0
        assert entry["zeros_of_exported_matrices"] == found[0].zeros / found[0].elements < 0.75
    assert report["sparsity"]["speed"] == NO_SPEED_UP
    assert report["seconds"]["bench"] > 0
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["speed"] == report["speed"]
    low, high = report["speed"][0]["ci"]
    quoted = f"prefill-6 {report['speed'][0]['speedup']:.2f}× ({low:.2f} to {high:.2f}) (onnxruntime)"  # noqa: RUF001 - the sign
    assert f"{NO_SPEED_UP}; measured speed-up: {quoted}" in markdown_summary(report)


def test_without_measuring_the_report_says_how(pruned: Program) -> None:
    sentence = pruned.results["sparsity"]["speed"]
    assert sentence.startswith(NO_SPEED_UP)
    assert "fxprune sparsify --measure-speed" in sentence


def test_only_zeros_that_are_there_are_timed(pruned: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreconditionError, match="run a weight-pruning pass first"):
        measure_sparse_speed(pruned.replace(weight_masks={}), threads=1)
    monkeypatch.setattr("fxprune.measure.sparse_speed.build_pass", lambda *_: lambda program: program)
    monkeypatch.setattr("fxprune.measure.sparse_speed.zeros_of", lambda _: (5, 100))
    with pytest.raises(PostconditionError, match="the exported graph has 5 zeros"):
        measure_sparse_speed(pruned, threads=1)


def test_what_has_no_zeros_or_no_runtime_is_refused_before_any_work(tmp_path: Path) -> None:
    timed = partial(done, str(tmp_path / "nowhere"), wanted=Wanted(speed=True))
    with pytest.raises(UsageError, match="leave --device meta out"):
        timed("magnitude", {}, Destination(tmp_path / "out", device="meta"))
    assert list(tmp_path.iterdir()) == []
