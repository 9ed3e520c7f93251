"""Runners of models without a cache: one forward pass over text, for the benchmark.

A step runs all of its tokens and gives the first output; there is nothing to go on with, so decoding is refused.
Encoder-decoders read the tokens on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import UsageError
from fxprune.models.model_class import text_inputs
from fxprune.runtimes.runners import EagerRunner
from fxprune.tracing.outputs import named_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from fxprune.runtimes.runners import Past

__all__ = ["ForwardRunner", "FunctionRunner"]


class ForwardRunner(EagerRunner):
    """Runs a Hugging Face model that reads tokens as it is, without a cache."""

    def __init__(self, model: Callable[..., Any], name: str = "torch") -> None:
        super().__init__(model, name)
        config: Any = getattr(model, "config", None)
        self.vocabulary = int(config.get_text_config().vocab_size)

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `fxprune.runtimes.runners.Runner.step`; the result is the model's first output, and no cache.

        Raises:
            UsageError: there is a past.
        """
        del position_ids
        _refuse_past(self.name, past)
        outputs = named_outputs(self.model(**text_inputs(self.model, input_ids, attention_mask)))
        return next(iter(outputs.values())), []


class FunctionRunner:
    """Runs a function from named inputs to named outputs, such as `fxprune.exporters.ort.OrtFunction`.

    Args:
        function: with the names of what it takes in `inputs`, and the file it came from in `path`.
        name: how reports call it.

    Attributes:
        vocabulary: 1: how many tokens there are is not written in a graph, and which ones they are changes no time.
    """

    vocabulary = 1

    def __init__(self, function: Any, name: str = "onnxruntime") -> None:
        self.function: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = function
        self.names: tuple[str, ...] = function.inputs
        self.path: Path = function.path
        self.name = name

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `ForwardRunner.step`.

        Raises:
            UsageError: there is a past, or the graph takes what text does not give.
        """
        _refuse_past(self.name, past)
        given = {
            "input_ids": input_ids,
            "decoder_input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if strange := [name for name in self.names if name not in given]:
            raise UsageError(f"{self.path} takes {strange[0]}, which text does not give: it cannot be timed here")
        return next(iter(self.function({name: given[name] for name in self.names}).values())), []


def _refuse_past(name: str, past: Past | None) -> None:
    if past is not None:
        raise UsageError(f"a model without a cache in {name} decodes nothing: leave decoding out (--decode 0)")
