"""Curves of learned pruning in the report: sparsity, losses, multipliers, and the widths of layers as they fell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from fxprune.exporters.chart_kit import SERIES, bare, empty_figure, finite, make_chart, set_title
from fxprune.exporters.report_text import Fact, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from fxprune.exporters.chart_kit import Chart

__all__ = ["LearningPanel", "learning_chart", "learning_facts", "learning_panels"]

_CURVES = (
    ("Sparsity", (("sparsity", "student"), ("target", "schedule"), ("teacher", "teacher"))),
    ("Loss", (("kl", "divergence from the teacher"), ("lm", "next token"), ("layers", "hidden states"))),
    ("Multipliers", (("lambda_linear", "linear"), ("lambda_quadratic", "quadratic"))),
)
_TIMES = (0.25, 0.5, 1.0)
"""When widths are drawn, as shares of the training."""


@dataclass(frozen=True)
class LearningPanel:
    """Lines of one panel.

    Attributes:
        title: of the panel.
        label: of the horizontal axis.
        lines: points by name; line i has the page's colour `--s{i}`.
        whole: whether the horizontal axis counts from 0 to 1 upwards, as shares do.
    """

    title: str
    label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    whole: bool = False


def learning_panels(learning: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[LearningPanel]:
    """The panels of one training.

    Args:
        learning: what the pass `l0` left in `structured.learning`.
        groups: section `groups` of the report, for the layers and dense widths.
    """
    rows = learning.get("curves", [])
    panels = []
    for title, wanted in _CURVES:
        lines = {
            label: [(row["step"], row[key]) for row in rows if finite(row.get(key))]
            for key, label in wanted
            if any(finite(row.get(key)) for row in rows)
        }
        if lines:
            panels.append(LearningPanel(title, "step", lines, whole=title == "Sparsity"))
    if rows := (learning.get("post") or {}).get("curves", []):
        line = [(row["step"], row["loss"]) for row in rows if finite(row.get("loss"))]
        panels.append(LearningPanel("Fine-tuning", "step", {"loss": line}))
    return panels + _width_panels(learning.get("widths", []), groups)


def _width_panels(widths: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[LearningPanel]:
    """For every kind of group the share that each layer keeps, at a few times."""
    if not widths:
        return []
    last = widths[-1]["step"]
    chosen = [min(widths, key=lambda one: abs(one["step"] - share * last)) for share in _TIMES]
    panels = []
    for kind in dict.fromkeys(group["kind"] for group in groups):
        members = [group for group in groups if group["kind"] == kind and group["name"] in widths[-1]["widths"]]
        lines = {
            f"step {one['step']}": [
                (group.get("layer", place), one["widths"][group["name"]] / max(1, group["dense"]))
                for place, group in enumerate(members)
            ]
            for one in chosen
        }
        if len(members) > 1:
            title = {"mlp": "Share of the MLP width that stays"}.get(kind, f"Share of {kind} units that stays")
            panels.append(LearningPanel(title, "layer", lines, whole=True))
    return panels


def learning_chart(panels: Sequence[LearningPanel]) -> Chart | None:
    """All panels, one below the other; None without any."""
    if not panels:
        return None
    alt = "; ".join(
        f"{panel.title}, {name}: {line[0][1]:.3g} to {line[-1][1]:.3g}"
        for panel in panels
        for name, line in panel.lines.items()
        if line
    )

    def draw(width: int) -> Figure:
        figure = empty_figure(width, 190 * len(panels))
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            for index, (name, line) in enumerate(panel.lines.items()):
                color = SERIES[index % len(SERIES)]
                axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=1.6)
                if line:  # the page has no key for every panel: a line is named at its end
                    axes.annotate(
                        name, line[-1], (0, 4), textcoords="offset points", ha="right", color=color, parse_math=False
                    )
            values = [y for line in panel.lines.values() for _, y in line]
            if panel.whole and values:
                axes.set_ylim(0, max(values) * 1.15 or 1)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 90, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            bare(axes, grid="y")
            axes.set_xlabel(panel.label)
            set_title(axes, panel.title, width)
        return figure

    return make_chart("learning", f"How the gates were learned. {alt}", draw)


def learning_facts(learning: Mapping[str, Any]) -> list[Fact]:
    """How it was trained, and what it came to, in a few clauses."""
    if not learning:
        return []
    adapters = f"LoRA of rank {learning['lora_rank']}" if learning.get("lora_rank") else "masks alone"
    how = (
        f"{adapters}, {learning['steps']:,} steps ({si_tokens(learning['tokens_seen'])}), {learning['budget']} budget, "
        f"distillation {learning['distillation']}, {learning['teachers']} teachers"
    )
    facts = [Fact(how, "Training", how)]
    found = [(name, value) for name, value in learning.get("held_out_kl", {}).items() if math.isfinite(value)]
    if found:
        value = ", ".join(f"{name} {number(kl)}" for name, kl in found)
        label = "Divergence from the dense model on held-out text, nats a token"
        facts.append(Fact(value, label, f"divergence from the dense model on held-out text: {value}"))
    return facts


def si_tokens(count: int) -> str:
    """A number of tokens in words."""
    return f"{count / 1e6:.2f} million tokens" if count >= 1e6 else f"{count:,} tokens"
