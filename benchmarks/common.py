"""What benchmarks share: options with the same meaning, conditions of a cell, spread over seeds, writing results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fxprune.default_model import default_model_path
from fxprune.output import write_json

__all__ = ["conditions", "make_parser", "spread", "write_results"]

RESULTS = Path("benchmarks/results")


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
