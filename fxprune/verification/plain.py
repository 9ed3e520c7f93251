"""The ladder of models without a cache: encoders, classifiers, encoder-decoders, vision models, plain modules.

    the example  +  batch 1 and 2  x  {other lengths, no padding, padding left, padding right}  x  random values

Forms are compared as functions from named inputs to named outputs. Values come from a seed: tokens of the vocabulary,
normal noise for pixels; for a plain module, whose domain nobody knows, those of its example in another order. Outputs
at positions that the mask hides mean nothing and are left out.

Forms that differ by more than the tolerance are judged by `fxprune.verification.rounding`, as language models are.
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.core.errors import VerificationError
from fxprune.core.precision import coarsest, is_low
from fxprune.core.program import Form
from fxprune.core.registry import resolve
from fxprune.models.loading import max_positions
from fxprune.tracing.outputs import named_outputs, named_results
from fxprune.verification.differences import first_difference
from fxprune.verification.ladder import Rung, reexported, tolerance_for
from fxprune.verification.reference import without_units
from fxprune.verification.rounding import in_wider_precision, widened

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fxprune.core.program import Interface, Program
    from fxprune.core.widened import Widened

    Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    _Cases = list[dict[str, Tensor]]

__all__ = ["PlainLadder", "climb_plain", "plain_cases"]

_TOKENS = ("input_ids", "decoder_input_ids")
_SIZES = ((1, 2, 1), (2, 1, 1), (2, 2, 0))
"""Batch, and what a length of the example is multiplied by and increased by, of each case besides the example."""
_PADDING = ("", "left", "right")


def plain_cases(interface: Interface, config: Any = None) -> list[dict[str, Tensor]]:
    """Inputs to compare forms on, the example first.

    Args:
        interface: how the graph is called; a graph without a cache.
        config: the model's configuration; None for a plain module, whose sizes and values stay those of the example.

    Returns:
        Inputs by name.
    """
    example = dict(interface.example_inputs)
    if config is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in example.items()}
        return [example, _drawn(interface, shapes, None, torch.Generator().manual_seed(0), "")]
    cases = [example]
    has_lengths = any(axis for name in example for axis in _free_axes(interface, name))
    for seed, ((batch, times, more), padding) in enumerate(zip(_SIZES, _PADDING, strict=True)):
        if padding == "right" and not has_lengths:
            break  # nothing to pad: it would be the case before
        generator = torch.Generator().manual_seed(seed)
        shapes = _resized(interface, batch, (times, more), max_positions(config))
        cases.append(_drawn(interface, shapes, config, generator, padding))
    return cases


def _free_axes(interface: Interface, name: str) -> set[int]:
    """The axes of an input whose length may change freely: their symbol is neither a number nor a formula."""
    return {axis for axis, symbol in interface.dynamic_axes.get(name, {}).items() if symbol.isidentifier()}


def _resized(
    interface: Interface, batch: int, length: tuple[int, int], limit: int | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of another batch, and of lengths times a number and increased by another, where these may change.

    Sizes of a sample are pairwise different, so what is alike in it stays alike.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in interface.example_inputs.items():
        free = _free_axes(interface, name)
        longer = [length[0] * size + length[1] for size in tensor.shape]
        shapes[name] = tuple(
            size if axis not in free else batch if axis == 0 else min(longer[axis], limit or longer[axis])
            for axis, size in enumerate(tensor.shape)
        )
    return shapes


def _drawn(
    interface: Interface,
    shapes: Mapping[str, tuple[int, ...]],
    config: Any,
    generator: torch.Generator,
    padding: str,
) -> dict[str, Tensor]:
    """Random values of the given shapes; with padding, the first row has some."""
    text = None if config is None else config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    filler = getattr(text, "pad_token_id", None)
    found: dict[str, Tensor] = {}
    for name, example in interface.example_inputs.items():
        shape = shapes[name]
        if config is not None and name.endswith("attention_mask") and len(shape) == 2:
            values = torch.ones(shape, dtype=example.dtype)
            hidden = max(1, shape[1] // 3)
            values[0, {"": slice(0), "left": slice(hidden), "right": slice(-hidden, None)}[padding]] = 0
        elif config is not None and name in _TOKENS and isinstance(vocabulary, int):
            values = torch.randint(vocabulary, shape, generator=generator, dtype=example.dtype)
        elif config is not None and example.is_floating_point():
            values = torch.randn(shape, generator=generator).to(example.dtype)
        else:
            among = example.detach().cpu().reshape(-1)
            values = among[torch.randint(max(1, len(among)), shape, generator=generator)]
        found[name] = values
    for ids, mask in zip(_TOKENS, ("attention_mask", "decoder_attention_mask"), strict=True):
        if isinstance(filler, int) and {ids, mask} <= found.keys() and found[ids].shape == found[mask].shape:
            found[ids] = found[ids].masked_fill(found[mask] == 0, filler)
    return {name: values.to(interface.example_inputs[name].device) for name, values in found.items()}


class PlainLadder:
    """Compares forms of one model over all cases.

    Args:
        interface: how the graphs are called.
        dtype: of the weights.
        config: the model's configuration; None for a plain module.
    """

    def __init__(self, interface: Interface, dtype: torch.dtype, config: Any = None) -> None:
        self.interface = interface
        self.dtype = dtype
        self.cases = plain_cases(interface, config)

    def graph(self, module: GraphModule | Widened) -> Function:
        """A flat graph as a function."""

        def run(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return dict(zip(self.interface.outputs, module(*(inputs[n] for n in self.interface.inputs)), strict=True))

        return run

    def eager(self, model: Callable[..., Any]) -> Function:
        """A model, or what is called like it, as a function.

        Raises:
            VerificationError: when it is called, and returns other things than the traced graph.
        """
        names = self.interface.outputs

        def run(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            with named_results(getattr(model, "config", None)):
                output = model(**inputs)
            found = named_outputs(output)
            if missing := [name for name in names if name not in found]:
                raise VerificationError(
                    f"{type(model).__name__} returns no {missing[0]} that the traced graph returns, but "
                    f"{', '.join(found)}: trace it with example_inputs= that make it return the same each time"
                )
            return found

        return run

    def form(self, form: Form) -> Function:
        """A form that verification keeps as a function."""
        return self.graph(form.module) if isinstance(form.module, GraphModule) else self.eager(form.module)

    def rung(
        self,
        name: str,
        reference: Function,
        candidate: Function,
        forms: tuple[Form, ...] = (),
        *,
        runtime: bool = False,
    ) -> Rung:
        """One comparison.

        Args:
            name: of the rung.
            reference: what is right by definition.
            candidate: what is checked.
            forms: graphs among the two, reference first, for a second opinion in float64.
            runtime: whether the candidate runs in another runtime.

        Raises:
            VerificationError: they differ.
        """
        tolerance = tolerance_for(self.dtype, runtime=runtime)
        rung = self._compare(name, reference, candidate, tolerance)
        graphs = tuple(form for form in forms if isinstance(form.module, GraphModule))
        if graphs and math.isfinite(rung.max_abs_error) and (is_low(self.dtype) or not rung.passed):
            rung = in_wider_precision(rung, graphs, self)
        if not rung.passed and len(forms) == 2:
            rung = replace(rung, first_difference=first_difference(forms[0], forms[1], rung.tolerance))
        return rung.require()

    def _compare(self, name: str, reference: Function, candidate: Function, tolerance: float) -> Rung:
        worst = self._largest(reference, candidate, self.cases, self.cases)
        return Rung(name, worst, tolerance, worst <= tolerance, len(self.cases))

    def _largest(self, reference: Function, candidate: Function, cases: _Cases, own_cases: _Cases) -> float:
        """The largest difference of any output; the candidate may get the cases in a precision of its own."""
        worst = 0.0
        for case, own in zip(cases, own_cases, strict=True):
            with torch.no_grad():
                expected, given = reference(case), candidate(own)
            hidden = [mask == 0 for key, mask in case.items() if key.endswith("attention_mask") and mask.dim() == 2]
            for output in self.interface.outputs:
                worst = max(worst, _difference(expected[output], given.get(output), hidden))
        return worst

    def own_rounding(self, form: Form, wide: torch.dtype) -> float:
        """See `fxprune.verification.rounding.Measured`."""
        return self._largest(self.graph(widened(form, wide)[0]), self.form(form), self._cases_in(wide), self.cases)

    def exact_difference(self, reference: Form, candidate: Form, wide: torch.dtype) -> float:
        """See `fxprune.verification.rounding.Measured`."""
        cases = self._cases_in(wide)
        graphs = [self.graph(widened(form, wide)[0]) for form in (reference, candidate)]
        return self._largest(graphs[0], graphs[1], cases, cases)

    def _cases_in(self, wide: torch.dtype) -> _Cases:
        """The cases, for graphs in float64 in float64; what runs a graph in float32 widens its inputs itself."""
        if wide is torch.float32:
            return self.cases
        return [{n: t.double() if t.is_floating_point() else t for n, t in case.items()} for case in self.cases]


def _difference(expected: Tensor, given: Tensor | None, hidden: list[Tensor]) -> float:
    """Largest absolute difference at positions that are not hidden; infinite for another shape and for NaN."""
    if given is None or given.shape != expected.shape:
        return math.inf
    kept = next((~mask for mask in hidden if mask.shape == expected.shape[:2]), None)
    pair = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (expected, given.to(expected.device))]
    if kept is not None:
        pair = [t[kept] for t in pair]
    if not pair[0].numel():
        return 0.0
    error = (pair[0] - pair[1]).abs().max().item()
    return math.inf if math.isnan(error) else float(error)


def climb_plain(
    program: Program, *, graph: bool, reexport: bool, checkpoint: Path | str | None, onnx: Path | str | None
) -> list[Rung]:
    """Climb the ladder of a model without a cache; options as those of `fxprune.passes.verify.Verify`.

    Raises:
        VerificationError: a rung does not hold.
    """
    config = None if program.source is None else program.source.config
    weights = (*program.graph_module.parameters(), *program.interface.example_inputs.values())
    ladder = PlainLadder(program.interface, coarsest(weights), config)
    forms = dict(program.references)
    current = Form(program.graph_module, program.interface)
    slim = ladder.form(current)
    rungs: list[Rung] = []
    if graph:
        for name, a, b in (("traced = eager", "eager", "traced"), ("lifted = traced", "traced", "lifted")):
            if a in forms and b in forms:
                pair = (forms[a], forms[b])
                rungs.append(ladder.rung(name, ladder.form(pair[0]), ladder.form(pair[1]), pair))
        rungs += _plain_masked(program, ladder, current)
        if reexport:
            again = Form(reexported(program.graph_module, program.interface), program.interface)
            rungs.append(ladder.rung("re-exported = slim", slim, ladder.form(again), (current, again)))
    if checkpoint is not None:
        load: Any = resolve("fxprune.checkpoints.checkpoint:load")
        device = next(iter(program.interface.example_inputs.values())).device
        model = load(checkpoint, device=str(device))
        rungs.append(ladder.rung("reloaded checkpoint = slim", slim, ladder.eager(model), (current,)))
        del model
        gc.collect()
    if onnx is not None:
        runner: Any = resolve("fxprune.exporters.ort:OrtFunction")(onnx)
        rungs.append(ladder.rung("ONNX Runtime = slim", slim, runner, (current,), runtime=True))
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
