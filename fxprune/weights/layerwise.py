"""Layer-wise solving: what a solver does to the projections of a stage, with figures for each.

The bridge between the engine, which knows graphs, and solvers, which know a weight and its input's statistics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.calibration.gram import Gram
from fxprune.core.errors import FxpruneError, PostconditionError
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import GraphModule

    from fxprune.calibration.engine import SiteStatistics
    from fxprune.calibration.stages import Stage
    from fxprune.weights.solvers import Prepared, Solved, Solver
    from fxprune.weights.sparsity import Sparsity

__all__ = ["LayerFigures", "LayerwiseSolver"]


@dataclass(frozen=True)
class LayerFigures:
    """What happened to one projection.

    Attributes:
        name: its qualified name.
        target: the sparsity asked for, `0.5` or `2:4`.
        shape: of the weight, (out, in) or (experts, out, in).
        removed: share of its weights that are exactly 0.
        error: squared change of its output over its squared output, on the calibration inputs; for experts over all.
        tokens: calibration tokens it read; for experts the fewest that one of them read.
        seconds: of solving, factorisation included for the first projection of an input.
        notes: damping, dead inputs, experts that fell back; JSON-able.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    removed: float
    error: float
    tokens: int
    seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For reports; what is empty is absent."""
        data = {**vars(self), "shape": list(self.shape), "notes": dict(self.notes)}
        return {key: value for key, value in data.items() if value not in ({}, None)}


class LayerwiseSolver:
    """Prunes the projections of stages as the engine reaches them.

    An expert that read fewer tokens than it has inputs borrows: the Gram matrix of all experts' tokens is scaled to
    stand for the tokens that are missing. The figures say which experts did.

    Args:
        root: the graph whose projections are pruned in place; each must be a module of its own.
        solver: how.
        targets: how much of each projection goes.
        held: masks of weights that are gone already, by projection, in the layout of its weight.
    """

    def __init__(
        self,
        root: GraphModule,
        solver: Solver,
        targets: Mapping[str, Sparsity],
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.root = root
        self.solver = solver
        self.targets = targets
        self.held = held or {}
        self.figures: dict[str, LayerFigures] = {}
        self.masks: dict[str, Tensor] = {}
        self.prepare_seconds = 0.0
        self.flop = {"forward": 0.0, "gram": 0.0}
        """Floating point operations that calibration needs at least: each projection once, half of each Gram matrix."""

    def __call__(self, stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        """Prune what the sites of a stage feed.

        Raises:
            FxpruneError: a solver refused; the message names the projection.
        """
        del stage
        with torch.no_grad(), fast_products():
            for one in statistics:
                again = [name for name in one.site.linears if name in self.figures]
                for name in again:  # a layer that is called again was solved on what its first call read
                    notes = dict(self.figures[name].notes)
                    notes["calls"] = notes.get("calls", 1) + 1
                    self.figures[name] = replace(self.figures[name], notes=notes)
                names = [name for name in one.site.linears if name not in again]
                if not names:
                    continue
                start = time.perf_counter()
                self._count(names, one.grams)
                grams, borrowed = _completed(one.grams)
                prepared = [self._named(names[0], self.solver.prepare, gram) for gram in grams]
                seconds = time.perf_counter() - start
                self.prepare_seconds += seconds
                for name in names:
                    self._prune(name, prepared, one, borrowed, seconds)
                    seconds = 0.0

    def _count(self, names: Sequence[str], grams: Sequence[Gram | None]) -> None:
        for gram in grams:
            if gram is not None:
                self.flop["gram"] += gram.features**2 * gram.tokens
                rows = sum(get_attribute(self.root, name).out_features for name in names)
                self.flop["forward"] += 2 * gram.features * rows * gram.tokens

    def without_data(self) -> None:
        """Prune all targets with a solver that needs no statistics."""
        with torch.no_grad():
            for name in self.targets:
                module = get_attribute(self.root, name)
                experts = module.experts if isinstance(module, GroupedLinear) else 1
                self._prune(name, [self.solver.prepare(None)] * experts, None, (), 0.0)

    def _named(self, name: str, call: Any, *args: Any) -> Any:
        """Call, and put the projection's name before what goes wrong."""
        try:
            return call(*args)
        except FxpruneError as error:
            raise type(error)(f"{name}: {error}") from error

    def _prune(
        self,
        name: str,
        prepared: Sequence[Prepared],
        statistics: SiteStatistics | None,
        borrowed: Sequence[int],
        seconds: float,
    ) -> None:
        start = time.perf_counter()
        module = get_attribute(self.root, name)
        target = self.targets[name]
        weights = _matrices(module, module.weight.detach())
        held: Sequence[Tensor | None] = [None] * len(weights)
        if name in self.held:
            held = _matrices(module, self.held[name].to(module.weight.device))
        solved = [
            self._named(name, self.solver.solve, weight, one, target, *(() if there is None else (there,)))
            for weight, one, there in zip(weights, prepared, held, strict=True)
        ]
        weight, mask = _assembled(module, solved)
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
        self.masks[name] = mask.cpu()
        notes = _notes(solved)
        if borrowed:
            notes["experts_with_few_tokens"] = list(borrowed)
        counts = [gram.tokens if gram is not None else 0 for gram in statistics.grams] if statistics else [0]
        removed = 1 - int(mask.sum()) / mask.numel()
        self._check(name, mask, target, self.held.get(name))
        shares = [max(count, 1) for count in counts] if len(counts) == len(solved) else [1] * len(solved)
        self.figures[name] = LayerFigures(
            name,
            target.describe(),
            tuple(weight.shape),
            removed,
            sum(one.error * share for one, share in zip(solved, shares, strict=True)) / sum(shares),
            min(counts),
            seconds + time.perf_counter() - start,
            notes,
        )

    def _check(self, name: str, mask: Tensor, target: Sparsity, held: Tensor | None = None) -> None:
        """The mask removes what was asked, within one weight a row, and what was gone before; then it may be more.

        Raises:
            PostconditionError: it does not.
        """
        removed = mask.numel() - int(mask.sum())
        rows = mask.numel() // mask.shape[-1]
        if held is not None and bool((mask.cpu() & ~held.cpu()).any()):
            raise PostconditionError(f"{name}: {self.solver.name} keeps weights that were removed before")
        more = removed - target.share * mask.numel()
        if more < -rows or (held is None and more > rows):
            raise PostconditionError(
                f"{name}: {self.solver.name} removed {removed / mask.numel():.4f} of the weights where "
                f"{target.describe()} was asked for"
            )


def _matrices(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """The weights (out, in) of a projection, or a mask of them: one, or one for every expert."""
    assert isinstance(module, (nn.Linear, GroupedLinear))
    if isinstance(module, GroupedLinear):
        return [one.t() if module.in_axis == 1 else one for one in weight]
    return [weight]


def _assembled(module: nn.Module, solved: Sequence[Solved]) -> tuple[Tensor, Tensor]:
    """Weight and mask in the projection's own layout."""
    if not isinstance(module, GroupedLinear):
        return solved[0].weight, solved[0].mask
    turned = module.in_axis == 1
    weights = torch.stack([one.weight.t() if turned else one.weight for one in solved])
    masks = torch.stack([one.mask.t() if turned else one.mask for one in solved])
    return weights, masks


def _completed(grams: Sequence[Gram | None]) -> tuple[list[Gram], tuple[int, ...]]:
    """Grams in which experts that read too few tokens have borrowed from all, and which experts those are."""
    there = [gram for gram in grams if gram is not None]
    if len(grams) == 1 or not there:
        return there, ()
    features = there[0].features
    few = tuple(index for index, gram in enumerate(grams) if gram is None or gram.tokens < features)
    if not few:
        return there, ()
    tokens = sum(gram.tokens for gram in there)
    pooled = torch.stack([gram.matrix for gram in there]).sum(0) / tokens
    completed = []
    for gram in grams:
        own = 0 if gram is None else gram.tokens
        if own >= features and gram is not None:
            completed.append(gram)
        else:
            missing = pooled * (features - own)
            completed.append(Gram(missing if gram is None else gram.matrix + missing, features))
    return completed, few


def _notes(solved: Sequence[Solved]) -> dict[str, Any]:
    """Notes of one weight, or of the experts together: where they agree once, else the largest number."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in solved for key in one.notes):
        values = [one.notes[key] for one in solved if key in one.notes]
        numbers = all(isinstance(value, (int, float)) for value in values)
        merged[key] = max(values) if numbers else values[0]
    return merged
