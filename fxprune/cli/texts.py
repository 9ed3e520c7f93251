"""Options that the verbs prune, sparsify and learn have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Calibration",
    "Guard",
    "MeasureSpeed",
    "Option",
    "Out",
    "Ppl",
    "Samples",
    "Seed",
    "SeqLen",
    "TextField",
    "Threads",
]

Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory for the checkpoint and its report.")]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="self (default), a .txt file, records (.jsonl), or a hub data set."),
]
TextField = Annotated[
    str | None, typer.Option(metavar="NAME", help="Field of the records; `text`, or chats, by default.")
]
Samples = Annotated[
    int | None, typer.Option(help="Calibration sequences; the method's own by default.", min=1, metavar="N")
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of each calibration sequence.", min=2, metavar="N")]
Seed = Annotated[int | None, typer.Option(help="Of every random choice; 0 by default.", min=0, metavar="N")]
Ppl = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Text for the perplexity before and after; repeat.")
]
Guard = Annotated[str, typer.Option(metavar="FILE", help="Warns of overfitting: a file, python, none.")]
MeasureSpeed = Annotated[bool, typer.Option("--measure-speed", help="Time dense and pruned in ONNX Runtime.")]
Threads = Annotated[int, typer.Option(help="Threads of ONNX Runtime.", min=1, metavar="N")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Any other option (fxprune explain METHOD); repeat."),
]
