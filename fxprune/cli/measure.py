"""The commands that measure forms of a model: `fxprune bench`, `fxprune eval` and `fxprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune.cli import common
from fxprune.cli.common import DEFAULT_THREADS, Device, Dtype, Json, say

if TYPE_CHECKING:
    from fxprune.flows.evaluation import Evaluation

__all__ = ["bench", "compare", "evaluate"]

Output = Annotated[Path | None, typer.Option(help="Directory for report.json, report.html and report.md.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the Markdown, for a pull request, to this file.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer of forms that have none: directory or hub id.")]
Ppl = Annotated[list[Path] | None, typer.Option(help="Text file for the perplexity; repeat for several.")]
Tasks = Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval's harness, separated by commas.")]
Data = Annotated[Path | None, typer.Option(help="Directory with the tasks' files; the hub by default.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many documents of a task.", min=1)]
Window = Annotated[int, typer.Option(help="Tokens per window of a text.", min=2)]
Windows = Annotated[int | None, typer.Option(help="Use only the first so many windows of a text.", min=1)]
BatchSize = Annotated[str, typer.Option(help="Windows or sequences at once; `auto`: from free memory.")]


def _evaluation(ppl: list[Path] | None, tasks: list[str] | None, batch_size: str, **others: Any) -> Evaluation:
    """What to measure, from texts; tasks are named one by one or separated by commas."""
    from fxprune.flows.evaluation import Evaluation
    from fxprune.runtimes.batching import parse_batch_size

    named = [name.strip() for names in tasks or () for name in names.split(",") if name.strip()]
    return Evaluation(ppl=ppl or (), tasks=named, batch_size=parse_batch_size(batch_size), **others)


def bench(
    dense: Annotated[str, typer.Argument(help="The form to compare with: ONNX directory, checkpoint or hub id.")],
    slim: Annotated[list[str] | None, typer.Argument(help="Other forms, each timed against the first.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Measure the one model given at several widths; write its latency table here.")
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="torch, torch.compile, onnxruntime, genai; repeat. What the forms are made for by default."),
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 1 unless surely faster, and say why not.")] = False,
    target_speedup: Annotated[
        float | None, typer.Option(help="Exit with 1 unless every case is surely this much faster, less 5%.")
    ] = None,
    prefill: Annotated[list[int] | None, typer.Option(help="Prompt lengths; repeat for several.", min=1)] = None,
    decode: Annotated[int, typer.Option(help="Tokens to decode; 0 for none.", min=0)] = 32,
    past: Annotated[int, typer.Option(help="Cache length before decoding.", min=1)] = 128,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once, 1 by default; repeat.", min=1)] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Timed repeats; 10, 6 a width of a table, or 30 to 300 with a gate, until it is +-2%.", min=2
        ),
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of the runtimes; repeat.", min=1)] = None,
    footprint: Annotated[
        bool, typer.Option(help="Measure load time and peak memory, each form in a process of its own.")
    ] = True,
    dtype: Dtype = None,
    markdown: Markdown = None,
    json: Json = None,
) -> None:
    """Time forms of a model against the first, interleaved; or build the latency table of one."""
    from fxprune.core.errors import UsageError
    from fxprune.core.output import write_json, write_text
    from fxprune.core.registry import resolve
    from fxprune.flows.benchmarking import Workload, run_bench, run_table

    work = Workload(
        prefill=prefill or (),
        decode=decode,
        past=past,
        repeats=repeats,
        threads=threads or (DEFAULT_THREADS,),
        dtype=dtype,
        batches=batch or (1,),
        runtimes=runtime or (),
        footprint=footprint,
    )
    gated = gate or target_speedup is not None
    if bool(slim) == (table is not None) or (gated and not slim):
        raise UsageError("give at least two forms to compare, with --gate or without; or one model and --table FILE")
    if table is not None:
        if len(work.threads) > 1 or batch or runtime or markdown:
            raise UsageError("a latency table has one number of threads, batch 1, ONNX Runtime, and is JSON")
        data = run_table(dense, table, work, common.out, say)
        verdict = None
    else:
        data, verdict = run_bench([dense, *(slim or ())], work, common.out, say, gated=gated, target=target_speedup)
    if json is not None:
        write_json(json, data)
    if markdown is not None:
        write_text(markdown, resolve("fxprune.exporters.report_bench:bench_markdown")(data))
    if verdict is not None and not verdict.passed:
        raise typer.Exit(1)


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub id, or ONNX directory with its tokenizer.")],
    ppl: Ppl = None,
    tasks: Tasks = None,
    data: Data = None,
    limit: Limit = None,
    window: Window = 512,
    windows: Windows = None,
    batch_size: BatchSize = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a task's sequence; the model's by default.", min=2)
    ] = None,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Perplexity and zero-shot tasks of any form of a model."""
    from fxprune.core.output import write_json
    from fxprune.flows.evaluation import run_evaluation

    what = _evaluation(
        ppl,
        tasks,
        batch_size,
        data=data,
        limit=limit,
        window=window,
        windows=windows,
        max_length=max_length,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
    )
    measured = run_evaluation(model, what, common.out, say)
    if json is not None:
        write_json(json, measured)


def compare(
    forms: Annotated[
        list[str], typer.Argument(help="Checkpoints, hub ids, ONNX directories; the first is compared with.")
    ],
    ppl: Ppl = None,
    tasks: Tasks = None,
    data: Data = None,
    limit: Limit = None,
    window: Window = 512,
    windows: Windows = None,
    batch_size: BatchSize = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a task's sequence; the shortest form's by default.", min=2)
    ] = None,
    tokenizer: Tokenizer = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep results, and use those that were kept.")
    ] = True,
    out: Output = None,
    markdown: Markdown = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    json: Json = None,
) -> None:
    """Evaluate forms of a model alike and test their differences to the first: dense, slim, ONNX, int4."""
    import rich.markdown

    from fxprune.core.output import prepare_output, staged_directory, write_json, write_text
    from fxprune.core.registry import resolve
    from fxprune.evaluation.eval_cache import EvaluationCache
    from fxprune.flows.comparison import run_comparison

    if out is not None:
        prepare_output(out, overwrite=overwrite)
    what = _evaluation(
        ppl,
        tasks,
        batch_size,
        data=data,
        limit=limit,
        window=window,
        windows=windows,
        max_length=max_length,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
    )
    result = run_comparison(forms, what, say, cache=EvaluationCache.of_user() if cache else EvaluationCache(None))
    shown = resolve("fxprune.exporters.report_comparison:comparison_markdown")(result)
    common.out.print(rich.markdown.Markdown(shown.partition("\n<details>")[0]))
    if out is not None:
        with staged_directory(out, overwrite=overwrite) as staging:
            resolve("fxprune.exporters.report_comparison:write_comparison")(result, staging)
        say(f"open {out / 'report.html'}")
    if markdown is not None:
        write_text(markdown, shown)
    if json is not None:
        write_json(json, result)
