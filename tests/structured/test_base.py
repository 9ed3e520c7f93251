"""What all structured methods share: options, refusals, text that is read only when needed, and the method's hooks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import CalibrationError, PostconditionError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, MlpGroup
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.flows.recipe import Destination
from fxprune.flows.steps import prune_program
from fxprune.flows.verbs import method_of
from fxprune.structured import base as structured_pass
from fxprune.structured.base import StructuredPass
from fxprune.structured.curves import score_curve
from tests.commands import done
from tests.families import located

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fxprune.structured.case import Case
    from fxprune.structured.curves import Curve

TEXT: dict[str, Any] = {"samples": 8, "seq_len": 8, "round_to": 4}


class Last(StructuredPass):
    """Removes the last units."""

    name = "last"
    needs_data: ClassVar[bool] = False

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """The scores fall."""
        case.notes["seen"] = [group.name for group in case.groups]
        return {g.name: score_curve(g, np.arange(g.units, 0.0, -1), case.limits[g.name]) for g in case.groups}


class First(Last):
    """Changes its mind: the first ones go."""

    name = "first"

    def refine(self, case: Case, plan: Plan, within: Plan | None) -> Plan:
        """Mirror every MLP."""
        units = {group.name: group.units for group in case.groups}
        assert within is None or all(set(plan.kept[name]) for name in within.kept)
        return Plan.of(
            {
                name: [units[name] - 1 - unit for unit in kept] if name.endswith("mlp") else kept
                for name, kept in plan.kept.items()
            }
        )


class Reads(Last):
    """The same, with text."""

    name = "reads"
    needs_data: ClassVar[bool] = True

    def curves(self, case: Case) -> Mapping[str, Curve]:
        """Notes what text there is."""
        case.notes["shape"] = list(case.tokens.shape)
        return super().curves(case)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "last needs one target, of ratio, target_params, target_macs, target_bytes, target_speedup; 0 were given"),
        ({"ratio": 0.1, "target_macs": 5}, "2 were given"),
        ({"ratio": []}, "ratio is an empty list"),
        ({"ratio": 0.0}, "ratio must lie between 0 and 1"),
        ({"ratio": [0.1, float("nan")]}, "ratio must lie between 0 and 1"),
        ({"target_params": -5}, "target_params must be positive"),
        ({"target_speedup": 0.9, "table": "t.json"}, "larger than 1"),
        ({"target_speedup": 1.5, "table": "t.json", "speed_rounds": -1}, "speed_rounds must be 0 or more"),
        ({"ratio": 0.1, "speed_rounds": 0}, "speed_rounds are of target_speedup"),
        ({"target_speedup": 1.5}, "a latency table goes with target_speedup"),
        ({"ratio": 0.1, "table": "t.json"}, "a latency table goes with target_speedup"),
        ({"ratio": 0.1, "round_to": 0}, "round_to must be at least 1"),
        ({"ratio": 0.1, "min_keep": 1.0}, r"min_keep must lie in \[0, 1\)"),
        ({"ratio": 0.1, "keep": {"*.mlp": 1.5}}, r"keep \*\.mlp: the share that stays must lie in \[0, 1\]"),
        ({"ratio": 0.1, "kinds": ["experts"]}, "kinds are attention and mlp, got 'experts'"),
        (
            {"ratio": 0.1, "reconstruct": "magic"},
            "reconstruct is one of none, bias, ridge, auto, scale, dense, got 'magic'",
        ),
        ({"ratio": 0.1, "drift": 0.5, "reconstruct": "dense"}, "reconstruct=dense runs nothing again"),
        ({"ratio": 0.1, "biases": True, "reconstruct": "dense"}, "reconstruct=dense gives no biases"),
        ({"ratio": 0.1, "drift": 1.5}, r"drift must lie in \[0, 1\]"),
        ({"ratio": 0.1, "samples": 0}, "samples"),
        ({"ratio": 0.1, "forward_dtype": "float3"}, "float3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Last(**options)


def test_a_method_takes_the_targets_of_a_size_or_several() -> None:
    assert [str(target) for target in Last(ratio=(0.1, 0.2)).targets] == ["ratio 0.1", "ratio 0.2"]
    assert str(Last(target_macs=5e6).targets[0]) == "5e+06 macs"


def test_only_the_kinds_that_were_asked_for_are_pruned() -> None:
    for kinds, kind in ((["mlp"], MlpGroup), (["attention"], AttentionGroup)):
        result = Last(ratio=0.15, kinds=kinds, **TEXT)(located("llama")).program
        assert result.plan is not None
        pruned = [group for group in result.groups if result.plan.removed_units(group)]
        assert pruned
        assert all(isinstance(group, kind) for group in pruned)
        assert result.results["structured"]["seen"] == [g.name for g in result.groups if isinstance(g, kind)]


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_is_read_when_the_method_or_its_reconstruction_asks_for_it() -> None:
    program = located("llama")
    without = Last(ratio=0.3, **TEXT)(program).program
    assert "calibration" not in without.results
    assert "text" not in without.results["structured"]["seconds"]
    rebuilt = Last(ratio=0.3, reconstruct="bias", **TEXT)(program).program
    assert rebuilt.results["calibration"]["tokens"] == 64
    assert {layer["choice"] for layer in rebuilt.results["structured"]["consumers"]} >= {"bias"}
    assert Reads(ratio=0.3, **TEXT)(program).program.results["structured"]["shape"] == [8, 8]


def test_the_dense_reconstruction_reads_the_text_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    original = structured_pass.input_grams
    monkeypatch.setattr(structured_pass, "input_grams", lambda *a, **k: runs.append(1) or original(*a, **k))
    monkeypatch.setattr(structured_pass, "reconstruct_consumers", lambda *_, **__: pytest.fail("nothing runs again"))
    program = located("llama")
    step = Last(ratio=[0.2, 0.4], reconstruct="dense", **TEXT)
    budgets = step.budgets(program)
    assert runs == [1]
    for index in range(2):
        result = step.apply(program, budgets, index).program
        layers = result.results["structured"]["consumers"]
        assert all(layer["choice"].startswith("ridge ") for layer in layers)
        assert all(layer["error"] < layer["plain_error"] for layer in layers)
        assert not [name for name, _ in result.graph_module.named_parameters() if name.endswith("bias")]


def test_too_little_text_for_least_squares_says_how_much_would_do() -> None:
    with pytest.raises(CalibrationError, match=r"24 calibration tokens .* 36 inputs .* at least 9 samples of 8"):
        Last(ratio=0.3, reconstruct="ridge", round_to=4, samples=3, seq_len=8)(located("llama"))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_method_may_change_units_once_it_knows_how_many_go() -> None:
    program = located("llama")
    plans = {cls: cls(ratio=[0.2, 0.4], **TEXT).budgets(program).plans for cls in (Last, First)}
    for last, first in zip(plans[Last], plans[First], strict=True):
        for group in program.groups:
            kept = last.kept_units(group)
            expected = kept
            if isinstance(group, MlpGroup):
                assert kept == tuple(range(len(kept)))
                expected = tuple(range(group.units - len(kept), group.units))
            assert first.kept_units(group) == expected


def test_what_goes_is_zero_in_the_consumers_and_nothing_else_changes() -> None:
    program = located("llama")
    result = Last(ratio=0.3, **TEXT)(program)
    assert result.program.plan is not None
    assert result.details["removed_share"] >= 0.3
    dense, new = program.graph_module.state_dict(), result.program.graph_module.state_dict()
    consumers = {piece.parameter: (piece, group) for group in program.groups for piece in group.consumers}
    for name, value in new.items():
        if name not in consumers:
            assert torch.equal(value, dense[name])
            continue
        piece, group = consumers[name]
        gone = piece.indices[result.program.plan.removed_units(group)].ravel()
        assert not value[:, gone].any()
        kept = np.setdiff1d(np.arange(value.shape[1]), gone)
        assert torch.equal(value[:, kept], dense[name][:, kept])


def test_a_wrong_order_is_told_before_any_text_is_read() -> None:
    with pytest.raises(UsageError, match="from loose to tight, got 0.3, 0.2"):
        Reads(ratio=[0.3, 0.2], calibration="/does/not/exist.txt").budgets(located("llama"))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"keep: 'layers\.9' matches no group; they are model\.layers\.0"):
        Last(ratio=0.3, keep={"layers.9": 1.0})(located("llama"))


def test_a_consumer_of_two_groups_is_refused() -> None:
    program = located("llama")
    first, second = (group for group in program.groups if isinstance(group, MlpGroup))
    twice = dataclasses.replace(second, slices=first.slices)
    with pytest.raises(PreconditionError, match="reads two groups"):
        Last(ratio=0.3)(program.replace(groups=(first, twice)))


def test_a_program_in_which_nothing_was_looked_for_is_told_what_to_run() -> None:
    with pytest.raises(PreconditionError, match="run locate_attention and locate_mlp first"):
        Last(ratio=0.3)(located("llama").replace(groups=(), channels=None))


def test_no_plan_is_a_broken_promise() -> None:
    with pytest.raises(PostconditionError, match="last left no plan"):
        Last(ratio=0.3).ensures(located("llama"), located("llama"))


# --- the command's way ----------------------------------------------------------------------------------------------


def test_magnitude_means_units_with_a_size_and_weights_without() -> None:
    assert method_of("magnitude", "prune") == "magnitude-units"
    assert method_of("magnitude-units", "prune") == "magnitude-units"
    assert method_of("magnitude", "sparsify") == "magnitude"
    assert method_of("flap", "prune") == "flap"
    with pytest.raises(UsageError, match="use fxprune sparsify --method wanda"):
        method_of("wanda", "prune")
    with pytest.raises(UsageError, match="use fxprune learn --method l0"):
        method_of("l0", "prune")


def test_magnitude_with_a_ratio_writes_a_slim_checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = {"ratio": 0.2, "round_to": 4}
    report = done(str(tiny_llama_dir), method_of("magnitude", "prune"), options, Destination(tmp_path / "slim"))
    assert report["params"]["removed_share_blocks"] > 0.2 - 1e-9  # exactly 0.2, but for rounding
    assert all(rung["passed"] for rung in report["verify"])
    assert (tmp_path / "slim" / "model.safetensors").is_file()
    assert report["seconds"]["prune"] > 0


def test_where_nothing_can_be_pruned_the_error_is_short_and_says_what_else_there_is() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 0}
    config = transformers.BitNetConfig(**sizes, num_key_value_heads=4, num_hidden_layers=6)
    program = fxprune.trace(transformers.BitNetForCausalLM(config))
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    with pytest.raises(PreconditionError, match=r"and \d+ more\..*Other groups were found .*kind layers\)") as caught:
        prune_program(program, "magnitude-units", {"ratio": 0.1})
    assert len(str(caught.value)) < 900
