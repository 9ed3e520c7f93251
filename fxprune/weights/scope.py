"""Scope: which projections a weight-pruning pass prunes, and how far each.

Patterns are shell-style over qualified names: `*.k_proj`, `model.layers.0.*`, or a whole name. The output projection
and the routers of experts are left out unless a pattern asks for them by name: they are small, and every token's fate
hangs on them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from fxprune.channels.block_linears import lm_heads
from fxprune.core.errors import PlanError, UsageError
from fxprune.core.groups import ExpertGroup
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import is_projection, origin_of
from fxprune.tracing.nodes import get_attribute, module_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import GraphModule

    from fxprune.core.program import Program
    from fxprune.weights.sparsity import Sparsity

__all__ = ["called_projections", "in_features", "routers", "targets_of"]


def called_projections(graph_module: GraphModule) -> list[str]:
    """Qualified names of the projections that a graph calls, in graph order."""
    called = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return [name for name in dict.fromkeys(called) if is_projection(get_attribute(graph_module, name))]


def in_features(module: nn.Module) -> int:
    """How many inputs a projection reads."""
    assert isinstance(module, (nn.Linear, GroupedLinear))
    return module.in_features


def routers(program: Program) -> set[str]:
    """Linears that choose among experts, by the groups that were located."""
    parameters = {
        piece.parameter for group in program.groups if isinstance(group, ExpertGroup) for piece in group.slices
    }
    return {
        name
        for name in called_projections(program.graph_module)
        if isinstance(module := get_attribute(program.graph_module, name), nn.Linear)
        and not parameters.isdisjoint({f"{name}.weight", getattr(origin_of(module), "weight", "")})
    }


def targets_of(
    program: Program,
    sparsity: Sparsity,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    per_module: Mapping[str, Sparsity | None] | None = None,
    exclude_lm_head: bool = True,
) -> dict[str, Sparsity]:
    """The projections to prune, with how much of each goes.

    Args:
        program: a lifted program.
        sparsity: of what `per_module` does not name.
        include: patterns; only what matches one is pruned. Empty: every projection but routers.
        exclude: patterns; what matches one stays dense.
        per_module: pattern to sparsity, None for dense; the first that matches counts.
        exclude_lm_head: whether the output projection stays dense; what `include` or `per_module` names by its whole
            name is pruned all the same.

    Raises:
        UsageError: a pattern matches no projection.
        PlanError: nothing is left to prune; a weight is shared with something else; a pattern's M does not divide the
            inputs of a projection (the message names it).
    """
    graph_module = program.graph_module
    names = called_projections(graph_module)
    per_module = per_module or {}
    for pattern in (*include, *exclude, *per_module):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} matches none of the {len(names)} projections, such as {names[:2]}"
            )
    asked = {*include, *per_module}
    left_out = routers(program)
    if exclude_lm_head:
        left_out |= set(lm_heads(graph_module, outputs=program.interface.outputs))
    chosen: dict[str, Sparsity] = {}
    for name in names:
        if (include and not _matches(name, include)) or _matches(name, exclude) or (name in left_out - asked):
            continue
        own = next((value for pattern, value in per_module.items() if fnmatchcase(name, pattern)), sparsity)
        if own is not None and own.share > 0:
            own.check(in_features(get_attribute(graph_module, name)), name)
            chosen[name] = own
    if not chosen:
        raise PlanError("no projection is left to prune: the patterns exclude them all, or the sparsity is 0")
    _refuse_shared(graph_module, chosen)
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_shared(graph_module: GraphModule, chosen: Mapping[str, Sparsity]) -> None:
    """A weight that something else reads too cannot be pruned for one reader."""
    users: dict[int, list[str]] = {}
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        users.setdefault(parameter.data_ptr() if not parameter.is_meta else id(parameter), []).append(name)
    readers: dict[str, list[str]] = {}  # of parameters that the graph reads without calling their module
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(module_of(user) or user.name for user in node.users)
    for names in users.values():
        owners = {name.rpartition(".")[0] for name in names}
        pruned = sorted(owners & set(chosen))
        others = [*sorted(owners - set(pruned[:1])), *(reader for name in names for reader in readers.get(name, ()))]
        if pruned and others:
            raise PlanError(
                f"{pruned[0]} shares its weight with {others[0]}: pruning one would prune the other; leave it out, or "
                "untie them first"
            )
