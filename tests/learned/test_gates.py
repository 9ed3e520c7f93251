"""Gates of a program: values in the masks, gradients, legality, folding, on several families."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fxprune.channels.accounting import count_parameters
from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, LayerGroup
from fxprune.core.pipeline import Pipeline
from fxprune.learned.expected_size import ExpectedSize, independent_units
from fxprune.learned.gates import ProgramGates, fold_gates, plan_of_gates
from fxprune.learned.unit_gates import HeadGates
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_layers import LocateLayers
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.tracing.masks import UnitMask
from fxprune.tracing.trace import trace
from tests.families import LOCATE, located, randomise

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.core.program import Program

_GPT2: list[Program] = []


def gpt2() -> Program:
    """Fused c_attn, biases everywhere, a plain MLP, LayerNorm, tied embeddings, no KV heads to share."""
    if not _GPT2:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 12, "n_positions": 64, "vocab_size": 61}
            tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
            model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, initializer_range=0.2)).eval()
            randomise(model)
        _GPT2.append(Pipeline(LOCATE)(trace(model)).program)
    return _GPT2[0]


# Llama: grouped queries, gated MLP, RMSNorm. Qwen2: the same with biases of q, k, v.
PROGRAMS = {"llama": lambda: located("llama"), "qwen2": lambda: located("qwen2"), "gpt2": gpt2}


def outputs(graph_module: GraphModule, program: Program) -> Tensor:
    found: Tensor = graph_module(*program.interface.example_inputs.values())[0]
    return found


def soft_values(gates: ProgramGates, seed: int = 0) -> dict[str, Tensor]:
    """Legal values with soft gates, zeros and ones among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) - 0.2)
    return gates.deterministic()


@pytest.mark.parametrize("name", PROGRAMS)
def test_soft_gates_fold_exactly_into_the_weights(name: str) -> None:
    """The reference code gates inside and outside the activation, which no weight can take up."""
    program = PROGRAMS[name]()
    gates = ProgramGates(program)
    values = soft_values(gates)
    strange = [v for value in values.values() for v in value.tolist() if 0 < v < 1]
    closed = sum(int((value == 0).sum()) for value in values.values())
    assert len(strange) > 10
    assert closed > 5
    with torch.no_grad():
        with gates.applied(values) as masked:
            wanted = outputs(masked, program)
        folded = fold_gates(program, values)
        torch.testing.assert_close(outputs(folded.graph_module, program), wanted, rtol=1e-5, atol=2e-5)
        assert float((outputs(program.graph_module, program) - wanted).abs().max()) > 1e-2
    assert folded.plan is not None
    assert {name: len(kept) for name, kept in folded.plan.kept.items()} == {
        name: int((value > 0).sum()) for name, value in values.items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folded_programs_are_slimmed_and_verified(name: str) -> None:
    program = PROGRAMS[name]()
    gates = ProgramGates(program)
    folded = fold_gates(program, soft_values(gates, seed=1))
    slim = Pipeline([InsertMasks(), Slim(), Verify(reexport=False)])(folded).program
    assert all(rung["passed"] for rung in slim.results["verify"])
    assert {"masked = eager without the units", "slim = masked"} <= {r["rung"] for r in slim.results["verify"]}
    assert folded.plan is not None
    for group in program.groups:
        piece = group.consumers[0]
        kept = len(folded.plan.kept_units(group))
        assert slim.graph_module.get_parameter(piece.parameter).shape[1] == kept * piece.per_unit
    assert any(len(folded.plan.kept_units(group)) < group.units for group in program.groups)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_reach_every_gate_and_no_frozen_weight_is_a_gate(name: str) -> None:
    program = PROGRAMS[name]()
    gates = ProgramGates(program, drop_rate=0.3)
    values = gates.sample(torch.Generator().manual_seed(1))
    with gates.applied(values) as masked:
        outputs(masked, program).square().mean().backward()
    assert {id(p) for p in gates.parameters()}.isdisjoint(id(p) for p in program.graph_module.parameters())
    for member in gates:
        found = [p.grad for p in member.parameters()]
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in found)
        assert any(grad is not None and bool((grad != 0).any()) for grad in found)
    for parameter in program.graph_module.parameters():
        parameter.grad = None


def test_the_gradient_of_a_gate_is_a_finite_difference_of_the_loss() -> None:
    program = located("qwen2")
    gates = ProgramGates(program, drop_rate=0.4)
    module = next(g for g in gates if isinstance(g, HeadGates))
    assert module.kv is not None
    parameter = module.kv.log_alpha

    def loss() -> Tensor:
        with gates.applied(gates.soft()) as masked:
            return outputs(masked, program).double().square().mean()

    (grad,) = torch.autograd.grad(loss(), parameter)
    step, measured = 1e-2, torch.zeros(2)
    with torch.no_grad():
        for index in range(2):
            values = []
            for sign in (1, -1):
                parameter[index] += sign * step
                values.append(float(loss()))
                parameter[index] -= sign * step
            measured[index] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(grad, measured, rtol=2e-2, atol=1e-5)


def test_the_masked_graph_with_gates_of_one_is_the_model_of_any_width() -> None:
    """The reference code's norm divides by 4096 under its hidden mask, so it is wrong for every other width."""
    for program in (located("llama"), gpt2()):
        gates = ProgramGates(program)
        with torch.no_grad(), gates.applied(gates.ones()) as masked:
            assert torch.equal(outputs(masked, program), outputs(program.graph_module, program))


def test_values_are_put_back_after_use_even_when_it_fails() -> None:
    program = located("llama")
    gates = ProgramGates(program)
    lowest = []

    def fail() -> None:
        with gates.applied(soft_values(gates)) as masked:
            lowest.extend(float(m.mask.min()) for m in masked.modules() if isinstance(m, UnitMask))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert min(lowest) < 1
    assert all(bool((m.mask == 1).all()) for m in gates.graph_module.modules() if isinstance(m, UnitMask))
    assert not any(isinstance(m, UnitMask) for m in program.graph_module.modules())


def test_gates_stay_float32_over_a_bfloat16_model() -> None:
    program = located("llama")
    gates = ProgramGates(program)
    x = torch.randn(2, 3, 36, dtype=torch.bfloat16)
    mask = next(m for m in gates.graph_module.modules() if isinstance(m, UnitMask) and len(m.mask) == 6)
    with gates.applied(gates.sample()):
        assert mask.mask.dtype is torch.float32
        assert mask(x).dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in gates.to(torch.bfloat16).parameters())


def test_equal_seeds_give_equal_gates() -> None:
    gates = ProgramGates(located("llama"), drop_rate=0.5)
    one, two, other = (gates.sample(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_expected_size_of_decided_gates_is_that_of_the_slim_model(name: str) -> None:
    """Fused projections, transposed weights, biases, tied embeddings, shared KV heads."""
    program = PROGRAMS[name]()
    gates = ProgramGates(program)
    values = soft_values(gates, seed=1)
    size = ExpectedSize(program, gates.groups, "params")
    decided = {
        group.name: independent_units(group, (values[group.name] > 0).double())
        for group in gates.groups  # of zeros and ones, products of gates are gates
    }
    slim = Pipeline([InsertMasks(), Slim()])(fold_gates(program, values)).program
    assert (
        float(size(decided))
        == count_parameters(slim.graph_module)
        < size.dense
        == count_parameters(program.graph_module)
    )


# ---- layers --------------------------------------------------------------------------------------------------------


def test_layers_have_gates_that_are_decided_at_the_end() -> None:
    program = LocateLayers()(located("llama")).program
    gates = ProgramGates(program, kinds=("mlp", "layers"), drop_rate=0.4)
    layers = next(g for g in gates if isinstance(g.group, LayerGroup))
    values = gates.soft()
    (grad,) = torch.autograd.grad(_run(gates, values, program).square().mean(), next(layers.parameters()))
    assert bool((grad != 0).all())
    next(layers.parameters()).data.copy_(torch.tensor([3.0, -3.0]))
    values = gates.deterministic()
    assert values[layers.group.name].tolist() == [1, 0]
    folded = fold_gates(program, values)
    assert folded.plan is not None
    assert folded.plan.kept[layers.group.name] == (0,)
    masked = InsertMasks()(folded).program
    torch.testing.assert_close(
        outputs(masked.graph_module, program), _run(gates, values, program), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UsageError, match="neither 0 nor 1"):
        fold_gates(program, {layers.group.name: torch.tensor([1.0, 0.5])})


def _run(gates: ProgramGates, values: dict[str, Tensor], program: Program) -> Tensor:
    with gates.applied(values) as masked:
        return outputs(masked, program)


# ---- hidden channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_gates_go_through_embeddings_and_norms_of_any_width(tied: bool) -> None:
    """The reference code leaves embeddings as they are under its hidden mask, and its norms divide by 4096."""
    program = LocateHidden()(located("llama", tie_word_embeddings=True) if tied else located("llama")).program
    gates = ProgramGates(program, kinds=("attention", "mlp", "hidden"), drop_rate=0.3)
    hidden = next(g for g in gates if g.group.kind == "hidden")
    values = gates.sample(torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(_run(gates, values, program).square().mean(), next(hidden.parameters()))
    assert int((grad != 0).sum()) > 10
    values = soft_values(gates, seed=2)
    assert set(values[hidden.group.name].tolist()) == {0, 1}
    folded = fold_gates(program, values)
    slim = Pipeline([InsertMasks(), Slim(), Verify(reexport=False)])(folded).program
    torch.testing.assert_close(
        outputs(slim.references["masked"].module, program), _run(gates, values, program), rtol=1e-4, atol=1e-4
    )
    kept = int(values[hidden.group.name].sum())
    assert kept < 30
    (lookup,) = (n for n in slim.graph_module.graph.nodes if n.target is torch.ops.aten.embedding.default)
    assert slim.graph_module.get_parameter(str(lookup.args[0].target)).shape == (61, kept)
    assert slim.graph_module.get_parameter("lm_head.weight").shape == (61, kept)
    assert all(rung["passed"] for rung in slim.results["verify"])


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_illegal_values_are_refused() -> None:
    program = located("llama")
    groups = program.groups
    attention = next(g for g in groups if isinstance(g, AttentionGroup))
    with pytest.raises(PlanError, match="different numbers of query heads"):
        plan_of_gates(groups, {attention.name: torch.tensor([1.0, 1, 0, 1, 0, 0])})
    with pytest.raises(PlanError, match="no query head would be left"):
        fold_gates(program, {attention.name: torch.zeros(6)})
    with pytest.raises(UsageError, match="training has diverged"):
        fold_gates(program, {attention.name: torch.full((6,), float("nan"))})
    with pytest.raises(UsageError, match="not for 'experts'"):
        ProgramGates(program, kinds=("experts",))
    with pytest.raises(PreconditionError, match="run the locate passes"):
        ProgramGates(program.replace(groups=()))
