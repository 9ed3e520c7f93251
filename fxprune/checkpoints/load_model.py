"""Any model that a user names: a plain checkpoint, a slim or mixed one that fxprune wrote, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.checkpoints.checkpoint import load
from fxprune.models.loading import (
    LoadedModel,
    check_plain_checkpoint,
    from_pretrained,
    has_tokenizer,
    load_tokenizer,
    model_directory,
    resolve_device,
    resolve_dtype,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["load_model"]


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a model from a local directory, an fxprune checkpoint or the hub, in the class that its configuration names.

    Which class that is where it names none, see `fxprune.models.model_class`.

    Args:
        name_or_path: a directory, or a hub id (used only when no such path exists).
        dtype: a torch dtype or its name, such as `"bfloat16"`; None keeps the checkpoint's own.
        device: where the model shall be.

    Raises:
        UsageError: `dtype` or `device` is unknown or not available.
        CheckpointError: the directory is missing, incomplete, damaged, quantised, holds pickled weights only, is of a
            model type or class that transformers cannot build without code from the repository, or its weights are
            those of another class.
    """
    from fxprune.models.mixed_config import is_mixed_directory  # noqa: PLC0415 - it imports transformers

    dtype, device = resolve_dtype(dtype), resolve_device(device)
    path = model_directory(name_or_path)
    sealed = (path / "fxprune.json").is_file()
    if not sealed:
        check_plain_checkpoint(path)
    if sealed or is_mixed_directory(path):
        model = load(path, dtype=dtype, device=device)  # which does its own checks
    else:
        model = from_pretrained(path, dtype, device)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    return LoadedModel(model.eval(), tokenizer, model.config, str(name_or_path), path)
