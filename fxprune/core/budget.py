"""How large a budget may be."""

from __future__ import annotations

from fxprune.core.errors import UsageError

__all__ = ["check_ratio"]


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless 0 < ratio < 1 (NaN included)."""
    if not 0 < ratio < 1:
        raise UsageError(
            f"ratio must lie between 0 and 1, got {ratio}; it is the share of block Linear parameters removed"
        )
