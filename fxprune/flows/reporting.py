"""From a Program to the sections of `report.json`: what was measured, nothing that was not."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fxprune.channels.accounting import compare_macs, compare_parameters
from fxprune.core.groups import AttentionGroup
from fxprune.measure.speed import machine, peak_rss_bytes
from fxprune.weights.figures import mask_figures

if TYPE_CHECKING:
    from fxprune.core.program import Program

__all__ = ["group_entries", "report_of", "stage_seconds"]

_STAGES = {
    "lift_linears": "trace",
    "locate_attention": "trace",
    "locate_mlp": "trace",
    "locate_hidden": "trace",
    "locate_experts": "trace",
    "locate_layers": "trace",
    "channel": "prune",
    "fisher": "prune",
    "osscar": "prune",
    "flap": "prune",
    "wanda-sp": "prune",
    "taylor": "prune",
    "magnitude-units": "prune",
    "depth": "prune",
    "random": "prune",
    "l0": "prune",
    "magnitude": "prune",
    "wanda": "prune",
    "sparsegpt": "prune",
    "alps": "prune",
    "insert_masks": "slim",
    "slim": "slim",
    "verify": "verify",
    "save": "save",
    "export_onnx": "export",
}
_PARTS = {"calibrate": "calibrate", "text": "calibrate", "forward": "calibrate", "gram": "calibrate"}
"""Parts of a pass that are stages of their own, by the names under which passes time them."""
_PACKAGES = ("torch", "transformers", "tokenizers", "onnxruntime", "onnx", "onnxscript", "numpy", "safetensors")


def group_entries(program: Program) -> list[dict[str, Any]]:
    """What every group had and keeps, one entry a group, in layer order."""
    entries = []
    for group in sorted(program.groups, key=lambda group: (group.layer, group.kind)):
        kept = program.plan.kept_units(group) if program.plan else tuple(range(group.units))
        entry: dict[str, Any] = {
            "name": group.name,
            "kind": group.kind,
            "layer": group.layer,
            "unit": group.unit,
            "dense": group.units,
            "kept": len(kept),
        }
        if isinstance(group, AttentionGroup):
            entry |= {"kv_dense": group.kv_heads, "kv_kept": len(group.kv_kept(kept))}
        entries.append(entry)
    return entries


def stage_seconds(program: Program) -> dict[str, float]:
    """Seconds per stage of the history.

    A pass may leave `seconds` by part in its details: what went into calibration is told apart, the rest is its own.
    """
    seconds: dict[str, float] = {}
    for event in program.history:
        inner = event.details.get("seconds", {})
        rest = event.seconds
        for part, value in inner.items() if isinstance(inner, Mapping) else ():
            if part in _PARTS:
                seconds[_PARTS[part]] = seconds.get(_PARTS[part], 0.0) + value
                rest -= value
        stage = _STAGES.get(event.name, event.name)
        seconds[stage] = seconds.get(stage, 0.0) + max(0.0, rest)
    return seconds


def versions() -> dict[str, str]:
    """Versions of everything a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in ("fxprune", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional package that is not installed has no version to report
            continue
    return found


def report_of(
    program: Program,
    *,
    method: str | None = None,
    seed: int | None = None,
    seconds: Mapping[str, float] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Assemble a report.

    Args:
        program: the program at the end of its way.
        method: pruning method, if one ran.
        seed: its seed.
        seconds: stages that were not passes (trace, bench), added to those of the history.
        **sections: further sections as they are (`speed`, `quality`, `file_bytes`, ...).

    Returns:
        Sections for `fxprune.exporters.report_writer.write_report`; absent where nothing was measured.
    """
    report: dict[str, Any] = {
        "model": program.source.name if program.source else "nn.Module",
        "model_class": program.source.model_class.__name__ if program.source else None,
        "method": method,
        "seed": seed,
        "history": [event.to_json() for event in program.history],
        "seconds": {**stage_seconds(program), **(seconds or {})},
        "peak_rss_bytes": peak_rss_bytes(),
        "machine": machine(),
        "versions": versions(),
    }
    lifted = program.references.get("lifted")
    if lifted is not None and program.plan is not None:
        # Caches of layers that are left out are outputs no more.
        named = {"outputs": program.interface.outputs, "dense_outputs": lifted.interface.outputs}
        report["params"] = compare_parameters(lifted.module, program.graph_module, **named).to_json()
        report["macs"] = compare_macs(lifted.module, program.graph_module, **named).to_json()
    if program.groups and program.plan is not None:
        report["groups"] = group_entries(program)
    if program.weight_masks:
        patterns = program.results.get("mask_patterns")
        report["masks"] = mask_figures(program.graph_module, program.weight_masks, patterns)
    for section in ("sparsity", "structured", "verify", "calibration"):
        if section in program.results:
            report[section] = program.results[section]
    details = {name: program.results[name] for name in ("checkpoint", "onnx") if name in program.results}
    if program.unreached:  # no part of the figures above: they are of what the graph computes
        sizes = [tensor.numel() for tensor in program.unreached.values()]
        details["unreached"] = {"tensors": len(sizes), "elements": sum(sizes), "first": next(iter(program.unreached))}
    if details:
        report["details"] = details
    return {name: value for name, value in {**report, **sections}.items() if value is not None}
