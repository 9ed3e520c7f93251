"""The leaderboard of structured methods: quality, measured speed and seconds at equal size.

    python -m benchmarks.structured_pruning --data DIR [--method ...] [--ratio 0.1 0.2 0.3] [--seed 0 1 2] [--out JSON]

DIR is laid out as for `fxprune eval --data`, with `calibration/sample_c4-rp1.jsonl` for the calibration text. A method
calibrates once for all ratios, in a process of its own. For each ratio the model is pruned, slimmed and verified
(slim = masked), saved, loaded back in bfloat16 and evaluated; with `--speed` it is exported to ONNX, verified in ONNX
Runtime, and timed interleaved with the dense model. Cells that were measured before without it are not pruned again: a
model of their shapes is exported, verified and timed, whose weights are the dense model's. Each cell is written as soon
as it is measured: a run that is interrupted goes on with what is missing. `--plain` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.common import USUAL_SAMPLES, add_leaderboard_options, conditions, spread
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.groups import AttentionGroup
from fxprune.core.output import write_json
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.harness import evaluate_tasks
from fxprune.evaluation.perplexity import file_perplexity
from fxprune.flows.verbs import method_of
from fxprune.measure.forms import cases_of, export_pair, measure_speed
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path
from fxprune.runtimes.runners import EagerRunner
from fxprune.structured.curves import Limits, head_curve

if TYPE_CHECKING:
    from fxprune.core.program import Program

METHODS = ("dense", "channel", "fisher", "osscar", "flap", "wanda-sp", "taylor", "magnitude", "depth", "random")
RESULT = Path("benchmarks/results/structured_pruning.json")
TASKS = {"lambada_openai": "last_word_accuracy", "arc_easy": "acc"}


def measure(arguments: argparse.Namespace, method: str, seed: int, ratios: list[float]) -> None:
    """All ratios of one method: a line of JSON for each on standard output."""
    torch.set_num_threads(arguments.threads)
    entry: dict[str, Any] = {"method": method, "seed": seed, "conditions": conditions(arguments)}
    if method == "dense":
        figures = quality(arguments, arguments.model or str(default_model_path()))
        print(json.dumps({**entry, "ratio": 0.0, **figures, "threads": arguments.threads}), flush=True)
        return
    loaded = load_model(arguments.model or str(default_model_path()))
    program = front_end(loaded, Stopwatch())
    text = arguments.data / "calibration" / "sample_c4-rp1.jsonl"
    options: dict[str, Any] = {"ratio": ratios, "calibration": str(text), "samples": arguments.samples}
    options |= {"seq_len": 512, "seed": seed, **json.loads(arguments.options)}
    step: Any = build_pass(method_of(method, "prune"), options)
    start = time.perf_counter()
    step.requires(program)
    budgets = step.budgets(program)
    shared = time.perf_counter() - start
    for index, ratio in enumerate(ratios):
        start = time.perf_counter()
        pruned = step.apply(program, budgets, index).program
        section = pruned.results["structured"]
        figures = {
            "ratio": ratio,
            "removed_share": section["removed_share"],
            "seconds": shared / len(ratios) + time.perf_counter() - start,
            "parts": section["seconds"],
            "peak_rss_bytes": peak_rss_bytes(),
            "kept": {group.name: len(pruned.plan.kept_units(group)) for group in program.groups},
            "calibration_sha256": pruned.results.get("calibration", {}).get("sha256"),
        }
        with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
            out = Path(scratch) / "slim"
            passes = [build_pass(name, {}) for name in ("insert_masks", "slim", "verify")]
            slim = Pipeline([*passes, build_pass("save", {"out": str(out)})])(pruned).program
            del pruned
            figures |= quality(arguments, str(out))
            if arguments.speed:
                figures |= speed(arguments, slim, Path(scratch) / "onnx")
            del slim
        gc.collect()
        print(json.dumps({**entry, **figures, "threads": arguments.threads}), flush=True)


def quality(arguments: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """Perplexity and tasks of a checkpoint, loaded in bfloat16."""
    loaded = load_model(checkpoint, dtype="bfloat16")
    runner = EagerRunner(loaded.model, "eager bfloat16")
    start = time.perf_counter()
    text = arguments.data / "wikitext-2-raw" / ("wiki.valid.raw" if arguments.valid else "wiki.test.raw")
    perplexity = file_perplexity(runner, text, loaded.tokenizer, max_windows=arguments.windows, batch_size=4)
    figures: dict[str, Any] = {"perplexity": perplexity.perplexity, "perplexity_definition": perplexity.definition}
    for task in arguments.tasks:
        (result,) = evaluate_tasks(
            runner, loaded.tokenizer, [task], data=arguments.data, limit=arguments.rows, batch_size=16
        )
        metric = result[TASKS[task]]
        figures[task] = metric.value
        figures[f"{task}_se"] = metric.standard_error
    return figures | {"eval_seconds": time.perf_counter() - start}


def speed(arguments: argparse.Namespace, slim: Program, onnx: Path) -> dict[str, Any]:
    """Speed-up of the exported slim graph against the dense one exported alike, interleaved."""
    exported = Pipeline(
        [
            build_pass("export_onnx", {"out": str(onnx)}),
            build_pass("verify", {"onnx": str(onnx / "model.onnx"), "reexport": False, "graph": False}),
        ]
    )(slim).program
    dense_form, slim_form, scratch = export_pair(exported, arguments.threads, onnx / "model.onnx")
    with scratch:
        results = measure_speed(
            dense_form,
            slim_form,
            cases_of([512], 32, 128),
            threads=arguments.threads,
            repeats=arguments.repeats,
        )
    return {"speed": [result.to_json() for result in results], "speed_cpu": machine()["cpu"]}


def plan_of(program: Program, counts: dict[str, int]) -> Plan:
    """A plan with so many units in each group; which ones they are makes no difference in time.

    In an attention whole KV heads go first: the counts do not say how many KV heads there are.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for group in program.groups:
        count = counts[group.name]
        if count == group.units:
            continue
        if isinstance(group, AttentionGroup):
            curve = head_curve(group, lambda _: 0.0, np.zeros(group.units), Limits(min_keep=0.0))
            found = [level.kept for level in curve.levels if len(level.kept) == count]
            kept[group.name] = min(found, key=lambda heads: len(group.kv_kept(heads)))
        else:
            kept[group.name] = tuple(range(count))
    return Plan.of(kept)


def time_shapes(arguments: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Time models of the shapes that cells have: a line of JSON for each, the cell with its speed."""
    torch.set_num_threads(arguments.threads)
    program = front_end(load_model(arguments.model or str(default_model_path())), Stopwatch())
    for cell in cells:
        masked = Pipeline([build_pass(name, {}) for name in ("insert_masks", "slim", "verify")])
        slim = masked(program.replace(plan=plan_of(program, cell["kept"]))).program
        with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
            found = speed(arguments, slim, Path(scratch) / "onnx")
        del slim
        gc.collect()
        print(json.dumps({**cell, **found}), flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each method and ratio, seeds together."""
    lines = [
        "| method | removed | perplexity | LAMBADA | ARC-easy | prefill-512 | decode | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    labels = sorted({label(cell) for cell in cells}, key=lambda one: (METHODS.index(one.split(",")[0]), one))
    for method in labels:
        mine = [cell for cell in cells if label(cell) == method]
        for ratio in sorted({cell["ratio"] for cell in mine}):
            rows = [cell for cell in mine if cell["ratio"] == ratio]
            figures = [
                figure(rows, "perplexity", ".1f"),
                *(figure(rows, task, ".3f") for task in TASKS),
                *(speed_up(rows, kind) for kind in ("prefill", "decode")),
                seconds(rows),
                str(len(rows)),
            ]
            removed = f"{ratio:.0%}" if ratio else "-"
            lines.append(f"| {method} | {removed} | {' | '.join(figures)} |")
    return "\n".join(lines)


def label(cell: dict[str, Any]) -> str:
    """The method, and what of its conditions is not usual."""
    return ", ".join([cell["method"], *unusual(cell)])


def unusual(cell: dict[str, Any]) -> list[str]:
    """What of a cell's conditions is not usual."""
    here = cell["conditions"]
    parts = []
    if cell["method"] != "dense" and here["samples"] != USUAL_SAMPLES:
        parts.append(f"{here['samples']} samples")
    parts += [f"{name}={value}" for name, value in here["options"].items()]
    return parts + (["wiki.valid"] if here["text"] == "wiki.valid.raw" else [])


def figure(rows: list[dict[str, Any]], name: str, form: str) -> str:
    """One figure of all seeds."""
    return spread([row[name] for row in rows if name in row], form)


def seconds(rows: list[dict[str, Any]]) -> str:
    """Seconds of pruning a budget, of the seeds that had the most threads, and whether that was one."""
    timed = [row for row in rows if "seconds" in row]
    most = max((row["threads"] for row in timed), default=0)
    found = spread([row["seconds"] for row in timed if row["threads"] == most], ".0f")
    return f"{found} (1 thread)" if most == 1 else found


def speed_up(rows: list[dict[str, Any]], kind: str) -> str:
    """Mean speed-up of the cases of a kind."""
    found = [one["speedup"] for row in rows for one in row.get("speed", ()) if one["case"].startswith(kind)]
    return f"{fmean(found):.2f}x" if found else "-"


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell is found by."""
    return cell["method"], cell["seed"], cell["ratio"], json.dumps(cell["conditions"], sort_keys=True)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is missing, each method and seed in a process of its own."""
    cells = json.loads(arguments.out.read_text())["cells"] if arguments.out.is_file() else []
    here = conditions(arguments)
    seedless = {"dense", "magnitude"}
    wanted = [(m, seed) for m in arguments.method for seed in (arguments.seed if m not in seedless else [0])]
    for method, seed in wanted:
        ratios = [0.0] if method == "dense" else arguments.ratio
        known = [
            cell
            for cell in cells
            if (cell["method"], cell["seed"], cell["conditions"]) == (method, seed, here) and cell["ratio"] in ratios
        ]
        missing = [ratio for ratio in ratios if ratio not in {cell["ratio"] for cell in known}]
        if missing:
            cells = collect(arguments, cells, ["prune", method, seed, missing])
        if arguments.speed and method != "dense":
            found = {key(cell): timed_alike(cell, cells, arguments.threads) for cell in known}
            if list(found.values()) != known:
                cells = [found.get(key(cell), cell) for cell in cells]
                write(arguments, cells)
            if untimed := [cell for cell in found.values() if "speed" not in cell]:
                cells = collect(arguments, cells, ["time", untimed])
    return cells


def write(arguments: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Keep what is there."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"cells": cells, "machine": machine()})


def timed_alike(cell: dict[str, Any], cells: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """A cell with the speed of another one of the same shapes, if one was timed on this processor."""
    if "speed" in cell:
        return cell
    processor = machine()["cpu"]
    for other in (one for one in cells if one.get("speed_cpu") == processor):
        same = other["conditions"]["model"] == cell["conditions"]["model"] and other["kept"] == cell["kept"]
        if same and all(case["threads"] == threads for case in other["speed"]):
            return {**cell, "speed": other["speed"], "speed_cpu": other["speed_cpu"]}
    return cell


def collect(arguments: argparse.Namespace, cells: list[dict[str, Any]], work: list[Any]) -> list[dict[str, Any]]:
    """All cells with those that a process of its own measures, written as they come; `work` is what it is asked for."""
    passed = [part for part in sys.argv[1:] if part != "--plain"]
    command = [sys.executable, "-m", "benchmarks.structured_pruning", *passed, "--cell", json.dumps(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if not line.startswith("{"):
                continue
            cell = json.loads(line)
            cells = [old for old in cells if key(old) != key(cell)] + [cell]
            told = ("method", "ratio", "seed", "perplexity", "lambada_openai", "seconds")
            print({name: cell.get(name) for name in told}, flush=True)
            write(arguments, cells)
    if worker.returncode:
        raise SystemExit(f"{work[0]}: the measuring process ended with {worker.returncode}")
    return cells


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_leaderboard_options(parser, list(METHODS), RESULT, "rows of each task")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--repeats", type=int, default=10, help="timed repeats of each case")
    parser.add_argument("--speed", action="store_true", help="export to ONNX and time it too")
    arguments = parser.parse_args()
    if arguments.cell:
        work, *given = json.loads(arguments.cell)
        (measure if work == "prune" else time_shapes)(arguments, *given)
        return
    cells = json.loads(arguments.out.read_text())["cells"] if arguments.plain else run(arguments)
    print(table(cells))


if __name__ == "__main__":
    main()
