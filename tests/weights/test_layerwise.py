"""Layer-wise solving: experts that borrow, the dense path beside the pruned one, and what is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fxprune.calibration.engine import CalibrationEngine, EngineOptions, SiteStatistics
from fxprune.calibration.gram import Gram, gram_of
from fxprune.calibration.stages import InputSite
from fxprune.passes.magnitude import MagnitudeSolver
from fxprune.runtimes.matmul import product_rate
from fxprune.tracing.nodes import get_attribute
from fxprune.weights.layerwise import LayerwiseSolver
from fxprune.weights.sparsity import Sparsity
from tests.calibration.test_engine import cut_of, samples_for, with_own_weights
from tests.zoo import located

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.calibration.stages import Stage


def test_the_dense_path_runs_beside_the_pruned_one() -> None:
    dense = located("llama")
    program = with_own_weights(dense)
    samples = samples_for(program)
    found: dict[str, SiteStatistics] = {}

    def solve(stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        del stage
        for one in statistics:
            for name in one.site.linears:
                found[name] = one
                if name == "model.layers.0.self_attn.v_proj":
                    get_attribute(program.graph_module, name).weight.data.mul_(2)

    engine = CalibrationEngine(cut_of(program), samples, EngineOptions(batch_size=2), dense=cut_of(dense))
    engine.run(solve)
    first, output = found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.o_proj"]
    for one, factor in ((first, 1.0), (output, 0.5)):  # what o_proj reads is twice the dense model's
        assert one.cross is not None
        assert one.grams[0] is not None
        torch.testing.assert_close(one.cross, factor * one.grams[0].matrix, rtol=1e-4, atol=1e-4)


def test_experts_with_few_tokens_borrow_from_all() -> None:
    program = with_own_weights(located("mixtral"))
    name = next(n for n, m in program.graph_module.named_modules() if type(m).__name__ == "GroupedLinear")
    module = get_attribute(program.graph_module, name)
    rows = torch.randn(3 * module.in_features, module.in_features, generator=torch.Generator().manual_seed(0))
    grams: list[Gram | None] = [gram_of(rows) for _ in range(module.experts)]
    grams[0], grams[1] = None, gram_of(rows[:2])
    layers = LayerwiseSolver(program.graph_module, MagnitudeSolver(), {name: Sparsity(0.5)})
    layers(None, [SiteStatistics(InputSite("x", "o", (name,), 0), tuple(grams))])  # type: ignore[arg-type]
    figures = layers.figures[name]
    assert figures.notes["experts_with_few_tokens"] == [0, 1]
    assert figures.tokens == 0
    assert figures.error < 1  # measured on what was borrowed, too
    zeros = (module.weight == 0).flatten(1).float().mean(1)
    torch.testing.assert_close(zeros, torch.full_like(zeros, 0.5), rtol=0, atol=0.01)


def test_operations_are_counted() -> None:
    linear = nn.Linear(12, 5, bias=False)
    root = nn.Module()
    root.linear = linear
    layers = LayerwiseSolver(root, MagnitudeSolver(), {"linear": Sparsity(0.5)})  # type: ignore[arg-type]
    site = InputSite("x", None, ("linear",), 0)
    layers(None, [SiteStatistics(site, (gram_of(torch.randn(100, 12)),))])  # type: ignore[arg-type]
    assert layers.flop == {"forward": 2 * 12 * 5 * 100, "gram": 12 * 12 * 100}
    assert product_rate(torch.float32, size=64) > 0
