"""Streaming, measured: a 7B-shaped checkpoint block by block, and how time and memory grow with blocks.

    python -m benchmarks.streaming --calibration FILE [--scratch DIR] [--method sparsegpt] [--out JSON]

Writes random bfloat16 checkpoints of Llama shapes to the scratch directory (13.5 GB for the large one), prunes the
first blocks of the large one, and all blocks of smaller ones with 4, 8 and 16 blocks. Every run is a process of its
own, so that its peak memory is its own. Random weights cost the same as trained ones; their quality is not looked at.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.common import make_parser, write_results
from fxprune.core.pipeline import build_pass
from fxprune.flows.streaming_run import prune_streaming
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.models.default_model import default_model_path

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
SMALL = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16}


def write_checkpoint(directory: Path, shape: dict[str, int], tokenizer: Any) -> None:
    """Random bfloat16 weights, one shard a layer; nothing is held but a layer."""
    if (directory / "model.safetensors.index.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(vocab_size=len(tokenizer), architectures=["LlamaForCausalLM"], dtype="bfloat16", **shape)
    config.num_key_value_heads = config.num_attention_heads
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    hidden, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)

    def weight(out: int, into: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(out, into, generator=generator) * into**-0.5
        return drawn.to(torch.bfloat16)

    places: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    shard("model-embed.safetensors", {"model.embed_tokens.weight": weight(len(tokenizer), hidden)})
    shard("model-head.safetensors", {"lm_head.weight": weight(len(tokenizer), hidden)})
    shard("model-norm.safetensors", {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.self_attn.{name}_proj.weight": weight(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": weight(inner, hidden) for name in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        shard(f"model-{layer:05d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class _Enough(Exception):  # noqa: N818 - the run has done what was asked
    pass


def measure(arguments: argparse.Namespace, directory: Path, blocks: int) -> dict[str, Any]:
    """Prune the first blocks; seconds at the end of each, and the peak memory."""
    torch.set_num_threads(arguments.threads)
    options = {"calibration": arguments.calibration, "samples": arguments.samples, "seq_len": 512}
    step: Any = build_pass(arguments.method, options)
    ends: list[float] = []
    start = time.perf_counter()
    total = 0

    def on_block(done: int, of: int) -> None:
        nonlocal total
        ends.append(time.perf_counter() - start)
        total = of
        if done == blocks and done < of:
            raise _Enough

    sections: dict[str, Any] = {}
    try:
        report = prune_streaming(
            directory, arguments.scratch / "out", step, restart=True, overwrite=True, on_block=on_block
        )
        sections = report["sparsity"]["seconds"]
    except _Enough:
        pass
    return {"blocks": blocks, "of": total, "ends": ends, "seconds": sections, "peak_rss_bytes": peak_rss_bytes()}


def child(directory: Path, blocks: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.streaming", *sys.argv[1:], "--measure", str(directory), str(blocks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(directory.name, found, flush=True)
    return found


def main() -> None:
    """Parse the command line, write checkpoints, measure, print and write."""
    parser = make_parser(__doc__, "streaming", samples=16)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--scratch", type=Path, default=Path("build/streaming"))
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--blocks", type=int, default=2, help="of the large model")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments, Path(arguments.measure[0]), int(arguments.measure[1]))))
        return
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    growth = []
    for layers in (4, 8, 16):
        directory = arguments.scratch / f"small-{layers}"
        write_checkpoint(directory, {**SMALL, "num_hidden_layers": layers}, tokenizer)
        growth.append(child(directory, layers))
    large = arguments.scratch / "large"
    write_checkpoint(large, LARGE, tokenizer)
    found = child(large, arguments.blocks)
    per_block = (found["ends"][-1] - found["ends"][0]) / max(len(found["ends"]) - 1, 1)
    result = {
        "growth": growth,
        "large": found,
        "bytes": sum(path.stat().st_size for path in large.glob("*.safetensors")),
        "seconds_per_block": per_block,
        "extrapolated_seconds": found["ends"][0] + per_block * (found["of"] - 1),
        "method": arguments.method,
        "samples": arguments.samples,
        "threads": arguments.threads,
        "machine": machine(),
    }
    write_results(arguments.out, result)


if __name__ == "__main__":
    main()
