"""Do zeros make ONNX Runtime faster? A dense model and its magnitude-pruned form, exported and timed the same way.

    python -m benchmarks.sparse_speed [--model DIR] [--sparsity 0.5] [--threads 2] [--repeats 20] [--out JSON]

Runs alternate between the two forms. The bound is the speed-up that counting predicts: 1, since the shapes are the
same. What is timed is checked first: the share of zeros is counted in the exported graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import make_parser, write_results
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import build_pass
from fxprune.measure.sparse_speed import measure_sparse_speed
from fxprune.measure.speed import machine
from fxprune.models.default_model import default_model_path
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    import argparse

PREFILLS, DECODES, PAST = (128,), 32, 128


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, export both forms, and time them."""
    loaded = load_model(arguments.model or str(default_model_path()))
    program = trace(loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, path=loaded.path)
    for name, options in (("lift_linears", {}), ("magnitude", {"sparsity": arguments.sparsity})):
        program = build_pass(name, options)(program).program
    sparsity = program.results["sparsity"]
    found = measure_sparse_speed(
        program,
        threads=arguments.threads,
        repeats=arguments.repeats,
        prefills=arguments.prefill,
        decodes=arguments.decode,
        past=arguments.past,
    )
    return {
        "model": Path(loaded.name).name,
        "method": sparsity["method"],
        "target": sparsity["target"],
        "removed_share": sparsity["removed_share"],
        "exported_matrices": {"zeros": found.zeros, "elements": found.elements},
        "speed": [result.to_json() for result in found.results],
        "machine": machine(),
    }


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = make_parser(__doc__, "sparse_speed")
    parser.add_argument("--model", help="hub id or directory; the embedded default by default")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prefill", type=int, nargs="*", default=list(PREFILLS), help="prompt lengths")
    parser.add_argument("--decode", type=int, default=DECODES, help="tokens that are decoded")
    parser.add_argument("--past", type=int, default=PAST, help="tokens before them")
    arguments = parser.parse_args()
    found = measure(arguments)
    share = found["exported_matrices"]["zeros"] / found["exported_matrices"]["elements"]
    cases = "; ".join(
        f"{entry['case']} {entry['dense_ms']:.1f} ms dense, {entry['slim_ms']:.1f} ms with zeros, "
        f"{entry['speedup']:.2f} times as fast ({entry['ci'][0]:.2f} to {entry['ci'][1]:.2f})"
        for entry in found["speed"]
    )
    print(f"{found['model']}, {share:.0%} of the exported matrices' elements are zero, ONNX Runtime: {cases}")
    write_results(arguments.out, found, quiet=True)


if __name__ == "__main__":
    main()
