"""Gates of one group's units that make legal plans whatever their values are.

MLP channels, hidden channels and layers have a hard-concrete gate each. Query heads cannot: a plan is legal only when
every KV head that stays keeps as many of them. So the gate of a query head is the product of two:

    head (k, j) = kv[k] * slot[j]        k: KV head,  j: its place among the query heads of its KV head

With one query head for each KV head there is no slot, and with one KV head no kv gate. Which head of a KV head has
which slot is free: a warm start gives slot 0 to the best of each KV head, and so on.

Where a layout holds units in parts that must keep equally many (`fxprune.core.parts`), one gate stands for a unit of
each part in the same way: a warm start gives the first gate to the best of each part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fxprune.core.errors import PlanError, UsageError
from fxprune.learned.expected_size import OpenUnits, independent_units
from fxprune.learned.hard_concrete import HardConcrete, ranked_log_alpha

if TYPE_CHECKING:
    from fxprune.core.groups import AttentionGroup, Group

__all__ = ["GroupGates", "HeadGates", "HeadScheme", "UnitGates"]

HeadScheme = Literal["kv", "slots", "both"]


class GroupGates(nn.Module):
    """Gates of one group. Values are (units,) float32 tensors in the order of the group's units.

    Attributes:
        group: the group.
    """

    group: Group

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random values with gradients."""
        raise NotImplementedError

    def soft(self) -> Tensor:
        """Values at evaluation, with gradients."""
        raise NotImplementedError

    def deterministic(self) -> Tensor:
        """Soft values of as many units as are expected to be open, 0 for the others; legal, and never all 0."""
        raise NotImplementedError

    def open_units(self) -> OpenUnits:
        """Open probabilities, with gradients: what `ExpectedSize` takes."""
        raise NotImplementedError

    def start_from(self, scores: Tensor, count: float, spread: float = 4.0) -> None:
        """Set the gates so that they are ordered as the scores are and `count` units are expected to be open.

        Args:
            scores: (units,) finite; what removing a unit costs.
            count: more than 0, less than all.
            spread: see `fxprune.learned.hard_concrete.ranked_log_alpha`.

        Raises:
            UsageError: scores or count are impossible.
        """
        raise NotImplementedError


class UnitGates(GroupGates):
    """One gate a unit, or a unit of each part: MLP channels, hidden channels, layers.

    Args:
        group: the group.
        drop_rate: probability of each unit to be closed at the start.

    Attributes:
        order: (gates, parts) int64, the units of each gate, for a group with parts; else None.
    """

    order: Tensor | None

    def __init__(self, group: Group, drop_rate: float = 0.01, device: torch.device | None = None) -> None:
        super().__init__(group)
        parts = None if group.parts is None else torch.from_numpy(group.parts).to(device)
        self.register_buffer("order", None if parts is None else parts.t().contiguous())
        count = group.units if group.parts is None else group.parts.shape[1]
        self.gates = HardConcrete.closed_with((count,), drop_rate, device)

    def spread(self, values: Tensor) -> Tensor:
        """The value of each unit from those of the gates, (units,)."""
        if self.order is None:
            return values
        return values[:, None].expand(self.order.shape).reshape(-1)[torch.argsort(self.order.reshape(-1))]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `GroupGates`."""
        return self.spread(self.gates.sample(generator))

    def soft(self) -> Tensor:
        """See `GroupGates`."""
        return self.spread(self.gates.soft())

    def deterministic(self) -> Tensor:
        """See `GroupGates`; layers and hidden channels are 0 or 1.

        Half a layer cannot be folded into weights, nor can half a hidden channel into a table that is also the output
        projection.
        """
        of_one = 1 if self.order is None else self.order.shape[1]
        values = self.spread(self.gates.deterministic(-(-self.group.least // of_one)))
        return values if self.group.masked == "consumers" else (values > 0).to(values.dtype)

    def open_units(self) -> OpenUnits:
        """See `GroupGates`."""
        return independent_units(self.group, self.spread(self.gates.open_probability()))

    def start_from(self, scores: Tensor, count: float, spread: float = 4.0) -> None:
        """See `GroupGates`."""
        _require_scores(self.group, scores)
        if self.order is not None:
            scores = scores.detach().to(self.order.device)
            natural = torch.sort(self.order, dim=0).values
            rank = torch.argsort(scores[natural], dim=0, descending=True, stable=True)
            self.order.copy_(torch.gather(natural, 0, rank))
            scores, count = scores[self.order].sum(1), count / self.order.shape[1]
        self.gates.log_alpha.data.copy_(ranked_log_alpha(scores, count, spread))


class HeadGates(GroupGates):
    """Gates of an attention, see the module's docstring.

    Args:
        group: the attention; every KV head serves as many query heads.
        scheme: `both`, or `kv` or `slots` alone. Where the one asked for does not exist (one query head for each KV
            head, or one KV head), the other is taken.
        drop_rate: probability of each query head to be closed at the start.

    Attributes:
        kv: a gate for each KV head, or for one of each part; or None.
        slots: a gate for each place, or None.
        order: (KV heads, places) int64, the query head at each place; with parts (KV heads of one, places, parts).

    Raises:
        PlanError: the KV heads serve different numbers of query heads.
    """

    group: AttentionGroup
    order: Tensor

    def __init__(
        self,
        group: AttentionGroup,
        scheme: HeadScheme = "both",
        drop_rate: float = 0.01,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(group)
        members = [group.heads_of(kv) for kv in range(group.kv_heads)]
        if len(set(map(len, members))) > 1:
            raise PlanError(f"{group.name}: its KV heads serve different numbers of query heads; gates cannot be legal")
        order = torch.tensor(members, dtype=torch.int64, device=device)
        if group.kv_parts is not None:
            order = order[torch.from_numpy(group.kv_parts).to(device)].permute(1, 2, 0).contiguous()
        self.register_buffer("order", order)
        sets, places = self.shape
        wants_kv = places == 1 or (sets > 1 and scheme != "slots")
        wants_slots = places > 1 and (sets == 1 or scheme != "kv")
        rate = 1 - (1 - drop_rate) ** 0.5 if wants_kv and wants_slots else drop_rate
        self.kv = HardConcrete.closed_with((sets,), rate, device) if wants_kv else None
        self.slots = HardConcrete.closed_with((places,), rate, device) if wants_slots else None

    @property
    def shape(self) -> tuple[int, int]:
        """How many KV heads (of a part) and places have values of their own."""
        return self.order.shape[0], self.order.shape[1]

    def spread(self, kv: Tensor | None, slots: Tensor | None) -> Tensor:
        """The value of each query head from those of KV heads and places, (units,)."""
        sets, places = self.shape
        like = kv if kv is not None else slots
        assert like is not None
        kv = like.new_ones(sets) if kv is None else kv
        slots = like.new_ones(places) if slots is None else slots
        grid = kv[:, None] * slots[None, :]
        if self.order.dim() == 3:
            grid = grid[..., None].expand(self.order.shape)
        return grid.reshape(-1)[torch.argsort(self.order.reshape(-1))]

    def _parts(self) -> tuple[HardConcrete | None, HardConcrete | None]:
        return self.kv, self.slots

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """See `GroupGates`."""
        return self.spread(*(None if part is None else part.sample(generator) for part in self._parts()))

    def soft(self) -> Tensor:
        """See `GroupGates`."""
        return self.spread(*(None if part is None else part.soft() for part in self._parts()))

    def deterministic(self) -> Tensor:
        """See `GroupGates`."""
        return self.spread(*(None if part is None else part.deterministic() for part in self._parts()))

    def open_units(self) -> OpenUnits:
        """See `GroupGates`: a KV head stays when its own gate and that of any place is open."""
        kv, slots = (None if part is None else part.open_probability() for part in self._parts())
        units = self.spread(kv, slots)
        if self.group.sharing is None:
            return OpenUnits(units)
        anywhere = units.new_ones(()) if slots is None else 1 - (1 - slots).prod()
        sets = anywhere.expand(self.order.shape[0]) if kv is None else kv * anywhere
        if self.group.kv_parts is not None:
            first = self.order[:, 0]  # (KV heads of one, parts): which KV heads have the gate
            assert self.group.sharing is not None
            named = torch.from_numpy(self.group.sharing).to(sets.device)[first]
            sets = sets[:, None].expand(named.shape).reshape(-1)[torch.argsort(named.reshape(-1))]
        return OpenUnits(units, sets)

    def start_from(self, scores: Tensor, count: float, spread: float = 4.0) -> None:
        """See `GroupGates`; heads take their places by score, the best of each KV head first."""
        _require_scores(self.group, scores)
        scores = scores.detach().to(self.order.device)
        natural = torch.sort(self.order, dim=1).values
        rank = torch.argsort(scores[natural], dim=1, descending=True, stable=True)
        order = torch.gather(natural, 1, rank)
        grid = scores[order]
        if order.dim() == 3:  # the best KV heads of each part have the first gate, and so on
            best = torch.argsort(grid.sum(1), dim=0, descending=True, stable=True)
            order = torch.gather(order, 0, best[:, None].expand(order.shape))
            grid, count = scores[order].sum(2), count / order.shape[2]
        self.order.copy_(order)
        sets, places = grid.shape
        share = count / (sets * places)
        each = share**0.5 if self.kv is not None and self.slots is not None else share
        for part, worth in ((self.kv, grid.sum(1)), (self.slots, grid.sum(0))):
            if part is not None:
                part.log_alpha.data.copy_(ranked_log_alpha(worth, each * worth.numel(), spread))


def _require_scores(group: Group, scores: Tensor) -> None:
    if tuple(scores.shape) != (group.units,):
        raise UsageError(f"{group.name}: scores of {group.units} {group.unit}s are needed, got {tuple(scores.shape)}")
