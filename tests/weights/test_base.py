"""Weight-pruning passes: every projection in scope reaches its target, the rest stays dense, and masks survive.

What the solvers do to one weight is tested with them; here it is the passes on whole models.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import (
    CalibrationError,
    CheckpointError,
    FxpruneError,
    PlanError,
    PostconditionError,
    PreconditionError,
    UsageError,
)
from fxprune.core.groups import AttentionGroup, LayerGroup, MlpGroup
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.passes import alps
from fxprune.passes.magnitude import MagnitudeSolver
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from fxprune.tracing.weight_masks import hold_masks, read_masks, write_masks
from fxprune.weights.base import forward_precision
from fxprune.weights.sparsity import Sparsity
from tests.conftest import TINY_LINES
from tests.zoo import located

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from fxprune.core.program import Program

METHODS = [
    "magnitude",
    "wanda",
    "sparsegpt",
    pytest.param("alps", marks=pytest.mark.skipif(not hasattr(alps, "Alps"), reason="alps is a solver only")),
]
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BLOCK_LINEARS = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TINY_LINES * 20), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def program(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> Program:
    """The tiny Llama, located, its output projection tied to the embedding."""
    traced = trace(tiny_llama, tokenizer=tiny_tokenizer, name="tiny")
    return Pipeline([build_pass(step, {}) for step in LOCATE])(traced).program


@pytest.fixture(scope="module")
def plain() -> Program:
    """Two Linears that read numbers, not tokens."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return build_pass("lift_linears", {})(trace(module, example_inputs=(torch.randn(2, 12),))).program


def pruned(program: Program, method: str, text: Path | str, **options: Any) -> Program:
    given = {"calibration": str(text), "samples": 4, "seq_len": 16, "batch_size": 2, **options}
    return build_pass(method, given)(program).program


def weight_of(program: Program, name: str) -> Tensor:
    weight: Tensor = get_attribute(program.graph_module, name).weight.detach()
    return weight


def shares(program: Program) -> dict[str, float]:
    """Share of zeros of every projection that has a mask."""
    return {name: float((weight_of(program, name) == 0).float().mean()) for name in program.weight_masks}


def by_name(program: Program) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in program.results["sparsity"]["linears"]}


# ---- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_block_linear_reaches_the_target(
    program: Program, text: Path, method: str, target: dict[str, Any]
) -> None:
    after = pruned(program, method, text, **target)
    assert list(after.weight_masks) == BLOCK_LINEARS
    for name, mask in after.weight_masks.items():
        weight = weight_of(after, name)
        assert mask.dtype is torch.bool
        assert torch.equal(weight != 0, mask), name
        assert weight.dtype is torch.float32
        assert int(mask.sum()) == mask.numel() // 2, name
        if "pattern" in target:
            assert set(mask.reshape(len(mask), -1, 4).sum(-1).unique().tolist()) == {2}, name
        assert bool((weight_of(program, name) != 0).all()), f"{name} of the given program was changed"
    assert torch.equal(weight_of(after, "lm_head"), weight_of(program, "lm_head"))
    section = after.results["sparsity"]
    assert section["method"] == method
    assert section["removed_share"] == 0.5
    assert section["pruned_linears"] == 14
    assert section["dense_linears"] == ["lm_head"]
    assert section["target"] == (target.get("pattern") or "0.5")
    assert all(0 < entry["error"] < 1 and entry["removed"] == 0.5 for entry in section["linears"])
    assert section["mean_error"] == pytest.approx(sum(e["error"] for e in section["linears"]) / 14)
    assert after.history[-1].name == method
    assert after.history[-1].details["removed_share"] == 0.5


def test_solvers_that_update_beat_those_that_only_choose(program: Program, text: Path) -> None:
    wanda, sparsegpt = (
        pruned(program, method, text, samples=16).results["sparsity"]["mean_error"] for method in ("wanda", "sparsegpt")
    )
    assert sparsegpt < 0.9 * wanda


def test_the_report_says_where_the_time_went(program: Program, text: Path) -> None:
    seconds = pruned(program, "sparsegpt", text).results["sparsity"]["seconds"]
    assert set(seconds) == {"text", "cut", "forward", "gram", "prepare", "solve"}
    assert all(value >= 0 for value in seconds.values())
    assert set(pruned(program, "magnitude", text).results["sparsity"]["seconds"]) == {"solve"}


def test_the_same_seed_gives_the_same_weights_and_another_one_other_text(program: Program, text: Path) -> None:
    one, again, other = (pruned(program, "sparsegpt", text, seed=seed) for seed in (3, 3, 4))
    hashes = [run.results["calibration"]["sha256"] for run in (one, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert all(torch.equal(weight_of(one, name), weight_of(again, name)) for name in BLOCK_LINEARS)
    assert not torch.equal(weight_of(one, BLOCK_LINEARS[0]), weight_of(other, BLOCK_LINEARS[0]))


def test_dense_inputs_change_what_later_blocks_see(program: Program, text: Path) -> None:
    after, dense = (pruned(program, "wanda", text, inputs=inputs) for inputs in ("pruned", "dense"))
    first, last = BLOCK_LINEARS[0], BLOCK_LINEARS[-1]
    assert torch.equal(after.weight_masks[first], dense.weight_masks[first])
    assert not torch.equal(after.weight_masks[last], dense.weight_masks[last])


def test_text_sampled_from_the_model_serves_too(program: Program) -> None:
    after = pruned(program, "wanda", "self")
    assert after.results["calibration"]["kind"] == "sampled from the model"
    assert set(shares(after).values()) == {0.5}


# ---- scope ---------------------------------------------------------------------------------------------------------


def scoped(program: Program, **options: Any) -> dict[str, float]:
    return shares(build_pass("magnitude", options)(program).program)


def test_include_and_exclude_choose(program: Program) -> None:
    assert list(scoped(program, include=["*.k_proj"])) == [name for name in BLOCK_LINEARS if name.endswith("k_proj")]
    found = scoped(program, include=["*.mlp.*"], exclude=["model.layers.0.*", "*.up_proj"])
    assert list(found) == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


def test_the_first_pattern_of_per_module_counts(program: Program) -> None:
    per_module = {"*.q_proj": 0.75, "model.layers.0.mlp.*": "dense", "*.mlp.*": "1:4", "*.o_proj": 0}
    after = build_pass("magnitude", {"sparsity": 0.25, "per_module": per_module})(program).program
    found = shares(after)
    assert [found[name] for name in BLOCK_LINEARS if name.endswith("q_proj")] == [0.75, 0.75]
    assert not any(name.startswith("model.layers.0.mlp") or name.endswith("o_proj") for name in found)
    assert {by_name(after)[name]["target"] for name in found if ".mlp." in name} == {"1:4"}
    assert [found[f"model.layers.{layer}.self_attn.k_proj"] for layer in range(2)] == [0.25, 0.25]
    dense = after.results["sparsity"]["dense_linears"]
    assert dense == [name for name in [*BLOCK_LINEARS, "lm_head"] if name not in found]
    weights = after.results["sparsity"]["weights"]
    assert weights == sum(mask.numel() for mask in after.weight_masks.values())
    removed = sum(int((~mask).sum()) for mask in after.weight_masks.values())
    assert after.results["sparsity"]["removed_share"] == pytest.approx(removed / weights)


@pytest.mark.parametrize("option", ["include", "exclude", "per_module"])
def test_a_pattern_that_matches_nothing_is_told(program: Program, option: str) -> None:
    pattern = "*.query"
    value = {pattern: 0.5} if option == "per_module" else [pattern]
    with pytest.raises(UsageError, match=r"'\*\.query' matches none of the 15 projections"):
        build_pass("magnitude", {option: value})(program)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_group_that_does_not_divide_names_the_linear(program: Program, text: Path, method: str) -> None:
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.o_proj has 60 inputs.*groups of 8"):
        pruned(program, method, text, pattern="3:8")
    found = pruned(program, method, text, pattern="3:8", exclude=["*.o_proj"])
    assert len(found.weight_masks) == 12


@pytest.mark.parametrize(
    "options", [{"exclude_lm_head": False}, {"include": ["lm_head"]}, {"per_module": {"lm_head": 0.5}}]
)
def test_a_tied_output_projection_is_refused(program: Program, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"lm_head shares its weight with model\.embed_tokens"):
        build_pass("magnitude", options)(program)


@pytest.mark.parametrize("options", [{"exclude": ["*"]}, {"sparsity": 0.0}, {"per_module": {"*": "dense"}}])
def test_nothing_to_prune_is_told(program: Program, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="no projection is left to prune"):
        build_pass("magnitude", options)(program)


def test_an_output_projection_of_its_own_is_pruned_when_asked_for() -> None:
    moe = located("mixtral")
    assert "lm_head" not in scoped(moe)
    assert scoped(moe, exclude_lm_head=False)["lm_head"] == pytest.approx(0.5, abs=0.01)
    assert list(scoped(moe, include=["lm_head"])) == ["lm_head"]
    assert list(scoped(moe, include=["lm_head"], exclude=["*.q_proj"])) == ["lm_head"]


# ---- allocation ----------------------------------------------------------------------------------------------------


def test_allocation_by_loss_keeps_the_total(program: Program, text: Path) -> None:
    after = pruned(program, "wanda", text, sparsity=0.6, allocation="loss")
    found = shares(after)
    # Wanda rounds to whole weights of a row: half a weight a row is the most it can miss by.
    rows = sum(len(mask) for mask in after.weight_masks.values())
    weights = after.results["sparsity"]["weights"]
    assert after.results["sparsity"]["removed_share"] == pytest.approx(0.6, abs=0.5 * rows / weights)
    assert max(found.values()) - min(found.values()) > 0.02
    assert all(abs(share - 0.6) < 0.12 + 1 / 48 for share in found.values())
    assert after.results["sparsity"]["allocation"] == "loss"
    assert "allocate" in after.results["sparsity"]["seconds"]
    assert all(parameter.requires_grad for parameter in program.graph_module.parameters())


def test_allocation_by_loss_leaves_patterns_alone(program: Program, text: Path) -> None:
    after = pruned(program, "wanda", text, allocation="loss", per_module={"*.q_proj": "2:4", "*.mlp.*": "dense"})
    assert {share for name, share in shares(after).items() if name.endswith("q_proj")} == {0.5}
    only = pruned(program, "wanda", text, allocation="loss", per_module={"*": "2:4"})
    assert {entry["target"] for entry in by_name(only).values()} == {"2:4"}


def test_allocation_by_loss_refuses_experts() -> None:
    with pytest.raises(PreconditionError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj_linear"):
        pruned(located("mixtral"), "wanda", "self", allocation="loss")


# ---- experts -------------------------------------------------------------------------------------------------------


@functools.cache
def pruned_experts() -> Program:
    return pruned(located("mixtral"), "sparsegpt", "self", pattern="2:4")


def test_experts_get_masks_of_their_own() -> None:
    after = pruned_experts()
    grouped = [name for name in after.weight_masks if ".experts." in name]
    assert len(grouped) == 4
    for name in grouped:
        mask = after.weight_masks[name]
        assert mask.shape == weight_of(after, name).shape
        assert torch.equal(weight_of(after, name) != 0, mask)
        assert set(mask.reshape(*mask.shape[:2], -1, 4).sum(-1).unique().tolist()) == {2}
        assert all(not torch.equal(mask[0], other) for other in mask[1:]), name


def test_experts_that_read_few_tokens_are_reported() -> None:
    notes = {name: entry.get("notes", {}) for name, entry in by_name(pruned_experts()).items()}
    wide = notes["model.layers.0.mlp.experts.gate_up_proj_linear"]["experts_with_few_tokens"]
    # 4 samples of 16 tokens, 2 experts a token: 128 rows for 5 experts of 36 inputs, so some read fewer than 36.
    assert wide
    assert set(wide) <= set(range(5))
    assert "experts_with_few_tokens" not in notes["model.layers.0.self_attn.q_proj"]
    fewest = by_name(pruned_experts())["model.layers.0.mlp.experts.gate_up_proj_linear"]["tokens"]
    assert fewest < 36


def test_routers_stay_dense_unless_named_whole() -> None:
    moe = located("mixtral")
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    assert set(gates) <= set(pruned_experts().results["sparsity"]["dense_linears"])
    assert list(scoped(moe, include=["*.mlp.gate", "lm_head"])) == ["lm_head"]
    assert list(scoped(moe, include=[gates[1]])) == [gates[1]]
    assert scoped(moe, per_module={gates[0]: 0.25})[gates[0]] == 0.25


def test_transposed_experts_are_grouped_along_their_inputs() -> None:
    after = build_pass("magnitude", {"pattern": "1:4", "include": ["*.experts.*"]})(located("gpt_oss")).program
    assert len(after.weight_masks) == 4
    for name, mask in after.weight_masks.items():
        module = get_attribute(after.graph_module, name)
        along = mask.movedim(module.in_axis, -1)
        assert module.transposed
        assert set(along.reshape(*along.shape[:2], -1, 4).sum(-1).unique().tolist()) == {1}, name


# ---- masks ---------------------------------------------------------------------------------------------------------


def test_masks_are_narrowed_by_slimming(program: Program, text: Path) -> None:
    before = pruned(program, "sparsegpt", text)
    attention = next(g for g in before.groups if isinstance(g, AttentionGroup) and g.layer == 0)
    mlp = next(g for g in before.groups if isinstance(g, MlpGroup) and g.layer == 1)
    channels = list(range(0, 80, 2))
    plan = Plan.of({attention.name: [3, 4, 5], mlp.name: channels})
    after = build_pass("slim", {})(before.replace(plan=plan)).program
    rows = torch.arange(30, 60)
    expected = dict(before.weight_masks)
    for name, index in (
        ("0.self_attn.q_proj", (rows,)),
        ("0.self_attn.k_proj", (torch.arange(10, 20),)),
        ("0.self_attn.v_proj", (torch.arange(10, 20),)),
        ("0.self_attn.o_proj", (slice(None), rows)),
        ("1.mlp.gate_proj", (channels,)),
        ("1.mlp.up_proj", (channels,)),
        ("1.mlp.down_proj", (slice(None), channels)),
    ):
        expected[f"model.layers.{name}"] = expected[f"model.layers.{name}"][index]
    assert set(after.weight_masks) == set(expected)
    for name, mask in after.weight_masks.items():
        assert torch.equal(mask, expected[name]), name
        assert torch.equal(weight_of(after, name) != 0, mask), name


def test_masks_of_a_removed_layer_go_with_it_and_the_others_follow_their_weights(
    program: Program, tmp_path: Path
) -> None:
    before = build_pass("magnitude", {})(program).program
    layers = next(g for g in before.groups if isinstance(g, LayerGroup))
    after = build_pass("slim", {})(before.replace(plan=Plan.of({layers.name: [1]}))).program
    assert list(after.weight_masks) == BLOCK_LINEARS[7:]
    out = tmp_path / "out"
    build_pass("save", {"out": str(out)})(after)
    masks, model = read_masks(out), AutoModelForCausalLM.from_pretrained(out)
    assert set(masks) == {f"{name}.weight" for name in BLOCK_LINEARS[:7]}  # the checkpoint counts its layers from 0
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_checkpoint_keeps_masks_and_zeros(program: Program, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    after = build_pass("save", {"out": str(out)})(pruned(program, "sparsegpt", text, pattern="2:4")).program
    assert after.results["checkpoint"]["kind"] == "uniform"
    masks = read_masks(out)
    assert set(masks) == {f"{name}.weight" for name in after.weight_masks}
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, mask in after.weight_masks.items():
        weight = model.get_submodule(name).weight.detach()
        assert torch.equal(weight, weight_of(after, name))
        assert torch.equal(weight != 0, mask)
        assert torch.equal(masks[f"{name}.weight"], mask)


def test_masks_are_held_after_a_training_step(program: Program, tiny_llama: LlamaForCausalLM) -> None:
    masks = build_pass("magnitude", {"sparsity": 0.7})(program).program.weight_masks
    model = copy.deepcopy(tiny_llama)
    weights = {name: model.get_submodule(name).weight for name in masks}
    optimiser = torch.optim.SGD(weights.values(), lr=0.1)
    model(torch.arange(5, 15)[None], labels=torch.arange(5, 15)[None]).loss.backward()
    optimiser.step()
    moved = {name: weight.detach().clone() for name, weight in weights.items()}
    hold_masks(model, {f"{name}.weight": mask for name, mask in masks.items()})
    for name, mask in masks.items():
        assert not bool(weights[name].detach()[~mask].any())
        assert torch.equal(weights[name].detach()[mask], moved[name][mask])
        assert weights[name].requires_grad


def test_a_second_pass_keeps_the_masks_of_the_first(program: Program) -> None:
    first = build_pass("magnitude", {"include": ["*.q_proj"]})(program).program
    second = build_pass("magnitude", {"include": ["*.k_proj"], "sparsity": 0.25})(first).program
    assert sorted(set(shares(second).values())) == [0.25, 0.5]
    assert len(second.weight_masks) == 4
    assert second.results["sparsity"]["pruned_linears"] == 2


def test_masks_come_back_bit_by_bit_and_a_damaged_file_is_told(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {
        "a": torch.rand(3, 5, generator=generator) > 0.5,  # 15 bits: the last byte is not full
        "b.c": torch.rand(2, 3, 4, generator=generator) > 0.5,
        "d": torch.ones(1, 1, dtype=torch.bool),
    }
    write_masks(tmp_path, masks)
    found = read_masks(tmp_path)
    assert list(found) == list(masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    file = tmp_path / "weight_masks.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="weight_masks"):
        read_masks(tmp_path)
    file.unlink()
    assert read_masks(tmp_path) == {}
    write_masks(tmp_path, {})
    assert not file.exists()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_masks(tmp_path / "missing", masks)


def test_a_pass_that_leaves_a_removed_weight_is_caught(program: Program) -> None:
    step = build_pass("magnitude", {"include": ["*.q_proj"]})
    after = step(program).program
    get_attribute(after.graph_module, BLOCK_LINEARS[0]).weight.data.fill_(1.0)
    with pytest.raises(PostconditionError, match=r"q_proj that its mask removes"):
        step.ensures(program, after)


# ---- pipelines and bad input ---------------------------------------------------------------------------------------


def test_a_yaml_pipeline_prunes_and_saves(program: Program, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"""
passes:
  - lift_linears
  - sparsegpt:
      pattern: "2:4"
      calibration: {text}
      samples: 4
      seq_len: 16
      damping_rule: median
      per_module: {{"*.down_proj": "1:4", "*.o_proj": dense}}
  - save: {{out: {tmp_path / "out"}}}
"""
    )
    traced = program.replace(graph_module=program.references["traced"].module, history=())
    after = Pipeline.from_yaml(file)(traced).program
    assert [event.name for event in after.history] == ["lift_linears", "sparsegpt", "save"]
    found = shares(after)
    assert {found[name] for name in BLOCK_LINEARS if name.endswith("down_proj")} == {0.75}
    assert len(read_masks(tmp_path / "out")) == 12
    assert {entry["notes"]["damping_rule"] for entry in by_name(after).values()} == {"median"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "at least 0 and less than 1"),
        ({"sparsity": -0.1}, "at least 0 and less than 1"),
        ({"sparsity": float("nan")}, "at least 0 and less than 1"),
        ({"pattern": "4:2"}, "0 < N < M|less than 1"),
        ({"pattern": "0:4"}, "0 < N < M|less than 1"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "half"}, "neither a share"),
        ({"pattern": 124}, "pattern"),  # what YAML makes of 2:4 without quotes
        ({"sparsity": 0.5, "pattern": "2:4"}, "either a sparsity or a pattern"),
        ({"per_module": {"*": "some"}}, "neither a share"),
        ({"per_module": {"*": 1.5}}, "at least 0 and less than 1"),
        ({"allocation": "random"}, "allocation"),
        ({"allocation": "loss", "pattern": "2:4"}, "allocation=loss needs a sparsity"),
        ({"inputs": "both"}, "inputs"),
        ({"samples": 0}, "samples >= 1"),
        ({"seq_len": 1}, "seq_len >= 2"),
        ({"sparsty": 0.5}, "did you mean 'sparsity'"),
        ({"damping": -1.0}, "damping"),
        ({"forward_dtype": "float7"}, "float7"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_a_wrong_option_is_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pass("sparsegpt", options)


def test_a_text_that_is_too_short_is_told(program: Program, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the graph")
    with pytest.raises(CalibrationError, match="4 samples of 16 tokens need 64"):
        pruned(program, "wanda", short)
    with pytest.raises(CalibrationError, match="missing.txt does not exist"):
        pruned(program, "wanda", tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="longer than the model's 128 positions"):
        pruned(program, "wanda", short, seq_len=129)


def with_nan(program: Program, *names: str) -> Program:
    """The program with a NaN in some weights."""
    graph_module = own_projections(program.graph_module, names)
    for name in names:
        weight = get_attribute(graph_module, name).weight.detach().clone()
        weight[0, 0] = torch.nan
        get_attribute(graph_module, name).weight = nn.Parameter(weight)
    return program.replace(graph_module=graph_module)


@pytest.mark.parametrize("options", [{}, {"allocation": "loss"}], ids=["uniform", "loss"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_are_told_by_the_first_module(
    program: Program, text: Path, method: str, options: dict[str, Any]
) -> None:
    broken = with_nan(program, "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj")
    with pytest.raises(FxpruneError, match=r"model\.layers\.0\.mlp\.up_proj.* NaN"):
        pruned(broken, method, text, **options)


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
def test_nan_activations_are_told_by_who_makes_them(program: Program, text: Path, allocation: str) -> None:
    broken = with_nan(program, "model.layers.0.self_attn.o_proj")
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.self_attn\.o_proj has weights that are NaN"):
        pruned(broken, "wanda", text, exclude=["*.o_proj"], allocation=allocation)


def test_numbers_instead_of_tokens_need_a_method_without_text(plain: Program) -> None:
    found = build_pass("magnitude", {"pattern": "2:4", "exclude_lm_head": False})(plain).program
    assert set(shares(found).values()) == {0.5}
    with pytest.raises(PreconditionError, match="calibration text gives no"):
        build_pass("wanda", {})(plain)


def test_products_cannot_be_more_precise_than_the_weights(program: Program, text: Path) -> None:
    with pytest.raises(UsageError, match="forward_dtype is float64, but the model is in float32"):
        pruned(program, "wanda", text, forward_dtype="float64")
    assert forward_precision("auto", torch.bfloat16, torch.device("cpu")) is None
    assert forward_precision("float32", torch.float32, torch.device("cpu")) is None
    assert forward_precision("bfloat16", torch.float32, torch.device("cpu")) is torch.bfloat16
    found = pruned(program, "wanda", text, forward_dtype="float32").results["sparsity"]
    assert found["forward_dtype"] == "as traced"
    assert pruned(program, "wanda", text, forward_dtype="bfloat16").results["sparsity"]["forward_dtype"] == "bfloat16"


def test_a_program_that_is_not_lifted_is_refused(program: Program) -> None:
    traced = program.replace(graph_module=program.references["traced"].module, groups=(), history=())
    with pytest.raises(PreconditionError, match="lift_linears"):
        build_pass("magnitude", {})(traced)


def test_masks_of_transposed_weights_lie_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    """GPT-2's square c_proj would take a mask that is turned without a word, and lose other weights."""
    gpt2 = build_pass("magnitude", {})(located("gpt2")).program
    build_pass("save", {"out": str(tmp_path / "out")})(gpt2)
    masks = read_masks(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert masks
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    hold_masks(model, masks)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    with pytest.raises(CheckpointError, match="nowhere"):
        hold_masks(model, {"nowhere": torch.ones(2, 2, dtype=torch.bool)})


def test_transposed_weights_in_bfloat16_with_ties_are_pruned_exactly() -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).bfloat16().t()
    solver = MagnitudeSolver()
    assert int(solver.solve(weight, solver.prepare(None), Sparsity(0.5)).mask.sum()) == 48 * 16


def test_experts_without_located_routers_are_refused() -> None:
    moe = located("mixtral")
    with pytest.raises(PreconditionError, match="run locate_attention"):
        build_pass("magnitude", {})(moe.replace(groups=()))
