"""How long `fxprune inspect` takes and how much memory, by depth: Llama-3-70B, a thousand layers, 128 experts.

    python -m benchmarks.inspect_scale [--only llama toy moe] [--out JSON]        (each case is written when it is done)

Each case runs in a process of its own, on the meta device. `wall` is what a user waits for, imports included; the
stages are those inside of it. The peak is the process's, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, Qwen3MoeConfig

from fxprune.core.output import write_json
from fxprune.measure.speed import machine, peak_rss_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEPTHS = (10, 20, 40, 80)
TARGET_SECONDS, TARGET_BYTES = 60.0, 1.5e9


def _llama3_70b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def _toy(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97, hidden_size=12, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def _qwen3_30b_a3b(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, max_position_embeddings=40960, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


CASES = {
    **{f"llama-3-70b, {depth} layers": (_llama3_70b, depth) for depth in DEPTHS},
    "toy, 1000 layers": (_toy, 1000),
    "moe 128 experts, 48 layers": (_qwen3_30b_a3b, 48),
}


def inspect_once(directory: str) -> dict[str, Any]:
    """Inspect the configuration in a directory in this process; returns seconds, CPU seconds, peak and group counts."""
    from fxprune.channels.inspection import inspect_groups  # noqa: PLC0415 - inside the measured process only
    from fxprune.core.stopwatch import Stopwatch  # noqa: PLC0415 - inside the measured process only
    from fxprune.flows.from_config import inspect_program  # noqa: PLC0415 - inside the measured process only

    watch = Stopwatch()
    start, cpu = time.perf_counter(), time.process_time()
    program = inspect_program(directory, watch)
    found = inspect_groups(program)
    seconds = {**watch.seconds, **{event.name: event.seconds for event in program.history}}
    kinds: dict[str, int] = {}
    for group in found.groups:
        kinds[group.kind] = kinds.get(group.kind, 0) + 1
    return {
        "inspect_seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "stages": {name: round(value, 2) for name, value in seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
        "nodes": len(program.graph_module.graph.nodes),
        "parameters": found.parameters,
        "groups": kinds,
        "refused": sum(refusal.count for refusal in found.refusals),
    }


def measure(config: PreTrainedConfig) -> dict[str, Any]:
    """Inspect a configuration in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        config.save_pretrained(scratch)
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.inspect_scale", "--inspect", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        wall = time.perf_counter() - start
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"wall_seconds": round(wall, 2)} | result


def main() -> None:
    """Parse the command line, measure, print and write; fails when the deepest Llama misses its targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", help="beginnings of names of cases; the others keep the figures in the file"
    )
    parser.add_argument("--inspect", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inspect_scale.json"))
    arguments = parser.parse_args()
    if arguments.inspect:
        print(json.dumps(inspect_once(arguments.inspect)))
        return
    cases = json.loads(arguments.out.read_text())["cases"] if arguments.only and arguments.out.exists() else {}
    for name, (config, layers) in CASES.items():
        if not arguments.only or any(name.startswith(beginning) for beginning in arguments.only):
            cases[name] = measure(config(layers))
            print(
                f"{name}: {cases[name]['wall_seconds']} s wall, {cases[name]['cpu_seconds']} s CPU in inspect, "
                f"{cases[name]['peak_rss_bytes'] / 1e9:.2f} GB, {cases[name]['groups']}",
                flush=True,
            )
            write_json(arguments.out, {"cases": cases, "machine": machine()})
    deepest = cases.get(f"llama-3-70b, {DEPTHS[-1]} layers")
    if deepest and (deepest["wall_seconds"] > TARGET_SECONDS or deepest["peak_rss_bytes"] > TARGET_BYTES):
        print(f"missed: at most {TARGET_SECONDS:.0f} s and {TARGET_BYTES / 1e9} GB at {DEPTHS[-1]} layers")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
