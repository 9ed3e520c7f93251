"""Do zeros make ONNX Runtime faster? A dense model and its sparse form, exported and timed the same way.

    lifted graph ── ONNX ──┐
                           ├── interleaved runs ──► medians, confidence intervals
    sparse graph ── ONNX ──┘

The bound is the speed-up that counting predicts: 1, since the shapes are the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import PostconditionError, PreconditionError
from fxprune.core.pipeline import build_pass
from fxprune.measure.forms import cases_of, export_pair, measure_speed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxprune.core.program import Program
    from fxprune.measure.speed import SpeedResult

__all__ = ["SparseSpeed", "measure_sparse_speed", "zeros_of"]


@dataclass(frozen=True)
class SparseSpeed:
    """What the clock and the exported graph say.

    Attributes:
        results: one for each case, dense against sparse.
        zeros: zeros among the elements of the matrices in the exported sparse graph.
        elements: all elements of these matrices.
    """

    results: tuple[SpeedResult, ...]
    zeros: int
    elements: int

    def to_json(self) -> list[dict[str, Any]]:
        """The `speed` section of `report.json`; each entry says how many of the exported elements were zero."""
        share = self.zeros / self.elements
        return [result.to_json() | {"zeros_of_exported_matrices": share} for result in self.results]


def measure_sparse_speed(
    program: Program,
    *,
    threads: int,
    repeats: int = 20,
    prefills: Sequence[int] = (128,),
    decodes: int = 32,
    past: int = 128,
    progress: Callable[..., None] | None = None,
) -> SparseSpeed:
    """Export a program and its dense form to temporary directories, and time them in ONNX Runtime, runs interleaved.

    Args:
        program: a causal language model that a weight-pruning pass has pruned, on the CPU.
        threads: of ONNX Runtime.
        repeats: timed repeats of each form.
        prefills: lengths of prompts.
        decodes: tokens to decode; 0 for none.
        past: tokens before them.
        progress: as `fxprune.measure.speed.bench` calls it.

    Raises:
        PreconditionError: nothing was pruned weight by weight, or the program is not on the CPU.
        PostconditionError: the exported graph has fewer zeros than the masks ask for: not what was pruned is timed.
        ExportError: one of the forms cannot be exported.
        UsageError: a number is out of range.
    """
    if not program.weight_masks:
        raise PreconditionError("there are no zeros to time: run a weight-pruning pass first")
    device = next(program.graph_module.parameters()).device
    if device.type != "cpu":
        raise PreconditionError(f"ONNX Runtime is timed on the CPU, and the program is on {device}: load it there")
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        graph = Path(scratch) / "sparse" / "model.onnx"
        build_pass("export_onnx", {"out": str(graph.parent)})(program)
        zeros, elements = zeros_of(graph)
        asked = sum(mask.numel() - int(mask.sum()) for mask in program.weight_masks.values())
        if zeros < asked:
            raise PostconditionError(f"{asked} weights were set to zero, and the exported graph has {zeros} zeros")
        dense, sparse, dense_scratch = export_pair(program, threads, graph)
        with dense_scratch:
            cases = cases_of(prefills, decodes, past)
            results = measure_speed(dense, sparse, cases, threads=threads, repeats=repeats, progress=progress)
            del dense, sparse  # sessions hold the files that go now
    return SparseSpeed(tuple(results), zeros, elements)


def zeros_of(graph: Path) -> tuple[int, int]:
    """Zeros and elements of all matrices among the weights of an ONNX file."""
    import onnx  # noqa: PLC0415 - only exports need it
    from onnx import numpy_helper  # noqa: PLC0415

    zeros = elements = 0
    for tensor in onnx.load(str(graph)).graph.initializer:
        if len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            zeros += int((values == 0).sum())
            elements += values.size
    return zeros, elements
