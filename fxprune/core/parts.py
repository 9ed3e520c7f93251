"""Parts: units that a layout holds in several rows of one length, each of which must keep equally many.

    (…, 288) ─ view ─ (…, 4, 72): heads 0 to 2 | 3 to 5 | 6 to 8 | 9 to 11         keep 2 of each, not 5 of the first 6
    8 experts ─ view ─ (…, 2, 4) ─ the best of each row, then the best rows        keep 3 of each

What stays of a tensor must be a tensor: where units stand in rows, all rows keep as many. The rows are found by channel
tracing, in every view that splits an axis and in every choice inside rows. Query heads of one KV head stand in a row
too; a KV head may go as a whole, so these are no parts (`Group.sharing` says it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.channel_ids import ChannelMap, IdArray

__all__ = ["balanced_order", "in_parts", "parts_of"]


def balanced_order(order: IdArray, parts: IdArray | None) -> IdArray:
    """An order of units in which the parts take turns: its first k * parts are the first k of each part.

    Args:
        order: (units,) all units, in the order in which they are wanted.
        parts: (parts, units of one), or None where there are none.
    """
    if parts is None:
        return order
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    rank = np.argsort(place[parts], axis=1)
    return np.take_along_axis(parts, rank, axis=1).T.reshape(-1)


def in_parts(units: Sequence[int] | IdArray, parts: IdArray) -> IdArray:
    """How many of some units each part has, (parts,)."""
    part_of = np.empty(parts.size, dtype=np.int64)
    part_of[parts] = np.arange(len(parts))[:, None]
    return np.bincount(part_of[np.asarray(units, dtype=np.int64)], minlength=len(parts))


def parts_of(
    channels: ChannelMap, candidates: Sequence[IdArray], sharing: Sequence[IdArray | None] | None = None
) -> list[IdArray | str | None]:
    """The parts of groups of units.

    Args:
        channels: the channel map.
        candidates: for each group the classes of its units, in unit order; no class is in two groups.
        sharing: for each group which set each unit shares, if any; a row that is one set is no part.

    Returns:
        For each group (parts, units of one) int64, each row in the layout's order; None where there are no parts; or
        why nothing can say which plans are legal.
    """
    group_of = np.full(channels.count, -1, dtype=np.int64)
    unit_of = np.zeros(channels.count, dtype=np.int64)
    for index, classes in enumerate(candidates):
        group_of[classes], unit_of[classes] = index, np.arange(len(classes))
    found: list[IdArray | str | None] = [None] * len(candidates)
    for rows in channels.rows:
        classes = channels.class_of[rows]
        owners = group_of[classes]
        for index in np.unique(owners[owners >= 0]):
            sets = None if sharing is None else sharing[index]
            parts = _partition(np.where(owners == index, unit_of[classes], -1), len(candidates[index]))
            if parts is None or (sets is not None and _same(parts, sets)):
                continue
            known = found[index]
            if isinstance(known, str):
                continue
            if sets is not None and not all(_whole(part, sets) for part in parts):
                found[index] = "a layout holds query heads of one KV head in several parts"
            elif known is None:
                found[index] = parts
            elif {frozenset(part) for part in known.tolist()} != {frozenset(part) for part in parts.tolist()}:
                found[index] = f"layouts hold them in {len(known)} parts and, across these, in {len(parts)}"
    return found


def _partition(units: IdArray, count: int) -> IdArray | None:
    """Rows of units, -1 for none, as parts: every unit in one row, several rows, in each as many, more than one."""
    row, column = np.nonzero(units >= 0)
    key = row * count + units[row, column]
    _, first = np.unique(key, return_index=True)
    key = key[np.sort(first)]
    if len(key) != count or len(np.unique(key % count)) != count:
        return None
    sizes = np.bincount(key // count, minlength=len(units))
    sizes = sizes[sizes > 0]
    if len(sizes) == 1 or sizes[0] == 1 or (sizes != sizes[0]).any():
        return None
    parts: IdArray = (key % count).reshape(len(sizes), -1)
    return parts


def _same(parts: IdArray, sharing: IdArray) -> bool:
    """Whether the parts are the sharing sets."""
    return len(parts) == int(sharing.max()) + 1 and all(len(np.unique(sharing[part])) == 1 for part in parts)


def _whole(part: IdArray, sharing: IdArray) -> bool:
    """Whether a part has all units of the sets it has any of."""
    return len(part) == int(np.isin(sharing, sharing[part]).sum())
