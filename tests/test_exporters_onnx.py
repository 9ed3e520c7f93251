"""ONNX export and ONNX Runtime: the exported graph computes what the FX graph computes, in every way it is called."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor, nn

from fxprune.errors import ExportError
from fxprune.exporters import onnx_ops, onnx_passes
from fxprune.exporters.onnx import OnnxExport, export_onnx
from fxprune.exporters.onnx_graph import prepare_graph
from fxprune.exporters.ort import OrtRunner, run_onnx
from fxprune.groups import AttentionGroup
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.lift_linears import LiftLinears
from fxprune.passes.slim import Slim
from fxprune.plan import Plan
from fxprune.runners import GraphRunner, Past, Runner, greedy, position_ids_from_mask
from fxprune.tracing import trace
from tests.families import located

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fxprune.program import Program

VOCABULARY = 61
CONTRIB = "com.microsoft"


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(noise if parameter.dim() > 1 else parameter.data + noise)
    return model.eval()


def llama(**options: Any) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | options))))


def llama_with_mixed_heads() -> nn.Module:
    """The second layer has six query heads over three key/value heads, the first four over two."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = llama(head_dim=8)
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads = 6, 3
    model.model.layers[1].self_attn = LlamaAttention(config, 1)
    return randomize(model)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return randomize(transformers.Qwen3ForCausalLM(config))


def gptj() -> nn.Module:
    """Attention without a fused operator, interleaved rotary embeddings, LayerNorm, biases."""
    config = transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, vocab_size=VOCABULARY
    )
    return randomize(transformers.GPTJForCausalLM(config))


def falcon() -> nn.Module:
    """Writes in place, multi-query attention, parallel residual."""
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return randomize(transformers.FalconForCausalLM(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return randomize(transformers.BertModel(config, add_pooling_layer=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_with_mixed_heads": llama_with_mixed_heads,
    "qwen3": qwen3,
    "gptj": gptj,
    "falcon": falcon,
}


def lifted(model: nn.Module, **options: Any) -> Program:
    return LiftLinears()(trace(model, **options)).program


@functools.cache
def program_of(name: str) -> Program:
    return lifted(MODELS[name]())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Program, OnnxExport]]:
    """Program and export by model name and fusions, made once for the whole run."""

    @functools.cache
    def get(name: str, fusions: Any = "auto") -> tuple[Program, OnnxExport]:
        program = program_of(name)
        return program, export_onnx(program, tmp_path_factory.mktemp(name), fusions=fusions)

    return get


def tokens(batch: int, length: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose first row is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def run_in_steps(runner: Runner, ids: Tensor, mask: Tensor, stops: list[int]) -> tuple[Tensor, Past]:
    past: Past | None = None
    logits, start = [], 0
    for stop in stops:
        seen = mask[:, :stop]
        step, past = runner.step(ids[:, start:stop], seen, position_ids_from_mask(seen, stop - start), past)
        logits.append(step)
        start = stop
    assert past is not None
    return torch.cat(logits, dim=1), past


def nodes(export: OnnxExport) -> list[onnx.NodeProto]:
    return list(onnx.load(str(export.path)).graph.node)


# ── What the graph computes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(("name", "fusions"), [(name, "auto") for name in MODELS] + [("llama", "none")])
def test_onnx_runtime_equals_the_graph(exported: Any, name: str, fusions: str, batch: int, padding: int) -> None:
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


def test_greedy_text_is_the_same(exported: Any) -> None:
    program, export = exported("llama")
    ids, mask = tokens(2, 6, padding=2)
    expected = greedy(GraphRunner(program.graph_module, program.interface), ids, 8, mask)
    assert torch.equal(greedy(OrtRunner(export.path, threads=1), ids, 8, mask), expected)


def test_a_sequence_of_padding_alone_stays_finite(exported: Any) -> None:
    _, export = exported("llama")
    ids, mask = tokens(2, 5, padding=5)
    runner = OrtRunner(export.path, threads=1)
    logits, past = runner.step(ids, mask, position_ids_from_mask(mask, 5), None)
    assert logits.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in past)
    alone, _ = runner.step(ids[1:], mask[1:], position_ids_from_mask(mask[1:], 5), None)
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=0)


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


def test_a_plain_module(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 4)))
    program = lifted(model, example_inputs=(torch.randn(3, 6),))
    export = export_onnx(program, tmp_path, opset=21)
    x = torch.randn(5, 6)
    (output,) = run_onnx(export.path, {program.interface.inputs[0]: x}, threads=1).values()
    torch.testing.assert_close(output, model(x), atol=1e-5, rtol=0)


# ── What the file says ────────────────────────────────────────────────────────────────────────────────────────────


def test_names_and_dimensions(exported: Any) -> None:
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


def test_initializers_have_the_names_of_their_parameters(exported: Any) -> None:
    program, export = exported("llama")
    weights = {tensor.name: tensor for tensor in onnx.load(str(export.path)).graph.initializer}
    for name, parameter in program.graph_module.named_parameters():
        stored = torch.from_numpy(onnx.numpy_helper.to_array(weights[name]).copy())
        linear = parameter.dim() == 2 and "embed" not in name
        assert torch.equal(stored, parameter.t() if linear else parameter), name


def test_a_tied_weight_is_stored_once(exported: Any) -> None:
    program, export = exported("qwen3")
    assert program.source is not None
    assert program.source.config.tie_word_embeddings
    model = onnx.load(str(export.path))
    tables = [tensor.name for tensor in model.graph.initializer if set(tensor.dims) == {VOCABULARY, 32}]
    assert len(tables) == 1


def test_fusions_none_is_standard_onnx(exported: Any) -> None:
    _, export = exported("llama", "none")
    model = onnx.load(str(export.path))
    onnx.checker.check_model(model, full_check=True)
    assert export.fusions == "none"
    assert {opset.domain for opset in model.opset_import} <= {""}


def test_fusions_auto_uses_the_operators_of_onnx_runtime(exported: Any) -> None:
    _, export = exported("llama")
    kinds = [node.op_type for node in nodes(export) if node.domain == CONTRIB]
    assert kinds.count("RotaryEmbedding") == 4
    assert kinds.count("SkipSimplifiedLayerNormalization") == 4
    assert export.fusions == "cpu"


def test_no_shape_is_computed_in_a_layer(exported: Any) -> None:
    _, export = exported("llama")
    kinds = [node.op_type for node in nodes(export)]
    assert kinds.count("Softmax") == 2
    assert kinds.count("Not") == 1  # one mask for all the layers
    assert kinds.index("Softmax") > max(index for index, kind in enumerate(kinds) if kind == "Shape")


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(exported: Any, tmp_path: Path, opset: int) -> None:
    program, _ = exported("llama")
    export = export_onnx(program, tmp_path, opset=opset)
    model = onnx.load(str(export.path))
    assert export.opset == opset
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    ids, mask = tokens(2, 6, padding=1)
    runners = OrtRunner(export.path, threads=1), GraphRunner(program.graph_module, program.interface)
    logits, expected = (run_in_steps(runner, ids, mask, [5, 6])[0] for runner in runners)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_what_the_export_reports(exported: Any) -> None:
    _, export = exported("llama")
    assert list(export.seconds) == ["prepare", "re_export", "convert", "passes", "save"]
    assert all(value >= 0 for value in export.seconds.values())
    assert export.bytes == export.path.stat().st_size
    assert export.external_data is None
    assert export.rewrites["attentions"] == 2
    assert export.rewrites["rotary_embeddings"] == 4
    assert export.rewrites["rms_norms"] == 5
    assert export.rewrites["skip_norms"] == 4


def test_external_data(exported: Any, tmp_path: Path) -> None:
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
    monkeypatch.setattr("fxprune.exporters.onnx._PROTOBUF_LIMIT", 1000)
    assert export_onnx(program, tmp_path / "auto").external_data is not None
    with pytest.raises(ExportError, match="2 GiB"):
        export_onnx(program, tmp_path / "inline", external_data=False)


# ── The rewrites ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", list(MODELS))
def test_the_prepared_graph_computes_the_same_in_torch(name: str) -> None:
    program = program_of(name)
    prepared, _ = prepare_graph(program.graph_module, program.interface.example_inputs)
    inputs = list(program.interface.example_inputs.values())
    mask = program.interface.example_inputs["attention_mask"]
    visible = mask[:, -3:].bool()
    before, after = program.graph_module(*inputs)[0], prepared(*inputs)[0]
    torch.testing.assert_close(after[visible], before[visible], atol=1e-5, rtol=0)


def test_operators_before_and_after_preparation() -> None:
    program = program_of("llama")
    before = [node.target for node in program.graph_module.graph.nodes]
    prepared, _ = prepare_graph(program.graph_module, program.interface.example_inputs)
    after = [node.target for node in prepared.graph.nodes]
    aten, ours = torch.ops.aten, torch.ops.fxprune
    assert before == [node.target for node in program.graph_module.graph.nodes]  # the original is left as it is
    gone = [aten.scaled_dot_product_attention.default, aten.rsqrt.default, aten.neg.default, aten.contiguous.default]
    assert all(target in before and target not in after for target in gone)
    assert after.count(ours.grouped_attention.default) == 2
    assert after.count(ours.linear.default) == 15
    assert after.count(aten.logical_not.default) == 1
    calls = [
        sum(node.op.startswith("call") for node in module.graph.nodes) for module in (program.graph_module, prepared)
    ]
    assert calls[1] < calls[0] / 2


class InPlace(nn.Module):
    """One write that nothing else can see, one into a view, and one whose old value is read again later."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unseen = x.exp().add_(1.0)
        base = x.sin()
        base[:, 0].mul_(2.0)
        kept = x.cos()
        other = kept.view(-1)
        kept.add_(3.0)
        return unseen, base, other


def test_writes_that_can_be_seen_stay() -> None:
    x = torch.randn(4, 3)
    program = trace(InPlace(), example_inputs=(x,))
    prepared, _ = prepare_graph(program.graph_module, program.interface.example_inputs)
    written = [str(node.target) for node in prepared.graph.nodes if str(node.target).endswith("_.Tensor")]
    assert sorted(written) == ["aten.add_.Tensor", "aten.mul_.Tensor"]
    for ours, theirs in zip(prepared(x), InPlace()(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_writes_survive_the_export(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    program = trace(InPlace(), example_inputs=(x,))
    export = export_onnx(program, tmp_path)
    y = torch.randn(6, 3)
    outputs = run_onnx(export.path, {program.interface.inputs[0]: y}, threads=1)
    for ours, theirs in zip(outputs.values(), InPlace()(y), strict=True):
        torch.testing.assert_close(ours, theirs)


def operator_samples() -> dict[str, tuple[Any, ...]]:
    q, k = torch.randn(2, 6, 3, 8), torch.randn(2, 3, 5, 8)
    mask = torch.zeros(2, 1, 3, 5)
    return {
        "linear": (torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)),
        "rms_norm": (torch.randn(2, 3, 4), torch.randn(4), 1e-6),
        "split_heads": (torch.randn(2, 3, 12), 4),
        "merge_heads": (torch.randn(2, 4, 3, 5),),
        "append": (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 3, 8)),
        "rotary_embedding": (q, torch.arange(6).view(2, 3), torch.randn(6, 4), torch.randn(6, 4)),
        "grouped_attention": (q, k, torch.randn(2, 3, 5, 7), mask, 0.3),
    }


@pytest.mark.parametrize("name", list(operator_samples()))
def test_operators_state_their_shapes_rightly(name: str) -> None:
    operator = getattr(torch.ops.fxprune, name).default
    torch.library.opcheck(operator, operator_samples()[name], test_utils=("test_schema", "test_faketensor"))
    assert operator in onnx_ops.translation_table(contrib=True)


def test_grouped_attention_is_scaled_dot_product_attention() -> None:
    query, key, value, _, scale = operator_samples()["grouped_attention"]
    mask = torch.randn(2, 6, 3, 5)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    torch.testing.assert_close(onnx_ops.grouped_attention(query, key, value, mask, scale), expected)


class PerHeadBias(nn.Module):
    """Attention with a bias per head that hides some keys with -inf, like ALiBi under padding."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        keys, values = (
            tensor.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(tensor.shape[0], 6, tensor.shape[2], 8)
            for tensor in (key, value)
        )
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias)


def test_a_bias_per_head(tmp_path: Path) -> None:
    def sample(batch: int, new: int, total: int) -> dict[str, Tensor]:
        bias = torch.randn(batch, 6, new, total)
        bias[0, :, 0] = float("-inf")  # one row that may see nothing
        bias[1, :, 1, :2] = float("-inf")
        cached = torch.randn(2, batch, 3, total, 8)
        return {"query": torch.randn(batch, 6, new, 8), "key": cached[0], "value": cached[1], "bias": bias}

    program = trace(PerHeadBias(), example_inputs=sample(2, 3, 5))
    export = export_onnx(program, tmp_path)
    assert export.rewrites["attentions"] == 1
    inputs = sample(4, 3, 5)
    (output,) = run_onnx(export.path, inputs, threads=1).values()
    expected = PerHeadBias()(**inputs)
    assert output.isfinite().all()
    torch.testing.assert_close(output[1:], expected[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(output[0, :, 1:], expected[0, :, 1:], atol=1e-5, rtol=0)


def small_graph(nodes: list[ir.Node], inputs: list[ir.Value], initializers: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def floats(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def reshape_graph(before: list[int | str], after: list[int | str]) -> tuple[ir.Model, ir.Node]:
    """A Reshape whose target is computed at run time."""
    x, target = floats("x", before), floats("target", [len(after)])
    computed = ir.node("Cast", [target], attributes={"to": 7})
    reshape = ir.node("Reshape", [x, computed.outputs[0]], attributes={"allowzero": 1}, outputs=[floats("y", after)])
    last = ir.node("Relu", [reshape.outputs[0]])
    return small_graph([computed, reshape, last], [x, target], []), reshape


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["b", "s", 12], ["b", "s", 3, 4], [0, 0, 3, 4]),
        (["b", 3, "s", 4], ["b", 3, 2, "t", 4], [0, 3, 2, -1, 4]),
        (["n", 12], ["b", "s", 12], None),  # two unknown extents
        (["b", "past_sequence_length", 4], ["n", 4], None),  # the open extent of an empty tensor
    ],
)
def test_reshape_targets(before: list[int | str], after: list[int | str], expected: list[int] | None) -> None:
    model, reshape = reshape_graph(before, after)
    assert onnx_passes.simplify_reshapes(model) == (expected is not None)
    target = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    assert target is not None
    if expected is None:
        assert target.op_type == "Cast"
    else:
        assert list(target.attributes["value_ints"].as_ints()) == expected
        assert "allowzero" not in reshape.attributes


def test_an_idle_reshape_goes() -> None:
    model, _ = reshape_graph(["b", 3, "s"], ["b", 3, "s"])
    assert onnx_passes.simplify_reshapes(model) == 1
    assert [node.op_type for node in model.graph] == ["Cast", "Relu"]


def test_a_weight_with_another_reader_keeps_its_layout() -> None:
    def model(*, tied: bool) -> ir.Model:
        weight = ir.Value(name="weight", const_value=ir.tensor(torch.arange(6.0).view(2, 3).numpy(), name="weight"))
        x = floats("x", ["b", 3])
        transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        readers = [ir.node("Identity", [weight])] if tied else []
        return small_graph([transpose, *readers, ir.node("MatMul", [x, transpose.outputs[0]])], [x], [weight])

    assert onnx_passes.fold_weight_transposes(model(tied=True)) == 0
    free = model(tied=False)
    assert onnx_passes.fold_weight_transposes(free) == 1
    stored = free.graph.initializers["weight"].const_value
    assert stored is not None
    assert stored.numpy().tolist() == [[0, 3], [1, 4], [2, 5]]


# ── The runner ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_runner_is_a_runner(exported: Any) -> None:
    _, export = exported("llama_with_mixed_heads")
    runner = OrtRunner(export.path, threads=1, name="deployed")
    assert isinstance(runner, Runner)
    assert runner.name == "deployed"
    assert runner.load_seconds > 0
    assert runner.providers == ("CPUExecutionProvider",)
    assert [tuple(tensor.shape) for tensor in runner.empty_past(3)] == [(3, 2, 0, 8)] * 2 + [(3, 3, 0, 8)] * 2


def test_a_cache_can_be_continued_twice(exported: Any) -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(1, 6)
    _, past = runner.step(ids[:, :5], mask[:, :5], position_ids_from_mask(mask[:, :5], 5), None)
    before = [tensor.clone() for tensor in past]
    results = [runner.step(ids[:, 5:], mask, position_ids_from_mask(mask, 1), past)[0].clone() for _ in range(2)]
    del runner
    assert torch.equal(*results)
    assert all(torch.equal(*pair) for pair in zip(past, before, strict=True))


def test_a_cache_that_is_a_view_can_be_given(exported: Any) -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(2, 6)
    _, past = runner.step(ids[:, :5], mask[:, :5], position_ids_from_mask(mask[:, :5], 5), None)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in past]
    outputs = [runner.step(ids[:, 5:], mask, position_ids_from_mask(mask, 1), cache)[0] for cache in (past, strided)]
    assert torch.equal(*outputs)


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_out_of_range(exported: Any, tmp_path: Path) -> None:
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


class Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        upper: Tensor = torch.linalg.qr(x)[1]
        return upper


def test_an_operator_without_translation(tmp_path: Path) -> None:
    program = trace(Untranslatable(), example_inputs=(torch.randn(3, 4, 4),))
    with pytest.raises(ExportError, match="qr"):
        export_onnx(program, tmp_path)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no ONNX file at"):
        OrtRunner(tmp_path / "missing.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"damaged\.onnx.*export the graph again"):
        OrtRunner(damaged)
    with pytest.raises(ExportError, match="NoSuchProvider"):
        OrtRunner(damaged, providers=["NoSuchProvider"])


def test_a_graph_that_is_no_language_model(tmp_path: Path) -> None:
    export = export_onnx(lifted(bert()), tmp_path)
    with pytest.raises(ExportError, match="no 'logits'"):
        OrtRunner(export.path)
    ids, mask = tokens(2, 4)
    with pytest.raises(ExportError, match="was given"):
        run_onnx(export.path, {"input_ids": ids, "mask": mask})


def test_inputs_that_do_not_fit(exported: Any) -> None:
    _, export = exported("llama")
    runner = OrtRunner(export.path, threads=1)
    ids, mask = tokens(2, 4)
    with pytest.raises(ExportError, match="onnxruntime failed on inputs"):
        runner.step(ids.float(), mask, position_ids_from_mask(mask, 4), None)
