"""Runners: one way to drive every form of a causal language model (eager, traced graph, ONNX Runtime, ...).

A runner takes tokens and a cache and returns logits and the longer cache. Verification, perplexity, greedy text and
the benchmark are written once against this protocol and serve every form.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from fxprune.core.errors import PreconditionError
from fxprune.runtimes.matmul import wide_products
from fxprune.tracing.outputs import named_results

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from fxprune.core.program import Interface, Program

__all__ = [
    "EagerRunner",
    "GraphRunner",
    "Past",
    "Runner",
    "greedy",
    "position_ids_from_mask",
    "rerun",
    "scoring_products",
    "text_maker",
]

Past = Any
"""What a runner keeps between steps. Each makes and understands its own: the model's cache object, flat tensors, ...

A step may change what it is given. To go on twice from one state, copy it with the runner's `fork(past)` where it has
one; where it has none, a past is a list of tensors.
"""


@runtime_checkable
class Runner(Protocol):
    """Anything that continues a batch of sequences."""

    name: str

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """Run new tokens on a cache.

        Args:
            input_ids: (batch, new) int64.
            attention_mask: (batch, past + new) int64, 0 for padding.
            position_ids: (batch, new) int64.
            past: the cache a former step returned; None to start.

        Returns:
            Logits (batch, new, vocabulary) and the cache for the next step.
        """
        ...


def position_ids_from_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Positions of the last `new` tokens when padding does not count: (batch, new) int64."""
    positions: Tensor = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions[:, -new:]


def rerun(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    past: Past | None,
) -> tuple[Tensor, Past]:
    """Continue without a cache, by running all tokens again; the past is the tokens and their positions.

    Args:
        run: from tokens, mask and positions, (batch, past + new) each, to logits (batch, past + new, vocabulary).
        input_ids: see `Runner.step`, as the rest.
        attention_mask: see `Runner.step`.
        position_ids: see `Runner.step`.
        past: see `Runner.step`.
    """
    new = [input_ids, position_ids.expand_as(input_ids)]
    seen = new if past is None else [torch.cat(pair, dim=1) for pair in zip(past, new, strict=True)]
    logits = run(seen[0], attention_mask, seen[1])
    return logits[:, -input_ids.shape[1] :], seen


class EagerRunner:
    """Runs a Hugging Face causal language model as it is, with whatever cache it makes itself.

    Args:
        model: the model, or a function with its `forward`'s signature.
        name: how reports call the runner.
        cache: whether the model's cache is used; without it, and for models that hand none out, all tokens run again.
    """

    def __init__(self, model: Callable[..., Any], name: str = "eager", *, cache: bool = True) -> None:
        self.model = model
        self.name = name
        self.cache = cache
        self._parameters = inspect.signature(getattr(model, "forward", model)).parameters

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`; the past is what the model returned to be given back, by the name of the argument.

        Raises:
            PreconditionError: the model returns no logits, or does not take these arguments.
        """
        if not self.cache or isinstance(past, list):
            return rerun(self._whole, input_ids, attention_mask, position_ids, past)
        output = self._call(input_ids, attention_mask, position_ids, use_cache=True, **(past or {}))
        # A cache, a state, ...: whatever the model calls it, what comes out goes in again under the same name.
        state = {name: output[name] for name in self._parameters if name != "logits" and output.get(name) is not None}
        return output["logits"], state or [input_ids, position_ids.expand_as(input_ids)]

    def fork(self, past: Past) -> Past:
        """A copy of the past, which steps on either do not change."""
        return copy.deepcopy(past)

    def _whole(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self._call(input_ids, attention_mask, position_ids, use_cache=False)["logits"]
        return logits

    def _call(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: Any
    ) -> Mapping[str, Any]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **options}
        if "position_ids" not in self._parameters:  # what takes more by keywords hands it on to layers
            del given["position_ids"]
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._parameters.values()):
            given = {name: value for name, value in given.items() if name in self._parameters}
        try:
            with named_results(getattr(self.model, "config", None)):
                output = self.model(**given)
        except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise PreconditionError(
                f"{self.name}: {_class_name(self.model)} does not run on tokens, a mask and "
                f"{'its own cache' if options.get('use_cache') else 'no cache'}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(output, Mapping) or output.get("logits") is None:
            raise PreconditionError(
                f"{self.name}: {_class_name(self.model)} returns no logits; text needs a causal language model with "
                "its head"
            )
        return output


def _class_name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


class GraphRunner:
    """Runs a flat traced graph of a causal language model: any `Program.graph_module` whose interface says it is one.

    A graph without a cache runs all tokens again in each step. One of a fixed length runs shorter sequences with
    padding on the right, which no earlier token reads.
    """

    def __init__(self, graph_module: Callable[..., Any], interface: Interface, name: str = "graph") -> None:
        self.graph_module = graph_module
        self.interface = interface
        self.name = name

    def empty_past(self, batch: int) -> Past:
        """A cache of length 0; the interface of a slim program already has the slim head counts."""
        examples = (self.interface.example_inputs[entry.input] for entry in self.interface.cache)
        return [example.new_empty(batch, example.shape[1], 0, example.shape[3]) for example in examples]

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`.

        Raises:
            PreconditionError: the graph is no causal language model, wants other inputs, or is for shorter sequences.
        """
        if not self.interface.cache:
            return rerun(self._whole, input_ids, attention_mask, position_ids, past)
        past = self.empty_past(input_ids.shape[0]) if past is None else past
        named = self._run(input_ids, attention_mask, position_ids, past)
        return named["logits"], [named[entry.output] for entry in self.interface.cache]

    def _whole(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        length, fixed = input_ids.shape[1], self.interface.fixed_length
        given = [input_ids, attention_mask, position_ids]
        if fixed is not None:
            if length > fixed:
                raise PreconditionError(
                    f"{self.name}: {length} tokens, but the graph is for sequences of {fixed}, as the model's code "
                    f"loops over tokens or chunks of them: use shorter ones, or trace(model, length={length})"
                )
            given = [torch.nn.functional.pad(tensor, (0, fixed - length)) for tensor in given]
        tokens, mask, positions = given
        return self._run(tokens, mask, positions, [])["logits"][:, :length]

    def _run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past) -> Mapping[str, Tensor]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given |= {entry.input: tensor for entry, tensor in zip(self.interface.cache, past, strict=True)}
        missing = [name for name in self.interface.inputs if name not in given]
        if missing or "logits" not in self.interface.outputs:
            what = f"takes {missing[0]}, which text does not give" if missing else "returns no logits"
            raise PreconditionError(f"{self.name}: the graph {what}; text needs a causal language model")
        outputs = self.graph_module(*(given[name] for name in self.interface.inputs))
        return dict(zip(self.interface.outputs, outputs, strict=True))


def text_maker(program: Program) -> Runner:
    """What samples text from a program's model: its graph, or the original model where only that has a cache."""
    original = program.references.get("eager")
    if program.interface.cache or original is None:
        return GraphRunner(program.graph_module, program.interface)
    return EagerRunner(original.module)


def scoring_products(runner: Runner, device: torch.device | str) -> AbstractContextManager[None]:
    """Where a runner's figures count and not its time: see `fxprune.runtimes.matmul.wide_products`.

    Args:
        runner: forms that torch runs as they are get these products; compiled ones and other runtimes keep theirs.
        device: where the runner wants its inputs.
    """
    return wide_products(device) if type(runner) in {EagerRunner, GraphRunner} else nullcontext()


def greedy(runner: Runner, input_ids: Tensor, new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
    """Greedy continuation, one token at a time on the cache.

    Args:
        runner: any form of the model.
        input_ids: (batch, prompt) int64.
        new_tokens: how many tokens to add.
        attention_mask: (batch, prompt) int64; all ones when None.

    Returns:
        The new tokens, (batch, new_tokens) int64.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens, past, made = input_ids, None, []
    for _ in range(new_tokens):
        logits, past = runner.step(tokens, mask, position_ids_from_mask(mask, tokens.shape[1]), past)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        made.append(tokens)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return torch.cat(made, dim=1)
