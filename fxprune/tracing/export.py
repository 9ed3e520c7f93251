"""The call of torch.export, for Hugging Face models through transformers' exporter, and what makes it fast."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch._C import DispatchKey

from fxprune.models.cache_names import cache_of
from fxprune.tracing.cache import axes_of_cache, quiet_exporter
from fxprune.tracing.on_meta import ListsAsSlices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

__all__ = ["export_hugging_face", "export_plain"]

_broadcast: Any = torch.broadcast_shapes
_agree: Any = torch._check


def export_hugging_face(model: nn.Module, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Export through transformers' own exporter, which knows the library's untraceable corners."""
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter  # noqa: PLC0415 - heavy

    shapes: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            floating = value.is_floating_point()
            axes = [0] if floating else range(value.dim())
            shapes[key] = dict.fromkeys(axes, torch.export.Dim.AUTO)
        elif value is not None and value is cache_of(inputs):
            shapes[key] = axes_of_cache(model, value)
    device = next(model.parameters()).device
    lists = ListsAsSlices() if device.type == "meta" else nullcontext()
    with quiet_exporter(), _cheap_shapes(device), lists, _stateless_rope(model):
        config = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
        exported: torch.export.ExportedProgram = DynamoExporter().export(model, dict(inputs), config).program
    return exported


def _stateless_rope(model: nn.Module) -> AbstractContextManager[None]:
    """What makes rotary tables that grow functions of the positions; nothing where a model has none."""
    growing = [module for module in model.modules() if _is_dynamic_rope(module)]
    if not growing:
        return nullcontext()
    from fxprune.tracing.rope_tables import stateless_rope  # noqa: PLC0415 - imports transformers

    return stateless_rope(growing)


def _is_dynamic_rope(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    listed = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return "forward" not in vars(module) and any(isinstance(kind, str) and "dynamic" in kind for kind in listed)


@contextmanager
def _cheap_shapes(device: torch.device) -> Iterator[None]:
    """Halve the time that export spends on symbolic shapes; the graph is the same.

    Attention and Linears are decomposed to find the shape of their result: for attention a dozen products and reshapes
    with symbolic sizes for one node of the graph. Their shape rules say the same. The cache of fake results costs more
    than it saves where sizes are symbols.
    """
    key = DispatchKey.CompositeImplicitAutograd
    rules: dict[Any, Any] = {torch.ops.aten.linear.default: _shape_of_linear}
    if device.type in {"cpu", "meta"}:  # elsewhere kernels choose the layout of the result
        rules[torch.ops.aten.scaled_dot_product_attention.default] = _shape_of_attention
    rules = {op: rule for op, rule in rules.items() if key not in op.py_kernels}
    for op, rule in rules.items():
        op.py_impl(key)(rule)
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        for op in rules:
            del op.py_kernels[key]
            op._dispatch_cache.clear()


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result of `linear` without its values."""
    _agree(x.shape[-1] == weight.shape[1])
    _agree(bias is None or bias.shape[0] == weight.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _shape_of_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    """The result of `scaled_dot_product_attention` without its values; sizes that must agree are made to."""
    heads = query.shape[-3:-2] if options.get("enable_gqa") else None
    keys, values = ((*t.shape[:-3], *(heads or t.shape[-3:-2])) for t in (key, value))
    batch = _broadcast(query.shape[:-2], keys, values)
    _agree(query.shape[-1] == key.shape[-1])
    _agree(key.shape[-2] == value.shape[-2])
    if attn_mask is not None:
        _broadcast((*batch, query.shape[-2], key.shape[-2]), attn_mask.shape)
    return query.new_empty((*batch, query.shape[-2], value.shape[-1]))


def export_plain(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Export a plain module: every axis but the last of a floating input may change, where the module lets it."""
    shapes = {
        key: dict.fromkeys(range(max(1, value.dim() - value.is_floating_point())), torch.export.Dim.AUTO)
        if isinstance(value, torch.Tensor) and value.dim()
        else None
        for key, value in inputs.items()
    }
    with torch.no_grad():
        return torch.export.export(model, args, kwargs=copy.copy(inputs), dynamic_shapes=shapes, strict=False)
