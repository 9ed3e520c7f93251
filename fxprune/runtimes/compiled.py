"""torch.compile: a Hugging Face model compiled with its cache as plain tensors, one graph for all lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.core.errors import ExportError
from fxprune.models.cache_names import cache_argument, cache_of
from fxprune.runtimes.runners import EagerRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fxprune.runtimes.runners import Past

__all__ = ["CompiledRunner"]


class CompiledRunner(EagerRunner):
    """Runs a causal language model through `torch.compile`.

    The whole step is one graph with dynamic sizes: whatever cannot be compiled is an error, never a silent return to
    eager, and lengths of one kind (prompt, single token) share their compiled code. The first step of each kind
    compiles, which takes seconds to minutes.
    """

    def __init__(self, model: Callable[..., Any], *, backend: str = "inductor", name: str = "torch.compile") -> None:
        """Wrap a model; nothing is compiled yet.

        Args:
            model: the model, in evaluation mode.
            backend: of `torch.compile`; `inductor` needs a C++ compiler on CPUs.
            name: how reports call the runner.

        Raises:
            ExportError: the model's cache is more than keys and values.
        """
        super().__init__(model, name)
        from transformers import DynamicCache  # noqa: PLC0415 - only this runner needs transformers

        _require_keys_and_values(model)
        self._new_cache = DynamicCache  # older Dynamo does not import out of transformers' lazy module
        self._argument = cache_argument(model) or "past_key_values"
        self._compiled = torch.compile(self._whole_step, dynamic=True, fullgraph=True, backend=backend)

    def _whole_step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        cache = self._new_cache()
        for layer in range(len(past) // 2 if past else 0):
            assert past is not None
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self._argument: cache},
        )
        flat = [tensor for layer in cache_of(output).layers for tensor in (layer.keys, layer.values)]
        # Keys come out of a prompt as views and out of later steps contiguous; each layout would be compiled for.
        return output.logits, [tensor.contiguous() for tensor in flat]

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`.

        Raises:
            ExportError: the model cannot be compiled, or there is no compiler.
        """
        try:
            logits, cache = self._compiled(input_ids, attention_mask, position_ids, past)
        except Exception as error:
            # Dynamo's and Inductor's errors share no base but Exception; the module says whose it is.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ExportError(
                f"torch.compile failed on {type(self.model).__name__}: {reason}; it needs a C++ compiler (such as "
                "g++), and models without breaks in their graph; run with --runtime torch"
            ) from error
        return logits, list(cache)


def _require_keys_and_values(model: Any) -> None:
    """Refuse a model that keeps a state, which steps of one compiled graph cannot hand on as plain tensors."""
    from transformers import DynamicCache  # noqa: PLC0415 - only this runner needs transformers

    config = getattr(model, "config", None)
    if config is None:
        return  # a function says nothing about its cache
    takes_cache = cache_argument(model) is not None
    layers = DynamicCache(config=config).layers if takes_cache else []
    kept = next((type(layer).__name__ for layer in layers if hasattr(layer, "recurrent_states")), None)
    if kept is not None or not takes_cache:
        raise ExportError(
            f"torch.compile runs models whose cache is keys and values; {type(model).__name__} keeps "
            f"{kept or 'another state'}: run with --runtime torch"
        )
