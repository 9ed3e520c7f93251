"""The save pass on whole programs: several families, sharded, in their own dtype, with all that belongs to a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fxprune
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.tracing.trace import trace
from fxprune.verification.compare import compare_runners
from tests.families import LOCATE, randomise
from tests.proof import slimmed

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.program import Program

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "llama": ({"intermediate_size": 24, "num_key_value_heads": 2, "tie_word_embeddings": True}, torch.bfloat16),
    "gpt2": ({"n_inner": 24, "n_positions": 32}, torch.float32),  # Conv1D, fused q, k and v, tied
    "phi3": ({"intermediate_size": 24, "num_key_value_heads": 2}, torch.float32),  # fused gate and up projections
}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def located_program(family: str, tokenizer: Any) -> Program:
    """A tiny random model of a family with a generation config of its own, traced and located."""
    fields, dtype = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **fields), dtype=dtype).eval()
        randomise(model)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=5, eos_token_id=2)
    return Pipeline(LOCATE)(trace(model, tokenizer=tokenizer)).program


# Mixed plans of the other families are in test_zoo_deployed.py.
@pytest.mark.parametrize(
    ("family", "layers"), [("llama", "uniform"), ("llama", "mixed"), ("gpt2", "uniform"), ("phi3", "uniform")]
)
def test_a_sharded_checkpoint_is_the_slim_model_with_all_that_belongs_to_it(
    family: str, layers: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template = CHAT
    program = located_program(family, tiny_tokenizer)
    mlps = [group.name for group in program.groups if group.kind == "mlp"]
    widths = (16, 16) if layers == "uniform" else (8, 16)
    plan = Plan.of({name: range(width) for name, width in zip(mlps, widths, strict=True)})
    slim = slimmed(program, plan)
    saved = fxprune.save(slim, tmp_path / "out", max_shard_size=8_000)
    assert saved.results["checkpoint"]["kind"] == layers

    dtype = FAMILIES[family][1]
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    names: list[str] = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names += file.keys()
            assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118 - not a mapping
    assert len(names) == len(set(names))
    tied = bool(program.source and program.source.config.tie_word_embeddings)
    assert ("lm_head.weight" in names) is not tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")

    loaded = load_model(tmp_path / "out")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "heads"}], tokenize=False) == "heads"
    assert (loaded.model.generation_config.max_new_tokens, loaded.model.generation_config.top_k) == (7, 5)
    models = [loaded.model]
    if layers == "uniform":
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT
    for model in models:
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        graph = GraphRunner(slim.graph_module, slim.interface, "slim")
        tolerance = 0.1 if dtype is torch.bfloat16 else 1e-4
        cpu = torch.device("cpu")
        rung = compare_runners("x", graph, EagerRunner(model, "y"), vocabulary=97, tolerance=tolerance, device=cpu)
        assert rung.passed, rung
