"""Progress bars: shown when a person watches, silent otherwise."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bars", "track"]


@contextmanager
def track(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error while the block runs, if that is a terminal.

    Args:
        what: label.
        total: how many items there are.

    Yields:
        A function to be called with the number of items done so far.
    """
    with bars() as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def bars(*, auto_refresh: bool = True) -> Progress:
    """Bars on standard error, hidden unless that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=auto_refresh)
