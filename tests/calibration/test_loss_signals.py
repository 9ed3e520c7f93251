"""Loss signals: equal to plain autograd through the whole masked graph, whatever the batches and blocks."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from fxprune.calibration.engine import text_samples
from fxprune.calibration.loss_head import make_targets
from fxprune.calibration.loss_signals import GroupSignals, collect_loss_signals
from fxprune.core.errors import CalibrationError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, Group, MlpGroup
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import insert_masks
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from tests import zoo
from tests.families import LOCATE, build, located

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.core.program import Program

FAMILIES = {
    "llama": lambda: located("llama", num_hidden_layers=3),  # grouped queries
    "gpt2": lambda: zoo.located("gpt2"),  # biases, fused q, k and v, learned positions
    "phi3": lambda: zoo.located("phi3"),  # fused q, k and v, fused gate and up
    "gemma2": lambda: zoo.located("gemma2"),  # capped logits
}


def _tokens(samples: int = 3, length: int = 7) -> Tensor:
    return torch.randint(1, 50, (samples, length), generator=torch.Generator().manual_seed(0))


def _groups(program: Program) -> list[Group]:
    return [group for group in program.groups if isinstance(group, (AttentionGroup, MlpGroup))]


class _Reference:
    """Signals by one backward pass a sample through the whole masked graph."""

    def __init__(self, program: Program, tokens: Tensor) -> None:
        self.groups = _groups(program)
        names = {s.parameter.removesuffix(".weight"): g.name for g in self.groups for s in g.consumers}
        masked = insert_masks(program.graph_module, tuple(self.groups), Plan({}))
        masks = {name: m for name, m in masked.named_modules() if isinstance(m, ChannelMask)}
        self.gradients = {g.name: torch.zeros(len(tokens), g.units) for g in self.groups}
        self.x: dict[str, list[Tensor]] = {name: [] for name in names}
        self.g: dict[str, list[Tensor]] = {name: [] for name in names}
        for mask in masks.values():
            mask.mask = mask.mask.clone().requires_grad_()
        parameters = dict(program.graph_module.named_parameters())
        self.weights = {name: torch.zeros_like(p) for name, p in parameters.items()}

        def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            self.x[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
            output.register_hook(lambda gradient: self.g[name].append(gradient.reshape(-1, gradient.shape[-1])))  # type: ignore[no-untyped-call]

        handles = [get_attribute(masked, n).register_forward_hook(functools.partial(hook, n)) for n in names]
        for index, row in enumerate(tokens):
            samples = text_samples(program.interface, row[None])
            given = {**samples.fixed(1), **samples.varying}
            outputs = masked(*(given[name] for name in program.interface.inputs))
            logits = dict(zip(program.interface.outputs, outputs, strict=True))["logits"]
            loss = nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
            wanted = [*(m.mask for m in masks.values()), *parameters.values()]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            for name, gradient in zip(masks, found, strict=False):
                self.gradients[names[name.partition("_mask")[0]]][index] += gradient
            rest: tuple[Tensor | None, ...] = found[len(masks) :]
            for name, one in zip(parameters, rest, strict=True):
                self.weights[name] += 0 if one is None else one
        for handle in handles:
            handle.remove()

    def taylor(self, program: Program, group: Group) -> list[float]:
        """Unit by unit and element by element, as the definition says."""
        scores = []
        for unit in range(group.units):
            pieces = [(s, s.indices[unit]) for s in group.slices]
            if group.sharing is not None:
                pieces += [(s, s.indices[group.sharing[unit]]) for s in group.shared]
            scores.append(0.0)
            for piece, indices in pieces:
                product = program.graph_module.get_parameter(piece.parameter) * self.weights[piece.parameter]
                scores[-1] += float(product.index_select(piece.axis, torch.as_tensor(indices)).abs().sum())
        return scores


def _check(found: Mapping[str, GroupSignals], reference: _Reference) -> None:
    for group in reference.groups:
        signals = found[group.name]
        torch.testing.assert_close(signals.gradients, reference.gradients[group.name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(signals.fisher, signals.gradients.double().square().sum(0))
        names = [s.parameter.removesuffix(".weight") for s in group.consumers]
        assert list(signals.inputs) == list(signals.outputs) == list(signals.means) == names
        for name in names:
            x, g = torch.cat(reference.x[name]), torch.cat(reference.g[name])
            assert signals.tokens == len(x)
            torch.testing.assert_close(signals.inputs[name], x.T @ x, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(signals.outputs[name], g.T @ g, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(signals.means[name].float(), x.sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_autograd_through_the_masked_graph(family: str) -> None:
    program = FAMILIES[family]()
    reference = _Reference(program, _tokens())
    done: list[int] = []
    found = collect_loss_signals(program, reference.groups, _tokens(), batch_size=2, taylor=True, on_batch=done.append)
    assert done == [2, 3]
    assert len(found) == len(reference.groups) >= 4
    _check(found, reference)
    for group in reference.groups:
        taylor = found[group.name].taylor
        assert taylor is not None
        assert taylor.tolist() == pytest.approx(reference.taylor(program, group), rel=1e-3)
    _check(collect_loss_signals(program, reference.groups, _tokens()), reference)


def test_shared_layers_sum_over_their_calls() -> None:
    model = build("llama", num_hidden_layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    program = Pipeline(LOCATE)(trace(model)).program
    reference = _Reference(program, _tokens(2))
    shared, other = sorted((g for g in reference.groups if isinstance(g, MlpGroup)), key=lambda g: "1" in g.name)
    found = collect_loss_signals(program, reference.groups, _tokens(2), taylor=True)
    _check(found, reference)
    assert (found[shared.name].tokens, found[other.name].tokens) == (2 * _tokens(2).numel(), _tokens(2).numel())
    taylor = found[shared.name].taylor
    assert taylor is not None
    assert taylor.tolist() == pytest.approx(reference.taylor(program, shared), rel=1e-3)


def test_some_groups_alone_and_no_second_moments() -> None:
    program = located("llama", num_hidden_layers=3)
    reference = _Reference(program, _tokens())
    chosen = [group for group in reference.groups if ".1." in group.name]
    found = collect_loss_signals(program, chosen, _tokens(), grams=False)
    assert list(found) == [group.name for group in chosen]
    for group in chosen:
        signals = found[group.name]
        assert not signals.inputs
        assert not signals.outputs
        assert signals.taylor is None
        torch.testing.assert_close(signals.gradients, reference.gradients[group.name], rtol=1e-3, atol=1e-5)


def test_blocks_run_one_at_a_time_with_gradients_whatever_is_watched() -> None:
    program = located("llama", num_hidden_layers=3)
    chosen = [group for group in _groups(program) if ".0.mlp" in group.name]
    alive: set[int] = set()
    most = 0

    def pack(value: Tensor) -> _Saved:
        nonlocal most
        saved = _Saved(value, alive)
        most = max(most, len(alive))
        return saved

    def whole() -> None:
        samples = text_samples(program.interface, _tokens())
        given = {**samples.fixed(3), **samples.varying}
        program.graph_module(*(given[name] for name in program.interface.inputs))

    counts = []
    for run in (whole, lambda: collect_loss_signals(program, chosen, _tokens())):
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
            run()
        counts.append(most)
        assert not alive
    assert counts[1] < 0.6 * counts[0]


class _Saved:
    """A tensor that autograd keeps, counted as long as it lives."""

    def __init__(self, value: Tensor, alive: set[int]) -> None:
        self.value, self.alive = value.detach(), alive  # an output that is kept would keep itself
        alive.add(id(self))

    def __del__(self) -> None:
        self.alive.discard(id(self))


def test_the_program_is_left_as_it_was() -> None:
    program = located("llama", num_hidden_layers=3)
    module = program.graph_module
    frozen = next(module.parameters())
    frozen.requires_grad_(False)
    before = [(p.requires_grad, p.grad, p.detach().clone()) for p in module.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    try:
        collect_loss_signals(program, _groups(program), _tokens(), taylor=True)
        after = [(p.requires_grad, p.grad) for p in module.parameters()]
    finally:
        frozen.requires_grad_(True)
    assert after == [(flag, grad) for flag, grad, _ in before]
    assert all(torch.equal(p, value) for p, (_, _, value) in zip(module.parameters(), before, strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()] == hooks


def test_logits_exist_for_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = located("llama", num_hidden_layers=3)
    whole = collect_loss_signals(program, _groups(program), _tokens())
    sizes: list[int] = []
    handle = get_attribute(program.graph_module, "lm_head").register_forward_hook(
        lambda _m, _a, out: sizes.append(out.shape[0])
    )
    monkeypatch.setattr("fxprune.calibration.loss_head._LOGITS_AT_ONCE", 5 * 61)
    chunked = collect_loss_signals(program, _groups(program), _tokens(), batch_size=3)
    handle.remove()
    assert sizes == [5, 5, 5, 5, 1]
    for name, signals in whole.items():
        torch.testing.assert_close(chunked[name].gradients, signals.gradients, rtol=1e-4, atol=1e-6)


def test_drawn_targets_are_the_same_in_every_batching_and_follow_the_distribution() -> None:
    program = located("llama", num_hidden_layers=3)
    groups = _groups(program)
    one, other = (
        collect_loss_signals(program, groups, _tokens(), labels="sampled", seed=3, batch_size=size) for size in (1, 3)
    )
    another = collect_loss_signals(program, groups, _tokens(), labels="sampled", seed=4)
    data = collect_loss_signals(program, groups, _tokens())
    for name, signals in one.items():
        torch.testing.assert_close(other[name].gradients, signals.gradients, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(another[name].gradients, signals.gradients, rtol=1e-2)
        assert not torch.allclose(data[name].gradients, signals.gradients, rtol=1e-2)
    mixed = collect_loss_signals(program, groups, _tokens(), labels="mixed", seed=3, batch_size=2)
    for name, signals in mixed.items():  # every other sample is drawn, as it is when all are
        for part, of in ((slice(0, None, 2), data), (slice(1, None, 2), one)):
            torch.testing.assert_close(signals.gradients[part], of[name].gradients[part], rtol=1e-3, atol=1e-5)
    # The score has mean zero under the model's own distribution, and not under the text's.
    targets = make_targets(torch.zeros(1, 20001, dtype=torch.long), "sampled", 0).on(range(1))
    logits = torch.tensor([0.0, 1.0, 3.0])
    errors = targets.error(logits.expand(20001, 3), slice(0, 20001))
    assert float(errors[-1].abs().sum()) == 0  # nothing follows the last position
    torch.testing.assert_close(errors.mean(0), torch.zeros(3), rtol=0, atol=0.01)
    torch.testing.assert_close((1 + errors.min(0).values), logits.softmax(0), rtol=1e-4, atol=1e-5)


def test_bfloat16_products_give_nearly_the_same() -> None:
    program = located("llama", num_hidden_layers=3)
    exact = collect_loss_signals(program, _groups(program), _tokens())
    rounded = collect_loss_signals(program, _groups(program), _tokens(), forward_dtype=torch.bfloat16)
    for name, signals in exact.items():
        pairs = [(rounded[name].gradients, signals.gradients)]
        pairs += [(rounded[name].inputs[key], signals.inputs[key]) for key in signals.inputs]
        pairs += [(rounded[name].outputs[key], signals.outputs[key]) for key in signals.outputs]
        for got, wanted in pairs:
            assert got.dtype == torch.float32
            assert float((got - wanted).norm() / wanted.norm()) < 0.1
            assert not torch.equal(got, wanted)


def test_what_the_loss_cannot_say_is_refused() -> None:
    program = located("llama", num_hidden_layers=3)
    groups = _groups(program)
    nameless = dataclasses.replace(program.interface, outputs=("hidden", *program.interface.outputs[1:]))
    with pytest.raises(PreconditionError, match="need logits"):
        collect_loss_signals(program.replace(interface=nameless), groups, _tokens())
    experts = zoo.located("mixtral")
    for kind in ("expert_mlp", "experts", "hidden"):
        group = next(group for group in experts.groups if group.kind == kind)
        with pytest.raises(PreconditionError, match=re.escape(f"{group.name} [{kind}]: loss signals are of heads")):
            collect_loss_signals(experts, [group], _tokens())
    with pytest.raises(UsageError, match="labels='true' is not known"):
        collect_loss_signals(program, groups, _tokens(), labels="true")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size=0"):
        collect_loss_signals(program, groups, _tokens(), batch_size=0)
    with pytest.raises(CalibrationError, match="predict no token"):
        collect_loss_signals(program, groups, _tokens(2, 1))


def test_heads_beside_experts_have_their_signals() -> None:
    program = zoo.located("mixtral")
    reference = _Reference(program, _tokens())
    assert all(isinstance(group, AttentionGroup) for group in reference.groups)
    _check(collect_loss_signals(program, reference.groups, _tokens()), reference)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj read NaN"),
        ("model.layers.2.mlp.down_proj", "lm_head read NaN"),
        ("lm_head", "lm_head gave NaN or infinite logits"),
    ],
)
def test_the_first_module_that_sees_nan_is_named(broken: str, message: str) -> None:
    program = located("llama", num_hidden_layers=3)
    weight = get_attribute(program.graph_module, broken).weight
    before = weight.detach()[3, 3].clone()
    try:
        weight.detach()[3, 3] = torch.nan
        with pytest.raises(CalibrationError, match=message):
            collect_loss_signals(program, _groups(program), _tokens())
    finally:
        weight.detach()[3, 3] = before
    assert not [m for m in program.graph_module.modules() if m._forward_pre_hooks]


def test_gradients_that_overflow_name_the_linear() -> None:
    program = located("llama", num_hidden_layers=3)

    def explode(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]

    handle = get_attribute(program.graph_module, "model.layers.1.mlp.down_proj").register_forward_hook(explode)
    try:
        with pytest.raises(CalibrationError, match=r"output of model\.layers\.1\.mlp\.down_proj is NaN"):
            collect_loss_signals(program, _groups(program), _tokens())
    finally:
        handle.remove()
