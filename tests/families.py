"""Tiny random models of the Llama family, traced once a process, and what tests ask of them again and again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fxprune.core.groups import AttentionGroup
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.locate_attention import LocateAttention
from fxprune.passes.locate_mlp import LocateMlp
from fxprune.runtimes.runners import position_ids_from_mask
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

__all__ = [
    "FAMILIES",
    "LOCATE",
    "STEPS",
    "Step",
    "build",
    "kept_positions",
    "located",
    "located_plain",
    "random_plan",
    "randomise",
    "steps",
]

LOCATE = (LiftLinears(), LocateAttention(), LocateMlp())
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_CLASSES: dict[str, tuple[Callable[..., Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(_CLASSES)


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose norms and biases are random too, so that no wrong index goes unnoticed."""
    config_class, model_class = _CLASSES[family]
    config = config_class(**(SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Replace the ones of norms and the zeros of biases by random numbers."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)


@functools.cache
def located(family: str, **changes: Any) -> Program:
    """A tiny model traced, lifted and located; read-only."""
    return Pipeline(LOCATE)(trace(build(family, **changes))).program


def located_plain(module: nn.Module, *inputs: Tensor) -> Program:
    """A plain module traced, lifted and located."""
    return Pipeline(LOCATE)(trace(module, example_inputs=inputs)).program


def random_plan(groups: tuple[Group, ...], seed: int = 0) -> Plan:
    """A legal plan that keeps some of everything: other query heads in every KV head, two thirds of the channels."""
    rng = np.random.default_rng(seed)
    kept: dict[str, list[int]] = {}
    for group in groups:
        if isinstance(group, AttentionGroup):
            kv_heads = rng.choice(group.kv_heads, max(1, group.kv_heads - 1), replace=False)
            per_kv = int(rng.integers(1, len(group.heads_of(0)) + 1))
            kept[group.name] = [h for kv in kv_heads for h in rng.choice(group.heads_of(int(kv)), per_kv, False)]
        else:
            kept[group.name] = list(rng.choice(group.units, group.units * 2 // 3, replace=False))
    return Plan.of(kept)


def kept_positions(groups: tuple[Group, ...], plan: Plan) -> dict[tuple[str, int], NDArray[np.int64]]:
    """The indices that stay along each parameter axis that a plan narrows, read from the groups alone."""
    gone: dict[tuple[str, int], list[int]] = {}
    for group in groups:
        removed, kept = plan.removed_units(group), list(plan.kept_units(group))
        for piece in group.slices:
            gone.setdefault((piece.parameter, piece.axis), []).extend(piece.indices[removed].ravel().tolist())
        if group.sharing is not None:
            unused = sorted(set(group.sharing.tolist()) - set(group.sharing[kept].tolist()))
            for piece in group.shared:
                gone.setdefault((piece.parameter, piece.axis), []).extend(piece.indices[unused].ravel().tolist())
    sizes = {(s.parameter, s.axis): s for group in groups for s in (*group.slices, *group.shared)}
    return {
        key: np.setdiff1d(np.arange(sizes[key].indices.size), np.array(indices, dtype=np.int64))
        for key, indices in gone.items()
        if indices
    }


@dataclass(frozen=True)
class Step:
    """Tokens and the mask over all tokens so far, for one call of a runner."""

    tokens: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Position ids of the new tokens."""
        return position_ids_from_mask(self.mask, self.tokens.shape[1])


def steps(batch: int, *, padding: int = 0, seed: int = 0, vocabulary: int = SIZES["vocab_size"]) -> list[Step]:
    """Prefill 5 tokens, continue with 3, then 1; the first row is left-padded."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[0, :padding] = 0
    made, seen = [], 0
    for length in (5, 3, 1):
        seen += length
        made.append(Step(torch.randint(0, vocabulary, (batch, length), generator=generator), mask[:, :seen]))
    return made


STEPS: Mapping[str, tuple[int, int]] = {"batch 1": (1, 0), "batch 2": (2, 0), "left padding": (2, 2)}
