"""What benchmarks share: options with the same meaning, conditions of a cell, spread over seeds, writing results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fxprune.core.output import write_json
from fxprune.models.default_model import default_model_path

__all__ = ["USUAL_SAMPLES", "add_leaderboard_options", "conditions", "make_parser", "spread", "write_results"]

RESULTS = Path("benchmarks/results")
USUAL_SAMPLES = 128


def make_parser(description: str | None, name: str, *, samples: int | None = None) -> argparse.ArgumentParser:
    """A parser with `--threads`, `--out` and, for benchmarks that calibrate, `--samples`.

    Args:
        description: the module's docstring.
        name: of the benchmark, and of its file of results.
        samples: calibration sequences by default; without calibration None.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    if samples is not None:
        parser.add_argument("--samples", type=int, default=samples, help="calibration sequences")
    return parser


def add_leaderboard_options(parser: argparse.ArgumentParser, methods: list[str], out: Path, rows: str) -> None:
    """Options that leaderboards share: model, data, methods, seeds, sizes, and what `conditions` reads.

    Args:
        parser: gets them.
        methods: that there are.
        out: the file of results by default.
        rows: what `--rows` are of.
    """
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="hub id or directory; the embedded default by default")
    parser.add_argument("--method", nargs="+", default=methods, choices=methods)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=USUAL_SAMPLES)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--rows", type=int, default=400, help=rows)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", default="{}", help="further options of the pass, as JSON")
    parser.add_argument("--valid", action="store_true", help="perplexity on wiki.valid.raw: for choosing options")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--plain", action="store_true", help="only print the table of what was measured")
    parser.add_argument("--cell", help=argparse.SUPPRESS)


def write_results(out: Path, result: dict[str, Any], *, quiet: bool = False) -> None:
    """Write the results, and print all but the machine's description."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    if not quiet:
        print({key: value for key, value in result.items() if key != "machine"})


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a cell that was measured earlier to count."""
    return {
        "model": Path(arguments.model or default_model_path()).name,
        "text": "wiki.valid.raw" if arguments.valid else "wiki.test.raw",
        "samples": arguments.samples,
        "windows": arguments.windows,
        "rows": arguments.rows,
        "options": json.loads(arguments.options),
    }


def spread(values: list[float], form: str) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    if not values:
        return "-"
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
