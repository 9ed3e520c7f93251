"""What people bring: the command line and the documented Python give the same checkpoint, bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.tracing.weight_masks import read_masks
from tests.commands import run_command
from tests.families import randomise

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def _qwen2() -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))


def _hybrid() -> PreTrainedModel:
    config = transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
    )
    return transformers.Lfm2ForCausalLM(config)


def _reward() -> PreTrainedModel:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=1))


def _tower() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {**SIZES, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


@dataclass(frozen=True)
class Bring:
    """A model, and how it is pruned."""

    build: Callable[[], PreTrainedModel]
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    chats: bool = False


CASES = {
    "bfloat16 Qwen2": Bring(_qwen2, "channel", {"ratio": 0.2, "samples": 8, "seq_len": 16, "steps": 1}),
    "hybrid": Bring(_hybrid, "flap", {"ratio": 0.1, "samples": 8, "seq_len": 16}),
    "Gemma 3 with its tower": Bring(_tower, "magnitude", {"ratio": 0.2}),
    "reward model": Bring(_reward, "wanda-sp", {"ratio": 0.2, "samples": 8, "seq_len": 16}),
    "calibrated on chats": Bring(_qwen2, "flap", {"ratio": 0.2, "samples": 8, "seq_len": 16}, chats=True),
}


def written(bring: Bring, tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedModel:
    """The model as it was published: bfloat16, with its tokenizer."""
    torch.manual_seed(0)
    model = bring.build().eval()
    randomise(model)
    model = model.to(torch.bfloat16)
    model.save_pretrained(path)
    if bring.chats:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return model


def calibration(bring: Bring, path: Path) -> Path:
    line = "the compiler traces a model to a graph and finds which weights belong together "
    if not bring.chats:
        text = path / "text.txt"
        text.write_text(line * 60)
        return text
    records = [[{"role": "user", "content": "the end"}, {"role": "assistant", "content": "so is it"}]] * 200
    text = path / "chats.jsonl"
    text.write_text("\n".join(json.dumps({"id": f"chat-{i}", "messages": m}) for i, m in enumerate(records)))
    return text


def python_way(source: Path, out: Path, method: str, options: dict[str, Any]) -> None:
    """The passes that the README names, one after the other."""
    loaded = load_model(source)
    program = fxprune.trace(loaded.model, tokenizer=loaded.tokenizer, path=loaded.path)
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    steps = [build_pass(method, options), *(build_pass(name, {}) for name in ("insert_masks", "slim", "verify"))]
    fxprune.save(Pipeline(steps)(program).program, out)


def command(options: dict[str, Any]) -> list[str]:
    flags = {name: f"--{name.replace('_', '-')}" for name in ("ratio", "samples", "seq_len", "calibration")}
    found = [text for name, value in options.items() if name in flags for text in (flags[name], str(value))]
    rest = [f"{name}={value}" for name, value in options.items() if name not in flags]
    return [*found, *(text for option in rest for text in ("--option", option))]


def weights_of(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.safetensors"))}


def test_a_bfloat16_model_is_what_came_in(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The cases below would compare nothing new if the models were float32."""
    assert written(CASES["bfloat16 Qwen2"], tiny_tokenizer, tmp_path).dtype is torch.bfloat16


@pytest.mark.parametrize("name", CASES)
def test_command_line_and_python_give_the_same(
    name: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bring, source = CASES[name], tmp_path / "model"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(_saved(tiny_tokenizer, tmp_path / "tokenizer"))
    dense = written(bring, tokenizer, source)
    options = dict(bring.options)
    if "samples" in options:
        options["calibration"] = str(calibration(bring, tmp_path))
    args = ("--method", bring.method, *command(options), "--guard", "none", "--out", tmp_path / "slim")
    status, out, err = run_command(monkeypatch, capsys, "prune", source, *args)
    assert status == 0, out + err
    method = {"magnitude": "magnitude-units"}.get(bring.method, bring.method)
    python_way(source, tmp_path / "python", method, options)
    assert weights_of(tmp_path / "slim") == weights_of(tmp_path / "python")

    slim = fxprune.load(tmp_path / "slim")
    assert isinstance(slim, type(dense))
    assert slim.num_parameters() < dense.num_parameters()
    assert {parameter.dtype for parameter in slim.parameters()} == {torch.bfloat16}
    towers = {key: tensor for key, tensor in dense.state_dict().items() if "vision_tower" in key}
    assert all(torch.equal(slim.state_dict()[key], tensor) for key, tensor in towers.items())
    assert bool(towers) is (name == "Gemma 3 with its tower")
    report = json.loads((tmp_path / "slim" / "report.json").read_text())
    assert report["model_class"] == type(dense).__name__
    if bring.chats:
        assert "<s>" in report["calibration"]["begins"]


def _saved(tokenizer: PreTrainedTokenizerBase, path: Path) -> Path:
    """A copy on disk: the fixture is shared, and a chat template is set on it."""
    tokenizer.save_pretrained(path)
    return path


def test_sparse_then_slim(
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, sparse = tmp_path / "model", tmp_path / "sparse"
    written(CASES["bfloat16 Qwen2"], tiny_tokenizer, source)
    args = ("--method", "magnitude", "--sparsity", 0.5, "--out", sparse)
    assert run_command(monkeypatch, capsys, "sparsify", source, *args)[0] == 0
    options = {**CASES["bfloat16 Qwen2"].options, "calibration": str(calibration(CASES["hybrid"], tmp_path))}
    args = ("--method", "channel", *command(options), "--guard", "none", "--out", tmp_path / "slim")
    status, out, err = run_command(monkeypatch, capsys, "prune", sparse, *args)
    assert status == 0, out + err
    python_way(sparse, tmp_path / "python", "channel", options)
    assert weights_of(tmp_path / "slim") == weights_of(tmp_path / "python")
    slim, masks = fxprune.load(tmp_path / "slim"), read_masks(tmp_path / "slim")
    assert masks
    assert all(not bool(slim.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    assert json.loads((tmp_path / "slim" / "report.json").read_text())["masks"]["share"] > 0.4


def test_a_fine_tuned_mixed_model_is_pruned_again(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fxprune.load(mixed_dir)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    args = ("--method", "magnitude", "--ratio", 0.15, "--guard", "none", "--out", tmp_path / "slim")
    status, out, err = run_command(monkeypatch, capsys, "prune", tmp_path / "tuned", *args)
    assert status == 0, out + err
    python_way(tmp_path / "tuned", tmp_path / "python", "magnitude-units", {"ratio": 0.15})
    assert weights_of(tmp_path / "slim") == weights_of(tmp_path / "python")
    assert fxprune.load(tmp_path / "slim").num_parameters() < tuned.num_parameters()
