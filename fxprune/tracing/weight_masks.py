"""Masks of pruned weights: kept beside the weights, so that what comes later holds them.

    weight_masks.safetensors ─ trace ─ Source.weight_masks ─ lift ─ Program.weight_masks ─ every pass ─ save

One bit a weight, in `weight_masks.safetensors` (or several `weight_masks-*.safetensors`): for every pruned parameter
its packed mask (uint8, row-major, first bit highest), with the mask's shape in the file's metadata. Loaders of the
weights do not look at these files; tracing does, and every pass leaves at zero what they remove.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fxprune.core.errors import CheckpointError
from fxprune.tracing.lifted import is_projection, parameter_of
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = [
    "has_masks",
    "hold_masks",
    "masks_of_projections",
    "masks_of_state",
    "masks_that_hold",
    "read_masks",
    "write_masks",
]

_LOGGER = logging.getLogger(__name__)
_STEM = "weight_masks"


def write_masks(directory: Path, masks: Mapping[str, Tensor], part: int | None = None) -> str | None:
    """Write masks, bool of any shape, by the names of their parameters; without masks nothing is written.

    Args:
        directory: where.
        masks: what.
        part: a number, where the masks of a model are written in several files.

    Returns:
        The file's name, if one was written.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if not masks:
        return None
    name = f"{_STEM}.safetensors" if part is None else f"{_STEM}-{part:05d}.safetensors"
    bits = {key: mask.cpu().contiguous().numpy().reshape(-1) for key, mask in masks.items()}
    packed = {key: torch.from_numpy(np.packbits(mask)) for key, mask in bits.items()}
    shapes = {key: list(mask.shape) for key, mask in masks.items()}
    try:
        save_file(packed, directory / name, {"shapes": json.dumps(shapes)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {directory / name}: {error}") from error
    return name


def has_masks(directory: Path) -> bool:
    """Whether a checkpoint has masks; their files, a bit for every weight of the model, are not read."""
    return any(directory.glob(f"{_STEM}*.safetensors"))


def read_masks(directory: Path) -> dict[str, Tensor]:
    """Read the masks of a checkpoint: bool, True for kept, in the layout of the checkpoint's parameters.

    Returns:
        By qualified name of the parameter; empty where nothing was pruned weight by weight.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob(f"{_STEM}*.safetensors")):
        found |= _read_file(path)
    return found


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: _unpacked(packed[name], shapes[name]) for name in shapes}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    bits = np.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what masks remove to zero again, in place: to be called after every step of a training that must hold them.

    Args:
        model: a model with the parameters that the masks name.
        masks: as `read_masks` gives them.

    Raises:
        CheckpointError: the model has no such parameter, or it has another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            kind = type(model).__name__
            raise CheckpointError(f"the mask of {name}, {tuple(mask.shape)}, fits no parameter of {kind}")
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))


def masks_of_projections(
    graph_module: nn.Module, masks: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks as a lifted graph has the weights, the way back of `masks_of_state`.

    Args:
        graph_module: a lifted graph.
        masks: by the names of the parameters of the model's class.

    Returns:
        Masks by qualified name of the projection, in the layout of its weight; and those that are no projection's.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, module in graph_module.named_modules():
        if is_projection(module):
            original, turned = parameter_of(module, f"{name}.weight")
            if original in masks:
                used.add(original)
                found[name] = masks[original].t() if turned else masks[original]
    return found, {name: mask for name, mask in masks.items() if name not in used}


def masks_of_state(graph_module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of a lifted graph's projections, named and laid out as the model's class has their weights."""
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        original, turned = parameter_of(get_attribute(graph_module, name), f"{name}.weight")
        found[original] = mask.t() if turned else mask
    return found


def masks_that_hold(model: nn.Module, directory: Path, *, named: bool) -> dict[str, Tensor]:
    """The masks of a checkpoint, where a model still has their zeros; see `fxprune.tracing.found_masks`.

    Args:
        model: any module.
        directory: of the checkpoint.
        named: whether the user named it, so that masks of another model are an error.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(parameter.is_meta for parameter in parameters.values()):
        return {}
    masks = read_masks(directory)
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            kind = type(model).__name__
            if not named:  # the directory was only a guess: another model may bear its name
                _LOGGER.warning("%s: its mask of %s fits no parameter of this %s: not held", directory, name, kind)
                return {}
            raise CheckpointError(f"the mask of {name}, {tuple(mask.shape)}, fits no parameter of {kind}")
        moved = int((parameters[name].detach() != 0)[~mask.to(parameters[name].device)].sum())
        if moved:
            _LOGGER.warning(
                "%s: %d weights of %s that its mask removes are not zero, so its masks are not held; set them to zero "
                "with fxprune.tracing.weight_masks.hold_masks, or remove weight_masks*.safetensors",
                directory,
                moved,
                name,
            )
            return {}
    return masks
