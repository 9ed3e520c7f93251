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

from fxprune.calibration.overflow import described, find_overflow
from fxprune.core.errors import NotFiniteError, PreconditionError, VerificationError
from fxprune.core.pass_base import Pass, PassResult
from fxprune.core.precision import Widened, coarsest, is_low, short_name
from fxprune.core.program import Form
from fxprune.core.registry import resolve
from fxprune.models.loading import max_positions
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.verification.ladder import (
    DOUBLE_TOLERANCE,
    ROUNDINGS,
    Rung,
    answers,
    compare_runners,
    first_difference,
    in_double,
    largest_difference,
    reexported,
    script_tokens,
    tolerance_for,
)
from fxprune.verification.plain import PlainLadder
from fxprune.verification.reference import without_units
from fxprune.verification.text import compare_greedy, same_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fxprune.core.program import Program
    from fxprune.runtimes.runners import Runner

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
        ladder = _LanguageModelLadder(program) if causal else None
        rungs = _plain_ladder(program, self) if ladder is None else ladder.climb(self)
        certificate = [rung.to_json() for rung in rungs]
        changed = program.with_results(verify=[*program.results.get("verify", []), *certificate])
        if ladder is not None and ladder.warnings:
            changed = changed.with_results(warnings=[*program.results.get("warnings", []), *ladder.warnings])
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
        self.device = example.device
        self.dtype = coarsest(program.graph_module.parameters())
        self._known: dict[int, list[Tensor]] = {}
        source = program.source
        self.vocabulary = int(source.config.get_text_config().vocab_size) if source else int(example.max()) + 1
        self.slim = GraphRunner(program.graph_module, program.interface, "slim")
        self.warnings: list[str] = []
        self._forgetful = False  # whether the original model's own cache was found to be no reference

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
        rung = self._compared(name, reference, candidate, forms)
        cached = [isinstance(runner, EagerRunner) and runner.cache for runner in (reference, candidate)]
        if not rung.passed and any(cached) and self._forgets(rung.tolerance):
            whole = [
                EagerRunner(runner.model, runner.name, cache=False) if isinstance(runner, EagerRunner) else runner
                for runner in (reference, candidate)
            ]
            again = self._compared(name, whole[0], whole[1], forms)
            if again.passed:
                said = "the original model's own cache gives other logits than whole sequences, which this is held to"
                self.warnings.append(f"{name}: {said}")
                self._forgetful = True
                rung = replace(again, detail="; ".join(filter(None, (said, again.detail))))
        if not rung.passed and len(forms) == 2:
            rung = replace(rung, first_difference=first_difference(*forms, rung.tolerance))
        return rung.require()

    def _forgets(self, tolerance: float) -> bool:
        """Whether the original model's cache gives other logits than whole sequences; then it is no reference.

        Such a cache has a window, for example, that the model's mask does not have.
        """
        eager = self.program.references.get("eager")
        if eager is None or not self.program.interface.cache:
            return False
        answers = [self._of(EagerRunner(eager.module, "eager", cache=cache)) for cache in (True, False)]
        return largest_difference(*answers) > tolerance

    def _compared(self, name: str, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        graphs = tuple(form for form in forms if isinstance(form.module, GraphModule))
        tolerance = tolerance_for(self.dtype, runtime=candidate.name == "onnxruntime")
        expected, given = (self._of(runner) for runner in (reference, candidate))
        error = largest_difference(expected, given)
        rung = Rung(name, error, tolerance, error <= tolerance, len(expected))
        if not math.isfinite(error):
            self._name_overflow()
        elif is_low(self.dtype) and graphs:
            rung = self._in_lower_precision(rung, graphs)
        elif not rung.passed and graphs:
            rung = self._second_opinion(rung, graphs)
        return rung

    def _name_overflow(self) -> None:
        """Say which module of the dense model gives what is not finite, if one does.

        Raises:
            NotFiniteError: one does.
        """
        lifted = self.program.references.get("lifted")
        if lifted is not None and isinstance(lifted.module, GraphModule):
            dense = self.program.replace(graph_module=lifted.module, interface=lifted.interface)
            found = find_overflow(dense, script_tokens(self.vocabulary, self.device))
            if found is not None:
                raise NotFiniteError(described(found, "the text that verify runs"))

    def _in_lower_precision(self, rung: Rung, graphs: tuple[Form, ...]) -> Rung:
        """Judge forms in half precision, whose rounding no fixed tolerance fits.

        Two graphs are run in float32 with their weights as they are, and must agree as float32 models do. Where one
        form is no graph, or has weights that were computed and rounded anew (rescaled norms), what is allowed follows
        from the graph's own rounding, its precision against float32.
        """
        wide = [self._wide(form) for form in graphs]
        own = largest_difference(self._narrow(graphs[0]), wide[0])
        said = f"the graph's own {short_name(self.dtype)} rounding is {own:.1e}"
        rung = replace(rung, tolerance=ROUNDINGS * own, passed=rung.max_abs_error <= ROUNDINGS * own, detail=said)
        if len(graphs) < 2:
            return rung
        exact = largest_difference(*wide)
        agree = exact <= tolerance_for(torch.float32)
        rounded = rung.passed and exact <= ROUNDINGS * own
        return replace(rung, passed=agree or rounded, detail=f"max abs error in float32: {exact:.1e}; {said}")

    def _of(self, runner: Runner) -> list[Tensor]:
        """The logits of a form in all cases."""
        return answers(runner, vocabulary=self.vocabulary, device=self.device, longer=self._longer())

    def _wide(self, form: Form) -> list[Tensor]:
        """A graph's logits in float32; computed once a graph."""
        assert isinstance(form.module, GraphModule)
        return self._answers(id(form.module), GraphRunner(Widened(form.module), form.interface, "float32"))

    def _narrow(self, form: Form) -> list[Tensor]:
        """A graph's logits in its own precision; computed once a graph."""
        return self._answers(-id(form.module), self._runner(form, "graph"))

    def _answers(self, key: int, runner: Runner) -> list[Tensor]:
        if key not in self._known:
            self._known[key] = self._of(runner)
        return self._known[key]

    def _second_opinion(self, rung: Rung, forms: tuple[Form, ...]) -> Rung:
        """Ask whether forms that differ in float32 differ by rounding alone.

        Two graphs are compared in float64. Where one form cannot run in float64 (another runtime, the original code),
        or has weights that were computed and rounded anew (rescaled norms), the graph's own rounding, float32 against
        float64, is what the difference is measured by.
        """
        if self.dtype is not torch.float32:
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
        return replace(rung, passed=rung.max_abs_error <= ROUNDINGS * own, detail=said)

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
            load: Any = resolve("fxprune.checkpoints.checkpoint:load")
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
        if self.program.interface.cache and not self._forgetful:
            return ""
        original = self.program.references["eager"].module
        runners = EagerRunner(original, "without its cache", cache=False), EagerRunner(original, "with its cache")
        try:
            same = compare_greedy("text", *runners, prompt, min(tokens, 12), tie=self._tie())
        except PreconditionError as error:
            return f"the original model does not run with its cache ({error})"
        return "" if same.passed else "the original model itself writes another text with its cache than without"

    def _tie(self) -> float:
        """In half precision, two forms may each be off by what rounding does; in single precision nothing is a tie."""
        if not is_low(self.dtype):
            return 0.0
        form = Form(self.program.graph_module, self.program.interface)
        return 2 * ROUNDINGS * largest_difference(self._narrow(form), self._wide(form))

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
    """The ladder of a model without a cache, see `fxprune.verification.plain`."""
    config = None if program.source is None else program.source.config
    weights = (*program.graph_module.parameters(), *program.interface.example_inputs.values())
    ladder = PlainLadder(program.interface, coarsest(weights), config)
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
        load: Any = resolve("fxprune.checkpoints.checkpoint:load")
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
