"""FLAP: what fluctuates least goes first, a KV head is worth its best head, and the mean of what goes is put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxprune.calibration.activations import ChannelStatistics, collect_statistics
from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.passes.flap import Flap, fluctuation_curve, unit_scores
from fxprune.runtimes.runners import GraphRunner
from fxprune.structured.curves import Limits
from fxprune.tracing.nodes import get_attribute
from tests.families import located
from tests.units import attention, mlp

SMALL = CalibrationSpec("self", samples=6, seq_len=12, seed=3)


def test_channels_that_never_change_go_first() -> None:
    program = located("llama")
    assert program.source is not None
    runner = GraphRunner(program.graph_module, program.interface)
    tokens = calibration_set(SMALL, tokenizer=None, runner=runner, config=program.source.config).tokens
    group = program.group("model.layers.0.mlp")
    name = "model.layers.0.mlp.down_proj"
    statistics = collect_statistics(program.graph_module, program.interface, [name], tokens)
    variance = statistics[name].variance.clone()
    variance[[3, 5, 7]] = 0
    still = {name: ChannelStatistics(statistics[name].mean, variance, statistics[name].tokens)}
    weight = {name: get_attribute(program.graph_module, name).weight.detach()}
    scores = unit_scores(group, weight, still)
    assert scores.shape == (20,)
    assert set(np.argsort(scores)[:3].tolist()) == {3, 5, 7}
    larger = {name: weight[name] * torch.where(torch.arange(20) == 11, 30.0, 1.0)}
    assert int(np.argmax(unit_scores(group, larger, still))) == 11


def test_scores_are_standardised_and_a_head_has_the_mean_of_its_channels() -> None:
    variance = torch.arange(1.0, 13.0, dtype=torch.float64)
    statistics = {"a.o": ChannelStatistics(torch.zeros(12, dtype=torch.float64), variance, 9)}
    weights = {"a.o": torch.ones(1, 12)}
    heads = unit_scores(attention("a", 2, 2, dim=3), weights, statistics)
    spread = float(np.arange(1, 13).std())
    np.testing.assert_allclose(heads, (np.array([2.0, 5, 8, 11]) - 6.5) / spread)


def test_the_loss_is_damage_times_parameters_and_a_kv_head_is_worth_its_best() -> None:
    scores = np.array([1.0, 4.0, 2.0, 3.0])
    curve = fluctuation_curve(mlp("m", 4, cost=5), scores, Limits(1, 0.1))
    assert [level.loss for level in curve.levels] == [0, 5, 15, 30]
    heads = fluctuation_curve(attention("a", 2, 2, cost=10, shared=7), scores, Limits(8, 0.1))
    # Whole KV heads: their best head times 2 * 10 + 7 parameters. Query heads: their own score times 10.
    assert {level.kept: level.loss for level in heads.levels} == {
        (0, 1, 2, 3): 0,
        (0, 1): pytest.approx(3 * 27),
        (1, 3): pytest.approx(1 * 10 + 2 * 10),
        (1,): pytest.approx(1 * 10 + 3 * 27),
    }


def test_the_bias_is_near_what_the_removed_channels_add_on_average() -> None:
    program = located("llama")
    options = {"samples": 16, "seq_len": 16, "seed": 3, "round_to": 4, "forward_dtype": "float32"}
    step = Flap(ratio=0.3, **options)  # type: ignore[arg-type]
    budgets = step.budgets(program)
    pruned = step.apply(program, budgets, 0).program
    assert pruned.plan is not None
    names = [layer["name"] for layer in pruned.results["structured"]["consumers"] if layer["bias"]]
    assert len(names) >= 2
    first = next(group for group in program.groups if pruned.plan.removed_units(group))
    (piece,) = first.consumers
    name = piece.parameter.removesuffix(".weight")
    mean = collect_statistics(program.graph_module, program.interface, [name], budgets.tokens)[name].mean
    gone = piece.indices[pruned.plan.removed_units(first)].ravel()
    expected = get_attribute(program.graph_module, name).weight.detach().double()[:, gone] @ mean[gone]
    bias = get_attribute(pruned.graph_module, name).bias.detach().double()
    # Tokens are weighed by how loud they are, so it is not quite the mean.
    assert torch.nn.functional.cosine_similarity(bias, expected, dim=0) > 0.9
    assert 0.3 < float(bias.norm() / expected.norm()) < 1.5
    kept = piece.indices[list(pruned.plan.kept_units(first))].ravel()
    weights = [get_attribute(one.graph_module, name).weight[:, kept] for one in (pruned, program)]
    assert torch.equal(*weights)
