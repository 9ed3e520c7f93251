"""Which numbers of tokens a graph with a cache holds for: those for which the model's own code takes the traced path.

A model may ask `if length > window` and compute something else beyond. torch notes the answer that the sample gave as
an inequality, and the graph has that path alone. Inequalities of torch's own code decide about shapes that broadcast,
and hold more than they say; they are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.tracing.cache import BATCH, PAST
from fxprune.tracing.outputs import named_results
from fxprune.tracing.sample import left_padded, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.export import ExportedProgram

    from fxprune.core.program import Interface

__all__ = ["starts_from_nothing", "unheld_length"]

_TORCH = Path(torch.__file__).parent
_NEW = (2, 4, 16)
"""Numbers of new tokens that are asked about; one alone is a case that torch decides without noting it."""
_UNLIKE_IN_SINGLE, _UNLIKE_IN_HALF = 1e-3, 0.05
"""Share of the largest logit by which graph and model may differ that run the same operators on a few tokens."""
_MOST = 2**20
"""Tokens in all that are asked about where a model names no longest sequence."""


def unheld_length(exported: ExportedProgram, new: int, past: int, longest: int | None) -> int | None:
    """The least number of tokens in all that takes another path through the model's code than the traced one.

    Args:
        exported: a graph with a cache; the numbers of its sample, `new`, `past`, their sum and the batch, are pairwise
            different, so that a length is told by its value there.
        new: tokens of the sample.
        past: tokens in the sample's cache.
        longest: tokens that the model is made for; None if it does not say.

    Returns:
        The number of tokens, at most `longest`; None if there is none.
    """
    sizes = next(node.meta["val"].shape for node in exported.graph.nodes if node.name == "input_ids")
    environment = next(size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))
    values = environment.backed_var_to_val
    asked = [each for each in _own_inequalities(environment) if each.free_symbols <= values.keys()]
    for seen, fresh in _cases(longest or _MOST):
        lengths = {new: fresh, past: seen, new + past: seen + fresh}
        at = {symbol: lengths.get(int(value), int(value)) for symbol, value in values.items() if value.is_Integer}
        if any(each.subs(at) == False for each in asked):  # noqa: E712 - sympy's false
            return seen + fresh
    return None


def _own_inequalities(environment: Any) -> Iterator[Any]:
    """What was decided about lengths by code outside torch."""
    for guard in environment.guards:
        filename = getattr(guard.sloc.framework_loc, "filename", None)  # unknown where nobody looked
        if filename is None or _TORCH in Path(filename).parents:
            continue
        if guard.expr.is_Relational and guard.expr.rel_op != "==":
            yield guard.expr


def _cases(longest: int) -> Iterator[tuple[int, int]]:
    """Tokens in the cache and new ones, by their sum."""
    totals = sorted({*range(4, min(longest, 65)), *(2**k + 1 for k in range(6, 21)), longest})
    for total in totals:
        for fresh in _NEW:
            if total <= longest and total - fresh >= 2:
                yield total - fresh, fresh


def starts_from_nothing(model: nn.Module, graph_module: torch.fx.GraphModule, interface: Interface) -> bool:
    """Whether a graph with a cache gives for a prompt, with an empty one, what the model gives for it.

    The sample has a past, and code that asks whether there is one has its answer baked into the graph.
    """
    caches = {entry.input for entry in interface.cache}
    ids = interface.example_inputs.get("input_ids")
    texts = {*interface.inputs} - caches <= {"input_ids", "attention_mask", "position_ids"}
    if ids is None or ids.is_meta or not caches or not texts or "logits" not in interface.outputs:
        return True
    tokens, mask = random_tokens(model.config, PAST, ids.device), left_padded(BATCH, PAST, ids.device)
    made = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": torch.arange(PAST, device=ids.device).repeat(BATCH, 1),
    }
    empty = {name: interface.example_inputs[name][:, :, :0] for name in caches}
    given = {name: made[name] for name in interface.inputs if name in made}
    with torch.no_grad(), named_results(model.config):
        got = graph_module(*(({**given, **empty})[name] for name in interface.inputs))
        wanted = model(**given, use_cache=False).logits
    seen = mask.bool()
    error = (dict(zip(interface.outputs, got, strict=True))["logits"] - wanted)[seen].abs().max()
    allowed = _UNLIKE_IN_HALF if wanted.dtype in {torch.bfloat16, torch.float16} else _UNLIKE_IN_SINGLE
    return not float(error) > allowed * float(wanted[seen].abs().max())
