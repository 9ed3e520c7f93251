"""`fxprune.json`: what a checkpoint says about itself, as a schema that refuses what it does not know.

A record is sealed: it holds a SHA-256 over all its fields, and those fields hold one of every file that decides what
the model computes. So a change anywhere is found when the checkpoint is read. The seal is no signature: it tells
damage and careless edits, not a forger who computes it anew. What a forger can write is bounded by the schema and by
what the loader checks; no code is ever run.
"""

from __future__ import annotations

import hashlib
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

from fxprune.core.errors import CheckpointError
from fxprune.models.shards import hash_file, hash_header, verify_hashes, verify_headers

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CONFIG_NAME",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "ShapeChange",
    "SourceRecord",
    "read_manifest",
    "seal_of",
    "verify_companions",
    "verify_files",
    "versions",
    "write_manifest",
]

MANIFEST_NAME = "fxprune.json"
SCHEMA_VERSION: Literal[2] = 2
_UNSEALED_VERSION = 1
"""Checkpoints of this version have hashes of their weight files and no others; they are still read."""

CONFIG_NAME = "config.json"
_COMPANIONS = (CONFIG_NAME, "*.safetensors.index.json", "weight_masks*.safetensors")

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A plain name: it can point nowhere but into the checkpoint's own directory.
_WeightFile = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors$")]
_PlainFile = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]

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
            `"mixed"` if it does so only once fxprune is imported.
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
        headers: SHA-256 of each weight file's size and header: what a loader can check without reading the weights.
        companions: SHA-256 of `config.json`, of the weight files' index and of files with masks. Tokenizer, generation
            config and model card are left out: they may be edited.
        seal: SHA-256 of all fields above, as `seal_of` computes it; None until the record is written.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
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
    headers: dict[_WeightFile, _Sha256] = {}
    companions: dict[_PlainFile, _Sha256] = {}
    seal: _Sha256 | None = None


def versions() -> dict[str, str]:
    """Versions of Python, fxprune and the libraries that decide what a checkpoint means."""
    packages = ("fxprune", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def seal_of(manifest: Manifest) -> str:
    """SHA-256 of a record without its seal, as JSON with sorted keys; how the file is laid out does not matter."""
    # By way of the text that is written: a NaN in a plan is null there, and the seal is of what is read back.
    values = json.loads(manifest.model_dump_json(exclude={"seal"}))
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `fxprune.json` into a directory in which everything else is written: its files are hashed, it is sealed.

    Raises:
        OSError: a file cannot be read or written.
    """
    found = {path.name: path for pattern in _COMPANIONS for path in sorted(directory.glob(pattern))}
    changes = {
        "schema_version": SCHEMA_VERSION,
        "headers": {name: hash_header(directory / name) for name in manifest.files},
        "companions": {name: hash_file(path) for name, path in found.items() if name not in manifest.files},
    }
    manifest = manifest.model_copy(update=changes)
    manifest = manifest.model_copy(update={"seal": seal_of(manifest)})
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def verify_companions(directory: Path, manifest: Manifest) -> None:
    """Check the SHA-256 of the files that stand beside the weights.

    Raises:
        CheckpointError: one is missing or was changed.
    """
    verify_hashes(directory, manifest.companions)


def verify_files(directory: Path) -> Manifest:
    """Check everything that a checkpoint's hashes speak of, the weights included; nothing is loaded.

    Returns:
        The record.

    Raises:
        CheckpointError: it is no checkpoint, or a file is missing or was changed.
    """
    manifest = read_manifest(directory)
    verify_companions(directory, manifest)
    verify_headers(directory, manifest.headers)
    verify_hashes(directory, manifest.files)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `fxprune.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, has another schema version, breaks the schema, or was changed
            after it was written.
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
    if isinstance(version, bool) or version not in (_UNSEALED_VERSION, SCHEMA_VERSION):
        raise CheckpointError(
            f"{path}: schema version {version!r} is unknown, this fxprune reads version {SCHEMA_VERSION}; use the "
            "version of fxprune that wrote the checkpoint"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'top level'}: {item['msg']}" for item in error.errors()[:5]
        )
        raise CheckpointError(f"{path} breaks the schema: {problems}; write the checkpoint again") from error
    _check_seal(manifest, path)
    return manifest


def _check_seal(manifest: Manifest, path: Path) -> None:
    if manifest.schema_version == _UNSEALED_VERSION:
        if manifest.seal is not None or manifest.headers or manifest.companions:
            raise CheckpointError(
                f"{path} breaks the schema: version {_UNSEALED_VERSION} has no seal; write the checkpoint again"
            )
        return
    if CONFIG_NAME not in manifest.companions or manifest.headers.keys() != manifest.files.keys():
        raise CheckpointError(
            f"{path} breaks the schema: companions or headers do not name {CONFIG_NAME} and every weight file; write "
            "the checkpoint again"
        )
    if manifest.seal != seal_of(manifest):
        raise CheckpointError(
            f"{path} was changed after it was written: its content does not have the SHA-256 of its seal; restore the "
            "file, or write the checkpoint again"
        )
