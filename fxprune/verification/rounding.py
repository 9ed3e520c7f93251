"""What rounding explains: forms that differ by more than a fixed tolerance are judged in a wider precision.

A deeply pruned model amplifies float32 rounding until two correct forms differ by more than the tolerance. Two graphs
that do are compared once more in float64, where rounding cannot be the reason; a form that cannot run in float64, or
has rescaled norms, whose weights were rounded anew, may differ by four times the graph's own rounding. The rung then
says both figures.

Lower precisions round so coarsely that a fixed tolerance would let wrong graphs pass. Two graphs in bfloat16 or float16
are therefore run in float32, weights as they are, and must agree as float32 models do. A form that is no graph, or
weights that were rounded anew, may differ by four times the graph's own rounding, which is measured: the same graph in
its own precision against float32.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch.fx import GraphModule

from fxprune.core.precision import is_low, short_name
from fxprune.core.program import Form
from fxprune.core.widened import Widened
from fxprune.tracing.graphs import copy_graph_module
from fxprune.verification.ladder import tolerance_for

if TYPE_CHECKING:
    from typing import Any

    from fxprune.core.program import Interface
    from fxprune.verification.ladder import Rung

__all__ = ["DOUBLE_TOLERANCE", "ROUNDINGS", "Measured", "in_double", "in_wider_precision", "widened"]


ROUNDINGS = 4
"""How many times a graph's own rounding another form's logits may be away, where rounding must be allowed for."""


DOUBLE_TOLERANCE = 1e-8
"""Allowed difference of logits between two graphs run in float64: what is equal but for rounding stays far below."""


def in_double(form: Form) -> Form:
    """A copy of a graph form in float64, its own casts to other floating dtypes included."""
    assert isinstance(form.module, GraphModule)
    module = copy_graph_module(form.module)
    module = copy.deepcopy(module).double()

    def widen(argument: Any) -> Any:
        lower = isinstance(argument, torch.dtype) and argument.is_floating_point
        return torch.float64 if lower else argument

    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, widen)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, widen)
    module.recompile()
    examples = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in form.interface.example_inputs.items()
    }
    return Form(module, replace(form.interface, example_inputs=examples))


def widened(form: Form, dtype: torch.dtype) -> tuple[Any, Interface]:
    """What runs a graph form in float32, its weights as they are, or in float64; and how it is called."""
    assert isinstance(form.module, GraphModule)
    if dtype is torch.float32:
        return Widened(form.module), form.interface
    double = in_double(form)
    return double.module, double.interface


class Measured(Protocol):
    """How a ladder measures graphs in another precision than their own: the largest difference of a result."""

    dtype: torch.dtype

    def own_rounding(self, form: Form, wide: torch.dtype) -> float:
        """Of a graph in its own precision from itself in a wider one."""

    def exact_difference(self, reference: Form, candidate: Form, wide: torch.dtype) -> float:
        """Of two graphs, both in a wider precision."""


def in_wider_precision(rung: Rung, graphs: tuple[Form, ...], ladder: Measured) -> Rung:
    """Judge a rung of forms in lower precision, or one that does not hold.

    Args:
        rung: as it was found, with the tolerance of its dtype.
        graphs: those of its two forms that are graphs, reference first; at least one.
        ladder: runs them in other precisions.

    Returns:
        The rung, with what the judgement is based on. Forms in float64 stay as they were judged.
    """
    if is_low(ladder.dtype):
        return _in_lower_precision(rung, graphs, ladder)
    return _second_opinion(rung, graphs, ladder) if ladder.dtype is torch.float32 else rung


def _in_lower_precision(rung: Rung, graphs: tuple[Form, ...], ladder: Measured) -> Rung:
    """Judge forms in half precision, whose rounding no fixed tolerance fits.

    Two graphs are run in float32 with their weights as they are, and must agree as float32 models do. Where one
    form is no graph, or has weights that were computed and rounded anew (rescaled norms), what is allowed follows
    from the graph's own rounding, its precision against float32.
    """
    own = ladder.own_rounding(graphs[0], torch.float32)
    said = f"the graph's own {short_name(ladder.dtype)} rounding is {own:.1e}"
    rung = replace(rung, tolerance=ROUNDINGS * own, passed=rung.max_abs_error <= ROUNDINGS * own, detail=said)
    if len(graphs) < 2:
        return rung
    exact = ladder.exact_difference(graphs[0], graphs[1], torch.float32)
    agree = exact <= tolerance_for(torch.float32)
    rounded = rung.passed and exact <= ROUNDINGS * own
    return replace(rung, passed=agree or rounded, detail=f"max abs error in float32: {exact:.1e}; {said}")


def _second_opinion(rung: Rung, graphs: tuple[Form, ...], ladder: Measured) -> Rung:
    """Ask whether forms that differ in float32 differ by rounding alone.

    Two graphs are compared in float64. Where one form cannot run in float64 (another runtime, the original code),
    or has weights that were computed and rounded anew (rescaled norms), the graph's own rounding, float32 against
    float64, is what the difference is measured by.
    """
    said = ""
    if len(graphs) == 2:
        exact = ladder.exact_difference(graphs[0], graphs[1], torch.float64)
        said = f"max abs error in float64: {exact:.1e}"
        if exact <= DOUBLE_TOLERANCE:
            return replace(rung, passed=True, detail=f"float32 rounding alone; {said}")
        said += "; "
    own = ladder.own_rounding(graphs[0], torch.float64)
    said += f"the graph's own float32 rounding is {own:.1e}"
    return replace(rung, passed=rung.max_abs_error <= ROUNDINGS * own, detail=said)
