"""What the commands share: where texts and figures go, and the options that several of them have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.flows.verbs import Result

__all__ = [
    "DEFAULT_THREADS",
    "Dtype",
    "Json",
    "Model",
    "Overwrite",
    "err",
    "finish",
    "out",
    "say",
    "summary",
    "tell",
    "write_json",
]

out = Console()
err = Console(stderr=True)
DEFAULT_THREADS = min(2, os.cpu_count() or 1)

Model = Annotated[str, typer.Argument(help="Hub id or local directory of a model.", show_default=False)]


def _writable(path: Path | None) -> Path | None:
    """Whether figures could be written there is told before the work."""
    if path is not None and not path.expanduser().absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no directory {path.parent}")
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON to this file.", callback=_writable),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Such as bfloat16; as saved by default.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where torch models run.")]


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Tell a result, on standard output."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def summary(report: Mapping[str, Any]) -> None:
    """The short form of a report, on standard output."""
    from fxprune.core.registry import resolve

    out.print(Markdown(resolve("fxprune.exporters.report:markdown_summary")(report)))


def write_json(path: Path | None, data: Any) -> None:
    """Write figures where the user asked for them."""
    if path is not None:
        from fxprune.core.output import write_json as write

        write(path, data)


def finish(result: Result, json: Path | None) -> None:
    """Show what a verb made; exit with 1 where a speed gate failed."""
    from fxprune.flows.assessment import failed_gate, warnings_of

    write_json(json, result.report)
    summary(result.report)
    for text in warnings_of(result.report):
        say(f"warning: {text}")
    if failed_gate(result.report):
        raise typer.Exit(1)
