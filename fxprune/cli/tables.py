"""What the command line prints: groups, inspections, and the rungs of a verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fxprune.channels.inspection import like_names
from fxprune.core.groups import AttentionGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fxprune.channels.inspection import Inspection
    from fxprune.core.program import Program

__all__ = ["show_groups", "show_inspection", "show_rungs"]


def show_groups(program: Program, out: Console) -> None:
    """Like groups share a row; the JSON forms list them one by one."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for group in sorted(program.groups, key=lambda group: (group.kind, group.layer)):
        cost = f"{group.unit_parameters:,}"
        if isinstance(group, AttentionGroup) and group.shared_parameters:
            cost += f" + {group.shared_parameters:,} a KV head"
        rows.setdefault((group.kind, group.describe(), cost), []).append(group.name)
    table = Table(title="What can be pruned", title_justify="left")
    for column in ("groups", "kind", "where", "units", "parameters a unit"):
        table.add_column(column, justify="right" if column == "groups" else "left")
    for (kind, units, cost), names in rows.items():
        where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        table.add_row(str(len(names)), kind, where, units, cost)
    out.print(table)
    for event in program.history:
        for where, why in event.details.get("refused", {}).items():
            out.print(f"not prunable by {event.name}: {where}: {why}", highlight=False, markup=False, soft_wrap=True)


def _amount(number: float) -> str:
    """Three digits and a unit, for people; the JSON has all digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def show_inspection(found: Inspection, out: Console) -> None:
    """Like groups share a row, like pins a line; the JSON form lists every group."""

    def tell(line: str) -> None:
        out.print(line, highlight=False, markup=False, soft_wrap=True)

    tell(
        f"{found.model} ({found.model_class}): {found.parameters:,} parameters, {found.block_parameters:,} of them in "
        f"block Linears; {found.macs:,} MACs a token without attention scores, {found.lm_head_macs:,} of them in the "
        "output projection"
    )
    rows: dict[tuple[str, ...], list[str]] = {}
    for group in found.groups:
        shared = (group.shared_parameters, group.shared_macs)
        costs = [_amount(number) for number in (group.unit_parameters, group.unit_macs, group.parameters, group.macs)]
        units = [cost + (f" + {_amount(more)}" if more else "") for cost, more in zip(costs[:2], shared, strict=True)]
        row = (group.kind, group.description, *units, f"{group.removed_share:.3%}", *costs[2:])
        rows.setdefault(row, []).append(group.name)
    groups = Table(title="What can be pruned", title_justify="left")
    costs_of = Table(title="What goes with it (a KV head's share after the +)", title_justify="left")
    for column in ("groups", "kind", "where", "units"):
        groups.add_column(column, justify="right" if column == "groups" else "left")
    for column in ("kind", "a unit: parameters", "MACs", "share", "a group: parameters", "MACs"):
        costs_of.add_column(column, justify="left" if column == "kind" else "right")
    for (kind, description, *figures), names in rows.items():
        where = names[0] if len(names) == 1 else like_names(names[0])
        groups.add_row(str(len(names)), kind, where, description)
        costs_of.add_row(kind, *figures)
    out.print(groups, costs_of)
    for pin in found.pins:
        tell(f"stays: {pin}; {pin.channels:,} channels")
    for refusal in found.refusals:
        times = f" ({refusal.count} times)" if refusal.count > 1 else ""
        tell(f"not prunable by {refusal.by}: {refusal.where}: {refusal.reason}{times}")
    for tied in found.tied:
        tell(f"one tensor of {tied.parameters:,} elements: {', '.join(tied.names)}")
    for weight in found.shared:
        tell(f"used {len(weight.uses)} times: {weight.name} by {', '.join(weight.uses)}")
    for label in found.uncounted:
        tell(f"not in the MACs: {label}")


def show_rungs(rungs: Sequence[dict[str, Any]], out: Console) -> None:
    """The certificate."""
    table = Table(title="Verification", title_justify="left")
    for column in ("rung", "max abs error", "tolerance", ""):
        table.add_column(column)
    for rung in rungs:
        passed = "[green]passed[/]" if rung["passed"] else "[red]failed[/]"
        if rung.get("detail"):  # why an error above the tolerance passed, or what stands beside one that did not
            passed += f" ({escape(rung['detail'])})"
        table.add_row(rung["rung"], f"{rung['max_abs_error']:.2e}", f"{rung['tolerance']:.0e}", passed)
    out.print(table)
