"""The embedded real model: what slimming removes never changes what the model computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fxprune.accounting import block_linear_parameters
from fxprune.loading import load_model
from fxprune.passes.channel import ChannelPrune
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.pipeline import Pipeline
from fxprune.program import Program
from fxprune.runners import GraphRunner
from fxprune.tracing import trace
from fxprune.verify import compare_runners
from tests.families import LOCATE

pytestmark = pytest.mark.real_model
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"  # English that is always there


@pytest.fixture(scope="module")
def program(real_model_dir: Path) -> Program:
    """The real model, traced and located once."""
    loaded = load_model(real_model_dir, dtype=torch.float32)
    return Pipeline(LOCATE)(trace(loaded.model, tokenizer=loaded.tokenizer)).program


def runner(program: Program, dtype: torch.dtype = torch.float32) -> GraphRunner:
    """A form of the model in some precision."""
    if dtype == torch.float32:
        return GraphRunner(program.graph_module, program.interface)
    examples = {n: t.to(dtype) if t.is_floating_point() else t for n, t in program.interface.example_inputs.items()}
    converted = program.replace(
        interface=type(program.interface)(
            examples, program.interface.dynamic_axes, program.interface.outputs, program.interface.cache
        )
    )
    return GraphRunner(copy.deepcopy(program.graph_module).to(dtype), converted.interface)


def worst(reference: GraphRunner, candidate: GraphRunner) -> float:
    """Largest absolute difference of a logit."""
    return compare_runners(
        "", reference, candidate, vocabulary=49152, tolerance=0, device=torch.device("cpu")
    ).max_abs_error


def test_every_head_and_channel_of_the_real_model_is_found(program: Program) -> None:
    assert program.source is not None
    config = program.source.config
    described = [group.describe() for group in program.groups]
    heads = f"{config.num_attention_heads} query heads on {config.num_key_value_heads} KV heads of 64, read by o_proj"
    channels = f"{config.intermediate_size} channels, gated silu, gate_proj, up_proj -> down_proj"
    assert described == [heads] * config.num_hidden_layers + [channels] * config.num_hidden_layers


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_masked_equals_slim_on_the_real_model(program: Program, ratio: float) -> None:
    prune = ChannelPrune(ratio=ratio, calibration=str(TEXT), samples=4, seq_len=64)
    masked = Pipeline([prune, InsertMasks()])(program).program
    slim = Slim()(masked).program
    exact = runner(masked, torch.float64)
    assert worst(exact, runner(slim, torch.float64)) <= 1e-5
    # In float32 some positions of a strongly pruned model amplify rounding: the masked graph differs from its own
    # float64 form just as much as the slim one differs from it.
    error = worst(runner(masked), runner(slim))
    assert error <= 1e-4 or error <= 4 * worst(exact, runner(masked))
    dense = block_linear_parameters(program.graph_module, outputs=program.interface.outputs)
    share = next(event.details["removed_share"] for event in slim.history if event.name == "channel")
    step = 8 * program.groups[-1].unit_parameters
    assert abs(share - ratio) <= step / 2 / dense
