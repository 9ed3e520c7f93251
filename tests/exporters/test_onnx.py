"""ONNX export: the graph computes what the FX graph computes, in every way it is called, and is named as expected."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor, nn

from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import ExportError
from fxprune.core.groups import AttentionGroup
from fxprune.core.plan import Plan
from fxprune.exporters.onnx import OnnxExport, export_onnx
from fxprune.exporters.ort import OrtRunner, run_onnx
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy, position_ids_from_mask
from fxprune.tracing.trace import trace
from tests.families import located
from tests.onnx_models import (
    MODELS,
    VOCABULARY,
    bert,
    exported,
    lifted,
    llama,
    randomize,
    run_in_steps,
    tokens,
)

if TYPE_CHECKING:
    from pathlib import Path

CONTRIB = "com.microsoft"


def nodes(export: OnnxExport) -> list[onnx.NodeProto]:
    return list(onnx.load(str(export.path)).graph.node)


# ── What the graph computes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(("name", "fusions"), [(name, "auto") for name in MODELS] + [("llama", "none")])
def test_onnx_runtime_equals_the_graph(name: str, fusions: str, batch: int, padding: int) -> None:
    program, export = exported(name, fusions)
    ids, mask = tokens(batch, 12, padding)
    steps = [8, 11, 12]  # prefill on an empty past, three tokens on a past, one token
    expected, expected_past = run_in_steps(GraphRunner(program.graph_module, program.interface), ids, mask, steps)
    logits, past = run_in_steps(OrtRunner(export.path, threads=1), ids, mask, steps)
    assert not logits.isnan().any()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    for ours, theirs in zip(past, expected_past, strict=True):
        visible = mask[:, None, :, None].bool().expand_as(ours)
        torch.testing.assert_close(ours[visible], theirs[visible], atol=1e-4, rtol=0)


@pytest.mark.smoke
def test_a_mixed_model_that_was_saved_and_loaded(mixed_dir: Path, tmp_path: Path) -> None:
    model = load(mixed_dir)
    export = export_onnx(lifted(model), tmp_path)
    runner = OrtRunner(export.path, threads=1)
    assert [tensor.shape[1] for tensor in runner.empty_past(1)] == [2, 2, 1, 1]
    ids, mask = tokens(2, 12, padding=4)
    expected, _ = run_in_steps(EagerRunner(model), ids, mask, [8, 12])
    logits, _ = run_in_steps(runner, ids, mask, [8, 12])
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_a_slim_program_with_other_heads_in_every_layer(tmp_path: Path) -> None:
    program = located("qwen3")
    first, second = (group for group in program.groups if isinstance(group, AttentionGroup))
    kept = {
        first.name: [head for kv in range(2) for head in first.heads_of(kv)[:2]],  # 2 KV heads, 2 query heads each
        second.name: list(second.heads_of(1)),  # 1 KV head, 3 query heads
    }
    mlps = [group.name for group in program.groups if group.name not in kept]
    plan = Plan.of({**kept, **{name: range(5 + 3 * index) for index, name in enumerate(mlps)}})
    slim = Slim()(InsertMasks()(program.replace(plan=plan)).program).program
    export = export_onnx(slim, tmp_path)
    runner = OrtRunner(export.path, threads=1)
    assert [tensor.shape[1] for tensor in runner.empty_past(1)] == [2, 2, 1, 1]
    assert export.rewrites["attentions"] == export.rewrites["skip_norms"] / 2 == 2
    ids, mask = tokens(2, 12, padding=4)
    expected, _ = run_in_steps(GraphRunner(slim.graph_module, slim.interface), ids, mask, [8, 11, 12])
    logits, _ = run_in_steps(runner, ids, mask, [8, 11, 12])
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.smoke
def test_greedy_text_is_the_same() -> None:
    program, export = exported("llama")
    ids, mask = tokens(2, 6, padding=2)
    expected = greedy(GraphRunner(program.graph_module, program.interface), ids, 8, mask)
    assert torch.equal(greedy(OrtRunner(export.path, threads=1), ids, 8, mask), expected)


def test_a_sequence_of_padding_alone_stays_finite() -> None:
    _, export = exported("llama")
    ids, mask = tokens(2, 5, padding=5)
    runner = OrtRunner(export.path, threads=1)
    logits, past = runner.step(ids, mask, position_ids_from_mask(mask, 5), None)
    assert logits.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in past)
    alone, _ = runner.step(ids[1:], mask[1:], position_ids_from_mask(mask[1:], 5), None)
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.smoke
def test_half_precision_stays_finite_under_padding(tmp_path: Path) -> None:
    program = lifted(llama().half())
    export = export_onnx(program, tmp_path)
    ids, mask = tokens(2, 8, padding=4)
    positions = position_ids_from_mask(mask, 8)
    logits, past = OrtRunner(export.path, threads=1).step(ids, mask, positions, None)
    expected, _ = GraphRunner(program.graph_module, program.interface).step(ids, mask, positions, None)
    assert logits.dtype == past[0].dtype == torch.float16
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=5e-2, rtol=0)


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    program = lifted(bert())
    export = export_onnx(program, tmp_path)
    ids, mask = tokens(3, 7, padding=2)
    inputs = {"input_ids": ids, "attention_mask": mask}
    outputs = run_onnx(export.path, inputs, threads=1)
    assert list(outputs) == ["last_hidden_state"]
    expected = program.graph_module(*(inputs[name] for name in program.interface.inputs))[0]
    torch.testing.assert_close(outputs["last_hidden_state"], expected, atol=1e-4, rtol=0)
    graph = ir.load(export.path).graph
    assert [[str(dim) for dim in value.shape or ()] for value in (*graph.inputs, *graph.outputs)] == [
        ["batch_size", "sequence_length"],
        ["batch_size", "sequence_length"],
        ["batch_size", "sequence_length", "32"],
    ]


@pytest.mark.smoke
def test_a_plain_module(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 4)))
    program = lifted(model, example_inputs=(torch.randn(3, 6),))
    export = export_onnx(program, tmp_path, opset=21)
    x = torch.randn(5, 6)
    (output,) = run_onnx(export.path, {program.interface.inputs[0]: x}, threads=1).values()
    torch.testing.assert_close(output, model(x), atol=1e-5, rtol=0)


# ── What the file says ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.smoke
def test_names_and_dimensions() -> None:
    _, export = exported("llama_with_mixed_heads")
    graph = ir.load(export.path).graph
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}
    expected = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    for layer, heads in enumerate(["2", "3"]):
        for kind in ("key", "value"):
            expected[f"past_key_values.{layer}.{kind}"] = ["batch_size", heads, "past_sequence_length", "8"]
    expected["logits"] = ["batch_size", "sequence_length", str(VOCABULARY)]
    for layer, heads in enumerate(["2", "3"]):
        for kind in ("key", "value"):
            expected[f"present.{layer}.{kind}"] = ["batch_size", heads, "total_sequence_length", "8"]
    assert shapes == expected
    assert list(shapes) == list(expected)


def test_initializers_have_the_names_of_their_parameters() -> None:
    program, export = exported("llama")
    weights = {tensor.name: tensor for tensor in onnx.load(str(export.path)).graph.initializer}
    for name, parameter in program.graph_module.named_parameters():
        stored = torch.from_numpy(onnx.numpy_helper.to_array(weights[name]).copy())
        linear = parameter.dim() == 2 and "embed" not in name
        assert torch.equal(stored, parameter.t() if linear else parameter), name


@pytest.mark.smoke
def test_a_tied_weight_is_stored_once() -> None:
    program, export = exported("qwen3")
    assert program.source is not None
    assert program.source.config.tie_word_embeddings
    model = onnx.load(str(export.path))
    tables = [tensor.name for tensor in model.graph.initializer if set(tensor.dims) == {VOCABULARY, 32}]
    assert len(tables) == 1


@pytest.mark.smoke
def test_fusions_none_is_standard_onnx() -> None:
    _, export = exported("llama", "none")
    model = onnx.load(str(export.path))
    onnx.checker.check_model(model, full_check=True)
    assert export.fusions == "none"
    assert {opset.domain for opset in model.opset_import} <= {""}


@pytest.mark.smoke
def test_fusions_auto_uses_the_operators_of_onnx_runtime() -> None:
    _, export = exported("llama")
    kinds = [node.op_type for node in nodes(export) if node.domain == CONTRIB]
    assert kinds.count("RotaryEmbedding") == 4
    assert kinds.count("SkipSimplifiedLayerNormalization") == 4
    assert export.fusions == "cpu"


def test_no_shape_is_computed_in_a_layer() -> None:
    _, export = exported("llama")
    kinds = [node.op_type for node in nodes(export)]
    assert kinds.count("Softmax") == 2
    assert kinds.count("Not") == 1  # one mask for all the layers
    assert kinds.index("Softmax") > max(index for index, kind in enumerate(kinds) if kind == "Shape")


@pytest.mark.smoke
@pytest.mark.parametrize("opset", [18, 21])
def test_opset(tmp_path: Path, opset: int) -> None:
    program, _ = exported("llama")
    export = export_onnx(program, tmp_path, opset=opset)
    model = onnx.load(str(export.path))
    assert export.opset == opset
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    ids, mask = tokens(2, 6, padding=1)
    runners = OrtRunner(export.path, threads=1), GraphRunner(program.graph_module, program.interface)
    logits, expected = (run_in_steps(runner, ids, mask, [5, 6])[0] for runner in runners)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_what_the_export_reports() -> None:
    _, export = exported("llama")
    assert list(export.seconds) == ["prepare", "re_export", "convert", "passes", "save"]
    assert all(value >= 0 for value in export.seconds.values())
    assert export.bytes == export.path.stat().st_size
    assert export.external_data is None
    assert export.rewrites["attentions"] == 2
    assert export.rewrites["rotary_embeddings"] == 4
    assert export.rewrites["rms_norms"] == 5
    assert export.rewrites["skip_norms"] == 4


@pytest.mark.smoke
def test_external_data(tmp_path: Path) -> None:
    program, inline = exported("llama")
    export = export_onnx(program, tmp_path, external_data=True)
    assert export.external_data == "model.onnx.data"
    assert export.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert export.path.stat().st_size < inline.path.stat().st_size
    ids, mask = tokens(1, 4)
    positions = position_ids_from_mask(mask, 4)
    logits = [OrtRunner(path, threads=1).step(ids, mask, positions, None)[0] for path in (export.path, inline.path)]
    assert torch.equal(*logits)
    (tmp_path / export.external_data).unlink()
    with pytest.raises(ExportError, match=r"model\.onnx\.data.*move the two together"):
        OrtRunner(export.path)


def test_weights_beyond_protobuf_go_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(nn.Linear(40, 30), example_inputs=(torch.randn(3, 40),))
    monkeypatch.setattr("fxprune.exporters.onnx_files.PROTOBUF_LIMIT", 1000)
    assert export_onnx(program, tmp_path / "auto").external_data is not None
    with pytest.raises(ExportError, match="2 GiB"):
        export_onnx(program, tmp_path / "inline", external_data=False)


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_out_of_range(tmp_path: Path) -> None:
    program, _ = exported("llama")
    with pytest.raises(ExportError, match="opset=23"):
        export_onnx(program, tmp_path, opset=23)
    with pytest.raises(ExportError, match=r"fusions='cuda'.*auto, none, cpu"):
        export_onnx(program, tmp_path, fusions="cuda")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_parameters_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama().config).eval()
    with pytest.raises(ExportError, match=r"embed_tokens\.weight is on the meta device"):
        export_onnx(lifted(model), tmp_path)


class BakesTheBatch(nn.Module):
    """A graph that only fits the batch it was traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(4, 3)


def test_an_axis_that_the_graph_fixes(tmp_path: Path) -> None:
    program = trace(BakesTheBatch(), example_inputs=(torch.randn(4, 3),))
    name = program.interface.inputs[0]
    interface = copy.copy(program.interface)
    object.__setattr__(interface, "dynamic_axes", {name: {0: "batch"}})
    with pytest.raises(ExportError, match=rf"axis 0 of input '{name}' was fixed at 4"):
        export_onnx(program.replace(interface=interface), tmp_path)


class OneBin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, bins=1)


class Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        upper: Tensor = torch.linalg.qr(x)[1]
        return upper


def test_an_operator_without_translation(tmp_path: Path) -> None:
    program = trace(nn.Sequential(Untranslatable()), example_inputs=(torch.randn(3, 4, 4),))
    with pytest.raises(ExportError, match=r"no translation for aten\.linalg_qr\.default in 0; use"):
        export_onnx(program, tmp_path)


def test_a_translation_that_fails_is_told_in_a_sentence_with_its_module(tmp_path: Path) -> None:
    program = trace(nn.Sequential(OneBin()), example_inputs=(torch.randn(3, 4),))
    with pytest.raises(ExportError, match=r"aten\.histc\.default in 0 \(.*min == max.*\); use the checkpoint") as found:
        export_onnx(program, tmp_path)
    assert "\n" not in str(found.value)
