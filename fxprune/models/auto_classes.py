"""Teach transformers' auto classes to read mixed checkpoints, as soon as somebody imports them, and not before.

`import fxprune` must stay quick, so it must not import transformers; but after it, in whichever order the two are
imported, `AutoModelForCausalLM.from_pretrained` shall know the `model_type` of our mixed checkpoints. Python has no
hook that runs after a module's import, so a finder waits in `sys.meta_path` for the one module that holds the mapping
of model types, lets it be found and executed as ever, registers one configuration class there, and is gone.
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from fxprune.models import MODEL_TYPE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["install"]

_MAPPINGS = "transformers.models.auto.configuration_auto"
_LOGGER = logging.getLogger(__name__)


def install() -> None:
    """Register with transformers now if its mappings are loaded, else when they are."""
    if _MAPPINGS in sys.modules:
        _register(sys.modules[_MAPPINGS])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(mappings: ModuleType) -> None:
    """Add the configuration class; the import of another library must not fail for us, so problems are logged."""
    try:
        from fxprune.models.mixed_config import MixedConfig  # noqa: PLC0415 - it imports transformers

        mappings.AutoConfig.register(MODEL_TYPE, MixedConfig, exist_ok=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no reason to break somebody else's import
        _LOGGER.warning("transformers' auto classes will not load mixed checkpoints of fxprune: %s", error)


class _Waiting:
    """Finder of one module; it finds it where Python would have, with a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MAPPINGS:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)  # type: ignore[assignment]
        return spec


class _Registering:
    """Loader that does what another one does, puts that one back in its place, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
