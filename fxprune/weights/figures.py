"""What masks of single weights say: how many are gone, and whether an N:M pattern holds.

A pattern N:M keeps at most N of every M neighbours along the inputs of a Linear. Removing channels of what the Linear
reads shifts neighbours together: the zeros stay, the pattern does not, and no kernel for it takes such a weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["PatternFigures", "mask_figures", "pattern_figures", "pattern_of"]

_LENGTHS = (4, 8, 16, 32)
"""Lengths of groups that patterns are looked for with: those that kernels exist for, and their multiples."""
_FILLED = 0.9
"""A pattern was asked for where this share of groups keeps exactly N: chance does not do that."""


@dataclass(frozen=True)
class PatternFigures:
    """What became of a pattern.

    Attributes:
        pattern: such as `2:4`.
        linears: how many had it.
        groups: of M neighbours in these now; a rest that is shorter counts as one.
        holding: of them keep at most N.
    """

    pattern: str
    linears: int
    groups: int
    holding: int


def _rows(module: nn.Module, mask: Tensor) -> Tensor:
    """A mask with the inputs along the last axis, (rows, in)."""
    turned = isinstance(module, GroupedLinear) and module.in_axis == 1
    rows = mask.transpose(1, 2) if turned else mask
    return rows.reshape(-1, rows.shape[-1])


def pattern_of(rows: Tensor) -> tuple[int, int] | None:
    """The N:M pattern that a mask (rows, in) was made with; None for any other mask."""
    for m in _LENGTHS:
        if rows.shape[1] % m == 0:
            counts = rows.reshape(-1, m).sum(1)
            n = int(counts.max())
            if 0 < n < m and float((counts == n).float().mean()) >= _FILLED:
                return n, m
    return None


def pattern_figures(
    before: nn.Module, old: Mapping[str, Tensor], after: nn.Module, new: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """The patterns that masks had, and how much of them is left.

    Args:
        before: the graph that the old masks belong to.
        old: masks by projection.
        after: the graph of the new ones; the same one where nothing was cut.
        new: masks by projection; of what is gone there are none.

    Returns:
        `PatternFigures` as JSON data, one for each pattern.
    """
    linears: Counter[str] = Counter()
    groups: Counter[str] = Counter()
    holding: Counter[str] = Counter()
    for name in (name for name in old if name in new):
        found = pattern_of(_rows(get_attribute(before, name), old[name]))
        if found is None:
            continue
        n, m = found
        rows = _rows(get_attribute(after, name), new[name])
        whole = rows.shape[1] // m * m
        key = f"{n}:{m}"
        linears[key] += 1
        groups[key] += len(rows) * -(-rows.shape[1] // m)
        holding[key] += int((rows[:, :whole].reshape(-1, m).sum(1) <= n).sum()) if whole else 0
    return [asdict(PatternFigures(key, linears[key], groups[key], holding[key])) for key in linears]


def mask_figures(
    graph_module: nn.Module, masks: Mapping[str, Tensor], patterns: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The report's `masks` section: single weights that are held at zero in what is left of the model.

    Args:
        graph_module: the lifted graph.
        masks: by projection.
        patterns: what became of the patterns, where something was cut; looked for in the masks otherwise.
    """
    weights = sum(mask.numel() for mask in masks.values())
    zeros = weights - sum(int(mask.sum()) for mask in masks.values())
    if patterns is None:
        patterns = pattern_figures(graph_module, masks, graph_module, masks)
    return {
        "linears": len(masks),
        "weights": weights,
        "zeros": zeros,
        "share": zeros / max(1, weights),
        **({"patterns": patterns} if patterns else {}),
    }
