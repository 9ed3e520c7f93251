"""Markdown of reports: cells that stay text, and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cell", "table_lines"]


def table_lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, keep_last: bool = False) -> list[str]:
    """Lines of a table; a column that is empty in every row is left out, and so is a table without rows.

    Args:
        header: column titles.
        rows: as many cells each.
        keep_last: leave the last column's cells as they are: they hold Markdown.
    """
    columns = [i for i in range(len(header)) if any(row[i] for row in rows)]
    if not columns:
        return []
    cells = [
        [row[i] if keep_last and i == len(header) - 1 else cell(row[i]) for i in columns] for row in [header, *rows]
    ]
    cells.insert(1, ["---"] * len(columns))
    return ["", *(f"| {' | '.join(row)} |" for row in cells)]


def cell(text: str) -> str:
    """Text that no Markdown or HTML reader takes for markup."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text
