"""A function traced and walked with channel ids, for tests that state ids in and ids out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.call import Call
from fxprune.channels.walk import walk
from fxprune.core.channel_ids import ChannelLedger, ChannelMap
from fxprune.core.program import Interface

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.channels.rules.base import Ids
    from fxprune.core.channel_ids import IdArray

__all__ = ["B", "S", "Walked", "pairs", "values"]

B, S = 2, 3  # batch and sequence: the axes that may change


class Walked:
    """A function traced and walked: the ids of its inputs and of its result, and the ledger."""

    def __init__(
        self, function: Callable[..., Any], free: tuple[int, ...] | dict[str, Any] = (0, 1), **inputs: Tensor
    ) -> None:
        graph_module = torch.fx.symbolic_trace(function)
        axes = {name: dict.fromkeys(free[name] if isinstance(free, dict) else free, "free") for name in inputs}
        self.by_node: dict[str, Ids] = {}
        self.result: Ids = None
        self.ledger: ChannelLedger = walk(graph_module, Interface(inputs, axes, ("result",)), self._visit)
        self.map = ChannelMap(self.ledger)

    def _visit(self, call: Call, ids: Ids) -> None:
        if call.node.op != "output":
            self.by_node[call.node.name] = self.result = ids

    def of(self, node: str) -> Tensor:
        """Ids of one node."""
        ids = self.by_node[node]
        assert isinstance(ids, Tensor)
        return ids

    @property
    def out(self) -> Tensor:
        """Ids of the result."""
        assert isinstance(self.result, Tensor)
        return self.result

    def axis(self, parameter: str, axis: int) -> IdArray:
        """Ids of a parameter axis."""
        return self.ledger.axes[parameter, axis].ids()

    def classes(self, ids: Tensor | IdArray | list[int]) -> list[int]:
        """The class of each id."""
        found: list[int] = self.map.class_of[np.asarray(ids)].tolist()
        return found


def pairs(edges: list[tuple[Any, Any]]) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for first, second in edges for a, b in zip(first, second, strict=True)}


def values(*shape: int) -> Tensor:
    return torch.zeros(*shape)
