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
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from fxprune.errors import PreconditionError, VerificationError
from fxprune.loading import max_positions
from fxprune.pass_base import Pass, PassResult
from fxprune.program import Form
from fxprune.reference import without_units
from fxprune.registry import resolve
from fxprune.runners import EagerRunner, GraphRunner, named_results
from fxprune.tracing import named_outputs
from fxprune.verify import (
    DOUBLE_TOLERANCE,
    Rung,
    compare_modules,
    compare_runners,
    first_difference,
    in_double,
    reexported,
    tolerance_for,
)
from fxprune.verify_text import compare_greedy, same_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

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
        """Compare, rung by rung; the certificate is left in `results["verify"]`.

        Raises:
            VerificationError: a rung does not hold.
        """
        causal = program.interface.causal and {*program.interface.inputs} <= _TEXT | _caches(program)
        rungs = _LanguageModelLadder(program).climb(self) if causal else _plain_ladder(program, self)
        certificate = [rung.to_json() for rung in rungs]
        changed = program.with_results(verify=[*program.results.get("verify", []), *certificate])
        return PassResult(changed, modified=True, details={"rungs": len(rungs)})


_TEXT = {"input_ids", "attention_mask", "position_ids"}
"""What text gives; a language model that takes more is compared on its example inputs."""
_LONGER = 139
"""Tokens of the longer sequence: more than one chunk of most models that compute in chunks, and no multiple of one."""


def _caches(program: Program) -> set[str]:
    return {entry.input for entry in program.interface.cache}


class _LanguageModelLadder:
    """The ladder of a causal language model."""

    def __init__(self, program: Program) -> None:
        self.program = program
        example = program.interface.example_inputs["input_ids"]
        floating = (p.dtype for p in program.graph_module.parameters() if p.is_floating_point())
        self.device, self.dtype = example.device, next(floating, torch.float32)
        source = program.source
        self.vocabulary = int(source.config.get_text_config().vocab_size) if source else int(example.max()) + 1
        self.slim = GraphRunner(program.graph_module, program.interface, "slim")

    def _runner(self, form: Form, name: str) -> Runner:
        if isinstance(form.module, GraphModule):
            return GraphRunner(form.module, form.interface, name)
        return self._eager(form.module, name)

    def _eager(self, model: Any, name: str) -> EagerRunner:
        """The original code on the same terms as the graph: with a cache if the graph has one."""
        return EagerRunner(model, name, cache=bool(self.program.interface.cache))

    def _longer(self) -> int:
        """Tokens of the longer sequence that forms without a cache are compared on."""
        interface, source = self.program.interface, self.program.source
        limits = [_LONGER, interface.fixed_length, max_positions(source.config) if source is not None else None]
        return 0 if interface.cache else min(limit for limit in limits if limit is not None)

    def _rung(self, name: str, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        tolerance = tolerance_for(self.dtype, runtime=candidate.name == "onnxruntime")
        rung = self._compare(name, reference, candidate, tolerance)
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

    def _compare(self, name: str, reference: Runner, candidate: Runner, tolerance: float = DOUBLE_TOLERANCE) -> Rung:
        return compare_runners(
            name,
            reference,
            candidate,
            vocabulary=self.vocabulary,
            tolerance=tolerance,
            device=self.device,
            longer=self._longer(),
        )

    def climb(self, options: Verify) -> list[Rung]:
        rungs = self._graph_rungs(reexport=options.reexport) if options.graph else []
        if options.checkpoint is not None:
            load: Any = resolve("fxprune.checkpoint:load")
            model = load(options.checkpoint, device=str(self.device))
            rungs += self._deployed(
                "reloaded checkpoint", self._eager(model, "reloaded"), EagerRunner(model, "reloaded, with its cache")
            )
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
                    runner = self._eager(eager, "eager, units taken out")
                    rungs.append(self._rung("masked = eager without the units", runner, masked, (forms["masked"],)))
            if current.module is not forms["masked"].module:
                rungs.append(self._rung("slim = masked", masked, self.slim, (forms["masked"], current)))
        if reexport:
            again = Form(reexported(current.module, current.interface), current.interface)  # type: ignore[arg-type]
            rungs.append(
                self._rung("re-exported = slim", self.slim, self._runner(again, "re-exported"), (current, again))
            )
        return rungs

    def _deployed(self, name: str, runner: Runner, writer: Runner | None = None) -> list[Rung]:
        """Rungs of a deployed form: its logits, and the text that it (or `writer`, the same form) makes."""
        prompt = torch.arange(5, 13, device=self.device).unsqueeze(0) % self.vocabulary
        current = Form(self.program.graph_module, self.program.interface)
        rungs = [self._rung(f"{name} = slim", self.slim, runner, (current,))]
        title = f"greedy text of {name} = slim"
        tokens = 12 if self.program.interface.fixed_length is None else self.program.interface.fixed_length - 8
        if tokens < 1:
            return [
                *rungs,
                Rung(title, 0.0, 0.0, passed=True, cases=0, detail="not climbed: the graph is for fewer tokens"),
            ]
        why_not = self._unlike_itself(prompt, tokens) if writer is not None else ""
        if why_not:
            return [*rungs, Rung(title, 0.0, 0.0, passed=True, cases=0, detail=f"not climbed: {why_not}")]
        found = compare_greedy(title, self.slim, writer or runner, prompt, min(tokens, 12), tie=self._tie())
        return [*rungs, found.require()]

    def _unlike_itself(self, prompt: Tensor, tokens: int) -> str:
        """Why the original model's own cache is nothing to hold a checkpoint to; empty if it is."""
        if self.program.interface.cache:
            return ""
        original = self.program.references["eager"].module
        runners = EagerRunner(original, "without its cache", cache=False), EagerRunner(original, "with its cache")
        try:
            same = compare_greedy("text", *runners, prompt, min(tokens, 12), tie=self._tie())
        except PreconditionError as error:
            return f"the original model does not run with its cache ({error})"
        return "" if same.passed else "the original model itself writes another text with its cache than without"

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
            differ = resolve("fxprune.exporters.genai:tokenizer_differences")(genai, source.tokenizer)
            said = "; ".join(f"{text!r}: {how}" for text, how in list(differ.items())[:1])
            rungs.append(
                Rung("tokens of onnxruntime-genai = tokenizer's", len(differ), 0.0, not differ, 1, detail=said)
            )
            if differ:
                raise VerificationError(
                    f"onnxruntime-genai does not tokenise like the model's tokenizer: {said}. Its text would be "
                    "another's: use --to onnx, and tokenise with transformers"
                )
        return rungs


def _plain_ladder(program: Program, options: Verify) -> list[Rung]:
    """The ladder of a model without a cache: flat outputs on the example inputs."""
    inputs = tuple(program.interface.example_inputs.values())
    tolerance = tolerance_for(next((t.dtype for t in inputs if t.is_floating_point()), torch.float32))
    forms = dict(program.references)
    names = program.interface.outputs

    def called(model: Any) -> Any:
        def run(*args: Any) -> Any:
            with named_results(getattr(model, "config", None)):
                output = model(**dict(zip(program.interface.inputs, args, strict=True)))
            if not isinstance(output, (Mapping, tuple, list)):
                return output
            found = named_outputs(output)
            if missing := [name for name in names if name not in found]:
                raise VerificationError(
                    f"{type(model).__name__} returns no {missing[0]} that the traced graph returns, but "
                    f"{', '.join(found)}: trace it with example_inputs= that make it return the same each time"
                )
            return [found[name] for name in names]

        return run

    eager = called(forms["eager"].module)
    chain = [("traced = eager", eager, forms.get("traced"))]
    if "lifted" in forms and "traced" in forms:
        chain.append(("lifted = traced", forms["traced"].module, forms["lifted"]))
    rungs: list[Rung] = []
    if options.graph:
        pairs = [(name, before, form.module) for name, before, form in chain if form is not None]
        rungs += [compare_modules(name, a, b, inputs, tolerance).require() for name, a, b in pairs]
        rungs += _plain_masked(program, called, inputs, tolerance)
    if options.graph and options.reexport:
        again = reexported(program.graph_module, program.interface)
        rungs.append(compare_modules("re-exported = slim", program.graph_module, again, inputs, tolerance).require())
    if options.checkpoint is not None:
        load: Any = resolve("fxprune.checkpoint:load")
        model = called(load(options.checkpoint, device=str(inputs[0].device)))
        rung = compare_modules("reloaded checkpoint = slim", program.graph_module, model, inputs, tolerance)
        rungs.append(rung.require())
    if options.onnx is not None:
        run: Any = resolve("fxprune.exporters.ort:run_onnx")
        onnx = run(options.onnx, dict(program.interface.example_inputs))
        wide, values = tolerance_for(torch.float32, runtime=True), tuple(onnx.values())
        rung = compare_modules("ONNX Runtime = slim", program.graph_module, lambda *_: values, inputs, wide)
        rungs.append(rung.require())
    return rungs


def _plain_masked(program: Program, called: Any, inputs: tuple[Any, ...], tolerance: float) -> list[Rung]:
    """The rungs around the masked form."""
    if "masked" not in program.references:
        return []
    masked = program.references["masked"].module
    rungs = []
    with without_units(program) as eager:
        if eager is not None:
            name = "masked = eager without the units"
            rungs.append(compare_modules(name, called(eager), masked, inputs, tolerance).require())
    if program.graph_module is not masked:
        rungs.append(compare_modules("slim = masked", masked, program.graph_module, inputs, tolerance).require())
    return rungs
