"""How a learning rate goes over the steps of a training."""

from __future__ import annotations

import math

__all__ = ["cosine"]

_RISE = 0.05
"""Share of the steps in which a learning rate rises."""


def cosine(step: int, steps: int) -> float:
    """The factor of a learning rate that rises over a twentieth of the steps and falls along a cosine to 0."""
    rise = max(1.0, _RISE * steps)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step + 0.5) / steps)))
