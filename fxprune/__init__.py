"""fxprune: a compiler that makes transformers physically smaller.

Trace a model to a torch.fx graph, find by data flow which weights belong together, prune, rewrite the graph with
smaller Linears, prove that it computes what the masked model does, export, and measure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune.auto_classes import install

if TYPE_CHECKING:
    from pathlib import Path

    from fxprune.fx_adapter import FxPass
    from fxprune.pass_base import Pass, PassResult
    from fxprune.pipeline import Pipeline
    from fxprune.plan import Plan
    from fxprune.program import Program

    from fxprune.checkpoint import load  # isort: skip
    from fxprune.tracing import trace  # isort: skip

__version__ = "0.1.0"
__all__ = ["FxPass", "Pass", "PassResult", "Pipeline", "Plan", "Program", "load", "save", "trace"]

_WHERE = {
    "FxPass": "fxprune.fx_adapter",
    "Pass": "fxprune.pass_base",
    "PassResult": "fxprune.pass_base",
    "Pipeline": "fxprune.pipeline",
    "Plan": "fxprune.plan",
    "Program": "fxprune.program",
    "load": "fxprune.checkpoint",
    "trace": "fxprune.tracing",
}


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
    from fxprune.pipeline import build_pass  # noqa: PLC0415 - importing fxprune stays quick

    options = {"out": str(out), "overwrite": overwrite, "max_shard_size": max_shard_size}
    return build_pass("save", options)(program).program


install()


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
