"""The main job, measured: errors of every rung, size, speed against its bound, seconds per stage, perplexity.

    python -m benchmarks.main_job --ratio 0.1 0.3 0.5 --calibration FILE --ppl FILE [--repeats 20] [--out JSON]

One model, one calibration, one run per ratio. Prints a Markdown table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.output import write_json
from fxprune.core.pipeline import build_pass
from fxprune.core.stopwatch import Stopwatch
from fxprune.flows.quality import perplexities
from fxprune.flows.reporting import report_of
from fxprune.flows.steps import prune_program
from fxprune.measure.forms import cases_of, export_pair, measure_speed
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every ratio; returns the JSON result."""
    watch = Stopwatch()
    loaded = load_model(arguments.model or str(default_model_path()))
    located = front_end(loaded, watch)
    runs = []
    for ratio in arguments.ratio:
        print(f"ratio {ratio}", flush=True)
        options = {
            "ratio": ratio,
            "calibration": arguments.calibration,
            "samples": arguments.samples,
            "seq_len": arguments.seq_len,
            "seed": arguments.seed,
        }
        with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
            program = prune_program(located, arguments.method, options, out=Path(scratch) / "slim")
            graph = Path(scratch) / "onnx" / "model.onnx"
            program = build_pass("export_onnx", {"out": str(graph.parent)})(program).program
            program = build_pass("verify", {"onnx": str(graph), "graph": False})(program).program
            quality = perplexities(program, arguments.ppl, windows=arguments.windows) if arguments.ppl else None
            start = time.perf_counter()
            dense, slim, dense_directory = export_pair(program, arguments.threads, graph)
            dense_export = time.perf_counter() - start
            gc.collect()
            with dense_directory:
                cases = cases_of((128, 512), 32, 128)
                speed = measure_speed(dense, slim, cases, threads=arguments.threads, repeats=arguments.repeats)
                del dense, slim
        report = report_of(program, method=arguments.method, seed=arguments.seed, speed=[r.to_json() for r in speed])
        report |= {"quality": quality, "ratio": ratio, "dense_export_seconds": dense_export}
        runs.append(report)
        del program
        gc.collect()
    return {
        "model": loaded.name,
        "front_end_seconds": watch.seconds,
        "threads": arguments.threads,
        "runs": runs,
        "machine": machine(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown table of a result."""
    lines = [
        (
            "| ratio | removed | slim = masked | ONNX Runtime = slim | perplexity (dense -> slim) | prefill-512 "
            "| bound | decode | bound | slim s | export s |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in result["runs"]:
        rungs = {rung["rung"]: rung["max_abs_error"] for rung in report["verify"]}
        speed = {entry["case"]: entry for entry in report["speed"]}
        prefill, decode = speed["prefill-512"], speed["decode-32@128"]
        quality = (report["quality"] or [{}])[0]
        ppl = f"{quality['dense']:.1f} -> {quality['slim']:.1f}" if quality else "-"
        seconds = {event["name"]: event["seconds"] for event in report["history"]}
        lines.append(
            f"| {report['ratio']} | {report['params']['removed_share_blocks']:.1%} | {rungs['slim = masked']:.1e} "
            f"| {rungs['ONNX Runtime = slim']:.1e} | {ppl} "
            f"| {prefill['speedup']:.2f}x [{prefill['ci'][0]:.2f}, {prefill['ci'][1]:.2f}] | {prefill['bound']:.2f}x "
            f"| {decode['speedup']:.2f}x [{decode['ci'][0]:.2f}, {decode['ci'][1]:.2f}] | {decode['bound']:.2f}x "
            f"| {seconds['slim']:.1f} | {seconds['export_onnx']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or directory; the embedded default by default")
    parser.add_argument("--method", default="channel", help="any structured method")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ppl", nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/main_job.json"))
    arguments = parser.parse_args()
    result = run(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
