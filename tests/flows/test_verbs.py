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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


@pytest.mark.smoke
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


@pytest.mark.smoke
def test_the_other_verbs_are_those_of_the_command(tiny_llama_dir: Path, text: Path, tmp_path: Path) -> None:
    exported = fxprune.export(tiny_llama_dir, out=tmp_path / "onnx")
    assert all(rung["passed"] for rung in exported["verify"])
    figures = fxprune.evaluate(tiny_llama_dir, ppl=[text], window=32, windows=4)
    assert 50 < figures["perplexity"][0]["perplexity"] < 200  # a random model of 97 tokens
    timed = fxprune.bench(tiny_llama_dir, tiny_llama_dir, prefill=[4], decode=0, repeats=2, footprint=False)
    assert [entry["case"] for entry in timed["speed"]] == ["prefill-4"]


class _Adapted(torch.nn.Module):
    """Stands for a model with an adapter: its parameters are not those of its class."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.config = model.config
        self.model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))


def test_models_in_memory_are_taken_or_refused_by_name(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(fxprune.TraceError, match="cannot be pruned as it is"):  # before the method looks at the class
        fxprune.prune(_Adapted(tiny_llama), ratio=0.2)
    with pytest.raises(fxprune.UsageError, match="leave dtype and device out"):
        fxprune.prune(tiny_llama, ratio=0.2, method="magnitude", dtype="bfloat16")
    for call in (
        lambda: fxprune.export(tiny_llama, out=tmp_path / "onnx"),
        lambda: fxprune.evaluate(tiny_llama, ppl="x.txt"),
        lambda: fxprune.bench("a", tiny_llama),
    ):
        with pytest.raises(fxprune.UsageError, match="LlamaForCausalLM has no directory: save it first"):
            call()
    with pytest.raises(fxprune.UsageError, match="prefill is a whole number, or several, not 'x'"):
        fxprune.bench("a", "b", prefill="x")
    with pytest.raises(fxprune.FxpruneError, match=r"cannot read missing\.txt"):  # one text, not eleven
        fxprune.evaluate("nowhere", ppl="missing.txt")


def test_speed_in_a_precision_without_kernels_is_refused_before_any_work(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.exporters.ort_types.unsupported_operators", lambda _: ["Mul"])
    tiny_llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(fxprune.UsageError, match="no float32 kernels for Mul on this CPU: give --dtype float32"):
        fxprune.prune(tmp_path / "dense", method="magnitude", ratio=0.2, measure_speed=True, out=tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_a_calibration_file_that_is_not_there_is_told_before_the_model_is_opened() -> None:
    with pytest.raises(fxprune.CalibrationError, match=r"missing\.txt does not exist"):
        fxprune.prune("nowhere", ratio=0.2, calibration="missing.txt")


def test_the_directory_of_a_model_in_memory_is_no_output(tiny_llama_dir: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    before = digest(tmp_path / "dense")
    for ratio in (0.2, [0.2, 0.3]):
        with pytest.raises(fxprune.OutputError):
            fxprune.prune(dense, method="magnitude", ratio=ratio, out=tmp_path / "dense", overwrite=True)
    assert digest(tmp_path / "dense") == before


def test_options_that_need_each_other_are_taken_together() -> None:
    """More held-out samples than the method has by default, of more samples."""
    with pytest.raises(fxprune.CheckpointError, match="nowhere"):
        fxprune.learn("nowhere", ratio=0.2, samples=4000, held_out=2000)
