"""What `fxprune run` does with a pipeline that says every pass itself: trace, run the passes, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import UsageError
from fxprune.core.pipeline import Pipeline, load_pipeline
from fxprune.flows.reporting import report_of
from fxprune.models.methods import check_method, class_of_model
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_pipeline"]


def run_pipeline(data: Any, *, where: str, model: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a pipeline from parsed YAML.

    Args:
        data: a mapping with `passes`, and `model` unless it is given.
        where: how messages call the file.
        model: hub id or directory, instead of the file's.
        say: gets progress messages.

    Returns:
        The report; a pass `save` writes the checkpoint.

    Raises:
        UsageError: there is no model, or an option is wrong.
        FxpruneError: a pass is unknown or refused.
    """
    passes = load_pipeline(data, where=where)
    name = model or (data.get("model") if isinstance(data, dict) else None)
    if not isinstance(name, str):
        raise UsageError(f"{where}: no model; add `model: ID_OR_DIR` or pass --model")
    for step in passes:
        check_method(step, *class_of_model(name))
    loaded = load_model(name)
    say("tracing")
    program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path)
    return report_of(Pipeline(passes, on_pass=lambda step: say(step.name))(program).program)
