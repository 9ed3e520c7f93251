"""Sparsity: reading targets, exact counts, ties, N:M groups."""

from __future__ import annotations

import pytest
import torch

from fxprune.core.errors import PlanError, UsageError
from fxprune.weights.sparsity import Sparsity, _kth_smallest, keep_largest, keep_of_group, lowest, lowest_per_row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", Sparsity(0.5, 2, 4)),
        (" 1 : 4 ", Sparsity(0.75, 1, 4)),
        ("0.5", Sparsity(0.5)),
        ("0", Sparsity(0.0)),
        ("6e-1", Sparsity(0.6)),
    ],
)
def test_parse(text: str, expected: Sparsity) -> None:
    assert Sparsity.parse(text) == expected
    assert Sparsity.parse(expected.describe()) == expected


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "2:0", "1.0", "-0.1", "nan", "inf", "half", "", "2:4:8", "2:-4"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        Sparsity.parse(text)


def test_a_pattern_that_became_a_number_is_told_how_to_be_written() -> None:
    with pytest.raises(UsageError, match="write '2:4' with quotes"):
        Sparsity.parse("124")
    with pytest.raises(UsageError, match=r"less than 1, got 59\.0$"):
        Sparsity.parse("59")


def test_fields_must_agree() -> None:
    with pytest.raises(UsageError, match="removes 0.5"):
        Sparsity(0.25, 2, 4)
    with pytest.raises(UsageError, match="both"):
        Sparsity(0.5, 2)


def test_check_names_the_linear() -> None:
    Sparsity.parse("2:4").check(64, "model.layers.0.q_proj")
    Sparsity.parse("0.5").check(63, "model.layers.0.q_proj")
    with pytest.raises(PlanError, match=r"model\.layers\.0\.q_proj has 66 inputs.*groups of 4"):
        Sparsity.parse("2:4").check(66, "model.layers.0.q_proj")


@pytest.mark.parametrize("distinct", [1, 2, 7, 10_000])
@pytest.mark.parametrize("count", [0, 1, 17, 60, 119, 120])
def test_lowest_is_exact_and_takes_the_first_of_equal_scores(distinct: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(distinct, (8, 15), generator=generator).float()
    found = lowest(scores, count)
    expected = torch.zeros(120, dtype=torch.bool)
    expected[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(found.flatten(), expected)


@pytest.mark.parametrize("distinct", [1, 3, 10_000])
@pytest.mark.parametrize("count", [0, 1, 7, 15])
def test_lowest_per_row_is_exact_and_takes_the_first_of_equal_scores(distinct: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(distinct, (8, 15), generator=generator).float()
    expected = torch.zeros(8, 15, dtype=torch.bool)
    expected.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], value=True)
    assert torch.equal(lowest_per_row(scores, count), expected)


@pytest.mark.parametrize("count", [1, 7, 15])
def test_accelerators_select_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(5, (8, 15), generator=torch.Generator().manual_seed(count)).float()
    here = _kth_smallest(scores, count)
    # On the meta device there are no numbers: what runs elsewhere runs here, by taking the branch of numpy away.
    monkeypatch.setattr("fxprune.weights.sparsity._IN_NUMPY", ())
    assert torch.equal(_kth_smallest(scores, count), here)
    assert torch.equal(here, scores.sort(dim=1).values[:, count - 1])


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (5, 16), (31, 32)])
@pytest.mark.parametrize("distinct", [2, 10_000])
def test_groups_keep_exactly_n_of_m(n: int, m: int, distinct: int) -> None:
    generator = torch.Generator().manual_seed(m)
    scores = torch.randint(distinct, (9, 3 * m), generator=generator).float()
    groups = scores.view(9, 3, m)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, value=True)
    assert torch.equal(keep_largest(scores, Sparsity.pattern(n, m)), expected.view(9, 3 * m))
    assert torch.equal(keep_of_group(groups.movedim(-1, 0), n), expected.movedim(-1, 0))


@pytest.mark.parametrize("text", ["0.37", "1:3"])
def test_scores_need_not_be_contiguous(text: str) -> None:
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(0)).T
    sparsity = Sparsity.parse(text)
    assert not scores.is_contiguous()
    assert torch.equal(keep_largest(scores, sparsity), keep_largest(scores.contiguous(), sparsity))


def test_unstructured_counts_are_rounded_once() -> None:
    scores = torch.rand(37, 53, generator=torch.Generator().manual_seed(0))
    sparsity = Sparsity(0.37)
    assert int((~keep_largest(scores, sparsity)).sum()) == round(0.37 * 37 * 53)
    assert (~keep_largest(scores, sparsity, per_row=True)).sum(1).tolist() == [round(0.37 * 53)] * 37
