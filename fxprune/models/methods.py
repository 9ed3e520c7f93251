"""What a pruning method asks of a model, and which methods a model can serve.

Methods declare what they need (`Pass.needs_data`, `Pass.reads_loss`), classes what they are
(`fxprune.models.model_class`). Nothing else is asked, so a refusal comes before a weight is read, and methods of other
packages are in the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.core.errors import PreconditionError, UsageError
from fxprune.core.registry import called, get_pass, pass_names
from fxprune.models.loading import load_config
from fxprune.models.model_class import class_of_config, is_language_model, reads_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.core.pass_base import Pass

__all__ = ["check_method", "class_of_model", "require_language_model", "usable_methods"]


def class_of_model(name_or_path: str | Path) -> tuple[type[Any], Any]:
    """The class of a model and its configuration, from the configuration alone.

    Raises:
        CheckpointError: there is no such model, or its class is unknown.
    """
    config = load_config(name_or_path)
    return class_of_config(config, f"{name_or_path}"), config


def usable_methods(model_class: type[Any], config: Any, verb: str) -> list[str]:
    """Names of the methods of a verb that work for models of a class, as they are without further options."""
    language, text = is_language_model(model_class, config), reads_tokens(model_class)
    found = []
    for name in pass_names():
        method = get_pass(name)
        if method.prunes and (language or not method.reads_loss) and (text or not method.needs_data):
            found += [called(name)] if method.verb == verb else []
    return sorted(found)


def check_method(step: Pass, model_class: type[Any], config: Any) -> None:
    """Refuse a method that a model of a class cannot serve.

    Args:
        step: any pass; those that prune nothing ask for nothing.
        model_class: class of the model.
        config: its configuration.

    Raises:
        PreconditionError: the method reads a loss that the model does not have, or text that it cannot read; the
            message lists those that work.
        UsageError: the text shall be sampled from a model that writes none.
    """
    if not step.prunes or is_language_model(model_class, config):
        return
    name = model_class.__name__
    usable = usable_methods(model_class, config, step.verb)
    # Learning finds units too, with a loss: without one there is pruning.
    verb = step.verb if usable else "prune"
    use = f"use fxprune {verb} with one of {', '.join(usable or usable_methods(model_class, config, verb))}"
    if reader := step.loss_reader():
        raise PreconditionError(
            f"{reader} reads the loss of a language model, which predicts the next token of its text, and {name} does "
            f"not: {use}"
        )
    if not step.reads_text:
        return
    if not reads_tokens(model_class):
        raise PreconditionError(
            f"{step.name} reads calibration text as it is asked for here, and {name} reads "
            f"{model_class.main_input_name}: {use}"
        )
    if getattr(step, "calibration", None) == "self":
        raise UsageError(
            f"{step.name} reads calibration text, and {name} writes none that could be sampled from it: name a text "
            "with calibration (--calibration FILE, a .txt or .jsonl file, or a hub data set)"
        )


def require_language_model(what: str, model_class: type[Any], config: Any, *, otherwise: str) -> None:
    """Refuse what only a language model can do.

    Args:
        what: what was asked for, such as `--ppl`.
        model_class: class of the model.
        config: its configuration.
        otherwise: what to do.

    Raises:
        UsageError: the class predicts no next token.
    """
    if not is_language_model(model_class, config):
        raise UsageError(
            f"{what} needs a language model, which predicts the next token of its text, and {model_class.__name__} "
            f"does not: {otherwise}"
        )
