"""Checkpoints: what is saved loads back, computes the same, and bad input is refused by name."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from fxprune.checkpoints.checkpoint import load, load_skeleton, save
from fxprune.core.errors import CheckpointError
from fxprune.models.mixed_model import stock_model_class
from fxprune.models.skeleton import state_shapes
from tests.slices import (
    SMALL,
    Keep,
    consumer_cuts_of,
    cut,
    cuts_of,
    json_of,
    logits,
    make_model,
    masked,
    source_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WIDE = Keep()
MLP = Keep(mlp=range(3, 19))
NARROW_MLP = Keep(mlp=range(7))
KV1 = Keep(heads=(2, 3), kv=(1,))
KV1_MLP = Keep(heads=(2, 3), kv=(1,), mlp=range(3, 19))
ONE_PER_GROUP = Keep(heads=(0, 3))


def slim_state(model: PreTrainedModel, keeps: Sequence[Keep]) -> dict[str, Tensor]:
    return cut(model.state_dict(), cuts_of(model, keeps))


def reference_of(model: PreTrainedModel, keeps: Sequence[Keep], biases: Mapping[str, Tensor]) -> PreTrainedModel:
    """The masked dense model, with biases added: the exact reference."""
    reference = masked(model, consumer_cuts_of(model, keeps))
    for name, bias in biases.items():
        reference.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(bias)
    return reference


def compensation(layers: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"model.layers.{layer}.{name}.bias": torch.randn(32) for layer in layers for name in names}


def text(model: PreTrainedModel, **options: object) -> list[int]:
    ids = model.generate(torch.tensor([[3, 14, 15]]), max_new_tokens=12, do_sample=False, **options)
    tokens: list[int] = ids[0].tolist()
    return tokens


Case = tuple[str, dict[str, object], list[Keep], tuple[str, ...], str]
CASES: dict[str, Case] = {
    "llama, MLP": ("llama", {}, [MLP] * 3, (), "uniform"),
    "llama, heads and MLP": ("llama", {}, [KV1_MLP] * 3, (), "uniform"),
    "llama, a query head of each group": ("llama", {}, [ONE_PER_GROUP] * 3, (), "uniform"),
    "llama, biases": ("llama", {}, [KV1_MLP] * 3, ("self_attn.o_proj", "mlp.down_proj"), "uniform"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, [MLP] * 3, (), "uniform"),
    "llama, mixed": ("llama", {}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "llama, mixed and tied": ("llama", {"tie_word_embeddings": True}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "llama, one KV group of one layer": ("llama", {}, [WIDE, KV1, WIDE], (), "mixed"),
    "llama, mixed heads and biases": ("llama", {}, [KV1_MLP, ONE_PER_GROUP, MLP], ("mlp.down_proj",), "mixed"),
    "llama, heads that do not divide": (
        "llama",
        {"num_key_value_heads": 4},
        [Keep(heads=(0, 1, 3), kv=(0, 1, 3))] * 3,
        (),
        "mixed",
    ),
    "mistral, heads and MLP": ("mistral", {}, [KV1_MLP] * 3, (), "uniform"),
    "mistral, mixed": ("mistral", {"sliding_window": 3}, [KV1_MLP, WIDE, MLP], (), "mixed"),
    "mistral, biases": ("mistral", {}, [KV1_MLP] * 3, ("self_attn.o_proj",), "mixed"),
    "qwen2, MLP": ("qwen2", {}, [MLP] * 3, (), "uniform"),
    "qwen2, heads and MLP": ("qwen2", {}, [KV1_MLP] * 3, (), "uniform"),
    "qwen2, mixed heads": ("qwen2", {}, [KV1, WIDE, ONE_PER_GROUP], ("self_attn.o_proj",), "mixed"),
    "qwen3, heads and MLP": ("qwen3", {"head_dim": 8}, [KV1_MLP] * 3, (), "uniform"),
    "qwen3, mixed": ("qwen3", {"head_dim": 8}, [KV1, MLP, ONE_PER_GROUP], (), "mixed"),
    "gpt2, MLP": ("gpt2", {}, [MLP] * 3, (), "uniform"),
    "gpt2, MLP width not set": ("gpt2", {"n_inner": None}, [Keep(mlp=range(5, 85))] * 3, (), "uniform"),
    "gpt2, mixed": ("gpt2", {}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "opt, MLP": ("opt", {"word_embed_proj_dim": 32}, [MLP] * 3, (), "uniform"),
    "opt, mixed": ("opt", {"word_embed_proj_dim": 32}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "bloom, MLP that no field describes": ("bloom", {}, [Keep(mlp=range(5, 85))] * 3, (), "mixed"),
    "nothing narrowed": ("llama", {}, [WIDE] * 3, (), "uniform"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reloaded_model_computes_what_the_masked_one_does(case: Case, tmp_path: Path) -> None:
    name, changes, keeps, biased, kind = case
    model = make_model(name, **{**SMALL, **changes})
    biases = compensation([0, 2], biased)
    tensors = slim_state(model, keeps) | biases
    reference = reference_of(model, keeps, biases)
    info = save(tensors, tmp_path / "out", source=source_of(model), plan={"a": [1, 2]}, history=[{"pass": "x"}])
    assert info.kind == kind
    assert (info.reason == "") == (kind == "uniform")
    loaded = load(tmp_path / "out")
    assert stock_model_class(type(loaded)) is type(model)
    assert (type(loaded) is type(model)) == (kind == "uniform")
    assert not loaded.training
    assert loaded.state_dict().keys() - set(tensors) <= set(json_of(tmp_path / "out")["zero_biases"])
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)
    assert text(loaded) == text(reference)
    assert sum(p.numel() for p in loaded.parameters()) == info.parameters
    skeleton = load_skeleton(tmp_path / "out")
    assert state_shapes(skeleton) == state_shapes(loaded)
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    assert skeleton.config.to_dict() == loaded.config.to_dict()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is type(loaded)
    torch.testing.assert_close(logits(plain), logits(loaded), atol=0, rtol=0)
    assert text(plain) == text(reference)


Written = tuple["PreTrainedModel", "dict[str, Tensor]", "Path"]


@pytest.fixture(name="written", scope="module")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A mixed llama checkpoint that no test may change."""
    model = make_model("llama", **SMALL)
    keeps = [KV1_MLP, ONE_PER_GROUP, MLP]
    tensors = slim_state(model, keeps) | compensation([1], ["mlp.down_proj"])
    directory = tmp_path_factory.mktemp("written") / "out"
    save(tensors, directory, source=source_of(model), plan={}, history=[])
    return model, tensors, directory


@pytest.mark.smoke
def test_mixed_config_keeps_dense_values_and_records_layers(tmp_path: Path) -> None:
    model = make_model("qwen3", **{**SMALL, "head_dim": 8})
    save(slim_state(model, [KV1_MLP, WIDE, MLP]), tmp_path / "out", source=source_of(model), plan={}, history=[])
    config = json_of(tmp_path / "out", "config.json")
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 24)
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"intermediate_size": 16},
    }
    assert "allow_global_per_layer_attribute_access" not in config
    assert (config["model_type"], config["base_model_type"], config["fxprune"]) == ("fxprune", "qwen3", {"version": 1})
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        type(model).from_pretrained(tmp_path / "out")


def test_the_class_without_layers_of_their_own_refuses_a_mixed_checkpoint(written: Written) -> None:
    record = json_of(written[2], "config.json")["fxprune"]
    name = "model.layers.1.mlp.down_proj.bias"  # all that no field says
    assert record == {"version": 1, "parameters": {name: [32]}}
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        type(written[0]).from_pretrained(written[2])


@pytest.mark.smoke
def test_every_tensor_comes_back_and_buffers_are_those_of_an_ordinary_model(
    written: Written,
) -> None:
    model, tensors, directory = written
    loaded = load(directory)
    state = loaded.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
    ordinary = dict(model.named_non_persistent_buffers())
    assert ordinary
    for name, buffer in loaded.named_non_persistent_buffers():
        assert torch.equal(buffer, ordinary[name]), name


def test_head_counts_reach_the_blocks(written: Written) -> None:
    loaded = load(written[2])
    attention = [layer.self_attn for layer in loaded.model.layers]
    assert [block.num_key_value_groups for block in attention] == [2, 1, 2]
    assert [block.layer_idx for block in attention] == [0, 1, 2]
    projection = loaded.model.layers[1].mlp.down_proj
    assert (projection.in_features, projection.out_features, projection.bias is None) == (24, 32, False)
    assert [config.num_attention_heads for config in loaded.config.per_layer_config] == [2, 2, 4]
    assert [config.num_key_value_heads for config in loaded.config.per_layer_config] == [1, 2, 2]


def test_generate_with_a_static_cache(written: Written) -> None:
    loaded = load(written[2])
    assert text(loaded, cache_implementation="static") == text(loaded)


def test_blocks_follow_the_attention_implementation_of_the_model(written: Written) -> None:
    loaded = load(written[2])
    before = logits(loaded)
    for model in (loaded, copy.deepcopy(loaded)):
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits(model), before)


def test_gradients_reach_every_parameter(written: Written) -> None:
    loaded = load(written[2])
    ids = torch.tensor([[3, 14, 15, 9]])
    loaded(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, parameter in loaded.named_parameters() if parameter.grad is None] == []


@pytest.mark.smoke
def test_a_loaded_mixed_model_can_be_slimmed_and_saved_again(written: Written, tmp_path: Path) -> None:
    loaded = load(written[2])
    tensors = loaded.state_dict()
    for name, index in (
        ("gate_proj", (slice(0, 8),)),
        ("up_proj", (slice(0, 8),)),
        ("down_proj", (slice(None), slice(0, 8))),
    ):
        key = f"model.layers.0.mlp.{name}.weight"
        tensors[key] = tensors[key][index]
    info = save(tensors, tmp_path / "again", source=source_of(loaded), plan={}, history=[])
    assert info.layer_overrides[0] == {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert info.layer_overrides[1] == {"num_attention_heads": 2}
    assert load(tmp_path / "again").model.layers[0].mlp.down_proj.in_features == 8


def test_heads_that_no_field_can_express_are_refused_by_block(tmp_path: Path) -> None:
    model = make_model("opt", **SMALL, word_embed_proj_dim=32)
    keep = Keep(heads=(0, 1, 3), kv=(0, 1, 3))  # the class derives the size of a head from the number of heads
    tensors = slim_state(model, [MLP, keep, WIDE])
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn: .*layers\.1\.self_attn\.k_proj\.weight"
    ) as caught:
        save(tensors, tmp_path / "out", source=source_of(model), plan={}, history=[])
    assert "fc1" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_load_on_an_accelerator(written: Written) -> None:
    loaded = load(written[2], device="cuda")
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cuda"}
    ids = torch.tensor([[3, 14, 15]])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids.cuda()).logits.cpu(), load(written[2])(input_ids=ids).logits, atol=1e-3, rtol=1e-3
        )
