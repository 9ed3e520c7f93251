"""How much of each projection goes: more where the loss minds less, the same in all.

Removing weight w_ij changes the loss, to second order and with the Fisher information factored into inputs and output
gradients, by about w_ij^2 E[x_j^2] E[g_i^2] / 2, where g is the gradient of the loss by the projection's output (the
diagonal of K-FAC, Martens & Grosse 2015, on the optimal brain damage of LeCun et al. 1990). One ranking of this over
all projections says what share of each would go; the share used lies between that and the uniform one, because updating
solvers mend more where more is removed.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.channels import get_attribute
from fxprune.engine import text_samples
from fxprune.errors import CalibrationError, PreconditionError
from fxprune.graphs import copy_graph_module
from fxprune.matmul import fast_products
from fxprune.progress import track
from fxprune.sparsity import Sparsity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fxprune.program import Program

__all__ = ["allocate_by_loss", "blend_shares", "loss_sensitivity", "shares_by_ranking"]

_SAMPLES = 8
_STRENGTH = 0.5
_LIMIT = 0.12
_HISTOGRAM = 4096


def allocate_by_loss(
    program: Program,
    targets: Mapping[str, Sparsity],
    tokens: Tensor,
    forward_dtype: torch.dtype | None = None,
    *,
    samples: int = _SAMPLES,
    strength: float = _STRENGTH,
    limit: float = _LIMIT,
) -> dict[str, Sparsity]:
    """Shares that differ between projections and remove as many weights in all as the given ones.

    Args:
        program: a lifted program of a causal language model, with its weights.
        targets: the projections and what would go of each; those with a pattern stay as they are.
        tokens: (samples, length) int64, calibration text; the first `samples` are used.
        forward_dtype: precision of the products of the forward pass.
        samples: how many sequences.
        strength: 0 leaves the shares as they are, 1 takes the ranking's.
        limit: no share moves further than this.

    Returns:
        Sparsity by projection.

    Raises:
        PreconditionError: the program gives no logits, a target is not an ordinary Linear, or its weight is not finite.
        CalibrationError: activations or gradients are not finite.
    """
    free = {name: target.share for name, target in targets.items() if target.m is None}
    grouped = [name for name in free if not isinstance(get_attribute(program.graph_module, name), nn.Linear)]
    if grouped:
        raise PreconditionError(f"allocation=loss does not handle experts yet ({grouped[0]}); use allocation=uniform")
    if not free:
        return dict(targets)
    weights = {name: get_attribute(program.graph_module, name).weight.detach() for name in free}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise PreconditionError(f"{name}: its weight holds NaN or infinity; the checkpoint is broken")
    inputs, outputs = loss_sensitivity(program, list(free), tokens[:samples], forward_dtype)
    scores = {name: _log_scores(weight, inputs[name], outputs[name]) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    removed = sum(share * weights[name].numel() for name, share in free.items())
    ranked = shares_by_ranking(scores, removed / total)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    blended = blend_shares(free, ranked, sizes, strength=strength, limit=limit)
    return {name: Sparsity(blended[name]) if name in blended else target for name, target in targets.items()}


def loss_sensitivity(
    program: Program, linears: list[str], tokens: Tensor, forward_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean squares of what Linears read, and of the gradient of the next-token loss by what they put out.

    Args:
        program: a lifted program of a causal language model.
        linears: qualified names.
        tokens: (samples, length) int64; one sample runs at a time.
        forward_dtype: precision of the products.

    Returns:
        (in,) and (out,) float64 by name, per token; the loss is summed over tokens.

    Raises:
        PreconditionError: the program gives no logits.
        CalibrationError: activations or gradients are not finite.
    """
    if "logits" not in program.interface.outputs:
        raise PreconditionError("allocation=loss needs logits: a causal language model")
    graph_module = copy_graph_module(program.graph_module)
    squares: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}}

    def add(kind: str, name: str, value: Tensor) -> None:
        found = value.detach().reshape(-1, value.shape[-1]).float().square().sum(0).double()
        squares[kind][name] = squares[kind].get(name, 0) + found

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            add("in", name, args[0])
            if not output.requires_grad:  # the first one: nothing before it has a gradient
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: add("out", name, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    samples = text_samples(program.interface, tokens)
    fixed = dict(samples.fixed(1))
    logits_at = program.interface.outputs.index("logits")
    parameters = [p for p in graph_module.parameters() if p.requires_grad]
    with ExitStack() as stack, track("sensitivity of the loss", len(tokens)) as advance:
        stack.enter_context(_without_gradients(parameters))
        for name in linears:
            handle = get_attribute(graph_module, name).register_forward_hook(watch(name))
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fast_products())
        for index in range(len(tokens)):
            given = {**fixed, **{name: tensor[index : index + 1] for name, tensor in samples.varying.items()}}
            with torch.autocast(tokens.device.type, forward_dtype, enabled=forward_dtype is not None):
                logits = graph_module(*(given[name] for name in program.interface.inputs))[logits_at]
            targets = tokens[index, 1:]
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            advance(index + 1)
    for kind, what in (("in", "inputs"), ("out", "gradients")):
        for name in linears:
            if not bool(torch.isfinite(squares[kind][name]).all()):
                raise CalibrationError(
                    f"{name} has {what} that are NaN or infinite on the calibration text; check the weights before it, "
                    "or calibrate in float32"
                )
    count = tokens.numel()
    return tuple({name: squares[kind][name] / count for name in linears} for kind in ("in", "out"))  # type: ignore[return-value]


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def _log_scores(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """log(w_ij^2 E[x_j^2] E[g_i^2]) of a weight (out, in), float32."""
    scores = weight.float().abs().log_().mul_(2)
    return scores.add_(inputs.log().float()).add_(outputs.log().float()[:, None])


def shares_by_ranking(scores: Mapping[str, Tensor], share: float) -> dict[str, float]:
    """The share of each tensor's scores among the lowest `share` of all, found on a histogram.

    Args:
        scores: logarithms, float32; minus infinity for a score of zero, which is among the lowest.
        share: of all scores.
    """
    ends = [value[value.isfinite()].aminmax() for value in scores.values() if bool(value.isfinite().any())]
    if not ends:
        return dict.fromkeys(scores, share)
    low, high = min(float(least) for least, _ in ends), max(float(most) for _, most in ends)
    counts = {name: torch.histc(value.clamp(min=low), _HISTOGRAM, low, high).double() for name, value in scores.items()}
    total = torch.stack(list(counts.values())).sum(0).cumsum(0)
    place = int(torch.searchsorted(total, share * total[-1]))
    return {name: float(count[: place + 1].sum() / count.sum()) for name, count in counts.items()}


def blend_shares(
    uniform: Mapping[str, float],
    ranked: Mapping[str, float],
    sizes: Mapping[str, int],
    *,
    strength: float,
    limit: float,
) -> dict[str, float]:
    """Shares between two, none further than `limit` from the first, that remove as much in all as the first do."""
    names = list(uniform)
    first = torch.tensor([uniform[name] for name in names], dtype=torch.float64)
    second = torch.tensor([ranked[name] for name in names], dtype=torch.float64)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    lowest = (first - limit).clamp(min=0)
    highest = (first + limit).clamp(max=0.99)

    def shifted(shift: float) -> Tensor:
        return (first + strength * (second - first) + shift).clamp(lowest, highest)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((shifted(middle) * size).sum()) > float((first * size).sum()):
            high = middle
        else:
            low = middle
    return dict(zip(names, shifted(high).tolist(), strict=True))
