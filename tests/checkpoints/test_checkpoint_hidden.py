"""Checkpoints with a narrower hidden dimension: exact norms, and the numbers a class would derive from its width."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fxprune.checkpoints.checkpoint import classify, load
from fxprune.core.errors import CheckpointError
from tests.slices import (
    EPSILON,
    HIDDEN,
    Keep,
    consumer_cuts_of,
    cut,
    cuts_of,
    hidden_state,
    json_of,
    logits,
    make_model,
    masked,
    masked_hidden,
    save_slim,
    source_of,
    without_layers,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDE = tuple(channel for channel in range(HIDDEN) if channel * 7 % HIDDEN < 32)  # a multiple of the number of heads
ODD = tuple(channel for channel in range(HIDDEN) if channel * 7 % HIDDEN < 30)

Case = tuple[str, dict[str, Any], "tuple[int, ...]", str, str]
# Class, configuration, kept channels, kind, and why it is mixed.
CASES: dict[str, Case] = {
    "llama": ("llama", {}, WIDE, "uniform", ""),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, WIDE, "uniform", ""),
    "llama, refused by its configuration": ("llama", {}, ODD, "mixed", "LlamaConfig refuses"),
    "qwen2": ("qwen2", {}, ODD, "uniform", ""),
    "phi3": ("phi3", {}, ODD, "uniform", ""),
    "granite, whose multipliers are fields": ("granite", {}, ODD, "uniform", ""),
    "mixtral": ("mixtral", {}, WIDE, "uniform", ""),
    "gpt_oss": ("gpt_oss", {}, WIDE, "uniform", ""),
    "qwen3, one field for two epsilons": (
        "qwen3",
        {},
        WIDE,
        "mixed",
        r"input_layernorm\.variance_epsilon must be 0\.0125",
    ),
    "qwen3_moe": ("qwen3_moe", {}, WIDE, "mixed", "variance_epsilon must be"),
    "gemma, an embedding scale": ("gemma", {}, WIDE, "mixed", r"embed_tokens\.scalar_embed_scale must be 6\.3"),
    "gemma3": ("gemma3_text", {}, WIDE, "mixed", "embed_scale must be"),
    "gemma3, refused by its configuration": ("gemma3_text", {}, ODD, "mixed", "Gemma3TextConfig refuses"),
    "t5, a scale of the logits": ("t5", {}, ODD, "mixed", r": model_dim must be 40"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_narrower_hidden_dimensions_are_exact(case: Case, tmp_path: Path) -> None:
    model_type, changes, kept, kind, reason = case
    model = make_model(model_type, **changes)
    tensors, epsilons = hidden_state(model, kept)
    reference = masked_hidden(model, kept)
    info = save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    assert info.kind == kind
    assert re.search(reason, info.reason)
    assert (info.reason == "") == (kind == "uniform")
    width = {"hidden_size", "d_model"} & info.config_overrides.keys()
    assert [info.config_overrides[name] for name in width] == [len(kept)]
    loaded = load(tmp_path / "out")
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(reference), atol=3e-5, rtol=1e-5)
    plain = type(loaded).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(loaded), atol=0, rtol=0)
    if kind == "uniform":
        assert info.constants == {}
        return
    config = json_of(tmp_path / "out", "config.json")
    assert [config[name] for name in width] == [HIDDEN]  # what the class accepts; and it fits no tensor
    assert json_of(tmp_path / "out")["constants"] == {name: dict(values) for name, values in info.constants.items()}
    with pytest.raises(ValueError, match="needs `import fxprune`"):
        type(model).from_pretrained(tmp_path / "out")


def test_constants_and_fields_are_recorded(tmp_path: Path) -> None:
    model = make_model("gemma3_text", num_hidden_layers=1)
    tensors, epsilons = hidden_state(model, WIDE)
    info = save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    scale = HIDDEN**0.5
    assert info.config_overrides == {"hidden_size": 32}
    assert info.constants.pop("model.embed_tokens").keys() == {"scalar_embed_scale", "embed_scale"}  # type: ignore[attr-defined]
    assert info.constants == {name: {"eps": epsilon} for name, epsilon in epsilons.items()}
    assert not any("q_norm" in name or "k_norm" in name for name in info.constants)
    loaded = load(tmp_path / "out")
    assert loaded.model.embed_tokens.scalar_embed_scale == scale
    assert loaded.model.embed_tokens.embed_scale.item() == pytest.approx(scale)
    assert (loaded.model.norm.eps, loaded.model.layers[0].self_attn.q_norm.eps) == (EPSILON * 1.25, EPSILON)
    assert loaded.config.hidden_size == 32


def test_a_field_serves_where_it_gives_just_the_wanted_epsilons(tmp_path: Path) -> None:
    model = make_model("llama")
    tensors, epsilons = hidden_state(model, WIDE)
    info = save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    assert (info.kind, info.config_overrides) == ("uniform", {"hidden_size": 32, "rms_norm_eps": EPSILON * 1.25})
    # An epsilon for one norm alone is no field's business.
    info = save_slim(dict(model.state_dict()), model, tmp_path / "b", epsilons={"model.norm": 0.5})
    assert (info.kind, info.constants) == ("mixed", {"model.norm": {"variance_epsilon": 0.5}})
    assert load(tmp_path / "b").model.norm.variance_epsilon == 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").model.norm.variance_epsilon == 0.5
    with pytest.raises(ValueError, match="needs `import fxprune`"):  # every shape fits: it would be overlooked
        type(model).from_pretrained(tmp_path / "b")
    # The dense epsilon is no news.
    info = save_slim(dict(model.state_dict()), model, tmp_path / "c", epsilons={"model.norm": EPSILON})
    assert (info.kind, info.constants, info.config_overrides) == ("uniform", {}, {})


def test_a_head_size_that_the_class_derives_is_kept(tmp_path: Path) -> None:
    model = make_model("qwen2", head_dim=None, num_attention_heads=5, num_key_value_heads=5)  # 8 = 40 / 5
    kept = tuple(range(30))
    heads = (r".*\.(q|k|v)_proj\.(weight|bias)", r".*\.o_proj\.weight")
    tensors, epsilons = hidden_state(model, kept, spared=dict(zip(heads, (0, 1), strict=True)))
    info = save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    assert info.kind == "uniform"
    assert info.config_overrides == {"hidden_size": 30, "head_dim": 8, "rms_norm_eps": EPSILON * (HIDDEN / 30)}
    reference = masked_hidden(model, kept, spared=dict(zip(heads, (0, 1), strict=True)))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_all_at_once_and_again(model_type: str, tmp_path: Path) -> None:
    """Fewer layers, a hidden size that llama's configuration refuses, layers that differ; then slimmed once more."""
    model = make_model(model_type)
    keeps = [Keep(), Keep(), Keep(heads=(2, 3), kv=(1,), mlp=range(16)), Keep(mlp=range(8))]
    reference = masked_hidden(masked(model, consumer_cuts_of(model, keeps)), ODD)
    _, reference = without_layers(reference, {"model.layers": (0, 2, 3)})
    tensors, epsilons = hidden_state(model, ODD)
    removed = "model.layers.1."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(removed)}
    epsilons = {name: value for name, value in epsilons.items() if not name.startswith(removed)}
    info = save_slim(cut(tensors, cuts_of(model, keeps)), model, tmp_path / "out", epsilons=epsilons)
    assert (info.kind, info.config_overrides["hidden_size"]) == ("mixed", 30)
    assert info.kept_layers == {"model.layers": (0, 2, 3)}
    assert info.layer_overrides == {
        1: {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        2: {"intermediate_size": 8},
    }
    assert json_of(tmp_path / "out", "config.json")["fxprune"]["overrides"]["hidden_size"] == 30
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(reference), atol=2e-5, rtol=1e-5)

    narrower = [Keep(mlp=range(16)), Keep(), Keep()]
    again = save_slim(cut(loaded.state_dict(), cuts_of(loaded, narrower)), loaded, tmp_path / "again")
    assert {name: value for name, value in again.config_overrides.items() if name == "hidden_size"} == {
        "hidden_size": 30
    }
    assert again.layer_overrides.keys() == {0, 1, 2}
    expected = logits(masked(loaded, consumer_cuts_of(loaded, narrower)))
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, atol=1e-5, rtol=1e-5)
    config = json_of(tmp_path / "again", "config.json")
    assert (config["hidden_size"], config["fxprune"]["overrides"]["hidden_size"]) == (HIDDEN, 30)


def test_constants_hold_in_half_precision(tmp_path: Path) -> None:
    model = make_model("gemma3_text", num_hidden_layers=2).to(torch.bfloat16)
    tensors, epsilons = hidden_state(model, WIDE)
    save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    for dtype in (None, torch.float32):
        scale = load(tmp_path / "out", dtype=dtype).model.embed_tokens.embed_scale
        assert scale.item() == torch.tensor(HIDDEN**0.5, dtype=scale.dtype).item()


def test_a_width_that_running_code_reads_is_refused(tmp_path: Path) -> None:
    for kept in (WIDE, ODD):
        model = make_model("afmoe", mup_enabled=True)  # multiplies with config.hidden_size ** 0.5 in its forward
        tensors, epsilons = hidden_state(model, kept)
        with pytest.raises(
            CheckpointError, match=r"model \(AfmoeModel\) computes with 5\.\d+, .*derives it from a width"
        ):
            save_slim(tensors, model, tmp_path / "out", epsilons=epsilons)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("epsilons", "message"),
    [
        ({"model.layers.9.input_layernorm": 0.1}, r"has no module model\.layers\.9\.input_layernorm"),
        ({"model.layers.0.mlp.up_proj": 0.1}, r"model\.layers\.0\.mlp\.up_proj \(Linear\) has 0 attributes"),
    ],
)
def test_epsilons_of_something_else_are_refused(epsilons: dict[str, float], message: str) -> None:
    model = make_model("llama")
    with pytest.raises(CheckpointError, match=message):
        classify(model.state_dict(), source_of(model), epsilons)


def test_the_epsilon_is_told_from_other_numbers_by_the_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    norm = type(model.model.norm)
    construct: Callable[..., None] = norm.__init__

    def with_scale(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.scale = 1.0

    monkeypatch.setattr(norm, "__init__", with_scale)
    tensors, epsilons = hidden_state(model, WIDE)
    layout = classify(tensors, source_of(model), epsilons)
    assert (layout.kind, layout.config_overrides["rms_norm_eps"]) == ("uniform", EPSILON * 1.25)
    with pytest.raises(CheckpointError, match=r"model\.norm \(LlamaRMSNorm\) has 0 attributes that may be its epsilon"):
        classify(tensors, source_of(model), {**epsilons, "model.norm": 0.5})
