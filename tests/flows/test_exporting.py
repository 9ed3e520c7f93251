"""`fxprune export` and `fxprune verify` for every target: what they write, what they prove, what they refuse."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxprune.core.errors import VerificationError
from fxprune.exporters import ort_types
from fxprune.exporters.ort import OrtRunner
from fxprune.exporters.ort_types import require_precision, unsupported_operators
from fxprune.flows import exporting
from fxprune.measure.forms import open_form
from fxprune.runtimes.runners import GraphRunner
from fxprune.verification.text import compare_greedy
from tests.commands import run_command
from tests.families import located

if TYPE_CHECKING:
    from pathlib import Path


def test_half_precision_genai_int4_and_verify(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The float16 graph is verified in both runtimes, then quantized; what must be equal and what is measured."""
    pytest.importorskip("onnxruntime_genai", reason="the extra genai is not installed")
    model, out, report = tmp_path / "model", tmp_path / "out" / "int4", tmp_path / "int4.json"
    model.mkdir()
    for file in tiny_llama_dir.iterdir():  # the tokenizer is one that the runtime reads otherwise
        if not file.name.startswith("tokenizer"):
            (model / file.name).write_bytes(file.read_bytes())
    options = ("--to", "genai", "--dtype", "float16", "--int4", "--group-size", 16, "--float-lm-head", "--json", report)
    status, shown, said = run_command(monkeypatch, capsys, "export", model, "--out", out, *options)
    assert status == 0, said
    for rung in ("ONNX Runtime = slim", "greedy text of onnxruntime-genai = slim, after 8 tokens"):
        assert rung in shown
    assert "greedy text of int4 in onnxruntime-genai = in ONNX Runtime" in shown
    assert "int4 - slim: not expected to be equal" in shown
    assert [path.name for path in out.parent.iterdir()] == ["int4"]  # the float graph is gone
    assert {path.name for path in out.iterdir()} == {"genai_config.json", "model.onnx", "export.json"}
    described = json.loads((out / "export.json").read_text())
    assert (described["dtype"], described["target"]) == ("float16", "genai")
    int4 = described["int4"]
    assert (int4["options"]["method"], int4["options"]["group_size"]) == ("rtn", 16)
    assert len(int4["weights"]) == 14  # seven projections a layer
    assert int4["kept"] == {"lm_head.weight": "the projection to the vocabulary, not asked for"}
    assert int4["difference"] == json.loads(report.read_text())["int4"]["difference"]
    assert 0 < int4["difference"]["mean_kl"] < 1
    assert int4["bytes"] < int4["float_bytes"]
    assert all(rung["passed"] for rung in described["verify"])
    form = open_form(str(out))  # what eval and bench use
    assert form.kind == "onnxruntime"
    assert isinstance(form.runner, OrtRunner)
    assert form.runner.empty_past(1)[0].dtype is torch.float16
    status, shown, _ = run_command(monkeypatch, capsys, "verify", model, out)
    assert status == 0
    assert "int4 - slim" in shown
    assert "ONNX Runtime = slim" not in shown
    assert "greedy text of int4 in onnxruntime-genai" in shown
    (out / "export.json").write_text('{"dtype": "int3"}')
    status, _, said = run_command(monkeypatch, capsys, "verify", model, out)
    assert status == 1
    assert "export again" in said


def test_what_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of these gets as far as finding out that there is no model."""
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--group-size", 64), 2, "give --int4 as well"),
        (("--int4", "--group-size", 48), 2, "choose one of 16, 32"),
        (("--int4", "--int4-method", "k-quant", "--symmetric"), 2, "always has zero points"),
        (("--dtype", "bfloat16"), 1, "CPUExecutionProvider has no bfloat16 kernels for MatMul"),
        (("--dtype", "float64"), 1, "float64 graphs are not exported"),
        (("--dtype", "int8"), 2, "int8"),
    ]
    for options, expected, message in cases:
        status, _, said = run_command(monkeypatch, capsys, "export", tmp_path / "none", "--out", out, *options)
        assert (status, message in said) == (expected, True), said
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    status, _, said = run_command(monkeypatch, capsys, "export", tmp_path / "none", "--out", out, "--to", "genai")
    assert status == 1
    assert "pip install 'fxprune[genai]'" in said
    assert not out.exists()


def test_only_what_is_verified_replaces_an_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("earlier")

    def failing(program: Any, directory: Path, *_: Any) -> Any:
        directory.mkdir()
        (directory / "model.onnx").write_text("wrong")
        raise VerificationError(f"{program} does not hold")

    monkeypatch.setattr(exporting, "_verified", failing)
    request = exporting.ExportRequest(out, overwrite=True)
    with pytest.raises(VerificationError):
        exporting.export_program(located("llama"), request, print)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.onnx").read_text() == "earlier"

    def passing(program: Any, directory: Path, *_: Any) -> Any:
        directory.mkdir()
        (directory / "model.onnx").write_text("right")
        (directory / "export.json").write_text('{"schema_version": 1}')
        return program.with_results(onnx={"path": str(directory / "model.onnx")}, verify=[{"rung": "all"}])

    monkeypatch.setattr(exporting, "_verified", passing)
    done = exporting.export_program(located("llama"), request, print)
    assert done.results["onnx"]["path"] == str(out / "model.onnx")
    assert (out / "model.onnx").read_text() == "right"
    assert json.loads((out / "export.json").read_text()) == {"schema_version": 1, "verify": [{"rung": "all"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_precisions_are_asked_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported_operators(torch.float32) == unsupported_operators(torch.float16) == ()
    lacking = unsupported_operators(torch.bfloat16)
    assert "MatMul" in lacking
    assert "Gather" not in lacking  # it only moves
    monkeypatch.setattr(ort_types, "_PROBES", (("Gather", 1),))
    require_precision(torch.bfloat16)


class Nudged:
    """A form whose logit of one token is larger by a little at every position."""

    def __init__(self, runner: Any, token: int, by: float) -> None:
        self.runner, self.token, self.by, self.name = runner, token, by, "nudged"

    def step(self, *arguments: Any) -> Any:
        logits, past = self.runner.step(*arguments)
        logits = logits.clone()
        logits[..., self.token] += self.by
        return logits, past


def test_a_tie_is_looked_up_in_the_reference() -> None:
    """A nudge that turns the first choice over passes if ties may be that wide, and fails otherwise."""
    program = located("llama")
    slim = GraphRunner(program.graph_module, program.interface)
    prompt = torch.arange(5, 13)[None]
    ones = torch.ones_like(prompt)
    logits = slim.step(prompt, ones, torch.arange(8)[None], None)[0][0, -1]
    best, second = logits.topk(2).indices.tolist()
    gap = float(logits[best] - logits[second])
    other = Nudged(slim, second, gap * 1.01)
    strict = compare_greedy("text", slim, other, prompt)
    assert (strict.passed, strict.max_abs_error) == (False, 1.0)
    with pytest.raises(VerificationError, match="text does not hold"):
        strict.require()
    assert not compare_greedy("text", slim, other, prompt, tie=gap * 0.9).passed
    near = compare_greedy("text", slim, other, prompt, tie=gap * 1.1)
    assert near.passed
    assert "token 0 of 12" in near.detail
