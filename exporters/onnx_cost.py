"""What an ONNX graph computes and reads, counted from the file: the bounds and shapes for a benchmark without a model.

A product counts when one factor is an initializer, directly or through Transpose and Cast. The scores of attention are
not counted (a cost of torch modules without a graph leaves them out too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from fxprune.channels.accounting import MacCount
from fxprune.core.errors import ExportError
from fxprune.measure.speed import Cost

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["OnnxCost", "cost_of_onnx"]

_PRODUCTS = {"MatMul", "Gemm", "MatMulNBits"}
_CARRIERS = {"Transpose", "Cast", "CastLike", "Identity"}


@dataclass(frozen=True)
class OnnxCost:
    """Counts of an ONNX graph.

    Attributes:
        cost: MACs a token, bytes of weights a step (tables that are only looked up left out), bytes of cache a token.
        shapes: (in, out) of every product with a weight besides the output projection, by the weight's name.
    """

    cost: Cost
    shapes: Mapping[str, tuple[int, int]]


def cost_of_onnx(path: str | Path) -> OnnxCost:
    """Count an ONNX graph; its weights are not read.

    Raises:
        ExportError: the file cannot be read as ONNX.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's and onnx_ir's exception types share no public base
        raise ExportError(f"{path} cannot be read as an ONNX graph: {error}") from error
    head = _head(graph)
    blocks, lm_head = 0, 0
    shapes: dict[str, tuple[int, int]] = {}
    uncounted: list[str] = []
    for node in graph:
        for name, shape in _weights(node):
            if len(shape) != 2:
                uncounted.append(name)
            elif node is head:
                lm_head += shape[0] * shape[1]
            else:
                blocks += shape[0] * shape[1]
                shapes[name] = (shape[0], shape[1])
    macs = MacCount(blocks, lm_head, uncounted=tuple(uncounted))
    return OnnxCost(Cost(macs, _weight_bytes(graph), _cache_bytes(graph)), shapes)


def _weights(node: ir.Node) -> Iterator[tuple[str, list[int]]]:
    """Name and shape, (..., in, out), of the initializers that a product multiplies with."""
    if node.op_type not in _PRODUCTS:
        return
    if node.op_type == "MatMulNBits":  # packed: its shape stands in attributes
        sizes = [node.attributes.get_int(name, 0) for name in ("K", "N")]
        yield str(node.inputs[1].name if node.inputs[1] else node.name), [int(size or 0) for size in sizes]
        return
    for position, value in enumerate(node.inputs[:2]):
        transposed = node.op_type == "Gemm" and position == 1 and bool(node.attributes.get_int("transB", 0))
        source = value
        while source is not None and (producer := source.producer()) is not None and producer.op_type in _CARRIERS:
            transposed ^= producer.op_type == "Transpose"
            source = producer.inputs[0]
        if source is not None and source.is_initializer() and source.shape is not None and len(source.shape) >= 2:
            shape = [int(size) for size in source.shape]  # type: ignore[arg-type]  # initializers have sizes
            yield str(source.name), [*shape[:-2], shape[-1], shape[-2]] if transposed else shape


def _head(graph: ir.Graph) -> ir.Node | None:
    """The product that the logits follow from, through operators on one value."""
    value = next((output for output in graph.outputs if output.name == "logits"), None)
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in _PRODUCTS:
            return producer
        value = producer.inputs[0] if producer.inputs else None
    return None


def _weight_bytes(graph: ir.Graph) -> int:
    read: dict[str, int] = {}
    for node in graph:
        for position, value in enumerate(node.inputs):
            # A packed table is looked up together with its scales and zero points.
            looked_up = node.op_type == "GatherBlockQuantized" or (node.op_type == "Gather" and position == 0)
            if value is not None and value.is_initializer() and value.const_value is not None and not looked_up:
                read[str(value.name)] = value.const_value.nbytes
    return sum(read.values())


def _cache_bytes(graph: ir.Graph) -> int:
    total = 0  # a type may have half a byte an element
    for value in graph.inputs:
        if str(value.name).startswith("past_key_values.") and value.shape is not None and value.dtype is not None:
            heads, size = value.shape[1], value.shape[3]
            if isinstance(heads, int) and isinstance(size, int):
                total += round(heads * size * value.dtype.itemsize)
    return total
