"""The command `fxprune push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli.common import Json, say, write_json
from fxprune.core.registry import resolve

__all__ = ["push"]


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
    say(text)
    write_json(json, asdict(pushed))
