"""Charts of the report: what each shows and how it is drawn, see `fxprune.exporters.chart_kit` for the common parts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fxprune.exporters.chart_kit import (
    BOUND,
    DENSE,
    INK,
    MUTED,
    SERIES,
    SLIM,
    TIMES,
    WIDE,
    Chart,
    bare,
    empty_figure,
    finite,
    label_right,
    make_chart,
    set_title,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "TIMES",
    "Chart",
    "CurvePanel",
    "curve_chart",
    "difference_chart",
    "error_chart",
    "error_series",
    "quality_chart",
    "speed_chart",
    "widths_chart",
]

# ---- layer widths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Panel:
    title: str
    layers: list[int]
    dense: list[int]
    kept: list[int]


def widths_chart(groups: Sequence[Mapping[str, Any]]) -> Chart:
    """Widths per layer before (outline) and after (filled), one panel per kind of group."""
    panels = _panels(groups)
    alt = "; ".join(
        f"{panel.title}: {sum(panel.kept):,} of {sum(panel.dense):,} kept over {len(panel.layers)} layers, "
        f"per layer {min(panel.kept):,} to {max(panel.kept):,} of {max(panel.dense):,}"
        for panel in panels
    )

    def draw(width: int) -> Figure:
        figure = empty_figure(width, 165 * len(panels) + 10)
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            axes.bar(panel.layers, panel.kept, width=0.8, color=SLIM, linewidth=0)
            axes.bar(panel.layers, panel.dense, width=0.8, facecolor="none", edgecolor=DENSE)
            axes.set_xlim(min(panel.layers) - 0.7, max(panel.layers) + 0.7)
            axes.set_ylim(0, max(1, *panel.dense) * 1.05)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 45, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=2))
            axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
            bare(axes, grid="y")
            set_title(axes, panel.title, width)
        axes.set_xlabel("layer")
        return figure

    return make_chart("widths", f"Widths per layer before and after pruning. {alt}", draw)


def _panels(groups: Sequence[Mapping[str, Any]]) -> list[_Panel]:
    """One panel per kind; groups of one kind in one layer (experts) add up; without layers, groups are counted."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for group in groups:
        kinds[group["kind"]].append(group)
    panels = []
    for kind, members in kinds.items():
        # KV groups tell the story when query heads left only together with their whole KV group.
        whole = all(
            "kv_dense" in group and group.get("kv_kept", 0) * group["dense"] == group["kept"] * group["kv_dense"]
            for group in members
        )
        prefix = "kv_" if whole else ""
        unit = "KV groups" if whole else members[0].get("unit") or {"attention": "query heads"}.get(kind, "units")
        layers: dict[int, list[int]] = {}
        for index, group in enumerate(members):
            widths = layers.setdefault(group.get("layer", index), [0, 0])
            widths[0] += group[f"{prefix}dense"]
            widths[1] += group[f"{prefix}kept"]
        numbers = sorted(layers)
        name = {"mlp": "MLP width"}.get(kind, kind.capitalize())
        panels.append(
            _Panel(f"{name} ({unit})", numbers, [layers[i][0] for i in numbers], [layers[i][1] for i in numbers])
        )
    return sorted(panels, key=lambda panel: not panel.title.startswith("MLP"))


# ---- errors of pruned Linears --------------------------------------------------------------------------------------


def error_series(linears: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Errors that a logarithmic axis can show: by kind of projection, then by depth.

    The kind is the end of a name, as much of it as tells the projections of a layer apart (at most all but numbers;
    those that stay alike, such as experts, are averaged). The depth is the first number in the name; stacks of layers
    follow each other.
    """
    drawn = [entry for entry in linears if finite(entry.get("error")) and entry["error"] > 0]
    names = [entry["name"] for entry in drawn]
    depths = _depths(names)
    words = [[word for word in name.split(".") if not word.isdecimal()] or [name] for name in names]
    kinds: list[str] = []
    for length in (*range(1, max(map(len, words), default=0) + 1), 1):
        kinds = [".".join(parts[-length:]) for parts in words]
        if len(set(zip(depths, kinds, strict=True))) == len(names):
            break
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry, depth, kind in zip(drawn, depths, kinds, strict=True):
        found[kind][depth].append(entry["error"])
    return {kind: {depth: fmean(series[depth]) for depth in sorted(series)} for kind, series in found.items()}


def _depths(names: Sequence[str]) -> list[int]:
    places: list[tuple[str, int]] = []
    for name in names:
        before, number = name, 0
        if found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name, re.ASCII):
            before, number = name[: found.start()], int(found[1])
        places.append((before, number))
    starts: dict[str, int] = {}
    end = 0
    for stack in dict.fromkeys(stack for stack, _ in places):
        starts[stack] = end
        end += max(number for other, number in places if other == stack) + 1
    return [starts[stack] + number for stack, number in places]


def error_chart(linears: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Error of every pruned Linear against depth, a line for each kind of projection; None when there is none above 0.

    Line i has the page's colour `--s{i}`, counted round after the last.
    """
    series = error_series(linears)
    if not series:
        return None
    alt = "; ".join(
        f"{kind}: {min(line.values()):.2g} to {max(line.values()):.2g} over {len(line)} layers"
        for kind, line in series.items()
    )
    errors = [error for line in series.values() for error in line.values()]
    low, high = min(errors), max(errors)

    def draw(width: int) -> Figure:
        figure = empty_figure(width, 300)
        axes = figure.subplots()
        axes.set_yscale("log")
        for index, line in enumerate(series.values()):
            style = ("-", "--", ":")[index // len(SERIES) % 3]
            color = SERIES[index % len(SERIES)]
            axes.plot(list(line), list(line.values()), style, color=color, linewidth=1.6, marker="o", markersize=3.5)
        axes.set_ylim(low / 1.25, high * 1.25)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 45, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        bare(axes, grid="y")
        axes.set_xlabel("layer")
        return figure

    return make_chart("errors", f"Error of every pruned Linear by layer. {alt}", draw)


# ---- quality -------------------------------------------------------------------------------------------------------


def quality_chart(entries: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Dense and slim figures as bars with their standard errors, one panel per metric; None when none is finite."""
    metrics: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        if any(finite(entry.get(form)) for form in ("dense", "slim")):
            metrics[entry["metric"]].append(entry)
    if not metrics:
        return None
    alt = "; ".join(
        f"{entry['metric']} on {entry['text']}: "
        + ", ".join(f"{form} {entry[form]:.4g}" for form in ("dense", "slim") if finite(entry.get(form)))
        for members in metrics.values()
        for entry in members
    )

    def draw(width: int) -> Figure:
        counts = [len(members) for members in metrics.values()]
        figure = empty_figure(width, 62 * sum(counts) + 40 * len(counts))
        panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
        for axes, (metric, members) in zip(panels, metrics.items(), strict=True):
            _quality_panel(axes, members, width)
            direction = next((entry["better"] for entry in members if "better" in entry), None)
            set_title(axes, metric + (f" ({direction} is better)" if direction else ""), width)
        return figure

    return make_chart("quality", f"Quality of the dense and the slim model. {alt}", draw)


def _quality_panel(axes: Axes, members: Sequence[Mapping[str, Any]], width: int) -> None:
    reach = max(
        entry[form] + _error(entry, form) for entry in members for form in ("dense", "slim") if finite(entry.get(form))
    )
    room = 0.15 if width == WIDE else 0.3
    axes.set_xlim(0, max(reach, 1e-9) * (1 + room))
    for row, entry in enumerate(members):
        axes.text(0, row - 0.36, short(entry["text"], width // 8), color=MUTED, va="center", parse_math=False)
        for place, form, face, edge in ((-0.08, "dense", "none", DENSE), (0.22, "slim", SLIM, SLIM)):
            if not finite(entry.get(form)):
                continue
            value, error = float(entry[form]), _error(entry, form)
            axes.barh(row + place, value, height=0.24, facecolor=face, edgecolor=edge)
            if error:
                axes.errorbar(value, row + place, xerr=error, color=INK, elinewidth=1.2, capsize=3)
            label_right(axes, f"{value:.4g}", value + error, row + place)
    axes.set_ylim(len(members) - 0.55, -0.55)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 90))
    bare(axes, grid="x")


def _error(entry: Mapping[str, Any], form: str) -> float:
    error = entry.get(f"{form}_stderr")
    return float(error) if error is not None and math.isfinite(error) else 0.0


# ---- speed ---------------------------------------------------------------------------------------------------------


def speed_chart(entries: Sequence[Mapping[str, Any]]) -> Chart:
    """Speed-up of every case with its 95% interval, and what counting predicts as a diamond."""
    alt = "; ".join(
        f"{entry['case']} on {entry['runtime']}: {entry['speedup']:.2f} times"
        + (f", 95% interval {entry['ci'][0]:.2f} to {entry['ci'][1]:.2f}" if "ci" in entry else "")
        + (f", bound {entry['bound']:.2f}" if "bound" in entry else "")
        for entry in entries
    )

    def draw(width: int) -> Figure:
        figure = empty_figure(width, 48 * len(entries) + 46)
        axes = figure.subplots()
        marks = [1.0, *(mark for entry in entries for mark in _marks(entry))]
        low, high = min(marks), max(marks)
        margin = max(high - low, 0.1) * 0.08
        axes.set_xlim(low - margin, high + margin * (2 if width == WIDE else 3.5))
        axes.axvline(1.0, color=MUTED, linewidth=1.2)
        for row, entry in enumerate(entries):
            name = f"{entry['case']}  ·  {entry['runtime']}"
            if "threads" in entry:
                name += f"  ·  {entry['threads']} thread" + "s" * (entry["threads"] != 1)
            axes.text(low - margin, row - 0.3, short(name, width // 8), color=MUTED, va="center", parse_math=False)
            value = entry["speedup"]
            if "ci" in entry:
                axes.plot(entry["ci"], [row + 0.1] * 2, color=SLIM, linewidth=3, alpha=0.45, solid_capstyle="butt")
            axes.plot([value], [row + 0.1], marker="o", markersize=8, color=SLIM, linewidth=0)
            if "bound" in entry:
                axes.plot([entry["bound"]], [row + 0.1], marker="D", markersize=7, color=BOUND, mfc="none", mew=1.6)
            label_right(axes, f"{value:.2f}{TIMES}", max(_marks(entry)), row + 0.1, gap=9, weight="bold")
        axes.set_ylim(len(entries) - 0.5, -0.6)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 80))
        axes.xaxis.set_major_formatter(lambda value, _position: f"{value:.2f}{TIMES}")
        bare(axes, grid="x")
        return figure

    return make_chart("speed", f"Speed-up, dense time over slim time. {alt}", draw)


def _marks(entry: Mapping[str, Any]) -> list[float]:
    return [entry["speedup"], *entry.get("ci", ()), *([entry["bound"]] if "bound" in entry else [])]


# ---- quality against size and speed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePanel:
    """Lines of perplexity against something.

    Attributes:
        title: of the panel.
        label: of the horizontal axis.
        unit: how its ticks read: `percent` or `times`.
        lines: points (x, perplexity) by name of the text; line i has the page's colour `--s{i}`.
    """

    title: str
    label: str
    unit: Literal["percent", "times"]
    lines: Mapping[str, Sequence[tuple[float, float]]]


def curve_chart(panels: Sequence[CurvePanel]) -> Chart:
    """Perplexity of several budgets, one panel for each way to count; the dense model is each line's first point."""
    alt = "; ".join(
        f"{panel.title}, {name}: " + ", ".join(f"{y:.4g} at {_tick(panel.unit, x)}" for x, y in line)
        for panel in panels
        for name, line in panel.lines.items()
    )

    def draw(width: int) -> Figure:
        figure = empty_figure(width, 260 * len(panels))
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            axes.set_yscale("log")
            for index, line in enumerate(panel.lines.values()):
                drawn = [(x, y) for x, y in line if finite(x) and finite(y) and y > 0]
                color, style = SERIES[index % len(SERIES)], ("-", "--", ":")[index // len(SERIES) % 3]
                axes.plot(*zip(*drawn, strict=True), style, color=color, linewidth=1.8, marker="o", markersize=5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 90))
            axes.xaxis.set_major_formatter(lambda value, _position, unit=panel.unit: _tick(unit, value))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            bare(axes, grid="y")
            axes.set_xlabel(panel.label)
            set_title(axes, panel.title, width)
        return figure

    return make_chart("curve", f"Perplexity of every budget. {alt}", draw)


def _tick(unit: str, value: float) -> str:
    return f"{value:.3g}{TIMES}" if unit == "times" else f"{100 * value:.3g}%"


# ---- differences between forms -------------------------------------------------------------------------------------


def difference_chart(entries: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Differences to the first form with their 95% intervals, one panel per metric; None when none is finite.

    Differences of logarithms are drawn as ratios, around 1; the others around 0.
    """
    panels: dict[tuple[str, float], list[tuple[str, float, float, float]]] = defaultdict(list)
    for entry in entries:
        title = entry["metric"] + (f" ({entry['better']} is better)" if "better" in entry else "")
        for each in entry["differences"]:
            alike = 1.0 if "ratio" in each else 0.0
            middle, ends = (each["ratio"], each["ratio_ci"]) if alike else (each["difference"], each["ci"])
            if all(map(math.isfinite, (middle, *ends))):
                panels[title, alike].append((f"{each['form']}  ·  {entry['text']}", middle, *ends))
    if not panels:
        return None
    alt = "; ".join(
        f"{title}, {name}: {middle:.4g}, 95% interval {low:.4g} to {high:.4g}"
        for (title, _), rows in panels.items()
        for name, middle, low, high in rows
    )

    def draw(width: int) -> Figure:
        counts = [len(rows) for rows in panels.values()]
        figure = empty_figure(width, 46 * sum(counts) + 62 * len(counts))
        parts = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
        for axes, ((title, alike), rows) in zip(parts, panels.items(), strict=True):
            ends = [alike, *(end for row in rows for end in row[1:])]
            margin = max(max(ends) - min(ends), 1e-9) * 0.08
            left = min(ends) - margin
            axes.set_xlim(left, max(ends) + margin * (2.5 if width == WIDE else 5))
            axes.axvline(alike, color=MUTED, linewidth=1.2)
            for row, (name, middle, low, high) in enumerate(rows):
                axes.text(left, row - 0.3, short(name, width // 8), color=MUTED, va="center", parse_math=False)
                axes.plot((low, high), [row + 0.1] * 2, color=SLIM, linewidth=3, alpha=0.45, solid_capstyle="butt")
                axes.plot([middle], [row + 0.1], marker="o", markersize=8, color=SLIM, linewidth=0)
                shown = f"{middle:.3g}{TIMES}" if alike else f"{middle:+.3g}"
                label_right(axes, shown, high, row + 0.1, gap=9, weight="bold")
            axes.set_ylim(len(rows) - 0.5, -0.6)
            axes.set_yticks([])
            axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 90))
            bare(axes, grid="x")
            set_title(axes, title, width)
        return figure

    return make_chart("differences", f"Differences to the first form. {alt}", draw)
