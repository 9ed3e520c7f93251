"""Where a model's values leave the range of its precision: one more forward pass that looks at every value.

float16 ends at 65,504. What lies beyond is infinite, and soon NaN; whatever is learned from such values is nothing.
Passes look only at what they sum up. When that is not finite, the first value that is not is found here, from the
projection where it showed back to the operator that made it, and named by its module.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.calibration.engine import text_samples
from fxprune.core.errors import NotFiniteError, VerificationError
from fxprune.core.precision import short_name
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.nodes import get_attribute, module_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import GraphModule, Node

    from fxprune.core.program import Program

__all__ = ["Overflow", "described", "find_overflow", "naming_overflow"]


@dataclass(frozen=True)
class Overflow:
    """The first value that is not finite.

    Attributes:
        module: qualified name of the module that computed it.
        operator: what made it, such as `mul` or `Linear`.
        dtype: of the value.
        weights: whether the module's own weights are finite.
        sample: which of the samples.
    """

    module: str
    operator: str
    dtype: torch.dtype
    weights: bool
    sample: int


class _Looking(torch.fx.Interpreter):
    """Notes of every value whether it is finite."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.bad: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        result = super().run_node(n)
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                self.bad.setdefault(n, value.dtype)
        return result


def find_overflow(program: Program, tokens: Tensor, forward_dtype: torch.dtype | None = None) -> Overflow | None:
    """Run samples one by one until a projection or the logits see a value that is not finite; None if none does.

    Masks of attention hold infinities by right, so a value counts only if it reaches a projection or the output.

    Args:
        program: a program that reads text; left as it is.
        tokens: (samples, length) int64, on the device of the weights.
        forward_dtype: precision of the products; None for the graph's own.

    Raises:
        PreconditionError: the graph needs inputs that text does not give.
    """
    graph_module = program.graph_module
    for index, sample in enumerate(tokens):
        row = sample[None]
        samples = text_samples(program.interface, row)
        given = {**samples.fixed(1), **samples.varying}
        looking = _Looking(graph_module)
        with torch.no_grad(), torch.autocast(row.device.type, forward_dtype, enabled=forward_dtype is not None):
            looking.run(*(given[name] for name in program.interface.inputs), enable_io_processing=False)
        end = next((node for node in graph_module.graph.nodes if _counts(program, node, looking.bad)), None)
        if end is not None:
            return _origin(graph_module, end, looking.bad, index)
    return None


def _counts(program: Program, node: Node, bad: dict[Node, torch.dtype]) -> bool:
    """Whether a node is a projection that reads or makes, or the output that gives, what is not finite."""
    if node.op == "output":
        named = dict(zip(program.interface.outputs, node.args[0], strict=True))  # type: ignore[arg-type]  # flat outputs
        return named.get("logits") in bad
    if node.op != "call_module" or not is_projection(get_attribute(program.graph_module, str(node.target))):
        return False
    return node in bad or any(source in bad for source in node.all_input_nodes)


def _origin(graph_module: GraphModule, end: Node, bad: dict[Node, torch.dtype], sample: int) -> Overflow:
    """From a value that is not finite back to the first one that is made of finite ones."""
    node = end
    while True:
        before = next((source for source in node.all_input_nodes if source in bad), None)
        if before is None:
            break
        node = before
    name, weights = module_of(node), True
    if node.op == "call_module":
        module = get_attribute(graph_module, str(node.target))
        operator = "Linear" if is_projection(module) else type(module).__name__
        weights = all(bool(torch.isfinite(one).all()) for one in module.parameters())
    elif node.op == "get_attr":
        name, operator, weights = str(node.target), "weight", False
    else:
        operator = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    return Overflow(name, operator, bad[node], weights, sample)


def described(found: Overflow, text: str = "the calibration text") -> str:
    """What is wrong, where, and what to do."""
    where = found.module or "the model"
    if not found.weights:
        return f"{where} has weights that are NaN or infinite: the checkpoint is damaged; get it anew"
    if torch.finfo(found.dtype).max >= torch.finfo(torch.bfloat16).max:
        return (
            f"the output of {where} ({found.operator}) is NaN or infinite in {short_name(found.dtype)} on {text}; "
            "check the model's weights"
        )
    return (
        f"{where} ({found.operator}) overflows {short_name(found.dtype)}, which ends at "
        f"{torch.finfo(found.dtype).max:,.0f}, on {text}: load the model with dtype=bfloat16 or float32"
    )


@contextmanager
def naming_overflow(
    program: Program, tokens: Tensor | None, forward_dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Say of an error inside, where values that are not finite are behind it, which module they come from.

    Nothing is looked at unless the block fails.

    Args:
        program: the dense program that the block runs.
        tokens: (samples, length) int64, what it runs it on, unless the error knows better; None where only it does.
        forward_dtype: precision of the products.

    Raises:
        NotFiniteError: in place of an error of the block, if one more forward pass finds a value that is not finite.
    """
    try:
        yield
    except (NotFiniteError, VerificationError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        run = getattr(error, "tokens", None)
        run = tokens if run is None else run
        found = None if run is None else find_overflow(program, run, forward_dtype)
        if found is not None:
            raise NotFiniteError(described(found)) from error
        raise
