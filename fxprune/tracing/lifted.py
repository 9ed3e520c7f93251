"""Lifted projections: Linear modules that remember which parameters of the model they stand for.

Lifting gives every projection an `nn.Linear` whose weight is (out, in), whatever the layout the model's class uses.
What is needed to write the weights back is kept on the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxprune.tracing.grouped import GroupedLinear

__all__ = [
    "Origin",
    "is_projection",
    "make_grouped",
    "make_linear",
    "origin_of",
    "parameter_of",
    "with_parameters",
]

_ATTRIBUTE = "_fxprune_origin"


@dataclass(frozen=True)
class Origin:
    """The parameters that a projection was lifted from.

    Attributes:
        weight: qualified name of the weight.
        bias: qualified name of the bias, or the name it gets when one is added.
        transposed: whether the model stores the weight as (in, out).
    """

    weight: str
    bias: str
    transposed: bool = False


def origin_of(module: nn.Module) -> Origin | None:
    """The parameters a module was lifted from; None for a module that was not lifted."""
    found = getattr(module, _ATTRIBUTE, None)
    return found if isinstance(found, Origin) else None


def parameter_of(module: nn.Module, name: str) -> tuple[str, bool]:
    """The parameter of the model's class that a parameter of a graph's module stands for.

    Args:
        module: the module that owns the parameter.
        name: the parameter's qualified name in the graph.

    Returns:
        Its name in the model, and whether the model has it turned, (in, out).
    """
    origin = origin_of(module)
    leaf = name.rpartition(".")[2]
    if origin is None or leaf not in {"weight", "bias"}:
        return name, False
    if leaf == "bias":
        return origin.bias, False
    # A grouped weight is kept as the model has it.
    return origin.weight, origin.transposed and isinstance(module, nn.Linear)


def is_projection(module: object) -> bool:
    """Whether a module is an `nn.Linear` or a `GroupedLinear`."""
    return isinstance(module, (nn.Linear, GroupedLinear))


def make_linear(weight: Tensor, bias: Tensor | None, origin: Origin | None) -> nn.Linear:
    """An `nn.Linear` around existing tensors: weight (out, in) and bias (out,) are taken, not copied."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, weight.requires_grad)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
    if origin is not None:
        setattr(linear, _ATTRIBUTE, origin)
    return linear


def make_grouped(weight: nn.Parameter, *, transposed: bool, op: Any, origin: Origin | None) -> GroupedLinear:
    """A `GroupedLinear` around an existing parameter."""
    grouped = GroupedLinear(weight, transposed=transposed, op=op)
    if origin is not None:
        setattr(grouped, _ATTRIBUTE, origin)
    return grouped


def with_parameters(old: nn.Linear | GroupedLinear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A projection like `old` with other parameters."""
    if isinstance(old, GroupedLinear):
        parameter = nn.Parameter(weight, old.weight.requires_grad)
        return make_grouped(parameter, transposed=old.transposed, op=old.op, origin=origin_of(old))
    weight = nn.Parameter(weight, old.weight.requires_grad)
    return make_linear(weight, None if bias is None else nn.Parameter(bias, weight.requires_grad), origin_of(old))
