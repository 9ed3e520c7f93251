"""The way of a model stays readable, and the page that walks it names functions that exist and run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
MOST_THAT_RUN = 3_000
"""Lines of code in functions that a plain Llama runs from `trace` to `verify`: what can be read in one sitting."""
MOST_IN_FILES = 4_100
"""Lines of code in the files that these functions are in: what serves one odd operator has a file of its own."""


@dataclass(frozen=True)
class Way:
    """What `python -m benchmarks.way` measured: functions that ran, with their lines of code, by file."""

    ran: dict[str, dict[str, int]]
    left: dict[str, dict[str, int]]
    code: int
    lines: int

    @property
    def lines_that_run(self) -> int:
        return sum(sum(functions.values()) for functions in self.ran.values())


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    """In a process of its own: what other tests have cached would not run, and they may be traced themselves."""
    out = tmp_path_factory.mktemp("way") / "way.json"
    command = [sys.executable, "-m", "benchmarks.way", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads(out.read_text(encoding="utf-8"))
    return Way(
        {one["path"]: one["ran"] for one in files},
        {one["path"]: one["left"] for one in files},
        sum(one["code"] for one in files),
        sum(one["lines"] for one in files),
    )


def page_links(text: str) -> list[tuple[str, str]]:
    """The text and the target, from the root of the repository, of each link into the repository."""
    return re.findall(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", text)


def walked(text: str) -> list[tuple[str, str]]:
    """Functions that the page says a Llama runs, with their files."""
    return [(name.strip("`"), path) for name, path in page_links(text) if name.startswith("`")]


def skipped(text: str) -> list[str]:
    """Files that the page says a Llama does not meet."""
    (section,) = re.findall(r"(?ms)^## What a reader of the way may skip\n(.*?)^## ", text)
    return [path for _, path in page_links(section)]


def test_the_way_can_be_read_in_one_sitting(way: Way) -> None:
    assert way.lines_that_run <= MOST_THAT_RUN
    assert way.code <= MOST_IN_FILES


def test_the_run_goes_the_whole_way(way: Way) -> None:
    """The figures mean nothing if a stage was left out."""
    for path, name in (
        ("fxprune/tracing/trace.py", "trace"),
        ("passes/locate_layers.py", "LocateLayers.locate"),
        ("fxprune/slimming/builder.py", "GraphBuilder._projection"),
        ("fxprune/verification/reference.py", "without_units"),
    ):
        assert name in way.ran[path]


def test_functions_on_the_page_run(way: Way) -> None:
    named = walked(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 50
    wrong = [f"{name} in {path}" for name, path in named if name not in way.ran.get(path, {})]
    assert not wrong, f"architecture.md names what a plain Llama does not run: {wrong}"


def test_every_file_of_the_way_is_on_the_page(way: Way) -> None:
    linked = {path for _, path in page_links(PAGE.read_text(encoding="utf-8"))}
    assert not [path for path in way.ran if path not in linked]


def test_files_to_skip_are_not_entered(way: Way) -> None:
    paths = skipped(PAGE.read_text(encoding="utf-8"))
    assert len(paths) > 20
    assert not [path for path in paths if path in way.ran]


def test_links_of_the_page_exist() -> None:
    assert not [path for _, path in page_links(PAGE.read_text(encoding="utf-8")) if not (ROOT / path).exists()]


def test_figures_of_the_page_are_those_measured(way: Way) -> None:
    """The page may lag behind by a few lines, as long as it does not tell another story."""
    rows = re.findall(r"(?m)^\| (lines of code in|all lines).*\| ([\d,]+) \|$", PAGE.read_text(encoding="utf-8"))
    said = [int(figure.replace(",", "")) for _, figure in rows]
    measured = [way.lines_that_run, way.code, way.lines]
    assert len(said) == 3
    for text, true in zip(said, measured, strict=True):
        assert abs(text - true) <= 0.05 * true


@pytest.mark.parametrize(
    ("name", "path"),
    [("no_such_function", "fxprune/tracing/trace.py"), ("find_rms_norm", "fxprune/tracing/trace.py")],
)
def test_a_wrong_name_on_the_page_would_be_seen(way: Way, name: str, path: str) -> None:
    ((found, where),) = walked(f"[`{name}`](../{path})")
    assert found not in way.ran[where]


def test_code_lines_are_those_that_a_reader_reads() -> None:
    from benchmarks.way import code_lines

    text = '"""Doc."""\n\nimport os\n\n# why\nx = [\n    1,\n]\n\n\ndef f():\n    """Doc."""\n    return os  # why\n'
    assert sorted(code_lines(text)) == [6, 7, 8, 11, 13]
