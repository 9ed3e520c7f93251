"""`fxprune.json`: what a checkpoint says about itself, as a schema that refuses what it does not know."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from fxprune.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "ShapeChange",
    "SourceRecord",
    "read_manifest",
    "versions",
    "write_manifest",
]

MANIFEST_NAME = "fxprune.json"
SCHEMA_VERSION: Literal[1] = 1

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A plain name: it can point nowhere but into the checkpoint's own directory.
_WeightFile = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors$")]


_Number = int | Annotated[float, Field(allow_inf_nan=False)]
_Value = bool | int | float | str | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceRecord(_Record):
    """The dense model: its name as the user gave it, and the hash of its weight files if they were at hand."""

    name: str
    sha256: _Sha256 | None = None


class ShapeChange(_Record):
    """Shape of one parameter before and after."""

    dense: tuple[int, ...]
    slim: tuple[int, ...]


class Manifest(_Record):
    """Content of `fxprune.json`.

    Attributes:
        schema_version: version of this schema.
        kind: `"uniform"` if `config.json` alone says every shape and plain `from_pretrained` loads the directory,
            `"mixed"` if only fxprune does.
        reason: why it is not uniform; empty if it is.
        source: the dense model.
        versions: of fxprune and of the libraries that wrote the checkpoint.
        plan: the plan, as its writer gave it.
        history: what was done, oldest first.
        kept_layers: for each module list that lost layers, the dense indices of those it keeps. `config.json` has the
            slim depth; all other names and indices here are those of the slim model.
        config_overrides: fields of `config.json` that differ from the dense configuration (uniform), or numbers that
            are set on the configuration before the model is built, though its class may refuse them (mixed).
        layer_overrides: configuration fields by layer index (mixed).
        constants: numbers that are set on modules, by module and attribute, because the class would derive others
            (mixed).
        parameters: the parameters whose shape changed.
        added_biases: biases that the dense model does not have.
        zero_biases: biases, all zero, that are there only because the class has them all or none.
        files: SHA-256 of each weight file.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["uniform", "mixed"]
    reason: str
    source: SourceRecord
    versions: dict[str, str]
    plan: dict[str, JsonValue]
    history: tuple[JsonValue, ...]
    kept_layers: dict[str, Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]] = {}
    config_overrides: dict[str, _Value | list[_Value]]
    layer_overrides: dict[NonNegativeInt, dict[str, PositiveInt]]
    constants: dict[str, dict[str, _Number]] = {}
    parameters: dict[str, ShapeChange]
    added_biases: tuple[str, ...]
    zero_biases: tuple[str, ...]
    files: Annotated[dict[_WeightFile, _Sha256], Field(min_length=1)]


def versions() -> dict[str, str]:
    """Versions of Python, fxprune and the libraries that decide what a checkpoint means."""
    packages = ("fxprune", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `fxprune.json` into an existing directory."""
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `fxprune.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, has another schema version, or breaks the schema.
    """
    path = directory / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: not a checkpoint written by fxprune; load an ordinary one with transformers"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); write the checkpoint again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema version {version!r} is unknown, this fxprune reads version {SCHEMA_VERSION}; use the "
            "version of fxprune that wrote the checkpoint"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'top level'}: {item['msg']}" for item in error.errors()[:5]
        )
        raise CheckpointError(f"{path} breaks the schema: {problems}; write the checkpoint again") from error
