"""Checkpoints of models that lost whole layers: renumbered, with a configuration of the slim depth, exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fxprune.checkpoints.checkpoint import classify, load
from fxprune.core.errors import CheckpointError
from tests.slices import Keep, cut, cuts_of, json_of, logits, make_model, masked, save_slim, source_of, without_layers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LAYERS = "model.layers"
SLIDING, FULL = "sliding_attention", "full_attention"
PATTERN = {"sliding_window": 3, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
BART = {
    "d_model": 32,
    "hidden_size": None,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 0,
}
Case = tuple[str, dict[str, Any], "dict[str, Sequence[int]]", dict[str, object]]
# Class, its configuration, the layers it keeps, and the fields of config.json that these change.
CASES: dict[str, Case] = {
    "llama": ("llama", {}, {LAYERS: (0, 3)}, {"num_hidden_layers": 2}),
    "one layer": ("gemma", {}, {LAYERS: (2,)}, {"num_hidden_layers": 1}),
    "qwen3": ("qwen3", {}, {LAYERS: (1, 2, 3)}, {"num_hidden_layers": 3, "layer_types": [FULL] * 3}),
    "sliding window from some layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        {LAYERS: (0, 3)},
        {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]},
    ),
    "layer types": (
        "gemma3_text",
        PATTERN,
        {LAYERS: (1, 2, 3)},
        {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
    ),
    "a switch a layer": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0]},
        {LAYERS: (1, 2)},
        {"num_hidden_layers": 2, "no_rope_layers": [0, 1], "layer_types": [FULL, FULL]},
    ),
    "phi3": ("phi3", {}, {LAYERS: (1, 2)}, {"num_hidden_layers": 2}),
    "mixtral": ("mixtral", {}, {LAYERS: (0, 2)}, {"num_hidden_layers": 2}),
    "indices of layers": (
        "qwen3_moe",
        {"mlp_only_layers": [2]},
        {LAYERS: (0, 2, 3)},
        {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "a period": (
        "qwen3_moe",
        {"decoder_sparse_step": 2},
        {LAYERS: (1, 3)},
        {"num_hidden_layers": 2, "decoder_sparse_step": 1},
    ),
    "a period that becomes irregular": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        {LAYERS: (1, 2, 3)},
        {"num_hidden_layers": 3, "decoder_sparse_step": 1, "mlp_only_layers": [1, 2]},
    ),
    "a bound": ("deepseek_v2", DEEPSEEK, {LAYERS: (1, 3)}, {"num_hidden_layers": 2, "first_k_dense_replace": 1}),
    "gpt2": ("gpt2", {}, {"transformer.h": (0, 2)}, {"n_layer": 2}),
    "an encoder": ("t5", {}, {"encoder.block": (0, 2)}, {"num_layers": 2}),
    "a decoder": ("t5", {}, {"decoder.block": (0, 2, 3)}, {"num_decoder_layers": 3}),
    "both": (
        "t5",
        {},
        {"encoder.block": (0, 3), "decoder.block": (0, 2, 3)},
        {"num_layers": 2, "num_decoder_layers": 3},
    ),
    "a decoder of another class": ("bart", BART, {"model.decoder.layers": (0, 3)}, {"decoder_layers": 2}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layers_are_left_out_exactly(case: Case, tmp_path: Path) -> None:
    model_type, changes, kept, fields = case
    model = make_model(model_type, **changes)
    tensors, reference = without_layers(model, kept)
    info = save_slim(tensors, model, tmp_path / "out")
    assert (info.kind, dict(info.kept_layers), dict(info.config_overrides)) == ("uniform", kept, fields)
    assert json_of(tmp_path / "out")["kept_layers"] == {name: list(indices) for name, indices in kept.items()}
    config = json_of(tmp_path / "out", "config.json")
    assert {name: config[name] for name in fields} == fields
    loaded = load(tmp_path / "out")
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-6, rtol=1e-6)
    plain = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(loaded), atol=0, rtol=0)
    name, indices = next(iter(kept.items()))
    for new, old in enumerate(indices):
        dense = model.get_submodule(f"{name}.{old}").state_dict()
        for key, tensor in plain.get_submodule(f"{name}.{new}").state_dict().items():
            assert torch.equal(tensor, dense[key]), key


@pytest.mark.parametrize("widths", [(16, None, 16, 16), (None, None, 8, 16)], ids=["uniform", "mixed"])
def test_widths_of_the_kept_layers(widths: Sequence[int | None], tmp_path: Path) -> None:
    model = make_model("qwen3")
    keeps = [Keep(mlp=range(width)) if width else Keep() for width in widths]
    tensors, reference = without_layers(masked(model, cuts_of(model, keeps)), {LAYERS: (0, 2, 3)})
    cuts = [piece for piece in cuts_of(model, keeps) if r"\.1\." not in piece[0]]
    info = save_slim(cut(tensors, cuts), model, tmp_path / "out")
    if widths[0]:
        fields = {"num_hidden_layers": 3, "layer_types": [FULL] * 3, "intermediate_size": 16}
        assert (info.kind, info.config_overrides) == ("uniform", fields)
    else:  # by the new numbers
        assert info.kind == "mixed"
        assert info.layer_overrides == {1: {"intermediate_size": 8}, 2: {"intermediate_size": 16}}
        assert json_of(tmp_path / "out", "config.json")["num_hidden_layers"] == 3
        assert json_of(tmp_path / "out", "config.json")["per_layer_config"].keys() == {"1", "2"}
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            type(model).from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(load(tmp_path / "out")))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


def test_a_scale_that_depends_on_the_position_is_kept(tmp_path: Path) -> None:
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    tensors, reference = without_layers(model, {"transformer.h": (0, 2, 3)})
    info = save_slim(tensors, model, tmp_path / "out")
    scalings = [layer.attn.scaling for layer in model.transformer.h]
    assert info.kind == "mixed"
    assert "transformer.h.1.attn.scaling must be" in info.reason
    assert info.constants == {f"transformer.h.{new}.attn": {"scaling": scalings[new + 1]} for new in (1, 2)}
    with pytest.raises(ValueError, match="needs `import fxprune`"):  # every shape fits: it would be something else
        type(model).from_pretrained(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(loaded))
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-6, rtol=1e-6)
    # What was kept the first time is kept when the loaded model is slimmed further.
    fewer, reference = without_layers(loaded, {"transformer.h": (1, 2)})
    save_slim(fewer, loaded, tmp_path / "again")
    again = load(tmp_path / "again")
    assert [layer.attn.scaling for layer in again.transformer.h] == scalings[2:]
    torch.testing.assert_close(logits(again), logits(reference), atol=1e-6, rtol=1e-6)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Sequence[int]], str]] = {
    "a layer that others need": (
        "t5",
        {},
        {"encoder.block": (1, 2)},
        r"without encoder\.block\.0, encoder\.block\.3: .*encoder\.block\.0\..*relative_attention_bias",
    ),
    "every layer": ("llama", {}, {LAYERS: ()}, r"model\.layers: none of its 4 layers is there"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_built_is_refused_by_layer(case: tuple[Any, ...], tmp_path: Path) -> None:
    model_type, changes, kept, message = case
    model = make_model(model_type, **changes)
    tensors, _ = without_layers(model, kept)
    with pytest.raises(CheckpointError, match=message):
        save_slim(tensors, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_positions_that_no_field_can_say_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    layer = type(model.model.layers[0])
    construct = layer.__init__

    def with_switch(self: Any, config: Any, layer_idx: int) -> None:
        construct(self, config, layer_idx)
        self.use_rope = layer_idx % 3 != 2

    monkeypatch.setattr(layer, "__init__", with_switch)
    tensors, _ = without_layers(model, {LAYERS: (0, 2, 3)})
    message = r"without model\.layers\.1: model\.layers\.1\.use_rope is True, model\.layers\.2\.use_rope was False"
    with pytest.raises(CheckpointError, match=message):
        classify(tensors, source_of(model))
    tensors, _ = without_layers(model, {LAYERS: (0, 1, 2)})
    assert classify(tensors, source_of(model)).kind == "uniform"


def test_a_layer_that_is_there_in_part_is_not_removed() -> None:
    model = make_model("llama")
    tensors, _ = without_layers(model, {LAYERS: (0, 2, 3)})
    name = f"{LAYERS}.1.mlp.up_proj.weight"
    tensors = {**tensors, name: model.state_dict()[name]}
    with pytest.raises(CheckpointError, match=r"missing \['model\.layers\.1\.input_layernorm\.weight'"):
        classify(tensors, source_of(model))


def test_epsilons_of_removed_layers_are_refused() -> None:
    model = make_model("llama")
    tensors, _ = without_layers(model, {LAYERS: (0, 3)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm.* was removed"):
        classify(tensors, source_of(model), {f"{LAYERS}.1.input_layernorm": 0.5})
