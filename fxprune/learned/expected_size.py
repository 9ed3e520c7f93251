"""How large a model with random gates is expected to be, exactly and with exact derivatives.

A weight stays when every unit it belongs to stays: a row of q_proj with its head, its layer, and, element by element,
the hidden channels that it reads. Gates are independent, so an element stays with the product of the probabilities, and
a matrix has

    layer * (rows that stay) * (columns that stay)

elements on average. The whole model is a polynomial in a few sums for each group (expected units, expected KV heads),
whose coefficients are integers that are found once; a step costs a product and a sum. Key and value rows stay as long
as any query head that reads them does, with probability 1 - prod(1 - p). A weight that several modules share counts
once. Sums are taken in float64: a share of a billion parameters has no room in half precision.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fxprune.channels.accounting import count_parameters, macs_per_token
from fxprune.channels.block_linears import block_linear_parameters, lm_heads
from fxprune.core.errors import PlanError, PreconditionError
from fxprune.core.groups import AttentionGroup, HiddenGroup, LayerGroup, MlpGroup
from fxprune.measure.latency_table import block_shape
from fxprune.tracing.lifted import is_projection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fxprune.core.groups import Group
    from fxprune.core.program import Program
    from fxprune.measure.latency_table import LatencyTable

__all__ = ["ExpectedLatency", "ExpectedSize", "Measure", "OpenUnits", "expected_removed", "independent_units"]

Measure = Literal["ratio", "params", "macs"]


@dataclass(frozen=True)
class OpenUnits:
    """Probabilities that the units of a group stay.

    Attributes:
        units: (units,), of each unit.
        sets: (sharing sets,) that any unit of the set stays, for a group with `sharing`; else None.
    """

    units: Tensor
    sets: Tensor | None = None


def independent_units(group: Group, probability: Tensor) -> OpenUnits:
    """Units with a gate each: a set that they share stays with probability 1 - prod(1 - p).

    Args:
        group: any group.
        probability: (units,) in [0, 1].
    """
    if group.sharing is None:
        return OpenUnits(probability)
    members = [np.flatnonzero(group.sharing == index) for index in range(int(group.sharing.max()) + 1)]
    # Sets may differ in size; what is missing is filled up with a unit that never stays.
    table = np.full((len(members), max(map(len, members))), group.units)
    for row, units in enumerate(members):
        table[row, : len(units)] = units
    padded = torch.cat([probability, probability.new_zeros(1)])
    return OpenUnits(probability, 1 - (1 - padded[torch.from_numpy(table).to(probability.device)]).prod(1))


def expected_removed(group: Group, open_units: OpenUnits) -> Tensor:
    """Expected value of `Group.parameters_removed`, a float64 scalar."""
    removed = group.unit_parameters * (1 - open_units.units.double()).sum()
    if isinstance(group, LayerGroup):
        sizes = torch.tensor(group.sizes, dtype=torch.float64, device=open_units.units.device)
        removed = (sizes * (1 - open_units.units.double())).sum()
    if open_units.sets is not None:
        removed = removed + group.shared_parameters * (1 - open_units.sets.double()).sum()
    return removed


# ---- the polynomial ------------------------------------------------------------------------------------------------

_Variable = tuple[str, str, int]
"""Name of a group, `units`, `sets`, `spread` (sum of p - p^2) or `unit`, and for the last which."""
_Polynomial = dict[tuple[_Variable, ...], int]


def _times(one: _Polynomial, other: _Polynomial) -> _Polynomial:
    product: Counter[tuple[_Variable, ...]] = Counter()
    for (left, a), (right, b) in itertools.product(one.items(), other.items()):
        product[tuple(sorted((*left, *right)))] += a * b
    return dict(product)


class ExpectedSize:
    """The expected number of parameters, block Linear parameters or MACs a token of a gated model.

    Args:
        program: the dense, lifted program.
        groups: those that have gates: heads, MLP channels, hidden channels, layers.
        measure: `params`: of all; `ratio`: of the block Linears, what a ratio is a share of; `macs`: of all Linears, a
            token, attention scores aside.

    Attributes:
        dense: the size when every unit stays.
        measure: see above.

    Raises:
        PreconditionError: a kind of group has no expected size here, or two axes of a weight belong to one attention.
    """

    def __init__(self, program: Program, groups: Sequence[Group], measure: Measure = "ratio") -> None:
        self.measure = measure
        self.groups = tuple(groups)
        for group in groups:
            if not isinstance(group, (AttentionGroup, MlpGroup, HiddenGroup, LayerGroup)):
                raise PreconditionError(f"{group.name}: {group.kind} have no expected size; gate other groups")
        counted = _counted(program, measure)
        self.dense = _dense(program, measure)
        # What is in no counted tensor (products without a weight of their own) stays whatever the gates are.
        rest = self.dense - sum(tensor.numel() * times for _, tensor, times in counted)
        total: Counter[tuple[_Variable, ...]] = Counter({(): rest})
        for names, tensor, times in counted:
            for key, value in self._elements(names, tensor).items():
                total[key] += value * times
        variables = sorted({variable for key in total for variable in key})
        self._place = {variable: index for index, variable in enumerate(variables)}
        degree = max(map(len, total))
        keys = [key for key, value in total.items() if value]
        # Factor number len(variables) is a 1 that fills up products of fewer factors.
        padded = [[*(self._place[v] for v in key), *[len(variables)] * (degree - len(key))] for key in keys]
        self._factors = torch.tensor(padded, dtype=torch.int64).reshape(len(keys), degree)
        self._coefficients = torch.tensor([total[key] for key in keys], dtype=torch.float64)

    def _elements(self, names: frozenset[str], tensor: Tensor) -> _Polynomial:
        """How many elements of a tensor stay."""
        product: _Polynomial = {(): 1}
        axes: list[list[tuple[Group, int, str]]] = []
        for axis, size in enumerate(tensor.shape):
            pieces = _pieces(self.groups, names, axis)
            free = size - sum(per_unit * (g.units if what == "units" else _sets(g)) for g, per_unit, what in pieces)
            polynomial: _Polynomial = {(): free}
            for group, per_unit, what in pieces:
                polynomial[(group.name, what, 0),] = per_unit
            product = _times(product, polynomial)
            axes.append(pieces)
        for first, second in itertools.combinations(range(len(axes)), 2):
            for (group, a, _), (other, b, _) in itertools.product(axes[first], axes[second]):
                if group is other:
                    others = [s for axis, s in enumerate(tensor.shape) if axis not in {first, second}]
                    if isinstance(group, AttentionGroup) or others:
                        raise PreconditionError(f"{min(names)}: two of its axes belong to {group.name}; leave it out")
                    # An element whose row and column are one unit stays with p, not p^2.
                    product[(group.name, "spread", 0),] = product.get(((group.name, "spread", 0),), 0) + a * b
        for group in self.groups:
            if isinstance(group, LayerGroup):
                for index, members in enumerate(group.members):
                    if names & set(members):
                        product = _times(product, {((group.name, "unit", index),): 1})
        return product

    def __call__(self, open_units: Mapping[str, OpenUnits]) -> Tensor:
        """The expected size, a float64 scalar with exact gradients.

        Args:
            open_units: of every group, by its name.
        """
        values = [self._variable(variable, open_units) for variable in self._place]
        device = values[0].device if values else torch.device("cpu")
        table = torch.stack([*values, torch.ones((), dtype=torch.float64, device=device)])
        if self._factors.device != device:
            self._factors, self._coefficients = self._factors.to(device), self._coefficients.to(device)
        return (table[self._factors].prod(1) * self._coefficients).sum()

    def _variable(self, variable: _Variable, open_units: Mapping[str, OpenUnits]) -> Tensor:
        name, what, index = variable
        found = open_units[name]
        if what == "sets":
            assert found.sets is not None
            return found.sets.double().sum()
        units = found.units.double()
        if what == "unit":
            return units[index]
        return (units - units.square()).sum() if what == "spread" else units.sum()

    def sparsity(self, open_units: Mapping[str, OpenUnits]) -> Tensor:
        """The expected share that goes, a float64 scalar."""
        return 1 - self(open_units) / self.dense


def _pieces(groups: Sequence[Group], names: frozenset[str], axis: int) -> list[tuple[Group, int, str]]:
    """Which units have indices along an axis of a tensor, and how many each."""
    found: dict[tuple[str, str], tuple[Group, int, str]] = {}
    for group in groups:
        for what, slices in (("units", group.slices), ("sets", group.shared)):
            # A tensor with several names is listed under one of them, or under each with the same indices.
            here = {s.parameter: s.per_unit for s in slices if s.parameter in names and s.axis == axis}
            if here:
                found[group.name, what] = (group, max(here.values()), what)
    return list(found.values())


def _sets(group: Group) -> int:
    assert group.sharing is not None
    return int(group.sharing.max()) + 1


def _counted(program: Program, measure: Measure) -> list[tuple[frozenset[str], Tensor, int]]:
    """The tensors that a measure counts, each once: all its names, itself, and how often its elements count."""
    module = program.graph_module
    names: dict[int, set[str]] = {}
    tensors: dict[int, Tensor] = {}
    tensor: Tensor
    times: Counter[int] = Counter()
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), set()).add(name)
        tensors[id(tensor)] = tensor
    for key, tensor in _chosen(program, measure):
        tensors.setdefault(key, tensor)
        times[key] = times[key] + 1 if measure == "macs" else 1
    return [(frozenset(names[key]), tensors[key], count) for key, count in times.items()]


def _chosen(program: Program, measure: Measure) -> Iterator[tuple[int, Tensor]]:
    module = program.graph_module
    if measure == "params":
        yield from ((id(tensor), tensor) for tensor in module.parameters())
        return
    if measure == "macs":
        for node in module.graph.nodes:
            if node.op == "call_module" and is_projection(child := module.get_submodule(str(node.target))):
                weight = child.weight
                assert isinstance(weight, Tensor)
                yield id(weight), weight
        return
    heads = lm_heads(module, outputs=program.interface.outputs)
    for name, child in module.named_modules():
        if is_projection(child) and name not in heads:
            yield from ((id(tensor), tensor) for tensor in child.parameters(recurse=False))


def _dense(program: Program, measure: Measure) -> int:
    module, outputs = program.graph_module, program.interface.outputs
    if measure == "params":
        return count_parameters(module)
    if measure == "macs":
        return macs_per_token(module, outputs=outputs).linear
    return block_linear_parameters(module, outputs=outputs)


# ---- by a latency table --------------------------------------------------------------------------------------------


class ExpectedLatency:
    """What gated blocks cost by a latency table, at their expected widths; differentiable.

    Like `LatencyTable.cost`, whose widths are integers: between these the cost is linear, so that where the gates are
    decided both agree. A gradient at a measured width is that of the wider side.

    Args:
        table: the latency table.
        groups: attentions and MLPs that have gates.
        mix: what share of the time each case stands for, see `LatencyTable.weights`.

    Raises:
        PlanError: the table has no times for a group.
    """

    def __init__(self, table: LatencyTable, groups: Sequence[Group], mix: Mapping[str, float]) -> None:
        self.groups = tuple(groups)
        self.base = table.base(mix)
        self._cases: list[tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]] = []
        shares = table.weights(mix)
        shapes = {block_shape(group) for group in groups}
        for group in groups:
            if not isinstance(group, (AttentionGroup, MlpGroup)):
                raise PlanError(f"{group.name}: {group.kind} have no expected latency; gate heads and MLP channels")
            table.ms(group, range(group.units))  # says what is missing
        for case in table.cases:
            surfaces = {
                shape: (
                    torch.tensor([0, *surface.sets], dtype=torch.float64),
                    torch.tensor(surface.per_set, dtype=torch.float64),
                    torch.tensor([[0.0] * len(surface.per_set), *surface.ms], dtype=torch.float64),
                )
                for shape, surface in case.blocks.items()
                if shape in shapes
            }
            self._cases.append((shares[case.case.name] / case.dense_ms, surfaces))

    def __call__(self, open_units: Mapping[str, OpenUnits]) -> Tensor:
        """The share of the dense model's time that remains, base included: a float64 scalar; 1 / it is the speed-up.

        Args:
            open_units: of every group, by its name.
        """
        by_shape: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for group in self.groups:
            found = open_units[group.name]
            units = found.units.double().sum()
            width = units, torch.ones_like(units)
            if isinstance(group, AttentionGroup):
                sets = units if found.sets is None else found.sets.double().sum()
                width = sets, units / sets.clamp(min=1e-9)
            by_shape.setdefault(block_shape(group), []).append(width)
        total = torch.zeros((), dtype=torch.float64) + self.base
        for shape, widths in by_shape.items():
            sets, per_set = (torch.stack(list(column)) for column in zip(*widths, strict=True))
            for weight, surfaces in self._cases:
                if weight:
                    total = total.to(sets.device) + weight * _interpolated(*surfaces[shape], sets, per_set).sum()
        return total


def _interpolated(xs: Tensor, ys: Tensor, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear interpolation on a grid, constant outside of it: values (len(xs), len(ys)) at points x, y (n,)."""
    (left, right, part), (low, high, share) = _between(xs, x), _between(ys, y)
    values = values.to(x.device)
    first = values[left, low] * (1 - share) + values[left, high] * share
    second = values[right, low] * (1 - share) + values[right, high] * share
    return first * (1 - part) + second * part


def _between(grid: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the grid points around each x, and how far x is between them, (n,) each."""
    grid = grid.to(x.device)
    right = torch.searchsorted(grid, x.detach().contiguous(), right=True).clamp(1, max(1, len(grid) - 1))
    right = right.clamp(max=len(grid) - 1)
    left = (right - 1).clamp(min=0)
    run = (grid[right] - grid[left]).clamp(min=1e-12)
    return left, right, ((x - grid[left]) / run).clamp(0, 1)
