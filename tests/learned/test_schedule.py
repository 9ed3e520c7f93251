"""Schedules of the target, and the augmented Lagrangian that holds the sparsity to it."""

from __future__ import annotations

import pytest
import torch

from fxprune.core.errors import UsageError
from fxprune.learned.hard_concrete import HardConcrete
from fxprune.learned.schedule import AugmentedLagrangian, SparsitySchedule


def test_a_linear_schedule_rises_evenly_and_stays() -> None:
    schedule = SparsitySchedule(0.5, 10, 20)
    assert [schedule.at(step) for step in (0, 1, 5, 10, 19)] == pytest.approx([0, 0.05, 0.25, 0.5, 0.5])
    assert [schedule.reached(step) for step in (9, 10)] == [False, True]
    assert SparsitySchedule(0.5, 0, 1).at(0) == 0.5


def test_a_cubic_schedule_is_that_of_zhu_and_gupta() -> None:
    schedule = SparsitySchedule(0.6, 8, 9, "cubic", start=0.2)
    for step in range(9):
        assert schedule.at(step) == pytest.approx(0.6 + (0.2 - 0.6) * (1 - step / 8) ** 3)


def test_a_schedule_that_ends_too_early_is_refused_with_the_fix() -> None:
    with pytest.raises(UsageError, match=r"Use 101 steps or more, or at most 79 warm-up steps"):
        SparsitySchedule(0.5, 100, 80)
    SparsitySchedule(0.5, 100, 101)
    SparsitySchedule(0.5, 79, 80)
    with pytest.raises(UsageError, match="ends at step 5"):
        SparsitySchedule(0.5, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target sparsity must lie between 0 and 1"),
        ({"target": float("nan")}, "target sparsity must lie between 0 and 1"),
        ({"start": 0.7}, "starts at sparsity 0.7"),
        ({"shape": "square"}, "linear or cubic, got 'square'"),
        ({"warm_up_steps": -1}, "impossible"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparsitySchedule(**({"target": 0.5, "warm_up_steps": 5, "steps": 10} | options))  # type: ignore[arg-type]


def test_the_penalty_and_its_gradients_are_the_formula() -> None:
    penalty = AugmentedLagrangian()
    assert float(penalty(torch.tensor(0.3), 0.5)) == 0  # multipliers start at 0
    with torch.no_grad():
        penalty.linear.fill_(-2.0)
        penalty.quadratic.fill_(3.0)
    sparsity = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = penalty(sparsity, 0.5)
    loss.backward()
    assert float(loss) == pytest.approx(-2 * -0.2 + 3 * 0.04)
    assert sparsity.grad is not None
    assert float(sparsity.grad) == pytest.approx(-2 + 2 * 3 * -0.2)
    assert penalty.linear.grad is not None
    assert penalty.quadratic.grad is not None
    assert float(penalty.linear.grad) == pytest.approx(-0.2)
    assert float(penalty.quadratic.grad) == pytest.approx(0.04)


def test_ascent_on_the_multipliers_brings_gates_to_the_target() -> None:
    gates, penalty = HardConcrete.closed_with((200,), 0.01), AugmentedLagrangian()
    schedule = SparsitySchedule(0.4, 60, 400)
    optimizer = torch.optim.AdamW(
        [{"params": gates.parameters(), "lr": 0.1, "weight_decay": 0.0}, penalty.optimizer_group(0.1)]
    )
    for step in range(schedule.steps):
        optimizer.zero_grad()
        penalty(1 - gates.open_probability().mean(), schedule.at(step)).backward()
        optimizer.step()
    assert float(1 - gates.open_probability().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(penalty.quadratic) > 0


def test_multipliers_stay_in_float32() -> None:
    penalty = AugmentedLagrangian().to(torch.bfloat16)
    assert penalty.linear.dtype is penalty.quadratic.dtype is torch.float32
    assert penalty(torch.tensor(0.1, dtype=torch.float64), 0.2).dtype is torch.float32
