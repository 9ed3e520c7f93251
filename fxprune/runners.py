"""Runners: one way to drive every form of a causal language model (eager, traced graph, ONNX Runtime, ...).

A runner takes tokens and a cache and returns logits and the longer cache. Verification, perplexity, greedy text and
the benchmark are written once against this protocol and serve every form.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from fxprune.matmul import wide_products

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from fxprune.program import Interface

__all__ = ["EagerRunner", "GraphRunner", "Past", "Runner", "greedy", "position_ids_from_mask", "scoring_products"]

Past = list[torch.Tensor]
"""A cache as flat tensors: key and value of layer 0, key and value of layer 1, ... (batch, KV heads, length, dim)."""


@runtime_checkable
class Runner(Protocol):
    """Anything that continues a batch of sequences."""

    name: str

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """Run new tokens on a cache.

        Args:
            input_ids: (batch, new) int64.
            attention_mask: (batch, past + new) int64, 0 for padding.
            position_ids: (batch, new) int64.
            past: the cache a former step returned; None to start.

        Returns:
            Logits (batch, new, vocabulary) and the cache for the next step.
        """
        ...


def position_ids_from_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Positions of the last `new` tokens when padding does not count: (batch, new) int64."""
    positions: Tensor = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions[:, -new:]


class EagerRunner:
    """Runs a Hugging Face causal language model as it is."""

    def __init__(self, model: Callable[..., Any], name: str = "eager") -> None:
        self.model = model
        self.name = name

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`."""
        from transformers import DynamicCache  # noqa: PLC0415 - only this runner needs transformers

        cache = DynamicCache()
        for layer in range(len(past) // 2 if past else 0):
            assert past is not None
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        flat = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, flat


class GraphRunner:
    """Runs a flat traced graph: any `Program.graph_module` with a cache in its interface."""

    def __init__(self, graph_module: Callable[..., Any], interface: Interface, name: str = "graph") -> None:
        self.graph_module = graph_module
        self.interface = interface
        self.name = name

    def empty_past(self, batch: int) -> Past:
        """A cache of length 0; the interface of a slim program already has the slim head counts."""
        examples = (self.interface.example_inputs[entry.input] for entry in self.interface.cache)
        return [example.new_empty(batch, example.shape[1], 0, example.shape[3]) for example in examples]

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`."""
        past = self.empty_past(input_ids.shape[0]) if past is None else past
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {entry.input: tensor for entry, tensor in zip(self.interface.cache, past, strict=True)}
        outputs = self.graph_module(*(given[name] for name in self.interface.inputs))
        named = dict(zip(self.interface.outputs, outputs, strict=True))
        return named["logits"], [named[entry.output] for entry in self.interface.cache]


def scoring_products(runner: Runner, device: torch.device | str) -> AbstractContextManager[None]:
    """Where a runner's figures count and not its time: see `fxprune.matmul.wide_products`.

    Args:
        runner: forms that torch runs as they are get these products; compiled ones and other runtimes keep theirs.
        device: where the runner wants its inputs.
    """
    return wide_products(device) if type(runner) in {EagerRunner, GraphRunner} else nullcontext()


def greedy(runner: Runner, input_ids: Tensor, new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
    """Greedy continuation, one token at a time on the cache.

    Args:
        runner: any form of the model.
        input_ids: (batch, prompt) int64.
        new_tokens: how many tokens to add.
        attention_mask: (batch, prompt) int64; all ones when None.

    Returns:
        The new tokens, (batch, new_tokens) int64.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens, past, made = input_ids, None, []
    for _ in range(new_tokens):
        logits, past = runner.step(tokens, mask, position_ids_from_mask(mask, tokens.shape[1]), past)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        made.append(tokens)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return torch.cat(made, dim=1)
