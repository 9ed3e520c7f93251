"""Progress bars: shown when a person watches, silent otherwise."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxprune.measure import Case

__all__ = ["track", "track_repeats"]


@contextmanager
def track(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error while the block runs, if that is a terminal.

    Args:
        what: label.
        total: how many items there are.

    Yields:
        A function to be called with the number of items done so far.
    """
    with _bars() as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def track_repeats() -> Iterator[Callable[[Case, int, int], None]]:
    """Show the repeats of a benchmark as `track` does; nothing is drawn while the clock runs.

    Yields:
        What `fxprune.measure.bench` takes for `progress`.
    """
    with _bars(auto_refresh=False) as progress:
        task = progress.add_task("timing", total=None)

        def show(case: Case, done: int, wanted: int) -> None:
            progress.update(task, description=f"timing {case.name}", completed=done, total=wanted, refresh=True)

        yield show


def _bars(*, auto_refresh: bool = True) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=auto_refresh)
