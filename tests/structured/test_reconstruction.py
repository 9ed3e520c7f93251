"""Reconstruction: exact where the dense output can be had, a ridge that new tokens prefer, mask tuning by the book."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.calibration.gram import Gram
from fxprune.calibration.stages import InputSite
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import insert_masks
from fxprune.runtimes.runners import GraphRunner
from fxprune.structured.reconstruct_consumers import consumers_of, reconstruct_consumers
from fxprune.structured.reconstruction import (
    PairCollector,
    PairMoments,
    dense_ridge,
    moments_of_gram,
    reconstruct,
    tune_mask,
)
from fxprune.tracing.nodes import get_attribute
from tests.families import located


def rows(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(pruned: Tensor, weight: Tensor, dense: Tensor | None = None) -> PairMoments:
    """Moments of rows that all count alike."""
    out = (pruned if dense is None else dense) @ weight
    ones = torch.cat([pruned, torch.ones(len(pruned), 1, dtype=torch.float64)], 1)
    tokens = len(ones)
    return PairMoments(ones.T @ ones / tokens, ones.T @ out / tokens, float(out.square().sum()) / tokens, tokens)


def mask(inputs: int, *gone: int) -> Tensor:
    kept = torch.ones(inputs, dtype=torch.bool)
    kept[list(gone)] = False
    return kept


def applied(x: Tensor, found: Any) -> Tensor:
    return x @ found.weight + (0 if found.bias is None else found.bias)


# --- solving one consumer --------------------------------------------------------------------------------------------


def test_what_others_say_too_is_recovered_exactly() -> None:
    x = rows(60, 6)
    x[:, 4] = 2 * x[:, 0] - x[:, 3] + 5  # what goes is known from what stays, and a constant
    weight = rows(6, 4, seed=1)
    kept = mask(6, 4)
    found = reconstruct(weight, kept, moments(x, weight), None, mode="ridge", ridges=(0.0,))
    torch.testing.assert_close(applied(x, found), x @ weight, rtol=0, atol=1e-4)
    assert found.choice == "ridge 0"
    assert found.error < 1e-9
    assert found.plain > 1e-2
    assert not found.weight[4].any()
    without = reconstruct(weight, kept, moments(x, weight), None, mode="ridge", bias=False, ridges=(0.0,))
    assert without.bias is None
    assert without.error > 1e-3  # the constant is out of reach


def test_least_squares_is_that_of_the_normal_equations_toward_the_weights_that_are_there() -> None:
    dense, weight = rows(80, 5), rows(5, 3, seed=1)
    pruned = dense + 0.3 * rows(80, 5, seed=2)
    kept = mask(5, 1, 3)
    found = reconstruct(weight, kept, moments(pruned, weight, dense), None, mode="ridge", ridges=(0.2,))
    ones = torch.cat([pruned[:, kept], torch.ones(80, 1, dtype=torch.float64)], 1)
    start = torch.cat([weight[kept], torch.zeros(1, 3, dtype=torch.float64)])
    strength = (0.2 * (ones**2).sum(0)).sqrt()
    system = torch.cat([ones, torch.diag(strength)])
    target = torch.cat([dense @ weight, strength[:, None] * start])
    solution = torch.linalg.lstsq(system, target).solution
    torch.testing.assert_close(found.weight[kept], solution[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, solution[-1], rtol=1e-4, atol=1e-5)
    error = (applied(pruned, found) - dense @ weight).square().sum() / (dense @ weight).square().sum()
    assert found.error == pytest.approx(float(error), rel=1e-9)


def test_the_bias_alone_is_the_mean_of_what_goes() -> None:
    x = rows(50, 5) + 3
    weight = rows(5, 4, seed=1)
    found = reconstruct(weight, mask(5, 2), moments(x, weight), None, mode="bias")
    torch.testing.assert_close(found.bias, x[:, 2].mean() * weight[2], rtol=1e-4, atol=1e-6)
    assert torch.equal(found.weight, weight * mask(5, 2)[:, None])
    assert found.choice == "bias"
    forbidden = reconstruct(weight, mask(5, 2), moments(x, weight), None, mode="bias", bias=False)
    assert (forbidden.choice, forbidden.bias) == ("none", None)


def test_the_ridge_is_chosen_on_tokens_that_the_fit_has_not_seen() -> None:
    inputs, ridges = 20, (0.0, 0.1, 1.0, 10.0)
    weight, kept = rows(inputs, 8, seed=1), mask(inputs, *range(4))
    few, held = moments(rows(18, inputs, seed=2), weight), moments(rows(400, inputs, seed=3), weight)
    errors = {}
    for ridge in ridges:
        alone = reconstruct(weight, kept, few, None, mode="ridge", ridges=(ridge,))
        new = torch.cat([alone.weight, torch.zeros(1, 8) if alone.bias is None else alone.bias[None]])
        errors[f"ridge {ridge:g}"] = held.error(new)
    found = reconstruct(weight, kept, few, held, mode="ridge", ridges=ridges)
    assert found.choice == min(errors, key=errors.__getitem__) != "ridge 0"
    assert found.error == pytest.approx(errors[found.choice])
    # Inputs that know nothing of each other: where any change is a fit of noise, nothing changes.
    assert reconstruct(weight, kept, few, held, mode="auto", ridges=(0.0,)).choice in {"none", "bias"}
    # What was chosen is fitted on all tokens.
    both = reconstruct(weight, kept, few + held, None, mode="ridge", ridges=(float(found.choice.split()[1]),))
    torch.testing.assert_close(found.weight, both.weight)


def test_moments_add_up() -> None:
    one, two, weight = rows(30, 4), rows(50, 4, seed=1), rows(4, 3, seed=2)
    both, whole = moments(one, weight) + moments(two, weight), moments(torch.cat([one, two]), weight)
    assert both.tokens == 80
    torch.testing.assert_close(both.gram, whole.gram)
    torch.testing.assert_close(both.target, whole.target)
    assert both.energy == pytest.approx(whole.energy)


def test_nothing_changes_where_nothing_goes_or_nothing_may() -> None:
    x, weight = rows(50, 5), rows(5, 4, seed=1)
    for kept, mode in ((mask(5), "ridge"), (mask(5, 1), "none")):
        found = reconstruct(weight, kept, moments(x, weight), None, mode=mode)  # type: ignore[arg-type]
        assert torch.equal(found.weight, weight * kept[:, None])
        assert (found.choice, found.bias, found.error) == ("none", None, found.plain)


# --- mask tuning -----------------------------------------------------------------------------------------------------


def test_mask_tuning_is_least_squares_over_one_factor_a_unit() -> None:
    x, weight = rows(200, 8), rows(8, 3, seed=1)
    x[:, 6] += x[:, 0]
    unit_of = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1])
    kept = mask(8, 2, 3)
    factors = tune_mask(weight, kept, moments(x, weight), unit_of)
    # Columns of the least-squares problem: what each unit puts out, over all tokens and outputs.
    parts = [x[:, unit_of == unit] @ weight[unit_of == unit] for unit in (0, 2, 3)]
    system = torch.stack([part.reshape(-1) for part in parts], 1)
    target = (x @ weight - x[:, 7:] @ weight[7:]).reshape(-1)
    strength = (0.01 * (system**2).sum(0).mean()).sqrt()
    system = torch.cat([system, strength * torch.eye(3, dtype=torch.float64)])
    target = torch.cat([target, strength * torch.ones(3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
    torch.testing.assert_close(factors[[0, 4, 6]], expected)
    assert torch.equal(factors[[0, 4]], factors[[1, 5]])
    assert factors[[2, 3, 7]].tolist() == [0, 0, 1]
    found = reconstruct(weight, kept, moments(x, weight), None, mode="scale", unit_of=unit_of)
    torch.testing.assert_close(found.weight, weight * factors[:, None])
    assert found.error < found.plain
    assert found.bias is None


def test_factors_beyond_ten_are_refused() -> None:
    x = rows(100, 2)
    x[:, 1] = 0.01 * x[:, 0]
    weight = torch.ones(2, 3, dtype=torch.float64)
    assert tune_mask(weight, mask(2, 0), moments(x, weight), torch.tensor([0, 1])).tolist() == [0, 1]


# --- collecting ------------------------------------------------------------------------------------------------------


def test_moments_are_weighed_by_how_loud_a_token_is_and_late_samples_are_held_out() -> None:
    site = InputSite("x", None, ("down",), 0)
    weight = rows(3, 4, seed=9).float()
    pruned, dense = rows(10, 4).float(), rows(10, 4, seed=1).float()
    dense[0] *= 1000  # one loud token
    collector = PairCollector({"down": weight}, held_out=4)
    collector.add(site, pruned, dense, None, first=0)
    collector.add(site, dense, pruned, None, first=4)
    collector.finish()
    fit, held = collector.moments["down"]
    assert held is not None
    energy = (dense @ weight.T).square().sum(1)
    counts = (1 / (1 + energy / energy.median())).double()
    assert float(counts[0]) < 1e-3
    assert float(counts[1:].mean()) > 0.2
    ones = torch.cat([pruned.double(), torch.ones(10, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(fit.gram, ones.T @ (counts[:, None] * ones) / 10, rtol=1e-4, atol=1e-5)
    out = dense.double() @ weight.double().T
    torch.testing.assert_close(fit.target, ones.T @ (counts[:, None] * out) / 10, rtol=1e-4, atol=1e-4)
    assert fit.energy == pytest.approx(float((counts[:, None] * out.square()).sum() / 10), rel=1e-4)
    other = dense.double().T @ dense.double() / 10
    assert not torch.allclose(held.gram[:-1, :-1], other)
    assert (fit.tokens, held.tokens) == (10, 10)


def test_targets_ask_back_as_much_of_what_was_lost_before_as_drift_says() -> None:
    site = InputSite("x", None, ("down",), 0)
    weight = torch.eye(4)
    pruned, dense = rows(10, 4).float(), rows(10, 4, seed=1).float()
    found = {}
    for drift in (0.0, 0.25, 1.0):
        collector = PairCollector({"down": weight}, held_out=9, drift=drift)
        collector.add(site, pruned, dense, None, first=0)
        collector.finish()
        fit, _ = collector.moments["down"]
        aim = pruned + drift * (dense - pruned)
        energy = aim.square().sum(1)
        counts = 1 / (1 + energy / energy.median())
        torch.testing.assert_close(fit.target[:-1].float(), pruned.T @ (counts[:, None] * aim) / 10)
        found[drift] = fit
    assert reconstruct(weight.double(), mask(4), found[0.0], None, mode="ridge").plain == pytest.approx(0, abs=1e-6)
    assert reconstruct(weight.double(), mask(4), found[1.0], None, mode="ridge").plain > 0.1


def test_moments_of_a_gram_matrix_are_those_of_its_tokens() -> None:
    x, weight = rows(40, 5), rows(5, 3, seed=1)
    of_rows, of_gram = moments(x, weight), moments_of_gram(Gram(x.T @ x, 40), weight)
    torch.testing.assert_close(of_gram.gram[:-1, :-1], of_rows.gram[:-1, :-1])
    torch.testing.assert_close(of_gram.target[:-1], of_rows.target[:-1])
    assert of_gram.energy == pytest.approx(of_rows.energy)
    found = [
        reconstruct(weight, mask(5, 2), one, None, mode="ridge", bias=False, ridges=(0.1,))
        for one in (of_rows, of_gram)
    ]
    torch.testing.assert_close(found[0].weight, found[1].weight)


def test_fewer_tokens_for_each_input_make_the_ridge_stronger() -> None:
    assert dense_ridge(1536, 65536) == dense_ridge(10, 10**9) == 0.1
    assert dense_ridge(1536, 4096) == pytest.approx(1.5)


def test_samples_that_are_all_held_out_or_broken_are_refused() -> None:
    site = InputSite("x", None, ("down",), 0)
    collector = PairCollector({"down": torch.ones(3, 4)}, held_out=0)
    collector.add(site, torch.ones(5, 4), None, None, first=0)
    with pytest.raises(CalibrationError, match="down: no sample is left to fit"):
        collector.finish()
    broken = PairCollector({"down": torch.ones(3, 4)}, held_out=9)
    broken.add(site, torch.full((5, 4), float("nan")), None, None, first=0)
    with pytest.raises(CalibrationError, match="down read NaN or infinite values"):
        broken.finish()


# --- through the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ridge", "auto", "scale", "bias"])
def test_the_model_comes_nearer_to_the_dense_one(mode: Any) -> None:
    program = located("llama")
    groups = program.groups
    plan = Plan.of({g.name: range(2, g.units) if g.kind == "mlp" else (0, 1, 3, 4) for g in groups})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (96 if mode == "auto" else 24, 12), generator=generator)
    consumers = consumers_of(groups, plan, program.graph_module)
    rebuilt, layers = reconstruct_consumers(
        program, consumers, tokens, mode=mode, biases=True, forward_dtype=None, batch_size=4
    )
    assert {layer["name"] for layer in layers} == set(consumers)
    assert all(layer["error"] <= layer["plain_error"] + 1e-12 for layer in layers)
    assert any(layer["choice"] != "none" for layer in layers)

    def distance(one: Any) -> float:
        masked = insert_masks(one.graph_module, groups, plan)
        ids = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(12).expand(8, 12).contiguous()
        runs = [
            GraphRunner(graph, program.interface).step(ids, torch.ones_like(ids), positions, None)[0]
            for graph in (program.graph_module, masked)
        ]
        return float((runs[0] - runs[1]).square().mean())

    if mode != "bias":  # a mean alone helps its own layer, not surely the model
        assert distance(rebuilt) < distance(program)
    for name, consumer in consumers.items():
        weight = get_attribute(rebuilt.graph_module, name).weight
        assert weight.dtype is torch.float32
        if mode != "bias":
            assert not weight.detach()[:, ~consumer.kept].any()


def test_a_ridge_that_is_too_weak_for_the_moments_is_passed_over() -> None:
    x, weight = rows(50, 5), rows(5, 4, seed=1)
    whole = moments(x, weight)
    broken = whole.gram.clone()
    broken[0, 1] = broken[1, 0] = 1.5 * float(broken[0, 0] * broken[1, 1]) ** 0.5  # more than any two inputs share
    fit = PairMoments(broken, whole.target, whole.energy, whole.tokens)
    assert reconstruct(weight, mask(5, 4), fit, whole, mode="ridge", ridges=(0.0, 9.0)).choice == "ridge 9"
    with pytest.raises(CalibrationError, match="stronger ridge"):
        reconstruct(weight, mask(5, 4), fit, whole, mode="ridge", ridges=(0.0,))


def test_few_tokens_leave_least_squares_out_unless_it_is_asked_for() -> None:
    x, weight = rows(45, 5), rows(5, 4, seed=1)
    x[:, 4] = x[:, 0] + x[:, 1]
    kept = mask(5, 4)
    assert reconstruct(weight, kept, moments(x, weight), None, mode="auto").choice in {"none", "bias"}
    assert reconstruct(weight, kept, moments(x, weight), None, mode="ridge").choice.startswith("ridge")
    more = rows(60, 5)
    more[:, 4] = more[:, 0] + more[:, 1]
    assert reconstruct(weight, kept, moments(more, weight), None, mode="auto").choice.startswith("ridge")


def test_the_dense_reconstruction_is_not_run_through_the_model() -> None:
    with pytest.raises(UsageError, match="reconstruct_on_grams"):
        reconstruct_consumers(
            located("llama"),
            {},
            torch.zeros(1, 8, dtype=torch.int64),
            mode="dense",
            biases=False,
            forward_dtype=None,
            batch_size=None,
        )
