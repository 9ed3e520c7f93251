"""Groups made up by hand, and least squares by the book, for tests of curves and of optimal brain surgeon."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxprune.core.groups import AttentionGroup, MlpGroup, UnitSlice

__all__ = ["attention", "least_squares_error", "mlp", "problem"]


def mlp(name: str, units: int, cost: int = 3) -> MlpGroup:
    """An MLP whose channels cost `cost` parameters each."""
    return MlpGroup(name, 0, (UnitSlice(f"{name}.down.weight", 1, np.arange(units).reshape(-1, 1), cost, "columns"),))


def attention(name: str, kv_heads: int, per_kv: int, dim: int = 1, cost: int = 10, shared: int = 7) -> AttentionGroup:
    """An attention with heads of `dim` channels that cost `cost` parameters each; KV heads cost `shared` a channel."""
    heads = np.arange(kv_heads * per_kv)
    slices = (UnitSlice(f"{name}.o.weight", 1, np.arange(len(heads) * dim).reshape(-1, dim), cost, "columns"),)
    both = (UnitSlice(f"{name}.k.weight", 0, np.arange(kv_heads * dim).reshape(-1, dim), shared, "rows"),)
    return AttentionGroup(name, 0, slices, both, heads // per_kv, head_dim=dim)


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A positive definite Hessian of correlated inputs, (in, in), and a weight, (in, out), float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5 * inputs, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x), torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)


def least_squares_error(hessian: Tensor, weight: Tensor, kept: list[int]) -> float:
    """The least 1/2 tr((W - W')^T H (W - W')) over all W' that are 0 outside of `kept`, by solving for W'."""
    root = torch.linalg.cholesky(hessian).T  # H = R^T R, so the error is 1/2 |R W - R W'|^2
    solution = torch.linalg.lstsq(root[:, kept], root @ weight).solution
    return 0.5 * float((root @ weight - root[:, kept] @ solution).square().sum())
