"""Limits on what a checkpoint's files can make the loader build.

A number in `config.json` costs a byte to change and may ask for a thousand million layers. What a model is built of is
bounded by what the weight files hold, so that a damaged or hostile file ends in an error, not in a machine without
memory.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from fxprune.core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["MOST_LAYERS", "bounded_build", "check_depth"]

MOST_LAYERS = 10_000
"""More than any model has; configuration classes make lists of this length before a model is built."""
_SLACK = 1000
_TIMES = 16
"""Loading builds a few skeletons one after the other, and weights are registered more than once (tying, resizing)."""


def check_depth(values: Mapping[str, Any], path: Path) -> None:
    """Refuse numbers of layers that no model has, whatever their field is called, nested fields included.

    Args:
        values: content of `config.json`.
        path: of the file, for the message.

    Raises:
        CheckpointError: a number that counts layers is larger than `MOST_LAYERS`.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            check_depth(value, path)
        elif isinstance(value, int) and value > MOST_LAYERS and ("layer" in name or "depth" in name):
            raise CheckpointError(
                f"{path}: {name} is more than {MOST_LAYERS}, and no model has as many layers; restore the file, or "
                "write the checkpoint again"
            )


@contextmanager
def bounded_build(tensors: int, path: Path) -> Iterator[None]:
    """While models are built in this thread, refuse many more parameters than the weight files hold.

    Args:
        tensors: how many tensors the files hold.
        path: the checkpoint, for the message.

    Raises:
        CheckpointError: more are registered than loading that many can need.
    """
    most = _TIMES * tensors + _SLACK
    thread = threading.get_ident()
    count = 0

    def registered(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise CheckpointError(
                    f"{path}: config.json describes a model with far more parameters than the {tensors} tensors there "
                    "are; restore the file that was changed, or write the checkpoint again"
                )

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
