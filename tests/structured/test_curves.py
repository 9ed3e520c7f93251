"""Curves: legal aligned widths, the loss of what goes, and least squares at every width."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fxprune.core.errors import PlanError
from fxprune.core.plan import Plan
from fxprune.structured.curves import (
    Curve,
    Level,
    Limits,
    evened,
    head_curve,
    obs_channel_curve,
    obs_head_curve,
    scaled,
    score_curve,
)
from fxprune.structured.obs import Elimination
from tests.units import attention, least_squares_error, mlp, problem


def widths(curve: Curve) -> list[int]:
    return [len(level.kept) for level in curve.levels]


@pytest.mark.parametrize(
    ("units", "round_to", "min_keep", "expected"),
    [
        (10, 4, 0.0, [10, 8, 4]),
        (10, 4, 0.5, [10, 8]),
        (8, 4, 0.5, [8, 4]),
        (8, 1, 0.7, [8, 7, 6]),
        (8, 4, 1.0, [8]),
        (5, 8, 0.1, [5]),
    ],
)
def test_widths_are_aligned_and_what_must_stay_does(
    units: int, round_to: int, min_keep: float, expected: list[int]
) -> None:
    curve = score_curve(mlp("m", units), np.arange(units, dtype=float), Limits(round_to, min_keep))
    assert widths(curve) == expected


def test_channels_go_by_their_scores_and_the_loss_is_their_sum() -> None:
    scores = np.array([5.0, 1, 4, 2, 3, 0, 9, 8])
    curve = score_curve(mlp("m", 8), scores, Limits(2, 0.2))
    assert [level.kept for level in curve.levels] == [
        tuple(range(8)),
        (0, 2, 3, 4, 6, 7),
        (0, 2, 6, 7),
        (6, 7),
    ]
    assert [level.loss for level in curve.levels] == [0, 1, 6, 15]


def test_head_counts_are_legal_and_every_shape_is_there() -> None:
    group = attention("a", 3, 2)
    scores = np.array([1.0, 6, 5, 2, 0, 3])
    curve = score_curve(group, scores, Limits(8, 0.1))
    for level in curve.levels:
        Plan.of({"a": level.kept}).validate([group])
        assert level.loss == pytest.approx(scores.sum() - scores[list(level.kept)].sum())
    kept = [level.kept for level in curve.levels]
    assert set(kept) == {(0, 1, 2, 3, 4, 5), (0, 1, 2, 3), (0, 1), (1, 2, 5), (1, 2), (1,)}
    assert widths(curve) == sorted(widths(curve), reverse=True)


@pytest.mark.parametrize(("share", "least"), [(0.5, 3), (0.6, 4), (0.7, 6), (1.0, 6)])
def test_what_must_stay_of_an_attention_is_counted_in_heads_and_in_kv_heads(share: float, least: int) -> None:
    group, limits = attention("a", 3, 2), Limits(8, share)
    hessian, weight = problem(6, 4)
    blocks = [torch.arange(6).reshape(-1, 1)]
    swept = obs_head_curve(group, [Elimination(hessian, weight)], blocks, limits)
    for curve in (score_curve(group, np.arange(6.0), limits), swept):
        assert min(widths(curve)) == least
        assert min(len(group.kv_kept(level.kept)) for level in curve.levels) >= 3 * share


def test_what_a_kv_head_is_worth_may_be_its_best_head() -> None:
    group = attention("a", 2, 2)
    scores = np.array([4.0, 4.0, 7.0, 0.0])
    for worth, kept in ((np.sum, (0, 1)), (np.max, (2, 3))):
        curve = head_curve(group, lambda _: 0.0, scores, Limits(8, 0.1), worth=worth)
        assert kept in [level.kept for level in curve.levels]


def test_uneven_kv_heads_have_no_legal_count() -> None:
    uneven = dataclasses.replace(attention("a", 2, 2), sharing=np.array([0, 0, 0, 1]))
    with pytest.raises(PlanError, match="different numbers of query heads"):
        score_curve(uneven, np.ones(4), Limits())


def test_within_leaves_the_levels_that_keep_nothing_else() -> None:
    curve = Curve("m", (Level((0, 1, 2), 0.0), Level((0, 2), 1.0), Level((1,), 2.0), Level((0,), 3.0)))
    assert [level.kept for level in curve.within([0, 2]).levels] == [(0, 2), (0,)]


def test_losses_can_be_scaled() -> None:
    curves = scaled({"m": Curve("m", (Level((0,), 1.5),)), "n": Curve("n", (Level((1,), 1.0),))}, {"m": 2, "n": 3})
    assert [curve.levels[0].loss for curve in curves.values()] == [3.0, 3.0]


def test_evened_curves_keep_their_form_and_come_to_one_scale() -> None:
    small = Curve("small", (Level((0, 1, 2, 3), 0.0), Level((0, 1, 2), 0.5), Level((0, 1), 1.0), Level((0,), 4.0)))
    large = scaled({"small": dataclasses.replace(small, group="large")}, {"small": 16.0})["small"]
    free = Curve("free", (Level((0, 1), 0.0), Level((0,), 0.0)))
    curves = {"small": small, "large": large, "free": free}
    for evenness, factor in ((0.0, 1.0), (0.5, 2.0), (1.0, 4.0)):  # the geometric mean of 1 and 16 is 4
        found = evened(curves, evenness)
        for name, times in (("small", factor), ("large", 1 / factor), ("free", 1.0)):
            assert [one.kept for one in found[name].levels] == [one.kept for one in curves[name].levels]
            assert [one.loss for one in found[name].levels] == pytest.approx(
                [one.loss * times for one in curves[name].levels]
            )
    assert evened({"free": free}, 1.0) == {"free": free}
    odd = Curve("odd", (Level((0, 1, 2), 0.0), Level((0, 1), 2.0)))  # never half: the narrowest counts
    assert evened({"odd": odd, "small": small}, 1.0)["odd"].levels[1].loss == pytest.approx(2.0**0.5)


# --- optimal brain surgeon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "round_to"), [(12, 4), (11, 4), (10, 1)])
def test_the_loss_of_every_width_is_that_of_least_squares(units: int, round_to: int) -> None:
    first, second = problem(units, 5), problem(units, 3, seed=1)
    blocks = [torch.arange(units).reshape(-1, 1)] * 2
    curve = obs_channel_curve(mlp("m", units), [Elimination(*first), Elimination(*second)], blocks, Limits(round_to))
    assert widths(curve)[1:] == [w for w in range(units - 1, 0, -1) if w % round_to == 0]
    for level in curve.levels:
        expected = sum(least_squares_error(*one, list(level.kept)) for one in (first, second))
        assert level.loss == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_the_loss_of_every_head_count_is_that_of_least_squares() -> None:
    group = attention("a", 3, 2, dim=4)
    hessian, weight = problem(24, 6)
    blocks = [torch.arange(24).reshape(-1, 4)]
    curve = obs_head_curve(group, [Elimination(hessian, weight)], blocks, Limits(8, 0.1))
    shapes = [(len(level.kept), len(group.kv_kept(level.kept))) for level in curve.levels]
    assert sorted(shapes, reverse=True) == [(6, 3), (4, 2), (3, 3), (2, 2), (2, 1), (1, 1)]
    for level in curve.levels:
        Plan.of({"a": level.kept}).validate([group])
        inputs = blocks[0][list(level.kept)].reshape(-1).tolist()
        assert level.loss == pytest.approx(least_squares_error(hessian, weight, inputs), rel=1e-8, abs=1e-9)


def test_what_others_can_stand_in_for_goes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    x[:, 5] = 3 * x[:, 1] - x[:, 2] + 1e-4 * x[:, 5]  # loud, but nothing of its own
    hessian, weight = x.T @ x / 200, torch.ones(8, 4, dtype=torch.float64)
    curve = obs_channel_curve(mlp("m", 8), [Elimination(hessian, weight)], [torch.arange(8)[:, None]], Limits(1))
    assert len(set(curve.levels[1].kept) & {1, 2, 5}) == 2
    assert curve.levels[1].loss < 1e-6 < curve.levels[2].loss
