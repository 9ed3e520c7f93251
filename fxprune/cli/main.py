"""The command line: `fxprune demo | inspect | prune | export | verify | bench | eval | compare | push | run`.

Exit status: 0 when what was asked was done and verified, 2 for a usage error, 1 with the typed error's message
otherwise, 130 when interrupted.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from fxprune.cli import export as cli_export
from fxprune.cli import l0 as cli_l0
from fxprune.cli import measure as cli_measure
from fxprune.cli import prune as cli_prune
from fxprune.cli import push as cli_push
from fxprune.cli.common import DEFAULT_THREADS, Device, Dtype, Json, Model, Overwrite, say, summary, write_json
from fxprune.cli.common import out as console
from fxprune.core.errors import FxpruneError, UsageError

if TYPE_CHECKING:
    from types import FrameType


__all__ = ["app", "main"]

app = typer.Typer(
    help="Makes transformers physically smaller: trace, prune, slim, verify, export, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Threads = Annotated[int, typer.Option(help="Threads of torch and ONNX Runtime.", min=1)]
Calibration = Annotated[
    str,
    typer.Option(
        help="`self` (text sampled from the model), a .txt file, records (.jsonl, .json, .parquet), or a hub data set."
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(help="Field of the calibration records; by default `text`, or chats through the model's template."),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences; the method's own number by default.", min=1)]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of each calibration sequence.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0)]
Uniform = Annotated[bool, typer.Option("--uniform", help="Same widths in every layer: loads with plain transformers.")]
RoundTo = Annotated[int, typer.Option(help="Kept MLP widths are multiples of this.", min=1)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for slim/, onnx/, report.json and report.html.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Any other causal language model: hub id or directory.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the block Linears' parameters to remove.")] = 0.2,
    calibration: Calibration = "self",
    text_field: TextField = None,
    samples: Samples = 32,
    seq_len: SeqLen = 128,
    seed: Seed = 0,
    uniform: Uniform = False,
    ppl: Annotated[
        list[str] | None, typer.Option(help="Text file for the perplexity; `python` is Python's language reference.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens per perplexity text.", min=1)] = 12,
    threads: Threads = DEFAULT_THREADS,
    repeats: Annotated[int, typer.Option(help="Timed repeats per benchmark case.", min=2)] = 10,
    overwrite: Overwrite = False,
) -> None:
    """Run the whole way on the embedded default model (or any other)."""
    from fxprune.cli.tables import show_groups
    from fxprune.core.budget import check_ratio
    from fxprune.flows.demo import run_demo

    check_ratio(ratio)
    options = {"calibration": calibration, "text_field": text_field, "samples": samples, "seq_len": seq_len}
    options |= {"seed": seed, "uniform": uniform}
    report = run_demo(
        out,
        model=model,
        ratio=ratio,
        options=options,
        texts=ppl or ["python"],
        windows=windows,
        threads=threads,
        repeats=repeats,
        overwrite=overwrite,
        say=say,
        show=lambda program: show_groups(program, console),
    )
    summary(report)
    say(f"everything is in {out}/ - open {out / 'report.html'}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, directory, or a config.json alone.", show_default=False)],
    picture: Annotated[
        Path | None, typer.Option(help="Draw one block's graph of groups to this file, .svg or .png.")
    ] = None,
    json: Json = None,
) -> None:
    """List what can be pruned, what it costs and what stands in the way; a config.json is enough."""
    from fxprune.channels.inspection import inspect_groups
    from fxprune.cli.tables import show_inspection
    from fxprune.core.registry import resolve
    from fxprune.core.stopwatch import Stopwatch
    from fxprune.flows.workflow import inspect_program

    if picture is not None and picture.suffix.lower() not in {".svg", ".png"}:
        raise UsageError(f"--picture {picture}: the file's name must end in .svg or .png")
    program = inspect_program(model, Stopwatch())
    found = inspect_groups(program)
    show_inspection(found, console)
    if picture is not None:
        resolve("fxprune.exporters.group_picture:draw_block")(program, picture)
    write_json(json, found.to_json())


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the pruned checkpoint and the report.")],
    ratio: cli_prune.Ratio = None,
    target_params: cli_prune.TargetParams = None,
    target_macs: cli_prune.TargetMacs = None,
    target_bytes: cli_prune.TargetBytes = None,
    target_speedup: cli_prune.TargetSpeedup = None,
    table: cli_prune.TableFile = None,
    mix: cli_prune.Mix = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Weights: share of each projection's weights to set to zero, in [0, 1).")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Weights: N:M, keep N of every M, such as 2:4.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="With --ratio or another target of size or speed: channel, fisher, osscar, flap, wanda-sp, taylor, "
            "magnitude, depth, random, or l0, which learns. "
            "With --sparsity or --pattern: magnitude, wanda, sparsegpt, alps."
        ),
    ] = "channel",
    calibration: Calibration = "self",
    text_field: TextField = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    uniform: Uniform = False,
    round_to: Annotated[int | None, typer.Option(help="Kept MLP widths are multiples of this.", min=1)] = None,
    min_keep: Annotated[
        float | None, typer.Option(help="Share of every group that stays whatever the scores say.")
    ] = None,
    keep: cli_prune.Keep = None,
    kinds: cli_prune.Kinds = None,
    reconstruct: cli_prune.Reconstruct = None,
    guard: cli_prune.Guard = "python",
    include: Annotated[
        list[str] | None, typer.Option(help="Weights: prune only projections like this, such as '*.k_proj'; repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Weights: leave projections like this dense; repeat.")
    ] = None,
    per_module: Annotated[
        list[str] | None, typer.Option(help="Weights: PATTERN=0.6, PATTERN=2:4 or PATTERN=dense; repeat.")
    ] = None,
    exclude_lm_head: Annotated[
        bool | None, typer.Option("--exclude-lm-head/--include-lm-head", help="Weights: leave the output dense.")
    ] = None,
    allocation: Annotated[str | None, typer.Option(help="Weights: uniform, or loss.")] = None,
    memory_bytes: Annotated[
        int | None, typer.Option(help="Weights: what kept activations may take in main memory before they go to files.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Weights: block by block from the shards; goes on after an interruption.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --stream or l0: throw unfinished work away.")
    ] = False,
    mode: cli_l0.Training = None,
    steps: cli_l0.Steps = None,
    epochs: cli_l0.Epochs = None,
    batch: cli_l0.Batch = None,
    budget: cli_l0.BudgetKind = None,
    schedule: cli_l0.Schedule = None,
    warm_up: cli_l0.WarmUp = None,
    lora_rank: cli_l0.LoraRank = None,
    lora_targets: cli_l0.LoraTargets = None,
    distillation: cli_l0.Distil = None,
    state: cli_l0.State = None,
    post_steps: cli_l0.PostSteps = None,
    post_data: cli_l0.PostData = None,
    option: cli_l0.Further = None,
    measure_speed: Annotated[
        bool, typer.Option("--measure-speed", help="Time the dense and the pruned model in ONNX Runtime.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed repeats; 10, or 30 to 300 for --target-speedup, until it is +-2%.", min=2),
    ] = None,
    threads: Threads = DEFAULT_THREADS,
    ppl: Annotated[list[str] | None, typer.Option(help="Text file for the perplexity before and after.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens per perplexity text.", min=1)] = 20,
    hold_zeros: cli_prune.HoldZeros = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Prune a model, verify it, and write a checkpoint that loads back: slim with --ratio, with zeros otherwise."""
    from fxprune.flows.assessment import Wanted, failed_gate, warnings_of
    from fxprune.flows.budget_run import prune_budgets
    from fxprune.flows.pruning import Destination, parse_per_module, pass_of, prune_model, stream_model

    targets = {
        "ratio": ratio,
        "target_params": target_params,
        "target_macs": target_macs,
        "target_bytes": target_bytes,
        "target_speedup": target_speedup,
    }
    given = {
        "sparsity": sparsity,
        "pattern": pattern,
        "calibration": None if calibration == "self" else calibration,
        "text_field": text_field,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed or None,
        "uniform": uniform or None,
        "round_to": round_to,
        "min_keep": min_keep,
        "include": include or None,
        "exclude": exclude or None,
        "per_module": parse_per_module(per_module or []) or None,
        "exclude_lm_head": exclude_lm_head,
        "allocation": allocation,
        "memory_bytes": memory_bytes,
    }
    learned: dict[str, Any] = {"mode": mode, "steps": steps, "epochs": epochs, "batch": batch, "budget": budget}
    learned |= {"schedule": schedule, "warm_up": warm_up, "lora_rank": lora_rank, "distillation": distillation}
    learned |= {"state": state, "post_steps": post_steps, "post_data": post_data}
    units = cli_prune.structured_options(
        targets, table=table, mix=mix, threads=threads, keep=keep or [], kinds=kinds, reconstruct=reconstruct
    )
    options = {**units, **{name: value for name, value in given.items() if value is not None}}
    options |= cli_l0.learned_options(learned, targets=lora_targets, further=option or [], others=options)
    place = Destination(out, device=device, dtype=dtype, overwrite=overwrite, hold_zeros=hold_zeros)
    wanted = Wanted(ppl=ppl or [], windows=windows, guard=guard, speed=measure_speed, threads=threads, repeats=repeats)
    if not stream:
        options = cli_l0.with_state(pass_of(method, options), options, out)
    if restart and not stream:
        cli_l0.clear_state(pass_of(method, options), options)
    if stream:
        if ppl or measure_speed:
            raise UsageError("--ppl and --measure-speed run the whole model, which --stream never holds: do it later")
        report = stream_model(model, method, options, place, restart=restart, say=say)
    else:
        prune_to = prune_budgets if cli_prune.several(options) else prune_model
        report = prune_to(model, method, options, place, wanted=wanted, say=say)
    write_json(json, report)
    summary(report)
    for text in warnings_of(report):
        say(f"warning: {text}")
    if failed_gate(report):
        raise typer.Exit(1)


app.command()(cli_export.export)
app.command()(cli_export.verify)


app.command()(cli_measure.bench)
app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.compare)
app.command()(cli_push.push)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="YAML file with `model` and `passes`.")],
    model: Annotated[str | None, typer.Option(help="Model to run on, instead of the file's.")] = None,
    json: Json = None,
) -> None:
    """Run a pipeline written in YAML; everything in it is validated before anything runs."""
    from fxprune.checkpoints.load_model import load_model
    from fxprune.core.pipeline import Pipeline, load_pipeline, read_yaml
    from fxprune.flows.pruning import check_model
    from fxprune.flows.reporting import report_of
    from fxprune.tracing.trace import trace

    data = read_yaml(pipeline)
    passes = load_pipeline(data, where=str(pipeline))
    where = model or (data.get("model") if isinstance(data, dict) else None)
    if not isinstance(where, str):
        raise UsageError(f"{pipeline}: no model; add `model: ID_OR_DIR` or pass --model")
    for step in passes:
        check_model(where, step)
    loaded = load_model(where)
    say("tracing")
    program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path)
    program = Pipeline(passes, on_pass=lambda p: say(p.name))(program).program
    report = report_of(program)
    write_json(json, report)
    summary(report)


def _interrupted() -> int:
    say(
        "interrupted; earlier output is whole, and what --stream has finished or l0 has learned is kept for "
        "the same command"
    )
    return 130


def main() -> None:
    """Entry point of the console script."""
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(signum, frame)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        status: Any = app(standalone_mode=False)
    except (KeyboardInterrupt, Exception) as error:
        # Native code may turn the interrupt into an error of its own; what fails after Ctrl-C is its consequence.
        if interrupted or isinstance(error, (KeyboardInterrupt, typer.Abort)):
            status = _interrupted()
        elif isinstance(error, (FxpruneError, TyperException)):
            status = _exit_status(error)
        else:
            raise
    else:
        status = _interrupted() if interrupted else status  # typer makes a status of it
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(status if isinstance(status, int) else 0)


def _exit_status(error: FxpruneError | TyperException) -> int:
    """Tell the user about an error of ours or of the command line's parser."""
    if isinstance(error, FxpruneError):
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    show: Any = getattr(error, "show", None)
    if show is None:
        say(f"error: {error.format_message()}")
    else:  # usage errors print the usage first
        show()
    return int(error.exit_code)
