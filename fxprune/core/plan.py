"""Plans: which units of each group stay, and which plans are legal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.core.errors import PlanError
from fxprune.core.groups import AttentionGroup, ExpertMlpGroup
from fxprune.core.parts import in_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.core.groups import Group

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The kept units of each group, ascending. A group that is not named keeps everything."""

    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, kept: Mapping[str, Sequence[int]]) -> Plan:
        """Build a plan from any sequences of unit indices."""
        return cls({name: tuple(sorted(int(unit) for unit in units)) for name, units in kept.items()})

    def kept_units(self, group: Group) -> tuple[int, ...]:
        """The kept units of a group."""
        return self.kept.get(group.name, tuple(range(group.units)))

    def removed_units(self, group: Group) -> list[int]:
        """The removed units of a group."""
        return sorted(set(range(group.units)) - set(self.kept_units(group)))

    def validate(self, groups: Sequence[Group]) -> None:
        """Check that the plan is legal for these groups.

        Raises:
            PlanError: a group is unknown, a unit does not exist or is named twice, a group would be empty, or the
                kept KV heads of an attention would have different numbers of query heads, the experts of a mixture
                different numbers of channels, or the parts of a layout different numbers of units.
        """
        known = {group.name: group for group in groups}
        for name, units in self.kept.items():
            if name not in known:
                raise PlanError(f"the plan names group {name!r}, which does not exist; groups: {sorted(known)}")
            group = known[name]
            wrong = [unit for unit in units if not 0 <= unit < group.units]
            if wrong:
                raise PlanError(f"{name}: {group.unit} {wrong[0]} does not exist; it has {group.units}")
            if len(set(units)) != len(units):
                raise PlanError(f"{name}: the plan names a {group.unit} twice")
            if not units and group.least:
                raise PlanError(f"{name}: no {group.unit} would be left; keep at least one")
            if len(units) < group.least:
                raise PlanError(f"{name}: {len(units)} {group.unit}s would be left; it needs at least {group.least}")
            if isinstance(group, AttentionGroup) and group.sharing is not None:
                per_head = Counter(int(kv) for kv in group.sharing[np.asarray(units)])
                if len(set(per_head.values())) > 1:
                    raise PlanError(
                        f"{name}: kept KV heads would have different numbers of query heads "
                        f"({dict(sorted(per_head.items()))}); keep the same number in every kept KV head"
                    )
            if group.parts is not None:
                counts = in_parts(units, group.parts)
                if len(set(counts.tolist())) > 1:
                    raise PlanError(
                        f"{name}: its layout holds the {group.unit}s in {len(group.parts)} parts, of which the plan "
                        f"keeps {', '.join(map(str, counts.tolist()))}; keep the same number in every part"
                    )
            if group.multiple > 1 or isinstance(group, ExpertMlpGroup):
                _check_multiple(group, units)

    def is_uniform(self, groups: Sequence[Group]) -> bool:
        """Whether all groups of one kind keep the same number of units."""
        widths: dict[str, set[int]] = {}
        for group in groups:
            widths.setdefault(group.kind, set()).add(len(self.kept_units(group)))
        return all(len(found) == 1 for found in widths.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {"kept": {name: list(units) for name, units in self.kept.items()}}


def _check_multiple(group: Group, units: Sequence[int]) -> None:
    """Every expert keeps the same number of channels, and a number that grouped products can work with."""
    parts = group.experts if isinstance(group, ExpertMlpGroup) else 1
    counts = np.bincount(np.asarray(units) // (group.units // parts), minlength=parts)
    if len(set(counts.tolist())) > 1:
        raise PlanError(
            f"{group.name}: the experts would have different numbers of channels ({counts.min()} to {counts.max()}); "
            "keep the same number in every expert"
        )
    if counts[0] % group.multiple and counts[0] < group.units // parts:
        raise PlanError(
            f"{group.name}: keeping {counts[0]} {group.unit}s is not a multiple of {group.multiple}, which grouped "
            "matrix products need"
        )
