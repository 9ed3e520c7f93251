"""A program from a configuration alone: its model is built and traced on the meta device, and no weight is read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fxprune.channels.front_end import located
from fxprune.checkpoints.checkpoint import load_skeleton
from fxprune.core.errors import TraceError
from fxprune.models.loading import config_path, load_config, quiet_transformers
from fxprune.models.manifest import MANIFEST_NAME
from fxprune.models.model_class import class_of_config, config_of_class
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fxprune.core.program import Program
    from fxprune.core.stopwatch import Stopwatch

__all__ = ["inspect_program", "models_of_config", "trace_on_meta"]


def inspect_program(name_or_path: str, watch: Stopwatch) -> Program:
    """Trace and locate from a configuration alone, on the meta device: no weights are read.

    Of a checkpoint that fxprune wrote, `fxprune.json` is read too: it says the shapes that no configuration can say.

    Args:
        name_or_path: a directory, a `config.json`, or a hub id.
        watch: gets the seconds of tracing.

    Raises:
        CheckpointError: there is no usable configuration.
        TraceError: no class for this configuration could be traced.
    """
    name = str(name_or_path)
    path = config_path(name)
    own = path.parent if path.name == "config.json" else path
    candidates = {name: partial(load_skeleton, own)} if (own / MANIFEST_NAME).is_file() else models_of_config(path)
    with watch.stage("trace"):
        program = trace_on_meta(candidates, name)
    return located(program)


def models_of_config(path: Path, dtype: torch.dtype | None = None) -> dict[str, Callable[..., Any]]:
    """How to build the model of a configuration, by the name of its class; in its own dtype or in another one."""
    config = load_config(path)
    model_class: Any = class_of_config(config, str(path))
    options = {} if dtype is None else {"dtype": dtype}
    # The method behind AutoModel.from_config, which would choose the class itself.
    build = partial(model_class._from_config, config_of_class(model_class, config), **options)
    return {model_class.__name__: build}


def trace_on_meta(candidates: Mapping[str, Callable[..., Any]], name: str) -> Program:
    """Trace the first model that can be traced; each is built with a `dtype`, or without for the configuration's."""
    first: Exception | None = None
    for build in candidates.values():
        # Some operators (grouped products) have a shape rule for bfloat16 only.
        for options in ({}, {"dtype": torch.bfloat16}):
            try:
                with torch.device("meta"), quiet_transformers():
                    model = build(**options)
                # Outside: constants that the model makes when it runs keep their values.
                with quiet_transformers():
                    return trace(model, name=name)
            except (TraceError, RuntimeError, NotImplementedError, ValueError) as error:
                first = first or error
    if isinstance(first, TraceError):
        raise first
    raise TraceError(
        f"{name}: {next(iter(candidates))} cannot be traced on the meta device: {type(first).__name__}: {first}"
    ) from first
