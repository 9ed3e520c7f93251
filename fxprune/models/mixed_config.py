"""Configurations of mixed models: transformers' own classes, each extended by rule with what a mixed model needs.

    LlamaConfig  ──►  SlimLlamaConfig(MixedConfigMixin, LlamaConfig)

An extended class holds the dense values that its base accepts, `per_layer_config` for what differs between layers, and
a record for what no field says. In memory it goes by its base's `model_type` and name, by which tokenizers, weight
conversions, adapters and exporters are found; in `config.json` it has a `model_type` of ours, so that nothing that
knows only the base takes the file for a dense model's.
"""

from __future__ import annotations

import copy
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from fxprune.core.errors import CheckpointError
from fxprune.core.registry import resolve
from fxprune.models import MODEL_TYPE
from fxprune.models.config_fields import get_field, has_field, readable, set_field, with_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fxprune.models.mixed_record import MixedRecord

__all__ = [
    "NOT_READ",
    "MixedConfig",
    "MixedConfigMixin",
    "config_class_of",
    "is_mixed",
    "is_mixed_directory",
    "mixed_config",
    "stock_config",
    "stock_layers_of",
    "whole_model",
]

NOT_READ = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "auto_map",
)
"""Fields that a checkpoint may not choose: a value such as `"owner/kernel"` would fetch code from the hub."""

_BASE = "base_model_type"
_EXTENDED: dict[Any, Any] = {}
_LOCK = threading.RLock()
_RECORD = "fxprune"
_ONLY_OURS: dict[str, dict[str, int]] = {"this checkpoint needs `import fxprune`": {}}
"""`per_layer_config` where no layer has fields of its own. A stock configuration class that is named explicitly does
not look at `model_type`; this it refuses, and what it says ends in the key."""


class MixedConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `AutoConfig` finds under our `model_type`: it hands over to the class extended from the named base."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration of a mixed model.

        Raises:
            CheckpointError: the base is unknown, or what the file says of its own is not valid.
        """
        return config_class_of(_base_of(config_dict)).from_dict(config_dict, **kwargs)


class MixedConfigMixin:
    """What an extended configuration class adds to its base."""

    _stock: type[PreTrainedConfig]

    def __post_init__(self, **kwargs: Any) -> None:
        from fxprune.models.mixed_record import MixedRecord, read_layers, read_record  # noqa: PLC0415 - only when one is read

        where = str(kwargs.get("name_or_path") or "config.json")
        values = kwargs.pop(_RECORD, None)
        record = values if isinstance(values, MixedRecord) else read_record(values or {}, where)
        layers = kwargs.pop("per_layer_config", None)
        if record.stock_layers is None:
            layers = read_layers(layers, where)
        else:
            layers, kwargs["per_layer_config"] = {}, readable(record.stock_layers, NOT_READ)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.slim_adopt(record, layers, where)

    def slim_adopt(self, record: MixedRecord, layers: Mapping[int, Mapping[str, int]], where: str) -> None:
        """Take over a record and fields of layers; the configuration must hold the accepted values.

        Raises:
            CheckpointError: they do not fit the class.
        """
        from fxprune.models.mixed_record import check_overrides  # noqa: PLC0415 - as above

        config: Any = self
        check_overrides(config, record.overrides, where)
        again = "config.json and fxprune.json do not belong together, or one was changed"
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        for index, fields in (*layers.items(), *record.layers.items()):
            if not 0 <= index < depth or not all(has_field(config, name) for name in fields):
                raise CheckpointError(
                    f"{where}: layer override {index}: {dict(fields)} does not fit {self._stock.__name__} with "
                    f"{depth} layers; {again}"
                )
        self.__dict__["_record"] = record
        self.__dict__["_accepted"] = {name: get_field(config, name) for name in record.overrides}
        for name, value in record.overrides.items():
            set_field(config, name, value)
        if layers:
            try:
                self.per_layer_config = {index: dict(fields) for index, fields in layers.items()}
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{where}: per_layer_config: {error}; {again}") from error

    @property
    def slim_record(self) -> MixedRecord:
        """What no field says."""
        record: MixedRecord = self.__dict__["_record"]
        return record

    @property
    def slim_accepted(self) -> dict[str, Any]:
        """The values that the base accepts, of fields that the record overrides."""
        return dict(self.__dict__["_accepted"])

    @property
    def slim_layers(self) -> dict[int, dict[str, int]]:
        """Fields of single layers that differ from the whole model's."""
        ours = self.slim_record.stock_layers is None
        spec = self.__dict__.get("_heterogeneity_spec") if ours else None
        found = {} if spec is None else {index: dict(fields) for index, fields in spec.per_layer_overrides.items()}
        for index, fields in self.slim_record.layers.items():
            found.setdefault(index, {}).update(fields)
        return found

    def validate_accepted_values(self) -> None:
        """The rules of the base hold for the values that it accepts, not for what differs from them."""
        stock = stock_config(self)
        if hasattr(stock, "validate"):
            stock.validate()

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the accepted values, the record, and the layers' own."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        values = with_values(values, values.pop("_accepted", {}))
        values.pop("_record", None)
        return {**values, _RECORD: self.slim_record.model_dump(mode="json", exclude_defaults=True) | {"version": 1}}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The content of `config.json`."""
        values = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        values |= {"model_type": MODEL_TYPE, _BASE: self._stock.model_type}
        ours = values.get("per_layer_config") if self.slim_record.stock_layers is None else None
        values["per_layer_config"] = ours or _ONLY_OURS
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from `to_dict`, or from the content of `config.json`.

        Raises:
            CheckpointError: it is that of another base, or what it says of its own is not valid.
        """
        record = {key: config_dict[key] for key in (_RECORD,) if key in config_dict}  # its schema says what it may hold
        values = readable(config_dict, NOT_READ) | record
        if values.get("model_type") == MODEL_TYPE:
            if _base_of(values) is not cls._stock:
                raise CheckpointError(
                    f"config.json is that of a {values[_BASE]} model, not of {cls._stock.model_type}; load it with "
                    "transformers' auto classes or with fxprune.load"
                )
            from fxprune.models.build_limits import check_depth  # noqa: PLC0415 - only when one is read

            check_depth(values, Path(kwargs.get("name_or_path") or "config.json"))
        values.pop(_BASE, None)
        if values.get("per_layer_config") == _ONLY_OURS:
            del values["per_layer_config"]
        return super().from_dict({**values, "model_type": cls._stock.model_type}, **kwargs)  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base; the `model_type` of the file is checked when the configuration is built."""
        values, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if values.get("model_type") == MODEL_TYPE and values.get(_BASE) == cls._stock.model_type:
            values = {**values, "model_type": cls._stock.model_type}
        return values, unused


def is_mixed(config: object) -> bool:
    """Whether a configuration is that of a mixed model."""
    return isinstance(config, MixedConfigMixin)


def is_mixed_directory(directory: str | Path) -> bool:
    """Whether transformers wrote a directory for a mixed model: it has our `model_type`, and no `fxprune.json`."""
    path = Path(directory).expanduser()
    if not (path / "config.json").is_file() or (path / "fxprune.json").exists():
        return False
    try:
        values = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def _base_of(values: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """The configuration class of transformers that the content of a `config.json` names as its base."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415 - it imports this module

    base = values.get(_BASE)
    if not isinstance(base, str) or base == MODEL_TYPE or base not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: this version of transformers has no {_BASE} {base!r}; upgrade transformers (code that comes "
            "with a checkpoint is never run)"
        )
    found: type[PreTrainedConfig] = CONFIG_MAPPING[base]
    return found


def config_class_of(stock: type[PreTrainedConfig]) -> type[Any]:
    """The class of mixed models' configurations that extends a configuration class of transformers.

    It is made once, and stands in every auto mapping in which its base does, with the models that extend the base's.
    """
    if issubclass(stock, MixedConfigMixin):
        return stock
    with _LOCK:
        if stock not in _EXTENDED:
            _EXTENDED[stock] = _extend(stock)
        extended: type[Any] = _EXTENDED[stock]
        return extended


def _extend(stock: type[PreTrainedConfig]) -> type[Any]:
    names = [name for name in dir(stock) if name.startswith("validate_") and callable(getattr(stock, name))]
    body: dict[str, Any] = dict.fromkeys(names, _accepts)
    body |= {
        "__module__": __name__,
        "__qualname__": f"Slim{stock.__name__}",
        "__doc__": f"Configuration of a mixed model: a `{stock.__name__}` with layers and shapes of their own.",
        "_stock": stock,
    }
    extended: type[Any] = strict(type(stock.__name__, (MixedConfigMixin, stock), body))
    # By name: models stand above configurations, import torch, and know this module.
    resolve("fxprune.models.mixed_model:register_models")(stock, extended)
    return extended


def _accepts(self: object) -> None:
    """Stands where the base has a rule; `validate_accepted_values` asks the base."""


def __getattr__(name: str) -> Any:
    """Extended classes by their qualified names, so that they can be pickled."""
    if name.startswith("Slim"):
        import transformers  # noqa: PLC0415 - heavy

        stock = getattr(transformers, name.removeprefix("Slim"), None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
            return config_class_of(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mixed_config(
    config: PreTrainedConfig,
    record: MixedRecord,
    layers: Mapping[int, Mapping[str, int]],
    where: Path | str = "config.json",
) -> Any:
    """A mixed model's configuration from one of transformers' and what there is to say beside it.

    Args:
        config: with values that its class accepts; it is copied.
        record: what no field says.
        layers: fields of single layers.
        where: the file, for messages.

    Raises:
        CheckpointError: they do not fit the configuration.
    """
    mixed = object.__new__(config_class_of(type(config)))
    mixed.__dict__.update(copy.deepcopy(config.__dict__))
    stock = stock_layers_of(config.to_dict())
    if stock is None:
        record = record.model_copy(update={"layers": _named(layers, nested=True)})
        mixed.slim_adopt(record, _named(layers, nested=False), str(where))
    else:
        whole = {index: dict(fields) for index, fields in layers.items() if fields}
        mixed.slim_adopt(record.model_copy(update={"layers": whole, "stock_layers": stock}), {}, str(where))
    return mixed


def stock_layers_of(values: Mapping[str, Any]) -> dict[int, dict[str, Any]] | None:
    """How a configuration class itself tells layers apart, from the content of a `config.json`; None if it does not."""
    found = values.get("per_layer_config")
    if values.get("model_type") == MODEL_TYPE:
        record = values.get(_RECORD)
        found = record.get("stock_layers") if isinstance(record, dict) else None
    return {int(index): dict(fields) for index, fields in found.items()} if isinstance(found, dict) else None


def _named(layers: Mapping[int, Mapping[str, int]], *, nested: bool) -> dict[int, dict[str, int]]:
    """Those fields of layers that lie in nested configurations, or those that do not."""
    found = {
        index: {name: value for name, value in fields.items() if ("." in name) is nested}
        for index, fields in layers.items()
    }
    return {index: fields for index, fields in found.items() if fields}


def stock_config(config: Any) -> Any:
    """The configuration of transformers behind a mixed model's: its class accepts the values; any other is returned."""
    if not isinstance(config, MixedConfigMixin):
        return config
    stock = object.__new__(config._stock)
    own = {"_record", "_accepted"} | ({"_heterogeneity_spec"} if config.slim_record.stock_layers is None else set())
    stock.__dict__.update({k: copy.deepcopy(v) for k, v in config.__dict__.items() if k not in own})
    for name, value in config.slim_accepted.items():
        set_field(stock, name, value)
    return stock


@contextmanager
def whole_model(config: Any) -> Iterator[None]:
    """Let the whole model's values be read, as the code outside of layers does while a model is built.

    Classes that tell layers apart themselves know how to read them.
    """
    ours = config.slim_record.stock_layers is None
    spec = config.__dict__.pop("_heterogeneity_spec", None) if ours else None
    try:
        yield
    finally:
        if spec is not None:
            config.__dict__["_heterogeneity_spec"] = spec
