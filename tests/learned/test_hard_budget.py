"""Hard budgets: never overrun, filled up, legal, near the exact optimum, with straight-through gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from fxprune.core.errors import PlanError, PreconditionError
from fxprune.learned.gates import ProgramGates, fold_gates, plan_of_gates
from fxprune.learned.hard_budget import BudgetProjector, _allocate, straight_through
from fxprune.passes.locate_layers import LocateLayers
from fxprune.structured.curves import Limits, score_curve
from fxprune.structured.knapsack import Choice, solve
from fxprune.structured.targets import cost_model
from tests.families import located

if TYPE_CHECKING:
    from fxprune.core.program import Program
    from fxprune.learned.hard_budget import Projection
    from fxprune.structured.targets import CostModel

LIMITS = Limits(4, 0.0)


def gated(seed: int, program: Program | None = None) -> ProgramGates:
    gates = ProgramGates(program or located("llama"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in gates.parameters():
        parameter.data.copy_(2 * torch.randn(parameter.shape, generator=generator))
    return gates


def projector(gates: ProgramGates, ratio: float) -> tuple[BudgetProjector, CostModel]:
    program = located("llama")
    model = cost_model("ratio", program, gates.groups)
    return BudgetProjector(gates, model, model.budget(ratio), LIMITS), model


def cost_of(gates: ProgramGates, model: CostModel, found: Projection) -> float:
    kept = {name: torch.nonzero(mask).flatten().tolist() for name, mask in found.kept.items()}
    return model.fixed + sum(model.cost(group, kept[group.name]) for group in gates.groups)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_a_projection_is_legal_within_the_budget_and_leaves_no_room(ratio: float) -> None:
    for seed in range(8):
        gates = gated(seed)
        within, model = projector(gates, ratio)
        found = within.project()
        assert found.cost == pytest.approx(cost_of(gates, model, found))
        assert found.cost <= model.budget(ratio)
        plan = plan_of_gates(gates.groups, {name: mask.float() for name, mask in found.kept.items()})
        for group in gates.groups:
            count = len(plan.kept_units(group))
            assert count >= 1
            if group.kind == "mlp":
                assert count % 4 == 0
                if count < group.units:  # four more channels would be too many
                    wider = found.cost + 4 * group.unit_parameters
                    assert wider > model.budget(ratio)


def test_a_projection_keeps_the_gates_that_are_most_likely_open() -> None:
    checked = 0
    for seed in range(4):
        gates = gated(seed)
        within, _ = projector(gates, 0.5)
        found = within.project()
        for member in gates:
            p, kept = member.open_units().units.detach(), found.kept[member.group.name]
            if member.group.kind == "mlp" and not bool(kept.all()):
                assert float(p[kept].min()) >= float(p[~kept].max())
                checked += 1
    assert checked > 4


def test_groups_are_compared_by_probability_and_not_by_the_size_of_their_units() -> None:
    """A head costs as much as many channels; the likely ones of both stay."""
    gates = ProgramGates(located("llama"))
    for member in gates:
        likely = 3.0 if member.group.kind == "attention" else -3.0
        for parameter in member.parameters():
            parameter.data.fill_(likely)
    within, _ = projector(gates, 0.3)
    kept = {name: float(mask.float().mean()) for name, mask in within.project().kept.items()}
    heads = [kept[g.name] for g in gates.groups if g.kind == "attention"]
    channels = [kept[g.name] for g in gates.groups if g.kind == "mlp"]
    assert heads == [1.0, 1.0]
    assert max(channels) < 1
    assert min(channels) >= 0.2  # the reserved step


def test_greedy_is_within_one_step_of_the_exact_knapsack() -> None:
    """Channels against `fxprune.structured.knapsack` on the same curves, for groups of one kind."""
    program = located("llama")
    gates = ProgramGates(program, kinds=("mlp",))
    model = cost_model("ratio", program, gates.groups)
    worse = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        for parameter in gates.parameters():
            parameter.data.copy_(2 * torch.randn(parameter.shape, generator=generator))
        worth = {g.group.name: g.open_units().units.detach().double().numpy() for g in gates}
        curves = {g.name: score_curve(g, worth[g.name], LIMITS) for g in gates.groups}
        choices = [
            Choice(
                group.name,
                group.kind,
                tuple(len(level.kept) for level in curves[group.name].levels),
                tuple(level.loss for level in curves[group.name].levels),
                tuple(model.cost(group, level.kept) for level in curves[group.name].levels),
            )
            for group in gates.groups
        ]
        exact = solve(choices, model.budget(0.2) - model.fixed)
        found = BudgetProjector(gates, model, model.budget(0.2), LIMITS).project()
        loss = sum(float(row[~found.kept[name].numpy()].sum()) for name, row in worth.items())
        assert loss >= exact.loss - 1e-9
        worse.append(loss - exact.loss)
    # Equal costs and convex losses: greedy is exact.
    assert max(worse) < 1e-6


def test_allocation_is_never_far_from_all_combinations() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        costs = [np.sort(random.uniform(1, 10, 5)) for _ in range(4)]
        losses = [np.append(np.sort(random.uniform(0, 5, 4))[::-1], 0.0) for _ in range(4)]
        least, most = (sum(cost[place] for cost in costs) for place in (0, -1))
        room = random.uniform(least, most)
        found = _allocate(costs, losses, room)
        assert sum(cost[level] for cost, level in zip(costs, found, strict=True)) <= room
        best = min(
            sum(loss[level] for loss, level in zip(losses, levels, strict=True))
            for levels in np.ndindex(5, 5, 5, 5)
            if sum(cost[level] for cost, level in zip(costs, levels, strict=True)) <= room
        )
        value = sum(loss[level] for loss, level in zip(losses, found, strict=True))
        assert best - 1e-9 <= value <= best + 5


def test_forward_is_projected_and_backward_is_not() -> None:
    values = torch.tensor([0.3, 1.0, 0.6], requires_grad=True)
    kept = torch.tensor([True, False, True])
    projected = straight_through(values, kept)
    assert projected.tolist() == pytest.approx([0.3, 0, 0.6])
    (projected * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 10, 100]


def test_closed_gates_get_gradients_through_the_graph() -> None:
    program = located("llama")
    gates = ProgramGates(program, drop_rate=0.3)
    for member in gates:  # heads are open, so that channels go
        if member.group.kind == "attention":
            for parameter in member.parameters():
                parameter.data.fill_(3.0)
    model = cost_model("ratio", program, gates.groups)
    within = BudgetProjector(gates, model, model.budget(0.3), LIMITS)
    found = within.project()
    values = within.apply(gates.soft(), found)
    assert all(bool((values[name][~kept] == 0).all()) for name, kept in found.kept.items())
    with gates.applied(values) as masked:
        masked(*program.interface.example_inputs.values())[0].square().mean().backward()
    assert any(not bool(kept.all()) for kept in found.kept.values())
    for member in gates:
        if not bool(found.kept[member.group.name].all()):
            assert member.group.kind == "mlp"
            (grad,) = [p.grad for p in member.parameters()]
            assert grad is not None
            assert bool((grad[~found.kept[member.group.name]] != 0).any())
    for parameter in program.graph_module.parameters():
        parameter.grad = None


def test_decided_gates_fold_into_a_plan_within_the_budget() -> None:
    """Also those whose soft value is 0 though they are kept."""
    program = located("llama")
    gates = gated(1)
    for parameter in gates.parameters():
        parameter.data.sub_(6)
    within, model = projector(gates, 0.4)
    assert any(float(value.min()) == 0 for value in gates.soft().values())
    folded = fold_gates(program, within.decided())
    assert folded.plan is not None
    kept = {name: torch.zeros(program.group(name).units, dtype=torch.bool) for name in folded.plan.kept}
    for name, units in folded.plan.kept.items():
        kept[name][list(units)] = True
    assert all(torch.equal(mask, within.project().kept[name]) for name, mask in kept.items())
    assert 0 <= model.budget(0.4) - within.project().cost < 0.05 * model.budget(0.4)


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    gates = gated(0)
    with pytest.raises(PlanError, match=r"no gates are within 99.* the best reachable is \d+\.\d%"):
        projector(gates, 0.99)
    layered = LocateLayers()(located("llama")).program
    with pytest.raises(PreconditionError, match="not for layers"):
        BudgetProjector(
            ProgramGates(layered, kinds=("mlp", "layers")), cost_model("ratio", layered, layered.groups[:2]), 1e9
        )
    within, _ = projector(gates, 0.5)
    next(iter(gates.parameters())).data[0] = float("nan")
    with pytest.raises(PlanError, match="training has diverged"):
        within.project()
