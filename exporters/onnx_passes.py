"""Passes over the ONNX IR after translation: few, targeted, each linear in the number of nodes.

In order: weights stored as MatMul wants them, Reshape targets as constants, equal computations merged, dead nodes
removed, residual additions fused with the norm that follows (ONNX Runtime's operator), names and dimensions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "EMPTY_AT_FIRST",
    "fold_weight_transposes",
    "fuse_skip_norms",
    "merge_equal_computations",
    "name_inputs_and_outputs",
    "rename_dimensions",
    "simplify_reshapes",
    "strip_metadata",
]


EMPTY_AT_FIRST = "past_sequence_length"
"""Name of the only length that may be 0."""


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old` reads `new`; a graph output keeps its place."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def fold_weight_transposes(model: ir.Model) -> int:
    """Store a weight that is only read transposed as (in, out), so that nothing transposes it at load or run time.

    A weight with another reader (a tied embedding) keeps its layout.

    Returns:
        How many weights were turned.
    """
    count = 0
    for weight in model.graph.initializers.values():
        users = [user for user, _ in weight.uses()]
        tensor = weight.const_value
        if not users or tensor is None or weight.is_graph_output() or len(tensor.shape) != 2:
            continue
        if not all(_turns_matrix(user) for user in users):
            continue
        rows, columns = tensor.shape.numpy()
        weight.const_value = ir.LazyTensor(
            _transposed(tensor), dtype=tensor.dtype, shape=ir.Shape([columns, rows]), name=weight.name
        )
        weight.shape = ir.Shape([columns, rows])
        for user in users:
            _replace(user.outputs[0], weight)
            model.graph.remove(user, safe=True)
        count += 1
    return count


def _turns_matrix(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]


def _transposed(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)


def simplify_reshapes(model: ir.Model) -> int:
    """Write Reshape targets as constants of copied (0), known and at most one open (-1) extents; drop idle Reshapes.

    torchlib computes each target from Shape, Gather and Concat nodes, which cost more than the Reshape itself.

    Returns:
        How many Reshapes were changed.
    """
    count = 0
    for node in list(model.graph):
        source, output = (node.inputs[0], node.outputs[0]) if node.op_type == "Reshape" else (None, None)
        if source is None or output is None or source.shape is None or output.shape is None:
            continue
        if _same(source.shape, output.shape) and not output.is_graph_output():
            _replace(output, source)
            model.graph.remove(node, safe=True)
            count += 1
            continue
        target = _constant_target(source.shape, output.shape)
        computed = node.inputs[1].producer() if node.inputs[1] is not None else None
        if target is None or computed is None or computed.op_type == "Constant":
            continue
        constant = ir.node("Constant", [], attributes={"value_ints": target})
        constant.outputs[0].dtype, constant.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(target)])
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)  # 0 copies
        count += 1
    return count


def _same(before: ir.Shape, after: ir.Shape) -> bool:
    return len(before) == len(after) and all(_equal(*pair) for pair in zip(before, after, strict=True))


def _equal(first: int | ir.SymbolicDim, second: int | ir.SymbolicDim) -> bool:
    if isinstance(first, int) or isinstance(second, int):
        return first == second
    return first.value is not None and first.value == second.value


def _constant_target(before: ir.Shape, after: ir.Shape) -> list[int] | None:
    if 0 in [size for size in after if isinstance(size, int)]:
        return None  # 0 means a copied extent
    target = [
        size if isinstance(size, int) else 0 if axis < len(before) and _equal(before[axis], size) else -1
        for axis, size in enumerate(after)
    ]
    # What is left open cannot be told from an empty tensor, and the past may be empty.
    may_be_empty = any(isinstance(size, ir.SymbolicDim) and size.value == EMPTY_AT_FIRST for size in before)
    return target if target.count(-1) <= (0 if may_be_empty else 1) else None


def merge_equal_computations(model: ir.Model) -> None:
    """Merge equal constants and equal computations (masks and shapes that every layer makes for itself)."""
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def fuse_skip_norms(model: ir.Model) -> int:
    """`Add` and `SimplifiedLayerNormalization` to `SkipSimplifiedLayerNormalization`, which also returns the sum.

    Returns:
        How many pairs were fused.
    """
    count = 0
    for norm in list(model.graph):
        if norm.op_type != "SimplifiedLayerNormalization":
            continue
        total, weight = norm.inputs[:2]
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add" or total is None or total.is_graph_output():
            continue
        shapes = [value.shape for value in add.inputs if value is not None]
        if any(shape is None or len(shape) != 3 for shape in shapes) or not _same(*shapes):  # type: ignore[arg-type]
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            attributes={"epsilon": norm.attributes["epsilon"].as_float()},
            domain="com.microsoft",
            num_outputs=4,
            name=norm.name,
        )
        for new, old in ((fused.outputs[0], norm.outputs[0]), (fused.outputs[3], total)):
            new.shape, new.type, new.name = old.shape, old.type, old.name
        for unused in fused.outputs[1:3]:
            unused.name = ""
        model.graph.insert_before(norm, fused)
        _replace(norm.outputs[0], fused.outputs[0])
        _replace(total, fused.outputs[3])
        model.graph.remove([norm, add], safe=True)
        count += 1
    if count:
        model.graph.opset_imports["com.microsoft"] = 1
        model.graph.sort()
    return count


def name_inputs_and_outputs(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the graph's inputs and outputs; an output that is an input, or appears twice, gets an Identity."""
    graph = model.graph
    taken = set(inputs) | set(outputs)
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_value"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    seen: set[ir.Value] = set()
    for index, name in enumerate(outputs):
        value = graph.outputs[index]
        if value.is_graph_input() or value.is_initializer() or value in seen:
            identity = ir.node("Identity", [value])
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.append(identity)
            graph.outputs[index] = value = identity.outputs[0]
        seen.add(value)
        value.name = name


def rename_dimensions(
    model: ir.Model, inputs: Mapping[str, Mapping[int, str]], outputs: Mapping[str, Mapping[int, str]]
) -> None:
    """Call the dynamic axes by the names that deployment tools bind.

    Args:
        model: the model; its inputs and outputs have their final names.
        inputs: for each input, its dynamic axes with their names. The symbols found there are renamed everywhere.
        outputs: for each output, axes that get a name of their own.
    """
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in inputs.get(value.name or "", {}).items():
            assert value.shape is not None
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                symbols.setdefault(dim.value, name)
            value.shape[axis] = name
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols) or r"(?!)")
    values = {value for node in model.graph for value in node.outputs}
    for value in values:
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = pattern.sub(lambda match: symbols[match.group()], dim.value)
    for value in model.graph.outputs:
        for axis, name in outputs.get(value.name or "", {}).items():
            if value.shape is not None and isinstance(value.shape[axis], ir.SymbolicDim):
                value.shape[axis] = name


def strip_metadata(model: ir.Model) -> None:
    """Remove what torch.onnx records for debugging: it is most of the file of a graph without its weights."""
    common.ClearMetadataAndDocStringPass()(model)
