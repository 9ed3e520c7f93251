"""The lazy registry: pass names to `module:attribute`, resolved when first used.

The core reaches passes and exporters only through here. Third-party packages add passes through the entry-point group
`fxprune.passes`; a name that two packages claim is an error, not a race.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import RegistryError

if TYPE_CHECKING:
    from fxprune.core.pass_base import Pass

__all__ = ["called", "get_pass", "pass_names", "pass_of", "register_pass", "resolve"]

_PASSES: dict[str, str] = {
    "lift_linears": "fxprune.passes.lift_linears:LiftLinears",
    "locate_attention": "fxprune.passes.locate_attention:LocateAttention",
    "locate_mlp": "fxprune.passes.locate_mlp:LocateMlp",
    "locate_hidden": "fxprune.passes.locate_hidden:LocateHidden",
    "locate_experts": "fxprune.passes.locate_experts:LocateExperts",
    "locate_layers": "fxprune.passes.locate_layers:LocateLayers",
    "channel": "fxprune.passes.channel:ChannelPrune",
    "fisher": "fxprune.passes.fisher:Fisher",
    "osscar": "fxprune.passes.osscar:Osscar",
    "flap": "fxprune.passes.flap:Flap",
    "wanda-sp": "fxprune.passes.wanda_sp:WandaSp",
    "taylor": "fxprune.passes.taylor:Taylor",
    "magnitude-units": "fxprune.passes.magnitude_units:MagnitudeUnits",
    "depth": "fxprune.passes.depth:DepthPrune",
    "random": "fxprune.passes.random_units:RandomUnits",
    "l0": "fxprune.passes.l0:L0Prune",
    "magnitude": "fxprune.passes.magnitude:Magnitude",
    "wanda": "fxprune.passes.wanda:Wanda",
    "sparsegpt": "fxprune.passes.sparsegpt:SparseGpt",
    "alps": "fxprune.passes.alps:Alps",
    "insert_masks": "fxprune.passes.insert_masks:InsertMasks",
    "slim": "fxprune.passes.slim:Slim",
    "verify": "fxprune.passes.verify:Verify",
    "save": "fxprune.passes.save:Save",
    "export_onnx": "fxprune.passes.export_onnx:ExportOnnx",
    "export_int4": "fxprune.passes.export_int4:ExportInt4",
}
_CALLED = {("prune", "magnitude"): "magnitude-units"}
"""Methods that there are for several verbs under one name, and the pass that stands for the name in one of them."""
_loaded_entry_points = False


def pass_of(method: str, verb: str) -> str:
    """The name of the pass that a method's name means for a verb."""
    return _CALLED.get((verb, method), method)


def called(name: str) -> str:
    """What users call the pass of a name."""
    return next((method for (_, method), own in _CALLED.items() if own == name), name)


def resolve(path: str) -> Any:
    """Import `module:attribute`.

    Raises:
        RegistryError: there is no such module or attribute.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RegistryError(f"cannot load {path!r}: {error}") from error


def _load_entry_points() -> None:
    global _loaded_entry_points  # noqa: PLW0603 - the table is process-wide by nature
    if _loaded_entry_points:
        return
    _loaded_entry_points = True
    for point in entry_points(group="fxprune.passes"):
        register_pass(point.name, point.value)


def register_pass(name: str, target: str | type[Pass]) -> None:
    """Make a pass known by name.

    Args:
        name: how pipelines call it.
        target: `module:attribute`, or the class itself.

    Raises:
        RegistryError: the name is taken by something else.
    """
    path = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    known = _PASSES.get(name)
    if known is not None and known != path:
        raise RegistryError(f"pass name {name!r} is claimed by both {known} and {path}; rename one of them")
    _PASSES[name] = path
    if not isinstance(target, str):
        _CLASSES[name] = target


_CLASSES: dict[str, type[Pass]] = {}


def pass_names() -> list[str]:
    """All known pass names."""
    _load_entry_points()
    return sorted(_PASSES)


def get_pass(name: str) -> type[Pass]:
    """The pass class with this name.

    Raises:
        RegistryError: there is none; the message names the nearest.
    """
    _load_entry_points()
    if name in _CLASSES:
        return _CLASSES[name]
    if name not in _PASSES:
        near = difflib.get_close_matches(name, _PASSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known passes: {', '.join(sorted(_PASSES))}"
        raise RegistryError(f"unknown pass {name!r}{hint}")
    _CLASSES[name] = resolve(_PASSES[name])
    return _CLASSES[name]
