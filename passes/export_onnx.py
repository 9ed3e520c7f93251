"""Writes the program as one ONNX graph for prefill, continuation and decode.

    Program ──► re-export ──► ONNX ──► fusions ──► model.onnx  (+ export.json, tokenizer, genai_config.json)

Refused:
 1. an output directory that is not empty, unless `overwrite`, and the directory that the model came from;
 2. masks that are not slimmed yet;
 3. for onnxruntime-genai, a program that is no causal language model with a cache.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxprune.core.errors import PreconditionError
from fxprune.core.output import prepare_output, staged_directory, write_json
from fxprune.core.pass_base import Pass, PassResult
from fxprune.exporters.genai import require_end_of_text, write_genai_config
from fxprune.exporters.onnx import export_onnx, onnx_refusal
from fxprune.models.manifest import versions
from fxprune.models.model_class import is_language_model
from fxprune.tracing.masks import has_masks

if TYPE_CHECKING:
    from fxprune.core.program import Program

__all__ = ["ExportOnnx"]


class ExportOnnx(Pass):
    """Export to ONNX (see the module's docstring).

    Args:
        out: directory to write `model.onnx` to; it appears whole or not at all.
        opset: ONNX opset; the exporter's choice when None.
        fusions: ONNX Runtime fusions, see `fxprune.exporters.onnx`.
        to: `onnx`, or `genai` for what onnxruntime-genai needs beside the graph.
        overwrite: whether an earlier output may be replaced.
    """

    name = "export_onnx"

    def __init__(
        self,
        *,
        out: Path | str,
        opset: int | None = None,
        fusions: Literal["auto", "none", "cpu"] = "auto",
        to: Literal["onnx", "genai"] = "onnx",
        overwrite: bool = False,
    ) -> None:
        self.out = str(out)
        self.opset = opset
        self.fusions = fusions
        self.to = to
        self.overwrite = overwrite

    def precheck(self, program: Program, pruning: Pass | None = None) -> Program:
        """The target suits the model, and the directory can be used.

        Raises:
            PreconditionError: refusal 3.
            OutputError: refusal 1.
            ExportError: the target needs an end-of-text token, and the model names none.
        """
        del pruning
        self._prepare(program)
        return program

    def _prepare(self, program: Program) -> None:
        if reason := onnx_refusal(program, genai=self.to == "genai"):
            raise PreconditionError(reason)
        if self.to == "genai" and program.source is not None:
            require_end_of_text(program.source)
        inputs = [] if program.source is None else [program.source.path]
        prepare_output(self.out, overwrite=self.overwrite, inputs=inputs)

    def requires(self, program: Program) -> None:
        """No mask is left, and the directory can be used.

        Raises:
            PreconditionError: refusals 2 and 3.
            OutputError: refusal 1.
        """
        if has_masks(program.graph_module):
            raise PreconditionError("export_onnx writes slim models: run slim first, masks are still in the graph")
        self._prepare(program)

    def call(self, program: Program) -> PassResult:
        """Export; the path and the seconds of each stage are left in `results["onnx"]`."""
        with staged_directory(self.out, overwrite=self.overwrite) as staging:
            export = export_onnx(program, staging, opset=self.opset, fusions=self.fusions)
            if program.source is not None and program.source.tokenizer is not None:
                program.source.tokenizer.save_pretrained(staging)
            if self.to == "genai" and program.source is not None:
                write_genai_config(staging, program.source)
            details = {**asdict(export), "path": str(Path(self.out) / Path(export.path).name)}
            write_json(staging / "export.json", self._description(program, details))
        return PassResult(program.with_results(onnx=details), modified=True, details=details)

    def _description(self, program: Program, details: dict[str, Any]) -> dict[str, Any]:
        """What `export.json` says; the certificate follows when the graph has been verified."""
        weights = program.graph_module.parameters()
        dtype = next((str(t.dtype).removeprefix("torch.") for t in weights if t.is_floating_point()), None)
        onnx = {key: value for key, value in details.items() if key != "path"}
        source = program.source
        return {
            "schema_version": 1,
            "model": None if source is None else source.name,
            "model_class": None if source is None else source.model_class.__name__,
            "language_model": source is None or is_language_model(source.model_class, source.config),
            "target": self.to,
            "dtype": dtype,
            "onnx": onnx,
            "versions": versions(),
        }
