"""Skeletons: a model whose layers have configurations of their own computes what the one its class builds does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from fxprune.core.errors import CheckpointError
from fxprune.models.skeleton import (
    aliases,
    build_layered_skeleton,
    build_skeleton,
    config_with,
    fill_skeleton,
    layer_list,
    outer_lists,
    resize_projections,
    resolve_model_class,
    state_shapes,
)

NARROW = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}


def native(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": 61,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**values, **changes})).eval()


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen2", "phi3", "granite", "gemma3_text", "mixtral", "cohere", "glm", "olmo2"],
)
def test_blocks_with_their_own_config_compute_what_the_class_does(model_type: str) -> None:
    reference = native(model_type, **NARROW)
    dense = native(model_type).config
    overrides = dict.fromkeys(range(2), NARROW)
    model = build_layered_skeleton(type(reference), dense, overrides)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert state_shapes(model) == state_shapes(reference)
    owners = aliases(reference)
    fill_skeleton(model, {n: t for n, t in reference.state_dict().items() if owners[n] == n}, torch.device("cpu"))
    model.config.per_layer_config = overrides
    ids = torch.tensor([[3, 14, 15, 9, 26, 5]])
    for implementation in ("sdpa", "eager"):
        for candidate in (model, reference):
            candidate.set_attn_implementation(implementation)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    ordinary = dict(reference.named_non_persistent_buffers())
    for name, buffer in model.named_non_persistent_buffers():
        assert torch.equal(buffer, ordinary[name]), name


def test_layers_without_overrides_do_not_read_the_heterogeneous_config() -> None:
    dense = native("phi3")  # its attention reads the number of heads from its configuration while running
    model = build_layered_skeleton(type(dense), dense.config, {1: {"num_attention_heads": 2}})
    fill_skeleton(model, {n: torch.zeros(s) for n, s in state_shapes(model).items()}, torch.device("cpu"))
    model.config.per_layer_config = {1: {"num_attention_heads": 2}}
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 61)


def test_layer_list_is_the_outermost_one() -> None:
    mixtral = native("mixtral", num_local_experts=2, num_experts_per_tok=2)  # as many experts as layers
    assert layer_list(build_skeleton(type(mixtral), mixtral.config)) == "model.layers"
    model = build_skeleton(type(mixtral), config_with(mixtral.config, {"num_hidden_layers": 3}))
    model.config.num_hidden_layers = 7
    assert layer_list(model) is None


def test_outer_lists_are_the_stacks_of_layers() -> None:
    config = CONFIG_MAPPING["t5"](d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4)
    model = build_skeleton(AutoModelForSeq2SeqLM._model_mapping[type(config)], config)
    lists = outer_lists(model)  # not the list of sublayers that every block has
    assert {name: len(layers) for name, layers in lists.items()} == {"encoder.block": 2, "decoder.block": 3}


def test_overrides_that_the_class_refuses_are_named() -> None:
    config = StableLmConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    construct = StableLmDecoderLayer.__init__
    with pytest.raises(CheckpointError, match=r"model\.layers\.1: .*num_attention_heads': 3"):
        build_layered_skeleton(StableLmForCausalLM, config, {1: {"num_attention_heads": 3}})
    assert StableLmDecoderLayer.__init__ is construct


def test_projections_are_resized_and_given_biases() -> None:
    model = build_skeleton(type(native("llama")), native("llama").config)
    shapes = state_shapes(model)
    prefix = "model.layers.0.mlp.down_proj"
    assert resize_projections(model, shapes) == ()
    changed = resize_projections(model, {**shapes, f"{prefix}.weight": (32, 9), f"{prefix}.bias": (32,)})
    assert changed == (f"{prefix}.weight", f"{prefix}.bias")
    linear = model.get_submodule(prefix)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (9, 32)
    assert linear.weight.is_meta
    # Neither a norm nor a weight that is tied to something else is a projection that could be narrowed alone.
    tied = native("llama", tie_word_embeddings=True)
    model = build_skeleton(type(tied), tied.config)
    narrower = {**shapes, "model.norm.weight": (31,), "lm_head.weight": (60, 32), "model.embed_tokens.weight": (60, 32)}
    assert resize_projections(model, narrower) == ()


def test_filling_needs_every_tensor() -> None:
    model = native("llama")
    tensors = model.state_dict()
    tensors["extra"] = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"no tensor for \['model\.norm\.weight'\], no parameter for \['extra'\]"):
        fill_skeleton(build_skeleton(type(model), model.config), tensors, torch.device("cpu"))
    tensors = model.state_dict()
    tensors["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="size mismatch"):
        fill_skeleton(build_skeleton(type(model), model.config), tensors, torch.device("cpu"))


def test_a_buffer_that_nothing_initialises_is_found() -> None:
    model = build_skeleton(type(native("llama")), native("llama").config)
    with torch.device("meta"):
        model.model.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(CheckpointError, match=r"does not initialise its buffer model\.table"):
        fill_skeleton(model, native("llama").state_dict(), torch.device("cpu"))


def test_classes_come_from_the_auto_mappings_only() -> None:
    config = native("llama").config
    assert resolve_model_class(config, "LlamaForCausalLM") is type(native("llama"))
    assert resolve_model_class(config, "LlamaModel").__name__ == "LlamaModel"
    for name in ("GPT2LMHeadModel", "LlamaConfig", "os.system", ""):
        with pytest.raises(CheckpointError, match="no model class called"):
            resolve_model_class(config, name)


def test_a_class_that_is_built_from_the_text_part_is_found_by_its_name() -> None:
    config = CONFIG_MAPPING["emu3_text_model"]()
    assert resolve_model_class(config, "Emu3ForCausalLM").config_class is type(config)
    with pytest.raises(CheckpointError, match="no model class called"):
        resolve_model_class(config, "Emu3ForConditionalGeneration")


def test_no_parameter_of_a_skeleton_has_values() -> None:
    config = CONFIG_MAPPING["diffllama"](hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=61)
    model = build_skeleton(resolve_model_class(config, "DiffLlamaForCausalLM"), config)
    assert all(parameter.is_meta for parameter in model.parameters())
