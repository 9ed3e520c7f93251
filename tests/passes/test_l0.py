"""The pass `l0` and its command: down to a slim, verified checkpoint; the faults of the reference code; refusals."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fxprune
from fxprune import load
from fxprune.core.errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
    PreconditionError,
    TrainingError,
    UsageError,
)
from fxprune.core.pipeline import Pipeline, build_pass, load_pipeline
from fxprune.learned import start as l0_start
from fxprune.learned.finish import Finished, choose
from fxprune.learned.post import read_instructions
from fxprune.learned.training import Learner
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_layers import LocateLayers
from fxprune.structured.curves import balanced
from tests.commands import run_command
from tests.conftest import TINY_LINES
from tests.families import located

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from fxprune.core.program import Program

SMALL: dict[str, Any] = {
    "ratio": 0.4,
    "samples": 20,
    "seq_len": 12,
    "held_out": 4,
    "steps": 5,
    "start_samples": 8,
    "fit_samples": 16,
    "fit_steps": 2,
    "round_to": 4,
    "lora_rank": 2,
}
LAGRANGIAN: dict[str, Any] = {"budget": "lagrangian", "tolerance": 1.0, "drop_rate": 0.4, "round_to": 8}


@functools.cache
def program() -> Program:
    return LocateHidden()(LocateLayers()(located("llama")).program).program


def pruned(**options: Any) -> Program:
    return build_pass("l0", {**SMALL, **options})(program()).program


def slimmed(found: Program) -> Program:
    return Pipeline(
        [build_pass("insert_masks", {}), build_pass("slim", {}), build_pass("verify", {"reexport": False})]
    )(found).program


def learning(found: Program) -> dict[str, Any]:
    section: dict[str, Any] = found.results["structured"]["learning"]
    return section


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {**LAGRANGIAN, "kinds": ["attention", "mlp", "hidden"]}],
    ids=["fixed", "fixed with hidden channels"],
)
def test_learned_models_are_slimmed_and_verified(options: dict[str, Any]) -> None:
    """Faults of the reference code, of which the fixed mode has none.

    It never slims; K and V stay, and grouped queries crash; embeddings stay under a hidden mask, and norms divide by
    4096. Folding, float64 sizes and the divergence per token have tests of their own beside what computes them.
    """
    found = pruned(**options)
    slim = slimmed(found)
    assert all(rung["passed"] for rung in slim.results["verify"])
    assert {"masked = eager without the units", "slim = masked"} <= {r["rung"] for r in slim.results["verify"]}
    weights = {name: tuple(p.shape) for name, p in slim.graph_module.named_parameters()}
    assert found.plan is not None
    kept = {group.name: len(found.plan.kept_units(group)) for group in program().groups}
    assert any(kept[group.name] < group.units for group in program().groups)
    for group in program().groups:
        if group.kind in {"attention", "mlp"}:
            piece = group.consumers[0]
            assert weights[piece.parameter][1] == kept[group.name] * piece.per_unit
        if group.kind == "hidden" and "hidden" in options.get("kinds", ()):
            assert kept[group.name] < 30
            assert weights["model.embed_tokens.weight"] == (61, kept[group.name])
            assert weights["model.norm.weight"] == (kept[group.name],)
    section = found.results["structured"]
    assert section["removed_share"] == pytest.approx(
        1
        - sum(_block(weights)) / sum(_block({n: tuple(p.shape) for n, p in program().graph_module.named_parameters()}))
    )
    assert section["removed_share"] >= SMALL["ratio"] - 1e-9


def test_whole_layers_have_gates_that_learn() -> None:
    found = pruned(**LAGRANGIAN, kinds=["layers"], mask_lr=0.5)
    (layers,) = [group for group in program().groups if group.kind == "layers"]
    assert found.plan is not None
    kept = list(found.plan.kept_units(layers))
    assert 0 < len(kept) < layers.units
    widths = [row["widths"][layers.name] for row in learning(found)["widths"]]
    assert widths[-1] == len(kept)
    slim = slimmed(found)
    assert all(rung["passed"] for rung in slim.results["verify"])
    present = {name.split(".")[2] for name, _ in slim.graph_module.named_parameters() if ".layers." in name}
    assert present == {str(index) for index in kept}
    assert found.results["structured"]["removed_share"] == pytest.approx(1 - len(kept) / layers.units)


def test_the_reference_runs_as_the_paper_has_it() -> None:
    found = pruned(mode="reference", drop_rate=0.4, tolerance=1.0, round_to=8)
    section = learning(found)
    assert section["budget"] == "lagrangian"
    assert {"lambda_linear", "lambda_quadratic", "penalty"} <= section["curves"][-1].keys()
    assert "one-shot plan" not in section["held_out_kl"]
    assert {group.kind for group in program().groups if group.name in section["widths"][0]["widths"]} == {
        "attention",
        "mlp",
        "hidden",
    }
    # The divergence is summed over a sequence, and squared errors over layers.
    row = section["curves"][0]
    assert row["loss"] >= 12 * row["kl"]


def _block(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    return [shape[0] * shape[1] for name, shape in shapes.items() if name.endswith("_proj.weight")]


def test_the_report_says_how_it_was_learned_and_the_choice_is_the_best_on_held_out_text() -> None:
    found = pruned(lora_rank=0)
    section = learning(found)
    kl = section["held_out_kl"]
    assert set(kl) == {"one-shot plan", "final, decided", "final, soft gates", "final, refit dense"}
    assert kl[f"final, {section['choice']}"] == min(value for name, value in kl.items() if name != "one-shot plan")
    assert len(section["curves"]) == 5
    assert {"kl", "sparsity", "target", "teacher"} <= section["curves"][0].keys()
    assert set(section["widths"][-1]["widths"]) == {g.name for g in program().groups if g.kind in {"attention", "mlp"}}
    assert section["tokens_seen"] == 5 * 4 * 12
    assert found.results["structured"]["seconds"].keys() >= {"text", "start", "learn", "finish"}


def test_warm_starts_keep_the_order_of_the_one_shot_scores() -> None:
    """With learning rates of next to nothing the plan is the one-shot plan, and LoRA adds nothing."""
    still = {"mask_lr": 1e-9, "lora_lr": 1e-9}
    warm, cold = pruned(**still), pruned(warm_start=False, **still)
    kl = learning(warm)["held_out_kl"]
    assert kl["final, decided"] == pytest.approx(kl["one-shot plan"], rel=0.3)
    assert "one-shot plan" not in learning(cold)["held_out_kl"]
    assert warm.plan is not None
    assert cold.plan is not None
    assert warm.plan.kept != cold.plan.kept


def test_the_start_is_as_even_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*given: Any, evenness: float) -> Any:
        seen.append(evenness)
        return balanced(*given, evenness=evenness)

    monkeypatch.setattr(l0_start, "balanced", watched)
    pruned(evenness=0.25, lora_rank=0, reconstruct="none")
    assert seen == [0.25]


def test_other_targets_and_uniform_widths_are_met() -> None:
    options = {**SMALL, "distillation": "plain", "warm_start": False, "uniform": True}
    del options["ratio"]
    found = build_pass("l0", {**options, "target_params": 9_500})(program()).program
    slim = Pipeline([build_pass("insert_masks", {}), build_pass("slim", {})])(found).program
    assert sum(p.numel() for p in slim.graph_module.parameters()) <= 9_500
    assert found.plan is not None
    assert found.plan.is_uniform([g for g in program().groups if g.kind in {"attention", "mlp"}])
    with pytest.raises(UsageError, match="ask for less"):
        build_pass("l0", {**options, "target_macs": 1e9})(program())


def test_lora_goes_on_from_what_was_fitted_and_the_report_says_so() -> None:
    found = pruned(steps=8, settle=0.5)
    section = learning(found)
    kl = section["held_out_kl"]
    assert set(kl) == {"one-shot plan", "decided, with LoRA", "decided, fitted", "final, decided"}
    assert kl["final, decided"] < kl["decided, fitted"] < kl["decided, with LoRA"]
    assert found.results["structured"]["reconstruct"] == "dense"
    assert found.results["structured"]["second_order_steps"]
    consumers = {entry["name"] for entry in found.results["structured"]["consumers"]}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= consumers
    assert found.results["structured"]["seconds"]["fit"] > 0
    # Without steps behind the decision, and for kinds that cannot be fitted, LoRA alone makes up for what went.
    assert build_pass("l0", {**SMALL, "settle": 0.0}).reconstruct == "none"
    assert build_pass("l0", {"ratio": 0.4, "mode": "reference"}).reconstruct == "none"


def test_the_drift_reaches_the_fit_and_what_is_no_number_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    for drift in (0.0, 1.0):
        kl = learning(pruned(lora_rank=0, reconstruct="ridge", drift=drift))["held_out_kl"]
        fits.append(kl["final, refit ridge"])
    assert fits[0] != fits[1]
    found = {"bad": Finished(located("llama"), "bad", {}), "good": Finished(program(), "good", {})}
    values = {id(found["bad"].program): float("nan"), id(program()): 1.0}
    monkeypatch.setattr("fxprune.learned.finish.program_divergence", lambda one, *_: values[id(one)])
    assert choose(found, program(), torch.zeros(1, 2), None, 1).choice == "good"
    with pytest.raises(TrainingError, match="not finite on held-out text"):
        choose({"bad": found["bad"]}, program(), torch.zeros(1, 2), None, 1)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def test_fine_tuning_learns_with_fixed_masks_and_is_merged(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = [
        {"instruction": line, "input": "" if n % 2 else "more", "output": line} for n, line in enumerate(TINY_LINES)
    ]
    (tmp_path / "set.json").write_text(json.dumps(records))
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    one, two = (read_instructions(str(tmp_path / f"set.{end}"), tiny_tokenizer, 16, 0) for end in ("json", "jsonl"))
    assert torch.equal(one.tokens, two.tokens)
    assert one.records == 4
    share = float(one.answers.float().mean())
    assert 0.2 < share < 0.8
    said = tiny_tokenizer.decode(one.tokens[one.answers])
    assert "Instruction" not in said
    for text, match in (
        ("[1]", "record 1: no text in instruction"),
        ('[{"instruction": "a"}]', "no text in output"),
        ("{", "not JSON"),
        ("{}", "list of records"),
        ('[{"instruction": "a", "output": "b"}]', "do not fill one window"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CalibrationError, match=match):
            read_instructions(str(tmp_path / "bad.json"), tiny_tokenizer, 64, 0)
    with pytest.raises(CalibrationError, match="does not exist"):
        read_instructions("nowhere.json", tiny_tokenizer, 16, 0)
    asked = "one two three " * 30
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": asked, "output": "yes it is"}] * 3))
    three = read_instructions(str(tmp_path / "long.json"), tiny_tokenizer, 16, 0)
    assert 0 < len(three.tokens) < 20
    assert bool(three.answers[:, 1:].any(1).all())
    exact = {"lora_lr": 2e-2, "forward_dtype": "float32"}
    before = pruned(**exact)
    after = pruned(**exact, post_steps=12, post_lr=2e-2)
    assert after.plan == before.plan
    section = learning(after)
    losses = [row["loss"] for row in section["post"]["curves"]]
    assert sum(losses[-4:]) < sum(losses[:4])
    weight = before.graph_module.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(weight, after.graph_module.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert section["held_out_kl"]["before fine-tuning"] == pytest.approx(
        learning(before)["held_out_kl"]["final, decided"], rel=1e-3
    )


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prunes_keeps_its_training_and_says_what_is_wrong(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TINY_LINES * 12))
    out = tmp_path / "slim"
    fixed = ["--calibration", text, "--samples", 12, "--seq-len", 12, "--steps", 5, "--batch", 2, "--lora-rank", 2]
    more = ("held_out=2", "start_samples=4", "round_to=8", "lora_targets=q_proj,up_proj")
    fixed += [part for option in more for part in ("--option", option)]
    command = ["learn", tiny_llama_dir, "--ratio", 0.3, "--out", out, "--guard", "none", *fixed]
    status, _, said = run_command(monkeypatch, capsys, *command)
    assert status == 0, said
    state = tmp_path / "slim.training"
    assert {"state.json", "log.jsonl"} <= {file.name for file in state.iterdir()}
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "l0"
    assert report["params"]["removed_share_blocks"] >= 0.3
    assert len(report["structured"]["learning"]["curves"]) == 5
    page = (out / "report.html").read_text()
    assert "How it was learned" in page
    assert "LoRA of rank 2, 5 steps" in page
    assert load(out) is not None
    again: dict[str, Any] = {"calibration": str(text), "samples": 12, "seq_len": 12, "steps": 5, "batch": 2}
    again |= {"held_out": 2, "start_samples": 4, "guard": "none", "restart": True, "out": out}
    with pytest.raises(UsageError, match="before the 0.3"):  # what is wrong costs no training
        fxprune.learn(tiny_llama_dir, ratio=0.3, warm_up=0.9, overwrite=True, **again)
    assert list(state.glob("state*"))
    with pytest.raises(OutputError, match="overwrite"):  # nor does an output that is in the way
        fxprune.learn(tiny_llama_dir, ratio=0.3, **again)
    assert list(state.glob("state*"))
    build_pass("l0", {"ratio": 0.3, "state": str(state)}).forget()
    assert not list(state.glob("state*"))
    for other in ({"state": "none", "out": None}, {"out": None}):
        with pytest.raises(UsageError, match="l0 keeps nothing"):
            fxprune.learn(tiny_llama_dir, ratio=0.3, **{**again, **other})
    for wrong, why in (
        (["--option", "warm_up=0.9"], "before the 0.3 that is asked for"),
        (["--ratio", "0.1,0.2"], "one target at a time"),
        (["--option", "nonsense"], "give NAME=VALUE"),
        (["--option", "colour=red"], "unknown option 'colour'"),
        (["--option", "samples=9"], "write --samples 9"),
        (["--option", "distillation=none", "--post-data", "x.json"], "how many post_steps"),
    ):
        arguments = ["learn", tiny_llama_dir, "--ratio", 0.3, "--out", tmp_path / "no", *fixed]
        for flag in wrong[::2]:  # what a case says stands alone
            if flag in arguments and flag != "--option":
                place = arguments.index(flag)
                del arguments[place : place + 2]
        status, _, said = run_command(monkeypatch, capsys, *arguments, *wrong)
        assert status == 2, said
        assert why in said
    assert not (tmp_path / "no").exists()


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, match in (
        ({"ratio": [0.2, 0.3]}, "one target at a time"),
        ({"warm_up": 0.8}, r"training ends at step 3 .* before the 0\.4"),
        ({"kinds": ["mlp", "hidden"]}, "hard budget is for heads"),
        ({"kinds": ["experts"]}, "kinds are attention and mlp"),
        ({"kinds": ["mlp", "layers"], "budget": "lagrangian", "uniform": True}, "no reconstruct, uniform or keep"),
        ({"held_out": 20}, "held_out must be"),
        ({"post_data": "x.json"}, "how many post_steps"),
        ({"post_steps": 3, "lora_rank": 0}, "trains LoRA"),
        ({"steps": 5, "epochs": 2}, "not both"),
        ({"distillation": "some"}, "distillation"),
        ({"gap": 1.5}, "gap must lie"),
        ({"lora_alpha": 0.0}, "lora_alpha must be positive"),
        ({"lora_rank": 0, "lora_targets": ["q_proj"]}, "leaves out"),
        ({"batch": 0, "steps": None}, "batch must be"),
        ({"mode": "reference"}, "leave round_to"),
        ({"tolerance": 0.1}, "tolerance=0.1 has no part in a training with budget=hard"),
        ({"drop_rate": 0.1}, "a warm start and budget=hard"),
        ({"warm_start": False, "spread": 2.0}, "warm_start=false"),
        ({"warm_start": False, "evenness": 0.1}, "warm_start=false"),
        ({"evenness": -0.1}, "evenness must lie"),
        ({"distillation": "plain", "interval": 0.1}, "distillation=plain"),
        ({"distillation": "none", "layer_weight": 0.1}, "distillation=none"),
        ({"distillation": "none", "gap": 0.2}, "distillation=none"),
        ({"lora_rank": 0, "lora_lr": 0.1}, "lora_rank=0"),
        ({"post_lr": 0.1}, "post_steps=0"),
    ):
        with pytest.raises(UsageError, match=match):
            build_pass("l0", {**SMALL, **options})
    with pytest.raises(UsageError, match="matches no Linear"):
        pruned(lora_targets=["nothing"])
    monkeypatch.setattr(Learner, "run", None)  # what is wrong with the instructions is told before the training
    with pytest.raises(CalibrationError, match="need the model's tokenizer"):
        pruned(post_steps=1, post_data="nowhere.json")
    with pytest.raises(PreconditionError, match="no hidden group was located"):
        build_pass("l0", {**SMALL, "mode": "reference", "round_to": 8})(located("llama"))
    with pytest.raises(PreconditionError, match="no stack of layers"):
        build_pass("l0", {**SMALL, "layer_weight": 0.5})(located("llama"))


def test_yaml_names_the_pass_and_its_options(tmp_path: Path) -> None:
    (step,) = load_pipeline([{"l0": {**SMALL, "lora_targets": ["q_proj"], "state": str(tmp_path / "s")}}])
    assert step.options()["lora_targets"] == ("q_proj",)
    first = step(program()).program
    again = step(program()).program  # it is there already, and the report says the same
    assert learning(again)["held_out_kl"] == learning(first)["held_out_kl"]
    assert "one-shot plan" in learning(again)["held_out_kl"]
    other = build_pass("l0", {**SMALL, "lora_targets": ["v_proj"], "state": str(tmp_path / "s")})
    with pytest.raises(CheckpointError, match="lora_targets was"):
        other(program())
