"""The verbs, as functions: prune, sparsify, learn, export, evaluate, bench. The command line calls these.

    fxprune.prune("model", ratio=0.2, out="slim")            fxprune prune model --ratio 0.2 --out slim

Names and defaults are those of the command line, with underscores for dashes.
"""

from __future__ import annotations

import difflib
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from torch import nn

from fxprune.checkpoints.checkpoint import load
from fxprune.core.errors import UsageError
from fxprune.core.pass_base import constructor_options
from fxprune.core.pipeline import build_pass
from fxprune.core.registry import called, get_pass, pass_names, pass_of, resolve
from fxprune.flows.driver import run
from fxprune.flows.recipe import OF_DRIVER, Destination, Recipe
from fxprune.flows.wanted import Wanted
from fxprune.models.loading import LoadedModel, expand_user
from fxprune.models.savable import require_plain, unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fxprune.core.pass_base import Pass
    from fxprune.core.program import Program

__all__ = ["Result", "bench", "evaluate", "export", "learn", "method_of", "prune", "sparsify"]


@dataclass(frozen=True)
class Result:
    """What a verb made. A notebook shows it as the summary of its report.

    Attributes:
        report: all figures, as in `report.json`.
        program: the program at the end; None where no whole model was held (streaming), or there are several targets.
        path: of the checkpoint, or of the directory with one for each target; None if nothing was saved.
    """

    report: Mapping[str, Any]
    program: Program | None = None
    path: Path | None = None

    @cached_property
    def model(self) -> Any:
        """The model as a transformers model, loaded from what was saved, or made anew if nothing was.

        Raises:
            UsageError: there are several.
        """
        if entries := self.report.get("budgets", {}).get("entries"):
            names = ", ".join(entry["name"] for entry in entries)
            raise UsageError(f"there are {len(entries)} models: load one of {names} from {self.path} with fxprune.load")
        if self.path is not None:
            return load(self.path)
        assert self.program is not None
        with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
            build_pass("save", {"out": str(Path(scratch) / "model")})(self.program)
            return load(Path(scratch) / "model")

    def _repr_markdown_(self) -> str:
        text: str = resolve("fxprune.exporters.report:markdown_summary")(self.report)
        return text

    def __repr__(self) -> str:
        figures = self.report.get("params", {})
        share = figures.get("removed_share_all")
        removed = "" if share is None else f", {share:.1%} of all parameters removed"
        return f"Result({self.report.get('model')}, {self.report.get('method')}{removed}, path={self.path})"


def method_of(method: str, verb: str) -> str:
    """The pass that a method's name means for a verb.

    Raises:
        UsageError: there is none, or it belongs to another verb, which the message names.
    """
    name = pass_of(method, verb)
    if name in OF_DRIVER or name not in pass_names():
        known = sorted(called(one) for one in pass_names() if (cls := get_pass(one)).prunes and cls.verb == verb)
        near = difflib.get_close_matches(method, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; they are {', '.join(known)} (fxprune explain)"
        raise UsageError(f"{method!r} is no method of {verb}{hint}")
    own = get_pass(name).verb
    if own != verb:
        raise UsageError(f"{method} is no method of {verb}: use fxprune {own} --method {method}")
    return name


def _opened(model: Any, tokenizer: Any) -> str | LoadedModel:
    """A name as it is; a module with what belongs to it."""
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UsageError("tokenizer belongs to a model that is given as a module; a directory has its own")
        return str(model)
    if isinstance(model, LoadedModel):
        return model
    config = getattr(model, "config", None)
    if isinstance(model, nn.Module):
        require_plain(unwrapped(model))
    if config is None or not isinstance(model, nn.Module):
        raise UsageError(
            f"{type(model).__name__} is no Hugging Face model: give a hub id, a directory or such a model; any other "
            "module becomes a program with fxprune.trace, on which passes run"
        )
    where = str(getattr(config, "_name_or_path", "") or "")
    path = expand_user(where) if where and expand_user(where).is_dir() else None
    return LoadedModel(model.eval(), tokenizer, config, where or type(model).__name__, path)


def _run(
    verb: str, model: Any, method: str, options: Mapping[str, Any], common: Mapping[str, Any], **recipe: Any
) -> Result:
    """Run one method; `common` are the keywords that all three verbs have."""
    name = method_of(method, verb)
    given = {
        option: str(value) if isinstance(value, Path) else value
        for option, value in options.items()
        if value is not None
    }
    if not isinstance(model, (str, Path)) and (common["dtype"] is not None or common["device"] != "cpu"):
        raise UsageError(
            "a model that is given as a module is where it is, in its own dtype: leave dtype and device out"
        )
    step = build_pass(name, given)
    _refuse_unread(step, given)
    out = common["out"]
    place = Destination(
        None if out is None else expand_user(out),
        common["device"],
        common["dtype"],
        overwrite=common["overwrite"],
        hold_zeros=common["hold_zeros"],
    )
    wanted = Wanted(
        ppl=tuple(str(text) for text in _listed(common["ppl"])),
        windows=common["windows"],
        guard=common.get("guard", "python"),
        speed=common["measure_speed"],
        threads=common["threads"],
        repeats=common.get("repeats"),
    )
    recipe_ = Recipe(_opened(model, common["tokenizer"]), (step,), place, wanted, **recipe)
    outcome = run(recipe_, say=common["say"] or (lambda _: None))
    return Result(outcome.report, outcome.program, outcome.path)


def _refuse_unread(step: Pass, given: Mapping[str, Any]) -> None:
    """Calibration options of a method that reads no text would do nothing.

    Raises:
        UsageError: there are such.
    """
    texts = [option for option in ("calibration", "text_field", "samples", "seq_len") if option in given]
    if texts and not step.reads_text:
        raise UsageError(
            f"{step.name} reads no calibration text: leave {', '.join(texts)} out, or choose another method"
        )


def prune(
    model: str | Path | nn.Module,
    *,
    out: str | Path | None = None,
    method: str = "channel",
    tokenizer: Any = None,
    ppl: Sequence[str | Path] = (),
    windows: int | None = 20,
    guard: str = "python",
    measure_speed: bool = False,
    repeats: int | None = None,
    threads: int = 2,
    device: str = "cpu",
    dtype: str | None = None,
    hold_zeros: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Remove units (heads, MLP channels, ...), slim the graph, verify, and save a checkpoint.

    Args:
        model: hub id, directory, or a Hugging Face model.
        out: directory of the checkpoint and its report; None saves nothing.
        method: `channel`, `fisher`, `osscar`, `flap`, `wanda-sp`, `taylor`, `magnitude`, `depth`, `random`, or the name
            of a pass of another package.
        tokenizer: of a model that is given as a module.
        ppl: text files for the perplexity before and after; `python` is Python's own language reference.
        windows: of 512 tokens for each; all when None.
        guard: text unlike the calibration text, to warn of overfitting to that: a file, `python` or `none`.
        measure_speed: whether the dense and the slim model are timed in ONNX Runtime.
        repeats: timed repeats of each.
        threads: of ONNX Runtime.
        device: where the model runs.
        dtype: its precision, such as `bfloat16`; as saved when None.
        hold_zeros: whether zeros that no mask holds are held too, as another tool's pruning leaves them.
        overwrite: whether an earlier output may be replaced.
        say: gets progress messages.
        **options: of the method: one target (`ratio`, `target_params`, `target_macs`, `target_bytes`,
            `target_speedup` with `table`), `calibration`, `samples`, `seq_len`, `seed`, `uniform`, `round_to`, ...; see
            `fxprune explain METHOD` and `fxprune.structured.base.StructuredPass`.

    Returns:
        The result; several values of the target make a checkpoint each below `out`.

    Raises:
        UsageError: an option is unknown or wrong.
        FxpruneError: any step refused, or the slim model does not compute what the masked one does.
    """
    if options.get("target_speedup") is not None:
        options = {"threads": threads, **options}
    return _run("prune", model, method, options, locals())


def sparsify(
    model: str | Path | nn.Module,
    *,
    out: str | Path | None = None,
    method: str = "sparsegpt",
    tokenizer: Any = None,
    stream: bool = False,
    restart: bool = False,
    ppl: Sequence[str | Path] = (),
    windows: int | None = 20,
    measure_speed: bool = False,
    threads: int = 2,
    device: str = "cpu",
    dtype: str | None = None,
    hold_zeros: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Set single weights to zero; masks are saved with the checkpoint, and held by every later pass.

    Args:
        model: hub id, directory, or a Hugging Face model.
        out: directory of the checkpoint and its report; None saves nothing.
        method: `sparsegpt`, `wanda`, `alps`, `magnitude`.
        tokenizer: of a model that is given as a module.
        stream: work block by block from the shards, without ever holding the model; goes on after an interruption.
        restart: throw unfinished work away instead of going on with it.
        ppl: text files for the perplexity before and after; `python` is Python's own language reference.
        windows: of 512 tokens for each; all when None.
        measure_speed: whether the dense and the sparse model are timed in ONNX Runtime.
        threads: of ONNX Runtime.
        device: where the model runs.
        dtype: its precision, such as `bfloat16`; as saved when None.
        hold_zeros: whether zeros that no mask holds are held too, as another tool's pruning leaves them.
        overwrite: whether an earlier output may be replaced.
        say: gets progress messages.
        **options: of the method: `sparsity` or `pattern` (such as `2:4`), `calibration`, `samples`, `seq_len`, `seed`,
            `include`, `exclude`, `per_module`, ...; see `fxprune explain METHOD` and
            `fxprune.weights.base.SparsePass`.

    Raises:
        UsageError: an option is unknown or wrong.
        FxpruneError: any step refused, or a rung of the verification failed.
    """
    return _run("sparsify", model, method, options, locals(), stream=stream, restart=restart)


def learn(
    model: str | Path | nn.Module,
    *,
    out: str | Path | None = None,
    method: str = "l0",
    tokenizer: Any = None,
    state: str | Path | None = None,
    restart: bool = False,
    ppl: Sequence[str | Path] = (),
    windows: int | None = 20,
    guard: str = "python",
    measure_speed: bool = False,
    repeats: int | None = None,
    threads: int = 2,
    device: str = "cpu",
    dtype: str | None = None,
    hold_zeros: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Learn with gates and LoRA which units stay, remove the others, slim, verify, and save a checkpoint.

    Args:
        model: hub id, directory, or a Hugging Face model.
        out: directory of the checkpoint and its report; None saves nothing.
        method: `l0`.
        tokenizer: of a model that is given as a module.
        state: directory where the training is kept and resumed from; `OUT.training` by default, `none` keeps nothing.
        restart: throw away what an earlier training left there.
        ppl: text files for the perplexity before and after; `python` is Python's own language reference.
        windows: of 512 tokens for each; all when None.
        guard: text unlike the calibration text, to warn of overfitting to that: a file, `python` or `none`.
        measure_speed: whether the dense and the slim model are timed in ONNX Runtime.
        repeats: timed repeats of each.
        threads: of ONNX Runtime.
        device: where the model runs.
        dtype: its precision, such as `bfloat16`; as saved when None.
        hold_zeros: whether zeros that no mask holds are held too, as another tool's pruning leaves them.
        overwrite: whether an earlier output may be replaced.
        say: gets progress messages.
        **options: of the method: one target (`ratio`, ...), `steps` or `epochs`, `batch`, `lora_rank`, `calibration`,
            ...; see `fxprune explain l0`.

    Raises:
        UsageError: an option is unknown or wrong.
        FxpruneError: any step refused, the training diverged, or the slim model is not what the gates say.
    """
    name = method_of(method, "learn")
    if options.get("target_speedup") is not None:
        options = {"threads": threads, **options}
    kept = None if state is None or str(state) == "none" else str(state)
    if state is None and out is not None and "state" in constructor_options(get_pass(name)):
        beside = expand_user(out)
        kept = str(beside.with_name(f"{beside.name}.training"))
    options = {"state": kept, **options}
    return _run("learn", model, method, options, locals(), restart=restart)


def export(
    model: str | Path,
    *,
    out: str | Path,
    to: Literal["onnx", "genai"] = "onnx",
    opset: int | None = None,
    fusions: Literal["auto", "none", "cpu"] = "auto",
    dtype: str | None = None,
    int4: Mapping[str, Any] | bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export a checkpoint to one ONNX graph, or to all that onnxruntime-genai needs, and verify it there.

    Args:
        model: checkpoint or hub id.
        out: directory of `model.onnx` and what belongs beside it.
        to: `onnx` or `genai`.
        opset: of ONNX; the exporter's choice when None.
        fusions: of ONNX Runtime.
        dtype: of weights and cache, `float32` or `float16`; as saved when None.
        int4: True, or options (`method`, `group_size`, `symmetric`, `accuracy_level`, `lm_head`, `embeddings`), to
            quantize the verified graph's weights to 4 bits.
        overwrite: whether an earlier output may be replaced.
        say: gets progress messages.

    Returns:
        The figures: rungs, and what quantizing costs.

    Raises:
        FxpruneError: it cannot be exported, or does not compute the same.
    """
    from fxprune.flows.exporting import ExportRequest, run_export  # noqa: PLC0415 - only exports need it

    quantized = None if int4 is False else {} if int4 is True else dict(int4)
    request = ExportRequest(expand_user(out), to, opset, fusions, dtype, quantized, overwrite)
    return run_export(_form(model), request, say or (lambda _: None))


def evaluate(
    model: str | Path,
    *,
    ppl: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Perplexity of texts, and tasks of lm-eval, of any form of a model.

    Args:
        model: checkpoint, hub id, or ONNX directory with its tokenizer.
        ppl: text files.
        tasks: names that lm-eval knows.
        say: gets progress messages.
        **options: the other fields of `fxprune.flows.evaluation.Evaluation` (`data`, `limit`, `window`, `windows`,
            `batch_size`, `max_length`, `dtype`, `device`, `tokenizer`).

    Raises:
        UsageError: there is nothing to measure, or an option is unknown or out of range.
        FxpruneError: the form cannot be opened, or a text or a task cannot be read.
    """
    from fxprune.flows.evaluation import Evaluation, run_evaluation  # noqa: PLC0415 - as above

    if options.get("data") is not None:
        options["data"] = expand_user(options["data"])
    named = {"ppl": [expand_user(text) for text in _listed(ppl)], "tasks": list(_listed(tasks))}
    what = _fields(Evaluation, {**named, **options})
    return run_evaluation(_form(model), what, Console(quiet=True), say or (lambda _: None))


def bench(
    dense: str | Path,
    *slim: str | Path,
    gate: bool = False,
    target_speedup: float | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Time forms of a model against the first, interleaved.

    Args:
        dense: the form to compare with: ONNX directory, checkpoint or hub id.
        *slim: the others.
        gate: whether the speed-ups are judged.
        target_speedup: what they are judged by; any above 1 when None.
        say: gets progress messages.
        **options: `prefill`, `decode`, `past`, `batch`, `repeats`, `threads`, `runtime`, `dtype`, `footprint`; see
            `fxprune.flows.benchmarking.Workload`. Where the command takes several, a list or one value.

    Returns:
        The figures, with `gate` where one was asked for.

    Raises:
        UsageError: there is nothing to compare, or an option is unknown or out of range.
        FxpruneError: a form cannot be opened or run.
    """
    from fxprune.flows.benchmarking import Workload, run_bench  # noqa: PLC0415 - as above

    if not slim:
        raise UsageError("give at least two forms to compare")
    given: dict[str, Any] = {}
    for name, value in options.items():
        several = name in {"prefill", "batch", "threads", "runtime"}
        field = {"batch": "batches", "runtime": "runtimes"}.get(name, name)
        given[field] = _listed(value) if several else value
        if name in {"prefill", "batch", "threads"} and not all(type(one) is int for one in given[field]):
            raise UsageError(f"{name} is a whole number, or several, not {value!r}")
    data, _ = run_bench(
        [_form(form) for form in (dense, *slim)],
        _fields(Workload, given),
        Console(quiet=True),
        say or (lambda _: None),
        gated=gate or target_speedup is not None,
        target=target_speedup,
    )
    return data


def _listed(value: Any) -> tuple[Any, ...]:
    """Several values; a lone one is one."""
    return (value,) if isinstance(value, (str, int, Path)) else tuple(value)


def _form(model: Any) -> str:
    """The name of a form: a directory, a hub id, or where a result lies.

    Raises:
        UsageError: it is a model in memory.
    """
    path = model.path if isinstance(model, Result) else model
    if not isinstance(path, (str, Path)):
        raise UsageError(
            f"a {type(model).__name__} has no directory: save it first, and name where (save_pretrained, fxprune.save, "
            "or the path of a result that was made with out)"
        )
    return str(path)


def _fields(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """A dataclass from keywords.

    Raises:
        UsageError: one is unknown.
    """
    known = list(kind.__dataclass_fields__)
    if unknown := [name for name in given if name not in known]:
        raise UsageError(f"unknown option {unknown[0]!r}; they are {', '.join(known)}")
    return kind(**given)
