"""Under which name a Hugging Face class takes and returns its cache of keys and values.

Since transformers 5.24 it is `cache`; before, and in classes that live outside the library, `past_key_values`. The
library renames the old keyword when the model is called, but signatures, and the graphs made from them, have one name.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

__all__ = ["cache_argument", "cache_of", "name_among", "named_as_taken"]

_NEW, _OLD = "cache", "past_key_values"


def cache_argument(model: Callable[..., Any]) -> str | None:
    """The name of the argument of `forward` that takes a cache of keys and values; None if there is none.

    A `cache` that neither is declared as a `Cache` nor has `use_cache` beside it is something else: Flaubert's is a
    dictionary of its own.
    """
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    if _NEW in parameters and ("use_cache" in parameters or "Cache" in str(parameters[_NEW].annotation)):
        return _NEW
    return _OLD if _OLD in parameters else None


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a model's inputs or outputs, under either name; None if there is none."""
    return next((values[name] for name in (_NEW, _OLD) if name in values), None)


def named_as_taken(model: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the cache, if one is among them, under the name that `forward` has for it."""
    name = cache_argument(model)
    return dict(inputs) if name is None else {name_among({name}, key): value for key, value in inputs.items()}


def name_among(names: Collection[str], name: str) -> str:
    """The name as it stands among others: a cache that goes in under one name may come out under the other."""
    other = {_NEW: _OLD, _OLD: _NEW}.get(name)
    return other if other is not None and other in names and name not in names else name
