"""Building a latency table: the whole model is exported at a few widths and timed against the dense one.

Every variant narrows all blocks of one shape alike, so caches are as cold as they will be, and runs interleaved with
the dense model, so what disturbs the machine disturbs both. The cost of one block is the difference by the number of
blocks. Each variant that was measured is kept in a progress file beside the table until the table is whole.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.core.errors import OutputError, PreconditionError, UsageError
from fxprune.core.groups import AttentionGroup, ExpertMlpGroup
from fxprune.core.output import write_json
from fxprune.core.parts import balanced_order
from fxprune.core.pipeline import build_pass
from fxprune.core.plan import Plan
from fxprune.core.progress import track
from fxprune.core.registry import resolve
from fxprune.measure.latency_table import (
    CaseLatency,
    Identity,
    LatencyTable,
    Surface,
    Width,
    block_shape,
    dense_width,
    has_width,
    identity_of,
    save_table,
)
from fxprune.measure.ratios import Precision, mean_ratio, ratio_interval, uncertainty
from fxprune.measure.speed import bench

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.measure.speed import Case
    from fxprune.runtimes.runners import Runner

__all__ = ["Variant", "build_table", "exported_runner", "table_of", "variants_of"]

_MLP_SHARES = (3 / 4, 1 / 2, 1 / 8)
_SET_SHARES = (3 / 4, 1 / 2, 1 / 4, 0.0)
_MOST_SHAPES = 6
_WARMUP = 1
_ROUNDS = 3
_PRECISION = 0.01
_SCATTER = 0.05


@dataclass(frozen=True)
class Variant:
    """The model with all blocks of one shape at one width, the others dense."""

    shape: str
    width: Width

    @property
    def name(self) -> str:
        """For messages and the progress file."""
        return f"{self.shape} at {self.width}"


@dataclass(frozen=True)
class Measurement:
    """A variant against the dense model in one case; times in milliseconds, entry i of both ran side by side."""

    variant: Variant
    case: str
    dense: tuple[float, ...]
    slim: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Time of the variant as a share of the dense time (see `fxprune.measure.ratios.mean_ratio`)."""
        return mean_ratio(self.slim, self.dense)

    @property
    def uncertainty(self) -> float:
        """Half the 95% interval of the ratio, as a share of it."""
        return uncertainty(self.dense, self.slim)


# ---- which widths --------------------------------------------------------------------------------------------------


def variants_of(groups: Sequence[Group]) -> list[Variant]:
    """The widths to measure: about three an MLP, up to four numbers of KV heads, the outer two with one query head too.

    Raises:
        PreconditionError: no group has a width, or the blocks have too many shapes.
    """
    shapes: dict[str, Group] = {}
    for group in groups:
        if has_width(group):
            shapes.setdefault(block_shape(group), group)
    if not shapes:
        raise PreconditionError("a latency table needs attentions or MLPs to narrow, and this model has none prunable")
    if len(shapes) > _MOST_SHAPES:
        raise PreconditionError(
            f"the blocks have {len(shapes)} different shapes, more than the {_MOST_SHAPES} that are measured; build "
            "the table of the dense model, before blocks were pruned to widths of their own"
        )
    found = []
    for shape, group in shapes.items():
        sets, per_set = _grid(group)
        # What a query head costs changes little with the number of KV heads: between the outer two it is interpolated.
        grid = [Width(s, p) for s in sets for p in per_set if p == per_set[-1] or s in {sets[0], sets[-1]}]
        found += [Variant(shape, width) for width in grid if width != dense_width(group)]
    return found


def _grid(group: Group) -> tuple[list[int], list[int]]:
    """The sets and the units per set to measure, ascending, the dense ones among them."""
    dense = dense_width(group)
    if isinstance(group, AttentionGroup):
        sets = {dense.sets, *range(1, 4)} if dense.sets <= 4 else {round(share * dense.sets) for share in _SET_SHARES}
        step = 1 if group.kv_parts is None else len(group.kv_parts)
        sets = {min(dense.sets, max(step, -(-count // step) * step)) for count in sets} | {dense.sets}
        return sorted(sets), sorted({1, dense.per_set})
    multiple = math.lcm(group.step, next((m for m in (64, 16, 8) if m * 16 <= dense.sets), 1))
    widths = {max(multiple, round(share * dense.sets / multiple) * multiple) for share in _MLP_SHARES}
    return sorted({width for width in widths if width < dense.sets} | {dense.sets}), [1]


def _kept(group: Group, width: Width) -> list[int]:
    """The first units of a group, or of each of its parts, that make up a width."""
    if isinstance(group, AttentionGroup):
        first = balanced_order(np.arange(group.kv_heads), group.kv_parts)[: width.sets].tolist()
        return sorted(head for kv in first for head in group.heads_of(kv)[: width.per_set])
    if group.parts is not None:
        return sorted(balanced_order(np.arange(group.units), group.parts)[: width.sets].tolist())
    experts = group.experts if isinstance(group, ExpertMlpGroup) else 1
    return [expert * (group.units // experts) + unit for expert in range(experts) for unit in range(width.sets)]


# ---- measuring -----------------------------------------------------------------------------------------------------


def build_table(
    program: Program,
    out: Path,
    cases: Sequence[Case],
    *,
    threads: int,
    repeats: int = 6,
    say: Callable[[str], None] = lambda _: None,
) -> LatencyTable:
    """Measure a model with ONNX Runtime and write its latency table.

    Args:
        program: a located, dense program with weights (their values do not matter).
        out: the JSON file; `OUT.partial` beside it keeps what is measured until all is.
        cases: the workloads.
        threads: of ONNX Runtime.
        repeats: timed repeats of a variant, at least 2; up to three times as many where noise wants them.
        say: gets progress messages.

    Returns:
        The table, as it was written.

    Raises:
        PreconditionError: there is nothing to measure, see `variants_of`.
        UsageError: too few repeats or threads, no case, or two cases alike.
        ExportError, OutputError: a variant cannot be exported, or a file not be written.
    """
    if len({case.name for case in cases}) != len(cases) or not cases or repeats < 2 or threads < 1:
        raise UsageError("a latency table needs at least one case, each once, 2 repeats and 1 thread")
    variants = variants_of(program.groups)
    identity = identity_of(program, threads=threads)
    progress = _Progress(out.with_name(f"{out.name}.partial"), identity, cases, repeats)
    if out.is_dir():
        raise OutputError(f"{out} is a directory; name the JSON file to write")
    progress.add([])  # an hour of measuring must not end at a place that cannot be written
    open_variants = [variant for variant in variants if not progress.has(variant)]
    if len(open_variants) < len(variants):
        say(f"{len(variants) - len(open_variants)} of {len(variants)} variants were measured before: {progress.path}")
    if open_variants:
        _measure_all(program, open_variants, _Setting(tuple(cases), threads, repeats), progress, say)
    scattered = sorted((entry for entry in progress.done if entry.uncertainty > _SCATTER), key=lambda e: -e.uncertainty)
    if scattered:
        worst = scattered[0]
        say(
            f"{len(scattered)} of {len(progress.done)} times scatter by more than {_SCATTER:.0%}, most of all "
            f"{worst.variant.name} in {worst.case} ({worst.uncertainty:.0%}): the table is no better than that; build "
            "it again while nothing else runs"
        )
    table = table_of(identity, program.groups, cases, progress.done)
    save_table(table, out)
    progress.path.unlink(missing_ok=True)
    return table


@dataclass(frozen=True)
class _Setting:
    """How variants are timed."""

    cases: tuple[Case, ...]
    threads: int
    repeats: int


def _measure_all(
    program: Program,
    variants: Sequence[Variant],
    setting: _Setting,
    progress: _Progress,
    say: Callable[[str], None],
) -> None:
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch, track("timing variants", len(variants)) as advance:
        say("exporting the dense model")
        start = time.perf_counter()
        dense = exported_runner(program, Path(scratch) / "dense", setting.threads)
        export = time.perf_counter() - start
        start = time.perf_counter()
        bench(dense, dense, setting.cases, threads=setting.threads, repeats=2, warmup=0)
        once = (time.perf_counter() - start) / 4
        minutes = len(variants) * (1.3 * export + 2 * (setting.repeats + _WARMUP) * once) / 60
        say(
            f"timing {len(variants)} variants, {setting.repeats} times each: about {minutes:.0f} minutes, on a busy "
            f"machine up to {_ROUNDS} times that; what is done is kept in {progress.path}"
        )
        for index, variant in enumerate(variants):
            say(f"{index + 1} of {len(variants)}: {variant.name}")
            alike = [g for g in program.groups if has_width(g) and block_shape(g) == variant.shape]
            plan = Plan.of({group.name: _kept(group, variant.width) for group in alike})
            slim = build_pass("slim", {})(program.replace(plan=plan)).program
            runner = exported_runner(slim, Path(scratch) / "slim", setting.threads)
            timed = bench(
                dense,
                runner,
                setting.cases,
                threads=setting.threads,
                repeats=setting.repeats,
                precision=Precision(_PRECISION, _ROUNDS * setting.repeats),
                warmup=_WARMUP,
            )
            progress.add([Measurement(variant, one.case.name, one.dense_times, one.slim_times) for one in timed])
            del slim, runner
            gc.collect()
            advance(index + 1)


def exported_runner(program: Program, directory: Path, threads: int) -> Runner:
    """Export a program and open it in ONNX Runtime; the file is overwritten by the next one."""
    export = resolve("fxprune.exporters.onnx:export_onnx")(program, directory)
    runner: Runner = resolve("fxprune.exporters.ort:OrtRunner")(export.path, threads=threads)
    return runner


class _Progress:
    """The measurements that are done, in memory and in a file; those of another model or setting are dropped."""

    def __init__(self, path: Path, identity: Identity, cases: Sequence[Case], repeats: int) -> None:
        self.path = path
        self.done: list[Measurement] = []
        cases_data = [asdict(case) for case in cases]
        self._head: dict[str, Any] = {"identity": asdict(identity), "cases": cases_data, "repeats": repeats}
        try:
            data = json.loads(path.read_bytes())
            if {key: data[key] for key in self._head} == self._head:
                self.done = [
                    Measurement(
                        Variant(entry["shape"], Width(**entry["width"])),
                        entry["case"],
                        tuple(entry["dense"]),
                        tuple(entry["slim"]),
                    )
                    for entry in data["done"]
                ]
        except (OSError, ValueError, KeyError, TypeError):
            self.done = []  # none yet, or cut off while it was written: measure

    def has(self, variant: Variant) -> bool:
        """Whether a variant was measured."""
        return any(entry.variant == variant for entry in self.done)

    def add(self, entries: Sequence[Measurement]) -> None:
        """Keep the measurements of a variant."""
        self.done += entries
        done = [
            {
                "shape": entry.variant.shape,
                "width": asdict(entry.variant.width),
                "case": entry.case,
                "dense": entry.dense,
                "slim": entry.slim,
            }
            for entry in self.done
        ]
        write_json(self.path, {**self._head, "done": done})


# ---- from times to costs -------------------------------------------------------------------------------------------


def table_of(
    identity: Identity, groups: Sequence[Group], cases: Sequence[Case], measured: Sequence[Measurement]
) -> LatencyTable:
    """Turn the times of variants into costs of blocks.

    The dense time of a case is the first quartile of all its dense runs. A variant's time is that times its ratio to
    the dense runs beside it: slow changes of the machine cancel.

    Args:
        identity: what was measured.
        groups: the groups of the dense model.
        cases: the workloads.
        measured: every variant of `variants_of(groups)` in every case.
    """
    counts = Counter(block_shape(group) for group in groups if has_width(group))
    example = {block_shape(group): group for group in groups if has_width(group)}
    rows = []
    for case in cases:
        own = [entry for entry in measured if entry.case == case.name]
        dense_ms = float(np.quantile(list(itertools.chain.from_iterable(entry.dense for entry in own)), 0.25))
        ratios = {entry.variant: entry.ratio for entry in own}
        ratios |= {Variant(shape, dense_width(group)): 1.0 for shape, group in example.items()}
        surfaces, base = {}, dense_ms
        for shape, count in counts.items():
            sets, per_set = _grid(example[shape])
            own_ratios = {variant.width: ratio for variant, ratio in ratios.items() if variant.shape == shape}
            grid = _completed(sets, per_set, own_ratios)
            surfaces[shape] = Surface.fit(sets, per_set, (1 - grid) * dense_ms / count)
            base -= count * surfaces[shape].at(dense_width(example[shape]))
        rows.append(CaseLatency(case, dense_ms, surfaces, base))
    return LatencyTable(identity, tuple(rows), tuple(_summary(entry) for entry in measured))


def _completed(sets: Sequence[int], per_set: Sequence[int], ratios: Mapping[Width, float]) -> NDArray[np.float64]:
    """Ratios over the whole grid, (sets, per_set); what a row of full sets needs is measured, see `variants_of`.

    A cell between is the full set's ratio less what fewer units per set save, interpolated between the outer rows.
    """
    full = [ratios[Width(count, per_set[-1])] for count in sets]
    columns = []
    for units in per_set:
        saved = [full[row] - ratios[Width(sets[row], units)] for row in (0, -1)]
        columns.append(np.array(full) - np.interp(sets, [sets[0], sets[-1]], saved))
    return np.stack(columns, axis=1)


def _summary(entry: Measurement) -> dict[str, Any]:
    """What a table keeps of a measurement."""
    low, high = ratio_interval(entry.dense, entry.slim)
    return {
        "variant": entry.variant.name,
        "case": entry.case,
        "repeats": len(entry.dense),
        "dense_ms": float(np.median(entry.dense)),
        "slim_ms": float(np.median(entry.slim)),
        "ci": [low, high],
    }
