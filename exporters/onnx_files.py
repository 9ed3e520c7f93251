"""ONNX files on disk: whether their weights are there, reading them lazily, writing them with external data."""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from fxprune.core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_external_data", "graph_file", "has_no_language_model", "read_graph", "write_graph"]

GRAPH = "model.onnx"
PROTOBUF_LIMIT = 2**31 - 2**24
"""A protobuf file ends at 2 GiB; 16 MiB are left for the graph itself."""


def graph_file(where: str | Path) -> Path:
    """The graph of an ONNX directory, or the file itself.

    Raises:
        ExportError: there is none.
    """
    path = Path(where).expanduser()
    path = path if path.suffix == ".onnx" else path / GRAPH
    if not path.is_file():
        raise ExportError(f"no ONNX file at {path}; name a directory that `fxprune export` wrote")
    return path


def has_no_language_model(path: Path) -> bool:
    """Whether the description beside a graph says that no language model was exported; False where it says nothing.

    Raises:
        ExportError: the description is damaged.
    """
    described = path.with_name("export.json")
    if not described.is_file():
        return False
    try:
        data = json.loads(described.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"{described} cannot be read as JSON ({error}); export again") from error
    return isinstance(data, dict) and data.get("language_model") is False


def check_external_data(path: Path) -> tuple[str, ...]:
    """Check that the files which hold the weights of a graph are beside it, and long enough.

    Args:
        path: the `.onnx` file.

    Returns:
        Names of the files beside it; none if the graph holds its weights itself.

    Raises:
        ExportError: the graph cannot be read, a file of weights is missing or too short, or its place is outside the
            graph's directory.
    """
    names: dict[str, None] = {}
    for tensor, location, end in _references(path):
        place = PurePosixPath(location)
        if not location or place.is_absolute() or ".." in place.parts:
            raise ExportError(f"{path}: the weights of {tensor} are said to be in {location!r}, outside its directory")
        file = path.parent / place
        if not file.is_file():
            raise ExportError(
                f"{path}: the file {location} with the weights of {tensor} is missing; its weights file belongs beside "
                "it, move the two together or export again"
            )
        if file.stat().st_size < end:
            raise ExportError(
                f"{file} is cut off: it has {file.stat().st_size:,} bytes, and the weights of {tensor} end at {end:,}; "
                "copy it again or export again"
            )
        names[location] = None
    return tuple(names)


def _references(path: Path) -> Iterator[tuple[str, str, int]]:
    """Name, file and last byte of every tensor that lies in another file."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and onnx's errors share no base
        raise ExportError(f"{path} cannot be read as an ONNX graph: {_first_line(error)}; export it again") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            try:
                size = ir.DataType(tensor.data_type).bitwidth * math.prod(tensor.dims) // 8
                end = int(facts.get("offset") or 0) + int(facts.get("length") or size)
            except (ValueError, TypeError, KeyError) as error:
                raise ExportError(f"{path}: where the weights of {tensor.name} are cannot be read: {error}") from error
            yield tensor.name, facts.get("location", ""), end


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, constants in nodes, those of subgraphs and functions."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        else:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                graphs += [attribute.g, *attribute.graphs]


def read_graph(path: Path) -> ir.Model:
    """Read a graph; its weights stay on disk until they are used.

    Raises:
        ExportError: see `check_external_data`.
    """
    check_external_data(path)
    try:
        return ir.load(path)
    except Exception as error:  # onnx_ir raises many types on a damaged file
        raise ExportError(f"{path} cannot be read as an ONNX graph: {_first_line(error)}; export it again") from error


def write_graph(model: ir.Model, path: Path, external_data: bool | None = None) -> str | None:
    """Write a graph, with `NAME.data` beside it for its weights if they need a file of their own.

    Args:
        model: the graph.
        path: the `.onnx` file.
        external_data: whether the weights go to their own file; None does so when they exceed protobuf's 2 GiB.

    Returns:
        Name of the weights file, or None.

    Raises:
        ExportError: the weights do not fit into the graph's file.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    too_large = size > PROTOBUF_LIMIT
    if external_data is False and too_large:
        raise ExportError(
            f"the weights ({size / 2**30:.1f} GiB) do not fit into {path}, which ends at 2 GiB; "
            "leave external_data unset"
        )
    if not (too_large if external_data is None else external_data):
        ir.save(model, path)
        return None
    data = f"{path.name}.data"
    ir.save(model, path, external_data=data)
    return data


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
