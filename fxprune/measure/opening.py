"""The runtimes that a benchmark can time, and how a form is opened in each of them.

    runtime         a checkpoint or hub id           an ONNX directory
    torch           loaded                           refused
    torch.compile   loaded, compiled when first run  refused
    onnxruntime     exported to a scratch directory  opened
    genai           exported to a scratch directory  opened, if it has a genai_config.json

A runtime is one entry of `RUNTIMES`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import UsageError
from fxprune.core.pipeline import build_pass
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.measure.forms import OpenForm
from fxprune.measure.speed import cost_of
from fxprune.models.loading import expand_user
from fxprune.models.methods import class_of_model, require_language_model
from fxprune.models.model_class import is_language_model, reads_tokens
from fxprune.runtimes.compiled import CompiledRunner
from fxprune.runtimes.forward_runner import ForwardRunner, FunctionRunner
from fxprune.runtimes.runners import EagerRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["RUNTIMES", "check_language", "check_precision", "check_runtime", "check_tokens", "open_in", "runtime_of"]


def runtime_of(where: str) -> str:
    """The runtime that a form runs in when none is named: `onnxruntime` for a graph, `torch` for all else."""
    return "onnxruntime" if _graph(where) is not None else "torch"


def check_runtime(name: str) -> str:
    """Return the name of a runtime.

    Raises:
        UsageError: it is unknown.
    """
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is unknown; use {', '.join(RUNTIMES)}")
    return name


def check_precision(forms: Sequence[str], dtype: str | None) -> None:
    """Refuse a precision that would do nothing: where every form is an ONNX graph, none is loaded in it.

    Raises:
        UsageError: that is so.
    """
    if dtype is not None and all(_graph(form) is not None for form in forms):
        raise UsageError(
            f"{', '.join(forms)}: an ONNX graph has its precision in the file, so --dtype {dtype} would change "
            "nothing; leave it out, or name the checkpoint"
        )


def check_language(forms: Sequence[str], what: str, otherwise: str) -> None:
    """Refuse what only language models can do, from configurations and descriptions alone.

    Args:
        forms: checkpoints, hub ids, ONNX directories or files; of a graph that fxprune did not write nothing is known.
        what: what was asked for.
        otherwise: what to do.

    Raises:
        UsageError: a form is no language model.
        CheckpointError: there is no such form.
    """
    for form in forms:
        graph = _graph(form)
        if graph is None and expand_user(form).suffix == ".onnx":
            continue  # there is no such graph, which whoever opens it says
        if graph is None:
            require_language_model(what, *class_of_model(form), otherwise=otherwise)
        elif _forward_only(graph):
            raise UsageError(f"{what} needs a language model, and {form} is the graph of another one: {otherwise}")


def check_tokens(forms: Sequence[str]) -> None:
    """Refuse forms whose main input is not text: nothing else is timed.

    Raises:
        UsageError: a form reads something else.
        CheckpointError: there is no such form.
    """
    for form in forms:
        if _graph(form) is None:
            model_class, _ = class_of_model(form)
            if not reads_tokens(model_class):
                raise UsageError(
                    f"{form}: bench times text, and {model_class.__name__} reads {model_class.main_input_name}: export "
                    "it, and time it in the runtime that it is for"
                )


def _forward_only(graph: Path) -> bool:
    forward: bool = resolve("fxprune.exporters.onnx_files:has_no_language_model")(graph)
    return forward


def open_in(
    where: str, runtime: str, *, threads: int, dtype: str | None = None, say: Callable[[str], None] | None = None
) -> OpenForm:
    """Open a form in a runtime.

    Args:
        where: checkpoint, hub id, ONNX directory or ONNX file.
        runtime: a name in `RUNTIMES`.
        threads: of ONNX Runtime; torch is told when it runs.
        dtype: precision in which a checkpoint is loaded; as saved when None.
        say: gets a message before a checkpoint is exported.

    Returns:
        The form; `kind` is the runtime. A scratch directory lives as long as the form.

    Raises:
        UsageError: the runtime is unknown or cannot run such a form.
        CheckpointError, TraceError, ExportError: the form cannot be loaded, traced, exported or opened, or the runtime
            is not installed.
    """
    return RUNTIMES[check_runtime(runtime)](where, threads, dtype, say or (lambda _: None))


def _graph(where: str) -> Path | None:
    path = expand_user(where)
    graph = path if path.suffix == ".onnx" else path / "model.onnx"
    return graph if graph.is_file() else None


def _torch(where: str, threads: int, dtype: str | None, say: Callable[[str], None]) -> OpenForm:
    del threads, say
    return _loaded(where, dtype, "torch", EagerRunner)


def _compiled(where: str, threads: int, dtype: str | None, say: Callable[[str], None]) -> OpenForm:
    del threads, say
    return _loaded(where, dtype, "torch.compile", CompiledRunner)


def check_form(where: str, runtime: str) -> None:
    """Refuse a form that a runtime does not run, as far as its files say.

    Raises:
        UsageError: it is an ONNX graph, and the runtime runs checkpoints.
    """
    graph_only = _graph(where) is not None and not (expand_user(where) / "config.json").is_file()
    if graph_only and runtime in {"torch", "torch.compile"}:
        raise UsageError(f"{where} is an ONNX graph, which {runtime} does not run; name the checkpoint it came from")


def _loaded(where: str, dtype: str | None, runtime: str, make: type[EagerRunner]) -> OpenForm:
    check_form(where, runtime)
    loaded = load_model(where, dtype=dtype)
    if make is EagerRunner and not is_language_model(type(loaded.model), loaded.config):
        make = ForwardRunner
    runner = make(loaded.model, name=runtime)
    return OpenForm(runner, runtime, loaded.tokenizer, cost_of(loaded.model), loaded.path)


def _onnxruntime(where: str, threads: int, dtype: str | None, say: Callable[[str], None]) -> OpenForm:
    graph, scratch = _exported(where, dtype, say, genai=False)
    if _forward_only(graph):
        runner: Any = FunctionRunner(resolve("fxprune.exporters.ort:OrtFunction")(graph, threads=threads))
    else:
        runner = resolve("fxprune.exporters.ort:OrtRunner")(graph, threads=threads)
    return OpenForm(runner, "onnxruntime", path=graph, scratch=scratch)


def _genai(where: str, threads: int, dtype: str | None, say: Callable[[str], None]) -> OpenForm:
    resolve("fxprune.exporters.genai:require_genai")()  # before a minute of exporting
    graph, scratch = _exported(where, dtype, say, genai=True)
    runner = resolve("fxprune.exporters.genai:GenaiRunner")(graph.parent, threads=threads)
    return OpenForm(runner, "genai", path=graph.parent, scratch=scratch)


def _exported(where: str, dtype: str | None, say: Callable[[str], None], *, genai: bool) -> tuple[Path, Any]:
    """The graph of a form, and the scratch directory it lies in if it had to be made."""
    graph = _graph(where)
    if graph is not None:
        return graph, None
    loaded = load_model(where, dtype=dtype)
    say(f"exporting {where} to ONNX")
    program = front_end(loaded, Stopwatch())
    scratch = tempfile.TemporaryDirectory(prefix="fxprune-")
    target = Path(scratch.name) / "onnx"
    build_pass("export_onnx", {"out": str(target)})(program)
    if genai:
        resolve("fxprune.exporters.genai:write_genai_config")(target, program.source)
    return target / "model.onnx", scratch


RUNTIMES: Mapping[str, Callable[[str, int, str | None, Callable[[str], None]], OpenForm]] = {
    "torch": _torch,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "genai": _genai,
}
"""How a form is opened, by the name of the runtime."""
