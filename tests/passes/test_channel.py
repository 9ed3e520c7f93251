"""The channel pass: reaches the ratio, is deterministic, chooses by the end loss, swaps, and makes up for what goes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from fxprune.channels.block_linears import block_linear_parameters
from fxprune.core.errors import PlanError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.pipeline import Pipeline
from fxprune.passes import channel
from fxprune.passes.channel import ChannelPrune
from fxprune.passes.insert_masks import InsertMasks, insert_masks
from fxprune.passes.save import Save
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.runtimes.runners import GraphRunner
from fxprune.structured.curves import Level
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from tests.families import LOCATE, build, located, located_plain

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from fxprune.core.program import Program

SMALL: dict[str, Any] = {"samples": 16, "seq_len": 12, "seed": 3, "forward_dtype": "float32"}


@pytest.fixture(scope="module")
def program(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> Program:
    """The tiny Llama, located."""
    return Pipeline(LOCATE)(trace(tiny_llama, tokenizer=tiny_tokenizer)).program


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration file."""
    path: Path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text("the compiler traces a model to a graph and finds which weights belong together. " * 60, "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pruned(program: Program, text: str) -> Program:
    """30% of it removed, reconstructed."""
    return ChannelPrune(ratio=0.3, calibration=text, **SMALL)(program).program


def removed_share(program: Program) -> float:
    """Removed share of the block Linears' parameters, counted on slim weights (biases are not among them)."""
    plain = Slim()(program).program.graph_module
    sizes = [
        sum(
            get_attribute(module, name).weight.numel()
            for name in {s.parameter.removesuffix(".weight") for g in program.groups for s in (*g.slices, *g.shared)}
        )
        for module in (program.graph_module, plain)
    ]
    total = block_linear_parameters(program.references["lifted"].module, outputs=program.interface.outputs)
    return (sizes[0] - sizes[1]) / total


# --- the budget ------------------------------------------------------------------------------------------------------


def test_ratios_are_reached_within_a_step_and_the_plans_are_legal_and_nested(program: Program, text: str) -> None:
    ratios = (0.1, 0.3, 0.5)
    step = ChannelPrune(ratio=ratios, calibration=text, reconstruct="none", **SMALL)
    budgets = step.budgets(program)
    total = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
    eight = 8 * program.group("model.layers.0.mlp").unit_parameters
    for index, (ratio, plan) in enumerate(zip(ratios, budgets.plans, strict=True)):
        result = step.apply(program, budgets, index)
        assert result.program.plan == plan
        plan.validate(program.groups)
        # What is within eight channels of the budget could not give any back; heads are larger.
        assert ratio <= removed_share(result.program) < ratio + eight / total
        assert result.details["removed_share"] == pytest.approx(removed_share(result.program), abs=1e-9)
        assert result.details["requested"] == f"ratio {ratio}"
        for group in program.groups:
            kept = plan.kept_units(group)
            assert len(kept) >= 0.1 * group.units
            assert isinstance(group, AttentionGroup) or len(kept) % 8 == 0
            assert not index or set(kept) <= set(budgets.plans[index - 1].kept_units(group))


def test_swaps_keep_the_widths_and_the_nesting_and_lower_the_error(program: Program, text: str) -> None:
    options: dict[str, Any] = {"ratio": (0.15, 0.3, 0.45), "kinds": ["mlp"], "calibration": text, **SMALL}
    swapped = ChannelPrune(criterion="obs", **options, swaps=2).budgets(program)
    plain = ChannelPrune(criterion="obs", **options).budgets(program)
    gains = swapped.notes["gained_by_swaps"]
    assert len(gains) == 3
    assert min(gains) >= 0
    assert max(gains) > 0
    assert swapped.plans != plain.plans
    for index, (new, old) in enumerate(zip(swapped.plans, plain.plans, strict=True)):
        for group in program.groups:
            assert len(new.kept_units(group)) == len(old.kept_units(group))
            assert not index or set(new.kept_units(group)) <= set(swapped.plans[index - 1].kept_units(group))
    assert "gained_by_swaps" not in plain.notes


def test_the_same_seed_gives_the_same_plan_and_weights(program: Program, pruned: Program, text: str) -> None:
    again = ChannelPrune(ratio=0.3, calibration=text, **SMALL)(program).program
    assert again.plan == pruned.plan
    assert again.results["calibration"] == pruned.results["calibration"]
    first, second = pruned.graph_module.state_dict(), again.graph_module.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = ChannelPrune(ratio=0.3, calibration=text, reconstruct="none", **{**SMALL, "seed": 4})(program).program
    assert other.results["calibration"]["sha256"] != pruned.results["calibration"]["sha256"]


def test_without_a_file_the_model_writes_its_own_calibration_text(program: Program) -> None:
    result = ChannelPrune(ratio=0.3, reconstruct="none", **SMALL)(program).program
    assert result.results["calibration"]["source"] == "self"
    assert result.results["calibration"]["tokens"] == 192


# --- what goes -------------------------------------------------------------------------------------------------------


UNHEARD = (2, 5, 11, 13, 14, 19, 30, 37)


@functools.cache
def with_unheard_channels() -> Program:
    """One layer in which the channels `UNHEARD` write, loudly, to hidden channels that nothing reads."""
    model = build("llama", num_hidden_layers=1, intermediate_size=40, hidden_size=60, tie_word_embeddings=False)
    with torch.no_grad():
        down = model.model.layers[0].mlp.down_proj.weight
        down[:4] = 0
        down[:, UNHEARD] = 0
        down[:4, UNHEARD] = 0.5 * torch.randn(4, len(UNHEARD), generator=torch.Generator().manual_seed(0))
        model.model.norm.weight[:4] = 0
    return Pipeline(LOCATE)(trace(model)).program


def test_channels_go_by_what_the_loss_hears_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = with_unheard_channels()
    options: dict[str, Any] = {"ratio": 0.1, "kinds": ["mlp"], "reconstruct": "none", **SMALL}
    group = heard.group("model.layers.0.mlp")
    for criterion, least in (("fisher", 7), ("obs", 8)):  # the norm behind hears a little of how loud they are
        by_loss = ChannelPrune(criterion=criterion, **options)(heard).program.plan
        assert by_loss is not None
        assert len(set(by_loss.removed_units(group)) & set(UNHEARD)) >= least
    monkeypatch.setattr(channel, "matrix_root", lambda metric: torch.eye(len(metric), dtype=torch.float64))
    by_outputs = ChannelPrune(criterion="obs", **options)(heard).program.plan
    assert by_outputs is not None
    assert len(set(by_outputs.removed_units(group)) & set(UNHEARD)) <= 6


@pytest.mark.parametrize("criterion", ["fisher", "obs"])
def test_channels_that_do_nothing_go_first(criterion: Any) -> None:
    model = build("llama", num_hidden_layers=1, intermediate_size=40)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[list(UNHEARD)] = 0
    silent = Pipeline(LOCATE)(trace(model)).program
    step = ChannelPrune(ratio=0.1, kinds=["mlp"], reconstruct="none", criterion=criterion, **SMALL)
    plan = step(silent).program.plan
    assert plan is not None
    assert plan.removed_units(silent.group("model.layers.0.mlp")) == list(UNHEARD)


def test_the_factor_on_heads_decides_between_heads_and_channels(program: Program, text: str) -> None:
    heads, curves = [], []
    for factor in (0.001, 1.0, 100.0):
        step = ChannelPrune(ratio=0.3, attention=factor, calibration=text, reconstruct="none", **SMALL)
        found: dict[str, list[Level]] = {}
        original = step.curves

        def kept(case: Any, original: Any = original, found: dict[str, list[Level]] = found) -> Any:
            result = original(case)
            found.update({name: list(curve.levels) for name, curve in result.items()})
            return result

        step.curves = kept  # type: ignore[method-assign]  # watched
        (plan,) = step.budgets(program).plans
        heads.append(sum(len(plan.kept_units(g)) for g in program.groups if isinstance(g, AttentionGroup)))
        curves.append(found)
    assert heads[0] < heads[1] <= heads[2] == 12
    for group in program.groups:
        factor = 100.0 if isinstance(group, AttentionGroup) else 1.0
        plain, scaled = (one[group.name] for one in curves[1:])
        assert [level.loss for level in scaled] == pytest.approx([factor * level.loss for level in plain])


def test_evenness_brings_the_widths_of_layers_together() -> None:
    model = build("llama", num_hidden_layers=2, intermediate_size=64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.2)  # its channels count for little
    uneven = Pipeline(LOCATE)(trace(model)).program
    apart = []
    for evenness in (0.0, 0.5, 1.0):
        options: dict[str, Any] = {"ratio": 0.2, "kinds": ["mlp"], "reconstruct": "none", "round_to": 2}
        (plan,) = ChannelPrune(evenness=evenness, **options, **SMALL).budgets(uneven).plans
        first, second = (len(plan.kept_units(group)) for group in uneven.groups if isinstance(group, MlpGroup))
        apart.append(first - second)
    assert apart[0] > apart[1] > abs(apart[2])
    assert abs(apart[2]) <= 8
    with pytest.raises(UsageError, match=r"evenness must lie in \[0, 1\]"):
        ChannelPrune(ratio=0.2, evenness=1.5)


def test_fewer_samples_may_be_used_for_the_gradients(program: Program, text: str) -> None:
    options: dict[str, Any] = {"ratio": 0.3, "calibration": text, "reconstruct": "none", **SMALL}
    plans = [ChannelPrune(signal_samples=count, **options).budgets(program).plans for count in (2, 16, None)]
    assert plans[0] != plans[1]
    assert plans[1] == plans[2]


# --- what is made up for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstruct", ["dense", "bias"])
def test_what_is_pruned_and_reconstructed_verifies(
    program: Program, pruned: Program, text: str, reconstruct: Any
) -> None:
    result = pruned
    if reconstruct != "dense":
        result = ChannelPrune(ratio=0.3, calibration=text, reconstruct=reconstruct, **SMALL)(program).program
    biases = any(name.endswith("bias") for name, _ in result.graph_module.named_parameters())
    assert biases is (reconstruct == "bias")
    verified = Pipeline([InsertMasks(), Slim(), Verify()])(result).program
    assert all(rung["passed"] for rung in verified.results["verify"])
    assert verified.results["calibration"]["sha256"]
    assert sum(p.numel() for p in verified.graph_module.parameters()) < sum(
        p.numel() for p in program.graph_module.parameters()
    )


def logits(program: Program, graph_module: torch.fx.GraphModule, tokens: Tensor) -> Tensor:
    """(samples, length, vocabulary) of one forward pass."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
    return GraphRunner(graph_module, program.interface).step(tokens, torch.ones_like(tokens), positions, None)[0]


def test_reconstruction_lowers_the_error_on_text_that_it_has_not_seen() -> None:
    dense = located("llama")
    options: dict[str, Any] = {"ratio": 0.3, "round_to": 4, **SMALL, "samples": 32}
    errors, layers = {}, {}
    tokens = torch.randint(4, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(dense, dense.graph_module, tokens)
    budgets = ChannelPrune(**options).budgets(dense)
    for mode in ("none", "auto", "dense"):
        result = ChannelPrune(reconstruct=mode, **options).apply(dense, budgets, 0).program
        assert result.plan is not None
        masked = insert_masks(result.graph_module, dense.groups, result.plan)
        errors[mode] = float((logits(dense, masked, tokens) - expected).square().mean())
        layers[mode] = result.results["structured"]["consumers"]
    assert max(errors["auto"], errors["dense"]) < errors["none"]
    assert {layer["choice"] for layer in layers["none"]} == {"none"}
    assert all(layer["error"] <= layer["plain_error"] for layer in layers["auto"])
    assert any(layer["error"] < 0.9 * layer["plain_error"] for layer in layers["auto"])


def test_a_bias_that_is_there_already_is_added_to() -> None:
    model = build("llama", mlp_bias=True, num_hidden_layers=1)
    own = Pipeline(LOCATE)(trace(model)).program
    result = ChannelPrune(ratio=0.3, round_to=1, reconstruct="bias", **SMALL)(own).program
    name = "model.layers.0.mlp.down_proj"
    before, after = (get_attribute(one.graph_module, name).bias for one in (own, result))
    assert not torch.equal(before, after)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.5  # added to, not replaced
    steps = [InsertMasks(), Slim(), Verify(reexport=False)]
    assert all(rung["passed"] for rung in Pipeline(steps)(result).program.results["verify"])


def test_the_dense_program_is_left_as_it_is(program: Program, pruned: Program, tiny_llama: LlamaForCausalLM) -> None:
    assert pruned.plan is not None
    assert program.plan is None
    dense = program.graph_module.state_dict()
    assert not [name for name in dense if name.endswith("bias")]
    for name, value in tiny_llama.state_dict().items():
        assert name not in dense or torch.equal(dense[name], value)


def test_a_uniform_plan_adds_no_biases_and_loads_with_a_plain_config(
    program: Program, text: str, tmp_path: Path
) -> None:
    result = ChannelPrune(ratio=0.3, calibration=text, uniform=True, reconstruct="ridge", **SMALL)(program).program
    assert result.plan is not None
    assert result.plan.is_uniform(result.groups)
    assert any(result.plan.removed_units(group) for group in result.groups if isinstance(group, MlpGroup))
    assert not [name for name, _ in result.graph_module.named_parameters() if name.endswith("bias")]
    assert "ridge" in {layer["choice"].split()[0] for layer in result.results["structured"]["consumers"]}
    slim = Pipeline([InsertMasks(), Slim(), Save(out=tmp_path / "slim")])(result).program
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(5, 15).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, logits(slim, slim.graph_module, tokens), rtol=1e-4, atol=1e-4)


def test_steps_take_a_share_of_the_samples_unless_told() -> None:
    found = [ChannelPrune(ratio=0.1, samples=samples).step_samples for samples in (32, 128, 256)]
    assert found == [24, 24, 48]
    assert ChannelPrune(ratio=0.1, samples=256, step_samples=7).step_samples == 7


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must lie between 0 and 1"),
        ({"ratio": float("nan")}, "ratio must lie between 0 and 1"),
        ({"ratio": 0.1, "round_to": 0}, "round_to must be at least 1"),
        ({"ratio": 0.1, "min_keep": 1.0}, r"min_keep must lie in \[0, 1\)"),
        ({"ratio": 0.1, "damping": 0.0}, "damping must be positive"),
        ({"ratio": 0.1, "damping": float("nan")}, "damping must be positive"),
        ({"ratio": 0.1, "attention": 0.0}, "attention must be positive"),
        ({"ratio": 0.1, "attention": float("inf")}, "attention must be positive"),
        ({"ratio": 0.1, "signal_samples": 0}, "signal_samples must be at least 1"),
        ({"ratio": 0.1, "criterion": "magic"}, "criterion is one of fisher, obs, got 'magic'"),
        ({"ratio": 0.1, "swaps": 1}, "they go with criterion=obs"),
        ({"ratio": 0.1, "step_samples": 1}, "step_samples must be at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChannelPrune(**options)


def test_a_ratio_that_no_legal_plan_reaches_is_refused(program: Program, text: str) -> None:
    with pytest.raises(PlanError, match=r"the best reachable is \d+\.\d% of the block Linear parameters removed"):
        ChannelPrune(ratio=0.95, calibration=text, **SMALL)(program)


def test_a_model_without_a_prunable_group_is_told_what_was_found_and_what_pinned_it() -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.low = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.rank = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc2(self.fc1(x).relu().cummax(-1)[0]) + self.rank(self.low(x))

    refused = located_plain(nn.Sequential(Sorts()), torch.randn(4, 6))
    assert not refused.groups
    with pytest.raises(PreconditionError) as caught:
        ChannelPrune(ratio=0.1)(refused)
    message = str(caught.value)
    assert "refused 0: no activation between the Linears" in message
    assert "pinned by" in message
    assert "cummax in 0: no rule for this operator" in message


def test_a_plain_module_has_no_text_to_run() -> None:
    mlp = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))
    with pytest.raises(PreconditionError, match="it needs a Hugging Face causal language model"):
        ChannelPrune(ratio=0.1)(located_plain(mlp, torch.randn(4, 6)))
