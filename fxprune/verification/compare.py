"""Two forms compared as one rung, outside the ladder: for exporters, benchmarks and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.verification.ladder import Rung, answers, at_least_float, largest_difference

if TYPE_CHECKING:
    from fxprune.runtimes.runners import Runner

__all__ = ["compare_modules", "compare_runners"]


def compare_runners(
    rung: str,
    reference: Runner,
    candidate: Runner,
    *,
    vocabulary: int,
    tolerance: float,
    device: torch.device,
    longer: int = 0,
) -> Rung:
    """Compare the logits of two forms over all cases.

    Args:
        rung: name of the comparison.
        reference: the form that is right by definition.
        candidate: the form to be checked.
        vocabulary: tokens are drawn below this.
        tolerance: allowed absolute difference.
        device: where the tokens go.
        longer: tokens of one more sequence, which runs at once; none for 0.

    Returns:
        The rung; `passed` is False also for NaN.
    """
    expected, given = (
        answers(runner, vocabulary=vocabulary, device=device, longer=longer) for runner in (reference, candidate)
    )
    worst = largest_difference(expected, given)
    return Rung(rung, worst, tolerance, worst <= tolerance, len(expected))


def compare_modules(rung: str, reference: Any, candidate: Any, inputs: tuple[Any, ...], tolerance: float) -> Rung:
    """Compare two callables that return flat tuples of tensors, for models that are no causal language models."""
    with torch.no_grad():
        expected, given = _tensors(reference(*inputs)), _tensors(candidate(*inputs))
    worst = largest_difference([at_least_float(a) for a in expected], [at_least_float(b) for b in given])
    return Rung(rung, worst, tolerance, worst <= tolerance, 1)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
