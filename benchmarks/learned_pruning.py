"""Learned pruning against one-shot pruning: quality at equal size, the ablation of the teachers, and what a step costs.

    python -m benchmarks.learned_pruning --data DIR [--method ...] [--ratio 0.2 0.3 0.5] [--seed 0 1 2] [--out JSON]
    python -m benchmarks.learned_pruning --data DIR --overhead [--batch 4 --length 256]

DIR is laid out as for `fxprune eval --data`, with `calibration/sample_c4-rp1.jsonl` for the calibration and training
text; `post` reads the same text, or with `--instructions FILE` an instruction set. Each cell is a process of its own:
prune, slim, verify, save, load in bfloat16, evaluate; it is written as soon as it is measured, and a run that is
interrupted goes on with what is missing. Trainings are kept beside the results, so `post` starts from what `lora` has
learned, and an interrupted training goes on too; so are the gradients of the loss, which are the same in all cells of a
seed. Minutes with a plus are then what came on top. `--plain` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import add_leaderboard_options, conditions, spread
from benchmarks.structured_pruning import TASKS, figure, key, quality, unusual
from benchmarks.structured_pruning import measure as one_shot_cells
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.output import write_json
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.stopwatch import Stopwatch
from fxprune.learned.model import GatedModel
from fxprune.learned.training import Learner, next_token_loss
from fxprune.measure.speed import machine
from fxprune.models.default_model import default_model_path
from fxprune.passes.l0 import L0Prune
from fxprune.runtimes.matmul import fast_products
from fxprune.weights.base import dtype_of, forward_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.core.program import Program

RESULT = Path("benchmarks/results/learned_pruning.json")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "channel": {},
    "masks": {"lora_rank": 0},
    "lora": {},
    "post": {},
    "uniform": {"uniform": True},
    "lm loss": {"distillation": "none", "reconstruct": "none"},
    "plain": {"distillation": "plain", "reconstruct": "none"},
    "progressive": {"distillation": "progressive", "reconstruct": "none"},
}
"""Rows, and what makes them: options of the pass `l0` but for `ONE_SHOT`. The ablation goes without the fit of what is
left, which would make up for most of what the losses differ by."""
LABELS = {
    "channel": "one-shot (`channel`)",
    "masks": "learned, masks only",
    "lora": "learned, masks + LoRA",
    "post": "learned, masks + LoRA + post fine-tuning",
    "uniform": "learned, masks + LoRA, uniform widths",
    "lm loss": "ablation: language-model loss",
    "plain": "ablation: plain distillation",
    "progressive": "ablation: progressive distillation",
}
ONE_SHOT = ("dense", "channel")
"""Rows that the leaderboard of structured methods measures."""
STEPS = ("LoRA alone (peft, transformers' model)", "distillation without gates", "learned pruning")


def options_of(arguments: argparse.Namespace, method: str, seed: int, ratio: float) -> dict[str, Any]:
    """The options of a learned cell."""
    text = str(arguments.data / "calibration" / "sample_c4-rp1.jsonl")
    common = {"ratio": ratio, "calibration": text, "seed": seed}
    ablation = method in {"lm loss", "plain", "progressive"}
    steps = arguments.ablation_steps if ablation else arguments.steps
    further = {**METHODS[method], **json.loads(arguments.options)}
    own = {"samples": arguments.sequences, "seq_len": arguments.length, "batch": arguments.batch, "steps": steps}
    trained = "lora" if method == "post" else method
    # A training of other settings has another place: what is there would be refused.
    which = hashlib.sha256(json.dumps([own, further], sort_keys=True).encode()).hexdigest()[:8]
    state = arguments.out.with_suffix(".states") / f"{trained.replace(' ', '-')}-{ratio}-{seed}-{which}"
    if method == "post":
        own |= {"post_steps": arguments.post_steps}
        if arguments.instructions:
            own |= {"post_data": str(arguments.instructions)}
    signals = str(arguments.out.with_suffix(".signals"))
    return {**common, **own, "signals": signals, "state": str(state), **further}


def one_shot_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """What the leaderboard of structured methods is told for a row of its own: `--options` are of learned rows."""
    return argparse.Namespace(**{**vars(arguments), "options": "{}", "speed": False})


def measure(arguments: argparse.Namespace, method: str, seed: int, ratios: list[float]) -> None:
    """Cells of one process: a line of JSON for each on standard output."""
    if method in ONE_SHOT:  # all ratios from one calibration
        one_shot_cells(one_shot_arguments(arguments), method, seed, ratios)
        return
    (ratio,) = ratios
    torch.set_num_threads(arguments.threads)
    entry: dict[str, Any] = {"method": method, "seed": seed, "ratio": ratio, "conditions": facts(arguments, method)}
    program = front_end(load_model(arguments.model or str(default_model_path())), Stopwatch())
    start = time.perf_counter()
    options = options_of(arguments, method, seed, ratio)
    entry["continued"] = Path(options["state"], "state.json").is_file()
    pruned = build_pass("l0", options)(program).program
    assert pruned.plan is not None
    section = pruned.results["structured"]
    learned = section.get("learning", {})
    entry["continued"] |= "signals_read_from" in section
    entry |= {
        "removed_share": section["removed_share"],
        "seconds": time.perf_counter() - start,
        "parts": section["seconds"],
        "kept": {group.name: len(pruned.plan.kept_units(group)) for group in program.groups},
        "calibration_sha256": pruned.results.get("calibration", {}).get("sha256"),
        "held_out_kl": learned.get("held_out_kl"),
        "choice": learned.get("choice"),
        "tokens_seen": learned.get("tokens_seen"),
    }
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        out = Path(scratch) / "slim"
        passes = [build_pass(step, {}) for step in ("insert_masks", "slim", "verify")]
        Pipeline([*passes, build_pass("save", {"out": str(out)})])(pruned)
        del pruned, program
        gc.collect()
        entry |= quality(arguments, str(out))
    print(json.dumps({**entry, "threads": arguments.threads}), flush=True)


def facts(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """What must be the same for a cell that was measured earlier to count."""
    if method in ONE_SHOT:
        return conditions(one_shot_arguments(arguments))
    found = conditions(arguments)
    steps = arguments.ablation_steps if method in {"lm loss", "plain", "progressive"} else arguments.steps
    found |= {"sequences": arguments.sequences, "length": arguments.length, "batch": arguments.batch, "steps": steps}
    found["method_options"] = METHODS[method]
    if method == "post":
        found |= {"post_steps": arguments.post_steps, "instructions": str(arguments.instructions or "")}
    return found


# ---- what a step costs ---------------------------------------------------------------------------------------------


def overhead(arguments: argparse.Namespace, kinds: list[str]) -> None:
    """What a step of each kind costs: lines of JSON on standard output.

    One kind alone gives its memory too. Several take turns, step by step and each first as often as the others, so that
    a machine that grows slower or faster does so for all of them.
    """
    torch.set_num_threads(arguments.threads)
    tokens = torch.randint(0, 1000, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0))
    steps = {}
    for kind in kinds:
        loaded = load_model(arguments.model or str(default_model_path()))
        plain = kind == STEPS[0]
        steps[kind] = _plain(loaded.model, tokens) if plain else _stepper(kind, front_end(loaded, Stopwatch()), tokens)
    before = _resident()
    _forget_peak()
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    busy: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range((arguments.repeats if len(kinds) > 1 else 2) + 1):  # the first round warms up
        for turn in range(len(kinds)):
            kind = kinds[(index + turn) % len(kinds)]
            start, work = time.perf_counter(), time.process_time()
            steps[kind](index)
            took[kind].append(time.perf_counter() - start)
            busy[kind].append(time.process_time() - work)  # of all threads: other processes do not count
    for kind in kinds:
        row: dict[str, Any] = {"kind": kind, "threads": arguments.threads}
        if len(kinds) == 1:
            row |= {"peak_bytes": _resident("VmHWM"), "held_bytes": before}
        else:
            row |= {"seconds": median(took[kind][1:]), "all_seconds": took[kind][1:]}
            row |= {"cpu_seconds": median(busy[kind][1:]), "all_cpu_seconds": busy[kind][1:]}
        print(json.dumps(row), flush=True)


def _plain(model: Any, tokens: torch.Tensor) -> Callable[[int], None]:
    """A step of LoRA training as peft's users do it: on the model of transformers itself."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - one of three kinds

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in names if name != "lm_head"]
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
    precision = forward_precision("auto", next(model.parameters()).dtype, tokens.device)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)

    def train(index: int) -> None:
        del index
        with fast_products(), torch.autocast("cpu", precision, enabled=precision is not None):
            loss = next_token_loss(model(input_ids=tokens, use_cache=False).logits, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return train


def _stepper(kind: str, program: Program, tokens: torch.Tensor) -> Callable[[int], None]:
    """A step of distillation, with gates and without."""
    precision = forward_precision("auto", dtype_of(program), tokens.device)
    options = {"ratio": 0.3, "samples": len(tokens) + 1, "held_out": 1, "steps": 10_000, "warm_start": False}
    if kind == STEPS[2]:
        step = L0Prune(**options, batch=len(tokens), seq_len=tokens.shape[1])
        learner = _learner(step, program, tokens)

        def learn(index: int) -> None:
            # In the middle of the first stage, where gates are drawn and the teacher is an earlier state.
            with learner.model.frozen():
                learner._one(2000 + index)

        return learn
    model = GatedModel(program, (), rank=8, forward_dtype=precision)
    optimizer = torch.optim.AdamW(list(model.adapters.values()), lr=1e-3)

    def train(index: int) -> None:
        del index
        with model.frozen():
            _distil(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return train


def _distil(model: GatedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The loss against the intact model."""
    from fxprune.calibration.distillation import distillation_loss  # noqa: PLC0415 - one of three kinds
    from fxprune.learned.teachers import Snapshot, worn  # noqa: PLC0415 - as above

    intact = Snapshot(0.0, {}, {name: torch.zeros_like(p) for name, p in model.adapters.items()})
    with torch.no_grad(), worn(intact, model.adapters):
        wanted = model(tokens)
    return distillation_loss(model(tokens), wanted).total


def _learner(step: L0Prune, program: Program, tokens: torch.Tensor) -> Learner:
    from fxprune.learned.run import Run  # noqa: PLC0415 - one of three kinds

    run = Run(step, program, torch.cat([tokens, tokens[:1]]), {})
    return run.learner


def _forget_peak() -> None:
    """Let the kernel count the peak anew, where it can."""
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        gc.collect()
        clear.write_text("5")


def _resident(what: str = "VmRSS") -> int:
    """The resident size in bytes, or with `VmHWM` the largest since; 0 where it is not told."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


# ---- tables and the runs -------------------------------------------------------------------------------------------


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each method, its unusual conditions and ratio, seeds together."""
    lines = ["| row | removed | perplexity | LAMBADA | ARC-easy | minutes | seeds |", "|---|---|---|---|---|---|---|"]
    for method in METHODS:
        mine = [
            (", ".join([LABELS.get(method, method), *unusual(cell)]), cell)
            for cell in cells
            if cell["method"] == method
        ]
        for label, ratio in sorted({(label, cell["ratio"]) for label, cell in mine}):
            rows = [cell for own, cell in mine if (own, cell["ratio"]) == (label, ratio)]
            minutes = spread([row["seconds"] / 60 for row in rows if "seconds" in row], ".0f")
            minutes = ("+" if any(row.get("continued") for row in rows) else "") + minutes
            figures = [figure(rows, "perplexity", ".1f"), *(figure(rows, task, ".3f") for task in TASKS), minutes]
            removed = f"{ratio:.0%}" if ratio else "-"
            lines.append(f"| {label} | {removed} | {' | '.join(figures)} | {len(rows)} |")
    return "\n".join(lines)


def overhead_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of steps: each against the first, and against the one before.

    Ratios are medians over rounds in which all took their turn, with the quartiles of the rounds.
    """
    if not rows:
        return ""
    lines = ["| step | seconds | to the first | to the one before | peak memory, GB |", "|---|---|---|---|---|"]
    for index, row in enumerate(rows):
        found = [_ratio(row, rows[other]) if index else "1" for other in (0, max(0, index - 1))]
        lines.append(f"| {row['kind']} | {row['seconds']:.2f} | {' | '.join(found)} | {row['peak_bytes'] / 1e9:.2f} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], other: dict[str, Any]) -> str:
    found = [one / its for one, its in zip(row["all_seconds"], other["all_seconds"], strict=True)]
    low, middle, high = quantiles(found, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def worker(arguments: list[Any]) -> list[dict[str, Any]]:
    """Run a cell in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.learned_pruning", *sys.argv[1:], "--cell", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments}: the measuring process ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing."""
    data = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"cells": [], "overhead": []}
    if arguments.plain:
        return dict(data)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.overhead:
        alone = [row for kind in STEPS for row in worker(["overhead", [kind]])]
        together = worker(["overhead", list(STEPS)])
        data["overhead"] = [{**one, **own} for one, own in zip(alone, together, strict=True)]
        data["overhead_shape"] = [arguments.batch, arguments.length]
        write_json(arguments.out, {**data, "machine": machine()})
        return dict(data)
    for method in arguments.method:
        ratios = [0.0] if method == "dense" else arguments.ratio
        for seed in arguments.seed if method != "dense" else [0]:
            wanted = {"method": method, "seed": seed, "conditions": facts(arguments, method)}
            known = {key(cell) for cell in data["cells"]}
            missing = [ratio for ratio in ratios if key({**wanted, "ratio": ratio}) not in known]
            # What calibrates once for all ratios is one process, a training is one each.
            for together in [missing] if method in ONE_SHOT and missing else [[ratio] for ratio in missing]:
                for cell in worker([method, seed, together]):
                    data["cells"].append(cell)
                    told = ("method", "ratio", "seed", "perplexity", "lambada_openai", "held_out_kl", "seconds")
                    print({name: cell.get(name) for name in told}, flush=True)
                    write_json(arguments.out, {**data, "machine": machine()})
    return dict(data)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_leaderboard_options(parser, list(METHODS), RESULT, "rows of each task")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sequences", type=int, default=1024, help="to train on")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ablation-steps", type=int, default=200)
    parser.add_argument("--post-steps", type=int, default=150)
    parser.add_argument("--instructions", type=Path, help="instruction set of post; the calibration text by default")
    parser.add_argument("--overhead", action="store_true", help="time steps instead")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind, in turns")
    arguments = parser.parse_args()
    if arguments.cell:
        cell = json.loads(arguments.cell)
        if cell[0] == "overhead":
            overhead(arguments, cell[1])
        else:
            measure(arguments, *cell)
        return
    data = run(arguments)
    print(table(data["cells"]))
    print(overhead_table(data.get("overhead", [])))


if __name__ == "__main__":
    main()
