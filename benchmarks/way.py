"""The way of a model: which code a plain Llama runs from `trace` to `verify`, measured with coverage of one prune run.

    python -m benchmarks.way            # a table of files: lines of code, and what of it ran
    python -m benchmarks.way --left     # and the functions of these files that did not run

The run is `trace`, the front end's passes, `magnitude-units`, `insert_masks`, `slim` and `verify` on a Llama of two
layers. A file is on the way when the run enters one of its functions: importing it, or making its classes, does not
count. While the method runs that chooses the units, nothing is measured: each has a page of its own. Code lines are
physical lines without blank lines, comments, docstrings, imports and `__all__`. All rooms count that a model passes in
between (`ROOMS`).
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import coverage

if TYPE_CHECKING:
    from fxprune.core.pass_base import Pass

__all__ = ["ROOMS", "Visited", "code_lines", "walk_the_way"]

_ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fxprune/core", "fxprune/tracing", "fxprune/channels", "fxprune/slimming", "fxprune/verification")
_PASSES = ("lift_linears", "locate_*", "insert_masks", "slim", "verify")
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Visited:
    """A file that the run enters.

    Attributes:
        path: from the root of the repository.
        lines: all its lines.
        code: its code lines.
        ran: functions that ran, by qualified name inside the file (`GraphBuilder.visit`), with their code lines.
        left: functions that did not.
    """

    path: str
    lines: int
    code: int
    ran: dict[str, int]
    left: dict[str, int]


def code_lines(text: str) -> set[int]:
    """Numbers of the code lines of a Python file (see the module's docstring)."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if _is_apparatus(node):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
    return found


def _is_apparatus(node: ast.AST) -> bool:
    """Whether a statement is one that a reader skips: an import, `__all__`, or a string that documents."""
    if isinstance(node, ast.Expr):  # a string that stands alone documents what is before it or around it
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id
    return named == "__all__" or isinstance(node, (ast.Import, ast.ImportFrom))


def _functions(tree: ast.AST, prefix: str = "") -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file by qualified name; a function inside another one belongs to it."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found[f"{prefix}{node.name}"] = node
        elif isinstance(node, ast.ClassDef):
            found |= _functions(node, f"{prefix}{node.name}.")
        else:
            found |= _functions(node, prefix)
    return found


def _visited(path: Path, ran: set[int]) -> Visited | None:
    """A file, by the lines of it that ran; None when no function of it did."""
    text = path.read_text(encoding="utf-8")
    code = code_lines(text)
    entered: dict[str, int] = {}
    left: dict[str, int] = {}
    for name, node in _functions(ast.parse(text)).items():
        body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        size = len(code & set(range(node.lineno, body.stop)))
        (entered if ran & code & set(body) else left)[name] = size
    if not entered:
        return None
    return Visited(str(path.relative_to(_ROOT)), text.count("\n"), len(code), entered, left)


def _prune(measured: coverage.Coverage) -> None:
    """Prune a Llama of two layers, from `trace` to `verify`; the method that chooses the units is not measured."""
    import torch  # noqa: PLC0415 - the measurement starts before the libraries are there
    import transformers  # noqa: PLC0415

    from fxprune.channels.front_end import located  # noqa: PLC0415
    from fxprune.core.pipeline import Pipeline, build_pass  # noqa: PLC0415
    from fxprune.tracing.trace import trace  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    program = located(trace(transformers.LlamaForCausalLM(config).eval()))
    steps = [
        build_pass("magnitude-units", {"ratio": 0.3}),
        *(build_pass(n, {}) for n in ("insert_masks", "slim", "verify")),
    ]
    pruning = False

    def pause(step: Pass) -> None:
        nonlocal pruning
        if step.prunes:
            measured.stop()
        elif pruning:
            measured.start()
        pruning = step.prunes

    Pipeline(steps, on_pass=pause)(program)


def walk_the_way() -> list[Visited]:
    """Prune, and say which files the run enters, in the order of the rooms."""
    measured = coverage.Coverage(
        data_file=None, config_file=False, include=[f"{_ROOT}/fxprune/*", f"{_ROOT}/passes/*"], messages=False
    )
    measured.start()
    try:
        _prune(measured)
    finally:
        measured.stop()
    data = measured.get_data()
    paths = [path for room in ROOMS for path in sorted((_ROOT / room).rglob("*.py"))]
    paths += [path for name in _PASSES for path in sorted((_ROOT / "passes").glob(f"{name}.py"))]
    found = (_visited(path, set(data.lines(str(path)) or ())) for path in paths)
    return [visited for visited in found if visited is not None]


def main() -> None:
    """Print what a plain Llama runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--left", action="store_true", help="name the functions that did not run")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    way = walk_the_way()
    print(f"{'file':44} {'lines':>6} {'code':>6} {'ran':>6} {'left':>6}")
    for visited in way:
        ran, left = sum(visited.ran.values()), sum(visited.left.values())
        print(f"{visited.path:44} {visited.lines:6} {visited.code:6} {ran:6} {left:6}")
        if options.left and visited.left:
            print("    " + ", ".join(f"{name} {size}" for name, size in visited.left.items()))
    lines, code = sum(v.lines for v in way), sum(v.code for v in way)
    ran, left = sum(sum(v.ran.values()) for v in way), sum(sum(v.left.values()) for v in way)
    print(f"{f'{len(way)} files':44} {lines:6} {code:6} {ran:6} {left:6}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(visited) for visited in way], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
