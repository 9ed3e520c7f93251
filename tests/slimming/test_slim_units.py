"""Slimming hidden channels, experts, channels inside experts, latents and layers: slim equals masked."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fxprune.core.errors import PlanError
from fxprune.core.groups import AttentionGroup, ExpertGroup, ExpertMlpGroup, HiddenGroup, LayerGroup
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_attention import LocateAttention
from fxprune.passes.locate_experts import LocateExperts
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_layers import LocateLayers
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.passes.slim import Slim
from fxprune.tracing.trace import trace
from fxprune.tracing.unit_masks import ChoiceMask
from tests.families import randomise

if TYPE_CHECKING:
    from fxprune.core.groups import Group
    from fxprune.core.program import Program

LOCATE = (LiftLinears(), LocateAttention(), LocateMlp(), LocateExperts(), LocateHidden(), LocateLayers())
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
    "rms_norm_eps": 0.1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MOE),
    "gemma": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "rms_norm_eps": 0.1, "tie_word_embeddings": True}),
    "alibi": (BloomConfig, BloomForCausalLM, {}),
    "latent": (DeepseekV3Config, DeepseekV3ForCausalLM, LATENT),
}


@functools.cache
def located(name: str) -> Program:
    """A tiny model traced, lifted and located; read-only."""
    config, model, changes = _MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model(config(**(SIZES | changes))).eval()
        randomise(made)
    return Pipeline(LOCATE)(trace(made)).program


def only(program: Program, kind: type[Group]) -> list[Any]:
    return [group for group in program.groups if isinstance(group, kind)]


def assert_slim_equals_masked(program: Program, plan: Plan) -> Program:
    """Logits agree, with a cache of the slim form's own shape; the dense logits are others."""
    masked = InsertMasks()(program.replace(plan=plan)).program
    slim: Program = Slim()(masked).program
    with torch.no_grad():
        logits = [
            form.graph_module(*form.interface.example_inputs.values())[form.interface.outputs.index("logits")]
            for form in (slim, masked, program)
        ]
    real = program.interface.example_inputs["attention_mask"][:, -logits[0].shape[1] :].bool()
    mine, theirs, dense = (tensor[real] for tensor in logits)
    scale = float(theirs.abs().max())
    assert float((mine - theirs).abs().max()) <= 1e-5 * scale
    assert float((theirs - dense).abs().max()) > 1e-3 * scale
    return slim


@pytest.mark.parametrize("name", ["moe", "gemma", "latent"])
@pytest.mark.parametrize("kept", [range(4, 32), range(0, 36, 3)])
def test_hidden_channels(name: str, kept: range) -> None:
    program = located(name)
    group = max(only(program, HiddenGroup), key=lambda g: g.units)
    units = list(kept)[: len(kept) // 4 * 4]
    slim = assert_slim_equals_masked(program, Plan.of({group.name: units})).graph_module
    vocabulary = [parameter for parameter in slim.parameters() if parameter.shape[0] == 61]
    assert [tuple(table.shape) for table in vocabulary] == [(61, len(units))] * (1 if name == "gemma" else 2)  # tied


def test_latents_have_norms_of_their_own() -> None:
    program = located("latent")
    groups = [group for group in only(program, HiddenGroup) if group.units < 36]
    assert sorted(group.units for group in groups) == [12, 12, 14, 14]
    plan = Plan.of({group.name: range(1, group.units, 2) for group in groups})
    assert_slim_equals_masked(program, plan)


def test_heads_whose_keys_are_assembled_and_partly_shared() -> None:
    program = located("latent")
    groups = only(program, AttentionGroup)
    assert [(group.units, group.head_dim) for group in groups] == [(4, 8)] * 2
    assert_slim_equals_masked(program, Plan.of({groups[0].name: [1, 2], groups[1].name: [3]}))


def test_heads_with_slopes() -> None:
    program = located("alibi")
    groups = only(program, AttentionGroup)
    assert_slim_equals_masked(program, Plan.of({groups[0].name: [0, 3], groups[1].name: [1, 2, 3]}))


def test_whole_experts() -> None:
    program = located("moe")
    first, second = only(program, ExpertGroup)
    plan = Plan.of({first.name: [0, 2, 3, 5], second.name: [1, 4]})
    slim = assert_slim_equals_masked(program, plan).graph_module
    shapes = {name: p.shape[0] for name, p in slim.named_parameters() if "experts" in name or "gate.weight" in name}
    assert sorted(shapes.values()) == [2, 2, 2, 4, 4, 4]
    masked = InsertMasks()(program.replace(plan=plan)).program.graph_module
    assert sum(isinstance(module, ChoiceMask) for module in masked.modules()) >= 2


def test_channels_inside_experts_are_each_experts_own() -> None:
    program = located("moe")
    first, second = only(program, ExpertMlpGroup)
    own = [expert * 16 + (channel * 5 + expert * 3) % 16 for expert in range(6) for channel in range(8)]
    last = [expert * 16 + 12 + channel for expert in range(6) for channel in range(4)]
    slim = assert_slim_equals_masked(program, Plan.of({first.name: own, second.name: last})).graph_module
    widths = {p.shape[1:] for name, p in slim.named_parameters() if "down_proj" in name}
    assert widths == {(36, 8), (36, 4)}


def test_experts_and_channels_inside_those_that_stay() -> None:
    program = located("moe")
    whole, inner = only(program, ExpertGroup)[0], only(program, ExpertMlpGroup)[0]
    own = [expert * 16 + (channel * 7 + expert) % 16 for expert in range(6) for channel in range(12)]
    assert_slim_equals_masked(program, Plan.of({whole.name: [1, 3, 5], inner.name: own}))


def test_everything_at_once() -> None:
    program = located("moe")
    kept: dict[str, Any] = {}
    for group in program.groups:
        if isinstance(group, ExpertMlpGroup):
            kept[group.name] = [e * 16 + (c * 3 + e) % 16 for e in range(6) for c in range(8)]
        elif isinstance(group, ExpertGroup):
            kept[group.name] = [0, 1, 4]
        elif isinstance(group, HiddenGroup):
            kept[group.name] = range(8, 36)
        elif isinstance(group, AttentionGroup):
            kept[group.name] = [0, 3]
    assert_slim_equals_masked(program, Plan.of(kept))


@pytest.mark.parametrize("layer", [0, 1])
def test_whole_layers(layer: int) -> None:
    program = located("gemma")
    (group,) = only(program, LayerGroup)
    slim = assert_slim_equals_masked(program, Plan.of({group.name: [1 - layer]}))
    assert len(slim.interface.cache) == len(program.interface.cache) - 2
    assert {entry.layer for entry in slim.interface.cache} == {0}
    names = [name for name, _ in slim.graph_module.named_parameters() if f"layers.{layer}." in name]
    assert not names


def test_illegal_plans_are_refused_by_name() -> None:
    program = located("moe")
    whole, inner, hidden = (only(program, kind)[0] for kind in (ExpertGroup, ExpertMlpGroup, HiddenGroup))
    refused = {
        "1 experts would be left; it needs at least 2": Plan.of({whole.name: [3]}),
        "the experts would have different numbers of channels": Plan.of({inner.name: range(5, 85)}),
        "is not a multiple of 4": Plan.of({inner.name: [e * 16 + c for e in range(6) for c in range(6)]}),
        "hidden channel 36 does not exist": Plan.of({hidden.name: range(1, 37)}),
    }
    for message, plan in refused.items():
        with pytest.raises(PlanError, match=message) as error:
            Slim()(program.replace(plan=plan))
        assert str(error.value).startswith(next(iter(plan.kept)))
