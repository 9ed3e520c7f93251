"""Evaluation results that are kept, found again by the content of everything they depend on.

A key holds the SHA-256 of every file of the form and of the text or documents, the task's version and configuration,
the settings, and the versions of the packages that compute. Files are hashed anew each time, names and dates are not
trusted, and an entry counts only if the whole key stands in it and its own hash fits: other content is never served.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import CheckpointError, ExportError, OutputError
from fxprune.core.output import write_json
from fxprune.core.registry import resolve
from fxprune.models.default_model import cache_directory
from fxprune.models.loading import config_path, expand_user, model_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["EvaluationCache", "FormFiles", "digest", "form_files", "tokenizer_files"]

_LOGGER = logging.getLogger(__name__)
_FORMAT = 2  # of the entries and of what is measured: to be raised when the same key would mean another figure
_NOT_READ = frozenset(
    {"report.json", "report.html", "report.md", "README.md", ".gitattributes"}
)  # no loader reads them
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What belongs to an ONNX graph besides its weights: tokenizer, configuration, chat template."""


def digest(content: Any) -> str:
    """SHA-256 of JSON data, independent of the order of keys: 64 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the files of a form -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormFiles:
    """The files that a form of a model consists of, by content.

    Attributes:
        path: the directory, or the ONNX file, that is opened; of a hub id the snapshot.
        graph: the ONNX file; None for a checkpoint.
        hashes: SHA-256 of each file by its name relative to the directory.
        size: bytes of all files together.
        state: what the file system said of each file before it was hashed (device, inode, size, times in ns).
    """

    path: Path
    graph: Path | None
    hashes: Mapping[str, str]
    size: int
    state: Mapping[Path, tuple[int, ...]]

    @property
    def sha256(self) -> str:
        """Of names and contents together."""
        return digest(dict(self.hashes))

    def check_unchanged(self) -> None:
        """Make sure that what was opened is what was hashed.

        Raises:
            CheckpointError: a file was written, replaced, added or removed since.
        """
        if _state(_files(self.path, self.graph)) != self.state:
            raise CheckpointError(
                f"the files of {self.path} changed while they were evaluated; run it again when nothing writes there"
            )


def form_files(where: str) -> FormFiles:
    """Find and hash the files of a checkpoint, a hub id or an ONNX directory or file.

    Raises:
        CheckpointError: there is no such form, or its files are damaged or change while they are read.
        ExportError: the ONNX graph cannot be read.
    """
    path = expand_user(where)
    graph: Path | None = path if path.suffix == ".onnx" else path / "model.onnx"
    assert graph is not None
    if graph.is_file():
        path = path.resolve()
    elif path.suffix == ".onnx":
        raise ExportError(f"no ONNX file at {path}; export one first, or check the path")
    else:
        path, graph = model_directory(where), None
    base = path.parent if path.is_file() else path
    graph = None if graph is None else graph.resolve()
    try:
        files = _files(path, graph)
        state = _state(files)
        hashes = {_relative(file, base): _hash(file) for file in files}
        if _state(files) != state:
            raise CheckpointError(f"the files of {path} change while they are read; wait until nothing writes there")
    except OSError as error:
        raise CheckpointError(f"cannot read the files of {path}: {error}") from error
    return FormFiles(path, graph, hashes, sum(entry[2] for entry in state.values()), state)


def tokenizer_files(where: str) -> dict[str, str]:
    """SHA-256 of the small files of a directory or hub id that a tokenizer is read from, by name.

    Raises:
        CheckpointError: there is nothing of this name, or it cannot be read.
    """
    path = config_path(where)
    try:
        return {file.name: _hash(file) for pattern in _SIDE_FILES for file in sorted(path.glob(pattern))}
    except OSError as error:
        raise CheckpointError(f"cannot read the files of {path}: {error}") from error


def _files(path: Path, graph: Path | None) -> list[Path]:
    """What loading may read: a checkpoint's top level, or a graph with its external data and what lies beside it."""
    if graph is None:
        return sorted(file for file in path.iterdir() if file.is_file() and file.name not in _NOT_READ)
    beside = {file for pattern in _SIDE_FILES for file in graph.parent.glob(pattern) if file.name not in _NOT_READ}
    weights = resolve("fxprune.exporters.onnx_files:check_external_data")(graph)
    return sorted({graph, *beside, *(graph.parent / name for name in weights)})


def _state(files: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    found: dict[Path, tuple[int, ...]] = {}
    for file in files:
        stat = file.stat()
        found[file] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _relative(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix() if file.is_relative_to(base) else str(file)


# ---- the entries ---------------------------------------------------------------------------------------------------


class EvaluationCache:
    """A directory of results, one JSON file each, named by the hash of its key.

    Attributes:
        directory: where; None keeps and finds nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    @classmethod
    def of_user(cls) -> EvaluationCache:
        """The one in the user's cache directory, see `fxprune.models.default_model.cache_directory`."""
        return cls(cache_directory() / "evaluations")

    def get(self, key: Mapping[str, Any]) -> Any:
        """The value that was kept under this very key; None when there is none, or what is there is damaged."""
        if self.directory is None:
            return None
        file = self._file(key)
        try:
            entry = json.loads(file.read_bytes())
            text = entry["value"]
            if entry["key"] == _plain(key) and entry["sha256"] == hashlib.sha256(text.encode()).hexdigest():
                return json.loads(text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOGGER.warning("%s is damaged and not used: %s: %s", file, type(error).__name__, error)
            return None
        _LOGGER.warning("%s is not what its name says and not used", file)
        return None

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a value; what cannot be written is a warning, the value itself is not lost by it.

        Args:
            key: JSON data.
            value: JSON data; infinite and undefined numbers are kept, too.
        """
        if self.directory is None:
            return
        text = json.dumps(value)
        entry = {"key": _plain(key), "value": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self._file(key), entry)
        except (OSError, OutputError) as error:
            _LOGGER.warning("the result is not kept in %s: %s", self.directory, error)

    def _file(self, key: Mapping[str, Any]) -> Path:
        assert self.directory is not None
        return self.directory / f"{digest(_plain(key))}.json"


def _plain(key: Mapping[str, Any]) -> Any:
    """A key as it reads back from JSON, with the format of the entries."""
    return json.loads(json.dumps({"format": _FORMAT, **key}, default=str))
