"""The verification ladder: every rung holds for what is right, and a corrupted weight is found and named."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fxprune.channels.front_end import LOCATE
from fxprune.core.errors import PreconditionError, VerificationError
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.save import Save
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.structured.reconstruct_consumers import add_biases
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.nodes import get_attribute
from fxprune.tracing.trace import trace
from fxprune.verification.compare import compare_modules, compare_runners
from fxprune.verification.differences import first_difference
from fxprune.verification.ladder import Rung, reexported, tolerance_for
from fxprune.verification.reference import without_units
from fxprune.verification.text import compare_greedy
from tests.families import FAMILIES, located, located_plain, random_plan

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.program import Program

LADDER = [
    "traced = eager",
    "lifted = traced",
    "masked = eager without the units",
    "slim = masked",
    "re-exported = slim",
]


def slimmed(family: str = "llama") -> Program:
    program = located(family)
    masked = InsertMasks()(program.replace(plan=random_plan(program.groups))).program
    return Slim()(masked).program


def corrupted(program: Program, linear: str, value: float) -> Program:
    """The program with one element of one weight changed; everything else stays shared."""
    graph_module = copy_graph_module(program.graph_module)
    wrong = copy.deepcopy(get_attribute(graph_module, linear))
    with torch.no_grad():
        wrong.weight[0, 0] += value
    graph_module.set_submodule(linear, wrong)
    return program.replace(graph_module=graph_module)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_holds(family: str) -> None:
    result = Verify()(slimmed(family))
    certificate = result.program.results["verify"]
    assert [rung["rung"] for rung in certificate] == LADDER
    for rung in certificate:
        assert rung["passed"]
        assert rung["max_abs_error"] <= rung["tolerance"] == 1e-4
        assert rung["cases"] == 12
        assert rung["first_difference"] == ""


def test_biases_that_a_pass_added_are_part_of_the_reference() -> None:
    program = located("llama")
    generator = torch.Generator().manual_seed(0)
    names = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    biased = add_biases(program, {name: torch.randn(30, generator=generator) for name in names})
    slim = Slim()(InsertMasks()(biased.replace(plan=random_plan(program.groups))).program).program
    assert [rung["rung"] for rung in Verify(reexport=False)(slim).program.results["verify"]] == LADDER[:-1]


@pytest.mark.parametrize(
    "linear",
    ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"],
)
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_corrupt_weight_fails_and_its_module_is_named(linear: str, value: float) -> None:
    program = corrupted(slimmed(), linear, value)
    with pytest.raises(
        VerificationError, match=rf"slim = masked does not hold: .* first module that differs is {linear}\."
    ):
        Verify()(program)


def test_a_corrupt_lifted_weight_is_found_on_the_rung_where_it_happened() -> None:
    program = located("llama")
    wrong = corrupted(program, "model.layers.1.self_attn.k_proj", 1.0)
    wrong = wrong.with_reference("lifted", wrong.graph_module)
    with pytest.raises(VerificationError, match=r"lifted = traced .* differs is model\.layers\.1\.self_attn\.k_proj\."):
        Verify()(wrong)


def test_a_reloaded_checkpoint_is_a_rung(tmp_path: Path) -> None:
    program = Save(out=tmp_path / "slim")(slimmed()).program
    certificate = Verify(checkpoint=tmp_path / "slim", graph=False)(program).program.results["verify"]
    assert [rung["rung"] for rung in certificate] == [
        "reloaded checkpoint = slim",
        "greedy text of reloaded checkpoint = slim",
    ]
    other = corrupted(program, "model.layers.1.mlp.down_proj", 1.0)
    with pytest.raises(VerificationError, match="reloaded checkpoint = slim does not hold"):
        Verify(checkpoint=tmp_path / "slim", graph=False)(other)
    assert (tmp_path / "slim" / "config.json").is_file()  # nothing was deleted


def test_the_zeroed_original_is_a_reference_of_its_own_and_is_put_back() -> None:
    program = located("llama")
    masked = InsertMasks()(program.replace(plan=random_plan(program.groups))).program
    eager = program.references["eager"].module
    before = {name: p.clone() for name, p in eager.state_dict().items()}
    tokens = torch.tensor([[4, 5, 6]])
    with without_units(masked) as zeroed:
        assert zeroed is not None
        ones = torch.ones_like(tokens)
        mine = EagerRunner(zeroed).step(tokens, ones, torch.arange(3)[None], None)[0]
    dense = EagerRunner(eager).step(tokens, ones, torch.arange(3)[None], None)[0]
    assert float((mine - dense).abs().max()) > 1e-2
    assert all(torch.equal(p, before[name]) for name, p in eager.state_dict().items())


def test_the_original_model_is_needed() -> None:
    with pytest.raises(PreconditionError, match="start from fxprune.trace"):
        Verify()(located("llama").replace(references={}))


def test_text_that_differs_fails() -> None:
    program = slimmed()
    slim = GraphRunner(program.graph_module, program.interface)
    other = corrupted(program, "model.layers.1.mlp.down_proj", 100.0)
    wrong = GraphRunner(other.graph_module, other.interface)
    prompt = torch.tensor([[5, 6, 7, 8]])
    assert compare_greedy("same", slim, slim, prompt).passed
    rung = compare_greedy("other", slim, wrong, prompt)
    assert 0 < rung.max_abs_error <= 1
    with pytest.raises(VerificationError, match="other does not hold"):
        rung.require()


def test_nan_fails_whatever_the_tolerance() -> None:
    good = GraphRunner(slimmed().graph_module, slimmed().interface)
    bad_program = corrupted(slimmed(), "lm_head", math.nan)
    bad = GraphRunner(bad_program.graph_module, bad_program.interface)
    rung = compare_runners("nan", good, bad, vocabulary=61, tolerance=1e9, device=torch.device("cpu"))
    assert (rung.passed, rung.max_abs_error) == (False, math.inf)
    modules = compare_modules("nan", torch.zeros_like, lambda x: x * math.nan, (torch.ones(2),), 1e9)
    assert (modules.passed, modules.max_abs_error) == (False, math.inf)


def test_padding_is_left_out() -> None:
    program = slimmed()
    runner = GraphRunner(program.graph_module, program.interface)

    class NoisyPadding(GraphRunner):
        def step(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor] | None
        ) -> tuple[Tensor, list[Tensor]]:
            logits, cache = super().step(input_ids, attention_mask, position_ids, past)
            return logits + 9.0 * (attention_mask[:, -input_ids.shape[1] :, None] == 0), cache

    noisy = NoisyPadding(program.graph_module, program.interface)
    assert compare_runners("padding", runner, noisy, vocabulary=61, tolerance=1e-6, device=torch.device("cpu")).passed


def test_a_reexported_graph_computes_the_same() -> None:
    program = slimmed()
    again = reexported(program.graph_module, program.interface)
    for mine, theirs in zip(
        again(*program.interface.example_inputs.values()),
        program.graph_module(*program.interface.example_inputs.values()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert not [node for node in again.graph.nodes if node.op == "call_module"]


def test_the_first_difference_is_empty_where_there_is_none() -> None:
    program = slimmed()
    references = program.references
    assert first_difference(references["traced"], references["lifted"], 1e-4) == ""
    assert first_difference(references["eager"], references["traced"], 1e-4) == ""


@pytest.mark.parametrize(
    ("dtype", "runtime", "tolerance"),
    [(torch.float32, False, 1e-4), (torch.float32, True, 1e-3), (torch.bfloat16, False, 200 * 2**-7)],
)
def test_tolerances(dtype: torch.dtype, runtime: bool, tolerance: float) -> None:
    assert tolerance_for(dtype, runtime=runtime) == tolerance


def test_a_plain_module_has_a_ladder_too() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc2(self.fc1(x).relu())

    torch.manual_seed(0)
    program = located_plain(Mlp(), torch.randn(40, 6))  # so many rows that no channel is dead on all of them
    plan = Plan.of({program.groups[0].name: [0, 3, 5]})
    slim = Slim()(InsertMasks()(program.replace(plan=plan)).program).program
    certificate = Verify()(slim).program.results["verify"]
    assert [rung["rung"] for rung in certificate] == [
        "traced = eager",
        "lifted = traced",
        "masked = eager without the units",
        "slim = masked",
        "re-exported = slim",
    ]
    with pytest.raises(VerificationError, match="slim = masked does not hold"):
        Verify()(corrupted(slim, "fc2", 1.0))


def test_a_rung_is_json() -> None:
    rung = Rung("a = b", 1e-7, 1e-4, passed=True, cases=3)
    assert rung.require() is rung
    keys = {"rung", "max_abs_error", "tolerance", "passed", "cases", "first_difference", "detail"}
    assert set(rung.to_json()) == keys


def test_a_class_whose_own_cache_forgets_is_held_to_whole_sequences(tmp_path: Path) -> None:
    """Its cache drops what lies before a window, its mask does not: text after a cache is not what a prefill gives."""
    torch.manual_seed(0)
    config = transformers.MoshiConfig(
        vocab_size=61,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    program = trace(transformers.MoshiForCausalLM(config).eval())
    dense = Pipeline([build_pass(name, {}) for name in LOCATE])(program).program
    masked = InsertMasks()(dense.replace(plan=random_plan(dense.groups))).program
    checked = Verify()(Slim()(masked).program).program
    saved = Save(out=tmp_path / "slim")(checked).program
    done = Verify(checkpoint=tmp_path / "slim", graph=False)(saved).program
    rungs = {rung["rung"]: rung for rung in done.results["verify"]}
    for name in ("traced = eager", "masked = eager without the units", "reloaded checkpoint = slim"):
        assert rungs[name]["passed"]
        assert "own cache" in rungs[name]["detail"]
    assert any("own cache" in warning for warning in done.results["warnings"])
    linear = next(name for name, _ in checked.graph_module.named_modules() if name.endswith("fc2"))
    wrong = corrupted(checked, linear, 3.0)
    with pytest.raises(VerificationError, match="slim = masked"):
        Verify()(wrong)
