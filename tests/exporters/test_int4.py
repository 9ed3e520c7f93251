"""int4: the packed numbers, what is quantized and what is not, and the measured difference."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fxprune.core.errors import ExportError, UsageError, VerificationError
from fxprune.exporters.int4 import Int4Options, quantize_graph
from fxprune.exporters.onnx_files import check_external_data, read_graph, write_graph
from fxprune.exporters.ort import OrtRunner, run_onnx
from fxprune.flows.exporting import ExportRequest, run_export
from fxprune.runtimes.runners import GraphRunner, position_ids_from_mask
from fxprune.verification.approximation import measure_difference
from tests.onnx_models import exported, tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.xdist_group("tests/exporters/test_onnx.py")  # they share what is exported once a process


def dequantized(packed: Any, scales: Any, zero_points: Any | None, rows: int) -> NDArray[np.floating[Any]]:
    """(out, in) in float, by the definition of MatMulNBits."""
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, -1).astype(np.float32)
    zeros = np.full(scales.shape, 8)
    if zero_points is not None:
        zeros = np.stack([zero_points & 15, zero_points >> 4], axis=-1).reshape(len(scales), -1)[:, : scales.shape[1]]
    return ((numbers - zeros[..., None]) * scales[..., None]).reshape(len(scales), -1)[:, :rows]


def arrays(path: Path) -> dict[str, Any]:
    return {name: value.const_value.numpy() for name, value in ir.load(path).graph.initializers.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "close"),
    [
        (Int4Options(group_size=16), 1.0),
        (Int4Options(group_size=16, symmetric=False), 1 / 2),
        (Int4Options("k-quant", 16), 1.0),
        (Int4Options("k-quant", 32), 1.0),  # 48 inputs: two groups; 32: one, which onnxruntime's own packing refuses
    ],
)
def test_a_weight_is_within_its_scale(tmp_path: Path, options: Int4Options, close: float) -> None:
    """Every number is at most half a step off, or a step where the method may clip; the runtime agrees on the rest."""
    _, export = exported("llama")
    done = quantize_graph(export.path, tmp_path / "model.onnx", options)
    float_, packed = arrays(export.path), arrays(done.path)
    name = "model.layers.0.mlp.down_proj.weight"
    zeros = packed.get(f"{name}_zero_points")
    assert (zeros is not None) == options.has_zero_points
    scales = packed[f"{name}_scales"]
    back = dequantized(packed[f"{name}_Q4"], scales, zeros, 48)
    steps = np.repeat(np.abs(scales), options.group_size, axis=1)[:, :48]
    assert np.all(np.abs(back - float_[name].T) <= close * steps + 1e-6)
    assert done.weights[name].shape == (32, 48)
    assert done.bytes < export.bytes


@pytest.mark.smoke
def test_onnxruntimes_own_quantizer_gives_the_same(tmp_path: Path) -> None:
    """Its class keeps its numbers under the same names, in another order."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    _, export = exported("llama")
    for symmetric in (False, True):
        done = quantize_graph(export.path, tmp_path / "ours.onnx", Int4Options(group_size=16, symmetric=symmetric))
        theirs = MatMulNBitsQuantizer(str(export.path), block_size=16, is_symmetric=symmetric, accuracy_level=4)
        theirs.process()
        expected = {tensor.name: ir.from_proto(tensor).numpy() for tensor in theirs.model.model.graph.initializer}
        given = arrays(done.path)
        quantized = [name for name in expected if name.endswith(("_Q4", "_scales", "_zero_points"))]
        assert len(quantized) == (2 if symmetric else 3) * len(done.weights)
        assert all(np.array_equal(given[name], expected[name]) for name in quantized)


def test_logging_of_the_process_is_left_alone(tmp_path: Path) -> None:
    _, export = exported("llama")
    root = logging.getLogger()
    before = list(root.handlers), root.level
    quantize_graph(export.path, tmp_path / "model.onnx", Int4Options(group_size=16))
    assert (list(root.handlers), root.level) == before


def forward(path: Path) -> torch.Tensor:
    ids, mask = tokens(2, 8)
    return OrtRunner(path, threads=1).step(ids, mask, position_ids_from_mask(mask, 8), None)[0]


def with_dequantized(source: Path, quantized: Path, target: Path, group: int) -> Path:
    """The float graph with the numbers that int4 stands for: what the int4 graph must compute."""
    packed = arrays(quantized)
    model = read_graph(source)
    for name, value in model.graph.initializers.items():
        scales = packed.get(f"{name}_scales")
        if scales is not None:
            assert value.const_value is not None
            shape = value.const_value.shape.numpy()
            turned = {node.op_type for node, _ in value.uses()} == {"MatMul"}
            numbers = packed.get(f"{name}_Q4", packed.get(f"{name}_rows_Q4"))
            flat = numbers.reshape(len(scales), -1)  # rows of a table are cut at its width
            full = np.pad(flat, ((0, 0), (0, scales.shape[1] * group // 2 - flat.shape[1])))
            zeros = packed.get(f"{name}_zero_points")
            back = dequantized(full, scales, zeros, shape[0] if turned else shape[1]).astype(np.float32)
            value.const_value = ir.tensor(np.ascontiguousarray(back.T if turned else back), name=name)
    write_graph(model, target)
    return target


@pytest.mark.parametrize(("name", "group"), [("llama", 16), ("llama", 64), ("qwen3", 16), ("qwen3", 64)])
def test_the_graph_computes_with_the_rounded_weights(tmp_path: Path, name: str, group: int) -> None:
    """Projection, tied or not, and embedding; 64 is more than the inputs of any weight here."""
    _, export = exported(name)
    options = Int4Options(group_size=group, symmetric=group == 64, accuracy_level=1, embeddings=True)
    done = quantize_graph(export.path, tmp_path / "int4.onnx", options)
    assert done.kept == {}
    expected = with_dequantized(export.path, done.path, tmp_path / "rounded.onnx", group)
    torch.testing.assert_close(forward(done.path), forward(expected), atol=2e-4, rtol=0)
    readers = [weight.operator for weight in done.weights.values()]
    assert any("GatherBlockQuantized" in reader for reader in readers)
    if name == "qwen3":  # tied: one table serves both
        assert "MatMulNBits, GatherBlockQuantized" in readers


@pytest.mark.smoke
def test_a_mixed_model_that_was_saved_and_loaded(mixed_dir: Path, tmp_path: Path) -> None:
    request = ExportRequest(tmp_path / "out", int4={"group_size": 16})
    found = run_export(str(mixed_dir), request, lambda _: None)
    assert all(rung["passed"] for rung in found["verify"])
    assert 0 < found["int4"]["difference"]["mean_kl"] < 1
    packed = arrays(tmp_path / "out" / "model.onnx")
    groups = [packed[f"model.layers.{layer}.mlp.down_proj.weight_Q4"].shape[1] for layer in range(2)]
    assert groups == [64 // 16, 48 // 16]


def test_the_projection_to_the_vocabulary_is_a_choice(tmp_path: Path) -> None:
    _, export = exported("llama")
    float_head = quantize_graph(export.path, tmp_path / "a.onnx", Int4Options(group_size=16, lm_head=False))
    assert "lm_head.weight" not in float_head.weights
    assert "lm_head.weight" in quantize_graph(export.path, tmp_path / "b.onnx", Int4Options(group_size=16)).weights


def test_external_data_is_read_and_written_and_missed(tmp_path: Path) -> None:
    _, export = exported("llama")
    for name in ("float", "int4"):
        (tmp_path / name).mkdir()
    source, target = tmp_path / "float" / "model.onnx", tmp_path / "int4" / "model.onnx"
    assert write_graph(read_graph(export.path), source, external_data=True) == "model.onnx.data"
    done = quantize_graph(source, target, Int4Options(group_size=16), external_data=True)
    assert check_external_data(target) == (done.external_data,) == ("model.onnx.data",)
    inside = quantize_graph(export.path, tmp_path / "inside.onnx", Int4Options(group_size=16))
    assert torch.equal(forward(target), forward(inside.path))
    data = source.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"model\.onnx\.data is cut off: it has 1,000 bytes"):
        quantize_graph(source, target)
    data.unlink()
    with pytest.raises(ExportError, match=r"model\.onnx\.data .* is missing; .*move the two together"):
        quantize_graph(source, target)
    with pytest.raises(ExportError, match="move the two together"):
        OrtRunner(source)
    source.write_bytes(source.read_bytes().replace(b"model.onnx.data", b"../../etc/hosts"))
    with pytest.raises(ExportError, match="outside its directory"):
        check_external_data(source)
    source.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read as an ONNX graph"):
        read_graph(source)


def test_options_out_of_range_and_graphs_without_weights(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"method": "gptq"}, "rtn, k-quant"),
        ({"group_size": 24}, "choose one of 16, 32"),
        ({"accuracy_level": 5}, "0 to 4"),
        ({"method": "k-quant", "symmetric": True}, "always has zero points"),
    ]
    for options, message in bad:
        with pytest.raises(UsageError, match=message):
            Int4Options(**options).check()
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=9), tmp_path / "relu.onnx")
    with pytest.raises(ExportError, match="nothing to quantize"):
        quantize_graph(tmp_path / "relu.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    assert torch.equal(run_onnx(tmp_path / "relu.onnx", {"x": torch.ones(2)})["y"], torch.ones(2))


def test_the_difference_is_zero_for_the_same_form_and_is_counted_otherwise() -> None:
    program, export = exported("llama")
    slim = GraphRunner(program.graph_module, program.interface)
    text = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    same = measure_difference("same", slim, OrtRunner(export.path, threads=1), text, new_tokens=6)
    assert (same.positions, same.greedy_tokens, same.greedy_same, same.same_first_choice) == (24, 12, 12, 1.0)
    assert same.max_abs_difference < 1e-4
    assert same.mean_kl < 1e-6

    class Shifted:
        """Every token's successor is the likeliest, by far."""

        name = "shifted"

        def step(self, *arguments: Any) -> Any:
            logits, past = slim.step(*arguments)
            return logits.roll(1, -1), past

    other = measure_difference("other", slim, Shifted(), text, new_tokens=6)
    assert (other.greedy_same, other.same_first_choice) == (0, 0.0)
    assert other.mean_kl > 0.1
    assert "not expected to be equal" in other.describe()

    class Broken(Shifted):
        def step(self, *arguments: Any) -> Any:
            logits, past = slim.step(*arguments)
            return logits * float("nan"), past

    with pytest.raises(VerificationError, match="not finite"):
        measure_difference("broken", slim, Broken(), text)
