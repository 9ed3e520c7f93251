"""Goals: the values of a pass's target, when it is given several at once."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal:
    """One value of the target of a pass; each makes a result of its own.

    Attributes:
        name: of its directory, such as `ratio-0.1` or `params-100M`.
        text: as people read it, such as `ratio 0.1`.
        option: the pass's option that holds it.
        value: of that option.
        speedup: whether it is a speed-up, which is measured at the end.
    """

    name: str
    text: str
    option: str
    value: float
    speedup: bool = False
