"""The steps of the ONNX export: FX rewrites, the operators they use, and passes over the ONNX IR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from fxprune.core.errors import ExportError
from fxprune.exporters import onnx_ops, onnx_passes
from fxprune.exporters.onnx import export_onnx
from fxprune.exporters.onnx_graph import prepare_graph
from fxprune.exporters.ort import run_onnx
from fxprune.tracing.trace import trace
from tests.onnx_models import MODELS, program_of

if TYPE_CHECKING:
    from pathlib import Path


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
    assert written == ["aten.add_.Tensor"]  # tracing made a scatter of the write into a view
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


# ── Complex numbers and constants ─────────────────────────────────────────────────────────────────────────────────


class Turned(nn.Module):
    """Pairs of channels turned by their position, as complex numbers and with a complex table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.polar(torch.rand(4) + 0.5, torch.rand(4)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        angles = torch.arange(x.shape[1]).unsqueeze(-1) * torch.tensor([1.0, 0.5, 0.25, 0.125])
        turns = torch.polar(torch.ones_like(angles), angles) * 0.5
        turned = pairs * turns[:, None, :].to(x.device) * self.table.conj()
        return torch.view_as_real(turned.transpose(1, 2)).flatten(3)


def test_complex_numbers_are_pairs_of_real_ones(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 8)
    program = trace(Turned(), example_inputs=(x,))
    prepared, rewrites = prepare_graph(program.graph_module, program.interface.example_inputs)
    assert rewrites["complex"] > 0
    values = [node.meta["val"] for node in prepared.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert values
    assert not any(value.is_complex() for value in values)
    expected = Turned.forward(program.references["eager"].module, x)  # type: ignore[arg-type]  # it is one
    torch.testing.assert_close(prepared(x)[0], expected)
    got = run_onnx(export_onnx(program, tmp_path).path, {"x": x})
    torch.testing.assert_close(next(iter(got.values())), expected, atol=1e-5, rtol=0)


class Powered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x).pow(2))


def test_an_operator_without_a_form_in_real_numbers_is_refused(tmp_path: Path) -> None:
    program = trace(nn.Sequential(Powered()), example_inputs=(torch.randn(3, 4, 2),))
    with pytest.raises(ExportError, match=r"aten\.pow.* in 0 works on complex numbers.*use the checkpoint"):
        export_onnx(program, tmp_path)


class Quantile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        level = torch.distributions.Normal(0, 1).icdf(torch.tensor(0.9))
        return torch.relu(x - x.mean(-1, keepdim=True) - level * x.std(-1, keepdim=True))


def test_what_is_computed_from_constant_numbers_is_a_constant(tmp_path: Path) -> None:
    x = torch.randn(3, 4, 6)
    program = trace(Quantile(), example_inputs=(x,))
    assert any("erfinv" in str(node.target) for node in program.graph_module.graph.nodes)
    got = run_onnx(export_onnx(program, tmp_path).path, {"x": x})
    torch.testing.assert_close(next(iter(got.values())), Quantile()(x), atol=1e-6, rtol=0)
