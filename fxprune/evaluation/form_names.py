"""Short names for several forms of a model that a user named by path or hub id."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["form_names"]


def form_names(forms: Sequence[str]) -> list[str]:
    """Short names for forms: the last part of the path, more of it where that does not tell them apart.

    A form that is named twice, to see how much two measurements of the same thing differ, is counted: `slim (2)`.

    Raises:
        UsageError: fewer than two forms.
    """
    if len(forms) < 2:
        raise UsageError("a comparison needs at least two forms: name the one to compare with, then the others")
    places = [str(Path(form).expanduser().absolute()) if Path(form).expanduser().exists() else form for form in forms]
    parts = [Path(place).parts for place in places]
    names = places
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(places)):
            break
    seen: Counter[str] = Counter()
    counted = []
    for name in names:
        seen[name] += 1
        counted.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return counted
