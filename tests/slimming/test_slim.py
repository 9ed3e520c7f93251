"""Slimming: the slim graph computes what the masked one does, forward and backward, for any legal plan."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.core.errors import PlanError, PreconditionError, UnsupportedOpError
from fxprune.core.groups import AttentionGroup, Group, MlpGroup, UnitSlice
from fxprune.core.plan import Plan
from fxprune.core.program import Program
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.runtimes.runners import GraphRunner, Past
from fxprune.slimming.slim import slim_graph
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.trace import trace
from tests.families import FAMILIES, STEPS, kept_positions, located, located_plain, random_plan, steps

RELATIVE = 1e-5
few = settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def masked_and_slim(program: Program, plan: Plan) -> tuple[Program, Program]:
    masked = InsertMasks()(program.replace(plan=plan)).program
    return masked, Slim()(masked).program


def assert_close(slim: Tensor, masked: Tensor, what: str = "") -> None:
    scale = max(float(masked.abs().max()), 1e-6)
    assert float((slim - masked).abs().max()) <= RELATIVE * scale, what


def assert_same_steps(masked: Program, slim: Program) -> None:
    """Logits agree at every token that is no padding, over batch 1 and 2, prefill, continuation and one token."""
    for case, (batch, padding) in STEPS.items():
        pasts: list[Past | None] = [None, None]
        for step in steps(batch, padding=padding):
            logits = []
            for index, program in enumerate((masked, slim)):
                runner = GraphRunner(program.graph_module, program.interface)
                out, pasts[index] = runner.step(step.tokens, step.mask, step.positions, pasts[index])
                logits.append(out)
            real = step.mask[:, -step.tokens.shape[1] :].bool()
            assert_close(logits[1][real], logits[0][real], case)


def gradients(program: Program) -> dict[str, Tensor]:
    """Gradient of a fixed function of the logits, by parameter name."""
    examples = program.interface.example_inputs
    outputs = program.graph_module(*examples.values())
    logits = outputs[program.interface.outputs.index("logits")]
    weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    named = dict(program.graph_module.named_parameters())
    grads = torch.autograd.grad((logits * weight).sum(), list(named.values()))
    return dict(zip(named, grads, strict=True))


def assert_same_gradients(masked: Program, slim: Program, plan: Plan) -> None:
    """Every weight that is left gets the gradient it has in the masked graph."""
    stays = kept_positions(masked.groups, plan)
    dense = gradients(masked)
    for name, mine in gradients(slim).items():
        theirs = dense[name]
        for axis in range(theirs.dim()):
            if (name, axis) in stays:
                theirs = theirs.index_select(axis, torch.from_numpy(stays[name, axis]))
        assert mine.shape == theirs.shape, name
        assert_close(mine, theirs, name)


@st.composite
def plans(draw: Any, groups: tuple[Group, ...]) -> Plan:
    """Any legal plan: any KV heads with equally many, but not the same, query heads; any channels."""
    kept: dict[str, list[int]] = {}
    for group in groups:
        if isinstance(group, AttentionGroup):
            kv_heads = draw(st.sets(st.integers(0, group.kv_heads - 1), min_size=1))
            per_kv = draw(st.integers(1, len(group.heads_of(0))))
            kept[group.name] = [
                head for kv in sorted(kv_heads) for head in draw(st.permutations(group.heads_of(kv)))[:per_kv]
            ]
        else:
            kept[group.name] = sorted(draw(st.sets(st.integers(0, group.units - 1), min_size=1)))
    return Plan.of(kept)


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(data=st.data())
def test_slim_equals_masked_for_any_legal_plan(family: str, data: st.DataObject) -> None:
    program = located(family)
    plan = data.draw(plans(program.groups))
    masked, slim = masked_and_slim(program, plan)
    for group in program.groups:
        for piece in group.consumers:
            linear = slim.graph_module.get_submodule(piece.parameter.removesuffix(".weight"))
            assert linear.in_features == len(plan.kept_units(group)) * piece.per_unit
    assert_same_steps(masked, slim)
    assert_same_gradients(masked, slim, plan)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 6}, {"num_key_value_heads": 1}], ids=["MHA", "MQA"])
def test_slim_equals_masked_without_groups_and_with_one_kv_head(changes: dict[str, int]) -> None:
    program = located("llama", num_hidden_layers=1, **changes)
    plan = Plan.of({"model.layers.0.self_attn": [0, 2, 5], "model.layers.0.mlp": range(3, 17)})
    masked, slim = masked_and_slim(program, plan)
    assert_same_steps(masked, slim)
    assert_same_gradients(masked, slim, plan)
    kv_heads = {slim.interface.example_inputs[entry.input].shape[1] for entry in slim.interface.cache}
    assert kv_heads == {3 if changes["num_key_value_heads"] == 6 else 1}


def test_different_query_heads_may_stay_in_different_kv_heads() -> None:
    program = located("llama")
    plan = Plan.of({"model.layers.0.self_attn": [0, 5], "model.layers.1.self_attn": [1, 2, 3, 4]})
    masked, slim = masked_and_slim(program, plan)
    assert_same_steps(masked, slim)


def test_the_cache_of_a_slim_program_has_as_many_heads_as_stay() -> None:
    program = located("llama")
    plan = Plan.of({"model.layers.0.self_attn": [3, 4, 5], "model.layers.1.self_attn": [0, 3]})
    _, slim = masked_and_slim(program, plan)
    heads = [slim.interface.example_inputs[entry.input].shape[1] for entry in slim.interface.cache]
    assert heads == [1, 1, 2, 2]
    assert slim.interface.dynamic_axes == program.interface.dynamic_axes


def test_soft_gates_are_folded_into_their_consumers() -> None:
    program = located("qwen2")
    plan = random_plan(program.groups)
    masked = InsertMasks()(program.replace(plan=plan)).program
    generator = torch.Generator().manual_seed(0)
    for module in masked.graph_module.modules():
        if isinstance(module, ChannelMask):
            module.mask *= torch.rand(module.mask.shape, generator=generator) + 0.25
    slim = Slim()(masked).program
    assert_same_steps(masked, slim)
    assert not [module for module in slim.graph_module.modules() if isinstance(module, ChannelMask)]


def test_a_plan_that_removes_nothing_leaves_the_program_as_it_is() -> None:
    program = located("llama").replace(plan=Plan({}))
    result = Slim()(program)
    assert not result.modified
    assert result.program.graph_module is program.graph_module


def test_slimming_leaves_the_dense_graph_and_shares_what_it_does_not_narrow() -> None:
    program = located("llama")
    before = {name: (id(p), p.detach().clone()) for name, p in program.graph_module.named_parameters()}
    _, slim = masked_and_slim(program, Plan.of({"model.layers.0.mlp": range(8)}))
    after = dict(program.graph_module.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {name: number for name, (number, _) in before.items()}
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())
    narrowed = {name for name, p in slim.graph_module.named_parameters() if p is not after[name]}
    assert narrowed == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_tied_embeddings_stay_one_tensor() -> None:
    program = located("llama", tie_word_embeddings=True, num_hidden_layers=1)
    plan = random_plan(program.groups)
    masked, slim = masked_and_slim(program, plan)
    vocabulary = [p for p in slim.graph_module.parameters() if p.shape[0] == 61]
    assert len(vocabulary) == 1
    assert_same_steps(masked, slim)


def test_a_mask_that_contradicts_the_plan_is_refused() -> None:
    program = located("llama")
    masked = InsertMasks()(program.replace(plan=Plan.of({"model.layers.0.mlp": range(10)}))).program
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.down_proj_mask: the plan removes channels"):
        Slim()(masked.replace(plan=Plan.of({"model.layers.0.mlp": range(5, 15)})))


def test_slim_needs_a_plan() -> None:
    with pytest.raises(PreconditionError, match="slim needs a plan"):
        Slim()(located("llama"))


# --- plain modules --------------------------------------------------------------------------------------------------

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def assert_plain(program: Program, plan: Plan, x: Tensor = X) -> Program:
    """Slim a plain module and compare it with its masked form."""
    masked, slim = masked_and_slim(program, plan)
    with torch.no_grad():
        for mine, theirs in zip(slim.graph_module(x), masked.graph_module(x), strict=True):
            assert_close(mine, theirs)
    return slim


class Mlp(nn.Module):
    """fc1, something, fc2."""

    def __init__(self, between: nn.Module | None = None, width: int = 10) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, width), nn.Linear(width, 6)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.between(nn.functional.gelu(self.fc1(x))))


class Model(nn.Module):
    """Wraps a function of a module, so that everything has a qualified name."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_part_of_what_is_normalised_together_is_refused() -> None:
    program = located_plain(Model(lambda m, x: m.mlp(x), mlp=Mlp(nn.LayerNorm(10))), X)
    units = np.arange(10).reshape(10, 1)
    pieces = [("mlp.fc1.weight", 0, 6), ("mlp.fc1.bias", 0, 1), ("mlp.fc2.weight", 1, 6)]
    slices = tuple(UnitSlice(name, axis, units, size, name.endswith("weight")) for name, axis, size in pieces)
    group = MlpGroup("mlp", 0, slices, activation="gelu")
    expected = r"layer_norm.*the plan removes 4 of the 10 channels it normalises together"
    with pytest.raises(PlanError, match=expected):
        slim_graph(program.graph_module, program.interface, (group,), Plan.of({"mlp": range(6)}))


def test_a_unit_that_is_tied_to_something_pinned_is_refused_with_the_reason() -> None:
    program = located_plain(Model(lambda m, x: m.mlp(x), mlp=Mlp()), X)
    units = np.arange(6).reshape(6, 1)
    group = Group("outputs", 0, (UnitSlice("mlp.fc2.weight", 0, units, 10, "columns"),))
    expected = "outputs: mlp.fc2.weight axis 0 cannot be narrowed: output"
    with pytest.raises(PlanError, match=expected):
        slim_graph(program.graph_module, program.interface, (group,), Plan.of({"outputs": range(3)}))


def test_what_an_unknown_operator_does_not_touch_is_slimmed() -> None:
    def forward(model: Any, x: Tensor) -> Any:
        return model.known(x) + model.unknown(x)

    class Sort(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sort(-1)[0]

    program = located_plain(Model(forward, known=Mlp(), unknown=Mlp(Sort())), X)
    assert [group.name for group in program.groups] == ["known"]
    slim = assert_plain(program, Plan.of({"known": [0, 4, 7]}))
    widths = {name: module.out_features for name, module in slim.graph_module.named_modules() if name.endswith("fc1")}
    assert widths == {"known.fc1": 3, "unknown.fc1": 10}


def test_a_module_that_is_called_twice_is_narrowed_once() -> None:
    program = located_plain(Model(lambda m, x: m.mlp(m.mlp(x)), mlp=Mlp()), X)
    slim = assert_plain(program, Plan.of({"mlp": [1, 2, 8]}))
    assert sum(p.numel() for p in slim.graph_module.parameters()) == 3 * 6 + 3 + 6 * 3 + 6


def test_parameters_that_two_linears_share_stay_one_object_when_they_become_narrower() -> None:
    first, second = Mlp(), Mlp()
    second.fc2.weight = first.fc2.weight  # the same columns read what two others make
    program = located_plain(Model(lambda m, x: m.a(x) + m.b(x), a=first, b=second), X)
    (group,) = program.groups
    assert len(group.consumers) == 1
    slim = assert_plain(program, Plan.of({group.name: [0, 3, 9]})).graph_module
    assert slim.get_parameter("a.fc2.weight") is slim.get_parameter("b.fc2.weight")
    assert slim.get_parameter("a.fc2.weight").shape == (6, 3)


class Fused(nn.Module):
    """One weight for query, key and value, and one for gate and up."""

    def __init__(self, heads: int = 4, dim: int = 3) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv, self.out = nn.Linear(6, 3 * heads * dim), nn.Linear(heads * dim, 6)
        self.gate_up, self.down = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(out.transpose(1, 2).reshape(batch, length, self.heads * self.dim))
        gate, up = self.gate_up(x).split(10, -1)
        return x + self.down(nn.functional.silu(gate) * up)


def test_fused_projections_are_narrowed_in_every_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    program = located_plain(Model(lambda m, x: m.block(x), block=Fused()), x)
    assert [group.name for group in program.groups] == ["block", "block:mlp"]
    plan = Plan.of({"block": [1, 3], "block:mlp": [0, 2, 9]})
    slim = assert_plain(program, plan, x)
    shapes = {name: tuple(p.shape) for name, p in slim.graph_module.named_parameters() if p.dim() == 2}
    assert shapes == {
        "block.qkv.weight": (18, 6),
        "block.out.weight": (6, 6),
        "block.gate_up.weight": (6, 6),
        "block.down.weight": (6, 3),
    }


class GroupedByOperator(nn.Module):
    """Grouped queries that `scaled_dot_product_attention` repeats by itself, with a slope for each head."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 24), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(24, 6)
        self.register_buffer("slopes", torch.linspace(0.5, 2, 6).reshape(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Any:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        positions = torch.arange(x.shape[1]).float()
        bias = self.slopes * (positions[None, :] - positions[:, None])
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def test_slopes_go_with_their_heads_and_gqa_inside_the_operator_is_understood() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    program = located_plain(Model(lambda m, x: m.attn(x), attn=GroupedByOperator()), x)
    (group,) = program.groups
    assert isinstance(group, AttentionGroup)
    assert (group.units, group.kv_heads) == (6, 2)
    for kept in ([0, 5], [3, 4, 5], [1, 2, 3, 4]):
        assert_plain(program, Plan.of({group.name: kept}), x)


def test_channels_in_parts_of_two_kinds_are_refused_by_name() -> None:
    """Halves that change places with what they hold: no plan is safe for both, and none is offered."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Any:
            parts = nn.functional.silu(self.up(x)).reshape(-1, 2, 4)
            return self.down(parts.transpose(-1, -2).flatten(-2))

    program = located_plain(Model(lambda m, x: m.mlp(x), mlp=Ragged()), X)
    assert not program.groups
    (located,) = (event for event in program.history if event.name == "locate_mlp")
    assert located.details["refused"] == {"mlp": "layouts hold them in 2 parts and, across these, in 4"}


def test_an_operator_that_cannot_be_narrowed_is_refused_by_name() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Any:
            return self.down(nn.functional.silu(self.up(x)).reshape(-1, 2, 4).flatten(-2))

    program = located_plain(Model(lambda m, x: m.mlp(x), mlp=Halves()), X)
    (group,) = program.groups
    free = program.replace(groups=(dataclasses.replace(group, parts=None),))
    with pytest.raises(UnsupportedOpError, match=r"in mlp \(node .*does not pack into a tensor"):
        Slim()(free.replace(plan=Plan.of({group.name: [0, 1, 2, 4]})))  # 3 of one half, 1 of the other
    assert_plain(program, Plan.of({group.name: [0, 1, 6, 7]}))


def test_meta_weights_are_slimmed_without_values() -> None:
    with torch.device("meta"):
        module = Model(lambda m, x: m.mlp(x), mlp=Mlp())
        x = torch.empty(4, 6)
    program = located_plain(module, x)
    slim = Slim()(program.replace(plan=Plan.of({"mlp": [0, 1]}))).program
    assert {name: tuple(p.shape) for name, p in slim.graph_module.named_parameters() if p.dim() == 2} == {
        "mlp.fc1.weight": (2, 6),
        "mlp.fc2.weight": (6, 2),
    }
    assert re.fullmatch("meta", slim.graph_module.get_parameter("mlp.fc1.weight").device.type)
    assert trace(module, example_inputs=(x,)).interface.outputs == ("output_0",)
