"""Exporters, one target a file; imported as `fxprune.exporters`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.exporters.slim_quantizer import SlimQuantizer

__all__ = ["SlimQuantizer"]

_WHERE = {"SlimQuantizer": "fxprune.exporters.slim_quantizer"}


def __getattr__(name: str) -> Any:
    # Lazily: the plug-in imports transformers.exporters, which no other exporter needs.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fxprune.exporters' has no attribute {name!r}")
