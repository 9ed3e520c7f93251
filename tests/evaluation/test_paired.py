"""Paired tests: figures worked out by hand or by scipy, the choice of a test, and the correction for several."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from fxprune.evaluation.paired import TESTS, approximate_randomization, holm, mcnemar, paired_t, paired_test


def test_t_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    first, other = random.standard_normal((2, 20))
    test = paired_t(first.tolist(), other.tolist())
    expected = stats.ttest_rel(other, first)
    assert test.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert test.ci == pytest.approx((interval.low, interval.high))
    assert test.difference == pytest.approx((other - first).mean())
    assert test.standard_error == pytest.approx((other - first).std(ddof=1) / math.sqrt(20))


def test_pairing_sees_what_the_figures_alone_do_not() -> None:
    """Texts differ by far more than the forms do; item by item the difference is plain."""
    random = np.random.default_rng(0)
    first = random.standard_normal(40) * 5
    other = first + 0.1 + 0.05 * random.standard_normal(40)
    assert stats.ttest_ind(first, other).pvalue > 0.8
    assert paired_t(first.tolist(), other.tolist()).p < 1e-10


def test_mcnemar_by_hand() -> None:
    first = [1] * 6 + [0] * 1 + [1] * 5 + [0] * 8
    other = [0] * 6 + [1] * 1 + [1] * 5 + [0] * 8
    test = mcnemar(first, other)
    assert (test.gained, test.lost, test.pairs) == (1, 6, 20)
    assert test.p == pytest.approx(2 * (1 + 7) / 2**7)  # 7 that differ: at most one of them gained, twice
    assert test.difference == pytest.approx(-5 / 20)
    assert test.standard_error == pytest.approx(statistics.stdev([-1] * 6 + [1] + [0] * 13) / math.sqrt(20))
    assert mcnemar([1, 0, 1], [1, 0, 1]).p == 1


def test_randomization_of_a_mean_agrees_with_t() -> None:
    random = np.random.default_rng(1)
    first = random.standard_normal(30)
    other = first + 0.3 + random.standard_normal(30)
    drawn = approximate_randomization(first.tolist(), other.tolist(), statistics.fmean)
    t = paired_t(first.tolist(), other.tolist())
    assert drawn.difference == pytest.approx(t.difference)
    assert drawn.standard_error == pytest.approx(t.standard_error, rel=0.1)
    assert drawn.ci == pytest.approx(t.ci, abs=0.1)
    assert drawn.p == pytest.approx(t.p, abs=0.03)
    alike = approximate_randomization(first.tolist(), first.tolist(), statistics.fmean)
    assert (alike.difference, alike.p) == (0, 1)


def test_the_test_follows_from_the_items() -> None:
    zeros, halves = [0.0, 1.0, 1.0], [0.5, 1.0, 1.0]
    assert getattr(paired_test(zeros, zeros[::-1]), "test", "") == "exact McNemar"
    assert getattr(paired_test(zeros, halves), "test", "") == "paired t"
    words = [(-1.0, 2), (-3.0, 1), (-2.0, 4)]
    mean = lambda items: sum(a for a, _ in items) / sum(b for _, b in items)  # noqa: E731 - three words
    test = paired_test(words, words[::-1], mean)
    assert test is not None
    assert test.test == "approximate randomization"
    assert test.test in TESTS
    assert paired_test(words, words) is None  # no mean of pairs
    assert paired_test([1.0], [2.0]) is None
    assert paired_test([1.0, 2.0], [math.inf, 3.0]) is None  # no difference would be "shown" by a NaN
    assert paired_test([1.0, 2.0], [math.inf, math.inf], sum) is None
    with pytest.raises(ValueError, match="3 and 2 items"):
        paired_test(zeros, [1.0, 0.0])


def test_equal_differences_have_no_spread() -> None:
    assert paired_t([1.0, 2.0], [2.0, 3.0]).p == 0
    assert paired_t([1.5, 2.5], [1.5, 2.5]).p == 1


def test_holm() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
