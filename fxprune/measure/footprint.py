"""What a form costs to have: bytes of its files, seconds to load it, peak memory of a process that runs it alone.

Memory and load time are taken in a process of their own (`python -m fxprune.measure.footprint`), because two forms in
one process share its libraries, its allocator and its peak. Files that were read before come from the system's cache:
the seconds are those of a warm start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from fxprune.core.errors import ExportError
from fxprune.core.machine import file_size, peak_rss_bytes
from fxprune.core.registry import resolve
from fxprune.measure.speed import Case, run_once, torch_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Footprint", "form_bytes", "measure_footprint"]


@dataclass(frozen=True)
class Footprint:
    """What a form costs to have, in one runtime.

    Attributes:
        runtime: see `fxprune.measure.opening.RUNTIMES`.
        threads: of the runtime.
        file_bytes: of its weights on disk.
        load_seconds: wall time to load it, the runtime's own libraries imported before.
        base_rss_bytes: resident memory before loading, libraries included.
        peak_rss_bytes: the most resident memory while it was loaded and ran every case once; compilation included.
    """

    runtime: str
    threads: int
    file_bytes: int
    load_seconds: float
    base_rss_bytes: int
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def form_bytes(path: Path) -> int:
    """Bytes of a form's weights: of a checkpoint's safetensors files, or of an ONNX graph with its external data."""
    graph = path if path.is_file() else path / "model.onnx"
    files = [] if path.is_file() else list(path.glob("*.safetensors"))
    if not files:
        weights = resolve("fxprune.exporters.onnx_files:check_external_data")(graph)
        files = [graph, *(graph.parent / name for name in weights)]
    return sum(file_size(file) for file in files)


def measure_footprint(
    path: Path, runtime: str, cases: Sequence[Case], *, threads: int, dtype: str | None = None
) -> Footprint:
    """Load a form in a fresh process, run the cases once, and report.

    Args:
        path: a local checkpoint, ONNX directory or ONNX file.
        runtime: see `fxprune.measure.opening.RUNTIMES`.
        cases: what to run.
        threads: of the runtime.
        dtype: precision of a checkpoint; as saved when None.

    Raises:
        ExportError: the process failed; the message ends with its last words.
    """
    order = {
        "path": str(path),
        "runtime": runtime,
        "threads": threads,
        "dtype": dtype,
        "cases": [asdict(case) for case in cases],
    }
    done = subprocess.run(  # this very interpreter and module
        [
            sys.executable,
            "-P",
            "-m",
            "fxprune.measure.footprint",
        ],  # -P: no module is imported from the working directory
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, perhaps out of memory"]
        raise ExportError(f"the memory of {path} in {runtime} could not be measured: {words[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Footprint(runtime, threads, form_bytes(path), **found)


def _main() -> None:
    """The other process: an order on standard input, figures on the last line of standard output."""
    from fxprune.measure.opening import open_in  # noqa: PLC0415 - the runtimes' users import this module

    order = json.load(sys.stdin)
    if order["runtime"] in {"onnxruntime", "genai"}:
        import onnxruntime  # noqa: F401, PLC0415 - imported before the clock starts
    if order["runtime"] == "genai":
        import onnxruntime_genai  # noqa: F401, PLC0415 - as above
    else:
        import transformers.models.auto.modeling_auto  # noqa: F401, PLC0415 - as above
    base = psutil.Process().memory_info().rss
    start = time.perf_counter()
    form = open_in(order["path"], order["runtime"], threads=order["threads"], dtype=order["dtype"])
    seconds = time.perf_counter() - start
    with torch_threads(order["threads"]):
        for case in order["cases"]:
            run_once(form.runner, Case(**case))
    found = {"load_seconds": seconds, "base_rss_bytes": base, "peak_rss_bytes": peak_rss_bytes()}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    _main()
