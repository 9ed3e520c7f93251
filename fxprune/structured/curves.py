"""Curves: for one group, which units stay at each width that is legal and aligned, and the loss that goes with it.

Every structured method says what it knows as curves, and every budget is a choice of one level on each of them: units
scored one by one give a curve by adding up what goes, optimal brain surgeon by one sweep.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxprune.core.errors import PlanError, UsageError
from fxprune.core.groups import AttentionGroup
from fxprune.core.parts import balanced_order
from fxprune.structured.obs import sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from fxprune.core.groups import Group
    from fxprune.structured.obs import Elimination

__all__ = [
    "ATTENTION",
    "EVENNESS",
    "Curve",
    "Level",
    "Limits",
    "balanced",
    "check_evenness",
    "evened",
    "head_curve",
    "obs_channel_curve",
    "obs_head_curve",
    "scaled",
    "score_curve",
]

ATTENTION = 10.0
"""Factor on the loss of heads, unless told otherwise (see `balanced`)."""
EVENNESS = 0.0
"""How much the MLPs of layers are put on one scale, unless told otherwise (see `evened`)."""


@dataclass(frozen=True)
class Level:
    """One point of a curve.

    Attributes:
        kept: the units that stay, ascending.
        loss: predicted loss of keeping no others, at least 0; its unit is the method's own.
    """

    kept: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Curve:
    """The levels of one group, the one that keeps everything first.

    Attributes:
        group: name of the group.
        levels: of any number of kept units; for one number there may be several (other KV heads).
    """

    group: str
    levels: tuple[Level, ...]

    def within(self, kept: Sequence[int]) -> Curve:
        """The levels that keep nothing but what `kept` keeps."""
        allowed = set(kept)
        return Curve(self.group, tuple(level for level in self.levels if allowed.issuperset(level.kept)))


@dataclass(frozen=True)
class Limits:
    """What of a group must stay.

    Attributes:
        round_to: kept MLP widths are multiples of this, unless nothing is removed.
        min_keep: share of the units, in an attention of the query heads and of the KV heads; one legal step always
            stays.
    """

    round_to: int = 8
    min_keep: float = 0.1

    def least(self, units: int, step: int = 1) -> int:
        """How many of so many units stay at least, a multiple of `step`."""
        return max(step, math.ceil(self.min_keep * units / step) * step)


def score_curve(group: Group, scores: NDArray[np.float64], limits: Limits) -> Curve:
    """The curve of units that are scored one by one: the loss of a level is the sum of what goes.

    Args:
        group: an attention or an MLP.
        scores: (units,) loss of removing each unit, at least 0.
        limits: see `Limits`.
    """
    if isinstance(group, AttentionGroup):
        return head_curve(group, lambda kept: float(scores.sum() - scores[list(kept)].sum()), scores, limits)
    order = balanced_order(np.argsort(scores, kind="stable"), group.parts)
    lost = np.concatenate([[0.0], np.cumsum(scores[order])])
    return Curve(
        group.name,
        tuple(
            Level(tuple(sorted(int(unit) for unit in order[gone:])), float(lost[gone]))
            for gone in _counts(group, limits)
        ),
    )


def _counts(group: Group, limits: Limits) -> Iterator[int]:
    """How many of a group's channels may go: 0, and what leaves a multiple of the rounding, as much in every part."""
    yield 0
    units, step = group.units, math.lcm(limits.round_to, group.step)
    gone = units % step or step
    while units - gone >= limits.least(units, step):
        yield gone
        gone += step


def head_curve(
    group: AttentionGroup,
    loss_of: Callable[[tuple[int, ...]], float],
    scores: NDArray[np.float64],
    limits: Limits,
    *,
    worth: Callable[[NDArray[np.float64]], float] = np.sum,
) -> Curve:
    """All legal head counts: every kept KV head keeps as many query heads, every part as many KV heads, the best ones.

    Args:
        group: the attention.
        loss_of: gives the loss of kept query heads.
        scores: (query heads,) what heads are ranked by.
        limits: see `Limits`.
        worth: what a KV head is ranked by, from the scores of those of its heads that would stay.

    Raises:
        PlanError: the KV heads serve different numbers of query heads.
    """
    members = _members(group)
    parts = group.kv_parts
    step = 1 if parts is None else len(parts)
    levels = {}
    for per_kv in range(len(members[0]), 0, -1):
        best = [sorted(heads, key=lambda head: -scores[head])[:per_kv] for heads in members]
        order = sorted(range(len(members)), key=lambda kv: (-float(worth(scores[best[kv]])), kv))
        ranked = balanced_order(np.array(order), parts).tolist()
        for count in range(len(members), limits.least(len(members), step) - 1, -step):
            if count * per_kv >= limits.least(group.units):
                kept = tuple(sorted(head for kv in ranked[:count] for head in best[kv]))
                levels[kept] = Level(kept, max(0.0, float(loss_of(kept))))
    return Curve(group.name, tuple(sorted(levels.values(), key=lambda level: -len(level.kept))))


def _members(group: AttentionGroup) -> list[list[int]]:
    """The query heads of each KV head, as many of each."""
    members = [group.heads_of(kv) for kv in range(group.kv_heads)]
    if len(set(map(len, members))) > 1:
        raise PlanError(f"{group.name}: its KV heads serve different numbers of query heads; no head count is legal")
    return members


def obs_channel_curve(
    group: Group, problems: Sequence[Elimination], blocks: Sequence[torch.Tensor], limits: Limits
) -> Curve:
    """The curve of MLP channels by structured optimal brain surgeon; one sweep gives all widths.

    Args:
        group: an MLP.
        problems: one for each consumer; used up.
        blocks: (units, inputs of one) for each consumer.
        limits: see `Limits`.
    """
    counts = list(_counts(group, limits))
    left = torch.ones(group.units, dtype=torch.bool)
    levels = [Level(tuple(range(group.units)), 0.0)]
    lost = 0.0
    parts = torch.arange(group.units)[None] if group.parts is None else torch.from_numpy(group.parts)
    for before, gone in itertools.pairwise(counts):
        step, least = (gone - before) // len(parts), (group.units - gone) // len(parts)
        for part in parts:
            mine = torch.zeros_like(left)
            mine[part] = left[part]
            order, errors = sweep(problems, blocks, step=step, least=least, left=mine)
            left[order] = False
            lost += float(errors[-1])
        levels.append(Level(tuple(torch.where(left)[0].tolist()), lost))
    return Curve(group.name, tuple(levels))


def obs_head_curve(
    group: AttentionGroup, problems: Sequence[Elimination], blocks: Sequence[torch.Tensor], limits: Limits
) -> Curve:
    """The curve of heads: KV heads go one by one, of every part; between, every KV head loses its cheapest query head.

    Args:
        group: the attention.
        problems: one for each consumer; used up.
        blocks: (query heads, inputs of one) for each consumer.
        limits: see `Limits`.
    """
    members = _members(group)
    parts = [list(range(len(members)))] if group.kv_parts is None else group.kv_parts.tolist()
    least = limits.least(len(members), len(parts))
    levels: dict[tuple[int, ...], Level] = {}
    lost = 0.0
    while True:
        listed = [[members[kv] for kv in part] for part in parts]
        levels |= _drop_kv_heads([problem.clone() for problem in problems], blocks, listed, lost=lost, least=least)
        if len(members[0]) == 1:
            break
        for index, heads in enumerate(members):
            costs = _costs(problems, blocks, [[head] for head in heads])
            gone = heads[int(torch.argmin(costs))]
            lost += _remove(problems, blocks, [gone])
            members[index] = [head for head in heads if head != gone]
    fewest = limits.least(group.units)
    found = (level for level in levels.values() if len(level.kept) >= fewest)
    return Curve(group.name, tuple(sorted(found, key=lambda level: -len(level.kept))))


def _drop_kv_heads(
    problems: Sequence[Elimination],
    blocks: Sequence[torch.Tensor],
    parts: Sequence[Sequence[Sequence[int]]],
    *,
    lost: float,
    least: int,
) -> dict[tuple[int, ...], Level]:
    """The levels that dropping one KV head of each part after the other gives, by what they keep.

    Args:
        problems: used up.
        blocks: (query heads, inputs of one) for each consumer.
        parts: for each part the query heads of each of its KV heads.
        lost: what is lost already.
        least: KV heads that stay.
    """
    left = [list(part) for part in parts]
    levels = {}
    while True:
        kept = tuple(sorted(head for part in left for heads in part for head in heads))
        levels[kept] = Level(kept, max(0.0, lost))
        if sum(map(len, left)) <= least:
            return levels
        for part in left:
            costs = _costs(problems, blocks, part)
            gone = part.pop(int(torch.argmin(costs)))
            lost += _remove(problems, blocks, gone)


def _inputs(block: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    return block[list(heads)].reshape(-1)


def _costs(
    problems: Sequence[Elimination], blocks: Sequence[torch.Tensor], sets: Sequence[Sequence[int]]
) -> torch.Tensor:
    costs = [
        problem.costs(torch.stack([_inputs(block, heads) for heads in sets]))
        for problem, block in zip(problems, blocks, strict=True)
    ]
    return torch.stack([cost.cpu() for cost in costs]).sum(0)


def _remove(problems: Sequence[Elimination], blocks: Sequence[torch.Tensor], heads: Sequence[int]) -> float:
    return sum(problem.remove(_inputs(block, heads)) for problem, block in zip(problems, blocks, strict=True))


def scaled(curves: Mapping[str, Curve], factor: Mapping[str, float]) -> dict[str, Curve]:
    """Curves with each group's losses multiplied."""
    return {
        name: Curve(name, tuple(Level(level.kept, level.loss * factor[name]) for level in curve.levels))
        for name, curve in curves.items()
    }


def balanced(
    curves: Mapping[str, Curve], groups: Sequence[Group], *, attention: float = ATTENTION, evenness: float = EVENNESS
) -> dict[str, Curve]:
    """Curves of the end loss as a knapsack over all groups should see them.

    To second order, and on calibration text, the loss says too little of what heads do and of what many layers lose
    together (see `fxprune.passes.channel` for figures).

    Args:
        curves: by the group's name.
        groups: that they are of.
        attention: factor on the losses of heads.
        evenness: of the other groups' scales, see `evened`.
    """
    heads = {group.name for group in groups if isinstance(group, AttentionGroup)}
    others = evened({name: curve for name, curve in curves.items() if name not in heads}, evenness)
    return others | scaled({name: curves[name] for name in sorted(heads)}, dict.fromkeys(heads, attention))


def check_evenness(evenness: float) -> None:
    """Whether curves can be evened by this.

    Raises:
        UsageError: it is out of range.
    """
    if not 0 <= evenness <= 1:
        raise UsageError(f"evenness must lie in [0, 1], got {evenness}")


def evened(curves: Mapping[str, Curve], evenness: float) -> dict[str, Curve]:
    """Curves whose scales differ less, so that a knapsack takes more evenly from all of them.

    A curve's scale is its loss at the widest level that keeps at most half of the units. Losses are multiplied by
    (geometric mean of the scales / own scale) ** evenness: at 0 they stay, at 1 all scales are one. Curves that are 0
    there stay as they are.

    Args:
        curves: of groups of one kind, by name.
        evenness: from 0 to 1.
    """
    scales = {name: _half_loss(curve) for name, curve in curves.items()}
    logs = [math.log(scale) for scale in scales.values() if scale > 0]
    if not logs:
        return dict(curves)
    mean = math.exp(math.fsum(logs) / len(logs))
    return scaled(curves, {name: (mean / one) ** evenness if one > 0 else 1.0 for name, one in scales.items()})


def _half_loss(curve: Curve) -> float:
    """The loss at the widest level that keeps at most half of the units, else at the narrowest."""
    whole = len(curve.levels[0].kept)
    least = min(curve.levels, key=lambda level: len(level.kept))
    half = [level for level in curve.levels if 2 * len(level.kept) <= whole]
    return max(half, key=lambda level: (len(level.kept), -level.loss), default=least).loss
