"""The command `fxprune push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxprune.output import write_json
from fxprune.registry import resolve

__all__ = ["push"]

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")]


def push(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that fxprune wrote.", show_default=False)],
    repo: Annotated[str, typer.Option(help="Hub id, such as user/name; created if it does not exist.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that is created private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; the main one by default.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    json: Json = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, after comparing its files with their hashes."""
    push_to_hub = resolve("fxprune.exporters.hub:push_to_hub")
    pushed = push_to_hub(directory, repo, private=private, revision=revision, message=message)
    text = f"{len(pushed.files)} files, {pushed.bytes:,} bytes: {pushed.url}"
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        write_json(json, asdict(pushed))
