"""Golden accounting: what pruning published architectures by a known rule removes, from the groups that are found.

    python -m benchmarks.golden_accounting [--only NAME ...] [--out JSON]

Eight figures on the meta device at full depth: the MLP ratio 0.1 with the kept width rounded to the nearest multiple of
128 (removed parameters of all), and whole layers left out. The configurations are the published hyper-parameters; all
else comes from tracing the model, locating its groups and asking them what a plan removes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, MixtralConfig, Phi3Config, Qwen2Config

from fxprune.channels.accounting import count_parameters
from fxprune.channels.front_end import LOCATE
from fxprune.core.groups import ExpertMlpGroup, LayerGroup, MlpGroup
from fxprune.core.output import write_json
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.measure.speed import peak_rss_bytes
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from fxprune.core.program import Program

__all__ = ["GOLDEN", "Golden", "Removal", "located", "remove_layers", "remove_mlp"]

RATIO, MULTIPLE = 0.1, 128


@dataclass(frozen=True)
class Golden:
    """One figure.

    Attributes:
        name: model and what is removed.
        config: makes its configuration.
        kept_width: MLP channels that stay in every MLP (or every expert); None when layers are removed.
        layers: layers that are removed; 0 when channels are.
        percent: removed parameters of all, in percent.
        decimals: how many decimals of it are known.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    kept_width: int | None
    layers: int
    percent: float
    decimals: int = 4


@dataclass(frozen=True)
class Removal:
    """What a plan removes: kept MLP width (None for layers), removed and all parameters."""

    kept_width: int | None
    removed: int
    parameters: int

    @property
    def percent(self) -> float:
        """Removed parameters of all, in percent."""
        return 100.0 * self.removed / self.parameters


def _llama2_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def _llama3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def _qwen25_14b() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip


def _mixtral_8x7b() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
        sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip


def _phi35_mini() -> Phi3Config:
    return Phi3Config(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=131072, pad_token_id=32000, tie_word_embeddings=False,
    )  # fmt: skip


def _command_r() -> CohereConfig:
    return CohereConfig(
        vocab_size=256000, hidden_size=8192, intermediate_size=24576, num_hidden_layers=40, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True, use_qk_norm=False,
    )  # fmt: skip


GOLDEN = (
    Golden("Llama-2-7B, MLP 0.1", _llama2_7b, 9856, 0, 6.7224),
    Golden("Llama-3-8B, MLP 0.1", _llama3_8b, 12928, 0, 6.8945),
    Golden("Qwen2.5-14B, MLP 0.1", _qwen25_14b, 12416, 0, 7.0284),
    Golden("Mixtral-8x7B, MLP 0.1", _mixtral_8x7b, 12928, 0, 9.4838),
    Golden("Phi-3.5-mini, MLP 0.1", _phi35_mini, 7424, 0, 5.9274),
    Golden("command-r-08-2024, MLP 0.1", _command_r, 22144, 0, 7.4025),
    Golden("Llama-2-7B, 3 of 32 layers", _llama2_7b, None, 3, 9.01, 2),
    Golden("Qwen2.5-14B, 5 of 48 layers", _qwen25_14b, None, 5, 9.32, 2),
)


def located(config: PreTrainedConfig) -> Program:
    """Trace a configuration on the meta device and locate its groups."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Pipeline([build_pass(name, {}) for name in LOCATE])(trace(model)).program


def remove_mlp(program: Program, ratio: float = RATIO, multiple: int = MULTIPLE) -> Removal:
    """Remove a share of every MLP's channels (of every expert's, for a mixture), kept width rounded to the nearest."""
    groups = [group for group in program.groups if isinstance(group, MlpGroup | ExpertMlpGroup)]
    kept: dict[str, list[int]] = {}
    widths = set()
    for group in groups:
        width = group.width if isinstance(group, ExpertMlpGroup) else group.units
        stay = round((1 - ratio) * width / multiple) * multiple
        widths.add(stay)
        starts = range(0, group.units, width)
        kept[group.name] = np.concatenate([np.arange(start, start + stay) for start in starts]).tolist()
    (width,) = widths
    return _removal(program, Plan.of(kept), width)


def remove_layers(program: Program, layers: int) -> Removal:
    """Leave out the last so many layers."""
    (group,) = (group for group in program.groups if isinstance(group, LayerGroup))
    return _removal(program, Plan.of({group.name: range(group.units - layers)}), None)


def _removal(program: Program, plan: Plan, width: int | None) -> Removal:
    plan.validate(program.groups)
    removed = sum(
        group.parameters_removed(plan.kept_units(group)) for group in program.groups if group.name in plan.kept
    )
    return Removal(width, removed, count_parameters(program.graph_module))


def run(names: list[str] | None) -> dict[str, Any]:
    """Compute the figures; returns the JSON result."""
    figures = []
    programs: dict[Any, Program] = {}
    for golden in GOLDEN:
        if names and not any(name.lower() in golden.name.lower() for name in names):
            continue
        start = time.perf_counter()
        if golden.config not in programs:
            programs = {golden.config: located(golden.config())} | programs
        program = programs[golden.config]
        found = remove_layers(program, golden.layers) if golden.layers else remove_mlp(program)
        agrees = round(found.percent, golden.decimals) == golden.percent and found.kept_width == golden.kept_width
        print(f"{golden.name}: {found.percent:.4f}%, golden {golden.percent}%: {'agrees' if agrees else 'DIFFERS'}")
        figures.append({
            "name": golden.name,
            "kept_width": found.kept_width,
            "removed": found.removed,
            "parameters": found.parameters,
            "percent": round(found.percent, 4),
            "golden_percent": golden.percent,
            "golden_kept_width": golden.kept_width,
            "agrees": agrees,
            "seconds": round(time.perf_counter() - start, 1),
        })  # fmt: skip
    return {"ratio": RATIO, "multiple": MULTIPLE, "figures": figures, "peak_rss_bytes": peak_rss_bytes()}


def main() -> None:
    """Parse the command line, compute, print and write; fails when a figure differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/golden_accounting.json"))
    arguments = parser.parse_args()
    result = run(arguments.only)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, result)
    if not all(figure["agrees"] for figure in result["figures"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
