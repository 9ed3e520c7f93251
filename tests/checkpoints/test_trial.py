"""Running a rebuilt model once leaves it as it is, in any dtype, and what a library says is told in a line."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
)

from fxprune.checkpoints.trial import ExpectedLogits, cannot_run, relative_error, run_once

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def two_parts() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
    text = LlamaConfig(**SMALL, vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=60))
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa", "": "sdpa"})
    return model.eval()


def test_each_part_keeps_its_own_attention() -> None:
    """Not every part knows every kind: setting one kind on all of them may be refused."""
    model = two_parts()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = ExpectedLogits({"input_ids": ids}, model(ids).logits)
    assert relative_error(model, expected) < 1e-5
    assert model.config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


def test_an_error_of_a_library_is_told_in_a_line() -> None:
    said = "shapes do not fit\nIf you believe this error is a bug, open an issue\n" + "and so on\n" * 100
    error = cannot_run(two_parts(), "model", ["model.weight"], RuntimeError(said))
    assert "(shapes do not fit)" in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_that_makes_tensors_of_numbers_runs_in_every_dtype(dtype: torch.dtype) -> None:
    config = XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=1, attention_heads=2)
    run_once(XGLMForCausalLM(config).eval().to(dtype), [])
    assert torch.get_default_dtype() == torch.float32
