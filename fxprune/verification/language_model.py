"""The ladder of a causal language model: its forms as runners, over a few steps of text.

eager ── traced ── lifted ── masked ── slim ── re-exported            (deployed forms: `fxprune.verification.deployed`)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from fxprune.core.precision import coarsest, is_low
from fxprune.core.program import Form
from fxprune.models.loading import max_positions
from fxprune.runtimes.runners import EagerRunner, GraphRunner
from fxprune.verification.differences import first_difference
from fxprune.verification.ladder import (
    Rung,
    answers,
    largest_difference,
    reexported,
    script_tokens,
    tolerance_for,
)
from fxprune.verification.reference import without_units
from fxprune.verification.rounding import in_wider_precision, widened

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from fxprune.core.program import Program
    from fxprune.runtimes.runners import Runner

__all__ = ["LanguageModelLadder"]

_LONGER = 139
"""Tokens of the longer sequence: more than one chunk of most models that compute in chunks, and no multiple of one."""


class LanguageModelLadder:
    """The ladder of a causal language model.

    Args:
        program: the model in all its forms.
        name_overflow: called with tokens, (rows, length) int64, when a form gives what is not finite: may say more.
    """

    def __init__(self, program: Program, name_overflow: Callable[[Tensor], None]) -> None:
        self.program = program
        self._name_overflow = name_overflow
        example = program.interface.example_inputs["input_ids"]
        self.device = example.device
        self.dtype = coarsest(program.graph_module.parameters())
        self._known: dict[tuple[int, torch.dtype | None], list[Tensor]] = {}
        source = program.source
        self.vocabulary = int(source.config.get_text_config().vocab_size) if source else int(example.max()) + 1
        self.current = Form(program.graph_module, program.interface)
        self.slim = GraphRunner(program.graph_module, program.interface, "slim")
        self.warnings: list[str] = []
        self.forgetful = False  # whether the original model's own cache was found to be no reference

    def runner(self, form: Form, name: str) -> Runner:
        """A form of the program as a runner."""
        if isinstance(form.module, GraphModule):
            return GraphRunner(form.module, form.interface, name)
        return self.eager(form.module, name)

    def eager(self, model: Any, name: str) -> EagerRunner:
        """The original code on the same terms as the graph: with a cache if the graph has one."""
        return EagerRunner(model, name, cache=bool(self.program.interface.cache))

    def _longer(self) -> int:
        """Tokens of the longer sequence that forms without a cache are compared on."""
        interface, source = self.program.interface, self.program.source
        limits = [_LONGER, interface.fixed_length, max_positions(source.config) if source is not None else None]
        return 0 if interface.cache else min(limit for limit in limits if limit is not None)

    def rung(self, name: str, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        """One comparison; `forms` are those of the two that the program has, reference first.

        Raises:
            VerificationError: they differ.
        """
        rung = self._compared(name, reference, candidate, forms)
        if not rung.passed:
            rung = self._on_whole_sequences(rung, reference, candidate, forms)
        if not rung.passed and len(forms) == 2:
            rung = replace(rung, first_difference=first_difference(*forms, rung.tolerance))
        return rung.require()

    def _on_whole_sequences(self, rung: Rung, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        """A rung that does not hold, compared without the original model's cache where that is no reference."""
        cached = [isinstance(runner, EagerRunner) and runner.cache for runner in (reference, candidate)]
        if not any(cached) or not self._forgets(rung.tolerance):
            return rung
        whole = [
            EagerRunner(runner.model, runner.name, cache=False) if isinstance(runner, EagerRunner) else runner
            for runner in (reference, candidate)
        ]
        again = self._compared(rung.rung, whole[0], whole[1], forms)
        if not again.passed:
            return rung
        said = "the original model's own cache gives other logits than whole sequences, which this is held to"
        self.warnings.append(f"{rung.rung}: {said}")
        self.forgetful = True
        return replace(again, detail="; ".join(filter(None, (said, again.detail))))

    def _forgets(self, tolerance: float) -> bool:
        """Whether the original model's cache gives other logits than whole sequences; then it is no reference.

        Such a cache has a window, for example, that the model's mask does not have.
        """
        eager = self.program.references.get("eager")
        if eager is None or not self.program.interface.cache:
            return False
        found = [self._of(EagerRunner(eager.module, "eager", cache=cache)) for cache in (True, False)]
        return largest_difference(*found) > tolerance

    def _compared(self, name: str, reference: Runner, candidate: Runner, forms: tuple[Form, ...]) -> Rung:
        graphs = tuple(form for form in forms if isinstance(form.module, GraphModule))
        tolerance = tolerance_for(self.dtype, runtime=candidate.name == "onnxruntime")
        expected, given = (self._of(runner) for runner in (reference, candidate))
        error = largest_difference(expected, given)
        rung = Rung(name, error, tolerance, error <= tolerance, len(expected))
        if not math.isfinite(error):
            self._name_overflow(script_tokens(self.vocabulary, self.device))
        elif graphs and (is_low(self.dtype) or not rung.passed):
            rung = in_wider_precision(rung, graphs, self)
        return rung

    def _of(self, runner: Runner) -> list[Tensor]:
        """The logits of a form in all cases."""
        return answers(runner, vocabulary=self.vocabulary, device=self.device, longer=self._longer())

    def own_rounding(self, form: Form, wide: torch.dtype) -> float:
        """See `fxprune.verification.rounding.Measured`."""
        return largest_difference(self._known_of(form), self._known_of(form, wide))

    def exact_difference(self, reference: Form, candidate: Form, wide: torch.dtype) -> float:
        """See `fxprune.verification.rounding.Measured`."""
        return largest_difference(self._known_of(reference, wide), self._known_of(candidate, wide))

    def _known_of(self, form: Form, wide: torch.dtype | None = None) -> list[Tensor]:
        """A graph's logits in a wider precision, or in its own; computed once a graph."""
        key = id(form.module), wide
        if key not in self._known:
            self._known[key] = self._of(
                self.runner(form, "graph") if wide is None else GraphRunner(*widened(form, wide), "graph")
            )
        return self._known[key]

    def climb(self, *, reexport: bool) -> list[Rung]:
        """The rungs of the graph forms.

        Raises:
            VerificationError: one does not hold.
        """
        forms = dict(self.program.references)
        current = self.current
        pairs = [("traced = eager", "eager", "traced"), ("lifted = traced", "traced", "lifted")]
        rungs = [
            self.rung(name, self.runner(forms[a], a), self.runner(forms[b], b), (forms[a], forms[b]))
            for name, a, b in pairs
            if a in forms and b in forms
        ]
        if "masked" in forms:
            masked = self.runner(forms["masked"], "masked")
            with without_units(self.program) as eager:
                if eager is not None:
                    runner = self.eager(eager, "eager, units taken out")
                    rungs.append(self.rung("masked = eager without the units", runner, masked, (forms["masked"],)))
            if current.module is not forms["masked"].module:
                rungs.append(self.rung("slim = masked", masked, self.slim, (forms["masked"], current)))
        if reexport:
            again = Form(reexported(current.module, current.interface), current.interface)  # type: ignore[arg-type]
            rungs.append(
                self.rung("re-exported = slim", self.slim, self.runner(again, "re-exported"), (current, again))
            )
        return rungs
