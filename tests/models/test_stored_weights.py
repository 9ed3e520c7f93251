"""Weights under the names of their class, whatever a checkpoint calls them and however it cuts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from fxprune.core.errors import CheckpointError
from fxprune.models.shard_reader import ShardReader
from fxprune.models.stored_weights import StoredWeights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

SIZES = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=12)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_key_value_heads=1, num_experts=3, moe_intermediate_size=4)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_key_value_heads=1, num_local_experts=3, head_dim=4, pad_token_id=0)
    ),
}


def stored(path: Path, model: PreTrainedModel) -> StoredWeights:
    return StoredWeights(ShardReader(path), model)


def change(path: Path, **tensors: Tensor | None) -> None:
    """Rewrite the file of a checkpoint with some tensors added, changed or left out."""
    file = path / "model.safetensors"
    kept = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("family", MODELS)
def test_every_parameter_of_the_class_is_read(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[family]()
    model.save_pretrained(tmp_path)
    weights = stored(tmp_path, model)
    assert set(weights.names) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.read(name), tensor), name
        assert weights.dtype(name) is tensor.dtype


def test_what_the_class_does_not_know_is_left_out_and_prefixes_do_not_matter(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    tiny_llama.model.save_pretrained(tmp_path)  # without "model." before the names
    change(tmp_path, layers__0__self_attn__rotary_emb__inv_freq=torch.ones(5))
    weights = stored(tmp_path, tiny_llama)
    state = tiny_llama.state_dict()
    assert set(weights.names) == set(state) - {"lm_head.weight"}
    assert "lm_head.weight" in weights  # under the name that it shares
    assert torch.equal(weights.read("lm_head.weight"), state["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match="no tensor for nothing"):
        weights.read("nothing")


def test_twins_must_be_alike(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    embedding = tiny_llama.lm_head.weight.detach().clone()
    change(tmp_path, lm_head__weight=embedding)
    assert "lm_head.weight" not in stored(tmp_path, tiny_llama).names
    change(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one weight"):
        stored(tmp_path, tiny_llama)
    change(tmp_path, lm_head__weight=embedding, model__embed_tokens__weight=None)
    weights = stored(tmp_path, tiny_llama)
    assert torch.equal(weights.read("model.embed_tokens.weight"), embedding)


def test_experts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    model = MODELS["mixtral"]()
    model.save_pretrained(tmp_path)
    change(tmp_path, model__layers__1__block_sparse_moe__experts__7__w1__weight=torch.ones(3, 3))
    weights = stored(tmp_path, model)
    weights.read("model.layers.0.mlp.experts.gate_up_proj")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj cannot be put together"):
        weights.read("model.layers.1.mlp.experts.gate_up_proj")
