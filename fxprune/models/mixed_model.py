"""Models whose layers have widths of their own: transformers' own classes, each extended by rule.

    LlamaForCausalLM  ──►  SlimLlamaForCausalLM(MixedModelMixin, LlamaForCausalLM)

An extended class runs its base's code. Only construction differs: each layer is built from its own configuration, then
projections get the shapes, and modules the numbers, that the configuration's record has for them. So an instance is an
ordinary model of its base: it is trained, adapted, copied, saved and loaded by whatever does that to the base.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping  # noqa: TC003 - transformers evaluates the annotations of model classes
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from fxprune.core.errors import CheckpointError
from fxprune.models.constants import apply_constants
from fxprune.models.mixed_config import config_class_of, is_mixed, stock_config, whole_model
from fxprune.models.skeleton import build_skeleton, construct_layers, resize_projections, runs_grouped, state_shapes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from fxprune.models.mixed_record import MixedRecord

__all__ = ["MixedModelMixin", "model_class_of", "register_models", "stock_model_class"]


_EXTENDED: dict[tuple[Any, Any], type[Any]] = {}
_LOCK = threading.RLock()


class MixedModelMixin:
    """What an extended model class adds to its base: how it is constructed."""

    _stock: type[PreTrainedModel]
    _constants: Mapping[str, Mapping[str, float | int]] = {}
    """Numbers that are set on modules, by the names they have in this class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not is_mixed(config):
            raise CheckpointError(
                f"{type(self).__qualname__} is built from the configuration of a mixed model, not from a "
                f"{type(config).__name__}; use {self._stock.__name__} for that"
            )
        construct = super().__init__

        def constructed() -> Any:
            construct(config, *args, **kwargs)  # type: ignore[call-arg]
            return self

        layers = config.slim_layers
        with whole_model(config):
            if layers:
                construct_layers(build_skeleton(self._stock, stock_config(config)), config, layers, constructed)
            else:
                constructed()
            self._reshape(config)
        module: Any = self
        if config._experts_implementation == "grouped_mm" and not runs_grouped(module):
            module.set_experts_implementation("eager")

    def _reshape(self, config: Any) -> None:
        """Give projections the recorded shapes and modules the recorded numbers.

        The record then names what no field says and no more.
        """
        record: MixedRecord = config.slim_record
        module: Any = self
        names = {key: self._name_here(key, config) for key in (*record.parameters, *record.constants)}
        wanted = {name: shape for key, shape in record.parameters.items() if (name := names[key]) is not None}
        changed = resize_projections(module, state_shapes(module) | wanted)
        built = state_shapes(module)
        if wrong := [name for name, shape in wanted.items() if built.get(name) != shape]:
            raise CheckpointError(
                f"config.json gives {wrong[0]} the shape {list(wanted[wrong[0]])}, and {type(self).__name__} has no "
                "projection of this name that could have it; write the checkpoint again"
            )
        self._constants = {name: values for key, values in record.constants.items() if (name := names[key]) is not None}
        apply_constants(module, self._constants)
        # A head's base model may be one of ours, which has reshaped its own.
        inner = tuple(f"{path}." for path, each in module.named_modules() if path and isinstance(each, MixedModelMixin))
        left = {
            key: shape
            for key, shape in record.parameters.items()
            if (name := names[key]) is None or name in changed or name.startswith(inner)
        }
        config.__dict__["_record"] = record.model_copy(update={"parameters": left})
        if changed:
            # The base has initialised what it had. On the meta device there is nothing to do.
            for name in changed:
                module.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
            module.init_weights()

    def _name_here(self, name: str, config: Any) -> str | None:
        """The name of a module or parameter in this class, which may be the saved class's base model or have one.

        Returns:
            The name; None if it belongs to a head that this class does not have.

        Raises:
            CheckpointError: the class that was saved has no such module.
        """
        module: Any = self
        prefix = f"{module.base_model_prefix}." if module.base_model_prefix else ""
        for candidate in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            owner = candidate.rpartition(".")[0] if candidate.endswith((".weight", ".bias")) else candidate
            try:
                module.get_submodule(owner)
            except AttributeError:
                continue
            return candidate
        if type(self).__name__ in (config.architectures or ()) or name.startswith(prefix or " "):
            raise CheckpointError(
                f"config.json: {type(self).__name__} has no module for {name}; write the checkpoint again"
            )
        return None

    def initialize_weights(self) -> None:
        """Initialise what is not loaded; scalar buffers among the recorded numbers are set again afterwards."""
        module: Any = self
        with whole_model(module.config):
            super().initialize_weights()  # type: ignore[misc]
        apply_constants(module, self._constants)

    # transformers reads the source of a class's module to answer these, and the base's module is what counts.

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the base is foreign code."""
        answer: bool = cls._stock.is_custom_code()
        return answer

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        answer: bool = cls._stock._can_set_attn_implementation()
        return answer

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        answer: bool = cls._stock._can_set_experts_implementation()
        return answer


def model_class_of(stock: type[PreTrainedModel], config_class: type[PreTrainedConfig] | None = None) -> type[Any]:
    """The class of mixed models that extends a model class of transformers.

    Args:
        stock: the class of transformers.
        config_class: the extended configuration class; by default that of the class's own.
    """
    if issubclass(stock, MixedModelMixin):
        return stock
    key = stock, config_class or config_class_of(stock.config_class)
    with _LOCK:
        if key not in _EXTENDED:
            _EXTENDED[key] = _extend(*key)
        return _EXTENDED[key]


def _extend(stock: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[Any]:
    body = {
        "__module__": __name__,
        "__qualname__": f"Slim{stock.__name__}",
        "__doc__": f"A `{stock.__name__}` whose layers may have shapes of their own.",
        "_stock": stock,
        "config_class": config_class,
    }
    return type(stock.__name__, (MixedModelMixin, stock), body)


def stock_model_class(model_class: type[nn.Module]) -> type[Any]:
    """The class of transformers behind a mixed model's class; any other class is returned as it is."""
    return model_class._stock if issubclass(model_class, MixedModelMixin) else model_class


def register_models(stock: type[PreTrainedConfig], extended: type[PreTrainedConfig]) -> None:
    """Let every auto class that has a model for a configuration class have the extended one for the extended one."""
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping) and stock in mapping:
            known = mapping[stock]
            classes = known if isinstance(known, tuple) else (known,)
            found = tuple(model_class_of(each, extended) for each in classes)
            mapping.register(extended, found if isinstance(known, tuple) else found[0], exist_ok=True)


def __getattr__(name: str) -> Any:
    """Extended classes by their qualified names, so that they can be pickled."""
    if name.startswith("Slim"):
        import transformers  # noqa: PLC0415 - lazy: it is the whole library

        stock = getattr(transformers, name.removeprefix("Slim"), None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
            return model_class_of(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
