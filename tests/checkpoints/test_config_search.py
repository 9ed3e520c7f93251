"""The configuration search recovers the fields behind slim shapes, for classes it knows nothing about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fxprune.checkpoints.config_search import NoMatch, UniformMatch, find_layer_overrides, find_uniform, probe_fields
from fxprune.models.skeleton import build_layered_skeleton, build_skeleton, config_with, state_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fxprune.models.skeleton import Shape

WIDTHS: dict[str, tuple[dict[str, object], dict[str, int]]] = {
    "llama": ({}, {"intermediate_size": 16}),
    "phi3": ({}, {"intermediate_size": 16}),
    "mixtral": ({}, {"intermediate_size": 16}),
    "qwen3_moe": ({"moe_intermediate_size": 24}, {"moe_intermediate_size": 16}),
    "gpt2": ({}, {"n_inner": 80}),
    "gptj": ({"rotary_dim": 4}, {"n_inner": 80}),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 32}, {"ffn_dim": 16}),
    "gpt_neox": ({}, {"intermediate_size": 16}),
    "falcon": ({}, {"ffn_hidden_size": 80}),
    "biogpt": ({}, {"intermediate_size": 16}),
}
# Whether the class derives the size of a head from the number of heads unless it is told.
HEADS = {
    "llama": False,
    "mistral": False,
    "gemma3_text": False,
    "qwen2": True,
    "phi3": True,  # query, key and value in one projection: sizes depend on two fields at once
    "mixtral": True,
    "starcoder2": True,
    "cohere": True,
    "olmo2": True,  # norms over all heads
}


def dense(model_type: str, **changes: object) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    values: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if model_type.startswith("gemma"):
        values["head_dim"] = 8
    config = CONFIG_MAPPING[model_type](**{**values, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return type(model), model.config


def shapes_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, overrides: dict[int, dict[str, int]]
) -> dict[str, Shape]:
    """Shapes of a model whose layers have other configurations, as its class builds them."""
    return state_shapes(build_layered_skeleton(model_class, config, overrides))


@pytest.mark.parametrize("model_type", WIDTHS)
def test_widths_are_found_uniform_and_per_layer(model_type: str) -> None:
    changes, fields = WIDTHS[model_type]
    model_class, config = dense(model_type, **changes)
    shapes = shapes_of(model_class, config, dict.fromkeys(range(3), fields))
    found = find_uniform(model_class, config, shapes, ())
    assert isinstance(found, UniformMatch)
    assert found.overrides == fields
    assert found.zero_biases == {}
    assert state_shapes(build_skeleton(model_class, found.config)) == shapes
    shapes = shapes_of(model_class, config, {1: fields})
    uneven = find_uniform(model_class, config, shapes, ())
    assert isinstance(uneven, NoMatch)
    assert uneven.reason.startswith("layers differ in ")
    layers = find_layer_overrides(model_class, config, shapes)
    assert layers.overrides == {1: fields}
    assert layers.unexplained == ()


@pytest.mark.parametrize("model_type", HEADS)
def test_heads_are_found_with_their_size_kept(model_type: str) -> None:
    model_class, config = dense(model_type)
    fields = {"num_attention_heads": 2, "num_key_value_heads": 1}
    pinned = config_with(config, {"head_dim": 8})
    assert state_shapes(build_skeleton(model_class, pinned)) == state_shapes(build_skeleton(model_class, config))
    shapes = shapes_of(model_class, pinned, dict.fromkeys(range(3), fields))
    found = find_uniform(model_class, config, shapes, ())
    assert isinstance(found, UniformMatch)
    assert found.overrides == fields | ({"head_dim": 8} if HEADS[model_type] else {})
    assert found.config.head_dim == 8
    layers = find_layer_overrides(model_class, config, shapes_of(model_class, pinned, {2: fields}))
    assert layers.overrides == {2: fields}
    assert layers.unexplained == ()
    assert layers.config.head_dim == 8


def test_every_layer_gets_its_own_fields() -> None:
    model_class, config = dense("llama", num_hidden_layers=4)
    overrides = {
        0: {"intermediate_size": 8},
        1: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20},
        3: {"num_attention_heads": 2},
    }
    found = find_layer_overrides(model_class, config, shapes_of(model_class, config, overrides))
    assert found.overrides == overrides
    assert config.intermediate_size == 24  # the caller's is untouched


def test_fields_for_the_whole_model_come_before_those_of_layers() -> None:
    model_class, config = dense("llama", head_dim=8)
    narrow = config_with(config, {"hidden_size": 30})  # LlamaConfig refuses it: no multiple of four heads
    shapes = shapes_of(model_class, narrow, {1: {"intermediate_size": 16}})
    found = find_layer_overrides(model_class, config, shapes)
    assert (found.everywhere, found.overrides) == ({"hidden_size": 30}, {1: {"intermediate_size": 16}})
    assert (found.unexplained, found.config.hidden_size) == ((), 32)
    both = config_with(config, {"hidden_size": 30, "intermediate_size": 16})
    found = find_layer_overrides(model_class, config, state_shapes(build_skeleton(model_class, both)))
    assert (found.everywhere, found.overrides) == ({"hidden_size": 30, "intermediate_size": 16}, {})


def test_an_objection_to_what_a_configuration_builds_is_the_reason() -> None:
    model_class, config = dense("llama")
    shapes = shapes_of(model_class, config, {layer: {"intermediate_size": 16} for layer in range(3)})
    found = find_uniform(model_class, config, shapes, (), objection=lambda model: f"{type(model).__name__} is no good")
    assert found == NoMatch("LlamaForCausalLM built with {'intermediate_size': 16}: LlamaForCausalLM is no good")
    pinned = find_uniform(model_class, config, shapes, (), pins={"rms_norm_eps": 0.5})
    assert isinstance(pinned, UniformMatch)
    assert pinned.overrides == {"intermediate_size": 16, "rms_norm_eps": 0.5}


def test_bias_flags_are_found_and_what_they_add_too_much() -> None:
    model_class, config = dense("llama")
    new = [f"model.layers.{layer}.{name}.bias" for layer in (0, 2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    shapes = shapes_of(model_class, config, {layer: {"intermediate_size": 16} for layer in range(3)})
    found = find_uniform(model_class, config, {**shapes, **dict.fromkeys(new, (32,))}, new)
    assert isinstance(found, UniformMatch)
    assert found.overrides == {"attention_bias": True, "mlp_bias": True, "intermediate_size": 16}
    assert len(found.zero_biases) == 3 * 7 - 4
    assert found.zero_biases["model.layers.0.mlp.up_proj.bias"] == (16,)
    assert found.zero_biases["model.layers.1.self_attn.o_proj.bias"] == (32,)
    only = find_uniform(model_class, config, {**shapes, new[1]: (32,)}, new[1:2])
    assert isinstance(only, UniformMatch)
    assert "attention_bias" not in only.overrides


def test_a_bias_that_no_flag_adds_is_named() -> None:
    model_class, config = dense("mistral")
    name = "model.layers.0.mlp.down_proj.bias"
    shapes = state_shapes(build_skeleton(model_class, config))
    found = find_uniform(model_class, config, {**shapes, name: (32,)}, [name])
    assert found == NoMatch(f"no field of MistralConfig adds {name}")


def test_a_configuration_that_its_class_refuses_is_no_match() -> None:
    model_class, config = dense("llama", num_key_value_heads=4)
    shapes = shapes_of(
        model_class, config, {layer: {"num_attention_heads": 3, "num_key_value_heads": 3} for layer in range(3)}
    )
    found = find_uniform(model_class, config, shapes, ())
    assert isinstance(found, NoMatch)
    assert "LlamaConfig refuses" in found.reason
    assert "not a multiple" in found.reason


def test_a_width_that_no_field_gives_is_unexplained() -> None:
    model_class, config = dense("bloom")  # four times the hidden size, always
    shapes = state_shapes(build_skeleton(model_class, config))
    for layer in range(3):
        prefix = f"transformer.h.{layer}.mlp"
        shapes |= {
            f"{prefix}.dense_h_to_4h.weight": (80, 32),
            f"{prefix}.dense_h_to_4h.bias": (80,),
            f"{prefix}.dense_4h_to_h.weight": (32, 80),
        }
    assert find_uniform(model_class, config, shapes, ()) == NoMatch("no fields of BloomConfig give the slim shapes")
    layers = find_layer_overrides(model_class, config, shapes)
    assert layers.overrides == {}
    assert len(layers.unexplained) == 9


def test_what_fields_explain_is_used_where_something_else_is_not() -> None:
    model_class, config = dense("opt", ffn_dim=24, word_embed_proj_dim=32)
    shapes = shapes_of(model_class, config, {1: {"ffn_dim": 16}})
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    found = find_layer_overrides(model_class, config, {**shapes, name: (24, 32)})
    assert found.overrides == {1: {"ffn_dim": 16}}
    assert found.unexplained == (name,)


def test_probing_measures_effects_and_leaves_out_what_has_none() -> None:
    model_class, config = dense("llama")
    effects = {effect.name: effect for effect in probe_fields(model_class, config)}
    assert effects.keys() == {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    }
    assert effects["num_attention_heads"].value == 4
    assert set(np.unique(effects["num_attention_heads"].slopes)) == {0.0, 8.0}  # rows of a head
    assert set(np.unique(effects["intermediate_size"].slopes)) == {0.0, 1.0}


def test_an_unset_width_is_probed_for_its_value() -> None:
    model_class, config = dense("gpt2")
    assert config.n_inner is None
    effects = {effect.name: effect.value for effect in probe_fields(model_class, config)}
    assert effects["n_inner"] == 128  # four times the hidden size


def test_a_deep_wide_model_is_searched_without_weights() -> None:
    config = LlamaConfig(num_hidden_layers=80, num_key_value_heads=8)  # 4096 wide
    shapes = shapes_of(LlamaForCausalLM, config, {layer: {"intermediate_size": 8192 + 64 * layer} for layer in (3, 70)})
    found = find_layer_overrides(LlamaForCausalLM, config, shapes)
    assert found.overrides == {3: {"intermediate_size": 8384}, 70: {"intermediate_size": 12672}}
