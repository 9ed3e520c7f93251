"""Options of `fxprune prune`: their types and help, and what their texts mean.

Texts become numbers here, with messages that name the option; whether a number is in range is told by the pass.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Guard",
    "HoldZeros",
    "Keep",
    "Kinds",
    "Mix",
    "Ratio",
    "Reconstruct",
    "TableFile",
    "TargetBytes",
    "TargetMacs",
    "TargetParams",
    "TargetSpeedup",
    "parse_amounts",
    "parse_kinds",
    "parse_shares",
    "several",
    "structured_options",
]

_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf))([kmg]?)", re.ASCII | re.IGNORECASE)
_TARGETS = ("ratio", "target_params", "target_macs", "target_bytes", "target_speedup")

Ratio = Annotated[
    str | None,
    typer.Option(
        help="Units: share of the block Linears' parameters to remove, in (0, 1). Of this and the other targets of "
        "size and speed give one; several values, such as 0.1,0.2,0.3, make a checkpoint each from one calibration."
    ),
]
TargetParams = Annotated[str | None, typer.Option(help="Units: most parameters of the slim model, such as 100M.")]
TargetMacs = Annotated[str | None, typer.Option(help="Units: most MACs per token (attention scores aside), as 90M.")]
TargetBytes = Annotated[str | None, typer.Option(help="Units: most bytes of the weights, such as 400M.")]
TargetSpeedup = Annotated[
    str | None,
    typer.Option(
        help="Units: how much faster by --table; measured at the end, exits with 1 unless it holds within 5%."
    ),
]
TableFile = Annotated[Path | None, typer.Option(help="Latency table for --target-speedup, made by bench --table.")]
Mix = Annotated[
    str | None, typer.Option(help="Weights of the table's cases, such as prefill-512=0.5,decode=0.5; alike by default.")
]
Keep = Annotated[
    list[str] | None, typer.Option(help="Units: PATTERN=SHARE of groups like this stay at least; 1: all. Repeat.")
]
Kinds = Annotated[
    str | None,
    typer.Option(help="Units: prune only these, of attention,mlp; with l0 and --budget lagrangian, hidden,layers too."),
]
Reconstruct = Annotated[
    str | None,
    typer.Option(help="Units: what consumers learn: none, bias, ridge, auto (the best of these), scale, dense."),
]
Guard = Annotated[
    str,
    typer.Option(
        help="Units: text unlike the calibration text, to warn of overfitting to that: a file, `python` or `none`."
    ),
]
HoldZeros = Annotated[
    bool,
    typer.Option(
        "--hold-zeros",
        help="Hold zeros that another tool's pruning left (where they are 10% of a Linear or more); masks that a "
        "checkpoint has are always held.",
    ),
]


def parse_amounts(option: str, text: str) -> float | list[float]:
    """Read one number, or several with commas between; `k`, `M` and `G` are thousands, millions, thousand millions.

    Args:
        option: as the user typed it, for messages.
        text: such as `100M` or `0.1,0.2`.

    Raises:
        UsageError: it is no number.
    """
    found = []
    for part in text.split(","):
        match = _NUMBER.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{option} {text}: {part.strip()!r} is no number; write such as 0.2, 1.3e8 or 130M")
        found.append(float(match[1]) * _SUFFIXES[match[2].lower()])
    return found if len(found) > 1 else found[0]


def parse_shares(option: str, texts: Sequence[str], what: str) -> dict[str, float]:
    """Read `NAME=NUMBER` options.

    Args:
        option: as the user typed it, for messages.
        texts: one each.
        what: what stands before the sign, for messages.

    Raises:
        UsageError: there is no `=`, a name comes twice, or what follows is no finite number.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.strip().rpartition("=")
        number = _NUMBER.fullmatch(value.strip())
        if not name or number is None or number[2] or not math.isfinite(float(number[1])):
            raise UsageError(f"{option} {text!r}: give {what}=NUMBER, such as {what}=0.5")
        if name in found:
            raise UsageError(f"{option}: {name} is given twice")
        found[name] = float(number[1])
    return found


def parse_kinds(text: str) -> list[str]:
    """Read the kinds of groups; which there are is told by the pass.

    Raises:
        UsageError: there is none, or an empty one.
    """
    kinds = [kind.strip() for kind in text.split(",")]
    if not all(kinds):
        raise UsageError(f"--kinds {text!r}: give attention, mlp or attention,mlp")
    return kinds


def structured_options(
    targets: Mapping[str, str | None],
    *,
    table: Path | None,
    mix: str | None,
    threads: int | None,
    keep: Sequence[str],
    kinds: str | None,
    reconstruct: str | None,
) -> dict[str, Any]:
    """The options of a structured pass that were given.

    Args:
        targets: texts of `ratio`, `target_params`, ..., by name.
        table: of latencies.
        mix: of its cases.
        threads: of the deployed model.
        keep: see `parse_shares`.
        kinds: see `parse_kinds`.
        reconstruct: as it is.

    Raises:
        UsageError: a text cannot be read, or two targets were given, or a mix or a table without a target speed-up.
    """
    named = {name: f"--{name.replace('_', '-')}" for name in targets}
    found: dict[str, Any] = {
        name: parse_amounts(named[name], text) for name, text in targets.items() if text is not None
    }
    if len(found) > 1:
        raise UsageError(f"give one target, not {' and '.join(named[name] for name in found)}")
    timed = "target_speedup" in found
    if mix is not None and not timed:
        raise UsageError("--mix weighs the cases of --target-speedup; leave it out")
    if timed != (table is not None):
        raise UsageError("--target-speedup and --table go together; fxprune bench MODEL --table FILE makes a table")
    more = {
        "table": None if table is None else str(table),
        "mix": None if mix is None else parse_shares("--mix", mix.split(","), "CASE"),
        "threads": threads if timed else None,
        "keep": parse_shares("--keep", keep, "PATTERN") or None,
        "kinds": None if kinds is None else parse_kinds(kinds),
        "reconstruct": reconstruct,
    }
    return found | {name: value for name, value in more.items() if value is not None}


def several(options: Mapping[str, Any]) -> bool:
    """Whether a target has several values."""
    return any(isinstance(options.get(name), list) for name in _TARGETS)
