"""Fields of nested configurations by dotted name: `text_config.intermediate_size` is a field like any other.

A multimodal class has a configuration of configurations (`sub_configs`). What says a decoder's widths then lies one
level down; a flat configuration has the plain names alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = [
    "fields_of",
    "get_field",
    "has_field",
    "nested_configs",
    "path_of",
    "readable",
    "set_field",
    "values_with",
    "with_values",
]


def nested_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configuration under the empty name, and those nested in it under their dotted names, outermost first."""
    found = {"": config}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            found |= {f"{name}.{path}".removesuffix("."): each for path, each in nested_configs(inner).items()}
    return found


def path_of(config: PreTrainedConfig, nested: PreTrainedConfig) -> str:
    """The dotted name of a configuration nested in another one; empty if it is that one itself, or a stranger."""
    return next((path for path, each in nested_configs(config).items() if each is nested), "")


def fields_of(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Every field with its value, those of nested configurations under dotted names."""
    for path, each in nested_configs(config).items():
        for name, value in each.to_dict().items():
            if name not in each.sub_configs:
                yield f"{path}.{name}".removeprefix("."), value


def _owner(config: PreTrainedConfig, name: str) -> tuple[PreTrainedConfig | None, str]:
    *path, last = name.split(".")
    owner: Any = config
    for part in path:
        owner = getattr(owner, part, None)
    return (owner if isinstance(owner, PreTrainedConfig) else None), last


def has_field(config: PreTrainedConfig, name: str) -> bool:
    """Whether there is a field of this dotted name."""
    owner, last = _owner(config, name)
    return owner is not None and owner._hasattr_without_heterogeneous_validation(last)


def get_field(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """The value of a field by its dotted name, the whole model's where layers differ; `default` where there is none."""
    owner, last = _owner(config, name)
    return default if owner is None else owner._getattr_without_heterogeneous_validation(last, default)


def set_field(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set a field by its dotted name; nothing is validated.

    Raises:
        AttributeError: there is no configuration to set it on.
    """
    owner, last = _owner(config, name)
    if owner is None:
        raise AttributeError(f"{type(config).__name__} has no {name.rpartition('.')[0]}")
    setattr(owner, last, value)


def values_with(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as `config.json` has it, with some fields changed, for its class's `from_dict`."""
    return with_values(config.to_dict(), overrides)


def with_values(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the content of a `config.json` with some fields changed, by their dotted names."""
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    for name, value in overrides.items():
        *path, last = name.split(".")
        place = changed
        for part in path:
            place = place[part]
        place[last] = value
    return changed


def readable(values: Mapping[Any, Any], not_read: Collection[str]) -> dict[Any, Any]:
    """The content of a `config.json`, nested configurations included, without fields that it may not choose."""
    return {
        key: readable(value, not_read) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in not_read
    }
