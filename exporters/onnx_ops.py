"""Operators of the export graph: what they compute, their shape, and the ONNX nodes they become.

torch reasons about symbolic sizes for 5 to 20 ms at each call of `linear`, `cat` or `view`; an operator that states its
shape costs a fraction of that and is translated without Shape, Gather and Concat nodes. All of them run in torch, so a
rewritten graph can be compared with the original. Reshape targets are written with 0 (copy) and -1 (rest).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from onnxscript.onnx_opset import opset18 as op
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "append",
    "grouped_attention",
    "linear",
    "merge_heads",
    "rms_norm",
    "rotary_embedding",
    "split_heads",
    "translation_table",
]


# ── Operators ─────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("fxprune::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: (..., in) to (..., out); the weight is (out, in)."""
    return functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fxprune::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x ** 2) + eps)` over the last axis (Zhang and Sennrich, 2019); the weight is (width,)."""
    return functional.rms_norm(x, weight.shape, weight, eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    del weight, eps
    return x.new_empty(x.shape)


@torch.library.custom_op("fxprune::split_heads", mutates_args=())
def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, length, heads * head_dim) to (batch, heads, length, head_dim)."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2).contiguous()


@split_heads.register_fake
def _(x: Tensor, head_dim: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim)


@torch.library.custom_op("fxprune::merge_heads", mutates_args=())
def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, head_dim) to (batch, length, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2).clone()


@merge_heads.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@torch.library.custom_op("fxprune::append", mutates_args=())
def append(past: Tensor, new: Tensor) -> Tensor:
    """Keys or values of a cache and of the new tokens, both (batch, heads, length, head_dim), one after the other."""
    return torch.cat([past, new], dim=2)


@append.register_fake
def _(past: Tensor, new: Tensor) -> Tensor:
    return new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3])


@torch.library.custom_op("fxprune::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of every head (Su et al., 2021, in the half-split layout).

    Args:
        x: (batch, heads, length, head_dim).
        positions: (batch, length) int64, rows of the caches.
        cos: (rows, head_dim / 2).
        sin: (rows, head_dim / 2).

    Returns:
        The rotated tensor, shaped and typed like `x`.
    """
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


@rotary_embedding.register_fake
def _(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    del positions, cos, sin
    return x.new_empty(x.shape)


@torch.library.custom_op("fxprune::grouped_attention", mutates_args=())
def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention in which each key/value head serves `heads / kv_heads` neighbouring query heads, without copies of it.

    Args:
        query: (batch, heads, new, head_dim), heads a multiple of kv_heads.
        key: (batch, kv_heads, total, head_dim).
        value: (batch, kv_heads, total, value_dim).
        mask: (batch or 1, 1 or heads, new or 1, total), added to the scores; finite.
        scale: factor of the scores.

    Returns:
        (batch, heads, new, value_dim).
    """
    groups = query.shape[1] // key.shape[1]
    keys, contents = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ keys.transpose(-1, -2) * scale + mask
    return scores.softmax(dim=-1) @ contents


@grouped_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    del key, mask, scale
    return query.new_empty(*query.shape[:3], value.shape[3])


# ── ONNX Runtime's own operators ──────────────────────────────────────────────────────────────────────────────────

_Schema = onnx.defs.OpSchema
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _contrib(
    name: str, domain: str, inputs: Sequence[tuple[str, str]], attributes: dict[str, onnx.defs.OpSchema.AttrType]
) -> values.Op:
    """Declare an operator that the onnx package does not know: `inputs` are (name, "T" float or "I" int64)."""
    schema = _Schema(
        name,
        domain,
        1,
        inputs=[_Schema.FormalParameter(*parameter) for parameter in inputs],
        outputs=[_Schema.FormalParameter("output", "T")],
        type_constraints=[("T", _FLOATS, ""), ("I", ["tensor(int64)"], "")],
        attributes=[_Schema.Attribute(key, kind, required=False) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


# ONNX Runtime registers this one in the standard domain.
_SIMPLIFIED_LAYER_NORM = _contrib(
    "SimplifiedLayerNormalization",
    "",
    [("X", "T"), ("scale", "T")],
    {"axis": _Schema.AttrType.INT, "epsilon": _Schema.AttrType.FLOAT, "stash_type": _Schema.AttrType.INT},
)
_ROTARY_EMBEDDING = _contrib(
    "RotaryEmbedding",
    "com.microsoft",
    [("input", "T"), ("position_ids", "I"), ("cos_cache", "T"), ("sin_cache", "T")],
    {"interleaved": _Schema.AttrType.INT},
)


# ── Translations ──────────────────────────────────────────────────────────────────────────────────────────────────


def translation_table(*, contrib: bool) -> dict[Any, Callable[..., Any]]:
    """Translations for `torch.onnx.export(custom_translation_table=...)`.

    Args:
        contrib: use ONNX Runtime's own operators where there is one, standard ONNX only otherwise.

    Returns:
        For each operator a function from ONNX values to ONNX values, called while torch.onnx records nodes.
    """
    ours = torch.ops.fxprune
    return {
        ours.linear.default: _linear,
        ours.rms_norm.default: _rms_norm_contrib if contrib else _rms_norm,
        ours.split_heads.default: _split_heads,
        ours.merge_heads.default: _merge_heads,
        ours.append.default: _append,
        ours.rotary_embedding.default: _rotary_embedding_contrib if contrib else _rotary_embedding,
        ours.grouped_attention.default: _grouped_attention,
    }


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _scalar(number: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(number, dtype=dtype))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    # Pow, ReduceMean, Add, Sqrt, Div, Mul is the form that ONNX Runtime fuses when it loads a graph.
    mean = op.ReduceMean(op.Pow(x, _scalar(2.0, x.dtype)), _ints(-1), keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, _scalar(eps, x.dtype)))), weight)


def _rms_norm_contrib(x: Any, weight: Any, eps: float) -> Any:
    return _SIMPLIFIED_LAYER_NORM(x, weight, axis=-1, epsilon=eps, stash_type=1)


def _split_heads(x: Any, head_dim: int) -> Any:
    return op.Transpose(op.Reshape(x, _ints(0, 0, -1, head_dim)), perm=[0, 2, 1, 3])


def _merge_heads(x: Any) -> Any:
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), _ints(0, 0, -1))


def _append(past: Any, new: Any) -> Any:
    return op.Concat(past, new, axis=2)


def _rotary_embedding(x: Any, positions: Any, cos: Any, sin: Any) -> Any:
    c, s = (op.Unsqueeze(op.Gather(cache, positions), _ints(1)) for cache in (cos, sin))
    first, second = op.Split(x, num_outputs=2, axis=3)
    return op.Concat(op.Sub(op.Mul(first, c), op.Mul(second, s)), op.Add(op.Mul(second, c), op.Mul(first, s)), axis=3)


def _rotary_embedding_contrib(x: Any, positions: Any, cos: Any, sin: Any) -> Any:
    return _ROTARY_EMBEDDING(x, positions, cos, sin, interleaved=0)


def _grouped_attention(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """Broadcast K and V over the query heads of a group: no copies of them, and one product per query head.

    Folding a group into the rows of one product saves a little in decode, but then a prefill has only as many parallel
    products as key/value heads, which leaves threads idle at the odd counts that pruning makes.
    """
    heads, kv_heads, head_dim, value_dim = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
    groups, dtype = heads // kv_heads, query.dtype
    swap_last = [0, 1, 3, 2]
    if groups > 1:
        query = op.Reshape(query, _ints(0, kv_heads, groups, -1, head_dim))
        key, value = op.Unsqueeze(key, _ints(2)), op.Unsqueeze(value, _ints(2))
        mask = _mask_by_group(mask, kv_heads, groups)
        swap_last = [0, 1, 2, 4, 3]
    # The factor right before the product: ONNX Runtime folds it, and the transpose of the keys, into one kernel.
    scaled = op.Mul(query, _scalar(scale, dtype))
    scores = op.Add(op.MatMul(scaled, op.Transpose(key, perm=swap_last)), mask)
    output = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Reshape(output, _ints(0, heads, -1, value_dim)) if groups > 1 else output


def _mask_by_group(mask: Any, kv_heads: int, groups: int) -> Any:
    """(batch, 1 or heads, new, total) to (batch, 1 or kv_heads, 1 or groups, new, total)."""
    if mask.shape[1] == 1:  # every layer makes this node for itself; equal ones are merged later
        return op.Unsqueeze(mask, _ints(1))
    ends = (op.Shape(mask, start=0, end=1), op.Shape(mask, start=2))
    return op.Reshape(mask, op.Concat(ends[0], _ints(kv_heads, groups), ends[1], axis=0))
