"""Relations between channel ids: what follows when ids meet in a sum, a Linear, a product or a reduction.

A rule of `fxprune.channels.rules.base` calls these with the ids of its operands; they return the ids of the result and
write what they learn to the ledger. `None` stands for a tensor of zeros, that is, for no channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fxprune.core.channel_ids import AttentionSite, IdArray, NormSite, Pin

if TYPE_CHECKING:
    from fxprune.channels.call import Call

__all__ = [
    "axis_ids",
    "combine",
    "contract",
    "distinct_rows",
    "keep_addresses",
    "meet_columns",
    "pin",
    "reduce_last",
    "steady",
]


def steady(ids: Tensor, axis: int) -> bool:
    """Whether ids do not vary along an axis: it is one of positions, not of channels."""
    return bool((ids == ids.narrow(axis, 0, 1)).all())


def pin(call: Call, reason: str = "no rule for this operator") -> list[Tensor | None] | None:
    """Keep all channels that an operator touches, and all parameters that it reads directly.

    Returns:
        Ids of its result: none.
    """
    touched = [call.ids_of(node) for node in call.tensor_nodes()]
    ids = [np.unique(t[t > 0].numpy()) for t in touched if t is not None]
    for node, carried in zip(call.tensor_nodes(), touched, strict=True):
        weight = call.parameter_of(node) if carried is None else None
        if weight is not None and call.value_of(node).is_floating_point():
            ids += [call.ledger.axis(weight.name, axis, size).ids() for axis, size in enumerate(weight.shape)]
    ids = [found for found in ids if len(found)]
    if ids:
        call.ledger.pins.append(Pin(np.concatenate(ids), call.op, call.module, reason))
    return [None] * len(call.output) if isinstance(call.output, (tuple, list)) else None


def keep_addresses(call: Call) -> None:
    """Numbers that are moved or cast still name the same channels."""
    nodes = call.tensor_nodes()
    known = call.addresses(nodes[0]) if nodes else None
    if known is not None and isinstance(call.output, Tensor):
        call.set_addresses(known)


def _once(*several: Tensor) -> list[Tensor]:
    """Views of tensors of one shape with a single copy of what all of them repeat along an axis by a stride of 0."""
    views = list(several)
    for axis, size in enumerate(several[0].shape):
        if size > 1 and not any(tensor.stride(axis) for tensor in several):
            views = [view.narrow(axis, 0, 1) for view in views]
    return views


def _counts(keys: IdArray) -> IdArray:
    """For each element, how often its value occurs."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse]


def combine(call: Call, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Ids of an elementwise result, and the relations that follow.

    Where only one operand carries a channel, the result carries it. Where both do, a pair that meets nobody else is
    merged; if b meets many a, b is shared (each a needs b) and the result carries a; if both meet many, the result is
    a new channel that needs both. What is added to scores is shared too: other layers may add the same position bias.
    """
    if a is None or b is None or a is b:
        return a if b is None else b
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    shape = a.shape
    a, b = _once(a, b)
    result = torch.where(a > 0, a, b)
    both = (a > 0) & (b > 0) & (a != b)
    if not both.any():
        return result.expand(shape)
    ledger = call.ledger
    scale = ledger.next_id
    keys, inverse = np.unique(a[both].numpy() * scale + b[both].numpy(), return_inverse=True)
    ua, ub = keys // scale, keys % scale
    many_b, many_a = _counts(ua) > 1, _counts(ub) > 1  # this a meets many b; this b meets many a
    score_a, score_b = ledger.is_score(ua), ledger.is_score(ub)
    merged = ~many_a & ~many_b & (score_a == score_b)
    shared_b = (many_a & ~many_b) | (~many_a & ~many_b & score_a & ~score_b)
    shared_a = (~many_a & many_b) | (~many_a & ~many_b & score_b & ~score_a)
    tangled = many_a & many_b
    choice = ua.copy()
    ledger.merge(ua[merged], ub[merged])
    ledger.need(ua[shared_b], ub[shared_b])
    ledger.need(ub[shared_a], ua[shared_a])
    choice[shared_a] = ub[shared_a]
    if tangled.any():
        new = ledger.fresh(int(tangled.sum()))
        ledger.need(new, ua[tangled])
        ledger.need(new, ub[tangled])
        choice[tangled] = new
    result[both] = torch.from_numpy(choice[inverse])
    return result.expand(shape)


def distinct_rows(ids: Tensor) -> tuple[IdArray, Tensor]:
    """Distinct rows along the last axis, in the order they come in, and for each leading position which row it has."""
    (single,) = _once(ids)
    flat = single.expand(*single.shape[:-1], ids.shape[-1]).reshape(-1, ids.shape[-1])
    if len(flat) and bool((flat == flat[:1]).all()):
        return flat[:1].numpy(), torch.zeros((), dtype=torch.int64).expand(ids.shape[:-1])
    every = np.ascontiguousarray(flat.numpy())
    # Rows are compared by a random sum, which sorts much faster than the rows themselves; the result is checked.
    factors = np.random.default_rng(0).integers(1, 2**63, size=every.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        sums = every.view(np.uint64) @ factors
    _, first, inverse = np.unique(sums, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    rows, inverse = every[np.sort(first)], rank[inverse.reshape(-1)]
    if not np.array_equal(rows[inverse], every):
        rows, inverse = np.unique(every, axis=0, return_inverse=True)
    return rows, torch.from_numpy(inverse).reshape(single.shape[:-1]).expand(ids.shape[:-1])


def reduce_last(call: Call, ids: Tensor | None, *, merge: bool, norm: str | None = None) -> Tensor | None:
    """Ids after the last axis was reduced away.

    A row that carries one channel throughout keeps it. A row of several becomes a new channel, which stays as long as
    one of them does (`merge=False`) or is one block with all of them (`merge=True`).

    Args:
        call: the operator call.
        ids: (..., n).
        merge: whether the reduced channels form one block.
        norm: record the reduction as a norm of this kind.

    Returns:
        (...,).
    """
    if ids is None:
        return None
    ledger = call.ledger
    rows, which = distinct_rows(ids)
    row_of, member = np.nonzero(rows)[0], rows[rows > 0]
    scale = ledger.next_id
    keys = np.unique(row_of * scale + member)
    row_of, member = keys // scale, keys % scale
    sizes = np.bincount(row_of, minlength=len(rows))
    out = np.zeros(len(rows), dtype=np.int64)
    single = sizes[row_of] == 1
    out[row_of[single]] = member[single]
    out[sizes > 1] = ledger.fresh(int((sizes > 1).sum()))
    row_of, member = row_of[~single], member[~single]
    (ledger.merge if merge else ledger.need)(member, out[row_of])
    if norm is not None:
        for members in np.split(member, np.flatnonzero(np.diff(row_of)) + 1) if len(member) else ():
            ledger.norms.append(NormSite(call.node.name, call.module, norm, members, rows.shape[1]))
    return torch.from_numpy(out)[_once(which)[0]].expand(ids.shape[:-1])


def meet_columns(call: Call, ids: Tensor | None, columns: IdArray) -> None:
    """Relate what comes into a Linear to its weight's columns.

    A column that sees one channel is merged with it; a column that sees several (weights shared by heads) is needed
    by each. A column that sees an element without a channel must stay.
    """
    ledger = call.ledger
    if ids is None:
        ledger.pins.append(Pin(columns, call.op, call.module, "reads values that carry no traced channels"))
        return
    rows, _ = distinct_rows(ids)
    ledger.consumed.append(np.unique(rows[rows > 0]))
    if len(rows) == 1:
        x, c = rows[0], columns
        ledger.merge(x[x > 0], c[x > 0])
        bare = c[x == 0]
    else:
        pairs = np.unique(np.stack([rows.ravel(), np.tile(columns, len(rows))], 1), axis=0)
        bare = pairs[pairs[:, 0] == 0, 1]
        pairs = pairs[pairs[:, 0] > 0]
        shared = _counts(pairs[:, 1]) > 1
        ledger.merge(pairs[~shared, 0], pairs[~shared, 1])
        ledger.need(pairs[shared, 0], pairs[shared, 1])
    if len(bare):
        ledger.pins.append(Pin(bare, call.op, call.module, "reads values that carry no traced channels"))


def contract(call: Call, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Ids of a matrix product of activations, (..., m, k) by (..., k, n).

    Where channels run along k on both sides, each side's row becomes one block (a head's query channels, its key
    channels), and the blocks meet in the product, which is marked as scores. Where scores meet values, each head's
    outputs join the head's block.
    """
    if a is None and b is None:
        return None
    varies_a = a is not None and bool((a != a[..., :1]).any())
    varies_b = b is not None and bool((b != b[..., :1, :]).any())
    scores = varies_a and varies_b
    ra = reduce_last(call, a, merge=scores, norm=None if scores or not varies_a else "matmul")
    rb = reduce_last(call, b.transpose(-1, -2) if b is not None else None, merge=scores)
    left = None if ra is None else ra.unsqueeze(-1)
    right = None if rb is None else rb.unsqueeze(-2)
    out = combine(call, left, right)
    if out is not None and left is not None and right is not None:
        out = out.expand(np.broadcast_shapes(left.shape, right.shape))
    ledger = call.ledger
    if scores and out is not None:
        ledger.scores.append(np.unique(out[out > 0].numpy()))
    elif out is not None:
        _join_scores(call, left, right, out)
    return out


def _join_scores(call: Call, left: Tensor | None, right: Tensor | None, out: Tensor) -> None:
    """Merge head outputs with the scores they came from, and note the attention."""
    for side, axis in ((left, -2), (right, -1)):
        if side is None:
            continue
        spread = side.expand(out.shape)
        one, of = _once(out, spread)
        flags = torch.from_numpy(call.ledger.is_score(of.numpy()))
        if not flags.any():
            continue
        pairs = np.unique(np.stack([one[flags].numpy(), of[flags].numpy()], 1), axis=0)
        call.ledger.merge(pairs[:, 0], pairs[:, 1])
        if axis == -1:
            spread, out = spread.transpose(-1, -2), out.transpose(-1, -2)
        # Heads stand on the axes before the matrices, or beside the positions on that of the rows.
        heads, outputs = spread[..., 0].reshape(-1).numpy(), out.reshape(-1, out.shape[-1]).numpy()
        order = np.sort(np.unique(heads, return_index=True)[1])
        call.ledger.attentions.append(
            AttentionSite(call.node.name, call.module, heads[order], outputs[order].reshape(-1))
        )
        return


def axis_ids(ids: Tensor | None, axis: int) -> Tensor | None:
    """The ids along one axis, (n,), when they do not vary along the others; None otherwise."""
    if ids is None:
        return None
    rows, _ = distinct_rows(ids.movedim(axis, -1))
    return torch.from_numpy(rows[0]) if len(rows) == 1 else None
