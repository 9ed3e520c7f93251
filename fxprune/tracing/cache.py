"""The cache of a sample: filled by the model itself, and which of its axes follow the batch and the length.

A cache goes into the graph where all that it keeps grows with the tokens, as keys and values do: then an empty one is
what a prompt starts from. A state of fixed size (convolution, linear attention, Mamba) is there or is not, and torch
bakes in which; such a model is traced on whole sequences, without a cache.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fxprune.models.cache_names import cache_of
from fxprune.tracing.on_meta import without_padding
from fxprune.tracing.outputs import named_results

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["BATCH", "NEW", "PAST", "axes_of_cache", "growing_cache", "quiet_exporter"]

_LOGGER = logging.getLogger(__name__)


BATCH, NEW, PAST = 2, 3, 5
"""Sizes of the sample: pairwise different, and at least 2 because torch.export bakes in lengths of 0 and 1."""


_CACHE_DIMS = 4
"""Axes of cached keys and values: batch, heads, length, channels. The keys of an indexer, without heads, have fewer."""


def _cache(model: nn.Module, batch: int, length: int) -> Any:
    """A cache filled by the model itself, so that every model's own layout comes out right; None if it returns none.

    It is filled as the exporter traces it, sliding windows with all their tokens.
    """
    from transformers.exporters.utils import apply_patches  # noqa: PLC0415 - heavy, Hugging Face path only

    device = next(model.parameters()).device
    tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    # On the meta device neither a mask nor tokens have values that could be looked at.
    mask = {} if device.type == "meta" else {"attention_mask": torch.ones_like(tokens)}
    padding = without_padding(model.config) if device.type == "meta" else nullcontext()
    with torch.no_grad(), quiet_exporter(), apply_patches("dynamo"), padding, named_results(model.config):
        output = model(input_ids=tokens, **mask, use_cache=True)
    return cache_of(output)


def growing_cache(model: nn.Module) -> Any:
    """A filled cache if every tensor of it grows with the tokens; None if the model keeps a state of fixed size."""
    try:
        cache = _cache(model, BATCH, PAST)
        if cache is None:
            return None
        axes = axes_of_cache(model, cache)
    except (AttributeError, TypeError, ValueError) as error:
        # It may run without one all the same; if not, that error says more.
        _LOGGER.warning("%s makes no cache (%s); it is traced on whole sequences", type(model).__name__, error)
        return None
    grows = all(len(changing) != 1 for changing in axes)  # of a state, the batch alone changes
    plain = all(leaf.dim() == _CACHE_DIMS for leaf, of in zip(pytree.tree_leaves(cache), axes, strict=True) if of)
    return cache if any(axes) and grows and plain else None


def axes_of_cache(model: nn.Module, cache: Any) -> list[dict[int, Any]]:
    """Which axes of each cache tensor follow batch and length: those that change when both change."""
    from transformers.exporters.exporter_dynamo import (  # noqa: PLC0415 - heavy, Hugging Face path only
        register_cache_pytrees_for_model,
    )

    register_cache_pytrees_for_model(model)
    other = pytree.tree_leaves(_cache(model, BATCH + 1, PAST + 2))
    return [
        {axis: torch.export.Dim.AUTO for axis in range(mine.dim()) if mine.shape[axis] != yours.shape[axis]}
        for mine, yours in zip(pytree.tree_leaves(cache), other, strict=True)
    ]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter warns that it is experimental each time; our verification makes that warning moot."""
    logger = logging.getLogger("transformers.exporters")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
