"""Hard-concrete gates: probabilities, values, gradients, ends of the range, reproducibility, precision."""

from __future__ import annotations

import math

import pytest
import torch

from fxprune.core.errors import UsageError
from fxprune.learned.hard_concrete import (
    BETA,
    LEFT,
    RIGHT,
    HardConcrete,
    log_alpha_of,
    open_probability,
    ranked_log_alpha,
    sampled_gate,
    soft_gate,
)


def by_hand(log_alpha: float, u: float) -> float:
    """The formula of the paper, in plain Python."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


def test_the_constants_are_those_of_the_paper() -> None:
    assert (LEFT, RIGHT, BETA) == (-0.1, 1.1, 2 / 3)


@pytest.mark.parametrize("log_alpha", [-3.0, -0.4, 0.0, 2.5])
@pytest.mark.parametrize("u", [0.01, 0.3, 0.77, 0.999])
def test_a_gate_is_what_the_formula_says(log_alpha: float, u: float) -> None:
    found = sampled_gate(torch.tensor(log_alpha, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
    assert float(found) == pytest.approx(by_hand(log_alpha, u), abs=1e-12)


def test_the_open_probability_is_the_share_of_draws_that_are_not_zero() -> None:
    gates = HardConcrete(torch.tensor([-4.0, -1.6, 0.0, 2.0]).repeat_interleave(200_000))
    share = (gates.sample(torch.Generator().manual_seed(0)) > 0).float().reshape(4, -1).mean(1)
    torch.testing.assert_close(share, gates.open_probability().detach().reshape(4, -1)[:, 0], atol=5e-3, rtol=0)
    p = open_probability(torch.tensor([-7.0, 0.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(open_probability(log_alpha_of(p)), p)


def test_gradients_equal_finite_differences_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    log_alpha = torch.randn(40, generator=generator, dtype=torch.float64, requires_grad=True)
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: sampled_gate(a, u), (log_alpha,))
    assert torch.autograd.gradcheck(soft_gate, (log_alpha,))
    assert torch.autograd.gradcheck(open_probability, (log_alpha,))
    # And float32, which is trained in, agrees with float64.
    single = log_alpha.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(sampled_gate(log_alpha, u).sum(), log_alpha)
    (found,) = torch.autograd.grad(sampled_gate(single, u.float()).sum(), single)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_draws_at_the_ends_give_finite_gates_and_gradients() -> None:
    log_alpha = torch.tensor([-80.0, 0.0, 80.0]).repeat(3).requires_grad_()
    u = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1e-30, 0.5, 1 - 2**-24])
    gate = sampled_gate(log_alpha, u)
    gate.sum().backward()
    assert log_alpha.grad is not None
    assert bool(torch.isfinite(gate).all())
    assert bool(torch.isfinite(log_alpha.grad).all())
    assert gate.detach().tolist() == [0, 0, 1, 0, 1, 1, 0, 0.5, 1]


def test_equal_seeds_give_equal_gates_and_others_do_not() -> None:
    gates = HardConcrete.closed_with((5, 4), 0.5)
    one, same, other = (gates.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_initial_drop_rate_is_the_probability_of_a_closed_gate() -> None:
    for rate in (0.01, 0.3):
        closed = 1 - HardConcrete.closed_with((3,), rate).open_probability()
        torch.testing.assert_close(closed.detach(), torch.full((3,), rate), atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="initial drop rate must lie between 0 and 1, got 1"):
        HardConcrete.closed_with((3,), 1.0)


def test_gates_can_be_given_by_their_probabilities() -> None:
    wanted = torch.tensor([[0.0, 0.2], [0.9, 1.0]])
    torch.testing.assert_close(HardConcrete.of(wanted).open_probability().detach(), wanted, atol=2e-6, rtol=0)
    with pytest.raises(UsageError, match="must lie in"):
        HardConcrete.of(torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize("count", [0.5, 3.0, 19.25])
def test_a_warm_start_orders_gates_by_score_and_expects_the_count(count: float) -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(2)).pow(8) * 1e6
    log_alpha = ranked_log_alpha(scores, count)
    assert float(open_probability(log_alpha.double()).sum()) == pytest.approx(count, abs=1e-4)
    assert torch.equal(torch.argsort(log_alpha), torch.argsort(scores))


def test_a_warm_start_gives_equal_scores_equal_gates_and_refuses_what_it_cannot_do() -> None:
    log_alpha = ranked_log_alpha(torch.tensor([1.0, 5.0, 1.0, 7.0]), 2)
    assert float(log_alpha[0]) == float(log_alpha[2]) < float(log_alpha[1]) < float(log_alpha[3])
    for count in (0, 4, float("nan")):
        with pytest.raises(UsageError, match="cannot be the expected number open"):
            ranked_log_alpha(torch.rand(4), count)
    with pytest.raises(UsageError, match="not finite"):
        ranked_log_alpha(torch.tensor([1.0, float("inf")]), 1)


def test_deterministic_gates_are_as_many_as_expected_and_never_none() -> None:
    gates = HardConcrete.of(torch.tensor([0.9, 0.05, 0.8, 0.35, 0.4]))  # 2.5 expected; rounding is to the even
    value = gates.deterministic()
    assert (value > 0).tolist() == [True, False, True, False, False]
    torch.testing.assert_close(value[[0, 2]], gates.soft().detach()[[0, 2]])
    # Many that are rarely open: their soft values are 0, and yet as many stay as were paid for.
    rare = HardConcrete.of(torch.full((20,), 0.25))
    assert float(rare.soft().max()) == 0
    assert int((rare.deterministic() > 0).sum()) == 5
    assert int((HardConcrete.of(torch.full((4,), 1e-3)).deterministic() > 0).sum()) == 1


def test_gates_stay_in_float32_when_the_model_goes_to_bfloat16() -> None:
    gates = HardConcrete(torch.tensor([1.2345678, -0.1234567]))
    before = gates.log_alpha.detach().clone()
    moved = torch.nn.Sequential(torch.nn.Linear(2, 2), gates).to(torch.bfloat16)
    assert moved[0].weight.dtype is torch.bfloat16
    assert gates.log_alpha.dtype is torch.float32
    assert torch.equal(gates.log_alpha.detach(), before)
    assert gates.sample().dtype is gates.soft().dtype is gates.open_probability().dtype is torch.float32
    assert "expected_open=1." in repr(gates)
