"""The model card: `README.md` of a checkpoint, with its plan, its figures and how to load it.

What the card says is read from the checkpoint itself (`fxprune.json`, `config.json`, headers of the weight files) and
from the `report.json` beside it, so it is written once with the weights and again when there are figures. A card whose
first line of text was removed belongs to its reader and is never written again.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fxprune.core.output import write_text
from fxprune.exporters.report import markdown_summary, read_report
from fxprune.exporters.report_markdown import cell, table_lines
from fxprune.models.manifest import CONFIG_NAME, MANIFEST_NAME, read_manifest, verify_companions
from fxprune.models.shards import read_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fxprune.models.manifest import Manifest

__all__ = ["CARD_NAME", "model_card", "refresh_model_card", "write_model_card"]

CARD_NAME = "README.md"
_MARK = "<!-- Written by fxprune. Remove this line to keep your own changes. -->"
_CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of the dense model's card that hold for the slim one too."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def write_model_card(directory: Path, *, source: Path | None = None, repo_id: str | None = None) -> Path:
    """Write the card of a checkpoint.

    Args:
        directory: the checkpoint.
        source: directory of the dense model; the license in its card is carried over.
        repo_id: under which name it will be on the hub; the commands to load it name it.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: the directory is not a checkpoint of fxprune, or was changed.
        OutputError: the card cannot be written.
    """
    path = directory / CARD_NAME
    carried = {**_front_matter(path), **(_front_matter(source / CARD_NAME) if source is not None else {})}
    text = model_card(directory, carried={key: carried[key] for key in _CARRIED if key in carried}, repo_id=repo_id)
    write_text(path, text)
    return path


def refresh_model_card(directory: Path | str, *, repo_id: str | None = None) -> bool:
    """Write the card of a checkpoint again, if there is one that fxprune wrote and nobody took over.

    Returns:
        Whether it was written.

    Raises:
        CheckpointError: the directory is not a checkpoint of fxprune, or was changed.
        OutputError: the card cannot be written.
    """
    path = Path(directory) / CARD_NAME
    if not (path.parent / MANIFEST_NAME).is_file() or not path.is_file():
        return False
    if _MARK not in path.read_text(encoding="utf-8", errors="replace").splitlines():
        return False
    write_model_card(path.parent, repo_id=repo_id)
    return True


def model_card(directory: Path, *, carried: Mapping[str, Any] | None = None, repo_id: str | None = None) -> str:
    """The text of a card, Markdown with the hub's YAML header.

    Args:
        directory: the checkpoint.
        carried: further fields of the header.
        repo_id: as for `write_model_card`.

    Raises:
        CheckpointError: the directory is not a checkpoint of fxprune, or was changed.
    """
    manifest = read_manifest(directory)
    verify_companions(directory, manifest)
    config = json.loads((directory / CONFIG_NAME).read_bytes())
    architecture = next(iter(config.get("architectures") or []), "")
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["fxprune", "pruned"]}
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        header["pipeline_tag"] = "text-generation"
    dense = manifest.source.name
    if _HUB_ID.fullmatch(dense) and not Path(dense).exists():
        header["base_model"] = dense
    header |= carried or {}
    name = dense.rstrip("/").rpartition("/")[2]
    report = _report(directory)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=True, allow_unicode=True).rstrip(),
        "---",
        _MARK,
        "",
        f"# {cell(name)}, pruned with fxprune",
        "",
        _summary(manifest, directory, architecture),
        *_loading(manifest, repo_id, architecture, tokenizer=any(directory.glob("tokenizer*"))),
        *_widths(manifest),
        *_plan(manifest, report),
        *_figures(report),
        *_history(manifest),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML header of a card; empty where there is none, or none that can be read: it is somebody else's file."""
    try:
        found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _report(directory: Path) -> dict[str, Any] | None:
    path = directory / "report.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = read_report(path)
    return found


def _summary(manifest: Manifest, directory: Path, architecture: str) -> str:
    shapes = read_shapes(directory, manifest.files)
    count = sum(prod(shape) for shape in shapes.values())
    gone = sum(prod(change.dense) - prod(change.slim) for change in manifest.parameters.values())
    size = sum((directory / name).stat().st_size for name in manifest.files)
    layers = sum(len(kept) for kept in manifest.kept_layers.values())
    held = f"{count:,} parameters in {size / 2**20:,.1f} MiB"
    if gone or layers:
        parts = [f"A smaller `{architecture}`: parts of the dense model were removed, and {held} are left."]
    else:
        parts = [f"A sparse `{architecture}`: some of its weights are zero. It has {held}, as many as before."]
    if gone:
        parts.append(f"Its layers have {gone:,} parameters fewer than the same layers of the dense model.")
    if layers:
        parts.append(f"It keeps {layers} of the dense model's layers.")
    if manifest.kind == "mixed":
        parts.append(f"No configuration of transformers' own describes it, fxprune does: {cell(manifest.reason)}.")
    return " ".join(parts)


def _loading(manifest: Manifest, repo_id: str | None, architecture: str, *, tokenizer: bool) -> list[str]:
    where = repo_id or "path/to/this/directory"
    mixed = manifest.kind == "mixed"
    causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not architecture.isidentifier()
    if mixed and not causal:
        code = ["import fxprune", "", f'model = fxprune.load("{where}")']
    else:
        loader = "AutoModelForCausalLM" if causal else architecture
        names = sorted([loader, "AutoTokenizer"] if tokenizer or causal else [loader])
        code = [
            *(["import fxprune  # transformers then knows this kind of model", ""] if mixed else []),
            f"from transformers import {', '.join(names)}",
            "",
            f'model = {loader}.from_pretrained("{where}")',
            *([f'tokenizer = AutoTokenizer.from_pretrained("{where}")'] if "AutoTokenizer" in names else []),
        ]
    tuned = (
        "It is trained, adapted (LoRA) and saved like any other model; what `save_pretrained`, `Trainer` or peft's "
        "`merge_and_unload` and `save_pretrained` write is loaded in the same way."
    )
    more = ["", tuned]
    if mixed:
        more += ["", "The package is installed with `pip install fxprune`."]
    return ["", "## How to load it", "", "```python", *code, "```", *more]


def _widths(manifest: Manifest) -> list[str]:
    """Shapes before and after; layers that are alike share a row."""
    rows: dict[str, list[tuple[Sequence[int], Sequence[int]]]] = {}
    for name, change in manifest.parameters.items():
        rows.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append((change.dense, change.slim))
    cells = []
    for name, changes in rows.items():
        before = " x ".join(_span(sizes) for sizes in zip(*(dense for dense, _ in changes), strict=True))
        after = " x ".join(_span(sizes) for sizes in zip(*(slim for _, slim in changes), strict=True))
        cells.append((name, str(len(changes)), before, after))
    if not cells:
        return []
    return ["", "## What became smaller", *table_lines(("parameter", "layers", "dense", "slim"), cells)]


def _span(sizes: Iterable[int]) -> str:
    found = sorted(set(sizes))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _plan(manifest: Manifest, report: Mapping[str, Any] | None) -> list[str]:
    kept = manifest.plan.get("kept")
    if not isinstance(kept, dict) or not kept:
        return []
    dense = {entry["name"]: entry for entry in (report or {}).get("groups", [])}
    rows = [
        (name, str(dense[name]["dense"]) if name in dense else "", str(len(units)) if isinstance(units, list) else "")
        for name, units in kept.items()
    ]
    return [
        "",
        "<details><summary>The plan: how many units each group keeps</summary>",
        *table_lines(("group", "had", "keeps"), rows),
        "",
        f"Which ones is in `{MANIFEST_NAME}`.",
        "",
        "</details>",
    ]


def _figures(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return []
    summary = re.sub(r"(?m)^#", "##", markdown_summary(report))
    return ["", "## Figures", "", summary.strip(), "", "All of them, and how they were measured, are in `report.json`."]


def _history(manifest: Manifest) -> list[str]:
    rows = []
    for event in manifest.history:
        if isinstance(event, dict) and isinstance(event.get("name"), str):
            options = event.get("options")
            given = options if isinstance(options, dict) else {}
            # Paths of the machine that it was made on are nobody's business.
            said = ", ".join(f"{k}={v}" for k, v in given.items() if v not in (None, {}, []) and not _is_path(v))
            rows.append((str(event["name"]), said))
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return ["", "## How it was made", *table_lines(("pass", "options"), rows), "", cell(f"Made with {versions}.")]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)
