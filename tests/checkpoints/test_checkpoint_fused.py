"""Checkpoints of classes with fused or transposed projections: exact, or refused with the module's name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import CheckpointError
from tests.slices import HIDDEN, cut, logits, make_model, masked, save_slim

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from tests.slices import Cut

CHANNELS = range(3, 19)
GATE_UP = [*CHANNELS, *(24 + channel for channel in CHANNELS)]
# Patterns below a layer's name; the last cut is the one along the inputs that read the channels.
FALCON_LIKE: list[Cut] = [
    (r"mlp\.dense_h_to_4h\.(weight|bias)", 0, CHANNELS),
    (r"mlp\.dense_4h_to_h\.weight", 1, CHANNELS),
]
MLPS: dict[str, tuple[list[Cut], dict[str, int]]] = {
    "gpt2": (  # (in, out)
        [
            (r"mlp\.c_fc\.weight", 1, CHANNELS),
            (r"mlp\.c_fc\.bias", 0, CHANNELS),
            (r"mlp\.c_proj\.weight", 0, CHANNELS),
        ],
        {"n_inner": 16},
    ),
    "gpt_bigcode": (
        [(r"mlp\.c_fc\.(weight|bias)", 0, CHANNELS), (r"mlp\.c_proj\.weight", 1, CHANNELS)],
        {"n_inner": 16},
    ),
    "gpt_neox": (FALCON_LIKE, {"intermediate_size": 16}),
    "falcon": (FALCON_LIKE, {"ffn_hidden_size": 16}),
    "bloom": (FALCON_LIKE, {}),  # four times the hidden size, always
    "mpt": ([(r"ffn\.up_proj\.weight", 0, CHANNELS), (r"ffn\.down_proj\.weight", 1, CHANNELS)], {}),
    "phi3": (
        [(r"mlp\.gate_up_proj\.weight", 0, GATE_UP), (r"mlp\.down_proj\.weight", 1, CHANNELS)],
        {"intermediate_size": 16},
    ),
}


def in_layers(cuts: Sequence[Cut], layers: str) -> list[Cut]:
    return [(rf".*\.{layers}\.{pattern}", axis, kept) for pattern, axis, kept in cuts]


@pytest.mark.parametrize("layers", [r"\d", "1"], ids=["all layers", "one layer"])
@pytest.mark.parametrize("model_type", MLPS)
def test_mlp_channels(model_type: str, layers: str, tmp_path: Path) -> None:
    cuts, fields = MLPS[model_type]
    model = make_model(model_type)
    cuts = in_layers(cuts, layers)
    info = save_slim(cut(model.state_dict(), cuts), model, tmp_path / "out")
    if layers == r"\d" and fields:
        assert (info.kind, info.config_overrides) == ("uniform", fields)
    else:
        assert (info.kind, info.layer_overrides) == ("mixed", {1: fields} if fields else {})
    reference = masked(model, cuts[-1:])
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


SIZE = HIDDEN // 4  # of a head, where the class derives it


def one_after_the_other(heads: Sequence[int], size: int = SIZE, parts: int = 3) -> list[int]:
    """Rows of all query heads, then of all key heads, then of all value heads."""
    return [part * 4 * size + head * size + row for part in range(parts) for head in heads for row in range(size)]


def by_head(heads: Sequence[int]) -> list[int]:
    """Rows of query, key and value of one head after the other."""
    return [head * 3 * SIZE + row for head in heads for row in range(3 * SIZE)]


def attention_cuts(model_type: str, heads: Sequence[int]) -> list[Cut]:
    """The last cut is the one along the inputs that read the heads."""
    read = one_after_the_other(heads, 8 if model_type == "phi3" else SIZE, 1)
    multi_query = [*read, *range(HIDDEN, HIDDEN + 2 * SIZE)]
    cuts: dict[str, list[Cut]] = {
        "phi3": [
            (r"self_attn\.qkv_proj\.weight", 0, one_after_the_other(heads, 8)),
            (r"self_attn\.o_proj\.weight", 1, read),
        ],
        "gpt_neox": [
            (r"attention\.query_key_value\.(weight|bias)", 0, by_head(heads)),
            (r"attention\.dense\.weight", 1, read),
        ],
        "gpt2": [
            (r"attn\.c_attn\.weight", 1, one_after_the_other(heads)),
            (r"attn\.c_attn\.bias", 0, one_after_the_other(heads)),
            (r"attn\.c_proj\.weight", 0, read),
        ],
        "gpt_bigcode": [(r"attn\.c_attn\.(weight|bias)", 0, multi_query), (r"attn\.c_proj\.weight", 1, read)],
        "bloom": [
            (r"self_attention\.query_key_value\.(weight|bias)", 0, by_head(heads)),
            (r"self_attention\.dense\.weight", 1, read),
        ],
        "falcon": [
            (r"self_attention\.query_key_value\.weight", 0, multi_query),
            (r"self_attention\.dense\.weight", 1, read),
        ],
        "mpt": [(r"attn\.Wqkv\.weight", 0, one_after_the_other(heads)), (r"attn\.out_proj\.weight", 1, read)],
    }
    return cuts[model_type]


def with_heads(model_type: str) -> PreTrainedModel:
    changes: dict[str, Any] = {"num_key_value_heads": 4} if model_type == "phi3" else {}
    return make_model(model_type, **changes)


@pytest.mark.parametrize("heads", [(1, 3), (0, 1, 3)], ids=["half", "three quarters"])
@pytest.mark.parametrize("layers", [r"\d", "1"], ids=["all layers", "one layer"])
@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox"])
def test_heads_that_the_class_can_have(model_type: str, layers: str, heads: Sequence[int], tmp_path: Path) -> None:
    model = with_heads(model_type)
    cuts = in_layers(attention_cuts(model_type, heads), layers)
    info = save_slim(cut(model.state_dict(), cuts), model, tmp_path / "out")
    assert info.kind == ("uniform" if model_type == "phi3" and layers == r"\d" else "mixed")
    reference = masked(model, cuts[-1:])
    assert (logits(model) - logits(reference)).abs().max() > 0.1
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(1, 3), (0, 1, 3)], ids=["half", "three quarters"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "bloom", "falcon", "mpt"])
def test_heads_that_the_class_splits_by_its_own_count_are_refused_without_logits(
    model_type: str, heads: Sequence[int], tmp_path: Path
) -> None:
    model = with_heads(model_type)
    cuts = in_layers(attention_cuts(model_type, heads), "1")
    with pytest.raises(CheckpointError, match="give `expected` logits.* or export the graph instead") as caught:
        save_slim(cut(model.state_dict(), cuts), model, tmp_path / "out")
    assert re.match(
        r"transformer\.(h|blocks)\.1\.(attn|self_attention): \w+ cannot run with the slim", str(caught.value)
    )
    assert list(tmp_path.iterdir()) == []
