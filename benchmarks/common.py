"""What the command lines of benchmarks share: options with the same meaning, and how results are written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxprune.output import write_json

__all__ = ["make_parser", "write_results"]

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
