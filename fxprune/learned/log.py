"""The log of a training: a line of JSON a step, TensorBoard where it is installed, and a progress bar for people."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fxprune.core.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["TrainingLog"]


class TrainingLog:
    """Figures of every step; a context manager.

    Args:
        path: of the JSON lines; None keeps them in memory alone. TensorBoard's files go beside it.
        steps: of the whole training.
        resumed_at: steps that were done before; lines of later ones, which were written after the last checkpoint, are
            dropped.
        what: label of the progress bar.

    Attributes:
        rows: one mapping a step, oldest first.
    """

    def __init__(self, path: Path | None, steps: int, resumed_at: int = 0, what: str = "learning") -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: Any = None
        self._board: Any = None
        self._begun = time.perf_counter()
        self._first = resumed_at
        self.rows: list[dict[str, Any]] = []
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=steps, completed=resumed_at, said="")

    def __enter__(self) -> Self:
        self._stack.enter_context(self._bar)
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._keep_earlier(self._path)
                self._file = self._stack.enter_context(self._path.open("a", encoding="utf-8"))
            except OSError as error:
                raise OutputError(f"{self._path}: the log cannot be written: {error}") from error
            self._board = _tensorboard(self._path.parent / "tensorboard", self._first)
            if self._board is not None:
                self._stack.callback(self._board.close)
        return self

    def _keep_earlier(self, path: Path) -> None:
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # killed in the middle of a line, which is the last one
                    break
                if row["step"] < self._first:
                    self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        path.write_text(text, encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, step: int, figures: Mapping[str, float], widths: Mapping[str, int] | None = None) -> None:
        """Tell of one step.

        Args:
            step: its number, from 0.
            figures: what the curves are drawn of.
            widths: kept units by group, where they are known.
        """
        done = step + 1 - self._first
        rate = done / max(1e-9, time.perf_counter() - self._begun)
        row: dict[str, Any] = {"step": step, **{k: _number(v) for k, v in figures.items()}}
        if widths is not None:
            row["widths"] = dict(widths)
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps({**row, "steps_per_second": round(rate, 4)}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.add_scalar("steps_per_second", rate, step)
        said = f"sparsity {figures.get('sparsity', 0):.3f}  loss {figures.get('loss', 0):.4g}  {rate:.2f} steps/s"
        self._bar.update(self._task, completed=step + 1, said=said)


def _number(value: float) -> float | None:
    """Six digits are enough for a curve; JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _tensorboard(path: Path, first: int) -> Any:
    """A writer, where TensorBoard is installed; what was written of `first` and later steps is not shown any more."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=first or None)
