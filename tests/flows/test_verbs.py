"""The verbs as functions: the same as the command line, on names and on modules, with results that show themselves."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import fxprune
from tests.commands import run_command

if TYPE_CHECKING:
    from pathlib import Path

TEXT = {"samples": 12, "seq_len": 16, "seed": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verbs") / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60)
    return path


def digest(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.safetensors"))}


def test_prune_gives_what_the_command_gives(
    tiny_llama_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    result = fxprune.prune(
        str(tiny_llama_dir),
        ratio=0.3,
        calibration=str(text),
        out=tmp_path / "python",
        guard="none",
        say=said.append,
        **TEXT,
    )
    status, _, err = run_command(
        monkeypatch, capsys, "prune", tiny_llama_dir, "--ratio", 0.3, "--calibration", text,
        "--out", tmp_path / "command", "--guard", "none", "--samples", 12, "--seq-len", 16, "--seed", 1,
    )  # fmt: skip
    assert status == 0, err
    assert digest(tmp_path / "python") == digest(tmp_path / "command")
    assert result.path == tmp_path / "python"
    assert result.report["params"]["removed_share_blocks"] == pytest.approx(0.3, abs=0.1)
    assert result.program is not None
    assert result.program.plan is not None
    ids = torch.arange(5, 15).unsqueeze(0)
    expected = fxprune.load(tmp_path / "python")(ids).logits
    assert torch.equal(result.model(ids).logits, expected)
    assert result.model is result.model
    assert "channel" in said
    assert "removed" in repr(result)
    assert "| parameters |" in result._repr_markdown_()


def test_a_module_is_pruned_without_a_file(tiny_llama_dir: Path, text: Path) -> None:
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    result = fxprune.prune(dense, tokenizer=tokenizer, ratio=0.3, calibration=str(text), guard="none", **TEXT)
    assert result.path is None
    assert result.model.dtype is torch.bfloat16
    assert result.model.num_parameters() < dense.num_parameters()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    ids = torch.arange(5, 15).unsqueeze(0)
    program = result.program
    assert program is not None
    with torch.no_grad():
        logits = result.model(ids).logits
    assert bool(logits.isfinite().all())


def test_several_targets_make_several_models(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = fxprune.prune(str(tiny_llama_dir), method="magnitude", ratio=[0.2, 0.3], out=tmp_path / "slims")
    assert [entry["name"] for entry in result.report["budgets"]["entries"]] == ["ratio-0.2", "ratio-0.3"]
    assert result.program is None
    with pytest.raises(fxprune.UsageError, match="load one of ratio-0.2, ratio-0.3"):
        _ = result.model
    with pytest.raises(fxprune.UsageError, match="say where they go"):
        fxprune.prune(str(tiny_llama_dir), method="magnitude", ratio=[0.2, 0.3])


def test_sparsify_streams_as_it_works_in_memory(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"pattern": "2:4", "calibration": str(text), **TEXT}
    whole = fxprune.sparsify(str(tiny_llama_dir), out=tmp_path / "whole", **common)
    streamed = fxprune.sparsify(str(tiny_llama_dir), out=tmp_path / "streamed", stream=True, **common)
    assert whole.report["method"] == streamed.report["method"] == "sparsegpt"
    assert streamed.program is None
    one, other = whole.model.state_dict(), streamed.model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: fxprune.prune(model), "needs one target"),
        (lambda model: fxprune.prune(model, ratio=0.2, colour="red"), "unknown option 'colour'"),
        (lambda model: fxprune.prune(model, ratio=0.2, method="wanda"), "use fxprune sparsify --method wanda"),
        (lambda model: fxprune.sparsify(model, method="l0"), "use fxprune learn --method l0"),
        (lambda model: fxprune.prune(model, ratio=0.2, tokenizer=object()), "a directory has its own"),
        (lambda _: fxprune.prune(torch.nn.Linear(2, 2), ratio=0.2), "Linear is no Hugging Face model"),
        (lambda model: fxprune.sparsify(model, stream=True, calibration="x.txt"), "name both"),
        (lambda model: fxprune.evaluate(model, ppl=["x.txt"], colour=1), "unknown option 'colour'; they are ppl"),
        (lambda model: fxprune.bench(model), "at least two forms"),
        (lambda model: fxprune.bench(model, model, colour=1), "unknown option 'colour'; they are prefill"),
    ],
)
def test_what_makes_no_sense_is_told(call: Any, message: str, tiny_llama_dir: Path) -> None:
    with pytest.raises(fxprune.UsageError, match=message):
        call(str(tiny_llama_dir))


def test_the_other_verbs_are_those_of_the_command(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    exported = fxprune.export(tiny_llama_dir, out=tmp_path / "onnx")
    assert all(rung["passed"] for rung in exported["verify"])
    figures = fxprune.evaluate(tiny_llama_dir, ppl=[text], window=32, windows=4)
    assert 50 < figures["perplexity"][0]["perplexity"] < 200  # a random model of 97 tokens
    timed = fxprune.bench(tiny_llama_dir, tiny_llama_dir, prefill=[4], decode=0, repeats=2, footprint=False)
    assert [entry["case"] for entry in timed["speed"]] == ["prefill-4"]
