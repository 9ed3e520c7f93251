"""Distillation losses: against the plain formulas, gradients, what does not depend on the batch, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxprune.calibration.distillation import (
    DistillationWeights,
    distillation_loss,
    layer_loss,
    token_kl,
    with_hidden_states,
)
from fxprune.core.errors import PreconditionError, UsageError
from fxprune.core.groups import LayerGroup
from fxprune.learned.gates import ProgramGates
from fxprune.passes.locate_layers import LocateLayers
from tests.families import located


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    return (kl * mask).sum() / mask.sum() * temperature**2


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_the_plain_formula(chunk: int, temperature: float) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    losses, grads = [], []
    for chunked in (True, False):
        student = random(2, 5, 11).requires_grad_()
        teacher = random(2, 5, 11, seed=1)
        loss = (
            token_kl(student, teacher, mask, temperature=temperature, chunk_tokens=chunk)
            if chunked
            else plain(student, teacher, mask, temperature)
        )
        (3 * loss).backward()
        assert student.grad is not None
        losses.append(float(loss))
        grads.append(student.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)
    assert bool((grads[0][0, 0] == 0).all())


def test_the_divergence_equals_finite_differences() -> None:
    teacher = random(3, 7, seed=2)
    assert torch.autograd.gradcheck(lambda s: token_kl(s, teacher, chunk_tokens=2), (random(3, 7).requires_grad_(),))


def test_the_divergence_is_per_token_not_per_sequence() -> None:
    """The reference code divides by the batch, so that its loss grows with the length of the sequences."""
    student, teacher = random(2, 6, 9), random(2, 6, 9, seed=1)
    whole = float(token_kl(student, teacher))
    assert float(token_kl(student.repeat(1, 4, 1), teacher.repeat(1, 4, 1))) == pytest.approx(whole)
    assert float(token_kl(student.repeat(3, 1, 1), teacher.repeat(3, 1, 1))) == pytest.approx(whole)
    reference = functional.kl_div(
        torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), reduction="batchmean", log_target=True
    )
    assert float(reference) == pytest.approx(whole * 6)
    # Padding changes nothing either.
    padded = [torch.cat([random(2, 3, 9, seed=5), x], 1) for x in (student, teacher)]
    mask = torch.tensor([[0, 0, 0, *[1] * 6]] * 2)
    assert float(token_kl(*padded, mask)) == pytest.approx(whole)


def test_the_divergence_is_zero_at_the_teacher_and_finite_with_impossible_tokens() -> None:
    teacher = random(2, 3, 5, dtype=torch.float32)
    teacher[..., 2] = -torch.inf
    student = teacher.clone().requires_grad_()
    loss = token_kl(student, teacher)
    loss.backward()
    assert float(loss) == 0
    assert student.grad is not None
    assert float(student.grad.abs().max()) == 0


def test_half_precision_logits_are_summed_in_float32_and_held_once() -> None:
    student = random(4, 64, 300, dtype=torch.bfloat16).requires_grad_()
    teacher = random(4, 64, 300, seed=1, dtype=torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_kl(student, teacher)
    wanted = plain(student.detach().double(), teacher.double(), torch.ones(4, 64), 1.0)
    assert loss.dtype is torch.float32
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert sum(t.numel() * t.element_size() for t in saved) <= student.numel() * student.element_size()


def test_layer_losses_are_relative_to_the_teacher() -> None:
    teacher = [random(2, 4, 6, seed=seed) for seed in (1, 2)]
    student = [1.1 * state for state in teacher]
    assert float(layer_loss(student, teacher)) == pytest.approx(0.01)
    assert float(layer_loss([100 * s for s in student], [100 * t for t in teacher])) == pytest.approx(0.01)
    unscaled = layer_loss(student, teacher, normalised=False)
    mse = [functional.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    assert float(unscaled) == pytest.approx(float(sum(mse)) / 2)
    # Padding does not count, and neither do width, length or batch.
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    student[0][0, 0] += 1000
    assert float(layer_loss(student, teacher, mask)) == pytest.approx(0.01)
    one = random(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: layer_loss([s], [random(2, 3, 5, seed=3)]), (one,))


def test_weights_choose_what_counts() -> None:
    student, teacher = (random(1, 3, 5), [random(1, 3, 4)]), (random(1, 3, 5, seed=1), [random(1, 3, 4, seed=1)])
    kl, mse = float(token_kl(student[0], teacher[0])), float(layer_loss(student[1], teacher[1]))
    both = distillation_loss(student, teacher, weights=DistillationWeights(0.5, 2.0))
    assert float(both.total) == pytest.approx(0.5 * kl + 2 * mse)
    assert (float(both.logits), float(both.layers)) == pytest.approx((kl, mse))
    assert float(distillation_loss(student, (teacher[0], []), weights=DistillationWeights(1, 0)).total) == kl
    for bad in ((-1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (1.0, float("nan"), 1.0), (1.0, 1.0, 0.0)):
        with pytest.raises(UsageError, match="distillation needs weights|temperature must be positive"):
            DistillationWeights(*bad)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"shapes \(1, 3, 5\) and \(1, 4, 5\)"):
        token_kl(random(1, 3, 5), random(1, 4, 5))
    with pytest.raises(PreconditionError, match="no token counts"):
        token_kl(random(1, 3, 5), random(1, 3, 5), torch.zeros(1, 3))
    with pytest.raises(PreconditionError, match="mask of tokens has shape"):
        token_kl(random(1, 3, 5), random(1, 3, 5), torch.ones(3))
    with pytest.raises(PreconditionError, match="1 of the student and 0 of the teacher"):
        layer_loss([random(1, 3, 5)], [])


def test_a_graph_returns_the_hidden_states_of_its_layers() -> None:
    program = LocateLayers()(located("llama")).program
    layers = next(group for group in program.groups if isinstance(group, LayerGroup))
    examples = tuple(program.interface.example_inputs.values())
    for kinds in (("mlp",), ("mlp", "layers")):
        gates = ProgramGates(program, kinds=kinds)
        tapped = with_hidden_states(gates.graph_module, layers.exits)
        plain_outputs = gates.graph_module(*examples)
        outputs = tapped(*examples)
        assert len(outputs) == len(plain_outputs) + 2
        for found, wanted in zip(outputs, plain_outputs, strict=False):
            assert torch.equal(found, wanted)
        states = outputs[len(plain_outputs) :]
        assert [tuple(state.shape[-1:]) for state in states] == [(30,)] * 2
        # Masks are shared: gates reach the states, and a closed layer hands on what it read.
        values = gates.ones()
        if "layers" in kinds:
            values[layers.name] = torch.tensor([1.0, 0.0])
            with gates.applied(values):
                first, second = tapped(*examples)[-2:]
            assert torch.equal(first, second)
        else:
            with gates.applied({name: 0.5 * value for name, value in values.items()}):
                assert not torch.equal(tapped(*examples)[-1], states[-1])
    with pytest.raises(PreconditionError, match="no node 'nowhere'"):
        with_hidden_states(program.graph_module, ["nowhere"])
