"""Structured optimal brain surgeon, against least squares solved for each set of removed inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxprune.core.errors import CalibrationError
from fxprune.structured.obs import Elimination, damped, matrix_root, positive_definite, swap_gains, sweep
from tests.units import least_squares_error, problem


def left(inputs: int, gone: list[int]) -> list[int]:
    return [index for index in range(inputs) if index not in gone]


def test_each_cost_is_the_error_that_least_squares_leaves() -> None:
    hessian, weight = problem(12, 5)
    task = Elimination(hessian, weight)
    singles = task.costs(torch.arange(12).reshape(-1, 1))
    pairs = task.costs(torch.arange(12).reshape(-1, 2))
    for index in range(12):
        assert float(singles[index]) == pytest.approx(least_squares_error(hessian, weight, left(12, [index])), rel=1e-9)
    for index in range(6):
        gone = [2 * index, 2 * index + 1]
        assert float(pairs[index]) == pytest.approx(least_squares_error(hessian, weight, left(12, gone)), rel=1e-9)


def test_costs_add_up_over_removals_until_little_is_left() -> None:
    hessian, weight = problem(20, 6)
    task = Elimination(hessian, weight)
    gone: list[int] = []
    lost = 0.0
    for step in ([3], [7, 1, 19], [0, 2], [12, 5, 8, 9], [18], [4, 6, 10, 11, 13]):  # the matrices shrink on the way
        lost += task.remove(torch.tensor(step))
        gone += step
        assert lost == pytest.approx(least_squares_error(hessian, weight, left(20, gone)), rel=1e-8)
        rest = torch.tensor(left(20, gone))
        for unit, cost in zip(rest.tolist(), task.costs(rest.reshape(-1, 1)).tolist(), strict=True):
            total = least_squares_error(hessian, weight, left(20, [*gone, unit]))
            assert lost + cost == pytest.approx(total, rel=1e-8)


def test_a_clone_goes_its_own_way() -> None:
    hessian, weight = problem(8, 3)
    task = Elimination(hessian, weight)
    task.remove(torch.tensor([2]))
    copy = task.clone()
    before = task.costs(torch.tensor([[4], [5]]))
    copy.remove(torch.tensor([0, 1, 3]))
    assert torch.equal(task.costs(torch.tensor([[4], [5]])), before)
    assert not torch.equal(copy.costs(torch.tensor([[4], [5]])), before)


@pytest.mark.parametrize("step", [1, 3])
def test_a_sweep_takes_the_cheapest_and_knows_the_error_at_every_width(step: int) -> None:
    first, second = problem(12, 4), problem(24, 4, seed=1)
    blocks = [torch.arange(12).reshape(-1, 1), torch.arange(24).reshape(-1, 2)]
    order, errors = sweep([Elimination(*first), Elimination(*second)], blocks, step=step, least=2)
    assert len(order) == len(errors) * step == {1: 10, 3: 9}[step]
    for index, error in enumerate(errors.tolist()):
        gone = order[: (index + 1) * step].tolist()
        expected = least_squares_error(*first, left(12, gone))
        expected += least_squares_error(*second, left(24, [2 * unit + part for unit in gone for part in (0, 1)]))
        assert error == pytest.approx(expected, rel=1e-8)
    if step == 1:
        alone = [
            least_squares_error(*first, left(12, [unit]))
            + least_squares_error(*second, left(24, [2 * unit, 2 * unit + 1]))
            for unit in range(12)
        ]
        assert int(order[0]) == alone.index(min(alone))


def test_independent_inputs_go_by_their_own_energy() -> None:
    energies = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0], dtype=torch.float64)
    task = Elimination(torch.diag(energies), torch.ones(6, 1, dtype=torch.float64))
    order, errors = sweep([task], [torch.arange(6).reshape(-1, 1)], step=1, least=1)
    assert order.tolist() == [1, 3, 5, 0, 2]
    assert errors.tolist() == pytest.approx([0.5, 1.25, 2.25, 3.75, 5.75])


def test_a_sweep_can_go_on() -> None:
    hessian, weight = problem(9, 4)
    blocks = [torch.arange(9).reshape(-1, 1)]
    whole, errors = sweep([Elimination(hessian, weight)], blocks, step=1, least=2)
    task = Elimination(hessian, weight)
    first, one = sweep([task], blocks, step=1, least=6)
    mask = torch.ones(9, dtype=torch.bool)
    mask[first] = False
    rest, two = sweep([task], blocks, step=1, least=2, left=mask)
    assert torch.equal(torch.cat([first, rest]), whole)
    torch.testing.assert_close(torch.cat([one, one[-1] + two]), errors)


def test_gains_and_costs_of_swaps_are_those_of_least_squares() -> None:
    hessian, weight = problem(10, 4)
    kept = torch.ones(10, dtype=torch.bool)
    kept[[1, 4, 8]] = False
    inside, outside = torch.where(kept)[0].tolist(), [1, 4, 8]
    now = least_squares_error(hessian, weight, inside)
    gains, costs = swap_gains(hessian, weight, kept)
    for gain, unit in zip(gains.tolist(), outside, strict=True):
        assert gain == pytest.approx(now - least_squares_error(hessian, weight, sorted([*inside, unit])), rel=1e-7)
    for cost, unit in zip(costs.tolist(), inside, strict=True):
        fewer = [other for other in inside if other != unit]
        assert cost == pytest.approx(least_squares_error(hessian, weight, fewer) - now, rel=1e-7)


def test_with_a_metric_of_outputs_the_error_is_weighed_by_it() -> None:
    hessian, weight = problem(6, 4)
    metric, _ = problem(4, 1, seed=5)
    root = matrix_root(metric)
    torch.testing.assert_close(root @ root, metric)
    cost = float(Elimination(hessian, weight @ root).costs(torch.tensor([[2]]))[0])
    kept = left(6, [2])
    solution = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight)
    change = weight.clone()
    change[kept] -= solution
    assert cost == pytest.approx(0.5 * float(torch.trace(change.T @ hessian @ change @ metric)), rel=1e-8)


@pytest.mark.parametrize("rule", ["mean", "median", "channel"])
def test_damping_adds_a_share_of_the_diagonal(rule: str) -> None:
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 1000.0]))
    expected = {"mean": 0.1 * 1003 / 3, "median": 0.1 * 2.0, "channel": torch.tensor([0.1, 0.2, 0.0, 100.0])}[rule]
    result = damped(gram, 0.1, rule)  # type: ignore[arg-type]
    wanted = gram.diagonal().double() + expected
    wanted[2] = 1.0  # an input that is always 0
    torch.testing.assert_close(result.diagonal(), wanted, rtol=1e-6, atol=0)
    assert gram[2, 2] == 0


def test_dead_inputs_cost_nothing() -> None:
    hessian, weight = problem(5, 3)
    hessian[3], hessian[:, 3], weight[3] = 0, 0, 0
    task = Elimination(damped(hessian, 1e-6), weight)
    costs = task.costs(torch.arange(5).reshape(-1, 1))
    assert float(costs[3]) == 0
    assert all(float(costs[other]) > 1e-3 for other in (0, 1, 2, 4))


def test_bad_numbers_are_refused() -> None:
    broken = torch.eye(4)
    broken[1, 2] = float("nan")
    with pytest.raises(CalibrationError, match="holds NaN or infinity"):
        damped(broken, 0.01)
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(CalibrationError, match="6 inputs is not positive definite; use a larger damping"):
        Elimination(x.T @ x - 1e-6 * torch.eye(6), torch.ones(6, 2))


def test_greedy_is_near_the_best_of_all_sets() -> None:
    hessian, weight = problem(8, 3)
    order, errors = sweep([Elimination(hessian, weight)], [torch.arange(8).reshape(-1, 1)], step=1, least=5)
    best = min(least_squares_error(hessian, weight, list(kept)) for kept in itertools.combinations(range(8), 5))
    assert best <= float(errors[-1]) * (1 + 1e-9)
    assert float(errors[-1]) <= 1.5 * best
    assert len(set(order.tolist())) == 3


def test_damping_grows_until_there_is_a_factor_and_not_without_end() -> None:
    values = torch.tensor([1e4, 1.0, 1.0, -3e-3], dtype=torch.float64)  # what rounding leaves of a rank that is missing
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    gram = turn @ torch.diag(values) @ turn.T
    scale = float(gram.diagonal().median())
    matrix, used = positive_definite(gram, 1e-3 / scale)
    assert used == pytest.approx(1e-2 / scale)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    assert positive_definite(torch.eye(3), 0.01)[1] == 0.01
    with pytest.raises(CalibrationError, match="not positive definite even with a damping"):
        positive_definite(gram, 1e-9 / scale)
