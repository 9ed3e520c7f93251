"""Lifting: every projection becomes a call of a real `nn.Linear` under its original qualified name.

Before, as torch.export writes them, and after:

    aten.linear(x, W, b)                          call_module[model.layers.0.mlp.up_proj](x)
    aten.addmm(b, x, W)           (Conv1D)        call_module[transformer.h.0.mlp.c_fc](x)
    aten.matmul(x, aten.t(W))     (mm, numpy_T)   call_module[...](x)             and with aten.add(..., b) behind it
    aten._grouped_mm(x, W, ends)  (experts)       call_module[...](x, ends)       a GroupedLinear

Parameters are shared with the traced graph, not copied; a transposed weight becomes a transposed view. Each module
remembers which parameters it stands for (`fxprune.tracing.lifted.Origin`).

Masks of pruned weights that the checkpoint has (`fxprune.tracing.weight_masks`) become the Linears' own.

Refused, and left as it is:
 1. a weight that is not read straight from a parameter (computed weights);
 2. a bias that is not a parameter, or is not one-dimensional;
 3. a weight that is not two-dimensional (three-dimensional for experts).
"""

from __future__ import annotations

import logging
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.core.errors import PostconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.tracing.found_masks import masks_of_zeros
from fxprune.tracing.graphs import copy_graph_module, erase_dead
from fxprune.tracing.lifted import make_grouped, make_linear
from fxprune.tracing.other_projections import OTHER_PRODUCTS, match_other
from fxprune.tracing.projections import Projection, grouped_products, projection_of, weight_behind
from fxprune.tracing.weight_masks import masks_of_projections

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import GraphModule, Node

    from fxprune.core.program import Program

__all__ = ["LiftLinears", "lift_graph"]

_LOGGER = logging.getLogger(__name__)
aten = torch.ops.aten


def _match(node: Node) -> Projection | None:
    """See a node as a projection, or None with refusal 1 or 2."""
    if node.op != "call_function":
        return None
    if node.target is not aten.linear.default:
        other = node.target in OTHER_PRODUCTS or node.target in grouped_products()
        return match_other(node) if other else None
    x, w, *rest = node.args
    weight, bias = weight_behind(w), (rest[0] if rest else node.kwargs.get("bias"))
    return projection_of(x, weight, bias, turned=False)


def _module_name(root: nn.Module, match: Projection) -> str:
    """Where the Linear goes: the module that holds exactly its parameters, or a name beside the weight."""
    owner, _, leaf = match.weight.rpartition(".")
    if match.bias is not None and match.bias != f"{owner}.bias":
        # A weight that modules share has one name after export: the bias tells which of them this is.
        owner, _, leaf = match.bias.rpartition(".")
        leaf = leaf.replace("bias", "weight")
    module = root.get_submodule(owner)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    others = {f"{owner}.{name}" for name, _ in own} - {match.weight, match.bias}
    if leaf == "weight" and owner and not others and not list(module.children()):
        return owner
    return f"{match.weight}_linear"


def lift_graph(graph_module: GraphModule) -> tuple[GraphModule, list[str]]:
    """Lift every projection of a graph.

    Args:
        graph_module: a graph of aten operators; it is left as it is.

    Returns:
        A new graph module that shares the parameters, and the names of the Linears it calls, in graph order.
    """
    lifted = copy_graph_module(graph_module)
    graph = lifted.graph
    made: dict[tuple[str, str | None], str] = {}
    names: list[str] = []
    for node in list(graph.nodes):
        match = _match(node)
        if match is None:
            continue
        weight = operator.attrgetter(match.weight)(graph_module)
        bias = None if match.bias is None else operator.attrgetter(match.bias)(graph_module)
        if weight.dim() != match.dimensions or (bias is not None and bias.dim() != 1):
            continue
        key = (match.weight, match.bias)
        if key not in made:
            made[key] = _install(lifted, match, weight, bias)
        with graph.inserting_before(node):
            args = (match.x,) if match.offsets is None else (match.x, match.offsets)
            call = graph.call_module(made[key], args)
        call.meta = dict(node.meta)
        if match.bias is not None and node.target in {aten.matmul.default, aten.mm.default}:
            (addition,) = node.users
            addition.replace_all_uses_with(call)
            graph.erase_node(addition)
        else:
            node.replace_all_uses_with(call)
        graph.erase_node(node)
        names.append(made[key])
    erase_dead(graph)
    # A module of its own again: what only the replaced nodes read is left behind.
    return copy_graph_module(lifted), list(dict.fromkeys(names))


def _install(lifted: GraphModule, match: Projection, weight: Any, bias: Any) -> str:
    name = _module_name(lifted, match)
    owner, _, leaf = name.rpartition(".")
    if isinstance(getattr(lifted.get_submodule(owner), leaf, None), nn.Linear):  # one weight, two biases
        name = f"{name}_{match.bias.replace('.', '_') if match.bias else 'plain'}"
    if match.offsets is not None:
        lifted.add_submodule(name, make_grouped(weight, transposed=match.transposed, op=match.op, origin=match.origin))
    else:
        lifted.add_submodule(name, make_linear(weight.t() if match.transposed else weight, bias, match.origin))
    return name


def _warn_of_zeros(zeros: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Say where zeros are that nothing holds."""
    removed = sum(mask.numel() - int(mask.sum()) for mask in zeros.values())
    _LOGGER.warning(
        "%d weights in %d Linears (%s first) are zero and no mask holds them: later passes may fill them; "
        "hold_zeros (--option hold_zeros=true) keeps them as they are",
        removed,
        len(zeros),
        next(iter(zeros)),
    )
    return {"linears": list(zeros), "weights": removed}


class LiftLinears(Pass):
    """Turn every projection into a call of an `nn.Linear` (see the module's docstring for the graph).

    Args:
        hold_zeros: whether zeros without a mask are held too, where they are a tenth of a weight or more: those of a
            model that another tool has pruned, which keeps no masks. Without it a warning says where they are.
    """

    name = "lift_linears"

    def __init__(self, *, hold_zeros: bool = False) -> None:
        self.hold_zeros = hold_zeros

    def call(self, program: Program) -> PassResult:
        """Lift; a graph without projections to lift is returned as it is."""
        lifted, names = lift_graph(program.graph_module)
        if not names:
            return PassResult(program, modified=False, details={"linears": 0})
        details: dict[str, Any] = {"linears": len(names)}
        masks = dict(program.weight_masks)
        if program.source is not None and program.source.weight_masks:
            found, others = masks_of_projections(lifted, program.source.weight_masks)
            masks |= found
            program = program.replace(source=replace(program.source, weight_masks=others))
        zeros = masks_of_zeros(lifted, masks)
        if zeros and self.hold_zeros:
            masks |= zeros
        elif zeros:
            details["zeros_without_masks"] = _warn_of_zeros(zeros)
        if masks:
            details["masked_linears"] = len(masks)
        program = program.with_reference("traced", program.graph_module)
        program = program.replace(graph_module=lifted, channels=None, groups=(), weight_masks=masks)
        return PassResult(program.with_reference("lifted", lifted), modified=True, details=details)

    def ensures(self, before: Program, after: Program) -> None:
        """No projection that could be lifted is left.

        Raises:
            PostconditionError: one is left.
        """
        del before
        left = [
            node.name
            for node in after.graph_module.graph.nodes
            if (match := _match(node)) is not None
            and operator.attrgetter(match.weight)(after.graph_module).dim() == match.dimensions  # refusal 3
        ]
        if left:
            raise PostconditionError(f"lift_linears left {left[0]} ({len(left)} in all) unlifted")
