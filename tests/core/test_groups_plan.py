"""Groups print themselves and count what they cost; plans say what stays, and illegal ones are refused by name."""

from __future__ import annotations

import json
import re

import pytest

from fxprune.core.errors import PlanError
from fxprune.core.groups import common_owner
from fxprune.core.plan import Plan
from fxprune.passes.slim import Slim
from tests.families import located

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def test_groups_print_themselves() -> None:
    program = located("llama")
    assert str(program.group(ATTENTION)) == (
        "model.layers.0.self_attn [attention]: 6 query heads on 2 KV heads of 6, read by o_proj"
    )
    assert str(program.group(MLP)) == (
        "model.layers.0.mlp [mlp]: 20 channels, gated silu, gate_proj, up_proj -> down_proj"
    )


def test_an_unknown_group_is_answered_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=re.escape(MLP)):
        located("llama").group("model.layers.9.mlp")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("group", "kept"),
    [(MLP, [0, 3, 19]), (ATTENTION, [1, 4]), (ATTENTION, [3, 4, 5]), (ATTENTION, [0]), (ATTENTION, range(6))],
)
def test_parameters_removed_is_what_slimming_removes(family: str, group: str, kept: list[int]) -> None:
    program = located(family)
    slim = Slim()(program.replace(plan=Plan.of({group: kept}))).program
    dense, left = (sum(p.numel() for p in form.graph_module.parameters()) for form in (program, slim))
    assert program.group(group).parameters_removed(kept) == dense - left
    assert (dense == left) == (len(kept) == 6)


def test_what_stays_is_counted_in_kv_heads_too() -> None:
    group = located("llama").group(ATTENTION)
    assert group.kv_kept([1, 4]) == [0, 1]  # type: ignore[attr-defined]
    assert group.kv_kept([3, 5]) == [1]  # type: ignore[attr-defined]
    whole = located("llama", num_key_value_heads=6, num_hidden_layers=1).group(ATTENTION)
    assert whole.kv_kept([3, 5]) == [3, 5]  # type: ignore[attr-defined]
    assert whole.heads_of(3) == [3]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"model.layers.7.mlp": [0]}, "the plan names group 'model.layers.7.mlp', which does not exist"),
        ({MLP: [0, 20]}, f"{MLP}: channel 20 does not exist; it has 20"),
        ({MLP: [-1]}, f"{MLP}: channel -1 does not exist"),
        ({MLP: [1, 1]}, f"{MLP}: the plan names a channel twice"),
        ({MLP: []}, f"{MLP}: no channel would be left"),
        ({ATTENTION: []}, f"{ATTENTION}: no query head would be left"),
        (
            {ATTENTION: [0, 1, 3]},
            f"{ATTENTION}: kept KV heads would have different numbers of query heads ({{0: 2, 1: 1}})",
        ),
    ],
)
def test_illegal_plans_are_refused_by_the_name_of_the_group(kept: dict[str, list[int]], message: str) -> None:
    program = located("llama")
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.of(kept).validate(program.groups)
    with pytest.raises(PlanError, match=re.escape(message)):
        Slim()(program.replace(plan=Plan.of(kept)))


@pytest.mark.parametrize("kept", [[0], [5], [0, 1, 2], [0, 2, 4, 5], [1, 3], list(range(6))])
def test_legal_head_counts_pass(kept: list[int]) -> None:
    Plan.of({ATTENTION: kept}).validate(located("llama").groups)


def test_a_plan_is_uniform_when_all_groups_of_a_kind_keep_the_same_width() -> None:
    groups = located("llama").groups
    assert Plan({}).is_uniform(groups)
    assert not Plan.of({MLP: range(8)}).is_uniform(groups)
    assert Plan.of({MLP: range(8), "model.layers.1.mlp": range(12, 20)}).is_uniform(groups)


def test_a_plan_is_json_and_sorted() -> None:
    plan = Plan.of({MLP: [7, 2, 5]})
    assert json.loads(json.dumps(plan.to_json())) == {"kept": {MLP: [2, 5, 7]}}
    group = located("llama").group(MLP)
    assert plan.removed_units(group) == [unit for unit in range(20) if unit not in {2, 5, 7}]


def test_the_common_owner_is_the_module_that_holds_all_parameters() -> None:
    assert common_owner(["a.b.c.weight", "a.b.d.weight"]) == "a.b"
    assert common_owner(["a.b.c.weight", "x.y.weight"]) == ""
    assert common_owner(["fc1.weight", "fc2.weight"]) == ""
