"""What an export costs: seconds and peak memory of `fxprune export`, verification included, in a process of its own.

    python -m benchmarks.export_cost [--model DIR --ratio 0.3] [--scratch DIR] [--out JSON]

Two rows: a slim checkpoint of a real model (the embedded default, pruned by magnitude, which is no slower to export
than any other), and a Llama of 1.24 billion parameters with random float32 weights. Beside the command's peak stand the
bytes of the weights; the rest of the seconds are imports, loading, tracing and verification.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common import make_parser, write_results
from fxprune.measure.footprint import form_bytes
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path

BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
"""Llama 3.2 1B."""

COMMAND = "import sys; sys.argv[0] = 'fxprune'; from fxprune.cli.main import main; main()"


def checkpoint(directory: Path, tokenizer: Any) -> None:
    """A checkpoint of random float32 weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BILLION, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def export(arguments: list[str]) -> None:
    """In a process of its own: run the command, then say how long and how large."""
    start = time.perf_counter()
    sys.argv = ["fxprune", *arguments]
    from fxprune.cli.main import main as command  # noqa: PLC0415 - the import belongs to the time

    status = 0
    try:
        command()
    except SystemExit as ended:
        status = int(ended.code or 0)
    found = {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes(), "status": status}
    print(json.dumps(found), flush=True)


def measure(name: str, source: Path, out: Path, threads: int) -> dict[str, Any]:
    """Export a checkpoint."""
    command = [sys.executable, "-m", "benchmarks.export_cost", "--export", str(source), str(out), str(threads)]
    figures = out.with_suffix(".json")
    command.append(str(figures))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["status"]:
        raise SystemExit(f"the export of {name} ended with {found['status']}")
    weights = form_bytes(source)
    found["stages"] = json.loads(figures.read_text())["onnx"]["seconds"]
    found |= {"model": name, "weight_bytes": weights, "onnx_bytes": form_bytes(out)}
    return found | {"peak_over_weights": found["peak_rss_bytes"] / weights}


def main() -> None:
    """Export both and write the figures."""
    if sys.argv[1:2] == ["--export"]:
        source, out, threads, figures = sys.argv[2:]
        torch.set_num_threads(int(threads))
        export(["export", source, "--out", out, "--json", figures])
        return
    parser = make_parser(__doc__, "export_cost")
    parser.add_argument("--model", help="hub id or directory; the embedded default by default")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--small", action="store_true", help="only the first row")
    parser.add_argument("--scratch", type=Path, help="where checkpoints and graphs are written; removed afterwards")
    arguments = parser.parse_args()
    given = arguments.model or str(default_model_path())
    rows = []
    with tempfile.TemporaryDirectory(prefix="fxprune-", dir=arguments.scratch) as scratch:
        slim, large = Path(scratch) / "slim", Path(scratch) / "large"
        prune = ["prune", given, "--method", "magnitude", "--ratio", str(arguments.ratio), "--out", str(slim)]
        subprocess.run([sys.executable, "-c", COMMAND, *prune, "--guard", "none"], check=True)
        rows.append(
            measure(f"{Path(given).name}, {arguments.ratio:.0%} removed", slim, Path(scratch) / "a", arguments.threads)
        )
        if not arguments.small:
            checkpoint(large, AutoTokenizer.from_pretrained(given))
            rows.append(measure("Llama of 1.24 billion parameters", large, Path(scratch) / "b", arguments.threads))
    print("| model | weights, GB | seconds | of it the export | peak memory, GB | times the weights |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['weight_bytes'] / 1e9:.2f} | {row['seconds']:.1f} | {sum(row['stages'].values()):.1f}"
        sizes += f" | {row['peak_rss_bytes'] / 1e9:.2f}"
        print(f"| {row['model']} | {sizes} | {row['peak_over_weights']:.2f} |")
    write_results(arguments.out, {"rows": rows, "machine": machine(), "threads": arguments.threads}, quiet=True)


if __name__ == "__main__":
    main()
