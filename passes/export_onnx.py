"""Writes the program as one ONNX graph for prefill, continuation and decode.

    Program ──► re-export ──► ONNX ──► fusions ──► model.onnx  (+ config, tokenizer)

Refused:
 1. an output directory that is not empty, unless `overwrite`;
 2. masks that are not slimmed yet.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fxprune.errors import PreconditionError
from fxprune.exporters.onnx import export_onnx
from fxprune.masks import has_masks
from fxprune.output import prepare_output, staged_directory
from fxprune.pass_base import Pass, PassResult

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["ExportOnnx"]


class ExportOnnx(Pass):
    """Export to ONNX (see the module's docstring).

    Args:
        out: directory to write `model.onnx` to; it appears whole or not at all.
        opset: ONNX opset; the exporter's choice when None.
        fusions: ONNX Runtime fusions, see `fxprune.exporters.onnx`.
        overwrite: whether an earlier output may be replaced.
    """

    name = "export_onnx"

    def __init__(
        self,
        *,
        out: Path | str,
        opset: int | None = None,
        fusions: Literal["auto", "none", "cpu"] = "auto",
        overwrite: bool = False,
    ) -> None:
        self.out = str(out)
        self.opset = opset
        self.fusions = fusions
        self.overwrite = overwrite

    def requires(self, program: Program) -> None:
        """No mask is left, and the directory can be used.

        Raises:
            PreconditionError: refusal 2.
            OutputError: refusal 1.
        """
        if has_masks(program.graph_module):
            raise PreconditionError("export_onnx writes slim models: run slim first, masks are still in the graph")
        prepare_output(self.out, overwrite=self.overwrite)

    def call(self, program: Program) -> PassResult:
        """Export; the path and the seconds of each stage are left in `results["onnx"]`."""
        with staged_directory(self.out, overwrite=self.overwrite) as staging:
            export = export_onnx(program, staging, opset=self.opset, fusions=self.fusions)
            if program.source is not None and program.source.tokenizer is not None:
                program.source.tokenizer.save_pretrained(staging)
        details = {**asdict(export), "path": str(Path(self.out) / Path(export.path).name)}
        return PassResult(program.with_results(onnx=details), modified=True, details=details)
