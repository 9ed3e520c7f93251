"""fxprune: a compiler that makes transformers physically smaller.

Trace a model to a torch.fx graph, find by data flow which weights belong together, prune, rewrite the graph with
smaller Linears, prove that it computes what the masked model does, export, and measure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune.models.auto_classes import install

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.checkpoints.checkpoint import load
    from fxprune.core.errors import (
        CalibrationError,
        CheckpointError,
        ExportError,
        FxpruneError,
        NotFiniteError,
        OutputError,
        PlanError,
        PostconditionError,
        PreconditionError,
        RegistryError,
        TraceError,
        TrainingError,
        UnsupportedOpError,
        UsageError,
        VerificationError,
    )
    from fxprune.core.fx_adapter import FxPass
    from fxprune.core.pass_base import Pass, PassResult
    from fxprune.core.pipeline import Pipeline
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.flows.verbs import Result, bench, evaluate, export, learn, prune, sparsify
    from fxprune.tracing.trace import trace

__version__ = "0.1.0"

_ROOMS = {
    "fxprune.checkpoints.checkpoint": ("load",),
    "fxprune.core.errors": (
        "CalibrationError", "CheckpointError", "ExportError", "FxpruneError", "NotFiniteError", "OutputError",
        "PlanError", "PostconditionError", "PreconditionError", "RegistryError", "TraceError", "TrainingError",
        "UnsupportedOpError", "UsageError", "VerificationError",
    ),
    "fxprune.core.fx_adapter": ("FxPass",),
    "fxprune.core.pass_base": ("Pass", "PassResult"),
    "fxprune.core.pipeline": ("Pipeline",),
    "fxprune.core.plan": ("Plan",),
    "fxprune.core.program": ("Program",),
    "fxprune.flows.verbs": ("Result", "bench", "evaluate", "export", "learn", "prune", "sparsify"),
    "fxprune.tracing.trace": ("trace",),
}  # fmt: skip
_WHERE = {name: module for module, names in _ROOMS.items() for name in names}
"""Public names are imported when they are first used, so that `import fxprune` stays quick."""

__all__ = [
    "CalibrationError", "CheckpointError", "ExportError", "FxPass", "FxpruneError", "NotFiniteError", "OutputError",
    "Pass", "PassResult", "Pipeline", "Plan", "PlanError", "PostconditionError", "PreconditionError", "Program",
    "RegistryError", "Result", "TraceError", "TrainingError", "UnsupportedOpError", "UsageError", "VerificationError",
    "bench", "evaluate", "export", "learn", "load", "prune", "save", "sparsify", "trace",
]  # fmt: skip


def save(program: Program, out: Path | str, *, overwrite: bool = False, max_shard_size: int | str = "5GB") -> Program:
    """Write a program as a checkpoint directory; see `fxprune.passes.save`.

    Args:
        program: a program of a Hugging Face model, without masks.
        out: directory to write.
        overwrite: whether an earlier output may be replaced.
        max_shard_size: largest weight file, in bytes or such as `"5GB"`.

    Returns:
        The program with the save in its history.
    """
    from fxprune.core.pipeline import build_pass  # noqa: PLC0415 - importing fxprune stays quick

    options = {"out": str(out), "overwrite": overwrite, "max_shard_size": max_shard_size}
    return build_pass("save", options)(program).program


install()


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fxprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
