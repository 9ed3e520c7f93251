"""What the locate passes share: the channel map of a program and the sizes behind its parameter axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.channels import trace_channels
from fxprune.errors import PreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fxprune.groups import Group
    from fxprune.program import Program

__all__ = ["elements_per_index", "require_lifted", "unique_name", "with_channels"]


def require_lifted(program: Program, name: str) -> None:
    """Raise `PreconditionError` when the program's projections have not been lifted."""
    if not any(event.name == "lift_linears" for event in program.history):
        raise PreconditionError(f"{name} works on Linear modules: run lift_linears first")


def with_channels(program: Program) -> Program:
    """Return the program with its channel map, tracing channels if no pass did so before."""
    if program.channels is not None:
        return program
    return program.replace(channels=trace_channels(program.graph_module, program.interface))


def elements_per_index(program: Program) -> dict[str, dict[int, int]]:
    """For each parameter and axis, how many elements stand behind one index."""
    return {
        name: {axis: tensor.numel() // max(1, size) for axis, size in enumerate(tensor.shape)}
        for name, tensor in program.graph_module.state_dict(keep_vars=True).items()
    }


def unique_name(owner: str, kind: str, groups: Iterable[Group]) -> str:
    """A name for a group that none of `groups` has: its owner's, with the kind and a number where one is not enough."""
    taken = {group.name for group in groups}
    name, number = owner or "model", 1
    while name in taken:
        name = f"{owner or 'model'}:{kind}" + (f":{number}" if number > 1 else "")
        number += 1
    return name
