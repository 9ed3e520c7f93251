"""The demonstration: the whole way on a real model, in one command.

inspect, prune at ratio 0.2, slim, verify, save, reload, export, benchmark, perplexity before and after, report. The
result appears whole in the output directory, or not at all.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.output import prepare_output, staged_directory
from fxprune.core.pipeline import build_pass
from fxprune.core.precision import coarsest, short_name
from fxprune.core.registry import resolve
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.driver import check_recipe
from fxprune.flows.quality import perplexities
from fxprune.flows.recipe import Destination, Recipe
from fxprune.flows.reporting import report_of
from fxprune.flows.steps import carry_out, check_classes, open_program
from fxprune.measure.forms import cases_of, export_pair, measure_speed
from fxprune.models.default_model import default_model_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxprune.core.program import Program
    from fxprune.models.loading import LoadedModel

__all__ = ["run_demo"]


def run_demo(
    out: Path,
    *,
    model: str | None,
    ratio: float,
    options: Mapping[str, Any],
    texts: Sequence[str],
    windows: int,
    threads: int,
    repeats: int,
    overwrite: bool,
    say: Callable[[str], None],
    show: Callable[[Program], None],
) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        out: directory that will hold `slim/`, `onnx/`, `report.json` and `report.html`.
        model: hub id or directory; the embedded SmolLM2-135M-Instruct when None.
        ratio: share of the block Linears' parameters to remove.
        options: further options of the channel pass (calibration, samples, seq_len, seed, uniform, ...).
        texts: texts for the perplexity: files, or `python` for Python's own language reference.
        windows: windows of 512 tokens per text.
        threads: of ONNX Runtime.
        repeats: timed repeats per case.
        overwrite: whether an earlier output may be replaced.
        say: called with one line before each stage.
        show: called with the located program.

    Returns:
        The report's data.

    Raises:
        FxpruneError: anything went wrong; an earlier output is whole.
    """
    prepare_output(out, overwrite=overwrite, inputs=[model])
    step = build_pass("channel", {"ratio": ratio, **options})
    watch = Stopwatch()
    with staged_directory(out, overwrite=overwrite) as staging:
        recipe = Recipe(model or _embedded(watch, say), (step,), Destination(staging / "slim"))
        check_recipe(recipe)
        check_classes(recipe)
        program = open_program(recipe, watch, say)
        show(program)
        say(f"pruning {ratio:.0%} of the block parameters, slimming, verifying, saving, reloading")
        labels = {"channel": "calibrating and choosing", "insert_masks": "inserting masks", "slim": "slimming"}
        labels |= {"verify": "verifying", "save": "saving"}
        program = carry_out(
            program,
            recipe.passes,
            out=recipe.place.out,
            on_pass=lambda step: say(f"  {labels.get(step.name, step.name)}"),
        )
        deployed = _deployable(program, staging / "slim", model or str(default_model_path()), say)
        say("exporting to ONNX and comparing ONNX Runtime with the slim graph")
        with watch.stage("export"):  # the report is of the program before it, which does not know this pass
            deployed = build_pass("export_onnx", {"out": str(staging / "onnx")})(deployed).program
        graph = staging / "onnx" / "model.onnx"
        deployed = build_pass("verify", {"onnx": str(graph), "graph": False})(deployed).program
        climbed = deployed.results["verify"]
        if deployed.source is not program.source:  # it was opened anew, and knows nothing of the rungs before
            climbed = [*program.results["verify"], *climbed]
        program = program.with_results(onnx=deployed.results["onnx"], verify=climbed)
        say("measuring perplexity before and after")
        with watch.stage("quality"):
            quality = perplexities(program, texts, windows=windows)
        say("exporting the dense model the same way, to have something to compare with")
        with watch.stage("bench"):
            dense, slim, scratch = export_pair(deployed, threads, graph)
            del deployed
            gc.collect()
            say(f"benchmarking dense against slim in ONNX Runtime, {threads} threads, interleaved")
            with scratch:
                results = measure_speed(dense, slim, cases_of((128, 512), 32, 128), threads=threads, repeats=repeats)
                del dense, slim
        sections = report_of(
            program,
            method=recipe.method,
            seed=recipe.seed,
            seconds=watch.seconds,
            speed=[result.to_json() for result in results],
            quality=quality,
            file_bytes=_file_bytes(program, staging),
        )
        report: dict[str, Any] = _without_staging(sections, str(staging), str(out))
        resolve("fxprune.exporters.report_writer:write_report")(report, staging)
    return report


def _embedded(watch: Stopwatch, say: Callable[[str], None]) -> LoadedModel:
    say("loading the embedded SmolLM2-135M-Instruct (converted once, then cached)")
    with watch.stage("load"):
        return replace(load_model(str(default_model_path())), name="SmolLM2-135M-Instruct")


def _deployable(program: Program, slim: Path, dense: str, say: Callable[[str], None]) -> Program:
    """The slim program, with the dense one beside it, in a precision that ONNX Runtime has kernels for.

    Args:
        program: slimmed, in the checkpoint's own precision.
        slim: where it was saved.
        dense: what it came from.
        say: told when the precision is another one.
    """
    dtype = coarsest(program.graph_module.parameters())
    if not resolve("fxprune.exporters.ort_types:unsupported_operators")(dtype):
        return program
    say(f"ONNX Runtime has no {short_name(dtype)} kernels on this CPU: both models are opened again in float32")
    watch = Stopwatch()
    opened = front_end(load_model(slim, dtype="float32"), watch)
    before = front_end(load_model(dense, dtype="float32"), watch)
    return opened.replace(references={**opened.references, "lifted": before.references["lifted"]})


def _file_bytes(program: Program, staging: Path) -> dict[str, int]:
    slim = sum(file.stat().st_size for file in (staging / "slim").glob("*.safetensors"))
    path = program.source.path if program.source else None
    dense = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path else 0
    return {"slim": slim} | ({"dense": dense} if dense else {})


def _without_staging(value: Any, staging: str, out: str) -> Any:
    """The report speaks of where things are, not of where they were while it was written."""
    if isinstance(value, str):
        return value.replace(staging, out)
    if isinstance(value, dict):
        return {key: _without_staging(item, staging, out) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_staging(item, staging, out) for item in value]
    return value
