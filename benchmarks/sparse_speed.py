"""Do zeros make ONNX Runtime faster? A dense model and its magnitude-pruned form, exported and timed the same way.

    python -m benchmarks.sparse_speed [--model DIR] [--sparsity 0.5] [--threads 2] [--repeats 20] [--out JSON]

Runs alternate between the two forms. The bound is the speed-up that counting predicts: 1, since the shapes are the
same. What is timed is checked first: the share of zeros is counted in the exported graph.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from fxprune.default_model import default_model_path
from fxprune.loading import load_model
from fxprune.measure import machine
from fxprune.output import write_json
from fxprune.pipeline import build_pass
from fxprune.tracing import trace
from fxprune.workflow import cases_of, export_pair, measure_speed

PREFILLS, DECODES, PAST = (128,), 32, 128


def zeros_of(graph: Path) -> dict[str, int]:
    """Zeros and elements of all matrices among an exported graph's weights."""
    counts = {"zeros": 0, "elements": 0}
    for tensor in onnx.load(str(graph)).graph.initializer:
        if len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            counts["zeros"] += int((values == 0).sum())
            counts["elements"] += values.size
    return counts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, export both forms, and time them."""
    loaded = load_model(arguments.model or str(default_model_path()))
    program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path)
    for name, options in (("lift_linears", {}), ("magnitude", {"sparsity": arguments.sparsity})):
        program = build_pass(name, options)(program).program
    sparsity = program.results["sparsity"]
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        out = Path(scratch) / "sparse"
        program = build_pass("export_onnx", {"out": str(out)})(program).program
        counts = zeros_of(out / "model.onnx")
        dense, sparse, dense_scratch = export_pair(program, arguments.threads, out / "model.onnx")
        cases = cases_of(arguments.prefill, arguments.decode, arguments.past)
        with dense_scratch:
            results = measure_speed(dense, sparse, cases, threads=arguments.threads, repeats=arguments.repeats)
            del dense, sparse
    return {
        "model": Path(loaded.name).name,
        "method": sparsity["method"],
        "target": sparsity["target"],
        "removed_share": sparsity["removed_share"],
        "exported_matrices": counts,
        "speed": [result.to_json() for result in results],
        "machine": machine(),
    }


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or directory; the embedded default by default")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prefill", type=int, nargs="*", default=list(PREFILLS), help="prompt lengths")
    parser.add_argument("--decode", type=int, default=DECODES, help="tokens that are decoded")
    parser.add_argument("--past", type=int, default=PAST, help="tokens before them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparse_speed.json"))
    arguments = parser.parse_args()
    found = measure(arguments)
    share = found["exported_matrices"]["zeros"] / found["exported_matrices"]["elements"]
    cases = "; ".join(
        f"{entry['case']} {entry['dense_ms']:.1f} ms dense, {entry['slim_ms']:.1f} ms with zeros, "
        f"{entry['speedup']:.2f} times as fast ({entry['ci'][0]:.2f} to {entry['ci'][1]:.2f})"
        for entry in found["speed"]
    )
    print(f"{found['model']}, {share:.0%} of the exported matrices' elements are zero, ONNX Runtime: {cases}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
