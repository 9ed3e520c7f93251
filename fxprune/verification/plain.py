"""The ladder of models without a cache: encoders, classifiers, encoder-decoders, vision models, plain modules.

    the example  +  batch 1 and 2  x  {other lengths, no padding, padding left, padding right}  x  random values

Forms are compared as functions from named inputs to named outputs. Values come from a seed: tokens of the vocabulary,
normal noise for pixels; for a plain module, whose domain nobody knows, those of its example in another order. Outputs
at positions that the mask hides mean nothing and are left out.

Two graphs that differ in float32 are compared once more in float64, as for language models (see
`fxprune.verification.ladder`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxprune.core.errors import VerificationError
from fxprune.core.precision import Widened, is_low, short_name
from fxprune.models.loading import max_positions
from fxprune.tracing.outputs import named_outputs, named_results
from fxprune.verification.ladder import DOUBLE_TOLERANCE, ROUNDINGS, Rung, first_difference, in_double, tolerance_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fxprune.core.program import Form, Interface

    Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

__all__ = ["PlainLadder", "plain_cases"]

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
        if is_low(self.dtype) and graphs and math.isfinite(rung.max_abs_error):
            rung = self._in_lower_precision(rung, graphs)
        elif not rung.passed and graphs and self.dtype is torch.float32 and math.isfinite(rung.max_abs_error):
            rung = self._second_opinion(rung, graphs)
        if not rung.passed and len(forms) == 2:
            rung = replace(rung, first_difference=first_difference(forms[0], forms[1], rung.tolerance))
        return rung.require()

    def _compare(self, name: str, reference: Function, candidate: Function, tolerance: float) -> Rung:
        worst = 0.0
        for case in self.cases:
            with torch.no_grad():
                expected, given = reference(case), candidate(case)
            hidden = [mask == 0 for key, mask in case.items() if key.endswith("attention_mask") and mask.dim() == 2]
            for output in self.interface.outputs:
                worst = max(worst, _difference(expected[output], given.get(output), hidden))
        return Rung(name, worst, tolerance, worst <= tolerance, len(self.cases))

    def _in_lower_precision(self, rung: Rung, graphs: tuple[Form, ...]) -> Rung:
        """Judge forms in half precision as language models are judged (see `fxprune.passes.verify`)."""
        wide = [self.graph(Widened(form.module)) for form in graphs]  # type: ignore[arg-type]
        own = self._compare(rung.rung, self.form(graphs[0]), wide[0], 0.0).max_abs_error
        said = f"the graph's own {short_name(self.dtype)} rounding is {own:.1e}"
        rung = replace(rung, tolerance=ROUNDINGS * own, passed=rung.max_abs_error <= ROUNDINGS * own, detail=said)
        if len(graphs) < 2:
            return rung
        exact = self._compare(rung.rung, wide[0], wide[1], tolerance_for(torch.float32)).max_abs_error
        agree = exact <= tolerance_for(torch.float32)
        rounded = rung.passed and exact <= ROUNDINGS * own
        return replace(rung, passed=agree or rounded, detail=f"max abs error in float32: {exact:.1e}; {said}")

    def _second_opinion(self, rung: Rung, graphs: tuple[Form, ...]) -> Rung:
        """Ask whether forms that differ in float32 differ by rounding alone."""
        double = [self.graph(in_double(form).module) for form in graphs]  # type: ignore[arg-type]  # it is a graph
        widened = PlainLadder.__new__(PlainLadder)
        widened.interface, widened.dtype = self.interface, torch.float64
        widened.cases = [{n: t.double() if t.is_floating_point() else t for n, t in c.items()} for c in self.cases]
        said = ""
        if len(graphs) == 2:
            exact = widened._compare(rung.rung, double[0], double[1], DOUBLE_TOLERANCE)
            said = f"max abs error in float64: {exact.max_abs_error:.1e}"
            if exact.passed:
                return replace(rung, passed=True, detail=f"float32 rounding alone; {said}")
            said += "; "
        single = self.form(graphs[0])
        narrow = {id(wide): case for wide, case in zip(widened.cases, self.cases, strict=True)}
        own = widened._compare(rung.rung, double[0], lambda case: single(narrow[id(case)]), DOUBLE_TOLERANCE)
        said += f"the graph's own float32 rounding is {own.max_abs_error:.1e}"
        return replace(rung, passed=rung.max_abs_error <= ROUNDINGS * own.max_abs_error, detail=said)


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
