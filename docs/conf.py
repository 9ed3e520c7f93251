"""How Sphinx builds these pages (`make docs`): Markdown by MyST, the reference from docstrings by autodoc."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from typing import Any

import fxprune.exporters

project = "fxprune"
author = "the fxprune developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fxprune"
default_role = "code"  # `name` in a docstring
myst_heading_anchors = 3
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "none"  # docstrings say what arguments are
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
_DRAWING = re.compile(r" {4,}\S")


def _as_text(line: str) -> str:
    """Bars and stars outside of code are no markup: |W_ij| is an amount."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _readable(*event: Any) -> None:
    """Drawings, which docstrings indent, become literal blocks; all else is text."""
    lines: list[str] = event[-1]
    found: list[str] = []
    section = drawing = False
    for line in lines:
        if line.strip():
            section = bool(_SECTION.match(line)) or (section and line.startswith(" "))
            starts = not section and not (found and found[-1].strip()) and _DRAWING.match(line)
            if starts and not drawing:
                found += ["::", ""]
            drawing = bool(starts) or (drawing and line.startswith("    "))
        found.append(line if drawing else _as_text(line))
    if event[1] in {"attribute", "data", "property"}:  # napoleon takes what stands before a colon for a type
        found = [line.replace(": ", " \N{EN DASH} ") for line in found]
    lines[:] = found


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _readable, priority=400)  # before napoleon
    # autodoc writes into the annotations of pydantic's base class, after which no model can be made.
    for module in pkgutil.iter_modules(fxprune.exporters.__path__):
        import_module(f"fxprune.exporters.{module.name}")
    for name in fxprune.__all__:  # what is imported when it is first asked for, so that autodoc finds it
        setattr(fxprune, name, getattr(fxprune, name))
