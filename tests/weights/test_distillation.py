"""Distillation into a sparse model: its gradients, that it helps on unseen text, that masks hold, and refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxprune.calibration.head_inputs import head_inputs
from fxprune.calibration.loss_gradients import backpropagate_loss, loss_gradients
from fxprune.calibration.loss_head import LossHead, divergence
from fxprune.core.errors import CalibrationError, PreconditionError, UsageError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.exporters.report_page import sparsity_facts
from fxprune.exporters.report_structured import structured_facts
from fxprune.flows.streaming_run import prune_streaming
from fxprune.passes.channel import ChannelPrune
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from fxprune.weights import distillation as weight_distillation
from fxprune.weights.distillation import distil_weights
from tests.conftest import TINY_LINES
from tests.zoo import located

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from fxprune.core.program import Program


def tokens(samples: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 61, (samples, 12), generator=torch.Generator().manual_seed(seed))


def sparse(dense: Program, dtype: torch.dtype = torch.float32) -> tuple[Program, dict[str, Tensor]]:
    """The program with every second input of its block Linears removed by magnitude, 2:4."""
    pruned = build_pass("magnitude", {"pattern": "2:4"})(dense).program
    masks = dict(pruned.weight_masks)
    root = own_projections(pruned.graph_module, masks)
    for name in masks:
        module = get_attribute(root, name)
        module.weight = torch.nn.Parameter(module.weight.detach().to(dtype))
    return pruned.replace(graph_module=root), masks


def loss_on(program: Program, dense: Program, ids: Tensor) -> float:
    return divergence(LossHead(program), head_inputs(program, ids), head_inputs(dense, ids))


def weights(program: Program, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: get_attribute(program.graph_module, name).weight.detach().clone() for name in masks}


def test_gradients_of_one_batch_do_not_see_the_other_and_see_weights_that_moved() -> None:
    dense = located("llama")
    pruned, masks = sparse(dense)
    ids = tokens(4)
    teacher = head_inputs(dense, ids)
    own = {name: get_attribute(pruned.graph_module, name).weight for name in masks}

    def alone(samples: slice) -> dict[str, Tensor]:
        part = {"teacher": teacher[samples], "parameters": own, "batch_size": 2}
        return backpropagate_loss(pruned, (), ids[samples], lambda _: None, **part)

    with loss_gradients(pruned, ids, own, teacher=teacher) as gradients_of:
        first = {name: value.clone() for name, value in gradients_of(range(2)).items()}
        expected = alone(slice(2))
        with torch.no_grad():
            own["model.layers.0.mlp.down_proj"].mul_(1.5)
        second = {name: value.clone() for name, value in gradients_of(range(2, 4)).items()}
    moved = alone(slice(2, 4))
    for name in masks:
        torch.testing.assert_close(first[name], expected[name])
        torch.testing.assert_close(second[name], moved[name])
        assert float(first[name].abs().max()) > 0, name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_says_more_of_what_the_dense_model_says_on_text_it_has_not_seen(family: str) -> None:
    dense = located(family)
    pruned, masks = sparse(dense)
    unseen = tokens(16, seed=9)
    before, first = loss_on(pruned, dense, unseen), weights(pruned, masks)
    untouched = {name: value.clone() for name, value in dense.graph_module.state_dict().items()}
    found = distil_weights(pruned, dense, masks, tokens(64), epochs=8, rate=0.02)
    assert found.kept
    assert found.after < 0.9 * found.before
    assert loss_on(pruned, dense, unseen) < 0.9 * before
    assert (found.samples, found.held_out) == (60, 4)
    for name, mask in masks.items():
        weight = get_attribute(pruned.graph_module, name).weight.detach()
        assert not weight[~mask].count_nonzero(), name
    changed = [name for name, value in weights(pruned, masks).items() if not torch.equal(value, first[name])]
    assert len(changed) >= len(masks) - 1
    for name, value in dense.graph_module.state_dict().items():
        assert torch.equal(value, untouched[name]), f"{name} of the dense program moved"


def test_weights_of_lower_precision_learn_in_float32() -> None:
    """A rate that is below what bfloat16 can add to a weight still moves it, over many steps."""
    dense = located("llama")
    pruned, masks = sparse(dense, torch.bfloat16)
    twin, _ = sparse(dense)
    for program in (pruned, twin):
        distil_weights(program, dense, masks, tokens(64), epochs=10, rate=1e-3, forward_dtype=torch.bfloat16)
    for value in weights(pruned, masks).values():
        assert value.dtype is torch.bfloat16
    before, after = weights(sparse(dense)[0], masks), weights(pruned, masks)
    moved = torch.cat([(after[name].float() - before[name]).flatten() for name in masks])
    wanted = torch.cat([(value - before[name]).flatten() for name, value in weights(twin, masks).items()])
    assert float(torch.nn.functional.cosine_similarity(moved, wanted, dim=0)) > 0.8


def test_weights_stay_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = located("llama")
    pruned, masks = sparse(dense)
    first = weights(pruned, masks)
    found = iter([1.0, 1.5])
    monkeypatch.setattr(weight_distillation, "divergence", lambda *_: next(found))
    result = distil_weights(pruned, dense, masks, tokens(8), epochs=1, rate=0.01)
    assert not result.kept
    assert (result.before, result.after) == (1.0, 1.5)
    for name, value in weights(pruned, masks).items():
        assert torch.equal(value, first[name]), name


def test_a_rate_that_diverges_is_an_error() -> None:
    dense = located("llama")
    pruned, masks = sparse(dense)
    with pytest.raises(CalibrationError, match=r"finite|NaN"):
        distil_weights(pruned, dense, masks, tokens(32), epochs=8, rate=1e30)


def test_a_pass_distils_and_says_so(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    traced = trace(tiny_llama, tokenizer=tiny_tokenizer, name="tiny")
    dense = build_pass("lift_linears", {})(traced).program
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TINY_LINES * 20), encoding="utf-8")
    options: dict[str, Any] = {"pattern": "2:4", "calibration": str(text), "samples": 16, "seq_len": 12}
    plain = build_pass("wanda", options)(dense).program
    after = build_pass("wanda", {**options, "distil_epochs": 4, "distil_rate": 0.01})(dense).program
    section = after.results["sparsity"]["distilled"]
    assert section["kept"]
    assert section["after"] < section["before"]
    assert "distilled" not in plain.results["sparsity"]
    assert after.results["sparsity"]["seconds"]["distil"] > 0
    for name, mask in after.weight_masks.items():
        assert torch.equal(mask, plain.weight_masks[name]), "distillation moves no mask"
    (fact,) = [fact for fact in sparsity_facts({"sparsity": after.results["sparsity"]}) if fact.label == "Distilled"]
    assert f"{section['steps']} steps" in fact.value
    assert not [fact for fact in sparsity_facts({"sparsity": plain.results["sparsity"]}) if fact.label == "Distilled"]


def test_channel_distils_what_is_left_of_all_projections() -> None:
    dense = located("llama")
    options: dict[str, Any] = {"ratio": [0.2, 0.4], "round_to": 4, "samples": 64, "seq_len": 12}
    plain, more = (ChannelPrune(**options, distil_epochs=epochs, distil_rate=0.01) for epochs in (0, 8))
    budgets = plain.budgets(dense)
    budgets.tokens.copy_(tokens(64))
    unseen = tokens(16, seed=9)
    untouched = {name: value.clone() for name, value in dense.graph_module.state_dict().items()}
    for index in range(2):
        before, after = (step.apply(dense, budgets, index).program for step in (plain, more))
        section = after.results["structured"]
        assert section["distilled"]["kept"]
        assert "distilled" not in before.results["structured"]
        assert loss_on(after, dense, unseen) < 0.95 * loss_on(before, dense, unseen)
        assert after.plan == before.plan
        for group in dense.groups:
            if group.kind not in {"attention", "mlp"}:
                continue
            assert after.plan is not None
            gone = torch.from_numpy(group.consumers[0].indices)[after.plan.removed_units(group)].reshape(-1)
            name = group.consumers[0].parameter.removesuffix(".weight")
            assert not get_attribute(after.graph_module, name).weight.detach()[:, gone].count_nonzero(), name
        moved = get_attribute(after.graph_module, "model.layers.0.mlp.up_proj").weight
        assert not torch.equal(moved, get_attribute(dense.graph_module, "model.layers.0.mlp.up_proj").weight)
        assert any(fact.label == "Distilled" for fact in structured_facts(section))
        for name, value in dense.graph_module.state_dict().items():
            assert torch.equal(value, untouched[name]), f"{name} of the dense program moved"
    Pipeline([build_pass(name, {}) for name in ("insert_masks", "slim", "verify")])(after)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magnitude", {"distil_epochs": 1}, "reads no text"),
        ("wanda", {"distil_epochs": -1}, "distil_epochs"),
        ("wanda", {"distil_epochs": 1, "distil_rate": 0}, "distil_rate"),
        ("wanda", {"distil_epochs": 1, "exclude_lm_head": False}, "lm_head"),
        ("channel", {"ratio": 0.2, "distil_epochs": 1, "reconstruct": "none"}, "reconstruct=none"),
        ("channel", {"ratio": 0.2, "distil_epochs": -1}, "distil_epochs"),
    ],
)
def test_options_that_cannot_be(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pass(method, options)


def test_what_cannot_be_distilled(tmp_path: Path) -> None:
    dense = located("llama")
    pruned, masks = sparse(dense)
    with pytest.raises(UsageError, match="2 samples"):
        distil_weights(pruned, dense, masks, tokens(1), epochs=1, rate=0.01)
    with pytest.raises(UsageError, match="not one step"):
        distil_weights(pruned, dense, masks, tokens(8), epochs=0.001, rate=0.01)
    head = {"lm_head": torch.ones(1, 1, dtype=torch.bool)}
    with pytest.raises(PreconditionError, match="lm_head is pruned"):
        distil_weights(pruned, dense, {**masks, **head}, tokens(8), epochs=1, rate=0.01)
    method = build_pass("wanda", {"calibration": "text.txt", "distil_epochs": 1})
    with pytest.raises(UsageError, match="distil_epochs"):
        prune_streaming(tmp_path, tmp_path / "out", method)  # type: ignore[arg-type]
