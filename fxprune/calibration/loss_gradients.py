"""Gradients of the next-token loss through a traced graph, with the memory of one block.

    forward                 ┃ block ┃ block ┃ ... ┃ block ─ lm_head     kept of one batch: what lies at the bars
    backward, last first          a block runs again with gradients, which end at the bar before it

The graph is cut by `fxprune.calibration.stages`, so that blocks are found by data flow; logits exist for a chunk of
positions at a time. It is gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost")
with one checkpoint a block. Weights are frozen unless their gradients are asked for.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from fxprune.calibration.engine import text_samples
from fxprune.calibration.loss_head import Labels, LossHead, Targets, is_finite, make_targets
from fxprune.calibration.stages import cut_stages
from fxprune.core.errors import CalibrationError, NotFiniteError, PreconditionError, UsageError
from fxprune.core.progress import track
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.lifted_graphs import linear_calls
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.fx import GraphModule, Node

    from fxprune.calibration.stages import Cut, Stage
    from fxprune.core.program import Program

__all__ = ["LinearCall", "backpropagate_loss", "loss_gradients"]

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class LinearCall:
    """One call of a watched Linear, seen from the loss.

    Attributes:
        linear: its qualified name.
        samples: which samples the batch holds.
        x: (..., in) what it read, in the graph's dtype.
        by_input: (..., in) gradient of the loss by what this call read (not by other readers of the same value).
        by_output: (..., out) gradient of the loss by what it put out, in the dtype of the product.
    """

    linear: str
    samples: range
    x: Tensor
    by_input: Tensor
    by_output: Tensor


def backpropagate_loss(
    program: Program,
    linears: Iterable[str],
    tokens: Tensor,
    watch: Callable[[LinearCall], None],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    batch_size: int | None = None,
    labels: Labels = "data",
    teacher: Tensor | None = None,
    seed: int = 0,
    forward_dtype: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Back-propagate the next-token cross-entropy, summed over the predicted tokens, through a causal language model.

    Args:
        program: a lifted program with its weights; it is left as it is.
        linears: qualified names of the Linears to watch.
        tokens: (samples, length) int64, on the device of the weights; length at least 2.
        watch: called for every call of a watched Linear that the loss depends on, from the last one to the first. The
            lm_head is called for a chunk of positions of the batch, (positions, in), not sample by sample.
        parameters: parameters before the lm_head whose gradients are wanted, by any name.
        batch_size: samples at once; None takes about 2,048 tokens.
        labels: the tokens that follow in the text (`data`, the empirical Fisher information), or ones drawn from the
            model's own distribution (`sampled`, the Fisher information itself), or both in turn (`mixed`).
        teacher: (samples, length, hidden), what the lm_head reads in another model (see
            `fxprune.calibration.head_inputs.head_inputs`): the loss is the divergence from its predictions, and labels
            do not count.
        seed: of the draw, which does not depend on the batch size.
        forward_dtype: precision of the products; None for the graph's own.
        on_batch: called after each batch with the number of samples done.

    Returns:
        The gradient of the loss, summed over all samples, by each of `parameters`: float32 in its shape.

    Raises:
        UsageError: an option has an impossible value.
        PreconditionError: the program gives no logits, or they do not come from a Linear and pointwise operators.
        CalibrationError: the samples are too short, or a value or a gradient is not finite.
    """
    if labels not in get_args(Labels):
        raise UsageError(f"labels={labels!r} is not known; use one of {', '.join(get_args(Labels))}")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is not possible; use at least 1")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise CalibrationError(f"samples of shape {tuple(tokens.shape)} predict no token; use sequences of 2 or more")
    size = batch_size or max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    targets = replace(make_targets(tokens, labels, seed), teacher=teacher)
    watched = tuple(dict.fromkeys(linears))
    for name in watched:
        if not isinstance(get_attribute(program.graph_module, name), nn.Linear):
            raise PreconditionError(f"{name} is not an ordinary Linear; gradients by experts are not collected")
    with ExitStack() as stack:
        advance = stack.enter_context(track("gradients of the loss", len(tokens)))
        run = _Backward(program, watched, tokens, watch=watch, parameters=parameters or {}, forward_dtype=forward_dtype)
        stack.enter_context(_requiring_gradients(program.graph_module, {id(p) for p in run.parameters.values()}))
        stack.enter_context(run.watching())
        stack.enter_context(fast_products())
        for first in range(0, len(tokens), size):
            batch = range(first, min(first + size, len(tokens)))
            run.batch(batch, targets.on(batch))
            advance(batch.stop)
            if on_batch is not None:
                on_batch(batch.stop)
    return run.sums


@contextmanager
def loss_gradients(
    program: Program,
    tokens: Tensor,
    parameters: Mapping[str, nn.Parameter],
    *,
    teacher: Tensor,
    forward_dtype: torch.dtype | None = None,
) -> Iterator[Callable[[range], dict[str, Tensor]]]:
    """Gradients of one batch after another, for a training: the graph is cut once, the parameters may move in place.

    Args:
        program: see `backpropagate_loss`, as what follows.
        tokens: see there.
        parameters: see there.
        teacher: see there.
        forward_dtype: see there.

    Yields:
        From a range of samples to the gradient of the divergence, summed over their predicted tokens, by each of
        `parameters`: float32 in its shape, valid until the next call.

    Raises:
        PreconditionError: see there.
        CalibrationError: see there.
    """
    targets = replace(make_targets(tokens, "data", 0), teacher=teacher)
    run = _Backward(program, (), tokens, watch=lambda _: None, parameters=parameters, forward_dtype=forward_dtype)

    def gradients(samples: range) -> dict[str, Tensor]:
        for total in run.sums.values():
            total.zero_()
        run.batch(samples, targets.on(samples))
        return run.sums

    with _requiring_gradients(program.graph_module, {id(p) for p in parameters.values()}), fast_products():
        yield gradients


@contextmanager
def _requiring_gradients(graph_module: GraphModule, wanted: set[int]) -> Iterator[None]:
    """Only the parameters with these identities require gradients while the block runs."""
    before = [(parameter, parameter.requires_grad) for parameter in graph_module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class _Segment:
    """Stages of one block, between two bars.

    Attributes:
        stages: in the order in which they run.
        reads: values of earlier segments.
        keeps: values that later segments read.
    """

    stages: tuple[Stage, ...]
    reads: tuple[str, ...]
    keeps: tuple[str, ...]


def _segments(cut: Cut) -> list[_Segment]:
    blocks = [tuple(stages) for _, stages in groupby(cut.stages, key=lambda stage: stage.block)]
    made = [{name for stage in stages for name in stage.outputs} for stages in blocks]
    read = [dict.fromkeys(name for stage in stages for name in stage.inputs) for stages in blocks]
    earlier = [set().union(*made[:index]) for index in range(len(blocks))]
    later = [set().union(*read[index + 1 :]) for index in range(len(blocks))]
    return [
        _Segment(
            stages,
            tuple(name for name in read[index] if name in earlier[index]),
            tuple(sorted(made[index] & later[index])),
        )
        for index, stages in enumerate(blocks)
    ]


class _Backward:
    """One backward pass after another through a graph in segments.

    Attributes:
        parameters: those whose gradients are wanted.
        sums: their gradients so far.
    """

    def __init__(
        self,
        program: Program,
        linears: tuple[str, ...],
        tokens: Tensor,
        *,
        watch: Callable[[LinearCall], None],
        parameters: Mapping[str, nn.Parameter],
        forward_dtype: torch.dtype | None,
    ) -> None:
        self.root = program.graph_module
        self.head = LossHead(program)
        self.samples = text_samples(program.interface, tokens)
        # Cut at every Linear, watched or not: blocks stay as small as the model's, and little but the residual is kept.
        targets = dict.fromkeys([*_linears_before(self.root, self.head.call), *linears, self.head.name])
        self.cut = cut_stages(self.root, targets, self.samples.varying)
        self.segments = _segments(self.cut)
        self.linears = linears
        self.watch = watch
        self.forward_dtype = forward_dtype
        self.device = tokens.device
        self.parameters = dict(parameters)
        self.sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self._contexts: dict[int, dict[str, Any]] = {}
        self._samples = range(0)
        self._pending: dict[str, Callable[[Tensor], None]] = {}
        self._leaves: list[Tensor] = []
        modules = {id(get_attribute(self.root, name)) for name in linears}
        self._first = next(i for i, s in enumerate(self.segments) if self._concerned(s, modules) or self._last(i))

    def _last(self, index: int) -> bool:
        return index + 1 == len(self.segments)

    def _concerned(self, segment: _Segment, modules: set[int]) -> bool:
        """Whether a segment runs a watched Linear or holds a parameter whose gradient is wanted."""
        parts = [part for stage in segment.stages for part in stage.module.modules()]
        return any(id(part) in modules for part in parts) or bool(self._parameters_of(segment))

    def _parameters_of(self, segment: _Segment) -> dict[str, nn.Parameter]:
        held = (parameter for stage in segment.stages for parameter in stage.module.parameters())
        return {self.names[id(parameter)]: parameter for parameter in held if id(parameter) in self.names}

    # --- one batch ------------------------------------------------------------------------------------------------

    def batch(self, samples: range, targets: Targets) -> None:
        """Run one batch forward and back."""
        self._samples = samples
        kept: dict[str, Any] = {}
        with torch.no_grad():
            for segment in self.segments[:-1]:  # the last one runs once, with gradients
                values = self._run(segment, kept)
                kept |= {name: values[name] for name in (*segment.keeps, self.head.source) if name in values}
        gradients: dict[str, Tensor] = {}
        if self.head.source in kept:
            gradients[self.head.source] = self.head.gradient(kept[self.head.source], targets, self._precision)
        for index in reversed(range(self._first, len(self.segments))):
            segment = self.segments[index]
            leaves = {name: _leaf(kept[name]) for name in segment.reads if _floats(kept[name])}
            self._leaves = []
            with torch.enable_grad():
                values = self._run(segment, {**kept, **leaves})
            if self._last(index) and self.head.source in values and self.head.source not in gradients:
                gradients[self.head.source] = self.head.gradient(values[self.head.source], targets, self._precision)
            self._back(segment, values, leaves, gradients)
            for name in segment.keeps:
                kept.pop(name, None)

    def _run(self, segment: _Segment, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Run a segment's stages; returns what it kept, read and computed, by name."""
        given = {**self._context(len(self._samples)), **kept}
        given |= {
            name: tensor[self._samples.start : self._samples.stop] for name, tensor in self.samples.varying.items()
        }
        made: dict[str, Any] = {}
        for stage in segment.stages:
            with self._precision():
                results = stage.module(*(made[name] if name in made else given[name] for name in stage.inputs))
            names = (*stage.outputs, *(site.value for site in stage.sites))
            made.update(zip(names, results, strict=True))
            for site in stage.sites:
                if not is_finite(made[site.value]):
                    raise NotFiniteError(
                        f"{site.linears[0]} read NaN or infinite values on the calibration text; check the weights "
                        "before it, or load the model in bfloat16 or float32"
                    )
        return made

    def _back(
        self,
        segment: _Segment,
        values: Mapping[str, Any],
        leaves: Mapping[str, Tensor],
        gradients: dict[str, Tensor],
    ) -> None:
        """Hand the gradients of what a segment computed on to what it read."""
        outputs = [name for name in values if name in gradients and values[name].requires_grad]
        parameters = self._parameters_of(segment)
        inputs = [*leaves.values(), *parameters.values(), *self._leaves]
        if outputs and inputs:
            found: Sequence[Tensor | None] = torch.autograd.grad(
                [values[name] for name in outputs],
                inputs,
                [gradients[name] for name in outputs],
                allow_unused=True,
            )
            for name in values:
                gradients.pop(name, None)
            split = len(leaves)
            for name, gradient in zip(leaves, found[:split], strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            for name, gradient in zip(parameters, found[split : split + len(parameters)], strict=True):
                if gradient is not None:
                    if not is_finite(gradient):
                        raise NotFiniteError(
                            f"the gradient of the loss by {name} is NaN or infinite; load the model in bfloat16 or "
                            "float32"
                        )
                    self.sums[name].add_(gradient)

    def _context(self, size: int) -> dict[str, Any]:
        """Inputs that all samples share, and what follows from them, for a batch of so many samples."""
        if size not in self._contexts:
            fixed = dict(self.samples.fixed(size))
            given = fixed | {name: tensor[:size] for name, tensor in self.samples.varying.items()}
            with torch.no_grad():
                results = self.cut.context(*(given[name] for name in self.cut.context_inputs))
            self._contexts[size] = {**fixed, **dict(zip(self.cut.context_outputs, results, strict=True))}
        return self._contexts[size]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.forward_dtype, enabled=self.forward_dtype is not None)

    # --- watched Linears ------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the watched Linears while the block runs; the forward pass without gradients passes them by."""
        with ExitStack() as stack:
            for name in self.linears:
                module = get_attribute(self.root, name)
                stack.callback(module.register_forward_pre_hook(self._before(name)).remove)
                stack.callback(module.register_forward_hook(self._after(name)).remove)
            yield

    def _before(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            del module
            if not torch.is_grad_enabled():
                return None
            x = args[0].detach()
            if args[0].requires_grad:
                own = args[0].view_as(args[0])  # a value of its own: others may read it too
            else:
                own = _leaf(x)
                self._leaves.append(own)
            seen: list[Tensor] = []

            def by_output(gradient: Tensor) -> None:
                if not is_finite(gradient):
                    raise NotFiniteError(
                        f"the gradient of the loss by the output of {name} is NaN or infinite; load the model in "
                        "bfloat16 or float32"
                    )
                seen.append(gradient)

            def by_input(gradient: Tensor) -> None:
                self.watch(LinearCall(name, self._samples, x, gradient, seen.pop()))

            own.register_hook(by_input)  # type: ignore[no-untyped-call]
            self._pending[name] = by_output
            return (own, *args[1:])

        return hook

    def _after(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module, args
            if torch.is_grad_enabled():
                output.register_hook(self._pending.pop(name))  # type: ignore[no-untyped-call]

        return hook


def _linears_before(graph_module: GraphModule, end: Node) -> list[str]:
    """Names of the Linears that lead to a node, in graph order."""
    before: set[Node] = set()
    pending = list(end.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in before:
            before.add(node)
            pending += node.all_input_nodes
    return [name for name, calls in linear_calls(graph_module).items() if not before.isdisjoint(calls)]


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
