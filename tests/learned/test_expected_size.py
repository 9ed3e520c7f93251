"""Expected sizes: against counting over all gate patterns, finite differences, and accounting."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.channels.accounting import count_parameters, macs_per_token
from fxprune.core.errors import PlanError, PreconditionError
from fxprune.core.groups import AttentionGroup, HiddenGroup, LayerGroup, UnitSlice
from fxprune.core.pipeline import Pipeline
from fxprune.core.plan import Plan
from fxprune.learned.expected_size import ExpectedLatency, ExpectedSize, OpenUnits, expected_removed, independent_units
from fxprune.measure.latency_table import CaseLatency, Identity, LatencyTable, Surface, Width, block_shape, dense_width
from fxprune.measure.speed import decode, prefill
from fxprune.passes.locate_hidden import LocateHidden
from fxprune.passes.locate_layers import LocateLayers
from fxprune.structured.targets import cost_model
from tests.families import kept_positions, located

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from fxprune.core.groups import Group
    from fxprune.core.program import Program


def probabilities(groups: Sequence[Group], free: int, seed: int = 0) -> dict[str, Tensor]:
    """Per group some units that are undecided, the others open or closed for certain."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        p = (torch.rand(group.units, generator=generator, dtype=torch.float64) < 0.8).double()
        chosen = torch.randperm(group.units, generator=generator)[:free]
        p[chosen] = torch.rand(len(chosen), generator=generator, dtype=torch.float64)
        found[group.name] = p
    return found


def patterns(p: Tensor) -> Iterator[tuple[float, list[int]]]:
    """Every set of open units that is possible, with its probability."""
    undecided = [i for i, value in enumerate(p.tolist()) if 0 < value < 1]
    certain = [i for i, value in enumerate(p.tolist()) if value == 1]
    for choice in itertools.product((False, True), repeat=len(undecided)):
        chance = 1.0
        for unit, is_open in zip(undecided, choice, strict=True):
            chance *= float(p[unit] if is_open else 1 - p[unit])
        yield chance, sorted([*certain, *(u for u, is_open in zip(undecided, choice, strict=True) if is_open)])


def opened(groups: Sequence[Group], p: Mapping[str, Tensor]) -> dict[str, OpenUnits]:
    return {group.name: independent_units(group, p[group.name]) for group in groups}


def with_everything() -> Program:
    """A tiny tied Llama with heads, channels, hidden channels and layers located."""
    program = located("llama", tie_word_embeddings=True)
    return Pipeline([LocateHidden(), LocateLayers()])(program).program


def count(program: Program, kept: Mapping[str, list[int]], measure: str) -> int:
    """Elements that stay, counted tensor by tensor from the groups' indices."""
    groups = [g for g in program.groups if not isinstance(g, LayerGroup)]
    positions = kept_positions(tuple(groups), Plan({name: tuple(units) for name, units in kept.items()}))
    gone = {
        name
        for g in program.groups
        if isinstance(g, LayerGroup)
        for index, members in enumerate(g.members)
        if index not in kept.get(g.name, range(g.units))
        for name in members
    }
    seen, total = set(), 0
    for name, tensor in program.graph_module.named_parameters(remove_duplicate=False):
        linear = isinstance(program.graph_module.get_submodule(name.rpartition(".")[0]), nn.Linear)
        wanted = {
            "params": True,
            "ratio": linear and "lm_head" not in name,
            "macs": linear and name.endswith("weight"),
        }[measure]
        if name in gone or not wanted or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        aliases = [n for n, t in program.graph_module.named_parameters(remove_duplicate=False) if t is tensor]
        sizes = list(tensor.shape)
        for axis in range(len(sizes)):
            found = [positions[alias, axis] for alias in aliases if (alias, axis) in positions]
            if found:
                sizes[axis] = len(found[0])
        total += int(np.prod(sizes))
    return total


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_expected_removal_of_a_group_is_the_mean_over_all_gate_patterns(family: str) -> None:
    for group in located(family).groups:
        p = probabilities([group], 5)[group.name]
        mean = sum(chance * group.parameters_removed(kept) for chance, kept in patterns(p))
        assert float(expected_removed(group, independent_units(group, p))) == pytest.approx(mean, rel=1e-12)


def test_key_and_value_rows_stay_while_any_query_head_does() -> None:
    """The reference code counts query heads alone, and has no figure for grouped queries."""
    group = next(g for g in located("llama").groups if isinstance(g, AttentionGroup))
    assert group.shared_parameters > 0
    half = independent_units(group, torch.full((6,), 0.5, dtype=torch.float64))
    assert half.sets is not None
    assert half.sets.tolist() == pytest.approx([1 - 0.5**3] * 2)
    without = group.unit_parameters * 3
    assert float(expected_removed(group, half)) == pytest.approx(without + group.shared_parameters * 2 * 0.5**3)


@pytest.mark.parametrize("measure", ["params", "ratio", "macs"])
def test_every_weight_counts_under_the_product_of_its_gates(measure: str) -> None:
    """Heads, channels, hidden channels and layers at once, over all patterns of the undecided gates."""
    program = with_everything()
    kinds: dict[str, Group] = {}
    for group in program.groups:
        kinds.setdefault(group.kind, group)
    groups = list(kinds.values())
    assert set(kinds) == {"attention", "mlp", "hidden", "layers"}
    p = probabilities(groups, 2, seed=5)
    size = ExpectedSize(program, groups, measure)  # type: ignore[arg-type]
    mean = 0.0
    for joint in itertools.product(*(patterns(p[group.name]) for group in groups)):
        kept = {group.name: units for group, (_, units) in zip(groups, joint, strict=True)}
        mean += float(np.prod([chance for chance, _ in joint])) * count(program, kept, measure)
    assert float(size(opened(groups, p))) == pytest.approx(mean, rel=1e-12)
    assert float(size.sparsity(opened(groups, p))) == pytest.approx(1 - mean / size.dense)


def test_tied_weights_count_once() -> None:
    tied, untied = located("llama", tie_word_embeddings=True), located("llama")
    sizes = []
    for program in (tied, untied):
        size = ExpectedSize(program, program.groups, "params")
        p = {group.name: torch.ones(group.units) for group in program.groups}
        sizes.append(float(size(opened(program.groups, p))))
        assert sizes[-1] == size.dense == count_parameters(program.graph_module)
    assert sizes[1] - sizes[0] == 61 * 30
    macs = ExpectedSize(tied, tied.groups, "macs")  # and yet the output projection takes its MACs
    assert macs.dense == macs_per_token(tied.graph_module, outputs=tied.interface.outputs).linear


def test_with_decided_gates_the_size_is_what_the_budget_counts() -> None:
    program = located("qwen2")
    p = probabilities(program.groups, 0)
    kept = {name: [i for i, value in enumerate(row.tolist()) if value] for name, row in p.items()}
    for kind in ("ratio", "params", "macs"):
        model = cost_model(kind, program, program.groups)
        wanted = model.fixed + sum(model.cost(group, kept[group.name]) for group in program.groups)
        size = ExpectedSize(program, program.groups, kind)
        assert float(size(opened(program.groups, p))) == pytest.approx(wanted, rel=1e-12)


def test_gradients_equal_finite_differences() -> None:
    program = with_everything()
    size = ExpectedSize(program, program.groups, "params")
    logits = {g.name: torch.randn(g.units, dtype=torch.float64).requires_grad_() for g in program.groups}

    def sparsity(*values: Tensor) -> Tensor:
        given = dict(zip(logits, values, strict=True))
        return size.sparsity(opened(program.groups, {name: torch.sigmoid(value) for name, value in given.items()}))

    assert torch.autograd.gradcheck(sparsity, tuple(logits.values()), atol=1e-8)


def test_gradients_are_finite_and_exact_where_gates_are_certain() -> None:
    group = next(g for g in located("llama").groups if isinstance(g, AttentionGroup))
    p = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(expected_removed(group, independent_units(group, p)), p)
    own, shared = group.unit_parameters, group.shared_parameters
    assert grad.tolist() == pytest.approx([-own, -own, -own, *[-own - shared] * 3])


def test_sizes_are_summed_in_double_precision_whatever_the_gates_are_in() -> None:
    """The reference code sums in half precision, which has no odd numbers beyond 2048 and nothing beyond 65504."""
    program = located("llama")
    group = next(g for g in program.groups if g.kind == "mlp")
    size = ExpectedSize(program, [group], "params")
    for dtype in (torch.float16, torch.bfloat16):
        value = size({group.name: OpenUnits(torch.full((20,), 0.9375, dtype=dtype))})
        assert value.dtype is torch.float64
        assert float(value) == size.dense - 1.25 * group.unit_parameters != float(value.to(dtype))


def test_a_matrix_with_one_group_on_both_axes_counts_its_diagonal_once() -> None:
    program = located("llama")
    index = np.arange(5)[:, None]
    name = "model.layers.0.self_attn.k_proj.weight"  # any matrix whose axes are long enough
    group = HiddenGroup("square", 0, (UnitSlice(name, 0, index, 1, "rows"), UnitSlice(name, 1, index, 1, "columns")))
    rows, columns = program.graph_module.get_parameter(name).shape
    p = probabilities([group], 4)["square"]
    assert len(p) == 5
    size = ExpectedSize(program, [group], "params")
    mean = sum(
        chance * ((rows - 5 + len(kept)) * (columns - 5 + len(kept)) - rows * columns) for chance, kept in patterns(p)
    )
    assert float(size(opened([group], {"square": p}))) - size.dense == pytest.approx(mean)


def test_experts_are_refused() -> None:
    group = next(iter(located("llama").groups))
    other = type("ExpertLike", (type(group).__mro__[1],), {"kind": "experts"})("experts", 0, group.slices)
    with pytest.raises(PreconditionError, match="experts have no expected size"):
        ExpectedSize(located("llama"), [other])


# ---- latency -------------------------------------------------------------------------------------------------------


def table(groups: Sequence[Group]) -> LatencyTable:
    """Made-up times: convex in the channels, uneven in the heads."""
    cases = []
    for index, case in enumerate((prefill(16), decode(4, past=8))):
        blocks = {}
        for group in groups:
            width = dense_width(group)
            sets, per = ((1, 2), (1, 2, 3)) if isinstance(group, AttentionGroup) else ((5, 8, 14, width.sets), (1,))
            ms = tuple(tuple((s**1.5 + 0.3 * s * q) / (index + 1) for q in per) for s in sets)
            blocks[block_shape(group)] = Surface(tuple(sets), per, ms)
        cases.append(CaseLatency(case, 400.0 / (index + 1), blocks, 20.0))
    return LatencyTable(Identity("", "", "onnxruntime", "1", 1, "cpu", 1), tuple(cases))


MIX = {"prefill": 0.7, "decode": 0.3}


def test_latency_of_decided_gates_is_that_of_the_table() -> None:
    groups = located("llama").groups
    times = table(groups)
    latency = ExpectedLatency(times, groups, MIX)
    for heads, channels in ((range(6), 20), ([0, 1, 4, 5], 13), ([2], 3)):
        kept: dict[str, list[int]] = {g.name: list(heads if g.kind == "attention" else range(channels)) for g in groups}
        p = {g.name: torch.zeros(g.units).index_fill(0, torch.tensor(kept[g.name]), 1.0) for g in groups}
        wanted = sum(times.cost(g, kept[g.name], MIX) for g in groups)
        assert float(latency(opened(groups, p))) == pytest.approx(wanted + times.base(MIX))


def test_latency_between_widths_is_interpolated_with_exact_gradients() -> None:
    groups = located("llama").groups
    times = table(groups)
    latency = ExpectedLatency(times, groups, {"prefill": 1})
    mlp = next(g for g in groups if g.kind == "mlp")
    p = {g.name: torch.ones(g.units, dtype=torch.float64) for g in groups}
    low, high = (times.cost(mlp, Width(width), {"prefill": 1}) for width in (10, 11))
    values = []
    for width in (10, 10.25):
        p[mlp.name] = torch.full((20,), width / 20, dtype=torch.float64)
        values.append(float(latency(opened(groups, p))))
    assert values[1] - values[0] == pytest.approx(0.25 * (high - low))
    logits = tuple(torch.randn(g.units, dtype=torch.float64).requires_grad_() for g in groups)

    def cost(*given: Tensor) -> Tensor:
        named = zip(groups, given, strict=True)
        return latency({g.name: independent_units(g, torch.sigmoid(value)) for g, value in named})

    assert torch.autograd.gradcheck(cost, logits)


def test_latency_needs_times_for_every_group() -> None:
    groups = located("llama").groups
    partial = table([g for g in groups if g.kind == "mlp"])
    with pytest.raises(PlanError, match="no times for attention blocks"):
        ExpectedLatency(partial, groups, MIX)
