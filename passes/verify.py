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

import gc
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from fxprune.errors import PreconditionError, VerificationError
from fxprune.pass_base import Pass, PassResult
from fxprune.program import Form
from fxprune.reference import without_units
from fxprune.registry import resolve
from fxprune.runners import EagerRunner, GraphRunner
from fxprune.verify import (
    DOUBLE_TOLERANCE,
    Rung,
    compare_runners,
    first_difference,
    in_double,
    reexported,
    tolerance_for,
)
from fxprune.verify_plain import PlainLadder
from fxprune.verify_text import compare_greedy, same_text

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.program import Program
    from fxprune.runners import Runner

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
        causal = bool(program.interface.cache)
        ladder = _LanguageModelLadder(program) if causal else None
        rungs = _plain_ladder(program, self) if ladder is None else ladder.climb(self)
        certificate = [rung.to_json() for rung in rungs]
        changed = program.with_results(verify=[*program.results.get("verify", []), *certificate])
        if ladder is not None and ladder.warnings:
            changed = changed.with_results(warnings=[*program.results.get("warnings", []), *ladder.warnings])
        return PassResult(changed, modified=True, details={"rungs": len(rungs)})


class _LanguageModelLadder:
    """The ladder of a causal language model with a cache."""

    def __init__(self, program: Program) -> None:
        self.program = program
        example = program.interface.example_inputs["input_ids"]
        floating = next(t for t in program.interface.example_inputs.values() if t.is_floating_point())
        self.device, self.dtype = example.device, floating.dtype
        source = program.source
        self.vocabulary = int(source.config.get_text_config().vocab_size) if source else int(example.max()) + 1
        self.slim = GraphRunner(program.graph_module, program.interface, "slim")
        self.warnings: list[str] = []

    def _runner(self, form: Form, name: str) -> Runner:
        if isinstance(form.module, GraphModule):
            return GraphRunner(form.module, form.interface, name)
        return EagerRunner(form.module, name)

    def _rung(self, name: str, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        tolerance = tolerance_for(self.dtype, runtime=candidate.name == "onnxruntime")
        rung = compare_runners(
            name, reference, candidate, vocabulary=self.vocabulary, tolerance=tolerance, device=self.device
        )
        graphs = tuple(form for form in forms if isinstance(form.module, GraphModule))
        if not rung.passed and graphs:
            rung = self._second_opinion(rung, graphs)
        if not rung.passed and len(forms) == 2:
            rung = replace(rung, first_difference=first_difference(*forms, tolerance))
        return rung.require()

    def _second_opinion(self, rung: Rung, forms: tuple[Form, ...]) -> Rung:
        """Ask whether forms that differ in float32 differ by rounding alone.

        Two graphs are compared in float64. Where one form cannot run in float64 (another runtime, the original code),
        or has weights that were computed and rounded anew (rescaled norms), the graph's own rounding, float32 against
        float64, is what the difference is measured by.
        """
        if self.dtype is not torch.float32 or not math.isfinite(rung.max_abs_error):
            return rung
        double = [self._runner(in_double(form), "float64") for form in forms]
        said = ""
        if len(forms) == 2:
            exact = self._compare(rung.rung, double[0], double[1])
            said = f"max abs error in float64: {exact.max_abs_error:.1e}"
            if exact.passed:
                return replace(rung, passed=True, detail=f"float32 rounding alone; {said}")
            said += "; "
        own = self._compare(rung.rung, self._runner(forms[0], "float32"), double[0]).max_abs_error
        said += f"the graph's own float32 rounding is {own:.1e}"
        return replace(rung, passed=rung.max_abs_error <= 4 * own, detail=said)

    def _compare(self, name: str, reference: Runner, candidate: Runner) -> Rung:
        return compare_runners(
            name, reference, candidate, vocabulary=self.vocabulary, tolerance=DOUBLE_TOLERANCE, device=self.device
        )

    def climb(self, options: Verify) -> list[Rung]:
        rungs = self._graph_rungs(reexport=options.reexport) if options.graph else []
        if options.checkpoint is not None:
            load: Any = resolve("fxprune.checkpoint:load")
            model = load(options.checkpoint, device=str(self.device))
            rungs += self._deployed("reloaded checkpoint", EagerRunner(model, "reloaded"))
            del model
            gc.collect()
        if options.onnx is not None:
            runner: Any = resolve("fxprune.exporters.ort:OrtRunner")
            rungs += self._deployed("ONNX Runtime", runner(options.onnx, name="onnxruntime"))
        if options.genai is not None:
            rungs += self._text_maker(resolve("fxprune.exporters.genai:GenaiRunner")(options.genai))
        return rungs

    def _graph_rungs(self, *, reexport: bool) -> list[Rung]:
        forms = dict(self.program.references)
        current = Form(self.program.graph_module, self.program.interface)
        pairs = [("traced = eager", "eager", "traced"), ("lifted = traced", "traced", "lifted")]
        rungs = [
            self._rung(name, self._runner(forms[a], a), self._runner(forms[b], b), (forms[a], forms[b]))
            for name, a, b in pairs
            if a in forms and b in forms
        ]
        if "masked" in forms:
            masked = self._runner(forms["masked"], "masked")
            with without_units(self.program) as eager:
                if eager is not None:
                    runner = EagerRunner(eager, "eager, units taken out")
                    rungs.append(self._rung("masked = eager without the units", runner, masked, (forms["masked"],)))
            if current.module is not forms["masked"].module:
                rungs.append(self._rung("slim = masked", masked, self.slim, (forms["masked"], current)))
        if reexport:
            again = Form(reexported(current.module, current.interface), current.interface)  # type: ignore[arg-type]
            rungs.append(
                self._rung("re-exported = slim", self.slim, self._runner(again, "re-exported"), (current, again))
            )
        return rungs

    def _deployed(self, name: str, runner: Runner) -> list[Rung]:
        prompt = torch.arange(5, 13, device=self.device).unsqueeze(0) % self.vocabulary
        current = Form(self.program.graph_module, self.program.interface)
        return [
            self._rung(f"{name} = slim", self.slim, runner, (current,)),
            compare_greedy(f"greedy text of {name} = slim", self.slim, runner, prompt, tie=self._tie()).require(),
        ]

    def _tie(self) -> float:
        """In half precision, two forms may each be off by the tolerance; in single precision nothing is a tie."""
        return 2 * tolerance_for(self.dtype) if self.dtype in {torch.float16, torch.bfloat16} else 0.0

    def _text_maker(self, genai: Any) -> list[Rung]:
        """Rungs of onnxruntime-genai: its text after two prompts, and the tokens of its tokenizer."""
        rungs = []
        for length in (8, 1):
            prompt = torch.arange(5, 5 + length, device=self.device).unsqueeze(0) % self.vocabulary
            name = f"greedy text of onnxruntime-genai = slim, after {length} token{'s' if length > 1 else ''}"
            rungs.append(same_text(name, self.slim, genai, prompt, tie=self._tie()).require())
        source = self.program.source
        if source is not None and source.tokenizer is not None:
            rungs += self._tokenizer_rungs(genai, source.tokenizer)
        return rungs

    def _tokenizer_rungs(self, genai: Any, tokenizer: Any) -> list[Rung]:
        """Whether the runtime's tokenizer reads and writes as the model's; what users must know is in `warnings`."""
        found = resolve("fxprune.exporters.genai_tokenizer:compare_tokenizers")(genai, tokenizer)
        self.warnings += found.warnings
        rungs = []
        for name, verb, differ, cases, detail in (
            ("tokens of onnxruntime-genai = tokenizer's", "tokenise", found.texts, found.encoded, found.warnings),
            ("text of onnxruntime-genai's tokens = tokenizer's", "decode", found.tokens, found.decoded, ()),
        ):
            rungs.append(Rung(name, len(differ), 0.0, not differ, cases, detail="; ".join(detail)))
            if differ:
                said = "; ".join(f"{what}: {how}" for what, how in list(differ.items())[:1])
                raise VerificationError(
                    f"onnxruntime-genai does not {verb} like the model's tokenizer: {said}. Its text would be "
                    f"another's: use --to onnx, and {verb} with transformers"
                )
        return rungs


def _plain_ladder(program: Program, options: Verify) -> list[Rung]:
    """The ladder of a model without a cache, see `fxprune.verify_plain`."""
    config = None if program.source is None else program.source.config
    dtype = next((p.dtype for p in program.graph_module.parameters() if p.is_floating_point()), torch.float32)
    ladder = PlainLadder(program.interface, dtype, config)
    forms = dict(program.references)
    current = Form(program.graph_module, program.interface)
    slim = ladder.form(current)
    rungs: list[Rung] = []
    if options.graph:
        for name, a, b in (("traced = eager", "eager", "traced"), ("lifted = traced", "traced", "lifted")):
            if a in forms and b in forms:
                pair = (forms[a], forms[b])
                rungs.append(ladder.rung(name, ladder.form(pair[0]), ladder.form(pair[1]), pair))
        rungs += _plain_masked(program, ladder, current)
        if options.reexport:
            again = Form(reexported(program.graph_module, program.interface), program.interface)
            rungs.append(ladder.rung("re-exported = slim", slim, ladder.form(again), (current, again)))
    if options.checkpoint is not None:
        load: Any = resolve("fxprune.checkpoint:load")
        device = next(iter(program.interface.example_inputs.values())).device
        model = load(options.checkpoint, device=str(device))
        rungs.append(ladder.rung("reloaded checkpoint = slim", slim, ladder.eager(model), (current,)))
        del model
        gc.collect()
    if options.onnx is not None:
        onnx: Any = resolve("fxprune.exporters.ort:OrtFunction")(options.onnx)
        rungs.append(ladder.rung("ONNX Runtime = slim", slim, onnx, (current,), runtime=True))
    return rungs


def _plain_masked(program: Program, ladder: PlainLadder, current: Form) -> list[Rung]:
    """The rungs around the masked form."""
    if "masked" not in program.references:
        return []
    masked = program.references["masked"]
    rungs = []
    with without_units(program) as eager:
        if eager is not None:
            name = "masked = eager without the units"
            rungs.append(ladder.rung(name, ladder.eager(eager), ladder.form(masked), (masked,)))
    if current.module is not masked.module:
        rungs.append(ladder.rung("slim = masked", ladder.form(masked), ladder.form(current), (masked, current)))
    return rungs
