"""The files of a report: each replaces its predecessor in one step, and none is written before all are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxprune.core.errors import OutputError
from fxprune.core.output import write_json

__all__ = ["write_files"]


def write_files(directory: Path | str, data: Any, html: str, markdown: str) -> tuple[Path, Path, Path]:
    """Write `report.json`, `report.html` and `report.md` to a directory, which is created if need be.

    Args:
        directory: where.
        data: JSON data.
        html: the page.
        markdown: the summary.

    Returns:
        The paths of the three files, in this order.

    Raises:
        OutputError: the files cannot be written.
    """
    directory = Path(directory)
    paths = tuple(directory / f"report.{ending}" for ending in ("json", "html", "md"))
    staged = {path: path.with_name(f".{path.name}.tmp") for path in paths[1:]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            for path, content in zip(staged, (html, markdown), strict=True):
                staged[path].write_text(content, encoding="utf-8")
            write_json(paths[0], data)
            for path, temporary in staged.items():
                temporary.replace(path)
        finally:
            for temporary in staged.values():
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the report to {directory}: {error}") from error
    return paths[0], paths[1], paths[2]
