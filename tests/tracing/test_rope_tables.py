"""Tables that rotary embeddings recompute while they run: LongRoPE, dynamic NTK, and tables that a cast rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from fxprune.channels.front_end import LOCATE
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.flows.steps import prune_program
from fxprune.runtimes.runners import GraphRunner, position_ids_from_mask
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from fxprune.core.program import Program

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
ORIGINAL = 32


def longrope() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * place for place in range(8)],
        "long_factor": [4.0 + place for place in range(8)],
    }
    more = {"max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL}
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, **more, rope_parameters=rope)).eval()


def dynamic_ntk() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=ORIGINAL, rope_parameters=rope)).eval()


MODELS = {"longrope": longrope, "dynamic": dynamic_ntk}


def logits_of(program: Program, ids: torch.Tensor) -> torch.Tensor:
    runner = GraphRunner(program.graph_module, program.interface)
    mask = torch.ones_like(ids)
    return runner.step(ids, mask, position_ids_from_mask(mask, ids.shape[1]), None)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_computes_its_table_at_every_length(name: str) -> None:
    """In any order: a graph remembers no longer sequence."""
    program = trace(MODELS[name]())
    for length in (8, ORIGINAL + 16, 8, ORIGINAL, ORIGINAL + 40):
        ids = torch.arange(length)[None] % 64
        with torch.no_grad():
            wanted = MODELS[name]()(input_ids=ids).logits
        torch.testing.assert_close(logits_of(program, ids), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["magnitude-units", "magnitude"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_class_computes_while_running_is_no_weight(name: str, method: str, tmp_path: Path) -> None:
    """The checkpoint holds no table, and gives the same logits below and above the original length."""
    program = Pipeline([build_pass(step, {}) for step in LOCATE])(trace(MODELS[name]())).program
    options = {"sparsity": 0.5} if method == "magnitude" else {"ratio": 0.2}
    slim = prune_program(program, method, options, out=tmp_path / "slim")
    for length in (8, ORIGINAL + 16):
        ids = torch.arange(length)[None] % 64
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
        assert not any("inv_freq" in tensor for tensor in again.state_dict())
        with torch.no_grad():
            logits = again(input_ids=ids).logits
        torch.testing.assert_close(logits, logits_of(slim, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_ran_long_text_before_is_saved_all_the_same(name: str, tmp_path: Path) -> None:
    """Running changes the class's own table."""
    model = MODELS[name]()
    with torch.no_grad():
        model(input_ids=torch.arange(ORIGINAL + 16)[None] % 64)
    program = Pipeline([build_pass(step, {}) for step in LOCATE])(trace(model)).program
    logits_of(program, torch.arange(ORIGINAL + 16)[None] % 64)
    slim = prune_program(program, "magnitude", {"sparsity": 0.5}, out=tmp_path / "slim")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")(input_ids=ids).logits
    torch.testing.assert_close(logits, logits_of(slim, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_that_a_cast_rounded_are_computed_anew(dtype: torch.dtype, tmp_path: Path) -> None:
    """As loading in that dtype has them; the cast model is pruned and saved."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope)).eval()
    exact = model.model.rotary_emb.inv_freq.clone()
    cast = model.to(dtype)
    assert cast.model.rotary_emb.inv_freq.dtype is dtype
    program = Pipeline([build_pass(step, {}) for step in LOCATE])(trace(cast)).program
    assert torch.equal(cast.model.rotary_emb.inv_freq, exact)
    prune_program(program, "magnitude-units", {"ratio": 0.2, "uniform": True}, out=tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert again.dtype is dtype
    assert torch.equal(again.model.rotary_emb.inv_freq, exact)


def test_a_table_that_somebody_changed_stays() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope)).eval().bfloat16()
    model.model.rotary_emb.inv_freq.mul_(0.5)
    trace(model)
    assert model.model.rotary_emb.inv_freq.dtype is torch.bfloat16
