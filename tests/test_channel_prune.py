"""The channel pass: hits the ratio, is deterministic, leaves a legal plan and the mean of what it removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.accounting import block_linear_parameters
from fxprune.activations import ChannelStatistics, collect_statistics
from fxprune.calibration import CalibrationSpec, calibration_set
from fxprune.channels import get_attribute
from fxprune.errors import PlanError, PreconditionError, UsageError
from fxprune.groups import AttentionGroup
from fxprune.passes.channel import ChannelPrune, unit_scores
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.pipeline import Pipeline
from fxprune.tracing import trace
from tests.families import LOCATE, build, located_plain

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from fxprune.program import Program

SMALL: dict[str, Any] = {"samples": 6, "seq_len": 12, "seed": 3}


@pytest.fixture(scope="module")
def program(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> Program:
    """The tiny Llama, located."""
    return Pipeline(LOCATE)(trace(tiny_llama, tokenizer=tiny_tokenizer)).program


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration file."""
    path: Path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 30, "utf-8")
    return str(path)


def removed_share(program: Program) -> float:
    """Removed share of the block Linears' parameters, counted on slim weights without the compensation's biases."""
    plain = Slim()(program).program.graph_module
    dense = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
    slim = block_linear_parameters(plain, outputs=program.interface.outputs)
    return 1 - slim / dense


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_ratio_is_hit_and_the_plan_is_legal(program: Program, text: str, ratio: float) -> None:
    result = ChannelPrune(ratio=ratio, calibration=text, compensate=False, **SMALL)(program)
    pruned = result.program
    assert pruned.plan is not None
    pruned.plan.validate(pruned.groups)
    total = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
    step = 8 * program.group("model.layers.0.mlp").unit_parameters  # eight channels, the smallest legal step
    assert abs(removed_share(pruned) - ratio) <= step / 2 / total
    assert result.details["removed_share"] == pytest.approx(removed_share(pruned), abs=1e-9)
    assert result.details["requested"] == ratio
    for group in pruned.groups:
        kept = pruned.plan.kept_units(group)
        assert len(kept) >= 0.1 * group.units
        if not isinstance(group, AttentionGroup):
            assert len(kept) % 8 == 0


def test_what_is_pruned_verifies_with_the_compensation(program: Program, text: str) -> None:
    steps = [ChannelPrune(ratio=0.3, calibration=text, **SMALL), InsertMasks(), Slim(), Verify()]
    verified = Pipeline(steps)(program).program
    assert all(rung["passed"] for rung in verified.results["verify"])
    assert verified.results["calibration"]["sha256"]
    assert sum(p.numel() for p in verified.graph_module.parameters()) < sum(
        p.numel() for p in program.graph_module.parameters()
    )


def test_the_same_seed_gives_the_same_plan_and_biases(program: Program, text: str) -> None:
    first, second = (ChannelPrune(ratio=0.3, calibration=text, **SMALL)(program).program for _ in range(2))
    assert first.plan == second.plan
    assert first.results == second.results
    biases = [name for name, _ in first.graph_module.named_parameters() if name.endswith("bias")]
    assert biases
    for name in biases:
        assert torch.equal(first.graph_module.get_parameter(name), second.graph_module.get_parameter(name))
    other = ChannelPrune(ratio=0.3, calibration=text, **{**SMALL, "seed": 4})(program).program
    assert other.results["calibration"]["sha256"] != first.results["calibration"]["sha256"]


def test_the_bias_is_what_the_removed_channels_contribute_on_average(
    program: Program, text: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pruned = ChannelPrune(ratio=0.3, calibration=text, **SMALL)(program).program
    assert pruned.plan is not None
    tokens = calibration_set(CalibrationSpec(text, **SMALL), tokenizer=tiny_tokenizer).tokens
    model = program.references["eager"].module
    checked = 0
    for group in pruned.groups:
        (piece,) = group.consumers
        name = piece.parameter.removesuffix(".weight")
        removed = piece.indices[pruned.plan.removed_units(group)].ravel()
        linear = get_attribute(pruned.graph_module, name)
        if not len(removed):
            assert linear.bias is None
            continue
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=tokens)
        hook.remove()
        mean = seen[0].double().reshape(-1, seen[0].shape[-1]).mean(0)
        expected = linear.weight.double()[:, removed] @ mean[removed]
        torch.testing.assert_close(linear.bias.double(), expected, rtol=1e-4, atol=1e-7)
        assert linear.weight is get_attribute(program.graph_module, name).weight
        checked += 1
    assert checked >= 2


def test_a_bias_that_is_there_already_is_added_to() -> None:
    model = build("llama", mlp_bias=True, num_hidden_layers=1)
    located = Pipeline(LOCATE)(trace(model)).program
    pruned = ChannelPrune(ratio=0.3, round_to=1, samples=4, seq_len=8)(located).program
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(
        get_attribute(pruned.graph_module, name).bias, get_attribute(located.graph_module, name).bias
    )
    steps = [InsertMasks(), Slim(), Verify(reexport=False)]
    assert all(rung["passed"] for rung in Pipeline(steps)(pruned).program.results["verify"])


def test_the_dense_program_is_left_as_it_is(program: Program, text: str) -> None:
    ChannelPrune(ratio=0.3, calibration=text, **SMALL)(program)
    assert program.plan is None
    assert not [name for name, _ in program.graph_module.named_parameters() if name.endswith("bias")]


def test_a_uniform_plan_has_one_width_a_kind_and_adds_no_biases(program: Program, text: str) -> None:
    pruned = ChannelPrune(ratio=0.3, calibration=text, uniform=True, **SMALL)(program).program
    assert pruned.plan is not None
    assert pruned.plan.is_uniform(pruned.groups)
    assert any(pruned.plan.removed_units(group) for group in pruned.groups)
    assert not [name for name, _ in pruned.graph_module.named_parameters() if name.endswith("bias")]


def test_without_a_file_the_model_writes_its_own_calibration_text(program: Program) -> None:
    pruned = ChannelPrune(ratio=0.3, **SMALL)(program).program
    assert pruned.results["calibration"]["source"] == "self"
    assert pruned.results["calibration"]["tokens"] == 72


def test_channels_that_never_change_go_first(
    program: Program, text: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    group = program.group("model.layers.0.mlp")
    tokens = calibration_set(CalibrationSpec(text, **SMALL), tokenizer=tiny_tokenizer).tokens
    name = "model.layers.0.mlp.down_proj"
    statistics = collect_statistics(program.graph_module, program.interface, [name], tokens)
    variance = statistics[name].variance.clone()
    variance[[3, 5, 7]] = 0
    still = {name: ChannelStatistics(statistics[name].mean, variance, statistics[name].tokens)}
    weight = {name: get_attribute(program.graph_module, name).weight.detach()}
    scores = unit_scores(group, weight, still)
    assert scores.shape == (80,)
    assert set(np.argsort(scores)[:3].tolist()) == {3, 5, 7}
    larger = {name: weight[name] * torch.where(torch.arange(80) == 11, 10.0, 1.0)}
    assert int(np.argmax(unit_scores(group, larger, still))) == 11


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must lie between 0 and 1"),
        ({"ratio": float("nan")}, "ratio must lie between 0 and 1"),
        ({"ratio": 0.1, "round_to": 0}, "round_to must be at least 1"),
        ({"ratio": 0.1, "min_keep": 1.0}, r"min_keep must lie in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChannelPrune(**options)


def test_a_ratio_that_no_legal_plan_reaches_is_refused(program: Program, text: str) -> None:
    with pytest.raises(PlanError, match=r"no legal plan removes 95\.0% .* the most that can go is"):
        ChannelPrune(ratio=0.95, calibration=text, **SMALL)(program)


def test_a_program_in_which_nothing_was_looked_for_is_told_what_to_run(program: Program) -> None:
    with pytest.raises(PreconditionError, match="run locate_attention and locate_mlp first"):
        ChannelPrune(ratio=0.1)(program.replace(groups=(), channels=None))


def test_a_model_without_a_prunable_group_is_told_what_was_found_and_what_pinned_it() -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.low = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.rank = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc2(self.fc1(x).relu().cummax(-1)[0]) + self.rank(self.low(x))

    located = located_plain(nn.Sequential(Sorts()), torch.randn(4, 6))
    assert not located.groups
    with pytest.raises(PreconditionError) as caught:
        ChannelPrune(ratio=0.1)(located)
    message = str(caught.value)
    assert "refused 0: no activation between the Linears" in message
    assert "pinned by" in message
    assert "cummax in 0: no rule for this operator" in message


def test_a_plain_module_has_no_text_to_run() -> None:
    mlp = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))
    with pytest.raises(PreconditionError, match="it needs a Hugging Face causal language model"):
        ChannelPrune(ratio=0.1)(located_plain(mlp, torch.randn(4, 6)))
