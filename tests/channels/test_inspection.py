"""Inspection: costs, pins, ties and shared weights against what is counted by hand; the fast ways find the same."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    BertConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    T5Config,
    ViTConfig,
)

import fxprune
from fxprune.channels.accounting import count_parameters, macs_per_token
from fxprune.channels.front_end import LOCATE
from fxprune.channels.inspection import GroupCost, Inspection, inspect_groups, like_names, tied_weights
from fxprune.channels.locate import NormIndex
from fxprune.core import channel_ids
from fxprune.core.channel_ids import IdSet
from fxprune.core.errors import CheckpointError
from fxprune.core.groups import AttentionGroup, ExpertMlpGroup, LayerGroup, collect_slices
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.from_config import inspect_program
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.tracing.trace import trace
from tests.families import located, located_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from fxprune.core.program import Program

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 48, 80, 3, 6, 2, 10, 97


def llama(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**(options | changes))


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Inspection]:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    program = inspect_program(str(path / "config.json"), Stopwatch())
    return program, inspect_groups(program)


def mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip


def located_model(model: PreTrainedModel) -> Program:
    return Pipeline([build_pass(name, {}) for name in LOCATE])(trace(model)).program


def slimmed(program: Program, kept: Mapping[str, Sequence[int]]) -> Program:
    return Slim()(InsertMasks()(program.replace(plan=Plan.of(kept))).program).program


@functools.cache
def mixture() -> tuple[Program, Inspection]:
    program = located_model(MixtralForCausalLM(mixtral()))
    return program, inspect_groups(program)


def of_kind(found: Inspection, kind: str) -> list[GroupCost]:
    return [group for group in found.groups if group.kind == kind]


def test_costs_by_hand(inspected: tuple[Program, Inspection]) -> None:
    _, found = inspected
    head, channel = 2 * HIDDEN * HEAD_DIM, 3 * HIDDEN
    layer = HEADS * head + KV_HEADS * head + MLP * channel
    assert found.block_parameters == LAYERS * layer
    assert found.parameters == LAYERS * (layer + 2 * HIDDEN) + HIDDEN + HIDDEN * VOCABULARY
    assert (found.macs, found.lm_head_macs) == (LAYERS * layer + HIDDEN * VOCABULARY, HIDDEN * VOCABULARY)
    for group in of_kind(found, "attention"):
        assert (group.units, group.unit_parameters, group.shared_parameters) == (HEADS, head, head)
        assert (group.unit_macs, group.shared_macs, group.macs) == (head, head, (HEADS + KV_HEADS) * head)
        assert group.parameters == (HEADS + KV_HEADS) * head
        assert group.removed_share == pytest.approx(head / found.parameters)
    for group in of_kind(found, "mlp"):
        assert (group.units, group.unit_parameters, group.unit_macs, group.macs) == (
            MLP,
            channel,
            channel,
            MLP * channel,
        )
    (hidden,) = of_kind(found, "hidden")
    # Tied: the embedding's column goes once, but its MACs are those of the output projection.
    assert hidden.unit_parameters == found.parameters / HIDDEN
    assert hidden.macs == found.macs
    (layers,) = of_kind(found, "layers")
    assert (layers.units, layers.unit_parameters, layers.unit_macs) == (LAYERS, layer + 2 * HIDDEN, layer)
    assert [len(of_kind(found, kind)) for kind in ("attention", "mlp", "hidden", "layers")] == [LAYERS, LAYERS, 1, 1]


def test_like_pins_of_all_layers_are_one_line(inspected: tuple[Program, Inspection]) -> None:
    _, found = inspected
    assert [(pin.op, pin.module, pin.count, pin.channels) for pin in found.pins] == [
        ("embedding", "model.embed_tokens", 1, VOCABULARY),
        ("output", "lm_head", 1, VOCABULARY),
    ]
    assert "looked up by index" in str(found.pins[0])


class Sorts(nn.Module):
    """Layers with an operator that nobody knows what to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.linalg.matrix_exp(layer(x)) + x
        return x


def test_an_unknown_operator_is_one_pin_with_a_count() -> None:
    found = inspect_groups(located_plain(Sorts(), torch.randn(2, 8, 8)))
    (pin,) = (pin for pin in found.pins if "matrix_exp" in pin.op)
    assert pin.count == 3
    assert "3 times" in str(pin)


def test_names_are_alike_but_for_numbers() -> None:
    assert like_names("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert like_names("transformer.h.0.conv1d.w2") == "transformer.h.*.conv1d.w2"
    assert like_names("model.layers.3: 14 channels") == "model.layers.*: * channels"


def test_tied_and_shared_weights_are_named(inspected: tuple[Program, Inspection]) -> None:
    _, found = inspected
    (tied,) = found.tied
    assert set(tied.names) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert tied.parameters == HIDDEN * VOCABULARY
    (shared,) = found.shared
    assert shared.uses == ("model.embed_tokens", "lm_head")


def test_untied_weights_are_not_listed(tmp_path: Path) -> None:
    llama(tie_word_embeddings=False, num_hidden_layers=2).save_pretrained(tmp_path)
    found = inspect_groups(inspect_program(str(tmp_path), Stopwatch()))
    assert (found.tied, found.shared) == ((), ())


class Twice(nn.Module):
    """One Linear called twice, and one weight in two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(self.again(self.again(x).relu()).relu()).relu())
        return y


def test_a_layer_that_is_called_twice_is_shared_and_costs_twice() -> None:
    program = located_plain(Twice(), torch.randn(2, 3, 6))
    found = inspect_groups(program)
    uses = {weight.name: weight.uses for weight in found.shared}
    assert uses["again.weight"] == uses["again.bias"] == ("again", "again")
    assert sorted(uses["a.weight"]) == ["a", "b"]
    assert found.tied == tied_weights(program.references["eager"].module)
    assert [set(tied.names) for tied in found.tied] == [{"a.weight", "b.weight"}]
    assert found.macs == 4 * 36


def test_experts_cost_what_a_token_computes() -> None:
    _, found = mixture()
    hidden, width, experts, chosen = 32, 48, 5, 2
    for group in of_kind(found, "expert_mlp"):
        assert group.units == experts * width
        assert group.unit_parameters == 3 * hidden
        assert group.unit_macs == pytest.approx(3 * hidden * chosen / experts)
        assert group.macs == pytest.approx(chosen * 3 * hidden * width)
    for group in of_kind(found, "experts"):
        assert group.unit_parameters == 3 * hidden * width + hidden
        assert group.unit_macs == hidden  # its row of the router: a token still goes to as many experts
    (whole,) = of_kind(found, "hidden")
    assert whole.macs == found.macs


def test_group_costs_are_what_plans_remove() -> None:
    """What a table says goes with a unit is what slimming a unit away takes from parameters and MACs."""
    program = located("llama")
    found = inspect_groups(program)
    for group in program.groups:
        if isinstance(group, AttentionGroup):
            cost = next(cost for cost in found.groups if cost.name == group.name)
            heads = group.heads_of(0)
            slim = slimmed(program, {group.name: [unit for unit in range(group.units) if unit not in heads]})
            gone = count_parameters(program.graph_module) - count_parameters(slim.graph_module)
            assert gone == len(heads) * cost.unit_parameters + cost.shared_parameters
            outputs = program.interface.outputs
            macs = [macs_per_token(p.graph_module, outputs=outputs).linear for p in (program, slim)]
            assert macs[0] - macs[1] == len(heads) * cost.unit_macs + cost.shared_macs
            return
    pytest.fail("no attention")


def test_the_json_form_has_every_group(inspected: tuple[Program, Inspection]) -> None:
    _, found = inspected
    data = json.loads(json.dumps(found.to_json()))
    assert {group["name"] for group in data["groups"]} == {group.name for group in found.groups}
    assert data["groups"][0]["dense"] == HEADS
    assert data["tied"][0]["parameters"] == HIDDEN * VOCABULARY
    assert data["pins"][0]["reason"] == "rows are looked up by index"


SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
ARCHITECTURES = {
    "BertForMaskedLM": BertConfig(vocab_size=41, architectures=["BertForMaskedLM"], **SMALL),
    "AlbertForMaskedLM": AlbertConfig(vocab_size=41, embedding_size=10, **SMALL),
    "T5ForConditionalGeneration": T5Config(
        vocab_size=41, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "ViTForImageClassification": ViTConfig(image_size=8, patch_size=4, num_channels=3, **SMALL),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_is_inspected_from_its_config(name: str, tmp_path: Path) -> None:
    ARCHITECTURES[name].save_pretrained(tmp_path)
    found = inspect_groups(inspect_program(str(tmp_path / "config.json"), Stopwatch()))
    assert found.model_class == name
    assert found.groups
    assert found.pins
    if name != "ViTForImageClassification":  # here: that its class is found and traced
        assert of_kind(found, "attention")
        assert of_kind(found, "mlp")
    if name == "AlbertForMaskedLM":  # one layer, called again
        assert any(len(weight.uses) == 2 and "attention" in weight.name for weight in found.shared)


def test_a_mixture_in_float32_is_inspected_from_its_config(tmp_path: Path) -> None:
    Qwen2MoeConfig(
        vocab_size=41, hidden_size=24, intermediate_size=36, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=20, dtype="float32",
    ).save_pretrained(tmp_path)  # fmt: skip
    found = inspect_groups(inspect_program(str(tmp_path), Stopwatch()))
    assert [group.units for group in of_kind(found, "experts")] == [4, 4]


def test_a_mixed_checkpoint_shows_its_slim_widths_without_weights(tmp_path: Path) -> None:
    """Layer 0 has one KV head left, layer 1 two query heads of each, layer 2 is dense."""
    heads = {0: [0, 1, 2], 1: [0, 2, 4, 5], 2: range(HEADS)}
    widths = {0: 40, 1: 72, 2: MLP}
    program = located_model(LlamaForCausalLM(llama()))
    by_layer = {f"model.layers.{layer}.self_attn": kept for layer, kept in heads.items()}
    by_layer |= {f"model.layers.{layer}.mlp": range(width) for layer, width in widths.items()}
    slim = slimmed(program, by_layer)
    fxprune.save(slim, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "fxprune.json").read_text())["kind"] == "mixed"
    for file in (tmp_path / "out").glob("*.safetensors*"):
        file.unlink()
    for path in (tmp_path / "out", tmp_path / "out" / "config.json"):
        inspected = inspect_program(str(path), Stopwatch())
        assert all(tensor.is_meta for tensor in inspected.graph_module.parameters())
        found = inspect_groups(inspected)
        assert {group.name: group.units for group in of_kind(found, "attention")} == {
            f"model.layers.{layer}.self_attn": len(kept) for layer, kept in heads.items()
        }
        assert {group.name: group.units for group in of_kind(found, "mlp")} == {
            f"model.layers.{layer}.mlp": width for layer, width in widths.items()
        }
        assert [(g.units, g.kv_heads) for g in inspected.groups if isinstance(g, AttentionGroup)] == [
            (3, 1),
            (4, 2),
            (6, 2),
        ]
        assert found.parameters == count_parameters(slim.graph_module)


CHECKPOINTS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    # Its class takes the number of heads from the configuration, and looks for padding where there is no mask.
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=4, pad_token_id=3)),
        {"transformer.h.0.attn": [0, 2, 3], "transformer.h.0.mlp": range(40)},
    ),
    # Takes keys and values out of one projection by lists of positions.
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, bias=False)
        ),
        {"transformer.h.0.self_attention": [0, 2], "transformer.h.1.mlp": range(40)},
    ),
    "experts": (
        lambda: MixtralForCausalLM(mixtral()),
        {
            "model.layers.0.mlp": [0, 2, 4],
            "model.layers.1.mlp.experts": [48 * expert + channel for expert in range(5) for channel in range(40)],
        },
    ),
    "layers and hidden channels": (
        lambda: LlamaForCausalLM(llama(num_hidden_layers=4)),
        {"model.layers": [0, 2, 3], "model.layers.2.mlp": range(16), "model": range(40)},
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_inspected_as_if_its_weights_were_loaded(name: str, tmp_path: Path) -> None:
    build, kept = CHECKPOINTS[name]
    fxprune.save(slimmed(located_model(build()), kept), tmp_path / "out")
    loaded = located_model(fxprune.load(tmp_path / "out"))
    assert {type(group) for group in loaded.groups} >= {AttentionGroup, LayerGroup}
    for file in (tmp_path / "out").glob("*.safetensors*"):
        file.unlink()
    found = inspect_groups(inspect_program(str(tmp_path / "out"), Stopwatch()))
    assert found.to_json() == inspect_groups(loaded).to_json() | {"model": found.model}


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type"):
        inspect_program(str(tmp_path / "config.json"), Stopwatch())


# --- what makes it fast must not change what is found ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_merged_ids_are_connected_components(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 60))
    monkeypatch.setattr(channel_ids, "_CHUNK", int(random.integers(1, 40)))
    merges = [
        (random.integers(0, size, n).astype(np.int32), random.integers(0, size, n).astype(np.int32))
        for n in random.integers(1, 10, random.integers(0, 8))
    ]
    if seed % 3 == 0:  # a path: the longest way to the root
        merges.append((np.arange(size - 1, dtype=np.int32), np.arange(1, size, dtype=np.int32)))
    a, b = (np.concatenate([pair[end] for pair in merges] or [np.zeros(0, np.int32)]) for end in (0, 1))
    count, labels = connected_components(csr_matrix((np.ones(len(a)), (a, b)), (size, size)), directed=False)
    mine, component = channel_ids._merged(merges, size)
    assert mine == count
    assert len(set(zip(labels.tolist(), component.tolist(), strict=True))) == count


def test_a_set_of_ids_knows_what_is_in_it() -> None:
    ids = IdSet()
    assert not ids.contains(np.array([[0, 5], [7, 10**6]])).any()
    ids.append(np.array([5, 5000]))
    ids.append(np.zeros(0, dtype=np.int64))
    ids.append(np.array([10**6]))
    assert ids.contains(np.array([[0, 5], [4999, 10**6], [5000, 10**9]])).tolist() == [
        [False, True],
        [False, True],
        [True, False],
    ]


def test_the_channel_map_counts_classes_not_ids() -> None:
    channels = located("llama").channels
    assert channels is not None
    assert channels.count == len(np.unique(channels.class_of)) < len(channels.class_of)


def test_norms_are_found_by_the_classes_they_reduce() -> None:
    program, _ = mixture()
    channels = program.channels
    assert channels is not None
    index = NormIndex(channels)
    members = [np.unique(channels.class_of[norm.ids]) for norm in channels.norms]
    for axis in channels.axes[:: max(1, len(channels.axes) // 20)]:
        classes = np.unique(channels.of_axis(axis))
        expected = [n for n, m in zip(channels.norms, members, strict=True) if np.isin(m, classes).any()]
        assert index.over(classes) == expected
        together = [n for n, m in zip(channels.norms, members, strict=True) if n in expected and len(m) > 1]
        assert index.over(classes, together=True) == together
    assert index.together.sum() == len(np.unique(np.concatenate([m for m in members if len(m) > 1])))


def test_slices_of_sets_of_classes() -> None:
    """A unit may be several classes: what a KV head's query heads share is its key and its value rows."""
    program = located("llama")
    channels = program.channels
    assert channels is not None
    for group in program.groups:
        if isinstance(group, AttentionGroup):
            assert group.kv_heads == 2
            assert [piece.indices.shape for piece in group.shared] == [(2, 6), (2, 6)]
            assert [sorted(piece.indices.ravel().tolist()) for piece in group.shared] == [list(range(12))] * 2
    assert collect_slices(channels, [], {}) == []


def test_layers_and_caches_are_matched() -> None:
    program = mixture()[0]
    (layers,) = (group for group in program.groups if isinstance(group, LayerGroup))
    keys_and_values = program.interface.inputs[-4:]
    assert layers.caches == (keys_and_values[:2], keys_and_values[2:])
    assert all(group.experts == 5 for group in program.groups if isinstance(group, ExpertMlpGroup))
