"""Which groups could not be slimmed if they were pruned: asked of one group of each sort, before any calibration.

A group is one of a sort: those that differ in nothing but the numbers in their names (the layers of a model). The
first unit of one group of each sort is taken away and the graph is slimmed. Where an operator cannot be written for
what stays (what a channel is multiplied with carries no channels and lies in rows of another shape, say), each sort
is asked alone, and those that fail are left out with the reason.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import numpy as np

from fxprune.core.errors import PlanError, UnsupportedOpError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.plan import Plan
from fxprune.core.program import Event
from fxprune.slimming.slim import slim_graph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.core.groups import Group
    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program

__all__ = ["without_unslimmable"]


def without_unslimmable(program: Program, pruning: Pass) -> Program:
    """Leave out the groups that slimming would refuse, of the kinds that a pass is about to prune.

    Args:
        program: with groups, dense.
        pruning: the pass; its `kinds` say what its plans are like.

    Returns:
        The program itself where nothing is known to fail; else one without these groups, and an event that says why.
    """
    start = time.perf_counter()
    kinds = getattr(pruning, "kinds", (AttentionGroup.kind, MlpGroup.kind))
    sorts: dict[tuple[str, ...], list[Group]] = {}
    for group in program.groups:
        if isinstance(group, AttentionGroup | MlpGroup) and group.kind in kinds:
            sorts.setdefault(_sort(group), []).append(group)
    if not _refusal(program, [groups[0] for groups in sorts.values()]):
        return program
    return _left_out(program, sorts, list(kinds), start)


def _left_out(
    program: Program, sorts: Mapping[tuple[str, ...], Sequence[Group]], kinds: list[str], start: float
) -> Program:
    """The program without the sorts of groups that are refused one by one, with an event that says why."""
    refused: dict[str, str] = {}
    for groups in sorts.values():
        reason = _refusal(program, groups[:1])
        if reason:
            refused |= {group.name: reason for group in groups}
    if not refused:
        return program
    seconds = time.perf_counter() - start
    event = Event("ask_slimmable", {"kinds": kinds}, modified=True, seconds=seconds, details={"refused": refused})
    rest = tuple(group for group in program.groups if group.name not in refused)
    return program.replace(groups=rest, history=(*program.history, event))


def _sort(group: Group) -> tuple[str, ...]:
    """What groups have in common that slimming treats alike: their kind, size and names but for the numbers."""
    pieces = (*group.slices, *group.shared)
    names = [group.name, *(f"{piece.parameter} {piece.axis}" for piece in pieces)]
    return (group.kind, str(group.units), *(re.sub(r"\d+", "#", name) for name in names))


def _without_first(group: Group) -> list[int]:
    """The units that stay when the first one goes, with those that it cannot go without.

    Of a layout in parts each loses another one of its units, as most plans would have it.
    """
    gone = np.arange(group.multiple)
    if group.parts is not None:
        gone = np.asarray([part[number % len(part)] for number, part in enumerate(group.parts)])
    if group.sharing is not None:
        gone = np.flatnonzero(np.isin(group.sharing, group.sharing[gone]))
    return np.delete(np.arange(group.units), gone).tolist()


def _refusal(program: Program, groups: Sequence[Group]) -> str:
    """Why the graph cannot be slimmed without the first units of some groups; empty if it can."""
    kept: dict[str, tuple[int, ...]] = {}
    for group in groups:
        plan = Plan.of({group.name: _without_first(group)})
        try:
            plan.validate(program.groups)
        except PlanError:
            continue  # this unit cannot go on its own: nothing is learned
        kept |= plan.kept
    if not kept:
        return ""
    try:
        slim_graph(program.graph_module, program.interface, program.groups, Plan(kept))
    except (PlanError, UnsupportedOpError) as error:
        return str(error)
    return ""
