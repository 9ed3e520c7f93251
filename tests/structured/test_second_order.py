"""Second-order steps: their gradient, its direction, that they help on unseen text, and what they leave alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.calibration.gram import Gram
from fxprune.calibration.head_inputs import head_inputs
from fxprune.calibration.loss_gradients import backpropagate_loss
from fxprune.calibration.loss_head import LossHead, divergence
from fxprune.core.errors import CalibrationError, UsageError
from fxprune.core.program import Program
from fxprune.exporters.report_structured import structured_facts
from fxprune.passes.channel import ChannelPrune
from fxprune.runtimes.runners import GraphRunner
from fxprune.structured import second_order
from fxprune.structured.second_order import direction, second_order_steps
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.nodes import get_attribute
from tests.families import located

SMALL: dict[str, Any] = {"ratio": 0.3, "round_to": 4, "samples": 32, "seq_len": 12, "forward_dtype": "float32"}


def tokens(samples: int, seed: int = 0, length: int = 12) -> Tensor:
    return torch.randint(4, 61, (samples, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def pruned() -> tuple[Program, Program, dict[str, Any]]:
    """The dense program, the pruned and reconstructed one, and what the step needs to know."""
    dense = located("llama")
    step = ChannelPrune(**SMALL)
    budgets = step.budgets(dense)
    seen: dict[str, Any] = {"inputs": budgets.grams, "outputs": budgets.outputs}
    step.finish = lambda _, rebuilt, kept, __: (rebuilt, seen.update(kept=kept) or {})  # type: ignore[method-assign]
    return dense, step.apply(dense, budgets, 0).program, seen


def logits(program: Program, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    return GraphRunner(program.graph_module, program.interface).step(ids, torch.ones_like(ids), positions, None)[0]


def plain_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over predicted positions of KL(teacher || student)."""
    mine, theirs = (one[:, :-1].log_softmax(-1) for one in (student, teacher))
    return (theirs.exp() * (theirs - mine)).sum()


def test_the_divergence_is_that_of_the_logits_whatever_the_batches() -> None:
    dense, small, _ = pruned()
    ids = tokens(5)
    states = [head_inputs(one, ids, batch_size=size) for one, size in ((small, 2), (dense, 5))]
    assert states[0].shape == (5, 12, 30)
    expected = float(plain_divergence(logits(small, ids), logits(dense, ids))) / (5 * 11)
    assert divergence(LossHead(small), *states) == pytest.approx(expected, rel=1e-4)
    assert divergence(LossHead(small), states[0], states[0]) == pytest.approx(0, abs=1e-9)
    with pytest.raises(CalibrationError, match="not finite"):
        divergence(LossHead(small), states[0] * float("nan"), states[1])


def test_the_gradient_of_the_divergence_is_that_of_finite_differences() -> None:
    dense, small, seen = pruned()
    ids = tokens(3)
    graph = copy_graph_module(small.graph_module)
    weights = {name: get_attribute(graph, name).weight for name in seen["kept"]}
    plain = small.replace(graph_module=graph)
    teacher = logits(dense, ids).detach()
    found = backpropagate_loss(
        plain, (), ids, lambda _: None, parameters=weights, teacher=head_inputs(dense, ids), batch_size=2
    )
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        module = get_attribute(graph, name)
        before = module.weight.detach().clone()
        probe = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                module.weight.copy_(before + sign * 1e-3 * probe)
            values.append(float(plain_divergence(logits(plain, ids).double(), teacher.double())))
        with torch.no_grad():
            module.weight.copy_(before)
        assert float((found[name] * probe).sum()) == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)


def test_the_direction_solves_the_damped_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(200, size, generator=generator, dtype=torch.float64) for size in (5, 3))
    gradient = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    kept = torch.tensor([True, True, False, True, True])
    outputs = g.T @ g / 200
    found = direction(gradient, kept, Gram(x.T @ x, 200), outputs)
    assert not found[:, 2].any()
    here = torch.where(kept)[0]
    reads = (x.T @ x / 200)[here[:, None], here]
    reads += second_order.INPUT_DAMPING * torch.diag(reads.diagonal())
    puts_out = outputs + second_order.OUTPUT_DAMPING * outputs.diagonal().mean() * torch.eye(3)
    torch.testing.assert_close(puts_out @ found[:, here] @ reads, gradient[:, here], rtol=1e-4, atol=1e-5)


def test_a_step_lowers_the_divergence_on_text_that_it_has_not_seen() -> None:
    dense, small, seen = pruned()
    before = {name: value.clone() for name, value in small.graph_module.state_dict().items()}
    ids, results, last = tokens(16, seed=5), [], [small]
    for count in (1, 3):
        moved, steps = second_order_steps(small, dense, seen["kept"], tokens(40), steps=count, held_out=8,
                                          inputs=seen["inputs"], outputs=seen["outputs"])  # fmt: skip
        assert len(steps) == count
        assert all(step.eta > 0 and step.after < step.before for step in steps)
        assert [step.before for step in steps[1:]] == [step.after for step in steps[:-1]]
        last.append(moved)
    results = [float(plain_divergence(logits(one, ids), logits(dense, ids))) for one in last]
    assert results == sorted(results, reverse=True)
    after = small.graph_module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # the program given is as it was
    changed = {n for n, v in moved.graph_module.state_dict().items() if not torch.equal(v, after[n])}
    assert changed == {f"{name}.weight" for name in seen["kept"]}
    for name, kept in seen["kept"].items():
        assert not get_attribute(moved.graph_module, name).weight[:, ~kept].any()


def test_a_step_that_only_harms_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, seen = pruned()
    monkeypatch.setattr(second_order, "direction", lambda *one: -1e4 * direction(*one))
    moved, (step,) = second_order_steps(small, dense, seen["kept"], tokens(8), steps=3, held_out=2,
                                        inputs=seen["inputs"], outputs=seen["outputs"])  # fmt: skip
    assert step.eta == 0
    assert step.after == step.before
    for name in seen["kept"]:
        assert torch.equal(*(get_attribute(one.graph_module, name).weight for one in (moved, small)))


def test_samples_must_be_left_on_both_sides() -> None:
    dense, small, seen = pruned()
    for held_out in (0, 3, 4):
        with pytest.raises(UsageError, match=f"{held_out} of 4 samples cannot be held out"):
            second_order_steps(small, dense, seen["kept"], tokens(4), steps=2, held_out=held_out, inputs={}, outputs={})


def test_a_length_that_is_too_long_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, seen = pruned()
    start = second_order.FIRST_LENGTH * 2**12
    monkeypatch.setattr(second_order, "FIRST_LENGTH", start)
    _, (step,) = second_order_steps(small, dense, seen["kept"], tokens(32), steps=1, held_out=8,
                                    inputs=seen["inputs"], outputs=seen["outputs"])  # fmt: skip
    assert 0 < step.eta < start
    assert step.after < step.before


def test_the_channel_pass_takes_steps_and_reports_them() -> None:
    dense, small, _ = pruned()
    result = ChannelPrune(**SMALL)(dense).program
    report = result.results["structured"]
    first, second = report["second_order_steps"]
    assert first["before"] > first["after"] == second["before"] > second["after"]
    assert report["seconds"]["finish"] > 0
    assert any("second-order steps" in fact.label for fact in structured_facts(report))
    assert result.plan == small.plan
    without = ChannelPrune(steps=0, **SMALL)(dense).program
    assert "second_order_steps" not in without.results["structured"]
    untouched = ChannelPrune(reconstruct="none", **SMALL)(dense).program
    assert "second_order_steps" not in untouched.results["structured"]
    name = "model.layers.0.mlp.down_proj"
    weights = [get_attribute(one.graph_module, name).weight for one in (without, small, result)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_more_steps_than_there_are_samples_for_leave_one_for_the_lengths() -> None:
    dense, _, _ = pruned()
    report = ChannelPrune(**(SMALL | {"steps": 40}))(dense).program.results["structured"]
    assert 1 <= len(report["second_order_steps"]) <= SMALL["samples"] - 1
