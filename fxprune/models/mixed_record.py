"""What `config.json` of a mixed checkpoint says about itself, beside transformers' own fields: a schema and its limits.

The record holds numbers only: fields of the whole model that the configuration class may refuse, shapes of projections
that no field gives, numbers of modules that the class would derive otherwise. Fields of single layers stand in
transformers' `per_layer_config`. As in `fxprune.json`, nothing here can choose code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from fxprune.core.errors import CheckpointError
from fxprune.models.config_fields import get_field, has_field

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MixedRecord", "check_overrides", "read_layers", "read_record"]

_Number = int | Annotated[float, Field(allow_inf_nan=False)]
_Shape = Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=2)]
_Layers = TypeAdapter(
    dict[NonNegativeInt, dict[str, PositiveInt]], config=ConfigDict(strict=True, title="per_layer_config")
)


class MixedRecord(BaseModel):
    """Content of the field `fxprune` in the `config.json` of a mixed checkpoint.

    Attributes:
        version: of this schema.
        overrides: fields that are set on the configuration after its class accepted the values in `config.json`.
        parameters: shapes of the weights and biases of `nn.Linear` and `Conv1D` modules that no field gives, by
            parameter name, in the layout of the module.
        constants: numbers that are set on modules, by module name and attribute.
        layers: fields of single layers that lie in a nested configuration, by layer index and dotted name; those of a
            flat one stand in transformers' `per_layer_config`, and here too if the next is given.
        stock_layers: the `per_layer_config` of a configuration whose class tells layers apart itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    overrides: dict[str, _Number] = {}
    parameters: dict[str, _Shape] = {}
    constants: dict[str, dict[str, _Number]] = {}
    layers: dict[NonNegativeInt, dict[str, PositiveInt]] = {}
    stock_layers: dict[NonNegativeInt, dict[str, Any]] | None = None


def read_record(values: object, where: str) -> MixedRecord:
    """Validate a record as JSON gives it.

    Args:
        values: the record.
        where: the file, for the message.

    Raises:
        CheckpointError: it breaks the schema.
    """
    # JSON has neither tuples nor keys that are numbers.
    if isinstance(values, dict) and isinstance(values.get("parameters"), dict):
        shapes = {name: tuple(v) if isinstance(v, list) else v for name, v in values["parameters"].items()}
        values = {**values, "parameters": shapes}
    if isinstance(values, dict) and isinstance(values.get("layers"), dict):
        values = {**values, "layers": read_layers(values["layers"], where)}
    if isinstance(values, dict) and isinstance(values.get("stock_layers"), dict):
        values = {**values, "stock_layers": _numbered(values["stock_layers"])}
    try:
        return MixedRecord.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{where}: fxprune: {_problems(error)}; write the checkpoint again") from error


def read_layers(values: object, where: str) -> dict[int, dict[str, int]]:
    """Validate `per_layer_config` as JSON gives it: layer indices, perhaps padded with zeros, and integers.

    Raises:
        CheckpointError: it is anything else.
    """
    if values is None:
        return {}
    try:
        return _Layers.validate_python(_numbered(values) if isinstance(values, dict) else values)
    except ValidationError as error:
        raise CheckpointError(f"{where}: per_layer_config: {_problems(error)}; write the checkpoint again") from error


def _numbered(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Layer indices as numbers: JSON has keys that are text."""
    return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in values.items()}


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'top level'}: {item['msg']}" for item in error.errors()[:5])


def check_overrides(config: Any, overrides: Mapping[str, object], where: str) -> None:
    """Refuse overrides that are no numbers of a configuration.

    Fields with other values decide which code runs: a checkpoint may choose them through the configuration class only.

    Raises:
        CheckpointError: a field does not exist, is private, or holds no number of that kind.
    """
    for name, value in overrides.items():
        old = get_field(config, name)
        allowed = {int: (int, type(None)), float: (float,)}.get(type(value), ())
        hidden = any(part.startswith("_") for part in name.split("."))
        if hidden or not has_field(config, name) or not isinstance(old, allowed) or isinstance(old, bool):
            raise CheckpointError(
                f"{where}: {type(config).__name__} has no number {name} that {value!r} could replace; restore the file "
                "that was changed, or write the checkpoint again"
            )
