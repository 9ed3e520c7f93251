"""The end of the loss: from what the lm_head reads to the cross-entropy and back, a chunk of positions at a time.

Logits of a long vocabulary are the largest tensor of a language model, and the gradient needs them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxprune.calibration.distillation import token_kl
from fxprune.channels.attention_shapes import POINTWISE, only_operand, op_name
from fxprune.channels.block_linears import lm_heads
from fxprune.core.errors import NotFiniteError, PreconditionError
from fxprune.core.precision import coarsest, is_low
from fxprune.core.widened import Widened
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from fxprune.core.program import Program

__all__ = ["Labels", "LossHead", "Targets", "is_finite", "make_targets"]

Labels = Literal["data", "sampled", "mixed"]

_LOGITS_AT_ONCE = 1 << 24
"""Elements of the logits of one chunk of positions."""
_ON_ANY_SHAPE = (POINTWISE - {"log_softmax", "softmax"}) | {
    "_to_copy", "alias", "bfloat16", "clone", "contiguous", "float", "half", "to",
}  # fmt: skip


@dataclass(frozen=True)
class Targets:
    """What is to be predicted at each position: a token, or where in the distribution to draw one.

    Attributes:
        tokens: (samples, length) int64; -1 where nothing is predicted, any other number where one is drawn.
        draws: (samples, length) float32 in [0, 1), or -1 where the text says what follows; None if it always does.
        teacher: (samples, length, hidden), what the lm_head reads in a model whose distribution is to be predicted;
            None without one.
    """

    tokens: Tensor
    draws: Tensor | None
    teacher: Tensor | None = None

    def on(self, samples: range) -> Targets:
        """The targets of some samples, flat."""
        part = slice(samples.start, samples.stop)
        draws = None if self.draws is None else self.draws[part].reshape(-1)
        teacher = None if self.teacher is None else self.teacher[part].flatten(0, 1)
        return Targets(self.tokens[part].reshape(-1), draws, teacher)

    def error(self, logits: Tensor, positions: slice, wanted: Tensor | None = None) -> Tensor:
        """Gradient of the summed loss by logits (positions, vocabulary), float32: p less the target.

        Args:
            logits: (positions, vocabulary).
            positions: which these are.
            wanted: the teacher's logits there, if there is one: the loss is the divergence from it.
        """
        chances = torch.softmax(logits.float(), -1)
        targets = self.tokens[positions]
        predicted = targets >= 0
        if wanted is not None:
            return chances.sub_(torch.softmax(wanted.float(), -1)).mul_(predicted[:, None])
        if self.draws is not None:
            upto = chances.cumsum(-1)
            drawn = torch.searchsorted(upto, self.draws[positions, None] * upto[:, -1:], right=True)[:, 0]
            asked = predicted & (self.draws[positions] >= 0)
            targets = torch.where(asked, drawn.clamp(max=chances.shape[1] - 1), targets)
        chances[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
        return chances.mul_(predicted[:, None])


def make_targets(tokens: Tensor, labels: Labels, seed: int) -> Targets:
    """Targets of samples (samples, length): each position's is the next token, or is drawn.

    Args:
        tokens: int64.
        labels: the tokens that follow in the text (`data`), ones drawn from the model's distribution (`sampled`), or
            both in turn, sample by sample (`mixed`).
        seed: of the draw, which does not depend on how samples are batched.
    """
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    if labels == "data":
        return Targets(following, None)
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    if labels == "mixed":
        draws[::2] = -1
    return Targets(following, draws.to(tokens.device))


class LossHead:
    """The lm_head with what follows it up to the logits, on any number of positions.

    Attributes:
        name: qualified name of the Linear.
        call: its node in the program's graph.
        source: name of the value that it reads.
        module: from (positions, in) to logits (positions, vocabulary).
        vocabulary: how many logits there are.

    Raises:
        PreconditionError: the program gives no logits, or not by one Linear and pointwise operators.
    """

    def __init__(self, program: Program) -> None:
        if "logits" not in program.interface.outputs:
            raise PreconditionError("gradients of the loss need logits: a causal language model")
        graph_module = program.graph_module
        heads = lm_heads(graph_module, outputs=program.interface.outputs)
        if len(heads) != 1:
            raise PreconditionError("the logits do not come from one lm_head; lift the graph's projections first")
        (self.name,) = heads
        self.vocabulary: int = get_attribute(graph_module, self.name).out_features
        nodes = [self._logits(program)]
        while nodes[-1].op != "call_module" or str(nodes[-1].target) != self.name:
            node = nodes[-1]
            before = only_operand(node)
            if before is None or op_name(node) not in _ON_ANY_SHAPE:
                raise PreconditionError(
                    f"{node.name} ({node.target}) behind {self.name} is not pointwise on the logits"
                )
            nodes.append(before)
        self.call = nodes[-1]
        source = self.call.args[0]
        assert isinstance(source, Node)
        self.source = source.name
        graph = Graph()
        copies: dict[Node, Node] = {source: graph.placeholder("x")}
        for node in reversed(nodes):
            for other in node.all_input_nodes:
                if other not in copies:  # a constant
                    copies[other] = graph.node_copy(other, copies.__getitem__)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[nodes[0]])
        self.module = GraphModule(graph_module, graph)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (positions, vocabulary) of what the lm_head reads, (positions, in) of any floating dtype.

        float32 whatever the model's precision is: what is measured on them must not be rounded to bfloat16 first.
        """
        weights = (*self.module.parameters(), *self.module.buffers())
        found: Tensor = Widened(self.module)(x) if is_low(coarsest(weights)) else self.module(x)
        return found

    @staticmethod
    def _logits(program: Program) -> Node:
        output = next(node for node in reversed(program.graph_module.graph.nodes) if node.op == "output")
        node = dict(zip(program.interface.outputs, output.args[0], strict=True))["logits"]
        assert isinstance(node, Node)
        return node

    def gradient(self, x: Tensor, targets: Targets, precision: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """Gradient of the cross-entropy, summed over the predicted tokens, by what the lm_head reads.

        Args:
            x: (..., in) what the lm_head reads at every position.
            targets: as many as there are positions.
            precision: the context in which the forward products run.

        Returns:
            In the shape and dtype of `x`.

        Raises:
            PreconditionError: the lm_head does not read every position.
            CalibrationError: the logits are not finite.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) != len(targets.tokens):
            raise PreconditionError(f"{self.name} reads {len(rows)} of {len(targets.tokens)} positions")
        result = torch.empty_like(rows)
        step = max(1, _LOGITS_AT_ONCE // self.vocabulary)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            chunk = rows[part].detach().requires_grad_()
            with torch.enable_grad(), precision():
                logits = self.module(chunk)
            with torch.no_grad(), precision():
                wanted = None if targets.teacher is None else self.module(targets.teacher[part].to(rows.dtype))
                error = targets.error(logits, part, wanted).to(logits.dtype)
            (result[part],) = torch.autograd.grad(logits, chunk, error)
        if not is_finite(result):
            raise NotFiniteError(
                f"{self.name} gave NaN or infinite logits; check its weights, or load the model in bfloat16 or float32"
            )
        return result.reshape(x.shape)


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one reading pass, with nothing of its size allocated."""
    return bool(torch.isfinite(value.detach().sum(dtype=torch.float32)))


def divergence(head: LossHead, states: Tensor, teacher: Tensor) -> float:
    """Mean divergence KL(teacher || student) of the predictions that the samples have targets for, nats a token.

    Args:
        head: the lm_head that both read.
        states: (samples, length, hidden), what it reads in the student.
        teacher: the same in the teacher.

    Raises:
        CalibrationError: it is not finite.
    """
    total = 0.0
    with torch.no_grad(), fast_products():
        for one, other in zip(states, teacher, strict=True):
            total += float(token_kl(head.logits(one[:-1]), head.logits(other[:-1])))
    mean = total / len(states)
    if not mean < float("inf"):
        raise NotFiniteError("the divergence from the dense model is not finite; check the weights of the pruned one")
    return mean
