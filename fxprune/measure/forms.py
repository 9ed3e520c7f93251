"""Forms of a model that can be run and timed: opened from a checkpoint or a graph, exported for it, and compared."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import UsageError
from fxprune.core.pipeline import build_pass
from fxprune.core.program import Form
from fxprune.core.registry import resolve
from fxprune.measure.speed import Case, Cost, bench, cost_of, decode, prefill
from fxprune.models.loading import load_tokenizer
from fxprune.runtimes.runners import EagerRunner, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.core.program import Program
    from fxprune.measure.ratios import Precision
    from fxprune.measure.speed import SpeedResult

__all__ = ["OpenForm", "cases_of", "export_dense", "export_pair", "measure_speed", "open_exported", "open_form"]


@dataclass
class OpenForm:
    """A form of a model that can be run.

    Attributes:
        runner: how.
        kind: the runtime, such as `onnxruntime` or `torch`.
        tokenizer: its tokenizer, if found.
        cost: what it computes and reads, for bounds; None when unknown.
        path: the directory or graph that it was opened from, where known.
        scratch: a temporary directory that must live as long as the form.
    """

    runner: Runner
    kind: str
    tokenizer: Any = None
    cost: Cost | None = None
    path: Path | None = None
    scratch: Any = None


def open_form(where: str, *, threads: int | None = None, dtype: str | None = None, device: str = "cpu") -> OpenForm:
    """Open a checkpoint directory, a hub id, or a directory or file with an ONNX graph.

    Args:
        where: what to open.
        threads: of ONNX Runtime.
        dtype: precision of a torch model; as saved when None.
        device: where a torch model runs; ONNX Runtime runs on the CPU.

    Raises:
        UsageError: an ONNX graph on another device, or a device or precision that does not exist here.
        CheckpointError, ExportError: it cannot be loaded.
    """
    path = Path(where).expanduser()
    graph = path if path.suffix == ".onnx" else path / "model.onnx"
    if graph.is_file():
        if torch.device(device).type != "cpu":
            raise UsageError(f"{where} is an ONNX graph, which runs on the CPU here, not on {device}")
        runner = resolve("fxprune.exporters.ort:OrtRunner")(graph, threads=threads)
        tokenizer = None
        if (graph.parent / "tokenizer.json").exists():
            tokenizer = load_tokenizer(graph.parent)
        return OpenForm(runner, "onnxruntime", tokenizer)
    loaded = load_model(where, dtype=dtype, device=device)
    runner = EagerRunner(loaded.model, "torch")
    return OpenForm(runner, "torch", loaded.tokenizer, cost_of(loaded.model))


def cases_of(prefills: Sequence[int], decodes: int, past: int, batches: Sequence[int] = (1,)) -> list[Case]:
    """Benchmark cases: prefills of the given lengths, and `decodes` tokens after `past`, at each batch size."""
    cases = [prefill(length, batch=batch) for batch in batches for length in prefills]
    return [*cases, *(decode(decodes, past=past, batch=batch) for batch in batches)] if decodes else cases


def measure_speed(
    dense: OpenForm,
    slim: OpenForm,
    cases: Sequence[Case],
    *,
    threads: int,
    repeats: int,
    precision: Precision | None = None,
    progress: Callable[[Case, int, int], None] | None = None,
) -> list[SpeedResult]:
    """Interleaved benchmark of two forms that run in the same runtime; the rest as for `fxprune.measure.speed.bench`.

    Raises:
        UsageError: they do not.
    """
    if dense.kind != slim.kind:
        raise UsageError(f"cannot compare {dense.kind} with {slim.kind}; give two forms for the same runtime")
    costs = (dense.cost, slim.cost) if dense.cost is not None and slim.cost is not None else None
    return bench(
        dense.runner,
        slim.runner,
        cases,
        threads=threads,
        repeats=repeats,
        precision=precision,
        warmup=2,
        costs=costs,
        runtime=dense.kind,
        progress=progress,
    )


def export_pair(program: Program, threads: int, slim_onnx: Path) -> tuple[OpenForm, OpenForm, Any]:
    """Open the exported slim graph, and the dense one exported the same way to a temporary directory.

    Returns:
        Dense form, slim form, and the temporary directory, which the caller must keep until it is done.
    """
    dense, scratch = export_dense(program, threads)
    return dense, open_exported(slim_onnx, Form(program.graph_module, program.interface), threads), scratch


def export_dense(program: Program, threads: int) -> tuple[OpenForm, Any]:
    """Export the dense form that a program came from to a temporary directory, and open it.

    Returns:
        Dense form, and the temporary directory, which the caller must keep until it is done.
    """
    scratch = tempfile.TemporaryDirectory(prefix="fxprune-")
    lifted = program.references["lifted"]
    dense = program.replace(graph_module=lifted.module, interface=lifted.interface)
    target = Path(scratch.name) / "dense"
    build_pass("export_onnx", {"out": str(target)})(dense)
    gc.collect()
    return open_exported(target / "model.onnx", lifted, threads), scratch


def open_exported(graph: Path, form: Form, threads: int) -> OpenForm:
    """Open an ONNX file, with the cost of the form that it was exported from."""
    runner = resolve("fxprune.exporters.ort:OrtRunner")(graph, threads=threads)
    return OpenForm(runner, "onnxruntime", cost=cost_of(form.module, form.interface))
