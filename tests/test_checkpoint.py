"""Checkpoints: what is saved loads back, computes the same, and bad input is refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fxprune.checkpoint import load, save
from fxprune.errors import CheckpointError
from fxprune.program import Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

HEAD_DIM = 8
HIDDEN = 32
UNKNOWN = "<unk>"
SMALL: dict[str, object] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Keep:
    """What one layer keeps: query heads, KV heads, MLP channels; None for all."""

    heads: Sequence[int] | None = None
    kv: Sequence[int] | None = None
    mlp: Sequence[int] | None = None


WIDE = Keep()
MLP = Keep(mlp=range(3, 19))
NARROW_MLP = Keep(mlp=range(7))
KV1 = Keep(heads=(2, 3), kv=(1,))
KV1_MLP = Keep(heads=(2, 3), kv=(1,), mlp=range(3, 19))
ONE_PER_GROUP = Keep(heads=(0, 3))


def make_model(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config")
    values = {**SMALL, **changes}
    if name == "GPT2":
        values |= {"n_positions": 64}
    if name == "OPT":
        values |= {"ffn_dim": values.pop("intermediate_size"), "word_embed_proj_dim": 32}
    if name == "Qwen3":
        values |= {"head_dim": HEAD_DIM}
    model_class = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = model_class(config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: what is zero by default hides mistakes
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
            )
    return model


def source_of(model: PreTrainedModel, **changes: Any) -> Source:
    source = Source("tiny", copy.deepcopy(model.config), type(model), generation_config=model.generation_config)
    return replace(source, **changes)


def rows(heads: Sequence[int]) -> list[int]:
    return [head * HEAD_DIM + channel for head in heads for channel in range(HEAD_DIM)]


def slim_state(model: PreTrainedModel, keeps: Sequence[Keep]) -> dict[str, Tensor]:
    """The state dict with removed heads and channels cut out, in the class's own layout."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def cut(prefix: str, index: Sequence[int], axis: int) -> None:
        weight = f"{prefix}.weight"
        state[weight] = state[weight].index_select(axis, torch.tensor(list(index)))
        bias = f"{prefix}.bias"
        if bias in state and produces(model, prefix) == axis:
            state[bias] = state[bias][list(index)]

    for layer, keep in enumerate(keeps):
        names = projections(model, layer)
        for prefix in names["producers"] if keep.mlp is not None else ():
            cut(prefix, keep.mlp or (), produces(model, prefix))
        if keep.mlp is not None:
            cut(names["consumer"], keep.mlp, 1 - produces(model, names["consumer"]))
        if keep.heads is not None:
            attention = f"{names['layer']}.self_attn"
            cut(f"{attention}.q_proj", rows(keep.heads), 0)
            cut(f"{attention}.{'out' if 'OPT' in type(model).__name__ else 'o'}_proj", rows(keep.heads), 1)
        if keep.kv is not None:
            for name in ("k_proj", "v_proj"):
                cut(f"{names['layer']}.self_attn.{name}", rows(keep.kv), 0)
    return state


def projections(model: PreTrainedModel, layer: int) -> dict[str, Any]:
    if hasattr(model, "transformer"):
        block = f"transformer.h.{layer}"
        first, second = ("dense_h_to_4h", "dense_4h_to_h") if "Bloom" in type(model).__name__ else ("c_fc", "c_proj")
        return {"layer": block, "producers": [f"{block}.mlp.{first}"], "consumer": f"{block}.mlp.{second}"}
    if hasattr(model.model, "decoder"):
        block = f"model.decoder.layers.{layer}"
        return {"layer": block, "producers": [f"{block}.fc1"], "consumer": f"{block}.fc2"}
    block = f"model.layers.{layer}"
    producers = [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"]
    return {"layer": block, "producers": producers, "consumer": f"{block}.mlp.down_proj"}


def produces(model: PreTrainedModel, prefix: str) -> int:
    """The axis of a projection's weight that its outputs lie on: Conv1D holds its weight transposed."""
    return 0 if isinstance(model.get_submodule(prefix), torch.nn.Linear) else 1


def masked(model: PreTrainedModel, keeps: Sequence[Keep], biases: Mapping[str, Tensor]) -> PreTrainedModel:
    """The dense model with the removed units' consumer columns zeroed, and biases added: the exact reference."""
    reference = copy.deepcopy(model)
    for layer, keep in enumerate(keeps):
        names = projections(model, layer)
        for index, consumer in ((keep.mlp, names["consumer"]), (keep.heads and rows(keep.heads), None)):
            if index is None:
                continue
            module = reference.get_submodule(consumer or f"{names['layer']}.self_attn.o_proj")
            axis = 1 if isinstance(module, torch.nn.Linear) else 0
            dropped = sorted(set(range(module.weight.shape[axis])) - set(index))
            module.weight.data.index_fill_(axis, torch.tensor(dropped, dtype=torch.long), 0.0)
    for name, bias in biases.items():
        reference.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(bias)
    return reference


def compensation(layers: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"model.layers.{layer}.{name}.bias": torch.randn(HIDDEN) for layer in layers for name in names}


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a batch of two rows, the second left-padded; padding is cut off."""
    ids = torch.tensor([[3, 14, 15, 9, 26, 5], [0, 0, 35, 8, 9, 7]])
    mask = (ids != 0).long()
    with torch.no_grad():
        output: Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    return torch.cat([output[0], output[1, 2:]])


def text(model: PreTrainedModel, **options: object) -> list[int]:
    ids = model.generate(torch.tensor([[3, 14, 15]]), max_new_tokens=12, do_sample=False, **options)
    tokens: list[int] = ids[0].tolist()
    return tokens


Case = tuple[str, dict[str, object], list[Keep], tuple[str, ...], str]
CASES: dict[str, Case] = {
    "llama, MLP": ("Llama", {}, [MLP] * 3, (), "uniform"),
    "llama, heads and MLP": ("Llama", {}, [KV1_MLP] * 3, (), "uniform"),
    "llama, a query head of each group": ("Llama", {}, [ONE_PER_GROUP] * 3, (), "uniform"),
    "llama, biases": ("Llama", {}, [KV1_MLP] * 3, ("self_attn.o_proj", "mlp.down_proj"), "uniform"),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, [MLP] * 3, (), "uniform"),
    "llama, mixed": ("Llama", {}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "llama, mixed and tied": ("Llama", {"tie_word_embeddings": True}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "llama, one KV group of one layer": ("Llama", {}, [WIDE, KV1, WIDE], (), "mixed"),
    "llama, mixed heads and biases": ("Llama", {}, [KV1_MLP, ONE_PER_GROUP, MLP], ("mlp.down_proj",), "mixed"),
    "llama, heads that do not divide": (
        "Llama",
        {"num_key_value_heads": 4},
        [Keep(heads=(0, 1, 3), kv=(0, 1, 3))] * 3,
        (),
        "mixed",
    ),
    "mistral, heads and MLP": ("Mistral", {}, [KV1_MLP] * 3, (), "uniform"),
    "mistral, mixed": ("Mistral", {"sliding_window": 3}, [KV1_MLP, WIDE, MLP], (), "mixed"),
    "mistral, biases": ("Mistral", {}, [KV1_MLP] * 3, ("self_attn.o_proj",), "mixed"),
    "qwen2, MLP": ("Qwen2", {}, [MLP] * 3, (), "uniform"),
    "qwen2, heads and MLP": ("Qwen2", {}, [KV1_MLP] * 3, (), "uniform"),
    "qwen2, mixed heads": ("Qwen2", {}, [KV1, WIDE, ONE_PER_GROUP], ("self_attn.o_proj",), "mixed"),
    "qwen3, heads and MLP": ("Qwen3", {}, [KV1_MLP] * 3, (), "uniform"),
    "qwen3, mixed": ("Qwen3", {}, [KV1, MLP, ONE_PER_GROUP], (), "mixed"),
    "gpt2, MLP": ("GPT2", {"n_inner": 24}, [MLP] * 3, (), "uniform"),
    "gpt2, MLP width not set": ("GPT2", {}, [Keep(mlp=range(5, 85))] * 3, (), "uniform"),
    "gpt2, mixed": ("GPT2", {"n_inner": 24}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "opt, MLP": ("OPT", {}, [MLP] * 3, (), "uniform"),
    "opt, mixed": ("OPT", {}, [MLP, WIDE, NARROW_MLP], (), "mixed"),
    "bloom, MLP that no field describes": ("Bloom", {}, [Keep(mlp=range(5, 85))] * 3, (), "mixed"),
    "nothing narrowed": ("Llama", {}, [WIDE] * 3, (), "uniform"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reloaded_model_computes_what_the_masked_one_does(case: Case, tmp_path: Path) -> None:
    name, changes, keeps, biased, kind = case
    model = make_model(name, **changes)
    biases = compensation([0, 2], biased)
    tensors = slim_state(model, keeps) | biases
    reference = masked(model, keeps, biases)
    info = save(tensors, tmp_path / "out", source=source_of(model), plan={"a": [1, 2]}, history=[{"pass": "x"}])
    assert info.kind == kind
    assert (info.reason == "") == (kind == "uniform")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.state_dict().keys() - set(tensors) <= set(json_of(tmp_path / "out")["zero_biases"])
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)
    assert text(loaded) == text(reference)
    assert sum(p.numel() for p in loaded.parameters()) == info.parameters
    if kind == "uniform":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(plain), logits(loaded), atol=0, rtol=0)
        assert text(plain) == text(reference)


def json_of(directory: Path, name: str = "fxprune.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / name).read_text())
    return values


Written = tuple["PreTrainedModel", "dict[str, Tensor]", "Path"]


@pytest.fixture(name="written", scope="module")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A mixed llama checkpoint that no test may change."""
    model = make_model("Llama")
    keeps = [KV1_MLP, ONE_PER_GROUP, MLP]
    tensors = slim_state(model, keeps) | compensation([1], ["mlp.down_proj"])
    directory = tmp_path_factory.mktemp("written") / "out"
    save(tensors, directory, source=source_of(model), plan={}, history=[])
    return model, tensors, directory


def test_mixed_config_keeps_dense_values_and_records_layers(tmp_path: Path) -> None:
    model = make_model("Qwen3")
    save(slim_state(model, [KV1_MLP, WIDE, MLP]), tmp_path / "out", source=source_of(model), plan={}, history=[])
    config = json_of(tmp_path / "out", "config.json")
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 24)
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"intermediate_size": 16},
    }
    assert "allow_global_per_layer_attribute_access" not in config
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_plain_loading_of_a_mixed_checkpoint_is_refused(written: Written) -> None:
    assert "per_layer_config" not in json_of(written[2], "config.json")  # LlamaConfig cannot be constructed with it
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(written[2])


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
    model = make_model("OPT")
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
