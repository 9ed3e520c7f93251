"""Masks of pruned weights that a model comes with: those of its checkpoint, and zeros that another tool has left.

How they are written, read and held is in `fxprune.tracing.weight_masks`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.tracing.lifted import is_projection
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.weight_masks import has_masks, masks_that_hold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["masks_of_model", "masks_of_zeros"]

_LOGGER = logging.getLogger(__name__)


_MANY_ZEROS = 0.1
"""From this share of zeros on, a weight was pruned by somebody: what training leaves has hardly any."""


def masks_of_model(model: nn.Module, path: Path | None = None) -> dict[str, Tensor]:
    """The masks of the checkpoint that a model was loaded from.

    Args:
        model: any module, its weights as they are in the checkpoint; on the meta device nothing is known of them.
        path: the checkpoint's directory; by default the one that the model's configuration names, if it is one.

    Returns:
        As `read_masks`. Empty, with a warning, where a weight that a mask removes is not zero: the model has learned
        since without holding them, so it is not what the masks speak of.

    Raises:
        CheckpointError: the file is damaged, or names a parameter that the model does not have in this shape.
    """
    named = getattr(getattr(model, "config", None), "name_or_path", None)
    directory = path if path is not None else Path(named).expanduser() if isinstance(named, str) and named else None
    if directory is None or not directory.is_dir() or not has_masks(directory):
        return {}
    return masks_that_hold(model, directory, named=path is not None)


def masks_of_zeros(graph_module: nn.Module, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the zeros that projections have where nobody says that they shall stay: another tool's pruning.

    Args:
        graph_module: a lifted graph; on the meta device nothing is found.
        known: masks that there are, by qualified name; these projections are left out.

    Returns:
        Masks of the projections of which a tenth or more is zero.
    """
    found: dict[str, Tensor] = {}
    for name, module in graph_module.named_modules():
        if is_projection(module) and name not in known:
            weight = get_attribute(graph_module, name).weight.detach()
            if not weight.is_meta and weight.numel() - int(weight.count_nonzero()) >= _MANY_ZEROS * weight.numel():
                found[name] = (weight != 0).cpu()
    return found
