"""Gates of one group: heads are legal by construction, sizes are exact, warm starts follow the scores."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fxprune.core.errors import PlanError, UsageError
from fxprune.core.groups import AttentionGroup, UnitSlice
from fxprune.learned.expected_size import expected_removed
from fxprune.learned.gates import plan_of_gates
from fxprune.learned.unit_gates import HeadGates, UnitGates


def attention(kv_heads: int = 3, per_kv: int = 2) -> AttentionGroup:
    """Query heads, in an order that interleaves the KV heads; 10 parameters a head, 7 a KV head."""
    units = kv_heads * per_kv
    own = UnitSlice("q.weight", 0, np.arange(units)[:, None], 10, "rows")
    shared = UnitSlice("k.weight", 0, np.arange(kv_heads)[:, None], 7, "rows")
    if per_kv == 1:
        return AttentionGroup("attn", 0, (own,))
    return AttentionGroup("attn", 0, (own,), (shared,), np.arange(units) % kv_heads)


@pytest.mark.parametrize("scheme", ["both", "kv", "slots"])
@pytest.mark.parametrize(("kv_heads", "per_kv"), [(3, 2), (1, 4), (4, 1)])
def test_any_values_make_legal_plans(scheme: str, kv_heads: int, per_kv: int) -> None:
    group = attention(kv_heads, per_kv)
    gates = HeadGates(group, scheme)  # type: ignore[arg-type]
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        for parameter in gates.parameters():
            parameter.data.copy_(3 * torch.randn(parameter.shape, generator=generator) - 1)
        values = gates.deterministic()
        seen.add(plan_of_gates([group], {"attn": values}).kept["attn"])
    assert len(seen) > 2
    assert any(len(kept) < group.units for kept in seen)


def test_which_gates_there_are_follows_from_the_heads() -> None:
    made = {
        (kv, per, scheme): HeadGates(attention(kv, per), scheme)  # type: ignore[arg-type]
        for kv, per in ((3, 2), (1, 4), (4, 1))
        for scheme in ("both", "kv", "slots")
    }
    counts = {
        key: tuple(0 if p is None else p.log_alpha.numel() for p in (gates.kv, gates.slots))
        for key, gates in made.items()
    }
    assert counts[3, 2, "both"] == (3, 2)
    assert counts[3, 2, "kv"] == (3, 0)
    assert counts[3, 2, "slots"] == (0, 2)
    assert {counts[1, 4, s] for s in ("both", "kv", "slots")} == {(0, 4)}
    assert {counts[4, 1, s] for s in ("both", "kv", "slots")} == {(4, 0)}


@pytest.mark.parametrize("scheme", ["both", "kv", "slots"])
def test_expected_size_is_the_mean_over_all_patterns_of_gates(scheme: str) -> None:
    group = attention()
    gates = HeadGates(group, scheme).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in gates.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    kv = torch.ones(3) if gates.kv is None else gates.kv.open_probability().detach()
    slots = torch.ones(2) if gates.slots is None else gates.slots.open_probability().detach()
    mean = 0.0
    for a, b in itertools.product(itertools.product((0, 1), repeat=3), itertools.product((0, 1), repeat=2)):
        on_kv, on_slots = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
        chance = (on_kv * kv + (1 - on_kv) * (1 - kv)).prod() * (on_slots * slots + (1 - on_slots) * (1 - slots)).prod()
        kept = torch.nonzero(gates.spread(on_kv, on_slots)).flatten().tolist()
        mean += float(chance) * group.parameters_removed(kept)
    assert float(expected_removed(group, gates.open_units())) == pytest.approx(mean, rel=1e-6)


def test_a_drop_rate_is_that_of_a_head() -> None:
    for scheme in ("both", "kv", "slots"):
        closed = 1 - HeadGates(attention(), scheme, 0.1).open_units().units  # type: ignore[arg-type]
        torch.testing.assert_close(closed.detach(), torch.full((6,), 0.1), atol=1e-6, rtol=0)


def test_a_warm_start_gives_the_best_head_of_each_kv_head_the_first_place() -> None:
    gates = HeadGates(attention())
    scores = torch.tensor([1.0, 9.0, 2.0, 5.0, 3.0, 8.0])  # KV head 0 has the heads 0 and 3, and so on
    gates.start_from(scores, 4)
    assert gates.order.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert gates.kv is not None
    assert gates.slots is not None
    assert torch.argsort(gates.kv.log_alpha).tolist() == [0, 2, 1]  # sums 6, 12, 10
    assert gates.slots.log_alpha[0] > gates.slots.log_alpha[1]
    assert float(gates.open_units().units.sum()) == pytest.approx(4, abs=1e-3)
    # The values of heads follow the order.
    value = gates.spread(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5]))
    assert value.tolist() == [0.5, 2.0, 1.5, 1.0, 1.0, 3.0]
    order = gates.state_dict()["order"]
    again = HeadGates(attention())
    again.load_state_dict(gates.state_dict())
    assert torch.equal(again.order, order)


def test_channels_start_from_scores_too() -> None:
    group = attention(4, 1)
    gates = UnitGates(group)
    gates.start_from(torch.tensor([0.1, 4.0, 0.2, 3.0]), 2)
    assert torch.argsort(gates.gates.log_alpha).tolist() == [0, 2, 3, 1]
    assert (gates.deterministic() > 0).tolist() == [False, True, False, True]
    with pytest.raises(UsageError, match="attn: scores of 4 query heads are needed"):
        gates.start_from(torch.rand(3), 2)


def test_kv_heads_that_serve_different_numbers_are_refused() -> None:
    uneven = dataclasses.replace(attention(), sharing=np.array([0, 0, 0, 1, 1, 2]))
    with pytest.raises(PlanError, match="gates cannot be legal"):
        HeadGates(uneven)
