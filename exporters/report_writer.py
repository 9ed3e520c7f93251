"""Writing a report: JSON, a page and Markdown, and the model card beside a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.exporters.model_card import refresh_model_card
from fxprune.exporters.report import Report, markdown_summary, validate_report
from fxprune.exporters.report_files import write_files
from fxprune.exporters.report_page import page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["write_report"]


def write_report(report: Mapping[str, Any], directory: Path | str) -> tuple[Path, Path]:
    """Write `report.json`, `report.html` and, for pull requests, `report.md`.

    All are made before any is written, and each replaces its predecessor in one step. The page is one
    self-contained file: no script, nothing loaded from anywhere. Beside a checkpoint, its model card gets the figures.

    Args:
        report: the sections of `Report`; a section that is None or missing was not run.
        directory: where the files go; it is created if need be.

    Returns:
        The paths of `report.json` and `report.html`.

    Raises:
        ExportError: the report does not follow the schema.
        OutputError: the files cannot be written.
    """
    data = validate_report(report)
    html = page(Report.model_validate(data).model_dump(exclude_unset=True))
    paths = write_files(directory, data, html, markdown_summary(report))[:2]
    refresh_model_card(directory)
    return paths
