"""Which Linears are trained: those whose names match patterns, and whose weight nothing else reads."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fxprune.channels.block_linears import lm_heads
from fxprune.core.errors import UsageError
from fxprune.tracing.lifted_graphs import linear_calls
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

    from fxprune.core.program import Program

__all__ = ["lora_targets"]


def lora_targets(program: Program, patterns: Sequence[str]) -> list[str]:
    """Qualified names of the Linears that get LoRA.

    Args:
        program: a lifted program.
        patterns: each the end of a qualified name (`q_proj`, `mlp.down_proj`) or a shell-style pattern; `all` is every
            Linear but the output projection and those that share their weight.

    Raises:
        UsageError: a pattern matches no Linear (the message says what there is), or one whose weight something else
            reads too, such as a tied embedding: merged LoRA would change that as well, or untie the two.
    """
    module = program.graph_module
    heads = lm_heads(module, outputs=program.interface.outputs)
    linears = list(linear_calls(module))
    tied = _tied(module, linears)
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [
            name
            for name in linears
            if (pattern == "all" and name not in heads and name not in tied)
            or name == pattern
            or name.endswith(f".{pattern}")
            or fnmatchcase(name, pattern)
        ]
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            raise UsageError(
                f"LoRA target {pattern!r} matches no Linear; there are {', '.join(ends) or 'none'}, or all"
            )
        if shared := [name for name in matched if name in tied]:
            raise UsageError(
                f"LoRA target {pattern!r} matches {shared[0]}, whose weight {tied[shared[0]]} reads too and merging "
                "would change or untie: name other Linears, or all"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _tied(module: GraphModule, linears: Sequence[str]) -> dict[str, str]:
    """Linears whose weight is read elsewhere too, and where."""
    readers: dict[int, list[str]] = {}
    for name in linears:
        readers.setdefault(id(get_attribute(module, name).weight), []).append(name)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            users = [str(user) for user in node.users]
            readers.setdefault(id(get_attribute(module, str(node.target))), []).extend(users)
    return {
        name: next(other for other in sharing if other != name)
        for sharing in readers.values()
        if len(sharing) > 1
        for name in sharing
        if name in linears
    }
