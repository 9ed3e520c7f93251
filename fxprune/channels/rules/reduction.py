"""Rules for operators that reduce axes.

Along positions they change no channels. Along channels, what they compute depends on all of these: that is recorded
as a norm, or pinned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxprune.channels.relations import reduce_last

if TYPE_CHECKING:
    from fxprune.channels.call import Call, Ids

__all__ = ["REDUCTION_RULES"]

aten = torch.ops.aten

_REDUCTIONS: frozenset[Any] = frozenset({
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.nansum.default,
    aten.nanmean.default, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default,
    aten.aminmax.default, aten.var.default, aten.var.dim, aten.var.correction, aten.var_mean.default,
    aten.var_mean.dim, aten.var_mean.correction, aten.std.default, aten.std.dim, aten.std.correction,
    aten.std_mean.default, aten.std_mean.dim, aten.std_mean.correction, aten.any.default, aten.any.dim,
    aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims, aten.prod.default, aten.prod.dim_int,
    aten.logsumexp.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList,
    aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype,
    aten.norm.ScalarOpt_dtype, aten.frobenius_norm.dim, aten.median.default,
})  # fmt: skip


def _reduction(call: Call) -> Ids:
    """A reduction: the norms of channels that it reduces together are recorded."""
    several = isinstance(call.output, (tuple, list))
    ids = call.ids_of(call.tensor_nodes()[0])
    if ids is None:
        return [None] * len(call.output) if several else None
    given = call.argument("dim")
    dims = [given] if isinstance(given, int) else list(given or range(ids.dim()))
    dims = sorted(dim % ids.dim() for dim in dims)
    rest = [dim for dim in range(ids.dim()) if dim not in dims]
    moved = ids.permute(*rest, *dims).reshape(*(ids.shape[dim] for dim in rest), -1)
    out = reduce_last(call, moved, merge=False, norm=call.op)
    if several:
        return [None if out is None else out.reshape(value.shape) for value in call.output]
    return None if out is None else out.reshape(call.output.shape)


REDUCTION_RULES: dict[Any, Any] = dict.fromkeys(_REDUCTIONS, _reduction)
