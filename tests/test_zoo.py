"""Every family, every kind of unit: random legal plans, slim against masked, forward and backward; illegal ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fxprune.core.errors import PlanError
from fxprune.core.groups import ExpertMlpGroup
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from tests.proof import assert_slim_is_masked, outputs_of
from tests.zoo import KINDS, ZOO, kinds_of, legal_plans, located

if TYPE_CHECKING:
    from fxprune.core.program import Program

EXPECTED = {  # kinds that a family has; who is not listed has heads, MLP channels and layers
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "glm", "phi3", "gemma2", "gemma3", "granite", "t5"),
        ("attention", "mlp", "hidden", "layers"),
    ),
    **dict.fromkeys(
        ("baichuan (W_pack, ALiBi)", "qwen-7b (c_attn, w1/w2)", "chatglm3 (packed MQA, SwiGLU)"),
        ("attention", "mlp", "hidden", "layers"),
    ),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), ("attention", "hidden", "experts", "expert_mlp", "layers")),
    "olmo2": ("mlp", "hidden", "layers"),  # its q_norm spans all heads
}
PAIRS = [(name, kind) for name in ZOO for kind in (*EXPECTED.get(name, ("attention", "mlp", "layers")), "all")]


def _families(parameter: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.xdist_group(name), id=name) for name in ZOO if parameter]


@pytest.mark.parametrize("name", _families("name"))
def test_every_family_has_its_kinds_of_units(name: str) -> None:
    assert kinds_of(located(name)) == EXPECTED.get(name, ("attention", "mlp", "layers"))


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0]), id="-".join(pair)) for pair in PAIRS]
)
def test_slim_equals_masked_for_random_legal_plans(name: str, kind: str, plans_a_cell: int) -> None:
    program = located(name)
    changed: list[float] = []

    @settings(
        max_examples=plans_a_cell,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        slim = assert_slim_is_masked(program, data.draw(legal_plans(program.groups, kind)))
        changed.append(_change(program, slim))

    check()
    assert max(changed) > 1e-3  # or the comparison would see nothing


def _change(dense: Program, slim: Program) -> float:
    """How far pruning moved the output, relative to its size."""
    lifted = dense.references["lifted"]
    before = outputs_of(lifted.module, lifted.interface)
    after = outputs_of(slim.graph_module, slim.interface)
    return float((before - after).abs().max() / before.abs().max())


def _illegal(program: Program) -> dict[str, Plan]:
    """One plan of every illegal sort that a program's groups allow, by what the error must say."""
    plans = {"does not exist; groups": Plan.of({"nowhere": [0]})}
    for group in program.groups:
        if group.least:
            plans[f"{group.name}: no {group.unit} would be left"] = Plan.of({group.name: []})
        plans[f"{group.name}: {group.unit} {group.units} does not exist"] = Plan.of({group.name: [0, group.units]})
        plans[f"{group.name}: {group.unit} -1 does not exist"] = Plan.of({group.name: [-1, 0]})
        plans[f"{group.name}: the plan names a {group.unit} twice"] = Plan({group.name: (0, 0)})
        if group.sharing is not None and len(set(group.sharing.tolist())) > 1:
            uneven = [unit for unit in range(group.units) if unit != 0]
            plans[f"{group.name}: kept KV heads would have different numbers"] = Plan.of({group.name: uneven})
        if group.kind == "expert_mlp":
            plans[f"{group.name}: the experts would have different"] = Plan.of({group.name: range(group.units - 4)})
        if group.kind == "experts":
            plans[f"{group.name}: 1 experts would be left"] = Plan.of({group.name: [0]})
        if group.multiple > 1:
            few: list[int] = list(range(group.multiple + 1))
            if isinstance(group, ExpertMlpGroup):
                few = [expert * group.width + channel for expert in range(group.experts) for channel in few]
            plans[f"{group.name}: keeping {group.multiple + 1}"] = Plan.of({group.name: few})
    return plans


@pytest.mark.parametrize("name", _families("name"))
def test_illegal_plans_are_refused_by_the_name_of_the_group(name: str) -> None:
    program = located(name)
    for message, plan in _illegal(program).items():
        for step in (InsertMasks(), Slim()):
            with pytest.raises(PlanError) as caught:
                step(program.replace(plan=plan))
            assert message in str(caught.value)


def test_a_hidden_dimension_under_layer_norm_is_refused_by_name() -> None:
    for name in ZOO:
        if "hidden" in EXPECTED.get(name, ()):
            continue
        events = {event.name: event.details for event in located(name).history}
        (reason,) = [why for where, why in events["locate_hidden"]["refused"].items() if where.startswith("model")]
        assert "is not an RMS norm with a weight of its own: it cannot be narrowed exactly" in reason


def test_kinds_are_those_of_the_table() -> None:
    assert {kind for _, kind in PAIRS} == {*KINDS, "all"}
    assert torch.get_num_threads() >= 1
