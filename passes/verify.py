"""Verification as a pass: climbs the ladder, fails the pipeline at the first rung that does not hold.

    eager ── traced ── lifted ── masked ── slim ── re-exported
                                            ├───── reloaded checkpoint
                                            ├───── ONNX Runtime
                                            └───── onnxruntime-genai (its text, and its tokenizer)

A rung that fails names the first module whose output differs. Nothing is deleted and nothing is repaired.

Refused:
 1. a program without the original model (nothing to compare with).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import GraphModule

from fxprune.calibration.overflow import described, find_overflow
from fxprune.core.errors import NotFiniteError, PreconditionError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.verification.deployed import DeployedForms
from fxprune.verification.language_model import LanguageModelLadder
from fxprune.verification.plain import climb_plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fxprune.core.program import Program
    from fxprune.verification.ladder import Rung

__all__ = ["Verify"]


class Verify(Pass):
    """Climb the ladder over every form of the model there is (see the module's docstring).

    Args:
        checkpoint: directory of a saved checkpoint to reload and compare.
        onnx: an exported ONNX file to run and compare.
        genai: a directory exported for onnxruntime-genai whose text is compared.
        reexport: whether to export the slim graph again with torch.export and compare.
        graph: whether to compare the graph forms (eager to slim); switch off to check files only.
    """

    name = "verify"

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        onnx: Path | str | None = None,
        genai: Path | str | None = None,
        reexport: bool = True,
        graph: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.onnx = onnx
        self.genai = genai
        self.reexport = reexport
        self.graph = graph

    def requires(self, program: Program) -> None:
        """The original model is at hand.

        Raises:
            PreconditionError: it is not.
        """
        if "eager" not in program.references:
            raise PreconditionError("verify compares with the original model: start from fxprune.trace(model)")

    def call(self, program: Program) -> PassResult:
        """Compare, rung by rung; the certificate is left in `results["verify"]`, what to know in `results["warnings"]`.

        Raises:
            VerificationError: a rung does not hold.
        """
        causal = program.interface.causal and {*program.interface.inputs} <= _TEXT | _caches(program)
        rungs, warnings = self._language_model(program) if causal else (self._plain(program), [])
        certificate = [rung.to_json() for rung in rungs]
        changed = program.with_results(verify=[*program.results.get("verify", []), *certificate])
        if warnings:
            changed = changed.with_results(warnings=[*program.results.get("warnings", []), *warnings])
        return PassResult(changed, modified=True, details={"rungs": len(rungs)})

    def _language_model(self, program: Program) -> tuple[list[Rung], list[str]]:
        ladder = LanguageModelLadder(program, lambda tokens: _name_overflow(program, tokens))
        rungs = ladder.climb(reexport=self.reexport) if self.graph else []
        if self.checkpoint is None and self.onnx is None and self.genai is None:
            return rungs, ladder.warnings
        deployed = DeployedForms(ladder)
        rungs += deployed.climb(checkpoint=self.checkpoint, onnx=self.onnx, genai=self.genai)
        return rungs, ladder.warnings

    def _plain(self, program: Program) -> list[Rung]:
        return climb_plain(
            program, graph=self.graph, reexport=self.reexport, checkpoint=self.checkpoint, onnx=self.onnx
        )


_TEXT = {"input_ids", "attention_mask", "position_ids"}
"""What text gives; a language model that takes more is compared on its example inputs."""


def _caches(program: Program) -> set[str]:
    return {entry.input for entry in program.interface.cache}


def _name_overflow(program: Program, tokens: Tensor) -> None:
    """Say which module of the dense model gives what is not finite, if one does.

    Raises:
        NotFiniteError: one does.
    """
    lifted = program.references.get("lifted")
    if lifted is not None and isinstance(lifted.module, GraphModule):
        dense = program.replace(graph_module=lifted.module, interface=lifted.interface)
        found = find_overflow(dense, tokens)
        if found is not None:
            raise NotFiniteError(described(found, "the text that verify runs"))
