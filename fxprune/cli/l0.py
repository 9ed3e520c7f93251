"""Options of `fxprune prune --method l0`: their types and help, and what their texts mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = [
    "Batch",
    "BudgetKind",
    "Distil",
    "Epochs",
    "Further",
    "LoraRank",
    "LoraTargets",
    "PostData",
    "PostSteps",
    "Schedule",
    "State",
    "Steps",
    "Training",
    "WarmUp",
    "clear_state",
    "learned_options",
    "with_state",
]

Steps = Annotated[int | None, typer.Option(help="Learned: steps of the training (channel: second-order steps).", min=0)]
Epochs = Annotated[float | None, typer.Option(help="Learned: times that the samples are read; 1 by default.")]
Batch = Annotated[int | None, typer.Option(help="Learned: sequences a step.", min=1)]
Training = Annotated[
    Literal["fixed", "reference"] | None, typer.Option(help="Learned: `reference` is the paper's algorithm.")
]
BudgetKind = Annotated[
    Literal["hard", "lagrangian"] | None, typer.Option("--budget", help="Learned: how the size is held.")
]
Schedule = Annotated[
    Literal["linear", "cubic"] | None, typer.Option(help="Learned: how the sparsity rises to the target.")
]
WarmUp = Annotated[float | None, typer.Option(help="Learned: share of the steps after which the target is reached.")]
LoraRank = Annotated[int | None, typer.Option(help="Learned: rank of LoRA; 0 learns masks alone.", min=0)]
LoraTargets = Annotated[
    str | None, typer.Option(help="Learned: Linears with LoRA, such as q_proj,v_proj; all by default.")
]
Distil = Annotated[
    Literal["none", "plain", "progressive"] | None,
    typer.Option("--distillation", help="Learned: what is learned from."),
]
State = Annotated[
    str | None,
    typer.Option(help="Learned: directory of checkpoints and logs, resumed from; OUT.training by default, or `none`."),
]
PostData = Annotated[
    str | None, typer.Option(help="Learned: instruction set for fine-tuning, .json, .jsonl or a hub data set.")
]
PostSteps = Annotated[int | None, typer.Option(help="Learned: steps of fine-tuning LoRA with fixed masks.", min=0)]
Further = Annotated[
    list[str] | None, typer.Option("--option", help="Any other option of the method, NAME=VALUE as in YAML; repeat.")
]


def learned_options(
    given: Mapping[str, Any], *, targets: str | None, further: Sequence[str], others: Collection[str] = ()
) -> dict[str, Any]:
    """The options that were given.

    Args:
        given: by name, None for those that were not.
        targets: of LoRA, with commas between.
        further: `NAME=VALUE`, a value being JSON or else text.
        others: names of options that were given besides.

    Raises:
        UsageError: one has no `=`, or a name comes twice.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if targets is not None:
        found["lora_targets"] = [part.strip() for part in targets.split(",")]
    for text in further:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--option {text!r}: give NAME=VALUE, such as lora_lr=0.001")
        if name in found or name in others:
            raise UsageError(f"--option {name}: it is given twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def with_state(method: str, options: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Options in which a method that keeps its training has a place for it, beside the output unless it was said.

    Raises:
        RegistryError: there is no such method.
    """
    from fxprune.core.pass_base import option_names
    from fxprune.core.registry import get_pass

    found = dict(options)
    if "state" not in option_names(get_pass(method)):  # one that was given is refused with the other options
        return found
    if found.get("state") == "none":
        return {name: value for name, value in found.items() if name != "state"}
    if "state" not in found:
        found["state"] = str(out.with_name(f"{out.name}.training"))
    return found


def clear_state(method: str, options: Mapping[str, Any]) -> None:
    """Remove what a training left behind, if the options are such that a new one can begin.

    Raises:
        UsageError: no state is kept, or an option is wrong.
    """
    from fxprune.core.pipeline import build_pass
    from fxprune.learned.state import StateDirectory

    if "state" not in options:
        raise UsageError("--restart goes with --stream, or with a method that keeps the state of its training")
    build_pass(method, options)
    StateDirectory(Path(options["state"]), {}).clear()
