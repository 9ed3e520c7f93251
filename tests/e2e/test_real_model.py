"""The embedded real model: what slimming removes never changes what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fxprune.channels.accounting import count_parameters
from fxprune.channels.block_linears import block_linear_parameters
from fxprune.checkpoints.load_model import load_model
from fxprune.core.groups import AttentionGroup, HiddenGroup, LayerGroup
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.core.program import Form, Program
from fxprune.passes.flap import Flap
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_layers import LocateLayers
from fxprune.passes.save import Save
from fxprune.passes.slim import Slim
from fxprune.passes.verify import Verify
from fxprune.runtimes.runners import GraphRunner
from fxprune.tracing.trace import trace
from fxprune.verification.compare import compare_runners
from fxprune.verification.rounding import DOUBLE_TOLERANCE, in_double
from tests.families import LOCATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.structured.base import Budgets

pytestmark = pytest.mark.real_model
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"  # English that is always there
RATIOS = (0.1, 0.3, 0.5)
# The quickest method that reads text and adds biases: what is slimmed matters here, not who chose it.
PRUNE = Flap(ratio=RATIOS, calibration=str(TEXT), samples=4, seq_len=64)


@pytest.fixture(scope="module")
def program(real_model_dir: Path) -> Program:
    """The real model, traced and located once."""
    loaded = load_model(real_model_dir, dtype=torch.float32)
    return Pipeline(LOCATE)(trace(loaded.model, tokenizer=loaded.tokenizer)).program


@pytest.fixture(scope="module")
def budgets(program: Program) -> Budgets:
    """Plans for all ratios, from one calibration."""
    return PRUNE.budgets(program)


def worst(reference: Form, candidate: Form) -> float:
    """Largest absolute difference of a logit over all cases of the ladder."""
    runners = [GraphRunner(form.module, form.interface) for form in (reference, candidate)]  # type: ignore[arg-type]
    return compare_runners("", *runners, vocabulary=49152, tolerance=0, device=torch.device("cpu")).max_abs_error


def test_every_head_and_channel_of_the_real_model_is_found(program: Program) -> None:
    assert program.source is not None
    config = program.source.config
    described = [group.describe() for group in program.groups]
    heads = f"{config.num_attention_heads} query heads on {config.num_key_value_heads} KV heads of 64, read by o_proj"
    channels = f"{config.intermediate_size} channels, gated silu, gate_proj, up_proj -> down_proj"
    assert described == [heads] * config.num_hidden_layers + [channels] * config.num_hidden_layers


@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_equals_slim_on_the_real_model(program: Program, budgets: Budgets, ratio: float) -> None:
    result = PRUNE.apply(program, budgets, RATIOS.index(ratio))
    assert result.details["biases"]
    masked = InsertMasks()(result.program).program
    slim = Slim()(masked).program
    forms = [Form(form.graph_module, form.interface) for form in (masked, slim)]
    exact = in_double(forms[0])
    assert worst(exact, in_double(forms[1])) <= DOUBLE_TOLERANCE
    # In float32 some positions of a strongly pruned model amplify rounding: there the masked graph is as far from its
    # own float64 form as the slim one is from the masked.
    error = worst(*forms)
    assert error <= 1e-4 or error <= 4 * worst(exact, forms[0])
    dense = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
    share = result.details["removed_share"]
    step = 8 * program.groups[-1].unit_parameters
    assert ratio <= share < ratio + step / dense


def test_hidden_channels_layers_and_heads_of_the_real_model_go_together_and_it_reloads(
    real_model_dir: Path, tmp_path: Path
) -> None:
    loaded = load_model(real_model_dir, dtype=torch.float32)
    program = trace(loaded.model, tokenizer=loaded.tokenizer)
    program = Pipeline([*LOCATE, LocateHidden(), LocateLayers()])(program).program
    (hidden,) = (group for group in program.groups if isinstance(group, HiddenGroup))
    (layers,) = (group for group in program.groups if isinstance(group, LayerGroup))
    assert (hidden.units, len(hidden.norms), layers.units) == (576, 61, 30)
    kept: dict[str, Sequence[int]] = {
        hidden.name: [channel for channel in range(576) if channel % 12],
        layers.name: [layer for layer in range(30) if layer not in {14, 15, 22}],
    }
    for group in program.groups:
        if isinstance(group, AttentionGroup) and group.layer % 3 == 0:
            kept[group.name] = [*group.heads_of(0)[:2], *group.heads_of(2)[1:]]
    slim = Pipeline([InsertMasks(), Slim(), Verify()])(program.replace(plan=Plan.of(kept))).program
    assert len(slim.interface.cache) == 2 * 27
    removed = 1 - count_parameters(slim.graph_module) / count_parameters(program.graph_module)
    assert 0.15 < removed < 0.2
    Save(out=tmp_path / "slim")(slim)
    rungs = Verify(checkpoint=tmp_path / "slim", graph=False)(slim).program.results["verify"]
    assert {rung["rung"] for rung in rungs} >= {"masked = eager without the units", "reloaded checkpoint = slim"}
