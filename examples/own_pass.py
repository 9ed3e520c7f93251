"""A pass of one's own: prune MLP channels by the norm of the weights that read them.

python examples/own_pass.py [MODEL]
"""

from __future__ import annotations

import sys

import fxprune
from fxprune import Pass, PassResult, Pipeline, Plan, PreconditionError, Program
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import build_pass
from fxprune.models.default_model import default_model_path


class NormPrune(Pass):
    """Keep the MLP channels whose down projection has the largest norm."""

    name = "norm"

    def __init__(self, *, keep: float = 0.75) -> None:
        self.keep = keep

    def requires(self, program: Program) -> None:
        """MLPs have been located."""
        if not any(group.kind == "mlp" for group in program.groups):
            raise PreconditionError("norm prunes MLP channels: run locate_mlp first")

    def call(self, program: Program) -> PassResult:
        """Score every channel and keep the best, a multiple of 8."""
        kept = {}
        for group in program.groups:
            if group.kind == "mlp":
                reader = group.consumers[0]
                weight = program.graph_module.get_parameter(reader.parameter).detach()
                scores = weight.norm(dim=0)[reader.indices[:, 0]]
                width = max(8, int(group.units * self.keep) // 8 * 8)
                kept[group.name] = scores.topk(width).indices.tolist()
        return PassResult(program.replace(plan=Plan.of(kept)), modified=True)


if __name__ == "__main__":
    loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else str(default_model_path()))
    steps = [build_pass(name, {}) for name in ("lift_linears", "locate_mlp")]
    steps += [NormPrune(keep=0.75), *(build_pass(name, {}) for name in ("insert_masks", "slim"))]
    program = Pipeline([*steps, build_pass("verify", {"reexport": False})])(fxprune.trace(loaded.model)).program
    for rung in program.results["verify"]:
        print(f"{rung['rung']}: max abs error {rung['max_abs_error']:.1e}")
