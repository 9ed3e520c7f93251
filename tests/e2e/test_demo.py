"""The demonstration, whole, on a tiny model: what lands in the output, and that a failure leaves the old one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fxprune
from fxprune.core.errors import OutputError, VerificationError
from fxprune.flows import demo
from fxprune.runtimes.runners import EagerRunner, greedy

if TYPE_CHECKING:
    from pathlib import Path


def run(model: Path, out: Path, text: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "model": str(model),
        "ratio": 0.2,
        "options": {"calibration": str(text), "samples": 8, "seq_len": 16, "seed": 0},
        "texts": [str(text)],
        "windows": 1,
        "threads": 1,
        "repeats": 2,
        "overwrite": False,
        "say": lambda _: None,
        "show": lambda _: None,
    }
    return demo.run_demo(out, **{**options, **changes})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60)
    return path


def test_the_demo_ends_with_a_verified_measured_exported_model(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model has 128 positions: cases of the same kinds, short enough for it.
    cases_of = demo.cases_of
    monkeypatch.setattr(demo, "cases_of", lambda *_: cases_of((8, 16), 2, 8))
    monkeypatch.setattr(demo, "perplexities", lambda program, texts, windows: _short(program, texts, windows))
    out = tmp_path / "demo"
    run(tiny_llama_dir, out, text)
    report = json.loads((out / "report.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["onnx", "report.html", "report.json", "report.md", "slim"]
    rungs = {rung["rung"] for rung in report["verify"]}
    assert {"slim = masked", "reloaded checkpoint = slim", "ONNX Runtime = slim"} <= rungs
    assert {entry["case"] for entry in report["speed"]} == {"prefill-8", "prefill-16", "decode-2@8"}
    assert report["params"]["slim"] < report["params"]["dense"]
    assert report["file_bytes"]["slim"] < report["file_bytes"]["dense"]
    assert report["seconds"]["export"] > 0
    assert ".staging" not in (out / "report.json").read_text()
    from fxprune.exporters.ort import OrtRunner

    prompt = torch.arange(5, 12).unsqueeze(0)
    deployed = greedy(OrtRunner(out / "onnx" / "model.onnx", threads=1), prompt, 6)
    assert torch.equal(deployed, greedy(EagerRunner(fxprune.load(out / "slim")), prompt, 6))


def _short(program: Any, texts: list[str], windows: int) -> Any:
    from fxprune.flows.quality import perplexities

    return perplexities(program, texts, windows=windows, window=64)


def test_a_failure_late_in_the_demo_leaves_the_old_output_whole(
    tiny_llama_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "report.json").write_text('{"model": "old"}')

    def fail(*_: Any, **__: Any) -> None:
        raise VerificationError("made to fail")

    monkeypatch.setattr(demo, "perplexities", fail)
    with pytest.raises(OutputError, match="not empty"):
        run(tiny_llama_dir, out, text)
    with pytest.raises(VerificationError, match="made to fail"):
        run(tiny_llama_dir, out, text, overwrite=True)
    assert (out / "report.json").read_text() == '{"model": "old"}'
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "demo"}
