"""Output directories and files that are never half-written.

Results are written into a hidden directory beside their destination and renamed at the end. Whatever goes wrong before
that moment, Ctrl-C included, the old directory is still whole and the unfinished one is gone.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.core.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["prepare_output", "require_apart", "staged_directory", "swap", "write_json", "write_text"]

_LOGGER = logging.getLogger(__name__)
_MARKERS = ("fxprune.json", "report.json", "genai_config.json", "export.json", "*.onnx")


def prepare_output(path: str | Path, *, overwrite: bool, inputs: Sequence[str | Path | None] = ()) -> Path:
    """Check, before any work is done, that a directory can be written at `path`. Nothing is created or changed.

    Args:
        path: where the directory shall be; it and its parents need not exist.
        overwrite: whether a directory that is there, and is not empty, may be replaced. Only what looks like a model,
            an export or an earlier output is ever replaced: it holds `fxprune.json`, `report.json`,
            `genai_config.json`, `export.json`, a `.onnx` file, or a `config.json` with a `model_type`.
        inputs: what the work reads: directories that the output must not be, hold, or lie in, overwriting allowed or
            not. Names of nothing that is there (a hub id) do not matter.

    Returns:
        The absolute path, symbolic links followed.

    Raises:
        OutputError: `path` is a file, is not empty and may not be replaced, its place cannot be written to, or it is an
            input, holds one or lies in one.
    """
    try:
        target = Path(path).expanduser().resolve()
        require_apart(target, inputs)
        if target.is_dir():
            if any(target.iterdir()):
                _check_replaceable(target, overwrite=overwrite)
            _check_writable(target, target)
            _check_writable(target.parent, target)
        elif target.exists():
            raise OutputError(f"{target} is a file; name a directory for the output")
        else:
            ancestor = next(parent for parent in target.parents if parent.exists())
            _check_writable(ancestor, target)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory for `~`, a loop of symbolic links
        raise OutputError(f"cannot use {path} for output: {error}") from error
    return target


def require_apart(path: str | Path, inputs: Sequence[str | Path | None]) -> None:
    """Refuse an output that is an input, holds one or lies in one, symbolic links followed.

    Args:
        path: where the output shall be.
        inputs: what the work reads; names of nothing that is there (a hub id) do not matter.

    Raises:
        OutputError: they would be in each other's way.
    """
    target = Path(path).expanduser().resolve()
    for each in inputs:
        try:
            known = None if each is None or str(each) == "" else Path(each).expanduser().resolve()
        except RuntimeError:  # no home directory for `~`: a hub id, or nothing
            continue
        if known is None or not known.exists():
            continue
        way = "is" if known == target else "holds" if target in known.parents else "lies in"
        if known == target or target in known.parents or known in target.parents:
            raise OutputError(
                f"the output {target} {way} the input {known}, which is never replaced nor written to; name another "
                "directory"
            )


def _check_writable(directory: Path, target: Path) -> None:
    """Create and remove an empty directory: permission bits say little on read-only file systems or for root."""
    if not directory.is_dir():
        raise OutputError(f"cannot create {target}: {directory} is a file")
    probe = _sibling(directory / "fxprune", "probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {directory} is not writable ({error.strerror}); choose another place"
        ) from error


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise unless the non-empty directory may be replaced as a whole."""
    if not overwrite:
        raise OutputError(
            f"{target} exists and is not empty; choose another directory, or allow it to be replaced with --overwrite "
            "(overwrite=True in Python)"
        )
    here = Path.cwd()
    if target == here or target in here.parents or target == Path.home() or target in Path.home().parents:
        raise OutputError(f"{target} holds the working or the home directory and is not replaced; name another one")
    if (target / ".git").exists():
        raise OutputError(f"{target} is a git working tree and is not replaced; name another directory")
    if not (any(any(target.glob(marker)) for marker in _MARKERS) or _is_model_config(target / "config.json")):
        raise OutputError(
            f"{target} does not look like a model or an earlier output (none of {', '.join(_MARKERS)}, no config.json "
            f"with a model_type) and is not replaced, even when overwriting is allowed; empty it or name another one"
        )


def _is_model_config(path: Path) -> bool:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _sibling(path: Path, purpose: str) -> Path:
    """A hidden name beside `path` that nobody else uses (`mkdtemp` would make it readable by its owner only)."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{purpose}")


@contextmanager
def staged_directory(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Write a directory as a whole or not at all.

    The body writes into the directory it is given, which lies beside `path` on the same file system. When the body
    ends, that directory takes the place of `path`; when it raises, KeyboardInterrupt included, it is removed and what
    was at `path` stays as it was. A process that is killed outright leaves a hidden `.NAME.*.staging` directory.

    Args:
        path: where the directory shall be; missing parents are created.
        overwrite: whether a directory that is there may be replaced, see `prepare_output`.

    Yields:
        The empty directory to write into.

    Raises:
        OutputError: `path` cannot be used, at the start or any more at the end.
    """
    target = prepare_output(path, overwrite=overwrite)
    staging = _sibling(target, "staging")
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot create a directory beside {target}: {error}") from error
        yield staging
        swap(staging, target, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def swap(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Rename `staging` to `target`; if that fails, put back what was there."""
    prepare_output(target, overwrite=overwrite)  # the work took minutes: somebody else may have written here
    old = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        staging.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise OutputError(f"cannot put the finished output in place at {target}: {error}") from error
        raise
    if old.exists():
        try:
            shutil.rmtree(old)
        except OSError as error:
            _LOGGER.warning("%s is written, but what it replaced could not be removed from %s: %s", target, old, error)


def write_json(path: str | Path, obj: object) -> None:
    """Write an object as JSON, whole or not at all.

    Args:
        path: the file; it is replaced if it exists. Its directory must exist.
        obj: what `json.dumps` takes. NaN and infinity are refused: they are not JSON.

    Raises:
        OutputError: the object is not JSON, or the file cannot be written.
    """
    target = Path(path)
    try:
        content = (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise OutputError(f"cannot write {target}: the content is not JSON ({error})") from error
    _write_bytes(target, content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    _write_bytes(Path(path), text.encode())


def _write_bytes(target: Path, content: bytes) -> None:
    temporary = _sibling(target, "tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {target}: {error}") from error
        raise
