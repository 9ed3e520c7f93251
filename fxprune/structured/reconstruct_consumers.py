"""Reconstruction of a model's consumers: in data-flow order, each on already pruned inputs, or all on dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxprune.calibration.engine import CalibrationEngine, EngineOptions, text_samples
from fxprune.calibration.stages import cut_stages
from fxprune.core.errors import UsageError
from fxprune.core.progress import track
from fxprune.structured.reconstruction import PairCollector, dense_ridge, moments_of_gram, reconstruct
from fxprune.tracing.graphs import copy_graph_module
from fxprune.tracing.lifted import make_linear, origin_of
from fxprune.tracing.lifted_graphs import own_projections
from fxprune.tracing.nodes import get_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.fx import GraphModule

    from fxprune.calibration.engine import SiteStatistics
    from fxprune.calibration.gram import Gram
    from fxprune.calibration.stages import Stage
    from fxprune.core.groups import Group
    from fxprune.core.plan import Plan
    from fxprune.core.program import Program
    from fxprune.structured.reconstruction import Reconstructed, Reconstruction

__all__ = ["Consumer", "add_biases", "consumers_of", "reconstruct_consumers", "reconstruct_on_grams"]

_HELD_OUT = 8
"""One of so many samples is kept to choose on."""


@dataclass(frozen=True)
class Consumer:
    """A Linear that reads units.

    Attributes:
        name: its qualified name.
        group: whose units.
        kept: (in,) bool, inputs that stay.
        unit_of: (in,) int64, the unit of each input, -1 for none.
    """

    name: str
    group: str
    kept: Tensor
    unit_of: Tensor


def _support(program: Program, name: str) -> Tensor | None:
    """The mask of a consumer's single weights, (in, out), on its device; None where none were removed."""
    mask = program.weight_masks.get(name)
    return None if mask is None else mask.t().to(get_attribute(program.graph_module, name).weight.device)


def consumers_of(groups: Sequence[Group], plan: Plan, graph_module: GraphModule) -> dict[str, Consumer]:
    """The consumers of all groups, by name."""
    found = {}
    for group in groups:
        removed = plan.removed_units(group)
        for piece in group.consumers:
            name = piece.parameter.removesuffix(".weight")
            weight = get_attribute(graph_module, name).weight
            unit_of = torch.full((weight.shape[1],), -1, dtype=torch.int64, device=weight.device)
            indices = torch.from_numpy(piece.indices).to(weight.device)
            unit_of[indices] = torch.arange(len(indices), device=weight.device)[:, None]
            kept = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            kept[indices[removed].reshape(-1)] = False
            found[name] = Consumer(name, group.name, kept, unit_of)
    return found


def add_biases(program: Program, biases: Mapping[str, Tensor]) -> Program:
    """Return the program with something added to the biases of some Linears; weights stay shared."""
    graph_module = copy_graph_module(program.graph_module)
    for name, bias in biases.items():
        old = get_attribute(graph_module, name)
        own = torch.zeros_like(bias) if old.bias is None else old.bias.detach().to(bias)
        new = nn.Parameter((own + bias).to(old.weight.dtype), old.weight.requires_grad)
        graph_module.set_submodule(name, make_linear(old.weight, new, origin_of(old)))
    return program.replace(graph_module=graph_module, channels=None)


def reconstruct_consumers(
    program: Program,
    consumers: Mapping[str, Consumer],
    tokens: Tensor,
    *,
    mode: Reconstruction,
    biases: bool,
    drift: float = 0.0,
    forward_dtype: torch.dtype | None,
    batch_size: int | None,
) -> tuple[Program, list[dict[str, Any]]]:
    """Give consumers their new weights.

    Args:
        program: the dense program; it is left as it is.
        consumers: by name.
        tokens: (samples, length) int64 calibration text; the last eighth of the samples is held out.
        mode: what may change.
        biases: whether biases may be added.
        drift: how much of what the layers before lost the targets ask back, from 0 to 1.
        forward_dtype: precision of the forward passes' products.
        batch_size: samples at once; None to find it.

    Returns:
        A program whose consumers are 0 in the columns that go, and what was done to each: name, choice, errors.

    Raises:
        UsageError: the mode is `dense`, which needs no text but Gram matrices.
    """
    if mode == "dense":
        raise UsageError("the reconstruction dense is reconstruct_on_grams, with the Gram matrices of input_grams")
    root = own_projections(program.graph_module, consumers)
    if mode == "none" or all(bool(one.kept.all()) for one in consumers.values()):
        for name, one in consumers.items():
            module = get_attribute(root, name)
            module.weight = nn.Parameter(module.weight.detach() * one.kept, module.weight.requires_grad)
        changed = [{"name": n, "choice": "none", "bias": False} for n, c in consumers.items() if not c.kept.all()]
        return program.replace(graph_module=root, channels=None), changed
    samples = text_samples(program.interface, tokens)
    held_out = len(tokens) - len(tokens) // _HELD_OUT
    graphs = (root, program.graph_module) if drift else (root,)
    cuts = [cut_stages(graph, consumers, samples.varying) for graph in graphs]
    dense = {name: get_attribute(program.graph_module, name).weight.detach() for name in consumers}
    masks = {name: _support(program, name) for name in consumers}
    solver = _Solver(root, consumers, dense, masks, mode=mode, biases=biases, drift=drift, held_out=held_out)
    engine = CalibrationEngine(
        cuts[0],
        samples,
        EngineOptions(forward_dtype=forward_dtype, batch_size=batch_size),
        dense=cuts[1] if drift else None,
        collector=solver.collector,
    )
    with track("reconstructing", len(cuts[0].stages)) as advance:
        engine.run(solver, on_stage=advance)
    return program.replace(graph_module=root, channels=None), solver.done


def reconstruct_on_grams(
    program: Program, consumers: Mapping[str, Consumer], grams: Mapping[str, Gram]
) -> tuple[Program, list[dict[str, Any]]]:
    """Give consumers the weights that least squares finds on what they read in the dense model.

    Args:
        program: the dense program; it is left as it is.
        consumers: by name.
        grams: X^T X of what each of them reads, see `fxprune.calibration.input_grams`.

    Returns:
        A program whose consumers are 0 in the columns that go, and what was done to each: name, choice, errors.
    """
    root = own_projections(program.graph_module, consumers)
    done = []
    with track("reconstructing", len(consumers)) as advance:
        for index, (name, one) in enumerate(consumers.items()):
            if not bool(one.kept.all()):
                weight = get_attribute(root, name).weight.detach().double().t()
                moments = moments_of_gram(grams[name], weight)
                found = reconstruct(
                    weight,
                    one.kept,
                    moments,
                    None,
                    mode="ridge",
                    bias=False,
                    ridges=(dense_ridge(len(weight), moments.tokens),),
                    mask=_support(program, name),
                )
                done.append(_put(root, name, found))
            advance(index + 1)
    return program.replace(graph_module=root, channels=None), done


def _put(root: GraphModule, name: str, found: Reconstructed) -> dict[str, Any]:
    """Give a Linear its new weights; returns what the report says of it."""
    module = get_attribute(root, name)
    learns = module.weight.requires_grad
    dtype = module.weight.dtype
    module.weight = nn.Parameter(found.weight.t().to(dtype).contiguous(), learns)
    if found.bias is not None:
        own = torch.zeros_like(found.bias) if module.bias is None else module.bias.detach().to(found.bias)
        module.bias = nn.Parameter((own + found.bias).to(dtype), learns)
    entry = {"name": name, "choice": found.choice, "bias": found.bias is not None}
    return {**entry, "error": found.error, "plain_error": found.plain}


class _Solver:
    """Solves a stage's consumers when the engine has run it."""

    def __init__(
        self,
        root: GraphModule,
        consumers: Mapping[str, Consumer],
        dense: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | None],
        *,
        mode: Reconstruction,
        biases: bool,
        drift: float,
        held_out: int,
    ) -> None:
        self.root = root
        self.consumers = consumers
        self.dense = dense
        self.masks = masks
        self.mode = mode
        self.biases = biases
        self.drift = drift
        self.held_out = held_out
        self.done: list[dict[str, Any]] = []
        self._pairs: PairCollector | None = None

    def collector(self) -> PairCollector:
        """What the engine collects a stage with."""
        self._pairs = PairCollector(self.dense, self.held_out, self.drift)
        return self._pairs

    def __call__(self, stage: Stage, statistics: Sequence[SiteStatistics]) -> None:
        """Solve what the sites of a stage feed."""
        del stage
        assert self._pairs is not None
        for name in (linear for one in statistics for linear in one.site.linears):
            consumer = self.consumers[name]
            fit, held = self._pairs.moments[name]
            found = reconstruct(
                self.dense[name].t(),
                consumer.kept,
                fit,
                held,
                mode=self.mode,
                bias=self.biases,
                unit_of=consumer.unit_of,
                mask=self.masks[name],
            )
            self.done.append(_put(self.root, name, found))
