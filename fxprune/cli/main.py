"""The command line: one command for each verb.

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

from fxprune.cli import common
from fxprune.cli import explain as cli_explain
from fxprune.cli import export as cli_export
from fxprune.cli import learn as cli_learn
from fxprune.cli import measure as cli_measure
from fxprune.cli import prune as cli_prune
from fxprune.cli import push as cli_push
from fxprune.cli import sparsify as cli_sparsify
from fxprune.cli.common import DEFAULT_THREADS, Json, Overwrite
from fxprune.cli.spellings import hint
from fxprune.cli.texts import TextField, Threads
from fxprune.core.errors import FxpruneError, UsageError

if TYPE_CHECKING:
    from types import FrameType


__all__ = ["app", "main"]

app = typer.Typer(
    help="Makes transformers physically smaller: trace, prune, slim, verify, export, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for slim/, onnx/, report.json and report.html.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Any other causal language model: hub id or directory.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the block Linears' parameters to remove.")] = 0.2,
    calibration: Annotated[str, typer.Option(help="Calibration text, see fxprune prune --help.")] = "self",
    text_field: TextField = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens of each calibration sequence.", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.", min=0)] = 0,
    uniform: Annotated[bool, typer.Option("--uniform", help="Same widths in every layer.")] = False,
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
        say=common.say,
        show=lambda program: show_groups(program, common.out),
    )
    common.summary(report)
    common.say(f"everything is in {out}/ - open {out / 'report.html'}")


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
    from fxprune.flows.from_config import inspect_program

    if picture is not None and picture.suffix.lower() not in {".svg", ".png"}:
        raise UsageError(f"--picture {picture}: the file's name must end in .svg or .png")
    program = inspect_program(model, Stopwatch())
    found = inspect_groups(program)
    show_inspection(found, common.out)
    if picture is not None:
        resolve("fxprune.exporters.group_picture:draw_block")(program, picture)
    common.write_json(json, found.to_json())


app.command()(cli_prune.prune)
app.command()(cli_sparsify.sparsify)
app.command()(cli_learn.learn)
app.command()(cli_explain.explain)
app.command()(cli_export.export)
app.command()(cli_export.verify)
app.command()(cli_measure.bench)
app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.compare)
app.command()(cli_push.push)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="YAML file: model, passes, and `out` for a recipe.")],
    model: Annotated[str | None, typer.Option(help="Model to run on, instead of the file's.")] = None,
    json: Json = None,
) -> None:
    """Run a recipe or a pipeline written in YAML; everything is validated before anything runs."""
    from fxprune.core.pipeline import read_yaml
    from fxprune.flows.driver import run as run_recipe
    from fxprune.flows.pipeline import run_pipeline
    from fxprune.flows.recipe import is_recipe, recipe_of_yaml
    from fxprune.flows.verbs import Result

    data = read_yaml(pipeline)
    if is_recipe(data):
        outcome = run_recipe(recipe_of_yaml(data, where=str(pipeline), model=model), say=common.say)
        common.finish(Result(outcome.report, outcome.program, outcome.path), json)
        return
    report = run_pipeline(data, where=str(pipeline), model=model, say=common.say)
    common.write_json(json, report)
    common.summary(report)


def _interrupted() -> int:
    common.say(
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
        common.say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    show: Any = getattr(error, "show", None)
    if show is None:
        common.say(f"error: {error.format_message()}")
    else:  # usage errors print the usage first
        show()
    option = getattr(error, "option_name", None)
    context: Any = getattr(error, "ctx", None)
    if option and (spelt := hint(getattr(context, "info_name", None), option)):
        common.say(f"{option}: {spelt}")
    return int(error.exit_code)
