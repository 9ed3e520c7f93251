"""ONNX: one graph that serves prefill, continuation and decode.

The way of a program: FX rewrites (`onnx_graph`), a fresh `torch.export` so that shapes are right by construction,
translation by `torch.onnx.export`, then a few passes over the ONNX IR (`onnx_passes`). The general optimizer, which
takes most of the stock exporter's time, does not run.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from fxprune.core.errors import ExportError
from fxprune.exporters import onnx_passes
from fxprune.exporters.onnx_files import write_graph
from fxprune.exporters.onnx_graph import prepare_graph
from fxprune.exporters.onnx_ops import translation_table
from fxprune.tracing.nodes import module_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from fxprune.core.program import Interface, Program

__all__ = ["Fusions", "OnnxExport", "export_onnx", "onnx_refusal"]

Fusions = Literal["auto", "none", "cpu"]

_DEFAULT_OPSET = 20
_MOST_SAID = 120
"""Characters of a library's own words in a message; all of them are in its cause."""
_OPSETS = range(18, 23)
"""torchlib starts at 18; from 23 on, ONNX Runtime's CPU provider fails for batches of more than one."""


@dataclass(frozen=True)
class OnnxExport:
    """What an export wrote and how long it took.

    Attributes:
        path: the `.onnx` file.
        opset: version of the standard operator set.
        seconds: wall time by stage: `prepare`, `re_export`, `convert`, `passes`, `save`.
        bytes: size of the graph file and of its external data, if any.
        fusions: `"cpu"` or `"none"`, what was used.
        rewrites: how many times each rewrite was applied.
        external_data: name of the file beside it that has the weights; None if they are in the graph file.
    """

    path: Path
    opset: int
    seconds: Mapping[str, float]
    bytes: int
    fusions: str
    rewrites: Mapping[str, int] = field(default_factory=dict)
    external_data: str | None = None


def export_onnx(
    program: Program,
    directory: str | Path,
    *,
    opset: int | None = None,
    fusions: Fusions = "auto",
    external_data: bool | None = None,
) -> OnnxExport:
    """Write `model.onnx`, a graph for any batch, any number of new tokens and any length of the cache, 0 included.

    Inputs are named as in the interface, with the cache as `past_key_values.N.key` and `.value` and its outputs as
    `present.N.key` and `.value`; dynamic axes are `batch_size`, `sequence_length`, `past_sequence_length` and
    `total_sequence_length`; initializers have the names of their parameters. Positions that the mask hides from every
    token (padding) give finite numbers without meaning.

    Args:
        program: a program with a flat graph, dense or slim.
        directory: where the file goes; made if it does not exist.
        opset: version of the standard operator set, 18 to 22; 20 when None.
        fusions: `"none"` writes standard ONNX operators only. `"cpu"` uses ONNX Runtime's RotaryEmbedding,
            SimplifiedLayerNormalization and SkipSimplifiedLayerNormalization. `"auto"` is `"cpu"`, by measurement: on a
            135M-parameter Llama with 2 threads it takes as long as `"none"` for a prefill of 512 tokens and 13 to 15 %
            less for each decoded token, where the time goes to launching many small operators. GroupQueryAttention is
            not used: on the CPU it takes several tokens after a past for batch 1 only.
        external_data: put the weights into `model.onnx.data`; None does so when they exceed protobuf's 2 GiB.

    Returns:
        What was written, with the time of each stage.

    Raises:
        ExportError: an option is out of range, an axis that must be dynamic is not, an operator has no translation,
            or the parameters have no values.
    """
    if reason := onnx_refusal(program):
        raise ExportError(reason)
    fusions_used, opset = _options(fusions, opset)
    directory = Path(directory)
    timer = _Timer()
    _check_parameters(program.graph_module)
    prepared, rewrites = prepare_graph(program.graph_module, program.interface.example_inputs)
    timer.mark("prepare")
    exported = _re_export(prepared, program.interface)
    timer.mark("re_export")
    contrib = fusions_used == "cpu"
    model = _convert(exported, prepared, program.interface, opset, contrib=contrib)
    timer.mark("convert")
    rewrites |= _finish(model, program.interface, contrib=contrib)
    timer.mark("passes")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    data = write_graph(model, path, external_data)
    timer.mark("save")
    size = path.stat().st_size + (path.with_name(data).stat().st_size if data else 0)
    return OnnxExport(path, opset, timer.seconds, size, fusions_used, rewrites, data)


def onnx_refusal(program: Program, *, genai: bool = False) -> str:
    """Why a program cannot be exported, as far as its interface says; empty if nothing stands in the way.

    It costs nothing, so that it can be asked before a calibration.

    Args:
        program: with a flat graph, dense or slim; the interface is what counts.
        genai: whether the graph is for onnxruntime-genai, which continues on a cache of keys and values.
    """
    name = program.source.name if program.source is not None else "the model"
    length = program.interface.fixed_length
    if length is not None:
        return (
            f"{name} cannot be exported to ONNX: its code loops over tokens or chunks of them, or takes another path "
            f"for other lengths, so that its graph holds for sequences of {length} tokens only; use the checkpoint "
            "with transformers"
        )
    if genai and (program.source is None or not program.interface.cache):
        what = "has no cache of keys and values in its graph" if program.interface.causal else "is none"
        return f"onnxruntime-genai runs causal language models with a cache, and {name} {what}; export to onnx instead"
    return ""


class _Timer:
    """Wall time between marks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def _options(fusions: str, opset: int | None) -> tuple[str, int]:
    if fusions not in get_args(Fusions):
        raise ExportError(f"fusions={fusions!r} is unknown; choose one of {', '.join(get_args(Fusions))}")
    opset = _DEFAULT_OPSET if opset is None else opset
    if opset not in _OPSETS:
        raise ExportError(f"opset={opset} is not supported; choose {_OPSETS[0]} to {_OPSETS[-1]}")
    return ("cpu" if fusions == "auto" else fusions), opset


def _check_parameters(graph_module: GraphModule) -> None:
    for name, tensor in (*graph_module.named_parameters(), *graph_module.named_buffers()):
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device and has no values; load the weights before exporting")


# ── Re-export and conversion ──────────────────────────────────────────────────────────────────────────────────────


def _re_export(graph_module: GraphModule, interface: Interface) -> ExportedProgram:
    """Export the flat graph again; every axis that the interface calls dynamic must come out dynamic."""
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(_dynamic_axes(interface, name), auto) for name in interface.inputs)
    examples = tuple(interface.example_inputs.values())
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(graph_module, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises dozens of types; the cause stays attached
        raise ExportError(
            f"torch.export could not trace the graph again: {type(error).__name__}: {error}\n"
            "Check that the graph module runs on its interface's example inputs."
        ) from error
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    for given, traced in zip(interface.inputs, names, strict=True):
        for axis in _dynamic_axes(interface, given):
            size = values[str(traced)].shape[axis]
            if is_concrete_int(size):
                raise ExportError(
                    f"axis {axis} of input {given!r} was fixed at {size} by the graph; an operator bakes this length "
                    "in, so the ONNX graph would serve no other"
                )
    return exported


def _dynamic_axes(interface: Interface, name: str) -> dict[int, str]:
    """The axes of an input whose length may change, with their symbols; a symbol that is a number is a fixed length."""
    axes = interface.dynamic_axes.get(name, {})
    return {axis: symbol for axis, symbol in axes.items() if not symbol.isdigit()}


def _convert(
    exported: ExportedProgram, prepared: GraphModule, interface: Interface, opset: int, *, contrib: bool
) -> ir.Model:
    """Translate to ONNX, first without retracing; with it if an operator has no translation of its own."""
    table = {**_transformers_translations(), **translation_table(contrib=contrib)}
    try:
        return _translate(_without_retrace(exported), opset, table)
    except torch.onnx.OnnxExporterError:
        exported = _re_export(prepared, interface)  # the first attempt may have changed its graph
    try:
        return _translate(exported, opset, table)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_untranslated(error, exported)) from error


_FAILED_NODE = re.compile(r"translating node %(\w+) : .*?\[target=(?:torch\.ops\.)?([\w.]+)\]")


def _untranslated(error: BaseException, exported: ExportedProgram) -> str:
    """What torch.onnx could not translate, where it comes from, and what to do, in a sentence.

    Args:
        error: what torch.onnx raised; the operator is named by one of its causes.
        exported: the graph that it was given.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    found = next((match for each in chain if (match := _FAILED_NODE.search(str(each)))), None)
    if found is None:
        said = " ".join(str(chain[-1]).split())[:_MOST_SAID]
        return f"torch.onnx could not translate the graph ({said}); use the checkpoint with transformers"
    name, operator = found.groups()
    # A part of a decomposed operator has a name of its own: any use of the operator tells where it comes from.
    nodes = list(exported.graph.nodes)
    alike = [node for node in nodes if node.name == name] or [node for node in nodes if operator in str(node.target)]
    where = f" in {module}" if alike and (module := module_of(alike[0])) else ""
    said = "" if type(chain[-1]).__name__ == "DispatchError" else f" ({' '.join(str(chain[-1]).split())[:_MOST_SAID]})"
    return (
        f"torch.onnx has no translation for {operator}{where}{said}; use the checkpoint with transformers, or give the "
        "operator one in fxprune.exporters.onnx_ops.translation_table"
    )


def _translate(exported: ExportedProgram, opset: int, table: Mapping[Any, Any]) -> ir.Model:
    _fix_nodes(exported.graph_module)
    with _quiet():
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            custom_translation_table=dict(table),
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    return model


def _without_retrace(exported: ExportedProgram) -> ExportedProgram:
    """Let `run_decompositions` return the program itself where there is nothing to decompose.

    torch.onnx always calls it, with a table of the operators that have no translation, and it retraces the whole graph
    even when none of them occurs: four fifths of the conversion's time.
    """
    decompose = exported.run_decompositions

    def run_decompositions(decomp_table: Any = None, **options: Any) -> ExportedProgram:
        table = decomp_table if decomp_table is not None else {}
        plain = len(list(exported.graph_module.modules())) == 1  # no subgraphs of control flow
        for node in exported.graph.nodes:
            if node.op == "call_function":
                schema = getattr(node.target, "_schema", None)
                mutable = schema is not None and schema.is_mutable
                plain = plain and node.target not in table and not mutable and "val" in node.meta
        return exported if plain else decompose(decomp_table, **options)

    exported.run_decompositions = run_decompositions
    return exported


def _transformers_translations() -> Mapping[Any, Any]:
    """Translations that transformers' own exporter adds for operators of its models (MoE routing, ...)."""
    try:
        from transformers.exporters import exporter_onnx  # noqa: PLC0415 - heavy
    except ImportError:
        return {}
    table: Mapping[Any, Any] = getattr(exporter_onnx, "_ONNX_TRANSLATION_TABLE", {})
    return table


def _fix_nodes(graph_module: GraphModule) -> None:
    """Apply the repairs that transformers' exporter makes to nodes which torchlib translates wrongly."""
    try:
        from transformers.exporters.utils import apply_fx_node_fixes  # noqa: PLC0415 - heavy
    except ImportError:
        return
    apply_fx_node_fixes("onnx", graph_module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx's remarks about its own registry and torch.export's about the module's state."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ── Names, passes and files ───────────────────────────────────────────────────────────────────────────────────────


def _finish(model: ir.Model, interface: Interface, *, contrib: bool) -> dict[str, int]:
    """Name everything as deployment tools expect, then simplify: the names tell which lengths are equal."""
    past = {entry.input: f"past_key_values.{entry.layer}.{entry.kind}" for entry in interface.cache}
    present = {entry.output: f"present.{entry.layer}.{entry.kind}" for entry in interface.cache}
    inputs = [past.get(name, name) for name in interface.inputs]
    outputs = [present.get(name, name) for name in interface.outputs]
    onnx_passes.name_inputs_and_outputs(model, inputs, outputs)
    axes = _axis_names(interface)
    onnx_passes.rename_dimensions(
        model,
        {past.get(name, name): named for name, named in axes.items()},
        {present[entry.output]: {2: "total_sequence_length"} for entry in interface.cache},
    )
    counts = {
        "weights_transposed": onnx_passes.fold_weight_transposes(model),
        "reshapes": onnx_passes.simplify_reshapes(model),
    }
    onnx_passes.merge_equal_computations(model)
    if contrib:
        counts["skip_norms"] = onnx_passes.fuse_skip_norms(model)
    onnx_passes.strip_metadata(model)
    model.producer_name = "fxprune"
    return counts


def _axis_names(interface: Interface) -> dict[str, dict[int, str]]:
    """The names of all dynamic axes, by input.

    The first axis is the batch. In the cache, the other one is the past; the mask of a model with a cache covers past
    and new tokens. The first length that is left is the sequence's; one of another symbol is named after its input.
    """
    cache = {entry.input for entry in interface.cache}
    lengths: dict[str, str] = {}
    names: dict[str, dict[int, str]] = {}
    for name in interface.inputs:
        names[name] = {}
        for axis, symbol in _dynamic_axes(interface, name).items():
            if axis == 0:
                chosen = "batch_size"
            elif name in cache:
                chosen = onnx_passes.EMPTY_AT_FIRST
            elif cache and name == "attention_mask":
                chosen = "total_sequence_length"
            else:
                chosen = lengths.setdefault(symbol, f"{name}_length" if lengths else "sequence_length")
            names[name][axis] = chosen
    return names
