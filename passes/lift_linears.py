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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxprune.core.errors import PostconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.tracing.found_masks import masks_of_zeros
from fxprune.tracing.graphs import copy_graph_module, erase_dead
from fxprune.tracing.lifted import Origin, make_grouped, make_linear
from fxprune.tracing.weight_masks import masks_of_projections

if TYPE_CHECKING:
    from fxprune.core.program import Program

__all__ = ["LiftLinears", "lift_graph"]

_LOGGER = logging.getLogger(__name__)
aten = torch.ops.aten
_TRANSPOSE = {aten.t.default, aten.numpy_T.default}


@dataclass(frozen=True)
class _Projection:
    """What a projection node computes: `x @ weight.T + bias`, for each expert's rows where there are offsets."""

    x: Node
    weight: str
    transposed: bool  # the parameter is stored (in, out)
    bias: str | None
    offsets: Node | None = None
    op: Any = None

    @property
    def dimensions(self) -> int:
        """How many axes the weight must have."""
        return 2 if self.offsets is None else 3

    @property
    def origin(self) -> Origin:
        """What the module stands for; a bias that is added later stands beside the weight."""
        added = f"{self.weight.removesuffix('weight')}bias" if self.weight.endswith("weight") else f"{self.weight}_bias"
        return Origin(self.weight, self.bias or added, self.transposed)


def _parameter(node: Any) -> str | None:
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def _uncast(node: Any) -> Any:
    """The node behind casts to the dtype that it already has."""
    while isinstance(node, Node) and node.target is aten.to.dtype and len(node.args) > 1:
        source = node.args[0]
        if not isinstance(source, Node) or "val" not in source.meta or source.meta["val"].dtype is not node.args[1]:
            break
        node = source
    return node


def _weight(node: Any, axes: int = 2) -> tuple[str, bool] | None:
    """The parameter of so many axes behind a weight operand, and whether its last two are seen swapped."""
    node = _uncast(node)
    if (name := _parameter(node)) is not None:
        return name, False
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    last = {axes - 2, axes - 1}
    swaps = axes == 2 and node.target in _TRANSPOSE
    swaps |= node.target is aten.transpose.int and {axis % axes for axis in node.args[1:3]} == last  # type: ignore[operator]
    swaps |= axes == 2 and node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    name = _parameter(_uncast(node.args[0])) if swaps else None
    return None if name is None else (name, True)


def _added_bias(product: Node) -> Any:
    """The parameter that is added to a product and to nothing else."""
    users = list(product.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
        return None
    bias = next((operand for operand in users[0].args if operand is not product), None)
    value = bias.meta.get("val") if isinstance(bias, Node) and bias.op == "get_attr" else None
    same = isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(product.meta["val"].shape[-1:])
    return bias if same else None


def _match(node: Node) -> _Projection | None:
    """See a node as a projection, or None with refusal 1 or 2."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        x, w, *rest = node.args
        weight, bias = _weight(w), (rest[0] if rest else node.kwargs.get("bias"))
        turned = False
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, w = node.args
        weight, turned = _weight(w), True
    elif node.target in {aten.matmul.default, aten.mm.default}:
        x, w = node.args
        weight, bias, turned = _weight(w), _added_bias(node), True
    elif node.target in grouped_products() and len(node.args) == 3:
        x, w, offsets = node.args
        weight = _weight(w, axes=3)
        if weight is None or not isinstance(x, Node) or not isinstance(offsets, Node):
            return None
        return _Projection(x, weight[0], not weight[1], None, offsets, node.target)
    else:
        return None
    name = None if bias is None else _parameter(bias)
    if weight is None or not isinstance(x, Node) or (bias is not None and name is None):
        return None
    return _Projection(x, weight[0], turned != weight[1], name)


def grouped_products() -> set[Any]:
    """The operators that multiply each expert's rows by its weight; transformers registers one of them itself."""
    found = {aten._grouped_mm.default}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found.add(torch.ops.transformers.grouped_mm_fallback.default)
    return found


def _module_name(root: nn.Module, match: _Projection) -> str:
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


def _install(lifted: GraphModule, match: _Projection, weight: Any, bias: Any) -> str:
    name = _module_name(lifted, match)
    owner, _, leaf = name.rpartition(".")
    if isinstance(getattr(lifted.get_submodule(owner), leaf, None), nn.Linear):  # one weight, two biases
        name = f"{name}_{match.bias.replace('.', '_') if match.bias else 'plain'}"
    if match.offsets is not None:
        lifted.add_submodule(name, make_grouped(weight, transposed=match.transposed, op=match.op, origin=match.origin))
    else:
        lifted.add_submodule(name, make_linear(weight.t() if match.transposed else weight, bias, match.origin))
    return name


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
            removed = sum(mask.numel() - int(mask.sum()) for mask in zeros.values())
            details["zeros_without_masks"] = {"linears": list(zeros), "weights": removed}
            _LOGGER.warning(
                "%d weights in %d Linears (%s first) are zero and no mask holds them: later passes may fill them; "
                "hold_zeros (--hold-zeros) keeps them as they are",
                removed,
                len(zeros),
                next(iter(zeros)),
            )
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
