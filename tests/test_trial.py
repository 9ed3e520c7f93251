"""Running a rebuilt model once: in float64 too, where code makes tensors of the least number of its dtype."""

from __future__ import annotations

import pytest
import torch
from transformers import XGLMConfig, XGLMForCausalLM

from fxprune.trial import run_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_that_makes_tensors_of_numbers_runs_in_every_dtype(dtype: torch.dtype) -> None:
    config = XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=1, attention_heads=2)
    run_once(XGLMForCausalLM(config).eval().to(dtype), [])
    assert torch.get_default_dtype() == torch.float32
