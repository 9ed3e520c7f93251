"""Every structured method on one tiny model: legal, nested plans that reach the share and verify; what each is for."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, LayerGroup, MlpGroup
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.program import Program
from fxprune.core.registry import get_pass
from fxprune.passes.depth import DepthPrune, Run, runs_that_reach
from fxprune.passes.fisher import Fisher, rearrange_channels, rearrange_heads, removal_loss
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.locate_layers import LocateLayers
from fxprune.passes.magnitude_units import MagnitudeUnits, norm_curve
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.passes.wanda_sp import input_scores
from fxprune.runtimes.runners import GraphRunner
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import Limits
from fxprune.tracing.trace import trace
from tests.families import LOCATE, build
from tests.units import attention

METHODS = ("fisher", "osscar", "flap", "wanda-sp", "taylor", "magnitude-units", "random", "depth")
OF_UNITS = METHODS[:-1]
SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "intermediate_size": 40}
DEAD = [1, 4, 9, 14, 22, 23, 31, 39]
TEXT: dict[str, Any] = {"samples": 8, "seq_len": 16, "seed": 3}


@functools.cache
def program() -> Program:
    """Three layers of six query heads on two KV heads, 40 channels."""
    return Pipeline([*LOCATE, LocateLayers()])(trace(build("llama", **SHAPE))).program


@functools.cache
def with_dead_channels() -> Program:
    """One layer whose channels `DEAD` do nothing."""
    model = build("llama", num_hidden_layers=1, intermediate_size=40)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[DEAD], mlp.up_proj.weight[DEAD], mlp.down_proj.weight[:, DEAD] = 0, 0, 0
    return Pipeline(LOCATE)(trace(model)).program


def method(name: str, **options: Any) -> StructuredPass:
    """The pass with its options validated as a pipeline does."""
    made = build_pass(name, {**TEXT, **options})
    assert isinstance(made, StructuredPass)
    return made


@functools.cache
def pruned(name: str) -> Program:
    return method(name, ratio=0.3)(program()).program


def removed_share(dense: Program, plan: Plan | None) -> float:
    """Removed share of the block Linears' parameters, counted on the dense model's own slim form."""
    sizes = [
        block_linear_parameters(one.graph_module, outputs=one.interface.outputs)
        for one in (dense, Slim()(dense.replace(plan=plan)).program)
    ]
    return 1 - sizes[1] / sizes[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_legal_reaches_the_share_and_what_is_slimmed_verifies(name: str) -> None:
    result = pruned(name)
    assert result.plan is not None
    result.plan.validate(result.groups)
    share = removed_share(program(), result.plan)
    assert 0.3 <= share <= 0.4  # a layer is a third, and so is a uniform step of heads and one of channels
    section = result.results["structured"]
    assert section["removed_share"] == pytest.approx(share, abs=1e-9)
    assert section["method"] == name
    for group in result.groups:
        kept = len(result.plan.kept_units(group))
        if isinstance(group, MlpGroup):
            assert kept % 8 == 0
    climbed = Pipeline([InsertMasks(), Slim(), Verify(reexport=False)])(result).program
    rungs = {rung["rung"]: rung["passed"] for rung in climbed.results["verify"]}
    assert rungs["slim = masked"]
    assert rungs["masked = eager without the units"]
    assert all(rungs.values())


@pytest.mark.parametrize("name", METHODS)
def test_the_dense_program_is_left_as_it_is_and_a_seed_gives_one_result(name: str) -> None:
    dense = program()
    before = {key: value.clone() for key, value in dense.graph_module.state_dict().items()}
    again = method(name, ratio=0.3)(dense).program
    assert dense.plan is None
    assert all(torch.equal(value, before[key]) for key, value in dense.graph_module.state_dict().items())
    assert again.plan == pruned(name).plan
    first = pruned(name).graph_module.state_dict()
    assert first.keys() == again.graph_module.state_dict().keys()
    assert all(torch.equal(value, first[key]) for key, value in again.graph_module.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_budgets_from_one_calibration_are_nested(name: str) -> None:
    ratios = [0.1, 0.3, 0.5]
    step = method(name, ratio=ratios)
    budgets = step.budgets(program())
    assert len(budgets.plans) == 3
    for index, (ratio, plan) in enumerate(zip(ratios, budgets.plans, strict=True)):
        result = step.apply(program(), budgets, index).program
        assert result.plan == plan
        plan.validate(result.groups)
        assert ratio <= result.results["structured"]["removed_share"] <= ratio + 0.25  # a layer is a third
        for group in program().groups if index else ():
            assert set(plan.kept_units(group)) <= set(budgets.plans[index - 1].kept_units(group))
    with pytest.raises(UsageError, match="has 3 targets here"):
        step(program())


@pytest.mark.parametrize("name", OF_UNITS)
def test_uniform_plans_have_one_shape_a_kind_and_add_no_biases(name: str) -> None:
    result = method(name, ratio=0.3, uniform=True)(program()).program
    assert result.plan is not None
    assert result.plan.is_uniform(result.groups)
    heads = {
        len(group.kv_kept(result.plan.kept_units(group)))
        for group in result.groups
        if isinstance(group, AttentionGroup)
    }
    assert len(heads) == 1
    assert not [key for key in result.graph_module.state_dict() if key.endswith("bias")]
    assert result.results["structured"]["removed_share"] >= 0.3


def test_methods_that_are_uniform_in_their_papers_are_so_by_themselves() -> None:
    own = {name for name in OF_UNITS if method(name, ratio=0.3).uniform}
    assert own == {"osscar", "wanda-sp", "random"}
    assert not method("osscar", ratio=0.3, uniform=False).uniform


@pytest.mark.parametrize("name", OF_UNITS)
def test_what_shall_stay_stays(name: str) -> None:
    options = {"keep": {"*.0.mlp": 1.0, "*.self_attn": 0.6}, "uniform": False, "min_keep": 0.3, "ratio": 0.25}
    plan = method(name, **options)(program()).program.plan
    assert plan is not None
    assert len(plan.kept_units(program().group("model.layers.0.mlp"))) == 40
    for group in program().groups:
        least = 0.6 if isinstance(group, AttentionGroup) else 0.3
        assert len(plan.kept_units(group)) >= least * group.units


@pytest.mark.parametrize("name", OF_UNITS)
def test_units_that_do_nothing_go_first(name: str) -> None:
    if name == "random":
        pytest.skip("goes by lot")
    own = with_dead_channels()
    plan = method(name, ratio=0.1, kinds=["mlp"])(own).program.plan
    assert plan is not None
    assert plan.removed_units(own.group("model.layers.0.mlp")) == DEAD
    assert len(plan.kept_units(own.group("model.layers.0.self_attn"))) == 6


@pytest.mark.parametrize("name", METHODS)
def test_too_much_is_refused_with_the_most_that_can_be_reached(name: str) -> None:
    with pytest.raises(PlanError, match=r"the best reachable is \d+\.\d% of the block Linear parameters removed"):
        method(name, ratio=0.99)(program())


# --- random, magnitude -----------------------------------------------------------------------------------------------


def test_a_lot_is_drawn_from_the_seed_and_reads_no_text() -> None:
    other = method("random", ratio=0.3, seed=4)(program()).program
    assert other.plan != pruned("random").plan
    assert "calibration" not in other.results
    assert "calibration" in pruned("wanda-sp").results


def test_magnitude_loses_the_squared_norm_of_the_weights_that_go() -> None:
    tensors = program().graph_module.state_dict(keep_vars=True)
    for group in (program().group("model.layers.1.self_attn"), program().group("model.layers.1.mlp")):
        whole = {piece.parameter for piece in (*group.slices, *group.shared)}
        curve = norm_curve(group, tensors, Limits(8, 0.1))
        assert len(curve.levels) > 3
        for level in (curve.levels[0], curve.levels[2], curve.levels[-1]):
            slim = Slim()(program().replace(plan=Plan.of({group.name: level.kept}))).program
            left = slim.graph_module.state_dict()
            lost = sum(
                float(tensors[name].double().square().sum() - left[name].double().square().sum()) for name in whole
            )
            assert level.loss == pytest.approx(lost, rel=1e-6, abs=1e-9)


def test_magnitude_needs_no_language_model() -> None:
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.SiLU(), torch.nn.Linear(32, 6))
    plain = Pipeline(LOCATE)(trace(mlp, example_inputs=(torch.randn(4, 6),))).program
    result = MagnitudeUnits(target_params=250)(plain).program  # of 32 * 13 + 6
    assert result.plan is not None
    assert len(result.plan.kept_units(plain.groups[0])) == 16
    with pytest.raises(PreconditionError, match="flap runs calibration text: it needs a Hugging Face model that reads"):
        method("flap", ratio=0.4)(plain)


# --- wanda -----------------------------------------------------------------------------------------------------------


def test_wanda_sums_weights_times_the_norm_of_what_they_read() -> None:
    from fxprune.calibration.activations import ChannelStatistics

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 2
    weight = torch.randn(4, 6, generator=generator)
    scores = input_scores(weight, ChannelStatistics(x.mean(0), x.var(0, correction=0), 50))
    expected = (weight.double().abs() * x.norm(dim=0)).sum(0) / 50**0.5
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-6)


# --- fisher ----------------------------------------------------------------------------------------------------------


def gram(samples: int, units: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    gradients = np.random.default_rng(seed).standard_normal((samples, units))
    gradients[:, ::2] += 2  # half of the units pull the same way
    return gradients.T @ gradients


def test_units_whose_gradients_cancel_go_together() -> None:
    gradients = np.array([[3.0, -3.0, 4.0, 5.0], [2.0, -2.0, 1.0, 5.0]])
    fisher = gradients.T @ gradients
    assert removal_loss(fisher, (1, 3)) == pytest.approx(58)
    assert rearrange_channels(fisher, (1, 3)) == (2, 3)
    assert removal_loss(fisher, (2, 3)) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
def test_rearranging_channels_lowers_the_loss_and_keeps_their_number(seed: int) -> None:
    fisher = gram(20, 40, seed)
    kept = np.sort(np.argsort(-fisher.diagonal())[:24]).tolist()
    found = rearrange_channels(fisher, kept)
    assert len(found) == len(set(found)) == 24
    assert removal_loss(fisher, found) < removal_loss(fisher, kept)
    allowed = sorted({*kept, 0, 2, 5, 7})
    inside = rearrange_channels(fisher, kept, allowed)
    assert set(inside) <= set(allowed)
    assert removal_loss(fisher, inside) <= removal_loss(fisher, kept)
    assert rearrange_channels(fisher, kept, kept) == tuple(kept)


@pytest.mark.parametrize("kept", [(0, 1, 3, 4), (0, 1, 2), (1, 4, 7), (6, 7, 8), (2, 5)])
def test_rearranging_heads_finds_no_better_legal_neighbour_and_keeps_the_shape(kept: tuple[int, ...]) -> None:
    group = attention("a", 3, 3)
    fisher = gram(12, 9, seed=2)
    found = rearrange_heads(group, fisher, kept)
    Plan.of({"a": found}).validate([group])
    assert (len(found), len(group.kv_kept(found))) == (len(kept), len(group.kv_kept(kept)))
    assert removal_loss(fisher, found) <= removal_loss(fisher, kept) + 1e-9
    for head in found:
        for other in set(group.heads_of(head // 3)) - set(found):
            swapped = [other if one == head else one for one in found]
            assert removal_loss(fisher, swapped) >= removal_loss(fisher, found) - 1e-9
    allowed = sorted({*kept, 8, 6, 7})
    assert set(rearrange_heads(group, fisher, kept, allowed)) <= set(allowed)


def test_fisher_says_what_rearranging_gained() -> None:
    step = Fisher(ratio=[0.2, 0.4], **TEXT)
    notes = step.budgets(program()).notes["rearranged"]
    assert len(notes) == 2
    assert all(0 <= note["loss_after"] < note["loss_before"] for note in notes)
    choices = {layer["choice"] for layer in pruned("fisher").results["structured"]["consumers"]}
    assert "scale" in choices


# --- depth -----------------------------------------------------------------------------------------------------------


def test_depth_removes_the_run_that_the_text_minds_least() -> None:
    dense = program()
    tokens = calibration_set(
        CalibrationSpec("self", **TEXT),
        tokenizer=None,
        runner=GraphRunner(dense.graph_module, dense.interface),
        config=dense.source.config if dense.source else None,
    ).tokens
    losses = []
    for start in range(2):  # two of three layers
        model = build("llama", **SHAPE)
        del model.model.layers[start : start + 2]
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=tokens, use_cache=False).loss))
    step = DepthPrune(ratio=0.5, choose_on=8, forward_dtype="float32", **TEXT)
    result = step(dense).program
    best = losses.index(min(losses))
    stack = next(group for group in dense.groups if isinstance(group, LayerGroup))
    assert result.plan is not None
    assert result.plan.removed_units(stack) == [best, best + 1]
    (runs,) = result.results["structured"]["runs"]
    assert [run["nll"] for run in runs] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(("kind", "layers"), [("params", 1), ("bytes", 2), ("macs", 1)])
def test_depth_reaches_every_kind_of_target(kind: str, layers: int) -> None:
    from fxprune.channels.accounting import bytes_of_weights, count_parameters, macs_per_token

    def size(one: Program) -> float:
        if kind == "macs":
            return macs_per_token(one.graph_module, outputs=one.interface.outputs).linear
        return (count_parameters if kind == "params" else bytes_of_weights)(one.graph_module)

    stack = next(group for group in program().groups if isinstance(group, LayerGroup))
    goal = size(Slim()(program().replace(plan=Plan.of({stack.name: range(3 - layers)}))).program)
    step = DepthPrune(**{f"target_{kind}": goal}, choose_on=2, **TEXT)
    plan = step(program()).program.plan
    assert plan is not None
    assert len(plan.removed_units(stack)) == layers
    with pytest.raises(PlanError, match="no run of consecutive layers reaches"):
        DepthPrune(**{f"target_{kind}": 1}, choose_on=2, **TEXT)(program())


def test_runs_are_the_shortest_that_save_enough() -> None:
    stack = next(group for group in program().groups if isinstance(group, LayerGroup))
    assert runs_that_reach(stack, [1, 5, 1], 6) == [Run("model.layers", start, start + 2) for start in (0, 1)]
    assert runs_that_reach(stack, [5, 1, 5], 5) == [Run("model.layers", start, start + 1) for start in (0, 2)]
    assert runs_that_reach(stack, [1, 1, 1], 3) == []  # a layer must stay


def test_what_depth_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="not of whole layers"):
        method("depth", target_speedup=1.5)
    with pytest.raises(UsageError, match="choose_on must be at least 1"):
        method("depth", ratio=0.5, choose_on=0)
    with pytest.raises(PreconditionError, match="run locate_layers first"):
        method("depth", ratio=0.5)(program().replace(groups=program().groups[:1]))


@pytest.mark.parametrize("name", METHODS)
def test_each_is_known_by_its_name(name: str) -> None:
    assert get_pass(name).name == name
