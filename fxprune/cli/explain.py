"""`fxprune explain`: the methods, and the options of one."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fxprune.cli import common
from fxprune.cli.common import Json

__all__ = ["explain"]


def explain(
    method: Annotated[str | None, typer.Argument(help="A method; all of them by default.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """List the methods, or the options of one with defaults, meaning and source."""
    from dataclasses import asdict

    from fxprune.flows import explain as flow

    if method is None:
        found = flow.methods()
        table = Table("verb", "method", "what it does", "reads")
        for one in found:
            table.add_row(one.verb, one.name, one.summary, one.reads)
        common.out.print(table)
        common.say("fxprune explain METHOD shows the options of one")
        common.write_json(json, [asdict(one) for one in found])
        return
    one = flow.explain(method)
    common.tell(f"fxprune {one.verb} MODEL --out DIR --method {one.name}\n\n{one.text}\n\nIt reads {one.reads}.\n")
    table = Table("option", "default", "meaning", title="Options (--option NAME=VALUE, or keywords in Python)")
    for option in one.options:
        table.add_row(
            f"{option.name}\n[dim]{option.kind.replace('[', chr(92) + '[')}[/dim]", option.default, option.meaning
        )
    common.out.print(table)
    common.say(f"what every method takes: fxprune {one.verb} --help; in Python {', '.join(flow.keywords(one.verb))}")
    common.write_json(json, asdict(one))
