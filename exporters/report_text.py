"""Words and tables of the report: how figures read, what a clause and a table are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxprune.exporters.chart_kit import TIMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Fact",
    "Table",
    "binary",
    "distilled_facts",
    "duration",
    "make_table",
    "number",
    "percent",
    "scientific",
    "si",
    "spread",
    "stages",
    "times",
]


def si(value: float) -> str:
    """A count with a unit prefix and four digits: `134.5 M`."""
    for limit, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.{max(0, 3 - int(math.log10(abs(scaled))))}f} {prefix}"
    return f"{value:,.0f}"


def binary(value: float) -> str:
    """Bytes with a binary prefix: `513.1 MiB`."""
    for limit, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.4g} {prefix}"
    return f"{value:.0f} B"


def percent(share: float | None) -> str:
    """A share as `20.0%`; nothing for None."""
    return "" if share is None else f"{share:.1%}"


def times(ratio: float) -> str:
    """A ratio as `1.25` and a multiplication sign."""
    return f"{ratio:.2f}{TIMES}"


def number(value: float | None) -> str:
    """A measured figure with four digits, as it is when not finite; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if math.isfinite(value) else {math.inf: "∞", -math.inf: "-∞"}.get(value, "undefined")


def scientific(value: float | None) -> str:
    """An error as `2.1e-07`; nothing for None."""
    if value is None or not math.isfinite(value):
        return number(value)
    return "0" if value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds as `0.42 s`, `12.3 s` or `3 min 05 s`."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    return f"{seconds:.3g} s"


def spread(entry: Mapping[str, Any], form: str) -> str:
    """A quality figure with its standard error where known: `35.2 ± 0.4`."""
    error = entry.get(f"{form}_stderr")
    return number(entry.get(form)) + (f" ± {error:.2g}" if error is not None and form in entry else "")


@dataclass(frozen=True)
class Fact:
    """One clause of the headline.

    Attributes:
        value: the figure.
        label: what it is of.
        text: the clause as it reads in a sentence.
        tone: `"bad"` for what must not be overlooked, else empty.
    """

    value: str
    label: str
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table of strings; numeric columns are set flush right.

    Attributes:
        header: column titles.
        rows: as many cells each.
        numeric: indices of the numeric columns.
    """

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> Table | None:
    """Make a table without the columns that are empty in every row; None when nothing is left."""
    cells = [tuple(row) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    if not kept:
        return None
    right = frozenset(place for place, i in enumerate(kept) if i in set(numeric))
    return Table(tuple(header[i] for i in kept), [tuple(row[i] for i in kept) for row in cells], right)


def stages(seconds: Mapping[str, float]) -> list[dict[str, str]]:
    """Seconds as bars: name, time in words, width in percent of the longest."""
    longest = max(seconds.values(), default=0.0)
    return [
        {"name": name, "time": duration(value), "width": f"{100 * value / longest if longest else 0:.1f}"}
        for name, value in seconds.items()
    ]


def distilled_facts(found: Mapping[str, Any] | None) -> list[Fact]:
    """What distillation behind the pruning did, `fxprune.weights.distillation.Distilled` as JSON; nothing without."""
    if not found:
        return []
    value = f"{found['steps']} steps on {found['samples']} samples: divergence from the dense model on "
    value += f"{found['held_out']} others {number(found['before'])} to {number(found['after'])} nats a token"
    if not found["kept"]:
        value += "; it did not fall, so the weights are as they were"
    return [Fact(value, "Distilled", f"distilled, {value}")]
