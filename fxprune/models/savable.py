"""What is asked before any work: whether a model is in a form that can be pruned, and whether it can be saved after.

    trace ── unwrapped, require_plain ── unsavable_reason ──► Source.unsavable ── asked by save before a pipeline starts

A model that is wrapped, or whose weights are made from others when it runs (adapters, parametrizations, quantization),
has other parameters than its class, and no checkpoint of the class could hold them: it is refused at once, with what to
do. A model whose class transformers does not map can be pruned and exported; only a checkpoint of it cannot be written.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.core.errors import CheckpointError, PreconditionError, TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxprune.core.program import Source

__all__ = ["require_plain", "require_savable", "unsavable_reason", "unwrapped"]

_QUANTIZED_MODULES = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.quantizable.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that hold it whole, with the very same parameters: compiled, or on several devices."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or _is_compiled(model):
        model = model._orig_mod if _is_compiled(model) else model.module  # type: ignore[assignment]  # a module
    return model


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule)


def require_plain(model: nn.Module) -> None:
    """Refuse a model whose parameters are not those of its class.

    Args:
        model: a Hugging Face model, `unwrapped`.

    Raises:
        TraceError: what was found, in which module, and what to do.
    """
    name = type(model).__name__
    for where, module in model.named_modules():
        found = next(_obstacles(module), None)
        if found is not None:
            what, remedy = found
            raise TraceError(f"{name} cannot be pruned as it is: {where or 'the model'} {what}; {remedy}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise TraceError(f"{name} cannot be pruned as it is: the model is quantized; {_FLOATING}")


_GATHERED = "gather the model first: full weights on one device"
_FLOATING = "pruning needs the floating point weights: load the checkpoint that it was quantized from"


def _obstacles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What stands between a module and its class's own parameters, with what to do about it."""
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel | peft.tuners.tuners_utils.BaseTunerLayer):
        merge = "merge the adapter first (model = model.merge_and_unload()), or pass the base model without it"
        yield f"is a {type(module).__name__} of peft", merge
    if _is_compiled(module):
        yield "is compiled (torch.compile)", "put the module back that was compiled (its _orig_mod)"
    if "FullyShardedDataParallel" in {cls.__name__ for cls in type(module).__mro__}:
        yield "is sharded (FullyShardedDataParallel)", _GATHERED
    if f"{type(module).__module__}.".startswith(_QUANTIZED_MODULES):
        yield f"is a quantized {type(module).__name__}", _FLOATING
    yield from _computed(module)
    yield from _odd_parameters(module)


def _computed(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters of the class that are computed from others before each run."""
    if parametrize.is_parametrized(module):
        which = next(iter(module.parametrizations))  # type: ignore[arg-type]  # a ModuleDict
        remove = f'torch.nn.utils.parametrize.remove_parametrizations(module, "{which}")'
        yield f"has a parametrized {which}", f"make it a plain parameter first: {remove}"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            yield f"has {kind}", f"make it a plain parameter first: torch.nn.utils.remove_{kind}(module)"
        if isinstance(hook, BasePruningMethod):
            which = hook._tensor_name
            yield f"has a {which} under torch.nn.utils.prune", f'call torch.nn.utils.prune.remove(module, "{which}")'


def _odd_parameters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that are no plain floating point tensors."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    for which, parameter in module.named_parameters(recurse=False):
        kind = type(parameter.data)
        if distributed is not None and issubclass(kind, getattr(distributed, "DTensor", ())):
            yield f"has a {which} that is spread over devices", _GATHERED
        elif not (parameter.is_floating_point() or parameter.is_complex()):
            yield f"has a {which} of {str(parameter.dtype).removeprefix('torch.')}", _FLOATING
        elif kind is not torch.Tensor:
            yield f"has a {which} that is a {kind.__name__}, not a plain tensor", _FLOATING


def unsavable_reason(model: nn.Module) -> str:
    """Why no checkpoint can be written of a Hugging Face model, with what can be done; empty if one can."""
    from fxprune.models.skeleton import resolve_model_class  # noqa: PLC0415 - imports transformers

    model_class = type(model)
    where = f"{model_class.__qualname__} from {model_class.__module__}"
    remedy = "it can be pruned and exported, but not saved as a checkpoint: leave save out, and export the graph"
    try:
        known = resolve_model_class(model.config, model_class.__name__)
    except CheckpointError:
        return f"transformers maps {type(model.config).__name__} to no model class called {where}; {remedy}"
    return "" if known is model_class else f"{where} is not transformers' own class of this name; {remedy}"


def require_savable(source: Source | None) -> None:
    """Refuse to begin what ends in a checkpoint where none can be written.

    Raises:
        PreconditionError: the program came from a plain module, or from a class of which no checkpoint can be written.
    """
    if source is None:
        raise PreconditionError("save writes Hugging Face checkpoints; this program came from a plain nn.Module")
    if source.unsavable:
        raise PreconditionError(source.unsavable)
