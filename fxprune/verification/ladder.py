"""The verification ladder: every form of a model must compute what the form before it does.

    eager = traced = lifted;  masked = eager with zeroed consumer columns;  slim = masked;  re-exported = slim;
    reloaded checkpoint = slim;  ONNX Runtime = slim;  greedy text of the deployed forms = greedy text of slim

A deeply pruned model amplifies float32 rounding until two correct forms differ by more than the tolerance. Two graphs
that do are compared once more in float64, where rounding cannot be the reason; a form that cannot run in float64, or
has rescaled norms, whose weights were rounded anew, may differ by four times the graph's own rounding. The rung then
says both figures.

Lower precisions round so coarsely that a fixed tolerance would let wrong graphs pass. Two graphs in bfloat16 or float16
are therefore run in float32, weights as they are, and must agree as float32 models do. A form that is no graph, or
weights that were rounded anew, may differ by four times the graph's own rounding, which is measured: the same graph in
its own precision against float32.

Forms are compared as runners, over batch 1 and 2 x {prefill, several tokens on a past, one token, left padding}.
Logits at padding positions mean nothing and are left out. A model whose state does not fit into a graph (convolution,
linear attention, Mamba) is compared on whole sequences, and on a longer one; its own cache is in the rung about text.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.core.errors import VerificationError
from fxprune.core.program import Form
from fxprune.runtimes.runners import position_ids_from_mask
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.nodes import module_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.program import Interface
    from fxprune.runtimes.runners import Runner

__all__ = [
    "DOUBLE_TOLERANCE",
    "ROUNDINGS",
    "Rung",
    "answers",
    "compare_modules",
    "compare_runners",
    "first_difference",
    "in_double",
    "largest_difference",
    "reexported",
    "script_tokens",
    "tolerance_for",
]


@dataclass(frozen=True)
class Rung:
    """One comparison of the ladder.

    Attributes:
        rung: what was compared, such as `slim = masked`.
        max_abs_error: largest absolute difference of a logit over all cases.
        tolerance: what is allowed.
        passed: whether it holds.
        cases: how many comparisons were made.
        first_difference: qualified name of the first module whose output differs; empty when passed or unknown.
        detail: what else there is to say, such as the error in double precision.
    """

    rung: str
    max_abs_error: float
    tolerance: float
    passed: bool
    cases: int
    first_difference: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The rung as JSON data."""
        return asdict(self)

    def require(self) -> Rung:
        """Return the rung if it holds.

        Raises:
            VerificationError: it does not.
        """
        if self.passed:
            return self
        where = f"; the first module that differs is {self.first_difference}" if self.first_difference else ""
        raise VerificationError(
            f"{self.rung} does not hold: max abs error {self.max_abs_error:.3g} > {self.tolerance:.3g}{where}. "
            "What went in is as it was; where the other form was written, `fxprune verify` on the two shows every case."
        )


def tolerance_for(dtype: torch.dtype, *, runtime: bool = False) -> float:
    """Allowed absolute difference of logits.

    Args:
        dtype: precision of the compared forms.
        runtime: whether one of them runs in another runtime, with its own kernels.

    Returns:
        1e-4 in float32 (1e-3 across runtimes); two hundred units of roundoff in lower precision.
    """
    if dtype in {torch.float32, torch.float64}:
        return 1e-3 if runtime else 1e-4
    return 200 * torch.finfo(dtype).eps


ROUNDINGS = 4
"""How many times a graph's own rounding another form's logits may be away, where rounding must be allowed for."""
DOUBLE_TOLERANCE = 1e-8
"""Allowed difference of logits between two graphs run in float64: what is equal but for rounding stays far below."""


def _script(batch: int, padding: int, vocabulary: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Tokens of three steps (prefill 6, continue with 3, then 1) and the mask over all of them."""
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randint(0, vocabulary, (batch, length), generator=generator) for length in (6, 3, 1)]
    mask = torch.ones(batch, 10, dtype=torch.long)
    mask[0, :padding] = 0
    return steps, mask


def compare_runners(
    rung: str,
    reference: Runner,
    candidate: Runner,
    *,
    vocabulary: int,
    tolerance: float,
    device: torch.device,
    longer: int = 0,
) -> Rung:
    """Compare the logits of two forms over all cases.

    Args:
        rung: name of the comparison.
        reference: the form that is right by definition.
        candidate: the form to be checked.
        vocabulary: tokens are drawn below this.
        tolerance: allowed absolute difference.
        device: where the tokens go.
        longer: tokens of one more sequence, which runs at once; none for 0.

    Returns:
        The rung; `passed` is False also for NaN.
    """
    expected, given = (
        answers(runner, vocabulary=vocabulary, device=device, longer=longer) for runner in (reference, candidate)
    )
    worst = largest_difference(expected, given)
    return Rung(rung, worst, tolerance, worst <= tolerance, len(expected))


def answers(runner: Runner, *, vocabulary: int, device: torch.device, longer: int = 0) -> list[Tensor]:
    """The logits of a form at all positions of all cases that are no padding, (positions, vocabulary) each.

    Args:
        runner: the form.
        vocabulary: ids are drawn below this.
        device: where the runner wants its inputs.
        longer: tokens of one more sequence, which is run first; none when 0.
    """
    found = []
    if longer:
        tokens = torch.randint(0, vocabulary, (1, longer), generator=torch.Generator().manual_seed(4)).to(device)
        positions = torch.arange(longer, device=device).unsqueeze(0)
        found.append(_at_least_float(runner.step(tokens, torch.ones_like(tokens), positions, None)[0])[0])
    for parts, mask in _cases(vocabulary):
        past: Any = None
        seen = 0
        for part in parts:
            new = part.shape[1]
            seen += new
            so_far = mask[:, :seen].to(device)
            out, past = runner.step(part.to(device), so_far, position_ids_from_mask(so_far, new), past)
            found.append(_at_least_float(out)[so_far[:, -new:].bool()])
    return found


def _cases(vocabulary: int) -> list[tuple[list[Tensor], Tensor]]:
    shapes = [(1, 0), (2, 0), (1, 2), (2, 2)]
    return [_script(batch, padding, vocabulary, seed) for seed, (batch, padding) in enumerate(shapes)]


def script_tokens(vocabulary: int, device: torch.device) -> Tensor:
    """The tokens that the forms are compared on, a sequence a row, (rows, 10) int64."""
    return torch.cat([torch.cat(tokens, dim=1) for tokens, _ in _cases(vocabulary)]).to(device)


def largest_difference(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """The largest absolute difference of tensors in pairs; infinite where a NaN is."""
    errors = [(a - b).abs().max().item() for a, b in zip(expected, given, strict=True) if a.numel()]
    return max((error if error == error else float("inf") for error in errors), default=0.0)  # noqa: PLR0124 - NaN


def _at_least_float(tensor: Tensor) -> Tensor:
    """Half precision as float32; float64 stays, or its own rounding to float32 would be compared."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def compare_modules(rung: str, reference: Any, candidate: Any, inputs: tuple[Any, ...], tolerance: float) -> Rung:
    """Compare two callables that return flat tuples of tensors, for models that are no causal language models."""
    with torch.no_grad():
        expected, given = _tensors(reference(*inputs)), _tensors(candidate(*inputs))
    worst = largest_difference([_at_least_float(a) for a in expected], [_at_least_float(b) for b in given])
    return Rung(rung, worst, tolerance, worst <= tolerance, 1)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the output of every projection, under its module's name."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        result = super().run_node(n)
        projection = n.op == "call_module" or n.target in {
            torch.ops.aten.linear.default,
            torch.ops.aten.addmm.default,
        }
        if projection and isinstance(result, Tensor):
            self.seen.setdefault(module_of(n), result)
        return result


def first_difference(reference: Form, candidate: Form, tolerance: float) -> str:
    """The first projection whose output differs between two forms, by qualified name; empty if none does.

    Outputs of different widths (rows that slimming removed) are skipped: the difference shows in the next consumer.
    """
    recorded = []
    for form in (reference, candidate):
        if isinstance(form.module, GraphModule):
            recorder = _Recorder(form.module)
            with torch.no_grad():
                recorder.run(*_from_nothing(form.interface).values())
            recorded.append(recorder.seen)
        else:
            recorded.append(_record_eager(form.module, form.interface))
    for name, value in recorded[1].items():
        other = recorded[0].get(name)
        if other is not None and other.shape == value.shape:
            error = (other.float() - value.float()).abs().max()
            if not bool(error <= tolerance):
                return name
    return ""


def _from_nothing(interface: Interface) -> dict[str, Tensor]:
    """The example inputs with an empty cache and no padding, so that dense and slim forms see the same past."""
    cache = {entry.input for entry in interface.cache}
    examples = dict(interface.example_inputs)
    if cache:
        new = examples["input_ids"].shape[1]
        examples = {name: t[:, :, :0] if name in cache else t for name, t in examples.items()}
        examples["attention_mask"] = torch.ones_like(examples["attention_mask"][:, :new])
    return examples


def _record_eager(model: nn.Module, interface: Interface) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    cache = {entry.input for entry in interface.cache}
    inputs = {name: tensor for name, tensor in _from_nothing(interface).items() if name not in cache}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "weight") and not list(module.children()):

                def hook(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        seen.setdefault(name, output)

                stack.callback(module.register_forward_hook(hook).remove)
        with torch.no_grad():
            model(**inputs)
    return seen


def reexported(graph_module: GraphModule, interface: Interface) -> GraphModule:
    """Export a flat graph again; shapes and metadata of the result are right by construction."""
    shapes = tuple(dict.fromkeys(interface.dynamic_axes[name], torch.export.Dim.AUTO) for name in interface.inputs)
    with torch.no_grad():
        exported = torch.export.export(
            graph_module, tuple(interface.example_inputs.values()), dynamic_shapes=shapes, strict=False
        )
    return exported.module(check_guards=False)


def in_double(form: Form) -> Form:
    """A copy of a graph form in float64, its own casts to other floating dtypes included."""
    assert isinstance(form.module, GraphModule)
    module = copy_graph_module(form.module)
    module = copy.deepcopy(module).double()

    def widen(argument: Any) -> Any:
        lower = isinstance(argument, torch.dtype) and argument.is_floating_point
        return torch.float64 if lower else argument

    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, widen)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, widen)
    module.recompile()
    examples = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in form.interface.example_inputs.items()
    }
    return Form(module, replace(form.interface, example_inputs=examples))
