"""Checkpoints with fewer or narrower experts, whose weights have three axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import CheckpointError
from tests.slices import cut, json_of, logits, make_model, masked, save_slim, without_experts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from tests.slices import Cut

KEPT = (0, 2, 3, 5)
ROUTERS = {"mixtral": "gate", "qwen3_moe": "gate", "gpt_oss": "router"}
WIDTH_FIELDS = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size", "gpt_oss": "intermediate_size"}


def expert_cuts(model_type: str, layers: str, experts: Sequence[int]) -> list[Cut]:
    prefix = rf"model\.layers\.{layers}\.mlp\."
    return [
        (rf"{prefix}experts\..*", 0, experts),
        (rf"{prefix}{ROUTERS[model_type]}\.(weight|bias)", 0, experts),
    ]


def width_cuts(model: PreTrainedModel, layers: str, width: int) -> list[Cut]:
    """The first channels of every expert; the last cut is the one along the inputs that read them."""
    prefix = rf"model\.layers\.{layers}\.mlp\.experts\."
    if model.config.model_type == "gpt_oss":  # transposed, gate and up interleaved, with biases
        return [
            (rf"{prefix}gate_up_proj", 2, range(2 * width)),
            (rf"{prefix}gate_up_proj_bias", 1, range(2 * width)),
            (rf"{prefix}down_proj", 1, range(width)),
        ]
    dense = model.model.layers[0].mlp.experts.down_proj.shape[2]
    both = [*range(width), *range(dense, dense + width)]
    return [(rf"{prefix}gate_up_proj", 1, both), (rf"{prefix}down_proj", 2, range(width))]


def again(directory: Path) -> PreTrainedModel:
    """A checkpoint as transformers writes it after loading: one tensor an expert where the class's files have that."""
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory / "again")
    return AutoModelForCausalLM.from_pretrained(directory / "again")


@pytest.mark.parametrize("layers", [r"\d", "[12]"], ids=["all layers", "some layers"])
@pytest.mark.parametrize(
    ("experts", "width"),
    [(KEPT, None), (None, 8), (KEPT, 8), (None, 7), (KEPT, 7)],
    ids=["fewer", "narrower", "fewer and narrower", "of odd width", "fewer and of odd width"],
)
@pytest.mark.parametrize("model_type", ROUTERS)
def test_experts_are_cut_exactly(
    model_type: str, experts: Sequence[int] | None, width: int | None, layers: str, tmp_path: Path
) -> None:
    model = make_model(model_type)
    cuts: list[Cut] = []
    reference = model
    fields: dict[str, int] = {}
    if width is not None:
        cuts += width_cuts(model, layers, width)
        reference = masked(reference, cuts[-1:])
        fields[WIDTH_FIELDS[model_type]] = width
    if experts is not None:
        cuts += expert_cuts(model_type, layers, experts)
        reference = without_experts(reference, rf"model\.layers\.{layers}\.mlp\.{ROUTERS[model_type]}", experts)
        fields["num_local_experts"] = len(experts)
    info = save_slim(cut(model.state_dict(), cuts), model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    if layers == r"\d":
        assert (info.kind, info.config_overrides) == ("mixed" if width == 7 else "uniform", fields)
    else:
        assert (info.kind, info.config_overrides) == ("mixed", {})
        assert info.layer_overrides == {1: fields, 2: fields}
    # Grouped products need rows of 16 bytes.
    assert loaded.config._experts_implementation == ("eager" if width == 7 else "grouped_mm")
    torch.testing.assert_close(logits(loaded), logits(reference), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    for how in (AutoModelForCausalLM.from_pretrained, again):
        torch.testing.assert_close(logits(how(tmp_path / "out")), logits(loaded), atol=0, rtol=0)


def test_an_odd_width_says_why_it_is_mixed(tmp_path: Path) -> None:
    model = make_model("mixtral", num_hidden_layers=1)
    info = save_slim(cut(model.state_dict(), width_cuts(model, "0", 7)), model, tmp_path / "out")
    assert "experts.down_proj are no multiple of 16 bytes" in info.reason
    assert json_of(tmp_path / "out", "config.json")["intermediate_size"] == 24
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.isfinite(logits(half)).all()
    # 12 elements are a multiple of 16 bytes in single precision, and none in half precision.
    save_slim(cut(model.state_dict(), width_cuts(model, "0", 12)), model, tmp_path / "b")
    assert load(tmp_path / "b").config._experts_implementation == "grouped_mm"
    assert torch.isfinite(logits(load(tmp_path / "b", dtype=torch.bfloat16))).all()


@pytest.mark.parametrize("model_type", ROUTERS)
def test_fewer_experts_than_a_token_chooses_are_refused_by_block(model_type: str, tmp_path: Path) -> None:
    model = make_model(model_type)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp: .*index k out of range.*choose other widths or"):
        save_slim(cut(model.state_dict(), expert_cuts(model_type, "2", (1,))), model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_experts_without_their_router_are_refused(tmp_path: Path) -> None:
    model = make_model("mixtral")
    with pytest.raises(CheckpointError, match=r"no field of MixtralConfig gives the shape of .*mlp\.(gate|experts)\."):
        save_slim(cut(model.state_dict(), expert_cuts("mixtral", "1", KEPT)[:1]), model, tmp_path / "out")
