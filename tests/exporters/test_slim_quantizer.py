"""Slimming as a plug-in of transformers' exporters: what comes out is the masked model, in its own format."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter
from transformers.exporters.configs import ExportFormat

import fxprune.exporters
from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import ExportError, PlanError, PreconditionError, UsageError
from fxprune.core.plan import Plan
from fxprune.exporters import SlimQuantizer
from fxprune.models.cache_names import cache_of
from fxprune.passes.magnitude_units import MagnitudeUnits
from fxprune.passes.wanda_sp import WandaSp
from fxprune.runtimes.runners import GraphRunner
from fxprune.tracing.pytree_form import program_of_exported
from fxprune.tracing.sample import sample_inputs
from tests.families import build, located, steps
from tests.proof import slimmed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fxprune.runtimes.runners import Past, Runner

ONE_LAYER = {"num_hidden_layers": 1}
PLAN = Plan.of({"model.layers.0.self_attn": (3, 4), "model.layers.0.mlp": (0, 2, 3, 5, 8, 13, 19)})
"""One of two KV heads, with two of its three query heads, and 7 of 20 channels."""


class ExportedRunner:
    """An exported program as a `fxprune.runtimes.runners.Runner`, with caches like its example's."""

    name = "exported"

    def __init__(self, exported: Any, inputs: dict[str, Any]) -> None:
        self.exported = exported
        self.cache = cache_of(inputs)
        self.argument = next(name for name, value in inputs.items() if value is self.cache)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        cache = copy.deepcopy(self.cache)
        for index, layer in enumerate(cache.layers):
            empty = layer.keys[:1, :, :0].repeat(len(input_ids), 1, 1, 1)
            layer.keys, layer.values = past[2 * index : 2 * index + 2] if past else (empty, empty.clone())
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        output = self.exported(**given, **{self.argument: cache})
        return output.logits, [tensor for layer in cache_of(output).layers for tensor in (layer.keys, layer.values)]


def assert_masked(exported: Any, inputs: dict[str, Any], program: Any) -> None:
    """The export computes what the masked graph of the same plan does: prefill, continuation, decode, left padding."""
    form = program.references["masked"]
    for batch, padding in ((1, 0), (2, 2)):
        runners: tuple[Runner, ...] = (ExportedRunner(exported, inputs), GraphRunner(form.module, form.interface))
        pasts: list[Any] = [None, None]
        for step in steps(batch, padding=padding):
            logits = []
            for index, runner in enumerate(runners):
                out, pasts[index] = runner.step(step.tokens, step.mask, step.positions, pasts[index])
                pasts[index] = [tensor.clone() for tensor in pasts[index]]
                logits.append(out[step.mask[:, -out.shape[1] :].bool()].clone())
            torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def dynamic(inputs: dict[str, Any]) -> dict[str, Any]:
    """Batch and lengths may change; left to itself the exporter tries every axis, which takes longer."""
    both = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    cache = [dict.fromkeys((0, 2), torch.export.Dim.AUTO)] * (2 * len(cache_of(inputs).layers))
    shapes = {name: cache if value is cache_of(inputs) else both for name, value in inputs.items()}
    return {"dynamic": True, "dynamic_shapes": shapes}


class Keeping(SlimQuantizer):
    """The plug-in, which keeps a copy of the dense graph it was handed."""

    dense: Any = None

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat) -> Any:
        self.dense = copy.deepcopy(model)
        return super().quantize(model, sample_inputs, export_format)


@dataclass
class Exported:
    """A slim `torch.export` program of a tiny Llama, made with the plug-in."""

    model: Any
    weights: dict[str, Tensor]
    inputs: dict[str, Any]
    quantizer: Keeping
    exported: Any

    def dense(self) -> Any:
        """The dense graph, as the exporter hands it to a quantizer."""
        return copy.deepcopy(self.quantizer.dense)


@pytest.fixture(name="pt2", scope="module")
def _pt2() -> Exported:
    model, quantizer = build("llama"), Keeping(PLAN)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = sample_inputs(model)
    config = DynamoConfig(**dynamic(inputs), quantizer=quantizer)
    return Exported(model, weights, inputs, quantizer, DynamoExporter().export(model, inputs, config))


def test_the_name_is_found_where_users_look() -> None:
    assert fxprune.exporters.SlimQuantizer is SlimQuantizer
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = fxprune.exporters.Nothing


def test_a_pt2_export_is_the_masked_model(pt2: Exported, tmp_path: Path) -> None:
    from transformers.exporters import ExportedModel

    pt2.exported.save_pretrained(tmp_path)
    # torch keeps the sample inputs in a pickle, which runs code when it is loaded
    with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
        reloaded = ExportedModel.from_pretrained(tmp_path, trust_remote_code=True)
    # The reference comes from fxprune's own tracer, not from the plug-in.
    assert_masked(reloaded, pt2.inputs, slimmed(located("llama"), PLAN))
    assert [layer.keys.shape[1] for layer in cache_of(pt2.inputs).layers] == [1, 2]  # KV heads
    shapes = {name: tuple(tensor.shape) for name, tensor in reloaded.program.state_dict.items()}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (30, 7)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (12, 30)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (36, 30)
    assert all(torch.equal(tensor, pt2.weights[name]) for name, tensor in pt2.model.state_dict().items())
    assert pt2.quantizer.program is not None
    assert pt2.quantizer.program.plan == PLAN


def test_a_mixed_model_that_was_saved_and_loaded_is_slimmed_further(mixed_dir: Path) -> None:
    model = load(mixed_dir)
    inputs, quantizer = sample_inputs(model), SlimQuantizer(MagnitudeUnits(ratio=0.3), model=model)
    exported = DynamoExporter().export(model, inputs, DynamoConfig(**dynamic(inputs), quantizer=quantizer))
    assert quantizer.program is not None
    assert quantizer.program.plan is not None
    assert_masked(exported.program.module(), inputs, quantizer.program)
    shapes = {name: tuple(tensor.shape) for name, tensor in exported.program.state_dict.items()}
    widths = [shapes[f"model.layers.{layer}.mlp.down_proj.weight"][1] for layer in range(2)]
    assert widths == [len(quantizer.program.plan.kept[f"model.layers.{layer}.mlp"]) for layer in range(2)]
    assert sum(widths) < 64 + 48


def test_an_onnx_export_is_the_masked_model_and_smaller(tmp_path: Path) -> None:
    from transformers.exporters import ExportedModel

    model = build("qwen2", **ONE_LAYER)
    inputs, quantizer = sample_inputs(model), SlimQuantizer(MagnitudeUnits(ratio=0.4, round_to=4))
    config = OnnxConfig(**dynamic(inputs), quantizer=quantizer, optimize=False)
    exported = OnnxExporter().export(model, inputs, config)
    exported.save_pretrained(tmp_path)
    assert quantizer.program is not None
    assert quantizer.program.plan is not None
    plan = quantizer.program.plan
    assert_masked(ExportedModel.from_pretrained(tmp_path), inputs, quantizer.program)
    sizes = {name: value.shape.numpy() for name, value in exported.program.graph.initializers.items()}
    width = len(plan.kept["model.layers.0.mlp"])
    assert width < 20
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (30, width)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_an_openvino_export_is_the_masked_model(tmp_path: Path) -> None:
    from transformers.exporters import ExportedModel, OpenVINOConfig, OpenVINOExporter

    model = build("llama", **ONE_LAYER)
    inputs = sample_inputs(model)
    config = OpenVINOConfig(**dynamic(inputs), quantizer=SlimQuantizer(PLAN), stateful=False)
    OpenVINOExporter().export(model, inputs, config).save_pretrained(tmp_path)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # where the machine has bfloat16, OpenVINO uses it unasked
    reloaded = ExportedModel.from_pretrained(tmp_path, config=exact)
    assert_masked(reloaded, inputs, slimmed(located("llama", **ONE_LAYER), PLAN))


@pytest.mark.smoke
def test_a_pass_that_reads_text_gets_it_from_the_exported_graph(pt2: Exported) -> None:
    slim = SlimQuantizer(WandaSp(ratio=0.3, round_to=4, samples=4, seq_len=16), model=pt2.model)
    slim.quantize(pt2.dense(), sample_inputs(pt2.model), ExportFormat.DYNAMO)
    assert slim.program is not None
    assert slim.program.plan is not None
    assert [event.name for event in slim.program.history][-3:] == ["wanda-sp", "insert_masks", "slim"]
    assert any(slim.program.plan.removed_units(group) for group in slim.program.groups)
    with pytest.raises(PreconditionError, match="wanda-sp runs calibration text: it needs a Hugging Face"):
        SlimQuantizer(slim.pruning).quantize(pt2.dense(), sample_inputs(pt2.model), ExportFormat.DYNAMO)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (Plan.of({"model.layers.0.mlp": range(20)}), ExportError, "the plan removes none of the"),
        (Plan.of({"model.layers": (0,)}), ExportError, "whole layers cannot be left out"),
        (Plan.of({"nothing": (0,)}), PlanError, "names group 'nothing'"),
    ],
    ids=["nothing", "whole layer", "unknown group"],
)
def test_what_cannot_be_slimmed_is_refused(plan: Plan, error: type[Exception], message: str, pt2: Exported) -> None:
    with pytest.raises(error, match=message):
        SlimQuantizer(plan).quantize(pt2.dense(), sample_inputs(pt2.model), ExportFormat.ONNX)


def test_only_passes_and_plans_are_taken() -> None:
    with pytest.raises(UsageError, match="takes a pruning pass or a Plan, not a dict"):
        SlimQuantizer({"model.layers.0.mlp": [0]})  # type: ignore[arg-type]


def test_constants_and_inputs_that_are_handed_back_keep_their_places() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, counter: Tensor, scale: float | None = None) -> dict[str, Any]:
            del scale
            return {"logits": self.linear(x), "counter": counter, "three": 3, "pair": (x + 1, x * 2)}

    x, counter = torch.randn(2, 4), torch.ones(1)
    inputs = {"x": x, "counter": counter, "scale": None}
    module = torch.export.export(Odd(), (), inputs, strict=False).module()
    expected = module(**inputs)
    program, convention = program_of_exported(module, inputs)
    assert program.interface.outputs == ("logits", "output_3", "output_4")
    assert program.interface.inputs == ("x",)
    given = convention.restore(program)(**inputs)
    assert given.keys() == expected.keys()
    assert given["three"] == 3
    torch.testing.assert_close(given, expected)
