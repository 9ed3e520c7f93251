"""What the commands are made of: load, trace and locate, prune, export, compare, measure.

Each function is one step that the command line, the demo and a Python user share; passes and exporters are reached
through the registry only.
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.checkpoint import load_skeleton
from fxprune.errors import TraceError, UsageError
from fxprune.evaluate import file_perplexity, perplexity, tokenise
from fxprune.loading import (
    LoadedModel,
    config_path,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from fxprune.manifest import MANIFEST_NAME
from fxprune.measure import Case, Cost, bench, cost_of, decode, prefill
from fxprune.model_class import class_of_config, config_of_class
from fxprune.pipeline import Pipeline, build_pass
from fxprune.program import Form
from fxprune.registry import resolve
from fxprune.runners import EagerRunner, GraphRunner, Runner
from fxprune.sparse_pass import SparsePass
from fxprune.structured_pass import StructuredPass
from fxprune.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fxprune.evaluate import PerplexityResult
    from fxprune.measure import SpeedResult
    from fxprune.pass_base import Pass
    from fxprune.program import Program
    from fxprune.ratios import Precision

__all__ = [
    "Stopwatch",
    "export_dense",
    "front_end",
    "inspect_program",
    "measure_speed",
    "models_of_config",
    "open_exported",
    "open_form",
    "prune_program",
    "quality_entry",
    "run_pruning",
    "text_of_python",
    "trace_on_meta",
]

LOCATE = (
    "lift_linears",
    "locate_attention",
    "locate_mlp",
    "locate_hidden",
    "locate_experts",
    "locate_layers",
)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def front_end(loaded: LoadedModel, watch: Stopwatch, step: Pass | None = None, *, hold_zeros: bool = False) -> Program:
    """Trace a loaded model, lift its projections and locate what can be pruned.

    Args:
        loaded: the model; masks of pruned weights that its checkpoint has are held.
        watch: gets the seconds of tracing.
        step: the pass that will prune it; a graph that holds for one length gets the length of its calibration samples.
        hold_zeros: whether zeros without a mask are held too (see `fxprune.passes.lift_linears`).
    """
    length = _calibration_length(step)
    with watch.stage("trace"):
        program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path, length=length)
    return _located(program, hold_zeros=hold_zeros)


def _calibration_length(step: Pass | None) -> int | None:
    """Tokens of a pass's calibration samples; None if it reads none."""
    if isinstance(step, SparsePass):
        return step.seq_len if step.needs_data else None
    return step.seq_len if isinstance(step, StructuredPass) and step.reads_text else None


def _located(program: Program, *, hold_zeros: bool = False) -> Program:
    options = {"lift_linears": {"hold_zeros": hold_zeros}}
    return Pipeline([build_pass(name, options.get(name, {})) for name in LOCATE])(program).program


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
    return _located(program)


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


def prune_program(
    program: Program,
    method: str,
    options: Mapping[str, Any],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    on_pass: Callable[[Pass], None] | None = None,
) -> Program:
    """Prune, slim, verify and, with `out`, save and verify the reloaded checkpoint.

    Args:
        program: a program with groups.
        method: name of a pruning pass.
        options: its options.
        out: where the checkpoint goes.
        overwrite: whether an earlier output may be replaced.
        on_pass: called before each pass, for progress.

    Returns:
        The slim program.

    Raises:
        FxpruneError: any pass refused or any rung failed.
    """
    return run_pruning(program, build_pass(method, options), out=out, overwrite=overwrite, on_pass=on_pass)


def run_pruning(
    program: Program,
    pruning: Pass,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    on_pass: Callable[[Pass], None] | None = None,
) -> Program:
    """Run a pruning pass and what belongs behind it, see `prune_program`."""
    # Zeros change no shape: there is nothing to mask and nothing to slim.
    steps = ("verify",) if isinstance(pruning, SparsePass) else ("insert_masks", "slim", "verify")
    passes = [pruning, *(build_pass(name, {}) for name in steps)]
    if out is not None:
        passes.append(build_pass("save", {"out": str(out), "overwrite": overwrite}))
        passes.append(build_pass("verify", {"checkpoint": str(out), "graph": False}))
    return Pipeline(passes, on_pass=on_pass)(program).program


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
    """Interleaved benchmark of two forms that run in the same runtime; the rest as for `fxprune.measure.bench`.

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


def text_of_python() -> str:
    """English prose that every Python ships: its language reference, as `pydoc` holds it."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB of text

    return "\n\n".join(topics[name] for name in sorted(topics))


def perplexities(
    program: Program,
    texts: Sequence[str],
    *,
    windows: int | None,
    window: int = 512,
    known: dict[str, PerplexityResult] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity before and after on each text: a file, or `python` for Python's own language reference.

    Args:
        program: the slim program.
        texts: what to measure on.
        windows: how many windows of a text; all when None.
        window: tokens of each, fewer where the graph is for shorter sequences.
        known: results of the dense form by text, which are not measured again; new ones are put there.

    Returns:
        Entries of the report's `quality` section.
    """
    assert program.source is not None
    window = min(window, program.interface.fixed_length or window)
    lifted = program.references["lifted"]
    dense = GraphRunner(lifted.module, lifted.interface, "dense")
    slim = GraphRunner(program.graph_module, program.interface, "slim")
    known = {} if known is None else known
    entries = []
    for text in texts:
        if text not in known:
            known[text] = _perplexity(dense, text, program.source.tokenizer, windows, window)
        entries.append(quality_entry(known[text], _perplexity(slim, text, program.source.tokenizer, windows, window)))
    return entries


def _perplexity(runner: Runner, text: str, tokenizer: Any, windows: int | None, window: int) -> PerplexityResult:
    if text == "python":
        tokens = tokenise(text_of_python(), tokenizer)
        source = "Python's language reference (pydoc_data.topics, joined in the order of their names)"
        return perplexity(
            runner, tokens, text="python-reference", source=source, window=window, max_windows=windows, batch_size=1
        )
    return file_perplexity(runner, text, tokenizer, window=window, max_windows=windows, batch_size=1)


def quality_entry(dense: PerplexityResult | None, slim: PerplexityResult | None) -> dict[str, Any]:
    """An entry of the report's `quality` section."""
    entry: dict[str, Any] = resolve("fxprune.exporters.report:perplexity_entry")(dense, slim)
    return entry
