"""What ONNX Runtime's execution providers can compute in which precision, asked of the installed runtime itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import torch
from onnx import TensorProto, helper

from fxprune.core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["require_precision", "unsupported_operators"]

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
_PROBES = (("Gather", 1), ("MatMul", 2), ("Add", 2), ("Mul", 2), ("Softmax", 1), ("Sigmoid", 1), ("ReduceMean", 1))
"""Operators that every decoder has, with their number of floating point inputs."""


def unsupported_operators(dtype: torch.dtype, providers: Sequence[str] = ("CPUExecutionProvider",)) -> tuple[str, ...]:
    """Operators of a decoder that no given provider can run in a precision: one-node graphs are loaded to find out.

    Args:
        dtype: float32, float16 or bfloat16.
        providers: execution providers, best first.
    """
    return tuple(name for name, inputs in _PROBES if not _loads(name, inputs, _TYPES[dtype], providers))


def _loads(operator: str, inputs: int, element: int, providers: Sequence[str]) -> bool:
    import onnxruntime  # noqa: PLC0415 - heavy

    names = ["a", "b"][:inputs]
    given = [helper.make_tensor_value_info(name, element, [2, 2]) for name in names]
    if operator == "Gather":
        names.append("rows")
        given.append(helper.make_tensor_value_info("rows", TensorProto.INT64, [2]))
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"])], "probe", given, [helper.make_tensor_value_info("y", element, None)]
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exception types share no public base
        if "NOT_IMPLEMENTED" not in str(error):
            raise ExportError(f"onnxruntime cannot be asked about {operator}: {error}") from error
        return False
    return True


def require_precision(dtype: torch.dtype, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
    """Refuse a precision that the providers have no kernels for.

    Raises:
        ExportError: an operator that every decoder has cannot run in it; the message names them all.
    """
    name = str(dtype).removeprefix("torch.")
    where = ", ".join(providers)
    if dtype not in _TYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _TYPES)
        raise ExportError(f"{name} graphs are not exported; choose --dtype {known}")
    lacking = unsupported_operators(dtype, providers)
    if lacking:
        raise ExportError(
            f"{where} has no {name} kernels for {', '.join(lacking)}; export with --dtype float32 or --dtype float16"
        )
