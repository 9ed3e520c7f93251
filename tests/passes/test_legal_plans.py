"""Legal plans by construction: layouts that hold units in parts are a property of the group that all planners obey."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import PlanError
from fxprune.core.groups import AttentionGroup, ExpertGroup, MlpGroup
from fxprune.core.parts import balanced_order, in_parts
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.exporters.report import markdown_summary
from fxprune.flows.reporting import report_of
from fxprune.learned.gates import ProgramGates, fold_gates
from fxprune.learned.hard_budget import BudgetProjector
from fxprune.learned.unit_gates import HeadGates, UnitGates
from fxprune.measure.latency_build import variants_of
from fxprune.passes.fisher import rearrange_channels, rearrange_heads
from fxprune.passes.slim import Slim
from fxprune.structured.curves import Limits, obs_channel_curve, obs_head_curve, score_curve
from fxprune.structured.obs import Elimination
from fxprune.structured.targets import cost_model
from fxprune.tracing.trace import trace
from tests.conftest import TINY_LINES
from tests.families import randomise
from tests.proof import assert_slim_is_masked
from tests.units import attention, mlp, problem
from tests.zoo import TOKENS, legal_plans

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.groups import Group
    from fxprune.core.program import Program

HEADS, PARTS = 12, 4
MLA: dict[str, Any] = {"kv_lora_rank": 12, "q_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
ROUTED: dict[str, Any] = TOKENS | {
    "hidden_size": 36,
    "intermediate_size": 20,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "v_head_dim": 10,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "codegen": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        TOKENS | {"n_embd": 96, "n_layer": 2, "n_head": HEADS, "n_inner": 20, "rotary_dim": 4, "n_positions": 64},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", ROUTED | MLA),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        ROUTED | MLA | {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3, "topk_group": 2, "n_group": 4},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        ROUTED | {"num_key_value_heads": 2, "head_dim": 8, "n_group": 4, "topk_group": 2},
    ),
}


@functools.cache
def program(name: str) -> Program:
    config_class, model_class, sizes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
        randomise(model)
        for buffer in (b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")):
            nn.init.uniform_(buffer, -0.2, 0.2)
    return locate(model)


def locate(model: nn.Module, tokenizer: Any = None) -> Program:
    return Pipeline([build_pass(step, {}) for step in LOCATE])(trace(model, tokenizer=tokenizer)).program


def of_kind(name: str, kind: type[Group]) -> Any:
    return next(group for group in program(name).groups if isinstance(group, kind))


# ---- what is found -------------------------------------------------------------------------------------------------


def test_parts_are_found_in_fused_projections_and_in_routers() -> None:
    heads = of_kind("codegen", AttentionGroup)
    assert heads.parts.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert heads.kv_parts.tolist() == heads.parts.tolist()
    assert (heads.step, heads.least) == (PARTS, PARTS)
    assert "in 4 parts" in str(heads)
    assert of_kind("codegen", MlpGroup).parts is None
    experts = of_kind("deepseek_v3", ExpertGroup)
    assert experts.parts.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Two are chosen inside each of two parts, and a token sees one part, from which it gets two.
    assert (experts.per_token, experts.per_part, experts.least) == (2, 2, 4)
    others = of_kind("deepseek_v2", ExpertGroup)
    # The best of each of four parts speaks for it; a token gets three experts from two of them.
    assert (len(others.parts), others.per_token, others.per_part, others.least) == (4, 3, 2, 8)
    assert all(group.parts is None for name in MODELS for group in program(name).groups if group.kind == "mlp")


class _Grouped(nn.Module):
    """Grouped queries whose KV heads stand in two parts, each with its queries, keys and values together."""

    kv_heads, per_kv, dim = 4, 2, 4

    def __init__(self, order: str = "parts") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.pack = nn.Linear(10, (self.per_kv + 2) * self.kv_heads * self.dim)
        self.out = nn.Linear(self.per_kv * self.kv_heads * self.dim, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        half = self.kv_heads // 2
        q, k, v = (
            self.pack(x)
            .view(batch, length, 2, -1)
            .split([self.per_kv * half * self.dim, half * self.dim, half * self.dim], dim=-1)
        )
        heads = self.kv_heads * self.per_kv
        q = q.reshape(batch, length, heads, self.dim).transpose(1, 2)
        k, v = (t.reshape(batch, length, self.kv_heads, self.dim).transpose(1, 2) for t in (k, v))
        k, v = (
            t[:, :, None].expand(-1, -1, self.per_kv, -1, -1).reshape(batch, heads, length, self.dim) for t in (k, v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if self.order == "twice":  # halves of another cut: heads 0, 2, 4, 6 and 1, 3, 5, 7
            y = y.reshape(batch, length, 4, 2, self.dim).transpose(2, 3).contiguous()
        return self.out(y.reshape(batch, length, -1))


def test_parts_of_grouped_queries_are_whole_kv_heads() -> None:
    x = {"x": torch.randn(2, 5, 10)}
    found = Pipeline([build_pass(step, {}) for step in LOCATE[:3]])(trace(_Grouped(), example_inputs=x)).program
    (heads,) = found.groups
    assert isinstance(heads, AttentionGroup)
    assert heads.parts is not None
    assert heads.parts.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert heads.kv_parts is not None
    assert heads.kv_parts.tolist() == [[0, 1], [2, 3]]
    for curve in (score_curve(heads, np.random.default_rng(0).random(8), Limits(1, 0.0)),):
        assert {len(level.kept) for level in curve.levels} == {8, 4, 2}
        for level in curve.levels:
            Slim()(found.replace(plan=Plan.of({heads.name: level.kept})))
    with pytest.raises(PlanError, match=r"in 2 parts, of which the plan keeps 2, 0"):
        Plan.of({heads.name: [0, 1]}).validate(found.groups)


def test_heads_in_parts_of_two_kinds_are_refused_by_name() -> None:
    x = {"x": torch.randn(2, 5, 10)}
    found = Pipeline([build_pass(step, {}) for step in LOCATE[:3]])(trace(_Grouped("twice"), example_inputs=x)).program
    assert not found.groups
    refused = next(event.details["refused"] for event in found.history if event.name == "locate_attention")
    assert "in several parts" in next(iter(refused.values()))


# ---- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "experts", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_no_legal_plan_is_refused_and_slim_is_masked(name: str, kind: str) -> None:
    if kind == ("experts" if name == "codegen" else "attention"):
        return  # no units in parts
    found = program(name)

    @settings(
        max_examples=4,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        assert_slim_is_masked(found, data.draw(legal_plans(found.groups, kind)))

    check()


def test_a_plan_that_keeps_unequal_parts_is_illegal() -> None:
    for name, kind in (("codegen", AttentionGroup), ("deepseek_v3", ExpertGroup)):
        group = of_kind(name, kind)
        plan = Plan.of({group.name: range(group.units - 1)})
        with pytest.raises(
            PlanError, match=f"{group.name}: its layout holds the .* keep the same number in every part"
        ):
            Slim()(program(name).replace(plan=plan))
    # Equal, and less than what is chosen inside a part.
    experts = of_kind("deepseek_v3", ExpertGroup)
    with pytest.raises(PlanError, match="needs at least 4"):
        Plan.of({experts.name: [0, 4]}).validate(program("deepseek_v3").groups)


def test_a_group_limited_router_is_saved_and_reloads(tmp_path: Path) -> None:
    kept = [0, 1, 3, 4, 6, 7]
    found = program("deepseek_v3").replace(plan=Plan.of({of_kind("deepseek_v3", ExpertGroup).name: kept}))
    out = str(tmp_path / "slim")
    steps = [
        ("insert_masks", {}),
        ("slim", {}),
        ("verify", {}),
        ("save", {"out": out}),
        ("verify", {"checkpoint": out}),
    ]
    after = Pipeline([build_pass(step, options) for step, options in steps])(found).program
    assert all(rung["passed"] for rung in after.results["verify"])
    config = fxprune.load(out).config
    assert (config.n_routed_experts, config.n_group) == (len(kept), 2)


# ---- planners ------------------------------------------------------------------------------------------------------


def in_two_parts(group: Any, units: int) -> Any:
    """The same group, its units dealt out to two parts."""
    import dataclasses

    return dataclasses.replace(group, parts=np.arange(units).reshape(-1, 2).T.copy())


def assert_equal_parts(group: Group, kept: Any) -> None:
    assert group.parts is not None
    assert len(set(in_parts(kept, group.parts).tolist())) == 1


def test_an_order_in_which_parts_take_turns() -> None:
    parts = np.array([[0, 1, 2], [3, 4, 5]])
    assert balanced_order(np.array([5, 0, 1, 4, 2, 3]), parts).tolist() == [0, 5, 1, 4, 2, 3]
    assert balanced_order(np.array([2, 0, 1]), None).tolist() == [2, 0, 1]


def test_curves_keep_equally_many_of_every_part() -> None:
    scores = np.random.default_rng(0).random(12)
    channels, heads = in_two_parts(mlp("m", 12), 12), in_two_parts(attention("a", 12, 1), 12)
    hessian, weight = problem(12, 5)
    blocks = [torch.arange(12).reshape(-1, 1)]
    for group, curve in (
        (channels, score_curve(channels, scores, Limits(3, 0.1))),
        (heads, score_curve(heads, scores, Limits(1, 0.1))),
        (channels, obs_channel_curve(channels, [Elimination(hessian.clone(), weight)], blocks, Limits(1, 0.1))),
        (heads, obs_head_curve(heads, [Elimination(hessian.clone(), weight)], blocks, Limits(1, 0.1))),
    ):
        assert len(curve.levels) > 1
        for level in curve.levels:
            assert_equal_parts(group, level.kept)
        widths = [len(level.kept) for level in curve.levels]
        assert widths == sorted(widths, reverse=True)
    assert {len(level.kept) for level in score_curve(channels, scores, Limits(3, 0.1)).levels} == {12, 6}
    # The best of each part: what is lost is the least that equal parts allow.
    least = min(score_curve(channels, scores, Limits(2, 0.1)).levels, key=lambda level: len(level.kept))
    assert set(least.kept) == {int(part[scores[part].argmax()]) for part in channels.parts}


def test_exchanges_stay_inside_a_part() -> None:
    random = np.random.default_rng(0)
    factors = random.random((20, 12))
    factors[:, 1::2] *= 0.1  # what is in the second part is worth little
    channels, heads = in_two_parts(mlp("m", 12), 12), in_two_parts(attention("a", 12, 1), 12)
    kept = [0, 1, 2, 3]
    assert_equal_parts(channels, rearrange_channels(factors.T @ factors, kept, parts=channels.parts))
    assert_equal_parts(heads, rearrange_heads(heads, factors.T @ factors, kept))
    free = rearrange_channels(factors.T @ factors, kept)
    assert len(set(in_parts(free, channels.parts).tolist())) > 1, "without parts they would go elsewhere"


def test_gates_are_legal_whatever_their_values_are() -> None:
    torch.manual_seed(0)
    heads = in_two_parts(attention("a", 12, 1), 12)
    for gates in (HeadGates(heads), UnitGates(in_two_parts(mlp("m", 12), 12))):
        gates.start_from(torch.rand(12), 6)
        for part in gates.modules():
            if hasattr(part, "log_alpha"):
                part.log_alpha.data.uniform_(-3, 3)
        values = gates.deterministic()
        assert values.shape == (12,)
        assert_equal_parts(gates.group, torch.nonzero(values).flatten().numpy())
        opened = gates.open_units()
        assert opened.units.shape == (12,)
        assert opened.sets is None or opened.sets.shape == (12,)


def test_a_warm_start_gives_the_first_gate_to_the_best_of_each_part() -> None:
    scores = torch.arange(12.0)
    gates = HeadGates(in_two_parts(attention("a", 12, 1), 12))
    gates.start_from(scores, 6)
    assert gates.order[:, 0].tolist() == [[10 - i, 11 - i] for i in range(0, 12, 2)]
    assert torch.nonzero(gates.soft()).flatten().tolist() == list(range(6, 12))
    assert set(torch.topk(gates.soft(), 6).indices.tolist()) == set(range(6, 12))


def test_a_hard_budget_keeps_equally_many_of_every_part() -> None:
    found = program("codegen")
    gates = ProgramGates(found)
    model = cost_model("ratio", found, gates.groups)
    projector = BudgetProjector(gates, model, model.budget(0.3), Limits(4, 0.1))
    torch.manual_seed(0)
    for part in gates.modules():
        if hasattr(part, "log_alpha"):
            part.log_alpha.data.uniform_(-3, 3)
    projection = projector.project()
    assert projection.cost <= model.budget(0.3)
    plan = fold_gates(found, projector.decided()).plan
    assert plan is not None
    plan.validate(found.groups)
    assert sum(len(kept) for kept in plan.kept.values()) < sum(group.units for group in gates.groups)
    Slim()(found.replace(plan=plan))


def test_a_latency_table_measures_widths_that_are_legal() -> None:
    found = program("codegen")
    made = [variant for variant in variants_of(found.groups) if "attention" in str(variant)]
    assert made
    for variant in made:
        assert variant.width.sets % PARTS == 0


METHODS: dict[str, dict[str, Any]] = {
    "channel": {"ratio": 0.3, "attention": 1.0, "steps": 1},
    "fisher": {"ratio": 0.3},
    "osscar": {"ratio": 0.3},
    "random": {"ratio": 0.4},
    "l0": {
        "ratio": 0.3,
        "samples": 16,
        "held_out": 4,
        "steps": 6,
        "start_samples": 4,
        "fit_samples": 8,
        "lora_rank": 2,
    },
}


@functools.cache
def _codegen(tokenizer: Any) -> Program:
    config_class, model_class, sizes = MODELS["codegen"]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(sizes | {"vocab_size": 97, "n_layer": 1}))
    return locate(getattr(transformers, model_class)(config), tokenizer)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plans_what_slimming_can_write(method: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TINY_LINES * 12))
    found = _codegen(tiny_tokenizer)
    options = {"calibration": str(text), "samples": 8, "seq_len": 24, "forward_dtype": "float32", **METHODS[method]}
    out = str(tmp_path / "slim")
    steps: list[tuple[str, dict[str, Any]]] = [(method, options), ("insert_masks", {}), ("slim", {})]
    after = Pipeline([build_pass(step, given) for step, given in [*steps, ("save", {"out": out})]])(found).program
    assert after.plan is not None
    group = next(group for group in found.groups if isinstance(group, AttentionGroup))
    assert len(after.plan.kept[group.name]) < HEADS
    assert_equal_parts(group, after.plan.kept[group.name])
    fxprune.load(out)


# ---- what cannot go ------------------------------------------------------------------------------------------------


def test_heads_under_one_norm_stay_and_the_rest_goes(tiny_tokenizer: Any) -> None:
    sizes = TOKENS | {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    found = locate(transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)), tiny_tokenizer)
    after = build_pass("magnitude-units", {"ratio": 0.2})(found).program
    after = Pipeline([build_pass("insert_masks", {}), Slim()])(after).program
    report = report_of(after, method="magnitude-units")
    why = report["structured"]["left_alone"]
    assert set(why) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert "q_norm (mean) normalises several of its heads together" in why["model.layers.0.self_attn"]
    assert report["params"]["removed_share_blocks"] >= 0.2
    assert "left alone: model.layers.0.self" in markdown_summary(report)
    with pytest.raises(
        PlanError, match=r"best reachable is .* left alone .*self_attn.*normalises several of its heads"
    ):
        build_pass("magnitude-units", {"ratio": 0.8})(found)
