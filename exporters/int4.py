"""int4: the weights of an exported graph in 4 bits a number, for ONNX Runtime's MatMulNBits.

    MatMul(x, W)                        MatMulNBits(x, W_Q4, W_scales [, W_zero_points])
    MatMul(x, Transpose(E))       ->    the same, for a projection tied to the embedding
    Gather(E, input_ids)                GatherBlockQuantized(E_Q4, input_ids, ...)

Each column of a weight is cut into groups of consecutive inputs that share a scale and, unless symmetric, a zero point.
The numbers come from ONNX Runtime's own quantizers: its round-to-nearest kernel, and its k-quant (the scale and the
zero point that minimise the squared error weighted by magnitude, after llama.cpp's Q4_K). Its class
`MatMulNBitsQuantizer` is not used around them: that holds the whole model in memory, leaves projections tied to the
embedding in float, and its k-quant cannot pack an odd number of groups, which slim widths often give.

Not quantized: what is no 2-D constant (stacked experts), and embeddings other than the tokens'. The names are reported.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from fxprune.core.errors import ExportError, UsageError
from fxprune.exporters.onnx_files import read_graph, write_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Int4Export", "Int4Options", "QuantizedWeight", "is_quantized", "quantize_graph"]

Method = Literal["rtn", "k-quant"]
_ACCURACY_LEVELS = range(5)
_GROUPS = tuple(2**power for power in range(4, 9))
_PART = 2**22
"""Weights that k-quant takes at once: it makes a dozen copies in float64."""
_WORTH_NAMING = 4096
"""Numbers of a matrix from which on it is reported as kept in float."""


@dataclass(frozen=True)
class Int4Options:
    """How to quantize.

    Attributes:
        method: `"rtn"` rounds to the nearest of 16 levels between a group's extremes; `"k-quant"` searches for the
            scale and zero point with the least weighted squared error, and takes longer.
        group_size: inputs that share a scale, 16 to 256, a power of two.
        symmetric: no zero points: levels lie around 0. None is the method's own choice: rtn without (smaller),
            k-quant always with them.
        accuracy_level: precision in which the products are computed: 0 the runtime's choice, 1 float32, 2 float16,
            3 bfloat16, 4 int8 (activations are rounded to 8 bits by group as well).
        lm_head: quantize the projection to the vocabulary too.
        embeddings: quantize the token embedding too.
    """

    method: Method = "rtn"
    group_size: int = 32
    symmetric: bool | None = None
    accuracy_level: int = 4
    lm_head: bool = True
    embeddings: bool = False

    @property
    def has_zero_points(self) -> bool:
        """Whether a group has a zero point of its own."""
        return self.method == "k-quant" or self.symmetric is False

    def check(self) -> None:
        """Raise a `UsageError` if an option is out of range or two exclude each other."""
        if self.method not in get_args(Method):
            raise UsageError(f"int4 method {self.method!r} is unknown; choose one of {', '.join(get_args(Method))}")
        if self.group_size not in _GROUPS:
            raise UsageError(f"int4 group size {self.group_size}: choose one of {', '.join(map(str, _GROUPS))}")
        if self.accuracy_level not in _ACCURACY_LEVELS:
            raise UsageError(f"int4 accuracy level {self.accuracy_level}: choose 0 to 4")
        if self.symmetric and self.method == "k-quant":
            raise UsageError("k-quant always has zero points; use the method rtn for symmetric int4")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that now has 4 bits a number: what reads it, its shape (out, in), and its bytes before and after."""

    operator: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Int4Export:
    """What was quantized.

    Attributes:
        path: the new `.onnx` file.
        options: how.
        weights: what was quantized, by the name of the weight (its parameter's qualified name).
        kept: matrices of at least 4,096 numbers that stay in float, with the reason.
        bytes: size of the graph file and of its external data, if any.
        seconds: wall time.
        external_data: name of the file beside it that has the weights; None if they are in the graph file.
    """

    path: Path
    options: Int4Options
    weights: Mapping[str, QuantizedWeight]
    kept: Mapping[str, str]
    bytes: int
    seconds: float
    external_data: str | None = None


def quantize_graph(
    source: Path, target: Path, options: Int4Options | None = None, *, external_data: bool | None = None
) -> Int4Export:
    """Quantize the weights of an exported graph.

    Args:
        source: a `.onnx` file in float32 or float16, its external data beside it.
        target: the new `.onnx` file; its directory exists.
        options: how; the defaults when None.
        external_data: see `fxprune.exporters.onnx_files.write_graph`.

    Raises:
        UsageError: an option is out of range.
        ExportError: the graph or its external data cannot be read, it is bfloat16, or has nothing to quantize.
    """
    options = options or Int4Options()
    options.check()
    start = time.perf_counter()
    model = read_graph(source)
    head = _head(model)
    work = _Quantization(model, options)
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.domain == "":
            work.matmul(node, is_head=node is head)
    for node in list(model.graph):
        if _embeds_tokens(node):
            work.embedding(node)
    if not work.weights:
        raise ExportError(f"{source} has nothing to quantize: no MatMul with a constant 2-D weight; leave int4 out")
    kept = work.finish()
    data = write_graph(model, target, external_data)
    size = target.stat().st_size + (target.with_name(data).stat().st_size if data else 0)
    return Int4Export(target, options, work.weights, kept, size, time.perf_counter() - start, data)


def is_quantized(path: Path) -> bool:
    """Whether a graph has weights in 4 bits, whatever is said about it elsewhere.

    Raises:
        ExportError: the graph or its external data cannot be read.
    """
    return any(node.op_type in {"MatMulNBits", "GatherBlockQuantized"} for node in read_graph(path).graph)


# ── Which weights ─────────────────────────────────────────────────────────────────────────────────────────────────

_PASS_ON = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Reshape", "Tanh"}
"""What may stand between the last projection and the logits: a bias, a scale, a soft cap, another type."""


def _head(model: ir.Model) -> ir.Node | None:
    """The projection to the vocabulary: the first MatMul met on the way back from `logits`."""
    reached = [value for value in model.graph.outputs if value.name == "logits"]
    while reached:
        node = reached.pop().producer()
        if node is not None and node.op_type == "MatMul":
            return node
        if node is not None and node.op_type in _PASS_ON:
            reached += [value for value in node.inputs if value is not None]
    return None


def _embeds_tokens(node: ir.Node) -> bool:
    """Whether the node looks tokens up in a table."""
    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return False
    table, index = node.inputs[:2]
    while index is not None and (producer := index.producer()) is not None and producer.op_type in _PASS_ON:
        index = producer.inputs[0]
    return table is not None and table.is_initializer() and index is not None and index.name == "input_ids"


def _constant(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The 2-D initializer that a MatMul reads, and whether it is stored transposed, as (out, in)."""
    if value is None:
        return None
    turned = value.producer()
    transposed = turned is not None and turned.op_type == "Transpose" and len(turned.inputs) == 1
    source = turned.inputs[0] if transposed and turned is not None else value
    if source is None or not source.is_initializer() or source.const_value is None:
        return None
    tensor = source.const_value
    return (source, transposed) if len(tensor.shape) == 2 and tensor.dtype in _FLOATS else None


_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


# ── Rewriting ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Packed:
    """A weight as MatMulNBits wants it.

    Attributes:
        shape: (out, in).
        weight: (out, groups, group size / 2) uint8, two numbers a byte, the lower half first.
        scales: (out, groups), in the weight's own precision.
        zero_points: (out, groups / 2 rounded up) uint8, two a byte; None if symmetric.
    """

    shape: tuple[int, int]
    weight: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zero_points: NDArray[np.uint8] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)


class _Quantization:
    """Rewrites one graph; a weight with several readers is quantized once."""

    def __init__(self, model: ir.Model, options: Int4Options) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self._model, self._graph, self._options = model, model.graph, options
        self._done: dict[tuple[ir.Value, bool], tuple[_Packed, list[ir.Value]]] = {}
        self._reasons: dict[str, str] = {}
        model.graph.opset_imports["com.microsoft"] = 1

    def matmul(self, node: ir.Node, *, is_head: bool) -> None:
        """Quantize the weight of a MatMul, if it has one."""
        found = _constant(node.inputs[1])
        if found is None:
            return
        weight, transposed = found
        if is_head and not self._options.lm_head:
            self._reasons[str(weight.name)] = "the projection to the vocabulary, not asked for"
            return
        packed, inputs = self._quantized(weight, transposed=transposed)
        columns, rows = packed.shape
        attributes = {"K": rows, "N": columns, "bits": 4, "block_size": self._options.group_size}
        if self._options.accuracy_level:
            attributes["accuracy_level"] = self._options.accuracy_level
        self._put(node, "MatMulNBits", [node.inputs[0], *inputs], attributes)
        self._record(weight, "MatMulNBits", packed)

    def embedding(self, node: ir.Node) -> None:
        """Quantize the table that tokens are looked up in."""
        table = node.inputs[0]
        found = _constant(table)
        assert table is not None
        if not self._options.embeddings:
            self._reasons.setdefault(str(table.name), "the token embedding, not asked for")
            return
        if found is None or found[1] or int(table.shape[1]) % 2:  # type: ignore[index,arg-type]  # a constant has a shape
            self._reasons[str(table.name)] = "an embedding that is no matrix of an even width cannot be packed"
            return
        packed, (data, *rest) = self._quantized(table, transposed=True)
        rows, columns = packed.shape
        flat = packed.weight.reshape(rows, -1)
        if flat.shape[1] * 2 == columns:  # the very same numbers, seen as a matrix
            shape = ir.node("Constant", [], attributes={"value_ints": [rows, columns // 2]})
            flatten = ir.node("Reshape", [data, shape.outputs[0]])
            self._graph.insert_before(node, [shape, flatten])
            data = flatten.outputs[0]
        else:  # the last group is not full: its padding must not come out
            data = self._initializer(f"{table.name}_rows_Q4", np.ascontiguousarray(flat[:, : columns // 2]))
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": self._options.group_size, "bits": 4}
        self._put(node, "GatherBlockQuantized", [data, node.inputs[1], *rest], attributes)
        self._record(table, "GatherBlockQuantized", packed)

    def finish(self) -> dict[str, str]:
        """Remove what nothing reads any more; the matrices that stay in float, with the reasons."""
        common.RemoveUnusedNodesPass()(self._model)
        ours = {value for _, inputs in self._done.values() for value in inputs}
        kept = {}
        for value in self._graph.initializers.values():
            tensor = value.const_value
            if value in ours or tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) < 2:
                continue
            if tensor.size >= _WORTH_NAMING:
                other = "not 2-D" if len(tensor.shape) > 2 else "no MatMul reads it as its weight"
                kept[str(value.name)] = self._reasons.get(str(value.name), other)
        return kept

    def _quantized(self, weight: ir.Value, *, transposed: bool) -> tuple[_Packed, list[ir.Value]]:
        """The numbers, and the initializers that hold them."""
        if (weight, transposed) not in self._done:
            assert weight.const_value is not None
            matrix = weight.const_value.numpy()
            if matrix.dtype not in {np.dtype(np.float32), np.dtype(np.float16)}:
                raise ExportError(
                    f"{weight.name} is {matrix.dtype}, which int4 has no kernels for; export in float32 or float16"
                )
            packed = _pack(matrix.T if transposed else matrix, self._options)
            parts = {"Q4": packed.weight, "scales": packed.scales, "zero_points": packed.zero_points}
            # A weight that is read both ways is packed both ways, under names of their own.
            again = "_turned" if (weight, not transposed) in self._done else ""
            inputs = [
                self._initializer(f"{weight.name}{again}_{key}", part)
                for key, part in parts.items()
                if part is not None
            ]
            self._done[weight, transposed] = packed, inputs
        return self._done[weight, transposed]

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _put(self, old: ir.Node, operator: str, inputs: list[ir.Value | None], attributes: Mapping[str, int]) -> None:
        """Put an operator in the place of another, under the same name."""
        new = ir.node(operator, inputs, attributes=attributes, domain="com.microsoft", name=old.name)
        before, after = old.outputs[0], new.outputs[0]
        after.shape, after.type, after.name = before.shape, before.type, before.name
        self._graph.insert_before(old, new)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        self._graph.remove(old, safe=True)

    def _record(self, weight: ir.Value, operator: str, packed: _Packed) -> None:
        assert weight.const_value is not None
        name = str(weight.name)
        known = self.weights.get(name)
        operator = operator if known is None or operator in known.operator else f"{known.operator}, {operator}"
        self.weights[name] = QuantizedWeight(operator, packed.shape, weight.const_value.nbytes, packed.nbytes)


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _pack(weight: NDArray[Any], options: Int4Options) -> _Packed:
    """Quantize a weight of (in, out) in float32 or float16."""
    with _quiet_import():
        from onnxruntime.quantization import matmul_nbits_quantizer as ort  # noqa: PLC0415 - heavy, and see below
    if options.method == "k-quant":
        return _k_quant(weight, options.group_size)
    symmetric = not options.has_zero_points
    config = ort.DefaultWeightOnlyQuantConfig(block_size=options.group_size, is_symmetric=symmetric)
    kernel = ort.DefaultWeightOnlyQuantizer(config)
    packed, scales, zero_points = kernel.qbits_block_quant(np.ascontiguousarray(weight))
    shape = (weight.shape[1], weight.shape[0])
    return _Packed(shape, packed, scales, None if symmetric else zero_points)


def _k_quant(weight: NDArray[Any], group: int) -> _Packed:
    """ONNX Runtime's k-quant on (in, out), some rows of the transpose at a time."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu  # noqa: PLC0415 - heavy

    rows, columns = weight.shape
    groups = -(-rows // group)
    parts = []
    for part in np.array_split(weight.T, max(1, -(-weight.size // _PART))):
        padded = np.pad(part, ((0, 0), (0, groups * group - rows)))
        with np.errstate(divide="ignore", invalid="ignore"):  # a group of equal numbers; its first guess stays
            parts.append(quant_tensor_k_quant_cpu(padded, 4, group))
    numbers, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    halves = numbers.astype(np.uint8).reshape(columns, groups, group)
    zeros = np.full((columns, groups + groups % 2), 8, dtype=np.uint8)
    zeros[:, :groups] = zero_points.reshape(columns, groups)
    return _Packed(
        (columns, rows),
        (halves[..., 0::2] | halves[..., 1::2] << 4).astype(np.uint8),
        scales.reshape(columns, groups).astype(weight.dtype),
        (zeros[:, 0::2] | zeros[:, 1::2] << 4).astype(np.uint8),
    )


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Undo what onnxruntime's quantizer does to logging when it is imported: it configures the whole process's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
