"""What a pass is: `requires`, `call`, `ensures`, and an honest `modified`.

A pass gets a Program and returns a `PassResult`. Calling the pass object runs the three steps in order and appends
an `Event` to the history. Subclasses implement `call` and, where there is something to check, the other two.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fxprune.core.errors import PostconditionError, UsageError
from fxprune.core.program import Event, Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxprune.core.goals import Goal

__all__ = ["Pass", "PassResult", "constructor_options", "option_names"]


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        program: the new program; the same object as the input when `modified` is False.
        modified: whether the pass changed anything.
        details: JSON-able figures about what was done, for the history and the report.
    """

    program: Program
    modified: bool
    details: Mapping[str, Any] = field(default_factory=dict)


def constructor_options(cls: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """The options that a pass's constructor takes, by name, each with the constructor that declares it.

    A constructor with `**options` hands them on to that of its base class, whose options come after its own.
    """
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for owner in cls.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None or constructor is object.__init__:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
        found = {**{p.name: (p, constructor) for p in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def option_names(cls: type) -> list[str]:
    """The named options that a pass's constructor takes."""
    return list(constructor_options(cls))


class Pass(ABC):
    """Base class of all passes.

    A subclass sets `name` (how pipelines call it), takes its options as keyword arguments of the constructor, keeps
    each option as an attribute of the same name, and implements `call`. Its docstring draws the graph before and
    after, and numbers what it refuses.
    """

    name: ClassVar[str]
    prunes: ClassVar[bool] = False
    """Whether it is a pruning method, which users choose by its name; the other passes are asked before it works."""
    verb: ClassVar[str] = "prune"
    """The verb that runs it: `prune`, `sparsify` or `learn`."""
    needs_data: ClassVar[bool] = False
    """Whether the method itself reads calibration text."""
    reads_loss: ClassVar[bool] = False
    """Whether the method reads the loss of a language model: gradients of it, or what it becomes."""
    keeps_shapes: ClassVar[bool] = False
    """Whether what it changes keeps its shape, as zeros and codes do: there is nothing to slim behind it."""
    guarded: ClassVar[bool] = False
    """Whether it may learn its calibration text by heart, so that other text is measured beside it."""

    def precheck(self, program: Program, pruning: Pass | None = None) -> Program:
        """Say what can be known of this pass before the passes in front of it have worked.

        A pipeline asks every pass before it starts, and those behind a pass that `prunes` once more before that one.

        Args:
            program: what comes in at that point.
            pruning: the pass that is about to prune, if one is.

        Returns:
            The program, without groups that this pass could not take if they were pruned.

        Raises:
            FxpruneError: this pass could not do its work whatever the others do.
        """
        del pruning
        return program

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read with the options that it has."""
        return self.needs_data

    def goals(self) -> Sequence[Goal]:
        """The values of its target where it has several, the loosest first: each makes a result of its own.

        Raises:
            UsageError: they are not in order.
        """
        return ()

    def for_goals(self, program: Program) -> Sequence[Pass]:
        """For each of its goals a pass; what they share is computed here, once.

        Raises:
            FxpruneError: as the pass itself.
        """
        del program
        return [self]

    def forget(self) -> None:
        """Throw away what an earlier, unfinished run of the same pass left to go on with.

        Raises:
            UsageError: it keeps nothing.
        """
        raise UsageError(f"{self.name} keeps nothing of an unfinished run that could be thrown away: leave restart out")

    def why_not_streamed(self) -> str:
        """Why it cannot work block by block on a model that is never held whole; empty if it can."""
        return f"{self.name} needs the whole model in memory: leave --stream out"

    def loss_reader(self) -> str:
        """What reads the loss of a language model, the method or one of its options; empty if nothing does."""
        return self.name if self.reads_loss else ""

    def requires(self, program: Program) -> None:  # noqa: B027 - most passes need nothing
        """Check what the pass needs; raise `PreconditionError` with what to do when it is missing."""

    @abstractmethod
    def call(self, program: Program) -> PassResult:
        """Do the work; leave the given program as it is."""

    def ensures(self, before: Program, after: Program) -> None:  # noqa: B027 - optional as well
        """Check what the pass promises; raise `PostconditionError` when it does not hold."""

    def options(self) -> dict[str, Any]:
        """The constructor's options with their values, for the history."""
        return {name: getattr(self, name) for name in option_names(type(self)) if hasattr(self, name)}

    def __call__(self, program: Program) -> PassResult:
        """Run `requires`, `call` and `ensures`, and append what happened to the history.

        Raises:
            PreconditionError: the program lacks what the pass needs.
            PostconditionError: the result breaks a promise of the pass or puts something where a mask of
                `Program.weight_masks` keeps zeros, or `modified` does not tell the truth.
        """
        self.requires(program)
        start = time.perf_counter()
        result = self.call(program)
        seconds = time.perf_counter() - start
        if result.modified == (result.program is program):
            raise PostconditionError(
                f"pass {self.name!r} reports modified={result.modified} but returned "
                f"{'the same' if result.program is program else 'another'} program; a pass that changes nothing "
                "returns its input and modified=False"
            )
        self.ensures(program, result.program)
        self._require_held(program, result.program)
        event = Event(self.name, self.options(), result.modified, seconds, result.details)
        program = result.program.replace(history=(*result.program.history, event))
        return PassResult(program, result.modified, result.details)

    def _require_held(self, before: Program, after: Program) -> None:
        """Weights that were removed one by one are zero and stay it, whatever a pass does."""
        for name, mask in after.weight_masks.items():
            weight: Any = after.graph_module.get_submodule(name).weight
            if mask is before.weight_masks.get(name) and weight is before.graph_module.get_submodule(name).weight:
                continue
            if weight.shape != mask.shape:
                raise PostconditionError(f"pass {self.name!r} left {name} a mask of another shape than its weight's")
            if not weight.is_meta and bool((weight.detach() != 0)[~mask.to(weight.device)].any()):
                raise PostconditionError(
                    f"pass {self.name!r} changed weights of {name} that were removed before; multiply what it writes "
                    "by Program.weight_masks"
                )

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({options})"
