"""The speed gate: does the measured speed-up hold, and if not, why.

The lower end of the confidence interval must be above 1, or above the target less 5%. The reasons come from counting:
what bounds the case (MACs for prefill, bytes for decoding), how much of it is the output projection, which pruning
does not touch, and widths that matrix kernels handle badly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fxprune.core.errors import UsageError
from fxprune.measure.latency_table import case_weights
from fxprune.measure.ratios import Precision, ratio_draws

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.measure.speed import Cost, SpeedResult

__all__ = [
    "JUDGED_PRECISION",
    "JUDGED_REPEATS",
    "GatedCase",
    "Verdict",
    "check_target",
    "gate",
    "linear_shapes",
    "merged",
    "mixed_speedup",
    "narrowed_widths",
]

TOLERANCE = 0.05
JUDGED_REPEATS = 30
JUDGED_PRECISION = Precision(0.02, 10 * JUDGED_REPEATS)
"""How often forms are timed that will be judged. What is to be told apart is the target and 5% less: an interval of 2%
to each side leaves a speed-up that met the target room to pass."""
_LARGE_HEAD = 0.15
_WIDE_INTERVAL = 0.05
_MULTIPLE = 8
_WORK = {"macs": "MACs of the products with weights", "bytes": "bytes of weights and cache that a token reads"}


@dataclass(frozen=True)
class GatedCase:
    """A case, or a mix of cases, before the gate: speed-up, its 95% interval, and whether it passed."""

    name: str
    speedup: float
    ci: tuple[float, float]
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        passed: whether every case passed.
        target: the speed-up that was asked for; None when any will do.
        threshold: what the lower end of the interval must be above.
        cases: what was judged.
        reasons: why it did not pass, one sentence each; empty when it did.
    """

    passed: bool
    target: float | None
    threshold: float
    cases: tuple[GatedCase, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON data; without a target its key is absent."""
        data = asdict(self)
        if self.target is None:
            del data["target"]
        return data | {
            "cases": [asdict(case) | {"ci": list(case.ci)} for case in self.cases],
            "reasons": [*self.reasons],
        }


def check_target(target: float | None) -> None:
    """Raise `UsageError` unless the target is None or a number above 1."""
    if target is not None and not (math.isfinite(target) and target > 1):
        raise UsageError(f"a target speed-up must be a number above 1, got {target}")


def gate(
    results: Sequence[SpeedResult],
    target: float | None = None,
    *,
    mix: Mapping[str, float] | None = None,
    costs: tuple[Cost | None, Cost | None] = (None, None),
    widths: Mapping[str, int] | None = None,
    prefix: str = "",
) -> Verdict:
    """Judge measured speed-ups.

    Args:
        results: of `fxprune.measure.speed.bench`, at least one.
        target: the speed-up wanted; when None, any above 1 passes.
        mix: weights of the cases (see `case_weights`): the mix is judged as one, by the sum of weight * slim / dense.
            Without it every case must pass.
        costs: of the dense and the slim form, where known, for the share of the output projection.
        widths: widths that pruning changed, by name of the weight (see `narrowed_widths`).
        prefix: what the names of the judged cases begin with, where several verdicts are merged.

    Raises:
        UsageError: there is no result, or the target or the mix is wrong.
    """
    check_target(target)
    if not results:
        raise UsageError("the speed gate needs at least one measured case")
    threshold = 1.0 if target is None else max(1.0, target * (1 - TOLERANCE))
    if mix is None:
        judged = [(prefix + _label(r), r.speedup, r.ci, [r]) for r in results]
    else:
        shares = case_weights([r.case for r in results], mix)
        used = [r for r in results if shares[r.case.name] > 0]
        name = " + ".join(f"{shares[r.case.name]:.2g} {r.case.name}" for r in used)
        judged = [(name, *_mixed(used, shares), used)]
    cases, reasons = [], []
    for name, speedup, ci, measured in judged:
        passed = ci[0] > threshold
        cases.append(GatedCase(name, speedup, ci, passed))
        if not passed:
            reasons.append(
                f"{name}: measured {speedup:.2f}x, 95% interval {ci[0]:.2f} to {ci[1]:.2f}; its lower end must be "
                f"above {threshold:.2f}"
            )
            for result in measured:
                reasons += _why(result, target, costs)
            reasons += _noise(name, speedup, ci, threshold)
    if reasons:
        reasons += _misaligned(widths or {})
    return Verdict(not reasons, target, threshold, tuple(cases), tuple(dict.fromkeys(reasons)))


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several with the same target: passed when all are.

    Raises:
        UsageError: there is none.
    """
    if not verdicts:
        raise UsageError("the speed gate needs at least one measured case")
    reasons = dict.fromkeys(reason for verdict in verdicts for reason in verdict.reasons)
    cases = tuple(case for verdict in verdicts for case in verdict.cases)
    first = verdicts[0]
    return Verdict(all(verdict.passed for verdict in verdicts), first.target, first.threshold, cases, tuple(reasons))


def _label(result: SpeedResult) -> str:
    """The case, with the form where it has a name."""
    return result.case.name if result.form is None else f"{result.form}, {result.case.name}"


def mixed_speedup(results: Sequence[SpeedResult], shares: Mapping[str, float]) -> float:
    """Speed-up of a mix of cases.

    Args:
        results: of its cases.
        shares: of the dense time that the cases stand for, by name; their sum is 1.
    """
    return 1 / sum(shares[one.case.name] / one.speedup for one in results)


def _mixed(results: Sequence[SpeedResult], shares: Mapping[str, float]) -> tuple[float, tuple[float, float]]:
    """Speed-up of a mix and its percentile bootstrap interval; the pairs of each case are resampled on their own."""
    speedup = mixed_speedup(results, shares)
    draws = sum(
        shares[one.case.name] / ratio_draws(one.dense_times, one.slim_times, seed=seed)
        for seed, one in enumerate(results)
    )
    low, high = np.quantile(1 / draws, [0.025, 0.975])
    return speedup, (min(float(low), speedup), max(float(high), speedup))


def _why(result: SpeedResult, target: float | None, costs: tuple[Cost | None, Cost | None]) -> list[str]:
    """What counting says about one case."""
    found = []
    name, bound = result.case.name, result.bound
    if bound is not None:
        wanted = 1 + TOLERANCE if target is None else target
        if bound.speedup < wanted:
            found.append(
                f"{name}: the {bound.kind} bound is below what is wanted: the {_WORK[bound.kind]} shrink "
                f"{bound.speedup:.2f}x only; remove more, or ask for less"
            )
        elif result.speedup < wanted:
            found.append(
                f"{name}: the {bound.kind} bound is {bound.speedup:.2f}x, so the rest of the time goes to what widths "
                "do not shrink, such as norms, scores and the launching of operators; fewer layers or larger batches "
                "would help more than narrower widths"
            )
    dense, slim = costs
    if dense is not None and slim is not None:
        share = slim.macs.lm_head / max(1, slim.macs.linear)
        if share >= _LARGE_HEAD:
            found.append(
                f"{name}: the output projection is {share:.0%} of the slim form's products and is not pruned: with no "
                f"blocks at all the products would shrink {dense.macs.linear / slim.macs.lm_head:.2f}x"
            )
    return found


def _noise(name: str, speedup: float, ci: tuple[float, float], threshold: float) -> list[str]:
    if speedup <= threshold or (ci[1] - ci[0]) / 2 < _WIDE_INTERVAL * speedup:
        return []
    return [f"{name}: the interval is wide: measure with more --repeats, or while nothing else runs"]


def _misaligned(widths: Mapping[str, int]) -> list[str]:
    ragged = {name: width for name, width in widths.items() if width % _MULTIPLE}
    if not ragged:
        return []
    name, width = next(iter(ragged.items()))
    reason = (
        f"{len(ragged)} of {len(widths)} changed widths are no multiple of {_MULTIPLE}, such as {width} in {name}; "
        f"matrix kernels like multiples of {_MULTIPLE} or {2 * _MULTIPLE}: prune with --round-to {2 * _MULTIPLE}"
    )
    return [reason]


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every `nn.Linear`, by the qualified name of its weight."""
    linears = ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear))
    return {f"{name}.weight": (linear.in_features, linear.out_features) for name, linear in linears}


def narrowed_widths(dense: Mapping[str, tuple[int, int]], slim: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The widths that differ between two forms, by name of the weight; weights that only one form has are left out."""
    return {
        name: width
        for name, shape in slim.items()
        for width, before in zip(shape, dense.get(name, shape), strict=True)
        if width != before
    }
