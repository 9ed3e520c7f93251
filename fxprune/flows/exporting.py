"""What `fxprune export` and `fxprune verify` do: write a deployable form, prove it, and only then quantize it.

    float graph ──► verify (ONNX Runtime, onnxruntime-genai) ──► int4 ──► measured difference

The float graph lives in a temporary directory beside the output, which appears when all is done: an earlier output is
replaced by nothing that has not been verified.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import ExportError, UsageError
from fxprune.core.output import prepare_output, staged_directory, write_json
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.models.loading import resolve_dtype
from fxprune.models.methods import class_of_model, require_language_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from fxprune.core.program import Program

__all__ = ["ExportRequest", "export_program", "run_export", "run_verify"]


@dataclass(frozen=True)
class ExportRequest:
    """What to write.

    Attributes:
        out: directory for the export.
        to: `onnx`, or `genai` for onnxruntime-genai.
        opset: of the ONNX graph; the exporter's choice when None.
        fusions: see `fxprune.exporters.onnx`.
        dtype: precision of weights and cache; the checkpoint's own when None.
        int4: options of `export_int4` by name; None for no quantization.
        overwrite: whether an earlier output may be replaced.
    """

    out: Path
    to: Literal["onnx", "genai"] = "onnx"
    opset: int | None = None
    fusions: Literal["auto", "none", "cpu"] = "auto"
    dtype: str | None = None
    int4: Mapping[str, Any] | None = None
    overwrite: bool = False


def run_export(model: str, request: ExportRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Load, trace, export, verify and, if asked, quantize; what can be refused is refused before the model is loaded.

    Args:
        model: hub id or directory of a checkpoint, slim or dense.
        request: what to write.
        say: gets progress messages.

    Returns:
        For JSON: `onnx`, `verify`, `warnings` where there is something to know, and, with int4, `int4`.

    Raises:
        UsageError: an option is out of range.
        OutputError: the output directory cannot be used.
        ExportError: the runtime is not installed, has no kernels for the precision, or the graph cannot be exported.
        VerificationError: the exported form does not compute what the model does.
    """
    prepare_output(request.out, overwrite=request.overwrite, inputs=[model])
    if request.to == "genai":
        resolve("fxprune.exporters.genai:require_genai")()
    if request.int4 is not None:
        resolve("fxprune.exporters.int4:Int4Options")(**request.int4).check()
    asked = "--to genai" if request.to == "genai" else "--int4" if request.int4 is not None else None
    if asked is not None:
        require_language_model(asked, *class_of_model(model), otherwise="export it to onnx in floating point")
    dtype = resolve_dtype(request.dtype)
    if dtype is not None:
        _require_precision(dtype)
    loaded = load_model(model, dtype=dtype)
    _require_precision(loaded.model.dtype)
    say("tracing")
    program = export_program(front_end(loaded, Stopwatch()), request, say)
    return {name: program.results[name] for name in ("onnx", "verify", "warnings", "int4") if name in program.results}


def _require_precision(dtype: torch.dtype) -> None:
    resolve("fxprune.exporters.ort_types:require_precision")(dtype)


def export_program(program: Program, request: ExportRequest, say: Callable[[str], None]) -> Program:
    """Export a program, verify the float graph, and quantize it if asked; see `run_export`.

    Args:
        program: traced and lifted, dense or slim, with its references.
        request: what to write.
        say: gets the names of the passes.

    Returns:
        The program with `results["onnx"]`, `results["verify"]` and, with int4, `results["int4"]`.
    """
    inputs = [] if program.source is None else [program.source.path]
    target = prepare_output(request.out, overwrite=request.overwrite, inputs=inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.float-", dir=target.parent) as scratch:
        plain = Path(scratch) / "float"
        program = _verified(program, plain, request, say)
        if request.int4 is None:
            return _put(program, plain, target, overwrite=request.overwrite)
        options = {"onnx": str(plain), "out": str(target), "overwrite": request.overwrite, **request.int4}
        say("export_int4")
        return build_pass("export_int4", options)(program).program


def _put(program: Program, verified: Path, target: Path, *, overwrite: bool) -> Program:
    """Move a verified export to its place, its certificate in `export.json`."""
    path = verified / "export.json"
    proved = {name: program.results[name] for name in ("verify", "warnings") if name in program.results}
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **proved})
    with staged_directory(target, overwrite=overwrite) as staging:
        for file in verified.iterdir():
            file.rename(staging / file.name)
    onnx = program.results["onnx"]
    return program.with_results(onnx={**onnx, "path": str(target / Path(onnx["path"]).name)})


def _verified(program: Program, out: Path, request: ExportRequest, say: Callable[[str], None]) -> Program:
    options = {
        "out": str(out),
        "opset": request.opset,
        "fusions": request.fusions,
        "to": request.to,
        "overwrite": request.overwrite,
    }
    rungs: dict[str, Any] = {"onnx": str(out / "model.onnx"), "reexport": False}
    if request.to == "genai":
        rungs["genai"] = str(out)
    passes = [build_pass("export_onnx", options), build_pass("verify", rungs)]
    return Pipeline(passes, on_pass=lambda step: say(step.name))(program).program


def run_verify(model: str, onnx: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Climb the ladder for a checkpoint and, if given, its export; an int4 export is measured, not asked to be equal.

    Args:
        model: hub id or directory of a checkpoint.
        onnx: directory or file of its export.
        say: gets progress messages.

    Returns:
        For JSON: `verify`, `warnings` as of `run_export` and, for an int4 export, `int4` with the measured
        `difference`. Whether it is one is seen from the graph; made for onnxruntime-genai, it must make the same text
        there as in ONNX Runtime.

    Raises:
        ExportError: there is no such export, or it cannot be run.
        VerificationError: a rung does not hold.
    """
    graph = None if onnx is None else resolve("fxprune.exporters.onnx_files:graph_file")(onnx)
    described = {} if graph is None else _description(graph.with_name("export.json"))
    quantized = graph is not None and resolve("fxprune.exporters.int4:is_quantized")(graph)
    loaded = load_model(model, dtype=described.get("dtype"))
    say("tracing")
    program = front_end(loaded, Stopwatch())
    options: dict[str, Any] = {}
    if graph is not None and not quantized:
        options["onnx"] = str(graph)
        if described.get("target") == "genai":
            options["genai"] = str(graph.parent)
    program = build_pass("verify", options)(program).program
    data: dict[str, Any] = {name: program.results[name] for name in ("verify", "warnings") if name in program.results}
    if graph is not None and quantized:
        measure = resolve("fxprune.passes.export_int4:difference_of")
        data["int4"] = {"difference": measure(program, graph).to_json()}
        if described.get("target") == "genai":
            same = resolve("fxprune.passes.export_int4:same_in_genai")
            data["verify"] = [*data["verify"], same(graph, program).to_json()]
    return data


def _description(path: Path) -> dict[str, Any]:
    """What an export says about itself; nothing if it does not."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON ({error}); export again") from error
    if not isinstance(data, dict) or not isinstance(data.get("dtype"), str | None):
        raise ExportError(f"{path} does not describe an export; export again")
    try:
        resolve_dtype(data.get("dtype"))
    except UsageError as error:
        raise ExportError(f"{path}: {error}; export again") from error
    return data
