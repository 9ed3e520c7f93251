"""The calibration engine: it collects what the whole graph would have shown, and new weights are seen at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fxprune.calibration.activation_store import ActivationStore
from fxprune.calibration.engine import CalibrationEngine, EngineOptions, Samples, text_samples
from fxprune.calibration.stages import cut_stages
from fxprune.core.errors import CalibrationError, PreconditionError
from fxprune.runtimes.matmul import fast_products
from fxprune.tracing.grouped import GroupedLinear
from fxprune.tracing.lifted import is_projection
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute
from tests.zoo import located

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.calibration.engine import SiteStatistics
    from fxprune.calibration.stages import Cut, Stage
    from fxprune.core.program import Program

FAMILIES = ["llama", "gptj", "falcon (multi-query)", "gpt2", "gemma3", "mixtral", "gpt_oss", "bert", "t5"]


def projections(graph_module: GraphModule) -> list[str]:
    return [name for name, module in graph_module.named_modules() if is_projection(module)]


def samples_for(program: Program, count: int = 5, length: int = 7) -> Samples:
    tokens = torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(0))
    return text_samples(program.interface, tokens)


def cut_of(program: Program, targets: Sequence[str] | None = None, **options: Any) -> Cut:
    names = targets or projections(program.graph_module)
    return cut_stages(program.graph_module, names, samples_for(program).varying, **options)


def seen_by_hooks(program: Program, samples: Samples) -> dict[str, list[Tensor]]:
    """XᵀX of every projection's input in one ordinary run, per expert."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name in projections(program.graph_module):
        module = get_attribute(program.graph_module, name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            ends = args[1].tolist() if isinstance(module, GroupedLinear) else [len(rows)]
            begins = [0, *ends[:-1]]
            found[name] = [rows[b:e].t() @ rows[b:e] for b, e in zip(begins, ends, strict=True)]

        hooks.append(module.register_forward_pre_hook(hook))
    given = {**samples.varying, **samples.fixed(samples.count)}
    with torch.no_grad():
        program.graph_module(*(given[name] for name in program.interface.inputs))
    for handle in hooks:
        handle.remove()
    return found


def collected(cut: Cut, samples: Samples, **options: Any) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def keep(stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        del stage
        for one in statistics:
            for linear in one.site.linears:
                assert linear not in found
                found[linear] = [torch.zeros(()) if gram is None else gram.matrix for gram in one.grams]

    CalibrationEngine(cut, samples, EngineOptions(**options)).run(keep)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_whole_graph(name: str) -> None:
    program = located(name)
    samples = samples_for(program)
    expected = seen_by_hooks(program, samples)
    found = collected(cut_of(program), samples, batch_size=2)
    assert set(found) == set(expected)
    for linear, grams in found.items():
        assert len(grams) == len(expected[linear])
        for gram, truth in zip(grams, expected[linear], strict=True):
            torch.testing.assert_close(
                gram.double().expand_as(truth), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()) + 1e-6
            )


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("name", ["llama", "gptj", "mixtral"])
def test_whole_blocks_give_the_same_statistics(name: str, replay: bool) -> None:
    program = located(name)
    samples = samples_for(program)
    expected = seen_by_hooks(program, samples)
    found = collected(cut_of(program, true_sequential=False, replay=replay), samples, batch_size=2)
    assert set(found) == set(expected)
    for linear, grams in found.items():
        for gram, truth in zip(grams, expected[linear], strict=True):
            torch.testing.assert_close(
                gram.double().expand_as(truth), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()) + 1e-6
            )


def test_one_gram_serves_all_readers_and_parallel_blocks_share_a_stage() -> None:
    cut = cut_of(located("llama"))
    linears = [site.linears for stage in cut.stages for site in stage.sites]
    assert [len(names) for names in linears[:4]] == [3, 1, 2, 1]
    assert cut.period == 4
    assert cut.blocks[:2] == ("model.layers.0", "model.layers.1")
    parallel = cut_of(located("gptj"))
    assert parallel.period == 2
    assert len(parallel.stages[0].sites[0].linears) == 4  # q, k, v and fc_in read the same norm


def test_between_blocks_only_the_residual_stream_is_kept() -> None:
    program = located("llama")
    cut = cut_of(program)
    kept: set[str] = set()
    sizes = []
    for stage in cut.stages:
        kept = (kept - set(stage.drops)) | set(stage.outputs)
        sizes.append(len(kept))
    assert max(sizes) == 2  # the stream, and what attention or the activation hands to the last projection
    assert sizes[4] == sizes[8] == 1


def with_own_weights(program: Program) -> Program:
    """The program with projections that may be changed."""
    names = projections(program.graph_module)
    graph_module = own_projections(program.graph_module, names)
    for name in names:
        module = get_attribute(graph_module, name)
        module.weight = nn.Parameter(module.weight.detach().clone())
    return program.replace(graph_module=graph_module)


@pytest.mark.parametrize(("mode", "pruned"), [("sequential", True), ("replay", True), ("dense", False)])
def test_later_projections_see_the_new_weights(mode: str, pruned: bool) -> None:
    """Values of the first block are set to zero: what the second block reads must change, or not with dense inputs."""
    program = with_own_weights(located("llama"))
    samples = samples_for(program)
    dense = seen_by_hooks(program, samples)
    cut = cut_of(program, true_sequential=mode == "sequential", replay=mode == "replay")
    found: dict[str, Tensor] = {}

    def solve(stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        del stage
        for one in statistics:
            for linear in one.site.linears:
                gram = one.grams[0]
                assert gram is not None
                found[linear] = gram.matrix
                if linear == "model.layers.0.self_attn.v_proj":
                    get_attribute(program.graph_module, linear).weight.data.zero_()

    CalibrationEngine(cut, samples, EngineOptions(batch_size=2)).run(solve)
    assert bool(found["model.layers.0.self_attn.o_proj"].eq(0).all()) == (mode == "sequential")
    later = "model.layers.1.self_attn.q_proj"
    same = torch.allclose(found[later].double(), dense[later][0], rtol=1e-4)
    assert same != pruned
    if pruned:
        torch.testing.assert_close(
            found[later].double(), seen_by_hooks(program, samples)[later][0], rtol=1e-4, atol=1e-4
        )


def test_spilled_and_kept_activations_are_the_same(tmp_path: Any) -> None:
    program = located("llama")
    samples = samples_for(program)
    kept = collected(cut_of(program), samples, batch_size=2)
    spilled = collected(cut_of(program), samples, batch_size=2, memory_bytes=0, spill_directory=tmp_path)
    for linear, grams in kept.items():
        assert torch.equal(grams[0], spilled[linear][0])
    assert not list(tmp_path.iterdir())


def test_bfloat16_forward_collects_what_the_rounded_projection_reads() -> None:
    program = located("llama")
    samples = samples_for(program)
    exact = collected(cut_of(program), samples, batch_size=5)
    rounded = collected(cut_of(program), samples, batch_size=5, forward_dtype=torch.bfloat16)
    for linear, grams in exact.items():
        error = float((grams[0] - rounded[linear][0]).norm() / grams[0].norm())
        assert 0 < error < 0.05


def test_batch_size_follows_the_budget() -> None:
    program = located("llama")
    samples = samples_for(program)
    large = CalibrationEngine(cut_of(program), samples)
    large.run(lambda *_: None)
    small = CalibrationEngine(cut_of(program), samples, EngineOptions(work_bytes=1))
    small.run(lambda *_: None)
    assert (large.batch_size, small.batch_size) == (5, 1)


def test_values_that_are_not_finite_are_named() -> None:
    program = with_own_weights(located("llama"))
    weight = get_attribute(program.graph_module, "model.layers.0.self_attn.v_proj").weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.self_attn\.o_proj read NaN"):
        collected(cut_of(program), samples_for(program))


def test_text_cannot_feed_pixels() -> None:
    with pytest.raises(PreconditionError, match="pixel_values"):
        text_samples(located("vit").interface, torch.zeros(1, 4, dtype=torch.long))


def test_a_target_that_is_not_in_the_graph() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        cut_of(located("llama"), ["nowhere"])


def test_store_keeps_budgets_and_forgets(tmp_path: Any) -> None:
    with ActivationStore(2, memory_budget=64, directory=tmp_path) as store:
        for batch in range(2):
            store.put("small", batch, torch.full((4,), float(batch)))  # 32 bytes in all
            store.put("large", batch, torch.full((2, 4), float(batch), dtype=torch.bfloat16) + 1)  # 32 more
            store.put("spilled", batch, torch.full((4,), batch + 2))
            store.put("length", batch, 7)
        assert store.used == {"device": 0, "memory": 64, "file": 64}
        assert store.get("spilled", 1).tolist() == [3, 3, 3, 3]
        assert store.get("large", 1).dtype is torch.bfloat16
        assert store.get("length", 0) == 7
        store.drop(["small", "unknown"], 0)
        store.drop(["small"], 1)
        assert "small" not in store.names()
        assert store.used["memory"] == 32
    assert not list(tmp_path.iterdir())


def test_fast_products_keep_float32_accuracy() -> None:
    one, other = torch.randn(300, 200), torch.randn(200, 100)
    flags: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = flags.fp32_precision
    with fast_products():
        error = (one @ other - (one.double() @ other.double()).float()).abs().max()
    assert float(error) < 1e-3
    assert flags.fp32_precision == before


@pytest.mark.parametrize("name", ["gptj", "mixtral", "vit", "t5", "baichuan (W_pack, ALiBi)"])
def test_every_projection_is_solved_once(name: str) -> None:
    program = located(name)
    varying = [n for n in program.interface.inputs if n in {"input_ids", "pixel_values", "decoder_input_ids"}]
    cut = cut_stages(program.graph_module, projections(program.graph_module), varying)
    solved = [linear for stage in cut.stages for site in stage.sites for linear in site.linears]
    assert sorted(solved) == sorted(projections(program.graph_module))
