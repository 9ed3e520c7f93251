"""The mutation check: break every rule and rewrite on purpose, and see a test fail.

    python -m benchmarks.mutations [--only WORD ...] [--out JSON]

Each mutation replaces one piece of source text in a temporary copy of the package; the named tests run against the
copy in a process of their own. A mutation that no test notices has survived: the exit status is 1, and what is missing
is a test. The unmutated copy runs first, since tests that fail anyway prove nothing. With `--only` the other mutations
keep their records in the file; what is not on the list any more leaves it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.mutation_list import MUTATIONS, Mutation
from fxprune.core.output import write_json

__all__ = ["check", "mutated"]

ROOT = Path(__file__).resolve().parents[1]


def copy_package(target: Path) -> None:
    """Lay the package out as the wheel has it, with the tests beside it."""
    for source, inside in (("fxprune", "fxprune"), ("passes", "fxprune/passes"), ("exporters", "fxprune/exporters")):
        shutil.copytree(ROOT / source, target / inside, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__", "e2e"))
    shutil.copy(ROOT / "pyproject.toml", target)


def place(mutation: Mutation, target: Path) -> Path:
    """Where a mutation's file is in the copy."""
    folder, _, rest = mutation.path.partition("/")
    return target / ("fxprune" if folder == "fxprune" else f"fxprune/{folder}") / rest


def mutated(mutation: Mutation) -> str:
    """The broken source.

    Raises:
        ValueError: the text to be replaced is not in the file exactly once.
    """
    source = (ROOT / mutation.path).read_text()
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.path} has {source.count(mutation.old)} times {mutation.old!r} ({mutation.what})")
    changed = source.replace(mutation.old, mutation.new)
    compile(changed, mutation.path, "exec")
    return changed


def run_tests(target: Path, tests: tuple[str, ...]) -> tuple[str | None, float]:
    """Run test files against the copy; returns the first test that failed, None when all pass, and the seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.perf_counter()
    result = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if result.returncode == 0:
        return None, seconds
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", result.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(
            f"pytest stopped with status {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
        )
    return failed[1], seconds


def check(mutations: tuple[Mutation, ...]) -> list[dict[str, Any]]:
    """Run every mutation; one record each."""
    sources = [mutated(mutation) for mutation in mutations]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy_package(target)
        every = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        failed, seconds = run_tests(target, every)
        if failed is not None:
            raise RuntimeError(f"{failed} fails without any mutation")
        print(f"{len(every)} test files pass without a mutation, {seconds:.0f} s", flush=True)
        for number, (mutation, source) in enumerate(zip(mutations, sources, strict=True), start=1):
            path = place(mutation, target)
            intact = path.read_text()
            path.write_text(source)
            try:
                failed, seconds = run_tests(target, mutation.tests)
            finally:
                path.write_text(intact)
            record = {"what": mutation.what, "file": mutation.path, "killed_by": failed, "seconds": round(seconds, 1)}
            records.append(record)
            verdict = failed or "SURVIVED"
            print(f"| {number} | {mutation.what} | {mutation.path} | {verdict} | {seconds:.0f} s |", flush=True)
    return records


def merged(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New records in place of those known of the same mutations, in the order of the list."""
    of = {(record["file"], record["what"]): record for record in (*known, *new)}
    return [of[mutation.path, mutation.what] for mutation in MUTATIONS if (mutation.path, mutation.what) in of]


def main() -> int:
    """Run the check; 1 when a mutation survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="only mutations whose words or file contain one of these")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mutations.json")
    arguments = parser.parse_args()
    chosen = tuple(
        mutation
        for mutation in MUTATIONS
        if not arguments.only or any(word in f"{mutation.path} {mutation.what}" for word in arguments.only)
    )
    records = check(chosen)
    survivors = [record["what"] for record in records if record["killed_by"] is None]
    print(f"{len(records) - len(survivors)} of {len(records)} mutations killed")
    for what in survivors:
        print(f"SURVIVED: {what}")
    known = json.loads(arguments.out.read_text())["mutations"] if arguments.only and arguments.out.exists() else []
    every = merged(known, records)
    killed = sum(record["killed_by"] is not None for record in every)
    write_json(arguments.out, {"mutations": every, "killed": killed, "of": len(every)})
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
