"""Every family and every kind of unit, proved: what is found, slim, backward, ONNX, reload, seconds.

    python -m benchmarks.families [--plans 20] [--family NAME ...] [--out JSON]

Tiny random models (`tests/zoo.py`, no two dimensions equal by accident), random legal plans. Per family and kind:

    found      groups of the kind
    slim       largest relative difference of an output between slim and masked, over all plans, float32
    gradient   the same for the gradients of all parameters
    reload     the checkpoint of one plan: `plain` (transformers' from_pretrained loads it), `mixed` (fxprune.load), or
               why it is refused; both bitwise, with logits and greedy text compared
    ONNX       largest absolute difference of a logit in ONNX Runtime, one plan for all kinds together
    seconds    wall time of one plan's slimming

Prints a Markdown table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.progress import track

from fxprune.core.errors import CheckpointError, FxpruneError
from fxprune.core.output import write_json
from fxprune.core.pipeline import build_pass
from fxprune.measure.speed import machine
from fxprune.runtimes.runners import GraphRunner, greedy
from tests.proof import backward_error, forward_error, program_in_double, slimmed
from tests.zoo import KINDS, ZOO, kinds_of, legal_plans, located

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.core.plan import Plan
    from fxprune.core.program import Program


def random_plans(program: Program, kind: str, count: int) -> list[Plan]:
    """Random legal plans that remove something, the same in every run."""
    found: list[Plan] = []

    @settings(
        max_examples=4 * count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        found.append(data.draw(legal_plans(program.groups, kind)))

    collect()
    return [plan for plan in found if any(plan.removed_units(group) for group in program.groups)][:count]


def reload(program: Program) -> tuple[str, float | None]:
    """Save a slim program, load it and compare bits, logits and greedy text; what it became, or why it cannot be."""
    if program.source is None:
        return "plain nn.Module", None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "slim"
        try:
            saved = build_pass("save", {"out": str(out)})(program).program
        except CheckpointError as error:
            return f"refused: {str(error).split(';')[0][:300]}", None
        checked = build_pass("verify", {"checkpoint": str(out), "graph": False})(saved).program
        rungs = {rung["rung"]: rung["max_abs_error"] for rung in checked.results["verify"]}
        kind = "plain" if saved.results["checkpoint"]["kind"] == "uniform" else "mixed"
        return kind, rungs["reloaded checkpoint = slim"]


def onnx_error(program: Program) -> float:
    """Export a slim program and compare it in ONNX Runtime: the ladder's cases, or the example inputs."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "onnx"
        exported = build_pass("export_onnx", {"out": str(out)})(program).program
        options = {"onnx": str(out / "model.onnx"), "graph": False}
        rungs = build_pass("verify", options)(exported).program.results["verify"]
    return max(rung["max_abs_error"] for rung in rungs if rung["rung"] == "ONNX Runtime = slim")


def same_text(program: Program) -> bool | None:
    """Whether slim and masked continue a prompt with the same tokens; None where there is no cache."""
    if not program.interface.cache:
        return None
    masked = program.references["masked"]
    prompt = torch.arange(5, 12).unsqueeze(0)
    texts = [
        greedy(GraphRunner(form.graph_module, form.interface), prompt, 12)
        for form in (program, program.replace(graph_module=masked.module, interface=masked.interface))
    ]
    return bool(torch.equal(*texts))


def measure(name: str, plans: int) -> dict[str, Any]:
    """Everything about one family."""
    start = time.perf_counter()
    program = located(name)
    family: dict[str, Any] = {"form": ZOO[name].form, "front_end_seconds": time.perf_counter() - start, "kinds": {}}
    family["refused"] = {
        event.name: dict(event.details["refused"]) for event in program.history if event.details.get("refused")
    }
    double = program_in_double(program)
    for kind in (*kinds_of(program), "all"):
        chosen = random_plans(program, kind, plans)
        start = time.perf_counter()
        slims = [slimmed(program, plan) for plan in chosen]
        seconds = (time.perf_counter() - start) / len(chosen)
        entry: dict[str, Any] = {
            "found": sum(group.kind == kind for group in program.groups) or len(program.groups),
            "plans": len(chosen),
            "slim": max(forward_error(slim) for slim in slims),
            "gradient": max(backward_error(slim, program) for slim in slims),
            "gradient_float64": max(backward_error(slimmed(double, plan), double) for plan in chosen[:5]),
            "same_text": all(same_text(slim) is not False for slim in slims[:3]),
            "seconds": seconds,
        }
        entry["reload"], entry["reload_error"] = reload(slims[0])
        family["kinds"][kind] = entry
    try:
        family["onnx"] = onnx_error(slims[0])
    except FxpruneError as error:
        family["onnx"] = f"refused: {str(error)[:160]}"
    return family


def table(families: dict[str, Any]) -> str:
    """The Markdown table: a row for each family and kind."""
    lines = [
        "| family | unit | found | slim = masked | gradient | reload | ONNX Runtime | s a plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, family in families.items():
        for kind in (*KINDS, "all"):
            if kind not in family["kinds"]:
                continue
            entry = family["kinds"][kind]
            onnx = family["onnx"] if kind == "all" else ""
            onnx = f"{onnx:.1e}" if isinstance(onnx, float) else onnx
            lines.append(
                f"| {name} | {kind} | {entry['found']} | {entry['slim']:.1e} | {entry['gradient']:.1e} "
                f"| {entry['reload']} | {onnx} | {entry['seconds']:.2f} |"
            )
    return "\n".join(lines)


def matrix(families: dict[str, Any]) -> str:
    """The same as one row a family: groups found, slim error, how the checkpoint reloads; gaps with their reasons."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"[{notes.setdefault(text, len(notes) + 1)}]"

    lines = [f"| family | {' | '.join((*KINDS, 'all'))} | ONNX |", "|---" * (len(KINDS) + 3) + "|"]
    for name, family in families.items():
        cells = []
        for kind in (*KINDS, "all"):
            entry = family["kinds"].get(kind)
            if entry is None:
                cells.append(_gap(kind, family, note))
                continue
            reload = entry["reload"]
            if reload.startswith("refused"):
                reload = note(reload.removeprefix("refused: ").partition(" and f")[0].partition(" (")[0])
            found = "" if kind == "all" else f"{entry['found']}: "
            cells.append(f"{found}{entry['slim']:.0e} {'' if reload == 'plain nn.Module' else reload}".strip())
        onnx = family["onnx"]
        cells.append(f"{onnx:.0e}" if isinstance(onnx, float) else note(onnx))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"[{number}] {text}" for text, number in notes.items())])


def _gap(kind: str, family: dict[str, Any], note: Callable[[str], str]) -> str:
    """Why a family has no unit of a kind: the locate pass's reason, or nothing of the sort in the model."""
    reasons = {"attention": "locate_attention", "hidden": "locate_hidden", "experts": "locate_experts"}
    refused = family["refused"].get(reasons.get(kind, ""), {})
    reason = next(iter(refused.values()), None)
    if reason is None:
        return "-"
    where, _, rest = reason.partition(") ")
    return note(f"its norm {rest}" if kind == "hidden" else f"{where.rpartition('.')[2]}) {rest}")


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--family", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = {name: measure(name, arguments.plans) for name in track(arguments.family, "families")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"plans": arguments.plans, "families": families, "machine": machine()})
    print(table(families))
    print(matrix(families))


if __name__ == "__main__":
    main()
