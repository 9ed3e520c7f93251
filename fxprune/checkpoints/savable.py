"""Which groups a model class could not save if they were pruned: asked with shapes alone, before any calibration.

For each kind of group one unit is taken away, on the meta device, and the layout of a checkpoint is looked for as
saving does (`fxprune.checkpoints.layout`); logits have a shape and no values there, so a form that runs is taken to be
right. Some classes fail at that: their ALiBi or relative position bias has a row for each of the dense number of heads.
Groups of such a kind are left out with the reason. A class that does not run on the meta device cannot be asked; what
it refuses is told when it is saved.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxprune.checkpoints.layout import classify
from fxprune.checkpoints.trial import ExpectedLogits, prepared
from fxprune.core.errors import CheckpointError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.program import Event
from fxprune.models.skeleton import BUILD_ERRORS, aliases, build_skeleton, state_shapes
from fxprune.tracing.lifted import parameter_of
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from fxprune.core.channel_ids import IdArray
    from fxprune.core.groups import Group, UnitSlice
    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program, Source
    from fxprune.models.skeleton import Shape

__all__ = ["without_unsavable"]

_BATCH, _LENGTH = 2, 11


def without_unsavable(program: Program, pruning: Pass) -> Program:
    """Leave out the groups that the program's class could not save, of the kinds that a pass is about to prune.

    Args:
        program: with groups, dense.
        pruning: the pass; its `kinds` and `uniform` say what its plans are like.

    Returns:
        The program itself where nothing is known to fail; else one without these groups, and an event that says why.
    """
    assert program.source is not None
    start = time.perf_counter()
    kinds = getattr(pruning, "kinds", (AttentionGroup.kind, MlpGroup.kind))
    asked: dict[str, list[Group]] = {}
    for group in program.groups:
        if isinstance(group, AttentionGroup | MlpGroup) and group.kind in kinds and len(_first_unit(group)):
            asked.setdefault(group.kind, []).append(group)
    expected = _expected(program.source) if asked else None
    if expected is None:
        return program
    refused: dict[str, str] = {}
    for kind, groups in asked.items():
        chosen = groups if getattr(pruning, "uniform", False) else groups[:1]
        reason = _refusal(program, chosen, expected)
        if reason:
            refused[kind] = reason
    if not refused:
        return program
    listed = {f"all {len(asked[kind])} groups of kind {kind}": reason for kind, reason in refused.items()}
    seconds = time.perf_counter() - start
    event = Event("ask_savable", {"kinds": list(kinds)}, modified=True, seconds=seconds, details={"refused": listed})
    rest = tuple(group for group in program.groups if group.kind not in refused)
    return program.replace(groups=rest, history=(*program.history, event))


def _first_unit(group: Group) -> IdArray:
    """The units that go together with the first one and leave others; empty where none may go."""
    together = np.arange(group.multiple)
    if group.parts is not None:
        together = group.parts[:, :1].reshape(-1)
    if group.sharing is not None and len(np.unique(group.sharing)) > 1:
        together = np.flatnonzero(group.sharing == group.sharing[0])
    return together if len(together) < group.units else together[:0]


def _expected(source: Source) -> ExpectedLogits | None:
    """Tokens and the logits of the dense class, without values; None where it does not run on the meta device."""
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device="meta")
    tokens = {"input_ids": ids} | ({"decoder_input_ids": ids} if source.config.is_encoder_decoder else {})
    for inputs in (tokens | {"attention_mask": torch.ones_like(ids)}, tokens):
        try:
            model: PreTrainedModel = build_skeleton(source.model_class, source.config, torch.float32)
            model.set_attn_implementation("eager")
            with torch.no_grad():
                logits = model(**prepared(model, inputs, "meta", torch.float32)).logits
        except BUILD_ERRORS:
            continue
        return ExpectedLogits(inputs, logits)
    return None


def _refusal(program: Program, groups: Sequence[Group], expected: ExpectedLogits) -> str:
    """Why the class cannot save a model without the first unit of some groups; empty if it can."""
    source = program.source
    assert source is not None
    dense = build_skeleton(source.model_class, source.config, torch.float32)
    shapes, owners = state_shapes(dense), aliases(dense)
    for group in groups:
        units = _first_unit(group)
        gone = [(piece, piece.indices[units].size) for piece in group.slices]
        if group.sharing is not None:
            kept = np.delete(group.sharing, units)
            sets = np.setdiff1d(group.sharing[units], kept)
            gone += [(piece, piece.indices[sets].size) for piece in group.shared]
        for piece, count in gone:
            _narrow(program, shapes, owners, piece, count)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    sizes = {group.head_dim for group in groups if isinstance(group, AttentionGroup)}
    counts = {count for group in groups if isinstance(group, AttentionGroup) for count in (group.units, group.kv_heads)}
    expected = replace(expected, fixed=frozenset(sizes - counts))
    try:
        classify(tensors, source, None, expected)
    except CheckpointError as error:
        return str(error)
    return ""


def _narrow(program: Program, shapes: dict[str, Shape], owners: dict[str, str], piece: UnitSlice, count: int) -> None:
    """Make the class's shape of a parameter smaller by what a slice of its graph's form loses."""
    module = get_attribute(program.graph_module, piece.parameter.rpartition(".")[0])
    name, turned = parameter_of(module, piece.parameter)
    name = owners.get(name, name)
    if name in shapes:
        shape = list(shapes[name])
        shape[len(shape) - 1 - piece.axis if turned else piece.axis] -= count
        shapes[name] = tuple(shape)
