"""Makes the pictures of these pages from what `fxprune inspect MODEL --picture FILE` prints and draws.

python docs/pictures.py [MODEL]     # the default model's configuration by default
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from fxprune.channels.inspection import inspect_groups
from fxprune.cli.tables import show_inspection
from fxprune.core.stopwatch import Stopwatch
from fxprune.exporters.group_picture import draw_block
from fxprune.flows.from_config import inspect_program
from fxprune.models.default_model import default_model_path

images = Path(__file__).parent / "images"
model = sys.argv[1] if len(sys.argv) > 1 else str(default_model_path())
program = inspect_program(model, Stopwatch())


class Page(Console):
    """A console that breaks long lines, as a terminal does."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As every console's."""
        super().print(*objects, **{**options, "soft_wrap": False})


console = Page(record=True, width=112, file=io.StringIO())
found = inspect_groups(program)
show_inspection(replace(found, model="SmolLM2-135M-Instruct" if len(sys.argv) == 1 else Path(model).name), console)
picture = console.export_svg(title="fxprune inspect", theme=DEFAULT_TERMINAL_THEME)
# No font is fetched: what the reader's browser has will do.
picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
images.mkdir(exist_ok=True)
(images / "inspect.svg").write_text(picture, encoding="utf-8")
draw_block(program, images / "block.svg")
print(*sorted(images.iterdir()))
