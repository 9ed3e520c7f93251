"""Weights that the traced sample does not reach: towers of multimodal classes come out bit by bit as they went in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fxprune.channels.front_end import LOCATE
from fxprune.checkpoints.checkpoint import load
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.flows.steps import prune_program
from fxprune.models.skeleton import build_skeleton, layer_config_path, layer_list
from fxprune.tracing.trace import trace
from fxprune.tracing.unreached import find_shared

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from fxprune.core.program import Program

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PROMPT = torch.arange(3, 11)[None]


def gemma3() -> PreTrainedModel:
    text = Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8)
    special = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = Gemma3Config(text_config=text, vision_config=dict(VISION), mm_tokens_per_image=4, **special)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def llava() -> PreTrainedModel:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=60
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def located(model: nn.Module) -> Program:
    return Pipeline([build_pass(name, {}) for name in LOCATE])(trace(model)).program


def assert_kept(before: dict[str, Tensor], program: Program, after: nn.Module) -> None:
    """Every tensor that the graph does not reach has its bits, and there are some."""
    state = after.state_dict()
    assert any("vision" in name for name in program.unreached)
    for name in program.unreached:
        assert torch.equal(state[name], before[name]), name


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("magnitude-units", {"ratio": 0.2, "uniform": True}),
    "mixed": ("magnitude-units", {"ratio": 0.15, "keep": {"*layers.0*": 1.0}}),
    "sparse": ("magnitude", {"sparsity": 0.5}),
    "calibrated": ("channel", {"ratio": 0.3, "uniform": True, "samples": 4, "seq_len": 16, "reconstruct": "bias"}),
}


@pytest.mark.parametrize("how", METHODS)
def test_the_towers_of_gemma3_are_kept(how: str, tmp_path: Path) -> None:
    """Every way of saving: one configuration, layers that differ, zeros, and a plan with a calibration."""
    model = gemma3()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method, options = METHODS[how]
    dense = located(model)
    slim = prune_program(dense, method, options, out=tmp_path / "slim")
    again = load(tmp_path / "slim")
    assert_kept(before, dense, again)
    assert slim.results["checkpoint"]["kind"] == ("mixed" if how == "mixed" else "uniform")
    assert again.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 11)
    if how != "mixed":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
        assert isinstance(plain, Gemma3ForConditionalGeneration)
        with torch.no_grad():
            assert torch.equal(plain(input_ids=PROMPT).logits, again(input_ids=PROMPT).logits)


def test_a_tower_of_llava_is_kept_and_still_sees(tmp_path: Path) -> None:
    """The whole model runs with an image after its text part was pruned."""
    model = llava()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = located(model)
    prune_program(dense, "magnitude-units", {"ratio": 0.2}, out=tmp_path / "slim")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "slim").eval()
    assert plain.config.text_config.intermediate_size < TEXT["intermediate_size"]
    assert_kept(before, dense, plain)
    ids = torch.tensor([[2, 60, 60, 60, 60, 5, 6]])
    with torch.no_grad():
        logits = plain(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).logits
    assert logits.shape == (1, 7, 64)
    assert bool(logits.isfinite().all())


def test_the_hidden_dimension_stays_where_a_projector_writes_into_it() -> None:
    program = located(gemma3())
    refused = next(event.details["refused"] for event in program.history if event.name == "locate_hidden")
    assert not [group for group in program.groups if group.kind == "hidden"]
    assert any("multi_modal_projector" in reason for reason in refused.values())


def test_a_plain_decoder_reaches_everything() -> None:
    """Nothing is pinned without need: tied embeddings belong to modules that both run."""
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    program = located(model)
    assert not program.unreached
    assert not program.shared
    assert [group.kind for group in program.groups].count("hidden") == 1


class WithHead(LlamaForCausalLM):
    """A decoder with a further head that its own forward pass does not use: narrow, and tied to the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.further = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.further.weight = self.model.embed_tokens.weight


def test_what_a_module_outside_the_graph_owns_too_is_pinned() -> None:
    model = WithHead(LlamaConfig(**TEXT)).eval()
    program = located(model)
    assert program.shared["model.embed_tokens.weight"] == "further"
    assert not program.unreached  # the only tensor of the further head is in the graph
    refused = next(event.details["refused"] for event in program.history if event.name == "locate_hidden")
    assert any("further" in reason for reason in refused.values())
    assert [group.kind for group in program.groups].count("mlp") == 2  # the rest is pruned
    assert find_shared(LlamaForCausalLM(LlamaConfig(**TEXT)), program.graph_module) == {}


def test_layers_and_fields_of_a_nested_configuration_are_found() -> None:
    """The vision tower has as many layers as the text; the list of layers is the text's."""
    model = gemma3()
    skeleton = build_skeleton(type(model), model.config)
    assert layer_config_path(skeleton) == "text_config"
    assert layer_list(skeleton) == "model.language_model.layers"


def test_a_twin_of_a_module_that_runs_pins_nothing() -> None:
    """A class may keep what it ties under a name of its own, which never runs."""

    class Tied(nn.Module):
        def __init__(self, outside: nn.Module) -> None:
            super().__init__()
            self.shared, self.embed, self.out = outside, nn.Embedding(8, 6), nn.Linear(6, 4)
            self.embed.weight = self.shared.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    ids = {"ids": torch.zeros(2, 3, dtype=torch.long)}
    for outside, pinned in ((nn.Embedding(8, 6), False), (nn.Linear(6, 8), True)):
        model = Tied(outside)
        assert bool(find_shared(model, trace(model, example_inputs=ids).graph_module)) is pinned
