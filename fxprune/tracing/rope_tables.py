"""Rotary tables that a class recomputes while it runs: traced as a function of the positions, and mended after a cast.

Dynamic-NTK RoPE remembers the longest sequence so far and decides in Python whether its table must grow; a graph can
hold neither. Its table for a length is a function of that length and of the configuration, which is what is traced:

    length = max(position_ids) + 1 ──► inv_freq(max(length, max_position_embeddings)) ──► cos, sin

For sequences that only grow, and for a new one that is shorter than the original length, it is what the class computes.
(LongRoPE chooses between two tables with `torch.where`, which traces as it is.)
"""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fxprune.core.errors import CheckpointError
from fxprune.core.tensors import same_bits
from fxprune.models.skeleton import BUILD_ERRORS, build_skeleton, initialize_buffers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["restore_tables", "stateless_rope"]


@contextmanager
def stateless_rope(changed: Sequence[nn.Module]) -> Iterator[None]:
    """While the context lasts, these dynamic RoPE modules compute their table from the positions and keep nothing."""
    for module in changed:
        module.forward = _Stateless(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class _Stateless:
    """The forward of a rotary embedding whose table is computed anew each time."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        module = self.module
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        more = {} if layer_type is None else {"layer_type": layer_type}
        if "dynamic" not in kind:
            return type(module).forward(module, x, position_ids, **more)
        with torch.no_grad():
            length = position_ids.max() + 1
            table, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, **more)
            stand_in = copy.copy(module)  # shares all but the table
            stand_in._buffers = {**module._buffers, f"{layer_type}_inv_freq" if layer_type else "inv_freq": table}
            stand_in.attention_scaling = scaling
            return inspect.unwrap(type(module).forward)(stand_in, x, position_ids, **more)


def restore_tables(model: PreTrainedModel) -> tuple[str, ...]:
    """Give buffers that a cast rounded the values that the class computes, as `from_pretrained` does.

    `model.half()` casts rotary frequencies with the weights, and no checkpoint holds them: saved and loaded, the model
    would have the exact ones. Only buffers that are exactly the rounded ones are changed, in the model itself.

    Args:
        model: any model; one on the meta device is left alone.

    Returns:
        The names of the buffers that were changed.
    """
    low = {
        name: buffer
        for name, buffer in model.named_non_persistent_buffers()
        if buffer.dtype in {torch.float16, torch.bfloat16} and not buffer.is_meta
    }
    if not low:
        return ()
    try:
        fresh = build_skeleton(type(model), model.config, model.dtype)
        initialize_buffers(fresh, torch.device("cpu"))
    except (CheckpointError, *BUILD_ERRORS):
        return ()  # a class that cannot be built anew is refused where a checkpoint is asked for
    changed = []
    for name, exact in fresh.named_non_persistent_buffers():
        rounded = low.get(name)
        if rounded is None or exact.dtype == rounded.dtype or not same_bits(exact.to(rounded.dtype), rounded.cpu()):
            continue
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = exact.to(rounded.device)
        changed.append(name)
    return tuple(changed)
