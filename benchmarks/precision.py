"""What the input's precision costs: one method on the same model from a float32 and from a bfloat16 checkpoint.

    python -m benchmarks.precision --data DIR [--samples 128] [--seq-len 512] [--windows 60] [--out JSON]

DIR is laid out as for `fxprune eval --data`, with `calibration/sample_c4-rp1.jsonl` for the calibration text. The
bfloat16 checkpoint is the float32 one, rounded. Each is pruned, slimmed, verified, saved, and loaded back in bfloat16
for the perplexity on the test text of WikiText-2; the dense models are measured the same way. From bfloat16 at most 1%
of the perplexity may be lost against float32: the exit status says whether that holds.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import USUAL_SAMPLES, make_parser, write_results
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.perplexity import file_perplexity
from fxprune.flows.steps import prune_program
from fxprune.flows.verbs import method_of
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path
from fxprune.runtimes.runners import EagerRunner

if TYPE_CHECKING:
    import argparse

DTYPES = ("float32", "bfloat16")
ALLOWED = 0.01


def quality(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a checkpoint that is loaded in bfloat16."""
    loaded = load_model(checkpoint, dtype="bfloat16")
    found = file_perplexity(
        EagerRunner(loaded.model, "eager bfloat16"),
        arguments.data / "wikitext-2-raw" / "wiki.test.raw",
        loaded.tokenizer,
        max_windows=arguments.windows,
        batch_size=4,
    )
    return {"perplexity": found.perplexity, "perplexity_definition": found.definition}


def measure(checkpoint: Path, dtype: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prune one checkpoint in its own precision."""
    text = arguments.data / "calibration" / "sample_c4-rp1.jsonl"
    options: dict[str, Any] = {"ratio": arguments.ratio, "calibration": str(text), "samples": arguments.samples}
    options |= {"seq_len": arguments.seq_len, "seed": arguments.seed, **json.loads(arguments.options)}
    dense = quality(checkpoint, arguments)
    loaded = load_model(checkpoint)
    if loaded.model.dtype is not getattr(torch, dtype):
        raise SystemExit(f"{checkpoint} is in {loaded.model.dtype}, not in {dtype}")
    program = front_end(loaded, Stopwatch())
    start = time.perf_counter()
    out = scratch / f"slim-{dtype}"
    slim = prune_program(program, method_of(arguments.method, "prune"), options, out=out)
    section = slim.results["structured"]
    return {
        "dtype": dtype,
        "dense_perplexity": dense["perplexity"],
        **quality(out, arguments),
        "removed_share": section["removed_share"],
        "steps": section.get("second_order_steps"),
        "kept": {group.name: len(slim.plan.kept_units(group)) for group in program.groups} if slim.plan else {},
        "rungs": slim.results["verify"],
        "seconds": time.perf_counter() - start,
        "parts": section["seconds"],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> int:
    """Measure both, write the result; 1 if bfloat16 loses more than is allowed."""
    parser = make_parser(__doc__, "precision", samples=USUAL_SAMPLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="directory of a float32 checkpoint; the embedded default by default")
    parser.add_argument("--method", default="channel")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each calibration sequence")
    parser.add_argument("--windows", type=int, default=60, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="{}", help="further options of the pass, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = Path(arguments.model or default_model_path())
    rows = []
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        rounded = Path(scratch) / "bfloat16"
        loaded = load_model(source, dtype="bfloat16")
        loaded.model.save_pretrained(rounded)
        assert loaded.tokenizer is not None
        loaded.tokenizer.save_pretrained(rounded)
        del loaded
        for dtype, checkpoint in zip(DTYPES, (source, rounded), strict=True):
            rows.append(measure(checkpoint, dtype, arguments, Path(scratch)))
            gc.collect()
    full, low = (row["perplexity"] for row in rows)
    lost = low / full - 1
    result = {
        "model": source.name,
        "method": arguments.method,
        "ratio": arguments.ratio,
        "text": "wiki.test.raw",
        **{name: getattr(arguments, name) for name in ("samples", "seq_len", "windows", "seed", "threads")},
        "options": json.loads(arguments.options),
        "rows": rows,
        "lost": lost,
        "allowed": ALLOWED,
        "holds": lost <= ALLOWED,
        "machine": machine(),
    }
    write_results(arguments.out, result, quiet=True)
    print("| checkpoint | dense | pruned | removed | seconds |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['dtype']} | {row['dense_perplexity']:.2f} | {row['perplexity']:.2f} | "
            f"{row['removed_share']:.1%} | {row['seconds']:.0f} |"
        )
    print(f"bfloat16 against float32: {lost:+.2%}, at most {ALLOWED:+.0%} is allowed")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
