"""Weight pruning, measured: methods and sparsities against perplexity, LAMBADA, seconds and memory.

    python -m benchmarks.sparse_pruning --data DIR [--method ...] [--target ...] [--seed 0 1 2] [--out JSON]

DIR is laid out as for `fxprune eval --data`, with `calibration/sample_c4-rp1.jsonl` for the calibration text. Every
cell runs in a process of its own, so that its peak memory is its own, and is written as soon as it is measured: a run
that is interrupted goes on with the cells that are missing. `--plain` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import add_leaderboard_options, conditions, spread
from fxprune.checkpoints.load_model import load_model
from fxprune.core.output import write_json
from fxprune.core.pipeline import build_pass
from fxprune.evaluation.harness import evaluate_tasks
from fxprune.evaluation.perplexity import file_perplexity
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path
from fxprune.runtimes.runners import EagerRunner
from fxprune.tracing.lifted_graphs import state_tensors
from fxprune.tracing.trace import trace

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "alps": ("alps", {}),
    "alps, allocated": ("alps", {"allocation": "loss"}),
    "alps, distilled": ("alps", {"distil_epochs": 1.0}),
    "alps, distilled on a quarter": ("alps", {"distil_epochs": 0.25}),
    "alps, allocated, distilled": ("alps", {"allocation": "loss", "distil_epochs": 1.0}),
}
"""Rows of the table: a pass and its options."""

TARGETS = ("0.4", "0.5", "0.6", "2:4", "4:8")
RESULT = Path("benchmarks/results/sparse_pruning.json")


def measure(arguments: argparse.Namespace, method: str, target: str, seed: int) -> dict[str, Any]:
    """One cell: prune, then evaluate in bfloat16."""
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model or str(default_model_path()))
    entry: dict[str, Any] = {"method": method, "target": target, "seed": seed, "conditions": conditions(arguments)}
    if method != "dense":
        program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path)
        program = build_pass("lift_linears", {})(program).program
        key = "pattern" if ":" in target else "sparsity"
        name, more = METHODS[method]
        options: dict[str, Any] = {key: target if ":" in target else float(target), **more}
        options |= json.loads(arguments.options)
        if method != "magnitude":
            text = arguments.data / "calibration" / "sample_c4-rp1.jsonl"
            options |= {"calibration": str(text), "samples": arguments.samples, "seq_len": 512, "seed": seed}
        start = time.perf_counter()
        program = build_pass(name, options)(program).program
        sparsity = program.results["sparsity"]
        entry |= {
            "seconds": time.perf_counter() - start,
            "parts": sparsity["seconds"],
            "peak_rss_bytes": peak_rss_bytes(),
            "removed_share": sparsity["removed_share"],
            "mean_error": sparsity["mean_error"],
            "options": {**options, "calibration": Path(options.get("calibration", "none")).name},
            "calibration_sha256": program.results.get("calibration", {}).get("sha256"),
        }
        unknown = loaded.model.load_state_dict(state_tensors(program.graph_module), strict=False).unexpected_keys
        unknown = sorted(set(unknown) - {name for name, _ in loaded.model.named_buffers()})
        if unknown:
            raise SystemExit(f"the pruned graph has tensors that the model lacks: {unknown[:3]}")
        del program
    model = loaded.model.to(torch.bfloat16)
    runner = EagerRunner(model, "eager bfloat16")
    start = time.perf_counter()
    text = arguments.data / "wikitext-2-raw" / ("wiki.valid.raw" if arguments.valid else "wiki.test.raw")
    perplexity = file_perplexity(runner, text, loaded.tokenizer, max_windows=arguments.windows, batch_size=4)
    entry |= {"perplexity": perplexity.perplexity, "perplexity_definition": perplexity.definition}
    if arguments.rows:
        (lambada,) = evaluate_tasks(
            runner, loaded.tokenizer, ["lambada_openai"], data=arguments.data, limit=arguments.rows, batch_size=16
        )
        word = lambada["last_word_accuracy"]
        entry |= {"lambada": word.value, "lambada_se": word.standard_error}
    return entry | {"eval_seconds": time.perf_counter() - start, "threads": arguments.threads}


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each method and target, seeds together."""
    lines = [
        "| method | removed | perplexity | LAMBADA | prune s | peak GB | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for target in TARGETS:
            mine = [c for c in cells if (c["method"], c["target"]) == (method, target)]
            if not mine:
                continue
            perplexity = spread([c["perplexity"] for c in mine], ".1f")
            lambada = spread([c["lambada"] for c in mine if "lambada" in c], ".3f")
            threads = max(c["threads"] for c in mine)
            timed = [c["seconds"] for c in mine if "seconds" in c and c["threads"] == threads]
            seconds = f"{fmean(timed):.0f}" + (" (1 thread)" if threads == 1 else "") if timed else "-"
            peak = f"{max(c['peak_rss_bytes'] for c in mine) / 1e9:.1f}" if "peak_rss_bytes" in mine[0] else "-"
            removed = "-" if method == "dense" else target
            lines.append(f"| {method} | {removed} | {perplexity} | {lambada} | {seconds} | {peak} | {len(mine)} |")
    return "\n".join(lines)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell is found by."""
    return cell["method"], cell["target"], cell["seed"], json.dumps(cell["conditions"], sort_keys=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the cells that are missing, each in a process of its own."""
    cells = json.loads(arguments.out.read_text())["cells"] if arguments.out.is_file() else []
    wanted = [
        (method, target, seed)
        for target in arguments.target
        for method in arguments.method
        for seed in (arguments.seed if method not in {"dense", "magnitude"} else arguments.seed[:1])
        if method != "dense" or target == arguments.target[0]
        if "allocation" not in METHODS[method][1] or ":" not in target  # an N:M pattern is the same everywhere
    ]
    for cell in wanted:
        here = json.dumps(conditions(arguments), sort_keys=True)
        if any(key(known) == (*cell, here) for known in cells):
            continue
        passed = [part for part in sys.argv[1:] if part != "--plain"]
        command = [sys.executable, "-m", "benchmarks.sparse_pruning", *passed, "--cell", json.dumps(cell)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        cells.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            {
                k: v
                for k, v in cells[-1].items()
                if k in {"method", "target", "seed", "seconds", "perplexity", "lambada"}
            }
        )
        result = {"cells": cells, "machine": machine(), "windows": arguments.windows, "lambada_rows": arguments.rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, result)
    return {"cells": cells}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_leaderboard_options(parser, list(METHODS), RESULT, "LAMBADA rows; 0 for none")
    parser.add_argument("--target", nargs="+", default=list(TARGETS))
    arguments = parser.parse_args()
    if arguments.cell:
        method, target, seed = json.loads(arguments.cell)
        print(json.dumps(measure(arguments, method, target, seed)))
        return
    cells = json.loads(arguments.out.read_text())["cells"] if arguments.plain else run(arguments)["cells"]
    print(table(cells))


if __name__ == "__main__":
    main()
