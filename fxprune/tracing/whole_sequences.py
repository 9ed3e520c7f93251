"""Graphs of whole sequences, of models without a cache that grows: for which numbers of tokens such a graph holds.

Where a model's code loops over tokens or chunks of them, export unrolls as many rounds as the sample has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fxprune.core.errors import TraceError
from fxprune.tracing.outputs import named_results
from fxprune.tracing.sample import random_tokens

if TYPE_CHECKING:
    from torch import nn

    from fxprune.core.program import Interface

__all__ = ["fixed_length", "holds_elsewhere", "of_one_length", "require_causal"]


_ELSEWHERE = (3, 23, 41)
"""Numbers of tokens that a graph of whole sequences is run with: fewer than its sample has, and more."""


_UNLIKE = 0.2
"""Share of the largest logit by which another computation differs; rounding stays far below in any precision."""


_LENGTHS = (2, 3, 6, 10, *(2**k + 1 for k in range(4, 14)))
"""Numbers of tokens that a graph of whole sequences is asked about: just above the usual sizes of a chunk."""


def fixed_length(exported: torch.export.ExportedProgram) -> int | None:
    """The number of tokens that a graph of whole sequences holds for, where it holds for one only.

    Where a model's code loops over tokens or chunks, torch notes how many rounds it has unrolled: an equation of the
    length, which other lengths break. (Inequalities decide about shapes that broadcast, and hold more than they say.)
    """
    tokens = next(node for node in exported.graph.nodes if node.op == "placeholder" and node.name == "input_ids")
    size = tokens.meta["val"].shape[1]
    if not isinstance(size, torch.SymInt) or is_concrete_int(size):
        return int(size)
    symbol, environment = size.node.expr, size.node.shape_env
    equations = [
        g.expr
        for g in environment.guards
        if g.expr.free_symbols == {symbol} and g.expr.is_Relational and g.expr.rel_op == "=="
    ]
    allowed = exported.range_constraints.get(symbol)
    broken = [
        length
        for length in _LENGTHS
        if any(equation.subs(symbol, length) == False for equation in equations)  # noqa: E712 - sympy's false
        or (allowed is not None and length > 2 and not allowed.lower <= length <= allowed.upper)
    ]
    if not broken:
        return None
    return int(size.node.hint)


def holds_elsewhere(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> bool:
    """Whether a graph of whole sequences runs other lengths too, and gives what the model gives for them.

    Not every number of chunks that was unrolled leaves an equation behind.
    """
    ids = interface.example_inputs["input_ids"]
    if not {*interface.inputs} <= {"input_ids", "attention_mask", "position_ids"} or "logits" not in interface.outputs:
        return True  # whoever gave such a sample knows its lengths
    for length in _ELSEWHERE:
        tokens = ids.new_ones(1, length) if ids.is_meta else random_tokens(model.config, length, ids.device)[:1]
        made = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "position_ids": torch.arange(length, device=ids.device).unsqueeze(0),
        }
        given = {name: made[name] for name in interface.inputs}
        with torch.no_grad(), named_results(model.config):
            try:
                got = dict(zip(interface.outputs, graph_module(*given.values()), strict=True))["logits"]
            except RuntimeError:
                return False
            if ids.is_meta:
                continue
            wanted = model(**given, use_cache=False).logits
        if got.shape != wanted.shape or float((got - wanted).abs().max()) > _UNLIKE * float(wanted.abs().max()):
            return False
    return True


def of_one_length(interface: Interface, length: int) -> Interface:
    """The interface of a graph that holds for one number of tokens: no axis of that length is dynamic."""
    rows = interface.dynamic_axes["input_ids"].get(0)
    axes = {
        name: {axis: symbol for axis, symbol in of.items() if axis == 0 or symbol == rows}
        for name, of in interface.dynamic_axes.items()
    }
    return replace(interface, dynamic_axes=axes, fixed_length=length)


def require_causal(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> None:
    """Raise if tokens of a graph for one length depend on the padding behind them, with which shorter text is run."""
    examples = interface.example_inputs
    ids = examples.get("input_ids")
    if ids is None or ids.is_meta or "logits" not in interface.outputs:
        return
    length = ids.shape[1]
    half = length // 2
    padded = {
        name: torch.nn.functional.pad(each[:, :half], (0, length - half)) if each.shape == ids.shape else each
        for name, each in examples.items()
    }
    with torch.no_grad():
        whole, part = (
            dict(zip(interface.outputs, graph_module(*given.values()), strict=True))["logits"][:, :half]
            for given in (examples, padded)
        )
    mask = examples.get("attention_mask")
    seen = torch.ones_like(ids[:, :half], dtype=torch.bool) if mask is None else mask[:, :half].bool()
    if float((whole - part)[seen].abs().max()) > _UNLIKE * float(whole[seen].abs().max()):
        raise TraceError(
            f"{type(model).__name__} has a graph for {length} tokens only, and it reads tokens ahead, so that shorter "
            "text cannot be run with padding behind it; give example_inputs= with which its code runs every length"
        )
