"""Fisher: the units go that the loss minds least, then change places, then are scaled.

Kwon et al. 2022, "A fast post-training pruning framework for transformers" (the source of Intel's channel pruning):

    mask search       L(m) - L(1) ~ 1/2 (1 - m)^T F (1 - m), F diagonal: one knapsack over the scores    (section 4.1)
    rearrangement     in each group, at the width it has, F of the group whole: || sum of the removed units'
                      gradients ||^2 falls by exchanging units                                            (section 4.2)
    mask tuning       one factor for each unit that stays, by least squares                               (section 4.3)

With A (samples, units) the gradients of each sample's loss by a group's mask and F = A^T A, the change of
|| A r ||^2 by a candidate is read from F r: no pass over the data.

Plans of several budgets stay nested: a tighter one is rearranged among the units that the looser one kept, starting
from the best scores among them.

Graph and refusals are those of `fxprune.structured.base`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fxprune.core.groups import AttentionGroup
from fxprune.core.plan import Plan
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import score_curve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from fxprune.core.groups import Group
    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve
    from fxprune.structured.reconstruction import Reconstruction

__all__ = ["Fisher", "rearrange_channels", "rearrange_heads", "removal_loss"]

_RELATIVE_GAIN = 1e-9
"""An exchange that gains less than this share is rounding."""


def removal_loss(fisher: NDArray[np.float64], kept: Sequence[int]) -> float:
    """|| sum of the gradients of the units that are not kept ||^2, with (units, units) `fisher`."""
    gone = np.setdiff1d(np.arange(len(fisher)), np.asarray(kept, dtype=np.int64))
    return float(fisher[np.ix_(gone, gone)].sum())


def rearrange_channels(
    fisher: NDArray[np.float64],
    kept: Sequence[int],
    allowed: Sequence[int] | None = None,
    parts: NDArray[np.int64] | None = None,
) -> tuple[int, ...]:
    """Exchange units for less loss, their number unchanged: Kwon et al.'s greedy pass.

    Every kept unit in turn, from the least score, joins the removed ones, and the unit of them without which the
    others weigh least comes back; this may be the same one, so the loss never grows.

    Args:
        fisher: (units, units) float64, A^T A.
        kept: the units that stay at first.
        allowed: the units that may stay; all of them by default.
        parts: (parts, units of one); places are changed inside a part. None for no parts.

    Returns:
        As many units, ascending.
    """
    part_of = np.zeros(len(fisher), dtype=np.int64)
    if parts is not None:
        part_of[parts] = np.arange(len(parts))[:, None]
    scores = fisher.diagonal()
    free = np.zeros(len(fisher), dtype=bool)
    free[np.arange(len(fisher)) if allowed is None else np.asarray(allowed, dtype=np.int64)] = True
    gone = np.ones(len(fisher), dtype=bool)
    gone[np.asarray(kept, dtype=np.int64)] = False
    pull = fisher @ gone  # what each unit has in common with the sum of the removed ones
    for unit in sorted(kept, key=lambda unit: (scores[unit], unit)):
        pull += fisher[unit]
        gone[unit] = True
        weight = np.where(gone & free & (part_of == part_of[unit]), scores - 2 * pull, np.inf)
        back = int(np.argmin(weight))
        if weight[back] >= weight[unit] - _RELATIVE_GAIN * abs(weight[unit]):
            back = unit
        pull -= fisher[back]
        gone[back] = False
    return tuple(np.flatnonzero(~gone).tolist())


def rearrange_heads(
    group: AttentionGroup, fisher: NDArray[np.float64], kept: Sequence[int], allowed: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Exchange heads for less loss: the best exchange first, until none gains; the shape of what stays is unchanged.

    A query head changes places with another one of its KV head, or a kept KV head with a removed one of its part, which
    then keeps the best-scored heads that it may.

    Args:
        group: the attention.
        fisher: (query heads, query heads) float64, A^T A.
        kept: the query heads that stay at first, as many of each kept KV head.
        allowed: the heads that may stay; all of them by default.

    Returns:
        Query heads, ascending.
    """
    current = set(kept)
    free = set(range(group.units)) if allowed is None else set(allowed)
    loss = removal_loss(fisher, sorted(current))
    while True:
        pull = fisher @ np.array([head not in current for head in range(group.units)], dtype=np.float64)
        best, change = 0.0, None
        for out, back in _exchanges(group, fisher.diagonal(), current, free):
            step = np.zeros(group.units)
            step[list(out)], step[list(back)] = 1.0, -1.0
            gain = -float(2 * step @ pull + step @ fisher @ step)
            if gain > best:
                best, change = gain, (out, back)
        if change is None or best <= _RELATIVE_GAIN * loss:
            return tuple(sorted(current))
        current = current - set(change[0]) | set(change[1])
        loss -= best


def _exchanges(
    group: AttentionGroup, scores: NDArray[np.float64], kept: set[int], free: set[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Heads that may go, and heads that come back for them."""
    members = [group.heads_of(kv) for kv in range(group.kv_heads)]
    kept_of = [[head for head in heads if head in kept] for heads in members]
    free_of = [[head for head in heads if head in free] for heads in members]
    per_kv = max(map(len, kept_of))
    for heads, possible in zip(kept_of, free_of, strict=True):
        if heads:
            yield from (((out,), (back,)) for out, back in itertools.product(heads, set(possible) - kept))
    part_of = np.zeros(len(members), dtype=np.int64)
    if group.kv_parts is not None:
        part_of[group.kv_parts] = np.arange(len(group.kv_parts))[:, None]
    for heads, mine in zip(kept_of, part_of, strict=True):
        if not heads:
            continue
        for other, possible, part in zip(kept_of, free_of, part_of, strict=True):
            if not other and len(possible) >= per_kv and part == mine:
                back = sorted(possible, key=lambda head: -scores[head])[:per_kv]
                yield tuple(heads), tuple(back)


class Fisher(StructuredPass):
    """Remove the units of least Fisher information (see the module's docstring). Options are `StructuredPass`'s."""

    name = "fisher"
    reconstruction: ClassVar[Reconstruction] = "scale"
    reads_loss: ClassVar[bool] = True

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Sums of the diagonal; one backward pass."""
        signals = case.loss_signals(case.tokens, grams=False)
        found = {}
        for group in case.groups:
            gradients = signals[group.name].gradients.double().cpu().numpy()
            case.kept_for_later[group.name] = gradients.T @ gradients
            scores = np.square(gradients).sum(0) / 2
            found[group.name] = score_curve(group, scores, case.limits[group.name])
        return found

    def refine(self, case: Case, plan: Plan, within: Plan | None) -> Plan:
        """Rearrange each group at its width."""
        kept = {}
        losses = [0.0, 0.0]
        for group in case.groups:
            fisher = case.kept_for_later[group.name]
            allowed = range(group.units) if within is None else within.kept_units(group)
            start = _start(group, plan.kept_units(group), allowed, fisher.diagonal())
            if isinstance(group, AttentionGroup):
                kept[group.name] = rearrange_heads(group, fisher, start, allowed)
            else:
                kept[group.name] = rearrange_channels(fisher, start, allowed, group.parts)
            losses[0] += removal_loss(fisher, start) / 2
            losses[1] += removal_loss(fisher, kept[group.name]) / 2
        case.notes.setdefault("rearranged", []).append({"loss_before": losses[0], "loss_after": losses[1]})
        return Plan.of(kept)


def _start(group: Group, kept: Sequence[int], allowed: Sequence[int], scores: NDArray[np.float64]) -> Sequence[int]:
    """Units to start from: the plan's, or where these may not stay, the best scores among those that may."""
    if set(kept) <= set(allowed):
        return kept
    best = sorted(allowed, key=lambda unit: (-scores[unit], unit))
    if not isinstance(group, AttentionGroup):
        return sorted(best[: len(kept)])
    count = len(group.kv_kept(kept))
    per_kv = len(kept) // count
    members = [[head for head in best if head in group.heads_of(kv)][:per_kv] for kv in group.kv_kept(allowed)]
    ranked = sorted(members, key=lambda heads: -float(scores[heads].sum()))
    return sorted(head for heads in ranked[:count] for head in heads)
