"""Quantizes an exported graph to int4, and measures how far it is from the program.

    DIR/model.onnx (float, verified) ──► MatMulNBits ──► OUT/model.onnx  (+ all that was beside the float graph)

int4 is another function, so nothing is asked to be equal: the difference is measured and stated. What must hold is that
onnxruntime-genai, where the export is for it, makes the same text as ONNX Runtime does with the same int4 graph.

Refused:
 1. a directory without an exported graph;
 2. an output directory that is not empty, unless `overwrite`;
 3. a program without a cache, whose logits cannot be compared.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.core.errors import PreconditionError
from fxprune.core.output import prepare_output, staged_directory, write_json
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.registry import resolve
from fxprune.exporters.int4 import Int4Options, quantize_graph
from fxprune.exporters.onnx_files import check_external_data, graph_file
from fxprune.exporters.ort import OrtRunner
from fxprune.models.loading import max_positions
from fxprune.runtimes.runners import GraphRunner
from fxprune.verification.approximation import Difference, measure_difference
from fxprune.verification.text import same_text

if TYPE_CHECKING:
    from fxprune.core.program import Program
    from fxprune.verification.ladder import Rung

__all__ = ["ExportInt4", "difference_of", "same_in_genai"]


class ExportInt4(Pass):
    """Quantize an exported graph (see the module's docstring).

    Args:
        onnx: directory that `export_onnx` wrote.
        out: directory for the int4 graph; it appears whole or not at all.
        method: `rtn` or `k-quant`; for this and the following options see `fxprune.exporters.int4.Int4Options`.
        group_size: inputs that share a scale.
        symmetric: no zero points; the method's own choice when None.
        accuracy_level: precision of the products, 4 is int8.
        lm_head: quantize the projection to the vocabulary.
        embeddings: quantize the token embedding.
        samples: sequences, sampled from the program, that the difference is measured on.
        seq_len: tokens of each.
        seed: of the sampling.
        overwrite: whether an earlier output may be replaced.
    """

    name = "export_int4"

    def __init__(
        self,
        *,
        onnx: Path | str,
        out: Path | str,
        method: str = "rtn",
        group_size: int = 32,
        symmetric: bool | None = None,
        accuracy_level: int = 4,
        lm_head: bool = True,
        embeddings: bool = False,
        samples: int = 4,
        seq_len: int = 32,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.onnx, self.out = str(onnx), str(out)
        self.method: Any = method
        self.group_size = group_size
        self.symmetric = symmetric
        self.accuracy_level = accuracy_level
        self.lm_head = lm_head
        self.embeddings = embeddings
        self.samples = samples
        self.seq_len = seq_len
        self.seed = seed
        self.overwrite = overwrite

    def requires(self, program: Program) -> None:
        """The program has a cache, the options are legal, and the output directory can be used.

        Raises:
            PreconditionError: refusal 3.
            UsageError: an option is out of range.
            OutputError: refusal 2.
        """
        if not program.interface.cache or program.source is None:
            raise PreconditionError("export_int4 is for causal language models with a cache")
        self._how().check()
        prepare_output(self.out, overwrite=self.overwrite, inputs=[program.source.path, self.onnx])

    def _how(self) -> Int4Options:
        return Int4Options(
            self.method, self.group_size, self.symmetric, self.accuracy_level, self.lm_head, self.embeddings
        )

    def call(self, program: Program) -> PassResult:
        """Quantize and measure; what was done is left in `results["int4"]`, a rung for genai in `results["verify"]`.

        Raises:
            ExportError: refusal 1, or the graph has nothing to quantize.
            VerificationError: logits are not finite, or genai makes other text.
        """
        source = graph_file(self.onnx)
        data = check_external_data(source)
        rungs: list[Rung] = []
        with staged_directory(self.out, overwrite=self.overwrite) as staging:
            for file in source.parent.iterdir():
                if file.is_file() and file.name not in {source.name, *data}:
                    shutil.copy2(file, staging / file.name)
            done = quantize_graph(source, staging / source.name, self._how())
            difference = difference_of(program, done.path, samples=self.samples, seq_len=self.seq_len, seed=self.seed)
            if (staging / "genai_config.json").is_file():
                rungs.append(same_in_genai(done.path, program))
            details = _details(done, Path(self.out), difference.to_json(), float_bytes=_size(source, data))
            certificate = [*program.results.get("verify", []), *(rung.to_json() for rung in rungs)]
            _describe(staging / "export.json", details, certificate, program.results.get("warnings", []))
        changed = program.with_results(int4=details, verify=certificate)
        return PassResult(
            changed, modified=True, details={key: details[key] for key in ("path", "bytes", "difference")}
        )


def difference_of(program: Program, graph: Path, *, samples: int = 4, seq_len: int = 32, seed: int = 0) -> Difference:
    """Measure how far an int4 graph is from a program, on text sampled from the program itself.

    Args:
        program: with a cache and a source.
        graph: the `.onnx` file.
        samples: sequences to sample.
        seq_len: tokens of each.
        seed: of the sampling.

    Raises:
        VerificationError: the graph's logits are not finite.
    """
    assert program.source is not None
    config = program.source.config
    slim = GraphRunner(program.graph_module, program.interface, "slim")
    spec = CalibrationSpec("self", samples=samples, seq_len=min(seq_len, max_positions(config) or seq_len), seed=seed)
    device = program.interface.example_inputs["input_ids"].device
    text = calibration_set(spec, tokenizer=program.source.tokenizer, runner=slim, config=config, device=device).tokens
    return measure_difference("int4 - slim", slim, OrtRunner(graph, name="int4"), text.to(device))


def same_in_genai(graph: Path, program: Program) -> Rung:
    """The rung that must hold of an int4 graph for onnxruntime-genai: both runtimes make the same text with it.

    Args:
        graph: the `.onnx` file, `genai_config.json` beside it.
        program: for the device of the prompt.

    Raises:
        ExportError: a runtime cannot run the graph.
        VerificationError: the texts differ.
    """
    genai, runner = resolve("fxprune.exporters.genai:GenaiRunner")(graph.parent), OrtRunner(graph, name="int4")
    example = program.interface.example_inputs["input_ids"]
    prompt = torch.arange(5, 13, device=example.device).unsqueeze(0) % genai.vocabulary
    return same_text("greedy text of int4 in onnxruntime-genai = in ONNX Runtime", runner, genai, prompt).require()


def _size(graph: Path, data: tuple[str, ...]) -> int:
    return sum(file.stat().st_size for file in (graph, *(graph.with_name(name) for name in data)))


def _details(done: Any, out: Path, difference: dict[str, Any], *, float_bytes: int) -> dict[str, Any]:
    found = asdict(done)
    return {**found, "path": str(out / done.path.name), "float_bytes": float_bytes, "difference": difference}


def _describe(path: Path, details: dict[str, Any], certificate: list[dict[str, Any]], warnings: list[str]) -> None:
    """Say in `export.json` what was quantized and how far it is from the model."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    section = {key: value for key, value in details.items() if key != "path"}
    write_json(
        path, {**known, "int4": section, "verify": certificate} | ({"warnings": list(warnings)} if warnings else {})
    )
