"""The commands about deployable forms: `fxprune export` and `fxprune verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxprune.cli import common
from fxprune.cli.common import Json, Model, say, tell, write_json
from fxprune.core.errors import UsageError

__all__ = ["export", "verify"]


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for model.onnx and what belongs beside it.")],
    to: Annotated[
        Literal["onnx", "genai"], typer.Option(help="Target: an ONNX graph, or all that onnxruntime-genai needs.")
    ] = "onnx",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the exporter's choice by default.")] = None,
    fusions: Annotated[Literal["auto", "none", "cpu"], typer.Option(help="ONNX Runtime fusions.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Precision of weights and cache, float32 or float16; as saved by default.")
    ] = None,
    int4: Annotated[bool, typer.Option("--int4", help="Quantize the verified graph's weights to 4 bits.")] = False,
    int4_method: Annotated[
        Literal["rtn", "k-quant"] | None, typer.Option(help="int4: round to nearest (default), or k-quant.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="int4: weights that share a scale, 16 to 256; 32.")] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="int4: without zero points (default of rtn), or with."),
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="int4: precision of the products: 4 int8 (default), 1 float32, 0 the runtime's.")
    ] = None,
    int4_lm_head: Annotated[
        bool | None, typer.Option("--int4-lm-head/--float-lm-head", help="int4: the output projection too (default).")
    ] = None,
    int4_embeddings: Annotated[
        bool | None, typer.Option("--int4-embeddings/--float-embeddings", help="int4: the token embedding too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    json: Json = None,
) -> None:
    """Export a checkpoint (slim, mixed, or any other) to one ONNX graph, and verify it in the runtimes it is for."""
    from fxprune.flows.exporting import ExportRequest, run_export

    given = {
        "method": int4_method,
        "group_size": group_size,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "lm_head": int4_lm_head,
        "embeddings": int4_embeddings,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if options and not int4:
        raise UsageError(f"{', '.join(options)}: these are options of int4; give --int4 as well")
    request = ExportRequest(out, to, opset, fusions, dtype, options if int4 else None, overwrite)
    _show(run_export(model, request, say), json)


def verify(
    model: Model,
    onnx: Annotated[Path | None, typer.Argument(help="Directory or file of its ONNX export.")] = None,
    json: Json = None,
) -> None:
    """Check that a checkpoint's graph forms, and its ONNX export, all compute the same."""
    from fxprune.flows.exporting import run_verify

    _show(run_verify(model, onnx, say), json)


def _show(data: dict[str, Any], json: Path | None) -> None:
    from fxprune.cli.tables import show_rungs
    from fxprune.verification.approximation import Difference

    show_rungs(data["verify"], common.out)
    int4 = data.get("int4")
    if int4 is not None:
        if "weights" in int4:
            smaller = f"{int4['float_bytes'] / 1e6:.1f} MB to {int4['bytes'] / 1e6:.1f} MB"
            tell(f"int4: {len(int4['weights'])} weights quantized, {smaller}")
            for name, reason in int4["kept"].items():
                tell(f"in float: {name}: {reason}")
        tell(Difference(**int4["difference"]).describe())
    for text in data.get("warnings", []):
        say(f"warning: {text}")
    write_json(json, data)
