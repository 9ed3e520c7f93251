"""Every road out of fxprune: does the deployed form compute and write what the slim graph does, how large, how fast.

    python -m benchmarks.deployment [--family NAME ...] [--plan ...] [--model DIR --ratio 0.3] [--speed] [--text FILE]

The matrix has a row for each model, plan and form. Models are tiny random ones of five families (`tests/zoo.py`), or
with `--model` a real one; plans keep the same widths in every layer (uniform) or different ones, other numbers of
key/value heads included (mixed). The forms are the original class with the units taken out (eager), the checkpoint
loaded back, ONNX Runtime, onnxruntime-genai, and int4 in ONNX Runtime. Columns:

    difference   largest absolute difference of a logit from the slim graph, over the ladder's cases (genai: one
                 sequence, prefill and continuation); int4 is not expected to be equal
    text         tokens of greedy text before the first that differs, of all
    size         bytes on disk: weights of the checkpoint, or graph and weights
    prefill, decode    with --speed: medians of interleaved runs

With `--text`, and a model, a second table: dense, slim, int4, slim + int4 in ONNX Runtime: size, perplexity and, with
`--speed`, prefill and decode. Prints Markdown tables and writes the figures as JSON.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import make_parser, write_results
from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.channels.front_end import front_end
from fxprune.checkpoints.load_model import load_model
from fxprune.core.errors import FxpruneError
from fxprune.core.groups import AttentionGroup
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.core.stopwatch import Stopwatch
from fxprune.evaluation.perplexity import file_perplexity
from fxprune.exporters.genai import GenaiRunner
from fxprune.exporters.ort import OrtRunner
from fxprune.flows.exporting import ExportRequest, export_program
from fxprune.measure.footprint import form_bytes
from fxprune.measure.speed import decode, interleaved_times, machine, prefill
from fxprune.passes.insert_masks import InsertMasks
from fxprune.passes.slim import Slim
from fxprune.runtimes.runners import EagerRunner, GraphRunner, greedy, position_ids_from_mask
from fxprune.verification.approximation import measure_difference
from fxprune.verification.compare import compare_runners
from fxprune.verification.reference import without_units
from tests.zoo import located

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.runtimes.runners import Runner

FAMILIES = ("llama", "qwen3", "phi3", "gpt2", "falcon (grouped)")
NEW_TOKENS = 16


def tiny_plan(groups: Sequence[Group], *, uniform: bool) -> Plan:
    """Two thirds of the channels and one key/value head less; mixed: every second layer keeps more, or all heads."""
    kept: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for group in groups:
        if group.kind not in {"attention", "mlp"}:
            continue
        layer = seen[group.kind] = seen.get(group.kind, -1) + 1
        more = not uniform and layer % 2 == 1
        if isinstance(group, AttentionGroup):
            heads = group.kv_heads if more else max(1, group.kv_heads - 1)
            kept[group.name] = [head for kv in range(heads) for head in group.heads_of(kv)]
        else:
            kept[group.name] = list(range(group.units * (3 if more else 2) // (4 if more else 3)))
    return Plan.of(kept)


def slim_program(arguments: argparse.Namespace, family: str | None, *, uniform: bool) -> Program:
    """A slim program with its references: of a tiny family, or of the model given."""
    if family is not None:
        program = located(family)
        program = program.replace(plan=tiny_plan(program.groups, uniform=uniform))
    else:
        program = front_end(load_model(arguments.model), Stopwatch())
        options = {"ratio": arguments.ratio, "uniform": uniform}
        if arguments.method != "magnitude-units":
            options["samples"] = arguments.samples
        program = build_pass(arguments.method, options)(program).program
    return Pipeline([InsertMasks(), Slim()])(program).program


def text_of(program: Program) -> torch.Tensor:
    """Four sequences sampled from the slim model."""
    assert program.source is not None
    slim = GraphRunner(program.graph_module, program.interface)
    spec = CalibrationSpec("self", samples=4, seq_len=32)
    return calibration_set(spec, tokenizer=program.source.tokenizer, runner=slim, config=program.source.config).tokens


def same_tokens(reference: Runner, candidate: Any, prompt: torch.Tensor) -> str:
    """Tokens of greedy text before the first that differs, of all; genai stops at an end-of-text token."""
    expected = greedy(reference, prompt, NEW_TOKENS)[0].tolist()
    if isinstance(candidate, GenaiRunner):
        given = candidate.generate(prompt, NEW_TOKENS)[0].tolist()
        ends = [index for index, token in enumerate(expected) if token in candidate.ends]
        expected = expected[: ends[0] + 1] if ends else expected
    else:
        given = greedy(candidate, prompt, NEW_TOKENS)[0].tolist()
    pairs = list(zip(expected, given, strict=False))
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"{same} of {len(expected)}"


def difference(program: Program, candidate: Runner) -> float:
    """Largest absolute difference of a logit from the slim graph."""
    assert program.source is not None
    slim = GraphRunner(program.graph_module, program.interface)
    vocabulary = int(program.source.config.get_text_config().vocab_size)
    if not isinstance(candidate, GenaiRunner):
        device = torch.device("cpu")
        return compare_runners("", slim, candidate, vocabulary=vocabulary, tolerance=0.0, device=device).max_abs_error
    tokens = torch.randint(vocabulary, (1, 9), generator=torch.Generator().manual_seed(0))
    mask, worst = torch.ones_like(tokens), 0.0
    pasts: list[Any] = [None, None]
    for start, end in ((0, 6), (6, 8), (8, 9)):
        positions = position_ids_from_mask(mask[:, :end], end - start)
        logits = []
        for index, runner in enumerate((slim, candidate)):
            out, pasts[index] = runner.step(tokens[:, start:end], mask[:, :end], positions, pasts[index])
            logits.append(out.float())
        worst = max(worst, float((logits[0] - logits[1]).abs().max()))
    return worst


def measure(arguments: argparse.Namespace, family: str | None, *, uniform: bool) -> list[dict[str, Any]]:
    """All forms of one model and one plan."""
    program = slim_program(arguments, family, uniform=uniform)
    name = family or Path(arguments.model).name
    row = {"model": name, "plan": "uniform" if uniform else "mixed"}
    rows, runners = [], []
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch, without_units(program) as eager:
        for form in ("eager", "reloaded", "ONNX Runtime", "genai", "int4"):
            try:
                runner, where = open_form(program, form, Path(scratch), eager, arguments)
            except FxpruneError as error:
                rows.append({**row, "form": form, "refused": str(error).split(";")[0][:200]})
                continue
            entry: dict[str, Any] = {**row, "form": form, "max_abs_difference": difference(program, runner)}
            prompt = torch.arange(5, 13).unsqueeze(0)
            entry["text"] = same_tokens(GraphRunner(program.graph_module, program.interface), runner, prompt)
            if where is not None:
                entry["bytes"] = form_bytes(where)
            if form == "reloaded":
                entry["checkpoint"] = program_kind(where)
            if form == "int4":
                slim = GraphRunner(program.graph_module, program.interface)
                entry["int4"] = measure_difference("int4 - slim", slim, runner, text_of(program)).to_json()
            rows.append(entry)
            runners.append((entry, runner))
        if arguments.speed:
            add_speed(arguments, [entry for entry, _ in runners], [runner for _, runner in runners])
    return rows


def program_kind(where: Path | None) -> str:
    """Whether plain transformers loads a checkpoint."""
    from fxprune.models.manifest import read_manifest  # noqa: PLC0415 - the only use

    assert where is not None
    return read_manifest(where).kind


def open_form(
    program: Program, form: str, scratch: Path, eager: Any, arguments: argparse.Namespace
) -> tuple[Runner, Path | None]:
    """Write a form and open it: its runner, and its directory if it has one."""
    if form == "eager":
        if eager is None:
            raise FxpruneError("no eager reference for such a plan")
        return EagerRunner(eager), None
    if form == "reloaded":
        build_pass("save", {"out": str(scratch / "saved")})(program)
        return EagerRunner(load_model(scratch / "saved").model, "reloaded"), scratch / "saved"
    if form == "int4":
        options = {"onnx": str(scratch / "genai"), "out": str(scratch / "int4"), **int4_options(arguments)}
        build_pass("export_int4", options)(program)
        return OrtRunner(scratch / "int4" / "model.onnx", threads=arguments.threads, name="int4"), scratch / "int4"
    where = scratch / "genai"
    if not where.exists():
        build_pass("export_onnx", {"out": str(where), "to": "genai"})(program)
    if form == "genai":
        return GenaiRunner(where, threads=arguments.threads, name="genai"), where
    return OrtRunner(where / "model.onnx", threads=arguments.threads), where


def int4_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about int4."""
    return {"method": arguments.int4_method, "group_size": arguments.group_size, "embeddings": arguments.embeddings}


def add_speed(arguments: argparse.Namespace, entries: list[dict[str, Any]], runners: list[Runner]) -> None:
    """Time all forms, interleaved, and put medians and repeats into their entries."""
    cases = [prefill(arguments.prefill), decode(arguments.decode, past=arguments.past)]
    timed = interleaved_times(runners, cases, threads=arguments.threads, repeats=arguments.repeats, warmup=2)
    for case, by_form in zip(cases, timed, strict=True):
        for entry, times in zip(entries, by_form, strict=True):
            entry.setdefault("speed", {})[case.name] = {"median_ms": statistics.median(times), "ms": list(times)}


def compare_quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense, slim, int4 and slim + int4 of the model given, all in ONNX Runtime."""
    slim = slim_program(arguments, None, uniform=False)
    dense = front_end(load_model(arguments.model), Stopwatch())
    assert slim.source is not None
    entries, runners = [], []
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        for name, program, int4 in (
            ("dense", dense, None),
            ("slim", slim, None),
            ("int4", dense, int4_options(arguments)),
            ("slim + int4", slim, int4_options(arguments)),
        ):
            where = Path(scratch) / name.replace(" + ", "-")
            done = export_program(program, ExportRequest(where, int4=int4), lambda _: None)
            runner = OrtRunner(where / "model.onnx", threads=arguments.threads, name=name)
            result = file_perplexity(runner, arguments.text, slim.source.tokenizer, max_windows=arguments.windows)
            entry: dict[str, Any] = {"form": name, "bytes": form_bytes(where), "perplexity": result.as_dict()}
            if "int4" in done.results and int4 is not None:
                entry["int4"] = done.results["int4"]["difference"]
            entries.append(entry)
            runners.append(runner)
            gc.collect()
        if arguments.speed:
            add_speed(arguments, entries, runners)
    return entries


def matrix_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The matrix as Markdown."""
    speeds = list(dict.fromkeys(case for row in rows for case in row.get("speed", {})))
    head = ["model", "plan", "form", "difference", "text", "MB", *(f"{case} ms" for case in speeds)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        if "refused" in row:
            cells = [row["model"], row["plan"], row["form"], row["refused"], *["-"] * (len(head) - 4)]
        else:
            plan = f"{row['plan']} ({row['checkpoint']})" if row.get("checkpoint", row["plan"]) != row["plan"] else ""
            cells = [row["model"], plan or row["plan"], row["form"], f"{row['max_abs_difference']:.1e}", row["text"]]
            cells.append(f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "-")
            cells += [f"{row['speed'][case]['median_ms']:.2f}" for case in speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quality_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The second table as Markdown; speed-ups are over dense."""
    speeds = list(entries[0].get("speed", {}))
    head = ["form", "MB", "perplexity", "KL to float", *(f"{case} ms (speed-up)" for case in speeds)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for entry in entries:
        divergence = f"{entry['int4']['mean_kl']:.4f}" if "int4" in entry else "-"
        perplexity = f"{entry['perplexity']['perplexity']:.2f}"
        cells = [entry["form"], f"{entry['bytes'] / 1e6:.1f}", perplexity, divergence]
        for case in speeds:
            dense, own = (each["speed"][case]["median_ms"] for each in (entries[0], entry))
            cells.append(f"{own:.1f} ({dense / own:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the matrix and, with a text, the second table."""
    parser = make_parser(__doc__, "deployment", samples=32)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), help="of tests/zoo.py; none: only --model")
    parser.add_argument("--model", help="hub id or directory of a real model")
    plans = ["uniform", "mixed"]
    parser.add_argument("--plan", nargs="*", default=plans, choices=plans, help="none: only the table of --text")
    parser.add_argument("--method", default="channel", help="structured method for the real model")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--text", type=Path, help="text file for the perplexity of the real model")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--prefill", type=int, default=32)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--past", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--int4-method", default="rtn", choices=["rtn", "k-quant"])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--embeddings", action="store_true", help="quantize the token embedding too")
    arguments = parser.parse_args()
    if arguments.text is not None and arguments.model is None:
        parser.error("--text goes with --model")
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "matrix": []}
    models = [*arguments.family, *([None] if arguments.model else [])]
    for family in models:
        for plan in arguments.plan:
            result["matrix"] += measure(arguments, family, uniform=plan == "uniform")
            write_results(arguments.out, result, quiet=True)
    if result["matrix"]:
        print(matrix_table(result["matrix"]))
    if arguments.text is not None:
        result["quality"] = compare_quality(arguments)
        write_results(arguments.out, result, quiet=True)
        print(f"\n{quality_table(result['quality'])}")


if __name__ == "__main__":
    main()
