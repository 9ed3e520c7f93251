"""Zeros stay zeros: masks of a sparse checkpoint are read by every later pass, cut with their weights, and counted."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.calibration.gram import Gram
from fxprune.channels.front_end import LOCATE, front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import PostconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.stopwatch import Stopwatch
from fxprune.exporters.report import markdown_summary
from fxprune.flows.reporting import report_of
from fxprune.flows.steps import prune_program
from fxprune.learned.lora_product import LoraProduct
from fxprune.passes.slim import Slim
from fxprune.structured.reconstruction import moments_of_gram, reconstruct
from fxprune.structured.second_order import direction
from fxprune.tracing.masks import ChannelMask
from fxprune.tracing.weight_masks import hold_masks, read_masks, write_masks
from fxprune.weights.figures import pattern_of
from tests.commands import run_command
from tests.conftest import TINY_LINES
from tests.zoo import legal_plans, located

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from fxprune.core.program import Program

LINEARS = 14  # seven in each of two layers


def locate(model: nn.Module, tokenizer: Any = None, **lift: Any) -> Program:
    passes = [build_pass(name, lift if name == "lift_linears" else {}) for name in LOCATE]
    return Pipeline(passes)(fxprune.trace(model, tokenizer=tokenizer)).program


def slimmed(program: Program, method: str, options: dict[str, Any], out: Path) -> Program:
    """Pruned, slimmed and saved; that slim equals masked is what other tests prove."""
    steps: list[tuple[str, dict[str, Any]]] = [(method, options), ("insert_masks", {}), ("slim", {})]
    steps.append(("save", {"out": str(out)}))
    return Pipeline([build_pass(name, given) for name, given in steps])(program).program


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TINY_LINES * 12))
    return path


@pytest.fixture(scope="module")
def sparse(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of which half of the weights is gone; its model is loaded without a path by most tests."""
    out = tmp_path_factory.mktemp("sparse") / "sparse"
    steps: list[tuple[str, dict[str, Any]]] = [("magnitude", {"sparsity": 0.5}), ("save", {"out": str(out)})]
    Pipeline([build_pass(name, given) for name, given in steps])(locate(tiny_llama, tiny_tokenizer))
    return out


def calibrated(text: Path, **more: Any) -> dict[str, Any]:
    return {"calibration": str(text), "samples": 8, "seq_len": 24, "forward_dtype": "float32", **more}


def held(directory: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A reloaded checkpoint whose masks fit its weights and keep nothing but zeros where they remove."""
    model, masks = fxprune.load(directory), read_masks(directory)
    assert masks
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert weight.shape == mask.shape
        assert not bool(weight[~mask].any()), name
        assert float((weight[mask] != 0).float().mean()) > 0.99, name
    return model, masks


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "channel": ("channel", {"ratio": 0.2, "steps": 1}),
    "channel and distillation": ("channel", {"ratio": 0.2, "distil_epochs": 4}),
    "channel by obs with a ridge": ("channel", {"ratio": 0.2, "criterion": "obs", "reconstruct": "ridge"}),
    "fisher": ("fisher", {"ratio": 0.2}),
    "osscar": ("osscar", {"ratio": 0.2, "samples": 16}),
    "flap": ("flap", {"ratio": 0.2, "reconstruct": "auto", "samples": 40}),
    "depth": ("depth", {"ratio": 0.3}),
}


@pytest.mark.parametrize("case", METHODS)
def test_structured_methods_hold_the_zeros_of_a_sparse_checkpoint(
    case: str, sparse: Path, text: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    method, options = METHODS[case]
    dense = fxprune.load(sparse)
    # Nothing but the model is given: the directory that its configuration names has the masks.
    program = locate(dense, tiny_tokenizer)
    assert len(program.weight_masks) == LINEARS
    after = slimmed(program, method, calibrated(text) | options, tmp_path / "slim")
    model, masks = held(tmp_path / "slim")
    assert len(masks) == (LINEARS // 2 if method == "depth" else LINEARS)
    left = sum(mask.numel() for mask in masks.values())
    assert left < 0.85 * sum(mask.numel() for mask in read_masks(sparse).values())
    report = report_of(after, method=method)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert (report["masks"]["weights"], report["masks"]["zeros"]) == (left, zeros)
    assert report["masks"]["share"] == pytest.approx(0.5, abs=0.06)
    assert report["params"]["removed_share_blocks"] > 0.15
    assert f"zeros in {LINEARS // 2 if method == 'depth' else LINEARS} Linears" in markdown_summary(report)
    assert after.plan is not None
    for index in range(2 if method not in {"depth", "flap"} else 0):  # what is left has learned
        columns = list(after.plan.kept[f"model.layers.{index}.mlp"])
        if len(columns) < 80:
            name = f"model.layers.{index}.mlp.down_proj.weight"
            assert not torch.equal(model.get_parameter(name), dense.get_parameter(name)[:, columns])


def test_in_one_program_masks_and_weights_agree_too(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, text: Path, tmp_path: Path
) -> None:
    program = build_pass("magnitude", {"sparsity": 0.5})(locate(tiny_llama, tiny_tokenizer)).program
    prune_program(program, "channel", calibrated(text, ratio=0.2), out=tmp_path / "both")
    _, masks = held(tmp_path / "both")
    assert len(masks) == LINEARS


def test_units_first_and_weights_then_give_both(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, text: Path, tmp_path: Path
) -> None:
    program = locate(tiny_llama, tiny_tokenizer)
    slim = prune_program(program, "channel", calibrated(text, ratio=0.2), out=tmp_path / "slim")
    # From the checkpoint, and in one program.
    again = front_end(load_model(tmp_path / "slim"), Stopwatch())
    assert not again.weight_masks
    for name, start in {"two": again, "one": slim}.items():
        after = prune_program(start, "sparsegpt", calibrated(text, pattern="2:4"), out=tmp_path / name)
        model, masks = held(tmp_path / name)
        assert {float(mask.float().mean()) for mask in masks.values()} == {0.5}
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny_llama.parameters())
        patterns = report_of(after, method="sparsegpt")["masks"]["patterns"]
        assert [(one["pattern"], one["linears"]) for one in patterns] == [("2:4", LINEARS)]
        assert patterns[0]["holding"] == patterns[0]["groups"]


def test_a_pattern_that_channels_break_is_not_claimed(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = build_pass("magnitude", {"pattern": "2:4"})(locate(tiny_llama, tiny_tokenizer)).program
    assert pattern_of(program.weight_masks["model.layers.0.mlp.down_proj"]) == (2, 4)
    with caplog.at_level(logging.WARNING):
        after = slimmed(program, "magnitude-units", {"ratio": 0.2}, tmp_path / "slim")
    _, masks = held(tmp_path / "slim")
    groups = holding = 0
    for mask in masks.values():
        whole = mask.shape[1] // 4 * 4
        groups += len(mask) * -(-mask.shape[1] // 4)
        holding += int((mask[:, :whole].reshape(-1, 4).sum(1) <= 2).sum())
    (one,) = report_of(after, method="magnitude-units")["masks"]["patterns"]
    assert one == {"pattern": "2:4", "linears": LINEARS, "groups": groups, "holding": holding}
    assert 0 < holding < groups
    assert f"{holding} of {groups} groups still hold the pattern 2:4" in caplog.text
    summary = markdown_summary(report_of(after, method="magnitude-units"))
    assert f"pattern 2:4: {holding:,} of {groups:,} groups still hold it" in summary


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("first", ["magnitude", "wanda"])
def test_weights_that_are_gone_count_and_stay_gone(
    method: str, first: str, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    options = {} if method == "magnitude" else calibrated(text)
    start = {} if first == "magnitude" else calibrated(text)
    program = build_pass(first, {"sparsity": 0.3, **start})(locate(tiny_llama, tiny_tokenizer)).program
    after = build_pass(method, {"sparsity": 0.5, **options})(program).program
    less = build_pass(method, {"sparsity": 0.2, **options})(program).program
    pattern = build_pass(method, {"pattern": "2:4", **options})(program).program
    for name, before in program.weight_masks.items():
        rows = len(before)
        removed = int((~after.weight_masks[name]).sum())
        assert abs(removed - 0.5 * before.numel()) <= rows
        for found in (after, less, pattern):
            mask, weight = found.weight_masks[name], found.graph_module.get_submodule(name).weight.detach()
            assert not bool((mask & ~before).any())
            assert not bool(weight[~mask].any())
        assert torch.equal(less.weight_masks[name], before), "where more is gone than asked for, nothing else goes"
        assert int(pattern.weight_masks[name].reshape(-1, 4).sum(1).max()) <= 2


def test_learned_pruning_trains_the_masked_product_and_saves_it(
    sparse: Path, text: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = {"ratio": 0.2, "samples": 16, "held_out": 4, "steps": 6, "start_samples": 4, "fit_samples": 8}
    options |= {"lora_rank": 2, "post_steps": 2, "gap": 0.3, "interval": 0.1, "lora_lr": 0.05}
    program = locate(fxprune.load(sparse), tiny_tokenizer)
    after = slimmed(program, "l0", calibrated(text) | options, tmp_path / "slim")
    model, masks = held(tmp_path / "slim")
    assert len(masks) == LINEARS
    # LoRA reaches every Linear: what is left of one that no unit was cut from has moved.
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = after.plan.kept["model.layers.1.self_attn"] if after.plan else ()
    old = fxprune.load(sparse).get_parameter(name).detach()
    rows = torch.cat([torch.arange(head * 10, head * 10 + 10) for head in kept])
    assert not torch.equal(model.get_parameter(name).detach(), old[rows])


@pytest.mark.parametrize("rows", [2, 20])  # fewer and more than the weight has
@pytest.mark.parametrize("gated", [False, True])
def test_lora_on_a_support_is_the_linear_that_merging_makes(rows: int, gated: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10, bias=True))
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7.5, target_modules=["0"]), net)
    layer: Any = net[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    support = torch.rand(10, 6) > 0.5
    with torch.no_grad():
        layer.base_layer.weight.mul_(support)
    mask = ChannelMask(torch.rand(3), torch.arange(6) // 2) if gated else None
    x = torch.randn(rows, 6, requires_grad=True)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = layer.base_layer.weight + 2.5 * support * (up @ down)
    gate = torch.ones(6) if mask is None else mask.per_channel()
    expected = nn.functional.linear(x * gate, merged, layer.base_layer.bias)
    found = LoraProduct(layer, "default", mask, support)(x)
    torch.testing.assert_close(found, expected)
    wanted = (x, down, up)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_least_squares_under_a_mask_is_that_of_every_output_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    mask = torch.rand(12, 5, generator=generator) > 0.4
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64) * mask
    kept = torch.ones(12, dtype=torch.bool)
    kept[[1, 4, 7]] = False
    gram = x.t() @ x
    found = reconstruct(
        weight, kept, moments_of_gram(Gram(gram, 200), weight), None, mode="ridge", bias=False, ridges=(0.1,), mask=mask
    )
    for column in range(5):
        here = torch.where(kept & mask[:, column])[0]
        system = gram[here][:, here] / 200
        strength = torch.diag(0.1 * system.diagonal())
        target = (gram @ weight[:, column])[here] / 200 + strength @ weight[here, column]
        torch.testing.assert_close(
            found.weight[here, column], torch.linalg.solve(system + strength, target), rtol=1e-3, atol=1e-4
        )
        gone = torch.ones(12, dtype=torch.bool)
        gone[here] = False
        assert not bool(found.weight[gone, column].any())
    # All weights there: the same as without a mask.
    whole = {"mode": "ridge", "bias": False, "ridges": (0.1,)}
    full: Any = moments_of_gram(Gram(gram, 200), weight)
    free = reconstruct(weight, kept, full, None, **whole)  # type: ignore[arg-type]
    ones = reconstruct(weight, kept, full, None, **whole, mask=torch.ones_like(mask))  # type: ignore[arg-type]
    torch.testing.assert_close(free.weight, ones.weight, rtol=1e-3, atol=1e-4)
    assert free.error <= found.error


def test_a_second_order_step_descends_on_the_support() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    gradient = torch.randn(4, 8, generator=generator)
    mask = torch.rand(4, 8, generator=generator) > 0.5
    outputs = torch.eye(4, dtype=torch.float64)
    step = direction(gradient, torch.arange(8) < 7, Gram(x.t() @ x, 50), outputs, mask)
    assert not bool(step[~mask].any())
    assert not bool(step[:, 7].any())
    assert float((step * gradient).sum()) > 0


@functools.cache
def _masked(family: str) -> Program:
    return build_pass("magnitude", {"sparsity": 0.5})(located(family)).program


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_oss"])
def test_slimming_cuts_masks_with_their_weights(family: str, tmp_path: Path) -> None:
    """Turned weights, fused projections, experts with channels of their own, hidden channels, whole layers."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    program = _masked(family)
    quiet: dict[str, Any] = {"database": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
    cut: list[int] = []

    @settings(max_examples=3, derandomize=True, deadline=None, **quiet)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        slim = Slim()(program.replace(plan=data.draw(legal_plans(program.groups, "all")))).program
        for name, mask in slim.weight_masks.items():
            weight = slim.graph_module.get_submodule(name).weight.detach()
            assert torch.equal(weight != 0, mask)
            cut.append(program.weight_masks[name].numel() - mask.numel())

    check()
    assert max(cut) > 0
    out = tmp_path / "sparse"
    build_pass("save", {"out": str(out)})(program)
    held(out)
    assert locate(fxprune.load(out)).weight_masks.keys() == program.weight_masks.keys()


# ---- where masks come from -----------------------------------------------------------------------------------------


def test_zeros_that_no_mask_holds_are_told_and_held_on_demand(
    sparse: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = AutoModelForCausalLM.from_pretrained(sparse)
    other.save_pretrained(tmp_path / "other")  # as another tool writes it: zeros, and no masks
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        program = locate(model, tiny_tokenizer)
    assert not program.weight_masks
    assert f"weights in {LINEARS} Linears" in caplog.text
    assert "hold_zeros" in caplog.text
    lifted = next(event for event in program.history if event.name == "lift_linears")
    assert len(lifted.details["zeros_without_masks"]["linears"]) == LINEARS
    program = locate(model, tiny_tokenizer, hold_zeros=True)
    assert len(program.weight_masks) == LINEARS


def test_masks_that_the_weights_have_left_are_not_held(sparse: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fxprune.load(sparse)
    masks = read_masks(sparse)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").add_(1e-3)
    with caplog.at_level(logging.WARNING):
        assert not locate(model).weight_masks
    assert "weights of model.layers.0.mlp.up_proj.weight that its mask removes are not zero" in caplog.text
    hold_masks(model, masks)
    assert len(locate(model).weight_masks) == LINEARS


def test_a_damaged_masks_file_is_told_when_the_model_is_traced(sparse: Path, tmp_path: Path) -> None:
    import shutil

    from fxprune.core.errors import CheckpointError

    shutil.copytree(sparse, tmp_path / "copy")
    (tmp_path / "copy" / "weight_masks.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="weight_masks.safetensors"):
        fxprune.trace(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), path=tmp_path / "copy")
    write_masks(tmp_path / "copy", {"nowhere.weight": torch.ones(2, 2, dtype=torch.bool)})
    model = AutoModelForCausalLM.from_pretrained(sparse)
    with pytest.raises(CheckpointError, match="nowhere.weight"):
        fxprune.trace(model, path=tmp_path / "copy")


class _Fill(Pass):
    """A pass that does not look at masks."""

    name = "fill"

    def call(self, program: Program) -> PassResult:
        from fxprune.tracing.lifted_graphs import own_projections

        root = own_projections(program.graph_module, ["model.layers.0.mlp.up_proj"])
        module: Any = root.get_submodule("model.layers.0.mlp.up_proj")
        module.weight = nn.Parameter(module.weight.detach() + 1e-3)
        return PassResult(program.replace(graph_module=root), modified=True)


def test_a_pass_that_fills_what_a_mask_removed_is_refused(sparse: Path) -> None:
    program = locate(fxprune.load(sparse))
    with pytest.raises(PostconditionError, match=r"'fill' changed weights of model\.layers\.0\.mlp\.up_proj"):
        _Fill()(program)
    assert _Fill()(program.replace(weight_masks={})).modified


def test_the_command_line_holds_masks_and_zeros(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(run_command, monkeypatch, capsys)
    common = ("--method", "magnitude-units", "--ratio", 0.2, "--guard", "none")
    code, _, error = run("prune", sparse, *common, "--out", tmp_path / "slim")
    assert code == 0, error
    _, masks = held(tmp_path / "slim")
    assert len(masks) == LINEARS
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(sparse).save_pretrained(bare)
    for file in sparse.glob("tokenizer*"):
        (bare / file.name).write_bytes(file.read_bytes())
    code, _, error = run("prune", bare, *common, "--option", "hold_zeros=true", "--out", tmp_path / "held")
    assert code == 0, error
    _, masks = held(tmp_path / "held")
    assert len(masks) == LINEARS


def test_a_plan_of_ones_own_keeps_masks(sparse: Path) -> None:
    program = locate(fxprune.load(sparse))
    plan = Plan.of({"model.layers.0.mlp": range(40), "model.layers": [0]})
    slim = Pipeline([build_pass("insert_masks", {}), Slim()])(program.replace(plan=plan)).program
    assert slim.weight_masks["model.layers.0.mlp.down_proj"].shape == (48, 40)
    assert len(slim.weight_masks) == LINEARS // 2
